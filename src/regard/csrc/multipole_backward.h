// Multipole attention, backward. A tile of query rows resolves the clusters that the forward resolved, since the same code
// sees the same logits; its weights are computed again, twice over the near keys: for sum p dp, then for the gradients.
// Included inside an instruction set's namespace, after multipole_forward.h.
#pragma once

// Adds factor[r][i] * row r to target row i, for MR / 2 rows and NV vectors of channels.
template <int NV>
static REGARD_INLINE void spread(
    const float* factors, int64_t ldf, const float* const* rows, int64_t n, float* target, int64_t ld, int64_t c) {
  constexpr int R = MR / 2;
  Vec::F x[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) x[r][i] = Vec::load(rows[r] + c + i * W);
  for (int64_t m = 0; m < n; ++m) {
    float* out = target + m * ld + c;
    Vec::F sum[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) sum[i] = Vec::load(out + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec::F f = Vec::set1(factors[r * ldf + m]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sum[i] = Vec::fma(f, x[r][i], sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) Vec::store(out + i * W, sum[i]);
  }
}

// What the backward needs of one key head beside its clusters: keys and far keys as rows, values as panels.
struct BackwardMemory {
  float *keys, *value_panels, *far_keys, *far_variances, *far_value_panels, *zeros;

  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return z.columns * (z.dim_padded + p.value_dim) + z.clusters_padded * (2 * z.dim_padded + p.value_dim) + z.dim_padded +
           z.value_padded + 16 * 6;
  }
  BackwardMemory(const MultipoleProblem& p, const Sizes& z, Scratch& scratch)
      : keys(scratch.take(z.columns * z.dim_padded)), value_panels(scratch.take(z.columns * p.value_dim)),
        far_keys(scratch.take(z.clusters_padded * z.dim_padded)), far_variances(scratch.take(z.clusters_padded * z.dim_padded)),
        far_value_panels(scratch.take(z.clusters_padded * p.value_dim)),
        zeros(scratch.take(z.dim_padded + z.value_padded)) {
    __builtin_memset(zeros, 0, (z.dim_padded + z.value_padded) * sizeof(float));
  }

  void load(const MultipoleProblem& p, const Sizes& z, const Clusters& clusters) {
    const int64_t columns = clusters.begin[p.clusters + 1];
    __builtin_memset(keys, 0, columns * z.dim_padded * sizeof(float));
    for (int64_t m = 0; m < columns; ++m) {
      for (int64_t d = 0; d < p.dim; ++d) keys[m * z.dim_padded + d] = clusters.panels[(m / W * p.dim + d) * W + m % W];
      for (int64_t d = 0; d < p.value_dim; ++d)
        value_panels[(m / W * p.value_dim + d) * W + m % W] = clusters.values[m * z.value_padded + d];
    }
    __builtin_memset(far_keys, 0, z.clusters_padded * z.dim_padded * sizeof(float));
    __builtin_memset(far_variances, 0, z.clusters_padded * z.dim_padded * sizeof(float));
    for (int64_t c = 0; c < z.clusters_padded; ++c) {
      const float* moments = clusters.far_panels + c / NR * NR * z.far_dim + c % NR;
      for (int64_t d = 0; d < p.dim; ++d) {
        far_keys[c * z.dim_padded + d] = moments[d * NR];
        if (p.second_order) far_variances[c * z.dim_padded + d] = moments[(p.dim + d) * NR];
      }
      for (int64_t d = 0; d < p.value_dim; ++d)
        far_value_panels[(c / NR * p.value_dim + d) * NR + c % NR] = clusters.far_values[c * z.value_padded + d];
    }
  }
};

// Gradients of a key head: of its keys and values in the clusters' order, and of the clusters' moments. Short sums, and
// the sum of those: a key that thousands of queries see would lose digits in one long chain.
class HeadSums {
 public:
  static int64_t size(const MultipoleProblem&, const Sizes& z) {
    return (z.columns + z.clusters_padded) * (z.dim_padded + z.value_padded) + z.clusters_padded * z.dim_padded;
  }
  static int64_t floats(const MultipoleProblem& p, const Sizes& z) { return 2 * (size(p, z) + 16); }

  HeadSums(const MultipoleProblem& p, const Sizes& z, Scratch& scratch)
      : size_(size(p, z)), sums_(scratch.take(size_)), totals_(scratch.take(size_)) {
    now = parts(z, sums_);
  }
  // Where the parts stand, in `from`.
  struct Parts {
    float *keys, *values, *far_keys, *far_variances, *far_values;
  };
  static Parts parts(const Sizes& z, float* from) {
    Parts at;
    at.keys = from;
    at.values = at.keys + z.columns * z.dim_padded;
    at.far_keys = at.values + z.columns * z.value_padded;
    at.far_variances = at.far_keys + z.clusters_padded * z.dim_padded;
    at.far_values = at.far_variances + z.clusters_padded * z.dim_padded;
    return at;
  }
  void clear() {
    __builtin_memset(sums_, 0, size_ * sizeof(float));
    __builtin_memset(totals_, 0, size_ * sizeof(float));
  }
  // Ends a run of rows.
  float* flush() {
    for (int64_t i = 0; i < size_; i += W) {
      Vec::store(totals_ + i, Vec::add(Vec::load(totals_ + i), Vec::load(sums_ + i)));
      Vec::store(sums_ + i, Vec::zero());
    }
    return totals_;
  }
  Parts now;

 private:
  const int64_t size_;
  float *sums_, *totals_;
};

class BackwardTile {
 public:
  static constexpr int64_t kCapacity = 1 << 20;  // floats of near logits that a tile may hold

  // How many query rows fit, if a row resolves `columns` keys.
  static int64_t rows_for(int64_t columns) {
    const int64_t fit = kCapacity / (columns > 0 ? columns : 1);
    return fit < MR ? MR : fit > kTile ? kTile : fit;
  }
  static int64_t near_floats(const Sizes& z) { return kCapacity + (MR + W) * z.columns; }

  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return Rows::floats(p, z) + (kTile + 1) * z.value_padded + RowSums::floats(z.dim_padded) + 5 * kTile + 2 * near_floats(z) +
           2 * (kTile + Rows::kFar) * (z.clusters_padded + 16) + Rows::kFar * p.value_dim + z.dim_padded + 16 * 12;
  }

  BackwardTile(const MultipoleProblem& p, const AttentionGradients& g, const Sizes& z, const Clusters& clusters,
               const BackwardMemory& memory, HeadSums& sums, Scratch& scratch)
      : problem_(p), grads_(g), sizes_(z), clusters_(clusters), memory_(memory), sums_(sums), rows_(p, z, clusters, scratch),
        grad_output_(scratch.take((kTile + 1) * z.value_padded)), grad_query_(z.dim_padded, scratch),
        total_(reinterpret_cast<double*>(scratch.take(2 * kTile))), mean_(reinterpret_cast<double*>(scratch.take(2 * kTile))),
        inverse_(scratch.take(kTile)),
        weights_(scratch.take(near_floats(z))), gradients_(scratch.take(near_floats(z))), far_ld_(z.clusters_padded + 16),
        far_(scratch.take((kTile + Rows::kFar) * far_ld_)), far_gradients_(scratch.take((kTile + Rows::kFar) * far_ld_)),
        far_channels_(scratch.take(Rows::kFar * p.value_dim)) {}

  void run(int64_t batch, int64_t head, int64_t first, int64_t count) {
    load(batch, head, first, count);
    const int64_t far = problem_.clusters > 0 ? sizes_.clusters_padded : 0;
    if (far)
      for (int64_t r = 0; r < count; r += Rows::kFar) look_far(first, r, smaller(Rows::kFar, count - r));
    rows_.sort_pairs(count);
    near([&](int64_t c, const int32_t* rows, int64_t here, float* s, float* dp, int64_t ld) { look_near(c, rows, here, s, dp, ld); });
    for (int64_t r = 0; r < count; ++r) add_up(r, far_ + r * far_ld_, far_gradients_ + r * far_ld_, far);
    near([&](int64_t, const int32_t* rows, int64_t here, float* s, float* dp, int64_t ld) {
      for (int64_t j = 0; j < here; ++j) add_up(rows[j], s + j * ld, dp + j * ld, ld);
    });
    for (int64_t r = 0; r < count; ++r) {
      inverse_[r] = rows_.broken[r] ? kNaN : total_[r] > 0.0 ? static_cast<float>(1.0 / total_[r]) : 0.0f;
      if (total_[r] > 0.0) mean_[r] /= total_[r];
    }
    if (far) far_field(count);
    near([&](int64_t c, const int32_t* rows, int64_t here, float* s, float* dp, int64_t ld) {
      grad_query_.at_cluster(c);
      near_field(c, rows, here, s, dp, ld);
    });
    grad_query_.flush();
    const Tensor4& gq = grads_.grad_query;
    for (int64_t r = 0; r < count; ++r)
      store_row(const_cast<char*>(at(gq, batch, head, first + r)), gq.stride[3], gq.dtype, problem_.dim, problem_.scale,
                grad_query_.total(r));
  }

 private:
  // Calls f with each group of rows and its block of near logits.
  template <class F>
  void near(const F& f) {
    int64_t used = 0;
    rows_.by_cluster([&](int64_t c, const int32_t* rows, int64_t here) {
      const int64_t ld = round_up(clusters_.count[c], W);
      f(c, rows, here, weights_ + used, gradients_ + used, ld);
      used += here * ld;
    });
  }

  void load(int64_t batch, int64_t head, int64_t first, int64_t count) {
    rows_.load(batch, head, first, count);
    const Tensor4& go = grads_.grad_output;
    for (int64_t r = 0; r < count; ++r)
      load_row(at(go, batch, head, first + r), go.stride[3], go.dtype, problem_.value_dim, 1.0f,
               grad_output_ + r * sizes_.value_padded);
    grad_query_.clear(count);
    for (int64_t r = 0; r < count; ++r) total_[r] = mean_[r] = 0.0;
  }

  // Logits of the far clusters, and the gradients of their weights.
  void look_far(int64_t first, int64_t r, int64_t count) {
    rows_.look_far(first, r, count, far_ + r * far_ld_, far_ld_);
    const int64_t dim = problem_.value_dim;
    for (int64_t i = 0; i < Rows::kFar; ++i) {
      const float* row = grad_output_ + (r + smaller(i, count - 1)) * sizes_.value_padded;
      float* channels = far_channels_ + i / MR * MR * dim + i % MR;
      for (int64_t d = 0; d < dim; ++d) channels[d * MR] = row[d];
    }
    score_tile(far_channels_, (count + MR - 1) / MR, memory_.far_value_panels, sizes_.clusters_padded, dim,
               far_gradients_ + r * far_ld_, far_ld_);
  }

  // Rows to compute with: a group's, the last one repeated up to MR.
  void point(const int32_t* rows, int64_t count, float* base, int64_t ld, float** out) const {
    for (int64_t j = 0; j < MR; ++j) out[j] = base + rows[smaller(j, count - 1)] * ld;
  }

  // Logits of near keys, and the gradients of their weights. A block holds `count` rows; what is computed beyond them is
  // overwritten by the next block.
  void look_near(int64_t c, const int32_t* rows, int64_t count, float* s, float* dp, int64_t ld) {
    const int64_t first = clusters_.begin[c];
    float* at[MR];
    point(rows, count, rows_.queries, sizes_.dim_padded, at);
    score_cluster(at, clusters_.panels + first * problem_.dim, ld, problem_.dim, s, ld);
    point(rows, count, grad_output_, sizes_.value_padded, at);
    score_cluster(at, memory_.value_panels + first * problem_.value_dim, ld, problem_.value_dim, dp, ld);
    for (int64_t j = 0; j < count; ++j) rows_.raise(rows[j], s + j * ld, clusters_.count[c]);
  }

  // Logits to weights before division by their sum; adds to that sum, and to sum p dp.
  void add_up(int64_t r, float* s, const float* dp, int64_t n) {
    total_[r] += weigh(s, n, rows_.largest[r]);
    for (int64_t run = 0; run < n; run += kRun) {
      Vec::F sum = Vec::zero();
      for (int64_t i = run; i < smaller(n, run + kRun); i += W) sum = Vec::fma(Vec::load(s + i), Vec::load(dp + i), sum);
      mean_[r] += Vec::sum(sum);
    }
  }

  // Weights and gradients of logits, in place.
  void finish(int64_t r, float* s, float* dp, int64_t n) const {
    const Vec::F inverse = Vec::set1(inverse_[r]), mean = Vec::set1(static_cast<float>(mean_[r]));
    for (int64_t i = 0; i < n; i += W) {
      const Vec::F p = Vec::mul(Vec::load(s + i), inverse);
      Vec::store(s + i, p);
      Vec::store(dp + i, Vec::mul(p, Vec::sub(Vec::load(dp + i), mean)));
    }
  }

  void near_field(int64_t c, const int32_t* rows, int64_t count, float* s, float* dp, int64_t ld) {
    const int64_t keys = clusters_.count[c], first = clusters_.begin[c];
    for (int64_t j = 0; j < count; ++j) finish(rows[j], s + j * ld, dp + j * ld, ld);
    float *q[MR], *go[MR], *gq[MR], ones[MR];
    point(rows, count, rows_.queries, sizes_.dim_padded, q);
    point(rows, count, grad_output_, sizes_.value_padded, go);
    for (int64_t j = 0; j < MR; ++j) {
      ones[j] = 1.0f;
      gq[j] = grad_query_.row(j < count ? rows[j] : kTile);
    }
    const int64_t whole = count / (MR / 2) * (MR / 2);
    by_channels(sizes_.value_padded, [&](auto nv, int64_t channel) {
      float* target = sums_.now.values + first * sizes_.value_padded;
      for (int64_t j = 0; j < whole; j += MR / 2)
        spread<nv()>(s + j * ld, ld, go + j, keys, target, sizes_.value_padded, channel);
      for (int64_t j = whole; j < count; ++j) spread_one<nv()>(s + j * ld, go[j], keys, target, sizes_.value_padded, channel);
    });
    by_channels(sizes_.dim_padded, [&](auto nv, int64_t channel) {
      float* target = sums_.now.keys + first * sizes_.dim_padded;
      for (int64_t j = 0; j < whole; j += MR / 2)
        spread<nv()>(dp + j * ld, ld, q + j, keys, target, sizes_.dim_padded, channel);
      for (int64_t j = whole; j < count; ++j) spread_one<nv()>(dp + j * ld, q[j], keys, target, sizes_.dim_padded, channel);
      for (int64_t j = 0; j < count; j += MR / 2)
        for (int64_t m = 0; m < keys; m += kRun)
          blend<nv()>(dp + j * ld + m, ld, memory_.keys + (first + m) * sizes_.dim_padded, sizes_.dim_padded,
                      smaller(kRun, keys - m), ones + j, gq + j, channel);
    });
  }

  template <int NV>
  static void spread_one(const float* factors, const float* row, int64_t n, float* target, int64_t ld, int64_t c) {
    for (int64_t m = 0; m < n; ++m) {
      const Vec::F f = Vec::set1(factors[m]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        float* out = target + m * ld + c + i * W;
        Vec::store(out, Vec::fma(f, Vec::load(row + c + i * W), Vec::load(out)));
      }
    }
  }

  // All clusters, as near_field for keys: a weight of zero stands where a row resolves a cluster.
  void far_field(int64_t count) {
    const int64_t n = sizes_.clusters_padded, clusters = problem_.clusters, ld = sizes_.dim_padded, ldv = sizes_.value_padded;
    for (int64_t r = 0; r < count; ++r) {
      if (rows_.broken[r]) {  // every cluster that it saw gets NaN
        for (int64_t c = 0; c < clusters; ++c)
          far_[r * far_ld_ + c] = far_gradients_[r * far_ld_ + c] = clusters_.count[c] > 0 ? kNaN : 0.0f;
        for (int64_t d = 0; d < problem_.dim; ++d) grad_query_.row(r)[d] = kNaN;
      } else {
        finish(r, far_ + r * far_ld_, far_gradients_ + r * far_ld_, n);
      }
    }
    for (int64_t r = 0; r < count; r += MR / 2) {
      const int64_t here = smaller(MR / 2, count - r);
      const float *s = far_ + r * far_ld_, *ds = far_gradients_ + r * far_ld_;
      float *q[MR / 2], *go[MR / 2];
      for (int64_t j = 0; j < here; ++j) q[j] = rows_.queries + (r + j) * ld, go[j] = grad_output_ + (r + j) * ldv;
      by_channels(ldv, [&](auto nv, int64_t c) { add_outer<nv()>(s, go, here, clusters, sums_.now.far_values + c, ldv, c); });
      by_channels(ld, [&](auto nv, int64_t c) {
        add_outer<nv()>(ds, q, here, clusters, sums_.now.far_keys + c, ld, c);
        for (int64_t j = 0; j < here; ++j)
          gather_all<nv()>(ds + j * far_ld_, clusters, memory_.far_keys + c, ld, grad_query_.row(r + j) + c, nullptr);
        if (!problem_.second_order) return;
        float half_squares[MR / 2][nv() * W], *squares[MR / 2];
        for (int64_t j = 0; j < here; ++j) {
          gather_all<nv()>(ds + j * far_ld_, clusters, memory_.far_variances + c, ld, grad_query_.row(r + j) + c, q[j] + c);
          for (int64_t d = 0; d < nv() * W; ++d) half_squares[j][d] = 0.5f * q[j][c + d] * q[j][c + d];
          squares[j] = half_squares[j];
        }
        add_outer<nv()>(ds, squares, here, clusters, sums_.now.far_variances + c, ld, 0);
      });
    }
  }

  // Adds factor * row to every far target, for up to MR / 2 rows at a time; `c` is the rows' first channel.
  template <int NV>
  void add_outer(const float* factors, float* const* rows, int64_t here, int64_t n, float* target, int64_t ld, int64_t c) const {
    if (here == MR / 2) {
      const float* from[MR / 2];
      for (int64_t j = 0; j < here; ++j) from[j] = rows[j] + c;
      spread<NV>(factors, far_ld_, from, n, target, ld, 0);
    } else {
      for (int64_t j = 0; j < here; ++j) spread_one<NV>(factors + j * far_ld_, rows[j] + c, n, target, ld, 0);
    }
  }

  // out += weighted sum of n rows, times `factors` where they are given.
  template <int NV>
  static void gather_all(const float* p, int64_t n, const float* rows, int64_t ld, float* out, const float* factors) {
    if (n > kRun) {
      gather_all<NV>(p, kRun, rows, ld, out, factors);
      return gather_all<NV>(p + kRun, n - kRun, rows + kRun * ld, ld, out, factors);
    }
    Vec::F even[NV], odd[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) even[i] = odd[i] = Vec::zero();
    int64_t m = 0;
    for (; m + 2 <= n; m += 2) {
      const Vec::F x = Vec::set1(p[m]), y = Vec::set1(p[m + 1]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        even[i] = Vec::fma(x, Vec::load(rows + m * ld + i * W), even[i]);
        odd[i] = Vec::fma(y, Vec::load(rows + (m + 1) * ld + i * W), odd[i]);
      }
    }
    if (m < n) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) even[i] = Vec::fma(Vec::set1(p[m]), Vec::load(rows + m * ld + i * W), even[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const Vec::F sum = Vec::add(even[i], odd[i]);
      const Vec::F added = factors ? Vec::mul(sum, Vec::load(factors + i * W)) : sum;
      Vec::store(out + i * W, Vec::add(Vec::load(out + i * W), added));
    }
  }

  const MultipoleProblem& problem_;
  const AttentionGradients& grads_;
  const Sizes& sizes_;
  const Clusters& clusters_;
  const BackwardMemory& memory_;
  HeadSums& sums_;
  Rows rows_;
  float* grad_output_;
  RowSums grad_query_;
  double *total_, *mean_;
  float *inverse_, *weights_, *gradients_;
  const int64_t far_ld_;
  float *far_, *far_gradients_, *far_channels_;
};

