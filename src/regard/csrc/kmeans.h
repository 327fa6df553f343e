// What the dispatcher hands to the k-means kernels.
#pragma once

#include "tensors.h"

namespace regard {

struct KmeansProblem {
  int64_t batch, tokens, channels, clusters;
  Tensor4 x;                   // (batch, 1, token, channel)
  const char* mask = nullptr;  // booleans (batch, tokens), or null: tokens that are false move no centroid
  int64_t mask_stride[2] = {0, 0};
  const float* origin;         // contiguous (batch, channels), taken off every token
  const float* centroids;      // contiguous (batch, clusters, channels), the origin taken off
  int64_t* assignment;         // contiguous (batch, tokens)
};

struct KmeansKernels {
  // Assigns the tokens [row_begin, row_end) of each unit to the nearest centroid. With `partial`, also adds up each
  // cluster's tokens: `partial_size` floats a unit, sums (clusters, channels) and then counts (clusters).
  void (*assign)(const KmeansProblem&, const Unit* units, int64_t count, float* partial);
};

inline int64_t kmeans_partial_size(const KmeansProblem& p) { return p.clusters * (p.channels + 1); }

}  // namespace regard
