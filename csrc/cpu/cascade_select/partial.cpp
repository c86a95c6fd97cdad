// cascade_select in steps, for a memory that is divided among processes: the keys of all entries, how many entries have
// a digit of their keys, and what remains of the keys after a stage. The keys of the survivors of a stage are found by
// their digits, 8 bits at a time: the counts of all processes add up to those of the whole memory.
//
// A key is an integer that orders like the score (lanes.h); kNoKey marks an entry that is excluded or did not survive.
//
// Letters in shapes: B queries, K memory entries, U compared views.
#include "cpu/cascade_select/blocks.h"
#include "cpu/common/dispatch.h"

namespace cpr::CPR_VARIANT {
namespace {

struct CopyKeys {
  const CascadeJob& job;
  int32_t* keys;  // [U, B, K]
};

// Copies the keys of queries begin..end-1 of a block, excluding the entries that no stage may select.
void copy_keys(int64_t begin, int64_t end, void* context) {
  const CopyKeys& copy = *static_cast<CopyKeys*>(context);
  const CascadeJob& job = copy.job;
  const cpr_cascade_args& a = job.args;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t b = job.block_begin + q, own_id = a.query_ids ? a.query_ids[b] : -1;
    for (int64_t k = 0; k < a.K; ++k) {
      bool excluded = a.memory_ids && (a.memory_ids[k] == -1 || a.memory_ids[k] == own_id);
      for (int64_t u = 0; u < job.U; ++u) excluded |= job.rows[(u * kKeyBlock + q) * job.row_stride + k] == kNoKey;
      for (int64_t u = 0; u < job.U; ++u) {
        copy.keys[(u * a.B + b) * a.K + k] = excluded ? kNoKey : job.rows[(u * kKeyBlock + q) * job.row_stride + k];
      }
    }
  }
}

struct CountJob {
  const int32_t* keys;    // [B, K]
  const int32_t* prefix;  // [B]
  int64_t K;
  int digit;
  int32_t* counts;  // [B, 256]
};

void count_digits(int64_t begin, int64_t end, void* context) {
  const CountJob& job = *static_cast<CountJob*>(context);
  const int shift = 24 - 8 * job.digit;
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* keys = job.keys + b * job.K;
    int32_t* counts = job.counts + b * 256;
    for (int d = 0; d < 256; ++d) counts[d] = 0;
    for (int64_t k = 0; k < job.K; ++k) {
      const uint32_t ascending = static_cast<uint32_t>(keys[k]) ^ 0x80000000u;
      const bool counted = job.digit == 0 || ascending >> (shift + 8) == static_cast<uint32_t>(job.prefix[b]);
      if (counted && keys[k] != kNoKey) ++counts[ascending >> shift & 0xff];
    }
  }
}

struct KeepJob {
  int32_t* keys;             // [U, B, K]
  const int32_t* threshold;  // [B]
  const int32_t* ties;       // [B]
  int64_t U, B, K, row;
};

void keep_queries(int64_t begin, int64_t end, void* context) {
  const KeepJob& job = *static_cast<KeepJob*>(context);
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* keys = job.keys + (job.row * job.B + b) * job.K;
    int32_t ties = job.ties[b];
    for (int64_t k = 0; k < job.K; ++k) {
      if (keys[k] > job.threshold[b] || (keys[k] == job.threshold[b] && ties-- > 0)) continue;
      for (int64_t u = 0; u < job.U; ++u) job.keys[(u * job.B + b) * job.K + k] = kNoKey;
    }
  }
}

}  // namespace

const char* cascade_keys(const cpr_cascade_args* args, int32_t* keys, cpr_parallel_for parallel) {
  return for_blocks(
      *args, parallel, -1, [](CascadeJob&) -> const char* { return nullptr; },
      [&](CascadeJob& job) {
        CopyKeys copy{job, keys};
        parallel(job.block_size, 1, copy_keys, &copy);
      });
}

void cascade_counts(const int32_t* keys, const int32_t* prefix, int64_t B, int64_t K, int digit, int32_t* counts,
                    cpr_parallel_for parallel) {
  CountJob job{keys, prefix, K, digit, counts};
  parallel(B, 1, count_digits, &job);
}

void cascade_keep(int32_t* keys, const int32_t* threshold, const int32_t* ties, int64_t U, int64_t B, int64_t K,
                  int64_t row, cpr_parallel_for parallel) {
  KeepJob job{keys, threshold, ties, U, B, K, row};
  parallel(B, 1, keep_queries, &job);
}

}  // namespace cpr::CPR_VARIANT
