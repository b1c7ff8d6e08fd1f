// Drawing for Python: rows are checked, the GIL is let go of, and the threads share the rows.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "drawing.h"
#include "module.h"
#include "row_math.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Draw = std::tuple<std::int64_t, std::int64_t, double, double, std::int64_t, double, double>;
using Asked = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
using Logprobs = std::pair<double, std::vector<std::pair<std::int32_t, double>>>;

thread_local Weights weights;

struct Row {
    const float* logits;
    std::int64_t n;
};

Row row_of(const Floats& logits, std::int64_t row) {
    const auto n = static_cast<std::int64_t>(logits.shape(1));
    if (logits.stride(1) != 1 || n == 0 || n > 0x7fffffff) throw nb::value_error("logits must be rows of 1 to 2^31 - 1 values");
    if (row < 0 || row >= static_cast<std::int64_t>(logits.shape(0))) throw nb::value_error("there is no such row");
    return {logits.data() + row * logits.stride(0), n};
}

std::int32_t draw_one(const Row& row, const Draw& draw) {
    const auto [number, likeliest, uniform, temperature, top_k, top_p, min_p] = draw;
    if (!std::isfinite(row.logits[likeliest])) return static_cast<std::int32_t>(likeliest);  // there is no distribution
    weights.of(row.logits, row.n, likeliest, static_cast<float>(temperature));
    return weights.draw({top_k, top_p, static_cast<float>(min_p)}, uniform);
}

Logprobs logprobs_one(const Row& row, const Asked& asked) {
    const auto [number, token, count] = asked;
    const std::int64_t largest = argmax_row(row.logits, row.n);
    weights.of(row.logits, row.n, largest, 1.0f);
    const bool broken = !std::isfinite(row.logits[largest]);
    const double whole = broken ? NAN : row.logits[largest] + std::log(weights.total());
    Logprobs found{row.logits[token] - whole, {}};
    if (broken) return found;
    for (const std::int32_t likely : weights.likeliest(count))
        found.second.emplace_back(likely, row.logits[likely] - whole);
    return found;
}

// What `one` makes of the row that each of `wanted` begins with, all threads together.
template <typename Result, typename Wanted, Result one(const Row&, const Wanted&)>
std::vector<Result> for_rows(const Floats& logits, const std::vector<Wanted>& wanted) {
    struct Work {
        const std::vector<Wanted>& wanted;
        std::vector<Row> rows;
        std::vector<Result> results;
    } work{wanted, {}, std::vector<Result>(wanted.size())};
    for (const Wanted& each : wanted) work.rows.push_back(row_of(logits, std::get<0>(each)));
    const Body body = [](const void* context, std::int64_t begin, std::int64_t end) {
        Work& all = *static_cast<Work*>(const_cast<void*>(context));
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
            all.results[i] = one(all.rows[i], all.wanted[i]);
    };
    nb::gil_scoped_release unlocked;
    parallel_for(static_cast<std::int64_t>(wanted.size()), 1, body, &work);
    return std::move(work.results);
}

// Every one of `wanted` names a token in its second place.
template <typename Wanted>
void check_tokens(const Floats& logits, const std::vector<Wanted>& wanted) {
    for (const Wanted& each : wanted)
        if (std::get<1>(each) < 0 || std::get<1>(each) >= static_cast<std::int64_t>(logits.shape(1)))
            throw nb::value_error("there is no such token");
}

std::vector<std::int32_t> draw(const Floats& logits, const std::vector<Draw>& draws) {
    check_tokens(logits, draws);
    return for_rows<std::int32_t, Draw, draw_one>(logits, draws);
}

std::vector<Logprobs> logprobs(const Floats& logits, const std::vector<Asked>& asked) {
    check_tokens(logits, asked);
    return for_rows<Logprobs, Asked, logprobs_one>(logits, asked);
}

}  // namespace

void bind_drawing(nb::module_& module) {
    // float32 [.., V]; (row, its largest's token, uniform, temperature, top_k, top_p, min_p) of each token to draw
    module.def("draw", &draw, "logits"_a, "draws"_a);
    // (row, token, count): the token's logprob, and tokens and logprobs of the `count` likeliest; NaN without a distribution
    module.def("logprobs", &logprobs, "logits"_a, "asked"_a);
}

}  // namespace fourfold
