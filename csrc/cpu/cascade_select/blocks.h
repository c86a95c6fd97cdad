// Scores and selects the entries for one block of queries after another. Letters as in cascade_select.cpp.
#pragma once

#include "cpu/cascade_select/survivors.h"
#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kKeyChunk = 64;  // memory entries that are scored together
constexpr int64_t kKeyBlock = 32;  // queries in a block
constexpr const char* kNoCascadeMemory = "cascade_select: out of memory";

struct CascadeJob {
  const cpr_cascade_args& args;
  int64_t* view_of;    // [U] the compared views
  int64_t* stage_row;  // [n] position of views[s] in view_of
  int64_t U;
  int64_t chunks;      // of the memory
  int64_t row_stride;  // whole chunks plus one cache line; a power of two would map 16 rows to one set of the cache
  float* panels;       // [U, D, lanes] queries of the block
  int32_t* rows;       // [U, kKeyBlock, row_stride] keys of the block
  int64_t block_begin, block_size;
  int64_t elsewhere;    // position in view_of of a view whose keys the caller computes, or -1
  const char* failure;  // every thread sets the same text
};

// ---- scoring -------------------------------------------------------------------------------------------

// Transposes the scores [count, N x 16] of one chunk, as keys, into score rows; the rest of the chunk becomes NaN.
// The buffer has kKeyChunk rows.
template <int N>
inline void store_keys(int64_t count, float* buffer, int32_t* rows, int64_t row_stride) {
  constexpr int64_t kLanes = N * 16;
  for (int64_t i = count * kLanes; i < kKeyChunk * kLanes; i += 16) store(buffer + i, broadcast(__builtin_nanf("")));
  for (int64_t v = 0; v < N; ++v) {
    for (int64_t k = 0; k < kKeyChunk; k += 16) {
      transpose_keys(buffer + k * kLanes + v * 16, kLanes, rows + v * 16 * row_stride + k, row_stride);
    }
  }
}

// Computes the keys of one chunk of memory entries for N x 16 queries and transposes them into the score rows.
template <int N>
void key_chunk(const CascadeJob& job, int64_t u, int64_t chunk, const float* entries, int64_t count, float* buffer) {
  constexpr int64_t kLanes = N * 16;
  const int64_t D = job.args.D;
  for (int64_t lane = 0; lane < kKeyBlock && lane < ceil_div(job.block_size, 16) * 16; lane += kLanes) {
    const float* panel = job.panels + (u * kKeyBlock + lane) * D;
    int32_t* rows = job.rows + (u * kKeyBlock + lane) * job.row_stride + chunk * kKeyChunk;
    for (int64_t q = 0; q < kLanes; ++q) {  // prefetch the lines that will be written
      for (int64_t k = 0; k < kKeyChunk; k += 16) __builtin_prefetch(rows + q * job.row_stride + k, 1);
    }
    tiles<N, false>(count, Operand<float>{entries, D, 1}, panel, kLanes, D, buffer, kLanes);
    store_keys<N>(count, buffer, rows, job.row_stride);
  }
}

void key_chunks(int64_t begin, int64_t end, void* context) {
  CascadeJob& job = *static_cast<CascadeJob*>(context);
  const cpr_cascade_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<float> buffer(kKeyChunk * kKeyBlock), widened(a.dtype == CPR_F32 ? 0 : kKeyChunk * a.D);
  if (!buffer.data || !widened.data) {
    job.failure = kNoCascadeMemory;
    return;
  }
  for (int64_t u = 0; u < job.U; ++u) {
    if (u == job.elsewhere) continue;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = job.view_of[u] * a.K + chunk * kKeyChunk;
      const int64_t count = a.K - chunk * kKeyChunk < kKeyChunk ? a.K - chunk * kKeyChunk : kKeyChunk;
      const float* entries = static_cast<const float*>(a.memory) + first * a.D;
      if (a.dtype != CPR_F32) {
        widen(a.memory, a.dtype, first * a.D, count * a.D, widened.data);
        entries = widened.data;
      }
      if (job.block_size > 16 && kTileVectors > 1) {
        key_chunk<kTileVectors>(job, u, chunk, entries, count, buffer.data);
      } else {
        key_chunk<1>(job, u, chunk, entries, count, buffer.data);
      }
    }
  }
}

