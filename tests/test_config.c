/* The option table: every option from the command line to JSON and back, what --help promises, how configurations
 * differ, and --resume. What follows from the options is in test_config_derived.c, what is refused in
 * test_config_refusals.c.
 *
 * What an option may be is learned from --help and from the JSON of the defaults, so an option that is added to the
 * table is tested without a change here.
 */
#include "command_line.h"
#include "forked.h"

#include <cjson/cJSON.h>
#include <ctype.h>
#include <math.h>
#include <sys/stat.h>

#include "../model/config.h"

static char directory[] = "/tmp/moelab-config-XXXXXX";
static char run_directory[64];

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

/* Makes run_directory the directory of a run with this configuration. */
static void make_run(const Config *config) {
    char path[96];
    snprintf(path, sizeof path, "%s/config.json", run_directory);
    char *json = config_to_json(config);
    write_file(path, json);
    free(json);
}

/* --- the table as --help and JSON show it --- */

typedef struct {
    char name[64], values[64], initial[64];
} HelpLine;

static void ask_help(void *unused) {
    Config config;
    parse(&config, "--help");
}

/* The line of --help about the option whose JSON key is `key`. */
static HelpLine help_line(const char *help, const char *key) {
    HelpLine line = {0};
    char start[80];
    snprintf(line.name, sizeof line.name, "%s", key);
    for (char *bar = strchr(line.name, '_'); bar; bar = strchr(bar, '_')) {
        *bar = '-';
    }
    snprintf(start, sizeof start, "\n  --%s ", line.name);
    const char *at = strstr(help, start);
    if (!at) {
        fail_msg("--help does not show --%s", line.name);
        return line;
    }
    at += strlen(start);
    snprintf(line.values, sizeof line.values, "%.*s", (int)strcspn(at, " \n"), at);
    const char *end = strchr(at, '\n'), *bracket = at;
    for (const char *c = at; c < end; c++) {
        bracket = *c == '[' ? c : bracket;
    }
    assert_true(*bracket == '[' && end[-1] == ']');
    snprintf(line.initial, sizeof line.initial, "%.*s", (int)(end - 1 - bracket - 1), bracket + 1);
    return line;
}

/* A value of the option other than its default, as text. */
static void another_value(const HelpLine *line, const cJSON *initial, char *text, size_t size) {
    char names[64];
    snprintf(names, sizeof names, "%s", line->values);
    for (char *name = strtok(names, "|"); name && strchr(line->values, '|'); name = strtok(NULL, "|")) {
        /* N, X and FILE stand for values, names are small letters and digits */
        if (!isupper((unsigned char)*name) && strcmp(name, line->initial) != 0) {
            snprintf(text, size, "%s", name);
            return;
        }
    }
    if (!strcmp(line->name, "resume") || !strcmp(line->name, "init-from")) {
        snprintf(text, size, "%s", run_directory);
    } else if (!line->values[0]) {
        snprintf(text, size, "1");
    } else if (!strcmp(line->values, "auto|N") || !strcmp(line->values, "auto|X")) {
        snprintf(text, size, line->values[5] == 'N' ? "3" : "0.7");
    } else if (cJSON_IsString(initial)) {
        snprintf(text, size, "a \"b\" \\ \xc3\xa9");
    } else if (!strcmp(line->values, "X")) {
        snprintf(text, size, "%.17g", initial->valuedouble != 0 ? initial->valuedouble * 0.7 : 0.7);
    } else {
        snprintf(text, size, "%.0f", initial->valuedouble + 1);
    }
}

static void check_round_trip(const HelpLine *line, const char *key, const cJSON *defaults, bool with_equals) {
    char value[128], joined[256], dashed[80], error[256];
    another_value(line, cJSON_GetObjectItemCaseSensitive(defaults, key), value, sizeof value);
    snprintf(joined, sizeof joined, "--%s=%s", line->name, value);
    snprintf(dashed, sizeof dashed, "--%s", line->name);
    char *apart[] = {"train", dashed, value}, *together[] = {"train", joined};
    Config config, again;
    config_parse(&config, with_equals ? 2 : 3, with_equals ? together : apart);
    char *json = config_to_json(&config);
    config_defaults(&again);
    if (!config_from_json(&again, json, error, sizeof error)) {
        fail_msg("--%s %s does not survive JSON: %s", line->name, value, error);
    }
    char *json_again = config_to_json(&again);
    assert_string_equal(json, json_again);

    cJSON *object = cJSON_Parse(json);
    for (const cJSON *item = object->child; item; item = item->next) {
        bool equal = cJSON_Compare(item, cJSON_GetObjectItemCaseSensitive(defaults, item->string), true);
        bool follows = !strcmp(line->name, "resume") && !strcmp(item->string, "out");
        if (equal != (strcmp(item->string, key) != 0) && !follows) {
            fail_msg("--%s %s %s %s", line->name, value, equal ? "did not change" : "changed", item->string);
        }
    }
    const cJSON *ours = cJSON_GetObjectItemCaseSensitive(object, key);
    if (cJSON_IsNumber(ours)) {
        assert_true(ours->valuedouble == strtod(value, NULL));
    } else {
        assert_string_equal(ours->valuestring, value);
    }
    cJSON_Delete(object);
    free(json);
    free(json_again);
}

