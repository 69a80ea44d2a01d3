/* Validation: loss against the known floor, overall and per domain, and which experts work for which domain. */
#ifndef MODEL_EVALUATE_H
#define MODEL_EVALUATE_H

#include <stdint.h>

#include "config.h"
#include "log.h"
#include "transformer.h"

typedef struct {
    int domains, moe_count, E;
    double loss, floor, bits_per_byte;  /* nats per token; floor NAN when unknown */
    double *domain_loss, *domain_floor; /* (domains) nats per token of the domain; NAN without tokens */
    int64_t *domain_tokens;             /* (domains) */
    double *domain_expert;              /* (moe_count, domains, E) how often tokens of the domain chose the expert */
    double *information;                /* (moe_count) mutual information of domain and expert, nats */
} Evaluation;

/* An empty evaluation of this model on text of so many domains; arrays are its own until evaluation_free. */
Evaluation evaluation_start(const Transformer *model, int domains);

/* Adds the forward that model has just done with transformer_loss: domain of each target (N) and -ln of its true
 * probability, floor (N), NAN where unknown. */
void evaluation_add(Evaluation *evaluation, const Transformer *model, const unsigned char *domain, const double *floor,
                    Stream *stream);

/* From sums to means, once everything is added. */
void evaluation_finish(Evaluation *evaluation, double bytes_per_token);
void evaluation_free(Evaluation *evaluation);

/* The evaluation line of the log (see log.h); names (domains). */
void evaluation_log(const Evaluation *evaluation, Log *log, const char *const *names, int64_t step, int64_t tokens);

#endif
