// Scores of a tile of rows against a tile of rows as in tile.cuh, of float features that are copied to shared memory
// asynchronously. Small calls have less than a block for each multiprocessor, and wait for their loads: here the first
// kCopiedPanels - 1 panels of a tile, at width 128 nearly all of it, are on their way at once.
#pragma once

#include "cuda/common/tensor_core.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {

constexpr int kCopiedDepth = 32;                 // features in a panel
constexpr int kCopiedStride = kCopiedDepth + 4;  // padded as kDepthStride
constexpr int kCopiedPanels = 4;                 // panels of a matrix in shared memory

template <int kThreadRows, int kThreadColumns>
struct alignas(16) CopiedDotShared {
  float a[kCopiedPanels][kTileRows * kThreadRows][kCopiedStride];
  float b[kCopiedPanels][kTileLanes * kThreadColumns][kCopiedStride];
};

// Copies panels of float rows to shared memory, in the order of their columns; zeros for rows outside of the matrix.
template <int kRows>
struct PanelCopier {
  static constexpr int kRowVectors = kCopiedDepth / 4, kVectors = kRows * kRowVectors / kTileThreads;
  static constexpr int kRowStep = kTileThreads / kRowVectors;  // between the rows of a thread
  static_assert(kRows * kRowVectors % kTileThreads == 0);
  const float* from[kVectors];
  unsigned live = 0;  // a bit for each row of this thread that is copied

  __device__ __forceinline__ PanelCopier(const Matrix<float>& matrix, int64_t row0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t row = row0 + threadIdx.x / kRowVectors + v * kRowStep;
      const bool holds = matrix.holds(row);
      live |= (holds ? 1u : 0u) << v;
      from[v] = matrix.data + (holds ? row : 0) * matrix.D + threadIdx.x % kRowVectors * 4;
    }
  }

  __device__ __forceinline__ void copy(float (*to)[kCopiedStride]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float* place = &to[threadIdx.x / kRowVectors + v * kRowStep][threadIdx.x % kRowVectors * 4];
      copy_async<16>(place, from[v], (live >> v & 1) != 0);
      from[v] += kCopiedDepth;
    }
  }
};

// Whether rows can be copied asynchronously: in whole panels, from addresses that 16 bytes divide.
__device__ __forceinline__ bool copyable(const Matrix<float>& matrix) {
  return matrix.aligned && matrix.D % kCopiedDepth == 0;
}

// The same as dot_tile for copyable matrices: several panels are under way at a time, and none in registers.
template <int kThreadRows, int kThreadColumns>
__device__ __forceinline__ void copied_dot_tile(const Matrix<float>& a, int64_t a0, const Matrix<float>& b, int64_t b0,
                                                CopiedDotShared<kThreadRows, kThreadColumns>& shared,
                                                float (&out)[kThreadRows][kThreadColumns]) {
  PanelCopier<kTileRows * kThreadRows> a_panels(a, a0);
  PanelCopier<kTileLanes * kThreadColumns> b_panels(b, b0);
  const int panels = static_cast<int>(a.D / kCopiedDepth);
  int copied = 0;
  const auto copy_next = [&] {
    if (copied < panels) {
      a_panels.copy(shared.a[copied % kCopiedPanels]);
      b_panels.copy(shared.b[copied % kCopiedPanels]);
    }
    commit_copies();  // of nothing, at the end: the number of commits tells which panel is complete
    ++copied;
  };
#pragma unroll
  for (int panel = 0; panel < kCopiedPanels - 1; ++panel) copy_next();
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) out[i][j] = 0;
  }
  for (int panel = 0; panel < panels; ++panel) {
    wait_for_copies<kCopiedPanels - 2>();
    __syncthreads();  // the copy of this panel is complete in all threads, and the panel before it has been read
    copy_next();
    add_dots<kCopiedDepth>(shared.a[panel % kCopiedPanels], shared.b[panel % kCopiedPanels], out);
  }
  wait_for_copies<0>();
}

}  // namespace cpr
