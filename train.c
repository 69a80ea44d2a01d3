/* Trains a mixture-of-experts language model.
 *
 *     ./train --data builtin --router topk --experts 8 --top-k 2 --steps 1000 --out runs/demo
 *
 * The whole program is the loop in train(): read a batch, forward, loss, backward, step, log, evaluate, save. Every
 * step is a function of the configuration and its number alone, so a run that is stopped and resumed goes on with the
 * same bits.
 *
 * Read next: model/transformer.c (what a step computes), model/moe.c (the layer this project is about), model/router.h
 * (what a router is).
 */
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/corpus.h"
#include "kernels/check.h"
#include "kernels/cross_entropy.h"
#include "kernels/device.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/evaluate.h"
#include "model/figures.h"
#include "model/generate.h"
#include "model/log.h"
#include "model/optimizer.h"
#include "model/report.h"
#include "model/router.h"
#include "model/transformer.h"

/* Where a batch passes through: one forward's tokens and targets (N), and for evaluation the targets' domains and
 * floors. */
typedef struct {
    int *host_tokens, *host_targets;
    int *tokens, *targets; /* device */
    unsigned char *domain;
    double *floor;
} BatchBuffers;

typedef struct {
    Config config;
    Corpus *corpus;
    const char *domains[256]; /* names */
    Arena arena;
    Transformer model;
    Optimizer optimizer;
    BatchBuffers batch;
    acc_t *loss; /* device: mean over the step's slices */
    Log log;
    Profile profile;
    int64_t step;         /* steps done */
    double train_seconds; /* of steps alone: no evaluation, no saving */
    double val_loss;      /* of the last evaluation */
    bool terminal;        /* progress line instead of plain lines */
} Run;

/* ---- signals: the first asks the loop to save and stop, a second ends at once ---- */

static volatile sig_atomic_t stop_signal = 0;

static void ask_to_stop(int number) {
    if (stop_signal) {
        _exit(128 + number);
    }
    stop_signal = number;
}

