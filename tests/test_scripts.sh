#!/usr/bin/env bash
# Tests of the scripts that carry a run's log elsewhere: experiments/to_tensorboard.py, read back with a decoder of its
# own, and experiments/to_wandb.py, with a module that stands in for wandb. Logs are written by hand: no run is made.
#
#     tests/test_scripts.sh [NAME...]        from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: model/log.h, for what the lines mean.
set -u
SCRIPTS=$(realpath experiments)
ROOT=$(mktemp -d "${TMPDIR:-/tmp}/test_scripts.XXXXXX")
trap 'rm -rf "$ROOT"' EXIT
# shellcheck source=tests/script_tests.sh
. "$(dirname "$0")/script_tests.sh"
export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8

# script NAME ARGUMENT...: within 20 s; output is in the files `out` and `err`, the exit status in $status.
script() {
    timeout 20 python3 "$SCRIPTS/$1" "${@:2}" >out 2>err
    status=$?
}

succeeds() {
    check "exit status $status: $(head -n 1 err)" test "$status" = 0
    check "stderr is not empty: $(head -n 1 err)" test ! -s err
}

# refused TEXT: ended with status 1 and one line on stderr that holds TEXT.
refused() {
    check "exit status $status, expected 1" test "$status" = 1
    check "stderr is not one line: $(head -n 3 err)" test "$(wc -l <err)" = 1
    check "stderr does not say '$1': $(head -n 1 err)" grep -qF -- "$1" err
}

# ---- logs

# glue SEPARATOR: joins lines that begin with two blanks to the one before.
glue() {
    awk -v separator="$1" '/^  / { sub(/^ +/, ""); printf "%s%s", separator, $0; next }
                                 { printf "%s%s", (NR > 1 ? "\n" : ""), $0 }
                           END   { print "" }'
}

header() {
    glue '' <<'LINES'
{"ts":"2025-01-01T00:00:00Z","config":{"router":"topk","lr":0.5},
  "domains":["story","sort"],"moe_layers":[0,2]}
LINES
}

# What a run writes, with what may be null. Numbers are such that float32 holds them exactly.
lines() {
    glue '' <<'LINES'
{"event":"memory","weights":100}
{"step":0,"tokens":0,"val_loss":5.5,"val_bpb":8,"val_floor":null,"val_domains":{"story":{"loss":5.25,"floor":null,
  "tokens":64},"sort":{"loss":null,"floor":null,"tokens":0}},"domain_expert":[[[1,0]],[[0,1]]],"mi":[0.25,0.125],
  "churn":[null,null]}
{"event":"router_gradient","step":1,"main":[0.5,0.5],"balance":[0.5,0.5]}
{"step":10,"tokens":640,"loss":4.5,"aux":1.5,"z":2,"lr":0.75,"grad_norm":3,"router_grad_norm":0.5,
  "router_main_norm":0.25,"router_balance_norm":0.125,"ms":500,"tok_s":1280,"mfu":null,"drop":0.25,
  "token_drop":0.125,"padding":0,"load_cv":0.5,"load_kl":0.25,"max_vio":1,"entropy":0.75,"mean_entropy":0.875,
  "margin":null,"dead":1,"near_dead":2,"leaky":false,"skipped":0,"counts":[[30,10],[0,0]],"layer_entropy":[0.5,1],
  "layer_main_norm":[0.25,null],"layer_balance_norm":[0.5,0.5],"layer_margin":[null,null]}
{"event":"skip","step":300,"in_a_row":1}
{"step":300,"tokens":19200,"loss":2,"ms":100,"counts":[[4,4],[2,6]]}
{"step":300,"tokens":19200,"val_loss":2.5,"val_bpb":4,"val_domains":{"story":{"loss":2.25}},"mi":[],
  "churn":[0.5,0.75]}
{"event":"choices","questions":8,"accuracy":0.5,"accuracy_mean":0.625}
LINES
}

