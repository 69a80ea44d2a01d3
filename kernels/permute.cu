/* The stable counting sort of a plan in two launches, one where a single block can do it; nothing comes to the host.
 *
 *     count_kernel   every block counts the experts of its run of entries        -> partial (blocks,E)
 *     place_kernel   every block adds up the counts of all blocks, so it knows offset and where its own entries begin;
 *                    its warps take runs in order; in a warp the lanes of one expert are ranked by match
 *
 * Ranks are counts of earlier entries: whole numbers, so the result is the CPU's whatever the grid. Without a capacity,
 * or with places for the earlier tokens, the rank alone decides. The two other policies first mark in plan->row who is
 * accepted, then sort those:
 *
 *     by slot     place_kernel over the entries in the order of the slots, which only judges
 *     by weight   a sort by expert, then heaviest_kernel: a block per expert
 *
 * Called by model/moe.c. Read next: dispatch.cu.
 */
#include "cuda.cuh"

extern "C" {
#include "permute.h"
#include "plan_rows.h"
}

enum {
    MOST_WARPS = 32,
    ONE_BLOCK = 8192,       /* entries up to which a second launch costs more than other blocks save */
    MOST_BLOCKS = 128,      /* all add up the counts of all: more would read more than they sort */
    EASY_SHARED = 48 << 10, /* bytes of shared memory that need no asking */
};

/* What is sorted, and what is wanted of it: arrays that are NULL are not written. */
typedef struct {
    const int *expert;   /* (N,K) */
    const float *weight; /* (N,K) */
    const int *admitted; /* (N,K) only entries where it is not negative take part; NULL: all */
    int N, E, K, rows;
    int capacity; /* entries of an expert from this rank on get no row */
    int by_slot;  /* 1: in the order of the slots, and `row` says ACCEPTED or NO_ROW instead of the row */
    Layout layout;
    int *row;            /* (N,K) */
    int *entry;          /* (rows) */
    float *row_weight;   /* (rows) */
    int *demand, *count; /* (E) */
    int *offset;         /* (E+1) */
    int *tile_expert;    /* (rows / PLAN_TILE) */
} Sort;

/* Consecutive entries for each warp: warp w of the grid takes those from w * run on. */
typedef struct {
    int blocks, warps, run;
    size_t shared; /* bytes of place_kernel */
} SortGrid;

/* The entry at place i of the order of the sort. */
__device__ static int entry_at(Sort sort, int i) {
    return sort.by_slot ? i % sort.N * sort.K + i / sort.N : i;
}

/* The expert of an entry, -1 where the entry takes no part. */
__device__ static int expert_at(Sort sort, int entry) {
    int e = sort.expert[entry];
    return e >= 0 && sort.admitted && sort.admitted[entry] < 0 ? -1 : e;
}

/* Rows without an entry; those with one are written over. */
__device__ static void clear_rows(Sort sort) {
    if (sort.entry) {
        for (int r = blockIdx.x * blockDim.x + threadIdx.x; r < sort.rows; r += gridDim.x * blockDim.x) {
            sort.entry[r] = -1;
            sort.row_weight[r] = 0;
        }
    }
}

