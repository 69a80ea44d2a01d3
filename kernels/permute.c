/* One thread: some ten microseconds for the thousands of entries of a CPU batch, and the order is plain to see. Only
 * dropping by weight is slower: it sweeps over the entries 64 times for each expert that too many chose. */
#include "permute.h"

#include <stdint.h>
#include <string.h>

#include "plan_rows.h"

int plan_rows(int N, int E, int K, int capacity, Layout layout) {
    return most_rows(N, E, K, capacity, layout);
}

/* Accepts an entry if it is there and its expert has a place left; plan->row says so until the rows are known. */
static void take_place(Plan *plan, int entry) {
    int e = plan->expert[entry];
    if (e < 0) {
        plan->row[entry] = NO_ROW;
        return;
    }
    int free_place = plan->capacity == 0 || plan->count[e] < plan->capacity;
    plan->row[entry] = free_place ? ACCEPTED : NO_ROW;
    plan->count[e] += free_place;
}

/* Weights are not negative, so their bit patterns order as their values do. */
static uint64_t weight_order(acc_t weight) {
    double value = weight;
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Gives the places of expert e, which too many chose, to the heaviest entries, equal ones to the earlier: finds the
 * smallest bound that leaves no more than `capacity` entries above it by bisection, then fills up with those that lie
 * on it. */
static void take_heaviest(Plan *plan, int e) {
    int entries = plan->N * plan->K;
    uint64_t low = 0, high = UINT64_MAX;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        int above = 0;
        for (int i = 0; i < entries; i++) {
            above += plan->expert[i] == e && weight_order(plan->weight[i]) > middle;
        }
        if (above <= plan->capacity) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    for (int i = 0; i < entries; i++) {
        if (plan->expert[i] == e && weight_order(plan->weight[i]) > low) {
            take_place(plan, i);
        }
    }
    for (int i = 0; i < entries; i++) {
        if (plan->expert[i] == e && weight_order(plan->weight[i]) <= low) {
            plan->row[i] = NO_ROW;
            if (weight_order(plan->weight[i]) == low) {
                take_place(plan, i);
            }
        }
    }
}

/* Decides for every entry whether its expert takes it. */
static void accept(Plan *plan) {
    int N = plan->N, K = plan->K;
    if (plan->drop == DROP_WEIGHT && plan->capacity > 0) {
        for (int i = 0; i < N * K; i++) {
            if (plan->expert[i] < 0 || plan->demand[plan->expert[i]] <= plan->capacity) {
                take_place(plan, i);
            }
        }
        for (int e = 0; e < plan->E; e++) {
            if (plan->demand[e] > plan->capacity) {
                take_heaviest(plan, e);
            }
        }
    } else if (plan->drop == DROP_SLOT) {
        for (int j = 0; j < K; j++) {
            for (int n = 0; n < N; n++) {
                take_place(plan, n * K + j);
            }
        }
    } else {
        for (int i = 0; i < N * K; i++) {
            take_place(plan, i);
        }
    }
}

/* Rows of expert e, those without an entry included. */
static int expert_rows(const Plan *plan, int e) {
    switch (plan->layout) {
        case LAYOUT_PADDED: return plan->rows / plan->E;
        case LAYOUT_BLOCK: return whole_tiles(plan->count[e]);
        default: return plan->count[e];
    }
}

static void place_experts(Plan *plan) {
    plan->offset[0] = 0;
    for (int e = 0; e < plan->E; e++) {
        plan->offset[e + 1] = plan->offset[e] + expert_rows(plan, e);
    }
    if (plan->layout == LAYOUT_BLOCK) {
        int e = 0;
        for (int tile = 0; tile < plan->rows / PLAN_TILE; tile++) {
            while (e < plan->E && plan->offset[e + 1] <= tile * PLAN_TILE) {
                e++;
            }
            plan->tile_expert[tile] = e < plan->E ? e : -1;
        }
    }
}

/* Every expert has all its slots, in every group. */
static void build_soft(Plan *plan) {
    int rows = plan->N / plan->group_tokens * plan->slots;
    for (int e = 0; e < plan->E; e++) {
        plan->demand[e] = plan->count[e] = rows;
        plan->offset[e] = e * rows;
    }
    plan->offset[plan->E] = plan->E * rows;
}

void plan_build(Plan *plan, Stream *stream) {
    if (plan->slots > 0) {
        build_soft(plan);
        return;
    }
    int E = plan->E, entries = plan->N * plan->K;
    memset(plan->demand, 0, sizeof(int) * E);
    memset(plan->count, 0, sizeof(int) * E);
    for (int i = 0; i < entries; i++) {
        if (plan->expert[i] >= 0) {
            plan->demand[plan->expert[i]]++;
        }
    }
    accept(plan);
    place_experts(plan);
    for (int r = 0; r < plan->rows; r++) {
        plan->entry[r] = -1;
        plan->row_weight[r] = 0;
    }
    memset(plan->count, 0, sizeof(int) * E); /* counts again, as the rank of the next entry */
    for (int i = 0; i < entries; i++) {
        if (plan->row[i] == ACCEPTED) {
            int e = plan->expert[i];
            int r = plan->offset[e] + plan->count[e]++;
            plan->row[i] = r;
            plan->entry[r] = i;
            plan->row_weight[r] = plan->weight[i];
        }
    }
}

void plan_weight_backward(acc_t *dweight, const acc_t *drow_weight, const Plan *plan, Stream *stream) {
    for (int i = 0; i < plan->N * plan->K; i++) {
        dweight[i] = plan->row[i] < 0 ? 0 : drow_weight[plan->row[i]];
    }
}
