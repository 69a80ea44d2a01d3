/* What a training step tells about itself: the figures of a step line of the log. */
#ifndef MODEL_FIGURES_H
#define MODEL_FIGURES_H

#include <stdint.h>

#include "balance.h"
#include "log.h"
#include "optimizer.h"
#include "transformer.h"

typedef struct {
    double loss;             /* cross-entropy alone, nats per token */
    double aux, z;           /* mean over MoE layers of balance loss and z-loss, before their coefficients */
    double main_gradient;    /* norm of the main loss's gradient at all routers' logits */
    double balance_gradient; /* .. of the balance losses' */
    double mean_entropy;     /* entropy of the mean probabilities, mean over MoE layers, nats */
    double entropy;          /* mean over tokens and MoE layers of the routing entropy, nats */
    double margin;           /* mean over tokens and layers of the K-th score less the next */
    double dropped;          /* share of entries without a place */
    double tokens_dropped;   /* share of tokens without any expert */
    double padding;          /* share of computed rows that hold no token */
    bool perft;              /* --perft r: these are of the adapters' routers, as those above */
    double perft_aux, perft_entropy, perft_main_gradient, perft_balance_gradient;
    LoadSummary load;    /* mean over the MoE layers; dead and near_dead are sums */
    GradientNorms norms; /* before clipping */
    AdamState adam;
    int moe_count, E, ranks;
    double flops_per_token;
    double *counts;        /* (moe_count, E) entries that chose each expert */
    double *layer_entropy; /* (moe_count) each, as the means above */
    double *layer_main_norm;
    double *layer_balance_norm;
    double *layer_margin;
} StepFigures;

/* Queues the copies of the last step's figures to the host, behind the step; the device goes on. `readback` is reserved
 * by the first call and freed by the caller. */
void figures_request(Readback *readback, const Transformer *model, const Optimizer *optimizer, Stream *stream);

/* The figures of the last request, waiting for them where they are not there yet. The arrays are the caller's
 * (figures_free). */
StepFigures figures_read(Readback *readback, const Transformer *model, const Optimizer *optimizer);
void figures_free(StepFigures *figures);

/* The line of a run's first step that has the norms of each router's gradients (see log.h). */
void figures_log_gradients(const StepFigures *figures, Log *log, int64_t step);

/* The step line (see log.h). step: steps done; seconds: of one step. A value that is not finite is written as null. */
void figures_log(const StepFigures *figures, Log *log, const Config *config, int64_t step, double seconds);

#endif
