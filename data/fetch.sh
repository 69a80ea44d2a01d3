#!/bin/sh
# Downloads a data set into data/downloads/ (which git ignores) and checks its size and SHA-256. Nothing needs it: the
# builtin corpus is made in memory.
#
#     sh data/fetch.sh tinyshakespeare
#
# The table below has one line for each data set: name, file, bytes, SHA-256, address. Add a line to add a data set.
set -eu

table='
tinyshakespeare tinyshakespeare.txt 1115394 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
'

folder=$(dirname "$0")/downloads
folder=${folder#./}

fail() {
    echo "fetch.sh: $1" >&2
    exit 1
}

names() {
    echo "$table" | while read -r name rest; do
        [ -z "$name" ] || printf ' %s' "$name"
    done
}

checksum() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        openssl dgst -sha256 -r <"$1" | cut -d ' ' -f 1
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

# Whether the file is the one the table means.
intact() {
    [ -f "$1" ] && [ "$(wc -c <"$1" | tr -d ' ')" = "$bytes" ] && [ "$(checksum "$1")" = "$sha256" ]
}

download() {
    if command -v curl >/dev/null 2>&1; then
        curl --fail --location --silent --show-error --max-time 600 --output "$2" "$1"
    else
        wget --quiet --output-document="$2" "$1"
    fi
}

[ $# -eq 1 ] || fail "usage: sh data/fetch.sh NAME, where NAME is one of:$(names)"

found=$(echo "$table" | while read -r name rest; do
    [ "$name" != "$1" ] || echo "$rest"
done)
if [ -z "$1" ] || [ -z "$found" ]; then
    fail "no data set named \"$1\"; there are:$(names)"
fi

read -r file bytes sha256 address <<LINE
$found
LINE
target=$folder/$file

have_one_of sha256sum shasum openssl || fail "nothing to check a file with: install sha256sum, shasum or openssl"
if ! intact "$target"; then
    have_one_of curl wget || fail "neither curl nor wget is here: install one, or save $address as $target"
    mkdir -p "$folder"
    part=$target.part.$$
    trap 'rm -f "$part"' EXIT
    trap 'exit 1' HUP INT TERM
    download "$address" "$part" ||
        fail "could not download $address: check the network, or save it elsewhere and copy it to $target"
    intact "$part" || fail "$address is not the expected file ($bytes bytes, SHA-256 $sha256): nothing was kept"
    mv "$part" "$target"
fi
echo "$target is complete ($bytes bytes). Next: ./train --data $target"
