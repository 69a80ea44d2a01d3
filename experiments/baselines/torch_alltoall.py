#!/usr/bin/env python3
"""The peer of the exchange between ranks: dispatch to experts that are spread over ranks and combine, in PyTorch.

Every rank has T tokens x (T,H) in fp16, k different experts for each and k weights. Experts lie in blocks, E / ranks to
a rank. A row goes to the rank of each expert of its token, the expert multiplies it by a number of its own, the row
comes back, and the token's rows are summed with the weights: stored in fp16, computed in float32. Versions:

    empty    nothing at all: what the timing itself costs
    loop     the reference to read: host loops over tokens and slots; counts, rows and records in three messages, and
             again on the way back
    sorted   one stable sort by expert; the counts per expert, sent once, are all that a receiver needs to know, and
             say how long the messages are both ways (the one thing that the host waits for); summed by index_add_
    gather   the same, but each token collects its rows, which is one kernel with +compile
    graphs   messages of one size, with room for the most rows that any rank has for another in this very batch (the
             least that is enough), recorded as a CUDA graph: no launches, and no waiting host. Not recorded on a CPU

and gather+compile, graphs+compile, whose index arithmetic and sums went through torch.compile.

    mpirun -n 4 python3 experiments/baselines/torch_alltoall.py b1 b5 --check          or torchrun --nproc-per-node 4 ..
    shapes:  names (SHAPES), and --shape E,k,H,T; without any: b1 to b5 and the training shapes
    options: --versions sorted,graphs  --repeats N  --seconds S: at most, for each of two timings  --seed N
             --check: against the sum worked out locally  --full-tokens: T tokens a rank, not 1 to T - 1 at random
             --device cuda,cpu  --port N: a free one, for mpirun

Rank 0 prints one JSON line per shape and version. us_p50, us_p95: by events on the device, the slowest rank's of each
repeat; the cache is cleared and the ranks meet on the device just before, so launches count where the device waits for
them. wall_us: mean on rank 0's clock with the host's barriers before and after. bytes: rows one way, of the rank that
has most, padding and records left out; algbw: twice that over us_p50, GB/s. room: rows of a message of one size.

The exit status is 1 where something is left out, as a version that this installation cannot run, or a check fails. On a
CPU the ranks talk through gloo, which shows that the versions are right and nothing about speed. Called by hand; tested
by tests/test_torch_alltoall.sh. Read next: torch_gpu.py.
"""
import argparse
import collections
import gc
import json
import statistics
import sys
import time

import torch
import torch.distributed as dist

from torch_ranks import join, most_of_ranks

Shape = collections.namedtuple("Shape", "E k H T seed")
Batch = collections.namedtuple("Batch", "x chosen weight")  # (T,H) fp16, (T,k) int32, (T,k) float32

SHAPES = {
    "t1": Shape(8, 2, 6144, 4, 1236),
    "t2": Shape(64, 6, 2048, 4, 1234),
    "t3": Shape(64, 6, 2048, 8, 542),
    "t4": Shape(128, 4, 2880, 16, 347),
    "t5": Shape(128, 4, 2880, 32, 51),
    "t6": Shape(128, 8, 4096, 64, 175),
    "t7": Shape(128, 8, 4096, 128, 534),
    "t8": Shape(256, 8, 7168, 64, 897),
    "t9": Shape(256, 8, 7168, 128, 4),
    "b1": Shape(8, 2, 6144, 16, 6635),
    "b2": Shape(64, 6, 2048, 32, 1234),
    "b3": Shape(128, 4, 2880, 128, 51),
    "b4": Shape(128, 8, 4096, 256, 175),
    "b5": Shape(256, 8, 7168, 256, 4),
    "train-1024": Shape(8, 2, 1024, 4096, 1),
    "train-2048": Shape(64, 8, 2048, 8192, 1),
    "train-768": Shape(8, 2, 768, 8192, 1),
}
DEFAULT_SHAPES = ["b1", "b2", "b3", "b4", "b5", "train-1024", "train-2048", "train-768"]
CACHE = 256 << 20  # bytes, more than any GPU's L2
RECORD = 8  # fp16 columns behind a row that hold its record: 16 bytes, so that rows stay aligned


# ---- inputs and what must come out

