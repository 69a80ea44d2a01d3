/* Noisy top-k gating and its two balance losses (Shazeer et al. 2017, arXiv 1701.06538).
 *
 *     h_i = c_i + eps_i sigma_i      sigma_i = softplus(r_i) + 0.01      c = W_g x, r = W_n x      eps ~ N(0, 1)
 *     S = the K largest of h, ties to the lower expert                   w = softmax of h over S
 *     dh_j = w_j (g_j - sum_S w_i g_i), j in S        dc = dh        dr = dh eps sigmoid(r)
 *
 *     importance   I_e = sum_n w_ne           L_imp  = CV(I)^2           CV^2 = population variance / mean^2
 *     load         P_ne = Phi((c_ne - t_ne) / sigma_ne)                  L_load = CV(sum_n P_n)^2
 *                  t_ne = the K-th largest of h_n without e: the (K+1)-th largest for e in S, else the K-th
 *
 * The thresholds and c live in the same space, that of the logits. In the load's gradient the threshold is the noisy
 * logit of another expert m, which therefore gets -dz through c_m and through sigma_m eps_m. K < E.
 * Without noise (evaluation) eps = 0 and h = c, and no load is defined.
 */
#ifndef KERNELS_NOISY_H
#define KERNELS_NOISY_H

#include <stdint.h>

#include "balance_loss.h"
#include "plan.h"

/* h, noise (N,E): the noisy logits and eps, drawn from *key at index n*E + e (random.h), or 0 when noisy is 0. The key
 * lies on the device: a recorded step can be repeated with another. expert, weight (N,K), best first; probs (N,E) =
 * softmax of c, for statistics; clean (N,E) = c, raw (N,E) = r */
void noisy_forward(acc_t *h, acc_t *noise, int *expert, acc_t *weight, acc_t *probs, const acc_t *clean,
                   const acc_t *raw, const uint64_t *key, int noisy, int N, int E, int K, Stream *stream);

/* dclean, draw (N,E) overwritten */
void noisy_backward(acc_t *dclean, acc_t *draw, const acc_t *dweight, const acc_t *raw, const acc_t *noise,
                    const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream);

/* load[LOAD_BALANCE] = L_imp + L_load, load[LOAD_Z] = 0; sums (2,E) receives I and the load. With noisy 0 L_imp alone,
 * and the load's half of sums is 0. */
void noisy_balance_forward(acc_t *load, acc_t *sums, const acc_t *clean, const acc_t *raw, const acc_t *h,
                           const int *expert, const acc_t *weight, int noisy, int N, int E, int K, Stream *stream);

/* dclean, draw (N,E) += scale d(L_imp + L_load); load[LOAD_BALANCE_GRADIENT] = the norm of what both receive. After
 * noisy_balance_forward with noisy 1, whose sums it reads. */
void noisy_balance_backward(acc_t *dclean, acc_t *draw, acc_t *load, const acc_t *sums, const acc_t *clean,
                            const acc_t *raw, const acc_t *noise, const acc_t *h, const int *expert,
                            const acc_t *weight, double scale, int N, int E, int K, Stream *stream);

#endif
