/* Level 4: what is said of a row travels with it.
 *
 *     row on the way there    H numbers, then its record in 8 bytes: token 24 bits, expert 12, rank 8, choice 4
 *     row on the way back     H numbers
 *
 *     there   counts, wait, rows with records
 *     back    rows
 *
 * One idea more than level 3: an exchange is paid by the piece, not by the byte. The record takes 8 bytes of a row of
 * some kilobytes; as an exchange of its own it took as long as a small exchange of rows. Rows stay whole packs of 16
 * bytes, so half a pack is lost. Of the record the expert alone is needed; the rest says of every row in a buffer whose
 * it is, which is what one wants to print when something is wrong.
 *
 * Expect: an exchange less, some 20 us of the host and 10 of the device where rows are few. */
#include "alltoall.cuh"

enum { SORT_THREADS = 1024, WARPS = SORT_THREADS / 32, THREADS = 128 };

/* In the pack after the row's numbers. */
typedef struct {
    uint64_t token : 24, expert : 12, rank : 8, choice : 4;
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

/* rows (rows, packs + 1). Grid: a block to a row. */
static __global__ void pack_kernel(Pack *rows, const Pack *x, const int *entry, const int *expert, int rank, int K,
                                   int packs) {
    int i = entry[blockIdx.x], token = i / K;
    Pack *row = rows + (size_t)blockIdx.x * (packs + 1);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        row[p] = x[(size_t)token * packs + p];
    }
    if (threadIdx.x == 0) {
        Record record = {};
        record.token = token;
        record.expert = expert[i];
        record.rank = rank;
        record.choice = i % K;
        *(Record *)&row[packs] = record;
    }
}

/* The experts: made (rows, packs) of rows (rows, packs + 1). Grid: a block to a row. */
static __global__ void scale_kernel(Pack *made, const Pack *rows, bool whole, int packs) {
    const Pack *row = rows + (size_t)blockIdx.x * (packs + 1);
    float scale = scale_at(((const Record *)&row[packs])->expert, whole);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        made[(size_t)blockIdx.x * packs + p] = scaled_pack(row[p], scale);
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
    int *counts, *host_counts; /* (2,ranks) rows to each rank, rows from each */
    Pack *home, *away;         /* (T K, H + PACK), (ranks M K, H + PACK) */
    Pack *made;                /* (ranks M K, H) */
} own;

static void prepare(const Task *task) {
    size_t entries = (size_t)task->T * task->K, most = (size_t)task->ranks * task->M * task->K;
    size_t blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    CHECK(task->M < 1 << 24 && task->E <= 1 << 12 && task->K <= 1 << 4, "alltoall: too many for a record of 8 bytes");
    own.count = keep_array<int>(blocks * task->ranks);
    own.entry = keep_array<int>(entries);
    own.row = keep_array<int>(entries);
    own.counts = keep_array<int>(2 * task->ranks);
    own.home = keep_array<Pack>(entries * (packs + 1));
    own.away = keep_array<Pack>(most * (packs + 1));
    own.made = keep_array<Pack>(most * packs);
    CUDA(cudaMallocHost(&own.host_counts, 2 * task->ranks * sizeof(int)));
}

static void release(void) {
    CUDA(cudaFreeHost(own.host_counts));
}

static void run(const Task *task) {
    int entries = task->T * task->K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    int ranks = task->ranks, experts = task->experts, *send = own.counts, *receive = own.counts + ranks;
    int home_first[MOST_RANKS + 1], away_first[MOST_RANKS + 1];
    LAUNCH(count_kernel, blocks, SORT_THREADS, own.count, task->expert, entries, experts, ranks);
    LAUNCH(place_kernel, blocks, SORT_THREADS, own.entry, own.row, send, own.count, task->expert, entries, experts,
           ranks);
    exchange(receive, world.each, send, world.each, sizeof(int));
    download(own.host_counts, own.counts, 2 * ranks * sizeof(int));
    int out = rows_first(home_first, own.host_counts), in = rows_first(away_first, own.host_counts + ranks);

    LAUNCH(pack_kernel, out, THREADS, own.home, (const Pack *)task->x, own.entry, task->expert, task->rank, task->K,
           packs);
    exchange(own.away, away_first, own.home, home_first, (packs + 1) * sizeof(Pack));
    LAUNCH(scale_kernel, in, THREADS, own.made, own.away, task->whole, packs);

    exchange(own.home, home_first, own.made, away_first, packs * sizeof(Pack));
    LAUNCH(combine_kernel, task->T, THREADS, (Pack *)task->y, own.home, own.row, task->weight, task->K, packs);
}

int main(int argc, char **argv) {
    return alltoall_ladder({"4 one message", prepare, run, release}, argc, argv);
}
