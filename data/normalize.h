/* Normal form C of text (Unicode Standard Annex 15), which tokenizers such as Qwen's ask for. */
#ifndef DATA_NORMALIZE_H
#define DATA_NORMALIZE_H

#include <stdbool.h>
#include <stddef.h>

/* Text that grows; zero at first, its text the owner's to free. */
typedef struct {
    char *text;
    size_t bytes, capacity;
} Buffer;

/* Appends; false when there is no memory. */
bool buffer_add(Buffer *buffer, const char *text, size_t bytes);

/* Whether all bytes are ASCII: such a text is in normal form. */
bool is_ascii(const char *text, size_t bytes);

/* Appends text[begin, end) in normal form C; bytes that are no UTF-8 stay as they are. False when there is no memory.
 * */
bool normalize(Buffer *out, const char *text, size_t begin, size_t end);

#endif
