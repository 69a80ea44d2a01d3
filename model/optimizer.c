/* Which tensors a step touches and with which learning rate; what it does to them is kernels/adamw.h. Called by
 * train.c. */
#include "optimizer.h"

#include <math.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"

/* Pieces of the tensors (host, the caller frees), their chunks numbered. */
static AdamPiece *list_pieces(const TensorList *tensors, int *chunks) {
    AdamPiece *pieces = calloc(tensors->count, sizeof *pieces);
    CHECK(pieces, "out of memory for a list of %d tensors", tensors->count);
    for (int i = 0; i < tensors->count; i++) {
        pieces[i].offset = tensors->items[i].offset;
        pieces[i].count = tensors->items[i].count;
    }
    *chunks = adamw_number_chunks(pieces, tensors->count);
    return pieces;
}

void optimizer_reserve(Optimizer *optimizer, const TensorList *tensors, Arena *arena) {
    *optimizer = (Optimizer){.count = tensors->count};
    free(list_pieces(tensors, &optimizer->chunks));
    arena_reserve(arena, (void **)&optimizer->m, tensors->total * sizeof(acc_t), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->v, tensors->total * sizeof(acc_t), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->state, sizeof(AdamState), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->lr, sizeof(double), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->pieces, optimizer->count * sizeof(AdamPiece), MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->sums, optimizer->count * sizeof(double), MEMORY_OPTIMIZER);
    size_t gathered = comm_ranks(GROUP_EXPERTS) * optimizer->count * sizeof(double);
    arena_reserve(arena, (void **)&optimizer->all_sums, gathered, MEMORY_OPTIMIZER);
    arena_reserve(arena, (void **)&optimizer->partial, optimizer->chunks * sizeof(double), MEMORY_OPTIMIZER);
}

void optimizer_connect(Optimizer *optimizer, const TensorList *tensors, const TrainConfig *train) {
    AdamPiece *pieces = list_pieces(tensors, &optimizer->chunks);
    for (int i = 0; i < tensors->count; i++) {
        pieces[i].trained = !tensors->items[i].frozen;
        pieces[i].keep_grad = tensors->items[i].grad_overwritten;
        pieces[i].spread = tensors->items[i].parts > 1;
        pieces[i].decay = tensors->items[i].decay ? train->weight_decay : 0;
    }
    device_from_host(optimizer->pieces, pieces, optimizer->count * sizeof *pieces, NULL);
    free(pieces);
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

void optimizer_set_rate(Optimizer *optimizer, const TrainConfig *train, int step, Stream *stream) {
    double lr = learning_rate(train, step);
    device_from_host(optimizer->lr, &lr, sizeof lr, stream);
}

/* The squares of experts' gradients that other ranks hold come to theirs: each expert counts once, on every rank. */
static void gather_sums(Optimizer *o, const TensorList *tensors, Stream *stream) {
    int ranks = comm_ranks(GROUP_EXPERTS);
    if (ranks > 1) {
        comm_gather(GROUP_EXPERTS, o->all_sums, o->sums, o->count * sizeof(double), stream);
        adamw_add_sums(o->sums, o->all_sums, o->pieces, o->count, ranks, stream);
    }
}

void optimizer_step(Optimizer *optimizer, Transformer *model, const TrainConfig *train, Stream *stream) {
    profile_stage(model->profile, STAGE_OPTIMIZER, stream);
    Optimizer *o = optimizer;
    AdamOptions options = {.beta1 = train->beta1, .beta2 = train->beta2, .eps = 1e-8, .clip = train->clip};
    adamw_square_sums(o->sums, o->partial, model->grads, o->pieces, o->count, o->chunks, stream);
    gather_sums(o, &model->tensors, stream);
    adamw_begin(o->state, o->sums, o->count, model->step_loss, o->lr, options, stream);
    adamw_update(model->master, model->weights, o->m, o->v, model->grads, o->pieces, o->count, o->chunks, o->state,
                 options, stream);
}

GradientNorms optimizer_norms(const Optimizer *optimizer, const TensorList *tensors, const double *sums) {
    GradientNorms squares = {0};
    for (int i = 0; i < optimizer->count; i++) {
        squares.total += sums[i];
        squares.router += tensors->items[i].kind == TENSOR_ROUTER ? sums[i] : 0;
    }
    return (GradientNorms){sqrt(squares.total), sqrt(squares.router)};
}
