// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemm_int8.hpp"

#if defined(SCAP_VNNI)

/// The kernel without tiles for many rows of activations, split into bytes, and quantized weights.
namespace scap::vnni {

// The accumulators of one step, high and low, with two vectors of weights fill the registers.
constexpr int kStepRows = kBytes == 64 ? 6 : 3;
constexpr int kStepVectors = 2;

/// c[m][...] += scaled sums of `Rows` rows of x (tiles, from row 0 on) times kStepVectors vectors of packed columns,
/// whose columns are `c_distance` apart.
template <int Rows>
__attribute__((noinline)) void multiply_step(const int8_t* x, const uint8_t* w, int64_t pitch, int64_t quads,
                                             BlockPrefetch* ahead, int64_t lines, const FloatFold* fold,
                                             const float* scales, const int32_t* sums, float* c, int64_t c_pitch,
                                             int64_t c_distance) {
    Int high[Rows][kStepVectors], low[Rows][kStepVectors];
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            high[m][i] = low[m][i] = zero();
        });
    });
    for (int64_t first = 0; first < quads; first += kDepth / 4, x += 2 * kTileBytes) {
        const int64_t count = std::min(quads - first, kDepth / 4);
        const int8_t* at = x;
        ahead->advance(lines);
        for (int64_t quad = 0; quad < count; ++quad, at += 4, w += kBytes) {
            Int weights[kStepVectors];
            unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
                weights[i] = load(w + i * pitch);
            });
            unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
                const Int x_high = broadcast(at + m * kDepth);
                const Int x_low = broadcast(at + kTileBytes + m * kDepth);
                unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
                    high[m][i] = dot(high[m][i], weights[i], x_high);
                    low[m][i] = dot(low[m][i], weights[i], x_low);
                });
            });
        }
    }
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kStepVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            fold[i].add_to(c + m * c_pitch + i * c_distance, high[m][i], low[m][i], scales[m], sums[m]);
        });
    });
}

/// multiply_step for `rows` <= kStepRows rows.
template <class... Arguments>
SCAP_INLINE void multiply_up_to(int64_t rows, Arguments... arguments) {
    switch (rows) {
        case 1:
            return multiply_step<1>(arguments...);
        case 2:
            return multiply_step<2>(arguments...);
        case 3:
            return multiply_step<3>(arguments...);
        default:
            break;
    }
    if constexpr (kStepRows == 6) {
        switch (rows) {
            case 4:
                return multiply_step<4>(arguments...);
            case 5:
                return multiply_step<5>(arguments...);
            default:
                return multiply_step<6>(arguments...);
        }
    }
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

template <WeightType Type>
class StepKernel {
public:
    using Fold = StepFold<Type>;
    static constexpr bool kOrdered = true;
    static constexpr bool kWholeTiles = false;

    explicit StepKernel(int64_t rows) {
        // Where the multiplications take longer than reading the weights, they issue the prefetches: packing would have
        // to wait for memory while nothing is computed.
        const int64_t passes = ceil_div(rows, kStepRows) * Fold::kHalves * 4 / kStepVectors;
        const bool few_rows = rows < kStepRows;
        packing_lines_ = few_rows ? kLinesPerQuad : 0;
        step_lines_ = few_rows ? 0 : ceil_div(kLinesPerQuad * kDepth / 4, passes);
    }

    int64_t packing_lines() const {
        return packing_lines_;
    }

    SCAP_INLINE void multiply(const TileBlock& block, const Fold& fold) const {
        const int64_t pitch = block.depth / 4 * kBytes;
        const int64_t steps = ceil_div(block.rows, kStepRows);
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t m = block.rows * step / steps;
            const int64_t count = block.rows * (step + 1) / steps - m;
            for (int half = 0; half < Fold::kHalves; ++half) {
                for (int i = 0; i < 4; i += kStepVectors) {
                    const int64_t first = column_of<Type>(half, i);
                    multiply_up_to(count, block.x + m * kDepth, block.weights + (half * 4 + i) * pitch, pitch,
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
    for_each_block<Type>(weights, panels, x, rows, first_column, last_column, packed, c, c_pitch,
                         StepKernel<Type>(rows));
}

}  // namespace scap::vnni

#endif
