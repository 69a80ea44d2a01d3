/* Experts that pick tokens: expert choice (Zhou et al. 2022, arXiv 2202.09368) and its causal form by a running
 * threshold (Expert Threshold routing, arXiv 2603.11535).
 *
 *     expert choice   e takes the C tokens of largest p_ne, ties to the earlier token
 *     threshold       e takes token n when p_ne > tau_e, whatever the other tokens are
 *
 * p = softmax(l) over the experts (topk.h: softmax_forward); the weights are p itself (choice_weight), the gradient is
 * topk_backward's plain form. Entries are (N,E): entry n*E + e is expert e, or -1.
 *
 * cut_e = (p of the C-th + p of the (C+1)-th token) / 2 is the threshold that would have let exactly C through; where
 * C = N it is half the smallest p. Running:  tau += max(rate, 1 / updates) (cut - tau), the mean of all cuts at first,
 * an exponential one later.
 */
#ifndef KERNELS_EXPERT_CHOICE_H
#define KERNELS_EXPERT_CHOICE_H

#include <stdint.h>

#include "adamw.h"
#include "types.h"

/* expert (N,E) and cut (E) from probs (N,E); 1 <= C <= N. cut may be NULL. */
void expert_choice_forward(int *expert, acc_t *cut, const acc_t *probs, int N, int E, int C, Stream *stream);

/* expert (N,E) by tau (E) from step number `first` on; before that, expert stays as it is. *step, on the device, is the
 * step at hand: a recorded one ends a warm-up by itself. */
void threshold_forward(int *expert, const acc_t *tau, const acc_t *probs, const int64_t *step, int64_t first, int N,
                       int E, Stream *stream);

/* tau (E) moves towards the mean of cut (slices,E), after the optimizer's update number adam->updates (1 at first).
 * Nothing happens when adam says that the step was skipped. */
void threshold_update(acc_t *tau, const acc_t *cut, int slices, int E, double rate, const AdamState *adam,
                      Stream *stream);

#endif
