/* Trains a mixture-of-experts language model.
 *
 *     ./train --data builtin --router topk --experts 8 --top-k 2 --steps 1000 --out runs/demo
 *
 * The whole program is the loop in train(): read a batch, forward, loss, backward, step, log, evaluate, save. This file
 * follows a run from open_run() to close_run() and is where data/ and model/ meet. Every step is a function of the
 * configuration and its number alone, so a run that is stopped and resumed goes on with the same bits.
 *
 * Read next: model/transformer.c (what a step computes), model/moe.c (the layer this project is about), model/router.h
 * (what a router is).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/choices.h"
#include "data/corpus.h"
#include "data/tokenizer.h"
#include "kernels/check.h"
#include "kernels/comm.h"
#include "kernels/device.h"
#include "model/answer.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/console.h"
#include "model/cost.h"
#include "model/evaluate.h"
#include "model/exchange.h"
#include "model/export.h"
#include "model/freeze.h"
#include "model/import.h"
#include "model/log.h"
#include "model/optimizer.h"
#include "model/process.h"
#include "model/recorder.h"
#include "model/report.h"
#include "model/resume.h"
#include "model/router.h"
#include "model/sample.h"
#include "model/transformer.h"
#include "model/vocabulary.h"
#include "model/watch.h"

typedef struct {
    Config config;
    bool first; /* of the ranks: the one that talks and writes */
    Tokenizer *tokenizer;
    Vocabulary vocabulary; /* the tokenizer, as model/ sees it */
    Corpus *corpus;
    ChoiceFile *choices_file; /* with --choices */
    Questions questions;      /* the same, as model/ sees it */
    const char *domains[256]; /* names */
    Arena arena;
    Transformer model;
    Optimizer optimizer;
    BatchBuffers batch;
    Log log;
    Choices choices; /* experts of the last evaluation */
    Trace trace;     /* with --dump-routing */
    Profile profile;
    Progress at;
    Recording recording; /* of a training step */
    Watch watch;
    int64_t waits;   /* of the host, inside training steps */
    double val_loss; /* of the last evaluation */
} Run;

/* ---- starting ---- */

/* Opens --tokenizer, of a resumed run its copy. Its vocabulary is the model's unless --vocab says more. */
static void open_tokenizer(Run *run) {
    Config *c = &run->config;
    char error[512], path[2 * CONFIG_TEXT];
    snprintf(path, sizeof path, "%s", c->train.tokenizer);
    if (strcmp(path, "byte") == 0) {
        run->tokenizer = tokenizer_bytes();
        CHECK(run->tokenizer, "out of memory");
    } else {
        if (c->train.resume[0] && !config_given(c, "tokenizer")) {
            vocabulary_path(path, sizeof path, c->train.resume);
        }
        run->tokenizer = tokenizer_open(path, error, sizeof error);
        CHECK(run->tokenizer, "--tokenizer: %s", error);
        int least = tokenizer_vocab(run->tokenizer) + (c->model.objective == OBJECTIVE_MLM);
        c->model.vocab = c->model.vocab ? c->model.vocab : least;
        CHECK(c->model.vocab >= least,
              "--vocab %d is too small for the %d tokens of --tokenizer %s: raise it, or drop it", c->model.vocab,
              least, path);
    }
    const Tokenizer *t = run->tokenizer;
    run->vocabulary = (Vocabulary){.tokenizer = t,
                                   .size = tokenizer_vocab(t),
                                   .end_of_text = tokenizer_end_of_text(t),
                                   .pattern = tokenizer_pattern_name(t),
                                   .merges = tokenizer_merges(t),
                                   .encode = tokenizer_encode,
                                   .bytes = tokenizer_token,
                                   .text = tokenizer_token_text,
                                   .is_special = tokenizer_is_special,
                                   .is_added = tokenizer_is_added,
                                   .merge = tokenizer_merge_text,
                                   .json = tokenizer_json};
}

