/* Text is cut by regular expressions of PCRE2, compiled to machine code where that is possible.
 *
 * Hugging Face's tokenizers match with Oniguruma in Ruby's syntax. What means the same in PCRE2 is taken as it is;
 * \s, \w, \h, \v and names of scripts, which mean something else, are rewritten; all else is refused by name rather
 * than matched in another way. How matches follow each other is theirs, too: after an empty one the search goes on
 * behind the next character.
 *
 * A piece of one pattern is a text of its own for the next, so the patterns are levels: a level asks the one above for
 * a piece when it has come to the end of the last.
 *
 * Called by tokenizer_json.c, tokenizer_encode.c and bpe_trainer.c. Read next: tokenizer_encode.c. */
#include "pretokenizer.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

const char *const PATTERN_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char *const PATTERN_QWEN2 =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+";

enum {
    MATCH_LIMIT = 10000000, /* steps of one match: a hostile pattern gives up instead of running for ever */
    HEAP_LIMIT_KB = 65536,
    JIT_STACK = 1 << 24,
    LONGEST_PATTERN = 1 << 16,
};

/* Sets as they are written inside a class. They end in a range, so that a hyphen after one stands for itself. */
#define WHITE_SPACE \
    "\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}\\x{9}-\\x{d}"
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}0-9"        /* of UTS 18; PCRE2's lacks marks and has other numbers */
#define LATIN_NUMBERS "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}" /* Oniguruma's \w has them, but not in a class */
#define HEX_DIGITS "0-9a-fA-F"

struct Pretokenizer {
    int count;
    char *patterns[PRETOKENIZER_MOST_PATTERNS]; /* as given */
    pcre2_code *code[PRETOKENIZER_MOST_PATTERNS];
    bool machine_code; /* all patterns are compiled to it */
    bool local;
};

/* Matching one pattern inside text[begin, end): before `at` all is cut. */
typedef struct {
    size_t begin, end, at;
    size_t match_begin, match_end; /* the next match at or after `at`; both `end`: there is none */
    bool matched;                  /* match_begin and match_end are known */
    pcre2_match_data *match;
} Level;

