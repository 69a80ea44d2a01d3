/* The K largest of E values by one warp, in the order of choose.h.
 *
 *     key[e] = choose_key(value[e])            the lanes write, element e by lane e % 32
 *     first  = warp_take(key, E)               again and again: each call takes the first in order of what is left
 *
 * A key is an unsigned number that orders as the values do, so that one instruction finds a warp's largest. Keys lie in
 * shared memory, where no number of experts is too large, and a lane touches its own alone.
 *
 * Read by noisy.cu. Where a token's values fit in registers, token_group.cuh is faster.
 */
#ifndef KERNELS_CHOOSE_CUH
#define KERNELS_CHOOSE_CUH

#include "cuda.cuh"

enum { CHOOSE_TAKEN = 0 }; /* below the key of any value */

/* NaN and minus infinity count as the lowest finite number, -0 as 0. */
__device__ static inline unsigned choose_key(float value) {
    float rank = (value > -FLT_MAX ? value : -FLT_MAX) + 0.0f;
    unsigned bits = __float_as_uint(rank);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The first in order of those left, which is taken out; all lanes call it and get it. E >= 1, and one is left. */
__device__ static inline int warp_take(unsigned *key, int E) {
    const int lane = threadIdx.x % 32;
    unsigned best = CHOOSE_TAKEN;
    int index = 0;
    for (int e = lane; e < E; e += 32) {
        if (key[e] > best) {
            best = key[e];
            index = e;
        }
    }
    const unsigned largest = __reduce_max_sync(0xffffffffu, best);
    const int first = (int)__reduce_min_sync(0xffffffffu, best == largest ? (unsigned)index : 0xffffffffu);
    if (first % 32 == lane) {
        key[first] = CHOOSE_TAKEN;
    }
    return first;
}

#endif
