# SPDX-License-Identifier: MIT
"""Companion: what is acknowledged as durable survives a loss of power of what the disk lies on."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext

import pytest

import ublk
from tests.support import (
    LIBC,
    MKFS,
    Ram,
    Volatile,
    error_of,
    kernel,
    mount_of,
    needs,
    opened,
    sh,
    since,
    until,
    write_at,
)
from tests.test_nbd import nbd_server, nbd_uri

# What stands between a file system and the disks below it, LOWER and OTHER.
STACKS = {
    "loop": "loop LOWER",
    "direct": "loop LOWER --direct",
    "stripe": "stripe LOWER OTHER --chunk 16K",
    "fault": "fault loop LOWER",
    "record": "record LOG loop LOWER",
    "cache": "cache loop LOWER",
    "nbd": "nbd URI",
}


@pytest.fixture
def serving(tmp_path, here):
    """Serve a disk of STACKS over lower ones of such contents: yields it and them."""
    @contextmanager
    def serving(kind, *contents):
        lowers = [Volatile(content) for content in contents]
        with ExitStack() as stack:
            lower, other = [stack.enter_context(ublk.Device(below)).path for below in lowers]
            words = {"LOWER": lower, "OTHER": other, "LOG": tmp_path / "log", "URI": nbd_uri(here)}
            partner = nbd_server("qemu-nbd", "-tf", "raw", "--cache=writeback", "-k", "AT", lower, here)
            stack.enter_context(partner if kind == "nbd" else nullcontext())
            target = ublk.make_target([str(words.get(word, word)) for word in STACKS[kind].split()])
            yield stack.enter_context(ublk.Device(target)), lowers
    return serving


@kernel
@pytest.mark.parametrize("kind", STACKS)
def test_what_fsync_acknowledged_survives_a_loss_of_power(serving, tmp_path, kind):
    needs("mkfs.ext4")
    files, left = [os.urandom(200_000) for _ in range(3)], []
    with serving(kind, bytes(16 << 20), bytes(16 << 20)) as (disk, lowers):
        sh(*MKFS["ext4"], disk.path)
        with mount_of(disk.path, tmp_path / "mnt") as directory:
            for number, data in enumerate(files):
                with open(directory / str(number), "wb", buffering=0) as file:
                    file.write(data)
                    os.fsync(file.fileno())
                    left.append([bytes(lower.durable) for lower in lowers])
    for number, contents in enumerate(left):
        with serving(kind, *contents) as (disk, _), mount_of(disk.path, tmp_path / "mnt") as directory:
            assert (directory / str(number)).read_bytes() == files[number]


@kernel
@pytest.mark.parametrize("options", [
    {}, {"data_path": "copy"}, pytest.param({"batch": True}, marks=since("7.0"))], ids=str)
def test_a_durable_write_tells_of_earlier_ones_that_were_lost(targets, tmp_path, options):
    """And so does the next flush: the kernel tells of them once for each opening of a file."""
    class Spoilt(targets.Fault):
        def match(self, name, offset, length, data):
            return data is not None and b"y" * 4096 in bytes(data)
    needs("mkfs.ext4")
    with ublk.Device(Spoilt(targets.Ram(size=64 << 20), on="write", error="EIO")) as lower:
        sh(*MKFS["ext4"], lower.path)
        with mount_of(lower.path, tmp_path / "mnt") as directory:
            image = directory / "disk.img"
            image.write_bytes(bytes(8 << 20))
            with ublk.Device(targets.Loop(str(image)), **options) as disk, opened(disk.path) as fd, \
                    opened(disk.path, os.O_RDWR | os.O_DSYNC) as durable:
                write_at(fd, 8192, b"y" * 4096)
                os.sync()
                assert error_of(write_at, durable, 1 << 20, b"x" * 4096) == errno.EIO
                assert [error_of(os.fsync, fd) for _ in range(2)] == [errno.EIO, 0]


class Losing(Ram):
    """A disk that loses b"y" and has b"s" wait."""

    def __init__(self):
        super().__init__(8 << 20)
        self.waits, self.goes_on = threading.Event(), threading.Event()

    async def write(self, offset, buffer):
        if buffer[:1] == b"s":
            self.waits.set()
            await asyncio.to_thread(self.goes_on.wait)
        if buffer[:1] == b"y":
            raise OSError(errno.EIO, "lost")
        super().write(offset, buffer)


@kernel
@pytest.mark.parametrize("kind", ["loop", "stripe"])
def test_no_durable_write_takes_what_another_one_was_to_hear(targets, tmp_path, kind):
    """The kernel tells of it whoever asks first, and once."""
    needs("mkfs.ext4")
    below = Losing()
    with ExitStack() as stack:
        lower = stack.enter_context(ublk.Device(below, max_io=4096))       # each page is a request
        target = targets.Loop(lower.path) if kind == "loop" else targets.Stripe(lower.path)
        disk = stack.enter_context(ublk.Device(target))
        sh("mkfs.ext4", "-q", "-O", "^has_journal", "-b", "4096", disk.path)
        directory = stack.enter_context(mount_of(disk.path, tmp_path / "mnt"))
        for name in "ab":                       # over what is there already it is one request, and no flush
            with open(directory / name, "wb", buffering=0) as file:
                file.write(b"x" * 8192)
                os.fsync(file.fileno())
        one, other = [stack.enter_context(opened(directory / name, os.O_RDWR | os.O_DSYNC)) for name in "ab"]
        pool = stack.enter_context(ThreadPoolExecutor())
        lost = pool.submit(error_of, write_at, one, 0, b"y" * 4096 + b"s" * 4096)
        assert below.waits.wait(60)
        beside = pool.submit(error_of, write_at, other, 0, b"x" * 4096)
        wait([beside], 2)                       # where it takes it, it does so before the other one ends
        below.goes_on.set()
        assert lost.result() == errno.EIO
        beside.result()


@kernel
def test_what_is_lost_during_a_flush_fails_the_next_one_too(targets):
    """It may be another client's, acknowledged when that flush had come."""
    write, waits = 2, 4                         # SYNC_FILE_RANGE_* of linux/fs.h
    below = Losing()
    with ublk.Device(below) as lower, ublk.Device(targets.Loop(lower.path)) as disk, \
            opened(disk.path) as fd, opened(lower.path, os.O_RDONLY) as other, ThreadPoolExecutor() as pool:
        write_at(fd, 0, b"s" * 4096)
        first = pool.submit(error_of, os.fsync, fd)
        assert below.waits.wait(60)
        write_at(fd, 1 << 20, b"y" * 4096)
        place = ctypes.c_int64(1 << 20)
        assert LIBC.sync_file_range(other, place, place, write | waits) < 0
        below.goes_on.set()
        assert [first.result(), error_of(os.fsync, fd), error_of(os.fsync, fd)] == [errno.EIO, errno.EIO, 0]


