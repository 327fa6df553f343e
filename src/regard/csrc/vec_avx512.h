// Sixteen floats: the vector operations that the kernels are written in, for AVX-512.
#pragma once

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kRows = 8;       // rows of the score micro-kernel: 8 x 2 accumulators of 32 registers
  static constexpr int kMixRows = 6;    // rows of the weighted-sum micro-kernel: 6 x 4 accumulators
  using F = __m512;
  using Mask = __mmask16;
  using Lanes = __m512i;

  static REGARD_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static REGARD_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static REGARD_INLINE F set1(float a) { return _mm512_set1_ps(a); }
  static REGARD_INLINE F zero() { return _mm512_setzero_ps(); }
  static REGARD_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static REGARD_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static REGARD_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static REGARD_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static REGARD_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static REGARD_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static REGARD_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static REGARD_INLINE Mask ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static REGARD_INLINE Mask gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static REGARD_INLINE Mask eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static REGARD_INLINE Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static REGARD_INLINE Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static REGARD_INLINE unsigned bits(Mask m) { return m; }
  // lanes whose index (base + lane) is at most `last`
  static REGARD_INLINE Mask upto(int base, int last) {
    const int lanes = last - base + 1;
    return lanes <= 0 ? 0 : lanes >= 16 ? 0xffff : static_cast<Mask>((1u << lanes) - 1u);
  }
  static REGARD_INLINE F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static REGARD_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
  static REGARD_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
  static REGARD_INLINE float smallest(F a) { return _mm512_reduce_min_ps(a); }
  static REGARD_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // (a0, b0, a1, b1, ...), in two vectors
  static REGARD_INLINE void interleave(F a, F b, F& low, F& high) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    low = _mm512_permutex2var_ps(a, first, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  }
  // a * 2^n, n whole
  static REGARD_INLINE F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }

  static REGARD_INLINE Lanes lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
  static REGARD_INLINE F permute(F a, Lanes from) { return _mm512_permutexvar_ps(from, a); }

  struct Counter {
    __m512i n;
    REGARD_INLINE Counter() : n(_mm512_setzero_si512()) {}
    REGARD_INLINE void add(Mask m) { n = _mm512_mask_sub_epi32(n, m, n, _mm512_set1_epi32(-1)); }
    REGARD_INLINE int total() const { return _mm512_reduce_add_epi32(n); }
  };

  // Writes the chosen lanes of `a` and their indices (base + lane) densely; a whole vector may be written at each place.
  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, int base, Mask m) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(base));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, a));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(m, index));
    return __builtin_popcount(m);
  }
  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, const int32_t* from, Mask m) {
    const __m512i index = _mm512_loadu_si512(from);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, a));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(m, index));
    return __builtin_popcount(m);
  }

  static REGARD_INLINE F from_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static REGARD_INLINE F from_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static REGARD_INLINE void to_float16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
