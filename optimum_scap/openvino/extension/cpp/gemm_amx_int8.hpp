// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "amx.hpp"
#include "gemm_vnni.hpp"

#if defined(SCAP_AMX)

namespace scap::amx {

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

constexpr int64_t kInt8ScratchBytes = vnni::kGemmScratchBytes + 8 * kTileBytes;

/// c[m][n - first_column] += x W for all rows and the columns from first_column up to last_column, rounded up to whole
/// vector loads. `scratch` holds kInt8ScratchBytes, 64-byte aligned.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const vnni::Int8Activations& x, int64_t rows,
          int64_t first_column, int64_t last_column, uint8_t* scratch, float* c, int64_t c_pitch) {
    constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    const TileScope tiles(std::min(rows, kTileRows));
    const int64_t row_bytes = weights.row_bytes();
    const int64_t width = (last_column - first_column) * bits(Type) / 8;
    const uint8_t* base = weights.data + first_column * bits(Type) / 8;
    uint8_t* packed = scratch;
    int32_t* sums = reinterpret_cast<int32_t*>(scratch + vnni::kGemmScratchBytes);
    for (int64_t p = 0; p < panels.count; ++p) {
        const Panel& panel = panels.items[p];
        const int64_t depth = round_up(panel.used, kDepth);
        vnni::for_each_load(panels, p, row_bytes, base, width, [&](int64_t byte, vnni::BlockPrefetch& ahead) {
            vnni::pack_weights<Type, false>(panels, panel, row_bytes, base + byte, depth, depth / 4, ahead,
                                            vnni::kLinesPerQuad, packed);
            const int64_t column = byte * 8 / bits(Type);
            const vnni::Fold<Type> fold(weights, panel.group, first_column + column);
            for (int64_t block = 0; block < rows; block += kTileRows) {
                const int8_t* x_tiles = x.tiles_at(panels, p, block);
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
                        const int64_t at = x.row_at(p, block + m);
                        fold.add_to(c + (block + m) * c_pitch + column, half, high, low, x.scales[at], x.sums[at]);
                    }
                }
            }
        });
    }
}

}  // namespace scap::amx

#endif
