// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vnni.hpp"

#if defined(SCAP_VNNI)

/// Few rows of activations times quantized weights, at the speed at which the kept channels' weights can be read.
namespace scap::vnni {

// Rows of weights that are read side by side: as many streams as the hardware prefetchers follow. And how far ahead.
constexpr int64_t kStreams = 16;
constexpr int64_t kAhead = 512;

// Rows of activations whose sums fit the registers.
constexpr int kStreamRows = kBytes == 64 ? 6 : 2;

SCAP_INLINE Int dot16(Int sum, Int a, Int b) {
#    if defined(SCAP_AVX512)
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#    else
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#    endif
}

/// Of 16-bit numbers that fit a byte.
SCAP_INLINE Int shift_right4(Int v) {
#    if defined(SCAP_AVX512)
    return _mm512_srli_epi16(v, 4);
#    else
    return _mm256_srli_epi16(v, 4);
#    endif
}

/// Activations of one panel as integers, x = scale * q.
struct QuantizedPanel {
    alignas(64) int16_t values[kFewRows][kMaxQuantizedRows];
    float scales[kFewRows];
    int32_t sums[kFewRows];
};

/// Whether all of them are quantizable.
inline bool quantize_panel(const float* x, int64_t rows, int64_t padded, QuantizedPanel& out) {
    for (int64_t m = 0; m < rows; ++m) {
        const float* values = x + m * kMaxQuantizedRows;
        const uint32_t largest = largest_magnitude(values, padded);
        if (!quantizable(largest)) {
            return false;
        }
        out.sums[m] = quantize(values, padded, largest, out.values[m], &out.scales[m]);
    }
    return true;
}

/// Keeps GCC from computing several addresses in one vector, to take them out of it again one by one.
SCAP_INLINE const uint8_t* scalar(const uint8_t* p) {
    asm("" : "+r"(p));
    return p;
}

/// Two rows of weights with one 16-bit number per value and column, pairs of rows in the 32-bit lanes: four vectors for
/// each of `Halves` nibble halves from `half` on (1 and 0 for u8).
template <WeightType Type, int Halves>
SCAP_INLINE void load_pair(const uint8_t* first, const uint8_t* second, int half, Int v[4 * Halves]) {
    Int a = load(first), b = load(second);
    if constexpr (Type == WeightType::u4 && Halves == 1) {
        a = half == 0 ? low_nibbles(a) : high_nibbles(a);
        b = half == 0 ? low_nibbles(b) : high_nibbles(b);
    }
    const Int low = interleave8_low(a, b), high = interleave8_high(a, b);
    v[0] = interleave8_low(low, zero());
    v[1] = interleave8_high(low, zero());
    v[2] = interleave8_low(high, zero());
    v[3] = interleave8_high(high, zero());
    if constexpr (Halves == 2) {
        for (int i = 0; i < 4; ++i) {
            v[4 + i] = shift_right4(v[i]);
            v[i] = low_nibbles(v[i]);
        }
    }
}

/// kStreams rows of weights, or what is left of a panel, and the rows that are read after them.
struct Block {
    const uint8_t* rows[kStreams];
    const uint8_t* next[kStreams];
    int64_t pairs;
    bool first;  // of its panel
};

/// sums[m][4 * Halves vectors] (of the block's panel, as interleaving leaves them) += products of the block at `byte`.
/// `Full`: the block has all its rows, and the loop over them a constant length.
template <WeightType Type, int Rows, int Halves, bool Full>
SCAP_INLINE void add_block(const Block& block, int64_t byte, int half, const int16_t* x, int32_t* sums,
                           int64_t pitch) {
    constexpr int kVectors = 4 * Halves;
    Int total[Rows][kVectors];
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            const int32_t* at = sums + m * pitch + i * simd::kWidth;
            total[m][i] = block.first ? zero() : load(reinterpret_cast<const uint8_t*>(at));
        });
    });
    for (int64_t pair = 0; pair < (Full ? kStreams / 2 : block.pairs); ++pair) {
        Int v[kVectors];
        load_pair<Type, Halves>(scalar(block.rows[2 * pair]) + byte, scalar(block.rows[2 * pair + 1]) + byte, half, v);
        unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
            const Int value = broadcast(reinterpret_cast<const int8_t*>(x + m * kMaxQuantizedRows + 2 * pair));
            unroll<kVectors>([&](auto i) SCAP_INLINE_LAMBDA {
                total[m][i] = dot16(total[m][i], v[i], value);
            });
        });
    }
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<kVectors>([&](auto i) SCAP_INLINE_LAMBDA {
            store(reinterpret_cast<uint8_t*>(sums + m * pitch + i * simd::kWidth), total[m][i]);
        });
    });
}

