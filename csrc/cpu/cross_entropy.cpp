// megapar::cross_entropy_statistics and cross_entropy_grad on CPU: what is checked, and which body runs.

#include "bindings.h"

#define MEGAPAR_KERNEL "cross_entropy.inl"
#include "every_isa.h"

namespace megapar {
namespace {

// int64 [t], below v; where negative, the target is not among these logits.
at::Tensor check_index(const at::Tensor& index_, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits have shape ", logits.sizes(), " and must be [t, v]: flatten them");
  TORCH_CHECK_VALUE(index_.scalar_type() == at::kLong && index_.dim() == 1 && index_.size(0) == logits.size(0) &&
                        index_.device() == logits.device(),
                    "index has shape ", index_.sizes(), " and dtype ", index_.scalar_type(), ": give one int64 for each of the ",
                    logits.size(0), " rows of logits");
  const at::Tensor index = index_.contiguous();
  const int64_t* at = data<int64_t>(index);
  const int64_t most = index.numel() ? *std::max_element(at, at + index.numel()) : -1;
  TORCH_CHECK_VALUE(most < logits.size(1), "index contains ", most, " and the logits are ", logits.size(1), " wide: correct it");
  return index;
}

at::Tensor per_row(const at::Tensor& x, at::ScalarType dtype, int64_t t, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype && x.dim() == 1 && x.size(0) == t && x.device().is_cpu(), name, " has shape ", x.sizes(),
                    " and dtype ", x.scalar_type(), ": give one ", dtype, " for each of the ", t, " rows of logits");
  return x.contiguous();
}

at::Tensor cross_entropy_statistics(const at::Tensor& logits_, const at::Tensor& index_, bool with_sum) {
  check_float(logits_, "logits");
  const at::Tensor index = check_index(index_, logits_);
  const at::Tensor logits = logits_.stride(1) == 1 ? logits_ : logits_.contiguous();
  const int64_t t = logits.size(0), v = logits.size(1);
  const at::Tensor out = at::empty({4, t}, logits.options().dtype(at::kFloat));
  dispatch_float(logits.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(cross_entropy_statistics, data<T>(logits), logits.stride(0), data<int64_t>(index), data<float>(out), t, v, with_sum,
                     threads(t * v * sizeof(T)));
  });
  return out;
}

void write_grad(const at::Tensor& dloss_, const at::Tensor& logits, const at::Tensor& index_, const at::Tensor& lse_,
                const at::Tensor& ignored_, int64_t vocab_size, double smoothing, double z_loss, const at::Tensor& out) {
  const at::Tensor index = check_index(index_, logits);
  const int64_t t = logits.size(0), v = logits.size(1);
  TORCH_CHECK_VALUE(vocab_size >= v, "vocab_size=", vocab_size, " must be at least the ", v, " logits of a row: raise it");
  const at::Tensor dloss = per_row(dloss_, at::kFloat, t, "dloss"), lse = per_row(lse_, at::kFloat, t, "lse");
  const at::Tensor ignored = per_row(ignored_, at::kBool, t, "ignored");
  const float uniform = vocab_size ? float(smoothing / double(vocab_size)) : 0.0f;
  dispatch_float(logits.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(cross_entropy_grad, data<float>(dloss), data<T>(logits), logits.stride(0), data<T>(out), out.stride(0),
                     data<int64_t>(index), data<float>(lse), data<bool>(ignored), t, v, float(smoothing), uniform, float(z_loss),
                     threads(2 * t * v * sizeof(T)));
  });
}

at::Tensor cross_entropy_grad(const at::Tensor& dloss, const at::Tensor& logits_, const at::Tensor& index, const at::Tensor& lse,
                              const at::Tensor& ignored, int64_t vocab_size, double label_smoothing, double z_loss) {
  check_float(logits_, "logits");
  const at::Tensor logits = logits_.stride(-1) == 1 ? logits_ : logits_.contiguous();
  const at::Tensor out = at::empty(logits.sizes(), logits.options());
  write_grad(dloss, logits, index, lse, ignored, vocab_size, label_smoothing, z_loss, out);
  return out;
}

void cross_entropy_grad_(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& index, const at::Tensor& lse,
                         const at::Tensor& ignored, int64_t vocab_size, double label_smoothing, double z_loss) {
  check_float(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits have shape ", logits.sizes(), " and must be [t, v]: flatten them");
  const int64_t t = logits.size(0), v = logits.size(1);
  TORCH_CHECK_VALUE(t * v == 0 || ((v == 1 || logits.stride(1) == 1) && (t == 1 || logits.stride(0) >= v)), "logits have strides ",
                    logits.strides(), " and must have dense rows that do not overlap: make them contiguous");
  for (const at::Tensor& other : {dloss, lse})
    TORCH_CHECK_VALUE(!other.is_alias_of(logits), "dloss and lse must not share the memory of logits, which is overwritten: clone them");
  write_grad(dloss, logits, index, lse, ignored, vocab_size, label_smoothing, z_loss, logits);
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("cross_entropy_statistics", megapar::cross_entropy_statistics);
  m.impl("cross_entropy_grad", megapar::cross_entropy_grad);
  m.impl("cross_entropy_grad_", megapar::cross_entropy_grad_);
}
