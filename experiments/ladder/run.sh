#!/bin/bash
# Builds and runs every rung of every ladder, or of those named, and prints what they reach.
#
#     experiments/ladder/run.sh                     all
#     experiments/ladder/run.sh expert_product      one ladder
#
# The results' lines, one JSON object each, go to build/ladder/results.jsonl. A copy of the tree without git runs the
# programs that it finds, so that they name the commit they were built from. The tables print the share of the bar that
# each was measured beside, in the same process: a dense cuBLAS product of the same size, or a copy within the device of
# as many bytes.
set -e
cd "$(dirname "$0")/../.."
out=build/ladder
[ $# -gt 0 ] || set -- expert_product dispatch
programs=() failed=()
for ladder in "$@"; do
    for level in experiments/ladder/"$ladder"/level_*.cu; do
        programs+=("$out/${ladder}_$(basename "$level" .cu)")
    done
done
if [ -e .git ] || [ ! -d $out ]; then make -j"$(nproc)" "${programs[@]}" >&2; fi
: >$out/results.jsonl
for program in "${programs[@]}"; do
    "$program" >>$out/results.jsonl || failed+=("$program")
done
python3 - $out/results.jsonl <<'PY'
import json
import sys

lines = [json.loads(line) for line in open(sys.argv[1])]
rate = {"expert_product": ("tflops", "TFLOP/s", "of dense"), "dispatch": ("gb_s", "GB/s", "of copy")}
shape_of = lambda l: (l["ladder"], l["T"], l["K"], l["E"], l["C"], l.get("N", 0))
for shape in dict.fromkeys(map(shape_of, lines)):
    key, unit, bar = rate[shape[0]]
    n = f"  N {shape[5]}" if shape[5] else ""
    print(f"\n{shape[0]}  T {shape[1]}  K {shape[2]}  E {shape[3]}  C {shape[4]}{n}")
    print(f"    {'level':20} {'ms':>9} {unit:>9} {bar:>9}")
    for l in lines:
        if shape_of(l) == shape:
            reached = f"{l[key]:9.0f} {100 * l['share']:8.0f}%" if key in l else f"{'-':>9} {'-':>9}"
            print(f"    {l['level']:20} {l['ms']:9.3f} {reached}")
PY
[ ${#failed[@]} -eq 0 ] || { echo "failed, or a result is wrong: ${failed[*]}" >&2; exit 1; }
