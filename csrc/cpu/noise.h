// Normals that follow from (key, purpose, ordinal), and noisy latents made of them: the bits of
// kernels/noise/definition.py on every instruction set. Single float operations and integers only, no fused
// multiply-add, so that nothing depends on the vector's width.
#pragma once

#include "rows.h"

namespace ST_ISA {
namespace {

constexpr int64_t kDraws = kNumbersPerTask / 4;  // Philox blocks of a task, four numbers each
static_assert(kDraws % kWidth == 0, "a task must be whole vectors");

constexpr uint32_t kSqrtHalf = 0x3F3504F3u;  // the bits of sqrt(1/2)
constexpr float kTwoLn2High = 1.38629150390625f, kTwoLn2Low = 2.857213530660374e-06f;
constexpr float kLog[] = {0.9999995231628418f,   -0.6666667461395264f, 0.5000474452972412f,
                          -0.40003588795661926f, 0.33187416195869446f, -0.28354132175445557f,
                          0.2669579088687897f,   -0.2593565881252289f, 0.149336576461792f};
constexpr float kSine[] = {6.2831854820251465f, -41.34176254272461f, 81.6053695678711f, -75.87133026123047f};
constexpr float kCosine[] = {1.0f, -19.739208221435547f, 64.93917083740234f, -85.42823791503906f,
                             58.76472473144531f};

template <int N>
ST_INLINE Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec value = splat(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// -2 ln((word | 1) 2^-32). The shift by e = 32 is made in two.
ST_INLINE Vec minus_two_log(VecBits word) {
  const VecBits odd = word | 1u;
  const VecInt e = ((VecInt)__builtin_convertvector(odd, Vec) - static_cast<int32_t>(kSqrtHalf)) >> 23;
  const VecInt last = e >> 5;
  const VecBits power = ((VecBits{} + 1u) << (VecBits)(e - last)) << (VecBits)last;
  const Vec f = __builtin_convertvector((VecInt)(odd - power), Vec) * (Vec)((127 - e) << 23);
  const Vec n = __builtin_convertvector(32 - e, Vec);
  return n * kTwoLn2High + ((f * f * polynomial(f, kLog) + n * kTwoLn2Low) - 2.0f * f);
}

// cos and sin of v turns, |v| <= 1/8.
ST_INLINE void cos_sin(Vec v, Vec* cos, Vec* sin) {
  const Vec square = v * v;
  *cos = polynomial(square, kCosine);
  *sin = v * polynomial(square, kSine);
}

ST_INLINE void box_muller(VecBits radius_word, VecBits angle_word, Vec* first, Vec* second) {
  const Vec radius = square_root(minus_two_log(radius_word));
  const VecBits quarter = (angle_word + 0x20000000u) >> 30;  // the nearest quarter of a turn
  const Vec v = __builtin_convertvector((VecInt)(angle_word - (quarter << 30)), Vec) * 0x1p-32f;
  Vec cos, sin;
  cos_sin(v, &cos, &sin);
  const VecInt across = (quarter & 1u) != 0u;
  const Vec cos_sign = __builtin_convertvector(1 - (VecInt)((quarter + 1u) & 2u), Vec);
  const Vec sin_sign = __builtin_convertvector(1 - (VecInt)(quarter & 2u), Vec);
  *first = radius * cos_sign * (across ? sin : cos);
  *second = radius * sin_sign * (across ? cos : sin);
}

// Philox4x32-10 of `count` consecutive blocks from `block` on, in place of the counter: word by word.
ST_INLINE void philox(uint32_t (*word)[kDraws], int64_t block, int64_t count, uint64_t ordinal, uint32_t purpose,
                      uint64_t key) {
  for (int64_t i = 0; i < count; ++i) {
    word[0][i] = static_cast<uint32_t>(block + i);
    word[1][i] = static_cast<uint32_t>(ordinal);
    word[2][i] = static_cast<uint32_t>(ordinal >> 32);
    word[3][i] = purpose;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t a = uint64_t{0xD2511F53u} * word[0][i], b = uint64_t{0xCD9E8D57u} * word[2][i];
      word[0][i] = static_cast<uint32_t>(b >> 32) ^ word[1][i] ^ key0;
      word[1][i] = static_cast<uint32_t>(b);
      word[2][i] = static_cast<uint32_t>(a >> 32) ^ word[3][i] ^ key1;
      word[3][i] = static_cast<uint32_t>(a);
    }
}

// 4 * count normals of `count` blocks (a multiple of kWidth).
ST_INLINE void normals(float* out, int64_t block, int64_t count, uint64_t ordinal, uint32_t purpose, uint64_t key) {
  uint32_t word[4][kDraws];
  float made[4][kDraws];
  philox(word, block, count, ordinal, purpose, key);
  for (int64_t i = 0; i < count; i += kWidth) {
    VecBits w[4];
    Vec n[4];
    for (int k = 0; k < 4; ++k) std::memcpy(&w[k], word[k] + i, sizeof(Vec));
    box_muller(w[0], w[1], &n[0], &n[1]);
    box_muller(w[2], w[3], &n[2], &n[3]);
    for (int k = 0; k < 4; ++k) store(made[k] + i, n[k], Full{});
  }
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < 4; ++k) out[4 * i + k] = made[k][i];
}

struct Mixture {
  float alpha, sigma, d_alpha, d_sigma;
};

ST_INLINE Mixture mixture(float t, bool cosine) {
  if (!cosine) return {1.0f - t, t, -1.0f, 1.0f};
  const bool late = t > 0.5f;
  Vec cos, sin;
  cos_sin(splat((late ? 1.0f - t : t) * 0.25f), &cos, &sin);
  const float c = late ? sin[0] : cos[0], s = late ? cos[0] : sin[0];
  return {c, s, -1.5707963267948966f * s, 1.5707963267948966f * c};
}

void noisy_latents(const NoisyLatents& p, int64_t begin, int64_t end) {
  const int64_t tasks = divide_up(p.count, kNumbersPerTask);
  const Scratch scratch(4, kNumbersPerTask);
  float *xi = scratch.row(0), *noise = scratch.row(1);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / tasks, at = task % tasks * kNumbersPerTask;
    const int64_t length = at + kNumbersPerTask < p.count ? kNumbersPerTask : p.count - at;
    const int64_t blocks = divide_up(divide_up(length, 4), kWidth) * kWidth;
    const uint64_t ordinal = static_cast<uint64_t>(p.ordinals[b * p.ordinal_stride]);
    normals(xi, at / 4, blocks, ordinal, kPosterior, p.key);
    normals(noise, at / 4, blocks, ordinal, kNoise, p.key);
    const Mixture mix = mixture(p.t[b * p.t_stride], p.cosine);
    const float* mean = read_row(p.moments, b, at, length, scratch.row(2));
    const float* std = read_row(p.moments, b, p.count + at, length, scratch.row(3));
    float* const out[4] = {p.x + b * p.count + at, p.x_t + b * p.count + at, p.velocity + b * p.count + at,
                           p.noise + b * p.count + at};
    sweep(length, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      const Vec eps = load(noise + i, lanes), draw = load(std + i, lanes) * load(xi + i, lanes);
      const Vec x = p.scale * (load(mean + i, lanes) + draw);
      store(out[0] + i, x, lanes);
      store(out[1] + i, mix.alpha * x + mix.sigma * eps, lanes);
      store(out[2] + i, mix.d_alpha * x + mix.d_sigma * eps, lanes);
      store(out[3] + i, eps, lanes);
    });
  }
}

}  // namespace
}  // namespace ST_ISA
