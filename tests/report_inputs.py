#!/usr/bin/env python3
"""Inputs for tests of experiments/report.

    tests/report_inputs.py synthetic FOLDER          a sweep's folder with something for every figure and every warning
    tests/report_inputs.py converted TABLE.jsonl     experiments/results/router_table.jsonl as lines of a sweep

The synthetic numbers are drawn with a fixed seed and mean nothing; the shapes are those of real lines.
"""
import json
import math
import os
import random
import sys

RECIPE = """question  Does a learned router beat a hash of the token?   # of equal work
expect    topk < hash by 0.02 nats; sigmoid < topk
baseline  topk
arm       dense --router dense
arm       topk  --router topk
"""
STEPS, PER_STEP, FLOOR = 600, 1024, 1.05
DOMAINS = ["story", "arithmetic", "brackets", "recall", "sort"]
# arm: loss above the floor, milliseconds, MFLOPs a token, dropped share, router, extra
ARMS = {
    "dense": (0.16, 20.0, 6.0, 0.0, "dense", {}),
    "topk": (0.10, 26.0, 6.1, 0.0, "topk", {}),
    "topk-cf1": (0.12, 24.0, 6.1, 0.09, "topk", {"capacity_factor": 1.0}),
    "top1": (0.13, 19.0, 4.1, 0.0, "top1", {}),
    "hash": (0.14, 23.0, 6.0, 0.0, "hash", {}),
    "sigmoid": (0.095, 27.0, 6.1, 0.0, "sigmoid", {}),
    "expert-choice": (0.02, 25.0, 6.1, 0.0, "expert-choice", {}),
    "broken": (0.15, 22.0, 6.1, 0.0, "topk", {}),
    "too-fast": (0.18, 0.001, 6.0, 0.0, "random", {}),
    "untimed": (0.11, None, 6.0, 0.0, "coe", {}),
    "one-seed": (0.09, 24.5, 6.0, 0.0, "noisy", {}),
    "<&\">'": (0.145, 30.0, 6.2, 0.02, "threshold", {"capacity_factor": 1.25}),
}
DEVICE = "AMD EPYC (2 threads, AVX2)"


def base(arm):
    _, _, mflops, _, router, extra = ARMS[arm]
    config = dict(router=router, objective="lm", data="builtin", tokenizer="byte", batch=8, seq=128, experts=8,
                  layers=2)
    config.update(extra)
    return {"sweep": "synthetic", "size": "small", "arm": arm, "budget": "tokens", "ts": "2025-01-01T00:00:00Z",
            "config": config, "command": f"./train --router {router} --out runs/{arm}", "commit": "0123456789ab",
            "device": DEVICE, "driver": None, "versions": {"compiler": "12.2.0"}, "params_total": 1000000,
            "params_active": 400000, "flops_per_token": mflops * 1e6, "leaky": arm == "expert-choice",
            "sees_batch": arm == "expert-choice", "learned": router not in ("dense", "hash", "random")}


def domain_shares(source, sharp):
    layers = []
    for layer in range(2):
        rows = []
        for d in range(len(DOMAINS)):
            weights = [math.exp(sharp * (1 + layer) * (source.random() if e % len(DOMAINS) != d else 1.6))
                       for e in range(8)]
            rows.append([w / sum(weights) for w in weights])
        layers.append(rows)
    return layers


def run_line(source, arm, rate, seed, phase):
    above, _, _, drop, router, _ = ARMS[arm]
    shared = random.Random(seed).gauss(0, 0.01)   # what a seed does to all arms alike
    loss = FLOOR + above + shared + source.gauss(0, 0.004) + 0.03 * abs(math.log2(rate / 0.004))
    points = [s for s in range(0, STEPS + 1, 50)]
    curve = [[s, s * PER_STEP, loss + 4.4 * math.exp(-s / 60) + (0.02 * source.random() if s < STEPS else 0)]
             for s in points]
    line = base(arm)
    line.update(
        kind="run", rate=rate, seed=seed, phase=phase, steps=STEPS, tokens=STEPS * PER_STEP, train_seconds=20.0,
        val_loss=loss, val_bpb=loss / math.log(2), val_floor=FLOOR, val=curve,
        train=[[s, t, v + 0.03 * source.random()] for s, t, v in curve], drop=drop, token_drop=drop / 3,
        padding=0.1 * (drop > 0), dead=0.0, load_cv=0.3 + source.random() / 5, max_vio=0.6, entropy=1.5, load_kl=0.05,
        loads=[[s, 1.2 * math.exp(-s / 200) + 3 * above, 2 * math.exp(-s / 150) + 5 * above, 1.5 + above - s / 1000,
                drop * (1 + math.exp(-s / 100))] for s in points],
        router_main_norm=0.0 if arm == "broken" else 0.01, ms=30.0, side_by_side=2,
        router_gradient={"main": [0.0] * 4 if arm == "broken" else [0.1] * 4, "balance": [0.1] * 4},
        val_domains={d: {"loss": loss, "floor": FLOOR, "tokens": 100} for d in DOMAINS})
    if router != "dense":
        line["domain_expert"] = domain_shares(source, 0.1 if router in ("hash", "random") else 0.8)
    return line


