// Rows of logits: loading and packing tensors, the score micro-kernel, and the exact selection of a row's k largest.
// Included inside an instruction set's namespace, after its Vec.
#pragma once

constexpr int W = Vec::kWidth;
constexpr int NR = 2 * W;  // keys in a panel
constexpr int MR = Vec::kRows;
constexpr float kLowest = -3.402823466e38f;
constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLogisticScale = 0.5513f;  // sqrt(3) / pi: a logistic distribution's scale for unit deviation

static REGARD_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
static REGARD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- tensors in and out -------------------------------------------------------------------------------------------

static REGARD_INLINE const char* at(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
  return t.data + (b * t.stride[0] + h * t.stride[1] + n * t.stride[2]) * size;
}

static REGARD_INLINE Vec::F widen(const uint16_t* p, DType dtype) {
  return dtype == DType::kBFloat16 ? Vec::from_bfloat16(p) : Vec::from_float16(p);
}

// `n` channels of one token as floats, times `factor`; the rest up to a whole vector is zero.
static void load_row(const char* source, int64_t stride, DType dtype, int64_t n, float factor, float* out) {
  const Vec::F f = Vec::set1(factor);
  const int64_t whole = stride == 1 ? n / W * W : 0;
  if (dtype == DType::kFloat32) {
    const float* p = reinterpret_cast<const float*>(source);
    for (int64_t i = 0; i < whole; i += W) Vec::store(out + i, Vec::mul(Vec::load(p + i), f));
    for (int64_t i = whole; i < n; i += W) {
      float rest[W] = {};
      for (int64_t j = i; j < smaller(n, i + W); ++j) rest[j - i] = p[j * stride];
      Vec::store(out + i, Vec::mul(Vec::load(rest), f));
    }
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < whole; i += W) Vec::store(out + i, Vec::mul(widen(p + i, dtype), f));
    for (int64_t i = whole; i < n; i += W) {
      uint16_t rest[W] = {};
      for (int64_t j = i; j < smaller(n, i + W); ++j) rest[j - i] = p[j * stride];
      Vec::store(out + i, Vec::mul(widen(rest, dtype), f));
    }
  }
}

static REGARD_INLINE uint16_t to_bfloat16(float a) {
  uint32_t x;
  __builtin_memcpy(&x, &a, sizeof x);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(x >> 16 | 0x40u);
  return static_cast<uint16_t>((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}

// One token's channels, times `factor`, in the tensor's dtype. `row` is readable up to a whole vector.
static void store_row(char* target, int64_t stride, DType dtype, int64_t n, float factor, const float* row) {
  if (dtype == DType::kFloat32) {
    float* p = reinterpret_cast<float*>(target);
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) p[i] = row[i] * factor;
    } else {
      for (int64_t i = 0; i < n; ++i) p[i * stride] = row[i] * factor;
    }
  } else if (dtype == DType::kBFloat16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(target);
    for (int64_t i = 0; i < n; ++i) p[i * stride] = to_bfloat16(row[i] * factor);
  } else {
    uint16_t* p = reinterpret_cast<uint16_t*>(target);
    const Vec::F f = Vec::set1(factor);
    for (int64_t i = 0; i < n; i += W) {
      uint16_t half[W];
      Vec::to_float16(half, Vec::mul(Vec::load(row + i), f));
      for (int64_t j = i; j < smaller(n, i + W); ++j) p[j * stride] = half[j - i];
    }
  }
}

// Tokens as rows of `ld` floats.
static void pack_rows(const Tensor4& t, int64_t b, int64_t h, int64_t tokens, int64_t dim, int64_t ld, float* out) {
  for (int64_t m = 0; m < tokens; ++m) load_row(at(t, b, h, m), t.stride[3], t.dtype, dim, 1.0f, out + m * ld);
}

// Keys as panels [dim][NR], so that the micro-kernel reads NR keys of one channel at once. Missing keys are zero.
static void pack_panels(const Tensor4& t, int64_t b, int64_t h, int64_t tokens, int64_t dim, float* rows, float* out) {
  const int64_t ld = round_up(dim, W);
  for (int64_t m = 0; m < tokens; m += NR, out += NR * dim) {
    for (int64_t j = 0; j < NR; ++j) {
      if (m + j < tokens) {
        load_row(at(t, b, h, m + j), t.stride[3], t.dtype, dim, 1.0f, rows + j * ld);
      } else {
        __builtin_memset(rows + j * ld, 0, ld * sizeof(float));
      }
    }
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t j = 0; j < NR; ++j) out[d * NR + j] = rows[j * ld + d];
  }
}

// ---- logits -------------------------------------------------------------------------------------------------------

// MR queries (channel-major) times one panel. Every logit is one chain of multiply-adds in the order of the channels,
// wherever its row stands in a tile: the backward gets the forward's logits bit for bit.
static REGARD_INLINE void score_micro(const float* q, const float* panel, int64_t dim, float* s, int64_t ld) {
  Vec::F acc[MR][2];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = Vec::zero();
  for (int64_t d = 0; d < dim; ++d) {
    const Vec::F k0 = Vec::load(panel + d * NR), k1 = Vec::load(panel + d * NR + W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec::F x = Vec::set1(q[d * MR + r]);
      acc[r][0] = Vec::fma(x, k0, acc[r][0]);
      acc[r][1] = Vec::fma(x, k1, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    Vec::store(s + r * ld, acc[r][0]);
    Vec::store(s + r * ld + W, acc[r][1]);
  }
}

static __attribute__((noinline)) void score_tile(
    const float* q, int64_t groups, const float* panels, int64_t columns, int64_t dim, float* s, int64_t ld) {
  for (int64_t m = 0; m < columns; m += NR, panels += NR * dim)
    for (int64_t g = 0; g < groups; ++g) score_micro(q + g * dim * MR, panels, dim, s + g * MR * ld + m, ld);
}

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

// ---- exact selection ----------------------------------------------------------------------------------------------

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

// exp(x) for x <= 0 (up to rounding), to one unit in the last place; 2^-126 stands for all that is smaller.
static REGARD_INLINE Vec::F exp_nonpositive(Vec::F x) {
  x = Vec::max(x, Vec::set1(-87.3f));
  const Vec::F n = Vec::round(Vec::mul(x, Vec::set1(1.4426950408889634f)));
  // ln 2 in two parts: the first has few bits, so that n times it is exact.
  Vec::F r = Vec::fma(n, Vec::set1(-0.693359375f), x);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  Vec::F p = Vec::set1(1.0f / 5040.0f);
  p = Vec::fma(p, r, Vec::set1(1.0f / 720.0f));
  p = Vec::fma(p, r, Vec::set1(1.0f / 120.0f));
  p = Vec::fma(p, r, Vec::set1(1.0f / 24.0f));
  p = Vec::fma(p, r, Vec::set1(1.0f / 6.0f));
  p = Vec::fma(p, r, Vec::set1(0.5f));
  p = Vec::fma(Vec::mul(r, r), p, r);
  return Vec::scale2(Vec::add(p, Vec::set1(1.0f)), n);
}
