// Arithmetic over one row of float32, for what stands between linear layers. Each result depends on its row alone.
#pragma once

#include <cstdint>

namespace fourfold {

// What an MLP makes of gate g and up u: silu(g) u; gelu(g) u by tanh; or, with g at most and u within +-limit,
// g sigmoid(alpha g) (u + 1).
enum class Activation : int { silu, gelu_tanh, clamped_swish };
struct Gate {
    Activation activation;
    float alpha, limit;
};

// out = x * weight / sqrt(|x|^2 + floor); for rms norm over n: weight = w sqrt(n), floor = n eps. out may be x.
void norm_row(const float* x, const float* weight, float floor, std::int64_t n, float* out);
// out may be gate.
void gate_row(const Gate& kind, const float* gate, const float* up, std::int64_t n, float* out);
// Channel pairs (i, i + d / 2) of a head [d] turn by angles given as cosines [d / 2], then sines [d / 2].
void rotate_row(float* head, const float* angles, std::int64_t d);
float dot_row(const float* a, const float* b, std::int64_t n);
void add_row(const float* x, std::int64_t n, float* sum);
void add_scaled_row(float factor, const float* x, std::int64_t n, float* sum);
void cap_row(float cap, std::int64_t n, float* x);  // x = cap tanh(x / cap)
void scale_row(float factor, std::int64_t n, float* x);
// out = e^((x - largest) factor), 0 below e^-87. Returns the sum and the largest of out.
struct Weighed {
    float sum, largest;
};
Weighed weigh_row(const float* x, float largest, float factor, std::int64_t n, float* out);
void widen_row(const std::uint16_t* bf16, std::int64_t n, float* out);
void narrow_row(const float* x, std::int64_t n, std::uint16_t* bf16);  // to nearest, ties to even
// The largest value's place, the first of several; a NaN counts as largest, as in torch.
std::int64_t argmax_row(const float* x, std::int64_t n);

}  // namespace fourfold