static void open_corpus(Run *run) {
    const Config *c = &run->config;
    CorpusOptions options = {.train = c->train.data,
                             .val = c->train.val,
                             .tokenizer = run->tokenizer,
                             .seq = c->model.seq,
                             .batch = c->train.batch,
                             .vocab = c->model.vocab,
                             .domains = c->train.domains,
                             .ranks = comm_ranks(GROUP_WORLD),
                             .shuffle = c->train.shuffle,
                             .seed = c->train.seed};
    if (c->model.objective == OBJECTIVE_MLM) { /* the last token of the vocabulary hides others */
        options.mask_share = c->train.mask_share;
        options.mask_token = options.vocab = c->model.vocab - 1;
    }
    run->corpus = corpus_open(&options);
    for (int d = 0; d < corpus_domains(run->corpus); d++) {
        run->domains[d] = corpus_domain_name(run->corpus, d);
    }
}

/* Opens --choices. */
static void open_questions(Run *run) {
    const Config *c = &run->config;
    char error[512];
    if (!c->train.choices[0]) {
        return;
    }
    run->choices_file = choices_open(c->train.choices, c->model.vocab, error, sizeof error);
    CHECK(run->choices_file, "--choices: %s", error);
    int all = choices_questions(run->choices_file), most = c->train.choices_most;
    int count = most > 0 && most < all ? most : all;
    run->questions = (Questions){.file = run->choices_file,
                                 .count = count,
                                 .rows = choices_rows_of(run->choices_file, count),
                                 .batch = choices_batch,
                                 .score = choices_score};
}

/* How often each token occurs in the first batches of the training text, for routers that ask; the caller frees. */
static double *count_tokens(Run *run) {
    const Config *c = &run->config;
    enum { BATCHES = 32 };
    double *frequency = calloc(c->model.vocab, sizeof(double));
    CHECK(frequency, "out of memory for %d token frequencies", c->model.vocab);
    Batch batch = {.tokens = run->batch.host_tokens};
    for (int64_t step = 0; step < BATCHES && router_find(c->model.router)->init; step++) {
        for (int rank = 0; rank < comm_ranks(GROUP_WORLD); rank++) { /* the same counts on every rank */
            int first = corpus_first(run->corpus, SPLIT_TRAIN, 0, run->model.slices, rank, comm_ranks(GROUP_WORLD));
            corpus_batch(run->corpus, SPLIT_TRAIN, step, first, run->model.B, &batch);
            for (int n = 0; n < run->model.N; n++) {
                frequency[batch.tokens[n]]++;
            }
        }
    }
    return frequency;
}

static void open_model(Run *run) {
    const Config *c = &run->config;
    int slices = c->train.grad_accum, batch = c->train.batch / slices / comm_ranks(GROUP_WORLD);
    transformer_reserve(&run->model, c, batch, slices, USE_TRAIN, NULL, &run->arena);
    optimizer_reserve(&run->optimizer, &run->model.tensors, &run->arena);
    batch_reserve(&run->batch, run->model.N, slices, &run->arena);
    arena_commit(&run->arena);
    exchange_open(c, &run->arena);
    transformer_connect(&run->model);
    optimizer_connect(&run->optimizer, &run->model.tensors, &c->train);
    run->model.predicted = batch * corpus_masked_tokens(run->corpus);
    if (c->train.resume[0]) {
        run->at = training_load(c, &run->model, &run->optimizer);
        return;
    }
    acc_t *host = calloc(run->model.tensors.total, sizeof(acc_t));
    CHECK(host, "out of memory for %zu initial weights", run->model.tensors.total);
    double *frequency = count_tokens(run);
    transformer_init(&run->model, host, c->train.seed, frequency);
    if (c->train.init_from[0]) {
        import_part(host, &run->model.tensors, c);
    }
    transformer_load(&run->model, host);
    free(frequency);
    free(host);
}

