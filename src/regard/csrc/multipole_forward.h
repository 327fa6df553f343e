// Multipole attention, forward. A tile of query rows takes in the far field first; then cluster after cluster, the rows
// that resolve it, MR at a time, with a running softmax. Included inside an instruction set's namespace.
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

// A tile of query rows of one head, and how far their softmax has come.
class RowTile {
 public:
  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return (kTile + 1) * (z.dim_padded + z.value_padded) + 4 * kTile + kFarRowsPadded * (z.clusters_padded + 16) +
           kFarRows * z.far_dim + 2 * (kTile + 1) * (p.clusters + W) + 2 * (p.clusters + 2) + MR * (z.columns + 16) + 16 * 16;
  }

  RowTile(const MultipoleProblem& p, const Sizes& z, const Clusters& clusters, Scratch& scratch)
      : problem_(p), sizes_(z), clusters_(clusters), queries_(scratch.take((kTile + 1) * z.dim_padded)),
        sums_(scratch.take((kTile + 1) * z.value_padded)), largest_(scratch.take(kTile)), total_(scratch.take(kTile)),
        broken_(integers(scratch, kTile)), resolved_(integers(scratch, kTile)),
        far_ld_(z.clusters_padded + 16), far_(scratch.take(kFarRowsPadded * far_ld_)),
        far_queries_(scratch.take(kFarRows * z.far_dim)), near_(integers(scratch, (kTile + 1) * (p.clusters + W))),
        rows_of_(integers(scratch, (kTile + 1) * (p.clusters + W))), first_row_(integers(scratch, p.clusters + 2)),
        cursor_(integers(scratch, p.clusters + 2)), logits_ld_(z.columns + 16), logits_(scratch.take(MR * logits_ld_)) {}

  void run(int64_t batch, int64_t head, int64_t first, int64_t count) {
    load(batch, head, first, count);
    for (int64_t r = 0; r < count; r += kFarRows) far_field(first, r, smaller(kFarRows, count - r));
    sort_pairs(count);
    for (int64_t c = 0; c < problem_.clusters; ++c)
      near_field(c, rows_of_ + first_row_[c], first_row_[c + 1] - first_row_[c]);
    if (clusters_.count[problem_.clusters] > 0) {
      for (int64_t r = 0; r < count; ++r) rows_of_[r] = static_cast<int32_t>(r);
      near_field(problem_.clusters, rows_of_, count);
    }
    store(batch, head, first, count);
  }

 private:
  static constexpr int64_t kFarRows = 2 * MR;
  static constexpr int64_t kFarRowsPadded = (kFarRows + Vec::kMixRows - 1) / Vec::kMixRows * Vec::kMixRows;

  static int32_t* integers(Scratch& scratch, int64_t n) { return reinterpret_cast<int32_t*>(scratch.take(n)); }

  void load(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const Tensor4& q = problem_.query;
    for (int64_t r = 0; r < count; ++r) {
      load_row(at(q, batch, head, first + r), q.stride[3], q.dtype, problem_.dim, problem_.scale,
               queries_ + r * sizes_.dim_padded);
      largest_[r] = -kInf, total_[r] = 0.0f, broken_[r] = 0, resolved_[r] = 0;
    }
    __builtin_memset(sums_, 0, count * sizes_.value_padded * sizeof(float));
  }

  // Logits of all clusters for rows [r, r + count); which of them each row resolves; the weighted sum of the others.
  void far_field(int64_t first, int64_t r, int64_t count) {
    const MultipoleProblem& p = problem_;
    if (p.clusters == 0) return;
    for (int64_t i = 0; i < kFarRows; ++i) {
      const float* row = queries_ + (r + smaller(i, count - 1)) * sizes_.dim_padded;
      float* channels = far_queries_ + i / MR * MR * sizes_.far_dim + i % MR;
      for (int64_t d = 0; d < p.dim; ++d) channels[d * MR] = row[d];
      if (p.second_order)
        for (int64_t d = 0; d < p.dim; ++d) channels[(p.dim + d) * MR] = 0.5f * row[d] * row[d];
    }
    score_tile(far_queries_, (count + MR - 1) / MR, clusters_.far_panels, sizes_.clusters_padded, sizes_.far_dim, far_, far_ld_);
    for (int64_t i = 0; i < count; ++i) resolve(first + r + i, r + i, far_ + i * far_ld_);
    const int64_t rows = round_up(count, Vec::kMixRows);
    for (int64_t i = count; i < rows; ++i) __builtin_memset(far_ + i * far_ld_, 0, sizes_.clusters_padded * sizeof(float));
    by_channels(sizes_.value_padded, [&](auto nv, int64_t c) {
      for (int64_t i = 0; i < rows; i += Vec::kMixRows) {
        float out[Vec::kMixRows * nv() * W] = {};
        mix<nv()>(far_ + i * far_ld_, far_ld_, clusters_.far_values + c, sizes_.value_padded, 0, p.clusters, out, nv() * W);
        for (int64_t j = 0; j < smaller(Vec::kMixRows, count - i); ++j)
          for (int64_t d = 0; d < nv() * W; d += W)
            Vec::store(sums_ + (r + i + j) * sizes_.value_padded + c + d, Vec::load(out + j * nv() * W + d));
      }
    });
  }

  // From a row's logits of clusters: the list of those that it resolves; the weights of the others, in place.
  void resolve(int64_t query, int64_t r, float* s) {
    const MultipoleProblem& p = problem_;
    const int64_t n = sizes_.clusters_padded;
    for (int64_t c = 0; c < n; c += W) Vec::store(s + c, Vec::add(Vec::load(s + c), Vec::load(clusters_.log_count + c)));
    const int64_t k = query < p.prefix ? p.clusters : p.near;
    const RowStats stats = row_stats(s, p.clusters, clusters_.some_empty);
    int32_t* near = near_ + r * (p.clusters + W);
    int64_t found = 0;
    float tau = kInf;
    int32_t last = static_cast<int32_t>(n);
    if (stats.broken) {
      broken_[r] = 1;
    } else if (stats.allowed <= k) {
      tau = kLowest;
    } else if (k > 0) {
      const Cut cut = exact_cut(s, round_up(p.clusters, W), stats.allowed, k, first_guess(stats, static_cast<double>(k), 0.0f),
                                kLogisticScale * stats.deviation, {kLowest, kInf, stats.allowed, 0});
      tau = cut.tau;
      int64_t room = cut.at_least > k ? k - cut.above : 0;
      for (int64_t c = 0; room > 0; ++c)
        if (s[c] == tau && --room == 0) last = static_cast<int32_t>(c);
    }
    float unused[2 * W];
    const Vec::F threshold = Vec::set1(tau);
    Vec::F largest = Vec::set1(-kInf);
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::load(s + c);
      const typename Vec::Mask in = last < n ? kept_lanes(x, threshold, c, last) : Vec::ge(x, threshold);
      if (Vec::bits(in)) found += Vec::compress(unused, near + found, x, static_cast<int>(c), in);
      const Vec::F far = Vec::select(in, Vec::set1(-kInf), x);
      largest = Vec::max(largest, far);
      Vec::store(s + c, far);
    }
    resolved_[r] = static_cast<int32_t>(found);
    const float top = broken_[r] ? -kInf : Vec::largest(largest);
    Vec::F total = Vec::zero();
    for (int64_t c = 0; c < n; c += W) {
      const Vec::F x = Vec::load(s + c);
      const Vec::F weight = exp_nonpositive(Vec::sub(x, Vec::set1(top > -kInf ? top : 0.0f)));
      const Vec::F kept = top > -kInf ? Vec::select(Vec::ge(x, Vec::set1(kLowest)), weight, Vec::zero()) : Vec::zero();
      total = Vec::add(total, kept);
      Vec::store(s + c, kept);
    }
    largest_[r] = top;
    total_[r] = Vec::sum(total);
  }

  // Turns each row's list of clusters into each cluster's list of rows.
  void sort_pairs(int64_t count) {
    const int64_t clusters = problem_.clusters, ld = clusters + W;
    for (int64_t c = 0; c <= clusters + 1; ++c) cursor_[c] = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < resolved_[r]; ++i) ++cursor_[near_[r * ld + i]];
    int32_t place = 0;
    for (int64_t c = 0; c <= clusters; ++c) {
      const int32_t here = c < clusters ? cursor_[c] : 0;
      first_row_[c] = cursor_[c] = place;
      place += here;
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < resolved_[r]; ++i) rows_of_[cursor_[near_[r * ld + i]]++] = static_cast<int32_t>(r);
  }

  void near_field(int64_t c, const int32_t* rows, int64_t count) {
    const int64_t keys = clusters_.count[c], first = clusters_.begin[c];
    if (keys == 0) return;
    for (int64_t i = 0; i < count; i += MR) {
      const int64_t here = smaller(MR, count - i);
      const float* q[MR];
      float *out[MR], factors[MR];
      for (int64_t j = 0; j < MR; ++j) {
        const int64_t r = rows[i + smaller(j, here - 1)];
        q[j] = queries_ + r * sizes_.dim_padded;
        out[j] = sums_ + (j < here ? r : kTile) * sizes_.value_padded;  // what is computed in vain goes into a spare row
        factors[j] = 0.0f;
      }
      score_cluster(q, clusters_.panels + first * problem_.dim, round_up(keys, W), problem_.dim, logits_, logits_ld_);
      for (int64_t j = 0; j < here; ++j) factors[j] = weigh(rows[i + j], logits_ + j * logits_ld_, keys);
      const float* values = clusters_.values + first * sizes_.value_padded;
      by_channels(sizes_.value_padded, [&](auto nv, int64_t channel) {
        for (int64_t j = 0; j < here; j += MR / 2)
          blend<nv()>(logits_ + j * logits_ld_, logits_ld_, values, sizes_.value_padded, keys, factors + j, out + j, channel);
      });
    }
  }

  // Logits to weights under the row's largest logit so far; the factor by which what came before shrinks.
  float weigh(int64_t r, float* s, int64_t keys) {
    Vec::F largest = Vec::set1(-kInf);
    bool numbers = true;
    for (int64_t i = 0; i < keys; i += W) {
      Vec::F x = Vec::load(s + i);
      if (i + W > keys) {
        x = Vec::select(Vec::upto(static_cast<int>(i), static_cast<int>(keys - 1)), x, Vec::set1(-kInf));
        Vec::store(s + i, x);
      }
      numbers &= Vec::bits(Vec::eq(x, x)) == (1u << W) - 1u;
      largest = Vec::max(largest, x);
    }
    const float before = largest_[r], here = Vec::largest(largest);
    const float top = here > before ? here : before;
    if (!numbers || !(top < kInf)) broken_[r] = 1;
    const float factor = top == before ? 1.0f : before > -kInf ? exp_of(before - top) : 0.0f;
    Vec::F total = Vec::zero();
    for (int64_t i = 0; i < keys; i += W) {
      const Vec::F x = Vec::load(s + i);
      const Vec::F weight = exp_nonpositive(Vec::sub(x, Vec::set1(top)));
      const Vec::F kept = Vec::select(Vec::ge(x, Vec::set1(kLowest)), weight, Vec::zero());
      total = Vec::add(total, kept);
      Vec::store(s + i, kept);
    }
    largest_[r] = top;
    total_[r] = total_[r] * factor + Vec::sum(total);
    return factor;
  }

  void store(int64_t batch, int64_t head, int64_t first, int64_t count) const {
    const Tensor4& out = problem_.output;
    for (int64_t r = 0; r < count; ++r) {
      float* row = sums_ + r * sizes_.value_padded;
      // A row that sees nothing is all zeros and stays so.
      const Vec::F total = Vec::set1(broken_[r] ? kNaN : total_[r] > 0.0f ? total_[r] : 1.0f);
      for (int64_t c = 0; c < sizes_.value_padded; c += W) Vec::store(row + c, Vec::div(Vec::load(row + c), total));
      store_row(const_cast<char*>(at(out, batch, head, first + r)), out.stride[3], out.dtype, problem_.value_dim, 1.0f, row);
    }
  }

  const MultipoleProblem& problem_;
  const Sizes& sizes_;
  const Clusters& clusters_;
  float *queries_, *sums_, *largest_, *total_;
  int32_t *broken_, *resolved_;
  const int64_t far_ld_;
  float *far_, *far_queries_;
  int32_t *near_, *rows_of_, *first_row_, *cursor_;
  const int64_t logits_ld_;
  float* logits_;
};

static void forward(const MultipoleProblem& p, const Unit* units, int64_t count) {
  const Sizes z(p);
  Scratch scratch(Clusters::floats(p, z) + RowTile::floats(p, z));
  Clusters clusters(p, z, scratch);
  RowTile tile(p, z, clusters, scratch);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    clusters.load(u->batch, u->key_head);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t n = u->row_begin; n < u->row_end; n += kTile)
        tile.run(u->batch, u->key_head * group + g, n, smaller(kTile, u->row_end - n));
  }
}
