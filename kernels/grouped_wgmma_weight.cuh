/* The weight gradient, dW_e (+)= left_e^T right_e, by the same ring. The inner width is the expert's rows, 64 of them a
 * stage, and both operands lie "across":
 *
 *     A    64 rows x 128 columns of left           two boxes of 64 columns, one for each multiplying group; by index
 *                                                  or by TMA
 *     B    64 rows x 128 or 256 columns of right   boxes of 64 columns by TMA, for both blocks of the cluster
 *
 * Only left may be by index: where it is the right operand, the two change places and the tile is stored turned.
 *
 * An expert's last stage of rows reaches past its end. What is fetched by index is zero there. What TMA brings are
 * rows of the next expert, or of nobody, which may hold NaN, and NaN times zero is NaN: the multiplying groups
 * overwrite them with zeros before they use them. Both groups clear B: they write the same zeros, and neither waits for
 * the other.
 *
 * A tile takes as long as its expert has rows. So the tiles of the expert with the most rows are dealt out first, and
 * every second round goes backwards: who got the longest tile of one round gets the shortest of the next (dealt). Which
 * cluster makes a tile does not change its bits: every element of dW has one owner, which sums the rows in their order.
 *
 * Called by wgmma_weight (launch_weight). Read first: grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_WEIGHT_CUH
#define KERNELS_GROUPED_WGMMA_WEIGHT_CUH

#include "wgmma_ring.cuh"

enum { MOST_SORTED = 256 }; /* more experts are taken as they come: none is large */

enum { LOADER_ROWS = 64 / (LOADERS / 32) }; /* of a stage, that a warp copies by index */

typedef struct {
    RowSource left, right;
    acc_t *dw;         /* (E,M,N), turned: (E,N,M) */
    const int *offset; /* (E+1) */
    int E, M, N;       /* M columns of left, N of right */
    int blocks;        /* of a cluster: neighbours in M */
    int turned;        /* operands have changed places: left is right of the product, right left */
    int add;
} WeightProduct;

/* All rows of an expert, first .. end - 1, are summed; columns m.. of left by n.. of right are the tile. */
typedef struct {
    int expert, first, end, m, n;
} WeightTile;

/* ---- which tile is next ---- */

/* The number of this cluster's k-th tile. */
__device__ static inline int dealt(int k, const WeightProduct &p) {
    int clusters = gridDim.x / p.blocks, cluster = blockIdx.x / p.blocks;
    return k * clusters + (k % 2 == 0 ? cluster : clusters - 1 - cluster);
}

/* order[i] = the expert with the i-th most rows, by all threads of the block, each its experts. */
__device__ static inline void order_experts(int *order, const int *offset, int E) {
    for (int e = threadIdx.x; e < E; e += WGMMA_THREADS) {
        int rows = offset[e + 1] - offset[e], before = 0;
        for (int other = 0; other < E && E <= MOST_SORTED; other++) {
            int others = offset[other + 1] - offset[other];
            before += others > rows || (others == rows && other < e);
        }
        order[E <= MOST_SORTED ? before : e] = e;
    }
}

/* Tile `id` of all, of which block `rank` of the cluster has its part; false past the last. Bands as in find_tile. A
 * second block may find a tile past M: it loads for the other and stores nothing. */
template <int COLUMNS>
__device__ static inline bool find_weight_tile(WeightTile *tile, int id, uint32_t rank, const int *order,
                                               const WeightProduct &p) {
    int down = (p.M + p.blocks * WGMMA_ROWS - 1) / (p.blocks * WGMMA_ROWS), across = (p.N + COLUMNS - 1) / COLUMNS;
    int place = id / (down * across), band_steps = BAND / p.blocks;
    if (place >= p.E) {
        return false;
    }
    int e = order[place];
    id -= place * down * across;
    int band = id / (band_steps * across), in_band = id - band * band_steps * across;
    int height = min(band_steps, down - band * band_steps);
    tile->expert = e;
    tile->first = p.offset[e];
    tile->end = p.offset[e + 1];
    tile->m = ((band * band_steps + in_band % height) * p.blocks + rank) * WGMMA_ROWS;
    tile->n = in_band / height * COLUMNS;
    return true;
}

