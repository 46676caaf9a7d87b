// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "activation.hpp"
#include "rows.hpp"

namespace scap {

/// One layer's activations in the form its kernel wants.
struct RowsInput {
    Panels panels;
    Kernel kernel;
#if defined(SCAP_VNNI)
    vnni::Int8Activations int8;
#endif
#if defined(SCAP_AMX)
    amx::Bf16Activations bf16;
#endif
};

inline RowsInput prepare_rows(const MaskedRows& masked, int64_t rows, const Weights& weights, Arithmetic arithmetic,
                              Arena& arena) {
    RowsInput input{};
    input.kernel = rows_kernel(weights, arithmetic.precision);
    const bool has_bytes = arithmetic.activation_group_size > 0;
    const auto cut = [&] {
        input.panels = make_panels(masked.channels, masked.largest, masked.kept, weights,
                                   rows_panel_height(input.kernel, arithmetic),
                                   has_bytes ? kByteOutlierExponents : kOutlierExponents, arena);
    };
    cut();
    // Every task fills a block of rows, and says whether the kernel can represent them.
    const auto fill = [&](int64_t block, const auto& fill_block) {
        std::atomic<bool> representable{true};
        parallel(ceil_div(rows, block), [&](int64_t task) {
            if (!fill_block(task * block)) {
                representable = false;
            }
        });
        if (!representable) {
            input.kernel = Kernel::floats;
            cut();
        }
    };
    (void)fill;
#if defined(SCAP_VNNI)
    if (input.kernel == Kernel::int8) {
        input.int8 = vnni::allocate_int8(input.panels, rows, has_bytes ? 1 : 2, arena);
        fill(vnni::kTileRows, [&](int64_t row) {
            return vnni::fill_int8(input.panels, masked.x, weights.in_features, rows, row, input.int8);
        });
    }
#endif
#if defined(SCAP_AMX)
    if (input.kernel == Kernel::bf16) {
        input.bf16 = amx::allocate_bf16(input.panels, rows, arena);
        fill(2 * amx::kTileRows, [&](int64_t row) {
            return amx::fill_bf16(input.panels, masked.x, weights.in_features, rows, row, input.bf16);
        });
    }
#endif
    return input;
}

/// Where part of a product goes: columns [begin, end) of one layer, or of two that are finished together, for the rows
/// [first_row, first_row + rows) of a block.
struct Tile {
    int64_t layer;
    int64_t begin;
    int64_t end;
    int64_t first_row;
    int64_t rows;

