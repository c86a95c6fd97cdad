#include "order.h"

#include <algorithm>

namespace emulation {

void BlockOrder::start() {
  blocks_.clear();
  threads_.clear();
  words_.clear();
}

void BlockOrder::join(Clock& into, const Clock& from) {
  for (const auto& [block, known] : from) {
    Known& own = into[block];
    own.before = std::max(own.before, known.before);
    if (known.time >= own.time) own.time = known.time, own.thread = known.thread;
  }
}

void BlockOrder::fence(const Place& thread) {
  Thread& own = threads_[key(thread)];
  join(own.acquired, own.read);
  own.read.clear();
  own.released = blocks_[thread.block];
  join(own.released, own.acquired);
  own.released[thread.block] = {thread.block_time, thread.thread, thread.own_time};
}

void BlockOrder::block_barrier(const Place& thread) {
  Clock& clock = blocks_[thread.block];
  for (auto& [key, other] : threads_) {
    if (key >> 32 == thread.block) join(clock, other.acquired);
  }
}

void BlockOrder::strong_write(const Place& thread, const void* address) {
  const auto own = threads_.find(key(thread));
  if (own != threads_.end()) join(words_[address], own->second.released);
}

void BlockOrder::strong_read(const Place& thread, const void* address) {
  const auto word = words_.find(address);
  if (word != words_.end()) join(threads_[key(thread)].read, word->second);
}

bool BlockOrder::ordered(const Place& now, unsigned block, unsigned time, unsigned thread) const {
  const auto within = [&](const Clock& clock) {
    const auto found = clock.find(block);
    if (found == clock.end()) return false;
    return time < found->second.before || (time <= found->second.time && thread == found->second.thread);
  };
  const auto of_block = blocks_.find(now.block);
  if (of_block != blocks_.end() && within(of_block->second)) return true;
  const auto own = threads_.find(key(now));
  return own != threads_.end() && within(own->second.acquired);
}

}  // namespace emulation
