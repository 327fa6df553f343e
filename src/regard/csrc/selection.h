// The exact k largest of a row of logits, without sorting it.
// Included inside an instruction set's namespace, after rows.h.
#pragma once

constexpr float kLogisticScale = 0.5513f;  // sqrt(3) / pi: a logistic distribution's scale for unit deviation

struct RowStats {
  float largest, mean, deviation;
  int64_t allowed;  // logits above -inf
  bool broken;      // a NaN or +inf among them: the softmax of the row is NaN
};

// Statistics of s[0 .. columns), with the tail up to a whole vector set to -inf. Logits of -inf are hidden keys.
static RowStats row_stats_hidden(const float* s, int64_t columns) {
  RowStats stats{-kInf, 0.0f, 0.0f, 0, false};
  double sum = 0.0, squares = 0.0;
  for (int64_t m = 0; m < columns; ++m) {
    const float x = s[m];
    if (x == -kInf) continue;
    if (!(x < kInf)) stats.broken = true;
    if (x > stats.largest) stats.largest = x;
    ++stats.allowed;
    sum += x;
    squares += static_cast<double>(x) * x;
  }
  if (stats.allowed > 0 && !stats.broken) {
    const double mean = sum / stats.allowed, variance = squares / stats.allowed - mean * mean;
    stats.mean = static_cast<float>(mean);
    stats.deviation = variance > 0.0 ? static_cast<float>(__builtin_sqrt(variance)) : 0.0f;
  }
  return stats;
}

static RowStats row_stats(float* s, int64_t columns, bool hidden) {
  const int64_t whole = columns / W * W;
  for (int64_t m = columns; m < round_up(columns, W); ++m) s[m] = -kInf;
  if (hidden) return row_stats_hidden(s, columns);
  Vec::F largest[2], sum[2], squares[2];
  for (int i = 0; i < 2; ++i) largest[i] = Vec::set1(-kInf), sum[i] = squares[i] = Vec::zero();
  int64_t m = 0;
  for (; m + 2 * W <= whole; m += 2 * W) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec::F x = Vec::load(s + m + i * W);
      largest[i] = Vec::max(largest[i], x);
      sum[i] = Vec::add(sum[i], x);
      squares[i] = Vec::fma(x, x, squares[i]);
    }
  }
  RowStats stats;
  stats.largest = Vec::largest(Vec::max(largest[0], largest[1]));
  float total = Vec::sum(Vec::add(sum[0], sum[1])), square = Vec::sum(Vec::add(squares[0], squares[1]));
  for (; m < columns; ++m) {
    stats.largest = s[m] > stats.largest ? s[m] : stats.largest;
    total += s[m];
    square += s[m] * s[m];
  }
  // A NaN, an infinity or an overflow shows in the sum of squares: look closer, slowly.
  if (!(square < kInf)) return row_stats_hidden(s, columns);
  stats.mean = total / columns;
  const float variance = square / columns - stats.mean * stats.mean;
  stats.deviation = variance > 0.0f ? __builtin_sqrtf(variance) : 0.0f;
  stats.allowed = columns;
  stats.broken = false;
  return stats;
}

// count(v >= lo) = at_lo >= k > at_hi = count(v >= hi)
struct Bracket {
  float lo, hi;
  int64_t at_lo, at_hi;
};

// The k largest are all above `tau`, and the first k - above of those that equal it. Where at_least == k, `tau` is only a
// threshold: all v >= tau are kept.
struct Cut {
  float tau;
  int64_t at_least, above;
};

static __attribute__((noinline)) int64_t count_at_least(const float* v, int64_t n, float t) {
  const Vec::F threshold = Vec::set1(t);
  typename Vec::Counter count[4];
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) count[j].add(Vec::ge(Vec::load(v + i + j * W), threshold));
  }
  for (; i < n; i += W) count[0].add(Vec::ge(Vec::load(v + i), threshold));
  return static_cast<int64_t>(count[0].total()) + count[1].total() + count[2].total() + count[3].total();
}

