// Routed attention, backward. A tile of query rows computes its weights again, all of them before the gradients, which need
// each row's sum p dp; that sum is taken over the list, as exact as its terms. Included inside an instruction set's
// namespace, after routed_forward.h.
#pragma once

// Gradients of a key head: of its keys and extra keys, of their values, and of the extra keys' biases where these are the
// same for all queries. A key's tiles add up in short sums, and these in totals: a key that thousands of tiles list would
// lose digits in one long chain.
class HeadSums {
 public:
  static int64_t size(const RoutedProblem& p) {
    return (p.keys + p.extra) * (round_up(p.dim, W) + round_up(p.value_dim, W)) + p.heads / p.key_heads * p.extra;
  }
  static int64_t floats(const RoutedProblem& p) { return size(p) + p.keys + p.extra + 2 * 16; }
  // Where the parts stand, in `from`.
  struct Parts {
    Parts(const RoutedProblem& p, float* from)
        : keys(from), values(keys + (p.keys + p.extra) * round_up(p.dim, W)),
          bias(values + (p.keys + p.extra) * round_up(p.value_dim, W)) {}
    float *keys, *values, *bias;
  };

  HeadSums(const RoutedProblem& p, Scratch& scratch)
      : now(p, scratch.take(size(p))), problem_(p), added_(reinterpret_cast<int32_t*>(scratch.take(p.keys + p.extra))) {}

  void clear(float* totals) {
    totals_ = totals;
    __builtin_memset(now.keys, 0, size(problem_) * sizeof(float));
    __builtin_memset(totals_, 0, size(problem_) * sizeof(float));
    __builtin_memset(added_, 0, (problem_.keys + problem_.extra) * sizeof(int32_t));
  }
  // A tile has added to these keys.
  void count(const int32_t* index, int64_t keys) {
    for (int64_t i = 0; i < keys; ++i)
      if (++added_[index[i]] == kShort) flush(index[i]);
  }
  void flush_all() {
    for (int64_t i = 0; i < size(problem_); ++i) totals_[i] += now.keys[i];
  }

  const Parts now;  // the short sums

 private:
  static constexpr int32_t kShort = 32;  // tiles in a short sum

  void flush(int64_t place) {
    const RoutedProblem& p = problem_;
    const Parts totals(p, totals_);
    added_[place] = 0;
    move(now.keys, totals.keys, place * round_up(p.dim, W), round_up(p.dim, W));
    move(now.values, totals.values, place * round_up(p.value_dim, W), round_up(p.value_dim, W));
    for (int64_t i = place - p.keys; i >= 0 && i < p.heads / p.key_heads * p.extra; i += p.extra)
      move(now.bias, totals.bias, i, 1);
  }
  static void move(float* from, float* to, int64_t begin, int64_t count) {
    for (int64_t i = begin; i < begin + count; ++i) to[i] += from[i], from[i] = 0.0f;
  }

  const RoutedProblem& problem_;
  int32_t* added_;  // since a key's last flush
  float* totals_ = nullptr;
};

class BackwardTile {
 public:
  // How many query rows fit: their weights and the gradients of these stay within the cache if the list is not too long.
  static int64_t rows_for(int64_t columns) {
    constexpr int64_t kCapacity = 1 << 16;
    int64_t rows = kTile;
    while (rows > W && rows * columns > kCapacity) rows /= 2;
    return rows;
  }
  static int64_t floats(const RoutedProblem& p) {
    const int64_t columns = KeyList::capacity(p);
    return RowTile::floats(p.dim) + RowTile::floats(p.value_dim) + kTile * round_up(p.dim, W) +
           2 * rows_for(columns) * columns + 16 * 3;
  }
  BackwardTile(const RoutedProblem& p, const RoutedGradients& g, const KeyList& list, Scratch& scratch)
      : problem_(p), grads_(g), list_(list), queries_(p.query, p.dim, p.scale, scratch),
        grad_output_(g.grad_output, p.value_dim, 1.0f, scratch), grad_query_(scratch.take(kTile * queries_.ld)),
        weights_(scratch.take(rows_for(KeyList::capacity(p)) * KeyList::capacity(p))),
        grad_logits_(scratch.take(rows_for(KeyList::capacity(p)) * KeyList::capacity(p))) {}

  void run(int64_t batch, int64_t head, int64_t first, int64_t count, HeadSums& sums) {
    const RoutedProblem& p = problem_;
    const int64_t width = round_up(count, W), keys = list_.length;
    queries_.load(batch, head, first, count, width);
    grad_output_.load(batch, head, first, count, width);
    score(list_.keys, keys, queries_.panel, width, p.dim, weights_);
    score(list_.values, keys, grad_output_.panel, width, p.value_dim, grad_logits_);
    add_bias(p, list_, batch, head, first, count, 0, keys, weights_, width);
    for (int64_t r = 0; r < width; r += W) differentiate(weights_ + r, grad_logits_ + r, keys, width);
    bias_gradient(batch, head, first, count, width, sums.now.bias);
    __builtin_memset(grad_query_, 0, count * queries_.ld * sizeof(float));
    for (int64_t begin = 0; begin < keys; begin += kChunk) {
      const int64_t here = smaller(kChunk, keys - begin);
      const float *weights = weights_ + begin * width, *ds = grad_logits_ + begin * width;
      spread(weights, width, grad_output_.rows, grad_output_.ld, count, list_.index + begin, here, sums.now.values);
      spread(ds, width, queries_.rows, queries_.ld, count, list_.index + begin, here, sums.now.keys);
      blend(ds, width, list_.keys + begin, here, count, grad_query_, queries_.ld);
      sums.count(list_.index + begin, here);
    }
    const Tensor4& gq = grads_.grad_query;
    for (int64_t r = 0; r < count; ++r)
      store_row(const_cast<char*>(at(gq, batch, head, first + r)), gq.stride[3], gq.dtype, p.dim, p.scale,
                grad_query_ + r * queries_.ld);
  }