/* The loop that counts demand: a block per run of entries, a thread per entry. */
__global__ static void __launch_bounds__(MOST_WARPS * 32) count_kernel(int *partial, Sort sort, int run) {
    extern __shared__ int counter[]; /* (E) */
    for (int e = threadIdx.x; e < sort.E; e += blockDim.x) {
        counter[e] = 0;
    }
    clear_rows(sort);
    __syncthreads();
    int entries = sort.N * sort.K, share = blockDim.x / 32 * run;
    int last = min((blockIdx.x + 1) * share, entries);
    for (int i = blockIdx.x * share + threadIdx.x; i < last; i += blockDim.x) {
        int e = expert_at(sort, entry_at(sort, i));
        if (e >= 0) {
            atomicAdd(&counter[e], 1);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < sort.E; e += blockDim.x) {
        partial[(size_t)blockIdx.x * sort.E + e] = counter[e];
    }
}

/* total[e] = what all blocks counted, before[e] = what the blocks before this one did. Both start at 0. Threads are
 * spread over experts and, where those are few, over blocks. */
__device__ static void counts_of_blocks(int *total, int *before, const int *partial, int E) {
    int columns = min(E, (int)blockDim.x), parts = blockDim.x / columns;
    int part = threadIdx.x / columns;
    if (part >= parts) {
        return;
    }
    for (int e = threadIdx.x % columns; e < E; e += columns) {
        int all = 0, earlier = 0;
#pragma unroll 8
        for (int b = part; b < gridDim.x; b += parts) {
            int counted = partial[(size_t)b * E + e];
            all += counted;
            earlier += b < blockIdx.x ? counted : 0;
        }
        atomicAdd(&total[e], all);
        atomicAdd(&before[e], earlier);
    }
}

/* Rows of an expert, those without an entry included. */
__device__ static int expert_rows(Sort sort, int count) {
    switch (sort.layout) {
        case LAYOUT_PADDED: return sort.rows / sort.E;
        case LAYOUT_BLOCK: return (count + PLAN_TILE - 1) / PLAN_TILE * PLAN_TILE;
        default: return count;
    }
}

/* offset (E+1), by one warp: 32 experts at a time. */
__device__ static void place_experts(int *offset, const int *total, Sort sort) {
    int lane = threadIdx.x % 32, start = 0;
    for (int first = 0; first < sort.E; first += 32) {
        int e = first + lane;
        int sum = warp_running_sum(e < sort.E ? expert_rows(sort, min(total[e], sort.capacity)) : 0, lane);
        if (e < sort.E) {
            offset[e + 1] = start + sum;
        }
        start += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
        offset[0] = 0;
    }
}

/* What the plan says of experts and tiles: the experts by the first block, the tiles by all. */
__device__ static void write_experts(Sort sort, const int *total, const int *offset) {
    if (blockIdx.x == 0) {
        for (int e = threadIdx.x; e < sort.E; e += blockDim.x) {
            if (sort.demand) {
                sort.demand[e] = total[e];
            }
            if (sort.count) {
                sort.count[e] = min(total[e], sort.capacity);
            }
        }
        for (int e = threadIdx.x; e <= sort.E && sort.offset; e += blockDim.x) {
            sort.offset[e] = offset[e];
        }
    }
    if (!sort.tile_expert) {
        return;
    }
    for (int tile = blockIdx.x * blockDim.x + threadIdx.x; tile < sort.rows / PLAN_TILE;
         tile += gridDim.x * blockDim.x) {
        int low = 0, high = sort.E; /* the first expert that ends after the tile's first row */
        while (low < high) {
            int middle = (low + high) / 2;
            if (offset[middle + 1] > tile * PLAN_TILE) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        sort.tile_expert[tile] = low < sort.E ? low : -1;
    }
}

/* The last loop of plan_build over the run of a warp. rank (E): of the expert's next entry, the warp's own. */
__device__ static void place_run(Sort sort, int *rank, const int *offset, int first, int last) {
    unsigned lower_lanes = (1u << threadIdx.x % 32) - 1;
    for (int start = first; start < last; start += 32) {
        int i = start + threadIdx.x % 32;
        int entry = i < last ? entry_at(sort, i) : 0;
        int e = i < last ? expert_at(sort, entry) : -1;
        unsigned same = __match_any_sync(0xffffffffu, e);
        int ahead = __popc(same & lower_lanes);
        int mine = e < 0 ? sort.capacity : rank[e] + ahead;
        __syncwarp();
        if (e >= 0 && ahead == 0) {
            rank[e] += __popc(same);
        }
        __syncwarp();
        int row = mine < sort.capacity ? (sort.by_slot ? ACCEPTED : offset[e] + mine) : NO_ROW;
        if (i < last && sort.row) {
            sort.row[entry] = row;
        }
        if (sort.entry && row != NO_ROW) {
            sort.entry[row] = entry;
            sort.row_weight[row] = sort.weight[entry];
        }
    }
}

/* The loops over entries of plan_build: warps replace runs of entries in order, lanes 32 entries that follow each
 * other. Every block repeats the loop over experts for itself. Runs alone too, then without `partial`. */
__global__ static void __launch_bounds__(MOST_WARPS * 32) place_kernel(Sort sort, const int *partial, int run) {
    extern __shared__ int shared[];
    int E = sort.E, warps = blockDim.x / 32, warp = threadIdx.x / 32;
    int *rank = shared; /* (warps,E) */
    int *total = rank + warps * E, *before = total + E, *offset = before + E;
    for (int i = threadIdx.x; i < (warps + 2) * E; i += blockDim.x) {
        shared[i] = 0;
    }
    if (!partial) {
        clear_rows(sort);
    }
    __syncthreads();
    int first = (blockIdx.x * warps + warp) * run, last = min(first + run, sort.N * sort.K);
    for (int i = first + threadIdx.x % 32; i < last; i += 32) {
        int e = expert_at(sort, entry_at(sort, i));
        if (e >= 0) {
            atomicAdd(&rank[warp * E + e], 1);
        }
    }
    if (partial) {
        counts_of_blocks(total, before, partial, E);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) { /* from how many to how many before */
        int next = before[e];
        for (int w = 0; w < warps; w++) {
            int counted = rank[w * E + e];
            rank[w * E + e] = next;
            next += counted;
        }
        total[e] = partial ? total[e] : next;
    }
    __syncthreads();
    if (warp == 0) {
        place_experts(offset, total, sort);
    }
    __syncthreads();
    write_experts(sort, total, offset);
    place_run(sort, rank + warp * E, offset, first, last);
}

static SortGrid sort_grid(int entries, int E) {
    SortGrid grid = {1, MOST_WARPS, 0, 0};
    while (grid.warps > 1 && (grid.warps + 3) * (size_t)E * sizeof(int) + sizeof(int) > EASY_SHARED) {
        grid.warps /= 2;
    }
    if (entries > ONE_BLOCK) {
        grid.blocks = ceil_div(entries, grid.warps * 32);
        grid.blocks = least(grid.blocks, MOST_BLOCKS);
    }
    grid.run = ceil_div(ceil_div(entries, grid.blocks * grid.warps), 32) * 32;
    grid.shared = ((grid.warps + 3) * (size_t)E + 1) * sizeof(int);
    return grid;
}

/* partial: room for (blocks,E) of the grid */
static void sort_entries(Sort sort, SortGrid grid, int *partial, cudaStream_t stream) {
    if (grid.shared > EASY_SHARED) {
        int device, most;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        CHECK(grid.shared <= (size_t)most, "this device sorts at most %d experts: lower --experts",
              most / (4 * (int)sizeof(int)) - 1);
        CUDA_CHECK(cudaFuncSetAttribute(count_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
        CUDA_CHECK(cudaFuncSetAttribute(place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    }
    if (grid.blocks == 1) {
        partial = NULL;
    } else {
        count_kernel<<<grid.blocks, grid.warps * 32, sort.E * sizeof(int), stream>>>(partial, sort, grid.run);
        CUDA_LAUNCHED();
    }
    place_kernel<<<grid.blocks, grid.warps * 32, grid.shared, stream>>>(sort, partial, grid.run);
    CUDA_LAUNCHED();
}

/* Entries of a compact list sorted by expert, for heaviest_kernel. */
typedef struct {
    int *entry;    /* (N,K) */
    float *weight; /* (N,K) */
    int *offset;   /* (E+1) */
} EntryList;

/* How many weights of first .. last lie above the bound, in every thread. */
__device__ static int count_above(const float *weight, int first, int last, unsigned bound) {
    int above = 0;
    for (int start = first; start < last; start += blockDim.x) {
        int r = start + threadIdx.x;
        above += __syncthreads_count(r < last && __float_as_uint(weight[r]) > bound);
    }
    return above;
}

/* take_heaviest, a block per expert: the same bisection over bit patterns, then the ties in order. row (N,K) */
__global__ static void __launch_bounds__(1024) heaviest_kernel(int *row, EntryList list, int capacity) {
    __shared__ int ties[32]; /* of each warp */
    int first = list.offset[blockIdx.x], last = list.offset[blockIdx.x + 1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned low = 0, high = last - first > capacity ? UINT32_MAX : 0;
    while (low < high) {
        unsigned middle = low + (high - low) / 2;
        if (count_above(list.weight, first, last, middle) <= capacity) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    int places = capacity - count_above(list.weight, first, last, low); /* for ties */
    for (int start = first; start < last; start += blockDim.x) {
        int r = start + threadIdx.x;
        unsigned order = r < last ? __float_as_uint(list.weight[r]) : 0;
        bool tie = r < last && order == low;
        unsigned same = __ballot_sync(0xffffffffu, tie);
        if (lane == 0) {
            ties[warp] = __popc(same);
        }
        __syncthreads();
        int ahead = __popc(same & ((1u << lane) - 1));
        for (int w = 0; w < warp; w++) {
            ahead += ties[w];
        }
        if (r < last) {
            row[list.entry[r]] = order > low || (tie && ahead < places) ? ACCEPTED : NO_ROW;
        }
        places -= __syncthreads_count(tie);
    }
}

/* Every expert has all its slots, in every group: a thread per expert and one more. */
__global__ static void soft_kernel(int *demand, int *count, int *offset, int rows, int E) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e < E) {
        demand[e] = count[e] = rows;
    }
    if (e <= E) {
        offset[e] = e * rows;
    }
}

/* Marks in plan->row the entries that keep a place, and counts the demand. all: the whole plan as it would be sorted
 * without a capacity. scratch: what sort_entries needs, then an EntryList. */
static void accept(const Plan *plan, Sort all, SortGrid grid, int *scratch, cudaStream_t stream) {
    int *partial = scratch;
    Sort judged = all;
    judged.entry = judged.count = judged.offset = judged.tile_expert = NULL;
    if (plan->drop == DROP_SLOT) {
        judged.by_slot = 1;
        judged.capacity = plan->capacity;
        sort_entries(judged, grid, partial, stream);
        return;
    }
    EntryList list;
    list.entry = scratch + (size_t)grid.blocks * plan->E;
    list.weight = (float *)(list.entry + (size_t)plan->N * plan->K);
    list.offset = (int *)(list.weight + (size_t)plan->N * plan->K);
    judged.row = NULL;
    judged.rows = plan->N * plan->K;
    judged.layout = LAYOUT_COMPACT;
    judged.entry = list.entry;
    judged.row_weight = list.weight;
    judged.offset = list.offset;
    sort_entries(judged, grid, partial, stream);
    heaviest_kernel<<<plan->E, 1024, 0, stream>>>(plan->row, list, plan->capacity);
    CUDA_LAUNCHED();
}

int plan_rows(int N, int E, int K, int capacity, Layout layout) {
    return most_rows(N, E, K, capacity, layout);
}

void plan_build(Plan *plan, Stream *stream) {
    int N = plan->N, E = plan->E, K = plan->K;
    if (plan->slots > 0) {
        soft_kernel<<<ceil_div(E + 1, 256), 256, 0, cuda_stream(stream)>>>(plan->demand, plan->count, plan->offset,
                                                                           N / plan->group_tokens * plan->slots, E);
        CUDA_LAUNCHED();
        return;
    }
    SortGrid grid = sort_grid(N * K, E);
    int *scratch = (int *)cuda_workspace(((size_t)grid.blocks * E + 2 * (size_t)N * K + E + 1) * sizeof(int));
    Sort sort = {plan->expert,
                 plan->weight,
                 NULL,
                 N,
                 E,
                 K,
                 plan->rows,
                 INT32_MAX,
                 0,
                 plan->layout,
                 plan->row,
                 plan->entry,
                 plan->row_weight,
                 plan->demand,
                 plan->count,
                 plan->offset,
                 NULL};
    sort.tile_expert = plan->layout == LAYOUT_BLOCK ? plan->tile_expert : NULL;
    bool limited = plan->capacity > 0 && plan->capacity < N * K;
    if (limited && plan->drop == DROP_TOKEN) {
        sort.capacity = plan->capacity;
    } else if (limited) {
        accept(plan, sort, grid, scratch, cuda_stream(stream));
        sort.admitted = plan->row;
        sort.demand = NULL;
    }
    sort_entries(sort, grid, scratch, cuda_stream(stream));
}

/* The loop over entries, a thread each. */
__global__ static void weight_backward_kernel(float *dweight, const float *drow_weight, const int *row, int entries) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < entries) {
        dweight[i] = row[i] < 0 ? 0.0f : drow_weight[row[i]];
    }
}

void plan_weight_backward(acc_t *dweight, const acc_t *drow_weight, const Plan *plan, Stream *stream) {
    int entries = plan->N * plan->K;
    if (entries == 0) {
        return;
    }
    weight_backward_kernel<<<ceil_div(entries, 256), 256, 0, cuda_stream(stream)>>>(dweight, drow_weight, plan->row,
                                                                                    entries);
    CUDA_LAUNCHED();
}
