// Of torch/extension.h what the extensions of DeepSpeed use that tests build; the rest of it takes
// 20 s of a core to read, for each file. g++ beside it says which of the two dear ones are needed.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#ifdef WITH_PYBIND
#include <torch/csrc/utils/pybind.h>
#endif
#ifdef WITH_LIBRARY
#include <torch/library.h>
#endif

namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
constexpr auto kFloat16 = at::kHalf;
}  // namespace torch
