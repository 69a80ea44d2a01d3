/* Counter-based random numbers: a value is a function of (seed, stream, index) and of nothing else, so that any part of
 * a run can be made again, in any order, on any device, with the same bits.
 *
 * The mixing function is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once per word of the
 * key.
 *
 *     double u = random_uniform(random_key(seed, RANDOM_INIT, tensor), i);
 */
#ifndef KERNELS_RANDOM_H
#define KERNELS_RANDOM_H

#include <math.h>
#include <stdint.h>

/* Kernels draw the same numbers. */
#ifdef __CUDACC__
#define RANDOM_FUNCTION static inline __host__ __device__
#else
#define RANDOM_FUNCTION static inline
#endif

/* One name for each use, so that no two uses share numbers. */
enum {
    RANDOM_INIT = 1,
    RANDOM_TRAIN_DATA,
    RANDOM_VAL_DATA,
    RANDOM_SHUFFLE,
    RANDOM_SAMPLE,
    RANDOM_ROUTER,
    RANDOM_TEST,
    RANDOM_MASK,
};

RANDOM_FUNCTION uint64_t random_mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The key of one stream of numbers. */
RANDOM_FUNCTION uint64_t random_key(uint64_t seed, uint64_t use, uint64_t stream) {
    return random_mix(random_mix(random_mix(seed) ^ use) ^ stream);
}

RANDOM_FUNCTION uint64_t random_bits(uint64_t key, uint64_t index) {
    return random_mix(key ^ random_mix(index));
}

/* Uniform in [0, 1) with 53 random bits. */
RANDOM_FUNCTION double random_uniform(uint64_t key, uint64_t index) {
    return (double)(random_bits(key, index) >> 11) * 0x1.0p-53;
}

/* Uniform integer in [0, n), n >= 1; the bias is below n / 2^64. */
RANDOM_FUNCTION uint64_t random_below(uint64_t key, uint64_t index, uint64_t n) {
    return (uint64_t)(((unsigned __int128)random_bits(key, index) * n) >> 64);
}

/* Standard normal (Box and Muller 1958). */
RANDOM_FUNCTION double random_normal(uint64_t key, uint64_t index) {
    double u = 1.0 - random_uniform(key, 2 * index); /* in (0, 1], so that the logarithm is finite */
    double v = random_uniform(key, 2 * index + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

#endif
