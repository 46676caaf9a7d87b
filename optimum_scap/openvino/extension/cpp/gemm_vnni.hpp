// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vnni.hpp"

#if defined(SCAP_VNNI)

/// Many rows of activations, split into bytes, times quantized weights: what the AMX and the VNNI kernels share, and
/// the VNNI kernel.
namespace scap::vnni {

// A tile of activations: rows of x, and input channels (bytes) of each.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kDepth = 64;

/// Activations of many rows as tiles: for each panel, block of 16 rows and 64 input channels, the high bytes' tile
/// and then the low bytes' tile, [16][64]. Rows and channels that do not exist are 0.
struct Int8Activations {
    int8_t* tiles = nullptr;
    int64_t* panel_tiles = nullptr;  // offset of each panel in `tiles`
    float* scales = nullptr;         // [panel][padded rows]
    int32_t* sums = nullptr;         // [panel][padded rows], of the integers
    int64_t padded_rows = 0;
    int64_t first_row = 0;

    /// The same without the rows before `row`, a multiple of kTileRows.
    Int8Activations from_row(int64_t row) const {
        Int8Activations result = *this;
        result.first_row += row;
        return result;
    }
    const int8_t* tiles_at(const Panels& panels, int64_t p, int64_t row) const {
        return tiles + panel_tiles[p] + (first_row + row) * round_up(panels.items[p].used, kDepth) * 2;
    }
    int64_t row_at(int64_t p, int64_t row) const {  // in `scales` and `sums`
        return p * padded_rows + first_row + row;
    }
};

inline Int8Activations allocate_int8(const Panels& panels, int64_t rows, Arena& arena) {
    Int8Activations result;
    result.padded_rows = round_up(rows, kTileRows);
    result.panel_tiles = arena.take<int64_t>(panels.count);
    int64_t bytes = 0;
    for (int64_t p = 0; p < panels.count; ++p) {
        result.panel_tiles[p] = bytes;
        bytes += result.padded_rows * round_up(panels.items[p].used, kDepth) * 2;
    }
    result.tiles = arena.take<int8_t>(bytes);
    result.scales = arena.take<float>(panels.count * result.padded_rows);
    result.sums = arena.take<int32_t>(panels.count * result.padded_rows);
    return result;
}

/// Fills the tiles of rows [first_row, first_row + 16) from x [rows][in], whose pruned entries are 0. Returns false
/// when some activation is not quantizable.
inline bool fill_int8(const Panels& panels, const float* x, int64_t in_features, int64_t rows, int64_t first_row,
                      const Int8Activations& out) {
    alignas(64) float values[kMaxQuantizedRows];
    alignas(64) int8_t bytes[2][kMaxQuantizedRows];
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const uint32_t* channels = panels.rows + panel.first;
        const int64_t depth = round_up(panel.used, kDepth);
        int8_t* tiles = out.tiles + out.panel_tiles[p] + first_row * depth * 2;
        std::fill(values + panel.used, values + depth, 0.0f);
        for (int64_t m = 0; m < kTileRows; ++m) {
            const int64_t row = first_row + m;
            float* scale = &out.scales[p * out.padded_rows + row];
            int32_t* sum = &out.sums[p * out.padded_rows + row];
            if (row >= rows) {
                std::memset(bytes, 0, sizeof(bytes));
                *scale = 0.0f;
                *sum = 0;
            } else {
                const float* source = x + row * in_features;
                if (channels[panel.used - 1] - channels[0] == panel.used - 1) {  // no row pruned any of them
                    std::copy(source + channels[0], source + channels[0] + panel.used, values);
                } else {
                    for (int64_t k = 0; k < panel.used; ++k) {
                        values[k] = source[channels[k]];
                    }
                }
                const uint32_t largest = largest_magnitude(values, panel.used);
                if (!quantizable(largest)) {
                    return false;
                }
                *sum = split_bytes(values, depth, largest, bytes[0], bytes[1], scale);
            }
            for (int64_t k = 0; k < depth; k += kDepth) {
                int8_t* tile = tiles + k / kDepth * 2 * kTileBytes + m * kDepth;
                std::memcpy(tile, bytes[0] + k, kDepth);
                std::memcpy(tile + kTileBytes, bytes[1] + k, kDepth);
            }
        }
    }
    return true;
}

