/* A Transformer encoder and a batch of texts, as Python describes them. */
#ifndef HF_DISPARSE_ENCODER_H
#define HF_DISPARSE_ENCODER_H

#include "fast.h"

enum { GELU, GELU_TANH, RELU, SILU };

typedef struct {
  const float *weight; /* (features,); NULL: the features pass as they are */
  const float *bias;   /* (features,) or NULL */
  double epsilon;
} Norm;

typedef struct {
  int64_t heads;
  int64_t projections;    /* 3: query, key and value are matrices of their own; 1: one above the other */
  Matrix project[3];
  Matrix merge, up, down; /* attention's output; the two matrices of the feed-forward network */
  Norm before, after;     /* norm first: of attention's and of the network's input; else: of x + attention, of x + network */
  int64_t window;         /* a token attends to those at most this far away; negative: to all */
  const float *cosines, *sines; /* (positions, head_size / 2), rotary positions; or NULL */
  const float *distance_bias;   /* (heads, 2 * reach + 1): added to a score, by query's place - key's place + reach; or NULL */
} Layer;

typedef struct {
  int64_t features, head_size, embedding_size, activation, norm_first, gated;
  int64_t tables;                /* embeddings are sums of a row of each */
  const float *table[3];         /* (rows, embedding_size) */
  Norm embedding_norm, last_norm;
  const Matrix *projection;      /* of embeddings, from embedding_size to features; or NULL */
  double scale;                  /* of the products of queries and keys */
  int64_t reach;                 /* of the layers' distance_bias: at least the longest text and LANES more */
  int64_t layers;
  const Layer *const *layer;
} Encoder;

/* The tokens of all texts, one behind the other, without padding. */
typedef struct {
  int64_t texts, tokens;
  const int64_t *start;    /* (texts + 1,): where each text begins among the tokens */
  const int64_t *place;    /* (tokens,): where a token stands in its text, padding counted */
  const int64_t *row[3];   /* (tokens,): its row of each embedding table */
  const int64_t *target;   /* (tokens,): the row of `out` that receives it */
  float *out;              /* (rows, features) */
} Batch;

/* Runs the encoder with `threads` threads, which are gone afterwards. Returns 0, or 1 if memory or threads are lacking. */
int encode(const Encoder *encoder, const Batch *batch, int threads);

#endif
