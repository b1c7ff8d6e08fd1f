// Whether bytes are those that were written: FNV-1a over words of eight bytes, in four chains so that it runs as fast
// as memory. Each step is one to one, so no single changed word goes unseen, and others by a chance of 2^-64. It
// guards against damage, not against anyone who means it.
#include <cstring>

#include "packed.h"

namespace fourfold {
namespace {

constexpr std::uint64_t kPrime = 0x9E3779B97F4A7C15u;  // odd; more of its bits are set than of FNV's own

std::uint64_t step(std::uint64_t hash, std::uint64_t word) {
    hash = (hash ^ word) * kPrime;
    return hash ^ (hash >> 32);
}

}  // namespace

std::uint64_t packed_checksum(const std::uint8_t* bytes, std::int64_t count) {
    std::uint64_t chains[4] = {1, 2, 3, 4}, words[4];
    std::int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        std::memcpy(words, bytes + i, 32);
        for (int c = 0; c < 4; ++c) chains[c] = step(chains[c], words[c]);
    }
    std::memset(words, 0, 32);
    std::memcpy(words, bytes + i, static_cast<std::size_t>(count - i));
    std::uint64_t hash = static_cast<std::uint64_t>(count);
    for (int c = 0; c < 4; ++c) hash = step(step(hash, words[c]), chains[c]);
    return hash;
}

}  // namespace fourfold
