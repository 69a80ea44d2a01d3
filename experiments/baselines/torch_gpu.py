#!/usr/bin/env python3
"""The peer on a GPU: the same mixture-of-experts layer and training step, written in PyTorch as well as we can.

Layer: router (float32 softmax, top-K, renormalised) + permutation + experts + combine + balance loss, forward and
backward, weights and data in bf16. Training step: the model of this project (RMSNorm, RoPE, QK-norm, no biases, SwiGLU
experts, tied head), bf16 with float32 master weights, clipping, fused AdamW. Experts are written in several ways
(WAYS), each also through torch.compile: as a whole (+compile), with CUDA graphs (+graphs), or block by block (+blocks),
which takes a fraction of the time to compile. The fastest that runs is the peer.

    python3 experiments/baselines/torch_gpu.py layer tiny olmoe       one JSON line per layer configuration and way
    python3 experiments/baselines/torch_gpu.py train d12 tiny-byte    .. per model and way
    python3 experiments/baselines/torch_gpu.py dispatch 16384,4096,128,2
    mpirun -n 4 python3 experiments/baselines/torch_gpu.py train d12  or torchrun --nproc-per-node 4 ..
    options: --ways grouped,grouped+compile,grouped+blocks,grouped+graphs,loop,scatter   --weights rounded,copies
             --repeats N   --seconds S: after so many nothing further is begun
    and of several ranks: --modes weak,strong   --buckets MIB,MIB   --port N: a free one, for mpirun

Several ranks, a GPU to each, train one model: DistributedDataParallel averages the gradients while the backward runs,
then each rank clips and moves all weights. weak: each rank has the model's batch; strong: they share it. Gradients
travel as they are: float32, or bf16 with bf16 copies of the weights. What is compiled as a whole is cut where a bucket
of gradients is full (--buckets); compiled blocks hand over their gradients one by one. CUDA graphs are left out. Rank 0
prints the lines: tokens of all ranks, by the time of the slowest rank.

Medians of event times after a warm-up; normal random data. Called by experiments/gpu_compare.sh and scaling_compare.sh.
Read next: torch_ranks.py, torch_cpu.py.
"""
import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from functools import partial

START = time.monotonic()  # loading PyTorch takes seconds, which count

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torch_ranks

LAYERS = {  # tokens T, width C, expert width H, experts E, per token K, activation
    "course-mid": (16384, 1024, 4096, 8, 2, "gelu"),
    "course-big": (65536, 2048, 8192, 16, 2, "gelu"),
    "course-top1": (16384, 1024, 4096, 4, 1, "gelu"),
    "olmoe": (32768, 2048, 1024, 64, 8, "swiglu"),
    "fine": (24576, 1536, 256, 128, 8, "swiglu"),
    "tiny": (16384, 512, 1408, 8, 2, "swiglu"),
}
MODELS = {
    "d12": dict(L=12, C=768, NH=12, T=1024, H=2048, E=8, K=2, V=50304, B=32),
    "d12-fine": dict(L=12, C=768, NH=12, T=1024, H=512, E=64, K=8, V=50304, B=32),
    "d12-dense": dict(L=12, C=768, NH=12, T=1024, H=4096, E=1, K=1, V=50304, B=32),
    "tiny": dict(L=6, C=512, NH=8, T=512, H=1024, E=8, K=2, V=8192, B=64),
    "tiny-byte": dict(L=4, C=256, NH=4, T=256, H=512, E=8, K=2, V=256, B=64),
}
WAYS = ["grouped", "grouped+compile", "grouped+blocks", "grouped+graphs", "loop", "scatter"]
EPS, ROPE_BASE, AUX_COEF, Z_COEF, CLIP, LR = 1e-6, 10000.0, 0.01, 0.001, 1.0, 3e-4
DEVICE = "cuda"  # of several ranks each has its own, the current one


