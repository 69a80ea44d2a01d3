/* The option table and the reading and printing of single values. The contract is options.h.
 *
 * A row's help should say what the option does in words of the field; --help adds the default. Ranges keep out the
 * absurd (a width of 1e9, whose products would overflow); what contradicts another option is refused by config_finish.
 */
#include "options.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODEL(field) offsetof(Config, model.field)
#define TRAIN(field) offsetof(Config, train.field)
#define TEXT (CONFIG_TEXT - 1)
#define EXACT 9007199254740991.0 /* 2^53 - 1: whole numbers up to here survive JSON, where every number is a double */

const Option option_table[] = {
    {"data", "data", true, TYPE_TEXT, TRAIN(data), "builtin", 0, TEXT, "builtin|FILE|DIR|GLOB",
     "text to train on: generated, a file's bytes, or *.bin token shards"},
    {"data", "val", true, TYPE_TEXT, TRAIN(val), "", 0, TEXT, "SAME",
     "text to evaluate on; empty: the last tenth of FILE, or the shards named *val*"},
    {"data", "tokenizer", true, TYPE_TEXT, TRAIN(tokenizer), "byte", 0, TEXT, "byte|FILE", "what a token is"},
    {"data", "domains", true, TYPE_TEXT, TRAIN(domains), "all", 0, TEXT, "all|by-rank|NAME[,NAME]",
     "which of the builtin domains to train on; by-rank: each rank has its own; evaluation is always on all"},
    {"data", "shuffle", true, TYPE_INT, TRAIN(shuffle), "1", 0, 1, "0|1", "0: read the text in order"},
    {"data", "allow-leak", false, TYPE_SWITCH, TRAIN(allow_leak), "0", 0, 1, "",
     "let a router see later tokens (marked in the log)"},
    {"data", "mask-share", true, TYPE_REAL, TRAIN(mask_share), "0.15", 0.001, 0.999, "X",
     "share of the tokens that --objective mlm hides and predicts"},

    {"model", "objective", true, TYPE_CHOICE, MODEL(objective), "lm", OBJECTIVE_LM, 0, "lm|mlm",
     "lm: the next token; mlm: masked tokens from both sides, where every router is valid"},
    {"model", "layers", true, TYPE_INT, MODEL(layers), "4", 1, 1024, "N", "transformer layers"},
    {"model", "dim", true, TYPE_INT, MODEL(dim), "128", 2, 65536, "N", "model width"},
    {"model", "heads", true, TYPE_INT, MODEL(heads), "4", 1, 4096, "N", "query heads"},
    {"model", "kv-heads", true, TYPE_INT, MODEL(kv_heads), "0", 0, 4096, "N",
     "key and value heads; 0: as many as --heads"},
    {"model", "head-dim", true, TYPE_INT, MODEL(head_dim), "0", 0, 512, "N", "width of a head; 0: --dim / --heads"},
    {"model", "qk-norm", true, TYPE_INT, MODEL(qk_norm), "1", 0, 1, "0|1", "RMSNorm of every query and key head"},
    {"model", "seq", true, TYPE_INT, MODEL(seq), "128", 2, 32768, "N", "tokens in a sequence"},
    {"model", "vocab", true, TYPE_INT, MODEL(vocab), "0", 0, 1048576, "N",
     "different tokens; 0: the tokenizer's (256 bytes)"},
    {"model", "tie", true, TYPE_INT, MODEL(tie), "0", 0, 1, "0|1", "1: the head is the embedding"},
    {"model", "norm-eps", true, TYPE_REAL, MODEL(norm_eps), "1e-6", 1e-12, 1, "X", "epsilon of every RMSNorm"},
    {"model", "rope-base", true, TYPE_REAL, MODEL(rope_base), "10000", 1, 1e9, "X", "base of the rotary embedding"},
    {"model", "router", true, TYPE_TEXT, MODEL(router), "topk", 0, sizeof(((Config *)0)->model.router) - 1, "NAME",
     "who picks the experts: "},
    {"model", "experts", true, TYPE_INT, MODEL(experts), "8", 1, 4096, "N", "experts in a MoE layer"},
    {"model", "top-k", true, TYPE_INT, MODEL(top_k), "2", 1, 4096, "N", "experts per token"},
    {"model", "expert-dim", true, TYPE_INT, MODEL(expert_dim), "256", 1, 65536, "N", "hidden width of one expert"},
    {"model", "shared-experts", true, TYPE_INT, MODEL(shared_experts), "0", 0, 64, "N",
     "experts that every token visits besides"},
    {"model", "renorm", true, TYPE_CHOICE, MODEL(renorm), "auto", -1, 0, "auto|0|1",
     "1: a token's weights sum to 1; auto: the router's custom"},
    {"model", "act", true, TYPE_CHOICE, MODEL(act), "swiglu", ACT_SWIGLU, 0, "swiglu|gelu", "what is inside an expert"},
    {"model", "moe-every", true, TYPE_INT, MODEL(moe_every), "1", 1, 1024, "N",
     "every N-th layer is MoE, the others dense of the same active width"},
    {"model", "slots", true, TYPE_INT, MODEL(slots), "0", 0, 4096, "N",
     "slots per expert of a soft router; 0: as many rows as --top-k would make"},
    {"model", "router-groups", true, TYPE_INT, MODEL(router_groups), "1", 1, 4096, "N",
     "sigmoid: groups the experts are in"},
    {"model", "router-kept-groups", true, TYPE_INT, MODEL(router_kept_groups), "1", 1, 4096, "N",
     "sigmoid: groups a token may choose from"},
    {"model", "router-scale", true, TYPE_REAL, MODEL(router_scale), "1", 1e-6, 1e6, "X",
     "sigmoid: factor of all weights"},
    {"model", "soft-scale", true, TYPE_REAL, MODEL(soft_scale), "1", 1e-3, 1e3, "X",
     "soft routers with learned mixtures: what the learned scale of their logits begins with"},
    {"model", "force", true, TYPE_TEXT, MODEL(force), "balanced", 0, TEXT, "balanced|zipf:S|one|FILE",
     "forced: where tokens go; FILE: as --dump-routing recorded it"},
    {"model", "chain-steps", true, TYPE_INT, MODEL(chain_steps), "auto", 1, 16, "auto|N",
     "times a MoE layer is iterated, each time with a router of its own; auto: 2 for coe, else 1"},
    {"model", "chain-inner", true, TYPE_CHOICE, MODEL(chain_inner), "auto", -1, 0, "auto|0|1",
     "1: an iteration adds to its input; auto: where there is more than one"},
    {"model", "chain-outer", true, TYPE_CHOICE, MODEL(chain_outer), "auto", -1, 0, "auto|0|1",
     "1: the chain's result is added to the stream, 0: replaces it; auto: 0 with --chain-norm 1"},
    {"model", "chain-norm", true, TYPE_INT, MODEL(chain_norm), "0", 0, 1, "0|1",
     "1: each iteration normalises its input, as a layer of its own would"},
    {"model", "capacity-factor", true, TYPE_REAL, MODEL(capacity_factor), "0", 0, 4096, "X",
     "places per expert, as a multiple of the fair share; 0: dropless"},
    {"model", "layout", true, TYPE_CHOICE, MODEL(layout), "compact", LAYOUT_COMPACT, 0, "compact|padded|block",
     "rows of the experts: as many as there are, the capacity for each, whole tiles"},
    {"model", "drop", true, TYPE_CHOICE, MODEL(drop), "token", DROP_TOKEN, 0, "token|slot|weight",
     "who keeps a place at a full expert: earlier tokens, first choices, heavier weights"},

    {"fine-tuning", "perft", true, TYPE_CHOICE, MODEL(perft), "none", PERFT_NONE, 0, "none|r|e|d|s",
     "train adapters beside frozen experts: routed (r), one in each expert (e), several (d) or one (s) for all tokens"},
    {"fine-tuning", "perft-count", true, TYPE_INT, MODEL(perft_count), "4", 1, 4096, "N",
     "r, d: adapters beside each MoE layer"},
    {"fine-tuning", "perft-top-k", true, TYPE_INT, MODEL(perft_top_k), "2", 1, 4096, "N", "r: adapters per token"},
    {"fine-tuning", "perft-rank", true, TYPE_INT, MODEL(perft_rank), "16", 1, 4096, "N",
     "rank of an adapter, also of --lora"},
    {"fine-tuning", "perft-act", true, TYPE_CHOICE, MODEL(perft_act), "none", ACT_IDENTITY, 0, "none|silu",
     "what is inside an adapter: nothing (LoRA), or SiLU (parallel adapter)"},
    {"fine-tuning", "perft-scale", true, TYPE_REAL, MODEL(perft_scale), "16", 1e-6, 1e6, "X",
     "alpha: an adapter's result counts alpha / rank times"},
    {"fine-tuning", "perft-aux-coef", true, TYPE_REAL, TRAIN(perft_aux_coef), "0.01", 0, 1000, "X",
     "r: coefficient of the adapters' balance loss"},
    {"fine-tuning", "lora", true, TYPE_CHOICE, MODEL(lora), "none", LORA_NONE, 0, "none|attention",
     "train adapters of the frozen attention's projections"},

    {"losses", "aux-coef", true, TYPE_REAL, TRAIN(aux_coef), "auto", 0, 1000, "auto|X",
     "coefficient of the balance loss; auto: 0.01, sigmoid 0.0001, 0 where nothing needs balancing or learns"},
    {"losses", "z-coef", true, TYPE_REAL, TRAIN(z_coef), "auto", 0, 1000, "auto|X",
     "coefficient of the z-loss; auto: 0.001 for routers with a softmax over experts, else 0"},
    {"losses", "bias-rate", true, TYPE_REAL, TRAIN(bias_rate), "0.001", 0, 1, "X",
     "sigmoid: what the selection bias moves by each step"},
    {"losses", "threshold-rate", true, TYPE_REAL, TRAIN(threshold_rate), "0.01", 1e-9, 1, "X",
     "threshold: share of a step's cut in the running threshold"},
    {"losses", "threshold-warmup", true, TYPE_INT, TRAIN(threshold_warmup), "50", 0, 1000000000, "N",
     "threshold: steps of expert choice before the thresholds decide"},

    {"training", "batch", true, TYPE_INT, TRAIN(batch), "16", 1, 1048576, "N",
     "sequences of one optimizer step, over all ranks"},
    {"training", "grad-accum", true, TYPE_INT, TRAIN(grad_accum), "1", 1, 1048576, "N",
     "slices a batch is computed in, to save memory"},
    {"training", "steps", true, TYPE_INT, TRAIN(steps), "1000", 0, 1000000000, "N",
     "optimizer steps; 0: only the initial weights"},
    {"training", "lr", true, TYPE_REAL, TRAIN(lr), "3e-3", 0, 100, "X", "peak learning rate"},
    {"training", "min-lr", true, TYPE_REAL, TRAIN(min_lr), "0.1", 0, 1, "X", "share of --lr that is left at the end"},
    {"training", "warmup", true, TYPE_INT, TRAIN(warmup), "50", 0, 1000000000, "N", "steps until the peak"},
    {"training", "schedule", true, TYPE_CHOICE, TRAIN(schedule), "cosine", SCHEDULE_COSINE, 0, "cosine|constant|wsd",
     "learning rate after the warm-up"},
    {"training", "weight-decay", true, TYPE_REAL, TRAIN(weight_decay), "0.1", 0, 100, "X",
     "AdamW's decay of the matrices"},
    {"training", "beta1", true, TYPE_REAL, TRAIN(beta1), "0.9", 0, 0.999999, "X", "AdamW's memory of the gradient"},
    {"training", "beta2", true, TYPE_REAL, TRAIN(beta2), "0.95", 0, 0.999999, "X", "AdamW's memory of its square"},
    {"training", "clip", true, TYPE_REAL, TRAIN(clip), "1.0", 0, 1e9, "X",
     "largest norm of the whole gradient; 0: no clipping"},
    {"training", "seed", true, TYPE_INT64, TRAIN(seed), "1337", 0, EXACT, "N", "of weights, data and sampling"},
    {"training", "freeze", true, TYPE_CHOICE, TRAIN(freeze), "none", FREEZE_NONE, 0,
     "none|experts|router|all-but-router", "what stays as it is"},
    {"training", "recompute", false, TYPE_CHOICE, TRAIN(recompute), "none", RECOMPUTE_NONE, 0, "none|norms|experts",
     "made again in the backward, not kept: norms; or also what is inside experts and attention (same bits)"},
    {"training", "max-skips", false, TYPE_INT, TRAIN(max_skips), "10", 1, 1000000, "N",
     "stop after so many non-finite steps in a row"},
    {"training", "eval-every", false, TYPE_INT, TRAIN(eval_every), "100", 0, 1000000000, "N",
     "steps between evaluations; 0: only at the end"},
    {"training", "eval-batches", false, TYPE_INT, TRAIN(eval_batches), "8", 0, 1000000, "N",
     "batches of one evaluation; 0: all of a validation text that has an end"},
    {"training", "log-every", false, TYPE_INT, TRAIN(log_every), "10", 1, 1000000000, "N", "steps between log lines"},
    {"training", "save-every", false, TYPE_INT, TRAIN(save_every), "0", 0, 1000000000, "N",
     "steps between checkpoints; 0: only at the end"},
    {"training", "resume", false, TYPE_TEXT, TRAIN(resume), "", 0, TEXT, "DIR",
     "go on with the run in DIR; its options hold unless given"},

    {"training", "init-from", true, TYPE_TEXT, TRAIN(init_from), "", 0, TEXT, "DIR",
     "start from the weights of DIR: a run, or a folder of Hugging Face transformers; its model options hold"},
    {"training", "upcycle", true, TYPE_SWITCH, TRAIN(upcycle), "0", 0, 1, "",
     "with --init-from a dense model: every expert starts as a copy of its MLP"},

    {"parallel", "ep", false, TYPE_INT, TRAIN(ep), "1", 1, 4096, "N",
     "ranks, started by mpirun, that hold the experts between them; more than these are data parallel"},

    {"parallel", "exchange", false, TYPE_CHOICE, TRAIN(exchange), "flat", EXCHANGE_FLAT, 0,
     "flat|bucketed|dedup|padded|p2p",
     "how rows travel: one per choice, sorted on arrival; one per token and rank; fixed sizes; stored by the sender"},
    {"parallel", "exchange-return", false, TYPE_CHOICE, TRAIN(exchange_return), "auto", RETURN_AUTO, 0,
     "auto|rank|choice",
     "what comes back with p2p: a sum for each token and rank, or each choice's row; auto: choice where it is cheaper"},
    {"parallel", "wire", false, TYPE_CHOICE, TRAIN(wire), "same", WIRE_SAME, 0, "same|fp32|bf16|fp16|fp8",
     "rows on their way in the forward: as they are stored, or rounded; fp8 with a scale for each row"},
    {"parallel", "wire-back", false, TYPE_CHOICE, TRAIN(wire_back), "same", WIRE_SAME, 0, "same|fp32|bf16|fp16|fp8",
     "the same for the backward"},
    {"parallel", "patience", false, TYPE_REAL, TRAIN(patience), "600", 0.1, 1e6, "SECONDS",
     "how long a rank waits for another before all of them end"},
    {"parallel", "exchange-chunks", false, TYPE_INT, TRAIN(exchange_chunks), "1", 1, EXCHANGE_MOST_PARTS, "N",
     "parts of a batch that travel one by one, while the experts work on others"},
    {"parallel", "overlap", false, TYPE_INT, TRAIN(overlap), "1", 0, 1, "0|1",
     "0: they travel while the experts wait, with the same result"},
    {"parallel", "peer-memory", false, TYPE_INT, TRAIN(peer_memory), "1", 0, 1, "0|1",
     "1: GPUs of one machine copy rows into each other's memory; 0: NCCL carries them"},
    {"parallel", "exchange-rows", false, TYPE_INT, TRAIN(exchange_rows), "0", 0, 1 << 30, "N",
     "rows of a padded message; what does not fit is dropped and counted; 0: all fit"},
    {"parallel", "exchange-margin", false, TYPE_REAL, TRAIN(exchange_margin), "0", 0, 100, "X",
     "a padded message holds X times the most rows of the first batch; 0: --exchange-rows alone"},

    {"output", "out", false, TYPE_TEXT, TRAIN(out), "runs/default", 0, TEXT, "DIR",
     "the run's directory: config.json, log.jsonl, checkpoint/, report.html"},
    {"output", "sample", false, TYPE_INT, TRAIN(sample), "0", 0, 1048576, "N",
     "tokens to sample at the end, per prompt"},
    {"output", "prompt", false, TYPE_TEXT, TRAIN(prompt), "", 0, TEXT, "TEXT",
     "what samples start with; empty: one start per domain"},
    {"output", "temperature", false, TYPE_REAL, TRAIN(temperature), "0.8", 0, 100, "X",
     "of sampling; 0: always the likeliest token"},
    {"output", "sample-top-k", false, TYPE_INT, TRAIN(sample_top_k), "0", 0, 65536, "N",
     "sample among the N likeliest; 0: all"},
    {"output", "top-p", false, TYPE_REAL, TRAIN(top_p), "1", 0, 1, "X",
     "sample among the likeliest that make up this probability"},
    {"output", "eval-drop", false, TYPE_INT, TRAIN(eval_drop), "0", 0, 1, "0|1",
     "1: evaluate with the capacity of training; 0: dropless"},
    {"output", "export-hf", false, TYPE_TEXT, TRAIN(export_hf), "", 0, TEXT, "DIR",
     "write the model for Hugging Face transformers"},
    {"output", "export-gguf", false, TYPE_TEXT, TRAIN(export_gguf), "", 0, TEXT, "FILE",
     "write the model for llama.cpp"},
    {"output", "choices", false, TYPE_TEXT, TRAIN(choices), "", 0, TEXT, "FILE",
     "answer the multiple-choice questions of an llm.c eval shard at the end"},
    {"output", "choices-most", false, TYPE_INT, TRAIN(choices_most), "0", 0, 1000000000, "N",
     "answer the first N of them; 0: all"},

    {"measure", "dump-routing", false, TYPE_TEXT, TRAIN(dump_routing), "", 0, TEXT, "FILE",
     "record which experts every token of every training step went to"},
    {"measure", "profile", false, TYPE_SWITCH, TRAIN(profile), "0", 0, 1, "", "time the stages of the MoE layer"},
    {"measure", "trace-syncs", false, TYPE_SWITCH, TRAIN(trace_syncs), "0", 0, 1, "",
     "count how often the host waits for the device inside training steps"},
    {"measure", "graph", false, TYPE_INT, TRAIN(graph), "1", 0, 1, "0|1",
     "on a GPU, record a training step once and replay it (same bits)"},
};

