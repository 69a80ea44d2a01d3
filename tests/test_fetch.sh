#!/usr/bin/env bash
# Tests of data/fetch.sh without a network: a copy of it, its table replaced by one with file:// addresses, or with those
# of a server on this machine. What the built-in table says is checked for its form, not downloaded. And
# of data/text_of_deb.sh.
#
#     tests/test_fetch.sh [NAME...]    from the repository's root; NAME: only the tests whose names contain it
#
# Called by run_tests.sh. Read next: cli_checks.sh, data/fetch.sh.
# shellcheck disable=SC1003,SC2013,SC2015  # a backslash is meant; words are; in A && B || C, B ends alike
# shellcheck source=tests/cli_checks.sh
. "$(dirname "$0")/cli_checks.sh"

FETCH=$(realpath data/fetch.sh)
TOKENIZE=$(realpath data/tokenize)
TEXT_OF_DEB=$(realpath data/text_of_deb.sh)

# ---- a place to download into, and something to download

# Every test starts with this: the script in data/, two files to fetch in source/.
prepare() {
    mkdir data source
    cp "$FETCH" data/fetch.sh
    bytes 3000 141 >source/a.txt
    { bytes 2000 142; bytes 1000 143; } >source/b.bin
    a=$(sum source/a.txt)
    b=$(sum source/b.bin)
}

sum() {
    sha256sum <"$1" | cut -d ' ' -f 1
}

address() {
    echo "file://$PWD/source/$1"
}

# fetch WORD...: with the table of this test.
fetch() {
    FETCH_TABLE=$PWD/table sh data/fetch.sh "$@" >out 2>err
    status=$?
}

# tools DIR NAME...: a DIR for PATH that holds what the script always needs, and the programs named.
tools() {
    mkdir "$1"
    for tool in sh awk cat cut dirname mkdir mv rm sed tr wc sha256sum "${@:2}"; do
        ln -s "$(command -v "$tool")" "$1/$tool"
    done
}

# ---- checks

# says PATTERN FILE
says() {
    grep -qE -- "$1" "$2" || { fail "$2 does not say '$1':"; head -n 3 "$2"; }
}

# refused_with PATTERN: status 1 and one line of the script's that matches; downloaders may have said something before.
refused_with() {
    ends 1
    [ "$(grep -c '^fetch.sh: ' err)" = 1 ] && tail -n 1 err | grep -q '^fetch.sh: ' ||
        { fail "no single last line of fetch.sh:"; head -n 4 err; }
    says "$1" err
}

downloads() {
    find data/downloads -type f -printf '%P\n' 2>/dev/null | sort | tr '\n' ' ' | sed 's/ $//'
}

# fetched FILE...: these are in data/downloads/, like their sources, and no others.
fetched() {
    for file; do
        check "$file is not the source" cmp "data/downloads/$file" "source/$file"
    done
    [ "$(downloads)" = "$*" ] || fail "data/downloads holds $(downloads)"
}

# kept_nothing: neither the file nor a part of it.
kept_nothing() {
    [ -z "$(downloads)" ] || fail "left $(downloads)"
}

# ---- names

test_lists_the_data_sets() {
    prepare
    printf '%s\n' 'set one A licence, with blanks' "file a.zip 1500000 $a https://nowhere.invalid/a" \
        "file b 4000000 $b zip://a.zip/b" "file c 700000 $b https://nowhere.invalid/c" \
        'set two Another' "file d - - https://nowhere.invalid/d" >table
    fetch
    succeeds
    says '^one +2.2 MB  A licence, with blanks$' out
    says '^two +unknown size  Another$' out
    fetch --help
    succeeds
    says '^one ' out
    kept_nothing
}

test_refuses_other_words() {
    prepare
    printf '%s\n' 'set one L' "file a.txt 3000 $a $(address a.txt)" 'set two L' "file b.bin 3000 $b -" >table
    fetch three
    refused_with 'no data set named "three"; there are: one two$'
    fetch on
    refused_with 'no data set named'
    fetch one two
    refused_with 'usage: .* one of: one two$'
    kept_nothing
}

# ---- downloads

