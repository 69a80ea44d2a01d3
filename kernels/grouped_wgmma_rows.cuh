/* The products whose result has the rows of their left operand: up, down, hidden, input. They differ in where A and B
 * come from (load_tiles) and in what becomes of a tile's sums (finish_up, finish_hidden, finish_store). A tile is 128
 * rows of one expert, 64 in hidden, by 128 or 256 columns of B. SwiGLU's up takes half of these from the gate's columns
 * and half from the same ones of up, so that a thread has both numbers of every element of h.
 *
 * Called by wgmma_up, wgmma_down, wgmma_hidden and wgmma_input (rows_product). Read first: grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_ROWS_CUH
#define KERNELS_GROUPED_WGMMA_ROWS_CUH

#include "grouped_tile.cuh"
#include "wgmma_ring.cuh"

enum {
    PART = 128,          /* columns that one partial sum of <u, h> covers */
    MOST_EXPERTS = 4096, /* their list fits beside the ring of narrow tiles */
};

enum Finish { FINISH_UP, FINISH_HIDDEN, FINISH_STORE };

/* Rows of a tile: 64 where the end of a tile is long (hidden: it reads a, and writes da and h). The groups then take
 * turns, and one finishes its tile while the other multiplies. */
template <int FINISH>
static const int TILE_ROWS = FINISH == FINISH_HIDDEN ? 64 : (int)WGMMA_ROWS;

typedef struct {
    RowSource a;       /* left operand; its rows are `inner` wide */
    const int *offset; /* (E+1) */
    int E, rows;
    int inner, width; /* of the sum; of the result */
    int columns;      /* of the result a tile makes: half of B's, where they are pairs of gate and up */
    int second;       /* column in B of the tile's second half, counted from its first; B not across */
    int blocks;       /* of a cluster: their tiles lie below each other, a step of the cluster */
    int add;
    real_t *out, *h, *da; /* up: a, h; down, input: the result; hidden: h, da */
    const real_t *saved;  /* hidden: a, which the kernel reads by its map */
    const acc_t *row_weight;
    float *part; /* hidden: (parts, rows) sums of <u, h> over PART columns each, or NULL */
} RowsProduct;

/* Rows `row` .. row + TILE_ROWS - 1 (fewer, where `end` cuts) of an expert, columns of the result from `column` on. */
typedef struct {
    int expert, row, end, column;
} Tile;

/* first_tile[e] = how many times `rows` rows (a cluster's step) the experts before e take, each of them rounded up. By
 * the first warp of the block. */
__device__ static inline void count_tiles(int *first_tile, const int *offset, int E, int rows) {
    int lane = threadIdx.x, before = 0;
    for (int base = 0; base < E; base += 32) {
        int e = base + lane;
        int through = warp_running_sum(e < E ? (offset[e + 1] - offset[e] + rows - 1) / rows : 0, lane);
        if (e < E) {
            first_tile[e + 1] = before + through;
        }
        before += __shfl_sync(0xffffffffu, through, 31);
    }
    if (lane == 0) {
        first_tile[0] = 0;
    }
}

/* The tile (ROWS rows) of block `rank` in step `id` of the clusters; false past the last. The search goes on from the
 * expert in *tile, so ids must grow from call to call. Within an expert come the steps of a band of rows, column by
 * column, then those of the next band. The second block may find a tile without rows (row >= end): it loads for the
 * other, multiplies, and stores nothing. */
template <int ROWS>
__device__ static inline bool find_tile(Tile *tile, int id, uint32_t rank, const int *first_tile,
                                        const RowsProduct &p) {
    int across = (p.width + p.columns - 1) / p.columns, band_steps = BAND * WGMMA_ROWS / ROWS / p.blocks;
    int e = tile->expert;
    while (e < p.E && id >= first_tile[e + 1] * across) {
        e++;
    }
    tile->expert = e;
    if (e == p.E) {
        return false;
    }
    id -= first_tile[e] * across;
    int band = id / (band_steps * across), in_band = id - band * band_steps * across;
    int height = min(band_steps, first_tile[e + 1] - first_tile[e] - band * band_steps);
    tile->row = p.offset[e] + ((band * band_steps + in_band % height) * p.blocks + rank) * ROWS;
    tile->end = p.offset[e + 1];
    tile->column = in_band / height * p.columns;
    return true;
}

