// The forward pass of mil_nce on the CPU. The loss is computed like attention whose values are the keys: one pass over
// the memory gives for each query the logsumexp and the softmax-weighted sum of the keys, once over all keys and once
// over the positives. The gradient to the query is the difference of the two sums, so the backward pass does not read
// the memory.
//
// Each SIMD lane holds one query and memory values are broadcast. The memory is divided into at most kMaxSplits parts,
// which depend only on K and are merged in order: results depend neither on the number of threads nor on the batch.
//
// Letters in shapes: B queries, K memory entries, D width, P positives.
#include "cpu/common/dispatch.h"
#include "cpu/mil_nce/parts.h"

namespace cpr::CPR_VARIANT {
namespace {

template <class T>
const char* forward(const cpr_mil_nce_args& a, const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  return with_job<T>(a, outputs, chunks_per_part(a.K), [&](Job<T>& job) {
    parallel(job.blocks * job.splits, 1, accumulate_parts<T>, &job);
    if (job.failure == nullptr) parallel(a.B, 8, finish_queries<T>, &job);
    return job.failure;
  });
}

}  // namespace

const char* mil_nce_forward(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                            cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? forward<double>(*args, outputs, parallel) : forward<float>(*args, outputs, parallel);
}

}  // namespace cpr::CPR_VARIANT