def tokens_of(shape, rank, full):
    """How many tokens a rank has, and the generator that goes on to draw them."""
    generator = torch.Generator().manual_seed(shape.seed + rank)
    drawn = int(torch.randint(1, max(shape.T, 2), (1,), generator=generator))
    return (shape.T if full else drawn), generator


def make_batch(shape, rank, full, device):
    T, generator = tokens_of(shape, rank, full)
    x = torch.randn(T, shape.H, generator=generator).half()
    chosen = torch.rand(T, shape.E, generator=generator).argsort(1)[:, :shape.k].int()
    weight = torch.rand(T, shape.k, generator=generator)
    return Batch(*(part.contiguous().to(device) for part in (x, chosen, weight)))


def expert_scales(E, device):
    """What each expert multiplies by: exact in fp16, different for each of 256, far apart for neighbours."""
    return 1 + (torch.arange(E, device=device) * 101 % 256).float() / 64


def rows_in_order(batch, scale):
    """Expert outputs (T,H) fp16 and weights (T,1) of each token, in the order in which the loop's rows come back."""
    by_expert = batch.chosen.argsort(1)
    chosen, weight = batch.chosen.gather(1, by_expert).long(), batch.weight.gather(1, by_expert)
    for j in range(chosen.shape[1]):
        yield (batch.x.float() * scale[chosen[:, j], None]).half(), weight[:, j, None]


def rounded_sum(batch, scale):
    """The loop's result to the bit: rounded to fp16 after every addition."""
    y = torch.zeros_like(batch.x)
    for row, weight in rows_in_order(batch, scale):
        y = (y.float() + row.float() * weight).half()
    return y


def exact_sum(batch, scale):
    return sum(row.double() * weight.double() for row, weight in rows_in_order(batch, scale))


def agrees(version, y, batch, scale):
    """The loop must give the same bits. Others sum in float32, and all terms of a sum have one sign: the one rounding
    at the end is all that they may be off."""
    if version == "loop":
        return torch.equal(y, rounded_sum(batch, scale))
    exact = exact_sum(batch, scale)
    return bool(((y.double() - exact).abs() <= 1.01 * 2**-11 * exact.abs() + 2**-24).all())


# ---- the versions: each is made once for a batch and called for every exchange

class Empty:
    def __init__(self, batch, scale, compiled):
        pass

    def __call__(self):
        return None


