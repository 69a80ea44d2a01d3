#!/usr/bin/env bash
# Tests of data/tokenize: text to a tokenizer, to shards and back to the same text; what shards hold; refusals, which
# are exit status 1, one line that tells the user what to do, and nothing made.
#
#     tests/test_cli_tokenize.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# TOKENIZE names another program than data/tokenize. Called by run_tests.sh. Read next: cli_checks.sh, data/tokenize.c.
# shellcheck disable=SC2015,SC2034  # A && B || C is meant so: B ends the same way in both; TRAIN is for cli_checks.sh
TRAIN=${TOKENIZE:-data/tokenize}
if [ ! -x "$TRAIN" ]; then
    echo "there is no $TRAIN here: run make first"
    echo "0 passed, 1 failed"
    exit 1
fi
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

# ---- running it

tokenize() {
    "$TRAIN" "$@" >out 2>err
    status=$?
}

made() {
    find . ! -name out ! -name err ! -name check.out | sort
}

# declines PATTERN ARGUMENT...: refused, and no file came or went.
declines() {
    local before
    before=$(made)
    tokenize "${@:2}"
    refused "$1"
    [ "$(made)" = "$before" ] || fail "other files than before: ${*:2}"
    [ ! -s out ] || fail "wrote to the standard output: ${*:2}"
}

# says PATTERN: the last run's output.
says() {
    grep -qE -- "$1" out || { fail "the output does not say '$1':"; head -n 5 out; }
}

# text LINES SEED: words of several scripts, always the same.
text() {
    awk -v lines="$1" -v seed="$2" 'BEGIN {
        list = "the cat sat on a mat and the dog was there too naïve Grüße 日本 語 it'"'"'s 42 1999 , . \t"
        count = split(list, words, " ")
        for (x = seed; lines > 0; lines--) {
            for (i = 0; i < 12; i++) {
                x = x * 16807 % 2147483647
                printf "%s%s%s", words[x % count + 1], x % 5 ? "" : words[x % 19 + 1], x % 11 ? " " : "  "
            }
            printf "\n"
        }
    }'
}

size() {
    stat -c %s "$1"
}

# word FILE INDEX: of a shard's header.
word() {
    od -An -t u4 -j $(($2 * 4)) -N 4 "$1" | tr -d ' '
}

equal() {
    [ "$2" = "$3" ] || fail "$1 is $2, expected $3"
}

# A tokenizer of 400 tokens, and shards of book.txt in `shards`.
make_shards() {
    text 300 7 >book.txt
    tokenize train --vocab 400 --out tokenizer.json book.txt
    succeeds
    tokenize encode --tokenizer tokenizer.json --out shards book.txt
    succeeds
}

# gives_back FILE SHARD...: with tokenizer.json.
gives_back() {
    tokenize decode --tokenizer tokenizer.json "${@:2}"
    succeeds
    check "decoding gives another text than $1" cmp out "$1"
}

# ---- what it does

test_help() {
    for arguments in --help -h "encode --help"; do
        # shellcheck disable=SC2086  # words
        tokenize $arguments
        succeeds
        for option in --vocab --out --pattern --tokenizer --name --val-share --shard-tokens --block-bytes; do
            says "^ .* $option"
        done
        for command in train encode decode show; do
            says "^  $command "
        done
        check "lines are too long" lacks '.{121}' out
    done
}

test_text_comes_back() {
    text 300 7 >book.txt
    printf 'bytes that are no text: \377\376\000\303( \351t\351 \360\237' >>book.txt
    tokenize train --vocab 400 --out tokenizer.json book.txt
    succeeds
    says '^tokenizer.json: 400 tokens'
    says '^next: data/tokenize encode --tokenizer tokenizer.json --out DIR book.txt'
    tokenize encode --tokenizer tokenizer.json --out shards book.txt
    succeeds
    says 'MB of text, [0-9]+ tokens, [2-9]\.[0-9]* bytes per token'
    says '^next: ./train --data shards --tokenizer tokenizer.json$'
    equal "the list of shards" "$(cd shards && echo *)" "book_train_000000.bin book_val_000000.bin"
    gives_back book.txt shards/book_train_000000.bin shards/book_val_000000.bin
    gives_back book.txt shards
}

