/* The dense products of the soft mixtures, a batch of one for each group of tokens:
 *
 *     out_g (M,N) = A_g (M,depth) B_g (depth,N)        either operand may lie in memory turned
 *
 * Tokens of a group and slots of a group do not lie evenly, so rows are found through a RowMap; columns are dense.
 * There are two kernels, and product_run takes the first where it can:
 *
 *     product_mma_kernel     bf16 on tensor cores (mma.sync, sums in float), widths that are multiples of 8; an operand
 *                            of floats is rounded to bf16 on its way into shared memory
 *     product_plain_kernel   any width and number type, sums in float
 *
 * An element is summed by one thread over the depth in ascending order, and tiles depend on no other extent: the same
 * bits in any batch. Included by soft_mix.cu alone.
 */
#ifndef KERNELS_SOFT_PRODUCT_CUH
#define KERNELS_SOFT_PRODUCT_CUH

#include <limits.h>

#include "mma.cuh"

/* Row i of group g lies at g*group + i/run*outer + i%run*step. */
typedef struct {
    int run;
    size_t group, outer, step;
} RowMap;

__device__ static inline size_t row_at(RowMap map, int g, int i) {
    return g * map.group + i / map.run * map.outer + i % map.run * map.step;
}

template <class T>
struct Operand {
    const T *p;
    int width; /* of a row */
    RowMap rows;
};

/* out = or += sum * (*scale row_factor[i] col_factor[j]) - self[i,j] self_factor[i]; what is NULL takes no part. The
 * factors are for a batch of one group. */
template <class T>
struct Result {
    T *p;
    int width;
    RowMap rows;
    int accumulate = 0;
    const float *scale = NULL, *row_factor = NULL, *col_factor = NULL;
    const T *self = NULL;
    const float *self_factor = NULL;
};

struct ProductShape {
    int M, N, depth, groups;
    int total = 0;    /* depth of all groups together, where the last one's may be less; 0: all are equal */
    int planes = 1;   /* B is the sum of so many arrays, */
    size_t plane = 0; /* that many numbers apart */
};

enum { PRODUCT_THREADS = 256 };

/* Where a block works. */
typedef struct {
    int group, row, col, depth;
} Tile;

__device__ static inline Tile tile_at(ProductShape s, int rows, int cols) {
    const unsigned across = (s.N + cols - 1) / cols, down = (s.M + rows - 1) / rows;
    const int group = blockIdx.x / across / down;
    const int depth = s.total ? min(s.depth, s.total - group * s.depth) : s.depth;
    return {group, (int)(blockIdx.x / across % down) * rows, (int)(blockIdx.x % across) * cols, depth};
}

static inline int tile_count(ProductShape s, int rows, int cols) {
    return ceil_div(s.N, cols) * ceil_div(s.M, rows) * s.groups;
}

template <class T>
__device__ static inline T result_value(const Result<T> &out, size_t at, int i, int j, float sum) {
    if (out.scale) {
        sum *= *out.scale * out.row_factor[i] * out.col_factor[j];
    }
    if (out.self) {
        sum -= to_float(out.self[at]) * out.self_factor[i];
    }
    return to_real<T>(out.accumulate ? to_float(out.p[at]) + sum : sum);
}

/* ---- any width, any number ---- */

enum { PLAIN_TILE = 64, PLAIN_DEPTH = 16 };

/* tile (PLAIN_DEPTH,PLAIN_TILE) = the part of an operand from `first` of its outer extent and `k` of the depth on, 0
 * outside. DEPTH_ROWS: the operand's rows are the depth. Neighbouring threads read neighbours in a row. */
template <bool DEPTH_ROWS, class T>
__device__ static inline void load_plain(float (*tile)[PLAIN_TILE + 1], const Operand<T> &from, int group, int first,
                                         int extent, int k, int depth) {
    for (int i = threadIdx.x; i < PLAIN_DEPTH * PLAIN_TILE; i += PRODUCT_THREADS) {
        const int d = DEPTH_ROWS ? i / PLAIN_TILE : i % PLAIN_DEPTH, o = DEPTH_ROWS ? i % PLAIN_TILE : i / PLAIN_DEPTH;
        const bool inside = k + d < depth && first + o < extent;
        const int row = DEPTH_ROWS ? k + d : first + o, col = DEPTH_ROWS ? first + o : k + d;
        tile[d][o] = inside ? to_float(from.p[row_at(from.rows, group, row) * from.width + col]) : 0;
    }
}

