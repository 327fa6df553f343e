// Routed attention's CPU implementation, registered against the schema that regard/ops/routed/op.py defines.
#include <optional>
#include <tuple>

#include "torch_tensors.h"

namespace regard {
namespace {

// What a call is made of, in the schema's order.
struct Inputs {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>& visible;
  const Tensor &blocks, &extra_key, &extra_value;
  const std::optional<Tensor>& extra_bias;
  int64_t query_block, key_block;
  double scale;
};

void describe_blocks(RoutedProblem& p, const Tensor& blocks) {
  STD_TORCH_CHECK(p.query_block > 0 && p.key_block > 0, "routed_attention: a block has no tokens");
  const int64_t rows = (p.queries + p.query_block - 1) / p.query_block;
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Long && blocks.dim() == 4 &&
                      (blocks.size(0) == 1 || blocks.size(0) == p.batch) &&
                      (blocks.size(1) == 1 || blocks.size(1) == p.heads) && blocks.size(2) == rows,
                  "routed_attention: expected int64 blocks (1 or B, 1 or H, ceil(N / query_block), T)");
  p.blocks = static_cast<const int64_t*>(blocks.data_ptr());
  p.listed = blocks.size(3);
  for (int i = 0; i < 4; ++i) p.blocks_stride[i] = blocks.size(i) == 1 ? 0 : blocks.stride(i);
  const int64_t there = (p.keys + p.key_block - 1) / p.key_block;
  for (int64_t b = 0; b < blocks.size(0); ++b)
    for (int64_t h = 0; h < blocks.size(1); ++h)
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t list = b * p.blocks_stride[0] + h * p.blocks_stride[1] + n * p.blocks_stride[2];
        for (int64_t i = 0; i < p.listed; ++i) {
          const int64_t listed = p.blocks[list + i * p.blocks_stride[3]];
          STD_TORCH_CHECK(listed >= -1 && listed < there, "routed_attention: blocks: holds ", listed, ", but there are ",
                          there, " key blocks; expected their numbers, or -1 for none");
        }
      }
}

RoutedProblem describe(const Inputs& in) {
  RoutedProblem p;
  describe(p, "routed_attention", in.query, in.key, in.value, in.scale);
  p.query_block = in.query_block, p.key_block = in.key_block;
  describe_blocks(p, in.blocks);
  describe_visible(p, "routed_attention", in.visible);
  p.extra_key = view4(in.extra_key), p.extra_value = view4(in.extra_value), p.extra = in.extra_key.size(2);
  STD_TORCH_CHECK(p.extra_key.dtype == p.key.dtype && p.extra_value.dtype == p.key.dtype &&
                      in.extra_key.size(0) == p.batch && in.extra_key.size(1) == p.key_heads &&
                      in.extra_key.size(3) == p.dim && in.extra_value.size(0) == p.batch &&
                      in.extra_value.size(1) == p.key_heads && in.extra_value.size(2) == p.extra &&
                      in.extra_value.size(3) == p.value_dim && p.keys + p.extra < (int64_t{1} << 30),
                  "routed_attention: the extra keys and values do not fit the others");
  if (in.extra_bias.has_value()) {
    const Tensor& bias = *in.extra_bias;
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.dim() == 4 && bias.size(0) == p.batch &&
                        bias.size(1) == p.heads && (bias.size(2) == 1 || bias.size(2) == p.queries) &&
                        bias.size(3) == p.extra,
                    "routed_attention: expected a float32 bias (B, H, 1 or N, S)");
    p.extra_bias = static_cast<const float*>(bias.data_ptr());
    p.bias_per_query = bias.size(2) == p.queries;
    for (int i = 0; i < 4; ++i) p.bias_stride[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  return p;
}

Tensor run_forward(const Inputs& in) {
  RoutedProblem p = describe(in);
  Tensor output = empty_heads_last(in.query, p.batch, p.heads, p.queries, p.value_dim);
  p.output = view4(output);
  forward(kernels().routed, p);
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients run_backward(const Tensor& grad_output, const Inputs& in) {
  const RoutedProblem p = describe(in);
  Tensor grad_query = empty_heads_last(in.query), grad_key = empty_heads_last(in.key);
  Tensor grad_value = empty_heads_last(in.value), grad_extra_key = empty_heads_last(in.extra_key);
  Tensor grad_extra_value = empty_heads_last(in.extra_value);
  const bool biased = in.extra_bias.has_value();
  Tensor grad_bias = biased ? torch::stable::new_empty(*in.extra_bias, in.extra_bias->sizes())
                            : torch::stable::new_empty(in.query, {0}, ScalarType::Float);
  RoutedGradients grads{{view4(grad_output), view4(grad_query), view4(grad_key), view4(grad_value)}, {}, {}, nullptr};
  grads.grad_extra_key = view4(grad_extra_key), grads.grad_extra_value = view4(grad_extra_value);
  if (biased) grads.grad_bias = static_cast<float*>(grad_bias.data_ptr());
  backward(kernels().routed, p, grads);
  return {grad_query, grad_key, grad_value, grad_extra_key, grad_extra_value, grad_bias};
}

Tensor routed_forward(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> visible,
                      const Tensor& blocks, const Tensor& extra_key, const Tensor& extra_value,
                      std::optional<Tensor> extra_bias, int64_t query_block, int64_t key_block, double scale) {
  return run_forward(
      {query, key, value, visible, blocks, extra_key, extra_value, extra_bias, query_block, key_block, scale});
}

Gradients routed_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                          std::optional<Tensor> visible, const Tensor& blocks, const Tensor& extra_key,
                          const Tensor& extra_value, std::optional<Tensor> extra_bias, int64_t query_block,
                          int64_t key_block, double scale) {
  return run_backward(grad_output, {query, key, value, visible, blocks, extra_key, extra_value, extra_bias, query_block,
                                    key_block, scale});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("routed_attention", TORCH_BOX(&routed_forward));
  m.impl("routed_attention_backward", TORCH_BOX(&routed_backward));
}

}  // namespace regard
