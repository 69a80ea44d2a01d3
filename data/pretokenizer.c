/* Text is cut by regular expressions of PCRE2, compiled to machine code where that is possible.
 *
 * Hugging Face's tokenizers match with Oniguruma in Ruby's syntax. Where the two read a pattern differently it is
 * rewritten (\s and \S as Unicode's White_Space, which PCRE2 takes for a little more; \h; ^ and $ at every line), and
 * what has no equal here (nested classes, \S inside a class) is refused.
 *
 * A piece of one pattern is a text of its own for the next, so the patterns are levels: a level asks the one above for
 * a piece when it has come to the end of the last.
 *
 * Called by tokenizer.c and bpe_trainer.c. Read next: tokenizer.c. */
#include "pretokenizer.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

const char *const PATTERN_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char *const PATTERN_QWEN2 =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+";

enum {
    MATCH_LIMIT = 10000000, /* steps of one match: a hostile pattern gives up instead of running for ever */
    HEAP_LIMIT_KB = 65536,
    JIT_STACK = 1 << 20,
    LONGEST_PATTERN = 1 << 16,
};

/* Unicode's White_Space, as it is written inside a class. */
#define WHITE_SPACE \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define HEX_DIGITS "0-9a-fA-F"

struct Pretokenizer {
    int count;
    char *patterns[PRETOKENIZER_MOST_PATTERNS]; /* as given */
    pcre2_code *code[PRETOKENIZER_MOST_PATTERNS];
    bool local;
};

/* Matching one pattern inside text[begin, end): before `at` all is cut. */
typedef struct {
    size_t begin, end, at;
    size_t match_begin, match_end; /* the next match, where there is one at or after `at`; else both `end` */
    bool matched;                  /* match_begin and match_end are known */
    bool after_empty;              /* an empty match stood at `at`: another one there is none */
    pcre2_match_data *match;
} Level;