/* The first rank's; others keep none. */
static void open_log(Run *run) {
    char device[128];
    if (!run->first) {
        run->log.fd = -1;
        return;
    }
    device_describe(device, sizeof device);
    const Router *router = router_find(run->config.model.router);
    LogHeader header = {.device = device,
                        .params_total = tensors_parameters(&run->model.tensors),
                        .params_active = transformer_active_parameters(&run->model),
                        .params_trainable = freeze_trainable(&run->model.tensors),
                        .flops_per_token = transformer_flops_per_token(&run->model),
                        .domain_count = corpus_domains(run->corpus),
                        .domains = run->domains,
                        .moe_layer_count = run->model.moe_count,
                        .moe_layers = run->model.moe_layers,
                        .learned = router->learned && run->config.train.freeze != FREEZE_ROUTER,
                        .leaky = config_is_leaky(&run->config.model),
                        .sees_batch = router->sees_batch};
    log_open(&run->log, &run->config, &header, run->config.train.resume[0] ? run->at.step : -1);
    char memory[512];
    int length = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        length += snprintf(memory + length, sizeof memory - length, ",\"%s\":%zu", memory_category_name(i),
                           run->arena.category[i]);
    }
    log_line(&run->log, "{\"event\":\"memory\"%s}", memory);
}

/* From here on the ranks know that they train the same model, and which part of it is whose. */
static void join_ranks(Run *run) {
    const Config *c = &run->config;
    char *options = config_to_json(c);
    comm_set_patience(c->train.patience);
    comm_check_same(options, "options");
    free(options);
    comm_form_groups(c->train.ep);
    exchange_check(c);
}

static void open_run(Run *run, int argc, char **argv) {
    Config *c = &run->config;
    config_parse(c, argc, argv);
    open_tokenizer(run);
    config_finish(c);
    join_ranks(run);
    if (run->first) {
        export_check(c, &run->vocabulary); /* tries whether files can be made there */
    }
    process_catch_signals();
    device_open(comm_local_rank(), comm_local_ranks());
    open_corpus(run);
    open_questions(run);
    open_model(run);
    comm_barrier(); /* all have read what the first may replace from here on */
    open_log(run);
    if (run->first && strcmp(c->train.tokenizer, "byte") != 0) {
        vocabulary_keep(&run->vocabulary, c->train.out);
    }
    recorder_open(&run->trace, c, &run->model, run->at.step);
    console_start(c, &run->model, &run->arena);
}

/* ---- one step ---- */

/* Reads this rank's share of slice `slice` of a step to place `place` on the device. */
static void read_batch(Run *run, Split split, int64_t step, int slice, int place) {
    BatchBuffers *b = &run->batch;
    bool evaluation = split == SPLIT_VAL;
    Batch batch = {b->host_tokens, b->host_targets, evaluation ? b->domain : NULL, evaluation ? b->floor : NULL,
                   evaluation ? b->bytes : NULL};
    int rank = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    int first = corpus_first(run->corpus, split, slice, run->model.slices, rank, ranks);
    corpus_batch(run->corpus, split, step, first, run->model.B, &batch);
    batch_to_device(b, place);
}

/* What a step computes, from what lies on the device (tokens, targets, learning rate, routers' random keys): the same
 * calls in every step. */
static void queue_step(Run *run) {
    Transformer *model = &run->model;
    for (int slice = 0; slice < model->slices; slice++) {
        size_t first = (size_t)slice * model->N;
        transformer_forward(model, run->batch.tokens + first, slice, NULL);
        transformer_loss(model, run->batch.targets + first, slice, true, NULL);
        transformer_backward(model, run->batch.tokens + first, slice, NULL);
        recorder_add(&run->trace, model);
    }
    transformer_sum_ranks(model, NULL);
    optimizer_step(&run->optimizer, model, &run->config.train, NULL);
    transformer_update_routers(model, run->optimizer.state, NULL);
}

