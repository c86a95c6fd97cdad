// The parts of the forward pass of mil_nce: the running softmax of a block of queries over a part of the memory, and
// the merge of the parts. Letters as in forward.cpp.
#pragma once

#include <math.h>

#include "cpu/mil_nce/chunk.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kSplit = 1024;  // the least number of memory entries in a part
constexpr int64_t kMaxSplits = 16;

template <class T>
constexpr T kLowest = static_cast<T>(-3.4028234663852886e38);  // finite, because kLowest - kLowest must be 0

// The running softmax of one block of queries over one part of the memory, relative to the greatest score `max`.
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
struct Job : Queries<T> {
  int64_t splits, chunks_per_split;
  T* all_parts;       // [blocks, splits] Part
  T* positive_parts;  // [blocks, splits] Part, or null where the memory holds no positives
  const cpr_mil_nce_outputs* outputs;
  const char* failure;  // every thread sets the same text
};

// Adds one entry to the running softmax over the positives of one query.
template <class T>
void add_positive(Part<T>& part, int64_t lane, T score, const T* entry, int64_t D) {
  T* weighted = part.weighted + lane * D;
  const T new_max = score > part.max[lane] ? score : part.max[lane];
  const T scale = exp_scalar(part.max[lane] - new_max), weight = exp_scalar(score - new_max);  // the scale is often 1
  part.max[lane] = new_max;
  part.sum[lane] = part.sum[lane] * scale + weight;
  for (int64_t d = 0; d < D; ++d) weighted[d] = weighted[d] * scale + weight * entry[d];
}

