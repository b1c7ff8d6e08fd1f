#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "contention.h"
#include "turns.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;

// Inside a walk the next chunks are microseconds away unless the system has put a thread aside; then a waiter
// that sleeps is woken ahead of whoever took its core, where one that spins has used up its share of it.
constexpr auto kSpinInside = std::chrono::microseconds(50);
// Between walks a waiter spins, then offers its core between looks: waking a sleeper costs as much as a layer.
constexpr auto kSpinBetween = std::chrono::microseconds(100);
constexpr auto kYieldBetween = std::chrono::microseconds(500);

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

// What is open, in one word, so that a chunk is taken by one addition: operation, chunks, next chunk.
struct Ticket {
    static constexpr int kBits = 20;
    static constexpr std::uint64_t kMask = (1u << kBits) - 1;
    std::uint64_t word;
    std::int64_t op() const { return static_cast<std::int64_t>(word >> (2 * kBits)); }
    std::uint64_t chunks() const { return (word >> kBits) & kMask; }
    std::uint64_t next() const { return word & kMask; }
    bool valid() const { return next() < chunks(); }
    static std::uint64_t opened(std::int64_t op, std::int64_t chunks) {
        return static_cast<std::uint64_t>(op) << (2 * kBits) | static_cast<std::uint64_t>(chunks) << kBits;
    }
};
// waiters look before they take, so the counter runs over by less than the number of threads
constexpr std::int64_t kMostChunks = Ticket::kMask >> 1;

void walk_alone(Walk& walk, std::int64_t begin, std::int64_t end) {
    for (std::int64_t op = begin; op < end; ++op) {
        std::int64_t chunks = walk.open(op);
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) walk.run(op, chunk, 0);
    }
}

thread_local Turns t_turns;
std::atomic<Team> g_team{nullptr};

class ThreadPool {
public:
    explicit ThreadPool(int count) { start(count); }

    void resize(int count) {
        std::lock_guard<std::mutex> walking(walking_);
        stop();
        start(count);
    }

    void run(Walk& walk, std::int64_t begin, std::int64_t end) {
        std::unique_lock<std::mutex> walking(walking_, std::try_to_lock);
        const Team team = g_team.load();
        if (!walking.owns_lock() || (workers_.empty() && !team)) return walk_alone(walk, begin, end);
        walk_ = &walk;
        end_ = end;
        if (team) return run_in_team(team, begin);
        contention_.start();
        open_next(begin, 0);
        for (Ticket seen = look(); seen.chunks() != 0; seen = look()) {
            if (seen.valid()) {
                take(0);
            } else {
                wait(seen);
                contention_.look();
                call_helpers();
            }
        }
        contention_.stop();
        call_helpers();
    }

private:
    // Its threads come and go by themselves: to be called costs them as much as to find nothing left.
    void run_in_team(Team team, std::int64_t begin) {
        open_next(begin, 0);
        if (look().chunks() == 0) return;
        members_.store(0);
        const auto body = [](void* pool) { static_cast<ThreadPool*>(pool)->take_part(); };
        team(body, this, static_cast<unsigned>(threads()), 0);
    }

    void take_part() {
        const int thread = members_.fetch_add(1);
        for (Ticket seen = look(); seen.chunks() != 0; seen = look()) {
            if (seen.valid()) take(thread);
            else wait(seen);
        }
    }