// Hands the moments' gradients on to keys and values, and writes those out. Hidden keys get zeros.
static void store_head(const MultipoleProblem& p, const AttentionGradients& g, const Sizes& z, const Clusters& clusters,
                       const BackwardMemory& memory, const Unit& u, float* sums) {
  const HeadSums::Parts at_sums = HeadSums::parts(z, sums);
  const Tensor4 &gk = g.grad_key, &gv = g.grad_value;
  const auto key_row = [&](int64_t m) { return const_cast<char*>(at(gk, u.batch, u.key_head, m)); };
  const auto value_row = [&](int64_t m) { return const_cast<char*>(at(gv, u.batch, u.key_head, m)); };
  if (p.visible != nullptr) {
    const char* seen = p.visible + u.batch * p.visible_stride[0] + u.key_head * p.visible_stride[1];
    for (int64_t m = 0; m < p.keys; ++m)
      if (!seen[m * p.visible_stride[2]]) {
        store_row(key_row(m), gk.stride[3], gk.dtype, p.dim, 1.0f, memory.zeros);
        store_row(value_row(m), gv.stride[3], gv.dtype, p.value_dim, 1.0f, memory.zeros);
      }
  }
  for (int64_t c = 0; c <= p.clusters; ++c) {
    const float share = clusters.count[c] > 0 ? 1.0f / clusters.count[c] : 0.0f;
    for (int64_t i = clusters.begin[c]; i < clusters.begin[c] + clusters.count[c]; ++i) {
      float *key = at_sums.keys + i * z.dim_padded, *value = at_sums.values + i * z.value_padded;
      if (c < p.clusters) {
        const float *own = memory.keys + i * z.dim_padded, *mean = memory.far_keys + c * z.dim_padded;
        const float *from_mean = at_sums.far_keys + c * z.dim_padded, *from_variance = at_sums.far_variances + c * z.dim_padded;
        for (int64_t d = 0; d < p.dim; ++d)
          key[d] += share * (from_mean[d] + (p.second_order ? 2.0f * from_variance[d] * (own[d] - mean[d]) : 0.0f));
        const float* from_value = at_sums.far_values + c * z.value_padded;
        for (int64_t d = 0; d < p.value_dim; ++d) value[d] += share * from_value[d];
      }
      store_row(key_row(clusters.order[i]), gk.stride[3], gk.dtype, p.dim, 1.0f, key);
      store_row(value_row(clusters.order[i]), gv.stride[3], gv.dtype, p.value_dim, 1.0f, value);
    }
  }
}

