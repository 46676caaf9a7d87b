// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "simd.hpp"

#if defined(SCAP_VNNI)

/// Vectors of bytes and of 32-bit sums.
namespace scap::vnni {

#    if defined(SCAP_AVX512)
using Int = __m512i;
constexpr int kBytes = 64;
SCAP_INLINE Int load(const uint8_t* p) {
    return _mm512_loadu_si512(p);
}
SCAP_INLINE void store(uint8_t* p, Int v) {
    _mm512_store_si512(p, v);
}
SCAP_INLINE Int zero() {
    return _mm512_setzero_si512();
}
SCAP_INLINE Int set1(int32_t v) {
    return _mm512_set1_epi32(v);
}
SCAP_INLINE Int dot(Int sum, Int u8, Int s8) {
    // With the intrinsic GCC 12 copies accumulators around, through memory when there are many: half of the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
    return sum;
}
SCAP_INLINE Int interleave8_low(Int a, Int b) {
    return _mm512_unpacklo_epi8(a, b);
}
SCAP_INLINE Int interleave8_high(Int a, Int b) {
    return _mm512_unpackhi_epi8(a, b);
}
SCAP_INLINE Int interleave16_low(Int a, Int b) {
    return _mm512_unpacklo_epi16(a, b);
}
SCAP_INLINE Int interleave16_high(Int a, Int b) {
    return _mm512_unpackhi_epi16(a, b);
}
SCAP_INLINE Int low_nibbles(Int v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
SCAP_INLINE Int high_nibbles(Int v) {
    return low_nibbles(_mm512_srli_epi16(v, 4));
}
SCAP_INLINE Int shift_left8(Int v) {
    return _mm512_slli_epi32(v, 8);
}
SCAP_INLINE Int add(Int a, Int b) {
    return _mm512_add_epi32(a, b);
}
SCAP_INLINE Int sub(Int a, Int b) {
    return _mm512_sub_epi32(a, b);
}
SCAP_INLINE Int mul(Int a, Int b) {
    return _mm512_mullo_epi32(a, b);
}
SCAP_INLINE simd::Float to_float(Int v) {
    return _mm512_cvtepi32_ps(v);
}
SCAP_INLINE Int load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
/// Interleaving bytes inside 128-bit lanes leaves lane l of v[k] with columns 16 l + 4 k .. + 3: put them in order.
SCAP_INLINE void order_columns(Int v[4]) {
    const Int a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
    const Int b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const Int c = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const Int d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}
#    else
using Int = __m256i;
constexpr int kBytes = 32;
SCAP_INLINE Int load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Int*>(p));
}
SCAP_INLINE void store(uint8_t* p, Int v) {
    _mm256_store_si256(reinterpret_cast<Int*>(p), v);
}
SCAP_INLINE Int zero() {
    return _mm256_setzero_si256();
}
SCAP_INLINE Int set1(int32_t v) {
    return _mm256_set1_epi32(v);
}
SCAP_INLINE Int dot(Int sum, Int u8, Int s8) {
    return _mm256_dpbusd_avx_epi32(sum, u8, s8);
}
SCAP_INLINE Int interleave8_low(Int a, Int b) {
    return _mm256_unpacklo_epi8(a, b);
}
SCAP_INLINE Int interleave8_high(Int a, Int b) {
    return _mm256_unpackhi_epi8(a, b);
}
SCAP_INLINE Int interleave16_low(Int a, Int b) {
    return _mm256_unpacklo_epi16(a, b);
}
SCAP_INLINE Int interleave16_high(Int a, Int b) {
    return _mm256_unpackhi_epi16(a, b);
}
SCAP_INLINE Int low_nibbles(Int v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}
SCAP_INLINE Int high_nibbles(Int v) {
    return low_nibbles(_mm256_srli_epi16(v, 4));
}
SCAP_INLINE Int shift_left8(Int v) {
    return _mm256_slli_epi32(v, 8);
}
SCAP_INLINE Int add(Int a, Int b) {
    return _mm256_add_epi32(a, b);
}
SCAP_INLINE Int sub(Int a, Int b) {
    return _mm256_sub_epi32(a, b);
}
SCAP_INLINE Int mul(Int a, Int b) {
    return _mm256_mullo_epi32(a, b);
}
SCAP_INLINE simd::Float to_float(Int v) {
    return _mm256_cvtepi32_ps(v);
}
SCAP_INLINE Int load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
/// Interleaving bytes inside 128-bit lanes leaves lane l of v[k] with columns 16 l + 4 k .. + 3: put them in order.
SCAP_INLINE void order_columns(Int v[4]) {
    const Int a = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    const Int b = _mm256_permute2x128_si256(v[2], v[3], 0x20);
    const Int c = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    const Int d = _mm256_permute2x128_si256(v[2], v[3], 0x31);
    v[0] = a;
    v[1] = b;
    v[2] = c;
    v[3] = d;
}
#    endif

/// Four bytes in every lane.
SCAP_INLINE Int broadcast(const int8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return set1(bytes);
}

/// Columns of one vector load.
template <WeightType Type>
constexpr int64_t kColumns = Type == WeightType::u4 ? 2 * kBytes : kBytes;

/// Interleaves one vector of four rows so that each 32-bit lane holds one column of the four.
SCAP_INLINE void interleave_rows(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, Int v[4]) {
    const Int ra = load(a), rb = load(b), rc = load(c), rd = load(d);
    const Int ab_low = interleave8_low(ra, rb), ab_high = interleave8_high(ra, rb);
    const Int cd_low = interleave8_low(rc, rd), cd_high = interleave8_high(rc, rd);
    v[0] = interleave16_low(ab_low, cd_low);
    v[1] = interleave16_high(ab_low, cd_low);
    v[2] = interleave16_low(ab_high, cd_high);
    v[3] = interleave16_high(ab_high, cd_high);
}

/// The first column of ordered vector i of nibble half h (always 0 for u8), relative to the load's first column.
template <WeightType Type>
constexpr int64_t column_of(int half, int i) {
    const int64_t at = int64_t(i) * simd::kWidth;
    return Type == WeightType::u4 ? at / 16 * 32 + half * 16 + at % 16 : at;
}

}  // namespace scap::vnni

#endif
