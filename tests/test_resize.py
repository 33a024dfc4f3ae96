# SPDX-License-Identifier: MIT
"""A disk that changes its size while it is served: its target follows, or the command says why not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Forked,
    Ram,
    assert_fails,
    kernel,
    mount_of,
    needs,
    opened,
    read_at,
    sh,
    since,
    target_file,
    until,
    write_at,
)


class Growing(Ram):
    """A disk in memory that may change its size."""

    def resized(self, size):
        self.data[self.size:] = bytes(max(size - self.size, 0))
        self.size = size


def size_of(disk):
    """Return the size of a disk as the kernel tells it."""
    return int(Path(f"/sys/block/ublkb{disk.id}/size").read_text()) * 512


@kernel
@since("6.16")
def test_a_mounted_disk_outlives_a_size_its_target_cannot_have(run, backing, tmp_path):
    needs("mkfs.ext4")
    with Forked("loop", backing) as disk:
        sh("mkfs.ext4", "-qF", disk.path)
        with mount_of(disk.path, tmp_path / "mnt") as directory:
            assert_fails(run("resize", disk.id, "1000T"), 1, f"its target cannot have {1000 << 40} bytes")
            assert size_of(disk) == 64 << 20
            (directory / "file").write_text("still there")
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_memory_that_is_not_there_is_refused_and_later_growth_works(run):
    with Forked("ram", "--size", "1M") as disk:
        assert_fails(run("resize", disk.id, "100000T"), 1, "its target cannot have")
        assert run("resize", disk.id, "2M").status == 0
        with opened(disk.path) as fd:
            write_at(fd, (2 << 20) - 4096, b"grown!!!" * 512)
            assert read_at(fd, (2 << 20) - 4096, 4096) == b"grown!!!" * 512
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_any_error_of_a_target_is_the_commands(run, tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def resized(self, size):
                raise RuntimeError("not today")
    """)
    with Forked(path) as disk:
        for size in ("2M", "512K"):
            assert_fails(run("resize", disk.id, size), 1, "its target cannot have")
            assert "not today" in disk.said() and size_of(disk) == 1 << 20
        # Where its server's process is not seen
        there = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, ublk.__file__]
        done = subprocess.run([*there, "resize", str(disk.id), "2M"], capture_output=True, text=True)
        assert done.returncode == 1 and "its target cannot have" in done.stderr
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_when_resize_returns_the_target_has_followed(run, backing):
    with Forked("loop", backing) as disk:
        assert run("resize", disk.id, "65M").status == 0
        assert os.path.getsize(backing) == 65 << 20
        assert run("resize", disk.id, "64M").status == 0
        assert size_of(disk) == 64 << 20
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_a_server_follows_whoever_changes_the_size(backing, control):
    with Forked("loop", backing) as disk:
        control.get_dev_info(disk.id)
        control.update_size(disk.id, 65 << 20)
        until(lambda: os.path.getsize(backing) == 65 << 20, "the server to follow")
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
@pytest.mark.parametrize("seen", [True, False], ids=["with its state file", "without"])
def test_a_disk_that_a_program_serves_is_resized_by_that_program(run, seen):
    with ublk.Device(Growing()) as disk:
        assert seen or ublk.forget_state(disk.id)
        assert_fails(run("resize", disk.id, "2M"), 1, "a program serves it", errno.EINVAL)
        assert size_of(disk) == 1 << 20
        disk.resize(2 << 20)
        assert size_of(disk) == 2 << 20


@kernel
@since("6.16")
def test_a_disk_does_not_grow_beyond_a_target_that_cannot(run, tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
    """)
    with Forked(path) as disk:
        assert_fails(run("resize", disk.id, "2M"), 1, "its target cannot have")
        assert "no resized()" in disk.said() and size_of(disk) == 1 << 20
        assert run("resize", disk.id, "512K").status == run("resize", disk.id, "1M").status == 0
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_a_program_does_not_grow_a_disk_beyond_its_target():
    with ublk.Device(Ram()) as disk:
        with pytest.raises(ublk.UblkError, match="no resized"):
            disk.resize(2 << 20)
        assert size_of(disk) == 1 << 20


@kernel
@since("6.16")
def test_a_disk_without_a_server_is_followed_by_the_next(run, backing):
    disk = Forked("loop", backing, "-r", "requeue").live()
    disk.kill()
    assert run("resize", disk.id, "65M").status == 0
    with Forked("recover", disk.id) as again:
        assert os.path.getsize(backing) == size_of(disk) == 65 << 20
        assert again.kill(signal.SIGTERM) == 0


@kernel
@pytest.mark.parametrize("number", [signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT])
def test_a_signal_is_no_message(backing, number):
    with Forked("loop", backing) as disk:
        for _ in range(100):
            os.kill(disk.pid, number)
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""