/* The grid replaces the loops over groups and over blocks of their results; a thread has 4 x 4 elements, 16 apart. */
template <bool A_TURNED, bool B_TURNED, class TA, class TB, class Out>
__global__ static void __launch_bounds__(PRODUCT_THREADS)
    product_plain_kernel(Result<Out> out, Operand<TA> a, Operand<TB> b, ProductShape s) {
    __shared__ float tile_a[PLAIN_DEPTH][PLAIN_TILE + 1], tile_b[PLAIN_DEPTH][PLAIN_TILE + 1];
    const Tile at = tile_at(s, PLAIN_TILE, PLAIN_TILE);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float sum[4][4] = {};
    for (int plane = 0; plane < s.planes; plane++, b.p += s.plane) {
        for (int k = 0; k < at.depth; k += PLAIN_DEPTH) {
            load_plain<A_TURNED>(tile_a, a, at.group, at.row, s.M, k, at.depth);
            load_plain<!B_TURNED>(tile_b, b, at.group, at.col, s.N, k, at.depth);
            __syncthreads();
#pragma unroll
            for (int d = 0; d < PLAIN_DEPTH; d++) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    sum[i / 4][i % 4] += tile_a[d][y + i / 4 * 16] * tile_b[d][x + i % 4 * 16];
                }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int row = at.row + y + i / 4 * 16, col = at.col + x + i % 4 * 16;
        if (row < s.M && col < s.N) {
            const size_t place = row_at(out.rows, at.group, row) * out.width + col;
            out.p[place] = result_value(out, place, row, col, sum[i / 4][i % 4]);
        }
    }
}

/* ---- bf16 on tensor cores ---- */

enum {
    MMA_TILE = 128, /* rows and columns of a block's result */
    MMA_DEPTH = 32,
    WARP_ROWS = 64, /* of a warp's part of it: 2 x 4 warps */
    WARP_COLS = 32,
    STAGES = 4,
    PACK = 8,                               /* numbers that move together */
    PACKS = MMA_TILE * MMA_DEPTH / PACK,    /* of a tile of an operand */
    PACKS_EACH = PACKS / PRODUCT_THREADS,   /* of a thread */
    OUTER_STRIDE = MMA_DEPTH + PACK,        /* of a tile whose rows are the outer extent, */
    DEPTH_STRIDE = MMA_TILE + PACK,         /* and of one whose rows are the depth: the 8 rows that one */
    TILE_NUMBERS = MMA_TILE * OUTER_STRIDE, /* instruction reads then lie in different banks */
};

/* Pack i of a tile: its row and the first of its columns there. */
template <bool DEPTH_ROWS>
__device__ static inline int pack_row(int i) {
    return i / ((DEPTH_ROWS ? MMA_TILE : MMA_DEPTH) / PACK);
}
template <bool DEPTH_ROWS>
__device__ static inline int pack_col(int i) {
    return i % ((DEPTH_ROWS ? MMA_TILE : MMA_DEPTH) / PACK) * PACK;
}
template <bool DEPTH_ROWS>
__device__ static inline int pack_place(int i) {
    return pack_row<DEPTH_ROWS>(i) * (DEPTH_ROWS ? DEPTH_STRIDE : OUTER_STRIDE) + pack_col<DEPTH_ROWS>(i);
}

/* Where a pack of this thread lies in memory. It moves on by MMA_DEPTH of the depth at a time, without a division for
 * each pack, which would take longer than the products: `past` is how many rows of its run come before its own. */
template <class T>
struct Cursor {
    const T *p;
    int past;
};

/* The way of a cursor where the rows are the depth, in numbers; `carry` more when the run ends. */
typedef struct {
    int past, run;
    size_t step, carry;
} Stride;

