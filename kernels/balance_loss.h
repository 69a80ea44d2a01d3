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

#include "plan.h"

/* What one MoE layer did with a batch. */
enum {
    LOAD_BALANCE,          /* the router's balance loss: B, or what its file says */
    LOAD_Z,                /* Z */
    LOAD_ENTROPY,          /* mean over tokens of -sum_e p ln p, nats */
    LOAD_MEAN_ENTROPY,     /* entropy of P, nats */
    LOAD_MARGIN,           /* mean over tokens of the K-th largest p less the next; 0 where K is E */
    LOAD_DROPPED,          /* share of the entries without a row */
    LOAD_TOKENS_DROPPED,   /* share of the tokens without any row */
    LOAD_PADDING,          /* share of the computed rows without an entry */
    LOAD_MAIN_GRADIENT,    /* norm of the main loss's gradient at the logits, before the losses here are added */
    LOAD_BALANCE_GRADIENT, /* norm of the balance loss's gradient at the logits, its coefficient included */
    LOAD_VALUES
};

/* load[LOAD_BALANCE], load[LOAD_Z] = B and Z; probs (N,E), lse (N), demand (E); mean_prob (E) is scratch. */
void balance_forward(acc_t *load, acc_t *mean_prob, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                     int E, int K, Stream *stream);

/* dlogits (N,E) += aux_scale dB/dl + z_scale dZ/dl;  load[LOAD_BALANCE_GRADIENT] = the norm of the first term: 0 where
 * the balance loss cannot move the router */
void balance_backward(acc_t *dlogits, acc_t *load, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                      int E, int K, double aux_scale, double z_scale, Stream *stream);

/* load[LOAD_MAIN_GRADIENT] = |dlogits| over `count` values, called between the router's own backward and that of the
 * balance losses: 0 says that the main loss does not reach the router. */
void gradient_measure(acc_t *load, const acc_t *dlogits, size_t count, Stream *stream);

/* The statistics of probs (N,E), each token's scores as shares that sum to 1: ENTROPY, MEAN_ENTROPY, MARGIN between
 * the K-th and the next. mean_prob (E) = P. */
void probs_measure(acc_t *load, acc_t *mean_prob, const acc_t *probs, int N, int E, int K, Stream *stream);

/* The statistics of a finished plan: DROPPED, TOKENS_DROPPED, PADDING; all 0 for a soft one. */
void plan_measure(acc_t *load, const Plan *plan, Stream *stream);

#endif