def timing_line(arm, ms):
    line, factor = base(arm), ms / 26.0
    stages = {"embed": 0.1, "norm": 1.0, "attention": 6.0, "route": 0.0 if arm == "dense" else 1.5, "permute": 0.2,
              "dispatch": 0.7, "experts": 12.0, "combine": 0.6, "head": 2.0, "optimizer": 1.0}
    line.update(kind="timing", ms=ms, ms_p95=ms * 1.1, tok_s=1000 * PER_STEP / ms, tokens_per_step=PER_STEP, steps=60,
                stages_ms={stage: value * factor for stage, value in stages.items()})
    return line


def bench_line(tokens, dim, layout):
    rows, flops = 2 * tokens, 12.0 * tokens * dim * dim
    moved = 12.0 * rows * dim
    return {"kind": "microbench", "grid": "course", "router": "topk", "layout": layout, "tokens": tokens, "dim": dim,
            "experts": 8, "top_k": 2, "ms": flops / 5e10 * 1000 + 0.05, "flops": flops, "bytes": moved * 3,
            "device": DEVICE, "commit": "0123456789ab", "command": "build/bench_layer --grid course",
            "stages": {"experts": {"ms": flops / 6e10 * 1000, "flops": flops, "bytes": moved * 2},
                       "combine": {"ms": moved / 1e10 * 1000, "flops": rows * dim, "bytes": moved}},
            "bw": {"ms": moved / 8e9 * 1000 + 0.02, "moved_bytes": moved, "strict_gb_s": 8.0}}


def synthetic(folder):
    source, lines = random.Random(1), []
    for arm in ARMS:
        seeds = [1] if arm == "one-seed" else [1, 2, 3]
        for rate in (0.002, 0.004, 0.008):
            lines.append(run_line(source, arm, rate, 1, "rates"))
        lines += [run_line(source, arm, 0.004, seed, "seeds") for seed in seeds[1:]]
    for arm, values in ARMS.items():
        if values[1] is not None:
            lines.append(timing_line(arm, values[1]))
    lines.append(timing_line("sigmoid", 28.0))
    failed = base("top1")
    failed.update(kind="failed", rate=0.016, seed=1, phase="rates", why="10 steps in a row were not finite")
    lines.append(failed)
    lines += [bench_line(tokens, dim, layout) for tokens in (256, 1024, 4096) for dim in (64, 256)
              for layout in ("compact", "padded")]
    lines += [{"kind": "microbench", "op": "copy", "bytes": 1e6 * i, "ms": 0.1 * i + 0.01, "device": DEVICE,
               "commit": "0123456789ab", "command": "build/copy"} for i in (1, 4)]
    lines += [{"model": "d12", "impl": impl, "router": "topk", "mode": "weak", "ranks": r, "ep": ep if ep == 1 else r,
               "tok_s": 1000 * speed * r ** power, "device": DEVICE, "command": "mpirun -n N build/bench_train"}
              for impl, ep, speed, power in (("moelab", 1, 60, 0.97), ("moelab", 2, 55, 0.9), ("torch", 1, 30, 0.85))
              for r in (1, 2, 4, 8)]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "recipe"), "w", encoding="utf-8") as out:
        out.write(RECIPE)
    with open(os.path.join(folder, "results.jsonl"), "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def converted(path):
    same = ("arm rate seed commit device ts command leaky sees_batch params_total params_active flops_per_token steps "
            "tokens val_loss val_floor ms side_by_side load_cv max_vio entropy mean_entropy drop token_drop dead "
            "margin router_main_norm router_balance_norm").split()
    for text in open(path, encoding="utf-8"):
        old = json.loads(text)
        line = {key: old[key] for key in same}
        line.update(kind="timing" if old["timing"] else "run", sweep="router_table", budget="tokens",
                    size=f"{old['objective']} {old['size']}", mi=None if old["mi"] is None else [old["mi"]],
                    learned=old["router"] not in ("dense", "hash", "position", "random", "random-step"),
                    config={"router": old["router"], "data": "builtin", "tokenizer": "byte"})
        if old["timing"]:
            line["tokens_per_step"] = old["tokens"] / old["steps"]
        print(json.dumps(line))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "synthetic":
        synthetic(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] == "converted":
        converted(sys.argv[2])
    else:
        sys.exit(__doc__)
