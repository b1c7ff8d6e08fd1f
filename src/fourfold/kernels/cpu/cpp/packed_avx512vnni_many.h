// int8 for many rows of x: some blocks of a tile are decoded into the first two caches, where all rows meet them.
//
// A vpdpbusd issues every cycle only while nothing else wants the two units that multiply: no decoding, no float
// multiplication, and no wait for a block's sums. So the sums of one block are scaled between the dot products of the
// next, on the units that add.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "packed_avx512.h"
#include "packed_avx512vnni.h"

namespace fourfold {
namespace {

constexpr int kRowsInStep = 8;
constexpr std::int64_t kPanelBlocks = 64;

// Blocks of a tile.
struct Panel {
    __m512i codes[kPanelBlocks][8];
    __m512 exponents[kPanelBlocks];
};

template <typename Weight>
void decode(const PackedWeight& w, std::int64_t t, std::int64_t begin, std::int64_t end, Panel& panel) {
    const std::uint8_t* tile = w.data + t * tile_bytes(w.kind, w.k);
    const Weight weight;
    for (std::int64_t b = begin; b < end; ++b) {
        weight.decode(tile + codes_at(w.kind, b), panel.codes[b - begin]);
        panel.exponents[b - begin] = exponents(tile + scales_at(w.kind, w.k, b), Weight::kUnit);
    }
}

template <int MR>
struct Rows {
    const char* x;  // of the block that comes next
    std::int64_t stride;
    __m512 sums[MR];

    const Int8Block& block(int row, int ahead) const {
        return reinterpret_cast<const Int8Block*>(x + row * stride)[ahead];
    }

    // What the last block's dot products add to the sums, under the exponents of its scales.
    void scale(int row, const __m512i (&dots)[MR], __m512 exponents) {
        sums[row] = add_scaled(dots[row], block(row, -1), exponents, sums[row]);
    }

    // The dot products of the next block, and meanwhile what is left to do for the last.
    template <bool first = false>
    void add(const __m512i (&codes)[8], __m512i (&next)[MR], const __m512i (&last)[MR], __m512 exponents) {
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) next[i] = _mm512_set1_epi32(block(i, 0).start);
#pragma GCC unroll 8
        for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i)
                next[i] = _mm512_dpbusd_epi32(next[i], codes[g], broadcast4(block(i, 0).codes + 4 * g));
#pragma GCC unroll 8
            for (int i = g * MR / 8; !first && i < (g + 1) * MR / 8; ++i) scale(i, last, exponents);
        }
        x += sizeof(Int8Block);
    }

    // And fetches `lines` of memory with every two blocks.
    void add(const Panel& panel, std::int64_t blocks, const std::uint8_t* memory, std::int64_t lines) {
        __m512i even[MR], odd[MR];
        add<true>(panel.codes[0], even, even, panel.exponents[0]);
        std::int64_t b = 1;
        for (; b + 1 < blocks; b += 2) {
            for (std::int64_t i = 0; i < lines; ++i, memory += 64) _mm_prefetch(memory, _MM_HINT_T0);
            add(panel.codes[b], odd, even, panel.exponents[b - 1]);
            add(panel.codes[b + 1], even, odd, panel.exponents[b]);
        }
        if (b < blocks) {
            add(panel.codes[b], odd, even, panel.exponents[b - 1]);
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i) even[i] = odd[i];
        }
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) scale(i, even, panel.exponents[blocks - 1]);
    }
};

// Adds the panel, blocks [begin, end) of tile t, to rows [first, first + rows) of out.
template <int MR = kRowsInStep>
void add_panel(const PackedLinear& p, std::int64_t t, const Panel& panel, std::int64_t begin, std::int64_t end,
               std::int64_t first, std::int64_t rows, const std::uint8_t* memory, std::int64_t lines) {
    if constexpr (MR > 1) {
        if (rows < MR) return add_panel<MR - 1>(p, t, panel, begin, end, first, rows, memory, lines);
    }
    const std::int64_t stride = prepared_row_bytes(Arithmetic::int8, p.weight.k);
    const char* x = static_cast<const char*>(p.prepared) + first * stride + begin * std::int64_t{sizeof(Int8Block)};
    Rows<MR> step{x, stride, {}};
    if (begin > 0) load(p, t, first, step.sums);
    step.add(panel, end - begin, memory, lines);
    store(p, t, first, step.sums);
}

// Panels are gone through outermost, so that a panel's part of x stays in the second-level cache for all tiles. While
// all rows meet a panel, that of the next tile is fetched bit by bit.
template <typename Weight>
void many_rows(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    const std::int64_t k = call.weight.k, sets = (call.m + kRowsInStep - 1) / kRowsInStep;
    Panel panel;
    for (std::int64_t begin = 0; begin < blocks_of(k); begin += kPanelBlocks) {
        const std::int64_t end = std::min(begin + kPanelBlocks, blocks_of(k)), pairs = (end - begin) / 2;
        const std::int64_t from = codes_at(Weight::kKind, begin), bytes = codes_at(Weight::kKind, end) - from;
        const std::int64_t lines = bytes / 64 / (sets * std::max<std::int64_t>(1, pairs)) + 1;
        PackedLinear p = call;
        if (end < blocks_of(k)) p.weight.bias = nullptr;  // it is added last
        for (std::int64_t t = tile_begin; t < tile_end; ++t) {
            const std::uint8_t* next = p.weight.data + (t + 1) * tile_bytes(Weight::kKind, k) + from;
            decode<Weight>(p.weight, t, begin, end, panel);
            for (std::int64_t s = 0; s < sets; ++s) {
                const std::int64_t first = p.m * s / sets;
                add_panel(p, t, panel, begin, end, first, p.m * (s + 1) / sets - first, next, lines);
                next += lines * pairs * 64;
            }
        }
    }
}

}  // namespace
}  // namespace fourfold
