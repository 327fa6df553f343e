// All kernels of one instruction set, and their table. Included inside its namespace, after its Vec.
#pragma once

#include "rows.h"
#include "selection.h"
namespace kmeans {
#include "kmeans_kernels.h"
}  // namespace kmeans
namespace knn {
#include "knn_kernels.h"
#include "knn_backward.h"
}  // namespace knn
namespace multipole {
#include "multipole_clusters.h"
#include "multipole_rows.h"
#include "multipole_forward.h"
#include "multipole_backward.h"
}  // namespace multipole
namespace nearest {
#include "nearest_kernels.h"
}  // namespace nearest

static const Kernels& table() {
  static const Kernels kernels{
      {kmeans::assign},
      {knn::forward, knn::backward, knn::reduce, knn::mask_gradient, knn::partial_size},
      {multipole::forward, multipole::backward, multipole::reduce, multipole::partial_size},
      {nearest::scan, nearest::finish},
  };
  return kernels;
}
