// MIL-NCE over a memory on CUDA [CPR paper, Eq. 2], without a [B, K] matrix.
//
// The loss is attention whose values are the keys: one pass keeps, per row and per split of the memory, a running
// maximum, a sum of exponentials and the so weighted sum of keys, for the denominator ("all") and for the positives
// that ids define. A finishing kernel merges the splits in order and adds the own key and the explicit positives;
// it has everything the gradient needs. Splits depend on K only and no float is added atomically: one result per
// input, whatever the batch around a row.
// 16-bit features of width 128 and 512 are scanned on tensor cores (mil_nce_tensor_core.cuh), all others in fp32 here.
// Letters: B queries, K memory entries, D feature width, P explicit positives, S splits.
#include "cpr_fast.h"
#include "launch.cuh"
#include "mil_nce.cuh"
#include "mil_nce_tensor_core.cuh"
#include "tile.cuh"

#undef NDEBUG  // a positive outside the memory must stop the device in release builds too
#include <assert.h>

namespace cpr {
namespace {

constexpr int kThreadKeys = kSumTerms / kTileLanes;  // keys per thread of a tile of kSumTerms
enum Membership : int { kNone = 0, kNumeratorOnly = 1, kBoth = 2 };

Partials partials_at(void* workspace, const cpr_mil_nce_args& args, int64_t* bytes) {
  const int64_t rows = Splits(args.K).count * kChunk;
  const int groups = args.same_id == CPR_SAME_POSITIVE && args.query_ids != nullptr ? kGroups : 1;
  float* base = static_cast<float*>(workspace);
  Partials partials = {base, base + groups * rows, base + 2 * groups * rows, nullptr};
  float* end = partials.weighted + groups * rows * args.D;
  partials.named = reinterpret_cast<Named*>(end);
  *bytes = (end - base) * static_cast<int64_t>(sizeof(float)) + kChunk * args.P * static_cast<int64_t>(sizeof(Named));
  return partials;
}

struct ScanShared {
  union {
    DotShared<kSumThreadRows, kThreadKeys> dot;
    RowPanel panel;
  };
  Weights weights[kGroups];
};

// Online logsumexp of one group for the rows a thread helps with, and the weighted sum of its columns.
struct Running {
  float maximum[kSumThreadRows], sum[kSumThreadRows];  // sum: this thread's keys only, until finish()
  WeightedSum weighted;

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < kSumThreadRows; ++i) {
      maximum[i] = -INFINITY;
      sum[i] = 0;
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) weighted[i][c] = 0;
    }
  }

  // Takes in a tile of scores; members: bit i * kThreadKeys + j of the thread's score [i][j]. Leaves the weights of
  // the tile's keys in `weights` and the rest rescaled to the new maximum.
  __device__ __forceinline__ void absorb(const float (&score)[kSumThreadRows][kThreadKeys], unsigned members,
                                         Weights& weights) {
    const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
#pragma unroll
    for (int i = 0; i < kSumThreadRows; ++i) {
      float greatest = maximum[i];
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        if ((members >> (i * kThreadKeys + j)) & 1) greatest = fmaxf(greatest, score[i][j]);
      }
      greatest = warp_reduce<kTileLanes>(greatest, Max());
      const float reference = greatest == -INFINITY ? 0.0f : greatest;  // nothing yet: exp(-inf), not exp(NaN)
      const float rescale = expf(maximum[i] - reference);
      maximum[i] = greatest;
      sum[i] *= rescale;
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) weighted[i][c] *= rescale;
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        const float weight = (members >> (i * kThreadKeys + j)) & 1 ? expf(score[i][j] - reference) : 0.0f;
        sum[i] += weight;
        weights[row + i * kTileRows][lane + j * kTileLanes] = weight;
      }
    }
  }

  // Writes the split's result for rows row0 + t/16 + 8i below `rows`, and columns from column0 on.
  __device__ __forceinline__ void finish(const Partials& out, int64_t group_split, int64_t row0, int64_t rows,
                                         int64_t column0, int64_t D) {
    const int lane = threadIdx.x % kTileLanes;
#pragma unroll
    for (int i = 0; i < kSumThreadRows; ++i) {
      const float total = warp_reduce<kTileLanes>(sum[i], Sum());
      const int64_t row = row0 + threadIdx.x / kTileLanes + i * kTileRows;
      if (row >= rows) continue;
      const int64_t at = group_split * kChunk + row;
      if (lane == 0 && column0 == 0) {
        out.maximum[at] = maximum[i];
        out.sum[at] = total;
      }
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) {
        const int64_t column = column0 + lane * 4 + c / 4 * 64 + c % 4;
        if (column < D) out.weighted[at * D + column] = weighted[i][c];
      }
    }
  }
};

