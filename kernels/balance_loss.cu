/* Sums over tokens in one launch each: a block per slice of the tokens writes its sums to `partial`, the block that
 * ends last adds those of all slices in their order. How many slices there are depends on the shape alone, so the same
 * numbers give the same bits on any card. Sums are double; what is added is float.
 *
 * A group of lanes takes a token (token_group.cuh) and keeps, for the experts that are its own, the sums over its
 * tokens in registers; groups of a block are added by a tree.
 *
 * Called by model/moe.c and the routers. Read token_group.cuh and last_block.cuh first.
 */
#include "cuda.cuh"

#include "last_block.cuh"
#include "token_group.cuh"
extern "C" {
#include "balance_loss.h"
}

enum {
    SUM_BLOCKS = 128,   /* slices of the sums over tokens, at most: each leaves E of them */
    NORM_BLOCKS = 1024, /* slices of a sum of squares, at most: each leaves one */
    NORM_THREADS = 256,
    PER_THREAD = 16,      /* values that a thread of a sum of squares takes, at least */
    TOKENS_PER_GROUP = 2, /* tokens that a group takes, at least */
};

__device__ static unsigned ticket; /* of is_last_block: the kernels here follow each other */

/* Threads of a block that sums: fewer where a thread holds more. */
__host__ __device__ constexpr int sum_threads(int per) {
    return per <= 4 ? 1024 : 512;
}

/* -p ln p; 0 at p = 0, NaN stays NaN */
__device__ static float entropy_term(float p) {
    return p > 0 ? -p * logf(p) : p;
}

/* What both kinds of sums take. */
typedef struct {
    float *load, *mean_prob;
    double *partial; /* (E+2, blocks): the sums of p, then two more */
    const float *probs, *lse;
    const int *demand;
    int N, E, K;
    bool packed;
} TokenSums;

/* Where the tokens of a slice begin; they end where the next slice's begin. */
__device__ static int slice_start(int N, int slice) {
    return (int)((int64_t)N * slice / gridDim.x);
}

/* What a block found beside the sums of p. */
__device__ static void write_partials(TokenSums s, double first, double second) {
    first = block_sum(first);
    second = block_sum(second);
    if (threadIdx.x == 0) {
        s.partial[(size_t)s.E * gridDim.x + blockIdx.x] = first;
        s.partial[(size_t)(s.E + 1) * gridDim.x + blockIdx.x] = second;
    }
}

enum { AT_ONCE = 4, SLICES_PER_LANE = SUM_BLOCKS / 32 };

/* A warp adds all slices of AT_ONCE columns: lane i gets the sum of column first + i. The loads go together. */
__device__ static double add_columns(const double *partial, int first, int columns) {
    int lane = threadIdx.x % 32;
    double part[AT_ONCE][SLICES_PER_LANE], mine = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
        for (int k = 0; k < SLICES_PER_LANE; k++) {
            unsigned slice = lane + 32 * k;
            bool there = first + i < columns && slice < gridDim.x;
            part[i][k] = there ? partial[(size_t)(first + i) * gridDim.x + slice] : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        double sum = 0;
#pragma unroll
        for (int k = 0; k < SLICES_PER_LANE; k++) {
            sum += part[i][k];
        }
        sum = warp_sum(sum);
        mine = lane == i ? sum : mine;
    }
    return mine;
}

