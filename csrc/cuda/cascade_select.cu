// cascade_select on CUDA. A score never changes between stages, so: one kernel scores a chunk of queries against
// the memory in every view that a stage compares, and one block per query then runs all stages over its rows.
//
// The canonical score (fp32 fused multiply-adds over d in order) and the total order (score descending, slot
// ascending) make indices and scores those of the CPU, bit for bit. CPR_APPROX_BF16 takes the same exact route.
// Letters: B queries, V views, U views in use, K memory entries, D feature width, n stages.
#include "cpr_fast.h"
#include "launch.cuh"
#include "select.cuh"
#include "tile.cuh"

namespace cpr {
namespace {

constexpr int kMaxStages = 256;
constexpr int64_t kRowUnit = 64;  // rows of the workspace start on 256-byte boundaries

// Everything about a call but its pointers, and the cut of its workspace:
// scores float [U, chunk, row], survivors uint32 [chunk, row], ranking uint64 [chunk, ranking_row].
struct Plan {
  int64_t B, K, D, row, chunk, ranking_row, top_k;
  int stages, views_used;
  int16_t view[kMaxStages];       // [stages] position of each stage's view among those in use
  int32_t keep[kMaxStages];       // [stages] at most K
  int32_t view_used[kMaxStages];  // [views_used] view of the inputs
};
static_assert(sizeof(Plan) < 4000, "kernel parameters are limited to 4 KiB before CUDA 12.1");

const char* check(const cpr_cascade_args& args) {
  if (args.V < 1 || args.B < 1 || args.K < 1 || args.D < 1 || args.n < 1) return "V, B, K, D, n: expected at least 1";
  if (args.K > INT32_MAX || args.V > INT32_MAX) return "memory: the CUDA kernel takes at most 2^31 - 1 entries";
  if (args.n > kMaxStages) return "views: the CUDA kernel takes at most 256 stages";
  return nullptr;
}

// Queries per chunk. Rows that fit the L2 cache together, where they do; for longer rows enough queries to fill
// the multiprocessors, within 256 MiB; at least one.
int64_t chunk_of(int64_t bytes_per_query, int64_t B) {
  const int64_t in_cache = (32 << 20) / bytes_per_query;
  const int64_t in_memory = (256 << 20) / bytes_per_query;
  const int64_t filling = in_memory < 128 ? in_memory : 128;
  const int64_t chunk = in_cache > filling ? in_cache : filling;
  return chunk < 1 ? 1 : chunk < B ? chunk : B;
}

int64_t bytes_per_query(const Plan& plan) {
  return plan.row * static_cast<int64_t>(sizeof(float)) * (plan.views_used + 1) +
         plan.ranking_row * static_cast<int64_t>(sizeof(uint64_t));
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
  plan.ranking_row = ranked > kCandidates ? round_up(ranked, kRowUnit) : 0;  // fewer are ranked in shared memory
  plan.chunk = chunk_of(bytes_per_query(plan), plan.B);
  return plan;
}

// scores[u, b, k] for a tile of queries and of slots, NaN where the entry is empty or of the query's own id.
template <typename T, int kThreadRows, int kThreadColumns>
__global__ void __launch_bounds__(kTileThreads)
    score_kernel(const __grid_constant__ Plan plan, const T* queries, const T* memory, const int64_t* query_ids,
                 const int64_t* memory_ids, int64_t first_query, int64_t chunk_queries, float* scores) {
  auto& shared = shared_memory<DotShared<kThreadRows, kThreadColumns>>();
  const int u = blockIdx.z;
  const int64_t view = plan.view_used[u];
  const int64_t query0 = static_cast<int64_t>(blockIdx.y) * kTileRows * kThreadRows;
  const int64_t slot0 = static_cast<int64_t>(blockIdx.x) * kTileLanes * kThreadColumns;
  const Matrix<T> query(queries + (view * plan.B + first_query) * plan.D, chunk_queries, plan.D);
  const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
  float score[kThreadRows][kThreadColumns];
  dot_tile(query, query0, keys, slot0, shared, score);

  int64_t id[kThreadColumns];
#pragma unroll
  for (int j = 0; j < kThreadColumns; ++j) {
    const int64_t slot = slot0 + threadIdx.x % kTileLanes + j * kTileLanes;
    id[j] = memory_ids != nullptr && slot < plan.K ? memory_ids[slot] : 0;
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t b = query0 + threadIdx.x / kTileLanes + i * kTileRows;
    if (b >= chunk_queries) continue;
    const int64_t own_id = query_ids != nullptr ? query_ids[first_query + b] : -1;  // -1 matches no live entry
    float* out = scores + (u * plan.chunk + b) * plan.row;
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t slot = slot0 + threadIdx.x % kTileLanes + j * kTileLanes;
      if (slot >= plan.K) continue;
      const bool excluded = memory_ids != nullptr && (id[j] == -1 || id[j] == own_id);
      out[slot] = excluded ? NAN : score[i][j] + 0.0f;  // -0 + 0 is +0: equal scores get equal bits
    }
  }
}

struct CascadeShared {
  SelectShared select;
  float low[kMaxStages], high[kMaxStages];  // what is known of the survivors' range in each view in use; NaN: nothing
};

// Runs the stages of one query over slots [K]; returns how many survive, their slots in front and ascending.
__device__ unsigned run_stages(const Plan& plan, const float* scores, uint32_t* slots, CascadeShared& shared) {
  const int64_t view_stride = plan.chunk * plan.row;
  for (int u = threadIdx.x; u < plan.views_used; u += kSelectThreads) shared.low[u] = NAN;
  auto every_slot = [](unsigned i) { return i; };
  auto comparable = [&](uint32_t slot) {
    bool number = true;
    for (int u = 0; u < plan.views_used; ++u) number &= !isnan(scores[u * view_stride + slot]);
    return number;
  };
  const unsigned entries = static_cast<unsigned>(plan.K);
  Survivors survivors = {nullptr, slots, compact(entries, every_slot, comparable, slots, shared.select)};
  for (int s = 0; s < plan.stages; ++s) {
    const unsigned keep = static_cast<unsigned>(plan.keep[s]);
    if (keep >= survivors.count) continue;
    const int u = plan.view[s];
    survivors.scores = scores + u * view_stride;
    if (isnan(shared.low[u])) {
      float low, high;
      score_range(survivors, shared.select, &low, &high);
      if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
      __syncthreads();
    }
    const uint64_t last = kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
    auto listed = [&](unsigned i) { return slots[i]; };
    auto kept = [&](uint32_t slot) { return rank_of(survivors.scores[slot], slot) >= last; };
    survivors.count = compact(survivors.count, listed, kept, slots, shared.select);
    if (threadIdx.x == 0 && fabsf(score_of(last)) < INFINITY) shared.low[u] = score_of(last);
    __syncthreads();
  }
  return survivors.count;
}

// One block per query: all stages, then the survivors in the order of the last stage.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ Plan plan, const float* scores, uint32_t* survivors, uint64_t* ranking,
                  int64_t first_query, int64_t* indices, float* top_scores) {
  auto& shared = shared_memory<CascadeShared>();
  const int64_t b = blockIdx.x;
  scores += b * plan.row;
  survivors += b * plan.row;
  indices += (first_query + b) * plan.top_k;
  top_scores += (first_query + b) * plan.top_k;
  const unsigned count = run_stages(plan, scores, survivors, shared);

  const float* row = scores + plan.view[plan.stages - 1] * plan.chunk * plan.row;
  const bool in_shared = count <= kCandidates;
  uint64_t* ranks = in_shared ? shared.select.candidates : ranking + b * plan.ranking_row;
  for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) ranks[i] = rank_of(row[survivors[i]], survivors[i]);
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

