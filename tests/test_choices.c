/* Multiple-choice files: which rows they become, how answers are scored, and what is refused.
 *
 * Files are made here word by word, as llm.c's dev/data/data_common.py lays them out, under a temporary folder, which
 * is the current folder while the tests run. Read next: data/choices.h. */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../data/choices.h"

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *walk) {
    return remove(path);
}

static char folder[64];

/* ---- files ---- */

enum { HEADER_WORDS = 512, MOST_WORDS = 600000 };

/* A file in the making, in uint16: the 256 int32 of the header, low half first, then the questions. */
static struct {
    uint16_t *words;
    int count, questions, longest;
    char error[512];
} made;

static void start_file(void) {
    memset(made.words, 0, MOST_WORDS * sizeof *made.words);
    made.count = HEADER_WORDS;
    made.questions = made.longest = 0;
}

/* Each test starts in an empty folder, with an empty file in the making. */
static int enter_folder(void **state) {
    made.words = malloc(MOST_WORDS * sizeof *made.words);
    if (!made.words) {
        return -1;
    }
    start_file();
    strcpy(folder, "/tmp/moelab-choices-XXXXXX");
    return mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static int leave_folder(void **state) {
    free(made.words);
    return chdir("/") == 0 ? nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS) : -1;
}

static void put_header(int i, uint32_t value) {
    made.words[2 * i] = (uint16_t)value;
    made.words[2 * i + 1] = (uint16_t)(value >> 16);
}

/* Adds a question, whose context and completions are tokens in decimal: "1 2 3|4 5|6". */
static void add_question(int label, const char *runs) {
    int start = made.count;
    uint16_t *words = made.words + start;
    words[0] = 65535;
    words[2] = (uint16_t)made.questions;
    words[3] = (uint16_t)label;
    int n = 5, length_at = n++;
    for (const char *p = runs; *p;) {
        char *end;
        long token = strtol(p, &end, 10);
        if (end > p) {
            words[n++] = (uint16_t)token;
            words[length_at]++;
            p = end;
        }
        if (*p == '|') {
            length_at = n++;
            words[4]++;
            p++;
        }
    }
    words[1] = (uint16_t)(2 * n);
    made.count += n;
    made.questions++;
    made.longest = 2 * n > made.longest ? 2 * n : made.longest;
    put_header(0, 20240522);
    put_header(1, 1);
    put_header(2, (uint32_t)made.questions);
    put_header(3, (uint32_t)made.longest);
}

static void write_bytes(const char *path, long bytes) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_true((long)fwrite(made.words, 1, (size_t)bytes, file) == bytes); /* the machines at hand are little-endian */
    assert_int_equal(fclose(file), 0);
}

static ChoiceFile *open_made(int vocab) {
    write_bytes("q.bin", 2L * made.count);
    return choices_open("q.bin", vocab, made.error, sizeof made.error);
}

static ChoiceFile *open_good(int vocab) {
    ChoiceFile *file = open_made(vocab);
    if (!file) {
        fail_msg("%s", made.error);
    }
    return file;
}

static void assert_error_has(const char *part) {
    if (!strstr(made.error, part) || strchr(made.error, '\n')) {
        fail_msg("\"%s\" lacks \"%s\", or is not one line", made.error, part);
    }
}

static void assert_refused(int vocab, const char *part) {
    strcpy(made.error, "");
    assert_null(open_made(vocab));
    assert_error_has(part);
}

/* ---- rows ---- */

/* Rows first, first + 1, ... are these numbers: tokens then targets of each, T of both. */
static void assert_rows(const ChoiceFile *file, int first, int count, int T, const int *expected) {
    int tokens[64], targets[64];
    assert_true(count * T < 64);
    memset(tokens, 85, sizeof tokens);
    memset(targets, 85, sizeof targets);
    choices_batch(file, first, count, T, tokens, targets);
    for (int i = 0; i < count * T; i++) {
        const int *row = expected + 2 * (i / T) * T;
        assert_int_equal(tokens[i], row[i % T]);
        assert_int_equal(targets[i], row[T + i % T]);
    }
    assert_int_equal(tokens[count * T], 0x55555555); /* and nothing behind them */
    assert_int_equal(targets[count * T], 0x55555555);
}

