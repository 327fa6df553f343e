// What all kernels are made of: tensors in and out, scratch memory, products of small tiles, the exponential.
// Included inside an instruction set's namespace, after its Vec.
#pragma once

constexpr int W = Vec::kWidth;
constexpr int NR = 2 * W;  // keys in a panel
constexpr int MR = Vec::kRows;
constexpr float kLowest = -3.402823466e38f;
constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

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

// ---- memory -------------------------------------------------------------------------------------------------------

// A thread's memory, carved from one allocation.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : size_(round_up(floats, 64) + 64) {
    base_ = static_cast<float*>(::operator new(size_ * sizeof(float), std::align_val_t(64)));
#ifdef REGARD_POISON
    for (int64_t i = 0; i < size_; ++i) base_[i] = kNaN;  // nothing may depend on what was never written
#endif
  }
  ~Scratch() { ::operator delete(base_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* take(int64_t floats) {
    float* p = base_ + used_;
    used_ += round_up(floats, 16);
    return p;
  }

 private:
  int64_t size_, used_ = 0;
  float* base_;
};

// ---- weighted sums ------------------------------------------------------------------------------------------------

static REGARD_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec::F even = Vec::zero(), odd = Vec::zero();
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) {
    even = Vec::fma(Vec::load(a + c), Vec::load(b + c), even);
    odd = Vec::fma(Vec::load(a + c + W), Vec::load(b + c + W), odd);
  }
  if (c < n) even = Vec::fma(Vec::load(a + c), Vec::load(b + c), even);
  return Vec::sum(Vec::add(even, odd));
}

// out[0 .. NV vectors) += weights of list entries [begin, end) times their value rows, two entries in flight. Sums start
// from zero in each block of keys: adding short sums rounds less than one long chain.
template <int NV>
static REGARD_INLINE void gather(
    const float* p, const int32_t* indices, int64_t begin, int64_t end, const float* values, int64_t ld, float* out) {
  Vec::F even[NV], odd[NV];
#pragma GCC unroll 8
  for (int c = 0; c < NV; ++c) even[c] = odd[c] = Vec::zero();
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) {
    const float *a = values + indices[i] * ld, *b = values + indices[i + 1] * ld;
    const Vec::F x = Vec::set1(p[i]), y = Vec::set1(p[i + 1]);
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) {
      even[c] = Vec::fma(x, Vec::load(a + c * W), even[c]);
      odd[c] = Vec::fma(y, Vec::load(b + c * W), odd[c]);
    }
  }
  if (i < end) {
    const float* a = values + indices[i] * ld;
    const Vec::F x = Vec::set1(p[i]);
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) even[c] = Vec::fma(x, Vec::load(a + c * W), even[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < NV; ++c) Vec::store(out + c * W, Vec::add(Vec::load(out + c * W), Vec::add(even[c], odd[c])));
}

// kMixRows rows of weights times values of keys [begin, end), added to NV vectors of each output row.
template <int NV>
static REGARD_INLINE void mix(
    const float* p, int64_t ldp, const float* values, int64_t ld, int64_t begin, int64_t end, float* out, int64_t ldo) {
  constexpr int R = Vec::kMixRows;
  Vec::F acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) acc[r][c] = Vec::zero();
  for (int64_t m = begin; m < end; ++m) {
    Vec::F v[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) v[c] = Vec::load(values + m * ld + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec::F x = Vec::set1(p[r * ldp + m]);
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) acc[r][c] = Vec::fma(x, v[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      float* target = out + r * ldo + c * W;
      Vec::store(target, Vec::add(Vec::load(target), acc[r][c]));
    }
}

// Calls f<NV>(first channel) over the channels in pieces of at most four vectors.
template <class F>
static REGARD_INLINE void by_channels(int64_t padded, const F& f) {
  int64_t c = 0;
  for (; c + 4 * W <= padded; c += 4 * W) f(std::integral_constant<int, 4>(), c);
  switch ((padded - c) / W) {
    case 3: f(std::integral_constant<int, 3>(), c); break;
    case 2: f(std::integral_constant<int, 2>(), c); break;
    case 1: f(std::integral_constant<int, 1>(), c); break;
    default: break;
  }
}

// Adds factor * row to the rows of the kept keys, NV vectors of channels at a time.
template <int NV>
static REGARD_INLINE void scatter(
    const float* factor, const int32_t* indices, int64_t begin, int64_t end, const float* row, float* rows, int64_t ld) {
  Vec::F x[NV];
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) x[c] = Vec::load(row + c * W);
  for (int64_t i = begin; i < end; ++i) {
    float* target = rows + indices[i] * ld;
    const Vec::F f = Vec::set1(factor[i]);
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) Vec::store(target + c * W, Vec::fma(f, x[c], Vec::load(target + c * W)));
  }
}
