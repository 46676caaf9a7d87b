// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>

#include "weights.hpp"

namespace scap {

/// Threads of the arena the caller runs in: OpenVINO gives each stream its own.
inline int64_t concurrency() {
    return tbb::this_task_arena::max_concurrency();
}

/// body(i) for i in [0, n), in the caller's arena.
template <class Body>
void parallel(int64_t n, const Body& body) {
    if (n == 1) {
        body(int64_t(0));
        return;
    }
    tbb::parallel_for(int64_t(0), n, body, tbb::static_partitioner());
}

/// body(worker, i) for i in [0, n), each worker taking the next i when it is ready; for work of uneven speed and
/// buffers that belong to a worker.
template <class Body>
void parallel_workers(int64_t workers, int64_t n, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel(std::min(workers, n), [&](int64_t worker) {
        for (int64_t i = next++; i < n; i = next++) {
            body(worker, i);
        }
    });
}

}  // namespace scap
