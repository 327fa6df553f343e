// The prefix queries, which see all keys: one row of logits at a time, over the lines that the other queries' keys stand
// in. Included inside an instruction set's namespace, after neighborhood_grid.h.
#pragma once

static REGARD_INLINE Vec::F weight_of(Vec::F logit, Vec::F shift) {
  return Vec::select(Vec::eq(logit, Vec::set1(-kInf)), Vec::zero(), exp_nonpositive(Vec::sub(logit, shift)));
}

class DenseQueries {
 public:
  static int64_t floats(const NeighborhoodProblem& p, const Layout& l) {
    return p.prefix == 0 ? 0 : (2 * l.lines + 1) * round_up(l.places, W) + 2 * p.prefix + l.dim_padded + l.value_padded +
                                   (p.dim > p.value_dim ? p.dim : p.value_dim) * W + 16 * 10;
  }
  DenseQueries(const NeighborhoodProblem& p, const Layout& l, const Keys& keys, Scratch& scratch)
      : problem_(p), layout_(l), keys_(keys), ld_(round_up(l.places, W)) {
    if (p.prefix == 0) return;
    weights_ = scratch.take(l.lines * ld_), first_ = scratch.take(p.prefix);
    gradients_ = scratch.take(l.lines * ld_), first_gradients_ = scratch.take(p.prefix);
    query_ = scratch.take(l.dim_padded), out_ = scratch.take(l.value_padded), own_ = scratch.take(ld_);
    sums_ = scratch.take((p.dim > p.value_dim ? p.dim : p.value_dim) * W);
    for (int64_t c = 0; c < ld_; ++c) own_[c] = c < l.places && p.axes[2].owner[c] >= 0 ? 0.0f : -kInf;
  }

  // The output of prefix query `n`.
  void attend(int64_t batch, int64_t head, int64_t n) {
    const NeighborhoodProblem& p = problem_;
    const float inverse = weigh(batch, head, n);
    collect(weights_, first_, keys_.values, keys_.prefix_values, p.value_dim, out_);
    const Tensor4& out = p.output;
    store_row(const_cast<char*>(at(out, batch, head, n)), out.stride[3], out.dtype, p.value_dim, inverse, out_);
  }

  // The gradient of prefix query `n`, and what it adds to those of the keys.
  void differentiate(const NeighborhoodGradients& g, int64_t batch, int64_t head, int64_t n, HeadSums& sums) {
    const NeighborhoodProblem& p = problem_;
    const Layout& l = layout_;
    const Vec::F inverse = Vec::set1(weigh(batch, head, n)), zero = Vec::zero();
    load_row(at(g.grad_output, batch, head, n), g.grad_output.stride[3], g.grad_output.dtype, p.value_dim, 1.0f, out_);
    double mean = 0.0;
    const auto divide = [&](float* weight, const float* gradient) {
      const Vec::F w = Vec::load(weight);
      const Vec::F share = Vec::select(Vec::gt(w, zero), Vec::mul(w, inverse), zero);
      Vec::store(weight, share);
      return Vec::select(Vec::gt(w, zero), Vec::mul(share, Vec::load(gradient)), zero);
    };
    by_lines([&](int64_t line) {
      Vec::F of_line = Vec::zero();
      for (int64_t c = 0; c < l.places; c += W) {
        Vec::F sum = Vec::zero();
        for (int64_t d = 0; d < p.value_dim; ++d)
          sum = Vec::fma(Vec::set1(out_[d]), Vec::load(keys_.values + line * l.value_size + d * l.ld + c), sum);
        Vec::store(gradients_ + line * ld_ + c, sum);
        of_line = Vec::add(of_line, divide(weights_ + line * ld_ + c, gradients_ + line * ld_ + c));
      }
      mean += Vec::sum(of_line);
    });
    const float one = Vec::largest(inverse);
    for (int64_t i = 0; i < p.prefix; ++i) {
      first_gradients_[i] = 0.0f;
      for (int64_t d = 0; d < p.value_dim; ++d) first_gradients_[i] += out_[d] * keys_.prefix_values[i * p.value_dim + d];
      if (first_[i] > 0.0f) mean += (first_[i] *= one) * first_gradients_[i];
    }
    const Vec::F average = Vec::set1(static_cast<float>(mean));
    by_lines([&](int64_t line) {
      for (int64_t c = 0; c < l.places; c += W) {
        const Vec::F w = Vec::load(weights_ + line * ld_ + c), dp = Vec::load(gradients_ + line * ld_ + c);
        Vec::store(gradients_ + line * ld_ + c,
                   Vec::select(Vec::eq(w, zero), zero, Vec::mul(w, Vec::sub(dp, average))));
      }
    });
    for (int64_t i = 0; i < p.prefix; ++i)
      first_gradients_[i] = first_[i] == 0.0f ? 0.0f : first_[i] * (first_gradients_[i] - static_cast<float>(mean));
    spread(gradients_, first_gradients_, query_, p.dim, sums.keys, sums.prefix_keys);
    spread(weights_, first_, out_, p.value_dim, sums.values, sums.prefix_values);
    collect(gradients_, first_gradients_, keys_.keys, keys_.prefix_keys, p.dim, query_);
    const Tensor4& gq = g.grad_query;
    store_row(const_cast<char*>(at(gq, batch, head, n)), gq.stride[3], gq.dtype, p.dim, p.scale, query_);
  }

