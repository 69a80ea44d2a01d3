/* Multiple-choice questions: see choices.h for the file and the rows.
 *
 * Row r of a question is the sequence s = context ++ completion r, of L tokens. As for a text, place t holds s[t] and
 * predicts s[t+1], so the last token is a target only, and the last place of the context predicts the first token of
 * the completion:
 *
 *     s         c0 c1 c2 | a0 a1 a2          C = 3, L = 6
 *     tokens    c0 c1 c2   a0 a1  0  0       T = 7
 *     targets   -1 -1 a0   a1 a2 -1 -1
 *
 * When L - 1 > T, the first L - 1 - T tokens are left out: of the context, then, when the completion alone is too long,
 * of the completion, where the tokens up to the first one that is left are not scored. Without a context nothing
 * predicts a0, so it is not scored.
 *
 * The completions of a question are compared by the sum of -ln p over their tokens and by its mean per token; llm.c
 * calls the shares of questions that come out right acc and acc_norm.
 *
 * Called by the program that evaluates. Read next: data/text_loader.h. */
#include "choices.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAGIC = 20240522,
    VERSION = 1,
    HEADER_BYTES = 256 * 4,
    START = 65535,
    FIXED_BYTES = 5 * 2,    /* of a question: start, bytes, index, label, completions */
    SHORTEST_BYTES = 9 * 2, /* those, and a context and a completion of a token each; or of none and two */
};

/* Offsets are int: a file has at most INT_MAX bytes. */
typedef struct {
    int context; /* offset of the context's length, after which the completions follow */
    int row;     /* of its first completion */
    int label;
} Question;

struct ChoiceFile {
    const unsigned char *map; /* the whole file */
    int bytes;
    int count;
    int rows;
    Question *questions; /* (count) */
};

/* A run of tokens in the file. */
typedef struct {
    int count;
    const unsigned char *bytes; /* uint16 each */
} Run;

/* Writes the line and returns false. */
__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

static int uint16_at(const unsigned char *p) {
    return p[0] | p[1] << 8;
}

static uint32_t header_word(const ChoiceFile *file, int i) {
    const unsigned char *p = file->map + 4 * i;
    return (uint32_t)uint16_at(p) | (uint32_t)uint16_at(p + 2) << 16;
}

/* The run whose length stands at the offset, which is moved behind the run. */
static Run next_run(const ChoiceFile *file, int *offset) {
    const unsigned char *p = file->map + *offset;
    Run run = {uint16_at(p), p + 2};
    *offset += 2 + 2 * run.count;
    return run;
}

/* ---- opening */

