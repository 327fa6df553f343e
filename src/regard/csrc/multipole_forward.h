// Multipole attention, forward. A tile of query rows takes in the far field first; then cluster after cluster, the rows
// that resolve it, MR at a time, with a running softmax. Included inside an instruction set's namespace.
#pragma once

class ForwardTile {
 public:
  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return Rows::floats(p, z) + RowSums::floats(z.value_padded) + 2 * kTile + Rows::kFarPadded * (z.clusters_padded + 16) +
           MR * (z.columns + 16) + 16 * 4;
  }

  ForwardTile(const MultipoleProblem& p, const Sizes& z, const Clusters& clusters, Scratch& scratch)
      : problem_(p), sizes_(z), clusters_(clusters), rows_(p, z, clusters, scratch),
        sums_(z.value_padded, scratch), total_(reinterpret_cast<double*>(scratch.take(2 * kTile))), far_ld_(z.clusters_padded + 16),
        far_(scratch.take(Rows::kFarPadded * far_ld_)), logits_ld_(z.columns + 16), logits_(scratch.take(MR * logits_ld_)) {}

  void run(int64_t batch, int64_t head, int64_t first, int64_t count) {
    rows_.load(batch, head, first, count);
    sums_.clear(count);
    for (int64_t r = 0; r < count; ++r) total_[r] = 0.0;
    if (problem_.clusters > 0)
      for (int64_t r = 0; r < count; r += Rows::kFar) far_field(first, r, smaller(Rows::kFar, count - r));
    rows_.sort_pairs(count);
    rows_.by_cluster([&](int64_t c, const int32_t* rows, int64_t here) {
      sums_.at_cluster(c);
      near_field(c, rows, here);
    });
    sums_.flush();
    store(batch, head, first, count);
  }

 private:
  void far_field(int64_t first, int64_t r, int64_t count) {
    rows_.look_far(first, r, count, far_, far_ld_);
    for (int64_t i = 0; i < count; ++i) total_[r + i] = weigh(far_ + i * far_ld_, sizes_.clusters_padded, rows_.largest[r + i]);
    const int64_t rows = round_up(count, Vec::kMixRows);
    for (int64_t i = count; i < rows; ++i) __builtin_memset(far_ + i * far_ld_, 0, sizes_.clusters_padded * sizeof(float));
    by_channels(sizes_.value_padded, [&](auto nv, int64_t c) {
      for (int64_t i = 0; i < rows; i += Vec::kMixRows) {
        float out[Vec::kMixRows * nv() * W] = {};
        for (int64_t m = 0; m < problem_.clusters; m += kRun)
          mix<nv()>(far_ + i * far_ld_, far_ld_, clusters_.far_values + c, sizes_.value_padded, m,
                    smaller(problem_.clusters, m + kRun), out, nv() * W);
        for (int64_t j = 0; j < smaller(Vec::kMixRows, count - i); ++j)
          for (int64_t d = 0; d < nv() * W; d += W)
            Vec::store(sums_.row(r + i + j) + c + d, Vec::load(out + j * nv() * W + d));
      }
    });
  }

  void near_field(int64_t c, const int32_t* rows, int64_t count) {
    const int64_t keys = clusters_.count[c], first = clusters_.begin[c];
    const float* q[MR];
    float *out[MR], factors[MR], ones[MR];
    for (int64_t j = 0; j < MR; ++j) {
      ones[j] = 1.0f;
      const int64_t r = rows[smaller(j, count - 1)];
      q[j] = rows_.queries + r * sizes_.dim_padded;
      out[j] = sums_.row(j < count ? r : kTile);
      factors[j] = 0.0f;
    }
    score_cluster(q, clusters_.panels + first * problem_.dim, round_up(keys, W), problem_.dim, logits_, logits_ld_);
    for (int64_t j = 0; j < count; ++j) factors[j] = take_in(rows[j], logits_ + j * logits_ld_, keys);
    const float* values = clusters_.values + first * sizes_.value_padded;
    by_channels(sizes_.value_padded, [&](auto nv, int64_t channel) {
      for (int64_t j = 0; j < count; j += MR / 2)
        for (int64_t m = 0; m < keys; m += kRun)
          blend<nv()>(logits_ + j * logits_ld_ + m, logits_ld_, values + m * sizes_.value_padded, sizes_.value_padded,
                      smaller(kRun, keys - m), m == 0 ? factors + j : ones, out + j, channel);
    });
  }

  // Logits of a resolved cluster to weights, under the row's largest logit so far; the factor by which what came before
  // shrinks.
  float take_in(int64_t r, float* s, int64_t keys) {
    const float before = rows_.largest[r];
    const float top = rows_.raise(r, s, keys);
    const float factor = top == before ? 1.0f : before > -kInf ? exp_of(before - top) : 0.0f;
    total_[r] = total_[r] * factor + weigh(s, round_up(keys, W), top);
    if (factor != 1.0f) sums_.shrink(r, factor);
    return factor;
  }

  void store(int64_t batch, int64_t head, int64_t first, int64_t count) const {
    const Tensor4& out = problem_.output;
    for (int64_t r = 0; r < count; ++r) {
      float* row = sums_.total(r);
      // A row that sees nothing is all zeros and stays so.
      const Vec::F total = Vec::set1(rows_.broken[r] ? kNaN : total_[r] > 0.0 ? static_cast<float>(total_[r]) : 1.0f);
      for (int64_t c = 0; c < sizes_.value_padded; c += W) Vec::store(row + c, Vec::div(Vec::load(row + c), total));
      store_row(const_cast<char*>(at(out, batch, head, first + r)), out.stride[3], out.dtype, problem_.value_dim, 1.0f, row);
    }
  }

  const MultipoleProblem& problem_;
  const Sizes& sizes_;
  const Clusters& clusters_;
  Rows rows_;
  RowSums sums_;
  double* total_;
  const int64_t far_ld_;
  float* far_;
  const int64_t logits_ld_;
  float* logits_;
};

static void forward(const MultipoleProblem& p, const Unit* units, int64_t count) {
  const Sizes z(p);
  Scratch scratch(Clusters::floats(p, z) + ForwardTile::floats(p, z));
  Clusters clusters(p, z, scratch);
  ForwardTile tile(p, z, clusters, scratch);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    clusters.load(u->batch, u->key_head);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t n = u->row_begin; n < u->row_end; n += kTile)
        tile.run(u->batch, u->key_head * group + g, n, smaller(kTile, u->row_end - n));
  }
}