/// Prefetches a block of rows x kBlockBytes, row after row: memory is read in long runs, whatever the order in which
/// the tiles need it. (Columns of 64 bytes over many rows reach less than half of the bandwidth.)
class BlockPrefetch {
public:
    BlockPrefetch(const uint8_t* base, const uint32_t* rows, int64_t count, int64_t row_bytes, int64_t bytes)
        : base_(base), rows_(rows), end_(rows + count), row_bytes_(row_bytes), lines_(ceil_div(bytes, 64)) {}

    /// At least the next `lines` cache lines, as long as there are any: whole rows of the block.
    SCAP_INLINE void advance(int64_t lines) {
        for (due_ += lines; due_ > 0 && rows_ < end_; due_ -= lines_) {
            const uint8_t* line = base_ + *rows_++ * row_bytes_;
            for (int64_t i = 0; i < lines_; ++i) {
                __builtin_prefetch(line + 64 * i, 0, 2);
            }
        }
    }

private:
    const uint8_t* base_;
    const uint32_t* rows_;
    const uint32_t* end_;
    int64_t row_bytes_;
    int64_t lines_;
    int64_t due_ = 0;
};

constexpr int64_t kBlockBytes = 512;
constexpr int64_t kLinesPerQuad = kBytes / 16;  // that one vector load of columns reads

/// Interleaves one vector load of columns of a panel into weight tiles [half][i][depth / 4][kBytes], `quads` of each.
/// Rows beyond the panel repeat the last quad: their activations are 0. Columns are in order, or as interleave_rows
/// leaves them.
template <WeightType Type, bool Ordered>
void pack_weights(const Panels& panels, const Panel& panel, int64_t row_bytes, const uint8_t* base, int64_t depth,
                  int64_t quads, BlockPrefetch& ahead, int64_t lines, uint8_t* tiles) {
    const uint32_t* rows = panels.rows + panel.first;
    const int64_t last = panel.padded() / 4 - 1;
    const int64_t pitch = depth / 4 * kBytes;
    for (int64_t quad = 0; quad < quads; ++quad) {
        const uint32_t* r = rows + 4 * std::min(quad, last);
        ahead.advance(lines);
        Int v[4];
        interleave_rows(base + r[0] * row_bytes, base + r[1] * row_bytes, base + r[2] * row_bytes,
                        base + r[3] * row_bytes, v);
        if constexpr (Ordered) {
            order_columns(v);
        }
        for (int i = 0; i < 4; ++i) {
            uint8_t* at = tiles + i * pitch + quad * kBytes;
            if constexpr (Type == WeightType::u4) {
                store(at, low_nibbles(v[i]));
                store(at + 4 * pitch, high_nibbles(v[i]));
            } else {
                store(at, v[i]);
            }
        }
    }
}

/// Calls body(byte, ahead) for every vector load of columns of a panel, `ahead` prefetching what comes after.
template <class Body>
void for_each_load(const Panels& panels, int64_t p, int64_t row_bytes, const uint8_t* base, int64_t width,
                   const Body& body) {
    BlockPrefetch ahead(nullptr, nullptr, 0, 0, 0);
    for (int64_t byte = 0; byte < width; byte += kBytes) {
        if (byte % kBlockBytes == 0) {
            const bool wraps = byte + kBlockBytes >= width;
            const Panel& next = panels.items[std::min(wraps ? p + 1 : p, panels.count - 1)];
            const int64_t next_byte = wraps ? 0 : byte + kBlockBytes;
            ahead = BlockPrefetch(base + next_byte, panels.rows + next.first, next.used, row_bytes,
                                  std::min(kBlockBytes, width - next_byte));
        }
        body(byte, ahead);
    }
}

// The accumulators of one step, high and low, with two vectors of weights fill the registers.
constexpr int kStepRows = kBytes == 64 ? 6 : 3;
constexpr int kStepVectors = 2;

