// The finish of mil_nce, one block per query: merges the results of the scan over the splits, adds the own key and the
// explicit positives, and writes the loss and its gradient. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/mil_nce/problem.cuh"

#undef NDEBUG  // a positive outside the memory must stop the device in release builds as well
#include <assert.h>

namespace cpr {
namespace {

enum Membership : int { kNone = 0, kNumeratorOnly = 1, kBoth = 2 };

template <typename T>
__device__ float warp_dot(const T* a, const T* b, int64_t D) {
  float sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp) sum = __fmaf_rn(widen(a[d]), widen(b[d]), sum);
  return warp_reduce(sum, Sum());
}

constexpr int kFinishThreads = 512;  // warps that share the splits: each sum over them is a few loads deep
constexpr int kFinishWarps = kFinishThreads / kWarp, kFinishColumns = 4 * kWarp;

struct FinishShared {
  float scratch[kFinishWarps];
  float columns[kFinishWarps][kFinishColumns];  // of the gradient: the sums over the splits of each warp
  float factor[kGroups][kMaxSplits];            // coefficient of the weighted sum of each split in the gradient
  float own_score;
};

// Whether no explicit positive of the row before p lists the same slot. Called by a whole warp.
__device__ bool first_naming(const int64_t* slots, int64_t p) {
  bool named_before = false;
  for (int64_t earlier = threadIdx.x % kWarp; earlier < p; earlier += kWarp) named_before |= slots[earlier] == slots[p];
  return !__any_sync(kFullWarp, named_before);
}

// Returns the sums that explicit positive p of a row must still be added to, since the scan only knows ids. Called by a
// whole warp.
__device__ Membership membership_of(const Problem& problem, const int64_t* slots, int64_t p, int64_t own_id) {
  const int64_t slot = slots[p];
  if (slot == -1) return kNone;
  assert(slot >= 0 && slot < problem.K && "positives: a slot outside the memory");
  if (!problem.live(slot) || !first_naming(slots, p)) return kNone;
  if (!problem.same(own_id, slot) || problem.same_id == CPR_SAME_NEGATIVE) return kNumeratorOnly;
  return problem.same_id == CPR_SAME_IGNORE ? kBoth : kNone;  // positives by id are in both sums already
}

// Fills named [P] of the row. Returns whether the warp of the calling thread found a positive that is still to be
// added.
template <typename T>
__device__ bool name_positives(const Problem& problem, int64_t b, const T* query, const T* memory, Named* named) {
  const int64_t* slots = problem.positives + b * problem.P;
  bool any = false;
  for (int64_t p = threadIdx.x / kWarp; p < problem.P; p += kFinishThreads / kWarp) {
    const Membership membership = membership_of(problem, slots, p, problem.own_id(b));
    const float dot = membership == kNone ? 0 : warp_dot(query, memory + slots[p] * problem.D, problem.D);
    if (threadIdx.x % kWarp == 0) named[p] = {dot * problem.inverse_temperature, membership};
    any |= membership != kNone;
  }
  return any;
}

// The results of the scan for one group and one query: `splits` entries, kChunk apart.
struct Scanned {
  const float *maximum, *sum, *weighted;
  int64_t splits;  // 0 if the scan did not sum this group

