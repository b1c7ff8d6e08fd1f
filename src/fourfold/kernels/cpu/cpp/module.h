// What the files that make up the Python module share.
#pragma once

#include <nanobind/nanobind.h>

namespace fourfold {

void bind_attention(nanobind::module_& module);
void bind_packed(nanobind::module_& module);
void bind_torch_linear(nanobind::module_& module);
void bind_column_rounding(nanobind::module_& module);
void bind_drawing(nanobind::module_& module);
void bind_program(nanobind::module_& module);

}  // namespace fourfold
