// The sieve of long rows: it settles most entries of all stages in one pass over the rows, so that the stages run on
// the few that are left. Letters as in cascade_select.cu.
//
// A stage is decided by its threshold, the last score that it keeps. select_sample_kernel runs the stages on a sample
// of the row and takes from it, for every stage, two limits that enclose the threshold with high probability. Then
// sift_kernel follows every entry to the first stage where its score is not above the upper limit. If it is below the
// lower limit, the entry is settled: it passes the stages before and drops out there, so it only has to be counted.
// The others are gathered, and with them all that reach the end. The stages of select_kernel then know how many settled
// entries pass each of them, and rank the gathered ones. A threshold that turns out to lie between its limits proves
// that the settled entries were on the right side of it: the result is exact, whatever the sample. Otherwise the sample
// has misled, and all entries go through the stages.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

constexpr int kSampledPerThread = kSample / kSelectThreads;

struct SampleShared {
  SelectShared select;
  float low[kMaxSiftedViews], high[kMaxSiftedViews];  // known range of the scores in each view
};

// The sample of a row, with the score in every view and a bit for each entry that is left: entry i of thread t is
// number 512 i + t.
struct Sample {
  float scores[kMaxSiftedViews][kSampledPerThread];
  uint32_t left;

  // Draws one entry from each of kSample equal parts of the row, at a place that depends on the part as if at random.
  __device__ __forceinline__ Sample(const Plan& plan, const float* rows, int64_t view_stride) : left(0) {
#pragma unroll
    for (int i = 0; i < kSampledPerThread; ++i) {
      const uint32_t part = i * kSelectThreads + threadIdx.x, scattered = (part + 1) * 2654435761u;
      const uint64_t K = static_cast<uint64_t>(plan.K);
      const uint64_t slot = (part * K + ((scattered * K) >> 32)) / kSample;
      bool number = true;
#pragma unroll
      for (int u = 0; u < kMaxSiftedViews; ++u) {
        scores[u][i] = u < plan.views_used ? rows[u * view_stride + slot] : 0.0f;
        number &= !isnan(scores[u][i]);
      }
      left |= static_cast<uint32_t>(number) << i;
    }
  }

  // Calls visit(i, score) for each entry of this thread that is left, with its score in view u.
  template <typename Visit>
  __device__ __forceinline__ void for_each(int u, Visit visit) const {
#pragma unroll
    for (int i = 0; i < kSampledPerThread; ++i) {
      if ((left >> i & 1) != 0) visit(i, u == 0 ? scores[0][i] : scores[1][i]);
    }
  }
};
static_assert(kMaxSiftedViews == 2, "a view is chosen between two");

// Finds the range of the scores that are left in view u.
__device__ __forceinline__ void sample_range(const Sample& sample, int u, SampleShared& shared) {
  float least = INFINITY, greatest = -INFINITY;
  sample.for_each(u, [&](int, float score) {
    if (fabsf(score) < INFINITY) least = fminf(least, score), greatest = fmaxf(greatest, score);
  });
  const float low = block_reduce<kSelectThreads>(least, Min(), shared.select.scratch);
  const float high = block_reduce<kSelectThreads>(greatest, Max(), shared.select.scratch);
  if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
  __syncthreads();
}

// The scores that a stage of the sample takes from its histogram: limits of the threshold, and the threshold itself.
struct Limits {
  float low, threshold, high;
};

// Ranks outside the sample give no limit. Nor do those in the outer buckets, which hold all scores beyond the range.
__device__ __forceinline__ Limits limits_of(const SampleRanks& ranks, unsigned count, const LinearBuckets& buckets,
                                            SelectShared& shared) {
  Limits found = {-INFINITY, -INFINITY, INFINITY};
  if (ranks.low <= count) {
    const unsigned bucket = find_boundary(ranks.low, shared).bucket;
    if (bucket < kBuckets - 1) found.low = buckets.least(bucket);
  }
  if (ranks.middle <= count) {
    const unsigned bucket = find_boundary(ranks.middle, shared).bucket;
    if (bucket < kBuckets - 1) found.threshold = buckets.least(bucket);
  }
  if (ranks.high > 0 && ranks.high <= count) {
    const unsigned bucket = find_boundary(ranks.high, shared).bucket;
    if (bucket > 0 && bucket < kBuckets - 1) found.high = buckets.least(bucket - 1);
  }
  return found;
}