static void test_every_option_round_trips(void **state) {
    Forked help;
    Config config;
    run_forked(&help, ask_help, NULL);
    config_defaults(&config);
    char *json = config_to_json(&config);
    make_run(&config);
    cJSON *defaults = cJSON_Parse(json);
    for (const cJSON *item = defaults->child; item; item = item->next) {
        HelpLine line = help_line(help.out, item->string);
        check_round_trip(&line, item->string, defaults, true);
        check_round_trip(&line, item->string, defaults, false);
    }
    cJSON_Delete(defaults);
    free(json);
}

static void test_json_keeps_absent_keys(void **state) {
    Config config;
    char error[256];
    parse(&config, "--layers 7 --lr 0.5");
    assert_true(config_from_json(&config, "{\"lr\": 0.25}", error, sizeof error));
    assert_int_equal(config.model.layers, 7);
    assert_true(config.train.lr == 0.25);
}

static void test_help_shows_every_option_with_its_default(void **state) {
    Forked help;
    Config config;
    run_forked(&help, ask_help, NULL);
    assert_int_equal(help.exit_code, 0);
    assert_string_equal(help.err, "");
    config_defaults(&config);
    char *json = config_to_json(&config);
    cJSON *defaults = cJSON_Parse(json);
    int lines = 0;
    for (const char *at = strstr(help.out, "\n  --"); at; at = strstr(at + 1, "\n  --")) {
        lines++;
    }
    assert_int_equal(lines, cJSON_GetArraySize(defaults) + 1); /* and --help itself */
    for (const cJSON *item = defaults->child; item; item = item->next) {
        HelpLine line = help_line(help.out, item->string);
        if (cJSON_IsNumber(item)) {
            char *end = NULL;
            assert_true(strtod(line.initial, &end) == item->valuedouble);
            assert_true(end != line.initial && *end == '\0');
        } else {
            assert_string_equal(line.initial, item->valuestring);
        }
    }
    const char *groups[] = {"\ndata\n",     "\nmodel\n",    "\nfine-tuning\n", "\nlosses\n",
                            "\ntraining\n", "\nparallel\n", "\noutput\n",      "\nmeasure\n"};
    const char *after = help.out;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        after = strstr(after, groups[i]);
        if (!after) {
            fail_msg("--help has no group %s in its place", groups[i]);
            return;
        }
    }
    cJSON_Delete(defaults);
    free(json);
}

/* Names that scripts and notebooks rely on. */
static void test_stable_names(void **state) {
    const char *names =
        "data val tokenizer shuffle allow_leak layers dim heads kv_heads qk_norm seq vocab expert_dim experts top_k "
        "shared_experts router renorm act moe_every chain_steps capacity_factor layout aux_coef z_coef batch "
        "grad_accum steps lr warmup schedule weight_decay beta1 beta2 clip seed eval_every eval_batches log_every "
        "save_every resume freeze ep out sample export_hf profile trace_syncs tie drop norm_eps rope_base min_lr "
        "max_skips prompt temperature sample_top_k top_p eval_drop objective mask_share slots router_groups "
        "router_kept_groups router_scale force chain_inner chain_outer chain_norm bias_rate threshold_rate "
        "threshold_warmup dump_routing head_dim init_from upcycle export_gguf choices choices_most graph "
        "domains recompute exchange exchange_rows wire wire_back patience exchange_chunks overlap peer_memory "
        "exchange_margin soft_scale exchange_return "
        "perft perft_count perft_top_k perft_rank perft_act perft_scale perft_aux_coef lora";
    char copy[1024];
    Config config;
    config_defaults(&config);
    char *json = config_to_json(&config);
    cJSON *object = cJSON_Parse(json);
    int count = 0;
    snprintf(copy, sizeof copy, "%s", names);
    for (char *name = strtok(copy, " "); name; name = strtok(NULL, " "), count++) {
        if (!cJSON_HasObjectItem(object, name)) {
            fail_msg("option %s is gone", name);
        }
    }
    assert_int_equal(count, cJSON_GetArraySize(object));
    cJSON_Delete(object);
    free(json);
}

