/* Rows of half precision are moved in packs of 16 bytes, and added up in float. Called by the levels' kernels. */
#ifndef ALLTOALL_PACKS_CUH
#define ALLTOALL_PACKS_CUH

#include <cuda_fp16.h>

typedef __half half;

enum { PACK = 8 /* numbers */ };

typedef struct __align__(16) {
    half at[PACK];
}
Pack;

/* sum (PACK) += weight pack. */
static __device__ inline void add_pack(float *sum, Pack pack, float weight) {
    for (int i = 0; i < PACK; i++) {
        sum[i] += weight * __half2float(pack.at[i]);
    }
}

static __device__ inline Pack scaled_pack(Pack pack, float scale) {
    for (int i = 0; i < PACK; i++) {
        pack.at[i] = __float2half_rn(scale * __half2float(pack.at[i]));
    }
    return pack;
}

static __device__ inline Pack rounded_pack(const float *sum) {
    Pack pack;
    for (int i = 0; i < PACK; i++) {
        pack.at[i] = __float2half_rn(sum[i]);
    }
    return pack;
}

#endif
