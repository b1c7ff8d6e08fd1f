// Linear layers over packed weights, and the choice of the largest logit.
#pragma once

#include <memory>

#include "op.h"
#include "ops_rows.h"
#include "packed.h"

namespace fourfold {

constexpr std::int64_t kRowsTogether = 128;  // of a chunk: their prepared input stays in the second-level cache

// What becomes of a product: it is stored, added to what stands there, or its first half gates its second, and that is
// stored or at once the input of another layer, while it is in a cache.
enum class Sink { store, add, gate };

struct LinearPath {
    PackedWeight weight;
    Prepared input;
    Rows out{nullptr, 0};  // from the first of the weight's columns on
    Sink sink = Sink::store;
    Gate gate{};
    Inputs gated{};  // of the other layer
};

class Linear : public Op {
public:
    explicit Linear(LinearPath path);
    std::int64_t chunks(const Step& step) override;
    void run(const Step& step, std::int64_t chunk, void* scratch) override;
    std::int64_t scratch_bytes() const override;

protected:
    // Rows [row, row + rows) of the prepared input and of out, times tiles [begin, end) of out.
    struct Piece {
        const PackedWeight* weight;
        std::int64_t row, rows, range, begin, end;
    };
    // Ranges of tiles for chunks of `together` rows each, when `pieces` sets of rows or weights go through them all.
    void cut(std::int64_t together, std::int64_t pieces);
    std::int64_t range_begin(std::int64_t range) const {
        return range < long_ranges_ ? range * long_ : long_ranges_ * long_ + (range - long_ranges_) * grain_;
    }
    std::int64_t range_end(std::int64_t range) const {
        const std::int64_t end = range_begin(range) + (range < long_ranges_ ? long_ : grain_);
        return end < tiles_ ? end : tiles_;
    }
    void compute(const Piece& piece, void* scratch);
    // A piece is in `out`.
    virtual void computed(const Piece& piece);
    const LinearPath path_;
    const std::int64_t unit_;   // tiles that stay together: a block of the other layer's input
    const std::int64_t tiles_;  // of out: half the weight's where it gates itself
    std::int64_t rows_ = 0, ranges_ = 1;  // of the step
    // A weight that is read from memory is best read in one run, so each thread begins with a long range.
    std::int64_t long_ranges_ = 0, long_ = 0, grain_ = 1;

private:
    void multiply(const Piece& piece, std::int64_t tile, float* out, std::int64_t stride) const;
    void add(const Piece& piece, float* scratch) const;
    void gate(const Piece& piece, float* scratch) const;
};

// A head that remembers each range's largest logit, and the operation that takes the largest of those.
class Logits final : public Linear {
public:
    // `cap`: logits become cap tanh(logits / cap); 0: they stay
    Logits(LinearPath path, std::int64_t most_rows, float cap);

private:
    friend class Argmax;
    const float cap_;
    void computed(const Piece& piece) override;
    const std::unique_ptr<std::int32_t[]> best_;  // [rows, ranges]; not touched before it is used
};

class Argmax final : public RowOp {
public:
    Argmax(const Logits& logits, std::int32_t* tokens) : RowOp(1000), logits_(logits), tokens_(tokens) {}

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    const Logits& logits_;
    std::int32_t* tokens_;
};

}  // namespace fourfold
