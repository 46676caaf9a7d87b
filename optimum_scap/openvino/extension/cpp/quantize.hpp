// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "panels.hpp"

namespace scap {

/// Activations as 16-bit integers split into two signed bytes: x = scale * (256 * high + low).
///
/// |q| <= 32639 keeps both halves in int8. 256 rows of u8 weights then still sum to less than 2^31.
constexpr float kLargestQuantized = 32639.0f;
constexpr float kLargestByte = 127.0f;
constexpr int64_t kMaxQuantizedRows = 256;

/// Outside this range (zero is inside) the integer form loses everything: such inputs take the float kernels.
inline bool quantizable(uint32_t largest_magnitude) {
    return largest_magnitude == 0 || (largest_magnitude > float_bits(1e-30f) && largest_magnitude < float_bits(1e30f));
}

inline uint32_t largest_magnitude(const float* values, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::max(largest, magnitude(values[i]));
    }
    return largest;
}

/// store(i, q) for the integer q of each of n values, scale * q being the value; returns the sum of the integers. The
/// largest magnitude must be quantizable. `store` is a SCAP_INLINE_LAMBDA.
template <class Store>
SCAP_INLINE int32_t for_each_quantized(const float* values, int64_t n, uint32_t largest, float largest_integer,
                                       float* scale, const Store& store) {
    const float inverse = largest == 0 ? 0.0f : largest_integer / bits_float(largest);
    *scale = bits_float(largest) / largest_integer;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = values[i] * inverse;
        const int32_t q = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
        store(i, q);
        sum += q;
    }
    return sum;
}

/// Writes the integers of n values as they are.
inline int32_t quantize(const float* values, int64_t n, uint32_t largest, int16_t* q, float* scale) {
    return for_each_quantized(values, n, largest, kLargestQuantized, scale,
                              [&](int64_t i, int32_t value) SCAP_INLINE_LAMBDA {
                                  q[i] = static_cast<int16_t>(value);
                              });
}

/// Writes their high and low bytes.
inline int32_t split_bytes(const float* values, int64_t n, uint32_t largest, int8_t* high, int8_t* low, float* scale) {
    return for_each_quantized(values, n, largest, kLargestQuantized, scale,
                              [&](int64_t i, int32_t value) SCAP_INLINE_LAMBDA {
                                  const int32_t h = (value + 128) >> 8;
                                  high[i] = static_cast<int8_t>(h);
                                  low[i] = static_cast<int8_t>(value - h * 256);
                              });
}

/// Writes n values as one byte each, x = scale * q with |q| <= 127.
inline int32_t to_bytes(const float* values, int64_t n, uint32_t largest, int8_t* q, float* scale) {
    return for_each_quantized(values, n, largest, kLargestByte, scale,
                              [&](int64_t i, int32_t value) SCAP_INLINE_LAMBDA {
                                  q[i] = static_cast<int8_t>(value);
                              });
}

}  // namespace scap
