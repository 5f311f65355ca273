// megapar::rms_norm, layer_norm and their gradients on CPU: what is checked, and which body runs.

#include "bindings.h"

#define MEGAPAR_KERNEL "norm.inl"
#include "every_isa.h"

namespace megapar {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t NONE[] = {0};  // the shape of an output that was not asked for

// At most 64 blocks, of at least 16 rows: a function of t alone (tests/ops/test_rms_norm.py::test_threads).
int row_blocks(int64_t t) { return int(std::clamp<int64_t>(t / 16, 1, 64)); }

void check_weight(const at::Tensor& weight, const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), name, " has shape ", weight.sizes(), " and x ", x.sizes(), ": ",
                    name, " must be [", x.size(-1), "]");
  TORCH_CHECK_VALUE(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat, name, " has dtype ",
                    weight.scalar_type(), " and x ", x.scalar_type(), ": use that of x or float32");
  TORCH_CHECK_VALUE(weight.device() == x.device(), name, " is on ", weight.device(), " and x on ", x.device(), ": move one");
}

void check_shape(const at::Tensor& x, const at::Tensor& other, const char* name, const char* other_name) {
  check_same(x, other, name, other_name);
  TORCH_CHECK_VALUE(x.sizes() == other.sizes(), name, " has shape ", x.sizes(), " and ", other_name, " ", other.sizes(),
                    ": they must be the same");
}

void check_statistic(const at::Tensor& statistic, const at::Tensor& s, const char* name) {
  TORCH_CHECK_VALUE(statistic.scalar_type() == at::kFloat && statistic.sizes() == s.sizes().slice(0, s.dim() - 1), name, " has shape ",
                    statistic.sizes(), " and dtype ", statistic.scalar_type(), ": give what the forward returned");
}

Optional contiguous(const Optional& x) { return x ? Optional(x->contiguous()) : x; }

using megapar::data;  // beside that of an optional tensor, which would hide it

template <class T>
T* data(const Optional& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// body(T{}, W{}) with the types of x and of its weight.
template <class Body>
void dispatch_weighted(const at::Tensor& x, const at::Tensor& weight, const Body& body) {
  dispatch_float(x.scalar_type(), [&]<class T>(T) {
    if (weight.scalar_type() == at::kFloat) return body(T{}, float{});
    body(T{}, T{});
  });
}

struct Normed {
  at::Tensor y, s, mean, rstd;
};

template <bool CENTRED>
Normed forward(const at::Tensor& x_, const at::Tensor& weight_, const Optional& bias_, double eps, const Optional& residual_) {
  check_float(x_, "x");
  check_weight(weight_, x_, "weight");
  if (bias_) check_weight(*bias_, x_, "bias");
  if (bias_) check_same(*bias_, weight_, "bias", "weight");
  if (residual_) check_shape(*residual_, x_, "residual", "x");
  TORCH_CHECK_VALUE(eps >= 0, "eps=", eps, " must be 0 or more: raise it");
  const at::Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Optional bias = contiguous(bias_), residual = contiguous(residual_);
  const int64_t h = x.size(-1), t = h ? x.numel() / h : 0;
  const at::IntArrayRef rows = x.sizes().slice(0, x.dim() - 1), none = NONE;
  const at::TensorOptions fp32 = x.options().dtype(at::kFloat);
  const Normed out = {at::empty(x.sizes(), x.options()), at::empty(residual ? x.sizes() : none, x.options()),
                      at::empty(CENTRED ? rows : none, fp32), at::empty(rows, fp32)};
  dispatch_weighted(x, weight, [&]<class T, class W>(T, W) {
    const int count = threads((residual ? 4 : 2) * t * h * sizeof(T));
    MEGAPAR_DISPATCH(norm<CENTRED>, data<T>(x), data<T>(residual), data<W>(weight), data<W>(bias), data<T>(out.y), data<T>(out.s),
                     data<float>(out.mean), data<float>(out.rstd), t, h, float(eps), count);
  });
  return out;
}

struct Gradients {
  at::Tensor dx, dw, db;
};

template <bool CENTRED>
Gradients backward(const at::Tensor& dy_, const Optional& ds_, const at::Tensor& s_, const at::Tensor& weight_, const Optional& mean_,
                   const at::Tensor& rstd_) {
  check_float(s_, "s");
  check_weight(weight_, s_, "weight");
  check_shape(dy_, s_, "dy", "s");
  if (ds_) check_shape(*ds_, s_, "ds", "s");
  check_statistic(rstd_, s_, "rstd");
  if (CENTRED) check_statistic(*mean_, s_, "mean");
  const at::Tensor dy = dy_.contiguous(), s = s_.contiguous(), weight = weight_.contiguous(), rstd = rstd_.contiguous();
  const Optional ds = contiguous(ds_), mean = contiguous(mean_);
  const int64_t h = s.size(-1), t = h ? s.numel() / h : 0, width = CENTRED ? 2 * h : h;
  const int blocks = row_blocks(t);
  const Gradients out = {at::empty(s.sizes(), s.options()), at::empty({h}, weight.options()),
                         at::empty({CENTRED ? h : 0}, weight.options())};
  const at::Tensor partial = at::empty({blocks, width}, s.options().dtype(at::kFloat));
  dispatch_weighted(s, weight, [&]<class T, class W>(T, W) {
    MEGAPAR_DISPATCH(norm_backward<CENTRED>, data<T>(dy), data<T>(ds), data<T>(s), data<W>(weight), data<float>(mean), data<float>(rstd),
                     data<T>(out.dx), data<float>(partial), t, h, blocks, threads((ds ? 4 : 3) * t * h * sizeof(T)));
    const int count = threads(blocks * h * sizeof(float));
    MEGAPAR_DISPATCH(sum_blocks, data<float>(partial), data<W>(out.dw), h, width, blocks, count);
    if (CENTRED) MEGAPAR_DISPATCH(sum_blocks, data<float>(partial) + h, data<W>(out.db), h, width, blocks, count);
  });
  return out;
}

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Three rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const Optional& residual) {
  const Normed out = forward<false>(x, weight, {}, eps, residual);
  return {out.y, out.s, out.rstd};
}

Two rms_norm_backward(const at::Tensor& dy, const Optional& ds, const at::Tensor& s, const at::Tensor& weight, const at::Tensor& rstd) {
  const Gradients out = backward<false>(dy, ds, s, weight, {}, rstd);
  return {out.dx, out.dw};
}

Four layer_norm(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, double eps, const Optional& residual) {
  const Normed out = forward<true>(x, weight, bias, eps, residual);
  return {out.y, out.s, out.mean, out.rstd};
}

Three layer_norm_backward(const at::Tensor& dy, const Optional& ds, const at::Tensor& s, const at::Tensor& weight, const at::Tensor& mean,
                          const at::Tensor& rstd) {
  const Gradients out = backward<true>(dy, ds, s, weight, mean, rstd);
  return {out.dx, out.dw, out.db};
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("rms_norm", megapar::rms_norm);
  m.impl("rms_norm_backward", megapar::rms_norm_backward);
  m.impl("layer_norm", megapar::layer_norm);
  m.impl("layer_norm_backward", megapar::layer_norm_backward);
}
