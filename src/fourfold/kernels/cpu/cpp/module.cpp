// The Python module: checks every array, lets go of the GIL, and calls the kernel.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "mxfp4.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Read = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Write = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

fourfold::Isa parse_isa(const std::string& name) {
    using fourfold::Isa;
    Isa isa;
    if (name == "auto") isa = Isa::automatic;
    else if (name == "portable") isa = Isa::portable;
    else if (name == "avx512") isa = Isa::avx512;
    else if (name == "avx512bf16") isa = Isa::avx512bf16;
    else throw nb::value_error("isa must be one of auto, portable, avx512, avx512bf16");
    if (!fourfold::cpu_has(isa)) throw nb::value_error("this processor or this build lacks the chosen isa");
    return isa;
}

fourfold::Float parse_type(nb::dlpack::dtype type, const char* message) {
    if (type == nb::dtype<float>()) return fourfold::Float::f32;
    bool is_bf16 = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
    if (!is_bf16 || type.lanes != 1) throw nb::type_error(message);
    return fourfold::Float::bf16;
}

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

void check_weight(const Bytes& blocks, const Bytes& scales, std::size_t k) {
    require(k % fourfold::kBlock == 0, "the last dimension must be a multiple of 32");
    require(blocks.shape(1) * 2 == k, "blocks must be [n, k / 2]");
    require(scales.shape(0) == blocks.shape(0) && scales.shape(1) * 32 == k, "scales must be [n, k / 32]");
}

void linear(const Read& x, const Bytes& blocks, const Bytes& scales, const Write& out, const std::string& isa) {
    std::size_t m = x.shape(0), k = x.shape(1), n = blocks.shape(0);
    check_weight(blocks, scales, k);
    auto type = parse_type(x.dtype(), "x must be float32 or bfloat16");
    require(out.dtype() == x.dtype(), "out must have the dtype of x");
    require(out.shape(0) == m && out.shape(1) == n, "out must be [m, n]");
    auto chosen = parse_isa(isa);
    fourfold::LinearProblem problem{nullptr,    blocks.data(),
                                    scales.data(), out.data(),
                                    type,       static_cast<std::int64_t>(m),
                                    static_cast<std::int64_t>(n), static_cast<std::int64_t>(k)};
    nb::gil_scoped_release unlocked;
    fourfold::mxfp4_linear(x.data(), problem, chosen);
}

void expand(const Bytes& blocks, const Bytes& scales, const Write& out, const std::string& isa) {
    std::size_t n = blocks.shape(0), k = blocks.shape(1) * 2;
    check_weight(blocks, scales, k);
    auto type = parse_type(out.dtype(), "out must be float32 or bfloat16");
    require(out.shape(0) == n && out.shape(1) == k, "out must be [n, k]");
    auto chosen = parse_isa(isa);
    fourfold::ExpandProblem problem{blocks.data(), scales.data(), out.data(), type, static_cast<std::int64_t>(n),
                                    static_cast<std::int64_t>(k)};
    nb::gil_scoped_release unlocked;
    fourfold::mxfp4_expand(problem, chosen);
}

nb::dict cpu_features() {
    nb::dict features;
    features["portable"] = true;
    features["avx512"] = fourfold::cpu_has(fourfold::Isa::avx512);
    features["avx512bf16"] = fourfold::cpu_has(fourfold::Isa::avx512bf16);
    return features;
}

void set_threads(int count) {
    require(count >= 1, "threads must be at least 1");
    nb::gil_scoped_release unlocked;
    fourfold::set_threads(count);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("mxfp4_linear", &linear, "x"_a, "blocks"_a, "scales"_a, "out"_a, "isa"_a = "auto");
    module.def("mxfp4_expand", &expand, "blocks"_a, "scales"_a, "out"_a, "isa"_a = "auto");
    module.def("cpu_features", &cpu_features);
    module.def("threads", &fourfold::threads);
    module.def("set_threads", &set_threads, "count"_a);
}
