#include "linear_walk.h"

#include <algorithm>
#include <vector>

#include "row_math.h"
#include "thread_pool.h"

namespace fourfold {
namespace {

constexpr std::int64_t kRowsTogether = 128;      // prepared, they stay in a core's cache,
constexpr std::int64_t kSumsTogether = 1 << 15;  // as do so many of their sums
constexpr std::int64_t kLeastValues = 1 << 13;   // that are worth preparing in another thread,
constexpr std::int64_t kLeastProducts = 1 << 15; // and so many products

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Grows and never shrinks; 64-byte aligned. One for each thread and use.
class Scratch {
public:
    template <typename T>
    T* get(std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
        if (bytes > memory_.size()) memory_ = std::vector<unsigned char>(bytes);
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
        return reinterpret_cast<T*>((address + 63) & ~static_cast<std::uintptr_t>(63));
    }

private:
    std::vector<unsigned char> memory_;
};
thread_local Scratch t_prepared, t_values;

// Two operations: rows of x are prepared; then sets of them meet ranges of tiles. Ranges become smaller and smaller,
// each a fair share of half of what is left, so that threads finish together; the first are read in one run.
template <typename T>
class Layer final : public Walk {
public:
    Layer(const PackedWeight& weight, const T* x, std::int64_t m, T* out)
        : weight_(weight), x_(x), m_(m), sets_(divide_up(m, kRowsTogether)), out_(out),
          prepared_(t_prepared.get<char>(bytes(m))) {}

    std::int64_t open(std::int64_t op) override {
        if (op == 0) return parts_ = std::min({std::int64_t{2} * threads(), m_ * weight_.k / kLeastValues + 1, m_});
        const std::int64_t rows = std::max<std::int64_t>(1, std::min(m_, kRowsTogether));
        const std::int64_t least = divide_up(kLeastProducts, kTileRows * weight_.k * rows);
        const std::int64_t most = std::max<std::int64_t>(1, kSumsTogether / kTileRows / rows);
        const std::int64_t tiles = packed_tiles(weight_.n);
        ends_.assign(1, 0);
        while (ends_.back() < tiles) {
            const std::int64_t fair = std::max(least, divide_up(tiles - ends_.back(), 2 * threads()));
            ends_.push_back(std::min(tiles, ends_.back() + std::min(fair, most)));
        }
        return sets_ * ranges();
    }

    void run(std::int64_t op, std::int64_t chunk, int) override {
        if (op == 0) return prepare_rows(m_ * chunk / parts_, m_ * (chunk + 1) / parts_);
        const std::int64_t set = chunk / ranges(), range = chunk % ranges();
        multiply(m_ * set / sets_, m_ * (set + 1) / sets_, ends_[range], ends_[range + 1]);
    }

private:
    static constexpr bool kNarrow = sizeof(T) == 2;
    std::int64_t ranges() const { return static_cast<std::int64_t>(ends_.size()) - 1; }
    std::int64_t bytes(std::int64_t rows) const { return prepared_bytes(Arithmetic::int8, rows, weight_.k); }

    void prepare_rows(std::int64_t begin, std::int64_t end) const {
        const std::int64_t k = weight_.k;
        float* wide = kNarrow ? t_values.get<float>(k) : nullptr;
        for (std::int64_t i = begin; i < end; ++i) {
            const float* row = wide;
            if constexpr (kNarrow) widen_row(x_ + i * k, k, wide);
            else row = x_ + i * k;
            prepare(Arithmetic::int8, row, k, 1, k, 0, 1, prepared_ + bytes(i));
        }
    }

    void multiply(std::int64_t row, std::int64_t end_row, std::int64_t tile, std::int64_t end_tile) const {
        const char* x = prepared_ + bytes(row);
        const std::int64_t first = tile * kTileRows, stride = (end_tile - tile) * kTileRows, rows = end_row - row;
        T* out = out_ + row * weight_.n;
        if constexpr (!kNarrow) {
            linear(weight_, Arithmetic::int8, x, rows, out, weight_.n, tile, end_tile);
        } else {
            const std::int64_t columns = std::min(stride, weight_.n - first);
            float* sums = t_values.get<float>(rows * stride);
            linear(weight_, Arithmetic::int8, x, rows, sums - first, stride, tile, end_tile);
            for (std::int64_t i = 0; i < rows; ++i) narrow_row(sums + i * stride, columns, out + i * weight_.n + first);
        }
    }

    const PackedWeight weight_;
    const T* const x_;
    const std::int64_t m_, sets_;
    T* const out_;
    char* const prepared_;
    std::int64_t parts_ = 1;
    std::vector<std::int64_t> ends_;
};

template <typename T>
void walk_layer(const PackedWeight& weight, const T* x, std::int64_t m, T* out) {
    Layer<T> layer(weight, x, m, out);
    walk(layer, 0, 2);
}

}  // namespace

void walk_linear(const PackedWeight& weight, const std::uint16_t* x, std::int64_t m, std::uint16_t* out) {
    walk_layer(weight, x, m, out);
}

void walk_linear(const PackedWeight& weight, const float* x, std::int64_t m, float* out) {
    walk_layer(weight, x, m, out);
}

}  // namespace fourfold
