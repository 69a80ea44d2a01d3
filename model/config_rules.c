/* What options mean for each other: what follows from the rest is filled in, what cannot work is refused in one line
 * that names the options and the way out.
 *
 * Called by train.c through config.h. Read next: router.h, for what --router chooses from.
 */
#include "config.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/rope.h"
#include "options.h"
#include "router.h"

static void derive_chain(ModelConfig *model, const Router *router) {
    if (model->chain_steps == OPTION_AUTO) {
        model->chain_steps = router->chain_default ? router->chain_default : 1;
    }
    if (model->chain_inner == OPTION_AUTO) {
        model->chain_inner = model->chain_steps > 1 || model->chain_norm;
    }
    if (model->chain_outer == OPTION_AUTO) {
        model->chain_outer = !model->chain_norm;
    }
}

void config_derive(Config *config) {
    ModelConfig *model = &config->model;
    const Router *router = router_find(model->router);
    model->kv_heads = model->kv_heads ? model->kv_heads : model->heads;
    model->head_dim = model->head_dim ? model->head_dim : model->dim / model->heads;
    model->vocab = model->vocab ? model->vocab : 256 + (model->objective == OBJECTIVE_MLM);
    if (!router) {
        return;
    }
    if (router->fixed_top_k) {
        model->top_k = router->fixed_top_k == ROUTER_ALL_EXPERTS ? model->experts : router->fixed_top_k;
    }
    bool tuned = config_has_adapters(model); /* a frozen router has nothing to learn from losses of its own */
    if (config->train.aux_coef == OPTION_AUTO) {
        config->train.aux_coef = tuned ? 0 : router->aux_default;
    }
    if (config->train.z_coef == OPTION_AUTO) {
        config->train.z_coef = tuned ? 0 : router->z_default;
    }
    if (router->plan == PLAN_SOFT && model->slots == 0) { /* as many rows as top-k would make */
        int64_t group = router->across ? config->train.batch / config->train.grad_accum : model->seq;
        model->slots = (int)((group * model->top_k + model->experts - 1) / model->experts);
    }
    derive_chain(model, router);
    if (config->train.steps > 0 && config->train.warmup > config->train.steps && !config_given(config, "warmup")) {
        config->train.warmup = config->train.steps;
    }
    if (model->renorm < 0) {
        /* Renormalised over one expert the weight is the constant 1, and a router that learns would learn nothing. A
         * soft one weighs all slots, whatever top_k is. */
        bool constant = model->top_k == 1 && router->learned && router->plan != PLAN_SOFT;
        model->renorm = router->renorm_default && !constant;
    }
}

bool config_has_adapters(const ModelConfig *model) {
    return model->perft != PERFT_NONE || model->lora != LORA_NONE;
}

int config_dense_width(const ModelConfig *model) {
    return (model->top_k + model->shared_experts) * model->expert_dim * model->chain_steps;
}

int config_share(const ModelConfig *model, int N) {
    return (int)(((int64_t)N * model->top_k + model->experts - 1) / model->experts);
}

int config_capacity(const ModelConfig *model, int N) {
    double share = model->capacity_factor * model->top_k * N / model->experts;
    /* 1.1 * 200 / 10 is a hair above 22 in binary; that is 22 places, not 23. More than N rows cannot come: a token's
     * experts are all different. */
    double places = ceil(share * (1 - 1e-12));
    return places < N ? (int)places : N;
}

static const char *nearest_router(const char *typed) {
    const char *nearest = router_at(0)->name;
    for (int i = 1; router_at(i); i++) {
        if (name_distance(typed, router_at(i)->name) < name_distance(typed, nearest)) {
            nearest = router_at(i)->name;
        }
    }
    return nearest;
}

/* Before head_dim is derived. */
static void check_heads(const ModelConfig *model) {
    CHECK(model->head_dim || model->dim % model->heads == 0,
          "--dim %d is not divisible by --heads %d: change one of them, or give --head-dim", model->dim, model->heads);
    int size = model->head_dim ? model->head_dim : model->dim / model->heads;
    CHECK(size % 2 == 0,
          "--dim %d over --heads %d makes heads of odd size %d, and the rotary embedding turns pairs: change one of "
          "them, or give --head-dim",
          model->dim, model->heads, size);
    CHECK(size <= ROPE_MOST_HEAD, "--dim %d over --heads %d makes heads of %d, more than %d: raise --heads", model->dim,
          model->heads, size, ROPE_MOST_HEAD);
}

static void check_objective(const Config *config) {
    const ModelConfig *model = &config->model;
    bool masked = model->objective == OBJECTIVE_MLM;
    CHECK(masked || !config_given(config, "mask-share"),
          "--mask-share hides tokens for --objective mlm: add that, or drop it");
    CHECK(!masked || config->train.sample == 0,
          "--sample with --objective mlm: a model of masked tokens does not write from left to right; drop --sample");
    CHECK(!masked || !config->train.choices[0],
          "--choices with --objective mlm: the model would see the answer it is to find; drop --choices");
    CHECK(!masked || model->vocab >= 3,
          "--vocab %d leaves nothing to predict beside the mask, its last token: raise it", model->vocab);
}