@kernel
@pytest.mark.parametrize("kind", ["loop", "stripe", "thread"])
def test_a_flush_that_fails_while_its_server_leaves_tells_its_client(targets, monkeypatch, kind):
    """The kernel tells of a loss once, and the next server is asked to flush again."""
    class Thread(targets.Loop):
        async def flush(self):
            await asyncio.to_thread(os.fsync, self.fd)
    kinds = {"loop": targets.Loop, "stripe": targets.Stripe, "thread": Thread}
    monkeypatch.setattr(ublk, "LAST_WORDS", 30.0)
    below = Losing()
    with ublk.Device(below) as lower, ThreadPoolExecutor() as pool, ExitStack() as behind:
        disk = ublk.Device(kinds[kind](lower.path), recovery="reissue")
        disk.start()
        with opened(disk.path) as fd:
            write_at(fd, 0, b"s" * 4096)
            write_at(fd, 1 << 20, b"y" * 4096)
            flushed = pool.submit(error_of, os.fsync, fd)
            assert below.waits.wait(60)
            queue = disk._workers[0].queue
            leaves = pool.submit(disk.detach)
            until(lambda: queue.leaving)
            below.goes_on.set()
            leaves.result()
            behind.enter_context(ublk.Device.recover(disk.id, kinds[kind](lower.path)))
            assert flushed.result() == errno.EIO
