// Loads and stores of VECTOR consecutive elements by a thread: 128 bits at a time where the tensor is aligned to that, else one by one.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common/dtypes.h"

namespace megapar::cuda {

// Where a vector lies: its first element, how many of it exist, and whether it may be moved as a whole.
struct Place {
  int64_t begin;
  int size;
  bool whole;
};

// True where every one of the pointers (or-ed together) is a multiple of 16.
__device__ inline bool aligned(uintptr_t pointers) { return pointers % sizeof(uint4) == 0; }

// What does not exist is 0.
template <int VECTOR, class T>
__device__ inline void load(T (&x)[VECTOR], const T* data, const Place& at) {
  constexpr int PART = sizeof(uint4) / sizeof(T);
  static_assert(VECTOR % PART == 0);
  if (at.whole) {
#pragma unroll
    for (int k = 0; k < VECTOR; k += PART) {
      const uint4 part = *reinterpret_cast<const uint4*>(data + at.begin + k);
      std::memcpy(x + k, &part, sizeof part);
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) x[k] = k < at.size ? data[at.begin + k] : T{};
  }
}

template <int VECTOR, class T>
__device__ inline void store(T* data, const T (&x)[VECTOR], const Place& at) {
  constexpr int PART = sizeof(uint4) / sizeof(T);
  static_assert(VECTOR % PART == 0);
  if (at.whole) {
#pragma unroll
    for (int k = 0; k < VECTOR; k += PART) {
      uint4 part;
      std::memcpy(&part, x + k, sizeof part);
      *reinterpret_cast<uint4*>(data + at.begin + k) = part;
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k)
      if (k < at.size) data[at.begin + k] = x[k];
  }
}

}  // namespace megapar::cuda
