// Neighborhood attention, forward: a few lines of queries at a time, along them tile after tile; the logits of a whole
// window, or of a chunk of a large one with a running softmax. Included inside an instruction set's namespace, after
// neighborhood_grid.h.
#pragma once

// Slots of a window that are looked at together: what the L1 cache holds for three lines.
constexpr int64_t kChunk = 128;

// Products with the keys of one chunk, for a tile of some lines.
class Products {
 public:
  Products(const NeighborhoodProblem& p, const Layout& l) : problem_(p), layout_(l) {}

  // Slots' results stand W floats each, chunk.size() of them a line.
  void score(const Lines& q, const Tile& tile, const Chunk& chunk, const float* queries, int64_t query_size, int64_t ldq,
             const float* keys, int64_t dim, float* s, int64_t lds) const {
    by_key_lines(problem_, q, chunk, [&](int64_t r0, int64_t count, int64_t line, const int64_t* row) {
      const float *from[kLines], *k = keys + line * layout_.ld * dim + tile.start + chunk.slot_begin;
      float* to[kLines];
      with_constant<kLines>(count, [&](auto lines) {
        by_slots(chunk.slots(), [&](auto slots, int64_t t) {
          for (int64_t r = 0; r < lines(); ++r) {
            from[r] = queries + (r0 + r) * query_size;
            to[r] = s + (r0 + r) * lds + ((row[r] - chunk.row_begin) * chunk.slots() + t) * W;
          }
          if (tile.even) {
            score_slots<lines(), slots(), true>(from, ldq, k + t, layout_.ld, dim, tile.lanes, to);
          } else {
            score_slots<lines(), slots(), false>(from, ldq, k + t, layout_.ld, dim, tile.lanes, to);
          }
        });
      });
    });
  }

  // Adds weights times values to out, W floats a channel.
  void mix(const Lines& q, const Tile& tile, const Chunk& chunk, const float* weights, int64_t ldw, const float* values,
           int64_t dim, float* out) const {
    by_key_lines(problem_, q, chunk, [&](int64_t r0, int64_t count, int64_t line, const int64_t* row) {
      const float *from[kLines], *v = values + line * layout_.ld * dim + tile.start + chunk.slot_begin;
      float* to[kLines];
      with_constant<kLines>(count, [&](auto lines) {
        by_slots(chunk.slots(), [&](auto slots, int64_t t) {
          for (int64_t r = 0; r < lines(); ++r) {
            from[r] = weights + (r0 + r) * ldw + ((row[r] - chunk.row_begin) * chunk.slots() + t) * W;
            to[r] = out + (r0 + r) * dim * W;
          }
          if (tile.even) {
            mix_slots<lines(), slots(), true>(from, v + t, layout_.ld, dim, tile.lanes, to);
          } else {
            mix_slots<lines(), slots(), false>(from, v + t, layout_.ld, dim, tile.lanes, to);
          }
        });
      });
    });
  }

 private:
  const NeighborhoodProblem& problem_;
  const Layout& layout_;
};

// What the softmax of W queries of one line knows so far.
struct Softmax {
  float largest[W], total[W], sound[W];  // sound: 0 once a logit was NaN or infinite

  void clear() {
    for (int i = 0; i < W; ++i) largest[i] = -kInf, total[i] = 0.0f, sound[i] = 1.0f;
  }
  Vec::F shift() const {  // a row that sees nothing has no largest logit
    const Vec::F top = Vec::load(largest);
    return Vec::select(Vec::ge(top, Vec::set1(kLowest)), top, Vec::zero());
  }
  // 1 / total: NaN for broken rows, 0 for rows that see nothing.
  Vec::F inverse() const {
    const Vec::F sum = Vec::load(total);
    const Vec::F some = Vec::select(Vec::gt(sum, Vec::zero()), Vec::div(Vec::set1(1.0f), sum), Vec::zero());
    return Vec::select(Vec::gt(Vec::load(sound), Vec::zero()), some, Vec::set1(kNaN));
  }
};

// Bias, masks and softmax of a tile's logits.
class Weights {
 public:
  Weights(const NeighborhoodProblem& p, const Layout& l, const float* shown) : problem_(p), layout_(l), shown_(shown) {}

