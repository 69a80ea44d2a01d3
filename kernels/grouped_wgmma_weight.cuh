/* The weight gradient, dW_e += left_e^T right_e, by the same ring. The inner width is the expert's rows, 64 of them a
 * stage, and both operands lie "across":
 *
 *     A    64 rows x 128 columns of left           two boxes of 64 columns, one for each multiplying group
 *     B    64 rows x 128 or 256 columns of right   boxes of 64 columns
 *     then, when the rows are done                 boxes of 32 floats x 128 rows of dW
 *
 * An expert's last stage of rows reaches past its end. What is fetched by index is zero there. What TMA brings are
 * rows of the next expert, or of nobody, which may hold NaN, and NaN times zero is NaN: the multiplying groups
 * overwrite them with zeros before they use them. Both groups clear B: they write the same zeros, and neither waits for
 * the other.
 *
 * Every element of dW has one owner, which adds its sum once: the same bits every run.
 * Read first: grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_WEIGHT_CUH
#define KERNELS_GROUPED_WGMMA_WEIGHT_CUH

#include "wgmma_ring.cuh"

typedef struct {
    RowSource left, right;
    acc_t *dw;         /* (E,M,N) */
    const int *offset; /* (E+1) */
    int E, M, N;
} WeightProduct;

/* Rows first .. end - 1 of an expert; rows m.., columns n.. of its dW. */
typedef struct {
    int expert, first, end, m, n;
} WeightTile;

/* Tile `id`; false past the last. */
template <int COLUMNS>
__device__ static inline bool find_weight_tile(WeightTile *tile, int id, const WeightProduct &p) {
    int down = (p.M + WGMMA_ROWS - 1) / WGMMA_ROWS, across = (p.N + COLUMNS - 1) / COLUMNS;
    int e = id / (down * across);
    if (e >= p.E) {
        return false;
    }
    id -= e * down * across;
    int band = id / (BAND * across), in_band = id - band * BAND * across;
    int height = min((int)BAND, down - band * BAND);
    tile->expert = e;
    tile->first = p.offset[e];
    tile->end = p.offset[e + 1];
    tile->m = (band * BAND + in_band % height) * WGMMA_ROWS;
    tile->n = in_band / height * COLUMNS;
    return true;
}

/* 64 rows of an operand by index, columns from `column` on. A warp copies ROWS rows, COLUMNS / 8 neighbouring pieces of
 * one or two rows at a time; its lane i (and i + ROWS, ...) knows where row i is found. A tile begins at a multiple of
 * 1024 bytes, so the swizzle of row i is an exclusive or with the address itself. */
template <int COLUMNS>
__device__ static inline void copy_rows(uint32_t to, const real_t *x, int width, int column, uint32_t from) {
    enum { PIECES = COLUMNS / 8, ROWS = 64 / (LOADERS / 32) };
    int lane = threadIdx.x % 32, piece = lane % PIECES, below = lane / PIECES;
    bool inside = column + piece * 8 < width;
    bool whole = __all_sync(0xffffffffu, inside && from != NO_ROW); /* nearly always: then no copy has a condition */
    const char *columns = (const char *)(x + column + piece * 8);
    to = swizzled(to + piece / 8 * BOX_BYTES + threadIdx.x / 32 * ROWS * 128, below, piece % 8);
    if (whole) {
#pragma unroll
        for (int i = 0; i < ROWS; i += 32 / PIECES) {
            uint32_t row = __shfl_sync(0xffffffffu, from, i + below);
            copy_16((to ^ i % 8 << 4) + i * 128, columns + (size_t)row * 16);
        }
    } else {
        for (int i = 0; i < ROWS; i += 32 / PIECES) {
            uint32_t row = __shfl_sync(0xffffffffu, from, i + below);
            copy_16_if((to ^ i % 8 << 4) + i * 128, columns + (size_t)row * 16, inside && row != NO_ROW);
        }
    }
}

/* Boxes of dW, 128 rows x 32 floats, that a stage takes. */
template <int COLUMNS>
static const int BOXES = Ring<COLUMNS>::STAGE_BYTES / (2 * BOX_BYTES);

