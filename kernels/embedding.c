/* Token embedding on the CPU: forward copies one row of w per token.
 *
 * Backward adds rows of dx that share a token into one row of dw. A thread owns columns, not tokens: it walks all n in
 * order, so every element of dw has one owner and one order of additions whatever the number of threads, and a frequent
 * token (the space of a text) unbalances nothing. Called by model/transformer.c.
 */
#include "embedding.h"

#include <string.h>

enum { COLUMNS = 32 }; /* of dw that one loop iteration owns */

void embedding_forward(real_t *x, const int *tokens, const real_t *w, int N, int C, Stream *stream) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        memcpy(x + (size_t)n * C, w + (size_t)tokens[n] * C, (size_t)C * sizeof *x);
    }
}

void embedding_backward(acc_t *dw, const real_t *dx, const int *tokens, int N, int C, int V, Stream *stream) {
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += COLUMNS) {
        int width = C - first < COLUMNS ? C - first : COLUMNS;
        for (int n = 0; n < N; n++) {
            acc_t *out = dw + (size_t)tokens[n] * C + first;
            const real_t *in = dx + (size_t)n * C + first;
            for (int c = 0; c < width; c++) {
                out[c] += in[c];
            }
        }
    }
}
