/* Speed of generation: prompts and new tokens apart, over the number of sequences side by side, on a CPU or a GPU.
 *
 *     build/bench_generate --checkpoint runs/demo         a run's model (or a folder of Hugging Face transformers)
 *     build/bench_generate_cuda --model tiny              fresh weights of a model of bench_models.h: what a token
 *                                                         takes hardly depends on what the weights are
 *     build/bench_generate --model cpu-default --router topk --top-k 1       .. with other options of ./train
 *
 *     --batches 1,2,4,8,16,32,64   sequences side by side, one JSON line for each
 *     --prompt N --new N           tokens of a prompt (default: half the context) and behind it (32, or what fits)
 *     --at-once 1|0                1: a prompt in one forward; 0: token by token through the cache
 *     --temperature X              0 (default): the most probable token; else draws
 *     --repeats 3  --seed 17  --sequences 1000            of the estimate below
 *
 * A line, "kind":"inference" (times are objects of bench_times.h, in ms; warm-up is a prompt and two tokens):
 *
 *   first_ms   from the call to the first token of every sequence in the host's hands: the prompt, and one draw
 *   token_ms   between the tokens behind it, of all sequences together: decode, copy of the logits, draw
 *   prompt_tok_s = batch * prompt / first_ms        tok_s = batch / mean of token_ms        (means over all repeats)
 *   draw_ms    of token_ms, the host's own part: choosing from logits on its threads
 *   text       checksum of the first sequence's tokens: the same for every batch on the CPU, unless the router's tokens
 *              see other sequences ("sees_batch")
 *   waits_per_token   how often the host waited for the device in a round: once, for the logits
 *   memory_mib of the arenas, by category; peak_mib: of the process, or allocated on the GPU, so far
 *   eta        how long --sequences such texts take at this batch:
 *              fixed_s + ceil(sequences / batch) * (first_ms + (new - 1) * token_ms) / 1000
 *
 * All prompts of a batch have the same length: sequences walk in step (generate.h), so there are no lengths to sort
 * into buckets, and new tokens are capped by --new. Tokens are not printed.
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/checksum.h"
#include "../kernels/random.h"
#include "../model/config.h"
#include "../model/cost.h"
#include "../model/generate.h"
#include "../model/import.h"
#include "../model/router.h"
#include "../model/transformer.h"
#include "bench.h"
#include "bench_models.h"
#include "bench_provenance.h"
#include "bench_times.h"

enum { MOST_WORDS = 256 };

typedef struct {
    const char *checkpoint, *model, *batches;
    int prompt, fresh, at_once, repeats, seed, sequences;
    double temperature;
} Options;

/* The model whose weights all generators share. */
typedef struct {
    Config config;
    Transformer model;
    Arena arena;
    double fixed; /* seconds that opening it took */
} Source;

/* ---- the model ---- */

static const Model *find_model(const char *name) {
    for (int i = 0; i < MODEL_COUNT; i++) {
        if (strcmp(MODELS[i].name, name) == 0) {
            return &MODELS[i];
        }
    }
    die(__FILE__, __LINE__, "--model %s is not known: see the table in experiments/bench_models.h", name);
}

static bool among(const char *word, char **words, int count) {
    for (int i = 0; i < count; i++) {
        if (strcmp(words[i], word) == 0) {
            return true;
        }
    }
    return false;
}

/* The named model's options, but for those that the words give themselves. */
static void configure(Config *config, const Options *o, char **words, int count) {
    char error[512], text[512], *all[MOST_WORDS] = {"bench_generate"};
    int used = 1;
    if (o->checkpoint) {
        CHECK(count == 0, "%s: the model is that of --checkpoint %s; drop it", words[0], o->checkpoint);
        CHECK(import_config(config, o->checkpoint, error, sizeof error), "--checkpoint %s: %s", o->checkpoint, error);
    } else {
        snprintf(text, sizeof text, "%s", find_model(o->model)->options);
        for (char *name = strtok(text, " "); name; name = strtok(NULL, " ")) {
            char *value = strtok(NULL, " ");
            if (!among(name, words, count)) {
                all[used++] = name;
                all[used++] = value;
            }
        }
        CHECK(used + count <= MOST_WORDS, "%d words are too many for a command line", count);
        memcpy(all + used, words, count * sizeof(char *));
        config_parse(config, used + count, all);
    }
    config->train.ep = 1;
    config_finish(config);
    CHECK(config->model.objective == OBJECTIVE_LM,
          "a model of masked tokens (--objective mlm) does not generate: take one of --objective lm");
}

static void open_source(Source *s, const Options *o, char **words, int count) {
    double begin = seconds_now();
    *s = (Source){0};
    configure(&s->config, o, words, count);
    transformer_reserve(&s->model, &s->config, 1, 1, USE_READ, NULL, &s->arena);
    arena_commit(&s->arena);
    transformer_connect(&s->model);
    acc_t *host = calloc(s->model.tensors.total, sizeof(acc_t));
    CHECK(host, "out of memory for %zu weights", s->model.tensors.total);
    transformer_init(&s->model, host, (uint64_t)o->seed, NULL);
    if (o->checkpoint) {
        import_weights(host, &s->model.tensors, &s->config.model, o->checkpoint, false);
    }
    transformer_load(&s->model, host);
    device_wait(NULL);
    free(host);
    s->fixed = seconds_now() - begin;
}

