#!/usr/bin/env python3
"""The peer on a CPU: one training step of the same mixture-of-experts model, written in PyTorch as well as we can.

The model is this project's: RMSNorm before each part, attention with RoPE (half-rotation) and per-head QK-norm, no
biases, SwiGLU experts behind softmax -> top-K -> renormalise, Switch balance loss and z-loss, untied head, clipping,
AdamW, fp32. The experts are written in several ways (EXPERTS below) and idle threads can spin or sleep (WAITS); each
is tried briefly and the fastest is the one reported. Works with PyTorch 1.13 (Debian's python3-torch) and with 2.x,
where torch.compile is tried too.

    python3 experiments/baselines/torch_cpu.py --threads 2                 one JSON line per model, then a table
    python3 experiments/baselines/torch_cpu.py --ours build/bench_train      the same, and the ratio to ours
    python3 experiments/baselines/torch_cpu.py --check-loss                does it learn, do all ways agree
    python3 experiments/baselines/torch_cpu.py --models cpu-mid --profile  where its time goes

Next to read: experiments/cpu_compare.sh, which runs this and ours in turn.
"""
import argparse
import ctypes
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time

# name: layers L, width C, heads NH, time T, expert width H, experts E, per token K, vocabulary V, batch B
MODELS = {
    "cpu-default": dict(L=4, C=128, NH=4, T=128, H=256, E=8, K=2, V=256, B=16),
    "cpu-mid": dict(L=4, C=256, NH=4, T=256, H=512, E=8, K=2, V=256, B=8),
    "cpu-c512": dict(L=6, C=512, NH=8, T=512, H=1024, E=8, K=2, V=256, B=2),
}
# loop: per expert, pick its tokens, compute, index_add (what most PyTorch code does); sorted: one gather into expert
# order, one product per contiguous slice, one gather back; padded: slices padded to the longest, one batched product;
# grouped: the library's grouped product (2.x). "+compile" (loop and sorted, 2.x) puts all but expert products through
# torch.compile: compiled as a whole, the model is slower, because every new number of rows compiles it again.
EXPERTS = ["loop", "sorted", "padded", "grouped"]
# What OpenMP's threads do between parallel regions. Where the BLAS has threads of its own (Debian's OpenBLAS), threads
# that spin take the cores away from it and a step can take twice as long; where BLAS and PyTorch share them, spinning
# saves the waking up.
WAITS = ["passive", "default"]
EPS, ROPE_BASE, AUX_COEF, Z_COEF, CLIP, LR = 1e-6, 10000.0, 0.01, 0.001, 1.0, 1e-3


def parse_arguments():
    p = argparse.ArgumentParser(description="time a PyTorch training step of the benchmark models on the CPU")
    p.add_argument("--models", default=",".join(MODELS), help="comma-separated, of: " + " ".join(MODELS))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--variant", default="best",
                   help="best, or a comma-separated list of: %s, each also with +compile" % " ".join(EXPERTS))
    p.add_argument("--wait", choices=["best"] + WAITS, default="best", help="idle OpenMP threads: passive sleeps")
    p.add_argument("--compile", type=int, choices=(0, 1), default=1, help="0: leave torch.compile out of the trials")
    p.add_argument("--ours", metavar="PROGRAM", default="",
                   help="build/bench_train: run it after each model and print the ratio")
    p.add_argument("--steps", type=int, default=0, help="timed steps; 0: by speed, 20, 10 or 5")
    p.add_argument("--trials", action="store_true", help="only print the short trial of each variant")
    p.add_argument("--check-loss", action="store_true", help="20 steps on one batch with each variant")
    p.add_argument("--profile", action="store_true", help="the operations that take the time")
    arguments = p.parse_args()
    for name in arguments.models.split(","):
        if name not in MODELS:
            p.error("--models %s is not known: take one of %s" % (name, " ".join(MODELS)))
    for name in arguments.variant.split(","):
        if arguments.variant != "best" and name.replace("+compile", "") not in EXPERTS:
            p.error("--variant %s is not known: take best or some of %s" % (name, " ".join(EXPERTS)))
    if arguments.threads < 1:
        p.error("--threads must be at least 1")
    return arguments


