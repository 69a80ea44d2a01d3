/* The stages of a MoE layer without its experts; see bench_moves.h. */
#include "bench_moves.h"

#include <math.h>

#include "../kernels/convert.h"
#include "../kernels/dispatch.h"
#include "../kernels/fixed_choice.h"
#include "../kernels/gate.h"
#include "../kernels/permute.h"
#include "../kernels/random.h"
#include "../kernels/topk.h"
#include "bench.h"

size_t moves_open(Moves *m, MoveShape s, size_t memory) {
    int capacity = (int)ceil(s.capacity_factor * s.K * s.N / s.E);
    *m = (Moves){.shape = s};
    Plan *p = &m->plan;
    *p = (Plan){.N = s.N, .E = s.E, .K = s.K, .layout = s.layout, .capacity = capacity < s.N ? capacity : s.N};
    p->rows = plan_rows(s.N, s.E, s.K, p->capacity, s.layout);
    size_t N = s.N, NK = N * s.K, NC = N * s.C, NE = N * s.E, rows = p->rows;
    size_t tiles = (rows + PLAN_TILE - 1) / PLAN_TILE;
    struct {
        void *slot;
        size_t bytes;
    } arrays[] = {{&p->expert, NK * sizeof(int)},
                  {&p->weight, NK * sizeof(acc_t)},
                  {&p->row, NK * sizeof(int)},
                  {&p->entry, rows * sizeof(int)},
                  {&p->row_weight, rows * sizeof(acc_t)},
                  {&p->demand, s.E * sizeof(int)},
                  {&p->count, s.E * sizeof(int)},
                  {&p->offset, (s.E + 1) * sizeof(int)},
                  {&p->tile_expert, tiles * sizeof(int)},
                  {&m->w, (size_t)s.E * s.C * sizeof(acc_t)},
                  {&m->logits, NE * sizeof(acc_t)},
                  {&m->probs, NE * sizeof(acc_t)},
                  {&m->lse, N * sizeof(acc_t)},
                  {&m->key, sizeof(uint64_t)},
                  {&m->staging, NC * sizeof(acc_t)},
                  {&m->x, NC * sizeof(real_t)},
                  {&m->y, NC * sizeof(real_t)},
                  {&m->rows, rows * s.C * sizeof(real_t)}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        arena_reserve(&m->arena, arrays[i].slot, arrays[i].bytes, MEMORY_ACTIVATIONS);
    }
    if (m->arena.bytes > memory) {
        size_t bytes = m->arena.bytes;
        arena_free(&m->arena);
        return bytes;
    }
    arena_commit(&m->arena);
    bench_normal(m->staging, m->key, s.seed, 1, 1, NC);
    real_from_acc(m->x, m->staging, NC, NULL);
    bench_normal(m->w, m->key, s.seed, 2, 1 / sqrt((double)s.C), (size_t)s.E * s.C);
    moves_gate(m);
    uint64_t key = random_key((uint64_t)s.seed, RANDOM_TEST, 3); /* what moves_choose draws with */
    device_from_host(m->key, &key, sizeof key, NULL);
    device_wait(NULL);
    return 0;
}

void moves_close(Moves *m) {
    arena_free(&m->arena);
}

void moves_gate(Moves *m) {
    gate_forward(m->logits, m->x, m->w, m->plan.N, m->shape.C, m->plan.E, NULL);
}

/* A forced choice costs the softmax all the same: its weights are the router's (model/router_forced.c). */
void moves_choose(Moves *m) {
    Plan *p = &m->plan;
    int renorm = p->K > 1;
    if (m->shape.load == LOAD_OF_ROUTER) {
        topk_forward(m->probs, m->lse, p->expert, p->weight, m->logits, p->N, p->E, p->K, renorm, NULL);
        return;
    }
    softmax_forward(m->probs, m->lse, m->logits, p->N, p->E, NULL);
    if (m->shape.load == LOAD_UNIFORM) {
        balanced_choice(p->expert, 0, p->N, p->E, p->K, NULL);
    } else {
        zipf_choice(p->expert, m->shape.zipf, m->key, 0, p->N, p->E, p->K, NULL);
    }
    choice_weight(p->weight, p->expert, m->probs, p->N, p->E, p->K, renorm, NULL);
}

void moves_plan(Moves *m) {
    plan_build(&m->plan, NULL);
}

void moves_dispatch(Moves *m) {
    dispatch_copy(m->rows, m->x, &m->plan, m->shape.C, NULL);
}

void moves_combine(Moves *m) {
    combine_forward(m->y, m->rows, &m->plan, m->shape.C, 0, NULL);
}

/* x stands for dy, y for dx. */
void moves_backward(Moves *m) {
    dispatch_copy(m->rows, m->x, &m->plan, m->shape.C, NULL);
    dispatch_backward(m->y, m->rows, &m->plan, m->shape.C, 0, NULL);
}

/* ---- what is moved */

/* A GPU reads a token's row once however many experts it goes to, a CPU once for each (dispatch.cu, dispatch.c). */
double moves_dispatch_bytes(const Plan *plan, int C, double accepted, double computed) {
    double row = (double)C * sizeof(real_t), read = device_runs_ahead() ? plan->N : accepted;
    double index = device_runs_ahead() ? (double)plan->N * plan->K : computed;
    return (read + computed) * row + index * sizeof(int);
}

double moves_combine_bytes(const Plan *plan, int C, double accepted) {
    double entries = (double)plan->N * plan->K;
    return (accepted + plan->N) * C * sizeof(real_t) + entries * (sizeof(int) + sizeof(acc_t));
}

double moves_bw_legacy(double N, double C, double K, double number_bytes, double ms) {
    return 2 * K * C * number_bytes * N / ms / 1e6;
}

double moves_bw_strict(double N, double C, double K, double number_bytes, double ms) {
    return (2 + 2 * K) * C * number_bytes * N / ms / 1e6;
}
