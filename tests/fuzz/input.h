/* What a fuzz target makes of its input: a text, or a file to open.
 *
 *     char *json = input_text(data, size);                  // zero-terminated copy; free it
 *     const char *path = input_file(data, size, ".bin");    // a file of these bytes, the same one each time
 *
 * A mapped file hides mistakes: the last page is readable to its end, so that a read past the file's end goes unseen by
 * AddressSanitizer. Programs that are linked with -Wl,--wrap=mmap,--wrap=munmap see a file "mapped" into a block of the
 * heap that is exactly as long as the file, where one byte too far is an error.
 *
 * Included by the targets, fuzz_*.c. Read next: fuzz_safetensors.c, the simplest of them.
 */
#ifndef TESTS_FUZZ_INPUT_H
#define TESTS_FUZZ_INPUT_H

#include <assert.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static inline char *input_text(const uint8_t *data, size_t size) {
    char *text = malloc(size + 1);
    assert(text);
    if (size > 0) { /* data may be NULL */
        memcpy(text, data, size);
    }
    text[size] = '\0';
    return text;
}

static char input_path[256];

static inline void input_remove(void) {
    unlink(input_path);
}

/* Under $TMPDIR or /tmp, removed at exit. The ending counts: a loader may go by it. */
static inline const char *input_file(const uint8_t *data, size_t size, const char *ending) {
    int file;
    if (!input_path[0]) {
        const char *folder = getenv("TMPDIR");
        snprintf(input_path, sizeof input_path, "%s/fuzz_XXXXXX%s", folder ? folder : "/tmp", ending);
        file = mkstemps(input_path, (int)strlen(ending));
        atexit(input_remove);
    } else {
        file = open(input_path, O_WRONLY | O_TRUNC);
    }
    assert(file >= 0);
    ssize_t written = write(file, data, size);
    assert(written == (ssize_t)size);
    close(file);
    return input_path;
}

/* Every refusal explains itself: in one line. */
static inline void input_check_error(const char *error) {
    bool one_line = error[0] && strcspn(error, "\r\n") == strlen(error);
    if (!one_line) {
        fprintf(stderr, "refused with \"%s\"\n", error);
    }
    assert(one_line);
}

/* ---- mmap(2) and munmap(2) of programs linked with --wrap */

void *__real_mmap(void *address, size_t length, int protection, int flags, int file, off_t offset);
int __real_munmap(void *address, size_t length);

enum { INPUT_MOST_MAPPED = 16 };
static void *input_mapped[INPUT_MOST_MAPPED]; /* blocks of the heap that stand for mapped files */

void *__wrap_mmap(void *address, size_t length, int protection, int flags, int file, off_t offset) {
    if (file < 0) {
        return __real_mmap(address, length, protection, flags, file, offset);
    }
    int i = 0;
    while (input_mapped[i]) {
        i++;
        assert(i < INPUT_MOST_MAPPED); /* else: files are not unmapped */
    }
    input_mapped[i] = malloc(length);
    ssize_t bytes = pread(file, input_mapped[i], length, offset);
    assert(bytes == (ssize_t)length);
    return input_mapped[i];
}

int __wrap_munmap(void *address, size_t length) {
    for (int i = 0; i < INPUT_MOST_MAPPED; i++) {
        if (address && input_mapped[i] == address) {
            free(address);
            input_mapped[i] = NULL;
            return 0;
        }
    }
    return __real_munmap(address, length);
}

#endif
