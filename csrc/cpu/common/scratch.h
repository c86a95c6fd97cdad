// Scratch memory of the CPU kernels. Each thread keeps its blocks for later calls. The C library would get new pages
// from the system for each large allocation, and for smaller ones whenever a free block at the end of the heap has been
// returned; clearing pages costs as much as a small selection, or several times as much on a machine that is short of
// memory.
#pragma once

#include <stddef.h>

namespace cpr {

struct ScratchBlock {
  void* memory;  // uninitialised; aligned to a cache line, or to a huge page if it has two or more; null: out of memory
  size_t bytes;
};

ScratchBlock acquire_scratch(size_t bytes);
void release_scratch(ScratchBlock block);

}  // namespace cpr