# The events those become: wall time, step, values.
expected() {
    glue ' ' <<'EVENTS'
1735689600.0 0 brain.Event:2
1735689600.0 0 mutual_information/layer_0=0.25 mutual_information/layer_2=0.125 val/bpb=8.0 val/domain/story=5.25
  val/loss=5.5
1735689605.0 10 balance_norm/layer_0=0.5 balance_norm/layer_2=0.5 entropy/layer_0=0.5 entropy/layer_2=1.0
  main_norm/layer_0=0.25 max_vio/layer_0=0.5 moe/drop=0.25 moe/padding=0.0 moe/token_drop=0.125
  router/balance_norm=0.125 router/dead=1.0 router/entropy=0.75 router/grad_norm=0.5 router/load_cv=0.5
  router/load_kl=0.25 router/main_norm=0.25 router/max_vio=1.0 router/mean_entropy=0.875 router/near_dead=2.0
  train/aux=1.5 train/grad_norm=3.0 train/loss=4.5 train/lr=0.75 train/ms=500.0 train/skipped=0.0
  train/tok_s=1280.0 train/z=2.0
1735689634.0 300 max_vio/layer_0=0.0 max_vio/layer_2=0.5 train/loss=2.0 train/ms=100.0
1735689634.0 300 churn/layer_0=0.5 churn/layer_2=0.75 val/bpb=4.0 val/domain/story=2.25 val/loss=2.5
1735689634.0 300 choices/accuracy=0.5 choices/accuracy_mean=0.625
EVENTS
}

# make_run DIR [LINES]: a run whose log has the header and the first LINES lines.
make_run() {
    mkdir -p "$1"
    { header; lines | head -n "${2:-100}"; } >"$1/log.jsonl"
}

# ---- the decoder: prints an event file's records as expected() has them

decode() {
    python3 - "$1" <<'PYTHON'
import struct, sys

def crc32c(data):  # bit by bit
    crc = 0xffffffff
    for byte in data:
        for bit in range(8):
            low = (crc ^ byte >> bit) & 1
            crc = (crc >> 1) ^ (0x82f63b78 * low)
    return crc ^ 0xffffffff

assert crc32c(b"123456789") == 0xe3069283

def check_masked(data, stored):
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xffffffff
    assert (rotated + 0xa282ead8) % 2**32 == stored, "a checksum is wrong"

def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

def fields(data):
    """[(number, value)] of a protobuf message: varints, 8 or 4 bytes, or bytes with a length."""
    at, found = 0, []
    while at < len(data):
        key, at = read_varint(data, at)
        if key & 7 == 0:
            value, at = read_varint(data, at)
        else:
            if key & 7 == 2:
                size, at = read_varint(data, at)
            else:
                size = {1: 8, 5: 4}[key & 7]
            assert at + size <= len(data), "a field ends behind its message"
            value, at = data[at:at + size], at + size
        found.append((key >> 3, value))
    return found

data, at = open(sys.argv[1], "rb").read(), 0
while at < len(data):
    length, crc = struct.unpack_from("<QI", data, at)
    check_masked(data[at:at + 8], crc)
    body = data[at + 12:at + 12 + length]
    check_masked(body, *struct.unpack_from("<I", data, at + 12 + length))
    at += 16 + length
    event = dict(fields(body))
    words = [str(struct.unpack("<d", event.pop(1))[0]), str(event.pop(2))]
    if 3 in event:
        words.append(event.pop(3).decode())
    values = []
    for number, value in fields(event.pop(5, b"")):
        value = dict(fields(value))
        assert number == 1 and set(value) == {1, 2}
        values.append(f"{value[1].decode()}={struct.unpack('<f', value[2])[0]}")
    assert not event, f"unknown fields {event}"
    print(*words, *sorted(values))
PYTHON
}

EVENTS=events.out.tfevents.moelab

# holds DIR LINES: the event file of DIR has the first LINES events.
holds() {
    decode "$1/$EVENTS" >found 2>&1 # what is wrong with a file is in `found`, too
    expected | head -n "$2" >wanted
    check "the events of $1 are not those expected" diff wanted found
}

