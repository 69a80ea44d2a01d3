/* Numbers as they are stored (real_t) and as they are computed with (acc_t). Where both types are the same these are
 * copies, or nothing when both arrays are. */
#ifndef KERNELS_CONVERT_H
#define KERNELS_CONVERT_H

#include "types.h"

/* out (count) = in, rounded to the nearest */
void real_from_acc(real_t *out, const acc_t *in, size_t count, Stream *stream);

/* out (count) = in, exact */
void acc_from_real(acc_t *out, const real_t *in, size_t count, Stream *stream);

#endif
