// Neighborhood attention, backward. Weights and the gradients of their logits are computed again, tile by tile; then they
// are laid out by the distance from query to key, so that the keys of a line can collect from the queries that see them:
// W neighbouring keys at once, in a fixed order. Included inside an instruction set's namespace, after
// neighborhood_forward.h.
#pragma once

// Slots of a window whose logits are held; a larger window is looked at twice.
constexpr int64_t kHeld = 256;

// Some tiles of a line, and by what distance (place of the key - place of the query) they see keys.
struct Span {
  int64_t tile_begin, tile_end;
  int64_t self, width;             // places of the queries: [self, self + width)
  int64_t nearest, farthest;       // distance of slot 0: at least, at most
  int64_t key_begin, key_end;      // places of slot 0 of the first and the last query

  static constexpr int64_t kWidth = 8 * W;

  Span(const WindowAxis& x, const Tiles& tiles, int64_t first) : tile_begin(first), tile_end(first), self(tiles[first].self) {
    const int64_t begin = tiles[first].first;
    int64_t end = begin;
    while (tile_end < tiles.count && tiles[tile_end].self + tiles[tile_end].count - self <= kWidth) {
      end = tiles[tile_end].first + tiles[tile_end].count;
      ++tile_end;
    }
    width = x.self[end - 1] + 1 - self;
    key_begin = x.start[begin], key_end = x.start[end - 1];
    nearest = farthest = x.start[begin] - x.self[begin];
    for (int64_t a = begin; a < end; ++a) {
      const int64_t distance = x.start[a] - x.self[a];
      nearest = smaller(nearest, distance);
      if (distance > farthest) farthest = distance;
    }
    query_begin = begin, query_end = end;
  }
  int64_t query_begin, query_end;
};

class BackwardLines {
 public:
  static int64_t floats(const NeighborhoodProblem& p, const Layout& l, const Tiles& tiles) {
    const Chunks chunks(p, l, kHeld);
    return kLines * (2 * l.ldq * p.dim + l.ldq * p.value_dim + p.dim * W + 2 * (chunks.largest() + p.prefix) * W) +
           Layout::kBeyond + 2 * by_distance_size(p, l, tiles) + tiles.count * kLines * 3 * W + 16 * 10;
  }

  BackwardLines(const NeighborhoodProblem& p, const NeighborhoodGradients& g, const Layout& l, const Tiles& tiles,
                const Keys& keys, HeadSums& sums, Turner& turner, Scratch& scratch)
      : problem_(p), grads_(g), layout_(l), tiles_(tiles), keys_(keys), sums_(sums), turner_(turner), chunks_(p, l, kHeld),
        products_(p, l), weights_(p, l, keys.shown), query_size_(l.ldq * p.dim), value_size_(l.ldq * p.value_dim),
        held_(chunks_.largest() * W), distances_(most_distances(p, tiles, chunks_)), line_size_(distances_ * kWide),
        queries_(scratch.take(kLines * query_size_)), outputs_(scratch.take(kLines * value_size_)),
        grad_queries_(scratch.take(kLines * query_size_ + Layout::kBeyond)), now_(scratch.take(kLines * p.dim * W)),
        p_(scratch.take(kLines * held_)), ds_(scratch.take(kLines * held_)), first_p_(scratch.take(kLines * p.prefix * W)),
        first_ds_(scratch.take(kLines * p.prefix * W)), known_(scratch.take(tiles.count * kLines * 3 * W)),
        by_distance_p_(scratch.take(by_distance_size(p, l, tiles))), by_distance_ds_(scratch.take(by_distance_size(p, l, tiles))) {
    __builtin_memset(queries_, 0, kLines * query_size_ * sizeof(float));
    __builtin_memset(outputs_, 0, kLines * value_size_ * sizeof(float));
  }

