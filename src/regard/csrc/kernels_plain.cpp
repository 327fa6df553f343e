// All kernels, for plain.
#include <cstdint>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "target.h"

namespace regard {
namespace {
#include "vec_plain.h"
#include "kernels_table.h"
}  // namespace

const Kernels& kernels_plain() { return table(); }
}  // namespace regard