/* The loading warp group: all its threads where an operand is by index, else one. */
template <bool LEFT_INDEXED, bool RIGHT_INDEXED, int COLUMNS>
__device__ static inline void load_weight_tiles(Ring<COLUMNS> ring, const CUtensorMap *left_map,
                                                const CUtensorMap *right_map, const CUtensorMap *dw_map,
                                                const WeightProduct &p) {
    const bool indexed = LEFT_INDEXED || RIGHT_INDEXED;
    const RowSource source = LEFT_INDEXED ? p.left : p.right;
    const int rows = 64 / (LOADERS / 32); /* of a stage, that a warp copies */
    const int width = LEFT_INDEXED ? p.M : p.N, row = threadIdx.x / 32 * rows + threadIdx.x % rows;
    WeightTile tile;
    for (int id = blockIdx.x; find_weight_tile<COLUMNS>(&tile, id, p); id += gridDim.x) {
        int next = indexed && tile.first < tile.end ? source.entry[min(tile.first + row, tile.end - 1)] : -1;
        for (int k = tile.first; k < tile.end; k += DEEP, ring.next()) {
            uint32_t from = k + row < tile.end ? row_of_entry(next, source, width) : NO_ROW;
            if (indexed) { /* the next stage's entries travel while this one is copied */
                next = source.entry[min(k + DEEP + row, tile.end - 1)];
            }
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (threadIdx.x == 0) {
                barrier_arrive_expect(ring.full(),
                                      (LEFT_INDEXED ? 0 : ring.A_BYTES) + (RIGHT_INDEXED ? 0 : ring.B_BYTES));
                for (int i = 0; i < WGMMA_ROWS / 64 && !LEFT_INDEXED; i++) {
                    copy_box(ring.a() + i * BOX_BYTES, left_map, tile.m + i * 64, k, 0, ring.full());
                }
                for (int i = 0; i < COLUMNS / 64 && !RIGHT_INDEXED; i++) {
                    copy_box(ring.b() + i * BOX_BYTES, right_map, tile.n + i * 64, k, 0, ring.full());
                }
            }
            if (indexed) {
                __syncwarp();
            }
            if (LEFT_INDEXED) {
                copy_rows<WGMMA_ROWS>(ring.a(), p.left.x, p.M, tile.m, from);
            }
            if (RIGHT_INDEXED) {
                copy_rows<COLUMNS>(ring.b(), p.right.x, p.N, tile.n, from);
            }
            if (indexed) {
                barrier_arrive_copied(ring.full());
            }
        }
        for (int box = 0; tile.first < tile.end && box < COLUMNS / 32; box += BOXES<COLUMNS>, ring.next()) {
            int boxes = min(BOXES<COLUMNS>, COLUMNS / 32 - box);
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (threadIdx.x == 0) {
                barrier_arrive_expect(ring.full(), boxes * 2 * BOX_BYTES);
                for (int i = 0; i < boxes; i++) {
                    copy_box(ring.a() + i * 2 * BOX_BYTES, dw_map, tile.n + (box + i) * 32, tile.m, tile.expert,
                             ring.full());
                }
            }
            if (indexed) {
                barrier_arrive_copied(ring.full());
            }
        }
    }
}

/* Zeros in rows `used` to 63 of a box, by one warp group. */
__device__ static inline void clear_rows(uint32_t box, int used) {
    for (int i = used * 8 + threadIdx.x % GROUP; i < 64 * 8; i += GROUP) {
        store_16(box + i * 16, make_uint4(0, 0, 0, 0));
    }
}

/* dw += sum. The ring brings dw. Neighbouring threads trade, so that each has 4 columns of a row and a quad 64 bytes in
 * a run. */
template <int COLUMNS, int COUNT>
__device__ static inline void add_to_gradient(const float (&sum)[COUNT], Ring<COLUMNS> &ring, const WeightProduct &p,
                                              const WeightTile &tile, int row) {
    int group = (threadIdx.x - LOADERS) / GROUP, q = threadIdx.x % 4;
    bool odd = q % 2;
#pragma unroll
    for (int first = 0; first < COLUMNS / 32; first += BOXES<COLUMNS>, ring.next()) {
        barrier_wait(ring.full(), ring.parity);
#pragma unroll
        for (int box = first; box < first + BOXES<COLUMNS> && box < COLUMNS / 32; box++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { /* half i / 2 of the rows, half i % 2 of the columns */
                int half = i / 2, r = row + 8 * half, piece = i % 2 * 4 + (odd ? 2 : 0) + q / 2;
                int m = tile.m + r, n = tile.n + box * 32 + piece * 4;
                uint4 loaded = load_16(swizzled(ring.a() + (box - first) * 2 * BOX_BYTES, r, piece));
                float4 value = reinterpret_cast<float4 &>(loaded);
                const float *left = sum + 16 * box + 8 * (i % 2) + 2 * half, *right = left + 4;
                float x = __shfl_xor_sync(0xffffffffu, odd ? left[0] : right[0], 1);
                float y = __shfl_xor_sync(0xffffffffu, odd ? left[1] : right[1], 1);
                value.x += odd ? x : left[0];
                value.y += odd ? y : left[1];
                value.z += odd ? right[0] : x;
                value.w += odd ? right[1] : y;
                store_pack_if(p.dw + ((size_t)tile.expert * p.M + m) * p.N + n, reinterpret_cast<Pack<acc_t> &>(value),
                              m < p.M && n < p.N);
            }
        }
        group_sync(1 + group);
        if (threadIdx.x % GROUP == 0) {
            barrier_arrive(ring.empty());
        }
    }
}

