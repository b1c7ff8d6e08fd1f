// A Python tensor as a kernel sees it: a contiguous matrix on the CPU, for the duration of one call.
//
// Tensors arrive as DLPack. A library that offers DLPack's C exchange table (1.3; torch does) fills in the view in
// some tens of nanoseconds; others go through nanobind and __dlpack__, which takes microseconds. A small layer
// computes for ten, and a token has hundreds of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

namespace fourfold {

namespace nb = nanobind;

class Matrix {
public:
    // Raises TypeError for what is no tensor, ValueError for one that is not a contiguous matrix on the CPU.
    Matrix(nb::handle tensor, const char* name, bool writable = false) : name_(name) {
        if (auto read = exchange(tensor)) {
            if (read(tensor.ptr(), &view_) != 0) throw nb::python_error();
        } else {
            borrow(tensor, writable);
        }
        if (view_.device.device_type != nb::device::cpu::value) fail("must be on the CPU");
        if (view_.ndim != 2) fail("must have two dimensions");
        if (!contiguous()) fail("must be contiguous");
    }

    std::int64_t rows() const { return view_.shape[0]; }
    std::int64_t columns() const { return view_.shape[1]; }
    nb::dlpack::dtype dtype() const { return view_.dtype; }

    template <typename T = void>
    T* data() const {
        return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    }

    [[noreturn]] void fail(const char* problem) const {
        throw nb::value_error((std::string(name_) + " " + problem).c_str());
    }

private:
    using Read = int (*)(void* tensor, nb::dlpack::dltensor* out);

    // DLPackExchangeAPI of dlpack.h, whose layout is stable within a major version.
    struct ExchangeTable {
        struct {
            std::uint32_t major, minor;
        } version;
        void* previous;
        void* allocate;
        void* managed_from_object;
        void* managed_to_object;
        Read read;
        void* current_stream;
    };

    static Read exchange(nb::handle tensor) {
        // guarded by the GIL; the type is kept alive so that its address cannot come to mean another
        static PyTypeObject* known = nullptr;
        static Read known_read = nullptr;
        PyTypeObject* type = Py_TYPE(tensor.ptr());
        if (type == known) return known_read;
        nb::handle type_handle(reinterpret_cast<PyObject*>(type));
        nb::object capsule = nb::getattr(type_handle, "__dlpack_c_exchange_api__", nb::none());
        if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
        auto* table = static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (table->version.major != 1) return nullptr;
        if (!known && table->read) {
            Py_INCREF(type);
            known = type;
            known_read = table->read;
        }
        return table->read;
    }

    void borrow(nb::handle tensor, bool writable) {
        bool read = writable ? nb::try_cast(tensor, writable_) : nb::try_cast(tensor, readable_);
        if (!read) throw nb::type_error((std::string(name_) + " must be a tensor").c_str());
        if (writable) look_at(writable_);
        else look_at(readable_);
    }

    template <typename Array>
    void look_at(const Array& array) {
        view_.data = const_cast<void*>(static_cast<const void*>(array.data()));
        view_.device = {array.device_type(), array.device_id()};
        view_.ndim = static_cast<std::int32_t>(array.ndim());
        view_.dtype = array.dtype();
        view_.shape = const_cast<std::int64_t*>(array.shape_ptr());
        view_.strides = const_cast<std::int64_t*>(array.stride_ptr());
    }

    bool contiguous() const {
        if (!view_.strides || rows() == 0 || columns() == 0) return true;
        return (columns() == 1 || view_.strides[1] == 1) && (rows() == 1 || view_.strides[0] == columns());
    }

    const char* name_;
    nb::dlpack::dltensor view_;
    nb::ndarray<nb::ro> readable_;  // what was borrowed, where the fast way is not offered
    nb::ndarray<> writable_;
};

}  // namespace fourfold
