// k-NN attention, forward and backward, over tiles of query rows. No buffer of N x M: a tile holds a few rows of logits.
// Included inside an instruction set's namespace, after selection.h.
#pragma once

// Sizes that a problem's tiles have.
struct Layout {
  int64_t keys_padded, dim_padded, value_padded;
  int64_t rows;         // of a tile, a multiple of MR
  int64_t rows_padded;  // also a multiple of the mixing kernel's rows
  int64_t ld;           // floats from one row of logits to the next: one vector of slack, and no multiple of 4 KiB
  bool dense_weights;   // keep so many keys that a masked matrix product beats gathering
  int64_t key_block;    // keys whose values stay in the cache while a tile's rows visit them

  explicit Layout(const KnnProblem& p) {
    keys_padded = round_up(p.keys, NR);
    dim_padded = round_up(p.dim, W);
    value_padded = round_up(p.value_dim, W);
    rows = p.keys <= 6144 ? 2 * MR : MR;
    rows_padded = round_up(rows, Vec::kMixRows);
    ld = keys_padded + 16;
    dense_weights = p.topk * 8 > p.keys * 5;
    // about 32 kept keys of a row in a block, within half of the L2 cache
    const int64_t wanted = round_up(32 * p.keys / p.topk, 64), fits = 131072 / value_padded;
    key_block = wanted < 128 ? 128 : wanted > fits ? fits : wanted;
  }
};

static REGARD_INLINE int64_t visible(const KnnProblem& p, int64_t row) {
  return p.causal ? smaller(p.keys, row + 1) : p.keys;
}

// A tile of logits of consecutive query rows of one head.
class Tile {
 public:
  static int64_t floats(const KnnProblem& p, const Layout& l) {
    return l.rows * p.dim + l.rows * l.dim_padded + l.rows_padded * l.ld + l.rows * l.ld + 64;
  }

  Tile(const KnnProblem& p, const Layout& l, Scratch& scratch)
      : problem(p), layout(l), q_channels_(scratch.take(l.rows * p.dim)), q_rows(scratch.take(l.rows * l.dim_padded)),
        logits(scratch.take(l.rows_padded * l.ld)), indices(reinterpret_cast<int32_t*>(scratch.take(l.rows * l.ld))) {}

  // Loads the tile's queries and computes all their logits before masks.
  void score(int64_t batch, int64_t head, int64_t first, int64_t count, const float* panels) {
    for (int64_t r = 0; r < layout.rows; ++r) {
      float* row = q_rows + r * layout.dim_padded;
      if (r < count) {
        load_row(at(problem.query, batch, head, first + r), problem.query.stride[3], problem.query.dtype, problem.dim,
                 problem.scale, row);
      } else {
        __builtin_memset(row, 0, layout.dim_padded * sizeof(float));
      }
      float* channels = q_channels_ + r / MR * problem.dim * MR + r % MR;
      for (int64_t d = 0; d < problem.dim; ++d) channels[d * MR] = row[d];
    }
    const int64_t groups = (count + MR - 1) / MR;
    score_tile(q_channels_, groups, panels, visible(problem, first + count - 1), problem.dim, logits, layout.ld);
  }

  float* row(int64_t r) const { return logits + r * layout.ld; }
  int32_t* row_indices(int64_t r) const { return indices + r * layout.ld; }

  // Adds the mask to row r of the tile (query `query` of the head).
  void mask(int64_t batch, int64_t head, int64_t r, int64_t query) const {
    if (problem.mask_kind == MaskKind::kNone) return;
    float* s = row(r);
    const int64_t n = visible(problem, query), step = problem.mask_stride[3];
    const int64_t offset =
        batch * problem.mask_stride[0] + head * problem.mask_stride[1] + query * problem.mask_stride[2];
    if (problem.mask_kind == MaskKind::kBool) {
      const uint8_t* m = reinterpret_cast<const uint8_t*>(problem.mask) + offset;
      for (int64_t j = 0; j < n; ++j) s[j] = m[j * step] ? s[j] : -kInf;
    } else {
      const float* m = reinterpret_cast<const float*>(problem.mask) + offset;
      for (int64_t j = 0; j < n; ++j) s[j] += m[j * step];
    }
  }

