/* The configuration: the command line and --help, the run's config.json, and what options mean for each other.
 *
 * The functions up to config_difference know no option by name but --resume and --out; they walk the table of
 * options.c. Where options meet is config_finish, at the bottom: it fills in what follows from the rest and refuses
 * what cannot work.
 *
 * Called by train.c, log.c (the run's config.json) and checkpoint.c. Read next: options.c, the table itself;
 * router.h, for what --router chooses from.
 */
#include "config.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/rope.h"
#include "options.h"
#include "router.h"

enum { CONFIG_FILE = 65536 };

/* Whether the command line set the option. */
static bool option_given(const Config *config, const char *name) {
    int index = option_find(name);
    assert(index >= 0);
    return config->given[index];
}

void config_defaults(Config *config) {
    char error[256];
    memset(config, 0, sizeof *config);
    for (int i = 0; i < option_count; i++) {
        bool valid = option_set(config, &option_table[i], option_table[i].initial, error, sizeof error);
        assert(valid);
        (void)valid;
    }
}

static void print_help(void) {
    printf(
        "usage: ./train [--option value | --option=value] ...\n"
        "Trains a mixture-of-experts language model. Every option has a default, shown in [brackets].\n");
    const char *group = "";
    for (int i = 0; i < option_count; i++) {
        const Option *option = &option_table[i];
        if (strcmp(group, option->group) != 0) {
            group = option->group;
            printf("\n%s\n", group);
        }
        char left[80];
        snprintf(left, sizeof left, "--%s %s", option->name, option->values);
        printf("  %-32s %s%s [%s]\n", left, option->help,
               option->offset == offsetof(Config, model.router) ? router_names() : "", option->initial);
    }
    printf("\n  %-32s this page\n", "--help");
}

static const char *nearest_option(const char *typed) {
    const char *nearest = "help";
    for (int i = 0; i < option_count; i++) {
        if (name_distance(typed, option_table[i].name) < name_distance(typed, nearest)) {
            nearest = option_table[i].name;
        }
    }
    return nearest;
}

/* Sets what the command line says on top of *config, and config->given. */
static void parse_arguments(Config *config, int argc, char **argv) {
    char error[512], before[OPTION_TEXT];
    for (int a = 1; a < argc; a++) {
        CHECK(!strncmp(argv[a], "--", 2) && argv[a][2],
              "unexpected '%.80s': options are long, as in --steps 100 (see --help)", argv[a]);
        char name[128];
        const char *equals = strchr(argv[a], '=');
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - argv[a] - 2) : (int)sizeof name, argv[a] + 2);
        if (!strcmp(argv[a], "--help")) {
            print_help();
            exit(EXIT_OK);
        }
        int index = option_find(name);
        CHECK(index >= 0, "unknown option --%.80s: the nearest is --%s (--help lists all)", name, nearest_option(name));
        const Option *option = &option_table[index];
        const char *value = equals ? equals + 1 : NULL;
        const char *next = a + 1 < argc ? argv[a + 1] : NULL;
        if (!value && option->type == TYPE_SWITCH) {
            bool stands_alone = !next || (strcmp(next, "0") != 0 && strcmp(next, "1") != 0);
            value = stands_alone ? "1" : argv[++a];
        } else if (!value) {
            CHECK(next && strncmp(next, "--", 2) != 0, "--%s needs a value (%s)%s%.40s", name, option->values,
                  next ? ", found " : "", next ? next : "");
            value = argv[++a];
        }
        option_print(config, option, before, sizeof before);
        CHECK(!config->given[index], "--%s is given twice, '%.80s' and '%.80s': keep one", name, before, value);
        CHECK(option_set(config, option, value, error, sizeof error), "%s", error);
        config->given[index] = true;
    }
}

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

/* The part of config_finish that only fills in; leaves an unknown router alone. */
static void derive(Config *config) {
    ModelConfig *model = &config->model;
    const Router *router = router_find(model->router);
    model->kv_heads = model->kv_heads ? model->kv_heads : model->heads;
    model->vocab = model->vocab ? model->vocab : 256 + (model->objective == OBJECTIVE_MLM);
    if (!router) {
        return;
    }
    if (router->fixed_top_k) {
        model->top_k = router->fixed_top_k == ROUTER_ALL_EXPERTS ? model->experts : router->fixed_top_k;
    }
    if (config->train.aux_coef == OPTION_AUTO) {
        config->train.aux_coef = router->aux_default;
    }
    if (config->train.z_coef == OPTION_AUTO) {
        config->train.z_coef = router->z_default;
    }
    if (router->plan == PLAN_SOFT && model->slots == 0) { /* as many rows as top-k would make */
        int64_t group = router->across ? config->train.batch / config->train.grad_accum : model->seq;
        model->slots = (int)((group * model->top_k + model->experts - 1) / model->experts);
    }
    derive_chain(model, router);
    if (config->train.steps > 0 && config->train.warmup > config->train.steps && !option_given(config, "warmup")) {
        config->train.warmup = config->train.steps;
    }
    if (model->renorm < 0) {
        /* Renormalised over one expert the weight is the constant 1, and a router that learns would learn nothing. A
         * soft one weighs all slots, whatever top_k is. */
        bool constant = model->top_k == 1 && router->learned && router->plan != PLAN_SOFT;
        model->renorm = router->renorm_default && !constant;
    }
}