  // Queries [x_begin, x_end) of some lines. `group_head` is the head's number among those that share the keys.
  void run(int64_t batch, int64_t head, int64_t group_head, const Lines& q, int64_t x_begin, int64_t x_end) {
    const NeighborhoodProblem& p = problem_;
    const auto token = [&](int64_t r) { return LineTokens(p, q.z, q.y + r, x_begin, x_end); };
    const int64_t margin = layout_.margin, places = layout_.places, ldq = layout_.ldq;
    for (int64_t r = 0; r < q.count; ++r) {
      turner_.pack(p.query, batch, head, p.dim, p.scale, places, token(r), queries_ + r * query_size_ + margin, ldq);
      turner_.pack(grads_.grad_output, batch, head, p.value_dim, 1.0f, places, token(r), outputs_ + r * value_size_ + margin, ldq);
    }
    __builtin_memset(grad_queries_, 0, (kLines * query_size_ + Layout::kBeyond) * sizeof(float));
    for (int64_t tile = 0; tile < tiles_.count;) {
      const Span span(p.axes[2], tiles_, tile);
      // Queries of another unit: their gradients are zero here, and so is all that they hand on.
      if (span.query_end > x_begin && span.query_begin < x_end) run_span(head, group_head, q, span);
      tile = span.tile_end;
    }
    const Tensor4& gq = grads_.grad_query;
    for (int64_t r = 0; r < q.count; ++r)
      turner_.unpack(grad_queries_ + r * query_size_ + margin, ldq, places, token(r), p.scale, gq, batch, head, p.dim);
  }

 private:
  static constexpr int64_t kWide = Span::kWidth + 2 * W;  // queries of a span, with zeros before and after

  static int64_t most_distances(const NeighborhoodProblem& p, const Tiles& tiles, const Chunks& chunks) {
    int64_t most = 0;
    for (int64_t tile = 0; tile < tiles.count;) {
      const Span span(p.axes[2], tiles, tile);
      if (span.farthest - span.nearest > most) most = span.farthest - span.nearest;
      tile = span.tile_end;
    }
    return most + chunks.slots_each();
  }
  static int64_t by_distance_size(const NeighborhoodProblem& p, const Layout& l, const Tiles& tiles) {
    const Chunks chunks(p, l, kHeld);
    return kLines * chunks.rows_each() * most_distances(p, tiles, chunks) * kWide;
  }

  const float* query(int64_t r, const Tile& tile) const { return queries_ + r * query_size_ + layout_.margin + tile.self; }
  const float* output(int64_t r, const Tile& tile) const { return outputs_ + r * value_size_ + layout_.margin + tile.self; }
  float* known(int64_t i, int64_t r) const { return known_ + (i * kLines + r) * 3 * W; }

  void run_span(int64_t head, int64_t group_head, const Lines& q, const Span& span) {
    const bool twice = chunks_.count() > 1;
    for (int64_t i = span.tile_begin; twice && i < span.tile_end; ++i) measure(head, q, i);
    for (int64_t n = 0; n < chunks_.count(); ++n) {
      const Chunk chunk = chunks_[n];
      if (clear_span_ != span.tile_begin || clear_slot_ != chunk.slot_begin) {
        __builtin_memset(by_distance_p_, 0, kLines * chunks_.rows_each() * line_size_ * sizeof(float));
        __builtin_memset(by_distance_ds_, 0, kLines * chunks_.rows_each() * line_size_ * sizeof(float));
        clear_span_ = span.tile_begin, clear_slot_ = chunk.slot_begin;  // what is written is written by every line
      }
      for (int64_t i = span.tile_begin; i < span.tile_end; ++i) {
        if (!twice) measure(head, q, i);
        run_tile(head, q, i, chunk, twice, n == 0);
        for (int64_t r = 0; r < q.count; ++r) lay_out(q, r, tiles_[i], chunk, span);
      }
      for (int64_t r = 0; r < q.count; ++r) collect(group_head, q, r, chunk, span);
    }
  }

  void look(int64_t head, const Lines& q, const Tile& tile, const Chunk& chunk, Softmax* soft) {
    products_.score(q, tile, chunk, query(0, tile), query_size_, layout_.ldq, keys_.keys, problem_.dim, p_, held_);
    products_.score(q, tile, chunk, output(0, tile), value_size_, layout_.ldq, keys_.values, problem_.value_dim, ds_, held_);
    for (int64_t r = 0; r < q.count; ++r) weights_.finish(head, q.z, q.y + r, tile, chunk, p_ + r * held_, soft[r]);
  }

  void look_at_prefix(int64_t r, const Tile& tile, Softmax& soft) {
    const NeighborhoodProblem& p = problem_;
    float *s = first_p_ + r * p.prefix * W, *dp = first_ds_ + r * p.prefix * W;
    score_prefix(query(r, tile), layout_.ldq, keys_.prefix_keys, p.prefix, p.dim, s);
    score_prefix(output(r, tile), layout_.ldq, keys_.prefix_values, p.prefix, p.value_dim, dp);
    hide_prefix(keys_.prefix_shown, p.prefix, s, soft);
  }

