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
#include "knn_lists.h"
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
namespace routed {
#include "routed_rows.h"
#include "routed_single.h"
#include "routed_forward.h"
#include "routed_backward.h"
}  // namespace routed
namespace neighborhood {
#include "neighborhood_micro.h"
#include "neighborhood_grid.h"
#include "neighborhood_sums.h"
#include "neighborhood_dense.h"
#include "neighborhood_forward.h"
#include "neighborhood_backward.h"
}  // namespace neighborhood

static const Kernels& table() {
  static const Kernels kernels{
      {kmeans::assign},
      {knn::forward, knn::backward, knn::reduce, knn::mask_gradient, knn::partial_size, knn::lists},
      {multipole::forward, multipole::backward, multipole::reduce, multipole::partial_size},
      {nearest::scan, nearest::finish},
      {routed::forward, routed::backward, routed::reduce, routed::partial_size},
      {neighborhood::forward, neighborhood::backward, neighborhood::reduce, neighborhood::partial_size},
  };
  return kernels;
}
