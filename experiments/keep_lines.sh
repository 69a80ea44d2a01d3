# shellcheck shell=bash disable=SC2154,SC2034  # variables that who sources this sets, or reads
# What the comparisons with PyTorch share: running a program and keeping the JSON lines that it prints. Sourced by
# gpu_compare.sh, alltoall_compare.sh and scaling_compare.sh, which set python, out (the file that grows) and the paths
# they need.
commit=unknown failed=0
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

# keep COMMAND...: its lines go to $out and to $lines, each with command and time. One without a commit gets that of the
# line before, for PyTorch runs right after ours. One that fails is named, and leaves failed=1.
keep() {
    echo "+ $*" >&2
    "$@" | grep '^{' | COMMAND="$*" COMMIT=$commit "$python" -c '
import json, os, sys, time
for line in sys.stdin:
    print(json.dumps({"commit": os.environ["COMMIT"], **json.loads(line), "command": os.environ["COMMAND"],
                      "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}))' | tee -a "$out" >>"$lines" ||
        { echo "${0##*/}: failed: $*" >&2; failed=1; }
    commit=$(tail -n 1 "$lines" | sed -n 's/.*"commit": "\([^"]*\)".*/\1/p')
    commit=${commit:-unknown}
}
