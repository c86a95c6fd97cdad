#include "cpu/dispatch.h"
namespace cpr::CPR_VARIANT {
const char* mil_nce_forward(const cpr_mil_nce_args*, const cpr_mil_nce_outputs*, cpr_parallel_for) { return "mil_nce: the CPU kernel is not written yet"; }
const char* mil_nce_grad_memory(const cpr_mil_nce_args*, const void*, const void*, const void*, void*, cpr_parallel_for) { return "mil_nce: the CPU kernel is not written yet"; }
}