/* By the last block: P, and the figures. A warp takes AT_ONCE columns at a time, a lane each in the end. */
template <bool MEASURE>
__device__ static void finish_sums(TokenSums s) {
    __shared__ double beside[2]; /* what write_partials left */
    double over_experts = 0;     /* demand P, or the terms of the entropy of P */
    int lane = threadIdx.x % 32;
    for (int first = threadIdx.x / 32 * AT_ONCE; first < s.E + 2; first += blockDim.x / 32 * AT_ONCE) {
        int column = first + lane;
        bool expert = lane < AT_ONCE && column < s.E;
        int demand = !MEASURE && expert ? s.demand[column] : 0;
        double mean = add_columns(s.partial, first, s.E + 2) / s.N;
        if (expert) {
            s.mean_prob[column] = (float)mean;
            over_experts += MEASURE ? entropy_term((float)mean) : (double)demand * (float)mean;
        } else if (lane < AT_ONCE && column < s.E + 2) {
            beside[column - s.E] = mean;
        }
    }
    over_experts = block_sum(over_experts);
    if (threadIdx.x == 0 && MEASURE) {
        s.load[LOAD_ENTROPY] = (float)beside[0];
        s.load[LOAD_MEAN_ENTROPY] = (float)over_experts;
        s.load[LOAD_MARGIN] = (float)beside[1];
    } else if (threadIdx.x == 0) {
        s.load[LOAD_BALANCE] = (float)(s.E * over_experts / ((double)s.K * s.N));
        s.load[LOAD_Z] = (float)beside[0];
    }
}

/* The K-th largest less the next; NaN where NaN leaves fewer (its rank is below 0). p is used up. */
template <int LANES, int PER>
__device__ static float choice_margin(float (&p)[PER], int E, int K, int lane) {
    if (K >= E) {
        return 0;
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        p[i] = expert_of<LANES>(lane, i) < E ? choose_rank(p[i]) : -INFINITY;
    }
    float value = 0, next = 0;
    for (int j = 0; j <= K; j++) {
        value = next;
        next = take_first<LANES>(p, lane, 0xffffffffu).rank;
    }
    return next < 0 ? NAN : value - next;
}

/* Adds the groups' sums of a block and writes them as its slice, up to eight experts of a lane at a time: each column's
 * groups are shared out to several threads, whose sums a tree adds. */
template <int LANES, int PER>
__device__ static void write_columns(TokenSums s, const double (&sum)[PER]) {
    enum { THREADS = sum_threads(PER), HELD = PER < 8 ? PER : 8, COLUMNS = LANES * HELD, ROW = THREADS + LANES };
    __shared__ double held[HELD * ROW], part_sum[THREADS];
    int column = threadIdx.x % COLUMNS, lane = column % LANES, part = threadIdx.x / COLUMNS;
#pragma unroll
    for (int i = 0; i < PER; i += HELD) {
        __syncthreads();
        for (int k = 0; k < HELD; k++) {
            held[k * ROW + threadIdx.x] = sum[i + k];
        }
        __syncthreads();
        double total = 0;
        for (int thread = part * LANES + lane; thread < THREADS; thread += THREADS / HELD) {
            total += held[column / LANES * ROW + thread];
        }
        part_sum[threadIdx.x] = total;
        for (int half = THREADS / 2; half >= COLUMNS; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) {
                part_sum[threadIdx.x] += part_sum[threadIdx.x + half];
            }
        }
        int e = expert_of<LANES>(lane, i + column / LANES);
        if (part == 0 && e < s.E) {
            s.partial[(size_t)e * gridDim.x + blockIdx.x] = part_sum[threadIdx.x];
        }
    }
}

/* The loops over tokens: blocks replace the chunks, groups of LANES threads the tokens of one, lanes the experts. The
 * next token's row is on its way while one is worked on. */
template <int LANES, int PER, bool MEASURE>
__global__ static void __launch_bounds__(sum_threads(PER)) token_sums_kernel(TokenSums s) {
    enum { GROUPS = sum_threads(PER) / LANES };
    int lane = threadIdx.x % LANES, last = slice_start(s.N, blockIdx.x + 1);
    int start = slice_start(s.N, blockIdx.x), n = start + threadIdx.x / LANES;
    double sum[PER] = {}, first = 0, second = 0;
    float p[PER], ahead[PER];
    load_experts<LANES>(ahead, s.probs + (size_t)n * s.E, n < last ? s.E : 0, lane, s.packed, 0.0f);
    for (; start < last; start += GROUPS, n += GROUPS) { /* all lanes of a warp go round as often */
#pragma unroll
        for (int i = 0; i < PER; i++) {
            p[i] = ahead[i];
            sum[i] += p[i];
        }
        int next = n + GROUPS;
        load_experts<LANES>(ahead, s.probs + (size_t)next * s.E, next < last ? s.E : 0, lane, s.packed, 0.0f);
        if (MEASURE) {
#pragma unroll
            for (int i = 0; i < PER; i++) {
                first += entropy_term(p[i]);
            }
            float margin = choice_margin<LANES>(p, s.E, s.K, lane);
            second += n < last && lane == 0 ? margin : 0.0f;
        } else if (n < last && lane == 0) {
            first += (double)s.lse[n] * s.lse[n];
        }
    }
    write_columns<LANES>(s, sum);
    write_partials(s, first, second);
    if (is_last_block(&ticket)) {
        finish_sums<MEASURE>(s);
    }
}

