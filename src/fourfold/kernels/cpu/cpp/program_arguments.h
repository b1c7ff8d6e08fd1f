// What Python hands over for the operations of a program, checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "array.h"
#include "ops_attention.h"
#include "ops_linear.h"
#include "ops_rows.h"

namespace fourfold {

// What Python has as an array of 32-bit integers, for the duration of a call.
class Integers {
public:
    explicit Integers(nb::handle array) {
        if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
        if (view_.len % 4) throw nb::value_error("tokens, spans, tables and chosen must be 32-bit integers");
    }
    ~Integers() { PyBuffer_Release(&view_); }
    Integers(const Integers&) = delete;
    Integers& operator=(const Integers&) = delete;
    const std::int32_t* data() const { return static_cast<const std::int32_t*>(view_.buf); }
    std::int64_t size() const { return view_.len / 4; }

private:
    Py_buffer view_;
};

inline Rows rows_of(nb::handle tensor, const char* name, std::int64_t rows, std::int64_t columns) {
    Matrix matrix(tensor, name, true);
    if (matrix.dtype() != nb::dtype<float>()) matrix.fail("must be float32");
    if (matrix.rows() < rows || matrix.columns() < columns) matrix.fail("is too small");
    return {matrix.data<float>(), matrix.columns()};
}

inline const float* floats_of(nb::handle tensor, const char* name, std::int64_t rows, std::int64_t columns) {
    if (tensor.is_none()) return nullptr;
    Matrix matrix(tensor, name);
    if (matrix.dtype() != nb::dtype<float>()) matrix.fail("must be float32");
    if (matrix.rows() != rows || matrix.columns() != columns) matrix.fail("has the wrong shape");
    return matrix.data<const float>();
}

inline KVType kv_type_of(const std::string& name) {
    if (name == "bf16") return KVType::bf16;
    if (name == "f32") return KVType::f32;
    if (name == "fp8") return KVType::fp8;
    throw nb::value_error("a cache is bf16, f32 or fp8");
}

using Element = std::tuple<float, std::int32_t, std::int32_t, std::int32_t, bool>;  // MxElement, and whether it fits int8

// What is made of inputs of n values: `rotation` float32 [32, 32] or None, `element` an Element or None.
inline InputScheme scheme_of(nb::handle rotation, nb::handle element, std::int64_t n) {
    InputScheme scheme;
    scheme.rotation = floats_of(rotation, "rotation", kSchemeBlock, kSchemeBlock);
    if (scheme.rotation && is_hadamard(scheme.rotation)) scheme.hadamard = scheme.rotation[0];
    scheme.rounded = !element.is_none();
    if (scheme.rounded) {
        const auto [max, max_exponent, min_exponent, mantissa_bits, codes] = nb::cast<Element>(element);
        scheme.element = {max, max_exponent, min_exponent, mantissa_bits};
        scheme.codes = codes;
    }
    if (scheme.any() && n % kSchemeBlock) throw nb::value_error("inputs must be whole blocks of 32 values");
    return scheme;
}

inline Activation activation_of(const std::string& name) {
    if (name == "gelu-tanh") return Activation::gelu_tanh;
    return name == "clamped-swish" ? Activation::clamped_swish : Activation::silu;
}

// `weight` is a packed.PackedWeight.
inline PackedWeight weight_of(nb::handle weight) {
    const auto kind_name = nb::cast<std::string>(weight.attr("kind"));
    const auto kind = kind_name == "mxfp4" ? WeightKind::mxfp4 : kind_name == "int8" ? WeightKind::int8 : WeightKind::bf16;
    const auto n = nb::cast<std::int64_t>(weight.attr("n")), k = nb::cast<std::int64_t>(weight.attr("k"));
    Matrix data(weight.attr("data"), "data");
    if (data.rows() * data.columns() != packed_bytes(kind, n, k)) data.fail("is not as long as the weight");
    nb::object bias = weight.attr("bias");
    const float* values = bias.is_none() ? nullptr : floats_of(bias.attr("view")(1, -1), "bias", 1, n);
    return {kind, n, k, data.data<const std::uint8_t>(), values};
}

using Memory = std::pair<std::string, nb::object>;  // arithmetic and uint8 [1, bytes]

inline Prepared prepared_of(const Memory& memory, std::int64_t rows, std::int64_t k) {
    Matrix bytes(memory.second, "prepared", true);
    const Arithmetic arithmetic = memory.first == "int8" ? Arithmetic::int8 : Arithmetic::exact;
    if (bytes.rows() * bytes.columns() < prepared_bytes(arithmetic, rows, k)) bytes.fail("is too small");
    return {arithmetic, k, bytes.data<char>()};
}

inline Inputs inputs_of(const std::vector<Memory>& prepared, nb::handle rotation, nb::handle element, std::int64_t rows, std::int64_t k) {
    Inputs inputs{scheme_of(rotation, element, k), {}};
    for (const Memory& memory : prepared) inputs.prepared.push_back(prepared_of(memory, rows, k));
    return inputs;
}

}  // namespace fourfold
