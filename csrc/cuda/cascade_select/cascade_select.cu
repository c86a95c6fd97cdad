// cascade_select on CUDA. A score is the same in every stage. There are three routes, chosen by size:
//   on chip     One kernel computes the scores of a chunk of queries against the memory, in every view that a stage
//               compares. Then one block for each query runs all stages on its rows of scores, which fit its shared
//               memory. The survivors are bits in registers; once they are few, each thread has up to eight, then one.
//   in cache    The same, with rows that stay in the L2 cache, or in global memory. The survivors are a list.
//   streamed    For longer rows, of up to two views, eight stages and 4,096 features: scores of a sample of the memory
//               give limits for the threshold of each stage (sieve.cuh). One pass over the memory computes scores on
//               tensor cores, counts the entries that the limits settle, and writes only the others (stream.cuh). The
//               stages run on those, and compute the canonical scores of the entries within the error of a threshold.
//               What a stage compares is in shared memory where it fits.
//
// All routes are exact. The canonical score (float32 fused multiply-adds in the order of d) and the total order (score
// descending, slot ascending) define indices and scores, and the results have the same bits as those of the CPU. With
// CPR_APPROX_BF16 the scores are those that tensor cores compute of features rounded to bfloat16 (float16 features are
// not rounded).
//
// Letters in shapes: B queries, V views, U views in use, K memory entries, D feature width, n stages.
#include "cpr_fast.h"
#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/sieve.cuh"
#include "cuda/cascade_select/stages.cuh"
#include "cuda/cascade_select/stream.cuh"
#include "cuda/cascade_select/streamed_stages.cuh"

namespace cpr {
namespace {

// Selects for a chunk of queries on a route with rows of scores.
template <typename T>
const char* run_on_rows(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                        cudaStream_t stream) {
  const char* error;
  if (!plan.exact) {
    error = launch_tensor_scores<false, false>(plan, in, first, queries, chunk, stream);
  } else if (queries <= 32) {
    error = launch_scores_of_few(plan, in, first, queries, chunk, stream);
  } else {
    error = launch_scores<8, 8>(plan, in, first, queries, chunk, stream);
  }
  if (error != nullptr) return error;
  const dim3 blocks(static_cast<unsigned>(queries));
  if (plan.route == kInCache)
    return launch<CascadeShared>(select_kernel, blocks, kSelectThreads, stream, plan, chunk, first);
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  return launch_sized(select_on_chip_kernel, blocks, kSelectThreads, sizeof(CascadeShared) + rows, stream, plan, chunk,
                      first);
}

// Selects for a chunk of queries on the streamed route, with scores in tiles of this kind.
template <bool kExact, typename Tile, typename T>
const char* run_streamed_in(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                            cudaStream_t stream) {
  const char* error = nullptr;
  if (plan.sifted) error = launch_tensor_scores<true, kExact, Tile>(plan, in, first, queries, chunk, stream);
  if (error == nullptr) error = launch_sieve(plan, queries, chunk, stream);
  if (error == nullptr) error = launch_stream<kExact, Tile>(plan, in, first, queries, chunk, stream);
  return error != nullptr ? error : launch_streamed_stages<kExact>(plan, in, first, queries, chunk, stream);
}

template <bool kExact, typename T>
const char* run_streamed(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                         cudaStream_t stream) {
  return queries <= TileOfFew::kQueries ? run_streamed_in<kExact, TileOfFew>(plan, in, first, queries, chunk, stream)
                                        : run_streamed_in<kExact, LargeTile>(plan, in, first, queries, chunk, stream);
}

template <typename T>
const char* run(const cpr_cascade_args& args, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  Workspace memory = {reinterpret_cast<uintptr_t>(workspace)};
  Chunk chunk = chunk_in(plan, memory);
  chunk.indices = args.indices, chunk.top_scores = args.scores;
  const Inputs<T> in = {static_cast<const T*>(args.queries), static_cast<const T*>(args.memory), args.query_ids,
                        args.memory_ids};
  if (plan.route == kStreamed && plan.exact) {
    const cudaError_t status = cudaMemsetAsync(chunk.key_squares, 0, plan.views_used * sizeof(unsigned), stream);
    if (status != cudaSuccess) return error_text(status);
  }
  for (int64_t first = 0; first < plan.B; first += plan.chunk) {
    const int64_t queries = plan.B - first < plan.chunk ? plan.B - first : plan.chunk;
    const char* error = plan.route != kStreamed ? run_on_rows(plan, in, first, queries, chunk, stream)
                        : plan.exact            ? run_streamed<true>(plan, in, first, queries, chunk, stream)
                                                : run_streamed<false>(plan, in, first, queries, chunk, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_cascade_select_cuda_workspace(const cpr_cascade_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  const cpr::Plan plan = cpr::plan_of(*args);
  cpr::Workspace memory = {0};
  cpr::chunk_in(plan, memory);
  return static_cast<size_t>(memory.at);
}

extern "C" const char* cpr_cascade_select_cuda(const cpr_cascade_args* args, void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  if (const char* error = cpr::check_workspace(workspace)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    return cpr::run<decltype(element)>(*args, workspace, static_cast<cudaStream_t>(stream));
  });
}
