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
    int64_t out_features;
    int64_t in_features;
    int64_t row_bytes;  // of the target
    uint8_t* target;
};

/// Bytes of one tile: rows of the source that do not exist read as `fill`, which the sign flip turns into 0.
void load_tile(const Source& s, int64_t pitch, int64_t row, int64_t column, uint8_t fill, uint8_t (*tile)[kTile]) {
    const int64_t rows = std::min(s.out_features - row, kTile);
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
    const int64_t padded_out = round_up(s.out_features, kColumnPad);
    uint8_t tile[kTile][kTile];
    for (int64_t row = 0; row < s.out_features; row += kTile) {
        load_tile(s, s.in_features, row, column, flip, tile);
        const int64_t width = std::min(padded_out - row, kTile);
        for (int64_t c = 0; c < std::min(s.in_features - column, kTile); ++c) {
            uint8_t* at = s.target + (column + c) * s.row_bytes + row;
            for (int64_t r = 0; r < width; ++r) {
                at[r] = tile[c][r] ^ flip;
            }
        }
    }
}

/// Source bytes hold two input channels, target bytes two output channels that are 16 apart.
void pack_nibbles(const Source& s, int64_t column, uint8_t flip) {
    const int64_t padded_out = round_up(s.out_features, kColumnPad);
    const int64_t pitch = s.in_features / 2;
    uint8_t tile[kTile][kTile];
    for (int64_t row = 0; row < s.out_features; row += kTile) {
        load_tile(s, pitch, row, column, flip, tile);
        const int64_t width = std::min(padded_out - row, kTile);
        for (int64_t c = 0; c < std::min(pitch - column, kTile); ++c) {
            uint8_t* first = s.target + 2 * (column + c) * s.row_bytes + row / 2;
            uint8_t* second = first + s.row_bytes;
            for (int64_t r = 0; r < width; r += kColumnPad) {
                const uint8_t* values = tile[c] + r;
                for (int64_t j = 0; j < 16; ++j) {
                    first[r / 2 + j] = static_cast<uint8_t>(((values[j] & 15) | values[16 + j] << 4) ^ flip);
                    second[r / 2 + j] = static_cast<uint8_t>((values[j] >> 4 | (values[16 + j] & 0xf0)) ^ flip);
                }
            }
        }
    }
}

template <class Value>
void pack_values(const Source& s, int64_t column) {
    const Value* data = reinterpret_cast<const Value*>(s.data);
    for (int64_t row = 0; row < s.out_features; row += kTile) {
        const int64_t end = std::min(row + kTile, s.out_features);
        for (int64_t c = column; c < std::min(column + kTile, s.in_features); ++c) {
            Value* at = reinterpret_cast<Value*>(s.target + c * s.row_bytes);
            for (int64_t r = row; r < end; ++r) {
                at[r] = data[r * s.in_features + c];
            }
        }
    }
}

}  // namespace
}  // namespace scap

/// Writes the rows of a weight buffer (see Weights) from weights as OpenVINO stores them: [out][in] values of `bits`
/// bits (4: two to a byte, the low nibble first, in_features even). Signed integers get their offset. Runs on all
/// threads. `source` and `target` are aligned for their values.
extern "C" __attribute__((visibility("default"))) void optimum_scap_pack_rows(
    const void* source, int64_t out_features, int64_t in_features, int64_t bits, int64_t is_signed, int64_t row_bytes,
    void* target) {
    using namespace scap;
    const Source s{static_cast<const uint8_t*>(source), out_features, in_features, row_bytes,
                   static_cast<uint8_t*>(target)};
    const int64_t used_bytes = (bits <= 8 ? round_up(out_features, kColumnPad) : out_features) * bits / 8;
    const int64_t columns = bits == 4 ? in_features / 2 : in_features;
    // Several tiles to a task: neighbouring cache lines of the source are read together.
    constexpr int64_t kTaskColumns = 4 * kTile;
    parallel(ceil_div(columns, kTaskColumns), [&](int64_t task) {
        for (int64_t column = task * kTaskColumns; column < std::min((task + 1) * kTaskColumns, columns);
             column += kTile) {
            switch (bits) {
                case 4:
                    pack_nibbles(s, column, is_signed != 0 ? 0x88 : 0);
                    break;
                case 8:
                    pack_bytes(s, column, is_signed != 0 ? 0x80 : 0);
                    break;
                case 16:
                    pack_values<uint16_t>(s, column);
                    break;
                default:
                    pack_values<uint32_t>(s, column);
                    break;
            }
        }
    });
    for (int64_t row = 0; row < in_features; ++row) {
        std::memset(s.target + row * row_bytes + used_bytes, 0, static_cast<size_t>(row_bytes - used_bytes));
    }
}

/// Whether dense layers of 4-bit weights decode faster here than with OpenVINO's own kernels. Measured with AVX-512 VNNI.
extern "C" __attribute__((visibility("default"))) int optimum_scap_is_fast_for_dense_int4() {
#if defined(SCAP_VNNI) && defined(SCAP_AVX512)
    return 1;
#else
    return 0;
#endif
}
