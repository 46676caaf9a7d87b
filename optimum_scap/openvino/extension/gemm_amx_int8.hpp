// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "amx.hpp"

#if defined(SCAP_AMX)

namespace scap::amx {

constexpr int64_t kDepth = 64;  // input channels of one int8 tile

/// Activations of many rows as tiles: for each panel, block of 16 rows and 64 input channels, the high bytes' tile
/// and then the low bytes' tile, [16][64]. Rows and channels that do not exist are 0.
struct Int8Activations {
    int8_t* tiles = nullptr;
    int64_t* panel_tiles = nullptr;  // offset of each panel in `tiles`
    float* scales = nullptr;         // [panel][padded rows]
    int32_t* sums = nullptr;         // [panel][padded rows], of the integers
    int64_t padded_rows = 0;
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
                for (int64_t k = 0; k < panel.used; ++k) {
                    values[k] = source[channels[k]];
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
        : base_(base), rows_(rows), count_(count), row_bytes_(row_bytes), bytes_(bytes) {}

    /// The next `lines` cache lines, as long as there are any.
    SCAP_INLINE void advance(int64_t lines) {
        for (; lines > 0 && row_ < count_; --lines) {
            __builtin_prefetch(base_ + rows_[row_] * row_bytes_ + byte_, 0, 2);
            byte_ += 64;
            if (byte_ >= bytes_) {
                byte_ = 0;
                ++row_;
            }
        }
    }

private:
    const uint8_t* base_;
    const uint32_t* rows_;
    int64_t count_;
    int64_t row_bytes_;
    int64_t bytes_;
    int64_t row_ = 0;
    int64_t byte_ = 0;
};

constexpr int64_t kBlockBytes = 512;

/// Interleaves one vector load of columns of a panel into weight tiles [half][i][depth / 64], columns permuted as in
/// vnni::interleave_rows. Rows beyond the panel repeat the last quad: their activations are 0.
template <WeightType Type>
void pack_weights(const Panels& panels, const Panel& panel, int64_t row_bytes, const uint8_t* base, int64_t depth,
                  BlockPrefetch& ahead, uint8_t* tiles) {
    const uint32_t* rows = panels.rows + panel.first;
    const int64_t last = panel.padded() / 4 - 1;
    for (int64_t quad = 0; quad < depth / 4; ++quad) {
        const uint32_t* r = rows + 4 * std::min(quad, last);
        ahead.advance(4);
        vnni::Int v[4];
        vnni::interleave_rows(base + r[0] * row_bytes, base + r[1] * row_bytes, base + r[2] * row_bytes,
                              base + r[3] * row_bytes, v);
        for (int i = 0; i < 4; ++i) {
            uint8_t* at = tiles + i * depth * 16 + quad * 64;
            if constexpr (Type == WeightType::u4) {
                _mm512_store_si512(at, vnni::low_nibbles(v[i]));
                _mm512_store_si512(at + 4 * depth * 16, vnni::high_nibbles(v[i]));
            } else {
                _mm512_store_si512(at, v[i]);
            }
        }
    }
}

/// Two weight tiles times the high and low activation tiles: sums [high, low][2 tiles][16][16].
inline void multiply_tiles(const int8_t* x, const uint8_t* w, int64_t depth, int32_t* sums, int64_t pitch) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kDepth) {
        _tile_loadd(4, x + k / kDepth * 2 * kTileBytes, 64);
        _tile_loadd(6, w + k * 16, 64);
        _tile_loadd(7, w + depth * 16 + k * 16, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, x + (k / kDepth * 2 + 1) * kTileBytes, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + pitch, 64);
    _tile_stored(3, sums + pitch + 256, 64);
}

constexpr int64_t kInt8ScratchBytes = 8 * kMaxQuantizedRows * 16 + 8 * kTileBytes;

/// c[m][n - first_column] += x W for all rows and the columns from first_column up to last_column, rounded up to whole
/// vector loads. `scratch` holds kInt8ScratchBytes, 64-byte aligned.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const Int8Activations& x, int64_t rows, int64_t first_column,
          int64_t last_column, uint8_t* scratch, float* c, int64_t c_pitch) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    const TileScope tiles(std::min(rows, kTileRows));
    const int64_t row_bytes = weights.row_bytes();
    const int64_t width = (last_column - first_column) * bits(Type) / 8;
    const uint8_t* base = weights.data + first_column * bits(Type) / 8;
    uint8_t* packed = scratch;
    int32_t* sums = reinterpret_cast<int32_t*>(scratch + 8 * kMaxQuantizedRows * 16);
    BlockPrefetch ahead(nullptr, nullptr, 0, 0, 0);
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kDepth);
        for (int64_t byte = 0; byte < width; byte += vnni::kBytes) {
            if (byte % kBlockBytes == 0) {
                const bool wraps = byte + kBlockBytes >= width;
                const Panel& next = panels.items[std::min(wraps ? p + 1 : p, panels.count - 1)];
                const int64_t next_byte = wraps ? 0 : byte + kBlockBytes;
                ahead = BlockPrefetch(base + next_byte, panels.rows + next.first, next.used, row_bytes,
                                      std::min(kBlockBytes, width - next_byte));
            }
            pack_weights<Type>(panels, panel, row_bytes, base + byte, depth, ahead, packed);
            const int64_t column = byte * 8 / bits(Type);
            const vnni::Fold<Type> fold(weights, panel.group, first_column + column);
            for (int64_t block = 0; block < rows; block += kTileRows) {
                const int8_t* x_tiles = x.tiles + x.panel_tiles[p] + block * depth * 2;
                for (int half = 0; half < kHalves; ++half) {
                    const uint8_t* w = packed + half * 4 * depth * 16;
                    multiply_tiles(x_tiles, w, depth, sums, 1024);
                    multiply_tiles(x_tiles, w + 2 * depth * 16, depth, sums + 512, 1024);
                    for (int64_t m = 0; m < std::min(rows - block, kTileRows); ++m) {
                        vnni::Int high[4], low[4];
                        for (int i = 0; i < 4; ++i) {
                            high[i] = _mm512_load_si512(sums + i * 256 + m * 16);
                            low[i] = _mm512_load_si512(sums + 1024 + i * 256 + m * 16);
                        }
                        const int64_t at = p * x.padded_rows + block + m;
                        fold.add_to(c + (block + m) * c_pitch + column, half, high, low, x.scales[at], x.sums[at]);
                    }
                }
            }
        }
    }
}

}  // namespace scap::amx

#endif
