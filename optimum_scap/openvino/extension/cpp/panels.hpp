// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "scratch.hpp"
#include "select.hpp"

namespace scap {

/// A run of kept input channels of one quantization group, handled with one set of accumulators.
struct Panel {
    int64_t group;
    int64_t first;  // into Panels::rows; a multiple of 4
    int64_t used;
    int64_t padded() const {
        return round_up(used, 4);
    }
};

/// The kept input channels of one or several rows of x, cut into panels. Each panel is padded to a multiple of 4 rows
/// that repeat its last channel with value 0.
struct Panels {
    Panel* items = nullptr;
    int64_t count = 0;
    uint32_t* rows = nullptr;
    float* values = nullptr;
    int64_t padded_rows = 0;

    /// Where share i of n begins: the panel that starts nearest to that share of the rows.
    int64_t boundary(int64_t i, int64_t n) const {
        const int64_t row = padded_rows * i / n;
        int64_t p = 0;
        while (p < count && items[p].first + items[p].padded() / 2 < row) {
            ++p;
        }
        return i == n ? count : p;
    }

    void push(int64_t group, const uint32_t* channels, const float* channel_values, int64_t n) {
        std::copy(channels, channels + n, rows + padded_rows);
        std::copy(channel_values, channel_values + n, values + padded_rows);
        close(group, n);
    }

    void close(int64_t group, int64_t n) {
        items[count++] = Panel{group, padded_rows, n};
        const uint32_t last = rows[padded_rows + n - 1];
        for (padded_rows += n; padded_rows % 4 != 0; ++padded_rows) {
            rows[padded_rows] = last;
            values[padded_rows] = 0.0f;
        }
    }
};

/// values[k] = row[channels[k]] for n ascending channels of a row of x.
inline void gather_channels(const float* row, const uint32_t* channels, int64_t n, float* values) {
    const float* first = row + channels[0];
    if (channels[n - 1] - channels[0] == n - 1) {  // nothing is pruned between them
        std::copy(first, first + n, values);
        return;
    }
    for (int64_t k = 0; k < n; ++k) {
        values[k] = row[channels[k]];
    }
}

/// The bits of |value|: ordered like |value|, with every NaN above infinity.
inline uint32_t magnitude(float value) {
    return float_bits(value) & 0x7fffffffu;
}

/// Channels more than 2^kOutlierExponents smaller than the largest of their panel lose too many bits to it; of one byte
/// they have few to lose.
constexpr uint32_t kOutlierExponents = 6;
constexpr uint32_t kByteOutlierExponents = 2;
constexpr int64_t kFewOutliers = 4;

/// Cuts `kept` channels (ascending) into panels of at most `max_rows`, none crossing a group.
///
/// `values` holds x - mode of each channel, or for many rows its largest magnitude. A few outliers among many small
/// channels get a panel of their own, because the rows of a panel share one scale when x is quantized.
inline Panels make_panels(const uint32_t* channels, const float* values, int64_t kept, const Weights& weights,
                          int64_t max_rows, uint32_t outlier_exponents, Arena& arena) {
    const int64_t capacity = 2 * (std::min(weights.groups(), kept) + kept / max_rows + 1);
    Panels panels;
    panels.items = arena.take<Panel>(capacity);
    panels.rows = arena.take<uint32_t>(kept + 4 * capacity);
    panels.values = arena.take<float>(kept + 4 * capacity);

    const auto cut = [&](int64_t group, int64_t from, int64_t to) {
        uint32_t largest = 0;
        for (int64_t i = from; i < to; ++i) {
            largest = std::max(largest, magnitude(values[i]));
        }
        const uint32_t limit = largest - std::min(largest, outlier_exponents << 23);
        int64_t outliers = 0;
        for (int64_t i = from; i < to; ++i) {
            outliers += magnitude(values[i]) > limit;
        }
        if (outliers == to - from || outliers > std::max(kFewOutliers, (to - from) / 8)) {
            panels.push(group, channels + from, values + from, to - from);
            return;
        }
        for (const bool outlier : {true, false}) {
            int64_t at = panels.padded_rows;
            for (int64_t i = from; i < to; ++i) {
                if ((magnitude(values[i]) > limit) == outlier) {
                    panels.rows[at] = channels[i];
                    panels.values[at++] = values[i];
                }
            }
            panels.close(group, at - panels.padded_rows);
        }
    };

    for (int64_t begin = 0; begin < kept;) {
        const int64_t group = channels[begin] / weights.group_size;
        const int64_t next_group = (group + 1) * weights.group_size;
        const int64_t reach = std::min(begin + weights.group_size, kept);
        const int64_t end = std::lower_bound(channels + begin, channels + reach, next_group) - channels;
        const int64_t cuts = ceil_div(end - begin, max_rows);
        for (int64_t i = 0; i < cuts; ++i) {
            cut(group, begin + (end - begin) * i / cuts, begin + (end - begin) * (i + 1) / cuts);
        }
        begin = end;
    }
    return panels;
}

}  // namespace scap
