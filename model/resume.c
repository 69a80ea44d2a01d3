/* Copies a run from the device to a checkpoint and back. Called by train.c; what stands on disk is checkpoint.c's. */
#include "resume.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "checkpoint.h"

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
    size_t bytes = model->tensors.total * sizeof(acc_t);
    bool saved = open_state(&state, &model->tensors);
    if (!saved) {
        snprintf(error, error_size, "out of memory for a copy of %zu parameters and their moments",
                 model->tensors.total);
    } else {
        AdamState adam;
        char *json = config_to_json(config);
        transformer_store(model, state.weights);
        host_from_device(state.m, optimizer->m, bytes, NULL);
        host_from_device(state.v, optimizer->v, bytes, NULL);
        host_from_device(&adam, optimizer->state, sizeof adam, NULL);
        state.step = progress->step;
        state.adam_step = adam.updates;
        state.skipped = adam.skipped;
        state.skipped_in_row = adam.skipped_in_row;
        state.tokens = progress->tokens;
        state.train_seconds = progress->seconds;
        saved = checkpoint_save(config->train.out, &state, json, error, error_size);
        free(json);
    }
    close_state(&state);
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
    size_t bytes = model->tensors.total * sizeof(acc_t);
    CHECK(open_state(&state, &model->tensors), "out of memory for a copy of %zu parameters and their moments",
          model->tensors.total);
    checkpoint_load(run, &state);
    CHECK(state.step <= config->train.steps, "--resume %s: the run is at step %lld, past --steps %d: raise --steps",
          run, (long long)state.step, config->train.steps);
    print_difference(config);
    transformer_load(model, state.weights);
    device_from_host(optimizer->m, state.m, bytes, NULL);
    device_from_host(optimizer->v, state.v, bytes, NULL);
    AdamState adam = {.updates = state.adam_step, .skipped = state.skipped, .skipped_in_row = state.skipped_in_row};
    device_from_host(optimizer->state, &adam, sizeof adam, NULL);
    close_state(&state);
    return (Progress){state.step, state.tokens, state.skipped, state.train_seconds};
}
