// One vector of floats of the width that this translation unit is compiled for, and the few things
// the kernels need of it. Everything lives in an anonymous namespace: the file is compiled once per
// instruction set into one library, and no symbol of the AVX-512 copy may serve the baseline one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define ST_INLINE inline __attribute__((always_inline))
#define ST_LAMBDA __attribute__((always_inline))

namespace ST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE2, NEON
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth)));
typedef float VecAnywhere __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t VecHalfAnywhere __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

// How many lanes of a vector are in use: all of them, or the first `count` at the end of a row.
struct Full {};
struct Part {
  int count;
};

// Which of the four independent accumulators a step of `sweep` belongs to.
template <int K>
struct Slot {
  static constexpr int value = K;
};

ST_INLINE Vec load(const float* p, Full) { return *reinterpret_cast<const VecAnywhere*>(p); }
ST_INLINE void store(float* p, Vec v, Full) { *reinterpret_cast<VecAnywhere*>(p) = v; }
ST_INLINE Vec keep(Vec v, Full) { return v; }

#if defined(__AVX512F__)
ST_INLINE __mmask16 lanes_mask(Part part) { return static_cast<__mmask16>((1u << part.count) - 1); }
ST_INLINE Vec load(const float* p, Part part) { return _mm512_maskz_loadu_ps(lanes_mask(part), p); }
ST_INLINE void store(float* p, Vec v, Part part) { _mm512_mask_storeu_ps(p, lanes_mask(part), v); }
ST_INLINE Vec keep(Vec v, Part part) { return _mm512_maskz_mov_ps(lanes_mask(part), v); }
#else
ST_INLINE VecInt lanes_mask(Part part) {
  VecInt lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < part.count;
}
#if defined(__AVX2__)
ST_INLINE Vec load(const float* p, Part part) { return _mm256_maskload_ps(p, (__m256i)lanes_mask(part)); }
ST_INLINE void store(float* p, Vec v, Part part) { _mm256_maskstore_ps(p, (__m256i)lanes_mask(part), v); }
#else
ST_INLINE Vec load(const float* p, Part part) {
  Vec v = {};
  for (int i = 0; i < part.count; ++i) v[i] = p[i];
  return v;
}
ST_INLINE void store(float* p, Vec v, Part part) {
  for (int i = 0; i < part.count; ++i) p[i] = v[i];
}
#endif
// Padding lanes back to zero, so that they add nothing to a sum.
ST_INLINE Vec keep(Vec v, Part part) { return (Vec)((VecInt)v & lanes_mask(part)); }
#endif

// Past the caches, which spares reading a line that is overwritten whole: for results larger than a cache, whose rows
// lie on `kLine`. Other threads see them after `drain`.
ST_INLINE void store(float* p, Vec v, Full, bool past_cache) {
#if defined(__AVX512F__)
  if (past_cache) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if (past_cache) return _mm256_stream_ps(p, (__m256)v);
#else
  (void)past_cache;
#endif
  store(p, v, Full{});
}
ST_INLINE void store(float* p, Vec v, Part part, bool) { store(p, v, part); }

inline void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

ST_INLINE Vec splat(float x) { return x - Vec{}; }

// a * b + c, rounded once where the machine can.
ST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

ST_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xFFFF, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Lanes 2i and 2i + 1 exchanged.
ST_INLINE Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return _mm512_maskz_permute_ps(0xFFFF, v, 0xB1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(v, 0xB1);
#else
  Vec swapped;
  for (int i = 0; i < kWidth; ++i) swapped[i] = v[i ^ 1];
  return swapped;
#endif
}

// The first half of a vector of floats at p, each of them twice.
ST_INLINE Vec twice(const float* p) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_maskz_permutexvar_ps(0xFFFF, lane, _mm512_zextps256_ps512(_mm256_loadu_ps(p)));
#elif defined(__AVX2__)
  const __m256i lane = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(_mm_loadu_ps(p)), lane);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = p[i / 2];
  return v;
#endif
}

// The sum of four accumulators over all lanes, always in the same order: halves are added until one lane is left.
ST_INLINE float total(const Vec* acc) {
  const Vec v = (acc[0] + acc[1]) + (acc[2] + acc[3]);
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
  const __m256 eight = v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Calls f(offset, lanes, slot) over 0..n, four vectors at a time, then one, then the rest.
template <class F>
ST_INLINE void sweep(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    f(i, Full{}, Slot<0>{});
    f(i + kWidth, Full{}, Slot<1>{});
    f(i + 2 * kWidth, Full{}, Slot<2>{});
    f(i + 3 * kWidth, Full{}, Slot<3>{});
  }
  for (; i + kWidth <= n; i += kWidth) f(i, Full{}, Slot<0>{});
  if (i < n) f(i, Part{static_cast<int>(n - i)}, Slot<0>{});
}

// e^v for v in [-87, 88] (clamped): Cody-Waite reduction, degree-6 polynomial, 1 ulp. NaN stays NaN.
ST_INLINE Vec exponential(Vec v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  const Vec shifted = v * 1.44269504088896341f + 12582912.0f;  // round to nearest by 1.5 * 2^23
  const Vec n = shifted - 12582912.0f;
  const Vec r = multiply_add(n, splat(2.12194440e-4f), v - n * 0.693359375f);
  Vec p = multiply_add(splat(1.0f / 720.0f), r, splat(1.0f / 120.0f));
  p = multiply_add(p, r, splat(1.0f / 24.0f));
  p = multiply_add(p, r, splat(1.0f / 6.0f));
  p = multiply_add(p, r, splat(0.5f));
  p = multiply_add(p, r, splat(1.0f));
  p = multiply_add(p, r, splat(1.0f));
  return (Vec)((VecInt)p + (((VecInt)shifted - 0x4B400000) << 23));
}

}  // namespace
}  // namespace ST_ISA
