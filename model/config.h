/* Every option of the program, once: the table in options.c drives the parser, --help, config.json and the log header.
 *
 *     Config config;
 *     config_parse(&config, argc, argv);     // defaults, the config.json of --resume or --init-from, the command line
 *     config_finish(&config);                // derives what follows from the rest; refuses contradictions
 *
 * To add an option: one field here, one row in the table of options.c.
 */
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels/experts.h"
#include "../kernels/plan.h"
#include "../kernels/wire.h"

typedef enum { OBJECTIVE_LM, OBJECTIVE_MLM } Objective;
typedef enum { SCHEDULE_COSINE, SCHEDULE_CONSTANT, SCHEDULE_WSD } Schedule;
typedef enum { FREEZE_NONE, FREEZE_EXPERTS, FREEZE_ROUTER, FREEZE_ALL_BUT_ROUTER } Freeze;
typedef enum { PERFT_NONE, PERFT_R, PERFT_E, PERFT_D, PERFT_S } PerftKind;
typedef enum { LORA_NONE, LORA_ATTENTION } LoraPlace;
typedef enum { EXCHANGE_FLAT, EXCHANGE_BUCKETED, EXCHANGE_DEDUP, EXCHANGE_PADDED, EXCHANGE_P2P } ExchangeWay;
typedef enum { RETURN_AUTO, RETURN_RANK, RETURN_CHOICE } ExchangeReturn;
enum { EXCHANGE_MOST_PARTS = 8 };
typedef enum { RECOMPUTE_NONE, RECOMPUTE_NORMS, RECOMPUTE_EXPERTS } Recompute;

enum {
    CONFIG_TEXT = 256,
    CONFIG_MOST_OPTIONS = 128,
    OPTION_AUTO = -1, /* a number that config_finish is to choose */
};

/* What is computed. Two runs whose ModelConfig differs cannot share a checkpoint. */
typedef struct {
    int objective; /* Objective */
    int layers, dim, heads, kv_heads, seq, vocab;
    int head_dim; /* width of one head; 0 until config_finish: dim / heads */
    int qk_norm;  /* 0|1: RMSNorm of every query and key head */
    int tie;      /* 0|1: the head is the embedding */
    char router[32];
    int experts, top_k, expert_dim, shared_experts;
    int renorm;    /* 0|1: weights renormalised over the chosen; -1 until config_finish picks the router's */
    int moe_every; /* every n-th layer is MoE, the others are dense MLPs of matched active width */
    int slots;     /* of each expert and group, soft routers */
    int router_groups, router_kept_groups;
    double router_scale;
    double soft_scale;
    char force[CONFIG_TEXT];                               /* where the router "forced" sends tokens */
    int chain_steps, chain_inner, chain_outer, chain_norm; /* chain.h; auto until config_finish */
    double capacity_factor;                                /* 0: dropless */
    int act;                                               /* Activation */
    int layout;                                            /* Layout */
    int drop;                                              /* DropPolicy */
    double norm_eps, rope_base;
    /* adapters of fine-tuning: perft.h, adapter.h */
    int perft, lora; /* PerftKind, LoraPlace */
    int perft_count, perft_rank, perft_top_k;
    int perft_act; /* Activation */
    double perft_scale;
} ModelConfig;