/* Options that only one router has an ear for, and losses that a router does not have. */
static void check_router_options(const Config *config) {
    static const char *const owner[][2] = {
        {"bias-rate", "sigmoid"},    {"router-groups", "sigmoid"},    {"router-kept-groups", "sigmoid"},
        {"router-scale", "sigmoid"}, {"threshold-rate", "threshold"}, {"threshold-warmup", "threshold"},
        {"force", "forced"},
    };
    const ModelConfig *model = &config->model;
    const Router *router = router_find(model->router);
    for (size_t i = 0; i < sizeof owner / sizeof *owner; i++) {
        CHECK(!config_given(config, owner[i][0]) || !strcmp(model->router, owner[i][1]),
              "--%s is for --router %s, not %s: drop it", owner[i][0], owner[i][1], model->router);
    }
    CHECK(router->plan == PLAN_SOFT || !config_given(config, "slots") || model->slots == 0,
          "--slots is for soft routers: with --router %s, --top-k sets the rows; drop it", router->name);
    CHECK(router->has_logit_scale || !config_given(config, "soft-scale"),
          "--soft-scale is for soft routers with learned mixtures, not %s: drop it", router->name);
    if (router->plan != PLAN_NONE) { /* the dense control takes the options of what it is compared with */
        CHECK(router->has_balance_loss || config->train.aux_coef == 0,
              "--aux-coef %g with --router %s: it has no balance loss to weigh; drop --aux-coef",
              config->train.aux_coef, router->name);
        CHECK(router->has_z_loss || config->train.z_coef == 0,
              "--z-coef %g with --router %s: it has no z-loss to weigh; drop --z-coef", config->train.z_coef,
              router->name);
    }
    CHECK(router->plan != PLAN_NONE || !config->train.dump_routing[0],
          "--dump-routing with --router %s: nothing is routed; drop it", router->name);
}

static void check_chain(const ModelConfig *model) {
    const Router *router = router_find(model->router);
    bool sparse = router->plan == PLAN_TOKENS_CHOOSE || router->plan == PLAN_EXPERTS_CHOOSE;
    CHECK(model->chain_steps == 1 || sparse,
          "--chain-steps %d with --router %s: a chain is made of sparse layers; use --router topk, or drop it",
          model->chain_steps, router->name);
    CHECK(model->chain_inner || model->chain_outer,
          "--chain-inner 0 with --chain-outer 0 cuts the residual stream: set one of them to 1");
    CHECK(!model->chain_norm || !model->chain_inner || !model->chain_outer,
          "--chain-norm 1 with --chain-inner 1 carries the stream already: --chain-outer 1 would count it twice; use "
          "--chain-outer 0");
}

static void check_routing(const Config *config) {
    const ModelConfig *model = &config->model;
    const Router *router = router_find(model->router);
    CHECK(model->top_k <= model->experts, "--top-k %d is above --experts %d: lower the one or raise the other",
          model->top_k, model->experts);
    CHECK(router->plan == PLAN_NONE || model->moe_every <= model->layers,
          "--moe-every %d leaves no MoE layer among --layers %d: lower it, or ask for --router dense", model->moe_every,
          model->layers);
    if (router->check) {
        router->check(config);
    }
    bool drops_nobody = router->plan == PLAN_NONE || router->plan == PLAN_SOFT || router->exact_share ||
                        router->fixed_top_k == ROUTER_ALL_EXPERTS;
    CHECK(!drops_nobody || !config_given(config, "drop"),
          "--drop decides who is dropped, but --router %s drops nobody: drop --drop", router->name);
    CHECK(model->capacity_factor > 0 || !config_given(config, "drop"),
          "--drop decides who is dropped, but without a capacity nobody is: add --capacity-factor 1.25 or drop --drop");
    CHECK(model->objective == OBJECTIVE_MLM || !router->sees_future || config->train.allow_leak,
          "--router %s looks at later tokens, so its loss is no language-model loss: use --objective mlm, or add "
          "--allow-leak to train it anyway",
          router->name);
    CHECK(!config_is_leaky(model) || config->train.allow_leak,
          "--drop %s lets a later token take an earlier one's place, so the loss sees the future: use --drop token, or "
          "add "
          "--allow-leak to train it anyway",
          model->drop == DROP_SLOT ? "slot" : "weight");
}