// ---- selection -------------------------------------------------------------------------------------------

template <int kViews>
void select_queries(int64_t begin, int64_t end, void* context) {
  CascadeJob& job = *static_cast<CascadeJob*>(context);
  const cpr_cascade_args& a = job.args;
  const Scratch<int32_t> slots(a.K), first(2 * a.K), second(2 * a.K);  // an entry takes two keys or one 64-bit word
  if (!slots.data || !first.data || !second.data) {
    job.failure = kNoCascadeMemory;
    return;
  }
  int32_t* const scratch[2] = {first.data, second.data};
  for (int64_t q = begin; q < end; ++q) {
    Survivors s{slots.data, job.rows + q * job.row_stride, kKeyBlock * job.row_stride, job.U, 0};
    drop_excluded<kViews>(s, a, job.block_begin + q);
    for (int64_t stage = 0; stage < a.n; ++stage) select_stage<kViews>(s, job.stage_row[stage], a.keep[stage], scratch);
    write_result(s, a, job.stage_row[a.n - 1], job.block_begin + q, scratch);
  }
}

void pack_block(CascadeJob& job, float* row) {
  const cpr_cascade_args& a = job.args;
  const int64_t lanes = job.block_size > 16 ? kTileVectors * 16 : 16;
  for (int64_t u = 0; u < job.U; ++u) {
    const size_t view = static_cast<size_t>(job.view_of[u] * a.B * a.D) * element_size(a.dtype);
    for (int64_t lane = 0; lane < kKeyBlock; lane += lanes) {
      pack_panel(static_cast<const char*>(a.queries) + view, a.dtype, job.block_begin + lane, lanes, a.B, a.D, row,
                 job.panels + (u * kKeyBlock + lane) * a.D);
    }
  }
}

// Computes the keys block by block and calls use(job) for each. compute_keys(job) computes the keys of a block in the
// view `elsewhere`, if it is compared.
template <class ComputeKeys, class Use>
const char* for_blocks(const cpr_cascade_args& a, cpr_parallel_for parallel, int64_t elsewhere,
                       ComputeKeys compute_keys, Use use) {
  if (a.K >= INT32_MAX - kKeyChunk) return "cascade_select: expected K < 2^31 - 64";
  const Scratch<int64_t> view_of(a.n), stage_row(a.n);
  if (!view_of.data || !stage_row.data) return kNoCascadeMemory;
  const int64_t chunks = ceil_div(a.K, kKeyChunk);
  CascadeJob job{a, view_of.data, stage_row.data, 0, chunks, chunks * kKeyChunk + 16, nullptr, nullptr, 0,
                 0, -1,           nullptr};
  for (int64_t s = 0; s < a.n; ++s) {
    int64_t u = 0;
    while (u < job.U && job.view_of[u] != a.views[s]) ++u;
    if (u == job.U) job.view_of[job.U++] = a.views[s];
    job.stage_row[s] = u;
    if (a.views[s] == elsewhere) job.elsewhere = u;
  }
  const Scratch<float> panels(job.U * kKeyBlock * a.D), row(a.D);
  const Scratch<int32_t> rows(job.U * kKeyBlock * job.row_stride);
  if (!panels.data || !row.data || !rows.data) return kNoCascadeMemory;
  job.panels = panels.data;
  job.rows = rows.data;
  for (job.block_begin = 0; job.block_begin < a.B; job.block_begin += kKeyBlock) {
    job.block_size = a.B - job.block_begin < kKeyBlock ? a.B - job.block_begin : kKeyBlock;
    pack_block(job, row.data);
    parallel(job.chunks, 4, key_chunks, &job);
    if (job.failure == nullptr && job.elsewhere >= 0) job.failure = compute_keys(job);
    if (job.failure == nullptr) use(job);
    if (job.failure != nullptr) return job.failure;
  }
  return nullptr;
}

// Selects block by block.
template <class ComputeKeys>
const char* select_blocks(const cpr_cascade_args& a, cpr_parallel_for parallel, int64_t elsewhere,
                          ComputeKeys compute_keys) {
  return for_blocks(a, parallel, elsewhere, compute_keys, [&](CascadeJob& job) {
    parallel(job.block_size, 1, job.U == 2 ? select_queries<2> : select_queries<0>, &job);
  });
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
