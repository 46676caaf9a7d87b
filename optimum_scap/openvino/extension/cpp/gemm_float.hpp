// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemv_float.hpp"

namespace scap::floats {

constexpr int kRowBlock = simd::kWidth == 16 ? 6 : 4;
constexpr int kColumnVectors = simd::kWidth == 16 ? 4 : 2;

/// Dequantizes one chunk of columns of a panel to float32, [used][kChunk].
template <WeightType Type>
void dequantize_chunk(const Weights& weights, const Panels& panels, const Panel& panel, int64_t column, float* out) {
    simd::Float scales[kVectors], zero_points[kVectors];
    if constexpr (is_quantized(Type)) {
        for (int i = 0; i < kVectors; ++i) {
            scales[i] = load_group_scale(weights, panel.group, column + i * simd::kWidth);
            zero_points[i] = load_zero_point(weights, panel.group, column + i * simd::kWidth);
        }
    }
    for (int64_t k = 0; k < panel.used; ++k) {
        simd::Float w[kVectors];
        load_chunk<Type>(weights.row(panels.rows[panel.first + k]) + column * bits(Type) / 8, w);
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (is_quantized(Type)) {
                w[i] = scaled(centered(w[i], zero_points[i]), scales[i]);
            }
            simd::store(out + k * kChunk + i * simd::kWidth, w[i]);
        }
    }
}

/// c[m][n] += sum over k of x[m][rows[k]] * w[k][n] for `Rows` rows and kColumnVectors vectors of columns.
template <int Rows>
void multiply_block(const float* x, int64_t x_pitch, const uint32_t* rows, int64_t used, const float* w, float* c,
                    int64_t c_pitch) {
    simd::Float total[Rows][kColumnVectors];
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < kColumnVectors; ++n) {
            total[m][n] = simd::load(c + m * c_pitch + n * simd::kWidth);
        }
    }
    for (int64_t k = 0; k < used; ++k) {
        for (int m = 0; m < Rows; ++m) {
            const simd::Float value = simd::set1(x[m * x_pitch + rows[k]]);
            for (int n = 0; n < kColumnVectors; ++n) {
                total[m][n] = simd::fma(value, simd::load(w + k * kChunk + n * simd::kWidth), total[m][n]);
            }
        }
    }
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < kColumnVectors; ++n) {
            simd::store(c + m * c_pitch + n * simd::kWidth, total[m][n]);
        }
    }
}

/// c[m][n - first_column] += x W in float32 for all `m_rows` rows of x [m_rows][in] (pruned entries are 0) and the
/// columns from first_column up to last_column, rounded up to whole chunks. `chunk` holds panel rows x kChunk floats.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const float* x, int64_t m_rows, int64_t first_column,
          int64_t last_column, float* chunk, float* c, int64_t c_pitch) {
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const uint32_t* rows = panels.rows + panel.first;
        for (int64_t column = first_column; column < last_column; column += kChunk) {
            dequantize_chunk<Type>(weights, panels, panel, column, chunk);
            for (int64_t n = 0; n < kChunk; n += kColumnVectors * simd::kWidth) {
                float* at = c + column - first_column + n;
                int64_t m = 0;
                for (; m + kRowBlock <= m_rows; m += kRowBlock) {
                    multiply_block<kRowBlock>(x + m * weights.in_features, weights.in_features, rows, panel.used,
                                              chunk + n, at + m * c_pitch, c_pitch);
                }
                for (; m < m_rows; ++m) {
                    multiply_block<1>(x + m * weights.in_features, weights.in_features, rows, panel.used, chunk + n,
                                      at + m * c_pitch, c_pitch);
                }
            }
        }
    }
}

}  // namespace scap::floats