static void catch_signals(void) {
    struct sigaction action = {.sa_handler = ask_to_stop};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

/* ---- saving and resuming ---- */

static CheckpointState checkpoint_state(const Run *run) {
    size_t total = run->model.tensors.total;
    CheckpointState state = {.tensors = &run->model.tensors};
    state.weights = calloc(total, sizeof(acc_t));
    state.m = calloc(total, sizeof(acc_t));
    state.v = calloc(total, sizeof(acc_t));
    CHECK(state.weights && state.m && state.v, "out of memory for the host copy of a checkpoint of %zu parameters",
          total);
    return state;
}

static void checkpoint_state_free(CheckpointState *state) {
    free(state->weights);
    free(state->m);
    free(state->v);
}

/* False when it could not be saved: the run goes on and the checkpoint before stays. */
static bool save(Run *run) {
    CheckpointState state = checkpoint_state(run);
    size_t bytes = run->model.tensors.total * sizeof(acc_t);
    AdamState adam;
    char error[512], *json = config_to_json(&run->config);
    transformer_store(&run->model, state.weights);
    host_from_device(state.m, run->optimizer.m, bytes, NULL);
    host_from_device(state.v, run->optimizer.v, bytes, NULL);
    host_from_device(&adam, run->optimizer.state, sizeof adam, NULL);
    state.step = run->step;
    state.adam_step = adam.updates;
    state.skipped = adam.skipped;
    state.tokens = run->step * run->config.train.batch * run->config.model.seq;
    state.train_seconds = run->train_seconds;
    bool saved = checkpoint_save(run->config.train.out, &state, json, error, sizeof error);
    if (saved) {
        log_line(&run->log, "{\"event\":\"checkpoint\",\"step\":%lld}", (long long)run->step);
    } else {
        fprintf(stderr, "moelab: step %lld not saved: %s\n", (long long)run->step, error);
    }
    free(json);
    checkpoint_state_free(&state);
    return saved;
}

static void resume(Run *run) {
    CheckpointState state = checkpoint_state(run);
    size_t bytes = run->model.tensors.total * sizeof(acc_t);
    checkpoint_load(run->config.train.resume, &state);
    transformer_load(&run->model, state.weights);
    device_from_host(run->optimizer.m, state.m, bytes, NULL);
    device_from_host(run->optimizer.v, state.v, bytes, NULL);
    AdamState adam = {.updates = state.adam_step, .skipped = state.skipped};
    device_from_host(run->optimizer.state, &adam, sizeof adam, NULL);
    run->step = state.step;
    run->train_seconds = state.train_seconds;
    checkpoint_state_free(&state);
}

/* ---- starting ---- */

static void open_corpus(Run *run) {
    const Config *c = &run->config;
    CorpusOptions options = {.train = c->train.data,
                             .val = c->train.val,
                             .seq = c->model.seq,
                             .batch = c->train.batch,
                             .vocab = c->model.vocab,
                             .shuffle = c->train.shuffle,
                             .seed = c->train.seed};
    run->corpus = corpus_open(&options);
    for (int d = 0; d < corpus_domains(run->corpus); d++) {
        run->domains[d] = corpus_domain_name(run->corpus, d);
    }
}

static void open_batch(BatchBuffers *batch, size_t N, Arena *arena) {
    batch->host_tokens = calloc(N, sizeof(int));
    batch->host_targets = calloc(N, sizeof(int));
    batch->domain = calloc(N, 1);
    batch->floor = calloc(N, sizeof(double));
    CHECK(batch->host_tokens && batch->host_targets && batch->domain && batch->floor,
          "out of memory for a batch of %zu tokens", N);
    arena_reserve(arena, (void **)&batch->tokens, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&batch->targets, N * sizeof(int), MEMORY_ACTIVATIONS);
}

static void free_batch(BatchBuffers *batch) {
    free(batch->host_tokens);
    free(batch->host_targets);
    free(batch->domain);
    free(batch->floor);
}

static void open_model(Run *run) {
    const Config *c = &run->config;
    int slices = c->train.grad_accum, batch = c->train.batch / slices;
    transformer_reserve(&run->model, c, batch, slices, USE_TRAIN, NULL, &run->arena);
    optimizer_reserve(&run->optimizer, &run->model.tensors, c->train.freeze, &run->arena);
    open_batch(&run->batch, (size_t)batch * c->model.seq, &run->arena);
    arena_reserve(&run->arena, (void **)&run->loss, sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_commit(&run->arena);
    transformer_connect(&run->model);
    if (c->train.resume[0]) {
        resume(run);
        return;
    }
    acc_t *host = calloc(run->model.tensors.total, sizeof(acc_t));
    CHECK(host, "out of memory for %zu initial weights", run->model.tensors.total);
    tensors_init(&run->model.tensors, host, c->train.seed);
    transformer_load(&run->model, host);
    free(host);
}

static void open_log(Run *run) {
    char device[128];
    device_describe(device, sizeof device);
    LogHeader header = {.device = device,
                        .params_total = tensors_parameters(&run->model.tensors),
                        .params_active = transformer_active_parameters(&run->model),
                        .flops_per_token = transformer_flops_per_token(&run->model),
                        .domain_count = corpus_domains(run->corpus),
                        .domains = run->domains,
                        .moe_layer_count = run->model.moe_count,
                        .moe_layers = run->model.moe_layers,
                        .leaky = !router_find(run->config.model.router)->causal};
    log_open(&run->log, &run->config, &header, run->config.train.resume[0] ? run->step : -1);
    char memory[512];
    int length = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        length += snprintf(memory + length, sizeof memory - length, ",\"%s\":%zu", memory_category_name(i),
                           run->arena.category[i]);
    }
    log_line(&run->log, "{\"event\":\"memory\"%s}", memory);
}

static void print_start(const Run *run) {
    const ModelConfig *m = &run->config.model;
    const TrainConfig *t = &run->config.train;
    char device[128];
    device_describe(device, sizeof device);
    printf("model    %d layers, width %d, router %s", m->layers, m->dim, m->router);
    if (run->model.moe_count > 0) {
        printf(", %d experts of width %d, %d per token", m->experts, m->expert_dim, m->top_k);
    }
    printf("; %.2f M parameters, %.2f M active\n", tensors_parameters(&run->model.tensors) / 1e6,
           transformer_active_parameters(&run->model) / 1e6);
    printf("data     %s; %d steps of %d x %d tokens\n", t->data, t->steps, t->batch, m->seq);
    printf("device   %s\n", device);
    printf("memory  ");
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        if (run->arena.category[i] > 0) {
            printf(" %s %.1f MiB%s", memory_category_name(i), run->arena.category[i] / 1048576.0,
                   i < MEMORY_ACTIVATIONS ? "," : "");
        }
    }
    printf("\nrun      %s%s\n", t->out, t->resume[0] ? " (resumed)" : "");
    fflush(stdout);
}

