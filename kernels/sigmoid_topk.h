/* Sigmoid scores with a selection bias (DeepSeek-V3, arXiv 2412.19437; the bias: Wang et al. 2024, arXiv 2408.15664).
 *
 *     s = sigmoid(l)       S = the K largest of s + b, ties to the lower expert       the bias b only selects
 *     renormed   w_j = rho s_j / (sum_S s + 1e-20)      dl_j = (rho/t) (g_j - (1/rho) sum_S w_i g_i) s_j (1 - s_j)
 *     plain      w_j = rho s_j                          dl_j = rho g_j s_j (1 - s_j)         (t = sum_S s + 1e-20)
 *
 * Groups: with G > 1 the experts are G runs of E/G; a token keeps the `kept` groups whose two best s + b sum highest
 * (one where a group holds one expert) and chooses among their experts alone, others counting as minus infinity. K must
 * not exceed kept * E/G.
 *
 * The bias has no gradient: after each step b_e += rate * sign(mean count - count_e), from the finished step's counts.
 *
 * Sequence-wise balance loss, over sequences of T tokens, averaged over them, value 1 at balance:
 *
 *     B = sum_e f_e P_e      f_e = (E/(K T)) sum_n 1[e in S_n], no gradient      P_e = mean_n s_ne / sum_i s_ni
 *     dl_ni = (1/T) (f_i - sum_e f_e s'_ne) / (sum_e s_ne) s_ni (1 - s_ni)       s' = s / sum s
 */
#ifndef KERNELS_SIGMOID_TOPK_H
#define KERNELS_SIGMOID_TOPK_H

#include "adamw.h"
#include "balance_loss.h"

typedef struct {
    int N, E, K, T; /* T tokens of a sequence, which divide N */
    int groups, kept;
    int renorm;
    double scale; /* rho */
} SigmoidShape;

/* scores (N,E) = s; probs (N,E) = s'; expert, weight (N,K), best s + b first; logits (N,E), bias (E) */
void sigmoid_topk_forward(acc_t *scores, acc_t *probs, int *expert, acc_t *weight, const acc_t *logits,
                          const acc_t *bias, SigmoidShape shape, Stream *stream);

/* dlogits (N,E) is overwritten; dweight (N,K), 0 where the entry was dropped */
void sigmoid_topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *scores, const int *expert,
                           const acc_t *weight, SigmoidShape shape, Stream *stream);

/* load[LOAD_BALANCE] = mean of B over the sequences, load[LOAD_Z] = 0 */
void sequence_balance_forward(acc_t *load, const acc_t *probs, const int *expert, SigmoidShape shape, Stream *stream);

/* dlogits (N,E) += scale dB/dl; load[LOAD_BALANCE_GRADIENT] = the norm of what is added */
void sequence_balance_backward(acc_t *dlogits, acc_t *load, const acc_t *scores, const acc_t *probs, const int *expert,
                               double scale, SigmoidShape shape, Stream *stream);

/* bias (E) += rate * sign(mean - count); counts (slices, stride) on the device, of which the first E of each row are
 * summed. Nothing happens when adam says that the step was skipped. */
void selection_bias_update(acc_t *bias, const int *counts, int slices, size_t stride, int E, double rate,
                           const AdamState *adam, Stream *stream);

#endif
