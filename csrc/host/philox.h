// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based
// generator. Every draw is a pure function of (seed, counter), independent of order, thread and worker.
#pragma once

#include <array>
#include <cstdint>

namespace cpr {

// Returns four independent uniform 32-bit words: ten rounds over the 128-bit counter with the 64-bit key `seed`.
std::array<uint32_t, 4> philox4x32(uint64_t seed, std::array<uint32_t, 4> counter);

}  // namespace cpr
