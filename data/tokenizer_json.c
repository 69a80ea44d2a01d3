/* Reads a tokenizer.json: see tokenizer.h for what is read and what is refused.
 *
 *     {"added_tokens":[{"id":50256,"content":"<|endoftext|>","special":true, ..}, ..],
 *      "normalizer":null or {"type":"NFC"},
 *      "pre_tokenizer":{"type":"ByteLevel", ..} or a Sequence that ends in one,
 *      "decoder":{"type":"ByteLevel"},
 *      "model":{"type":"BPE", .., "vocab":{"!":0, ..}, "merges":["a b", ..] or [["a","b"], ..]}}
 *
 * The parts are read in the order of parse(), below. Texts are looked up in a hash table of their own, since a
 * vocabulary of 150,000 is a linked list to cJSON.
 *
 * Called by train.c and tokenize.c. Read next: tokenizer_encode.c. */
#define _GNU_SOURCE /* qsort_r */
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utf8proc.h>

#include "../kernels/checksum.h"
#include "tokenizer.h"
#include "tokenizer_reader.h"

enum { LONGEST_FILE = 128 << 20, NOT_A_CHARACTER = -1, CHARACTERS = 0x100 + 256 };

/* Writes the line, in front of it the file's name, and returns false. */
bool reader_fail(Reader *r, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = snprintf(r->error, r->error_size, "%.200s: ", r->name);
    if (length >= 0 && (size_t)length < r->error_size) {
        vsnprintf(r->error + length, r->error_size - (size_t)length, format, arguments);
    }
    va_end(arguments);
    for (char *c = r->error; r->error_size && *c; c++) { /* a hostile text may hold anything; the message is one line */
        *c = (unsigned char)*c < ' ' || *c == 127 ? '?' : *c;
    }
    return false;
}

bool reader_no_memory(Reader *r) {
    return reader_fail(r, "out of memory");
}

/* ---- JSON ---- */

/* The member, NULL where it is absent or null. */
const cJSON *member(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNull(item) ? NULL : item;
}

bool is_true(const cJSON *object, const char *key) {
    return cJSON_IsTrue(member(object, key));
}

const char *type_of(const cJSON *object) {
    const char *type = cJSON_GetStringValue(member(object, "type"));
    return type ? type : "";
}

static bool read_id(const cJSON *item, int *id) {
    bool good = cJSON_IsNumber(item) && item->valuedouble >= 0 && item->valuedouble < TOKENIZER_MOST_IDS;
    *id = good ? (int)item->valuedouble : -1;
    return good && *id == item->valuedouble;
}

/* ---- texts ---- */

static bool table_open(int **table, size_t *slots, int count) {
    for (*slots = 16; *slots < 2 * (size_t)count; *slots *= 2) {
    }
    *table = malloc(*slots * sizeof **table);
    if (*table) {
        memset(*table, 0xff, *slots * sizeof **table);
    }
    return *table;
}

/* Where the text stands in the table, or the free place for it. */
static size_t text_slot(const Reader *r, const char *text) {
    size_t slot = bytes_hash(text, strlen(text)) & (r->slots - 1);
    while (r->by_text[slot] >= 0 && strcmp(r->t->tokens[r->by_text[slot]].text, text) != 0) {
        slot = (slot + 1) & (r->slots - 1);
    }
    return slot;
}

/* Gives an id its text; both must be free. */
static bool add_text(Reader *r, int id, const char *text) {
    Token *token = &r->t->tokens[id];
    size_t slot = text_slot(r, text);
    if (token->text || r->by_text[slot] >= 0) {
        return reader_fail(r, "id %d stands for '%.40s' and for '%.40s', or a token has two ids: it is damaged", id,
                           token->text ? token->text : text, text);
    }
    token->text = strdup(text);
    r->by_text[slot] = id;
    return token->text || reader_no_memory(r);
}

