// The plan of a call of cascade_select: its route, the number of queries in a chunk and the layout of its workspace.
// Letters as in cascade_select.cu.
#pragma once

#include <math.h>

#include "cpr_fast.h"
#include "cuda/cascade_select/select.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

constexpr int kMaxStages = 256;
constexpr int64_t kRowUnit = 64;  // rows of the workspace start on 256-byte boundaries

// Of the routes with rows in global memory: calls with this many views and stages at most sift rows of this length.
constexpr int kMaxSiftedViews = 2, kMaxSiftedStages = 8;
constexpr int64_t kSample = 8192, kMinSifted = 2 * kSample;
constexpr int kSiftPart = 16384, kSiftThreads = 256;  // entries and threads of a block of sift_kernel

// The ranks in the sample that a stage takes its threshold and its limits from, see sift.cuh. middle 0: the stage keeps
// everything; high 0, low above the sample: there is no limit.
struct SampleRanks {
  uint16_t high, middle, low;
};

// What decides a query's entries in one pass, see sift.cuh.
struct Sieve {
  float low[kMaxSiftedStages], high[kMaxSiftedStages];               // limits of the threshold of each stage
  float drop_below[kMaxSiftedStages], pass_above[kMaxSiftedStages];  // the same with room for the errors of scores
  unsigned dropped[kMaxSiftedStages];                                // settled entries that drop out at each stage
  unsigned gathered;                                                 // entries in the list
};

enum Route : int { kOnChip, kInCache, kRefined };

// All of a call except its pointers. The workspace holds, in this order: scores float [U, chunk, row]; survivors and
// window, uint32 [chunk, row] each, on routes that use them; ranking uint64 [chunk, ranking_row]; sieves [chunk] if
// rows are sifted; key_squares float [U].
struct Plan {
  int64_t B, K, D, row, chunk, ranking_row, top_k;
  int stages, views_used;
  Route route;
  int16_t view[kMaxStages];       // [stages] index of the view of each stage in view_used
  int32_t keep[kMaxStages];       // [stages] at most K
  int32_t view_used[kMaxStages];  // [views_used] index of the view in the inputs
  bool sifted;
  SampleRanks sampled[kMaxSiftedStages];
  int8_t last_of_view[kMaxSiftedViews], previous_of_view[kMaxSiftedStages];  // stages, or -1
};
static_assert(sizeof(Plan) < 3900, "kernel parameters are limited to 4 KiB before CUDA 12.1");

struct alignas(16) CascadeShared {
  SelectShared select;
  float low[kMaxStages], high[kMaxStages];  // known range of the scores in each view in use, or NaN
  float bound[kMaxStages];                  // on the error of a score in each view in use; refined route only
};

const char* check(const cpr_cascade_args& args) {
  if (args.V < 1 || args.B < 1 || args.K < 1 || args.D < 1 || args.n < 1) return "V, B, K, D, n: expected at least 1";
  if (args.K > INT32_MAX || args.V > INT32_MAX) return "memory: the CUDA kernel takes at most 2^31 - 1 entries";
  if (args.n > kMaxStages) return "views: the CUDA kernel takes at most 256 stages";
  return nullptr;
}

int64_t bytes_per_query(const Plan& plan) {
  const int lists = plan.route == kOnChip ? 0 : plan.route == kInCache ? 1 : 2;
  return plan.row * static_cast<int64_t>(sizeof(float)) * (plan.views_used + lists) +
         plan.ranking_row * static_cast<int64_t>(sizeof(uint64_t)) +
         (plan.sifted ? static_cast<int64_t>(sizeof(Sieve)) : 0);
}

// Returns how many bytes of rows stay in the L2 cache while the memory streams through it.
int64_t cache_budget() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) != cudaSuccess) return 0;
  return static_cast<int64_t>(bytes) / 8 * 5;
}

// A chunk of the refined route with fewer than the 32 queries of a tile would waste products. Rows of which 32 fit the
// cache therefore take the route through the cache.
Route route_of(const Plan& plan, const cpr_cascade_args& args) {
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  if (plan.K <= kMaxMarked && static_cast<int64_t>(sizeof(CascadeShared)) + rows <= shared_memory_limit()) {
    return kOnChip;
  }
  const bool fits = kScoreQueries * bytes_per_query(plan) <= cache_budget();
  return fits || plan.D > kMaxBoundedWidth || args.precision == CPR_APPROX_BF16 ? kInCache : kRefined;
}

