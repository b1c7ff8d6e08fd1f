// A few persistent threads that walk together over a list of short operations.
//
// An operation is cut into chunks, handed out by one atomic counter; whoever finishes an operation's last chunk
// opens the next one. Nobody waits for a thread, only for chunks: a thread that the system has put aside costs the
// chunk it holds, or nothing when it holds none, and later goes on with whatever is open then. An operation of one
// chunk is done by the thread that opens it, so it costs no meeting at all. The caller takes chunks too; idle
// threads spin for a moment (the next step follows at once), offer their core, then sleep.
//
// The system gives every thread that wants a core the same share of it, so beside other work on the cores one
// thread on each gets half of them. Therefore there are as many helpers again, which rest (and cost nothing) but
// while a walk is seen to be disturbed (contention.h); then, of three that want a core, two are ours, and they take
// turns between chunks (turns.h).
// One walk runs at a time; a second caller, while the first is busy, walks alone.
#pragma once

#include <cstdint>

namespace fourfold {

class Walk {
public:
    virtual ~Walk() = default;
    // How many chunks operation `op` has; 0 skips it. All operations before it are complete.
    virtual std::int64_t open(std::int64_t op) = 0;
    // Does one chunk. `thread` is 0 for the caller, or below kMostThreads.
    virtual void run(std::int64_t op, std::int64_t chunk, int thread) = 0;
};

// Operations [begin, end) in order, each complete before the next is opened.
void walk(Walk& walk, std::int64_t begin, std::int64_t end);

using Body = void (*)(const void* context, std::int64_t begin, std::int64_t end);

// Calls body(context, begin, end) over [0, count) in chunks of at least `grain`, on up to threads() threads.
void parallel_for(std::int64_t count, std::int64_t grain, Body body, const void* context);

constexpr int kMostThreads = 512;
int threads();
void set_threads(int count);  // 1 to kMostThreads, the caller included; waits for a running walk

// OpenMP's GOMP_parallel: body(data) in `threads` threads, flags 0; returns when all have.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
// Walk with another runtime's threads from now on: beside those that spin for their next work own ones would have to
// share their cores. Null: own threads again.
void use_team(Team team);

// For tests: while this is so, helpers take part in every walk.
void expect_contention(bool expected);

}  // namespace fourfold