// One block per query: makes its sieve. With kBounded, scores have errors, for which the sieve allows twice the bound.
template <typename T, bool kBounded>
__global__ void __launch_bounds__(kSelectThreads)
    select_sample_kernel(const __grid_constant__ Plan plan, Chunk chunk, const T* queries, int64_t first_query) {
  auto& shared = shared_memory<SampleShared>();
  Sieve& sieve = chunk.sieves[blockIdx.x];
  chunk.at(plan, blockIdx.x, first_query);
  Sample sample(plan, chunk.scores, plan.chunk * plan.row);
  if (threadIdx.x < kMaxSiftedViews) shared.low[threadIdx.x] = NAN;
  if (threadIdx.x == 0) sieve.gathered = 0;
  float error[kMaxSiftedViews] = {};
  for (int u = 0; kBounded && u < plan.views_used; ++u) {
    const T* query = queries + (plan.view_used[u] * plan.B + first_query + blockIdx.x) * plan.D;
    const float bound = query_bound<kSelectThreads>(query, plan.D, chunk.key_squares[u], shared.select.scratch);
    u == 0 ? error[0] = bound : error[1] = bound;
  }
  __syncthreads();
  for (int s = 0; s < plan.stages; ++s) {
    const SampleRanks ranks = plan.sampled[s];
    const int u = plan.view[s];
    Limits limits = {-INFINITY, -INFINITY, -INFINITY};  // of a stage that keeps everything
    if (ranks.middle > 0) {
      if (isnan(shared.low[u])) sample_range(sample, u, shared);
      const LinearBuckets bucket_of(shared.low[u], shared.high[u]);
      clear_histogram(shared.select);
      sample.for_each(u, [&](int, float score) { atomicAdd(&shared.select.histogram[bucket_of(score)], 1u); });
      const unsigned count =
          block_reduce<kSelectThreads>(static_cast<unsigned>(__popc(sample.left)), Sum(), shared.select.counts);
      limits = limits_of(ranks, count, bucket_of, shared.select);
      uint32_t kept = 0;
      sample.for_each(u, [&](int i, float score) { kept |= static_cast<uint32_t>(score >= limits.threshold) << i; });
      sample.left = kept;
    }
    if (s == plan.stages - 1) limits.high = INFINITY;  // everything that reaches the end is gathered
    if (threadIdx.x == 0) {
      const float margin = 2 * (u == 0 ? error[0] : error[1]);
      sieve.low[s] = limits.low, sieve.high[s] = limits.high;
      sieve.drop_below[s] = limits.low - margin, sieve.pass_above[s] = limits.high + margin;
      sieve.dropped[s] = 0;
      if (limits.threshold > -INFINITY) shared.low[u] = limits.threshold;
    }
    __syncthreads();
  }
}

struct SiftShared {
  uint16_t gathered[kSiftPart];  // places in the part of the row
  float drop_below[kMaxSiftedStages], pass_above[kMaxSiftedStages];
  unsigned dropped[kMaxSiftedStages];
  unsigned count, base;
};

constexpr int kSiftVector = 4;
constexpr int kVectorsPerThread = kSiftPart / kSiftThreads / kSiftVector;
constexpr int kCountBits = 8;  // of a stage, in the settled entries of a thread
constexpr unsigned kNever = kMaxSiftedStages * kCountBits;
static_assert(kVectorsPerThread * kSiftVector < 1 << kCountBits && kNever == 64);
static_assert(kSiftPart < 1 << 16, "the places and the counts of a block have 16 bits");

// For each of four entries, the first stage that it may fail to pass and the first where it drops out for certain, both
// times kCountBits.
struct Fates {
  unsigned unsure[kSiftVector], dropped[kSiftVector];
};

__device__ __forceinline__ float4 load_scores(const float* row, int64_t slot, int64_t K) {
  if (slot + kSiftVector <= K) return *reinterpret_cast<const float4*>(row + slot);
  return make_float4(row[slot], slot + 1 < K ? row[slot + 1] : NAN, slot + 2 < K ? row[slot + 2] : NAN, NAN);
}

// Adds what the stages of view u do to entries with these scores.
__device__ __forceinline__ void follow(const Plan& plan, const SiftShared& shared, int u, const float4& score,
                                       Fates& fates) {
  const float scores[kSiftVector] = {score.x, score.y, score.z, score.w};
  Fates own;
#pragma unroll
  for (int j = 0; j < kSiftVector; ++j) own.unsure[j] = own.dropped[j] = kNever;
  for (int s = plan.last_of_view[u]; s >= 0; s = plan.previous_of_view[s]) {  // the first stage writes last
    const float pass_above = shared.pass_above[s], drop_below = shared.drop_below[s];
    const unsigned stage = static_cast<unsigned>(s) * kCountBits;
#pragma unroll
    for (int j = 0; j < kSiftVector; ++j) {
      if (!(scores[j] > pass_above)) own.unsure[j] = stage;
      if (scores[j] < drop_below) own.dropped[j] = stage;
    }
  }
#pragma unroll
  for (int j = 0; j < kSiftVector; ++j) {
    fates.unsure[j] = fates.unsure[j] < own.unsure[j] ? fates.unsure[j] : own.unsure[j];
    fates.dropped[j] = fates.dropped[j] < own.dropped[j] ? fates.dropped[j] : own.dropped[j];
  }
}