  // The softmax of a tile's lines, and the mean gradient of their weights: shift, 1 / sum and mean, as `known`. Leaves
  // what weights are before they are divided, of the prefix and of the last chunk.
  void measure(int64_t head, const Lines& q, int64_t i) {
    const NeighborhoodProblem& p = problem_;
    const Tile& tile = tiles_[i];
    Softmax soft[kLines];
    float mean[kLines][W] = {};
    for (int64_t r = 0; r < q.count; ++r) {
      soft[r].clear();
      look_at_prefix(r, tile, soft[r]);
    }
    for (int64_t n = 0; n < chunks_.count(); ++n) {
      const Chunk chunk = chunks_[n];
      Vec::F before[kLines];
      for (int64_t r = 0; r < q.count; ++r) before[r] = soft[r].shift();
      look(head, q, tile, chunk, soft);
      for (int64_t r = 0; r < q.count; ++r) {
        const Vec::F shift = soft[r].shift();
        const Vec::F factor = exp_nonpositive(Vec::min(Vec::sub(before[r], shift), Vec::zero()));
        const float* dp = ds_ + r * held_;
        Vec::F sum = Vec::mul(Vec::load(mean[r]), factor);
        const Vec::F total = weights_.weigh(q.z, q.y + r, chunk, p_ + r * held_, shift, [&](int64_t slot, Vec::F weight) {
          // A place that does not count may hold anything.
          sum = Vec::add(sum, Vec::select(Vec::gt(weight, Vec::zero()), Vec::mul(weight, Vec::load(dp + slot * W)), Vec::zero()));
        });
        Vec::store(mean[r], sum);
        Vec::store(soft[r].total, Vec::fma(Vec::load(soft[r].total), factor, total));
      }
    }
    for (int64_t r = 0; r < q.count; ++r) {
      const Vec::F shift = soft[r].shift();
      float *s = first_p_ + r * p.prefix * W, *dp = first_ds_ + r * p.prefix * W;
      Vec::F total = Vec::load(soft[r].total), sum = Vec::load(mean[r]);
      for (int64_t t = 0; t < p.prefix; ++t) {
        const Vec::F weight = weight_of(Vec::load(s + t * W), shift);
        total = Vec::add(total, weight);
        sum = Vec::fma(weight, Vec::load(dp + t * W), sum);
        Vec::store(s + t * W, weight);
      }
      Vec::store(soft[r].total, total);
      float* stats = known(i, r);
      Vec::store(stats, shift);
      Vec::store(stats + W, soft[r].inverse());
      Vec::store(stats + 2 * W, Vec::mul(sum, soft[r].inverse()));
      mend(r, tile, stats);
    }
  }

  // A query whose logits or gradient are not finite spoils the keys that it sees, and no others: its channels become
  // zeros, which other keys' zero weights may meet, and its own weights NaN.
  void mend(int64_t r, const Tile& tile, float* stats) {
    const Vec::F mean = Vec::load(stats + 2 * W), most = Vec::set1(-kLowest);
    const unsigned good = Vec::bits(Vec::both(Vec::ge(most, mean), Vec::ge(mean, Vec::set1(kLowest))));
    for (int32_t i = 0; i < tile.count; ++i) {
      if (good >> i & 1) continue;
      stats[2 * W + i] = kNaN;
      float *q = queries_ + r * query_size_ + layout_.margin + tile.self + i;
      float* go = outputs_ + r * value_size_ + layout_.margin + tile.self + i;
      for (int64_t d = 0; d < problem_.dim; ++d) q[d * layout_.ldq] = 0.0f;
      bool finite = true;
      for (int64_t c = 0; c < problem_.value_dim; ++c) finite &= go[c * layout_.ldq] - go[c * layout_.ldq] == 0.0f;
      if (finite) continue;
      stats[W + i] = kNaN;
      for (int64_t c = 0; c < problem_.value_dim; ++c) go[c * layout_.ldq] = 0.0f;
    }
  }

