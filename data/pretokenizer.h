/* Cuts text into pieces ("words"); a byte-pair tokenizer merges bytes inside a piece only.
 *
 *     Pretokenizer *p = pretokenizer_open(&PATTERN_GPT2, 1, error, sizeof error);
 *     Scan *scan = scan_open(p);                       // one per thread
 *     scan_text(scan, text, bytes, 0);
 *     while (scan_next(scan, &start, &end)) { ... text[start, end) ... }
 *
 * A pattern is a regular expression of PCRE2 with Unicode properties: each match is a piece, and so is what lies
 * between two matches. Several patterns are applied one after the other, each to the pieces of the one before as if
 * each were a text of its own. \s stands for Unicode's White_Space, as in the tokenizers library. Bytes that are not
 * UTF-8 match nothing: they end up in pieces between matches. Pieces follow each other without gap and cover the text.
 */
#ifndef DATA_PRETOKENIZER_H
#define DATA_PRETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>

enum { PRETOKENIZER_MOST_PATTERNS = 8 };

extern const char *const PATTERN_GPT2; /* of GPT-2, and of Hugging Face's ByteLevel with use_regex */
extern const char *const PATTERN_QWEN2;

typedef struct Pretokenizer Pretokenizer;
typedef struct Scan Scan;

/* count 0: the whole text is one piece. Copies the patterns. NULL with one line in error when one is no valid pattern.
 * */
Pretokenizer *pretokenizer_open(const char *const *patterns, int count, char *error, size_t error_size);
void pretokenizer_close(Pretokenizer *pretokenizer);

int pretokenizer_patterns(const Pretokenizer *pretokenizer);
const char *pretokenizer_pattern(const Pretokenizer *pretokenizer, int i);

/* Whether pieces from a boundary (scan_at_boundary) on depend on nothing before it: two scans that meet at one boundary
 * then agree from there on, and a text can be scanned from several places at once. False with a pattern that looks
 * behind. */
bool pretokenizer_is_local(const Pretokenizer *pretokenizer);

/* Scratch of one thread over a pretokenizer that outlives it. NULL without memory. */
Scan *scan_open(const Pretokenizer *pretokenizer);
void scan_close(Scan *scan);

/* Starts at text[from], a piece boundary, and ends at text[bytes). */
void scan_text(Scan *scan, const char *text, size_t bytes, size_t from);

/* The next piece as text[*start, *end), never empty; false at the end. A pattern that gives up (a hostile one) leaves
 * the rest as one piece. */
bool scan_next(Scan *scan, size_t *start, size_t *end);

/* Whether a scan may start where the piece just given ends: it does not with several patterns inside a piece of the
 * first. */
bool scan_at_boundary(const Scan *scan);

#endif
