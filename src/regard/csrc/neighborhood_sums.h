// Gradients of one key head's keys, values and biases while they are being summed, in the order of places.
// Included inside an instruction set's namespace, after neighborhood_grid.h.
#pragma once

class HeadSums {
 public:
  static int64_t size(const NeighborhoodProblem& p, const Layout& l) {
    return l.lines * (l.key_size + l.value_size) + p.prefix * (p.dim + p.value_dim) * W + p.heads / p.key_heads * p.offsets * W;
  }
  static int64_t floats(const NeighborhoodProblem& p, const Layout& l) { return size(p, l) + Layout::kBeyond + 16; }

  HeadSums(const NeighborhoodProblem& p, const Layout& l, float* from)
      : keys(from), values(keys + l.lines * l.key_size), prefix_keys(values + l.lines * l.value_size),
        prefix_values(prefix_keys + p.prefix * p.dim * W), biases(prefix_values + p.prefix * p.value_dim * W),
        problem_(p), layout_(l) {}

  void clear() { __builtin_memset(keys, 0, (size(problem_, layout_) + Layout::kBeyond) * sizeof(float)); }

  // Copies beyond the ends hand theirs on to the keys themselves; then all is written.
  void store(const NeighborhoodGradients& g, const Unit& u, Turner& turner) {
    const NeighborhoodProblem& p = problem_;
    const Layout& l = layout_;
    fold(keys, p.dim);
    fold(values, p.value_dim);
    const WindowAxis *z = p.axes, *y = z + 1, *x = y + 1;
    for (int64_t line = 0; line < l.lines; ++line) {
      const int32_t a = z->owner[line / y->places], b = y->owner[line % y->places];
      if (a < 0 || b < 0) continue;
      const LineTokens token(p, a, b, 0, x->length);
      turner.unpack(keys + line * l.key_size, l.ld, l.places, token, 1.0f, g.grad_key, u.batch, u.key_head, p.dim);
      turner.unpack(values + line * l.value_size, l.ld, l.places, token, 1.0f, g.grad_value, u.batch, u.key_head, p.value_dim);
    }
    store_prefix(prefix_keys, g.grad_key, u, p.dim);
    store_prefix(prefix_values, g.grad_value, u, p.value_dim);
    if (!g.bias) return;
    const int64_t group = p.heads / p.key_heads;
    float* out = g.bias + (u.batch * p.heads + u.key_head * group) * p.offsets;
    for (int64_t i = 0; i < group * p.offsets; ++i) out[i] = Vec::sum(Vec::load(biases + i * W));
  }

  float *keys, *values;                // as in Keys
  float *prefix_keys, *prefix_values;  // [prefix][channels][W]: a sum for each lane
  float* biases;                       // [heads of the group][offsets][W]

 private:
  void fold(float* rows, int64_t dim) {
    const Layout& l = layout_;
    const WindowAxis *z = problem_.axes, *y = z + 1, *x = y + 1;
    const int64_t size = dim * l.ld;
    for (int64_t line = 0; line < l.lines; ++line) {
      const int32_t a = z->home[line / y->places], b = y->home[line % y->places];
      if (a < 0 || b < 0 || a * y->places + b == line) continue;
      float* home = rows + (a * y->places + b) * size;
      for (int64_t i = 0; i < size; ++i) home[i] += rows[line * size + i];
    }
    for (int64_t c = 0; c < l.places; ++c) {
      if (x->owner[c] >= 0 || x->home[c] < 0) continue;
      for (int64_t row = 0; row < l.lines * dim; ++row) rows[row * l.ld + x->home[c]] += rows[row * l.ld + c];
    }
  }

  void store_prefix(const float* sums, const Tensor4& t, const Unit& u, int64_t dim) {
    for (int64_t i = 0; i < problem_.prefix; ++i)
      for (int64_t d = 0; d < dim; ++d) {
        const float total[W] = {Vec::sum(Vec::load(sums + (i * dim + d) * W))};
        const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
        char* target = const_cast<char*>(at(t, u.batch, u.key_head, i)) + d * t.stride[3] * size;
        store_row(target, 1, t.dtype, 1, 1.0f, total);
      }
  }

  const NeighborhoodProblem& problem_;
  const Layout& layout_;
};
