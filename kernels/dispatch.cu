/* Rows by index. The expert products fetch rows of x themselves, so dispatch and the backward of combine hand over the
 * index and move nothing; what is left are sums over a token's rows, and dispatch_copy for who sends rows elsewhere.
 *
 * Both kernels go by token: blockDim.x threads take one, blockDim.y tokens make a block. Copying, a row of x is read
 * once however many experts it goes to; summing, the rows of a token are all on their way before the first is used.
 * Columns go in packs of 16 bytes, or one at a time where rows do not begin at such addresses.
 *
 * Called by model/exchange_rows.c. Read next: experts.cu.
 */
#include "cuda.cuh"

#include <type_traits>

extern "C" {
#include "dispatch.h"
}

enum {
    THREADS = 256,
    IN_FLIGHT = 8,     /* loads of a thread before it uses the first */
    BLOCKS_PER_SM = 3, /* of sums: a token's rows are waited for twice, for their index and for themselves */
};

/* Where a kernel writes its rows: one after the other, or in other ranks' memory; and which of N rows is the i-th to be
 * written: in turn one for each rank, for rows in order would go to one rank alone, and all ranks would write to it. */
struct RowsHere {
    real_t *rows;
    __device__ real_t *at(int r, int C) const {
        return rows + (size_t)r * C;
    }
    __device__ int dealt(int i, int N) const {
        return i;
    }
};
struct RowsThere {
    PeerRows rows;
    __device__ real_t *at(int r, int C) const {
        return (real_t *)peers_row(&rows, r, C * sizeof(real_t));
    }
    __device__ int dealt(int i, int N) const {
        int ranks = N / rows.places;
        return i % ranks * rows.places + i / ranks;
    }
};

/* A column: as many neighbouring numbers as one instruction moves. */
template <bool PACKED>
struct Column {
    enum { WIDTH = PACKED ? Pack<real_t>::COUNT : 1 };
    Pack<real_t> pack; /* the first WIDTH of it */
};

/* Zeros where there is none. */
template <bool PACKED>
__device__ static inline Column<PACKED> load_column(bool there, const real_t *from) {
    Column<PACKED> column = {};
    if constexpr (PACKED) {
        column.pack = load_pack_if(there, from);
    } else if (there) {
        column.pack.v[0] = *from;
    }
    return column;
}

template <bool PACKED>
__device__ static inline void store_column(real_t *to, const Column<PACKED> &column) {
    if constexpr (PACKED) {
        store_pack(to, column.pack);
    } else {
        *to = column.pack.v[0];
    }
}

/* Blocks and blockDim.y replace the loop over tokens, blockDim.x and COLUMNS that over the C numbers of a row. Blocks
 * beyond the tokens' do the same for the rows, of which they clear those without an entry. */
template <bool PACKED, int COLUMNS, class Rows>
__global__ static void __launch_bounds__(THREADS)
    copy_kernel(Rows rows, const real_t *x, const int *row, const int *entry, const int *computed, int token_blocks,
                int N, int K, int C) {
    enum { WIDTH = Column<PACKED>::WIDTH };
    int n = blockIdx.x * blockDim.y + threadIdx.y, r = n - token_blocks * (int)blockDim.y;
    bool clears = (int)blockIdx.x >= token_blocks;
    if (clears ? r >= *computed || entry[r] >= 0 : n >= N) {
        return;
    }
    int columns = C / WIDTH, step = blockDim.x;
    for (int first = threadIdx.x; first < columns; first += COLUMNS * step) {
        Column<PACKED> column[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            bool there = !clears && first + i * step < columns;
            column[i] = load_column<PACKED>(there, x + (size_t)n * C + (first + i * step) * WIDTH);
        }
        for (int j = 0; j < (clears ? 1 : K); j++) {
            int target = clears ? r : row[(size_t)n * K + j];
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                if (target >= 0 && first + i * step < columns) {
                    store_column<PACKED>(rows.at(target, C) + (first + i * step) * WIDTH, column[i]);
                }
            }
        }
    }
}

/* A block of THREADS: enough threads for a token's columns, `each` per thread, and as many tokens as fill it. */
static dim3 token_block(int columns, int each) {
    unsigned threads = 1;
    while (threads < THREADS && threads * each < (unsigned)columns) {
        threads *= 2;
    }
    return dim3(threads, THREADS / threads);
}

