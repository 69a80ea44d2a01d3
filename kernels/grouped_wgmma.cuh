/* The grouped products on Hopper. One persistent block per multiprocessor takes tiles of the result, 128 rows by 128 or
 * 256 columns, one after the other. Its 384 threads are three warp groups with two jobs, joined by a ring of stages in
 * shared memory; a stage holds 64 steps of the inner width for one tile:
 *
 *     warp group 0     loads      wait(empty[s])   copy A and B into stage s    -> full[s]      s + 1, ..., next tile
 *     warp groups 1, 2 multiply   wait(full[s])    64 rows each: sum += A B     -> empty[s]     s + 1, ...
 *                                 end of the tile: activation, store; the next tile's loads run meanwhile
 *
 *     shared memory    | stage 0 | stage 1 | ...  192 KB | full[] | empty[] | row tiles before each expert |
 *     stage            | A of group 1, 8 KB | A of group 2, 8 KB | B, read by both, 16 or 32 KB |
 *
 * Barriers. full[s] ends its phase when everything of the stage has arrived: the bytes that TMA was told to bring, and,
 * where rows are fetched by index, one arrival from each of the 128 loading threads, which the hardware makes when that
 * thread's cp.async are done. empty[s] ends when one thread of each multiplying group has arrived; it does so when the
 * group's wgmma on the stage are finished, which is asked one stage late, so that the tensor cores always have the next
 * batch queued. (That one thread speaks for its group rests on the four warps' parts of a wgmma being finished
 * together.) Nothing else has to meet: a tile's sums stay in registers, and each warp stores its own 16 rows. A
 * barrier knows laps of the ring by parity alone: who waits for a lap must have waited for the one before.
 *
 * Pairs. What all multiprocessors read from L2 in a stage's time is near what L2 can give, and costs power, which is
 * what limits a training step. So two blocks form a cluster and take tiles below each other: the same B. Each loads
 * half of it, and TMA writes that half into both blocks' shared memory and tells both full[s]: 32 KB of reads instead
 * of 48. In return a stage may be filled again only when it is read in both blocks: empty[s] counts the groups of both,
 * and each group tells both. They reach into each other's shared memory, so they end together (cluster_end). Where
 * experts have few rows a cluster is one block (cluster_blocks).
 *
 * Turns. At the end of a tile of `hidden` a is read and da and h are written, five times the bytes of a tile of u, and
 * the tensor cores would wait. There the groups share no tile: each takes every second one, 64 rows, and one stores
 * while the other multiplies (Turns). What a group reads of a comes through two places of its own (SavedBoxes).
 *
 * Rows for elsewhere. down and input can send each row to where it is wanted, such as another card's memory. There the
 * groups put their tile into shared memory, and the copy engine takes the rows from it while they multiply the next
 * (finish_to); the ring is a stage shorter for that. An expert's rows come by the card that they go to, so tiles are
 * taken from all over the expert, in an order that stores to all cards alike (dealt_step).
 *
 * Dealing out. Tiles of rows are alike, and block b takes the b-th, the (b + 132)-th, ... A tile of a weight gradient
 * takes as long as its expert has rows, so there the longest come first, and every second round is dealt backwards
 * (dealt in grouped_wgmma_weight.cuh).
 *
 * Operands. Weights come by TMA from one map over (E, rows, columns), as do rows that lie in order; both arrive
 * swizzled (wgmma.cuh). A box that runs past the expert's last row brings rows of the next one: each row makes only its
 * own row of the result, which is not stored. Rows by index are fetched by threads, 16 bytes a copy, into the same
 * layout; missing ones are zeros. Those copies and wgmma see shared memory by different paths: the reader's
 * fence_async, after full[s], makes the one visible to the other. Where the inner width is not the contiguous one
 * (hidden, input, weight) the operand lies "across", which wgmma reads as it is: nothing is transposed.
 *
 * Tiles of an expert go in bands: 2048 rows by all column tiles, then the next 2048. What the multiprocessors work on
 * at the same time then shares rows and weights, and L2 serves them.
 *
 * The sum of an element runs over the inner width in ascending order, 16 at a time, into one register, whatever the
 * tile: a row's bits depend on nothing but the row.
 *
 * Called by experts.cu. Read next: wgmma.cuh, wgmma_ring.cuh, grouped_wgmma_rows.cuh, grouped_wgmma_finish.cuh,
 * grouped_wgmma_weight.cuh. */
#ifndef KERNELS_GROUPED_WGMMA_CUH
#define KERNELS_GROUPED_WGMMA_CUH

#include "grouped_wgmma_rows.cuh"
#include "grouped_wgmma_weight.cuh"

enum { MARKER_BYTES = 8192 }; /* more than a card reserves in each block for itself */

/* Never launched: its shared memory is there in Hopper's code alone. */
static __global__ void wgmma_marker_kernel(void) {
#ifdef HOPPER_CODE
    __shared__ volatile char marker[MARKER_BYTES];
    marker[threadIdx.x] = 1;
#endif
}

