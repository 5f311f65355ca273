// The bf16 GEMMs of csrc/cpu/linear.inl, compiled for one instruction set as csrc/cpu/every_isa.h does, against fp64, in memory that ends
// where it must: behind the workspace and every output lie numbers that nothing may change. AMX runs on the emulation.
//
// Compiled by tests/ops/test_amx.py with -DMEGAPAR_LEVEL=... and csrc/cpu on the include path. Prints each failure; exit code 1 if any.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "../common/dtypes.h"
#include "linear.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if MEGAPAR_LEVEL == 514
#include "amx_emulation.h"
#endif

#define MEGAPAR_ISA body
#pragma GCC push_options
#if MEGAPAR_LEVEL >= 513
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")
#elif MEGAPAR_LEVEL == 512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")
#elif MEGAPAR_LEVEL == 2
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")
#endif
#include "vec.inl"
#include "vec_math.inl"
#include "linear.inl"
#pragma GCC pop_options

using megapar::Activation;
using megapar::bf16;
using megapar::to_float;

namespace {

int failures = 0;

void fail(const char* what, int64_t t, int64_t in, int64_t out, int threads, double error, double bound) {
  if (++failures <= 20)
    std::printf("%s t=%lld in=%lld out=%lld threads=%d: %g above %g\n", what, (long long)t, (long long)in, (long long)out, threads, error, bound);
}

// Memory of exactly `size`, and a page behind it that must stay as it is.
template <class T>
struct Exact {
  static constexpr size_t guard = 4096;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory;
  size_t bytes;

  explicit Exact(int64_t size) : memory(nullptr, &std::free), bytes(size_t(size) * sizeof(T)) {
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + guard + 63) / 64 * 64)));
    // NaNs in every dtype: what is read before it was written shows.
    std::memset(memory.get(), 0xFF, bytes + guard);
  }
  T* data() { return reinterpret_cast<T*>(memory.get()); }
  T& operator[](int64_t i) { return data()[i]; }
  bool whole() const {
    return std::all_of(memory.get() + bytes, memory.get() + bytes + guard, [](uint8_t byte) { return byte == 0xFF; });
  }
};

std::mt19937 generator(1);

Exact<bf16> normal(int64_t rows, int64_t width, int64_t stride) {
  std::normal_distribution<float> draw;
  Exact<bf16> x(rows * stride);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) x[i * stride + j] = megapar::round_to<bf16>(draw(generator));
  return x;
}

struct Problem {
  int64_t t, in, out, x_stride, dy_stride;
  int threads;
  Exact<bf16> x, dy, weight;

  Problem(int64_t t, int64_t in, int64_t out, int threads, int64_t extra)
      : t(t), in(in), out(out), x_stride(in + extra), dy_stride(out + extra), threads(threads), x(normal(t, in, x_stride)),
        dy(normal(t, out, dy_stride)), weight(normal(out, in, in)) {}

