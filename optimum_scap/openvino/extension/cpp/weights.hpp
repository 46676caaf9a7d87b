// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <type_traits>

namespace scap {

enum class WeightType { f32, f16, bf16, u8, u4 };
enum class ScaleType { f32, f16 };

/// What the rest asks of a type. A new one needs its line here, the load of its values (simd::load_columns32) and the
/// transposition of its rows (pack.cpp); integers with scales also what the kernels for bytes do with their bits.
struct WeightFormat {
    WeightType type;
    const char* name;  // as the operations' attributes and the layers of packing.py have it
    int64_t bits;
    bool is_quantized;
};

constexpr WeightFormat kWeightFormats[] = {
    {WeightType::f32, "f32", 32, false}, {WeightType::f16, "f16", 16, false}, {WeightType::bf16, "bf16", 16, false},
    {WeightType::u8, "u8", 8, true},     {WeightType::u4, "u4", 4, true},
};

struct ScaleFormat {
    ScaleType type;
    const char* name;
    int64_t bits;
};

constexpr ScaleFormat kScaleFormats[] = {{ScaleType::f32, "f32", 32}, {ScaleType::f16, "f16", 16}};

/// The line of a table for a type; every type has one.
template <class Type, class Format, size_t N>
constexpr const Format& format_of(Type type, const Format (&formats)[N]) {
    size_t i = 0;
    while (i + 1 < N && formats[i].type != type) {
        ++i;
    }
    return formats[i];
}

/// The line of a table with a name, or null.
template <class Format, size_t N>
constexpr const Format* find_format(std::string_view name, const Format (&formats)[N]) {
    for (const Format& format : formats) {
        if (name == format.name) {
            return &format;
        }
    }
    return nullptr;
}

constexpr bool is_quantized(WeightType type) {
    return format_of(type, kWeightFormats).is_quantized;
}

constexpr int64_t bits(WeightType type) {
    return format_of(type, kWeightFormats).bits;
}

template <WeightType Type>
using TypeTag = std::integral_constant<WeightType, Type>;

/// body(TypeTag<type>{})
template <size_t I = 0, class Body>
void with_type(WeightType type, const Body& body) {
    if constexpr (I + 1 < std::size(kWeightFormats)) {
        if (type != kWeightFormats[I].type) {
            return with_type<I + 1>(type, body);
        }
    }
    body(TypeTag<kWeightFormats[I].type>{});
}

// Rows are padded to whole 16-byte pieces of the narrowest type. Kernels read whole vectors, so every buffer ends in
// kTailBytes that may be read but never matter.
constexpr int64_t kColumnPad = 32;
constexpr int64_t kAlignment = 64;
constexpr int64_t kTailBytes = 512;

// Rows of activations that are handled at the speed of reading the weights.
constexpr int64_t kFewRows = 8;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

/// One fully connected layer, weights input-channel-major: row i holds W[:, i].
///
/// Quantized weights mean (q - zero_point) * scale, with scale and zero point [groups][padded out], a group being
/// `group_size` consecutive input channels. u4 rows hold 32 columns in 16 bytes: byte j is column j (low nibble) and
/// column 16 + j (high nibble).
///
/// Everything lies in one buffer, because OpenVINO spends time on every input of every call: rows, scales, zero points
/// and bias, those that exist, each from a multiple of kAlignment on, and the tail.
struct Weights {
    WeightType type = WeightType::f32;
    ScaleType scale_type = ScaleType::f32;
    int64_t in_features = 0;
    int64_t out_features = 0;
    int64_t group_size = 0;
    int32_t zero_point = 0;  // everywhere, unless has_zero_points
    bool has_zero_points = false;
    bool has_bias = false;

    const uint8_t* data = nullptr;
    const uint8_t* scales = nullptr;
    const uint8_t* zero_points = nullptr;  // null: `zero_point`
    const uint8_t* bias = nullptr;         // float32 of any alignment; null: none

    int64_t padded_out() const {
        return round_up(out_features, kColumnPad);
    }
    int64_t groups() const {
        return ceil_div(in_features, group_size);
    }
    bool grouped() const {
        return groups() > 1;
    }
    /// Distance of two rows. Strides of whole kilobytes would put the rows of a panel into few sets of the caches and
    /// few banks of the memory, so such rows are a cache line longer.
    int64_t row_bytes() const {
        const int64_t bytes = padded_out() * bits(type) / 8;
        return bytes % 1024 == 0 ? bytes + kAlignment : bytes;
    }
    int64_t scale_size() const {
        return format_of(scale_type, kScaleFormats).bits / 8;
    }
    const uint8_t* row(int64_t input_channel) const {
        return data + input_channel * row_bytes();
    }
    const uint8_t* scale_at(int64_t group, int64_t column) const {
        return scales + (group * padded_out() + column) * scale_size();
    }
    const uint8_t* zero_point_at(int64_t group, int64_t column) const {
        return zero_points + group * padded_out() + column;
    }

    int64_t scales_offset() const {
        return round_up(in_features * row_bytes(), kAlignment);
    }
    int64_t zero_points_offset() const {
        return scales_offset() +
               (is_quantized(type) ? round_up(groups() * padded_out() * scale_size(), kAlignment) : 0);
    }
    int64_t bias_offset() const {
        return zero_points_offset() + (has_zero_points ? round_up(groups() * padded_out(), kAlignment) : 0);
    }
    int64_t buffer_bytes() const {
        return bias_offset() + (has_bias ? round_up(out_features * 4, kAlignment) : 0) + kTailBytes;
    }

    /// Points at a buffer of buffer_bytes().
    void bind(const uint8_t* buffer) {
        data = buffer;
        scales = is_quantized(type) ? buffer + scales_offset() : nullptr;
        zero_points = has_zero_points ? buffer + zero_points_offset() : nullptr;
        bias = has_bias ? buffer + bias_offset() : nullptr;
    }
};

}  // namespace scap
