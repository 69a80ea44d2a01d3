/* --choices: a trained model answers multiple-choice questions. Each completion of a question is a row of a batch; the
 * sums of the losses over its tokens decide. model/ reads no files of questions: it asks the functions in this table,
 * which train.c fills from data/choices.h, where they are described.
 */
#ifndef MODEL_ANSWER_H
#define MODEL_ANSWER_H

#include "batch.h"
#include "config.h"
#include "log.h"
#include "transformer.h"

struct ChoiceFile;

typedef struct {
    const struct ChoiceFile *file; /* first argument of the functions */
    int count, rows;               /* questions, and completions of all of them */
    void (*batch)(const struct ChoiceFile *, int64_t first, int count, int T, int *tokens, int *targets);
    void (*score)(const struct ChoiceFile *, int questions, const double *row_loss, const int *row_tokens,
                  double *by_sum, double *by_mean);
} Questions;

/* Prints and logs the share of right answers; nothing when the run is asked to end before. `batch` is overwritten. */
void answer_questions(Transformer *model, const Config *config, const Questions *questions, BatchBuffers *batch,
                      Log *log);

#endif
