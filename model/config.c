/* The configuration: the command line and --help, and the run's config.json.
 *
 * Most functions know no option by name; they walk the table of options.c. A command line is laid over a base: the
 * defaults, the run that --resume goes on with, or the model that --init-from starts from.
 *
 * Called by train.c, log.c (the run's config.json), resume.c and import.c. Read next: config_rules.c, where options
 * meet; options.c, the table itself.
 */
#include "config.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "import.h"
#include "options.h"
#include "router.h"

enum { CONFIG_FILE = 65536 };

bool config_given(const Config *config, const char *name) {
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

/* Sets on top of *config what the command line gave, which stands in typed. */
static void apply_given(Config *config, const Config *typed) {
    char text[OPTION_TEXT], error[512];
    memcpy(config->given, typed->given, sizeof config->given);
    for (int i = 0; i < option_count; i++) {
        if (typed->given[i]) {
            option_print(typed, &option_table[i], text, sizeof text);
            bool valid = option_set(config, &option_table[i], text, error, sizeof error);
            assert(valid);
            (void)valid;
        }
    }
}

/* --resume: the saved run's configuration below what the command line gave, which must leave the model as it is. */
static void resume_config(Config *config) {
    const char *run = config->train.resume;
    char ours[OPTION_TEXT], theirs[OPTION_TEXT], error[1024];
    Config merged;
    CHECK(config_read(&merged, run, error, sizeof error), "--resume %s: %s: name the directory of an earlier run", run,
          error);
    Config saved = merged;
    config_derive(&saved);
    memcpy(merged.train.out, run, sizeof merged.train.out);
    apply_given(&merged, config);
    /* Compared as derived, so that "--renorm auto" agrees with what auto became. */
    Config derived = merged;
    config_derive(&derived);
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

/* A model's router and what belongs to it as if never chosen, experts kept. */
static void reset_router(ModelConfig *model) {
    Config defaults;
    config_defaults(&defaults);
    ModelConfig fresh = defaults.model;
    memcpy(model->router, fresh.router, sizeof model->router);
    memcpy(model->force, fresh.force, sizeof model->force);
    model->renorm = fresh.renorm;
    model->slots = fresh.slots;
    model->router_groups = fresh.router_groups;
    model->router_kept_groups = fresh.router_kept_groups;
    model->router_scale = fresh.router_scale;
    model->soft_scale = fresh.soft_scale;
    model->chain_steps = fresh.chain_steps;
    model->chain_inner = fresh.chain_inner;
    model->chain_outer = fresh.chain_outer;
    model->chain_norm = fresh.chain_norm;
}

/* The dense model that DIR holds as the mixture of experts that --upcycle makes of it. */
static void upcycle_config(ModelConfig *model, const char *directory) {
    Config defaults;
    config_defaults(&defaults);
    const Router *router = router_find(model->router);
    CHECK(router && router->plan == PLAN_NONE,
          "--upcycle makes experts of a dense model, but %s has --router %s: drop --upcycle", directory, model->router);
    Config derived = {.model = *model};
    config_derive(&derived);
    model->expert_dim = config_dense_width(&derived.model);
    reset_router(model);
    model->experts = defaults.model.experts;
    model->top_k = defaults.model.top_k;
    model->shared_experts = 0;
    model->moe_every = 1;
}

/* --init-from: the model's options below what the command line gave. */
static void init_from_config(Config *config) {
    const char *directory = config->train.init_from;
    char error[1024];
    Config source, merged;
    CHECK(import_config(&source, directory, error, sizeof error),
          "--init-from %s: %s: name a run's directory, or a folder of Hugging Face transformers", directory, error);
    config_defaults(&merged);
    merged.model = source.model;
    import_tokenizer(merged.train.tokenizer, &source, directory);
    if (config->train.upcycle) {
        upcycle_config(&merged.model, directory);
    } else if (config_given(config, "router") && strcmp(config->model.router, source.model.router) != 0) {
        reset_router(&merged.model);
    }
    apply_given(&merged, config);
    *config = merged;
}

void config_parse(Config *config, int argc, char **argv) {
    config_defaults(config);
    parse_arguments(config, argc, argv);
    const TrainConfig *train = &config->train;
    CHECK(!train->resume[0] || !train->init_from[0],
          "--resume %s goes on with a run and --init-from %s starts one: drop one of them", train->resume,
          train->init_from);
    if (train->resume[0]) {
        resume_config(config);
    } else if (train->init_from[0]) {
        init_from_config(config);
    }
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
    for (char *c = error; !valid && *c; c++) { /* one line, whatever key or text the file holds */
        *c = (unsigned char)*c < ' ' ? '?' : *c;
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