/* The byte that each character of byte_character stands for, by code point; -1: none. */
static void list_characters(int byte_of[CHARACTERS]) {
    for (int i = 0; i < CHARACTERS; i++) {
        byte_of[i] = NOT_A_CHARACTER;
    }
    for (int byte = 0; byte < 256; byte++) {
        utf8proc_int32_t character;
        utf8proc_iterate((const utf8proc_uint8_t *)byte_character((unsigned char)byte), -1, &character);
        byte_of[character] = byte;
    }
}

/* The bytes that a text of such characters stands for, as long as the text at most. False when it is not one. */
static bool text_bytes(const int byte_of[CHARACTERS], const char *text, char *bytes, size_t *length) {
    const utf8proc_uint8_t *at = (const utf8proc_uint8_t *)text;
    *length = 0;
    while (*at) {
        utf8proc_int32_t character;
        utf8proc_ssize_t used = utf8proc_iterate(at, -1, &character);
        if (used <= 0 || character >= CHARACTERS || byte_of[character] == NOT_A_CHARACTER) {
            return false;
        }
        bytes[(*length)++] = (char)byte_of[character];
        at += used;
    }
    bytes[*length] = '\0';
    return *length > 0;
}

/* ---- the model: vocabulary and merges ---- */

static bool check_model(Reader *r, const cJSON *model) {
    const cJSON *dropout = member(model, "dropout");
    if (!cJSON_IsObject(model) || (*type_of(model) && strcmp(type_of(model), "BPE") != 0)) {
        return reader_fail(r, "its model is '%.40s', but only BPE is read", type_of(model));
    }
    if (dropout && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0)) {
        return reader_fail(r, "its model drops merges at random (dropout): set that to null");
    }
    if (member(model, "unk_token") || is_true(model, "byte_fallback")) {
        return reader_fail(r, "it is not byte-level: its model has %s",
                           member(model, "unk_token") ? "an unk_token" : "byte_fallback");
    }
    for (int i = 0; i < 2; i++) {
        const char *key = i ? "end_of_word_suffix" : "continuing_subword_prefix";
        const char *text = cJSON_GetStringValue(member(model, key));
        if (text && *text) {
            return reader_fail(r, "its model has a %s, which byte-level tokenizers have not", key);
        }
    }
    r->t->ignore_merges = is_true(model, "ignore_merges");
    return true;
}

/* Sizes the vocabulary for all ids of the model and of the added tokens. */
static bool size_vocabulary(Reader *r, const cJSON *vocab, const cJSON *added) {
    int id, most = -1, count = 0;
    const cJSON *item;
    if (!cJSON_IsObject(vocab) || (added && !cJSON_IsArray(added))) {
        return reader_fail(r, "its model has no vocab, or added_tokens is no list: it is damaged");
    }
    cJSON_ArrayForEach(item, vocab) {
        if (!read_id(item, &id)) {
            return reader_fail(r, "the id of token '%.40s' is not a whole number below 2^20", item->string);
        }
        most = id > most ? id : most;
        count++;
    }
    cJSON_ArrayForEach(item, added) {
        if (!read_id(member(item, "id"), &id) || !cJSON_GetStringValue(member(item, "content"))) {
            return reader_fail(r, "an added token has no content, or no id below 2^20: it is damaged");
        }
        most = id > most ? id : most;
        count++;
    }
    if (count == 0) {
        return reader_fail(r, "it has no tokens");
    }
    r->t->vocab = most + 1;
    r->t->tokens = calloc((size_t)r->t->vocab, sizeof *r->t->tokens);
    return (r->t->tokens && table_open(&r->by_text, &r->slots, count)) || reader_no_memory(r);
}

static bool read_vocabulary(Reader *r, const cJSON *vocab) {
    const cJSON *item;
    cJSON_ArrayForEach(item, vocab) {
        if (!*item->string) {
            return reader_fail(r, "it has a token without text: it is damaged");
        }
        if (!add_text(r, item->valueint, item->string)) {
            return false;
        }
    }
    return true;
}

