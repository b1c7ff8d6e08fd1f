// The Python module: checks every array, lets go of the GIL, and calls the kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "array.h"
#include "module.h"
#include "mxfp4.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {

Isa parse_isa(const std::string& name) {
    Isa isa;
    if (name == "auto") isa = Isa::automatic;
    else if (name == "portable") isa = Isa::portable;
    else if (name == "avx512") isa = Isa::avx512;
    else if (name == "avx512bf16") isa = Isa::avx512bf16;
    else throw nb::value_error("isa must be one of auto, portable, avx512, avx512bf16");
    if (!cpu_has(isa)) throw nb::value_error("this processor or this build lacks the chosen isa");
    return isa;
}

namespace {

Float float_type(const Matrix& matrix) {
    auto type = matrix.dtype();
    if (type == nb::dtype<float>()) return Float::f32;
    bool bfloat = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat);
    if (!bfloat || type.bits != 16 || type.lanes != 1) matrix.fail("must be float32 or bfloat16");
    return Float::bf16;
}

void check_weight(const Matrix& blocks, const Matrix& scales, std::int64_t k) {
    if (k % kBlock) throw nb::value_error("the width of a weight must be a multiple of 32");
    if (blocks.dtype() != nb::dtype<std::uint8_t>()) blocks.fail("must be uint8");
    if (scales.dtype() != nb::dtype<std::uint8_t>()) scales.fail("must be uint8");
    if (blocks.columns() * 2 != k) blocks.fail("must be [n, k / 2]");
    if (scales.rows() != blocks.rows() || scales.columns() * kBlock != k) scales.fail("must be [n, k / 32]");
}

void linear(nb::handle x_tensor, nb::handle blocks_tensor, nb::handle scales_tensor, nb::handle out_tensor,
            const std::string& isa) {
    Matrix x(x_tensor, "x"), blocks(blocks_tensor, "blocks"), scales(scales_tensor, "scales");
    Matrix out(out_tensor, "out", true);
    check_weight(blocks, scales, x.columns());
    Float type = float_type(x);
    if (out.dtype() != x.dtype()) out.fail("must have the dtype of x");
    if (out.rows() != x.rows() || out.columns() != blocks.rows()) out.fail("must be [m, n]");
    Isa chosen = parse_isa(isa);
    LinearProblem problem{nullptr, blocks.data<const std::uint8_t>(), scales.data<const std::uint8_t>(), out.data(),
                          type,    x.rows(), blocks.rows(), x.columns()};
    nb::gil_scoped_release unlocked;
    mxfp4_linear(x.data(), problem, chosen);
}

void expand(nb::handle blocks_tensor, nb::handle scales_tensor, nb::handle out_tensor, const std::string& isa) {
    Matrix blocks(blocks_tensor, "blocks"), scales(scales_tensor, "scales"), out(out_tensor, "out", true);
    std::int64_t k = blocks.columns() * 2;
    check_weight(blocks, scales, k);
    if (out.rows() != blocks.rows() || out.columns() != k) out.fail("must be [n, k]");
    ExpandProblem problem{blocks.data<const std::uint8_t>(), scales.data<const std::uint8_t>(), out.data(),
                          float_type(out), blocks.rows(), k};
    Isa chosen = parse_isa(isa);
    nb::gil_scoped_release unlocked;
    mxfp4_expand(problem, chosen);
}

nb::dict cpu_features() {
    nb::dict features;
    features["portable"] = true;
    features["avx512"] = cpu_has(Isa::avx512);
    features["avx512bf16"] = cpu_has(Isa::avx512bf16);
    return features;
}

void set_thread_count(int count) {
    if (count < 1) throw nb::value_error("threads must be at least 1");
    nb::gil_scoped_release unlocked;
    set_threads(count);
}

}  // namespace
}  // namespace fourfold

NB_MODULE(_native, module) {
    // a program that lives until the interpreter ends is no leak, and its report no business of the user's
    nanobind::set_leak_warnings(false);
    module.def("mxfp4_linear", &fourfold::linear, "x"_a, "blocks"_a, "scales"_a, "out"_a, "isa"_a = "auto");
    module.def("mxfp4_expand", &fourfold::expand, "blocks"_a, "scales"_a, "out"_a, "isa"_a = "auto");
    fourfold::bind_attention(module);
    module.def("cpu_features", &fourfold::cpu_features);
    module.def("threads", &fourfold::threads);
    module.def("set_threads", &fourfold::set_thread_count, "count"_a);
    module.def("expect_contention", &fourfold::expect_contention, "expected"_a);
    fourfold::bind_packed(module);
    fourfold::bind_column_rounding(module);
    fourfold::bind_program(module);
}