static void test_options_reach_their_fields(void **state) {
    Config config;
    parse(&config,
          "--router top1 --renorm 0 --act gelu --layout padded --schedule wsd --freeze router --seed 9007199254740991"
          " --lr=2e-4 --profile --data x.txt");
    assert_string_equal(config.model.router, "top1");
    assert_string_equal(config.train.data, "x.txt");
    assert_int_equal(config.model.renorm, 0);
    assert_int_equal(config.model.act, ACT_GELU);
    assert_int_equal(config.model.layout, LAYOUT_PADDED);
    assert_int_equal(config.train.schedule, SCHEDULE_WSD);
    assert_int_equal(config.train.freeze, FREEZE_ROUTER);
    assert_true(config.train.seed == INT64_C(9007199254740991));
    assert_true(config.train.lr == 2e-4);
    assert_int_equal(config.train.profile, 1);
    parse(&config, "--profile --allow-leak 0 --trace-syncs 1 --drop weight --renorm auto --freeze experts");
    assert_int_equal(config.train.profile, 1);
    assert_int_equal(config.train.allow_leak, 0);
    assert_int_equal(config.train.trace_syncs, 1);
    assert_int_equal(config.model.drop, DROP_WEIGHT);
    assert_int_equal(config.model.renorm, -1);
    assert_int_equal(config.train.freeze, FREEZE_EXPERTS);
    parse(&config,
          "--objective mlm --mask-share 0.3 --slots 3 --router-groups 4 --router-kept-groups 2 --router-scale 2.5"
          " --soft-scale 8 --force zipf:1.2 --chain-steps 3 --chain-inner 0 --chain-outer 1 --chain-norm 1 "
          "--dump-routing t.bin");
    assert_int_equal(config.model.objective, OBJECTIVE_MLM);
    assert_true(config.train.mask_share == 0.3 && config.model.router_scale == 2.5);
    assert_true(config.model.soft_scale == 8);
    assert_int_equal(config.model.slots, 3);
    assert_int_equal(config.model.router_groups, 4);
    assert_int_equal(config.model.router_kept_groups, 2);
    assert_string_equal(config.model.force, "zipf:1.2");
    assert_int_equal(config.model.chain_steps, 3);
    assert_int_equal(config.model.chain_inner, 0);
    assert_int_equal(config.model.chain_outer, 1);
    assert_int_equal(config.model.chain_norm, 1);
    assert_string_equal(config.train.dump_routing, "t.bin");
    parse(&config, "--aux-coef 0.5 --z-coef auto --bias-rate 0.2 --threshold-rate 0.3 --threshold-warmup 7");
    assert_true(config.train.aux_coef == 0.5 && config.train.z_coef == OPTION_AUTO && config.train.bias_rate == 0.2);
    assert_true(config.train.threshold_rate == 0.3);
    assert_int_equal(config.train.threshold_warmup, 7);
}

static void test_defaults(void **state) {
    Config config;
    parse(&config, "");
    for (int i = 0; i < CONFIG_MOST_OPTIONS; i++) {
        assert_false(config.given[i]);
    }
    assert_string_equal(config.train.data, "builtin");
    assert_string_equal(config.train.out, "runs/default");
    assert_string_equal(config.model.router, "topk");
    assert_int_equal(config.model.layers, 4);
    assert_int_equal(config.model.dim, 128);
    assert_int_equal(config.model.experts, 8);
    assert_int_equal(config.model.top_k, 2);
    assert_int_equal(config.model.expert_dim, 256);
    assert_int_equal(config.train.batch, 16);
    assert_true(config.model.norm_eps == 1e-6 && config.train.lr == 3e-3 && config.train.beta2 == 0.95);
    assert_true(config.train.aux_coef == OPTION_AUTO && config.train.z_coef == OPTION_AUTO);
    assert_int_equal(config.model.objective, OBJECTIVE_LM);
    assert_int_equal(config.model.chain_steps, OPTION_AUTO);
    assert_string_equal(config.model.force, "balanced");
    assert_string_equal(config.train.dump_routing, "");
    assert_true(config.train.mask_share == 0.15 && config.train.bias_rate == 0.001);
    assert_int_equal(config.train.threshold_warmup, 50);
}

/* --- two configurations --- */

