// mil_nce on the CPU: the loss as attention whose values are the keys. One pass over the memory gives, per query, the
// softmax-weighted sum of the keys and the logsumexp, of all keys and of the positives; the gradient to the query is
// their difference, so the backward never reads the memory again.
//
// Queries lie in the SIMD lanes, memory values are broadcast. The memory is cut into at most kMaxSplits parts, a
// function of K alone, and the parts are merged in order: results depend on neither threads nor batch.
//
// Letters: B queries, K memory entries, D width, P positives.
#include <math.h>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kChunk = 64;    // memory entries at a time
constexpr int64_t kSplit = 1024;  // fewest memory entries of a part
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kBlock = kTileVectors * 16;  // queries at a time
constexpr const char* kNoMemory = "mil_nce: out of memory";

template <class T>
constexpr T kLowest = static_cast<T>(-3.4028234663852886e38);  // finite, so that kLowest - kLowest is 0

// What one part of the memory says about one block of queries: softmax numerators relative to `max`.
template <class T>
struct Part {
  T* max;       // [kBlock]
  T* sum;       // [kBlock] sum of exp(score - max)
  T* weighted;  // all keys: [D, kBlock]; positives: [kBlock, D]. Sum of exp(score - max) * key

  static int64_t size(int64_t D) { return kBlock * (D + 2); }
  Part(T* data) : max(data), sum(data + kBlock), weighted(data + 2 * kBlock) {}
  void clear(int64_t D) {
    for (int64_t i = 0; i < kBlock; ++i) max[i] = kLowest<T>;
    for (int64_t i = 0; i < kBlock * (D + 1); ++i) sum[i] = 0;
  }
};

template <class T>
struct Job {
  const cpr_mil_nce_args& args;
  int64_t blocks, splits, chunks_per_split;
  T* panels;          // [blocks, D, kBlock] queries
  T* all_parts;       // [blocks, splits] Part
  T* positive_parts;  // [blocks, splits] Part, or null where the memory holds no positives
  const cpr_mil_nce_outputs* outputs;
  const char* failure;  // the same text whichever thread sets it
};

// ---- one chunk of the memory against one block of queries ------------------------------------------------

// Which entries of a chunk count for which query of a block; bit = lane.
struct Membership {
  bool all_present;                       // all entries are in the denominator: `present` is not filled
  bool none_positive;                     // none is in the numerator: `positive` is not filled
  Mask16 present[kChunk][kTileVectors];   // in the denominator
  Mask16 positive[kChunk][kTileVectors];  // in the numerator
};

void find_members(const cpr_mil_nce_args& a, int64_t block, int64_t chunk_begin, int64_t count, Membership& members) {
  const int64_t first_query = block * kBlock;
  const int64_t queries = a.B - first_query < kBlock ? a.B - first_query : kBlock;
  const int64_t* slots = a.positives + first_query * a.P;
  uint64_t listed = 0;
  for (int64_t i = 0; i < queries * a.P; ++i) {
    listed |= static_cast<uint64_t>(slots[i] - chunk_begin) < static_cast<uint64_t>(count);
  }
  members.all_present = !a.memory_ids;
  members.none_positive = !listed && !(a.query_ids && a.same_id == CPR_SAME_POSITIVE);
  if (members.all_present && members.none_positive) return;

  int64_t ids[kBlock];
  for (int64_t lane = 0; lane < kBlock; ++lane)
    ids[lane] = a.query_ids && lane < queries ? a.query_ids[first_query + lane] : -1;
  for (int64_t k = 0; k < count; ++k) {
    const bool empty = a.memory_ids && a.memory_ids[chunk_begin + k] == -1;
    for (int v = 0; v < kTileVectors; ++v) {
      members.positive[k][v] = 0;
      if (members.all_present) continue;
      members.present[k][v] = empty ? 0 : kAllLanes;
      if (empty || !a.query_ids || a.same_id == CPR_SAME_NEGATIVE) continue;
      const Mask16 same = equal_ids(ids + v * 16, a.memory_ids[chunk_begin + k]);
      if (a.same_id == CPR_SAME_POSITIVE) members.positive[k][v] = same;
      if (a.same_id == CPR_SAME_IGNORE) members.present[k][v] = static_cast<Mask16>(~same);
    }
  }
  for (int64_t i = 0; listed && i < queries * a.P; ++i) {  // a listed slot overrides same_id, and counts once
    const int64_t k = slots[i] - chunk_begin, lane = i / a.P;
    if (k < 0 || k >= count || (a.memory_ids && a.memory_ids[slots[i]] == -1)) continue;
    if (!members.all_present) members.present[k][lane / 16] |= static_cast<Mask16>(1u << lane % 16);
    members.positive[k][lane / 16] |= static_cast<Mask16>(1u << lane % 16);
  }
}

