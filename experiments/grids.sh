#!/usr/bin/env bash
# Runs grids of microbenchmarks, keeps their lines and prints a table of what they say.
#
#   experiments/grids.sh [-g GRIDS] [-o OPTIONS] [-p PYTHON] PROGRAM OUT
#
#   PROGRAM     build/bench_layer or build/bench_layer_cuda (make build/bench_layer_cuda)
#   OUT         JSONL that grows: what was printed, plus command and time
#   -g GRIDS    comma-separated: course, large, pack; default: all three
#   -o OPTIONS  further ones of the program (experiments/bench_layer.c), for example "--scale small --seconds 0.1" on a
#               CPU, or "--load zipf:1.2"
#   -p PYTHON   default: python3
# One process per grid; one that fails leaves the lines of the others as they are, and the exit status 1. Builds
# nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=experiments/script_options.sh
. "$here/script_options.sh"
grids=course,large,pack options='' python=python3
read_options 'g=grids o=options p=python' 2 "$@"
program=${arguments[0]} out=${arguments[1]}
if [ ! -x "$program" ]; then fail "$program is not there: make $program"; fi
# shellcheck source=experiments/keep_lines.sh
. "$here/keep_lines.sh"

read -ra words <<<"$options"
for grid in ${grids//,/ }; do
    keep "$program" --grid "$grid" "${words[@]}"
done
"$python" "$here/grid_table.py" "$lines"
exit "$failed"
