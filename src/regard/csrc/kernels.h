// One instruction set's kernels.
#pragma once

#include "kmeans.h"
#include "knn.h"
#include "multipole.h"
#include "nearest.h"

namespace regard {

struct Kernels {
  KmeansKernels kmeans;
  KnnKernels knn;
  MultipoleKernels multipole;
  NearestKernels nearest;
};

const Kernels& kernels_plain();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace regard