/* ---- loading ---- */

/* 64 rows of left by index, 128 columns from `column` on. A warp copies LOADER_ROWS of them, two at a time: 16 lanes to
 * a row, 16 bytes to a lane. `from` in lane first + i says where row i of these begins (row_of_entry). A tile begins at
 * a multiple of 1024 bytes, so that the swizzle, piece ^ row % 8, may be made on the address itself. */
__device__ static inline void copy_rows(uint32_t to, const real_t *x, int width, int column, uint32_t from, int first) {
    enum { PIECES = WGMMA_ROWS / 8, ROWS = LOADER_ROWS };
    int lane = threadIdx.x % 32, piece = lane % PIECES, below = lane / PIECES;
    bool inside = column + piece * 8 < width;
    bool whole = __all_sync(0xffffffffu, inside && from != ZERO_ROW); /* nearly always: then no copy has a condition */
    const char *columns = (const char *)(x + column + piece * 8);
    to = swizzled(to + piece / 8 * BOX_BYTES + threadIdx.x / 32 * ROWS * 128, below, piece % 8);
    if (whole) {
#pragma unroll
        for (int i = 0; i < ROWS; i += 32 / PIECES) {
            uint32_t row = __shfl_sync(0xffffffffu, from, first + i + below);
            copy_16((to ^ i % 8 << 4) + i * 128, columns + (size_t)row * 16);
        }
    } else {
        for (int i = 0; i < ROWS; i += 32 / PIECES) {
            uint32_t row = __shfl_sync(0xffffffffu, from, first + i + below);
            copy_16_if((to ^ i % 8 << 4) + i * 128, columns + (size_t)row * 16, inside && row != ZERO_ROW);
        }
    }
}

/* The loading warp group: all its threads where left is by index, else one. */
template <bool INDEXED, int COLUMNS>
__device__ static inline void load_weight_tiles(Ring<COLUMNS> ring, const int *order, const CUtensorMap *left_map,
                                                const CUtensorMap *right_map, const WeightProduct &p) {
    /* of two stages, the row that this thread looks up for its warp */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = lane / LOADER_ROWS * DEEP + warp * LOADER_ROWS + lane % LOADER_ROWS;
    WeightTile tile;
    for (int i = 0; find_weight_tile<COLUMNS>(&tile, dealt(i, p), ring.rank, order, p); i++) {
        int next = INDEXED && tile.first < tile.end ? p.left.entry[min(tile.first + row, tile.end - 1)] : -1;
        uint32_t from = ZERO_ROW;
        for (int k = tile.first, odd = 0; k < tile.end; k += DEEP, odd ^= 1, ring.next()) {
            if (INDEXED && !odd) { /* while rows of two stages are copied, the entries of the next two travel */
                from = k + row < tile.end ? row_of_entry(next, p.left, p.M) : ZERO_ROW;
                next = p.left.entry[min(k + 2 * DEEP + row, tile.end - 1)];
            }
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (threadIdx.x == 0) {
                barrier_arrive_expect(ring.full(), INDEXED ? ring.B_BYTES : ring.STAGE_BYTES);
                for (int i = 0; i < WGMMA_ROWS / 64 && !INDEXED; i++) {
                    copy_box(ring.a() + i * BOX_BYTES, left_map, tile.m + i * 64, k, 0, ring.full());
                }
                for (int i = ring.rank; i < COLUMNS / 64; i += ring.blocks) {
                    ring.share_box(ring.b() + i * BOX_BYTES, right_map, tile.n + i * 64, k, 0);
                }
            }
            if (INDEXED) {
                __syncwarp();
                copy_rows(ring.a(), p.left.x, p.M, tile.m, from, odd * LOADER_ROWS);
                barrier_arrive_copied(ring.full());
            }
        }
    }
}

/* ---- multiplying ---- */

