// Packed linear layers for Python: checks every array, lets go of the GIL, shares the work among threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <string>

#include "array.h"
#include "module.h"
#include "packed.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

constexpr std::int64_t kLeastWork = 1 << 15;  // products that are worth handing to another thread

WeightKind parse_kind(const std::string& name) {
    if (name == "mxfp4") return WeightKind::mxfp4;
    if (name == "int8") return WeightKind::int8;
    if (name == "bf16") return WeightKind::bf16;
    throw nb::value_error("kind must be one of mxfp4, int8, bf16");
}

Arithmetic parse_arithmetic(const std::string& name) {
    if (name == "int8") return Arithmetic::int8;
    if (name == "exact") return Arithmetic::exact;
    throw nb::value_error("arithmetic must be one of int8, exact");
}

struct NamedIsa {
    const char* name;
    PackedIsa isa;
};
constexpr NamedIsa kIsas[] = {{"auto", PackedIsa::automatic},
                              {"portable", PackedIsa::portable},
                              {"avx2", PackedIsa::avx2},
                              {"avx512vnni", PackedIsa::avx512vnni},
                              {"avx512bf16", PackedIsa::avx512bf16}};

PackedIsa parse_packed_isa(const std::string& name) {
    for (const auto& known : kIsas) {
        if (name != known.name) continue;
        if (!packed_isa_usable(known.isa)) throw nb::value_error("this processor or this build lacks the chosen isa");
        return known.isa;
    }
    throw nb::value_error("isa must be one of auto, portable, avx2, avx512vnni, avx512bf16");
}

template <typename T>
void check_type(const Matrix& matrix, const char* problem) {
    if (matrix.dtype() != nb::dtype<T>()) matrix.fail(problem);
}

// Tiles under each other, as packed_bytes counts them.
void check_packed(const Matrix& data, WeightKind kind, std::int64_t n, std::int64_t k) {
    check_type<std::uint8_t>(data, "must be uint8");
    if (kind != WeightKind::bf16 && k % 32) throw nb::value_error("the width of a weight must be a multiple of 32");
    if (data.rows() != packed_tiles(n) || data.columns() != packed_tile_bytes(kind, k))
        data.fail("must be [tiles, bytes of a tile] for this kind, n and k");
    if (reinterpret_cast<std::uintptr_t>(data.data()) % 64) data.fail("must lie on a multiple of 64 bytes");
}

template <typename Range>
void for_ranges(std::int64_t count, std::int64_t work, const Range& range) {
    const std::int64_t fair = (count + threads() * 4 - 1) / (threads() * 4);
    const std::int64_t grain = std::max(fair, kLeastWork / std::max<std::int64_t>(1, work));
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Range*>(context))(begin, end);
    };
    parallel_for(count, grain, body, &range);
}

void pack(nb::handle codes_tensor, nb::object scales_tensor, nb::handle data_tensor, const std::string& kind_name) {
    const WeightKind kind = parse_kind(kind_name);
    Matrix codes(codes_tensor, "codes"), data(data_tensor, "data", true);
    const std::int64_t n = codes.rows(), k = codes.columns() * (kind == WeightKind::mxfp4 ? 2 : 1);
    check_packed(data, kind, n, k);
    auto* to = data.data<std::uint8_t>();
    if (kind == WeightKind::bf16) {
        if (codes.dtype().bits != 16) codes.fail("must be bfloat16");
        nb::gil_scoped_release unlocked;
        for_ranges(packed_tiles(n), kTileRows * k, [&](std::int64_t begin, std::int64_t end) {
            pack_bf16(codes.data<const std::uint16_t>(), n, k, to, begin, end);
        });
        return;
    }
    Matrix scales(scales_tensor, "scales");
    check_type<std::uint8_t>(codes, "must be uint8");
    check_type<std::uint8_t>(scales, "must be uint8");
    if (scales.rows() != n || scales.columns() * 32 != k) scales.fail("must be [n, k / 32]");
    const auto one = kind == WeightKind::mxfp4 ? pack_mxfp4 : pack_int8;
    nb::gil_scoped_release unlocked;
    for_ranges(packed_tiles(n), kTileRows * k, [&](std::int64_t begin, std::int64_t end) {
        one(codes.data<const std::uint8_t>(), scales.data<const std::uint8_t>(), n, k, to, begin, end);
    });
}

// Grows and never shrinks: prepared x of the calling thread.
void* scratch(std::int64_t bytes) {
    thread_local std::unique_ptr<unsigned char[]> memory;
    thread_local std::int64_t size = 0;
    if (bytes > size) {
        memory.reset(new unsigned char[static_cast<std::size_t>(bytes) + 64]);
        size = bytes;
    }
    auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    return reinterpret_cast<void*>((address + 63) & ~static_cast<std::uintptr_t>(63));
}

