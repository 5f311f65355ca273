// megapar::grad_norm_ on CPU: what is checked, and how the list is cut.

#include <cmath>

#include "bindings.h"
#include "spans.h"

namespace megapar {

struct NormBodies {
  double (*sum_of_squares)(const void* data, int64_t n);
  void (*count_elements)(const void* data, int64_t n, int64_t& finite, int64_t& zeros);
};

}  // namespace megapar

#define MEGAPAR_KERNEL "grad_norm.inl"
#include "every_isa.h"

namespace megapar {
namespace {

constexpr int64_t BLOCK = 16384;

struct Partial {
  double squares = 0, nonfinite = 0, zeros = 0;
};

Partial of_block(const NormBodies& bodies, const void* data, int64_t n, bool count_zeros) {
  Partial found;
  found.squares = bodies.sum_of_squares(data, n);
  // Squares of finite elements cannot overflow in fp64, so elements are counted, from cache, only where the sum says so.
  if (std::isfinite(found.squares) && !count_zeros) return found;
  int64_t finite = 0, zeros = 0;
  bodies.count_elements(data, n, finite, zeros);
  return {found.squares, double(n - finite), count_zeros ? double(zeros) : 0};
}

// One partial sum a block, whoever computes it, added in order: the bits depend neither on the threads nor on how a list is cut into calls.
void grad_norm_(at::Tensor& total, at::TensorList grads, bool count_zeros) {
  TORCH_CHECK_VALUE(total.scalar_type() == at::kDouble && total.numel() == 3 && total.is_contiguous() && total.device().is_cpu(),
                    "total is ", total.scalar_type(), " of shape ", total.sizes(), " and must be contiguous float64 [3]: make one");
  std::vector<at::Tensor> dense;
  std::vector<Extent> list;
  std::vector<NormBodies> bodies;
  std::vector<int64_t> first_block;
  int64_t blocks = 0, bytes = 0;
  for (const at::Tensor& grad : grads) {
    check_float(grad.dim() ? grad : grad.unsqueeze(0), "a gradient");
    dense.push_back(grad.contiguous());
    list.push_back({grad.numel(), grad.element_size()});
    dispatch_float(grad.scalar_type(), [&]<class T>(T) { bodies.push_back(MEGAPAR_DISPATCH(norm_bodies, T{})); });
    first_block.push_back(blocks);
    blocks += (grad.numel() + BLOCK - 1) / BLOCK;
    bytes += grad.numel() * grad.element_size();
  }
  std::vector<Partial> partials(blocks);
  parallel(threads(bytes), [&](int thread, int count) {
    for_each_span(list.data(), list.size(), BLOCK, thread, count, [&](int64_t i, int64_t begin, int64_t end) {
      const char* data = static_cast<const char*>(dense[i].const_data_ptr());
      for (int64_t at = begin; at < end; at += BLOCK)
        partials[first_block[i] + at / BLOCK] = of_block(bodies[i], data + at * list[i].width, std::min(BLOCK, end - at), count_zeros);
    });
  });
  first_block.push_back(blocks);
  double* out = total.mutable_data_ptr<double>();
  for (size_t i = 0; i < list.size(); ++i) {
    Partial sum;
    for (int64_t b = first_block[i]; b < first_block[i + 1]; ++b) {
      sum.squares += partials[b].squares, sum.nonfinite += partials[b].nonfinite, sum.zeros += partials[b].zeros;
    }
    out[0] += sum.squares, out[1] += sum.nonfinite, out[2] += sum.zeros;
  }
}

}  // namespace
}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CPU, m) { m.impl("grad_norm_", megapar::grad_norm_); }
