// The kernels that run all stages of one query in one block, on final scores or on scores that are refined near a
// threshold. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/cascade_select/sift.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

// Final scores, which are compared without refinement.
struct Final {
  template <typename Survivors>
  __device__ __forceinline__ uint64_t last_kept(const Survivors& survivors, unsigned keep, int u,
                                                CascadeShared& shared) const {
    return kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
  }
  __device__ __forceinline__ void settle(const ListedSurvivors&, int) const {}
  __device__ __forceinline__ void settle(const MarkedSurvivors&, int) const {}
};

// Scores within shared.bound of the canonical ones. Where they could change a decision, canonical scores replace them.
template <typename T>
struct Refined {
  const Plan& plan;
  const T *queries, *memory;
  int64_t b;         // of the inputs
  float* rows;       // [U, chunk, row], from the row of the query on
  uint32_t* window;  // [row] scratch

  __device__ __forceinline__ void rescore(int u, const uint32_t* slots, unsigned count) const {
    const int64_t view = plan.view_used[u];
    const Matrix<T> query(queries + view * plan.B * plan.D, plan.B, plan.D);
    const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
    float* row = rows + u * plan.chunk * plan.row;
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
      row[slots[i]] = canonical_score(query, b, keys, slots[i]);
    }
    __syncthreads();
  }

  // If every score is off by at most e, so is the keep-th best score t. Entries above t + 2e are then among the best
  // and entries below t - 2e are not. The entries between are rescored; the last of the best is one of them. For an
  // infinite t the test "not >" selects all entries with score t.
  __device__ __forceinline__ uint64_t last_kept(const ListedSurvivors& survivors, unsigned keep, int u,
                                                CascadeShared& shared) const {
    const uint64_t near = kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
    const float threshold = score_of(near), reach = 2 * shared.bound[u];
    auto listed = [&](unsigned i) { return survivors.slots[i]; };
    auto undecided = [&](uint32_t slot) { return !(fabsf(survivors.scores[slot] - threshold) > reach); };
    const unsigned count = compact(survivors.count, listed, undecided, window, shared.select);
    unsigned above = 0;
    survivors.for_each([&](uint32_t slot, float score) { above += score > threshold && !undecided(slot); });
    above = block_reduce<kSelectThreads>(above, Sum(), shared.select.counts);
    rescore(u, window, count);
    const ListedSurvivors close = {survivors.scores, window, count};
    return kth_best(close, keep - above, threshold - 2 * reach, threshold + 2 * reach, shared.select);
  }

  __device__ __forceinline__ void settle(const ListedSurvivors& survivors, int u) const {
    rescore(u, survivors.slots, survivors.count);
  }

  __device__ void find_bounds(const unsigned* key_squares, CascadeShared& shared) const {
    for (int u = 0; u < plan.views_used; ++u) {
      const T* query = queries + (plan.view_used[u] * plan.B + b) * plan.D;
      const float bound = query_bound<kSelectThreads>(query, plan.D, key_squares[u], shared.select.scratch);
      if (threadIdx.x == 0) shared.bound[u] = bound;
    }
    __syncthreads();
  }
};

// Whether an entry has a score (not NaN) in every view in use. rows: those of the query, view_stride apart.
__device__ __forceinline__ bool comparable(const Plan& plan, const float* rows, int64_t view_stride, uint32_t slot) {
  bool number = true;
  for (int u = 0; u < plan.views_used; ++u) number &= !isnan(rows[u * view_stride + slot]);
  return number;
}

// Runs the stages of one query. At the start, all comparable entries must be survivors.
template <typename Survivors, typename Scores>
__device__ __forceinline__ void run_stages(const Plan& plan, const float* rows, int64_t view_stride,
                                           const Scores& scores, Survivors& survivors, CascadeShared& shared) {
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
    const uint64_t last = scores.last_kept(survivors, keep, u, shared);
    survivors.keep_from(last, keep, shared.select);
    if (threadIdx.x == 0 && fabsf(score_of(last)) < INFINITY) shared.low[u] = score_of(last);
    __syncthreads();
  }
  const int u = plan.view[plan.stages - 1];
  survivors.scores = rows + u * view_stride;
  scores.settle(survivors, u);
}