// The chunk's entries as T [count, D]: in place where the memory is dense T, else a copy in which empty slots, which
// may hold anything, are zero.
template <class T>
const T* chunk_entries(const cpr_mil_nce_args& a, int64_t begin, int64_t count, T* copy) {
  bool empty = false;
  for (int64_t k = 0; a.memory_ids && k < count; ++k) empty |= a.memory_ids[begin + k] == -1;
  if (!empty && element_size(a.dtype) == sizeof(T)) return static_cast<const T*>(a.memory) + begin * a.D;
  widen(a.memory, a.dtype, begin * a.D, count * a.D, copy);
  for (int64_t k = 0; empty && k < count; ++k) {
    for (int64_t d = 0; a.memory_ids[begin + k] == -1 && d < a.D; ++d) copy[k * a.D + d] = 0;
  }
  return copy;
}

// Adds one entry to the running softmax of one query's positives.
template <class T>
void add_positive(Part<T>& part, int64_t lane, T score, const T* entry, int64_t D) {
  T* weighted = part.weighted + lane * D;
  if (score > part.max[lane]) {
    const T scale = exp_scalar(part.max[lane] - score);
    part.max[lane] = score;
    part.sum[lane] *= scale;
    for (int64_t d = 0; d < D; ++d) weighted[d] *= scale;
  }
  const T weight = exp_scalar(score - part.max[lane]);
  part.sum[lane] += weight;
  for (int64_t d = 0; d < D; ++d) weighted[d] += weight * entry[d];
}

