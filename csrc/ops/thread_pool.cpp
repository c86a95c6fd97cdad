#include "ops/thread_pool.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "ops/launch.h"

namespace cpr::ops {
namespace {

constexpr int64_t kRangesPerThread = 4;
constexpr std::chrono::milliseconds kLoadIsKnown{2};  // reading the load takes some microseconds

// One call of parallel_for. It lies on the stack of the caller, which returns when no helper is left.
struct Job {
  const int64_t count, size;  // items in all, and in a range
  const cpr_range_body body;
  void* const context;
  int places;                    // for helpers that have not joined yet; guarded by the pool's mutex, as is `helpers`
  int helpers = 0;               // that have joined and not finished
  std::atomic<int64_t> next{0};  // the first item that no thread has taken
  std::condition_variable finished{};

  void take_ranges() {
    for (int64_t begin; (begin = next.fetch_add(size, std::memory_order_relaxed)) < count;)
      body(begin, std::min(begin + size, count), context);
  }
};

class Pool {
 public:
  void run(Job& job) {
    const int helpers = job.places;
    {
      const std::lock_guard lock(mutex_);
      create_threads(helpers);
      open_.push_back(&job);
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.take_ranges();
    std::unique_lock lock(mutex_);
    std::erase(open_, &job);
    job.finished.wait(lock, [&job] { return job.helpers == 0; });
  }

 private:
  // Creates fewer threads if the system has no more.
  void create_threads(int count) {
    if (threads_ >= count) return;
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; threads_ < count; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "cpr_fast");
#endif
    for (std::unique_lock lock(mutex_);;) {
      wake_.wait(lock, [this] { return !open_.empty(); });
      Job& job = *open_.front();
      ++job.helpers;
      if (--job.places == 0) std::erase(open_, &job);
      lock.unlock();
      job.take_ranges();
      lock.lock();
      if (--job.helpers == 0) job.finished.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> open_;  // jobs with places, in the order of their calls
  int threads_ = 0;
};

// It is never destroyed, because its threads run until the process ends. A forked process has none of them and gets
// a new one.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  return new Pool;
}();

// The number of threads of all processes that run or wait for a core; 0 where the system does not tell.
int runnable_threads() {
  static const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  char text[128] = {};
  int runnable = 0;
  if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0) return 0;
  return std::sscanf(text, "%*f %*f %*f %d/", &runnable) == 1 ? runnable : 0;
}

bool is_busy() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<Clock::rep> known_until{0};
  static std::atomic<bool> busy{false};
  const auto now = Clock::now().time_since_epoch();
  if (now.count() >= known_until.load(std::memory_order_relaxed)) {
    static const int64_t cores = sysconf(_SC_NPROCESSORS_ONLN);
    busy.store(runnable_threads() > cores, std::memory_order_relaxed);
    known_until.store((now + Clock::duration(kLoadIsKnown)).count(), std::memory_order_relaxed);
  }
  return busy.load(std::memory_order_relaxed);
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, cpr_range_body body, void* context) {
  const int64_t threads = std::min<int64_t>(num_threads(), (count + grain - 1) / grain);
  if (threads > 1 && is_busy()) {
    const int64_t ranges = threads * kRangesPerThread;
    Job job{count, std::max(grain, (count + ranges - 1) / ranges), body, context, static_cast<int>(threads) - 1};
    pool->run(job);
  } else {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
  }
}

}  // namespace cpr::ops
