// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "rows.hpp"

/// Float32 throughout, added up in the order in which OpenVINO's CPU plugin does it: with the same pruned activations
/// the same bits come out. So later thresholds, which rounding would flip, decide as they do in the portable IR.
///
/// The order is that of OpenVINO 2026.4 on AVX-512, found by comparing bits:
///   - many rows: w = (q - zero_point) * scale is rounded once; one chain of fma(x, w, sum) per output;
///   - one row: chains of fma(x, q - zero_point, 0) over a few channels, scaled and added by fma(chain, scale, sum);
///   - sums begin anew every so many channels (`block_channels`), and are added to those before; then the bias.
/// Where it splits sums over threads (more than 4 rows, more than 1024 input channels and few outputs), where float
/// weights have an activation behind them, and in other versions it may add up in another order: then results are as
/// exact as its own, but not equal to the bit.
namespace scap::exact {

constexpr int64_t kUnit = 16;
constexpr int64_t kMaxUnits = 64;
constexpr int64_t kMinUnits = 16;
constexpr int64_t kPanelRows = 128;
constexpr int64_t kTokenPanelRows = 32;

/// Sums begin anew, and are added to those before, every so many input channels.
inline int64_t block_channels(const Weights& weights) {
    constexpr int64_t kLargest = kUnit * kMaxUnits;
    const int64_t units = ceil_div(weights.in_features, kUnit);
    if (!is_quantized(weights.type) || units <= kMaxUnits) {
        return kLargest;
    }
    int64_t divisor = kMaxUnits;
    while (units % divisor != 0) {
        --divisor;
    }
    const bool cuts_groups = weights.grouped() && divisor * kUnit % weights.group_size != 0;
    return divisor < kMinUnits || cuts_groups ? kLargest : divisor * kUnit;
}

/// Where the block of sums that `channel` belongs to ends; behind whole units the rest is a block of its own.
inline int64_t block_end(const Weights& weights, int64_t block, int64_t channel) {
    const int64_t end = std::min((channel / block + 1) * block, weights.in_features);
    const int64_t whole = weights.in_features / kUnit * kUnit;
    const bool has_rest = is_quantized(weights.type) && !weights.grouped() && whole > 0;
    return has_rest && channel < whole ? std::min(end, whole) : end;
}

/// Channels whose products with one token's integers are added up before they are scaled.
inline int64_t scaled_together(const Weights& weights) {
    return weights.type == WeightType::u4 ? std::min<int64_t>(32, weights.group_size) : 4;
}

/// The kept channels that one block of sums is made of, or a part of them, with one token's values for them.
struct Run {
    const uint32_t* channels;
    const float* values;
    int64_t used;
    int64_t following;  // channels that are listed behind them

    Run part(int64_t from, int64_t to) const {
        return Run{channels + from, values + from, to - from, used - to + following};
    }
};

/// Scales and zero points of one chunk of columns, loaded anew where another group of channels begins.
template <WeightType Type>
struct Parameters {
    simd::Float scales[floats::kVectors];
    simd::Float zero_points[floats::kVectors];
    int64_t group = -1;