// Turns the chunk's scores [count, kBlock] of one vector of queries into softmax numerators, and rescales what the
// part holds where the maximum rose. Lanes whose maximum stays are multiplied by exactly 1.
template <class T>
void online_softmax(Part<T>& part, int v, int64_t count, int64_t D, const Membership& members, T* scores) {
  T* column = scores + v * 16;
  const auto old_max = load(part.max + v * 16);
  auto new_max = old_max;
  for (int64_t k = 0; k < count; ++k) {
    const auto score = load(column + k * kBlock);
    const auto raised = max(new_max, score);
    new_max = members.all_present ? raised : select(members.present[k][v], raised, new_max);
  }
  auto sum = load(part.sum + v * 16);
  if (less(old_max, new_max)) {
    const auto scale = exp(old_max - new_max);
    store(part.max + v * 16, new_max);
    sum = sum * scale;
    for (int64_t d = 0; d < D; ++d) {
      T* weighted = part.weighted + d * kBlock + v * 16;
      store(weighted, load(weighted) * scale);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    auto weight = exp(load(column + k * kBlock) - new_max);
    if (!members.all_present) weight = keep_lanes(members.present[k][v], weight);
    sum = sum + weight;
    store(column + k * kBlock, weight);
  }
  store(part.sum + v * 16, sum);
}

// scores[k][lane] = entry . query / temperature.
template <class T>
void score_chunk(const Job<T>& job, int64_t block, const T* entries, int64_t count, T* scores) {
  const int64_t D = job.args.D;
  tiles<kTileVectors, false>(count, Operand<T>{entries, D, 1}, job.panels + block * D * kBlock, kBlock, D, scores,
                             kBlock);
  const auto inverse_temperature = broadcast(static_cast<T>(1 / job.args.temperature));
  for (int64_t i = 0; i < count * kBlock; i += 16) store(scores + i, load(scores + i) * inverse_temperature);
}

// ---- forward -----------------------------------------------------------------------------------------------

// Parts [begin, end) of [blocks, splits].
template <class T>
void accumulate_parts(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const cpr_mil_nce_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<T> scores(kChunk * kBlock), copy(kChunk * a.D);
  if (!scores.data || !copy.data) {
    job.failure = kNoMemory;
    return;
  }
  Membership members;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i / job.splits, first_chunk = i % job.splits * job.chunks_per_split;
    Part<T> all(job.all_parts + i * Part<T>::size(a.D));
    Part<T> positive(job.positive_parts ? job.positive_parts + i * Part<T>::size(a.D) : nullptr);
    all.clear(a.D);
    if (job.positive_parts) positive.clear(a.D);
    for (int64_t chunk = first_chunk; chunk < first_chunk + job.chunks_per_split; ++chunk) {
      const int64_t first = chunk * kChunk, count = a.K - first < kChunk ? a.K - first : kChunk;
      if (count <= 0) break;
      const T* entries = chunk_entries(a, first, count, copy.data);
      find_members(a, block, first, count, members);
      score_chunk(job, block, entries, count, scores.data);
      for (int64_t k = 0; !members.none_positive && k < count; ++k) {
        for (int v = 0; v < kTileVectors; ++v) {
          for (unsigned left = members.positive[k][v]; left; left &= left - 1) {
            const int64_t lane = v * 16 + __builtin_ctz(left);
            add_positive(positive, lane, scores.data[k * kBlock + lane], entries + k * a.D, a.D);
          }
        }
      }
      for (int v = 0; v < kTileVectors; ++v) online_softmax(all, v, count, a.D, members, scores.data);
      tiles<kTileVectors, true>(a.D, Operand<T>{entries, 1, a.D}, scores.data, kBlock, count, all.weighted, kBlock);
    }
  }
}

// A running softmax of one query over (maximum, sum, weighted sum of keys) terms.
template <class T>
struct Softmax {
  T max = kLowest<T>, sum = 0;
  T* weighted;  // [D]
  int64_t D;

  void add(T term_max, T term_sum, const T* term_weighted, int64_t stride) {
    const T new_max = term_max > max ? term_max : max;
    const T scale = exp_scalar(max - new_max), term_scale = exp_scalar(term_max - new_max);
    max = new_max;
    sum = sum * scale + term_sum * term_scale;
    for (int64_t d = 0; d < D; ++d) weighted[d] = weighted[d] * scale + term_weighted[d * stride] * term_scale;
  }
  T logsumexp() const { return max + static_cast<T>(log(static_cast<double>(sum))); }
};

