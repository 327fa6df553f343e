// torch's tensors as the kernels see them, and the kernels of this machine.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace regard {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels();

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "regard's kernels take float32, bfloat16 and float16");
  }
}

inline Tensor4 view4(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "expected tensors of rank 4");
  Tensor4 out;
  out.data = static_cast<char*>(t.data_ptr());
  out.dtype = dtype_of(t);
  for (int i = 0; i < 4; ++i) out.stride[i] = t.stride(i);
  return out;
}

// (B, H, N, D) laid out as (B, N, H, D), so that joining the heads afterwards is a view.
inline Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t dim) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, dim}), 1, 2);
}

// Splits the rows of each key head so that the units spread evenly over the threads.
inline std::vector<Unit> split(int64_t batch, int64_t key_heads, int64_t queries, int64_t threads, int64_t* parts) {
  const int64_t heads = batch * key_heads;
  *parts = heads % threads == 0 || heads >= 4 * threads ? 1 : threads / std::gcd(heads, threads);
  // Each part packs the keys again, so it should have rows enough to pay for that.
  const int64_t most = queries / 64 > 1 ? queries / 64 : 1;
  if (*parts > most) *parts = most;
  const int64_t rows = (queries + *parts - 1) / *parts;
  std::vector<Unit> units;
  units.reserve(heads * *parts);
  for (int64_t i = 0; i < heads; ++i)
    for (int64_t part = 0; part < *parts; ++part)
      units.push_back({i / key_heads, i % key_heads, std::min(part * rows, queries),
                       std::min((part + 1) * rows, queries)});
  return units;
}

}  // namespace regard
