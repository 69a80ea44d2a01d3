/* The logits of a model that --init-from can read, for comparison with another implementation of it:
 *
 *     hf_logits DIR IDS OUT NEW
 *
 * reads int32 token ids from the file IDS (T of them, T at most the model's --seq) and writes to the file OUT, as raw
 * little-endian numbers, T x V float32 logits, computed as in training, and NEW int32 tokens that the sampler continues
 * the ids with at temperature 0. Used by tests/hf_parity.py.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/matmul.h"
#include "../model/config.h"
#include "../model/generate.h"
#include "../model/import.h"
#include "../model/transformer.h"

static int *read_ids(const char *path, int *count) {
    FILE *file = fopen(path, "rb");
    CHECK(file && fseek(file, 0, SEEK_END) == 0, "cannot read %s", path);
    *count = (int)(ftell(file) / (long)sizeof(int));
    rewind(file);
    int *ids = calloc(*count, sizeof(int));
    CHECK(ids && fread(ids, sizeof(int), *count, file) == (size_t)*count, "cannot read %s", path);
    fclose(file);
    return ids;
}

int main(int argc, char **argv) {
    CHECK(argc == 5, "usage: hf_logits DIR IDS OUT NEW");
    int count, fresh = atoi(argv[4]);
    int *ids = read_ids(argv[2], &count);
    char seq[16];
    snprintf(seq, sizeof seq, "%d", count + fresh);
    Config config;
    char *options[] = {argv[0], "--init-from", argv[1], "--seq", seq, "--batch", "1"};
    config_parse(&config, sizeof options / sizeof *options, options);
    config_finish(&config);

    Transformer model;
    Arena arena = {0};
    int *tokens, T = config.model.seq, V = config.model.vocab;
    real_t *logits;
    transformer_reserve(&model, &config, 1, 1, USE_TRAIN, NULL, &arena);
    arena_reserve(&arena, (void **)&tokens, T * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&logits, (size_t)T * V * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_commit(&arena);
    transformer_connect(&model);
    acc_t *host = calloc(model.tensors.total, sizeof(acc_t));
    int *padded = calloc(T, sizeof(int));
    CHECK(host && padded, "out of memory for %zu weights", model.tensors.total);
    transformer_init(&model, host, 0, NULL);
    import_weights(host, &model.tensors, &config.model, argv[1], false);
    transformer_load(&model, host);
    for (int t = 0; t < count; t++) {
        padded[t] = ids[t];
    }
    device_from_host(tokens, padded, T * sizeof(int), NULL);
    transformer_set_training(&model, false, false);
    transformer_forward(&model, tokens, 0, NULL);
    matmul_forward(logits, model.hidden, model.head.w, T, config.model.dim, V, NULL);

    Generator generator;
    generator_open(&generator, &config, &model);
    int *drawn = calloc(fresh + 1, sizeof(int));
    SampleOptions greedy = {.temperature = 0, .top_p = 1};
    generate(&generator, drawn, fresh, ids, count, greedy, NULL, NULL);

    FILE *out = fopen(argv[3], "wb");
    CHECK(out, "cannot write %s", argv[3]);
    bool written = fwrite(logits, sizeof(real_t), (size_t)count * V, out) == (size_t)count * V &&
                   fwrite(drawn, sizeof(int), fresh, out) == (size_t)fresh;
    CHECK(fclose(out) == 0 && written, "cannot write %s", argv[3]);
    return EXIT_OK;
}
