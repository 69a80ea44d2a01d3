/* One token at a time: softmax, choice, weights; and the way back. No token looks at another. */
#include "topk.h"

#include <stdbool.h>

#include "vector.h"

/* What a probability counts in the choice: NaN less than anything, so that the choice is valid whatever the numbers
 * are. */
static acc_t rank_value(acc_t p) {
    return p == p ? p : -1;
}

/* The K largest of probs, best first; an equal probability goes to the lower expert. Each is the best of those that
 * come after the one before in this order. */
static void choose(int *expert, const acc_t *probs, int E, int K) {
    acc_t last = INFINITY;
    int last_expert = -1;
    for (int j = 0; j < K; j++) {
        int best = -1;
        for (int e = 0; e < E; e++) {
            acc_t value = rank_value(probs[e]);
            bool later = value < last || (value == last && e > last_expert);
            if (later && (best < 0 || value > rank_value(probs[best]))) {
                best = e;
            }
        }
        expert[j] = last_expert = best;
        last = rank_value(probs[best]);
    }
}

void topk_forward(acc_t *probs, acc_t *lse, int *expert, acc_t *weight, const acc_t *logits, int N, int E, int K,
                  int renorm, Stream *stream) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const acc_t *l = logits + (size_t)n * E;
        acc_t *p = probs + (size_t)n * E;
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
        lse[n] = largest + (acc_t)log(sum);
        int *chosen = expert + (size_t)n * K;
        choose(chosen, p, E, K);
        acc_t total = 0;
        for (int j = 0; j < K; j++) {
            total += p[chosen[j]];
        }
        for (int j = 0; j < K; j++) {
            weight[(size_t)n * K + j] = renorm ? p[chosen[j]] / total : p[chosen[j]];
        }
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
            dl[chosen[j]] = renorm ? w[j] * (g[j] - mean) : p[chosen[j]] * (g[j] - mean);
        }
    }
}
