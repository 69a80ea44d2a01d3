/* Balance loss, z-loss and load statistics on the CPU.
 *
 * Sums over tokens are taken in double over CHUNKS fixed ranges of rows, added in order: the same bits for any number
 * of threads. Experts go in groups of GROUP, so that the ranges' sums fit on the stack whatever E is. Called by
 * model/moe.c and the routers.
 */
#include "balance_loss.h"

#include "vector.h"

enum { CHUNKS = 64, GROUP = 32 };

/* -p ln p; 0 at p = 0, NaN stays NaN */
static double entropy_term(double p) {
    return p > 0 ? -p * log(p) : p;
}

/* sum[j] = sum_n probs[n, first + j] for `width` experts; returns the entropy's share of those experts, summed over the
 * tokens. */
static double group_sums(double *sum, const acc_t *probs, int N, int E, int first, int width) {
    double partial[CHUNKS][GROUP], partial_entropy[CHUNKS];
    int rows = (N + CHUNKS - 1) / CHUNKS;
#pragma omp parallel for schedule(static) if (N > CHUNKS)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        double column[GROUP] = {0}, entropy = 0;
        int end = (chunk + 1) * rows < N ? (chunk + 1) * rows : N;
        for (int n = chunk * rows; n < end; n++) {
            const acc_t *p = probs + (size_t)n * E + first;
            for (int j = 0; j < width; j++) {
                column[j] += p[j];
                entropy += entropy_term(p[j]);
            }
        }
        memcpy(partial[chunk], column, sizeof column);
        partial_entropy[chunk] = entropy;
    }
    double entropy = 0;
    for (int j = 0; j < width; j++) {
        sum[j] = 0;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        for (int j = 0; j < width; j++) {
            sum[j] += partial[chunk][j];
        }
        entropy += partial_entropy[chunk];
    }
    return entropy;
}

void balance_forward(acc_t *load, acc_t *mean_prob, const acc_t *probs, const acc_t *lse, const int *demand,
                     const int *count, int N, int E, int K, Stream *stream) {
    const double entries = (double)K * N;
    double balance = 0, entropy = 0, mean_entropy = 0, placed = 0;
    for (int first = 0; first < E; first += GROUP) {
        int width = E - first < GROUP ? E - first : GROUP;
        double sum[GROUP];
        entropy += group_sums(sum, probs, N, E, first, width);
        for (int j = 0; j < width; j++) {
            int e = first + j;
            double p = sum[j] / N;
            mean_prob[e] = (acc_t)p;
            balance += demand[e] / entries * p;
            mean_entropy += entropy_term(p);
            placed += count[e];
        }
    }
    double z = 0;
    for (int n = 0; n < N; n++) {
        z += (double)lse[n] * lse[n];
    }
    load[LOAD_BALANCE] = (acc_t)(E * balance);
    load[LOAD_Z] = (acc_t)(z / N);
    load[LOAD_ENTROPY] = (acc_t)(entropy / N);
    load[LOAD_MEAN_ENTROPY] = (acc_t)mean_entropy;
    load[LOAD_DROPPED] = (acc_t)(1 - placed / entries);
    load[LOAD_MAIN_GRADIENT] = 0;
}

void balance_backward(acc_t *dlogits, const acc_t *probs, const acc_t *lse, const int *demand, int N, int E, int K,
                      double aux_scale, double z_scale, Stream *stream) {
    const acc_t share = (acc_t)(1 / ((double)K * N)); /* f_e = demand_e * share */
    const acc_t aux = (acc_t)(aux_scale * E / N);
    const acc_t z = (acc_t)(2 * z_scale / N);
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        const acc_t *p = probs + (size_t)n * E;
        acc_t *dl = dlogits + (size_t)n * E;
        acc_t mean = 0; /* sum_e f_e p_e */
        for (int e = 0; e < E; e++) {
            mean += demand[e] * share * p[e];
        }
        for (int e = 0; e < E; e++) {
            dl[e] += p[e] * (aux * (demand[e] * share - mean) + z * lse[n]);
        }
    }
}

void balance_measure(acc_t *load, const acc_t *dlogits, int N, int E, Stream *stream) {
    double square = 0;
    for (size_t i = 0; i < (size_t)N * E; i++) {
        square += (double)dlogits[i] * dlogits[i];
    }
    load[LOAD_MAIN_GRADIENT] = (acc_t)sqrt(square);
}