 private:
  bool is_own(int64_t line) const {
    const WindowAxis *z = problem_.axes, *y = z + 1;
    return z->owner[line / y->places] >= 0 && y->owner[line % y->places] >= 0;
  }
  template <class F>
  void by_lines(const F& f) const {
    for (int64_t line = 0; line < layout_.lines; ++line)
      if (is_own(line)) f(line);
  }

  // Weights of all keys before they are divided by their sum; one over it, NaN for a broken row, 0 if it sees nothing.
  float weigh(int64_t batch, int64_t head, int64_t n) {
    const NeighborhoodProblem& p = problem_;
    const Layout& l = layout_;
    load_row(at(p.query, batch, head, n), p.query.stride[3], p.query.dtype, p.dim, p.scale, query_);
    Vec::F most = Vec::set1(-kInf), sound = Vec::set1(1.0f);
    const auto see = [&](Vec::F x) {
      most = Vec::max(x, most);
      sound = Vec::select(Vec::ge(Vec::set1(-kLowest), x), sound, Vec::zero());
    };
    by_lines([&](int64_t line) {
      for (int64_t c = 0; c < l.places; c += W) {
        Vec::F sum = Vec::zero();
        for (int64_t d = 0; d < p.dim; ++d)
          sum = Vec::fma(Vec::set1(query_[d]), Vec::load(keys_.keys + line * l.key_size + d * l.ld + c), sum);
        if (keys_.shown) sum = Vec::add(sum, Vec::load(keys_.shown + line * l.ld + c));
        // Lanes that are no keys may hold anything.
        const Vec::F own = Vec::load(own_ + c);
        const Vec::F x = Vec::select(Vec::ge(own, Vec::zero()), sum, own);
        see(x);
        Vec::store(weights_ + line * ld_ + c, x);
      }
    });
    for (int64_t i = 0; i < p.prefix; ++i) {
      float sum = keys_.prefix_shown[i];
      for (int64_t d = 0; d < p.dim; ++d) sum += query_[d] * keys_.prefix_keys[i * p.dim + d];
      first_[i] = sum;
      see(Vec::set1(sum));
    }
    const float top = Vec::largest(most);
    const Vec::F shift = Vec::set1(top > -kInf ? top : 0.0f);
    double total = 0.0;
    by_lines([&](int64_t line) {
      Vec::F sum = Vec::zero();
      for (int64_t c = 0; c < l.places; c += W) {
        float* s = weights_ + line * ld_ + c;
        const Vec::F weight = weight_of(Vec::load(s), shift);
        sum = Vec::add(sum, weight);
        Vec::store(s, weight);
      }
      total += Vec::sum(sum);
    });
    for (int64_t i = 0; i < p.prefix; ++i) {
      first_[i] = Vec::largest(weight_of(Vec::set1(first_[i]), shift));
      total += first_[i];
    }
    if (!(Vec::smallest(sound) > 0.0f)) return kNaN;
    return total > 0.0 ? static_cast<float>(1.0 / total) : 0.0f;
  }

  // Adds to the row of each key its factor times `row`.
  void spread(const float* factors, const float* first, const float* row, int64_t dim, float* rows, float* prefix_rows) const {
    const Layout& l = layout_;
    by_lines([&](int64_t line) {
      for (int64_t d = 0; d < dim; ++d) {
        float* target = rows + (line * dim + d) * l.ld;
        const float* factor = factors + line * ld_;
        for (int64_t c = 0; c < l.places; ++c) target[c] += factor[c] * row[d];
      }
    });
    for (int64_t i = 0; i < problem_.prefix; ++i)
      for (int64_t d = 0; d < dim; ++d) prefix_rows[(i * dim + d) * W] += first[i] * row[d];
  }

  // out[c] = sum over all keys of their factor times channel c of their row.
  void collect(const float* factors, const float* first, const float* rows, const float* prefix_rows, int64_t dim, float* out) {
    const Layout& l = layout_;
    for (int64_t c = 0; c < dim; ++c) Vec::store(sums_ + c * W, Vec::zero());
    by_lines([&](int64_t line) {
      for (int64_t c = 0; c < dim; ++c) {
        const float* row = rows + (line * dim + c) * l.ld;
        Vec::F sum = Vec::load(sums_ + c * W);
        int64_t m = 0;
        for (; m + W <= l.places; m += W) sum = Vec::fma(Vec::load(factors + line * ld_ + m), Vec::load(row + m), sum);
        if (m < l.places) {
          const Vec::F inside = Vec::load(own_ + m);  // beyond the last place stands another channel
          const Vec::F x = Vec::select(Vec::ge(inside, Vec::zero()), Vec::load(row + m), Vec::zero());
          sum = Vec::fma(Vec::load(factors + line * ld_ + m), x, sum);
        }
        Vec::store(sums_ + c * W, sum);
      }
    });
    for (int64_t c = 0; c < dim; ++c) {
      out[c] = Vec::sum(Vec::load(sums_ + c * W));
      for (int64_t i = 0; i < problem_.prefix; ++i) out[c] += first[i] * prefix_rows[i * dim + c];
    }
  }

  const NeighborhoodProblem& problem_;
  const Layout& layout_;
  const Keys& keys_;
  const int64_t ld_;  // of weights: whole vectors
  float *weights_ = nullptr, *first_ = nullptr, *gradients_ = nullptr, *first_gradients_ = nullptr;
  float *query_ = nullptr, *out_ = nullptr, *own_ = nullptr, *sums_ = nullptr;
};
