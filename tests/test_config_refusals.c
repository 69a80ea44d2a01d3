/* What the configuration refuses, each with the words that tell the user what to do: command lines that are malformed,
 * options that contradict each other, and JSON that is no run's; and what is close to a refusal but accepted.
 *
 * Everything that is accepted is in test_config.c and test_config_derived.c. Read next: model/config.c.
 */
#include "command_line.h"
#include "forked.h"

#include "../model/config.h"
#include "../model/options.h"

typedef struct {
    const char *command, *words;
} Refusal;

static void assert_all_refused(const Refusal *refusals, size_t count) {
    for (size_t i = 0; i < count; i++) {
        assert_command_refused(refusals[i].command, refusals[i].words);
    }
}

static void test_malformed_command_lines(void **state) {
    static const Refusal refusals[] = {
        {"--lrr 1", "unknown option --lrr: the nearest is --lr"},
        {"--top_k 2", "the nearest is --top-k"},
        {"--expert 4", "the nearest is --experts"},
        {"--temp 1", "the nearest is --temperature"},
        {"--bacth 4", "the nearest is --batch"},
        {"--hepl", "the nearest is --help"},
        {"--steps", "--steps needs a value"},
        {"--steps --dim 64", "--steps needs a value (N), found --dim"},
        {"--qk-norm", "--qk-norm needs a value (0|1)"},
        {"train.txt", "unexpected 'train.txt'"},
        {"-h", "unexpected '-h'"},
        {"--", "unexpected '--'"},
        {"--lr 1 --lr=1", "--lr is given twice"},
        {"--profile --profile", "--profile is given twice"},
        {"--profile=2", "--profile 2 is out of range"},
        {"--lr fast", "--lr takes a number, not 'fast'"},
        {"--lr 1e-3x", "not '1e-3x'"},
        {"--lr=", "--lr takes a number"},
        {"--lr nan", "not 'nan'"},
        {"--lr -inf", "not '-inf'"},
        {"--lr 0x10", "not '0x10'"},
        {"--lr 1e999", "out of range"},
        {"--lr -1", "--lr -1 is out of range: it goes from 0 to 100"},
        {"--steps 1e3", "--steps takes a whole number"},
        {"--steps 1.5", "--steps takes a whole number"},
        {"--steps 99999999999999999999", "out of range"},
        {"--seed 9007199254740993", "out of range"},
        {"--dim 1000000000", "--dim 1000000000 is out of range: it goes from 2 to 65536"},
        {"--experts -8", "out of range"},
        {"--seq 1", "out of range"},
        {"--vocab 1048577", "out of range"},
        {"--beta1 1", "--beta1 1 is out of range"},
        {"--aux-coef -0.1", "out of range"},
        {"--shuffle 2", "--shuffle 2 is out of range"},
        {"--schedule cosin", "one of cosine|constant|wsd (nearest: cosine)"},
        {"--act relu", "one of swiglu|gelu"},
        {"--renorm 2", "one of auto|0|1"},
        {"--objective mml", "one of lm|mlm (nearest: mlm)"},
        {"--chain-inner 2", "one of auto|0|1"},
        {"--chain-outer on", "one of auto|0|1"},
        {"--chain-steps 0", "--chain-steps 0 is out of range: it goes from 1 to 16"},
        {"--chain-steps aut", "--chain-steps takes a whole number, not 'aut'"},
        {"--aux-coef Auto", "--aux-coef takes a number, not 'Auto'"},
        {"--lr auto", "--lr takes a number, not 'auto'"},
        {"--slots auto", "--slots takes a whole number"},
        {"--aux-coef -1", "--aux-coef -1 is out of range"}, /* what auto is inside */
        {"--chain-steps -1", "--chain-steps -1 is out of range"},
        {"--z-coef -1", "out of range"},
        {"--data \xff.txt", "UTF-8"},
    };
    char long_text[300] = "--out ";
    memset(long_text + 6, 'x', 280);
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
    assert_command_refused(long_text, "--out takes at most 255 bytes");
}

static void try_value(const Option *option, double value, bool accepted) {
    char text[64], error[256] = "", words[160];
    Config config;
    config_defaults(&config);
    char *before = config_to_json(&config);
    snprintf(text, sizeof text, "%.17g", value);
    snprintf(words, sizeof words, "--%s %s is out of range", option->name, text);
    if (option_set(&config, option, text, error, sizeof error) != accepted || (!accepted && !strstr(error, words))) {
        fail_msg("--%s %s was %s: %s", option->name, text, accepted ? "refused" : "accepted", error);
    }
    char *after = config_to_json(&config);
    assert_true(accepted || !strcmp(before, after));
    free(before);
    free(after);
}

