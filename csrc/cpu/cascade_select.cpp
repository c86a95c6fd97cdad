// cascade_select on the CPU: exact scores of a block of queries against the whole memory, then, query by query, all
// stages on rows of integer keys.
//
// A score never changes between stages, so each compared view is scored once. Queries lie in the SIMD lanes and memory
// values are broadcast, so that the memory is never packed. Extra memory: one block of score rows for all threads and
// three rows per thread, O(threads * K).
//
// Letters: B queries, V views, K memory entries, D width, n stages, U compared views.
#include "cpu/dispatch.h"
#include "cpu/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kChunk = 64;       // memory entries scored at a time
constexpr int64_t kBlock = 32;       // queries whose score rows exist at a time
constexpr int kSample = 32;          // keys sampled to bracket a threshold
constexpr int kMaxRounds = 8;        // brackets tried before the bisection that always ends
constexpr int64_t kMostMerged = 64;  // survivors up to which a merge sort is the faster one
constexpr const char* kNoMemory = "cascade_select: out of memory";

struct Job {
  const cpr_cascade_args& args;
  int64_t* view_of;    // [U] compared views
  int64_t* stage_row;  // [n] position of views[s] in view_of
  int64_t U;
  int64_t chunks;      // of the memory
  int64_t row_stride;  // whole chunks and one cache line: at a power of two, 16 rows would share one set of the cache
  float* panels;       // [U, D, lanes] queries of the block
  int32_t* rows;       // [U, kBlock, row_stride] keys of the block
  int64_t block_begin, block_size;
  const char* failure;  // the same text whichever thread sets it
};

// ---- scoring -------------------------------------------------------------------------------------------

// Keys of one chunk of memory entries against N x 16 queries, transposed into the score rows.
template <int N>
void score_chunk(const Job& job, int64_t u, int64_t chunk, const float* entries, int64_t count, float* buffer) {
  constexpr int64_t kLanes = N * 16;
  const int64_t D = job.args.D;
  for (int64_t lane = 0; lane < kBlock && lane < ceil_div(job.block_size, 16) * 16; lane += kLanes) {
    const float* panel = job.panels + (u * kBlock + lane) * D;
    int32_t* rows = job.rows + (u * kBlock + lane) * job.row_stride + chunk * kChunk;
    for (int64_t q = 0; q < kLanes; ++q) {  // the cache lines that the keys will go to, while the scores are computed
      for (int64_t k = 0; k < kChunk; k += 16) __builtin_prefetch(rows + q * job.row_stride + k, 1);
    }
    tiles<N, false>(count, Operand<float>{entries, D, 1}, panel, kLanes, D, buffer, kLanes);
    for (int64_t i = count * kLanes; i < kChunk * kLanes; i += 16) store(buffer + i, broadcast(__builtin_nanf("")));
    for (int64_t v = 0; v < N; ++v) {
      for (int64_t k = 0; k < kChunk; k += 16) {
        transpose_keys(buffer + k * kLanes + v * 16, kLanes, rows + v * 16 * job.row_stride + k, job.row_stride);
      }
    }
  }
}

void score_chunks(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const cpr_cascade_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<float> buffer(kChunk * kBlock), widened(a.dtype == CPR_F32 ? 0 : kChunk * a.D);
  if (!buffer.data || !widened.data) {
    job.failure = kNoMemory;
    return;
  }
  for (int64_t u = 0; u < job.U; ++u) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = job.view_of[u] * a.K + chunk * kChunk;
      const int64_t count = a.K - chunk * kChunk < kChunk ? a.K - chunk * kChunk : kChunk;
      const float* entries = static_cast<const float*>(a.memory) + first * a.D;
      if (a.dtype != CPR_F32) {
        widen(a.memory, a.dtype, first * a.D, count * a.D, widened.data);
        entries = widened.data;
      }
      if (job.block_size > 16 && kTileVectors > 1) {
        score_chunk<kTileVectors>(job, u, chunk, entries, count, buffer.data);
      } else {
        score_chunk<1>(job, u, chunk, entries, count, buffer.data);
      }
    }
  }
}

// ---- the key of a given rank -----------------------------------------------------------------------------

// The keys of descending ranks `upper` <= `lower` among the n keys of N vectors, padded with kNoKey.
template <int N>
void ranked_vectors(const int32_t* padded, int n, int upper, int lower, int32_t* upper_key, int32_t* lower_key) {
  Key16 lanes[N], rank[N];  // rank: how many keys are greater, so that equal keys share one
  for (int v = 0; v < N; ++v) {
    lanes[v] = load(padded + v * 16);
    rank[v] = broadcast(0);
  }
  for (int i = 0; i < n; ++i) {
    const Key16 key = broadcast(padded[i]);
    for (int v = 0; v < N; ++v) rank[v] = add_greater(rank[v], key, lanes[v]);
  }
  Key16 at_upper = broadcast(INT32_MAX), at_lower = at_upper;
  for (int v = 0; v < N; ++v) {
    at_upper = min(at_upper, select(greater(rank[v], broadcast(upper)), broadcast(INT32_MAX), lanes[v]));
    at_lower = min(at_lower, select(greater(rank[v], broadcast(lower)), broadcast(INT32_MAX), lanes[v]));
  }
  *upper_key = least(at_upper);
  *lower_key = least(at_lower);
}