  const KnnProblem& problem;
  const Layout& layout;

 private:
  float* q_channels_;  // groups of MR rows, channel-major

 public:
  float* q_rows;  // scaled queries, row-major
  float* logits;
  int32_t* indices;
};

// ---- forward ------------------------------------------------------------------------------------------------------

// What a row's selection leaves behind.
struct RowState {
  int64_t kept;  // length of the list, or columns of dense weights
  float sum;     // of the weights
  float largest, kth;
  int32_t last_tie;
  bool broken;
};

static int32_t last_equal(const float* v, const int32_t* indices, int64_t n, float x) {
  for (int64_t i = n - 1; i >= 0; --i)
    if (v[i] == x) return indices ? indices[i] : static_cast<int32_t>(i);
  return -1;
}

// The threshold search starts where the previous rows' thresholds lay, in deviations from their mean.
struct Habit {
  float correction = 0.0f;
  void learn(const RowStats& stats, int64_t k, float tau) {
    if (!(stats.deviation > 0.0f)) return;
    const float found = (stats.mean - first_guess(stats, static_cast<double>(k), 0.0f)) / stats.deviation;
    const float now = (stats.mean - tau) / stats.deviation - found;
    correction += 0.25f * (now - correction);
  }
};

static float slope_of(const RowStats& stats) { return kLogisticScale * stats.deviation; }

// Selects row r of the tile into a list: values and indices of the kept keys, in the order of the keys.
static int64_t select_list(Tile& tile, int64_t r, int64_t columns, const RowStats& stats, int64_t k, Habit& habit) {
  float* v = tile.row(r);
  int32_t* indices = tile.row_indices(r);
  const int64_t n = round_up(columns, W);
  if (stats.allowed <= k) return compress_row(v, indices, n, kLowest);
  const Bracket whole{kLowest, kInf, stats.allowed, 0};
  const float slope = slope_of(stats);
  if (k * 8 > stats.allowed) {  // many are kept: find the exact threshold first, move once
    const float guess = first_guess(stats, static_cast<double>(k), habit.correction);
    const Cut cut = exact_cut(v, n, stats.allowed, k, guess, slope, whole);
    habit.learn(stats, k, cut.tau);
    const int64_t found = compress_row(v, indices, n, cut.tau);
    return found == k ? k : filter_list(v, indices, found, k, cut);
  }
  // Few are kept: move a few too many, then search among those.
  const int64_t extra = k / 8 > 16 ? k / 8 : 16;
  Bracket b = whole;
  const float guess = first_guess(stats, k + 0.5 * extra, habit.correction);
  const bool tied = narrow(v, n, stats.allowed, k, extra, guess, slope, b);
  habit.learn(stats, k + extra / 2, b.lo);
  const int64_t found = compress_row(v, indices, n, b.lo);
  if (found == k) return k;
  Cut cut{b.lo, b.at_lo, b.at_hi};
  if (!tied) {
    const float within = b.lo + (log_odds(b.at_lo, stats.allowed) - log_odds(k, stats.allowed)) * slope;
    cut = exact_cut(v, round_up(found, W), stats.allowed, k, within, slope, b);
  }
  return filter_list(v, indices, found, k, cut);
}

// Turns a list of logits into weights exp(v - largest); the tail up to a whole vector becomes zero.
static float weigh_list(float* v, int64_t n, float largest) {
  const Vec::F top = Vec::set1(largest);
  Vec::F sum = Vec::zero();
  for (int64_t i = 0; i < n; i += W) {
    Vec::F p = exp_nonpositive(Vec::sub(Vec::load(v + i), top));
    if (i + W > n) p = Vec::select(Vec::upto(static_cast<int>(i), static_cast<int>(n - 1)), p, Vec::zero());
    sum = Vec::add(sum, p);
    Vec::store(v + i, p);
  }
  return Vec::sum(sum);
}

static float least_of(const float* v, int64_t n) {
  Vec::F least = Vec::set1(kInf);
  int64_t i = 0;
  for (; i + W <= n; i += W) least = Vec::min(least, Vec::load(v + i));
  float x = Vec::smallest(least);
  for (; i < n; ++i) x = v[i] < x ? v[i] : x;
  return x;
}