struct Scan {
    const Pretokenizer *pretokenizer;
    const char *text;
    size_t bytes;
    Level levels[PRETOKENIZER_MOST_PATTERNS];
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- patterns ---- */

/* Rewrites a pattern of Oniguruma's as one of PCRE2's; *local is cleared when it looks at what stands before a match.
 * The result is the caller's; NULL with one line in error. */
static char *rewrite(const char *pattern, bool *local, char *error, size_t error_size) {
    size_t length = strlen(pattern);
    if (length > LONGEST_PATTERN) {
        fail(error, error_size, "a pattern of %zu bytes is too long", length);
        return NULL;
    }
    char *result = malloc(length * (sizeof WHITE_SPACE + 4) + 1), *out = result;
    if (!result) {
        fail(error, error_size, "out of memory for a pattern");
        return NULL;
    }
    const char *problem = NULL;
    bool in_class = false;
    for (const char *p = pattern; *p && !problem; p++) {
        const char *replacement = NULL;
        if (*p == '\\' && p[1]) {
            char letter = *++p;
            bool inverse = letter == 'S' || letter == 'H';
            replacement = letter == 's' || letter == 'S'   ? WHITE_SPACE
                          : letter == 'h' || letter == 'H' ? HEX_DIGITS
                                                           : NULL;
            problem = replacement && inverse && in_class ? "has \\S or \\H inside a class, which is not supported"
                      : letter == 'Q' || letter == 'E'   ? "has \\Q or \\E, which mean nothing to Oniguruma"
                                                         : NULL;
            *local = *local && (in_class || !strchr("bBGKA", letter));
            if (replacement) {
                out += sprintf(out, in_class ? "%s" : inverse ? "[^%s]" : "[%s]", replacement);
            } else {
                *out++ = '\\';
                *out++ = letter;
            }
            continue;
        }
        if (in_class) {
            problem = *p == '[' && p[1] != ':'   ? "has a class inside a class, which is not supported"
                      : *p == '&' && p[1] == '&' ? "has an intersection of classes, which is not supported"
                                                 : NULL;
            if (*p == '[' && !problem) { /* [:alpha:] */
                const char *end = strstr(p, ":]");
                size_t name = end ? (size_t)(end - p) + 2 : 1;
                memcpy(out, p, name);
                out += name;
                p += name - 1;
                continue;
            }
            in_class = *p != ']';
        } else if (*p == '[') {
            in_class = true;
            *out++ = *p;
            if (p[1] == '^') {
                *out++ = *++p;
            }
            if (p[1] == ']') { /* stands for itself */
                *out++ = '\\';
                *out++ = *++p;
            }
            continue;
        } else if (*p == '(' && p[1] == '*') {
            problem = "has (*, a command of PCRE2 that means nothing to Oniguruma";
        } else if (*p == '^' || !strncmp(p, "(?<=", 4) || !strncmp(p, "(?<!", 4)) {
            *local = false;
        }
        *out++ = *p;
    }
    *out = '\0';
    if (problem) {
        fail(error, error_size, "the pattern %.200s %s", pattern, problem);
        free(result);
        return NULL;
    }
    return result;
}

static bool add_pattern(Pretokenizer *p, const char *pattern, char *error, size_t error_size) {
    char *rewritten = rewrite(pattern, &p->local, error, error_size);
    if (!rewritten) {
        return false;
    }
    int code;
    PCRE2_SIZE offset;
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF | PCRE2_MULTILINE;
    pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)rewritten, PCRE2_ZERO_TERMINATED, options, &code, &offset, NULL);
    free(rewritten);
    p->patterns[p->count] = strdup(pattern);
    p->code[p->count++] = compiled;
    if (!compiled) {
        char reason[256];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
        return fail(error, error_size, "the pattern %.200s cannot be used: %s", pattern, reason);
    }
    /* Without machine code each match would check the whole rest of the text for valid UTF-8 anew: then it is scanned
     * once, from its beginning. */
    p->local = pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE) == 0 && p->local;
    return p->patterns[p->count - 1] || fail(error, error_size, "out of memory for a pattern");
}

Pretokenizer *pretokenizer_open(const char *const *patterns, int count, char *error, size_t error_size) {
    Pretokenizer *p = calloc(1, sizeof *p);
    if (!p || count > PRETOKENIZER_MOST_PATTERNS) {
        fail(error, error_size, p ? "%d patterns are too many" : "out of memory for %d patterns", count);
        free(p);
        return NULL;
    }
    p->local = true;
    for (int i = 0; i < count; i++) {
        if (!add_pattern(p, patterns[i], error, error_size)) {
            pretokenizer_close(p);
            return NULL;
        }
    }
    return p;
}

void pretokenizer_close(Pretokenizer *p) {
    for (int i = 0; p && i < p->count; i++) {
        free(p->patterns[i]);
        pcre2_code_free(p->code[i]);
    }
    free(p);
}

int pretokenizer_patterns(const Pretokenizer *p) {
    return p->count;
}

const char *pretokenizer_pattern(const Pretokenizer *p, int i) {
    return p->patterns[i];
}

bool pretokenizer_is_local(const Pretokenizer *p) {
    return p->local && p->count > 0;
}

/* ---- scanning ---- */

Scan *scan_open(const Pretokenizer *pretokenizer) {
    Scan *scan = calloc(1, sizeof *scan);
    if (!scan) {
        return NULL;
    }
    scan->pretokenizer = pretokenizer;
    scan->context = pcre2_match_context_create(NULL);
    scan->stack = pcre2_jit_stack_create(JIT_STACK / 32, JIT_STACK, NULL);
    bool good = scan->context && scan->stack;
    for (int i = 0; i < pretokenizer->count && good; i++) {
        scan->levels[i].match = pcre2_match_data_create(1, NULL); /* the groups are of no interest */
        good = scan->levels[i].match;
    }
    if (!good) {
        scan_close(scan);
        return NULL;
    }
    pcre2_set_match_limit(scan->context, MATCH_LIMIT);
    pcre2_set_heap_limit(scan->context, HEAP_LIMIT_KB);
    pcre2_jit_stack_assign(scan->context, NULL, scan->stack);
    return scan;
}

