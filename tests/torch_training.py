#!/usr/bin/env python3
"""Ten training steps against PyTorch: the same initial weights and text, an independent model, optimizer and automatic
differentiation (Hugging Face transformers, torch.optim.AdamW). Compares in every step the loss (absolute), the balance
and z-losses and the gradient norm (relative).

    python3 tests/torch_training.py PROGRAM TOLERANCE [DEVICE]

PROGRAM is train, train_cuda, or train_cuda built with PRECISION=fp32; DEVICE is PyTorch's (cuda or cpu). Needs torch
and transformers. The last line is "N passed, N failed". Read next: hf_parity.py.
"""
import json
import math
import os
import random
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

STEPS, B, T, LR, WARMUP, DECAY, CLIP = 10, 4, 64, 1e-3, 2, 0.1, 1.0
OPTIONS = ["--layers", "2", "--dim", "128", "--heads", "2", "--kv-heads", "1", "--seq", str(T),
           "--expert-dim", "128", "--experts", "8", "--top-k", "2", "--batch", str(B), "--lr",
           str(LR), "--schedule", "constant", "--weight-decay", str(DECAY), "--clip", str(CLIP), "--shuffle", "0",
           "--beta1", "0.9", "--beta2", "0.95", "--eval-every", "0", "--log-every", "1"]


def ours(program, text, coefficients, folder):
    run, export = os.path.join(folder, "run"), os.path.join(folder, "hf")
    base = [os.path.abspath(program), *OPTIONS, "--data", text, "--aux-coef", str(coefficients[0]), "--z-coef",
            str(coefficients[1])]
    start = ["--steps", "0", "--warmup", "0", "--export-hf", export, "--out", run + "0"]
    steps = ["--steps", str(STEPS), "--warmup", str(WARMUP), "--out", run]
    for options in start, steps:
        subprocess.run(base + options, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(os.path.join(run, "log.jsonl"))]
    return [line for line in lines if "loss" in line], export


def theirs(export, text, coefficients, device):
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, attn_implementation="eager").to(device)
    model.train()
    E, K = model.config.num_experts, model.config.num_experts_per_tok
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
                                   {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=LR, betas=(0.9, 0.95), eps=1e-8)
    data = open(text, "rb").read()
    rows = []
    for s in range(STEPS):
        windows = torch.tensor([list(data[(s * B + j) * T:(s * B + j) * T + T + 1]) for j in range(B)], device=device)
        out = model(windows[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        aux = z = 0.0
        for logits in out.router_logits:
            probs = logits.float().softmax(-1)
            chosen = probs.topk(K, -1).indices
            share = torch.bincount(chosen.flatten(), minlength=E).float() / chosen.numel()
            aux = aux + E * (share * probs.mean(0)).sum() / len(out.router_logits)
            z = z + logits.float().logsumexp(-1).square().mean() / len(out.router_logits)
        (loss + coefficients[0] * aux + coefficients[1] * z).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (s + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({key: torch.as_tensor(value).item() for key, value in
                     {"loss": loss, "aux": aux, "z": z, "grad_norm": norm}.items()})
    return rows


def main():
    program, tolerance = sys.argv[1], float(sys.argv[2])
    device = sys.argv[3] if len(sys.argv) > 3 else "cuda" if torch.cuda.is_available() else "cpu"
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text.txt")
        random.seed(1)
        words = ["expert", "router", "token", "gate", "top", "k", "the", "a", "of", "load"]
        with open(text, "w") as out:
            out.write(" ".join(random.choice(words) for _ in range(4000)))
        for coefficients in (0.0, 0.0), (0.01, 0.001):
            place = os.path.join(folder, "with" if coefficients[0] else "without")
            os.mkdir(place)
            a, export = ours(program, text, coefficients, place)
            b = theirs(export, text, coefficients, device)
            assert len(a) == len(b) == STEPS
            worst = {"loss": max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b)),
                     "grad_norm": max(abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in zip(a, b))}
            if coefficients[0]:
                worst["aux"] = max(abs(x["aux"] / y["aux"] - 1) for x, y in zip(a, b))
                worst["z"] = max(abs(x["z"] / y["z"] - 1) for x, y in zip(a, b))
            for key, error in worst.items():
                good = math.isfinite(error) and error <= tolerance
                passed, failed = passed + good, failed + (not good)
                print("%s %s, balance losses %s: largest difference %.2e over %d steps" % (
                    "ok  " if good else "FAIL", key, "on" if coefficients[0] else "off", error, STEPS))
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
