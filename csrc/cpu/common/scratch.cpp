#include "cpu/common/scratch.h"

#include <cstdlib>

#include "cpr_fast.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cpr {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t{1} << 21;
constexpr size_t kKeep = size_t{256} << 20;  // bytes: the limit for the blocks that a thread keeps
constexpr int kSlots = 24;

ScratchBlock allocate(size_t bytes) {
  const size_t alignment = bytes < 2 * kHugePage ? kLine : kHugePage;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, bytes);
#if defined(__linux__)
  // Rows that are written in turn are on more small pages than the TLB has entries.
  if (memory != nullptr && alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return {memory, bytes};
}

// The blocks that a thread keeps until it ends.
struct Kept {
  ScratchBlock blocks[kSlots] = {};
  size_t total = 0;

  ~Kept() { clear(); }
  void clear() {
    for (ScratchBlock& block : blocks) drop(block);
  }
  void drop(ScratchBlock& block) {
    std::free(block.memory);
    total -= block.bytes;
    block = {};
  }
};
thread_local Kept kept;

}  // namespace

ScratchBlock acquire_scratch(size_t bytes) {
  ScratchBlock* best = nullptr;
  for (ScratchBlock& block : kept.blocks) {
    if (block.bytes >= bytes && block.bytes / 2 <= bytes && (best == nullptr || block.bytes < best->bytes))
      best = &block;
  }
  if (best == nullptr) return allocate(bytes);
  const ScratchBlock found = *best;
  kept.total -= found.bytes;
  *best = {};
  return found;
}

void release_scratch(ScratchBlock block) {
  if (block.memory != nullptr) {
    ScratchBlock* smallest = &kept.blocks[0];
    for (ScratchBlock& other : kept.blocks) {
      if (other.bytes < smallest->bytes) smallest = &other;
    }
    if (kept.total - smallest->bytes + block.bytes <= kKeep && smallest->bytes < block.bytes) {
      kept.drop(*smallest);
      kept.total += block.bytes;
      *smallest = block;
      return;
    }
  }
  std::free(block.memory);
}

}  // namespace cpr

extern "C" void cpr_release_scratch(void) { cpr::kept.clear(); }
