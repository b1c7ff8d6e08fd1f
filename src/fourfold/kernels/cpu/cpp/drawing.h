// One token from a row of logits by a uniform number, and logprobs: what engine/drawing.py computes, without sorting the
// vocabulary or going through it more than once.
#pragma once

#include <cstdint>
#include <vector>

#include "row_math.h"

namespace fourfold {

// `top_k` outside of 1 .. n - 1, `top_p` 1 and `min_p` 0 keep every token.
struct Filters {
    std::int64_t top_k;
    double top_p;
    float min_p;
};

// What the tokens of a row [n] weigh: e^((logit - largest) / temperature), so the likeliest weighs 1. Tokens that may be
// kept are looked for above a floor, which is lowered until there are enough of them. One for each thread: it keeps its
// memory from row to row.
class Weights {
public:
    // `likeliest` is the place of the largest, which is finite.
    void of(const float* row, std::int64_t n, std::int64_t likeliest, float temperature);

    // The token that `uniform`, from 0 to below 1, stands for among those that are kept.
    std::int64_t draw(const Filters& filters, double uniform);

    // What all weigh together.
    double total() {
        weigh_all(true);
        return total_;
    }

    // The tokens of the `count` largest, largest first, and of equal ones the first first; after total().
    std::vector<std::int32_t> likeliest(std::int64_t count);

private:
    // A weight's bits, which are in the order of weights, above its token's complement: the larger comes first.
    using Key = std::uint64_t;

    Weighed weigh(std::int64_t block, float* out) const;
    void weigh_all(bool stay);
    void collect(float floor);
    void collect_count(std::int64_t count);
    void collect_sum(double enough);
    Key last_of(std::int64_t count);
    Key last_below(double enough);
    void keep(Key from);
    double kept_sum() const;
    std::int64_t look_up(double uniform);
    std::int64_t look_up_kept(double uniform) const;

    const float* row_ = nullptr;
    std::int64_t n_ = 0;
    float shift_ = 0.0f, factor_ = 0.0f;
    double total_ = 0.0;
    std::vector<float> weights_;         // of all tokens if they were to stay, else of the last block looked at
    std::vector<float> sums_, largest_;  // of blocks
    std::vector<Key> candidates_, order_;          // in the order of tokens; memory to order them in
    Key* end_ = nullptr;                           // of the candidates
};

}  // namespace fourfold