test_downloads_all_files_of_one_set() {
    prepare
    mkdir source/folder
    mv source/b.bin source/folder/
    printf '%s\n' 'set other L' 'file x 1 - file:///nowhere' '' '# a remark' 'set one Free, for all' \
        "file a.txt 3000 $a $(address a.txt)" "file folder/b.bin 3000 $b $(address folder/b.bin)" \
        'next ./train --data a.txt \' 'next     --seq 8' 'set last L' 'file y 1 - file:///nowhere' >table
    fetch one
    succeeds
    fetched a.txt folder/b.bin
    says "^data/downloads/a.txt: 3000 bytes, SHA-256 $a as published$" out
    printf '%s\n' 'licence: Free, for all' 'next:' '    ./train --data a.txt \' '        --seq 8' >expected
    tail -n 4 out >got
    check "what comes after the files" diff got expected

    # What is there and right is left alone: the source is not needed any more.
    touch -d '2020-02-02' data/downloads/a.txt
    rm -r source/folder
    cp data/downloads/folder/b.bin kept
    fetch one
    succeeds
    [ "$(date -r data/downloads/a.txt +%Y)" = 2020 ] || fail "a.txt was written again"
    check "b.bin has changed" cmp data/downloads/folder/b.bin kept
}

test_refuses_what_is_not_the_published_file() {
    prepare
    echo 'set one L' >table
    echo "file a.txt 3000 $b $(address a.txt)" >>table
    fetch one
    refused_with "a.txt is not the expected file \(bytes: 3000, SHA-256: $b\): nothing was kept$"
    kept_nothing
    sed -i "s/3000 $b/2999 $a/" table
    fetch one
    refused_with 'is not the expected file \(bytes: 2999'
    kept_nothing
    sed -i "s/2999 $a/3001 $a/" table
    fetch one
    refused_with 'is not the expected file \(bytes: 3001'
    kept_nothing
}

test_replaces_a_damaged_file() {
    prepare
    printf '%s\n' 'set one L' "file a.txt 3000 $a $(address a.txt)" >table
    mkdir data/downloads
    bytes 3000 102 >data/downloads/a.txt
    fetch one
    succeeds
    fetched a.txt
}

test_goes_on_with_a_part() {
    prepare
    printf '%s\n' 'set one L' "file b.bin 3000 $b $(address b.bin)" >table
    mkdir data/downloads
    head -c 1800 source/b.bin >data/downloads/b.bin.part
    fetch one
    succeeds
    fetched b.bin
    # It went on indeed: with other bytes in front the same length comes, and is refused; the next one starts afresh.
    rm data/downloads/b.bin
    bytes 1800 101 >data/downloads/b.bin.part
    fetch one
    refused_with 'is not the expected file'
    kept_nothing
    fetch one
    succeeds
    fetched b.bin
}

test_takes_a_whole_part_and_drops_a_longer_one() {
    prepare
    printf '%s\n' 'set one L' "file b.bin 3000 $b file:///nowhere" >table
    mkdir data/downloads
    cp source/b.bin data/downloads/b.bin.part
    fetch one
    succeeds
    fetched b.bin
    rm data/downloads/b.bin
    sed -i "s,file:///nowhere,$(address b.bin)," table
    bytes 3001 101 >data/downloads/b.bin.part
    fetch one
    succeeds
    fetched b.bin
}

test_keeps_the_part_when_the_source_fails() {
    prepare
    printf '%s\n' 'set one L' "file b.bin 3000 $b $(address gone)" >table
    fetch one
    refused_with 'could not download file://.*gone: check the network.* copy it to data/downloads/b.bin$'
    head -c 1800 source/b.bin >data/downloads/b.bin.part
    fetch one
    refused_with 'goes on where it stopped'
    [ "$(wc -c <data/downloads/b.bin.part)" = 1800 ] || fail "the part is gone"
    [ ! -e data/downloads/b.bin ] || fail "a part got the name of the file"
}

# A server that can only send whole files (Python's cannot do otherwise). curl is told to start again; wget by itself
# leaves out what it has.
test_starts_again_where_a_server_cannot_go_on() {
    prepare
    (cd source && exec python3 -u -m http.server 0 --bind 127.0.0.1 >../server 2>&1) &
    server=$!
    trap 'kill $server' EXIT
    for _ in {1..500}; do
        grep -q 'port [0-9]' server 2>/dev/null && break
        sleep 0.02
    done
    port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' server)
    for program in curl wget; do
        if ! command -v $program >/dev/null; then
            skip "no $program"
            continue
        fi
        tools with_$program $program
        mkdir -p data/downloads
        printf '%s\n' 'set one L' "file b.bin 3000 $b http://127.0.0.1:$port/b.bin" >table
        for part in none source/b.bin wrong; do
            rm -f data/downloads/*
            case $part in
            source/b.bin) head -c 1800 $part >data/downloads/b.bin.part ;;
            wrong) [ $program = wget ] || bytes 1800 101 >data/downloads/b.bin.part ;;
            esac
            PATH=$PWD/with_$program fetch one
            ends 0
            fetched b.bin
        done
        rm -f data/downloads/*
        sed -i 's,/b.bin$,/gone,' table
        PATH=$PWD/with_$program fetch one
        refused_with 'could not download http://.*/gone'
        [ ! -e data/downloads/b.bin ] || fail "an error page got the name of the file"
    done
}

