// Programs for Python: every operation's tensors are checked when it is recorded, and only the step's own numbers when
// it runs. The recorder (program.py) keeps the tensors alive.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "module.h"
#include "ops_attention.h"
#include "ops_experts.h"
#include "ops_linear.h"
#include "ops_rows.h"
#include "program.h"
#include "program_arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

class Recorder {
public:
    Recorder(std::int64_t most_rows, std::int64_t vocabulary)
        : program_(most_rows, vocabulary), rows_(most_rows), vocabulary_(vocabulary) {}

    std::int64_t size() const { return program_.size(); }

    static std::int64_t prepared_size(const std::string& arithmetic, std::int64_t rows, std::int64_t k) {
        return prepared_bytes(arithmetic == "int8" ? Arithmetic::int8 : Arithmetic::exact, rows, k);
    }

    // At once, a row after the other: for tests.
    static void apply(nb::handle x, nb::handle rotation, nb::handle element, nb::handle out) {
        Matrix from(x, "x");
        const std::int64_t n = from.columns();
        const float* values = floats_of(x, "x", from.rows(), n);
        const Rows to = rows_of(out, "out", from.rows(), n);
        const InputScheme scheme = scheme_of(rotation, element, n);
        for (std::int64_t i = 0; i < from.rows(); ++i) apply_scheme(scheme, values + i * n, n, to.row(i));
    }

    void embed(nb::handle table, float scale, nb::handle out) {
        Embed::Table from;
        std::int64_t n;
        if (nb::hasattr(table, "kind")) {
            from.packed = weight_of(table);
            n = from.packed.k;
        } else {
            Matrix matrix(table, "table");
            n = matrix.columns();
            if (matrix.rows() < vocabulary_) matrix.fail("is too small");
            if (matrix.dtype() == nb::dtype<float>()) from.wide = matrix.data<const float>();
            else from.narrow = matrix.data<const std::uint16_t>();
        }
        add<Embed>(from, scale, rows_of(out, "out", rows_, n), n);
    }

    void angles(std::vector<float> speeds, float scale, nb::handle out) {
        Rows to = rows_of(out, "out", rows_, static_cast<std::int64_t>(2 * speeds.size()));
        add<Angles>(std::move(speeds), scale, to);
    }

    void rows(nb::handle x, std::int64_t n, nb::handle norm, float floor, const std::string& gate, float alpha, float limit,
              const std::vector<Memory>& prepared, nb::handle rotation, nb::handle element, nb::handle out, bool accumulate,
              std::int64_t each) {
        const std::int64_t rows = rows_ * each;
        RowPath path;
        path.n = n;
        path.gated = !gate.empty();
        path.gate = {activation_of(gate), alpha, limit};
        path.x = rows_of(x, "x", rows, path.gated ? 2 * n : n);
        path.norm = floats_of(norm, "norm", 1, n);
        path.floor = floor;
        path.inputs = inputs_of(prepared, rotation, element, rows, n);
        if (path.inputs.scheme.any() && accumulate) throw nb::value_error("only prepared inputs have a scheme");
        if (!out.is_none()) path.out = rows_of(out, "out", rows, n);
        path.add = accumulate;
        path.each = each;
        add<RowPathOp>(std::move(path));
    }

    void linear(nb::handle weight, const Memory& input, nb::handle out, std::int64_t column, bool accumulate) {
        LinearPath path = linear_path(weight, input, out, column, rows_);
        path.sink = accumulate ? Sink::add : Sink::store;
        add<Linear>(path);
    }

    void gated(nb::handle weight, const Memory& input, nb::handle out, const std::string& gate, float alpha, float limit,
               const std::vector<Memory>& prepared, nb::handle rotation, nb::handle element) {
        LinearPath path = linear_path(weight, input, out, 0, rows_, 2);
        const std::int64_t n = path.weight.n / 2, together = prepared.empty() ? kTileRows : kSchemeBlock;
        if (path.weight.n % (2 * together)) throw nb::value_error("gate and up must be whole tiles, or blocks of 32 values");
        if (out.is_none() == prepared.empty()) throw nb::value_error("what is gated must be either stored or prepared");
        path.gated = inputs_of(prepared, rotation, element, rows_, n);
        path.sink = Sink::gate;
        path.gate = {activation_of(gate), alpha, limit};
        add<Linear>(path);
    }

    void logits(nb::handle weight, const Memory& input, nb::handle out, nb::handle tokens, float cap) {
        LinearPath path = linear_path(weight, input, out, 0, rows_);
        Matrix chosen(tokens, "tokens", true);
        if (chosen.dtype() != nb::dtype<std::int32_t>() || chosen.columns() < rows_) chosen.fail("is no room for tokens");
        const Logits& logits = add<Logits>(path, rows_, cap);
        add<Argmax>(logits, chosen.data<std::int32_t>());
    }