/* ---- one step ---- */

/* Reads one slice of a step to the device. */
static void read_batch(Run *run, Split split, int64_t step, int slice) {
    BatchBuffers *b = &run->batch;
    bool evaluation = split == SPLIT_VAL;
    Batch batch = {b->host_tokens, b->host_targets, evaluation ? b->domain : NULL, evaluation ? b->floor : NULL};
    int count = run->model.B;
    corpus_batch(run->corpus, split, step, slice * count, count, &batch);
    device_from_host(b->tokens, b->host_tokens, run->model.N * sizeof(int), NULL);
    device_from_host(b->targets, b->host_targets, run->model.N * sizeof(int), NULL);
}

static void train_step(Run *run) {
    const TrainConfig *t = &run->config.train;
    Transformer *model = &run->model;
    model->profile = t->profile ? &run->profile : NULL;
    profile_start(model->profile, NULL);
    for (int slice = 0; slice < t->grad_accum; slice++) {
        read_batch(run, SPLIT_TRAIN, run->step, slice);
        profile_lap(model->profile, STAGE_OTHER, NULL);
        transformer_forward(model, run->batch.tokens, slice, NULL);
        transformer_loss(model, run->batch.targets, slice, true, NULL);
        transformer_backward(model, run->batch.tokens, NULL);
    }
    mean_forward(run->loss, model->slice_loss, t->grad_accum, NULL);
    optimizer_step(&run->optimizer, model, run->loss, t, run->step, NULL);
    model->profile = NULL;
    run->step++;
}

/* ---- what a step tells ---- */

/* A line per logged step, or on a terminal one line that is written over. */
static void print_progress(const Run *run, const StepFigures *f, double seconds) {
    const TrainConfig *t = &run->config.train;
    double tokens = (double)t->batch * run->config.model.seq;
    int left = (int)((t->steps - run->step) * seconds + 0.5);
    if (run->terminal) {
        char bar[25];
        int done = (int)(24 * run->step / t->steps);
        memset(bar, '.', sizeof bar - 1);
        memset(bar, '#', done);
        bar[24] = 0;
        printf("\r[%s] %lld/%d  loss %.3f  val %.3f  router grad %.1e  %.0f tok/s  %d:%02d left ", bar,
               (long long)run->step, t->steps, f->loss, run->val_loss, f->norms.router, tokens / seconds, left / 60,
               left % 60);
    } else {
        printf(
            "step %5lld/%d  loss %.4f  aux %.3f  grad %.3f  router grad %.2e  load cv %.2f  %.1f ms  %.0f tok/s  "
            "%d:%02d left\n",
            (long long)run->step, t->steps, f->loss, f->aux, f->norms.total, f->norms.router, f->load.cv, 1e3 * seconds,
            tokens / seconds, left / 60, left % 60);
    }
    fflush(stdout);
}

