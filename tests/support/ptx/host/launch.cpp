// The launches of launch.h. Limits and memory are those of the emulated device.
#include "launch.h"

#include "../../cuda_emulation/scheduler.h"

namespace emulation {
extern unsigned long matrix_products, launches;
}

extern "C" long ptx_launch(const void* host_function, const uint32_t* grid, uint32_t threads, uint64_t dynamic_shared,
                           const void* const* arguments, int cooperative);

namespace interpreted {
namespace {

int blocks_per_processor = 1;

}  // namespace

int occupancy() { return blocks_per_processor; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const void* const* arguments) {
  const dim3 grid = config.gridDim;
  const unsigned threads = config.blockDim.x;
  const unsigned long long blocks = 1ull * grid.x * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || config.blockDim.y * config.blockDim.z != 1 ||
      blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      config.dynamicSmemBytes > emulation::allowed_shared(kernel)) {
    return cudaErrorInvalidConfiguration;
  }
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative != 0;
  }
  if (cooperative && blocks > 1ull * emulation::processors * blocks_per_processor)
    return cudaErrorCooperativeLaunchTooLarge;
  const uint32_t along[3] = {grid.x, grid.y, grid.z};
  const long products = ptx_launch(kernel, along, threads, config.dynamicSmemBytes, arguments, cooperative);
  if (products < 0) return cudaErrorInvalidValue;
  ++emulation::launches;
  emulation::matrix_products += static_cast<unsigned long>(products);
  return cudaSuccess;
}

}  // namespace interpreted

// Sets how many blocks of a kernel a multiprocessor holds.
extern "C" __attribute__((visibility("default"))) void interpreted_set_occupancy(int blocks) {
  interpreted::blocks_per_processor = blocks;
}
