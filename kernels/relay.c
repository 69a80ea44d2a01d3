/* Loops over entries and rows; the equations are relay.h's. */
#include "relay.h"

#include <stdbool.h>

void relay_ranks(Plan *out, const Plan *plan, int experts, int once, Stream *stream) {
    int K = plan->K;
    for (int n = 0; n < plan->N; n++) {
        for (int j = 0; j < K; j++) {
            int i = n * K + j, rank = plan->row[i] < 0 ? -1 : plan->expert[i] / experts;
            for (int before = n * K; once && before < i; before++) {
                rank = out->expert[before] == rank ? -1 : rank;
            }
            out->expert[i] = rank;
        }
    }
}

void relay_places(Plan *out, PeerRows notes, const Plan *plan, int experts, Stream *stream) {
    int N = plan->N, K = plan->K;
    relay_ranks(out, plan, experts, 1, stream);
    for (int r = 0; r <= out->E; r++) {
        out->offset[r] = r * N;
    }
    for (int r = 0; r < out->E * N; r++) {
        out->entry[r] = -1;
    }
    for (int i = 0; i < N * K; i++) {
        out->row[i] = out->expert[i] < 0 ? -1 : out->expert[i] * N + i / K;
        if (out->row[i] >= 0) {
            out->entry[out->row[i]] = i;
        }
    }
    for (int r = 0; r < out->E * N; r++) {
        RelayNote *note = peers_row(&notes, r, K * sizeof *note);
        for (int j = 0; j < K; j++) {
            int i = r % N * K + j;
            bool goes = plan->row[i] >= 0 && plan->expert[i] / experts == r / N;
            note[j] = goes ? (RelayNote){plan->expert[i] % experts, plan->weight[i]} : (RelayNote){-1, 0};
        }
    }
}

void relay_choices(Plan *back, const Plan *plan, Stream *stream) {
    for (int i = 0; i < plan->N * plan->K; i++) {
        back->row[i] = plan->row[i] < 0 ? -1 : i;
    }
}

void relay_write(RelayNote *note, const Plan *out, const Plan *plan, int experts, int width, Stream *stream) {
    int K = plan->K;
    for (int r = 0; r < out->offset[out->E]; r++, note += width) {
        int entry = out->entry[r], first = entry < 0 || width == 1 ? entry : entry / K * K;
        for (int j = 0; j < width; j++) {
            int i = first + j;
            bool goes = entry >= 0 && plan->row[i] >= 0 && plan->expert[i] / experts == out->expert[entry];
            note[j] = goes ? (RelayNote){plan->expert[i] % experts, plan->weight[i]} : (RelayNote){-1, 0};
        }
    }
}

void relay_read(Plan *in, const RelayNote *note, Stream *stream) {
    for (int i = 0; i < in->N * in->K; i++) {
        in->expert[i] = note[i].expert;
        in->weight[i] = note[i].weight;
    }
}

void relay_weight_backward(acc_t *dweight, const acc_t *back, const Plan *out, const Plan *plan, int experts, int width,
                           Stream *stream) {
    int K = plan->K;
    for (int i = 0; i < plan->N * K; i++) {
        int rank = plan->row[i] < 0 ? -1 : plan->expert[i] / experts, first = i / K * K;
        int carrier = width == 1 ? i : first; /* the entry whose row it travelled with */
        while (rank >= 0 && out->expert[carrier] != rank) {
            carrier++;
        }
        bool went = rank >= 0 && out->row[carrier] >= 0;
        dweight[i] = went ? back[(size_t)out->row[carrier] * width + (width == 1 ? 0 : i - first)] : 0;
    }
}

void relay_tell(int *told, const Plan *out, Stream *stream) {
    for (int r = 0; r < out->E; r++) {
        told[r] = out->offset[r + 1] - out->offset[r];
    }
}

void relay_demand(int *demand, const int *told, int world, int stride, int E, Stream *stream) {
    for (int e = 0; e < E; e++) {
        demand[e] = 0;
        for (int r = 0; r < world; r++) {
            demand[e] += told[(size_t)r * stride + e];
        }
    }
}

void relay_slots(Plan *slots, Stream *stream) {
    for (int r = 0; r < slots->N; r++) {
        slots->expert[r] = r / (slots->N / slots->E);
        slots->weight[r] = 1;
    }
}