# What data/shard.h says.
test_header_of_a_shard() {
    make_shards
    local bytes tenth file text_bytes
    bytes=$(size book.txt)
    tenth=$((bytes / 10))
    for split in train val; do
        file=shards/book_${split}_000000.bin
        text_bytes=$tenth
        [ $split = val ] || text_bytes=$((bytes - tenth))
        equal "$split [0]" "$(word $file 0)" 20240520
        equal "$split [1]" "$(word $file 1)" 1
        equal "$split [2]" "$(word $file 2)" $((($(size $file) - 1024) / 2))
        equal "$split [3]" "$(word $file 3)" $((0x62616c6d))
        equal "$split [4]" "$(word $file 4)" 400
        equal "$split [5]" "$(word $file 5)" "$(word shards/book_train_000000.bin 5)"
        equal "$split [7]" "$(word $file 7)" $text_bytes
        equal "$split [8]" "$(word $file 8)" 0
        [ "$(word $file 5)" != 0 ] || fail "$split names no tokenizer"
    done
    tail -c "$tenth" book.txt >tail.txt
    gives_back tail.txt shards/book_val_000000.bin
}

test_validation_share() {
    bytes 29 141 >a.txt
    for share_tokens in 0.1:2 0.5:14 0.99:28; do
        tokenize encode --tokenizer byte --out "out_$share_tokens" --val-share "${share_tokens%:*}" a.txt
        succeeds
        equal "the part for validation" "$(word "out_$share_tokens/a_val_000000.bin" 2)" "${share_tokens#*:}"
        equal "the part for training" "$(word "out_$share_tokens/a_train_000000.bin" 2)" $((29 - ${share_tokens#*:}))
    done
    tokenize encode --tokenizer byte --out none --val-share=0 --name b a.txt
    succeeds
    says '--val OTHER_SHARDS$'
    equal "the list of shards" "$(ls none)" b_train_000000.bin
}

test_shards_fill_up() {
    make_shards
    tokenize encode --tokenizer tokenizer.json --out many --shard-tokens 700 book.txt
    succeeds
    local tokens=0 bytes=0 last
    last=$(find many -name '*_train_*' | sort | tail -n 1)
    for file in many/book_train_*.bin; do
        [ "$file" = "$last" ] || equal "$file [2]" "$(word "$file" 2)" 700
        tokens=$((tokens + $(word "$file" 2)))
        bytes=$((bytes + $(word "$file" 7)))
    done
    equal "the number of tokens" $tokens "$(word shards/book_train_000000.bin 2)"
    equal "the bytes of text" $bytes "$(word shards/book_train_000000.bin 7)"
    gives_back book.txt many
    bytes 20 141 >twenty.txt
    tokenize encode --tokenizer byte --out exact --shard-tokens 10 --val-share 0 twenty.txt
    succeeds
    equal "the number of shards" "$(find exact -name '*.bin' | wc -l)" 2
}

# Where a block ends, in a document, at its end or inside of an end-of-text token, no id may change.
test_blocks_do_not_change_ids() {
    local end='<|endoftext|>'
    {
        printf '%s' "$end"
        for seed in 1 2 3 4 5 6; do
            text 9 $seed
            printf '%s%s' "$end" "$end"
        done
        printf '%s' "${end}naïve${end}é$end$end<|endof<|endoftext|endoftext|>"
        text 20 11
    } >book.txt
    tokenize train --vocab 340 --out tokenizer.json book.txt
    succeeds
    tokenize encode --tokenizer tokenizer.json --out whole book.txt
    succeeds
    od -An -v -t u2 -j 1024 whole/book_train_000000.bin | tr ' ' '\n' >ids
    equal "the number of end-of-text tokens" "$(grep -cx 339 ids)" 17
    for block in 1 13 14 500 2000; do
        tokenize encode --tokenizer tokenizer.json --out "block_$block" --block-bytes $block book.txt
        succeeds
        check "blocks of $block bytes give other shards" diff -r whole "block_$block"
    done
    tokenize encode --tokenizer byte --out bytes book.txt
    tokenize encode --tokenizer byte --out bytes_block --block-bytes 7 book.txt
    succeeds
    check "blocks of bytes give other shards" diff -r bytes bytes_block
}

# Normalization makes one character of > and a combining stroke; only before it, or without, the token is there.
test_blocks_of_normalized_text() {
    local end='<|endoftext|>'
    text 60 1 >train.txt
    tokenize train --vocab 280 --out plain.json train.txt
    sed 's/"normalizer": null/"normalizer": {"type": "NFC"}/; s/"normalized": false/"normalized": true/' \
        plain.json >nfc.json
    for seed in 1 2 3 4 5 6 7 8; do
        text 2 $seed
        printf '%s\314\270%s' "$end" "$end"
    done >book.txt
    tokenize encode --tokenizer nfc.json --val-share 0 --out whole book.txt
    succeeds
    tokenize encode --tokenizer nfc.json --val-share 0 --out blocks --block-bytes 1 book.txt
    succeeds
    check "blocks give other shards" diff -r whole blocks
}

test_same_for_any_number_of_threads() {
    text 400 3 >book.txt
    for threads in 1 2 4; do
        export OMP_NUM_THREADS=$threads
        tokenize train --vocab 400 --out $threads.json book.txt
        succeeds
        tokenize encode --tokenizer $threads.json --out $threads book.txt
        succeeds
        check "another tokenizer with $threads threads" cmp 1.json $threads.json
        check "other shards with $threads threads" diff -r 1 $threads
    done
}

# Each file is cut, and none goes on in the next.
test_several_files() {
    text 100 1 >a.txt
    text 100 2 >b.txt
    tokenize train --vocab 350 --out tokenizer.json a.txt b.txt
    succeeds
    says '^tokenizer.json: 350 tokens'
    tokenize encode --tokenizer tokenizer.json --out shards a.txt b.txt
    succeeds
    for file in a b; do
        tail -c $(($(size $file.txt) / 10)) $file.txt >>val.txt
        head -c -$(($(size $file.txt) / 10)) $file.txt >>train.txt
    done
    gives_back train.txt shards/a_train_000000.bin
    gives_back val.txt shards/a_val_000000.bin
    printf 'xy' >c.txt
    printf 'xyxy' >d.txt # "xyxyxy" in one piece would have (xy, xy) twice
    tokenize train --vocab 300 --out small.json c.txt d.txt
    succeeds
    says '^small.json: 258 tokens'
    says '^fewer than --vocab 300'
}

test_patterns() {
    text 100 1 >book.txt
    for pattern in gpt2 qwen2 '[a-z]+|[^a-z]'; do
        tokenize train --vocab 300 --pattern "$pattern" --out tokenizer.json book.txt
        succeeds
        rm -rf shards
        tokenize encode --tokenizer tokenizer.json --out shards book.txt
        succeeds
        gives_back book.txt shards
        cp tokenizer.json "${pattern:0:4}.json"
    done
    check "gpt2 is not ByteLevel's own pattern" grep -q '"use_regex": true}' gpt2.json
    check "qwen2 is no Split" grep -q '"type": "Split"' qwen.json
    cmp -s gpt2.json '[a-z.json' && fail "the pattern changes nothing"
    cp gpt2.json before.json
    tokenize train --vocab 300 --out gpt2.json book.txt # there already: replaced
    succeeds
    check "gpt2 is not the pattern without --pattern" cmp gpt2.json before.json
}

test_show() {
    tokenize show --tokenizer byte $'a\\é\n"'
    succeeds
    printf '%7d  "%s"\n' 97 a 92 "\\\\" 195 '\xc3' 169 '\xa9' 10 '\n' 34 '\"' >expected
    check "other lines" cmp out expected
    printf 'low low low low' >low.txt
    tokenize train --vocab 300 --out tokenizer.json low.txt
    tokenize show --tokenizer tokenizer.json 'low lowé<|endoftext|>'
    succeeds
    printf '%7d  "%s"\n' 257 low 258 ' low' 195 '\xc3' 169 '\xa9' 259 '<|endoftext|>' >expected
    check "other lines" cmp out expected
    tokenize show --tokenizer=byte -- --help
    succeeds
    equal "the number of lines" "$(wc -l <out)" 6
    tokenize show --tokenizer byte ''
    succeeds
}

# ---- what it refuses

test_refuses_commands_and_options() {
    bytes 90 141 >a.txt
    : >empty.txt
    declines 'needs a command: train, encode, decode or show'
    declines 'unknown command trian: choose train, encode' trian
    declines 'unknown option --vocabulary of train' train --vocabulary 300 --out t.json a.txt
    declines 'unknown option --voca of train' train --voca 300 --out t.json a.txt
    declines 'unknown option --vocab=300 of encode' encode --vocab=300 --tokenizer byte --out d a.txt
    declines 'train needs --vocab' train --out t.json a.txt
    declines 'train needs --out' train --vocab 300 a.txt
    declines 'train needs a text' train --vocab 300 --out t.json
    declines '--out needs a value' train --vocab 300 a.txt --out
    declines '--vocab is given twice' train --vocab 300 --vocab 300 --out t.json a.txt
    declines '--vocab 10 is out of range: choose from 257' train --vocab 10 --out t.json a.txt
    declines '--vocab 256 is out of range' train --vocab 256 --out t.json a.txt
    for value in 3e2 -5 ' 300' 300x ''; do
        declines "--vocab takes a whole number, not '$value'" train --vocab "$value" --out t.json a.txt
    done
    declines 'pattern' train --vocab 300 --pattern 'a(' --out t.json a.txt
    declines 'decode needs a shard' decode --tokenizer byte
    declines 'show takes one string, not 2' show --tokenizer byte a b
    for value in 1.01 -0.1 nan x; do
        declines '--val-share takes a number from 0' encode --tokenizer byte --out d --val-share "$value" a.txt
    done
    declines '--shard-tokens 0 is out of range' encode --tokenizer byte --out d --shard-tokens 0 a.txt
    declines '--shard-tokens 2147483648 is out' encode --tokenizer byte --out d --shard-tokens 2147483648 a.txt
    declines '--block-bytes 0 is out of range' encode --tokenizer byte --out d --block-bytes 0 a.txt
}

test_refuses_files() {
    bytes 90 141 >a.txt
    : >empty.txt
    for command in "train --vocab 300 --out t.json" "encode --tokenizer byte --out d"; do
        # shellcheck disable=SC2086  # words
        {
            declines 'cannot open missing.txt' $command a.txt missing.txt
            declines 'empty.txt is empty' $command empty.txt
            declines 'not a regular file' $command /dev/null
        }
    done
    mkdir folder
    declines '--out folder is there and no regular file' train --vocab 300 --out folder a.txt
    declines 'cannot write --out missing/t.json' train --vocab 300 --out missing/t.json a.txt
    declines '--out .. is no file' train --vocab 300 --out '' a.txt
    declines '--out a.txt is no folder' encode --tokenizer byte --out a.txt a.txt
    declines 'cannot make --out missing/d' encode --tokenizer byte --out missing/d a.txt
    declines 'shards with "val" .*another name' encode --tokenizer byte --out d --name interval a.txt
    cp a.txt val.txt
    declines '--name val: .*another name' encode --tokenizer byte --out d val.txt
    for name in '' . .hidden a/b; do
        declines '--name .* cannot start' encode --tokenizer byte --out d --name "$name" a.txt
    done
    tokenize encode --tokenizer byte --out d a.txt
    succeeds
    declines 'd has a_(train|val)_000000.bin in it already' encode --tokenizer byte --out d a.txt
    tokenize encode --tokenizer byte --out d --name b a.txt
    succeeds
    declines 'is token shards: give text' encode --tokenizer byte --out e d/a_train_000000.bin

    local as_user=()
    [ "$(id -u)" != 0 ] || as_user=(setpriv --reuid=65534 --clear-groups)
    mkdir -m 555 locked
    chown -f 65534 locked
    if ! "${as_user[@]}" test -x "$TRAIN" 2>/dev/null || "${as_user[@]}" touch locked/x 2>/dev/null; then
        skip "a directory without the right to write: everything may be written here"
        return
    fi
    "${as_user[@]}" "$TRAIN" encode --tokenizer byte --out locked a.txt >out 2>err
    status=$?
    refused 'cannot write into --out locked'
    "${as_user[@]}" "$TRAIN" train --vocab 300 --out locked/t.json a.txt >out 2>err
    status=$?
    refused 'cannot write --out locked/t.json'
}

test_refuses_tokenizers() {
    make_shards
    declines 'cannot (open|read) missing.json|missing.json' show --tokenizer missing.json a
    head -c 2000 tokenizer.json >cut.json
    declines 'cut.json' show --tokenizer cut.json a
    declines 'cut.json' encode --tokenizer cut.json --out d book.txt
    declines 'cut.json' decode --tokenizer cut.json shards
    sed 's/"dropout": null/"dropout": 0.1/' tokenizer.json >dropout.json
    declines 'dropout' encode --tokenizer dropout.json --out d book.txt
}

test_refuses_shards() {
    make_shards
    tokenize train --vocab 399 --out other.json book.txt
    declines 'book_train_000000.bin was made with another tokenizer' decode --tokenizer other.json \
        shards/book_train_000000.bin
    declines 'was made with another tokenizer' decode --tokenizer byte shards
    declines 'book.txt is text, not token shards' decode --tokenizer byte book.txt
    shard plain.bin 65 66 67 # as others write it: nothing is said about the tokenizer
    tokenize decode --tokenizer byte plain.bin plain.bin
    succeeds
    equal "the text" "$(cat out)" ABCABC
    declines 'cannot open missing.bin' decode --tokenizer byte plain.bin missing.bin
    shard beyond.bin 65 300
    tokenize decode --tokenizer byte beyond.bin
    refused 'beyond.bin: token 1 is 300.* give the tokenizer that the shard was made with'
    truncate -s -1 plain.bin
    declines 'plain.bin' decode --tokenizer byte plain.bin
    if [ -e /dev/full ]; then
        "$TRAIN" decode --tokenizer tokenizer.json shards >/dev/full 2>err
        status=$?
        refused 'cannot write'
    fi
}

# ---- what is left when it does not end as it should

test_stopped() {
    text 3000 5 >book.txt
    for signal in INT TERM; do
        "$TRAIN" encode --tokenizer byte --out shards --shard-tokens 100 --block-bytes 50 book.txt >out 2>err &
        pid=$!
        wait_for shards/book_train_000003.bin
        kill -$signal $pid
        finish
        ends $((128 + $([ $signal = INT ] && echo 2 || echo 15)))
        [ ! -e shards ] || fail "left $(find shards | wc -l) files behind"
    done
    mkdir shards
    touch shards/mine
    "$TRAIN" encode --tokenizer byte --out shards --shard-tokens 100 --block-bytes 50 book.txt >out 2>err &
    pid=$!
    wait_for shards/book_train_000003.bin
    kill -TERM $pid
    finish
    equal "what is left" "$(ls shards)" mine
}

# A file that may not grow is a full disk in small.
test_full_disk() {
    text 300 5 >book.txt
    bash -c 'ulimit -f 16; exec "$0" "$@"' "$TRAIN" encode --tokenizer byte --out shards book.txt >out 2>err
    status=$?
    refused 'cannot write shards/book_train_000000.bin'
    [ ! -e shards ] || fail "left $(find shards) behind"
    bash -c 'ulimit -f 1; exec "$0" "$@"' "$TRAIN" train --vocab 300 --out tokenizer.json book.txt >out 2>err
    status=$?
    refused 'cannot write --out tokenizer.json'
    equal "what is left" "$(echo tokenizer.json*)" 'tokenizer.json*'
}

# A shard must not get the number of a standard stream that is closed, and its text.
test_closed_standard_streams() {
    text 20 5 >book.txt
    "$TRAIN" encode --tokenizer byte --out shards book.txt <&- >&- 2>&-
    status=$?
    ends 0
    bytes=$(($(word shards/book_train_000000.bin 2) + $(word shards/book_val_000000.bin 2)))
    equal "the number of bytes" $bytes "$(size book.txt)"
}

run_tests "$@"
