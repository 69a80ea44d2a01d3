#!/bin/sh
# The kernels of a GPU against the CPU's, on a machine with a GPU. Last line: "N passed, N failed".
#
#     tests/cuda.sh [FOLDER]      FOLDER (build) holds parity_cpu, parity_cuda, parity_cuda_fp32 and comm_ranks_cuda
#
#   parity      every operation, in float and in bf16, against the CPU's results on the same inputs
#   bits        ten runs and recorded runs with the same bits; rows in other company
#   ..._mma, ..._plain   both of these for the operations that have several kinds of kernels, with kinds that a Hopper
#               card does not choose by itself
#   ampere      with what the driver makes of Ampere's PTX, which a build with the default CUDA_ARCHS holds: the code
#               that no Hopper card takes from the program
#   runs        training runs of ./train_cuda against ./train (cuda_runs.sh), and the tests of the command line on it,
#               where both are built
#   ...check    compute-sanitizer's four tools over the small shapes, where it is installed
#   ...check_wide   three of them over all shapes of the operations that multiply on the matrix units, which most of the
#               small shapes do not fit
#
#   ranks       on a machine with several GPUs, what ranks say to each other (test_comm.sh)
#
# All of them at once, but for the ranks, which time each other; their logs stay in FOLDER/cuda_logs.
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

# start NAME COMMAND...: runs it beside the others; what it prints is NAME's log.
start() {
    name=$1
    shift
    ("$@" >"$logs/$name.log" 2>&1; echo $? >"$logs/$name.status") &
    names="$names $name"
}

# parity PROGRAM "OPTIONS of write" ["OPTIONS of compare"]
parity() {
    # shellcheck disable=SC2086  # words
    "$folder/parity_cpu" write $2 | "$folder/$1" compare ${3:-}
}

# sanitizer TOOL PROGRAM OPTIONS of write...: what the tool finds counts, not the numbers, which are the same as before.
sanitizer() {
    tool=$1
    program=$2
    shift 2
    "$folder/parity_cpu" write "$@" |
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/$program" compare
    status=$?
    if [ $status != 9 ] && grep -q 'passed, ' "$logs/$name.log"; then
        echo "1 passed, 0 failed"
    else
        echo "FAIL  $tool $program: status $status"
        echo "0 passed, 1 failed"
    fi
}

names=
start parity_fp32 parity parity_cuda_fp32 ""
start parity_bf16 parity parity_cuda "--round bf16"
start bits_fp32 "$folder/parity_cuda_fp32" bits
start bits_bf16 "$folder/parity_cuda" bits
several="attention experts experts_home moe_layer moe_layer_block moe_layer_picked"
for path in mma plain; do
    start parity_$path parity parity_cuda "--round bf16 $several" "--path $path"
    # shellcheck disable=SC2086  # words
    start bits_$path "$folder/parity_cuda" bits --path $path $several
done
export CUDA_FORCE_PTX_JIT=1 # whatever a library brings without PTX cannot be loaded: no operation that uses cuBLAS
start ampere parity parity_cuda "--round bf16 attention experts"
unset CUDA_FORCE_PTX_JIT
if [ -x ./train_cuda ] && [ -x ./train ]; then
    tests=$(dirname "$0")
    start runs env CPU=./train FP32="$folder/train_cuda_fp32" TRAIN=./train_cuda "$tests/cuda_runs.sh"
    start cli_routers env AHEAD=1 TRAIN=./train_cuda "$tests/test_cli_routers.sh"
    start cli_runs env AHEAD=1 TRAIN=./train_cuda "$tests/test_cli_runs.sh"
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        start $tool sanitizer $tool parity_cuda --round bf16 --small
    done
    for tool in memcheck racecheck synccheck; do
        start ${tool}_wide sanitizer $tool parity_cuda --round bf16 experts experts_home moe_layer attention gate matmul
    done
    start memcheck_fp32 sanitizer memcheck parity_cuda_fp32 --small
else
    echo "compute-sanitizer is not installed: left out"
fi
wait
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
if [ "$gpus" -gt 1 ]; then
    start ranks env PROGRAM="$folder/comm_ranks_cuda" RANKS="1 2$([ "$gpus" -lt 4 ] || echo ' 4')" \
        "$(dirname "$0")/test_comm.sh"
    wait
fi
for name in $names; do
    echo "$name: $(tail -n 1 "$logs/$name.log")"
    count "$logs/$name.log" "$(cat "$logs/$name.status")"
    grep -A 1 '^FAIL' "$logs/$name.log" | head -n 40
    case $name in *check*) grep '=========' "$logs/$name.log" | head -n 12 ;; esac
done
for column in fp32 bf16 mma plain; do
    sed -n '/^operation/,$p' "$logs/parity_$column.log" | awk -v column=$column 'NF == 3 { print column, $1, $3 }'
done | awk '
    { worst[$1, $2] = $3 }
    $1 == "fp32" { name[++count] = $2 }
    function of(column, i) { return (column, name[i]) in worst ? worst[column, name[i]] : "" }
    END {
        printf "%-20s %9s %9s %9s %9s\n", "worst relative error", "float", "bf16", "mma", "plain"
        for (i = 1; i <= count; i++) {
            printf "%-20s %9s %9s %9s %9s\n", name[i], of("fp32", i), of("bf16", i), of("mma", i), of("plain", i)
        }
    }'
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
