// Causal attention over a paged KV cache: decodes and chunks of prompts, mixed in one call.
//
// For query head h of a token at position p, with key head g = h / (heads / kv_heads), over all positions
// i <= p (and i > p - window, where there is a window):
//     s_i = scale * q . k_i                 then cap * tanh(s_i / cap), where there is a softcap
//     out = sum_i e^(s_i - m) v_i / (sum_i e^(s_i - m) + e^(sink_h - m)),  m = max_i s_i
// The cache of one layer is [blocks, block_size, 2 * kv_heads, head_dim], keys' heads first; position i of a
// sequence is in block blocks[i / block_size] of its table. FP8 is E4M3: value = code * scale of the head.
//
// Positions are cut into tiles of 256 from position 0. Softmax runs over a tile, and tiles are merged from the
// first to the last. So a row's result depends on its own position, keys and values alone: not on the rows
// beside it, on how a prompt was cut into chunks, on threads, nor on who computed which tile.
//
// Everything here is thread-free: the caller hands out items [0, attention_items(p)) to its threads, best one by
// one, since they differ in size. Where sequences are few and long, an item is a part of a context, and the
// thread that finishes the last part merges them.
#pragma once

#include <cstdint>

namespace fourfold {

enum class AttentionIsa : int { automatic, portable, avx2, avx512, avx512bf16 };
bool attention_has(AttentionIsa isa);  // the processor has it and this build holds it

enum class KVType : int { bf16, f32, fp8 };

struct SequenceSpan {
    std::int64_t row, count, start;  // rows [row, row + count) of q stand at positions from `start` on
    const std::int32_t* blocks;
};

struct AttentionProblem {
    const float* q;  // [T, heads, head_dim]
    std::int64_t heads, kv_heads, head_dim;  // head_dim is a multiple of 16
    const void* cache;                       // of this layer
    KVType type;
    const float* kv_scales;  // [2 * kv_heads], fp8 only; null: all 1
    std::int64_t block_size;
    const SequenceSpan* spans;
    std::int64_t span_count;
    float scale, softcap;  // scale > 0; softcap 0: none
    std::int64_t window;   // 0: none
    const float* sinks;    // [heads], or null
    float* out;            // [T, heads, head_dim]
    void* scratch;         // attention_scratch_bytes(), zeros before its first use only
    std::int64_t q_stride = 0;  // floats from one row of q to the next; 0: heads * head_dim
};

// Enough for any problem of these heads with contexts of at most `longest` positions; mostly never touched.
std::int64_t attention_scratch_bytes(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                                     std::int64_t longest);
std::int64_t attention_items(const AttentionProblem& problem);
void attention(const AttentionProblem& problem, std::int64_t item_begin, std::int64_t item_end,
               AttentionIsa isa = AttentionIsa::automatic);

struct KVWrite {
    const float* kv;  // [T, 2 * kv_heads, head_dim], keys' heads first, rows `stride` floats apart
    std::int64_t stride, kv_heads, head_dim;
    void* cache;
    KVType type;
    const float* kv_scales;     // as above
    const std::int32_t* slots;  // [T]: block * block_size + offset
};

// Rows [row_begin, row_end) into the cache: bf16 to nearest even; E4M3 likewise, saturating at +-448 * scale.
void write_kv(const KVWrite& write, std::int64_t row_begin, std::int64_t row_end,
              AttentionIsa isa = AttentionIsa::automatic);

}  // namespace fourfold