bool config_read(Config *config, const char *run, char *error, size_t error_size) {
    char path[CONFIG_TEXT + 16], text[CONFIG_FILE];
    config_defaults(config);
    snprintf(path, sizeof path, "%s/config.json", run);
    FILE *file = fopen(path, "r");
    if (!file) {
        snprintf(error, error_size, "cannot read %s (%s)", path, strerror(errno));
        return false;
    }
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    char reason[512];
    if (!config_from_json(config, text, reason, sizeof reason)) {
        snprintf(error, error_size, "%s is not a run's configuration: %s", path, reason);
        return false;
    }
    return true;
}

void config_parse(Config *config, int argc, char **argv) {
    char ours[OPTION_TEXT], theirs[OPTION_TEXT];
    config_defaults(config);
    parse_arguments(config, argc, argv);
    const char *run = config->train.resume;
    if (!run[0]) {
        return;
    }
    Config merged;
    char error[1024];
    CHECK(config_read(&merged, run, error, sizeof error), "--resume %s: %s: name the directory of an earlier run", run,
          error);
    Config saved = merged;
    derive(&saved);
    memcpy(merged.given, config->given, sizeof merged.given);
    memcpy(merged.train.out, run, sizeof merged.train.out);
    for (int i = 0; i < option_count; i++) {
        if (config->given[i]) {
            char error[512];
            option_print(config, &option_table[i], ours, sizeof ours);
            bool valid = option_set(&merged, &option_table[i], ours, error, sizeof error);
            assert(valid);
            (void)valid;
        }
    }
    /* Compared as derived, so that "--renorm auto" agrees with what auto became. */
    Config derived = merged;
    derive(&derived);
    for (int i = 0; i < option_count; i++) {
        if (config->given[i] && option_in_model(&option_table[i])) {
            option_print(config, &option_table[i], ours, sizeof ours);
            option_print(&saved, &option_table[i], theirs, sizeof theirs);
            CHECK(option_equal(&derived, &saved, &option_table[i]),
                  "--%s %s differs from the %s of %s: drop it, or start another run without --resume",
                  option_table[i].name, ours, theirs, run);
        }
    }
    *config = merged;
}

char *config_to_json(const Config *config) {
    char key[64], value[OPTION_TEXT];
    cJSON *object = cJSON_CreateObject();
    for (int i = 0; i < option_count; i++) {
        const Option *option = &option_table[i];
        snprintf(key, sizeof key, "%s", option->name);
        for (char *dash = strchr(key, '-'); dash; dash = strchr(dash, '-')) {
            *dash = '_';
        }
        option_print(config, option, value, sizeof value);
        if (option->type == TYPE_TEXT || option->type == TYPE_CHOICE || !strcmp(value, "auto")) {
            cJSON_AddStringToObject(object, key, value);
        } else {
            cJSON_AddRawToObject(object, key, value); /* cJSON's own printing of doubles may round the last bit */
        }
    }
    char *json = cJSON_Print(object);
    cJSON_Delete(object);
    CHECK(json, "out of memory while writing the configuration");
    return json;
}

/* One key of the object; seen has a flag for every option read so far. */
static bool read_item(Config *config, const cJSON *item, bool *seen, char *error, size_t size) {
    char name[64], number[64];
    snprintf(name, sizeof name, "%s", item->string);
    for (char *bar = strchr(name, '_'); bar; bar = strchr(bar, '_')) {
        *bar = '-';
    }
    int index = option_find(name);
    if (index < 0 || seen[index]) {
        snprintf(error, size, "key \"%.60s\" %s", item->string, index < 0 ? "is no option" : "stands twice");
        return false;
    }
    seen[index] = true;
    const Option *option = &option_table[index];
    bool is_auto = option_may_be_auto(option) && cJSON_IsString(item) && !strcmp(item->valuestring, "auto");
    bool textual = option->type == TYPE_TEXT || option->type == TYPE_CHOICE || is_auto;
    if (textual ? !cJSON_IsString(item) : !cJSON_IsNumber(item)) {
        snprintf(error, size, "key \"%s\" must hold a %s", item->string, textual ? "string" : "number");
        return false;
    }
    snprintf(number, sizeof number, "%.17g", item->valuedouble);
    return option_set(config, option, textual ? item->valuestring : number, error, size);
}

