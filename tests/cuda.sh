#!/bin/sh
# The kernels of a GPU against the CPU's, on a machine with a GPU. Last line: "N passed, N failed".
#
#     tests/cuda.sh [FOLDER]      FOLDER (build) holds parity_cpu, parity_cuda and parity_cuda_fp32
#
#   parity      every operation, in float and in bf16, against the CPU's results on the same inputs
#   bits        ten runs and recorded runs with the same bits; rows in other company
#   sanitizer   compute-sanitizer's four tools over the small shapes, where it is installed
#
#   runs        training runs of ./train_cuda against ./train (cuda_runs.sh), where both are built
#
# Logs stay in FOLDER/cuda_logs.
folder=$(cd "${1:-build}" && pwd) || exit 1
logs=$folder/cuda_logs
mkdir -p "$logs" || exit 1
passed=0
failed=0

# count LOG STATUS: adds the log's last line; a program that ended without one counts as one failure.
count() {
    line=$(tail -n 1 "$1")
    case $line in
    [0-9]*" passed, "[0-9]*" failed")
        passed=$((passed + ${line%% *}))
        line=${line##*, }
        failed=$((failed + ${line%% *}))
        [ "$2" = 0 ] || [ "${line%% *}" != 0 ] || failed=$((failed + 1))
        ;;
    *)
        echo "FAIL  $1: ended with status $2"
        tail -n 5 "$1"
        failed=$((failed + 1))
        ;;
    esac
}

# parity NAME PROGRAM [OPTIONS of write]
parity() {
    log=$logs/$1.log
    program=$2
    shift 2
    "$folder/parity_cpu" write "$@" | "$folder/$program" compare >"$log" 2>&1
    count "$log" $?
    grep '^FAIL' -A 1 "$log" | head -n 40
}

# sanitizer TOOL PROGRAM [OPTIONS of write]: what the tool finds counts, not the numbers, which are the same as before.
sanitizer() {
    log=$logs/$1_$2.log
    tool=$1
    program=$2
    shift 2
    "$folder/parity_cpu" write --small "$@" |
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/$program" compare >"$log" 2>&1
    status=$?
    if [ $status != 9 ] && grep -q 'passed, ' "$log"; then
        echo "ok    $tool $program"
        passed=$((passed + 1))
    else
        echo "FAIL  $tool $program, status $status"
        grep '=========' "$log" | head -n 12
        failed=$((failed + 1))
    fi
}

parity parity_fp32 parity_cuda_fp32
parity parity_bf16 parity_cuda --round bf16
sed -n '/^operation/,$p' "$logs/parity_fp32.log" | awk 'NF == 3 { print $1, $3 }' >"$logs/fp32"
sed -n '/^operation/,$p' "$logs/parity_bf16.log" | awk 'NF == 3 { print $1, $3 }' >"$logs/bf16"
echo "worst relative error       float        bf16"
awk 'NR == FNR { float[$1] = $2; next } { printf "%-20s %11s %11s\n", $1, float[$1], $2 }' "$logs/fp32" "$logs/bf16"
for program in parity_cuda_fp32 parity_cuda; do
    "$folder/$program" bits >"$logs/bits_$program.log" 2>&1
    count "$logs/bits_$program.log" $?
    grep '^FAIL' "$logs/bits_$program.log" | head -n 20
done
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        sanitizer $tool parity_cuda --round bf16
    done
    sanitizer memcheck parity_cuda_fp32
else
    echo "compute-sanitizer is not installed: left out"
fi
if [ -x ./train_cuda ] && [ -x ./train ]; then
    CPU=./train FP32="$folder/train_cuda_fp32" TRAIN=./train_cuda "$(dirname "$0")/cuda_runs.sh" >"$logs/runs.log" 2>&1
    count "$logs/runs.log" $?
    grep '^FAIL' "$logs/runs.log" | head -n 20
    for script in routers runs; do
        AHEAD=1 TRAIN=./train_cuda "$(dirname "$0")/test_cli_$script.sh" >"$logs/$script.log" 2>&1
        count "$logs/$script.log" $?
        grep '^FAIL' "$logs/$script.log" | head -n 20
    done
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
