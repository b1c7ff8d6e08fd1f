#include "drawing.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace fourfold {
namespace {

constexpr std::int64_t kBlock = 256;
constexpr std::int64_t kFewToSort = 32;
constexpr float kFloor = 1e-2f, kLowestFloor = 1e-7f;
constexpr std::uint64_t kTokens = 0xffffffffu;

std::uint64_t key_of(float weight, std::int64_t token) {
    std::uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return (static_cast<std::uint64_t>(bits) << 32) | (kTokens - static_cast<std::uint64_t>(token));
}

std::int32_t token_of(std::uint64_t key) { return static_cast<std::int32_t>(kTokens - (key & kTokens)); }

double weight_of(std::uint64_t key) {
    const auto bits = static_cast<std::uint32_t>(key >> 32);
    float weight;
    std::memcpy(&weight, &bits, 4);
    return weight;
}

double sum_of(const std::uint64_t* begin, const std::uint64_t* end) {
    double sum = 0.0;
    for (; begin != end; ++begin) sum += weight_of(*begin);
    return sum;
}

// 1e-2, 1e-3, .. and at last 0.
float next_floor(float floor) { return floor > kLowestFloor ? floor / 10.0f : 0.0f; }

}  // namespace

void Weights::of(const float* row, std::int64_t n, std::int64_t likeliest, float temperature) {
    row_ = row;
    n_ = n;
    shift_ = row[likeliest];
    factor_ = 1.0f / temperature;
    weights_.resize(static_cast<std::size_t>(std::max(n, kBlock)));
}

Weighed Weights::weigh(std::int64_t block, float* out) const {
    return weigh_row(row_ + block * kBlock, shift_, factor_, std::min(kBlock, n_ - block * kBlock), out);
}

void Weights::weigh_all(bool stay) {
    const std::int64_t blocks = (n_ + kBlock - 1) / kBlock;
    total_ = 0.0;
    sums_.resize(static_cast<std::size_t>(blocks));
    largest_.resize(static_cast<std::size_t>(blocks));
    for (std::int64_t b = 0; b < blocks; ++b) {
        const Weighed found = weigh(b, weights_.data() + (stay ? b * kBlock : 0));
        sums_[static_cast<std::size_t>(b)] = found.sum;
        largest_[static_cast<std::size_t>(b)] = found.largest;
        total_ += found.sum;
    }
}

std::int64_t Weights::draw(const Filters& filters, double uniform) {
    const bool fewer = filters.top_k > 0 && filters.top_k < n_;
    const bool all = !fewer && filters.top_p >= 1.0 && filters.min_p <= 0.0f;
    weigh_all(!all);
    if (all) return look_up(uniform);
    double whole = total_;
    if (fewer) {
        collect_count(filters.top_k);
        keep(last_of(filters.top_k) & ~kTokens);  // with all that are as heavy as the last
        whole = kept_sum();
    } else if (filters.top_p >= 1.0) {
        collect(filters.min_p);
    }
    if (filters.top_p < 1.0) {
        if (!fewer) collect_sum(filters.top_p * whole);
        keep(last_below(filters.top_p * whole));
    }
    if (filters.min_p > 0.0f) keep(key_of(filters.min_p, static_cast<std::int64_t>(kTokens)));
    return look_up_kept(uniform);
}

std::vector<std::int32_t> Weights::likeliest(std::int64_t count) {
    count = std::min(count, n_);
    collect_count(count);
    std::vector<std::int32_t> tokens;
    for (const Key* key = candidates_.data(); key != end_; ++key) tokens.push_back(token_of(*key));
    // by logits: the lightest all weigh 0
    std::partial_sort(tokens.begin(), tokens.begin() + count, tokens.end(), [row = row_](std::int32_t a, std::int32_t b) {
        return row[a] > row[b] || (row[a] == row[b] && a < b);
    });
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
}

