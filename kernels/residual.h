/* Sums of residual streams, where no normalisation follows that could do them in passing (norm.h). */
#ifndef KERNELS_RESIDUAL_H
#define KERNELS_RESIDUAL_H

#include "types.h"

/* out = a + b, `count` values each; out may be a or b */
void residual_add(real_t *out, const real_t *a, const real_t *b, size_t count, Stream *stream);

#endif
