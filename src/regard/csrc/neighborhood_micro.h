// Products of a few lines of queries with a few slots of their windows. A vector holds neighbours along the last axis: W
// queries, and for slot t their W keys, which are neighbours too. Channels are W floats apart or more, so any head dim will
// do. Included inside an instruction set's namespace, after rows.h.
#pragma once

constexpr int kLines = 3;                     // lines that share a load of keys
constexpr int kSlots = W == 16 ? 7 : 3;       // slots in registers: 3 x 7 accumulators of 32, or 3 x 3 of 16

// The keys of W queries at one slot. Where their windows do not start side by side (at a shifted border, under a stride),
// the lanes are picked by `lane`.
template <bool Even>
static REGARD_INLINE Vec::F keys_at(const float* row, Vec::Lanes lane) {
  const Vec::F found = Vec::load(row);
  return Even ? found : Vec::permute(found, lane);
}

// s[r][t] = sum over d of q[r][d] keys[d][t], for R lines and T slots.
template <int R, int T, bool Even>
static __attribute__((noinline)) void score_slots(
    const float* const* q, int64_t ldq, const float* keys, int64_t ld, int64_t dim, const int32_t* lanes, float* const* s) {
  const Vec::Lanes lane = Vec::lanes(lanes);
  Vec::F acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[r][t] = Vec::zero();
  for (int64_t d = 0; d < dim; ++d) {
    Vec::F x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = Vec::load(q[r] + d * ldq);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec::F k = keys_at<Even>(keys + d * ld + t, lane);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][t] = Vec::fma(x[r], k, acc[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) Vec::store(s[r] + t * W, acc[r][t]);
}

// out[r][c] += sum over t of p[r][t] values[c][t].
template <int R, int T, bool Even>
static __attribute__((noinline)) void mix_slots(
    const float* const* p, const float* values, int64_t ld, int64_t dim, const int32_t* lanes, float* const* out) {
  const Vec::Lanes lane = Vec::lanes(lanes);
  Vec::F weight[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) weight[r][t] = Vec::load(p[r] + t * W);
  for (int64_t c = 0; c < dim; ++c) {
    Vec::F acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = Vec::load(out[r] + c * W);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec::F v = keys_at<Even>(values + c * ld + t, lane);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = Vec::fma(weight[r][t], v, acc[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) Vec::store(out[r] + c * W, acc[r]);
  }
}

// The other way round: W neighbouring keys of R lines collect from the queries t places before them.
// target[r][d] += sum over t of w[r][t] x[d], with w[r] a row of `ldw` floats for each t.
template <int R, int T>
static __attribute__((noinline)) void collect_slots(
    const float* const* w, int64_t ldw, const float* x, int64_t ldx, int64_t dim, float* const* target, int64_t ld) {
  Vec::F weight[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) weight[r][t] = Vec::load(w[r] + t * ldw - t);
  for (int64_t d = 0; d < dim; ++d) {
    Vec::F acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = Vec::load(target[r] + d * ld);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec::F v = Vec::load(x + d * ldx - t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = Vec::fma(weight[r][t], v, acc[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) Vec::store(target[r] + d * ld, acc[r]);
  }
}

// Calls f(integral constant n) for n in 1 ... N.
template <int N, class F>
static REGARD_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>());
}

// Calls f(integral constant, first slot) over n slots in pieces of nearly equal size.
template <class F>
static REGARD_INLINE void by_slots(int64_t n, const F& f) {
  int64_t pieces = (n + kSlots - 1) / kSlots;
  for (int64_t t = 0; t < n; --pieces) {
    const int64_t here = (n - t + pieces - 1) / pieces;
    with_constant<kSlots>(here, [&](auto size) { f(size, t); });
    t += here;
  }
}

// W rows of W numbers become columns.
static REGARD_INLINE void turn(Vec::F (&block)[W]) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Vec::F next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) Vec::interleave(block[i], block[i + W / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = next[i];
  }
}

static REGARD_INLINE void turn(const float* rows, int64_t ld, Vec::F (&block)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) block[i] = Vec::load(rows + i * ld);
  turn(block);
}
