/* The products whose result has the rows of their left operand: up, down, hidden, input. They differ in where A and B
 * come from (load_tiles) and in what becomes of a tile's sums (grouped_wgmma_finish.cuh). A tile is 128
 * rows of one expert, 64 in hidden, by 128 or 256 columns of B. SwiGLU's up takes half of these from the gate's columns
 * and half from the same ones of up, so that a thread has both numbers of every element of h.
 *
 * Called by wgmma_up, wgmma_down, wgmma_hidden and wgmma_input (rows_product). Read first: grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_ROWS_CUH
#define KERNELS_GROUPED_WGMMA_ROWS_CUH

#include "grouped_wgmma_finish.cuh"

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

/* An expert's steps in another order: its rows come in runs, one for each rank that they go to (peers.h), and those of
 * all runs take turns, each rank beginning elsewhere. So at any time all ranks are stored to alike. */
__device__ static inline int dealt_step(int step, int steps, const RowTarget &to) {
    int run = step % to.ranks, first = run * (steps / to.ranks) + min(run, steps % to.ranks);
    return (first + step / to.ranks + (int)((int64_t)steps * to.rank / to.ranks)) % steps;
}

/* The tile (ROWS rows) of block `rank` in step `id` of the clusters; false past the last. The search goes on from the
 * expert in *tile, so ids must grow from call to call. Within an expert come the steps of a band of rows, column by
 * column, then those of the next band. The second block may find a tile without rows (row >= end): it loads for the
 * other, multiplies, and stores nothing. */
template <int FINISH>
__device__ static inline bool find_tile(Tile *tile, int id, uint32_t rank, const int *first_tile,
                                        const RowsProduct &p) {
    enum { ROWS = TILE_ROWS<FINISH> };
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
    int steps = first_tile[e + 1] - first_tile[e], height = min(band_steps, steps - band * band_steps);
    int step = band * band_steps + in_band % height;
    if (FINISH == FINISH_TO) {
        step = dealt_step(step, steps, p.to);
    }
    tile->row = p.offset[e] + (step * p.blocks + rank) * ROWS;
    tile->end = p.offset[e + 1];
    tile->column = in_band / height * p.columns;
    return true;
}

/* The loading warp group: all its threads where rows are fetched by index, one thread where TMA brings everything. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
__device__ static inline void load_tiles(RowsRing<FINISH, COLUMNS> ring, const int *first_tile,
                                         const CUtensorMap *a_map, const CUtensorMap *b_map, const RowsProduct &p) {
    enum { ROWS = TILE_ROWS<FINISH>, BELOW = LOADERS / 8 }; /* a thread copies rows t / 8, t / 8 + BELOW, ... */
    int t = threadIdx.x, piece = t % 8, step = gridDim.x / p.blocks;
    Tile tile = {0};
    for (int id = blockIdx.x / p.blocks; find_tile<FINISH>(&tile, id, ring.rank, first_tile, p); id += step) {
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

/* A multiplying warp group. rows_leaving: where those of finish_to wait. `used` is empty[] of the stage before: its
 * products are finished when at most the batch of this stage is not. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
__device__ static inline void multiply_tiles(RowsRing<FINISH, COLUMNS> ring, SavedBoxes saved, Turns turns,
                                             uint32_t rows_leaving, const int *first_tile, const CUtensorMap *saved_map,
                                             const RowsProduct &p) {
    enum { ROWS = TILE_ROWS<FINISH>, TURNS = 128 / ROWS }; /* a group takes every TURNS-th tile */
    int group = (threadIdx.x - LOADERS) / GROUP, t = threadIdx.x % GROUP, step = gridDim.x / p.blocks;
    int tile_stages = (p.inner + DEEP - 1) / DEEP, part = TURNS == 1 ? group : 0; /* of the tile's rows */
    Leaving<COLUMNS> leaving = leaving_open<COLUMNS>(rows_leaving, tile_stages);
    float sum[COLUMNS / 2];
    Tile tile = {0};
    int id = blockIdx.x / p.blocks;
    if (TURNS == 2 && group == 1) {
        id += step;
        ring.skip(tile_stages);
    }
    for (; find_tile<FINISH>(&tile, id, ring.rank, first_tile, p); id += TURNS * step) {
        if (FINISH == FINISH_HIDDEN) {
            ask_saved<GELU>(saved, saved_map, tile.column, tile.row, p.width);
            ask_saved<GELU>(saved, saved_map, tile.column + 64, tile.row, p.width);
        }
        if (TURNS == 2) {
            turns.await();
        }
        char *target = FINISH == FINISH_TO && t < 64 ? target_of(p, tile, tile.row + 64 * part + t) : NULL;
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
            if (FINISH == FINISH_TO && k == leaving.turn * DEEP) {
                leaving.leave();
            }
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
        } else if (FINISH == FINISH_TO) {
            finish_to<COLUMNS>(sum, leaving, target, p, tile);
        } else {
            finish_store(sum, p, tile, row);
        }
    }
    if (FINISH == FINISH_TO) {
        leaving.leave();
        store_wait();
    }
}

