/* Sigmoid scores with a selection bias on the CPU: scores, choice, weights of one token at a time, and the way back;
 * the loss of one sequence at a time; the bias. Called by model/router_sigmoid.c.
 *
 * Sums over sequences are taken in double over CHUNKS fixed ranges, added in order: the same bits for any number of
 * threads.
 */
#include "sigmoid_topk.h"

#include <assert.h>

#include "choose.h"
#include "vector.h"

enum { CHUNKS = 64, MOST_EXPERTS = 4096 /* as the option --experts has it */ };

/* Range i of `count` sequences begins here and ends where the next begins. */
static int chunk_start(int count, int chunk) {
    return (int)((size_t)count * chunk / CHUNKS);
}

static const double smallest_total = 1e-20;

/* The two best of `size` biased scores, added; the one where there is one. */
static acc_t group_score(const acc_t *biased, int size) {
    int best = choose_next(biased, size, -1), second = choose_next(biased, size, best);
    return biased[best] + (second < 0 ? 0 : biased[second]);
}

/* Minus infinity for the experts of all groups but the best: 0 would win over a score whose bias made it negative. */
static void mask_groups(acc_t *biased, int E, int groups, int kept) {
    acc_t score[MOST_EXPERTS];
    int size = E / groups, last = -1;
    for (int g = 0; g < groups; g++) {
        score[g] = group_score(biased + g * size, size);
    }
    for (int i = 0; i < kept; i++) {
        last = choose_next(score, groups, last);
    }
    for (int e = 0; e < E; e++) {
        biased[e] = comes_before(score, last, e / size) ? -(acc_t)INFINITY : biased[e];
    }
}

void sigmoid_topk_forward(acc_t *scores, acc_t *probs, int *expert, acc_t *weight, const acc_t *logits,
                          const acc_t *bias, SigmoidShape shape, Stream *stream) {
    const int E = shape.E, K = shape.K;
    assert(shape.groups <= MOST_EXPERTS);
#pragma omp parallel for schedule(static) if (shape.N > 1)
    for (int n = 0; n < shape.N; n++) {
        const acc_t *l = logits + (size_t)n * E;
        acc_t *s = scores + (size_t)n * E;
        acc_t *share = probs + (size_t)n * E, *biased = share; /* first s + b for the choice, then s' */
        int *chosen = expert + (size_t)n * K;
        acc_t sum = 0;
        for (int e = 0; e < E; e++) {
            s[e] = sigmoid(l[e]);
        }
        for (int e = 0; e < E; e++) { /* NaN comes last, but before a group that is not kept */
            acc_t value = s[e] + bias[e];
            biased[e] = value == value ? value : (acc_t)-1e30;
            sum += s[e];
        }
        if (shape.groups > 1) {
            mask_groups(biased, E, shape.groups, shape.kept);
        }
        choose_largest(chosen, biased, E, K);
        acc_t total = (acc_t)smallest_total;
        for (int j = 0; j < K; j++) {
            total += s[chosen[j]];
        }
        acc_t factor = (acc_t)shape.scale / (shape.renorm ? total : 1);
        for (int j = 0; j < K; j++) {
            weight[(size_t)n * K + j] = factor * s[chosen[j]];
        }
        for (int e = 0; e < E; e++) {
            share[e] = s[e] / sum;
        }
    }
}

void sigmoid_topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *scores, const int *expert,
                           const acc_t *weight, SigmoidShape shape, Stream *stream) {
    const int E = shape.E, K = shape.K;
#pragma omp parallel for schedule(static) if (shape.N > 1)
    for (int n = 0; n < shape.N; n++) {
        const acc_t *s = scores + (size_t)n * E;
        const acc_t *w = weight + (size_t)n * K, *g = dweight + (size_t)n * K;
        const int *chosen = expert + (size_t)n * K;
        acc_t *dl = dlogits + (size_t)n * E;
        acc_t total = (acc_t)smallest_total, mean = 0;
        for (int j = 0; j < K; j++) {
            total += s[chosen[j]];
            mean += w[j] * g[j];
        }
        mean /= (acc_t)shape.scale; /* of g, by weights that sum to 1 */
        acc_t factor = (acc_t)shape.scale / (shape.renorm ? total : 1);
        memset(dl, 0, (size_t)E * sizeof *dl);
        for (int j = 0; j < K; j++) {
            acc_t score = s[chosen[j]];
            dl[chosen[j]] = factor * (shape.renorm ? g[j] - mean : g[j]) * score * (1 - score);
        }
    }
}

