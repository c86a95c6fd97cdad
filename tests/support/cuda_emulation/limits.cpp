// The limits of the emulated devices, and what the host can ask and set. There are two devices, so that a call which
// takes the limits of one for those of the other, or sets an attribute for one only, is noticed.
#include <map>
#include <string>
#include <utility>

#include "scheduler.h"

namespace emulation {

int processors = 132;

namespace {
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr int kLeastOptIn = 99 * 1024, kReserved = 1024;
int shared_limit = 227 * 1024, cache_size = 50 << 20;  // those of an H200, unless a test changes them
int device = 0;
int capability = 90;                // compute capability, ten times the major version plus the minor one
cudaError_t refusal = cudaSuccess;  // what every launch and opt-in fails with
unsigned after_fill = 0;            // what the first word of memory is after it has been zeroed
std::map<std::pair<int, const void*>, size_t> opted;  // by device and kernel: what it opted in to
}  // namespace

int current_device() { return device; }

// A test may leave a multiprocessor less than any device has, so that nothing is kept on chip which need not be. Blocks
// still get what kernels need.
int opt_in_limit() { return shared_limit < kLeastOptIn ? kLeastOptIn : shared_limit; }

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int of) {
  if (of != device) observe_fault("device", "an attribute of another device than the current one", nullptr);
  switch (attribute) {
    case cudaDevAttrL2CacheSize:
      *value = cache_size;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_limit + kReserved;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = opt_in_limit();
  }
  return cudaSuccess;
}

cudaError_t describe(cudaDeviceProp* properties, int) {
  std::string("Emulated GPU").copy(properties->name, sizeof properties->name - 1);
  properties->major = capability / 10, properties->minor = capability % 10;
  return cudaSuccess;
}

cudaError_t refused() { return refusal; }

cudaError_t allow_shared(const void* function, int bytes) {
  if (refusal != cudaSuccess) return refusal;
  if (bytes > opt_in_limit()) return cudaErrorInvalidValue;
  size_t& allowed = opted[{device, function}];
  if (static_cast<size_t>(bytes) < allowed) {
    observe_fault("attribute",
                  "the shared memory of a kernel is lowered: another host thread may be about to launch it", nullptr);
  }
  allowed = static_cast<size_t>(bytes);
  return cudaSuccess;
}

size_t allowed_shared(const void* function) {
  const auto found = opted.find({device, function});
  return found != opted.end() && found->second > kDefaultSharedBytes ? found->second : kDefaultSharedBytes;
}

cudaError_t fill(void* to, int value, size_t bytes, cudaStream_t stream) {
  observe_fill(to, bytes, stream);
  memset(to, value, bytes);
  if (bytes >= sizeof after_fill) memcpy(to, &after_fill, sizeof after_fill);
  return cudaSuccess;
}

}  // namespace emulation

// Sets what the device reports (bytes of a multiprocessor and of the L2 cache, multiprocessors), to test the routes of
// other devices. No kernel has opted in to more shared memory yet.
extern "C" __attribute__((visibility("default"))) void emulation_set_device(int shared_limit, int cache_size,
                                                                            int processors) {
  emulation::shared_limit = shared_limit;
  emulation::cache_size = cache_size;
  emulation::processors = processors;
  emulation::opted.clear();
}

// Makes the device one of this compute capability (80: 8.0) that refuses every kernel with an error of CUDA; 0: none.
extern "C" __attribute__((visibility("default"))) void emulation_refuse(int capability, int error) {
  emulation::capability = capability;
  emulation::refusal = static_cast<cudaError_t>(error);
}

// What the library says of its build (csrc/cpu/common/dispatch.cpp).
extern "C" const char* cpr_cuda_architectures() { return "80-real,90a-real"; }
extern "C" const char* cpr_cuda_driver_error() { return "the driver is too old"; }

// Makes device 0 or 1 the current one.
extern "C" __attribute__((visibility("default"))) void emulation_use_device(int device) { emulation::device = device; }

// Makes a queue in zeroed memory start at `first`, so that a test can reach the last of very many pieces of work.
extern "C" __attribute__((visibility("default"))) void emulation_start_queue(unsigned first) {
  emulation::after_fill = first;
}