  // Weights and gradients of logits in place, and what they add to the queries' gradients.
  void run_tile(int64_t head, const Lines& q, int64_t i, const Chunk& chunk, bool again, bool first) {
    const NeighborhoodProblem& p = problem_;
    const Tile& tile = tiles_[i];
    if (again) {
      Softmax unused[kLines];
      for (int64_t r = 0; r < q.count; ++r) unused[r].clear();
      look(head, q, tile, chunk, unused);
      for (int64_t r = 0; r < q.count; ++r) {
        const Vec::F shift = Vec::load(known(i, r));
        weights_.weigh(q.z, q.y + r, chunk, p_ + r * held_, shift, [](int64_t, Vec::F) {});
        if (!first) continue;
        look_at_prefix(r, tile, unused[r]);
        float* s = first_p_ + r * p.prefix * W;
        for (int64_t t = 0; t < p.prefix; ++t) Vec::store(s + t * W, weight_of(Vec::load(s + t * W), shift));
      }
    }
    __builtin_memset(now_, 0, q.count * p.dim * W * sizeof(float));
    for (int64_t r = 0; r < q.count; ++r) {
      const float* stats = known(i, r);
      by_rows(p, q.z, q.y + r, chunk, [&](int64_t j, int64_t, int64_t) {
        const int64_t slot = (j - chunk.row_begin) * chunk.slots() * W;
        differentiate(p_ + r * held_ + slot, ds_ + r * held_ + slot, chunk.slots(), stats);
      });
      if (first && p.prefix > 0) run_prefix(r, tile, stats);
    }
    products_.mix(q, tile, chunk, ds_, held_, keys_.keys, p.dim, now_);
    for (int64_t r = 0; r < q.count; ++r)
      for (int64_t d = 0; d < p.dim; ++d) {
        float* target = grad_queries_ + r * query_size_ + d * layout_.ldq + layout_.margin + tile.self;
        // Lanes beyond the tile are the next one's, which comes later.
        const Vec::F sum = Vec::load(now_ + (r * p.dim + d) * W);
        Vec::store(target, first ? sum : keep(tile, Vec::add(Vec::load(target), sum), Vec::load(target)));
      }
  }

  static REGARD_INLINE Vec::F keep(const Tile& tile, Vec::F a, Vec::F b) {
    return tile.count == W ? a : Vec::select(Vec::upto(0, tile.count - 1), a, b);
  }

  static void differentiate(float* p, float* ds, int64_t n, const float* stats) {
    const Vec::F inverse = Vec::load(stats + W), mean = Vec::load(stats + 2 * W), zero = Vec::zero();
    for (int64_t i = 0; i < n; ++i) {
      const Vec::F weight = Vec::load(p + i * W);
      const typename Vec::Mask counts = Vec::gt(weight, zero);
      const Vec::F share = Vec::mul(weight, inverse);
      Vec::store(p + i * W, Vec::select(counts, share, zero));
      Vec::store(ds + i * W, Vec::select(counts, Vec::mul(share, Vec::sub(Vec::load(ds + i * W), mean)), zero));
    }
  }

  void run_prefix(int64_t r, const Tile& tile, const float* stats) {
    const NeighborhoodProblem& p = problem_;
    float *weights = first_p_ + r * p.prefix * W, *gradients = first_ds_ + r * p.prefix * W;
    // Lanes beyond the tile hold other queries, or none.
    for (int64_t t = 0; t < p.prefix; ++t) Vec::store(weights + t * W, keep(tile, Vec::load(weights + t * W), Vec::zero()));
    differentiate(weights, gradients, p.prefix, stats);
    mix_prefix(gradients, keys_.prefix_keys, p.prefix, p.dim, now_ + r * p.dim * W);
    const int64_t ldq = layout_.ldq;
    for (int64_t t = 0; t < p.prefix; ++t) {
      const Vec::F weight = Vec::load(weights + t * W), gradient = Vec::load(gradients + t * W);
      for (int64_t d = 0; d < p.dim; ++d) add(sums_.prefix_keys + (t * p.dim + d) * W, gradient, query(r, tile) + d * ldq);
      for (int64_t c = 0; c < p.value_dim; ++c)
        add(sums_.prefix_values + (t * p.value_dim + c) * W, weight, output(r, tile) + c * ldq);
    }
  }
  static REGARD_INLINE void add(float* sum, Vec::F factor, const float* row) {
    Vec::store(sum, Vec::fma(factor, Vec::load(row), Vec::load(sum)));
  }

  float* by_distance(float* from, int64_t r, int64_t row, int64_t distance) const {
    return from + ((r * chunks_.rows_each() + row) * distances_ + distance) * kWide;
  }

