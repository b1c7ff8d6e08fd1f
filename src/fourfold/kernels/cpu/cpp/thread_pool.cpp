#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fourfold {
namespace {

// An idle worker spins, then offers its core to others between looks, then sleeps: long enough in all to bridge
// the small operations between two linear layers, since waking a sleeper costs as much as a small layer.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kYield = std::chrono::microseconds(250);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int available_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
    Body body = nullptr;
    const void* context = nullptr;
    std::int64_t count = 0;
    std::int64_t grain = 1;
};

class ThreadPool {
public:
    explicit ThreadPool(int count) { start(count); }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    void resize(int count) {
        std::lock_guard<std::mutex> loop(loop_);
        stop();
        start(count);
    }

    void run(const Job& job) {
        std::unique_lock<std::mutex> loop(loop_, std::try_to_lock);
        if (!loop.owns_lock() || workers_.empty() || job.count <= job.grain) {
            job.body(job.context, 0, job.count);
            return;
        }
        publish(job);
        take_chunks(job);
        close();
    }

private:
    void start(int count) {
        stopping_ = false;
        for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
    }

    void stop() {
        {
            std::lock_guard<std::mutex> guard(state_);
            stopping_ = true;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    void publish(const Job& job) {
        bool anyone_asleep;
        {
            std::lock_guard<std::mutex> guard(state_);
            job_ = job;
            next_.store(0, std::memory_order_relaxed);
            open_ = true;
            generation_.fetch_add(1, std::memory_order_release);
            anyone_asleep = asleep_ > 0;
        }
        if (anyone_asleep) wake_.notify_all();
    }

    void take_chunks(const Job& job) {
        for (;;) {
            std::int64_t begin = next_.fetch_add(job.grain, std::memory_order_relaxed);
            if (begin >= job.count) return;
            job.body(job.context, begin, std::min(begin + job.grain, job.count));
        }
    }

    // After this no worker can enter the loop, and those inside have finished.
    void close() {
        {
            std::lock_guard<std::mutex> guard(state_);
            open_ = false;
        }
        for (int spins = 0; active_.load(std::memory_order_acquire) != 0; ++spins) {
            if (spins < 4096) relax();
            else std::this_thread::yield();
        }
    }

    bool enter(Job& job) {
        std::lock_guard<std::mutex> guard(state_);
        if (!open_) return false;
        job = job_;
        active_.fetch_add(1, std::memory_order_relaxed);
        return true;
    }

    void wait_for_news(std::uint64_t seen) {
        const auto start = std::chrono::steady_clock::now();
        for (auto idle = start - start; idle < kSpin + kYield; idle = std::chrono::steady_clock::now() - start) {
            if (idle > kSpin) std::this_thread::yield();
            for (int i = 0; i < 16; ++i) {
                if (generation_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        }
        std::unique_lock<std::mutex> guard(state_);
        ++asleep_;
        wake_.wait(guard, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        --asleep_;
    }

    void work() {
        std::uint64_t seen = 0;
        for (;;) {
            wait_for_news(seen);
            seen = generation_.load(std::memory_order_acquire);
            {
                std::lock_guard<std::mutex> guard(state_);
                if (stopping_) return;
            }
            Job job;
            if (!enter(job)) continue;
            take_chunks(job);
            active_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex loop_;   // held by the caller whose loop the workers help with
    std::mutex state_;  // guards job_, open_, stopping_, asleep_
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    Job job_;
    bool open_ = false;
    bool stopping_ = false;
    int asleep_ = 0;
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<std::int64_t> next_{0};
    std::atomic<int> active_{0};
};

// The pool is never destroyed: at exit the system ends its threads, which hold nothing that must be closed.
// A forked child has none of the parent's threads, so it forgets the parent's pool and makes its own.
std::atomic<ThreadPool*> g_pool{nullptr};
std::atomic<int> g_threads{0};
std::mutex* g_creation = new std::mutex;

void forget_pool_in_child() {
    g_pool.store(nullptr);
    g_creation = new std::mutex;
}

ThreadPool& pool() {
    ThreadPool* existing = g_pool.load(std::memory_order_acquire);
    if (existing) return *existing;
    std::lock_guard<std::mutex> guard(*g_creation);
    if (!g_pool.load()) {
#if defined(__unix__) || defined(__APPLE__)
        static int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
        (void)registered;
#endif
        if (g_threads.load() == 0) g_threads.store(available_cores());
        g_pool.store(new ThreadPool(g_threads.load()), std::memory_order_release);
    }
    return *g_pool.load();
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, Body body, const void* context) {
    if (count <= 0) return;
    pool().run(Job{body, context, count, std::max<std::int64_t>(1, grain)});
}

int threads() { return g_threads.load() ? g_threads.load() : available_cores(); }

void set_threads(int count) {
    if (g_pool.load()) g_pool.load()->resize(count);
    g_threads.store(count);
}

}  // namespace fourfold
