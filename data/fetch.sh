#!/bin/sh
# Downloads a data set into data/downloads/ (which git ignores) and checks the size and the SHA-256 of every file.
# Nothing needs it: the builtin corpus is made in memory.
#
#     data/fetch.sh            lists the data sets: what there is to download, the licence
#     data/fetch.sh NAME       downloads one, prints its licence and what to run next
#
# What was interrupted goes on where it stopped, from FILE.part; no file gets its name before it has been checked. Files
# that are there and right are left alone.
#
# The table says what there is, one line for each thing; add lines to add a data set. FETCH_TABLE=FILE: another table.
#
#     set NAME LICENCE                       starts a data set
#     file FILE BYTES SHA-256 ADDRESS        a URL, or zip://ARCHIVE/MEMBER with the ARCHIVE of a line before
#     # FROM WHERE                           who published the figures of the files above
#     next COMMAND                           what can be run then, from the root of the repository
#
# "-" for BYTES or SHA-256: nobody published it. Then the first download is believed, its SHA-256 is recorded in
# data/downloads/NAME.sha256, and later ones are compared with that.
set -eu

table() {
    if [ -n "${FETCH_TABLE:-}" ]; then
        cat "$FETCH_TABLE"
        return
    fi
    cat <<'TABLE'
set tinyshakespeare public domain (Shakespeare; the selection is of karpathy/char-rnn, MIT)
file tinyshakespeare.txt 1115394 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
# github huggingface/datasets: datasets/tiny_shakespeare/dataset_infos.json (size, SHA-256)
next ./train --data data/downloads/tinyshakespeare.txt

set tinystories CDLA-Sharing-1.0 (Eldan and Li, arXiv 2305.07759; documents end with <|endoftext|>)
file tinystories_train.txt 2227753162 6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443 https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt
file tinystories_valid.txt 22502601 6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-valid.txt
# github KeyAIGit/keyai-commons: research/commons_lab/fetch_data.py (sizes, SHA-256 of that revision); the page
# https://huggingface.co/datasets/roneneldan/TinyStories/tree/main has the rounded sizes and the licence
next head -c 50000000 data/downloads/tinystories_train.txt >data/downloads/tinystories_first.txt
next data/tokenize train --vocab 8192 --out data/downloads/tinystories.json data/downloads/tinystories_first.txt
next data/tokenize encode --tokenizer data/downloads/tinystories.json --out data/downloads/tinystories \
next     --name stories --val-share 0 data/downloads/tinystories_train.txt
next data/tokenize encode --tokenizer data/downloads/tinystories.json --out data/downloads/tinystories \
next     --name held_out --val-share 1 data/downloads/tinystories_valid.txt
next ./train --data data/downloads/tinystories --tokenizer data/downloads/tinystories.json

set wikitext2 CC BY-SA 3.0 and GFDL (Wikipedia's authors; selected by Merity et al., arXiv 1609.07843)
file wikitext-2-raw-v1.zip 4721645 ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11 https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip
file wikitext2_train.txt 10940747 6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57 zip://wikitext-2-raw-v1.zip/wikitext-2-raw/wiki.train.raw
file wikitext2_valid.txt 1146846 4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7 zip://wikitext-2-raw-v1.zip/wikitext-2-raw/wiki.valid.raw
file wikitext2_test.txt 1290590 173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08 zip://wikitext-2-raw-v1.zip/wikitext-2-raw/wiki.test.raw
# github huggingface/datasets: datasets/wikitext/dataset_infos.json (archive: size, SHA-256), README.md (licence);
# dipeshbabu/metria: src/metria/fidelity/corpora.py (mirror and members: sizes, SHA-256); the first address is gone
next data/tokenize train --vocab 8192 --out data/downloads/wikitext2.json data/downloads/wikitext2_train.txt
next ./train --data data/downloads/wikitext2_train.txt --val data/downloads/wikitext2_valid.txt \
next     --tokenizer data/downloads/wikitext2.json

set enwik8 GFDL (Wikipedia's authors, March 2006; the first 10^8 bytes)
file enwik8.zip 36445475 547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc https://mattmahoney.net/dc/enwik8.zip
file enwik8.txt 100000000 2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8 zip://enwik8.zip/enwik8
# github huggingface/datasets: datasets/enwik8/dataset_infos.json (archive: size, SHA-256); google/wuffs:
# cmd/ractool/main.go (both sizes, SHA-256 of the text); http://mattmahoney.net/dc/textdata.html (both sizes)
next ./train --data data/downloads/enwik8.txt

set fineweb-edu ODC-By 1.0 and Common Crawl's terms of use (Hugging Face; 10^8 GPT-2 tokens a shard)
file fineweb-edu/finewebedu_train_000001.bin 200001024 56c89ff62b84a8645ad7d9b3d2fbe33cb588e0d774b7b966e263fd1b945bd39a https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_train_000001.bin
file fineweb-edu/finewebedu_val_000000.bin 200001024 64682bb1bcc5437ac1cce0efd9dcbee2fd78877b74159e21970f6b9cba734c97 https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_val_000000.bin
# https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/blob/main/finewebedu_train_000001.bin (its SHA-256);
# github mytensorsarelonger/modded-nanogpt: PAUSE-general-slice.md (both: size and SHA-256; of val the only source)
next ./train --data data/downloads/fineweb-edu --vocab 50304

set linux-doc GPL-2.0 and others (the Linux kernel's documentation, Debian's package of version 6.1: 21 MB of text)
file linux-doc.deb 37222656 0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f https://deb.debian.org/debian/pool/main/l/linux/linux-doc-6.1_6.1.176-1_all.deb
# Debian bookworm's list of packages (size, SHA-256); when the address is gone, snapshot.debian.org keeps the file
next data/text_of_deb.sh data/downloads/linux-doc.deb data/downloads/linux-doc
next ./train --data data/downloads/linux-doc/train.txt --val data/downloads/linux-doc/val.txt

set hellaswag MIT (Zellers et al., arXiv 1905.07830; 10,042 questions in GPT-2 tokens, from karpathy/llm.c)
file hellaswag_val.bin 3762386 59509ba401e820f2cd8b579141354e8ebc14a20f8e2cc181f1836f1d0e59eb99 https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main/hellaswag_val.bin
# github chunke2/llm_test: experiments/scripts/download_starter_pack_verified.sh (size, SHA-256);
# vnnm404/gpt2.cu: nix/weights.nix (SHA-256)
next data/fetch.sh fineweb-edu
next ./train --data data/downloads/fineweb-edu --vocab 50304 --choices data/downloads/hellaswag_val.bin
TABLE
}

folder=$(dirname "$0")/downloads
folder=${folder#./}

fail() {
    echo "fetch.sh: $1" >&2
    exit 1
}

# ---- the table

# lines_of NAME KIND: what follows KIND in the lines of a data set.
lines_of() {
    table | awk -v name="$1" -v kind="$2" '
        $1 == "set"          { mine = $2 == name }
        mine && $1 == kind   { sub(/^ *[a-z]+ /, ""); print }'
}

names() {
    table | awk '$1 == "set" { printf " %s", $2 }'
}

# Name, megabytes to download and licence of each data set.
list() {
    table | awk '
        function finish() { if (name) { printf "%-16s %s  %s\n", name, unknown ? " unknown size" : size(), licence } }
        function size()   { return sprintf("%10.1f MB", total / 1e6) }

        $1 == "set"                   { finish(); name = $2; total = unknown = 0; licence = $0
                                        sub(/^ *set +[^ ]+ */, "", licence) }
        $1 == "file" && $5 !~ /^zip:/ { total += $3; if ($3 == "-") { unknown = 1 } }
        END                           { finish() }'
}

# ---- checking

checksum() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        openssl dgst -sha256 -r <"$1" | cut -d ' ' -f 1
    fi
}

size() {
    if [ -f "$1" ]; then
        wc -c <"$1" | tr -d ' '
    else
        echo 0
    fi
}

# Whether one of the programs is installed.
have_one_of() {
    for program in "$@"; do
        if command -v "$program" >/dev/null 2>&1; then
            return 0
        fi
    done
    return 1
}

# Whether the file is the one that is meant, as far as that is known; its SHA-256 is then $actual.
is_right() {
    [ -f "$1" ] || return 1
    [ "$bytes" = unknown ] || [ "$(size "$1")" = "$bytes" ] || return 1
    actual=$(checksum "$1")
    [ "$expected" = unknown ] || [ "$actual" = "$expected" ]
}

# ---- getting

# go_on ADDRESS PART: appends to PART what it lacks.
go_on() {
    if command -v curl >/dev/null 2>&1; then
        if [ -t 2 ]; then
            progress=--progress-bar
        else
            progress=--silent
        fi
        curl --fail --location $progress --show-error --connect-timeout 60 --speed-limit 1 --speed-time 120 \
            --continue-at - --output "$2" "$1"
    else
        wget --quiet --timeout=120 --continue --output-document="$2" "$1" </dev/null
    fi
}

# download ADDRESS PART: goes on with PART; from the start when there is more of it than of the file, or the server can
# only send whole files (curl's status 33).
download() {
    have_one_of curl wget || fail "neither curl nor wget is here: install one, or save $1 as $target"
    if [ "$bytes" != unknown ]; then
        if [ "$(size "$2")" = "$bytes" ]; then
            return 0
        elif [ "$(size "$2")" -gt "$bytes" ]; then
            rm -f "$2"
        fi
    fi
    status=0
    go_on "$1" "$2" || status=$?
    if [ "$status" = 33 ]; then
        rm -f "$2"
        status=0
        go_on "$1" "$2" || status=$?
    fi
    [ "$status" = 0 ] || fail "could not download $1: check the network and the room on the disk and run this again \
(it goes on where it stopped), or save it elsewhere and copy it to $target"
}

# unpack ARCHIVE MEMBER PART
unpack() {
    have_one_of unzip python3 bsdtar || fail "nothing to unpack $1 with: install unzip, python3 or bsdtar"
    if command -v unzip >/dev/null 2>&1; then
        unzip -p "$1" "$2" >"$3"
    elif command -v python3 >/dev/null 2>&1; then
        python3 -c 'import shutil, sys, zipfile
shutil.copyfileobj(zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]), sys.stdout.buffer)' "$1" "$2" >"$3"
    else
        bsdtar -xOf "$1" "$2" >"$3"
    fi || {
        rm -f "$3"
        fail "could not take $2 out of $1: check the room on the disk, remove $1 and run this again"
    }
}

