// Where the loader can choose, for several instruction sets. What 16 rows of 128 columns need (24 KB) stays in the
// first cache.
#include "column_rounding.h"

namespace fourfold {
namespace {

FOURFOLD_INLINE std::int64_t lanes_from(std::int64_t row, std::int64_t rows) { return std::min(kRowsAtOnce, rows - row); }

FOURFOLD_INLINE I bytes(const std::uint8_t* from, std::int64_t count) {
    I value = {};
    for (std::int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
}

FOURFOLD_INLINE I best_scale(const TurnedColumns& p, const Grid& grid, const V* block, const float* importance) {
    const I start = scale_of(block, p.element);
    if (!p.search) return start;
    const I candidates[3] = {start, start < 254 ? start + 1 : start, larger(start - 1, spread(0))};
    I best = start;
    V least = {};
    for (int candidate = 0; candidate < 3; ++candidate) {
        const I byte = candidates[candidate];
        const V inverse = power_of_two(254 - byte);
        V error = {};
        for (std::int64_t j = 0; j < kBlock; ++j) {
            const V x = block[j] * inverse;
            const V off = grid.nearest(x) - x;
            error += off * off * (importance[j] * importance[j]);
        }
        const V ratio = power_of_two(127 + byte - start);
        error = error * (ratio * ratio);
        const I better = candidate == 0 ? spread(-1) : error < least;
        best = better ? byte : best;
        least = better ? error : least;
    }
    return best;
}

FOURFOLD_INLINE void turn_rows(const TurnedColumns& p, const Grid& grid, std::int64_t row) {
    const std::int64_t count = lanes_from(row, p.rows);
    for (std::int64_t first = 0; first < p.columns; first += kBlock) {
        V block[kBlock];
        for (std::int64_t lane = 0; lane < kRowsAtOnce; ++lane) {
            const float* from = p.weight + (row + std::min(lane, count - 1)) * p.columns + first;
            for (std::int64_t j = 0; j < kBlock; ++j) block[j][lane] = from[j];
        }
        for (std::int64_t j = 0; j < kBlock; ++j) give(block[j], p.turned + p.places[first + j] * p.rows + row, count);
        const I byte = best_scale(p, grid, block, p.importance + first);
        std::uint8_t* to = p.scales + first / kBlock * p.rows + row;
        for (std::int64_t lane = 0; lane < count; ++lane) to[lane] = static_cast<std::uint8_t>(byte[lane]);
    }
}

struct Columns {
    V w[kMostColumns];       // becomes q
    V before[kMostColumns];  // c
    V errors[kMostColumns];  // w - q
};

FOURFOLD_INLINE void load(const ColumnRounding& p, std::int64_t row, std::int64_t count, Columns& at) {
    for (std::int64_t j = 0; j < p.columns; ++j) {
        at.w[j] = take(p.turned + j * p.rows + row, count);
        const V pending = p.pending ? take(p.pending + j * p.rows + row, count) : V{};
        at.before[j] = at.w[j] + pending / p.diagonal[j];
    }
}

// Rounds kTogether columns from `first` on, which all before them have reached.
template <bool kPull>
FOURFOLD_INLINE void round_together(const ColumnRounding& p, const Grid& grid, std::int64_t row, std::int64_t count,
                                    std::int64_t first, Columns& at) {
    V* c = at.before + first;
    const std::int64_t own = first * p.columns + first;
    for (std::int64_t j = 0; j < kTogether; ++j) {
        const I byte = bytes(p.scales + p.blocks[first + j] * p.rows + row, count);
        const V q = grid.nearest(c[j] * power_of_two(254 - byte)) * power_of_two(byte);
        const V error = at.w[first + j] - q;
        for (std::int64_t k = j + 1; k < kTogether; ++k) {
            c[k] += error * p.reach[own + k * p.columns + j];
            if (kPull) c[k] += c[j] * p.pull[own + k * p.columns + j];
        }
        at.errors[first + j] = error;
        at.w[first + j] = q;
    }
}

template <bool kPull>
FOURFOLD_INLINE void round_rows_of_columns(const ColumnRounding& p, const Grid& grid, std::int64_t row) {
    const std::int64_t count = lanes_from(row, p.rows);
    Columns at;
    load(p, row, count, at);
    for (std::int64_t first = 0; first < p.columns; first += kTogether) {
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.before[first + t];
        add_products(p.reach + first * p.columns, p.columns, at.errors, first, acc);
        if (kPull) add_products(p.pull + first * p.columns, p.columns, at.before, first, acc);
        for (std::int64_t t = 0; t < kTogether; ++t) at.before[first + t] = acc[t];
        round_together<kPull>(p, grid, row, count, first, at);
    }
    for (std::int64_t j = 0; j < p.columns; ++j) {
        give(at.w[j], p.turned + j * p.rows + row, count);
        give(at.errors[j], p.errors + j * p.rows + row, count);
        give(at.before[j], p.before + j * p.rows + row, count);
    }
}

// The codes of a block side by side, in as many words (little-endian) as a code has bits.
FOURFOLD_INLINE void pack(const I* codes, int bits, I* words) {
    for (int word = 0; word < bits; ++word) words[word] = I{};
    for (int j = 0; j < kBlock; ++j) {
        const int at = j * bits, word = at / 32, shift = at % 32;
        words[word] |= codes[j] << shift;
        if (shift + bits > 32) words[word + 1] |= codes[j] >> (32 - shift);
    }
}

FOURFOLD_INLINE void put_rows(const RoundedColumns& p, const Grid& grid, std::int64_t row) {
    const std::int64_t count = lanes_from(row, p.rows), blocks = p.columns / kBlock;
    for (std::int64_t block = 0; block < blocks; ++block) {
        const I byte = bytes(p.scales + block * p.rows + row, count);
        const V inverse = power_of_two(254 - byte);
        V q[kBlock];
        I codes[kBlock], words[8];
        for (std::int64_t j = 0; j < kBlock; ++j) {
            q[j] = take(p.turned + p.places[block * kBlock + j] * p.rows + row, count);
            codes[j] = grid.code(q[j] * inverse, p.element);
        }
        pack(codes, p.element.bits, words);
        for (std::int64_t lane = 0; lane < count; ++lane) {
            const std::int64_t at = (row + lane) * blocks + block;
            for (std::int64_t j = 0; j < kBlock; ++j) p.weight[at * kBlock + j] = q[j][lane];
            std::uint8_t* to = p.codes + at * p.element.bits * 4;
            for (int word = 0; word < p.element.bits; ++word) {
                const std::int32_t value = words[word][lane];
                std::memcpy(to + 4 * word, &value, 4);
            }
            p.turned_back[at] = static_cast<std::uint8_t>(byte[lane]);
        }
    }
}

}  // namespace

FOURFOLD_FMA_CLONES void turn_columns(const TurnedColumns& taken, std::int64_t begin, std::int64_t end) {
    const Grid grid(taken.element);
    for (std::int64_t group = begin; group < end; ++group) turn_rows(taken, grid, group * kRowsAtOnce);
}

FOURFOLD_FMA_CLONES void round_columns(const ColumnRounding& problem, std::int64_t begin, std::int64_t end) {
    const Grid grid(problem.element);
    for (std::int64_t group = begin; group < end; ++group)
        if (problem.pull) round_rows_of_columns<true>(problem, grid, group * kRowsAtOnce);
        else round_rows_of_columns<false>(problem, grid, group * kRowsAtOnce);
}

FOURFOLD_FMA_CLONES void put_columns(const RoundedColumns& rounded, std::int64_t begin, std::int64_t end) {
    const Grid grid(rounded.element);
    for (std::int64_t group = begin; group < end; ++group) put_rows(rounded, grid, group * kRowsAtOnce);
}

}  // namespace fourfold
