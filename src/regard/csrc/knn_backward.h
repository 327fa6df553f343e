// k-NN attention's backward: the forward's logits again, its selection from the saved k-th logit and last tie, and then
// only the kept keys. Included inside an instruction set's namespace, after knn_kernels.h.
#pragma once

// What the backward needs of one key head: rows of floats, padded to whole vectors.
struct HeadMemory {
  float *panels, *keys, *values, *rows;

  static int64_t floats(const KnnProblem& p, const Layout& l) {
    return l.keys_padded * (p.dim + l.dim_padded + l.value_padded) + NR * l.dim_padded + 4 * 16;
  }
  HeadMemory(const KnnProblem& p, const Layout& l, Scratch& scratch)
      : panels(scratch.take(l.keys_padded * p.dim)), keys(scratch.take(l.keys_padded * l.dim_padded)),
        values(scratch.take(l.keys_padded * l.value_padded)), rows(scratch.take(NR * l.dim_padded)) {}
  void load(const KnnProblem& p, const Layout& l, int64_t batch, int64_t key_head) {
    pack_panels(p.key, batch, key_head, p.keys, p.dim, rows, panels);
    pack_rows(p.key, batch, key_head, p.keys, p.dim, l.dim_padded, keys);
    pack_rows(p.value, batch, key_head, p.keys, p.value_dim, l.value_padded, values);
  }
};

// Gradients of a key head's keys and values, summed over the query rows: short sums over a run of rows, then the sum of
// those, since a key that thousands of queries keep would lose digits in one long chain.
class HeadGradients {
 public:
  static constexpr int64_t kRun = 256;  // query rows in a short sum

  static int64_t floats(const KnnProblem& p, const Layout& l) { return 2 * (size(p, l) + 16); }
  HeadGradients(const KnnProblem& p, const Layout& l, Scratch& scratch)
      : keys(scratch.take(size(p, l))), values(keys + p.keys * l.dim_padded), size_(size(p, l)),
        totals_(scratch.take(size_)) {}
  void clear() {
    __builtin_memset(keys, 0, size_ * sizeof(float));
    __builtin_memset(totals_, 0, size_ * sizeof(float));
  }
  // Ends a run of rows.
  const float* flush() {
    for (int64_t i = 0; i < size_; i += W) {
      Vec::store(totals_ + i, Vec::add(Vec::load(totals_ + i), Vec::load(keys + i)));
      Vec::store(keys + i, Vec::zero());
    }
    return totals_;
  }

  static int64_t size(const KnnProblem& p, const Layout& l) { return p.keys * (l.dim_padded + l.value_padded); }

  float *keys, *values;

 private:
  const int64_t size_;
  float* totals_;
};

// Selects a tile's kept keys again and gives their weights and the gradients of their logits.
class BackwardTile {
 public:
  static int64_t floats(const KnnProblem& p, const Layout& l) {
    return Tile::floats(p, l) + l.rows * (l.value_padded + l.ld) + 128;
  }
  BackwardTile(const KnnProblem& p, const KnnGradients& grads, const Layout& layout, Scratch& scratch)
      : tile(p, layout, scratch), grad_output(scratch.take(layout.rows * layout.value_padded)),
        grad_logits(scratch.take(layout.rows * layout.ld)), problem_(p), grads_(grads), layout_(layout) {}

