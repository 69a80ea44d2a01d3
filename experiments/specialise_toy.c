/* Can experts and gate be trained one after the other, or must they learn together? On linear experts, where the
 * answer can be proved (the question is that of Learning to Specialize, arXiv 2306.08586):
 *
 *     build/specialise_toy [--seeds 20] [--steps 4000] >results.jsonl      seconds on one core
 *     experiments/specialise_table.py results.jsonl                       the table
 *
 * Setting (specialise_toy.h has the formulas): four linear tasks, each with its own separable cluster of inputs, four
 * linear experts, a linear softmax gate, top-1. The data is finite, free of noise and the same for all arms of a seed,
 * as are the initial experts. Steps are plain gradient descent on all samples; all arms take as many.
 *
 *     joint           experts and gate from a small random start
 *     joint-balance   the same with a balance loss on the gate
 *     joint-explore   joint, with half of the answers left to chance at first, none from half of the steps on
 *     decoupled       half of the steps for the experts, who answers being left to chance; then they are frozen and the
 *                     other half is for the gate
 *     decoupled-drawn the same, but in the first half the gate as it was drawn decides who answers, with weights large
 *                     enough to choose: half of the argument below falls away
 *     gate            the gate alone: experts stay as they were drawn
 *     experts         the experts alone: that gate stays as it was drawn
 *
 * Why decoupled has a floor. While chance decides who answers, the objective is the mean over experts of one and the
 * same convex function, each expert's mean error on all tasks; so all of them descend to its minimum, the least-squares
 * fit of the mixture, and what they differed in dies out geometrically. A gate that chooses between equals chooses
 * nothing: whatever it learns afterwards, the loss is that of the one fit, which is above 0 when tasks differ. That is
 * "floor", computed from the data. "oracle" is the loss with the best expert picked for every sample by hindsight: for
 * decoupled it says how much the experts still differ. A gate that sorts inputs, even at random, shows its experts
 * different mixtures, and this floor is not theirs: the fault is in what experts saw, not in when the gate learned.
 * Trained together there is no floor: where an expert is a little better the gate sends more, which makes it better
 * still, down to a loss of 0.
 *
 * What joint training needs. From some starts it ends with two tasks on one expert and an expert that nobody asks, and
 * stays there. Chance answers at first make that likelier; a balance loss is what helps, and as all tasks are equally
 * frequent it has nothing against the solution.
 * "solved" counts seeds below a hundredth of the floor; the table keeps the others.
 *
 * One line of JSON for each arm and seed: "kind":"toy", provenance, "config", "loss", "floor", "oracle", "nmi" (of
 * expert and task, 1: each task has its expert), "entropy" (of the gate, nats), "solved", "curve": [[step, loss, nmi,
 * entropy], ...]. Read next: specialise_toy.h; recipes/r7_specialise.sweep, the same question of language models.
 */
#include "specialise_toy.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "../kernels/check.h"
#include "../kernels/device.h"
#include "../model/commit.h"

enum { POINTS = 20, MOST_STEPS = 1000000, MOST_SEEDS = 10000 };

static const double EXPERT_RATE = 0.1, GATE_RATE = 0.01, EXPERT_STD = 0.1;

/* What is trained, in the first half of the steps and in the second. */
typedef enum { TRAIN_GATE = 1, TRAIN_EXPERTS = 2 } Trained;

typedef struct {
    const char *name;
    int first, second; /* Trained, or-ed */
    double explore;    /* in the first half: its first value .. */
    bool anneal;       /* .. falls to 0 there; it is 0 in the second half */
    double balance_coef;
    double gate_std;
} Arm;

static const Arm arms[] = {
    {"joint", TRAIN_GATE | TRAIN_EXPERTS, TRAIN_GATE | TRAIN_EXPERTS, 0, false, 0, 0.01},
    {"joint-balance", TRAIN_GATE | TRAIN_EXPERTS, TRAIN_GATE | TRAIN_EXPERTS, 0, false, 1, 0.01},
    {"joint-explore", TRAIN_GATE | TRAIN_EXPERTS, TRAIN_GATE | TRAIN_EXPERTS, 0.5, true, 0, 0.01},
    {"decoupled", TRAIN_EXPERTS, TRAIN_GATE, 1, false, 0, 0.01},
    {"decoupled-drawn", TRAIN_EXPERTS, TRAIN_GATE, 0, false, 0, 1},
    {"gate", TRAIN_GATE, TRAIN_GATE, 0, false, 0, 0.01},
    {"experts", TRAIN_EXPERTS, TRAIN_EXPERTS, 0, false, 0, 1},
};

enum { ARMS = sizeof arms / sizeof *arms };

static void descend(double *weights, const double *gradient, int count, double rate) {
    for (int i = 0; i < count; i++) {
        weights[i] -= rate * gradient[i];
    }
}