/* The two sides of a merge, "a b" or ["a","b"], as one text "a b", the caller's; *right is where the second starts. */
static char *merge_text(const cJSON *item, size_t *right) {
    const char *left_text = cJSON_GetStringValue(cJSON_GetArrayItem(item, 0));
    const char *right_text = cJSON_GetStringValue(cJSON_GetArrayItem(item, 1));
    const char *whole = cJSON_GetStringValue(item), *blank = whole ? strchr(whole, ' ') : NULL;
    if (blank && !strchr(blank + 1, ' ')) {
        *right = (size_t)(blank + 1 - whole);
        return strdup(whole);
    }
    if (whole || !left_text || !right_text || cJSON_GetArraySize(item) != 2 || strchr(left_text, ' ') ||
        strchr(right_text, ' ')) {
        return NULL;
    }
    *right = strlen(left_text) + 1;
    char *text = malloc(*right + strlen(right_text) + 1);
    if (text) {
        sprintf(text, "%s %s", left_text, right_text);
    }
    return text;
}

static bool read_merge(Reader *r, const cJSON *item, int rank, Merge *merge) {
    size_t right;
    char *text = merge_text(item, &right), *joined = text ? strdup(text) : NULL;
    r->t->merge_texts[rank] = text;
    if (!joined) {
        return reader_fail(r, "merge %d is not two tokens", rank);
    }
    memmove(joined + right - 1, text + right, strlen(text + right) + 1);
    text[right - 1] = '\0';
    merge->left = r->by_text[text_slot(r, text)];
    text[right - 1] = ' ';
    merge->right = r->by_text[text_slot(r, text + right)];
    merge->result = r->by_text[text_slot(r, joined)];
    free(joined);
    if (merge->left < 0 || merge->right < 0 || merge->result < 0) {
        return reader_fail(r, "merge %d, '%.80s', is not of two tokens that make a third", rank, text);
    }
    return true;
}

static bool read_merges(Reader *r, const cJSON *list) {
    Tokenizer *t = r->t;
    if (!cJSON_IsArray(list)) {
        return reader_fail(r, "its model has no merges: it is damaged");
    }
    int count = cJSON_GetArraySize(list), rank = 0;
    Merge *merges = calloc((size_t)count + 1, sizeof *merges);
    t->merge_texts = calloc((size_t)count + 1, sizeof *t->merge_texts);
    t->merges = (Merges){.merges = merges, .count = t->merge_texts ? count : 0};
    if (!merges || !t->merge_texts) {
        return reader_no_memory(r);
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, list) {
        if (!read_merge(r, item, rank, &merges[rank])) {
            return false;
        }
        rank++;
    }
    return merges_build(&t->merges, merges, count) || reader_no_memory(r);
}

/* ---- added tokens ---- */

static bool is_ascii_text(const char *text) {
    while (*text && (unsigned char)*text < 0x80) {
        text++;
    }
    return !*text;
}

static bool read_added(Reader *r, const cJSON *list) {
    Tokenizer *t = r->t;
    const cJSON *item;
    t->added = calloc((size_t)cJSON_GetArraySize(list) + 1, sizeof *t->added);
    if (!t->added) {
        return reader_no_memory(r);
    }
    cJSON_ArrayForEach(item, list) {
        const char *content = cJSON_GetStringValue(member(item, "content"));
        const char *flag = is_true(item, "lstrip")        ? "lstrip"
                           : is_true(item, "rstrip")      ? "rstrip"
                           : is_true(item, "single_word") ? "single_word"
                                                          : NULL;
        int id = member(item, "id")->valueint;
        Token *token = &t->tokens[id];
        if (!*content || flag) {
            return reader_fail(r, "the added token '%.60s' %s%s", content,
                               flag ? "takes more than its text: " : "is empty", flag ? flag : "");
        }
        if (token->added || (token->text && strcmp(token->text, content) != 0)) {
            return reader_fail(r, "id %d stands for '%.60s' and for '%.60s'", id, token->text, content);
        }
        if (!token->text && !add_text(r, id, content)) {
            return false;
        }
        token->added = true;
        token->special = is_true(item, "special");
        const cJSON *normalized = member(item, "normalized");
        token->normalized = normalized ? cJSON_IsTrue(normalized) : !token->special;
        t->added[t->added_count++] = id;
        t->added_first[(unsigned char)*content] = true;
    }
    for (int rank = 0; rank < t->merges.count; rank++) {
        const Token *token = &t->tokens[t->merges.merges[rank].result];
        if (token->added && !is_ascii_text(token->text)) {
            return reader_fail(
                r, "its token '%.60s' is added, and so that text, but also what merge %d makes of other bytes",
                token->text, rank);
        }
    }
    return true;
}

