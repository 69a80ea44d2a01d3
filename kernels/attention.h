/* Attention with grouped key/value heads; query head h reads key/value head h / (NH/NKV).
 *
 *     S_tj = q_t . k_j / sqrt(HS)      P = softmax_j S      out_t = sum_j P_tj v_j
 *
 *     D_t = dout_t . out_t       dP_tj = dout_t . v_j       dS = P (dP - D)
 *     dq_t = sum_j dS_tj k_j / sqrt(HS)     dk_j = sum_t dS_tj q_t / sqrt(HS)     dv_j = sum_t P_tj dout_t
 *
 * Causal attention, for next-token prediction, has j <= t in every sum; bidirectional attention, for masked-token
 * prediction, has every j of the sequence.
 *
 * The T x T matrices are never kept: forward saves the log-sum-exp of each row, backward makes P again from it (Dao et
 * al. 2022, arXiv 2205.14135). A row of qkv is [NH query heads | NKV key heads | NKV value heads], each HS wide, as
 * projected; of it the values are read. Queries and keys come from qk, whose rows are the first part of that, turned
 * (rope.h).
 */
#ifndef KERNELS_ATTENTION_H
#define KERNELS_ATTENTION_H

#include "types.h"

typedef struct {
    int B, T;        /* sequences and their length */
    int NH, NKV, HS; /* NKV divides NH */
    int causal;      /* 0: bidirectional */
} AttentionShape;

/* out (B*T, NH*HS); lse (B,NH,T); qk (B*T, (NH+NKV)*HS); qkv (B*T, (NH+2*NKV)*HS) */
void attention_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                       Stream *stream);

/* dqkv (B*T, (NH+2*NKV)*HS) is overwritten with the gradient of qk and of the values; dout, out (B*T, NH*HS); lse
 * (B,NH,T) */
void attention_backward(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse, const real_t *qk,
                        const real_t *qkv, AttentionShape shape, Stream *stream);

/* One token of generation: writes the key of qk and the value of qkv (B, ..) into keys and values (B,T,NKV,HS) at
 * `position`, then attends to 0 .. position. out (B, NH*HS). Row `position` of attention_forward: the same bits on the
 * CPU, equal but for rounding on the GPU, where one query makes no tile. Causal shapes only. */
void attention_decode(real_t *out, real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int position,
                      AttentionShape shape, Stream *stream);

/* A prompt that attention_forward has read, for attention_decode to go on behind it: the keys of qk and the values of
 * qkv (B*T, ..) become the first T of `length` places of each sequence in keys and values (B,length,NKV,HS). */
void attention_keep(real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int length, AttentionShape shape,
                    Stream *stream);

#endif
