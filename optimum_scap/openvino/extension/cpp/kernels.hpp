// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemm_amx_bf16.hpp"
#include "gemm_amx_int8.hpp"
#include "gemm_float.hpp"
#include "gemm_vnni.hpp"
#include "gemv_float.hpp"
#include "gemv_vnni.hpp"

/// Which kernel a layer takes, and what becomes of its sums.
namespace scap {

/// How exactly activations enter the products.
///   f32: float32 throughout.
///   split: two bytes (quantized weights) or two bf16 (float weights, many rows): relative error below 1e-3.
///   bf16: like split, but float weights and many rows use plain bf16, as OpenVINO does under a bf16 hint.
enum class Precision { f32, split, bf16 };

/// activation_group_size: with quantized weights and many rows, at most so many channels of a row share one scale, and
/// each has one byte; 0 is two bytes. OpenVINO's DYNAMIC_QUANTIZATION_GROUP_SIZE means the same.
constexpr int64_t kSmallestActivationGroup = 16;
struct Arithmetic {
    Precision precision = Precision::split;
    int64_t activation_group_size = 0;
};

enum class Kernel { floats, int8, bf16 };

// Panel heights of the float kernels: one row per stream that the prefetchers follow (one row), or as many as make
// writing the accumulators back cheap (many rows).
constexpr int64_t kDecodePanelRows = 32;
constexpr int64_t kFloatPanelRows = 128;

// Column ranges of tasks are multiples of the widest chunk; accumulators are that much longer than the padded row.
constexpr int64_t kColumnUnit = 128;

inline Kernel decode_kernel(const Weights& weights, Precision precision) {
#if defined(SCAP_VNNI)
    if (is_quantized(weights.type) && precision != Precision::f32) {
        return Kernel::int8;
    }
#endif
    (void)weights;
    (void)precision;
    return Kernel::floats;
}

inline Kernel rows_kernel(const Weights& weights, Precision precision) {
#if defined(SCAP_AMX)
    if (precision != Precision::f32 && !is_quantized(weights.type) && amx::available()) {
        return Kernel::bf16;
    }
#endif
    return decode_kernel(weights, precision);
}

/// Column ranges of many rows start at multiples of this: what the kernel multiplies at once.
inline int64_t column_unit(const Weights& weights, Kernel kernel) {
    return kernel == Kernel::int8 && weights.type == WeightType::u8 ? kColumnUnit / 2 : kColumnUnit;
}

/// How many channels of many rows share one scale per row: the more, the less often sums are folded.
inline int64_t rows_panel_height(Kernel kernel, Arithmetic arithmetic) {
    if (kernel != Kernel::int8) {
        return kFloatPanelRows;
    }
    const int64_t group_size = arithmetic.activation_group_size;
    return group_size == 0 ? kMaxQuantizedRows : std::min(group_size, kMaxQuantizedRows);
}

/// body(integral_constant<int, rows>{}) for 1 <= rows <= Largest.
template <int Largest, class Body>
void with_rows(int64_t rows, const Body& body) {
    if constexpr (Largest > 1) {
        if (rows < Largest) {
            return with_rows<Largest - 1>(rows, body);
        }
    }
    body(std::integral_constant<int, Largest>{});
}

/// y[first_column, last_column) = accumulators (summed over `parts`) * per-channel scale + bias; accumulators that are
/// scaled already stay as they are.
inline void finish_columns(const Weights& weights, const float* accumulators, int64_t parts, int64_t part_pitch,
                           int64_t first_column, int64_t last_column, float* y, bool is_scaled = false) {
    const bool has_scale = is_quantized(weights.type) && !weights.grouped() && !is_scaled;
    for (int64_t column = first_column; column < last_column; column += simd::kWidth) {
        const float* at = accumulators + column - first_column;
        simd::Float value = simd::load(at);
        for (int64_t part = 1; part < parts; ++part) {
            value = simd::add(value, simd::load(at + part * part_pitch));
        }
        if (has_scale) {
            value = simd::mul(value, load_scale(weights, 0, column));
        }
        const int64_t n = std::min<int64_t>(last_column - column, simd::kWidth);
        if (n == simd::kWidth) {
            if (weights.bias != nullptr) {
                value = simd::add(value, simd::load(reinterpret_cast<const float*>(weights.bias + column * 4)));
            }
            simd::store(y + column, value);
        } else {
            float lanes[simd::kWidth];
            simd::store(lanes, value);
            for (int64_t i = 0; i < n; ++i) {
                float bias = 0.0f;
                if (weights.bias != nullptr) {
                    std::memcpy(&bias, weights.bias + (column + i) * 4, 4);
                }
                y[column + i] = lanes[i] + bias;
            }
        }
    }
}

}  // namespace scap
