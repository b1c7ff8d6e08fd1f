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

constexpr std::int64_t kRowsTogether = 64;     // of which float32 stay in a core's cache, for as many tiles:
constexpr std::int64_t kTilesTogether = 64;
constexpr std::int64_t kLeastProducts = 1 << 15;  // that are worth handing to another thread

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

struct Layer {
    PackedWeight weight;
    const std::uint16_t* x;
    std::int64_t m;
    std::uint16_t* out;
    char* prepared;
    std::int64_t bytes(std::int64_t rows) const { return prepared_bytes(Arithmetic::int8, rows, weight.k); }

    void prepare_rows(std::int64_t begin, std::int64_t end) const {
        float* wide = t_values.get<float>(weight.k);
        for (std::int64_t i = begin; i < end; ++i) {
            widen_row(x + i * weight.k, weight.k, wide);
            prepare(Arithmetic::int8, wide, weight.k, 1, weight.k, 0, 1, prepared + bytes(i));
        }
    }

    void multiply(std::int64_t begin, std::int64_t end) const {
        const std::int64_t first = begin * kTileRows, stride = (end - begin) * kTileRows;
        const std::int64_t columns = std::min(stride, weight.n - first);
        float* sums = t_values.get<float>(kRowsTogether * stride);
        for (std::int64_t row = 0; row < m; row += kRowsTogether) {
            const std::int64_t rows = std::min(kRowsTogether, m - row);
            linear(weight, Arithmetic::int8, prepared + bytes(row), rows, sums - first, stride, begin, end);
            for (std::int64_t i = 0; i < rows; ++i)
                narrow_row(sums + i * stride, columns, out + (row + i) * weight.n + first);
        }
    }
};

// Calls layer.part(begin, end) over [0, count), each of so many products.
template <void (Layer::*part)(std::int64_t, std::int64_t) const>
void share(const Layer& layer, std::int64_t count, std::int64_t products) {
    const std::int64_t fair = (count + threads() * 4 - 1) / (threads() * 4);
    const std::int64_t grain = std::max(fair, kLeastProducts / std::max<std::int64_t>(1, products));
    const auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        for (; begin < end; begin += kTilesTogether)
            (static_cast<const Layer*>(context)->*part)(begin, std::min(end, begin + kTilesTogether));
    };
    parallel_for(count, grain, body, &layer);
}

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
    Layer layer{{WeightKind::mxfp4, n, k, data.data<const std::uint8_t>(), nullptr},
                x.data<const std::uint16_t>(), m, out.data<std::uint16_t>(), nullptr};
    layer.prepared = t_prepared.get<char>(layer.bytes(m));
    share<&Layer::prepare_rows>(layer, m, k);
    share<&Layer::multiply>(layer, packed_tiles(n), kTileRows * k * m);
}

}  // namespace

void bind_packed_bf16(nb::module_& module) {
    module.def("packed_linear_bf16", &linear_bf16, "x"_a, "data"_a, "out"_a);
}

}  // namespace fourfold
