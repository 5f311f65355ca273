// Sums of squares of any number of tensors in one launch, and two small ones that add them in order. Contract: megapar/ops/grad_norm.py.
//
// Bytes a parameter: 4 in fp32, 2 in 16 bits, read once, 128 bits an access; 24 bytes written for each chunk. The roofline is the bytes
// over the memory's bandwidth.
//
// Launch: a block of 256 threads for each chunk, then a block for each tensor, then one thread. Which element a thread takes and in which
// order sums are added depends on the element's index in its tensor alone, so the bits depend on nothing else. No atomics.

#include <cmath>

#include "kernels.h"
#include "launch.h"
#include "vector.cuh"

namespace megapar::cuda {
namespace {

constexpr int THREADS = 256, WARP = 32, AHEAD = 2;

__device__ inline void add(GradSums& a, const GradSums& b) {
  a.squares += b.squares, a.nonfinite += b.nonfinite, a.zeros += b.zeros;
}

// In thread 0, the sum of the sums of all threads: within warps by halves, then warp after warp.
__device__ GradSums block_sum(GradSums mine) {
  __shared__ GradSums warps[THREADS / WARP];
  for (int half = WARP / 2; half > 0; half /= 2) {
    add(mine, {__shfl_down_sync(0xFFFFFFFFu, mine.squares, half), __shfl_down_sync(0xFFFFFFFFu, mine.nonfinite, half),
               __shfl_down_sync(0xFFFFFFFFu, mine.zeros, half)});
  }
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < THREADS / WARP; ++k) add(mine, warps[k]);
  }
  return mine;
}

// Squares in fp64, where that of any finite element is exact and cannot overflow; elements are counted only where the sum says so.
template <int VECTOR, class T>
__device__ inline void add_wide(GradSums& sums, const T (&x)[VECTOR]) {
  double squares = 0;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) squares += double(to_float(x[k])) * double(to_float(x[k]));
  sums.squares += squares;
  if (std::isfinite(squares)) return;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) sums.nonfinite += !std::isfinite(to_float(x[k]));
}

// 16-bit elements in fp32, at most VECTOR roundings of 2^-24, then fp64. Below 2^-90 the squares that underflow would count; above 2^120
// one has overflowed or is not finite: tests/ops/test_grad_norm.py::test_extremes.
template <int VECTOR, class T>
__device__ inline void add_squares(GradSums& sums, const T (&x)[VECTOR]) {
  if constexpr (sizeof(T) == 2) {
    float squares = 0;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) squares += to_float(x[k]) * to_float(x[k]);
    if (squares > 0x1p-90f && squares < 0x1p120f) {
      sums.squares += double(squares);
      return;
    }
  }
  add_wide(sums, x);
}

template <class T, bool COUNT_ZEROS>
__global__ void __launch_bounds__(THREADS)
    chunks_kernel(const GradEntry* tensors, const Chunk* chunks, int64_t chunk_size, GradSums* partials) {
  constexpr int VECTOR = sizeof(uint4) / sizeof(T), STEP = THREADS * VECTOR;
  const Chunk chunk = chunks[blockIdx.x];
  const GradEntry e = tensors[chunk.tensor];
  const T* const data = static_cast<const T*>(e.data);
  const bool vectors = aligned(reinterpret_cast<uintptr_t>(data));
  const int64_t begin = chunk.index * chunk_size, end = begin + chunk_size < e.numel ? begin + chunk_size : e.numel;
  GradSums sums = {0, 0, 0};
  for (int64_t first = begin + int64_t(threadIdx.x) * VECTOR; first < end; first += AHEAD * STEP) {
    // All loads before the first use: several are under way at a time.
    T x[AHEAD][VECTOR];
    int sizes[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t i = first + k * STEP, left = end - i;
      sizes[k] = left < 0 ? 0 : left < VECTOR ? int(left) : VECTOR;
      load(x[k], data, {i, sizes[k], vectors && sizes[k] == VECTOR});
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (sizes[k] > 0) add_squares(sums, x[k]);
      if constexpr (COUNT_ZEROS) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sums.zeros += j < sizes[k] && to_float(x[k][j]) == 0;
      }
    }
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) partials[e.first + chunk.index] = sums;
}

__global__ void __launch_bounds__(THREADS)
    tensors_kernel(const GradEntry* tensors, int64_t chunk_size, const GradSums* partials, GradSums* sums) {
  const GradEntry e = tensors[blockIdx.x];
  const int64_t count = (e.numel + chunk_size - 1) / chunk_size;
  GradSums sum = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < count; i += THREADS) add(sum, partials[e.first + i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void total_kernel(const GradSums* sums, int64_t count, GradSums* total) {
  GradSums sum = *total;
  for (int64_t i = 0; i < count; ++i) add(sum, sums[i]);
  *total = sum;
}

template <class T>
cudaError_t launch_chunks(const GradEntry* tensors, const Chunks& chunks, bool count_zeros, GradSums* partials, cudaStream_t stream) {
  const auto kernel = count_zeros ? chunks_kernel<T, true> : chunks_kernel<T, false>;
  return launch(kernel, chunks.count, THREADS, stream, tensors, chunks.data, chunks.size, partials);
}

}  // namespace

cudaError_t grad_norm_chunks(Dtype dtype, const GradEntry* tensors, const Chunks& chunks, bool count_zeros, GradSums* partials,
                             cudaStream_t stream) {
  if (dtype == Dtype::fp32) return launch_chunks<float>(tensors, chunks, count_zeros, partials, stream);
  if (dtype == Dtype::bf16) return launch_chunks<bf16>(tensors, chunks, count_zeros, partials, stream);
  if (dtype == Dtype::fp16) return launch_chunks<fp16>(tensors, chunks, count_zeros, partials, stream);
  return cudaErrorInvalidValue;
}

cudaError_t grad_norm_total(const GradEntry* tensors, int64_t count, int64_t chunk_size, const GradSums* partials, GradSums* sums,
                            GradSums* total, cudaStream_t stream) {
  const cudaError_t done = launch(tensors_kernel, count, THREADS, stream, tensors, chunk_size, partials, sums);
  return done == cudaSuccess ? launch(total_kernel, 1, 1, stream, sums, count, total) : done;
}

}  // namespace megapar::cuda
