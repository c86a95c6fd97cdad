// One chunk of the memory and one block of queries: which entries are in the sums of which query, and their scores.
// Shared by the forward pass and the gradient to the memory. Letters as in forward.cpp.
#pragma once

#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kChunk = 64;                 // memory entries in a chunk: a bit each in a word
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
  uint64_t positive_rows;                 // bit k: entry k is in the numerator of a query
  Mask16 present[kChunk][kTileVectors];   // in the denominator
  Mask16 positive[kChunk][kTileVectors];  // in the numerator
};

void find_members(const cpr_mil_nce_args& a, int64_t block, int64_t chunk_begin, int64_t count, Membership& members) {
  const int64_t first_query = block * kBlock;
  const int64_t queries = a.B - first_query < kBlock ? a.B - first_query : kBlock;
  members.all_present = !a.memory_ids;
  uint64_t positive_rows = 0;
  for (auto& row : members.positive) {
    for (Mask16& mask : row) mask = 0;
  }
  int64_t ids[kBlock];
  // The test is outside the loop: a masked load at a null pointer is as slow as a fault, although it reads nothing.
  if (a.query_ids) {
    for (int64_t lane = 0; lane < kBlock; ++lane) ids[lane] = lane < queries ? a.query_ids[first_query + lane] : -1;
  }
  for (int64_t k = 0; a.memory_ids && k < count; ++k) {
    const int64_t id = a.memory_ids[chunk_begin + k];
    for (int v = 0; v < kTileVectors; ++v) {
      members.present[k][v] = id == -1 ? 0 : kAllLanes;
      if (id == -1 || !a.query_ids || a.same_id == CPR_SAME_NEGATIVE) continue;
      const Mask16 same = equal_ids(ids + v * 16, id);
      if (a.same_id == CPR_SAME_IGNORE) members.present[k][v] = static_cast<Mask16>(~same);
      if (a.same_id != CPR_SAME_POSITIVE || !same) continue;
      members.positive[k][v] = same;
      positive_rows |= uint64_t{1} << k;
    }
  }
  const int64_t* slots = a.positives + first_query * a.P;
  for (int64_t lane = 0; lane < queries; ++lane) {  // a listed slot overrides same_id, and counts once
    const Mask16 bit = static_cast<Mask16>(1u << lane % 16);
    for (int64_t p = 0; p < a.P; ++p) {
      const int64_t slot = slots[lane * a.P + p], k = slot - chunk_begin;
      if (k < 0 || k >= count || (a.memory_ids && a.memory_ids[slot] == -1)) continue;
      if (!members.all_present) members.present[k][lane / 16] |= bit;
      members.positive[k][lane / 16] |= bit;
      positive_rows |= uint64_t{1} << k;
    }
  }
  members.positive_rows = positive_rows;
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

template <class T>
void pack_queries(Queries<T>& job, T* row) {
  const cpr_mil_nce_args& a = job.args;
  for (int64_t block = 0; block < job.blocks; ++block) {
    pack_panel(a.query, a.dtype, block * kBlock, kBlock, a.B, a.D, row, job.panels + block * a.D * kBlock);
  }
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