struct Scan {
    const Pretokenizer *pretokenizer;
    const char *text;
    size_t bytes;
    bool valid; /* known to be UTF-8 */
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

/* A pattern of Oniguruma's on its way to one of PCRE2's. */
typedef struct {
    const char *pattern, *in; /* `in`: what is read next */
    char *out;                /* where the result goes on */
    const char *problem;      /* why it cannot be used; NULL: it can */
    bool in_class;
    bool local; /* looks at nothing before a match */
} Rewriter;

static void copy(Rewriter *r, size_t bytes) {
    memcpy(r->out, r->in, bytes);
    r->out += bytes;
    r->in += bytes;
}

static void write_set(Rewriter *r, const char *set, bool inverse) {
    r->problem = inverse && r->in_class ? "has \\S, \\W or \\H inside a class" : NULL;
    r->out += sprintf(r->out, r->in_class ? "%s" : inverse ? "[^%s]" : "[%s]", set);
}

/* \p{Han} is of the characters of that script; to PCRE2 also of those that are used with it, unless it says "sc:". */
static void rewrite_property(Rewriter *r) {
    char test[64];
    const char *name = r->in + 3, *end = strchr(r->in, '}');
    if (r->in[2] != '{' || !end || end - name > 40) {
        r->problem = "has \\p or \\P without a name in braces";
        return;
    }
    name += *name == '^';
    int code, length = (int)(end - name);
    PCRE2_SIZE offset;
    snprintf(test, sizeof test, "\\p{sc:%.*s}", length, name);
    pcre2_code *script = pcre2_compile((PCRE2_SPTR)test, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &code, &offset, NULL);
    copy(r, (size_t)(name - r->in));
    r->out += sprintf(r->out, "%s", script ? "sc:" : "");
    copy(r, (size_t)length + 1);
    pcre2_code_free(script);
}

static void rewrite_escape(Rewriter *r) {
    unsigned char letter = (unsigned char)r->in[1];
    bool is_letter = (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z');
    if (letter == 'p' || letter == 'P') {
        rewrite_property(r);
    } else if (strchr("sSwWhH", letter) && letter) {
        bool inverse = letter < 'a';
        letter |= 'a' - 'A';
        write_set(r,
                  letter == 's'   ? WHITE_SPACE
                  : letter == 'w' ? (r->in_class ? WORD : WORD LATIN_NUMBERS)
                                  : HEX_DIGITS,
                  inverse);
        r->in += 2;
    } else if (letter == 'x') {
        size_t digits = strspn(r->in + 2, "0123456789abcdefABCDEF");
        bool code_point = r->in[2] == '{' || digits == 1 || (digits > 1 && r->in[2] <= '7');
        r->problem = code_point ? NULL : "has a byte (\\x) above 7F";
        copy(r, r->in[2] == '{' ? 3 + strcspn(r->in + 3, "}") : 2);
    } else if (letter == 'v') {
        r->out += sprintf(r->out, "\\x{b}");
        r->in += 2;
    } else if (is_letter ? !strchr("dDntrfeaAzZ", letter) : letter >= '0' && letter <= '9') {
        r->problem =
            "has an escape that is not supported: of a letter only \\s \\S \\w \\W \\d \\D \\h \\H \\p \\P \\x \\n "
            "\\t \\r \\f \\v \\e \\a \\A \\z \\Z are";
    } else {
        r->local = r->local && letter != 'A';
        copy(r, letter ? 2 : 1);
    }
}

static void rewrite_in_class(Rewriter *r) {
    if (r->in[0] == '[') {
        bool space = !strncmp(r->in, "[:space:]", 9);
        if (!space && strncmp(r->in, "[:digit:]", 9) != 0) {
            r->problem = "has a class inside a class";
        } else if (space) {
            write_set(r, WHITE_SPACE, false);
            r->in += 9;
        } else {
            copy(r, 9);
        }
    } else if (r->in[0] == '&' && r->in[1] == '&') {
        r->problem = "has an intersection of classes";
    } else {
        r->in_class = r->in[0] != ']';
        copy(r, 1);
    }
}

/* What begins with '('. */
static void rewrite_group(Rewriter *r) {
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:", "(?-i:"};
    size_t length = r->in[1] != '?' && r->in[1] != '*' ? 1 : 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        length = strncmp(r->in, known[i], strlen(known[i])) ? length : strlen(known[i]);
    }
    if (r->in == r->pattern && !strncmp(r->in, "(?i)", 4)) { /* further on it would reach less far in Oniguruma */
        length = 4;
    }
    r->problem = length ? NULL : "has a group that is not supported: only ( (?: (?= (?! (?> (?<= (?<! (?i: (?-i: are";
    r->local = r->local && strncmp(r->in, "(?<", 3) != 0;
    copy(r, length);
}

/* What begins with '{'. */
static void rewrite_interval(Rewriter *r) {
    size_t digits = strspn(r->in + 1, "0123456789"), comma = r->in[1 + digits] == ',';
    size_t length = 1 + digits + comma + (comma ? strspn(r->in + 2 + digits, "0123456789") : 0);
    if (length > 1 && r->in[length] == '}') {
        char next = r->in[length + 1];
        r->problem = digits == 0                              ? "has an interval without a first number"
                     : next == '+' || (!comma && next == '?') ? "has {n}+ or {n}?, in which others see another meaning"
                                                              : NULL;
    }
    copy(r, 1);
}

/* As a pattern of PCRE2's, the caller's; NULL with one line in error. *local is cleared when it looks at what stands
 * before a match. */
static char *rewrite(const char *pattern, bool *local, char *error, size_t error_size) {
    size_t length = strlen(pattern);
    if (length > LONGEST_PATTERN) {
        fail(error, error_size, "a pattern of %zu bytes is too long", length);
        return NULL;
    }
    char *result = malloc(length * (sizeof WHITE_SPACE + 4) + 1); /* no character grows to more */
    if (!result) {
        fail(error, error_size, "out of memory for a pattern");
        return NULL;
    }
    Rewriter r = {.pattern = pattern, .in = pattern, .out = result, .local = true};
    while (*r.in && !r.problem) {
        if (*r.in == '\\') {
            rewrite_escape(&r);
        } else if (r.in_class) {
            rewrite_in_class(&r);
        } else if (*r.in == '[') {
            r.in_class = true;
            copy(&r, r.in[1] == '^' ? 2 : 1);
            if (*r.in == ']') { /* the first one stands for itself */
                *r.out++ = '\\';
                copy(&r, 1);
            }
        } else if (*r.in == '(') {
            rewrite_group(&r);
        } else if (*r.in == '{') {
            rewrite_interval(&r);
        } else {
            r.local = r.local && *r.in != '^';
            copy(&r, 1);
        }
    }
    *r.out = '\0';
    if (r.problem) {
        fail(error, error_size, "the pattern %.200s %s", pattern, r.problem);
        free(result);
        return NULL;
    }
    *local = *local && r.local;
    return result;
}

static bool add_pattern(Pretokenizer *p, const char *pattern, char *error, size_t error_size) {
    char *rewritten = rewrite(pattern, &p->local, error, error_size);
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!rewritten || !context) {
        pcre2_compile_context_free(context);
        free(rewritten);
        return !rewritten ? false : fail(error, error_size, "out of memory for a pattern");
    }
    int code;
    PCRE2_SIZE offset;
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF | PCRE2_MULTILINE; /* Ruby's ^ and $ */
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)rewritten, PCRE2_ZERO_TERMINATED, options, &code, &offset, context);
    pcre2_compile_context_free(context);
    free(rewritten);
    p->patterns[p->count] = strdup(pattern);
    p->code[p->count++] = compiled;
    if (!compiled) {
        char reason[256];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
        return fail(error, error_size, "the pattern %.200s cannot be used: %s", pattern, reason);
    }
    p->machine_code = pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE) == 0 && p->machine_code;
    return p->patterns[p->count - 1] || fail(error, error_size, "out of memory for a pattern");
}

