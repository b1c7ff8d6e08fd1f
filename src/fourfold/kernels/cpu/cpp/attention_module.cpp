// Attention for Python: checks every array, lets go of the GIL, and deals out the items.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "array.h"
#include "attention.h"
#include "module.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

constexpr std::int64_t kMostHeadDim = 1024;

constexpr const char* kIsas[] = {"auto", "portable", "avx2", "avx512", "avx512bf16"};

AttentionIsa attention_isa(const std::string& name) {
    for (int i = 0; i < 5; ++i)
        if (name == kIsas[i] && attention_has(static_cast<AttentionIsa>(i))) return static_cast<AttentionIsa>(i);
    throw nb::value_error("isa must be one of auto, portable, avx2, avx512, avx512bf16, and one that can run here");
}

KVType kv_type(const Matrix& cache) {
    auto type = cache.dtype();
    if (type == nb::dtype<float>()) return KVType::f32;
    if (type == nb::dtype<std::uint8_t>()) return KVType::fp8;
    bool bfloat = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat);
    if (!bfloat || type.bits != 16 || type.lanes != 1) cache.fail("must be float32, bfloat16 or uint8 (E4M3)");
    return KVType::bf16;
}

void expect_floats(const Matrix& matrix, std::int64_t rows, std::int64_t columns) {
    if (matrix.dtype() != nb::dtype<float>()) matrix.fail("must be float32");
    if (matrix.rows() != rows || matrix.columns() != columns) matrix.fail("has the wrong shape");
}

template <typename Integer>
void expect_integers(const Matrix& matrix, std::int64_t rows, std::int64_t columns) {
    if (matrix.dtype() != nb::dtype<Integer>()) matrix.fail("has the wrong integer type");
    if (matrix.rows() != rows || matrix.columns() != columns) matrix.fail("has the wrong shape");
}

// One row of floats, or null for None.
const float* optional_row(nb::handle tensor, const char* name, std::int64_t columns) {
    if (tensor.is_none()) return nullptr;
    Matrix matrix(tensor, name);
    expect_floats(matrix, 1, columns);
    return matrix.data<const float>();
}

struct Spans {
    std::vector<SequenceSpan> spans;
    std::int64_t longest = 0;

    Spans(const Matrix& rows, const Matrix& tables, std::int64_t tokens, std::int64_t blocks, std::int64_t size) {
        expect_integers<std::int64_t>(rows, rows.rows(), 3);
        expect_integers<std::int32_t>(tables, rows.rows(), tables.columns());
        for (std::int64_t i = 0; i < rows.rows(); ++i) {
            const std::int64_t* s = rows.data<const std::int64_t>() + 3 * i;
            SequenceSpan span{s[0], s[1], s[2], tables.data<const std::int32_t>() + i * tables.columns()};
            const std::int64_t end = span.start + span.count;
            if (span.row < 0 || span.count < 1 || span.start < 0 || span.row + span.count > tokens)
                rows.fail("has a span outside q");
            if (end > tables.columns() * size) tables.fail("are too short for a span");
            for (std::int64_t b = 0; b < (end + size - 1) / size; ++b)
                if (span.blocks[b] < 0 || span.blocks[b] >= blocks) tables.fail("name a block that is not there");
            longest = longest > end ? longest : end;
            spans.push_back(span);
        }
    }
};

struct Task {
    const AttentionProblem& problem;
    AttentionIsa isa;
};

