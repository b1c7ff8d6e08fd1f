// How a problem is cut into items, and what an item does; the arithmetic is the kernel's.
//
// Most items are (sequence, tile of query tokens, key head) and go through all tiles of keys. When there are too
// few of them for a handful of threads, those with few rows are cut further, by tiles of keys: every part leaves
// one state per tile in the problem's scratch, and the last to finish merges them in their order, which gives the
// same bits as one item would have. The price is a write and a read of one state per 256 keys.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "attention_kernel.h"
#include "processor.h"

namespace fourfold {
namespace {

constexpr std::int64_t kItemRows = 128;   // rows that share a packed tile
constexpr std::int64_t kSplitRows = 32;   // more rows than this are never split by keys
constexpr std::int64_t kEnoughItems = 16; // from so many on nothing is split
constexpr std::int64_t kCounterBytes = kEnoughItems * 64;
constexpr float kLog2E = 1.44269504088896340736f;

struct Item {
    const SequenceSpan* span;
    std::int64_t token, tokens, kv_head;  // tokens of the span
    std::int64_t first_tile, tiles;       // tiles of keys that these tokens see
    std::int64_t part, parts;
    std::int64_t split;   // number of this split piece of work, for its counter
    std::int64_t states;  // first state of its parts in the scratch
};

std::int64_t group_of(const AttentionProblem& p) { return p.heads / p.kv_heads; }

std::int64_t state_floats(std::int64_t head_dim) { return head_dim + kStateTail; }

std::int64_t tokens_together(const AttentionProblem& p) {
    return std::max<std::int64_t>(1, kItemRows / group_of(p));
}

std::int64_t query_tiles(const AttentionProblem& p, const SequenceSpan& span) {
    return (span.count + tokens_together(p) - 1) / tokens_together(p);
}

std::int64_t unsplit_items(const AttentionProblem& p) {
    std::int64_t items = 0;
    for (std::int64_t i = 0; i < p.span_count; ++i) items += query_tiles(p, p.spans[i]) * p.kv_heads;
    return items;
}

std::int64_t first_tile(const AttentionProblem& p, std::int64_t position) {
    return p.window ? std::max<std::int64_t>(0, position - p.window + 1) / kTileKeys : 0;
}

std::int64_t tiles_seen(const AttentionProblem& p, std::int64_t from, std::int64_t to) {
    return to / kTileKeys - first_tile(p, from) + 1;
}

std::int64_t parts_of(const AttentionProblem& p, const SequenceSpan& span, std::int64_t unsplit) {
    if (unsplit >= kEnoughItems || span.count * group_of(p) > std::max(kSplitRows, group_of(p))) return 1;
    std::int64_t wanted = (2 * kEnoughItems + unsplit - 1) / unsplit;
    return std::min(wanted, tiles_seen(p, span.start, span.start + span.count - 1));
}

// The item of this number; heavy ones (late tokens) come first within a span.
Item find_item(const AttentionProblem& p, std::int64_t index) {
    const std::int64_t unsplit = unsplit_items(p);
    std::int64_t split = 0, states = 0;
    for (const SequenceSpan* span = p.spans;; ++span) {
        const std::int64_t tiles = query_tiles(p, *span), parts = parts_of(p, *span, unsplit);
        const std::int64_t rows = span->count * group_of(p);
        const std::int64_t seen = tiles_seen(p, span->start, span->start + span->count - 1);
        if (index >= tiles * parts * p.kv_heads) {
            index -= tiles * parts * p.kv_heads;
            split += parts > 1 ? p.kv_heads : 0;
            states += parts > 1 ? p.kv_heads * rows * seen : 0;
            continue;
        }
        Item item{span, 0, 0, index % p.kv_heads, 0, 0, index / p.kv_heads % parts, parts, 0, 0};
        item.token = (tiles - 1 - index / p.kv_heads / parts) * tokens_together(p);
        item.tokens = std::min(tokens_together(p), span->count - item.token);
        const std::int64_t from = span->start + item.token;
        item.first_tile = first_tile(p, from);
        item.tiles = tiles_seen(p, from, from + item.tokens - 1);
        item.split = split + item.kv_head;
        item.states = states + item.kv_head * rows * seen;
        return item;
    }
}

unsigned char* aligned(unsigned char* memory) {
    return memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) % 64;
}

struct Scratch {
    std::unique_ptr<unsigned char[]> memory;
    std::int64_t size = 0;
    unsigned char* at_least(std::int64_t bytes) {
        if (bytes > size) {
            memory.reset(new unsigned char[static_cast<std::size_t>(bytes) + 64]);
            size = bytes;
        }
        return aligned(memory.get());
    }
};
thread_local Scratch t_scratch;

void forget(float* states, std::int64_t rows, std::int64_t head_dim) {
    for (std::int64_t row = 0; row < rows; ++row) {
        float* state = states + row * state_floats(head_dim);
        std::fill(state, state + head_dim, 0.0f);
        state[head_dim] = -std::numeric_limits<float>::infinity();
        state[head_dim + 1] = 0.0f;
    }
}

struct Work {
    const AttentionProblem& p;
    const AttentionKernel& kernel;
    const Item item;
    std::int64_t rows() const { return item.tokens * group_of(p); }
    std::int64_t row_of_q(std::int64_t row) const { return item.span->row + item.token + row / group_of(p); }
    std::int64_t head(std::int64_t row) const { return item.kv_head * group_of(p) + row % group_of(p); }
    float* part_states() const {
        return reinterpret_cast<float*>(scratch() + kCounterBytes) + item.states * state_floats(p.head_dim);
    }
    std::atomic<std::int32_t>& counter() const {
        return *reinterpret_cast<std::atomic<std::int32_t>*>(scratch() + item.split * 64);
    }
    unsigned char* scratch() const { return aligned(static_cast<unsigned char*>(p.scratch)); }
};

void pack_queries(const Work& work, unsigned char* packed) {
    const AttentionProblem& p = work.p;
    const std::int64_t stride = p.q_stride ? p.q_stride : p.heads * p.head_dim;
    const std::int64_t bytes = work.kernel.query_bytes(p.head_dim);
    for (std::int64_t row = 0; row < work.rows(); ++row)
        work.kernel.pack_query(p.q + work.row_of_q(row) * stride + work.head(row) * p.head_dim, p.head_dim,
                               packed + row * bytes);
}

// Tiles [from, to) of those that the item sees; `step` is how far apart the states of two tiles are.
void go_through(const Work& work, std::int64_t from, std::int64_t to, float* states, std::int64_t step) {
    const AttentionProblem& p = work.p;
    const Item& item = work.item;
    const std::int64_t tile_bytes = work.kernel.tile_bytes(p.head_dim);
    unsigned char* packed = t_scratch.at_least(0);
    const std::int64_t start = item.span->start + item.token;
    QueryRows rows{work.rows(), group_of(p), start, packed + tile_bytes, states};
    pack_queries(work, packed + tile_bytes);
    for (std::int64_t i = from; i < to; ++i, rows.states += step) {
        const std::int64_t begin = (item.first_tile + i) * kTileKeys;
        const std::int64_t end = std::min(begin + kTileKeys, start + item.tokens);
        const std::int64_t next = i + 1 < to ? std::min(end + kTileKeys, start + item.tokens) - end : 0;
        const KeyTile tile{&p, item.span->blocks, item.kv_head, begin, end, next, i == from};
        if (work.kernel.attend_few && rows.count <= kFewRows) {
            work.kernel.attend_few(tile, rows);
        } else {
            work.kernel.pack_tile(tile, packed);
            work.kernel.attend(tile, packed, rows);
        }
    }
}

void finish(const Work& work, const float* states) {
    const AttentionProblem& p = work.p;
    const float scale = p.kv_scales ? p.kv_scales[p.kv_heads + work.item.kv_head] : 1.0f;
    for (std::int64_t row = 0; row < work.rows(); ++row) {
        const float* state = states + row * state_floats(p.head_dim);
        float sum = state[p.head_dim + 1];
        if (p.sinks) sum += std::exp2(p.sinks[work.head(row)] * kLog2E - state[p.head_dim]);
        const float factor = scale / sum;
        float* out = p.out + (work.row_of_q(row) * p.heads + work.head(row)) * p.head_dim;
        for (std::int64_t d = 0; d < p.head_dim; ++d) out[d] = state[d] * factor;
    }
}

void run_part(const Work& work, float* states) {
    const Item& item = work.item;
    const std::int64_t step = work.rows() * state_floats(work.p.head_dim);
    const std::int64_t from = item.tiles * item.part / item.parts, to = item.tiles * (item.part + 1) / item.parts;
    forget(work.part_states() + from * step, work.rows() * (to - from), work.p.head_dim);
    go_through(work, from, to, work.part_states() + from * step, step);
    if (work.counter().fetch_add(1, std::memory_order_acq_rel) != item.parts - 1) return;
    work.counter().store(0, std::memory_order_relaxed);
    forget(states, work.rows(), work.p.head_dim);
    const float* part = work.part_states();
    for (std::int64_t i = 0; i < item.tiles * work.rows(); ++i, part += state_floats(work.p.head_dim))
        work.kernel.merge(states + i % work.rows() * state_floats(work.p.head_dim), part, work.p.head_dim);
    finish(work, states);
}

void run_item(const Work& work) {
    const std::int64_t fixed = work.kernel.tile_bytes(work.p.head_dim);
    const std::int64_t queries = (work.rows() * work.kernel.query_bytes(work.p.head_dim) + 63) / 64 * 64;
    const std::int64_t states_bytes = work.rows() * state_floats(work.p.head_dim) * 4;
    unsigned char* scratch = t_scratch.at_least(fixed + queries + states_bytes);
    auto* states = reinterpret_cast<float*>(scratch + fixed + queries);
    if (work.item.parts > 1) return run_part(work, states);
    forget(states, work.rows(), work.p.head_dim);
    go_through(work, 0, work.item.tiles, states, 0);
    finish(work, states);
}

const AttentionKernel& kernel_for(AttentionIsa isa, KVType type) {
    const auto runs = [isa](AttentionIsa it) {
        return (isa == AttentionIsa::automatic || isa >= it) && attention_has(it);
    };
#if defined(FOURFOLD_AVX512BF16)
    if (type != KVType::f32 && runs(AttentionIsa::avx512bf16)) return kAttentionAvx512Bf16[static_cast<int>(type)];
#endif
#if defined(FOURFOLD_AVX512)
    if (runs(AttentionIsa::avx512)) return kAttentionAvx512[static_cast<int>(type)];
#endif
#if defined(FOURFOLD_AVX2)
    if (runs(AttentionIsa::avx2)) return kAttentionAvx2;
#endif
    (void)runs;
    (void)type;
    return kAttentionPortable;
}

}  // namespace

