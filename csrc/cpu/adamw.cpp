// megapar::adamw_ on CPU: what is checked, and how the list is cut.

#include "../common/adamw.h"

#include <array>
#include <cmath>

#include "bindings.h"
#include "spans.h"

namespace megapar {

// One parameter. Its element i is element base + i / columns * stride + i % columns of the logical tensor.
struct AdamwEntry {
  void* weight;
  const void* grad;
  void *master, *exp_avg, *exp_avg_sq;
  Coefficients coefficients;
  bool past_cache, stochastic;
  uint64_t key;
  int64_t base, columns, stride;
};

using AdamwBody = void (*)(const AdamwEntry& entry, int64_t begin, int64_t end);

}  // namespace megapar

#define MEGAPAR_KERNEL "adamw.inl"
#include "every_isa.h"

namespace megapar {
namespace {

// Denormals count as 0 while one of these lives: the moments of a parameter that gets no gradient end there, and never leave, and some
// processors take a hundred cycles for each. tests/ops/test_adamw.py::test_flushing_ends_with_the_call.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_ = _mm_getcsr();
#endif
};

// A write-only stream is worth sending past the cache where the call moves more than the cache holds.
constexpr int64_t CACHE = 64 << 20;
constexpr int64_t BLOCK = 64;

struct Tensors {
  const at::Tensor &weight, &grad, *master, &exp_avg, &exp_avg_sq;
};

void check_output(const at::Tensor& x, const at::Tensor& weight, const char* name, size_t i) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, "[", i, "] is on ", x.device(), " and the kernel runs on the CPU: move it");
  TORCH_CHECK_VALUE(x.sizes() == weight.sizes(), name, "[", i, "] has shape ", x.sizes(), " and weights[", i, "] ", weight.sizes(),
                    ": they must be equal");
  TORCH_CHECK_VALUE(x.is_contiguous(), name, "[", i, "] has strides ", x.strides(), " and is written in place: make it contiguous");
}

void check_apart(const at::Tensor& output, const at::Tensor& other, const char* name, const char* other_name, size_t i) {
  if (output.numel() == 0 || other.numel() == 0) return;
  const auto extent = [](const at::Tensor& x) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    const char* begin = static_cast<const char*>(x.const_data_ptr());
    return std::pair(begin, begin + (last + 1) * x.element_size());
  };
  const auto [begin, end] = extent(output);
  const auto [other_begin, other_end] = extent(other);
  TORCH_CHECK_VALUE(end <= other_begin || other_end <= begin, name, "[", i, "] shares memory with ", other_name, "[", i,
                    "] and is written: give each its own");
}

void check(const Tensors& t, size_t i) {
  const at::ScalarType weight = t.weight.scalar_type(), moment = t.exp_avg.scalar_type();
  check_float(t.weight.dim() ? t.weight : t.weight.unsqueeze(0), "a weight");
  check_float(t.grad.dim() ? t.grad : t.grad.unsqueeze(0), "a gradient");
  TORCH_CHECK_VALUE((moment == at::kFloat || moment == at::kBFloat16) && t.exp_avg_sq.scalar_type() == moment, "exp_avgs[", i, "] has dtype ",
                    moment, " and exp_avg_sqs[", i, "] ", t.exp_avg_sq.scalar_type(), ": both must be float32, or both bfloat16");
  const std::array<std::pair<const at::Tensor*, const char*>, 4> outputs = {
      {{&t.weight, "weights"}, {&t.exp_avg, "exp_avgs"}, {&t.exp_avg_sq, "exp_avg_sqs"}, {t.master, "masters"}}};
  if (t.master != nullptr) {
    const at::ScalarType master = t.master->scalar_type();
    TORCH_CHECK_VALUE((master == at::kFloat && weight != at::kFloat) || (master == at::kShort && weight == at::kBFloat16), "masters[", i,
                      "] has dtype ", master, " and weights[", i, "] ", weight,
                      ": a master is float32 for a 16-bit weight, or int16 (a remainder) for a bfloat16 one");
  }
  TORCH_CHECK_VALUE(t.grad.sizes() == t.weight.sizes(), "grads[", i, "] has shape ", t.grad.sizes(), " and weights[", i, "] ",
                    t.weight.sizes(), ": they must be equal");
  for (size_t a = 0; a < outputs.size(); ++a) {
    if (outputs[a].first == nullptr) continue;
    check_output(*outputs[a].first, t.weight, outputs[a].second, i);
    check_apart(*outputs[a].first, t.grad, outputs[a].second, "grads", i);
    for (size_t b = 0; b < a; ++b) check_apart(*outputs[a].first, *outputs[b].first, outputs[a].second, outputs[b].second, i);
  }
}

