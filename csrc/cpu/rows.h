// Rows of D numbers, of any stride and of float32, bfloat16 or float16, seen as contiguous floats.
// A contiguous float32 row is used where it lies; any other is converted into scratch in the first-level cache.
#pragma once

#include "kernels.h"
#include "simd.h"

#include <cstdlib>
#include <new>

namespace ST_ISA {
namespace {

ST_INLINE Vec from_bfloat16(VecHalf bits) {
  return (Vec)(__builtin_convertvector(bits, VecBits) << 16);
}

ST_INLINE VecHalf to_bfloat16(Vec v) {  // to nearest, ties to even
  const VecBits bits = (VecBits)v;
  VecBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  rounded = (bits & 0x7FFFFFFFu) > 0x7F800000u ? (VecBits{} + 0x7FC0u) : rounded;
  return __builtin_convertvector(rounded, VecHalf);
}

inline float one_from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7FFFu;
  uint32_t bits;
  float value;
  if (rest >= 0x7C00u) {
    bits = sign | 0x7F800000u | ((rest & 0x3FFu) << 13);
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {
    value = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t one_to_float16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;
  if (bits < 0x38800000u) {  // a subnormal: the addition rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3F000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13);
}

ST_INLINE Vec from_float16(VecHalf bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, (__m256i)bits);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = one_from_float16(bits[i]);
  return v;
#endif
}

ST_INLINE VecHalf to_float16(Vec v) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (VecHalf)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecHalf bits;
  for (int i = 0; i < kWidth; ++i) bits[i] = one_to_float16(v[i]);
  return bits;
#endif
}

template <bool BF16>
__attribute__((noinline)) void halves_to_floats(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VecHalf bits = *reinterpret_cast<const VecHalfAnywhere*>(from + i);
    store(to + i, BF16 ? from_bfloat16(bits) : from_float16(bits), Full{});
  }
  if (i == n) return;
  VecHalf bits = {};
  std::memcpy(&bits, from + i, 2 * (n - i));
  store(to + i, BF16 ? from_bfloat16(bits) : from_float16(bits), Part{static_cast<int>(n - i)});
}

template <bool BF16>
__attribute__((noinline)) void floats_to_halves(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = load(from + i, Full{});
    *reinterpret_cast<VecHalfAnywhere*>(to + i) = BF16 ? to_bfloat16(v) : to_float16(v);
  }
  if (i == n) return;
  const Vec v = load(from + i, Part{static_cast<int>(n - i)});
  const VecHalf bits = BF16 ? to_bfloat16(v) : to_float16(v);
  std::memcpy(to + i, &bits, 2 * (n - i));
}

__attribute__((noinline)) void strided_to_floats(const void* from, DType dtype, int64_t stride, float* to,
                                                int64_t n) {
  if (dtype == DType::kFloat32) {
    const float* p = static_cast<const float*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = p[i * stride];
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i * stride]) << 16;
    if (dtype == DType::kBFloat16) std::memcpy(to + i, &bits, 4);
    else to[i] = one_from_float16(p[i * stride]);
  }
}

ST_INLINE char* row_address(const Rows& r, int64_t b, int64_t n) {
  return static_cast<char*>(r.data) + (b * r.batch + n * r.token) * (r.dtype == DType::kFloat32 ? 4 : 2);
}

// Row (b, n) as `length` contiguous floats: the tensor's own memory, or `scratch`.
ST_INLINE const float* read_row(const Rows& r, int64_t b, int64_t n, int64_t length, float* scratch) {
  const char* at = row_address(r, b, n);
  if (r.channel != 1) strided_to_floats(at, r.dtype, r.channel, scratch, length);
  else if (r.dtype == DType::kFloat32) return reinterpret_cast<const float*>(at);
  else if (r.dtype == DType::kBFloat16) halves_to_floats<true>(reinterpret_cast<const uint16_t*>(at), scratch, length);
  else halves_to_floats<false>(reinterpret_cast<const uint16_t*>(at), scratch, length);
  return scratch;
}

// Where to write row (b, n) of an output, whose last axis is contiguous: in place, or into `scratch` until `commit_row`.
ST_INLINE float* write_row(const Rows& r, int64_t b, int64_t n, float* scratch) {
  return r.dtype == DType::kFloat32 ? reinterpret_cast<float*>(row_address(r, b, n)) : scratch;
}

ST_INLINE void commit_row(const Rows& r, int64_t b, int64_t n, int64_t length, const float* scratch) {
  if (r.dtype == DType::kFloat32) return;
  uint16_t* at = reinterpret_cast<uint16_t*>(row_address(r, b, n));
  if (r.dtype == DType::kBFloat16) floats_to_halves<true>(scratch, at, length);
  else floats_to_halves<false>(scratch, at, length);
}

struct Task {
  int64_t b, first, last;
};

// Of tasks that are kTokensPerTask tokens of any sample.
ST_INLINE Task token_task(int64_t task, int64_t N) {
  const int64_t per_sample = divide_up(N, kTokensPerTask);
  const int64_t b = task / per_sample, first = (task % per_sample) * kTokensPerTask;
  return {b, first, first + kTokensPerTask < N ? first + kTokensPerTask : N};
}

// `count` rows of `length` floats for the time of one call, each on its own cache line.
class Scratch {
 public:
  Scratch(int64_t count, int64_t length) : pitch_((length + 15) / 16 * 16) {
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, static_cast<size_t>(count * pitch_ + 16) * 4))
      throw std::bad_alloc();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* row(int64_t i) const { return data_ + i * pitch_; }

 private:
  int64_t pitch_;
  float* data_ = nullptr;
};

}  // namespace
}  // namespace ST_ISA
