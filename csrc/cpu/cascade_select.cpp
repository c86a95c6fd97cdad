#include "cpu/dispatch.h"
namespace cpr::CPR_VARIANT {
const char* cascade_select(const cpr_cascade_args*, cpr_parallel_for) { return "cascade_select: the CPU kernel is not written yet"; }
}