// Replaces the products [count, kBlock] of one vector of queries by exp(score - max), and rescales the sums of the part
// where the maximum rose. Lanes with an unchanged maximum are multiplied by exactly 1.
template <class T>
void online_softmax(Part<T>& part, int v, int64_t count, int64_t D, T inverse_temperature, const Membership& members,
                    T* products) {
  T* column = products + v * 16;
  const auto factor = broadcast(inverse_temperature), old_max = load(part.max + v * 16);
  auto new_max = old_max;
  for (int64_t k = 0; k < count; ++k) {
    const auto score = load(column + k * kBlock) * factor;
    store(column + k * kBlock, score);
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

// Adds the positives of a chunk to the running softmax over the positives of each query of a block, in slot order.
// products [kChunk, kBlock]: entry . query; rows without positives are not read.
template <class T>
void add_positives(Part<T>& part, const Membership& members, const T* entries, int64_t D, const T* products,
                   T inverse_temperature) {
  for (uint64_t rows = members.positive_rows; rows; rows &= rows - 1) {
    const int64_t k = __builtin_ctzll(rows);
    for (int v = 0; v < kTileVectors; ++v) {
      for (unsigned left = members.positive[k][v]; left; left &= left - 1) {
        const int64_t lane = v * 16 + __builtin_ctz(left);
        add_positive(part, lane, products[k * kBlock + lane] * inverse_temperature, entries + k * D, D);
      }
    }
  }
}

// Buffers of one thread.
template <class T>
struct ChunkBuffers {
  explicit ChunkBuffers(int64_t D) : scores(kChunk * kBlock), copy(kChunk * D) {}
  bool complete() const { return scores.data && copy.data; }
  const Scratch<T> scores, copy;
  Membership members;
};

// Calls use(block, first, count) for each chunk of part i of [blocks, splits], in order.
template <class T, class Use>
void for_chunks(const Job<T>& job, int64_t i, Use use) {
  const int64_t K = job.args.K, block = i / job.splits, first_chunk = i % job.splits * job.chunks_per_split;
  for (int64_t chunk = first_chunk; chunk < first_chunk + job.chunks_per_split; ++chunk) {
    const int64_t first = chunk * kChunk, count = K - first < kChunk ? K - first : kChunk;
    if (count <= 0) break;
    use(block, first, count);
  }
}

// Computes the softmax over all keys of part i of [blocks, splits]. Calls use_products(first, count, entries, products)
// for each chunk with the products entry . query [count, kBlock]; it may overwrite rows beyond `count`.
template <class T, class UseProducts>
void accumulate_keys(const Job<T>& job, int64_t i, ChunkBuffers<T>& buffers, UseProducts use_products) {
  const cpr_mil_nce_args& a = job.args;
  const T inverse_temperature = static_cast<T>(1 / a.temperature);
  T* const scores = buffers.scores.data;
  Part<T> all(job.all_parts + i * Part<T>::size(a.D));
  all.clear(a.D);
  for_chunks(job, i, [&](int64_t block, int64_t first, int64_t count) {
    const T* entries = chunk_entries(a, first, count, buffers.copy.data);
    find_members(a, block, first, count, buffers.members);
    multiply_chunk(job, block, entries, count, scores);
    use_products(first, count, entries, scores);
    for (int v = 0; v < kTileVectors; ++v) {
      online_softmax(all, v, count, a.D, inverse_temperature, buffers.members, scores);
    }
    tiles<kTileVectors, true>(a.D, Operand<T>{entries, 1, a.D}, scores, kBlock, count, all.weighted, kBlock);
  });
}

// Computes parts begin..end-1 of [splits, blocks].
template <class T>
void accumulate_parts(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const int64_t D = job.args.D;
  const T inverse_temperature = static_cast<T>(1 / job.args.temperature);
  const ExactArithmetic exact;
  ChunkBuffers<T> buffers(D);
  if (!buffers.complete()) {
    job.failure = kNoMemory;
    return;
  }
  for (int64_t n = begin; n < end; ++n) {
    // All blocks of a part of the memory in turn, because it then is in the second-level cache for all but the first.
    const int64_t i = n % job.blocks * job.splits + n / job.blocks;
    Part<T> positive(job.positive_parts ? job.positive_parts + i * Part<T>::size(D) : nullptr);
    if (job.positive_parts) positive.clear(D);
    accumulate_keys(job, i, buffers, [&](int64_t, int64_t, const T* entries, const T* products) {
      add_positives(positive, buffers.members, entries, D, products, inverse_temperature);
    });
  }
}

// The running softmax of one query over terms of (maximum, sum, weighted sum of keys).
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

// One group of sums of one query over one part of the memory: element d of `weighted` is `stride` elements after d - 1.
template <class T>
struct Term {
  T max, sum;
  const T* weighted;
  int64_t stride;
};

// Computes the products of R rows [R, D] with as many others. Each is one sum in the order of the dimensions, so that
// the latency of its additions is hidden only by the other sums.
template <int R, class T>
void multiply_rows(const T* rows, const T* others, int64_t D, T* products) {
  T sums[R] = {};
  for (int64_t d = 0; d < D; ++d) {
    for (int r = 0; r < R; ++r) sums[r] += rows[r * D + d] * others[r * D + d];
  }
  for (int r = 0; r < R; ++r) products[r] = sums[r];
}

// Merges the parts of one query in order, adds own_key and writes the outputs. own_product: query . own_key.
// all_keys(part) and positives(part) return the sums of a part as a Term; a part without positives has the sum 0.
template <class T, class AllKeys, class Positives>
void finish_query(const cpr_mil_nce_args& a, const cpr_mil_nce_outputs& outputs, int64_t b, int64_t parts,
                  T own_product, const T* own_key, Softmax<T> all, Softmax<T> positive, AllKeys all_keys,
                  Positives positives) {
  const int64_t D = a.D;
  bool has_other = false;
  for (int64_t d = 0; d < D; ++d) all.weighted[d] = positive.weighted[d] = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const Term<T> term = all_keys(part), listed = positives(part);
    all.add(term.max, term.sum, term.weighted, term.stride);
    if (listed.sum == 0) continue;  // it is 0 only if the part holds no positive
    has_other = true;
    positive.add(listed.max, listed.sum, listed.weighted, listed.stride);
  }
  const int64_t chosen = a.self_mode ? a.self_mode[b] : a.self_positive;
  const int64_t mode = has_other ? chosen : int64_t{CPR_SELF_KEEP};
  const T inverse_temperature = static_cast<T>(1 / a.temperature), own_score = own_product * inverse_temperature;
  if (mode != CPR_SELF_DROP_BOTH) all.add(own_score, 1, own_key, 1);
  if (mode == CPR_SELF_KEEP) positive.add(own_score, 1, own_key, 1);

  const T lse_all = all.logsumexp(), lse_positive = positive.logsumexp();
  const T in_all = mode != CPR_SELF_DROP_BOTH ? exp_scalar(own_score - lse_all) : 0;
  const T in_positive = mode == CPR_SELF_KEEP ? exp_scalar(own_score - lse_positive) : 0;
  static_cast<T*>(outputs.loss)[b] = lse_all - lse_positive;
  static_cast<T*>(outputs.lse_all)[b] = lse_all;
  static_cast<T*>(outputs.lse_positive)[b] = lse_positive;
  static_cast<T*>(outputs.own_coefficient)[b] = (in_all - in_positive) * inverse_temperature;
  T* grad = static_cast<T*>(outputs.grad_query) + b * D;
  const T all_scale = inverse_temperature / all.sum, positive_scale = inverse_temperature / positive.sum;
  for (int64_t d = 0; d < D; ++d) grad[d] = all.weighted[d] * all_scale - positive.weighted[d] * positive_scale;
}

// Finishes queries begin..end-1; all_keys(b, part) and positives(b, part) return the sums of a part. Returns nullptr,
// or why it failed.
template <class T, class AllKeys, class Positives>
const char* finish_range(const cpr_mil_nce_args& a, const cpr_mil_nce_outputs& outputs, int64_t begin, int64_t end,
                         int64_t parts, AllKeys all_keys, Positives positives) {
  constexpr int kRows = 4;  // whose own scores are computed together
  const ExactArithmetic exact;
  const Scratch<T> buffer((2 * kRows + 2) * a.D);
  if (!buffer.data) return kNoMemory;
  T *const queries = buffer.data, *const own_keys = queries + kRows * a.D;
  T *const all = own_keys + kRows * a.D, *const positive = all + a.D;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = end - first < kRows ? end - first : kRows;
    widen(a.query, a.dtype, first * a.D, count * a.D, queries);
    widen(a.own_key, a.dtype, first * a.D, count * a.D, own_keys);
    T own_products[kRows];
    if (count == kRows) multiply_rows<kRows>(queries, own_keys, a.D, own_products);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = first + r;
      const T* own_key = own_keys + r * a.D;
      if (count < kRows) multiply_rows<1>(queries + r * a.D, own_key, a.D, own_products + r);
      finish_query(
          a, outputs, b, parts, own_products[r], own_key, Softmax<T>{.weighted = all, .D = a.D},
          Softmax<T>{.weighted = positive, .D = a.D}, [&](int64_t part) { return all_keys(b, part); },
          [&](int64_t part) { return positives(b, part); });
    }
  }
  return nullptr;
}

