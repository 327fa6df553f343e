// What the dispatcher hands to the multipole attention kernels.
#pragma once

#include "tensors.h"

namespace regard {

struct MultipoleProblem : AttentionProblem {
  int64_t clusters, near, prefix;
  bool second_order;
  float tolerance;                   // bounds what the far field may err by; infinite if it is not bounded
  const int64_t* assignment;         // contiguous (batch, key_heads, keys - prefix)
  const char* visible = nullptr;     // booleans (batch, key_heads, keys), or null
  int64_t visible_stride[3] = {0, 0, 0};
};

// Each call works on `count` units with scratch memory of its own.
struct MultipoleKernels {
  void (*forward)(const MultipoleProblem&, const Unit* units, int64_t count);
  // Partial sums, `partial_size` floats a unit, where `partial` is not null: several units then share a key head, and
  // `reduce` adds theirs in a fixed order.
  void (*backward)(const MultipoleProblem&, const AttentionGradients&, const Unit* units, int64_t count, float* partial);
  void (*reduce)(const MultipoleProblem&, const AttentionGradients&, const Unit& unit, float* partial, int64_t parts);
  int64_t (*partial_size)(const MultipoleProblem&);
};

}  // namespace regard
