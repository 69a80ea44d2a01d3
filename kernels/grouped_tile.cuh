/* What the paths share: the activations and the last step of a sum along H for all three; which rows a block owns for
 * plain and mma.
 *
 * Rows are cut into tiles per expert, numbered through all experts; only the device knows how many tiles an expert has.
 * The host launches as many blocks as there could be, and those past the last tile return. (A block of the wgmma path
 * takes many tiles and finds them by itself: grouped_wgmma_rows.cuh.) */
#ifndef KERNELS_GROUPED_TILE_CUH
#define KERNELS_GROUPED_TILE_CUH

#include "grouped.cuh"

#define GELU_CUBIC 0.044715f
#define GELU_SLOPE 0.7978845608028654f /* sqrt(2 / pi) */

/* Rows first .. end - 1, at most a tile of them, all of one expert; expert -1: there is no such tile. */
typedef struct {
    int expert, first, end;
} RowTile;

/* No split of `rows` rows among E experts has more tiles of `size` rows. */
static inline int most_row_tiles(ExpertShape shape, int size) {
    return shape.rows / size + shape.E;
}

/* A lane to an expert, 32 at a time: the tile's expert is the first one at which the running count of tiles passes
 * `index`. Every warp finds the same, so nothing is to be shared. */
__device__ static inline RowTile find_row_tile(const int *offset, int E, int size, int index) {
    int lane = threadIdx.x % 32;
    for (int base = 0; base < E; base += 32) {
        int e = base + lane;
        int first = e < E ? offset[e] : 0, end = e < E ? offset[e + 1] : 0;
        int tiles = (end - first + size - 1) / size, through = warp_running_sum(tiles, lane);
        unsigned passed = __ballot_sync(0xffffffffu, index < through);
        if (passed) {
            int owner = __ffs(passed) - 1;
            first = __shfl_sync(0xffffffffu, first + (index - (through - tiles)) * size, owner);
            end = __shfl_sync(0xffffffffu, end, owner);
            return {base + owner, first, min(end, first + size)};
        }
        index -= __shfl_sync(0xffffffffu, through, 31);
    }
    return {-1, 0, 0};
}

/* Where row `row` of a buffer is found in source.x; -1: it is all zero. */
__device__ static inline int source_row(RowSource source, int row) {
    if (!source.entry) {
        return row;
    }
    int entry = source.entry[row];
    return entry < 0 ? -1 : entry / source.K;
}

/* To a few units of the last place of real_t's sums: bf16 does not see the difference, the clock does. */
__device__ static inline float expert_sigmoid(float x) {
#ifdef REAL_BF16
    float exponential, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(-1.4426950408889634f * x)); /* 2^(-x / ln 2) */
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1 + exponential));
    return result;
#else
    return 1 / (1 + expf(-x));
#endif
}

/* tanh(x) = 2 sigmoid(2x) - 1 */
__device__ static inline float gelu_gate(float a) {
    return expert_sigmoid(2 * GELU_SLOPE * (a + GELU_CUBIC * a * a * a));
}

__device__ static inline float swiglu(float gate, float up) {
    return gate * expert_sigmoid(gate) * up;
}

__device__ static inline float gelu(float a) {
    return a * gelu_gate(a);
}

__device__ static inline float silu(float a) {
    return a * expert_sigmoid(a);
}

/* One element of the hidden layer on the way back, as in experts.c: h not yet weighted, da times the weight. */
typedef struct {
    float h, da, da_up; /* da is the gate's for SwiGLU; da_up is SwiGLU's alone */
} HiddenBack;

__device__ static inline HiddenBack swiglu_back(float gate, float up, float wu) {
    float s = expert_sigmoid(gate), silu = gate * s;
    return {silu * up, wu * up * s * (1 + gate * (1 - s)), wu * silu};
}

__device__ static inline HiddenBack gelu_back(float a, float wu) {
    float s = gelu_gate(a);
    float slope = 2 * GELU_SLOPE * (1 + 3 * GELU_CUBIC * a * a);
    return {a * s, wu * (s + a * s * (1 - s) * slope), 0};
}

__device__ static inline HiddenBack silu_back(float a, float wu, float scale) {
    float s = expert_sigmoid(a);
    return {scale * (a * s), wu * scale * s * (1 + a * (1 - s)), 0};
}

/* sum[r] = part[0][r] + part[1][r] + ..., or added to it, part (parts, rows): blocks that own columns of a row leave
 * one part each. A thread to a row; the loop over parts is the tail of the CPU's sum over H. */
static __global__ void sum_parts_kernel(acc_t *sum, const float *part, int parts, int rows, const int *offset, int E,
                                        int add) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r < offset[0] || r >= offset[E]) {
        return;
    }
    float total = 0;
    for (int p = 0; p < parts; p++) {
        total += part[(size_t)p * rows + r];
    }
    sum[r] = add ? sum[r] + total : total;
}

static void sum_parts(acc_t *sum, const float *part, int parts, Grouped g) {
    if (sum && g.shape.rows > 0) {
        sum_parts_kernel<<<ceil_div(g.shape.rows, 256), 256, 0, g.stream>>>(sum, part, parts, g.shape.rows, g.offset,
                                                                            g.shape.E, g.add_parts);
        CUDA_LAUNCHED();
    }
}

#endif
