// A mixture of experts: each token goes through a few of many MLPs.
//
// A token's k choices are k slots, sorted by expert; slots of one expert are the rows that its layers multiply.
#pragma once

#include <vector>

#include "ops_linear.h"

namespace fourfold {

// Who does what in this step. Slot s is a choice of token row[s]; slots of expert e are [first[e], first[e + 1]).
struct Routing {
    std::int64_t top_k;
    std::vector<float> logits;          // [rows, experts]
    std::vector<std::int32_t> experts;  // [rows, top_k] of each token, ascending
    std::vector<float> shares;          // [rows, top_k]
    std::vector<std::int32_t> slots;    // [rows, top_k]
    std::vector<std::int32_t> row;      // [rows * top_k]
    std::vector<std::int32_t> first;    // [experts + 1]
    Routing(std::int64_t rows, std::int64_t top_k, std::int64_t experts);
    std::int64_t count() const { return static_cast<std::int64_t>(first.size()) - 1; }
};

// The router's logits, float32.
class Score final : public Op {
public:
    Score(Routing& routing, Rows x, std::int64_t n, const float* weight, const float* bias)
        : routing_(routing), x_(x), n_(n), weight_(weight), bias_(bias) {}
    std::int64_t chunks(const Step& step) override;
    void run(const Step& step, std::int64_t chunk, void* scratch) override;

private:
    Routing& routing_;
    const Rows x_;
    const std::int64_t n_;
    const float *weight_, *bias_;  // [experts, n], [experts]
};

// A token's experts are those of the largest k logits; their shares, of the softmax over the chosen, or over all.
class Route final : public RowOp {
public:
    Route(Routing& routing, bool among_chosen)
        : RowOp(50 + routing.count() * routing.top_k / 4), routing_(routing), among_chosen_(among_chosen) {}

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    Routing& routing_;
    const bool among_chosen_;
};

// Slots in the order of experts; one chunk.
class Group final : public Op {
public:
    explicit Group(Routing& routing) : routing_(routing) {}
    std::int64_t chunks(const Step&) override { return 1; }
    void run(const Step& step, std::int64_t chunk, void* scratch) override;

private:
    Routing& routing_;
};

// Prepared rows of tokens to prepared rows of slots.
class Gather final : public RowOp {
public:
    Gather(const Routing& routing, Prepared from, Prepared to);

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    const Routing& routing_;
    const Prepared from_, to_;
};

// One linear layer of every expert that has slots. All weights have the shape and kind of the path's.
class ExpertLinear final : public Linear {
public:
    ExpertLinear(const Routing& routing, LinearPath path, std::vector<PackedWeight> weights);
    std::int64_t chunks(const Step& step) override;
    void run(const Step& step, std::int64_t chunk, void* scratch) override;

private:
    const Routing& routing_;
    const std::vector<PackedWeight> weights_;
    std::vector<Piece> pieces_;  // without tiles: rows that one weight multiplies together
};

// out of a token += (or =) the sum of share * x of its slots, in the order of experts.
class Combine final : public RowOp {
public:
    Combine(const Routing& routing, Rows x, std::int64_t n, Rows out, bool accumulate);

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    const Routing& routing_;
    const Rows x_;
    const std::int64_t n_;
    const Rows out_;
    const bool accumulate_;
};

}  // namespace fourfold