static int64_t partial_size(const MultipoleProblem& p) { return HeadSums::size(p, Sizes(p)); }

static void backward(
    const MultipoleProblem& p, const AttentionGradients& g, const Unit* units, int64_t count, float* partial) {
  constexpr int64_t kRows = 1024;  // in a short sum
  const Sizes z(p);
  Scratch scratch(Clusters::floats(p, z) + BackwardMemory::floats(p, z) + HeadSums::floats(p, z) + BackwardTile::floats(p, z));
  Clusters clusters(p, z, scratch);
  BackwardMemory memory(p, z, scratch);
  HeadSums sums(p, z, scratch);
  BackwardTile tile(p, g, z, clusters, memory, sums, scratch);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    clusters.load(u->batch, u->key_head);
    memory.load(p, z, clusters);
    sums.clear();
    const int64_t prefix_rows = BackwardTile::rows_for(clusters.begin[p.clusters + 1]);
    const int64_t rows = BackwardTile::rows_for(clusters.most_columns());
    int64_t run = 0;
    for (int64_t head = 0; head < group; ++head)
      for (int64_t n = u->row_begin; n < u->row_end;) {
        const bool is_prefix = n < p.prefix;
        const int64_t stop = is_prefix ? smaller(p.prefix, u->row_end) : u->row_end;
        const int64_t here = smaller(is_prefix ? prefix_rows : rows, stop - n);
        tile.run(u->batch, u->key_head * group + head, n, here);
        n += here;
        if ((run += here) >= kRows) {
          sums.flush();
          run = 0;
        }
      }
    float* totals = sums.flush();
    if (partial == nullptr) {
      store_head(p, g, z, clusters, memory, *u, totals);
    } else {
      const int64_t size = partial_size(p);
      __builtin_memcpy(partial + (u - units) * size, totals, size * sizeof(float));
    }
  }
}

// Adds the partial sums of one key head in the order of its units, so that the result is the same every time.
static void reduce(const MultipoleProblem& p, const AttentionGradients& g, const Unit& unit, float* partial, int64_t parts) {
  const Sizes z(p);
  Scratch scratch(Clusters::floats(p, z) + BackwardMemory::floats(p, z));
  Clusters clusters(p, z, scratch);
  BackwardMemory memory(p, z, scratch);
  clusters.load(unit.batch, unit.key_head);
  memory.load(p, z, clusters);
  const int64_t size = partial_size(p);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
  store_head(p, g, z, clusters, memory, unit, partial);
}
