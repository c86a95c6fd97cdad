// cascade_select on CUDA. A score is the same in every stage. One kernel therefore computes the scores of a chunk of
// queries against the memory, in every view that a stage compares; then one block for each query runs all stages on the
// rows of scores of its query. There are three routes, chosen by size:
//   on chip     The rows of a query fit the shared memory of a block. The survivors are bits in registers.
//   in cache    The rows of a chunk stay in the L2 cache. The survivors are a list.
//   refined     The rows are too long for both. Tensor cores compute approximate scores with a bound on their error.
//               Each stage computes the canonical scores of the entries within that bound of its threshold, and
//               uses them to decide.
// On the last two routes, long rows are sifted before (sift.cuh): one pass settles most entries for all stages.
//
// All routes are exact. The canonical score (float32 fused multiply-adds in the order of d) and the total order (score
// descending, slot ascending) define indices and scores, and the results have the same bits as those of the CPU. With
// CPR_APPROX_BF16 the scores are those that tensor cores compute of features rounded to bfloat16 (float16 features are
// not rounded), on one of the first two routes.
//
// Letters in shapes: B queries, V views, U views in use, K memory entries, D feature width, n stages.
#include "cpr_fast.h"
#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/stages.cuh"

namespace cpr {
namespace {

template <typename T>
const char* run_chunk(const Plan& plan, const Inputs<T>& in, bool approximate, int64_t first, int64_t queries,
                      const Chunk& chunk, cudaStream_t stream) {
  const char* error;
  if (plan.route == kRefined) {
    error = launch_tensor_scores<true>(plan, in, first, queries, chunk, stream);
  } else if (approximate) {
    error = launch_tensor_scores<false>(plan, in, first, queries, chunk, stream);
  } else if (queries <= 32) {  // small tiles, so that every multiprocessor gets at least one
    error = launch_scores<4, 4>(plan, in, first, queries, chunk, stream);
  } else {
    error = launch_scores<8, 8>(plan, in, first, queries, chunk, stream);
  }
  if (error == nullptr && plan.sifted) {
    error = plan.route == kRefined ? launch_sift<true>(plan, in.queries, first, queries, chunk, stream)
                                   : launch_sift<false>(plan, in.queries, first, queries, chunk, stream);
  }
  if (error != nullptr) return error;
  const dim3 blocks(static_cast<unsigned>(queries));
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  switch (plan.route) {
    case kOnChip:
      return launch_sized(select_on_chip_kernel, blocks, kSelectThreads, sizeof(CascadeShared) + rows, stream, plan,
                          chunk, first);
    case kInCache:
      return launch<CascadeShared>(select_kernel, blocks, kSelectThreads, stream, plan, chunk, first);
    default:
      return launch<CascadeShared>(select_refined_kernel<T>, blocks, kSelectThreads, stream, plan, chunk, in.queries,
                                   in.memory, first);
  }
}

template <typename T>
const char* run(const cpr_cascade_args& args, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  const int64_t entries = plan.chunk * plan.row;
  Chunk chunk = {};
  chunk.scores = static_cast<float*>(workspace);
  chunk.survivors = reinterpret_cast<uint32_t*>(chunk.scores + plan.views_used * entries);
  chunk.window = chunk.survivors + (plan.route == kOnChip ? 0 : entries);
  chunk.ranking = reinterpret_cast<uint64_t*>(chunk.window + (plan.route == kRefined ? entries : 0));
  chunk.sieves = reinterpret_cast<Sieve*>(chunk.ranking + plan.chunk * plan.ranking_row);
  chunk.key_squares = reinterpret_cast<unsigned*>(chunk.sieves + (plan.sifted ? plan.chunk : 0));
  chunk.indices = args.indices, chunk.top_scores = args.scores;
  if (plan.route == kRefined) {
    const cudaError_t status = cudaMemsetAsync(chunk.key_squares, 0, plan.views_used * sizeof(unsigned), stream);
    if (status != cudaSuccess) return error_text(status);
  }
  const Inputs<T> in = {static_cast<const T*>(args.queries), static_cast<const T*>(args.memory), args.query_ids,
                        args.memory_ids};
  for (int64_t first = 0; first < plan.B; first += plan.chunk) {
    const int64_t queries = plan.B - first < plan.chunk ? plan.B - first : plan.chunk;
    const char* error = run_chunk(plan, in, args.precision == CPR_APPROX_BF16, first, queries, chunk, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_cascade_select_cuda_workspace(const cpr_cascade_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  const cpr::Plan plan = cpr::plan_of(*args);
  return static_cast<size_t>(plan.chunk * cpr::bytes_per_query(plan)) + plan.views_used * sizeof(unsigned);
}

extern "C" const char* cpr_cascade_select_cuda(const cpr_cascade_args* args, void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  if (const char* error = cpr::check_workspace(workspace)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    return cpr::run<decltype(element)>(*args, workspace, static_cast<cudaStream_t>(stream));
  });
}