class MoE(nn.Module):
    """x (N,C) -> y (N,C) and the balance and z-losses."""

    def __init__(self, C, H, E, K, act, way, dtype):
        super().__init__()
        self.E, self.K, self.act, self.way = E, K, act, way
        width = 2 * H if act == "swiglu" else H
        make = lambda *shape: nn.Parameter((torch.randn(*shape, device=DEVICE) * 0.02).to(dtype))
        self.router = nn.Parameter(torch.randn(E, C, device=DEVICE) * 0.02)
        self.w1, self.w2 = make(E, width, C), make(E, C, H)
        if way == "scatter":
            from scattermoe.mlp import MLP, GLUMLP  # noqa: F401  (only where it is installed)
            kind = GLUMLP if act == "swiglu" else MLP
            activation = nn.SiLU() if act == "swiglu" else nn.GELU(approximate="tanh")
            self.mlp = kind(C, H, E, K, activation=activation).to(DEVICE, dtype)

    def activation(self, a):
        if self.act == "gelu":
            return F.gelu(a, approximate="tanh")
        gate, up = a.chunk(2, -1)
        return F.silu(gate) * up

    def route(self, x):
        with torch.autocast("cuda", enabled=False):
            logits = x.float() @ self.router.t()
            probs = logits.softmax(-1)
            weight, chosen = probs.topk(self.K, -1)
            if self.K > 1:
                weight = weight / weight.sum(-1, keepdim=True)
            count = torch.zeros(self.E, device=x.device, dtype=torch.int32).scatter_add_(
                0, chosen.reshape(-1), torch.ones(chosen.numel(), device=x.device, dtype=torch.int32))
            balance = self.E * (count.float() / chosen.numel() * probs.mean(0)).sum()
            return weight, chosen, count, balance, logits.logsumexp(-1).square().mean()

    def forward(self, x):
        N, C = x.shape
        w1, w2 = self.w1.to(x.dtype), self.w2.to(x.dtype)
        if self.E == 1:
            return F.linear(self.activation(F.linear(x, w1[0])), w2[0]), 0.0, 0.0
        weight, chosen, count, balance, z = self.route(x)
        if self.way == "scatter":
            return self.mlp(x, weight.to(x.dtype), chosen), balance, z
        if self.way == "loop":
            y = torch.zeros_like(x)
            for e in range(self.E):
                token, slot = torch.where(chosen == e)
                rows = F.linear(self.activation(F.linear(x[token], w1[e])), w2[e])
                y.index_add_(0, token, rows * weight[token, slot, None].to(x.dtype))
            return y, balance, z
        order = chosen.reshape(-1).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(N * self.K, device=x.device)
        ends = count.cumsum(0).to(torch.int32)
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        rows = x.index_select(0, order // self.K)
        rows = product(self.activation(product(rows, w1.transpose(1, 2), offs=ends)), w2.transpose(1, 2), offs=ends)
        y = rows.index_select(0, place).view(N, self.K, C)
        return (y * weight.to(x.dtype).unsqueeze(-1)).sum(1), balance, z


class Block(nn.Module):
    def __init__(self, m, way, dtype):
        super().__init__()
        C, self.NH, self.HS = m["C"], m["NH"], m["C"] // m["NH"]
        ones = lambda n: nn.Parameter(torch.ones(n, device=DEVICE, dtype=dtype))
        make = lambda *shape: nn.Parameter((torch.randn(*shape, device=DEVICE) * 0.02).to(dtype))
        self.norm1, self.norm2, self.q_norm, self.k_norm = ones(C), ones(C), ones(self.HS), ones(self.HS)
        self.qkv, self.out = make(3 * C, C), make(C, C)
        self.moe = MoE(C, m["H"], m["E"], m["K"], "swiglu", way, dtype)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        norm = lambda t, w: F.rms_norm(t, (t.shape[-1],), w.to(t.dtype), EPS)
        q, k, v = F.linear(norm(x, self.norm1), self.qkv.to(x.dtype)).view(B, T, 3, self.NH, self.HS).unbind(2)

        def turn(t):
            a, b = t.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(turn(norm(q, self.q_norm)), turn(norm(k, self.k_norm)), v.transpose(1, 2),
                                           is_causal=True)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), self.out.to(x.dtype))
        y, balance, z = self.moe(norm(x, self.norm2).flatten(0, 1))
        return x + y.view_as(x), balance, z


class Model(nn.Module):
    def __init__(self, m, way, dtype):
        super().__init__()
        self.embedding = nn.Parameter((torch.randn(m["V"], m["C"], device=DEVICE) * 0.02).to(dtype))
        self.blocks = nn.ModuleList([Block(m, way, dtype) for _ in range(m["L"])])
        self.norm = nn.Parameter(torch.ones(m["C"], device=DEVICE, dtype=dtype))
        half = m["C"] // m["NH"] // 2
        angle = torch.outer(torch.arange(m["T"]).float(), ROPE_BASE ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos()[None, :, None].to(DEVICE, torch.bfloat16))
        self.register_buffer("sin", angle.sin()[None, :, None].to(DEVICE, torch.bfloat16))

    def forward(self, tokens, targets):
        weight = self.embedding.to(torch.bfloat16)
        x = F.embedding(tokens, weight)
        balance = z = 0.0
        for block in self.blocks:
            x, b, s = block(x, self.cos, self.sin)
            balance, z = balance + b, z + s
        return self.head(x, weight, targets) + (AUX_COEF * balance + Z_COEF * z) / len(self.blocks)

    def head(self, x, weight, targets):
        hidden = F.rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), EPS)
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


