// Threads of a kernel. Work is cut by index, never by who is free, so that results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace megapar {

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, n), cut at multiples of `unit`.
inline Range share(int64_t n, int part, int parts, int64_t unit = 1) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, units * part / parts * unit), std::min(n, units * (part + 1) / parts * unit)};
}

// Runs body(thread, threads) on each of at most `threads` threads.
template <class Body>
void parallel(int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// Inside a body: waits until all `count` threads have come here.
inline void barrier(int count) {
#if defined(_OPENMP)
  if (count > 1) {
#pragma omp barrier
  }
#endif
}

// As many threads as pay: a thread costs a few microseconds to wake, in which one moves about 64 KiB.
inline int threads_for(int64_t bytes, int most) { return int(std::clamp<int64_t>(bytes / (64 << 10), 1, most)); }

}  // namespace megapar
