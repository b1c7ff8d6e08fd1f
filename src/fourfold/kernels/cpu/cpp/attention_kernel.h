// What an instruction set has to offer for attention: tiles of keys against rows of queries.
//
// A row is one query head of one token; rows of an item go token by token, the heads of the group within. Each
// row has a state of state_floats(D) floats: the sum of e^(s - m) v, [D]; then m, in base 2; then the sum of
// e^(s - m). Included by files compiled for different instruction sets: declarations and plain data only.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fourfold {

constexpr std::int64_t kTileKeys = 256;

struct KeyTile {
    const AttentionProblem* problem;
    const std::int32_t* blocks;
    std::int64_t kv_head, begin, end;  // positions; begin is a multiple of kTileKeys, end - begin at most that
    std::int64_t next;                 // how many positions after `end` will be wanted soon
    bool first;                        // nobody announced this tile as `next`
};

struct QueryRows {
    std::int64_t count, group, start;  // `start` is the position of the first row's token
    const void* queries;               // as pack_query laid them out
    float* states;
};

struct AttentionKernel {
    // bytes of a packed tile and of one packed query; both stand 64-byte aligned
    std::int64_t (*tile_bytes)(std::int64_t head_dim);
    std::int64_t (*query_bytes)(std::int64_t head_dim);
    void (*pack_query)(const float* q, std::int64_t head_dim, void* packed);
    void (*pack_tile)(const KeyTile& tile, void* packed);
    // both merge the tile into the rows' states; the second, null or for 1 to kFewRows rows, needs no packed tile
    void (*attend)(const KeyTile& tile, const void* packed, const QueryRows& rows);
    void (*attend_few)(const KeyTile& tile, const QueryRows& rows);
    void (*merge)(float* state, const float* part, std::int64_t head_dim);
};

constexpr std::int64_t kStateTail = 16;

constexpr std::int64_t kFewRows = 8;

// Where the keys of a tile begin in the cache, in elements; their values stand kv_heads * head_dim further on.
void key_offsets(const KeyTile& tile, std::int64_t count, std::int64_t* offsets);

extern const AttentionKernel kAttentionPortable;
#if defined(FOURFOLD_AVX2)
extern const AttentionKernel kAttentionAvx2;
#endif
#if defined(FOURFOLD_AVX512)
extern const AttentionKernel kAttentionAvx512[3];  // by KVType
#endif
#if defined(FOURFOLD_AVX512BF16)
extern const AttentionKernel kAttentionAvx512Bf16[3];  // f32 is missing
#endif

}  // namespace fourfold
