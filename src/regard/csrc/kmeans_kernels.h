// One step of k-means over tiles of tokens: no token x cluster matrix.
// Included inside an instruction set's namespace, after rows.h.
#pragma once

static void assign(const KmeansProblem& p, const Unit* units, int64_t count, float* partial) {
  constexpr int64_t kRows = 2 * MR;
  const int64_t channels_padded = round_up(p.channels, W), clusters_padded = round_up(p.clusters, NR), ld = clusters_padded + 16;
  Scratch scratch(clusters_padded * (p.channels + 1) + kRows * (p.channels + channels_padded + ld) + 16 * 5);
  float* panels = scratch.take(clusters_padded * p.channels);
  float* half_squares = scratch.take(clusters_padded);
  float* tile_channels = scratch.take(kRows * p.channels);
  float* tile = scratch.take(kRows * channels_padded);
  float* scores = scratch.take(kRows * ld);
  int64_t loaded = -1;
  for (const Unit* u = units; u < units + count; ++u) {
    if (u->batch != loaded) {
      loaded = u->batch;
      const float* centroids = p.centroids + u->batch * p.clusters * p.channels;
      for (int64_t c = 0; c < clusters_padded; ++c) {
        float square = 0.0f;
        for (int64_t d = 0; d < p.channels; ++d) {
          const float x = c < p.clusters ? centroids[c * p.channels + d] : 0.0f;
          panels[(c / NR * p.channels + d) * NR + c % NR] = x;
          square += x * x;
        }
        half_squares[c] = c < p.clusters ? 0.5f * square : kInf;
      }
    }
    float* sums = partial ? partial + (u - units) * kmeans_partial_size(p) : nullptr;
    float* counts = sums + (sums ? p.clusters * p.channels : 0);
    if (sums) __builtin_memset(sums, 0, kmeans_partial_size(p) * sizeof(float));
    const float* origin = p.origin + u->batch * p.channels;
    for (int64_t n = u->row_begin; n < u->row_end; n += kRows) {
      const int64_t here = smaller(kRows, u->row_end - n);
      for (int64_t r = 0; r < kRows; ++r) {
        float* row = tile + r * channels_padded;
        const int64_t m = n + smaller(r, here - 1);
        load_row(at(p.x, u->batch, 0, m), p.x.stride[3], p.x.dtype, p.channels, 1.0f, row);
        for (int64_t d = 0; d < p.channels; ++d) row[d] -= origin[d];
        float* channels = tile_channels + r / MR * MR * p.channels + r % MR;
        for (int64_t d = 0; d < p.channels; ++d) channels[d * MR] = row[d];
      }
      score_tile(tile_channels, (here + MR - 1) / MR, panels, clusters_padded, p.channels, scores, ld);
      for (int64_t r = 0; r < here; ++r) {
        float* s = scores + r * ld;
        Vec::F most = Vec::set1(-kInf);
        for (int64_t c = 0; c < clusters_padded; c += W) {
          const Vec::F x = Vec::sub(Vec::load(s + c), Vec::load(half_squares + c));
          Vec::store(s + c, x);
          most = Vec::max(most, x);
        }
        // The first cluster that reaches the maximum; a token of NaN reaches none, and goes to the first.
        const Vec::F top = Vec::set1(Vec::largest(most));
        int64_t best = 0;
        for (int64_t c = 0; c < clusters_padded; c += W) {
          const unsigned reached = Vec::bits(Vec::eq(Vec::load(s + c), top));
          if (reached) {
            best = c + __builtin_ctz(reached);
            break;
          }
        }
        if (best >= p.clusters) best = 0;
        p.assignment[u->batch * p.tokens + n + r] = best;
        if (!sums) continue;
        if (p.mask && !p.mask[u->batch * p.mask_stride[0] + (n + r) * p.mask_stride[1]]) continue;
        const float* row = tile + r * channels_padded;
        for (int64_t d = 0; d < p.channels; ++d) sums[best * p.channels + d] += row[d];
        counts[best] += 1.0f;
      }
    }
  }
}
