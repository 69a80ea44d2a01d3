/* The model reads its own output, one token of each sequence at a time, keys and values of earlier tokens kept. Called
 * by sample.c and experiments/bench_generate.c. */
#include "generate.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/convert.h"
#include "../kernels/matmul.h"
#include "../kernels/random.h"
#include "router.h"

/* ---- the model: a token, or a prompt, for each sequence ---- */

/* The logits of hidden (B,C), as the host reads them. */
static void decode_head(Transformer *model, Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_HEAD, stream);
    matmul_forward(model->logits, model->hidden, model->head.w, model->N, c->dim, c->vocab, stream);
    acc_from_real(model->logits_acc, model->logits, (size_t)model->N * c->vocab, stream);
}

void transformer_decode(Transformer *model, const int *tokens, int position, Stream *stream) {
    assert(model->attention.decodes && position < model->attention.cached);
    transformer_forward_from(model, tokens, position, 0, stream);
    decode_head(model, stream);
}

/* A whole prompt, tokens (B, reader->T), into the cache; the logits behind the last token of each are left in the
 * model, as by reader->T calls of transformer_decode. */
static void decode_prompt(Transformer *model, Transformer *reader, const int *tokens, Stream *stream) {
    size_t C = model->config->dim, T = reader->T;
    transformer_forward(reader, tokens, 0, stream);
    for (int b = 0; b < model->B; b++) { /* the last token of each */
        device_copy(model->hidden + b * C, reader->hidden + (b * T + T - 1) * C, C * sizeof(real_t), stream);
    }
    decode_head(model, stream);
}

/* Every forward of the reader fills the model's cache from its first place on. */
static void share_cache(Transformer *reader, const Transformer *model) {
    reader->attention.cached = model->attention.cached;
    for (int l = 0; l < model->config->layers; l++) {
        reader->layers[l].attention.keys = model->layers[l].attention.keys;
        reader->layers[l].attention.values = model->layers[l].attention.values;
    }
}

/* ---- opening and closing ---- */

static void reserve_reader(Generator *generator, Transformer *source, int prompt) {
    generator->reader_config = generator->config;
    generator->reader_config.model.seq = prompt;
    generator->reader_config.train.recompute = RECOMPUTE_EXPERTS; /* layers take turns in what a backward would need */
    transformer_reserve(&generator->reader, &generator->reader_config, generator->B, 1, USE_READ, source,
                        &generator->arena);
}

void generator_open_batch(Generator *generator, const Config *config, Transformer *source, int batch, int prompt) {
    CHECK(batch >= 1 && batch <= GENERATE_MOST, "%d sequences side by side: give 1 to %d", batch, GENERATE_MOST);
    CHECK(prompt >= 0 && prompt <= config->model.seq, "prompts of %d tokens do not fit --seq %d: give fewer", prompt,
          config->model.seq);
    *generator = (Generator){.config = *config, .B = batch};
    generator->config.model.capacity_factor = 0;
    generator->config.model.layout = LAYOUT_COMPACT;
    if (config->train.exchange == EXCHANGE_P2P) { /* other ranks' memory is open of the training's arena alone */
        generator->config.train.exchange = EXCHANGE_DEDUP;
    }
    size_t V = config->model.vocab, most = prompt > 1 ? prompt : 1;
    generator->work = calloc(batch * 2 * V, sizeof(acc_t));
    readback_reserve(&generator->logits, batch * V * sizeof(acc_t));
    CHECK(generator->work, "out of memory for a vocabulary of %zu", V);
    transformer_reserve(&generator->model, &generator->config, batch, 1, USE_GENERATE, source, &generator->arena);
    if (prompt > 0 && !router_find(config->model.router)->sees_future) {
        reserve_reader(generator, source, prompt);
    }
    arena_reserve(&generator->arena, (void **)&generator->tokens, batch * most * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&generator->arena);
    transformer_connect(&generator->model);
    transformer_set_step(&generator->model, source->context.host_step->number, NULL);
    if (generator->reader.layers) {
        transformer_connect(&generator->reader);
        transformer_set_step(&generator->reader, source->context.host_step->number, NULL);
        share_cache(&generator->reader, &generator->model);
    }
}

void generator_open(Generator *generator, const Config *config, Transformer *source) {
    generator_open_batch(generator, config, source, 1, 0);
}

void generator_close(Generator *generator) {
    if (generator->reader.layers) {
        transformer_free(&generator->reader);
    }
    transformer_free(&generator->model);
    arena_free(&generator->arena);
    free(generator->work);
    readback_free(&generator->logits);
}