/// What turns sums of one panel into floats, for one vector of columns: x_scale * scale * (sums - sum * zero_point),
/// `sum` being that of the activations. Without groups the scale is applied once, at the very end.
struct FloatFold {
    simd::Float scale;
    simd::Float zero_point;

    FloatFold() = default;
    SCAP_INLINE FloatFold(const Weights& weights, int64_t group, int64_t column)
        : scale(weights.grouped() ? simd::load_scale(weights.scale_type, weights.scale_at(group, column))
                                  : simd::set1(1.0f)),
          zero_point(weights.zero_points != nullptr
                         ? simd::load_u8(weights.zero_points + group * weights.padded_out() + column)
                         : simd::set1(static_cast<float>(weights.zero_point))) {}

    SCAP_INLINE void add_to(float* accumulators, Int high, Int low, float x_scale, int32_t sum) const {
        simd::Float value = simd::fma(to_float(high), simd::set1(256.0f), to_float(low));
        value = simd::fma(zero_point, simd::set1(-static_cast<float>(sum)), value);
        simd::store(accumulators, simd::fma(value, simd::mul(scale, simd::set1(x_scale)), simd::load(accumulators)));
    }
};

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

constexpr int64_t kGemmScratchBytes = 8 * kMaxQuantizedRows / 4 * kBytes;

/// c[m][n - first_column] += x W for all rows and the columns from first_column up to last_column, rounded up to whole
/// vector loads. `scratch` holds kGemmScratchBytes, 64-byte aligned.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const Int8Activations& x, int64_t rows, int64_t first_column,
          int64_t last_column, uint8_t* scratch, float* c, int64_t c_pitch) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    const int64_t row_bytes = weights.row_bytes();
    const int64_t width = (last_column - first_column) * bits(Type) / 8;
    const uint8_t* base = weights.data + first_column * bits(Type) / 8;
    // Where the multiplications take longer than reading the weights, they issue the prefetches: packing would have to
    // wait for memory while nothing is computed.
    const bool few_rows = rows < kStepRows;
    const int64_t passes = ceil_div(rows, kStepRows) * kHalves * 4 / kStepVectors;
    const int64_t lines = few_rows ? 0 : ceil_div(kLinesPerQuad * kDepth / 4, passes);
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kDepth);
        const int64_t quads = panel.padded() / 4;
        const int64_t pitch = depth / 4 * kBytes;
        for_each_load(panels, p, row_bytes, base, width, [&](int64_t byte, BlockPrefetch& ahead) {
            pack_weights<Type, true>(panels, panel, row_bytes, base + byte, depth, quads, ahead,
                                     few_rows ? kLinesPerQuad : 0, scratch);
            const int64_t column = byte * 8 / bits(Type);
            FloatFold fold[kHalves][4];
            for (int half = 0; half < kHalves; ++half) {
                for (int i = 0; i < 4; ++i) {
                    fold[half][i] = FloatFold(weights, panel.group, first_column + column + column_of<Type>(half, i));
                }
            }
            for (int64_t block = 0; block < rows; block += kTileRows) {
                const int8_t* tiles = x.tiles_at(panels, p, block);
                const int64_t block_rows = std::min(rows - block, kTileRows);
                const int64_t block_steps = ceil_div(block_rows, kStepRows);
                for (int64_t step = 0; step < block_steps; ++step) {
                    const int64_t m = block_rows * step / block_steps;
                    const int64_t count = block_rows * (step + 1) / block_steps - m;
                    const int64_t at = x.row_at(p, block + m);
                    float* row = c + (block + m) * c_pitch + column;
                    for (int half = 0; half < kHalves; ++half) {
                        for (int i = 0; i < 4; i += kStepVectors) {
                            const int64_t first = column_of<Type>(half, i);
                            multiply_up_to(count, tiles + m * kDepth, scratch + (half * 4 + i) * pitch, pitch, quads,
                                           &ahead, lines, fold[half] + i, x.scales + at, x.sums + at, row + first,
                                           c_pitch, column_of<Type>(half, i + 1) - first);
                        }
                    }
                }
            }
        });
    }
}

}  // namespace scap::vnni

#endif
