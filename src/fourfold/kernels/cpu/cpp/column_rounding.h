// Rounding up to 128 columns of a weight as GPTQ does, to an MX format of floats.
//
// Rows (outputs) do not know each other. Of one row, c_j starts as w_j + pending_j / R_jj. A block of 32 columns
// takes the scale of c as the rounding of all columns before them leaves it; then, one column after the other,
//
//     q_j = scale * nearest(c_j / scale),   c_k += (w_j - q_j) F_kj + c_j P_kj   for every later k,
//
// with F = R^T and P = T^T of compress/calibrated/column_feedback.py, row k divided by R_kk. With `search` the
// scale is that of three neighbours which leaves the least sum of R_jj^2 (q_j - c_j)^2. The specification is
// compress/calibrated/column_rounding.py; sums here run in another order.
#pragma once

#include <cstdint>

namespace fourfold {

constexpr std::int64_t kMostColumns = 128;  // at once
constexpr std::int64_t kRowsAtOnce = 16;

struct ElementRules {
    int bits, mantissa_bits, min_exponent, max_exponent;
    float max;
    std::int64_t added_from;  // the 52 bits of amax's fraction from which on the scale's exponent is one more
};

struct ColumnRounding {
    // [rows, width]; becomes what it is rounded to
    float* weight;
    std::int64_t rows, width;
    std::uint8_t* codes;   // [rows, width * bits / 8]
    std::uint8_t* scales;  // [rows, width / 32]
    // each block's first column, in the order of rounding; `columns` is 32 for each
    const std::int64_t* starts;
    std::int64_t columns;
    const float* reach;     // F [columns, columns]
    const float* pull;      // P likewise, or null
    const float* standing;  // [columns, 32]: c of a block -> what its scale is taken of, lower triangular
    const float* diagonal;  // [columns]: R_jj
    const float* pending;   // [columns, rows], or null
    float* errors;          // [columns, rows]: w - q
    float* before;          // [columns, rows]: c
    ElementRules element;
    bool search;
};

// Rows [16 * begin, 16 * end), of which the last need not exist.
void round_columns(const ColumnRounding& problem, std::int64_t begin, std::int64_t end);

}  // namespace fourfold
