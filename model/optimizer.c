/* Which tensors a step touches and with which learning rate; what it does to them is kernels/adamw.h. Called by
 * train.c. */
#include "optimizer.h"

#include <math.h>
#include <stdlib.h>

#include "../kernels/check.h"

static bool is_frozen(const Tensor *tensor, Freeze freeze) {
    return tensor->kind == TENSOR_STATE || (freeze == FREEZE_EXPERTS && tensor->kind == TENSOR_EXPERT) ||
           (freeze == FREEZE_ROUTER && tensor->kind == TENSOR_ROUTER);
}

void optimizer_reserve(Optimizer *optimizer, const TensorList *tensors, Freeze freeze, Arena *arena) {
    *optimizer = (Optimizer){0};
    optimizer->trained = calloc(tensors->count, sizeof(int));
    optimizer->offset = calloc(tensors->count, sizeof(size_t));
    optimizer->size = calloc(tensors->count, sizeof(size_t));
    CHECK(optimizer->trained && optimizer->offset && optimizer->size, "out of memory for a list of %d tensors",
          tensors->count);
    for (int i = 0; i < tensors->count; i++) {
        if (!is_frozen(&tensors->items[i], freeze)) {
            int k = optimizer->count++;
            optimizer->trained[k] = i;
            optimizer->offset[k] = tensors->items[i].offset;
            optimizer->size[k] = tensors->items[i].count;
        }
    }
    arena_reserve(arena, (void **)&optimizer->m, tensors->total * sizeof(acc_t), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->v, tensors->total * sizeof(acc_t), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->state, sizeof(AdamState), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->sums, optimizer->count * sizeof(double), MEMORY_OPTIMIZER);
}

void optimizer_free(Optimizer *optimizer) {
    free(optimizer->trained);
    free(optimizer->offset);
    free(optimizer->size);
    *optimizer = (Optimizer){0};
}

double learning_rate(const TrainConfig *train, int step) {
    if (step < train->warmup) {
        return train->lr * (step + 1) / train->warmup;
    }
    double done = (double)(step - train->warmup) / (train->steps > train->warmup ? train->steps - train->warmup : 1);
    double share = 1;
    if (train->schedule == SCHEDULE_COSINE) {
        share = 0.5 * (1 + cos(M_PI * fmin(done, 1)));
    } else if (train->schedule == SCHEDULE_WSD) {
        share = fmin(1, 5 * fmax(1 - (double)step / train->steps, 0));
    }
    return train->lr * (train->min_lr + (1 - train->min_lr) * share);
}

void optimizer_step(Optimizer *optimizer, Transformer *model, const TrainConfig *train, int step, Stream *stream) {
    AdamOptions options = {.lr = learning_rate(train, step),
                           .beta1 = train->beta1,
                           .beta2 = train->beta2,
                           .eps = 1e-8,
                           .clip = train->clip};
    adamw_square_sums(optimizer->sums, model->grads, optimizer->offset, optimizer->size, optimizer->count, stream);
    adamw_begin(optimizer->state, optimizer->sums, optimizer->count, model->step_loss, options, stream);
    for (int i = 0; i < optimizer->count; i++) {
        const Tensor *t = &model->tensors.items[optimizer->trained[i]];
        options.decay = t->decay ? train->weight_decay : 0;
        adamw_update(model->master + t->offset, model->weights + t->offset, optimizer->m + t->offset,
                     optimizer->v + t->offset, model->grads + t->offset, t->count, optimizer->state, options, stream);
    }
    device_zero(model->grads, model->tensors.total * sizeof(acc_t), stream);
    profile_lap(model->profile, STAGE_OPTIMIZER, stream);
}

GradientNorms optimizer_norms(const Optimizer *optimizer, const TensorList *tensors, Stream *stream) {
    GradientNorms norms = {0};
    double *sums = calloc(optimizer->count, sizeof(double));
    CHECK(sums, "out of memory for %d gradient norms", optimizer->count);
    host_from_device(sums, optimizer->sums, optimizer->count * sizeof(double), stream);
    for (int i = 0; i < optimizer->count; i++) {
        norms.total += sums[i];
        norms.router += tensors->items[optimizer->trained[i]].kind == TENSOR_ROUTER ? sums[i] : 0;
    }
    free(sums);
    return (GradientNorms){sqrt(norms.total), sqrt(norms.router)};
}
