// A model as a list of operations over buffers that are made once: a step is one walk over it by all threads.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "op.h"
#include "thread_pool.h"

namespace fourfold {

// One sequence of a step: its next `count` tokens stand at `start`, and its table has `blocks` entries.
struct SpanInput {
    std::int32_t count, start, blocks;
};

struct StepInput {
    const std::int32_t* tokens;
    std::int64_t token_count;
    const SpanInput* spans;
    std::int64_t span_count;
    const std::int32_t* tables;  // of the spans, one after the other
    std::int64_t table_count;
    const std::int32_t* chosen;
    std::int64_t chosen_count;
};

class Program final : public Walk {
public:
    Program(std::int64_t most_rows, std::int64_t most_chosen, std::int64_t vocabulary);

    Op& add(std::unique_ptr<Op> op);
    std::int64_t size() const { return static_cast<std::int64_t>(ops_.size()); }
    void use_cache(char* cache, std::int64_t layer_bytes, std::int64_t blocks, std::int64_t block_size);

    // Operations [begin, end) for these tokens. Throws std::invalid_argument for what does not fit together.
    void run(std::int64_t begin, std::int64_t end, const StepInput& input);

    std::int64_t open(std::int64_t op) override { return ops_[static_cast<std::size_t>(op)]->chunks(step_); }
    void run(std::int64_t op, std::int64_t chunk, int thread) override;

private:
    void place(const StepInput& input);
    void check(const StepInput& input) const;

    const std::int64_t most_rows_, most_chosen_, vocabulary_;
    std::int64_t blocks_ = 0;
    std::int64_t scratch_bytes_ = 0;
    Step step_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::array<std::unique_ptr<unsigned char[]>, kMostThreads> scratch_;  // each made by its thread
};

}  // namespace fourfold
