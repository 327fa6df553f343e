// The nearest few tokens of every token: each pairwise product once, and no token x token matrix.
// Included inside an instruction set's namespace, after rows.h.
#pragma once

constexpr int64_t kTileRows = 2 * MR;
constexpr int64_t kTileColumns = 16 * NR;  // logits of a tile stay in the first cache

// A sorted list takes a key, which must be above its last. Of equal keys the earlier stays ahead.
static REGARD_INLINE void insert(float* keys, int32_t* indices, int64_t count, float key, int32_t index) {
  int64_t place = count - 1;
  for (; place > 0 && keys[place - 1] < key; --place) keys[place] = keys[place - 1], indices[place] = indices[place - 1];
  keys[place] = key, indices[place] = index;
}

static void scan(const NearestProblem& p, const Unit& unit, float* keys, int32_t* indices, float* norms) {
  const int64_t padded = round_up(p.tokens, NR), ld = kTileColumns + 16;
  Scratch scratch(padded * (p.channels + 2) + NR * round_up(p.channels, W) + kTileRows * (p.channels + ld) + 16 * 6);
  float* panels = scratch.take(padded * p.channels);
  float* half = scratch.take(padded);
  float* last = scratch.take(padded);  // the last key of each list: what a new one must exceed
  float* rows = scratch.take(NR * round_up(p.channels, W));
  float* tile = scratch.take(kTileRows * p.channels);
  float* scores = scratch.take(kTileRows * ld);
  pack_panels(p.x, unit.batch, 0, p.tokens, p.channels, rows, panels);
  const auto load_tile = [&](int64_t n, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t m = smaller(n + r, padded - 1);
      const float* panel = panels + m / NR * NR * p.channels + m % NR;
      float* channels = tile + r / MR * MR * p.channels + r % MR;
      for (int64_t d = 0; d < p.channels; ++d) channels[d * MR] = panel[d * NR];
    }
  };
  // Norms by the very products that make the distances: equal tokens are at no distance, whatever the rounding.
  for (int64_t n = 0; n < padded; ++n) half[n] = kInf, last[n] = -kInf;
  for (int64_t n = 0; n < padded; n += NR)
    for (int64_t g = n; g < n + NR; g += MR) {
      load_tile(g, MR);
      score_micro(tile, panels + n * p.channels, p.channels, scores, ld);
      for (int64_t m = g; m < smaller(smaller(g + MR, n + NR), p.tokens); ++m)
        if (p.part[unit.batch * p.tokens + m]) half[m] = 0.5f * scores[(m - g) * ld + m - n];
    }
  __builtin_memcpy(norms, half, p.tokens * sizeof(float));
  for (int64_t i = 0; i < p.tokens * p.count; ++i) keys[i] = -kInf, indices[i] = 0;

  for (int64_t n = unit.row_begin; n < unit.row_end; n += kTileRows) {
    const int64_t here = smaller(kTileRows, unit.row_end - n);
    load_tile(n, kTileRows);
    for (int64_t m = n / NR * NR; m < p.tokens; m += kTileColumns) {
      const int64_t columns = smaller(kTileColumns, padded - m);
      score_tile(tile, (here + MR - 1) / MR, panels + m * p.channels, columns, p.channels, scores, ld);
      for (int64_t r = 0; r < here; ++r) {
        const int64_t i = n + r;
        float* s = scores + r * ld;
        for (int64_t j = m; j <= i && j < m + columns; ++j) s[j - m] = -kInf;  // each pair once
        const Vec::F own = Vec::set1(half[i]);
        for (int64_t c = i < m ? 0 : (i + 1 - m) / W * W; c < columns; c += W) {
          const Vec::F product = Vec::load(s + c);
          const Vec::F to_row = Vec::sub(product, Vec::load(half + m + c)), to_column = Vec::sub(product, own);
          unsigned row_wins = Vec::bits(Vec::gt(to_row, Vec::set1(last[i])));
          unsigned column_wins = Vec::bits(Vec::gt(to_column, Vec::load(last + m + c)));
          if (!(row_wins | column_wins)) continue;
          float found[W];
          Vec::store(found, to_row);
          for (; row_wins; row_wins &= row_wins - 1) {
            const int64_t lane = __builtin_ctz(row_wins);
            if (!(found[lane] > last[i])) continue;
            insert(keys + i * p.count, indices + i * p.count, p.count, found[lane], static_cast<int32_t>(m + c + lane));
            last[i] = keys[(i + 1) * p.count - 1];
          }
          Vec::store(found, to_column);
          for (; column_wins; column_wins &= column_wins - 1) {
            const int64_t lane = __builtin_ctz(column_wins), j = m + c + lane;
            if (j >= p.tokens) break;
            insert(keys + j * p.count, indices + j * p.count, p.count, found[lane], static_cast<int32_t>(i));
            last[j] = keys[(j + 1) * p.count - 1];
          }
        }
      }
    }
  }
}

static void finish(const NearestProblem& p, const Unit& unit, int64_t parts, const float* keys, const int32_t* indices,
                   const float* norms, float* squares, int64_t* nearest) {
  float best[kMostNeighbors];
  int32_t whom[kMostNeighbors];
  for (int64_t i = unit.row_begin; i < unit.row_end; ++i) {
    for (int64_t c = 0; c < p.count; ++c) best[c] = -kInf, whom[c] = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t list = (part * p.tokens + i) * p.count;
      for (int64_t c = 0; c < p.count && keys[list + c] > best[p.count - 1]; ++c)  // the lists are in order
        insert(best, whom, p.count, keys[list + c], indices[list + c]);
    }
    const int64_t out = (unit.batch * p.tokens + i) * (1 + p.count);
    squares[out] = 0.0f, nearest[out] = i;
    for (int64_t c = 0; c < p.count; ++c) {
      const float square = 2.0f * (norms[i] - best[c]);
      squares[out + 1 + c] = square > 0.0f ? square : 0.0f, nearest[out + 1 + c] = whom[c];
    }
  }
}
