/* Level 4: a kernel of our own that finds its work on the device: no wait, no padding, one launch.
 *
 * One idea more than level 3: a block asks which tile of which expert it has. The host knows only the number of rows;
 * however they fall to the experts, there are at most rows / 128 + E tiles of 128 rows. It launches that many rows of
 * blocks, and each walks the offsets until its number is reached; the few without a tile return.
 *
 * The product itself is the textbook one for Ampere. A block of eight warps has 128 x 256 of y, a warp 64 x 64, in
 * registers; the inner width goes by in steps of 32. cp.async fetches three steps ahead into a ring in shared memory;
 * ldmatrix takes from there what mma.sync multiplies, one product ahead of its use. The 16-byte chunks of a tile's row
 * are permuted so that ldmatrix meets no bank twice.
 *
 * Expect: what level 2 reaches, or more, and no wait. Below the dense product on Hopper, whose tensor cores reach full
 * speed only by wgmma: mma.sync stops at about 60 % of it. Where N is small against C, the gather takes as long as the
 * product, here as in the levels before. */
#include "../ladder.cuh"

enum {
    ROWS = 128, /* of y to a block */
    COLUMNS = 256,
    DEPTH = 32, /* inner width of a step */
    STEPS = 4,  /* in shared memory */
    THREADS = 256,
    LEFT_BYTES = ROWS * DEPTH * 2,
    STEP_BYTES = LEFT_BYTES + COLUMNS * DEPTH * 2,
    LEFT_CHUNKS = ROWS * 4 / THREADS, /* 16-byte chunks of a step that a thread fetches */
    RIGHT_CHUNKS = COLUMNS * 4 / THREADS,
};

/* rows[r] = x[entry[r] / K]. Grid: a block to a row; its threads take 16 bytes each. */
static __global__ void gather_kernel(int4 *rows, const int4 *x, const int *entry, int K, int packs) {
    const int4 *from = x + (size_t)(entry[blockIdx.x] / K) * packs;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        rows[(size_t)blockIdx.x * packs + i] = from[i];
    }
}

/* Where 16-byte chunk `chunk` (of 4) of row `row` of an operand's tile lies. Two rows fill the 32 banks once. */
__device__ static int place(int row, int chunk) {
    return (row * 4 + (chunk ^ row / 2 % 4)) * 16;
}

/* A thread's share of fetching an operand: the same chunk of every 64th row. Rows past the last are fetched from the
 * last: what comes of them is not stored. */
template <int CHUNKS>
__device__ static void fetch_from(const bf16 *(&from)[CHUNKS], const bf16 *matrix, int first, int end, int C) {
    for (int i = 0; i < CHUNKS; i++) {
        from[i] = matrix + (size_t)min(first + (int)threadIdx.x / 4 + 64 * i, end - 1) * C + threadIdx.x % 4 * 8;
    }
}

/* Starts fetching the next step. */
template <int CHUNKS>
__device__ static void fetch(uint32_t tile, const bf16 *(&from)[CHUNKS]) {
    uint32_t to = tile + place(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 64 * DEPTH * 2), "l"(from[i]));
        from[i] += DEPTH;
    }
}

__device__ static void fetch_step(uint32_t base, int step, int steps, const bf16 *(&left_from)[LEFT_CHUNKS],
                                  const bf16 *(&right_from)[RIGHT_CHUNKS]) {
    if (step < steps) {
        fetch(base + step % STEPS * STEP_BYTES, left_from);
        fetch(base + step % STEPS * STEP_BYTES + LEFT_BYTES, right_from);
    }
    asm volatile("cp.async.commit_group;");
}

/* Waits until the step after the current one has arrived for all, and all are done with the one before. */
__device__ static void next_step(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STEPS - 2) : "memory");
    __syncthreads();
}

