// megapar::dropout on CPU: what is checked, and which body runs.

#include "bindings.h"

#define MEGAPAR_KERNEL "dropout.inl"
#include "every_isa.h"

namespace megapar {
namespace {

at::Tensor dropout(const at::Tensor& x_, const at::Tensor& rows_, int64_t key, double p, int64_t column) {
  check_float(x_, "x");
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "p=", p, " must lie in [0, 1): lower it");
  const at::Tensor x = x_.contiguous(), rows = rows_.contiguous();
  const int64_t h = x.size(-1), t = h ? x.numel() / h : 0;
  TORCH_CHECK_VALUE(rows.scalar_type() == at::kLong && rows.device() == x.device() && (h == 0 || rows.numel() == t), "rows has shape ",
                    rows.sizes(), " and dtype ", rows.scalar_type(), ": give one int64 for each of the ", t, " rows of x");
  TORCH_CHECK_VALUE(column >= 0 && column + h <= int64_t(1) << 32, "column=", column, " and the ", h,
                    " columns behind it must lie in [0, 2^32): lower it");
  const at::Tensor y = at::empty(x.sizes(), x.options());
  const uint32_t least = uint32_t(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
  dispatch_float(x.scalar_type(), [&]<class T>(T) {
    MEGAPAR_DISPATCH(dropout, data<T>(x), data<int64_t>(rows), data<T>(y), t, h, uint64_t(key), uint32_t(column), least, float(1 / (1 - p)),
                     threads(2 * t * h * sizeof(T)));
  });
  return y;
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) { m.impl("dropout", megapar::dropout); }
