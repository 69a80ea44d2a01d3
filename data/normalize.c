/* Unicode's normal form C by utf8proc, line by line: nothing is composed across a newline, or across bytes that are no
 * text. Called by tokenizer_encode.c. */
#include "normalize.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

bool buffer_add(Buffer *buffer, const char *text, size_t bytes) {
    if (!buffer->text || buffer->bytes + bytes > buffer->capacity) {
        size_t capacity = 2 * (buffer->bytes + bytes) + 256;
        char *grown = realloc(buffer->text, capacity);
        if (!grown) {
            return false;
        }
        buffer->text = grown;
        buffer->capacity = capacity;
    }
    memcpy(buffer->text + buffer->bytes, text, bytes);
    buffer->bytes += bytes;
    return true;
}

bool is_ascii(const char *text, size_t bytes) {
    unsigned char all = 0;
    for (size_t i = 0; i < bytes; i++) {
        all |= (unsigned char)text[i];
    }
    return all < 0x80;
}

/* Bytes at the beginning of the text that are UTF-8. */
static size_t valid_bytes(const char *text, size_t bytes) {
    size_t valid = 0;
    utf8proc_int32_t character;
    for (utf8proc_ssize_t used = 1; used > 0 && valid<bytes; valid += used> 0 ? (size_t)used : 0) {
        used = utf8proc_iterate((const utf8proc_uint8_t *)text + valid, (utf8proc_ssize_t)(bytes - valid), &character);
    }
    return valid;
}

/* A line, or the rest of one: nothing is composed across a newline, or across bytes that are no text. */
static bool normalize_line(Buffer *out, const char *text, size_t bytes) {
    for (size_t at = 0; at < bytes;) {
        size_t valid = valid_bytes(text + at, bytes - at);
        utf8proc_uint8_t *composed = NULL;
        utf8proc_ssize_t length = utf8proc_map((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)valid, &composed,
                                               UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        bool added = length >= 0 && buffer_add(out, (const char *)composed, (size_t)length);
        free(composed);
        at += valid;
        if (!added || (at < bytes && !buffer_add(out, text + at, 1))) {
            return false;
        }
        at += at < bytes;
    }
    return true;
}

bool normalize(Buffer *out, const char *text, size_t begin, size_t end) {
    bool good = true;
    for (size_t at = begin; good && at < end;) {
        const char *newline = memchr(text + at, '\n', end - at);
        size_t length = newline ? (size_t)(newline - text) + 1 - at : end - at;
        good =
            is_ascii(text + at, length) ? buffer_add(out, text + at, length) : normalize_line(out, text + at, length);
        at += length;
    }
    return good;
}