/* Every number of the table: the ends of its range are accepted, what is just beyond them is not. */
static void test_ranges(void **state) {
    int numbers = 0;
    for (const Option *option = option_table; option < option_table + option_count; option++) {
        if (option->type == TYPE_TEXT || option->type == TYPE_CHOICE) {
            continue;
        }
        bool real = option->type == TYPE_REAL;
        try_value(option, option->min, true);
        try_value(option, option->max, true);
        try_value(option, real ? option->min - 1e-9 - 1e-9 * option->min : option->min - 1, false);
        try_value(option, real ? option->max + 1e-9 * option->max : option->max + 1, false);
        numbers++;
    }
    assert_true(numbers > 40);
}

static void test_contradictions(void **state) {
    static const Refusal refusals[] = {
        {"--top-k 9", "--top-k 9 is above --experts 8"},
        {"--dim 130", "--dim 130 is not divisible by --heads 4"},
        {"--dim 12", "odd size 3"},
        {"--kv-heads 3", "--heads 4 is not divisible by --kv-heads 3"},
        {"--vocab 1", "--vocab 1"},
        {"--batch 5 --grad-accum 2", "--batch 5 is not divisible by --grad-accum 2"},
        {"--steps 10 --warmup 20", "--warmup 20 is longer than --steps 10"},
        {"--router tpok", "unknown --router tpok: the nearest is topk"},
        {"--router top2", "the nearest is top1"},
        {"--router top1 --renorm 1", "would get no gradient"},
        {"--top-k 1 --renorm 1", "would get no gradient"},
        {"--router top1 --top-k 2", "--router top1 sends a token to 1 expert"},
        {"--router dense --capacity-factor 1.5", "drop --capacity-factor"},
        {"--drop slot", "add --capacity-factor"},
        {"--capacity-factor 1.25 --drop slot", "add --allow-leak"},
        {"--capacity-factor 1.25 --drop weight", "add --allow-leak"},
        {"--seq 40000", "--seq"},
        {"--dim 1040 --heads 2", "raise --heads"},
        {"--moe-every 5", "--moe-every 5"},
        {"--batch 1048576 --seq 32768", "raise --grad-accum"},
        {"--batch 4096 --seq 1024 --layout padded --experts 4096", "--layout padded"},
        {"--out=", "--out is empty"},
        {"--data=", "--data is empty"},
        {"--out a --export-hf a", "name another for the export"},
        {"--head-dim 3", "odd size 3"},
        {"--upcycle", "name that with --init-from DIR"},
        {"--resume a --init-from b", "drop one of them"},
        {"--init-from /nowhere", "--init-from /nowhere: cannot read /nowhere/config.json"},
    };
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
}

static void test_objectives(void **state) {
    static const Refusal refusals[] = {
        {"--mask-share 0.2", "--mask-share hides tokens for --objective mlm: add that, or drop it"},
        {"--objective mlm --sample 5", "--sample with --objective mlm"},
        {"--objective mlm --sample 5", "drop --sample"},
        {"--objective mlm --choices a.bin", "drop --choices"},
        {"--objective mlm --vocab 2", "--vocab 2 leaves nothing to predict beside the mask"},
        {"--router soft", "--router soft looks at later tokens"},
        {"--router soft", "use --objective mlm, or add --allow-leak"},
        {"--router expert-choice", "use --objective mlm, or add --allow-leak"},
        {"--router expert-choice --objective lm", "use --objective mlm, or add --allow-leak"},
    };
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
}

static void test_options_of_another_router(void **state) {
    static const Refusal refusals[] = {
        {"--bias-rate 0.01", "--bias-rate is for --router sigmoid, not topk: drop it"},
        {"--router-groups 2 --router noisy", "--router-groups is for --router sigmoid, not noisy: drop it"},
        {"--router-kept-groups 2", "--router-kept-groups is for --router sigmoid"},
        {"--router-scale 2", "--router-scale is for --router sigmoid"},
        {"--soft-scale 2", "--soft-scale is for soft routers with learned mixtures, not topk: drop it"},
        {"--soft-scale 2 --router uniform-uniform --objective mlm", "not uniform-uniform: drop it"},
        {"--soft-scale 0 --router soft --objective mlm", "--soft-scale 0 is out of range: it goes from 0.001 to 1000"},
        {"--threshold-rate 0.1 --router expert-choice --allow-leak", "is for --router threshold, not expert-choice"},
        {"--threshold-warmup 5", "--threshold-warmup is for --router threshold"},
        {"--force one", "--force is for --router forced, not topk: drop it"},
        {"--slots 2", "--slots is for soft routers: with --router topk, --top-k sets the rows; drop it"},
        {"--slots 2 --router soft-token", "--slots is for soft routers"},
        {"--slots 2 --router dense", "--slots is for soft routers"},
        {"--aux-coef 0.1 --router hash", "--aux-coef 0.1 with --router hash: it has no balance loss"},
        {"--aux-coef 0.1 --router threshold", "drop --aux-coef"},
        {"--aux-coef 0.1 --router soft --objective mlm", "drop --aux-coef"},
        {"--z-coef 0.1 --router sigmoid", "--z-coef 0.1 with --router sigmoid: it has no z-loss"},
        {"--z-coef 0.1 --router random", "drop --z-coef"},
        {"--dump-routing t --router dense", "--dump-routing with --router dense: nothing is routed; drop it"},
        {"--dump-routing t --router soft --objective mlm", "--dump-routing with --router soft: every token goes"},
        {"--dump-routing t --router soft-batch", "--dump-routing with --router soft-batch"},
    };
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
}

