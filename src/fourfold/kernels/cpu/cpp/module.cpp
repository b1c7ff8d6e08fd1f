// The Python module. Its parts check every array, let go of the GIL, and call the kernel.
#include <nanobind/nanobind.h>

#include "module.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

void set_thread_count(int count) {
    if (count < 1) throw nb::value_error("threads must be at least 1");
    nb::gil_scoped_release unlocked;
    set_threads(count);
}

// The address of GOMP_parallel, or 0.
void use_team_at(std::uintptr_t address) {
    nb::gil_scoped_release unlocked;
    use_team(reinterpret_cast<Team>(address));
}

}  // namespace
}  // namespace fourfold

NB_MODULE(_native, module) {
    // a program that lives until the interpreter ends is no leak, and its report no business of the user's
    nanobind::set_leak_warnings(false);
    fourfold::bind_attention(module);
    module.def("threads", &fourfold::threads);
    module.def("set_threads", &fourfold::set_thread_count, "count"_a);
    module.def("use_team", &fourfold::use_team_at, "address"_a);
    module.def("expect_contention", &fourfold::expect_contention, "expected"_a);
    fourfold::bind_packed(module);
    fourfold::bind_torch_linear(module);
    fourfold::bind_column_rounding(module);
    fourfold::bind_drawing(module);
    fourfold::bind_program(module);
}
