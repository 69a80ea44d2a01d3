/* RMSNorm on the CPU: a row is read, summed and written while it is in the first-level cache.
 *
 * The weights' gradient is a sum over rows. It is taken in a second sweep in which a thread owns a few columns and adds
 * all rows in blocks of ROWS: the bits depend on the shape alone, never on the number of threads, and rounding grows
 * with N / ROWS + ROWS instead of N. Called by model/transformer.c; norms of single heads are in rope.c.
 */
#include "norm.h"

#include "vector.h"

enum { COLUMNS = 32, ROWS = 64 };

void norm_forward(real_t *sum, real_t *y, acc_t *rstd, const real_t *x, const real_t *add, const real_t *w, int N,
                  int C, double eps, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        const real_t *s = x + row;
        if (add) {
            for (int c = 0; c < C; c++) {
                sum[row + c] = x[row + c] + add[row + c];
            }
            s = sum + row;
        }
        acc_t r = (acc_t)(1 / sqrt((double)dot(s, s, C) / C + eps));
        rstd[n] = r;
        for (int c = 0; c < C; c++) {
            y[row + c] = s[c] * r * w[c];
        }
    }
}

/* sum_c dy_c w_c s_c */
static acc_t dot_weighted(const real_t *dy, const real_t *w, const real_t *s, int C) {
    acc_t lane[LANES] = {0};
    int c = 0;
    for (; c + LANES <= C; c += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += dy[c + j] * w[c + j] * s[c + j];
        }
    }
    for (int j = 0; c + j < C; j++) {
        lane[j] += dy[c + j] * w[c + j] * s[c + j];
    }
    return lanes_sum(lane);
}

/* dw_c += sum_n dy_nc s_nc r_n for `width` columns; dw, dy, s point at the first of them. Inlined with a constant
 * width, which keeps the sums of a block in registers. */
static inline __attribute__((always_inline)) void weight_gradient(acc_t *dw, const real_t *dy, const real_t *s,
                                                                  const acc_t *rstd, int N, int C, int width) {
    acc_t total[COLUMNS] = {0};
    for (int begin = 0; begin < N; begin += ROWS) {
        int end = N - begin < ROWS ? N : begin + ROWS;
        acc_t block[COLUMNS] = {0};
        for (int n = begin; n < end; n++) {
            const real_t *dy_row = dy + (size_t)n * C;
            const real_t *s_row = s + (size_t)n * C;
            acc_t r = rstd[n];
            for (int c = 0; c < width; c++) {
                block[c] += dy_row[c] * (s_row[c] * r);
            }
        }
        for (int c = 0; c < width; c++) {
            total[c] += block[c];
        }
    }
    for (int c = 0; c < width; c++) {
        dw[c] += total[c];
    }
}

void norm_backward(real_t *ds, acc_t *dw, const real_t *dy, const real_t *s, const acc_t *rstd, const real_t *w, int N,
                   int C, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        acc_t r = rstd[n];
        acc_t along = r * r * r * dot_weighted(dy + row, w, s + row, C) / C; /* how much of the gradient lies along s */
        for (int c = 0; c < C; c++) {
            ds[row + c] += r * (dy[row + c] * w[c]) - along * s[row + c];
        }
    }
#pragma omp parallel for schedule(static) if (N > 1)
    for (int first = 0; first < C; first += COLUMNS) {
        if (C - first >= COLUMNS) {
            weight_gradient(dw + first, dy + first, s + first, rstd, N, C, COLUMNS);
        } else {
            weight_gradient(dw + first, dy + first, s + first, rstd, N, C, C - first);
        }
    }
}
