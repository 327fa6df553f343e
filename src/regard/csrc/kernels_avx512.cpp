// All kernels, for avx512.
#include <cstdint>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "target.h"

// Nothing of the standard library may be instantiated below: its templates are shared between the translation units, and
// the linker could hand one compiled for this instruction set to all of them.

#if REGARD_X86
#include <immintrin.h>

REGARD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace regard {
namespace {
#include "vec_avx512.h"
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

const Kernels& kernels_avx512() {
  static const Kernels kernels{
      {kmeans::assign},
      {knn::forward, knn::backward, knn::reduce, knn::mask_gradient, knn::partial_size},
      {multipole::forward, multipole::backward, multipole::reduce, multipole::partial_size},
  };
  return kernels;
}
}  // namespace regard

REGARD_TARGET_END

#else

namespace regard {
const Kernels& kernels_avx512() { return kernels_plain(); }
}  // namespace regard

#endif
