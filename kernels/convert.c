/* On the CPU both types are one. */
#include "convert.h"

#include <string.h>

void real_from_acc(real_t *out, const acc_t *in, size_t count, Stream *stream) {
    if (out != in) {
        memcpy(out, in, count * sizeof *out);
    }
}

void acc_from_real(acc_t *out, const real_t *in, size_t count, Stream *stream) {
    if (out != in) {
        memcpy(out, in, count * sizeof *out);
    }
}
