// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tbb::this_task_arena {

// More threads than the two of a small machine, so that columns are split as well as rows.
inline int max_concurrency() {
    return 9;
}

}  // namespace tbb::this_task_arena
