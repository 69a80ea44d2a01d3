/* Noisy top-k gating and its balance losses on the CPU.
 *
 * A token is worked on alone; where tokens meet, in the importance and the load, sums are taken in double over CHUNKS
 * fixed ranges of tokens, added in order: the same bits for any number of threads. What one token adds to a load goes
 * through log, exp and erfc in double, as the normal noise does: it is little work beside the experts'.
 * Called by model/router_noisy.c.
 */
#include "noisy.h"

#include <string.h>

#include "choose.h"
#include "random.h"
#include "vector.h"

enum { CHUNKS = 64, GROUP = 32 };

/* Range i of `count` tokens begins here and ends where the next begins. */
static size_t chunk_start(int count, int chunk) {
    return (size_t)count * chunk / CHUNKS;
}

/* sigma: log(1 + e^r) without overflow, and the floor */
static double noise_deviation(double r) {
    return (r > 0 ? r + log1p(exp(-r)) : log1p(exp(r))) + 0.01;
}

/* p = softmax(p) */
static void softmax_in_place(acc_t *p, int count) {
    acc_t largest = largest_of(p, count), sum = 0;
    for (int i = 0; i < count; i++) {
        p[i] = exp_fast(p[i] - largest);
    }
    for (int i = 0; i < count; i++) {
        sum += p[i];
    }
    for (int i = 0; i < count; i++) {
        p[i] /= sum;
    }
}

void noisy_forward(acc_t *h, acc_t *noise, int *expert, acc_t *weight, acc_t *probs, const acc_t *clean,
                   const acc_t *raw, const uint64_t *key, int noisy, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * E;
        int *chosen = expert + (size_t)n * K;
        acc_t *w = weight + (size_t)n * K;
        for (size_t i = row; i < row + E; i++) {
            noise[i] = noisy ? (acc_t)random_normal(*key, i) : 0;
            h[i] = noisy ? (acc_t)(clean[i] + noise[i] * noise_deviation(raw[i])) : clean[i];
        }
        choose_largest(chosen, h + row, E, K);
        for (int j = 0; j < K; j++) {
            w[j] = h[row + chosen[j]];
        }
        softmax_in_place(w, K);
        memcpy(probs + row, clean + row, (size_t)E * sizeof *probs);
        softmax_in_place(probs + row, E);
    }
}

void noisy_backward(acc_t *dclean, acc_t *draw, const acc_t *dweight, const acc_t *raw, const acc_t *noise,
                    const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * E;
        const int *chosen = expert + (size_t)n * K;
        const acc_t *w = weight + (size_t)n * K, *g = dweight + (size_t)n * K;
        memset(dclean + row, 0, (size_t)E * sizeof *dclean);
        memset(draw + row, 0, (size_t)E * sizeof *draw);
        acc_t mean = 0;
        for (int j = 0; j < K; j++) {
            mean += w[j] * g[j];
        }
        for (int j = 0; j < K; j++) {
            size_t i = row + chosen[j];
            dclean[i] = w[j] * (g[j] - mean);
            draw[i] = dclean[i] * noise[i] * sigmoid(raw[i]);
        }
    }
}

/* The two experts of a token at the border of the choice. Each is the other side's threshold: without e, the K-th
 * largest is `next` where e is chosen and `last` where it is not. */
typedef struct {
    int last, next; /* the K-th and the (K+1)-th largest */
} Border;

static Border border_of(const acc_t *h, const int *chosen, int E, int K) {
    int last = chosen[K - 1];
    return (Border){last, choose_next(h, E, last)};
}

static bool is_chosen(const acc_t *h, Border border, int e) {
    return !comes_before(h, border.last, e);
}

/* z of P = Phi(z): how far, in its noise, expert e's clean logit lies above the threshold */
static double border_distance(const acc_t *h, const acc_t *clean, double sigma, Border border, int e) {
    return ((double)clean[e] - h[is_chosen(h, border, e) ? border.next : border.last]) / sigma;
}

/* Importance and load of the experts first .. first + width: what the tokens from n to end add to column. */
static void add_tokens(double (*column)[GROUP], const acc_t *clean, const acc_t *raw, const acc_t *h, const int *expert,
                       const acc_t *weight, int noisy, size_t n, size_t end, int E, int K, int first, int width) {
    for (; n < end; n++) {
        const int *chosen = expert + n * K;
        for (int j = 0; j < K; j++) {
            if (chosen[j] >= first && chosen[j] < first + width) {
                column[0][chosen[j] - first] += weight[n * K + j];
            }
        }
        if (noisy) {
            Border border = border_of(h + n * E, chosen, E, K);
            for (int e = first; e < first + width; e++) {
                double sigma = noise_deviation(raw[n * E + e]);
                double z = border_distance(h + n * E, clean + n * E, sigma, border, e);
                column[1][e - first] += 0.5 * erfc(-z * M_SQRT1_2);
            }
        }
    }
}

typedef struct {
    double mean, variance;
} Moments;

static Moments moments_of(const acc_t *x, int E) {
    Moments m = {0, 0};
    for (int e = 0; e < E; e++) {
        m.mean += (double)x[e] / E;
    }
    for (int e = 0; e < E; e++) {
        m.variance += (x[e] - m.mean) * (x[e] - m.mean) / E;
    }
    return m;
}

/* CV^2 of x (E). The mean is above 0: weights sum to 1 in a token, and the P of a chosen expert is at least
 * Phi(-eps). */
static double cv_squared(const acc_t *x, int E) {
    Moments m = moments_of(x, E);
    return m.variance / (m.mean * m.mean);
}

