#!/usr/bin/env bash
# Tests of ./train with models, tokenizers and questions that come from elsewhere, and of what it leaves for others:
# --init-from, --upcycle, --export-hf, --export-gguf, --tokenizer, --choices.
#
#     tests/test_cli_models.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, train.c, model/import.h, model/hf_export.h.
# shellcheck disable=SC2015,SC2046  # A && B || C is meant so: B ends the same way in both; numbers of seq are split
# shellcheck source=tests/cli_checks.sh
TOKENIZE=$(realpath "${TOKENIZE:-data/tokenize}")
READERS=$(realpath "$(dirname "$0")")
. "$(dirname "$0")/cli_checks.sh"

# A run and its export in `run` and `hf`: OPTION...
trained() {
    run --sample 20 --temperature 0 --prompt 'echo: ' --export-hf hf "$@"
    succeeds
}

# last_sample DIR: the text of its last sample.
last_sample() {
    grep '"event":"sample"' "$1/log.jsonl" | tail -n 1
}

first_validation() {
    grep -o '"step":0,.*"val_loss":[^,]*' "$1/log.jsonl" | grep -o '"val_loss".*' | head -n 1
}

last_validation() {
    grep -o '"val_loss":[^,]*' "$1/log.jsonl" | tail -n 1
}

# text FILE: some text of several scripts, with a document's end in it.
text() {
    local line="Line %d of the na\303\257ve story goes on \342\200\224 it's about %d \320\272\320\276\321\202s.\n"
    for i in $(seq 300); do
        # shellcheck disable=SC2059  # the line is a format
        printf "$line" "$i" $((i * 37))
        [ $((i % 50)) != 0 ] || echo '<|endoftext|>'
    done >"$1"
}

# ---- models that leave and come back

# What a folder holds is the run: the same weights, the same text, the same validation loss.
test_export_and_init_from_are_exact() {
    for options in '' '--qk-norm 0 --kv-heads 1' '--router top1 --tie 1' '--head-dim 12 --renorm 0' \
        '--moe-every 2 --layers 2'; do
        rm -rf run hf again
        # shellcheck disable=SC2086  # options are meant to be split
        trained $options
        for file in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json; do
            check "no $file in the export" test -s "hf/$file"
        done
        check "something else in the export" test "$(ls hf | wc -l)" = 5
        # shellcheck disable=SC2086
        run --init-from hf --steps 0 --warmup 0 --sample 20 --temperature 0 --prompt 'echo: ' --out again \
            --export-hf hf2 $options
        succeeds
        check "weights of $options changed on the way" cmp hf/model.safetensors hf2/model.safetensors
        check "the texts differ: $options" test "$(last_sample run)" = "$(last_sample again)"
        check "validation differs: $options" test "$(last_validation run)" = "$(first_validation again)"
        rm -rf hf2
    done
}

# From our own runs, and without training from a finished one.
test_init_from_a_run() {
    trained
    run --init-from run --steps 0 --warmup 0 --out again --export-hf hf2
    succeeds
    check "weights changed" cmp hf/model.safetensors hf2/model.safetensors
    check "validation differs" test "$(last_validation run)" = "$(first_validation again)"
    run --init-from run --steps 3 --out longer
    succeeds
    resume run --export-hf hf3
    succeeds
    check "an export of the finished run differs" diff -r hf hf3
}

test_upcycling() {
    run --router dense --export-hf hf --steps 12 --lr 1e-2 --out bad
    refused '--router dense'
    run --router dense --steps 12 --lr 1e-2 --out dense
    succeeds
    run --init-from dense --upcycle --expert-dim 16 --experts 4 --steps 0 --warmup 0 --out up --export-hf hf
    succeeds
    check "the upcycled model computes something else" python3 - <<'PYTHON'
import json
def losses(run):
    return [json.loads(line)["val_loss"] for line in open(run + "/log.jsonl") if '"val_loss"' in line]
dense, up = losses("dense")[-1], losses("up")[0]
assert abs(dense - up) < 1e-5 * dense, (dense, up)
PYTHON
    run --init-from dense --upcycle --expert-dim 16 --experts 4 --steps 20 --out trained
    succeeds
    run --init-from up --upcycle --expert-dim 16 --out twice
    refused 'makes experts of a dense model'
}

