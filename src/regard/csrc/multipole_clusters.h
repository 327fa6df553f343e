// The keys of one key head, packed by cluster, and what each cluster is from afar.
// Included inside an instruction set's namespace, after rows.h.
#pragma once

static int32_t* integers(Scratch& scratch, int64_t n) { return reinterpret_cast<int32_t*>(scratch.take(n)); }

struct Sizes {
  int64_t dim_padded, value_padded, clusters_padded;
  int64_t far_dim;  // channels of a far key: its mean, and its variance where the far field is of second order
  int64_t columns;  // room for all keys, each cluster beginning at a whole vector

  explicit Sizes(const MultipoleProblem& p)
      : dim_padded(round_up(p.dim, W)), value_padded(round_up(p.value_dim, W)), clusters_padded(round_up(p.clusters, NR)),
        far_dim(p.second_order ? 2 * p.dim : p.dim), columns(round_up(p.keys + (p.clusters + 1) * (W - 1), W)) {}
};

// Hidden keys are left out, as if they were not there. The prefix keys stand as one more cluster after the others, which
// every query resolves.
class Clusters {
 public:
  static int64_t floats(const MultipoleProblem& p, const Sizes& z) {
    return 3 * (p.clusters + 2) + z.columns * (1 + p.dim + z.value_padded) + W * z.dim_padded +
           z.clusters_padded * (4 + z.far_dim + z.value_padded) + z.value_padded + 16 * 15;
  }

  Clusters(const MultipoleProblem& p, const Sizes& z, Scratch& scratch)
      : begin(integers(scratch, p.clusters + 2)), count(integers(scratch, p.clusters + 2)),
        order(integers(scratch, z.columns)), panels(scratch.take(z.columns * p.dim)),
        values(scratch.take(z.columns * z.value_padded)), far_panels(scratch.take(z.clusters_padded * z.far_dim)),
        far_values(scratch.take(z.clusters_padded * z.value_padded)), log_count(scratch.take(z.clusters_padded)),
        log_spread(scratch.take(z.clusters_padded)), radius(scratch.take(z.clusters_padded)),
        log_radius(scratch.take(z.clusters_padded)),
        problem_(p), sizes_(z), cursor_(integers(scratch, p.clusters + 2)), rows_(scratch.take(W * z.dim_padded)),
        sum_(scratch.take(z.value_padded)) {}

  void load(int64_t batch, int64_t head) {
    sort(batch, head);
    for (int64_t c = 0; c <= problem_.clusters; ++c) pack(batch, head, c);
    some_empty = problem_.clusters < sizes_.clusters_padded;
    for (int64_t c = 0; c < sizes_.clusters_padded; ++c) {
      const bool there = c < problem_.clusters && count[c] > 0;
      log_count[c] = there ? __builtin_logf(static_cast<float>(count[c])) : -kInf;
      if (c < problem_.clusters && !there) some_empty = true;
      far_key(c, there);
      far_value(c, there);
      if (problem_.tolerance < kInf) far_radius(c, there);
    }
  }

  // At most so many columns are the prefix keys' and those of the clusters that a row resolves.
  int64_t most_columns() {
    const int64_t clusters = problem_.clusters;
    if (problem_.tolerance < kInf) return begin[clusters + 1];  // a row may resolve any number
    for (int64_t c = 0; c < clusters; ++c) cursor_[c] = static_cast<int32_t>(round_up(count[c], W));
    int64_t total = round_up(count[clusters], W);
    for (int64_t i = 0; i < problem_.near; ++i) {  // the largest of the rest, swapped to place i
      int64_t best = i;
      for (int64_t c = i + 1; c < clusters; ++c) best = cursor_[c] > cursor_[best] ? c : best;
      const int32_t columns = cursor_[best];
      cursor_[best] = cursor_[i];
      cursor_[i] = columns;
      total += columns;
    }
    return total;
  }

  // Cluster c's keys stand in columns [begin[c], begin[c] + count[c]); the next cluster begins at a whole vector.
  int32_t *begin, *count;
  int32_t* order;     // the key in each column, -1 where there is none
  float* panels;      // keys, [columns / W][dim][W], zero where there is none
  float* values;      // [columns][value_padded]
  float* far_panels;  // means and variances, [clusters_padded / NR][far_dim][NR]
  float* far_values;  // [clusters_padded][value_padded]
  float* log_count;   // [clusters_padded], -inf where a cluster is empty
  float* log_spread;  // [clusters_padded], of the sum of variances; finite
  float* radius;      // [clusters_padded], largest distance of a key to the mean; only with a tolerance
  float* log_radius;
  bool some_empty = false;

 private:
  void sort(int64_t batch, int64_t head) {
    const MultipoleProblem& p = problem_;
    const int64_t* assignment = p.assignment + (batch * p.key_heads + head) * (p.keys - p.prefix);
    const char* seen = p.visible ? p.visible + batch * p.visible_stride[0] + head * p.visible_stride[1] : nullptr;
    const auto cluster = [&](int64_t m) -> int64_t {
      if (seen && !seen[m * p.visible_stride[2]]) return -1;
      return m < p.prefix ? p.clusters : assignment[m - p.prefix];
    };
    for (int64_t c = 0; c <= p.clusters; ++c) count[c] = 0;
    for (int64_t m = 0; m < p.keys; ++m) {
      const int64_t c = cluster(m);
      if (c >= 0) ++count[c];
    }
    int64_t column = 0;
    for (int64_t c = 0; c <= p.clusters; ++c) {
      begin[c] = cursor_[c] = static_cast<int32_t>(column);
      column += round_up(count[c], W);
    }
    begin[p.clusters + 1] = static_cast<int32_t>(column);
    for (int64_t i = 0; i < column; ++i) order[i] = -1;
    for (int64_t m = 0; m < p.keys; ++m) {
      const int64_t c = cluster(m);
      if (c >= 0) order[cursor_[c]++] = static_cast<int32_t>(m);
    }
  }

