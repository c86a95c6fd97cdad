// Scratch memory of the CPU kernels. Large blocks are kept by the thread that used them: the C library hands fresh
// pages to each large allocation, and clearing them costs as much as a small selection, or several times that on a
// machine short of memory.
#pragma once

#include <stddef.h>

namespace cpr {

struct ScratchBlock {
  void* memory;  // uninitialised, on a cache line; on a huge page if it spans two; null when out of memory
  size_t bytes;
};

ScratchBlock acquire_scratch(size_t bytes);
void release_scratch(ScratchBlock block);

}  // namespace cpr
