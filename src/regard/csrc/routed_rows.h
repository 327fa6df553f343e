// Routed attention: what a block of queries sees, and the products with it. Keys and values are read where they are, row by
// row through a list of pointers, so no list's copy is made and blocks of any size, single keys too, cost what they hold.
// Logits stand transposed, keys by queries: softmax then works on a vector of queries at a time. Included inside an
// instruction set's namespace.
#pragma once

constexpr int64_t kTile = 64;    // most query rows of a tile, a multiple of W
constexpr int64_t kChunk = 128;  // keys that are visited together; adding up short sums rounds less than one long chain

// ---- products -----------------------------------------------------------------------------------------------------

// Calls f<n>(first) over [0, count) in pieces of MR, then of 4, 2 and 1.
template <class F>
static REGARD_INLINE void by_rows(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + MR <= count; i += MR) f(std::integral_constant<int, MR>(), i);
  for (; i + 4 <= count; i += 4) f(std::integral_constant<int, 4>(), i);
  if (i + 2 <= count) f(std::integral_constant<int, 2>(), i), i += 2;
  if (i < count) f(std::integral_constant<int, 1>(), i);
}

// Calls f<NV>(first) over `padded` floats, a multiple of W, in pieces of two vectors and one.
template <class F>
static REGARD_INLINE void by_vectors(int64_t padded, const F& f) {
  int64_t c = 0;
  for (; c + 2 * W <= padded; c += 2 * W) f(std::integral_constant<int, 2>(), c);
  if (c < padded) f(std::integral_constant<int, 1>(), c);
}

