/* The register tile: the one inner loop of every matrix product on the CPU.
 *
 *     c (m,n) = or +=  a (m,k) b (k,n),    a and b with any strides, so that a transpose costs nothing to say
 *
 * A tile of TILE_ROWS x TILE_COLS results stays in registers while k runs: each step loads one row of b, broadcasts
 * TILE_ROWS elements of a, and does TILE_ROWS * TILE_COLS fused multiply-adds. For that, b is copied panel by panel
 * (TILE_COLS wide, DEPTH deep: it stays in the L1 cache) into the order the tile reads it, and so is a where it is not
 * contiguous in k. (Goto, van de Geijn 2008.)
 *
 * Every result is one chain of fused multiply-adds in order of k, started from 0 or from c. Where a chain is cut by
 * DEPTH it is stored and taken up again, and edges are computed in full tiles, so neither blocking, nor the number of
 * threads, nor the rows beside it change a result's bits.
 *
 * Read by matmul.c, gate.c, experts.c and attention.c. Measured against OpenBLAS by `make bench`.
 */
#ifndef KERNELS_TILE_H
#define KERNELS_TILE_H

#include "device.h"
#include "vector.h"

/* As many accumulators as the registers hold beside one row of b and one broadcast. */
#if VECTOR_BYTES == 64
enum { TILE_ROWS = 12, TILE_VECTORS = 2 }; /* 24 of 32 registers */
#elif VECTOR_BYTES == 32
enum { TILE_ROWS = 6, TILE_VECTORS = 2 }; /* 12 of 16 */
#elif defined(__aarch64__)
enum { TILE_ROWS = 8, TILE_VECTORS = 3 }; /* 24 of 32 */
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 2 };
#endif

enum {
    TILE_COLS = TILE_VECTORS * VECTOR_LENGTH,
    TILE_DEPTH = 256,            /* inner extent of one panel */
    TILE_BLOCK = 24 * TILE_ROWS, /* rows that share a packed panel of b */
    CHUNK_PANELS = 8,            /* of c that are computed before the next rows of b are read */
    FEW_ROWS = 48,               /* of c: up to here b is read where it lies */
    FEW_COLS = 64,               /* of c: up to here a is, transposed or not */
};

/* c (TILE_ROWS, TILE_COLS), rows ldc apart; element (i,p) of a is a[i * a_row + p * a_col]; rows of b (k, TILE_COLS)
 * ldb apart. */
__attribute__((always_inline)) static inline void tile_multiply(real_t *c, size_t ldc, const real_t *a, size_t a_row,
                                                                size_t a_col, const real_t *b, size_t ldb, int k,
                                                                int accumulate) {
    Vector sum[TILE_ROWS][TILE_VECTORS];
    for (int i = 0; i < TILE_ROWS; i++) {
        for (int j = 0; j < TILE_VECTORS; j++) {
            sum[i][j] = accumulate ? vector_load(c + i * ldc + j * VECTOR_LENGTH) : (Vector){0};
        }
    }
    for (int p = 0; p < k; p++) {
        Vector row[TILE_VECTORS];
        for (int j = 0; j < TILE_VECTORS; j++) {
            row[j] = vector_load(b + p * ldb + j * VECTOR_LENGTH);
        }
        for (int i = 0; i < TILE_ROWS; i++) {
            real_t factor = a[i * a_row + p * a_col];
            for (int j = 0; j < TILE_VECTORS; j++) {
                sum[i][j] += factor * row[j];
            }
        }
    }
    for (int i = 0; i < TILE_ROWS; i++) {
        for (int j = 0; j < TILE_VECTORS; j++) {
            vector_store(c + i * ldc + j * VECTOR_LENGTH, sum[i][j]);
        }
    }
}

/* Four elements, and the choice of four out of two such vectors, which GCC and Clang spell differently. */
typedef real_t Four __attribute__((vector_size(4 * sizeof(real_t))));
typedef real_t FourUnaligned __attribute__((vector_size(4 * sizeof(real_t)), aligned(sizeof(real_t)), may_alias));
#ifdef REAL_DOUBLE
typedef int64_t FourIndex __attribute__((vector_size(32)));
#else
typedef int32_t FourIndex __attribute__((vector_size(16)));
#endif
#ifdef __clang__
#define FOUR_OF(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define FOUR_OF(x, y, i, j, k, l) __builtin_shuffle(x, y, (FourIndex){i, j, k, l})
#endif

