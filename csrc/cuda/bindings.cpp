// The launchers as torch ops of the namespace megapar_cuda, for megapar/ops/cuda.py, which checks tensors and builds the tables. This is the
// only file of csrc/cuda that knows torch; importing megapar._CUDA runs its registration.

#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels.h"

namespace megapar::cuda {
namespace {

// The numbers of a table: rows of `columns`.
template <class T>
T* data(const at::Tensor& x, at::ScalarType dtype, int64_t columns, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype && x.is_contiguous() && x.numel() % columns == 0, name, " is ", x.scalar_type(), " of shape ",
                    x.sizes(), " and must be contiguous ", dtype, " [n, ", columns, "]: build it with megapar.ops.multi_tensor");
  return static_cast<T*>(x.data_ptr());
}

Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    case at::kShort: return Dtype::int16;
    default: TORCH_CHECK_VALUE(false, "the kernels know no ", dtype, ": convert it, or use MEGAPAR_BACKEND=reference");
  }
}

Chunks chunks_of(const at::Tensor& chunks, int64_t size) {
  TORCH_CHECK_VALUE(size > 0 && size % 16 == 0, "chunk_size=", size, " must be a multiple of 16, so that vectors are aligned: change it");
  return {data<const Chunk>(chunks, at::kInt, 2, "chunks"), chunks.numel() / 2, size};
}

void check(cudaError_t error, const char* kernel) {
  TORCH_CHECK(error == cudaSuccess, "the launch of ", kernel, " failed: ", cudaGetErrorString(error));
}

cudaStream_t stream_of(const at::Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()); }

void adamw_(const at::Tensor& tensors, const at::Tensor& chunks, int64_t chunk_size, at::ScalarType weight, at::ScalarType grad,
            std::optional<at::ScalarType> master, at::ScalarType moment, const at::Tensor& scalars, const at::Tensor& counters,
            const std::optional<at::Tensor>& lr_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
            bool decoupled, std::optional<int64_t> seed) {
  const c10::DeviceGuard guard(tensors.device());
  const AdamwDtypes dtypes = {dtype_of(weight), dtype_of(grad), master ? dtype_of(*master) : Dtype::none, dtype_of(moment)};
  check(adamw(dtypes, data<const AdamwEntry>(tensors, at::kLong, 11, "tensors"), chunks_of(chunks, chunk_size),
              data<const StepScalars>(scalars, at::kDouble, 6, "scalars"), data<const StepCounter>(counters, at::kDouble, 3, "counters"),
              lr_scale ? data<const double>(*lr_scale, at::kDouble, 1, "lr_scale") : nullptr,
              {lr, beta1, beta2, eps, weight_decay, decoupled}, seed.has_value(), uint64_t(seed.value_or(0)), stream_of(tensors)),
        "adamw");
}

void grad_norm_chunks_(at::Tensor& partials, const at::Tensor& tensors, const at::Tensor& chunks, int64_t chunk_size, at::ScalarType grad,
                       bool count_zeros) {
  const c10::DeviceGuard guard(partials.device());
  check(grad_norm_chunks(dtype_of(grad), data<const GradEntry>(tensors, at::kLong, 3, "tensors"), chunks_of(chunks, chunk_size), count_zeros,
                         data<GradSums>(partials, at::kDouble, 3, "partials"), stream_of(partials)),
        "grad_norm");
}

void grad_norm_total_(at::Tensor& total, at::Tensor& sums, const at::Tensor& partials, const at::Tensor& tensors, int64_t chunk_size) {
  const c10::DeviceGuard guard(total.device());
  const int64_t count = tensors.numel() / 3;
  TORCH_CHECK_VALUE(total.numel() == 3 && sums.numel() == 3 * count, "total has shape ", total.sizes(), " and sums ", sums.sizes(), " for ",
                    count, " tensors: give three numbers, and three for each");
  check(grad_norm_total(data<const GradEntry>(tensors, at::kLong, 3, "tensors"), count, chunk_size,
                        data<const GradSums>(partials, at::kDouble, 3, "partials"), data<GradSums>(sums, at::kDouble, 3, "sums"),
                        data<GradSums>(total, at::kDouble, 3, "total"), stream_of(total)),
        "grad_norm");
}

void step_state_(at::Tensor& scalars, at::Tensor& counters, const at::Tensor& total, const at::Tensor& count, const at::Tensor& rows,
                 std::optional<double> max_norm, double growth_factor, double backoff_factor, int64_t growth_interval, int64_t hysteresis,
                 double min_scale) {
  const c10::DeviceGuard guard(scalars.device());
  check(step_state(data<StepScalars>(scalars, at::kDouble, 6, "scalars"), data<StepCounter>(counters, at::kDouble, 3, "counters"),
                   data<const double>(total, at::kDouble, 3, "total"), data<const double>(count, at::kDouble, 1, "count"),
                   data<const StepRow>(rows, at::kDouble, 3, "rows"), rows.numel() / 3, max_norm.value_or(-1),
                   {growth_factor, backoff_factor, growth_interval, hysteresis, min_scale}, stream_of(scalars)),
        "step_state");
}

}  // namespace
}  // namespace megapar::cuda

TORCH_LIBRARY(megapar_cuda, m) {
  m.def(
      "adamw_(Tensor tensors, Tensor chunks, int chunk_size, ScalarType weight, ScalarType grad, ScalarType? master, ScalarType moment,"
      " Tensor scalars, Tensor counters, Tensor? lr_scale, float lr, float beta1, float beta2, float eps, float weight_decay,"
      " bool decoupled, int? seed) -> ()",
      megapar::cuda::adamw_);
  m.def(
      "grad_norm_chunks_(Tensor(a!) partials, Tensor tensors, Tensor chunks, int chunk_size, ScalarType grad, bool count_zeros) -> ()",
      megapar::cuda::grad_norm_chunks_);
  m.def("grad_norm_total_(Tensor(a!) total, Tensor(b!) sums, Tensor partials, Tensor tensors, int chunk_size) -> ()",
        megapar::cuda::grad_norm_total_);
  m.def(
      "step_state_(Tensor(a!) scalars, Tensor(b!) counters, Tensor total, Tensor count, Tensor rows, float? max_norm,"
      " float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale) -> ()",
      megapar::cuda::step_state_);
}

// The module is empty.
PyMODINIT_FUNC PyInit__CUDA() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