/* The loading warp group: all its threads where rows are fetched by index, one thread where TMA brings everything. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
__device__ static inline void load_tiles(Ring<COLUMNS, TILE_ROWS<FINISH>> ring, const int *first_tile,
                                         const CUtensorMap *a_map, const CUtensorMap *b_map, const RowsProduct &p) {
    enum { ROWS = TILE_ROWS<FINISH>, BELOW = LOADERS / 8 }; /* a thread copies rows t / 8, t / 8 + BELOW, ... */
    int t = threadIdx.x, piece = t % 8, step = gridDim.x / p.blocks;
    Tile tile = {0};
    for (int id = blockIdx.x / p.blocks; find_tile<ROWS>(&tile, id, ring.rank, first_tile, p); id += step) {
        uint32_t from[ROWS / BELOW]; /* where the thread's rows begin, as row_of_entry has it */
        if (INDEXED) {
            int entry[ROWS / BELOW], row = tile.row + t / 8;
#pragma unroll
            for (int i = 0; i < ROWS / BELOW; i++) {
                entry[i] = p.a.entry[min(row + BELOW * i, tile.end - 1)];
            }
#pragma unroll
            for (int i = 0; i < ROWS / BELOW; i++) {
                from[i] = row + BELOW * i < tile.end ? row_of_entry(entry[i], p.a, p.inner) : ZERO_ROW;
            }
        }
        for (int k = 0; k < p.inner; k += DEEP, ring.next()) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (t == 0) {
                barrier_arrive_expect(ring.full(), INDEXED ? ring.B_BYTES : ring.STAGE_BYTES);
                if (!INDEXED) {
                    copy_box(ring.a(), a_map, k, tile.row, 0, ring.full());
                }
                if (ACROSS_B) {
                    for (int i = ring.rank; i < COLUMNS / 64; i += ring.blocks) {
                        ring.share_box(ring.b() + i * BOX_BYTES, b_map, tile.column + i * 64, k, tile.expert);
                    }
                } else {
                    for (int i = ring.rank; i < 2; i += ring.blocks) {
                        int column = tile.column + (i ? p.second : 0);
                        ring.share_box(ring.b() + i * (ring.B_BYTES / 2), b_map, k, column, tile.expert);
                    }
                }
            }
            if (INDEXED) {
                const char *x = (const char *)(p.a.x + k + piece * 8);
                bool inside = k + piece * 8 < p.inner;
                uint32_t to = swizzled(ring.a(), t / 8, piece);
#pragma unroll
                for (int i = 0; i < ROWS / BELOW; i++) {
                    copy_16_if(to + BELOW * 128 * i, x + (size_t)from[i] * 16, inside && from[i] != ZERO_ROW);
                }
                barrier_arrive_copied(ring.full());
            }
        }
    }
}

/* up: a, rounded, and the activation of what was rounded, so that the backward makes the same h again. */
template <bool GELU, int COUNT>
__device__ static inline void finish_up(const float (&sum)[COUNT], const RowsProduct &p, const Tile &tile, int row) {
    int a_width = GELU ? p.width : 2 * p.width, column = tile.column + threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        real_t *a = p.out + (size_t)row * a_width, *h = p.h + (size_t)row * p.width;
        if (GELU) {
#pragma unroll
            for (int i = 0; i < COUNT / 16; i++) {
                Pack<real_t> in = row_pack(sum, 4 * i, half), out;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    out.v[j] = to_real<real_t>(gelu(to_float(in.v[j])));
                }
                bool inside = row < tile.end && column + 32 * i < p.width;
                store_pack_if(a + column + 32 * i, in, inside);
                store_pack_if(h + column + 32 * i, out, inside);
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT / 32; i++) {
                Pack<real_t> gate = row_pack(sum, 4 * i, half), up = row_pack(sum, COUNT / 8 + 4 * i, half), out;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    out.v[j] = to_real<real_t>(swiglu(to_float(gate.v[j]), to_float(up.v[j])));
                }
                bool inside = row < tile.end && column + 32 * i < p.width;
                store_pack_if(a + column + 32 * i, gate, inside);
                store_pack_if(a + p.width + column + 32 * i, up, inside);
                store_pack_if(h + column + 32 * i, out, inside);
            }
        }
    }
}