/* Zeros in rows `used` to 63 of a box, by one warp group. The swizzle moves pieces within a row only. */
__device__ static inline void clear_rows(uint32_t box, int used) {
    for (int i = used * 8 + threadIdx.x % GROUP; i < 64 * 8; i += GROUP) {
        store_16(box + i * 16, make_uint4(0, 0, 0, 0));
    }
}

/* dw (+)= sum. Neighbouring threads trade, so that each has 4 columns of a row and a quad 64 bytes in a run. */
template <int COUNT>
__device__ static inline void store_gradient(const float (&sum)[COUNT], const WeightProduct &p, const WeightTile &tile,
                                             int row) {
    bool odd = threadIdx.x % 2;
    int m = tile.m + row, n = tile.n + (odd ? 8 : 0) + threadIdx.x % 4 / 2 * 4;
    float *to = p.dw + ((size_t)tile.expert * p.M + m) * p.N + n;
#pragma unroll
    for (int i = 0; i < COUNT; i += 8, n += 16, to += 16) {
        Pack<float> value[2]; /* of row m and of row m + 8 */
        bool inside[2] = {m < p.M && n < p.N, m + 8 < p.M && n < p.N};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *left = sum + i + 2 * half, *right = left + 4;
            float x = __shfl_xor_sync(0xffffffffu, odd ? left[0] : right[0], 1);
            float y = __shfl_xor_sync(0xffffffffu, odd ? left[1] : right[1], 1);
            value[half] = odd ? Pack<float>{x, y, right[0], right[1]} : Pack<float>{left[0], left[1], x, y};
            if (p.add && inside[half]) {
                Pack<float> old = load_pack(to + half * 8 * (size_t)p.N);
                for (int j = 0; j < 4; j++) {
                    value[half].v[j] += old.v[j];
                }
            }
        }
        store_pack_if(to, value[0], inside[0]);
        store_pack_if(to + 8 * (size_t)p.N, value[1], inside[1]);
    }
}

/* The same for dw (E,N,M): the eight threads of a warp that have the same columns have 8 numbers in a run. */
template <int COUNT>
__device__ static inline void store_gradient_turned(const float (&sum)[COUNT], const WeightProduct &p,
                                                    const WeightTile &tile, int row) {
    int m = tile.m + row, n = tile.n + threadIdx.x % 4 * 2;
    float *to = p.dw + ((size_t)tile.expert * p.N + n) * p.M + m;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4, n += 8, to += 8 * (size_t)p.M) {
        float *at[4] = {to, to + p.M, to + 8, to + 8 + p.M}; /* columns n and n + 1 of row m, then of row m + 8 */
        float value[4];
        bool inside[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            inside[j] = m + j / 2 * 8 < p.M && n + j % 2 < p.N;
            value[j] = sum[i + j] + (p.add && inside[j] ? *at[j] : 0);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            store_float_if(at[j], value[j], inside[j]);
        }
    }
}

/* The tile of an expert without rows, by both multiplying groups. */
template <int COLUMNS>
__device__ static inline void clear_gradient(const WeightProduct &p, const WeightTile &tile) {
    float *dw = p.dw + (size_t)tile.expert * p.M * p.N;
    for (int i = threadIdx.x - LOADERS; i < WGMMA_ROWS * COLUMNS; i += 2 * GROUP) {
        int m = tile.m + i / COLUMNS, n = tile.n + i % COLUMNS;
        if (m < p.M && n < p.N) {
            dw[p.turned ? (size_t)n * p.M + m : (size_t)m * p.N + n] = 0;
        }
    }
}

