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
grids=course,large,pack options= python=python3
usage() { sed -n '4s/^#  */usage: /p' "$0" >&2; exit 1; }
while getopts 'g:o:p:' option; do
    case $option in
        g) grids=$OPTARG ;;
        o) options=$OPTARG ;;
        p) python=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
if [ $# != 2 ]; then usage; fi
program=$1 out=$2
if [ ! -x "$program" ]; then echo "grids.sh: $program is not there: make $program" >&2; exit 1; fi
# shellcheck source=experiments/keep_lines.sh
. "$here/keep_lines.sh"

read -ra words <<<"$options"
for grid in ${grids//,/ }; do
    keep "$program" --grid "$grid" "${words[@]}"
done
"$python" "$here/grid_table.py" "$lines"
exit "$failed"
