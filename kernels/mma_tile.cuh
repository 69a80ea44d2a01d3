/* A tile of a matrix product on the tensor cores of Ampere and later: mma.sync m16n8k16 on bf16, fp32 sums, cp.async
 * (mma.cuh).
 *
 * A block of 8 warps owns 128 x 256 elements of a result, a warp 64 x 64 of them (warps 2 x 4), in registers. The
 * summed index is cut into steps of 32. Four steps' operands are in shared memory at a time: while the tensor cores
 * take one, cp.async fetches the third after it, past the registers. Operands lie there as in memory, 16-byte chunks
 * permuted within a row so that the eight addresses of an ldmatrix touch all banks; ldmatrix turns those whose summed
 * index runs across the rows. So one loader and one inner loop serve all five products.
 *
 * Results go through the same shared memory, 128 columns at a time: memory is read and written in whole 16-byte packs,
 * and what the activation needs meets what was summed. Widths are multiples of 8, so a pack is inside or outside.
 *
 * Used by grouped_mma.cuh. Read first: grouped_plain.cuh, which does the same with loops. */
#ifndef KERNELS_MMA_TILE_CUH
#define KERNELS_MMA_TILE_CUH

#include "grouped_tile.cuh"
#include "mma.cuh"

enum {
    MMA_ROWS = 128,
    MMA_COLUMNS = 256,
    MMA_HALF = MMA_COLUMNS / 2, /* columns staged at a time */
    MMA_DEPTH = 32,             /* of a step: a lane of a warp to each, see mma_prepare */
    MMA_STEPS = 4,              /* in shared memory */
    MMA_THREADS = 256,
    MMA_WARPS_ACROSS = MMA_COLUMNS / 64,
    MMA_LEFT = MMA_ROWS * MMA_DEPTH, /* elements of a step's left operand */
    MMA_STEP = MMA_LEFT + MMA_COLUMNS * MMA_DEPTH,
    MMA_STAGED = MMA_ROWS * MMA_HALF, /* elements of a staged half of a result */
    MMA_SHARED_BYTES = MMA_STEPS * MMA_STEP * (int)sizeof(real_t),
};
static_assert(MMA_DEPTH == 32, "a lane to each inner index of a step");
static_assert(3 * MMA_STAGED <= MMA_STEPS * MMA_STEP, "gate, up and h are staged where the operands were");

/* ---- operands ---- */

/* The warp's first row and column of the tile. */
__device__ static inline int mma_warp_down(void) {
    return threadIdx.x / 32 / MMA_WARPS_ACROSS * 64;
}

__device__ static inline int mma_warp_across(void) {
    return threadIdx.x / 32 % MMA_WARPS_ACROSS * 64;
}

/* Chunk `chunk` of row `row` of a tile with CHUNKS 16-byte chunks to a row, in bytes. Two rows of 4 chunks make up all
 * banks, so there the permutation changes every other row. */
template <int CHUNKS>
__device__ static inline int mma_place(int row, int chunk) {
    return (row * CHUNKS + (chunk ^ (CHUNKS == 4 ? row / 2 % 4 : row % 8))) * 16;
}

/* One thread's share of fetching OUTER indices of a matrix with rows of `width` numbers, a step of the inner index at a
 * time, and of reading them back as blocks of 16 x 16.
 *
 * ALONG: inner runs along the rows, and a thread stays with the rows it fetches from. Otherwise inner is the row: a
 * lane looks its index up one step ahead and the warp shares the rows, so that no copy waits for an index. */
template <int OUTER, bool ALONG>
struct MmaOperand {
    enum {
        CHUNKS = ALONG ? MMA_DEPTH / 8 : OUTER / 8, /* of a row of the tile */
        ROWS = MMA_THREADS / CHUNKS,                /* that all threads fetch at once */
        EACH = OUTER * MMA_DEPTH / 8 / MMA_THREADS,
    };
    RowSource rows;
    int width;
    int inner, inner_end;          /* of the step that is to be fetched */
    int found;                     /* across: the entry, or the row, of the lane's inner index; -1: zeros */
    bool inside;                   /* across: the thread's columns exist */
    const real_t *from;            /* across: the thread's column of row 0 */
    const real_t *run[EACH];       /* along: what the thread fetches next */
    int bytes[EACH];               /* along: 16, or 0 for zeros */
    uint32_t to;                   /* where the thread's first chunk lies, from the tile's start */
    uint32_t block[ALONG ? 2 : 4]; /* what its lane reads of the warp's first block: of either 16 deep half (along), of
                                       each of four across */
};

