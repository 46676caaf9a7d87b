// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vnni.hpp"

/// What quantized weights mean, for all kernels: w = (q - zero_point) * scale, and so for sums over a group
///
///     sum of x w  =  (sum of x q  -  (sum of x) * zero_point) * scale
///
/// with a scale and a zero point per group and column. Where a layer has one group only, its scale is left to the very
/// end (finish_columns), and kernels that ask for `group_scale` get 1.
namespace scap {

/// The scales of one vector of columns.
SCAP_INLINE simd::Float load_scale(const Weights& weights, int64_t group, int64_t column) {
    const uint8_t* at = weights.scale_at(group, column);
    return weights.scale_type == ScaleType::f16 ? simd::load_f16(at) : simd::load(reinterpret_cast<const float*>(at));
}

SCAP_INLINE simd::Float load_group_scale(const Weights& weights, int64_t group, int64_t column) {
    return weights.grouped() ? load_scale(weights, group, column) : simd::set1(1.0f);
}

SCAP_INLINE simd::Float load_zero_point(const Weights& weights, int64_t group, int64_t column) {
    return weights.zero_points == nullptr ? simd::set1(static_cast<float>(weights.zero_point))
                                          : simd::load_u8(weights.zero_point_at(group, column));
}

/// q - zero_point
SCAP_INLINE simd::Float centered(simd::Float q, simd::Float zero_point) {
    return simd::sub(q, zero_point);
}

/// The sum of x (q - zero_point), from that of x q and that of x; rounded once where the CPU can.
SCAP_INLINE simd::Float centered_sum(simd::Float products, float x_sum, simd::Float zero_point) {
    return simd::fma(simd::set1(-x_sum), zero_point, products);
}

SCAP_INLINE simd::Float scaled(simd::Float value, simd::Float scale) {
    return simd::mul(value, scale);
}

/// total + value * scale, rounded once where the CPU can.
SCAP_INLINE simd::Float add_scaled(simd::Float total, simd::Float value, simd::Float scale) {
    return simd::fma(value, scale, total);
}

#if defined(SCAP_VNNI)

namespace vnni {

/// Integer sums of one group become floats: accumulators += x_scale * scale * (products - sum * zero_point), for one
/// vector of columns, `sum` being that of the activations' integers.
///
/// In integers up to the last step: nothing is rounded, and a zero point that all columns share costs no vector
/// multiplication. The kernels that hold their sums as one integer each (few rows) or read them back from tiles use it.
struct IntegerFold {
    simd::Float scale;
    Int zero_point;
    bool has_zero_points;
    int32_t common_zero_point;

    IntegerFold() = default;
    SCAP_INLINE IntegerFold(const Weights& weights, int64_t group, int64_t column)
        : scale(load_group_scale(weights, group, column)),
          has_zero_points(weights.zero_points != nullptr),
          common_zero_point(weights.zero_point) {
        if (has_zero_points) {
            zero_point = load_u8(weights.zero_point_at(group, column));
        }
    }

    SCAP_INLINE void add_to(float* accumulators, Int products, float x_scale, int32_t sum) const {
        // Modulo 2^32 on purpose: the difference fits, whatever its two terms do.
        const Int offset = has_zero_points ? mul(set1(sum), zero_point)
                                           : set1(static_cast<int32_t>(uint32_t(sum) * uint32_t(common_zero_point)));
        const simd::Float value = to_float(sub(products, offset));
        simd::store(accumulators, add_scaled(simd::load(accumulators), value, scaled(scale, simd::set1(x_scale))));
    }
};

/// The same from sums that are floats already, of whole numbers.
///
/// In floats: the kernel of many rows folds every few hundred products, and there two fused multiply-adds are faster
/// than shift, addition and the multiplication of 32-bit integers, which takes twice as long as one of floats.
struct FloatFold {
    simd::Float scale;
    simd::Float zero_point;

    FloatFold() = default;
    SCAP_INLINE FloatFold(const Weights& weights, int64_t group, int64_t column)
        : scale(load_group_scale(weights, group, column)), zero_point(load_zero_point(weights, group, column)) {}

    SCAP_INLINE void add_to(float* accumulators, simd::Float products, float x_scale, int32_t sum) const {
        const simd::Float value = centered_sum(products, static_cast<float>(sum), zero_point);
        simd::store(accumulators, add_scaled(simd::load(accumulators), value, scaled(scale, simd::set1(x_scale))));
    }
};

}  // namespace vnni

#endif

}  // namespace scap
