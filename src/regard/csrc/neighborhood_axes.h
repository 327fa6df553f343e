// The windows along one axis, as regard/ops/neighborhood/windows.py defines them, in the kernels' order of places.
#pragma once

#include <algorithm>
#include <vector>

#include "neighborhood.h"

namespace regard {

struct WindowOptions {
  int64_t length, kernel, dilation, stride;
  bool causal, shift, replicate;
  bool outside_counts;  // places beyond the ends count, as zeros or as copies of the key at the end
};

class WindowTables {
 public:
  explicit WindowTables(const WindowOptions& o) : options_(o) {
    for (auto* table : {&token_, &self_, &start_, &low_, &high_}) table->reserve(o.length);
    const int64_t longest = (o.length + o.dilation - 1) / o.dilation;
    // A window larger than every group is cut down to them here; in a smaller one of two sizes `high` does it.
    window_ = o.shift ? std::max<int64_t>(1, std::min(o.kernel, longest)) : o.kernel;
    for (int64_t group = 0; group < std::min(o.dilation, o.length); ++group) add(group);
  }

  WindowAxis axis() const {
    return {options_.length, window_, static_cast<int64_t>(source_.size()), options_.kernel, token_.data(), self_.data(),
            start_.data(), low_.data(), high_.data(), source_.data(), home_.data(),
            owner_.data()};
  }

 private:
  // First slot of the i-th query of a group of n, counted from the group's first key.
  int64_t start(int64_t i, int64_t n) const {
    const WindowOptions& o = options_;
    int64_t leader = i / o.stride * o.stride + (o.causal ? o.stride - 1 : o.stride / 2);
    const int64_t before = o.causal ? o.kernel - 1 : o.kernel / 2;
    if (!o.shift) return leader - before;
    leader = std::min(leader, n - 1);
    return std::max<int64_t>(0, std::min(leader - before, n - o.kernel));
  }

  void add(int64_t group) {
    const WindowOptions& o = options_;
    const int64_t n = (o.length - 1 - group) / o.dilation + 1;
    int64_t first = 0, last = n;
    for (int64_t i = 0; i < n; ++i) {
      first = std::min(first, start(i, n));
      last = std::max(last, start(i, n) + window_);
    }
    const int64_t base = static_cast<int64_t>(source_.size()) - first;
    for (int64_t i = first; i < last; ++i) {
      const int64_t inside = std::clamp<int64_t>(i, 0, n - 1);
      const bool there = i == inside || o.replicate;
      source_.push_back(static_cast<int32_t>(there ? group + inside * o.dilation : -1));
      home_.push_back(static_cast<int32_t>(there ? base + inside : -1));
      owner_.push_back(static_cast<int32_t>(i == inside ? static_cast<int64_t>(token_.size()) + i : -1));
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t begin = start(i, n);
      int64_t low = 0, high = o.causal ? i + 1 - begin : window_;
      if (!o.outside_counts) low = std::max(low, -begin), high = std::min(high, n - begin);
      start_.push_back(static_cast<int32_t>(base + begin));
      low_.push_back(static_cast<int32_t>(low));
      high_.push_back(static_cast<int32_t>(std::min(high, window_)));
      self_.push_back(static_cast<int32_t>(base + i));
    }
    for (int64_t i = 0; i < n; ++i) token_.push_back(static_cast<int32_t>(group + i * o.dilation));
  }

  const WindowOptions options_;
  int64_t window_;
  std::vector<int32_t> token_, self_, start_, low_, high_, source_, home_, owner_;
};

}  // namespace regard
