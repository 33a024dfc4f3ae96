# SPDX-License-Identifier: MIT
"""Companion: zones."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    Forked,
    assert_fails,
    before,
    damage,
    digest,
    error_of,
    kernel,
    message,
    mount_of,
    needs,
    now,
    opened,
    read_at,
    recovered,
    sh,
    since,
    write_at,
)

EMPTY, IMP_OPEN, EXP_OPEN, CLOSED, FULL = 1, 2, 3, 4, 14


def zoned(targets, **options):
    """Make a disk of 16 zones of 1 MiB."""
    return targets.Zoned(**{"size": 16 << 20, "zone_size": 1 << 20, **options})


def conditions(target):
    return [zone.cond for zone in target.zones]


def test_zones_are_written_at_their_pointer_only(targets):
    disk, page = zoned(targets), memoryview(bytes(4096))

    def write(offset, size=4096):
        return error_of(now, disk.write(offset, memoryview(b"x" * size)))
    now(disk.write(1 << 20, page))
    assert disk.zone_append(1 << 20, page) == (1 << 20) + 4096
    now(disk.write((1 << 20) + 8192, page))
    assert error_of(now, disk.write((1 << 20) + 8192, page)) == errno.EIO
    for wrong_place in (1 << 20, (1 << 20) + 16384, (2 << 20) + 4096):
        assert write(wrong_place) == errno.EIO
    disk.zone_finish(1 << 20)
    assert error_of(disk.zone_append, 1 << 20, page) == errno.EIO
    assert error_of(disk.zone_open, 1 << 20) == errno.EIO
    assert conditions(disk) == [EMPTY, FULL] + [EMPTY] * 14
    assert write(3 << 20, 2 << 20) == errno.EIO
    disk.close()


def test_zones_of_a_file_are_as_they_were_left(targets, tmp_path):
    path, page = str(tmp_path / "zones"), memoryview(os.urandom(4096))
    disk = zoned(targets, file=path, conventional=2)
    disk.zone_append(2 << 20, page)
    disk.zone_open(3 << 20)
    disk.zone_finish(4 << 20)
    disk.close()
    disk = targets.Zoned(file=path)
    assert (disk.size, disk.zone_size) == (16 << 20, 1 << 20)
    assert conditions(disk) == [0, 0, CLOSED, EMPTY, FULL] + [EMPTY] * 11
    assert disk.zones[2].wp == (2 << 20) + 4096
    assert error_of(now, disk.write(2 << 20, memoryview(bytes(4096)))) == errno.EIO
    now(disk.write((2 << 20) + 4096, page))
    assert error_of(now, disk.write((2 << 20) + 4096, page)) == errno.EIO
    for operation in (disk.zone_open, disk.zone_close, disk.zone_finish):
        assert error_of(operation, 0) == errno.EIO
    disk.close()


def start_machine_anew(targets, path):
    """Have a file of zones believe that the machine was started since it was last open."""
    *sizes, _ = targets.ZONED_HEADER.unpack(path.read_bytes()[:targets.ZONED_HEADER.size])
    damage(path, 0, targets.ZONED_HEADER.pack(*sizes, b"an earlier boot".ljust(36)))


def pointer_after_a_new_start(targets, path):
    """Return where the data of zone 1 end, once the machine was started anew."""
    start_machine_anew(targets, path)
    disk = targets.Zoned(file=str(path))
    pointer = disk.zones[1].wp
    disk.close()
    return pointer


def test_after_a_loss_of_power_a_zones_pointer_is_where_a_flush_found_it(targets, tmp_path):
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)
    disk.zone_append(2 << 20, page)
    disk.disk.sync.flush = flushed = nothing_to_wait_for()
    now(disk.flush())
    assert flushed.count == 2                   # data first
    disk.zone_append(1 << 20, page)
    disk.zone_append(3 << 20, page)
    asyncio.run(disk.zone_reset(2 << 20))
    disk.close()
    start_machine_anew(targets, path)
    for _ in range(2):                          # nor is anything else true later
        disk = targets.Zoned(file=str(path))
        assert [zone.wp - zone.start for zone in disk.zones[:5]] == [0, 4096, 0, 0, 0]
        disk.close()


def test_a_loss_of_power_before_the_first_flush_leaves_a_disk_of_zones(targets, tmp_path, monkeypatch):
    path, durable = tmp_path / "zones", tmp_path / "durable"
    monkeypatch.setattr(os, "fsync", lambda fd: durable.write_bytes(path.read_bytes()))
    zoned(targets, file=str(path)).zone_append(0, memoryview(b"x" * 4096))
    disk = targets.Zoned(file=str(durable))
    assert conditions(disk) == [EMPTY] * 16
    disk.close()


def test_a_zone_that_is_reset_during_a_flush_stays_empty(targets, tmp_path):
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)

    async def flush():
        disk._reset(disk.zones[1:2])
        disk.disk.sync.flush = nothing_to_wait_for()
    disk.disk.sync.flush = flush
    now(disk.flush())
    disk.zone_append(1 << 20, page)
    disk.close()
    assert pointer_after_a_new_start(targets, path) == 1 << 20


@pytest.mark.parametrize("of", ["this server", "the next"])
def test_what_a_flush_could_not_note_the_next_one_notes(targets, tmp_path, of):
    """After an error the kernel takes what it did not write for written, and shows it to the next server."""
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)
    table = path.read_bytes()[4096:8192]

    async def flush():
        disk.disk.sync.flush = fails

    async def fails():
        raise OSError(errno.EIO, "bad sector")
    disk.disk.sync.flush = flush
    assert error_of(now, disk.flush()) == errno.EIO
    if of == "the next":
        disk.close()
        disk = targets.Zoned(file=str(path))
    damage(path, 4096, table)
    disk.disk.sync.flush = nothing_to_wait_for()
    error_of(now, disk.flush())                 # of this server's the next one fails, too
    now(disk.flush())
    disk.close()
    assert pointer_after_a_new_start(targets, path) == (1 << 20) + 4096


def test_a_flush_notes_also_what_only_seems_empty_to_a_new_server(targets, tmp_path):
    """A reset that failed, and whose server was killed then, is in the page cache alone."""
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)
    disk.disk.sync.flush = nothing_to_wait_for()
    now(disk.flush())
    disk.close()
    table = path.read_bytes()[4096:8192]
    damage(path, 4096, bytes(4096))
    disk = targets.Zoned(file=str(path))
    damage(path, 4096, table)
    disk.disk.sync.flush = nothing_to_wait_for()
    now(disk.flush())
    disk.close()
    assert pointer_after_a_new_start(targets, path) == 1 << 20


def test_a_flush_that_is_slower_than_a_later_one_takes_nothing_back(targets, tmp_path):
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)

    async def flush():
        disk.disk.flush = nothing_to_wait_for()
        disk.zone_append(1 << 20, page)
        await disk.flush()
    disk.disk.flush, disk.disk.sync.flush = flush, nothing_to_wait_for()
    now(disk.flush())
    disk.close()
    assert pointer_after_a_new_start(targets, path) == (1 << 20) + 8192


@pytest.fixture(params=["pwrite", "fdatasync"])
def bad_table(monkeypatch, request):
    """What makes the table of zones durable fails, and the kernel takes that for written."""
    def pwrite(fd, buffer, offset, call=os.pwrite):
        count = call(fd, buffer, offset)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC:
            raise OSError(errno.EIO, "bad sector")
        return count

    def fdatasync(fd):                          # with direct_io of FUSE nothing else tells
        raise OSError(errno.EIO, "bad sector")
    fails = {"pwrite": pwrite, "fdatasync": fdatasync}[request.param]
    return lambda patch=monkeypatch: patch.setattr(os, request.param, fails)


def test_a_zone_that_could_not_be_emptied_stays_as_it_was(targets, tmp_path, bad_table):
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, page)
    disk.disk.sync.flush = flushed = nothing_to_wait_for()
    now(disk.flush())
    table = path.read_bytes()[4096:8192]
    bad_table()
    assert error_of(disk._reset, disk.zones) == errno.EIO
    assert path.read_bytes()[4096:8192] == table
    assert [error_of(now, disk.flush()) for _ in range(2)] == [errno.EIO, 0]
    assert flushed.count == 4                   # the file may durably say that it is empty
    disk.close()
    assert pointer_after_a_new_start(targets, path) == (1 << 20) + 4096


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "notes nothing"])
def test_a_flush_beside_a_reset_that_failed_fails_and_so_does_the_next(targets, bad_table, notes):
    """The kernel tells but once that data are lost, though they are another zone's, and another client's."""
    async def flush():
        del disk.disk.flush
        assert error_of(disk._reset, disk.zones[2:3]) == errno.EIO
    disk = zoned(targets)
    disk.disk.sync.flush = nothing_to_wait_for()
    for offset in (1 << 20, 2 << 20):
        disk.zone_append(offset, memoryview(bytes(4096)))
    if not notes:
        now(disk.flush())
    bad_table()
    disk.disk.flush = flush
    assert [error_of(now, disk.flush()) for _ in range(3)] == [errno.EIO, errno.EIO, 0]
    disk.close()


def test_flushes_beside_a_reset_that_failed_all_fail(targets, bad_table):
    """Two queues' clients flush: what one of them is told says nothing to the other."""
    async def flushes():
        began, may_end = asyncio.Event(), asyncio.Event()

        async def sync():
            began.set()
            await may_end.wait()
        disk.disk.sync.flush = sync
        first = asyncio.create_task(disk.flush())
        await began.wait()
        assert error_of(disk._reset, disk.zones[2:3]) == errno.EIO
        second = asyncio.create_task(disk.flush())
        await asyncio.sleep(0)
        may_end.set()
        return await asyncio.gather(first, second, return_exceptions=True)
    disk = zoned(targets)
    for offset in (1 << 20, 2 << 20):
        disk.zone_append(offset, memoryview(bytes(4096)))
    bad_table()
    assert [getattr(error, "errno", 0) for error in asyncio.run(flushes())] == [errno.EIO, errno.EIO]
    assert error_of(now, disk.flush()) == 0
    disk.close()