// The same among n <= kSample keys.
void ranked(const int32_t* keys, int n, int upper, int lower, int32_t* upper_key, int32_t* lower_key) {
  alignas(64) int32_t padded[kSample];
  for (int i = 0; i < kSample; ++i) padded[i] = i < n ? keys[i] : kNoKey;
  if (n <= 16) {
    ranked_vectors<1>(padded, n, upper, lower, upper_key, lower_key);
  } else {
    ranked_vectors<kSample / 16>(padded, n, upper, lower, upper_key, lower_key);
  }
}

int64_t count_greater(const int32_t* keys, int64_t n, int32_t than) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    count += count_lanes(greater(load(keys + i), broadcast(than)) & first_lanes(n - i));
  }
  return count;
}

struct Threshold {
  int32_t key;
  int64_t greater;  // how many keys are above it
};

// By bisection over the key space, 32 passes: for what sampling cannot narrow, such as rows of few distinct values.
Threshold bisect(const int32_t* keys, int64_t n, int64_t rank) {
  int64_t low = INT32_MIN, high = INT32_MAX;  // the threshold lies in low..high
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    if (count_greater(keys, n, static_cast<int32_t>(middle)) <= rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {static_cast<int32_t>(low), count_greater(keys, n, static_cast<int32_t>(low))};
}

// Copies the keys in low..high to `out`, counts those above.
int64_t bracket(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out, int64_t* above) {
  const Key16 lows = broadcast(low), highs = broadcast(high);
  int64_t count = 0, greater_count = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Key16 key = load(keys + i);
    const Mask16 over = greater(key, highs);
    greater_count += count_lanes(over);
    count += compress(out + count, static_cast<Mask16>(~(over | greater(lows, key))), key);
  }
  if (i < n) {
    const Key16 key = load(keys + i);
    const Mask16 valid = first_lanes(n - i), over = greater(key, highs);
    greater_count += count_lanes(valid & over);
    count += compress(out + count, valid & ~(over | greater(lows, key)), key);
  }
  *above = greater_count;
  return count;
}

// The key of descending `rank` (0-based) among n keys: sampled order statistics bracket it, the bracket is copied
// aside, and so on until few enough remain to be ranked directly. `scratch`: two buffers of n keys.
Threshold select_rank(const int32_t* keys, int64_t n, int64_t rank, int32_t* const scratch[2]) {
  int64_t above = 0;
  for (int round = 0; n > kSample; ++round) {
    if (round == kMaxRounds) {
      const Threshold found = bisect(keys, n, rank);
      return {found.key, above + found.greater};
    }
    int32_t sample[kSample], low, high;
    for (int i = 0; i < kSample; ++i) sample[i] = keys[(2 * i + 1) * n / (2 * kSample)];
    const float share = (static_cast<float>(rank) + 0.5f) / static_cast<float>(n);
    const float width = 2.0f * __builtin_sqrtf(kSample * share * (1.0f - share)) + 1.0f;  // two standard deviations
    const int upper = static_cast<int>(kSample * share - width), lower = static_cast<int>(kSample * share + width);
    ranked(sample, kSample, upper < 0 ? 0 : upper, lower >= kSample ? kSample - 1 : lower, &high, &low);
    if (kSample * share - width < 0) high = INT32_MAX;
    if (lower >= kSample) low = INT32_MIN;

    int32_t* out = keys == scratch[0] ? scratch[1] : scratch[0];
    int64_t greater_count;
    int64_t inside = bracket(keys, n, low, high, out, &greater_count);
    if (rank < greater_count) {  // missed: it lies above
      inside = bracket(keys, n, high + 1, INT32_MAX, out, &greater_count);
    } else if (rank >= greater_count + inside) {  // missed: it lies below
      inside = bracket(keys, n, INT32_MIN, low - 1, out, &greater_count);
    } else if (low == high) {
      return {low, above + greater_count};
    }
    above += greater_count;
    rank -= greater_count;
    n = inside;
    keys = out;
  }
  int32_t key, same;
  ranked(keys, static_cast<int>(n), static_cast<int>(rank), static_cast<int>(rank), &key, &same);
  return {key, above + count_greater(keys, n, key)};
}

// ---- the stages of one query -------------------------------------------------------------------------------

