/* The texts that a finished run shows, one per prompt. Called by train.c; the drawing itself is generate.c.
 *
 * A model may write anything, and a character may take several tokens. So bytes are held back until they make up a
 * whole UTF-8 character; what is none, or would move the cursor or speak to the terminal, shows as '?'.
 */
#include "sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "generate.h"
#include "process.h"

typedef struct {
    const Vocabulary *vocabulary;
    FILE *kept;            /* what was shown, for the log */
    unsigned char held[4]; /* the beginning of a character */
    int held_count;
} Shower;

static void show(Shower *shower, const void *bytes, int count) {
    fwrite(bytes, 1, (size_t)count, stdout);
    fwrite(bytes, 1, (size_t)count, shower->kept);
}

/* Bytes of the UTF-8 character that begins so; 0: none does. */
static int character_bytes(unsigned char first) {
    return first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
}

/* Whether the second byte can follow the first: not an overlong form, a surrogate, or beyond the last character. Of two
 * bytes, U+0080 to U+009F are control characters. */
static bool second_fits(unsigned char first, unsigned char second) {
    switch (first) {
        case 0xc2:
        case 0xe0: return second >= 0xa0 && second < 0xc0;
        case 0xed: return second >= 0x80 && second < 0xa0;
        case 0xf0: return second >= 0x90 && second < 0xc0;
        case 0xf4: return second >= 0x80 && second < 0x90;
        default: return second >= 0x80 && second < 0xc0;
    }
}

/* Gives up on a character that will not become whole. */
static void show_held(Shower *shower) {
    for (; shower->held_count > 0; shower->held_count--) {
        show(shower, "?", 1);
    }
}

static void show_byte(Shower *shower, unsigned char byte) {
    int n = shower->held_count;
    if (n > 0 && !(n == 1 ? second_fits(shower->held[0], byte) : byte >= 0x80 && byte < 0xc0)) {
        show_held(shower);
        n = 0;
    }
    int length = character_bytes(n > 0 ? shower->held[0] : byte);
    bool plain = byte >= ' ' || byte == '\n' || byte == '\t';
    if (length == 0 || (length == 1 && (!plain || byte == 127))) {
        show(shower, "?", 1);
        return;
    }
    shower->held[n++] = byte;
    shower->held_count = n;
    if (n == length) {
        show(shower, shower->held, n);
        shower->held_count = 0;
    }
}

/* Called with each new token; ends the text with the document, or when the run is asked to stop. */
static bool show_token(int token, void *user) {
    Shower *shower = user;
    size_t length = 0;
    const Vocabulary *v = shower->vocabulary;
    if (token == v->end_of_text) {
        return false;
    }
    const char *bytes = v->bytes(v->tokenizer, token, &length);
    for (size_t i = 0; bytes && i < length; i++) {
        show_byte(shower, (unsigned char)bytes[i]);
    }
    if (!bytes) {
        show_byte(shower, 0); /* an id that the tokenizer does not know */
    }
    fflush(stdout);
    return !process_must_end();
}

/* Tokens of a prompt, at least one; nothing stands for the end of a document, or a newline, or token 0. */
static int *read_prompt(const Vocabulary *v, int V, const char *prompt, size_t *count) {
    char error[512];
    int *tokens = NULL;
    const char *text = *prompt ? prompt : "\n";
    bool known = v->encode(v->tokenizer, text, strlen(text), &tokens, count, error, sizeof error);
    if (!*prompt && (!known || v->end_of_text >= 0 || tokens[0] >= V)) {
        free(tokens);
        tokens = calloc(1, sizeof(int));
        CHECK(tokens, "out of memory for a prompt");
        tokens[0] = v->end_of_text >= 0 && v->end_of_text < V ? v->end_of_text : 0;
        *count = 1;
        return tokens;
    }
    CHECK(known, "--prompt: %s", error);
    for (size_t i = 0; i < *count; i++) {
        CHECK(tokens[i] < V, "--prompt holds token %d, but --vocab %d ends before it: change one of them", tokens[i],
              V);
    }
    return tokens;
}

static void sample_one(Generator *generator, const TrainConfig *train, int stream, const Vocabulary *vocabulary,
                       const char *domain, const char *prompt, Log *log) {
    char *text = NULL;
    size_t length = 0, count;
    int *start = read_prompt(vocabulary, generator->config.model.vocab, prompt, &count);
    int *tokens = calloc(train->sample, sizeof(int));
    Shower shower = {.vocabulary = vocabulary, .kept = open_memstream(&text, &length)};
    CHECK(tokens && shower.kept, "out of memory for a sample of %d tokens", train->sample);
    SampleOptions options = {train->temperature, train->top_p, train->sample_top_k, train->seed + stream};
    printf("\n--- %s ---\n%s", domain, prompt);
    generate(generator, tokens, train->sample, start, (int)count, options, show_token, &shower);
    show_held(&shower);
    printf("\n");
    CHECK(fclose(shower.kept) == 0, "out of memory for the text of a sample");
    size_t quoted_size = 6 * length + 3;
    char *quoted = calloc(quoted_size, 1), quoted_prompt[6 * CONFIG_TEXT + 3];
    CHECK(quoted, "out of memory for the text of a sample");
    log_line(log, "{\"event\":\"sample\",\"domain\":\"%s\",\"prompt\":%s,\"text\":%s}", domain,
             json_quote(quoted_prompt, sizeof quoted_prompt, prompt, strlen(prompt)),
             json_quote(quoted, quoted_size, text, length));
    free(start);
    free(tokens);
    free(text);
    free(quoted);
}

void sample_texts(Transformer *model, const Config *config, const Vocabulary *vocabulary, const char *const *domains,
                  const char *const *prompts, int count, Log *log) {
    Generator generator;
    generator_open(&generator, config, model);
    if (config->train.prompt[0]) {
        sample_one(&generator, &config->train, 0, vocabulary, "prompt", config->train.prompt, log);
    } else {
        for (int d = 0; d < count && !process_must_end(); d++) {
            sample_one(&generator, &config->train, d, vocabulary, domains[d], prompts[d], log);
        }
    }
    generator_close(&generator);
}
