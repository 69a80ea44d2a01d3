/* How text is cut: GPT-2's and Qwen2's patterns, Unicode's white space, bytes that are no UTF-8, several patterns, and
 * patterns that are wrong or hostile.
 *
 * A case lists the pieces; the text is what they make together. Read next: data/pretokenizer.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../data/pretokenizer.h"
#include "../kernels/random.h"

enum { MOST_PIECES = 24, MOST_TEXT = 512 };

#define NO_BREAK "\xc2\xa0"
#define NEXT_LINE "\xc2\x85"
#define LINE_SEPARATOR "\xe2\x80\xa8"
#define IDEOGRAPHIC_SPACE "\xe3\x80\x80"
#define VOWEL_SEPARATOR "\xe1\xa0\x8e" /* U+180E: white space no longer */
#define ZERO_WIDTH_SPACE "\xe2\x80\x8b"
#define ZERO_WIDTH_JOINER "\xe2\x80\x8d"
#define BYTE_ORDER_MARK "\xef\xbb\xbf"
#define ACUTE "\xcc\x81" /* combining */
#define SUPERSCRIPT_TWO "\xc2\xb2"
#define WOMAN "\xf0\x9f\x91\xa9"

static char error[512];

static Pretokenizer *open_patterns(const char *const *patterns, int count) {
    Pretokenizer *p = pretokenizer_open(patterns, count, error, sizeof error);
    if (!p) {
        fail_msg("%s", error);
    }
    return p;
}

static Scan *open_scan(const Pretokenizer *p) {
    Scan *scan = scan_open(p);
    assert_non_null(scan);
    return scan;
}

static void fail_at(const char *text, size_t bytes, size_t start, size_t end, const char *what) {
    char shown[4 * MOST_TEXT + 1], *out = shown;
    for (size_t i = 0; i < bytes && i < MOST_TEXT; i++) {
        unsigned char c = (unsigned char)text[i];
        out += sprintf(out, c >= ' ' && c < 127 ? "%c" : "\\x%02x", c);
    }
    *out = '\0';
    fail_msg("\"%s\": %s: got the piece [%zu, %zu)", shown, what, start, end);
}

static void assert_cut(const char *const *patterns, int count, const char *const *pieces) {
    Pretokenizer *p = open_patterns(patterns, count);
    Scan *scan = open_scan(p);
    char text[MOST_TEXT] = "";
    for (int i = 0; pieces[i]; i++) {
        assert_true(strlen(text) + strlen(pieces[i]) < sizeof text);
        strcat(text, pieces[i]);
    }
    size_t start = 0, end = 0, at = 0;
    scan_text(scan, text, strlen(text), 0);
    for (int i = 0; pieces[i]; i++) {
        size_t length = strlen(pieces[i]);
        if (!scan_next(scan, &start, &end) || start != at || end != at + length) {
            fail_at(text, strlen(text), start, end, pieces[i]);
        }
        at = end;
    }
    assert_false(scan_next(scan, &start, &end));
    scan_close(scan);
    pretokenizer_close(p);
}

typedef struct {
    const char *pieces[MOST_PIECES];
} Case;

static void assert_cases(const char *pattern, const Case *cases, size_t count) {
    for (size_t i = 0; i < count; i++) {
        assert_cut(&pattern, 1, cases[i].pieces);
    }
}

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* ---- the two patterns that have names ---- */

static void test_gpt2(void **state) {
    static const Case cases[] = {
        {{"Hello", ",", " world", "!"}},
        {{"I", "'m", " sure", " it", "'s", " theirs", ";", " we", "'ll", " they", "'ve", " you", "'re", " I", "'d"}},
        {{"IT", "'", "S"}},
        {{"a", "  ", " b"}},
        {{"a", "   "}},
        {{"  ", " a"}},
        {{"a", "\n", "\n", "b"}},
        {{"a", "\r", "\n", "b"}},
        {{"a", "\r\n"}},
        {{"x", " \t", " y"}},
        {{"abc", "123", " 45", "def"}},
        {{"x", SUPERSCRIPT_TWO, "=", "4"}},
        {{"e", ACUTE, "e", ACUTE}},
        {{"\xe6\x97\xa5\xe6\x9c\xac", " \xe8\xaa\x9e", "\xe3\x80\x82"}},
        {{"\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d", " \xd7\xa2\xd7\x95\xd7\x9c\xd7\x9d"}},
        {{WOMAN ZERO_WIDTH_JOINER WOMAN, " " WOMAN}},
        {{BYTE_ORDER_MARK, "a"}},
        {{"a", NO_BREAK, "b"}},
        {{"..", NEXT_LINE, ".."}},
        {{"..", LINE_SEPARATOR, ".."}},
        {{"..", IDEOGRAPHIC_SPACE, ".."}},
        {{".." VOWEL_SEPARATOR ".."}},
        {{" " VOWEL_SEPARATOR, "a"}},
        {{".." ZERO_WIDTH_SPACE ".."}},
    };
    assert_cases(PATTERN_GPT2, cases, COUNT_OF(cases));
}

