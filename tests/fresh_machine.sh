#!/bin/sh
# For developers: proves that the README's commands work on a machine that has nothing but git and make.
#
#     sudo tests/fresh_machine.sh demo        # or: test
#
# Makes a minimal Debian with debootstrap, clones the committed state of this repository into it, runs `make demo` or
# `make test` there and prints how long that took, installing packages included. Needs root, debootstrap and the
# network; mirror and proxy are those of this machine's own apt.
#
#     SUITE     Debian release (bookworm)
#     BASE      where the minimal system is kept between runs (/tmp/fresh_base)
#     COMMAND   what to run instead of "make <argument>"
set -eu
goal=${1:-demo}
SUITE=${SUITE:-bookworm}
BASE=${BASE:-/tmp/fresh_base}
COMMAND=${COMMAND:-make $goal}
repository=$(cd "$(dirname "$0")/.." && pwd)

if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
    echo "fresh_machine.sh: run as root, with the package debootstrap installed" >&2
    exit 1
fi

# The first mirror named in either of apt's two formats.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) { print $i; exit } }
         $1 == "URIs:" { print $2; exit }')

if [ ! -f "$BASE/complete" ]; then
    echo "making a minimal $SUITE in $BASE"
    rm -rf --one-file-system "$BASE"
    debootstrap --variant=minbase --include=git,make "$SUITE" "$BASE" "$mirror" >"$BASE.log" 2>&1 || {
        tail -n 5 "$BASE.log" >&2
        exit 1
    }
    # As a fresh machine: no package lists, no cached packages.
    rm -rf "$BASE"/var/lib/apt/lists/* "$BASE"/var/cache/apt/archives/*.deb "$BASE.log"
    touch "$BASE/complete"
fi

root=$(mktemp -d /tmp/fresh_machine.XXXXXX)
# shellcheck disable=SC2317  # called by the trap
cleanup() {
    for place in dev/pts proc; do
        if mountpoint -q "$root/$place"; then
            umount "$root/$place" || return
        fi
    done
    rm -rf --one-file-system "$root"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

cp -a "$BASE/." "$root/"
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/pts" # a real machine has terminals, and a test of the progress bar wants one
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -sf pts/ptmx "$root/dev/ptmx"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
apt-config dump | grep -E '^Acquire::(https?|Check)[^ ]* ' >"$root/etc/apt/apt.conf.d/80network" || true
git clone --quiet --no-local "$repository" "$root/root/moelab"

in_chroot() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8 \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
        chroot "$root" sh -c "$1"
}

if in_chroot 'command -v cc || command -v gcc'; then
    echo "fresh_machine.sh: $BASE has a compiler already, it proves nothing; remove it" >&2
    exit 1
fi

status=0
begin=$(date +%s)
in_chroot "cd /root/moelab && $COMMAND" || status=$?
echo "fresh $SUITE: $COMMAND: exit status $status, $(($(date +%s) - begin)) s, packages and build included"
exit "$status"