// The survivors of one query: `count` entries in slot order, their keys in each compared view beside their slots.
struct Survivors {
  int32_t* slots;  // [K]
  int32_t* keys;   // [U, ...] rows `stride` apart
  int64_t stride, U, count;
};

// Keeps the lanes of `mask` of each vector, in order. In place: the write position never overtakes the read position.
// kViews: how many compared views, where that is known: the usual two keep their pointers in registers.
template <int kViews>
inline void compact_vector(Survivors& s, int64_t from, int64_t to, Mask16 mask, Key16 slots) {
  const int64_t views = kViews ? kViews : s.U;
  for (int64_t u = 0; u < views; ++u) compress(s.keys + u * s.stride + to, mask, load(s.keys + u * s.stride + from));
  compress(s.slots + to, mask, slots);
}

// Drops empty entries, those of the query's own id and NaN scores.
template <int kViews>
void drop_excluded(Survivors& s, const cpr_cascade_args& a, int64_t b) {
  static const int32_t iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t own_id = a.query_ids ? a.query_ids[b] : -1;
  int64_t kept = 0;
  for (int64_t i = 0; i < a.K; i += 16) {
    Mask16 mask = first_lanes(a.K - i);
    for (int64_t u = 0; u < (kViews ? kViews : s.U); ++u)
      mask &= greater(load(s.keys + u * s.stride + i), broadcast(kNoKey));
    if (a.memory_ids && i + 16 <= a.K) {
      mask &= static_cast<Mask16>(~(equal_ids(a.memory_ids + i, -1) | equal_ids(a.memory_ids + i, own_id)));
    } else if (a.memory_ids) {
      for (int64_t k = i; k < a.K; ++k) {
        const bool excluded = a.memory_ids[k] == -1 || a.memory_ids[k] == own_id;
        mask &= static_cast<Mask16>(~(excluded << (k - i)));
      }
    }
    const Key16 slots = add(broadcast(static_cast<int32_t>(i)), load(iota));
    if (mask == kAllLanes && kept == i) {  // nothing dropped so far: the keys lie where they belong
      store(s.slots + i, slots);
    } else {
      compact_vector<kViews>(s, i, kept, mask, slots);
    }
    kept += count_lanes(mask);
  }
  s.count = kept;
}

// One stage: the best `keep` survivors by (key descending, slot ascending) stay, in slot order.
template <int kViews>
void select_stage(Survivors& s, int64_t row, int64_t keep, int32_t* const scratch[2]) {
  if (s.count <= keep) return;
  const int32_t* keys = s.keys + row * s.stride;
  const Threshold threshold = select_rank(keys, s.count, keep - 1, scratch);
  int64_t ties = keep - threshold.greater;  // the lowest slots among equals
  int64_t kept = 0;
  for (int64_t i = 0; i < s.count; i += 16) {
    const Key16 key = load(keys + i);
    const Mask16 valid = first_lanes(s.count - i);
    Mask16 tied = equal(key, broadcast(threshold.key)) & valid;
    if (tied) {
      while (count_lanes(tied) > ties) tied &= static_cast<Mask16>(~(0x8000u >> (__builtin_clz(tied) - 16)));
      ties -= count_lanes(tied);
    }
    const Mask16 mask = tied | (greater(key, broadcast(threshold.key)) & valid);
    compact_vector<kViews>(s, i, kept, mask, load(s.slots + i));
    kept += count_lanes(mask);
  }
  s.count = kept;
}

// Merge sort of `count` words; returns the sorted one of the two buffers.
uint64_t* merge_sort(uint64_t* words, uint64_t* other, int64_t count) {
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * width) {
      const int64_t middle = begin + width < count ? begin + width : count;
      const int64_t end = begin + 2 * width < count ? begin + 2 * width : count;
      int64_t left = begin, right = middle;
      for (int64_t i = begin; i < end; ++i) {
        const bool take_left = left < middle && (right >= end || words[left] <= words[right]);
        other[i] = words[take_left ? left++ : right++];
      }
    }
    uint64_t* sorted = other;
    other = words;
    words = sorted;
  }
  return words;
}

// Stable radix sort by the upper halves of `count` words, a byte at a time; returns the sorted one of the two buffers.
uint64_t* radix_sort(uint64_t* words, uint64_t* other, int64_t count) {
  int32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int byte = 0; byte < 4; ++byte) ++starts[byte][words[i] >> (32 + 8 * byte) & 0xff];
  }
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 32 + 8 * byte;
    if (starts[byte][words[0] >> shift & 0xff] == count) continue;  // all alike
    int32_t sum = 0;
    for (int32_t& start : starts[byte]) {
      const int32_t size = start;
      start = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) other[starts[byte][words[i] >> shift & 0xff]++] = words[i];
    uint64_t* sorted = other;
    other = words;
    words = sorted;
  }
  return words;
}

