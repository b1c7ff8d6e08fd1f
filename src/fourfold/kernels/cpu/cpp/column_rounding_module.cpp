// Column and row rounding for Python: checks every array, lets go of the GIL, and deals out the rows.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "array.h"
#include "column_rounding.h"
#include "module.h"
#include "row_rounding.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

using Element = std::tuple<int, int, int, int, float, std::int64_t>;

template <typename T>
T* matrix_of(nb::handle tensor, const char* name, std::int64_t rows, std::int64_t columns, bool writable = false) {
    Matrix matrix(tensor, name, writable);
    if (matrix.dtype() != nb::dtype<T>()) matrix.fail("has the wrong type");
    if (matrix.rows() != rows || matrix.columns() != columns) matrix.fail("has the wrong shape");
    return matrix.data<T>();
}

Matrix floats_of(nb::handle tensor, const char* name, bool writable = false) {
    Matrix matrix(tensor, name, writable);
    if (matrix.dtype() != nb::dtype<float>()) matrix.fail("must be float32");
    return matrix;
}

// [1, count] numbers in [0, limit).
const std::int64_t* numbers_of(nb::handle tensor, const char* name, std::int64_t count, std::int64_t limit) {
    const auto* numbers = matrix_of<std::int64_t>(tensor, name, 1, count);
    for (std::int64_t i = 0; i < count; ++i)
        if (numbers[i] < 0 || numbers[i] >= limit) throw nb::value_error((std::string(name) + " are out of range").c_str());
    return numbers;
}

ElementRules rules_of(const Element& element) {
    const auto [bits, mantissa_bits, min_exponent, max_exponent, max, added_from] = element;
    if (bits != 4 && bits != 6 && bits != 8) throw nb::value_error("an element must have 4, 6 or 8 bits");
    if (mantissa_bits < 1 || mantissa_bits > 6) throw nb::value_error("an element must have 1 to 6 bits of mantissa");
    if (min_exponent < -60 || max_exponent > 60 || !(max > 0)) throw nb::value_error("this is no element");
    return {bits, mantissa_bits, min_exponent, max_exponent, max, added_from};
}

void check_blocks(const Matrix& matrix, std::int64_t width, std::int64_t most) {
    if (width < 1 || width % kBlock || width > most) matrix.fail("must have columns in blocks of 32, not too many");
}

template <typename Problem, void (*work)(const Problem&, std::int64_t, std::int64_t)>
void deal_out(const Problem& problem, std::int64_t rows, bool alone) {
    nb::gil_scoped_release unlocked;
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        work(*static_cast<const Problem*>(context), begin, end);
    };
    const std::int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    if (alone) body(&problem, 0, groups);
    else parallel_for(groups, 4, body, &problem);
}

void turn(nb::handle weight_tensor, nb::handle places, nb::handle importance, nb::handle turned, nb::handle scales,
          const Element& element, bool search, bool alone) {
    const Matrix weight = floats_of(weight_tensor, "weight");
    const std::int64_t rows = weight.rows(), columns = weight.columns();
    check_blocks(weight, columns, columns);
    const TurnedColumns taken{
        weight.data<const float>(), rows, columns,
        numbers_of(places, "places", columns, columns),
        matrix_of<float>(importance, "importance", 1, columns),
        matrix_of<float>(turned, "turned", columns, rows, true),
        matrix_of<std::uint8_t>(scales, "scales", columns / kBlock, rows, true),
        rules_of(element), search};
    deal_out<TurnedColumns, turn_columns>(taken, rows, alone);
}

void round(nb::handle turned_tensor, nb::handle scale_tensor, nb::handle blocks, nb::handle reach, nb::handle pull,
           nb::handle diagonal, nb::handle pending, nb::handle errors, nb::handle before, const Element& element,
           bool alone) {
    const Matrix turned = floats_of(turned_tensor, "turned", true), scales(scale_tensor, "scales");
    const std::int64_t columns = turned.rows(), rows = turned.columns();
    check_blocks(turned, columns, kMostColumns);
    const ColumnRounding problem{
        turned.data<float>(), rows, columns,
        matrix_of<std::uint8_t>(scale_tensor, "scales", scales.rows(), rows),
        numbers_of(blocks, "blocks", columns, scales.rows()),
        matrix_of<float>(reach, "reach", columns, columns),
        pull.is_none() ? nullptr : matrix_of<float>(pull, "pull", columns, columns),
        matrix_of<float>(diagonal, "diagonal", 1, columns),
        pending.is_none() ? nullptr : matrix_of<float>(pending, "pending", columns, rows),
        matrix_of<float>(errors, "errors", columns, rows, true),
        matrix_of<float>(before, "before", columns, rows, true),
        rules_of(element)};
    deal_out<ColumnRounding, round_columns>(problem, rows, alone);
}

void put(nb::handle turned_tensor, nb::handle places, nb::handle scales, nb::handle weight, nb::handle codes,
         nb::handle turned_back, const Element& element, bool alone) {
    const Matrix turned = floats_of(turned_tensor, "turned");
    const std::int64_t columns = turned.rows(), rows = turned.columns();
    check_blocks(turned, columns, columns);
    const ElementRules rules = rules_of(element);
    const RoundedColumns rounded{
        turned.data<const float>(), rows, columns,
        numbers_of(places, "places", columns, columns),
        matrix_of<std::uint8_t>(scales, "scales", columns / kBlock, rows),
        matrix_of<float>(weight, "weight", rows, columns, true),
        matrix_of<std::uint8_t>(codes, "codes", rows, columns * rules.bits / 8, true),
        matrix_of<std::uint8_t>(turned_back, "scales turned back", rows, columns / kBlock, true),
        rules};
    deal_out<RoundedColumns, put_columns>(rounded, rows, alone);
}

void round_group(nb::handle row_tensor, std::int64_t first, nb::handle reach_tensor, nb::handle standing,
                 const Element& element, bool alone) {
    const Matrix rows = floats_of(row_tensor, "rows", true), reach = floats_of(reach_tensor, "reach");
    const std::int64_t columns = reach.rows();
    check_blocks(reach, columns, kMostColumns);
    if (first < 0 || first + columns > rows.columns()) rows.fail("do not have such columns");
    const RowRounding problem{
        rows.data<float>(), rows.rows(), rows.columns(), first, columns,
        matrix_of<float>(reach_tensor, "reach", columns, columns),
        matrix_of<float>(standing, "standing", columns, kBlock), rules_of(element)};
    deal_out<RowRounding, round_rows>(problem, problem.count, alone);
}

}  // namespace

void bind_column_rounding(nb::module_& module) {
    module.def("turn_columns", &turn, "weight"_a, "places"_a, "importance"_a, "turned"_a, "scales"_a, "element"_a,
               "search"_a, "alone"_a);
    module.def("round_columns", &round, "turned"_a, "scales"_a, "blocks"_a, "reach"_a, "pull"_a.none(), "diagonal"_a,
               "pending"_a.none(), "errors"_a, "before"_a, "element"_a, "alone"_a);
    module.def("put_columns", &put, "turned"_a, "places"_a, "scales"_a, "weight"_a, "codes"_a, "turned_back"_a,
               "element"_a, "alone"_a);
    module.def("round_rows", &round_group, "rows"_a, "first"_a, "reach"_a, "standing"_a, "element"_a, "alone"_a);
}

}  // namespace fourfold
