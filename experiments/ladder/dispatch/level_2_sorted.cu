/* Level 2: the same rows in the same order on every run. Positions come from a stable counting sort.
 *
 * One idea more than level 1: count first, per expert and block of choices; then where each block's share of each
 * expert begins is a prefix sum over (expert, block), and within a block the order is that of the choices. No position
 * depends on who came first. Rows of an expert end up in the order of their tokens.
 *
 * Expect: the same rate, because the copy is the same and takes most of the time; what is gained is that the result has
 * the same bits on every run, which is worth more than the microseconds. */
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

/* entry[row] = choice. Grid: a block to PER_BLOCK choices, one warp at work: 32 choices at a time, in order. Lanes of
 * the same expert find each other, and a lane's rank is the number of those before it. */
static __global__ void place_kernel(int *entry, const int *begin, const int *expert, int choices, int E) {
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
            if (rank == 0) {
                next[e] += __popc(same);
            }
        }
        __syncwarp();
    }
}

static void sort_choices(int *entry, int *offset, const LadderTokens *in) {
    int blocks = (in->rows + PER_BLOCK - 1) / PER_BLOCK;
    int *count = (int *)ladder_memory(3, (size_t)in->E * blocks * sizeof(int));
    count_kernel<<<blocks, SORT_THREADS, in->E * sizeof(int)>>>(count, in->expert, in->rows, in->E);
    sum_kernel<<<1, 1024>>>(count, offset, blocks, in->E);
    place_kernel<<<blocks, 32, in->E * sizeof(int)>>>(entry, count, in->expert, in->rows, in->E);
}

/* Grid: a thread to a number. */
static __global__ void copy_kernel(bf16 *rows, const bf16 *x, const int *entry, int K, int C, size_t numbers) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < numbers) {
        rows[i] = x[(size_t)(entry[i / C] / K) * C + i % C];
    }
}

static DispatchResult dispatch(const LadderTokens *in) {
    size_t numbers = (size_t)in->rows * in->C;
    bf16 *rows = (bf16 *)ladder_memory(0, numbers * sizeof(bf16));
    int *entry = (int *)ladder_memory(1, in->rows * sizeof(int));
    int *offset = (int *)ladder_memory(2, (in->E + 1) * sizeof(int));
    sort_choices(entry, offset, in);
    copy_kernel<<<(unsigned)((numbers + 255) / 256), 256>>>(rows, in->x, entry, in->K, in->C, numbers);
    return {rows, entry, offset};
}

int main(void) {
    return dispatch_ladder("2 sorted", dispatch);
}