    int64_t pitch() const {
        return end - begin + kColumnUnit;
    }
};

/// c [rows][pitch] += x W for a tile; `x` are the block's rows, pruned entries 0.
inline void multiply_tile(const Weights& weights, const RowsInput& input, const float* x, const Tile& tile,
                          Precision precision, uint8_t* scratch, float* c) {
    const int64_t rows = tile.rows, first_row = tile.first_row, begin = tile.begin, end = tile.end;
    with_type(weights.type, [&](auto tag) {
        constexpr WeightType kType = decltype(tag)::value;
#if defined(SCAP_VNNI)
        if constexpr (is_quantized(kType)) {
            if (input.kernel == Kernel::int8) {
                const vnni::Int8Activations bytes = input.int8.from_row(first_row);
#    if defined(SCAP_AMX)
                if (amx::available()) {
                    amx::gemm<kType>(weights, input.panels, bytes, rows, begin, end, scratch, c, tile.pitch());
                    return;
                }
#    endif
                vnni::gemm<kType>(weights, input.panels, bytes, rows, begin, end, scratch, c, tile.pitch());
                return;
            }
        }
#endif
#if defined(SCAP_AMX)
        if constexpr (!is_quantized(kType)) {
            if (input.kernel == Kernel::bf16) {
                amx::gemm_bf16<kType>(weights, input.panels, input.bf16, first_row, rows, begin, end,
                                      precision == Precision::split, scratch, c, tile.pitch());
                return;
            }
        }
#endif
        (void)precision;
        floats::gemm<kType>(weights, input.panels, x + first_row * weights.in_features, rows, begin, end,
                            reinterpret_cast<float*>(scratch), c, tile.pitch());
    });
}

constexpr int64_t scratch_bytes() {
    int64_t bytes = kFloatPanelRows * floats::kChunk * static_cast<int64_t>(sizeof(float));
#if defined(SCAP_VNNI)
    bytes = std::max(bytes, vnni::kPackedBytes);
#endif
#if defined(SCAP_AMX)
    bytes = std::max({bytes, amx::kInt8ScratchBytes, amx::kBf16ScratchBytes});
#endif
    return bytes;
}

// Rows handled at once; rows that no tile divides; the accumulators (floats) of one tile, which should stay in the
// second-level cache, and of the smallest tiles, which cost more than they balance.
constexpr int64_t kRowBlock = 256;
constexpr int64_t kRowUnit = 32;
constexpr int64_t kTileFloats = 64 << 10;
constexpr int64_t kSmallTileFloats = 8 << 10;
constexpr int64_t kLongRun = 512;  // columns

struct Tiles {
    Tile* items;
    int64_t count = 0;
    int64_t floats = 0;  // of the largest
};

/// Cuts `layers` times `columns` columns and `rows` rows into tiles, large ones first and small ones at the end:
/// workers that are not equally fast finish together. Every cell stands for `depth` accumulators.
inline Tiles cut_tiles(const int64_t* columns, const int64_t* units, int64_t layers, int64_t depth, int64_t rows,
                       int64_t workers, Arena& arena) {
    const int64_t row_units = ceil_div(rows, kRowUnit);
    const int64_t padded_rows = row_units * kRowUnit;
    // So few rows wait for weights, which are read fastest in long runs.
    const int64_t small = rows <= kRowUnit ? kLongRun * kRowUnit * depth : kSmallTileFloats;
    int64_t left = 0;
    int64_t capacity = 0;
    for (int64_t i = 0; i < layers; ++i) {
        left += columns[i] * padded_rows * depth;
        capacity += ceil_div(columns[i], units[i]) * row_units;
    }
    Tiles tiles{arena.take<Tile>(capacity)};
    for (int64_t i = 0; i < layers; ++i) {
        for (int64_t begin = 0; begin < columns[i];) {
            const int64_t share = workers == 1 ? left : left / (2 * workers);
            const int64_t wanted = std::max(std::min(share, kTileFloats), std::min(small, left / workers));
            const int64_t unit_floats = units[i] * padded_rows * depth;
            const int64_t width = std::max<int64_t>(wanted / unit_floats, 1) * units[i];
            const int64_t end = std::min(begin + width, columns[i]);
            const int64_t parts = std::min(std::max<int64_t>(unit_floats / wanted, 1), row_units);
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first_row = row_units * part / parts * kRowUnit;
                const int64_t last_row = std::min(row_units * (part + 1) / parts * kRowUnit, rows);
                const Tile tile{i, begin, end, first_row, last_row - first_row};
                tiles.items[tiles.count++] = tile;
                tiles.floats = std::max(tiles.floats, round_up(tile.rows, kRowUnit) * tile.pitch() * depth);
            }
            left -= (end - begin) * padded_rows * depth;
            begin = end;
        }
    }
    return tiles;
}