static void check_adapters(const Config *config) {
    static const char *const letters[] = {"none", "r", "e", "d", "s"};
    const ModelConfig *model = &config->model;
    const TrainConfig *train = &config->train;
    const char *kind = letters[model->perft];
    bool tuned = config_has_adapters(model);
    CHECK(tuned || !(config_given(config, "perft-rank") || config_given(config, "perft-act") ||
                     config_given(config, "perft-scale")),
          "--perft-rank, --perft-act and --perft-scale are of adapters, and there are none: add --perft r or --lora "
          "attention, or drop them");
    CHECK(model->perft == PERFT_R || model->perft == PERFT_D || !config_given(config, "perft-count"),
          "--perft-count is for --perft r and d, not %s: drop it", kind);
    CHECK(model->perft == PERFT_R || !(config_given(config, "perft-top-k") || config_given(config, "perft-aux-coef")),
          "--perft-top-k and --perft-aux-coef are for --perft r, not %s: drop them", kind);
    CHECK(model->perft != PERFT_R || model->perft_top_k <= model->perft_count,
          "--perft-top-k %d is above --perft-count %d: lower the one or raise the other", model->perft_top_k,
          model->perft_count);
    CHECK(model->perft == PERFT_NONE || router_find(model->router)->plan != PLAN_NONE,
          "--perft %s adapts experts, but --router %s has none: use --lora attention", kind, model->router);
    CHECK(model->perft == PERFT_NONE || (model->chain_steps == 1 && !model->chain_inner && model->chain_outer),
          "--perft %s adapts a MoE layer that is run once and added, not a chain: use --lora attention", kind);
    CHECK(!tuned || train->freeze == FREEZE_NONE,
          "--perft and --lora freeze everything but their adapters: drop --freeze");
    CHECK(
        !tuned || !train->upcycle,
        "--upcycle makes a router that has to be trained, and --perft and --lora freeze it: drop the one or the other");
    CHECK(model->perft != PERFT_R || train->ep == 1,
          "--perft r with --ep %d: its adapters are not spread over ranks; take --ep 1, whose ranks are data parallel",
          train->ep);
}

/* The kernels count rows in an int. */
static void check_sizes(const Config *config) {
    const ModelConfig *model = &config->model;
    int slice = config->train.batch / config->train.grad_accum;
    double N = (double)slice * model->seq;
    const Router *router = router_find(model->router);
    double entries = router->plan == PLAN_EXPERTS_CHOOSE ? model->experts
                     : router->plan == PLAN_SOFT         ? (double)model->experts * model->slots
                                                         : model->top_k;
    CHECK(N * entries <= INT_MAX,
          "%d sequences of --seq %d with %.0f entries per token are more than 2^31: raise --grad-accum", slice,
          model->seq, entries);
    if (model->layout == LAYOUT_PADDED) {
        double capacity = model->capacity_factor > 0 ? config_capacity(model, (int)N) : N;
        CHECK(capacity * model->experts <= INT_MAX,
              "--layout padded needs %.0f rows, more than 2^31: raise --grad-accum, or use --layout compact",
              capacity * model->experts);
    }
}

bool config_is_leaky(const ModelConfig *model) {
    const Router *router = router_find(model->router);
    bool takes_places = model->capacity_factor > 0 && model->drop != DROP_TOKEN && router->plan != PLAN_NONE;
    return model->objective == OBJECTIVE_LM && (router->sees_future || takes_places);
}

void config_finish(Config *config) {
    ModelConfig *model = &config->model;
    const TrainConfig *train = &config->train;
    const Router *router = router_find(model->router);
    CHECK(router, "unknown --router %s: the nearest is %s, of %s", model->router, nearest_router(model->router),
          router_names());
    int asked_top_k = model->top_k;
    check_heads(model);
    config_derive(config);
    CHECK(!router->fixed_top_k || !config_given(config, "top-k") || model->top_k == asked_top_k,
          "--router %s sends a token to %d expert%s: drop --top-k %d, or use --router topk", router->name, model->top_k,
          model->top_k > 1 ? "s" : "", asked_top_k);

    CHECK(train->data[0], "--data is empty: name a file, or use --data builtin");
    CHECK(!train->upcycle || train->init_from[0],
          "--upcycle makes experts of a dense model: name that with --init-from DIR");
    CHECK(train->out[0], "--out is empty: name a directory for the run");
    CHECK(strcmp(train->out, train->export_hf) != 0,
          "--export-hf %s is the run's own directory: name another for the export", train->export_hf);
    CHECK(model->heads % model->kv_heads == 0, "--heads %d is not divisible by --kv-heads %d: change one of them",
          model->heads, model->kv_heads);
    CHECK(model->vocab >= 2, "--vocab %d leaves nothing to predict: use at least 2, or 0 for the tokenizer's",
          model->vocab);
    CHECK(train->batch % train->grad_accum == 0, "--batch %d is not divisible by --grad-accum %d: change one of them",
          train->batch, train->grad_accum);
    CHECK(train->steps == 0 || train->warmup <= train->steps, "--warmup %d is longer than --steps %d: lower it",
          train->warmup, train->steps);
    for (const char *c = train->prompt; !strcmp(train->tokenizer, "byte") && *c; c++) {
        CHECK((unsigned char)*c < model->vocab,
              "--prompt holds byte %d, but --vocab %d ends before it: change one of them", (unsigned char)*c,
              model->vocab);
    }
    check_objective(config);
    check_router_options(config);
    check_routing(config);
    check_chain(model);
    check_adapters(config);
    check_sizes(config);
}
