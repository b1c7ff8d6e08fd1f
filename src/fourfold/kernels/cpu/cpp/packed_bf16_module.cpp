// MXFP4 linear layers with bfloat16 in and out, for engines that have nothing wider between layers: both are converted
// where they are in a cache anyhow.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <vector>

#include "array.h"
#include "module.h"
#include "packed.h"
#include "row_math.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

constexpr std::int64_t kRowsTogether = 128;  // prepared, they stay in a core's cache, as do their sums with
constexpr std::int64_t kTilesTogether = 16;
constexpr std::int64_t kChunksPerThread = 4;
constexpr std::int64_t kLeastValues = 1 << 13;  // that are worth preparing in another thread, and
constexpr std::int64_t kLeastProducts = 1 << 15;

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

// A walk of two operations: rows of x are prepared; then sets of them meet ranges of tiles.
class Layer final : public Walk {
public:
    Layer(const PackedWeight& weight, const std::uint16_t* x, std::int64_t m, std::uint16_t* out)
        : weight_(weight), x_(x), m_(m), out_(out), prepared_(t_prepared.get<char>(bytes(m))) {}

    std::int64_t open(std::int64_t op) override {
        const std::int64_t wanted = kChunksPerThread * threads(), tiles = packed_tiles(weight_.n);
        if (op == 0) return parts_ = std::min({wanted, m_ * weight_.k / kLeastValues + 1, m_});
        sets_ = (m_ + kRowsTogether - 1) / kRowsTogether;
        const std::int64_t few = (tiles + kTilesTogether - 1) / kTilesTogether;
        ranges_ = m_ > 0 ? std::max(few, std::min({wanted, m_ * weight_.k * kTileRows * tiles / kLeastProducts + 1, tiles})) : 0;
        return sets_ * ranges_;
    }

    void run(std::int64_t op, std::int64_t chunk, int) override {
        if (op == 0) return prepare_rows(m_ * chunk / parts_, m_ * (chunk + 1) / parts_);
        const std::int64_t set = chunk / ranges_, range = chunk % ranges_, tiles = packed_tiles(weight_.n);
        multiply(m_ * set / sets_, m_ * (set + 1) / sets_, tiles * range / ranges_, tiles * (range + 1) / ranges_);
    }

private:
    std::int64_t bytes(std::int64_t rows) const { return prepared_bytes(Arithmetic::int8, rows, weight_.k); }

    void prepare_rows(std::int64_t begin, std::int64_t end) const {
        const std::int64_t k = weight_.k;
        float* wide = t_values.get<float>(k);
        for (std::int64_t i = begin; i < end; ++i) {
            widen_row(x_ + i * k, k, wide);
            prepare(Arithmetic::int8, wide, k, 1, k, 0, 1, prepared_ + bytes(i));
        }
    }

    void multiply(std::int64_t row, std::int64_t end_row, std::int64_t tile, std::int64_t end_tile) const {
        const std::int64_t first = tile * kTileRows, stride = (end_tile - tile) * kTileRows, rows = end_row - row;
        const std::int64_t columns = std::min(stride, weight_.n - first);
        float* sums = t_values.get<float>(rows * stride);
        linear(weight_, Arithmetic::int8, prepared_ + bytes(row), rows, sums - first, stride, tile, end_tile);
        for (std::int64_t i = 0; i < rows; ++i)
            narrow_row(sums + i * stride, columns, out_ + (row + i) * weight_.n + first);
    }

    const PackedWeight weight_;
    const std::uint16_t* const x_;
    const std::int64_t m_;
    std::uint16_t* const out_;
    char* const prepared_;
    std::int64_t parts_ = 1, sets_ = 1, ranges_ = 1;
};

// out [m, n] = x [m, k] times the weight transposed, both bfloat16; `data` holds MXFP4 tiles.
void linear_bf16(nb::handle x_tensor, nb::handle data_tensor, nb::handle out_tensor) {
    Matrix x(x_tensor, "x"), data(data_tensor, "data"), out(out_tensor, "out", true);
    if (x.dtype().bits != 16) x.fail("must be bfloat16");
    if (out.dtype().bits != 16) out.fail("must be bfloat16");
    const std::int64_t m = x.rows(), k = x.columns(), n = out.columns();
    if (out.rows() != m) out.fail("must be [m, n]");
    if (k % 32) x.fail("must be a multiple of 32 wide");
    if (data.rows() != packed_tiles(n) || data.columns() != packed_tile_bytes(WeightKind::mxfp4, k))
        data.fail("must be [tiles, bytes of a tile] for this n and k");
    if (reinterpret_cast<std::uintptr_t>(data.data()) % 64) data.fail("must lie on a multiple of 64 bytes");
    nb::gil_scoped_release unlocked;
    Layer layer({WeightKind::mxfp4, n, k, data.data<const std::uint8_t>(), nullptr}, x.data<const std::uint16_t>(), m,
                out.data<std::uint16_t>());
    walk(layer, 0, 2);
}

}  // namespace

void bind_packed_bf16(nb::module_& module) {
    module.def("packed_linear_bf16", &linear_bf16, "x"_a, "data"_a, "out"_a);
}

}  // namespace fourfold