// Adds the settled entries of all threads, kCountBits for each stage, to the sieve.
__device__ __forceinline__ void add_dropped(uint64_t settled, int stages, SiftShared& shared, Sieve& sieve) {
  constexpr uint64_t kEven = 0x00ff00ff00ff00ff;
  const uint64_t counts[2] = {settled & kEven, settled >> kCountBits & kEven};  // 16 bits for each stage
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const unsigned half = warp_reduce(static_cast<unsigned>(counts[pair % 2] >> pair / 2 * 32), Sum());
    if (threadIdx.x % kWarp == 0) {
      const int stage = pair / 2 * 4 + pair % 2;
      atomicAdd(&shared.dropped[stage], half & 0xffff);
      atomicAdd(&shared.dropped[stage + 2], half >> 16);
    }
  }
  __syncthreads();
  const unsigned stage = threadIdx.x;
  if (stage < static_cast<unsigned>(stages) && shared.dropped[stage] > 0) {
    atomicAdd(&sieve.dropped[stage], shared.dropped[stage]);
  }
}

// A block sifts a part (x) of the row of a query (y): it counts the settled entries of each stage and lists the others.
__global__ void __launch_bounds__(kSiftThreads) sift_kernel(const __grid_constant__ Plan plan, Chunk chunk) {
  auto& shared = shared_memory<SiftShared>();
  Sieve& sieve = chunk.sieves[blockIdx.y];
  chunk.at(plan, blockIdx.y, 0);
  if (threadIdx.x < kMaxSiftedStages) {
    const bool stage = threadIdx.x < static_cast<unsigned>(plan.stages);
    shared.drop_below[threadIdx.x] = stage ? sieve.drop_below[threadIdx.x] : 0;
    shared.pass_above[threadIdx.x] = stage ? sieve.pass_above[threadIdx.x] : 0;
    shared.dropped[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSiftPart;
  const float *row = chunk.scores, *second = row + plan.chunk * plan.row;
  uint64_t settled = 0;
  for (unsigned place = threadIdx.x * kSiftVector; place < kSiftPart; place += kSiftThreads * kSiftVector) {
    const int64_t slot = first + place;
    if (slot >= plan.K) break;
    const float4 x = load_scores(row, slot, plan.K);
    const float4 y = plan.views_used > 1 ? load_scores(second, slot, plan.K) : x;
    Fates fates;
#pragma unroll
    for (int j = 0; j < kSiftVector; ++j) fates.unsure[j] = fates.dropped[j] = kNever;
    follow(plan, shared, 0, x, fates);
    if (plan.views_used > 1) follow(plan, shared, 1, y, fates);
    const bool number[kSiftVector] = {!isnan(x.x) && !isnan(y.x), !isnan(x.y) && !isnan(y.y),
                                      !isnan(x.z) && !isnan(y.z), !isnan(x.w) && !isnan(y.w)};
#pragma unroll
    for (int j = 0; j < kSiftVector; ++j) {
      const bool unsure = fates.unsure[j] != fates.dropped[j];
      if (number[j] && unsure) shared.gathered[atomicAdd(&shared.count, 1u)] = static_cast<uint16_t>(place + j);
      if (number[j] && !unsure) settled += 1ull << fates.dropped[j];
    }
  }
  add_dropped(settled, plan.stages, shared, sieve);
  if (threadIdx.x == 0) shared.base = atomicAdd(&sieve.gathered, shared.count);
  __syncthreads();
  for (unsigned i = threadIdx.x; i < shared.count; i += kSiftThreads) {
    chunk.survivors[shared.base + i] = static_cast<uint32_t>(first) + shared.gathered[i];
  }
}

// Makes the sieves of a chunk of queries and sifts their rows.
template <bool kBounded, typename T>
const char* launch_sift(const Plan& plan, const T* queries, int64_t first, int64_t count, const Chunk& chunk,
                        cudaStream_t stream) {
  const dim3 parts(static_cast<unsigned>(ceil_div(plan.K, kSiftPart)), static_cast<unsigned>(count));
  const char* error = launch<SampleShared>(select_sample_kernel<T, kBounded>, dim3(static_cast<unsigned>(count)),
                                           kSelectThreads, stream, plan, chunk, queries, first);
  return error != nullptr ? error : launch<SiftShared>(sift_kernel, parts, kSiftThreads, stream, plan, chunk);
}

}  // namespace
}  // namespace cpr
