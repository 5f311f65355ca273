// What the bodies of attention are given.

#pragma once

#include <cstdint>

#include "parallel.h"

namespace megapar {

// [b, heads, s, d] in any order in memory but for d, which is dense.
template <class T>
struct HeadsView {
  T* data;
  int64_t b_stride, head_stride, s_stride;

  T* at(int64_t b, int64_t head) const { return data + b * b_stride + head * head_stride; }
};

// The keys that query `row` of a sequence attends to: those up to itself, or what [s, 2] says.
struct Spans {
  const int32_t* data;

  Range of(int64_t row) const { return data ? Range{data[2 * row], data[2 * row + 1]} : Range{0, row + 1}; }
  Spans sequence(int64_t b, int64_t s) const { return {data ? data + 2 * b * s : nullptr}; }
};

struct AttentionSizes {
  int64_t b, heads, kv_heads, s, d;
};

// y = softmax(scale q k^T) v over the keys in `spans`; lse [b, heads, s], the logarithms of the softmax's sums.
template <class T>
struct AttentionArgs {
  HeadsView<const T> q, k, v;
  HeadsView<T> y;
  float* lse;
  Spans spans;
  AttentionSizes sizes;
  float scale;
  uint32_t* workspace;
  int threads;
};

template <class T>
struct AttentionBackwardArgs {
  HeadsView<const T> dy, q, k, v, y;
  const float* lse;
  HeadsView<T> dq, dk, dv;
  Spans spans;
  AttentionSizes sizes;
  float scale;
  uint32_t* workspace;
  int threads;
};

}  // namespace megapar