# ---- to_tensorboard.py

test_events() {
    make_run run
    script to_tensorboard.py run
    succeeds
    holds run 6
    check "files of the run" test "$(cd run && echo *)" = "$EVENTS log.jsonl"
}

test_runs_below() {
    make_run runs/a
    make_run runs/deep/b 4
    script to_tensorboard.py runs
    succeeds
    holds runs/a 6
    holds runs/deep/b 3
    check "not two runs are named" test "$(grep -c '^runs/' out)" = 2
}

# A line that is being written is left out; when it is whole, the file goes on from where it was.
test_grown_log() {
    make_run run 4
    lines | sed -n 6p | head -c 30 >>run/log.jsonl
    script to_tensorboard.py run
    succeeds
    holds run 3
    cp run/$EVENTS before
    inode=$(stat -c %i run/$EVENTS)
    make_run run 6
    script to_tensorboard.py run
    succeeds
    holds run 4
    check "the file was replaced" test "$(stat -c %i run/$EVENTS)" = "$inode"
    check "what was written has changed" cmp -n "$(stat -c %s before)" before run/$EVENTS
    script to_tensorboard.py run
    succeeds
    holds run 4
    check "something was written again" grep -q ' 0 bytes written' out
}

# A write that was interrupted is completed.
test_half_an_event() {
    make_run run
    script to_tensorboard.py run
    truncate -s -7 run/$EVENTS
    script to_tensorboard.py run
    succeeds
    holds run 6
}

# A resume cuts the log; and a damaged file is made anew.
test_cut_log() {
    make_run run
    script to_tensorboard.py run
    make_run run 4
    script to_tensorboard.py run
    succeeds
    holds run 3
    printf 'x' | dd of=run/$EVENTS bs=1 seek=20 conv=notrunc status=none
    script to_tensorboard.py run
    succeeds
    holds run 3
    check "files of the run" test "$(cd run && echo *)" = "$EVENTS log.jsonl"
}

test_damaged_lines() {
    mkdir run
    {
        header
        lines | head -n 3
        printf '%s\n' '{"step":5,"loss":' '[1,2]' '7' '' 'null' '{"step":"x"}' \
            '{"loss":NaN,"lr":1e999,"counts":[3,[null]]}' \
            '{"val_loss":"high","val_domains":[],"mi":5}' '{"step":-1,"loss":null,"z":1e39,"skipped":true}' \
            '{"step":-1,"loss":1}' '{"step":1.5,"loss":1}' '{"step":99999999999999999999,"loss":1}'
        printf '\xff\xfe{"step":6}\n'
        lines | tail -n +4
    } >run/log.jsonl
    script to_tensorboard.py run
    succeeds
    holds run 6
}

test_empty_log() {
    mkdir run
    : >run/log.jsonl
    script to_tensorboard.py run
    succeeds
    check "an event file without events" test ! -e run/$EVENTS
    header >run/log.jsonl
    script to_tensorboard.py run
    succeeds
    check "an event file without events" test ! -e run/$EVENTS
}

# Several routers in one layer, and a step above 2^14 and a tag above 127 bytes, whose varints are longer.
test_chain() {
    mkdir run
    long=$(printf 'd%.0s' {1..150})
    cat >run/log.jsonl <<LOG
{"ts":"2025-01-01T00:00:00Z","moe_layers":[1,1,3]}
{"step":5000000000,"val_loss":1,"val_domains":{"$long":{"loss":2}},"mi":[0.25,0.5,1]}
LOG
    script to_tensorboard.py run
    succeeds
    decode run/$EVENTS >found 2>&1
    glue ' ' >wanted <<EVENTS
1735689600.0 0 brain.Event:2
1735689600.0 5000000000 mutual_information/layer_1_step_1=0.25 mutual_information/layer_1_step_2=0.5
  mutual_information/layer_3=1.0 val/domain/$long=2.0 val/loss=1.0
EVENTS
    check "events" diff wanted found
}

