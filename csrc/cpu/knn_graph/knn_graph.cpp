// knn_graph on the CPU: compares a block of rows with all entries after them, and updates the lists of both sides, so
// that every pair is scored once. A score is symmetric bit for bit, because its products are.
//
// The entries are divided into parts. A part owns the lists of its entries, and has lists of its own for the rows,
// which are merged at the end: no list has two writers. Most scores are below the last score of both lists, and are
// dismissed sixteen at a time.
//
// A list holds words in descending order: the key of the score (lanes.h) above the inverted slot, so that the greater
// of two words has the higher score or, of equal scores, the lower slot.
//
// Letters in shapes: N entries, D width, k neighbours.
#include "cpu/common/dispatch.h"
#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kLanes = kTileVectors * 16;  // rows of a panel
constexpr int64_t kEntries = 32;               // entries that are scored together; with a panel they fit into L1
constexpr int64_t kLeastPart = 2048, kMostParts = 64;
constexpr int64_t kEmpty = INT64_MIN;
constexpr const char* kNoGraphMemory = "knn_graph: out of memory";

struct GraphJob {
  const cpr_knn_graph_args& args;
  int64_t rows, panels;    // of the block
  int64_t parts, entries;  // number of parts, and of entries in each but the last
  float* packed;           // [panels, D, kLanes] the rows
  int64_t* own;            // [parts, rows, k] lists of the rows
  float* floors;           // [rows] scores below which no entry enters the list of a row
  const char* failure;     // every thread sets the same text
};

inline float floor_of(int64_t last) {
  return last == kEmpty ? -__builtin_inff() : score_of(static_cast<int32_t>(last >> 32));
}

// Inserts a word that the list does not hold already; returns whether the last word has changed.
inline bool insert(int64_t* list, int64_t k, int64_t word) {
  if (word <= list[k - 1]) return false;
  int64_t place = k - 1;
  while (place > 0 && list[place - 1] < word) --place;
  if (place > 0 && list[place - 1] == word) return false;
  for (int64_t i = k - 1; i > place; --i) list[i] = list[i - 1];
  list[place] = word;
  return true;
}

inline int64_t word_of(int32_t key, int64_t slot) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(key)) << 32 |
                              (0xffffffffu - static_cast<uint32_t>(slot)));
}

inline int32_t key_of_scalar(float score) {
  if (score != score) return kNoKey;
  const int32_t bits = __builtin_bit_cast(int32_t, score + 0.0f);
  return bits ^ (bits >> 31 & INT32_MAX);
}

// Offers the scores of the rows in `mask`, lanes of the panel that begins at `lane`, and of entry j to both lists.
void offer(const GraphJob& job, const float* scores, Mask16 mask, int64_t lane, int64_t j, int64_t* own, float* floors,
           float* entry_floor) {
  const int64_t k = job.args.k;
  int64_t* list = job.args.best + j * k;
  for (; mask; mask &= static_cast<Mask16>(mask - 1)) {
    const int64_t bit = __builtin_ctz(mask), row = lane + bit, i = job.args.begin + row;
    const int32_t key = key_of_scalar(scores[bit]);
    if (j <= i || key == kNoKey) continue;
    if (insert(list, k, word_of(key, i))) *entry_floor = floor_of(list[k - 1]);
    if (insert(own + row * k, k, word_of(key, j))) {
      const float last = floor_of(own[row * k + k - 1]);
      if (last > floors[row]) floors[row] = last;
    }
  }
}

