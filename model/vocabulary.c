/* A run's own copy of its tokenizer. Called by train.c. */
#include "vocabulary.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "../kernels/check.h"

void vocabulary_path(char *path, size_t size, const char *run) {
    snprintf(path, size, "%s/tokenizer.json", run);
}

void vocabulary_keep(const Vocabulary *vocabulary, const char *run) {
    char path[1024], partial[1032];
    size_t bytes;
    vocabulary_path(path, sizeof path, run);
    snprintf(partial, sizeof partial, "%s.tmp", path); /* a resumed run must not lose the one it has */
    const char *json = vocabulary->json(vocabulary->tokenizer, &bytes);
    FILE *file = fopen(partial, "wb");
    bool kept = file && fwrite(json, 1, bytes, file) == bytes;
    kept = file && fclose(file) == 0 && kept && rename(partial, path) == 0;
    CHECK(kept, "cannot write %s (%s): make room, or choose another --out", path, strerror(errno));
}