  // Leaves, for each row, a list of kept keys with their weights.
  void select(int64_t batch, int64_t head, int64_t first, int64_t count, const HeadMemory& memory) {
    const KnnProblem& p = problem_;
    tile.score(batch, head, first, count, memory.panels);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = first + r, place = (batch * p.heads + head) * p.queries + query;
      tile.mask(batch, head, r, query);
      const Tensor4& go = grads_.grad_output;
      load_row(at(go, batch, head, query), go.stride[3], go.dtype, p.value_dim, 1.0f,
               grad_output + r * layout_.value_padded);
      kept[r] = select_again(r, visible(p, query), p.kth_logit[place], p.last_tie[place]);
      weigh(r, p.lse[place]);
    }
  }

  // Gradients of the weights of list entries [begin, end) of row r, kept where the logits' gradients will be.
  void differentiate_weights(int64_t r, int64_t begin, int64_t end, const float* values) {
    const int32_t* indices = tile.row_indices(r);
    const float* row = grad_output + r * layout_.value_padded;
    float* gradient = grad_logits + r * layout_.ld;
    for (int64_t i = begin; i < end; ++i)
      gradient[i] = dot(row, values + indices[i] * layout_.value_padded, layout_.value_padded);
  }

  // Gradients of the logits of row r, from those of its weights: p (dp - sum p dp). The sum is taken over the list, as
  // exact as the terms, and not as dot(output, its gradient), whose rounding stems from all channels.
  void differentiate_logits(int64_t r) {
    const float* weights = tile.row(r);
    float* gradient = grad_logits + r * layout_.ld;
    const int64_t n = kept[r];
    Vec::F total = Vec::zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) total = Vec::fma(Vec::load(weights + i), Vec::load(gradient + i), total);
    float sum = Vec::sum(total);
    for (int64_t j = i; j < n; ++j) sum += weights[j] * gradient[j];
    for (int64_t j = 0; j < n; ++j) gradient[j] = weights[j] * (gradient[j] - sum);
  }

  Tile tile;
  float *grad_output, *grad_logits;
  int64_t kept[2 * MR];

 private:
  int64_t select_again(int64_t r, int64_t columns, float kth, int32_t last_tie) {
    float* v = tile.row(r);
    int32_t* indices = tile.row_indices(r);
    for (int64_t m = columns; m < round_up(columns, W); ++m) v[m] = -kInf;
    if (kth != kth) {  // a broken row: every key it saw gets NaN
      for (int64_t m = 0; m < columns; ++m) indices[m] = static_cast<int32_t>(m);
      return columns;
    }
    if (kth == -kInf) return compress_row(v, indices, round_up(columns, W), kLowest);
    const Vec::F threshold = Vec::set1(kth);
    int64_t n = 0;
    for (int64_t m = 0; m < columns; m += W) {
      const Vec::F x = Vec::load(v + m);
      n += Vec::compress(v + n, indices + n, x, static_cast<int>(m), kept_lanes(x, threshold, m, last_tie));
    }
    return n;
  }

  // The softmax anew rather than exp(logit - lse): the rounding of a large log-sum-exp would be every weight's error.
  void weigh(int64_t r, float lse) {
    float* v = tile.row(r);
    const int64_t n = kept[r];
    if (n == 0) return;
    if (lse != lse) {
      for (int64_t i = 0; i < n; ++i) v[i] = kNaN;
      return;
    }
    const Vec::F sum = Vec::set1(weigh_list(v, n, largest_of(v, n)));
    for (int64_t i = 0; i < n; i += W) Vec::store(v + i, Vec::div(Vec::load(v + i), sum));
  }

  const KnnProblem& problem_;
  const KnnGradients& grads_;
  const Layout& layout_;
};

static void backward_tile(
    const KnnProblem& p, const KnnGradients& grads, const Layout& l, BackwardTile& back,
    const HeadMemory& memory, HeadGradients& sums, float* grad_query, int64_t batch, int64_t head, int64_t first, int64_t count) {
  back.select(batch, head, first, count, memory);
  __builtin_memset(grad_query, 0, count * l.dim_padded * sizeof(float));
  const int64_t columns = visible(p, first + count - 1);
  by_key_blocks(l, back.tile, columns, count, back.kept, [&](int64_t r, int64_t begin, int64_t end) {
    back.differentiate_weights(r, begin, end, memory.values);
    by_channels(l.value_padded, [&](auto nv, int64_t c) {
      scatter<nv()>(back.tile.row(r), back.tile.row_indices(r), begin, end, back.grad_output + r * l.value_padded + c,
                    sums.values + c, l.value_padded);
    });
  });
  for (int64_t r = 0; r < count; ++r) back.differentiate_logits(r);
  by_key_blocks(l, back.tile, columns, count, back.kept, [&](int64_t r, int64_t begin, int64_t end) {
    const int32_t* indices = back.tile.row_indices(r);
    const float* ds = back.grad_logits + r * l.ld;
    by_channels(l.dim_padded, [&](auto nv, int64_t c) {
      scatter<nv()>(ds, indices, begin, end, back.tile.q_rows + r * l.dim_padded + c, sums.keys + c, l.dim_padded);
      gather<nv()>(ds, indices, begin, end, memory.keys + c, l.dim_padded, grad_query + r * l.dim_padded + c);
    });
  });
  for (int64_t r = 0; r < count; ++r) {
    char* target = const_cast<char*>(at(grads.grad_query, batch, head, first + r));
    store_row(target, grads.grad_query.stride[3], grads.grad_query.dtype, p.dim, p.scale, grad_query + r * l.dim_padded);
  }
}

// `sums` holds the keys' rows, then the values'.
static void store_head(const KnnProblem& p, const KnnGradients& grads, const Layout& l, const Unit& u, const float* sums) {
  const Tensor4 &gk = grads.grad_key, &gv = grads.grad_value;
  const float* values = sums + p.keys * l.dim_padded;
  for (int64_t m = 0; m < p.keys; ++m) {
    store_row(const_cast<char*>(at(gk, u.batch, u.key_head, m)), gk.stride[3], gk.dtype, p.dim, 1.0f, sums + m * l.dim_padded);
    store_row(const_cast<char*>(at(gv, u.batch, u.key_head, m)), gv.stride[3], gv.dtype, p.value_dim, 1.0f,
              values + m * l.value_padded);
  }
}

