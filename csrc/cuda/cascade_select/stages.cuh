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
// `few` survivors are left, or the end. At the first stage, all comparable entries must be survivors. kRanges: the
// range of the scores of every view is known. The last stage is left to write_best if it has few to choose from.
template <bool kRanges, typename Survivors>
__device__ __forceinline__ int run_stages(const Plan& plan, const float* rows, int64_t view_stride, int first,
                                          unsigned few, Survivors& survivors, CascadeShared& shared) {
  int s = first;
  for (; s < plan.stages; ++s) {
    if (few > 0 && in_all_lanes(survivors.count <= few)) break;
    const unsigned keep = static_cast<unsigned>(plan.keep[s]);
    if (in_all_lanes(keep >= survivors.count)) continue;  // also without survivors
    if (in_all_lanes(s == plan.stages - 1 && survivors.count <= kRankedAtOnce)) break;
    const int u = plan.view[s];
    survivors.scores = rows + u * view_stride;
    if (!kRanges && in_all_lanes(isnan(shared.low[u]))) {
      float low, high;
      score_range(survivors, shared.select, &low, &high);
      if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
      __syncthreads();
    }
    const auto narrow = [&](float score) {
      if (fabsf(score) < INFINITY) shared.low[u] = score;
    };
    const LastKept last = kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select, narrow);
    survivors.keep_from(last, keep, shared.select);
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

// Writes the best survivors in the order of the last stage. ranking [ranking_row] global, for more than kCandidates.
template <typename Survivors>
__device__ __forceinline__ void write_best(const Plan& plan, const Survivors& survivors, uint64_t* ranking,
                                           CascadeShared& shared, int64_t* indices, float* top_scores) {
  const unsigned count = survivors.count;
  const bool in_shared = count <= kCandidates;
  uint64_t* ranks = in_shared ? shared.select.candidates : ranking;
  write_ranks(survivors, ranks, shared.select);
  if (!in_shared) sort_ranks(ranks, count);
  for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
    const uint64_t rank = ranks[i];
    const unsigned place = in_shared ? place_among(shared.select.candidates, count, rank) : i;
    if (place >= plan.top_k) continue;
    indices[place] = slot_of(rank);
    top_scores[place] = score_of(rank);
  }
#pragma unroll 1  // few, if any
  for (int64_t i = count + threadIdx.x; i < plan.top_k; i += kSelectThreads) {
    indices[i] = -1;
    top_scores[i] = -INFINITY;
  }
}

// Marks the entries that have a score in every view, and finds the range of the finite scores of each view. rows [U,
// row]: those of the query, in shared memory, with NaN behind the last entry of a vector.
__device__ __forceinline__ void mark_comparable(const Plan& plan, const float* rows, MarkedSurvivors& survivors,
                                                CascadeShared& shared) {
  const int vectors = static_cast<int>(ceil_div(plan.K, kMarkedAtOnce));
  const int own_vectors = (vectors - static_cast<int>(threadIdx.x) + kSelectThreads - 1) / kSelectThreads;
#pragma unroll
  for (int word = 0; word < kMarkWords; ++word) {
    const int of_word = own_vectors - word * kWordVectors;
    survivors.marks[word] = of_word <= 0 ? 0 : of_word >= kWordVectors ? ~0u : (1u << of_word * kMarkedAtOnce) - 1;
  }
  for (int u = 0; u < plan.views_used; ++u) {
    float least = INFINITY, greatest = -INFINITY;
    uint32_t without[kMarkWords] = {};  // a bit for each entry that has no score in this view
    survivors.scores = rows + u * plan.row;
    survivors.for_each_vector([&](int word, uint32_t factor, unsigned, uint32_t, const float (&score)[kMarkedAtOnce]) {
      least = fminf(fminf(fminf(least, score[0]), fminf(score[1], score[2])), score[3]);  // fminf(NaN, x) is x
      greatest = fmaxf(fmaxf(fmaxf(greatest, score[0]), fmaxf(score[1], score[2])), score[3]);
      if (!isnan(score[0] + score[1] + score[2] + score[3])) return;  // the sum of infinities may be NaN as well
#pragma unroll
      for (int j = 0; j < kMarkedAtOnce; ++j) {
        if (isnan(score[j])) without[word] += factor << j;
      }
    });
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) survivors.marks[word] &= ~without[word];
    float2 range = block_range(least, greatest, shared.select);
    if (in_all_lanes(range.x == -INFINITY || range.y == INFINITY)) {
      score_range(survivors, shared.select, &range.x, &range.y);
    }
    if (threadIdx.x == 0) shared.low[u] = range.x, shared.high[u] = range.y;
  }
#pragma unroll
  for (int word = 0; word < kMarkWords; ++word) survivors.open[word] = survivors.marks[word];
  survivors.count = block_sum<kSelectThreads>(survivors.own(), shared.select.counts);
}

// One block per query. The rows of the query are copied to shared memory, behind CascadeShared.
__global__ void __launch_bounds__(kSelectThreads)
    select_on_chip_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  float* rows = reinterpret_cast<float*>(&shared + 1);
  start_stages(plan, shared);
  const unsigned entries = static_cast<unsigned>(plan.K), rest = entries % 4, whole = entries - rest;
  for (int u = 0; u < plan.views_used; ++u) {
    const float* from = chunk.scores + (u * plan.chunk + blockIdx.x) * plan.row;
    float* to = rows + u * plan.row;
#pragma unroll 1  // few
    for (unsigned i = threadIdx.x * 4; i < whole; i += kSelectThreads * 4) copy_async<16>(to + i, from + i, true);
    if (rest == 0 || threadIdx.x >= 4) continue;
    to[whole + threadIdx.x] = threadIdx.x < rest ? from[whole + threadIdx.x] : NAN;  // whole vectors are read
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  MarkedSurvivors survivors = {};
  mark_comparable(plan, rows, survivors, shared);
  const auto write = [&](const auto& left) {  // computes addresses at the end: until then they would take registers
    chunk.at_outputs(plan, blockIdx.x, first_query);
    write_best(plan, left, chunk.ranking, shared, chunk.indices, chunk.top_scores);
  };
  // A quarter of the entries is about as fast to visit one by one as all are in vectors.
  const unsigned quarter = static_cast<unsigned>(plan.K) / 4;
  const unsigned few = quarter < kSelectThreads ? kSelectThreads : quarter < kMaxSpread ? quarter : kMaxSpread;
  int next = run_stages<true>(plan, rows, plan.row, 0, few, survivors, shared);
  if (in_all_lanes(survivors.count > few)) {
    write(survivors);
    return;
  }
  HeldSurvivors<1> single;
  if (in_all_lanes(survivors.count > kSelectThreads)) {
    HeldSurvivors<kMaxSpread / kSelectThreads> several = spread<kMaxSpread / kSelectThreads>(survivors, shared.select);
    next = run_stages<true>(plan, rows, plan.row, next, kSelectThreads, several, shared);
    if (in_all_lanes(several.count > kSelectThreads)) {
      write(several);
      return;
    }
    single = spread<1>(several, shared.select);
  } else {
    single = spread<1>(survivors, shared.select);
  }
  run_stages<true>(plan, rows, plan.row, next, 0, single, shared);
  write(single);
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
  run_stages<false>(plan, rows, view_stride, 0, 0, survivors, shared);
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
