// k-NN attention's CPU implementation, registered against the schema that regard/ops/knn/op.py defines.
#include <optional>
#include <tuple>

#include "torch_tensors.h"

namespace regard {
namespace {

KnnProblem describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                    int64_t topk, bool causal, double scale) {
  KnnProblem p;
  describe(p, "knn_attention", query, key, value, scale);
  p.topk = topk, p.causal = causal;
  STD_TORCH_CHECK(topk >= 1 && topk <= p.keys, "knn_attention: topk out of range");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 4, "knn_attention: expected attn_mask of rank 4");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Float,
                    "knn_attention on CPU takes boolean and float32 masks");
    p.mask_kind = mask->scalar_type() == ScalarType::Bool ? MaskKind::kBool : MaskKind::kFloat;
    p.mask = static_cast<const char*>(mask->data_ptr());
    const int64_t whole[4] = {p.batch, p.heads, p.queries, p.keys};
    for (int i = 0; i < 4; ++i) {
      p.mask_size[i] = mask->size(i);
      STD_TORCH_CHECK(p.mask_size[i] == 1 || p.mask_size[i] == whole[i], "knn_attention: attn_mask does not broadcast");
      p.mask_stride[i] = p.mask_size[i] == 1 ? 0 : mask->stride(i);
    }
  }
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask, int64_t topk, bool causal,
    double scale) {
  KnnProblem p = describe(query, key, value, mask, topk, causal, scale);
  Tensor output = empty_heads_last(query, p.batch, p.heads, p.queries, p.value_dim);
  Tensor lse = torch::stable::new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Float);
  Tensor kth = torch::stable::new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Float);
  Tensor tie = torch::stable::new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Int);
  p.output = view4(output);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.kth_logit = static_cast<float*>(kth.data_ptr());
  p.last_tie = static_cast<int32_t*>(tie.data_ptr());
  forward(kernels().knn, p);
  return {output, lse, kth, tie};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask,
    const Tensor& lse, const Tensor& kth, const Tensor& tie, int64_t topk, bool causal, double scale,
    bool wants_mask) {
  KnnProblem p = describe(query, key, value, mask, topk, causal, scale);
  STD_TORCH_CHECK(lse.is_contiguous() && kth.is_contiguous() && tie.is_contiguous(), "knn_attention: the state must be contiguous");
  p.lse = static_cast<float*>(lse.data_ptr());
  p.kth_logit = static_cast<float*>(kth.data_ptr());
  p.last_tie = static_cast<int32_t*>(tie.data_ptr());
  Tensor grad_query = empty_heads_last(query), grad_key = empty_heads_last(key), grad_value = empty_heads_last(value);
  KnnGradients grads;
  grads.grad_output = view4(grad_output);
  grads.grad_query = view4(grad_query), grads.grad_key = view4(grad_key), grads.grad_value = view4(grad_value);
  backward(kernels().knn, p, grads);
  Tensor grad_mask = torch::stable::new_empty(query, {0});
  if (wants_mask && mask.has_value()) {
    STD_TORCH_CHECK(p.mask_kind == MaskKind::kFloat, "knn_attention: only a float mask has a gradient");
    const int64_t* size4 = p.mask_size;
    grad_mask = torch::stable::new_zeros(*mask, {size4[0], size4[1], size4[2], size4[3]});
    grads.grad_mask = static_cast<float*>(grad_mask.data_ptr());
    const int64_t heads = size4[0] * size4[1], rows = size4[2];
    const int64_t pieces = heads >= p.threads ? 1 : std::min<int64_t>(p.threads, rows);
    const int64_t each = (rows + pieces - 1) / pieces;
    torch::stable::parallel_for(0, heads * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / pieces, first = i % pieces * each;
        if (first < rows)
          kernels().knn.mask_gradient(p, grads, head / size4[1], head % size4[1], first, std::min(first + each, rows));
      }
    });
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

Tensor knn_lists(const Tensor& query, const Tensor& key, std::optional<Tensor> visible, int64_t topk) {
  std::optional<Tensor> mask;
  if (visible.has_value()) {
    STD_TORCH_CHECK(visible->dim() == 2, "knn_lists: expected visible (B, M)");
    mask = torch::stable::unsqueeze(torch::stable::unsqueeze(*visible, 1), 1);
  }
  Tensor lists = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2), topk}, ScalarType::Long);
  if (lists.numel() == 0) return lists;
  const KnnProblem p = describe(query, key, key, mask, topk, false, 1.0);
  int64_t* out = static_cast<int64_t*>(lists.data_ptr());
  int64_t parts;
  const std::vector<Unit> units = split(p, &parts);
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    kernels().knn.lists(p, out, units.data() + begin, end - begin);
  });
  return lists;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("knn_attention", TORCH_BOX(&knn_forward));
  m.impl("knn_attention_backward", TORCH_BOX(&knn_backward));
  m.impl("knn_lists_kernel", TORCH_BOX(&knn_lists));
}

}  // namespace regard
