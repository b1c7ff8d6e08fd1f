// fourfold::mxfp4_linear for torch's dispatcher, so that a graph calls it without Python. It is made of the C functions
// that torch keeps stable (torch/csrc/inductor/aoti_torch/c/shim.h) and that are looked up in the running process: this
// extension is linked to no torch.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "linear_walk.h"
#include "module.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

using Handle = void*;

struct Torch {
    std::int32_t (*bfloat16)(), (*float32)(), (*uint8)(), (*cpu)();
    int (*get_data_ptr)(Handle, void**);
    int (*get_dim)(Handle, std::int64_t*);
    int (*get_sizes)(Handle, std::int64_t**);
    int (*get_dtype)(Handle, std::int32_t*);
    int (*is_contiguous)(Handle, bool*);
    int (*empty_strided)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t,
                         std::int32_t, Handle*);
    int (*delete_tensor)(Handle);
    int (*library_init)(const char*, const char*, const char*, std::uint32_t, Handle*);
    int (*library_impl)(Handle, const char*, void (*)(std::uint64_t*, std::uint64_t, std::uint64_t));
} g_torch;

void require(bool met, const char* what) {
    if (!met) throw std::runtime_error(std::string("fourfold::mxfp4_linear: ") + what);
}

class Tensor {
public:
    explicit Tensor(Handle handle) : handle_(handle) {}
    explicit Tensor(std::uint64_t owned) : handle_(reinterpret_cast<Handle>(owned)) {}
    Tensor(const Tensor&) = delete;
    ~Tensor() {
        if (handle_) g_torch.delete_tensor(handle_);
    }
    void* data() const { return get<void*>(g_torch.get_data_ptr); }
    std::int32_t dtype() const { return get<std::int32_t>(g_torch.get_dtype); }
    bool contiguous() const { return get<bool>(g_torch.is_contiguous); }
    std::vector<std::int64_t> shape() const {
        const auto* sizes = get<std::int64_t*>(g_torch.get_sizes);
        return {sizes, sizes + get<std::int64_t>(g_torch.get_dim)};
    }
    std::uint64_t release() { return reinterpret_cast<std::uint64_t>(std::exchange(handle_, nullptr)); }

private:
    template <typename Value>
    Value get(int (*read)(Handle, Value*)) const {
        Value value;
        require(read(handle_, &value) == 0, "a tensor cannot be read");
        return value;
    }
    Handle handle_;
};

Handle empty(const std::vector<std::int64_t>& shape, std::int32_t dtype) {
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<std::int64_t>(1, shape[i]);
    Handle made;
    const auto dims = static_cast<std::int64_t>(shape.size());
    require(g_torch.empty_strided(dims, shape.data(), strides.data(), dtype, g_torch.cpu(), 0, &made) == 0, "no memory");
    return made;
}

// (Tensor x, Tensor tiles, int n) -> Tensor: takes its tensors from the stack and leaves its own there.
void mxfp4_linear(std::uint64_t* stack, std::uint64_t, std::uint64_t) {
    Tensor x(stack[0]), tiles(stack[1]);
    const auto n = static_cast<std::int64_t>(stack[2]);
    std::vector<std::int64_t> shape = x.shape(), stored = tiles.shape();
    require(!shape.empty() && x.contiguous() && tiles.contiguous(), "x and tiles must be contiguous");
    const std::int64_t k = shape.back();
    require(tiles.dtype() == g_torch.uint8() && k % 32 == 0 && stored.size() == 2 && stored[0] == packed_tiles(n) &&
                stored[1] == packed_tile_bytes(WeightKind::mxfp4, k) &&
                reinterpret_cast<std::uintptr_t>(tiles.data()) % 64 == 0,
            "tiles must be those of an MXFP4 weight [n, k]");
    std::int64_t m = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) m *= shape[i];
    shape.back() = n;
    const std::int32_t dtype = x.dtype();
    Tensor out(empty(shape, dtype));
    const PackedWeight weight{WeightKind::mxfp4, n, k, static_cast<const std::uint8_t*>(tiles.data()), nullptr};
    if (dtype == g_torch.bfloat16())
        walk_linear(weight, static_cast<const std::uint16_t*>(x.data()), m, static_cast<std::uint16_t*>(out.data()));
    else if (dtype == g_torch.float32())
        walk_linear(weight, static_cast<const float*>(x.data()), m, static_cast<float*>(out.data()));
    else
        require(false, "x must be bfloat16 or float32");
    stack[0] = out.release();
}

template <typename Function>
void find(Handle library, const char* name, Function& found) {
#if defined(__unix__) || defined(__APPLE__)
    found = reinterpret_cast<Function>(dlsym(library, (std::string("aoti_torch_") + name).c_str()));
#else
    found = nullptr;
#endif
    if (!found) throw std::runtime_error(std::string("torch has no function aoti_torch_") + name);
}

// `library` is what dlopen gave for torch; the operation must have been defined.
void implement_torch_linear(std::uintptr_t library) {
    const auto torch = reinterpret_cast<Handle>(library);
    find(torch, "dtype_bfloat16", g_torch.bfloat16);
    find(torch, "dtype_float32", g_torch.float32);
    find(torch, "dtype_uint8", g_torch.uint8);
    find(torch, "device_type_cpu", g_torch.cpu);
    find(torch, "get_data_ptr", g_torch.get_data_ptr);
    find(torch, "get_dim", g_torch.get_dim);
    find(torch, "get_sizes", g_torch.get_sizes);
    find(torch, "get_dtype", g_torch.get_dtype);
    find(torch, "is_contiguous", g_torch.is_contiguous);
    find(torch, "empty_strided", g_torch.empty_strided);
    find(torch, "delete_tensor_object", g_torch.delete_tensor);
    find(torch, "library_init_impl", g_torch.library_init);
    find(torch, "library_impl", g_torch.library_impl);
    Handle made;  // is never given back: it ends what was registered
    require(g_torch.library_init("fourfold", "CPU", __FILE__, __LINE__, &made) == 0 &&
                g_torch.library_impl(made, "mxfp4_linear", &mxfp4_linear) == 0,
            "torch does not take it");
}

}  // namespace

void bind_torch_linear(nb::module_& module) {
    module.def("implement_torch_linear", &implement_torch_linear, "library"_a);
}

}  // namespace fourfold
