// What the bodies of the linear ops are given. Matrices are row-major; a stride is the distance of rows in elements.

#pragma once

#include <cstdint>

namespace megapar {

// Operand(w, k) = data[w * stride_w + k * stride_k], one of the strides 1; w counts rows of A or columns of B.
template <class T>
struct Operand {
  const T* data;
  int64_t width, depth, stride_w, stride_k;
};

enum class Activation { none, gelu, silu, swiglu };

// y [t, out] = activation(x [t, in] weight [out, in]^T + bias), out / 2 wide for swiglu; z [t, out] takes the pre-activation, if it is not null.
template <class T>
struct LinearArgs {
  const T* x;
  int64_t x_stride;
  const T *weight, *bias;
  T *y, *z;
  int64_t t, in, out;
  Activation activation;
  uint32_t* workspace;
  int threads;
};

// dx [t, in] = dy [t, out] weight [out, in], times the slope of `activation` at z [t, in]; for swiglu z and dx are 2 in wide, the gate first.
template <class T>
struct LinearInputGradArgs {
  const T* dy;
  int64_t dy_stride;
  const T *weight, *z;
  T* dx;
  int64_t t, in, out;
  Activation activation;
  uint32_t* workspace;
  int threads;
};

// target [out, in] = beta target + alpha dy [t, out]^T x [t, in].
template <class T, class Out>
struct LinearWeightGradArgs {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride;
  Out* target;
  int64_t t, in, out;
  float alpha, beta;
  bool check_finite;
  uint32_t* workspace;
  int threads;
};

}  // namespace megapar