// Candidates are the tokens that weigh at least `floor`.
void Weights::collect(float floor) {
    candidates_.resize(static_cast<std::size_t>(n_) + 1);  // one more is written than counted
    Key* key = candidates_.data();
    for (std::size_t b = 0; b < largest_.size(); ++b) {
        if (largest_[b] < floor) continue;
        const auto begin = static_cast<std::int64_t>(b) * kBlock, end = std::min(begin + kBlock, n_);
        for (std::int64_t token = begin; token < end; ++token) {
            const float weight = weights_[static_cast<std::size_t>(token)];
            *key = key_of(weight, token);
            key += weight >= floor ? 1 : 0;
        }
    }
    end_ = key;
}

// At least the `count` heaviest are candidates.
void Weights::collect_count(std::int64_t count) {
    float floor = kFloor;
    for (collect(floor); end_ - candidates_.data() < count; collect(floor)) floor = next_floor(floor);
}

// So many of the heaviest are candidates that they weigh `enough`, or all.
void Weights::collect_sum(double enough) {
    float floor = kFloor;
    for (collect(floor); floor > 0.0f && kept_sum() < enough; collect(floor)) floor = next_floor(floor);
}

double Weights::kept_sum() const { return sum_of(candidates_.data(), end_); }

// The `count`-th heaviest candidate.
Weights::Key Weights::last_of(std::int64_t count) {
    order_.assign(candidates_.data(), end_);
    const auto last = order_.begin() + (count - 1);
    std::nth_element(order_.begin(), last, order_.end(), std::greater<>());
    return *last;
}

// The last candidate, from the heaviest on, before which they weigh less than `enough`; the heaviest in any case.
Weights::Key Weights::last_below(double enough) {
    order_.assign(candidates_.data(), end_);
    Key *begin = order_.data(), *end = begin + order_.size();
    double before = 0.0;
    while (end - begin > kFewToSort) {  // only in the half where it is must there be order
        Key* middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, std::greater<>());
        const double sum = before + sum_of(begin, middle);
        if (sum < enough) begin = middle, before = sum;
        else end = middle;
    }
    std::sort(begin, end, std::greater<>());
    Key last = *begin;
    for (; begin != end && before < enough; ++begin) {
        last = *begin;
        before += weight_of(last);
    }
    return last;
}

// Candidates that come before or at `from` in the order of weights stay.
void Weights::keep(Key from) {
    end_ = std::remove_if(candidates_.data(), end_, [from](Key key) { return key < from; });
}

// The token at which the running sum of weights exceeds the share `uniform` of the whole: its block, then itself.
std::int64_t Weights::look_up(double uniform) {
    const double target = uniform * total_;
    std::size_t block = 0;
    double before = 0.0;
    while (block + 1 < sums_.size() && before + sums_[block] <= target) before += sums_[block++];
    const auto first = static_cast<std::int64_t>(block) * kBlock, count = std::min(kBlock, n_ - first);
    weigh(static_cast<std::int64_t>(block), weights_.data());
    // the block's sum, added up in another order, may differ in its last bits
    double inner = 0.0, running = 0.0;
    for (std::int64_t i = 0; i < count; ++i) inner += weights_[static_cast<std::size_t>(i)];
    const double share = (target - before) / sums_[block] * inner;
    std::int64_t drawn = 0;
    for (std::int64_t i = 0; i < count && running <= share; ++i) {
        const float weight = weights_[static_cast<std::size_t>(i)];
        if (weight > 0.0f) drawn = i;
        running += weight;
    }
    return first + drawn;
}

std::int64_t Weights::look_up_kept(double uniform) const {
    const double target = uniform * kept_sum();
    double running = 0.0;
    Key drawn = *candidates_.data();
    for (const Key* key = candidates_.data(); key != end_ && running <= target; ++key) {
        if (weight_of(*key) > 0.0) drawn = *key;
        running += weight_of(*key);
    }
    return token_of(drawn);
}

}  // namespace fourfold