static void test_difference(void **state) {
    Config a, b;
    char names[256];
    parse(&a, "");
    parse(&b, "--log-every 1 --out x --sample 5 --profile --eval-every 7 --save-every 3 --resume= --dump-routing x");
    config_difference(&a, &b, names, sizeof names);
    assert_string_equal(names, "");
    parse(&b, "--dim 64 --lr 0.1 --data x --aux-coef 0 --seed 1 --log-every 1");
    config_difference(&a, &b, names, sizeof names);
    assert_string_equal(names, "--data, --dim, --aux-coef, --lr, --seed");
    parse(&b,
          "--objective mlm --mask-share 0.2 --force one --slots 1 --bias-rate 0 --threshold-warmup 1 --chain-norm 1");
    config_difference(&a, &b, names, sizeof names);
    assert_string_equal(names,
                        "--mask-share, --objective, --slots, --force, --chain-norm, --bias-rate, "
                        "--threshold-warmup");
    config_difference(&a, &b, names, 12);
    assert_int_equal(strlen(names), 11);
}

/* --- --resume --- */

static void test_resume_takes_the_runs_configuration(void **state) {
    char command[256];
    Config config;
    parse(&config, "--dim 64 --experts 4 --lr 0.1 --out elsewhere");
    config_finish(&config);
    make_run(&config);
    snprintf(command, sizeof command, "--steps 77 --resume %s --dim 64 --kv-heads 0 --renorm auto --vocab 256",
             run_directory);
    parse(&config, command);
    config_finish(&config);
    assert_int_equal(config.model.dim, 64);
    assert_int_equal(config.model.experts, 4);
    assert_int_equal(config.model.renorm, 1);
    assert_int_equal(config.train.steps, 77);
    assert_true(config.train.lr == 0.1);
    assert_string_equal(config.train.out, run_directory);
    assert_string_equal(config.train.resume, run_directory);
    assert_true(config.train.aux_coef == 0.01);
    snprintf(command, sizeof command, "--resume %s --chain-steps auto --chain-outer 1 --aux-coef 0.5", run_directory);
    parse(&config, command);
    config_finish(&config);
    assert_int_equal(config.model.chain_steps, 1);
    assert_true(config.train.aux_coef == 0.5); /* no part of the model */
    snprintf(command, sizeof command, "--resume %s --out other", run_directory);
    parse(&config, command);
    assert_string_equal(config.train.out, "other");
}

static void test_resume_refusals(void **state) {
    char command[256], path[96];
    Config config;
    parse(&config, "--dim 64");
    config_finish(&config);
    make_run(&config);
    snprintf(command, sizeof command, "--resume %s --dim 256", run_directory);
    assert_command_refused(command, "--dim 256 differs from the 64 of");
    snprintf(command, sizeof command, "--router top1 --resume %s", run_directory);
    assert_command_refused(command, "--router top1 differs from the topk of");
    snprintf(command, sizeof command, "--resume %s --kv-heads 2", run_directory);
    assert_command_refused(command, "--kv-heads 2 differs from the 4 of");
    snprintf(command, sizeof command, "--resume %s --objective mlm", run_directory);
    assert_command_refused(command, "--objective mlm differs from the lm of");
    snprintf(command, sizeof command, "--resume %s --chain-steps 2", run_directory);
    assert_command_refused(command, "--chain-steps 2 differs from the 1 of");
    assert_command_refused("--resume /nowhere/run", "cannot read /nowhere/run/config.json");
    snprintf(path, sizeof path, "%s/config.json", run_directory);
    snprintf(command, sizeof command, "--resume %s", run_directory);
    write_file(path, "{\"dim\": 64");
    assert_command_refused(command, "is not a run's configuration");
    write_file(path, "{\"colour\": 1}");
    assert_command_refused(command, "\"colour\" is no option");
}

static int set_up(void **state) {
    if (!mkdtemp(directory)) {
        return -1;
    }
    snprintf(run_directory, sizeof run_directory, "%s/run", directory);
    return mkdir(run_directory, 0777);
}

static int tear_down(void **state) {
    char path[96];
    snprintf(path, sizeof path, "%s/config.json", run_directory);
    unlink(path);
    return rmdir(run_directory) || rmdir(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_option_round_trips),
        cmocka_unit_test(test_json_keeps_absent_keys),
        cmocka_unit_test(test_help_shows_every_option_with_its_default),
        cmocka_unit_test(test_stable_names),
        cmocka_unit_test(test_options_reach_their_fields),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_difference),
        cmocka_unit_test(test_resume_takes_the_runs_configuration),
        cmocka_unit_test(test_resume_refusals),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
