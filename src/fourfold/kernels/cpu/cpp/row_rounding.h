// Rounding the columns of one group, up to 128 neighbours, of rows that are read now: to an MX format of floats, the
// scale of each block of 32 taken when its first column is reached, from what the rounding of all before it leaves.
//
//     q_j = scale * nearest(c_j / scale),   c_k += (w_j - q_j) F_kj   for every later k,
//
// with F = R^T, row k divided by R_kk. The specification is kernels/feedback.py.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace fourfold {

struct RowRounding {
    float* rows;  // [count, width]; becomes what it is rounded to
    std::int64_t count, width;
    std::int64_t first, columns;  // of the group
    const float* reach;           // F [columns, columns]
    const float* standing;        // [columns, 32]: c of a block -> what its scale is taken of, lower triangular
    ElementRules element;
};

// Rows [16 * begin, 16 * end), of which the last need not exist.
void round_rows(const RowRounding& problem, std::int64_t begin, std::int64_t end);

}  // namespace fourfold