enum { OPTIONS = sizeof option_table / sizeof *option_table };

_Static_assert((int)OPTIONS <= (int)CONFIG_MOST_OPTIONS, "Config.given has one flag per option");

const int option_count = OPTIONS;

int option_find(const char *name) {
    for (int i = 0; i < OPTIONS; i++) {
        if (!strcmp(option_table[i].name, name)) {
            return i;
        }
    }
    return -1;
}

int name_distance(const char *typed, const char *name) {
    enum { LONGEST = 40 };
    int d[LONGEST + 1][LONGEST + 1];
    int n = (int)strnlen(typed, LONGEST), m = (int)strnlen(name, LONGEST);
    if (n > 0 && !strncmp(typed, name, n)) {
        return 0;
    }
    for (int i = 0; i <= n; i++) {
        for (int j = 0; j <= m; j++) {
            if (i == 0 || j == 0) {
                d[i][j] = i + j;
                continue;
            }
            int best = d[i - 1][j - 1] + (typed[i - 1] != name[j - 1]);
            best = d[i - 1][j] + 1 < best ? d[i - 1][j] + 1 : best;
            best = d[i][j - 1] + 1 < best ? d[i][j - 1] + 1 : best;
            if (i > 1 && j > 1 && typed[i - 1] == name[j - 2] && typed[i - 2] == name[j - 1] &&
                d[i - 2][j - 2] + 1 < best) {
                best = d[i - 2][j - 2] + 1;
            }
            d[i][j] = best;
        }
    }
    return d[n][m];
}

