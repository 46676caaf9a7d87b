// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "amx.hpp"

#if defined(SCAP_AMX)

namespace scap::amx {

/// Two weight tiles times the tiles of activations, of one part or of high and low bytes: sums [part][2 tiles][16][16].
template <int Parts>
void multiply_tiles(const int8_t* x, const uint8_t* w, int64_t depth, int32_t* sums, int64_t pitch) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Parts == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kDepth, x += Parts * kTileBytes) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w + k * 16, 64);
        _tile_loadd(7, w + depth * 16 + k * 16, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if constexpr (Parts == 2) {
            _tile_loadd(5, x + kTileBytes, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if constexpr (Parts == 2) {
        _tile_stored(2, sums + pitch, 64);
        _tile_stored(3, sums + pitch + 256, 64);
    }
}

/// What the sums of one vector load of columns mean, in the order in which interleaving leaves them.
template <WeightType Type>
struct TileFold {
    static constexpr int kHalves = Type == WeightType::u4 ? 2 : 1;
    vnni::IntegerFold vectors[kHalves][4];

    SCAP_INLINE TileFold(const Weights& weights, int64_t group, int64_t column) {
        for (int half = 0; half < kHalves; ++half) {
            for (int i = 0; i < 4; ++i) {
                vectors[half][i] = vnni::IntegerFold(weights, group, column + vnni::column_of<Type>(half, i));
            }
        }
    }

    SCAP_INLINE void add_to(float* accumulators, int half, vnni::Int v[4], float x_scale, int32_t sum) const {
        vnni::order_columns(v);
        for (int i = 0; i < 4; ++i) {
            vectors[half][i].add_to(accumulators + vnni::column_of<Type>(half, i), v[i], x_scale, sum);
        }
    }
};

constexpr int64_t kInt8ScratchBytes = vnni::kPackedBytes + 8 * kTileBytes;

template <WeightType Type, int Parts>
struct TileKernel {
    using Fold = TileFold<Type>;
    static constexpr bool kOrdered = false;
    static constexpr bool kWholeTiles = true;

    int32_t* sums;  // scratch, 8 tiles

    int64_t packing_lines() const {
        return vnni::kLinesPerQuad;
    }

    void multiply(const vnni::TileBlock& block, const Fold& fold) const {
        for (int half = 0; half < Fold::kHalves; ++half) {
            const uint8_t* w = block.weights + half * 4 * block.depth * 16;
            multiply_tiles<Parts>(block.x, w, block.depth, sums, 1024);
            multiply_tiles<Parts>(block.x, w + 2 * block.depth * 16, block.depth, sums + 512, 1024);
            for (int64_t m = 0; m < block.rows; ++m) {
                vnni::Int v[4];
                for (int i = 0; i < 4; ++i) {
                    v[i] = _mm512_load_si512(sums + i * 256 + m * 16);
                    if constexpr (Parts == 2) {
                        const vnni::Int low = _mm512_load_si512(sums + 1024 + i * 256 + m * 16);
                        v[i] = vnni::add(vnni::shift_left8(v[i]), low);
                    }
                }
                fold.add_to(block.c + m * block.c_pitch, half, v, block.scales[m], block.sums[m]);
            }
        }
    }
};

/// vnni::for_each_block with tiles. `scratch` holds kInt8ScratchBytes, 64-byte aligned.
template <WeightType Type>
void gemm(const Weights& weights, const Panels& panels, const vnni::Int8Activations& x, int64_t rows,
          int64_t first_column, int64_t last_column, uint8_t* scratch, float* c, int64_t c_pitch) {
    const TileScope tiles(std::min(rows, kTileRows));
    auto* sums = reinterpret_cast<int32_t*>(scratch + vnni::kPackedBytes);
    vnni::with_parts(x.parts, [&](auto parts) {
        const TileKernel<Type, decltype(parts)::value> kernel{sums};
        vnni::for_each_block<Type>(weights, panels, x, rows, first_column, last_column, scratch, c, c_pitch, kernel);
    });
}

}  // namespace scap::amx

#endif
