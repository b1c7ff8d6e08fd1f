#include "ops_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fourfold {
namespace {

constexpr std::int64_t kExpertsTogether = 8;  // of a chunk of the router
constexpr std::int64_t kTokensTogether = 8;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// The places of the largest k, of equals the first; a NaN counts as the largest.
void choose(float* logits, std::int64_t n, std::int64_t k, std::int32_t* places, float* values) {
    for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t best = argmax_row(logits, n);
        places[j] = static_cast<std::int32_t>(best);
        values[j] = logits[best];
        logits[best] = -INFINITY;
    }
}

void sort_by_place(std::int32_t* places, float* values, std::int64_t k) {
    for (std::int64_t j = 1; j < k; ++j)
        for (std::int64_t l = j; l > 0 && places[l] < places[l - 1]; --l) {
            std::swap(places[l], places[l - 1]);
            std::swap(values[l], values[l - 1]);
        }
}

}  // namespace

Routing::Routing(std::int64_t rows, std::int64_t k, std::int64_t count)
    : top_k(k),
      logits(at(rows * count)),
      experts(at(rows * k)),
      shares(at(rows * k)),
      slots(at(rows * k)),
      row(at(rows * k)),
      first(at(count + 1)) {}

std::int64_t Score::chunks(const Step& step) {
    const std::int64_t ranges = (routing_.count() + kExpertsTogether - 1) / kExpertsTogether;
    return (step.rows + kTokensTogether - 1) / kTokensTogether * ranges;
}

void Score::run(const Step& step, std::int64_t chunk, void*) {
    const std::int64_t count = routing_.count(), ranges = (count + kExpertsTogether - 1) / kExpertsTogether;
    const std::int64_t row = chunk / ranges * kTokensTogether, first = chunk % ranges * kExpertsTogether;
    for (std::int64_t e = first; e < std::min(first + kExpertsTogether, count); ++e)
        for (std::int64_t i = row; i < std::min(row + kTokensTogether, step.rows); ++i)
            routing_.logits[at(i * count + e)] = dot_row(x_.row(i), weight_ + e * n_, n_) + (bias_ ? bias_[e] : 0.0f);
}

void Route::rows(const Step&, std::int64_t begin, std::int64_t end, void*) {
    const std::int64_t k = routing_.top_k, count = routing_.count();
    for (std::int64_t i = begin; i < end; ++i) {
        float* logits = routing_.logits.data() + i * count;
        std::int32_t* places = routing_.experts.data() + i * k;
        float* shares = routing_.shares.data() + i * k;
        const float largest = logits[argmax_row(logits, count)];
        float sum = 0.0f;
        if (!among_chosen_)
            for (std::int64_t e = 0; e < count; ++e) sum += std::exp(logits[e] - largest);
        choose(logits, count, k, places, shares);
        for (std::int64_t j = 0; j < k; ++j) {
            shares[j] = std::exp(shares[j] - largest);
            if (among_chosen_) sum += shares[j];
        }
        for (std::int64_t j = 0; j < k; ++j) shares[j] /= sum;
        sort_by_place(places, shares, k);
    }
}

void Group::run(const Step& step, std::int64_t, void*) {
    Routing& r = routing_;
    const std::int64_t slots = step.rows * r.top_k;
    std::fill(r.first.begin(), r.first.end(), 0);
    for (std::int64_t i = 0; i < slots; ++i) ++r.first[at(r.experts[at(i)]) + 1];
    for (std::size_t e = 1; e < r.first.size(); ++e) r.first[e] += r.first[e - 1];
    std::vector<std::int32_t> next(r.first.begin(), r.first.end() - 1);
    for (std::int64_t i = 0; i < slots; ++i) {
        const std::int32_t slot = next[at(r.experts[at(i)])]++;
        r.slots[at(i)] = slot;
        r.row[at(slot)] = static_cast<std::int32_t>(i / r.top_k);
    }
}

Gather::Gather(const Routing& routing, Prepared from, Prepared to)
    : RowOp(50 + from.k / 32, routing.top_k), routing_(routing), from_(from), to_(to) {}

void Gather::rows(const Step&, std::int64_t begin, std::int64_t end, void*) {
    const std::int64_t bytes = prepared_bytes(from_.arithmetic, 1, from_.k);
    for (std::int64_t i = begin; i < end; ++i)
        std::memcpy(to_.memory + i * bytes, from_.memory + routing_.row[at(i)] * bytes, at(bytes));
}

ExpertLinear::ExpertLinear(const Routing& routing, LinearPath path, std::vector<PackedWeight> weights)
    : Linear(path), routing_(routing), weights_(std::move(weights)) {
    pieces_.reserve(weights_.size());
}

std::int64_t ExpertLinear::chunks(const Step&) {
    pieces_.clear();
    std::int64_t most = 1;
    for (std::size_t e = 0; e < weights_.size(); ++e)
        for (std::int64_t row = routing_.first[e]; row < routing_.first[e + 1]; row += kRowsTogether) {
            pieces_.push_back({&weights_[e], row, std::min<std::int64_t>(kRowsTogether, routing_.first[e + 1] - row), 0, 0, 0});
            most = std::max(most, pieces_.back().rows);
        }
    cut(most, static_cast<std::int64_t>(pieces_.size()));
    return static_cast<std::int64_t>(pieces_.size()) * ranges_;
}

void ExpertLinear::run(const Step&, std::int64_t chunk, void* scratch) {
    Piece piece = pieces_[at(chunk / ranges_)];
    piece.range = chunk % ranges_;
    piece.begin = range_begin(piece.range);
    piece.end = range_end(piece.range);
    compute(piece, scratch);
}

Combine::Combine(const Routing& routing, Rows x, std::int64_t n, Rows out, bool accumulate)
    : RowOp(50 + n * routing.top_k / 16), routing_(routing), x_(x), n_(n), out_(out), accumulate_(accumulate) {}

void Combine::rows(const Step&, std::int64_t begin, std::int64_t end, void*) {
    const std::int64_t k = routing_.top_k;
    for (std::int64_t i = begin; i < end; ++i) {
        if (!accumulate_) std::fill_n(out_.row(i), n_, 0.0f);
        for (std::int64_t j = i * k; j < (i + 1) * k; ++j)
            add_scaled_row(routing_.shares[at(j)], x_.row(routing_.slots[at(j)]), n_, out_.row(i));
    }
}

}  // namespace fourfold
