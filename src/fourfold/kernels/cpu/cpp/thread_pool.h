// A few persistent threads for loops that last microseconds.
//
// Work is handed out in chunks from a counter, and the caller takes chunks too: a worker that wakes late costs
// nothing but its help. Idle workers spin for a moment (the next layer follows at once), then sleep.
// One loop runs at a time; a second caller, while the first is busy, does its own loop alone.
#pragma once

#include <cstdint>

namespace fourfold {

using Body = void (*)(const void* context, std::int64_t begin, std::int64_t end);

// Calls body(context, begin, end) over [0, count) in chunks of `grain`, on up to threads() threads.
void parallel_for(std::int64_t count, std::int64_t grain, Body body, const void* context);

int threads();
void set_threads(int count);  // count >= 1, the caller included; waits for a running loop

}  // namespace fourfold