/* ---- one batch ---- */

typedef struct {
    Times first, token;
    double begin, last; /* of the text at hand: when it was asked for, when the last token came */
    bool started;
    uint32_t text; /* checksum of the first sequence's tokens */
} Clock;

static bool stamp(const int *tokens, void *user) {
    Clock *clock = user;
    double now = seconds_now();
    times_add(clock->started ? &clock->token : &clock->first, 1e3 * (now - clock->last));
    clock->started = true;
    clock->last = now;
    return true;
}

static double mean_ms(const Times *times) {
    double sum = 0;
    for (int i = 0; i < times->count; i++) {
        sum += times->ms[i];
    }
    return times->count > 0 ? sum / times->count : 0;
}

static void print_line(const Source *s, const Generator *g, const Options *o, const Clock *clock, double draw_ms,
                       double waits, double fixed, const char *device) {
    const ModelConfig *c = &s->config.model;
    const Router *router = router_find(c->router);
    double first = mean_ms(&clock->first), token = mean_ms(&clock->token), rounds = ceil((double)o->sequences / g->B);
    printf("{\"kind\":\"inference\",");
    print_time();
    printf(",\"impl\":\"moelab\"");
    print_text("model", o->checkpoint ? o->checkpoint : o->model);
    print_text("weights", o->checkpoint ? "trained" : "fresh");
    print_text("router", c->router);
    printf(
        ",\"batch\":%d,\"prompt\":%d,\"new\":%d,\"seq\":%d,\"vocab\":%d,\"layers\":%d,\"dim\":%d,\"experts\":%d,"
        "\"top_k\":%d,\"params_total\":%zu,\"params_active\":%zu,\"at_once\":%s,\"sees_batch\":%s,\"temperature\":%g,"
        "\"seed\":%d,\"repeats\":%d,\"dtype\":\"" REAL_NAME "\"",
        g->B, o->prompt, o->fresh, c->seq, c->vocab, c->layers, c->dim, c->experts, c->top_k,
        tensors_parameters(&s->model.tensors), transformer_active_parameters(&s->model),
        generator_reads_at_once(g, o->prompt) ? "true" : "false", router->sees_batch ? "true" : "false", o->temperature,
        o->seed, o->repeats);
    times_print("first_ms", &clock->first);
    times_print("token_ms", &clock->token);
    printf(",\"prompt_tok_s\":%.6g,\"tok_s\":%.6g,\"draw_ms\":%.6g,\"waits_per_token\":%.4g,\"memory_mib\":{",
           1e3 * g->B * o->prompt / first, token > 0 ? 1e3 * g->B / token : 0, draw_ms, waits);
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        printf("\"%s\":%.3f,", memory_category_name(i), (s->arena.category[i] + g->arena.category[i]) / 1048576.0);
    }
    printf(
        "\"all\":%.3f},\"text\":\"%08x\",\"peak_mib\":%.1f,\"eta\":{\"sequences\":%d,\"seconds\":%.6g,\"fixed_s\":%."
        "6g}",
        (s->arena.bytes + g->arena.bytes) / 1048576.0, (unsigned)clock->text, device_peak_memory() / 1048576.0,
        o->sequences, fixed + rounds * (first + (o->fresh - 1) * token) / 1e3, fixed);
    print_provenance(device);
    printf("}\n");
    fflush(stdout);
}

static void bench_batch(Source *s, int batch, const Options *o, const char *device) {
    Generator g;
    Clock clock = {0};
    double begin = seconds_now();
    size_t prompts_count = (size_t)batch * o->prompt;
    int *prompts = calloc(prompts_count, sizeof(int)), *out = calloc((size_t)batch * o->fresh, sizeof(int));
    CHECK(prompts && out, "out of memory for %d prompts of %d tokens", batch, o->prompt);
    for (size_t i = 0; i < prompts_count; i++) {
        uint64_t key = random_key((uint64_t)o->seed, RANDOM_TEST, 0);
        prompts[i] = (int)random_below(key, i, (uint64_t)s->config.model.vocab);
    }
    generator_open_batch(&g, &s->config, &s->model, batch, o->at_once ? o->prompt : 0);
    SampleOptions options = {.temperature = o->temperature, .top_p = 1, .seed = (uint64_t)o->seed};
    generate_batch(&g, out, o->fresh < 2 ? o->fresh : 2, prompts, o->prompt, options, NULL, NULL);
    double fixed = s->fixed + seconds_now() - begin;
    int64_t waits = device_waits();
    g.drawing = 0;
    for (int i = 0; i < o->repeats; i++) {
        clock.last = seconds_now();
        clock.started = false;
        generate_batch(&g, out, o->fresh, prompts, o->prompt, options, stamp, &clock);
        times_end_repeat(&clock.first);
        times_end_repeat(&clock.token);
    }
    clock.text = crc32c(0, out, o->fresh * sizeof(int));
    double tokens = (double)o->repeats * o->fresh;
    print_line(s, &g, o, &clock, 1e3 * g.drawing / tokens, (device_waits() - waits) / tokens, fixed, device);
    fprintf(stderr, "eta: %d texts of %d + %d tokens, %d side by side: %.1f s\n", o->sequences, o->prompt, o->fresh,
            batch,
            fixed + ceil((double)o->sequences / batch) *
                        (mean_ms(&clock.first) + (o->fresh - 1) * mean_ms(&clock.token)) / 1e3);
    times_free(&clock.first);
    times_free(&clock.token);
    generator_close(&g);
    free(prompts);
    free(out);
}

