/* Number types and the words every file shares.
 *
 * real_t  storage of activations, compute weights and activation gradients
 * acc_t   router probabilities, losses, statistics, master weights, parameter gradients, optimizer state
 *
 * build         real_t   acc_t     selected by
 * CPU           float    float     (default)
 * gradient test double   double    -DREAL_DOUBLE
 * CUDA          bf16     float     -DREAL_BF16
 * CUDA, parity  float    float     (default; PRECISION=fp32)
 *
 * Shape letters used in every comment and parameter list:
 *   B batch, T time, N tokens = B*T, C model width, V vocabulary, L layers, NH query heads, NKV key/value heads, HS
 * head size, E experts, K experts per token, H hidden width of one expert, M dispatched rows.
 */
#ifndef KERNELS_TYPES_H
#define KERNELS_TYPES_H

#include <stddef.h>

#ifdef REAL_DOUBLE
typedef double real_t;
typedef double acc_t;
#define REAL_NAME "double"
#elif defined(REAL_BF16)
#ifdef __CUDACC__
struct __nv_bfloat16; /* of cuda_bf16.h, which cuda.cuh includes */
typedef __nv_bfloat16 real_t;
#else
typedef struct {
    unsigned short bits; /* the upper half of a float: C only passes such numbers on */
} real_t;
#endif
typedef float acc_t;
#define REAL_NAME "bf16"
#else
typedef float real_t;
typedef float acc_t;
#define REAL_NAME "float"
#endif

/* Where work is queued. The CPU runs it at once and takes NULL. */
typedef struct Stream Stream;

#endif
