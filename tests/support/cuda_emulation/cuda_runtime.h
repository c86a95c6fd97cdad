// Replaces CUDA's header of the same name when a host compiler compiles the kernels. Every thread of a block is a
// fiber. Blocks run one after another, those of a cooperative launch in turns. Barriers, warp exchanges and shared
// memory behave as on the device. What is undefined on a device fails here: shared memory starts as NaN, and writes
// beyond the requested size or barriers that not every thread reaches at the same line abort. Only the functions that
// the kernels use are present.
//
// Functions that touch memory of the device are in instructions.cpp, which is never instrumented: the sanitizer
// (sanitizer/) hears of them from there, and of plain accesses from the compiler.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define EMULATED_INLINE inline __attribute__((always_inline))  // so that a return address lies in the kernel
#define __noinline__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct float3 {
  float x, y, z;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct cudaStream* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace emulation {
constexpr int kWarp = 32;

// A line of a kernel. Threads that meet at a barrier or in a warp instruction must be at the same one.
struct Site {
  const char* file;
  int line;
};

cudaError_t run(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel);
cudaError_t allow_shared(const void* function, int bytes);
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t describe(cudaDeviceProp* properties, int device);
cudaError_t fill(void* to, int value, size_t bytes, cudaStream_t stream);
int current_device();
void block_barrier(Site site);
bool block_or(bool value, Site site);
void warp_barrier(Site site);       // orders no memory: exchanges use it
void warp_fence(Site site);         // orders the memory accesses of the warp
void warpgroup_barrier(Site site);  // of four warps; orders no memory
void* lane_values();                // 32 values of the running warp, alternating between exchanges
void sleep();                       // lets the other resident blocks run
void fence();
unsigned atomic_add(unsigned* address, unsigned value);
unsigned atomic_or(unsigned* address, unsigned value);
unsigned atomic_max(unsigned* address, unsigned value);
[[noreturn]] void fail(const char* what);

// Every lane of the warp writes a value, then reads one. One barrier is enough, because exchanges alternate memory.
constexpr size_t kLaneBytes = 32;

template <typename T>
EMULATED_INLINE T* exchange(unsigned mask, T value, Site site) {
  static_assert(sizeof(T) <= kLaneBytes);
  if (mask != 0xffffffffu) fail("an exchange of part of a warp: the kernels exchange in whole warps only");
  T* values = static_cast<T*>(lane_values());
  values[threadIdx.x % kWarp] = value;
  warp_barrier(site);
  return values;
}

}  // namespace emulation

#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  return emulation::run(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, values); });
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return emulation::device_attribute(value, attribute, device);
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return emulation::describe(properties, device);
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return emulation::fill(to, value, bytes, stream);
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

EMULATED_INLINE void __syncthreads(EMULATED_SITE) { emulation::block_barrier({file, line}); }
EMULATED_INLINE int __syncthreads_or(int value, EMULATED_SITE) { return emulation::block_or(value != 0, {file, line}); }
EMULATED_INLINE void __threadfence() { emulation::fence(); }
EMULATED_INLINE void __nanosleep(unsigned) { emulation::sleep(); }

EMULATED_INLINE void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_SITE) {
  if (mask != 0xffffffffu) emulation::fail("__syncwarp of part of a warp");
  emulation::warp_fence({file, line});
}

template <typename T>
EMULATED_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATED_SITE) {
  return emulation::exchange(mask, value, {file, line})[(threadIdx.x % emulation::kWarp) ^ lanes];
}

template <typename T>
EMULATED_INLINE T __shfl_up_sync(unsigned mask, T value, int distance, EMULATED_SITE) {
  const T* values = emulation::exchange(mask, value, {file, line});
  const int source = static_cast<int>(threadIdx.x % emulation::kWarp) - distance;
  return source < 0 ? value : values[source];
}

template <typename T>
EMULATED_INLINE T __shfl_sync(unsigned mask, T value, int source, EMULATED_SITE) {
  return emulation::exchange(mask, value, {file, line})[source % emulation::kWarp];
}

EMULATED_INLINE unsigned __ballot_sync(unsigned mask, bool vote, EMULATED_SITE) {
  const bool* votes = emulation::exchange(mask, vote, {file, line});
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) bits |= unsigned(votes[lane]) << lane;
  return bits;
}

EMULATED_INLINE bool __any_sync(unsigned mask, bool vote, EMULATED_SITE) {
  return __ballot_sync(mask, vote, file, line) != 0;
}

template <typename Combine>
inline unsigned emulated_reduction(unsigned mask, unsigned value, Combine combine, const char* file, int line) {
  const unsigned* values = emulation::exchange(mask, value, {file, line});
  unsigned result = values[0];
  for (int lane = 1; lane < emulation::kWarp; ++lane) result = combine(result, values[lane]);
  return result;
}

EMULATED_INLINE unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATED_SITE) {
  return emulated_reduction(mask, value, [](unsigned a, unsigned b) { return a + b; }, file, line);
}

EMULATED_INLINE unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATED_SITE) {
  return emulated_reduction(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; }, file, line);
}

EMULATED_INLINE unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATED_SITE) {
  return emulated_reduction(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; }, file, line);
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return shift % 32 == 0 ? high : high << shift % 32 | low >> (32 - shift % 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return expf(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }  // of NaN: 0
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

EMULATED_INLINE unsigned atomicAdd(unsigned* address, unsigned value) { return emulation::atomic_add(address, value); }
EMULATED_INLINE unsigned atomicOr(unsigned* address, unsigned value) { return emulation::atomic_or(address, value); }
EMULATED_INLINE unsigned atomicMax(unsigned* address, unsigned value) { return emulation::atomic_max(address, value); }