# Adapters start from the model's own loss, go on where they were, and are part of the run.
test_fine_tuning() {
    trained
    for kind in "--perft r --perft-rank 4" "--perft e --perft-rank 2 --lora attention"; do
        rm -rf tuned again
        # shellcheck disable=SC2086  # words
        run --init-from run $kind --out tuned
        succeeds
        check "does not start from the model: $kind" test "$(last_validation run)" = "$(first_validation tuned)"
        check "does not say what it trains" grep -q '^trains .* parameters .* the rest is frozen' out
        check "nothing was learned" test "$(last_validation run)" != "$(last_validation tuned)"
        is_sound tuned
        run --init-from tuned --steps 0 --warmup 0 --out again
        succeeds
        check "the adapters are lost: $kind" test "$(last_validation tuned)" = "$(first_validation again)"
        resume tuned --steps 8 --sample 5
        succeeds
        resume tuned --export-hf hf2
        refused 'no adapters; export the run they were tuned from'
    done
    run --init-from tuned --perft none --out other
    refused 'leave no place for'
    run --perft s --out untrained
    check "does not ask for a trained model" grep -q '^note .*--init-from' out
}

test_refuses_what_cannot_be_exported() {
    refuses '--shared-experts 1' --shared-experts 1 --export-hf hf
    refuses '--router sigmoid' --router sigmoid --export-hf hf
    refuses '--router soft' --router soft --allow-leak --export-hf hf
    refuses '--chain-steps 2' --chain-steps 2 --export-hf hf
    refuses '--act gelu' --act gelu --export-hf hf
    refuses '--capacity-factor 1.25' --capacity-factor 1.25 --export-hf hf
    refuses '--objective mlm' --objective mlm --export-hf hf
    refuses '--renorm 0' --qk-norm 0 --renorm 0 --export-hf hf
    refuses '--renorm 0' --renorm 0 --export-gguf model.gguf
    refuses '--qk-norm 0' --qk-norm 0 --export-gguf model.gguf
    mkdir taken
    echo important >taken/notes.txt
    refuses 'taken' --export-hf taken
    check "a file of the user is gone" grep -q important taken/notes.txt
    [ ! -e hf ] && [ ! -e hf.tmp ] && [ ! -e model.gguf ] || fail "left something behind"
}

test_exports_replace_exports() {
    trained
    cp -r hf before
    run --seed 3 --out other --export-hf hf
    succeeds
    check "the export was not replaced" test "$(cmp -s hf/model.safetensors before/model.safetensors; echo $?)" = 1
    check "something was left beside it" test "$(ls -d hf*)" = hf
}

test_gguf() {
    run --export-gguf model.gguf
    succeeds
    check "an independent reader refuses the file" python3 "$READERS/gguf_reader.py" model.gguf
    check "something was left beside it" test "$(ls model*)" = model.gguf
}

test_refuses_bad_folders() {
    trained
    refuses 'cannot read nowhere/config.json' --init-from nowhere
    mkdir empty
    refuses 'empty/config.json' --init-from empty
    cp -r hf cut && truncate -s -5 cut/model.safetensors
    refuses 'cut/model.safetensors' --init-from cut
    cp -r hf other && sed -i 's/"hidden_size": *16/"hidden_size": 32/' other/config.json
    refuses 'model.embed_tokens.weight' --init-from other
    cp -r hf fewer && sed -i 's/"num_hidden_layers": *1/"num_hidden_layers": 2/' fewer/config.json
    refuses 'model.layers.1' --init-from fewer
    cp -r hf strange && sed -i 's/qwen3_moe/qwen9/' strange/config.json
    refuses 'qwen9' --init-from strange
    cp -r hf broken && echo '{' >broken/config.json
    refuses 'broken/config.json' --init-from broken
    refuses 'embedding.w|embed_tokens' --init-from hf --dim 32
}

