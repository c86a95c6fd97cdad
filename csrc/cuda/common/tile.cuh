// Products of one block of 128 threads with tiles in registers: scores of a tile of rows against a tile of rows, and
// weighted sums of rows. Thread t owns output rows t/16 + 8i in both; its columns are t%16 + 16j in dot_tile, and the
// two groups of four columns 4(t%16) + 64j in add_weighted_rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "cpr_fast.h"
#include "cuda/common/reduce.cuh"

namespace cpr {

constexpr int kTileThreads = 128;
constexpr int kTileLanes = 16;                        // neighbouring lanes that share an output row
constexpr int kTileRows = kTileThreads / kTileLanes;  // output rows for each row that a thread owns
constexpr int kDepth = 16;                            // features in a panel
constexpr int kDepthStride = kDepth + 4;              // padded: 16-byte reads of 8 rows hit different banks

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Four neighbouring features, read as one vector.
template <typename T>
struct Packed4 {
  uint2 bits;  // two 16-bit features each
};
template <>
struct Packed4<float> {
  float4 values;
};

__device__ __forceinline__ float4 widen4(const Packed4<float>& packed) { return packed.values; }

__device__ __forceinline__ float4 widen4(const Packed4<__nv_bfloat16>& packed) {
  const uint2 x = packed.bits;
  return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16),
                     __uint_as_float(x.y & 0xffff0000u));
}

__device__ __forceinline__ float4 widen4(const Packed4<__half>& packed) {
  const uint2 x = packed.bits;
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&x.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&x.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

// Reads a dense [rows, D] matrix as float, four features at a time; zero outside it and in empty rows.
template <typename T>
struct Matrix {
  static constexpr bool kConsecutive = true;  // whether each row starts where the row before ends
  const T* data;
  int64_t rows, D;
  const int64_t* ids;  // [rows] or null: rows with id -1 read as zero, because their content is undefined
  bool aligned;        // every row starts at a multiple of four features

  __device__ Matrix(const T* data, int64_t rows, int64_t D, const int64_t* ids = nullptr)
      : data(data),
        rows(rows),
        D(D),
        ids(ids),
        aligned(D % 4 == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Packed4<T>) == 0) {}

  // The number of a row in `data`, and where it starts there.
  __device__ __forceinline__ int64_t slot(int64_t row) const { return row; }
  __device__ __forceinline__ int64_t at(int64_t row) const { return row * D; }

  // Whether the matrix has content in this row.
  __device__ __forceinline__ bool holds(int64_t row) const {
    return !(row >= rows || (ids != nullptr && ids[row] == -1));
  }

  __device__ __forceinline__ float4 load4(int64_t row, int64_t d) const {
    float4 out = make_float4(0, 0, 0, 0);
    if (d >= D || !holds(row)) return out;
    const T* source = data + at(row) + d;
    if (aligned) return widen4(*reinterpret_cast<const Packed4<T>*>(source));
    out.x = widen(source[0]);
    if (d + 1 < D) out.y = widen(source[1]);
    if (d + 2 < D) out.z = widen(source[2]);
    if (d + 3 < D) out.w = widen(source[3]);
    return out;
  }
};

// Copies kRows x kColumns of a matrix from global to shared memory through registers, by kThreads threads.
template <int kRows, int kColumns, int kThreads = kTileThreads>
struct Panel {
  static constexpr int kVectorsPerRow = kColumns / 4;
  static constexpr int kVectors = kRows * kVectorsPerRow / kThreads;
  static_assert(kRows * kVectorsPerRow % kThreads == 0);
  float4 values[kVectors];

  template <typename Rows>
  __device__ __forceinline__ void load(const Rows& matrix, int64_t row0, int64_t column0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = threadIdx.x + v * kThreads;
      values[v] = matrix.load4(row0 + at / kVectorsPerRow, column0 + at % kVectorsPerRow * 4);
    }
  }

  template <int kStride>
  __device__ __forceinline__ void store(float (*shared)[kStride]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = threadIdx.x + v * kThreads;
      *reinterpret_cast<float4*>(&shared[at / kVectorsPerRow][at % kVectorsPerRow * 4]) = values[v];
    }
  }
};

template <int kThreadRows, int kThreadColumns>
struct alignas(16) DotShared {
  float a[kTileRows * kThreadRows][kDepthStride];
  float b[kTileLanes * kThreadColumns][kDepthStride];
};

// Adds the products of a panel of kColumns features to out[i][j], of rows t/16 + 8i of a and t%16 + 16j of b.
template <int kColumns, int kThreadRows, int kThreadColumns, int kStride>
__device__ __forceinline__ void add_dots(const float (*a)[kStride], const float (*b)[kStride],
                                         float (&out)[kThreadRows][kThreadColumns]) {
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
#pragma unroll
  for (int d = 0; d < kColumns; d += 4) {
    float4 x[kThreadRows], y[kThreadColumns];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) x[i] = *reinterpret_cast<const float4*>(&a[row + i * kTileRows][d]);
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) y[j] = *reinterpret_cast<const float4*>(&b[lane + j * kTileLanes][d]);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) {
        out[i][j] = __fmaf_rn(x[i].x, y[j].x, out[i][j]);
        out[i][j] = __fmaf_rn(x[i].y, y[j].y, out[i][j]);
        out[i][j] = __fmaf_rn(x[i].z, y[j].z, out[i][j]);
        out[i][j] = __fmaf_rn(x[i].w, y[j].w, out[i][j]);
      }
    }
  }
}