/* to (4, 4), rows TILE_COLS apart = from (4, 4)^T, rows `stride` apart */
static inline void transpose_four(real_t *to, const real_t *from, size_t stride) {
    Four r0 = *(const FourUnaligned *)from;
    Four r1 = *(const FourUnaligned *)(from + stride);
    Four r2 = *(const FourUnaligned *)(from + 2 * stride);
    Four r3 = *(const FourUnaligned *)(from + 3 * stride);
    Four low01 = FOUR_OF(r0, r1, 0, 4, 1, 5), high01 = FOUR_OF(r0, r1, 2, 6, 3, 7);
    Four low23 = FOUR_OF(r2, r3, 0, 4, 1, 5), high23 = FOUR_OF(r2, r3, 2, 6, 3, 7);
    *(FourUnaligned *)to = FOUR_OF(low01, low23, 0, 1, 4, 5);
    *(FourUnaligned *)(to + TILE_COLS) = FOUR_OF(low01, low23, 2, 3, 6, 7);
    *(FourUnaligned *)(to + 2 * TILE_COLS) = FOUR_OF(high01, high23, 0, 1, 4, 5);
    *(FourUnaligned *)(to + 3 * TILE_COLS) = FOUR_OF(high01, high23, 2, 3, 6, 7);
}

/* packed (k, TILE_COLS) = b (k, cols), columns past the edge zero. b contiguous along its rows (b_col 1) or along k
 * (b_row 1). */
static inline void tile_pack_b(real_t *packed, const real_t *b, size_t b_row, size_t b_col, int k, int cols) {
    if (cols < TILE_COLS) {
        memset(packed, 0, sizeof(real_t) * (size_t)k * TILE_COLS);
    }
    if (b_col == 1 && cols == TILE_COLS) {
        for (int p = 0; p < k; p++) {
            memcpy(packed + (size_t)p * TILE_COLS, b + p * b_row, sizeof(real_t) * TILE_COLS);
        }
        return;
    }
    int by_four = b_row == 1 ? cols & ~3 : 0; /* columns that are transposed four at a time */
    int whole = k & ~3;
    for (int j = 0; j < by_four; j += 4) {
        for (int p = 0; p < whole; p += 4) {
            transpose_four(packed + (size_t)p * TILE_COLS + j, b + j * b_col + p, b_col);
        }
    }
    for (int p = 0; p < k; p++) {
        for (int j = p < whole ? by_four : 0; j < cols; j++) {
            packed[(size_t)p * TILE_COLS + j] = b[p * b_row + j * b_col];
        }
    }
}

/* packed (tiles, k, TILE_ROWS) = a (rows, k), rows past the edge zero. */
static inline void tile_pack_a(real_t *packed, const real_t *a, size_t a_row, size_t a_col, int k, int rows) {
    int whole = a_row == 1 ? rows / TILE_ROWS * TILE_ROWS : 0;
    for (int p = 0; p < k; p++) { /* a row of the transposed a at a time: it is read as it lies */
        for (int i = 0; i < whole; i += TILE_ROWS) {
            memcpy(packed + (size_t)i * k + p * TILE_ROWS, a + i + p * a_col, sizeof(real_t) * TILE_ROWS);
        }
    }
    for (int first = whole; first < rows; first += TILE_ROWS) {
        int count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        real_t *tile = packed + (size_t)first * k;
        const real_t *from = a + first * a_row;
        memset(tile, 0, sizeof(real_t) * (size_t)k * TILE_ROWS);
        for (int i = 0; i < count; i++) {
            for (int p = 0; p < k; p++) {
                tile[p * TILE_ROWS + i] = from[i * a_row + p * a_col];
            }
        }
    }
}

/* One tile with fewer than TILE_ROWS rows or TILE_COLS columns of c: computed whole in a buffer, so that the chain is
 * the same. */
static inline void tile_multiply_edge(real_t *c, size_t ldc, const real_t *a_packed, const real_t *b, size_t ldb,
                                      int rows, int cols, int k, int accumulate) {
    real_t buffer[TILE_ROWS * TILE_COLS] __attribute__((aligned(64)));
    memset(buffer, 0, sizeof buffer);
    if (accumulate) {
        for (int i = 0; i < rows; i++) {
            memcpy(buffer + i * TILE_COLS, c + i * ldc, sizeof(real_t) * cols);
        }
    }
    tile_multiply(buffer, TILE_COLS, a_packed, 1, TILE_ROWS, b, ldb, k, 1);
    for (int i = 0; i < rows; i++) {
        memcpy(c + i * ldc, buffer + i * TILE_COLS, sizeof(real_t) * cols);
    }
}

/* The tiles of one panel: c (rows, cols), cols <= TILE_COLS. The first `whole` rows of a are read where they lie, the
 * others from a_packed. */
static inline void panel_multiply(real_t *c, size_t ldc, const real_t *a, size_t a_row, size_t a_col,
                                  const real_t *a_packed, int whole, const real_t *b, size_t ldb, int rows, int cols,
                                  int depth, int accumulate) {
    real_t edge[TILE_ROWS * TILE_DEPTH];
    for (int i = 0; i < rows; i += TILE_ROWS) {
        int left = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
        const real_t *tile = i < whole ? a + i * a_row : a_packed + (size_t)(i - whole) * depth;
        if (left == TILE_ROWS && cols == TILE_COLS) {
            if (i >= whole) {
                tile_multiply(c + i * ldc, ldc, tile, 1, TILE_ROWS, b, ldb, depth, accumulate);
            } else if (a_col == 1) {
                tile_multiply(c + i * ldc, ldc, tile, a_row, 1, b, ldb, depth, accumulate);
            } else {
                tile_multiply(c + i * ldc, ldc, tile, 1, a_col, b, ldb, depth, accumulate);
            }
            continue;
        }
        if (i < whole) {
            tile_pack_a(edge, tile, a_row, a_col, depth, TILE_ROWS);
            tile = edge;
        }
        tile_multiply_edge(c + i * ldc, ldc, tile, b, ldb, left, cols, depth, accumulate);
    }
}

