/* Rows as they travel between ranks: in fewer bits than they are computed with, if the user wants.
 *
 *     same   as they are stored (real_t)
 *     fp32   4 bytes a number
 *     bf16   2 bytes: 8 bits of exponent, 7 of fraction
 *     fp16   2 bytes: 5 and 10
 *     fp8    1 byte: 4 and 3 (E4M3), and for each row a scale, its |largest| / 448
 *
 * Rounded to the nearest, ties to the even one. What is too large for fp16 becomes infinite. NaN stays NaN, and an
 * infinite number makes its whole row NaN in fp8: neither is lost on the way.
 *
 *     a packed row   | C numbers | .. up to a multiple of 16 bytes; fp8: the scale, a float, in the last 4 of them |
 */
#ifndef KERNELS_WIRE_H
#define KERNELS_WIRE_H

#include "types.h"

typedef enum { WIRE_SAME, WIRE_FP32, WIRE_BF16, WIRE_FP16, WIRE_FP8 } WireType;

/* Bytes of a packed row of C numbers. */
size_t wire_row_bytes(WireType type, int C);

/* packed (rows, wire_row_bytes) from x (rows,C), and back. Not for WIRE_SAME, which needs no packing. */
void wire_pack(void *packed, const real_t *x, WireType type, int rows, int C, Stream *stream);
void wire_unpack(real_t *x, const void *packed, WireType type, int rows, int C, Stream *stream);

#endif
