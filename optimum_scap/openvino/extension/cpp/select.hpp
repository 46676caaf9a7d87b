// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "simd.hpp"

namespace scap {

/// Which activations are kept: scale_i * |x_i - mode| > threshold, every operation rounded once to float32.
/// NaN is kept.
struct Threshold {
    float mode = 0.0f;
    float threshold = 0.0f;
    const float* scale = nullptr;  // per channel; null: 1

    /// For the channels from `channel` on.
    Threshold from(int64_t channel) const {
        return Threshold{mode, threshold, scale == nullptr ? nullptr : scale + channel};
    }
};

/// What is compared with the threshold.
template <bool Scaled>
SCAP_INLINE float importance(float difference, const float* scale, int64_t i) {
    return Scaled ? std::fabs(difference) * scale[i] : std::fabs(difference);
}

template <bool Scaled>
int64_t select_channels(const float* x, int64_t n, Threshold t, uint32_t* channels, float* values) {
    int64_t kept = 0;
    int64_t i = 0;
#if defined(SCAP_AVX512)
    const __m512 mode = _mm512_set1_ps(t.mode);
    const __m512 threshold = _mm512_set1_ps(t.threshold);
    __m512i channel = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i < n; i += 16) {
        const __mmask16 valid = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        const __m512 difference = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, x + i), mode);
        __m512 compared = _mm512_abs_ps(difference);
        if constexpr (Scaled) {
            compared = _mm512_mul_ps(compared, _mm512_maskz_loadu_ps(valid, t.scale + i));
        }
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(valid, compared, threshold, _CMP_NLE_UQ);
        // Compressing in a register and storing it whole is several times faster than a compressing store.
        _mm512_storeu_si512(channels + kept, _mm512_maskz_compress_epi32(keep, channel));
        _mm512_storeu_ps(values + kept, _mm512_maskz_compress_ps(keep, difference));
        kept += __builtin_popcount(keep);
        channel = _mm512_add_epi32(channel, _mm512_set1_epi32(16));
    }
#else
    for (; i < n; ++i) {
        const float difference = x[i] - t.mode;
        channels[kept] = static_cast<uint32_t>(i);
        values[kept] = difference;
        kept += !(importance<Scaled>(difference, t.scale, i) <= t.threshold);
    }
#endif
    return kept;
}

/// Writes the channels that are kept and their x - mode; returns how many.
/// `channels` and `values` need room for `n` + 16 elements.
inline int64_t select_channels(const float* x, int64_t n, Threshold t, uint32_t* channels, float* values) {
    return (t.scale == nullptr ? select_channels<false> : select_channels<true>)(x, n, t, channels, values);
}

template <bool Scaled>
void mask_channels(const float* x, int64_t n, Threshold t, float* out, uint32_t* magnitude) {
    for (int64_t i = 0; i < n; ++i) {
        const float difference = x[i] - t.mode;
        out[i] = importance<Scaled>(difference, t.scale, i) <= t.threshold ? 0.0f : difference;
        const uint32_t bits = float_bits(out[i]) & 0x7fffffffu;
        magnitude[i] = magnitude[i] < bits ? bits : magnitude[i];
    }
}

/// Dense form for many rows: out = kept ? x - mode : 0, and magnitude[i] = max(magnitude[i], bits of |out|).
inline void mask_channels(const float* x, int64_t n, Threshold t, float* out, uint32_t* magnitude) {
    (t.scale == nullptr ? mask_channels<false> : mask_channels<true>)(x, n, t, out, magnitude);
}

}  // namespace scap
