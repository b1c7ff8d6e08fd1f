// Where the loader can choose, for several instruction sets.
#include "row_rounding.h"

namespace fourfold {
namespace {

struct Columns {
    V w[kMostColumns];       // becomes q
    V before[kMostColumns];  // c
    V errors[kMostColumns];  // w - q
};

FOURFOLD_INLINE void load(const RowRounding& p, std::int64_t row, std::int64_t count, Columns& at) {
    for (std::int64_t lane = 0; lane < kRowsAtOnce; ++lane) {
        const float* from = p.rows + (row + std::min(lane, count - 1)) * p.width + p.first;
        for (std::int64_t j = 0; j < p.columns; ++j) at.w[j][lane] = from[j];
    }
    for (std::int64_t j = 0; j < p.columns; ++j) at.before[j] = at.w[j];
}

// What the block's columns are once all before them are rounded, its own included.
FOURFOLD_INLINE void stand(const RowRounding& p, const Columns& at, std::int64_t begin, V* standing) {
    V moved[kBlock];
    for (std::int64_t j = 0; j < kBlock; ++j) moved[j] = at.before[begin + j] - at.w[begin + j];
    for (std::int64_t j = 0; j < kBlock; j += kTogether) {
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.w[begin + j + t];
        add_products(p.standing + (begin + j) * kBlock, kBlock, moved, j + kTogether, acc);
        for (std::int64_t t = 0; t < kTogether; ++t) standing[j + t] = acc[t];
    }
}

// Rounds kTogether columns c, in units of their scale, in which w becomes q; `place` is theirs on the diagonal.
FOURFOLD_INLINE void round_together(const RowRounding& p, const Grid& grid, std::int64_t place, V* w, V inverse, V* c,
                                    V* errors) {
    for (std::int64_t j = 0; j < kTogether; ++j) {
        const V q = grid.nearest(c[j]), error = w[j] * inverse - q;
        for (std::int64_t k = j + 1; k < kTogether; ++k) c[k] += error * p.reach[place + k * p.columns + j];
        errors[j] = error;
        w[j] = q;
    }
}

FOURFOLD_INLINE void round_block(const RowRounding& p, const Grid& grid, std::int64_t begin, Columns& at) {
    V x[kBlock], errors[kBlock];
    stand(p, at, begin, x);
    const I byte = scale_of(x, p.element);
    const V scale = power_of_two(byte), inverse = power_of_two(254 - byte);
    for (std::int64_t first = 0; first < kBlock; first += kTogether) {
        const std::int64_t own = (begin + first) * p.columns + begin;
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.before[begin + first + t] * inverse;
        add_products(p.reach + own, p.columns, errors, first, acc);
        round_together(p, grid, own + first, &at.w[begin + first], inverse, acc, errors + first);
    }
    for (std::int64_t j = 0; j < kBlock; ++j) {
        at.errors[begin + j] = errors[j] * scale;
        at.w[begin + j] *= scale;
    }
}

FOURFOLD_INLINE void tell_later_columns(const RowRounding& p, std::int64_t begin, Columns& at) {
    for (std::int64_t j = begin + kBlock; j < p.columns; j += kTogether) {
        V acc[kTogether];
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] = at.before[j + t];
        add_products(p.reach + j * p.columns + begin, p.columns, at.errors + begin, kBlock, acc);
        for (std::int64_t t = 0; t < kTogether; ++t) at.before[j + t] = acc[t];
    }
}

FOURFOLD_INLINE void round_sixteen(const RowRounding& p, const Grid& grid, std::int64_t row) {
    const std::int64_t count = std::min(kRowsAtOnce, p.count - row);
    Columns at;
    load(p, row, count, at);
    for (std::int64_t begin = 0; begin < p.columns; begin += kBlock) {
        round_block(p, grid, begin, at);
        tell_later_columns(p, begin, at);
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
        float* to = p.rows + (row + lane) * p.width + p.first;
        for (std::int64_t j = 0; j < p.columns; ++j) to[j] = at.w[j][lane];
    }
}

}  // namespace

FOURFOLD_FMA_CLONES void round_rows(const RowRounding& problem, std::int64_t begin, std::int64_t end) {
    const Grid grid(problem.element);
    for (std::int64_t group = begin; group < end; ++group) round_sixteen(problem, grid, group * kRowsAtOnce);
}

}  // namespace fourfold