/* The loops over pieces of experts.c, one product of theirs. Of the steps a cluster takes every (gridDim.x / blocks)-th
 * one, a block its tile of it. Shared memory: boxes of a (hidden) | ring | barriers of boxes and turns (hidden), or
 * leaving rows | first_tile. */
template <int FINISH, bool GELU, int ACROSS_B, bool INDEXED, int COLUMNS>
static __global__ void __launch_bounds__(WGMMA_THREADS, 1)
    rows_product_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                        const __grid_constant__ CUtensorMap saved_map, const __grid_constant__ RowsProduct p) {
#ifdef HOPPER_CODE
    enum { ROWS = TILE_ROWS<FINISH> };
    extern __shared__ char memory[];
    uint32_t start = shared_address(memory) + (FINISH == FINISH_HIDDEN ? SavedBoxes::BYTES : 0);
    auto ring = ring_open<RowsRing<FINISH, COLUMNS>>(start, INDEXED ? LOADERS + 1 : 1, p.blocks);
    uint32_t after = ring.base + ring.BYTES, leaving = after;
    SavedBoxes saved = {};
    Turns turns = {};
    if (FINISH == FINISH_HIDDEN) {
        saved = saved_open(ring.base - SavedBoxes::BYTES, after);
        turns = turns_open(after + SavedBoxes::BARRIERS);
        after += SavedBoxes::BARRIERS + Turns::BYTES;
    } else if (FINISH == FINISH_TO) {
        after += Leaving<COLUMNS>::BYTES;
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
        multiply_tiles<FINISH, GELU, ACROSS_B, INDEXED, COLUMNS>(ring, saved, turns, leaving, first_tile, &saved_map,
                                                                 p);
    }
    cluster_end();
#endif
}

/* ---- the host's side ---- */

/* Shared memory of rows_product_kernel, from a multiple of 1024 on. */
template <int FINISH, int COLUMNS>
static size_t rows_product_bytes(int E) {
    size_t saved = FINISH == FINISH_HIDDEN ? SavedBoxes::BYTES + SavedBoxes::BARRIERS + Turns::BYTES : 0;
    size_t leaving = FINISH == FINISH_TO ? (int)Leaving<COLUMNS>::BYTES : 0;
    return RowsRing<FINISH, COLUMNS>::BYTES + saved + leaving + (E + 1) * sizeof(int);
}

/* A map that a kernel does not read is b_map once more. down and input have no rows by index, so no such kernel. */
template <int FINISH, bool GELU, int ACROSS_B, int COLUMNS>
static void launch_rows(RowsProduct p, const real_t *weights, int weight_rows, Grouped g) {
    enum { ROWS = TILE_ROWS<FINISH>, BY_INDEX = FINISH == FINISH_UP || FINISH == FINISH_HIDDEN };
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
    if (BY_INDEX && p.a.entry) {
        launch_wgmma(rows_product_kernel<FINISH, GELU, ACROSS_B, BY_INDEX, COLUMNS>, bytes, tiles, p.blocks, g.stream,
                     a_map, b_map, saved_map, p);
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
