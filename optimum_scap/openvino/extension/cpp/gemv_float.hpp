// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dequantize.hpp"
#include "panels.hpp"

namespace scap::floats {

// Accumulators of one chunk of columns must fit the registers: 8 vectors on AVX2 and on 128-bit machines.
constexpr int64_t kChunk = simd::kWidth == 4 ? 32 : 64;
constexpr int kVectors = kChunk / simd::kWidth;

template <WeightType Type>
SCAP_INLINE void load_chunk(const uint8_t* p, simd::Float v[kVectors]) {
    for (int64_t i = 0; i < kChunk / 32; ++i) {
        simd::load_columns32<Type>(p + i * bits(Type) * 4, v + i * 32 / simd::kWidth);
    }
}

/// accumulators[c - first_column] += x W of panel p in float32, for columns from first_column up to last_column,
/// rounded up to whole chunks. `values` are the panel's activations; the panels up to last_panel follow.
template <WeightType Type>
void gemv_panel(const Weights& weights, const Panels& panels, int64_t p, int64_t last_panel, const float* values,
                int64_t first_column, int64_t last_column, float* accumulators) {
    constexpr int64_t kChunkBytes = kChunk * bits(Type) / 8;
    constexpr int64_t kPrefetchBytes = kChunkBytes < 256 ? 256 : kChunkBytes;
    const int64_t row_bytes = weights.row_bytes();
    const int64_t first_byte = first_column * bits(Type) / 8;
    const int64_t last_byte = last_column * bits(Type) / 8;
    const Panel& panel = panels.items[p];
    const uint32_t* rows = panels.rows + panel.first;
    // Row k of this panel is followed, past its end, by row k of the next one.
    const Panel* next = p + 1 < last_panel ? &panels.items[p + 1] : nullptr;
    float sum = 0.0f;
    for (int64_t k = 0; k < panel.used; ++k) {
        sum += values[k];
    }
    for (int64_t column = first_column; column < last_column; column += kChunk) {
        const int64_t byte = column * bits(Type) / 8;
        simd::Float total[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            total[i] = simd::set1(0.0f);
        }
        const bool wraps = byte + kPrefetchBytes >= last_byte;
        for (int64_t k = 0; k < panel.used; ++k) {
            const uint8_t* row = weights.row(rows[k]) + byte;
            const uint8_t* ahead = row + kPrefetchBytes;
            if (wraps && next != nullptr) {
                ahead = weights.data + panels.rows[next->first + std::min(k, next->used - 1)] * row_bytes + first_byte +
                        std::max<int64_t>(byte + kPrefetchBytes - last_byte, 0);
            }
            for (int64_t line = 0; line < kChunkBytes; line += 64) {
                prefetch(ahead + line);
            }
            simd::Float w[kVectors];
            load_chunk<Type>(row, w);
            const simd::Float x = simd::set1(values[k]);
            for (int i = 0; i < kVectors; ++i) {
                total[i] = simd::fma(x, w[i], total[i]);
            }
        }
        for (int i = 0; i < kVectors; ++i) {
            const int64_t at = column + i * simd::kWidth;
            if constexpr (is_quantized(Type)) {
                total[i] = centered_sum(total[i], sum, load_zero_point(weights, panel.group, at));
                if (weights.grouped()) {
                    total[i] = scaled(total[i], load_scale(weights, panel.group, at));
                }
            }
            float* accumulator = accumulators + at - first_column;
            simd::store(accumulator, simd::add(simd::load(accumulator), total[i]));
        }
    }
}

}  // namespace scap::floats
