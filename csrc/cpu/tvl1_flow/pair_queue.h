// Frame pairs, divided among threads while they are solved.
//
// A pair takes from a fifth to several times the average, and on a machine with other load the threads are not equally
// fast. Therefore each thread takes more pairs when it has solved its previous ones, and ends when none are left;
// the caller waits for the others in a blocking join. OpenMP, which torch uses, gives every thread an equal share in
// advance, and threads that have finished wait actively, which uses CPU time that another process could use.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace cpr::tvl1 {

// Hands out the pairs 0 .. count - 1 in runs, each to one thread: long runs first, because consecutive pairs of a clip
// share a frame, and single pairs at the end, so that all threads end together.
class PairQueue {
 public:
  PairQueue(int64_t count, int threads) : count_(count), threads_(threads) {}

  // The next run [begin, end); false if no pair is left.
  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= count_) return false;
      end = begin + std::max<int64_t>(1, (count_ - begin) / (4 * threads_));
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  const int64_t count_, threads_;
  std::atomic<int64_t> next_{0};
};

// Calls work() in `threads` threads, including the caller, and returns when all have ended. Uses fewer threads if the
// system cannot create more. work() must not throw.
template <class Work>
void run_in_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads > 1 ? threads - 1 : 0);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // the limit of threads is reached: those that run do all the work
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace cpr::tvl1