static float largest_of(const float* v, int64_t n) {
  int64_t i = 0;
  Vec::F most = Vec::set1(-kInf);
  for (; i + W <= n; i += W) most = Vec::max(most, Vec::load(v + i));
  float x = Vec::largest(most);
  for (; i < n; ++i) x = v[i] > x ? v[i] : x;
  return x;
}

static RowState forward_list(Tile& tile, int64_t r, int64_t columns, const RowStats& stats, int64_t k, Habit& habit) {
  RowState state{0, 0.0f, stats.largest, -kInf, -1, false};
  const bool all = stats.allowed <= k;
  state.kept = select_list(tile, r, columns, stats, k, habit);
  float* v = tile.row(r);
  if (!all) {
    state.kth = least_of(v, state.kept);
    state.last_tie = last_equal(v, tile.row_indices(r), state.kept, state.kth);
  }
  state.sum = weigh_list(v, state.kept, stats.largest);
  return state;
}

// Weights in place, zero where a key is dropped: for a matrix product with all values.
static RowState forward_dense(Tile& tile, int64_t r, int64_t columns, const RowStats& stats, int64_t k, Habit& habit) {
  RowState state{columns, 0.0f, stats.largest, -kInf, -1, false};
  float* v = tile.row(r);
  const int64_t n = round_up(columns, W);
  const bool all = stats.allowed <= k;
  float tau = kLowest;
  int32_t last = static_cast<int32_t>(n);
  if (!all) {
    const float guess = first_guess(stats, static_cast<double>(k), habit.correction);
    const Cut cut = exact_cut(v, n, stats.allowed, k, guess, slope_of(stats), {kLowest, kInf, stats.allowed, 0});
    habit.learn(stats, k, cut.tau);
    tau = cut.tau;
    if (cut.at_least > k) {
      int64_t room = k - cut.above;
      for (int64_t i = 0; room > 0; ++i)
        if (v[i] == tau && --room == 0) last = static_cast<int32_t>(i);
    }
  }
  const Vec::F threshold = Vec::set1(tau), top = Vec::set1(stats.largest);
  Vec::F sum = Vec::zero(), least = Vec::set1(kInf);
  const bool tied = last < n;
  const auto kept = [&](Vec::F x, int64_t i) { return tied ? kept_lanes(x, threshold, i, last) : Vec::ge(x, threshold); };
  for (int64_t i = 0; i < n; i += W) {
    const Vec::F x = Vec::load(v + i);
    const typename Vec::Mask in = kept(x, i);
    least = Vec::min(least, Vec::select(in, x, Vec::set1(kInf)));
  }
  if (!all) {
    state.kth = Vec::smallest(least);
    state.last_tie = tied ? last : last_equal(v, nullptr, n, state.kth);
  }
  for (int64_t i = 0; i < n; i += W) {
    const Vec::F x = Vec::load(v + i);
    const typename Vec::Mask in = kept(x, i);
    const Vec::F p = Vec::select(in, exp_nonpositive(Vec::sub(x, top)), Vec::zero());
    sum = Vec::add(sum, p);
    Vec::store(v + i, p);
  }
  state.sum = Vec::sum(sum);
  return state;
}

// Calls f(row, begin, end) for the list entries of each row that lie in a block of keys, block after block.
template <class F>
static REGARD_INLINE void by_key_blocks(
    const Layout& l, const Tile& tile, int64_t columns, int64_t count, const int64_t* kept, const F& f) {
  int64_t done[2 * MR] = {};
  for (int64_t m = 0; m < columns; m += l.key_block)
    for (int64_t r = 0; r < count; ++r) {
      const int32_t* indices = tile.row_indices(r);
      const int64_t begin = done[r];
      int64_t end = begin;
      while (end < kept[r] && indices[end] < m + l.key_block) ++end;
      if (end == begin) continue;
      done[r] = end;
      f(r, begin, end);
    }
}

