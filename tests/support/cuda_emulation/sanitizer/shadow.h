#pragma once

#include <stddef.h>

namespace emulation {
constexpr size_t kSharedBytes = 232 * 1024;  // of cpr::dynamic_shared
}  // namespace emulation