template <typename T, int kThreadRows, int kThreadColumns>
const char* launch_scores(const Plan& plan, const cpr_cascade_args& args, int64_t first_query, int64_t chunk_queries,
                          float* scores, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.K, kTileLanes * kThreadColumns)),
                  static_cast<unsigned>(ceil_div(chunk_queries, kTileRows * kThreadRows)),
                  static_cast<unsigned>(plan.views_used));
  return launch<DotShared<kThreadRows, kThreadColumns>>(score_kernel<T, kThreadRows, kThreadColumns>, grid,
                                                        kTileThreads, stream, plan, static_cast<const T*>(args.queries),
                                                        static_cast<const T*>(args.memory), args.query_ids,
                                                        args.memory_ids, first_query, chunk_queries, scores);
}

template <typename T>
const char* run(const cpr_cascade_args& args, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  float* scores = static_cast<float*>(workspace);
  uint32_t* survivors = reinterpret_cast<uint32_t*>(scores + plan.views_used * plan.chunk * plan.row);
  uint64_t* ranking = reinterpret_cast<uint64_t*>(survivors + plan.chunk * plan.row);
  for (int64_t first = 0; first < plan.B; first += plan.chunk) {
    const int64_t queries = plan.B - first < plan.chunk ? plan.B - first : plan.chunk;
    // Few queries: small tiles, so that there are enough of them for every multiprocessor.
    const char* error = queries <= 32 ? launch_scores<T, 4, 4>(plan, args, first, queries, scores, stream)
                                      : launch_scores<T, 8, 8>(plan, args, first, queries, scores, stream);
    if (error != nullptr) return error;
    error = launch<CascadeShared>(select_kernel, dim3(static_cast<unsigned>(queries)), kSelectThreads, stream, plan,
                                  scores, survivors, ranking, first, args.indices, args.scores);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_cascade_select_cuda_workspace(const cpr_cascade_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  const cpr::Plan plan = cpr::plan_of(*args);
  return static_cast<size_t>(plan.chunk * cpr::bytes_per_query(plan));
}

extern "C" const char* cpr_cascade_select_cuda(const cpr_cascade_args* args, void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    return cpr::run<decltype(element)>(*args, workspace, static_cast<cudaStream_t>(stream));
  });
}
