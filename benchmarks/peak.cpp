// Products and sums from registers: GFLOP/s of fp32, and of bf16 in pairs, on as many threads as the first argument says. The limit of a
// GEMM, compiled by benchmarks/peak.py for the processor that runs it. Prints "fp32 bf16"; without products of bf16 both are fp32's.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Enough independent sums to hide an instruction's latency, and few enough to stay in registers.
constexpr int SUMS = 12;
constexpr int64_t STEPS = 200'000'000 / SUMS;

#if defined(__AVX512F__)
using F32 = __m512;
static F32 multiply_add(F32 a, F32 b, F32 sum) { return _mm512_fmadd_ps(a, b, sum); }
#else
using F32 = __m256;
static F32 multiply_add(F32 a, F32 b, F32 sum) { return _mm256_fmadd_ps(a, b, sum); }
#endif
constexpr int LANES = sizeof(F32) / 4;

// The compiler must not see that the sums begin equal, which it would compute once, nor that nobody reads them.
static void keep(F32 (&sums)[SUMS]) {
  for (F32& sum : sums) asm volatile("" : "+v"(sum));
}

static double fp32() {
  F32 sums[SUMS] = {}, a = {}, b = {};
  keep(sums);
  for (int64_t step = 0; step < STEPS; ++step) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 32
    for (F32& sum : sums) sum = multiply_add(a, b, sum);
  }
  keep(sums);
  return 2.0 * LANES * SUMS * STEPS;
}

#if defined(__AMX_BF16__)
static double bf16() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" ::"m"(config) : "memory");
  _tile_loadconfig(&config);
  const int64_t steps = STEPS / 8;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 32 * steps;
}
#elif defined(__AVX512BF16__)
static double bf16() {
  F32 sums[SUMS] = {};
  keep(sums);
  __m512i a = {}, b = {};
  for (int64_t step = 0; step < STEPS; ++step) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 32
    for (F32& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  keep(sums);
  return 4.0 * LANES * SUMS * STEPS;
}
#else
static double bf16() { return fp32(); }
#endif

// The best of fifteen: what the processor can do when left alone.
static double rate(double (*work)(), int threads) {
  double best = 0;
  for (int repeat = 0; repeat < 15; ++repeat) {
    std::vector<double> done(threads);
    std::vector<std::thread> running;
    const auto begin = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) running.emplace_back([&, t] { done[t] = work(); });
    for (std::thread& one : running) one.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    double total = 0;
    for (double flops : done) total += flops;
    best = std::max(best, total / seconds / 1e9);
  }
  return best;
}

int main(int, char** arguments) {
#if defined(__AMX_BF16__)
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  const int threads = std::atoi(arguments[1]);
  const double single = rate(fp32, threads), pairs = rate(bf16, threads);
  std::printf("%.1f %.1f\n", single, pairs);
}