template <class T>
__device__ static inline Stride stride_of(const Operand<T> &from) {
    const RowMap map = from.rows;
    const int past = MMA_DEPTH % map.run;
    return {past, map.run, (MMA_DEPTH / map.run * map.outer + past * map.step) * from.width,
            (map.outer - map.run * map.step) * from.width};
}

/* To the tile that begins at `first` of the outer extent and 0 of the depth. */
template <bool DEPTH_ROWS, class T>
__device__ static inline void start_tile(Cursor<T> (&cursor)[PACKS_EACH], const Operand<T> &from, int group,
                                         int first) {
#pragma unroll
    for (int p = 0; p < PACKS_EACH; p++) {
        const int i = threadIdx.x + p * PRODUCT_THREADS;
        const int row = pack_row<DEPTH_ROWS>(i) + (DEPTH_ROWS ? 0 : first);
        const int col = pack_col<DEPTH_ROWS>(i) + (DEPTH_ROWS ? first : 0);
        cursor[p] = {from.p + row_at(from.rows, group, row) * from.width + col, row % from.rows.run};
    }
}

template <bool DEPTH_ROWS, class T>
__device__ static inline void move_on(Cursor<T> &cursor, Stride stride) {
    if (!DEPTH_ROWS) {
        cursor.p += MMA_DEPTH;
        return;
    }
    cursor.p += stride.step;
    cursor.past += stride.past;
    if (cursor.past >= stride.run) {
        cursor.past -= stride.run;
        cursor.p += stride.carry;
    }
}

/* Whether pack p of the tile at `first` and k lies in the operand. */
template <bool DEPTH_ROWS>
__device__ static inline bool pack_inside(int p, int first, int extent, int k, int depth) {
    const int i = threadIdx.x + p * PRODUCT_THREADS;
    const int outer = first + (DEPTH_ROWS ? pack_col<true>(i) : pack_row<false>(i));
    const int inner = k + (DEPTH_ROWS ? pack_row<true>(i) : pack_col<false>(i));
    return outer < extent && inner < depth;
}

/* Sends a tile on its way into shared memory. */
template <bool DEPTH_ROWS>
__device__ static inline void fetch_tile(__nv_bfloat16 *tile, Cursor<__nv_bfloat16> (&cursor)[PACKS_EACH],
                                         const Operand<__nv_bfloat16> &from, Stride stride, int first, int extent,
                                         int k, int depth) {
#pragma unroll
    for (int p = 0; p < PACKS_EACH; p++) {
        const bool inside = pack_inside<DEPTH_ROWS>(p, first, extent, k, depth);
        const __nv_bfloat16 *to = tile + pack_place<DEPTH_ROWS>(threadIdx.x + p * PRODUCT_THREADS);
        copy_16_if(shared_address(to), inside ? cursor[p].p : from.p, inside);
        move_on<DEPTH_ROWS>(cursor[p], stride);
    }
}

/* A tile of floats waits in registers, to be rounded into shared memory. */
typedef float TileFloats[PACKS_EACH][PACK];

template <bool DEPTH_ROWS>
__device__ static inline void load_tile(TileFloats &pack, Cursor<float> (&cursor)[PACKS_EACH], Stride stride, int first,
                                        int extent, int k, int depth) {
#pragma unroll
    for (int p = 0; p < PACKS_EACH; p++) {
        const bool inside = pack_inside<DEPTH_ROWS>(p, first, extent, k, depth);
#pragma unroll
        for (int half = 0; half < PACK; half += 4) {
            const Pack<float> four = inside ? load_pack(cursor[p].p + half) : Pack<float>{};
#pragma unroll
            for (int q = 0; q < 4; q++) {
                pack[p][half + q] = four.v[q];
            }
        }
        move_on<DEPTH_ROWS>(cursor[p], stride);
    }
}

