// The grid in memory: lines along the last axis, channel by channel, and the tiles of W queries that lines fall into.
// Included inside an instruction set's namespace, after neighborhood_micro.h.
#pragma once

// Channels should not all fall into one set of the cache.
static int64_t spaced(int64_t floats) {
  const int64_t ld = round_up(floats, 8);
  return ld % 32 == 0 ? ld + 8 : ld;
}

struct Layout {
  int64_t dim_padded, value_padded;
  int64_t lines, places, ld;  // of keys: lines of `places` keys, channels `ld` floats apart
  int64_t margin, ldq;        // of queries: with room for zeros before and after
  int64_t key_size, value_size;
  int64_t rows;               // slots of the first two axes together

  explicit Layout(const NeighborhoodProblem& p)
      : dim_padded(round_up(p.dim, W)), value_padded(round_up(p.value_dim, W)),
        lines(p.axes[0].places * p.axes[1].places), places(p.axes[2].places), ld(spaced(places)), margin(W),
        ldq(spaced(places + 4 * W)), key_size(ld * p.dim), value_size(ld * p.value_dim),
        rows(p.axes[0].window * p.axes[1].window) {}
  // Slots are read up to a vector beyond the last line. What stands there is never used: it may be anything.
  static constexpr int64_t kBeyond = 4 * W;
};

// Tokens as rows of channels, to and from lines of places, W x W numbers at a time.
class Turner {
 public:
  static int64_t floats(const Layout& l) { return W * widest(l) + widest(l) + W * W + 16 * 3; }
  Turner(const Layout& l, Scratch& scratch)
      : ld_(widest(l)), rows_(scratch.take(W * ld_)), zeros_(scratch.take(ld_)), spare_(scratch.take(W * W)) {
    __builtin_memset(zeros_, 0, ld_ * sizeof(float));
  }

  // Reads `places` tokens into channels `ld` floats apart; token(place) is the token there, -1 for zeros.
  template <class F>
  void pack(const Tensor4& t, int64_t b, int64_t h, int64_t dim, float factor, int64_t places, const F& token, float* out,
            int64_t ld) {
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t c = 0; c < places; c += W) {
      if (c + W > places && places >= W) c = places - W;  // the last block overlaps
      const int64_t here = smaller(W, places - c);
      const char* from[W];
      for (int64_t i = 0; i < W; ++i) {
        const int64_t n = i < here ? token(c + i) : -1;
        from[i] = n < 0 ? reinterpret_cast<const char*>(zeros_) : at(t, b, h, n);
      }
      for (int64_t i = c + W; i < smaller(c + 2 * W, places); ++i)  // tokens stand far apart: the next ones, early
        if (const int64_t n = token(i); n >= 0)
          for (int64_t byte = 0; byte < dim * size; byte += 64) __builtin_prefetch(at(t, b, h, n) + byte);
      const bool direct = here == W && t.stride[3] == 1;
      const int64_t whole = direct ? dim / W * W : 0;
      if (whole > 0) turn_tokens(from, t.dtype, factor, whole, out + c, ld);
      if (whole == dim) continue;
      for (int64_t i = 0; i < here; ++i) load_rest(from[i], t, whole, dim, factor, rows_ + i * ld_);
      for (int64_t d = whole; d < dim; ++d)
        for (int64_t i = 0; i < here; ++i) out[d * ld + c + i] = rows_[i * ld_ + d - whole];
    }
  }

  // The way back, for the places whose token is not -1.
  template <class F>
  void unpack(const float* from, int64_t ld, int64_t places, const F& token, float factor, const Tensor4& t, int64_t b,
              int64_t h, int64_t dim) {
    const bool direct = t.stride[3] == 1 && t.dtype == DType::kFloat32;
    for (int64_t c = 0; c < places; c += W) {
      char* to[W];
      for (int64_t i = 0; i < W; ++i) {
        const int64_t n = c + i < places ? token(c + i) : -1;
        to[i] = n < 0 ? nullptr : const_cast<char*>(at(t, b, h, n));
      }
      for (int64_t d = 0; d < dim; d += W) {
        Vec::F block[W];
        if (d + W <= dim) {
          turn(from + d * ld + c, ld, block);
        } else {
          for (int64_t i = 0; i < W; ++i)
            for (int64_t j = 0; j < W; ++j) spare_[i * W + j] = d + i < dim ? from[(d + i) * ld + c + j] : 0.0f;
          turn(spare_, W, block);
        }
        const bool whole = direct && d + W <= dim;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (!whole) {
            Vec::store(rows_ + i * ld_ + d, block[i]);
          } else if (to[i]) {
            Vec::store(reinterpret_cast<float*>(to[i]) + d, Vec::mul(block[i], Vec::set1(factor)));
          }
        }
      }
      const int64_t stored = direct ? dim / W * W : 0, size = t.dtype == DType::kFloat32 ? 4 : 2;
      for (int64_t i = 0; i < W && stored < dim; ++i)
        if (to[i]) store_row(to[i] + stored * size, t.stride[3], t.dtype, dim - stored, factor, rows_ + i * ld_ + stored);
    }
  }

 private:
  static int64_t widest(const Layout& l) { return l.dim_padded > l.value_padded ? l.dim_padded : l.value_padded; }

  static void turn_tokens(const char* const* from, DType dtype, float factor, int64_t dim, float* out, int64_t ld) {
    const Vec::F f = Vec::set1(factor);
    for (int64_t d = 0; d < dim; d += W) {
      Vec::F block[W];
      if (dtype == DType::kFloat32) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = Vec::mul(Vec::load(reinterpret_cast<const float*>(from[i]) + d), f);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = Vec::mul(widen(reinterpret_cast<const uint16_t*>(from[i]) + d, dtype), f);
      }
      turn(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) Vec::store(out + (d + i) * ld, block[i]);
    }
  }

  // Channels [first, dim).
  void load_rest(const char* from, const Tensor4& t, int64_t first, int64_t dim, float factor, float* row) const {
    const bool nothing = from == reinterpret_cast<const char*>(zeros_);
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2, stride = nothing ? 1 : t.stride[3];
    load_row(from + first * stride * size, stride, t.dtype, dim - first, factor, row);
  }

  const int64_t ld_;
  float *rows_, *zeros_, *spare_;
};

