// Routed attention, forward: a tile of query rows takes in its list a chunk of keys at a time, with a running softmax.
// Included inside an instruction set's namespace, after routed_single.h.
#pragma once

class ForwardTile {
 public:
  static int64_t floats(const RoutedProblem& p) {
    return RowTile::floats(p.dim) + kTile * (kChunk + round_up(p.value_dim, W) + 4) + 16 * 6;
  }
  ForwardTile(const RoutedProblem& p, const KeyList& list, Scratch& scratch)
      : problem_(p), list_(list), queries_(p.query, p.dim, p.scale, scratch), value_padded_(round_up(p.value_dim, W)),
        weights_(scratch.take(kTile * kChunk)), out_(scratch.take(kTile * value_padded_)), largest_(scratch.take(kTile)),
        total_(scratch.take(kTile)), factor_(scratch.take(kTile)), broken_(scratch.take(kTile)) {}

  void run(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const int64_t width = round_up(count, W);
    queries_.load(batch, head, first, count, width);
    __builtin_memset(out_, 0, count * value_padded_ * sizeof(float));
    for (int64_t r = 0; r < width; r += W) {
      Vec::store(largest_ + r, Vec::set1(-kInf));
      Vec::store(total_ + r, Vec::zero());
      Vec::store(broken_ + r, Vec::zero());
    }
    for (int64_t begin = 0; begin < list_.length; begin += kChunk) {
      const int64_t end = smaller(list_.length, begin + kChunk);
      score(list_.keys + begin, end - begin, queries_.panel, width, problem_.dim, weights_);
      add_bias(problem_, list_, batch, head, first, count, begin, end, weights_, width);
      if (take_in(end - begin, width) && begin > 0) shrink(count);
      blend(weights_, width, list_.values + begin, end - begin, count, out_, value_padded_);
    }
    store(batch, head, first, count);
  }

 private:
  // Logits to weights under the rows' largest logits so far; true if what came before has to shrink.
  bool take_in(int64_t keys, int64_t width) {
    bool shrinks = false;
    for (int64_t r = 0; r < width; r += W) {
      float* column = weights_ + r;
      const Vec::F before = Vec::load(largest_ + r);
      Vec::F most = before, odd = Vec::zero();
      for (int64_t m = 0; m < keys; ++m) {
        const Vec::F x = Vec::load(column + m * width);
        most = Vec::max(most, x);
        odd = Vec::select(Vec::eq(x, x), odd, Vec::set1(1.0f));
      }
      const Vec::F shift = shift_of(most), factor = exp_nonpositive(Vec::sub(before, shift));
      Vec::F sum = Vec::zero();
      for (int64_t m = 0; m < keys; ++m) {
        const Vec::F weight = weight_of(Vec::load(column + m * width), shift);
        sum = Vec::add(sum, weight);
        Vec::store(column + m * width, weight);
      }
      odd = Vec::select(Vec::eq(most, Vec::set1(kInf)), Vec::set1(1.0f), odd);
      Vec::store(broken_ + r, Vec::max(Vec::load(broken_ + r), odd));
      Vec::store(largest_ + r, most);
      Vec::store(factor_ + r, factor);
      Vec::store(total_ + r, Vec::fma(Vec::load(total_ + r), factor, sum));
      shrinks |= Vec::bits(Vec::eq(factor, Vec::set1(1.0f))) != (1u << W) - 1u;
    }
    return shrinks;
  }

  void shrink(int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const Vec::F factor = Vec::set1(factor_[r]);
      float* row = out_ + r * value_padded_;
      for (int64_t c = 0; c < value_padded_; c += W) Vec::store(row + c, Vec::mul(Vec::load(row + c), factor));
    }
  }

  void store(int64_t batch, int64_t head, int64_t first, int64_t count) const {
    const Tensor4& out = problem_.output;
    for (int64_t r = 0; r < count; ++r) {
      float* row = out_ + r * value_padded_;
      // A row that sees nothing is all zeros and stays so.
      const Vec::F total = Vec::set1(broken_[r] > 0.0f ? kNaN : total_[r] > 0.0f ? total_[r] : 1.0f);
      for (int64_t c = 0; c < value_padded_; c += W) Vec::store(row + c, Vec::div(Vec::load(row + c), total));
      store_row(const_cast<char*>(at(out, batch, head, first + r)), out.stride[3], out.dtype, problem_.value_dim, 1.0f, row);
    }
  }

  const RoutedProblem& problem_;
  const KeyList& list_;
  RowTile queries_;
  const int64_t value_padded_;
  float *weights_, *out_, *largest_, *total_, *factor_, *broken_;
};

static void forward(const RoutedProblem& p, const Unit* units, int64_t count) {
  if (p.query_block == 1) return forward_single(p, units, count);
  Scratch scratch(KeyList::floats(p) + ForwardTile::floats(p));
  KeyList list(p, scratch);
  ForwardTile tile(p, list, scratch);
  for (const Unit* u = units; u < units + count; ++u)
    by_tiles(p, *u, kTile, list,
             [&](int64_t head, int64_t first, int64_t rows) { tile.run(u->batch, head, first, rows); });
}
