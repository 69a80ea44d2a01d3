/* What becomes of a tile's sums, in each of the products of grouped_wgmma_rows.cuh: finish_up, finish_store, finish_to,
 * finish_hidden. What such a product reads is here too. Called by multiply_tiles. Read first: grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_FINISH_CUH
#define KERNELS_GROUPED_WGMMA_FINISH_CUH

#include "grouped_tile.cuh"
#include "wgmma_ring.cuh"

enum {
    PART = 128,          /* columns that one partial sum of <u, h> covers */
    MOST_EXPERTS = 4096, /* their list fits beside the ring of narrow tiles */
};

enum Finish { FINISH_UP, FINISH_HIDDEN, FINISH_STORE, FINISH_TO };

/* Rows of a tile: 64 where the end of a tile is long (hidden: it reads a, and writes da and h). The groups then take
 * turns, and one finishes its tile while the other multiplies. */
template <int FINISH>
static const int TILE_ROWS = FINISH == FINISH_HIDDEN ? 64 : (int)WGMMA_ROWS;

/* The ring of a product leaves room for boxes of a (hidden), or for a finished tile (down, input to elsewhere). */
template <int FINISH, int COLUMNS>
using RowsRing = Ring<COLUMNS, TILE_ROWS<FINISH>,
                      FINISH == FINISH_HIDDEN ? 160
                      : FINISH == FINISH_TO   ? 144
                                              : 192>;

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
    float *part;  /* hidden: (parts, rows) sums of <u, h> over PART columns each, or NULL */
    RowTarget to; /* down, input to elsewhere: in place of out */
} RowsProduct;

/* Rows `row` .. row + TILE_ROWS - 1 (fewer, where `end` cuts) of an expert, columns of the result from `column` on. */
typedef struct {
    int expert, row, end, column;
} Tile;

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

/* down and input to elsewhere: a group's rows of a finished tile, which wait in shared memory for the copy engine. They
 * leave one by one while the group multiplies the next tile: all at once they would be more than a link to another card
 * takes at a time, and the tiles that the same engine loads would wait behind them. Of a group's threads 0 to 63 have a
 * row each. 64 bytes between rows: neighbours meet other banks. */
template <int COLUMNS>
struct Leaving {
    enum { STRIDE = COLUMNS * 2 + 64, GROUP_BYTES = 64 * STRIDE, BYTES = 2 * GROUP_BYTES };
    uint32_t rows; /* of the group */
    char *target;  /* of the thread's row; NULL: it has none that waits */
    int bytes;     /* of a row */
    int turn;      /* the stage of the next tile in which it leaves */

    __device__ void leave(void) {
        if (target) {
            store_run(target, rows + threadIdx.x % GROUP * STRIDE, bytes);
            store_commit();
            target = NULL;
        }
    }
};

/* In the first three quarters of a tile's stages, so that the last row has left when the tile ends. */
template <int COLUMNS>
__device__ static inline Leaving<COLUMNS> leaving_open(uint32_t rows, int stages) {
    int t = threadIdx.x % GROUP, group = threadIdx.x / GROUP - 1;
    return {rows + group * Leaving<COLUMNS>::GROUP_BYTES, NULL, 0, t < 64 ? t * stages * 3 / 256 : -1};
}

/* Where row `row` of the tile's columns goes; NULL: nowhere. */
__device__ static inline char *target_of(const RowsProduct &p, const Tile &tile, int row) {
    int entry = row < tile.end ? p.to.entry[row] : -1;
    size_t column = tile.column * sizeof(real_t);
    return entry < 0 ? NULL : (char *)peers_row(&p.to.rows, entry, p.width * sizeof(real_t)) + column;
}

/* target: of the thread's row. */
template <int COLUMNS, int COUNT>
__device__ static inline void finish_to(const float (&sum)[COUNT], Leaving<COLUMNS> &leaving, char *target,
                                        const RowsProduct &p, const Tile &tile) {
    enum { STRIDE = Leaving<COLUMNS>::STRIDE };
    int t = threadIdx.x % GROUP, group = threadIdx.x / GROUP;
    uint32_t at = leaving.rows + (t / 32 * 16 + t % 32 / 4) * STRIDE + t % 4 * 16;
    store_wait_read();
    group_sync(group); /* the tile before has left */
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < COUNT / 16; i++) {
            Pack<real_t> pack = row_pack(sum, 4 * i, half);
            store_16(at + half * 8 * STRIDE + i * 64, reinterpret_cast<const uint4 &>(pack));
        }
    }
    fence_async();
    group_sync(group);
    leaving.target = target;
    leaving.bytes = min(COLUMNS, p.width - tile.column) * (int)sizeof(real_t);
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

#endif
