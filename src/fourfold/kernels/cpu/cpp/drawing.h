// One token from a row of logits by a uniform number, and logprobs: what engine/drawing.py computes, without sorting the
// vocabulary or going through it more than once.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

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

    double total() const { return total_; }

    // The tokens of the `count` largest of `row`, largest first, and of equal ones the first first.
    std::vector<std::int32_t> likeliest(const float* row, std::int64_t count);

private:
    // A weight's bits, which are in the order of weights, above its token's complement: the larger comes first.
    using Key = std::uint64_t;

    void collect(float floor);
    void collect_count(std::int64_t count);
    void collect_sum(double enough);
    Key last_of(std::int64_t count);
    Key last_below(double enough);
    void keep(Key from);
    double kept_sum() const;
    std::int64_t look_up(double uniform) const;
    std::int64_t look_up_kept(double uniform) const;

    std::int64_t n_ = 0;
    double total_ = 0.0;
    std::vector<float> weights_, sums_, largest_;  // of tokens, and of blocks of them
    std::vector<Key> candidates_, order_;          // in the order of tokens; memory to order them in
    Key* end_ = nullptr;                           // of the candidates
};

}  // namespace fourfold