/* A router without a gradient trains silently: this is where it is heard. */
static void raise_alarms(Run *run, const StepFigures *f) {
    const TrainConfig *t = &run->config.train;
    bool learns =
        router_find(run->config.model.router)->learned && run->model.moe_count > 0 && t->freeze != FREEZE_ROUTER;
    if (learns && f->norms.router == 0) {
        printf("%salarm: the router's gradient is zero at step %lld: it learns nothing\n", run->terminal ? "\n" : "",
               (long long)run->step);
        log_line(&run->log, "{\"event\":\"alarm\",\"step\":%lld,\"reason\":\"router gradient is zero\"}",
                 (long long)run->step);
    }
    if (f->adam.skipped_in_row > 0) {
        printf("%sstep %lld: loss or gradient is not finite; step skipped (%lld in a row)\n", run->terminal ? "\n" : "",
               (long long)run->step, (long long)f->adam.skipped_in_row);
        log_line(&run->log, "{\"event\":\"skip\",\"step\":%lld,\"in_a_row\":%lld}", (long long)run->step,
                 (long long)f->adam.skipped_in_row);
    }
    if (f->adam.skipped_in_row >= t->max_skips) {
        save(run);
        die(__FILE__, __LINE__,
            "%lld steps in a row had a loss or gradient that is not finite; stopped at step %lld with the weights "
            "before them: lower "
            "--lr (%g) or look at the data",
            (long long)f->adam.skipped_in_row, (long long)run->step, t->lr);
    }
}

static void write_report(const Run *run) {
    char error[512];
    if (!report_write(run->config.train.out, error, sizeof error)) {
        fprintf(stderr, "moelab: no report: %s\n", error);
    }
}

static void run_evaluation(Run *run) {
    const TrainConfig *t = &run->config.train;
    Transformer *model = &run->model;
    Evaluation e = evaluation_start(model, corpus_domains(run->corpus));
    transformer_set_dropless(model, !t->eval_drop);
    for (int i = 0; i < t->eval_batches * t->grad_accum; i++) {
        read_batch(run, SPLIT_VAL, i / t->grad_accum, i % t->grad_accum);
        transformer_forward(model, run->batch.tokens, 0, NULL);
        transformer_loss(model, run->batch.targets, 0, false, NULL);
        evaluation_add(&e, model, run->batch.domain, run->batch.floor, NULL);
    }
    transformer_set_dropless(model, false);
    evaluation_finish(&e, corpus_bytes_per_token(run->corpus));
    evaluation_log(&e, &run->log, run->domains, run->step, run->step * t->batch * run->config.model.seq);
    run->val_loss = e.loss;
    printf("%sstep %5lld  validation %.4f nats, %.4f bits per byte", run->terminal ? "\r\033[K" : "",
           (long long)run->step, e.loss, e.bits_per_byte);
    if (corpus_has_floor(run->corpus)) {
        printf(", floor %.4f (x%.2f):", e.floor, e.loss / e.floor);
        for (int d = 0; d < e.domains; d++) {
            printf(" %s x%.2f", run->domains[d], e.domain_loss[d] / e.domain_floor[d]);
        }
    }
    printf("\n");
    fflush(stdout);
    evaluation_free(&e);
    write_report(run);
}

/* ---- the loop ---- */

/* Whether something that happens every n steps (0: never) happens now. */
static bool is_due(const Run *run, int every) {
    return every > 0 && run->step % every == 0;
}

static void train(Run *run) {
    const TrainConfig *t = &run->config.train;
    double since_log = 0;
    int64_t logged = run->step;
    if (run->step == 0 && t->eval_batches > 0) {
        run_evaluation(run);
    }
    while (run->step < t->steps && !stop_signal) {
        double start = seconds_now();
        train_step(run);
        double seconds = seconds_now() - start;
        run->train_seconds += seconds;
        since_log += seconds;
        bool last = run->step == t->steps;
        if (is_due(run, t->log_every) || last) {
            StepFigures figures = figures_read(&run->model, &run->optimizer, run->loss, NULL);
            double mean = since_log / (run->step - logged);
            figures_log(&figures, &run->log, &run->config, run->step, mean);
            print_progress(run, &figures, mean);
            raise_alarms(run, &figures);
            figures_free(&figures);
            since_log = 0;
            logged = run->step;
        }
        if (t->eval_batches > 0 && (is_due(run, t->eval_every) || last)) {
            run_evaluation(run);
        }
        if (is_due(run, t->save_every) && !last) {
            save(run);
        }
    }
}

/* ---- the end of a run ---- */

static bool print_token(int token, void *user) {
    putchar(token < 256 ? token : '?');
    fflush(stdout);
    return true;
}