test_says_what_is_not_installed() {
    prepare
    printf '%s\n' 'set one L' "file a.txt 3000 $a $(address a.txt)" >table
    tools bare
    PATH=$PWD/bare fetch one
    refused_with 'neither curl nor wget is here: install one, or save file://.*a.txt as data/downloads/a.txt$'
    rm bare/sha256sum
    PATH=$PWD/bare fetch one
    refused_with 'nothing to check a file with: install sha256sum'
    kept_nothing
}

# ---- what nobody published

test_records_what_nobody_published() {
    prepare
    printf '%s\n' 'set one L' "file a.txt 3000 - $(address a.txt)" "file b.bin - - $(address b.bin)" >table
    fetch one
    succeeds
    says "^data/downloads/a.txt: 3000 bytes, SHA-256 $a \(nobody published one.* data/downloads/one.sha256" out
    says "^data/downloads/b.bin: 3000 bytes, SHA-256 $b \(nobody" out
    check "the record" sh -c "cd data/downloads && sha256sum --check --strict one.sha256"
    # The same again is as recorded, and recorded once.
    rm data/downloads/b.bin
    fetch one
    succeeds
    says "^data/downloads/b.bin: 3000 bytes, SHA-256 $b as recorded in data/downloads/one.sha256$" out
    [ "$(wc -l <data/downloads/one.sha256)" = 2 ] || fail "the record has other lines than two"
    # Another one is refused, until its line is removed.
    rm data/downloads/b.bin
    bytes 3000 144 >source/b.bin
    fetch one
    refused_with 'is not the expected file \(bytes: unknown, SHA-256: .*remove its line from data/downloads/one.sha256$'
    [ ! -e data/downloads/b.bin ] && [ ! -e data/downloads/b.bin.part ] || fail "the changed file was kept"
    sed -i /b.bin/d data/downloads/one.sha256
    fetch one
    succeeds
    check "b.bin is not the source" cmp data/downloads/b.bin source/b.bin
}

test_checks_a_size_where_that_is_published() {
    prepare
    printf '%s\n' 'set one L' "file a.txt 3001 - $(address a.txt)" >table
    fetch one
    refused_with 'is not the expected file \(bytes: 3001, SHA-256: unknown\)'
    kept_nothing
}

# ---- archives

