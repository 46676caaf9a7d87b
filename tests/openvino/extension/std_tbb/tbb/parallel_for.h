// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <thread>
#include <vector>

// What the kernels use of oneTBB, on std::thread: ThreadSanitizer cannot see the synchronization inside a oneTBB that
// was built without it.
namespace tbb {

struct static_partitioner {};

template <class Index, class Body>
void parallel_for(Index first, Index last, const Body& body, static_partitioner) {
    std::vector<std::thread> threads;
    for (Index i = first; i < last; ++i) {
        threads.emplace_back([&body, i] {
            body(i);
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

}  // namespace tbb
