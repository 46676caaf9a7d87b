// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "amx.hpp"

#if defined(SCAP_AMX)

namespace scap::amx {

// bf16 keeps 8 bits of a float; the rounding error of x and of w, itself in bf16, brings 8 more.
constexpr int64_t kPairDepth = 32;  // input channels of one bf16 tile

SCAP_INLINE __m512i round_to_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

/// Two rows of 16 values as 16 pairs of bf16, and the pairs of what rounding took away.
SCAP_INLINE void pair_rows(__m512 a, __m512 b, __m512i* pairs, __m512i* rest) {
    const __m512i ra = round_to_bf16(a);
    const __m512i rb = round_to_bf16(b);
    const __m512i ta = round_to_bf16(_mm512_sub_ps(a, _mm512_castsi512_ps(ra)));
    const __m512i tb = round_to_bf16(_mm512_sub_ps(b, _mm512_castsi512_ps(rb)));
    *pairs = _mm512_or_si512(_mm512_srli_epi32(ra, 16), rb);
    *rest = _mm512_or_si512(_mm512_srli_epi32(ta, 16), tb);
}

/// Activations as tiles: for each panel, block of 16 rows and 32 input channels, the rounded tile and then the tile of
/// the rounding errors, [16][32]. Rows and channels that do not exist are 0.
struct Bf16Activations {
    uint16_t* tiles = nullptr;
    int64_t* panel_tiles = nullptr;  // offset of each panel in `tiles`
};

inline Bf16Activations allocate_bf16(const Panels& panels, int64_t rows, Arena& arena) {
    Bf16Activations result;
    result.panel_tiles = arena.take<int64_t>(panels.count);
    int64_t elements = 0;
    for (int64_t p = 0; p < panels.count; ++p) {
        result.panel_tiles[p] = elements;
        elements += round_up(rows, 2 * kTileRows) * round_up(panels.items[p].used, kPairDepth) * 2;
    }
    result.tiles = arena.take<uint16_t>(elements);
    return result;
}

/// Fills the tiles of rows [first_row, first_row + 32) from x [rows][in], whose pruned entries are 0. Returns false
/// when some activation is out of bf16's range.
inline bool fill_bf16(const Panels& panels, const float* x, int64_t in_features, int64_t rows, int64_t first_row,
                      const Bf16Activations& out) {
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kPairDepth);
        for (int64_t m = 0; m < 2 * kTileRows; ++m) {
            const int64_t row = first_row + m;
            uint16_t* tiles = out.tiles + out.panel_tiles[p] + row / kTileRows * kTileRows * depth * 2 +
                              row % kTileRows * kPairDepth;
            for (int64_t k = 0; k < depth; k += kPairDepth) {
                alignas(64) float values[kPairDepth] = {};
                if (row < rows) {
                    gather_channels(x + row * in_features, panels.rows + panel.first + k,
                                    std::min(panel.used - k, kPairDepth), values);
                    if (!quantizable(largest_magnitude(values, kPairDepth))) {
                        return false;
                    }
                }
                uint16_t* at = tiles + k * 2 * kTileRows;
                for (int64_t i = 0; i < kPairDepth; i += 16) {
                    const __m512 v = _mm512_load_ps(values + i);
                    const __m512i rounded = round_to_bf16(v);
                    const __m512i rest = round_to_bf16(_mm512_sub_ps(v, _mm512_castsi512_ps(rounded)));
                    _mm256_store_si256(reinterpret_cast<__m256i*>(at + i),
                                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
                    _mm256_store_si256(reinterpret_cast<__m256i*>(at + kTileRows * kPairDepth + i),
                                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(rest, 16)));
                }
            }
        }
    }
    return true;
}

constexpr int64_t kBf16PanelRows = 128;
constexpr int64_t kBf16ScratchBytes = 4 * kBf16PanelRows * 16 * 2;