/* c (m,n), rows ldc apart, = or += a (m,k) b (k,n); element (i,p) of a at a[i*a_row + p*a_col], (p,j) of b at
 * b[p*b_row + j*b_col]; in each of a and b one of the two strides is 1. One thread; needs no memory but its stack.
 *
 * Whole tiles of an a with contiguous rows are read where they lie. A transposed a, and b, are copied into tile order
 * first, unless so little is computed with them (FEW_COLS, FEW_ROWS) that the copy would cost more than it saves. What
 * is computed between two copies fits the L2 cache: some rows of a, CHUNK_PANELS panels of c. */
static void block_multiply(real_t *c, size_t ldc, const real_t *a, size_t a_row, size_t a_col, const real_t *b,
                           size_t b_row, size_t b_col, int m, int n, int k, int accumulate) {
    real_t b_packed[TILE_DEPTH * TILE_COLS] __attribute__((aligned(64)));
    real_t a_packed[TILE_DEPTH * TILE_BLOCK] __attribute__((aligned(64)));
    int read_a = a_col == 1 || n <= FEW_COLS;
    int read_b = b_col == 1 && m <= FEW_ROWS;
    int block = read_a ? 2 * TILE_BLOCK : TILE_BLOCK;
    int chunk = read_a ? CHUNK_PANELS * TILE_COLS : n; /* a transposed a is copied once for all of c */
    for (int i = 0; i < m && k == 0 && !accumulate; i++) {
        memset(c + i * ldc, 0, sizeof(real_t) * n);
    }
    for (int i0 = 0; i0 < m; i0 += block) {
        int rows = m - i0 < block ? m - i0 : block;
        int whole = read_a ? rows - rows % TILE_ROWS : 0; /* rows read where they lie */
        for (int j0 = 0; j0 < n; j0 += chunk) {
            int end = n - j0 < chunk ? n : j0 + chunk;
            for (int p0 = 0; p0 < k; p0 += TILE_DEPTH) {
                int depth = k - p0 < TILE_DEPTH ? k - p0 : TILE_DEPTH;
                const real_t *a_block = a + i0 * a_row + p0 * a_col;
                tile_pack_a(a_packed, a_block + whole * a_row, a_row, a_col, depth, rows - whole);
                for (int j = j0; j < end; j += TILE_COLS) {
                    int cols = end - j < TILE_COLS ? end - j : TILE_COLS;
                    const real_t *panel = b + p0 * b_row + j * b_col;
                    size_t ldb = b_row;
                    if (!read_b || cols < TILE_COLS) {
                        tile_pack_b(b_packed, panel, b_row, b_col, depth, cols);
                        panel = b_packed;
                        ldb = TILE_COLS;
                    }
                    panel_multiply(c + i0 * ldc + j, ldc, a_block, a_row, a_col, a_packed, whole, panel, ldb, rows,
                                   cols, depth, accumulate || p0 > 0);
                }
            }
        }
    }
}

/* The same, all of c (m,n) contiguous, with all threads: each takes blocks of c, smaller ones where there would be too
 * few to go round. Blocks divide the work; they do not change bits. */
static inline void parallel_multiply(real_t *c, const real_t *a, size_t a_row, size_t a_col, const real_t *b,
                                     size_t b_row, size_t b_col, int m, int n, int k, int accumulate) {
    int rows = TILE_BLOCK, cols = 8 * TILE_COLS, wanted = 4 * device_threads(), across, blocks;
    for (;;) {
        across = (n + cols - 1) / cols;
        blocks = (m + rows - 1) / rows * across;
        if (blocks >= wanted || rows == 4 * TILE_ROWS) {
            break;
        }
        rows = rows > 8 * TILE_ROWS ? rows / 2 / TILE_ROWS * TILE_ROWS : 4 * TILE_ROWS;
        cols = cols > 2 * TILE_COLS ? cols / 2 : cols;
    }
#pragma omp parallel for schedule(dynamic) if (blocks > 1)
    for (int block = 0; block < blocks; block++) {
        int i = block / across * rows, j = block % across * cols;
        int block_rows = m - i < rows ? m - i : rows;
        int block_cols = n - j < cols ? n - j : cols;
        block_multiply(c + (size_t)i * n + j, n, a + i * a_row, a_row, a_col, b + j * b_col, b_row, b_col, block_rows,
                       block_cols, k, accumulate);
    }
}

#endif
