// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "rows.hpp"

namespace scap {

// Channels of a generated token that share one scale: the fewer, the smaller the channels that keep their bits. Several
// rows gain more from folding sums less often.
constexpr int64_t kTokenPanelRows = 64;

/// Tasks of one call: `parts` shares of the panels times `slices` of the columns.
struct Grid {
    int64_t parts;
    int64_t slices;
};

/// Whole rows per thread read fastest; with many threads the partial sums would outweigh the rows, so the columns are
/// split too, down to fragments that still read sequentially.
inline Grid few_rows_grid(const Job& job, int64_t kept) {
    int64_t row_bytes = 0;
    int64_t smallest = job.layers[0].row_bytes();
    for (int64_t i = 0; i < job.count; ++i) {
        row_bytes += job.layers[i].row_bytes();
        smallest = std::min(smallest, job.layers[i].row_bytes());
    }
    const int64_t threads = std::max<int64_t>(std::min(concurrency(), kept * row_bytes / kBytesPerThread), 1);
    const int64_t slices = std::max<int64_t>(std::min(threads / 4, smallest / 1024), 1);
    return Grid{threads / slices, slices};
}

/// accumulators[m] += x W of one panel for the columns [begin, end); x is null for one row, whose values the panel has.
inline void few_rows_panel(const Weights& weights, const Panels& panels, Kernel kernel, int64_t p, int64_t last_panel,
                           const float* x, int64_t rows, int64_t begin, int64_t end, int32_t* integers,
                           float* accumulators, int64_t pitch) {
    const Panel& panel = panels.items[p];
    alignas(64) float values[kFewRows * kMaxQuantizedRows];
    const uint32_t* channels = panels.rows + panel.first;
    for (int64_t m = 0; m < rows; ++m) {
        float* at = values + m * kMaxQuantizedRows;
        if (x == nullptr) {
            std::copy(panels.values + panel.first, panels.values + panel.first + panel.used, at);
        } else {
            gather_channels(x + m * weights.in_features, channels, panel.used, at);
        }
        std::fill(at + panel.used, at + panel.padded(), 0.0f);
    }
    with_type(weights.type, [&](auto tag) {
        constexpr WeightType kType = decltype(tag)::value;
#if defined(SCAP_VNNI)
        if constexpr (is_quantized(kType)) {
            vnni::QuantizedPanel quantized;
            if (kernel == Kernel::int8 && vnni::quantize_panel(values, rows, panel.padded(), quantized)) {
                with_rows<kFewRows>(rows, [&](auto count) {
                    vnni::gemv_panel<kType, decltype(count)::value>(weights, panels, p, last_panel, quantized, begin,
                                                                    end, integers, accumulators, pitch);
                });
                return;
            }
        }
#endif
        (void)integers;
        for (int64_t m = 0; m < rows; ++m) {
            floats::gemv_panel<kType>(weights, panels, p, last_panel, values + m * kMaxQuantizedRows, begin, end,
                                      accumulators + m * pitch);
        }
    });
}

/// Up to kFewRows rows: the weights of the channels that some row keeps are read once, as fast as memory gives them.
inline void few_rows(const float* x, int64_t rows, Threshold threshold, const Job& job, Arena& arena) {
    const int64_t in_features = job.in_features();
    MaskedRows kept{};
    if (rows == 1) {
        kept.channels = arena.take<uint32_t>(in_features + 16);
        kept.largest = arena.take<float>(in_features + 16);
        kept.kept = select_channels(x, in_features, threshold, kept.channels, kept.largest);
    } else {
        kept = mask_rows(x, rows, in_features, threshold, arena);
    }
    const Grid grid = few_rows_grid(job, kept.kept);

    struct Input {
        Panels panels;
        Kernel kernel;
        int64_t offset;
    };
    auto* inputs = arena.take<Input>(job.count);
    int64_t pitch = 0;
    for (int64_t i = 0; i < job.count; ++i) {
        const Weights& weights = job.layers[i];
        Input& input = inputs[i];
        input.kernel = decode_kernel(weights, job.arithmetic.precision);
        if (i > 0 && weights.group_size == job.layers[i - 1].group_size && input.kernel == inputs[i - 1].kernel) {
            input = inputs[i - 1];
        } else {
            int64_t height = kDecodePanelRows;
            if (input.kernel == Kernel::int8) {  // equal shares, of equal panels
                const int64_t share = ceil_div(std::max<int64_t>(kept.kept, 1), grid.parts);
                const bool is_short = rows == 1 && !weights.grouped();  // groups are short already
                height = ceil_div(share, ceil_div(share, is_short ? kTokenPanelRows : kMaxQuantizedRows));
            }
            input.panels = make_panels(kept.channels, kept.largest, kept.kept, weights, height, kOutlierExponents, arena);
        }
        input.offset = pitch;
        pitch += weights.padded_out() + kColumnUnit;
    }

    auto* accumulators = arena.take<float>(grid.parts * rows * pitch);
    auto* integers = arena.take<int32_t>(grid.parts * rows * pitch);
    parallel(grid.parts * grid.slices, [&](int64_t task) {
        const int64_t part = task / grid.slices;
        const int64_t slice = task % grid.slices;
        for (int64_t i = 0; i < job.count; ++i) {
            const Weights& weights = job.layers[i];
            const Input& input = inputs[i];
            const int64_t width = round_up(ceil_div(weights.padded_out(), grid.slices), kColumnUnit);
            const int64_t begin = std::min(slice * width, weights.padded_out());
            const int64_t end = std::min(begin + width, weights.padded_out());
            if (begin == end) {
                continue;
            }
            const int64_t offset = part * rows * pitch + input.offset + begin;
            // The last slice also owns what whole vector loads write behind the row.
            for (int64_t m = 0; m < rows; ++m) {
                float* at = accumulators + offset + m * pitch;
                std::fill(at, at + (end - begin) + (end == weights.padded_out() ? kColumnUnit : 0), 0.0f);
            }
            const int64_t last = input.panels.boundary(part + 1, grid.parts);
            for (int64_t p = input.panels.boundary(part, grid.parts); p < last; ++p) {
                few_rows_panel(weights, input.panels, input.kernel, p, last, kept.x, rows, begin, end,
                               integers + offset, accumulators + offset, pitch);
            }
        }
    });
    for (int64_t i = 0; i < job.count; ++i) {
        for (int64_t m = 0; m < rows; ++m) {
            finish_columns(job.layers[i], accumulators + inputs[i].offset + m * pitch, grid.parts, rows * pitch, 0,
                           job.layers[i].out_features, job.y[i] + m * job.layers[i].out_features);
        }
    }
}

// From here on the kernel for many rows is faster where activations have one byte.
constexpr int64_t kFewByteRows = 4;

/// Whether few_rows, whose activations have two bytes, is the fastest for this many rows: float kernels read the weights
/// once for every row.
inline bool are_few(const Job& job, int64_t rows) {
    bool few = rows <= (job.arithmetic.activation_group_size == 0 ? kFewRows : kFewByteRows - 1);
    for (int64_t i = 0; i < job.count; ++i) {
        few = few && decode_kernel(job.layers[i], job.arithmetic.precision) == Kernel::int8;
    }
    return few || rows == 1;
}

}  // namespace scap
