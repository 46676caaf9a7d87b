// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "weights.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#    define SCAP_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SCAP_AVX2 1
#endif
#if (defined(SCAP_AVX512) && defined(__AVX512VNNI__)) || (defined(SCAP_AVX2) && defined(__AVXVNNI__))
#    define SCAP_VNNI 1
#endif
#if defined(SCAP_VNNI) && defined(SCAP_AVX512) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && \
    defined(__linux__) && defined(__x86_64__)
#    define SCAP_AMX 1
#endif
#if defined(SCAP_AVX512) || defined(SCAP_AVX2)
#    include <immintrin.h>
#endif

#define SCAP_INLINE inline __attribute__((always_inline))
#define SCAP_INLINE_LAMBDA __attribute__((always_inline))

namespace scap {

template <class Body, int... I>
SCAP_INLINE void unroll(const Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

/// body(0), ..., body(N - 1) with constant indices, for arrays of accumulators: GCC keeps an array that a variable
/// indexes in memory, even if it unrolls the loop later. `body` is a SCAP_INLINE_LAMBDA.
template <int N, class Body>
SCAP_INLINE void unroll(const Body& body) {
    unroll(body, std::make_integer_sequence<int, N>{});
}

inline uint32_t float_bits(float value) {
    uint32_t result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

inline float bits_float(uint32_t value) {
    float result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) {
        return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    // Shifting exponent and mantissa into place leaves a factor of 2^-112; the product also makes subnormals right.
    const float scaled = bits_float(magnitude << 13) * bits_float(0x77800000);
    return bits_float(sign | float_bits(scaled));
}

/// A vector of kWidth floats and the loads that turn each weight type into it.
namespace simd {

#if defined(SCAP_AVX512)

constexpr int kWidth = 16;
using Float = __m512;

SCAP_INLINE Float set1(float value) {
    return _mm512_set1_ps(value);
}
SCAP_INLINE Float load(const float* p) {
    return _mm512_loadu_ps(p);
}
SCAP_INLINE void store(float* p, Float v) {
    _mm512_storeu_ps(p, v);
}
SCAP_INLINE Float add(Float a, Float b) {
    return _mm512_add_ps(a, b);
}
SCAP_INLINE Float sub(Float a, Float b) {
    return _mm512_sub_ps(a, b);
}
SCAP_INLINE Float mul(Float a, Float b) {
    return _mm512_mul_ps(a, b);
}
SCAP_INLINE Float fma(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
}
SCAP_INLINE Float load_f16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SCAP_INLINE Float load_bf16(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
SCAP_INLINE Float load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
SCAP_INLINE void load_u4(const uint8_t* p, Float* low, Float* high) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    *low = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    *high = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}

#elif defined(SCAP_AVX2)

constexpr int kWidth = 8;
using Float = __m256;

SCAP_INLINE Float set1(float value) {
    return _mm256_set1_ps(value);
}
SCAP_INLINE Float load(const float* p) {
    return _mm256_loadu_ps(p);
}
SCAP_INLINE void store(float* p, Float v) {
    _mm256_storeu_ps(p, v);
}
SCAP_INLINE Float add(Float a, Float b) {
    return _mm256_add_ps(a, b);
}
SCAP_INLINE Float sub(Float a, Float b) {
    return _mm256_sub_ps(a, b);
}
SCAP_INLINE Float mul(Float a, Float b) {
    return _mm256_mul_ps(a, b);
}
SCAP_INLINE Float fma(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
}
SCAP_INLINE Float load_f16(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SCAP_INLINE Float load_bf16(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
SCAP_INLINE Float load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
SCAP_INLINE void load_u4(const uint8_t* p, Float* low, Float* high) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    *low = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
    *high = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}

#else

constexpr int kWidth = 4;
typedef float Float __attribute__((vector_size(16)));
typedef uint32_t Unsigned __attribute__((vector_size(16)));

SCAP_INLINE Float set1(float value) {
    return Float{value, value, value, value};
}
SCAP_INLINE Float load(const float* p) {
    Float v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
SCAP_INLINE void store(float* p, Float v) {
    std::memcpy(p, &v, sizeof(v));
}
SCAP_INLINE Float add(Float a, Float b) {
    return a + b;
}
SCAP_INLINE Float sub(Float a, Float b) {
    return a - b;
}
SCAP_INLINE Float mul(Float a, Float b) {
    return a * b;
}
SCAP_INLINE Float fma(Float a, Float b, Float c) {
    return a * b + c;
}
SCAP_INLINE Float load_f16(const uint8_t* p) {
    uint16_t h[kWidth];
    std::memcpy(h, p, sizeof(h));
    return Float{f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])};
}
SCAP_INLINE Float load_bf16(const uint8_t* p) {
    uint16_t h[kWidth];
    std::memcpy(h, p, sizeof(h));
    const Unsigned wide = Unsigned{h[0], h[1], h[2], h[3]} << 16;
    Float v;
    std::memcpy(&v, &wide, sizeof(v));
    return v;
}
SCAP_INLINE Float load_u8(const uint8_t* p) {
    return Float{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
SCAP_INLINE void load_u4(const uint8_t* p, Float* low, Float* high) {
    *low = Float{float(p[0] & 15), float(p[1] & 15), float(p[2] & 15), float(p[3] & 15)};
    *high = Float{float(p[0] >> 4), float(p[1] >> 4), float(p[2] >> 4), float(p[3] >> 4)};
}

#endif

/// 32 columns of one row as 32 / kWidth vectors in column order; quantized weights as integers, not dequantized.
template <WeightType Type>
SCAP_INLINE void load_columns32(const uint8_t* p, Float* v) {
    constexpr int kVectors = 32 / kWidth;
    if constexpr (Type == WeightType::u4) {
        for (int i = 0; i < kVectors / 2; ++i) {
            load_u4(p + i * kWidth, &v[i], &v[i + kVectors / 2]);
        }
    } else {
        for (int i = 0; i < kVectors; ++i) {
            const uint8_t* at = p + i * kWidth * bits(Type) / 8;
            if constexpr (Type == WeightType::f32) {
                v[i] = load(reinterpret_cast<const float*>(at));
            } else if constexpr (Type == WeightType::f16) {
                v[i] = load_f16(at);
            } else if constexpr (Type == WeightType::bf16) {
                v[i] = load_bf16(at);
            } else {
                v[i] = load_u8(at);
            }
        }
    }
}

}  // namespace simd

SCAP_INLINE void prefetch(const uint8_t* p) {
    __builtin_prefetch(p, 0, 3);
}

/// For what is read a while later. AMD's cores have two dozen misses of the first cache under way at most, which a
/// prefetch into it counts among, and many more of the second; for Intel's the other was measured to be as fast.
SCAP_INLINE void prefetch_early(const uint8_t* p) {
#if defined(SCAP_PREFETCH_TO_L2)
    __builtin_prefetch(p, 0, 2);
#else
    __builtin_prefetch(p, 0, 3);
#endif
}

}  // namespace scap