static void test_qwen2(void **state) {
    static const Case cases[] = {
        {{"Hello", ",", " world", "!"}},
        {{"I", "'M", " IT", "'s", " we", "'Ll"}},
        {{"it", "'\xc5\xbf"}}, /* the long s, which is an s in another case */
        {{"a", "1", "2", "3", " ", "4"}},
        {{"(foo", ")", "\tbar", "_baz"}},
        {{"a", "\n\n", " b"}},
        {{"hi", "!\r\n", "yo"}},
        {{"  \n", " x"}},
        {{"a", "  ", " b", "  "}},
        {{"x", " =", " ", "1", "\n"}},
        {{"e", ACUTE "e", ACUTE}},
        {{NO_BREAK "a", NEXT_LINE "b", VOWEL_SEPARATOR "c"}},
        {{" " VOWEL_SEPARATOR}},
    };
    assert_cases(PATTERN_QWEN2, cases, COUNT_OF(cases));
}

/* ---- what a pattern may hold ---- */

static void test_white_space(void **state) {
    static const struct {
        const char *pattern;
        Case wanted;
    } cases[] = {
        {"\\s+", {{"a", " \t\n\x0b\x0c\r" NO_BREAK NEXT_LINE LINE_SEPARATOR IDEOGRAPHIC_SPACE, VOWEL_SEPARATOR}}},
        {"\\S+", {{"a" VOWEL_SEPARATOR, " " NEXT_LINE, ZERO_WIDTH_SPACE}}},
        {"[\\s]+", {{"a" VOWEL_SEPARATOR, NEXT_LINE " ", "b"}}},
        {"[^\\s]+", {{"a" VOWEL_SEPARATOR, NEXT_LINE " ", "b"}}},
        {"[^x\\s-]+", {{"a" VOWEL_SEPARATOR, "x- -", "b"}}},
        {"[\\]\\s]+", {{"a", "] ]", "b"}}},
        {"\\\\s+", {{" a", "\\sss", " "}}},    /* a backslash and then letters s */
        {"[\\\\s]+", {{" a", "\\s\\s", " "}}}, /* the same in a class */
        {"\\[\\s\\]", {{"[", "[ ]", "]"}}},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        assert_cut(&cases[i].pattern, 1, cases[i].wanted.pieces);
    }
}

static void test_gaps(void **state) {
    static const struct {
        const char *pattern;
        Case wanted;
    } cases[] = {
        {"[0-9]+", {{"ab", "12", "cd", "3"}}},
        {"b(?=c)", {{"ab", "b", "ca"}}},
        {"x*", {{"a", "xx", "b", "c"}}},
        {"", {{"a", "\xc3\xa9", "b"}}}, /* an empty match cuts, too */
        {"nothing", {{"abc"}}},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        assert_cut(&cases[i].pattern, 1, cases[i].wanted.pieces);
    }
    const char *const none[] = {NULL}, *const whole[] = {"a b 12\n\n\xff", NULL};
    assert_cut(NULL, 0, none);
    assert_cut(NULL, 0, whole);
    assert_cut(&PATTERN_GPT2, 1, none);
}

/* Each pattern sees the pieces of the one before as texts of their own, also when it looks ahead. */
static void test_several_patterns(void **state) {
    const char *const digits[] = {"\\p{N}", PATTERN_GPT2}, *const threes[] = {"\\p{N}{1,3}", "[b-d]+", PATTERN_GPT2};
    const char *const ahead[] = {"!", "a(?!!)|b"};
    static const Case of_digits[] = {
        {{"ab", "1", "2", " ", "3", "4", " c"}}, {{"  ", "1"}}, {{"it", "'s", " ", "7", "'s"}}};
    static const Case of_threes[] = {{{"123", "45", " a", "bcd", "e", "  ", "678", "9"}}, {{"!", "\n", "1", "\n"}}};
    static const Case of_ahead[] = {{{"a", "!", "a", "b", "xy", "a"}}};
    for (size_t i = 0; i < COUNT_OF(of_digits); i++) {
        assert_cut(digits, 2, of_digits[i].pieces);
    }
    for (size_t i = 0; i < COUNT_OF(of_threes); i++) {
        assert_cut(threes, 3, of_threes[i].pieces);
    }
    assert_cut(ahead, 2, of_ahead[0].pieces);
    const char *const behind[] = {"!", "(?<=!)a"};
    static const Case of_behind = {{"x", "!", "axa"}};
    assert_cut(behind, 2, of_behind.pieces);
}

