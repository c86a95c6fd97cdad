// The kernels that run all stages of one query in one block, on rows of scores. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_core.cuh"

namespace cpr {
namespace {

// Whether an entry has a score (not NaN) in every view in use. rows: those of the query, view_stride apart.
__device__ __forceinline__ bool comparable(const Plan& plan, const float* rows, int64_t view_stride, uint32_t slot) {
  bool number = true;
  for (int u = 0; u < plan.views_used; ++u) number &= !isnan(rows[u * view_stride + slot]);
  return number;
}

// Runs the stages of one query on rows of scores. At the start, all comparable entries must be survivors.
template <typename Survivors>
__device__ __forceinline__ void run_stages(const Plan& plan, const float* rows, int64_t view_stride,
                                           Survivors& survivors, CascadeShared& shared) {
  for (int u = threadIdx.x; u < plan.views_used; u += kSelectThreads) shared.low[u] = NAN;
  __syncthreads();
  for (int s = 0; s < plan.stages; ++s) {
    const unsigned keep = static_cast<unsigned>(plan.keep[s]);
    if (keep >= survivors.count) continue;
    const int u = plan.view[s];
    survivors.scores = rows + u * view_stride;
    if (isnan(shared.low[u])) {
      float low, high;
      score_range(survivors, shared.select, &low, &high);
      if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
      __syncthreads();
    }
    const uint64_t last = kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
    survivors.keep_from(last, keep, shared.select);
    if (threadIdx.x == 0 && fabsf(score_of(last)) < INFINITY) shared.low[u] = score_of(last);
    __syncthreads();
  }
  survivors.scores = rows + plan.view[plan.stages - 1] * view_stride;
}

// Writes the survivors in the order of the last stage. ranking [ranking_row] global, for more than kCandidates.
template <typename Survivors>
__device__ __forceinline__ void write_best(const Plan& plan, const Survivors& survivors, uint64_t* ranking,
                                           CascadeShared& shared, int64_t* indices, float* top_scores) {
  const unsigned count = survivors.count;
  const bool in_shared = count <= kCandidates;
  uint64_t* ranks = in_shared ? shared.select.candidates : ranking;
  if (threadIdx.x == 0) shared.select.gathered = 0;
  __syncthreads();
  survivors.for_each([&](uint32_t slot, float score) {
    ranks[atomicAdd(&shared.select.gathered, 1u)] = rank_of(score, slot);  // in any order: sorted below
  });
  __syncthreads();
  if (!in_shared) sort_ranks(ranks, count);
  for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
    const unsigned place = in_shared ? place_among(ranks, count, ranks[i]) : i;
    indices[place] = slot_of(ranks[i]);
    top_scores[place] = score_of(ranks[i]);
  }
  for (int64_t i = count + threadIdx.x; i < plan.top_k; i += kSelectThreads) {
    indices[i] = -1;
    top_scores[i] = -INFINITY;
  }
}

// One block per query. The rows of the query are copied to shared memory, behind CascadeShared.
__global__ void __launch_bounds__(kSelectThreads)
    select_on_chip_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  float* rows = reinterpret_cast<float*>(&shared + 1);
  chunk.at(plan, blockIdx.x, first_query);
  for (int u = 0; u < plan.views_used; ++u) {
    const float* from = chunk.scores + u * plan.chunk * plan.row;
    float* to = rows + u * plan.row;
    const int64_t whole = plan.K / 4 * 4;
    for (int64_t i = threadIdx.x * 4; i < whole; i += kSelectThreads * 4) copy_async<16>(to + i, from + i, true);
    for (int64_t i = whole + threadIdx.x; i < plan.K; i += kSelectThreads) to[i] = from[i];
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  MarkedSurvivors survivors = {nullptr, {}, 0};
  unsigned own = 0;
#pragma unroll
  for (int word = 0; word < kMarkWords; ++word) {
    for (int bit = 0; bit < 32; ++bit) {
      const int64_t slot = (word * 32 + bit) * kSelectThreads + threadIdx.x;
      if (slot >= plan.K) break;
      if (comparable(plan, rows, plan.row, static_cast<uint32_t>(slot))) survivors.marks[word] |= 1u << bit, ++own;
    }
  }
  survivors.count = block_reduce<kSelectThreads>(own, Sum(), shared.select.counts);
  run_stages(plan, rows, plan.row, survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// Runs the stages on all entries that can be compared, and writes the best. rows: those of the query, view_stride
// apart. list [K] scratch.
__device__ __forceinline__ void select_from_rows(const Plan& plan, const Chunk& chunk, const float* rows,
                                                 int64_t view_stride, uint32_t* list, CascadeShared& shared) {
  auto every_slot = [](unsigned i) { return i; };
  auto number = [&](uint32_t slot) { return comparable(plan, rows, view_stride, slot); };
  const unsigned entries = static_cast<unsigned>(plan.K);
  ListedSurvivors survivors = {nullptr, list, compact(entries, every_slot, number, list, shared.select)};
  run_stages(plan, rows, view_stride, survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// One block per query. Its rows and the list of survivors are in global memory.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  chunk.at(plan, blockIdx.x, first_query);
  select_from_rows(plan, chunk, chunk.scores, plan.chunk * plan.row, chunk.survivors, shared);
}

}  // namespace
}  // namespace cpr
