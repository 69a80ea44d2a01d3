#!/usr/bin/env bash
# Tests of what ./train refuses: data, options, sizes, directories and checkpoints. A refusal is exit status 1, one line
# that tells the user what to do, and nothing made or changed.
#
#     tests/test_cli_refusals.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, train.c.
# shellcheck disable=SC2015,SC2046  # A && B || C is meant so: B ends the same way in both; numbers of seq are split
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

# ---- data, options and sizes

test_refuses_bad_data() {
    : >empty.txt
    printf x >one.txt
    bytes 4000 141 >letters.txt
    mkdir no_shards truncated magic
    shard truncated/a_train.bin 1 2 3 4
    truncate -s -1 truncated/a_train.bin
    bytes 1400 141 >magic/a_train.bin
    refuses 'cannot open missing.txt' --data missing.txt
    refuses 'empty.txt is empty' --data empty.txt
    refuses 'one.txt has 1 tokens .*--seq' --data one.txt
    refuses 'letters.txt has 3600 tokens .*lower --seq or give more' --data letters.txt --seq 4096
    refuses 'no_shards has no \*\.bin' --data no_shards
    refuses 'a_train.bin .*truncated' --data truncated
    refuses 'starts with .*20240520' --data magic
    refuses 'matches no file' --data 'none_*.bin'
    refuses '/dev/null is not a regular file' --data /dev/null
    refuses 'cannot open missing.txt' --data letters.txt --val missing.txt
    refuses "domains sorted: 'sorted' is no domain, they are story, .*; give all, by-rank" --domains sorted
    refuses '--domains sort is for the builtin corpus alone' --data letters.txt --domains sort
}

test_refuses_a_token_beyond_the_vocabulary() {
    mkdir shards
    shard shards/a_train.bin $(seq 40) 300 $(seq 40)
    shard shards/b_val.bin $(seq 40)
    run --data shards
    refused 'a_train.bin: token 40 is 300, .*--vocab'
    [ ! -e run/checkpoint ] || fail "left a checkpoint behind"
    check "the log tells of an end" lacks '"event":"end"' run/log.jsonl
    run --data shards --vocab 301 --out wide
    succeeds
}

test_refuses_bad_options() {
    refuses '--top-k 9 is above --experts 8' --top-k 9
    refuses '--dim 16 is not divisible by --heads 3' --heads 3
    refuses 'odd size' --heads 16
    refuses 'not divisible by --kv-heads' --heads 4 --kv-heads 3
    refuses 'unknown --router tpk: the nearest is topk' --router tpk
    refuses 'unknown option --expert-din: the nearest is --expert-dim' --expert-din 4
    refuses 'unknown option --step: the nearest is --steps' --step 6
    refuses 'top1 with --renorm 1: .*no gradient' --router top1 --renorm 1
    for value in fast nan inf 0x10 ' 1' ''; do
        refuses "--lr takes a number, not '$value'" --lr "$value"
    done
    refuses '--lr 1e30 is out of range' --lr 1e30
    refuses '--seed takes a whole number' --seed 1.5
    refuses '--steps takes a whole number' --steps 6x
    refuses '--steps -1 is out of range' --steps -1
    refuses '--steps 99999999999999999999 is out of range' --steps 99999999999999999999
    refuses '--seed needs a value' --seed
    refuses '--top-k is given twice' --top-k 2 --top-k 2
    refuses "unexpected 'fast'" fast
    refuses '--schedule has no value .cosin.*nearest: cosine' --schedule cosin
    refuses '--warmup 7 is longer than --steps 6' --warmup 7
    refuses '--batch 2 is not divisible by --grad-accum 3' --grad-accum 3
    refuses '--drop .*--capacity-factor' --drop slot
    refuses '--vocab 100 is too small' --vocab 100
    refuses '--router soft looks at later tokens.*--objective mlm, or add --allow-leak' --router soft
    refuses '--sample with --objective mlm' --objective mlm --sample 3
    refuses '--chain-steps 0 is out of range' --chain-steps 0
    refuses '--force is for --router forced, not topk: drop it' --force one
    refuses '--force zipf:steep: .*as in zipf:1.2' --router forced --force zipf:steep
    refuses '--slots is for soft routers' --slots 2
    refuses '--aux-coef 0.1 with --router random: .*drop --aux-coef' --router random --aux-coef 0.1
}