/* ---- bytes that are no UTF-8 ---- */

static void test_invalid_utf8(void **state) {
    static const Case cases[] = {
        {{"a", "\xff", " b"}},
        {{"a", "\x80\x80", "b"}},             /* continuations alone */
        {{"a", "\xc3", "b"}},                 /* cut short, in the middle */
        {{"a", "\xe6\x97"}},                  /* and at the end */
        {{"a", "\xf0\x9f\x98", "\xc3\xa9"}},  /* and before a character */
        {{".", "\xc0\xaf", "."}},             /* '/' in two bytes */
        {{".", "\xe0\x80\xaf", "."}},         /* in three */
        {{".", "\xed\xa0\x80", "."}},         /* a surrogate */
        {{".", "\xf4\x90\x80\x80", "."}},     /* above U+10FFFF */
        {{".", "\xf8\x88\x80\x80\x80", "."}}, /* five bytes */
        {{"  ", "\xff", " ", " a"}},          /* blanks before it are not before a word */
        {{"\xff"}},
        {{"'", "\xff", "s", "'s"}},
    };
    assert_cases(PATTERN_GPT2, cases, COUNT_OF(cases));
}

/* Random texts, NUL among the characters: pieces follow each other without gap and cover the text; and where the
 * pattern is local, a scan that starts at a boundary gives the pieces that follow it. */
static void assert_tail(Scan *scan, const char *text, size_t bytes, const size_t *ends, const bool *boundary, int count,
                        int first) {
    size_t start, end;
    scan_text(scan, text, bytes, ends[first]);
    for (int i = first + 1; i < count; i++) {
        if (!scan_next(scan, &start, &end) || start != ends[i - 1] || end != ends[i] ||
            scan_at_boundary(scan) != boundary[i]) {
            fail_at(text, bytes, start, end, "another piece than the scan of the whole text gave");
        }
    }
    assert_false(scan_next(scan, &start, &end));
}

static void test_random_texts(void **state) {
    static const char *const parts[] = {"a",  "b",        " ",     "  ",          "\n",   "\r\n",  "7",
                                        "'s", "'",        "!",     "\xc3\xa9",    ACUTE,  WOMAN,   NEXT_LINE,
                                        "",   NO_BREAK,   "\xff",  "\xe6\x97",    "\x80", "words", ZERO_WIDTH_JOINER,
                                        "1",  "\xd9\xa3", "\xc2x", "\xed\xa0\x80"};
    const char *const lists[4][2] = {{PATTERN_GPT2}, {PATTERN_QWEN2}, {"\\p{N}", PATTERN_GPT2}, {"\\s+", "x*"}};
    const int counts[4] = {1, 1, 2, 2};
    uint64_t key = random_key(1, RANDOM_TEST, 0), draw = 0;
    for (int list = 0; list < 4; list++) {
        Pretokenizer *p = open_patterns(lists[list], counts[list]);
        Scan *scan = open_scan(p), *other = open_scan(p);
        for (int round = 0; round < 200; round++) {
            char text[MOST_TEXT];
            size_t bytes = 0, ends[MOST_TEXT + 1] = {0}, start, end;
            bool boundary[MOST_TEXT + 1] = {true};
            int count = 1, wanted = (int)random_below(key, draw++, 30);
            for (int i = 0; i < wanted; i++) {
                const char *part = parts[random_below(key, draw++, COUNT_OF(parts))];
                size_t length = *part ? strlen(part) : 1; /* "" stands for NUL */
                memcpy(text + bytes, part, length);
                bytes += length;
            }
            scan_text(scan, text, bytes, 0);
            while (scan_next(scan, &start, &end)) {
                if (start != ends[count - 1] || end <= start || end > bytes) {
                    fail_at(text, bytes, start, end, "a gap, or an empty piece");
                }
                boundary[count] = scan_at_boundary(scan);
                ends[count++] = end;
            }
            assert_int_equal(ends[count - 1], bytes);
            assert_true(boundary[count - 1]);
            for (int i = 0; i < count && pretokenizer_is_local(p); i++) {
                if (boundary[i]) {
                    assert_tail(other, text, bytes, ends, boundary, count, i);
                }
            }
        }
        scan_close(scan);
        scan_close(other);
        pretokenizer_close(p);
    }
}