/* The row of the tile that the thread's chunk i is in. */
template <class Operand>
__device__ static inline int mma_row(int i) {
    return threadIdx.x / Operand::CHUNKS + i * Operand::ROWS;
}

/* Along: chunk i of the thread is in row `row` of rows.x, -1: zeros. */
template <int OUTER>
__device__ static inline void mma_set_row(MmaOperand<OUTER, true> &m, int i, int row) {
    m.bytes[i] = row < 0 ? 0 : 16;
    m.run[i] = m.rows.x + (size_t)(row < 0 ? 0 : row) * m.width + m.inner + threadIdx.x % m.CHUNKS * 8;
}

/* Across: looks up the lane's inner index of the step to be fetched. What is found is first used a step later. */
template <int OUTER>
__device__ static inline void mma_prepare(MmaOperand<OUTER, false> &m) {
    int k = m.inner + threadIdx.x % 32;
    m.found = k >= m.inner_end ? -1 : m.rows.entry ? m.rows.entry[k] : k;
}

/* Outer indices from `first` on, those past end - 1 whatever: what comes of them is not stored. The warp reads its 64
 * from warp_outer on. */
template <int OUTER, bool ALONG>
__device__ static inline MmaOperand<OUTER, ALONG> mma_operand(RowSource rows, int width, int first, int end, int inner,
                                                              int inner_end, int warp_outer) {
    MmaOperand<OUTER, ALONG> m;
    int lane = threadIdx.x % 32, chunk = threadIdx.x % m.CHUNKS;
    /* ldmatrix fills a thread's registers in the order of the lanes that give addresses, 8 at a time; mma wants the two
     * inner halves of its right operand in neighbouring registers, those of its left two apart */
    int upper_outer = OUTER == MMA_COLUMNS ? lane / 16 : lane / 8 % 2;
    int upper_inner = OUTER == MMA_COLUMNS ? lane / 8 % 2 : lane / 16;
    m.rows = rows;
    m.width = width;
    m.inner = inner;
    m.inner_end = inner_end;
    m.to = mma_place<m.CHUNKS>(threadIdx.x / m.CHUNKS, chunk);
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < m.EACH; i++) {
            int index = first + mma_row<MmaOperand<OUTER, ALONG>>(i);
            mma_set_row(m, i, source_row(rows, min(index, end - 1)));
        }
        for (int half = 0; half < 2; half++) {
            m.block[half] = mma_place<m.CHUNKS>(warp_outer + upper_outer * 8 + lane % 8, 2 * half + upper_inner);
        }
    } else {
        m.inside = first + chunk * 8 < end;
        m.from = rows.x + first + chunk * 8;
        for (int i = 0; i < 4; i++) {
            m.block[i] = mma_place<m.CHUNKS>(upper_inner * 8 + lane % 8, warp_outer / 8 + 2 * i + upper_outer);
        }
        mma_prepare(m);
    }
    return m;
}

/* Starts fetching the operand's next step into `tile`. Rows of the thread's chunks are ROWS apart, a multiple of what
 * the permutation repeats after. */
