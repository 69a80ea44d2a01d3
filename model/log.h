/* RUN/log.jsonl: one JSON object a line, each appended with a single write, so that a killed run leaves whole lines.
 *
 * Line 1 is the header. Then, told apart by their keys:
 *   step line   {"step":120,"tokens":..,"loss":..,"aux":..,"z":..,"lr":..,"grad_norm":..,"router_grad_norm":..,
 *                "router_main_norm":..,"router_balance_norm":..,"ms":..,"tok_s":..,"mfu":null,"drop":..,
 *                "token_drop":..,"padding":..,"load_cv":..,"load_kl":..,"max_vio":..,"entropy":..,"mean_entropy":..,
 *                "margin":..,"dead":0,"near_dead":0,"leaky":false,"skipped":0,"counts":[[E ints] per router],
 *                "layer_entropy":[..],"layer_main_norm":[..],"layer_balance_norm":[..],"layer_margin":[..]}
 *                with --perft r, before "counts": "perft_aux":..,"perft_entropy":..,"perft_main_norm":..,
 *                "perft_balance_norm":.., of the adapters' routers
 *   evaluation  {"step":..,"tokens":..,"val_loss":..,"val_bpb":..,"val_floor":.. or null,
 *                "val_domains":{"stories":{"loss":..,"floor":..,"tokens":..},..},
 *                "domain_expert":[[[E shares] per domain] per router],"mi":[nats per router],
 *                "churn":[share of tokens whose experts changed since the evaluation before; null at first]}
 *   event       {"event":"resume"|"skip"|"sample"|"memory"|"checkpoint"|"alarm"|"router_gradient"|"choices"|"end", ...}
 * Arrays per router have one entry for each MoE layer, or for each step of its chain; the header's "moe_layers" names
 * the layer of each.
 * Losses are nats per token; floats are printed with nine digits, so that equal bits give equal text.
 */
#ifndef MODEL_LOG_H
#define MODEL_LOG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "config.h"

typedef struct {
    int fd;                /* -1: a log that keeps nothing, of a rank that is not the first */
    bool warned;           /* a write failed, and stderr was told */
    bool lacks_evaluation; /* it goes on at a step of which it has none: the run may have been stopped in the middle */
    char path[CONFIG_TEXT + 16];
} Log;

/* What the header says beside ts, git sha and the configuration. */
typedef struct {
    const char *device;
    int64_t params_total, params_active, params_trainable;
    double flops_per_token; /* of training, forward and backward */
    int domain_count;
    const char *const *domains;
    int moe_layer_count;
    const int *moe_layers;
    bool learned; /* the router is trained by the main loss: its gradient must not be 0 */
    bool leaky;
    bool sees_batch; /* the router looks at other sequences of the batch */
} LogHeader;

/* Makes RUN (and its parents) and RUN/config.json, and starts a log with its header. A RUN that exists with another
 * configuration is refused with one line naming the options that differ; with the same one it is started over. With
 * resume, appends to the log, first cutting off lines past `resume_step`. */
void log_open(Log *log, const Config *config, const LogHeader *header, int64_t resume_step);
void log_close(Log *log);

/* Appends one line: printf with the newline added. A failed write (full disk) warns on stderr once and training goes
 * on. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void log_line(Log *log, const char *format, ...);

/* A number as the log writes it, null where it is not finite: JSON has no other. */
void log_number(FILE *out, double value);

/* Text as a JSON string literal, quotes included, each byte that is not UTF-8 as \ufffd; returns out. What exceeds size
 * (at least 3) is left out at the end, so that out is always a whole literal. */
const char *json_quote(char *out, size_t size, const char *text, size_t length);

#endif