// W neighbouring queries of a line, whose windows start within W places: lane i's slot t is at place start + t + lanes[i].
struct Tile {
  int32_t first, count, self, start;
  bool even;   // lanes 0, 1, 2 ...
  int32_t shift;  // lanes[i] - i of most lanes, which are marked by 1 in `most`
  bool whole;  // W queries, all of whose slots count
  int32_t lanes[W], entry[W];  // entry: of slot 0 in the bias
  float low[W], high[W], most[W];
};

class Tiles {
 public:
  static int64_t floats(const NeighborhoodProblem& p) { return count_of(p.axes[2]) * kTileFloats + 16; }
  Tiles(const NeighborhoodProblem& p, Scratch& scratch)
      : count(count_of(p.axes[2])), tiles_(reinterpret_cast<Tile*>(scratch.take(count * kTileFloats))) {
    int64_t first = 0;
    for (int64_t i = 0; i < count; ++i) first += fill(p.axes[2], first, tiles_[i]);
  }
  const int64_t count;
  const Tile& operator[](int64_t i) const { return tiles_[i]; }

 private:
  static constexpr int64_t kTileFloats = (sizeof(Tile) + sizeof(float) - 1) / sizeof(float);

  // How many queries the tile that begins at `first` takes.
  static int64_t reach(const WindowAxis& x, int64_t first) {
    int64_t n = 1;
    while (n < W && first + n < x.length && x.start[first + n] - x.start[first] < W &&
           x.self[first + n] == x.self[first] + n)
      ++n;
    return n;
  }
  static int64_t count_of(const WindowAxis& x) {
    int64_t tiles = 0;
    for (int64_t first = 0; first < x.length; first += reach(x, first)) ++tiles;
    return tiles;
  }
  static int64_t fill(const WindowAxis& x, int64_t first, Tile& t) {
    const int64_t count = reach(x, first);
    t.first = static_cast<int32_t>(first), t.count = static_cast<int32_t>(count);
    t.self = x.self[first], t.start = x.start[first];
    t.even = true, t.whole = count == W;
    for (int32_t i = 0; i < W; ++i) {
      const int64_t a = first + smaller(i, count - 1);
      const bool there = i < count;
      t.lanes[i] = x.start[a] - t.start;
      t.entry[i] = static_cast<int32_t>(x.start[a] - x.self[a] + x.kernel - 1);
      t.low[i] = there ? static_cast<float>(x.low[a]) : 0.0f;
      t.high[i] = there ? static_cast<float>(x.high[a]) : 0.0f;
      t.even &= !there || t.lanes[i] == i;
      t.whole &= x.low[a] == 0 && x.high[a] == x.window;
    }
    t.shift = t.lanes[count / 2] - static_cast<int32_t>(count / 2);
    for (int32_t i = 0; i < W; ++i) t.most[i] = i < count && t.lanes[i] - i == t.shift ? 1.0f : 0.0f;
    return count;
  }