void multiply(nb::handle x_tensor, nb::handle data_tensor, const std::string& kind_name, nb::object bias_tensor,
              nb::handle out_tensor, const std::string& arithmetic_name, const std::string& isa_name) {
    const WeightKind kind = parse_kind(kind_name);
    Arithmetic arithmetic = parse_arithmetic(arithmetic_name);
    if (kind == WeightKind::bf16) arithmetic = Arithmetic::exact;
    const PackedIsa isa = parse_packed_isa(isa_name);
    Matrix x(x_tensor, "x"), data(data_tensor, "data"), out(out_tensor, "out", true);
    check_type<float>(x, "must be float32");
    check_type<float>(out, "must be float32");
    const std::int64_t m = x.rows(), k = x.columns(), n = out.columns();
    if (out.rows() != m) out.fail("must be [m, n]");
    check_packed(data, kind, n, k);
    const float* bias = nullptr;
    if (!bias_tensor.is_none()) {
        Matrix row(bias_tensor, "bias");
        check_type<float>(row, "must be float32");
        if (row.rows() != 1 || row.columns() != n) row.fail("must be [1, n]");
        bias = row.data<const float>();
    }
    const PackedWeight weight{kind, n, k, data.data<const std::uint8_t>(), bias};
    nb::gil_scoped_release unlocked;
    void* prepared = scratch(prepared_bytes(arithmetic, m, k));
    for_ranges(m, k, [&](std::int64_t begin, std::int64_t end) {
        prepare(arithmetic, x.data<const float>(), k, m, k, begin, end, prepared, isa);
    });
    for_ranges(packed_tiles(n), kTileRows * k * m, [&](std::int64_t begin, std::int64_t end) {
        linear(weight, arithmetic, prepared, m, out.data<float>(), n, begin, end, isa);
    });
}

void unpack(nb::handle data_tensor, const std::string& kind_name, std::int64_t n, nb::handle rows_tensor,
            nb::handle out_tensor) {
    const WeightKind kind = parse_kind(kind_name);
    Matrix data(data_tensor, "data"), rows(rows_tensor, "rows"), out(out_tensor, "out", true);
    check_type<std::int64_t>(rows, "must be int64");
    check_type<float>(out, "must be float32");
    if (rows.columns() != 1 || rows.rows() != out.rows()) rows.fail("must be [rows of out, 1]");
    check_packed(data, kind, n, out.columns());
    const auto* wanted = rows.data<const std::int64_t>();
    for (std::int64_t i = 0; i < rows.rows(); ++i)
        if (wanted[i] < 0 || wanted[i] >= n) rows.fail("must lie in [0, n)");
    const PackedWeight weight{kind, n, out.columns(), data.data<const std::uint8_t>(), nullptr};
    nb::gil_scoped_release unlocked;
    for (std::int64_t i = 0; i < rows.rows(); ++i) unpack_row(weight, wanted[i], out.data<float>() + i * out.columns());
}

std::uint64_t checksum(nb::handle data_tensor) {
    Matrix data(data_tensor, "data");
    check_type<std::uint8_t>(data, "must be uint8");
    nb::gil_scoped_release unlocked;
    return packed_checksum(data.data<const std::uint8_t>(), data.rows() * data.columns());
}

nb::dict isas() {
    nb::dict usable;
    for (const auto& known : kIsas)
        if (known.isa != PackedIsa::automatic) usable[known.name] = packed_isa_usable(known.isa);
    return usable;
}

}  // namespace

void bind_packed(nb::module_& module) {
    module.attr("PACKED_LAYOUT") = kPackedLayout;
    module.def("cpu_features", &isas);
    module.def("packed_tiles", &packed_tiles, "n"_a);
    module.def("packed_tile_bytes", [](const std::string& kind, std::int64_t k) {
        return packed_tile_bytes(parse_kind(kind), k);
    }, "kind"_a, "k"_a);
    module.def("packed_pack", &pack, "codes"_a, "scales"_a.none(), "data"_a, "kind"_a);
    module.def("packed_linear", &multiply, "x"_a, "data"_a, "kind"_a, "bias"_a.none(), "out"_a, "arithmetic"_a,
               "isa"_a = "auto");
    module.def("packed_checksum", &checksum, "data"_a);
    module.def("packed_unpack", &unpack, "data"_a, "kind"_a, "n"_a, "rows"_a, "out"_a);
}

}  // namespace fourfold
