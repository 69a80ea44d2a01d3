/* Calls the writers of hf_export.c and gguf.c with the weights on the host. Called by train.c. */
#include "export.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "gguf.h"
#include "hf_export.h"
#include "whole.h"

void export_check(const Config *config, const Vocabulary *vocabulary) {
    const TrainConfig *train = &config->train;
    char error[512];
    if (train->export_hf[0]) {
        hf_export_check(train->export_hf, &config->model);
    }
    CHECK(!train->export_gguf[0] || gguf_expresses(&config->model, vocabulary, error, sizeof error),
          "--export-gguf %s: %s", train->export_gguf, error);
}

/* The files that were asked for; says so, or why not. */
static bool write_files(const Config *config, const TensorList *tensors, const acc_t *weights,
                        const Vocabulary *vocabulary) {
    const TrainConfig *train = &config->train;
    char error[1024] = "";
    bool written = true;
    if (train->export_hf[0]) {
        written = hf_export(train->export_hf, &config->model, tensors, weights, vocabulary, error, sizeof error);
        if (written) {
            printf("export   %s for transformers: AutoModelForCausalLM.from_pretrained(\"%s\")\n", train->export_hf,
                   train->export_hf);
        }
    }
    if (written && train->export_gguf[0]) {
        written = gguf_export(train->export_gguf, &config->model, tensors, weights, vocabulary, error, sizeof error);
        if (written) {
            printf("export   %s for llama.cpp\n", train->export_gguf);
        }
    }
    if (!written) {
        fprintf(stderr, "moelab: not exported: %s\n", error);
    }
    return written;
}

bool export_write(const Config *config, const Transformer *model, const Vocabulary *vocabulary) {
    const TrainConfig *train = &config->train;
    bool written = true;
    if (!train->export_hf[0] && !train->export_gguf[0]) {
        return true;
    }
    TensorList whole = whole_tensors(&config->model);
    acc_t *weights = calloc(whole.total, sizeof(acc_t));
    CHECK(weights, "out of memory for a copy of %zu weights", whole.total);
    whole_gather(model, &whole, weights, model->master);
    if (comm_rank(GROUP_WORLD) == 0) {
        written = write_files(config, &whole, weights, vocabulary);
    }
    free(weights);
    tensors_free(&whole);
    return !comm_any(!written);
}
