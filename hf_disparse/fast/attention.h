/* Attention of one head within one text: the lanes are its queries. */
#ifndef HF_DISPARSE_ATTENTION_H
#define HF_DISPARSE_ATTENTION_H

#include "operations.h"

/* A matrix (features, tokens) in tiles: tile t holds the vectors first[t] to first[t + 1] of the tokens, features by rows. */
typedef struct {
  int64_t tiles;
  const int64_t *first;
} Tiling;

INLINE int vectors_of(const Tiling *t, int64_t tile) { return (int)(t->first[tile + 1] - t->first[tile]); }
INLINE int64_t first_token(const Tiling *t, int64_t tile) { return t->first[tile] * WIDTH; }
INLINE float *tile_of(const Tiling *t, float *x, int64_t features, int64_t tile) {
  return x + first_token(t, tile) * features;
}

/* The tile with this token; all tiles have the same number of vectors or one more. */
static int64_t tile_with(const Tiling *t, int64_t token) {
  int64_t vector = token / WIDTH, tile = vector * t->tiles / t->first[t->tiles];
  while (t->first[tile + 1] <= vector) tile++;
  while (t->first[tile] > vector) tile--;
  return tile;
}

/* The keys of one tile: `count` tokens from lane `lane` of `tile`, whose rows are `width` floats long; `done` keys came before. */
typedef struct {
  int64_t tile, lane, count, done;
  int width;
} Keys;

/* Goes on to the next tile that holds tokens `from` to `to`; returns 0 after the last. Begin with tile = -1. */
INLINE int next_keys(const Tiling *t, int64_t from, int64_t to, Keys *k) {
  k->done = k->tile < 0 ? 0 : k->done + k->count;
  if (k->done == to - from) return 0;
  k->tile = k->tile < 0 ? tile_with(t, from) : k->tile + 1;
  int64_t end = first_token(t, k->tile + 1);
  k->lane = from + k->done - first_token(t, k->tile);
  k->count = (to < end ? to : end) - from - k->done;
  k->width = vectors_of(t, k->tile) * WIDTH;
  return 1;
}

/* Up to four vectors of one tile that hold tokens of one text: the queries of one step. */
typedef struct {
  int64_t tile, begin, end; /* tokens of the text: from begin to end, not included */
  int first, last;          /* vectors of the tile */
} Queries;

typedef struct {
  const Tiling *tiling;
  float *qkv;      /* (3 * heads * size, tokens): queries, keys, values */
  float *context;  /* (heads * size, tokens) */
  int64_t heads, size, window;
  float scale;
  const float *bias; /* of this head, by query's place - key's place; or NULL */
} Attention;

INLINE ivec lanes_from(int64_t n) {
  ivec lanes;
  for (int i = 0; i < WIDTH; i++) lanes[i] = (int)n + i;
  return lanes;
}

/* scores[key][query] = scale * sum_d key[d] query[d] + bias, for `many` (1 or 2) keys at once; keeps each query's largest. */
INLINE void score_keys(const Attention *a, const float *keys, int64_t stride, const float *queries, int width, float *scores,
                       int64_t distance, vec *largest, const int many, const int vectors) {
  vec sums[2][4];
  for (int k = 0; k < many; k++)
    for (int v = 0; v < vectors; v++) sums[k][v] = all(0);
  for (int64_t d = 0; d < a->size; d++, keys += stride, queries += width)
    for (int v = 0; v < vectors; v++) {
      vec q = load(queries + v * WIDTH);
      for (int k = 0; k < many; k++) sums[k][v] = fused(all(keys[k]), q, sums[k][v]);
    }
  for (int k = 0; k < many; k++)
    for (int v = 0; v < vectors; v++) {
      int64_t d = distance - k + v * WIDTH; /* from this key to the query of the first lane */
      vec s = sums[k][v] * all(a->scale);
      if (a->bias) s = fused(sums[k][v], all(a->scale), load(a->bias + d));
      if (a->window >= 0) {
        ivec away = lanes_from(d);
        s = pick((away > (int)a->window) | (away < -(int)a->window), all(-3e38f), s);
      }
      store(scores + (k * vectors + v) * WIDTH, s);
      largest[v] = pick(s > largest[v], s, largest[v]);
    }
}