test_nothing_to_convert() {
    script to_tensorboard.py none
    refused "none: No such file or directory"
    mkdir empty
    script to_tensorboard.py empty
    refused "no log.jsonl in empty or below"
    mkdir -p run/log.jsonl
    script to_tensorboard.py run
    check "exit status $status for a log that is a directory" test "$status" = 1
    check "more than one line: $(head -n 3 err)" test "$(wc -l <err)" = 1
}

# wait_for COMMAND...: until it succeeds, at most 20 s.
wait_for() {
    for _ in {1..200}; do
        "$@" 2>/dev/null && return
        sleep 0.1
    done
    check "waited in vain: $*" false
}

# has_events DIR LINES: the event file of DIR has that many events.
has_events() {
    [ "$(decode "$1/$EVENTS" | wc -l)" = "$2" ]
}

test_follow() {
    make_run runs/a 4
    timeout 20 python3 "$SCRIPTS/to_tensorboard.py" --follow --every 0.05 runs >out 2>err &
    pid=$!
    wait_for has_events runs/a 3
    lines | tail -n +5 >>runs/a/log.jsonl
    make_run runs/later
    wait_for has_events runs/a 6
    wait_for has_events runs/later 6
    check "it does not go on" kill $pid # a background job of a script ignores Ctrl-C
    wait $pid
    check "stderr is not empty: $(head -n 1 err)" test ! -s err
    holds runs/a 6
    holds runs/later 6
}

# ---- to_wandb.py

test_dry_run() {
    make_run run
    script to_wandb.py --dry-run --project tiny run
    succeeds
    check "what would be sent" python3 - out <<'PYTHON'
import json, sys
first, *lines = map(json.loads, open(sys.argv[1]))
assert first == {"project": "tiny", "name": "run", "config": {"router": "topk", "lr": 0.5}}, first
assert [line["step"] for line in lines] == [0, 10, 300, 300, 300]
assert lines[0]["val/loss"] == 5.5 and lines[0]["val/domain/story"] == 5.25 and "val/domain/sort" not in lines[0]
assert lines[1]["train/loss"] == 4.5 and lines[1]["max_vio/layer_0"] == 0.5 and "train/mfu" not in lines[1]
PYTHON
    check "a folder beside the scripts" test ! -e "$SCRIPTS/__pycache__"
}

# A module that writes down what it is given, in place of wandb.
stand_in() {
    mkdir modules
    cat >modules/wandb.py <<'PYTHON'
sent = open("sent", "w")

class Run:
    def log(self, values, step):
        print(step, len(values), file=sent, flush=True)

    def finish(self):
        print("finish", file=sent, flush=True)

def init(project, name, config):
    print(project, name, config["router"], file=sent, flush=True)
    return Run()
PYTHON
}

test_wandb_follows() {
    stand_in
    make_run run 4
    PYTHONPATH=modules timeout 20 python3 "$SCRIPTS/to_wandb.py" --every 0.05 run >out 2>err &
    pid=$!
    wait_for grep -q '^10 ' sent
    { lines | tail -n +5; echo '{"event":"end","step":300}'; } >>run/log.jsonl
    wait $pid
    status=$?
    succeeds
    printf '%s\n' 'moelab run topk' '0 5' '10 27' '300 4' '300 5' '300 2' finish >wanted
    check "not each line once" diff wanted sent
}

test_wandb_missing() {
    make_run run
    mkdir modules
    echo 'raise ImportError' >modules/wandb.py
    PYTHONPATH=modules script to_wandb.py run
    refused "wandb is not installed: pip install wandb"
    mkdir starting
    : >starting/log.jsonl
    PYTHONPATH=modules script to_wandb.py starting
    refused "wandb is not installed"
    script to_wandb.py --dry-run none
    refused "none/log.jsonl: No such file or directory"
}

each_test "$@"