// Floats in their order as integers; both zeros are one.
static REGARD_INLINE int32_t ordered(float a) {
  int32_t x;
  __builtin_memcpy(&x, &a, sizeof x);
  return x >= 0 ? x : static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(x));
}

static REGARD_INLINE float middle(float lo, float hi) {
  const int64_t a = ordered(lo), b = ordered(hi), mid = a + (b - a) / 2;
  const uint32_t x = mid >= 0 ? static_cast<uint32_t>(mid) : 0x80000000u - static_cast<uint32_t>(mid);
  float out;
  __builtin_memcpy(&out, &x, sizeof out);
  return out;
}

static REGARD_INLINE float log_odds(double count, int64_t n) {
  const double p = count < 0.5 ? 0.5 : count > n - 0.5 ? n - 0.5 : count;
  return static_cast<float>(__builtin_logf(static_cast<float>(p / (n - p))));
}

// Where the k-th largest of n values should lie, taking their distribution for a logistic one.
static REGARD_INLINE float first_guess(const RowStats& stats, double k, float correction) {
  return stats.mean - (log_odds(k, stats.allowed) * kLogisticScale + correction) * stats.deviation;
}

constexpr int64_t kBand = 2 * W;

// The few values in [lo, hi), sorted, hold the k-th largest.
static __attribute__((noinline)) Cut cut_in_band(const float* v, int64_t n, int64_t k, const Bracket& b) {
  float band[kBand + W];
  int32_t unused[kBand + W];
  const Vec::F lo = Vec::set1(b.lo), hi = Vec::set1(b.hi);
  int found = 0;
  for (int64_t i = 0; i < n; i += W) {
    const Vec::F x = Vec::load(v + i);
    const typename Vec::Mask in = Vec::both(Vec::ge(x, lo), Vec::gt(hi, x));
    if (Vec::bits(in)) found += Vec::compress(band + found, unused + found, x, static_cast<int>(i), in);
  }
  for (int i = 1; i < found; ++i) {
    const float x = band[i];
    int j = i;
    for (; j > 0 && band[j - 1] < x; --j) band[j] = band[j - 1];
    band[j] = x;
  }
  const int place = static_cast<int>(k - b.at_hi) - 1;
  const float tau = band[place];
  int first = place, last = place;
  while (first > 0 && band[first - 1] == tau) --first;
  while (last + 1 < found && band[last + 1] == tau) ++last;
  return {tau, b.at_hi + last + 1, b.at_hi + first};
}

// Narrows the bracket until at most `extra` values too many lie above its lower end. True if that cannot be reached since
// all values left in the bracket are equal; then lo is their value. Thresholds move by the log-odds of their counts,
// nearly linear in the threshold; a bisection of the bit patterns ends what that cannot.
static bool narrow(const float* v, int64_t n, int64_t total, int64_t k, int64_t extra, float guess, float slope, Bracket& b) {
  const float wanted = log_odds(k + 0.5 * extra, total);
  float t = guess;
  for (int step = 1; b.at_lo - k > extra && b.at_lo - b.at_hi > kBand; ++step) {
    if (!(t > b.lo && t < b.hi)) t = middle(b.lo, b.hi);
    if (!(t > b.lo && t < b.hi)) return true;
    const int64_t count = count_at_least(v, n, t);
    if (count >= k) {
      b.lo = t, b.at_lo = count;
    } else {
      b.hi = t, b.at_hi = count;
    }
    if (step % 4 == 0) {  // draw the bracket in to the values that lie in it
      const Vec::F lo = Vec::set1(b.lo), hi = Vec::set1(b.hi);
      Vec::F least = Vec::set1(kInf), most = Vec::set1(-kInf);
      for (int64_t i = 0; i < n; i += W) {
        const Vec::F x = Vec::load(v + i);
        const typename Vec::Mask in = Vec::both(Vec::ge(x, lo), Vec::gt(hi, x));
        least = Vec::min(least, Vec::select(in, x, Vec::set1(kInf)));
        most = Vec::max(most, Vec::select(in, x, Vec::set1(-kInf)));
      }
      b.lo = Vec::smallest(least);
      if (b.lo == Vec::largest(most)) return true;
      t = middle(b.lo, Vec::largest(most));
    } else if (step > 8) {
      t = middle(b.lo, b.hi);
    } else if (b.lo > kLowest && b.hi < kInf && b.at_hi > 0) {
      const float low = log_odds(b.at_lo, total), high = log_odds(b.at_hi, total);
      t = b.lo + (b.hi - b.lo) * ((low - wanted) / (low - high));
    } else {
      t += (log_odds(count, total) - wanted) * slope;
    }
  }
  return false;
}

