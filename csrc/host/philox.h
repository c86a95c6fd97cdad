// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator,
// so that every draw is a pure function of (seed, counter) whatever the order, thread or worker that asks for it.
#pragma once

#include <array>
#include <cstdint>

namespace cpr {

// Ten rounds over the 128-bit counter with the 64-bit key `seed`: four independent uniform 32-bit words.
std::array<uint32_t, 4> philox4x32(uint64_t seed, std::array<uint32_t, 4> counter);

}  // namespace cpr