Pretokenizer *pretokenizer_open(const char *const *patterns, int count, char *error, size_t error_size) {
    Pretokenizer *p = calloc(1, sizeof *p);
    if (!p || count > PRETOKENIZER_MOST_PATTERNS) {
        fail(error, error_size, p ? "%d patterns are too many" : "out of memory for %d patterns", count);
        free(p);
        return NULL;
    }
    p->local = p->machine_code = true;
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

/* Without machine code scan_text looks through the whole text: that should happen once. */
bool pretokenizer_is_local(const Pretokenizer *p) {
    return p->local && p->machine_code && p->count > 0;
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

static bool is_utf8(const char *text, size_t bytes) {
    utf8proc_int32_t character;
    for (size_t at = 0; at < bytes;) {
        utf8proc_ssize_t used =
            utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(bytes - at), &character);
        if (used <= 0) {
            return false;
        }
        at += (size_t)used;
    }
    return true;
}

/* The level's text becomes text[begin, end), cut up to `at`. */
static void level_start(Level *level, size_t begin, size_t end, size_t at) {
    pcre2_match_data *match = level->match;
    *level = (Level){.begin = begin, .end = end, .at = at, .match = match};
}

void scan_text(Scan *scan, const char *text, size_t bytes, size_t from) {
    scan->text = text;
    scan->bytes = bytes;
    scan->valid = !scan->pretokenizer->machine_code && is_utf8(text, from) && is_utf8(text + from, bytes - from);
    for (int i = 0; i < PRETOKENIZER_MOST_PATTERNS; i++) {
        level_start(&scan->levels[i], 0, 0, 0);
    }
    level_start(&scan->levels[0], 0, bytes, from);
}

/* The first match in the level's text from `from` on; a pattern that gives up has none. Machine code takes invalid
 * UTF-8 as it comes; without it PCRE2 checks the rest of the text before each match, unless it is known to be valid. */
static void find_match(Scan *scan, int i, size_t from) {
    Level *level = &scan->levels[i];
    const pcre2_code *code = scan->pretokenizer->code[i];
    PCRE2_SPTR subject = (PCRE2_SPTR)scan->text + level->begin;
    PCRE2_SIZE length = level->end - level->begin, start = from - level->begin;
    int found = scan->pretokenizer->machine_code
                    ? pcre2_jit_match(code, subject, length, start, 0, level->match, scan->context)
                    : pcre2_match(code, subject, length, start, scan->valid ? PCRE2_NO_UTF_CHECK : 0, level->match,
                                  scan->context);
    const PCRE2_SIZE *place = pcre2_get_ovector_pointer(level->match);
    level->match_begin = found >= 0 ? level->begin + place[0] : level->end;
    level->match_end = found >= 0 ? level->begin + place[1] : level->end;
    level->matched = true;
}

/* Where the character at `at` ends, or the invalid bytes there. */
static size_t after_character(const char *text, size_t at, size_t end) {
    do {
        at++;
    } while (at < end && ((unsigned char)text[at] & 0xC0) == 0x80);
    return at;
}

/* The level's next piece, which lies inside its text. */
static void next_piece(Scan *scan, int i, size_t *start, size_t *end) {
    Level *level = &scan->levels[i];
    if (!level->matched) {
        find_match(scan, i, level->at);
        if (level->match_end == level->at) { /* an empty match, which cuts where a cut is */
            find_match(scan, i, after_character(scan->text, level->at, level->end));
        }
    }
    bool gap = level->match_begin > level->at;
    *start = level->at;
    *end = gap ? level->match_begin : level->match_end;
    level->at = *end;
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