static void test_what_a_router_cannot_do(void **state) {
    static const Refusal refusals[] = {
        /* a weight that is always 1 */
        {"--router topk --top-k 1 --renorm 1", "--router topk --top-k 1 with --renorm 1"},
        {"--router coe --top-k 1 --renorm 1", "--router coe --top-k 1 with --renorm 1"},
        {"--router sigmoid --top-k 1 --renorm 1", "take --renorm 0 or --top-k 2"},
        {"--router forced --top-k 1 --renorm 1", "take --renorm 0 or --top-k 2"},
        {"--router noisy --top-k 1", "take --top-k 2, or --router top1"},
        {"--router noisy --top-k 1 --renorm 0", "take --top-k 2, or --router top1"},
        {"--router soft-token --experts 1", "add experts"},
        /* weights that are what they are */
        {"--router noisy --renorm 0", "drop --renorm 0"},
        {"--router hash --renorm 0", "--router hash has equal weights that sum to 1: drop --renorm 0"},
        {"--router position --renorm 0", "drop --renorm 0"},
        {"--router random --renorm 0", "--router random has equal weights"},
        {"--router random-step --renorm 0", "--router random-step has equal weights"},
        {"--router soft --objective mlm --renorm 0", "drop --renorm 0"},
        {"--router expert-choice --objective mlm --renorm 1", "drop --renorm 1"},
        {"--router threshold --renorm 1", "drop --renorm 1"},
        /* who goes where */
        {"--router noisy --top-k 8", "--router noisy with --top-k 8 of --experts 8"},
        {"--router noisy --top-k 8", "lower --top-k"},
        {"--router soft-token --top-k 2", "--router soft-token sends a token to 8 experts: drop --top-k 2"},
        {"--router sigmoid --router-groups 3", "--router-groups 3 does not divide --experts 8"},
        {"--router sigmoid --router-kept-groups 2", "--router-kept-groups 2 is above --router-groups 1: lower it"},
        {"--router sigmoid --router-groups 4 --top-k 3", "more experts than the 2 of --router-kept-groups 1: raise it"},
        {"--router threshold --threshold-warmup 0",
         "--threshold-warmup 0: before the first step there is no threshold"},
        {"--router forced --force zipf:x", "--force zipf:x: what follows zipf: is the exponent"},
        {"--router forced --force zipf:", "as in zipf:1.2"},
        {"--router forced --force zipf:1.2x", "as in zipf:1.2"},
        {"--router forced --force zipf:-1", "as in zipf:1.2"},
        {"--router forced --force zipf:nan", "as in zipf:1.2"},
        {"--router forced --force t --dump-routing t", "--dump-routing t would write over the trace"},
        /* capacity, drops, layout */
        {"--router soft --objective mlm --capacity-factor 2", "--router soft drops nothing: drop --capacity-factor"},
        {"--router soft-batch --capacity-factor 2", "drop --capacity-factor"},
        {"--router soft-identity --seq 100 --slots 12", "8 experts have 96 slots for the 100 tokens"},
        {"--router soft-token --capacity-factor 2", "drop --capacity-factor"},
        {"--router expert-choice --objective mlm --capacity-factor 2", "drop --capacity-factor"},
        {"--router soft --objective mlm --drop slot", "--router soft drops nobody: drop --drop"},
        {"--router soft-token --drop slot", "--router soft-token drops nobody: drop --drop"},
        {"--router expert-choice --objective mlm --drop slot", "--router expert-choice drops nobody: drop --drop"},
        {"--router dense --drop token", "--router dense drops nobody: drop --drop"},
        {"--router soft-batch --layout padded", "drop --layout"},
    };
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
}

static void test_chains(void **state) {
    static const Refusal refusals[] = {
        {"--router coe --chain-steps 1", "take --router topk, or --chain-steps 2"},
        {"--router soft --objective mlm --chain-steps 2", "--chain-steps 2 with --router soft"},
        {"--router dense --chain-steps 2", "--chain-steps 2 with --router dense"},
        {"--router soft-batch --chain-steps 3", "use --router topk, or drop it"},
        {"--chain-steps 2 --chain-inner 0 --chain-outer 0", "--chain-inner 0 with --chain-outer 0 cuts the residual"},
        {"--chain-outer 0", "set one of them to 1"}, /* of a single step, inner is 0 */
        {"--chain-norm 1 --chain-inner 1 --chain-outer 1", "use --chain-outer 0"},
        {"--chain-norm 1 --chain-outer 1", "use --chain-outer 0"},
    };
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
}

