/* Three products serve the four mixtures, because dispatch and combine are each other's way back:
 *
 *     slots_from_tokens    dispatch forward,   drows of combine
 *     tokens_from_slots    combine forward,    dx of dispatch
 *     mixture_gradient     dmix of dispatch,   dweight of combine
 *
 * Tokens are read where they lie: a group `across` the batch differs by its stride alone. The softmax over tokens runs
 * down columns; it sweeps along rows all the same, COLUMNS of them at a time, with a maximum and a sum for each column
 * beside it. Work is cut into blocks of fixed size with one owner each, so the number of threads changes no bit
 * (tile.h). Called by the soft routers of model/.
 */
#include "soft_mix.h"

#include "tile.h"

enum {
    COLUMNS = 32,                 /* slots whose softmax over tokens runs together */
    CHUNKS = 64,                  /* of tokens, for the gradient of the scale */
    ROUTE_BLOCK = 48,             /* tokens, or slots, whose share of the router's gradient has one owner */
    TOKEN_BLOCK = TILE_BLOCK / 2, /* a mixture is cut into blocks of tokens, */
    SLOT_BLOCK = 64,              /* of slots, */
    WIDTH_BLOCK = 8 * TILE_COLS,  /* and of features */
};

/* Token i of a group is first + i * step. */
typedef struct {
    size_t first, step;
} Group;

static int groups_of(const Plan *plan) {
    return plan->N / plan->group_tokens;
}

static Group group_at(const Plan *plan, int g) {
    size_t groups = groups_of(plan), tokens = plan->group_tokens;
    return plan->across ? (Group){g, groups} : (Group){g * tokens, 1};
}

static int at_most(int count, int limit) {
    return count < limit ? count : limit;
}

static acc_t sum_of(const acc_t *x, int n) {
    acc_t lane[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += x[i + j];
        }
    }
    for (int j = 0; i + j < n; j++) {
        lane[j] += x[i + j];
    }
    return lanes_sum(lane);
}

/* ---- the router */

static void inverse_lengths(acc_t *inverse, const real_t *v, int count, int C) {
#pragma omp parallel for
    for (int i = 0; i < count; i++) {
        const real_t *row = v + (size_t)i * C;
        inverse[i] = (acc_t)(1 / sqrt(dot(row, row, C) + 1e-12));
    }
}

static void softmax_over_slots(acc_t *weight, const acc_t *l, int K) {
    acc_t largest = largest_of(l, K);
    for (int j = 0; j < K; j++) {
        weight[j] = exp_fast(l[j] - largest);
    }
    acc_t inverse = 1 / sum_of(weight, K);
    for (int j = 0; j < K; j++) {
        weight[j] *= inverse;
    }
}

/* `width` columns of mix, of one group's tokens. */
static void softmax_over_tokens(acc_t *mix, const acc_t *logits, Group group, int tokens, int K, int width) {
    acc_t largest[COLUMNS];
    double sum[COLUMNS] = {0};
    size_t first = group.first * K, step = group.step * K;
    memcpy(largest, logits + first, sizeof *largest * width);
    for (int i = 1; i < tokens; i++) {
        const acc_t *l = logits + first + i * step;
        for (int j = 0; j < width; j++) {
            largest[j] = l[j] > largest[j] ? l[j] : largest[j];
        }
    }
    for (int i = 0; i < tokens; i++) {
        const acc_t *l = logits + first + i * step;
        acc_t *p = mix + first + i * step;
        for (int j = 0; j < width; j++) {
            p[j] = exp_fast(l[j] - largest[j]);
        }
        for (int j = 0; j < width; j++) {
            sum[j] += p[j];
        }
    }
    acc_t inverse[COLUMNS];
    for (int j = 0; j < width; j++) {
        inverse[j] = (acc_t)(1 / sum[j]);
    }
    for (int i = 0; i < tokens; i++) {
        acc_t *p = mix + first + i * step;
        for (int j = 0; j < width; j++) {
            p[j] *= inverse[j];
        }
    }
}

void soft_route_forward(acc_t *logits, Plan *plan, acc_t *x_inverse, acc_t *phi_inverse, const real_t *x,
                        const acc_t *phi, const acc_t *scale, int C, Stream *stream) {
    int N = plan->N, K = plan->K, groups = groups_of(plan);
    inverse_lengths(x_inverse, x, N, C);
    inverse_lengths(phi_inverse, phi, K, C);
    parallel_multiply(logits, x, C, 1, phi, 1, C, N, K, C, 0);
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        acc_t *l = logits + (size_t)n * K, factor = *scale * x_inverse[n];
        for (int j = 0; j < K; j++) {
            l[j] *= factor * phi_inverse[j];
        }
        softmax_over_slots(plan->weight + (size_t)n * K, l, K);
    }
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int g = 0; g < groups; g++) {
        for (int j = 0; j < K; j += COLUMNS) {
            softmax_over_tokens(plan->mix + j, logits + j, group_at(plan, g), plan->group_tokens, K,
                                at_most(K - j, COLUMNS));
        }
    }
}