  // Row by row, a slot's lanes to where their distances stand.
  void lay_out(const Lines& q, int64_t r, const Tile& tile, const Chunk& chunk, const Span& span) const {
    const int64_t place = W + tile.self - span.self;
    by_rows(problem_, q.z, q.y + r, chunk, [&](int64_t j, int64_t, int64_t) {
      const int64_t row = j - chunk.row_begin, slot = r * held_ + row * chunk.slots() * W;
      spread_lanes(tile, p_ + slot, by_distance(by_distance_p_, r, row, 0) + place, chunk.slots(), span);
      spread_lanes(tile, ds_ + slot, by_distance(by_distance_ds_, r, row, 0) + place, chunk.slots(), span);
    });
  }

  static void spread_lanes(const Tile& tile, const float* from, float* to, int64_t slots, const Span& span) {
    const int64_t zero = tile.start - tile.self - span.nearest;  // distance of lane 0's first slot
    const typename Vec::Mask most = Vec::gt(Vec::load(tile.most), Vec::zero());
    float* main = to + (zero + tile.shift) * kWide;
    for (int64_t t = 0; t < slots; ++t)
      Vec::store(main + t * kWide, Vec::select(most, Vec::load(from + t * W), Vec::zero()));
    if (tile.even) return;
    for (int32_t i = 0; i < tile.count; ++i) {
      if (tile.most[i] > 0.0f) continue;
      float* lane = to + (zero + tile.lanes[i] - i) * kWide + i;
      for (int64_t t = 0; t < slots; ++t) lane[t * kWide] = from[t * W + i];
    }
  }

  // Distances [first, last) by which W keys from place `key` on are seen by the span's queries, within these slots.
  void distances_to(int64_t key, const Chunk& chunk, const Span& span, int64_t* first, int64_t* last) const {
    const WindowAxis& x = problem_.axes[2];
    *first = 1, *last = 0;
    for (int64_t a = span.query_begin; a < span.query_end; ++a) {
      const int64_t begin = x.start[a] + chunk.slot_begin, end = x.start[a] + chunk.slot_end;
      if (begin >= key + W || end <= key) continue;
      const int64_t low = (begin > key ? begin : key) - x.self[a], high = smaller(end, key + W) - x.self[a];
      if (*first > *last) *first = low, *last = high;
      *first = smaller(*first, low);
      if (high > *last) *last = high;
    }
  }

  // Keys and values collect from one line of queries, and so do biases.
  void collect(int64_t group_head, const Lines& q, int64_t r, const Chunk& chunk, const Span& span) {
    const NeighborhoodProblem& p = problem_;
    const Layout& l = layout_;
    const WindowAxis &z = p.axes[0], &y = p.axes[1];
    const int64_t qy = q.y + r, nearest = span.nearest + chunk.slot_begin;
    const float* queries = queries_ + r * query_size_ + l.margin;
    const float* outputs = outputs_ + r * value_size_ + l.margin;
    for (int64_t key = span.key_begin + chunk.slot_begin; key < span.key_end + chunk.slot_end; key += W) {
      int64_t first, last;
      distances_to(key, chunk, span, &first, &last);
      if (first >= last) continue;
      const int64_t place = W + key - first - span.self;
      for (int64_t j = chunk.row_begin; j < chunk.row_end;) {
        const int64_t jz = j / y.window, jy = j % y.window, end = smaller(y.window, jy + chunk.row_end - j);
        j += end - jy;
        if (jz < z.low[q.z] || jz >= z.high[q.z]) continue;
        const int64_t stop = smaller(end, y.high[qy]);
        for (int64_t at = jy > y.low[qy] ? jy : y.low[qy]; at < stop;) {
          const int64_t left = stop - at, pieces = (left + kLines - 1) / kLines, here = (left + pieces - 1) / pieces;
          const int64_t line = (z.start[q.z] + jz) * y.places + y.start[qy] + at, row = jz * y.window + at - chunk.row_begin;
          with_constant<kLines>(here, [&](auto lines) {
            by_slots(last - first, [&](auto slots, int64_t t) {
              const float *weights[kLines], *gradients[kLines];
              float *keys[kLines], *values[kLines];
              for (int64_t i = 0; i < lines(); ++i) {
                weights[i] = by_distance(by_distance_p_, r, row + i, first + t - nearest) + place - t;
                gradients[i] = by_distance(by_distance_ds_, r, row + i, first + t - nearest) + place - t;
                keys[i] = sums_.keys + (line + i) * l.key_size + key;
                values[i] = sums_.values + (line + i) * l.value_size + key;
              }
              collect_slots<lines(), slots()>(gradients, kWide, queries + key - first - t, l.ldq, p.dim, keys, l.ld);
              collect_slots<lines(), slots()>(weights, kWide, outputs + key - first - t, l.ldq, p.value_dim, values, l.ld);
            });
          });
          at += here;
        }
      }
    }
    if (grads_.bias) collect_bias(group_head, q, r, chunk, span);
  }

