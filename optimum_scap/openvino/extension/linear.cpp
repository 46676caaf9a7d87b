// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include "parallel.hpp"

namespace scap {
namespace {

/// Layers that share an input, and where each one's result goes.
struct Job {
    const Weights* layers;
    int64_t count;
    Precision precision;
    float* const* y;

    int64_t in_features() const {
        return layers[0].in_features;
    }
};

// Below this many bytes of weights per thread, starting another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

/// Tasks of one decode call: `parts` shares of the panels times `slices` of the columns.
struct Grid {
    int64_t parts;
    int64_t slices;
};

/// Whole rows per thread read fastest; with many threads the partial sums would outweigh the rows, so the columns are
/// split too, down to fragments that still read sequentially.
Grid decode_grid(const Job& job, int64_t kept) {
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

/// One input row: only the kept channels' rows of weights are read.
void decode(const float* x, Threshold threshold, const Job& job, Arena& arena) {
    const int64_t in_features = job.in_features();
    auto* channels = arena.take<uint32_t>(in_features + 16);
    auto* values = arena.take<float>(in_features + 16);
    const int64_t kept = select_channels(x, in_features, threshold, channels, values);

    struct Input {
        Panels panels;
        QuantizedPanels quantized;
        Kernel kernel;
        int64_t offset;
    };
    auto* inputs = arena.take<Input>(job.count);
    int64_t pitch = 0;
    for (int64_t i = 0; i < job.count; ++i) {
        const Weights& weights = job.layers[i];
        Input& input = inputs[i];
        input.kernel = decode_kernel(weights, job.precision);
        if (i > 0 && weights.group_size == job.layers[i - 1].group_size &&
            input.kernel == decode_kernel(job.layers[i - 1], job.precision)) {
            input = inputs[i - 1];
        } else {
            input.panels = make_panels(channels, values, kept, weights, kDecodePanelRows, arena);
            if (input.kernel == Kernel::int8 && !quantize_panels(input.panels, arena, &input.quantized)) {
                input.kernel = Kernel::floats;
            }
        }
        input.offset = pitch;
        pitch += weights.padded_out() + kColumnUnit;
    }

    const Grid grid = decode_grid(job, kept);
    auto* accumulators = arena.take<float>(grid.parts * pitch);
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
            float* at = accumulators + part * pitch + input.offset + begin;
            // The last slice also owns what whole vector loads write behind the row.
            std::fill(at, at + (end - begin) + (end == weights.padded_out() ? kColumnUnit : 0), 0.0f);
            const int64_t first = input.panels.count * part / grid.parts;
            const int64_t last = input.panels.count * (part + 1) / grid.parts;
            with_type(weights.type, [&](auto tag) {
                constexpr WeightType kType = decltype(tag)::value;
#if defined(SCAP_VNNI)
                if constexpr (is_quantized(kType)) {
                    if (input.kernel == Kernel::int8) {
                        vnni::gemv<kType>(weights, input.panels, input.quantized, first, last, begin, end, at);
                        return;
                    }
                }
#endif
                floats::gemv<kType>(weights, input.panels, first, last, begin, end, at);
            });
        }
    });
    for (int64_t i = 0; i < job.count; ++i) {
        finish_columns(job.layers[i], accumulators + inputs[i].offset, grid.parts, pitch, 0,
                       job.layers[i].out_features, job.y[i]);
    }
}

/// The kept channels of many rows: pruned entries of `x` are 0, and a channel that no row keeps is in no panel.
struct MaskedRows {
    float* x;
    uint32_t* channels;
    float* largest;  // of each listed channel, over the rows
    int64_t kept;
};

MaskedRows mask_rows(const float* x, int64_t rows, int64_t in_features, Threshold threshold, Arena& arena) {
    MaskedRows result;
    result.x = arena.take<float>(rows * in_features);
    result.channels = arena.take<uint32_t>(in_features);
    result.largest = arena.take<float>(in_features);
    const int64_t tasks = std::min(concurrency(), ceil_div(rows * in_features, kBytesPerThread));
    auto* magnitudes = arena.take<uint32_t>(tasks * in_features);
    parallel(tasks, [&](int64_t task) {
        uint32_t* own = magnitudes + task * in_features;
        std::fill(own, own + in_features, 0u);
        for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; ++m) {
            mask_channels(x + m * in_features, in_features, threshold, result.x + m * in_features, own);
        }
    });
    result.kept = 0;
    for (int64_t i = 0; i < in_features; ++i) {
        uint32_t largest = 0;
        for (int64_t task = 0; task < tasks; ++task) {
            largest = std::max(largest, magnitudes[task * in_features + i]);
        }
        result.channels[result.kept] = static_cast<uint32_t>(i);
        result.largest[result.kept] = bits_float(largest);
        result.kept += largest != 0;
    }
    return result;
}

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

RowsInput prepare_rows(const MaskedRows& masked, int64_t rows, const Weights& weights, Precision precision,
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

void multiply_rows(const Weights& weights, const RowsInput& input, const float* x, int64_t rows, Precision precision,
                   int64_t begin, int64_t end, uint8_t* scratch, float* c, int64_t c_pitch) {
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
void multiply_block(const float* x, int64_t rows, Threshold threshold, const Job& job, int64_t first_row,
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

void run(const float* x, int64_t rows, Threshold threshold, const Job& job, Arena& arena) {
    if (rows == 1) {
        decode(x, threshold, job, arena);
        return;
    }
    const Arena::Mark mark = arena.mark();
    for (int64_t first = 0; first < rows; first += kRowBlock) {
        arena.rewind(mark);
        multiply_block(x + first * job.in_features(), std::min(rows - first, kRowBlock), threshold, job, first, arena);
    }
}

}  // namespace

void sparse_linear(const float* x, int64_t rows, Threshold threshold, const std::vector<Weights>& layers,
                   Precision precision, float* const* y) {
    ArenaLease arena;
    run(x, rows, threshold, Job{layers.data(), static_cast<int64_t>(layers.size()), precision, y}, *arena);
}

void sparse_ffn(const float* x, int64_t rows, Threshold threshold, Threshold hidden_threshold, Activation activation,
                const std::vector<Weights>& layers, Precision precision, float* y) {
    ArenaLease lease;
    Arena& arena = *lease;
    const Arena::Mark mark = arena.mark();
    const int64_t count = static_cast<int64_t>(layers.size()) - 1;
    const Weights& down = layers.back();
    const int64_t hidden_features = down.in_features;
    for (int64_t first = 0; first < rows; first += kRowBlock) {
        const int64_t n = std::min(rows - first, kRowBlock);
        arena.rewind(mark);
        float* hidden[2] = {nullptr, nullptr};
        for (int64_t i = 0; i < count; ++i) {
            hidden[i] = arena.take<float>(n * hidden_features);
        }
        run(x + first * layers[0].in_features, n, threshold, Job{layers.data(), count, precision, hidden}, arena);
        const int64_t elements = n * hidden_features;
        const int64_t tasks = std::min(concurrency(), ceil_div(elements, kBytesPerThread));
        parallel(tasks, [&](int64_t task) {
            const int64_t begin = elements * task / tasks;
            const int64_t end = elements * (task + 1) / tasks;
            apply_activation(activation, hidden[0] + begin, count == 2 ? hidden[1] + begin : nullptr, end - begin);
        });
        float* out = y + first * down.out_features;
        run(hidden[0], n, hidden_threshold, Job{&down, 1, precision, &out}, arena);
    }
}

}  // namespace scap