/// add_block for all columns. A function of its own, and the folding another one: the sums need all registers.
template <WeightType Type, int Rows, bool Full>
__attribute__((noinline)) void stream_block(const Block& block, int64_t width, const int16_t* x, int32_t* sums,
                                            int64_t pitch) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    constexpr int kPasses = ceil_div(Rows, kStreamRows);
    for (int64_t byte = 0; byte < width; byte += kBytes) {
        const bool wraps = byte + kAhead >= width;
        const uint8_t* const* ahead = wraps ? block.next : block.rows;
        const int64_t ahead_byte = byte + kAhead - (wraps ? width : 0);
        for (int64_t i = 0; i < (Full ? kStreams : 2 * block.pairs); ++i) {
            prefetch(scalar(ahead[i]) + ahead_byte);
        }
        unroll<kPasses>([&](auto pass) SCAP_INLINE_LAMBDA {
            constexpr int kFirst = Rows * pass / kPasses;
            constexpr int kCount = Rows * (pass + 1) / kPasses - kFirst;
            // The sums of one row leave registers for both halves of u4 at once.
            constexpr int kTogether = kCount == 1 ? kHalves : 1;
            for (int half = 0; half < kHalves; half += kTogether) {
                add_block<Type, kCount, kTogether, Full>(block, byte, half, x + kFirst * kMaxQuantizedRows,
                                                         sums + kFirst * pitch + (byte * kHalves + half * kBytes),
                                                         pitch);
            }
        });
    }
}

/// accumulators += what the sums of a panel mean.
template <WeightType Type>
__attribute__((noinline)) void fold_panel(const Weights& weights, int64_t group, const QuantizedPanel& x, int64_t rows,
                                          int64_t first_column, int64_t columns, const int32_t* sums,
                                          float* accumulators, int64_t pitch) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    for (int64_t column = 0; column < columns; column += kHalves * kBytes) {
        for (int half = 0; half < kHalves; ++half) {
            FoldVector fold[4];
            for (int i = 0; i < 4; ++i) {
                fold[i] = FoldVector(weights, group, first_column + column + column_of<Type>(half, i));
            }
            for (int64_t m = 0; m < rows; ++m) {
                const int32_t* at = sums + m * pitch + column + half * kBytes;
                Int v[4];
                for (int i = 0; i < 4; ++i) {
                    v[i] = load(reinterpret_cast<const uint8_t*>(at + i * simd::kWidth));
                }
                order_columns(v);
                for (int i = 0; i < 4; ++i) {
                    fold[i].add_to(accumulators + m * pitch + column + column_of<Type>(half, i), v[i], x.scales[m],
                                   x.sums[m]);
                }
            }
        }
    }
}

/// accumulators[m][c - first_column] += x W of panel p for `Rows` rows of x and the columns from first_column up to
/// last_column, rounded up to whole vector loads. `sums` is scratch of the same shape. The panels up to last_panel
/// follow.
template <WeightType Type, int Rows>
void gemv_panel(const Weights& weights, const Panels& panels, int64_t p, int64_t last_panel, const QuantizedPanel& x,
                int64_t first_column, int64_t last_column, int32_t* sums, float* accumulators, int64_t pitch) {
    const Panel& panel = panels.items[p];
    const int64_t row_bytes = weights.row_bytes();
    const uint8_t* base = weights.data + first_column * bits(Type) / 8;
    const int64_t width = round_up((last_column - first_column) * bits(Type) / 8, kBytes);
    // Panels lie one behind the other: what is read after a block are the rows that follow, of whatever panel.
    const int64_t end = last_panel < panels.count ? panels.items[last_panel].first : panels.padded_rows;
    const uint32_t* channels = panels.rows + panel.first;
    for (int64_t k = 0; k < panel.padded(); k += kStreams) {
        const int64_t count = std::min(panel.padded() - k, kStreams);
        Block block;
        for (int64_t i = 0; i < kStreams; ++i) {
            block.rows[i] = base + channels[k + std::min(i, count - 1)] * row_bytes;
            block.next[i] = base + channels[std::min(k + count + i, end - panel.first - 1)] * row_bytes;
        }
        block.pairs = count / 2;
        block.first = k == 0;
        const auto stream = count == kStreams ? stream_block<Type, Rows, true> : stream_block<Type, Rows, false>;
        stream(block, width, x.values[0] + k, sums, pitch);
    }
    fold_panel<Type>(weights, panel.group, x, Rows, first_column, width * 8 / bits(Type), sums, accumulators, pitch);
}

}  // namespace scap::vnni

#endif
