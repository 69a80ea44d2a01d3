/* Tiles of flash attention: 64 rows of one head of bf16 in shared memory, and the two matrix products that run on them.
 *
 *     multiply_nt    S (64,64) = A B^T      A, B tiles of 64 rows
 *     multiply_nn    O (64,HS) += P B       P in registers, B a tile
 *
 * A warp group (4 warps) owns the 64 rows of S and O, a warp 16 of them, in the layout that all matrix instructions
 * share: with g = lane / 4, t = lane % 4, element [j][e] of a thread is row 16 * warp + g + 8 * (e / 2), column
 * 8 * j + 2 * t + e % 2. Two neighbours in j are, rounded and packed, the left operand of the next product: that is why
 * the softmax between two products never leaves the registers.
 *
 * A tile lies in panels of 64 columns, which are swizzled tiles as wgmma.cuh describes them. The code for sm_90a
 * multiplies them in place, that for other targets reads them by ldmatrix and multiplies by mma.sync (mma.cuh).
 *
 * Tiles are loaded by the tensor copy engine (TMA) for sm_90a, which one thread asks for and a barrier in shared memory
 * reports, and elsewhere by all threads with cp.async: await_tiles stands for either, and a __syncthreads() follows.
 * Products are queued: registers that they read or write are left alone from multiply_ to products_wait.
 * Read next: attention_scores.cuh.
 */
#ifndef KERNELS_ATTENTION_TILES_CUH
#define KERNELS_ATTENTION_TILES_CUH

#include "wgmma.cuh"

extern "C" {
#include "attention.h"
}

enum {
    TILE = 64, /* rows of a tile, and columns of a panel */
    PANEL_BYTES = TILE * 64 * 2,
    GROUP_THREADS = 128, /* a warp group */
};

__host__ __device__ constexpr int tile_bytes(int HS) {
    return (HS + 63) / 64 * PANEL_BYTES;
}

/* ---- moving tiles ---- */

/* The address of 8 numbers from column `col`, a multiple of 8, on. */
__device__ static inline uint32_t tile_address(uint32_t tile, int row, int col) {
    return swizzled(tile + col / 64 * PANEL_BYTES, row, col % 64 / 8);
}

/* The rows of one head of one sequence in a matrix (B*T, heads*HS) */
typedef struct {
    const CUtensorMap *map;
    const __nv_bfloat16 *from;
    size_t stride;
    int head, b, T, HS;
} HeadRows;

__device__ static inline HeadRows head_rows(const CUtensorMap *map, const __nv_bfloat16 *matrix, int heads, int head,
                                            int b, AttentionShape shape) {
    HeadRows rows = {
        map,     matrix + ((size_t)b * shape.T * heads + head) * shape.HS, (size_t)heads * shape.HS, head, b, shape.T,
        shape.HS};
    return rows;
}

#ifdef HOPPER_CODE

__device__ static inline void barriers_init(uint32_t barriers, int count) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < count; i++) {
            barrier_init(barriers + 8 * i, 1);
        }
        barrier_init_fence();
    }
    __syncthreads();
}

/* Announces what the loads that follow will bring; a phase of the barrier ends with the last byte. */
__device__ static inline void expect_bytes(uint32_t barrier, int bytes) {
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, bytes);
    }
}

/* The use-th wait on this barrier */
__device__ static inline void await_tiles(uint32_t barrier, int use) {
    barrier_wait(barrier, use & 1);
}

/* Queues the load of 64 rows from `row` on; rows past the end and columns past the head arrive as zeros. */
template <int HS>
__device__ static inline void load_tile(uint32_t tile, HeadRows rows, int row, uint32_t barrier) {
    if (threadIdx.x == 0) {
        for (int col = 0; col < HS; col += 64) {
            copy_box(tile + col / 64 * PANEL_BYTES, rows.map, col, rows.head, row, rows.b, barrier);
        }
    }
}

/* 64 pairs of numbers, 512 bytes */
__device__ static inline void load_pairs(uint32_t to, const float2 *from, uint32_t barrier) {
    if (threadIdx.x == 0) {
        copy_run(to, from, TILE * sizeof(float2), barrier);
    }
}

#else

__device__ static inline void barriers_init(uint32_t barriers, int count) {
}

__device__ static inline void expect_bytes(uint32_t barrier, int bytes) {
}

__device__ static inline void await_tiles(uint32_t barrier, int use) {
    copies_wait_all();
}

template <int HS>
__device__ static inline void load_tile(uint32_t tile, HeadRows rows, int first, uint32_t barrier) {
    constexpr int CHUNKS = HS / 8;
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += GROUP_THREADS) {
        int row = i / CHUNKS, col = i % CHUNKS * 8;
        bool there = first + row < rows.T && col < rows.HS;
        const __nv_bfloat16 *from = rows.from + (first + row) * rows.stride + col;
        copy_16_if(tile_address(tile, row, col), there ? from : rows.from, there);
    }
}

