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

// Calls with this many views in use and stages at most can be streamed, if D is at most kMaxBoundedWidth; of those,
// rows of at least kMinSifted have a sieve.
constexpr int kMaxSiftedViews = 2, kMaxSiftedStages = 8;
// A sample has 2^13 entries, of long rows 2^15: the entries between the limits become half as many.
constexpr int kSampleBits = 13, kLongSampleBits = 15;
constexpr int64_t kMinSifted = 2 << kSampleBits, kMinLongSample = 1 << 18;
constexpr int kMaxStreamedTiles = 4;  // tiles of keys that a block streams at most

// The ranks in the sample that a stage takes its threshold and its limits from, see sieve.cuh. middle 0: the stage
// keeps everything; high 0, low above the sample: there is no limit.
struct SampleRanks {
  uint16_t high, middle, low;
};

// What decides a query's entries in one pass, see sieve.cuh. What it has of the stages are sectors of the L2 cache.
struct Sieve {
  float low[kMaxSiftedStages], high[kMaxSiftedStages];  // limits of the threshold of each stage
  unsigned dropped[kMaxSiftedStages];                   // settled entries that drop out at each stage
  unsigned gathered[kMaxSiftedStages];  // entries that are not settled, by the first stage they may fail to pass
  float center[kMaxSiftedViews];        // the first lower limit in each view, or 0
  unsigned misled;                      // whether all entries have to go through the stages
  unsigned rest[5];
};
static_assert(sizeof(Sieve) % 32 == 0);

enum Route : int { kOnChip, kInCache, kStreamed };

// All of a call except its pointers.
struct Plan {
  int64_t B, K, D, row, chunk, ranking_row, top_k;
  int64_t capacity;                     // of the lists of gathered entries of a query, together; streamed route only
  int64_t lists[kMaxSiftedStages + 1];  // where the list of each stage starts among them; at last, the end
  int64_t room;   // for the gathered entries of a query that a stage compares; streamed route only
  int64_t spare;  // queries whose entries can all go through the stages at a time; streamed route only
  int stages, views_used;
  int tiles;  // of keys, that a block streams
  Route route;
  bool exact;
  bool held;                      // whether the entries that a stage compares are in shared memory; streamed route only
  bool alone;                     // and the call has a multiprocessor for each query of a chunk
  int16_t view[kMaxStages];       // [stages] index of the view of each stage in view_used
  int32_t keep[kMaxStages];       // [stages] at most K
  int32_t view_used[kMaxStages];  // [views_used] index of the view in the inputs
  uint8_t stages_of[kMaxSiftedViews];  // bits of the stages that compare each view; streamed route only
  bool sifted;
  int sample_bits;  // of the number of entries in the sample
  SampleRanks sampled[kMaxSiftedStages];

  __host__ __device__ int64_t sample() const { return int64_t{1} << sample_bits; }
};
static_assert(sizeof(Plan) < 3900, "kernel parameters are limited to 4 KiB before CUDA 12.1");

struct alignas(16) CascadeShared {
  SelectShared select;
  float low[kMaxStages], high[kMaxStages];  // known range of the scores in each view in use, or NaN
  float bound[kMaxSiftedViews];             // on the error of a score in each view in use; streamed route only
};

const char* check(const cpr_cascade_args& args) {
  if (args.V < 1 || args.B < 1 || args.K < 1 || args.D < 1 || args.n < 1) return "V, B, K, D, n: expected at least 1";
  if (args.K > INT32_MAX || args.V > INT32_MAX) return "memory: the CUDA kernel takes at most 2^31 - 1 entries";
  if (args.n > kMaxStages) return "views: the CUDA kernel takes at most 256 stages";
  return nullptr;
}

// Bytes for each query of a chunk on the routes with rows of scores.
int64_t bytes_per_row(const Plan& plan, Route route) {
  const int lists = route == kOnChip ? 0 : 1;
  return plan.row * static_cast<int64_t>(sizeof(float)) * (plan.views_used + lists) +
         plan.ranking_row * static_cast<int64_t>(sizeof(uint64_t));
}

// Bytes for each query of a chunk on the streamed route.
int64_t bytes_per_list(const Plan& plan) {
  const int64_t compared = (plan.held ? 0 : plan.views_used + 1) + (plan.exact ? 1 : 0);
  return plan.capacity * static_cast<int64_t>(sizeof(uint4)) +
         plan.room * static_cast<int64_t>(sizeof(float)) * compared +
         (plan.sifted ? plan.sample() * static_cast<int64_t>(sizeof(float)) * plan.views_used : 0) +
         plan.ranking_row * static_cast<int64_t>(sizeof(uint64_t)) + static_cast<int64_t>(sizeof(Sieve));
}