/* sums[d][query] += sum_keys value[d][key] p[key][query], for `many` (1 or 2) features d at once. */
INLINE void add_values(const float *values, int64_t stride, int64_t keys, const float *p, vec sums[2][4], const int many,
                       const int vectors) {
  for (int64_t k = 0; k < keys; k++, p += vectors * WIDTH)
    for (int v = 0; v < vectors; v++) {
      vec weight = load(p + v * WIDTH);
      for (int d = 0; d < many; d++) sums[d][v] = fused(all(values[d * stride + k]), weight, sums[d][v]);
    }
}

/* context[d] = sum_keys softmax(scores)[key] value[d][key] */
INLINE void attend_vectors(const Attention *a, const Queries *q, int64_t head, float *scores, const int vectors) {
  const Tiling *t = a->tiling;
  int width = vectors_of(t, q->tile) * WIDTH;
  int64_t rows = a->heads * a->size, row = head * a->size, token = first_token(t, q->tile) + q->first * WIDTH;
  const float *queries = tile_of(t, a->qkv, 3 * rows, q->tile) + row * width + q->first * WIDTH;
  int64_t from = q->begin, to = q->end;
  if (a->window >= 0 && token - a->window > from) from = token - a->window;
  if (a->window >= 0 && token + vectors * WIDTH + a->window < to) to = token + vectors * WIDTH + a->window;

  vec largest[4], sum[4];
  for (int v = 0; v < vectors; v++) largest[v] = all(-__builtin_inff()), sum[v] = all(0);
  for (Keys k = {.tile = -1}; next_keys(t, from, to, &k);) {
    const float *keys = tile_of(t, a->qkv, 3 * rows, k.tile) + (rows + row) * k.width + k.lane;
    float *out = scores + k.done * vectors * WIDTH;
    int64_t i = 0, away = token - from - k.done;
    for (; i + 2 <= k.count; i += 2)
      score_keys(a, keys + i, k.width, queries, width, out + i * vectors * WIDTH, away - i, largest, 2, vectors);
    if (i < k.count)
      score_keys(a, keys + i, k.width, queries, width, out + i * vectors * WIDTH, away - i, largest, 1, vectors);
  }
  for (float *p = scores, *end = scores + (to - from) * vectors * WIDTH; p < end; p += vectors * WIDTH)
    for (int v = 0; v < vectors; v++) {
      vec e = exponential(load(p + v * WIDTH) - largest[v]);
      store(p + v * WIDTH, e);
      sum[v] += e;
    }
  float *context = tile_of(t, a->context, rows, q->tile) + row * width + q->first * WIDTH;
  for (int64_t d = 0; d < a->size; d += 2) {
    vec sums[2][4];
    for (int v = 0; v < vectors; v++) sums[0][v] = sums[1][v] = all(0);
    for (Keys k = {.tile = -1}; next_keys(t, from, to, &k);) {
      const float *values = tile_of(t, a->qkv, 3 * rows, k.tile) + (2 * rows + row + d) * k.width + k.lane;
      const float *p = scores + k.done * vectors * WIDTH;
      if (d + 1 < a->size) add_values(values, k.width, k.count, p, sums, 2, vectors);
      else add_values(values, k.width, k.count, p, sums, 1, vectors);
    }
    for (int i = 0; i < 2 && d + i < a->size; i++)
      for (int v = 0; v < vectors; v++) {
        float *at = context + (d + i) * width + v * WIDTH;
        vec result = sums[i][v] / sum[v];
        int64_t lane = token + v * WIDTH;
        if (lane >= q->begin && lane + WIDTH <= q->end) store(at, result);
        else /* other lanes are another text's, which another thread may write */
          for (int64_t l = 0; l < WIDTH; l++)
            if (lane + l >= q->begin && lane + l < q->end) at[l] = result[l];
      }
  }
}

static void attend(const Attention *a, const Queries *q, int64_t head, float *scores) {
  switch (q->last - q->first) {
    case 1: return attend_vectors(a, q, head, scores, 1);
    case 2: return attend_vectors(a, q, head, scores, 2);
    case 3: return attend_vectors(a, q, head, scores, 3);
    default: return attend_vectors(a, q, head, scores, 4);
  }
}

#endif
