// Of torch/extension.h what the extensions of DeepSpeed use that tests build; the rest of it takes
// 20 s of a core to read, for each file.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
constexpr auto kFloat16 = at::kHalf;
}  // namespace torch