# A trace is opened when training begins: nothing is trained, nothing is saved.
test_routing_traces_that_cannot_be_used() {
    run --dump-routing missing/trace
    refused 'cannot write --dump-routing missing/trace .*choose another file'
    run --dump-routing /dev/full --out full
    refused 'cannot write --dump-routing /dev/full .*free some space'
    bytes 2000 141 >letters.txt
    run --router forced --force letters.txt --out letters
    refused 'letters.txt is no routing trace: name a file that --dump-routing wrote'
    run --router forced --force missing.txt --out missing
    refused '--force missing.txt: there is no such file to read .*: it is balanced, zipf:S, one, or what'
    refuses '--dump-routing trace would write over the trace' --router forced --force trace --dump-routing trace
    for name in run full letters missing; do
        [ ! -e $name/checkpoint ] || fail "$name has a checkpoint"
    done
}

# What a user typed may hold a line's end; the message is one line all the same.
test_message_is_one_line() {
    refuses 'the nearest is topk' --router $'to\npk'
}

# A prompt is bytes; a smaller vocabulary has no embedding for some of them.
test_refuses_a_prompt_beyond_the_vocabulary() {
    refuses '--prompt' --vocab 128 --sample 4 --prompt $'\xc3\xa9'
}

test_refuses_absurd_sizes() {
    refuses 'out of memory: the run needs' --layers 1024 --dim 65536 --heads 4096 --experts 4096 --expert-dim 65536
    refuses '2\^31' --batch 1048576 --seq 4096
    refuses 'out of memory' --batch 1048576 --seq 1000 --experts 256
    OMP_NUM_THREADS=2 refuses '--seq 65536 is out of range' --seq 65536 --batch 1 --steps 0
    refuses 'raise --heads' --dim 1032 --heads 1 --steps 0
    rm -rf run
    if [ "$(bash -c 'ulimit -v 200000; "$0" --help | wc -l' "$TRAIN" 2>/dev/null)" -gt 10 ]; then
        bash -c 'ulimit -v 200000; exec "$0" --dim 512 --out run' "$TRAIN" >out 2>err
        status=$?
        refused 'out of memory: the run needs'
        [ ! -e run ] || fail "left $(echo run/*) behind"
    else
        skip "too little memory: the program does not start under a limit (a sanitizer)"
    fi
}

# ---- directories

test_out_that_cannot_be_used() {
    run
    succeeds
    cp -r run before
    run --experts 4 --lr 1e-2
    refused '--out run holds a run with another --experts, --lr'
    check "the run that was there has changed" diff -r run before
    touch file
    for out in file file/below /proc/below; do
        run --out $out
        refused "--out $out"
    done
    mkdir foreign
    bytes 20 141 >foreign/config.json
    run --out foreign
    refused 'not a run.s configuration'

    local as_user=()
    [ "$(id -u)" != 0 ] || as_user=(setpriv --reuid=65534 --clear-groups)
    mkdir -m 555 locked
    chown -f 65534 locked
    if ! "${as_user[@]}" test -x "$TRAIN" 2>/dev/null || "${as_user[@]}" touch locked/x 2>/dev/null; then
        skip "a directory without the right to write: everything may be written here"
        return
    fi
    with_defaults --out locked
    "${as_user[@]}" "$TRAIN" "${arguments[@]}" >out 2>err
    status=$?
    refused 'cannot write into --out locked'
}

test_resume_of_what_is_no_checkpoint() {
    run --out good
    run --out smaller --experts 4
    for name in none truncated unfinished altered foreign garbled; do
        cp -r good $name
    done
    refuses_resume 'cannot read missing/config.json' missing
    rm -r none/checkpoint
    refuses_resume 'no checkpoint in none' none
    truncate -s -1 truncated/checkpoint/optimizer.safetensors
    refuses_resume 'truncated' truncated
    rm unfinished/checkpoint/manifest.json
    refuses_resume 'manifest' unfinished
    printf '\377' | dd of=altered/checkpoint/model.safetensors bs=1 seek=20000 conv=notrunc 2>/dev/null
    refuses_resume 'altered' altered
    rm -r foreign/checkpoint
    cp -r smaller/checkpoint foreign
    refuses_resume 'another model' foreign
    printf '{"layers":' >garbled/config.json
    refuses_resume 'garbled/config.json is not a run.s configuration' garbled
    resume good --experts 4
    refused '--experts 4 differs'
}

# A run of three steps cannot go on from step six: it would call the weights of step six those of step three.
test_resume_beyond_the_last_step() {
    run
    resume run --steps 3
    refused '--steps 3'
}

run_tests "$@"