// body(M{}) with M the master's type; `none` where there is none.
struct none {};

AdamwBody body_of(const Tensors& t) {
  AdamwBody body = nullptr;
  const auto choose = [&]<class W, class M>(W, M) {
    dispatch_float(t.grad.scalar_type(), [&]<class G>(G) {
      if (t.exp_avg.scalar_type() == at::kFloat)
        body = MEGAPAR_DISPATCH(adamw_body, G{}, W{}, M{}, float{});
      else
        body = MEGAPAR_DISPATCH(adamw_body, G{}, W{}, M{}, bf16{});
    });
  };
  dispatch_float(t.weight.scalar_type(), [&]<class W>(W) {
    if (t.master == nullptr) return choose(W{}, none{});
    if constexpr (sizeof(W) == 2) {
      if (t.master->scalar_type() == at::kFloat) return choose(W{}, float{});
    }
    if constexpr (std::is_same_v<W, bf16>) choose(W{}, int16_t{});
  });
  return body;
}

struct StepState {
  const StepScalars* scalars;
  const StepCounter* counters;
  int64_t rows;
};

StepState step_state_of(const at::Tensor& scalars, const at::Tensor& counters) {
  TORCH_CHECK_VALUE(scalars.scalar_type() == at::kDouble && scalars.is_contiguous() && scalars.numel() == 6, "scalars is ",
                    scalars.scalar_type(), " of shape ", scalars.sizes(), " and must be contiguous float64 [6]: see StepState");
  TORCH_CHECK_VALUE(counters.scalar_type() == at::kDouble && counters.is_contiguous() && counters.numel() % 3 == 0, "counters is ",
                    counters.scalar_type(), " of shape ", counters.sizes(), " and must be contiguous float64 [n, 3]: see StepState");
  return {reinterpret_cast<const StepScalars*>(scalars.const_data_ptr<double>()),
          reinterpret_cast<const StepCounter*>(counters.const_data_ptr<double>()), counters.numel() / 3};
}

// What a scheduler wrote, in memory, so that a captured step reads it.
double number_of(const std::optional<at::Tensor>& lr_scale) {
  if (!lr_scale) return 1;
  TORCH_CHECK_VALUE(lr_scale->scalar_type() == at::kDouble && lr_scale->numel() == 1 && lr_scale->device().is_cpu(), "lr_scale is ",
                    lr_scale->scalar_type(), " of shape ", lr_scale->sizes(), " on ", lr_scale->device(),
                    " and must be one float64 number on the CPU: convert it");
  return *lr_scale->const_data_ptr<double>();
}

void check(const AdamwOptions& o) {
  TORCH_CHECK_VALUE(o.lr >= 0, "lr=", o.lr, " must not be negative: raise it");
  TORCH_CHECK_VALUE(o.beta1 >= 0 && o.beta1 < 1, "beta1=", o.beta1, " must lie in [0, 1): change it");
  TORCH_CHECK_VALUE(o.beta2 >= 0 && o.beta2 < 1, "beta2=", o.beta2, " must lie in [0, 1): change it");
  TORCH_CHECK_VALUE(o.eps >= 0, "eps=", o.eps, " must not be negative: raise it");
  TORCH_CHECK_VALUE(o.weight_decay >= 0, "weight_decay=", o.weight_decay, " must not be negative: raise it");
}

// Where its random bits come from: `places` holds base, columns and stride of each tensor, or nothing where each is a whole logical one.
void seed_noise(AdamwEntry& e, const Tensors& t, size_t i, int64_t seed, double step, at::IntArrayRef ids, at::IntArrayRef places) {
  TORCH_CHECK_VALUE(t.master != nullptr || t.weight.scalar_type() != at::kHalf, "weights[", i,
                    "] is float16 and stochastic rounding knows bfloat16: give it a float32 master, or no seed");
  e.stochastic = true;
  e.key = noise_key(uint64_t(seed), uint64_t(step), uint64_t(ids[i]));
  if (places.empty()) return;
  e.base = places[3 * i], e.columns = places[3 * i + 1], e.stride = places[3 * i + 2];
  TORCH_CHECK_VALUE(e.base >= 0 && e.columns > 0 && e.stride >= e.columns, "places[", i, "] is base ", e.base, ", columns ", e.columns,
                    " and stride ", e.stride, ": base must not be negative, and 0 < columns <= stride");
}