static void fix(acc_t *matrix, const Plan *plan, Mixture mixture, int shares) {
    size_t K = plan->K, groups = groups_of(plan);
#pragma omp parallel for
    for (int n = 0; n < plan->N; n++) {
        size_t place = plan->across ? n / groups : (size_t)n % plan->group_tokens; /* of the token in its group */
        for (size_t j = 0; j < K; j++) {
            matrix[n * K + j] = mixture == MIXTURE_IDENTITY ? j == place : (acc_t)1 / shares;
        }
    }
}

void soft_fix_mix(Plan *plan, Mixture mixture, Stream *stream) {
    if (mixture != MIXTURE_LEARNED) {
        fix(plan->mix, plan, mixture, plan->group_tokens);
    }
}

void soft_fix_weight(Plan *plan, Mixture mixture, Stream *stream) {
    if (mixture != MIXTURE_LEARNED) {
        fix(plan->weight, plan, mixture, plan->K);
    }
}

/* dlogits += mix (dmix - sum mix dmix), the same columns */
static void softmax_over_tokens_backward(acc_t *dlogits, const acc_t *dmix, const acc_t *mix, Group group, int tokens,
                                         int K, int width) {
    double sum[COLUMNS] = {0};
    acc_t mean[COLUMNS];
    size_t first = group.first * K, step = group.step * K;
    for (int i = 0; i < tokens; i++) {
        const acc_t *p = mix + first + i * step, *dp = dmix + first + i * step;
        for (int j = 0; j < width; j++) {
            sum[j] += (double)p[j] * dp[j];
        }
    }
    for (int j = 0; j < width; j++) {
        mean[j] = (acc_t)sum[j];
    }
    for (int i = 0; i < tokens; i++) {
        const acc_t *p = mix + first + i * step, *dp = dmix + first + i * step;
        acc_t *dl = dlogits + first + i * step;
        for (int j = 0; j < width; j++) {
            dl[j] += p[j] * (dp[j] - mean[j]);
        }
    }
}

void soft_logits_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *dmix, const Plan *plan, Stream *stream) {
    int N = plan->N, K = plan->K, groups = dmix ? groups_of(plan) : 0;
    if (!dweight) {
        memset(dlogits, 0, (size_t)N * K * sizeof *dlogits);
    }
#pragma omp parallel for
    for (int n = 0; n < (dweight ? N : 0); n++) {
        const acc_t *w = plan->weight + (size_t)n * K, *dw = dweight + (size_t)n * K;
        acc_t *dl = dlogits + (size_t)n * K, mean = dot(w, dw, K);
        for (int j = 0; j < K; j++) {
            dl[j] = w[j] * (dw[j] - mean);
        }
    }
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int g = 0; g < groups; g++) {
        for (int j = 0; j < K; j += COLUMNS) {
            softmax_over_tokens_backward(dlogits + j, dmix + j, plan->mix + j, group_at(plan, g), plan->group_tokens, K,
                                         at_most(K - j, COLUMNS));
        }
    }
}

/* sum dl <xhat, phihat>. The logits hold the cosines, unless a scale of 0 has wiped them out. */
static double scale_gradient(const acc_t *dlogits, const acc_t *logits, const acc_t *x_inverse,
                             const acc_t *phi_inverse, const real_t *x, const acc_t *phi, double scale, int N, int K,
                             int C) {
    double partial[CHUNKS], total = 0;
    int rows = (N + CHUNKS - 1) / CHUNKS;
#pragma omp parallel for
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        double sum = 0;
        for (int n = chunk * rows; n < at_most(N, (chunk + 1) * rows); n++) {
            const acc_t *dl = dlogits + (size_t)n * K, *l = logits + (size_t)n * K;
            if (scale != 0) {
                sum += dot(dl, l, K) / scale;
                continue;
            }
            for (int j = 0; j < K; j++) {
                sum += (double)dl[j] * x_inverse[n] * phi_inverse[j] * dot(x + (size_t)n * C, phi + (size_t)j * C, C);
            }
        }
        partial[chunk] = sum;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        total += partial[chunk];
    }
    return total;
}

/* Both directions' gradients are products with the same matrix, a_nj = scale dl_nj / (|x_n| |phi_j|):
 *
 *     dx_n   += sum_j a_nj phi_j - x_n   (sum_j dl_nj l_nj) / |x_n|^2      since <xhat_n, dxhat_n> = sum_j dl_nj l_nj
 *     dphi_j += sum_n a_nj x_n   - phi_j (sum_n dl_nj l_nj) / |phi_j|^2
 *
 * A piece of it (rows, width) is made where it is used and is never stored whole. */
