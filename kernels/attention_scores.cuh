/* What happens to a tile of scores between two matrix products, in the registers that attention_tiles.cuh describes:
 * masks, the softmax that grows tile by tile, and its gradient. Exponentials are powers of 2, exp(x) = 2^(x log2 e),
 * with log2 e in the scale. Rows are queries and columns keys, but for the functions named _transposed, which
 * flash_backward_kv needs. Called by attention_flash.cuh.
 */
#ifndef KERNELS_ATTENTION_SCORES_CUH
#define KERNELS_ATTENTION_SCORES_CUH

#include "attention_tiles.cuh"

#define LOG2_E 1.4426950408889634f

/* The two rows of a thread among the 64 of its warp group: g and g + 8 */
__device__ static inline int thread_row(int r) {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * r;
}

/* Tiles of keys that rows up to last see */
__device__ static inline int tiles_seen(AttentionShape shape, int last) {
    int keys = shape.causal && last < shape.T ? last + 1 : shape.T;
    return (keys + TILE - 1) / TILE;
}

/* Hides the keys of tile i that the thread's rows, counted from `first`, do not see. */
__device__ static inline void hide_keys(float (&s)[TILE / 8][4], AttentionShape shape, int first, int i) {
    if ((i + 1) * TILE <= shape.T && (!shape.causal || (i + 1) * TILE <= first + 1)) {
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first + thread_row(r);
        int last = (shape.causal && row < shape.T ? row : shape.T - 1) - i * TILE - threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            s[j][2 * r] = 8 * j <= last ? s[j][2 * r] : -INFINITY;
            s[j][2 * r + 1] = 8 * j + 1 <= last ? s[j][2 * r + 1] : -INFINITY;
        }
    }
}

/* One tile of scores joins the softmax of the thread's rows: s becomes exp(scale s - largest). What was summed with a
 * smaller maximum is to be multiplied by `shrink`. `sum` is of this thread's columns alone until the end. */
__device__ static inline void softmax_tile(float (&s)[TILE / 8][4], float (&largest)[2], float (&sum)[2],
                                           float (&shrink)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = largest[r];
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            most = fmaxf(most, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        float shift = most * scale, part = 0;
        shrink[r] = exp2_fast((largest[r] - most) * scale);
        largest[r] = most;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            s[j][2 * r] = exp2_fast(s[j][2 * r] * scale - shift);
            s[j][2 * r + 1] = exp2_fast(s[j][2 * r + 1] * scale - shift);
            part += s[j][2 * r] + s[j][2 * r + 1];
        }
        sum[r] = sum[r] * shrink[r] + part;
    }
}

template <int N>
__device__ static inline void scale_rows(float (&o)[N][4], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            o[j][e] *= factor[e / 2];
        }
    }
}

/* P from scores, and dS = P (dP - D) in the place of dP, with row statistics (lse log2 e, D) */
__device__ static inline void score_probabilities(float (&s)[TILE / 8][4], const float2 (&row)[2], float scale) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[j][e] = exp2_fast(s[j][e] * scale - row[e / 2].x);
        }
    }
}

__device__ static inline void score_gradient(float (&ds)[TILE / 8][4], const float (&p)[TILE / 8][4],
                                             const float2 (&row)[2]) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            ds[j][e] = p[j][e] * (ds[j][e] - row[e / 2].y);
        }
    }
}

/* The same for a tile of transposed scores, keys down and queries across, so that the statistics are those of columns.
 * Queries before the key do not see it: `later` is how many rows the tile's first query is behind its first key. */
__device__ static inline void hide_keys_transposed(float (&s)[TILE / 8][4], int later) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int query = 8 * j + threadIdx.x % 4 * 2 + e % 2 + later;
            s[j][e] = query < thread_row(e / 2) ? -INFINITY : s[j][e];
        }
    }
}

__device__ static inline void probabilities_transposed(float (&s)[TILE / 8][4], const float2 *statistics, float scale) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        const float2 *two = statistics + 8 * j + threadIdx.x % 4 * 2;
        float lse[2] = {two[0].x, two[1].x};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[j][e] = exp2_fast(s[j][e] * scale - lse[e % 2]);
        }
    }
}

__device__ static inline void gradient_transposed(float (&ds)[TILE / 8][4], const float (&p)[TILE / 8][4],
                                                  const float2 *statistics) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        const float2 *two = statistics + 8 * j + threadIdx.x % 4 * 2;
        float d[2] = {two[0].y, two[1].y};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            ds[j][e] = p[j][e] * (ds[j][e] - d[e % 2]);
        }
    }
}

#endif
