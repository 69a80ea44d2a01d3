/* What config_finish fills in: the numbers that follow from other options, "auto" until then, and each router's own.
 *
 * The option table itself is tested in test_config.c, what is refused in test_config_refusals.c. Read next:
 * model/config.c, derive().
 */
#include "command_line.h"

#include <cjson/cJSON.h>

#include "../model/config.h"
#include "../model/router.h"

static void test_finish_derives(void **state) {
    Config config;
    parse(&config, "");
    config_finish(&config);
    assert_int_equal(config.model.kv_heads, 4);
    assert_int_equal(config.model.head_dim, 32);
    assert_int_equal(config.model.vocab, 256);
    assert_int_equal(config.model.renorm, 1);
    parse(&config, "--top-k 1");
    config_finish(&config);
    assert_int_equal(config.model.renorm, 0);
    parse(&config, "--router top1");
    config_finish(&config);
    assert_int_equal(config.model.top_k, 1);
    assert_int_equal(config.model.renorm, 0);
    parse(&config, "--router dense --top-k 3 --shared-experts 1 --expert-dim 10");
    config_finish(&config);
    assert_int_equal(config_dense_width(&config.model), 40);
    parse(&config, "--chain-steps 3 --expert-dim 10");
    config_finish(&config);
    assert_int_equal(config_dense_width(&config.model), 60);
    parse(&config, "--objective mlm");
    config_finish(&config);
    assert_int_equal(config.model.vocab, 257); /* the mask beside the bytes */
    parse(&config, "--objective mlm --vocab 300");
    config_finish(&config);
    assert_int_equal(config.model.vocab, 300);
}

/* What each router makes of 8 experts, 2 per token, sequences of 128 in batches of 16. A router that is missing here
 * fails the test. */
static void test_finish_takes_the_routers_own(void **state) {
    static const struct {
        const char *name;
        double aux, z;
        int top_k, renorm, chain_steps, slots;
    } own[] = {
        {"dense", 0, 0, 2, 0, 1, 0},          {"top1", 0.01, 0.001, 1, 0, 1, 0},
        {"topk", 0.01, 0.001, 2, 1, 1, 0},    {"noisy", 0.01, 0, 2, 1, 1, 0},
        {"sigmoid", 1e-4, 0, 2, 1, 1, 0},     {"hash", 0, 0, 2, 1, 1, 0},
        {"position", 0, 0, 2, 1, 1, 0},       {"random", 0, 0, 2, 1, 1, 0},
        {"random-step", 0, 0, 2, 1, 1, 0},    {"expert-choice", 0, 0.001, 2, 0, 1, 0},
        {"threshold", 0, 0.001, 2, 0, 1, 0},  {"soft", 0, 0, 2, 1, 1, 32},
        {"soft-batch", 0, 0, 2, 1, 1, 4},     {"soft-uniform", 0, 0, 2, 1, 1, 32},
        {"uniform-soft", 0, 0, 2, 1, 1, 32},  {"uniform-uniform", 0, 0, 2, 1, 1, 32},
        {"soft-identity", 0, 0, 1, 1, 1, 16}, {"soft-token", 0, 0.001, 8, 0, 1, 0},
        {"coe", 0.01, 0.001, 2, 1, 2, 0},     {"forced", 0.01, 0.001, 2, 1, 1, 0},
    };
    size_t count = 0;
    for (const Router *router; (router = router_at((int)count)); count++) {
        char command[64];
        Config config;
        snprintf(command, sizeof command, "--allow-leak --router %s", router->name);
        parse(&config, command);
        config_finish(&config);
        assert_true(count < sizeof own / sizeof *own);
        assert_string_equal(router->name, own[count].name);
        if (config.train.aux_coef != own[count].aux || config.train.z_coef != own[count].z) {
            fail_msg("%s: coefficients %g and %g", router->name, config.train.aux_coef, config.train.z_coef);
        }
        assert_int_equal(config.model.top_k, own[count].top_k);
        assert_int_equal(config.model.renorm, own[count].renorm);
        assert_int_equal(config.model.chain_steps, own[count].chain_steps);
        assert_int_equal(config.model.slots, own[count].slots);
    }
    assert_int_equal(count, sizeof own / sizeof *own);
}

