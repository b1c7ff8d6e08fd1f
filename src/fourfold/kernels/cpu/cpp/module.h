// What the files that make up the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "mxfp4.h"

namespace fourfold {

Isa parse_isa(const std::string& name);  // ValueError for a name that does not exist or cannot run here

void bind_attention(nanobind::module_& module);
void bind_packed(nanobind::module_& module);
void bind_column_rounding(nanobind::module_& module);
void bind_program(nanobind::module_& module);

}  // namespace fourfold
