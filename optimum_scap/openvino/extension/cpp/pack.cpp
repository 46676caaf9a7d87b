// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "parallel.hpp"
#include "simd.hpp"

namespace scap {
namespace {

// Values of one task's tile: input channels that lie together in the source, output channels in the target.
constexpr int64_t kTile = 64;

/// The 8 x 8 bytes of eight words, transposed in place: swaps blocks of 4, 2 and 1 bytes across the diagonal.
inline void transpose_words(uint64_t w[8]) {
    constexpr uint64_t kMasks[3] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
    for (int step = 0; step < 3; ++step) {
        const int distance = 4 >> step;
        for (int i = 0; i < 8; ++i) {
            if ((i & distance) == 0) {
                const uint64_t swapped = ((w[i] >> (8 * distance)) ^ w[i + distance]) & kMasks[step];
                w[i + distance] ^= swapped;
                w[i] ^= swapped << (8 * distance);
            }
        }
    }
}

/// out[c][r] = in[r * pitch + c] for kTile x kTile bytes.
void transpose_bytes(const uint8_t* in, int64_t pitch, uint8_t (*out)[kTile]) {
    for (int64_t r = 0; r < kTile; r += 8) {
        for (int64_t c = 0; c < kTile; c += 8) {
            uint64_t words[8];
            for (int i = 0; i < 8; ++i) {
                std::memcpy(&words[i], in + (r + i) * pitch + c, 8);
            }
            transpose_words(words);
            for (int i = 0; i < 8; ++i) {
                std::memcpy(&out[c + i][r], &words[i], 8);
            }
        }
    }
}

/// What a task needs to know of one matrix.
struct Source {
    const uint8_t* data;
    const Weights& layout;
    uint8_t* target;
    int64_t row_bytes = layout.row_bytes();  // of the target

    int64_t in_features() const {
        return layout.in_features;
    }
    int64_t out_features() const {
        return layout.out_features;
    }
    uint8_t* row(int64_t input_channel) const {
        return target + input_channel * row_bytes;
    }
};

/// Bytes of one tile: rows of the source that do not exist read as `fill`, which the sign flip turns into 0.
void load_tile(const Source& s, int64_t pitch, int64_t row, int64_t column, uint8_t fill, uint8_t (*tile)[kTile]) {
    const int64_t rows = std::min(s.out_features() - row, kTile);
    const int64_t columns = std::min(pitch - column, kTile);
    const uint8_t* at = s.data + row * pitch + column;
    if (rows == kTile && columns == kTile) {
        transpose_bytes(at, pitch, tile);
        return;
    }
    uint8_t padded[kTile * kTile];
    std::fill(padded, padded + sizeof(padded), fill);
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(padded + r * kTile, at + r * pitch, static_cast<size_t>(columns));
    }
    transpose_bytes(padded, kTile, tile);
}

void pack_bytes(const Source& s, int64_t column, uint8_t flip) {
    uint8_t tile[kTile][kTile];
    for (int64_t row = 0; row < s.out_features(); row += kTile) {
        load_tile(s, s.in_features(), row, column, flip, tile);
        const int64_t width = std::min(s.layout.padded_out() - row, kTile);
        for (int64_t c = 0; c < std::min(s.in_features() - column, kTile); ++c) {
            uint8_t* at = s.row(column + c) + row;
            for (int64_t r = 0; r < width; ++r) {
                at[r] = tile[c][r] ^ flip;
            }
        }
    }
}

/// Bytes of two output channels that are 16 apart, from the nibbles at bit `shift` of `width` bytes.
void join_nibbles(const uint8_t* values, int64_t width, int shift, uint8_t flip, uint8_t* out) {
    for (int64_t r = 0; r < width; r += kColumnPad) {
        for (int64_t j = 0; j < 16; ++j) {
            const int low = values[r + j] >> shift & 15;
            const int high = values[r + 16 + j] >> shift & 15;
            out[r / 2 + j] = static_cast<uint8_t>((low | high << 4) ^ flip);
        }
    }
}

/// Source bytes hold `per_byte` input channels.
void pack_nibbles(const Source& s, int64_t column, int64_t per_byte, uint8_t flip) {
    const int64_t pitch = s.in_features() / per_byte;
    uint8_t tile[kTile][kTile];
    for (int64_t row = 0; row < s.out_features(); row += kTile) {
        load_tile(s, pitch, row, column, flip, tile);
        const int64_t width = std::min(s.layout.padded_out() - row, kTile);
        for (int64_t c = 0; c < std::min(pitch - column, kTile); ++c) {
            for (int64_t i = 0; i < per_byte; ++i) {
                join_nibbles(tile[c], width, static_cast<int>(4 * i), flip,
                             s.row(per_byte * (column + c) + i) + row / 2);
            }
        }
    }
}

template <class Value>
void pack_values(const Source& s, int64_t column) {
    const Value* data = reinterpret_cast<const Value*>(s.data);
    const int64_t pitch = s.in_features();
    for (int64_t row = 0; row < s.out_features(); row += kTile) {
        const int64_t end = std::min(row + kTile, s.out_features());
        for (int64_t c = column; c < std::min(column + kTile, pitch); ++c) {
            Value* at = reinterpret_cast<Value*>(s.row(c));
            for (int64_t r = row; r < end; ++r) {
                at[r] = data[r * pitch + c];
            }
        }
    }
}

uint8_t sign_flip(WeightType type, bool is_signed) {
    return !is_signed ? 0 : type == WeightType::u4 ? 0x88 : 0x80;
}

/// One tile's width of columns; `per_byte` values to a byte of the source.
void pack_columns(const Source& s, int64_t column, int64_t per_byte, bool is_signed) {
    const uint8_t flip = sign_flip(s.layout.type, is_signed);
    switch (s.layout.type) {
        case WeightType::u4:
            return pack_nibbles(s, column, per_byte, flip);
        case WeightType::u8:
            return pack_bytes(s, column, flip);
        case WeightType::f16:
        case WeightType::bf16:
            return pack_values<uint16_t>(s, column);
        case WeightType::f32:
            return pack_values<uint32_t>(s, column);
    }
}

/// The row of one input channel, whose values lie together in the source: [in][out], none of them sharing a byte.
void copy_row(const Source& s, int64_t channel, bool is_signed) {
    const int64_t size = std::max<int64_t>(bits(s.layout.type) / 8, 1) * s.out_features();
    const uint8_t* from = s.data + channel * size;
    uint8_t* to = s.row(channel);
    const uint8_t flip = sign_flip(s.layout.type, is_signed);
    if (!is_quantized(s.layout.type)) {
        std::memcpy(to, from, static_cast<size_t>(size));
        return;
    }
    for (int64_t at = 0; at < size; at += kColumnPad) {
        uint8_t values[kColumnPad];
        const int64_t n = std::min(size - at, kColumnPad);
        std::copy(from + at, from + at + n, values);
        std::fill(values + n, values + kColumnPad, flip);
        if (s.layout.type == WeightType::u4) {
            join_nibbles(values, kColumnPad, 0, flip, to + at / 2);
        } else {
            std::transform(values, values + kColumnPad, to + at, [flip](uint8_t value) {
                return static_cast<uint8_t>(value ^ flip);
            });
        }
    }
}

}  // namespace
}  // namespace scap

