// What the bindings share: checks that say value, rule and fix, and the step from torch's dtypes to the kernels' types.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "../common/dtypes.h"
#include "parallel.h"

namespace megapar {

inline void check_float(const at::Tensor& x, const char* name) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name, " has dtype ", dtype,
                    " and the kernels know float32, bfloat16 and float16: convert it, or use MEGAPAR_BACKEND=reference");
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " is on ", x.device(), " and the other tensors on the CPU: move it");
  TORCH_CHECK_VALUE(x.dim() > 0, name, " is a single number and must have a dimension: give it as [1, ...]");
}

// Same dtype and device.
inline void check_same(const at::Tensor& x, const at::Tensor& other, const char* name, const char* other_name) {
  TORCH_CHECK_VALUE(x.scalar_type() == other.scalar_type(), name, " has dtype ", x.scalar_type(), " and ", other_name, " ",
                    other.scalar_type(), ": convert one of them");
  TORCH_CHECK_VALUE(x.device() == other.device(), name, " is on ", x.device(), " and ", other_name, " on ", other.device(), ": move one");
}

// An output must not share memory with an input: a kernel reads what it has already written. Also where only the ranges overlap.
inline void check_apart(const at::Tensor& out, const at::Tensor& in, const char* name, const char* other_name) {
  if (out.numel() == 0 || in.numel() == 0) return;
  const auto range = [](const at::Tensor& x) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    const char* begin = static_cast<const char*>(x.data_ptr());
    return std::pair{begin, begin + (last + 1) * int64_t(x.element_size())};
  };
  const auto [a, b] = range(out);
  const auto [c, d] = range(in);
  TORCH_CHECK_VALUE(b <= c || d <= a, name, " overlaps ", other_name, " in memory and is written while that is read: give it its own");
}

// Threads for a kernel that moves so many bytes, of those that torch has been given.
inline int threads(int64_t bytes) { return at::in_parallel_region() ? 1 : threads_for(bytes, at::get_num_threads()); }

// `size` units of 4 bytes. Each calling thread keeps up to 16 MiB from call to call: fresh pages cost a GEMM of 512 x 512 x 1536 6 % of its
// time.
inline at::Tensor workspace(int64_t size) {
  constexpr int64_t kept_bytes = 16 << 20;
  thread_local at::Tensor kept;
  if (kept.defined() && kept.numel() >= size) return kept;
  const at::Tensor fresh = at::empty({size}, at::TensorOptions(at::kInt));
  if (fresh.nbytes() <= size_t(kept_bytes)) kept = fresh;
  return fresh;
}

template <class T>
T* data(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// body(T{}) with T the kernel's type for a dtype that check_float let through.
template <class Body>
void dispatch_float(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kFloat) return body(float{});
  if (dtype == at::kBFloat16) return body(bf16{});
  body(fp16{});
}

}  // namespace megapar