/* clears: rows without an entry, in layouts that have such. */
template <bool PACKED, class Rows>
static void copy_rows(Rows rows, const real_t *x, const Plan *plan, bool clears, int C, cudaStream_t stream) {
    enum { COLUMNS = 4 };
    dim3 block = token_block(C / Column<PACKED>::WIDTH, COLUMNS);
    int token_blocks = ceil_div(plan->N, block.y);
    int row_blocks = !clears || plan->layout == LAYOUT_COMPACT ? 0 : ceil_div(plan->rows, block.y);
    copy_kernel<PACKED, COLUMNS><<<token_blocks + row_blocks, block, 0, stream>>>(
        rows, x, plan->row, plan->entry, plan->offset + plan->E, token_blocks, plan->N, plan->K, C);
    CUDA_LAUNCHED();
}

/* Whether a token has no row. */
__device__ static inline bool rowless(const int *row, int K) {
    int highest = -1;
    for (int j = 0; j < K; j++) {
        highest = max(highest, row[j]);
    }
    return highest < 0;
}

/* y[n] (+)= sum_j weight[n,j] rows[row[n,j]], a weight of 1 when there are none; ROWS of the sum at a time. Blocks and
 * blockDim.y replace the loop over tokens, blockDim.x and the columns of a thread that over the C numbers of a row. To
 * other ranks nothing goes of a token without rows. */
template <bool PACKED, int ROWS, class Rows>
__global__ static void __launch_bounds__(THREADS, ROWS == 1 ? 2 : BLOCKS_PER_SM)
    gather_sum_kernel(Rows sums, const real_t *rows, const float *weight, const int *row, int N, int K, int C,
                      int accumulate) {
    enum { WIDTH = Column<PACKED>::WIDTH, COLUMNS = IN_FLIGHT / ROWS };
    int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) {
        return;
    }
    n = sums.dealt(n, N);
    row += (size_t)n * K;
    if (std::is_same<Rows, RowsThere>::value && rowless(row, K)) {
        return;
    }
    real_t *y = sums.at(n, C);
    int columns = C / WIDTH, step = blockDim.x;
    for (int first = threadIdx.x; first < columns; first += COLUMNS * step) {
        float sum[COLUMNS][WIDTH] = {};
        for (int i = 0; accumulate && i < COLUMNS; i++) {
            bool there = first + i * step < columns;
            Column<PACKED> before = load_column<PACKED>(there, y + (first + i * step) * WIDTH);
            for (int k = 0; k < WIDTH; k++) {
                sum[i][k] = float_at(before.pack, k);
            }
        }
        for (int j0 = 0; j0 < K; j0 += ROWS) {
            Column<PACKED> column[ROWS][COLUMNS];
            float w[ROWS];
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                int from = j0 + j < K ? row[j0 + j] : -1;
                w[j] = from < 0 ? 0.0f : weight ? weight[(size_t)n * K + j0 + j] : 1.0f;
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    bool there = from >= 0 && first + i * step < columns;
                    column[j][i] = load_column<PACKED>(there, rows + (size_t)from * C + (first + i * step) * WIDTH);
                }
            }
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
                    for (int k = 0; k < WIDTH; k++) {
                        sum[i][k] += w[j] * float_at(column[j][i].pack, k);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            if (first + i * step < columns) {
                Column<PACKED> column;
                for (int k = 0; k < WIDTH; k++) {
                    column.pack.v[k] = to_real<real_t>(sum[i][k]);
                }
                store_column<PACKED>(y + (first + i * step) * WIDTH, column);
            }
        }
    }
}

template <bool PACKED, int ROWS, class Rows>
static void gather_rows(Rows y, const real_t *rows, const float *weight, const Plan *plan, int C, int accumulate,
                        cudaStream_t stream) {
    dim3 block = token_block(C / Column<PACKED>::WIDTH, IN_FLIGHT / ROWS);
    gather_sum_kernel<PACKED, ROWS>
        <<<ceil_div(plan->N, block.y), block, 0, stream>>>(y, rows, weight, plan->row, plan->N, plan->K, C, accumulate);
    CUDA_LAUNCHED();
}

