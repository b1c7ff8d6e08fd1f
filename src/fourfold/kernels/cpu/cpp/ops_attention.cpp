#include "ops_attention.h"

#include <algorithm>

#include "thread_pool.h"

namespace fourfold {
namespace {

constexpr std::int64_t kChunksPerThread = 16;  // items differ in size

}  // namespace

std::int64_t AttentionOp::chunks(const Step& step) {
    AttentionProblem& p = path_.problem;
    p.cache = step.cache + path_.layer * step.layer_bytes;
    p.block_size = step.block_size;
    p.spans = step.spans.data();
    p.span_count = static_cast<std::int64_t>(step.spans.size());
    items_ = attention_items(p);
    grain_ = std::max<std::int64_t>(1, items_ / (kChunksPerThread * threads()));
    return (items_ + grain_ - 1) / grain_;
}

void AttentionOp::run(const Step&, std::int64_t chunk, void*) {
    attention(path_.problem, chunk * grain_, std::min((chunk + 1) * grain_, items_));
}

}  // namespace fourfold
