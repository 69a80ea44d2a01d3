/* A thread for each token, note or entry, where relay.c has a loop over them. All numbers are copied or counted, none
 * added in an order that could matter. Called by model/exchange_plan.c, exchange_rows.c. */
#include "cuda.cuh"

extern "C" {
#include "relay.h"
}

enum { THREADS = 256 };

/* The rank of entry i's expert; -1 where the entry takes no part. */
__device__ static inline int rank_of(const Plan &plan, int i, int experts) {
    return plan.row[i] < 0 ? -1 : plan.expert[i] / experts;
}

/* A token looks through its own entries, in their order. */
__global__ static void ranks_of_tokens(Plan out, Plan plan, int experts, int once) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, K = plan.K;
    if (n >= plan.N) {
        return;
    }
    for (int j = 0; j < K; j++) {
        int i = n * K + j, rank = rank_of(plan, i, experts);
        for (int before = n * K; once && before < i; before++) {
            rank = out.expert[before] == rank ? -1 : rank;
        }
        out.expert[i] = rank;
    }
}

void relay_ranks(Plan *out, const Plan *plan, int experts, int once, Stream *stream) {
    ranks_of_tokens<<<ceil_div(plan->N, THREADS), THREADS, 0, cuda_stream(stream)>>>(*out, *plan, experts, once);
    CUDA_LAUNCHED();
}

/* A thread for each place: token n's for a rank. It writes what concerns the token's entries with that rank; the first
 * rank's also those that take no part. */
__global__ static void write_places(Plan out, PeerRows notes, Plan plan, int experts) {
    int place = blockIdx.x * blockDim.x + threadIdx.x, N = plan.N, K = plan.K;
    if (place <= out.E) {
        out.offset[place] = place * N;
    }
    if (place >= out.E * N) {
        return;
    }
    int mine = place / N, carrier = -1;
    RelayNote *note = (RelayNote *)peers_row(&notes, place, K * sizeof(RelayNote));
    for (int j = 0; j < K; j++) {
        int i = place % N * K + j, rank = rank_of(plan, i, experts);
        bool goes = rank == mine, first = goes && carrier < 0;
        note[j] = goes ? RelayNote{plan.expert[i] % experts, plan.weight[i]} : RelayNote{-1, 0};
        carrier = first ? i : carrier;
        if (goes || (rank < 0 && mine == 0)) {
            out.row[i] = first ? place : -1;
            out.expert[i] = first ? mine : -1;
        }
    }
    out.entry[place] = carrier;
}

void relay_places(Plan *out, PeerRows notes, const Plan *plan, int experts, Stream *stream) {
    int threads = out->E * plan->N + 1;
    write_places<<<ceil_div(threads, THREADS), THREADS, 0, cuda_stream(stream)>>>(*out, notes, *plan, experts);
    CUDA_LAUNCHED();
}

__global__ static void rows_of_choices(int *row, Plan plan) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < plan.N * plan.K) {
        row[i] = plan.row[i] < 0 ? -1 : i;
    }
}

void relay_choices(Plan *back, const Plan *plan, Stream *stream) {
    int blocks = ceil_div((int64_t)plan->N * plan->K, THREADS);
    rows_of_choices<<<blocks, THREADS, 0, cuda_stream(stream)>>>(back->row, *plan);
    CUDA_LAUNCHED();
}

__global__ static void write_notes(RelayNote *note, Plan out, Plan plan, int experts, int width) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, r = i / width;
    if (r >= out.offset[out.E]) {
        return;
    }
    int entry = out.entry[r], K = plan.K;
    int choice = (entry < 0 || width == 1 ? entry : entry / K * K) + i % width;
    bool goes = entry >= 0 && rank_of(plan, choice, experts) == out.expert[entry];
    note[i] = goes ? RelayNote{plan.expert[choice] % experts, plan.weight[choice]} : RelayNote{-1, 0};
}

void relay_write(RelayNote *note, const Plan *out, const Plan *plan, int experts, int width, Stream *stream) {
    int blocks = ceil_div((int64_t)out->rows * width, THREADS);
    write_notes<<<blocks, THREADS, 0, cuda_stream(stream)>>>(note, *out, *plan, experts, width);
    CUDA_LAUNCHED();
}

__global__ static void read_notes(Plan in, const RelayNote *note) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < in.N * in.K) {
        in.expert[i] = note[i].expert;
        in.weight[i] = note[i].weight;
    }
}

void relay_read(Plan *in, const RelayNote *note, Stream *stream) {
    if (in->N > 0) {
        read_notes<<<ceil_div((int64_t)in->N * in->K, THREADS), THREADS, 0, cuda_stream(stream)>>>(*in, note);
        CUDA_LAUNCHED();
    }
}

__global__ static void weights_of_choices(float *dweight, const float *back, Plan out, Plan plan, int experts,
                                          int width) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, K = plan.K;
    if (i >= plan.N * K) {
        return;
    }
    int rank = rank_of(plan, i, experts), first = i / K * K;
    int carrier = width == 1 ? i : first; /* the entry whose row it travelled with */
    while (rank >= 0 && out.expert[carrier] != rank) {
        carrier++;
    }
    bool went = rank >= 0 && out.row[carrier] >= 0;
    dweight[i] = went ? back[(size_t)out.row[carrier] * width + (width == 1 ? 0 : i - first)] : 0;
}

void relay_weight_backward(acc_t *dweight, const acc_t *back, const Plan *out, const Plan *plan, int experts, int width,
                           Stream *stream) {
    int blocks = ceil_div((int64_t)plan->N * plan->K, THREADS);
    weights_of_choices<<<blocks, THREADS, 0, cuda_stream(stream)>>>(dweight, back, *out, *plan, experts, width);
    CUDA_LAUNCHED();
}

__global__ static void tell(int *told, Plan out) {
    for (int r = threadIdx.x; r < out.E; r += blockDim.x) {
        told[r] = out.offset[r + 1] - out.offset[r];
    }
}

void relay_tell(int *told, const Plan *out, Stream *stream) {
    tell<<<1, THREADS, 0, cuda_stream(stream)>>>(told, *out);
    CUDA_LAUNCHED();
}

__global__ static void sum_demand(int *demand, const int *told, int world, int stride, int E) {
    int e = blockIdx.x * blockDim.x + threadIdx.x, sum = 0;
    for (int r = 0; e < E && r < world; r++) {
        sum += told[(size_t)r * stride + e];
    }
    if (e < E) {
        demand[e] = sum;
    }
}

void relay_demand(int *demand, const int *told, int world, int stride, int E, Stream *stream) {
    sum_demand<<<ceil_div(E, THREADS), THREADS, 0, cuda_stream(stream)>>>(demand, told, world, stride, E);
    CUDA_LAUNCHED();
}

__global__ static void slots_as_tokens(Plan slots) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r < slots.N) {
        slots.expert[r] = r / (slots.N / slots.E);
        slots.weight[r] = 1;
    }
}

void relay_slots(Plan *slots, Stream *stream) {
    slots_as_tokens<<<ceil_div(slots->N, THREADS), THREADS, 0, cuda_stream(stream)>>>(*slots);
    CUDA_LAUNCHED();
}
