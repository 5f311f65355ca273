// As much of CUDA as csrc/cuda uses, for g++: a kernel runs on the CPU, a fiber for each CUDA thread.
//
// Blocks run one after another in a shuffled order; within one, a thread runs until a barrier or a shuffle, and which thread goes on next is
// shuffled too. Shared memory holds NaNs when a block starts. So a missing barrier reads NaNs or what others have not written yet. Threads
// that wait at different lines, or for one that has left, end the process with a message, where a GPU would hang. -fsanitize=alignment
// makes a vector access at an address that a GPU would refuse end the process too.

#pragma once

#include <setjmp.h>
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

struct Thread {
  jmp_buf here;
  Waits waits;
  int line;
  uint32_t mask;
};

// A stack, on which one thread after the other runs, up to the first that waits. idle: where to begin again, once `begun`.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  jmp_buf idle;
  bool begun = false;
};

inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* begun;
inline jmp_buf scheduler;
inline std::vector<unsigned> order;
inline unsigned started, running;
inline const std::function<void()>* kernel;
inline std::mt19937 shuffler{1};
// What each lane gave to the last two shuffles of its warp: one may be read while the next is written.
inline std::vector<double> given[2];
inline std::vector<unsigned> shuffles;

[[noreturn]] inline void fail(const char* what, int line, int other) {
  std::fprintf(stderr, "cuda_host: block %u: %s (line %d, line %d)\n", blockIdx.x, what, line, other);
  std::abort();
}

// Jumps, unlike swapcontext, make no system call; a context is needed only to begin on another stack.
inline void go(jmp_buf& there) {
  if (_setjmp(scheduler) == 0) _longjmp(there, 1);
}

inline void fiber_main() {
  Fiber* const me = begun;
  _setjmp(me->idle);
  while (started < order.size()) {
    running = order[started++], threadIdx = {running, 0, 0};
    (*kernel)();
    threads[running].waits = Waits::never;
  }
  _longjmp(scheduler, 1);
}

inline void go(Fiber& fiber) {
  if (fiber.begun) return go(fiber.idle);
  fiber.begun = true, begun = &fiber;
  static ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = fiber.stack.get(), fresh.uc_stack.ss_size = STACK;
  makecontext(&fresh, fiber_main, 0);
  if (_setjmp(scheduler) == 0) setcontext(&fresh);
}

// Gives the processor back until the others have come here too.
inline void wait(Waits for_what, int line, uint32_t mask) {
  Thread& thread = threads[running];
  thread.waits = for_what, thread.line = line, thread.mask = mask;
  if (_setjmp(thread.here) == 0) _longjmp(scheduler, 1);
}

// Lets the threads [begin, end) go on if all of them that the mask names wait for the same.
inline bool release(Waits for_what, unsigned begin, unsigned end) {
  unsigned waiting = 0, left = 0, named = 0, first = end;
  for (unsigned i = begin; i < end; ++i) {
    if (threads[i].waits == for_what && first == end) first = i;
  }
  if (first == end) return false;
  for (unsigned i = begin; i < end; ++i) {
    const Thread& f = threads[i];
    if (for_what == Waits::for_warp && !(threads[first].mask >> (i - begin) & 1)) continue;
    ++named;
    left += f.waits == Waits::never;
    if (f.waits != for_what) continue;
    ++waiting;
    if (f.line != threads[first].line) fail("threads wait at two barriers", threads[first].line, f.line);
    if (f.mask != threads[first].mask) fail("lanes shuffle under two masks", f.line, f.line);
  }
  if (waiting < named) {
    if (waiting + left == named) fail("threads wait for some that have left", threads[first].line, threads[first].line);
    return false;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (threads[i].waits == for_what) threads[i].waits = Waits::no;
  }
  return true;
}

inline void run_block() {
  std::memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
  const unsigned size = unsigned(order.size());
  for (unsigned i = 0; i < size; ++i) threads[i].waits = Waits::no, shuffles[i] = 0;
  std::shuffle(order.begin(), order.end(), shuffler);
  started = 0;
  for (size_t used = 0; started < size; ++used) {
    if (used == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
    go(*fibers[used]);
  }
  for (;;) {
    bool released = release(Waits::for_block, 0, size);
    for (unsigned begin = 0; begin < size; begin += WARP) released |= release(Waits::for_warp, begin, std::min(begin + WARP, size));
    if (!released) break;
    std::shuffle(order.begin(), order.end(), shuffler);
    for (const unsigned i : order) {
      if (threads[i].waits != Waits::no) continue;
      running = i, threadIdx = {i, 0, 0};
      go(threads[i].here);
    }
  }
  for (unsigned i = 0; i < size; ++i) {
    if (threads[i].waits != Waits::never) fail("a barrier and a shuffle wait for each other", threads[i].line, threads[i].line);
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
  const unsigned blocks = config->gridDim.x, size = config->blockDim.x;
  if (blocks == 0 || size == 0 || size > 1024 || config->dynamicSmemBytes != 0) return cudaErrorInvalidConfiguration;
  const std::function<void()> call = [=] { kernel(arguments...); };
  cuda_host::kernel = &call;
  threads.resize(size), shuffles.resize(size), order.resize(size);
  for (unsigned i = 0; i < size; ++i) order[i] = i;
  for (auto& lanes : given) lanes.resize(size);
  gridDim = config->gridDim, blockDim = config->blockDim;
  std::vector<unsigned> blocks_in_order(blocks);
  for (unsigned i = 0; i < blocks; ++i) blocks_in_order[i] = i;
  std::shuffle(blocks_in_order.begin(), blocks_in_order.end(), shuffler);
  for (const unsigned block : blocks_in_order) {
    blockIdx = {block, 0, 0};
    run_block();
  }
  return cudaSuccess;
}