/* down, input */
template <int COUNT>
__device__ static inline void finish_store(const float (&sum)[COUNT], const RowsProduct &p, const Tile &tile, int row) {
    int column = tile.column + threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        real_t *out = p.out + (size_t)row * p.width;
        if (p.add) {
#pragma unroll
            for (int i = 0; i < COUNT / 16; i++) {
                int c = column + 32 * i;
                float value[8];
                row_floats(value, sum, 4 * i, half);
                if (row < tile.end && c < p.width) {
                    Pack<real_t> pack = load_pack(out + c);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        pack.v[j] = to_real<real_t>(to_float(pack.v[j]) + value[j]);
                    }
                    store_pack(out + c, pack);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT / 16; i++) {
                int c = column + 32 * i;
                store_pack_if(out + c, row_pack(sum, 4 * i, half), row < tile.end && c < p.width);
            }
        }
    }
}

/* hidden: what a group reads of a for its own tile, 64 rows x 64 columns at a time, gate beside up (GELU: gate is all
 * there is), in two places in turn. The group's first thread asks for it; full[] ends when it is there. */
struct SavedBoxes {
    enum { BYTES = 2 * 2 * 2 * BOX_BYTES, BARRIERS = 2 * 2 * 8 }; /* groups, places, gate and up */
    uint32_t boxes, barriers;                                     /* of the group */
    int asked, taken;                                             /* so far */

    __device__ uint32_t gate(int i) const {
        return boxes + i % 2 * 2 * BOX_BYTES;
    }
    __device__ uint32_t up(int i) const {
        return gate(i) + BOX_BYTES;
    }
    __device__ uint32_t full(int i) const {
        return barriers + i % 2 * 8;
    }
};

__device__ static inline SavedBoxes saved_open(uint32_t boxes, uint32_t barriers) {
    int group = threadIdx.x / GROUP - 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SavedBoxes::BARRIERS; i += 8) {
            barrier_init(barriers + i, 1);
        }
        barrier_init_fence();
    }
    return SavedBoxes{boxes + group * (SavedBoxes::BYTES / 2), barriers + group * (SavedBoxes::BARRIERS / 2), 0, 0};
}

/* Whose turn it is, where the groups take turns: before the first stage of its tile a group waits until the other has
 * waited for the last of the tile before. A barrier knows laps of the ring by parity: asked for a lap while the one
 * before has yet to come, it would answer for the lap two before, and the group would multiply what lay there then. */
struct Turns {
    enum { BYTES = 2 * 8 };
    uint32_t barriers; /* [2]: the turn comes to group 0, to group 1 */
    int group, tiles;  /* this group, and its tiles so far */

    __device__ void await(void) {
        if (group == 1 || tiles > 0) {
            barrier_wait(barriers + group * 8, (group == 1 ? tiles : tiles - 1) % 2);
        }
        tiles++;
    }
    __device__ void pass_on(void) const {
        if (threadIdx.x % GROUP == 0) {
            barrier_arrive(barriers + (1 - group) * 8);
        }
    }
};

__device__ static inline Turns turns_open(uint32_t barriers) {
    if (threadIdx.x == 0) {
        barrier_init(barriers, 1);
        barrier_init(barriers + 8, 1);
        barrier_init_fence();
    }
    return Turns{barriers, (int)threadIdx.x / GROUP - 1, 0};
}

