// Which instruction set's kernels run on this machine.
#include <cstdlib>
#include <string>

#include "target.h"
#include "torch_tensors.h"

namespace regard {
namespace {

// 2: AVX-512, 1: AVX2 with FMA and F16C, 0: the baseline
int64_t best_instruction_set() {
#if REGARD_X86
  __builtin_cpu_init();
  // F16C is older than AVX2, and not every compiler can ask for it.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// The best that this machine has, or a lesser one that REGARD_INSTRUCTION_SET names (so that each can be tested here).
int64_t instruction_set() {
  static const int64_t chosen = [] {
    const int64_t best = best_instruction_set();
    const char* asked = std::getenv("REGARD_INSTRUCTION_SET");
    const std::string name = asked ? asked : "";
    const int64_t wanted = name == "plain" ? 0 : name == "avx2" ? 1 : 2;
    return std::min(best, wanted);
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen =
      instruction_set() == 2 ? kernels_avx512() : instruction_set() == 1 ? kernels_avx2() : kernels_plain();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(regard, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace regard
