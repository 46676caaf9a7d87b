// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.hpp"
#include "parallel.hpp"

/// What few and many rows of activations share: the job, and which of its input channels are kept.
namespace scap {

/// Layers that share an input, and where each one's result goes.
struct Job {
    const Weights* layers;
    int64_t count;
    Arithmetic arithmetic;
    float* const* y;

    int64_t in_features() const {
        return layers[0].in_features;
    }
};

// Below this many bytes of weights per thread, starting another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

/// The kept channels of many rows: pruned entries of `x` are 0, and a channel that no row keeps is in no panel.
struct MaskedRows {
    float* x;
    uint32_t* channels;
    float* largest;  // of each listed channel, over the rows
    int64_t kept;
};

/// Lists the channels whose magnitudes [parts][in] are not all 0.
inline void list_kept(const uint32_t* magnitudes, int64_t parts, int64_t in_features, Arena& arena,
                      MaskedRows& result) {
    result.channels = arena.take<uint32_t>(in_features);
    result.largest = arena.take<float>(in_features);
    result.kept = 0;
    for (int64_t i = 0; i < in_features; ++i) {
        uint32_t largest = 0;
        for (int64_t part = 0; part < parts; ++part) {
            largest = std::max(largest, magnitudes[part * in_features + i]);
        }
        result.channels[result.kept] = static_cast<uint32_t>(i);
        result.largest[result.kept] = bits_float(largest);
        result.kept += largest != 0;
    }
}

inline MaskedRows mask_rows(const float* x, int64_t rows, int64_t in_features, Threshold threshold, Arena& arena) {
    MaskedRows result;
    result.x = arena.take<float>(rows * in_features);
    const int64_t tasks = std::min(concurrency(), ceil_div(rows * in_features, kBytesPerThread));
    auto* magnitudes = arena.take<uint32_t>(tasks * in_features);
    parallel(tasks, [&](int64_t task) {
        uint32_t* own = magnitudes + task * in_features;
        std::fill(own, own + in_features, 0u);
        for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; ++m) {
            mask_channels(x + m * in_features, in_features, threshold, result.x + m * in_features, own);
        }
    });
    list_kept(magnitudes, tasks, in_features, arena, result);
    return result;
}

}  // namespace scap
