#!/bin/sh
# Makes a text to train on of the documents in a Debian package: English prose and code that anyone can download again.
#
#     data/fetch.sh linux-doc                                    # downloads the package and says the next line
#     data/text_of_deb.sh data/downloads/linux-doc.deb data/downloads/linux-doc
#
# Takes every file of the package whose name ends in .rst or .rst.gz, but for translations, in the order of their paths
# (as bytes), and writes FOLDER/train.txt and FOLDER/val.txt: every tenth document is held out, whole.
# Needs dpkg-deb (every Debian and Ubuntu has it).
set -eu

if [ $# != 2 ]; then echo "usage: data/text_of_deb.sh PACKAGE.deb FOLDER" >&2; exit 1; fi
package=$1 folder=$2
[ -f "$package" ] || { echo "text_of_deb.sh: $package is not there: data/fetch.sh downloads it" >&2; exit 1; }
command -v dpkg-deb >/dev/null || { echo "text_of_deb.sh: needs dpkg-deb: apt-get install dpkg" >&2; exit 1; }

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
dpkg-deb --extract "$package" "$unpacked/files" || {
    echo "text_of_deb.sh: $package is no Debian package, or was cut: download it again" >&2; exit 1; }
(cd "$unpacked/files" && find . -type f \( -name '*.rst' -o -name '*.rst.gz' \) ! -path '*/translations/*') |
    LC_ALL=C sort >"$unpacked/list"
documents=$(wc -l <"$unpacked/list")
if [ "$documents" -lt 10 ]; then
    echo "text_of_deb.sh: $package has $documents documents (.rst, .rst.gz), too few to hold some out" >&2
    exit 1
fi
for part in train val; do
    awk -v part=$part '(NR % 10 == 0) == (part == "val")' "$unpacked/list" | while IFS= read -r document; do
        case $document in
            *.gz) gzip -dc "$unpacked/files/$document" ;;
            *) cat "$unpacked/files/$document" ;;
        esac
    done >"$unpacked/$part.txt"
done
mkdir -p "$folder"
mv "$unpacked/train.txt" "$unpacked/val.txt" "$folder/"
echo "$folder: $documents documents, train.txt $(wc -c <"$folder/train.txt") bytes, val.txt $(wc -c <"$folder/val.txt")"
