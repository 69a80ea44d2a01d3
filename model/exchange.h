/* Expert parallelism: rows travel to the rank that holds their expert, and back.
 *
 * Of the E experts each rank of a group holds E/ranks neighbours, of every layer. Its plan (kernels/plan.h) speaks of
 * all E, for the tokens of this rank alone. Rows lie sorted by expert, so what goes to one rank is a run:
 *
 *     2 ranks, 4 experts           rank 0                       rank 1
 *     rows in plan order           e0 e0 e1 | e2 e3 e3          e0 e1 | e2 e2 e3
 *                                  (stay)   | (to rank 1)       (to 0)| (stay)
 *     arrived, by source           e0 e0 e1 | e0 e1             e2 e3 e3 | e2 e2 e3
 *     grouped by expert            e0 e0 e0 | e1 e1             e2 e2 e2 | e3 e3 e3
 *
 * Within an expert rows are in the order of the ranks, which is that of the tokens in the whole batch: the experts see
 * what they would see on one rank. The way back is the same in reverse, and brings every row to its place in the plan.
 *
 * Metadata travels once per layer and forward: how many rows each rank has for each expert (exchange_plan). The way
 * back and the backward need none. By linearity the backward of the way there is the way back, and the other way round;
 * the gate's gradient needs a row's weight at its expert and returns one number per row.
 *
 * A group of one rank moves and copies nothing: rows, offsets and weights are the plan's own.
 */
#ifndef MODEL_EXCHANGE_H
#define MODEL_EXCHANGE_H

#include "../kernels/plan.h"
#include "../kernels/device.h"
#include "config.h"

/* What one layer's rows do; saved by the forward for its backward. */
typedef struct {
    int ranks, E, experts; /* of the group; of the model; of this rank */
    int *told;             /* (world, 2, E) device: each rank's demand and rows for each expert */
    int *host_told;        /* the same on the host, owned; NULL with one rank */
    int *send, *receive;   /* (ranks+1) host, owned: first row for, and from, each rank of the group */
    int *demand;           /* (E) device: entries of all ranks that chose each expert */
    int *offset;           /* (experts+1) device: rows of this rank's experts, grouped */
    acc_t *row_weight;     /* (rows) of these rows */
} Exchange;

/* Buffers that all layers take turns in; NULL with one rank. */
typedef struct {
    int C;
    real_t *home;          /* (rows of a plan, C) in plan order: what leaves, later what comes back */
    real_t *arrived;       /* (rows, C) by source */
    acc_t *home_weight;    /* (rows of a plan) */
    acc_t *arrived_weight; /* (rows) */
} ExchangeScratch;

/* Refuses what cannot be spread over these ranks: one line for each. After comm_form_groups. */
void exchange_check(const Config *config);

/* The most rows that this rank's experts can get where every rank's plan has plan_rows. */
size_t exchange_rows(size_t plan_rows);

/* Reserves for a layer's exchange: rows from exchange_rows. */
void exchange_reserve(Exchange *exchange, const Plan *plan, size_t rows, Arena *arena);
void exchange_free(Exchange *exchange);
void exchange_reserve_scratch(ExchangeScratch *scratch, size_t plan_rows, size_t rows, int C, Arena *arena);

/* After plan_build: all ranks tell each other their counts; sets demand, offset, and what goes where. The one place
 * where the host waits. */
void exchange_plan(Exchange *exchange, Plan *plan, Stream *stream);

/* Whether rows leave this rank: then they must be written out, in plan order, where exchange_outbox says. */
bool exchange_travels(const Exchange *exchange);
real_t *exchange_outbox(ExchangeScratch *scratch, real_t *otherwise);

/* Rows (plan order, C) to their experts: returns where these find them, in `to` (rows, C) unless they stay. */
RowSource exchange_there(const Exchange *exchange, ExchangeScratch *scratch, real_t *to, RowSource rows,
                         Stream *stream);

/* The experts' rows (rows, C) home: returns them in plan order, in scratch unless they have stayed. */
real_t *exchange_back(const Exchange *exchange, ExchangeScratch *scratch, real_t *rows, Stream *stream);

/* The same for one number per row: the plan's row weights to the experts, their gradients (rows) home. */
const acc_t *exchange_weights_there(const Exchange *exchange, ExchangeScratch *scratch, const Plan *plan,
                                    Stream *stream);
const acc_t *exchange_weights_back(const Exchange *exchange, ExchangeScratch *scratch, const acc_t *weights,
                                   Stream *stream);

#endif
