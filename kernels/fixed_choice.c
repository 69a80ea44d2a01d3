/* Choices by table, position, dice or decree. Every token is computed from its own index alone, so that tokens run on
 * any thread. The one function with a memory, balanced_table, runs on the host whatever the device is:
 * balanced_table.c.
 *
 * Products of a token's index are taken in 64 bits. Called by the routers of model/ that learn no choice.
 */
#include "fixed_choice.h"

#include <math.h>
#include <string.h>

#include "random.h"

void table_choice(int *expert, const int *tokens, const acc_t *table, int N, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < K; j++) {
            expert[(size_t)n * K + j] = (int)table[(size_t)tokens[n] * K + j];
        }
    }
}

/* ---- choices without a table */

void position_choice(int *expert, int start, int N, int T, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        int64_t position = (int64_t)start + n % T;
        for (int j = 0; j < K; j++) {
            expert[(size_t)n * K + j] = (int)((position * K + j) % E);
        }
    }
}

void balanced_choice(int *expert, int start, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < K; j++) {
            expert[(size_t)n * K + j] = (int)((((int64_t)start + n) * K + j) % E);
        }
    }
}

/* -s ln(e+1) + Gumbel noise, the noise -ln(-ln u) with u in (0, 1]: never NaN, and +infinity at u = 1. */
static double zipf_score(double s, uint64_t key, int64_t n, int E, int e) {
    double u = 1 - random_uniform(key, (uint64_t)n * (uint64_t)E + (uint64_t)e);
    return -s * log(e + 1.0) - log(-log(u));
}

/* Keeps the best so far in order and inserts. The scores of the few that a newcomer is compared with are computed
 * again, which is cheaper than memory for them. */
void zipf_choice(int *expert, double s, const uint64_t *key, int start, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        int64_t token = (int64_t)start + n;
        int *best = expert + (size_t)n * K;
        double worst = -INFINITY; /* score of best[K-1] */
        for (int e = 0; e < E; e++) {
            double score = zipf_score(s, *key, token, E, e);
            if (e >= K && !(score > worst)) {
                continue;
            }
            int j = e < K ? e : K - 1;
            while (j > 0 && score > zipf_score(s, *key, token, E, best[j - 1])) {
                best[j] = best[j - 1];
                j--;
            }
            best[j] = e;
            worst = zipf_score(s, *key, token, E, best[e < K ? e : K - 1]);
        }
    }
}

void one_choice(int *expert, int start, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        int *chosen = expert + (size_t)n * K;
        chosen[0] = 0;
        for (int j = 1; j < K; j++) {
            chosen[j] = 1 + (int)((((int64_t)start + n) * (K - 1) + j - 1) % (E - 1));
        }
    }
}

/* ---- weights, shares, projections */

void equal_weight(acc_t *weight, int N, int K, Stream *stream) {
    const acc_t share = (acc_t)1 / K;
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < K; j++) {
            weight[(size_t)n * K + j] = share;
        }
    }
}

void choice_probs(acc_t *probs, const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        acc_t *p = probs + (size_t)n * E;
        memset(p, 0, (size_t)E * sizeof *p);
        for (int j = 0; j < K; j++) {
            int e = expert[(size_t)n * K + j];
            if (e >= 0) {
                p[e] = weight[(size_t)n * K + j];
            }
        }
    }
}

void random_weights(acc_t *w, double std, const uint64_t *key, size_t count, Stream *stream) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) {
        w[i] = (acc_t)(std * random_normal(*key, i));
    }
}
