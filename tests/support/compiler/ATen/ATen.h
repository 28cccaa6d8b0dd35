// Of ATen/ATen.h what the extensions of DeepSpeed use that tests build: not the functions of ATen.
#pragma once
#include <ATen/core/Tensor.h>
