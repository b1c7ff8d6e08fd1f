// Column rounding for Python: checks every array, lets go of the GIL, and deals out the rows.
#include "column_rounding.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "array.h"
#include "module.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

constexpr std::int64_t kBlock = 32;

using Element = std::tuple<int, int, int, int, float, std::int64_t>;

template <typename T>
T* matrix_of(nb::handle tensor, const char* name, std::int64_t rows, std::int64_t columns, bool writable = false) {
    Matrix matrix(tensor, name, writable);
    if (matrix.dtype() != nb::dtype<T>()) matrix.fail("has the wrong type");
    if (matrix.rows() != rows || matrix.columns() != columns) matrix.fail("has the wrong shape");
    return matrix.data<T>();
}

ElementRules rules_of(const Element& element) {
    const auto [bits, mantissa_bits, min_exponent, max_exponent, max, added_from] = element;
    if (bits != 4 && bits != 6 && bits != 8) throw nb::value_error("an element must have 4, 6 or 8 bits");
    if (mantissa_bits < 1 || mantissa_bits > 6) throw nb::value_error("an element must have 1 to 6 bits of mantissa");
    if (min_exponent < -60 || max_exponent > 60 || !(max > 0)) throw nb::value_error("this is no element");
    return {bits, mantissa_bits, min_exponent, max_exponent, max, added_from};
}

// A block's columns are 32, and lie where its first column says.
void check_starts(const Matrix& starts, std::int64_t width) {
    if (starts.dtype() != nb::dtype<std::int64_t>()) starts.fail("must be int64");
    if (starts.rows() != 1 || starts.columns() < 1 || starts.columns() > kMostColumns / kBlock)
        starts.fail("must be [1, 1..4]");
    for (std::int64_t i = 0; i < starts.columns(); ++i) {
        const std::int64_t start = starts.data<const std::int64_t>()[i];
        if (start < 0 || start + kBlock > width || start % kBlock) starts.fail("name a block that is not there");
    }
}

void round(nb::handle weight_tensor, nb::handle codes, nb::handle scales, nb::handle start_tensor, nb::handle reach,
           nb::handle pull, nb::handle standing, nb::handle diagonal, nb::handle pending, nb::handle errors,
           nb::handle before, const Element& element, bool search, bool alone) {
    Matrix weight(weight_tensor, "weight", true), starts(start_tensor, "starts");
    if (weight.dtype() != nb::dtype<float>()) weight.fail("must be float32");
    const std::int64_t rows = weight.rows(), width = weight.columns();
    check_starts(starts, width);
    const std::int64_t columns = starts.columns() * kBlock;
    const ElementRules rules = rules_of(element);
    const ColumnRounding problem{
        weight.data<float>(), rows, width,
        matrix_of<std::uint8_t>(codes, "codes", rows, width * rules.bits / 8, true),
        matrix_of<std::uint8_t>(scales, "scales", rows, width / kBlock, true),
        starts.data<const std::int64_t>(), columns,
        matrix_of<float>(reach, "reach", columns, columns),
        pull.is_none() ? nullptr : matrix_of<float>(pull, "pull", columns, columns),
        matrix_of<float>(standing, "standing", columns, kBlock),
        matrix_of<float>(diagonal, "diagonal", 1, columns),
        pending.is_none() ? nullptr : matrix_of<float>(pending, "pending", columns, rows),
        matrix_of<float>(errors, "errors", columns, rows, true),
        matrix_of<float>(before, "before", columns, rows, true),
        rules, search};
    nb::gil_scoped_release unlocked;
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        round_columns(*static_cast<const ColumnRounding*>(context), begin, end);
    };
    const std::int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    if (alone) body(&problem, 0, groups);
    else parallel_for(groups, 4, body, &problem);
}

}  // namespace

void bind_column_rounding(nb::module_& module) {
    module.def("round_columns", &round, "weight"_a, "codes"_a, "scales"_a, "starts"_a, "reach"_a, "pull"_a.none(),
               "standing"_a, "diagonal"_a, "pending"_a.none(), "errors"_a, "before"_a, "element"_a, "search"_a,
               "alone"_a);
}

}  // namespace fourfold