/* Asks for the next 64 columns. By all threads of the group, when all have read what was in the place. */
template <bool GELU>
__device__ static inline void ask_saved(SavedBoxes &saved, const CUtensorMap *map, int column, int row, int width) {
    if (threadIdx.x % GROUP == 0) {
        barrier_arrive_expect(saved.full(saved.asked), GELU ? BOX_BYTES : 2 * BOX_BYTES);
        copy_box(saved.gate(saved.asked), map, column, row, 0, saved.full(saved.asked));
        if (!GELU) {
            copy_box(saved.up(saved.asked), map, width + column, row, 0, saved.full(saved.asked));
        }
    }
    saved.asked++;
}

/* hidden: from u to w h, da and, for every PART columns, which are two boxes, the row's share of <u, h>. The first two
 * boxes have been asked for; each that is read makes room for the next but one. */
template <bool GELU, int COLUMNS, int COUNT>
__device__ static inline void finish_hidden(const float (&sum)[COUNT], SavedBoxes &saved, const CUtensorMap *saved_map,
                                            const RowsProduct &p, const Tile &tile, int row) {
    int a_width = GELU ? p.width : 2 * p.width, q = threadIdx.x % 4, group = threadIdx.x / GROUP;
    float weight[2], total[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        weight[half] = p.row_weight ? p.row_weight[min(row + 8 * half, tile.end - 1)] : 1;
    }
#pragma unroll
    for (int box = 0; box < COLUMNS / 64; box++) {
        Pack<real_t> gate[4], up[4];
        barrier_wait(saved.full(saved.taken), saved.taken / 2 % 2);
#pragma unroll
        for (int i = 0; i < 4; i++) { /* half i / 2 of the rows, half i % 2 of the columns */
            int at = row - tile.row + i / 2 * 8, piece = i % 2 * 4 + q;
            reinterpret_cast<uint4 &>(gate[i]) = load_16(swizzled(saved.gate(saved.taken), at, piece));
            if (!GELU) {
                reinterpret_cast<uint4 &>(up[i]) = load_16(swizzled(saved.up(saved.taken), at, piece));
            }
        }
        saved.taken++;
        fence_async(); /* the loads are done, not only issued, before the copy engine may write here again */
        group_sync(group);
        if (box + 2 < COLUMNS / 64) {
            ask_saved<GELU>(saved, saved_map, tile.column + (box + 2) * 64, tile.row, p.width);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int half = i / 2, r = row + 8 * half, c = tile.column + box * 64 + i % 2 * 32 + q * 8;
            bool inside = r < tile.end && c < p.width;
            float u[8], share = 0;
            Pack<real_t> out, da, da_up;
            row_floats(u, sum, box * 8 + i % 2 * 4, half);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float g = to_float(gate[i].v[j]);
                HiddenBack back = GELU ? gelu_back(g, weight[half] * u[j])
                                       : swiglu_back(g, to_float(up[i].v[j]), weight[half] * u[j]);
                share += u[j] * back.h;
                out.v[j] = to_real<real_t>(weight[half] * back.h);
                da.v[j] = to_real<real_t>(back.da);
                da_up.v[j] = to_real<real_t>(back.da_up);
            }
            total[half] = (box % 2 == 0 && i % 2 == 0 ? 0 : total[half]) + (inside ? share : 0);
            store_pack_if(p.h + (size_t)r * p.width + c, out, inside);
            store_pack_if(p.da + (size_t)r * a_width + c, da, inside);
            if (!GELU) {
                store_pack_if(p.da + (size_t)r * a_width + p.width + c, da_up, inside);
            }
        }
        for (int half = 0; half < 2 && box % 2 == 1; half++) { /* PART columns are complete */
            int r = row + 8 * half, part = tile.column / PART + box / 2;
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
            if (p.part && q == 0 && r < tile.end && part * PART < p.width) {
                p.part[(size_t)part * p.rows + r] = total[half];
            }
        }
    }
}