/* Four 8 x 8 matrices, of which lane l gives a row's address: matrix l / 8, row l % 8. */
__device__ static void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* sum (16,8) += left (16,16) right (16,8) */
__device__ static void multiply_matrices(float (&sum)[4], const uint32_t (&left)[4], const uint32_t *right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

/* What a warp multiplies at a time: 64 x 16 of the left operand, 16 x 64 of the right. */
typedef struct {
    uint32_t left[4][4], right[4][4];
} Blocks;

/* left and right: where the lane's row of the warp's first matrices lies in the step; k: 0 or 16. Chunks 2 and 3 lie
 * where 0 and 1 do but for one bit, whatever the permutation. */
__device__ static void load_blocks(Blocks &blocks, uint32_t step, int left, int right, int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        load_matrices(blocks.left[i], step + (left ^ k * 2) + i * 16 * DEPTH * 2);
        load_matrices(blocks.right[i], step + LEFT_BYTES + (right ^ k * 2) + i * 16 * DEPTH * 2);
    }
}

__device__ static void multiply_blocks(float (&sum)[4][8][4], const Blocks &blocks) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            multiply_matrices(sum[i][j], blocks.left[i], &blocks.right[j / 2][j % 2 * 2]);
        }
    }
}

/* Of the row tiles of all experts, the one with number `tile`: its expert, E if there is none, and its first row. */
__device__ static int find_tile(int *first, const int *offset, int E, int tile) {
    int e = 0;
    for (; e < E; e++) {
        int tiles = (offset[e + 1] - offset[e] + ROWS - 1) / ROWS;
        if (tile < tiles) {
            break;
        }
        tile -= tiles;
    }
    *first = offset[e] + tile * ROWS;
    return e;
}

/* Grid: x tiles of columns, y tiles of rows, counted through all experts. C is a multiple of 32. */
static __global__ void __launch_bounds__(THREADS, 1)
    product_kernel(bf16 *y, const bf16 *rows, const bf16 *w, const int *offset, int E, int C, int N) {
    extern __shared__ __align__(128) char shared[];
    int first, e = find_tile(&first, offset, E, blockIdx.y);
    if (e == E) {
        return;
    }
    int end = offset[e + 1], column = blockIdx.x * COLUMNS, steps = C / DEPTH;
    const bf16 *left_from[LEFT_CHUNKS], *right_from[RIGHT_CHUNKS];
    fetch_from(left_from, rows, first, end, C);
    fetch_from(right_from, w + (size_t)e * N * C, column, N, C);
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    int lane = threadIdx.x % 32, down = threadIdx.x / 128 * 64, across = threadIdx.x / 32 % 4 * 64;
    int left = place(down + lane % 16, lane / 16), right = place(across + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    float sum[4][8][4] = {};
    Blocks lower, upper;
    int fetched = 0;
    for (; fetched < STEPS - 1; fetched++) {
        fetch_step(base, fetched, steps, left_from, right_from);
    }
    next_step();
    load_blocks(lower, base, left, right, 0);
    for (int step = 0; step < steps; step++, fetched++) {
        load_blocks(upper, base + step % STEPS * STEP_BYTES, left, right, 16);
        fetch_step(base, fetched, steps, left_from, right_from); /* over the step before this one */
        multiply_blocks(sum, lower);
        next_step();
        load_blocks(lower, base + (step + 1) % STEPS * STEP_BYTES, left, right, 0);
        multiply_blocks(sum, upper);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        size_t r = first + down + 8 * i + lane / 4;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int n = column + across + 8 * j + lane % 4 * 2;
            if (r < end && n < N) {
                *(__nv_bfloat162 *)(y + r * N + n) =
                    __floats2bfloat162_rn(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
            }
        }
    }
}

static ProductResult multiply(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    int C = t->C, N = in->N;
    bf16 *rows = (bf16 *)ladder_memory(0, (size_t)t->rows * C * sizeof(bf16));
    bf16 *y = (bf16 *)ladder_memory(1, (size_t)t->rows * N * sizeof(bf16));
    gather_kernel<<<t->rows, 128>>>((int4 *)rows, (const int4 *)t->x, t->entry, t->K, C / 8);
    CUDA(cudaFuncSetAttribute(product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, STEPS * STEP_BYTES));
    dim3 grid((N + COLUMNS - 1) / COLUMNS, t->rows / ROWS + t->E);
    product_kernel<<<grid, THREADS, STEPS * STEP_BYTES>>>(y, rows, in->w, t->offset, t->E, C, N);
    return {y, 0};
}

int main(void) {
    return product_ladder("4 mma grouped", multiply);
}
