/* Balance loss, z-loss and load statistics on the CPU.
 *
 * Sums over tokens are taken in double over CHUNKS fixed ranges, added in order: the same bits for any number of
 * threads. Experts go in groups of GROUP, so that the ranges' sums fit on the stack whatever E is. Called by
 * model/moe.c and the routers.
 */
#include "balance_loss.h"

#include "vector.h"

enum { CHUNKS = 64, GROUP = 32 };

/* Chunk i of `count` things begins here and ends where the next begins. */
static size_t chunk_start(size_t count, int chunk) {
    return count * chunk / CHUNKS;
}

static double chunks_sum(const double *partial) {
    double sum = 0;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        sum += partial[chunk];
    }
    return sum;
}

/* mean (E) = mean of probs (N,E) over the tokens */
static void mean_over_tokens(acc_t *mean, const acc_t *probs, int N, int E) {
    for (int first = 0; first < E; first += GROUP) {
        int width = E - first < GROUP ? E - first : GROUP;
        double partial[CHUNKS][GROUP];
#pragma omp parallel for schedule(static) if (N > CHUNKS)
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            double column[GROUP] = {0};
            for (size_t n = chunk_start(N, chunk); n < chunk_start(N, chunk + 1); n++) {
                for (int j = 0; j < width; j++) {
                    column[j] += probs[n * E + first + j];
                }
            }
            memcpy(partial[chunk], column, sizeof column);
        }
        for (int j = 0; j < width; j++) {
            double sum = 0;
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                sum += partial[chunk][j];
            }
            mean[first + j] = (acc_t)(sum / N);
        }
    }
}

void balance_forward(acc_t *load, acc_t *mean_prob, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                     int E, int K, Stream *stream) {
    mean_over_tokens(mean_prob, probs, N, E);
    double balance = 0, z = 0;
    for (int e = 0; e < E; e++) {
        balance += demand[e] / ((double)K * N) * mean_prob[e];
    }
    for (int n = 0; n < N; n++) {
        z += (double)lse[n] * lse[n];
    }
    load[LOAD_BALANCE] = (acc_t)(E * balance);
    load[LOAD_Z] = (acc_t)(z / N);
}

void balance_backward(acc_t *dlogits, acc_t *load, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                      int E, int K, double aux_scale, double z_scale, Stream *stream) {
    const acc_t share = (acc_t)(1 / ((double)K * N)); /* f_e = demand_e * share */
    const acc_t aux = (acc_t)(aux_scale * E / N);
    const acc_t z = (acc_t)(2 * z_scale / N);
    double square[CHUNKS];
#pragma omp parallel for schedule(static) if (N > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        double sum = 0;
        for (size_t n = chunk_start(N, chunk); n < chunk_start(N, chunk + 1); n++) {
            const acc_t *p = probs + n * E;
            acc_t *dl = dlogits + n * E;
            acc_t mean = 0; /* sum_e f_e p_e */
            for (int e = 0; e < E; e++) {
                mean += demand[e] * share * p[e];
            }
            for (int e = 0; e < E; e++) {
                acc_t slope = aux * (demand[e] * share - mean);
                dl[e] += p[e] * (slope + z * lse[n]);
                double balance = (double)p[e] * slope;
                sum += balance * balance;
            }
        }
        square[chunk] = sum;
    }
    load[LOAD_BALANCE_GRADIENT] = (acc_t)sqrt(chunks_sum(square));
}

void gradient_measure(acc_t *load, const acc_t *dlogits, size_t count, Stream *stream) {
    double square[CHUNKS];
#pragma omp parallel for schedule(static) if (count > 64 * CHUNKS)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        double sum = 0;
        for (size_t i = chunk_start(count, chunk); i < chunk_start(count, chunk + 1); i++) {
            sum += (double)dlogits[i] * dlogits[i];
        }
        square[chunk] = sum;
    }
    load[LOAD_MAIN_GRADIENT] = (acc_t)sqrt(chunks_sum(square));
}

/* -p ln p; 0 at p = 0, NaN stays NaN */
static double entropy_term(double p) {
    return p > 0 ? -p * log(p) : p;
}

/* The largest of p that lies below `bound`, -1 where there is none; NaN does not count. */
static acc_t largest_below(acc_t bound, const acc_t *p, int E) {
    acc_t largest = -1;
    for (int e = 0; e < E; e++) {
        largest = p[e] < bound && p[e] > largest ? p[e] : largest;
    }
    return largest;
}

/* The K-th largest of p less the next, 0 where K is E. Goes down from value to value, K + 1 sweeps at most. NaN where
 * NaN leaves fewer than K + 1 values. */
static double choice_margin(const acc_t *p, int E, int K) {
    if (K >= E) {
        return 0;
    }
    acc_t value = INFINITY; /* of the last that was passed */
    for (int passed = 0; passed < K;) {
        value = largest_below(value, p, E);
        for (int e = 0; e < E; e++) {
            passed += p[e] == value;
        }
        if (value < 0) {
            return NAN;
        }
        if (passed > K) {
            return 0;
        }
    }
    acc_t next = largest_below(value, p, E);
    return next < 0 ? NAN : (double)value - next;
}

void probs_measure(acc_t *load, acc_t *mean_prob, const acc_t *probs, int N, int E, int K, Stream *stream) {
    double entropy[CHUNKS], margin[CHUNKS], mean_entropy = 0;
#pragma omp parallel for schedule(static) if (N > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        double entropy_sum = 0, margin_sum = 0;
        for (size_t n = chunk_start(N, chunk); n < chunk_start(N, chunk + 1); n++) {
            for (int e = 0; e < E; e++) {
                entropy_sum += entropy_term(probs[n * E + e]);
            }
            margin_sum += choice_margin(probs + n * E, E, K);
        }
        entropy[chunk] = entropy_sum;
        margin[chunk] = margin_sum;
    }
    mean_over_tokens(mean_prob, probs, N, E);
    for (int e = 0; e < E; e++) {
        mean_entropy += entropy_term(mean_prob[e]);
    }
    load[LOAD_ENTROPY] = (acc_t)(chunks_sum(entropy) / N);
    load[LOAD_MEAN_ENTROPY] = (acc_t)mean_entropy;
    load[LOAD_MARGIN] = (acc_t)(chunks_sum(margin) / N);
}

/* a / b as a share, 0 of nothing */
static acc_t share_of(double a, double b) {
    return (acc_t)(b > 0 ? a / b : 0);
}

void plan_measure(acc_t *load, const Plan *plan, Stream *stream) {
    load[LOAD_DROPPED] = load[LOAD_TOKENS_DROPPED] = load[LOAD_PADDING] = 0;
    if (plan->slots > 0) {
        return;
    }
    double demand = 0, placed = 0, computed = plan->offset[plan->E];
    for (int e = 0; e < plan->E; e++) {
        demand += plan->demand[e];
        placed += plan->count[e];
    }
    int rowless = 0; /* tokens */
    for (int n = 0; n < plan->N; n++) {
        int highest = -1;
        for (int i = n * plan->K; i < (n + 1) * plan->K; i++) {
            highest = plan->row[i] > highest ? plan->row[i] : highest;
        }
        rowless += highest < 0;
    }
    load[LOAD_DROPPED] = share_of(demand - placed, demand);
    load[LOAD_TOKENS_DROPPED] = share_of(rowless, plan->N);
    load[LOAD_PADDING] = share_of(computed - placed, computed);
}
