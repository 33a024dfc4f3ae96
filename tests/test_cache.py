# SPDX-License-Identifier: MIT
"""Companion: a disk with a cache, and its power cuts."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.checked import Checked
from tests.support import (
    FSCK,
    MKFS,
    AsyncRam,
    Forked,
    Recorder,
    Volatile,
    error_of,
    fio_verify,
    kernel,
    mount_of,
    needs,
    now,
    opened,
    read,
    read_at,
    recovered,
    sh,
    write_at,
)

OLD, NEW, NEWER = (memoryview(letter * 4096) for letter in (b"o", b"n", b"m"))


def test_what_is_written_is_read_at_once_and_reaches_the_target_with_a_flush(targets):
    below = Volatile(bytes(OLD) * 4)
    disk = targets.Cache(below)
    now(disk.write(512, NEW[:1024]))
    now(disk.write(1024, NEWER[:1024]))
    expected = bytes(OLD[:512]) + bytes(NEW[:512]) + bytes(NEWER[:1024]) + bytes(OLD[:2048])
    assert read(disk) == expected and below.data == bytes(OLD) * 4
    now(disk.flush())
    assert read(disk) == expected and below.durable == expected + bytes(OLD) * 3


def test_what_lies_side_by_side_is_written_in_one_go_but_not_across_a_boundary(targets):
    below = Recorder(8 << 20)
    below.boundary = 64 << 10
    disk = targets.Cache(below)
    for at in (60 << 10, 68 << 10, 64 << 10, 1 << 20):
        now(disk.write(at, NEW))
    now(disk.flush())
    assert below.calls == [("write", 60 << 10, 4096), ("write", 64 << 10, 8192), ("write", 1 << 20, 4096),
                           ("flush",)]


@pytest.mark.parametrize("name, args, content", [
    ("write_fua", (4096, NEWER), NEWER), ("write_zeroes", (4096, 4096, True), bytes(4096)),
    ("discard", (4096, 4096), bytes(4096))], ids=["write_fua", "write_zeroes", "discard"])
def test_what_is_no_plain_write_is_in_place_of_what_is_older(targets, name, args, content):
    below = targets.Ram(size=16384)
    below.write_fua = below.write
    disk = targets.Cache(below)
    for at in (0, 4096, 8192):
        now(disk.write(at, NEW))
    now(getattr(disk, name)(*args))
    expected = bytes(NEW) + bytes(content) + bytes(NEW)
    assert read(disk, 0, 12288) == expected
    assert bytes(below.memory) == bytes(4096) + bytes(content) + bytes(8192)
    now(disk.flush())
    assert read(disk, 0, 12288) == bytes(below.memory[:12288]) == expected


@pytest.mark.parametrize("way", ["call", "super"])
def test_a_subclass_goes_on_with_what_the_cache_does(targets, way):
    class Calling(targets.Cache):
        async def read(self, *words):
            await (self.call("read", *words) if way == "call" else super().read(*words))

        async def flush(self):
            await (self.call("flush") if way == "call" else super().flush())

    below = Volatile(bytes(OLD) * 4)
    disk = Calling(below)
    now(disk.write(4096, NEW))
    assert read(disk, 4096) == read(disk, 4096) == NEW and below.durable == bytes(OLD) * 4
    now(disk.flush())
    assert below.durable == bytes(OLD) + bytes(NEW) + bytes(OLD) * 2


class Failing(Volatile):
    """A disk that fails what `fails` names."""
    fails = ""

    def fail(self, name):
        if name == self.fails:
            raise OSError(errno.EIO, "it fails")

    def write(self, offset, buffer):
        if offset:
            self.fail("write")
        super().write(offset, buffer)

    def flush(self):
        self.fail("flush")
        super().flush()


@pytest.mark.parametrize("name", ["write", "flush"])
def test_a_flush_that_fails_loses_nothing(targets, name):
    below = Failing(bytes(12288))
    disk = targets.Cache(below)
    now(disk.write(0, NEW))
    now(disk.write(8192, NEW))
    below.fails = name
    for _ in range(2):
        with pytest.raises(OSError, match="it fails"):
            now(disk.flush())
        below.cached.clear()                        # what a flush that fails may do
    below.fails = ""
    now(disk.flush())
    assert below.durable == bytes(NEW) + bytes(4096) + bytes(NEW)


def test_no_write_hears_in_place_of_a_flush_that_zeroes_were_lost(targets):
    class Zeroing(Failing):
        def write_zeroes(self, offset, length, unmap):
            super().write(offset, bytes(length))
    below = Zeroing(bytes(OLD) * 3)
    disk = targets.Cache(below, cache_size=4096)
    now(disk.write_zeroes(4096, 4096, True))
    now(disk.write(0, NEW))
    below.fails = "flush"
    assert error_of(now, disk.write(8192, NEW)) == errno.EIO
    below.cached.clear()
    below.fails = ""
    now(disk.flush())
    assert below.durable == bytes(NEW) + bytes(4096) + bytes(OLD)


def test_a_cut_loses_what_is_not_durable_and_nothing_else(targets):
    disk = targets.Cache(Volatile(bytes(OLD) * 3))
    now(disk.write(0, NEW))
    now(disk.flush())
    now(disk.write(4096, NEW))
    now(disk.write(0, NEWER))
    disk.cut()
    assert read(disk, 0, 12288) == bytes(NEW) + bytes(OLD) * 2
    now(disk.write(8192, NEW))
    now(disk.flush())
    assert disk.target.durable == bytes(NEW) + bytes(OLD) + bytes(NEW)


@pytest.mark.parametrize("name, args", [("write", (4096, NEWER)), ("flush", ()), ("discard", (8192, 512)),
                                        ("read", (0, memoryview(bytearray(512))))])
def test_a_file_cuts_the_power_before_the_next_request_once(targets, tmp_path, name, args):
    disk = targets.Cache(targets.Ram(size=12288), cut=str(tmp_path / "cut"))
    now(disk.write(0, NEW))
    (tmp_path / "cut").touch()
    now(getattr(disk, name)(*args))
    assert not (tmp_path / "cut").exists() and read(disk) == bytes(4096)
    assert read(disk, 4096) == (NEWER if name == "write" else bytes(4096))


def test_a_flush_during_which_the_power_is_cut_fails_and_writes_no_more(targets):
    class Cutting(Volatile):
        def write(self, offset, buffer):
            super().write(offset, buffer)
            disk.cut()

    disk = targets.Cache(Cutting(bytes(OLD) * 3))
    now(disk.write(0, NEW))
    now(disk.write(8192, NEW))
    with pytest.raises(OSError, match="the power was cut"):
        now(disk.flush())
    now(disk.flush())
    assert disk.target.data == bytes(NEW) + bytes(OLD) * 2


def test_a_flush_that_waits_as_the_power_is_cut_fails(targets):
    async def run():
        disk = targets.Cache(targets.Ram(size=4096))
        await disk.write(0, NEW)
        async with disk.changing.take():
            flush = asyncio.ensure_future(disk.flush())
            await asyncio.sleep(0)
            disk.cut()
        await flush
    with pytest.raises(OSError, match="the power was cut"):
        asyncio.run(run())


def test_a_cut_beside_a_write_takes_all_of_it_or_nothing(targets):
    class Blocks(dict):
        def __setitem__(self, at, data):
            super().__setitem__(at, data)
            if not at:
                other.start()
                other.join(0.2)                                 # until it is done, or waits

    disk = targets.Cache(targets.Ram(size=4096))
    other = threading.Thread(target=disk.cut)
    disk.blocks = Blocks()
    now(disk.write(0, NEW))
    other.join()
    assert read(disk) in (NEW, bytes(4096))


def test_a_disk_that_cannot_become_smaller_keeps_what_it_has(targets):
    class Fixed(targets.Ram):
        def resized(self, size):
            if size < self.size:
                raise OSError(errno.EBUSY, "it cannot")
            super().resized(size)
        size = 0

    disk = targets.Cache(Fixed(size=8192))
    now(disk.write(4096, NEW))
    assert error_of(disk.resized, 4096) == errno.EBUSY
    assert read(disk, 4096) == NEW


def test_what_lay_behind_the_end_of_a_smaller_disk_is_written_nowhere(targets):
    class Resized(Recorder):
        def resized(self, size):
            self.size = size

    disk = targets.Cache(Resized(1 << 20))
    for at in (0, 508 << 10, 512 << 10, 1020 << 10):
        now(disk.write(at, NEW))
    disk.resized(512 << 10)
    now(disk.flush())
    assert [call[1:] for call in disk.target.calls[:-1]] == [(0, 4096), (508 << 10, 4096)]


def test_a_full_cache_is_written_back(targets):
    below = Recorder()
    disk = targets.Cache(below, cache_size=64 << 10)
    for at in range(0, 1 << 20, 4096):
        now(disk.write(at, NEW))
        assert len(disk.blocks) * 512 <= 64 << 10
    written = sum(call[2] for call in below.calls if call[0] == "write")
    assert written >= (1 << 20) - (64 << 10) and bytes(below.data[:written]) == bytes(NEW[:1]) * written
    assert min(disk.blocks) == written and read(disk, (1 << 20) - 4096) == NEW


def test_a_write_larger_than_the_cache(targets):
    disk = targets.Cache(Recorder(), cache_size=4096)
    for at in (0, 65536, 32768):
        now(disk.write(at, memoryview(bytes(NEW) * 16)))
    now(disk.flush())
    assert disk.target.data == bytes(NEW[:1]) * (128 << 10) + bytes(896 << 10)


def test_a_write_for_which_there_is_no_room_fails_and_the_rest_is_kept(targets):
    below = Failing(bytes(1 << 20))
    below.fails = "write"
    disk = targets.Cache(below, cache_size=8192)
    for at in (4096, 8192):
        now(disk.write(at, NEW))
    with pytest.raises(OSError, match="it fails"):
        now(disk.write(12288, NEW))
    below.fails = ""
    now(disk.flush())
    assert below.durable[:16384] == bytes(4096) + bytes(NEW) * 2 + bytes(4096)


class Slow(AsyncRam):
    """A disk on which what began first ends last."""
    begun = 0

    async def write(self, offset, buffer):
        self.begun += 1
        for _ in range(30 // self.begun):
            await asyncio.sleep(0.001)
        await super().write(offset, buffer)

    write_fua = write

    async def flush(self):
        await asyncio.sleep(0)


@pytest.mark.parametrize("name, args", [("flush", ()), ("write_fua", (0, NEWER))], ids=["flush", "write_fua"])
def test_what_was_written_back_later_is_newer(targets, name, args):
    async def run():
        disk = targets.Cache(Slow())
        await disk.write(0, NEW)
        first = asyncio.ensure_future(disk.flush())
        await asyncio.sleep(0.005)
        if name == "flush":
            await disk.write(0, NEWER)
        await asyncio.gather(first, getattr(disk, name)(*args))
        return disk
    disk = asyncio.run(run())
    assert read_all(disk) == disk.target.data[:4096] == NEWER and not disk.blocks


def read_all(disk):
    buffer = memoryview(bytearray(4096))
    asyncio.run(disk.read(0, buffer))
    return bytes(buffer)


def test_a_read_beside_a_flush_misses_nothing(targets):
    class SlowToRead(AsyncRam):
        async def read(self, offset, buffer):
            before = bytes(self.data[offset:offset + len(buffer)])
            await asyncio.sleep(0.01)
            buffer[:] = before

    async def run():
        disk, buffer = targets.Cache(SlowToRead()), memoryview(bytearray(8192))
        await disk.write(0, NEW)
        await asyncio.gather(disk.read(0, buffer), disk.flush())
        return buffer
    assert asyncio.run(run()) == bytes(NEW) + bytes(4096)


@pytest.mark.parametrize("seed", range(20))
def test_a_cache_is_a_disk(targets, seed):
    chance, expected = random.Random(seed), bytearray(64 << 10)
    below = targets.Ram(size=64 << 10)
    below.write_fua = below.write
    disk = targets.Cache(below, cache_size=chance.choice([512, 4096, 32 << 10]))
    for number in range(200):
        offset = chance.randrange(127) * 512
        length = min(chance.randrange(1, 9) * 512, (64 << 10) - offset)
        data = bytes([number % 255 + 1]) * length
        name = chance.choice(["write", "write", "write_fua", "write_zeroes", "flush", "read"])
        if name.startswith("write"):
            zero = name == "write_zeroes"
            now(getattr(disk, name)(offset, *((length, True) if zero else (memoryview(data),))))
            expected[offset:offset + length] = bytes(length) if zero else data
        elif name == "flush":
            now(disk.flush())
            assert bytes(below.memory) == expected
        else:
            assert read(disk, offset, length) == expected[offset:offset + length]


def test_a_server_that_ends_well_loses_nothing(targets):
    below = Volatile(bytes(8192))
    closed = []
    below.close = lambda: closed.append(bytes(below.durable))
    disk = targets.Cache(below)
    now(disk.write(4096, NEW))
    asyncio.run(disk.close())
    assert closed == [bytes(4096) + bytes(NEW)]


def test_a_server_that_ends_does_not_wait_for_ever_for_a_target_that_hangs(targets, monkeypatch):
    monkeypatch.setattr(ublk, "STOP_TIMEOUT", 0.1)
    below, closed = targets.Ram(size=8192), []
    below.close = lambda: closed.append(True)
    disk = targets.Cache(targets.Fault(below, hang=True))
    now(disk.write(4096, NEW))
    assert error_of(lambda: asyncio.run(disk.close())) == errno.ETIMEDOUT
    assert closed


def test_nor_for_one_that_cannot_be_cancelled(targets, monkeypatch):
    """As what the kernel does with a file."""
    class Deaf(Volatile):
        async def flush(self):
            for _ in range(50):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            ends.append("flush")

        def close(self):
            ends.append("target")
    monkeypatch.setattr(ublk, "STOP_TIMEOUT", 0.1)
    ends = []
    disk = targets.Cache(Deaf(bytes(4096)))
    assert error_of(lambda: asyncio.run(disk.close())) == errno.ETIMEDOUT
    assert ends == ["target", "flush"]


def test_a_flush_that_is_late_ends_before_its_target_is_closed(targets, monkeypatch):
    """Its writes would go to whatever file gets the number next."""
    class Slow(Volatile):
        async def write(self, offset, buffer):
            await asyncio.sleep(0.04)
            steps.append("write")

        async def close(self):
            steps.append("close")
            await asyncio.sleep(0.3)
    monkeypatch.setattr(ublk, "STOP_TIMEOUT", 0.1)
    steps = []
    disk = targets.Cache(Slow(bytes(64 << 10)))
    for offset in range(0, 64 << 10, 8192):
        now(disk.write(offset, NEW))
    assert error_of(lambda: asyncio.run(disk.close())) == errno.ETIMEDOUT
    assert steps[-1] == "close"


def test_what_another_queue_writes_as_a_block_is_forgotten_stays(targets):
    class Blocks(dict):
        def get(self, at):
            found = super().get(at)
            if other.ident is None and not below.cached:        # once it is flushed
                other.start()
                other.join(0.2)                                 # until it is done, or waits
            return found

    below = Volatile(bytes(4096))
    disk = targets.Cache(below)
    other = threading.Thread(target=lambda: now(disk.write(0, NEWER[:512])))
    disk.blocks = Blocks()
    now(disk.write(0, NEW[:512]))
    now(disk.flush())
    other.join()
    assert read(disk, 0, 512) == NEWER[:512]


@pytest.mark.parametrize("make", [lambda targets: targets.Zoned(size=64 << 20),
                                  lambda targets: Checked()])
def test_a_disk_that_is_more_than_its_data_has_no_cache_nor_log(targets, tmp_path, make):
    for above in targets.Cache, partial(targets.Record, str(tmp_path / "log")):
        with pytest.raises(ublk.UblkError, match="zones or metadata"):
            above(make(targets))


# ---- with a driver ------------------------------------------------------------------------------


def fill(directory):
    """Write files, every other one with fsync; return the contents of these."""
    kept = {}
    for number in range(8):
        with open(directory / str(number), "wb", buffering=0) as file:
            file.write(data := os.urandom(50_000))
            if number % 2:
                os.fsync(file.fileno())
                kept[str(number)] = data
    return kept


def assert_kept(disk, directory, kept):
    """A file system comes up after a loss of power, is whole and has what it promised."""
    with mount_of(disk.path, directory):
        for name, data in kept.items():
            assert (directory / name).read_bytes() == data, name
    sh(*FSCK["ext4"], disk.path)


@kernel
def test_a_file_system_keeps_what_it_promised_when_the_power_is_cut(workshop, tmp_path):
    needs("mkfs.ext4")
    with Forked(*"fault --control ctl cache --cut cut loop a.img".split()) as disk:
        sh(*MKFS["ext4"], disk.path)
        sh("mount", disk.path, tmp_path)
        kept = fill(tmp_path)
        (tmp_path / "late").write_text("not promised")
        Path("ctl").write_text("--error EIO")
        sh("umount", tmp_path)
        Path("cut").touch()
        os.unlink("ctl")
        assert_kept(disk, tmp_path, kept)
        assert not Path("cut").exists()


@kernel
def test_what_was_not_flushed_is_gone_after_a_cut(workshop):
    with Forked(*"cache --cut cut loop a.img --direct".split()) as disk, opened(disk.path) as fd:
        write_at(fd, 0, bytes(NEW))
        os.fsync(fd)
        write_at(fd, 0, bytes(NEWER))
        write_at(fd, 512, bytes(NEWER))
        assert read_at(fd, 0, 8192) == bytes(NEWER[:512]) + bytes(NEWER) + bytes(3584)
        Path("cut").touch()
        assert read_at(fd, 0, 8192) == bytes(NEW) + bytes(4096)
        with opened(disk.path, os.O_RDWR | os.O_DSYNC) as through:
            write_at(through, 4096, bytes(NEWER))
        Path("cut").touch()
        assert read_at(fd, 0, 8192) == bytes(NEW) + bytes(NEWER)


@kernel
def test_a_killed_server_has_lost_what_was_not_flushed_and_nothing_else(workshop):
    with Forked(*"cache loop a.img -r requeue".split()) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, bytes(NEW))
            os.fsync(fd)
            write_at(fd, 0, bytes(NEWER))
            write_at(fd, 8192, bytes(NEWER))
            disk.kill()
            disk = recovered(disk)
            assert read_at(fd, 0, 12288) == bytes(NEW) + bytes(8192)
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_file_system_keeps_what_it_promised_when_the_server_is_killed(workshop, tmp_path, run):
    needs("mkfs.ext4")
    with Forked(*"cache loop a.img".split()) as disk:
        sh(*MKFS["ext4"], disk.path)
        sh("mount", disk.path, tmp_path)
        kept = fill(tmp_path)
        disk.kill()
        sh("umount", tmp_path)
        assert run("del", disk.id).status == 0
    with Forked(*"cache loop a.img".split()) as disk:
        assert_kept(disk, tmp_path, kept)


@kernel
def test_a_cache_under_load_with_two_queues(workshop):
    needs("fio")
    with Forked(*"cache --cache-size 256K loop a.img --queues 2".split()) as disk:
        fio_verify(disk.path, [("512", "0", "48k"), ("4k", "1m", "256k"), ("256k", "2m", "1m")])
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""
