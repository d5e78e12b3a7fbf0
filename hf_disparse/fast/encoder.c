/* The whole encoder in one call: embeddings, layers, hidden states. */
#include "encoder.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "attention.h"

/* What the threads of one call share. */
typedef struct {
  const Encoder *encoder;
  const Batch *batch;
  Tiling tiling;
  int64_t *first;          /* of the tiling */
  Queries *queries;
  int64_t steps;           /* number of queries */
  float *x, *qkv, *context; /* (features, tokens), (3 * heads * size, tokens), (heads * size, tokens) */
  float *scratch, *scores; /* of every thread: scratch_size and scores_size floats */
  int64_t scratch_size, scores_size;
  int threads, together;   /* together: all threads share the rows of each tile, for there are too few tiles to share */
  atomic_int started, arrived, round;
  atomic_long *taken;      /* by phase: the next piece of work */
} Call;

typedef struct {
  Call *call;
  int number, round;
  int64_t phase;
} Worker;

/* Waits until `threads` threads have come here. */
static void meet(Worker *w, int threads) {
  Call *c = w->call;
  if (threads == 1) return;
  int round = ++w->round;
  if (atomic_fetch_add(&c->arrived, 1) == threads - 1) {
    atomic_store(&c->arrived, 0);
    atomic_store(&c->round, round);
  } else
    for (int spins = 0; atomic_load(&c->round) != round; spins++)
      if (spins > 2000) sched_yield();
}

/* The next piece of work of this phase. */
static int64_t take(Worker *w) { return atomic_fetch_add(&w->call->taken[w->phase], 1); }

/* One tile's share of an operation; `vectors` of lanes in it. */
typedef void Operation(Worker *w, const Layer *l, int64_t tile, int vectors);

/* Does all tiles: each by all workers together, who meet after each of them, or each by one worker. Then the next phase begins. */
static void each_tile(Worker *w, const Layer *l, Operation *operation) {
  const Call *c = w->call;
  if (c->together)
    for (int64_t tile = 0; tile < c->tiling.tiles; tile++) {
      operation(w, l, tile, vectors_of(&c->tiling, tile));
      meet(w, c->threads);
    }
  else {
    for (int64_t tile; (tile = take(w)) < c->tiling.tiles;) operation(w, l, tile, vectors_of(&c->tiling, tile));
    meet(w, c->threads);
  }
  w->phase++;
}

/* Those who work on a tile: this worker alone, or all. */
static int crew(const Worker *w) { return w->call->together ? w->call->threads : 1; }
static int place_in_crew(const Worker *w) { return w->call->together ? w->number : 0; }
static void meet_crew(Worker *w) { meet(w, crew(w)); }
static float *scratch_of_crew(const Worker *w) {
  return w->call->scratch + (w->call->together ? 0 : w->number * w->call->scratch_size);
}

/* y = W x + bias: this worker's rows. */
static void multiply(Worker *w, const Matrix *m, const float *x, float *y, int vectors) {
  int64_t first, last;
  part(m->rows, GROUP, place_in_crew(w), crew(w), &first, &last);
  product(m, x, y, vectors, first, last);
}

static void norm(Worker *w, float *x, const float *y, float *out, const Norm *n, int64_t features, int vectors) {
  int64_t first, last;
  part(vectors, 1, place_in_crew(w), crew(w), &first, &last);
  normalise(x, y, out, n, features, vectors, first, last);
}

/* x[f][token] = sum over the tables of table[row of the token][f]; lanes without a token are 0. */
static void embed_rows(const Call *c, float *x, int64_t tile, int width, int64_t first, int64_t last) {
  const Encoder *e = c->encoder;
  const Batch *b = c->batch;
  for (int lane = 0; lane < width; lane++) {
    int64_t token = c->tiling.first[tile] * WIDTH + lane;
    if (token >= b->tokens) {
      for (int64_t f = first; f < last; f++) x[f * width + lane] = 0;
      continue;
    }
    const float *from[3];
    for (int i = 0; i < e->tables; i++) from[i] = e->table[i] + b->row[i][token] * e->embedding_size;
    for (int64_t f = first; f < last; f++) {
      float sum = from[0][f];
      for (int i = 1; i < e->tables; i++) sum += from[i][f];
      x[f * width + lane] = sum;
    }
  }
}

static void embed_tile(Worker *w, const Layer *l, int64_t tile, int vectors) {
  Call *c = w->call;
  const Encoder *e = c->encoder;
  int width = vectors * WIDTH;
  (void)l;
  float *x = tile_of(&c->tiling, c->x, e->features, tile);
  float *to = e->projection ? scratch_of_crew(w) : x;
  int64_t first, last;
  part(e->embedding_size, 1, place_in_crew(w), crew(w), &first, &last);
  embed_rows(c, to, tile, width, first, last);
  meet_crew(w);
  norm(w, to, 0, to, &e->embedding_norm, e->embedding_size, vectors);
  if (!e->projection) return;
  meet_crew(w);
  multiply(w, e->projection, to, x, vectors);
}