template <bool DEPTH_ROWS>
__device__ static inline void store_tile(__nv_bfloat16 *tile, const TileFloats &pack) {
#pragma unroll
    for (int p = 0; p < PACKS_EACH; p++) {
        Pack<__nv_bfloat16> rounded;
#pragma unroll
        for (int q = 0; q < PACK; q++) {
            rounded.v[q] = __float2bfloat16(pack[p][q]);
        }
        store_pack(tile + pack_place<DEPTH_ROWS>(threadIdx.x + p * PRODUCT_THREADS), rounded);
    }
}

/* Four 8 x 8 matrices of a tile, 16 of the outer extent by 16 of the depth, as the tensor cores want them. For A the
 * second matrix is the next 8 of the outer extent, for B (OUTER_LAST) the next 8 of the depth. */
template <bool DEPTH_ROWS, bool OUTER_LAST>
__device__ static inline void load_blocks(uint32_t (&to)[4], const __nv_bfloat16 *tile, int outer, int k) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const int outer_half = OUTER_LAST ? matrix / 2 : matrix % 2, k_half = OUTER_LAST ? matrix % 2 : matrix / 2;
    outer += outer_half * 8 + (DEPTH_ROWS ? 0 : lane % 8);
    k += k_half * 8 + (DEPTH_ROWS ? lane % 8 : 0);
    load_matrices<DEPTH_ROWS>(
        to, shared_address(tile + (DEPTH_ROWS ? k * DEPTH_STRIDE + outer : outer * OUTER_STRIDE + k)));
}

/* sum[i][j] is the warp's 16 x 8 piece (i, j). */
typedef float WarpSum[WARP_ROWS / 16][WARP_COLS / 8][4];