static void route_piece(real_t *a, size_t lda, const acc_t *dlogits, const acc_t *x_inverse, const acc_t *phi_inverse,
                        acc_t scale, int rows, int width, size_t K) {
    for (int i = 0; i < rows; i++) {
        acc_t factor = scale * x_inverse[i];
        for (int j = 0; j < width; j++) {
            a[i * lda + j] = factor * phi_inverse[j] * dlogits[i * K + j];
        }
    }
}

/* v -= u factor */
static void subtract(real_t *v, const real_t *u, acc_t factor, int n) {
    for (int i = 0; i < n; i++) {
        v[i] -= u[i] * factor;
    }
}

void soft_route_backward(real_t *dx, acc_t *dphi, acc_t *dscale, const acc_t *dlogits, const acc_t *logits,
                         const acc_t *x_inverse, const acc_t *phi_inverse, const real_t *x, const acc_t *phi,
                         const acc_t *scale, const Plan *plan, int C, Stream *stream) {
    int N = plan->N, K = plan->K;
    *dscale += (acc_t)scale_gradient(dlogits, logits, x_inverse, phi_inverse, x, phi, *scale, N, K, C);

#pragma omp parallel for schedule(dynamic)
    for (int first = 0; first < N; first += ROUTE_BLOCK) {
        real_t a[ROUTE_BLOCK * TILE_DEPTH];
        int rows = at_most(N - first, ROUTE_BLOCK);
        for (int j = 0; j < K; j += TILE_DEPTH) {
            int width = at_most(K - j, TILE_DEPTH);
            route_piece(a, TILE_DEPTH, dlogits + (size_t)first * K + j, x_inverse + first, phi_inverse + j, *scale,
                        rows, width, K);
            block_multiply(dx + (size_t)first * C, C, a, TILE_DEPTH, 1, phi + (size_t)j * C, C, 1, rows, C, width, 1);
        }
        for (int n = first; n < first + rows; n++) {
            acc_t along = dot(dlogits + (size_t)n * K, logits + (size_t)n * K, K);
            subtract(dx + (size_t)n * C, x + (size_t)n * C, along * x_inverse[n] * x_inverse[n], C);
        }
    }

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int first = 0; first < K; first += ROUTE_BLOCK) {
        for (int c = 0; c < C; c += WIDTH_BLOCK) {
            real_t a[TILE_DEPTH * ROUTE_BLOCK];
            double along[ROUTE_BLOCK] = {0};
            int slots = at_most(K - first, ROUTE_BLOCK), width = at_most(C - c, WIDTH_BLOCK);
            for (int n = 0; n < N; n += TILE_DEPTH) {
                int rows = at_most(N - n, TILE_DEPTH);
                const acc_t *dl = dlogits + (size_t)n * K + first, *l = logits + (size_t)n * K + first;
                route_piece(a, ROUTE_BLOCK, dl, x_inverse + n, phi_inverse + first, *scale, rows, slots, K);
                block_multiply(dphi + (size_t)first * C + c, C, a, 1, ROUTE_BLOCK, x + (size_t)n * C + c, C, 1, slots,
                               width, rows, 1);
                for (int i = 0; i < rows; i++) {
                    for (int j = 0; j < slots; j++) {
                        along[j] += (double)dl[(size_t)i * K + j] * l[(size_t)i * K + j];
                    }
                }
            }
            for (int j = 0; j < slots; j++) {
                size_t at = (size_t)(first + j) * C + c;
                acc_t inverse = phi_inverse[first + j];
                subtract(dphi + at, phi + at, (acc_t)along[j] * inverse * inverse, width);
            }
        }
    }
}

/* ---- the mixtures */

/* A group's slots lie an expert apart. A product that took one expert's at a time would leave most of a register tile
 * empty (S is often 1 to 8), so pieces of SLOT_BLOCK slots are copied to where their rows touch, or from there. */
typedef struct {
    real_t row[SLOT_BLOCK][WIDTH_BLOCK];
} Piece;

/* The row of group g's slot j. */
static size_t slot_row(const Plan *plan, int g, int j) {
    size_t e = j / plan->slots, s = j % plan->slots;
    return (e * groups_of(plan) + g) * plan->slots + s;
}

static void gather_slots(Piece *piece, const real_t *rows, const Plan *plan, int g, int first, int slots, int C,
                         int width) {
    for (int j = 0; j < slots; j++) {
        memcpy(piece->row[j], rows + slot_row(plan, g, first + j) * C, sizeof *rows * width);
    }
}