    // What follows is of the chosen rows alone, which come to stand first in the given columns of buffers.
    void choose(const std::vector<std::pair<nb::object, std::int64_t>>& buffers) {
        std::vector<Choose::Columns> columns;
        for (const auto& [buffer, n] : buffers) columns.push_back({rows_of(buffer, "buffer", rows_, n), n});
        add<Choose>(std::move(columns));
        program_.narrow();
    }

    // The float32 router, and what it decides for the expert layers that follow, until the next router.
    void route(nb::handle x, std::int64_t n, nb::handle weight, nb::handle bias, std::int64_t top_k, bool among_chosen) {
        Matrix matrix(weight, "weight");
        const std::int64_t experts = matrix.rows();
        if (top_k < 1 || top_k > experts) throw nb::value_error("top_k must be 1 to the number of experts");
        routings_.push_back(std::make_unique<Routing>(rows_, top_k, experts));
        add<Score>(*routings_.back(), rows_of(x, "x", rows_, n), n, floats_of(weight, "weight", experts, n),
                   floats_of(bias, "bias", 1, experts));
        add<Route>(*routings_.back(), among_chosen);
        add<Group>(*routings_.back());
    }

    void gather(const Memory& from, const Memory& to, std::int64_t k) {
        const Routing& routing = last_routing();
        add<Gather>(routing, prepared_of(from, rows_, k), prepared_of(to, rows_ * routing.top_k, k));
    }

    void experts(const nb::list& weights, const Memory& input, nb::handle out, const std::string& gate, float alpha, float limit) {
        const Routing& routing = last_routing();
        std::vector<PackedWeight> packed;
        for (nb::handle weight : weights) {
            packed.push_back(weight_of(weight));
            if (packed.back().kind != packed[0].kind || packed.back().n != packed[0].n || packed.back().k != packed[0].k)
                throw nb::value_error("experts must be of one kind and shape");
        }
        if (packed.size() + 1 != routing.first.size()) throw nb::value_error("there must be a weight for each expert");
        const bool gated = !gate.empty();
        LinearPath path = linear_path(weights[0], input, out, 0, rows_ * routing.top_k, gated ? 2 : 1);
        if (gated && path.weight.n % (2 * kTileRows)) throw nb::value_error("gate and up must be whole tiles");
        path.sink = gated ? Sink::gate : Sink::store;
        path.gate = {activation_of(gate), alpha, limit};
        add<ExpertLinear>(routing, path, std::move(packed));
    }

    void combine(nb::handle x, std::int64_t n, nb::handle out, bool accumulate) {
        const Routing& routing = last_routing();
        add<Combine>(routing, rows_of(x, "x", rows_ * routing.top_k, n), n, rows_of(out, "out", rows_, n), accumulate);
    }

    void heads(nb::handle qkv, std::int64_t heads, std::int64_t kv_heads, std::int64_t d, nb::handle angles, nb::handle norm,
               float floor, std::int64_t layer, const std::string& type, nb::handle kv_scales) {
        HeadPath path{rows_of(qkv, "qkv", rows_, (heads + 2 * kv_heads) * d), heads, kv_heads, d,
                      rows_of(angles, "angles", rows_, d), floats_of(norm, "norm", heads + kv_heads, d), floor, layer,
                      kv_type_of(type), floats_of(kv_scales, "kv_scales", 1, 2 * kv_heads)};
        add<Heads>(path);
    }

    void attention(nb::handle qkv, std::int64_t heads, std::int64_t kv_heads, std::int64_t d, nb::handle out, std::int64_t layer,
                   const std::string& type, nb::handle kv_scales, float scale, float softcap, std::int64_t window,
                   nb::handle sinks, std::int64_t longest) {
        Rows q = rows_of(qkv, "qkv", rows_, heads * d);
        Rows to = rows_of(out, "out", rows_, heads * d);
        if (to.stride != heads * d || d % 16) throw nb::value_error("out must be [T, heads * d], d a multiple of 16");
        AttentionProblem problem{q.data, heads, kv_heads, d, nullptr, kv_type_of(type),
                                 floats_of(kv_scales, "kv_scales", 1, 2 * kv_heads), 0, nullptr, 0, scale, softcap, window,
                                 floats_of(sinks, "sinks", 1, heads), to.data, nullptr, q.stride};
        const std::int64_t bytes = attention_scratch_bytes(heads, kv_heads, d, longest);
        problem.scratch = attention_scratch(bytes);
        add<AttentionOp>(AttentionPath{problem, layer});
    }

    void use_cache(nb::handle cache, std::int64_t blocks, std::int64_t block_size) {
        Matrix layers(cache, "cache", true);
        program_.use_cache(layers.data<char>(), layers.columns() * layers.dtype().bits / 8, blocks, block_size);
    }

