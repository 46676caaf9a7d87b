// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dequantize.hpp"
#include "quantize.hpp"

#if defined(SCAP_VNNI)

/// Few rows of activations times quantized weights, at the speed at which the kept channels' weights can be read.
namespace scap::vnni {

// Rows of weights that are read side by side: as many streams as the hardware prefetchers follow. And how far ahead.
constexpr int64_t kStreams = 16;
#    if defined(SCAP_PREFETCH_TO_L2)
constexpr int64_t kAhead = 1024;
#    else
constexpr int64_t kAhead = 512;
#    endif

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

SCAP_INLINE Int shift_left4(Int v) {
#    if defined(SCAP_AVX512)
    return _mm512_slli_epi32(v, 4);
#    else
    return _mm256_slli_epi32(v, 4);
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

/// Two rows of weights with one 16-bit number per byte, pairs of rows in the 32-bit lanes.
SCAP_INLINE void interleave_pair(Int a, Int b, Int v[4]) {
    const Int low = interleave8_low(a, b), high = interleave8_high(a, b);
    v[0] = interleave8_low(low, zero());
    v[1] = interleave8_high(low, zero());
    v[2] = interleave8_low(high, zero());
    v[3] = interleave8_high(high, zero());
}

/// One nibble half of u4 (0 for u8, which has none).
template <WeightType Type>
SCAP_INLINE Int load_half(const uint8_t* p, int half) {
    const Int v = load(p);
    return Type == WeightType::u8 ? v : half == 0 ? low_nibbles(v) : high_nibbles(v);
}

/// kStreams rows of weights, or what is left of a panel, and the rows that are read after them.
struct Block {
    const uint8_t* rows[kStreams];
    const uint8_t* next[kStreams];
    int64_t pairs;
    bool first;  // of its panel
};

/// Prefetches what is read kAhead bytes after `byte` of the block, but no more than a block ahead.
template <bool Full>
SCAP_INLINE void prefetch_block(const Block& block, int64_t byte, int64_t width) {
    const int64_t target = byte + std::min(kAhead, width);
    const bool wraps = target >= width;
    const uint8_t* const* ahead = wraps ? block.next : block.rows;
    const int64_t ahead_byte = target - (wraps ? width : 0);
    for (int64_t i = 0; i < (Full ? kStreams : 2 * block.pairs); ++i) {
        prefetch_early(scalar(ahead[i]) + ahead_byte);
    }
}

/// sums[m][4 vectors] (of the block's panel, as interleaving leaves them) += products of the block at `byte`.
/// `Full`: the block has all its rows, and the loop over them a constant length.
template <WeightType Type, int Rows, bool Full>
SCAP_INLINE void add_block(const Block& block, int64_t byte, int half, const int16_t* x, int32_t* sums,
                           int64_t pitch) {
    Int total[Rows][4];
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<4>([&](auto i) SCAP_INLINE_LAMBDA {
            const int32_t* at = sums + m * pitch + i * simd::kWidth;
            total[m][i] = block.first ? zero() : load(reinterpret_cast<const uint8_t*>(at));
        });
    });
    for (int64_t pair = 0; pair < (Full ? kStreams / 2 : block.pairs); ++pair) {
        Int v[4];
        interleave_pair(load_half<Type>(scalar(block.rows[2 * pair]) + byte, half),
                        load_half<Type>(scalar(block.rows[2 * pair + 1]) + byte, half), v);
        unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
            const Int value = broadcast(reinterpret_cast<const int8_t*>(x + m * kMaxQuantizedRows + 2 * pair));
            unroll<4>([&](auto i) SCAP_INLINE_LAMBDA {
                total[m][i] = dot16(total[m][i], v[i], value);
            });
        });
    }
    unroll<Rows>([&](auto m) SCAP_INLINE_LAMBDA {
        unroll<4>([&](auto i) SCAP_INLINE_LAMBDA {
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
        prefetch_block<Full>(block, byte, width);
        unroll<kPasses>([&](auto pass) SCAP_INLINE_LAMBDA {
            constexpr int kFirst = Rows * pass / kPasses;
            constexpr int kCount = Rows * (pass + 1) / kPasses - kFirst;
            for (int half = 0; half < kHalves; ++half) {
                add_block<Type, kCount, Full>(block, byte, half, x + kFirst * kMaxQuantizedRows,
                                              sums + kFirst * pitch + (byte * kHalves + half * kBytes), pitch);
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
            IntegerFold fold[4];
            for (int i = 0; i < 4; ++i) {
                fold[i] = IntegerFold(weights, group, first_column + column + column_of<Type>(half, i));
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

/// How the sums of one row of activations become floats.
struct TokenFold {
    const Weights& weights;
    int64_t group;
    int64_t first_column;
    float x_scale;
    int32_t sum;
    float* accumulators;
    // Of the panel that follows, for the same columns; null if it has those of this one.
    const uint8_t* next_scales;
    const uint8_t* next_zero_points;

    /// Prefetches what folding the panel that follows reads for `count` columns.
    SCAP_INLINE void prefetch_next(int64_t column, int64_t count) const {
        if (next_scales == nullptr) {
            return;
        }
        const int64_t size = weights.scale_size();
        for (int64_t at = column * size; at < (column + count) * size; at += 64) {
            prefetch_early(next_scales + at);
        }
        if (next_zero_points != nullptr) {
            for (int64_t at = column; at < column + count; at += 64) {
                prefetch_early(next_zero_points + at);
            }
        }
    }

    /// The sums of one vector load of u8, in the order in which interleaving leaves them, `half` as of column_of.
    template <WeightType Type>
    SCAP_INLINE void add(int64_t column, int half, Int v[4]) const {
        order_columns(v);
        for (int i = 0; i < 4; ++i) {
            const int64_t at = column + column_of<Type>(half, i);
            IntegerFold(weights, group, first_column + at).add_to(accumulators + at, v[i], x_scale, sum);
        }
    }
};

/// Rows == 1: the products of a block for all columns, added to the panel's sums, or with `Last` to what those mean.
/// The sums of u4 are those of whole bytes and those of their high nibbles, the first less 16 times the second being
/// those of the low nibbles: 256 whole bytes fit, see quantize.hpp.
template <WeightType Type, bool Full, bool Last>
__attribute__((noinline)) void stream_token(const Block& block, int64_t width, const int16_t* x, int32_t* sums,
                                            const TokenFold& fold) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    for (int64_t byte = 0; byte < width; byte += kBytes) {
        prefetch_block<Full>(block, byte, width);
        int32_t* at = sums + byte * kHalves;
        Int total[4 * kHalves];
        unroll<4 * kHalves>([&](auto i) SCAP_INLINE_LAMBDA {
            total[i] = block.first ? zero() : load(reinterpret_cast<const uint8_t*>(at + i * simd::kWidth));
        });
        for (int64_t pair = 0; pair < (Full ? kStreams / 2 : block.pairs); ++pair) {
            Int v[4];
            interleave_pair(load(scalar(block.rows[2 * pair]) + byte), load(scalar(block.rows[2 * pair + 1]) + byte),
                            v);
            const Int value = broadcast(reinterpret_cast<const int8_t*>(x + 2 * pair));
            unroll<4>([&](auto i) SCAP_INLINE_LAMBDA {
                total[i] = dot16(total[i], v[i], value);
                if constexpr (kHalves == 2) {
                    total[4 + i] = dot16(total[4 + i], shift_right4(v[i]), value);
                }
            });
        }
        if constexpr (Last) {
            fold.prefetch_next(byte * kHalves, kBytes * kHalves);
            if constexpr (kHalves == 2) {
                Int low[4];
                unroll<4>([&](auto i) SCAP_INLINE_LAMBDA {
                    low[i] = sub(total[i], shift_left4(total[4 + i]));
                });
                fold.add<Type>(byte * kHalves, 0, low);
                fold.add<Type>(byte * kHalves, 1, total + 4);
            } else {
                fold.add<Type>(byte, 0, total);
            }
        } else {
            unroll<4 * kHalves>([&](auto i) SCAP_INLINE_LAMBDA {
                store(reinterpret_cast<uint8_t*>(at + i * simd::kWidth), total[i]);
            });
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
        const bool full = count == kStreams;
        if constexpr (Rows == 1) {
            const bool regroups = p + 1 < last_panel && panels.items[p + 1].group != panel.group;
            const int64_t next = regroups ? panels.items[p + 1].group : panel.group;
            const TokenFold fold{weights,
                                 panel.group,
                                 first_column,
                                 x.scales[0],
                                 x.sums[0],
                                 accumulators,
                                 regroups ? weights.scale_at(next, first_column) : nullptr,
                                 regroups && weights.has_zero_points ? weights.zero_point_at(next, first_column)
                                                                     : nullptr};
            const auto stream = k + count == panel.padded()
                                    ? (full ? stream_token<Type, true, true> : stream_token<Type, false, true>)
                                    : stream_token<Type, true, false>;
            stream(block, width, x.values[0] + k, sums, fold);
        } else {
            const auto stream = full ? stream_block<Type, Rows, true> : stream_block<Type, Rows, false>;
            stream(block, width, x.values[0] + k, sums, pitch);
        }
    }
    if constexpr (Rows > 1) {
        const int64_t columns = width * 8 / bits(Type);
        fold_panel<Type>(weights, panel.group, x, Rows, first_column, columns, sums, accumulators, pitch);
    }
}

}  // namespace scap::vnni

#endif