/* ---- the command line ---- */

/* Reads what is this program's own; the rest is for ./train's table. Returns how many words that is. */
static int read_options(Options *o, int argc, char **argv, char **rest) {
    const struct {
        const char *name;
        int *number;
        const char **text;
    } own[] = {
        {"--checkpoint", NULL, &o->checkpoint}, {"--model", NULL, &o->model}, {"--batches", NULL, &o->batches},
        {"--prompt", &o->prompt, NULL},         {"--new", &o->fresh, NULL},   {"--at-once", &o->at_once, NULL},
        {"--repeats", &o->repeats, NULL},       {"--seed", &o->seed, NULL},   {"--sequences", &o->sequences, NULL}};
    int count = 0;
    for (int i = 1; i < argc; i++) {
        bool found = strcmp(argv[i], "--temperature") == 0;
        char *end = "";
        if (found) {
            CHECK(i + 1 < argc, "%s needs a value", argv[i]);
            o->temperature = strtod(argv[++i], &end);
            CHECK(!*end && end > argv[i] && o->temperature >= 0, "--temperature %s: give 0 or more", argv[i]);
            continue;
        }
        for (size_t f = 0; f < sizeof own / sizeof *own && !found; f++) {
            if (strcmp(argv[i], own[f].name) != 0) {
                continue;
            }
            CHECK(i + 1 < argc, "%s needs a value", argv[i]);
            found = true;
            if (own[f].text) {
                *own[f].text = argv[++i];
                continue;
            }
            long value = strtol(argv[++i], &end, 10);
            CHECK(!*end && end > argv[i] && value >= 0 && value <= INT_MAX, "%s %s: give a whole number", argv[i - 1],
                  argv[i]);
            *own[f].number = (int)value;
        }
        if (!found) {
            CHECK(count < MOST_WORDS, "%d words are too many for a command line", argc);
            rest[count++] = argv[i];
        }
    }
    return count;
}

/* The first number of a list, which goes on behind it. */
static int next_batch(const char **list, const Options *o) {
    char *end;
    long batch = strtol(*list, &end, 10);
    CHECK(end > *list && (*end == ',' || !*end) && batch >= 1 && batch <= GENERATE_MOST,
          "--batches %s: give numbers from 1 to %d, with commas between them", o->batches, GENERATE_MOST);
    *list = end + (*end == ',');
    return (int)batch;
}

static void check(Options *o, const ModelConfig *c) {
    const char *next = o->batches;
    do {
        next_batch(&next, o);
    } while (*next);
    o->prompt = o->prompt > 0 ? o->prompt : (c->seq + 1) / 2;
    CHECK(o->prompt <= c->seq, "--prompt %d is longer than the model's context of %d tokens: give fewer", o->prompt,
          c->seq);
    int room = c->seq - o->prompt + 1; /* the last token is drawn, not read */
    o->fresh = o->fresh > 0 ? o->fresh : room < 32 ? room : 32;
    CHECK(o->fresh <= room, "--prompt %d and --new %d do not fit the model's context of %d tokens: give fewer",
          o->prompt, o->fresh, c->seq);
    CHECK(o->repeats >= 1 && o->repeats <= TIMES_REPEATS, "--repeats %d: give 1 to %d", o->repeats, TIMES_REPEATS);
    CHECK(o->sequences >= 1, "--sequences %d: give at least 1", o->sequences);
}

int main(int argc, char **argv) {
    Options o = {.batches = "1,2,4,8,16,32,64", .at_once = 1, .repeats = 3, .seed = 17, .sequences = 1000};
    char *rest[MOST_WORDS], device[128];
    int count = read_options(&o, argc, argv, rest);
    CHECK(!o.checkpoint || !o.model, "--checkpoint %s --model %s: give one of them", o.checkpoint, o.model);
    device_open(0, 1);
    device_describe(device, sizeof device);
    o.model = o.model ? o.model : device_runs_ahead() ? "tiny" : "cpu-default";
    Source source;
    open_source(&source, &o, rest, count);
    check(&o, &source.config.model);
    for (const char *next = o.batches; *next;) {
        bench_batch(&source, next_batch(&next, &o), &o, device);
    }
    transformer_free(&source.model);
    arena_free(&source.arena);
    return 0;
}