// Returns how many bytes of rows stay in the L2 cache while the memory streams through it.
int64_t cache_budget() { return device_attribute(cudaDevAttrL2CacheSize, 0) / 8 * 5; }

// Returns how many bytes of shared memory a block has that takes a whole multiprocessor.
int64_t processor_shared_memory() {
  constexpr int64_t kReserved = 1024;  // of each block, by the driver
  const int64_t limit = shared_memory_limit();
  const int64_t bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, kDefaultShared) - kReserved;
  return bytes < limit ? bytes : limit;
}

// Returns whether float32 arithmetic has half the rate of other GPUs beside the tensor cores: on an A100.
bool slow_arithmetic() { return has_compute_capability(8, 0); }

// Rows that fit a multiprocessor stay there, except where tensor cores are faster for many queries: if exact scores are
// slow and take several chunks. Other short rows are streamed only if those of 32 queries do not fit the cache.
Route route_of(const Plan& plan) {
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  const bool streamable =
      plan.views_used <= kMaxSiftedViews && plan.stages <= kMaxSiftedStages && plan.D <= kMaxBoundedWidth;
  if (plan.K <= kMaxMarked && static_cast<int64_t>(sizeof(CascadeShared)) + rows <= processor_shared_memory()) {
    const bool several_chunks = plan.B > cache_budget() / bytes_per_row(plan, kOnChip);
    const bool many = plan.K >= kMinSifted && several_chunks;
    return streamable && many && plan.exact && slow_arithmetic() ? kStreamed : kOnChip;
  }
  const bool fits = 32 * bytes_per_row(plan, kInCache) <= cache_budget();
  return streamable && (plan.K >= kMinSifted || !fits) ? kStreamed : kInCache;
}

// Returns how often a multiprocessor that holds one query at a time selects in a call.
int64_t rounds_of(int64_t queries, int64_t chunk) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
  return queries / chunk * ceil_div(chunk, processors) + ceil_div(queries % chunk, processors);
}

// Returns `chunk`, or a smaller number of queries with which the chunks of a call are about equal, in whole tiles: the
// rest of a tile costs as much. On chip only if that saves a round of the multiprocessors.
int64_t even_chunk(const Plan& plan, int64_t chunk) {
  if (chunk < 1) return 1;
  if (chunk >= plan.B) return plan.B;
  if (chunk < kScoreQueries) return chunk;
  const int64_t equal = round_up(ceil_div(plan.B, ceil_div(plan.B, chunk)), kScoreQueries);
  const int64_t even = equal <= chunk ? equal : chunk / kScoreQueries * kScoreQueries;
  return plan.route == kOnChip && rounds_of(plan.B, even) >= rounds_of(plan.B, chunk) ? chunk : even;
}

// Returns the number of queries in a chunk with rows of scores: as many as have their rows in the L2 cache together; if
// the rows are too long for that, enough to occupy all multiprocessors, within 1 GiB; at least the queries of one tile
// of scores, within 4 GiB; at least one.
int64_t chunk_of_rows(const Plan& plan) {
  const int64_t bytes = bytes_per_row(plan, plan.route), in_cache = cache_budget() / bytes;
  const int64_t tile = (int64_t{4} << 30) / bytes, in_memory = (int64_t{1} << 30) / bytes;
  int64_t chunk = in_memory < 128 ? in_memory : 128;
  if (chunk < kScoreQueries) chunk = tile < kScoreQueries ? tile : kScoreQueries;
  return even_chunk(plan, chunk < in_cache ? in_cache : chunk);
}

// The same with lists: every chunk reads the whole memory, so the lists may take much more than the L2 cache, about 1
// GiB on an A100, and twice as much for enough queries to occupy all multiprocessors; at least the queries of one tile,
// within 4 GiB; at least one.
int64_t chunk_of_lists(const Plan& plan) {
  constexpr int64_t kEnough = 128;
  const int64_t bytes = bytes_per_list(plan), tile = (int64_t{4} << 30) / bytes;
  int64_t chunk = 40 * cache_budget() / bytes;
  if (chunk < kEnough) chunk = 2 * chunk < kEnough ? 2 * chunk : kEnough;
  if (chunk < kScoreQueries) chunk = tile < kScoreQueries ? tile : kScoreQueries;
  return even_chunk(plan, chunk);
}

