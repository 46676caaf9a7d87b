// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "simd.hpp"

namespace scap {

/// Which activations are kept: |x - mode| > threshold, compared in float32. NaN is kept.
struct Threshold {
    float mode = 0.0f;
    float threshold = 0.0f;
};

/// Writes the channels with |x - mode| > threshold and their x - mode; returns how many.
/// `channels` and `values` need room for `n` + 16 elements.
inline int64_t select_channels(const float* x, int64_t n, Threshold t, uint32_t* channels, float* values) {
    int64_t kept = 0;
    int64_t i = 0;
#if defined(SCAP_AVX512)
    const __m512 mode = _mm512_set1_ps(t.mode);
    const __m512 threshold = _mm512_set1_ps(t.threshold);
    __m512i channel = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i < n; i += 16) {
        const __mmask16 valid = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        const __m512 difference = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, x + i), mode);
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(difference), threshold, _CMP_NLE_UQ);
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
        kept += !(std::fabs(difference) <= t.threshold);
    }
#endif
    return kept;
}

/// Dense form for many rows: out = kept ? x - mode : 0, and magnitude[i] = max(magnitude[i], bits of |out|).
inline void mask_channels(const float* x, int64_t n, Threshold t, float* out, uint32_t* magnitude) {
    for (int64_t i = 0; i < n; ++i) {
        const float difference = x[i] - t.mode;
        out[i] = std::fabs(difference) <= t.threshold ? 0.0f : difference;
        const uint32_t bits = float_bits(out[i]) & 0x7fffffffu;
        magnitude[i] = magnitude[i] < bits ? bits : magnitude[i];
    }
}

}  // namespace scap
