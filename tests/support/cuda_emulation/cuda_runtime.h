// Replaces CUDA's header of the same name when a host compiler compiles the kernels. Every thread of a block is a
// fiber. Blocks run one after another, those of a cooperative launch in turns. Barriers, warp exchanges and shared
// memory behave as on the device. What is undefined on a device fails here: shared memory starts as NaN, and writes
// beyond the requested size or barriers that not every thread reaches abort. Only the functions that the kernels use
// are present.
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
#define __noinline__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
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
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
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

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace emulation {
constexpr int kWarp = 32;

cudaError_t run(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel);
cudaError_t allow_shared(const void* function, int bytes);
extern int shared_limit, cache_size;  // bytes that a block can opt in to, and of the L2 cache
extern int processors;                // each can hold one block of a cooperative launch
void block_barrier();
void sleep();  // lets the other resident blocks run
void warp_barrier();
void* lane_values();  // 32 values of the running warp, alternating between exchanges
bool block_or(bool value);

// Every lane of the warp writes a value, then reads one. One barrier is enough, because exchanges alternate memory.
constexpr size_t kLaneBytes = 32;

template <typename T>
T* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= kLaneBytes);
  if (mask != 0xffffffffu) __builtin_trap();  // the kernels only exchange values in whole warps
  T* values = static_cast<T*>(lane_values());
  values[threadIdx.x % kWarp] = value;
  warp_barrier();
  return values;
}

}  // namespace emulation

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
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrL2CacheSize           ? emulation::cache_size
           : attribute == cudaDevAttrMultiProcessorCount ? emulation::processors
                                                         : emulation::shared_limit;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::sleep(); }
inline int __syncthreads_or(int value) { return emulation::block_or(value != 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange(mask, value)[(threadIdx.x % emulation::kWarp) ^ lanes];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const T* values = emulation::exchange(mask, value);
  const int source = static_cast<int>(threadIdx.x % emulation::kWarp) - distance;
  return source < 0 ? value : values[source];
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const bool* votes = emulation::exchange(mask, vote);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) bits |= unsigned(votes[lane]) << lane;
  return bits;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return expf(x); }
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

// Fibers share one thread of the operating system and switch only at barriers, so plain updates are atomic.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}

inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = old > value ? old : value;
  return old;
}