/// Packs 32 columns of a panel into weight tiles [rounded, rest][2][depth / 32].
template <WeightType Type>
void pack_pairs(const Panels& panels, const Panel& panel, int64_t row_bytes, const uint8_t* base, int64_t depth,
                uint8_t* tiles) {
    const uint32_t* rows = panels.rows + panel.first;
    for (int64_t pair = 0; pair < depth / 2; ++pair) {
        // Channels that do not exist meet activations of 0, which an infinite weight would turn into NaN: repeat a
        // channel that does exist.
        const uint8_t* a = base + rows[std::min(2 * pair, panel.used - 1)] * row_bytes;
        const uint8_t* b = base + rows[std::min(2 * pair + 1, panel.used - 1)] * row_bytes;
        simd::Float va[2], vb[2];
        simd::load_columns32<Type>(a, va);
        simd::load_columns32<Type>(b, vb);
        for (int64_t line = 0; line < bits(Type) * 4; line += 64) {
            prefetch(a + bits(Type) * 16 + line);
            prefetch(b + bits(Type) * 16 + line);
        }
        for (int n = 0; n < 2; ++n) {
            __m512i pairs, rest;
            pair_rows(va[n], vb[n], &pairs, &rest);
            _mm512_store_si512(tiles + n * depth * 32 + pair * 64, pairs);
            _mm512_store_si512(tiles + (2 + n) * depth * 32 + pair * 64, rest);
        }
    }
}

/// Tiles 0-3 (2 blocks of rows x 2 of columns) += x tiles * w tiles.
SCAP_INLINE void multiply_pairs(const uint16_t* x, const uint16_t* x_second, const uint8_t* w, int64_t depth) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, x_second, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + depth * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/// c[m][n - first_column] += x W for `rows` rows from first_row (a multiple of 32) on and the columns from first_column
/// up to last_column, rounded up to 32. `split` adds the products with the rounding errors. c holds round_up(rows, 32)
/// rows.
template <WeightType Type>
void gemm_bf16(const Weights& weights, const Panels& panels, const Bf16Activations& x, int64_t first_row,
               int64_t rows, int64_t first_column, int64_t last_column, bool split, uint8_t* scratch, float* c,
               int64_t c_pitch) {
    const TileScope tiles(kTileRows);
    const int64_t pitch = c_pitch * static_cast<int64_t>(sizeof(float));
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kPairDepth);
        for (int64_t column = first_column; column < last_column; column += 32) {
            pack_pairs<Type>(panels, panel, weights.row_bytes(), weights.data + column * bits(Type) / 8, depth,
                             scratch);
            for (int64_t block = 0; block < rows; block += 2 * kTileRows) {
                float* at = c + block * c_pitch + column - first_column;
                _tile_loadd(0, at, pitch);
                _tile_loadd(1, at + 16, pitch);
                _tile_loadd(2, at + kTileRows * c_pitch, pitch);
                _tile_loadd(3, at + kTileRows * c_pitch + 16, pitch);
                const uint16_t* x_tiles = x.tiles + x.panel_tiles[p] + (first_row + block) * depth * 2;
                const int64_t second = kTileRows * depth * 2;
                for (int64_t k = 0; k < depth; k += kPairDepth) {
                    const uint16_t* rounded = x_tiles + k * 2 * kTileRows;
                    const uint16_t* rest = rounded + kTileRows * kPairDepth;
                    const uint8_t* w = scratch + k * 32;
                    multiply_pairs(rounded, rounded + second, w, depth);
                    if (split) {
                        multiply_pairs(rest, rest + second, w, depth);
                        if constexpr (Type != WeightType::bf16) {
                            multiply_pairs(rounded, rounded + second, w + 2 * depth * 32, depth);
                        }
                    }
                }
                _tile_stored(0, at, pitch);
                _tile_stored(1, at + 16, pitch);
                _tile_stored(2, at + kTileRows * c_pitch, pitch);
                _tile_stored(3, at + kTileRows * c_pitch + 16, pitch);
            }
        }
    }
}

}  // namespace scap::amx

#endif