// Compares all rows with `count` entries from `first`.
void compare(const GraphJob& job, const float* entries, int64_t first, int64_t count, int64_t* own, float* floors,
             float* buffer) {
  const cpr_knn_graph_args& a = job.args;
  float entry_floors[kEntries];
  for (int64_t e = 0; e < count; ++e) entry_floors[e] = floor_of(a.best[(first + e) * a.k + a.k - 1]);
  for (int64_t panel = 0; panel < job.panels; ++panel) {
    tiles<kTileVectors, false>(count, Operand<float>{entries, a.D, 1}, job.packed + panel * kLanes * a.D, kLanes, a.D,
                               buffer, kLanes);
    for (int64_t lane = panel * kLanes; lane < (panel + 1) * kLanes && lane < job.rows; lane += 16) {
      const float* scores = buffer + lane - panel * kLanes;
      const Mask16 valid = first_lanes(job.rows - lane);
      for (int64_t e = 0; e < count; ++e, scores += kLanes) {
        const Vec16 score = load(scores);
        const Mask16 below = less(score, load(floors + lane)) & less(score, broadcast(entry_floors[e]));
        const Mask16 mask = valid & static_cast<Mask16>(~below);  // also NaN, which `offer` ignores
        if (mask) offer(job, scores, mask, lane, first + e, own, floors, entry_floors + e);
      }
    }
  }
}

void compare_parts(int64_t begin, int64_t end, void* context) {
  GraphJob& job = *static_cast<GraphJob*>(context);
  const cpr_knn_graph_args& a = job.args;
  const ExactArithmetic exact;
  const Scratch<float> buffer(kEntries * kLanes), widened(a.dtype == CPR_F32 ? 0 : kEntries * a.D), floors(job.rows);
  if (!buffer.data || !widened.data || !floors.data) {
    job.failure = kNoGraphMemory;
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    for (int64_t i = 0; i < job.rows; ++i) floors.data[i] = job.floors[i];
    const int64_t stop = a.begin + (part + 1) * job.entries < a.N ? a.begin + (part + 1) * job.entries : a.N;
    for (int64_t first = a.begin + part * job.entries; first < stop; first += kEntries) {
      const int64_t count = stop - first < kEntries ? stop - first : kEntries;
      const float* entries = static_cast<const float*>(a.features) + first * a.D;
      if (a.dtype != CPR_F32) {
        widen(a.features, a.dtype, first * a.D, count * a.D, widened.data);
        entries = widened.data;
      }
      compare(job, entries, first, count, job.own + part * job.rows * a.k, floors.data, buffer.data);
    }
  }
}

}  // namespace

const char* knn_graph(const cpr_knn_graph_args* args, cpr_parallel_for parallel) {
  const cpr_knn_graph_args& a = *args;
  const int64_t rows = a.end - a.begin, left = a.N - a.begin, panels = ceil_div(rows, kLanes);
  const int64_t most = ceil_div(left, kLeastPart), wanted = most < kMostParts ? most : kMostParts;
  const int64_t entries = ceil_div(ceil_div(left, wanted), kEntries) * kEntries, parts = ceil_div(left, entries);
  const Scratch<float> packed(panels * kLanes * a.D), row(a.D), floors(rows);
  const Scratch<int64_t> own(parts * rows * a.k);
  if (!packed.data || !row.data || !floors.data || !own.data) return kNoGraphMemory;
  GraphJob job{a, rows, panels, parts, entries, packed.data, own.data, floors.data, nullptr};
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack_panel(a.features, a.dtype, a.begin + panel * kLanes, kLanes, a.end, a.D, row.data,
               packed.data + panel * kLanes * a.D);
  }
  for (int64_t i = 0; i < rows; ++i) floors.data[i] = floor_of(a.best[(a.begin + i) * a.k + a.k - 1]);
  for (int64_t i = 0; i < parts * rows * a.k; ++i) own.data[i] = kEmpty;
  parallel(parts, 1, compare_parts, &job);
  if (job.failure != nullptr) return job.failure;
  for (int64_t list = 0; list < parts * rows; ++list) {
    int64_t* best = a.best + (a.begin + list % rows) * a.k;
    for (int64_t i = 0; i < a.k && own.data[list * a.k + i] > best[a.k - 1]; ++i)
      insert(best, a.k, own.data[list * a.k + i]);
  }
  return nullptr;
}

}  // namespace cpr::CPR_VARIANT
