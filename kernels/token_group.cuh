/* The values of a token's experts, spread over a group of lanes, and the largest of them in the order of choose.h.
 *
 * LANES = 1, 2, 4 .. 32 neighbouring lanes of a warp work on one token: the fewer, the fewer steps it takes them to
 * agree on the largest. Of each token a lane holds PER values, four neighbours at a time:
 *
 *     x[i] on lane l belongs to expert (i / 4 * LANES + l) * 4 + i % 4
 *
 * which is one 16-byte access per four values. How many lanes and how many values depends on E alone (WITH_LANES), so a
 * sum over the experts has one order whatever the batch is. More than MOST_IN_REGISTERS experts are swept in memory by
 * a whole warp.
 *
 * Read by topk.cu, sigmoid_topk.cu and balance_loss.cu.
 */
#ifndef KERNELS_TOKEN_GROUP_CUH
#define KERNELS_TOKEN_GROUP_CUH

#include "cuda.cuh"

enum { MOST_IN_REGISTERS = 512 };

/* Runs the statements with LANES and PER as constants that suit E <= MOST_IN_REGISTERS experts. MOST (4, 8 or 16)
 * bounds PER where that many lanes can hold E: many values are for work in which lanes must agree often. */
#define WITH_LANES(E, MOST, ...)                        \
    do {                                                \
        if ((E) <= 4) {                                 \
            WITH_CONSTANTS(4, 1, MOST, __VA_ARGS__);    \
        } else if ((E) <= 8) {                          \
            WITH_CONSTANTS(8, 2, MOST, __VA_ARGS__);    \
        } else if ((E) <= 16) {                         \
            WITH_CONSTANTS(16, 2, MOST, __VA_ARGS__);   \
        } else if ((E) <= 32) {                         \
            WITH_CONSTANTS(32, 4, MOST, __VA_ARGS__);   \
        } else if ((E) <= 64) {                         \
            WITH_CONSTANTS(64, 4, MOST, __VA_ARGS__);   \
        } else if ((E) <= 128) {                        \
            WITH_CONSTANTS(128, 8, MOST, __VA_ARGS__);  \
        } else if ((E) <= 256) {                        \
            WITH_CONSTANTS(256, 16, MOST, __VA_ARGS__); \
        } else {                                        \
            WITH_CONSTANTS(512, 32, MOST, __VA_ARGS__); \
        }                                               \
    } while (0)

/* FEWEST lanes hold E experts, or more of them fewer values each, 32 at most. */
#define WITH_CONSTANTS(E, FEWEST, MOST, ...)                   \
    do {                                                       \
        constexpr int FULL = (E) / (FEWEST);                   \
        constexpr int HELD = FULL < (MOST) ? FULL : (MOST);    \
        constexpr int PER = HELD * 32 < (E) ? (E) / 32 : HELD; \
        [[maybe_unused]] constexpr int LANES = (E) / PER;      \
        __VA_ARGS__;                                           \
    } while (0)

template <int LANES>
__device__ static inline int expert_of(int lane, int i) {
    return (i / 4 * LANES + lane) * 4 + i % 4;
}

/* x = the token's values, `absent` past the last expert. packed: rows of E values can be moved 16 bytes at a time. That
 * question comes first, so that all loads leave before any is waited for. */
template <int LANES, int PER>
__device__ static inline void load_experts(float (&x)[PER], const float *row, int E, int lane, bool packed,
                                           float absent) {
    if (packed) {
        Pack<float> four[PER / 4];
#pragma unroll
        for (int i = 0; i < PER; i += 4) {
            four[i / 4] = {{absent, absent, absent, absent}};
            if (expert_of<LANES>(lane, i) < E) {
                four[i / 4] = load_pack(row + expert_of<LANES>(lane, i));
            }
        }
#pragma unroll
        for (int i = 0; i < PER; i++) {
            x[i] = four[i / 4].v[i % 4];
        }
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            int e = expert_of<LANES>(lane, i);
            x[i] = e < E ? row[e] : absent;
        }
    }
}

template <int LANES, int PER>
__device__ static inline void store_experts(float *row, const float (&x)[PER], int E, int lane, bool packed) {
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
        int e = expert_of<LANES>(lane, i);
        if (packed && e < E) {
            store_pack(row + e, Pack<float>{{x[i], x[i + 1], x[i + 2], x[i + 3]}});
        }
        for (int k = 0; k < 4; k++) {
            if (!packed && e + k < E) {
                row[e + k] = x[i + k];
            }
        }
    }
}

/* Sum and largest over a group, in all its lanes. `lanes`: those of the warp that call. */
template <int LANES>
__device__ static inline float group_sum(float x, unsigned lanes) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(lanes, x, lane);
    }
    return x;
}

template <int LANES>
__device__ static inline float group_max(float x, unsigned lanes) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        x = fmaxf(x, __shfl_xor_sync(lanes, x, lane));
    }
    return x;
}

/* NaN and minus infinity count as the lowest finite number: all that is there stands above what is not, -INFINITY. */
__device__ static inline float choose_rank(float value) {
    return value > -FLT_MAX ? value : -FLT_MAX;
}

typedef struct {
    float rank;
    int expert;
} Choice;

__device__ static inline bool comes_before(Choice a, Choice b) {
    return a.rank > b.rank || (a.rank == b.rank && a.expert < b.expert);
}

/* The first of the lanes' candidates, in all lanes of the group. */
template <int LANES>
__device__ static inline Choice group_first(Choice mine, unsigned lanes) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        Choice other;
        other.rank = __shfl_xor_sync(lanes, mine.rank, lane);
        other.expert = __shfl_xor_sync(lanes, mine.expert, lane);
        mine = comes_before(other, mine) ? other : mine;
    }
    return mine;
}

/* The first of the ranks that are left, which leaves with it. */
template <int LANES, int PER>
__device__ static inline Choice take_first(float (&rank)[PER], int lane, unsigned lanes) {
    Choice mine = {rank[0], expert_of<LANES>(lane, 0)};
#pragma unroll
    for (int i = 1; i < PER; i++) { /* experts ascend with i: equal ones stay with the lower */
        if (rank[i] > mine.rank) {
            mine.rank = rank[i];
            mine.expert = expert_of<LANES>(lane, i);
        }
    }
    Choice first = group_first<LANES>(mine, lanes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        rank[i] = first.expert == expert_of<LANES>(lane, i) ? -INFINITY : rank[i];
    }
    return first;
}

/* The first that comes after `last` of any number of values in memory, by a whole warp. */
__device__ static inline Choice next_first(const float *value, int E, Choice last) {
    Choice mine = {-INFINITY, E};
    for (int e = threadIdx.x % 32; e < E; e += 32) {
        Choice candidate = {choose_rank(value[e]), e};
        if (comes_before(last, candidate) && comes_before(candidate, mine)) {
            mine = candidate;
        }
    }
    return group_first<32>(mine, 0xffffffffu);
}

#endif
