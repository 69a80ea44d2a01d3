/* Softmax and cross-entropy on the CPU, a row of logits at a time: its maximum, its exponentials (each computed once),
 * its sum.
 *
 * Forward keeps the exponentials of a block of BLOCK logits on the stack; forward_backward leaves them where the logits
 * were and multiplies them into the gradient. Both add in the same order, so both give the same losses. A NaN among the
 * logits of a predicted row passes through the exponentials into the loss, where the guard of model/optimizer.c looks
 * for it. A row that is not predicted is not read.
 */
#include "cross_entropy.h"

#include "vector.h"

enum { BLOCK = 1024 };

/* e_v = exp(l_v - max) for `count` logits; returns their sum. e may be l. */
static acc_t exp_block(real_t *e, const real_t *l, acc_t max, int count) {
#pragma omp simd
    for (int v = 0; v < count; v++) {
        e[v] = exp_fast(l[v] - max);
    }
    acc_t lane[LANES] = {0};
    int v = 0;
    for (; v + LANES <= count; v += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += e[v + j];
        }
    }
    for (int j = 0; v + j < count; j++) {
        lane[j] += e[v + j];
    }
    return lanes_sum(lane);
}

void cross_entropy_forward(acc_t *losses, const real_t *logits, const int *targets, int N, int V, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        const real_t *l = logits + (size_t)n * V;
        if (targets[n] < 0) {
            losses[n] = 0;
            continue;
        }
        acc_t max = largest_of(l, V);
        double sum = 0;
        for (int begin = 0; begin < V; begin += BLOCK) {
            real_t e[BLOCK];
            sum += exp_block(e, l + begin, max, V - begin < BLOCK ? V - begin : BLOCK);
        }
        losses[n] = (acc_t)(log(sum) + ((double)max - l[targets[n]]));
    }
}

void cross_entropy_forward_backward(acc_t *losses, real_t *logits, const int *targets, int N, int V, double scale,
                                    Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        real_t *l = logits + (size_t)n * V;
        if (targets[n] < 0) {
            losses[n] = 0;
            memset(l, 0, sizeof *l * V);
            continue;
        }
        acc_t max = largest_of(l, V);
        double target_below_max = (double)max - l[targets[n]];
        double sum = 0;
        for (int begin = 0; begin < V; begin += BLOCK) {
            sum += exp_block(l + begin, l + begin, max, V - begin < BLOCK ? V - begin : BLOCK);
        }
        losses[n] = (acc_t)(log(sum) + target_below_max);
        real_t factor = (real_t)(scale / sum);
        for (int v = 0; v < V; v++) {
            l[v] *= factor;
        }
        l[targets[n]] -= (real_t)scale;
    }
}

void mean_forward(acc_t *mean, const acc_t *values, int N, int count, Stream *stream) {
    double lane[LANES] = {0};
    for (int n = 0; n < N; n++) {
        lane[n % LANES] += values[n];
    }
    double sum = 0;
    for (int j = 0; j < LANES; j++) {
        sum += lane[j];
    }
    *mean = (acc_t)(sum / count);
}