bool config_from_json(Config *config, const char *json, char *error, size_t error_size) {
    cJSON *object = cJSON_ParseWithOpts(json, NULL, true);
    if (!cJSON_IsObject(object)) {
        snprintf(error, error_size, "it is not one whole JSON object");
        cJSON_Delete(object);
        return false;
    }
    Config read = *config;
    bool seen[CONFIG_MOST_OPTIONS] = {false};
    bool valid = true;
    for (const cJSON *item = object->child; item && valid; item = item->next) {
        valid = read_item(&read, item, seen, error, error_size);
    }
    cJSON_Delete(object);
    if (valid) {
        *config = read;
    }
    return valid;
}

void config_difference(const Config *a, const Config *b, char *names, size_t size) {
    size_t used = 0;
    names[0] = '\0';
    for (int i = 0; i < option_count; i++) {
        if (option_table[i].trains && !option_equal(a, b, &option_table[i]) && used < size) {
            used += (size_t)snprintf(names + used, size - used, "%s--%s", used ? ", " : "", option_table[i].name);
        }
    }
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

/* Names that parse everywhere but whose feature this program does not have. */
static void check_available(const TrainConfig *train) {
    CHECK(!strcmp(train->tokenizer, "byte"), "--tokenizer %s: this version reads text as bytes only; drop the option",
          train->tokenizer);
    CHECK(train->ep == 1, "--ep %d: this version keeps all experts on one rank; use --ep 1", train->ep);
    CHECK(!train->export_hf[0],
          "--export-hf %s: this version writes RUN/checkpoint/model.safetensors only; drop the option",
          train->export_hf);
    CHECK(!train->trace_syncs, "--trace-syncs: on the CPU there is no device to wait for; drop the option");
}

static void check_objective(const Config *config) {
    const ModelConfig *model = &config->model;
    bool masked = model->objective == OBJECTIVE_MLM;
    CHECK(masked || !option_given(config, "mask-share"),
          "--mask-share hides tokens for --objective mlm: add that, or drop it");
    CHECK(!masked || config->train.sample == 0,
          "--sample with --objective mlm: a model of masked tokens does not write from left to right; drop --sample");
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
        CHECK(!option_given(config, owner[i][0]) || !strcmp(model->router, owner[i][1]),
              "--%s is for --router %s, not %s: drop it", owner[i][0], owner[i][1], model->router);
    }
    CHECK(router->plan == PLAN_SOFT || !option_given(config, "slots") || model->slots == 0,
          "--slots is for soft routers: with --router %s, --top-k sets the rows; drop it", router->name);
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
    CHECK(!drops_nobody || !option_given(config, "drop"),
          "--drop decides who is dropped, but --router %s drops nobody: drop --drop", router->name);
    CHECK(model->capacity_factor > 0 || !option_given(config, "drop"),
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
    CHECK(model->dim / model->heads <= ROPE_MOST_HEAD,
          "--dim %d over --heads %d makes heads of %d, more than %d: raise --heads", model->dim, model->heads,
          model->dim / model->heads, ROPE_MOST_HEAD);
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
    derive(config);
    CHECK(!router->fixed_top_k || !option_given(config, "top-k") || model->top_k == asked_top_k,
          "--router %s sends a token to %d expert%s: drop --top-k %d, or use --router topk", router->name, model->top_k,
          model->top_k > 1 ? "s" : "", asked_top_k);

    CHECK(train->data[0], "--data is empty: name a file, or use --data builtin");
    CHECK(train->out[0], "--out is empty: name a directory for the run");
    CHECK(model->dim % model->heads == 0, "--dim %d is not divisible by --heads %d: change one of them", model->dim,
          model->heads);
    CHECK(
        model->dim / model->heads % 2 == 0,
        "--dim %d over --heads %d makes heads of odd size %d, and the rotary embedding turns pairs: change one of them",
        model->dim, model->heads, model->dim / model->heads);
    CHECK(model->heads % model->kv_heads == 0, "--heads %d is not divisible by --kv-heads %d: change one of them",
          model->heads, model->kv_heads);
    CHECK(model->vocab >= 2, "--vocab %d leaves nothing to predict: use at least 2, or 0 for the tokenizer's",
          model->vocab);
    CHECK(train->batch % train->grad_accum == 0, "--batch %d is not divisible by --grad-accum %d: change one of them",
          train->batch, train->grad_accum);
    CHECK(train->steps == 0 || train->warmup <= train->steps, "--warmup %d is longer than --steps %d: lower it",
          train->warmup, train->steps);
    for (const char *c = train->prompt; *c; c++) {
        CHECK((unsigned char)*c < model->vocab,
              "--prompt holds byte %d, but --vocab %d ends before it: change one of them", (unsigned char)*c,
              model->vocab);
    }
    check_available(train);
    check_objective(config);
    check_router_options(config);
    check_routing(config);
    check_chain(model);
    check_sizes(config);
}
