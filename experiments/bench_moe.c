/* Memory, weights and data of a MoE layer that stands alone; see bench_moe.h. */
#include "bench_moe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/convert.h"
#include "../kernels/random.h"
#include "../model/balance.h"
#include "bench.h"

enum { MOST_STEPS = 8, STREAM_X = 1, STREAM_DY, STREAM_TOKENS, STREAM_WEIGHTS };

static void configure(Config *config, const LayerShape *l, const LayerChoice *o) {
    char number[9][16]; /* the attention that config_finish asks about is not run */
    int seq = o->seq > 0 ? o->seq : l->tokens % 1024 == 0 ? 1024 : l->tokens;
    snprintf(number[0], 16, "%d", l->dim);
    snprintf(number[1], 16, "%d", l->expert_dim);
    snprintf(number[2], 16, "%d", l->experts);
    snprintf(number[3], 16, "%d", l->top_k);
    snprintf(number[4], 16, "%d", seq);
    snprintf(number[5], 16, "%d", l->tokens / seq);
    snprintf(number[6], 16, "%g", o->capacity_factor);
    snprintf(number[7], 16, "%d", l->dim % 64 == 0 ? l->dim / 64 : 1);
    snprintf(number[8], 16, "%d", o->seed);
    char *arguments[] = {
        "bench_layer",  "--layers",        "1",         "--heads",           number[7], "--dim",    number[0],
        "--expert-dim", number[1],         "--experts", number[2],           "--top-k", number[3],  "--seq",
        number[4],      "--batch",         number[5],   "--capacity-factor", number[6], "--router", (char *)o->router,
        "--layout",     (char *)o->layout, "--act",     (char *)l->act,      "--seed",  number[8],  "--allow-leak",
        "--force",      (char *)o->force};
    int count = sizeof arguments / sizeof *arguments;
    config_parse(config, o->force ? count : count - 2, arguments);
    config_finish(config);
}

/* What a router starts with beside its matrices: tables, ones. */
static void init_routers(MoeBench *b) {
    for (int s = 0; s < b->chain.steps; s++) {
        const MoeLayer *moe = &b->chain.moe[s];
        acc_t *param[ROUTER_PARAMS] = {NULL};
        size_t count[ROUTER_PARAMS] = {0};
        if (!moe->router || !moe->router->init) {
            continue;
        }
        for (int p = 0; p < ROUTER_PARAMS && moe->pass.param[p].w; p++) {
            for (int t = 0; t < b->tensors.count; t++) {
                count[p] = b->master + b->tensors.items[t].offset == moe->pass.param[p].w ? b->tensors.items[t].count
                                                                                          : count[p];
            }
            param[p] = calloc(count[p], sizeof(acc_t));
            CHECK(param[p], "out of memory for the %zu values of a router", count[p]);
            host_from_device(param[p], moe->pass.param[p].w, count[p] * sizeof(acc_t), NULL);
        }
        moe->router->init(param, &b->config.model, NULL, random_key((uint64_t)b->config.train.seed, RANDOM_INIT, s));
        for (int p = 0; p < ROUTER_PARAMS; p++) {
            if (param[p]) {
                device_from_host(moe->pass.param[p].w, param[p], count[p] * sizeof(acc_t), NULL);
            }
            free(param[p]);
        }
    }
}

static void init_weights(MoeBench *b, int seed, bool shared_weights) {
    for (int t = 0; t < b->tensors.count; t++) {
        const Tensor *tensor = &b->tensors.items[t];
        acc_t *to = b->master + tensor->offset;
        if (tensor->init_std > 0) {
            bench_normal(to, b->key, seed, STREAM_WEIGHTS + t, tensor->init_std, tensor->count);
        } else if (tensor->init_std < 0) {
            acc_t *ones = calloc(tensor->count, sizeof(acc_t));
            CHECK(ones, "out of memory for %zu weights", tensor->count);
            for (size_t i = 0; i < tensor->count; i++) {
                ones[i] = 1;
            }
            device_from_host(to, ones, tensor->count * sizeof(acc_t), NULL);
            free(ones);
        }
        size_t each = tensor->count / (tensor->shape[0] > 0 ? tensor->shape[0] : 1);
        for (int e = 1; shared_weights && tensor->kind == TENSOR_EXPERT && e < tensor->shape[0]; e++) {
            device_copy(to + (size_t)e * each, to, each * sizeof(acc_t), NULL);
        }
    }
    init_routers(b);
    real_from_acc(b->weights, b->master, b->tensors.total, NULL);
}

static void init_data(MoeBench *b, int seed) {
    size_t NC = (size_t)b->N * b->C;
    bench_normal(b->staging, b->key, seed, STREAM_X, 1, NC);
    real_from_acc(b->x, b->staging, NC, NULL);
    bench_normal(b->staging, b->key, seed, STREAM_DY, 1, NC);
    real_from_acc(b->dy, b->staging, NC, NULL);
    int *tokens = calloc(b->N, sizeof(int)); /* what a router by token looks at */
    CHECK(tokens, "out of memory for %d tokens", b->N);
    uint64_t key = random_key((uint64_t)seed, RANDOM_TEST, STREAM_TOKENS);
    for (int n = 0; n < b->N; n++) {
        tokens[n] = (int)random_below(key, n, b->config.model.vocab);
    }
    device_from_host(b->tokens, tokens, b->N * sizeof(int), NULL);
    free(tokens);
}

