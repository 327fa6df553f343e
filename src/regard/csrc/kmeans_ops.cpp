// Lloyd's iterations on the CPU, registered against the schema that regard/ops/clustering/kmeans.py defines.
#include <memory>
#include <optional>
#include <tuple>

#include "torch_tensors.h"

namespace regard {
namespace {

// Centroids of all tokens' clusters, from the units' sums in their order; an empty cluster's stays.
void move(const KmeansProblem& p, const std::vector<Unit>& units, const float* partial, float* centroids) {
  const int64_t size = kmeans_partial_size(p), each = static_cast<int64_t>(units.size()) / p.batch;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t c = 0; c < p.clusters; ++c) {
      float count = 0.0f;
      for (int64_t i = 0; i < each; ++i) count += partial[(b * each + i) * size + p.clusters * p.channels + c];
      if (count == 0.0f) continue;
      float* out = centroids + (b * p.clusters + c) * p.channels;
      for (int64_t d = 0; d < p.channels; ++d) {
        float sum = 0.0f;
        for (int64_t i = 0; i < each; ++i) sum += partial[(b * each + i) * size + c * p.channels + d];
        out[d] = sum / count;
      }
    }
}

KmeansProblem describe(const Tensor& x, const Tensor& centroids) {
  STD_TORCH_CHECK(centroids.dim() == 3 && centroids.size(0) == x.size(0) && centroids.size(2) == x.size(2) &&
                      centroids.scalar_type() == ScalarType::Float && centroids.is_contiguous(),
                  "kmeans: expected x (B, N, C) and contiguous float32 centroids (B, M, C)");
  KmeansProblem p;
  p.x = view3(x);
  p.batch = x.size(0), p.tokens = x.size(1), p.channels = x.size(2), p.clusters = centroids.size(1);
  STD_TORCH_CHECK(p.clusters >= 1, "kmeans: no clusters");
  return p;
}

// The nearest centroid of each token, distances computed around the origin; of several the first.
Tensor nearest(const Tensor& x, const Tensor& centroids) {
  KmeansProblem p = describe(x, centroids);
  Tensor assignment = torch::stable::new_empty(x, {p.batch, p.tokens}, ScalarType::Long);
  if (p.batch == 0) return assignment;
  const std::unique_ptr<float[]> origin(new float[p.batch * p.channels]());
  p.origin = origin.get(), p.centroids = static_cast<const float*>(centroids.data_ptr());
  p.assignment = static_cast<int64_t*>(assignment.data_ptr());
  int64_t parts;
  const std::vector<Unit> units = split(p.batch, 1, p.tokens, torch::stable::get_num_threads(), &parts);
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    kernels().kmeans.assign(p, units.data() + begin, end - begin, nullptr);
  });
  return assignment;
}

std::tuple<Tensor, Tensor> lloyd(const Tensor& x, std::optional<Tensor> mask, const Tensor& start, int64_t iterations) {
  KmeansProblem p = describe(x, start);
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == p.batch &&
                        mask->size(1) == p.tokens,
                    "kmeans: expected a boolean mask (B, N)");
    p.mask = static_cast<const char*>(mask->data_ptr());
    p.mask_stride[0] = mask->stride(0), p.mask_stride[1] = mask->stride(1);
  }
  Tensor assignment = torch::stable::new_empty(x, {p.batch, p.tokens}, ScalarType::Long);
  Tensor result = torch::stable::new_empty(x, {p.batch, p.clusters, p.channels}, ScalarType::Float);
  if (p.batch == 0) return {assignment, result};
  p.assignment = static_cast<int64_t*>(assignment.data_ptr());
  float* centroids = static_cast<float*>(result.data_ptr());
  const float* from = static_cast<const float*>(start.data_ptr());
  // Distances do not change with the origin; amid the tokens they lose fewest digits.
  const std::unique_ptr<float[]> origin(new float[p.batch * p.channels]);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t d = 0; d < p.channels; ++d) {
      double sum = 0.0;
      for (int64_t c = 0; c < p.clusters; ++c) sum += from[(b * p.clusters + c) * p.channels + d];
      const float mean = static_cast<float>(sum / static_cast<double>(p.clusters));
      origin[b * p.channels + d] = mean;
      for (int64_t c = 0; c < p.clusters; ++c) {
        const int64_t i = (b * p.clusters + c) * p.channels + d;
        centroids[i] = from[i] - mean;
      }
    }
  p.origin = origin.get(), p.centroids = centroids;
  int64_t parts;
  const std::vector<Unit> units = split(p.batch, 1, p.tokens, torch::stable::get_num_threads(), &parts);
  const int64_t count = static_cast<int64_t>(units.size()), size = kmeans_partial_size(p);
  const std::unique_ptr<float[]> partial(iterations > 0 ? new float[size * count] : nullptr);
  for (int64_t i = 0; i <= iterations; ++i) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      kernels().kmeans.assign(p, units.data() + begin, end - begin, i < iterations ? partial.get() + begin * size : nullptr);
    });
    if (i < iterations) move(p, units, partial.get(), centroids);
  }
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < p.clusters * p.channels; ++i)
      centroids[b * p.clusters * p.channels + i] += origin[b * p.channels + i % p.channels];
  return {assignment, result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) { 
  m.impl("kmeans_lloyd", TORCH_BOX(&lloyd));
  m.impl("kmeans_nearest", TORCH_BOX(&nearest));
}

}  // namespace regard