static void scatter_slots(real_t *rows, const Piece *piece, const Plan *plan, int g, int first, int slots, int C,
                          int width) {
    for (int j = 0; j < slots; j++) {
        memcpy(rows + slot_row(plan, g, first + j) * C, piece->row[j], sizeof *rows * width);
    }
}

/* rows (K,C) of each group = mixture (m,K)^T x (m,C) for its m tokens */
static void slots_from_tokens(real_t *rows, const acc_t *mixture, const real_t *x, const Plan *plan, int C) {
    int groups = groups_of(plan), K = plan->K;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int g = 0; g < groups; g++) {
        for (int j = 0; j < K; j += SLOT_BLOCK) {
            for (int c = 0; c < C; c += WIDTH_BLOCK) {
                Piece piece;
                Group group = group_at(plan, g);
                int slots = at_most(K - j, SLOT_BLOCK), width = at_most(C - c, WIDTH_BLOCK);
                block_multiply(piece.row[0], WIDTH_BLOCK, mixture + group.first * K + j, 1, group.step * K,
                               x + group.first * C + c, group.step * C, 1, slots, width, plan->group_tokens, 0);
                scatter_slots(rows + c, &piece, plan, g, j, slots, C, width);
            }
        }
    }
}

/* x (m,C) of each group = or += mixture (m,K) rows (K,C) */
static void tokens_from_slots(real_t *x, const acc_t *mixture, const real_t *rows, const Plan *plan, int C,
                              int accumulate) {
    int groups = groups_of(plan), tokens = plan->group_tokens, K = plan->K;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int g = 0; g < groups; g++) {
        for (int i = 0; i < tokens; i += TOKEN_BLOCK) {
            for (int c = 0; c < C; c += WIDTH_BLOCK) {
                Piece piece;
                Group group = group_at(plan, g);
                size_t n = group.first + i * group.step;
                int count = at_most(tokens - i, TOKEN_BLOCK), width = at_most(C - c, WIDTH_BLOCK);
                for (int j = 0; j < K; j += SLOT_BLOCK) {
                    int slots = at_most(K - j, SLOT_BLOCK);
                    gather_slots(&piece, rows + c, plan, g, j, slots, C, width);
                    block_multiply(x + n * C + c, group.step * C, mixture + n * K + j, group.step * K, 1, piece.row[0],
                                   WIDTH_BLOCK, 1, count, width, slots, accumulate || j > 0);
                }
            }
        }
    }
}

/* dmixture (m,K) of each group = x (m,C) rows (K,C)^T */
static void mixture_gradient(acc_t *dmixture, const real_t *x, const real_t *rows, const Plan *plan, int C) {
    int groups = groups_of(plan), tokens = plan->group_tokens, K = plan->K;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int g = 0; g < groups; g++) {
        for (int i = 0; i < tokens; i += TOKEN_BLOCK) {
            for (int j = 0; j < K; j += SLOT_BLOCK) {
                Piece piece;
                Group group = group_at(plan, g);
                size_t n = group.first + i * group.step;
                int count = at_most(tokens - i, TOKEN_BLOCK), slots = at_most(K - j, SLOT_BLOCK);
                for (int c = 0; c < C; c += WIDTH_BLOCK) {
                    int width = at_most(C - c, WIDTH_BLOCK);
                    gather_slots(&piece, rows + c, plan, g, j, slots, C, width);
                    block_multiply(dmixture + n * K + j, group.step * K, x + n * C + c, group.step * C, 1, piece.row[0],
                                   1, WIDTH_BLOCK, count, slots, width, c > 0);
                }
            }
        }
    }
}

void soft_dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    slots_from_tokens(rows, plan->mix, x, plan, C);
}

void soft_dispatch_backward(real_t *dx, acc_t *dmix, const real_t *drows, const real_t *x, const Plan *plan, int C,
                            int accumulate, Stream *stream) {
    tokens_from_slots(dx, plan->mix, drows, plan, C, accumulate);
    mixture_gradient(dmix, x, drows, plan, C);
}

void soft_combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream) {
    tokens_from_slots(y, plan->weight, rows, plan, C, accumulate);
}

void soft_combine_backward(real_t *drows, acc_t *dweight, const real_t *dy, const real_t *rows, const Plan *plan, int C,
                           Stream *stream) {
    slots_from_tokens(drows, plan->weight, dy, plan, C);
    mixture_gradient(dweight, dy, rows, plan, C);
}

void soft_expert_share(acc_t *probs, const Plan *plan, Stream *stream) {
    int S = plan->slots;
#pragma omp parallel for
    for (int n = 0; n < plan->N; n++) {
        for (int e = 0; e < plan->E; e++) {
            probs[(size_t)n * plan->E + e] = sum_of(plan->weight + (size_t)n * plan->K + e * S, S);
        }
    }
}
