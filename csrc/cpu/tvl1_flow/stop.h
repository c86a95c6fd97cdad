// Ends the flow that is computed on the CPU, for a program that was asked to stop.
#pragma once

#include "cpr_fast.h"

// With stop = 1, calls of cpr_tvl1_flow_cpu in other threads end soon and return an error, as do later ones until this
// is called with 0. The flow of such a call is not complete.
extern "C" CPR_API void cpr_tvl1_flow_stop(int stop);