template <int OUTER, bool ALONG>
__device__ static inline void mma_fetch(MmaOperand<OUTER, ALONG> &m, uint32_t tile) {
    static_assert(m.ROWS % 8 == 0, "a thread's chunks are permuted alike");
    bool inside = ALONG ? m.inner + (int)threadIdx.x % m.CHUNKS * 8 < m.inner_end : m.inside;
    int lane_row = ALONG ? 0 : m.rows.entry && m.found >= 0 ? m.found / m.rows.K : m.found;
#pragma unroll
    for (int i = 0; i < m.EACH; i++) {
        if constexpr (ALONG) {
            copy_padded(tile + m.to + i * m.ROWS * m.CHUNKS * 16, m.run[i], inside ? m.bytes[i] : 0);
            m.run[i] += MMA_DEPTH;
        } else {
            int row = __shfl_sync(0xffffffffu, lane_row, mma_row<MmaOperand<OUTER, ALONG>>(i));
            copy_padded(tile + m.to + i * m.ROWS * m.CHUNKS * 16, m.from + (size_t)max(row, 0) * m.width,
                        inside && row >= 0 ? 16 : 0);
        }
    }
    m.inner += MMA_DEPTH;
    if constexpr (!ALONG) {
        mma_prepare(m);
    }
}

/* Block i of the warp's four at inner index k (0 or 16) of a step. */
template <int OUTER, bool ALONG>
__device__ static inline void mma_block(uint32_t (&r)[4], const MmaOperand<OUTER, ALONG> &m, uint32_t tile, int i,
                                        int k) {
    if constexpr (ALONG) {
        load_matrices<false>(r, tile + m.block[k / 16] + i * 16 * m.CHUNKS * 16);
    } else {
        load_matrices<true>(r, tile + m.block[i] + k * m.CHUNKS * 16);
    }
}

/* ---- the sum ---- */

/* Of a warp's 64 x 64: sum[i][j] is rows 16 i .. , columns 8 j ..; a thread holds columns 2 t, 2 t + 1 of rows g and
 * g + 8, g = lane / 4, t = lane % 4. */
typedef float MmaSum[4][8][4];

/* What a warp multiplies at a time: 64 x 16 of the left operand, 16 x 64 of the right. */
typedef struct {
    uint32_t left[4][4], right[4][4];
} MmaBlocks;

template <bool LEFT_ALONG, bool RIGHT_ALONG>
__device__ static inline void mma_read(MmaBlocks &blocks, const MmaOperand<MMA_ROWS, LEFT_ALONG> &left,
                                       const MmaOperand<MMA_COLUMNS, RIGHT_ALONG> &right, uint32_t step, int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        mma_block(blocks.left[i], left, step, i, k);
        mma_block(blocks.right[i], right, step + MMA_LEFT * (int)sizeof(real_t), i, k);
    }
}

__device__ static inline void mma_multiply_blocks(MmaSum &sum, const MmaBlocks &blocks) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            mma(sum[i][j], blocks.left[i], blocks.right[j / 2][j % 2 * 2], blocks.right[j / 2][j % 2 * 2 + 1]);
        }
    }
}

/* sum += left * right over the inner index, ascending. Returns when shared memory is free again.
 *
 * Blocks are read from shared memory one product ahead of their use, also across steps: so a step's barrier is passed
 * while its second half is still to be multiplied. */
template <bool LEFT_ALONG, bool RIGHT_ALONG>
__device__ static inline void mma_sum(MmaSum &sum, real_t *shared, MmaOperand<MMA_ROWS, LEFT_ALONG> &left,
                                      MmaOperand<MMA_COLUMNS, RIGHT_ALONG> &right) {
    const int step_bytes = MMA_STEP * (int)sizeof(real_t), left_bytes = MMA_LEFT * (int)sizeof(real_t);
    uint32_t base = shared_address(shared);
    int steps = (left.inner_end - left.inner + MMA_DEPTH - 1) / MMA_DEPTH, fetched = 0;
    for (; fetched < MMA_STEPS - 1; fetched++) {
        if (fetched < steps) {
            mma_fetch(left, base + fetched * step_bytes);
            mma_fetch(right, base + fetched * step_bytes + left_bytes);
        }
        copies_end();
    }
    copies_wait<MMA_STEPS - 2>();
    __syncthreads();
    MmaBlocks lower, upper;
    mma_read(lower, left, right, base, 0);
    for (int step = 0; step < steps; step++, fetched++) {
        mma_read(upper, left, right, base + step % MMA_STEPS * step_bytes, 16);
        if (fetched < steps) { /* over the step before this one: all were done with it at the last barrier */
            uint32_t to = base + fetched % MMA_STEPS * step_bytes;
            mma_fetch(left, to);
            mma_fetch(right, to + left_bytes);
        }
        copies_end();
        mma_multiply_blocks(sum, lower);
        copies_wait<MMA_STEPS - 2>();
        __syncthreads();
        /* past the last step: read, not used */
        mma_read(lower, left, right, base + (step + 1) % MMA_STEPS * step_bytes, 0);
        mma_multiply_blocks(sum, upper);
    }
    copies_wait<0>();
    __syncthreads();
}

