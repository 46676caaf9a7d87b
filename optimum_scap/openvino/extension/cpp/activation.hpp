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

#if defined(SCAP_AVX512)
/// exp(x) for x <= 0, one unit in the last place off at most: 2^n times a polynomial of degree 5 around 0.
SCAP_INLINE __m512 exp_of_negative(__m512 x) {
    const auto constant = [](uint32_t bits) SCAP_INLINE_LAMBDA {
        return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(bits)));
    };
    const __m512 smallest = constant(0xc2aeac50);  // ln of the smallest normal float
    const __mmask16 underflows = _mm512_cmp_ps_mask(x, smallest, _CMP_LT_OS);
    x = _mm512_max_ps(x, smallest);
    __m512 scaled = _mm512_mul_ps(x, constant(0x3fb8aa3b));  // 1 / ln 2
    asm("" : "+v"(scaled));                                  // the compiler is not to fuse product and sum
    const __m512 n = _mm512_roundscale_ps(_mm512_add_ps(scaled, _mm512_set1_ps(0.5f)), _MM_FROUND_TO_NEG_INF);
    const __m512 r = _mm512_fnmadd_ps(n, constant(0x3f317218), x);  // ln 2
    // 2^(n - 1), and twice that at the end
    const __m512i exponent = _mm512_cvtps_epi32(_mm512_sub_ps(n, _mm512_set1_ps(1.0f)));
    const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23);
    __m512 p = constant(0x3c07cfce);
    for (const uint32_t coefficient : {0x3d2b9d0du, 0x3e2aad40u, 0x3efffee3u, 0x3f7ffffbu, 0x3f800000u}) {
        p = _mm512_fmadd_ps(p, r, constant(coefficient));
    }
    p = _mm512_mul_ps(p, _mm512_mask_blend_ps(underflows, _mm512_castsi512_ps(power), _mm512_setzero_ps()));
    return _mm512_mul_ps(p, _mm512_set1_ps(2.0f));
}

/// x / (1 + exp(-x)) as OpenVINO's CPU plugin computes it on AVX-512, bit for bit: see exact.hpp.
SCAP_INLINE __m512 silu(__m512 x) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    const __m512 e = exp_of_negative(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), sign)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 of_negative = _mm512_div_ps(e, _mm512_add_ps(e, one));
    const __mmask16 is_negative = _mm512_test_epi32_mask(_mm512_castps_si512(x), sign);
    return _mm512_mul_ps(_mm512_mask_blend_ps(is_negative, _mm512_sub_ps(one, of_negative), of_negative), x);
}

inline void silu_all(float* h, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 inside = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        __m512 y = silu(_mm512_maskz_loadu_ps(inside, h + i));
        if (up != nullptr) {
            y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(inside, up + i));
        }
        _mm512_mask_storeu_ps(h + i, inside, y);
    }
}
#endif

template <Activation Kind>
void activate_all(float* h, const float* up, int64_t n) {
#if defined(SCAP_AVX512)
    if constexpr (Kind == Activation::silu) {
        silu_all(h, up, n);
        return;
    }
#endif
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
