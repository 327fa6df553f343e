// Routed attention where each query has a list of its own (query_block 1). Rows then share nothing, and a tile of one row
// would leave all lanes but one of its vectors idle: here the lanes are channels. Included inside an instruction set's
// namespace, after routed_rows.h.
#pragma once

constexpr int64_t kAhead = 8;  // rows of keys to come that are asked for while one is read

// out += the rows times their weights, NV vectors of channels, two rows in flight.
template <int NV>
static REGARD_INLINE void gather_rows(const float* weights, const float* const* rows, int64_t count, int64_t c, float* out) {
  Vec::F even[NV], odd[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) even[v] = odd[v] = Vec::zero();
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const float *a = rows[i] + c, *b = rows[i + 1] + c;
    const Vec::F x = Vec::set1(weights[i]), y = Vec::set1(weights[i + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      even[v] = Vec::fma(x, Vec::load(a + v * W), even[v]);
      odd[v] = Vec::fma(y, Vec::load(b + v * W), odd[v]);
    }
  }
  if (i < count) {
    const Vec::F x = Vec::set1(weights[i]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) even[v] = Vec::fma(x, Vec::load(rows[i] + c + v * W), even[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) Vec::store(out + c + v * W, Vec::add(Vec::load(out + c + v * W), Vec::add(even[v], odd[v])));
}

// One query row and what it makes of its list.
class SingleRow {
 public:
  static int64_t floats(const RoutedProblem& p) { return round_up(p.dim, W) + round_up(KeyList::capacity(p), W) + 2 * 16; }
  SingleRow(const RoutedProblem& p, const KeyList& list, Scratch& scratch)
      : ld(round_up(p.dim, W)), query(scratch.take(ld)), weights(scratch.take(round_up(KeyList::capacity(p), W))),
        problem_(p), list_(list) {}

  // Loads the query and turns its logits to weights, not yet divided by their sum; returns what to divide by. Weights
  // behind the last, up to a whole vector, are zero.
  float weigh(int64_t batch, int64_t head, int64_t row) {
    const RoutedProblem& p = problem_;
    const int64_t keys = list_.length, padded = round_up(keys, W);
    load_row(at(p.query, batch, head, row), p.query.stride[3], p.query.dtype, p.dim, p.scale, query);
    products(list_.keys, keys, query, ld, weights);
    add_bias(p, list_, batch, head, row, 1, 0, keys, weights, 1);
    for (int64_t m = keys; m < padded; ++m) weights[m] = -kInf;
    Vec::F most = Vec::set1(-kInf), odd = Vec::zero();
    for (int64_t m = 0; m < padded; m += W) {
      const Vec::F x = Vec::load(weights + m);
      most = Vec::max(most, x);
      odd = Vec::select(Vec::eq(x, x), odd, Vec::set1(1.0f));
    }
    const Vec::F shift = shift_of(Vec::set1(Vec::largest(most)));
    Vec::F sum = Vec::zero();
    for (int64_t m = 0; m < padded; m += W) {
      const Vec::F weight = weight_of(Vec::load(weights + m), shift);
      sum = Vec::add(sum, weight);
      Vec::store(weights + m, weight);
    }
    if (Vec::largest(odd) > 0.0f || Vec::largest(most) == kInf) return kNaN;
    const float total = Vec::sum(sum);
    return total > 0.0f ? total : 1.0f;  // a row that sees nothing is all zeros and stays so
  }

  // Of one row with each of a list's: `dim` is padded.
  static void products(const float* const* rows, int64_t count, const float* row, int64_t dim, float* out) {
    for (int64_t m = 0; m < count; ++m) {
      if (m + kAhead < count)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(rows[m + kAhead] + d);
      out[m] = dot(row, rows[m], dim);
    }
  }

  // out[dim, padded] = the list's rows times weights[0 .. length), in short sums.
  void gather(const float* of, const float* const* rows, int64_t dim, float* out) const {
    __builtin_memset(out, 0, dim * sizeof(float));
    for (int64_t begin = 0; begin < list_.length; begin += kChunk) {
      const int64_t here = smaller(kChunk, list_.length - begin);
      by_channels(dim, [&](auto nv, int64_t c) { gather_rows<nv()>(of + begin, rows + begin, here, c, out); });
    }
  }

  const int64_t ld;
  float *const query, *const weights;

 private:
  const RoutedProblem& problem_;
  const KeyList& list_;
};

static void divide(float* row, int64_t padded, float by) {
  for (int64_t c = 0; c < padded; c += W) Vec::store(row + c, Vec::div(Vec::load(row + c), Vec::set1(by)));
}

static void forward_single(const RoutedProblem& p, const Unit* units, int64_t count) {
  const int64_t value_padded = round_up(p.value_dim, W);
  Scratch scratch(KeyList::floats(p) + SingleRow::floats(p) + value_padded + 16);
  KeyList list(p, scratch);
  SingleRow row(p, list, scratch);
  float* out = scratch.take(value_padded);
  for (const Unit* u = units; u < units + count; ++u)
    by_tiles(p, *u, 1, list, [&](int64_t head, int64_t first, int64_t) {
      const float total = row.weigh(u->batch, head, first);
      row.gather(row.weights, list.values, value_padded, out);
      divide(out, value_padded, total);
      store_row(const_cast<char*>(at(p.output, u->batch, head, first)), p.output.stride[3], p.output.dtype, p.value_dim,
                1.0f, out);
    });
}
