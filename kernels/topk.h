/* From router logits to the choice of experts and their weights, and back.
 *
 *     p = softmax(l)       S = the K largest of p, ties to the lower expert
 *     plain      w_j = p_j                   dl_i = p_i (1[i in S] g_i - sum_S p_j g_j)      for every i
 *     renormed   w_j = p_j / sum_S p         dl_j = w_j (g_j - sum_S w_i g_i)                for j in S, else 0
 *
 * g is the gradient of the weights. Renormalised with K = 1 the weight is the constant 1 and the router would learn
 * nothing from the main loss.
 *
 * softmax_forward and choice_weight are the two halves around a choice that something else makes (experts that pick
 * their tokens, forced routing); the gradient does not ask who chose. An entry with expert -1 is not there (plan.h).
 */
#ifndef KERNELS_TOPK_H
#define KERNELS_TOPK_H

#include "types.h"

/* probs (N,E), lse (N) log-sum-exp of the logits; expert, weight (N,K), best first; logits (N,E) */
void topk_forward(acc_t *probs, acc_t *lse, int *expert, acc_t *weight, const acc_t *logits, int N, int E, int K,
                  int renorm, Stream *stream);

/* probs (N,E), lse (N) alone, the same bits as topk_forward's */
void softmax_forward(acc_t *probs, acc_t *lse, const acc_t *logits, int N, int E, Stream *stream);

/* weight (N,K) of the experts given, 0 for -1; for the same experts the same bits as topk_forward's */
void choice_weight(acc_t *weight, const int *expert, const acc_t *probs, int N, int E, int K, int renorm,
                   Stream *stream);

/* dlogits (N,E) is overwritten; dweight (N,K), 0 where the entry was dropped */
void topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *probs, const int *expert, const acc_t *weight,
                   int N, int E, int K, int renorm, Stream *stream);

#endif
