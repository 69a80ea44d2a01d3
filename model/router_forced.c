/* forced: tokens go where they are told, for benchmarks and for replaying a run; only the weights are learned.
 *
 *     p = softmax(W x)       S as --force says       w_j = p_j / sum_S p (--renorm 1) or p_j (0)
 *
 *     balanced   every expert gets the same number of entries: the best case of any kernel or network
 *     zipf:S     K distinct experts, expert e with probability ~ (e+1)^-S: skew of a known size
 *     one        expert 0 gets every token: the worst case
 *     FILE       each training step repeats what --dump-routing recorded; evaluation chooses the K most probable.
 *                Replaying a topk run with its own options gives that run's bits
 *
 * The first three look at nothing but a token's place in the batch. Kernels: fixed_choice.h, topk.h. Trace: trace.h.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/fixed_choice.h"
#include "../kernels/topk.h"
#include "softmax_gate.h"
#include "trace.h"

typedef enum { FORCE_BALANCED, FORCE_ZIPF, FORCE_ONE, FORCE_TRACE } Force;

typedef struct {
    Force force;
    double zipf;
    Trace trace;
    int *recorded; /* (N,K), host */
    int *choices;  /* (slices,N,K) of a step, device; a trace alone has them, where there are training steps */
    int64_t step;  /* of the choices */
} Own;

static Force force_of(const char *text, double *zipf) {
    if (!strcmp(text, "balanced")) {
        return FORCE_BALANCED;
    }
    if (!strcmp(text, "one")) {
        return FORCE_ONE;
    }
    if (strncmp(text, "zipf:", 5) != 0) {
        return FORCE_TRACE;
    }
    char *end;
    *zipf = strtod(text + 5, &end);
    CHECK(end > text + 5 && !*end && *zipf >= 0 && *zipf <= 100,
          "--force %s: what follows zipf: is the exponent, a number from 0 to 100, as in zipf:1.2", text);
    return FORCE_ZIPF;
}

static void check(const Config *config) {
    const ModelConfig *model = &config->model;
    double zipf;
    CHECK(force_of(model->force, &zipf) != FORCE_TRACE || strcmp(model->force, config->train.dump_routing) != 0,
          "--dump-routing %s would write over the trace that --force replays: name another file",
          config->train.dump_routing);
    CHECK(force_of(model->force, &zipf) != FORCE_TRACE || comm_ranks(GROUP_WORLD) == 1,
          "--force %s is the trace of one rank, and %d were started: start one, or take balanced, zipf:S or one",
          model->force, comm_ranks(GROUP_WORLD));
    CHECK(force_of(model->force, &zipf) != FORCE_TRACE || access(model->force, R_OK) == 0,
          "--force %s: there is no such file to read (%s): it is balanced, zipf:S, one, or what --dump-routing wrote",
          model->force, strerror(errno));
    CHECK(
        model->top_k > 1 || model->renorm != 1,
        "--router forced --top-k 1 with --renorm 1: the weight is always 1, so nothing would be learned; take --renorm "
        "0 or --top-k 2");
}

static void reserve(RouterPass *p, Arena *arena) {
    const ModelConfig *model = &p->config->model;
    Own *own = p->own = calloc(1, sizeof(Own));
    CHECK(own, "out of memory for a router");
    own->force = force_of(model->force, &own->zipf);
    if (own->force == FORCE_TRACE && p->context->training) {
        size_t count = (size_t)p->context->slices * p->N * p->K;
        arena_reserve(arena, (void **)&own->choices, count * sizeof(int), MEMORY_ACTIVATIONS);
    }
}

/* The trace is opened with the first step that needs it: generation and evaluation alone never do. */
static void before_step(RouterPass *p, Stream *stream) {
    Own *own = p->own;
    const RouterContext *c = p->context;
    size_t count = (size_t)p->N * p->K;
    if (own->force != FORCE_TRACE) {
        return;
    }
    if (!own->trace.file) {
        TraceShape shape = {.N = p->N, .K = p->K, .E = p->E, .routers = c->routers, .slices = c->slices};
        trace_open(&own->trace, p->config->model.force, shape);
        own->recorded = calloc(count, sizeof(int));
        CHECK(own->recorded, "out of memory for a record of %d tokens", p->N);
    }
    own->step = c->host_step->number;
    for (int slice = 0; slice < c->slices; slice++) {
        trace_read(&own->trace, own->recorded, own->step, slice, p->site);
        device_from_host(own->choices + slice * count, own->recorded, count * sizeof(int), stream);
    }
}

static void replay(const RouterPass *p, int *expert, Stream *stream) {
    const Own *own = p->own;
    size_t count = (size_t)p->N * p->K;
    assert(own->trace.file && own->step == p->context->host_step->number); /* before_step has brought this step */
    device_copy(expert, own->choices + p->context->slice * count, count * sizeof(int), stream);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    int start = p->context->rank * p->N;
    softmax_gate_scores(p, stream);
    if (own->force == FORCE_TRACE && !p->context->training) {
        topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, p->K, p->renorm, stream);
        return;
    }
    if (own->force == FORCE_BALANCED) {
        balanced_choice(plan->expert, start, p->N, p->E, p->K, stream);
    } else if (own->force == FORCE_ZIPF) {
        zipf_choice(plan->expert, own->zipf, router_key(p), start, p->N, p->E, p->K, stream);
    } else if (own->force == FORCE_ONE) {
        one_choice(plan->expert, start, p->N, p->E, p->K, stream);
    } else {
        replay(p, plan->expert, stream);
    }
    choice_weight(plan->weight, plan->expert, p->probs, p->N, p->E, p->K, p->renorm, stream);
}

static void release(RouterPass *p) {
    Own *own = p->own;
    trace_close(&own->trace);
    free(own->recorded);
}

const Router router_forced = {
    .name = "forced",
    .summary = "where `--force` says (balanced, zipf:S, one, a recorded trace), weights learned: for benchmarks",
    .paper = "",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .renorm_default = 1,
    .aux_default = 0.01,
    .z_default = 0.001,
    .has_balance_loss = true,
    .has_z_loss = true,
    .check = check,
    .tensors = softmax_gate_tensors,
    .reserve = reserve,
    .before_step = before_step,
    .forward = forward,
    .balance = softmax_gate_balance,
    .backward = softmax_gate_backward,
    .release = release,
};