// Writes the last stage's survivors by (score descending, slot ascending), padded with (-1, -inf).
void write_result(const Survivors& s, const cpr_cascade_args& a, int64_t row, int64_t b, int32_t* const scratch[2]) {
  const int64_t width = a.keep[a.n - 1];
  const int32_t* keys = s.keys + row * s.stride;
  uint64_t* words = reinterpret_cast<uint64_t*>(scratch[0]);
  for (int64_t i = 0; i < s.count; ++i) {
    const uint32_t descending = ~(static_cast<uint32_t>(keys[i]) ^ 0x80000000u);
    words[i] = static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(s.slots[i]);
  }
  // Survivors come in slot order, so a stable sort by key leaves equal keys by slot.
  const auto sort = s.count > kMostMerged ? radix_sort : merge_sort;
  words = sort(words, reinterpret_cast<uint64_t*>(scratch[1]), s.count);
  for (int64_t i = 0; i < width; ++i) {
    const bool filled = i < s.count;
    const uint32_t ascending = filled ? ~static_cast<uint32_t>(words[i] >> 32) ^ 0x80000000u : 0;
    a.indices[b * width + i] = filled ? static_cast<int64_t>(words[i] & 0xffffffffu) : -1;
    a.scores[b * width + i] = filled ? score_of(static_cast<int32_t>(ascending)) : -__builtin_inff();
  }
}

template <int kViews>
void select_queries(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const cpr_cascade_args& a = job.args;
  const Scratch<int32_t> slots(a.K), first(2 * a.K), second(2 * a.K);  // two keys, or one 64-bit word, per entry
  if (!slots.data || !first.data || !second.data) {
    job.failure = kNoMemory;
    return;
  }
  int32_t* const scratch[2] = {first.data, second.data};
  for (int64_t q = begin; q < end; ++q) {
    Survivors s{slots.data, job.rows + q * job.row_stride, kBlock * job.row_stride, job.U, 0};
    drop_excluded<kViews>(s, a, job.block_begin + q);
    for (int64_t stage = 0; stage < a.n; ++stage) select_stage<kViews>(s, job.stage_row[stage], a.keep[stage], scratch);
    write_result(s, a, job.stage_row[a.n - 1], job.block_begin + q, scratch);
  }
}

void pack_block(Job& job, float* row) {
  const cpr_cascade_args& a = job.args;
  const int64_t lanes = job.block_size > 16 ? kTileVectors * 16 : 16;
  for (int64_t u = 0; u < job.U; ++u) {
    const size_t view = static_cast<size_t>(job.view_of[u] * a.B * a.D) * element_size(a.dtype);
    for (int64_t lane = 0; lane < kBlock; lane += lanes) {
      pack_panel(static_cast<const char*>(a.queries) + view, a.dtype, job.block_begin + lane, lanes, a.B, a.D, row,
                 job.panels + (u * kBlock + lane) * a.D);
    }
  }
}

}  // namespace

const char* cascade_select(const cpr_cascade_args* args, cpr_parallel_for parallel) {
  const cpr_cascade_args& a = *args;
  if (a.K >= INT32_MAX - kChunk) return "cascade_select: expected K < 2^31 - 64";
  const Scratch<int64_t> view_of(a.n), stage_row(a.n);
  if (!view_of.data || !stage_row.data) return kNoMemory;
  const int64_t chunks = ceil_div(a.K, kChunk);
  Job job{a, view_of.data, stage_row.data, 0, chunks, chunks * kChunk + 16, nullptr, nullptr, 0, 0, nullptr};
  for (int64_t s = 0; s < a.n; ++s) {
    int64_t u = 0;
    while (u < job.U && job.view_of[u] != a.views[s]) ++u;
    if (u == job.U) job.view_of[job.U++] = a.views[s];
    job.stage_row[s] = u;
  }
  const Scratch<float> panels(job.U * kBlock * a.D), row(a.D);
  const Scratch<int32_t> rows(job.U * kBlock * job.row_stride);
  if (!panels.data || !row.data || !rows.data) return kNoMemory;
  job.panels = panels.data;
  job.rows = rows.data;
  for (job.block_begin = 0; job.block_begin < a.B; job.block_begin += kBlock) {
    job.block_size = a.B - job.block_begin < kBlock ? a.B - job.block_begin : kBlock;
    pack_block(job, row.data);
    parallel(job.chunks, 4, score_chunks, &job);
    if (job.failure == nullptr) parallel(job.block_size, 1, job.U == 2 ? select_queries<2> : select_queries<0>, &job);
    if (job.failure != nullptr) return job.failure;
  }
  return nullptr;
}

}  // namespace cpr::CPR_VARIANT
