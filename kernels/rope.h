/* What happens to queries and keys before attention: per-head RMSNorm (optional, as in Qwen3), then the rotary
 * embedding (Su et al. 2021, arXiv 2104.09864), half-rotation form: element i is paired with i + HS/2, i < HS/2.
 *
 *     u = q / sqrt(mean q^2 + eps) * w       (u = q without the norm)
 *     angle = position * base^(-2i/HS)
 *     out_i        = u_i cos - u_{i+HS/2} sin
 *     out_{i+HS/2} = u_{i+HS/2} cos + u_i sin
 *
 * A row of qkv is [NH query heads | NKV key heads | NKV value heads], each HS wide. Values are not turned: attention
 * reads them from qkv, and a row of what is turned, qk, ends before them.
 */
#ifndef KERNELS_ROPE_H
#define KERNELS_ROPE_H

#include "types.h"

enum { ROPE_MOST_HEAD = 512 }; /* no head may be larger */

typedef struct {
    int N, T; /* rows; row n stands at position start + n % T */
    int start;
    int NH, NKV, HS;
    double base, eps;
} RopeShape;

/* table (positions, HS): cos in the first half of a row, sin in the second, of positions 0 .. positions-1 */
void rope_table(acc_t *table, int positions, int HS, double base, Stream *stream);

/* qk (N, (NH+NKV)*HS); qkv (N, (NH+2*NKV)*HS); rstd (N, NH+NKV); q_weight, k_weight (HS), both NULL: no norm (rstd
 * unused) */
void rope_forward(real_t *qk, acc_t *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
                  const acc_t *table, RopeShape shape, Stream *stream);

/* In dqkv (N, (NH+2*NKV)*HS) the gradient of qk becomes that of queries and keys; behind it the values' stays as it is.
 * dq_weight, dk_weight (HS) accumulate (NULL with NULL weights). */
void rope_backward(real_t *dqkv, acc_t *dq_weight, acc_t *dk_weight, const acc_t *rstd, const real_t *qkv,
                   const real_t *q_weight, const real_t *k_weight, const acc_t *table, RopeShape shape, Stream *stream);

#endif
