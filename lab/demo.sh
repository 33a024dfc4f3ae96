#!/bin/sh
# The main job, step by step: Python serves a disk, and the kernel uses it like any other. Needs root and a ublk driver
# (`make run` starts a virtual machine where this machine has none).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
[ -d /scratch ] && base=/scratch || base=${TMPDIR:-/tmp}
work=$(mktemp -d "$base/ublk-demo.XXXXXX")
disk=
cd "$here"

explain() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { echo "\$ $*"; "$@"; }
identity() { echo "${disk#/dev/ublkb}"; }

tidy() {
    status=$?
    ! mountpoint -q "$work/mnt" || umount "$work/mnt"
    [ -z "$disk" ] || python3 ublk.py del "$(identity)" || true
    rm -rf "$work"
    [ $status = 0 ] || printf '\nFAILED\n'
    exit $status
}
trap tidy EXIT
trap 'exit 130' INT TERM

serve() {
    echo "\$ python3 ublk.py $* --background"
    disk=$(python3 ublk.py "$@" --background)
    echo "$disk"
    [ -b "$disk" ]
}
stop() {
    show python3 ublk.py del "$(identity)"
    [ ! -e "$disk" ] || { echo "$disk is still there"; exit 1; }
    disk=
}

printf 'Linux %s, %s\n' "$(uname -r)" "$(python3 --version)"

explain '1. A disk that holds nothing: every read gives zeroes, every write is forgotten.'
serve null --size 1G
show dd if="$disk" of=/dev/null bs=1M count=256 iflag=direct
show dd if=/dev/zero of="$disk" bs=1M count=256 oflag=direct
show python3 ublk.py list
stop

explain '2. A file becomes a disk, with a file system on it.'
show truncate -s 256M "$work/disk.img"
serve loop "$work/disk.img"
show mkfs.ext4 -q "$disk"
mkdir "$work/mnt"
show mount "$disk" "$work/mnt"

explain '3. Files go in: this project, and 16 MiB of noise.'
show cp -r ublk.py lab "$work/mnt"
show dd if=/dev/urandom of="$work/mnt/noise" bs=1M count=16
(cd "$work/mnt" && find . -type f -exec sha256sum {} +) >"$work/sums"
show df -h "$work/mnt"
show python3 ublk.py list
show umount "$work/mnt"
stop

explain '4. Is the file system in the image sound?'
show e2fsck -fn "$work/disk.img"

explain '5. Another server for the same image: are the files what they were?'
serve loop "$work/disk.img"
show mount -o ro "$disk" "$work/mnt"
(cd "$work/mnt" && show sha256sum -c "$work/sums")
show umount "$work/mnt"
stop

explain "All $(wc -l <"$work/sums") files came back unchanged."