  // Makes logits of the products of one line: adds the bias, hides what does not count; raises the largest.
  void finish(int64_t head, int64_t qz, int64_t qy, const Tile& tile, const Chunk& chunk, float* s, Softmax& soft) const {
    const NeighborhoodProblem& p = problem_;
    Vec::F most = Vec::load(soft.largest), sound = Vec::load(soft.sound);
    const Vec::F low = Vec::load(tile.low), high = Vec::load(tile.high), none = Vec::set1(-kInf);
    const Vec::Lanes lanes = Vec::lanes(tile.lanes);
    const float* bias = p.bias ? p.bias + head * p.offsets : nullptr;
    by_rows(p, qz, qy, chunk, [&](int64_t j, int64_t jz, int64_t jy) {
      float* row = s + (j - chunk.row_begin) * chunk.slots() * W;
      const float* line = bias ? bias + bias_row(qz, qy, jz, jy) : nullptr;
      const float* seen = nullptr;
      if (shown_) {
        const int64_t place = (p.axes[0].start[qz] + jz) * p.axes[1].places + p.axes[1].start[qy] + jy;
        seen = shown_ + place * layout_.ld + tile.start;
      }
      for (int64_t t = 0; t < chunk.slots(); ++t) {
        const int64_t slot = chunk.slot_begin + t;
        Vec::F x = Vec::load(row + t * W);
        if (line) x = Vec::add(x, bias_of(line, tile, slot));
        if (seen) x = Vec::add(x, Vec::permute(Vec::load(seen + slot), lanes));
        if (!tile.whole) {
          const Vec::F at = Vec::set1(static_cast<float>(slot));
          x = Vec::select(Vec::both(Vec::ge(at, low), Vec::gt(high, at)), x, none);
        }
        if (line || seen || !tile.whole) Vec::store(row + t * W, x);
        most = Vec::max(x, most);
        sound = Vec::select(Vec::ge(Vec::set1(-kLowest), x), sound, Vec::zero());
      }
    });
    Vec::store(soft.largest, most);
    Vec::store(soft.sound, sound);
  }

  // Logits to exp(logit - shift) in place; their sum.
  template <class F>
  Vec::F weigh(int64_t qz, int64_t qy, const Chunk& chunk, float* s, Vec::F shift, const F& with) const {
    Vec::F total = Vec::zero();
    by_rows(problem_, qz, qy, chunk, [&](int64_t j, int64_t, int64_t) {
      const int64_t first = (j - chunk.row_begin) * chunk.slots();
      for (int64_t i = first; i < first + chunk.slots(); ++i) {
        const Vec::F weight = weight_of(Vec::load(s + i * W), shift);
        total = Vec::add(total, weight);
        Vec::store(s + i * W, weight);
        with(i, weight);
      }
    });
    return total;
  }

  // Where the bias of a line of slots stands: of the offset -(kernel - 1) along the last axis.
  int64_t bias_row(int64_t qz, int64_t qy, int64_t jz, int64_t jy) const {
    const WindowAxis &z = problem_.axes[0], &y = problem_.axes[1];
    const int64_t oz = z.start[qz] + jz - z.self[qz] + z.kernel - 1, oy = y.start[qy] + jy - y.self[qy] + y.kernel - 1;
    return (oz * (2 * y.kernel - 1) + oy) * (2 * problem_.axes[2].kernel - 1);
  }

 private:
  Vec::F bias_of(const float* line, const Tile& tile, int64_t slot) const {
    if (tile.even) return Vec::set1(line[tile.entry[0] + slot]);
    const int64_t last = 2 * problem_.axes[2].kernel - 2;
    float picked[W];
    for (int i = 0; i < W; ++i) picked[i] = line[smaller(tile.entry[i] + slot, last)];
    return Vec::load(picked);
  }

  const NeighborhoodProblem& problem_;
  const Layout& layout_;
  const float* shown_;
};

// Keys of the prefix, which all queries see: `count` products of W queries of one line with rows of channels.
static void score_prefix(const float* q, int64_t ldq, const float* keys, int64_t count, int64_t dim, float* s) {
  for (int64_t i = 0; i < count; ++i) {
    Vec::F sum = Vec::zero();
    for (int64_t d = 0; d < dim; ++d) sum = Vec::fma(Vec::load(q + d * ldq), Vec::set1(keys[i * dim + d]), sum);
    Vec::store(s + i * W, sum);
  }
}

static void mix_prefix(const float* weights, const float* values, int64_t count, int64_t dim, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Vec::F weight = Vec::load(weights + i * W);
    for (int64_t c = 0; c < dim; ++c)
      Vec::store(out + c * W, Vec::fma(weight, Vec::set1(values[i * dim + c]), Vec::load(out + c * W)));
  }
}

static void hide_prefix(const float* shown, int64_t count, float* s, Softmax& soft) {
  Vec::F most = Vec::load(soft.largest), sound = Vec::load(soft.sound);
  for (int64_t i = 0; i < count; ++i) {
    const Vec::F x = Vec::add(Vec::load(s + i * W), Vec::set1(shown[i]));
    Vec::store(s + i * W, x);
    most = Vec::max(x, most);
    sound = Vec::select(Vec::ge(Vec::set1(-kLowest), x), sound, Vec::zero());
  }
  Vec::store(soft.largest, most);
  Vec::store(soft.sound, sound);
}