    void run(std::int64_t begin, std::int64_t end, nb::handle tokens, nb::handle spans, nb::handle tables, nb::handle chosen) {
        Integers ids(tokens), parts(spans), blocks(tables), rows(chosen);
        if (parts.size() % 3) throw nb::value_error("a span is three integers");
        StepInput input{ids.data(), ids.size(), reinterpret_cast<const SpanInput*>(parts.data()), parts.size() / 3,
                        blocks.data(), blocks.size(), rows.data(), rows.size()};
        nb::gil_scoped_release unlocked;
        program_.run(begin, end, input);
    }

private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };

    template <typename T, typename... Args>
    T& add(Args&&... args) {
        return static_cast<T&>(program_.add(std::make_unique<T>(std::forward<Args>(args)...)));
    }

    LinearPath linear_path(nb::handle weight, const Memory& input, nb::handle out, std::int64_t column, std::int64_t rows,
                           std::int64_t gated = 1) {
        LinearPath path;
        path.weight = weight_of(weight);
        path.input = prepared_of(input, rows, path.weight.k);
        if (out.is_none()) return path;
        path.out = rows_of(out, "out", rows, column + path.weight.n / gated);
        path.out.data += column;
        return path;
    }

    // One for all layers of equal heads: layers come one after the other.
    void* attention_scratch(std::int64_t bytes) {
        if (scratches_.empty() || scratches_.back().first != bytes) {
            scratches_.emplace_back(bytes, std::unique_ptr<void, Free>(std::calloc(static_cast<std::size_t>(bytes), 1)));
            if (!scratches_.back().second) throw std::bad_alloc();
        }
        return scratches_.back().second.get();
    }

    const Routing& last_routing() const {
        if (routings_.empty()) throw nb::value_error("experts need a router before them");
        return *routings_.back();
    }

    Program program_;
    std::vector<std::unique_ptr<Routing>> routings_;
    const std::int64_t rows_, vocabulary_;
    std::vector<std::pair<std::int64_t, std::unique_ptr<void, Free>>> scratches_;
};

}  // namespace

void bind_program(nb::module_& module) {
    nb::class_<Recorder>(module, "Program")
        .def(nb::init<std::int64_t, std::int64_t>(), "most_rows"_a, "vocabulary"_a)
        .def("__len__", &Recorder::size)
        .def_static("apply_scheme", &Recorder::apply, "x"_a, "rotation"_a.none(), "element"_a.none(), "out"_a)
        .def_static("prepared_bytes", &Recorder::prepared_size, "arithmetic"_a, "rows"_a, "k"_a)
        .def("embed", &Recorder::embed, "table"_a, "scale"_a, "out"_a)
        .def("angles", &Recorder::angles, "speeds"_a, "scale"_a, "out"_a)
        .def("rows", &Recorder::rows, "x"_a, "n"_a, "norm"_a.none() = nb::none(), "floor"_a = 0.0f, "kind"_a = "", "alpha"_a = 1.0f, "limit"_a = 0.0f,
             "prepared"_a = std::vector<Memory>(), "rotation"_a.none() = nb::none(), "element"_a.none() = nb::none(), "out"_a.none() = nb::none(), "accumulate"_a = false,
             "each"_a = 1)
        .def("linear", &Recorder::linear, "weight"_a, "input"_a, "out"_a, "column"_a = 0, "accumulate"_a = false)
        .def("gated", &Recorder::gated, "weight"_a, "input"_a, "out"_a.none(), "gate"_a, "alpha"_a, "limit"_a,
             "prepared"_a = std::vector<Memory>(), "rotation"_a.none() = nb::none(), "element"_a.none() = nb::none())
        .def("choose", &Recorder::choose, "buffers"_a)
        .def("route", &Recorder::route, "x"_a, "n"_a, "weight"_a, "bias"_a.none(), "top_k"_a, "among_chosen"_a)
        .def("gather", &Recorder::gather, "source"_a, "target"_a, "k"_a)
        .def("experts", &Recorder::experts, "weights"_a, "input"_a, "out"_a, "gate"_a, "alpha"_a, "limit"_a)
        .def("combine", &Recorder::combine, "x"_a, "n"_a, "out"_a, "accumulate"_a)
        .def("logits", &Recorder::logits, "weight"_a, "input"_a, "out"_a, "tokens"_a, "cap"_a)
        .def("heads", &Recorder::heads, "qkv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "angles"_a, "norm"_a.none(), "floor"_a,
             "layer"_a, "kv_type"_a, "kv_scales"_a.none())
        .def("attention", &Recorder::attention, "qkv"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "out"_a, "layer"_a, "kv_type"_a,
             "kv_scales"_a.none(), "scale"_a, "softcap"_a, "window"_a, "sinks"_a.none(), "longest"_a)
        .def("use_cache", &Recorder::use_cache, "cache"_a, "blocks"_a, "block_size"_a)
        .def("run", &Recorder::run, "begin"_a, "end"_a, "tokens"_a, "spans"_a, "tables"_a, "chosen"_a);
}

}  // namespace fourfold
