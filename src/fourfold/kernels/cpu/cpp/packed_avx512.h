// The loops of the AVX-512 kernels, whatever they multiply with; for files compiled for AVX-512, each its own copy.
//
// A block of a tile is decoded to registers once for up to kMostRows rows of x. For more rows, a group of tiles that
// stays in the second-level cache is gone through for one set of rows after the other, whose x stays in the first.
// Each sum is formed block after block, in the same order however many rows there are.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "packed_layout.h"

namespace fourfold {
namespace {

constexpr std::int64_t kGroupBytes = 256 << 10;
constexpr std::int64_t kAhead = 8192;  // bytes between what is computed and what is fetched

// A tile's columns of some rows of out, those that there are.
inline __mmask16 columns_of(const PackedLinear& p, std::int64_t t) {
    return static_cast<__mmask16>((1u << std::min(kTileRows, p.weight.n - t * kTileRows)) - 1);
}

template <int MR>
inline void load(const PackedLinear& p, std::int64_t t, std::int64_t first, __m512 (&sums)[MR]) {
    for (int i = 0; i < MR; ++i)
        sums[i] = _mm512_maskz_loadu_ps(columns_of(p, t), p.out + (first + i) * p.out_stride + t * kTileRows);
}

template <int MR>
inline void store(const PackedLinear& p, std::int64_t t, std::int64_t first, const __m512 (&sums)[MR]) {
    const std::int64_t n = t * kTileRows;
    const __mmask16 mask = columns_of(p, t);
    const __m512 bias = p.weight.bias ? _mm512_maskz_loadu_ps(mask, p.weight.bias + n) : _mm512_setzero_ps();
    for (int i = 0; i < MR; ++i)
        _mm512_mask_storeu_ps(p.out + (first + i) * p.out_stride + n, mask, _mm512_add_ps(sums[i], bias));
}

template <typename How, int MR>
void tile(const PackedLinear& p, std::int64_t t, std::int64_t first) {
    constexpr std::int64_t bytes = code_bytes(How::kKind), scale_bytes = How::kKind == WeightKind::bf16 ? 0 : 64;
    const std::int64_t blocks = blocks_of(p.weight.k), stride = prepared_row_bytes(How::kArithmetic, p.weight.k);
    const std::uint8_t* codes = p.weight.data + t * tile_bytes(How::kKind, p.weight.k);
    const char* x = static_cast<const char*>(p.prepared) + first * stride;
    const How how;
    __m512 sums[MR];
    for (int i = 0; i < MR; ++i) sums[i] = _mm512_setzero_ps();
    for (std::int64_t b = 0; b < blocks; b += 4) {
        const std::uint8_t* scales = codes + std::min<std::int64_t>(4, blocks - b) * bytes;
        _mm_prefetch(codes + kAhead - 64, _MM_HINT_T0);
        for (std::int64_t j = 0; codes < scales; ++j, codes += bytes, x += How::kStep) {
            for (int line = 0; line < bytes; line += 64) _mm_prefetch(codes + kAhead + line, _MM_HINT_T0);
            how.add_block(codes, scales + j * kTileRows, x, stride, sums);
        }
        codes += scale_bytes;
    }
    store(p, t, first, sums);
}

template <typename How, int MR = How::kMostRows>
void tiles(const PackedLinear& p, std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t rows) {
    if constexpr (MR > 1) {
        if (rows < MR) return tiles<How, MR - 1>(p, begin, end, first, rows);
    }
    for (std::int64_t t = begin; t < end; ++t) tile<How, MR>(p, t, first);
}

template <typename How>
void all_rows(const PackedLinear& p, std::int64_t tile_begin, std::int64_t tile_end) {
    const std::int64_t group = std::max<std::int64_t>(1, kGroupBytes / tile_bytes(How::kKind, p.weight.k));
    const std::int64_t sets = (p.m + How::kMostRows - 1) / How::kMostRows;
    for (std::int64_t t = tile_begin; t < tile_end; t += group)
        for (std::int64_t s = 0; s < sets; ++s) {
            const std::int64_t first = p.m * s / sets, rows = p.m * (s + 1) / sets - first;
            tiles<How>(p, t, std::min(t + group, tile_end), first, rows);
        }
}

}  // namespace
}  // namespace fourfold
