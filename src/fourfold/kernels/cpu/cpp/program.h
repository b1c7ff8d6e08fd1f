// A model as a list of operations over buffers that are made once: a step is one walk over it by all threads.
#pragma once

#include <array>
#include <limits>
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
    Program(std::int64_t most_rows, std::int64_t vocabulary);

    Op& add(std::unique_ptr<Op> op);
    // The operations that are added from now on are of the chosen rows alone, which stand first.
    void narrow() { chosen_from_ = size(); }
    std::int64_t size() const { return static_cast<std::int64_t>(ops_.size()); }
    void use_cache(char* cache, std::int64_t layer_bytes, std::int64_t blocks, std::int64_t block_size);

    // Operations [begin, end) for these tokens. Throws std::invalid_argument for what does not fit together.
    void run(std::int64_t begin, std::int64_t end, const StepInput& input);

    std::int64_t open(std::int64_t op) override { return ops_[static_cast<std::size_t>(op)]->chunks(step_of(op)); }
    void run(std::int64_t op, std::int64_t chunk, int thread) override;

private:
    const Step& step_of(std::int64_t op) const { return op < chosen_from_ ? step_ : chosen_; }
    void place(const StepInput& input);
    void place_chosen();
    void check(const StepInput& input) const;

    const std::int64_t most_rows_, vocabulary_;
    std::int64_t chosen_from_ = std::numeric_limits<std::int64_t>::max();
    std::int64_t blocks_ = 0;
    std::int64_t scratch_bytes_ = 0;
    Step step_, chosen_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::array<std::unique_ptr<unsigned char[]>, kMostThreads> scratch_;  // each made by its thread
};

}  // namespace fourfold
