// Rounding a weight as GPTQ does, to an MX format of floats, under scales that are chosen before.
//
// The weight is turned, [columns, rows], and its columns lie in the order in which they are rounded; `places` says
// where each column of the weight lies. First a block's scale is that of three neighbours which leaves the least
// sum of importance^2 (nearest - w)^2, or with no `search` the first of them. Then, up to 128 columns in one call,
// c_j starts as w_j + pending_j / R_jj, and one column after the other
//
//     q_j = scale_j * nearest(c_j / scale_j),   c_k += (w_j - q_j) F_kj + c_j P_kj   for every later k,
//
// with F = R^T and P = T^T of compress/calibrated/column_feedback.py, row k divided by R_kk. Rows (outputs) do not
// know each other. The specification is compress/calibrated/column_rounding.py; sums here run in another order.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace fourfold {

struct TurnedColumns {
    const float* weight;  // [rows, columns]
    std::int64_t rows, columns;
    const std::int64_t* places;  // [columns]
    const float* importance;     // [columns] of the weight
    float* turned;               // [columns, rows]
    std::uint8_t* scales;        // [columns / 32, rows]
    ElementRules element;
    bool search;
};

struct ColumnRounding {
    float* turned;  // [columns, rows] of these columns; becomes what it is rounded to
    std::int64_t rows, columns;
    const std::uint8_t* scales;  // [blocks, rows]
    const std::int64_t* blocks;  // [columns]: the block that each is of
    const float* reach;          // F [columns, columns]
    const float* pull;           // P likewise, or null
    const float* diagonal;       // [columns]: R_jj
    const float* pending;        // [columns, rows], or null
    float* errors;               // [columns, rows]: w - q
    float* before;               // [columns, rows]: c
    ElementRules element;
};

// What was rounded, put where it belongs.
struct RoundedColumns {
    const float* turned;  // [columns, rows]
    std::int64_t rows, columns;
    const std::int64_t* places;  // [columns]
    const std::uint8_t* scales;  // [columns / 32, rows]
    float* weight;               // [rows, columns]
    std::uint8_t* codes;         // [rows, columns * bits / 8]
    std::uint8_t* turned_back;   // scales [rows, columns / 32]
    ElementRules element;
};

// Of each, rows [16 * begin, 16 * end), of which the last need not exist.
void turn_columns(const TurnedColumns& taken, std::int64_t begin, std::int64_t end);
void round_columns(const ColumnRounding& problem, std::int64_t begin, std::int64_t end);
void put_columns(const RoundedColumns& rounded, std::int64_t begin, std::int64_t end);

}  // namespace fourfold
