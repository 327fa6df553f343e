// Which keys have the largest products with each query, and nothing of their values: knn_attention's logits and selection.
// Included inside an instruction set's namespace, after knn_kernels.h.
#pragma once

// A row with NaN or +inf in it, made one that the selection can take: NaN counts as largest, then +inf, then the rest.
static void make_finite(float* v, int64_t n, int64_t k) {
  int64_t odd = 0, infinite = 0;
  for (int64_t m = 0; m < n; ++m) {
    odd += v[m] != v[m];
    infinite += v[m] == kInf;
  }
  for (int64_t m = 0; m < n; ++m) {
    const bool is_odd = v[m] != v[m], is_infinite = v[m] == kInf;
    if (odd >= k) {
      v[m] = is_odd ? 0.0f : -kInf;
    } else if (odd + infinite >= k) {
      v[m] = is_odd ? 1.0f : is_infinite ? 0.0f : -kInf;
    } else if (is_odd || is_infinite) {
      v[m] = -kLowest;
    }
  }
}

static void lists(const KnnProblem& p, int64_t* out, const Unit* units, int64_t count) {
  const Layout l(p);
  Scratch scratch(Tile::floats(p, l) + l.keys_padded * p.dim + NR * l.dim_padded + 128);
  Tile tile(p, l, scratch);
  float* panels = scratch.take(l.keys_padded * p.dim);
  float* rows = scratch.take(NR * l.dim_padded);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    pack_panels(p.key, u->batch, u->key_head, p.keys, p.dim, rows, panels);
    for (int64_t head = u->key_head * group; head < (u->key_head + 1) * group; ++head) {
      Habit habit;
      for (int64_t n = u->row_begin; n < u->row_end; n += l.rows) {
        const int64_t here = smaller(l.rows, u->row_end - n);
        tile.score(u->batch, head, n, here, panels);
        for (int64_t r = 0; r < here; ++r) {
          const bool hidden = p.mask_kind != MaskKind::kNone;
          tile.mask(u->batch, head, r, n + r);
          RowStats stats = row_stats(tile.row(r), p.keys, hidden);
          if (stats.broken) {
            make_finite(tile.row(r), p.keys, p.topk);
            stats = row_stats(tile.row(r), p.keys, true);
          }
          int64_t* list = out + ((u->batch * p.heads + head) * p.queries + n + r) * p.topk;
          const int64_t kept = stats.allowed == 0 ? 0 : select_list(tile, r, p.keys, stats, p.topk, habit);
          const int32_t* indices = tile.row_indices(r);
          for (int64_t i = 0; i < kept; ++i) list[i] = indices[i];
          for (int64_t i = kept; i < p.topk; ++i) list[i] = -1;
        }
      }
    }
  }
}