AdamwEntry entry_of(const Tensors& t, const Coefficients& coefficients) {
  AdamwEntry e = {};
  e.weight = t.weight.mutable_data_ptr(), e.exp_avg = t.exp_avg.mutable_data_ptr(), e.exp_avg_sq = t.exp_avg_sq.mutable_data_ptr();
  e.grad = t.grad.const_data_ptr(), e.master = t.master != nullptr ? t.master->mutable_data_ptr() : nullptr;
  e.coefficients = coefficients;
  e.past_cache = reinterpret_cast<uintptr_t>(e.weight) % 32 == 0;
  e.columns = e.stride = std::max<int64_t>(t.weight.numel(), 1);
  return e;
}

void run(const std::vector<AdamwEntry>& entries, const std::vector<AdamwBody>& bodies, const std::vector<Extent>& list, int64_t bytes) {
  parallel(threads(bytes), [&](int thread, int count) {
    const FlushDenormals flushing;
    for_each_span(list.data(), list.size(), BLOCK, thread, count,
                  [&](int64_t i, int64_t begin, int64_t end) { bodies[i](entries[i], begin, end); });
#if defined(__x86_64__)
    _mm_sfence();  // else another thread might see the end of the step before its last streamed weights
#endif
  });
}

void adamw_(at::TensorList weights, at::TensorList grads, at::TensorList masters, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
            const at::Tensor& scalars, const at::Tensor& counters, at::IntArrayRef rows, double lr, double beta1, double beta2, double eps,
            double weight_decay, bool decoupled, std::optional<int64_t> seed, at::IntArrayRef ids, at::IntArrayRef places,
            const std::optional<at::Tensor>& lr_scale) {
  const size_t n = weights.size();
  const AdamwOptions options = {lr, beta1, beta2, eps, weight_decay, decoupled};
  check(options);
  const double rate = number_of(lr_scale);
  TORCH_CHECK_VALUE(grads.size() == n && (masters.empty() || masters.size() == n) && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                        rows.size() == n && (places.empty() || places.size() == 3 * n) && (!seed || ids.size() == n),
                    "there are ", n, " weights, ", grads.size(), " grads, ", masters.size(), " masters, ", exp_avgs.size(), " exp_avgs, ",
                    exp_avg_sqs.size(), " exp_avg_sqs, ", rows.size(), " rows, ", ids.size(), " ids and ", places.size(),
                    " numbers in places: give one of each per weight (masters may be empty; places hold three)");
  const StepState state = step_state_of(scalars, counters);
  std::vector<at::Tensor> dense;  // keeps contiguous copies alive
  std::vector<AdamwEntry> entries;
  std::vector<AdamwBody> bodies;
  std::vector<Extent> list;
  int64_t bytes = 0;
  dense.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensors given = {weights[i], grads[i], masters.empty() ? nullptr : &masters[i], exp_avgs[i], exp_avg_sqs[i]};
    check(given, i);
    TORCH_CHECK_VALUE(0 <= rows[i] && rows[i] < state.rows, "row ", rows[i], " must lie in [0, ", state.rows, "), the rows of counters");
    dense.push_back(grads[i].contiguous());
    const Tensors t = {given.weight, dense.back(), given.master, given.exp_avg, given.exp_avg_sq};
    const int64_t width = t.grad.element_size() + 4 * t.exp_avg.element_size() +
                          (t.master == nullptr ? 2 : t.master->scalar_type() == at::kFloat ? 1 : 2) * t.weight.element_size() +
                          (t.master == nullptr ? 0 : 2 * t.master->element_size());
    list.push_back({t.weight.numel(), width});
    bytes += t.weight.numel() * width;
    entries.push_back(entry_of(t, coefficients_of(options, *state.scalars, state.counters[rows[i]], rate)));
    if (seed) seed_noise(entries.back(), t, i, *seed, state.counters[rows[i]].step, ids, places);
    bodies.push_back(body_of(t));
  }
  if (state.scalars->skip != 0) return;
  for (size_t i = 0; i < n; ++i) {
    AdamwEntry& e = entries[i];
    // Rows of another length start between two aligned vectors: test_adamw.py::test_streamed_weights_of_any_width.
    e.past_cache = e.past_cache && bytes > CACHE && (e.columns % 16 == 0 || e.columns >= list[i].numel);
  }
  // A backward that saved a weight must notice: tests/ops/test_adamw.py::test_a_backward_notices.
  for (const at::Tensor& weight : weights)
    if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
  run(entries, bodies, list, bytes);
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) { m.impl("adamw_", megapar::adamw_); }