static void train_step(ToyModel *model, const ToyData *data, const Arm *arm, int step, int steps) {
    ToyModel gradient;
    bool first = 2 * step < steps;
    double explore = !first ? 0 : arm->anneal ? arm->explore * (1 - 2.0 * step / steps) : arm->explore;
    int trained = first ? arm->first : arm->second;
    toy_objective(&gradient, model, data, explore, arm->balance_coef);
    if (trained & TRAIN_EXPERTS) {
        descend(&model->expert[0][0][0], &gradient.expert[0][0][0], EXPERTS * IN * OUT, EXPERT_RATE);
    }
    if (trained & TRAIN_GATE) {
        descend(&model->gate[0][0], &gradient.gate[0][0], IN * EXPERTS, GATE_RATE);
    }
}

typedef struct {
    int seeds, steps;
    char command[128], ts[32], device[128];
} Settings;

static void print_provenance(const Settings *set, const Arm *arm, int seed) {
    printf("{\"kind\":\"toy\",\"ts\":\"%s\",\"sweep\":\"specialise_toy\",\"arm\":\"%s\",\"seed\":%d,", set->ts,
           arm->name, seed);
    printf("\"config\":{\"tasks\":%d,\"experts\":%d,\"in\":%d,\"out\":%d,\"samples\":%d,\"centre\":%g,\"steps\":%d,",
           TASKS, EXPERTS, IN, OUT, N, CENTRE, set->steps);
    printf("\"expert_rate\":%g,\"gate_rate\":%g,\"expert_std\":%g,\"gate_std\":%g,\"explore\":%g,\"balance_coef\":%g},",
           EXPERT_RATE, GATE_RATE, EXPERT_STD, arm->gate_std, arm->explore, arm->balance_coef);
    printf("\"command\":\"%s\",\"commit\":\"%s\",\"device\":\"%s\",", set->command, commit_name(), set->device);
}

/* Trains one arm and prints its line. */
static void run_arm(const Settings *set, const Arm *arm, int seed) {
    static ToyData data;
    static ToyModel model;
    toy_data(&data, (uint64_t)seed);
    toy_init(&model, (uint64_t)seed, EXPERT_STD, arm->gate_std);
    print_provenance(set, arm, seed);
    printf("\"curve\":[");
    for (int step = 0, point = 0; step <= set->steps; step++) {
        if ((int64_t)step * POINTS >= (int64_t)point * set->steps) {
            ToyFigures f = toy_measure(&model, &data);
            printf("%s[%d,%.6g,%.4g,%.4g]", point++ > 0 ? "," : "", step, f.loss, f.nmi, f.entropy);
        }
        if (step < set->steps) {
            train_step(&model, &data, arm, step, set->steps);
        }
    }
    ToyFigures f = toy_measure(&model, &data);
    double floor = toy_floor(&data);
    CHECK(isfinite(f.loss), "arm %s of seed %d has diverged, which must not happen with these rates", arm->name, seed);
    printf("],\"loss\":%.6g,\"floor\":%.6g,\"oracle\":%.6g,\"nmi\":%.4g,\"entropy\":%.4g,\"solved\":%s}\n", f.loss,
           floor, f.oracle, f.nmi, f.entropy, f.loss < 0.01 * floor ? "true" : "false");
}

/* The whole number after option argv[i]. */
static int read_number(char **argv, int i, int most) {
    char *end = NULL;
    long value = argv[i + 1] ? strtol(argv[i + 1], &end, 10) : 0;
    CHECK(end && *end == '\0' && value >= 1 && value <= most, "%s takes a whole number from 1 to %d", argv[i], most);
    return (int)value;
}

int main(int argc, char **argv) {
    Settings set = {.seeds = 20, .steps = 4000};
    for (int i = 1; i < argc; i += 2) {
        bool seeds = strcmp(argv[i], "--seeds") == 0, steps = strcmp(argv[i], "--steps") == 0;
        CHECK(seeds || steps, "usage: %s [--seeds N] [--steps N] >results.jsonl", argv[0]);
        *(seeds ? &set.seeds : &set.steps) = read_number(argv, i, seeds ? MOST_SEEDS : MOST_STEPS);
    }
    snprintf(set.command, sizeof set.command, "build/specialise_toy --seeds %d --steps %d", set.seeds, set.steps);
    device_describe(set.device, sizeof set.device);
    time_t now = time(NULL);
    strftime(set.ts, sizeof set.ts, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
    for (int a = 0; a < ARMS; a++) {
        for (int seed = 1; seed <= set.seeds; seed++) {
            run_arm(&set, &arms[a], seed);
        }
    }
    return fflush(stdout) == 0 && !ferror(stdout) ? EXIT_SUCCESS : EXIT_FAILURE;
}
