// What the dispatcher hands to the nearest-tokens kernel.
#pragma once

#include "tensors.h"

namespace regard {

constexpr int64_t kMostNeighbors = 64;

struct NearestProblem {
  int64_t batch, tokens, channels;
  int64_t count;     // of each token's neighbours beside itself, 1 ... kMostNeighbors
  Tensor4 x;         // (batch, 1, token, channel)
  const char* part;  // contiguous booleans (batch, tokens): the others are nobody's neighbour
};

struct NearestKernels {
  // Pairs (i, j) with i among the unit's rows and i < j, each for both of its tokens: into `tokens` lists of `count` keys,
  // x_i . x_j - |x_j|^2 / 2 in descending order and the index j for each, -inf where a list ends; and all tokens'
  // |x|^2 / 2, infinite where one takes no part.
  void (*scan)(const NearestProblem&, const Unit& unit, float* keys, int32_t* indices, float* norms);
  // Squared distances and indices, (batch, tokens, 1 + count) each, the token itself first, of the rows of a unit from the
  // lists of the `parts` units that scanned its sample.
  void (*finish)(const NearestProblem&, const Unit& unit, int64_t parts, const float* keys, const int32_t* indices,
                 const float* norms, float* squares, int64_t* nearest);
};

}  // namespace regard