/// Several rows, at most kRowBlock. Calls finish(tile, c) with the sums of each tile, before scales per channel and
/// bias: of one layer, or (`together`) of all layers, one after the other.
template <class Finish>
void multiply_block(const MaskedRows& masked, int64_t rows, const Job& job, bool together, Arena& arena,
                    const Finish& finish) {
    const int64_t workers = concurrency();
    auto* inputs = arena.take<RowsInput>(job.count);
    auto* columns = arena.take<int64_t>(job.count);
    auto* units = arena.take<int64_t>(job.count);
    for (int64_t i = 0; i < job.count; ++i) {
        const Weights& weights = job.layers[i];
        const Precision precision = job.arithmetic.precision;
        const bool same = i > 0 && weights.group_size == job.layers[i - 1].group_size &&
                          rows_kernel(weights, precision) == rows_kernel(job.layers[i - 1], precision);
        inputs[i] = same ? inputs[i - 1] : prepare_rows(masked, rows, weights, job.arithmetic, arena);
        columns[i] = weights.padded_out();
        units[i] = column_unit(weights, inputs[i].kernel);
        units[0] = together ? std::max(units[0], units[i]) : units[0];
    }
    const int64_t depth = together ? job.count : 1;
    const Tiles tiles = cut_tiles(columns, units, job.count / depth, depth, rows, workers, arena);
    auto* accumulators = arena.take<float>(workers * tiles.floats);
    auto* scratch = arena.take<uint8_t>(workers * scratch_bytes());
    parallel_workers(workers, tiles.count, [&](int64_t worker, int64_t task) {
        const Tile& tile = tiles.items[task];
        float* c = accumulators + worker * tiles.floats;
        const int64_t floats = round_up(tile.rows, kRowUnit) * tile.pitch();
        std::fill(c, c + depth * floats, 0.0f);
        for (int64_t i = 0; i < depth; ++i) {
            multiply_tile(job.layers[tile.layer + i], inputs[tile.layer + i], masked.x, tile, job.arithmetic.precision,
                          scratch + worker * scratch_bytes(), c + i * floats);
        }
        finish(tile, c);
    });
}

/// The rows [first_row, first_row + rows) of the job's results.
inline void many_rows(const MaskedRows& masked, int64_t rows, const Job& job, int64_t first_row, Arena& arena) {
    multiply_block(masked, rows, job, false, arena, [&](const Tile& tile, float* c) {
        const Weights& weights = job.layers[tile.layer];
        for (int64_t m = 0; m < tile.rows; ++m) {
            finish_columns(weights, c + m * tile.pitch(), 1, 0, tile.begin, std::min(tile.end, weights.out_features),
                           job.y[tile.layer] + (first_row + tile.first_row + m) * weights.out_features);
        }
    });
}

/// What `down` reads: activation(gate) * up with its pruned entries 0, and what is left of it. Every tile of the sums
/// is finished, multiplied and pruned while it is in a cache.
inline MaskedRows hidden_rows(const float* x, int64_t rows, Threshold threshold, Threshold hidden_threshold,
                              Activation activation, const Job& job, Arena& arena) {
    const int64_t features = job.layers[0].out_features;
    MaskedRows hidden;
    hidden.x = arena.take<float>(rows * features);
    const int64_t slots = ceil_div(rows, kRowUnit);
    auto* magnitudes = arena.take<uint32_t>(slots * features);
    const MaskedRows masked = mask_rows(x, rows, job.in_features(), threshold, arena);
    multiply_block(masked, rows, job, true, arena, [&](const Tile& tile, float* c) {
        const int64_t end = std::min(tile.end, features);
        const int64_t floats = round_up(tile.rows, kRowUnit) * tile.pitch();
        const int64_t first_slot = tile.first_row / kRowUnit;
        for (int64_t slot = first_slot; slot < first_slot + ceil_div(tile.rows, kRowUnit); ++slot) {
            std::fill(magnitudes + slot * features + tile.begin, magnitudes + slot * features + end, 0u);
        }
        for (int64_t m = 0; m < tile.rows; ++m) {
            float* gate = c + m * tile.pitch();
            float* up = job.count == 2 ? gate + floats : nullptr;
            finish_columns(job.layers[0], gate, 1, 0, tile.begin, end, gate - tile.begin);
            if (up != nullptr) {
                finish_columns(job.layers[1], up, 1, 0, tile.begin, end, up - tile.begin);
            }
            apply_activation(activation, gate, up, end - tile.begin);
            mask_channels(gate, end - tile.begin, hidden_threshold.from(tile.begin),
                          hidden.x + (tile.first_row + m) * features + tile.begin,
                          magnitudes + first_slot * features + tile.begin);
        }
    });
    list_kept(magnitudes, slots, features, arena, hidden);
    return hidden;
}

}  // namespace scap
