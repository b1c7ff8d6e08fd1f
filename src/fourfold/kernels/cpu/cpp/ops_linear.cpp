#include "ops_linear.h"

#include <algorithm>
#include <utility>

#include "thread_pool.h"

namespace fourfold {
namespace {

constexpr std::int64_t kScratchValues = 1 << 16;  // sums of a chunk that are added to what is there, or gated
constexpr std::int64_t kChunkNs = 2000;
constexpr std::int64_t kChunksPerThread = 8;
constexpr std::int64_t kTilesPrepared = 32;  // as inputs side by side: 16 blocks
constexpr std::int64_t kFewRows = 32;  // up to so many, reading the weight takes longest

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// One core's time for a tile, roughly: it reads 12 bytes a nanosecond and multiplies 100 bf16 or 200 int8 pairs.
std::int64_t tile_ns(const PackedWeight& w, Arithmetic arithmetic, std::int64_t m) {
    const std::int64_t multiplied = m * kTileRows * w.k / (arithmetic == Arithmetic::int8 ? 200 : 100);
    return std::max<std::int64_t>({1, packed_tile_bytes(w.kind, w.k) / 12, multiplied});
}

}  // namespace

Linear::Linear(LinearPath path)
    : path_(std::move(path)),
      unit_(path_.gated.prepared.empty() ? 1 : 2),
      tiles_(packed_tiles(path_.weight.n) / (path_.sink == Sink::gate ? 2 : 1)) {}

std::int64_t Linear::chunks(const Step& step) {
    rows_ = step.rows;
    const std::int64_t pieces = divide_up(rows_, kRowsTogether);
    cut(std::min(rows_, kRowsTogether), pieces);
    return pieces * ranges_;
}

void Linear::cut(std::int64_t together, std::int64_t pieces) {
    const std::int64_t cost = tile_ns(path_.weight, path_.input.arithmetic, together) * (path_.sink == Sink::gate ? 2 : 1);
    const std::int64_t most = kScratchValues / kTileRows / std::max<std::int64_t>(1, together);
    const bool several = pieces != 1 || path_.sink == Sink::store;  // only the others need scratch
    long_ranges_ = pieces == 1 && together <= kFewRows ? threads() : 0;
    long_ = tiles_ * (together <= 2 ? 31 : 24) / (32 * threads());  // more rows even out less well
    if (!several) long_ = std::min(long_, most);
    long_ -= long_ % unit_;
    if (long_ == 0) long_ranges_ = 0;
    const std::int64_t rest = tiles_ - long_ranges_ * long_;
    const std::int64_t fair = divide_up(rest * pieces, kChunksPerThread * threads());
    const std::int64_t wanted = std::max(fair, kChunkNs / cost);
    grain_ = std::min({wanted, divide_up(rest, threads()), most});
    const bool enough = together > kFewRows && tiles_ * pieces >= 4 * threads() * kTilesPrepared;
    const std::int64_t unit = unit_ > 1 && enough ? kTilesPrepared : unit_;
    grain_ = std::max(unit, grain_ - grain_ % unit);
    ranges_ = long_ranges_ + divide_up(rest, grain_);
}

void Linear::run(const Step&, std::int64_t chunk, void* scratch) {
    const std::int64_t row = chunk / ranges_ * kRowsTogether, range = chunk % ranges_;
    const std::int64_t rows = std::min(kRowsTogether, rows_ - row);
    compute({&path_.weight, row, rows, range, range_begin(range), range_end(range)}, scratch);
}

void Linear::compute(const Piece& piece, void* scratch) {
    if (path_.sink == Sink::add) add(piece, static_cast<float*>(scratch));
    else if (path_.sink == Sink::gate) gate(piece, static_cast<float*>(scratch));
    else multiply(piece, 0, path_.out.row(piece.row), path_.out.stride);
    computed(piece);
}

// The piece's tiles, counted from tile `tile` of the weight on, into columns of `out` as they are counted there.
void Linear::multiply(const Piece& piece, std::int64_t tile, float* out, std::int64_t stride) const {
    const Prepared& input = path_.input;
    const char* x = input.memory + prepared_bytes(input.arithmetic, piece.row, input.k);
    linear(*piece.weight, input.arithmetic, x, piece.rows, out - tile * kTileRows, stride, tile + piece.begin,
           tile + piece.end);
}

void Linear::add(const Piece& piece, float* scratch) const {
    const std::int64_t first = piece.begin * kTileRows, stride = (piece.end - piece.begin) * kTileRows;
    const std::int64_t columns = std::min(stride, path_.weight.n - first);
    multiply(piece, 0, scratch - first, stride);
    for (std::int64_t i = 0; i < piece.rows; ++i)
        add_row(scratch + i * stride, columns, path_.out.row(piece.row + i) + first);
}

void Linear::gate(const Piece& piece, float* scratch) const {
    const std::int64_t first = piece.begin * kTileRows, columns = (piece.end - piece.begin) * kTileRows;
    float* up = scratch + kScratchValues;
    multiply(piece, 0, scratch - first, columns);
    multiply(piece, tiles_, up - first, columns);
    for (std::int64_t i = 0; i < piece.rows; ++i) {
        float* row = scratch + i * columns;
        float* made = unit_ > 1 ? row : path_.out.row(piece.row + i) + first;
        gate_row(path_.gate, row, up + i * columns, columns, made);
        if (unit_ > 1) path_.gated.fill(piece.row + i, first, row, columns, row);
    }
}

void Linear::computed(const Piece&) {}

std::int64_t Linear::scratch_bytes() const { return path_.sink == Sink::store ? 0 : 2 * kScratchValues * 4; }

Logits::Logits(LinearPath path, std::int64_t most_rows, float cap)
    : Linear(path), cap_(cap), best_(new std::int32_t[static_cast<std::size_t>(most_rows * packed_tiles(path.weight.n))]) {}

void Logits::computed(const Piece& piece) {
    const std::int64_t first = piece.begin * kTileRows, last = std::min(piece.end * kTileRows, path_.weight.n);
    for (std::int64_t i = piece.row; i < piece.row + piece.rows; ++i) {
        if (cap_ > 0.0f) cap_row(cap_, last - first, path_.out.row(i) + first);
        const std::int64_t at = first + argmax_row(path_.out.row(i) + first, last - first);
        best_[i * ranges_ + piece.range] = static_cast<std::int32_t>(at);
    }
}

void Argmax::rows(const Step&, std::int64_t begin, std::int64_t end, void*) {
    for (std::int64_t i = begin; i < end; ++i) {
        const float* logits = logits_.path_.out.row(i);
        const std::int32_t* ranges = logits_.best_.get() + i * logits_.ranges_;
        std::int32_t best = ranges[0];
        for (std::int64_t r = 1; r < logits_.ranges_; ++r) {
            const float now = logits[best], next = logits[ranges[r]];
            if (next > now || (next != next && now == now)) best = ranges[r];
        }
        tokens_[i] = best;
    }
}

}  // namespace fourfold
