/* The model reads its own output, one token at a time, keys and values of earlier tokens kept. Called by sample.c. */
#include "generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/random.h"

void generator_open(Generator *generator, const Config *config, Transformer *source) {
    *generator = (Generator){.config = *config};
    generator->config.model.capacity_factor = 0;
    generator->config.model.layout = LAYOUT_COMPACT;
    if (config->train.exchange == EXCHANGE_P2P) { /* other ranks' memory is open of the training's arena alone */
        generator->config.train.exchange = EXCHANGE_DEDUP;
    }
    int V = config->model.vocab;
    generator->work = calloc(2 * (size_t)V, sizeof(acc_t));
    generator->logits = calloc(V, sizeof(acc_t));
    CHECK(generator->work && generator->logits, "out of memory for a vocabulary of %d", V);
    transformer_reserve(&generator->model, &generator->config, 1, 1, USE_GENERATE, source, &generator->arena);
    arena_reserve(&generator->arena, (void **)&generator->tokens, sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&generator->arena);
    transformer_connect(&generator->model);
    transformer_set_step(&generator->model, source->context.host_step->number, NULL);
}

void generator_close(Generator *generator) {
    transformer_free(&generator->model);
    arena_free(&generator->arena);
    free(generator->work);
    free(generator->logits);
}

/* Probability of the least probable token that top_k and top_p leave in; probs (V) sum to 1, sorted (V) is scratch. */
static acc_t least_kept(const acc_t *probs, acc_t *sorted, int V, SampleOptions options) {
    int most = options.top_k > 0 && options.top_k < V ? options.top_k : V;
    memcpy(sorted, probs, sizeof(acc_t) * V);
    double mass = 0;
    for (int i = 0; i < most; i++) { /* a selection sort that stops as soon as enough is kept */
        int best = i;
        for (int j = i + 1; j < V; j++) {
            best = sorted[j] > sorted[best] ? j : best;
        }
        acc_t p = sorted[best];
        sorted[best] = sorted[i];
        sorted[i] = p;
        mass += p;
        if (mass >= options.top_p) {
            return p;
        }
    }
    return sorted[most - 1];
}

int sample_token(const acc_t *logits, int V, SampleOptions options, double uniform, acc_t *work) {
    int best = 0;
    for (int v = 1; v < V; v++) {
        best = logits[v] > logits[best] ? v : best;
    }
    if (options.temperature <= 0) {
        return best;
    }
    acc_t *probs = work;
    double sum = 0;
    for (int v = 0; v < V; v++) {
        probs[v] = exp(((double)logits[v] - logits[best]) / options.temperature);
        sum += probs[v];
    }
    for (int v = 0; v < V; v++) {
        probs[v] /= sum;
    }
    acc_t least = 0;
    if ((options.top_k > 0 && options.top_k < V) || options.top_p < 1) {
        least = least_kept(probs, work + V, V, options);
    }
    double kept = 0;
    for (int v = 0; v < V; v++) {
        kept += probs[v] >= least ? probs[v] : 0;
    }
    double place = uniform * kept;
    for (int v = 0; v < V; v++) {
        place -= probs[v] >= least ? probs[v] : 0;
        if (place < 0) {
            return v;
        }
    }
    return best; /* rounding left nothing over */
}

/* Reads tokens into an empty cache; the logits after the last are left in the model. */
static void read_prompt(Generator *generator, const int *tokens, int count) {
    for (int i = 0; i < count; i++) {
        device_from_host(generator->tokens, &tokens[i], sizeof(int), NULL);
        transformer_decode(&generator->model, generator->tokens, i, NULL);
    }
}

int generate(Generator *generator, int *out, int length, const int *prompt, int count, SampleOptions options,
             bool (*each)(int token, void *user), void *user) {
    int T = generator->config.model.seq, V = generator->config.model.vocab;
    int half = T / 2;
    int *context = calloc(T, sizeof(int)); /* what the cache holds */
    CHECK(context, "out of memory for a context of %d tokens", T);
    int position = count <= T ? count : half;
    memcpy(context, prompt + count - position, sizeof(int) * position);
    read_prompt(generator, context, position);
    uint64_t key = random_key(options.seed, RANDOM_SAMPLE, 0);
    int written = 0;
    while (written < length) {
        host_from_device(generator->logits, generator->model.logits_acc, sizeof(acc_t) * V, NULL);
        int token = sample_token(generator->logits, V, options, random_uniform(key, written), generator->work);
        out[written++] = token;
        if ((each && !each(token, user)) || written == length) {
            break;
        }
        if (position == T) {
            memmove(context, context + T - half, sizeof(int) * half);
            position = half;
            read_prompt(generator, context, position);
        }
        context[position] = token;
        device_from_host(generator->tokens, &token, sizeof(int), NULL);
        transformer_decode(&generator->model, generator->tokens, position, NULL);
        position++;
    }
    free(context);
    return written;
}