class ForwardLines {
 public:
  static int64_t floats(const NeighborhoodProblem& p, const Layout& l) {
    const Chunks chunks(p, l, kChunk);
    return kLines * (l.ldq * p.dim + l.ldq * p.value_dim + 2 * p.value_dim * W) + Layout::kBeyond +
           kLines * largest(p, chunks) * W + 16 * 6;
  }
  ForwardLines(const NeighborhoodProblem& p, const Layout& l, const Tiles& tiles, const Keys& keys, Turner& turner, Scratch& scratch)
      : problem_(p), layout_(l), tiles_(tiles), keys_(keys), turner_(turner), chunks_(p, l, kChunk), products_(p, l),
        weights_(p, l, keys.shown), query_size_(l.ldq * p.dim), out_size_(l.ldq * p.value_dim), slots_(largest(p, chunks_) * W),
        queries_(scratch.take(kLines * query_size_)), out_(scratch.take(kLines * out_size_ + Layout::kBeyond)),
        now_(scratch.take(kLines * p.value_dim * W)), sum_(scratch.take(kLines * p.value_dim * W)),
        logits_(scratch.take(kLines * slots_)) {
    __builtin_memset(queries_, 0, kLines * query_size_ * sizeof(float));
    __builtin_memset(out_, 0, (kLines * out_size_ + Layout::kBeyond) * sizeof(float));
  }

  // Queries [x_begin, x_end) of some lines.
  void run(int64_t batch, int64_t head, const Lines& q, int64_t x_begin, int64_t x_end) {
    const NeighborhoodProblem& p = problem_;
    const auto token = [&](int64_t r) { return LineTokens(p, q.z, q.y + r, x_begin, x_end); };
    for (int64_t r = 0; r < q.count; ++r)
      turner_.pack(p.query, batch, head, p.dim, p.scale, layout_.places, token(r), queries_ + r * query_size_, layout_.ldq);
    for (int64_t i = 0; i < tiles_.count; ++i)
      if (tiles_[i].first + tiles_[i].count > x_begin && tiles_[i].first < x_end) run_tile(head, q, tiles_[i]);
    for (int64_t r = 0; r < q.count; ++r)
      turner_.unpack(out_ + r * out_size_, layout_.ldq, layout_.places, token(r), 1.0f, p.output, batch, head, p.value_dim);
  }

 private:
  static int64_t largest(const NeighborhoodProblem& p, const Chunks& chunks) {
    return chunks.largest() > p.prefix ? chunks.largest() : p.prefix;
  }

  void run_tile(int64_t head, const Lines& q, const Tile& tile) {
    const NeighborhoodProblem& p = problem_;
    const float* queries = queries_ + tile.self;
    const int64_t width = p.value_dim * W;
    Softmax soft[kLines];
    for (int64_t r = 0; r < q.count; ++r) soft[r].clear();
    bool first = true;
    if (p.prefix > 0) {
      for (int64_t r = 0; r < q.count; ++r) {
        float* s = logits_ + r * slots_;
        score_prefix(queries + r * query_size_, layout_.ldq, keys_.prefix_keys, p.prefix, p.dim, s);
        hide_prefix(keys_.prefix_shown, p.prefix, s, soft[r]);
        const Vec::F shift = soft[r].shift();
        Vec::F total = Vec::zero();
        for (int64_t i = 0; i < p.prefix; ++i) {
          const Vec::F weight = weight_of(Vec::load(s + i * W), shift);
          total = Vec::add(total, weight);
          Vec::store(s + i * W, weight);
        }
        Vec::store(soft[r].total, total);
        __builtin_memset(sum_ + r * width, 0, width * sizeof(float));
        mix_prefix(s, keys_.prefix_values, p.prefix, p.value_dim, sum_ + r * width);
      }
      first = false;
    }
    for (int64_t i = 0; i < chunks_.count(); ++i, first = false) {
      const Chunk chunk = chunks_[i];
      products_.score(q, tile, chunk, queries, query_size_, layout_.ldq, keys_.keys, p.dim, logits_, slots_);
      for (int64_t r = 0; r < q.count; ++r) take_in(head, q, r, tile, chunk, soft[r], first);
      __builtin_memset(now_, 0, q.count * width * sizeof(float));
      products_.mix(q, tile, chunk, logits_, slots_, keys_.values, p.value_dim, now_);
      for (int64_t c = 0; c < q.count * width; c += W)
        Vec::store(sum_ + c, first ? Vec::load(now_ + c) : Vec::add(Vec::load(sum_ + c), Vec::load(now_ + c)));
    }
    for (int64_t r = 0; r < q.count; ++r) {
      const Vec::F inverse = soft[r].inverse();
      for (int64_t c = 0; c < p.value_dim; ++c)
        Vec::store(out_ + r * out_size_ + c * layout_.ldq + tile.self,
                   Vec::mul(Vec::load(sum_ + r * width + c * W), inverse));
    }
  }

