// Four floats in the compiler's own vector type: the baseline of every machine (SSE2 on x86-64, NEON on Arm).
#pragma once

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kRows = 6;
  static constexpr int kMixRows = 3;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  using Lanes = Mask;

  static REGARD_INLINE F load(const float* p) {
    F a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static REGARD_INLINE void store(float* p, F a) { __builtin_memcpy(p, &a, sizeof a); }
  static REGARD_INLINE F set1(float a) { return F{a, a, a, a}; }
  static REGARD_INLINE F zero() { return F{0, 0, 0, 0}; }
  static REGARD_INLINE F add(F a, F b) { return a + b; }
  static REGARD_INLINE F sub(F a, F b) { return a - b; }
  static REGARD_INLINE F mul(F a, F b) { return a * b; }
  static REGARD_INLINE F div(F a, F b) { return a / b; }
  static REGARD_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static REGARD_INLINE F max(F a, F b) { return a > b ? a : b; }
  static REGARD_INLINE F min(F a, F b) { return a < b ? a : b; }
  static REGARD_INLINE Mask ge(F a, F b) { return a >= b; }
  static REGARD_INLINE Mask gt(F a, F b) { return a > b; }
  static REGARD_INLINE Mask eq(F a, F b) { return a == b; }
  static REGARD_INLINE Mask both(Mask a, Mask b) { return a & b; }
  static REGARD_INLINE Mask either(Mask a, Mask b) { return a | b; }
  static REGARD_INLINE unsigned bits(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
  static REGARD_INLINE Mask upto(int base, int last) {
    const int lanes = last - base + 1;
    return Mask{lanes, lanes, lanes, lanes} > Mask{0, 1, 2, 3};
  }
  static REGARD_INLINE F select(Mask m, F a, F b) { return m ? a : b; }
  static REGARD_INLINE float sum(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static REGARD_INLINE float larger(float a, float b) { return a > b ? a : b; }
  static REGARD_INLINE float lesser(float a, float b) { return a < b ? a : b; }
  static REGARD_INLINE float largest(F a) { return larger(larger(a[0], a[1]), larger(a[2], a[3])); }
  static REGARD_INLINE float smallest(F a) { return lesser(lesser(a[0], a[1]), lesser(a[2], a[3])); }
  // Adding and taking off 1.5 * 2^23 rounds to the nearest whole number; |a| stays far below 2^22 here.
  static REGARD_INLINE F round(F a) {
    const F big = set1(12582912.0f);
    return (a + big) - big;
  }
  static REGARD_INLINE void interleave(F a, F b, F& low, F& high) {
    low = F{a[0], b[0], a[1], b[1]};
    high = F{a[2], b[2], a[3], b[3]};
  }
  static REGARD_INLINE F scale2(F a, F n) {
    const Mask power = (__builtin_convertvector(n, Mask) + 127) << 23;
    F factor;
    __builtin_memcpy(&factor, &power, sizeof factor);
    return a * factor;
  }

  static REGARD_INLINE Lanes lanes(const int32_t* p) {
    Lanes a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static REGARD_INLINE F permute(F a, Lanes from) { return F{a[from[0]], a[from[1]], a[from[2]], a[from[3]]}; }

  struct Counter {
    Mask n = {0, 0, 0, 0};
    REGARD_INLINE void add(Mask m) { n -= m; }
    REGARD_INLINE int total() const { return n[0] + n[1] + n[2] + n[3]; }
  };

  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, int base, Mask m) {
    int n = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      values[n] = a[lane];
      indices[n] = base + lane;
      n -= m[lane];
    }
    return n;
  }
  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, const int32_t* from, Mask m) {
    int n = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      const int32_t index = from[lane];
      values[n] = a[lane];
      indices[n] = index;
      n -= m[lane];
    }
    return n;
  }

  static REGARD_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 0x1fu, fraction = h & 0x3ffu, out;
    if (exponent == 31) {
      out = 0x7f800000u | fraction << 13;
    } else if (exponent == 0) {
      // subnormal: fraction * 2^-24, exact in float
      const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;
      __builtin_memcpy(&out, &small, sizeof out);
    } else {
      out = (exponent + 112) << 23 | fraction << 13;
    }
    out |= sign;
    float a;
    __builtin_memcpy(&a, &out, sizeof a);
    return a;
  }
  static REGARD_INLINE uint16_t float_to_half(float a) {
    uint32_t x;
    __builtin_memcpy(&x, &a, sizeof x);
    const uint16_t sign = static_cast<uint16_t>(x >> 16 & 0x8000u);
    x &= 0x7fffffffu;
    if (x > 0x7f800000u) return sign | 0x7e00u;
    if (x >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity from 65520 on
    if (x < 0x38800000u) {                        // below the smallest normal: round a multiple of 2^-24
      float magnitude;
      __builtin_memcpy(&magnitude, &x, sizeof magnitude);
      const float shifted = magnitude + 0.5f;  // the spacing of floats in [0.5, 1) is 2^-24
      uint32_t bits;
      __builtin_memcpy(&bits, &shifted, sizeof bits);
      return sign | static_cast<uint16_t>(bits - 0x3f000000u);
    }
    x += 0xfffu + (x >> 13 & 1u);
    return sign | static_cast<uint16_t>((x - 0x38000000u) >> 13);
  }
  static REGARD_INLINE F from_bfloat16(const uint16_t* p) {
    const Mask wide = {p[0] << 16, p[1] << 16, p[2] << 16, static_cast<int32_t>(p[3] << 16)};
    F a;
    __builtin_memcpy(&a, &wide, sizeof a);
    return a;
  }
  static REGARD_INLINE F from_float16(const uint16_t* p) {
    return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
  static REGARD_INLINE void to_float16(uint16_t* p, F a) {
    for (int lane = 0; lane < kWidth; ++lane) p[lane] = float_to_half(a[lane]);
  }
};
