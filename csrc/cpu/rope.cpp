// megapar::rope_qkv and rope_qkv_backward on CPU: what is checked, and which body runs.

#include "bindings.h"

namespace megapar {

// Heads [b, n, s, d], in any order in memory but for d, which is dense.
template <class T>
struct Heads {
  T* data;
  int64_t n, b_stride, n_stride, s_stride;
  bool turns;
};

}  // namespace megapar

#define MEGAPAR_KERNEL "rope.inl"
#include "every_isa.h"

namespace megapar {
namespace {

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

template <class T>
Heads<T> heads(const at::Tensor& x, bool turns) {
  return {data<T>(x), x.size(1), x.stride(0), x.stride(1), x.stride(2), turns};
}

// The angles of t tokens in fp32.
void check_angles(const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& x, int64_t t) {
  TORCH_CHECK_VALUE(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat, "cos and sin have dtypes ", cos.scalar_type(),
                    " and ", sin.scalar_type(), ": they must be float32");
  TORCH_CHECK_VALUE(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(0) == t && cos.size(1) > 0, "cos and sin have shapes ",
                    cos.sizes(), " and ", sin.sizes(), ": they must be [t, d / 2] with t = ", t);
  TORCH_CHECK_VALUE(cos.device() == x.device() && sin.device() == x.device(), "cos is on ", cos.device(), ", sin on ", sin.device(),
                    " and the heads on ", x.device(), ": move them");
}

template <bool BACK>
void run(const at::Tensor& qkv, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos_,
         const at::Tensor& sin_) {
  const at::Tensor cos = cos_.contiguous(), sin = sin_.contiguous();
  const int64_t t = qkv.size(0), half = cos.size(1);
  dispatch_float(qkv.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(rope_qkv<BACK>, data<T>(qkv), qkv.stride(0), heads<T>(q, true), heads<T>(k, true), heads<T>(v, false), data<float>(cos),
                     data<float>(sin), t, q.size(2), half, threads(2 * t * qkv.size(1) * sizeof(T)));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_qkv(const at::Tensor& qkv_, const at::Tensor& cos, const at::Tensor& sin, int64_t b,
                                                        int64_t q_heads, int64_t kv_heads) {
  check_float(qkv_, "qkv");
  TORCH_CHECK_VALUE(qkv_.dim() == 2, "qkv has shape ", qkv_.sizes(), " and must be [t, (q_heads + 2 kv_heads) d]: flatten it");
  TORCH_CHECK_VALUE(b > 0 && qkv_.size(0) % b == 0, "b=", b, " must divide the ", qkv_.size(0), " rows of qkv: correct it");
  check_angles(cos, sin, qkv_, qkv_.size(0));
  const int64_t s = qkv_.size(0) / b, d = 2 * cos.size(1);
  TORCH_CHECK_VALUE(q_heads >= 0 && kv_heads >= 0 && (q_heads + 2 * kv_heads) * d == qkv_.size(1), "qkv is ", qkv_.size(1),
                    " wide and must hold ", q_heads, " + 2 * ", kv_heads, " heads of ", d, ": correct the heads");
  const at::Tensor qkv = dense_rows(qkv_);
  const auto out = [&](int64_t n) { return at::empty({b, n, s, d}, qkv.options()); };
  const at::Tensor q = out(q_heads), k = out(kv_heads), v = out(kv_heads);
  run<false>(qkv, q, k, v, cos, sin);
  return {q, k, v};
}

at::Tensor rope_qkv_backward(const at::Tensor& dq_, const at::Tensor& dk_, const at::Tensor& dv_, const at::Tensor& cos,
                             const at::Tensor& sin) {
  check_float(dq_, "dq");
  check_same(dk_, dq_, "dk", "dq");
  check_same(dv_, dq_, "dv", "dq");
  TORCH_CHECK_VALUE(dq_.dim() == 4 && dk_.dim() == 4 && dk_.sizes() == dv_.sizes() && dq_.size(0) == dk_.size(0) &&
                        dq_.size(2) == dk_.size(2) && dq_.size(3) == dk_.size(3),
                    "dq, dk and dv have shapes ", dq_.sizes(), ", ", dk_.sizes(), " and ", dv_.sizes(), ": they must be [b, heads, s, d]");
  const int64_t t = dq_.size(0) * dq_.size(2), d = dq_.size(3);
  check_angles(cos, sin, dq_, t);
  TORCH_CHECK_VALUE(2 * cos.size(1) == d, "cos is ", cos.size(1), " wide and must be half of the head size ", d);
  const at::Tensor qkv = at::empty({t, (dq_.size(1) + 2 * dk_.size(1)) * d}, dq_.options());
  run<true>(qkv, dense_rows(dq_), dense_rows(dk_), dense_rows(dv_), cos, sin);
  return qkv;
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("rope_qkv", megapar::rope_qkv);
  m.impl("rope_qkv_backward", megapar::rope_qkv_backward);
}