/* The angles of the tile's tokens, (head_size / 2, width), from the table (positions, head_size / 2). */
static void angles(const Call *c, const float *table, float *out, int64_t tile, int width) {
  int64_t half = c->encoder->head_size / 2;
  for (int lane = 0; lane < width; lane++) {
    int64_t token = c->tiling.first[tile] * WIDTH + lane;
    const float *from = table + (token < c->batch->tokens ? c->batch->place[token] : 0) * half;
    for (int64_t d = 0; d < half; d++) out[d * width + lane] = from[d];
  }
}

/* qkv = W norm(x) + bias, queries and keys turned by their positions. */
static void project_tile(Worker *w, const Layer *l, int64_t tile, int vectors) {
  Call *c = w->call;
  const Encoder *e = c->encoder;
  int64_t rows = l->heads * e->head_size;
  int width = vectors * WIDTH;
  float *x = tile_of(&c->tiling, c->x, e->features, tile), *qkv = tile_of(&c->tiling, c->qkv, 3 * rows, tile);
  float *in = e->norm_first ? scratch_of_crew(w) : x;
  if (e->norm_first) {
    norm(w, x, 0, in, &l->before, e->features, vectors);
    meet_crew(w);
  }
  for (int i = 0; i < l->projections; i++) multiply(w, &l->project[i], in, qkv + i * rows * width, vectors);
  if (!l->cosines) return;
  meet_crew(w);
  float *cosines = c->scratch + w->number * c->scratch_size;
  float *sines = cosines + e->head_size / 2 * width;
  int64_t first, last;
  part(2 * l->heads, 1, place_in_crew(w), crew(w), &first, &last);
  angles(c, l->cosines, cosines, tile, width);
  angles(c, l->sines, sines, tile, width);
  rotate(qkv, cosines, sines, e->head_size, width, first, last);
}

static void attention(Worker *w, const Layer *l) {
  Call *c = w->call;
  const Encoder *e = c->encoder;
  Attention a = {&c->tiling, c->qkv, c->context, l->heads, e->head_size, l->window, (float)e->scale, 0};
  for (int64_t i; (i = take(w)) < c->steps * l->heads;) {
    int64_t head = i % l->heads;
    a.bias = l->distance_bias ? l->distance_bias + head * (2 * e->reach + 1) + e->reach : 0;
    attend(&a, &c->queries[i / l->heads], head, c->scores + w->number * c->scores_size);
  }
  meet(w, c->threads);
  w->phase++;
}

/* Norm last: x = norm(x + merge(context)); x = norm(x + down(activation(up(x)))).
 * Norm first: x = x + merge(context); x = x + down(activation(up(norm(x)))). */
static void feed_forward_tile(Worker *w, const Layer *l, int64_t tile, int vectors) {
  Call *c = w->call;
  const Encoder *e = c->encoder;
  int64_t rows = l->heads * e->head_size, first, last;
  static const Norm none = {0, 0, 0};
  int width = vectors * WIDTH;
  float *x = tile_of(&c->tiling, c->x, e->features, tile);
  float *sum = scratch_of_crew(w);
  float *in = e->norm_first ? sum + e->features * width : x;
  float *hidden = sum + 2 * e->features * width;
  multiply(w, &l->merge, tile_of(&c->tiling, c->context, rows, tile), sum, vectors);
  meet_crew(w);
  norm(w, x, sum, in, e->norm_first ? &l->after : &l->before, e->features, vectors);
  meet_crew(w);
  multiply(w, &l->up, in, hidden, vectors);
  if (e->gated) meet_crew(w);
  part(l->down.columns, e->gated ? 1 : GROUP, place_in_crew(w), crew(w), &first, &last);
  if (e->gated) gate_rows(hidden, hidden + l->down.columns * width, e->activation, width, first, last);
  else activate_rows(hidden, e->activation, width, first, last);
  meet_crew(w);
  multiply(w, &l->down, hidden, sum, vectors);
  meet_crew(w);
  norm(w, x, sum, x, e->norm_first ? &none : &l->after, e->features, vectors);
}