// Runs the stages of one query on the entries that its sieve has gathered. Returns whether the sieve was right; if not,
// the survivors are wrong.
template <typename Scores>
__device__ __forceinline__ bool run_sifted_stages(const Plan& plan, const float* rows, int64_t view_stride,
                                                  const Scores& scores, const Sieve& sieve, ListedSurvivors& survivors,
                                                  CascadeShared& shared) {
  unsigned settled = 0;  // entries that are left besides the survivors
  for (int s = 0; s < plan.stages; ++s) settled += sieve.dropped[s];
  for (int s = 0; s < plan.stages; ++s) {
    const unsigned keep = static_cast<unsigned>(plan.keep[s]), passing = settled - sieve.dropped[s];
    if (keep >= settled + survivors.count) {
      if (passing < settled) return false;
      continue;
    }
    if (keep <= passing || keep - passing > survivors.count) return false;
    const int u = plan.view[s];
    survivors.scores = rows + u * view_stride;
    float low = sieve.low[s], high = sieve.high[s];
    if (!(low > -INFINITY) || !(high < INFINITY)) {
      float least, greatest;
      score_range(survivors, shared.select, &least, &greatest);
      if (!(low > -INFINITY)) low = least;
      if (!(high < INFINITY)) high = greatest;
    }
    if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
    __syncthreads();
    const uint64_t last = scores.last_kept(survivors, keep - passing, u, shared);
    if (!(sieve.low[s] <= score_of(last) && score_of(last) <= sieve.high[s])) return false;
    survivors.keep_from(last, keep - passing, shared.select);
    settled = passing;
  }
  const int u = plan.view[plan.stages - 1];
  survivors.scores = rows + u * view_stride;
  scores.settle(survivors, u);
  return settled == 0;
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
  run_stages(plan, rows, plan.row, Final(), survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

__device__ __forceinline__ ListedSurvivors all_comparable(const Plan& plan, const Chunk& chunk, CascadeShared& shared) {
  auto every_slot = [](unsigned i) { return i; };
  auto number = [&](uint32_t slot) { return comparable(plan, chunk.scores, plan.chunk * plan.row, slot); };
  const unsigned entries = static_cast<unsigned>(plan.K);
  return {nullptr, chunk.survivors, compact(entries, every_slot, number, chunk.survivors, shared.select)};
}

// Finds the survivors of all stages: among those that the sieve has gathered, or among all entries.
template <typename Scores>
__device__ __forceinline__ ListedSurvivors listed_survivors(const Plan& plan, const Chunk& chunk, const Scores& scores,
                                                            const Sieve& sieve, CascadeShared& shared) {
  const int64_t view_stride = plan.chunk * plan.row;
  if (plan.sifted) {
    ListedSurvivors survivors = {nullptr, chunk.survivors, sieve.gathered};
    if (run_sifted_stages(plan, chunk.scores, view_stride, scores, sieve, survivors, shared)) return survivors;
    __syncthreads();
  }
  ListedSurvivors survivors = all_comparable(plan, chunk, shared);
  run_stages(plan, chunk.scores, view_stride, scores, survivors, shared);
  return survivors;
}

// One block per query. Its rows and the list of survivors are in global memory.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  const Sieve* sieve = chunk.sieves + blockIdx.x;
  chunk.at(plan, blockIdx.x, first_query);
  const ListedSurvivors survivors = listed_survivors(plan, chunk, Final(), *sieve, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// Same as select_kernel, with scores that are refined.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    select_refined_kernel(const __grid_constant__ Plan plan, Chunk chunk, const T* queries, const T* memory,
                          int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  const Sieve* sieve = chunk.sieves + blockIdx.x;
  chunk.at(plan, blockIdx.x, first_query);
  const Refined<T> scores = {plan, queries, memory, first_query + blockIdx.x, chunk.scores, chunk.window};
  scores.find_bounds(chunk.key_squares, shared);
  const ListedSurvivors survivors = listed_survivors(plan, chunk, scores, *sieve, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

}  // namespace
}  // namespace cpr
