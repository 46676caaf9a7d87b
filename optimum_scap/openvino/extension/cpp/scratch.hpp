// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "weights.hpp"

namespace scap {

/// Bump allocator for the buffers of one call; every buffer is 64-byte aligned and uninitialized.
class Arena {
public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        release();
    }

    template <class T>
    T* take(int64_t count) {
        const size_t bytes = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 64));
        while (at_.block < blocks_.size() && at_.used + bytes > blocks_[at_.block].bytes) {
            at_ = Mark{at_.block + 1, 0};
        }
        if (at_.block == blocks_.size()) {
            grow(bytes);
        }
        void* result = blocks_[at_.block].data + at_.used;
        at_.used += bytes;
        return static_cast<T*>(result);
    }

    struct Mark {
        size_t block = 0;
        size_t used = 0;
    };

    Mark mark() const {
        return at_;
    }

    /// Forgets every buffer taken since `mark`.
    void rewind(Mark mark) {
        at_ = mark;
    }

    /// Forgets every buffer; several blocks become one, so that a steady state allocates nothing. More than
    /// `keep_bytes` (a long prompt's) goes back to the system.
    void reset(size_t keep_bytes) {
        size_t total = 0;
        for (const Block& block : blocks_) {
            total += block.bytes;
        }
        at_ = Mark{};
        if (blocks_.size() > 1 || total > keep_bytes) {
            release();
            if (total <= keep_bytes) {
                grow(total);
            }
        }
    }

private:
    struct Block {
        uint8_t* data;
        size_t bytes;
    };

    void grow(size_t bytes) {
        bytes = std::max<size_t>(bytes, size_t(1) << 18);
        blocks_.reserve(blocks_.size() + 1);
        void* data = ::operator new(bytes, std::align_val_t(64));
        blocks_.push_back(Block{static_cast<uint8_t*>(data), bytes});
    }

    void release() {
        for (const Block& block : blocks_) {
            ::operator delete(block.data, std::align_val_t(64));
        }
        blocks_.clear();
    }

    std::vector<Block> blocks_;
    Mark at_;
};

/// Lends arenas to calls. Not thread_local: a thread that waits inside one call may start another one of the same
/// arena by work stealing.
class ArenaLease {
public:
    ArenaLease() {
        const std::lock_guard<std::mutex> lock(pool().mutex);
        if (pool().free.empty()) {
            pool().free.reserve(++pool().lent);
            arena_ = std::make_unique<Arena>();
        } else {
            arena_ = std::move(pool().free.back());
            pool().free.pop_back();
        }
    }
    ArenaLease(const ArenaLease&) = delete;
    ArenaLease& operator=(const ArenaLease&) = delete;
    ~ArenaLease() {
        arena_->reset(kKeepBytes);
        const std::lock_guard<std::mutex> lock(pool().mutex);
        pool().free.push_back(std::move(arena_));
    }

    Arena& operator*() {
        return *arena_;
    }

private:
    static constexpr size_t kKeepBytes = size_t(64) << 20;

    struct Pool {
        std::mutex mutex;
        std::vector<std::unique_ptr<Arena>> free;
        size_t lent = 0;
    };
    static Pool& pool() {
        static Pool instance;
        return instance;
    }

    std::unique_ptr<Arena> arena_;
};

}  // namespace scap