static void test_finish_derives_slots(void **state) {
    static const struct {
        const char *command;
        int slots;
    } cases[] = {
        {"--router soft --seq 128 --experts 8 --top-k 1", 16},
        {"--router soft --seq 100 --experts 16 --top-k 3", 19}, /* 18.75 */
        {"--router soft --slots 5", 5},
        {"--router soft-batch --batch 12 --grad-accum 3 --experts 8 --top-k 1", 1}, /* a slice has 4 sequences */
        {"--router soft-batch --batch 12 --experts 8 --top-k 1", 2},
        {"--router topk --slots 0", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char command[128];
        Config config;
        snprintf(command, sizeof command, "--allow-leak %s", cases[i].command);
        parse(&config, command);
        config_finish(&config);
        assert_int_equal(config.model.slots, cases[i].slots);
        assert_int_equal(config.model.renorm, 1); /* of a soft one too when top_k, which only sets its slots, is 1 */
    }
}

static void test_finish_derives_the_chain(void **state) {
    static const struct {
        const char *command;
        int steps, inner, outer;
    } cases[] = {
        {"", 1, 0, 1},
        {"--router coe", 2, 1, 1},
        {"--router coe --chain-steps 5", 5, 1, 1},
        {"--router hash --chain-steps 3 --chain-inner 0", 3, 0, 1},
        {"--chain-norm 1", 1, 1, 0},
        {"--router coe --chain-norm 1", 2, 1, 0},
        {"--chain-norm 1 --chain-inner 0 --chain-outer 1", 1, 0, 1},
        {"--chain-steps 2 --chain-outer 0", 2, 1, 0},
        {"--chain-steps auto --chain-inner auto --chain-outer auto", 1, 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Config config;
        parse(&config, cases[i].command);
        config_finish(&config);
        assert_int_equal(config.model.chain_steps, cases[i].steps);
        assert_int_equal(config.model.chain_inner, cases[i].inner);
        assert_int_equal(config.model.chain_outer, cases[i].outer);
    }
}

/* Before config_finish the number is "auto" in JSON, after it what auto became; both are read back as they were. */
static void test_auto_in_json(void **state) {
    static const char *const keys[] = {"aux_coef", "z_coef", "chain_steps", "chain_inner", "chain_outer", "renorm"};
    static const double derived[] = {0.01, 0.001, 2, 1, 1, 1};
    for (int finished = 0; finished < 2; finished++) {
        Config config, again;
        char error[256];
        parse(&config, "--router coe");
        if (finished) {
            config_finish(&config);
        }
        char *json = config_to_json(&config);
        cJSON *object = cJSON_Parse(json);
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
            const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, keys[i]);
            assert_non_null(item);
            double number = cJSON_IsString(item) ? strtod(item->valuestring, NULL) : item->valuedouble;
            assert_true(finished ? number == derived[i] : cJSON_IsString(item) && !strcmp(item->valuestring, "auto"));
        }
        parse(&again, "--aux-coef 0.5 --z-coef 0.5 --chain-steps 7 --chain-inner 0 --chain-outer 0 --renorm 0");
        assert_true(config_from_json(&again, json, error, sizeof error));
        char *json_again = config_to_json(&again);
        assert_string_equal(json, json_again);
        cJSON_Delete(object);
        free(json);
        free(json_again);
    }
}

static void test_leaky(void **state) {
    static const struct {
        const char *command;
        bool leaky;
    } cases[] = {
        {"--router topk", false},
        {"--router threshold", false},
        {"--router soft-batch", false}, /* sees other texts, none of them later */
        {"--router soft", true},
        {"--router expert-choice", true},
        {"--router soft --objective mlm", false},
        {"--router expert-choice --objective mlm", false},
        {"--capacity-factor 1", false},
        {"--capacity-factor 1 --drop slot", true},
        {"--capacity-factor 1 --drop weight --objective mlm", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char command[128];
        Config config;
        snprintf(command, sizeof command, "--allow-leak %s", cases[i].command);
        parse(&config, command);
        config_finish(&config);
        if (config_is_leaky(&config.model) != cases[i].leaky) {
            fail_msg("%s is %s", command, cases[i].leaky ? "not leaky" : "leaky");
        }
    }
}

static void test_finish_is_idempotent(void **state) {
    const char *commands[] = {"",
                              "--router top1",
                              "--router dense",
                              "--top-k 1",
                              "--capacity-factor 1.25 --drop slot --allow-leak",
                              "--router soft --objective mlm",
                              "--router soft-batch --grad-accum 2",
                              "--router soft-token",
                              "--router hash --top-k 1",
                              "--router coe --chain-norm 1",
                              "--router sigmoid --router-groups 4 --router-kept-groups 2"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        Config config;
        parse(&config, commands[i]);
        config_finish(&config);
        char *once = config_to_json(&config);
        config_finish(&config);
        char *twice = config_to_json(&config);
        assert_string_equal(once, twice);
        free(once);
        free(twice);
    }
}

static void test_capacity(void **state) {
    Config config;
    config_defaults(&config);
    assert_int_equal(config_capacity(&config.model, 100), 0);
    config.model.capacity_factor = 1.25;
    assert_int_equal(config_capacity(&config.model, 128), 40);
    assert_int_equal(config_capacity(&config.model, 1), 1);
    assert_int_equal(config_capacity(&config.model, 100), 32); /* 31.25 */
    config.model.experts = 10;
    config.model.capacity_factor = 1.1;
    assert_int_equal(config_capacity(&config.model, 100), 22); /* 22.000000000000004 in binary */
    config.model.capacity_factor = 100;
    assert_int_equal(config_capacity(&config.model, 100), 100);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finish_derives),       cmocka_unit_test(test_finish_takes_the_routers_own),
        cmocka_unit_test(test_finish_derives_slots), cmocka_unit_test(test_finish_derives_the_chain),
        cmocka_unit_test(test_auto_in_json),         cmocka_unit_test(test_leaky),
        cmocka_unit_test(test_finish_is_idempotent), cmocka_unit_test(test_capacity),
    };
    return cmocka_run_group_tests_name("config derived", tests, NULL, NULL);
}
