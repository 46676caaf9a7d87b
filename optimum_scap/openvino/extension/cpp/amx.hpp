// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gemm_int8.hpp"

#if defined(SCAP_AMX)
#    include <sys/syscall.h>
#    include <unistd.h>

namespace scap::amx {

/// Whether the kernel lets this process use the tile registers (asked for once).
inline bool available() {
    static const bool granted = [] {
        constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
        constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
}

// Tiles 0-3 accumulate, 4-5 hold activations (one row per row of x), 6-7 hold weights.
using vnni::kDepth;
using vnni::kTileBytes;
using vnni::kTileRows;

/// Configures the tiles for `rows` rows of x. oneDNN's kernels run on the same threads, so what they had configured
/// is put back.
class TileScope {
public:
    explicit TileScope(int64_t rows) {
        _tile_storeconfig(&saved_);
        Config config{};
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
        }
        _tile_loadconfig(&config);
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    ~TileScope() {
        if (saved_.palette == 0) {
            _tile_release();
        } else {
            _tile_loadconfig(&saved_);
        }
    }

private:
    struct alignas(64) Config {
        uint8_t palette;
        uint8_t start_row;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Config saved_;
};

}  // namespace scap::amx

#endif