struct WriteTask {
    KVWrite write;
    AttentionIsa isa;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

void attend(nb::handle q_tensor, nb::handle cache_tensor, nb::handle span_tensor, nb::handle table_tensor,
            nb::handle out_tensor, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t block_size, float scale,
            float softcap, std::int64_t window, nb::handle kv_scales, nb::handle sinks, const std::string& isa_name) {
    Matrix q(q_tensor, "q"), cache(cache_tensor, "cache"), out(out_tensor, "out", true);
    Matrix spans(span_tensor, "spans"), tables(table_tensor, "tables");
    const AttentionIsa isa = attention_isa(isa_name);
    if (head_dim < 16 || head_dim % 16 || head_dim > kMostHeadDim)
        throw nb::value_error("head_dim must be 16, 32, ... 1024");
    if (kv_heads < 1 || q.columns() % (kv_heads * head_dim)) q.fail("must be [T, heads * head_dim]");
    if (block_size < 1 || cache.columns() != block_size * 2 * kv_heads * head_dim)
        cache.fail("must be [blocks, block_size * 2 * kv_heads * head_dim]");
    if (!(scale > 0.0f) || softcap < 0.0f || window < 0)
        throw nb::value_error("scale must be > 0, softcap and window >= 0");
    expect_floats(q, q.rows(), q.columns());
    expect_floats(out, q.rows(), q.columns());
    const std::int64_t heads = q.columns() / head_dim;
    const Spans checked(spans, tables, q.rows(), cache.rows(), block_size);
    const std::int64_t bytes = attention_scratch_bytes(heads, kv_heads, head_dim, checked.longest);
    std::unique_ptr<void, Free> scratch(std::calloc(static_cast<std::size_t>(bytes), 1));
    if (!scratch) throw std::bad_alloc();
    const AttentionProblem problem{q.data<const float>(), heads, kv_heads, head_dim, cache.data(), kv_type(cache),
                                   optional_row(kv_scales, "kv_scales", 2 * kv_heads), block_size,
                                   checked.spans.data(), static_cast<std::int64_t>(checked.spans.size()), scale,
                                   softcap, window, optional_row(sinks, "sinks", heads), out.data<float>(), scratch.get()};
    nb::gil_scoped_release unlocked;
    const Task task{problem, isa};
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        auto& it = *static_cast<const Task*>(context);
        attention(it.problem, begin, end, it.isa);
    };
    parallel_for(attention_items(problem), 1, body, &task);
}

void write(nb::handle kv_tensor, nb::handle cache_tensor, nb::handle slot_tensor, std::int64_t kv_heads,
           std::int64_t head_dim, nb::handle kv_scales, const std::string& isa_name) {
    Matrix kv(kv_tensor, "kv"), cache(cache_tensor, "cache", true), slots(slot_tensor, "slots");
    const std::int64_t width = 2 * kv_heads * head_dim;
    if (width < 1 || cache.columns() % width) cache.fail("must be [blocks, block_size * 2 * kv_heads * head_dim]");
    expect_floats(kv, kv.rows(), width);
    expect_integers<std::int32_t>(slots, 1, kv.rows());
    const std::int64_t most = cache.rows() * (cache.columns() / width);
    for (std::int64_t i = 0; i < kv.rows(); ++i)
        if (slots.data<const std::int32_t>()[i] < 0 || slots.data<const std::int32_t>()[i] >= most)
            slots.fail("name a slot that is not there");
    const WriteTask task{{kv.data<const float>(), width, kv_heads, head_dim, cache.data(), kv_type(cache),
                        optional_row(kv_scales, "kv_scales", 2 * kv_heads), slots.data<const std::int32_t>()},
                         attention_isa(isa_name)};
    nb::gil_scoped_release unlocked;
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        auto& it = *static_cast<const WriteTask*>(context);
        write_kv(it.write, begin, end, it.isa);
    };
    parallel_for(kv.rows(), 16, body, &task);
}

nb::list attention_isas() {
    nb::list names;
    for (int i = 1; i < 5; ++i)
        if (attention_has(static_cast<AttentionIsa>(i))) names.append(kIsas[i]);
    return names;
}

}  // namespace

void bind_attention(nb::module_& module) {
    module.def("attention", &attend, "q"_a, "cache"_a, "spans"_a, "tables"_a, "out"_a, "kv_heads"_a, "head_dim"_a,
               "block_size"_a, "scale"_a, "softcap"_a = 0.0f, "window"_a = 0, "kv_scales"_a = nb::none(),
               "sinks"_a = nb::none(), "isa"_a = "auto");
    module.def("attention_isas", &attention_isas);
    module.def("write_kv", &write, "kv"_a, "cache"_a, "slots"_a, "kv_heads"_a, "head_dim"_a,
               "kv_scales"_a = nb::none(), "isa"_a = "auto");
}

}  // namespace fourfold
