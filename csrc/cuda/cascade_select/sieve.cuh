// The sieve of long rows: limits from a sample of the memory, with which one pass settles most entries of all stages.
// Letters as in cascade_select.cu.
//
// A stage is decided by its threshold, the last score that it keeps. sample_kernel copies entries of the memory. With
// their scores, sieve_kernel runs the stages on them and takes from it, for every stage, two limits that enclose the
// threshold with high probability. stream_kernel (stream.cuh) then follows every entry to the first stage where its
// score is not above the upper limit. If it is below the lower limit, the entry is settled: it passes the stages before
// and drops out there, so it only has to be counted. The others are gathered, and with them all that reach the end.
// streamed_stages_kernel (streamed_stages.cuh) knows how many settled entries pass each stage, and ranks the gathered
// ones. A threshold that turns out to lie between its limits proves that the settled entries were on the right side of
// it: the result is exact, whatever the sample. Otherwise the sample has misled, and all entries go through the stages.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

constexpr int kSampleThreads = 128, kSampleRows = kSampleThreads / kWarp;  // a warp copies an entry

// Returns the slot of an entry of the sample: one from each of kSample equal parts of the row, at a place that depends
// on the part as if at random.
__device__ __forceinline__ int64_t sampled_slot(uint32_t part, int64_t entries) {
  const uint64_t K = static_cast<uint64_t>(entries), scattered = (part + 1) * 2654435761u;
  return static_cast<int64_t>((part * K + ((scattered * K) >> 32)) / kSample);
}

// Copies the sampled entries (x) of a view in use (y), and their ids. Empty slots are never read.
template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const __grid_constant__ Plan plan, Chunk chunk, const T* memory, const int64_t* memory_ids) {
  const uint32_t part = blockIdx.x * kSampleRows + threadIdx.x / kWarp;
  const int64_t slot = sampled_slot(part, plan.K);
  const int64_t id = memory_ids != nullptr ? memory_ids[slot] : 0;
  const T* from = memory + (static_cast<int64_t>(plan.view_used[blockIdx.y]) * plan.K + slot) * plan.D;
  T* to = static_cast<T*>(chunk.sample) + (blockIdx.y * kSample + part) * plan.D;
  for (int64_t d = threadIdx.x % kWarp; id != -1 && d < plan.D; d += kWarp) to[d] = from[d];
  if (blockIdx.y == 0 && threadIdx.x % kWarp == 0) chunk.sample_ids[part] = id;
}

constexpr int kSampledPerThread = kSample / kSelectThreads;

struct SampleShared {
  SelectShared select;
  float low[kMaxSiftedViews], high[kMaxSiftedViews];  // known range of the scores in each view
  unsigned bucket[3];                                 // of the lower limit, the threshold and the upper limit
};

// The sample of a row, with the score in every view and a bit for each entry that is left: entry i of thread t is
// number 512 i + t.
struct Sample {
  float scores[kMaxSiftedViews][kSampledPerThread];
  uint32_t left;

