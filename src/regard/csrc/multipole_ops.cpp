// Multipole attention's CPU implementation, registered against the schema that regard/ops/multipole/op.py defines.
#include <optional>
#include <tuple>

#include "torch_tensors.h"

namespace regard {
namespace {

MultipoleProblem describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& visible,
                          const Tensor& assignment, int64_t clusters, int64_t near, bool second_order, int64_t prefix,
                          double scale, double tolerance) {
  MultipoleProblem p;
  describe(p, "multipole_attention", query, key, value, scale);
  p.clusters = clusters, p.near = near, p.prefix = prefix, p.second_order = second_order;
  p.tolerance = static_cast<float>(tolerance);
  STD_TORCH_CHECK(0 <= prefix && prefix <= p.keys && prefix <= p.queries && 0 <= near && near <= clusters,
                  "multipole_attention: num_prefix_tokens or near out of range");
  STD_TORCH_CHECK(tolerance >= 0.0, "multipole_attention: tolerance out of range");
  STD_TORCH_CHECK(assignment.scalar_type() == ScalarType::Long && assignment.is_contiguous() && assignment.dim() == 3 &&
                      assignment.size(0) == p.batch && assignment.size(1) == p.key_heads &&
                      assignment.size(2) == p.keys - prefix,
                  "multipole_attention: expected a contiguous int64 assignment (B, H_kv, M - P)");
  p.assignment = static_cast<const int64_t*>(assignment.data_ptr());
  const int64_t entries = p.batch * p.key_heads * (p.keys - prefix);
  for (int64_t i = 0; i < entries; ++i)
    STD_TORCH_CHECK(p.assignment[i] >= 0 && p.assignment[i] < clusters, "multipole_attention: no such cluster");
  describe_visible(p, "multipole_attention", visible);
  return p;
}

Tensor multipole_forward(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> visible,
                         const Tensor& assignment, int64_t clusters, int64_t near, bool second_order, int64_t prefix,
                         double scale, double tolerance) {
  MultipoleProblem p =
      describe(query, key, value, visible, assignment, clusters, near, second_order, prefix, scale, tolerance);
  Tensor output = empty_heads_last(query, p.batch, p.heads, p.queries, p.value_dim);
  p.output = view4(output);
  forward(kernels().multipole, p);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> multipole_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> visible,
    const Tensor& assignment, int64_t clusters, int64_t near, bool second_order, int64_t prefix, double scale,
    double tolerance) {
  const MultipoleProblem p =
      describe(query, key, value, visible, assignment, clusters, near, second_order, prefix, scale, tolerance);
  Tensor grad_query = empty_heads_last(query), grad_key = empty_heads_last(key), grad_value = empty_heads_last(value);
  const AttentionGradients grads{view4(grad_output), view4(grad_query), view4(grad_key), view4(grad_value)};
  backward(kernels().multipole, p, grads);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("multipole_attention", TORCH_BOX(&multipole_forward));
  m.impl("multipole_attention_backward", TORCH_BOX(&multipole_backward));
}

}  // namespace regard
