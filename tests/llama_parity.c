/* For developers who have llama.cpp: does it compute the same from --export-gguf as we do?
 *
 *     ./train ... --out RUN --export-gguf MODEL.gguf
 *     data/tokenize encode --tokenizer RUN/tokenizer.json --val-share 0 --out SHARDS TEXT     (tokens at byte 1024)
 *     build/hf_logits RUN IDS OURS 50                             IDS: int32 token ids of TEXT
 *     cc tests/llama_parity.c -Illama.cpp/include -Illama.cpp/ggml/include -lllama -lm -o llama_parity
 *     ./llama_parity MODEL.gguf IDS OURS TEXT
 *
 * prints one line of JSON: the relative L2 distance of the logits, whether 50 greedy tokens are the same, whether
 * llama.cpp cuts TEXT into the same IDS. Not built by make: the project does not depend on llama.cpp. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <llama.h>

enum { MOST = 4096 };

static char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "llama_parity: cannot read %s\n", path);
        exit(1);
    }
    char *data = malloc(1 << 26);
    *bytes = fread(data, 1, 1 << 26, file);
    fclose(file);
    return data;
}

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    if (level >= GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: llama_parity MODEL.gguf IDS OURS TEXT\n");
        return 1;
    }
    size_t id_bytes, our_bytes, text_bytes;
    llama_token *ids = (llama_token *)read_file(argv[2], &id_bytes);
    float *ours = (float *)read_file(argv[3], &our_bytes);
    char *text = read_file(argv[4], &text_bytes);
    int count = (int)(id_bytes / sizeof *ids), fresh = 50;

    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = MOST;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context *context = model ? llama_init_from_model(model, params) : NULL;
    if (!context) {
        fprintf(stderr, "llama_parity: llama.cpp does not load %s\n", argv[1]);
        return 1;
    }
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    int V = llama_vocab_n_tokens(vocab);
    llama_token cut[MOST];
    int cut_count = llama_tokenize(vocab, text, (int)text_bytes, cut, MOST, false, true);
    int same_ids = cut_count == count && memcmp(cut, ids, id_bytes) == 0;

    /* one token at a time: every position's logits are wanted */
    double square = 0, difference = 0;
    int same_greedy = 1;
    llama_token next = 0;
    for (int t = 0; t < count + fresh - 1; t++) {
        llama_token token = t < count ? ids[t] : next;
        if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) {
            fprintf(stderr, "llama_parity: llama_decode failed at token %d\n", t);
            return 1;
        }
        const float *logits = llama_get_logits_ith(context, -1);
        next = 0;
        for (int v = 0; v < V; v++) {
            next = logits[v] > logits[next] ? v : next;
        }
        for (int v = 0; v < V && t < count; v++) {
            double wanted = ours[(size_t)t * V + v];
            square += wanted * wanted;
            difference += (logits[v] - wanted) * (logits[v] - wanted);
        }
        if (t >= count - 1) {
            same_greedy = same_greedy && next == ((int *)(ours + (size_t)count * V))[t - count + 1];
        }
    }
    printf(
        "{\"test\":\"llama.cpp\",\"model\":\"%s\",\"tokens\":%d,\"vocab\":%d,\"relative_l2\":%.3g,\"same_greedy\":%s,"
        "\"same_ids\":%s}\n",
        argv[1], count, V, sqrt(difference / square), same_greedy ? "true" : "false", same_ids ? "true" : "false");
    return 0;
}
