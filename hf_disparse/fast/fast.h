/* What the C files share: vectors of tokens, matrices, layers.
 *
 * Tokens are the lanes. A tile is a matrix (features, width) of up to LANES tokens, so that whatever a Transformer does to a token
 * happens in one lane: products, norms and activations need no transposition and no sum across lanes.
 */
#ifndef HF_DISPARSE_FAST_H
#define HF_DISPARSE_FAST_H

#include <stdint.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define WIDTH 16 /* floats in a vector */
#else
#define WIDTH 8 /* AVX2; two registers of NEON */
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define GROUP 6 /* rows that a dense product makes at once: GROUP * 4 sums fill the registers */
#else
#define GROUP 3
#endif
#define LANES 64 /* tokens in a full tile: 1.2 times as fast as 32, as each weight is loaded for twice as many sums */
#define VECTORS (LANES / WIDTH)
#define BLOCK 256 /* input features whose tile (64 KB) stays close, and whose number fits one byte */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
/* Lane by lane, a where the mask is -1, b where it is 0. */
INLINE vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* a * b + c, rounded once. On AMD, gcc would split some sums in loops with few of them, so that a text's numbers
 * depended on the width of its tile, hence on its neighbours and the number of threads. */
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

/* The part of 0..n that worker `me` of `workers` does, in multiples of `step`. */
INLINE void part(int64_t n, int64_t step, int me, int workers, int64_t *first, int64_t *last) {
  int64_t steps = (n + step - 1) / step;
  *first = step * (steps * me / workers);
  *last = step * (steps * (me + 1) / workers);
  if (*last > n) *last = n;
}

/* y = W x + bias, with W (rows, columns) stored by blocks of BLOCK columns.
 * sparse: of every block, row by row, its non-zeros in `values` and their columns within the block in `places`; row r of block b
 *   has those from starts[b * rows + r] to starts[b * rows + r + 1], filled up with zeros to a multiple of 4.
 * dense (starts is NULL): of every block, GROUP rows by GROUP rows (the last filled up by zeros), column by column GROUP values. */
typedef struct {
  int64_t rows, columns;
  const float *values;
  const uint8_t *places;
  const int64_t *starts;
  const float *bias; /* (rows,) or NULL */
} Matrix;

/* y (tokens, rows) = x (tokens, columns) W^T + bias, with tiles shared among threads. Returns 1 if memory is lacking. */
int linear(const Matrix *m, const float *x, float *y, int64_t tokens, int threads);

/* x (columns, 64 or fewer lanes), y (rows, as many lanes): rows `first` to `last` of y = W x + bias. */
void product(const Matrix *m, const float *x, float *y, int vectors, int64_t first, int64_t last);

#endif