/* ---- results, staged in halves ---- */

/* A staged half is 128 columns in whole rows of 128; its chunks are permuted by row. Half p of a tile's 256 columns
 * holds, of each warp's 64, columns 32 p .. 32 p + 31: so all warps have a share in either. */
__device__ static inline int mma_half_column(int staged, int half) {
    return staged / 32 * 64 + half * 32 + staged % 32;
}

/* The thread's first row of the tile, and its first column of a staged half. */
__device__ static inline int mma_thread_row(void) {
    return mma_warp_down() + threadIdx.x % 32 / 4;
}

__device__ static inline int mma_thread_column(void) {
    return mma_warp_across() / 2 + threadIdx.x % 4 * 2;
}

/* The thread's pair in row mma_thread_row() + 8 i and column mma_thread_column() + 8 f, f < 4. Its rows are permuted
 * alike, and f is the last two bits of the chunk. */
__device__ static inline __nv_bfloat162 *mma_staged(real_t *stage, int i, int f) {
    int at = mma_place<MMA_HALF / 8>(mma_thread_row(), mma_thread_column() / 8) + mma_thread_column() % 8 * 2;
    return reinterpret_cast<__nv_bfloat162 *>(reinterpret_cast<char *>(stage) + (at ^ f * 16) + i * 8 * MMA_HALF * 2);
}

/* The columns of a staged half in memory: 128 in a row from `first`, or half `half` of the 256 from `first`. */
typedef struct {
    int width;      /* of a row in memory */
    int first, end; /* columns that exist, from that of the tile's first */
    int half;       /* -1: 128 in a row */
} MmaColumns;

__device__ static inline int mma_column(MmaColumns columns, int staged) {
    return columns.first + (columns.half < 0 ? staged : mma_half_column(staged, columns.half));
}

__device__ static inline void mma_load(real_t *stage, const real_t *from, RowTile rows, MmaColumns columns) {
    for (int i = threadIdx.x; i < MMA_STAGED / 8; i += MMA_THREADS) {
        int row = i / (MMA_HALF / 8), chunk = i % (MMA_HALF / 8), column = mma_column(columns, chunk * 8);
        bool there = rows.first + row < rows.end && column < columns.end;
        const real_t *source = from + (there ? (size_t)(rows.first + row) * columns.width + column : 0);
        copy_16_if(shared_address(stage) + mma_place<MMA_HALF / 8>(row, chunk), source, there);
    }
    copies_end();
}

__device__ static inline void mma_store(real_t *to, const real_t *stage, RowTile rows, MmaColumns columns, int add) {
    for (int i = threadIdx.x; i < MMA_STAGED / 8; i += MMA_THREADS) {
        int row = i / (MMA_HALF / 8), chunk = i % (MMA_HALF / 8), column = mma_column(columns, chunk * 8);
        if (rows.first + row >= rows.end || column >= columns.end) {
            continue;
        }
        real_t *target = to + (size_t)(rows.first + row) * columns.width + column;
        Pack<real_t> pack = load_pack(stage + mma_place<MMA_HALF / 8>(row, chunk) / (int)sizeof(real_t));
        if (add) {
            Pack<real_t> old = load_pack(target);
            for (int j = 0; j < 8; j++) {
                pack.v[j] = to_real<real_t>(to_float(old.v[j]) + to_float(pack.v[j]));
            }
        }
        store_pack(target, pack);
    }
}

#endif