/* A multiplying warp group; `used` as in multiply_tiles. */
template <bool INDEXED, int COLUMNS>
__device__ static inline void multiply_weight_tiles(Ring<COLUMNS> ring, const int *order, const WeightProduct &p) {
    int group = (threadIdx.x - LOADERS) / GROUP, t = threadIdx.x % GROUP;
    float sum[COLUMNS / 2];
    WeightTile tile;
    for (int i = 0; find_weight_tile<COLUMNS>(&tile, dealt(i, p), ring.rank, order, p); i++) {
        if (tile.first == tile.end) {
            if (!p.add) {
                clear_gradient<COLUMNS>(p, tile);
            }
            continue;
        }
        uint32_t used = 0;
        for (int k = tile.first; k < tile.end; k += DEEP, ring.next()) {
            uint32_t a = ring.a() + group * BOX_BYTES, b = ring.b();
            barrier_wait(ring.full(), ring.parity);
            if (k + DEEP > tile.end) {
                if (!INDEXED) {
                    clear_rows(a, tile.end - k);
                }
                for (int i = 0; i < COLUMNS / 64; i++) {
                    clear_rows(b + i * BOX_BYTES, tile.end - k);
                }
                fence_async();
                group_sync(1 + group);
            } else if (INDEXED) {
                fence_async();
            }
            multiply_stage<1, 1>(sum, a, b, k > tile.first);
            wgmma_wait<1>();
            if (k > tile.first) {
                ring.release(used, t);
            }
            used = ring.empty();
        }
        wgmma_wait<0>();
        wgmma_settle(sum);
        ring.release(used, t);
        int row = 64 * group + t / 32 * 16 + t % 32 / 4;
        if (p.turned) {
            store_gradient_turned(sum, p, tile, row);
        } else {
            store_gradient(sum, p, tile, row);
        }
    }
}

/* The second sweep of experts_backward in experts.c: clusters replace its loop over (expert, rows of dW), a tile for
 * each block at a time. Shared memory: ring | order (E). */
template <bool INDEXED, int COLUMNS>
static __global__ void __launch_bounds__(WGMMA_THREADS, 1)
    weight_product_kernel(const __grid_constant__ CUtensorMap left_map, const __grid_constant__ CUtensorMap right_map,
                          const __grid_constant__ WeightProduct p) {
#ifdef HOPPER_CODE
    extern __shared__ char memory[];
    Ring<COLUMNS> ring = ring_open<Ring<COLUMNS>>(shared_address(memory), INDEXED ? LOADERS + 1 : 1, p.blocks);
    int *order = reinterpret_cast<int *>(memory + (ring.base + ring.BYTES - shared_address(memory)));
    order_experts(order, p.offset, p.E);
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < LOADERS) {
        registers_release<LOADER_REGISTERS>();
        if (INDEXED || threadIdx.x == 0) {
            load_weight_tiles<INDEXED, COLUMNS>(ring, order, &left_map, &right_map, p);
        }
    } else {
        registers_claim<MULTIPLIER_REGISTERS>();
        multiply_weight_tiles<INDEXED, COLUMNS>(ring, order, p);
    }
    cluster_end();
#endif
}

/* ---- the host's side ---- */

/* `tiles`: how many of COLUMNS columns there are. Blocks go in pairs, unless tiles in M are few and odd: the last would
 * want a second. Where left is by index the kernel does not read its map, and right's stands there. */
template <int COLUMNS>
static void launch_weight(WeightProduct p, int64_t tiles, Grouped g) {
    int rows = g.shape.rows;
    CUtensorMap right_map = matrix_map(p.right.x, sizeof(real_t), p.N, rows, 1, DEEP);
    CUtensorMap left_map = p.left.entry ? right_map : matrix_map(p.left.x, sizeof(real_t), p.M, rows, 1, DEEP);
    size_t bytes = Ring<COLUMNS>::BYTES + p.E * sizeof(int);
    int down = ceil_div(p.M, WGMMA_ROWS);
    p.blocks = down % 2 == 0 || down >= 10 ? 2 : 1;
    if (p.left.entry) {
        launch_wgmma(weight_product_kernel<true, COLUMNS>, bytes, tiles, p.blocks, g.stream, left_map, right_map, p);
    } else {
        launch_wgmma(weight_product_kernel<false, COLUMNS>, bytes, tiles, p.blocks, g.stream, left_map, right_map, p);
    }
}

#endif