  __device__ __forceinline__ Sample(const Plan& plan, const float* rows, int64_t view_stride) : left(0) {
#pragma unroll
    for (int i = 0; i < kSampledPerThread; ++i) {
      bool number = true;
#pragma unroll
      for (int u = 0; u < kMaxSiftedViews; ++u) {
        scores[u][i] = u < plan.views_used ? rows[u * view_stride + i * kSelectThreads + threadIdx.x] : 0.0f;
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
  const float2 range = block_range(least, greatest, shared.select);
  if (threadIdx.x == 0) shared.low[u] = range.x, shared.high[u] = range.y;
  __syncthreads();
}

// The scores that a stage of the sample takes from its histogram: limits of the threshold, and the threshold itself.
struct Limits {
  float low, threshold, high;
};

// Takes limits from the filled histogram. Ranks outside the sample give no limit. Nor do those in the outer buckets,
// which hold all scores beyond the range. A stage whose upper rank is outside keeps everything that the sample has
// left, as where the memory is partly filled: no upper limit holds an entry back.
__device__ __forceinline__ Limits limits_of(const SampleRanks& ranks, const LinearBuckets& buckets,
                                            SampleShared& shared) {
  const unsigned wanted[3] = {ranks.low, ranks.middle, ranks.high};
  const uint4 four = take_buckets(shared.select);
  const unsigned own = four.x + four.y + four.z + four.w;
  unsigned count;
  const unsigned before = block_exclusive_sum<kSelectThreads>(own, &count, shared.select.counts);
#pragma unroll
  for (int rank = 0; rank < 3; ++rank) {
    if (before >= wanted[rank] || wanted[rank] > before + own) continue;
    const unsigned place = wanted[rank] - before;
    const unsigned of_four = (place > four.x) + (place > four.x + four.y) + (place > four.x + four.y + four.z);
    shared.bucket[rank] = threadIdx.x * kBucketsPerThread + of_four;
  }
  __syncthreads();
  Limits found = {-INFINITY, -INFINITY, ranks.high > count ? -INFINITY : INFINITY};
  if (ranks.low <= count && shared.bucket[0] < kBuckets - 1) found.low = buckets.least(shared.bucket[0]);
  if (ranks.middle <= count && shared.bucket[1] < kBuckets - 1) found.threshold = buckets.least(shared.bucket[1]);
  if (ranks.high > 0 && ranks.high <= count && shared.bucket[2] > 0 && shared.bucket[2] < kBuckets - 1) {
    found.high = buckets.least(shared.bucket[2] - 1);
  }
  return found;
}

// One block per query: makes its sieve. Without a sample, all entries are gathered.
__global__ void __launch_bounds__(kSelectThreads) sieve_kernel(const __grid_constant__ Plan plan, Chunk chunk) {
  auto& shared = shared_memory<SampleShared>();
  Sieve& sieve = chunk.sieves[blockIdx.x];
  if (threadIdx.x == 0) sieve.misled = 0;
  if (threadIdx.x < kMaxSiftedStages) sieve.gathered[threadIdx.x] = 0;
  if (!plan.sifted) {
    if (threadIdx.x < kMaxSiftedStages) {
      sieve.low[threadIdx.x] = -INFINITY, sieve.high[threadIdx.x] = INFINITY;
      sieve.dropped[threadIdx.x] = 0;
    }
    return;
  }
  Sample sample(plan, chunk.scores + blockIdx.x * kSample, plan.chunk * kSample);
  if (threadIdx.x < kMaxSiftedViews) shared.low[threadIdx.x] = NAN;
  start_selection(shared.select);
  __syncthreads();
  for (int s = 0; s < plan.stages; ++s) {
    const SampleRanks ranks = plan.sampled[s];
    const int u = plan.view[s];
    Limits limits = {-INFINITY, -INFINITY, -INFINITY};  // of a stage that keeps everything
    if (ranks.middle > 0) {
      if (in_all_lanes(isnan(shared.low[u]))) sample_range(sample, u, shared);
      const LinearBuckets bucket_of(shared.low[u], shared.high[u]);
      sample.for_each(u, [&](int, float score) { atomicAdd(&shared.select.histogram[bucket_of(score)], 1u); });
      limits = limits_of(ranks, bucket_of, shared);
      uint32_t kept = 0;
      sample.for_each(u, [&](int i, float score) { kept |= static_cast<uint32_t>(score >= limits.threshold) << i; });
      sample.left = kept;
    }
    if (s == plan.stages - 1) limits.high = INFINITY;  // everything that reaches the end is gathered
    if (threadIdx.x == 0) {
      sieve.low[s] = limits.low, sieve.high[s] = limits.high;
      sieve.dropped[s] = 0;
      if (limits.threshold > -INFINITY) shared.low[u] = limits.threshold;
    }
    __syncthreads();
  }
}

const char* launch_sieve(const Plan& plan, int64_t queries, const Chunk& chunk, cudaStream_t stream) {
  return launch<SampleShared>(sieve_kernel, dim3(static_cast<unsigned>(queries)), kSelectThreads, stream, plan, chunk);
}

template <typename T>
const char* launch_sample(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, cudaStream_t stream) {
  const dim3 grid(kSample / kSampleRows, static_cast<unsigned>(plan.views_used));
  return launch_sized(sample_kernel<T>, grid, kSampleThreads, 0, stream, plan, chunk, in.memory, in.memory_ids);
}

}  // namespace
}  // namespace cpr