static void train_step(Run *run) {
    const TrainConfig *t = &run->config.train;
    Transformer *model = &run->model;
    bool record = t->graph && !t->profile && !t->dump_routing[0] && exchange_recordable(&run->config);
    int64_t waits = device_waits();
    model->profile = t->profile ? &run->profile : NULL;
    profile_start(model->profile, NULL);
    transformer_begin_step(model, run->at.step, NULL);
    optimizer_set_rate(&run->optimizer, t, run->at.step, NULL);
    for (int slice = 0; slice < model->slices; slice++) {
        read_batch(run, SPLIT_TRAIN, run->at.step, slice, slice);
    }
    if (!record) {
        queue_step(run);
    } else if (!recording_replay(&run->recording, NULL)) {
        recording_begin(&run->recording, NULL);
        queue_step(run);
        recording_end(&run->recording, NULL);
    }
    profile_stop(model->profile, NULL);
    run->waits += device_waits() - waits;
    model->profile = NULL;
    run->at.step++;
    run->at.tokens += (int64_t)t->batch * run->config.model.seq;
}

/* ---- what a run leaves as it goes: checkpoint, report, figures, evaluations ---- */

/* False when it could not be saved: the run goes on and the checkpoint before stays. */
static bool save(Run *run) {
    char error[512];
    bool saved = training_save(&run->config, &run->model, &run->optimizer, &run->at, error, sizeof error);
    if (saved) {
        log_line(&run->log, "{\"event\":\"checkpoint\",\"step\":%lld}", (long long)run->at.step);
    } else if (run->first) {
        fprintf(stderr, "moelab: step %lld not saved: %s\n", (long long)run->at.step, error);
    }
    return saved;
}

static void write_report(const Run *run) {
    char error[512];
    if (run->first && !report_write(run->config.train.out, error, sizeof error)) {
        fprintf(stderr, "moelab: no report: %s\n", error);
    }
}

/* Reads a step's figures; ends the run after --max-skips in a row. */
static void report(Run *run) {
    const TrainConfig *t = &run->config.train;
    int64_t skipped =
        watch_report(&run->watch, &run->config, &run->model, &run->optimizer, &run->at, &run->log, run->val_loss);
    if (skipped >= t->max_skips) {
        save(run);
        write_report(run);
        die(__FILE__, __LINE__,
            "%lld steps in a row had a loss or gradient that is not finite; stopped at step %lld with the weights "
            "before them: lower --lr (%g) or look at the data",
            (long long)skipped, (long long)run->at.step, t->lr);
    }
}

/* --eval-batches, or as many as a text with an end fills. */
static int64_t evaluation_batches(const Run *run) {
    const TrainConfig *t = &run->config.train;
    int64_t tokens = corpus_tokens(run->corpus, SPLIT_VAL);
    if (tokens < 0) {
        return t->eval_batches;
    }
    int64_t all = (tokens - 1) / run->config.model.seq / t->batch;
    all = all > 0 ? all : 1;
    return t->eval_batches > 0 && t->eval_batches < all ? t->eval_batches : all;
}

static void run_evaluation(Run *run) {
    const TrainConfig *t = &run->config.train;
    Transformer *model = &run->model;
    Evaluation e = evaluation_start(model, corpus_domains(run->corpus), &run->choices);
    transformer_set_step(model, run->at.step, NULL);
    transformer_set_training(model, false, t->eval_drop);
    int64_t forwards = evaluation_batches(run) * t->grad_accum;
    for (int64_t i = 0; i < forwards; i++) {
        read_batch(run, SPLIT_VAL, i / t->grad_accum, i % t->grad_accum, 0);
        transformer_forward(model, run->batch.tokens, 0, NULL);
        transformer_loss(model, run->batch.targets, 0, false, NULL);
        evaluation_add(&e, model, run->batch.host_targets, run->batch.domain, run->batch.floor, run->batch.bytes, NULL);
        if (process_must_end()) { /* half an evaluation says nothing: back to saving */
            transformer_set_training(model, true, true);
            evaluation_free(&e);
            return;
        }
    }
    transformer_set_training(model, true, true);
    evaluation_finish(&e, corpus_bytes_per_token(run->corpus));
    evaluation_log(&e, &run->log, run->domains, run->at.step, run->at.tokens);
    run->val_loss = e.loss;
    console_evaluation(&e, run->domains, run->at.step);
    evaluation_free(&e);
    write_report(run);
}

/* ---- the loop ---- */

/* Whether something that happens every n steps (0: never) happens now. */
static bool is_due(const Run *run, int every) {
    return every > 0 && run->at.step % every == 0;
}

