// Neighborhood attention's CPU implementation, registered against the schema that regard/ops/neighborhood/op.py defines.
#include <optional>
#include <string>
#include <tuple>

#include "neighborhood_axes.h"
#include "torch_tensors.h"

namespace regard {
namespace {

using Sizes = std::vector<int64_t>;

// A problem and the tables that it points to.
struct Described {
  NeighborhoodProblem problem;
  std::vector<WindowTables> tables;
};

Described describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& visible, const Sizes& grid, const Sizes& kernel, const Sizes& dilation,
                   const Sizes& stride, const Sizes& causal, const std::string& border, int64_t prefix, double scale) {
  Described d;
  NeighborhoodProblem& p = d.problem;
  describe(p, "neighborhood_attention", query, key, value, scale);
  const size_t rank = grid.size();
  STD_TORCH_CHECK(rank >= 1 && rank <= 3 && kernel.size() == rank && dilation.size() == rank && stride.size() == rank &&
                      causal.size() == rank,
                  "neighborhood_attention: expected a grid of rank 1 to 3, and an option for each axis");
  int64_t cells = 1;
  p.offsets = 1;
  d.tables.reserve(3);
  const bool shift = border == "shift", replicate = border == "replicate";
  for (size_t i = 0; i < 3; ++i) {
    const bool there = i >= 3 - rank;  // a missing axis is one place
    const size_t at = there ? i - (3 - rank) : 0;
    const WindowOptions options{there ? grid[at] : 1,       there ? kernel[at] : 1, there ? dilation[at] : 1,
                                there ? stride[at] : 1,     there && causal[at],    shift,
                                replicate,                  replicate || border == "zeropad"};
    STD_TORCH_CHECK(options.length >= 0 && options.kernel >= 1 && options.dilation >= 1 && options.stride >= 1 &&
                        options.stride <= options.kernel,
                    "neighborhood_attention: grid_size, kernel_size, dilation or stride out of range");
    cells *= options.length;
    p.offsets *= 2 * options.kernel - 1;
    d.tables.emplace_back(options);
    p.axes[i] = d.tables.back().axis();
  }
  STD_TORCH_CHECK(prefix >= 0 && p.queries == p.keys && prefix + cells == p.keys,
                  "neighborhood_attention: the grid and the prefix tokens are not all tokens");
  p.prefix = prefix;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->dim() == 2 &&
                        bias->size(0) == p.heads && bias->size(1) == p.offsets,
                    "neighborhood_attention: expected a contiguous float32 attn_bias (H, prod(2 kernel_size - 1))");
    p.bias = static_cast<const float*>(bias->data_ptr());
  }
  if (visible.has_value()) {
    STD_TORCH_CHECK(visible->scalar_type() == ScalarType::Bool && visible->dim() == 2 && visible->size(0) == p.batch &&
                        visible->size(1) == p.keys,
                    "neighborhood_attention: expected a boolean mask (B, N)");
    p.visible = static_cast<const char*>(visible->data_ptr());
    for (int i = 0; i < 2; ++i) p.visible_stride[i] = visible->stride(i);
  }
  return d;
}

Tensor neighborhood_forward(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> bias,
                            std::optional<Tensor> visible, Sizes grid, Sizes kernel, Sizes dilation, Sizes stride,
                            Sizes causal, std::string border, int64_t prefix, double scale) {
  Described d =
      describe(query, key, value, bias, visible, grid, kernel, dilation, stride, causal, border, prefix, scale);
  NeighborhoodProblem& p = d.problem;
  Tensor output = empty_heads_last(query, p.batch, p.heads, p.queries, p.value_dim);
  p.output = view4(output);
  forward(kernels().neighborhood, p);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neighborhood_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> bias,
    std::optional<Tensor> visible, Sizes grid, Sizes kernel, Sizes dilation, Sizes stride, Sizes causal,
    std::string border, int64_t prefix, double scale, bool wants_bias) {
  const Described d =
      describe(query, key, value, bias, visible, grid, kernel, dilation, stride, causal, border, prefix, scale);
  const NeighborhoodProblem& p = d.problem;
  Tensor grad_query = empty_heads_last(query), grad_key = empty_heads_last(key), grad_value = empty_heads_last(value);
  NeighborhoodGradients grads;
  grads.grad_output = view4(grad_output);
  grads.grad_query = view4(grad_query), grads.grad_key = view4(grad_key), grads.grad_value = view4(grad_value);
  wants_bias = wants_bias && p.bias != nullptr;
  std::vector<float> of_images(wants_bias ? p.batch * p.heads * p.offsets : 0);
  if (wants_bias) grads.bias = of_images.data();
  backward(kernels().neighborhood, p, grads);
  if (!wants_bias) return {grad_query, grad_key, grad_value, torch::stable::new_empty(query, {0})};
  Tensor grad_bias = torch::stable::new_empty(*bias, {p.heads, p.offsets});
  float* out = static_cast<float*>(grad_bias.data_ptr());
  for (int64_t i = 0; i < p.heads * p.offsets; ++i) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sum += of_images[b * p.heads * p.offsets + i];
    out[i] = static_cast<float>(sum);
  }
  return {grad_query, grad_key, grad_value, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&neighborhood_forward));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&neighborhood_backward));
}

}  // namespace regard