bool option_may_be_auto(const Option *option) {
    bool number = option->type == TYPE_INT || option->type == TYPE_REAL;
    return number && strncmp(option->values, "auto|", 5) == 0;
}

/* The i-th name of "a|b|c" into name; false past the last. */
static bool choice_name(const char *values, int i, char *name, size_t size) {
    for (; i > 0 && values; i--) {
        values = strchr(values, '|');
        values = values ? values + 1 : NULL;
    }
    if (!values) {
        return false;
    }
    snprintf(name, size, "%.*s", (int)strcspn(values, "|"), values);
    return true;
}

/* Whether text is UTF-8: only then can JSON carry it. Accepts overlong and surrogate forms, which do no harm here. */
static bool is_utf8(const char *text) {
    const unsigned char *byte = (const unsigned char *)text;
    while (*byte) {
        int more = *byte < 0x80 ? 0 : *byte >> 5 == 6 ? 1 : *byte >> 4 == 14 ? 2 : *byte >> 3 == 30 ? 3 : -1;
        if (more < 0) {
            return false;
        }
        for (byte++; more > 0; more--, byte++) {
            if (*byte >> 6 != 2) {
                return false;
            }
        }
    }
    return true;
}

static bool choice_set(Config *config, const Option *option, const char *text, char *error, size_t size) {
    char name[OPTION_TEXT], nearest[OPTION_TEXT] = "";
    int nearest_distance = INT_MAX;
    for (int i = 0; choice_name(option->values, i, name, sizeof name); i++) {
        if (!strcmp(name, text)) {
            *(int *)((char *)config + option->offset) = (int)option->min + i;
            return true;
        }
        int distance = name_distance(text, name);
        if (distance < nearest_distance) {
            nearest_distance = distance;
            memcpy(nearest, name, sizeof nearest);
        }
    }
    snprintf(error, size, "--%s has no value '%.80s': it is one of %s (nearest: %s)", option->name, text,
             option->values, nearest);
    return false;
}