/* d CV^2 / dx_e, where moving x_e moves the mean as well */
static double cv_squared_slope(Moments m, double x, int E) {
    return 2 / (E * m.mean * m.mean) * (x - m.mean - m.variance / m.mean);
}

void noisy_balance_forward(acc_t *load, acc_t *sums, const acc_t *clean, const acc_t *raw, const acc_t *h,
                           const int *expert, const acc_t *weight, int noisy, int N, int E, int K, Stream *stream) {
    for (int first = 0; first < E; first += GROUP) { /* so that the ranges' sums fit on the stack */
        int width = E - first < GROUP ? E - first : GROUP;
        double partial[CHUNKS][2][GROUP] = {0};
#pragma omp parallel for schedule(static) if (N > 1)
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            add_tokens(partial[chunk], clean, raw, h, expert, weight, noisy, chunk_start(N, chunk),
                       chunk_start(N, chunk + 1), E, K, first, width);
        }
        for (int i = 0; i < 2 * width; i++) {
            double sum = 0;
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                sum += partial[chunk][i / width][i % width];
            }
            sums[i / width * E + first + i % width] = (acc_t)sum;
        }
    }
    load[LOAD_BALANCE] = (acc_t)(cv_squared(sums, E) + (noisy ? cv_squared(sums + E, E) : 0));
    load[LOAD_Z] = 0;
}

/* What the gradient of one token needs: its rows, and the two losses' statistics. */
typedef struct {
    const acc_t *clean, *raw, *noise, *h, *importance, *load; /* (E) */
    const int *chosen;                                        /* (K) */
    const acc_t *weight;                                      /* (K) */
    Moments importance_moments, load_moments;
    double scale;
    int E, K;
} TokenBalance;

/* d L / d w_j of the importance loss */
static double importance_slope(const TokenBalance *t, int j) {
    return t->scale * cv_squared_slope(t->importance_moments, t->importance[t->chosen[j]], t->E);
}

/* d L / d c_e through P_e alone, and *dsigma likewise. The threshold's expert gets -1 times the former. */
static double own_load_gradient(double *dsigma, const TokenBalance *t, Border border, int e) {
    double sigma = noise_deviation(t->raw[e]);
    double z = border_distance(t->h, t->clean, sigma, border, e);
    double density = exp(-0.5 * z * z) * 0.3989422804014327; /* phi(z), 1 / sqrt(2 pi) */
    double dc = t->scale * cv_squared_slope(t->load_moments, t->load[e], t->E) * density / sigma;
    *dsigma = -dc * z;
    return dc;
}

/* Adds to one element of both gradients; returns the sum of the squares of what it adds. */
static double add_gradient(acc_t *dclean, acc_t *draw, double dc, double dsigma, acc_t raw) {
    double dr = dsigma * sigmoid(raw);
    *dclean += (acc_t)dc;
    *draw += (acc_t)dr;
    return dc * dc + dr * dr;
}

/* Both losses' gradient of one token, dclean, draw (E). Most experts have the term of their own P alone. The chosen and
 * the next one wait for the second loop: they also have the importance's, which goes through the softmax to h, or the
 * threshold's, which sums over the experts on the other side of the border. Returns the sum of squares. */
static double token_balance_backward(acc_t *dclean, acc_t *draw, const TokenBalance *t) {
    Border border = border_of(t->h, t->chosen, t->E, t->K);
    double square = 0, mean = 0, chosen_sum = 0, other_sum = 0, dsigma;
    for (int e = 0; e < t->E; e++) {
        double dc = own_load_gradient(&dsigma, t, border, e);
        if (is_chosen(t->h, border, e)) {
            chosen_sum += dc;
        } else {
            other_sum += dc;
            square += e == border.next ? 0 : add_gradient(&dclean[e], &draw[e], dc, dsigma, t->raw[e]);
        }
    }
    for (int j = 0; j < t->K; j++) {
        mean += t->weight[j] * importance_slope(t, j);
    }
    for (int j = 0; j <= t->K; j++) {
        int e = j < t->K ? t->chosen[j] : border.next;
        double dc = own_load_gradient(&dsigma, t, border, e);
        double dh = j < t->K ? t->weight[j] * (importance_slope(t, j) - mean) : 0;
        dh -= e == border.next ? chosen_sum : e == border.last ? other_sum : 0;
        square += add_gradient(&dclean[e], &draw[e], dc + dh, dsigma + dh * t->noise[e], t->raw[e]);
    }
    return square;
}

void noisy_balance_backward(acc_t *dclean, acc_t *draw, acc_t *load, const acc_t *sums, const acc_t *clean,
                            const acc_t *raw, const acc_t *noise, const acc_t *h, const int *expert,
                            const acc_t *weight, double scale, int N, int E, int K, Stream *stream) {
    Moments importance_moments = moments_of(sums, E), load_moments = moments_of(sums + E, E);
    double partial[CHUNKS], square = 0;
#pragma omp parallel for schedule(static) if (N > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        partial[chunk] = 0;
        for (size_t n = chunk_start(N, chunk); n < chunk_start(N, chunk + 1); n++) {
            size_t row = n * E;
            TokenBalance token = {.clean = clean + row,
                                  .raw = raw + row,
                                  .noise = noise + row,
                                  .h = h + row,
                                  .importance = sums,
                                  .load = sums + E,
                                  .chosen = expert + n * K,
                                  .weight = weight + n * K,
                                  .importance_moments = importance_moments,
                                  .load_moments = load_moments,
                                  .scale = scale,
                                  .E = E,
                                  .K = K};
            partial[chunk] += token_balance_backward(dclean + row, draw + row, &token);
        }
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        square += partial[chunk];
    }
    load[LOAD_BALANCE_GRADIENT] = (acc_t)sqrt(square);
}
