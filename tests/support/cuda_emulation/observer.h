// What the emulated device tells an observer of its memory. The sanitizer (sanitizer/) implements these functions; in
// the fast build, without CPR_SANITIZE, they do nothing.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulation {

enum class Kind : unsigned { kPlain = 0, kVolatile = 1, kAtomic = 2 };

// The running thread. Times count the barriers of its block: an access of another thread is ordered before the present
// one if it was made before the last barrier of the block, or of the warp if it is of the same warp.
struct Place {
  unsigned launch, block, thread;
  unsigned block_time, warp_time;  // of the last barrier of the block, and of the warp
  unsigned own_time;               // of that, or of the last fence of the thread: what its accesses are marked with
  bool cooperative;
};

constexpr size_t kSharedBytes = 232 * 1024;  // of cpr::dynamic_shared

// The shared memory that a block asked for.
struct SharedWindow {
  const void* begin;
  size_t bytes;
  void* shadow;  // two words for every two bytes, all zero at the start of a launch
};

#ifdef CPR_SANITIZE
void observe_thread(const Place* place, const SharedWindow* shared);  // runs from now on; null: the host runs
void observe_launch(const void* stream, bool cooperative);
void observe_end_of_launch();
void observe_block_barrier();  // all threads of the running block have arrived
void observe_fence();
void observe(const void* address, size_t bytes, bool write, Kind kind, const void* caller);
void observe_copy(const void* to, const void* from, size_t bytes, bool valid, const void* caller);
void observe_copy_done(const void* to, const void* from, size_t bytes, bool valid, const void* caller);
void observe_publication();  // of what the running thread wrote to shared memory, to the products of warpgroups
// A warp begins (or ends, if done) to read 16 bytes of shared memory for a product.
void observe_product(const void* address, bool done, const void* caller);
void observe_fill(const void* to, size_t bytes, const void* stream);
void observe_fault(const char* kind, const char* what, const void* caller);
void print_reports();
#else
inline void observe_thread(const Place*, const SharedWindow*) {}
inline void observe_launch(const void*, bool) {}
inline void observe_end_of_launch() {}
inline void observe_block_barrier() {}
inline void observe_fence() {}
inline void observe(const void*, size_t, bool, Kind, const void*) {}
inline void observe_copy(const void*, const void*, size_t, bool, const void*) {}
inline void observe_copy_done(const void*, const void*, size_t, bool, const void*) {}
inline void observe_publication() {}
inline void observe_product(const void*, bool, const void*) {}
inline void observe_fill(const void*, size_t, const void*) {}
inline void observe_fault(const char*, const char*, const void*) {}
inline void print_reports() {}
#endif

}  // namespace emulation
