// Eight floats: the vector operations that the kernels are written in, for AVX2 with FMA and F16C.
#pragma once

// For each 8-bit mask, the lanes it chooses, in order: what AVX-512's compress does in one instruction.
struct CompressTable {
  alignas(32) int32_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][n++] = lane;
      for (; n < 8; ++n) lanes[mask][n] = 0;
    }
  }
};
// Constant: nothing of this runs at load time, on a machine that may lack AVX2.
static constexpr CompressTable kCompress;

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  static constexpr int kMixRows = 3;
  using F = __m256;
  using Mask = __m256;
  using Lanes = __m256i;

  static REGARD_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static REGARD_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static REGARD_INLINE F set1(float a) { return _mm256_set1_ps(a); }
  static REGARD_INLINE F zero() { return _mm256_setzero_ps(); }
  static REGARD_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static REGARD_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static REGARD_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static REGARD_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static REGARD_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static REGARD_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static REGARD_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static REGARD_INLINE Mask ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static REGARD_INLINE Mask gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static REGARD_INLINE Mask eq(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static REGARD_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static REGARD_INLINE Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static REGARD_INLINE unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static REGARD_INLINE Mask upto(int base, int last) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(last - base + 1), lane));
  }
  static REGARD_INLINE F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static REGARD_INLINE float sum(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static REGARD_INLINE float largest(F a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static REGARD_INLINE float smallest(F a) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static REGARD_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static REGARD_INLINE void interleave(F a, F b, F& low, F& high) {
    const F even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
  }
  static REGARD_INLINE F scale2(F a, F n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
  }

  static REGARD_INLINE Lanes lanes(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static REGARD_INLINE F permute(F a, Lanes from) { return _mm256_permutevar8x32_ps(a, from); }

  struct Counter {
    __m256i n;
    REGARD_INLINE Counter() : n(_mm256_setzero_si256()) {}
    REGARD_INLINE void add(Mask m) { n = _mm256_sub_epi32(n, _mm256_castps_si256(m)); }
    REGARD_INLINE int total() const {
      __m128i half = _mm_add_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
      half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
      return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    }
  };

  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, __m256i index, Mask m) {
    const unsigned mask = bits(m);
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lanes[mask]));
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(a, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices), _mm256_permutevar8x32_epi32(index, order));
    return __builtin_popcount(mask);
  }
  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, int base, Mask m) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return compress(values, indices, a, _mm256_add_epi32(lane, _mm256_set1_epi32(base)), m);
  }
  static REGARD_INLINE int compress(float* values, int32_t* indices, F a, const int32_t* from, Mask m) {
    return compress(values, indices, a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), m);
  }

  static REGARD_INLINE F from_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static REGARD_INLINE F from_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static REGARD_INLINE void to_float16(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