__device__ static inline void load_pairs(uint32_t to, const float2 *from, uint32_t barrier) {
    if (threadIdx.x < TILE / 2) {
        copy_16(to + threadIdx.x * 16, from + threadIdx.x * 2);
    }
}

#endif

/* How the copy engine sees a matrix (B*T, heads*HS): 64 columns of one head in 64 rows of one sequence at a time */
static CUtensorMap head_map(const __nv_bfloat16 *matrix, int heads, AttentionShape shape) {
    CUtensorMap map = {};
    if (cuda_capability() < 90) {
        return map;
    }
    int extent[4] = {shape.HS, heads, shape.T, shape.B}, box[4] = {64, 1, TILE, 1};
    return tensor_map(matrix, sizeof(__nv_bfloat16), 4, extent, box, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

__device__ static inline uint32_t pack_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Writes factor[r] * o, r = 0, 1 for the thread's two rows, to rows of `to`: through the warp's rows of a tile that
 * nobody reads any more, so that memory sees whole rows. */
template <int HS>
__device__ static inline void store_rows(__nv_bfloat16 *to, size_t stride, const float (&o)[HS / 8][4],
                                         const float (&factor)[2], uint32_t tile, int rows, int HS_real) {
    constexpr int CHUNKS = HS / 8;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t pair = pack_pair(o[j][2 * r] * factor[r], o[j][2 * r + 1] * factor[r]);
            uint32_t at = tile_address(tile, first + lane / 4 + 8 * r, 8 * j) + lane % 4 * 4;
            store_4(at, pair);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int row = first + i / CHUNKS, col = i % CHUNKS * 8;
        uint4 chunk = load_16(tile_address(tile, row, col));
        if (row < rows && col < HS_real) {
            *reinterpret_cast<uint4 *>(to + row * stride + col) = chunk;
        }
    }
    __syncwarp();
}

/* S as the left operand of multiply_nn */
__device__ static inline void pack_left(uint32_t (&p)[TILE / 16][4], const float (&s)[TILE / 8][4]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[k][i] = pack_pair(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
        }
    }
}

/* ---- products ---- */

#ifdef HOPPER_CODE

/* The sums as wgmma.cuh counts them */
template <int N>
__device__ static inline float (&in_a_row(float (&sum)[N][4]))[4 * N] {
    return reinterpret_cast<float(&)[4 * N]>(sum);
}

__device__ static inline void products_begin(void) {
    wgmma_begin();
}

__device__ static inline void products_end(void) {
    wgmma_commit();
}

/* Until at most PENDING groups of products are on their way */
template <int PENDING>
__device__ static inline void products_wait(void) {
    wgmma_wait<PENDING>();
}

/* Tells the compiler that the registers change here: it must not move their use across a wait. */
template <int N>
__device__ static inline void settle(float (&x)[N][4]) {
    wgmma_settle(in_a_row(x));
}

template <int HS>
__device__ static inline void multiply_nt(float (&s)[TILE / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        int at = k / 4 * PANEL_BYTES + k % 4 * 32;
        wgmma<0, 0>(in_a_row(s), tile_description(a, at), tile_description(b, at), k > 0);
    }
}

template <int HS>
__device__ static inline void multiply_nn(float (&o)[HS / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        wgmma<1>(in_a_row(o), p[k], tile_description(b, k * 16 * 128));
    }
}

#else

__device__ static inline void products_begin(void) {
}
__device__ static inline void products_end(void) {
}
template <int PENDING>
__device__ static inline void products_wait(void) {
}
template <int N>
__device__ static inline void settle(float (&x)[N][4]) {
}

template <int HS>
__device__ static inline void multiply_nt(float (&s)[TILE / 8][4], uint32_t a, uint32_t b) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
    }
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t left[4], right[4];
        load_matrices<false>(left, tile_address(a, first + lane % 16, k * 16 + lane / 16 * 8));
#pragma unroll
        for (int j = 0; j < TILE / 8; j += 2) {
            int row = j * 8 + lane % 8 + lane / 16 * 8;
            load_matrices<false>(right, tile_address(b, row, k * 16 + lane / 8 % 2 * 8));
            mma(s[j], left, right[0], right[1]);
            mma(s[j + 1], left, right[2], right[3]);
        }
    }
}

template <int HS>
__device__ static inline void multiply_nn(float (&o)[HS / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
        for (int j = 0; j < HS / 8; j += 2) {
            uint32_t right[4];
            load_matrices<true>(right, tile_address(b, k * 16 + lane % 16, j * 8 + lane / 16 * 8));
            mma(o[j], p[k], right[0], right[1]);
            mma(o[j + 1], p[k], right[2], right[3]);
        }
    }
}

#endif

#endif
