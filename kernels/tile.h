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
};

/* c (TILE_ROWS, TILE_COLS) with row stride ldc; element (i,k) of a is a[i * a_row + k * a_col]; b packed (k,
 * TILE_COLS). */
__attribute__((always_inline)) static inline void tile_multiply(real_t *c, size_t ldc, const real_t *a, size_t a_row,
                                                                size_t a_col, const real_t *b, int k, int accumulate) {
    Vector sum[TILE_ROWS][TILE_VECTORS];
    for (int i = 0; i < TILE_ROWS; i++) {
        for (int j = 0; j < TILE_VECTORS; j++) {
            sum[i][j] = accumulate ? vector_load(c + i * ldc + j * VECTOR_LENGTH) : (Vector){0};
        }
    }
    for (int p = 0; p < k; p++) {
        Vector row[TILE_VECTORS];
        for (int j = 0; j < TILE_VECTORS; j++) {
            row[j] = vector_load(b + (size_t)p * TILE_COLS + j * VECTOR_LENGTH);
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
    } else if (b_row == 1 && cols == TILE_COLS) {
        /* a transpose in 4 x 4 blocks, which the compiler turns into register shuffles */
        typedef real_t Four __attribute__((vector_size(4 * sizeof(real_t))));
        typedef real_t FourUnaligned
            __attribute__((vector_size(4 * sizeof(real_t)), aligned(sizeof(real_t)), may_alias));
        int whole = k & ~3;
        for (int j = 0; j < TILE_COLS; j += 4) {
            const real_t *from = b + j * b_col;
            for (int p = 0; p < whole; p += 4) {
                Four r0 = *(const FourUnaligned *)(from + p);
                Four r1 = *(const FourUnaligned *)(from + b_col + p);
                Four r2 = *(const FourUnaligned *)(from + 2 * b_col + p);
                Four r3 = *(const FourUnaligned *)(from + 3 * b_col + p);
                real_t *to = packed + (size_t)p * TILE_COLS + j;
                *(FourUnaligned *)to = (Four){r0[0], r1[0], r2[0], r3[0]};
                *(FourUnaligned *)(to + TILE_COLS) = (Four){r0[1], r1[1], r2[1], r3[1]};
                *(FourUnaligned *)(to + 2 * TILE_COLS) = (Four){r0[2], r1[2], r2[2], r3[2]};
                *(FourUnaligned *)(to + 3 * TILE_COLS) = (Four){r0[3], r1[3], r2[3], r3[3]};
            }
        }
        for (int p = whole; p < k; p++) {
            for (int j = 0; j < TILE_COLS; j++) {
                packed[(size_t)p * TILE_COLS + j] = b[j * b_col + p];
            }
        }
    } else {
        for (int p = 0; p < k; p++) {
            for (int j = 0; j < cols; j++) {
                packed[(size_t)p * TILE_COLS + j] = b[p * b_row + j * b_col];
            }
        }
    }
}

/* packed (tiles, k, TILE_ROWS) = a (rows, k), rows past the edge zero. */
static inline void tile_pack_a(real_t *packed, const real_t *a, size_t a_row, size_t a_col, int k, int rows) {
    for (int first = 0; first < rows; first += TILE_ROWS) {
        int count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        real_t *tile = packed + (size_t)first * k;
        const real_t *from = a + first * a_row;
        if (count == TILE_ROWS && a_row == 1) {
            for (int p = 0; p < k; p++) {
                memcpy(tile + p * TILE_ROWS, from + p * a_col, sizeof(real_t) * TILE_ROWS);
            }
        } else {
            memset(tile, 0, sizeof(real_t) * (size_t)k * TILE_ROWS);
            for (int i = 0; i < count; i++) {
                for (int p = 0; p < k; p++) {
                    tile[p * TILE_ROWS + i] = from[i * a_row + p * a_col];
                }
            }
        }
    }
}

/* One tile with fewer than TILE_ROWS rows or TILE_COLS columns of c: computed whole in a buffer, so that the chain is
 * the same. */
static inline void tile_multiply_edge(real_t *c, size_t ldc, const real_t *a_packed, const real_t *b, int rows,
                                      int cols, int k, int accumulate) {
    real_t buffer[TILE_ROWS * TILE_COLS] __attribute__((aligned(64)));
    memset(buffer, 0, sizeof buffer);
    if (accumulate) {
        for (int i = 0; i < rows; i++) {
            memcpy(buffer + i * TILE_COLS, c + i * ldc, sizeof(real_t) * cols);
        }
    }
    tile_multiply(buffer, TILE_COLS, a_packed, 1, TILE_ROWS, b, k, 1);
    for (int i = 0; i < rows; i++) {
        memcpy(c + i * ldc, buffer + i * TILE_COLS, sizeof(real_t) * cols);
    }
}

/* c (m,n), rows ldc apart, = or += a (m,k) b (k,n); element (i,p) of a at a[i*a_row + p*a_col], (p,j) of b at b[p*b_row
 * + j*b_col]. One thread; needs no memory but its stack. */
static void block_multiply(real_t *c, size_t ldc, const real_t *a, size_t a_row, size_t a_col, const real_t *b,
                           size_t b_row, size_t b_col, int m, int n, int k, int accumulate) {
    real_t b_packed[TILE_DEPTH * TILE_COLS] __attribute__((aligned(64)));
    real_t a_packed[TILE_DEPTH * TILE_BLOCK] __attribute__((aligned(64)));
    if (k == 0 && !accumulate) {
        for (int i = 0; i < m; i++) {
            memset(c + i * ldc, 0, sizeof(real_t) * n);
        }
    }
    int block = a_col == 1 ? 4 * TILE_BLOCK : TILE_BLOCK;
    for (int i0 = 0; i0 < m; i0 += block) {
        int rows = m - i0 < block ? m - i0 : block;
        int whole = a_col == 1 ? rows - rows % TILE_ROWS : 0; /* rows read where they lie */
        for (int p0 = 0; p0 < k; p0 += TILE_DEPTH) {
            int depth = k - p0 < TILE_DEPTH ? k - p0 : TILE_DEPTH;
            int add = accumulate || p0 > 0;
            const real_t *a_block = a + i0 * a_row + p0 * a_col;
            tile_pack_a(a_packed, a_block + whole * a_row, a_row, a_col, depth, rows - whole);
            for (int j0 = 0; j0 < n; j0 += TILE_COLS) {
                int cols = n - j0 < TILE_COLS ? n - j0 : TILE_COLS;
                tile_pack_b(b_packed, b + p0 * b_row + j0 * b_col, b_row, b_col, depth, cols);
                real_t *c_block = c + i0 * ldc + j0;
                for (int i = 0; i < rows; i += TILE_ROWS) {
                    int left = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
                    real_t *c_tile = c_block + i * ldc;
                    if (i < whole && cols == TILE_COLS) {
                        tile_multiply(c_tile, ldc, a_block + i * a_row, a_row, 1, b_packed, depth, add);
                    } else if (i < whole) {
                        real_t tile[TILE_ROWS * TILE_DEPTH];
                        tile_pack_a(tile, a_block + i * a_row, a_row, 1, depth, TILE_ROWS);
                        tile_multiply_edge(c_tile, ldc, tile, b_packed, left, cols, depth, add);
                    } else if (left == TILE_ROWS && cols == TILE_COLS) {
                        const real_t *tile = a_packed + (size_t)(i - whole) * depth;
                        tile_multiply(c_tile, ldc, tile, 1, TILE_ROWS, b_packed, depth, add);
                    } else {
                        const real_t *tile = a_packed + (size_t)(i - whole) * depth;
                        tile_multiply_edge(c_tile, ldc, tile, b_packed, left, cols, depth, add);
                    }
                }
            }
        }
    }
}

/* The same, all of c (m,n) contiguous, with all threads: each takes blocks of c. Blocks divide the work; they do not
 * change bits. */
static inline void parallel_multiply(real_t *c, const real_t *a, size_t a_row, size_t a_col, const real_t *b,
                                     size_t b_row, size_t b_col, int m, int n, int k, int accumulate) {
    int block_rows = a_col == 1 ? 2 * TILE_BLOCK : TILE_BLOCK;
    int block_cols = 8 * TILE_COLS;
    int across = (n + block_cols - 1) / block_cols;
    int blocks = (m + block_rows - 1) / block_rows * across;
#pragma omp parallel for schedule(dynamic) if (blocks > 1)
    for (int block = 0; block < blocks; block++) {
        int i = block / across * block_rows;
        int j = block % across * block_cols;
        int rows = m - i < block_rows ? m - i : block_rows;
        int cols = n - j < block_cols ? n - j : block_cols;
        block_multiply(c + (size_t)i * n + j, n, a + i * a_row, a_row, a_col, b + j * b_col, b_row, b_col, rows, cols,
                       k, accumulate);
    }
}

#endif