/* out[target of a token][f] = x[f][token] */
static void give_back_tile(Worker *w, const Layer *l, int64_t tile, int vectors) {
  Call *c = w->call;
  const Encoder *e = c->encoder;
  int width = vectors * WIDTH;
  (void)l;
  float *x = tile_of(&c->tiling, c->x, e->features, tile);
  if (e->last_norm.weight) {
    norm(w, x, 0, x, &e->last_norm, e->features, vectors);
    meet_crew(w);
  }
  int64_t first, last;
  part(width, 1, place_in_crew(w), crew(w), &first, &last);
  for (int64_t lane = first; lane < last; lane++) {
    int64_t token = c->tiling.first[tile] * WIDTH + lane;
    if (token >= c->batch->tokens) break;
    float *out = c->batch->out + c->batch->target[token] * e->features;
    for (int64_t f = 0; f < e->features; f++) out[f] = x[f * width + lane];
  }
}

static void *work(void *argument) {
  Worker *w = argument;
  const Encoder *e = w->call->encoder;
  while (!atomic_load(&w->call->started)) sched_yield();
  each_tile(w, 0, embed_tile);
  for (int64_t i = 0; i < e->layers; i++) {
    each_tile(w, e->layer[i], project_tile);
    attention(w, e->layer[i]);
    each_tile(w, e->layer[i], feed_forward_tile);
  }
  each_tile(w, 0, give_back_tile);
  return 0;
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Divides the tokens into tiles of nearly equal width, and every text's queries into steps of up to four vectors of a tile. */
static int divide(Call *c) {
  const Batch *b = c->batch;
  int64_t vectors = (b->tokens + WIDTH - 1) / WIDTH, tiles = (vectors + VECTORS - 1) / VECTORS;
  c->first = malloc((tiles + 1) * sizeof *c->first);
  c->queries = malloc((vectors + b->texts) * sizeof *c->queries);
  if (!c->first || !c->queries) return 1;
  for (int64_t t = 0; t <= tiles; t++) c->first[t] = vectors * t / tiles;
  c->tiling = (Tiling){tiles, c->first};
  for (int64_t i = 0; i < b->texts; i++)
    for (int64_t token = b->start[i]; token < b->start[i + 1];) {
      int64_t tile = tile_with(&c->tiling, token), first = token / WIDTH - c->first[tile];
      int64_t last = (b->start[i + 1] + WIDTH - 1) / WIDTH - c->first[tile], vectors = vectors_of(&c->tiling, tile);
      if (last > first + 4) last = first + 4;
      if (last > vectors) last = vectors;
      c->queries[c->steps++] = (Queries){tile, b->start[i], b->start[i + 1], (int)first, (int)last};
      token = (c->first[tile] + last) * WIDTH;
    }
  return 0;
}

static int allocate(Call *c) {
  const Encoder *e = c->encoder;
  int64_t rows = 0, hidden = 0, longest = 0, tokens = c->first[c->tiling.tiles] * WIDTH;
  for (int64_t i = 0; i < e->layers; i++) {
    rows = largest(rows, e->layer[i]->heads * e->head_size);
    hidden = largest(hidden, e->layer[i]->up.rows);
  }
  for (int64_t i = 0; i < c->batch->texts; i++) longest = largest(longest, c->batch->start[i + 1] - c->batch->start[i]);
  c->scratch_size = LANES * (2 * e->features + largest(hidden, e->embedding_size) + e->head_size);
  c->scores_size = longest * 4 * WIDTH;
  c->x = malloc(tokens * e->features * sizeof(float));
  c->qkv = malloc((tokens * 3 * rows + 1) * sizeof(float));
  c->context = calloc(tokens * rows + 1, sizeof(float));
  c->scratch = malloc(c->threads * c->scratch_size * sizeof(float));
  c->scores = malloc(c->threads * c->scores_size * sizeof(float));
  c->taken = calloc(2 + 3 * e->layers, sizeof *c->taken);
  return !(c->x && c->qkv && c->context && c->scratch && c->scores && c->taken);
}

int encode(const Encoder *encoder, const Batch *batch, int threads) {
  if (batch->tokens == 0) return 0;
  Call c = {.encoder = encoder, .batch = batch, .threads = threads};
  Worker workers[threads];
  pthread_t handles[threads];
  int failed = divide(&c) || allocate(&c), running = 1;
  for (int i = 0; i < threads; i++) workers[i] = (Worker){.call = &c, .number = i};
  while (!failed && running < threads && !pthread_create(&handles[running], 0, work, &workers[running])) running++;
  c.threads = running; /* fewer than asked for where the system refuses a thread */
  c.together = c.tiling.tiles % running != 0 && c.tiling.tiles < 4 * running;
  atomic_store(&c.started, 1);
  if (!failed) work(&workers[0]);
  for (int i = 1; i < running; i++) pthread_join(handles[i], 0);
  free(c.first), free(c.queries), free(c.x), free(c.qkv), free(c.context), free(c.scratch), free(c.scores), free(c.taken);
  return failed;
}
