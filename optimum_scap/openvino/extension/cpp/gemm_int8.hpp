// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dequantize.hpp"
#include "quantize.hpp"

#if defined(SCAP_VNNI)

/// Many rows of activations, one or two bytes each, times quantized weights: what the AMX and the VNNI kernels share.
namespace scap::vnni {

// A tile of activations: rows of x, and input channels (bytes) of each.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kDepth = 64;

/// Activations of many rows as tiles: for each panel, block of 16 rows and 64 input channels, the tile of their bytes,
/// [16][64], or (two parts) the high bytes' tile and then the low bytes' tile. Rows and channels that do not exist are 0.
struct Int8Activations {
    int64_t parts = 2;
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
        return tiles + panel_tiles[p] + (first_row + row) * round_up(panels.items[p].used, kDepth) * parts;
    }
    int64_t row_at(int64_t p, int64_t row) const {  // in `scales` and `sums`
        return p * padded_rows + first_row + row;
    }
};

inline Int8Activations allocate_int8(const Panels& panels, int64_t rows, int64_t parts, Arena& arena) {
    Int8Activations result;
    result.parts = parts;
    result.padded_rows = round_up(rows, kTileRows);
    result.panel_tiles = arena.take<int64_t>(panels.count);
    int64_t bytes = 0;
    for (int64_t p = 0; p < panels.count; ++p) {
        result.panel_tiles[p] = bytes;
        bytes += result.padded_rows * round_up(panels.items[p].used, kDepth) * parts;
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
        int8_t* tiles = out.tiles + out.panel_tiles[p] + first_row * depth * out.parts;
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
                gather_channels(x + row * in_features, channels, panel.used, values);
                const uint32_t largest = largest_magnitude(values, panel.used);
                if (!quantizable(largest)) {
                    return false;
                }
                *sum = out.parts == 1 ? to_bytes(values, depth, largest, bytes[0], scale)
                                      : split_bytes(values, depth, largest, bytes[0], bytes[1], scale);
            }
            for (int64_t k = 0; k < depth; k += kDepth) {
                int8_t* tile = tiles + k / kDepth * out.parts * kTileBytes + m * kDepth;
                for (int64_t part = 0; part < out.parts; ++part) {
                    std::memcpy(tile + part * kTileBytes, bytes[part] + k, kDepth);
                }
            }
        }
    }
    return true;
}

/// body(integral_constant<int, parts>{}), see Int8Activations.
template <class Body>
void with_parts(int64_t parts, const Body& body) {
    if (parts == 1) {
        return body(std::integral_constant<int, 1>{});
    }
    body(std::integral_constant<int, 2>{});
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

/// What comes after the block of kBlockBytes that begins at `byte` of panel p: the next one of the panel's rows, or the
/// first of the next panel's.
inline BlockPrefetch prefetch_after(const Panels& panels, int64_t p, int64_t row_bytes, const uint8_t* base,
                                    int64_t byte, int64_t width) {
    const bool wraps = byte + kBlockBytes >= width;
    const Panel& next = panels.items[std::min(wraps ? p + 1 : p, panels.count - 1)];
    const int64_t next_byte = wraps ? 0 : byte + kBlockBytes;
    return BlockPrefetch(base + next_byte, panels.rows + next.first, next.used, row_bytes,
                         std::min(kBlockBytes, width - next_byte));
}

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

constexpr int64_t kPackedBytes = 8 * kMaxQuantizedRows / 4 * kBytes;

/// One vector load of columns of a panel, packed into tiles of weights, and kTileRows rows of activations at most.
struct TileBlock {
    const uint8_t* weights;
    int64_t depth;  // input channels, whole tiles
    int64_t quads;  // that weights were packed for
    BlockPrefetch* ahead;
    const int8_t* x;
    const float* scales;
    const int32_t* sums;
    int64_t rows;
    float* c;
    int64_t c_pitch;
};

/// The loops of both kernels: c[m][n - first_column] += x W for all rows and the columns from first_column up to
/// last_column, rounded up to whole vector loads. `packed` holds kPackedBytes, 64-byte aligned.
///
/// A Kernel has kOrdered (see pack_weights), kWholeTiles (whether weights are packed up to whole tiles of channels),
/// packing_lines() (that packing is to prefetch for every quad), Fold (constructed from weights, group and column) and
/// multiply(block, fold).
template <WeightType Type, class Kernel>
void for_each_block(const Weights& weights, const Panels& panels, const Int8Activations& x, int64_t rows,
                    int64_t first_column, int64_t last_column, uint8_t* packed, float* c, int64_t c_pitch,
                    const Kernel& kernel) {
    const int64_t row_bytes = weights.row_bytes();
    const int64_t width = (last_column - first_column) * bits(Type) / 8;
    const uint8_t* base = weights.data + first_column * bits(Type) / 8;
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kDepth);
        const int64_t quads = Kernel::kWholeTiles ? depth / 4 : panel.padded() / 4;
        BlockPrefetch ahead(nullptr, nullptr, 0, 0, 0);
        for (int64_t byte = 0; byte < width; byte += kBytes) {
            if (byte % kBlockBytes == 0) {
                ahead = prefetch_after(panels, p, row_bytes, base, byte, width);
            }
            pack_weights<Type, Kernel::kOrdered>(panels, panel, row_bytes, base + byte, depth, quads, ahead,
                                                 kernel.packing_lines(), packed);
            const int64_t column = byte * 8 / bits(Type);
            const typename Kernel::Fold fold(weights, panel.group, first_column + column);
            for (int64_t first = 0; first < rows; first += kTileRows) {
                const int64_t at = x.row_at(p, first);
                const TileBlock block{packed,        depth,       quads,
                                      &ahead,        x.tiles_at(panels, p, first),
                                      x.scales + at, x.sums + at, std::min(rows - first, kTileRows),
                                      c + first * c_pitch + column, c_pitch};
                kernel.multiply(block, fold);
            }
        }
    }
}

}  // namespace scap::vnni

#endif
