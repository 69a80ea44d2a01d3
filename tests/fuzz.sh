#!/bin/sh
# For developers: feeds every reader of files with what a fuzzer makes up, for SECONDS each (60).
#
#     tests/fuzz.sh [SECONDS [NAME...]]        # NAME: safetensors, shard, ..; all of them when none is given
#
# A target (tests/fuzz/fuzz_NAME.c) hands its input to one reader and checks what the reader promises. libFuzzer mutates
# inputs, starting from tests/fuzz/corpus/NAME and helped by the words in tests/fuzz/NAME.dict, and keeps those that
# reach code that none reached before; AddressSanitizer and UndefinedBehaviorSanitizer watch. Inputs that are found live
# in a temporary copy of the corpus; one that fails is kept under build/fuzz/NAME/. Put it into the corpus when the
# defect is gone: `make test` replays that, without clang (tests/test_fuzz_corpus.c).
#
# As many targets run at once as there are cores. One line per target, the last line is "N passed, N failed".
#
#     CLANG    the compiler (clang)
seconds=${1:-60}
[ $# = 0 ] || shift
CLANG=${CLANG:-clang}
cores=$(nproc 2>/dev/null || echo 2)
build=build/fuzz
cd "$(dirname "$0")/.." || exit 1

# longest_input NAME: longer ones only take longer.
longest_input() {
    case $1 in
    tokenizer) echo 16384 ;;
    shard | choices) echo 4096 ;;
    *) echo 8192 ;;
    esac
}

# run_target NAME SECONDS: fuzzes one target and prints its line; exit status 1 when an input failed.
run_target() {
    name=$1
    folder=$build/$name
    log=$folder/log
    rm -rf "$folder"
    mkdir -p "$folder"
    # in memory where there is such a folder: targets that open files write one for every input
    temporary=$(mktemp -d /dev/shm/fuzz.XXXXXX 2>/dev/null || mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 130' INT TERM
    cp -r "tests/fuzz/corpus/$name" "$temporary/corpus"
    dictionary=tests/fuzz/$name.dict
    [ -f "$dictionary" ] || dictionary=/dev/null
    status=0
    TMPDIR=$temporary "$build/fuzz_$name" -max_total_time="$2" -timeout=10 -rss_limit_mb=2048 -dict="$dictionary" \
        -max_len="$(longest_input "$name")" -artifact_prefix="$folder/" "$temporary/corpus" >"$log" 2>&1 || status=$?

    # "#4096 pulse cov: 300 ft: 900 ..." and, at the end, "Done 4321 runs in 61 second(s)"
    counts=$(awk '/ cov: / { for (i = 1; i < NF; i++) { if ($i == "cov:") { coverage = $(i + 1) } } }
                  /^Done / { runs = $2; time = $5 }
                  END      { print runs + 0 " runs, coverage " coverage + 0 ", " time + 0 " seconds" }' "$log")
    if [ "$status" = 0 ]; then
        echo "ok    fuzz_$name: $counts"
        return 0
    fi
    reproducer=$(find "$folder" -name '*-*' | head -n 1)
    reason=$(grep -m 1 -A 12 -E 'ERROR: |runtime error: |Assertion .* failed' "$log" || tail -n 12 "$log")
    printf 'FAIL  fuzz_%s: %s\n%s\n' "$name" "${reproducer:-no input was kept, see $log}" \
        "$(printf '%s\n' "$reason" | cut -c 1-200 | sed 's/^/      | /')"
    return 1
}

# The script calls itself like this to run targets side by side.
if [ "$seconds" = --target ]; then
    run_target "$2" "$1"
    exit
fi

case $seconds in
'' | *[!0-9]*)
    echo "fuzz.sh: '$seconds' is not a number of seconds; usage: tests/fuzz.sh [SECONDS [NAME...]]" >&2
    exit 1
    ;;
esac

mkdir -p "$build"
if ! echo 'int LLVMFuzzerTestOneInput(const char *data, long size) { return data && size < 0; }' |
    "$CLANG" -fsanitize=fuzzer,address,undefined -x c - -o "$build/probe" 2>/dev/null; then
    echo "fuzz.sh: no $CLANG with libFuzzer here: sudo apt-get install clang, or name another with CLANG=..." >&2
    exit 1
fi

names=${*:-$(for target in tests/fuzz/fuzz_*.c; do basename "$target" .c; done | sed 's/^fuzz_//')}
programs=
for name in $names; do
    if [ ! -f "tests/fuzz/fuzz_$name.c" ]; then
        echo "fuzz.sh: there is no target $name: tests/fuzz/fuzz_$name.c is not a file" >&2
        exit 1
    fi
    programs="$programs $build/fuzz_$name"
done
unset MAKEFLAGS # of a make that called this
# shellcheck disable=SC2086  # a list
if ! make -s -j "$cores" -f tests/fuzz/fuzz.mk CLANG="$CLANG" $programs; then
    echo "fuzz.sh: the targets do not build" >&2
    echo "0 passed, 1 failed"
    exit 1
fi

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for name in $names; do
    echo "$name"
done | xargs -P "$cores" -n 1 "$0" --target "$seconds" | tee "$results"
passed=$(grep -c '^ok ' "$results")
failed=$(grep -c '^FAIL ' "$results")
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" = "$(echo "$names" | wc -w)" ]
