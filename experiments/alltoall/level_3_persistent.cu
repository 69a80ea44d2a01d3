/* Level 3: memory is there before it is needed, and the host waits once.
 *
 *     once     arrays for the most rows that can come: ranks x tokens x K
 *     there    counts, wait, rows, records
 *     back     rows
 *
 * One idea more than level 2: what does not depend on this call is done before it. An allocation takes the host some
 * ten microseconds and giving it back waits for the device. The counts that go and those that come lie side by side and
 * reach the host in one copy, into memory that the device can write (pinned), after the exchange of counts.
 *
 * The one wait is what the exchange with counts needs: NCCL takes sizes from the host. Memory for the worst case is
 * what it costs; where that is too much, arrays that grow are as good.
 *
 * Expect: a fifth of level 2 where rows are few. What is left is the wait and the exchanges' launches. */
#include "alltoall.cuh"

enum { SORT_THREADS = 1024, WARPS = SORT_THREADS / 32, THREADS = 128 };

typedef struct {
    int expert, rank, token, choice;
} Record;

/* count (blocks, ranks). Grid: a thread to an entry. */
static __global__ void count_kernel(int *count, const int *expert, int entries, int experts, int ranks) {
    __shared__ int counted_here[MOST_RANKS];
    int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    if (threadIdx.x < ranks) {
        counted_here[threadIdx.x] = 0;
    }
    __syncthreads();
    if (i < entries) {
        atomicAdd(&counted_here[expert[i] / experts], 1);
    }
    __syncthreads();
    if (threadIdx.x < ranks) {
        count[blockIdx.x * ranks + threadIdx.x] = counted_here[threadIdx.x];
    }
}

/* Of rank r's rows, where this block's begin, and how many there are of all blocks: a warp asks. */
static __device__ int block_first(int *all, const int *count, int r, int ranks) {
    int before = 0, total = 0;
    for (int b = threadIdx.x % 32; b < gridDim.x; b += 32) {
        for (int lower = 0; lower < r; lower++) {
            before += count[b * ranks + lower];
        }
        before += b < blockIdx.x ? count[b * ranks + r] : 0;
        total += count[b * ranks + r];
    }
    *all = __reduce_add_sync(0xffffffffu, total);
    return __reduce_add_sync(0xffffffffu, before);
}

/* entry (rows), row (T,K) its inverse, send (ranks) = rows for each rank. Grid: a thread to an entry; warp r of a block
 * begins with rank r. */
static __global__ void place_kernel(int *entry, int *row, int *send, const int *count, const int *expert, int entries,
                                    int experts, int ranks) {
    __shared__ int next[WARPS][MOST_RANKS]; /* rows of a warp, then where they begin */
    int i = blockIdx.x * SORT_THREADS + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int r = i < entries ? expert[i] / experts : -1;
    unsigned same = __match_any_sync(0xffffffffu, r);
    int before = __popc(same & ((1u << lane) - 1));
    if (lane < ranks) {
        next[warp][lane] = 0;
    }
    __syncwarp();
    if (r >= 0 && before == 0) {
        next[warp][r] = __popc(same);
    }
    __syncthreads();
    if (warp < ranks) {
        int all, first = block_first(&all, count, warp, ranks);
        if (lane == 0) {
            for (int w = 0; w < WARPS; w++) {
                int own = next[w][warp];
                next[w][warp] = first;
                first += own;
            }
            if (blockIdx.x == 0) {
                send[warp] = all;
            }
        }
    }
    __syncthreads();
    if (r >= 0) {
        row[i] = next[warp][r] + before;
        entry[row[i]] = i;
    }
}

/* Grid: a block to a row. */
static __global__ void pack_kernel(Pack *rows, Record *record, const Pack *x, const int *entry, const int *expert,
                                   int rank, int K, int packs) {
    int row = blockIdx.x, i = entry[row], token = i / K;
    if (threadIdx.x == 0) {
        record[row] = {expert[i], rank, token, i % K};
    }
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        rows[(size_t)row * packs + p] = x[(size_t)token * packs + p];
    }
}

/* The experts. Grid: a block to a row. */
static __global__ void scale_kernel(Pack *rows, const Record *record, bool whole, int packs) {
    float scale = scale_at(record[blockIdx.x].expert, whole);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        Pack *pack = &rows[(size_t)blockIdx.x * packs + p];
        *pack = scaled_pack(*pack, scale);
    }
}

/* Grid: a block to a token. */
static __global__ void combine_kernel(Pack *y, const Pack *rows, const int *row, const float *weight, int K,
                                      int packs) {
    int t = blockIdx.x;
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        float sum[PACK] = {};
        for (int j = 0; j < K; j++) {
            add_pack(sum, rows[(size_t)row[t * K + j] * packs + p], weight[t * K + j]);
        }
        y[(size_t)t * packs + p] = rounded_pack(sum);
    }
}

static struct {
    int *count, *entry, *row;
    int *counts, *host_counts;         /* (2,ranks) rows to each rank, rows from each */
    Pack *home, *away;                 /* (T K, H), (ranks M K, H) */
    Record *home_record, *away_record; /* (T K), (ranks M K) */
} own;

static void prepare(const Task *task) {
    size_t entries = (size_t)task->T * task->K, most = (size_t)task->ranks * task->M * task->K;
    size_t blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    own.count = keep_array<int>(blocks * task->ranks);
    own.entry = keep_array<int>(entries);
    own.row = keep_array<int>(entries);
    own.counts = keep_array<int>(2 * task->ranks);
    own.home = keep_array<Pack>(entries * packs);
    own.away = keep_array<Pack>(most * packs);
    own.home_record = keep_array<Record>(entries);
    own.away_record = keep_array<Record>(most);
    CUDA(cudaMallocHost(&own.host_counts, 2 * task->ranks * sizeof(int)));
}

static void release(void) {
    CUDA(cudaFreeHost(own.host_counts));
}

static void run(const Task *task) {
    int entries = task->T * task->K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    int ranks = task->ranks, experts = task->experts, *send = own.counts, *receive = own.counts + ranks;
    int home_first[MOST_RANKS + 1], away_first[MOST_RANKS + 1];
    size_t row_bytes = task->H * sizeof(half);
    LAUNCH(count_kernel, blocks, SORT_THREADS, own.count, task->expert, entries, experts, ranks);
    LAUNCH(place_kernel, blocks, SORT_THREADS, own.entry, own.row, send, own.count, task->expert, entries, experts,
           ranks);
    exchange(receive, world.each, send, world.each, sizeof(int));
    download(own.host_counts, own.counts, 2 * ranks * sizeof(int));
    int out = rows_first(home_first, own.host_counts), in = rows_first(away_first, own.host_counts + ranks);

    LAUNCH(pack_kernel, out, THREADS, own.home, own.home_record, (const Pack *)task->x, own.entry, task->expert,
           task->rank, task->K, packs);
    exchange(own.away, away_first, own.home, home_first, row_bytes);
    exchange(own.away_record, away_first, own.home_record, home_first, sizeof(Record));
    LAUNCH(scale_kernel, in, THREADS, own.away, own.away_record, task->whole, packs);

    exchange(own.home, home_first, own.away, away_first, row_bytes);
    LAUNCH(combine_kernel, task->T, THREADS, (Pack *)task->y, own.home, own.row, task->weight, task->K, packs);
}

int main(int argc, char **argv) {
    return alltoall_ladder({"3 persistent", prepare, run, release}, argc, argv);
}