#define ROWS(file, first, count, T, ...) assert_rows(file, first, count, T, (const int[2 * (count) * (T)]){__VA_ARGS__})

static void test_rows_by_hand(void **state) {
    add_question(1, "1 2 3|11 12 13|21");
    add_question(0, "4|31 32|41 42|51|61 62 63 64");
    ChoiceFile *file = open_good(65);
    assert_int_equal(choices_questions(file), 2);
    assert_int_equal(choices_rows(file), 6);
    assert_int_equal(choices_rows_of(file, 0), 0);
    assert_int_equal(choices_rows_of(file, 1), 2);
    assert_int_equal(choices_rows_of(file, 2), 6);
    ROWS(file, 0, 2, 7, 1, 2, 3, 11, 12, 0, 0, -1, -1, 11, 12, 13, -1, -1, /**/
         1, 2, 3, 0, 0, 0, 0, -1, -1, 21, -1, -1, -1, -1);
    ROWS(file, 0, 1, 5, 1, 2, 3, 11, 12, -1, -1, 11, 12, 13); /* fits exactly */
    ROWS(file, 1, 3, 3, 1, 2, 3, -1, -1, 21,                  /* over the end of a question */
         4, 31, 0, 31, 32, -1,                                /**/
         4, 41, 0, 41, 42, -1);
    ROWS(file, 4, 4, 4, 4, 0, 0, 0, 51, -1, -1, -1, /* and of the file */
         4, 61, 62, 63, 61, 62, 63, 64,             /**/
         0, 0, 0, 0, -1, -1, -1, -1,                /**/
         0, 0, 0, 0, -1, -1, -1, -1);
    ROWS(file, 6, 1, 2, 0, 0, -1, -1);
    int64_t far = INT64_C(1) << 40;
    int token = 5, target = 5;
    choices_batch(file, far, 1, 1, &token, &target);
    assert_int_equal(token, 0);
    assert_int_equal(target, -1);
    choices_batch(file, 0, 0, 8, NULL, NULL);
    choices_close(file);
    choices_close(NULL);
}

/* One row, and T from one place too few down to a single place. */
static void test_long_rows_lose_their_beginning(void **state) {
    add_question(0, "1 2 3|11 12 13");
    ChoiceFile *file = open_good(65);
    ROWS(file, 0, 1, 4, 2, 3, 11, 12, -1, 11, 12, 13);
    ROWS(file, 0, 1, 3, 3, 11, 12, 11, 12, 13);
    ROWS(file, 0, 1, 2, 11, 12, 12, 13); /* nothing is left to predict 11 */
    ROWS(file, 0, 1, 1, 12, 13);
    choices_close(file);
}

static void test_without_a_context_the_first_token_is_not_scored(void **state) {
    add_question(0, "|11 12 13|21 22");
    ChoiceFile *file = open_good(65);
    ROWS(file, 0, 2, 4, 11, 12, 0, 0, 12, 13, -1, -1, /**/
         21, 0, 0, 0, 22, -1, -1, -1);
    choices_close(file);
}

/* ---- scores ---- */

static void assert_scores(const ChoiceFile *file, int questions, const double *loss, const int *tokens, double by_sum,
                          double by_mean) {
    double sum = -1, mean = -1;
    choices_score(file, questions, loss, tokens, &sum, &mean);
    assert_true(sum == by_sum);
    assert_true(mean == by_mean);
}