  void collect_bias(int64_t group_head, const Lines& q, int64_t r, const Chunk& chunk, const Span& span) {
    const NeighborhoodProblem& p = problem_;
    const int64_t kernel = p.axes[2].kernel, first = span.nearest + chunk.slot_begin + kernel - 1;
    by_rows(p, q.z, q.y + r, chunk, [&](int64_t j, int64_t jz, int64_t jy) {
      float* biases = sums_.biases + (group_head * p.offsets + weights_.bias_row(q.z, q.y + r, jz, jy)) * W;
      for (int64_t o = 0; o < span.farthest - span.nearest + chunk.slots(); ++o) {
        if (first + o < 0 || first + o > 2 * kernel - 2) continue;  // slots that do not count
        const float* row = by_distance(by_distance_ds_, r, j - chunk.row_begin, o) + W;
        Vec::F sum = Vec::load(biases + (first + o) * W);
        for (int64_t c = 0; c < span.width; c += W) sum = Vec::add(sum, Vec::load(row + c));
        Vec::store(biases + (first + o) * W, sum);
      }
    });
  }

  const NeighborhoodProblem& problem_;
  const NeighborhoodGradients& grads_;
  const Layout& layout_;
  const Tiles& tiles_;
  const Keys& keys_;
  HeadSums& sums_;
  Turner& turner_;
  const Chunks chunks_;
  const Products products_;
  const Weights weights_;
  const int64_t query_size_, value_size_, held_, distances_, line_size_;
  float *queries_, *outputs_, *grad_queries_, *now_, *p_, *ds_, *first_p_, *first_ds_, *known_;
  float *by_distance_p_, *by_distance_ds_;  // [kLines][rows of a chunk][distances_][kWide]; zero where no query sees a key
  int64_t clear_span_ = -1, clear_slot_ = -1;
};

static int64_t partial_size(const NeighborhoodProblem& p) { return HeadSums::size(p, Layout(p)); }

static void backward(
    const NeighborhoodProblem& p, const NeighborhoodGradients& g, const Unit* units, int64_t count, float* partial) {
  const Layout l(p);
  Scratch for_tiles(Tiles::floats(p));
  const Tiles tiles(p, for_tiles);
  Scratch scratch(Turner::floats(l) + Keys::floats(p, l) + HeadSums::floats(p, l) + BackwardLines::floats(p, l, tiles) +
                  DenseQueries::floats(p, l));
  Turner turner(l, scratch);
  Keys keys(p, l, turner, scratch);
  HeadSums sums(p, l, scratch.take(HeadSums::floats(p, l)));
  BackwardLines lines(p, g, l, tiles, keys, sums, turner, scratch);
  DenseQueries dense(p, l, keys, scratch);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    const Share share(p, *u);
    const int64_t prefix_end = smaller(u->row_end, p.prefix);
    share.load(p, l, *u, keys);
    sums.clear();
    for (int64_t g_head = 0; g_head < group; ++g_head) {
      const int64_t head = u->key_head * group + g_head;
      for (int64_t n = u->row_begin; n < prefix_end; ++n) dense.differentiate(g, u->batch, head, n, sums);
      share.by_lines(p, [&](const Lines& q) { lines.run(u->batch, head, g_head, q, share.x_begin, share.x_end); });
    }
    if (partial == nullptr) {
      sums.store(g, *u, turner);
    } else {
      const int64_t size = partial_size(p);
      __builtin_memcpy(partial + (u - units) * size, sums.keys, size * sizeof(float));
    }
  }
}

// Adds the partial sums of one key head in the order of its units, so that the result is the same every time.
static void reduce(const NeighborhoodProblem& p, const NeighborhoodGradients& g, const Unit& unit, float* partial, int64_t parts) {
  const Layout l(p);
  const int64_t size = partial_size(p);
  Scratch scratch(Turner::floats(l) + HeadSums::floats(p, l));
  Turner turner(l, scratch);
  HeadSums sums(p, l, scratch.take(HeadSums::floats(p, l)));
  sums.clear();  // what lies beyond the last place is read
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums.keys[i] += partial[part * size + i];
  sums.store(g, unit, turner);
}