    void start(int count) {
        if (g_team.load()) count = 1;
        stopping_ = false;
        first_helper_ = count;
        const bool alone = count == 1 || count > available_cores();  // the latter disturb each other
        const int helpers = alone ? 0 : std::min(count, kMostThreads - count);
        for (int i = 1; i < count + helpers; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    void stop() {
        {
            std::lock_guard<std::mutex> guard(sleep_);
            stopping_ = true;
        }
        wake_.notify_all();
        rested_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    // Helpers work while there is contention, or rest.
    void call_helpers() {
        if (contention_.seen() == helping_.load()) return;
        {
            std::lock_guard<std::mutex> guard(sleep_);
            helping_.store(contention_.seen());
        }
        rested_.notify_all();
    }

    void rest() {
        std::unique_lock<std::mutex> guard(sleep_);
        rested_.wait(guard, [&] { return helping_.load() || stopping_.load(); });
    }

    // Opens the first operation from `op` on that has chunks to share; 0 chunks in the cursor: the walk is over.
    void open_next(std::int64_t op, int thread) {
        for (; op < end_; ++op) {
            std::int64_t chunks = walk_->open(op);
            if (chunks > 1) {
                publish(Ticket::opened(op, chunks));
                return;
            }
            if (chunks == 1) walk_->run(op, 0, thread);
        }
        publish(0);
    }

    void publish(std::uint64_t word) {
        done_.store(0, std::memory_order_relaxed);
        cursor_.store(word);
        if (asleep_.load() == 0) return;
        { std::lock_guard<std::mutex> guard(sleep_); }
        wake_.notify_all();
    }

    // Takes a chunk of what is open, unless another was faster, and does it.
    void take(int thread) {
        if (helping_.load(std::memory_order_relaxed)) t_turns.give_way();
        Ticket mine{cursor_.fetch_add(1, std::memory_order_acq_rel)};
        if (!mine.valid()) return;
        walk_->run(mine.op(), static_cast<std::int64_t>(mine.next()), thread);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == mine.chunks()) open_next(mine.op() + 1, thread);
    }

    Ticket look() const { return Ticket{cursor_.load()}; }

    // Whether there is a chunk to take, or another operation (or none) is open than in `seen`.
    bool news(Ticket seen) const {
        Ticket now = look();
        return now.valid() || now.word >> Ticket::kBits != seen.word >> Ticket::kBits || stopping_.load();
    }

    // Spins, between walks also yields, then sleeps until there are news. Where cores are contended for, who
    // is not needed for a walk leaves them to the caller.
    void wait(Ticket seen) {
        const bool inside = seen.chunks() != 0;
        const bool leave = !inside && helping_.load();
        const Clock::duration spin = inside ? kSpinInside : kSpinBetween;
        const Clock::duration patience = leave ? Clock::duration::zero() : inside ? kSpinInside : kYieldBetween;
        const auto start = Clock::now();
        for (auto waited = start - start; waited < patience; waited = Clock::now() - start) {
            if (waited > spin) std::this_thread::yield();
            for (int i = 0; i < 32; ++i) {
                if (news(seen)) return;
                relax();
            }
        }
        std::unique_lock<std::mutex> guard(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(guard, [&] { return news(seen); });
        asleep_.fetch_sub(1);
        t_turns.begin();
    }

    void work(int thread) {
        while (!stopping_.load()) {
            if (thread >= first_helper_ && !helping_.load()) rest();
            Ticket seen = look();
            if (seen.valid()) take(thread);
            else wait(seen);
        }
    }

    alignas(64) std::atomic<std::uint64_t> cursor_{0};
    alignas(64) std::atomic<std::uint64_t> done_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> stopping_{false}, helping_{false};
    std::atomic<int> members_{0};
    Walk* walk_ = nullptr;  // this and end_ are read by who holds a valid ticket
    std::int64_t end_ = 0;
    int first_helper_ = 1;
    Contention contention_;  // of who holds walking_
    std::mutex walking_;     // held by the caller whose walk the workers take part in
    std::mutex sleep_;
    std::condition_variable wake_, rested_;
    std::vector<std::thread> workers_;
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
        if (g_threads.load() == 0) g_threads.store(std::min(available_cores(), kMostThreads));
        g_pool.store(new ThreadPool(g_threads.load()), std::memory_order_release);
    }
    return *g_pool.load();
}

struct Loop final : Walk {
    std::int64_t count, grain;
    Body body;
    const void* context;
    Loop(std::int64_t n, std::int64_t least, Body b, const void* c)
        : count(n), grain(std::max<std::int64_t>({1, least, n / kMostChunks + 1})), body(b), context(c) {}
    std::int64_t open(std::int64_t) override { return (count + grain - 1) / grain; }
    void run(std::int64_t, std::int64_t chunk, int) override {
        body(context, chunk * grain, std::min(count, (chunk + 1) * grain));
    }
};

}  // namespace

void walk(Walk& walk, std::int64_t begin, std::int64_t end) { pool().run(walk, begin, end); }

void parallel_for(std::int64_t count, std::int64_t grain, Body body, const void* context) {
    Loop loop(count, grain, body, context);
    pool().run(loop, 0, 1);
}

int threads() { return g_threads.load() ? g_threads.load() : available_cores(); }

void set_threads(int count) {
    count = std::min(count, kMostThreads);
    if (g_pool.load()) g_pool.load()->resize(count);
    g_threads.store(count);
}

void use_team(Team team) {
    g_team.store(team);
    if (g_pool.load()) g_pool.load()->resize(threads());
}

void expect_contention(bool expected) { Contention::expected.store(expected); }

}  // namespace fourfold
