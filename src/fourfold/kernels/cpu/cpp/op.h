// What a step of a program is given, and what an operation of it is.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace fourfold {

// The tokens of one run: rows of all buffers. Rows of a sequence stand together, at consecutive positions. From the
// operation on that brings the chosen rows together, a step has these alone, without tokens, positions and slots.
struct Step {
    std::int64_t rows = 0;
    const std::int32_t* tokens = nullptr;  // [rows]
    std::vector<std::int32_t> positions;   // [rows]
    std::vector<std::int32_t> slots;       // [rows]: block * block_size + offset
    std::vector<SequenceSpan> spans;
    const std::int32_t* chosen = nullptr;  // rows whose logits are wanted, ascending
    std::int64_t chosen_rows = 0;
    char* cache = nullptr;  // [layers, blocks, block_size, 2 * kv_heads, head_dim]
    std::int64_t layer_bytes = 0;
    std::int64_t block_size = 0;
};

// A matrix of float32, one row per token of the step.
struct Rows {
    float* data;
    std::int64_t stride;
    float* row(std::int64_t i) const { return data + i * stride; }
};

// Chunks are microseconds of work, so that sharing them out costs little and nobody waits long for the last.
class Op {
public:
    virtual ~Op() = default;
    virtual std::int64_t chunks(const Step& step) = 0;
    virtual void run(const Step& step, std::int64_t chunk, void* scratch) = 0;
    // bytes of `scratch`, 64-byte aligned and the thread's own, that run() wants
    virtual std::int64_t scratch_bytes() const { return 0; }
};

// Operations on rows, one after the other: `cost` is nanoseconds a row, roughly.
class RowOp : public Op {
public:
    explicit RowOp(std::int64_t cost, std::int64_t each = 1)
        : each_(each), together_(cost < kChunkCost ? kChunkCost / cost : 1) {}
    std::int64_t chunks(const Step& step) override { return (count(step) + together_ - 1) / together_; }
    void run(const Step& step, std::int64_t chunk, void* scratch) override {
        const std::int64_t begin = chunk * together_, end = begin + together_;
        rows(step, begin, end < count(step) ? end : count(step), scratch);
    }

protected:
    virtual void rows(const Step& step, std::int64_t begin, std::int64_t end, void* scratch) = 0;
    std::int64_t count(const Step& step) const { return step.rows * each_; }
    const std::int64_t each_;  // rows for each token

private:
    static constexpr std::int64_t kChunkCost = 2000;
    const std::int64_t together_;
};

}  // namespace fourfold
