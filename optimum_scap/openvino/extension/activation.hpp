// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.hpp"

namespace scap {

enum class Activation { identity, silu, gelu_tanh, gelu_erf, relu, relu2 };

/// exp(x) to about 2e-7, written without branches so that loops over it become vector code. NaN stays NaN.
SCAP_INLINE float exp_approximate(float x) {
    constexpr float kMax = 88.3f;
    constexpr float kMin = -87.3f;
    const float clamped = x > kMax ? kMax : (x < kMin ? kMin : x);
    const float scaled = clamped * 1.44269504f;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
    const float shifted = scaled + 12582912.0f;
    const float n = shifted - 12582912.0f;
    // ln 2 in two parts: n * 0.693359375 is exact.
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const float power = bits_float((float_bits(shifted) + 127u) << 23);
    return p * power;
}

SCAP_INLINE float sigmoid(float x) {
    return 1.0f / (1.0f + exp_approximate(-x));
}

/// erf(x) to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
SCAP_INLINE float erf_approximate(float x) {
    const float a = std::fabs(x);
    const float t = 1.0f / (1.0f + 0.3275911f * a);
    const float p =
        ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return std::copysign(1.0f - p * exp_approximate(-a * a), x);
}

template <Activation Kind>
SCAP_INLINE float activate(float x) {
    if constexpr (Kind == Activation::silu) {
        return x * sigmoid(x);
    } else if constexpr (Kind == Activation::gelu_tanh) {
        // (1 + tanh(u)) / 2 = sigmoid(2 u)
        return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    } else if constexpr (Kind == Activation::gelu_erf) {
        return 0.5f * x * (1.0f + erf_approximate(x * 0.70710678f));
    } else if constexpr (Kind == Activation::relu) {
        return x < 0.0f ? 0.0f : x;
    } else if constexpr (Kind == Activation::relu2) {
        return x < 0.0f ? 0.0f : x * x;
    } else {
        return x;
    }
}

template <Activation Kind>
void activate_all(float* h, const float* up, int64_t n) {
    if (up == nullptr) {
        for (int64_t i = 0; i < n; ++i) {
            h[i] = activate<Kind>(h[i]);
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            h[i] = activate<Kind>(h[i]) * up[i];
        }
    }
}

/// h = activation(h) * up, or activation(h) when `up` is null.
inline void apply_activation(Activation kind, float* h, const float* up, int64_t n) {
    switch (kind) {
        case Activation::identity:
            return activate_all<Activation::identity>(h, up, n);
        case Activation::silu:
            return activate_all<Activation::silu>(h, up, n);
        case Activation::gelu_tanh:
            return activate_all<Activation::gelu_tanh>(h, up, n);
        case Activation::gelu_erf:
            return activate_all<Activation::gelu_erf>(h, up, n);
        case Activation::relu:
            return activate_all<Activation::relu>(h, up, n);
        case Activation::relu2:
            return activate_all<Activation::relu2>(h, up, n);
    }
}

}  // namespace scap
