// The sums of mil_nce over parts of a memory, and their merge: the forward pass in two calls, between which the parts
// of a memory that is divided among processes are exchanged. Both calls contain the arithmetic of forward.cpp, so that
// the merge of all parts has the bits of one call over the whole memory.
//
// Letters in shapes: B queries, K memory entries, D width, P positives, S parts.
#include "cpu/common/dispatch.h"
#include "cpu/mil_nce/parts.h"

namespace cpr::CPR_VARIANT {
namespace {

static_assert(kChunk == CPR_PART_MULTIPLE);

template <class T>
struct CopyJob {
  const Job<T>& job;
  T* partials;  // [S, B, 2, 2 + D]
};

// Copies the sums of queries begin..end-1, which lie block by block, to the rows of the result.
template <class T>
void copy_parts(int64_t begin, int64_t end, void* context) {
  const CopyJob<T>& copy = *static_cast<CopyJob<T>*>(context);
  const Job<T>& job = copy.job;
  const int64_t B = job.args.B, D = job.args.D;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t lane = b % kBlock;
    for (int64_t split = 0; split < job.splits; ++split) {
      const int64_t offset = (b / kBlock * job.splits + split) * Part<T>::size(D);
      const Part<T> all(job.all_parts + offset);
      T* row = copy.partials + (split * B + b) * 2 * (D + 2);
      row[0] = all.max[lane];
      row[1] = all.sum[lane];
      for (int64_t d = 0; d < D; ++d) row[2 + d] = all.weighted[d * kBlock + lane];
      row += D + 2;
      row[0] = kLowest<T>;
      for (int64_t d = 0; d < D + 1; ++d) row[1 + d] = 0;
      if (!job.positive_parts) continue;
      const Part<T> positive(job.positive_parts + offset);
      row[0] = positive.max[lane];
      row[1] = positive.sum[lane];
      for (int64_t d = 0; d < D; ++d) row[2 + d] = positive.weighted[lane * D + d];
    }
  }
}

template <class T>
const char* partial(const cpr_mil_nce_args& a, int64_t entries, void* partials, cpr_parallel_for parallel) {
  return with_job<T>(a, nullptr, entries / kChunk, [&](Job<T>& job) {
    parallel(job.blocks * job.splits, 1, accumulate_parts<T>, &job);
    CopyJob<T> copy{job, static_cast<T*>(partials)};
    if (job.failure == nullptr) parallel(a.B, 8, copy_parts<T>, &copy);
    return job.failure;
  });
}

template <class T>
struct MergeJob {
  const cpr_mil_nce_args& args;
  const T* partials;  // [S, B, 2, 2 + D]
  int64_t S;
  const cpr_mil_nce_outputs& outputs;
  const char* failure;  // every thread sets the same text
};

template <class T>
void merge_queries(int64_t begin, int64_t end, void* context) {
  MergeJob<T>& job = *static_cast<MergeJob<T>*>(context);
  const int64_t B = job.args.B, D = job.args.D;
  const auto term = [&](int64_t b, int64_t part, int64_t group) {
    const T* row = job.partials + ((part * B + b) * 2 + group) * (D + 2);
    return Term<T>{row[0], row[1], row + 2, 1};
  };
  const char* failure = finish_range<T>(
      job.args, job.outputs, begin, end, job.S, [&](int64_t b, int64_t part) { return term(b, part, 0); },
      [&](int64_t b, int64_t part) { return term(b, part, 1); });
  if (failure != nullptr) job.failure = failure;
}

template <class T>
const char* merge(const cpr_mil_nce_args& a, const void* partials, int64_t S, const cpr_mil_nce_outputs* outputs,
                  cpr_parallel_for parallel) {
  MergeJob<T> job{a, static_cast<const T*>(partials), S, *outputs, nullptr};
  parallel(a.B, 8, merge_queries<T>, &job);
  return job.failure;
}

}  // namespace

int64_t mil_nce_part_entries(int64_t K) { return chunks_per_part(K) * kChunk; }

const char* mil_nce_partial(const cpr_mil_nce_args* args, int64_t entries, void* partials, cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? partial<double>(*args, entries, partials, parallel)
                                : partial<float>(*args, entries, partials, parallel);
}

const char* mil_nce_merge(const cpr_mil_nce_args* args, const void* partials, int64_t S,
                          const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? merge<double>(*args, partials, S, outputs, parallel)
                                : merge<float>(*args, partials, S, outputs, parallel);
}

}  // namespace cpr::CPR_VARIANT