// The exact cut among v[0 .. n) (n padded with -inf to whole vectors; `total` values are real).
static Cut exact_cut(const float* v, int64_t n, int64_t total, int64_t k, float guess, float slope, Bracket b) {
  if (narrow(v, n, total, k, 0, guess, slope, b)) return {b.lo, b.at_lo, b.at_hi};
  if (b.at_lo == k) return {b.lo, k, k};
  return cut_in_band(v, n, k, b);
}

constexpr int64_t kFew = 8;

// The same for k up to kFew, from the largest value downward.
static __attribute__((noinline)) Cut cut_of_few(const float* v, int64_t n, int64_t k) {
  float tau = kInf;
  for (int64_t above = 0;;) {
    const Vec::F before = Vec::set1(tau);
    Vec::F most = Vec::set1(-kInf);
    for (int64_t i = 0; i < n; i += W) {
      const Vec::F x = Vec::load(v + i);
      most = Vec::max(most, Vec::select(Vec::gt(before, x), x, Vec::set1(-kInf)));
    }
    tau = Vec::largest(most);
    const Vec::F now = Vec::set1(tau);
    int64_t equal = 0;
    for (int64_t i = 0; i < n; i += W) equal += __builtin_popcount(Vec::bits(Vec::eq(Vec::load(v + i), now)));
    if (above + equal >= k) return {tau, above + equal, above};
    above += equal;
  }
}

// Drops from a list (ordered by index) what the cut drops; ties to the lowest index. Returns its new length, k.
static int64_t filter_list(float* values, int32_t* indices, int64_t n, int64_t k, const Cut& cut) {
  int64_t kept = 0;
  if (cut.at_least == k) {
    const Vec::F tau = Vec::set1(cut.tau);
    for (int64_t i = 0; i < n; i += W) {
      const Vec::F x = Vec::load(values + i);
      kept += Vec::compress(values + kept, indices + kept, x, indices + i, Vec::ge(x, tau));
    }
    return kept;
  }
  int64_t room = k - cut.above;
  for (int64_t i = 0; i < n; ++i) {
    const float x = values[i];
    if (!(x > cut.tau) && !(x == cut.tau && room-- > 0)) continue;
    values[kept] = x;
    indices[kept++] = indices[i];
  }
  return kept;
}

// Moves all v >= t, with their indices, to the front of the row. The end is padded with -inf to a whole vector.
static int64_t compress_row(float* v, int32_t* indices, int64_t n, float t) {
  const Vec::F threshold = Vec::set1(t);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += W) {
    const Vec::F x = Vec::load(v + i);
    kept += Vec::compress(v + kept, indices + kept, x, static_cast<int>(i), Vec::ge(x, threshold));
  }
  Vec::store(v + kept, Vec::set1(-kInf));
  return kept;
}

// The lanes of a row (the first at index `base`) that lie above the k-th logit, or equal it up to the last kept tie.
static REGARD_INLINE typename Vec::Mask kept_lanes(Vec::F x, Vec::F kth, int64_t base, int64_t last_tie) {
  const typename Vec::Mask tied = Vec::both(Vec::eq(x, kth), Vec::upto(static_cast<int>(base), static_cast<int>(last_tie)));
  return Vec::either(Vec::gt(x, kth), tied);
}
