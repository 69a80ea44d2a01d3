/* What keeps experts in use, and what tells whether they are.
 *
 *     balance   B = E sum_e f_e P_e     f_e = demand_e / (K N), no gradient     P_e = mean_n p_ne
 *               B = 1 where f or P is uniform
 *               dB/dl_ni = (E/N) p_ni (f_i - sum_e f_e p_ne)
 *     z         Z = mean_n lse_n^2
 *               dZ/dl_ni = (2 lse_n / N) p_ni
 *
 * Switch Transformer (arXiv 2101.03961) for B, here with 1/K so that it is 1 at balance for every K; ST-MoE (arXiv
 * 2202.08906) for Z. Hugging Face's value is K times ours. f counts choices before any is dropped.
 */
#ifndef KERNELS_BALANCE_LOSS_H
#define KERNELS_BALANCE_LOSS_H

#include "types.h"

/* What one MoE layer did with a batch. */
enum {
    LOAD_BALANCE,       /* B */
    LOAD_Z,             /* Z */
    LOAD_ENTROPY,       /* mean over tokens of -sum_e p ln p, nats */
    LOAD_MEAN_ENTROPY,  /* entropy of P, nats */
    LOAD_DROPPED,       /* share of entries without a row */
    LOAD_MAIN_GRADIENT, /* norm of the main loss's gradient at the logits, before the losses here are added */
    LOAD_VALUES
};

/* load (LOAD_VALUES; LOAD_MAIN_GRADIENT becomes 0) and mean_prob (E) are overwritten; probs (N,E), lse (N); demand,
 * count (E). */
void balance_forward(acc_t *load, acc_t *mean_prob, const acc_t *probs, const acc_t *lse, const int *demand,
                     const int *count, int N, int E, int K, Stream *stream);

/* dlogits (N,E) += aux_scale dB/dl + z_scale dZ/dl */
void balance_backward(acc_t *dlogits, const acc_t *probs, const acc_t *lse, const int *demand, int N, int E, int K,
                      double aux_scale, double z_scale, Stream *stream);

/* load[LOAD_MAIN_GRADIENT] = |dlogits|, called between the router's own backward and balance_backward: 0 says that the
 * main loss does not reach the router. */
void balance_measure(acc_t *load, const acc_t *dlogits, int N, int E, Stream *stream);

#endif