/* The same for any number of experts: threads replace the loop over experts, then warps the one over tokens. */
template <bool MEASURE>
__global__ static void __launch_bounds__(1024) token_sums_sweep_kernel(TokenSums s) {
    int start = slice_start(s.N, blockIdx.x), last = slice_start(s.N, blockIdx.x + 1);
    double first = 0, second = 0;
    for (int e = threadIdx.x; e < s.E; e += blockDim.x) {
        double sum = 0;
        for (int n = start; n < last; n++) {
            float p = s.probs[(size_t)n * s.E + e];
            sum += p;
            first += MEASURE ? entropy_term(p) : 0.0f;
        }
        s.partial[(size_t)e * gridDim.x + blockIdx.x] = sum;
    }
    for (int n = start + threadIdx.x / 32; n < last; n += blockDim.x / 32) {
        if (MEASURE && s.K < s.E) {
            Choice kept = {INFINITY, -1}, next = kept;
            for (int j = 0; j <= s.K; j++) {
                kept = next;
                next = next_first(s.probs + (size_t)n * s.E, s.E, next);
            }
            second += threadIdx.x % 32 > 0 ? 0.0f : next.rank < 0 ? NAN : kept.rank - next.rank;
        } else if (!MEASURE && threadIdx.x % 32 == 0) {
            first += (double)s.lse[n] * s.lse[n];
        }
    }
    write_partials(s, first, second);
    if (is_last_block(&ticket)) {
        finish_sums<MEASURE>(s);
    }
}

/* At least one, which has a result to write even of nothing. */
static int slices(int64_t things, int64_t per_slice, int most) {
    int64_t count = (things + per_slice - 1) / per_slice;
    return (int)(count < 1 ? 1 : count < most ? count : most);
}

template <bool MEASURE>
static void token_sums(TokenSums s, cudaStream_t stream) {
    s.packed = packs_fit(s.probs, s.E);
    s.partial = (double *)cuda_workspace((s.E + 2) * (size_t)SUM_BLOCKS * sizeof(double));
    if (s.E > MOST_IN_REGISTERS) {
        token_sums_sweep_kernel<MEASURE><<<slices(s.N, 32, SUM_BLOCKS), 1024, 0, stream>>>(s);
    } else {
        WITH_LANES(
            s.E, 8,
            token_sums_kernel<LANES, PER, MEASURE>
            <<<slices(s.N, TOKENS_PER_GROUP * sum_threads(PER) / LANES, SUM_BLOCKS), sum_threads(PER), 0, stream>>>(s));
    }
    CUDA_LAUNCHED();
}

void balance_forward(acc_t *load, acc_t *mean_prob, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                     int E, int K, Stream *stream) {
    token_sums<false>({load, mean_prob, NULL, probs, lse, demand, N, E, K, false}, cuda_stream(stream));
}

/* The root of the sum of all blocks' squares to *norm. partial (gridDim.x) */
__device__ static void finish_norm(float *norm, double *partial, double square) {
    if (grid_sum(&square, partial, square, &ticket) && threadIdx.x == 0) {
        *norm = (float)sqrt(square);
    }
}

/* The coefficients of balance_backward. */
typedef struct {
    float share, aux, z; /* f_e = demand_e * share */
} BalanceScale;

