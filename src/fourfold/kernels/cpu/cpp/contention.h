// Whether other work takes turns with a caller's walks on the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>

namespace fourfold {

// Through a quiet walk the caller runs, or spins. When it ran for much less than the walk took, it was put aside
// itself, or it slept because the holder of a chunk was.
class Contention {
public:
    bool seen() const { return left_ > Duration::zero() || expected.load(std::memory_order_relaxed); }

    // A walk goes on from here to stop(), and look() is called within it, so that a long one need not end first.
    void start() {
        start_ = Clock::now();
        processor_start_ = processor_time();
    }
    void stop() {
        const Duration wall = Clock::now() - start_;
        if (seen()) {
            left_ -= std::min(left_, wall);
            return;
        }
        wall_ += wall;
        processor_ += processor_time() - processor_start_;
        if (wall_ < kWatch) return;
        if (processor_ < wall_ * 3 / 4) left_ = kSeen;
        wall_ = processor_ = Duration::zero();
    }
    void look() {
        if (Clock::now() - start_ > kWatch / 4) stop(), start();
    }

    static inline std::atomic<bool> expected{false};  // for tests: as if it were always seen

private:
    using Clock = std::chrono::steady_clock;
    using Duration = Clock::duration;
    // Of walks. What is seen holds for many times as long as it took to see, since the helpers that it calls disturb
    // the caller too, and have to rest for the next look.
    static constexpr Duration kWatch = std::chrono::milliseconds(40), kSeen = std::chrono::milliseconds(640);

    static Duration processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
        timespec time;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
#else
        return Clock::now().time_since_epoch();
#endif
    }

    Clock::time_point start_;
    Duration processor_start_{}, wall_{}, processor_{}, left_{};
};

}  // namespace fourfold
