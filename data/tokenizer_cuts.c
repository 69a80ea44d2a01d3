/* Reads how a text is prepared and cut: the normalizer, pre_tokenizer and decoder of a tokenizer.json.
 *
 *     ByteLevel                       cuts by GPT-2's pattern unless use_regex is false, and writes bytes as characters
 *     Split by a Regex or a String    one more pattern
 *     Digits                          \p{N}, one or several
 *     Sequence of these               their patterns one after the other; ByteLevel is last
 *
 * Called by tokenizer_json.c. Read next: pretokenizer.h. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "tokenizer_reader.h"

static bool read_normalizer(Reader *r, const cJSON *normalizer) {
    const cJSON *list = member(normalizer, "normalizers");
    if (normalizer && !strcmp(type_of(normalizer), "Sequence") && cJSON_GetArraySize(list) <= 1) {
        normalizer = cJSON_GetArrayItem(list, 0);
    }
    if (normalizer && strcmp(type_of(normalizer), "NFC") != 0) {
        return reader_fail(r, "its normalizer is '%.40s', but only NFC is known", type_of(normalizer));
    }
    r->t->nfc = normalizer;
    return true;
}

static bool add_pattern(Reader *r, const char *pattern) {
    if (r->pattern_count == PRETOKENIZER_MOST_PATTERNS) {
        return reader_fail(r, "its pre_tokenizer has more than %d patterns", PRETOKENIZER_MOST_PATTERNS);
    }
    r->patterns[r->pattern_count] = strdup(pattern);
    return r->patterns[r->pattern_count++] || reader_no_memory(r);
}

/* A text as the pattern that matches it alone. */
static bool add_literal(Reader *r, const char *text) {
    char *quoted = malloc(2 * strlen(text) + 1), *out = quoted;
    if (!quoted) {
        return reader_no_memory(r);
    }
    for (; *text; text++) {
        if ((unsigned char)*text < 0x80 &&
            !strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_", *text)) {
            *out++ = '\\';
        }
        *out++ = *text;
    }
    *out = '\0';
    bool added = add_pattern(r, quoted);
    free(quoted);
    return added;
}

static bool read_split(Reader *r, const cJSON *split) {
    const cJSON *pattern = member(split, "pattern");
    const char *regex = cJSON_GetStringValue(member(pattern, "Regex"));
    const char *text = cJSON_GetStringValue(member(pattern, "String"));
    const char *behavior = cJSON_GetStringValue(member(split, "behavior"));
    bool isolated = behavior && !strcmp(behavior, "Isolated");
    /* What does not match is removed: the same pieces, as these patterns match all of a text. */
    bool kept = behavior && !strcmp(behavior, "Removed") && is_true(split, "invert");
    if (!isolated && !kept) {
        return reader_fail(r, "its pre_tokenizer splits with behavior '%.40s', but only Isolated is known",
                           behavior ? behavior : "");
    }
    if (!regex == !text || (text && !*text)) {
        return reader_fail(r, "its pre_tokenizer splits by something that is no Regex and no String");
    }
    return regex ? add_pattern(r, regex) : add_literal(r, text);
}

static bool read_pre_tokenizer(Reader *r, const cJSON *item, bool *byte_level) {
    const char *type = type_of(item);
    if (*byte_level) {
        return reader_fail(r, "its pre_tokenizer goes on after ByteLevel");
    }
    if (!strcmp(type, "ByteLevel")) {
        *byte_level = true;
        if (is_true(item, "add_prefix_space")) {
            return reader_fail(
                r,
                "it puts a blank in front of a text (add_prefix_space), so texts would not come back as they "
                "were: set that to false");
        }
        const cJSON *use_regex = member(item, "use_regex");
        return (use_regex && !cJSON_IsTrue(use_regex)) || add_pattern(r, PATTERN_GPT2);
    }
    if (!strcmp(type, "Split")) {
        return read_split(r, item);
    }
    if (!strcmp(type, "Digits")) {
        return add_pattern(r, is_true(item, "individual_digits") ? "\\p{N}" : "\\p{N}+");
    }
    return reader_fail(r, "its pre_tokenizer is '%.40s', but only ByteLevel, Split and Digits are known", type);
}

static bool read_pre_tokenizers(Reader *r, const cJSON *item) {
    bool byte_level = false;
    if (!strcmp(type_of(item), "Sequence")) {
        const cJSON *part;
        cJSON_ArrayForEach(part, member(item, "pretokenizers")) {
            if (!read_pre_tokenizer(r, part, &byte_level)) {
                return false;
            }
        }
    } else if (item && !read_pre_tokenizer(r, item, &byte_level)) {
        return false;
    }
    if (!byte_level) {
        return reader_fail(r, "it is not byte-level: its pre_tokenizer has no ByteLevel");
    }
    char reason[400];
    r->t->pretokenizer = pretokenizer_open((const char *const *)r->patterns, r->pattern_count, reason, sizeof reason);
    return r->t->pretokenizer || reader_fail(r, "%s", reason);
}

static bool read_decoder(Reader *r, const cJSON *decoder) {
    const cJSON *list = member(decoder, "decoders");
    if (!strcmp(type_of(decoder), "Sequence") && cJSON_GetArraySize(list) == 1) {
        decoder = cJSON_GetArrayItem(list, 0);
    }
    return !strcmp(type_of(decoder), "ByteLevel") ||
           reader_fail(r, "its decoder is '%.40s', but a byte-level tokenizer has ByteLevel", type_of(decoder));
}

/* Added tokens that are looked for in normalised text must be so themselves. */
static bool check_added(Reader *r) {
    const Tokenizer *t = r->t;
    for (int i = 0; t->nfc && i < t->added_count; i++) {
        const Token *token = &t->tokens[t->added[i]];
        utf8proc_uint8_t *composed = token->normalized ? utf8proc_NFC((const utf8proc_uint8_t *)token->text) : NULL;
        bool same = !token->normalized || (composed && !strcmp((const char *)composed, token->text));
        free(composed);
        if (!same) {
            return reader_fail(r, "its added token '%.60s' is looked for in normal form C, but is not in it",
                               token->text);
        }
    }
    return true;
}

bool read_cuts(Reader *r, const cJSON *root) {
    return read_normalizer(r, member(root, "normalizer")) && read_pre_tokenizers(r, member(root, "pre_tokenizer")) &&
           read_decoder(r, member(root, "decoder")) && check_added(r);
}