  void pack(int64_t batch, int64_t head, int64_t c) {
    const MultipoleProblem& p = problem_;
    for (int64_t column = begin[c]; column < begin[c + 1]; column += W) {
      for (int64_t j = 0; j < W; ++j) {
        float* value = values + (column + j) * sizes_.value_padded;
        const int32_t m = order[column + j];
        if (m < 0) {
          __builtin_memset(value, 0, sizes_.value_padded * sizeof(float));
          continue;
        }
        load_row(at(p.key, batch, head, m), p.key.stride[3], p.key.dtype, p.dim, 1.0f, rows_ + j * sizes_.dim_padded);
        load_row(at(p.value, batch, head, m), p.value.stride[3], p.value.dtype, p.value_dim, 1.0f, value);
      }
      float* panel = panels + column * p.dim;
      const int64_t here = smaller(W, begin[c] + count[c] - column);
      if (here < W) __builtin_memset(panel, 0, p.dim * W * sizeof(float));
      for (int64_t d = 0; d < p.dim; ++d)
        for (int64_t j = 0; j < here; ++j) panel[d * W + j] = rows_[j * sizes_.dim_padded + d];
    }
  }

  void far_key(int64_t c, bool there) {
    const MultipoleProblem& p = problem_;
    float* out = far_panels + c / NR * NR * sizes_.far_dim + c % NR;
    float spread = 0.0f;
    for (int64_t d = 0; d < p.dim; ++d) {
      Vec::F sum = Vec::zero(), squares = Vec::zero();
      float mean = 0.0f, variance = 0.0f;
      if (there) {
        const int64_t first = begin[c], last = first + count[c];
        for (int64_t i = first; i < last; i += W) sum = Vec::add(sum, Vec::load(panels + i * p.dim + d * W));
        mean = Vec::sum(sum) / count[c];
        for (int64_t i = first; i < last; i += W) {
          const Vec::F away = Vec::sub(Vec::load(panels + i * p.dim + d * W), Vec::set1(mean));
          const typename Vec::Mask here = Vec::upto(static_cast<int>(i), static_cast<int>(last - 1));
          squares = Vec::add(squares, Vec::select(here, Vec::mul(away, away), Vec::zero()));
        }
        variance = Vec::sum(squares) / count[c];
      }
      out[d * NR] = mean;
      if (p.second_order) out[(p.dim + d) * NR] = variance;
      spread += variance;
    }
    constexpr float kSmallest = 1.175494351e-38f;  // stands for the spread of keys that are all alike: those come last
    log_spread[c] = __builtin_logf(spread > kSmallest ? spread : kSmallest);
  }

  void far_radius(int64_t c, bool there) {
    const float* mean = far_panels + c / NR * NR * sizes_.far_dim + c % NR;
    Vec::F most = Vec::zero();
    const int64_t first = there ? begin[c] : 0, last = there ? first + count[c] : 0;
    for (int64_t i = first; i < last; i += W) {
      Vec::F square = Vec::zero();
      for (int64_t d = 0; d < problem_.dim; ++d) {
        const Vec::F away = Vec::sub(Vec::load(panels + i * problem_.dim + d * W), Vec::set1(mean[d * NR]));
        square = Vec::fma(away, away, square);
      }
      const typename Vec::Mask here = Vec::upto(static_cast<int>(i), static_cast<int>(last - 1));
      most = Vec::max(most, Vec::select(here, square, Vec::zero()));
    }
    radius[c] = __builtin_sqrtf(Vec::largest(most));
    log_radius[c] = __builtin_logf(radius[c]);
  }

  // Short sums, then the sum of those: a cluster may hold all keys.
  void far_value(int64_t c, bool there) {
    const int64_t ld = sizes_.value_padded;
    float* out = far_values + c * ld;
    __builtin_memset(out, 0, ld * sizeof(float));
    if (!there) return;
    const Vec::F number = Vec::set1(static_cast<float>(count[c]));
    const int64_t last = begin[c] + count[c];
    for (int64_t run = begin[c]; run < last; run += 64) {
      __builtin_memset(sum_, 0, ld * sizeof(float));
      for (int64_t i = run; i < smaller(last, run + 64); ++i)
        for (int64_t d = 0; d < ld; d += W) Vec::store(sum_ + d, Vec::add(Vec::load(sum_ + d), Vec::load(values + i * ld + d)));
      for (int64_t d = 0; d < ld; d += W) Vec::store(out + d, Vec::add(Vec::load(out + d), Vec::load(sum_ + d)));
    }
    for (int64_t d = 0; d < ld; d += W) Vec::store(out + d, Vec::div(Vec::load(out + d), number));
  }

  const MultipoleProblem& problem_;
  const Sizes& sizes_;
  int32_t* cursor_;
  float *rows_, *sum_;
};