class Step:
    """One training step of a rank, on m["B"] sequences of its own. master: the model's parameters are bf16 copies of
    float32 ones that the optimizer moves; otherwise they are float32 and are rounded where they are used. bucket: of
    several ranks, MiB of gradients that are averaged at once; None: there is one rank."""

    def __init__(self, m, way, master, rank=0, bucket=None):
        torch.manual_seed(1)
        base = way.split("+")[0]
        self.model = Model(m, base, torch.bfloat16 if master else torch.float32)
        self.params = list(self.model.parameters())
        self.owned = [p.detach().float().clone() for p in self.params] if master else self.params
        groups = [{"params": [p for p in self.owned if p.dim() > 1], "weight_decay": 0.1},
                  {"params": [p for p in self.owned if p.dim() == 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
        if way.endswith("+blocks"):
            torch._dynamo.config.optimize_ddp = False  # blocks are not to be cut further
            self.model.head = torch.compile(self.model.head)
            for block in self.model.blocks:
                block.compile()
        self.forward = compiled(self.model if bucket is None else averaging(self.model, bucket), way)
        self.master = master
        generator = torch.Generator(device=DEVICE).manual_seed(2 + rank)
        text = torch.multinomial(1.0 / (torch.arange(m["V"], device=DEVICE) + 2.7), m["B"] * (m["T"] + 1), True,
                                 generator=generator).view(m["B"], -1)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def __call__(self):
        if hasattr(torch.compiler, "cudagraph_mark_step_begin"):
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.forward(self.tokens, self.targets)
        loss.backward()
        if self.master:
            for owned, p in zip(self.owned, self.params):
                owned.grad = p.grad if p.grad.dtype == torch.float32 else p.grad.float()
        torch.nn.utils.clip_grad_norm_(self.owned, CLIP, foreach=True)
        self.optimizer.step()
        if self.master:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.owned)
        for p in self.params:
            p.grad = None


def averaging(model, bucket):
    """The model, whose backward leaves the mean of the ranks' gradients. The buffers are constants."""
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket, gradient_as_bucket_view=True,
                                               static_graph=True, broadcast_buffers=False)


def compiled(function, way):
    if way.endswith("+compile"):
        return torch.compile(function)
    if way.endswith("+graphs"):
        return torch.compile(function, mode="reduce-overhead")
    return function


def milliseconds(call, warm_up, repeats):
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times)


def result(kind, name, way, times, **more):
    line = {kind: name, "impl": "torch", "way": way, "ms": round(statistics.median(times), 4),
            "p95": round(times[int(0.95 * (len(times) - 1))], 4), "repeats": len(times),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(), **more}
    print(json.dumps(line), flush=True)