# get: one file of a data set, from its line in the table: $file $bytes $sha256 $address.
get() {
    target=$folder/$file
    [ "$bytes" != - ] || bytes=unknown
    expected=$sha256
    origin="as published"
    advice=
    if [ "$sha256" = - ]; then
        expected=$(awk -v file="$file" '$2 == file { print $1 }' "$record" 2>/dev/null || true)
        expected=${expected:-unknown}
        origin="as recorded in $record"
        advice="; if it may have changed, remove its line from $record"
    fi

    if ! is_right "$target"; then
        mkdir -p "$(dirname "$target")"
        case $address in
        zip://*)
            path=${address#zip://}
            unpack "$folder/${path%%/*}" "${path#*/}" "$target.part"
            ;;
        *)
            download "$address" "$target.part"
            ;;
        esac
        if ! is_right "$target.part"; then
            rm -f "$target.part"
            fail "$address is not the expected file (bytes: $bytes, SHA-256: $expected): nothing was kept$advice"
        fi
        mv "$target.part" "$target"
    fi

    if [ "$expected" = unknown ]; then
        echo "$actual  $file" >>"$record"
        origin="(nobody published one to compare with: recorded in $record for the next time)"
    fi
    echo "$target: $(size "$target") bytes, SHA-256 $actual $origin"
}

# ---- the program

case ${1:-} in
'' | -h | --help)
    list
    echo "data/fetch.sh NAME downloads one of them into $folder/."
    exit
    ;;
esac
[ $# = 1 ] || fail "usage: data/fetch.sh NAME, where NAME is one of:$(names)"
files=$(lines_of "$1" file)
[ -n "$files" ] || fail "no data set named \"$1\"; there are:$(names)"
have_one_of sha256sum shasum openssl || fail "nothing to check a file with: install sha256sum, shasum or openssl"

record=$folder/$1.sha256
while read -r file bytes sha256 address; do
    get
done <<LINES
$files
LINES

echo "licence: $(lines_of "$1" set | cut -d ' ' -f 2-)"
echo "next:"
lines_of "$1" next | sed 's/^/    /'
