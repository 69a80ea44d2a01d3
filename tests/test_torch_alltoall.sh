#!/usr/bin/env bash
# Tests of experiments/baselines/torch_alltoall.py on CPU ranks, that is PyTorch's gloo: every version gives what the
# sum worked out locally gives, the check that says so notices mistakes, and the lines hold what they should.
#
#     tests/test_torch_alltoall.sh [NAME...]   from the repository's root; NAME: only the tests whose names contain it
#
#     PYTHON    one that has PyTorch; default: python3, or /usr/bin/python3 where only that one has it
# Without PyTorch every test is skipped. Called by run_tests.sh. Read next: cli_checks.sh.
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

BASELINES=$(realpath experiments/baselines)
export PYTHONDONTWRITEBYTECODE=1
for PYTHON in "${PYTHON:-python3}" /usr/bin/python3 ''; do
    [ -n "$PYTHON" ] || break
    ! "$PYTHON" -c 'import torch.distributed as d; d.init_process_group' 2>/dev/null || break
done

needs_torch() {
    [ -n "$PYTHON" ] || { skip "no PyTorch"; return 1; }
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# ranks COUNT ARGUMENT...: output is in the files `out` and `err`, the highest exit status in $status.
ranks() {
    local count=$1 port pids=() ended
    port=$(free_port)
    : >out
    : >err
    for ((r = 0; r < count; r++)); do
        RANK=$r WORLD_SIZE=$count timeout 100 "$PYTHON" "$BASELINES/torch_alltoall.py" --device cpu --port "$port" \
            --repeats 2 --seconds 2 "${@:2}" </dev/null >>out 2>>err &
        pids+=($!)
    done
    status=0
    for pid in "${pids[@]}"; do
        ended=0
        wait "$pid" || ended=$?
        [ "$status" -ge "$ended" ] || status=$ended
    done
}

# lines CONDITION COUNT: so many lines, and for each the condition, in Python, on `line`.
lines() {
    check "not $2 lines for which $1" "$PYTHON" -c '
import json, sys
lines = [json.loads(line) for line in open("out")]
assert len(lines) == int(sys.argv[2]), "%d lines" % len(lines)
for line in lines:
    assert eval(sys.argv[1]), line' "$1" "$2"
}

PLAIN=loop,sorted,gather,graphs

test_one_rank() {
    needs_torch || return
    ranks 1 --versions $PLAIN --shape 8,2,16,4 --check
    succeeds
    lines 'line["ranks"] == 1 and line["checked"]' 4
}

# Rows of odd lengths, one token a rank, all experts for each token, many tokens.
test_two_ranks() {
    needs_torch || return
    ranks 2 --versions $PLAIN t2 --shape 8,2,16,4 --shape 6,3,7,33 --shape 4,4,1,5 --shape 256,8,24,60 --check
    succeeds
    lines 'line["ranks"] == 2 and line["checked"] and line["us_p50"] <= line["us_p95"]' 20
}

# Most pairs of ranks have no row for each other.
test_four_ranks() {
    needs_torch || return
    ranks 4 --versions $PLAIN --shape 4,1,8,2 --check
    succeeds
    lines 'line["tokens"] == [1] * 4 and line["checked"]' 4
}

test_mpirun() {
    needs_torch || return
    command -v mpirun >/dev/null || { skip "no mpirun"; return; }
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 100 mpirun --oversubscribe -n 2 "$PYTHON" \
        "$BASELINES/torch_alltoall.py" --device cpu --port "$(free_port)" --repeats 2 --versions sorted,graphs \
        --shape 8,2,16,9 --seed 5 --full-tokens --check </dev/null >out 2>err
    status=$?
    succeeds
    lines 'line["seed"] == 5 and line["tokens"] == [9, 9] and line["bytes"] == 9 * 2 * 16 * 2 and line["checked"]' 2
}

test_refusals() {
    needs_torch || return
    ranks 2 --versions empty --shape 7,2,16,4 --shape 8,2,16,4
    ends 1
    check "no word on 7 experts: $(cat err)" grep -q '^torch_alltoall.py: 7,2,16,4: left out: 7 experts' err
    lines 'line["shape"] == "8,2,16,4" and line["bytes"] == 0 and not line["checked"]' 1
    for arguments in '--shape 4,5,8,2' '--versions fastest' b9; do
        # shellcheck disable=SC2086  # words
        ranks 1 $arguments
        ends 2
    done
}

# The check itself: right sums pass; a row of another expert, swapped weights, a lost row and one bit do not.
test_check_notices() {
    needs_torch || return
    check "the check of results" "$PYTHON" - "$BASELINES" <<'EOF'
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch_alltoall as peer
for E, k in (8, 2), (128, 8):
    batch = peer.make_batch(peer.Shape(E, k, 64, 20, 1), 0, True, torch.device("cpu"))
    scale = peer.expert_scales(E, batch.x.device)
    assert len(set(scale.tolist())) == E and torch.equal(scale, scale.half().float())
    assert all(len(set(row)) == k for row in batch.chosen.tolist())
    x, chosen, weight = batch
    by_hand = sum(weight[3, j].double() * (x[3].float() * scale[chosen[3, j]]).half().double() for j in range(k))
    assert torch.allclose(peer.exact_sum(batch, scale)[3], by_hand)
    rounded, exact = peer.rounded_sum(batch, scale), peer.exact_sum(batch, scale).half()
    assert peer.agrees("loop", rounded, batch, scale) and peer.agrees("sorted", exact, batch, scale)
    other, swapped, lost = chosen.clone(), weight.clone(), weight.clone()
    other[3, 1] = min(set(range(E)) - set(chosen[3].tolist()))
    swapped[3, :2] = weight[3, [1, 0]]
    lost[3, 1] = 0
    for wrong in peer.Batch(x, other, weight), peer.Batch(x, chosen, swapped), peer.Batch(x, chosen, lost):
        assert not peer.agrees("loop", peer.rounded_sum(wrong, scale), batch, scale)
        assert not peer.agrees("sorted", peer.exact_sum(wrong, scale).half(), batch, scale)
    rounded.view(torch.int16)[3, 5] += 1
    exact.view(torch.int16)[3, 5] += 2
    assert not peer.agrees("loop", rounded, batch, scale) and not peer.agrees("sorted", exact, batch, scale)
EOF
}

run_tests "$@"