/* A multiplying warp group. */
template <bool LEFT_INDEXED, bool RIGHT_INDEXED, int COLUMNS>
__device__ static inline void multiply_weight_tiles(Ring<COLUMNS> ring, const WeightProduct &p) {
    int group = (threadIdx.x - LOADERS) / GROUP, t = threadIdx.x % GROUP;
    float sum[COLUMNS / 2];
    WeightTile tile;
    for (int id = blockIdx.x; find_weight_tile<COLUMNS>(&tile, id, p); id += gridDim.x) {
        if (tile.first == tile.end) {
            continue;
        }
        uint32_t used = 0;
        for (int k = tile.first; k < tile.end; k += DEEP, ring.next()) {
            uint32_t a = ring.a() + group * BOX_BYTES, b = ring.b();
            barrier_wait(ring.full(), ring.parity);
            if (k + DEEP > tile.end) {
                if (!LEFT_INDEXED) {
                    clear_rows(a, tile.end - k);
                }
                for (int i = 0; i < COLUMNS / 64 && !RIGHT_INDEXED; i++) {
                    clear_rows(b + i * BOX_BYTES, tile.end - k);
                }
                fence_async();
                group_sync(1 + group);
            } else if (LEFT_INDEXED || RIGHT_INDEXED) {
                fence_async();
            }
            multiply_stage<1, 1>(sum, a, b, k > tile.first);
            wgmma_wait<1>();
            if (t == 0 && k > tile.first) {
                barrier_arrive(used);
            }
            used = ring.empty();
        }
        wgmma_wait<0>();
        wgmma_settle(sum);
        if (t == 0) {
            barrier_arrive(used);
        }
        add_to_gradient(sum, ring, p, tile, 64 * group + t / 32 * 16 + t % 32 / 4);
    }
}

/* The second sweep of experts_backward: a block takes every gridDim.x-th tile of (expert, rows and columns of dW). */
template <bool LEFT_INDEXED, bool RIGHT_INDEXED, int COLUMNS>
static __global__ void __launch_bounds__(WGMMA_THREADS, 1)
    weight_product_kernel(const __grid_constant__ CUtensorMap left_map, const __grid_constant__ CUtensorMap right_map,
                          const __grid_constant__ CUtensorMap dw_map, const __grid_constant__ WeightProduct p) {
#ifdef HOPPER_CODE
    const bool indexed = LEFT_INDEXED || RIGHT_INDEXED;
    extern __shared__ char memory[];
    Ring<COLUMNS> ring = ring_open<COLUMNS>(shared_address(memory), indexed ? LOADERS + 1 : 1);
    __syncthreads();
    if (threadIdx.x < LOADERS) {
        registers_release<LOADER_REGISTERS>();
        if (indexed || threadIdx.x == 0) {
            load_weight_tiles<LEFT_INDEXED, RIGHT_INDEXED, COLUMNS>(ring, &left_map, &right_map, &dw_map, p);
        }
    } else {
        registers_claim<MULTIPLIER_REGISTERS>();
        multiply_weight_tiles<LEFT_INDEXED, RIGHT_INDEXED, COLUMNS>(ring, p);
    }
#endif
}

template <int COLUMNS>
static void launch_weight(WeightProduct p, int64_t tiles, Grouped g) {
    int rows = g.shape.rows;
    CUtensorMap none = {};
    CUtensorMap left_map = p.left.entry ? none : matrix_map(p.left.x, sizeof(real_t), p.M, rows, 1, DEEP);
    CUtensorMap right_map = p.right.entry ? none : matrix_map(p.right.x, sizeof(real_t), p.N, rows, 1, DEEP);
    CUtensorMap dw_map = matrix_map(p.dw, sizeof(acc_t), p.N, p.M, p.E, WGMMA_ROWS);
    if (p.left.entry) {
        launch_wgmma<COLUMNS>(weight_product_kernel<true, false, COLUMNS>, 0, tiles, g.stream, left_map, right_map,
                              dw_map, p);
    } else if (p.right.entry) {
        launch_wgmma<COLUMNS>(weight_product_kernel<false, true, COLUMNS>, 0, tiles, g.stream, left_map, right_map,
                              dw_map, p);
    } else {
        launch_wgmma<COLUMNS>(weight_product_kernel<false, false, COLUMNS>, 0, tiles, g.stream, left_map, right_map,
                              dw_map, p);
    }
}

#endif
