// The threads that share the work of an operator on the CPU.
#pragma once

#include "cpr_fast.h"

namespace cpr::ops {

// Runs body(begin, end, context) over disjoint ranges of `grain` or more items, the last possibly of fewer, that cover
// [0, count), in at most as many threads as torch.set_num_threads allows, of which the caller is one, and returns when
// all are done. body must not throw. Several threads may call it at the same time, and so may a forked process.
//
// The threads are torch's while the machine has a core for each, and else those of a pool that waits passively.
// OpenMP, which torch uses, gives every thread an equal share in advance, and a thread that has finished uses its core
// for up to 10 ms while it waits for the others or for the next task. On idle cores that is fastest, and other threads
// would have to compete with those that wait. If every core has a competing process, a selection took three times the
// CPU time in this way; in the pool a thread takes ranges until none is left, so that a caller whose helpers get no
// core does their work, too.
void parallel_for(int64_t count, int64_t grain, cpr_range_body body, void* context);

}  // namespace cpr::ops