void scan_close(Scan *scan) {
    if (!scan) {
        return;
    }
    for (int i = 0; i < PRETOKENIZER_MOST_PATTERNS; i++) {
        pcre2_match_data_free(scan->levels[i].match);
    }
    pcre2_match_context_free(scan->context);
    pcre2_jit_stack_free(scan->stack);
    free(scan);
}

/* The level's text becomes text[begin, end), cut up to `at`. */
static void level_start(Level *level, size_t begin, size_t end, size_t at) {
    pcre2_match_data *match = level->match;
    *level = (Level){.begin = begin, .end = end, .at = at, .match = match};
}

void scan_text(Scan *scan, const char *text, size_t bytes, size_t from) {
    scan->text = text;
    scan->bytes = bytes;
    for (int i = 0; i < PRETOKENIZER_MOST_PATTERNS; i++) {
        level_start(&scan->levels[i], 0, 0, 0);
    }
    level_start(&scan->levels[0], 0, bytes, from);
}

/* Looks for the next match from level->at on; none, and a pattern that gives up, are a match behind the end. */
static void find_match(Scan *scan, int i) {
    Level *level = &scan->levels[i];
    const char *subject = scan->text + level->begin;
    uint32_t options = level->after_empty ? PCRE2_NOTEMPTY_ATSTART : 0;
    int found = pcre2_match(scan->pretokenizer->code[i], (PCRE2_SPTR)subject, level->end - level->begin,
                            level->at - level->begin, options, level->match, scan->context);
    const PCRE2_SIZE *place = pcre2_get_ovector_pointer(level->match);
    /* \K may put the start behind the end, or before `at` */
    bool usable = found >= 0 && place[0] <= place[1] && level->begin + place[0] >= level->at;
    level->match_begin = usable ? level->begin + place[0] : level->end;
    level->match_end = usable ? level->begin + place[1] : level->end;
    level->matched = true;
}

/* The level's next piece, which lies inside its text. */
static void next_piece(Scan *scan, int i, size_t *start, size_t *end) {
    Level *level = &scan->levels[i];
    if (!level->matched) {
        find_match(scan, i);
        if (level->match_begin == level->at && level->match_end == level->at) { /* cuts here, where a cut is */
            level->after_empty = true;
            find_match(scan, i);
            level->match_end = level->match_end > level->at ? level->match_end : level->end; /* \K may do anything */
        }
    }
    bool gap = level->match_begin > level->at;
    *start = level->at;
    *end = gap ? level->match_begin : level->match_end;
    level->at = *end;
    level->after_empty = gap && level->match_end == level->match_begin;
    level->matched = gap && level->match_end > level->match_begin;
}

bool scan_next(Scan *scan, size_t *start, size_t *end) {
    Level *levels = scan->levels;
    int count = scan->pretokenizer->count, i = count - 1;
    if (count == 0) {
        *start = levels[0].at;
        *end = levels[0].at = levels[0].end;
        return *start < *end;
    }
    while (i > 0 && levels[i].at == levels[i].end) {
        i--;
    }
    if (levels[i].at == levels[i].end) {
        return false;
    }
    for (; i < count; i++) {
        next_piece(scan, i, start, end);
        if (i + 1 < count) {
            level_start(&levels[i + 1], *start, *end, *start);
        }
    }
    return true;
}

bool scan_at_boundary(const Scan *scan) {
    for (int i = 1; i < scan->pretokenizer->count; i++) {
        if (scan->levels[i].at < scan->levels[i].end) {
            return false;
        }
    }
    return true;
}
