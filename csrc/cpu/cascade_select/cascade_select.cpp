// cascade_select on the CPU. It computes the exact scores of a block of queries against the whole memory, then runs all
// stages of each query on rows of integer keys. A key is an integer that orders like the score (lanes.h).
//
// A score is the same in every stage, so each compared view is scored once. Each SIMD lane holds one query and memory
// values are broadcast, so the memory need not be repacked. Extra memory: the score rows of one block of queries,
// shared by all threads, and three rows per thread; O(threads * K).
//
// Letters in shapes: B queries, V views, K memory entries, D width, n stages, U compared views.
#include "cpu/cascade_select/blocks.h"
#include "cpu/common/dispatch.h"

namespace cpr::CPR_VARIANT {

const char* cascade_select(const cpr_cascade_args* args, cpr_parallel_for parallel) {
  return select_blocks(*args, parallel, -1, [](CascadeJob&) -> const char* { return nullptr; });
}

}  // namespace cpr::CPR_VARIANT