static bool map_file(ChoiceFile *file, const char *path, char *error, size_t error_size) {
    /* O_NONBLOCK: opening a named pipe must fail below, not wait for its writer. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return fail(error, error_size, "cannot open %s: %s", path, strerror(errno));
    }
    struct stat status;
    bool good = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (!good) {
        fail(error, error_size, "%s is not a regular file: give a file of multiple-choice questions", path);
    } else if (status.st_size < HEADER_BYTES || status.st_size > INT_MAX) {
        good = fail(error, error_size, "%s has %lld bytes, but a file of multiple-choice questions %d to %d: %s", path,
                    (long long)status.st_size, (int)HEADER_BYTES, INT_MAX, "it is truncated or another kind of file");
    } else {
        void *map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        good = map != MAP_FAILED || fail(error, error_size, "cannot map %s: %s", path, strerror(errno));
        file->map = good ? map : NULL;
        file->bytes = (int)status.st_size;
    }
    close(fd);
    return good;
}

static bool check_header(ChoiceFile *file, const char *path, char *error, size_t error_size) {
    uint32_t magic = header_word(file, 0), version = header_word(file, 1), count = header_word(file, 2);
    if (magic != MAGIC || version != VERSION) {
        return fail(error, error_size, "%s starts with %u, %u, but llm.c's multiple-choice files with %d, %d: %s", path,
                    magic, version, (int)MAGIC, (int)VERSION, "it is another kind of file, or damaged");
    }
    if (count == 0 || count > (uint32_t)(file->bytes - HEADER_BYTES) / SHORTEST_BYTES) {
        return fail(error, error_size, "%s has %d bytes, but its header says %u questions: it is %s", path, file->bytes,
                    count, count == 0 ? "empty, write it again" : "truncated or damaged, copy it again");
    }
    file->count = (int)count;
    return true;
}

/* Checks the run whose length stands at *offset, all inside [*offset, end), and moves *offset behind it. */
static bool check_run(const ChoiceFile *file, int *offset, int end, int vocab, const char *path, int question,
                      char *error, size_t error_size) {
    if (end - *offset < 2 || 2 * uint16_at(file->map + *offset) > end - *offset - 2) {
        return fail(error, error_size, "%s: question %d has more tokens than its length says: %s", path, question,
                    "the file is damaged, write or copy it again");
    }
    Run run = next_run(file, offset);
    for (int i = 0; i < run.count; i++) {
        int token = uint16_at(run.bytes + 2 * i);
        if (token >= vocab) {
            return fail(error, error_size,
                        "%s: question %d has the token %d, which is not below the vocabulary size %d: "
                        "write the file with the model's tokenizer",
                        path, question, token, vocab);
        }
    }
    return true;
}

/* Checks question q at *offset, takes over where its parts are and moves *offset behind it. */
static bool check_question(ChoiceFile *file, int q, int *offset, int vocab, const char *path, char *error,
                           size_t error_size) {
    const unsigned char *p = file->map + *offset;
    int left = file->bytes - *offset;
    int length = left >= SHORTEST_BYTES ? uint16_at(p + 2) : 0;
    if (left < SHORTEST_BYTES || length > left) {
        return fail(error, error_size, "%s ends inside question %d of %d: it is truncated, copy it again", path, q,
                    file->count);
    }
    int start = uint16_at(p), index = uint16_at(p + 4), label = uint16_at(p + 6), completions = uint16_at(p + 8);
    if (start != START || index != q % 65536 || length < SHORTEST_BYTES || length % 2 != 0) {
        return fail(error, error_size, "%s: question %d starts with %d, %d bytes, index %d, not with %d, %s, %d: %s",
                    path, q, start, length, index, (int)START, "its even length", q % 65536,
                    "the file is damaged, write or copy it again");
    }
    if (label >= completions) {
        return fail(error, error_size, "%s: question %d says that completion %d of %d is right: %s", path, q, label,
                    completions, "labels count from 0, write the file again");
    }
    int end = *offset + length;
    *offset += FIXED_BYTES;
    file->questions[q] = (Question){.context = *offset, .row = file->rows, .label = label};
    int context = uint16_at(file->map + *offset);
    if (!check_run(file, offset, end, vocab, path, q, error, error_size)) {
        return false;
    }
    for (int r = 0; r < completions; r++) {
        int at = *offset;
        if (!check_run(file, offset, end, vocab, path, q, error, error_size)) {
            return false;
        }
        int tokens = uint16_at(file->map + at);
        if (tokens == 0 || context + tokens < 2) {
            return fail(error, error_size, "%s: completion %d of question %d has no token to predict: %s", path, r, q,
                        "write the file without that question");
        }
    }
    file->rows += completions; /* no overflow: each took bytes of the file */
    return *offset == end || fail(error, error_size, "%s: question %d has %d bytes after its last completion: %s", path,
                                  q, end - *offset, "the file is damaged, write or copy it again");
}

static bool check_questions(ChoiceFile *file, int vocab, const char *path, char *error, size_t error_size) {
    file->questions = malloc((size_t)file->count * sizeof *file->questions);
    if (!file->questions) {
        return fail(error, error_size, "%s: out of memory for %d questions", path, file->count);
    }
    int offset = HEADER_BYTES, longest = 0;
    for (int q = 0; q < file->count; q++) {
        int start = offset;
        if (!check_question(file, q, &offset, vocab, path, error, error_size)) {
            return false;
        }
        longest = offset - start > longest ? offset - start : longest;
    }
    if (offset != file->bytes) {
        return fail(error, error_size, "%s has %d bytes after the last of its %d questions: write or copy it again",
                    path, file->bytes - offset, file->count);
    }
    return header_word(file, 3) == (uint32_t)longest ||
           fail(error, error_size, "%s has a question of %d bytes, but its header says %u for the longest: %s", path,
                longest, header_word(file, 3), "the file is damaged, write or copy it again");
}

ChoiceFile *choices_open(const char *path, int vocab, char *error, size_t error_size) {
    ChoiceFile *file = calloc(1, sizeof *file);
    if (!file) {
        fail(error, error_size, "%s: out of memory", path);
        return NULL;
    }
    if (!map_file(file, path, error, error_size) || !check_header(file, path, error, error_size) ||
        !check_questions(file, vocab, path, error, error_size)) {
        choices_close(file);
        return NULL;
    }
    return file;
}

void choices_close(ChoiceFile *file) {
    if (!file) {
        return;
    }
    if (file->map) {
        munmap((void *)(uintptr_t)file->map, (size_t)file->bytes);
    }
    free(file->questions);
    free(file);
}

/* ---- rows and scores */

int choices_questions(const ChoiceFile *file) {
    return file->count;
}

int choices_rows(const ChoiceFile *file) {
    return file->rows;
}

int choices_rows_of(const ChoiceFile *file, int questions) {
    assert(questions >= 0 && questions <= file->count);
    return questions < file->count ? file->questions[questions].row : file->rows;
}

/* The question that a row belongs to: the last whose first row is not behind it. */
static const Question *question_of(const ChoiceFile *file, int row) {
    int low = 0, high = file->count;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (file->questions[middle].row <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return &file->questions[low];
}

/* tokens and targets (T), filled with 0 and -1. */
static void fill_row(const ChoiceFile *file, int row, int T, int *tokens, int *targets) {
    const Question *question = question_of(file, row);
    int offset = question->context;
    Run context = next_run(file, &offset), completion = {0};
    for (int r = question->row; r <= row; r++) {
        completion = next_run(file, &offset);
    }
    int C = context.count, L = C + completion.count;
    for (int i = L - 1 > T ? L - 1 - T : 0, t = 0; i < L; i++, t++) { /* s[i] stands at place t */
        int token = i < C ? uint16_at(context.bytes + 2 * i) : uint16_at(completion.bytes + 2 * (i - C));
        if (t < T && i < L - 1) {
            tokens[t] = token;
        }
        if (t > 0 && i >= C) {
            targets[t - 1] = token;
        }
    }
}

void choices_batch(const ChoiceFile *file, int64_t first, int count, int T, int *tokens, int *targets) {
    assert(first >= 0 && count >= 0 && T >= 1);
    for (size_t i = 0; i < (size_t)count * (size_t)T; i++) {
        tokens[i] = 0;
        targets[i] = -1;
    }
    for (int i = 0; i < count && first + i < file->rows; i++) {
        size_t at = (size_t)i * (size_t)T;
        fill_row(file, (int)(first + i), T, tokens + at, targets + at);
    }
}

/* Whether the right completion is the first of the smallest losses, each divided by row_tokens unless that is NULL. NAN
 * is never the smallest: a model that has diverged does not answer. */
static bool is_right(const ChoiceFile *file, int q, const double *row_loss, const int *row_tokens) {
    double smallest = INFINITY;
    int best = -1, rows = choices_rows_of(file, q + 1);
    for (int row = file->questions[q].row; row < rows; row++) {
        double loss = row_tokens ? row_loss[row] / row_tokens[row] : row_loss[row];
        if (loss < smallest) {
            smallest = loss;
            best = row;
        }
    }
    return best == file->questions[q].row + file->questions[q].label;
}

void choices_score(const ChoiceFile *file, int questions, const double *row_loss, const int *row_tokens, double *by_sum,
                   double *by_mean) {
    assert(questions >= 1 && questions <= file->count);
    int right_by_sum = 0, right_by_mean = 0;
    for (int q = 0; q < questions; q++) {
        right_by_sum += is_right(file, q, row_loss, NULL);
        right_by_mean += is_right(file, q, row_loss, row_tokens);
    }
    *by_sum = (double)right_by_sum / questions;
    *by_mean = (double)right_by_mean / questions;
}
