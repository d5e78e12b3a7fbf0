/* Products of a matrix with a tile of tokens, from a sparse or a dense matrix. */
#include "fast.h"

#include <pthread.h>
#include <stdlib.h>

const int row_group = GROUP; /* for those who store dense matrices */

/* sums += weight * x[place] */
#define ADD(weight, place)                                                       \
  {                                                                              \
    vec w = all(weight);                                                         \
    const float *from = x + (size_t)(place) * (vectors * WIDTH);                 \
    for (int v = 0; v < vectors; v++) sums[v] = fused(w, load(from + v * WIDTH), sums[v]); \
  }

/* The loop is bound by loads: of x, of the weight, of its place. Four places come in one load, and steps of four without a rest
 * mispredict less: 1.1 times as fast at 32 tokens and 90 % zeros. */
INLINE void sparse_rows(const Matrix *m, const float *x, float *y, const int vectors, int64_t first, int64_t last) {
  for (int64_t block = 0; block * BLOCK < m->columns || block == 0; block++, x += BLOCK * vectors * WIDTH) {
    const int64_t *start = m->starts + block * m->rows;
    for (int64_t row = first; row < last; row++) {
      float *to = y + row * vectors * WIDTH;
      const float *value = m->values + start[row];
      const uint8_t *place = m->places + start[row];
      const float *end = m->values + start[row + 1];
      __builtin_prefetch(value + 256); /* 1.06 times as fast where a large matrix comes from memory for one text */
      __builtin_prefetch(place + 256);
      vec sums[VECTORS];
      for (int v = 0; v < vectors; v++) sums[v] = block ? load(to + v * WIDTH) : all(m->bias ? m->bias[row] : 0);
      for (; value < end; value += 4, place += 4) {
        uint32_t four;
        memcpy(&four, place, 4);
        ADD(value[0], four & 255)
        ADD(value[1], four >> 8 & 255)
        ADD(value[2], four >> 16 & 255)
        ADD(value[3], four >> 24)
      }
      for (int v = 0; v < vectors; v++) store(to + v * WIDTH, sums[v]);
    }
  }
}

/* GROUP rows of `vectors` <= 4 vectors of lanes, `width` lanes apart: every sum stays in a register for a whole block. */
INLINE void dense_group(const float *value, int64_t columns, const float *x, float *y, const int vectors, int width,
                        const float *bias, int64_t rows, int is_first) {
  vec sums[GROUP][4];
  for (int r = 0; r < GROUP; r++)
    for (int v = 0; v < vectors; v++)
      sums[r][v] = r >= rows ? all(0) : is_first ? all(bias ? bias[r] : 0) : load(y + r * width + v * WIDTH);
  for (int64_t c = 0; c < columns; c++, x += width, value += GROUP)
    for (int v = 0; v < vectors; v++) {
      vec in = load(x + v * WIDTH);
      for (int r = 0; r < GROUP; r++) sums[r][v] = fused(all(value[r]), in, sums[r][v]);
    }
  for (int r = 0; r < GROUP && r < rows; r++)
    for (int v = 0; v < vectors; v++) store(y + r * width + v * WIDTH, sums[r][v]);
}

static void dense_rows(const Matrix *m, const float *x, float *y, int vectors, int64_t first, int64_t last) {
  int width = vectors * WIDTH;
  int64_t rows = (m->rows + GROUP - 1) / GROUP * GROUP;
  for (int64_t start = 0; start < m->columns || start == 0; start += BLOCK) {
    int64_t columns = m->columns - start < BLOCK ? m->columns - start : BLOCK;
    for (int v = 0; v < vectors; v += 4)
      for (int64_t row = first; row < last; row += GROUP) {
        const float *value = m->values + start * rows + row * columns, *from = x + start * width + v * WIDTH;
        float *to = y + row * width + v * WIDTH;
        const float *bias = m->bias ? m->bias + row : 0;
#define CASE(n) dense_group(value, columns, from, to, n, width, bias, m->rows - row, start == 0)
        switch (vectors - v) {
          case 1: CASE(1); break;
          case 2: CASE(2); break;
          case 3: CASE(3); break;
          default: CASE(4);
        }
#undef CASE
      }
  }
}

void product(const Matrix *m, const float *x, float *y, int vectors, int64_t first, int64_t last) {
  if (!m->starts) return dense_rows(m, x, y, vectors, first, last);
  switch (vectors) { /* a constant, so that the compiler keeps the sums in registers */
    case 1: return sparse_rows(m, x, y, 1, first, last);
    case 2: return sparse_rows(m, x, y, 2, first, last);
    case 3: return sparse_rows(m, x, y, 3, first, last);
    case 4: return sparse_rows(m, x, y, 4, first, last);
#if VECTORS == 8
    case 5: return sparse_rows(m, x, y, 5, first, last);
    case 6: return sparse_rows(m, x, y, 6, first, last);
    case 7: return sparse_rows(m, x, y, 7, first, last);
    case 8: return sparse_rows(m, x, y, 8, first, last);
#endif
  }
}

typedef struct {
  const Matrix *matrix;
  const float *x;
  float *y;
  int64_t first, last; /* tokens */
  int threaded, failed;
} Share;

/* y (tokens, rows) = x (tokens, columns) W^T + bias: some tiles, each turned so that tokens are lanes, and back. */
static void *linear_share(void *argument) {
  Share *s = argument;
  const Matrix *m = s->matrix;
  float *in = malloc((LANES * (m->columns + m->rows) + 1) * sizeof(float)), *out = in + LANES * m->columns;
  if (!in) return s->failed = 1, NULL;
  for (int64_t token = s->first; token < s->last; token += LANES) {
    int64_t tokens = s->last - token < LANES ? s->last - token : LANES;
    int vectors = (int)((tokens + WIDTH - 1) / WIDTH), width = vectors * WIDTH;
    for (int lane = 0; lane < width; lane++)
      for (int64_t c = 0; c < m->columns; c++) in[c * width + lane] = lane < tokens ? s->x[(token + lane) * m->columns + c] : 0;
    product(m, in, out, vectors, 0, m->rows);
    for (int lane = 0; lane < tokens; lane++)
      for (int64_t r = 0; r < m->rows; r++) s->y[(token + lane) * m->rows + r] = out[r * width + lane];
  }
  free(in);
  return NULL;
}

int linear(const Matrix *m, const float *x, float *y, int64_t tokens, int threads) {
  Share shares[threads];
  pthread_t handles[threads];
  int failed = 0;
  for (int i = 0; i < threads; i++) {
    shares[i] = (Share){.matrix = m, .x = x, .y = y};
    part(tokens, LANES, i, threads, &shares[i].first, &shares[i].last);
  }
  for (int i = 1; i < threads; i++)
    shares[i].threaded = shares[i].first < shares[i].last && !pthread_create(&handles[i], 0, linear_share, &shares[i]);
  for (int i = 0; i < threads; i++)
    if (!shares[i].threaded) linear_share(&shares[i]);
  for (int i = 1; i < threads; i++)
    if (shares[i].threaded) pthread_join(handles[i], 0);
  for (int i = 0; i < threads; i++) failed |= shares[i].failed;
  return failed;
}