// Computes out[i][j] = dot(row a0 + t/16 + 8i of a, row b0 + t%16 + 16j of b) as one chain of fused multiply-adds over
// d = 0..D-1, starting from +0. Features beyond D are zeros: fma(0, 0, acc) changes only acc = -0, which equals +0.
template <int kThreadRows, int kThreadColumns, typename T>
__device__ __forceinline__ void dot_tile(const Matrix<T>& a, int64_t a0, const Matrix<T>& b, int64_t b0,
                                         DotShared<kThreadRows, kThreadColumns>& shared,
                                         float (&out)[kThreadRows][kThreadColumns]) {
  Panel<kTileRows * kThreadRows, kDepth> a_panel;
  Panel<kTileLanes * kThreadColumns, kDepth> b_panel;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) out[i][j] = 0;
  }
  a_panel.load(a, a0, 0);
  b_panel.load(b, b0, 0);
  for (int64_t d0 = 0; d0 < a.D; d0 += kDepth) {
    __syncthreads();  // the previous panel has been read
    a_panel.store(shared.a);
    b_panel.store(shared.b);
    __syncthreads();
    if (d0 + kDepth < a.D) {  // load the next panel while this one is used
      a_panel.load(a, a0, d0 + kDepth);
      b_panel.load(b, b0, d0 + kDepth);
    }
    add_dots<kDepth>(shared.a, shared.b, out);
  }
}

constexpr int kSumThreadRows = 4;
constexpr int kSumRows = kTileRows * kSumThreadRows;  // 32 output rows
constexpr int kSumColumns = 128;                      // output columns of a block; wider features take several blocks
constexpr int kSumThreadColumns = kSumColumns / kTileLanes;
constexpr int kSumTerms = 64;  // rows that a call sums
constexpr int kSumPanel = 32;  // rows in a panel

// The weights of terms in rows of shared memory, weights[output row][term], written by the threads that own the output
// row. Padded so that the two rows of a warp lie in different halves of the banks.
constexpr int kWeightStride = kSumTerms + 16;

using Weights = float[kSumRows][kWeightStride];
using RowPanel = float[kSumPanel][kSumColumns + 4];
template <int kThreadRows>
using WeightedRows = float[kThreadRows][kSumThreadColumns];
using WeightedSum = WeightedRows<kSumThreadRows>;

// out[i][4j + c] += sum over the staged terms of weights[t/16 + 8i][term0 + term] * panel[term][4(t%16) + 64j + c].
template <int kThreadRows>
__device__ __forceinline__ void add_panel(const float (*weights)[kWeightStride], int term0, const RowPanel& panel,
                                          float (&out)[kThreadRows][kSumThreadColumns]) {
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
#pragma unroll 4
  for (int term = 0; term < kSumPanel; ++term) {
    float4 value[kSumThreadColumns / 4];
#pragma unroll
    for (int j = 0; j < kSumThreadColumns / 4; ++j) {
      value[j] = *reinterpret_cast<const float4*>(&panel[term][lane * 4 + j * 64]);
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const float weight = weights[row + i * kTileRows][term0 + term];
#pragma unroll
      for (int j = 0; j < kSumThreadColumns / 4; ++j) {
        out[i][4 * j + 0] = __fmaf_rn(weight, value[j].x, out[i][4 * j + 0]);
        out[i][4 * j + 1] = __fmaf_rn(weight, value[j].y, out[i][4 * j + 1]);
        out[i][4 * j + 2] = __fmaf_rn(weight, value[j].z, out[i][4 * j + 2]);
        out[i][4 * j + 3] = __fmaf_rn(weight, value[j].w, out[i][4 * j + 3]);
      }
    }
  }
}

// Adds kSumTerms rows from row0 on, columns column0 .. column0 + 127, weighted by `weights`, to `out`. If
// second_weights is not null (in all threads of the block), also adds them weighted by those to `second_out`, without a
// second read.
template <typename T>
__device__ __forceinline__ void add_weighted_rows(const Weights& weights, const Weights* second_weights,
                                                  const Matrix<T>& rows, int64_t row0, int64_t column0, RowPanel& panel,
                                                  WeightedSum& out, WeightedSum& second_out) {
  for (int term0 = 0; term0 < kSumTerms; term0 += kSumPanel) {
    Panel<kSumPanel, kSumColumns> staged;
    staged.load(rows, row0 + term0, column0);
    __syncthreads();  // the weights are written; the previous panel has been read
    staged.store(panel);
    __syncthreads();
    add_panel(weights, term0, panel, out);
    if (second_weights != nullptr) add_panel(*second_weights, term0, panel, second_out);
  }
}

// Calls run(T()) for the element type T of a cpr_dtype and returns its result, or an error text for other dtypes.
template <typename Run>
const char* with_element_type(int dtype, Run run) {
  switch (dtype) {
    case CPR_F32:
      return run(float());
    case CPR_BF16:
      return run(__nv_bfloat16());
    case CPR_F16:
      return run(__half());
    default:
      return "dtype: the CUDA kernels take float32, bfloat16 and float16";
  }
}

}  // namespace cpr