  Tile* tiles_;
};

// Keys and values of one key head; keys that are hidden hold zeros.
class Keys {
 public:
  static int64_t floats(const NeighborhoodProblem& p, const Layout& l) {
    return l.lines * (l.key_size + l.value_size + (p.visible ? l.ld : 0)) + 3 * Layout::kBeyond +
           p.prefix * (p.dim + p.value_dim + 1) + l.dim_padded + l.value_padded + 16 * 8;
  }
  Keys(const NeighborhoodProblem& p, const Layout& l, Turner& turner, Scratch& scratch)
      : keys(scratch.take(l.lines * l.key_size + Layout::kBeyond)), values(scratch.take(l.lines * l.value_size + Layout::kBeyond)),
        shown(p.visible ? scratch.take(l.lines * l.ld + Layout::kBeyond) : nullptr),
        prefix_keys(scratch.take(p.prefix * p.dim + l.dim_padded)), prefix_values(scratch.take(p.prefix * p.value_dim + l.value_padded)),
        prefix_shown(scratch.take(p.prefix)), problem_(p), layout_(l), turner_(turner) {}

  // Lines [first, last) of places, and the prefix.
  void load(int64_t batch, int64_t head, int64_t first, int64_t last) {
    const NeighborhoodProblem& p = problem_;
    const Layout& l = layout_;
    for (int64_t i = 0; i < p.prefix; ++i) {
      prefix_shown[i] = sees(batch, i) ? 0.0f : -kInf;
      load_prefix(p.key, batch, head, i, p.dim, prefix_keys);
      load_prefix(p.value, batch, head, i, p.value_dim, prefix_values);
    }
    for (int64_t line = first; line < last; ++line) {
      const int64_t before = token_of_line(line);
      const auto token = [&](int64_t place) -> int64_t {
        const int64_t n = before < 0 || p.axes[2].source[place] < 0 ? -1 : before + p.axes[2].source[place];
        return n >= 0 && p.visible && !sees(batch, n) ? -1 : n;
      };
      turner_.pack(p.key, batch, head, p.dim, 1.0f, l.places, token, keys + line * l.key_size, l.ld);
      turner_.pack(p.value, batch, head, p.value_dim, 1.0f, l.places, token, values + line * l.value_size, l.ld);
      if (shown)
        for (int64_t c = 0; c < l.places; ++c)
          shown[line * l.ld + c] =
              before < 0 || p.axes[2].source[c] < 0 || sees(batch, before + p.axes[2].source[c]) ? 0.0f : -kInf;
    }
  }

  // The token that the first coordinate along the last axis has on a line of places, -1 for a line of zeros.
  int64_t token_of_line(int64_t line) const {
    const WindowAxis *z = problem_.axes, *y = z + 1, *x = y + 1;
    const int32_t a = z->source[line / y->places], b = y->source[line % y->places];
    return a < 0 || b < 0 ? -1 : problem_.prefix + (a * y->length + b) * x->length;
  }

  float *keys, *values;  // [lines][channels][ld]
  float* shown;          // [lines][ld], 0 or -inf; null if all keys are
  float *prefix_keys, *prefix_values, *prefix_shown;  // rows of channels without padding

 private:
  bool sees(int64_t batch, int64_t token) const {
    const NeighborhoodProblem& p = problem_;
    return !p.visible || p.visible[batch * p.visible_stride[0] + token * p.visible_stride[1]];
  }
  void load_prefix(const Tensor4& t, int64_t batch, int64_t head, int64_t i, int64_t dim, float* out) const {
    // Rows are padded to whole vectors when they are read, and the next one overwrites that.
    if (sees(batch, i)) {
      load_row(at(t, batch, head, i), t.stride[3], t.dtype, dim, 1.0f, out + i * dim);
    } else {
      __builtin_memset(out + i * dim, 0, dim * sizeof(float));
    }
  }

  const NeighborhoodProblem& problem_;
  const Layout& layout_;
  Turner& turner_;
};

