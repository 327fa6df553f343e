// The k-NN attention kernels for avx2.
#include <cstdint>
#include <new>
#include <type_traits>

#include "knn.h"
#include "target.h"

// Nothing of the standard library may be instantiated below: its templates are shared between the translation units, and
// the linker could hand one compiled for this instruction set to all of them.

#if REGARD_X86
#include <immintrin.h>

REGARD_TARGET_BEGIN("avx2,fma,f16c")

namespace regard {
namespace {
#include "vec_avx2.h"
#include "knn_rows.h"
#include "knn_kernels.h"
#include "knn_backward.h"
}  // namespace

const KnnKernels& knn_avx2() {
  static const KnnKernels kernels{forward, backward, reduce, mask_gradient, partial_size};
  return kernels;
}
}  // namespace regard

REGARD_TARGET_END

#else

namespace regard {
const KnnKernels& knn_avx2() { return knn_plain(); }
}  // namespace regard

#endif