static void forward_tile(
    const KnnProblem& p, const Layout& l, Tile& tile, int64_t batch, int64_t head, int64_t first, int64_t count,
    const float* values, float* out, Habit& habit) {
  RowState states[2 * MR];
  int64_t kept[2 * MR];
  const int64_t columns = visible(p, first + count - 1);
  const int64_t rows = l.dense_weights ? round_up(count, Vec::kMixRows) : count;
  __builtin_memset(out, 0, rows * l.value_padded * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    const int64_t query = first + r, own = visible(p, query);
    tile.mask(batch, head, r, query);
    const RowStats stats = row_stats(tile.row(r), own, p.mask_kind != MaskKind::kNone);
    RowState& state = states[r];
    if (stats.broken || stats.allowed == 0) {
      state = {0, 0.0f, 0.0f, stats.broken ? kNaN : -kInf, -1, stats.broken};
    } else if (l.dense_weights) {
      state = forward_dense(tile, r, own, stats, p.topk, habit);
    } else {
      state = forward_list(tile, r, own, stats, p.topk, habit);
    }
    kept[r] = state.kept;
    if (l.dense_weights) {
      const int64_t written = state.kept ? round_up(own, W) : 0;
      for (int64_t m = written; m < columns; ++m) tile.row(r)[m] = 0.0f;
    }
  }
  if (l.dense_weights) {
    for (int64_t r = count; r < rows; ++r) __builtin_memset(tile.row(r), 0, columns * sizeof(float));
    for (int64_t m = 0; m < columns; m += l.key_block)
      by_channels(l.value_padded, [&](auto nv, int64_t c) {
        for (int64_t r = 0; r < rows; r += Vec::kMixRows)
          mix<nv()>(tile.row(r), l.ld, values + c, l.value_padded, m, smaller(columns, m + l.key_block),
                    out + r * l.value_padded + c, l.value_padded);
      });
  } else {
    by_key_blocks(l, tile, columns, count, kept, [&](int64_t r, int64_t begin, int64_t end) {
      by_channels(l.value_padded, [&](auto nv, int64_t c) {
        gather<nv()>(tile.row(r), tile.row_indices(r), begin, end, values + c, l.value_padded, out + r * l.value_padded + c);
      });
    });
  }
  for (int64_t r = 0; r < count; ++r) {
    const RowState& state = states[r];
    const int64_t place = (batch * p.heads + head) * p.queries + first + r;
    p.lse[place] = state.broken ? kNaN : state.sum > 0.0f ? state.largest + __builtin_logf(state.sum) : -kInf;
    p.kth_logit[place] = state.kth;
    p.last_tie[place] = state.last_tie;
    // A row that keeps nothing is all zeros and stays so.
    const Vec::F sum = Vec::set1(state.broken ? kNaN : state.sum > 0.0f ? state.sum : 1.0f);
    float* row = out + r * l.value_padded;
    for (int64_t c = 0; c < l.value_padded; c += W) Vec::store(row + c, Vec::div(Vec::load(row + c), sum));
    char* target = const_cast<char*>(at(p.output, batch, head, first + r));
    store_row(target, p.output.stride[3], p.output.dtype, p.value_dim, 1.0f, row);
  }
}

static void forward(const KnnProblem& p, const Unit* units, int64_t count) {
  const Layout l(p);
  Scratch scratch(Tile::floats(p, l) + l.keys_padded * (p.dim + l.value_padded) + NR * l.dim_padded +
                  l.rows_padded * l.value_padded + 256);
  Tile tile(p, l, scratch);
  float* panels = scratch.take(l.keys_padded * p.dim);
  float* values = scratch.take(l.keys_padded * l.value_padded);
  float* rows = scratch.take(NR * l.dim_padded);
  float* out = scratch.take(l.rows_padded * l.value_padded);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    pack_panels(p.key, u->batch, u->key_head, p.keys, p.dim, rows, panels);
    pack_rows(p.value, u->batch, u->key_head, p.keys, p.value_dim, l.value_padded, values);
    for (int64_t g = 0; g < group; ++g) {
      Habit habit;
      const int64_t head = u->key_head * group + g;
      for (int64_t n = u->row_begin; n < u->row_end; n += l.rows) {
        const int64_t here = smaller(l.rows, u->row_end - n);
        tile.score(u->batch, head, n, here, panels);
        forward_tile(p, l, tile, u->batch, head, n, here, values, out, habit);
      }
    }
  }
}