class Loop:
    """Entries are pairs: a row and its record (expert, source rank, token, slot)."""

    def __init__(self, batch, scale, compiled):
        self.x, self.chosen, self.weight = batch
        self.scale, self.rank, self.ranks = scale, dist.get_rank(), dist.get_world_size()
        self.local = len(scale) // self.ranks

    def __call__(self):
        arrived = self.exchange(self.leaving())
        y = torch.zeros_like(self.x)
        for row, (_, _, token, slot) in self.exchange(self.returning(arrived)):
            y[token] = (y[token].float() + row.float() * self.weight[token, slot]).half()
        return y

    def leaving(self):
        """For each rank the entries that go there."""
        entries = [[] for _ in range(self.ranks)]
        for token, experts in enumerate(self.chosen.tolist()):
            for slot, expert in enumerate(experts):
                entries[expert // self.local].append((self.x[token], (expert, self.rank, token, slot)))
        return entries

    def returning(self, arrived):
        """Each expert's entries together, in the order of their arrival, and then to where they came from."""
        of_expert = [[] for _ in range(self.local)]
        for row, record in arrived:
            of_expert[record[0] % self.local].append((row, record))
        entries = [[] for _ in range(self.ranks)]
        for row, record in (entry for bucket in of_expert for entry in bucket):
            entries[record[1]].append(((row.float() * self.scale[record[0]]).half(), record))
        return entries

    def exchange(self, entries):
        """entries[r] go to rank r; returns those that came, rank by rank."""
        device = self.x.device
        leave = torch.tensor([len(part) for part in entries], device=device)
        come = torch.empty_like(leave)
        dist.all_to_all_single(come, leave)
        leave, come = leave.tolist(), come.tolist()
        together = [entry for part in entries for entry in part]
        rows = torch.stack([row for row, _ in together]) if together else self.x[:0]
        records = torch.tensor([record for _, record in together], dtype=torch.int32, device=device).view(-1, 4)
        got_rows, got_records = rows.new_empty(sum(come), rows.shape[1]), records.new_empty(sum(come), 4)
        dist.all_to_all_single(got_rows, rows, come, leave)
        dist.all_to_all_single(got_records, records, come, leave)
        return list(zip(got_rows, got_records.tolist()))


def places(order):
    """The inverse of a permutation: where each entry went."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def add_rows(rows, order, weight):
    """Every row, weighted, onto its token's sum."""
    T, k = weight.shape
    sums = torch.zeros(T, rows.shape[1], device=rows.device)
    return sums.index_add_(0, order // k, rows * weight.flatten()[order, None]).half()


def collect_rows(rows, place, weight):
    """For every token the weighted sum of its k rows."""
    T, k = weight.shape
    return (rows.index_select(0, place).view(T, k, -1) * weight.unsqueeze(-1)).sum(1).half()


class Sorted:
    """Rows of one expert lie together, so counts per expert say whose each row is, at both ends and on both ways."""

    collects = False

    def __init__(self, batch, scale, compiled):
        self.x, self.chosen, self.weight = batch
        self.E, self.ranks, entries = len(scale), dist.get_world_size(), self.chosen.numel()
        local = self.E // self.ranks
        first = dist.get_rank() * local
        self.scale = scale[first:first + local].repeat(self.ranks)  # of the counts that come in
        self.ones = torch.ones(entries, dtype=torch.int32, device=self.x.device)
        self.counts = torch.empty(2, self.E, dtype=torch.int32, device=self.x.device)  # that leave, that come
        self.rows = self.x.new_empty(entries, self.x.shape[1])  # first what leaves, then what came back
        self.arrived = self.x[:0]
        self.places, self.collect_rows = compiled(places), compiled(collect_rows)

    def __call__(self):
        order, leave, come = self.plan()
        arrived = self.dispatch(order, leave, come)
        scale = torch.repeat_interleave(self.scale, self.counts[1], output_size=sum(come))
        torch.mul(arrived, scale[:, None], out=arrived)
        dist.all_to_all_single(self.rows, arrived, leave, come)
        if self.collects:
            return self.collect_rows(self.rows, self.places(order), self.weight)
        return add_rows(self.rows, order, self.weight)

    def plan(self):
        """Entries in the order of their experts, and the rows that leave for and come from each rank."""
        expert = self.chosen.flatten()
        order = expert.argsort(stable=True)
        self.counts[0].zero_().scatter_add_(0, expert.long(), self.ones)
        dist.all_to_all_single(self.counts[1], self.counts[0])
        leave, come = self.counts.view(2, self.ranks, -1).sum(-1).tolist()
        return order, leave, come

    def dispatch(self, order, leave, come):
        if len(self.arrived) < sum(come):
            self.arrived = self.rows.new_empty(sum(come), self.rows.shape[1])
        arrived = self.arrived[:sum(come)]
        torch.index_select(self.x, 0, order // self.chosen.shape[1], out=self.rows)
        dist.all_to_all_single(arrived, self.rows, come, leave)
        return arrived


class Gather(Sorted):
    collects = True


def padded_plan(chosen, ranks, local, room, entry_at):
    """Each rank has `room` places for each rank. Returns the place of each entry and writes the inverse to entry_at.
    Places without an entry keep what they held, some entry's number: what goes there is sent, and nobody reads it."""
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    to = expert[order] // local
    first = torch.searchsorted(to, torch.arange(ranks, dtype=to.dtype, device=to.device))
    place = torch.arange(len(to), device=to.device) - first[to.long()] + to * room
    entry_at.scatter_(0, place, order)
    return torch.empty_like(place).scatter_(0, order, place)


class Graphs:
    """Messages of `room` rows. A row's expert, its number within the rank, travels behind the row in the same message;
    nothing but the rows comes back."""

    def __init__(self, batch, scale, compiled):
        self.x, self.chosen, self.weight = batch
        self.ranks, H = dist.get_world_size(), self.x.shape[1]
        self.local = len(scale) // self.ranks
        self.scale = scale.view(self.ranks, -1)[dist.get_rank()]
        loads = torch.bincount(self.chosen.flatten() // self.local)
        self.room = int(most_of_ranks(loads.max().double()))
        places = self.ranks * self.room
        self.entry_at = torch.zeros(places, dtype=torch.int64, device=self.x.device)
        self.leaving, self.arrived = (self.x.new_zeros(places, H + RECORD) for _ in range(2))
        self.returning, self.back = (self.x.new_zeros(places, H) for _ in range(2))
        self.plan, self.collect_rows = compiled(padded_plan), compiled(collect_rows)
        self.graph = None
        if self.x.is_cuda:
            self.record()

    def __call__(self):
        if self.graph is None:
            return self.exchange()
        self.graph.replay()
        return self.y

    def record(self):
        """The first calls, which may set up and compile, are made outside the graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.exchange()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
            self.y = self.exchange()
        self.graph = graph

    def exchange(self):
        H, k = self.x.shape[1], self.chosen.shape[1]
        place = self.plan(self.chosen, self.ranks, self.local, self.room, self.entry_at)
        torch.index_select(self.x, 0, self.entry_at // k, out=self.leaving[:, :H])
        expert = self.chosen.flatten().index_select(0, self.entry_at)
        self.leaving.view(torch.int16)[:, H] = expert % self.local
        dist.all_to_all_single(self.arrived, self.leaving)
        scale = self.scale.index_select(0, self.arrived.view(torch.int16)[:, H].int())
        torch.mul(self.arrived[:, :H], scale[:, None], out=self.returning)
        dist.all_to_all_single(self.back, self.returning)
        return self.collect_rows(self.back, place, self.weight)


VERSIONS = {"empty": Empty, "loop": Loop, "sorted": Sorted, "gather": Gather, "gather+compile": Gather,
            "graphs": Graphs, "graphs+compile": Graphs}


def make_exchange(version, batch, scale):
    plain = lambda function: function
    return VERSIONS[version](batch, scale, torch.compile if version.endswith("+compile") else plain)


# ---- timing

class Clock:
    """The two timings of a call that all ranks make, in microseconds."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.flag = torch.zeros(1, device=device)
        self.cache = torch.empty(CACHE if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def barrier(self):
        dist.all_reduce(self.flag)
        self.wait()

    def wall(self, call):
        self.cache.zero_()
        self.wait()
        self.barrier()
        begin = time.perf_counter()
        call()
        self.wait()
        self.barrier()
        return 1e6 * (time.perf_counter() - begin)

    def on_device(self, call):
        """The host is not made to wait before the call: it launches while the cache is being cleared."""
        if not self.on_gpu:
            self.barrier()
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        dist.all_reduce(self.flag)
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def repeat(self, call, repeats, seconds):
        """What up to `repeats` calls return; all ranks stop together once a rank's clock has passed the time."""
        results, end = [], time.perf_counter() + seconds
        while len(results) < repeats:
            results.append(call())
            late = torch.full_like(self.flag, time.perf_counter() > end)
            if most_of_ranks(late).item():
                break
        return results


def measure(call, clock, repeats, seconds):
    """Mean of rank 0's wall times, and of each repeat the slowest rank's time on its device, sorted."""
    clock.repeat(call, 10, seconds / 10)
    wall = clock.repeat(lambda: clock.wall(call), repeats, seconds)
    times = clock.repeat(lambda: clock.on_device(call), repeats, seconds)
    times = most_of_ranks(torch.tensor(times, dtype=torch.float64, device=clock.flag.device))
    return statistics.mean(wall), sorted(times.tolist())


def percentile(times, p):
    """The smallest of sorted times that p percent of them do not exceed."""
    return times[-(-p * len(times) // 100) - 1]


def right_everywhere(version, exchange, batch, scale, clock):
    """Two calls, found right by each rank for itself: the second finds in all buffers what the first left."""
    wrong = [not agrees(version, exchange(), batch, scale) for _ in range(2)]
    return not most_of_ranks(torch.full_like(clock.flag, any(wrong))).item()


def bench(name, shape, version, clock, args):
    """One shape in one version: its JSON line, from rank 0; False where the check failed."""
    device, checked = clock.flag.device, args.check and version != "empty"
    batch, scale = make_batch(shape, dist.get_rank(), args.full_tokens, device), expert_scales(shape.E, device)
    exchange = make_exchange(version, batch, scale)
    if checked and not right_everywhere(version, exchange, batch, scale, clock):
        return False
    wall, times = measure(exchange, clock, args.repeats, args.seconds)
    tokens = [tokens_of(shape, rank, args.full_tokens)[0] for rank in range(dist.get_world_size())]
    sent, p50 = max(tokens) * shape.k * shape.H * batch.x.element_size(), percentile(times, 50)
    line = {"shape": name, "E": shape.E, "k": shape.k, "H": shape.H, "T": shape.T, "seed": shape.seed,
            "impl": "torch", "version": version, "ranks": len(tokens), "us_p50": round(p50, 2),
            "us_p95": round(percentile(times, 95), 2), "wall_us": round(wall, 2),
            "repeats": len(times), "tokens": tokens, "bytes": sent, "algbw": round(2 * sent / p50 / 1e3, 3),
            "checked": checked, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if clock.on_gpu else "cpu"}
    if version == "empty":
        line["bytes"] = line["algbw"] = 0
    if isinstance(exchange, Graphs):
        line["room"] = exchange.room
    if dist.get_rank() == 0:
        print(json.dumps(line), flush=True)
    return True


# ---- the program

def parse_shape(text):
    try:
        E, k, H, T = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("%s: give E,k,H,T" % text)
    if not 1 <= k <= E or H < 1 or T < 1:
        raise argparse.ArgumentTypeError("%s: need 1 <= k <= E, H >= 1, T >= 1" % text)
    return Shape(E, k, H, T, 1)


def parse_versions(text):
    versions = text.split(",")
    for version in versions:
        if version not in VERSIONS:
            raise argparse.ArgumentTypeError("%s: choose from %s" % (version, ",".join(VERSIONS)))
    return versions


def arguments():
    default = [version for version in VERSIONS if "+" not in version or hasattr(torch, "compile")]
    p = argparse.ArgumentParser(description="time dispatch and combine between ranks in PyTorch")
    p.add_argument("names", nargs="*", metavar="name", help="of " + ", ".join(SHAPES))
    p.add_argument("--shape", action="append", type=parse_shape, default=[], metavar="E,k,H,T")
    p.add_argument("--versions", type=parse_versions, default=default, help="of " + ",".join(VERSIONS))
    p.add_argument("--repeats", type=int, default=100)
    p.add_argument("--seconds", type=float, default=10, help="at most, for each of two timings; of the warm-up a tenth")
    p.add_argument("--seed", type=int, help="in place of each shape's own; rank r draws from seed + r")
    p.add_argument("--check", action="store_true")
    p.add_argument("--full-tokens", action="store_true", help="T tokens a rank; default: 1 to T - 1, at random")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--port", type=int,
                   help="a free one of rank 0's machine, for mpirun; default: MASTER_PORT (torchrun sets it) or 29500")
    args = p.parse_args()
    for name in args.names:
        if name not in SHAPES:
            p.error("%s: choose from %s, or give --shape E,k,H,T" % (name, ", ".join(SHAPES)))
    if args.repeats < 1:
        p.error("--repeats: at least 1")
    return args


def complain(text):
    """Of what all ranks know, one line."""
    if dist.get_rank() == 0:
        print("torch_alltoall.py: " + text, file=sys.stderr, flush=True)


def bench_versions(name, shape, clock, args):
    """One shape in all versions; False where one was left out."""
    if shape.E % dist.get_world_size():
        complain("%s: left out: %d experts do not divide among %d ranks" % (name, shape.E, dist.get_world_size()))
        return False
    complete = True
    for version in args.versions:
        try:
            right = bench(name, shape, version, clock, args)
        except Exception as error:  # what this installation lacks is no peer; all ranks lack it and go on
            print("torch_alltoall.py: %s %s: left out by rank %d: %s" % (name, version, dist.get_rank(),
                  str(error).strip().split("\n")[0][:160]), file=sys.stderr, flush=True)
            complete, right = False, True
        if not right:
            complain("%s %s: wrong results" % (name, version))
            sys.exit(1)
        if hasattr(torch, "_dynamo"):
            torch._dynamo.reset()  # each shape is compiled for itself
        gc.collect()
    return complete


def main():
    args = arguments()
    shapes = {name: SHAPES[name] for name in args.names or ([] if args.shape else DEFAULT_SHAPES)}
    shapes.update({"%d,%d,%d,%d" % shape[:4]: shape for shape in args.shape})
    if args.seed is not None:
        shapes = {name: shape._replace(seed=args.seed) for name, shape in shapes.items()}
    clock = Clock(join(args.device, args.port))
    complete = [bench_versions(name, shape, clock, args) for name, shape in shapes.items()]
    dist.destroy_process_group()
    sys.exit(0 if all(complete) else 1)


if __name__ == "__main__":
    main()