// K rows times NV vectors of the panel's columns.
template <int K, int NV>
static REGARD_INLINE void score_micro(const float* const* rows, const float* panel, int64_t ld, int64_t dim, float* out) {
  const float* row[K];
  Vec::F acc[K][NV];
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    row[i] = rows[i];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec::zero();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec::F q[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) q[v] = Vec::load(panel + d * ld + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec::F x = Vec::set1(row[i][d]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = Vec::fma(x, q[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) Vec::store(out + i * ld + v * W, acc[i][v]);
}

// out[keys][ld] = rows of keys (or values) times the panel [dim][ld] of queries (or gradients).
static __attribute__((noinline)) void score(
    const float* const* rows, int64_t keys, const float* panel, int64_t ld, int64_t dim, float* out) {
  by_rows(keys, [&](auto k, int64_t first) {
    if (first + 3 * MR <= keys)  // far enough ahead to arrive in time
      for (int i = 0; i < MR; ++i)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(rows[first + 2 * MR + i] + d);
    by_vectors(ld, [&](auto nv, int64_t c) { score_micro<k(), nv()>(rows + first, panel + c, ld, dim, out + first * ld + c); });
  });
}

// R output rows += weights[keys][ld], transposed, times rows of keys (or values), NV vectors of channels.
template <int R, int NV>
static REGARD_INLINE void blend_micro(
    const float* weights, int64_t ld, const float* const* rows, int64_t keys, int64_t c, float* out, int64_t ldo) {
  Vec::F acc[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec::zero();
  for (int64_t m = 0; m < keys; ++m) {
    const float* row = rows[m] + c;
    Vec::F x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = Vec::load(row + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec::F w = Vec::set1(weights[m * ld + i]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = Vec::fma(w, x[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* target = out + i * ldo + c + v * W;
      Vec::store(target, Vec::add(Vec::load(target), acc[i][v]));
    }
}

static __attribute__((noinline)) void blend(
    const float* weights, int64_t ld, const float* const* rows, int64_t keys, int64_t count, float* out, int64_t ldo) {
  by_vectors(ldo, [&](auto nv, int64_t c) {
    by_rows(count, [&](auto r, int64_t first) {
      blend_micro<r(), nv()>(weights + first, ld, rows, keys, c, out + first * ldo, ldo);
    });
  });
}

// Sums of K keys += factors[keys][ld] times `count` rows, NV vectors of channels.
template <int K, int NV>
static REGARD_INLINE void spread_micro(
    const float* factors, int64_t ld, const float* rows, int64_t ldr, int64_t count, const int32_t* index, float* sums) {
  Vec::F acc[K][NV];
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    __builtin_prefetch(sums + index[i] * ldr, 1);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec::zero();
  }
  for (int64_t r = 0; r < count; ++r) {
    Vec::F x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = Vec::load(rows + r * ldr + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const Vec::F f = Vec::set1(factors[i * ld + r]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = Vec::fma(f, x[v], acc[i][v]);
    }
  }
  // One key after the other: a list may name a key twice.
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* target = sums + index[i] * ldr + v * W;
      Vec::store(target, Vec::add(Vec::load(target), acc[i][v]));
    }
}

static __attribute__((noinline)) void spread(
    const float* factors, int64_t ld, const float* rows, int64_t ldr, int64_t count, const int32_t* index, int64_t keys,
    float* sums) {
  by_rows(keys, [&](auto k, int64_t first) {
    by_vectors(ldr, [&](auto nv, int64_t c) {
      spread_micro<k(), nv()>(factors + first * ld, ld, rows + c, ldr, count, index + first, sums + c);
    });
  });
}

// W x W floats transposed. A round brings the highest bit of the row's number to the lowest place of the column's.
static REGARD_INLINE void transpose_square(const float* rows, int64_t ld, float* out, int64_t ldo) {
  constexpr int kRounds = W == 16 ? 4 : W == 8 ? 3 : 2;
  static_assert(W == 1 << kRounds);
  Vec::F a[W], b[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) a[i] = Vec::load(rows + i * ld);
#pragma GCC unroll 4
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) Vec::interleave(a[i], a[i + W / 2], b[2 * i], b[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) Vec::store(out + i * ldo, a[i]);
}

// ---- a head's keys, and a block's list of them --------------------------------------------------------------------

// Rows of floats of one tensor's head: where they are if they can be read as they are, else packed.
class HeadRows {
 public:
  HeadRows(const Tensor4& t, int64_t tokens, int64_t dim, Scratch& scratch)
      : tensor_(t), tokens_(tokens), dim_(dim), direct_(direct(t, dim)), ld_(direct_ ? t.stride[2] : round_up(dim, W)),
        packed_(direct_ ? nullptr : scratch.take(tokens * ld_)) {}
  static int64_t floats(const Tensor4& t, int64_t tokens, int64_t dim) {
    return direct(t, dim) ? 0 : tokens * round_up(dim, W) + 16;
  }
  void load(int64_t batch, int64_t head) {
    if (tokens_ == 0) return;
    if (direct_) {
      first_ = reinterpret_cast<const float*>(at(tensor_, batch, head, 0));
    } else {
      pack_rows(tensor_, batch, head, tokens_, dim_, ld_, packed_);
      first_ = packed_;
    }
  }
  const float* row(int64_t token) const { return first_ + token * ld_; }

 private:
  static bool direct(const Tensor4& t, int64_t dim) {
    return t.dtype == DType::kFloat32 && t.stride[3] == 1 && dim % W == 0;
  }
  const Tensor4& tensor_;
  const int64_t tokens_, dim_;
  const bool direct_;
  const int64_t ld_;
  float* const packed_;
  const float* first_ = nullptr;
};

// What a block of queries sees: pointers to the rows of its keys, then of the extra keys. Hidden keys are not listed.
class KeyList {
 public:
  static int64_t capacity(const RoutedProblem& p) { return p.listed * smaller(p.key_block, p.keys) + p.extra; }
  static int64_t floats(const RoutedProblem& p) {
    return HeadRows::floats(p.key, p.keys, p.dim) + HeadRows::floats(p.value, p.keys, p.value_dim) +
           HeadRows::floats(p.extra_key, p.extra, p.dim) + HeadRows::floats(p.extra_value, p.extra, p.value_dim) +
           5 * capacity(p) + 3 * 16;
  }
  KeyList(const RoutedProblem& p, Scratch& scratch)
      : keys(reinterpret_cast<const float**>(scratch.take(2 * capacity(p)))),
        values(reinterpret_cast<const float**>(scratch.take(2 * capacity(p)))),
        index(reinterpret_cast<int32_t*>(scratch.take(capacity(p)))), problem_(p), key_rows_(p.key, p.keys, p.dim, scratch),
        value_rows_(p.value, p.keys, p.value_dim, scratch), extra_keys_(p.extra_key, p.extra, p.dim, scratch),
        extra_values_(p.extra_value, p.extra, p.value_dim, scratch) {}

  void load(int64_t batch, int64_t key_head) {
    batch_ = batch, key_head_ = key_head;
    key_rows_.load(batch, key_head), value_rows_.load(batch, key_head);
    extra_keys_.load(batch, key_head), extra_values_.load(batch, key_head);
  }

  // What block `block` of query head `head` sees.
  void look(int64_t head, int64_t block) {
    const RoutedProblem& p = problem_;
    const int64_t list = batch_ * p.blocks_stride[0] + head * p.blocks_stride[1] + block * p.blocks_stride[2];
    const char* shown = p.visible + batch_ * p.visible_stride[0] + key_head_ * p.visible_stride[1];
    length = 0;
    for (int64_t i = 0; i < p.listed; ++i) {
      const int64_t listed = p.blocks[list + i * p.blocks_stride[3]];
      if (listed < 0) continue;
      const int64_t stop = smaller(p.keys, (listed + 1) * p.key_block);
      for (int64_t m = listed * p.key_block; m < stop; ++m)
        if (p.visible == nullptr || shown[m * p.visible_stride[2]]) add(key_rows_.row(m), value_rows_.row(m), m);
    }
    first_extra = length;
    for (int64_t s = 0; s < p.extra; ++s) add(extra_keys_.row(s), extra_values_.row(s), p.keys + s);
  }

  const float **keys, **values;
  int32_t* index;  // of a key among keys and extra keys
  int64_t length = 0, first_extra = 0;

 private:
  REGARD_INLINE void add(const float* key, const float* value, int64_t place) {
    keys[length] = key, values[length] = value, index[length] = static_cast<int32_t>(place);
    ++length;
  }

  const RoutedProblem& problem_;
  HeadRows key_rows_, value_rows_, extra_keys_, extra_values_;
  int64_t batch_ = 0, key_head_ = 0;
};

// ---- a tile of query rows -----------------------------------------------------------------------------------------

// Rows of queries (or of the output's gradients), and the same as a panel [dim][ld], a column for each.
class RowTile {
 public:
  static int64_t floats(int64_t dim) { return 2 * kTile * round_up(dim, W) + 32; }
  RowTile(const Tensor4& t, int64_t dim, float factor, Scratch& scratch)
      : ld(round_up(dim, W)), rows(scratch.take(kTile * ld)), panel(scratch.take(kTile * ld)), tensor_(t), dim_(dim),
        factor_(factor) {}
  // `width`: `count` rounded up to whole vectors. What is beyond the rows is zero.
  void load(int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width) {
    for (int64_t r = 0; r < count; ++r)
      load_row(at(tensor_, batch, head, first + r), tensor_.stride[3], tensor_.dtype, dim_, factor_, rows + r * ld);
    __builtin_memset(rows + count * ld, 0, (width - count) * ld * sizeof(float));
    for (int64_t r = 0; r < width; r += W)
      for (int64_t d = 0; d < ld; d += W) transpose_square(rows + r * ld + d, ld, panel + d * width + r, width);
  }

  const int64_t ld;
  float *const rows, *const panel;

 private:
  const Tensor4& tensor_;
  const int64_t dim_;
  const float factor_;
};

// Adds the extra keys' biases to entries [begin, end) of a list's logits, which start at `logits`.
static void add_bias(const RoutedProblem& p, const KeyList& list, int64_t batch, int64_t head, int64_t first, int64_t count,
                     int64_t begin, int64_t end, float* logits, int64_t ld) {
  if (p.extra_bias == nullptr) return;
  const float* bias = p.extra_bias + batch * p.bias_stride[0] + head * p.bias_stride[1] + first * p.bias_stride[2];
  for (int64_t i = begin < list.first_extra ? list.first_extra : begin; i < end; ++i) {
    const float* one = bias + (i - list.first_extra) * p.bias_stride[3];
    float* row = logits + (i - begin) * ld;
    for (int64_t r = 0; r < count; ++r) row[r] += one[r * p.bias_stride[2]];
  }
}

// exp(x - shift), zero for a hidden key.
static REGARD_INLINE Vec::F weight_of(Vec::F x, Vec::F shift) {
  return Vec::select(Vec::ge(x, Vec::set1(kLowest)), exp_nonpositive(Vec::sub(x, shift)), Vec::zero());
}

// A column's largest logit; zero, which does no harm, where all keys are hidden.
static REGARD_INLINE Vec::F shift_of(Vec::F largest) {
  return Vec::select(Vec::ge(largest, Vec::set1(kLowest)), largest, Vec::zero());
}

// Calls f(head, first row, rows) for the tiles of a unit, of at most `most` rows, with the list of what they see.
template <class F>
static REGARD_INLINE void by_tiles(const RoutedProblem& p, const Unit& u, int64_t most, KeyList& list, const F& f) {
  const int64_t group = p.heads / p.key_heads;
  list.load(u.batch, u.key_head);
  for (int64_t n = u.row_begin; n < u.row_end;) {
    const int64_t block = n / p.query_block, stop = smaller(u.row_end, (block + 1) * p.query_block);
    for (int64_t head = u.key_head * group; head < (u.key_head + 1) * group; ++head) {
      if (head == u.key_head * group || p.blocks_stride[1] != 0) list.look(head, block);
      for (int64_t first = n; first < stop; first += most) f(head, first, smaller(most, stop - first));
    }
    n = stop;
  }
}