bool generator_reads_at_once(const Generator *generator, int count) {
    return generator->reader.layers && generator->reader.T == count;
}

/* ---- the draw ---- */

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

/* ---- texts ---- */

/* Reads contexts (B, .. T apart), `count` tokens of each, into an empty cache; the logits after the last are left in
 * the model. host (B, count at least) is scratch. */
static void read_prompt(Generator *generator, const int *contexts, int count, int *host) {
    int B = generator->B, T = generator->config.model.seq;
    bool at_once = generator_reads_at_once(generator, count);
    for (int first = 0; first < count; first += at_once ? count : 1) {
        int some = at_once ? count : 1;
        for (int b = 0; b < B; b++) {
            memcpy(host + b * some, contexts + (size_t)b * T + first, some * sizeof(int));
        }
        device_from_host(generator->tokens, host, (size_t)B * some * sizeof(int), NULL);
        if (at_once) {
            decode_prompt(&generator->model, &generator->reader, generator->tokens, NULL);
        } else {
            transformer_decode(&generator->model, generator->tokens, first, NULL);
        }
    }
}

/* The next token of each sequence, drawn for its place; the one wait of a round. */
static void draw(Generator *generator, int *drawn, int place, SampleOptions options) {
    size_t V = generator->config.model.vocab;
    int B = generator->B;
    readback_add(&generator->logits, generator->model.logits_acc, B * V * sizeof(acc_t), NULL);
    readback_queued(&generator->logits, NULL);
    readback_wait(&generator->logits);
    const acc_t *logits = (const acc_t *)generator->logits.host;
    double begin = seconds_now();
#pragma omp parallel for if (B > 1)
    for (int b = 0; b < B; b++) {
        double uniform = random_uniform(random_key(options.seed + (uint64_t)b, RANDOM_SAMPLE, 0), place);
        drawn[b] = sample_token(logits + b * V, (int)V, options, uniform, generator->work + 2 * b * V);
    }
    generator->drawing += seconds_now() - begin;
}

int generate_batch(Generator *generator, int *out, int length, const int *prompts, int count, SampleOptions options,
                   bool (*each)(const int *tokens, void *user), void *user) {
    int T = generator->config.model.seq, B = generator->B, half = T / 2;
    int *contexts = calloc((size_t)B * T, sizeof(int)); /* what the cache holds of each sequence */
    int *drawn = calloc((size_t)B * T, sizeof(int));    /* the tokens of a round; scratch of read_prompt */
    CHECK(contexts && drawn, "out of memory for %d contexts of %d tokens", B, T);
    int position = count <= T ? count : half;
    for (int b = 0; b < B; b++) {
        memcpy(contexts + (size_t)b * T, prompts + (size_t)(b + 1) * count - position, sizeof(int) * position);
    }
    int written = 0;
    if (length > 0) {
        read_prompt(generator, contexts, position, drawn);
    }
    while (written < length) {
        draw(generator, drawn, written, options);
        for (int b = 0; b < B; b++) {
            out[(size_t)b * length + written] = drawn[b];
        }
        written++;
        if ((each && !each(drawn, user)) || written == length) {
            break;
        }
        if (position == T) {
            for (int b = 0; b < B; b++) {
                memmove(contexts + (size_t)b * T, contexts + (size_t)(b + 1) * T - half, sizeof(int) * half);
            }
            position = half;
            read_prompt(generator, contexts, position, drawn);
            for (int b = 0; b < B; b++) { /* it was scratch */
                drawn[b] = out[(size_t)b * length + written - 1];
            }
        }
        for (int b = 0; b < B; b++) {
            contexts[(size_t)b * T + position] = drawn[b];
        }
        device_from_host(generator->tokens, drawn, B * sizeof(int), NULL);
        transformer_decode(&generator->model, generator->tokens, position, NULL);
        position++;
    }
    free(drawn);
    free(contexts);
    return written;
}

typedef struct {
    bool (*each)(int token, void *user);
    void *user;
} Single;

static bool each_single(const int *tokens, void *single) {
    const Single *s = single;
    return s->each(tokens[0], s->user);
}

int generate(Generator *generator, int *out, int length, const int *prompt, int count, SampleOptions options,
             bool (*each)(int token, void *user), void *user) {
    Single single = {each, user};
    assert(generator->B == 1);
    return generate_batch(generator, out, length, prompt, count, options, each ? each_single : NULL, &single);
}
