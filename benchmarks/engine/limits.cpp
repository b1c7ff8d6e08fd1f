// The roofs of a machine, in one run: bytes a second from memory, int8 and bfloat16 operations a second.
// Compiled by limits.py with -march=native; prints one JSON object. The operations are AVX-512's dot products
// (VNNI, BF16); a machine without them has no such roof here, and the compiler says so.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kBytes = 512ll << 20;  // more than any cache
constexpr int kRepeats = 5;

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best of kRepeats: time of `work(thread)` on all threads, started together.
double best(int threads, const std::function<void(int)>& work) {
    double least = 1e9;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        const double begin = seconds();
        std::vector<std::thread> pool;
        for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
        work(0);
        for (auto& thread : pool) thread.join();
        least = std::min(least, seconds() - begin);
    }
    return least;
}

volatile uint64_t sink;

void read_all(const uint64_t* data, int64_t words) {
    uint64_t sums[32] = {};
    for (int64_t i = 0; i < words; i += 32)
        for (int j = 0; j < 32; ++j) sums[j] += data[i + j];
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    sink = sum;
}

#if !defined(__AVX512VNNI__) || !defined(__AVX512BF16__)
#error "The roofs of arithmetic are those of AVX-512 VNNI and BF16, which this machine does not have."
#endif

constexpr int kChains = 12;  // enough to hide the latency of one
constexpr int64_t kRounds = 10'000'000;

// kChains sums, each changed kRounds times by `step`; 64 bytes of one factor by 64 of the other. The sums have
// names, since an array of them would live in memory, and that is what would be measured.
template <typename Vector, typename Step>
void chains(Vector a, Step step) {
    Vector b = a, c = a, d = a, e = a, f = a, g = a, h = a, k = a, l = a, m = a, n = a;
    for (int64_t i = 0; i < kRounds; ++i) {
        a = step(a), b = step(b), c = step(c), d = step(d), e = step(e), f = step(f);
        g = step(g), h = step(h), k = step(k), l = step(l), m = step(m), n = step(n);
        asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f));
        asm volatile("" : "+v"(g), "+v"(h), "+v"(k), "+v"(l), "+v"(m), "+v"(n));
    }
}

void int8_products() {
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
    chains(_mm512_setzero_si512(), [=](__m512i s) { return _mm512_dpbusd_epi32(s, a, b); });
}

void bf16_products() {
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80);
    chains(_mm512_setzero_ps(), [=](__m512 s) { return _mm512_dpbf16_ps(s, a, a); });
}

// Operations a second, a multiplication and an addition each, of `work` that makes `values` products a step.
double operations(int threads, int values, const std::function<void(int)>& work) {
    return 2.0 * values * kChains * kRounds * threads / best(threads, work);
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const int64_t words = kBytes / 8 / threads / 32 * 32;
    std::vector<uint64_t> data(words * threads, 1);
    const double read_s = best(threads, [&](int t) { read_all(data.data() + t * words, words); });
    const double int8 = operations(threads, 64, [](int) { int8_products(); });
    const double bf16 = operations(threads, 32, [](int) { bf16_products(); });
    std::printf("{\"read_bytes_s\": %.4g, \"int8_ops_s\": %.4g, \"bf16_ops_s\": %.4g}\n",
                words * 8.0 * threads / read_s, int8, bf16);
}