// Returns the ranks of a stage that keeps `keep` of `before` entries. Of those kept, about `expected` are sampled.
// The deviation is about that of a drawing, without putting back, from the entries before the stage; up to a quarter
// more, because the sample has thresholds of its own for the stages before. 4.25 times as much, and a few for small
// numbers, are hardly ever exceeded.
SampleRanks sample_ranks(int64_t keep, int64_t before, const Plan& plan) {
  if (keep >= before) return {0, 0, 0};
  const double share = static_cast<double>(keep) / static_cast<double>(before);
  const double expected = static_cast<double>(plan.sample()) * static_cast<double>(keep) / static_cast<double>(plan.K);
  const double rest = 1 - static_cast<double>(plan.sample()) / static_cast<double>(plan.K);
  const double reach = 4.25 * sqrt(expected * (1 - share) * rest + 1) + 4;
  return {static_cast<uint16_t>(expected > reach ? expected - reach : 0),
          static_cast<uint16_t>(expected < 1 ? 1 : expected + 0.5), static_cast<uint16_t>(expected + reach + 1)};
}

// Plans the lists of gathered entries. About as many entries are gathered as lie between the limits of the stages; half
// as many again, and a few, have room. Errors of scores widen the limits, by this share of the entries if the features
// are unit vectors of independent elements. Without a sieve, all entries are gathered at the first stage. A stage
// compares its list, of which about half pass, and what earlier stages have left of theirs.
void plan_lists(Plan& plan, bool split) {
  const double error = plan.exact ? 0.8 * relative_error(plan.D, split) * sqrt(static_cast<double>(plan.D)) : 0.0;
  const double entries = static_cast<double>(plan.K);
  int64_t before = plan.K;
  double left = 0, compared = plan.sifted ? 0 : entries;
  for (int s = 0; s < kMaxSiftedStages; ++s) {
    int64_t room = s == 0 && !plan.sifted ? plan.K : 0;
    if (plan.sifted && s < plan.stages) {
      const SampleRanks ranks = plan.sampled[s] = sample_ranks(plan.keep[s], before, plan);
      double expected = s == plan.stages - 1 ? static_cast<double>(plan.keep[s]) : 0.0;
      const double waiting = left;  // at the start of the stage
      if (ranks.middle != 0) {
        const int64_t sample = plan.sample();
        const double between = static_cast<double>(ranks.low < sample ? ranks.low : sample) - ranks.high;
        const double near = (between / static_cast<double>(sample) + error) * entries;
        expected += near;
        left = left * static_cast<double>(plan.keep[s]) / static_cast<double>(before) + near / 2;
        before = plan.keep[s];
      }
      compared = fmax(compared, waiting + expected);                 // also of a stage that keeps everything
      const double wanted = 1.5 * expected + (s == 0 ? 1024 : 512);  // entries without a bound are in the first list
      room = wanted < entries ? static_cast<int64_t>(wanted) : plan.K;
    }
    plan.lists[s + 1] = plan.lists[s] + round_up(room, kRowUnit);
  }
  plan.capacity = plan.lists[kMaxSiftedStages];
  const int64_t room = round_up(static_cast<int64_t>(1.25 * compared) + 512, kRowUnit);
  plan.room = room < plan.capacity ? room : plan.capacity;
}

// Floats for each view of a query in shared memory: whole vectors.
__host__ __device__ int64_t held_width(const Plan& plan) { return round_up(plan.D, 4); }

// In a block whose sieve was wrong, a tile of scores takes their place.
using SpareTile = ScoreTile<kScoreQueries, kSelectThreads>;

template <typename T>
union SpareShared {
  CascadeShared stages;
  TensorScoreShared<SpareTile, T, 1> tile;
};

// Bytes of shared memory for a query and the entries that a stage compares, each a slot and a score in every view.
int64_t held_bytes(const Plan& plan) {
  const int64_t words = plan.views_used * held_width(plan) + (plan.views_used + 1) * plan.room;
  const int64_t bytes = static_cast<int64_t>(sizeof(CascadeShared)) + words * 4;
  const int64_t spare = static_cast<int64_t>(sizeof(SpareShared<__nv_bfloat16>));
  return bytes > spare ? bytes : spare;
}