template <class T>
void finish_queries(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const int64_t D = job.args.D;
  const auto offset = [&](int64_t b, int64_t split) { return (b / kBlock * job.splits + split) * Part<T>::size(D); };
  const auto all_keys = [&](int64_t b, int64_t split) {
    const Part<T> part(job.all_parts + offset(b, split));
    const int64_t lane = b % kBlock;
    return Term<T>{part.max[lane], part.sum[lane], part.weighted + lane, kBlock};
  };
  const auto positives = [&](int64_t b, int64_t split) {
    if (!job.positive_parts) return Term<T>{kLowest<T>, 0, nullptr, 1};
    const Part<T> part(job.positive_parts + offset(b, split));
    const int64_t lane = b % kBlock;
    return Term<T>{part.max[lane], part.sum[lane], part.weighted + lane * D, 1};
  };
  const char* failure = finish_range<T>(job.args, *job.outputs, begin, end, job.splits, all_keys, positives);
  if (failure != nullptr) job.failure = failure;
}

// Returns the number of chunks in a part of a memory of K entries.
int64_t chunks_per_part(int64_t K) {
  const int64_t wanted = ceil_div(K, kSplit) < kMaxSplits ? ceil_div(K, kSplit) : kMaxSplits;
  return ceil_div(ceil_div(K, kChunk), wanted);
}

// Allocates the buffers of a call, packs its queries and returns run(job).
template <class T, class Run>
const char* with_job(const cpr_mil_nce_args& a, const cpr_mil_nce_outputs* outputs, int64_t chunks_per_split, Run run) {
  const int64_t blocks = ceil_div(a.B, kBlock), splits = ceil_div(ceil_div(a.K, kChunk), chunks_per_split);
  const bool has_positives = (a.positives && a.P > 0) || (a.query_ids && a.same_id == CPR_SAME_POSITIVE);
  const int64_t part_elements = blocks * splits * Part<T>::size(a.D);
  const Scratch<T> row(a.D), panels(blocks * a.D * kBlock), all(part_elements),
      positive(has_positives ? part_elements : 0);
  if (!row.data || !panels.data || !all.data || !positive.data) return kNoMemory;
  Job<T> job{{a, blocks, panels.data},
             splits,
             chunks_per_split,
             all.data,
             has_positives ? positive.data : nullptr,
             outputs,
             nullptr};
  pack_queries(job, row.data);
  return run(job);
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
