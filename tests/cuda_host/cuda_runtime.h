// As much of CUDA as csrc/cuda uses, for g++: a kernel runs on the CPU, a fiber for each CUDA thread.
//
// Blocks run one after another in a shuffled order; within one, a thread runs until a barrier or a shuffle, and which thread goes on next is
// shuffled too. Shared memory holds NaNs when a block starts. So a missing barrier reads NaNs or what others have not written yet. Threads
// that wait at different lines, or for one that has left, end the process with a message, where a GPU would hang. -fsanitize=alignment
// makes a vector access at an address that a GPU would refuse end the process too.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Kernels are in anonymous namespaces, so all of it is in one place: the linker names its ends.
#define __shared__ static __attribute__((section("cuda_shared")))
extern char __start_cuda_shared[], __stop_cuda_shared[];

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;

enum class Waits { no, for_warp, for_block, never };  // never: it has left the kernel

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Waits waits;
  int line;
  uint32_t mask;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline const std::function<void()>* kernel;
inline std::mt19937 shuffler{1};
// What each lane gave to the last two shuffles of its warp: one may be read while the next is written.
inline std::vector<double> given[2];
inline std::vector<unsigned> shuffles;

[[noreturn]] inline void fail(const char* what, int line, int other) {
  std::fprintf(stderr, "cuda_host: block %u: %s (line %d, line %d)\n", blockIdx.x, what, line, other);
  std::abort();
}

inline void enter() {
  (*kernel)();
  fibers[running].waits = Waits::never;
}

// Gives the processor back until the others have come here too.
inline void wait(Waits for_what, int line, uint32_t mask) {
  const unsigned me = running;
  Fiber& fiber = fibers[me];
  fiber.waits = for_what, fiber.line = line, fiber.mask = mask;
  swapcontext(&fiber.context, &scheduler);
}

// Lets the threads [begin, end) go on if all of them that the mask names wait for the same.
inline bool release(Waits for_what, unsigned begin, unsigned end) {
  unsigned waiting = 0, left = 0, named = 0, first = end;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits == for_what && first == end) first = i;
  }
  if (first == end) return false;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& f = fibers[i];
    if (for_what == Waits::for_warp && !(fibers[first].mask >> (i - begin) & 1)) continue;
    ++named;
    left += f.waits == Waits::never;
    if (f.waits != for_what) continue;
    ++waiting;
    if (f.line != fibers[first].line) fail("threads wait at two barriers", fibers[first].line, f.line);
    if (f.mask != fibers[first].mask) fail("lanes shuffle under two masks", f.line, f.line);
  }
  if (waiting < named) {
    if (waiting + left == named) fail("threads wait for some that have left", fibers[first].line, fibers[first].line);
    return false;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits == for_what) fibers[i].waits = Waits::no;
  }
  return true;
}

inline void run_block(unsigned threads) {
  std::memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK, fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.waits = Waits::no;
    order[i] = i;
  }
  std::fill(shuffles.begin(), shuffles.end(), 0);
  for (bool more = true; more;) {
    more = false;
    std::shuffle(order.begin(), order.end(), shuffler);
    for (const unsigned i : order) {
      if (fibers[i].waits != Waits::no) continue;
      running = i, threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
      more = true;
    }
    for (unsigned begin = 0; begin < threads; begin += WARP) more |= release(Waits::for_warp, begin, std::min(begin + WARP, threads));
    more |= release(Waits::for_block, 0, threads);
    if (!more && std::any_of(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.waits != Waits::never; }))
      fail("a barrier and a shuffle wait for each other", 0, 0);
  }
}

}  // namespace cuda_host

inline void __syncthreads(int line = __builtin_LINE()) { cuda_host::wait(cuda_host::Waits::for_block, line, 0); }

// The value of the lane `delta` above; its own where there is none. As on a GPU, a lane that the mask leaves out gives nothing of use.
inline double __shfl_down_sync(unsigned mask, double value, unsigned delta, int line = __builtin_LINE()) {
  using namespace cuda_host;
  const unsigned me = running, lane = me % WARP, parity = shuffles[me]++ % 2;
  given[parity][me] = value;
  wait(Waits::for_warp, line, mask);
  const unsigned other = lane + delta;
  return other < WARP && me + delta < blockDim.x ? given[parity][me + delta] : value;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace cuda_host;
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || threads == 0 || threads > 1024 || config->dynamicSmemBytes != 0) return cudaErrorInvalidConfiguration;
  const std::function<void()> call = [=] { kernel(arguments...); };
  cuda_host::kernel = &call;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (auto& lanes : given) lanes.assign(threads, 0);
  shuffles.assign(threads, 0);
  gridDim = config->gridDim, blockDim = config->blockDim;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), shuffler);
  for (const unsigned block : order) {
    blockIdx = {block, 0, 0};
    run_block(threads);
  }
  return cudaSuccess;
}