#define SCAP_EXPORT extern "C" __attribute__((visibility("default")))

/// Where the parts of a layer's buffer lie, in bytes from its beginning: what packing.py knows of Weights.
struct optimum_scap_layout {
    int64_t padded_out;  // columns of rows, scales and zero points
    int64_t row_bytes;
    int64_t scales;
    int64_t zero_points;
    int64_t bias;
    int64_t bytes;
};

/// Fills `layout`; returns 0 where there is no such type. Sizes are positive, `group_size` 0 for one group.
SCAP_EXPORT int optimum_scap_buffer_layout(const char* weight_type, const char* scale_type, int64_t in_features,
                                           int64_t out_features, int64_t group_size, int has_zero_points, int has_bias,
                                           optimum_scap_layout* layout) {
    using namespace scap;
    const WeightFormat* format = find_format(weight_type, kWeightFormats);
    const ScaleFormat* scale_format = find_format(scale_type, kScaleFormats);
    if (format == nullptr || scale_format == nullptr) {
        return 0;
    }
    Weights weights;
    weights.type = format->type;
    weights.scale_type = scale_format->type;
    weights.in_features = in_features;
    weights.out_features = out_features;
    weights.group_size = group_size == 0 ? in_features : group_size;
    weights.has_zero_points = has_zero_points != 0;
    weights.has_bias = has_bias != 0;
    *layout = {weights.padded_out(),         weights.row_bytes(),   weights.scales_offset(),
               weights.zero_points_offset(), weights.bias_offset(), weights.buffer_bytes()};
    return 1;
}

/// Writes the rows of a weight buffer (see Weights) from weights as OpenVINO stores them: [out][in] values, `per_byte`
/// of them (1, or 2 of 4 bits, the low nibble first) to a byte where they have no more bits; or (`is_transposed`)
/// [in][out], one to a byte. Signed integers get their offset. Runs on all threads. `source` and `target` are aligned for their
/// values. Returns 0 where there is no such type.
SCAP_EXPORT int optimum_scap_pack_rows(const char* weight_type, const void* source, int64_t out_features,
                                       int64_t in_features, int64_t per_byte, int is_signed, int is_transposed,
                                       void* target) {
    using namespace scap;
    const WeightFormat* format = find_format(weight_type, kWeightFormats);
    if (format == nullptr) {
        return 0;
    }
    Weights layout;
    layout.type = format->type;
    layout.in_features = in_features;
    layout.out_features = out_features;
    const Source s{static_cast<const uint8_t*>(source), layout, static_cast<uint8_t*>(target)};
    const int64_t columns = in_features / per_byte;
    // Several tiles to a task: neighboring cache lines of the source are read together.
    constexpr int64_t kTaskColumns = 4 * kTile;
    parallel(ceil_div(columns, kTaskColumns), [&](int64_t task) {
        const int64_t begin = task * kTaskColumns;
        const int64_t end = std::min(begin + kTaskColumns, columns);
        for (int64_t column = begin; column < end; column += is_transposed != 0 ? 1 : kTile) {
            if (is_transposed != 0) {
                copy_row(s, column, is_signed != 0);
            } else {
                pack_columns(s, column, per_byte, is_signed != 0);
            }
        }
    });
    const int64_t written = is_quantized(layout.type) ? layout.padded_out() : out_features;
    const int64_t used_bytes = written * bits(layout.type) / 8;
    for (int64_t row = 0; row < in_features; ++row) {
        std::memset(s.row(row) + used_bytes, 0, static_cast<size_t>(layout.row_bytes() - used_bytes));
    }
    return 1;
}

/// Whether dense layers of 4-bit weights decode faster here than with OpenVINO's own kernels. Measured with AVX-512
/// VNNI.
SCAP_EXPORT int optimum_scap_is_fast_for_dense_int4() {
#if defined(SCAP_VNNI) && defined(SCAP_AVX512)
    return 1;
#else
    return 0;
#endif
}
