/* Copies a run from the device to a checkpoint and back. Called by train.c; what stands on disk is checkpoint.c's. */
#include "resume.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "checkpoint.h"
#include "whole.h"

/* Host copies of what is on the device; false when there is no memory for them. */
static bool open_state(CheckpointState *state, const TensorList *tensors) {
    *state = (CheckpointState){.tensors = tensors};
    state->weights = calloc(tensors->total, sizeof(acc_t));
    state->m = calloc(tensors->total, sizeof(acc_t));
    state->v = calloc(tensors->total, sizeof(acc_t));
    return state->weights && state->m && state->v;
}

static void close_state(CheckpointState *state) {
    free(state->weights);
    free(state->m);
    free(state->v);
}

bool training_save(const Config *config, const Transformer *model, const Optimizer *optimizer, const Progress *progress,
                   char *error, size_t error_size) {
    CheckpointState state;
    TensorList whole = whole_tensors(&config->model);
    bool saved = open_state(&state, &whole), first = comm_rank(GROUP_WORLD) == 0;
    if (comm_any(!saved)) {
        snprintf(error, error_size, "out of memory for a copy of %zu parameters and their moments", whole.total);
        saved = false;
    } else {
        AdamState adam;
        char *json = config_to_json(config);
        whole_gather(model, &whole, state.weights, model->master);
        whole_gather(model, &whole, state.m, optimizer->m);
        whole_gather(model, &whole, state.v, optimizer->v);
        host_from_device(&adam, optimizer->state, sizeof adam, NULL);
        state.step = progress->step;
        state.adam_step = adam.updates;
        state.skipped = adam.skipped;
        state.skipped_in_row = adam.skipped_in_row;
        state.tokens = progress->tokens;
        state.train_seconds = progress->seconds;
        saved = !first || checkpoint_save(config->train.out, &state, json, error, error_size);
        saved = !comm_any(!saved);
        free(json);
    }
    close_state(&state);
    tensors_free(&whole);
    return saved;
}

/* Says which options are not what the saved run had. */
static void print_difference(const Config *config) {
    Config saved;
    char text[1024];
    if (config_read(&saved, config->train.resume, text, sizeof text)) {
        config_difference(&saved, config, text, sizeof text);
        if (text[0]) {
            printf("resume   with another %s than the run had\n", text);
        }
    }
}

Progress training_load(const Config *config, Transformer *model, Optimizer *optimizer) {
    const char *run = config->train.resume;
    CheckpointState state;
    TensorList whole = whole_tensors(&config->model);
    size_t bytes = model->tensors.total * sizeof(acc_t);
    acc_t *mine = malloc(bytes);
    CHECK(open_state(&state, &whole) && mine, "out of memory for a copy of %zu parameters and their moments",
          whole.total);
    checkpoint_load(run, &state);
    CHECK(state.step <= config->train.steps, "--resume %s: the run is at step %lld, past --steps %d: raise --steps",
          run, (long long)state.step, config->train.steps);
    print_difference(config);
    tensors_take_part(&model->tensors, mine, &whole, state.weights);
    transformer_load(model, mine);
    tensors_take_part(&model->tensors, mine, &whole, state.m);
    device_from_host(optimizer->m, mine, bytes, NULL);
    tensors_take_part(&model->tensors, mine, &whole, state.v);
    device_from_host(optimizer->v, mine, bytes, NULL);
    AdamState adam = {.updates = state.adam_step, .skipped = state.skipped, .skipped_in_row = state.skipped_in_row};
    device_from_host(optimizer->state, &adam, sizeof adam, NULL);
    close_state(&state);
    tensors_free(&whole);
    free(mine);
    return (Progress){state.step, state.tokens, state.skipped, state.train_seconds};
}