  __device__ Scanned(const Partials& partials, int64_t row, int group, int64_t splits, int64_t D)
      : maximum(partials.maximum + group * splits * kChunk + row),
        sum(partials.sum + group * splits * kChunk + row),
        weighted(partials.weighted + (group * splits * kChunk + row) * D),
        splits(splits) {}
};

struct Logsum {
  float maximum, sum;  // logsumexp = maximum + log(sum)
  __device__ float term(float score) const { return expf(score - maximum) / sum; }
};

// Returns the logsumexp of one group over the splits, the named positives with at least `membership`, and the own key.
__device__ Logsum merge(const Scanned& scanned, const Named* named, int64_t P, int membership, bool with_own,
                        FinishShared& shared) {
  float greatest = with_own ? shared.own_score : -INFINITY;
  for (int64_t s = threadIdx.x; s < scanned.splits; s += kFinishThreads) {
    greatest = fmaxf(greatest, scanned.maximum[s * kChunk]);
  }
  for (int64_t p = threadIdx.x; p < P; p += kFinishThreads) {
    if (named[p].membership >= membership) greatest = fmaxf(greatest, named[p].value);
  }
  Logsum out;
  out.maximum = block_reduce<kFinishThreads>(greatest, Max(), shared.scratch);
  if (out.maximum == -INFINITY) out.maximum = 0;
  float sum = with_own && threadIdx.x == 0 ? expf(shared.own_score - out.maximum) : 0.0f;
  for (int64_t s = threadIdx.x; s < scanned.splits; s += kFinishThreads) {
    sum += scanned.sum[s * kChunk] * expf(scanned.maximum[s * kChunk] - out.maximum);
  }
  for (int64_t p = threadIdx.x; p < P; p += kFinishThreads) {
    if (named[p].membership >= membership) sum += expf(named[p].value - out.maximum);
  }
  out.sum = block_reduce<kFinishThreads>(sum, Sum(), shared.scratch);
  return out;
}

// Writes the loss of query b and the values that the gradients to own_key and the memory need. Called by one thread.
__device__ __forceinline__ void write_loss(const cpr_mil_nce_outputs& outputs, int64_t b, const Logsum& all,
                                           const Logsum& positive, float own_coefficient) {
  const float log_all = logf(all.sum), log_positive = logf(positive.sum);
  static_cast<float*>(outputs.loss)[b] = (all.maximum - positive.maximum) + (log_all - log_positive);
  static_cast<float*>(outputs.own_coefficient)[b] = own_coefficient;
  static_cast<float*>(outputs.lse_all)[b] = all.maximum + log_all;
  static_cast<float*>(outputs.lse_positive)[b] = positive.maximum + log_positive;
}

// Adds the weighted sums of every kFinishWarps-th split, from that of this warp on, to its columns: lane + 32 c.
__device__ __forceinline__ void add_splits(const Scanned& scanned, const float* factor, int64_t column0, int64_t D,
                                           float (&sum)[kFinishColumns / kWarp]) {
  const int64_t column = column0 + threadIdx.x % kWarp;
#pragma unroll 4
  for (int64_t s = threadIdx.x / kWarp; s < scanned.splits; s += kFinishWarps) {
#pragma unroll
    for (int c = 0; c < kFinishColumns / kWarp; ++c) {
      if (column + c * kWarp >= D) continue;
      sum[c] = __fmaf_rn(factor[s], scanned.weighted[s * kChunk * D + column + c * kWarp], sum[c]);
    }
  }
}

// Writes the gradient of query b from the coefficients of its terms. Called by the whole block.
template <typename T>
__device__ __forceinline__ void write_gradient(const Problem& problem, int64_t b, const T* own_key, const T* memory,
                                               float own_coefficient, const Scanned& scanned_all,
                                               const Scanned& scanned_positive, const Named* named,
                                               const cpr_mil_nce_outputs& outputs, FinishShared& shared) {
  const int64_t D = problem.D, P = problem.P;
  for (int64_t column0 = 0; column0 < D; column0 += kFinishColumns) {
    float sum[kFinishColumns / kWarp] = {};
    add_splits(scanned_all, shared.factor[kAll], column0, D, sum);
    add_splits(scanned_positive, shared.factor[kPositive], column0, D, sum);
    for (int c = 0; c < kFinishColumns / kWarp; ++c) {
      shared.columns[threadIdx.x / kWarp][threadIdx.x % kWarp + c * kWarp] = sum[c];
    }
    __syncthreads();
    const int64_t d = column0 + threadIdx.x;
    const bool owner = threadIdx.x < kFinishColumns && d < D;
    float gradient = owner && own_coefficient != 0 ? own_coefficient * widen(own_key[d]) : 0.0f;
    for (int w = 0; owner && w < kFinishWarps; ++w) gradient += shared.columns[w][threadIdx.x];
    for (int64_t p = 0; owner && p < P; ++p) {
      if (named[p].membership == kNone) continue;
      gradient = __fmaf_rn(named[p].value, widen(memory[problem.positives[b * P + p] * D + d]), gradient);
    }
    if (owner) static_cast<float*>(outputs.grad_query)[b * D + d] = gradient * problem.inverse_temperature;
    __syncthreads();  // the sums of these columns have been read
  }
}

// One block per query: adds the explicit positives and the own key to the merged splits; computes loss and gradient.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 2)
    finish_kernel(const __grid_constant__ Problem problem, const T* queries, const T* own_keys, const T* memory,
                  int64_t first_query, int64_t splits, int64_t positive_splits, Partials partials,
                  const __grid_constant__ cpr_mil_nce_outputs outputs) {
  auto& shared = shared_memory<FinishShared>();
  const int64_t row = blockIdx.x, b = first_query + row, D = problem.D, P = problem.P;
  const T *query = queries + b * D, *own_key = own_keys + b * D;
  Named* named = partials.named + row * P;
  const Scanned scanned_all(partials, row, kAll, splits, D);
  Scanned scanned_positive(partials, row, kPositive, splits, D);
  scanned_positive.splits = positive_splits;

  bool other = name_positives(problem, b, query, memory, named);  // a positive other than the own key exists
  for (int64_t s = threadIdx.x; s < positive_splits; s += kFinishThreads)
    other |= scanned_positive.sum[s * kChunk] != 0;
  const float own_score = warp_dot(query, own_key, D) * problem.inverse_temperature;
  if (threadIdx.x == 0) shared.own_score = own_score;
  other = __syncthreads_or(other);

  const int64_t mode = problem.self_mode != nullptr ? problem.self_mode[b] : problem.self_positive;
  assert(mode >= CPR_SELF_KEEP && mode <= CPR_SELF_DROP_BOTH && "self_positive: a mode outside 0..2");
  const bool own_positive = mode == CPR_SELF_KEEP || !other, own_counts = mode != CPR_SELF_DROP_BOTH || !other;
  const Logsum all = merge(scanned_all, named, P, kBoth, own_counts, shared);
  const Logsum positive = merge(scanned_positive, named, P, kNumeratorOnly, own_positive, shared);
  const float own_coefficient =
      (own_counts ? all.term(own_score) : 0.0f) - (own_positive ? positive.term(own_score) : 0.0f);

  // From here on, each score is replaced by its coefficient in the gradient: its weight in "all" minus that in
  // "positive".
  for (int64_t s = threadIdx.x; s < splits; s += kFinishThreads) {
    shared.factor[kAll][s] = all.term(scanned_all.maximum[s * kChunk]);
    if (s < positive_splits) shared.factor[kPositive][s] = -positive.term(scanned_positive.maximum[s * kChunk]);
  }
  for (int64_t p = threadIdx.x; p < P; p += kFinishThreads) {
    const Named entry = named[p];
    named[p].value = (entry.membership == kBoth ? all.term(entry.value) : 0.0f) -
                     (entry.membership != kNone ? positive.term(entry.value) : 0.0f);
  }
  __syncthreads();
  write_gradient(problem, b, own_key, memory, own_coefficient, scanned_all, scanned_positive, named, outputs, shared);
  if (threadIdx.x == 0) write_loss(outputs, b, all, positive, own_coefficient * problem.inverse_temperature);
}

}  // namespace
}  // namespace cpr
