/* AdamW over the tensor list: decay only on tensors of two or more dimensions, frozen tensors untouched, a schedule for
 * the learning rate. The arithmetic is kernels/adamw.h.
 */
#ifndef MODEL_OPTIMIZER_H
#define MODEL_OPTIMIZER_H

#include "../kernels/adamw.h"
#include "../kernels/device.h"
#include "config.h"
#include "transformer.h"

typedef struct {
    acc_t *m, *v;      /* flat, device */
    AdamState *state;  /* device */
    double *lr;        /* of the step at hand, device */
    AdamPiece *pieces; /* (count) one per tensor, device */
    double *sums;      /* (count) squared gradient norms, of the whole tensor, 0 for frozen ones, device */
    double *all_sums;  /* (ranks,count) what the ranks that share the experts have of them, device */
    double *partial;   /* (chunks) of the sums, device */
    int count, chunks;
} Optimizer;

void optimizer_reserve(Optimizer *optimizer, const TensorList *tensors, Arena *arena);

/* After arena_commit: says which tensors are trained and which decay. The optimizer owns nothing outside the arena. */
void optimizer_connect(Optimizer *optimizer, const TensorList *tensors, const TrainConfig *train);

/* Share of --lr in 0-based step `step`: (step+1)/warmup in the warm-up, then by schedule from 1 to min_lr: cosine;
 * constant (1 throughout); wsd: 1, then linear over the last fifth. */
double learning_rate(const TrainConfig *train, int step);

/* Gives the next steps the learning rate of 0-based step `step`. Apart from optimizer_step, which a recording repeats
 * as it is. */
void optimizer_set_rate(Optimizer *optimizer, const TrainConfig *train, int step, Stream *stream);

/* Clips, updates the model's parameters from its gradients, clears the gradients that the next step does not overwrite.
 * A step whose gradient or step_loss is not finite changes nothing but the counters in state. */
void optimizer_step(Optimizer *optimizer, Transformer *model, const TrainConfig *train, Stream *stream);

/* Gradient norms of a step: of everything, and of the routers. */
typedef struct {
    double total, router;
} GradientNorms;

/* sums: a copy of optimizer->sums on the host */
GradientNorms optimizer_norms(const Optimizer *optimizer, const TensorList *tensors, const double *sums);

#endif
