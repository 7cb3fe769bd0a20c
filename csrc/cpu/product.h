// Small matrix products, held in registers: C (+)= A·B with B cut into panels of kPanel columns, each contiguous.
#pragma once

#include "simd.h"

namespace ST_ISA {
namespace {

constexpr int kPanel = 32;  // columns: a multiple of two vectors of every width
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 16 accumulators of the 32 registers, twice what the multipliers' latency needs
#else
constexpr int kTileRows = 4;  // 8 of 16
#endif

// Rows of A at `a`, `lda` apart; or its columns, if it is TRANSPOSED.
template <bool TRANSPOSED>
ST_INLINE float element(const float* a, int64_t lda, int row, int64_t k) {
  return TRANSPOSED ? a[k * lda + row] : a[row * lda + k];
}

// ROWS rows by two vectors of columns; b is that place in its panel.
template <bool TRANSPOSED, int ROWS>
ST_INLINE void tile(int64_t depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool add) {
  Vec acc[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = add ? load(c + r * ldc, Full{}) : Vec{};
    acc[r][1] = add ? load(c + r * ldc + kWidth, Full{}) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * kPanel, Full{}), b1 = load(b + k * kPanel + kWidth, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec value = splat(element<TRANSPOSED>(a, lda, r, k));
      acc[r][0] = multiply_add(value, b0, acc[r][0]);
      acc[r][1] = multiply_add(value, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * ldc, acc[r][0], Full{});
    store(c + r * ldc + kWidth, acc[r][1], Full{});
  }
}

// Tiles of ROWS rows from row i on, while there are as many; then halves of them.
template <bool TRANSPOSED, int ROWS>
ST_INLINE void tiles(int64_t i, int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                     int64_t ldc, bool add) {
  for (; i + ROWS <= rows; i += ROWS)
    tile<TRANSPOSED, ROWS>(depth, a + (TRANSPOSED ? i : i * lda), lda, b, c + i * ldc, ldc, add);
  if constexpr (ROWS > 1) {
    if (i < rows) tiles<TRANSPOSED, ROWS / 2>(i, rows, depth, a, lda, b, c, ldc, add);
  }
}

// C (rows, panels · kPanel) (+)= A (rows, depth)·B; panels lie `pitch` floats apart.
template <bool TRANSPOSED>
inline void product(int64_t rows, int64_t panels, int64_t depth, const float* a, int64_t lda, const float* b,
                    int64_t pitch, float* c, int64_t ldc, bool add) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t j = 0; j < kPanel; j += 2 * kWidth)
      tiles<TRANSPOSED, kTileRows>(0, rows, depth, a, lda, b + p * pitch + j, c + p * kPanel + j, ldc, add);
}

// A (rows, columns) matrix as panels of its columns, `pitch` = rows · kPanel.
inline void into_panels(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to) {
  for (int64_t p = 0; p < columns / kPanel; ++p)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; j += kWidth)
        store(to + (p * rows + i) * kPanel + j, load(from + i * ld + p * kPanel + j, Full{}), Full{});
}

// Rows → rows of whole panels.
ST_INLINE int64_t in_panels(int64_t rows) { return (rows + kPanel - 1) / kPanel * kPanel; }

// Its transpose as panels: columns of the transpose are its rows, `pitch` = columns · kPanel. The last panel's other
// columns are zeros.
inline void into_panels_transposed(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < in_panels(rows); ++i) {
    float* at = to + i / kPanel * columns * kPanel + i % kPanel;
    for (int64_t c = 0; c < columns; ++c) at[c * kPanel] = i < rows ? from[i * ld + c] : 0.0f;
  }
}

}  // namespace
}  // namespace ST_ISA