    SCAP_INLINE void select(const Weights& weights, int64_t channel, int64_t column) {
        if constexpr (is_quantized(Type)) {
            const int64_t wanted = weights.grouped() ? channel / weights.group_size : 0;
            if (wanted == group) {
                return;
            }
            group = wanted;
            for (int i = 0; i < floats::kVectors; ++i) {
                const int64_t at = column + i * simd::kWidth;
                scales[i] = load_scale(weights, group, at);
                zero_points[i] = load_zero_point(weights, group, at);
            }
        }
    }
};

/// q - zero_point of one channel, or its float weights.
template <WeightType Type>
SCAP_INLINE void load_centered(const Weights& weights, const Parameters<Type>& parameters, int64_t channel,
                               int64_t column, simd::Float v[floats::kVectors]) {
    floats::load_chunk<Type>(weights.row(channel) + column * bits(Type) / 8, v);
    if constexpr (is_quantized(Type)) {
        for (int i = 0; i < floats::kVectors; ++i) {
            v[i] = centered(v[i], parameters.zero_points[i]);
        }
    }
}

/// sums[column - begin] += x W of one token, `ends` being where in the run channels end that are scaled together.
template <WeightType Type>
void add_token(const Weights& weights, Run run, const int64_t* ends, int64_t count, int64_t begin, int64_t end,
               float* sums) {
    constexpr int64_t kPrefetchBytes = 256;
    for (int64_t column = begin; column < end; column += floats::kChunk) {
        simd::Float total[floats::kVectors];
        for (int i = 0; i < floats::kVectors; ++i) {
            total[i] = simd::load(sums + column - begin + i * simd::kWidth);
        }
        const int64_t byte = column * bits(Type) / 8;
        // Row k of this run is followed, past its end, by row k of the next one.
        const int64_t past = byte + kPrefetchBytes - end * bits(Type) / 8;
        Parameters<Type> parameters;
        for (int64_t part = 0, k = 0; part < count; ++part) {
            parameters.select(weights, run.channels[k], column);
            simd::Float products[floats::kVectors];
            for (int i = 0; i < floats::kVectors; ++i) {
                products[i] = is_quantized(Type) ? simd::set1(0.0f) : total[i];
            }
            for (; k < ends[part]; ++k) {
                if (past < 0) {
                    prefetch(weights.row(run.channels[k]) + byte + kPrefetchBytes);
                } else if (k < run.following) {
                    prefetch(weights.row(run.channels[k + run.used]) + begin * bits(Type) / 8 + past);
                }
                simd::Float w[floats::kVectors];
                load_centered<Type>(weights, parameters, run.channels[k], column, w);
                const simd::Float value = simd::set1(run.values[k]);
                for (int i = 0; i < floats::kVectors; ++i) {
                    products[i] = simd::fma(value, w[i], products[i]);
                }
            }
            for (int i = 0; i < floats::kVectors; ++i) {
                total[i] = is_quantized(Type) ? add_scaled(total[i], products[i], parameters.scales[i]) : products[i];
            }
        }
        for (int i = 0; i < floats::kVectors; ++i) {
            simd::store(sums + column - begin + i * simd::kWidth, total[i]);
        }
    }
}

/// The same for several tokens x [rows][in]; `chunk` holds kPanelRows x kChunk floats.
template <WeightType Type>
void add_rows(const Weights& weights, const float* x, int64_t rows, Run run, int64_t begin, int64_t end, float* chunk,
              float* sums, int64_t pitch) {
    for (int64_t column = begin; column < end; column += floats::kChunk) {
        Parameters<Type> parameters;
        for (int64_t k = 0; k < run.used; ++k) {
            parameters.select(weights, run.channels[k], column);
            simd::Float w[floats::kVectors];
            load_centered<Type>(weights, parameters, run.channels[k], column, w);
            for (int i = 0; i < floats::kVectors; ++i) {
                if constexpr (is_quantized(Type)) {
                    w[i] = scaled(w[i], parameters.scales[i]);
                }
                simd::store(chunk + k * floats::kChunk + i * simd::kWidth, w[i]);
            }
        }
        for (int64_t n = 0; n < floats::kChunk; n += floats::kColumnVectors * simd::kWidth) {
            float* at = sums + column - begin + n;
            int64_t m = 0;
            for (; m + floats::kRowBlock <= rows; m += floats::kRowBlock) {
                floats::multiply_block<floats::kRowBlock>(x + m * weights.in_features, weights.in_features,
                                                          run.channels, run.used, chunk + n, at + m * pitch, pitch);
            }
            for (; m < rows; ++m) {
                floats::multiply_block<1>(x + m * weights.in_features, weights.in_features, run.channels, run.used,
                                          chunk + n, at + m * pitch, pitch);
            }
        }
    }
}

/// Adds one block of sums of one token up, `run` being its kept channels.
template <WeightType Type>
void add_token_block(const Weights& weights, int64_t block_begin, Run run, int64_t begin, int64_t end, float* sums) {
    const int64_t together = scaled_together(weights);
    int64_t ends[kTokenPanelRows];
    int64_t count = 0;
    int64_t first = 0;
    const auto flush = [&](int64_t last) {
        add_token<Type>(weights, run.part(first, last), ends, count, begin, end, sums);
        first = last;
        count = 0;
    };
    for (int64_t k = 0; k < run.used;) {
        const int64_t channel = run.channels[k];
        const int64_t limit = std::min(block_begin + ((channel - block_begin) / together + 1) * together,
                                       (channel / weights.group_size + 1) * weights.group_size);
        int64_t next = k + 1;
        while (next < run.used && run.channels[next] < limit) {
            ++next;
        }
        if (next - first > kTokenPanelRows) {
            flush(k);
        }
        ends[count++] = next - first;
        k = next;
    }
    flush(run.used);
}

/// The same for several tokens.
template <WeightType Type>
void add_rows_block(const Weights& weights, const float* x, int64_t rows, Run run, int64_t begin, int64_t end,
                    float* chunk, float* sums, int64_t pitch) {
    for (int64_t k = 0; k < run.used; k += kPanelRows) {
        add_rows<Type>(weights, x, rows, run.part(k, std::min(k + kPanelRows, run.used)), begin, end, chunk, sums,
                       pitch);
    }
}

/// At most kRowBlock of the rows of a call; `is_token`: the call has no other.
inline void multiply(const float* x, int64_t rows, bool is_token, Threshold threshold, const Job& job,
                     int64_t first_row, Arena& arena) {
    constexpr int64_t kTaskFloats = 32 << 10;
    MaskedRows kept{};
    if (is_token) {
        kept.channels = arena.take<uint32_t>(job.in_features() + 16);
        kept.largest = arena.take<float>(job.in_features() + 16);
        kept.kept = select_channels(x, job.in_features(), threshold, kept.channels, kept.largest);
    } else {
        kept = mask_rows(x, rows, job.in_features(), threshold, arena);
    }
    for (int64_t i = 0; i < job.count; ++i) {
        const Weights& weights = job.layers[i];
        const Arena::Mark mark = arena.mark();
        const int64_t workers =
            std::max<int64_t>(std::min(concurrency(), kept.kept * weights.row_bytes() / kBytesPerThread), 1);
        const int64_t slices = round_up(ceil_div(rows * weights.padded_out(), kTaskFloats), workers);
        const int64_t width = round_up(ceil_div(weights.padded_out(), slices), kColumnUnit);
        const int64_t pitch = width + kColumnUnit;
        auto* all_sums = arena.take<float>(workers * 2 * rows * pitch);
        auto* chunks = arena.take<float>(workers * kPanelRows * floats::kChunk);
        const int64_t block = block_channels(weights);
        parallel_workers(workers, ceil_div(weights.padded_out(), width), [&](int64_t worker, int64_t task) {
            const int64_t begin = task * width;
            const int64_t end = std::min(begin + width, weights.padded_out());
            float* total = all_sums + worker * 2 * rows * pitch;
            float* sums = total + rows * pitch;
            std::fill(total, total + rows * pitch, 0.0f);
            for (int64_t k = 0; k < kept.kept;) {
                const int64_t channel = kept.channels[k];
                uint32_t* last = kept.channels + kept.kept;
                const int64_t next =
                    std::lower_bound(kept.channels + k, last, block_end(weights, block, channel)) - kept.channels;
                const Run run{kept.channels + k, kept.largest + k, next - k, kept.kept - next};
                std::fill(sums, sums + rows * pitch, 0.0f);
                with_type(weights.type, [&](auto tag) {
                    constexpr WeightType kType = decltype(tag)::value;
                    if (is_token) {
                        add_token_block<kType>(weights, channel / block * block, run, begin, end, sums);
                    } else {
                        add_rows_block<kType>(weights, kept.x, rows, run, begin, end,
                                              chunks + worker * kPanelRows * floats::kChunk, sums, pitch);
                    }
                });
                for (int64_t n = 0; n < rows * pitch; ++n) {
                    total[n] += sums[n];
                }
                k = next;
            }
            for (int64_t m = 0; m < rows; ++m) {
                finish_columns(weights, total + m * pitch, 1, 0, begin, std::min(end, weights.out_features),
                               job.y[i] + (first_row + m) * weights.out_features, true);
            }
        });
        arena.rewind(mark);
    }
}

}  // namespace scap::exact
