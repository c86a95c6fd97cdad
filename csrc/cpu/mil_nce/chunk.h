// One chunk of the memory and one block of queries: which entries are in the sums of which query, and their scores.
// Shared by the forward pass and the gradient to the memory. Letters as in forward.cpp.
#pragma once

#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kChunk = 64;                 // memory entries in a chunk
constexpr int64_t kBlock = kTileVectors * 16;  // queries in a block
constexpr const char* kNoMemory = "mil_nce: out of memory";

// The arguments of a call and its queries, packed into panels of kBlock lanes.
template <class T>
struct Queries {
  const cpr_mil_nce_args& args;
  int64_t blocks;
  T* panels;  // [blocks, D, kBlock]
};

// Which entries of a chunk are in the sums of which query of a block; bit i of a mask stands for lane i.
struct Membership {
  bool all_present;                       // all entries are in the denominator, `present` is not filled
  bool none_positive;                     // none is in the numerator, `positive` is not filled
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

// Returns the entries of the chunk as T [count, D]: the memory itself if it has type T and no empty slot, otherwise a
// copy in which empty slots, whose content is undefined, are zero.
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

// Computes products[k][lane] = entry . query.
template <class T>
void multiply_chunk(const Queries<T>& job, int64_t block, const T* entries, int64_t count, T* products) {
  const int64_t D = job.args.D;
  tiles<kTileVectors, false>(count, Operand<T>{entries, D, 1}, job.panels + block * D * kBlock, kBlock, D, products,
                             kBlock);
}

// Replaces the products [count, kBlock] by scores.
template <class T>
void divide_by_temperature(const cpr_mil_nce_args& a, int64_t count, T* products) {
  const auto inverse_temperature = broadcast(static_cast<T>(1 / a.temperature));
  for (int64_t i = 0; i < count * kBlock; i += 16) store(products + i, load(products + i) * inverse_temperature);
}

template <class T>
void pack_queries(Queries<T>& job, T* row) {
  const cpr_mil_nce_args& a = job.args;
  for (int64_t block = 0; block < job.blocks; ++block) {
    pack_panel(a.query, a.dtype, block * kBlock, kBlock, a.B, a.D, row, job.panels + block * a.D * kBlock);
  }
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