bool attention_has(AttentionIsa isa) {
    switch (isa) {
#if defined(FOURFOLD_AVX512BF16)
        case AttentionIsa::avx512bf16:
            return processor_has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(FOURFOLD_AVX512)
        case AttentionIsa::avx512:
            return processor_has_avx512();
#endif
#if defined(FOURFOLD_AVX2)
        case AttentionIsa::avx2:
            return processor_has_avx2();
#endif
        case AttentionIsa::automatic:
        case AttentionIsa::portable:
            return true;
        default:
            return false;
    }
}

void key_offsets(const KeyTile& tile, std::int64_t count, std::int64_t* offsets) {
    const AttentionProblem& p = *tile.problem;
    const std::int64_t width = 2 * p.kv_heads * p.head_dim;
    const std::int32_t* block = tile.blocks + tile.begin / p.block_size;
    std::int64_t within = tile.begin % p.block_size;
    for (std::int64_t i = 0; i < count; within = 0, ++block) {
        std::int64_t at = (*block * p.block_size + within) * width + tile.kv_head * p.head_dim;
        const std::int64_t end = std::min(count, i + p.block_size - within);
        for (; i < end; ++i, at += width) offsets[i] = at;
    }
}

std::int64_t attention_scratch_bytes(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                                     std::int64_t longest) {
    const std::int64_t rows = kEnoughItems * std::max(kSplitRows, heads / kv_heads);
    return 64 + kCounterBytes + rows * (longest / kTileKeys + 1) * state_floats(head_dim) * 4;
}

std::int64_t attention_items(const AttentionProblem& p) {
    const std::int64_t unsplit = unsplit_items(p);
    std::int64_t items = 0;
    for (std::int64_t i = 0; i < p.span_count; ++i)
        items += query_tiles(p, p.spans[i]) * p.kv_heads * parts_of(p, p.spans[i], unsplit);
    return items;
}

void attention(const AttentionProblem& problem, std::int64_t item_begin, std::int64_t item_end, AttentionIsa isa) {
    const AttentionKernel& kernel = kernel_for(isa, problem.type);
    for (std::int64_t i = item_begin; i < item_end; ++i) run_item(Work{problem, kernel, find_item(problem, i)});
}

}  // namespace fourfold
