// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "panels.hpp"

namespace scap {

/// Activations as 16-bit integers split into two signed bytes: x = scale * (256 * high + low).
///
/// |q| <= 32639 keeps both halves in int8. 256 rows of u8 weights then still sum to less than 2^31.
constexpr float kLargestQuantized = 32639.0f;
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

/// Writes the high and low bytes of n values; returns the sum of the integers. The largest magnitude must be
/// quantizable.
inline int32_t split_bytes(const float* values, int64_t n, uint32_t largest, int8_t* high, int8_t* low, float* scale) {
    const float inverse = largest == 0 ? 0.0f : kLargestQuantized / bits_float(largest);
    *scale = bits_float(largest) / kLargestQuantized;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = values[i] * inverse;
        const int32_t q = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
        const int32_t h = (q + 128) >> 8;
        high[i] = static_cast<int8_t>(h);
        low[i] = static_cast<int8_t>(q - h * 256);
        sum += q;
    }
    return sum;
}

/// Panels with their activations split into bytes: four bytes of a quad of rows are one dot-product operand.
struct QuantizedPanels {
    int8_t* high = nullptr;
    int8_t* low = nullptr;
    float* scales = nullptr;  // per panel
    int32_t* sums = nullptr;  // per panel, of the integers
};

/// Returns false when some panel is not quantizable (NaN, infinity, far out of range).
inline bool quantize_panels(const Panels& panels, Arena& arena, QuantizedPanels* result) {
    result->high = arena.take<int8_t>(panels.padded_rows);
    result->low = arena.take<int8_t>(panels.padded_rows);
    result->scales = arena.take<float>(panels.count);
    result->sums = arena.take<int32_t>(panels.count);
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const float* values = panels.values + panel.first;
        const uint32_t largest = largest_magnitude(values, panel.padded());
        if (!quantizable(largest)) {
            return false;
        }
        result->sums[p] = split_bytes(values, panel.padded(), largest, result->high + panel.first,
                                      result->low + panel.first, &result->scales[p]);
    }
    return true;
}

}  // namespace scap
