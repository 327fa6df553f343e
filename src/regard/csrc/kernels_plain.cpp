// All kernels, for plain.
#include <cstdint>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "target.h"

namespace regard {
namespace {
#include "vec_plain.h"
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
}  // namespace

const Kernels& kernels_plain() {
  static const Kernels kernels{
      {kmeans::assign},
      {knn::forward, knn::backward, knn::reduce, knn::mask_gradient, knn::partial_size},
      {multipole::forward, multipole::backward, multipole::reduce, multipole::partial_size},
  };
  return kernels;
}
}  // namespace regard