/* Whether the code that this card runs has Hopper's own instructions. Code for its forerunners, and what the driver
 * makes of their PTX, runs on Hopper too. */
static bool wgmma_is_built(void) {
    static int known = 0, built = 0;
    if (!known) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, wgmma_marker_kernel));
        built = attributes.sharedSizeBytes >= MARKER_BYTES;
        known = 1;
    }
    return built;
}

/* Beside what all tensor cores ask of widths and addresses (choose_path). */
static bool wgmma_fits(Grouped g) {
    return cuda_capability() == 90 && wgmma_is_built() && g.shape.E <= MOST_EXPERTS;
}

static void wgmma_up(real_t *a, real_t *h, RowSource x, const real_t *w1, Grouped g) {
    RowsProduct p = {};
    p.a = x;
    p.inner = g.shape.C;
    p.width = g.shape.H;
    p.out = a;
    p.h = h;
    if (g.shape.act == ACT_GELU) {
        rows_product<FINISH_UP, true, 0>(p, w1, g.shape.H, g);
    } else {
        rows_product<FINISH_UP, false, 0>(p, w1, 2 * g.shape.H, g);
    }
}

static void wgmma_down(real_t *y, const real_t *h, const real_t *w2, int add, Grouped g) {
    RowsProduct p = {};
    p.a.x = h;
    p.inner = g.shape.H;
    p.width = g.shape.C;
    p.out = y;
    p.add = add;
    rows_product<FINISH_STORE, false, 0>(p, w2, g.shape.C, g);
}

/* The same, each row to its target. */
static void wgmma_down_to(RowTarget to, const real_t *h, const real_t *w2, Grouped g) {
    RowsProduct p = {};
    p.a.x = h;
    p.inner = g.shape.H;
    p.width = g.shape.C;
    p.to = to;
    rows_product<FINISH_TO, false, 0>(p, w2, g.shape.C, g);
}

static void wgmma_hidden(real_t *h, real_t *da, acc_t *drow_weight, RowSource dy, const real_t *a,
                         const acc_t *row_weight, const real_t *w2, Grouped g) {
    RowsProduct p = {};
    int parts = ceil_div(g.shape.H, PART);
    p.a = dy;
    p.inner = g.shape.C;
    p.width = g.shape.H;
    p.h = h;
    p.da = da;
    p.saved = a;
    p.row_weight = row_weight;
    p.part = drow_weight ? (float *)cuda_workspace(sizeof(float) * parts * g.shape.rows) : NULL;
    if (g.shape.act == ACT_GELU) {
        rows_product<FINISH_HIDDEN, true, 1>(p, w2, g.shape.C, g);
    } else {
        rows_product<FINISH_HIDDEN, false, 1>(p, w2, g.shape.C, g);
    }
    sum_parts(drow_weight, p.part, parts, g);
}

static void wgmma_input(real_t *dx, const real_t *da, const real_t *w1, int add, Grouped g) {
    RowsProduct p = {};
    p.a.x = da;
    p.inner = experts_a_width(g.shape);
    p.width = g.shape.C;
    p.out = dx;
    p.add = add;
    rows_product<FINISH_STORE, false, 1>(p, w1, experts_a_width(g.shape), g);
}

static void wgmma_input_to(RowTarget to, const real_t *da, const real_t *w1, Grouped g) {
    RowsProduct p = {};
    p.a.x = da;
    p.inner = experts_a_width(g.shape);
    p.width = g.shape.C;
    p.to = to;
    rows_product<FINISH_TO, false, 1>(p, w1, experts_a_width(g.shape), g);
}

/* Wide tiles, unless narrow ones fill the card better. Time is counted in narrow tiles' time, of which a wide one takes
 * two, less what it saves by reading A once. */
static void wgmma_weight(acc_t *dw, RowSource left, RowSource right, int M, int N, int add, Grouped g) {
    WeightProduct p = {};
    p.turned = right.entry != NULL;
    p.left = p.turned ? right : left;
    p.right = p.turned ? left : right;
    p.M = p.turned ? N : M;
    p.N = p.turned ? M : N;
    p.dw = dw;
    p.offset = g.offset;
    p.E = g.shape.E;
    p.add = add;
    if (g.shape.rows == 0) {
        if (!add) {
            CUDA_CHECK(cudaMemsetAsync(dw, 0, (size_t)p.E * M * N * sizeof(acc_t), g.stream));
        }
        return;
    }
    int64_t down = (int64_t)g.shape.E * ceil_div(p.M, WGMMA_ROWS);
    int64_t wide = down * ceil_div(p.N, 256), narrow = down * ceil_div(p.N, 128);
    int blocks = cuda_multiprocessors();
    if (ceil_div(wide, blocks) * 18 <= ceil_div(narrow, blocks) * 10) {
        launch_weight<256>(p, wide, g);
    } else {
        launch_weight<128>(p, narrow, g);
    }
}

#endif
