#!/bin/sh
# Checks that need no program: one line each, last line "N passed, N failed". Run by `make check` and `make test`.
#
#   include direction   train.c -> model -> kernels; train.c -> data; data -> kernels/{check,random,checksum}.h;
#                       tests and experiments include what they like, nothing includes them;
#                       mpi.h and nccl.h only in kernels/comm.*, comm_* and experiments/alltoall, cuda_runtime.h only
#                       in .cu and .cuh files
#   headers alone       each header compiles without another one before it
#   formatting          as .clang-format says, where clang-format is installed
#   text                lines of at most 120 columns (but for addresses), no tabs, no blanks at the end of a line
#   top level           only the files and folders that belong there
#   open ends           no notes to do or fix something later
# shellcheck disable=SC2046,SC2086  # lists of file names are meant to be split
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-gcc}
CLANG_FORMAT=${CLANG_FORMAT:-clang-format}

passed=0
failed=0

# report NAME PROBLEMS: one line when there are none, else the name and the problems.
report() {
    if [ -z "$2" ]; then
        echo "ok    $1"
        passed=$((passed + 1))
    else
        echo "FAIL  $1"
        echo "$2" | sed 's/^/      | /'
        failed=$((failed + 1))
    fi
}

in_git() {
    [ -e .git ] && git ls-files >/dev/null 2>&1
}

# All files of the project, also those not yet committed, but nothing that git ignores. Names hold no blanks.
files() {
    if in_git; then
        git ls-files --cached --others --exclude-standard
    else
        find . -path ./build -prune -o -path ./runs -prune -o -type f -print | sed 's,^\./,,'
    fi | sort -u | while read -r file; do
        [ ! -f "$file" ] || echo "$file"
    done
}

all=$(files)
c_files=$(echo "$all" | grep -E '\.(c|h|cu|cuh)$')
headers=$(echo "$c_files" | grep -E '^(model|kernels|data)/.*\.h$')

if [ -z "$headers" ]; then
    echo "FAIL  no source files found in $(pwd)"
    echo "0 passed, 1 failed"
    exit 1
fi

check_includes() {
    awk '
        function folder(path) { return path ~ /\// ? substr(path, 1, index(path, "/") - 1) : path }

        # "model/../kernels/plan.h" -> "kernels/plan.h"
        function normal(path) {
            while (path ~ /[^\/]+\/\.\.\//) { sub(/[^\/]+\/\.\.\//, "", path) }
            gsub(/(^|\/)\.\//, "/", path)
            sub(/^\//, "", path)
            return path
        }

        function problem(why) { print FILENAME ":" FNR ": " why }

        /^[ \t]*#[ \t]*include[ \t]*[<"]/ {
            from = folder(FILENAME)
            free = from == "tests" || from == "experiments"
            name = $0
            sub(/^[^<"]*[<"]/, "", name)
            sub(/[>"].*$/, "", name)

            if ($0 ~ /</) {
                if (name ~ /^(mpi|nccl|nccl_device)\.h$/ &&
                    FILENAME !~ /^(kernels\/comm[._]|experiments\/alltoall\/)/) {
                    problem(name " belongs in kernels/comm.*, comm_* and experiments/alltoall alone")
                }
                if (name ~ /^(cuda|cublas)[A-Za-z0-9_]*\.h$/ && FILENAME !~ /\.cuh?$/) {
                    problem(name " belongs in .cu and .cuh files alone")
                }
                next
            }
            directory = FILENAME
            if (!sub(/\/[^\/]*$/, "/", directory)) { directory = "" }
            target = normal(directory name)
            if (target ~ /\.\.\// || (getline line < target) < 0) {
                problem("\"" name "\" is not found from this folder; write <...> for a library")
                next
            }
            close(target)
            to = folder(target)
            allowed = free ||
                (from == "train.c" && (to == "model" || to == "kernels" || to == "data")) ||
                (from == "model" && (to == "model" || to == "kernels")) ||
                (from == "kernels" && to == "kernels") ||
                (from == "data" && (to == "data" || target ~ /^kernels\/(check|random|checksum)\.h$/))
            if (!allowed) { problem(from " must not include " target) }
            if (FILENAME ~ /^kernels\/(check|random|checksum)\.h$/) {
                problem("data/ includes this and is compiled once for all types of numbers: no " target " here")
            }
        }' $c_files /dev/null
}

check_headers() {
    for header in $headers; do
        echo "#include \"$header\"" | $CC -I. -x c - -std=gnu11 -fopenmp -fsyntax-only \
            -Wall -Wextra -Wno-unused-parameter -Wno-unused-function -Werror 2>&1 | head -n 3
    done
}

check_text() {
    awk 'length($0) > 120 && !/:\/\//    { print FILENAME ":" FNR ": " length($0) " columns, at most 120" }
         /\t/ && FILENAME ~ /\.(c|h|cuh?)$/ { print FILENAME ":" FNR ": tab" }
         /[ \t\r]$/                      { print FILENAME ":" FNR ": blank at the end of the line" }' \
        $c_files $(echo "$all" | grep -E '(^Makefile|\.sh|\.py|^\.ci/run)$') /dev/null
}

check_top_level() {
    git ls-files 2>/dev/null | grep -vE '^(README\.md|Makefile|train\.c|LICENSE|\.[^/]+|\.ci/.*)$' |
        grep -vE '^(model|kernels|data|tests|experiments|notebooks)/'
}

check_open_ends() {
    grep -nE '\b(TO''DO|FIX''ME|XX''X)\b' $(echo "$all" | grep -vE '\.(ipynb|txt|bin|csv|jsonl)$') /dev/null
}

report "include direction" "$(check_includes)"
report "each header compiles alone ($(echo "$headers" | grep -c .) headers)" "$(check_headers)"
report "lines of at most 120 columns, no tabs, no trailing blanks" "$(check_text)"
if command -v "$CLANG_FORMAT" >/dev/null; then
    report "formatting ($CLANG_FORMAT)" "$($CLANG_FORMAT --dry-run -Werror $c_files 2>&1 |
        grep -E 'error: ' | cut -d: -f1 | uniq -c | sed 's/ *\([0-9]*\) \(.*\)/\2: \1 places; make format/')"
else
    echo "skip  formatting: $CLANG_FORMAT is not installed"
fi
if in_git; then
    report "top level" "$(check_top_level)"
else
    echo "skip  top level: not a git checkout"
fi
report "no open ends" "$(check_open_ends)"

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
