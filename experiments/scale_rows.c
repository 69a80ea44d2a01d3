/* See scale_rows.h. */
#include "scale_rows.h"

void scale_rows(real_t *out, acc_t *used, RowSource rows, const acc_t *weight, const acc_t *scale, const int *offset,
                int experts, int C, Stream *stream) {
    for (int e = 0; e < experts; e++) {
#pragma omp parallel for
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            const real_t *from = rows.x + (size_t)(rows.entry ? rows.entry[r] / rows.K : r) * C;
            real_t factor = scale[e] * (weight ? weight[r] : 1);
            for (int c = 0; c < C; c++) {
                out[(size_t)r * C + c] = factor * from[c];
            }
            if (used) {
                used[r] = scale[e];
            }
        }
    }
}
