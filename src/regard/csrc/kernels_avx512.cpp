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
#include "kernels_table.h"
}  // namespace

const Kernels& kernels_avx512() { return table(); }
}  // namespace regard

REGARD_TARGET_END

#else

namespace regard {
const Kernels& kernels_avx512() { return kernels_plain(); }
}  // namespace regard

#endif