static void train(Run *run) {
    const TrainConfig *t = &run->config.train;
    Watch *watch = &run->watch;
    /* A signal may have ended the run in the middle of an evaluation, which is then made up for. */
    bool lacking = comm_any(run->first && run->log.lacks_evaluation);
    bool first = run->at.step == 0 && t->eval_every > 0 && !t->resume[0];
    if (first || (lacking && (is_due(run, t->eval_every) || run->at.step == t->steps))) {
        run_evaluation(run);
    }
    watch_begin(watch, run->at.step);
    while (run->at.step < t->steps && !process_must_end()) {
        train_step(run);
        if (watch->due) {
            report(run); /* of the step before, while this one runs */
        }
        watch_ask(watch, &run->config, &run->model, &run->optimizer, &run->at);
        bool last = run->at.step == t->steps;
        bool pause = is_due(run, t->eval_every) || is_due(run, t->save_every) || last;
        if (watch->due && (pause || !device_runs_ahead())) {
            report(run);
        }
        if (!pause) {
            continue;
        }
        watch_pause(watch, &run->at);
        if (is_due(run, t->eval_every) || last) {
            run_evaluation(run);
        }
        if (is_due(run, t->save_every) && !last) {
            save(run);
        }
        watch_begin(watch, run->at.step);
    }
    if (watch->due) {
        report(run);
    }
}

/* ---- the end of a run ---- */

static void sample(Run *run) {
    const char *prompts[256];
    int count = corpus_domains(run->corpus);
    for (int d = 0; d < count; d++) {
        prompts[d] = corpus_prompt(run->corpus, d);
    }
    sample_texts(&run->model, &run->config, &run->vocabulary, run->domains, prompts, count, &run->log);
}

/* The last lines of the log, and the report made of it. */
static void close_log(Run *run) {
    if (run->config.train.trace_syncs) {
        printf("%ssyncs    the host waited for the device %lld times inside %lld training steps\n",
               console_line_start(), (long long)run->waits, (long long)run->at.step);
        log_line(&run->log, "{\"event\":\"syncs\",\"waits\":%lld}", (long long)run->waits);
    }
    log_line(&run->log, "{\"event\":\"end\",\"step\":%lld,\"train_seconds\":%.6g,\"peak_bytes\":%zu}",
             (long long)run->at.step, run->at.seconds, device_peak_memory());
    write_report(run);
    log_close(&run->log);
}

static void close_run(Run *run) {
    corpus_close(run->corpus);
    choices_close(run->choices_file);
    tokenizer_close(run->tokenizer);
    transformer_free(&run->model);
    profile_free(&run->profile);
    watch_free(&run->watch);
    recording_free(&run->recording);
    choices_free(&run->choices);
    trace_close(&run->trace);
    batch_free(&run->batch);
    exchange_close();
    arena_free(&run->arena);
}

int main(int argc, char **argv) {
    Run run = {.val_loss = NAN};
    const TrainConfig *t = &run.config.train;
    process_hold_streams();
    comm_open();
    run.first = comm_rank(GROUP_WORLD) == 0;
    if (!run.first) {
        process_be_quiet();
    }
    open_run(&run, argc, argv);
    train(&run);

    bool interrupted = run.at.step < t->steps;
    bool saved = save(&run);
    if (!process_must_end() && t->sample > 0) {
        sample(&run);
    }
    if (!process_must_end() && run.choices_file) {
        answer_questions(&run.model, &run.config, &run.questions, &run.batch, &run.log);
    }
    bool exported = interrupted || export_write(&run.config, &run.model, &run.vocabulary);
    close_log(&run);
    profile_finish(t->profile ? &run.profile : NULL);
    if (!interrupted) {
        console_end(&run.config, &run.model, &run.arena, &run.profile, &run.at);
    } else if (saved) {
        console_stopped(&run.config, &run.at, argv[0]);
    }
    close_run(&run);
    comm_close();
    return !saved || !exported ? EXIT_ERROR : interrupted ? EXIT_PREEMPTED : EXIT_OK;
}
