// cascade_select and mil_nce in one call on the CPU. If the cascade compares the queries of the loss with the memory of
// the loss, both need the same products entry . query: they are computed once, chunk by chunk, and become keys of the
// cascade and terms of the softmax over all keys while they are in the cache. One of the four matrix products is saved.
//
// A product is the same chain of multiply-adds in both operators, so indices and loss have the bits of two calls. The
// softmax over all keys does not depend on the selection: the cascade excludes empty slots and entries with the id of
// the query, so a selected slot is in the denominator whatever same_id says. The positives are added at the end.
//
// Letters in shapes: B queries, K memory entries, D width, P positives.
#include "cpu/cascade_select/blocks.h"
#include "cpu/common/dispatch.h"
#include "cpu/mil_nce/parts.h"

namespace cpr::CPR_VARIANT {
namespace {

static_assert(kKeyChunk == kChunk && kKeyBlock % kBlock == 0);

struct SharedJob {
  Job<float>& loss;
  const cpr_mil_nce_args& unlisted;  // the arguments of the loss without the positives, which are not known yet
  CascadeJob* cascade;
};

// Computes the softmax over all keys, and the keys of the cascade, of parts begin..end-1 of [blocks of the loss in the
// block of the cascade, splits].
void accumulate_shared(int64_t begin, int64_t end, void* context) {
  SharedJob& job = *static_cast<SharedJob*>(context);
  Job<float>& loss = job.loss;
  const CascadeJob& cascade = *job.cascade;
  const Job<float> unlisted{{job.unlisted, loss.blocks, loss.panels},
                            loss.splits,
                            loss.chunks_per_split,
                            loss.all_parts,
                            nullptr,
                            loss.outputs,
                            nullptr};
  const ExactArithmetic exact;
  ChunkBuffers<float> buffers(loss.args.D);
  if (!buffers.complete()) {
    loss.failure = kNoMemory;
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t lane = i / loss.splits * kBlock, first_part = cascade.block_begin / kBlock * loss.splits;
    int32_t* rows = cascade.rows + (cascade.elsewhere * kKeyBlock + lane) * cascade.row_stride;
    accumulate_keys(unlisted, first_part + i, buffers,
                    [&](int64_t first, int64_t count, const float*, float* products) {
                      store_keys<kTileVectors>(count, products, rows + first, cascade.row_stride);
                    });
  }
}

// Computes the softmax over the positives of parts begin..end-1 of [blocks, splits].
void accumulate_positives(int64_t begin, int64_t end, void* context) {
  Job<float>& job = *static_cast<Job<float>*>(context);
  const cpr_mil_nce_args& a = job.args;
  const float inverse_temperature = static_cast<float>(1 / a.temperature);
  const ExactArithmetic exact;
  ChunkBuffers<float> buffers(a.D);
  if (!buffers.complete()) {
    job.failure = kNoMemory;
    return;
  }
  Membership& members = buffers.members;
  for (int64_t i = begin; i < end; ++i) {
    Part<float> positive(job.positive_parts + i * Part<float>::size(a.D));
    positive.clear(a.D);
    for_chunks(job, i, [&](int64_t block, int64_t first, int64_t count) {
      find_members(a, block, first, count, members);
      if (!members.positive_rows) return;
      const float* entries = chunk_entries(a, first, count, buffers.copy.data);
      for (uint64_t rows = members.positive_rows; rows; rows &= rows - 1) {
        const int64_t k = __builtin_ctzll(rows);
        multiply_chunk(job, block, entries + k * a.D, 1, buffers.scores.data + k * kBlock);
      }
      add_positives(positive, members, entries, a.D, buffers.scores.data, inverse_temperature);
    });
  }
}

}  // namespace

const char* cascade_mil_nce(const cpr_cascade_args* cascade, const cpr_mil_nce_args* args, int64_t view,
                            const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  bool compared = false;
  for (int64_t s = 0; s < cascade->n; ++s) compared |= cascade->views[s] == view;
  if (!compared) {
    const char* failure = cascade_select(cascade, parallel);
    return failure ? failure : mil_nce_forward(args, outputs, parallel);
  }
  cpr_mil_nce_args unlisted = *args;
  unlisted.positives = nullptr;
  unlisted.P = 0;
  return with_job<float>(*args, outputs, chunks_per_part(args->K), [&](Job<float>& job) -> const char* {
    SharedJob shared{job, unlisted, nullptr};
    const char* failure = select_blocks(*cascade, parallel, view, [&](CascadeJob& block) {
      shared.cascade = &block;
      parallel(ceil_div(block.block_size, kBlock) * job.splits, 1, accumulate_shared, &shared);
      return job.failure;
    });
    if (failure != nullptr) return failure;
    parallel(job.blocks * job.splits, 1, accumulate_positives, &job);
    if (job.failure == nullptr) parallel(args->B, 8, finish_queries<float>, &job);
    return job.failure;
  });
}

}  // namespace cpr::CPR_VARIANT