static void reserve(MoeBench *b) {
    const ModelConfig *model = &b->config.model;
    size_t NC = (size_t)b->N * b->C, total;
    Arena *arena = &b->arena;
    router_context_reserve(&b->context, arena);
    chain_tensors(&b->tensors, model, 0);
    total = b->tensors.total;
    arena_reserve(arena, (void **)&b->master, total * sizeof(acc_t), MEMORY_WEIGHTS);
    arena_reserve(arena, (void **)&b->weights, total * sizeof(real_t), MEMORY_WEIGHTS);
    arena_reserve(arena, (void **)&b->grads, total * sizeof(acc_t), MEMORY_GRADIENTS);
    arena_reserve(arena, (void **)&b->staging, NC * sizeof(acc_t), MEMORY_ACTIVATIONS);
    real_t **rows[] = {&b->x, &b->y, &b->dx, &b->dy};
    for (int i = 0; i < 4; i++) {
        arena_reserve(arena, (void **)rows[i], NC * sizeof(real_t), MEMORY_ACTIVATIONS);
    }
    size_t experts = model->experts;
    arena_reserve(arena, (void **)&b->load, MOST_STEPS * LOAD_VALUES * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&b->demand, MOST_STEPS * experts * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&b->tokens, b->N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&b->key, sizeof(uint64_t), MEMORY_ACTIVATIONS);
    ScratchSize size = {0};
    chain_reserve(&b->chain, &b->config, 0, b->N, &b->context, 0, &size, arena);
    chain_reserve_scratch(&b->chain_scratch, model, b->N, arena);
    moe_reserve_scratch(&b->scratch, model, size, true, arena);
}

size_t moe_bench_open(MoeBench *b, const LayerShape *l, const LayerChoice *o) {
    *b = (MoeBench){.N = l->tokens, .C = l->dim};
    configure(&b->config, l, o);
    CHECK(b->config.model.chain_steps <= MOST_STEPS, "a chain of at most %d steps", MOST_STEPS);
    b->context = (RouterContext){.T = b->config.model.seq,
                                 .slices = 1,
                                 .routers = chain_routers(&b->config.model, 0),
                                 .ranks = 1,
                                 .seed = (uint64_t)b->config.train.seed,
                                 .training = true};
    reserve(b);
    if (b->arena.bytes > o->memory) {
        size_t bytes = b->arena.bytes;
        moe_bench_close(b);
        return bytes;
    }
    arena_commit(&b->arena);
    b->scratch.din_rows = b->scratch.out_rows;
    b->context.tokens = b->tokens;
    router_context_set_step(&b->context, 0, NULL);
    int all_rows[2] = {0, b->N};
    device_from_host(b->scratch.all_rows, all_rows, sizeof all_rows, NULL);
    chain_connect(&b->chain, &b->tensors, 0, b->weights, b->master, b->grads);
    init_weights(b, o->seed, o->shared_weights);
    init_data(b, o->seed);
    return 0;
}

void moe_bench_close(MoeBench *b) {
    chain_free(&b->chain);
    router_context_free(&b->context);
    tensors_free(&b->tensors);
    arena_free(&b->arena);
}

void moe_bench_forward(MoeBench *b, Profile *profile) {
    chain_forward(&b->chain, &b->scratch, b->y, b->x, b->x, b->load, b->demand, profile, NULL);
}

void moe_bench_backward(MoeBench *b, Profile *profile) {
    chain_backward(&b->chain, &b->chain_scratch, &b->scratch, b->dx, b->dy, b->x, 0, profile, NULL);
}

MoeBenchLoad moe_bench_load(const MoeBench *b) {
    const Plan *plan = &b->chain.moe[0].plan;
    MoeBenchLoad sum = {0};
    if (!b->chain.moe[0].router) {
        return (MoeBenchLoad){.entries = b->N, .accepted = b->N, .computed = b->N};
    }
    int E = plan->E, steps = b->chain.steps, *numbers = calloc(2 * (size_t)E, sizeof(int)), rows;
    double *demand = calloc(E, sizeof(double));
    acc_t load[LOAD_VALUES];
    CHECK(numbers && demand, "out of memory for %d counts", E);
    for (int s = 0; s < steps; s++) {
        plan = &b->chain.moe[s].plan;
        host_from_device(numbers, plan->demand, E * sizeof(int), NULL);
        host_from_device(numbers + E, plan->count, E * sizeof(int), NULL);
        host_from_device(&rows, plan->offset + E, sizeof(int), NULL);
        host_from_device(load, b->load + s * LOAD_VALUES, sizeof load, NULL);
        sum.computed += rows;
        sum.token_drop += load[LOAD_TOKENS_DROPPED] / steps;
        for (int e = 0; e < E; e++) {
            demand[e] = numbers[e];
            sum.entries += numbers[e];
            sum.accepted += numbers[E + e];
        }
        LoadSummary summary = load_summary(demand, E);
        sum.cv += summary.cv / steps;
        sum.max_vio += summary.max_vio / steps;
    }
    free(demand);
    free(numbers);
    return sum;
}