 private:
  // Of W rows: logits to weights, and the weights' gradients to those of the logits: p (dp - sum p dp).
  static void differentiate(float* weights, float* gradients, int64_t keys, int64_t ld) {
    Vec::F most = Vec::set1(-kInf), odd = Vec::zero();
    for (int64_t m = 0; m < keys; ++m) {
      const Vec::F x = Vec::load(weights + m * ld);
      most = Vec::max(most, x);
      odd = Vec::select(Vec::eq(x, x), odd, Vec::set1(1.0f));
    }
    const Vec::F shift = shift_of(most);
    Vec::F total = Vec::zero(), mean = Vec::zero();
    for (int64_t begin = 0; begin < keys; begin += kChunk) {
      Vec::F sum = Vec::zero(), product = Vec::zero();
      for (int64_t m = begin; m < smaller(keys, begin + kChunk); ++m) {
        const Vec::F weight = weight_of(Vec::load(weights + m * ld), shift);
        sum = Vec::add(sum, weight);
        product = Vec::fma(weight, Vec::load(gradients + m * ld), product);
        Vec::store(weights + m * ld, weight);
      }
      total = Vec::add(total, sum);
      mean = Vec::add(mean, product);
    }
    odd = Vec::select(Vec::eq(most, Vec::set1(kInf)), Vec::set1(1.0f), odd);
    total = Vec::select(Vec::gt(total, Vec::zero()), total, Vec::set1(1.0f));
    total = Vec::select(Vec::gt(odd, Vec::zero()), Vec::set1(kNaN), total);
    const Vec::F inverse = Vec::div(Vec::set1(1.0f), total);
    mean = Vec::div(mean, total);
    for (int64_t m = 0; m < keys; ++m) {
      const Vec::F weight = Vec::mul(Vec::load(weights + m * ld), inverse);
      Vec::store(weights + m * ld, weight);
      Vec::store(gradients + m * ld, Vec::mul(weight, Vec::sub(Vec::load(gradients + m * ld), mean)));
    }
  }

  void bias_gradient(int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width, float* sums) const {
    const RoutedProblem& p = problem_;
    if (grads_.grad_bias == nullptr) return;
    const float* gradients = grad_logits_ + list_.first_extra * width;
    float* per_query = grads_.grad_bias + ((batch * p.heads + head) * p.queries + first) * p.extra;
    float* per_head = sums + head % (p.heads / p.key_heads) * p.extra;
    for (int64_t s = 0; s < p.extra; ++s, gradients += width) {
      float sum = 0.0f;
      for (int64_t r = 0; r < count; ++r) {
        if (p.bias_per_query) per_query[r * p.extra + s] = gradients[r];
        sum += gradients[r];
      }
      per_head[s] += sum;
    }
  }

  const RoutedProblem& problem_;
  const RoutedGradients& grads_;
  const KeyList& list_;
  RowTile queries_, grad_output_;
  float *grad_query_, *weights_, *grad_logits_;
};

// The same of one row that has a list of its own.
class BackwardRow {
 public:
  static int64_t floats(const RoutedProblem& p) {
    return SingleRow::floats(p) + round_up(KeyList::capacity(p), W) + round_up(p.value_dim, W) + round_up(p.dim, W) + 3 * 16;
  }
  BackwardRow(const RoutedProblem& p, const RoutedGradients& g, const KeyList& list, Scratch& scratch)
      : problem_(p), grads_(g), list_(list), value_padded_(round_up(p.value_dim, W)), row_(p, list, scratch),
        gradients_(scratch.take(round_up(KeyList::capacity(p), W))), grad_output_(scratch.take(value_padded_)),
        grad_query_(scratch.take(row_.ld)) {}

