// What the dispatcher hands to the routed attention kernels.
#pragma once

#include "tensors.h"

namespace regard {

struct RoutedProblem : AttentionProblem {
  int64_t query_block, key_block;
  const int64_t* blocks;            // key blocks below ceil(keys / key_block), or -1
  int64_t listed;                   // length of each list
  int64_t blocks_stride[4];         // (batch, head, query block, place), 0 along broadcast dimensions
  const char* visible = nullptr;    // booleans (batch, key_heads, keys), or null
  int64_t visible_stride[3] = {0, 0, 0};
  int64_t extra;                    // keys that all queries see
  Tensor4 extra_key, extra_value;
  const float* extra_bias = nullptr;  // (batch, heads, queries, extra), or null
  int64_t bias_stride[4] = {0, 0, 0, 0};
  bool bias_per_query = false;      // else the same for all queries of a head
};

struct RoutedGradients : AttentionGradients {
  Tensor4 grad_extra_key, grad_extra_value;
  float* grad_bias = nullptr;  // contiguous (batch, heads, queries or 1, extra), or null
};

// Each call works on `count` units with scratch memory of its own.
struct RoutedKernels {
  void (*forward)(const RoutedProblem&, const Unit* units, int64_t count);
  // Partial sums, `partial_size` floats a unit, where `partial` is not null: several units then share a key head, and
  // `reduce` adds theirs in a fixed order.
  void (*backward)(const RoutedProblem&, const RoutedGradients&, const Unit* units, int64_t count, float* partial);
  void (*reduce)(const RoutedProblem&, const RoutedGradients&, const Unit& unit, float* partial, int64_t parts);
  int64_t (*partial_size)(const RoutedProblem&);
};

}  // namespace regard
