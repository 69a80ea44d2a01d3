/* Soft mixtures (Soft MoE, Puigcerver et al. 2023, arXiv 2308.00951): how a soft plan (plan.h) is made, applied, and
 * differentiated.
 *
 *     l_nj = scale <x_n / |x_n|, phi_j / |phi_j|>              slot j = e*S + s of token n's group g
 *     mix_nj = softmax of l over the tokens n of g             weight_nj = softmax of l over the slots j
 *     rows_gj = sum_{n in g} mix_nj x_n                        y_n = sum_j weight_nj out_gj
 *
 * What is mixed is x, not x / |x|. Backward:
 *
 *     dout_gj = sum_n weight_nj dy_n      dweight_nj = <dy_n, out_gj>
 *     dx_n   += sum_j mix_nj drows_gj     dmix_nj = <x_n, drows_gj>
 *     dl_nj   = weight_nj (dweight_nj - sum_i weight_ni dweight_ni) + mix_nj (dmix_nj - sum_m mix_mj dmix_mj)
 *     dscale += sum dl_nj <xhat_n, phihat_j>      dxhat_n = scale sum_j dl_nj phihat_j      dphihat_j = scale sum_n ...
 *     dv     += (dvhat - vhat <vhat, dvhat>) / |v|     for v = x_n and v = phi_j
 *
 * |v| is sqrt(sum v^2 + 1e-12), so that a zero row has a zero direction and a finite gradient.
 */
#ifndef KERNELS_SOFT_MIX_H
#define KERNELS_SOFT_MIX_H

#include "plan.h"

/* logits (N,K) with K = E*S, plan->mix and plan->weight (N,K); x_inverse (N) and phi_inverse (K) receive 1 / |.|;
 * x (N,C), phi (K,C), scale (1). Reads N, E, K, slots, group_tokens, across of the plan. */
void soft_route_forward(acc_t *logits, Plan *plan, acc_t *x_inverse, acc_t *phi_inverse, const real_t *x,
                        const acc_t *phi, const acc_t *scale, int C, Stream *stream);

/* What a mixture is when it is not learned: the same share of everything, or slot i is token i of the group and nothing
 * else (slots past the last token read nothing). The paper's ablations. */
typedef enum { MIXTURE_LEARNED, MIXTURE_UNIFORM, MIXTURE_IDENTITY } Mixture;

/* Overwrites plan->mix, or plan->weight; leaves it alone with MIXTURE_LEARNED. Identity needs K >= group_tokens. */
void soft_fix_mix(Plan *plan, Mixture mixture, Stream *stream);
void soft_fix_weight(Plan *plan, Mixture mixture, Stream *stream);

/* dlogits (N,K) of the main loss, overwritten, from dweight and dmix (N,K); NULL for one that is not learned. */
void soft_logits_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *dmix, const Plan *plan, Stream *stream);

/* From dlogits: dx (N,C), dphi (K,C) and dscale (1) accumulate. The rest as in the forward. */
void soft_route_backward(real_t *dx, acc_t *dphi, acc_t *dscale, const acc_t *dlogits, const acc_t *logits,
                         const acc_t *x_inverse, const acc_t *phi_inverse, const real_t *x, const acc_t *phi,
                         const acc_t *scale, const Plan *plan, int C, Stream *stream);

/* rows (E*G*S, C) from x (N,C) */
void soft_dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream);

/* dx (N,C) overwritten, or added to when accumulate is 1; dmix (N,K) overwritten */
void soft_dispatch_backward(real_t *dx, acc_t *dmix, const real_t *drows, const real_t *x, const Plan *plan, int C,
                            int accumulate, Stream *stream);

/* y (N,C), added to when accumulate is 1, from rows (E*G*S, C), the experts' outputs */
void soft_combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream);

/* drows (E*G*S, C) and dweight (N,K) overwritten */
void soft_combine_backward(real_t *drows, acc_t *dweight, const real_t *dy, const real_t *rows, const Plan *plan, int C,
                           Stream *stream);

/* probs (N,E): how much of token n's output comes from expert e, sum_s weight[n, e*S+s]; for statistics. */
void soft_expert_share(acc_t *probs, const Plan *plan, Stream *stream);

#endif
