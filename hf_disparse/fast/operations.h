/* What an encoder does to tiles besides products; x[f] is a row of lanes, a token is a lane. */
#ifndef HF_DISPARSE_OPERATIONS_H
#define HF_DISPARSE_OPERATIONS_H

#include "encoder.h"

/* e^x to 2e-7: 2^n times a polynomial of degree 6 on |r| <= log(2) / 2, x = n log(2) + r. */
INLINE vec exponential(vec x) {
  x = pick(x < all(-87), all(-87), x);
  x = pick(x > all(88), all(88), x);
  const float shift = 12582912; /* 1.5 * 2^23: adding it rounds to a whole number in the lowest bits */
  vec shifted = fused(x, all(1.44269504f), all(shift)), n = shifted - all(shift);
  vec r = fused(n, all(-1.42860677e-6f), fused(n, all(-0.693145752f), x));
  vec p = all(1.0f / 720);
  p = fused(p, r, all(1.0f / 120));
  p = fused(p, r, all(1.0f / 24));
  p = fused(p, r, all(1.0f / 6));
  p = fused(p, r, all(0.5f));
  p = fused(p, r, all(1));
  p = fused(p, r, all(1));
  ivec exponent = (ivec)shifted - (ivec)all(shift) + 127;
  return p * (vec)(exponent << 23); /* a product, not a sum of exponents, which could make a number of NaN */
}

/* x Phi(x), with Phi(x) - 1/2 = x P(x^2) / Q(x^2) on |x| <= 5.5, fitted to 7e-9; beyond it the largest value of the fit. */
INLINE vec gelu(vec x) {
  vec t = pick(x < all(-5.5f), all(-5.5f), x);
  t = pick(t > all(5.5f), all(5.5f), t);
  vec u = t * t, p = all(2.2749358e-8f), q = all(1.1975045e-6f);
  p = p * u + all(6.3521293e-6f), q = q * u + all(7.3647868e-5f);
  p = p * u + all(1.6882675e-4f), q = q * u + all(1.8844511e-3f);
  p = p * u + all(4.6772677e-3f), q = q * u + all(2.8645930e-2f);
  p = p * u + all(3.3852749e-2f), q = q * u + all(2.5152218e-1f);
  p = p * u + all(3.9894223e-1f), q = q * u + all(1);
  return x * (all(0.5f) + t * p / q);
}

/* x times the logistic function of y. */
INLINE vec gated_by(vec x, vec y) { return x / (all(1) + exponential(-y)); }

INLINE vec activate(vec x, int64_t kind) {
  switch (kind) {
    case GELU: return gelu(x);
    case GELU_TANH: /* (1 + tanh(z)) / 2 is the logistic function of 2z */
      return gated_by(x, x * all(1.5957691216f) * (all(1) + all(0.044715f) * x * x));
    case SILU: return gated_by(x, x);
    default: return pick(x < all(0), all(0), x);
  }
}

/* x (rows, width): in place, rows `first` to `last`. */
static void activate_rows(float *x, int64_t kind, int width, int64_t first, int64_t last) {
  for (float *end = x + last * width, *p = x + first * width; p < end; p += WIDTH) store(p, activate(load(p), kind));
}

/* x, gate (rows, width): x = activation(x) * gate, rows `first` to `last`. */
static void gate_rows(float *x, const float *gate, int64_t kind, int width, int64_t first, int64_t last) {
  for (int64_t i = first * width; i < last * width; i += WIDTH) store(x + i, activate(load(x + i), kind) * load(gate + i));
}

/* Of up to four vectors of lanes: x += y if y is there, then out = (x - mean) / sqrt(variance + epsilon) * weight + bias,
 * mean and variance over the features. x, y, out (features, width); out may be x. */
INLINE void norm_vectors(float *x, const float *y, float *out, const Norm *norm, int64_t features, int width, const int vectors) {
  vec mean[4], scale[4];
  for (int v = 0; v < vectors; v++) mean[v] = scale[v] = all(0);
  for (int64_t f = 0; f < features; f++)
    for (int v = 0; v < vectors; v++) {
      float *at = x + f * width + v * WIDTH;
      vec value = load(at);
      if (y) store(at, value += load(y + f * width + v * WIDTH));
      mean[v] += value;
    }
  if (!norm->weight) { /* the first norm of ModernBERT's first layer does nothing */
    for (int64_t f = 0; f < features && out != x; f++) memcpy(out + f * width, x + f * width, 4 * WIDTH * vectors);
    return;
  }
  for (int v = 0; v < vectors; v++) mean[v] = mean[v] / all(features);
  for (int64_t f = 0; f < features; f++)
    for (int v = 0; v < vectors; v++) {
      vec off = load(x + f * width + v * WIDTH) - mean[v];
      scale[v] = fused(off, off, scale[v]);
    }
  for (int v = 0; v < vectors; v++)
    for (int lane = 0; lane < WIDTH; lane++) scale[v][lane] = 1 / __builtin_sqrtf(scale[v][lane] / features + norm->epsilon);
  for (int64_t f = 0; f < features; f++)
    for (int v = 0; v < vectors; v++) {
      vec value = (load(x + f * width + v * WIDTH) - mean[v]) * scale[v];
      store(out + f * width + v * WIDTH, fused(value, all(norm->weight[f]), all(norm->bias ? norm->bias[f] : 0)));
    }
}

/* As norm_vectors, for the vectors `first` to `last` of a tile. */
static void normalise(float *x, const float *y, float *out, const Norm *norm, int64_t features, int vectors, int64_t first, int64_t last) {
  int width = vectors * WIDTH;
  for (int64_t v = first; v < last;) {
    float *from = x + v * WIDTH, *to = out + v * WIDTH;
    const float *add = y ? y + v * WIDTH : 0;
    if (last - v >= 4) norm_vectors(from, add, to, norm, features, width, 4), v += 4;
    else if (last - v >= 2) norm_vectors(from, add, to, norm, features, width, 2), v += 2;
    else norm_vectors(from, add, to, norm, features, width, 1), v += 1;
  }
}

/* x (heads * size, width): turns the pairs (d, d + size / 2) of every head by the angles of the tokens' positions.
 * cosines, sines (size / 2, width). */
static void rotate(float *x, const float *cosines, const float *sines, int64_t size, int width, int64_t first, int64_t last) {
  for (int64_t head = first; head < last; head++)
    for (int64_t d = 0; d < size / 2; d++)
      for (int v = 0; v < width; v += WIDTH) {
        float *one = x + (head * size + d) * width + v, *other = one + size / 2 * width;
        vec c = load(cosines + d * width + v), s = load(sines + d * width + v), a = load(one), b = load(other);
        store(one, a * c - b * s);
        store(other, b * c + a * s);
      }
}

#endif