// Grid (tiles of 32 queries, S, blocks of 128 columns). Blocks of further columns score again.
template <typename T, bool kPositiveById>
__global__ void __launch_bounds__(kTileThreads)
    scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory, int64_t first_query,
                int64_t chunk_queries, int64_t tiles, Partials out) {
  auto& shared = shared_memory<ScanShared>();
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSumRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.z) * kSumColumns;
  const Matrix<T> query(queries + first_query * problem.D, chunk_queries, problem.D);
  const Matrix<T> keys(memory, problem.K, problem.D);
  const Matrix<T> live_keys(memory, problem.K, problem.D, problem.memory_ids);
  int64_t own[kSumThreadRows];
#pragma unroll
  for (int i = 0; i < kSumThreadRows; ++i) own[i] = problem.own_id(first_query + row0 + row + i * kTileRows);

  Running all, positive;
  all.start();
  positive.start();
  for (int64_t tile = blockIdx.y * tiles; tile < (blockIdx.y + 1) * tiles; ++tile) {
    const int64_t key0 = tile * kSumTerms;
    if (key0 >= problem.K) break;
    float score[kSumThreadRows][kThreadKeys];
    dot_tile(query, row0, keys, key0, shared.dot, score);
    unsigned members = 0, positives = 0;
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      const int64_t key = key0 + lane + j * kTileLanes;
      const bool live = problem.live(key);
#pragma unroll
      for (int i = 0; i < kSumThreadRows; ++i) {
        const unsigned bit = 1u << (i * kThreadKeys + j);
        const bool same = live && problem.same(own[i], key);
        score[i][j] *= problem.inverse_temperature;
        if (live && !(same && problem.same_id == CPR_SAME_IGNORE)) members |= bit;
        if (kPositiveById && same) positives |= bit;
      }
    }
    all.absorb(score, members, shared.weights[kAll]);
    const bool any = kPositiveById && __syncthreads_or(positives != 0);
    if (any) positive.absorb(score, positives, shared.weights[kPositive]);
    add_weighted_rows(shared.weights[kAll], any ? &shared.weights[kPositive] : nullptr, live_keys, key0, column0,
                      shared.panel, all.weighted, positive.weighted);
  }
  all.finish(out, blockIdx.y, row0, chunk_queries, column0, problem.D);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, row0, chunk_queries, column0,
                    problem.D);
  }
}

template <typename T>
__device__ float warp_dot(const T* a, const T* b, int64_t D) {
  float sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp) sum = __fmaf_rn(widen(a[d]), widen(b[d]), sum);
  return warp_reduce(sum, Sum());
}

constexpr int kFinishThreads = 128;

struct FinishShared {
  float scratch[kFinishThreads / kWarp];
  float factor[kGroups][kMaxSplits];  // of each split's weighted sum in the gradient
  float own_score;
};

// Whether p is the first explicit positive of its row to name its slot. For a whole warp.
__device__ bool first_naming(const int64_t* slots, int64_t p) {
  bool named_before = false;
  for (int64_t earlier = threadIdx.x % kWarp; earlier < p; earlier += kWarp) named_before |= slots[earlier] == slots[p];
  return !__any_sync(kFullWarp, named_before);
}

// What explicit positive p of a row still has to be added to: the scan knows ids but not who is listed. For a warp.
__device__ Membership membership_of(const Problem& problem, const int64_t* slots, int64_t p, int64_t own_id) {
  const int64_t slot = slots[p];
  if (slot == -1) return kNone;
  assert(slot >= 0 && slot < problem.K && "positives: a slot outside the memory");
  if (!problem.live(slot) || !first_naming(slots, p)) return kNone;
  if (!problem.same(own_id, slot) || problem.same_id == CPR_SAME_NEGATIVE) return kNumeratorOnly;
  return problem.same_id == CPR_SAME_IGNORE ? kBoth : kNone;  // positives by id are in both sums already
}

// Fills the row's named [P]; whether the calling thread's warp found one that still counts.
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

// What the scan left of one group for one query: `splits` entries, kChunk apart.
struct Scanned {
  const float *maximum, *sum, *weighted;
  int64_t splits;  // 0: the scan did not sum this group

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

// One group's logsumexp over the splits, the named positives of at least `membership`, and the own key.
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

// One block per query: the explicit positives and the own key join the merged splits; loss and gradient.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 4)
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