/* count (E): how often the tokens of one sequence chose each expert. f_e = count_e E / (K T) */
static void count_choices(int *count, const int *expert, SigmoidShape shape) {
    memset(count, 0, (size_t)shape.E * sizeof *count);
    for (size_t i = 0; i < (size_t)shape.T * shape.K; i++) {
        count[expert[i]]++;
    }
}

/* sum_e count_e s'_e of one token */
static double crowding(const int *count, const acc_t *share, int E) {
    double sum = 0;
    for (int e = 0; e < E; e++) {
        sum += (double)count[e] * share[e];
    }
    return sum;
}

/* B is the mean over tokens of sum_e f_e s'_e, so that P needs no array of its own. */
void sequence_balance_forward(acc_t *load, const acc_t *probs, const int *expert, SigmoidShape shape, Stream *stream) {
    const int T = shape.T, E = shape.E, sequences = shape.N / T;
    double partial[CHUNKS], sum = 0;
    assert(E <= MOST_EXPERTS);
#pragma omp parallel for schedule(static) if (sequences > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        int count[MOST_EXPERTS];
        partial[chunk] = 0;
        for (int b = chunk_start(sequences, chunk); b < chunk_start(sequences, chunk + 1); b++) {
            count_choices(count, expert + (size_t)b * T * shape.K, shape);
            for (size_t n = (size_t)b * T; n < (size_t)(b + 1) * T; n++) {
                partial[chunk] += crowding(count, probs + n * E, E);
            }
        }
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        sum += partial[chunk];
    }
    load[LOAD_BALANCE] = (acc_t)(sum * E / ((double)shape.K * T) / shape.N);
    load[LOAD_Z] = 0;
}

void sequence_balance_backward(acc_t *dlogits, acc_t *load, const acc_t *scores, const acc_t *probs, const int *expert,
                               double scale, SigmoidShape shape, Stream *stream) {
    const int T = shape.T, E = shape.E, sequences = shape.N / T;
    const double unit = scale * E / ((double)shape.K * T) / shape.N; /* of a count in f, of a token in the mean */
    double partial[CHUNKS], square = 0;
    assert(E <= MOST_EXPERTS);
#pragma omp parallel for schedule(static) if (sequences > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        int count[MOST_EXPERTS];
        partial[chunk] = 0;
        for (int b = chunk_start(sequences, chunk); b < chunk_start(sequences, chunk + 1); b++) {
            count_choices(count, expert + (size_t)b * T * shape.K, shape);
            for (size_t n = (size_t)b * T; n < (size_t)(b + 1) * T; n++) {
                const acc_t *s = scores + n * E, *share = probs + n * E;
                double mean = crowding(count, share, E);
                for (int e = 0; e < E; e++) { /* s / sum s = s' */
                    acc_t added = (acc_t)(unit * (count[e] - mean) * share[e] * (1 - s[e]));
                    dlogits[n * E + e] += added;
                    partial[chunk] += (double)added * added;
                }
            }
        }
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        square += partial[chunk];
    }
    load[LOAD_BALANCE_GRADIENT] = (acc_t)sqrt(square);
}

static int64_t count_of(const int *counts, int slices, size_t stride, int e) {
    int64_t sum = 0;
    for (int i = 0; i < slices; i++) {
        sum += counts[i * stride + e];
    }
    return sum;
}

void selection_bias_update(acc_t *bias, const int *counts, int slices, size_t stride, int E, double rate,
                           const AdamState *adam, Stream *stream) {
    if (adam->scale == 0) {
        return;
    }
    int64_t total = 0;
    for (int e = 0; e < E; e++) {
        total += count_of(counts, slices, stride, e);
    }
    for (int e = 0; e < E; e++) { /* compared times E, in whole numbers: exactly at the mean nothing moves */
        int64_t missing = total - E * count_of(counts, slices, stride, e);
        bias[e] += (acc_t)rate * ((missing > 0) - (missing < 0));
    }
}
