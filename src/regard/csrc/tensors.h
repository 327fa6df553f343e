// Tensors as the kernels see them: plain pointers and element strides, no torch.
#pragma once

#include <cstdint>

namespace regard {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// (batch, head, token, channel), strides in elements
struct Tensor4 {
  char* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;
};

// Queries, keys and values as every attention operator has them.
struct AttentionProblem {
  int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
  float scale;
  Tensor4 query, key, value, output;
  int threads = 1;
};

struct AttentionGradients {
  Tensor4 grad_output, grad_query, grad_key, grad_value;
};

// A piece of work: query rows [row_begin, row_end) of the `heads / key_heads` query heads that share one key head.
struct Unit {
  int64_t batch, key_head, row_begin, row_end;
};

}  // namespace regard
