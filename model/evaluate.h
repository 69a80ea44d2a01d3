/* Validation: loss against the known floor, overall and per domain, and which experts work for which domain. */
#ifndef MODEL_EVALUATE_H
#define MODEL_EVALUATE_H

#include <stdbool.h>
#include <stdint.h>

#include "config.h"
#include "log.h"
#include "transformer.h"

/* The experts that an evaluation's first forward chose, kept for the next evaluation. Zero at first. */
typedef struct {
    int *expert; /* (moe_count, N, K of the plan), owned */
} Choices;

void choices_free(Choices *choices);

typedef struct {
    int domains, moe_count, E;
    bool masked;                        /* only hidden tokens count: there are no bits per byte */
    double loss, floor, bits_per_byte;  /* nats per token; NAN when unknown */
    double text_loss;                   /* nats of the targets that stand for text, .. */
    int64_t text_bytes;                 /* .. and the bytes they stand for; -1: unknown */
    double *domain_loss, *domain_floor; /* (domains) nats per token of the domain; NAN without tokens */
    int64_t *domain_tokens;             /* (domains) */
    double *domain_expert;              /* (moe_count, domains, E) how often tokens of the domain chose the expert */
    double *information;                /* (moe_count) mutual information of domain and expert, nats */
    double *churn;                      /* (moe_count) share of tokens with other experts than before, NAN */
    Choices *choices;                   /* the caller's */
    bool first;                         /* the first forward is still to come */
} Evaluation;

/* An empty evaluation of this model on text of so many domains; arrays are its own until evaluation_free. choices:
 * those of the evaluation before, on the same text; they become this one's. */
Evaluation evaluation_start(const Transformer *model, int domains, Choices *choices);

/* Adds the forward that model has just done with transformer_loss: its targets (N), -1 where none counts, the domain of
 * each (N), -ln of its true probability, floor (N), NAN where unknown, and the bytes of text it stands for (N), 0 for a
 * special token, -1 where unknown. All on the host. */
void evaluation_add(Evaluation *evaluation, const Transformer *model, const int *targets, const unsigned char *domain,
                    const double *floor, const int *bytes, Stream *stream);

/* Collective. From sums to means, once everything is added on all ranks. Bits per byte, comparable between tokenizers:
 * the losses of all targets that stand for text over the bytes they stand for; where those are unknown, the mean loss
 * over bytes_per_token. */
void evaluation_finish(Evaluation *evaluation, double bytes_per_token);
void evaluation_free(Evaluation *evaluation);

/* The evaluation line of the log (see log.h); names (domains). */
void evaluation_log(const Evaluation *evaluation, Log *log, const char *const *names, int64_t step, int64_t tokens);

#endif
