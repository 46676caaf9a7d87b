// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include "exact.hpp"
#include "few_rows.hpp"
#include "many_rows.hpp"

namespace scap {
namespace {

/// `is_token`: the rows are one, and all that the call was given.
void run(const float* x, int64_t rows, bool is_token, Threshold threshold, const Job& job, Arena& arena) {
    const bool is_exact = job.arithmetic.precision == Precision::f32;
    if (!is_exact && are_few(job, rows)) {
        few_rows(x, rows, threshold, job, arena);
        return;
    }
    const Arena::Mark mark = arena.mark();
    for (int64_t first = 0; first < rows; first += kRowBlock) {
        arena.rewind(mark);
        const float* at = x + first * job.in_features();
        const int64_t n = std::min(rows - first, kRowBlock);
        if (is_exact) {
            exact::multiply(at, n, is_token, threshold, job, first, arena);
        } else {
            many_rows(mask_rows(at, n, job.in_features(), threshold, arena), n, job, first, arena);
        }
    }
}

}  // namespace

void sparse_linear(const float* x, int64_t rows, Threshold threshold, const std::vector<Weights>& layers,
                   Arithmetic arithmetic, float* const* y) {
    ArenaLease arena;
    run(x, rows, rows == 1, threshold, Job{layers.data(), static_cast<int64_t>(layers.size()), arithmetic, y}, *arena);
}

void sparse_ffn(const float* x, int64_t rows, Threshold threshold, Threshold hidden_threshold, Activation activation,
                const std::vector<Weights>& layers, Arithmetic arithmetic, float* y) {
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
        const Job first_job{layers.data(), count, arithmetic, hidden};
        float* out = y + first * down.out_features;
        const Job down_job{&down, 1, arithmetic, &out};
        const float* at = x + first * layers[0].in_features;
        if (arithmetic.precision != Precision::f32 && !are_few(first_job, n) && !are_few(down_job, n)) {
            const MaskedRows kept =
                hidden_rows(at, n, threshold, hidden_threshold, activation, first_job, arena);
            many_rows(kept, n, down_job, 0, arena);
            continue;
        }
        for (int64_t i = 0; i < count; ++i) {
            hidden[i] = arena.take<float>(n * hidden_features);
        }
        run(at, n, rows == 1, threshold, first_job, arena);
        const int64_t elements = n * hidden_features;
        const int64_t tasks = std::min(concurrency(), ceil_div(elements, kBytesPerThread));
        parallel(tasks, [&](int64_t task) {
            const int64_t begin = elements * task / tasks;
            const int64_t end = elements * (task + 1) / tasks;
            apply_activation(activation, hidden[0] + begin, count == 2 ? hidden[1] + begin : nullptr, end - begin);
        });
        run(hidden[0], n, rows == 1, hidden_threshold, down_job, arena);
    }
}

}  // namespace scap
