// torch's tensors as the kernels see them, and the kernels of this machine.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"

namespace regard {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels();

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "regard's kernels take float32, bfloat16 and float16");
  }
}

inline Tensor4 view4(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "expected tensors of rank 4");
  Tensor4 out;
  out.data = static_cast<char*>(t.data_ptr());
  out.dtype = dtype_of(t);
  for (int i = 0; i < 4; ++i) out.stride[i] = t.stride(i);
  return out;
}

// (B, N, C) as tokens of one head.
inline Tensor4 view3(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "expected a tensor of rank 3");
  Tensor4 out;
  out.data = static_cast<char*>(t.data_ptr());
  out.dtype = dtype_of(t);
  out.stride[0] = t.stride(0), out.stride[1] = 0, out.stride[2] = t.stride(1), out.stride[3] = t.stride(2);
  return out;
}

// (B, H, N, D) laid out as (B, N, H, D), so that joining the heads afterwards is a view.
inline Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t dim) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, dim}), 1, 2);
}

inline Tensor empty_heads_last(const Tensor& like) {
  return empty_heads_last(like, like.size(0), like.size(1), like.size(2), like.size(3));
}

// Splits the rows of each key head so that the units spread evenly over the threads.
inline std::vector<Unit> split(int64_t batch, int64_t key_heads, int64_t queries, int64_t threads, int64_t* parts) {
  const int64_t heads = batch * key_heads;
  *parts = heads % threads == 0 || heads >= 4 * threads ? 1 : threads / std::gcd(heads, threads);
  // Each part packs the keys again, so it should have rows enough to pay for that.
  const int64_t most = queries / 64 > 1 ? queries / 64 : 1;
  if (*parts > most) *parts = most;
  const int64_t rows = (queries + *parts - 1) / *parts;
  std::vector<Unit> units;
  units.reserve(heads * *parts);
  for (int64_t i = 0; i < heads; ++i)
    for (int64_t part = 0; part < *parts; ++part)
      units.push_back({i / key_heads, i % key_heads, std::min(part * rows, queries),
                       std::min((part + 1) * rows, queries)});
  return units;
}

// The part of a problem that every attention operator has; `name` begins the messages.
inline void describe(AttentionProblem& p, const char* name, const Tensor& query, const Tensor& key, const Tensor& value,
                     double scale) {
  p.query = view4(query), p.key = view4(key), p.value = view4(value);
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  p.scale = static_cast<float>(scale);
  p.threads = static_cast<int>(torch::stable::get_num_threads());
  STD_TORCH_CHECK(key.size(0) == p.batch && value.size(0) == p.batch && value.size(1) == p.key_heads &&
                      value.size(2) == p.keys && key.size(3) == p.dim,
                  name, ": the shapes of query, key and value do not fit");
  STD_TORCH_CHECK(p.key_heads > 0 ? p.heads % p.key_heads == 0 : p.heads == 0,
                  name, ": the query's heads are no multiple of the key's");
  STD_TORCH_CHECK(p.query.dtype == p.key.dtype && p.query.dtype == p.value.dtype, name, ": dtypes differ");
  STD_TORCH_CHECK(p.dim >= 1 && p.value_dim >= 1 && p.keys < (int64_t{1} << 30), name, ": size out of range");
}

// Which keys are there, of the operators that know a mask for padding.
template <class P>
void describe_visible(P& p, const char* name, const std::optional<Tensor>& visible) {
  if (!visible.has_value()) return;
  STD_TORCH_CHECK(visible->scalar_type() == ScalarType::Bool && visible->dim() == 3 && visible->size(0) == p.batch &&
                      visible->size(1) == p.key_heads && visible->size(2) == p.keys,
                  name, ": expected a boolean mask (B, H_kv, M)");
  p.visible = static_cast<const char*>(visible->data_ptr());
  for (int i = 0; i < 3; ++i) p.visible_stride[i] = visible->stride(i);
}

inline std::vector<Unit> split(const AttentionProblem& p, int64_t* parts) {
  return split(p.batch, p.key_heads, p.queries, p.threads, parts);
}

template <class K, class P>
void forward(const K& kernels, const P& p) {
  int64_t parts;
  const std::vector<Unit> units = split(p, &parts);
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(p, units.data() + begin, end - begin);
  });
}

// Where several units share a key head, their partial sums are added afterwards, in a fixed order.
template <class K, class P, class G>
void backward(const K& kernels, const P& p, const G& grads) {
  int64_t parts;
  const std::vector<Unit> units = split(p, &parts);
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t size = parts > 1 ? kernels.partial_size(p) : 0;
  const std::unique_ptr<float[]> partial(size ? new float[size * count] : nullptr);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    kernels.backward(p, grads, units.data() + begin, end - begin, size ? partial.get() + begin * size : nullptr);
  });
  if (parts > 1)
    torch::stable::parallel_for(0, count / parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.reduce(p, grads, units[i * parts], partial.get() + i * parts * size, parts);
    });
}

}  // namespace regard