def run_self(*options):
    """A fresh process of this program, because libraries read their environment once; its last line, as JSON."""
    command = [sys.executable, os.path.abspath(__file__), "--threads", str(args.threads), "--compile",
               str(args.compile), "--steps", str(args.steps), *options]
    answer = subprocess.run(command, stdout=subprocess.PIPE)
    if answer.returncode != 0:
        sys.exit("torch_cpu.py: a run failed: see the lines above (%s)" % " ".join(command))
    return json.loads(answer.stdout.decode().strip().split("\n")[-1])


def find_best(name):
    """All variants with sleeping threads, the two fastest also with the default; then the fastest of all is timed."""
    trials = {}
    variants_left = args.variant
    for wait in WAITS:
        times = run_self("--models", name, "--wait", wait, "--variant", variants_left, "--trials")
        trials.update({(wait, variant): ms for variant, ms in times.items()})
        variants_left = ",".join(sorted(times, key=times.get)[:2])
    wait, variant = min(trials, key=trials.get)
    row = run_self("--models", name, "--wait", wait, "--variant", variant)
    row["trials_ms"] = {"%s, %s" % (variant, wait): ms for (wait, variant), ms in trials.items()}
    return row


def run_ours(name):
    """Our benchmark's tokens/s of one model, with the threads we have ourselves."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    environment.pop("OMP_WAIT_POLICY", None)
    answer = subprocess.run([args.ours, "--model", name], stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(answer.stdout.decode().split("\n")[0])["tok_s"]


def print_table(rows):
    print("\nPyTorch %(torch)s, %(threads)d threads, %(blas)s, %(cpu)s" % rows[0], file=sys.stderr)
    print("%-12s %-16s %-8s %9s %9s %8s %9s %6s" % ("model", "experts", "wait", "ms/step", "tokens/s", "GFLOP/s",
                                                    "ours", "ratio"), file=sys.stderr)
    for row in rows:
        ours = "%9d %5.2fx" % (row["ours_tok_s"], row["ours_tok_s"] / row["tok_s"]) if "ours_tok_s" in row else ""
        print("%(model)-12s %(variant)-16s %(wait)-8s %(ms)9.1f %(tok_s)9d %(gflops)8.1f" % row, ours, file=sys.stderr)


def prepare_environment(threads, wait):
    """Restarts this program if the environment is not the one wanted: libraries read it when they load.

    OPENBLAS_CORETYPE and its like pin a library to the kernels of another processor and would make a weak peer."""
    wanted = dict(os.environ)
    for name in ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE",
                 "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        wanted.pop(name, None)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        wanted[name] = str(threads)
    if wait == "passive":
        wanted["OMP_WAIT_POLICY"] = "PASSIVE"
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


args = parse_arguments()
if args.wait == "best" and not (args.check_loss or args.profile):
    table = []
    for model_name in args.models.split(","):
        table.append(find_best(model_name))
        if args.ours:
            table[-1]["ours_tok_s"] = run_ours(model_name)
        print(json.dumps(table[-1]), flush=True)
    print_table(table)
    sys.exit(0)
prepare_environment(args.threads, "passive" if args.wait == "best" else args.wait)

import torch  # noqa: E402  (the environment has to be right first)
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

VERSION = tuple(int(x) for x in torch.__version__.split("+")[0].split("a")[0].split(".")[:2])


# The model

def rms_norm(x, weight):
    if hasattr(F, "rms_norm") and weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, EPS)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def normal(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


class Dispatch(torch.autograd.Function):
    """x (N,C) -> rows (M,C), row r being token_of_row[r]. The backward gathers too: every entry knows its row."""

    @staticmethod
    def forward(ctx, x, token_of_row, row_of_entry, K):
        ctx.save_for_backward(row_of_entry)
        ctx.K = K
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, grad):
        row_of_entry, = ctx.saved_tensors
        return grad.index_select(0, row_of_entry).view(-1, ctx.K, grad.shape[1]).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """rows (M,C) -> entries (N*K,C) in token order; rows that are padding (live 0) get no gradient."""

    @staticmethod
    def forward(ctx, rows, row_of_entry, entry_of_row, live):
        ctx.save_for_backward(entry_of_row, *([] if live is None else [live]))
        return rows.index_select(0, row_of_entry)

    @staticmethod
    def backward(ctx, grad):
        entry_of_row, *live = ctx.saved_tensors
        rows = grad.index_select(0, entry_of_row)
        return rows * live[0] if live else rows, None, None, None


class MoE(nn.Module):
    def __init__(self, m, experts):
        super().__init__()
        self.E, self.K, self.experts, self.activation = m["E"], m["K"], experts, swiglu
        self.router = normal(m["E"], m["C"])
        gate_up, down = normal(m["E"], 2 * m["H"], m["C"]), normal(m["E"], m["C"], m["H"])
        if experts in ("loop", "sorted"):  # a parameter an expert: no gradient is copied together from E pieces
            self.gate_up = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in gate_up])
            self.down = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in down])
        else:
            self.gate_up, self.down = gate_up, down

    def expert(self, e, x):
        return F.linear(self.activation(F.linear(x, self.gate_up[e])), self.down[e])

    def route(self, x):
        N, E, K = x.shape[0], self.E, self.K
        logits = F.linear(x, self.router)
        probs = logits.softmax(-1)
        weight, chosen = probs.topk(K, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        expert_of_entry = chosen.reshape(-1)
        count = torch.zeros(E, dtype=torch.int64).scatter_add_(0, expert_of_entry, torch.ones_like(expert_of_entry))
        balance = E * (count.to(x.dtype) / (N * K) * probs.mean(0)).sum()
        return chosen, weight, count, balance, logits.logsumexp(-1).square().mean()

    def forward(self, x):
        N, E, K = x.shape[0], self.E, self.K
        chosen, weight, count, balance, z = self.route(x)
        expert_of_entry = chosen.reshape(-1)

        if self.experts == "loop":
            y = torch.zeros_like(x)
            for e in range(E):
                token, slot = torch.where(chosen == e)
                y.index_add_(0, token, self.expert(e, x.index_select(0, token)) * weight[token, slot, None])
            return y, balance, z

        order = expert_of_entry.argsort(stable=True)
        if self.experts == "padded":
            longest = int(count.max())
            rank = torch.arange(N * K) - (count.cumsum(0) - count).index_select(0, expert_of_entry[order])
            row = expert_of_entry[order] * longest + rank
            entry_of_row = torch.zeros(E * longest, dtype=torch.int64)
            entry_of_row[row] = order
            live = torch.zeros(E * longest, 1)
            live[row] = 1.0
        else:
            row, entry_of_row, live = torch.arange(N * K), order, None
        row_of_entry = torch.empty_like(order)
        row_of_entry[order] = row
        rows = Dispatch.apply(x, torch.div(entry_of_row, K, rounding_mode="floor"), row_of_entry, K)

        if self.experts == "sorted":
            rows = torch.cat([self.expert(e, part) for e, part in enumerate(rows.split(count.tolist()))])
        elif self.experts == "padded":
            hidden = swiglu(torch.bmm(rows.view(E, -1, x.shape[1]), self.gate_up.transpose(1, 2)))
            rows = torch.bmm(hidden, self.down.transpose(1, 2)).flatten(0, 1)
        else:
            product, ends = getattr(F, "grouped_mm", None) or torch._grouped_mm, count.cumsum(0).to(torch.int32)
            hidden = swiglu(product(rows, self.gate_up.transpose(1, 2), offs=ends))
            rows = product(hidden, self.down.transpose(1, 2), offs=ends)
        y = Collect.apply(rows, row_of_entry, entry_of_row, live).view(N, K, -1)
        return (y * weight.unsqueeze(-1)).sum(1), balance, z


class Block(nn.Module):
    def __init__(self, m, experts):
        super().__init__()
        self.NH, self.HS = m["NH"], m["C"] // m["NH"]
        self.norm1, self.norm2 = nn.Parameter(torch.ones(m["C"])), nn.Parameter(torch.ones(m["C"]))
        self.qk_norm = nn.Parameter(torch.ones(2, 1, 1, 1, self.HS))
        self.qkv, self.out = normal(3 * m["C"], m["C"]), normal(m["C"], m["C"])
        self.moe = MoE(m, experts)

    def attention(self, x, cos, sin, mask):
        B, T, C = x.shape
        qkv = F.linear(x, self.qkv).view(B, T, 3, self.NH, self.HS).permute(2, 0, 3, 1, 4)  # (3,B,NH,T,HS)
        a, b = rms_norm(qkv[:2], self.qk_norm).chunk(2, -1)  # queries and keys together: half the calls
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).unbind(0)
        v = qkv[2]
        if hasattr(F, "scaled_dot_product_attention"):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            q, k, v = (t.reshape(B * self.NH, T, self.HS) for t in (q, k, v))
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(self.HS))
            y = torch.bmm(scores.softmax(-1), v).view(B, self.NH, T, self.HS)
        return F.linear(y.transpose(1, 2).reshape(B, T, C), self.out)

    def before_moe(self, x, cos, sin, mask):
        x = x + self.attention(rms_norm(x, self.norm1), cos, sin, mask)
        return x, rms_norm(x, self.norm2).flatten(0, 1)

    def forward(self, x, cos, sin, mask):
        x, normed = self.before_moe(x, cos, sin, mask)
        y, balance, z = self.moe(normed)
        return x + y.view_as(x), balance, z


class Model(nn.Module):
    def __init__(self, m, experts):
        super().__init__()
        self.embedding, self.head = normal(m["V"], m["C"]), normal(m["V"], m["C"])
        self.blocks = nn.ModuleList([Block(m, experts) for _ in range(m["L"])])
        self.norm = nn.Parameter(torch.ones(m["C"]))
        half = m["C"] // m["NH"] // 2
        angle = torch.outer(torch.arange(m["T"]).float(), ROPE_BASE ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("mask", torch.full((1, m["T"], m["T"]), -math.inf).triu(1))

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding)
        balance = z = 0.0
        for block in self.blocks:
            x, block_balance, block_z = block(x, self.cos, self.sin, self.mask)
            balance, z = balance + block_balance, z + block_z
        logits = F.linear(rms_norm(x, self.norm), self.head)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, loss + (AUX_COEF * balance + Z_COEF * z) / len(self.blocks)


# One training step, and its time

def flops_per_token(m):
    """Training, 6 a multiplied parameter (2 forward, 4 backward), active ones only; a multiply and an add count 2.

    Attention: scores and values are 2 products of 2*T*C forward a token and layer, thrice that with the backward, that
    is 12*T*C; causal attention needs half. The embedding is a lookup and counts nothing, the head counts."""
    layer = 4 * m["C"] ** 2 + m["E"] * m["C"] + m["K"] * 3 * m["C"] * m["H"]
    return 6 * (m["L"] * layer + m["C"] * m["V"]) + 12 * m["L"] * m["T"] * m["C"] // 2


class Trainer:
    def __init__(self, name, variant):
        m = self.m = MODELS[name]
        torch.manual_seed(1)
        self.model = Model(m, variant.replace("+compile", ""))
        if variant.endswith("+compile"):
            torch._dynamo.reset()
            activation = torch.compile(swiglu, dynamic=True)
            for block in self.model.blocks:
                block.before_moe = torch.compile(block.before_moe)
                block.moe.route = torch.compile(block.moe.route)
                block.moe.activation = activation
        groups = [{"params": [p for p in self.model.parameters() if p.dim() >= 2 and p.dim() < 5], "weight_decay": 0.1},
                  {"params": [p for p in self.model.parameters() if p.dim() == 1 or p.dim() == 5], "weight_decay": 0.0}]
        fast = {"fused": True} if VERSION >= (2, 4) else {"foreach": True}
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, **fast)
        self.zipf = 1.0 / (torch.arange(m["V"]) + 2.7)
        self.generator = torch.Generator().manual_seed(2)

    def batch(self):
        B, T = self.m["B"], self.m["T"]
        text = torch.multinomial(self.zipf, B * (T + 1), True, generator=self.generator).view(B, T + 1)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step(self, tokens, targets):
        self.optimizer.zero_grad(set_to_none=True)
        loss, total = self.model(tokens, targets)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss

    def milliseconds(self, steps, warm_up):
        """Time of each step, drawing the tokens excluded."""
        times = []
        for _ in range(warm_up + steps):
            tokens, targets = self.batch()
            start = time.perf_counter()
            self.step(tokens, targets)
            times.append(1e3 * (time.perf_counter() - start))
        return times[warm_up:]


def variants():
    if args.variant != "best":
        return args.variant.split(",")
    eager = [v for v in EXPERTS if v != "grouped" or hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")]
    compiled = ["loop+compile", "sorted+compile"] if args.compile and hasattr(torch, "compile") else []
    return eager + compiled


def first_line(error):
    return str(error).strip().split("\n")[0][:160]


def trials(name):
    """Milliseconds of the best of three steps, by variant."""
    times = {}
    for variant in variants():
        try:
            times[variant] = round(min(Trainer(name, variant).milliseconds(3, 4 if "compile" in variant else 2)), 1)
            print("%s %s, %s: %.1f ms" % (name, variant, args.wait, times[variant]), file=sys.stderr)
        except Exception as error:  # a variant that this build of PyTorch lacks is no peer; say so and go on
            print("%s %s: left out (%s)" % (name, variant, first_line(error)), file=sys.stderr)
    if not times:
        sys.exit("torch_cpu.py: no variant ran for %s: see the reasons above" % name)
    return times


def measure(name):
    names = variants()
    if len(names) > 1:
        times = trials(name)
        names = [min(times, key=times.get)]
    trainer = Trainer(name, names[0])
    guess = trainer.milliseconds(1, 3)[0]
    steps = args.steps or (20 if guess < 500 else 10 if guess < 2000 else 5)
    times = trainer.milliseconds(steps, 0)
    ms = statistics.median(times)
    m = MODELS[name]
    tok_s = 1e3 * m["B"] * m["T"] / ms
    return {"model": name, "impl": "torch", "variant": names[0], "wait": args.wait, "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ms": round(ms, 2), "ms_min": round(min(times), 2), "tok_s": round(tok_s),
            "gflops": round(tok_s * flops_per_token(m) / 1e9, 1), "steps": steps, "blas": blas_name(),
            "cpu": cpu_name()}


def loaded_openblas():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "openblas" in line}
    return sorted(path for path in paths if path.startswith("/"))


def blas_name():
    if "BLAS_INFO=mkl" in torch.__config__.show():  # an OpenBLAS that is loaded too is NumPy's
        version = [line.strip(" -") for line in torch.__config__.show().split("\n") if "Math Kernel Library" in line]
        return (version + ["MKL"])[0].split("-Product")[0]
    for path in loaded_openblas():
        library = ctypes.CDLL(path)
        for symbol in ("openblas_get_corename", "openblas_get_corename64_", "scipy_openblas_get_corename64_"):
            if hasattr(library, symbol):
                corename = getattr(library, symbol)
                corename.restype = ctypes.c_char_p
                return "OpenBLAS, kernels " + corename().decode()
    return "see torch.__config__.show()"


def cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform
        return platform.machine()


def check_loss(name):
    """20 steps on one batch with each variant from the same weights: the loss falls, all variants compute the same."""
    curves = {}
    for variant in variants():
        try:
            trainer = Trainer(name, variant)
            tokens, targets = trainer.batch()
            curves[variant] = [trainer.step(tokens, targets).item() for _ in range(20)]
        except Exception as error:
            print("%s %s: left out (%s)" % (name, variant, first_line(error)))
            continue
        print("%-12s %-16s loss %.6f -> %.6f" % (name, variant, curves[variant][0], curves[variant][-1]))
    reference = next(iter(curves.values()))
    fell = all(curve[-1] < 0.9 * curve[0] for curve in curves.values())
    spread = max(abs(a - b) for curve in curves.values() for a, b in zip(curve, reference))
    print("%-12s falls: %s, largest difference between variants %.1e" % (name, "yes" if fell else "NO", spread))
    return fell and spread < 1e-3


def profile(name):
    variant = args.variant if args.variant != "best" else "sorted"
    trainer = Trainer(name, variant)
    trainer.milliseconds(1, 2)
    parts, n = {}, 5

    def lap(part, start):
        end = time.perf_counter()
        parts[part] = parts.get(part, 0.0) + 1e3 * (end - start) / n
        return end

    for _ in range(n):
        tokens, targets = trainer.batch()
        t = time.perf_counter()
        trainer.optimizer.zero_grad(set_to_none=True)
        total = trainer.model(tokens, targets)[1]
        t = lap("forward", t)
        total.backward()
        t = lap("backward", t)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), CLIP)
        t = lap("clip", t)
        trainer.optimizer.step()
        lap("adamw", t)
    print("%s %s: %s" % (name, variant, ", ".join("%s %.1f ms" % part for part in parts.items())))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        trainer.milliseconds(3, 0)
    events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in events)
    for e in events[:16]:
        print("  %-42s %5.1f %%  %6d calls a step" % (e.key[:42], 100 * e.self_cpu_time_total / whole, e.count / 3))


def main():
    torch.set_num_threads(args.threads)
    logging.disable(logging.CRITICAL)  # torch.compile's remarks on graphs; what fails is reported by trials
    names = args.models.split(",")
    if args.check_loss:
        sys.exit(0 if all([check_loss(name) for name in names]) else 1)
    if args.profile:
        for name in names:
            profile(name)
        return
    for name in names:
        print(json.dumps(trials(name) if args.trials else measure(name)), flush=True)


if __name__ == "__main__":
    main()
