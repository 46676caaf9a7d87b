// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemm_int8.hpp"

#if defined(SCAP_VNNI)

/// The kernel without tiles for many rows of activations, one or two bytes each, and quantized weights.
namespace scap::vnni {

// The accumulators of one step, of every part, with two vectors of weights fill the registers.
constexpr int kStepVectors = 2;
template <int Parts>
constexpr int kStepRows = kBytes == 64 ? (Parts == 1 ? 8 : 6) : (Parts == 1 ? 6 : 3);

/// c[m][...] += scaled sums of `Rows` rows of x (tiles, from row 0 on) times kStepVectors vectors of packed columns,
/// whose columns are `c_distance` apart.
template <int Parts, int Rows>
__attribute__((noinline)) void multiply_step(const int8_t* x, const uint8_t* w, int64_t pitch, int64_t quads,
                                             BlockPrefetch* ahead, int64_t lines, const FloatFold* fold,
                                             const float* scales, const int32_t* sums, float* c, int64_t c_pitch,
                                             int64_t c_distance) {
    Int sum[Parts][Rows][kStepVectors];
    unroll<Parts * Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            sum[m / Rows][m % Rows][i] = zero();
        });
    });
    for (int64_t first = 0; first < quads; first += kDepth / 4, x += Parts * kTileBytes) {
        const int64_t count = std::min(quads - first, kDepth / 4);
        const int8_t* at = x;
        ahead->advance(lines);
        for (int64_t quad = 0; quad < count; ++quad, at += 4, w += kBytes) {
            Int weights[kStepVectors];
            unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
                weights[i] = load(w + i * pitch);
            });
            unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
                Int bytes[Parts];
                unroll<Parts>([&](auto part) SCAP_INLINE_LAMBDA {
                    bytes[part] = broadcast(at + part * kTileBytes + m * kDepth);
                });
                unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
                    unroll<Parts>([&](auto part) SCAP_INLINE_LAMBDA {
                        sum[part][m][i] = dot(sum[part][m][i], weights[i], bytes[part]);
                    });
                });
            });
        }
    }
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            const simd::Float high = to_float(sum[0][m][i]);
            const simd::Float products =
                Parts == 1 ? high : simd::fma(high, simd::set1(256.0f), to_float(sum[Parts - 1][m][i]));
            fold[i].add_to(c + m * c_pitch + i * c_distance, products, scales[m], sums[m]);
        });
    });
}

/// multiply_step for `rows` <= kStepRows rows.
template <int Parts, int Rows = kStepRows<Parts>, class... Arguments>
SCAP_INLINE void multiply_up_to(int64_t rows, Arguments... arguments) {
    if constexpr (Rows > 1) {
        if (rows < Rows) {
            return multiply_up_to<Parts, Rows - 1>(rows, arguments...);
        }
    }
    multiply_step<Parts, Rows>(arguments...);
}

template <WeightType Type>
struct StepFold {
    static constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    FloatFold vectors[kHalves][4];

    SCAP_INLINE StepFold(const Weights& weights, int64_t group, int64_t column) {
        for (int half = 0; half < kHalves; ++half) {
            for (int i = 0; i < 4; ++i) {
                vectors[half][i] = FloatFold(weights, group, column + column_of<Type>(half, i));
            }
        }
    }
};

template <WeightType Type, int Parts>
class StepKernel {
public:
    using Fold = StepFold<Type>;
    static constexpr bool kOrdered = true;
    static constexpr bool kWholeTiles = false;

    explicit StepKernel(int64_t rows) {
        // Where the multiplications take longer than reading the weights, they issue the prefetches: packing would have
        // to wait for memory while nothing is computed.
        const int64_t passes = ceil_div(rows, kStepRows<Parts>) * Fold::kHalves * 4 / kStepVectors;
        const bool few_rows = rows < kStepRows<Parts>;
        packing_lines_ = few_rows ? kLinesPerQuad : 0;
        step_lines_ = few_rows ? 0 : ceil_div(kLinesPerQuad * kDepth / 4, passes);
    }

    int64_t packing_lines() const {
        return packing_lines_;
    }

    SCAP_INLINE void multiply(const TileBlock& block, const Fold& fold) const {
        const int64_t pitch = block.depth / 4 * kBytes;
        const int64_t steps = ceil_div(block.rows, kStepRows<Parts>);
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t m = block.rows * step / steps;
            const int64_t count = block.rows * (step + 1) / steps - m;
            for (int half = 0; half < Fold::kHalves; ++half) {
                for (int i = 0; i < 4; i += kStepVectors) {
                    const int64_t first = column_of<Type>(half, i);
                    multiply_up_to<Parts>(count, block.x + m * kDepth, block.weights + (half * 4 + i) * pitch, pitch,
                                   block.quads, block.ahead, step_lines_, fold.vectors[half] + i, block.scales + m,
                                   block.sums + m, block.c + m * block.c_pitch + first, block.c_pitch,
                                   column_of<Type>(half, i + 1) - first);
                }
            }
        }
    }

private:
    int64_t packing_lines_;
    int64_t step_lines_;
};

/// for_each_block with vectors.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const Int8Activations& x, int64_t rows, int64_t first_column,
          int64_t last_column, uint8_t* packed, float* c, int64_t c_pitch) {
    with_parts(x.parts, [&](auto parts) {
        for_each_block<Type>(weights, panels, x, rows, first_column, last_column, packed, c, c_pitch,
                             StepKernel<Type, decltype(parts)::value>(rows));
    });
}

}  // namespace scap::vnni

#endif
