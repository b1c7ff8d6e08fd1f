// Attention of one layer over the paged cache.
#pragma once

#include "op.h"

namespace fourfold {

struct AttentionPath {
    AttentionProblem problem;  // but for what a step brings: cache, spans
    std::int64_t layer;
};

class AttentionOp final : public Op {
public:
    explicit AttentionOp(AttentionPath path) : path_(path) {}
    std::int64_t chunks(const Step& step) override;
    void run(const Step& step, std::int64_t chunk, void* scratch) override;

private:
    AttentionPath path_;
    std::int64_t items_ = 0, grain_ = 1;
};

}  // namespace fourfold
