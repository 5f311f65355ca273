// megapar::linear and its gradients on CPU: what is checked, what is packed, and which body runs.

#include "linear.h"

#include <ATen/ops/scalar_tensor.h>

#include "bindings.h"

#define MEGAPAR_WITH_BF16
#define MEGAPAR_KERNEL "linear.inl"
#include "every_isa.h"

namespace megapar {
namespace {

Activation activation_of(std::string_view name) {
  constexpr std::array<std::string_view, 4> names = {"none", "gelu", "silu", "swiglu"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "activation=", name, " must be one of none, gelu, silu, swiglu: correct it");
  return Activation(found - names.begin());
}

// x [..., n] as rows, with the last dimension contiguous; a copy only where it is not.
at::Tensor rows(const at::Tensor& x) {
  const at::Tensor flat = x.dim() == 1 ? x.unsqueeze(0) : x.dim() == 2 ? x : x.flatten(0, -2);
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

int64_t stride(const at::Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

std::vector<int64_t> with_last(const at::Tensor& x, int64_t width) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = width;
  return shape;
}

void check_weight(const at::Tensor& x, const at::Tensor& weight, const char* name, int64_t side) {
  check_float(x, name);
  check_same(weight, x, "weight", name);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "weight has shape ", weight.sizes(), " and strides ", weight.strides(),
                    " and must be a contiguous [out, in]: call .contiguous() on it");
  TORCH_CHECK_VALUE(x.size(-1) == weight.size(side), name, " is ", x.size(-1), " wide and a weight of ", weight.sizes(), " expects ",
                    weight.size(side), ": check what feeds it");
}

// A GEMM earns a thread about every 2 MFLOP.
int gemm_threads(int64_t t, int64_t in, int64_t out) {
  return at::in_parallel_region() ? 1 : int(std::clamp<int64_t>(t * in * out >> 20, 1, at::get_num_threads()));
}

template <class T>
at::Tensor gemm_space(int64_t rows, int64_t columns, int64_t depth, int64_t parts, int threads) {
  return workspace(MEGAPAR_DISPATCH_BF16(workspace_size<T>, rows, columns, depth, parts, threads));
}

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                          std::string_view activation, bool save) {
  check_weight(x_, weight, "x", 1);
  const Activation kind = activation_of(activation);
  const at::Tensor x = rows(x_);
  const int64_t t = x.size(0), in = weight.size(1), out = weight.size(0);
  TORCH_CHECK_VALUE(kind != Activation::swiglu || out % 2 == 0, "weight has ", out, " rows and swiglu takes gate and up: give it an even number");
  TORCH_CHECK_VALUE(!bias || (bias->numel() == out && bias->scalar_type() == x.scalar_type() && bias->is_contiguous()),
                    "bias must be ", out, " numbers of ", x.scalar_type(), " beside this weight: convert it");
  const at::Tensor y = at::empty(with_last(x_, kind == Activation::swiglu ? out / 2 : out), x.options());
  const at::Tensor z = at::empty(save ? with_last(x_, out) : std::vector<int64_t>{0}, x.options());
  const int count = gemm_threads(t, in, out);
  dispatch_float(x.scalar_type(), [&]<class T>(T) {
    const int64_t parts = kind == Activation::swiglu ? 2 : 1;
    const at::Tensor space = gemm_space<T>(t, out / parts, in, parts, count);
    MEGAPAR_DISPATCH_BF16(linear, LinearArgs<T>{data<T>(x), stride(x), data<T>(weight), bias ? data<T>(*bias) : nullptr, data<T>(y),
                                                save ? data<T>(z) : nullptr, t, in, out, kind, data<uint32_t>(space), count});
  });
  return {y, z};
}

at::Tensor linear_input_grad(const at::Tensor& dy_, const at::Tensor& weight, const std::optional<at::Tensor>& z_,
                             std::string_view activation) {
  check_weight(dy_, weight, "dy", 0);
  const Activation kind = activation_of(activation);
  const at::Tensor dy = rows(dy_);
  const int64_t t = dy.size(0), in = weight.size(1), out = weight.size(0), wide = kind == Activation::swiglu ? 2 * in : in;
  TORCH_CHECK_VALUE((kind == Activation::none) == !z_, "activation=", activation, " and z must be given together: pass both or neither");
  TORCH_CHECK_VALUE(!z_ || (z_->sizes() == at::IntArrayRef(with_last(dy_, wide)) && z_->scalar_type() == dy.scalar_type()), "z must be ", t, " rows of ", wide,
                    " in the dtype of dy: pass the pre-activation that forward saved");
  const at::Tensor z = z_ ? z_->contiguous() : at::Tensor();
  const at::Tensor dx = at::empty(with_last(dy_, wide), dy.options());
  const int count = gemm_threads(t, in, out);
  dispatch_float(dy.scalar_type(), [&]<class T>(T) {
    const at::Tensor space = gemm_space<T>(t, in, out, 1, count);
    MEGAPAR_DISPATCH_BF16(linear_input_grad, LinearInputGradArgs<T>{data<T>(dy), stride(dy), data<T>(weight), z_ ? data<T>(z) : nullptr,
                                                                    data<T>(dx), t, in, out, kind, data<uint32_t>(space), count});
  });
  return dx;
}

// fp32 or the dtype of the inputs.
void check_target(const at::Tensor& target, const at::Tensor& dy, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(target.scalar_type() == at::kFloat || target.scalar_type() == dy.scalar_type(), "target has dtype ",
                    target.scalar_type(), " and must be float32 or that of dy, ", dy.scalar_type(), ": convert it");
  TORCH_CHECK_VALUE(target.sizes() == shape && target.is_contiguous() && target.device() == dy.device(), "target has shape ",
                    target.sizes(), " and strides ", target.strides(), " and must be a contiguous ", shape, " beside dy: give one");
}

// body(T{}, Out{}) for inputs of T and a target of Out.
template <class Body>
void dispatch_target(at::ScalarType inputs, at::ScalarType target, const Body& body) {
  dispatch_float(inputs, [&]<class T>(T in) { target == at::kFloat ? body(in, float{}) : body(in, in); });
}

void linear_weight_grad_(const at::Tensor& target, const at::Tensor& dy_, const at::Tensor& x_, double beta, double alpha,
                         const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& non_finite) {
  check_float(dy_, "dy");
  check_same(x_, dy_, "x", "dy");
  const at::Tensor dy = rows(dy_), x = rows(x_);
  TORCH_CHECK_VALUE(dy.size(0) == x.size(0), "dy has ", dy.size(0), " rows and x ", x.size(0), ": give both the same tokens");
  const int64_t t = dy.size(0), in = x.size(1), out = dy.size(1);
  check_target(target, dy, {out, in});
  check_apart(target, dy_, "target", "dy");
  check_apart(target, x_, "target", "x");
  TORCH_CHECK_VALUE(!scale || (scale->numel() == 1 && scale->scalar_type() == at::kFloat), "scale must be one float32 number: convert it");
  TORCH_CHECK_VALUE(!non_finite || (non_finite->numel() == 1 && non_finite->scalar_type() == at::kFloat),
                    "non_finite must be one float32 number, which becomes 1: convert it");
  const float factor = float(alpha * (scale ? double(*data<float>(*scale)) : 1.0));
  const int count = gemm_threads(t, in, out);
  dispatch_target(dy.scalar_type(), target.scalar_type(), [&]<class T, class Out>(T, Out) {
    const at::Tensor space = gemm_space<T>(out, in, t, 1, count);
    const LinearWeightGradArgs<T, Out> args{data<T>(dy), stride(dy), data<T>(x), stride(x), data<Out>(target), t, in, out, factor,
                                            float(beta), non_finite.has_value(), data<uint32_t>(space), count};
    if (MEGAPAR_DISPATCH_BF16(linear_weight_grad, args)) *data<float>(*non_finite) = 1.0f;
  });
}

void linear_bias_grad_(const at::Tensor& target, const at::Tensor& dy_, double beta) {
  check_float(dy_, "dy");
  const at::Tensor dy = rows(dy_);
  check_target(target, dy, {dy.size(1)});
  check_apart(target, dy_, "target", "dy");
  dispatch_target(dy.scalar_type(), target.scalar_type(), [&]<class T, class Out>(T, Out) {
    MEGAPAR_DISPATCH(linear_bias_grad, data<T>(dy), dy.size(0), dy.size(1), stride(dy), data<Out>(target), float(beta), threads(dy.nbytes()));
  });
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("linear", megapar::linear);
  m.impl("linear_input_grad", megapar::linear_input_grad);
  m.impl("linear_weight_grad_", megapar::linear_weight_grad_);
  m.impl("linear_bias_grad_", megapar::linear_bias_grad_);
}