// Lines of queries [y, y + count) of the second axis at z of the first; in the kernels' order, not in the grid's.
struct Lines {
  int64_t z, y, count;
};

// The tokens of one line of queries, by their places: those of queries [x_begin, x_end), -1 for all else.
struct LineTokens {
  LineTokens(const NeighborhoodProblem& p, int64_t z, int64_t y, int64_t begin, int64_t end)
      : x(p.axes[2]), before(p.prefix + (p.axes[0].token[z] * p.axes[1].length + p.axes[1].token[y]) * p.axes[2].length),
        x_begin(begin), x_end(end) {}
  int64_t operator()(int64_t place) const {
    const int32_t a = x.owner[place];
    return a < x_begin || a >= x_end ? -1 : before + x.token[a];
  }
  const WindowAxis& x;
  const int64_t before, x_begin, x_end;
};

// Slots [row_begin, row_end) of the first two axes together, and [slot_begin, slot_end) of the last one.
struct Chunk {
  int64_t row_begin, row_end, slot_begin, slot_end;
  int64_t slots() const { return slot_end - slot_begin; }
  int64_t size() const { return (row_end - row_begin) * slots(); }
};

// Cuts windows into chunks of at most about `most` slots.
class Chunks {
 public:
  Chunks(const NeighborhoodProblem& p, const Layout& l, int64_t most)
      : rows_(l.rows), window_(p.axes[2].window), slots_(smaller(window_, most)),
        rows_each_(slots_ < window_ ? 1 : smaller(rows_, most / window_)), parts_((window_ + slots_ - 1) / slots_) {}
  int64_t count() const { return (rows_ + rows_each_ - 1) / rows_each_ * parts_; }
  int64_t largest() const { return rows_each_ * slots_; }
  int64_t rows_each() const { return rows_each_; }
  int64_t slots_each() const { return slots_; }
  Chunk operator[](int64_t i) const {
    const int64_t row = i / parts_ * rows_each_, slot = i % parts_ * slots_;
    return {row, smaller(row + rows_each_, rows_), slot, smaller(slot + slots_, window_)};
  }

 private:
  int64_t rows_, window_, slots_, rows_each_, parts_;
};

// Calls f(first line of queries, how many, line of places, row slot of each) for each line of keys that some of the lines
// of queries see within the chunk.
template <class F>
static REGARD_INLINE void by_key_lines(const NeighborhoodProblem& p, const Lines& q, const Chunk& chunk, const F& f) {
  const WindowAxis &z = p.axes[0], &y = p.axes[1];
  for (int64_t j = chunk.row_begin; j < chunk.row_end;) {
    const int64_t jz = j / y.window, first = j % y.window, last = smaller(y.window, first + chunk.row_end - j);
    j += last - first;
    if (jz < z.low[q.z] || jz >= z.high[q.z]) continue;
    int64_t begin[kLines], end[kLines], row[kLines];
    for (int64_t r = 0; r < q.count; ++r) {
      const int64_t low = y.low[q.y + r], high = y.high[q.y + r], start = y.start[q.y + r];
      begin[r] = start + (low > first ? low : first), end[r] = start + smaller(high, last);
    }
    int64_t r0 = 0, r1 = 0;  // both ends are ascending, so those who see a line are neighbours
    for (int64_t line = begin[0]; line < end[q.count - 1]; ++line) {
      while (r0 < q.count && end[r0] <= line) ++r0;
      if (r1 < r0) r1 = r0;
      while (r1 < q.count && begin[r1] <= line) ++r1;
      if (r0 >= r1) continue;
      for (int64_t r = r0; r < r1; ++r) row[r - r0] = jz * y.window + line - y.start[q.y + r];
      f(r0, r1 - r0, (z.start[q.z] + jz) * y.places + line, row);
    }
  }
}

// Calls f(row slot, slot of the first axis, of the second) for the slots of one line of queries that count.
template <class F>
static REGARD_INLINE void by_rows(const NeighborhoodProblem& p, int64_t qz, int64_t qy, const Chunk& chunk, const F& f) {
  const WindowAxis &z = p.axes[0], &y = p.axes[1];
  for (int64_t j = chunk.row_begin; j < chunk.row_end; ++j) {
    const int64_t jz = j / y.window, jy = j % y.window;
    if (jz >= z.low[qz] && jz < z.high[qz] && jy >= y.low[qy] && jy < y.high[qy]) f(j, jz, jy);
  }
}
