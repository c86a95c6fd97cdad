// The sieve of long rows: limits from a sample of the memory, with which one pass settles most entries of all stages.
// Letters as in cascade_select.cu.
//
// A stage is decided by its threshold, the last score that it keeps. With the scores of a sample of the memory
// (score.cuh), sieve_kernel runs the stages on the sample and takes from it, for every stage, two limits that enclose
// the threshold with high probability. stream_kernel (stream.cuh) then follows every entry to the first stage where its
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

constexpr int kFewPerThread = 5;  // once at most so many are left, stages visit these instead of all places

struct SampleShared {
  SelectShared select;
  float few[kMaxSiftedViews][kFewPerThread * kSelectThreads];  // scores that go to other threads
  float low[kMaxSiftedViews], high[kMaxSiftedViews];           // known range of the scores in each view
  float limit[3];                                              // lower limit, threshold and upper limit of a stage
};

// The sample of a row, or what is left of it, with the score in every view and a bit for each entry that is left: entry
// i of thread t is number 512 i + t.
template <int kEntries>
struct Sample {
  static constexpr int kPerThread = kEntries;
  using Entries = uint32_t;
  float scores[kMaxSiftedViews][kPerThread];
  Entries left;

  // Returns the score of entry i in view u.
  __device__ __forceinline__ float score(int u, int i) const { return u == 0 ? scores[0][i] : scores[1][i]; }

  // Calls visit(i, score) for each entry of this thread with its score in view u.
  template <typename Visit>
  __device__ __forceinline__ void for_all(int u, Visit visit) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) visit(i, score(u, i));
  }

  // The same for each entry that is left.
  template <typename Visit>
  __device__ __forceinline__ void for_each(int u, Visit visit) const {
    for_all(u, [&](int i, float score) {
      if ((left >> i & 1) != 0) visit(i, score);
    });
  }
};
static_assert(kMaxSiftedViews == 2, "a view is chosen between two");

// The same for a long sample, whose scores stay in global memory and are read as vectors: entry 4i + j of thread t is
// number 4(512 i + t) + j.
struct LongSample {
  static constexpr int kPerThread = (1 << kLongSampleBits) / kSelectThreads;
  using Entries = uint64_t;
  static_assert(kPerThread == 64);
  const float* rows;
  int64_t view_stride;
  Entries left;

  __device__ __forceinline__ const float4* vectors(int u) const {
    return reinterpret_cast<const float4*>(rows + u * view_stride) + threadIdx.x;
  }

  __device__ __forceinline__ float score(int u, int i) const {
    return reinterpret_cast<const float*>(vectors(u) + i / 4 * kSelectThreads)[i % 4];
  }

  template <typename Visit>
  __device__ __forceinline__ void for_all(int u, Visit visit) const {
#pragma unroll 4
    for (int i = 0; i < kPerThread; i += 4) {
      const float4 four = vectors(u)[i / 4 * kSelectThreads];
      visit(i, four.x);
      visit(i + 1, four.y);
      visit(i + 2, four.z);
      visit(i + 3, four.w);
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(int u, Visit visit) const {
    for_all(u, [&](int i, float score) {
      if ((left >> i & 1) != 0) visit(i, score);
    });
  }
};

__device__ __forceinline__ unsigned count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ unsigned count_bits(uint64_t bits) { return __popcll(bits); }

// Leaves the entries of a whole sample that have a score in every view, and finds the range of the finite scores of
// each view.
template <typename Source>
__device__ __forceinline__ void leave_numbers(const Plan& plan, Source& sample, SampleShared& shared) {
  using Entries = typename Source::Entries;
  float zero = 0;  // NaN after an infinity or a NaN
  float least[kMaxSiftedViews], greatest[kMaxSiftedViews];
  sample.left = ~Entries{0} >> (8 * sizeof(Entries) - Source::kPerThread);
#pragma unroll
  for (int u = 0; u < kMaxSiftedViews; ++u) {
    least[u] = INFINITY, greatest[u] = -INFINITY;
    if (u >= plan.views_used) continue;
    sample.for_all(u, [&](int, float score) {
      zero = __fmaf_rn(score, 0.0f, zero);
      least[u] = fminf(least[u], score), greatest[u] = fmaxf(greatest[u], score);
    });
  }
  if (zero != 0) {
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      least[u] = INFINITY, greatest[u] = -INFINITY;
      if (u >= plan.views_used) continue;
      sample.for_all(u, [&](int i, float score) {
        if (isnan(score)) sample.left &= ~(Entries{1} << i);
        if (fabsf(score) < INFINITY) least[u] = fminf(least[u], score), greatest[u] = fmaxf(greatest[u], score);
      });
    }
  }
#pragma unroll
  for (int u = 0; u < kMaxSiftedViews; ++u) {
    const float2 range = block_range(least[u], greatest[u], shared.select);
    if (threadIdx.x == 0) shared.low[u] = range.x, shared.high[u] = range.y;
  }
}

__device__ __forceinline__ void start_sample(const Plan&, const float* rows, int64_t view_stride, LongSample& sample) {
  sample = {rows, view_stride, 0};
}

template <int kEntries>
__device__ __forceinline__ void start_sample(const Plan& plan, const float* rows, int64_t view_stride,
                                             Sample<kEntries>& sample) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      sample.scores[u][i] = u < plan.views_used ? rows[u * view_stride + i * kSelectThreads + threadIdx.x] : 0.0f;
    }
  }
}

