#include "ops_rows.h"

#include <cmath>
#include <cstring>

namespace fourfold {
namespace {

// nanoseconds for n values, when each takes some instructions of a vector of them
std::int64_t cost(std::int64_t n, std::int64_t passes) { return 50 + n * passes / 16; }

}  // namespace

Embed::Embed(Table table, float scale, Rows out, std::int64_t n)
    : RowOp(cost(n, 8)), table_(table), scale_(scale), out_(out), n_(n) {}

void Embed::rows(const Step& step, std::int64_t begin, std::int64_t end, void*) {
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t token = step.tokens[i];
        float* out = out_.row(i);
        if (table_.wide) std::memcpy(out, table_.wide + token * n_, static_cast<std::size_t>(n_) * 4);
        else if (table_.narrow) widen_row(table_.narrow + token * n_, n_, out);
        else unpack_row(table_.packed, token, out);
        if (scale_ != 1.0f) scale_row(scale_, n_, out);
    }
}

Angles::Angles(std::vector<float> speeds, float scale, Rows out)
    : RowOp(static_cast<std::int64_t>(speeds.size()) * 20), speeds_(std::move(speeds)), scale_(scale), out_(out) {}

void Angles::rows(const Step& step, std::int64_t begin, std::int64_t end, void*) {
    const std::size_t half = speeds_.size();
    for (std::int64_t i = begin; i < end; ++i) {
        const float position = static_cast<float>(step.positions[static_cast<std::size_t>(i)]);
        float* out = out_.row(i);
        for (std::size_t j = 0; j < half; ++j) {
            out[j] = std::cos(position * speeds_[j]) * scale_;
            out[half + j] = std::sin(position * speeds_[j]) * scale_;
        }
    }
}

void Inputs::fill(std::int64_t i, std::int64_t at, const float* x, std::int64_t n, float* scratch) const {
    if (scheme.any()) {
        apply_scheme(scheme, x, n, scratch);
        x = scratch;
    }
    for (const Prepared& to : prepared) {
        if (scheme.codes && to.arithmetic == Arithmetic::int8) prepare_codes(scheme.element, x, n, to.row(i, at));
        else prepare(to.arithmetic, x, n, 1, n, 0, 1, to.row(i, at));
    }
}

RowPathOp::RowPathOp(RowPath path)
    : RowOp(cost(path.n, 4 + 6 * path.gated + 12 * path.inputs.scheme.any()), path.each), path_(std::move(path)) {}

void RowPathOp::rows(const Step&, std::int64_t begin, std::int64_t end, void* scratch) {
    for (std::int64_t i = begin; i < end; ++i) {
        const float* x = path_.x.row(i);
        float* made = path_.out.data && !path_.add ? path_.out.row(i) : static_cast<float*>(scratch);
        if (path_.gated) gate_row(path_.gate, x, x + path_.n, path_.n, made), x = made;
        if (path_.norm) norm_row(x, path_.norm, path_.floor, path_.n, made), x = made;
        path_.inputs.fill(i, 0, x, path_.n, static_cast<float*>(scratch));
        if (path_.add) add_row(x, path_.n, path_.out.row(i));
    }
}

std::int64_t Choose::chunks(const Step& step) {
    const bool moved = step.chosen_rows > 0 && step.chosen[step.chosen_rows - 1] >= step.chosen_rows;
    return moved ? static_cast<std::int64_t>(buffers_.size()) : 0;
}

void Choose::run(const Step& step, std::int64_t chunk, void*) {
    const auto& [rows, n] = buffers_[static_cast<std::size_t>(chunk)];
    for (std::int64_t i = 0; i < step.chosen_rows; ++i)
        if (step.chosen[i] != i) std::memcpy(rows.row(i), rows.row(step.chosen[i]), static_cast<std::size_t>(n) * 4);
}

Heads::Heads(HeadPath path) : RowOp(cost((path.heads + 2 * path.kv_heads) * path.d, 6)), path_(path) {}

void Heads::rows(const Step& step, std::int64_t begin, std::int64_t end, void*) {
    const HeadPath& p = path_;
    for (std::int64_t i = begin; i < end; ++i) {
        float* head = p.qkv.row(i);
        for (std::int64_t h = 0; h < p.heads + p.kv_heads; ++h, head += p.d) {
            if (p.norm) norm_row(head, p.norm + h * p.d, p.floor, p.d, head);
            rotate_row(head, p.angles.row(i), p.d);
        }
    }
    KVWrite write{p.qkv.data + p.heads * p.d, p.qkv.stride, p.kv_heads, p.d,
                  step.cache + p.layer * step.layer_bytes, p.type, p.kv_scales, step.slots.data()};
    write_kv(write, begin, end);
}

}  // namespace fourfold