def bench_layer(name, way, repeats):
    T, C, H, E, K, act = LAYERS[name]
    torch.manual_seed(1)
    layer = MoE(C, H, E, K, act, way.split("+")[0], torch.bfloat16)
    x = torch.randn(T, C, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(T, C, device=DEVICE, dtype=torch.bfloat16)
    forward = compiled(layer, way)

    def call():
        if way.endswith("+graphs"):
            torch.compiler.cudagraph_mark_step_begin()
        y, balance, z = forward(x)
        torch.autograd.backward([y, AUX_COEF * balance + Z_COEF * z], [dy, None])
        x.grad = None
        for p in layer.parameters():
            p.grad = None
    flops = 3 * (6 if act == "swiglu" else 4) * T * K * C * H
    times = milliseconds(call, 10, repeats)
    result("layer", name, way, times, tflops=round(flops / statistics.median(times) / 1e9, 1))


def bench_train(name, way, repeats, mode="weak", weights="rounded", bucket=None):
    rank, ranks, _ = torch_ranks.who()
    m = dict(MODELS[name])
    if mode == "strong":
        if m["B"] % ranks:
            raise ValueError("a batch of %d is not to be shared by %d ranks" % (m["B"], ranks))
        m["B"] //= ranks
    step = Step(m, way, weights == "copies", rank, bucket)
    times = milliseconds(step, 8, repeats)
    if ranks > 1:  # sorted ones: the largest median, not each step's largest time, which may be another rank's
        times = torch_ranks.most_of_ranks(torch.tensor(times, dtype=torch.float64, device=DEVICE)).tolist()
    if rank == 0:
        result("model", name, way + (", bf16 copies" if weights == "copies" else ", rounded in use"), times,
               tok_s=round(1e3 * ranks * m["B"] * m["T"] / statistics.median(times)), ranks=ranks, mode=mode,
               **({} if bucket is None else {"bucket_mib": bucket}))


def bench_dispatch(shape, repeats):
    """Rows to experts and back with identity experts, compiled."""
    T, C, E, K = (int(n) for n in shape.split(","))
    x = torch.randn(T, C, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.rand(T, K, device=DEVICE, dtype=torch.bfloat16)
    chosen = torch.rand(T, E, device=DEVICE).topk(K, -1).indices
    order = chosen.reshape(-1).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(T * K, device=DEVICE)
    token = order // K

    @torch.compile
    def both():
        rows = x.index_select(0, token)
        return rows, (rows.index_select(0, place).view(T, K, C) * weight.unsqueeze(-1)).sum(1)
    times = milliseconds(both, 5, repeats)
    copied = torch.empty(256 << 20, device=DEVICE, dtype=torch.uint8)
    copy = statistics.median(milliseconds(lambda: copied[:128 << 20].copy_(copied[128 << 20:]), 5, 20))
    gbs = (2 + 2 * K) * T * C * 2 / statistics.median(times) / 1e6
    result("dispatch", shape, "compile", times, gb_s=round(gbs), copy_gb_s=round((256 << 20) / copy / 1e6))


def measurements(args):
    """In their order: what each is called, and what makes it."""
    table = {"layer": LAYERS, "train": MODELS}.get(args.kind)
    for name in args.names or table or ["16384,4096,128,2", "32768,2048,64,8"]:
        if args.kind == "dispatch":
            yield "%s compile" % name, partial(bench_dispatch, name, args.repeats)
            continue
        for way in args.ways:
            if args.kind == "layer" and not way.endswith("+blocks"):
                yield "%s %s" % (name, way), partial(bench_layer, name, way, args.repeats)
            elif args.kind == "train" and way != "scatter":
                for mode, weights, bucket in itertools.product(args.modes, args.weights.split(","), args.buckets):
                    yield ("%s %s %s %s" % (name, way, weights, mode),
                           partial(bench_train, name, way, args.repeats, mode, weights, bucket))


def late(seconds, ranks):
    """Whether the time is over: of several ranks for all once it is for one."""
    over = time.monotonic() - START > seconds
    return bool(torch_ranks.most_of_ranks(torch.tensor(float(over), device=DEVICE)).item()) if ranks > 1 else over


def arguments(ranks):
    p = argparse.ArgumentParser(description="time PyTorch's MoE layer or training step on a GPU, or steps on several")
    p.add_argument("kind", choices=["layer", "train", "dispatch"])
    p.add_argument("names", nargs="*")
    p.add_argument("--ways", default=",".join(WAYS))
    p.add_argument("--weights", default="rounded,copies",
                   help="of a training step: float32 rounded where used, bf16 copies beside float32, or both")
    p.add_argument("--modes", default="weak", help="of several ranks: each has the model's batch (weak), or they share "
                   "it (strong), or both: weak,strong")
    p.add_argument("--buckets", default="25", help="of several ranks: MiB of gradients that are averaged at once, or "
                   "several such numbers")
    p.add_argument("--port", type=int,
                   help="a free one of rank 0's machine, for mpirun; default: MASTER_PORT (torchrun sets it) or 29500")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing further after so many")
    args = p.parse_args()
    if ranks > 1 and args.kind != "train":
        p.error("%s is of one rank; %d were started" % (args.kind, ranks))
    if not set(args.modes.split(",")) <= {"weak", "strong"}:
        p.error("--modes %s: choose from weak,strong" % args.modes)
    args.ways = [way for way in args.ways.split(",") if ranks == 1 or not way.endswith("+graphs")]
    args.modes = args.modes.split(",") if ranks > 1 else ["weak"]
    args.buckets = [float(mib) for mib in args.buckets.split(",")] if ranks > 1 else [None]
    return args


def main():
    rank, ranks, _ = torch_ranks.who()
    args = arguments(ranks)
    if not torch.cuda.is_available():
        sys.exit("torch_gpu.py: PyTorch sees no GPU: run it on a machine with one")
    torch.set_float32_matmul_precision("high")
    if ranks > 1:
        torch_ranks.join("cuda", args.port, seconds=180)  # others may still compile
    for called, measure in measurements(args):
        if late(args.seconds, ranks):
            if rank == 0:
                print("%s: not begun, %g s are over" % (called, args.seconds), file=sys.stderr)
            continue
        torch.cuda.reset_peak_memory_stats()
        try:
            measure()
        except Exception as error:  # a way that this installation lacks is no peer, on any rank: say so and go on
            print("%s: left out (%s)" % (called, str(error).strip().split("\n")[0][:160]), file=sys.stderr, flush=True)
            if ranks > 1 and isinstance(error, torch.cuda.OutOfMemoryError):
                os._exit(1)  # others may have had enough, and wait for this rank
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = True
        gc.collect()  # modules and graphs refer to each other: the next peak is to be its own
        torch.cuda.empty_cache()
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
