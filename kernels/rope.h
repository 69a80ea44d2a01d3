/* What happens to queries and keys before attention: per-head RMSNorm (optional, as in Qwen3), then the rotary
 * embedding (Su et al. 2021, arXiv 2104.09864), half-rotation form: element i is paired with i + HS/2, i < HS/2.
 *
 *     u = q / sqrt(mean q^2 + eps) * w       (u = q without the norm)
 *     angle = position * base^(-2i/HS)
 *     out_i        = u_i cos - u_{i+HS/2} sin
 *     out_{i+HS/2} = u_{i+HS/2} cos + u_i sin
 *
 * Values pass through unchanged. A row of qkv is [NH query heads | NKV key heads | NKV value heads], each HS wide.
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

/* out, qkv (N, (NH+2*NKV)*HS); rstd (N, NH+NKV); q_weight, k_weight (HS), both NULL: no norm (rstd unused). out may not
 * be qkv. */
void rope_forward(real_t *out, acc_t *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
                  const acc_t *table, RopeShape shape, Stream *stream);

/* dqkv (N, ..) is overwritten; dq_weight, dk_weight (HS) accumulate (NULL with NULL weights); dout is the gradient of
 * out. dqkv may be dout. */
void rope_backward(real_t *dqkv, acc_t *dq_weight, acc_t *dk_weight, const real_t *dout, const acc_t *rstd,
                   const real_t *qkv, const real_t *q_weight, const real_t *k_weight, const acc_t *table,
                   RopeShape shape, Stream *stream);

#endif