template <bool A_TURNED, bool B_TURNED>
__device__ static inline void multiply_tiles(WarpSum &sum, const __nv_bfloat16 *tile_a, const __nv_bfloat16 *tile_b,
                                             int row, int col) {
#pragma unroll
    for (int k = 0; k < MMA_DEPTH; k += 16) {
        uint32_t b[WARP_COLS / 16][4];
#pragma unroll
        for (int j = 0; j < WARP_COLS / 16; j++) {
            load_blocks<!B_TURNED, true>(b[j], tile_b, col + j * 16, k);
        }
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; i++) {
            uint32_t a[4];
            load_blocks<A_TURNED, false>(a, tile_a, row + i * 16, k);
#pragma unroll
            for (int j = 0; j < WARP_COLS / 8; j++) {
                mma(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

template <class T>
struct alignas(2 * sizeof(T)) Two {
    T v[2];
};

/* A lane has two neighbours in each 8 rows of a piece. */
template <class Out>
__device__ static inline void store_sums(const Result<Out> &out, const WarpSum &sum, ProductShape s, int group, int row,
                                         int col) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < WARP_ROWS / 8; half++) {
        const int i = row + half * 8 + lane / 4;
        if (i >= s.M) {
            continue;
        }
        const size_t start = row_at(out.rows, group, i) * out.width;
#pragma unroll
        for (int piece = 0; piece < WARP_COLS / 8; piece++) {
            const int j = col + piece * 8 + lane % 4 * 2;
            if (j < s.N) {
                const float *pair = &sum[half / 2][piece][half % 2 * 2];
                *reinterpret_cast<Two<Out> *>(out.p + start + j) = {
                    {result_value(out, start + j, i, j, pair[0]), result_value(out, start + j + 1, i, j + 1, pair[1])}};
            }
        }
    }
}

/* The grid replaces the loops over groups and over blocks of their results, warps are parts of a block. A ring of
 * STAGES pairs of tiles lies in shared memory: while one is multiplied, the others are on their way; a tile of floats
 * comes through registers, one step ahead. */
template <bool A_TURNED, bool B_TURNED, class TA, class Out>
__global__ static void __launch_bounds__(PRODUCT_THREADS, 2)
    product_mma_kernel(Result<Out> out, Operand<TA> a, Operand<__nv_bfloat16> b, ProductShape s) {
    extern __shared__ __align__(16) __nv_bfloat16 ring[][2][TILE_NUMBERS]; /* (STAGES), of A and of B */
    constexpr bool FLOATS = sizeof(TA) == sizeof(float);
    const Tile at = tile_at(s, MMA_TILE, MMA_TILE);
    const int warp = threadIdx.x / 32, row = warp / 4 * WARP_ROWS, col = warp % 4 * WARP_COLS;
    const int steps = (at.depth + MMA_DEPTH - 1) / MMA_DEPTH, all_steps = steps * s.planes;
    const Stride stride_a = stride_of(a), stride_b = stride_of(b);
    Cursor<TA> cursor_a[PACKS_EACH];
    Cursor<__nv_bfloat16> cursor_b[PACKS_EACH];
    start_tile<A_TURNED>(cursor_a, a, at.group, at.row);
    start_tile<!B_TURNED>(cursor_b, b, at.group, at.col);
    WarpSum sum = {};
    TileFloats floats;
    for (int step = 1 - STAGES, next = 0, k = 0; step < all_steps; step++, next++) {
        copies_wait<STAGES - 2>();
        __syncthreads(); /* this step's tiles are there, and the place of the last step's is free */
        if (next < all_steps) {
            fetch_tile<!B_TURNED>(ring[next % STAGES][1], cursor_b, b, stride_b, at.col, s.N, k, at.depth);
            if constexpr (!FLOATS) {
                fetch_tile<A_TURNED>(ring[next % STAGES][0], cursor_a, a, stride_a, at.row, s.M, k, at.depth);
            }
            k += MMA_DEPTH;
            if (k >= at.depth) { /* the next plane of B, and A once more */
                k = 0;
                b.p += s.plane;
                start_tile<!B_TURNED>(cursor_b, b, at.group, at.col);
                if constexpr (!FLOATS) {
                    start_tile<A_TURNED>(cursor_a, a, at.group, at.row);
                }
            }
        }
        copies_end();
        const bool floats_next = FLOATS && step + 1 >= 0 && step + 1 < steps;
        if constexpr (FLOATS) {
            if (floats_next) {
                load_tile<A_TURNED>(floats, cursor_a, stride_a, at.row, s.M, (step + 1) * MMA_DEPTH, at.depth);
            }
        }
        if (step >= 0) {
            multiply_tiles<A_TURNED, B_TURNED>(sum, ring[step % STAGES][0], ring[step % STAGES][1], row, col);
        }
        if (floats_next) {
            store_tile<A_TURNED>(ring[(step + 1) % STAGES][0], floats);
        }
    }
    store_sums(out, sum, s, at.group, at.row + row, at.col + col);
}

/* ---- the choice ---- */

template <class T>
static inline bool eights_fit(const T *p, int width) {
    return width % PACK == 0 && packs_fit(p, width);
}

template <bool A_TURNED, bool B_TURNED, class TA, class Out>
static inline void product_mma(Result<Out> out, Operand<TA> a, Operand<__nv_bfloat16> b, ProductShape s,
                               cudaStream_t stream) {
    const int bytes = STAGES * 2 * TILE_NUMBERS * (int)sizeof(__nv_bfloat16);
    const auto kernel = product_mma_kernel<A_TURNED, B_TURNED, TA, Out>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<tile_count(s, MMA_TILE, MMA_TILE), PRODUCT_THREADS, bytes, stream>>>(out, a, b, s);
    CUDA_LAUNCHED();
}

template <bool A_TURNED, bool B_TURNED, class TA, class TB, class Out>
static inline void product_run(Result<Out> out, Operand<TA> a, Operand<TB> b, ProductShape s, cudaStream_t stream) {
    if constexpr (sizeof(TB) == sizeof(__nv_bfloat16)) {
        if (eights_fit(a.p, a.width) && eights_fit(b.p, b.width) && eights_fit(out.p, out.width)) {
            product_mma<A_TURNED, B_TURNED>(out, a, b, s, stream);
            return;
        }
    }
    product_plain_kernel<A_TURNED, B_TURNED>
        <<<tile_count(s, PLAIN_TILE, PLAIN_TILE), PRODUCT_THREADS, 0, stream>>>(out, a, b, s);
    CUDA_LAUNCHED();
}

#endif
