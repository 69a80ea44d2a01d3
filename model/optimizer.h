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
    acc_t *m, *v;          /* flat, device */
    AdamState *state;      /* device */
    double *sums;          /* (trained tensors) squared gradient norms, device */
    int *trained;          /* (count) indices of the tensors that are not frozen, host */
    size_t *offset, *size; /* (count) host */
    int count;
} Optimizer;

void optimizer_reserve(Optimizer *optimizer, const TensorList *tensors, Freeze freeze, Arena *arena);
void optimizer_free(Optimizer *optimizer);

/* Share of --lr in 0-based step `step`: (step+1)/warmup in the warm-up, then by schedule from 1 to min_lr: cosine;
 * constant (1 throughout); wsd: 1, then linear over the last fifth. */
double learning_rate(const TrainConfig *train, int step);

/* Clips, updates the model's parameters from its gradients, clears the gradients. A step whose gradient or step_loss is
 * not finite changes nothing but the counters in state. */
void optimizer_step(Optimizer *optimizer, Transformer *model, const TrainConfig *train, int step, Stream *stream);

/* Gradient norms of the last step, on the host: of everything, and of the routers. */
typedef struct {
    double total, router;
} GradientNorms;

GradientNorms optimizer_norms(const Optimizer *optimizer, const TensorList *tensors, Stream *stream);

#endif
