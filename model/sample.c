/* The texts that a finished run shows, one per domain. Called by train.c; the drawing itself is generate.c. */
#include "sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "generate.h"

/* A token as a character: what is no byte, or would move the cursor or speak to the terminal, shows as '?'. */
static char shown(int token) {
    bool plain = token < 256 && (token >= ' ' || token == '\n' || token == '\t') && token != 127;
    return plain ? (char)token : '?';
}

/* Called with each new token; ends the text when the run is asked to stop. */
static bool print_token(int token, void *stop) {
    putchar(shown(token));
    fflush(stdout);
    return !*(const volatile sig_atomic_t *)stop;
}

static void sample_one(Generator *generator, const TrainConfig *train, int stream, const char *domain,
                       const char *prompt, Log *log, const volatile sig_atomic_t *stop) {
    int count = (int)strlen(prompt), length = train->sample, V = generator->config.model.vocab;
    int start = count > 0 ? count : 1; /* nothing stands for one newline, or token 0 where there is none */
    int *tokens = calloc(start + length, sizeof(int));
    size_t quoted_size = 6 * (size_t)length + 3;
    char *text = calloc(length + 1, 1), *quoted = calloc(quoted_size, 1), quoted_prompt[6 * CONFIG_TEXT + 3];
    CHECK(tokens && text && quoted, "out of memory for a sample of %d tokens", length);
    tokens[0] = '\n' < V ? '\n' : 0;
    for (int i = 0; i < count; i++) {
        tokens[i] = (unsigned char)prompt[i];
    }
    SampleOptions options = {train->temperature, train->top_p, train->sample_top_k, train->seed + stream};
    printf("\n--- %s ---\n%s", domain, prompt);
    int written = generate(generator, tokens + start, length, tokens, start, options, print_token, (void *)stop);
    printf("\n");
    for (int i = 0; i < written; i++) {
        text[i] = shown(tokens[start + i]);
    }
    log_line(log, "{\"event\":\"sample\",\"domain\":\"%s\",\"prompt\":%s,\"text\":%s}", domain,
             json_quote(quoted_prompt, sizeof quoted_prompt, prompt, count),
             json_quote(quoted, quoted_size, text, written));
    free(tokens);
    free(text);
    free(quoted);
}

void sample_texts(Transformer *model, const Config *config, const char *const *domains, const char *const *prompts,
                  int count, Log *log, const volatile sig_atomic_t *stop) {
    Generator generator;
    generator_open(&generator, config, model);
    if (config->train.prompt[0]) {
        sample_one(&generator, &config->train, 0, "prompt", config->train.prompt, log, stop);
    } else {
        for (int d = 0; d < count && !*stop; d++) {
            sample_one(&generator, &config->train, d, domains[d], prompts[d], log, stop);
        }
    }
    generator_close(&generator);
}
