// The gradient of mil_nce to the memory on the CPU: one pass over the memory, which computes the scores again. Letters
// as in forward.cpp.
#include "cpu/common/dispatch.h"
#include "cpu/mil_nce/chunk.h"

namespace cpr::CPR_VARIANT {
namespace {

template <class T>
struct GradJob : Queries<T> {
  const T* rows;  // [blocks * kBlock, width] queries times their grad_loss / temperature, zero beyond B and D
  int64_t width;  // D rounded up to whole vectors
  const T* lse_all;
  const T* lse_positive;
  T* grad_memory;
  const char* failure;  // every thread sets the same text
};

// Replaces products[k][lane] = entry . query by the softmax weight of entry k in the denominator minus that in the
// numerator; 0 beyond B.
template <class T>
void entry_weights(const GradJob<T>& job, int64_t block, int64_t count, const Membership& members, T* products) {
  const auto inverse_temperature = broadcast(static_cast<T>(1 / job.args.temperature));
  const int64_t queries = job.args.B - block * kBlock;
  T lse_all[kBlock], lse_positive[kBlock];
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    lse_all[lane] = lane < queries ? job.lse_all[block * kBlock + lane] : 0;
    lse_positive[lane] = lane < queries ? job.lse_positive[block * kBlock + lane] : 0;
  }
  for (int v = 0; v < kTileVectors; ++v) {
    const Mask16 valid = first_lanes(queries > v * 16 ? queries - v * 16 : 0);
    const auto all = load(lse_all + v * 16), positive = load(lse_positive + v * 16);
    for (int64_t k = 0; k < count; ++k) {
      T* at = products + k * kBlock + v * 16;
      const auto score = load(at) * inverse_temperature;
      auto weight = keep_lanes(members.all_present ? valid : valid & members.present[k][v], exp(score - all));
      if (members.positive[k][v]) {
        weight = weight - keep_lanes(valid & members.positive[k][v], exp(score - positive));
      }
      store(at, weight);
    }
  }
}

template <class T>
void grad_chunks(int64_t begin, int64_t end, void* context) {
  GradJob<T>& job = *static_cast<GradJob<T>*>(context);
  const cpr_mil_nce_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<T> scores(kChunk * kBlock), copy(kChunk * a.D), grad(kChunk * job.width);
  if (!scores.data || !copy.data || !grad.data) {
    job.failure = kNoMemory;
    return;
  }
  Membership members;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk, count = a.K - first < kChunk ? a.K - first : kChunk;
    const T* entries = chunk_entries(a, first, count, copy.data);
    for (int64_t i = 0; i < count * job.width; ++i) grad.data[i] = 0;
    for (int64_t block = 0; block < job.blocks; ++block) {
      find_members(a, block, first, count, members);
      multiply_chunk(job, block, entries, count, scores.data);
      entry_weights(job, block, count, members, scores.data);
      for (int64_t d = 0; d < job.width; d += 16) {
        tiles<1, true>(count, Operand<T>{scores.data, kBlock, 1}, job.rows + block * kBlock * job.width + d, job.width,
                       kBlock, grad.data + d, job.width);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t d = 0; d < a.D; ++d) job.grad_memory[(first + k) * a.D + d] = grad.data[k * job.width + d];
    }
  }
}

template <class T>
const char* grad_memory(const cpr_mil_nce_args& a, const void* grad_loss, const void* lse_all, const void* lse_positive,
                        void* out, cpr_parallel_for parallel) {
  const int64_t blocks = ceil_div(a.B, kBlock), width = ceil_div(a.D, 16) * 16;
  const Scratch<T> row(width), panels(blocks * a.D * kBlock), rows(blocks * kBlock * width);
  if (!row.data || !panels.data || !rows.data) return kNoMemory;
  GradJob<T> job{
      {a, blocks, panels.data}, rows.data, width, static_cast<const T*>(lse_all), static_cast<const T*>(lse_positive),
      static_cast<T*>(out),     nullptr};
  pack_queries(job, row.data);
  for (int64_t b = 0; b < blocks * kBlock; ++b) {
    const T scale = b < a.B ? static_cast<const T*>(grad_loss)[b] * static_cast<T>(1 / a.temperature) : 0;
    if (b < a.B) widen(a.query, a.dtype, b * a.D, a.D, row.data);
    for (int64_t d = 0; d < width; ++d) rows.data[b * width + d] = b < a.B && d < a.D ? row.data[d] * scale : 0;
  }
  parallel(ceil_div(a.K, kChunk), 1, grad_chunks<T>, &job);
  return job.failure;
}

}  // namespace

const char* mil_nce_grad_memory(const cpr_mil_nce_args* args, const void* grad_loss, const void* lse_all,
                                const void* lse_positive, void* out, cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? grad_memory<double>(*args, grad_loss, lse_all, lse_positive, out, parallel)
                                : grad_memory<float>(*args, grad_loss, lse_all, lse_positive, out, parallel);
}

}  // namespace cpr::CPR_VARIANT
