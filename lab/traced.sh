#!/bin/sh
# Use a traced disk as `make pictures` shows it, and print the trace. Needs root and a ublk driver.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)

disk=$(python3 ublk.py ram --size 64M --background --trace="$work/trace")
mkfs.ext4 -q "$disk"
mkdir "$work/mnt"
mount "$disk" "$work/mnt"
cp ublk.py "$work/mnt"
sync
for number in 1 2 3 4 5 6; do
    dd if="$disk" of=/dev/null bs=4k skip=$((number * 64)) count=64 iflag=direct status=none &
done
wait
umount "$work/mnt"
python3 ublk.py del "${disk#/dev/ublkb}"
cat "$work/trace"
rm -r "$work"
