/* Level 3: copies at the rate of the memory. The sort is level 2's.
 *
 * One idea more than level 2: bytes in flight. A memory that answers after some 600 ns at 3 TB/s needs 2 MB on their
 * way at any time, 14 KB for each multiprocessor. So a thread moves 16 bytes at a time and asks for several before it
 * uses the first; and it goes by token, not by row: x is read once, and written to the K rows of its token.
 *
 * Where a choice's row is, the inverse of `entry`, the sort writes too.
 *
 * Expect: close to a plain copy within the device of as many bytes, less the sort. */
#include "../ladder.cuh"

enum { SORT_THREADS = 256, PER_BLOCK = 1024 }; /* choices to a block */

/* count[e][b] = choices of expert e among block b's. Grid: a block to PER_BLOCK choices. Counting in shared memory is
 * by atomics, but of integers: their sum has no order. */
static __global__ void count_kernel(int *count, const int *expert, int choices, int E) {
    extern __shared__ int counted[];
    for (int e = threadIdx.x; e < E; e += SORT_THREADS) {
        counted[e] = 0;
    }
    __syncthreads();
    int end = min(choices, (int)(blockIdx.x + 1) * PER_BLOCK);
    for (int i = blockIdx.x * PER_BLOCK + threadIdx.x; i < end; i += SORT_THREADS) {
        atomicAdd(&counted[expert[i]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += SORT_THREADS) {
        count[e * gridDim.x + blockIdx.x] = counted[e];
    }
}

/* count becomes its own exclusive sum over (expert, block): where each block's rows of each expert begin. One block: a
 * thread sums a run, the runs' sums are summed by doubling. */
static __global__ void sum_kernel(int *count, int *offset, int blocks, int E) {
    __shared__ int through[1024];
    int n = E * blocks, run = (n + 1023) / 1024, begin = min(n, (int)threadIdx.x * run), end = min(n, begin + run);
    int total = 0;
    for (int i = begin; i < end; i++) {
        total += count[i];
    }
    through[threadIdx.x] = total;
    for (int step = 1; step < 1024; step *= 2) {
        __syncthreads();
        int before = (int)threadIdx.x >= step ? through[threadIdx.x - step] : 0;
        __syncthreads();
        through[threadIdx.x] += before;
    }
    int sum = through[threadIdx.x] - total;
    for (int i = begin; i < end; i++) {
        int own = count[i];
        count[i] = sum;
        if (i % blocks == 0) {
            offset[i / blocks] = sum;
        }
        sum += own;
    }
    if (threadIdx.x == 1023) {
        offset[E] = sum;
    }
}

/* entry[row] = choice, row_of[choice] = row. Grid: a block to PER_BLOCK choices, one warp at work: 32 choices at a
 * time, in order. Lanes of the same expert find each other, and a lane's rank is the number of those before it. */
static __global__ void place_kernel(int *entry, int *row_of, const int *begin, const int *expert, int choices, int E) {
    extern __shared__ int next[];
    int lane = threadIdx.x;
    for (int e = lane; e < E; e += 32) {
        next[e] = begin[e * gridDim.x + blockIdx.x];
    }
    __syncwarp();
    for (int first = blockIdx.x * PER_BLOCK; first < min(choices, (int)(blockIdx.x + 1) * PER_BLOCK); first += 32) {
        int i = first + lane, e = i < choices ? expert[i] : E + lane;
        unsigned same = __match_any_sync(0xffffffffu, e);
        int rank = __popc(same & ((1u << lane) - 1)), row = e < E ? next[e] + rank : 0;
        __syncwarp();
        if (e < E) {
            entry[row] = i;
            row_of[i] = row;
            if (rank == 0) {
                next[e] += __popc(same);
            }
        }
        __syncwarp();
    }
}

static void sort_choices(int *entry, int *row_of, int *offset, const LadderTokens *in) {
    int blocks = (in->rows + PER_BLOCK - 1) / PER_BLOCK;
    int *count = (int *)ladder_memory(3, (size_t)in->E * blocks * sizeof(int));
    count_kernel<<<blocks, SORT_THREADS, in->E * sizeof(int)>>>(count, in->expert, in->rows, in->E);
    sum_kernel<<<1, 1024>>>(count, offset, blocks, in->E);
    place_kernel<<<blocks, 32, in->E * sizeof(int)>>>(entry, row_of, count, in->expert, in->rows, in->E);
}

enum { COPY_THREADS = 128, IN_FLIGHT = 4 };

/* Grid: a block to a token; a thread holds IN_FLIGHT packs of 16 bytes and stores them K times. */
static __global__ void copy_kernel(int4 *rows, const int4 *x, const int *row_of, int K, int packs) {
    const int4 *from = x + (size_t)blockIdx.x * packs;
    for (int first = threadIdx.x; first < packs; first += COPY_THREADS * IN_FLIGHT) {
        int4 pack[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            int at = first + i * COPY_THREADS;
            pack[i] = at < packs ? from[at] : int4{0, 0, 0, 0};
        }
        for (int j = 0; j < K; j++) {
            int4 *to = rows + (size_t)row_of[(size_t)blockIdx.x * K + j] * packs;
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                int at = first + i * COPY_THREADS;
                if (at < packs) {
                    to[at] = pack[i];
                }
            }
        }
    }
}

static DispatchResult dispatch(const LadderTokens *in) {
    bf16 *rows = (bf16 *)ladder_memory(0, (size_t)in->rows * in->C * sizeof(bf16));
    int *entry = (int *)ladder_memory(1, in->rows * sizeof(int));
    int *offset = (int *)ladder_memory(2, (in->E + 1) * sizeof(int));
    int *row_of = (int *)ladder_memory(4, in->rows * sizeof(int));
    sort_choices(entry, row_of, offset, in);
    copy_kernel<<<in->T, COPY_THREADS>>>((int4 *)rows, (const int4 *)in->x, row_of, in->K, in->C / 8);
    return {rows, entry, offset};
}

int main(void) {
    return dispatch_ladder("3 vectorised", dispatch);
}