typedef struct {
    /* data */
    char data[CONFIG_TEXT], val[CONFIG_TEXT], tokenizer[CONFIG_TEXT];
    char domains[CONFIG_TEXT]; /* of the builtin text to train on */
    int shuffle;
    int allow_leak;
    double mask_share;
    /* losses */
    double aux_coef, z_coef; /* auto until config_finish takes the router's own */
    double bias_rate, threshold_rate;
    double perft_aux_coef;
    int threshold_warmup;
    /* training */
    int batch, grad_accum, steps, warmup, schedule;
    double lr, min_lr, weight_decay, beta1, beta2, clip; /* min_lr: share of lr left at the end; clip 0: off */
    int64_t seed;
    int eval_every, eval_batches, log_every, save_every;
    int max_skips; /* stop after this many non-finite steps in a row */
    int freeze;    /* Freeze */
    int recompute; /* Recompute */
    char init_from[CONFIG_TEXT];
    int upcycle;
    /* parallel */
    int ep;
    int exchange;           /* ExchangeWay */
    int exchange_return;    /* ExchangeReturn: what a row of p2p that comes back is */
    double patience;        /* seconds that a rank waits for another */
    int wire, wire_back;    /* WireType of the forward's rows, of the backward's */
    int exchange_chunks;    /* parts of a batch that travel one by one */
    int overlap;            /* whether they do while the experts work on others */
    int peer_memory;        /* whether ranks that can copy rows into each other's memory do */
    int exchange_rows;      /* of a padded message; 0: as many as there can be */
    double exchange_margin; /* .. X times those of the fullest message of the first batch; 0: not looked at */
    /* output */
    char out[CONFIG_TEXT], resume[CONFIG_TEXT], export_hf[CONFIG_TEXT], export_gguf[CONFIG_TEXT];
    int sample; /* tokens to sample at the end, per prompt; 0: none */
    char prompt[CONFIG_TEXT];
    double temperature, top_p;
    int sample_top_k;
    int eval_drop;             /* 1: evaluate with the capacity of training; 0: dropless */
    char choices[CONFIG_TEXT]; /* multiple-choice questions to answer at the end */
    int choices_most;          /* of them; 0: all */
    /* measure */
    char dump_routing[CONFIG_TEXT];
    int profile, trace_syncs, graph;
} TrainConfig;

typedef struct {
    ModelConfig model;
    TrainConfig train;
    bool given[CONFIG_MOST_OPTIONS]; /* [i]: row i of the option table was set on the command line */
} Config;

/* Defaults of every option. */
void config_defaults(Config *config);

/* Parses a command line into *config. With --resume DIR the configuration of DIR/config.json takes the place of the
 * defaults, --out becomes DIR unless given, and a model option that differs from DIR's is refused. With --init-from DIR
 * the model options and the tokenizer are DIR's unless given. --help prints the grouped table and exits with 0. Ends
 * the program with one line on an unknown option (naming the nearest), a missing, malformed or out-of-range value.
 * Both "--lr 1e-3" and "--lr=1e-3" are accepted. */
void config_parse(Config *config, int argc, char **argv);

/* Fills in what follows from the rest (kv_heads 0 -> heads, head_dim 0 -> dim / heads, vocab 0 -> 256 and the mask,
 * what is auto -> the router's own; top1 implies its top_k). Refuses nothing, leaves an unknown router alone.
 * Idempotent. */
void config_derive(Config *config);

/* Derives, then refuses what cannot work, one line each, naming the options and the way out. Calls
 * router_find. Idempotent. */
void config_finish(Config *config);

/* Whether the command line set the option. */
bool config_given(const Config *config, const char *name);

/* The whole configuration as one JSON object, keys = option names with '_' for '-', in table order. Returned string
 * is the caller's (free). */
char *config_to_json(const Config *config);

/* Reads such an object (unknown keys, wrong types and out-of-range values are refused: message in error, returns
 * false). Keys that are absent keep the value *config already has. */
bool config_from_json(Config *config, const char *json, char *error, size_t error_size);

/* Defaults, then what RUN/config.json says. False with one line in error when there is none or it is not one. */
bool config_read(Config *config, const char *run, char *error, size_t error_size);

/* Names (as on the command line) of the options in which a and b differ and which decide what is trained (model,
 * data, losses, training; not output, measure, steps-independent ones such as --log-every), comma-separated; "" when
 * none. */
void config_difference(const Config *a, const Config *b, char *names, size_t size);

/* Whether the next token can be read instead of predicted: a router that sees later tokens, or places at full experts
 * given by choice or by weight, where a later token can take an earlier one's. Such runs need --allow-leak and are
 * marked in their log. Masked prediction leaks nothing: every token may see every other. */
bool config_is_leaky(const ModelConfig *model);

/* Whether it is fine-tuned: adapters are trained and all else is frozen. */
bool config_has_adapters(const ModelConfig *model);

/* Width of the MLP of a dense layer: the active width of a MoE layer, (top_k + shared_experts) * expert_dim for each
 * step of its chain. */
int config_dense_width(const ModelConfig *model);

/* Rows an expert takes from N tokens: ceil(capacity_factor * top_k * N / experts) but at most N, 0 when dropless. */
int config_capacity(const ModelConfig *model, int N);

/* Rows of an expert that takes exactly its share of N tokens: ceil(top_k * N / experts). */
int config_share(const ModelConfig *model, int N);

#endif
