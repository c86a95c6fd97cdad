// Which accesses of one block are ordered before those of another, in a cooperative launch: those before a fence that
// is followed by a strong write (volatile or atomic) of a word which the other block reads by a strong read, followed
// by a fence. A barrier of the block extends both sides to its other threads.
#pragma once

#include <stdint.h>

#include <unordered_map>
#include <vector>

#include "../observer.h"

namespace emulation {

class BlockOrder {
 public:
  void start();
  void fence(const Place& thread);
  void block_barrier(const Place& thread);
  void strong_write(const Place& thread, const void* address);
  void strong_read(const Place& thread, const void* address);
  // Whether an access by `thread` of `block` at `time` is ordered before what the thread `now` does.
  bool ordered(const Place& now, unsigned block, unsigned time, unsigned thread) const;

 private:
  // What is known of a block: its accesses at times below `before`, and those of one thread up to `time`.
  struct Known {
    unsigned before = 0, thread = 0, time = 0;
  };
  using Clock = std::unordered_map<unsigned, Known>;  // by block
  struct Thread {
    Clock released, read, acquired;  // what its strong writes publish; what it has read; that after a fence
  };
  static void join(Clock& into, const Clock& from);
  static uint64_t key(const Place& thread) { return static_cast<uint64_t>(thread.block) << 32 | thread.thread; }

  std::unordered_map<unsigned, Clock> blocks_;
  std::unordered_map<uint64_t, Thread> threads_;
  std::unordered_map<const void*, Clock> words_;
};

}  // namespace emulation