  void run(int64_t batch, int64_t head, int64_t row, int64_t, HeadSums& sums) {
    const RoutedProblem& p = problem_;
    const int64_t keys = list_.length, padded = round_up(keys, W);
    const Tensor4 &go = grads_.grad_output, &gq = grads_.grad_query;
    load_row(at(go, batch, head, row), go.stride[3], go.dtype, p.value_dim, 1.0f, grad_output_);
    divide(row_.weights, padded, row_.weigh(batch, head, row));
    SingleRow::products(list_.values, keys, grad_output_, value_padded_, gradients_);
    for (int64_t m = keys; m < padded; ++m) gradients_[m] = 0.0f;
    Vec::F product = Vec::zero();
    for (int64_t m = 0; m < padded; m += W) product = Vec::fma(Vec::load(row_.weights + m), Vec::load(gradients_ + m), product);
    const Vec::F mean = Vec::set1(Vec::sum(product));
    for (int64_t m = 0; m < padded; m += W) {
      const Vec::F weight = Vec::load(row_.weights + m);
      Vec::store(gradients_ + m, Vec::mul(weight, Vec::sub(Vec::load(gradients_ + m), mean)));
    }
    bias_gradient(batch, head, row, sums.now.bias);
    by_channels(value_padded_, [&](auto nv, int64_t c) {
      scatter<nv()>(row_.weights, list_.index, 0, keys, grad_output_ + c, sums.now.values + c, value_padded_);
    });
    by_channels(row_.ld, [&](auto nv, int64_t c) {
      scatter<nv()>(gradients_, list_.index, 0, keys, row_.query + c, sums.now.keys + c, row_.ld);
    });
    sums.count(list_.index, keys);
    row_.gather(gradients_, list_.keys, row_.ld, grad_query_);
    store_row(const_cast<char*>(at(gq, batch, head, row)), gq.stride[3], gq.dtype, p.dim, p.scale, grad_query_);
  }

 private:
  void bias_gradient(int64_t batch, int64_t head, int64_t row, float* sums) const {
    const RoutedProblem& p = problem_;
    if (grads_.grad_bias == nullptr) return;
    float* per_query = grads_.grad_bias + ((batch * p.heads + head) * p.queries + row) * p.extra;
    float* per_head = sums + head % (p.heads / p.key_heads) * p.extra;
    for (int64_t s = 0; s < p.extra; ++s) {
      const float gradient = gradients_[list_.first_extra + s];
      if (p.bias_per_query) per_query[s] = gradient;
      per_head[s] += gradient;
    }
  }

  const RoutedProblem& problem_;
  const RoutedGradients& grads_;
  const KeyList& list_;
  const int64_t value_padded_;
  SingleRow row_;
  float *gradients_, *grad_output_, *grad_query_;
};

static void store_tokens(const Tensor4& t, int64_t batch, int64_t head, int64_t tokens, int64_t dim, const float* sums) {
  for (int64_t m = 0; m < tokens; ++m)
    store_row(const_cast<char*>(at(t, batch, head, m)), t.stride[3], t.dtype, dim, 1.0f, sums + m * round_up(dim, W));
}

static void store_head(const RoutedProblem& p, const RoutedGradients& g, const Unit& u, float* from) {
  const HeadSums::Parts sums(p, from);
  const int64_t group = p.heads / p.key_heads;
  store_tokens(g.grad_key, u.batch, u.key_head, p.keys, p.dim, sums.keys);
  store_tokens(g.grad_value, u.batch, u.key_head, p.keys, p.value_dim, sums.values);
  store_tokens(g.grad_extra_key, u.batch, u.key_head, p.extra, p.dim, sums.keys + p.keys * round_up(p.dim, W));
  store_tokens(g.grad_extra_value, u.batch, u.key_head, p.extra, p.value_dim,
               sums.values + p.keys * round_up(p.value_dim, W));
  if (g.grad_bias != nullptr && !p.bias_per_query)
    __builtin_memcpy(g.grad_bias + (u.batch * p.heads + u.key_head * group) * p.extra, sums.bias,
                     group * p.extra * sizeof(float));
}

static int64_t partial_size(const RoutedProblem& p) { return HeadSums::size(p); }

static void backward(
    const RoutedProblem& p, const RoutedGradients& g, const Unit* units, int64_t count, float* partial) {
  const int64_t size = partial_size(p);
  const bool single = p.query_block == 1;
  Scratch scratch(KeyList::floats(p) + (single ? BackwardRow::floats(p) : BackwardTile::floats(p)) + HeadSums::floats(p) +
                  (partial ? 0 : size + 16));
  KeyList list(p, scratch);
  HeadSums sums(p, scratch);
  float* own = partial ? nullptr : scratch.take(size);
  const auto run = [&](auto& rows, int64_t most) {
    for (const Unit* u = units; u < units + count; ++u) {
      float* totals = partial ? partial + (u - units) * size : own;
      sums.clear(totals);
      by_tiles(p, *u, most, list,
               [&](int64_t head, int64_t first, int64_t here) { rows.run(u->batch, head, first, here, sums); });
      sums.flush_all();
      if (partial == nullptr) store_head(p, g, *u, totals);
    }
  };
  if (single) {
    BackwardRow row(p, g, list, scratch);
    run(row, 1);
  } else {
    BackwardTile tile(p, g, list, scratch);
    run(tile, BackwardTile::rows_for(KeyList::capacity(p)));
  }
}

// Adds the partial sums of one key head in the order of its units, so that the result is the same every time.
static void reduce(const RoutedProblem& p, const RoutedGradients& g, const Unit& unit, float* partial, int64_t parts) {
  const int64_t size = partial_size(p);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
  store_head(p, g, unit, partial);
}