// Divides what is left among the threads, at most kFewPerThread entries for each.
template <typename Source>
__device__ __forceinline__ Sample<kFewPerThread> spread_sample(const Plan& plan, const Source& sample,
                                                               SampleShared& shared) {
  unsigned count, place = block_exclusive_sum<kSelectThreads>(count_bits(sample.left), &count, shared.select.counts);
#pragma unroll 16
  for (int i = 0; i < Source::kPerThread; ++i) {
    if ((sample.left >> i & 1) == 0) continue;
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      if (u < plan.views_used) shared.few[u][place] = sample.score(u, i);
    }
    ++place;
  }
  __syncthreads();
  Sample<kFewPerThread> few = {};
#pragma unroll
  for (int i = 0; i < kFewPerThread; ++i) {
    const unsigned at = i * kSelectThreads + threadIdx.x;
    if (at >= count) continue;
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      if (u < plan.views_used) few.scores[u][i] = shared.few[u][at];
    }
    few.left |= 1u << i;
  }
  return few;
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
  if (threadIdx.x == 0) shared.limit[0] = shared.limit[1] = -INFINITY, shared.limit[2] = INFINITY;
  const uint4 four = take_buckets(shared.select);
  const unsigned own = four.x + four.y + four.z + four.w, of_warp = warp_sum(own);
  unsigned count, before = sum_of_warps_before<kSelectThreads>(of_warp, &count, shared.select.counts);
  bool some = false;
#pragma unroll
  for (int rank = 0; rank < 3; ++rank) some |= before < wanted[rank] && wanted[rank] <= before + of_warp;
  if (in_all_lanes(some)) {  // a few warps
    before += warp_inclusive_sum(own) - own;
#pragma unroll
    for (int rank = 0; rank < 3; ++rank) {
      if (before >= wanted[rank] || wanted[rank] > before + own) continue;
      const unsigned place = wanted[rank] - before;
      const unsigned of_four = (place > four.x) + (place > four.x + four.y) + (place > four.x + four.y + four.z);
      const unsigned bucket = threadIdx.x * kBucketsPerThread + of_four;
      if (bucket == kBuckets - 1 || (rank == 2 && bucket == 0)) continue;
      shared.limit[rank] = buckets.least(rank == 2 ? bucket - 1 : bucket);
    }
  }
  __syncthreads();
  return {shared.limit[0], shared.limit[1], ranks.high > count ? -INFINITY : shared.limit[2]};
}

// Runs stage s on what is left of the sample, and writes its limits.
template <typename Source>
__device__ __forceinline__ void sample_stage(const Plan& plan, int s, Source& sample, Sieve& sieve,
                                             SampleShared& shared) {
  const SampleRanks ranks = plan.sampled[s];
  const int u = plan.view[s];
  Limits limits = {-INFINITY, -INFINITY, -INFINITY};  // of a stage that keeps everything
  if (ranks.middle > 0) {
    const LinearBuckets bucket_of(shared.low[u], shared.high[u]);
    sample.for_each(u, [&](int, float score) { atomicAdd(&shared.select.histogram[bucket_of(score)], 1u); });
    limits = limits_of(ranks, bucket_of, shared);
    typename Source::Entries kept = 0;
    sample.for_each(
        u, [&](int i, float score) { kept |= static_cast<typename Source::Entries>(score >= limits.threshold) << i; });
    sample.left = kept;
  }
  if (s == plan.stages - 1) limits.high = INFINITY;  // everything that reaches the end is gathered
  if (threadIdx.x == 0) {
    sieve.low[s] = limits.low, sieve.high[s] = limits.high;
    if (sieve.center[u] == 0 && limits.low > -INFINITY) sieve.center[u] = limits.low;
    sieve.dropped[s] = 0;
    if (limits.threshold > -INFINITY) shared.low[u] = limits.threshold;
  }
  __syncthreads();
}

// One block per query: makes its sieve. Without a sample, all entries are gathered. Source: Sample or LongSample.
template <typename Source>
__global__ void __launch_bounds__(kSelectThreads) sieve_kernel(const __grid_constant__ Plan plan, Chunk chunk) {
  auto& shared = shared_memory<SampleShared>();
  Sieve& sieve = chunk.sieves[blockIdx.x];
  if (threadIdx.x == 0) sieve.misled = 0, sieve.center[0] = sieve.center[1] = 0;
  if (threadIdx.x < kMaxSiftedStages) sieve.gathered[threadIdx.x] = 0;
  if (!plan.sifted) {
    if (threadIdx.x < kMaxSiftedStages) {
      sieve.low[threadIdx.x] = -INFINITY, sieve.high[threadIdx.x] = INFINITY;
      sieve.dropped[threadIdx.x] = 0;
    }
    return;
  }
  Source sample;
  start_sample(plan, chunk.scores + blockIdx.x * plan.sample(), plan.chunk * plan.sample(), sample);
  leave_numbers(plan, sample, shared);
  start_selection(shared.select);
  __syncthreads();
  int s = 0;
  for (; s < plan.stages; ++s) {
    const unsigned count = block_sum<kSelectThreads>(count_bits(sample.left), shared.select.counts);
    if (in_all_lanes(count <= kFewPerThread * kSelectThreads)) break;
    sample_stage(plan, s, sample, sieve, shared);
  }
  if (s == plan.stages) return;
  Sample<kFewPerThread> few = spread_sample(plan, sample, shared);
  for (; s < plan.stages; ++s) sample_stage(plan, s, few, sieve, shared);
}

const char* launch_sieve(const Plan& plan, int64_t queries, const Chunk& chunk, cudaStream_t stream) {
  using ShortSample = Sample<(1 << kSampleBits) / kSelectThreads>;
  const auto kernel = plan.sample_bits == kLongSampleBits ? sieve_kernel<LongSample> : sieve_kernel<ShortSample>;
  return launch<SampleShared>(kernel, dim3(static_cast<unsigned>(queries)), kSelectThreads, stream, plan, chunk);
}

}  // namespace
}  // namespace cpr