/* packed: whether rows on both sides begin at multiples of 16 bytes. */
template <class Rows>
static void gather_sum(Rows y, bool packed, const real_t *rows, const float *weight, const Plan *plan, int C,
                       int accumulate, cudaStream_t stream) {
    if (plan->N == 0) {
        return;
    }
    if (!packed || !packs_fit(rows, C)) {
        gather_rows<false, 4>(y, rows, weight, plan, C, accumulate, stream);
    } else if (plan->K == 1) {
        gather_rows<true, 1>(y, rows, weight, plan, C, accumulate, stream);
    } else if (plan->K == 2) {
        gather_rows<true, 2>(y, rows, weight, plan, C, accumulate, stream);
    } else if (plan->K <= 4) {
        gather_rows<true, 4>(y, rows, weight, plan, C, accumulate, stream);
    } else {
        gather_rows<true, 8>(y, rows, weight, plan, C, accumulate, stream);
    }
}

static void gather_here(real_t *y, const real_t *rows, const float *weight, const Plan *plan, int C, int accumulate,
                        Stream *stream) {
    gather_sum(RowsHere{y}, packs_fit(y, C), rows, weight, plan, C, accumulate, cuda_stream(stream));
}

bool dispatch_copies(void) {
    return false;
}

void dispatch_copy(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    if (packs_fit(rows, C) && packs_fit(x, C)) {
        copy_rows<true>(RowsHere{rows}, x, plan, true, C, cuda_stream(stream));
    } else {
        copy_rows<false>(RowsHere{rows}, x, plan, true, C, cuda_stream(stream));
    }
}

RowSource dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    return {x, plan->entry, plan->K};
}

void dispatch_backward(real_t *dx, const real_t *drows, const Plan *plan, int C, int accumulate, Stream *stream) {
    gather_here(dx, drows, NULL, plan, C, accumulate, stream);
}

void combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream) {
    gather_here(y, rows, plan->weight, plan, C, accumulate, stream);
}

RowSource combine_backward(real_t *drows, const real_t *dy, const Plan *plan, int C, Stream *stream) {
    return dispatch_forward(drows, dy, plan, C, stream);
}

/* Rows of all ranks begin alike: the arena's pieces do, and places of whole rows follow. */
void dispatch_put(PeerRows to, const real_t *x, const Plan *plan, int C, Stream *stream) {
    if (packs_fit((real_t *)to.of[0], C) && packs_fit(x, C)) {
        copy_rows<true>(RowsThere{to}, x, plan, false, C, cuda_stream(stream));
    } else {
        copy_rows<false>(RowsThere{to}, x, plan, false, C, cuda_stream(stream));
    }
}

void combine_put(PeerRows to, const real_t *rows, const Plan *plan, bool weighted, int C, Stream *stream) {
    gather_sum(RowsThere{to}, packs_fit((real_t *)to.of[0], C), rows, weighted ? plan->weight : NULL, plan, C, 0,
               cuda_stream(stream));
}

/* blockDim.y rows to a block, blockDim.x columns of each at a time. */
template <bool PACKED>
__global__ static void __launch_bounds__(THREADS)
    rows_put_kernel(RowTarget to, const real_t *rows, const int *offset, int E, int C) {
    enum { WIDTH = Column<PACKED>::WIDTH };
    int r = blockIdx.x * blockDim.y + threadIdx.y;
    int entry = r >= offset[0] && r < offset[E] ? to.entry[r] : -1;
    if (entry < 0) {
        return;
    }
    real_t *target = RowsThere{to.rows}.at(entry, C);
    for (int i = threadIdx.x * WIDTH; i < C; i += blockDim.x * WIDTH) {
        store_column<PACKED>(target + i, load_column<PACKED>(true, rows + (size_t)r * C + i));
    }
}

template <bool PACKED>
static void put_rows(RowTarget to, const real_t *rows, const int *offset, int E, int most, int C, cudaStream_t stream) {
    dim3 block = token_block(C / Column<PACKED>::WIDTH, 4);
    rows_put_kernel<PACKED><<<ceil_div(most, block.y), block, 0, stream>>>(to, rows, offset, E, C);
    CUDA_LAUNCHED();
}

void rows_put(RowTarget to, const real_t *rows, const int *offset, int E, int most, int C, Stream *stream) {
    if (most == 0) {
        return;
    }
    if (packs_fit((real_t *)to.rows.of[0], C) && packs_fit(rows, C)) {
        put_rows<true>(to, rows, offset, E, most, C, cuda_stream(stream));
    } else {
        put_rows<false>(to, rows, offset, E, most, C, cuda_stream(stream));
    }
}
