// Turns on a contended core: a thread that the system puts aside in the middle of a chunk keeps everyone waiting, so
// it goes by itself, between chunks, before its time is up.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fourfold {

// One for each thread. To yield is to give away the rest of the slice that the system has in mind, so slices have to be
// short: Linux takes wishes since 6.12, and whoever has short slices has no smaller share of a core. Where it takes
// none, whole slices would be given away, and no one yields.
class Turns {
public:
    // Called between chunks.
    void give_way() {
        const auto now = Clock::now();
        if (now - begun_ < kTurn) return;
        if (!asked_) short_ = ask_for_short_slices(), asked_ = true;
        if (short_) std::this_thread::yield();
        begin();
    }
    void begin() { begun_ = Clock::now(); }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto kTurn = std::chrono::microseconds(600);
    static constexpr std::uint64_t kSliceNs = 300000;

    static bool ask_for_short_slices() {
#if defined(__linux__) && defined(SYS_sched_setattr)
        struct {  // sched_attr in its first version
            std::uint32_t size, policy;
            std::uint64_t flags;
            std::int32_t nice;
            std::uint32_t priority;
            std::uint64_t runtime, deadline, period;
        } wish{};
        static_assert(sizeof(wish) == 48, "as the kernel has it");
        if (syscall(SYS_sched_getattr, 0, &wish, sizeof(wish), 0) != 0 || wish.policy != 0) return false;
        wish.runtime = kSliceNs;
        if (syscall(SYS_sched_setattr, 0, &wish, 0) != 0) return false;
        return syscall(SYS_sched_getattr, 0, &wish, sizeof(wish), 0) == 0 && wish.runtime == kSliceNs;
#else
        return false;
#endif
    }

    bool asked_ = false, short_ = false;
    Clock::time_point begun_;
};

}  // namespace fourfold
