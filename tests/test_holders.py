# SPDX-License-Identifier: MIT
"""Who holds a disk: named before anything is stopped, and `del` leaves their disk alone."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    Forked,
    Ram,
    assert_error_line,
    kernel,
    message,
    mount_of,
    needs,
    opened,
    read_at,
    sh,
    since,
    until,
    with_partition,
)


@contextmanager
def by_ourselves(disk, tmp_path):
    with open(disk, "rb"):
        yield f"(pid {os.getpid()})"


@contextmanager
def by_a_program(disk, tmp_path):
    with open(disk, "rb") as file:
        holder = subprocess.Popen(["sleep", "3600"], stdin=file)
    yield f"sleep (pid {holder.pid})"
    holder.kill()
    holder.wait()


@contextmanager
def by_a_mount(disk, tmp_path):
    sh("mkfs.ext4", "-q", "-F", disk)
    with mount_of(disk, tmp_path / "mnt"):
        yield f"the mount at {tmp_path / 'mnt'}"


@contextmanager
def by_a_mount_in_another_namespace(disk, tmp_path):
    sh("mkfs.ext4", "-q", "-F", disk)
    (tmp_path / "there").mkdir()
    script = f"mount {disk} {tmp_path / 'there'} && echo mounted && exec sleep 3600"
    holder = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "mounted\n"
    yield f"the mount at {tmp_path / 'there'} of pid {holder.pid}"
    holder.kill()
    holder.communicate()


@contextmanager
def under_another_name(disk, directory, by, tmp_path):
    node, number = f"{directory}/another-name", os.stat(disk).st_rdev
    os.mknod(node, 0o600 | stat.S_IFBLK, number)
    with by(node, tmp_path) as who:
        yield who
    os.unlink(node)


def by_a_program_under_another_name(disk, tmp_path):
    return under_another_name(disk, "/dev", by_a_program, tmp_path)


@contextmanager
def by_a_program_that_is_not_found(disk, tmp_path):
    with under_another_name(disk, tmp_path, by_a_program, tmp_path):
        yield "by somebody"


def by_a_mount_under_another_name(disk, tmp_path):
    return under_another_name(disk, tmp_path, by_a_mount, tmp_path)


@contextmanager
def by_a_file_system_on_another_disk(disk, tmp_path):
    with ublk.Device(Ram(64 << 20)) as other:
        sh("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "journal_dev", disk)
        sh("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", f"device={disk}", other.path)
        with mount_of(other.path, tmp_path / "mnt"):
            yield "by somebody"


@contextmanager
def by_swap(disk, tmp_path):
    sh("mkswap", disk)
    sh("swapon", disk)
    yield f"swap on {disk}"
    sh("swapoff", disk)


@contextmanager
def by_a_loop(disk, tmp_path):
    loop = sh("losetup", "--find", "--show", disk).stdout.strip()
    yield os.path.basename(loop)
    sh("losetup", "--detach", loop)
    until(lambda: not os.path.exists(f"/sys/block/{os.path.basename(loop)}/loop"), "the loop to go")


@contextmanager
def by_md(disk, tmp_path):
    needs("mdadm")
    name = "/dev/md77"
    sh("mdadm", "--create", name, "--run", "--level=1", "--raid-devices=2", "--metadata=1.2", disk, "missing")
    yield "md77"
    sh("mdadm", "--stop", name)


HOLDERS = [by_ourselves, by_a_program, by_a_program_under_another_name, by_a_mount,
           by_a_mount_under_another_name, by_a_mount_in_another_namespace,
           by_a_file_system_on_another_disk, by_swap, by_a_loop, by_md,
           pytest.param(by_a_program_that_is_not_found, marks=since("7.0"))]


@kernel
@pytest.mark.parametrize("held", HOLDERS, ids=lambda held: held.__name__)
def test_del_refuses_a_disk_in_use_and_names_its_users(run, tmp_path, held, monkeypatch):
    monkeypatch.setattr(ublk, "PASSING", 0.5)
    with ublk.Device(Ram(16 << 20)) as disk:
        with held(disk.path, tmp_path) as who:
            done = run("del", disk.id)
            assert done.status == 1
            assert_error_line(done.err, errno.EBUSY, says=who)
            with opened(disk.path, os.O_RDONLY) as fd:
                assert len(read_at(fd, 0, 4096)) == 4096        # nothing was stopped
        assert disk.state == ublk.LIVE


def test_a_disk_that_is_claimed_stays_though_partx_looks_at_it(monkeypatch):
    """Before 7.0: what was no use of its own was taken for the only one."""
    def tries(dev_id, timeout):
        raise ublk.UblkError(errno.EOPNOTSUPP, "TRY_STOP_DEV")
    control = SimpleNamespace(try_stop_dev=tries)
    monkeypatch.setattr(ublk, "PASSING", 0.1)
    monkeypatch.setattr(ublk, "is_same", lambda *_: True)
    monkeypatch.setattr(ublk, "holders", lambda dev_id: ["partx (pid 1)"])
    claimed = [True]
    monkeypatch.setattr(ublk, "is_claimed", lambda path: claimed[0])
    assert "in use: by somebody (16 EBUSY)" in message(ublk.stop_if_unused, control, 7, 1)
    claimed[:] = [False]
    ublk.stop_if_unused(control, 7, 1)


@kernel
def test_the_user_of_a_partition_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ublk, "PASSING", 0.5)
    target = with_partition(16 << 20)
    with ublk.Device(target) as disk:
        partition = f"{disk.path}p1"
        until(lambda: os.path.exists(partition), "the partition")
        with by_a_mount(partition, tmp_path) as who:
            done = run("del", disk.id)
            assert_error_line(done.err, errno.EBUSY, says=who)
        assert disk.state == ublk.LIVE


@kernel
def test_del_with_force_takes_a_disk_in_use(run, monkeypatch):
    monkeypatch.setattr(ublk.delete, "__defaults__", (1.0,))       # seconds until it gives up
    with Forked("null") as disk:
        with open(disk.path, "rb"):
            done = run("del", disk.id, "--force")
            assert done.status == 1             # it is stopped, and goes once it is closed
            assert_error_line(done.err, errno.EBUSY, says=f"(pid {os.getpid()})")
        until(lambda: run("del", "--all").status == 0 and ublk.device_ids() == [], "the device to go")


@kernel
def test_del_all_takes_the_disks_that_nobody_uses(run, monkeypatch):
    monkeypatch.setattr(ublk, "PASSING", 0.5)
    with ublk.Device(Ram()) as used, Forked("null") as idle:
        with open(used.path, "rb"):
            done = run("del", "--all")
        assert done.status == 1 and f"device {used.id} is in use" in done.err
        assert ublk.device_ids() == [used.id]
        assert idle.wait() == 0


def test_a_process_that_has_ended_meanwhile_hides_no_mount(monkeypatch):
    lines = {"/proc/9/mountinfo": ["1 1 0:9 / /mnt rw - ext4 /dev/ublkb0 rw"]}
    monkeypatch.setattr(ublk.glob, "glob", lambda pattern: ["/proc/8", "/proc/9"])
    monkeypatch.setattr(ublk, "link_of", lambda path: "mnt:[1]")
    monkeypatch.setattr(ublk, "lines_of", lambda path: lines.get(path, []))
    assert list(ublk.mounts("ublkb0")) == ["the mount at /mnt of pid 9"]


@pytest.mark.parametrize("name", ["ublkb0", "ublkb0p*"])
def test_a_file_system_of_several_disks_holds_each(monkeypatch, name):
    found = {f"/sys/fs/btrfs/*/devices/{name}": ["/sys/fs/btrfs/0-1/devices/it"]}
    monkeypatch.setattr(ublk.glob, "glob", lambda pattern: found.get(pattern, []))
    assert list(ublk.disks_above("ublkb0")) == ["btrfs 0-1"]


def test_a_volume_of_lvm_is_named_by_the_name_that_its_user_knows(monkeypatch):
    holder = "/sys/class/block/ublkb0p1/holders/dm-3"
    found, lines = {"/sys/class/block/ublkb0p*/holders/*": [holder]}, {f"{holder}/dm/name": ["group-volume"]}
    monkeypatch.setattr(ublk.glob, "glob", lambda pattern: found.get(pattern, []))
    monkeypatch.setattr(ublk, "lines_of", lambda path: lines.get(path, []))
    assert list(ublk.disks_above("ublkb0")) == ["dm-3 (group-volume)"]


def test_a_name_does_not_end_a_line_of_the_kernels(tmp_path):
    lines = ["/mnt/a\rb\x0c", "", "/mnt/\x85\u2028c"]
    (tmp_path / "mounts").write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert ublk.lines_of(str(tmp_path / "mounts")) == lines


def test_no_memory_to_look_with_is_nothing_seen(monkeypatch):
    """A server looks at its disk every second: one of which the target had all memory took the disk away."""
    def fail(path):
        raise MemoryError
    monkeypatch.setattr(ublk, "lines_of", fail)
    assert ublk.disk_size(0) == 0