/* The loop over tokens: a group of LANES threads each, a thread its experts. */
template <int LANES, int PER>
__global__ static void __launch_bounds__(NORM_THREADS)
    balance_backward_kernel(float *dlogits, float *load, double *partial, const float *probs, const float *lse,
                            const int *demand, int N, int E, BalanceScale scale, bool packed) {
    enum { GROUPS = NORM_THREADS / LANES };
    int lane = threadIdx.x % LANES;
    float f[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int e = expert_of<LANES>(lane, i);
        f[i] = e < E ? demand[e] * scale.share : 0.0f;
    }
    double square = 0;
    for (int start = blockIdx.x * GROUPS; start < N; start += gridDim.x * GROUPS) { /* warps stay together */
        int n = start + threadIdx.x / LANES, there = n < N ? E : 0;
        float p[PER], dl[PER], mean = 0;
        load_experts<LANES>(p, probs + (size_t)n * E, there, lane, packed, 0.0f);
        load_experts<LANES>(dl, dlogits + (size_t)n * E, there, lane, packed, 0.0f);
        float pull = n < N ? scale.z * lse[n] : 0.0f;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            mean += f[i] * p[i];
        }
        mean = group_sum<LANES>(mean, 0xffffffffu);
#pragma unroll
        for (int i = 0; i < PER; i++) {
            float slope = scale.aux * (f[i] - mean);
            dl[i] += p[i] * (slope + pull);
            double balance = (double)p[i] * slope;
            square += balance * balance;
        }
        store_experts<LANES>(dlogits + (size_t)n * E, dl, there, lane, packed);
    }
    finish_norm(load + LOAD_BALANCE_GRADIENT, partial, square);
}

/* The same for any number of experts, a warp per token. */
__global__ static void __launch_bounds__(NORM_THREADS)
    balance_backward_sweep_kernel(float *dlogits, float *load, double *partial, const float *probs, const float *lse,
                                  const int *demand, int N, int E, BalanceScale scale) {
    double square = 0;
    int warps = NORM_THREADS / 32, lane = threadIdx.x % 32;
    for (int n = blockIdx.x * warps + threadIdx.x / 32; n < N; n += gridDim.x * warps) {
        const float *p = probs + (size_t)n * E;
        float *dl = dlogits + (size_t)n * E, mean = 0;
        for (int e = lane; e < E; e += 32) {
            mean += demand[e] * scale.share * p[e];
        }
        mean = warp_sum(mean);
        for (int e = lane; e < E; e += 32) {
            float slope = scale.aux * (demand[e] * scale.share - mean);
            dl[e] += p[e] * (slope + scale.z * lse[n]);
            double balance = (double)p[e] * slope;
            square += balance * balance;
        }
    }
    finish_norm(load + LOAD_BALANCE_GRADIENT, partial, square);
}

void balance_backward(acc_t *dlogits, acc_t *load, const acc_t *probs, const acc_t *lse, const int *demand, int N,
                      int E, int K, double aux_scale, double z_scale, Stream *stream) {
    BalanceScale scale = {(float)(1 / ((double)K * N)), (float)(aux_scale * E / N), (float)(2 * z_scale / N)};
    bool packed = packs_fit(probs, E) && packs_fit(dlogits, E);
    double *partial = (double *)cuda_workspace(NORM_BLOCKS * sizeof(double));
    if (E > MOST_IN_REGISTERS) {
        balance_backward_sweep_kernel<<<slices(N, NORM_THREADS / 32, NORM_BLOCKS), NORM_THREADS, 0,
                                        cuda_stream(stream)>>>(dlogits, load, partial, probs, lse, demand, N, E, scale);
    } else {
        WITH_LANES(E, 8,
                   balance_backward_kernel<LANES, PER>
                   <<<slices(N, NORM_THREADS / LANES, NORM_BLOCKS), NORM_THREADS, 0, cuda_stream(stream)>>>(
                       dlogits, load, partial, probs, lse, demand, N, E, scale, packed));
    }
    CUDA_LAUNCHED();
}