static int64_t partial_size(const KnnProblem& p) { return HeadGradients::size(p, Layout(p)); }

static void backward(
    const KnnProblem& p, const KnnGradients& grads, const Unit* units, int64_t count, float* partial) {
  const Layout l(p);
  Scratch scratch(BackwardTile::floats(p, l) + HeadMemory::floats(p, l) + HeadGradients::floats(p, l) +
                  l.rows * l.dim_padded + 256);
  BackwardTile back(p, grads, l, scratch);
  HeadMemory memory(p, l, scratch);
  HeadGradients sums(p, l, scratch);
  float* grad_query = scratch.take(l.rows * l.dim_padded);
  const int64_t group = p.heads / p.key_heads;
  for (const Unit* u = units; u < units + count; ++u) {
    memory.load(p, l, u->batch, u->key_head);
    sums.clear();
    int64_t run = 0;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t n = u->row_begin; n < u->row_end; n += l.rows) {
        const int64_t here = smaller(l.rows, u->row_end - n);
        backward_tile(p, grads, l, back, memory, sums, grad_query, u->batch, u->key_head * group + g, n, here);
        if ((run += here) >= HeadGradients::kRun) {
          sums.flush();
          run = 0;
        }
      }
    const float* totals = sums.flush();
    if (partial == nullptr) {
      store_head(p, grads, l, *u, totals);
    } else {
      const int64_t size = partial_size(p);
      __builtin_memcpy(partial + (u - units) * size, totals, size * sizeof(float));
    }
  }
}

// Adds the partial sums of one key head in the order of its units, so that the result is the same every time.
static void reduce(const KnnProblem& p, const KnnGradients& grads, const Unit& unit, float* partial, int64_t parts) {
  const Layout l(p);
  const int64_t size = partial_size(p);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
  store_head(p, grads, l, unit, partial);
}

// A float mask's gradient. One call owns mask rows [row_begin, row_end) of mask batch b and head h and visits all that the
// mask was broadcast to, so no two threads add to one place and the order is fixed.
static void mask_gradient(
    const KnnProblem& p, const KnnGradients& grads, int64_t b, int64_t h, int64_t row_begin, int64_t row_end) {
  const Layout l(p);
  Scratch scratch(BackwardTile::floats(p, l) + HeadMemory::floats(p, l) + 256 + 2 * (p.keys + row_end - row_begin));
  BackwardTile back(p, grads, l, scratch);
  HeadMemory memory(p, l, scratch);
  const int64_t group = p.heads / p.key_heads;
  const bool all_batches = p.mask_size[0] == 1, all_heads = p.mask_size[1] == 1, all_rows = p.mask_size[2] == 1;
  const bool all_columns = p.mask_size[3] == 1;
  const int64_t width = p.mask_size[3];
  float* out = grads.grad_mask + (b * p.mask_size[1] + h) * p.mask_size[2] * width;
  // Long sums, over all rows or all columns, are few: they are kept in double.
  const int64_t long_sums = all_rows ? width : all_columns ? row_end - row_begin : 0;
  double* sums = reinterpret_cast<double*>(scratch.take(2 * long_sums));
  for (int64_t i = 0; i < long_sums; ++i) sums[i] = 0.0;
  for (int64_t batch = all_batches ? 0 : b; batch < (all_batches ? p.batch : b + 1); ++batch) {
    int64_t loaded = -1;
    for (int64_t head = all_heads ? 0 : h; head < (all_heads ? p.heads : h + 1); ++head) {
      if (head / group != loaded) memory.load(p, l, batch, loaded = head / group);
      for (int64_t n = all_rows ? 0 : row_begin, stop = all_rows ? p.queries : row_end; n < stop; n += l.rows) {
        const int64_t count = smaller(l.rows, stop - n);
        back.select(batch, head, n, count, memory);
        for (int64_t r = 0; r < count; ++r) {
          back.differentiate_weights(r, 0, back.kept[r], memory.values);
          back.differentiate_logits(r);
          const float* ds = back.grad_logits + r * l.ld;
          const int32_t* indices = back.tile.row_indices(r);
          for (int64_t i = 0; i < back.kept[r]; ++i) {
            if (all_rows) {
              sums[all_columns ? 0 : indices[i]] += ds[i];
            } else if (all_columns) {
              sums[n + r - row_begin] += ds[i];
            } else {
              out[(n + r) * width + indices[i]] += ds[i];
            }
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < long_sums; ++i) out[(all_rows ? 0 : row_begin) + i] = static_cast<float>(sums[i]);
}