/* What each id stands for, and the ways back. */
static bool list_bytes(Reader *r) {
    Tokenizer *t = r->t;
    int byte_of[CHARACTERS];
    list_characters(byte_of);
    if (!table_open(&t->by_bytes, &t->by_bytes_slots, t->vocab)) {
        return reader_no_memory(r);
    }
    memset(t->byte_id, 0xff, sizeof t->byte_id);
    for (int id = 0; id < t->vocab; id++) {
        Token *token = &t->tokens[id];
        if (!token->text) {
            continue;
        }
        token->length = strlen(token->text);
        token->bytes = malloc(token->length + 1);
        if (!token->bytes) {
            return reader_no_memory(r);
        }
        strcpy(token->bytes, token->text);
        if (token->added) {
            continue;
        }
        if (!text_bytes(byte_of, token->text, token->bytes, &token->length)) {
            return reader_fail(r, "it is not byte-level: its token '%.60s' holds a character that stands for no byte",
                               token->text);
        }
        if (token->length == 1) {
            t->byte_id[(unsigned char)*token->bytes] = id;
        }
        size_t slot = bytes_hash(token->bytes, token->length) & (t->by_bytes_slots - 1);
        while (t->by_bytes[slot] >= 0) {
            slot = (slot + 1) & (t->by_bytes_slots - 1);
        }
        t->by_bytes[slot] = id;
    }
    return true;
}

/* ---- the whole ---- */

static int longer_first(const void *a, const void *b, void *tokens) {
    int x = *(const int *)a, y = *(const int *)b;
    size_t length_x = ((const Token *)tokens)[x].length, length_y = ((const Token *)tokens)[y].length;
    return length_x != length_y ? (length_x < length_y ? 1 : -1) : (x > y) - (x < y);
}

static int find_end_of_text(const Tokenizer *t) {
    static const char *const names[] = {"<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"};
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        for (int i = 0; i < t->added_count; i++) {
            const Token *token = &t->tokens[t->added[i]];
            if (token->special && !strcmp(token->text, names[n])) {
                return t->added[i];
            }
        }
    }
    return -1;
}

/* Whether every byte is a token, its value the id, and there is no other. */
static bool is_bytes(const Tokenizer *t) {
    bool same = t->vocab == 256 && t->added_count == 0 && t->merges.count == 0 && !t->nfc;
    for (int byte = 0; byte < 256; byte++) {
        same = same && t->byte_id[byte] == byte;
    }
    return same;
}

static uint32_t sum_int(uint32_t crc, int value) {
    unsigned char bytes[4] = {value & 255, value >> 8 & 255, value >> 16 & 255, value >> 24 & 255};
    return crc32c(crc, bytes, sizeof bytes);
}

/* Over all that decides which ids a text gets. */
static uint32_t hash_of(const Tokenizer *t) {
    uint32_t crc = sum_int(0, t->nfc | t->ignore_merges << 1);
    for (int id = 0; id < t->vocab; id++) {
        const Token *token = &t->tokens[id];
        if (token->text) {
            crc = sum_int(sum_int(crc, id), (int)token->length);
            crc = crc32c(sum_int(crc, token->added | token->normalized << 1), token->bytes, token->length);
        }
    }
    crc = sum_int(sum_int(crc, t->vocab), t->merges.count);
    for (int rank = 0; rank < t->merges.count; rank++) {
        crc = sum_int(sum_int(crc, t->merges.merges[rank].left), t->merges.merges[rank].right);
    }
    for (int i = 0; t->merges.count > 0 && i < pretokenizer_patterns(t->pretokenizer); i++) {
        const char *pattern = pretokenizer_pattern(t->pretokenizer, i);
        crc = crc32c(crc, pattern, strlen(pattern) + 1);
    }
    return crc ? crc : 1;
}