# An archive with two members, and the table that takes one of them.
make_archive() {
    python3 -c 'import zipfile
with zipfile.ZipFile("source/c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.write("source/a.txt", "in/side/a.txt")
    archive.write("source/b.bin", "../b.bin")'
    printf '%s\n' 'set one L' "file c.zip - $(sum source/c.zip) $(address c.zip)" \
        "file a.txt 3000 $a zip://c.zip/in/side/a.txt" >table
}

test_unpacks_with_what_is_there() {
    prepare
    make_archive
    for program in unzip python3 bsdtar; do
        if ! command -v $program >/dev/null; then
            skip "no $program"
            continue
        fi
        tools with_$program curl
        # python3 may be a script that needs more than PATH holds: not a link, but a call of the one that is there.
        printf '#!/bin/sh\nPATH=%q exec %q "$@"\n' "$PATH" "$(command -v $program)" >with_$program/$program
        chmod +x with_$program/$program
        rm -rf data/downloads
        PATH=$PWD/with_$program fetch one
        succeeds
        fetched a.txt c.zip
    done
    rm -rf data/downloads
    tools with_none curl
    PATH=$PWD/with_none fetch one
    refused_with 'nothing to unpack data/downloads/c.zip with: install unzip, python3 or bsdtar$'
    fetched c.zip
}

test_refuses_what_an_archive_does_not_hold() {
    prepare
    make_archive
    sed -i 's,side/a.txt,side/z.txt,' table
    fetch one
    refused_with 'could not take in/side/z.txt out of data/downloads/c.zip'
    fetched c.zip
    sed -i "s,side/z.txt,side/a.txt,; s,$a,$b," table
    fetch one
    refused_with 'zip://c.zip/in/side/a.txt is not the expected file'
    fetched c.zip
}

# ---- the table

builtin_table() {
    sed -n "/<<'TABLE'/,/^TABLE/{ /TABLE/!p }" "$FETCH"
}

test_the_table_is_well_formed() {
    builtin_table >table
    check "data sets" test "$(awk '$1 == "set" { printf "%s ", $2 }' table)" = \
        "tinyshakespeare tinystories wikitext2 enwik8 fineweb-edu linux-doc hellaswag "
    awk '
        function problem(why) { print "line " FNR ": " why; bad = 1 }
        function finish() {
            if (name && !files)   { problem(name " has no file") }
            if (name && !sources) { problem(name " does not say where its figures are from") }
            if (name && !nexts)   { problem(name " does not say what to run next") }
            files = sources = nexts = 0
        }
        $1 == "set" {
            finish()
            name = $2
            if (NF < 3)      { problem(name " has no licence") }
            if (seen[name]++) { problem(name " is there twice") }
            next
        }
        $1 == "file" {
            files++
            if (NF != 5)                                { problem("not FILE BYTES SHA-256 ADDRESS") }
            if ($2 !~ /^[A-Za-z0-9]/ || $2 ~ /\.\./)    { problem("a file outside the folder") }
            if (there[$2]++)                            { problem($2 " is there twice") }
            if ($3 !~ /^[1-9][0-9]*$/ && $3 != "-")     { problem("bytes: " $3) }
            if ($4 != "-" && (length($4) != 64 || $4 ~ /[^0-9a-f]/)) { problem("SHA-256: " $4) }
            archive = $5
            if (sub(/^zip:\/\//, "", archive)) {
                sub(/\/.*/, "", archive)
                if (!there[archive])                    { problem(archive " does not come before") }
            } else if ($5 !~ /^https:\/\//)             { problem("address: " $5) }
            next
        }
        $1 == "#"    { sources++; next }
        $1 == "next" { nexts++; next }
        NF           { problem("neither set, file, next nor #") }
        END          { finish(); exit bad }' table >problems || { fail "the table:"; cat problems; }
}

# Every option and command that the table tells the user to run exists, and every file in it is fetched or made.
test_what_to_run_next_exists() {
    builtin_table >table
    sed -n 's/^next //p' table | sed ':join; /\\$/{ N; s/\\\n//; b join }' >commands
    "$TRAIN" --help >train_help
    for option in $(sed -n 's,^\./train ,,p' commands | grep -o -- '--[a-z-]*' | sort -u); do
        check "./train has no $option" grep -q -- "^ *$option " train_help
    done
    if [ -x "$TOKENIZE" ]; then
        "$TOKENIZE" --help >tokenize_help
        for word in $(sed -n 's,^data/tokenize ,,p' commands | grep -oE -- '^[a-z]+|--[a-z-]*' | sort -u); do
            check "data/tokenize has no $word" grep -qE -- "(^|[^a-z-])$word( |$)" tokenize_help
        done
    else
        skip "data/tokenize is not built"
    fi
    {
        awk '$1 == "file" { print "data/downloads/" $2 }' table
        grep -oE -- '(--out |>)data/downloads/[^ ]*' commands | sed 's/^--out //; s/^>//'
        awk '$1 == "data/text_of_deb.sh" { print $3 "/train.txt"; print $3 "/val.txt" }' commands
    } >made
    for path in $(grep -oE 'data/downloads/[^ ]*' commands | sort -u); do
        grep -qE "^$path(/|$)" made || fail "$path is neither fetched nor made"
    done
}

# ---- the documents of a package

# Twenty documents, of which the tenth and the last are held out; others are no documents.
test_text_of_a_package() {
    if ! command -v dpkg-deb >/dev/null; then
        skip "dpkg-deb is not installed"
        return
    fi
    mkdir -p package/DEBIAN package/doc/translations
    printf 'Package: words\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: words\n' \
        >package/DEBIAN/control
    for i in $(seq -w 20); do
        echo "document $i" >"package/doc/$i.rst"
        if [ $((10#$i % 3)) = 0 ]; then gzip "package/doc/$i.rst"; fi
    done
    echo other >package/doc/05.html
    echo traduction >package/doc/translations/05.rst
    dpkg-deb --build package words.deb >/dev/null
    "$TEXT_OF_DEB" words.deb made >out 2>err || fail "text_of_deb.sh ends $?: $(cat err)"
    check "held out: $(cat made/val.txt)" [ "$(cat made/val.txt)" = "$(printf 'document 10\ndocument 20')" ]
    for i in 10 20; do seq -w 20 | grep -v "$i"; done | sort | uniq -d | sed 's/^/document /' >expected
    check "train.txt differs" cmp -s expected made/train.txt

    head -c 500 words.deb >cut.deb
    for wrong in cut.deb missing.deb; do
        if "$TEXT_OF_DEB" "$wrong" other >out 2>err; then fail "$wrong was taken"; fi
        tail -n 1 err | grep -q "^text_of_deb.sh: $wrong" || fail "$wrong: $(cat err)"
        check "$wrong left something" [ ! -e other ]
    done
}

run_tests "$@"
