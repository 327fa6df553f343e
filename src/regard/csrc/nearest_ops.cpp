// The nearest few tokens of every token on the CPU, against the schema that regard/ops/clustering/nearest.py defines.
#include <cmath>
#include <memory>
#include <tuple>

#include "torch_tensors.h"

namespace regard {
namespace {

// Rows of a triangle, as many pairs in each part.
std::vector<Unit> triangles(int64_t batch, int64_t tokens, int64_t parts) {
  std::vector<Unit> units;
  const auto bound = [&](int64_t part) {
    const double left = 1.0 - static_cast<double>(part) / static_cast<double>(parts);
    return part == parts ? tokens : static_cast<int64_t>(static_cast<double>(tokens) * (1.0 - std::sqrt(left)));
  };
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t part = 0; part < parts; ++part) units.push_back({b, 0, bound(part), bound(part + 1)});
  return units;
}

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& part, int64_t count) {
  NearestProblem p;
  p.x = view3(x);
  STD_TORCH_CHECK(part.dim() == 2 && part.size(0) == x.size(0) && part.size(1) == x.size(1) &&
                      part.scalar_type() == ScalarType::Bool && part.is_contiguous(),
                  "nearest_tokens: expected contiguous booleans (B, N)");
  p.batch = x.size(0), p.tokens = x.size(1), p.channels = x.size(2), p.count = count - 1;
  STD_TORCH_CHECK(count >= 2 && count <= kMostNeighbors && p.tokens < (int64_t{1} << 30),
                  "nearest_tokens: neighbors or tokens out of range");
  p.part = static_cast<const char*>(part.data_ptr());
  Tensor squares = torch::stable::new_empty(x, {p.batch, p.tokens, count}, ScalarType::Float);
  Tensor nearest = torch::stable::new_empty(x, {p.batch, p.tokens, count}, ScalarType::Long);
  if (p.batch == 0 || p.tokens == 0) return {squares, nearest};
  // As many parts of a sample as keep all threads busy; each packs the tokens again and has lists of its own.
  int64_t parts;
  split(p.batch, 1, p.tokens, torch::stable::get_num_threads(), &parts);
  const std::vector<Unit> units = triangles(p.batch, p.tokens, parts);
  const int64_t size = p.tokens * p.count, each = static_cast<int64_t>(units.size());
  const std::unique_ptr<float[]> keys(new float[each * size]), norms(new float[each * p.tokens]);
  const std::unique_ptr<int32_t[]> indices(new int32_t[each * size]);
  torch::stable::parallel_for(0, each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().nearest.scan(p, units[i], keys.get() + i * size, indices.get() + i * size, norms.get() + i * p.tokens);
  });
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * parts;
      kernels().nearest.finish(p, {b, 0, 0, p.tokens}, parts, keys.get() + first * size, indices.get() + first * size,
                               norms.get() + first * p.tokens, static_cast<float*>(squares.data_ptr()),
                               static_cast<int64_t*>(nearest.data_ptr()));
    }
  });
  return {squares, nearest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) { m.impl("nearest_tokens", TORCH_BOX(&nearest)); }

}  // namespace regard
