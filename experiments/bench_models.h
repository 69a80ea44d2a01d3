/* The models that benchmarks run, by name. Included by bench_train.c and bench_generate.c; baselines/torch_cpu.py and
 * torch_gpu.py have the same. */
#ifndef EXPERIMENTS_BENCH_MODELS_H
#define EXPERIMENTS_BENCH_MODELS_H

#include <stdbool.h>

typedef struct {
    const char *name;
    bool gpu;
    int steps;           /* that are timed */
    const char *options; /* of ./train */
} Model;

static const Model MODELS[] = {
    {"cpu-default", false, 40,
     "--layers 4 --dim 128 --heads 4 --seq 128 --expert-dim 256 --experts 8 --top-k 2 --vocab 256 --batch 16"},
    {"cpu-mid", false, 16,
     "--layers 4 --dim 256 --heads 4 --seq 256 --expert-dim 512 --experts 8 --top-k 2 --vocab 256 --batch 8"},
    {"cpu-c512", false, 8,
     "--layers 6 --dim 512 --heads 8 --seq 512 --expert-dim 1024 --experts 8 --top-k 2 --vocab 256 --batch 2"},
    {"d12", true, 40,
     "--layers 12 --dim 768 --heads 12 --seq 1024 --expert-dim 2048 --experts 8 --top-k 2 --vocab 50304 --batch 32"},
    {"d12-fine", true, 40,
     "--layers 12 --dim 768 --heads 12 --seq 1024 --expert-dim 512 --experts 64 --top-k 8 --vocab 50304 --batch 32"},
    {"d12-dense", true, 40,
     "--layers 12 --dim 768 --heads 12 --seq 1024 --expert-dim 4096 --experts 1 --top-k 1 --vocab 50304 --batch 32 "
     "--router dense"},
    {"tiny", true, 100,
     "--layers 6 --dim 512 --heads 8 --seq 512 --expert-dim 1024 --experts 8 --top-k 2 --vocab 8192 --batch 64"},
    {"tiny-byte", true, 200,
     "--layers 4 --dim 256 --heads 4 --seq 256 --expert-dim 512 --experts 8 --top-k 2 --vocab 256 --batch 64"},
};

enum { MODEL_COUNT = sizeof MODELS / sizeof MODELS[0] };

#endif