static bool parse(Reader *r, const cJSON *root) {
    Tokenizer *t = r->t;
    const cJSON *model = member(root, "model"), *added = member(root, "added_tokens"), *vocab = member(model, "vocab");
    bool good = check_model(r, model) && size_vocabulary(r, vocab, added) && read_vocabulary(r, vocab) &&
                read_merges(r, member(model, "merges")) && read_added(r, added) && list_bytes(r) && read_cuts(r, root);
    if (good) {
        qsort_r(t->added, (size_t)t->added_count, sizeof *t->added, longer_first, t->tokens);
        t->end_of_text = find_end_of_text(t);
        t->is_bytes = is_bytes(t);
        t->hash = hash_of(t);
    }
    return good;
}

/* JSON is UTF-8; and a NUL in a text, written as such or as \\u0000, would be its end to cJSON. */
static bool check_characters(Reader *r, const char *json, size_t bytes) {
    utf8proc_int32_t character;
    for (size_t at = 0; at < bytes;) {
        const utf8proc_uint8_t *here = (const utf8proc_uint8_t *)json + at;
        utf8proc_ssize_t used = utf8proc_iterate(here, (utf8proc_ssize_t)(bytes - at), &character);
        if (used <= 0 || character == 0) {
            return reader_fail(r, "byte %zu is not UTF-8 text: it is damaged", at);
        }
        if (character == '\\' && bytes - at >= 6 && memcmp(here, "\\u0000", 6) == 0) {
            return reader_fail(r, "a text in it holds the character \\u0000, which is not supported");
        }
        at += (size_t)used + (character == '\\' && at + 1 < bytes && (here[1] == '\\' || here[1] == '"'));
    }
    return true;
}

Tokenizer *tokenizer_parse(const char *json, size_t bytes, const char *name, char *error, size_t error_size) {
    Reader r = {.name = name, .error = error, .error_size = error_size, .t = calloc(1, sizeof(Tokenizer))};
    char *copy = malloc(bytes + 1);
    const char *end = NULL;
    bool good = false;
    if (!r.t || !copy) {
        reader_no_memory(&r);
    } else {
        memcpy(copy, json, bytes);
        copy[bytes] = '\0';
        bool readable = check_characters(&r, copy, bytes);
        cJSON *root = readable ? cJSON_ParseWithLengthOpts(copy, bytes, &end, false) : NULL;
        size_t rest = root ? strspn(end, " \t\r\n") : 0;
        good = !readable ? false
               : cJSON_IsObject(root) && end + rest == copy + bytes
                   ? parse(&r, root)
                   : reader_fail(&r, "it is not one whole JSON object");
        cJSON_Delete(root);
    }
    for (int i = 0; i < r.pattern_count; i++) {
        free(r.patterns[i]);
    }
    free(r.by_text);
    if (!good) {
        free(copy);
        tokenizer_close(r.t);
        return NULL;
    }
    r.t->json = copy;
    r.t->json_bytes = bytes;
    return r.t;
}

Tokenizer *tokenizer_open(const char *path, char *error, size_t error_size) {
    Reader r = {.name = path, .error = error, .error_size = error_size};
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        snprintf(error, error_size, "cannot open %s: %s", path, strerror(errno));
        return NULL;
    }
    char *text = NULL;
    size_t length = 0;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size > LONGEST_FILE) {
        reader_fail(&r, "it is not a file of at most %d MB", LONGEST_FILE >> 20);
    } else if (!(text = malloc((size_t)status.st_size + 1))) {
        reader_no_memory(&r);
    } else {
        for (ssize_t got = 1; got > 0 && length<(size_t)status.st_size; length += got> 0 ? (size_t)got : 0) {
            got = read(fd, text + length, (size_t)status.st_size - length);
        }
    }
    close(fd);
    Tokenizer *tokenizer = text ? tokenizer_parse(text, length, path, error, error_size) : NULL;
    free(text);
    return tokenizer;
}