static void sample_one(Run *run, Generator *generator, const char *domain, const char *prompt) {
    const TrainConfig *t = &run->config.train;
    int count = strlen(prompt), length = t->sample;
    int *tokens = calloc(count + length, sizeof(int));
    char *text = calloc(length + 1, 1), quoted_prompt[2 * CONFIG_TEXT], *quoted = calloc(6 * (size_t)length + 3, 1);
    CHECK(tokens && text && quoted, "out of memory for a sample of %d tokens", length);
    for (int i = 0; i < count; i++) {
        tokens[i] = (unsigned char)prompt[i];
    }
    SampleOptions options = {t->temperature, t->top_p, t->sample_top_k, t->seed};
    printf("\n--- %s ---\n%s", domain, prompt);
    int written = generate(generator, tokens + count, length, tokens, count, options, print_token, NULL);
    printf("\n");
    for (int i = 0; i < written; i++) {
        text[i] = tokens[count + i];
    }
    log_line(&run->log, "{\"event\":\"sample\",\"domain\":\"%s\",\"prompt\":%s,\"text\":%s}", domain,
             json_quote(quoted_prompt, sizeof quoted_prompt, prompt, count),
             json_quote(quoted, 6 * (size_t)length + 3, text, written));
    free(tokens);
    free(text);
    free(quoted);
}

static void sample(Run *run) {
    const TrainConfig *t = &run->config.train;
    Generator generator;
    generator_open(&generator, &run->config, &run->model);
    if (t->prompt[0]) {
        sample_one(run, &generator, "prompt", t->prompt);
    } else {
        for (int d = 0; d < corpus_domains(run->corpus); d++) {
            const char *prompt = corpus_prompt(run->corpus, d);
            sample_one(run, &generator, run->domains[d], prompt[0] ? prompt : "\n");
        }
    }
    generator_close(&generator);
}

static void print_profile(const Profile *profile) {
    double total = 0;
    for (int i = 0; i < STAGE_COUNT; i++) {
        total += profile->seconds[i];
    }
    printf("\nstage      seconds   share\n");
    for (int i = 0; i < STAGE_COUNT; i++) {
        if (profile->seconds[i] > 0) {
            printf("%-10s %7.2f  %5.1f %%\n", stage_name(i), profile->seconds[i], 100 * profile->seconds[i] / total);
        }
    }
}

static void print_end(const Run *run) {
    const TrainConfig *t = &run->config.train;
    double tokens = (double)run->step * t->batch * run->config.model.seq;
    if (t->profile) {
        print_profile(&run->profile);
    }
    printf("\ntrained  %lld steps, %.2f M tokens in %.1f s (%.0f tokens/s, %.0f GFLOP/s)\n", (long long)run->step,
           tokens / 1e6, run->train_seconds, tokens / run->train_seconds,
           tokens / run->train_seconds * transformer_flops_per_token(&run->model) / 1e9);
    printf("memory   %.1f MiB at the peak\n", device_peak_memory() / 1048576.0);
    printf("report   %s/report.html\n", t->out);
}

int main(int argc, char **argv) {
    Run run = {.terminal = isatty(STDOUT_FILENO), .val_loss = NAN};
    config_parse(&run.config, argc, argv);
    config_finish(&run.config);
    catch_signals();
    open_corpus(&run);
    open_model(&run);
    open_log(&run);
    print_start(&run);
    train(&run);

    bool interrupted = run.step < run.config.train.steps;
    bool saved = save(&run);
    if (!interrupted && run.config.train.sample > 0) {
        sample(&run);
    }
    log_line(&run.log, "{\"event\":\"end\",\"step\":%lld,\"train_seconds\":%.6g,\"peak_bytes\":%zu}",
             (long long)run.step, run.train_seconds, device_peak_memory());
    write_report(&run);
    log_close(&run.log);
    if (!interrupted) {
        print_end(&run);
    } else if (saved) {
        printf("\nstopped by a signal at step %lld; saved. Go on with: %s --resume %s\n", (long long)run.step, argv[0],
               run.config.train.out);
    }
    corpus_close(run.corpus);
    transformer_free(&run.model);
    optimizer_free(&run.optimizer);
    free_batch(&run.batch);
    arena_free(&run.arena);
    return !saved ? EXIT_ERROR : interrupted ? EXIT_PREEMPTED : EXIT_OK;
}
