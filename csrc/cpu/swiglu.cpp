// megapar::swiglu and swiglu_backward on CPU: what is checked, and which body runs.

#include "bindings.h"

#define MEGAPAR_KERNEL "swiglu.inl"
#include "every_isa.h"

namespace megapar {
namespace {

at::Tensor swiglu(const at::Tensor& gate_up) {
  check_float(gate_up, "gate_up");
  TORCH_CHECK_VALUE(gate_up.size(-1) % 2 == 0, "gate_up is ", gate_up.size(-1), " wide and must hold gate and up: give it an even width");
  const at::Tensor x = gate_up.contiguous();
  const int64_t f = x.size(-1) / 2, t = f ? x.numel() / (2 * f) : 0;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = f;
  at::Tensor y = at::empty(shape, x.options());
  dispatch_float(x.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(swiglu, data<T>(x), data<T>(y), t, f, threads(3 * t * f * sizeof(T)));
  });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& dy_, const at::Tensor& gate_up) {
  check_float(gate_up, "gate_up");
  check_same(dy_, gate_up, "dy", "gate_up");
  TORCH_CHECK_VALUE(dy_.dim() == gate_up.dim() && dy_.sizes().slice(0, dy_.dim() - 1) == gate_up.sizes().slice(0, gate_up.dim() - 1) &&
                        dy_.size(-1) * 2 == gate_up.size(-1), "dy has shape ", dy_.sizes(), " and gate_up ", gate_up.sizes(),
                    ": dy must be half as wide");
  const at::Tensor x = gate_up.contiguous(), dy = dy_.contiguous();
  const int64_t f = dy.size(-1), t = f ? dy.numel() / f : 0;
  at::Tensor dx = at::empty(x.sizes(), x.options());
  dispatch_float(x.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(swiglu_backward, data<T>(dy), data<T>(x), data<T>(dx), t, f, threads(5 * t * f * sizeof(T)));
  });
  return dx;
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("swiglu", megapar::swiglu);
  m.impl("swiglu_backward", megapar::swiglu_backward);
}