// Merges the parts of one query, adds own_key and writes the outputs.
template <class T>
void finish_query(const Job<T>& job, int64_t b, const T* query, const T* own_key, Softmax<T> all, Softmax<T> positive) {
  const cpr_mil_nce_args& a = job.args;
  const int64_t block = b / kBlock, lane = b % kBlock, D = a.D;
  bool has_other = false;
  for (int64_t d = 0; d < D; ++d) all.weighted[d] = positive.weighted[d] = 0;
  for (int64_t split = 0; split < job.splits; ++split) {
    const int64_t offset = (block * job.splits + split) * Part<T>::size(D);
    const Part<T> part(job.all_parts + offset);
    all.add(part.max[lane], part.sum[lane], part.weighted + lane, kBlock);
    if (!job.positive_parts) continue;
    const Part<T> listed(job.positive_parts + offset);
    if (listed.sum[lane] == 0) continue;  // exactly 0 only if the part holds no positive
    has_other = true;
    positive.add(listed.max[lane], listed.sum[lane], listed.weighted + lane * D, 1);
  }
  const int64_t chosen = a.self_mode ? a.self_mode[b] : a.self_positive;
  const int64_t mode = has_other ? chosen : int64_t{CPR_SELF_KEEP};
  T own_score = 0;
  for (int64_t d = 0; d < D; ++d) own_score += query[d] * own_key[d];
  own_score *= static_cast<T>(1 / a.temperature);
  if (mode != CPR_SELF_DROP_BOTH) all.add(own_score, 1, own_key, 1);
  if (mode == CPR_SELF_KEEP) positive.add(own_score, 1, own_key, 1);

  const T lse_all = all.logsumexp(), lse_positive = positive.logsumexp();
  const T in_all = mode != CPR_SELF_DROP_BOTH ? exp_scalar(own_score - lse_all) : 0;
  const T in_positive = mode == CPR_SELF_KEEP ? exp_scalar(own_score - lse_positive) : 0;
  const T inverse_temperature = static_cast<T>(1 / a.temperature);
  static_cast<T*>(job.outputs->loss)[b] = lse_all - lse_positive;
  static_cast<T*>(job.outputs->lse_all)[b] = lse_all;
  static_cast<T*>(job.outputs->lse_positive)[b] = lse_positive;
  static_cast<T*>(job.outputs->own_coefficient)[b] = (in_all - in_positive) * inverse_temperature;
  T* grad = static_cast<T*>(job.outputs->grad_query) + b * D;
  const T all_scale = inverse_temperature / all.sum, positive_scale = inverse_temperature / positive.sum;
  for (int64_t d = 0; d < D; ++d) grad[d] = all.weighted[d] * all_scale - positive.weighted[d] * positive_scale;
}

template <class T>
void finish_queries(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const cpr_mil_nce_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<T> query(a.D), own_key(a.D), all(a.D), positive(a.D);
  if (!query.data || !own_key.data || !all.data || !positive.data) {
    job.failure = kNoMemory;
    return;
  }
  for (int64_t b = begin; b < end; ++b) {
    widen(a.query, a.dtype, b * a.D, a.D, query.data);
    widen(a.own_key, a.dtype, b * a.D, a.D, own_key.data);
    finish_query(job, b, query.data, own_key.data, Softmax<T>{.weighted = all.data, .D = a.D},
                 Softmax<T>{.weighted = positive.data, .D = a.D});
  }
}

template <class T>
void pack_queries(Job<T>& job, T* row) {
  const cpr_mil_nce_args& a = job.args;
  for (int64_t block = 0; block < job.blocks; ++block) {
    pack_panel(a.query, a.dtype, block * kBlock, kBlock, a.B, a.D, row, job.panels + block * a.D * kBlock);
  }
}

template <class T>
const char* forward(const cpr_mil_nce_args& a, const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  const int64_t blocks = ceil_div(a.B, kBlock), chunks = ceil_div(a.K, kChunk);
  const int64_t wanted = ceil_div(a.K, kSplit) < kMaxSplits ? ceil_div(a.K, kSplit) : kMaxSplits;
  const int64_t chunks_per_split = ceil_div(chunks, wanted), splits = ceil_div(chunks, chunks_per_split);
  const bool has_positives = (a.positives && a.P > 0) || (a.query_ids && a.same_id == CPR_SAME_POSITIVE);
  const int64_t part_elements = blocks * splits * Part<T>::size(a.D);
  const Scratch<T> row(a.D), panels(blocks * a.D * kBlock), all(part_elements),
      positive(has_positives ? part_elements : 0);
  if (!row.data || !panels.data || !all.data || !positive.data) return kNoMemory;
  Job<T> job{a,       blocks, splits, chunks_per_split, panels.data, all.data, has_positives ? positive.data : nullptr,
             outputs, nullptr};
  pack_queries(job, row.data);
  parallel(blocks * splits, 1, accumulate_parts<T>, &job);
  if (job.failure == nullptr) parallel(a.B, 8, finish_queries<T>, &job);
  return job.failure;
}

// ---- gradient to the memory ----------------------------------------------------------------------------------

