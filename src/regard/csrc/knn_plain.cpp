// The k-NN attention kernels for plain.
#include <cstdint>
#include <new>
#include <type_traits>

#include "knn.h"
#include "target.h"

namespace regard {
namespace {
#include "vec_plain.h"
#include "knn_rows.h"
#include "knn_kernels.h"
#include "knn_backward.h"
}  // namespace

const KnnKernels& knn_plain() {
  static const KnnKernels kernels{forward, backward, reduce, mask_gradient, partial_size};
  return kernels;
}
}  // namespace regard
