#!/usr/bin/env bash
# Tests of what experiments/baselines/torch_gpu.py does on several ranks, on CPU ranks, that is PyTorch's gloo: ranks
# that share a batch get the gradients of the whole, keep the same weights, and print what they should.
#
#     tests/test_torch_gpu.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
#     PYTHON    one that has PyTorch 2.4 or later; default: python3
# Without it every test is skipped. Called by run_tests.sh. Read next: cli_checks.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

BASELINES=$(realpath experiments/baselines)
export PYTHONPATH=$BASELINES PYTHONDONTWRITEBYTECODE=1 CUDA_VISIBLE_DEVICES=
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'from torch.nn.functional import rms_norm; import torch.distributed' 2>/dev/null || PYTHON=

needs_torch() {
    [ -n "$PYTHON" ] || { skip "no PyTorch that knows rms_norm"; return 1; }
}

# ranks COUNT FILE ARGUMENT...: output is in the files `out` and `err`, the highest exit status in $status.
ranks() {
    local count=$1 port pids=() ended
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    : >out
    : >err
    for ((r = 0; r < count; r++)); do
        RANK=$r WORLD_SIZE=$count MASTER_PORT=$port timeout 100 "$PYTHON" "${@:2}" </dev/null >>out 2>>err &
        pids+=($!)
    done
    status=0
    for pid in "${pids[@]}"; do
        ended=0
        wait "$pid" || ended=$?
        [ "$status" -ge "$ended" ] || status=$ended
    done
}

# cpu.py: the peer with a small model on CPU ranks, and a clock in place of a GPU's.
cpu_peer() {
    cat >cpu.py <<'PYTHON'
import time
import torch
import torch_gpu as peer
import torch_ranks

class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

peer.DEVICE, join = "cpu", torch_ranks.join
peer.MODELS["small"] = dict(L=2, C=16, NH=2, T=8, H=16, E=4, K=2, V=31, B=4)
torch_ranks.join = lambda kind, port=None, seconds=100: join("cpu", port, seconds)
torch.cuda.Event, torch.cuda.get_device_name, torch.cuda.max_memory_allocated = Event, lambda: "cpu", lambda: 0
torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda: None

def main():
    torch.cuda.is_available = iter([True] + 1000 * [False]).__next__  # asked for once before anything begins
    peer.main()

if __name__ == "__main__":
    main()
PYTHON
}

# Ranks that share a batch find the gradients that one rank finds on all of it. Of the balance loss each takes its own.
test_gradients() {
    needs_torch || return
    cpu_peer
    cat >gradients.py <<'PYTHON'
from cpu import *
import torch.distributed as dist
torch_ranks.join("cpu")
m, rank, peer.AUX_COEF = peer.MODELS["small"], dist.get_rank(), 0.0
for weights in "rounded", "copies":
    part = peer.Step({**m, "B": 2}, "loop", weights == "copies", rank, 25)
    whole = peer.Step(m, "loop", weights == "copies")
    for name in "tokens", "targets":
        parts = [torch.empty_like(part.tokens) for _ in range(2)]
        dist.all_gather(parts, getattr(part, name))
        assert not torch.equal(*parts), "both ranks drew the same"
        setattr(whole, name, torch.cat(parts))
    for step in part, whole:
        step.forward(step.tokens, step.targets).backward()
    for (name, p), q in zip(part.model.named_parameters(), whole.params):
        off = (p.grad.float() - q.grad.float()).norm() / q.grad.float().norm()
        assert off < 0.03, "%s of %s is off by %g" % (name, weights, off)
dist.destroy_process_group()
PYTHON
    ranks 2 gradients.py
    ends 0
}

# Each rank moves all weights, by gradients that are the same on all: so are the weights, to the bit.
test_weights() {
    needs_torch || return
    cpu_peer
    cat >weights.py <<'PYTHON'
from cpu import *
import torch.distributed as dist
torch_ranks.join("cpu")
for weights in "rounded", "copies":
    step = peer.Step(peer.MODELS["small"], "loop", weights == "copies", dist.get_rank(), 25)
    before = [p.clone() for p in step.owned]
    for _ in range(3):
        step()
    for p, old, used in zip(step.owned, before, step.params):
        least, most = p.detach().clone(), p.detach().clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        assert torch.equal(least, most), "ranks have different weights"
        assert not torch.equal(p, old) and torch.equal(used, p.to(used.dtype))
dist.destroy_process_group()
PYTHON
    ranks 2 weights.py
    ends 0
}

test_lines() {
    needs_torch || return
    cpu_peer
    ranks 2 cpu.py train small --ways loop --modes weak,strong --buckets 5,25 --repeats 2
    ends 0
    check "lines of two ranks" "$PYTHON" - <<'PYTHON'
import json
lines = [json.loads(line) for line in open("out")]
assert [(line["mode"], line["way"], line["bucket_mib"]) for line in lines] == [
    (mode, "loop, " + weights, mib) for mode in ("weak", "strong")
    for weights in ("rounded in use", "bf16 copies") for mib in (5, 25)], lines
for line in lines:
    tokens = 8 * (8 if line["mode"] == "weak" else 4)
    assert line["ranks"] == 2 and abs(line["tok_s"] * line["ms"] / 1e3 / tokens - 1) < 0.01, line
PYTHON
    ranks 2 cpu.py train small --ways loop,grouped+graphs --seconds 0
    printf 'small loop %s weak: not begun, 0 s are over\n' rounded copies >wanted
    check "after the limit: $(cat err)" diff wanted err
    ranks 1 cpu.py train small --ways loop --weights copies --modes strong --repeats 2
    ends 0
    check "one rank has the whole batch: $(cat out)" grep -q '"ranks": 1, "mode": "weak"}$' out
    ranks 3 cpu.py train small --ways loop --weights copies --modes strong
    check "a batch that does not divide: $(cat err)" grep -q 'left out (a batch of 4 is not to be shared by 3' err
}

test_refusals() {
    needs_torch || return
    ranks 2 "$BASELINES/torch_gpu.py" layer tiny
    ends 2
    check "layers on two ranks: $(cat err)" grep -q 'layer is of one rank; 2 were started' err
    ranks 1 "$BASELINES/torch_gpu.py" train --modes fast
    ends 2
    ranks 1 "$BASELINES/torch_gpu.py" train tiny
    ends 1
    check "no GPU: $(cat err)" grep -q '^torch_gpu.py: PyTorch sees no GPU' err
    cat >join.py <<'PYTHON'
import torch_ranks
torch_ranks.join("cuda")
PYTHON
    ranks 1 join.py
    ends 1
    check "a GPU for each rank: $(cat err)" grep -q '^join.py: rank 0 has no GPU: 0 are here' err
}

run_tests "$@"