/* A multiplying warp group. `used` is empty[] of the stage before: its products are finished when at most the batch of
 * this stage is not. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
__device__ static inline void multiply_tiles(Ring<COLUMNS, TILE_ROWS<FINISH>> ring, SavedBoxes saved, Turns turns,
                                             const int *first_tile, const CUtensorMap *saved_map,
                                             const RowsProduct &p) {
    enum { ROWS = TILE_ROWS<FINISH>, TURNS = 128 / ROWS }; /* a group takes every TURNS-th tile */
    int group = (threadIdx.x - LOADERS) / GROUP, t = threadIdx.x % GROUP, step = gridDim.x / p.blocks;
    int tile_stages = (p.inner + DEEP - 1) / DEEP, part = TURNS == 1 ? group : 0; /* of the tile's rows */
    float sum[COLUMNS / 2];
    Tile tile = {0};
    int id = blockIdx.x / p.blocks;
    if (TURNS == 2 && group == 1) {
        id += step;
        ring.skip(tile_stages);
    }
    for (; find_tile<ROWS>(&tile, id, ring.rank, first_tile, p); id += TURNS * step) {
        if (FINISH == FINISH_HIDDEN) {
            ask_saved<GELU>(saved, saved_map, tile.column, tile.row, p.width);
            ask_saved<GELU>(saved, saved_map, tile.column + 64, tile.row, p.width);
        }
        if (TURNS == 2) {
            turns.await();
        }
        uint32_t used = 0;
        for (int k = 0; k < p.inner; k += DEEP, ring.next()) {
            barrier_wait(ring.full(), ring.parity);
            if (INDEXED) {
                fence_async();
            }
            multiply_stage<0, ACROSS_B>(sum, ring.a() + part * BOX_BYTES, ring.b(), k > 0);
            wgmma_wait<1>();
            if (k > 0) {
                ring.release(used, t);
            }
            used = ring.empty();
        }
        if (TURNS == 2) {
            turns.pass_on();
        }
        wgmma_wait<0>();
        wgmma_settle(sum);
        ring.release(used, t);
        if (TURNS == 2) {
            ring.skip(tile_stages);
        }
        int row = tile.row + 64 * part + t / 32 * 16 + t % 32 / 4;
        if (FINISH == FINISH_UP) {
            finish_up<GELU>(sum, p, tile, row);
        } else if (FINISH == FINISH_HIDDEN) {
            finish_hidden<GELU, COLUMNS>(sum, saved, saved_map, p, tile, row);
        } else {
            finish_store(sum, p, tile, row);
        }
    }
}

/* The loops over pieces of experts.c, one product of theirs. Of the steps a cluster takes every (gridDim.x / blocks)-th
 * one, a block its tile of it. Shared memory: boxes of a (hidden) | ring | barriers of boxes and turns (hidden) |
 * first_tile. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
static __global__ void __launch_bounds__(WGMMA_THREADS, 1)
    rows_product_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                        const __grid_constant__ CUtensorMap saved_map, const __grid_constant__ RowsProduct p) {
#ifdef HOPPER_CODE
    enum { ROWS = TILE_ROWS<FINISH> };
    extern __shared__ char memory[];
    uint32_t start = shared_address(memory) + (FINISH == FINISH_HIDDEN ? SavedBoxes::BYTES : 0);
    auto ring = ring_open<COLUMNS, ROWS>(start, INDEXED ? LOADERS + 1 : 1, p.blocks);
    uint32_t after = ring.base + ring.BYTES;
    SavedBoxes saved = {};
    Turns turns = {};
    if (FINISH == FINISH_HIDDEN) {
        saved = saved_open(ring.base - SavedBoxes::BYTES, after);
        turns = turns_open(after + SavedBoxes::BARRIERS);
        after += SavedBoxes::BARRIERS + Turns::BYTES;
    }
    int *first_tile = reinterpret_cast<int *>(memory + (after - shared_address(memory)));
    if (threadIdx.x < 32) {
        count_tiles(first_tile, p.offset, p.E, p.blocks * ROWS);
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < LOADERS) {
        registers_release<LOADER_REGISTERS>();
        if (INDEXED || threadIdx.x == 0) {
            load_tiles<FINISH, GELU, ACROSS_B, INDEXED, COLUMNS>(ring, first_tile, &a_map, &b_map, p);
        }
    } else {
        registers_claim<MULTIPLIER_REGISTERS>();
        multiply_tiles<FINISH, GELU, ACROSS_B, INDEXED, COLUMNS>(ring, saved, turns, first_tile, &saved_map, p);
    }
    cluster_end();
#endif
}

/* ---- the host's side ---- */