def test_zones_that_could_not_be_emptied_nor_restored_are_noted_by_a_flush(
        targets, tmp_path, monkeypatch, bad_table):
    path, page = tmp_path / "zones", memoryview(os.urandom(4096))
    disk = zoned(targets, file=str(path))
    for offset in (0, 1 << 20):
        disk.zone_append(offset, page)
    disk.disk.sync.flush = nothing_to_wait_for()
    now(disk.flush())

    def fails(*_):
        raise OSError(errno.EIO, "bad sector")
    with monkeypatch.context() as patch:
        bad_table(patch)
        patch.setattr(targets.Zoned, "_note", fails)
        assert error_of(disk._reset, disk.zones) == errno.EIO
    assert [error_of(now, disk.flush()) for _ in range(2)] == [errno.EIO, 0]
    disk.close()
    disk = targets.Zoned(file=str(path))
    assert [zone.wp - zone.start for zone in disk.zones[:3]] == [4096, 4096, 0]
    disk.close()


def test_a_reset_that_is_killed_leaves_no_zones_that_only_seem_empty(targets, tmp_path, monkeypatch):
    """The next server would write over data to which a loss of power may take their zone back."""
    path, left = tmp_path / "zones", []
    disk = zoned(targets, file=str(path))
    for offset in (1 << 20, 2 << 20):
        disk.zone_append(offset, memoryview(b"x" * 4096))
    before = path.read_bytes()[:8192]

    def last(call):
        def function(fd, *how):
            call(fd, *how)
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            left.append((path.read_bytes()[:8192] == before, flags & os.O_DSYNC))
            raise KeyboardInterrupt
        return function
    with monkeypatch.context() as patch:
        for name in ("pwrite", "pwritev"):
            patch.setattr(os, name, last(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            disk._reset(disk.zones)
    assert left == [(False, os.O_DSYNC)]
    disk.close()
    disk = targets.Zoned(file=str(path))
    assert conditions(disk) == [EMPTY] * 16
    disk.close()


def test_a_flush_of_zones_that_are_only_read_notes_nothing(targets, tmp_path):
    path = tmp_path / "zones"
    disk = zoned(targets, file=str(path))
    disk.zone_append(1 << 20, memoryview(b"x" * 4096))
    disk.close()
    disk = targets.Zoned(file=str(path), read_only=True)
    disk.disk.sync.flush = flushed = nothing_to_wait_for()
    now(disk.flush())
    assert flushed.count and disk.zones[1].wp == (1 << 20) + 4096
    disk.close()


def nothing_to_wait_for():
    """Make a coroutine function that counts its calls."""
    async def function():
        function.count += 1
    function.count = 0
    return function


def test_zones_lie_in_no_device(targets, tmp_path, monkeypatch):
    """Also one of 0 bytes, as stat() has all devices."""
    path = tmp_path / "device"
    path.write_bytes(b"")
    monkeypatch.setattr(targets, "is_block", lambda path: True)
    assert "not a file" in message(lambda: zoned(targets, file=str(path)))
    assert path.read_bytes() == b""


@kernel
@since("6.6")
def test_a_zoned_disk_sends_nothing_again(targets):
    device = ublk.Device(zoned(targets), recovery="reissue")
    assert "what is sent again would be appended twice" in message(device.start)


def test_a_file_of_zones_has_one_server(targets, tmp_path):
    path = str(tmp_path / "zones")
    disk = zoned(targets, file=path)
    assert "another server uses it" in message(lambda: targets.Zoned(file=path))
    disk.close()
    targets.Zoned(file=path).close()


@pytest.mark.parametrize("spoil, text", [
    (lambda path: damage(path, 0, b"x"), "not a zoned disk, or a damaged one"),
    (lambda path: damage(path, 9, b"x"), "not a zoned disk, or a damaged one"),
    (lambda path: damage(path, 4096 + 16, b"\1"), "the write pointer of zone 1"),
    (lambda path: damage(path, 4096 + 16 * 15, b"\xff" * 8), "the write pointer of zone 15"),
    (lambda path: os.truncate(path, 10 << 20), "damaged: not"),
    (lambda path: os.truncate(path, 512), "damaged: not"),
    (lambda path: os.truncate(path, 10), "not a multiple of 512"),
    (lambda path: path.write_bytes(os.urandom(1 << 20)), "not a zoned disk, or a damaged one")])
def test_zones_of_a_damaged_file_are_refused(run, targets, tmp_path, spoil, text):
    path = tmp_path / "zones"
    zoned(targets, file=str(path)).close()
    spoil(path)
    assert_fails(run("zoned", "--file", path), 1, text, errno.EINVAL)


@pytest.mark.parametrize("words, status, text", [
    ("--zone-size 3M", 1, "3145728"), ("--zone-size 512", 1, "512"), ("--zone-size 0", 1, "--zone-size 0"),
    ("--size 100M --zone-size 16M", 1, "--size"), ("--size 0", 1, "--size 0"),
    ("--size 64M --conventional 4", 1, "--size"), ("--conventional -1", 1, "not -1 zones"),
    ("--conventional x", 2, "--conventional"), ("surplus", 2, "surplus"),
    ("--file /no/such/dir/x", 1, "/no/such/dir")])
def test_zones_that_cannot_be(run, words, status, text):
    assert_fails(run("zoned", *words.split()), status, text)


def test_the_pointer_of_a_zone_moves_once_its_data_are_there(targets, tmp_path, monkeypatch):
    path, page, write_all = str(tmp_path / "zones"), memoryview(b"x" * 4096), targets.write_all
    disk = zoned(targets, file=path)
    disk.zone_append(0, page)

    def full(fd, data, offset):
        if offset >= disk.data_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data, offset)
    monkeypatch.setattr(targets, "write_all", full)
    assert error_of(disk.zone_append, 1 << 20, page) == errno.ENOSPC
    assert error_of(now, disk.write(2 << 20, page)) == errno.ENOSPC
    assert [zone.wp for zone in disk.zones[1:3]] == [1 << 20, 2 << 20]
    assert conditions(disk) == [IMP_OPEN] + [EMPTY] * 15
    disk.close()
    disk = targets.Zoned(file=path)
    assert conditions(disk) == [CLOSED] + [EMPTY] * 15
    disk.close()


@kernel
@before("6.6")
def test_zones_name_the_kernel_that_has_them(targets):
    assert "needs Linux 6.6, this is" in message(ublk.Device(zoned(targets)).start)


@kernel
@since("6.16")
def test_a_zoned_disk_keeps_its_size(run, targets):
    with ublk.Device(zoned(targets)) as disk:
        for size in (8 << 20, 32 << 20):
            assert_fails(run("resize", disk.id, size), 1, "a zoned disk keeps its size", errno.EINVAL)
            assert "a zoned disk keeps its size" in message(disk.resize, size)
        assert [line[0] for line in report(disk)] == [zone * 2048 for zone in range(16)]


def report(disk):
    """Return (first sector, written sectors, condition, type) of each zone, as blkzone tells it."""
    pattern = r" *start: (\w+), len \w+, cap \w+, wptr (\w+) .* zcond: *\d+\((..)\) \[type: (\d)"
    found = [re.match(pattern, line) for line in sh("blkzone", "report", disk.path).stdout.splitlines()]
    return [(int(line[1], 16), int(line[2], 16), line[3], int(line[4])) for line in found]


@kernel
@since("6.6")
def test_blkzone_sees_and_changes_the_zones(targets):
    needs("blkzone")
    with ublk.Device(zoned(targets, conventional=2)) as disk:
        name = os.path.basename(disk.path)
        queue = Path(f"/sys/block/{name}/queue")
        assert (queue / "zoned").read_text() == "host-managed\n"
        assert report(disk) == [(zone * 2048, 0, "nw" if zone < 2 else "em", 1 if zone < 2 else 2)
                                for zone in range(16)]
        with opened(disk.path) as fd:
            data = os.urandom(8192)
            write_at(fd, 4096, data)                            # conventional
            write_at(fd, 3 << 20, data)
            assert error_of(write_at, fd, (3 << 20) + 16384, data) == errno.EIO
            sh("blkzone", "finish", "-o", 4 * 2048, "-c", 1, disk.path)
            sh("blkzone", "open", "-o", 5 * 2048, "-c", 1, disk.path)
            found = report(disk)
            assert found[3][1:3] == (16, "oi") and found[4][2] == "fu" and found[5][2] == "oe"
            sh("blkzone", "close", "-o", 3 * 2048, "-c", 1, disk.path)
            assert report(disk)[3][1:3] == (16, "cl")
            assert read_at(fd, 4096, 8192) == read_at(fd, 3 << 20, 8192) == data
            sh("blkzone", "reset", "-o", 3 * 2048, "-c", 1, disk.path)
            assert read_at(fd, 3 << 20, 8192) == bytes(8192)
            sh("blkzone", "reset", "-o", 2 * 2048, disk.path)
            assert {line[1:3] for line in report(disk)[2:]} == {(0, "em")}
            assert read_at(fd, 4096, 8192) == data


ZBD = ["--zonemode=zbd", "--direct=1", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--bs=16k",
       "--iodepth=8", "--ioengine=libaio", "--max_open_zones=4", "--thread", "--minimal"]


@kernel
@since("6.6")
def test_fio_verifies_zones(targets):
    needs("fio")
    with ublk.Device(zoned(targets)) as disk:
        done = sh("fio", "--name=x", f"--filename={disk.path}", "--size=16M", "--io_size=12M", *ZBD,
                  cwd="/tmp")
        assert "verify" not in done.stderr, done.stderr


@kernel
@since("6.6")
@pytest.mark.parametrize("kind", ["btrfs", "f2fs"])
def test_zones_carry_a_file_system(targets, tmp_path, kind):
    make, check, options = {
        "btrfs": (["mkfs.btrfs", "-qf", "-O", "zoned", "-d", "single", "-m", "single"], ["btrfs", "check"],
                  {"size": 256 << 20, "zone_size": 8 << 20}),
        "f2fs": (["mkfs.f2fs", "-qfm"], ["fsck.f2fs"],
                 {"size": 192 << 20, "zone_size": 4 << 20, "conventional": 8})}[kind]
    needs(make[0], check[0])
    files = {str(number): os.urandom(number * 50_000) for number in range(12)}
    with ublk.Device(targets.Zoned(**options)) as disk:
        sh(*make, disk.path)
        with mount_of(disk.path, tmp_path / "mnt", "-t", kind) as directory:
            for name, data in files.items():
                (directory / name).write_bytes(data)
            (directory / "0").unlink()
        with mount_of(disk.path, tmp_path / "mnt", "-t", kind) as directory:
            assert {path.name: path.read_bytes() for path in directory.iterdir()} == \
                {name: data for name, data in files.items() if name != "0"}
        sh(*check, disk.path)


@kernel
@since("7.0")
@pytest.mark.parametrize("options", [
    {"batch": True, "queues": 2}, {"data_path": "auto-zero-copy"}, {"data_path": "zero-copy", "batch": True}],
    ids=str)
def test_a_file_system_finds_its_appends_on_every_data_path(targets, tmp_path, options):
    needs("mkfs.btrfs")
    data = os.urandom(500_000)
    with ublk.Device(targets.Zoned(size=256 << 20, zone_size=8 << 20), **options) as disk:
        sh("mkfs.btrfs", "-qf", "-O", "zoned", "-d", "single", "-m", "single", disk.path)
        for number in range(3):
            with mount_of(disk.path, tmp_path / "mnt", "-t", "btrfs") as directory:
                (directory / str(number)).write_bytes(data)
        with mount_of(disk.path, tmp_path / "mnt", "-t", "btrfs") as directory:
            assert [(directory / str(number)).read_bytes() == data for number in range(3)] == [True] * 3


def test_a_driver_that_loses_where_appends_land_is_not_asked_for_any(targets):
    """Of appends that were committed so, 7.3's block_rq_complete told the start of the zone."""
    device = ublk.Device(targets.Zoned(), data_path="auto-zero-copy", batch=True, unprivileged=False)
    device.control = SimpleNamespace(features=-1)
    assert "the driver loses where appends land" in message(device._flags)


@kernel
@since("6.6")
def test_zones_survive_servers_that_are_killed(targets, tmp_path, backing):
    backing.unlink()
    words = ["zoned", "--file", backing, "--size", "32M", "--zone-size", "4M", "-r", "requeue"]
    disk = Forked(*words).live()
    page = os.urandom(4096)
    for number in range(3):                     # nothing is flushed meanwhile
        with opened(disk.path) as fd:
            write_at(fd, number * 4096, page)
            write_at(fd, (number + 1) << 22, page)
        disk.kill()
        disk = recovered(disk)
    with opened(disk.path) as fd:
        assert read_at(fd, 0, 4 * 4096) == page * 3 + bytes(4096)
    assert [line[1] for line in report(disk)] == [24, 8, 8, 8, 0, 0, 0, 0]
    before = report(disk), digest(disk.path)
    assert disk.kill(signal.SIGTERM) == 0
    with Forked(*words) as disk:                # and the end of the server
        assert [line[:2] for line in report(disk)] == [line[:2] for line in before[0]]
        assert digest(disk.path) == before[1]
