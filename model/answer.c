/* See answer.h. Called by train.c at the end of a run. */
#include "answer.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "process.h"

/* The rows' sums of losses and counts of targets. losses (N): on the host. */
static void score_rows(double *row_loss, int *row_tokens, acc_t *losses, Transformer *model, const Questions *questions,
                       BatchBuffers *batch) {
    int T = model->T, rows = questions->rows;
    for (int first = 0; first < rows && !process_must_end(); first += model->B) {
        questions->batch(questions->file, first, model->B, T, batch->host_tokens, batch->host_targets);
        batch_to_device(batch, 0);
        transformer_forward(model, batch->tokens, 0, NULL);
        transformer_loss(model, batch->targets, 0, false, NULL);
        host_from_device(losses, model->losses, model->N * sizeof(acc_t), NULL);
        for (int n = 0; n < model->N && first + n / T < rows; n++) {
            if (batch->host_targets[n] >= 0) {
                row_loss[first + n / T] += losses[n];
                row_tokens[first + n / T]++;
            }
        }
    }
}

void answer_questions(Transformer *model, const Config *config, const Questions *questions, BatchBuffers *batch,
                      Log *log) {
    int rows = questions->rows;
    double *row_loss = calloc(rows, sizeof(double)), by_sum, by_mean;
    int *row_tokens = calloc(rows, sizeof(int));
    acc_t *losses = calloc(model->N, sizeof(acc_t));
    CHECK(row_loss && row_tokens && losses, "out of memory for %d completions", rows);
    transformer_set_training(model, false, config->train.eval_drop);
    score_rows(row_loss, row_tokens, losses, model, questions, batch);
    transformer_set_training(model, true, true);
    if (!process_must_end()) {
        questions->score(questions->file, questions->count, row_loss, row_tokens, &by_sum, &by_mean);
        printf("choices  %d questions: accuracy %.4f by summed log-probability, %.4f by its mean per token\n",
               questions->count, by_sum, by_mean);
        log_line(log, "{\"event\":\"choices\",\"questions\":%d,\"accuracy\":%.9g,\"accuracy_mean\":%.9g}",
                 questions->count, by_sum, by_mean);
    }
    free(row_loss);
    free(row_tokens);
    free(losses);
}
