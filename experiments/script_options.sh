# shellcheck shell=bash
# What the scripts of this folder share: how they read their options and how they end. Sourced.
#
#   models=d12 limit='' timing=0                            what holds without an option
#   read_options 'm=models s=limit T' 2 "$@"                -m X: $models is X; -T, which takes no value: $T is 1
#   program=${arguments[0]} out=${arguments[1]}             what stands behind the options, as many as were asked for
#
# Any other option, or another number of arguments, prints the usage: the lines of the script's head from the one that
# begins with "experiments/" to the next empty one.

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

usage() {
    sed -n '/^#   experiments\//,/^#$/{ s/^#   e/usage: e/; s/^#//; /^$/q; p }' "$0" >&2
    exit 1
}

# read_options 'LETTER=NAME LETTER ..' NUMBER WORD..
read_options() {
    local number=$2 letters='' pair option OPTARG OPTIND=1
    local -A names
    for pair in $1; do
        names[${pair%%=*}]=${pair#*=}
        letters+=${pair%%=*}
        if [[ $pair == *=* ]]; then letters+=:; fi
    done
    shift 2
    while getopts "$letters" option; do
        if [ "$option" = '?' ]; then usage; fi
        printf -v "${names[$option]}" %s "${OPTARG-1}"
    done
    # shellcheck disable=SC2034  # for who sources this
    arguments=("${@:OPTIND}")
    if [ $# != $((OPTIND - 1 + number)) ]; then usage; fi
}