  // Sum over k of a(k) b(k), checked against what K roundings of fp32 and `ulps` halves of bf16's may do.
  template <class A, class B>
  void check(const char* what, double found, int64_t depth, bool rounded, const A& a, const B& b) {
    double exact = 0, magnitude = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const double term = double(to_float(a(k))) * double(to_float(b(k)));
      exact += term;
      magnitude += std::abs(term);
    }
    const double sum_error = double(depth + 2) * 0x1p-24 * 1.01 * magnitude + 0x1p-120;
    const double bound = sum_error + (rounded ? 0x1p-8 * (std::abs(exact) + sum_error) : 0);
    if (!(std::abs(found - exact) <= bound)) fail(what, t, in, out, threads, std::abs(found - exact), bound);
  }

  void whole(const char* what, bool intact) {
    if (!intact) fail(what, t, in, out, threads, 1, 0);
  }

  void forward(bool paired) {
    if (paired && out % 2) return;
    const int64_t parts = paired ? 2 : 1, n = out / parts;
    Exact<bf16> y(t * n), z(t * out);
    Exact<uint32_t> space(megapar::body::workspace_size<bf16>(t, n, in, parts, threads));
    megapar::body::linear(megapar::LinearArgs<bf16>{x.data(), x_stride, weight.data(), nullptr, y.data(), z.data(), t, in, out,
                                                    paired ? Activation::swiglu : Activation::none, space.data(), threads});
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j < out; ++j)
        check(paired ? "swiglu z" : "forward", to_float(z[i * out + j]), in, true, [&](int64_t k) { return x[i * x_stride + k]; },
              [&](int64_t k) { return weight[j * in + k]; });
    for (int64_t i = 0; paired && i < t; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const double gate = to_float(z[i * out + j]), up = to_float(z[i * out + n + j]), exact = gate / (1 + std::exp(-gate)) * up;
        // e^88.73 is the largest number of fp32: beyond it sigmoid is 0, where it still is as large as 4e-37 over the gate.
        const double error = std::abs(to_float(y[i * n + j]) - exact);
        const double bound = (0x1p-8 + 0x1p-20) * std::abs(exact) + 4e-37 * std::abs(up) + 0x1p-120;
        if (!(error <= bound)) fail("swiglu y", t, in, out, threads, error, bound);
      }
    whole("forward wrote past its end", y.whole() && z.whole() && space.whole());
  }

  void input_grad() {
    Exact<bf16> dx(t * in);
    Exact<uint32_t> space(megapar::body::workspace_size<bf16>(t, in, out, 1, threads));
    megapar::body::linear_input_grad(megapar::LinearInputGradArgs<bf16>{dy.data(), dy_stride, weight.data(), nullptr, dx.data(), t, in, out,
                                                                        Activation::none, space.data(), threads});
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j < in; ++j)
        check("input gradient", to_float(dx[i * in + j]), out, true, [&](int64_t k) { return dy[i * dy_stride + k]; },
              [&](int64_t k) { return weight[k * in + j]; });
    whole("input gradient wrote past its end", dx.whole() && space.whole());
  }

  void weight_grad() {
    Exact<float> target(out * in);
    Exact<uint32_t> space(megapar::body::workspace_size<bf16>(out, in, t, 1, threads));
    const bool bad = megapar::body::linear_weight_grad(megapar::LinearWeightGradArgs<bf16, float>{
        dy.data(), dy_stride, x.data(), x_stride, target.data(), t, in, out, 1.0f, 0.0f, true, space.data(), threads});
    for (int64_t i = 0; i < out; ++i)
      for (int64_t j = 0; j < in; ++j)
        check("weight gradient", target[i * in + j], t, false, [&](int64_t k) { return dy[k * dy_stride + i]; },
              [&](int64_t k) { return x[k * x_stride + j]; });
    whole("weight gradient wrote past its end, or is not finite", target.whole() && space.whole() && !bad);
  }
};

}  // namespace

int main() {
  // Around pairs, groups of 16, panels, blocks of 128 rows and 384 columns, 128 units of k; empty sums under whole
  // blocks; sums that are taken in slices.
  const int64_t sizes[][3] = {{0, 5, 6},     {1, 1, 2},      {3, 0, 4},      {260, 0, 774},  {5, 33, 0},     {31, 63, 34},
                              {32, 64, 64},  {33, 65, 98},   {129, 31, 50},  {17, 259, 96},  {48, 300, 386}, {130, 257, 402},
                              {300, 34, 64}, {50, 130, 800}, {8, 1000, 16},  {257, 97, 33},  {16, 32, 48},   {2, 515, 194},
                              {9, 4130, 34},  {34, 9, 4130}, {4130, 5, 18}};
  for (const auto& [t, in, out] : sizes)
    for (int threads : {1, 2, 3}) {
      Problem problem(t, in, out, threads, threads == 2 ? 7 : 0);
      problem.forward(false);
      problem.forward(true);
      problem.input_grad();
      problem.weight_grad();
    }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
