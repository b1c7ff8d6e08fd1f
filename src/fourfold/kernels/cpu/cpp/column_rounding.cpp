// Sixteen rows at a time, one in each lane, so that all that depends on what came before is lane by lane; where
// the loader can choose, for several instruction sets. What 16 rows need (32 KB) stays in the first cache.
#include "column_rounding.h"

#include <algorithm>
#include <cstring>

#include "clones.h"

// vectors pass between functions that are all inlined, so that no calling convention is asked
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fourfold {
namespace {

typedef float V __attribute__((vector_size(64)));
typedef std::int32_t I __attribute__((vector_size(64)));

constexpr std::int64_t kBlock = 32;
constexpr std::int64_t kTogether = 8;  // columns summed at the same time
constexpr std::int32_t kExponent = 0x7F800000;

struct Columns {
    V w[kMostColumns];       // becomes q
    V before[kMostColumns];  // c
    V errors[kMostColumns];  // w - q
};

FOURFOLD_INLINE V floats(I bits) {
    V value;
    std::memcpy(&value, &bits, sizeof(V));
    return value;
}

FOURFOLD_INLINE I ints(V value) {
    I bits;
    std::memcpy(&bits, &value, sizeof(V));
    return bits;
}

FOURFOLD_INLINE I larger(I a, I b) { return a > b ? a : b; }

FOURFOLD_INLINE I spread(std::int32_t value) { return I{} + value; }

FOURFOLD_INLINE V spread(float value) { return V{} + value; }

// Powers of two as float32, 2^-127 being subnormal.
FOURFOLD_INLINE V power_of_two(I exponent_and_127) {
    return floats(exponent_and_127 > 0 ? exponent_and_127 << 23 : spread(1 << 22));
}

struct Grid {
    I smallest;   // the bits of the smallest normal value
    V carry;      // puts an element's step at the end of a float's mantissa
    V magnitude;  // likewise for what is not negative
    V max;

    FOURFOLD_INLINE explicit Grid(const ElementRules& element)
        : smallest(spread((127 + element.min_exponent) << 23)),
          carry(spread(1.5f * static_cast<float>(1 << (23 - element.mantissa_bits)))),
          magnitude(spread(static_cast<float>(1 << (23 - element.mantissa_bits)))),
          max(spread(element.max)) {}

    FOURFOLD_INLINE V nearest(V x) const {
        x = x > max ? max : x;
        x = x < -max ? -max : x;
        V carried = floats(larger(ints(x) & kExponent, smallest)) * carry;
        return (x + carried) - carried;
    }

    // The code of a value on the grid.
    FOURFOLD_INLINE I code(V q, const ElementRules& element) const {
        I bits = ints(q) & 0x7FFFFFFF;
        I power = larger(bits & kExponent, smallest);
        V carried = floats(power) * magnitude;
        I steps = ints(floats(bits) + carried) - ints(carried);
        I sign = (ints(q) >> 31) & (1 << (element.bits - 1));
        return (((power - smallest) >> (23 - element.mantissa_bits)) + steps) | sign;
    }
};

FOURFOLD_INLINE void load(const ColumnRounding& p, std::int64_t row, std::int64_t count, Columns& at) {
    for (std::int64_t block = 0; block < p.columns / kBlock; ++block)
        for (std::int64_t lane = 0; lane < kRowsAtOnce; ++lane) {
            const float* from = p.weight + (row + std::min(lane, count - 1)) * p.width + p.starts[block];
            for (std::int64_t j = 0; j < kBlock; ++j) at.w[block * kBlock + j][lane] = from[j];
        }
    for (std::int64_t j = 0; j < p.columns; ++j) {
        V pending = {};
        if (p.pending) std::memcpy(&pending, p.pending + j * p.rows + row, static_cast<std::size_t>(count) * 4);
        at.before[j] = at.w[j] + pending / p.diagonal[j];
    }
}

// Rows lie far apart, which no hardware foresees.
FOURFOLD_INLINE void fetch(const ColumnRounding& p, std::int64_t row, std::int64_t count) {
    for (std::int64_t block = 0; block < p.columns / kBlock; ++block)
        for (std::int64_t lane = 0; lane < count; ++lane) {
            const float* from = p.weight + (row + lane) * p.width + p.starts[block];
            for (std::int64_t j = 0; j < kBlock; j += 16) __builtin_prefetch(from + j, 1, 2);
        }
}

// acc[t] = sum over i in [0, count) of matrix[t][i] * x[i], for t < kTogether, added to what is there.
FOURFOLD_INLINE void add_products(const float* matrix, std::int64_t stride, const V* x, std::int64_t count, V* acc) {
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] += x[i] * matrix[t * stride + i];
}

// What the block's columns are once all before them are rounded, its own included.
FOURFOLD_INLINE void stand(const ColumnRounding& p, const Columns& at, std::int64_t begin, V* standing) {
    V moved[kBlock];
    for (std::int64_t j = 0; j < kBlock; ++j) moved[j] = at.before[begin + j] - at.w[begin + j];
    for (std::int64_t j = 0; j < kBlock; j += kTogether) {
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.w[begin + j + t];
        add_products(p.standing + (begin + j) * kBlock, kBlock, moved, j + kTogether, acc);
        for (std::int64_t t = 0; t < kTogether; ++t) standing[j + t] = acc[t];
    }
}

FOURFOLD_INLINE I first_scale(const V* standing, const ElementRules& element) {
    V amax = {};
    for (std::int64_t j = 0; j < kBlock; ++j) {
        V magnitude = floats(ints(standing[j]) & 0x7FFFFFFF);
        amax = magnitude > amax ? magnitude : amax;
    }
    I byte = {};
    for (std::int64_t lane = 0; lane < kRowsAtOnce; ++lane) {
        const double wide = amax[lane];
        std::int64_t bits;
        std::memcpy(&bits, &wide, 8);
        const std::int64_t fraction = bits & ((std::int64_t{1} << 52) - 1);
        const std::int64_t exponent = (bits >> 52) - 1023 - element.max_exponent + (fraction >= element.added_from);
        byte[lane] = static_cast<std::int32_t>(std::min<std::int64_t>(std::max<std::int64_t>(exponent, -127), 127)) + 127;
    }
    return byte;
}

FOURFOLD_INLINE I best_scale(const ColumnRounding& p, const Grid& grid, const V* standing, const float* diagonal) {
    const I start = first_scale(standing, p.element);
    if (!p.search) return start;
    const I candidates[3] = {start, start < 254 ? start + 1 : start, larger(start - 1, spread(0))};
    I best = start;
    V least = {};
    for (int candidate = 0; candidate < 3; ++candidate) {
        const I byte = candidates[candidate];
        const V inverse = power_of_two(254 - byte);
        V error = {};
        for (std::int64_t j = 0; j < kBlock; ++j) {
            const V x = standing[j] * inverse;
            const V off = grid.nearest(x) - x;
            error += off * off * (diagonal[j] * diagonal[j]);
        }
        const V ratio = power_of_two(127 + byte - start);
        error = error * (ratio * ratio);
        const I better = candidate == 0 ? spread(-1) : error < least;
        best = better ? byte : best;
        least = better ? error : least;
    }
    return best;
}

FOURFOLD_INLINE void pack(const I* codes, int bits, std::int64_t lane, std::uint8_t* out) {
    if (bits == 8) {
        for (std::int64_t j = 0; j < kBlock; ++j) out[j] = static_cast<std::uint8_t>(codes[j][lane]);
    } else if (bits == 4) {
        for (std::int64_t j = 0; j < kBlock; j += 2)
            out[j / 2] = static_cast<std::uint8_t>(codes[j][lane] | codes[j + 1][lane] << 4);
    } else {  // 6
        for (std::int64_t j = 0; j < kBlock; j += 4, out += 3) {
            const std::int32_t all = codes[j][lane] | codes[j + 1][lane] << 6 | codes[j + 2][lane] << 12 | codes[j + 3][lane] << 18;
            for (int byte = 0; byte < 3; ++byte) out[byte] = static_cast<std::uint8_t>(all >> 8 * byte);
        }
    }
}

// Rounds kTogether columns c, in units of their scale, in which w becomes q; `place` is theirs on the diagonal.
template <bool kPull>
FOURFOLD_INLINE void round_together(const ColumnRounding& p, const Grid& grid, std::int64_t place, V* w, V inverse,
                                    V* c, V* errors, I* codes) {
    for (std::int64_t j = 0; j < kTogether; ++j) {
        const V q = grid.nearest(c[j]), error = w[j] * inverse - q;
        for (std::int64_t k = j + 1; k < kTogether; ++k) {
            c[k] += error * p.reach[place + k * p.columns + j];
            if (kPull) c[k] += c[j] * p.pull[place + k * p.columns + j];
        }
        codes[j] = grid.code(q, p.element);
        errors[j] = error;
        w[j] = q;
    }
}

template <bool kPull>
FOURFOLD_INLINE void round_block(const ColumnRounding& p, const Grid& grid, std::int64_t row, std::int64_t count,
                                 std::int64_t begin, Columns& at) {
    V x[kBlock];
    stand(p, at, begin, x);
    const I byte = best_scale(p, grid, x, p.diagonal + begin);
    const V scale = power_of_two(byte), inverse = power_of_two(254 - byte);
    for (std::int64_t j = 0; j < kBlock; ++j) x[j] = at.before[begin + j] * inverse;
    I codes[kBlock];
    V errors[kBlock];
    for (std::int64_t first = 0; first < kBlock; first += kTogether) {
        const std::int64_t own = (begin + first) * p.columns + begin;
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = x[first + t];
        add_products(p.reach + own, p.columns, errors, first, acc);
        if (kPull) add_products(p.pull + own, p.columns, x, first, acc);
        round_together<kPull>(p, grid, own + first, &at.w[begin + first], inverse, acc, errors + first, codes + first);
        for (std::int64_t t = 0; t < kTogether; ++t) x[first + t] = acc[t];
    }
    for (std::int64_t j = 0; j < kBlock; ++j) {
        at.before[begin + j] = x[j] * scale;
        at.errors[begin + j] = errors[j] * scale;
        at.w[begin + j] *= scale;
    }
    const std::int64_t start = p.starts[begin / kBlock], run = p.element.bits * kBlock / 8;
    for (std::int64_t lane = 0; lane < count; ++lane) {
        const std::int64_t block = (row + lane) * (p.width / kBlock) + start / kBlock;
        p.scales[block] = static_cast<std::uint8_t>(byte[lane]);
        pack(codes, p.element.bits, lane, p.codes + block * run);
    }
}

template <bool kPull>
FOURFOLD_INLINE void tell_later_columns(const ColumnRounding& p, std::int64_t begin, Columns& at) {
    for (std::int64_t j = begin + kBlock; j < p.columns; j += kTogether) {
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.before[j + t];
        add_products(p.reach + j * p.columns + begin, p.columns, at.errors + begin, kBlock, acc);
        if (kPull) add_products(p.pull + j * p.columns + begin, p.columns, at.before + begin, kBlock, acc);
        for (std::int64_t t = 0; t < kTogether; ++t) at.before[j + t] = acc[t];
    }
}

FOURFOLD_INLINE void store(const ColumnRounding& p, std::int64_t row, std::int64_t count, const Columns& at) {
    for (std::int64_t block = 0; block < p.columns / kBlock; ++block)
        for (std::int64_t lane = 0; lane < count; ++lane) {
            float* to = p.weight + (row + lane) * p.width + p.starts[block];
            for (std::int64_t j = 0; j < kBlock; ++j) to[j] = at.w[block * kBlock + j][lane];
        }
    for (std::int64_t j = 0; j < p.columns; ++j) {
        std::memcpy(p.errors + j * p.rows + row, at.errors + j, static_cast<std::size_t>(count) * 4);
        std::memcpy(p.before + j * p.rows + row, at.before + j, static_cast<std::size_t>(count) * 4);
    }
}

template <bool kPull>
FOURFOLD_INLINE void round_rows(const ColumnRounding& p, std::int64_t begin, std::int64_t end) {
    const Grid grid(p.element);
    Columns at;
    for (std::int64_t row = begin * kRowsAtOnce; row < std::min(end * kRowsAtOnce, p.rows); row += kRowsAtOnce) {
        const std::int64_t count = std::min(kRowsAtOnce, p.rows - row);
        load(p, row, count, at);
        fetch(p, row + count, std::min(kRowsAtOnce, p.rows - row - count));
        for (std::int64_t block = 0; block < p.columns; block += kBlock) {
            round_block<kPull>(p, grid, row, count, block, at);
            tell_later_columns<kPull>(p, block, at);
        }
        store(p, row, count, at);
    }
}

}  // namespace

FOURFOLD_FMA_CLONES void round_columns(const ColumnRounding& problem, std::int64_t begin, std::int64_t end) {
    if (problem.pull) round_rows<true>(problem, begin, end);
    else round_rows<false>(problem, begin, end);
}

}  // namespace fourfold
