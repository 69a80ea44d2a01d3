/* One token at a time: softmax, choice, weights; and the way back. No token looks at another. The three steps of the
 * forward are functions of one token, so that the two halves give the bits of the whole. */
#include "topk.h"

#include "choose.h"
#include "vector.h"

/* p = softmax(l), returns the log-sum-exp of l. */
static inline acc_t softmax(acc_t *p, const acc_t *l, int E) {
    acc_t largest = l[0];
    for (int e = 1; e < E; e++) {
        largest = l[e] > largest ? l[e] : largest;
    }
    acc_t sum = 0;
    for (int e = 0; e < E; e++) {
        p[e] = exp_fast(l[e] - largest);
    }
    for (int e = 0; e < E; e++) {
        sum += p[e];
    }
    for (int e = 0; e < E; e++) {
        p[e] /= sum;
    }
    return largest + (acc_t)log(sum);
}

static inline void weigh(acc_t *weight, const int *expert, const acc_t *p, int K, int renorm) {
    acc_t total = 0;
    for (int j = 0; j < K; j++) {
        total += expert[j] < 0 ? 0 : p[expert[j]];
    }
    for (int j = 0; j < K; j++) {
        if (expert[j] < 0) {
            weight[j] = 0;
        } else {
            weight[j] = renorm ? p[expert[j]] / total : p[expert[j]];
        }
    }
}

void topk_forward(acc_t *probs, acc_t *lse, int *expert, acc_t *weight, const acc_t *logits, int N, int E, int K,
                  int renorm, Stream *stream) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        acc_t *p = probs + (size_t)n * E;
        int *chosen = expert + (size_t)n * K;
        lse[n] = softmax(p, logits + (size_t)n * E, E);
        choose_largest(chosen, p, E, K);
        weigh(weight + (size_t)n * K, chosen, p, K, renorm);
    }
}

void softmax_forward(acc_t *probs, acc_t *lse, const acc_t *logits, int N, int E, Stream *stream) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        lse[n] = softmax(probs + (size_t)n * E, logits + (size_t)n * E, E);
    }
}

void choice_weight(acc_t *weight, const int *expert, const acc_t *probs, int N, int E, int K, int renorm,
                   Stream *stream) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        weigh(weight + (size_t)n * K, expert + (size_t)n * K, probs + (size_t)n * E, K, renorm);
    }
}

void topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *probs, const int *expert, const acc_t *weight,
                   int N, int E, int K, int renorm, Stream *stream) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const acc_t *p = probs + (size_t)n * E;
        const acc_t *w = weight + (size_t)n * K;
        const acc_t *g = dweight + (size_t)n * K;
        const int *chosen = expert + (size_t)n * K;
        acc_t *dl = dlogits + (size_t)n * E;
        acc_t mean = 0; /* sum_S w g: both forms subtract it, w being p or p renormalised */
        for (int j = 0; j < K; j++) {
            mean += w[j] * g[j];
        }
        for (int e = 0; e < E; e++) {
            dl[e] = renorm ? 0 : -p[e] * mean;
        }
        for (int j = 0; j < K; j++) {
            if (chosen[j] < 0) {
                continue;
            }
            dl[chosen[j]] = renorm ? w[j] * (g[j] - mean) : p[chosen[j]] * (g[j] - mean);
        }
    }
}
