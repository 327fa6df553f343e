// What the dispatcher hands to the k-NN attention kernels.
#pragma once

#include "tensors.h"

namespace regard {

enum class MaskKind { kNone, kBool, kFloat };

struct KnnProblem : AttentionProblem {
  int64_t topk;
  bool causal;
  MaskKind mask_kind = MaskKind::kNone;
  const char* mask = nullptr;
  int64_t mask_size[4] = {1, 1, 1, 1};
  int64_t mask_stride[4] = {0, 0, 0, 0};  // 0 along broadcast dimensions
  // contiguous (batch, heads, queries)
  float* lse;
  float* kth_logit;
  int32_t* last_tie;
};

struct KnnGradients : AttentionGradients {
  float* grad_mask = nullptr;  // contiguous, of the mask's own size; null if it is not wanted
};

// One instruction set's kernels. Each call works on units [begin, end) with scratch memory of its own.
struct KnnKernels {
  void (*forward)(const KnnProblem&, const Unit* units, int64_t count);
  // Partial sums of grad_key and grad_value, (count, keys, padded dims) in float32, where `partial` is not null: several
  // units then share a key head, and their sums are added in a fixed order afterwards.
  void (*backward)(const KnnProblem&, const KnnGradients&, const Unit* units, int64_t count, float* partial);
  void (*reduce)(const KnnProblem&, const KnnGradients&, const Unit& unit, float* partial, int64_t parts);
  // Float mask's gradient for mask batch and head (b, h), rows [row_begin, row_end).
  void (*mask_gradient)(const KnnProblem&, const KnnGradients&, int64_t b, int64_t h, int64_t row_begin, int64_t row_end);
  int64_t (*partial_size)(const KnnProblem&);  // floats a unit
  // The kept keys of each row, ascending, into contiguous (batch, heads, queries, topk); -1 behind the last. Values unused.
  void (*lists)(const KnnProblem&, int64_t* out, const Unit* units, int64_t count);
};

}  // namespace regard
