// megapar::step_state_ on CPU: what is checked.

#include "../common/step_state.h"

#include "bindings.h"

namespace megapar {
namespace {

void check_doubles(const at::Tensor& x, int64_t columns, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kDouble && x.is_contiguous() && x.device().is_cpu() && x.numel() % columns == 0, name, " is ",
                    x.scalar_type(), " of shape ", x.sizes(), " and must be contiguous float64 [..., ", columns, "]: see StepState");
}

void step_state_(at::Tensor& scalars, at::Tensor& counters, const at::Tensor& total, const at::Tensor& count, at::IntArrayRef rows,
                 at::ArrayRef<double> beta1, at::ArrayRef<double> beta2, std::optional<double> max_norm, double growth_factor,
                 double backoff_factor, int64_t growth_interval, int64_t hysteresis, double min_scale) {
  check_doubles(scalars, 6, "scalars");
  check_doubles(counters, 3, "counters");
  check_doubles(total, 3, "total");
  check_doubles(count, 1, "count");
  TORCH_CHECK_VALUE(scalars.numel() == 6 && total.numel() == 3 && count.numel() == 1, "scalars, total and count have ", scalars.numel(), ", ",
                    total.numel(), " and ", count.numel(), " numbers and must have 6, 3 and 1: see StepState");
  TORCH_CHECK_VALUE(beta1.size() == rows.size() && beta2.size() == rows.size(), "rows has ", rows.size(), " entries, beta1 ", beta1.size(),
                    " and beta2 ", beta2.size(), ": give one of each per row");
  const double divisor = *count.const_data_ptr<double>();
  TORCH_CHECK_VALUE(divisor > 0, "count=", divisor, " must be above 0, gradients are divided by it: give it samples with targets");
  const int64_t held = counters.numel() / 3;
  for (const int64_t row : rows)
    TORCH_CHECK_VALUE(0 <= row && row < held, "row ", row, " must lie in [0, ", held, "), the rows of counters: correct it");
  auto& state = *reinterpret_cast<StepScalars*>(scalars.mutable_data_ptr<double>());
  finish_gradients(state, total.const_data_ptr<double>(), divisor, max_norm.value_or(-1));
  move_loss_scale(state, {growth_factor, backoff_factor, growth_interval, hysteresis, min_scale});
  if (state.skip != 0) return;
  auto* counter = reinterpret_cast<StepCounter*>(counters.mutable_data_ptr<double>());
  for (size_t i = 0; i < rows.size(); ++i) advance(counter[rows[i]], beta1[i], beta2[i]);
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) { m.impl("step_state_", megapar::step_state_); }