/* Shared memory of rows_product_kernel, from a multiple of 1024 on. */
template <int FINISH, int COLUMNS>
static size_t rows_product_bytes(int E) {
    size_t saved = FINISH == FINISH_HIDDEN ? SavedBoxes::BYTES + SavedBoxes::BARRIERS + Turns::BYTES : 0;
    return Ring<COLUMNS, TILE_ROWS<FINISH>>::BYTES + saved + (E + 1) * sizeof(int);
}

/* A map that a kernel does not read is b_map once more. down and input have no rows by index, so no such kernel. */
template <int FINISH, bool GELU, int ACROSS_B, int COLUMNS>
static void launch_rows(RowsProduct p, const real_t *weights, int weight_rows, Grouped g) {
    enum { ROWS = TILE_ROWS<FINISH> };
    bool pairs = FINISH == FINISH_UP && !GELU;
    p.columns = pairs ? COLUMNS / 2 : COLUMNS;
    p.second = pairs ? p.width : COLUMNS / 2;
    CUtensorMap b_map = matrix_map(weights, sizeof(real_t), ACROSS_B ? p.width : p.inner, weight_rows, p.E,
                                   ACROSS_B ? DEEP : COLUMNS / 2);
    CUtensorMap a_map = p.a.entry ? b_map : matrix_map(p.a.x, sizeof(real_t), p.inner, p.rows, 1, ROWS);
    CUtensorMap saved_map = FINISH != FINISH_HIDDEN
                                ? b_map
                                : matrix_map(p.saved, sizeof(real_t), GELU ? p.width : 2 * p.width, p.rows, 1, 64);
    size_t bytes = rows_product_bytes<FINISH, COLUMNS>(p.E);
    p.blocks = cluster_blocks(p.rows / ROWS, p.E);
    int64_t tiles = (int64_t)most_row_tiles(g.shape, ROWS) * ceil_div(p.width, p.columns);
    if (FINISH != FINISH_STORE && p.a.entry) {
        launch_wgmma(rows_product_kernel<FINISH, GELU, ACROSS_B, FINISH != FINISH_STORE, COLUMNS>, bytes, tiles,
                     p.blocks, g.stream, a_map, b_map, saved_map, p);
    } else {
        launch_wgmma(rows_product_kernel<FINISH, GELU, ACROSS_B, false, COLUMNS>, bytes, tiles, p.blocks, g.stream,
                     a_map, b_map, saved_map, p);
    }
}

/* Tiles of 256 columns, unless narrower ones waste fewer columns, are needed to keep every multiprocessor busy, or to
 * leave room for the list of very many experts. */
template <int FINISH, bool GELU, int ACROSS_B>
static void rows_product(RowsProduct p, const real_t *weights, int weight_rows, Grouped g) {
    p.offset = g.offset;
    p.E = g.shape.E;
    p.rows = g.shape.rows;
    if (p.rows == 0) {
        return;
    }
    int width = FINISH == FINISH_UP && !GELU ? 2 * p.width : p.width;
    int wide = ceil_div(width, 256), narrow = ceil_div(width, 128);
    bool few = (int64_t)ceil_div(p.rows, WGMMA_ROWS) * wide < cuda_multiprocessors();
    bool fits = rows_product_bytes<FINISH, 256>(p.E) + 1024 <= cuda_shared_memory();
    if (few || !fits || 2 * wide * 10 > narrow * 11) {
        launch_rows<FINISH, GELU, ACROSS_B, 128>(p, weights, weight_rows, g);
    } else {
        launch_rows<FINISH, GELU, ACROSS_B, 256>(p, weights, weight_rows, g);
    }
}

#endif