static void number_set(char *field, OptionType type, int64_t integer, double value) {
    if (type == TYPE_INT64) {
        *(int64_t *)field = integer;
    } else if (type == TYPE_REAL) {
        *(double *)field = value;
    } else {
        *(int *)field = (int)integer;
    }
}

bool option_set(Config *config, const Option *option, const char *text, char *error, size_t size) {
    char *field = (char *)config + option->offset;
    if (option->type == TYPE_CHOICE) {
        return choice_set(config, option, text, error, size);
    }
    if (option->type == TYPE_TEXT) {
        if (strlen(text) > option->max || !is_utf8(text)) {
            snprintf(error, size, "--%s takes at most %g bytes of UTF-8 text, not '%.80s'", option->name, option->max,
                     text);
            return false;
        }
        memset(field, 0, (size_t)option->max + 1);
        memcpy(field, text, strlen(text));
        return true;
    }
    bool whole = option->type != TYPE_REAL;
    if (option_may_be_auto(option) && !strcmp(text, "auto")) {
        number_set(field, option->type, OPTION_AUTO, OPTION_AUTO);
        return true;
    }
    char *end = NULL;
    errno = 0;
    long long integer = whole ? strtoll(text, &end, 10) : 0;
    double value = whole ? (double)integer : strtod(text, &end);
    /* strtod alone would take "nan", "inf", "0x10" and " 1". */
    if (!*text || *end || text[strspn(text, "0123456789+-.eE")]) {
        snprintf(error, size, "--%s takes a %s, not '%.80s'", option->name, whole ? "whole number" : "number", text);
        return false;
    }
    if (errno == ERANGE || !(value >= option->min && value <= option->max)) {
        snprintf(error, size, "--%s %.80s is out of range: it goes from %.16g to %.16g", option->name, text,
                 option->min, option->max);
        return false;
    }
    number_set(field, option->type, integer, value);
    return true;
}