// Plans the streamed route.
void plan_stream(Plan& plan, bool split) {
  plan.sifted = plan.K >= kMinSifted;
  for (int s = 0; s < plan.stages; ++s) plan.stages_of[plan.view[s]] |= static_cast<uint8_t>(1 << s);
  plan.sample_bits = plan.K >= kMinLongSample ? kLongSampleBits : kSampleBits;
  plan_lists(plan, split);
  plan.held = plan.sifted && held_bytes(plan) <= processor_shared_memory();
  plan.chunk = chunk_of_lists(plan);
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
  const int64_t most = (int64_t{1} << 29) / (plan.row * static_cast<int64_t>(sizeof(float)) * (plan.views_used + 1));
  plan.spare = most < 1 ? 1 : most < processors ? most : processors;
  if (plan.spare > plan.chunk) plan.spare = plan.chunk;
  plan.alone = plan.held && plan.spare == plan.chunk;
  const int64_t share = ceil_div(plan.K, kScoreKeys) * ceil_div(plan.chunk, kScoreQueries) / (4 * processors);
  plan.tiles = static_cast<int>(share < 1 ? 1 : share < kMaxStreamedTiles ? share : kMaxStreamedTiles);
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
  plan.exact = args.precision != CPR_APPROX_BF16;
  plan.row = round_up(plan.K, kRowUnit);
  const int64_t ranked = plan.keep[plan.stages - 1];
  plan.ranking_row = ranked > kCandidates ? round_up(ranked, kRowUnit) : 0;  // smaller rankings use shared memory
  plan.route = route_of(plan);
  if (plan.route == kStreamed) {
    plan_stream(plan, args.dtype == CPR_F32);
  } else {
    plan.chunk = chunk_of_rows(plan);
  }
  return plan;
}

// The workspace of a chunk and the outputs.
struct Chunk {
  float* scores;        // [U, chunk, row]; on the streamed route [U, chunk, sample], of the sample
  uint32_t* survivors;  // [chunk, row]; in cache only
  uint64_t* ranking;    // [chunk, ranking_row]
  int64_t* indices;     // [B, top_k]
  float* top_scores;    // [B, top_k]

  // Of the streamed route only:
  Sieve* sieves;          // [chunk]
  unsigned* key_squares;  // [U] the greatest squared norm of a key within the range of the bound; bits of a float
  uint4* gathered;        // [chunk, capacity] the gathered entries: slot and bits of the score in each view
  uint32_t* slots;        // [chunk, room] those that a stage compares, unless they are in shared memory
  float* values;          // [U, chunk, room] their scores
  uint32_t* near;         // [chunk, room] scratch for those near a threshold, for exact scores
  float* spare_scores;    // [spare, U, row]
  uint32_t* spare_slots;  // [spare, row]

  // Moves the pointers of the routes with rows to one query.
  __device__ __forceinline__ void at(const Plan& plan, int64_t row, int64_t first_query) {
    scores += row * plan.row;
    survivors += row * plan.row;
    at_outputs(plan, row, first_query);
  }

  __device__ __forceinline__ void at_outputs(const Plan& plan, int64_t row, int64_t first_query) {
    ranking += row * plan.ranking_row;
    indices += (first_query + row) * plan.top_k;
    top_scores += (first_query + row) * plan.top_k;
  }
};

// Divides memory from `at` on into arrays that start on boundaries of 256 bytes after it.
struct Workspace {
  uintptr_t at;

  template <typename T>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(at);
    at += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 256));
    return found;
  }
};

Chunk chunk_in(const Plan& plan, Workspace& workspace) {
  Chunk chunk = {};
  chunk.ranking = workspace.take<uint64_t>(plan.chunk * plan.ranking_row);
  if (plan.route != kStreamed) {
    chunk.scores = workspace.take<float>(plan.views_used * plan.chunk * plan.row);
    if (plan.route == kInCache) chunk.survivors = workspace.take<uint32_t>(plan.chunk * plan.row);
    return chunk;
  }
  chunk.sieves = workspace.take<Sieve>(plan.chunk);
  chunk.key_squares = workspace.take<unsigned>(plan.views_used);
  chunk.gathered = workspace.take<uint4>(plan.chunk * plan.capacity);
  if (!plan.held) {
    chunk.slots = workspace.take<uint32_t>(plan.chunk * plan.room);
    chunk.values = workspace.take<float>(plan.views_used * plan.chunk * plan.room);
  }
  if (plan.exact) chunk.near = workspace.take<uint32_t>(plan.chunk * plan.room);
  if (!plan.sifted) return chunk;
  chunk.scores = workspace.take<float>(plan.views_used * plan.chunk * plan.sample());
  chunk.spare_scores = workspace.take<float>(plan.spare * plan.views_used * plan.row);
  chunk.spare_slots = workspace.take<uint32_t>(plan.spare * plan.row);
  return chunk;
}

template <typename T>
struct Inputs {
  const T *queries, *memory;
  const int64_t *query_ids, *memory_ids;
};

}  // namespace
}  // namespace cpr
