// Operations that take each row for itself: what a decoder does between its linear layers.
#pragma once

#include <utility>
#include <vector>

#include "input_math.h"
#include "op.h"
#include "packed.h"
#include "row_math.h"

namespace fourfold {

// Where a linear layer's input is laid out for it; `memory` is shared by all that are never alive together.
struct Prepared {
    Arithmetic arithmetic;
    std::int64_t k;
    char* memory;
    // value `at` of row i
    char* row(std::int64_t i, std::int64_t at = 0) const {
        return memory + prepared_bytes(arithmetic, i, k) + prepared_offset(arithmetic, at);
    }
};

// What linear layers take: values under their scheme, laid out for each of their arithmetics.
struct Inputs {
    InputScheme scheme;
    std::vector<Prepared> prepared;
    // Values [at, at + n) of row i are x, whole blocks of 32 unless they are the row's last; `scratch` may be x.
    void fill(std::int64_t i, std::int64_t at, const float* x, std::int64_t n, float* scratch) const;
};

// x = table[token] * scale; the table is bf16, float32, or the head's packed weight.
class Embed final : public RowOp {
public:
    struct Table {
        const float* wide = nullptr;
        const std::uint16_t* narrow = nullptr;
        PackedWeight packed{};
    };
    Embed(Table table, float scale, Rows out, std::int64_t n);

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    Table table_;
    float scale_;
    Rows out_;
    std::int64_t n_;
};

// Cosines and sines of position * speed, times `scale`: [2 * speeds] a row.
class Angles final : public RowOp {
public:
    Angles(std::vector<float> speeds, float scale, Rows out);

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    std::vector<float> speeds_;
    float scale_;
    Rows out_;
};

// A row goes through what is given of: norm, gate; and ends in `prepared`, in `out`, or is added there.
struct RowPath {
    Rows x;
    std::int64_t n;
    const float* norm = nullptr;   // weights as norm_row wants them
    float floor = 0.0f;
    bool gated = false;            // x is [2 n]: gate and up
    Gate gate{};
    Inputs inputs;
    Rows out{nullptr, 0};
    bool add = false;
    std::int64_t each = 1;  // rows for each token
};

class RowPathOp final : public RowOp {
public:
    explicit RowPathOp(RowPath path);
    std::int64_t scratch_bytes() const override { return path_.n * 4; }

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void* scratch) override;
    RowPath path_;
};

// The chosen rows of some buffers come to stand first: all that is wanted of the others are their keys and values, once
// these are in the cache of the last layer.
class Choose final : public Op {
public:
    struct Columns {
        Rows rows;
        std::int64_t n;
    };
    explicit Choose(std::vector<Columns> buffers) : buffers_(std::move(buffers)) {}
    std::int64_t chunks(const Step& step) override;
    void run(const Step& step, std::int64_t chunk, void* scratch) override;

private:
    std::vector<Columns> buffers_;
};

// Heads of queries and keys: normed, if they are, and turned; then keys and values go into the cache.
struct HeadPath {
    Rows qkv;  // [heads + 2 * kv_heads, d]
    std::int64_t heads, kv_heads, d;
    Rows angles;
    const float* norm;  // [heads + kv_heads, d], or null
    float floor;
    std::int64_t layer;
    KVType type;
    const float* kv_scales;
};

class Heads final : public RowOp {
public:
    explicit Heads(HeadPath path);

private:
    void rows(const Step& step, std::int64_t begin, std::int64_t end, void*) override;
    HeadPath path_;
};

}  // namespace fourfold
