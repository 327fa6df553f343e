// The operators' CPU implementations, registered against schemas that regard/ops defines in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "knn.h"
#include "target.h"

namespace regard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

const KnnKernels& kernels() {
  static const KnnKernels& chosen = instruction_set() == 2 ? knn_avx512() : instruction_set() == 1 ? knn_avx2() : knn_plain();
  return chosen;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "knn_attention on CPU takes float32, bfloat16 and float16");
  }
}

Tensor4 view4(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "knn_attention: expected tensors of rank 4");
  Tensor4 out;
  out.data = static_cast<char*>(t.data_ptr());
  out.dtype = dtype_of(t);
  for (int i = 0; i < 4; ++i) out.stride[i] = t.stride(i);
  return out;
}

// (B, H, N, D) laid out as (B, N, H, D), so that joining the heads afterwards is a view.
Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t dim) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, dim}), 1, 2);
}

KnnProblem describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                    int64_t topk, bool causal, double scale) {
  KnnProblem p;
  p.query = view4(query), p.key = view4(key), p.value = view4(value);
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  p.topk = topk, p.causal = causal, p.scale = static_cast<float>(scale);
  p.threads = static_cast<int>(torch::stable::get_num_threads());
  STD_TORCH_CHECK(key.size(0) == p.batch && value.size(0) == p.batch && value.size(1) == p.key_heads &&
                      value.size(2) == p.keys && key.size(3) == p.dim,
                  "knn_attention: the shapes of query, key and value do not fit");
  STD_TORCH_CHECK(p.key_heads > 0 ? p.heads % p.key_heads == 0 : p.heads == 0,
                  "knn_attention: the query's heads are no multiple of the key's");
  STD_TORCH_CHECK(p.query.dtype == p.key.dtype && p.query.dtype == p.value.dtype, "knn_attention: dtypes differ");
  STD_TORCH_CHECK(topk >= 1 && topk <= p.keys && p.keys < (int64_t{1} << 30), "knn_attention: topk or keys out of range");
  STD_TORCH_CHECK(p.dim >= 1 && p.value_dim >= 1, "knn_attention: empty head dims");
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

// Splits the rows of each key head so that the units spread evenly over the threads.
std::vector<KnnUnit> split(const KnnProblem& p, int64_t* parts) {
  const int64_t heads = p.batch * p.key_heads, threads = p.threads;
  *parts = heads % threads == 0 || heads >= 4 * threads ? 1 : threads / std::gcd(heads, threads);
  // Each part packs the keys again, so it should have rows enough to pay for that.
  const int64_t most = p.queries / 64 > 1 ? p.queries / 64 : 1;
  if (*parts > most) *parts = most;
  const int64_t rows = (p.queries + *parts - 1) / *parts;
  std::vector<KnnUnit> units;
  units.reserve(heads * *parts);
  for (int64_t i = 0; i < heads; ++i)
    for (int64_t part = 0; part < *parts; ++part)
      units.push_back({i / p.key_heads, i % p.key_heads, std::min(part * rows, p.queries),
                       std::min((part + 1) * rows, p.queries)});
  return units;
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
  int64_t parts;
  const std::vector<KnnUnit> units = split(p, &parts);
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1,
                              [&](int64_t begin, int64_t end) { kernels().forward(p, units.data() + begin, end - begin); });
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
  Tensor grad_query = empty_heads_last(query, p.batch, p.heads, p.queries, p.dim);
  Tensor grad_key = empty_heads_last(key, p.batch, p.key_heads, p.keys, p.dim);
  Tensor grad_value = empty_heads_last(value, p.batch, p.key_heads, p.keys, p.value_dim);
  KnnGradients grads;
  grads.grad_output = view4(grad_output);
  grads.grad_query = view4(grad_query), grads.grad_key = view4(grad_key), grads.grad_value = view4(grad_value);
  int64_t parts;
  const std::vector<KnnUnit> units = split(p, &parts);
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t size = parts > 1 ? kernels().partial_size(p) : 0;
  const std::unique_ptr<float[]> partial(size ? new float[size * count] : nullptr);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    kernels().backward(p, grads, units.data() + begin, end - begin, size ? partial.get() + begin * size : nullptr);
  });
  if (parts > 1)
    torch::stable::parallel_for(0, count / parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels().reduce(p, grads, units[i * parts], partial.get() + i * parts * size, parts);
    });
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
          kernels().mask_gradient(p, grads, head / size4[1], head % size4[1], first, std::min(first + each, rows));
      }
    });
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("knn_attention", TORCH_BOX(&knn_forward));
  m.impl("knn_attention_backward", TORCH_BOX(&knn_backward));
}
STABLE_TORCH_LIBRARY_IMPL(regard, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace regard