template <class T>
struct GradJob {
  Job<T> forward;
  const T* rows;  // [blocks * kBlock, width] queries times their grad_loss / temperature, zero beyond B and D
  int64_t width;  // D rounded up to whole vectors
  const T* lse_all;
  const T* lse_positive;
  T* grad_memory;
};

// scores[k][lane] becomes the share of entry k in the denominator minus its share in the numerator; 0 beyond B.
template <class T>
void entry_weights(const GradJob<T>& job, int64_t block, int64_t count, const Membership& members, T* scores) {
  const int64_t queries = job.forward.args.B - block * kBlock;
  T lse_all[kBlock], lse_positive[kBlock];
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    lse_all[lane] = lane < queries ? job.lse_all[block * kBlock + lane] : 0;
    lse_positive[lane] = lane < queries ? job.lse_positive[block * kBlock + lane] : 0;
  }
  for (int v = 0; v < kTileVectors; ++v) {
    const Mask16 valid = first_lanes(queries > v * 16 ? queries - v * 16 : 0);
    const auto all = load(lse_all + v * 16), positive = load(lse_positive + v * 16);
    for (int64_t k = 0; k < count; ++k) {
      T* at = scores + k * kBlock + v * 16;
      const auto score = load(at);
      auto weight = keep_lanes(members.all_present ? valid : valid & members.present[k][v], exp(score - all));
      if (!members.none_positive && members.positive[k][v]) {
        weight = weight - keep_lanes(valid & members.positive[k][v], exp(score - positive));
      }
      store(at, weight);
    }
  }
}

template <class T>
void grad_chunks(int64_t begin, int64_t end, void* context) {
  GradJob<T>& job = *static_cast<GradJob<T>*>(context);
  const cpr_mil_nce_args& a = job.forward.args;
  const ExactArithmetic exact;
  const Scratch<T> scores(kChunk * kBlock), copy(kChunk * a.D), grad(kChunk * job.width);
  if (!scores.data || !copy.data || !grad.data) {
    job.forward.failure = kNoMemory;
    return;
  }
  Membership members;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk, count = a.K - first < kChunk ? a.K - first : kChunk;
    const T* entries = chunk_entries(a, first, count, copy.data);
    for (int64_t i = 0; i < count * job.width; ++i) grad.data[i] = 0;
    for (int64_t block = 0; block < job.forward.blocks; ++block) {
      find_members(a, block, first, count, members);
      score_chunk(job.forward, block, entries, count, scores.data);
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
  GradJob<T> job{{a, blocks, 1, 0, panels.data, nullptr, nullptr, nullptr, nullptr},
                 rows.data,
                 width,
                 static_cast<const T*>(lse_all),
                 static_cast<const T*>(lse_positive),
                 static_cast<T*>(out)};
  pack_queries(job.forward, row.data);
  for (int64_t b = 0; b < blocks * kBlock; ++b) {
    const T scale = b < a.B ? static_cast<const T*>(grad_loss)[b] * static_cast<T>(1 / a.temperature) : 0;
    if (b < a.B) widen(a.query, a.dtype, b * a.D, a.D, row.data);
    for (int64_t d = 0; d < width; ++d) rows.data[b * width + d] = b < a.B && d < a.D ? row.data[d] * scale : 0;
  }
  parallel(ceil_div(a.K, kChunk), 1, grad_chunks<T>, &job);
  return job.forward.failure;
}

}  // namespace

const char* mil_nce_forward(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                            cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? forward<double>(*args, outputs, parallel) : forward<float>(*args, outputs, parallel);
}

const char* mil_nce_grad_memory(const cpr_mil_nce_args* args, const void* grad_loss, const void* lse_all,
                                const void* lse_positive, void* out, cpr_parallel_for parallel) {
  return args->dtype == CPR_F64 ? grad_memory<double>(*args, grad_loss, lse_all, lse_positive, out, parallel)
                                : grad_memory<float>(*args, grad_loss, lse_all, lse_positive, out, parallel);
}

}  // namespace cpr::CPR_VARIANT
