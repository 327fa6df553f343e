// A tile of query rows of one head, and the clusters that each row resolves.
// Included inside an instruction set's namespace, after multipole_clusters.h.
#pragma once

constexpr int64_t kTile = 256;  // query rows that visit the clusters together

// MR query rows times NP panels of W keys each.
template <int NP>
static REGARD_INLINE void score_panels(const float* const* rows, const float* panels, int64_t dim, float* s, int64_t ld) {
  const float* q[MR];
  Vec::F acc[MR][NP];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    q[r] = rows[r];
#pragma GCC unroll 2
    for (int i = 0; i < NP; ++i) acc[r][i] = Vec::zero();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec::F k[NP];
#pragma GCC unroll 2
    for (int i = 0; i < NP; ++i) k[i] = Vec::load(panels + (i * dim + d) * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec::F x = Vec::set1(q[r][d]);
#pragma GCC unroll 2
      for (int i = 0; i < NP; ++i) acc[r][i] = Vec::fma(x, k[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NP; ++i) Vec::store(s + r * ld + i * W, acc[r][i]);
}

static __attribute__((noinline)) void score_cluster(
    const float* const* rows, const float* panels, int64_t columns, int64_t dim, float* s, int64_t ld) {
  int64_t i = 0;
  for (; i + 2 * W <= columns; i += 2 * W) score_panels<2>(rows, panels + i * dim, dim, s + i, ld);
  if (i < columns) score_panels<1>(rows, panels + i * dim, dim, s + i, ld);
}

// MR / 2 output rows, wherever they stand: factor * row + weights times `n` rows of values, NV vectors of channels.
template <int NV>
static REGARD_INLINE void blend(
    const float* p, int64_t ldp, const float* values, int64_t ld, int64_t n, const float* factors, float* const* rows, int64_t c) {
  constexpr int R = MR / 2;
  Vec::F acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) acc[r][i] = Vec::zero();
  for (int64_t m = 0; m < n; ++m) {
    Vec::F v[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) v[i] = Vec::load(values + m * ld + c + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec::F x = Vec::set1(p[r * ldp + m]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) acc[r][i] = Vec::fma(x, v[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec::F factor = Vec::set1(factors[r]);
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      float* target = rows[r] + c + i * W;
      Vec::store(target, Vec::fma(Vec::load(target), factor, acc[r][i]));
    }
  }
}

static float exp_of(float x) { return Vec::largest(exp_nonpositive(Vec::set1(x))); }

constexpr int64_t kRun = 128;  // terms of a short sum; adding those up rounds less than one long chain

// Logits to weights exp(s - top), in place, zero for -inf; their sum. `n` in whole vectors; top is -inf if all are.
static double weigh(float* s, int64_t n, float top) {
  const Vec::F shift = Vec::set1(top > -kInf ? top : 0.0f);
  double total = 0.0;
  for (int64_t run = 0; run < n; run += kRun) {
    Vec::F sum = Vec::zero();
    for (int64_t i = run; i < smaller(n, run + kRun); i += W) {
      const Vec::F x = Vec::load(s + i);
      const Vec::F weight = Vec::select(Vec::ge(x, Vec::set1(kLowest)), exp_nonpositive(Vec::sub(x, shift)), Vec::zero());
      sum = Vec::add(sum, weight);
      Vec::store(s + i, weight);
    }
    total += Vec::sum(sum);
  }
  return total;
}

// A row for each query of a tile, and one to spare, into which clusters add one after the other: short sums over a few
// clusters, and the sum of those.
class RowSums {
 public:
  static int64_t floats(int64_t width) { return 2 * ((kTile + 1) * width + 16); }
  RowSums(int64_t width, Scratch& scratch)
      : width_(width), now_(scratch.take((kTile + 1) * width)), totals_(scratch.take((kTile + 1) * width)) {}
  void clear(int64_t rows) {
    rows_ = rows, epoch_ = 0;
    __builtin_memset(now_, 0, rows * width_ * sizeof(float));
    __builtin_memset(totals_, 0, rows * width_ * sizeof(float));
  }
  // Cluster `c` comes next.
  void at_cluster(int64_t c) {
    if (c / kClusters == epoch_) return;
    epoch_ = c / kClusters;
    flush();
  }
  void flush() {
    for (int64_t i = 0; i < rows_ * width_; i += W) {
      Vec::store(totals_ + i, Vec::add(Vec::load(totals_ + i), Vec::load(now_ + i)));
      Vec::store(now_ + i, Vec::zero());
    }
  }
  // The short sum of row r; what is computed in vain goes into row kTile.
  float* row(int64_t r) const { return now_ + r * width_; }
  float* total(int64_t r) const { return totals_ + r * width_; }
  // What was flushed of row r, times `factor`.
  void shrink(int64_t r, float factor) {
    const Vec::F f = Vec::set1(factor);
    float* row = total(r);
    for (int64_t i = 0; i < width_; i += W) Vec::store(row + i, Vec::mul(Vec::load(row + i), f));
  }

 private:
  static constexpr int64_t kClusters = 16;
  const int64_t width_;
  float *now_, *totals_;
  int64_t rows_ = 0, epoch_ = 0;
};

// Both directions select with this, and with the same logits bit for bit: the backward needs no record of the selection.
class Rows {
 public:
  static constexpr int64_t kFar = 2 * MR;  // rows whose far logits are computed together
  static constexpr int64_t kFarPadded = (kFar + Vec::kMixRows - 1) / Vec::kMixRows * Vec::kMixRows;

  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return (kTile + 1) * z.dim_padded + 3 * kTile + kFar * z.far_dim + 2 * (kTile + 1) * (p.clusters + W) +
           2 * (p.clusters + 2) + 2 * (z.clusters_padded + W) + 16 * 12;
  }

  Rows(const MultipoleProblem& p, const Sizes& z, const Clusters& clusters, Scratch& scratch)
      : queries(scratch.take((kTile + 1) * z.dim_padded)), largest(scratch.take(kTile)), broken(integers(scratch, kTile)),
        rows_of(integers(scratch, (kTile + 1) * (p.clusters + W))), first_row(integers(scratch, p.clusters + 2)),
        problem_(p), sizes_(z), clusters_(clusters), resolved_(integers(scratch, kTile)),
        far_queries_(scratch.take(kFar * z.far_dim)), near_(integers(scratch, (kTile + 1) * (p.clusters + W))),
        cursor_(integers(scratch, p.clusters + 2)), rank_(scratch.take(z.clusters_padded + W)),
        errors_(scratch.take(z.clusters_padded + W)) {}

  void load(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const Tensor4& q = problem_.query;
    for (int64_t r = 0; r < count; ++r) {
      load_row(at(q, batch, head, first + r), q.stride[3], q.dtype, problem_.dim, problem_.scale,
               queries + r * sizes_.dim_padded);
      largest[r] = -kInf, broken[r] = 0, resolved_[r] = 0;
    }
  }

  // Rows [r, r + count), count <= kFar: which clusters each resolves, and the logits of the others; -inf for a cluster
  // that is resolved or empty. `largest` becomes the largest of those logits.
  void look_far(int64_t first, int64_t r, int64_t count, float* logits, int64_t ld) {
    const int64_t dim = problem_.dim;
    for (int64_t i = 0; i < kFar; ++i) {
      const float* row = queries + (r + smaller(i, count - 1)) * sizes_.dim_padded;
      float* channels = far_queries_ + i / MR * MR * sizes_.far_dim + i % MR;
      for (int64_t d = 0; d < dim; ++d) channels[d * MR] = row[d];
      if (problem_.second_order)
        for (int64_t d = 0; d < dim; ++d) channels[(dim + d) * MR] = 0.5f * row[d] * row[d];
    }
    score_tile(far_queries_, (count + MR - 1) / MR, clusters_.far_panels, sizes_.clusters_padded, sizes_.far_dim, logits, ld);
    for (int64_t i = 0; i < count; ++i) resolve(first + r + i, r + i, logits + i * ld);
  }

  // Turns each row's list of clusters into each cluster's list of rows; all rows resolve the prefix keys.
  void sort_pairs(int64_t count) {
    const int64_t clusters = problem_.clusters, ld = clusters + W;
    for (int64_t c = 0; c <= clusters + 1; ++c) cursor_[c] = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < resolved_[r]; ++i) ++cursor_[near_[r * ld + i]];
    int32_t place = 0;
    for (int64_t c = 0; c <= clusters; ++c) {
      const int32_t here = cursor_[c];
      first_row[c] = cursor_[c] = place;
      place += here;
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < resolved_[r]; ++i) rows_of[cursor_[near_[r * ld + i]]++] = static_cast<int32_t>(r);
    if (clusters_.count[clusters] > 0)
      for (int64_t r = 0; r < count; ++r) rows_of[place++] = static_cast<int32_t>(r);
    first_row[clusters + 1] = place;
  }

  // A row's largest logit, after those of a resolved cluster; the tail up to a whole vector becomes -inf.
  float raise(int64_t r, float* s, int64_t keys) {
    Vec::F most = Vec::set1(-kInf);
    bool numbers = true;
    for (int64_t i = 0; i < keys; i += W) {
      Vec::F x = Vec::load(s + i);
      if (i + W > keys) {
        x = Vec::select(Vec::upto(static_cast<int>(i), static_cast<int>(keys - 1)), x, Vec::set1(-kInf));
        Vec::store(s + i, x);
      }
      numbers &= Vec::bits(Vec::eq(x, x)) == (1u << W) - 1u;
      most = Vec::max(most, x);
    }
    const float here = Vec::largest(most);
    if (here > largest[r]) largest[r] = here;
    if (!numbers || !(largest[r] < kInf)) broken[r] = 1;
    return largest[r];
  }

  // Calls f(cluster, rows, number of rows) for up to MR rows that resolve a cluster, cluster after cluster.
  template <class F>
  void by_cluster(const F& f) const {
    for (int64_t c = 0; c <= problem_.clusters; ++c) {
      if (clusters_.count[c] == 0) continue;
      for (int64_t i = first_row[c]; i < first_row[c + 1]; i += MR) f(c, rows_of + i, smaller(MR, first_row[c + 1] - i));
    }
  }

  float* queries;   // [kTile + 1][dim_padded], scaled
  float* largest;   // a row's largest logit so far
  int32_t* broken;  // a NaN or +inf among its logits
  int32_t* rows_of; // the rows that resolve cluster c are [first_row[c], first_row[c + 1])
  int32_t* first_row;

 private:
  // From a row's logits before the clusters' weights: the list of those that it resolves.
  void resolve(int64_t query, int64_t r, float* s) {
    const MultipoleProblem& p = problem_;
    const int64_t n = sizes_.clusters_padded;
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::add(Vec::load(s + c), Vec::load(clusters_.log_count + c));
      Vec::store(s + c, x);
      Vec::store(rank_ + c, Vec::add(x, Vec::load(clusters_.log_spread + c)));
    }
    const int64_t k = query < p.prefix ? p.clusters : p.near;
    const RowStats stats = row_stats(rank_, p.clusters, clusters_.some_empty);
    int32_t* near = near_ + r * (p.clusters + W);
    int64_t found = 0;
    float tau = kInf;
    int32_t last = static_cast<int32_t>(n);
    if (stats.broken) {
      broken[r] = 1;
    } else if (stats.allowed <= k) {
      tau = kLowest;
    } else if (k > 0) {
      const int64_t ranks = round_up(p.clusters, W);
      const float guess = first_guess(stats, static_cast<double>(k), 0.0f);
      const Cut cut = k <= kFew ? cut_of_few(rank_, ranks, k)
                                : exact_cut(rank_, ranks, stats.allowed, k, guess, kLogisticScale * stats.deviation,
                                            {kLowest, kInf, stats.allowed, 0});
      tau = cut.tau;
      int64_t room = cut.at_least > k ? k - cut.above : 0;
      for (int64_t c = 0; room > 0; ++c)
        if (rank_[c] == tau && --room == 0) last = static_cast<int32_t>(c);
    }
    const bool bounded = p.tolerance < kInf && !stats.broken;
    const float most_error = bounded ? least_error_to_resolve(r, s, tau, last) : kInf;
    float unused[2 * W];
    const Vec::F threshold = Vec::set1(tau);
    Vec::F most = Vec::set1(-kInf);
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::load(s + c), rank = Vec::load(rank_ + c);
      typename Vec::Mask in = chosen(rank, threshold, c, last);
      if (most_error < kInf) in = Vec::either(in, Vec::ge(Vec::load(errors_ + c), Vec::set1(most_error)));
      if (Vec::bits(in)) found += Vec::compress(unused, near + found, rank, static_cast<int>(c), in);
      const Vec::F far = Vec::select(in, Vec::set1(-kInf), x);
      most = Vec::max(most, far);
      Vec::store(s + c, far);
    }
    resolved_[r] = static_cast<int32_t>(found);
    largest[r] = broken[r] ? -kInf : Vec::largest(most);
  }

  typename Vec::Mask chosen(Vec::F rank, Vec::F threshold, int64_t c, int32_t last) const {
    return last < sizes_.clusters_padded ? kept_lanes(rank, threshold, c, last) : Vec::ge(rank, threshold);
  }

  // With a tolerance: a cluster of mass m errs by at most m min(1, x) exp(x), where x = |q| radius. Fills errors_ in some
  // unit, zero for clusters chosen by rank. Those that reach what is returned must not stay far.
  float least_error_to_resolve(int64_t r, const float* s, float tau, int32_t last) {
    const int64_t n = sizes_.clusters_padded;
    const float* row = queries + r * sizes_.dim_padded;
    const float norm = __builtin_sqrtf(dot(row, row, sizes_.dim_padded));
    const Vec::F reach = Vec::set1(norm), log_norm = Vec::set1(__builtin_logf(norm)), none = Vec::set1(-kInf);
    Vec::F top = none, worst = none;
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::load(s + c), far = Vec::fma(reach, Vec::load(clusters_.radius + c), x);
      const Vec::F error = Vec::add(far, Vec::min(Vec::add(log_norm, Vec::load(clusters_.log_radius + c)), Vec::zero()));
      const Vec::F here = Vec::select(chosen(Vec::load(rank_ + c), Vec::set1(tau), c, last), none, error);
      Vec::store(errors_ + c, here);
      top = Vec::max(top, x), worst = Vec::max(worst, here);
    }
    const float largest_mass = Vec::largest(top), largest_error = Vec::largest(worst);
    if (!(largest_error > -kInf)) return kInf;
    Vec::F masses = Vec::zero();
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::load(s + c), error = Vec::load(errors_ + c);
      const Vec::F mass = exp_nonpositive(Vec::sub(x, Vec::set1(largest_mass)));
      masses = Vec::add(masses, Vec::select(Vec::ge(x, Vec::set1(kLowest)), mass, Vec::zero()));
      const Vec::F part = exp_nonpositive(Vec::sub(error, Vec::set1(largest_error)));
      Vec::store(errors_ + c, Vec::select(Vec::ge(error, Vec::set1(kLowest)), part, Vec::zero()));
    }
    const float room = problem_.tolerance * Vec::sum(masses) * __builtin_expf(largest_mass - largest_error);
    const auto sum_upto = [&](float most) {
      Vec::F sum = Vec::zero();
      for (int64_t c = 0; c < n; c += W) {
        const Vec::F error = Vec::load(errors_ + c);
        sum = Vec::add(sum, Vec::select(Vec::ge(Vec::set1(most), error), error, Vec::zero()));
      }
      return Vec::sum(sum);
    };
    if (sum_upto(1.0f) <= room) return kInf;
    // Between errors that may all stay (those up to `low`) and one that may not: halved until they are neighbours.
    uint32_t low = 0, high = 0x3f800000u;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      float most;
      __builtin_memcpy(&most, &middle, sizeof most);
      (sum_upto(most) <= room ? low : high) = middle;
    }
    float least;
    __builtin_memcpy(&least, &high, sizeof least);
    return least;
  }

  const MultipoleProblem& problem_;
  const Sizes& sizes_;
  const Clusters& clusters_;
  int32_t* resolved_;
  float* far_queries_;
  int32_t *near_, *cursor_;
  float* rank_;
  float* errors_;
};
