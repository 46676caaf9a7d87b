// SPDX-License-Identifier: Apache-2.0
#pragma once

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

inline RowsInput prepare_rows(const MaskedRows& masked, int64_t rows, const Weights& weights, Precision precision,
                       Arena& arena) {
    RowsInput input{};
    input.kernel = rows_kernel(weights, precision);
    const auto cut = [&] {
        input.panels = make_panels(masked.channels, masked.largest, masked.kept, weights,
                                   rows_panel_height(input.kernel, rows), arena);
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
        input.int8 = vnni::allocate_int8(input.panels, rows, arena);
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

inline void multiply_rows(const Weights& weights, const RowsInput& input, const float* x, int64_t rows,
                          Precision precision, int64_t begin, int64_t end, uint8_t* scratch, float* c,
                          int64_t c_pitch) {
    with_type(weights.type, [&](auto tag) {
        constexpr WeightType kType = decltype(tag)::value;
#if defined(SCAP_VNNI)
        if constexpr (is_quantized(kType)) {
            if (input.kernel == Kernel::int8) {
#    if defined(SCAP_AMX)
                if (amx::available()) {
                    amx::gemm<kType>(weights, input.panels, input.int8, rows, begin, end, scratch, c, c_pitch);
                    return;
                }
#    endif
                vnni::gemm<kType>(weights, input.panels, input.int8, rows, begin, end, scratch, c, c_pitch);
                return;
            }
        }
#endif
#if defined(SCAP_AMX)
        if constexpr (!is_quantized(kType)) {
            if (input.kernel == Kernel::bf16) {
                amx::gemm_bf16<kType>(weights, input.panels, input.bf16, rows, begin, end,
                                      precision == Precision::split, scratch, c, c_pitch);
                return;
            }
        }
#endif
        (void)precision;
        floats::gemm<kType>(weights, input.panels, x, rows, begin, end, reinterpret_cast<float*>(scratch), c, c_pitch);
    });
}

constexpr int64_t scratch_bytes() {
    int64_t bytes = kFloatPanelRows * floats::kChunk * static_cast<int64_t>(sizeof(float));
#if defined(SCAP_VNNI)
    bytes = std::max(bytes, vnni::kGemmScratchBytes);
#endif
#if defined(SCAP_AMX)
    bytes = std::max({bytes, amx::kInt8ScratchBytes, amx::kBf16ScratchBytes});
#endif
    return bytes;
}

// Rows handled at once, and the accumulators (floats) of one task that should stay in the second-level cache.
constexpr int64_t kRowBlock = 256;
constexpr int64_t kTaskAccumulators = 64 << 10;

/// Several input rows, at most kRowBlock.
inline void multiply_block(const float* x, int64_t rows, Threshold threshold, const Job& job, int64_t first_row,
                           Arena& arena) {
    const MaskedRows masked = mask_rows(x, rows, job.in_features(), threshold, arena);
    const int64_t padded_rows = round_up(rows, 32);
    const int64_t workers = concurrency();

    struct Work {
        RowsInput input;
        int64_t width;
        int64_t first_task;
    };
    auto* work = arena.take<Work>(job.count);
    int64_t tasks = 0;
    int64_t widest = 0;
    for (int64_t i = 0; i < job.count; ++i) {
        const Weights& weights = job.layers[i];
        const bool same = i > 0 && weights.group_size == job.layers[i - 1].group_size &&
                          rows_kernel(weights, job.precision) == rows_kernel(job.layers[i - 1], job.precision);
        work[i].input = same ? work[i - 1].input : prepare_rows(masked, rows, weights, job.precision, arena);
        const int64_t target = std::max<int64_t>(kTaskAccumulators / padded_rows, 2 * kColumnUnit);
        const int64_t slices = round_up(ceil_div(weights.padded_out(), target), workers);
        work[i].width = round_up(ceil_div(weights.padded_out(), slices), kColumnUnit);
        work[i].first_task = tasks;
        tasks += ceil_div(weights.padded_out(), work[i].width);
        widest = std::max(widest, work[i].width);
    }

    const int64_t c_pitch = widest + kColumnUnit;
    auto* accumulators = arena.take<float>(workers * padded_rows * c_pitch);
    auto* scratch = arena.take<uint8_t>(workers * scratch_bytes());
    parallel_workers(workers, tasks, [&](int64_t worker, int64_t task) {
        int64_t i = job.count - 1;
        while (work[i].first_task > task) {
            --i;
        }
        const Weights& weights = job.layers[i];
        const int64_t begin = (task - work[i].first_task) * work[i].width;
        const int64_t end = std::min(begin + work[i].width, weights.padded_out());
        float* c = accumulators + worker * padded_rows * c_pitch;
        std::fill(c, c + padded_rows * c_pitch, 0.0f);
        multiply_rows(weights, work[i].input, masked.x, rows, job.precision, begin, end,
                      scratch + worker * scratch_bytes(), c, c_pitch);
        for (int64_t m = 0; m < rows; ++m) {
            finish_columns(weights, c + m * c_pitch, 1, 0, begin, std::min(end, weights.out_features),
                           job.y[i] + (first_row + m) * weights.out_features);
        }
    });
}

}  // namespace scap