// Returns the number of queries in a chunk: as many as have their rows in the L2 cache together; if the rows are too
// long for that, enough to occupy all multiprocessors, within 1 GiB; at least the queries of one tile of scores, within
// 4 GiB; at least one. Several chunks of long rows are about equal, in whole tiles: the rest of a tile costs as much.
int64_t chunk_of(const Plan& plan) {
  const int64_t bytes = bytes_per_query(plan), in_cache = cache_budget() / bytes;
  const int64_t tile = (int64_t{4} << 30) / bytes, in_memory = (int64_t{1} << 30) / bytes;
  int64_t chunk = in_memory < 128 ? in_memory : 128;
  if (chunk < kScoreQueries) chunk = tile < kScoreQueries ? tile : kScoreQueries;
  if (chunk < in_cache) chunk = in_cache;
  if (chunk < 1) return 1;
  if (chunk >= plan.B) return plan.B;
  if (plan.route == kOnChip || chunk < kScoreQueries) return chunk;
  const int64_t equal = round_up(ceil_div(plan.B, ceil_div(plan.B, chunk)), kScoreQueries);
  return equal <= chunk ? equal : chunk / kScoreQueries * kScoreQueries;
}

// Returns the ranks of a stage that keeps `keep` of `before` entries. Of the kept ones, about `expected` are sampled.
// The deviation is that of a drawing from the entries before the stage; four times as much, and a few for small
// numbers, are hardly ever exceeded.
SampleRanks sample_ranks(int64_t keep, int64_t before, int64_t K) {
  if (keep >= before) return {0, 0, 0};
  const double share = static_cast<double>(keep) / static_cast<double>(before);
  const double expected = static_cast<double>(kSample) * static_cast<double>(keep) / static_cast<double>(K);
  const double reach = 4 * sqrt(expected * (1 - share) + 1) + 4;
  return {static_cast<uint16_t>(expected > reach ? expected - reach : 0),
          static_cast<uint16_t>(expected < 1 ? 1 : expected + 0.5), static_cast<uint16_t>(expected + reach + 1)};
}

void plan_sift(Plan& plan) {
  plan.sifted = plan.route != kOnChip && plan.K >= kMinSifted && plan.views_used <= kMaxSiftedViews &&
                plan.stages <= kMaxSiftedStages;
  if (!plan.sifted) return;
  for (int u = 0; u < kMaxSiftedViews; ++u) plan.last_of_view[u] = -1;
  int64_t before = plan.K;
  for (int s = 0; s < plan.stages; ++s) {
    plan.sampled[s] = sample_ranks(plan.keep[s], before, plan.K);
    if (plan.keep[s] < before) before = plan.keep[s];
    int8_t& last = plan.last_of_view[plan.view[s]];
    plan.previous_of_view[s] = last;
    last = static_cast<int8_t>(s);
  }
}

Plan plan_of(const cpr_cascade_args& args) {
  Plan plan = {};
  plan.B = args.B, plan.K = args.K, plan.D = args.D;
  plan.stages = static_cast<int>(args.n);
  for (int s = 0; s < plan.stages; ++s) {
    int u = 0;
    while (u < plan.views_used && plan.view_used[u] != args.views[s]) ++u;
    if (u == plan.views_used) plan.view_used[plan.views_used++] = static_cast<int32_t>(args.views[s]);
    plan.view[s] = static_cast<int16_t>(u);
    plan.keep[s] = static_cast<int32_t>(args.keep[s] < args.K ? args.keep[s] : args.K);
  }
  plan.top_k = args.keep[args.n - 1];
  plan.row = round_up(plan.K, kRowUnit);
  const int64_t ranked = plan.keep[plan.stages - 1];
  plan.ranking_row = ranked > kCandidates ? round_up(ranked, kRowUnit) : 0;  // smaller rankings use shared memory
  plan.route = kInCache;
  plan.route = route_of(plan, args);
  plan_sift(plan);
  plan.chunk = chunk_of(plan);
  return plan;
}

// The workspace of a chunk and the outputs. `at` moves the pointers to one query.
struct Chunk {
  float* scores;
  uint32_t *survivors, *window;
  uint64_t* ranking;
  Sieve* sieves;
  unsigned* key_squares;
  int64_t* indices;
  float* top_scores;

  __device__ __forceinline__ void at(const Plan& plan, int64_t row, int64_t first_query) {
    scores += row * plan.row;
    survivors += row * plan.row;
    window += row * plan.row;
    ranking += row * plan.ranking_row;
    indices += (first_query + row) * plan.top_k;
    top_scores += (first_query + row) * plan.top_k;
  }
};

template <typename T>
struct Inputs {
  const T *queries, *memory;
  const int64_t *query_ids, *memory_ids;
};

}  // namespace
}  // namespace cpr
