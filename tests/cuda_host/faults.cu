// Kernels with a fault each, which the emulation must report: tests/cuda_host/test_kernels.py::test_faults_are_reported.

#include <cuda_runtime.h>

#include <cstdlib>

namespace {

__global__ void two_barriers(double*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void some_leave(double*) {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
}

__global__ void lanes_leave(double* x) {
  if (threadIdx.x == 5) return;
  x[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, x[threadIdx.x], 1);
}

__global__ void two_masks(double* x) { x[0] = __shfl_down_sync(threadIdx.x % 32 < 16 ? 0xFFFFFFFFu : 0xFFFF0000u, x[0], 1); }

// Half of a warp shuffles, half waits for the block.
__global__ void barrier_and_shuffle(double* x) {
  if (threadIdx.x % 32 < 16)
    x[0] = __shfl_down_sync(0xFFFFFFFFu, x[0], 1);
  else
    __syncthreads();
}

__global__ void misaligned(double* x) {
  reinterpret_cast<uint4*>(reinterpret_cast<char*>(x) + 8)->x = threadIdx.x;
}

// What a barrier would have made 1: every thread reads what the one before it writes.
__global__ void no_barrier(double* x) {
  __shared__ double shared[64];
  shared[threadIdx.x] = 1;
  x[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

}  // namespace

// Prints how many of the 64 results are not 1.
int main(int, char** arguments) {
  alignas(16) double x[66] = {};
  void (*const kernels[])(double*) = {two_barriers, some_leave, lanes_leave, two_masks, barrier_and_shuffle, misaligned, no_barrier};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, kernels[std::atoi(arguments[1])], &x[0]);
  std::printf("%d\n", int(std::count_if(x, x + 64, [](double y) { return y != 1; })));
}