static void test_scores_by_hand(void **state) {
    add_question(1, "1|2|3|4");
    add_question(0, "1|2|3");
    add_question(3, "1|2|3|4|5");
    add_question(0, "1|2");
    ChoiceFile *file = open_good(65);
    /*                          question 0 | 1     | 2           | 3 */
    const double loss[10] = {3, 4, 5, /**/ 2, 2, /**/ 6, 5, 9, 4, /**/ 7};
    const int tokens[10] = {1, 4, 4, /**/ 2, 1, /**/ 2, 5, 9, 1, /**/ 3};
    assert_scores(file, 1, loss, tokens, 0, 1);            /* 3 < 4, but 4/4 < 5/4 < 3/1 */
    assert_scores(file, 2, loss, tokens, 1. / 2, 1);       /* a tie, which the first wins; 2/2 < 2/1 */
    assert_scores(file, 3, loss, tokens, 2. / 3, 2. / 3);  /* 4 is smallest; 5/5 is, with 9/9 behind it */
    assert_scores(file, 4, loss, tokens, 3. / 4, 3. / 4.); /* one completion alone */
    choices_close(file);
}

static void test_ties_go_to_the_first(void **state) {
    add_question(0, "1|2|3|4");
    add_question(1, "1|2|3|4");
    add_question(2, "1|2|3|4");
    ChoiceFile *file = open_good(65);
    const double same[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    const double later[9] = {2, 1, 1, 2, 1, 1, 2, 1, 1};
    const int tokens[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    assert_scores(file, 1, same, tokens, 1, 1);
    assert_scores(file, 3, same, tokens, 1. / 3, 1. / 3);
    assert_scores(file, 1, later, tokens, 0, 0);
    assert_scores(file, 2, later, tokens, 1. / 2, 1. / 2);
    assert_scores(file, 3, later, tokens, 1. / 3, 1. / 3);
    choices_close(file);
}

static void test_nan_is_no_answer(void **state) {
    add_question(0, "1|2|3");
    add_question(1, "1|2|3");
    ChoiceFile *file = open_good(65);
    const double all[4] = {NAN, NAN, NAN, NAN}, first[4] = {NAN, 5, NAN, 5};
    const int tokens[4] = {1, 1, 1, 1};
    assert_scores(file, 2, all, tokens, 0, 0);
    assert_scores(file, 2, first, tokens, 1. / 2, 1. / 2);
    choices_close(file);
}

/* ---- refusals ---- */

static void add_two_questions(void) {
    add_question(1, "1 2 3|11 12 13|21");
    add_question(0, "4|31 32|41 42");
}

enum { FIRST = HEADER_WORDS, CONTEXT = FIRST + 5, SECOND = FIRST + 15 }; /* words of add_two_questions' file */

static void test_each_word_that_is_wrong_is_named(void **state) {
    const struct {
        int word, value;
        const char *line;
    } cases[] = {
        {0, 0, "q.bin starts with 20185088, 1, but llm.c's multiple-choice files with 20240522, 1"},
        {2, 2, "q.bin starts with 20240522, 2, but"},
        {4, 0, "q.bin has 1080 bytes, but its header says 0 questions: it is empty"},
        {4, 1, "q.bin has 26 bytes after the last of its 1 questions"},
        {4, 3, "q.bin ends inside question 2 of 3"},
        {4, 4, "q.bin has 1080 bytes, but its header says 4 questions: it is truncated or damaged"},
        {5, 65535, "its header says 4294901762 questions"},
        {6, 28, "q.bin has a question of 30 bytes, but its header says 28 for the longest"},
        {7, 1, "q.bin has a question of 30 bytes, but its header says 65566 for the longest"},
        {FIRST, 65534, "q.bin: question 0 starts with 65534, 30 bytes, index 0, not with 65535"},
        {FIRST + 1, 0, "q.bin: question 0 starts with 65535, 0 bytes"},
        {FIRST + 1, 16, "q.bin: question 0 starts with 65535, 16 bytes"},
        {FIRST + 1, 31, "q.bin: question 0 starts with 65535, 31 bytes"},
        {FIRST + 1, 28, "q.bin: question 0 has more tokens than its length says"},
        {FIRST + 1, 32, "q.bin: question 0 has 2 bytes after its last completion"},
        {FIRST + 1, 58, "q.bin ends inside question 0 of 2"},
        {FIRST + 1, 65534, "q.bin ends inside question 0 of 2"},
        {FIRST + 2, 1, "q.bin: question 0 starts with 65535, 30 bytes, index 1, not with 65535, its even length, 0"},
        {SECOND + 2, 0, "q.bin: question 1 starts with 65535, 26 bytes, index 0, not with 65535, its even length, 1"},
        {FIRST + 3, 2, "q.bin: question 0 says that completion 2 of 2 is right"},
        {FIRST + 3, 65535, "q.bin: question 0 says that completion 65535 of 2 is right"},
        {FIRST + 4, 0, "q.bin: question 0 says that completion 1 of 0 is right"},
        {FIRST + 4, 3, "q.bin: question 0 has more tokens than its length says"},
        {FIRST + 4, 65535, "q.bin: question 0 has more tokens than its length says"},
        {SECOND + 4, 1, "q.bin: question 1 has 6 bytes after its last completion"},
        {CONTEXT, 10, "q.bin: question 0 has more tokens than its length says"},
        {CONTEXT, 65535, "q.bin: question 0 has more tokens than its length says"},
        {CONTEXT + 1, 43, "q.bin: question 0 has the token 43, which is not below the vocabulary size 43"},
        {CONTEXT + 4, 0, "q.bin: completion 0 of question 0 has no token to predict"},
        {CONTEXT + 4, 6, "q.bin: question 0 has more tokens than its length says"},
        {CONTEXT + 9, 65535, "q.bin: question 0 has the token 65535, which is not below"},
    };
    add_two_questions();
    assert_int_equal(made.words[SECOND], 65535);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint16_t before = made.words[cases[i].word];
        made.words[cases[i].word] = (uint16_t)cases[i].value;
        assert_refused(43, cases[i].line);
        made.words[cases[i].word] = before;
    }
    assert_refused(42, "q.bin: question 1 has the token 42, which is not below the vocabulary size 42");
    choices_close(open_good(43));
}

static void test_completions_that_predict_nothing(void **state) {
    add_question(0, "1|2|");
    assert_refused(9, "q.bin: completion 1 of question 0 has no token to predict");
    start_file();
    add_question(0, "|2 3|4");
    assert_refused(9, "q.bin: completion 1 of question 0 has no token to predict");
}

static void test_every_other_length_is_refused(void **state) {
    add_two_questions();
    long whole = 2L * made.count;
    for (long bytes = 0; bytes <= whole + 40; bytes++) {
        write_bytes("cut.bin", bytes); /* past the end: zeros */
        ChoiceFile *file = choices_open("cut.bin", 100, made.error, sizeof made.error);
        assert_true((file != NULL) == (bytes == whole));
        choices_close(file);
    }
}

/* Whatever is opened must give rows of tokens below the vocabulary, each with something to predict. */
static void read_all(const ChoiceFile *file, int vocab) {
    enum { T = 3 };
    int tokens[T], targets[T];
    for (int row = 0; row < choices_rows(file); row++) {
        choices_batch(file, row, 1, T, tokens, targets);
        int predicted = 0;
        for (int t = 0; t < T; t++) {
            assert_in_range(tokens[t], 0, vocab - 1);
            assert_true(targets[t] >= -1 && targets[t] < vocab);
            predicted += targets[t] >= 0;
        }
        assert_true(predicted > 0);
    }
}

static void test_any_flipped_bit_is_refused_or_harmless(void **state) {
    add_two_questions();
    for (int bit = 0; bit < 16 * made.count; bit += bit / 32 >= 4 && bit / 16 < HEADER_WORDS ? 97 : 1) {
        made.words[bit / 16] ^= (uint16_t)(1 << bit % 16);
        ChoiceFile *file = open_made(43);
        assert_true(!file || bit / 32 >= 4); /* the four words of the header that mean something */
        if (file) {
            read_all(file, 43);
        }
        choices_close(file);
        made.words[bit / 16] ^= (uint16_t)(1 << bit % 16);
    }
}

static void test_random_words_are_refused_or_harmless(void **state) {
    add_two_questions();
    uint16_t good[64];
    uint32_t random = 1;
    int words = made.count - HEADER_WORDS, opened = 0;
    memcpy(good, made.words + HEADER_WORDS, sizeof good);
    for (int i = 0; i < 4000; i++) {
        for (int change = 0; change <= i % 3; change++) {
            random = random * 1664525 + 1013904223;
            made.words[HEADER_WORDS + (random >> 8) % (uint32_t)words] = (uint16_t)((random >> 20) % 12);
        }
        ChoiceFile *file = open_made(43);
        if (file) {
            read_all(file, 43);
            opened++;
        }
        choices_close(file);
        memcpy(made.words + HEADER_WORDS, good, sizeof good);
    }
    assert_true(opened > 100 && opened < 3900); /* both were tried */
}

/* HellaSwag has 10,042 questions; llm.c writes their index as uint16, so that the 65537th has index 0 again. */
static void test_indices_start_again_after_65536(void **state) {
    for (int i = 0; i < 65538; i++) {
        add_question(0, "1|2");
    }
    ChoiceFile *file = open_good(9);
    assert_int_equal(choices_questions(file), 65538);
    assert_int_equal(choices_rows(file), 65538);
    ROWS(file, 65537, 2, 1, 1, 2, 0, -1);
    choices_close(file);
    made.words[HEADER_WORDS + 65537 * 9 + 2] = 2;
    assert_refused(9, "question 65537 starts with 65535, 18 bytes, index 2, not with 65535, its even length, 1");
}

static void test_paths_that_hold_no_questions(void **state) {
    assert_null(choices_open("missing.bin", 9, made.error, sizeof made.error));
    assert_error_has("cannot open missing.bin: No such file");
    assert_int_equal(mkdir("d", 0700), 0);
    assert_null(choices_open("d", 9, made.error, sizeof made.error));
    assert_error_has("d is not a regular file");
    assert_int_equal(mkfifo("pipe", 0600), 0);
    assert_null(choices_open("pipe", 9, made.error, sizeof made.error));
    assert_error_has("pipe is not a regular file");
    write_bytes("short.bin", 1023);
    assert_null(choices_open("short.bin", 9, made.error, sizeof made.error));
    assert_error_has("short.bin has 1023 bytes, but a file of multiple-choice questions 1024 to");
    if (truncate("short.bin", (off_t)1 << 31) == 0) { /* a file system may not have sparse files */
        assert_null(choices_open("short.bin", 9, made.error, sizeof made.error));
        assert_error_has("short.bin has 2147483648 bytes, but a file of multiple-choice questions 1024 to 2147483647");
    }
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, enter_folder, leave_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_rows_by_hand),
        IN_FOLDER(test_long_rows_lose_their_beginning),
        IN_FOLDER(test_without_a_context_the_first_token_is_not_scored),
        IN_FOLDER(test_scores_by_hand),
        IN_FOLDER(test_ties_go_to_the_first),
        IN_FOLDER(test_nan_is_no_answer),
        IN_FOLDER(test_each_word_that_is_wrong_is_named),
        IN_FOLDER(test_completions_that_predict_nothing),
        IN_FOLDER(test_every_other_length_is_refused),
        IN_FOLDER(test_any_flipped_bit_is_refused_or_harmless),
        IN_FOLDER(test_random_words_are_refused_or_harmless),
        IN_FOLDER(test_indices_start_again_after_65536),
        IN_FOLDER(test_paths_that_hold_no_questions),
    };
    return cmocka_run_group_tests_name("choices", tests, NULL, NULL);
}
