/* Fuzz target: a file of multiple-choice questions (data/choices.h), as --choices reads it.
 *
 * Whatever is in the file, it is refused with one line, or it has at least one question, all its rows can be made,
 * short and long, of tokens below the vocabulary size, and its questions can be scored.
 *
 * Run by tests/fuzz.sh; tests/test_fuzz_corpus.c replays its corpus. Read next: fuzz_config.c.
 */
#include "../../data/choices.h"
#include "input.h"

enum { CHOICES_VOCAB = 50257 };

/* All rows, a few at a time and beyond the last. */
static void read_rows(const ChoiceFile *file, int T) {
    enum { COUNT = 3 };
    int64_t rows = choices_rows(file);
    int *tokens = malloc(COUNT * (size_t)T * sizeof *tokens), *targets = malloc(COUNT * (size_t)T * sizeof *targets);
    assert(tokens && targets);
    for (int64_t first = 0; first <= rows; first += COUNT) {
        choices_batch(file, first, COUNT, T, tokens, targets);
        for (int i = 0; i < COUNT * T; i++) {
            bool past = first + i / T >= rows;
            assert(tokens[i] >= 0 && tokens[i] < (past ? 1 : CHOICES_VOCAB));
            assert(targets[i] >= -1 && targets[i] < (past ? 0 : CHOICES_VOCAB));
        }
    }
    free(tokens);
    free(targets);
}

/* With losses that fall, so that the last completion of each question wins. */
static void score(const ChoiceFile *file) {
    int rows = choices_rows(file);
    double *loss = malloc((size_t)rows * sizeof *loss);
    int *tokens = malloc((size_t)rows * sizeof *tokens);
    assert(loss && tokens);
    for (int row = 0; row < rows; row++) {
        loss[row] = rows - row;
        tokens[row] = 1;
    }
    for (int questions = 1; questions <= choices_questions(file); questions++) {
        double by_sum, by_mean;
        choices_score(file, questions, loss, tokens, &by_sum, &by_mean);
        assert(by_sum >= 0 && by_sum <= 1 && by_mean == by_sum);
        assert(choices_rows_of(file, questions) >= questions && choices_rows_of(file, questions) <= rows);
    }
    free(loss);
    free(tokens);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char error[512] = "";
    ChoiceFile *file = choices_open(input_file(data, size, ".bin"), CHOICES_VOCAB, error, sizeof error);
    if (!file) {
        input_check_error(error);
        return 0;
    }
    assert(choices_questions(file) > 0 && choices_rows(file) >= choices_questions(file));
    read_rows(file, 1);
    read_rows(file, 16);
    score(file);
    choices_close(file);
    return 0;
}