static void test_long_runs(void **state) {
    enum { RUN = 400000 };
    static char text[RUN + 2];
    Pretokenizer *p = open_patterns(&PATTERN_QWEN2, 1);
    Scan *scan = open_scan(p);
    size_t start, end;
    for (const char *letter = "a \n!"; *letter; letter++) {
        memset(text, *letter, RUN);
        text[RUN] = 'b';
        scan_text(scan, text, RUN + 1, 0);
        assert_true(scan_next(scan, &start, &end));
        assert_int_equal(end, *letter == 'a' ? RUN + 1 : *letter == '\n' ? RUN : *letter == ' ' ? RUN - 1 : RUN);
    }
    scan_close(scan);
    pretokenizer_close(p);
}

/* ---- patterns as such ---- */

static void test_local(void **state) {
    static const struct {
        const char *pattern;
        bool local;
    } cases[] = {{"\\p{L}+(?=a)", true}, {"[^^]", true}, {"(?<=a)b", false}, {"(?<!a)b", false}, {"^a", false}};
    Pretokenizer *gpt2 = open_patterns(&PATTERN_GPT2, 1), *qwen2 = open_patterns(&PATTERN_QWEN2, 1);
    bool compiled = pretokenizer_is_local(gpt2); /* without machine code nothing is */
    assert_int_equal(pretokenizer_is_local(qwen2), compiled);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        Pretokenizer *p = open_patterns(&cases[i].pattern, 1);
        if (pretokenizer_is_local(p) != (cases[i].local && compiled)) {
            fail_msg("%s: local is %d", cases[i].pattern, !cases[i].local);
        }
        pretokenizer_close(p);
    }
    pretokenizer_close(gpt2);
    pretokenizer_close(qwen2);
}

static void test_patterns_are_kept(void **state) {
    char first[] = "\\s+", second[] = "a";
    const char *const patterns[] = {first, second};
    Pretokenizer *p = open_patterns(patterns, 2);
    first[0] = second[0] = 'x';
    assert_int_equal(pretokenizer_patterns(p), 2);
    assert_string_equal(pretokenizer_pattern(p, 0), "\\s+");
    assert_string_equal(pretokenizer_pattern(p, 1), "a");
    pretokenizer_close(p);
    pretokenizer_close(NULL);
    scan_close(NULL);
}

static void test_refusals(void **state) {
    static const char *const wrong[] = {"(",      "a)",      "[a",   "*",      "(?",     "\\",         "\xff",
                                        "a{2,1}", "\\p{Xy}", "\\Qa", "(*UCP)", "[a[b]]", "[a-z&&[^b]]"};
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        error[0] = '\0';
        Pretokenizer *p = pretokenizer_open(&wrong[i], 1, error, sizeof error);
        if (p || !error[0] || strchr(error, '\n')) {
            fail_msg("the pattern %s was not refused with one line: '%s'", wrong[i], error);
        }
    }
    const char *many[PRETOKENIZER_MOST_PATTERNS + 1];
    for (int i = 0; i <= PRETOKENIZER_MOST_PATTERNS; i++) {
        many[i] = "a";
    }
    assert_null(pretokenizer_open(many, PRETOKENIZER_MOST_PATTERNS + 1, error, sizeof error));
    pretokenizer_close(open_patterns(many, PRETOKENIZER_MOST_PATTERNS));
}

/* 2^60 ways to match the letters, none of which leads on to the b: the pattern gives up. */
static void test_hostile_pattern(void **state) {
    const char *pattern = "\\d|(?:a+)+b";
    char text[80] = "1";
    memset(text + 1, 'a', 60);
    strcat(text, "!b2");
    Pretokenizer *p = open_patterns(&pattern, 1);
    Scan *scan = open_scan(p);
    size_t start, end;
    scan_text(scan, text, strlen(text), 0);
    assert_true(scan_next(scan, &start, &end) && start == 0 && end == 1);
    assert_true(scan_next(scan, &start, &end) && start == 1 && end == strlen(text));
    assert_false(scan_next(scan, &start, &end));
    scan_close(scan);
    pretokenizer_close(p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_qwen2),
        cmocka_unit_test(test_white_space),
        cmocka_unit_test(test_gaps),
        cmocka_unit_test(test_several_patterns),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_random_texts),
        cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_local),
        cmocka_unit_test(test_patterns_are_kept),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_hostile_pattern),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
