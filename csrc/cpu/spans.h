// The tensors of a list, end to end: one parallel region for all of them, cut by bytes and not by tensor.

#pragma once

#include "parallel.h"

namespace megapar {

struct Extent {
  int64_t numel, width;  // elements, and the bytes that a kernel moves for each
};

// The first element, a multiple of `block`, of a tensor that starts at byte `start` of the list, not below byte `cut` of it.
inline int64_t element_at(int64_t cut, int64_t start, Extent tensor, int64_t block) {
  const int64_t unit = block * tensor.width, blocks = cut <= start ? 0 : (cut - start + unit - 1) / unit;
  return blocks >= (tensor.numel + block - 1) / block ? tensor.numel : blocks * block;
}

// Runs body(tensor, begin, end) over what thread `thread` of `threads` has of the list; each tensor is cut at multiples of `block`.
template <class Body>
void for_each_span(const Extent* list, int64_t count, int64_t block, int thread, int threads, const Body& body) {
  int64_t total = 0, start = 0;
  for (int64_t i = 0; i < count; ++i) total += list[i].numel * list[i].width;
  const Range bytes = share(total, thread, threads);
  for (int64_t i = 0; i < count && start < bytes.end; start += list[i].numel * list[i].width, ++i) {
    const int64_t begin = element_at(bytes.begin, start, list[i], block), end = element_at(bytes.end, start, list[i], block);
    if (begin < end) body(i, begin, end);
  }
}

}  // namespace megapar
