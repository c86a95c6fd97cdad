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

// Before the first stage: no range of scores is known. A barrier must follow.
__device__ __forceinline__ void start_stages(const Plan& plan, CascadeShared& shared) {
  for (int u = threadIdx.x; u < plan.views_used; u += kSelectThreads) shared.low[u] = NAN;
  start_selection(shared.select);
}

// Runs the stages of one query from `first` on, on rows of scores, and returns the next stage: the one at which at most
// `few` survivors are left, or the end. At the first stage, all comparable entries must be survivors.
template <typename Survivors>
__device__ __forceinline__ int run_stages(const Plan& plan, const float* rows, int64_t view_stride, int first,
                                          unsigned few, Survivors& survivors, CascadeShared& shared) {
  int s = first;
  for (; s < plan.stages && in_all_lanes(survivors.count > few); ++s) {
    const unsigned keep = static_cast<unsigned>(plan.keep[s]);
    if (in_all_lanes(keep >= survivors.count)) continue;
    const int u = plan.view[s];
    survivors.scores = rows + u * view_stride;
    if (in_all_lanes(isnan(shared.low[u]))) {
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
  return s;
}

// Sorts ranks [count] in place, best first, by a bitonic network. Every comparator puts the better rank at the lower
// index, because each merge starts by comparing mirror images. A length that is not a power of two therefore works by
// skipping the comparators that reach beyond the end.
__device__ inline void sort_ranks(uint64_t* ranks, unsigned count) {
  for (uint64_t size = 2; size / 2 < count; size *= 2) {
    for (uint64_t stride = size / 2; stride > 0; stride /= 2) {
      for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
        const uint64_t partner = stride == size / 2 ? (i ^ (size - 1)) : (i ^ stride);
        if (partner > i && partner < count) {
          const uint64_t a = ranks[i], b = ranks[partner];
          if (a < b) {
            ranks[i] = b;
            ranks[partner] = a;
          }
        }
      }
      __syncthreads();
    }
  }
}

// Writes the survivors in the order of the last stage. ranking [ranking_row] global, for more than kCandidates.
template <typename Survivors>
__device__ __forceinline__ void write_best(const Plan& plan, const Survivors& survivors, uint64_t* ranking,
                                           CascadeShared& shared, int64_t* indices, float* top_scores) {
  const unsigned count = survivors.count;
  const bool in_shared = count <= kCandidates;
  uint64_t* ranks = in_shared ? shared.select.candidates : ranking;
  write_ranks(survivors, ranks, shared.select);
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
  start_stages(plan, shared);
  for (int u = 0; u < plan.views_used; ++u) {
    const float* from = chunk.scores + u * plan.chunk * plan.row;
    float* to = rows + u * plan.row;
    const int64_t whole = plan.K / 4 * 4;
    for (int64_t i = threadIdx.x * 4; i < whole; i += kSelectThreads * 4) copy_async<16>(to + i, from + i, true);
    for (int64_t i = whole + threadIdx.x; i < round_up(plan.K, 4); i += kSelectThreads) {
      to[i] = i < plan.K ? from[i] : NAN;  // whole vectors are read
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  MarkedSurvivors survivors = {};
  unsigned own = 0;
#pragma unroll
  for (int word = 0; word < kMarkWords; ++word) {
    int vector = word * kWordVectors * kSelectThreads + static_cast<int>(threadIdx.x);
    for (int i = 0; i < kWordVectors && vector * kMarkedAtOnce < plan.K; ++i, vector += kSelectThreads) {
      unsigned numbers = (1u << kMarkedAtOnce) - 1;  // a bit for each entry that has a score in every view
      for (int u = 0; u < plan.views_used; ++u) {
        const float4 four = reinterpret_cast<const float4*>(rows + u * plan.row)[vector];
        if (isnan(four.x)) numbers &= ~1u;
        if (isnan(four.y)) numbers &= ~2u;
        if (isnan(four.z)) numbers &= ~4u;
        if (isnan(four.w)) numbers &= ~8u;
      }
      survivors.marks[word] |= numbers << i * kMarkedAtOnce;
    }
    survivors.open[word] = survivors.marks[word];
    own += __popc(survivors.marks[word]);
  }
  survivors.count = block_reduce<kSelectThreads>(own, Sum(), shared.select.counts);
  survivors.few = static_cast<unsigned>(plan.K) / 4;
  const int next = run_stages(plan, rows, plan.row, 0, kSelectThreads, survivors, shared);
  if (in_all_lanes(survivors.count > kSelectThreads)) {
    write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
    return;
  }
  SingleSurvivors single = spread(survivors, shared.select);
  run_stages(plan, rows, plan.row, next, 0, single, shared);
  write_best(plan, single, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// Runs the stages on all entries that can be compared, and writes the best. rows: those of the query, view_stride
// apart. list [K] scratch.
__device__ __forceinline__ void select_from_rows(const Plan& plan, const Chunk& chunk, const float* rows,
                                                 int64_t view_stride, uint32_t* list, CascadeShared& shared) {
  auto every_slot = [](unsigned i) { return i; };
  auto number = [&](uint32_t slot) { return comparable(plan, rows, view_stride, slot); };
  const unsigned entries = static_cast<unsigned>(plan.K);
  ListedSurvivors survivors = {nullptr, list, compact(entries, every_slot, number, list, shared.select)};
  start_stages(plan, shared);
  __syncthreads();
  run_stages(plan, rows, view_stride, 0, 0, survivors, shared);
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
