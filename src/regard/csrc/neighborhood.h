// What the dispatcher hands to the neighborhood attention kernels.
#pragma once

#include "tensors.h"

namespace regard {

// One axis of the grid as the kernels see it: its dilation groups stand one after the other, each with the places beyond
// its ends that windows reach, so that the key of a query's slot t is at place start + t.
struct WindowAxis {
  int64_t length;         // queries
  int64_t window;         // slots of each query
  int64_t places;         // of keys
  int64_t kernel;         // kernel_size: the bias of slot t is entry start + t - self + kernel - 1
  const int32_t* token;   // [length]: coordinate in the grid
  const int32_t* self;    // [length]: place of the query's own key; ascending
  const int32_t* start;   // [length]: place of its first slot; ascending
  const int32_t* low;     // [length]: slots [low, high) count
  const int32_t* high;
  const int32_t* source;  // [places]: coordinate in the grid of the key at a place, -1 where there are zeros
  const int32_t* home;    // [places]: place of that key itself, -1 where there are zeros
  const int32_t* owner;   // [places]: the query whose own key stands there, -1 for places beyond an end
};

struct NeighborhoodProblem : AttentionProblem {
  WindowAxis axes[3];  // of a grid of rank 3; missing axes have one place
  int64_t prefix;
  const float* bias = nullptr;    // contiguous (heads, offsets), or null
  int64_t offsets = 0;            // product of 2 kernel - 1
  const char* visible = nullptr;  // booleans (batch, keys), or null
  int64_t visible_stride[2] = {0, 0};
};

struct NeighborhoodGradients : AttentionGradients {
  float* bias = nullptr;  // contiguous (batch, heads, offsets), to be added over the batch; null if it is not wanted
};

// Each call works on `count` units with scratch memory of its own. A unit's rows are tokens, as many as its lines of the
// grid hold.
struct NeighborhoodKernels {
  void (*forward)(const NeighborhoodProblem&, const Unit* units, int64_t count);
  // Partial sums, `partial_size` floats a unit, where `partial` is not null: several units then share a key head, and
  // `reduce` adds theirs in a fixed order.
  void (*backward)(const NeighborhoodProblem&, const NeighborhoodGradients&, const Unit* units, int64_t count, float* partial);
  void (*reduce)(const NeighborhoodProblem&, const NeighborhoodGradients&, const Unit& unit, float* partial, int64_t parts);
  int64_t (*partial_size)(const NeighborhoodProblem&);
};

}  // namespace regard