  // Logits of one line to weights under the largest so far; what came before shrinks accordingly.
  void take_in(int64_t head, const Lines& q, int64_t r, const Tile& tile, const Chunk& chunk, Softmax& soft, bool first) {
    float* s = logits_ + r * slots_;
    const Vec::F before = soft.shift(), total = Vec::load(soft.total);
    weights_.finish(head, q.z, q.y + r, tile, chunk, s, soft);
    const Vec::F shift = soft.shift();
    const Vec::F more = weights_.weigh(q.z, q.y + r, chunk, s, shift, [](int64_t, Vec::F) {});
    // A row that had seen nothing has nothing to shrink, whatever the factor.
    const Vec::F factor = exp_nonpositive(Vec::min(Vec::sub(before, shift), Vec::zero()));
    Vec::store(soft.total, Vec::fma(total, factor, more));
    if (first) return;
    float* row = sum_ + r * problem_.value_dim * W;
    for (int64_t c = 0; c < problem_.value_dim * W; c += W) Vec::store(row + c, Vec::mul(Vec::load(row + c), factor));
  }

  const NeighborhoodProblem& problem_;
  const Layout& layout_;
  const Tiles& tiles_;
  const Keys& keys_;
  Turner& turner_;
  const Chunks chunks_;
  const Products products_;
  const Weights weights_;
  const int64_t query_size_, out_size_, slots_;
  float *queries_, *out_, *now_, *sum_, *logits_;
};

// The part of the grid that a unit's tokens stand for: whole lines, or a part of the only one.
struct Share {
  int64_t line_begin, line_end, x_begin, x_end;  // lines of queries, in the kernels' order

  Share(const NeighborhoodProblem& p, const Unit& u) : line_begin(0), line_end(0), x_begin(0), x_end(p.axes[2].length) {
    const int64_t begin = u.row_begin > p.prefix ? u.row_begin - p.prefix : 0;
    const int64_t end = u.row_end > p.prefix ? u.row_end - p.prefix : 0;
    if (p.axes[0].length * p.axes[1].length == 1) {
      x_begin = begin, x_end = end, line_end = end > begin;
    } else if (x_end > 0) {
      line_begin = (begin + x_end - 1) / x_end, line_end = (end + x_end - 1) / x_end;
    }
  }
  // The keys that these queries see.
  void load(const NeighborhoodProblem& p, const Layout& l, const Unit& u, Keys& keys) const {
    if (u.row_begin < p.prefix) {
      keys.load(u.batch, u.key_head, 0, l.lines);
    } else if (line_begin < line_end) {
      keys.load(u.batch, u.key_head, first_place(p), last_place(p));
    }
  }
  // Calls f(lines) over all lines, a few at a time.
  template <class F>
  void by_lines(const NeighborhoodProblem& p, const F& f) const {
    const int64_t y = p.axes[1].length;
    for (int64_t line = line_begin; line < line_end;) {
      const int64_t here = smaller(smaller(kLines, line_end - line), y - line % y);
      f(Lines{line / y, line % y, here});
      line += here;
    }
  }

 private:
  // Lines of places [first, last) that their windows reach.
  int64_t first_place(const NeighborhoodProblem& p) const {
    const WindowAxis &z = p.axes[0], &y = p.axes[1];
    const int64_t a = line_begin / y.length, b = (line_end - 1) / y.length;
    return z.start[a] * y.places + (a == b ? y.start[line_begin % y.length] : 0);
  }
  int64_t last_place(const NeighborhoodProblem& p) const {
    const WindowAxis &z = p.axes[0], &y = p.axes[1];
    const int64_t a = line_begin / y.length, b = (line_end - 1) / y.length;
    return (z.start[b] + z.window - 1) * y.places + (a == b ? y.start[(line_end - 1) % y.length] + y.window : y.places);
  }
};

static void forward(const NeighborhoodProblem& p, const Unit* units, int64_t count) {
  const Layout l(p);
  Scratch scratch(Turner::floats(l) + Tiles::floats(p) + Keys::floats(p, l) + ForwardLines::floats(p, l) + DenseQueries::floats(p, l));
  Turner turner(l, scratch);
  const Tiles tiles(p, scratch);
  Keys keys(p, l, turner, scratch);
  ForwardLines lines(p, l, tiles, keys, turner, scratch);
  DenseQueries dense(p, l, keys, scratch);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    const Share share(p, *u);
    const int64_t prefix_end = smaller(u->row_end, p.prefix);
    share.load(p, l, *u, keys);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = u->key_head * group + g;
      for (int64_t n = u->row_begin; n < prefix_end; ++n) dense.attend(u->batch, head, n);
      share.by_lines(p, [&](const Lines& q) { lines.run(u->batch, head, q, share.x_begin, share.x_end); });
    }
  }
}
