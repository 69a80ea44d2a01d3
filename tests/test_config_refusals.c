/* What the configuration refuses, each with the words that tell the user what to do: command lines that are malformed,
 * options that contradict each other, and JSON that is no run's; and what is close to a refusal but accepted.
 *
 * Everything that is accepted is in test_config.c. Read next: model/config.c.
 */
#include "command_line.h"
#include "forked.h"

#include "../model/config.h"

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
        {"--vocab 65537", "out of range"},
        {"--beta1 1", "--beta1 1 is out of range"},
        {"--aux-coef -0.1", "out of range"},
        {"--shuffle 2", "--shuffle 2 is out of range"},
        {"--schedule cosin", "one of cosine|constant|wsd (nearest: cosine)"},
        {"--act relu", "one of swiglu|gelu"},
        {"--renorm 2", "one of auto|0|1"},
        {"--data \xff.txt", "UTF-8"},
    };
    char long_text[300] = "--out ";
    memset(long_text + 6, 'x', 280);
    assert_all_refused(refusals, sizeof refusals / sizeof *refusals);
    assert_command_refused(long_text, "--out takes at most 255 bytes");
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
        {"--ep 2", "--ep 2"},
        {"--export-hf x", "--export-hf x"},
        {"--tokenizer bpe.json", "--tokenizer bpe.json"},
        {"--chain-steps 2", "--chain-steps 2"},
        {"--trace-syncs", "--trace-syncs"},
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
                              "--freeze experts --ep 1 --tokenizer byte --chain-steps 1 --export-hf= --trace-syncs 0"};
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
        cmocka_unit_test(test_contradictions),
        cmocka_unit_test(test_accepts_what_is_close_to_a_refusal),
        cmocka_unit_test(test_json_refusals),
    };
    return cmocka_run_group_tests_name("config refusals", tests, NULL, NULL);
}
