/* Multiple-choice questions from llm.c's eval shards (HellaSwag, MMLU): a context and some completions, one of them
 * right. The model answers with the completion it finds most probable.
 *
 *     256 little-endian int32: [0] 20240522, [1] 1, [2] questions, [3] bytes of the longest one
 *     per question, uint16 each: 65535, bytes of the question (this stream included), index, label, completions (n),
 *                                context length, context tokens, n times: completion length, completion tokens
 *
 * Read as rows of a batch, like a corpus: row r of question q is the context and completion r, targets only where the
 * completion's tokens are predicted.
 */
#ifndef DATA_CHOICES_H
#define DATA_CHOICES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ChoiceFile ChoiceFile;

/* Maps and checks the whole file: sizes, the mark in front of each question, lengths, labels, tokens below vocab. NULL
 * with one line in error. */
ChoiceFile *choices_open(const char *path, int vocab, char *error, size_t error_size);
void choices_close(ChoiceFile *file); /* NULL is fine */

int choices_questions(const ChoiceFile *file);
int choices_rows(const ChoiceFile *file); /* completions of all questions */

/* Rows [first, first + count) into tokens and targets (count, T): targets[t] is the token after tokens[t] where that
 * token belongs to the completion, else -1; a row that is too long loses its beginning, places past its end hold token
 * 0. Rows past the last are all 0 and -1. */
void choices_batch(const ChoiceFile *file, int64_t first, int count, int T, int *tokens, int *targets);

/* Share of the questions whose right completion has the smallest sum of losses (ties: the first), and the smallest mean
 * per token; row_loss (rows): sum of -ln p over the row's targets, row_tokens (rows): how many they are. Both over the
 * first `questions` questions. */
void choices_score(const ChoiceFile *file, int questions, const double *row_loss, const int *row_tokens, double *by_sum,
                   double *by_mean);

/* Rows of the first `questions` questions. */
int choices_rows_of(const ChoiceFile *file, int questions);

#endif