  bool other = name_positives(problem, b, query, memory, named);  // the row has a positive besides its own key
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

  // From here on a score is replaced by its coefficient in the gradient: its share of "all" less that of "positive".
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
  for (int64_t d = threadIdx.x; d < D; d += kFinishThreads) {
    float gradient = own_coefficient != 0 ? own_coefficient * widen(own_key[d]) : 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      gradient = __fmaf_rn(shared.factor[kAll][s], scanned_all.weighted[s * kChunk * D + d], gradient);
    }
    for (int64_t s = 0; s < positive_splits; ++s) {
      gradient = __fmaf_rn(shared.factor[kPositive][s], scanned_positive.weighted[s * kChunk * D + d], gradient);
    }
    for (int64_t p = 0; p < P; ++p) {
      if (named[p].membership == kNone) continue;
      gradient = __fmaf_rn(named[p].value, widen(memory[problem.positives[b * P + p] * D + d]), gradient);
    }
    static_cast<float*>(outputs.grad_query)[b * D + d] = gradient * problem.inverse_temperature;
  }
  if (threadIdx.x == 0) {
    const float log_all = logf(all.sum), log_positive = logf(positive.sum);
    static_cast<float*>(outputs.loss)[b] = (all.maximum - positive.maximum) + (log_all - log_positive);
    static_cast<float*>(outputs.own_coefficient)[b] = own_coefficient * problem.inverse_temperature;
    static_cast<float*>(outputs.lse_all)[b] = all.maximum + log_all;
    static_cast<float*>(outputs.lse_positive)[b] = positive.maximum + log_positive;
  }
}

struct GradMemoryShared {
  union {
    DotShared<kSumThreadRows, kThreadKeys> dot;
    RowPanel panel;
  };
  Weights weights;
  unsigned listed[kSumTerms];  // bit r: the query's explicit positives name key r of the block
};

// d loss / d memory. Grid (tiles of 32 keys, blocks of 128 columns): a block walks all queries in order.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2)
    grad_memory_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory,
                       const float* grad_loss, const float* lse_all, const float* lse_positive, float* grad_memory) {
  auto& shared = shared_memory<GradMemoryShared>();
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
  const int64_t key0 = static_cast<int64_t>(blockIdx.x) * kSumRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kSumColumns;
  const Matrix<T> keys(memory, problem.K, problem.D);
  const Matrix<T> query(queries, problem.B, problem.D);
  WeightedSum gradient = {}, unused;
  for (int64_t query0 = 0; query0 < problem.B; query0 += kSumTerms) {
    const int64_t queries_here = problem.B - query0 < kSumTerms ? problem.B - query0 : kSumTerms;
    if (threadIdx.x < kSumTerms) shared.listed[threadIdx.x] = 0;
    float score[kSumThreadRows][kThreadKeys];
    dot_tile(keys, key0, query, query0, shared.dot, score);  // its barriers order the clearing above
    for (int64_t at = threadIdx.x; at < queries_here * problem.P; at += kTileThreads) {
      const int64_t key = problem.positives[query0 * problem.P + at] - key0;
      if (key >= 0 && key < kSumRows) atomicOr(&shared.listed[at / problem.P], 1u << key);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      const int64_t b = query0 + lane + j * kTileLanes;
      const int64_t own = problem.own_id(b);
      const bool valid = b < problem.B;
      const float scale = valid ? grad_loss[b] * problem.inverse_temperature : 0.0f;
      const float all = valid ? lse_all[b] : 0.0f, positive = valid ? lse_positive[b] : 0.0f;
#pragma unroll
      for (int i = 0; i < kSumThreadRows; ++i) {
        const int key_row = row + i * kTileRows;
        const int64_t key = key0 + key_row;
        float weight = 0;
        if (valid && problem.live(key)) {
          const float logit = score[i][j] * problem.inverse_temperature;
          const bool same = problem.same(own, key), listed = (shared.listed[lane + j * kTileLanes] >> key_row) & 1;
          if (listed || !same || problem.same_id != CPR_SAME_IGNORE) weight += expf(logit - all);
          if (listed || (same && problem.same_id == CPR_SAME_POSITIVE)) weight -= expf(logit - positive);
        }
        shared.weights[key_row][lane + j * kTileLanes] = weight * scale;
      }
    }
    add_weighted_rows(shared.weights, nullptr, query, query0, column0, shared.panel, gradient, unused);
  }
#pragma unroll
  for (int i = 0; i < kSumThreadRows; ++i) {
    const int64_t key = key0 + row + i * kTileRows;
#pragma unroll
    for (int c = 0; c < kSumThreadColumns; ++c) {
      const int64_t column = column0 + lane * 4 + c / 4 * 64 + c % 4;
      if (key < problem.K && column < problem.D) grad_memory[key * problem.D + column] = gradient[i][c];
    }
  }
}

