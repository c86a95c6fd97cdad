// Included before every CUDA source that is compiled for the host: kernel launches go to the PTX interpreter instead of
// the emulated device. Plans, grids, workspaces and arguments are those of the unmodified host code.
#pragma once

#define cudaLaunchKernelEx emulated_cudaLaunchKernelEx
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor emulated_cudaOccupancyMaxActiveBlocksPerMultiprocessor
#include "../../cuda_emulation/cuda_runtime.h"
#undef cudaLaunchKernelEx
#undef cudaOccupancyMaxActiveBlocksPerMultiprocessor

namespace interpreted {

// Checks the configuration as a device does, and runs the entry of the PTX that the kernel stands for.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const void* const* arguments);
int occupancy();

}  // namespace interpreted

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  return std::apply(
      [&](auto&... value) {
        const void* pointers[] = {&value...};
        return interpreted::launch(*config, reinterpret_cast<const void*>(kernel), pointers);
      },
      values);
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = interpreted::occupancy();
  return cudaSuccess;
}
