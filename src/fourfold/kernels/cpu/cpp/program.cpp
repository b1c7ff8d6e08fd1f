#include "program.h"

#include <algorithm>
#include <stdexcept>

namespace fourfold {
namespace {

void require(bool holds, const char* problem) {
    if (!holds) throw std::invalid_argument(problem);
}

}  // namespace

Program::Program(std::int64_t most_rows, std::int64_t vocabulary) : most_rows_(most_rows), vocabulary_(vocabulary) {}

Op& Program::add(std::unique_ptr<Op> op) {
    scratch_bytes_ = std::max(scratch_bytes_, op->scratch_bytes());
    for (auto& scratch : scratch_) scratch.reset();
    ops_.push_back(std::move(op));
    return *ops_.back();
}

void Program::use_cache(char* cache, std::int64_t layer_bytes, std::int64_t blocks, std::int64_t block_size) {
    step_.cache = cache;
    step_.layer_bytes = layer_bytes;
    step_.block_size = block_size;
    blocks_ = blocks;
}

void Program::run(std::int64_t begin, std::int64_t end, const StepInput& input) {
    require(begin >= 0 && end <= size(), "there are no such operations");
    check(input);
    place(input);
    place_chosen();
    walk(*this, begin, end);
}

void Program::run(std::int64_t op, std::int64_t chunk, int thread) {
    auto& scratch = scratch_[static_cast<std::size_t>(thread)];
    if (!scratch) scratch.reset(new unsigned char[static_cast<std::size_t>(scratch_bytes_) + 64]);
    const auto address = reinterpret_cast<std::uintptr_t>(scratch.get());
    ops_[static_cast<std::size_t>(op)]->run(step_of(op), chunk, scratch.get() + (64 - address % 64) % 64);
}

void Program::check(const StepInput& input) const {
    require(input.token_count <= most_rows_, "more rows than there is room for");
    for (std::int64_t i = 0; i < input.token_count; ++i)
        require(input.tokens[i] >= 0 && input.tokens[i] < vocabulary_, "a token is not in the vocabulary");
    for (std::int64_t i = 0; i < input.chosen_count; ++i) {
        require(input.chosen[i] >= 0 && input.chosen[i] < input.token_count, "a chosen row is not there");
        require(i == 0 || input.chosen[i - 1] < input.chosen[i], "chosen rows are not in their order");
    }
    for (std::int64_t i = 0; i < input.table_count; ++i)
        require(input.tables[i] >= 0 && input.tables[i] < blocks_, "a table names a block that is not there");
    std::int64_t rows = 0, entries = 0;
    for (std::int64_t i = 0; i < input.span_count; ++i) {
        const SpanInput& span = input.spans[i];
        require(span.count > 0 && span.start >= 0 && span.blocks >= 0, "a span is empty or stands nowhere");
        require(span.start + span.count <= span.blocks * step_.block_size, "a span is longer than its table");
        rows += span.count;
        entries += span.blocks;
    }
    require(rows == input.token_count && entries == input.table_count, "spans do not cover tokens and tables");
}

void Program::place(const StepInput& input) {
    step_.rows = input.token_count;
    step_.tokens = input.tokens;
    step_.chosen = input.chosen;
    step_.chosen_rows = input.chosen_count;
    step_.spans.clear();
    step_.positions.clear();
    step_.slots.clear();
    const std::int32_t* table = input.tables;
    const auto size = static_cast<std::int32_t>(step_.block_size);
    for (std::int64_t i = 0; i < input.span_count; ++i) {
        const SpanInput& span = input.spans[i];
        const auto row = static_cast<std::int64_t>(step_.positions.size());
        step_.spans.push_back({row, span.count, span.start, table});
        for (std::int32_t at = span.start; at < span.start + span.count; ++at) {
            step_.positions.push_back(at);
            step_.slots.push_back(table[at / size] * size + at % size);
        }
        table += span.blocks;
    }
}

void Program::place_chosen() {
    chosen_.rows = step_.chosen_rows;
    chosen_.cache = step_.cache;
    chosen_.layer_bytes = step_.layer_bytes;
    chosen_.block_size = step_.block_size;
    chosen_.spans.clear();
    const SequenceSpan* span = step_.spans.data();
    for (std::int64_t i = 0; i < step_.chosen_rows; ++i) {
        const std::int64_t row = step_.chosen[i];
        while (row >= span->row + span->count) ++span;
        if (i > 0 && step_.chosen[i - 1] == row - 1 && row > span->row) ++chosen_.spans.back().count;
        else chosen_.spans.push_back({i, 1, span->start + row - span->row, span->blocks});
    }
}

}  // namespace fourfold
