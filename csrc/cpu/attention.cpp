// megapar::attention and attention_backward on CPU: what is checked, and which body runs.

#include "attention.h"

#include "bindings.h"
#include "linear.h"

#define MEGAPAR_WITH_BF16
#define MEGAPAR_KERNEL "attention.inl"
#include "every_isa.h"

namespace megapar {
namespace {

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

template <class T>
HeadsView<T> view(const at::Tensor& x) {
  return {data<std::remove_const_t<T>>(x), x.stride(0), x.stride(1), x.stride(2)};
}

AttentionSizes check_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_float(q, "q");
  check_same(k, q, "k", "q");
  check_same(v, q, "v", "q");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                        q.size(3) == k.size(3),
                    "q, k and v have shapes ", q.sizes(), ", ", k.sizes(), " and ", v.sizes(),
                    ": they must be [b, heads, s, d], k and v alike, with b, s and d of q: check what makes them");
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q has ", q.size(1), " heads and k ", k.size(1),
                    ": the first must be a multiple of the second");
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3)};
}

Spans check_spans(const std::optional<at::Tensor>& spans, const AttentionSizes& sizes) {
  if (!spans) return {nullptr};
  TORCH_CHECK_VALUE(spans->scalar_type() == at::kInt && spans->device().is_cpu() && spans->is_contiguous() &&
                        spans->sizes() == at::IntArrayRef({sizes.b, sizes.s, 2}),
                    "spans are ", spans->scalar_type(), " of shape ", spans->sizes(), " on ", spans->device(),
                    " and must be contiguous int32 [b, s, 2] = [", sizes.b, ", ", sizes.s, ", 2] beside q: convert them");
  const int32_t* at = data<int32_t>(*spans);
  for (int64_t i = 0; i < sizes.b * sizes.s; ++i)
    TORCH_CHECK_VALUE(0 <= at[2 * i] && at[2 * i] <= at[2 * i + 1] && at[2 * i + 1] <= sizes.s, "query ", i % sizes.s, " of sequence ",
                      i / sizes.s, " attends to keys [", at[2 * i], ", ", at[2 * i + 1], ") and there are ", sizes.s,
                      ": give the first and one past the last of those that exist");
  return {at};
}

// A thread pays from about a million FLOPs of a causal forward on. units: the heads that are dealt to the threads.
int attention_threads(const AttentionSizes& x, int64_t units) {
  const int64_t most = std::clamp<int64_t>(units, 1, at::get_num_threads());
  return at::in_parallel_region() ? 1 : int(std::clamp<int64_t>(x.b * x.heads * x.s * x.s * x.d >> 19, 1, most));
}

template <class T>
at::Tensor attention_space(const AttentionSizes& x, bool backward, int threads) {
  return workspace(MEGAPAR_DISPATCH_BF16(attention_workspace<T>, x.s, x.d, backward) * threads);
}

float scale_of(int64_t d) { return d > 0 ? float(1.0 / std::sqrt(double(d))) : 1.0f; }

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                                             const std::optional<at::Tensor>& spans_) {
  const AttentionSizes x = check_heads(q_, k_, v_);
  const Spans spans = check_spans(spans_, x);
  const at::Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const at::Tensor y = at::empty({x.b, x.s, x.heads, x.d}, q.options()).transpose(1, 2);
  const at::Tensor lse = at::empty({x.b, x.heads, x.s}, q.options().dtype(at::kFloat));
  const int count = attention_threads(x, x.b * x.heads);
  dispatch_float(q.scalar_type(), [&]<class T>(T) {
    const at::Tensor space = attention_space<T>(x, false, count);
    MEGAPAR_DISPATCH_BF16(attention, AttentionArgs<T>{view<const T>(q), view<const T>(k), view<const T>(v), view<T>(y), data<float>(lse), spans, x,
                                                      scale_of(x.d), data<uint32_t>(space), count});
  });
  return {y, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& dy_, const at::Tensor& q_, const at::Tensor& k_,
                                                                  const at::Tensor& v_, const at::Tensor& y_, const at::Tensor& lse,
                                                                  const std::optional<at::Tensor>& spans_) {
  const AttentionSizes x = check_heads(q_, k_, v_);
  const Spans spans = check_spans(spans_, x);
  check_same(dy_, q_, "dy", "q");
  check_same(y_, q_, "y", "q");
  TORCH_CHECK_VALUE(dy_.sizes() == q_.sizes() && y_.sizes() == q_.sizes(), "dy and y have shapes ", dy_.sizes(), " and ", y_.sizes(),
                    " and must have that of q, ", q_.sizes(), ": pass what forward returned, and its gradient");
  TORCH_CHECK_VALUE(lse.scalar_type() == at::kFloat && lse.device().is_cpu() && lse.is_contiguous() &&
                        lse.sizes() == at::IntArrayRef({x.b, x.heads, x.s}),
                    "lse is ", lse.scalar_type(), " of shape ", lse.sizes(), " and must be contiguous float32 [b, heads, s]: pass forward's");
  const at::Tensor dy = dense_rows(dy_), q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_), y = dense_rows(y_);
  const at::Tensor dq = at::empty({x.b, x.heads, x.s, x.d}, q.options());
  const at::Tensor dk = at::empty({x.b, x.kv_heads, x.s, x.d}, q.options()), dv = at::empty({x.b, x.kv_heads, x.s, x.d}, q.options());
  const int count = attention_threads(x, x.b * x.kv_heads);
  dispatch_float(q.scalar_type(), [&]<class T>(T) {
    const at::Tensor space = attention_space<T>(x, true, count);
    MEGAPAR_DISPATCH_BF16(attention_backward,
                          AttentionBackwardArgs<T>{view<const T>(dy), view<const T>(q), view<const T>(k), view<const T>(v), view<const T>(y),
                                                   data<float>(lse), view<T>(dq), view<T>(dk), view<T>(dv), spans, x, scale_of(x.d),
                                                   data<uint32_t>(space), count});
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) {
  m.impl("attention", megapar::attention);
  m.impl("attention_backward", megapar::attention_backward);
}