static void test_accepts_what_is_close_to_a_refusal(void **state) {
    const char *commands[] = {"--top-k 8",
                              "--router top1 --top-k 1 --renorm 0",
                              "--router topk --top-k 1 --renorm auto",
                              "--steps 0",
                              "--layout padded",
                              "--capacity-factor 1 --drop weight --allow-leak",
                              "--router dense --moe-every 8",
                              "--steps 50 --warmup 50",
                              "--kv-heads 1 --vocab 2 --batch 6 --grad-accum 3",
                              "--freeze experts --ep 1 --tokenizer byte --chain-steps 1 --export-hf= --trace-syncs 0",
                              "--router soft --objective mlm",
                              "--router soft --allow-leak --top-k 1 --slots 3",
                              "--router expert-choice --objective mlm --mask-share 0.5",
                              "--router soft-batch --sample 3",
                              "--objective mlm --vocab 3 --sample 0 --capacity-factor 1 --drop weight",
                              "--router hash --aux-coef 0 --z-coef 0 --slots 0",
                              "--router dense --aux-coef 0.01 --z-coef 0.001",
                              "--router sigmoid --router-groups 4 --router-kept-groups 2 --top-k 4",
                              "--router sigmoid --top-k 1",
                              "--router noisy --top-k 7",
                              "--router soft-token --top-k 8",
                              "--router threshold --threshold-warmup 1 --capacity-factor 2",
                              "--router forced --force zipf:0 --dump-routing t",
                              "--router forced --force /dev/null --dump-routing u",
                              "--router coe --chain-steps 16 --chain-inner 0 --chain-outer 1",
                              "--router expert-choice --objective mlm --chain-steps 2",
                              "--chain-norm 1 --chain-inner 1 --chain-outer 0"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        Forked result;
        char copy[256];
        snprintf(copy, sizeof copy, "%s", commands[i]);
        run_forked(&result, parse_and_finish, copy);
        if (result.exit_code != 0 || result.err[0] || result.out[0]) {
            fail_msg("%s was refused: %s", commands[i], result.err);
        }
    }
}

static void test_json_refusals(void **state) {
    static const Refusal refusals[] = {
        {"", "one whole JSON object"},
        {"[1]", "one whole JSON object"},
        {"{\"dim\":64", "one whole JSON object"},
        {"{\"dim\":64} x", "one whole JSON object"},
        {"{\"dmi\":64}", "\"dmi\" is no option"},
        {"{\"dim\":64,\"dim\":32}", "\"dim\" stands twice"},
        {"{\"dim\":\"64\"}", "\"dim\" must hold a number"},
        {"{\"dim\":null}", "\"dim\" must hold a number"},
        {"{\"dim\":\"auto\"}", "\"dim\" must hold a number"},
        {"{\"aux_coef\":\"0.1\"}", "\"aux_coef\" must hold a number"},
        {"{\"aux_coef\":-1}", "out of range"},
        {"{\"aux_coef\":null}", "\"aux_coef\" must hold a number"},
        {"{\"chain_inner\":1}", "\"chain_inner\" must hold a string"},
        {"{\"objective\":\"bert\"}", "one of lm|mlm"},
        {"{\"act\":1}", "\"act\" must hold a string"},
        {"{\"act\":\"relu\"}", "one of swiglu|gelu"},
        {"{\"dim\":64.5}", "whole number"},
        {"{\"dim\":1e30}", "whole number"},
        {"{\"lr\":1e999}", "not 'inf'"},
        {"{\"top_k\":0}", "out of range"},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        Config config;
        char error[256] = "";
        config_defaults(&config);
        char *before = config_to_json(&config);
        bool accepted = config_from_json(&config, refusals[i].command, error, sizeof error);
        if (accepted || !strstr(error, refusals[i].words)) {
            fail_msg("%s: expected \"%s\", got \"%s\"", refusals[i].command, refusals[i].words, error);
        }
        char *after = config_to_json(&config);
        assert_string_equal(before, after);
        free(before);
        free(after);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_malformed_command_lines),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_contradictions),
        cmocka_unit_test(test_objectives),
        cmocka_unit_test(test_options_of_another_router),
        cmocka_unit_test(test_what_a_router_cannot_do),
        cmocka_unit_test(test_chains),
        cmocka_unit_test(test_accepts_what_is_close_to_a_refusal),
        cmocka_unit_test(test_json_refusals),
    };
    return cmocka_run_group_tests_name("config refusals", tests, NULL, NULL);
}