const char* check(const cpr_mil_nce_args& args) {
  if (args.B < 1 || args.K < 1 || args.D < 1 || args.P < 0) return "B, K, D: expected at least 1";
  if (args.query_ids != nullptr && args.memory_ids == nullptr) return "query_ids: given without memory_ids";
  if (!(args.temperature > 0)) return "temperature: expected a positive number";
  return nullptr;
}

Problem problem_of(const cpr_mil_nce_args& args) {
  return {args.positives,
          args.query_ids,
          args.memory_ids,
          args.self_mode,
          args.B,
          args.K,
          args.D,
          args.positives != nullptr ? args.P : 0,
          args.same_id,
          args.self_positive,
          static_cast<float>(1 / args.temperature)};
}

template <typename T, bool kPositiveById>
const char* forward(const cpr_mil_nce_args& args, const cpr_mil_nce_outputs& outputs, void* workspace,
                    cudaStream_t stream) {
  const Problem problem = problem_of(args);
  const Splits splits(args.K);
  int64_t bytes;
  const Partials partials = partials_at(workspace, args, &bytes);
  const T *query = static_cast<const T*>(args.query), *own_key = static_cast<const T*>(args.own_key);
  const T* memory = static_cast<const T*>(args.memory);
  for (int64_t first = 0; first < args.B; first += kChunk) {
    const int64_t queries = args.B - first < kChunk ? args.B - first : kChunk;
    bool scanned = false;
    const char* error =
        launch_tensor_scan<kPositiveById>(problem, query, memory, first, queries, splits, partials, stream, &scanned);
    if (error == nullptr && !scanned) {
      const dim3 grid(static_cast<unsigned>(ceil_div(queries, kSumRows)), static_cast<unsigned>(splits.count),
                      static_cast<unsigned>(ceil_div(args.D, kSumColumns)));
      error = launch<ScanShared>(scan_kernel<T, kPositiveById>, grid, kTileThreads, stream, problem, query, memory,
                                 first, queries, splits.tiles, partials);
    }
    if (error != nullptr) return error;
    error = launch<FinishShared>(finish_kernel<T>, dim3(static_cast<unsigned>(queries)), kFinishThreads, stream,
                                 problem, query, own_key, memory, first, splits.count, kPositiveById ? splits.count : 0,
                                 partials, outputs);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_mil_nce_forward_cuda_workspace(const cpr_mil_nce_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  int64_t bytes;
  cpr::partials_at(nullptr, *args, &bytes);
  return static_cast<size_t>(bytes);
}

extern "C" const char* cpr_mil_nce_forward_cuda(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                                                void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    using T = decltype(element);
    const bool positive_by_id = args->same_id == CPR_SAME_POSITIVE && args->query_ids != nullptr;
    return positive_by_id ? cpr::forward<T, true>(*args, *outputs, workspace, static_cast<cudaStream_t>(stream))
                          : cpr::forward<T, false>(*args, *outputs, workspace, static_cast<cudaStream_t>(stream));
  });
}

extern "C" const char* cpr_mil_nce_grad_memory_cuda(const cpr_mil_nce_args* args, const void* grad_loss,
                                                    const void* lse_all, const void* lse_positive, void* grad_memory,
                                                    void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(static_cast<unsigned>(cpr::ceil_div(args->K, cpr::kSumRows)),
                    static_cast<unsigned>(cpr::ceil_div(args->D, cpr::kSumColumns)));
    return cpr::launch<cpr::GradMemoryShared>(
        cpr::grad_memory_kernel<T>, grid, cpr::kTileThreads, static_cast<cudaStream_t>(stream), cpr::problem_of(*args),
        static_cast<const T*>(args->query), static_cast<const T*>(args->memory), static_cast<const float*>(grad_loss),
        static_cast<const float*>(lse_all), static_cast<const float*>(lse_positive), static_cast<float*>(grad_memory));
  });
}