/* The loop over values: threads take packs of four in turns, and the first block what is left. */
__global__ static void __launch_bounds__(NORM_THREADS)
    gradient_measure_kernel(float *load, double *partial, const float *dlogits, size_t packs, size_t count) {
    double square = 0;
    size_t step = (size_t)gridDim.x * NORM_THREADS, i = (size_t)blockIdx.x * NORM_THREADS + threadIdx.x;
#pragma unroll 4
    for (; i < packs; i += step) {
        Pack<float> four = load_pack(dlogits + 4 * i);
        for (int k = 0; k < 4; k++) {
            square += (double)four.v[k] * four.v[k];
        }
    }
    for (i = 4 * packs + (size_t)blockIdx.x * NORM_THREADS + threadIdx.x; i < count; i += step) {
        square += (double)dlogits[i] * dlogits[i];
    }
    finish_norm(load + LOAD_MAIN_GRADIENT, partial, square);
}

void gradient_measure(acc_t *load, const acc_t *dlogits, size_t count, Stream *stream) {
    double *partial = (double *)cuda_workspace(NORM_BLOCKS * sizeof(double));
    int blocks = slices(count, NORM_THREADS * PER_THREAD, NORM_BLOCKS);
    gradient_measure_kernel<<<blocks, NORM_THREADS, 0, cuda_stream(stream)>>>(
        load, partial, dlogits, packs_fit(dlogits, 4) ? count / 4 : 0, count);
    CUDA_LAUNCHED();
}

void probs_measure(acc_t *load, acc_t *mean_prob, const acc_t *probs, int N, int E, int K, Stream *stream) {
    token_sums<true>({load, mean_prob, NULL, probs, NULL, NULL, N, E, K, false}, cuda_stream(stream));
}

/* a / b as a share, 0 of nothing */
__device__ static float share_of(double a, double b) {
    return (float)(b > 0 ? a / b : 0);
}

/* The loop over tokens, a thread each; the last block adds the blocks' counts and replaces the loop over experts. All
 * are whole numbers far below 2^53, so the sums are exact. partial (gridDim.x) */
__global__ static void __launch_bounds__(NORM_THREADS)
    plan_measure_kernel(float *load, double *partial, const int *row, const int *demand, const int *count,
                        const int *offset, int N, int E, int K) {
    double rowless = 0, wanted = 0, placed = 0;
    for (int n = blockIdx.x * NORM_THREADS + threadIdx.x; n < N; n += gridDim.x * NORM_THREADS) {
        int highest = -1;
#pragma unroll 8
        for (int j = 0; j < K; j++) {
            highest = max(highest, row[(size_t)n * K + j]);
        }
        rowless += highest < 0;
    }
    if (!grid_sum(&rowless, partial, rowless, &ticket)) {
        return;
    }
    for (int e = threadIdx.x; e < E; e += NORM_THREADS) {
        wanted += demand[e];
        placed += count[e];
    }
    wanted = block_sum(wanted);
    placed = block_sum(placed);
    if (threadIdx.x == 0) {
        double computed = offset[E];
        load[LOAD_DROPPED] = share_of(wanted - placed, wanted);
        load[LOAD_TOKENS_DROPPED] = share_of(rowless, N);
        load[LOAD_PADDING] = share_of(computed - placed, computed);
    }
}

void plan_measure(acc_t *load, const Plan *plan, Stream *stream) {
    int N = plan->N, E = plan->E;
    if (plan->slots > 0) { /* nothing is dropped or padded: as if there were no tokens and no experts, offset[0] is 0 */
        N = E = 0;
    }
    int blocks = slices(N, NORM_THREADS, NORM_BLOCKS);
    double *partial = (double *)cuda_workspace(NORM_BLOCKS * sizeof(double));
    plan_measure_kernel<<<blocks, NORM_THREADS, 0, cuda_stream(stream)>>>(load, partial, plan->row, plan->demand,
                                                                          plan->count, plan->offset, N, E, plan->K);
    CUDA_LAUNCHED();
}