# A full disk: the export says so and leaves nothing behind.
test_nothing_half_written() {
    (ulimit -f 8; run --dim 64 --heads 4 --expert-dim 64 --export-hf big; echo "$status" >status)
    check "a full disk did not end in status 1" test "$(cat status)" = 1
    check "the export did not say that it failed" grep -q 'not exported: ' err
    [ ! -e big ] && [ ! -e big.tmp ] || fail "half an export was left"
}

# ---- tokenizers

test_trains_through_a_tokenizer() {
    text story.txt
    check "no tokenizer was trained" "$TOKENIZE" train --vocab 400 --out bpe.json story.txt
    run --data story.txt --tokenizer bpe.json --seq 32 --steps 30 --sample 30 --prompt 'The 7' --export-hf hf \
        --eval-batches 0
    succeeds
    check "the run has no tokenizer of its own" cmp bpe.json run/tokenizer.json
    check "the export has another tokenizer" cmp bpe.json hf/tokenizer.json
    check "the export has another vocabulary" grep -q '"vocab_size": *400' hf/config.json
    check "bits per byte are unknown" lacks '"val_bpb":null' run/log.jsonl
    # shards of the same text: the same validation loss
    check "no shards were made" "$TOKENIZE" encode --tokenizer bpe.json --out shards story.txt
    run --data shards --tokenizer bpe.json --seq 32 --steps 30 --eval-batches 0 --out sharded
    succeeds
    check "text and shards differ" test "$(last_validation run)" = "$(last_validation sharded)"
    # without the file
    rm bpe.json
    resume run --steps 32 --warmup 1
    succeeds
    run --init-from hf --steps 2 --data story.txt --out again --batch 2
    succeeds
    check "the tokenizer of the folder was not used" cmp hf/tokenizer.json again/tokenizer.json
}

test_refuses_tokenizers_that_do_not_fit() {
    text story.txt
    "$TOKENIZE" train --vocab 300 --out a.json story.txt >/dev/null
    "$TOKENIZE" train --vocab 280 --out b.json story.txt >/dev/null
    "$TOKENIZE" encode --tokenizer a.json --out shards story.txt >/dev/null
    refuses 'another tokenizer' --data shards --tokenizer b.json --vocab 300
    refuses '--tokenizer' --data shards --vocab 300
    refuses 'raise it' --data shards --tokenizer a.json --vocab 299
    refuses 'missing.json' --data story.txt --tokenizer missing.json
    truncate -s -40 b.json
    refuses 'b.json' --data story.txt --tokenizer b.json
    refuses '--data builtin' --tokenizer a.json
    # one bit of a shard
    printf '\017' | dd of=$(echo shards/*train*.bin) bs=1 seek=2001 conv=notrunc 2>/dev/null
    refuses 'damaged' --data shards --tokenizer a.json
}

# ---- multiple choice

# questions FILE: two of them; the right completion is the second of the first, the first of the second.
questions() {
    {
        little 4 20240522
        little 4 1
        little 4 2
        little 4 38
        head -c 1008 /dev/zero
        for word in 65535 38 0 1 2 3 97 98 99 3 97 97 97 5 98 98 98 98 98 \
            65535 38 1 0 2 3 97 98 99 3 97 97 97 5 99 99 99 99 99; do
            little 2 $word
        done
    } >"$1"
}

test_answers_questions() {
    questions two.bin
    run --choices two.bin --seq 16
    succeeds
    check "no answers on the terminal" grep -q '^choices  2 questions' out
    check "no answers in the log" grep -q '"event":"choices","questions":2,"accuracy":' run/log.jsonl
    is_sound run
    run --choices two.bin --choices-most 1 --seq 16 --out one
    succeeds
    check "not one question" grep -q '"event":"choices","questions":1' one/log.jsonl
    truncate -s -2 two.bin
    refuses 'two.bin' --choices two.bin
    refuses 'missing.bin' --choices missing.bin
}

run_tests "$@"
