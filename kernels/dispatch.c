/* Copies by index, a row to a thread. dispatch_copy is both dispatch and the backward of combine; gather_sum is both
 * combine and the backward of dispatch, which differ by the weights. */
#include "dispatch.h"

#include <string.h>

bool dispatch_copies(void) {
    return true;
}

void dispatch_copy(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    int computed = plan->offset[plan->E];
#pragma omp parallel for
    for (int r = 0; r < computed; r++) {
        real_t *to = rows + (size_t)r * C;
        if (plan->entry[r] < 0) {
            memset(to, 0, sizeof(real_t) * C);
        } else {
            memcpy(to, x + (size_t)(plan->entry[r] / plan->K) * C, sizeof(real_t) * C);
        }
    }
}

/* to (C) += sum_j weight[n,j] rows[row[n,j]], a weight of 1 when there are none. */
static void add_rows(real_t *to, const real_t *rows, const acc_t *weight, const Plan *plan, int n, int C) {
    for (int j = n * plan->K; j < (n + 1) * plan->K; j++) {
        if (plan->row[j] < 0) {
            continue;
        }
        const real_t *from = rows + (size_t)plan->row[j] * C;
        real_t w = weight ? weight[j] : 1;
        for (int c = 0; c < C; c++) {
            to[c] += w * from[c];
        }
    }
}

static void gather_sum(real_t *y, const real_t *rows, const acc_t *weight, const Plan *plan, int C, int accumulate) {
#pragma omp parallel for
    for (int n = 0; n < plan->N; n++) {
        real_t *to = y + (size_t)n * C;
        if (!accumulate) {
            memset(to, 0, sizeof(real_t) * C);
        }
        add_rows(to, rows, weight, plan, n, C);
    }
}

RowSource dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    dispatch_copy(rows, x, plan, C, stream);
    return (RowSource){rows, NULL, 0};
}

void dispatch_backward(real_t *dx, const real_t *drows, const Plan *plan, int C, int accumulate, Stream *stream) {
    gather_sum(dx, drows, NULL, plan, C, accumulate);
}

void combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream) {
    gather_sum(y, rows, plan->weight, plan, C, accumulate);
}

RowSource combine_backward(real_t *drows, const real_t *dy, const Plan *plan, int C, Stream *stream) {
    return dispatch_forward(drows, dy, plan, C, stream);
}

void dispatch_put(PeerRows to, const real_t *x, const Plan *plan, int C, Stream *stream) {
    for (int i = 0; i < plan->N * plan->K; i++) {
        if (plan->row[i] >= 0) {
            size_t bytes = sizeof(real_t) * C;
            memcpy(peers_row(&to, plan->row[i], bytes), x + (size_t)(i / plan->K) * C, bytes);
        }
    }
}

void combine_put(PeerRows to, const real_t *rows, const Plan *plan, bool weighted, int C, Stream *stream) {
    for (int n = 0; n < plan->N; n++) {
        real_t *sum = peers_row(&to, n, sizeof(real_t) * C);
        int highest = -1;
        for (int j = n * plan->K; j < (n + 1) * plan->K; j++) {
            highest = plan->row[j] > highest ? plan->row[j] : highest;
        }
        if (highest >= 0) {
            memset(sum, 0, sizeof(real_t) * C);
            add_rows(sum, rows, weighted ? plan->weight : NULL, plan, n, C);
        }
    }
}

void rows_put(RowTarget to, const real_t *rows, const int *offset, int E, int most, int C, Stream *stream) {
    size_t bytes = sizeof(real_t) * C;
#pragma omp parallel for
    for (int r = offset[0]; r < offset[E]; r++) {
        if (to.entry[r] >= 0) {
            memcpy(peers_row(&to.rows, to.entry[r], bytes), rows + (size_t)r * C, bytes);
        }
    }
}
