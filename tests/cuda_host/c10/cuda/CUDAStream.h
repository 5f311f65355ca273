// As much of torch's header as csrc/cuda/bindings.cpp uses: the host has no streams.

#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream(DeviceIndex) { return nullptr; }

}  // namespace c10::cuda