void option_print(const Config *config, const Option *option, char *text, size_t size) {
    const char *field = (const char *)config + option->offset;
    if (option->type == TYPE_TEXT) {
        snprintf(text, size, "%s", field);
    } else if (option->type == TYPE_INT64) {
        snprintf(text, size, "%lld", (long long)*(const int64_t *)field);
    } else if (option_may_be_auto(option) &&
               (option->type == TYPE_INT ? *(const int *)field : *(const double *)field) == OPTION_AUTO) {
        snprintf(text, size, "auto");
    } else if (option->type == TYPE_REAL) {
        double value = *(const double *)field;
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, size, "%.*g", digits, value);
            if (strtod(text, NULL) == value) {
                break;
            }
        }
    } else if (option->type == TYPE_CHOICE) {
        bool known = choice_name(option->values, *(const int *)field - (int)option->min, text, size);
        assert(known);
        (void)known;
    } else {
        snprintf(text, size, "%d", *(const int *)field);
    }
}

bool option_equal(const Config *a, const Config *b, const Option *option) {
    char value_a[OPTION_TEXT], value_b[OPTION_TEXT];
    option_print(a, option, value_a, sizeof value_a);
    option_print(b, option, value_b, sizeof value_b);
    return !strcmp(value_a, value_b);
}

bool option_in_model(const Option *option) {
    return option->offset < offsetof(Config, train);
}
