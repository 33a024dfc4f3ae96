#!/bin/busybox sh
# First process of the lab's virtual machine (see lab.py). The kernel hands over ublk_lab=DIR, the directory on the host,
# seen read-only through virtiofs, that holds what to run. Under emulation every program costs a tenth of a second to
# load: busybox brings its own mount, mkdir and so on.
set -e
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
. "$ublk_lab/settings"

# The /proc seen so far is the host's, and busybox would take its own path from there.
/bin/mount -t proc proc /proc
release=$(uname -r)
/sbin/modprobe -d "$CACHE/kernels/$KERNEL" overlay

# The host's root file system stays read-only: every write ends in a tmpfs above it. /sys is the one directory that
# surely exists and holds nothing of the host's.
mount -t tmpfs -o size=75% tmpfs /sys
mkdir /sys/upper /sys/work /sys/root
mount -t overlay -o lowerdir=/,upperdir=/sys/upper,workdir=/sys/work overlay /sys/root
mount -t proc proc /sys/root/proc
# A chroot would not do: user namespaces cannot be created inside one.
cd /sys/root
pivot_root . sys
# The cache and the work tree may lie below a directory that is about to be covered.
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/lab "$CACHE" "$TREE" "/lib/modules/$release" /scratch
mount --bind /sys"$ublk_lab" /run/lab
mount --bind /sys"$CACHE" "$CACHE"
mount --bind "$CACHE/kernels/$KERNEL/lib/modules/$release" "/lib/modules/$release"
# The work tree is a copy made when the machine was started, so that edits on the host cannot tear a run in two.
mount -t tmpfs tmpfs "$TREE"
cp -a /run/lab/tree/. "$TREE"
umount -l /sys
mount -t sysfs sysfs /sys
/sbin/modprobe -a ublk_drv virtio_blk virtio_console ext4 loop &
loading=$!
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
ifconfig lo 127.0.0.1 up
echo ublk-lab >/proc/sys/kernel/hostname
echo 60 >/proc/sys/kernel/watchdog_thresh
echo 65536 >/proc/sys/user/max_user_namespaces
[ ! -e /proc/sys/kernel/unprivileged_userns_clone ] || echo 1 >/proc/sys/kernel/unprivileged_userns_clone
ulimit -n 65536
ulimit -l unlimited
/lib/systemd/systemd-udevd --daemon
wait $loading
mount -t ext4 -o noinit_itable,discard /dev/vda /scratch
# Boot messages are of no interest; what the kernel says from here on is.
echo 8 >/proc/sys/kernel/printk

exec </dev/null
set +e
# A pipe in between, because a virtio port can neither be opened twice nor, as /dev/stderr, a second time. With the pipe
# held open at both ends no opening has to wait, and so none can be interrupted by the end of some other process.
mkfifo /run/lab-output
exec 3<>/run/lab-output
cat </run/lab-output 3<&- >$(echo /dev/vport*p1) &
drain=$!
exec 4>$(echo /dev/vport*p2)
echo begun >&4
[ -z "$WATCHDOG" ] || (sleep "$WATCHDOG"; echo l >/proc/sysrq-trigger; echo w >/proc/sysrq-trigger) >/dev/null 3<&- 4>&- 2>&1 &
setsid /bin/sh /run/lab/command >/run/lab-output 2>&1 3<&- 4>&-
status=$?
exec 3<&-
# A background process that outlives the command may hold the pipe open for ever.
(sleep 5; kill $drain) 2>/dev/null &
wait $drain
[ ! -e /run/lab-report ] || cat /run/lab-report >$(echo /dev/vport*p3)
echo $status >&4
echo b >/proc/sysrq-trigger
sleep 60
