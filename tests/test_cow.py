# SPDX-License-Identifier: MIT
"""Companion: overlays."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import hashlib
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import ublk
from tests.support import (
    MKFS,
    Forked,
    Volatile,
    Writers,
    content_of,
    devices_left,
    die,
    digest,
    error_of,
    kernel,
    message,
    mount_of,
    now,
    opened,
    patched,
    read_at,
    recovered,
    replace,
    sh,
    until,
    write_at,
)


def overlay_of(targets, directory):
    """Make an overlay that has the sectors 3 to 5 of a base of 1 MiB; return both paths."""
    base, overlay = directory / "base.img", directory / "x.cow"
    base.write_bytes(b"b" * (1 << 20))
    cow = targets.Cow(str(base), str(overlay))
    os.pwrite(cow.top.fd, b"o" * 1536, cow.data_at + 1536)
    cow._mark(cow.blocks(1536, 1536))
    cow.close()
    return str(base), str(overlay)


def test_an_overlay_remembers_its_blocks(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    assert list(cow.runs(0, 8192)) == [(False, 0, 1536), (True, 1536, 1536), (False, 3072, 5120)]
    assert list(cow.runs(2048, 512)) == [(True, 2048, 512)]
    assert list(cow.runs(0, 1 << 20))[-1] == (False, 3072, (1 << 20) - 3072)
    cow._mark(cow.blocks(0, 1 << 20))
    assert list(cow.runs(512, 1 << 19)) == [(True, 512, 1 << 19)]
    cow.close()


def start_machine_anew(targets, overlay):
    """Have an overlay believe that the machine was started since it was last open."""
    header = targets.COW_HEADER
    *sizes, _ = header.unpack(overlay.read_bytes()[:header.size])
    patched(overlay, 0, header.pack(*sizes, b"an earlier boot".ljust(36)))


def test_after_a_loss_of_power_only_durable_blocks_count(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    cow._mark(cow.blocks(0, 2048))                  # of it 512 bytes are there for good
    shutil.copy(overlay, tmp_path / "y.cow")
    cow.close()
    start_machine_anew(targets, tmp_path / "y.cow")
    cow = targets.Cow(base, str(tmp_path / "y.cow"))
    assert list(cow.runs(0, 4096)) == [(False, 0, 1536), (True, 1536, 1536), (False, 3072, 1024)]
    cow.close()


def test_committing_writes_the_overlay_into_the_base(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    killed = targets.Cow(base, overlay)
    os.pwrite(killed.top.fd, b"o" * 512, killed.data_at)
    killed._mark(killed.blocks(0, 512))
    killed.top.close()
    killed.below.close()
    for _ in range(2):                              # harmless when it is done again
        targets.Cow(base, overlay, commit=True).close()
        cow = targets.Cow(base, overlay)
        assert list(cow.runs(0, 1 << 20)) == [(False, 0, 1 << 20)]
        assert os.stat(overlay).st_blocks * 512 <= 64 << 10
        cow.close()
        content = b"o" * 512 + b"b" * 1024 + b"o" * 1536 + b"b" * ((1 << 20) - 3072)
        assert Path(base).read_bytes() == content


@pytest.mark.parametrize("damage, says", [
    (lambda path: patched(path, 0, b"x"), "not an overlay, or a damaged one"),
    (lambda path: patched(path, 20, b"x"), "not an overlay, or a damaged one"),
    (lambda path: patched(path, 8, bytes(100)), "not an overlay, or a damaged one"),
    (lambda path: Path(path).write_bytes(b"text\n" * 1024), "not an overlay, or a damaged one"),
    (lambda path: Path(path).write_bytes(bytes(512)), "not an overlay, or a damaged one"),
    (lambda path: Path(path).write_bytes(bytes(8 << 20)), "not an overlay, or a damaged one"),
    (lambda path: os.truncate(path, 512), "its end is missing"),
    (lambda path: os.truncate(path, 1 << 20), "its end is missing"),
    (lambda path: os.truncate(path, 1000), "not a multiple of 512"),
    (lambda path: os.truncate(Path(path).with_name("base.img"), 1 << 19), "made for a base of 1048576 bytes"),
], ids=range(10))
def test_a_damaged_overlay_is_refused(targets, tmp_path, damage, says):
    base, overlay = overlay_of(targets, tmp_path)
    damage(overlay)
    assert says in message(targets.Cow, base, overlay)
    if "base" not in says:
        assert Path(base).read_bytes() == b"b" * (1 << 20)


def test_a_base_that_has_changed_is_refused(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    patched(base, 1024 + 44, b"mounted")            # where ext4 notes that
    assert "its base has changed since" in message(targets.Cow, base, overlay)
    gc.collect()
    assert "its base has changed since" in message(lambda: targets.Cow(base, overlay, read_only=True))
    gc.collect()
    targets.Cow(base, overlay, any_base=True).close()
    targets.Cow(base, overlay).close()              # now it is known as it is


def test_a_commit_that_was_killed_can_be_done_again(targets, tmp_path, monkeypatch):
    base, overlay = overlay_of(targets, tmp_path)

    def die(*_):
        raise InterruptedError
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(targets, "clear", die)
        targets.Cow(base, overlay, commit=True)
    gc.collect()
    cow = targets.Cow(base, overlay, commit=True)
    assert list(cow.runs(0, 1 << 20)) == [(False, 0, 1 << 20)]
    cow.close()
    targets.Cow(base, overlay).close()


def test_an_overlay_knows_no_base_that_a_loss_of_power_may_take_back(targets, tmp_path, monkeypatch):
    """As what a commit wrote that was killed, until somebody has made it durable."""
    base, overlay = map(Path, overlay_of(targets, tmp_path))
    durable = {path: path.read_bytes() for path in (base, overlay)}

    def fsync(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        durable[path] = path.read_bytes()
        if path == base and not killed:
            raise InterruptedError
    killed = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        before = durable[base]
        with pytest.raises(InterruptedError):
            targets.Cow(str(base), str(overlay), commit=True)
        killed.append(True)
        durable[base] = before
        gc.collect()
        targets.Cow(str(base), str(overlay)).close()
    for path, content in durable.items():
        path.write_bytes(content)
    start_machine_anew(targets, overlay)
    cow = targets.Cow(str(base), str(overlay))
    assert list(cow.runs(0, 4096)) == [(False, 0, 1536), (True, 1536, 1536), (False, 3072, 1024)]
    cow.close()


def test_an_overlay_knows_its_base_as_the_disk_has_it(targets, tmp_path, monkeypatch):
    """The page cache alone has what a commit could not make durable."""
    base, overlay = map(Path, overlay_of(targets, tmp_path))
    old, fsync = base.read_bytes(), os.fsync
    is_base = lambda fd: os.path.sameopenfile(fd, it.fileno())          # noqa: E731
    evict = lambda fd, *_: is_base(fd) and base.write_bytes(old)        # noqa: E731
    with open(base) as it:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: fsync(999 if is_base(fd) else fd))
            assert error_of(lambda: targets.Cow(str(base), str(overlay), commit=True)) == errno.EBADF
        gc.collect()
        assert base.read_bytes() != old
        monkeypatch.setattr(os, "posix_fadvise", evict)
        targets.Cow(str(base), str(overlay)).close()
        base.write_bytes(old)
        targets.Cow(str(base), str(overlay)).close()


@pytest.mark.parametrize("late", [False, True])
def test_what_a_loss_of_power_took_back_stays_so_though_a_start_failed_to_note_that(
        targets, tmp_path, monkeypatch, late):
    """The page cache alone has then what it noted, and may drop it at any moment."""
    base, overlay = map(Path, overlay_of(targets, tmp_path))
    patched(overlay, targets.MARKS_AT + 100, targets.OURS)
    disk = overlay.read_bytes()
    start_machine_anew(targets, overlay)
    evicted = []

    def evict(*_):
        evicted.append(patched(overlay, targets.MARKS_AT, disk[targets.MARKS_AT:][:4096]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.close(-1))
        assert error_of(targets.Cow, str(base), str(overlay)) == errno.EBADF
    gc.collect()
    if not late:
        evict()
    monkeypatch.setattr(os, "posix_fadvise", evict)
    cow = targets.Cow(str(base), str(overlay))
    if not evicted:
        evict()
    assert not any(ours for ours, *_ in cow.runs(51200, 512))
    cow.close()


def test_marks_there_was_room_for_are_kept_by_a_flush(targets, tmp_path, monkeypatch):
    """All of a block's changes are there for good then, or none."""
    base, overlay = overlay_of(targets, tmp_path)
    cow, pwrite = targets.Cow(base, overlay), os.pwrite

    def full(fd, data, offset):
        if len(data) < 8:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(fd, data[:8], offset)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert error_of(cow._mark, cow.blocks(8192, 6144)) == errno.ENOSPC
    ours = [(False, 4096, 4096), (True, 8192, 4096), (False, 12288, 4096)]
    assert list(cow.runs(4096, 12288)) == ours
    asyncio.run(flush_with_fsync(cow))
    shutil.copy(overlay, tmp_path / "y.cow")
    cow.close()
    start_machine_anew(targets, tmp_path / "y.cow")
    cow = targets.Cow(base, str(tmp_path / "y.cow"))
    assert list(cow.runs(4096, 12288)) == ours
    cow.close()


def test_marks_count_for_a_write_or_flush_once_its_server_has_written_them(targets, tmp_path, monkeypatch):
    """The page cache alone may have those it finds, or which a sync could not write, and drop them."""
    base, overlay = overlay_of(targets, tmp_path)
    written, pwrite, fsync = [], os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *words: written.append(words[2]) or pwrite(*words))

    def mark():
        cow._mark(cow.blocks(1536, 512))

    def flush():
        asyncio.run(flush_with_fsync(cow))

    def flush_that_fails():
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: fsync(999))
            flush()

    for step in (mark, flush):
        cow = targets.Cow(base, overlay)
        for before in (bool, flush_that_fails, flush):
            error_of(before)
            written.clear()
            error_of(step)
            assert written == [targets.MARKS_AT] * (before is not flush)
        cow.close()


def test_marks_that_are_written_again_need_no_more_room(targets, tmp_path):
    """There may be none: then the next server of an overlay could neither write nor flush, nor end well."""
    base, overlay = overlay_of(targets, tmp_path)
    used = os.stat(overlay).st_blocks
    cow = targets.Cow(base, overlay)
    cow._mark(cow.blocks(1536, 512))
    cow.close()
    assert os.stat(overlay).st_blocks == used


def test_an_overlay_that_is_only_read_is_never_written(targets, tmp_path, monkeypatch):
    """Nor when a flush of it fails: all that came after failed, too, and it was not closed."""
    cow, fsync = targets.Cow(*overlay_of(targets, tmp_path), read_only=True), os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: fsync(999))
        assert error_of(asyncio.run, flush_with_fsync(cow)) == errno.EBADF
    assert [error_of(asyncio.run, flush_with_fsync(cow)) for _ in range(2)] == [errno.EIO, 0]
    cow.close()


def test_a_mark_that_is_lost_with_its_data_comes_back_with_no_flush(targets, tmp_path, monkeypatch):
    cow, fsync = targets.Cow(*overlay_of(targets, tmp_path)), os.fsync
    cow._mark(cow.blocks(8192, 512))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: fsync(999))
        assert error_of(asyncio.run, flush_with_fsync(cow)) == errno.EBADF
    patched(cow.path, targets.MARKS_AT + 16, targets.BASE)
    assert [error_of(asyncio.run, flush_with_fsync(cow)) for _ in range(2)] == [errno.EIO, 0]
    assert list(cow.runs(8192, 512)) == [(False, 8192, 512)]
    cow.close()


def test_a_header_counts_as_the_disk_has_it(targets, tmp_path, monkeypatch):
    """The page cache alone has that of a start which could not sync it."""
    base, overlay = map(Path, overlay_of(targets, tmp_path))
    start_machine_anew(targets, overlay)
    old, sync, pwrite, written = overlay.read_bytes()[:4096], os.fdatasync, os.pwrite, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: sync(fd if overlay.read_bytes()[:4096] == old else 999))
        assert error_of(targets.Cow, str(base), str(overlay)) == errno.EBADF
    gc.collect()
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: patched(overlay, 0, old))
    note = lambda fd, *words: written.append((words[1], fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC))  # noqa: E731
    monkeypatch.setattr(os, "pwrite", lambda *words: note(*words) or pwrite(*words))
    cow = targets.Cow(str(base), str(overlay))
    assert written[-1] == (0, os.O_DSYNC)
    cow.close()


def test_marks_that_a_commit_could_not_clear_count(targets, tmp_path, monkeypatch):
    """The page cache alone has none, and may drop that: a write relies on what the disk has."""
    base, overlay = map(Path, overlay_of(targets, tmp_path))
    marks_of = lambda: overlay.read_bytes()[targets.MARKS_AT:][:4096]           # noqa: E731
    old, fsync = marks_of(), os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: fsync(fd if marks_of() == old else 999))
        assert error_of(lambda: targets.Cow(str(base), str(overlay), commit=True)) == errno.EBADF
    gc.collect()
    evict = lambda _, start, length, how: length or patched(overlay, targets.MARKS_AT, old)     # noqa: E731
    monkeypatch.setattr(os, "posix_fadvise", evict)
    cow = targets.Cow(str(base), str(overlay))
    assert list(cow.runs(1536, 512)) == [(True, 1536, 512)]
    cow.close()


def test_a_flush_hears_of_a_sync_that_fails_between_its_two(targets, tmp_path, monkeypatch):
    """Another queue's, of which a flush there has told: what was noted as kept might not be durable."""
    cow = targets.Cow(*overlay_of(targets, tmp_path))
    cow._mark(cow.blocks(8192, 512))
    keep = cow._keep

    def keep_beside_a_failure(fresh):
        keep(fresh)
        cow.top.sync.note_failure(errno.EIO)
        cow.top.told += 1
    with monkeypatch.context() as patch:
        patch.setattr(cow, "_keep", keep_beside_a_failure)
        assert error_of(asyncio.run, flush_with_fsync(cow)) == errno.EIO
    assert error_of(asyncio.run, flush_with_fsync(cow)) == 0
    cow.close()


@pytest.mark.parametrize("kind, name", [("Cow", "write"), ("Cow", "write_zeroes"), ("Loop", "write_zeroes")])
def test_who_changes_a_file_beside_syncs_that_fail_hears_of_it(targets, tmp_path, monkeypatch, kind, name):
    """Where flushes, too, have told of it by then, no later one does."""
    base, overlay = overlay_of(targets, tmp_path)
    disk = targets.Cow(base, overlay) if kind == "Cow" else targets.Loop(base)
    file = disk.top if kind == "Cow" else disk

    def beside(*_):
        file.sync.note_failure(errno.EIO)
        file.told += 1

    async def punch(*_):
        beside()
        if kind == "Loop":
            raise OSError(errno.EOPNOTSUPP, "no holes")
    monkeypatch.setattr(file, "write", beside)
    monkeypatch.setattr(file, "store", lambda *_: None)
    monkeypatch.setattr(ublk, "uring_fallocate", punch)
    what = [bytes(512)] if name == "write" else [512, True]
    assert error_of(asyncio.run, getattr(disk, name)(0, *what)) == errno.EIO
    disk.close()


async def flush_with_fsync(cow):
    """Flush an overlay without a queue's ring."""
    async def flush():
        os.fsync(cow.top.fd)
    cow.top.sync.flush = flush
    await cow.flush()


def test_a_read_that_ends_early_is_gone_on_with(targets, tmp_path, monkeypatch):
    """So it ends before a block that cannot be read, and the next read fails."""
    base, overlay = overlay_of(targets, tmp_path)
    killed = targets.Cow(base, overlay)
    killed._mark(killed.blocks(1 << 19, 512))
    killed.top.close()
    killed.below.close()
    zones, copy = str(tmp_path / "zones"), tmp_path / "copy"
    targets.Zoned(file=zones, size=4 << 20, zone_size=4096).close()
    pread = os.pread
    with monkeypatch.context() as patch, open(base) as source, open(copy, "w+b") as target:
        patch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 512), at))
        cow = targets.Cow(base, overlay)
        assert cow._unkept() == {(1024, 1025)}
        assert len(list(cow.runs(0, 1 << 20))) == 5
        cow.close()
        committed = targets.Cow(base, overlay, commit=True)
        targets.make_same(source.fileno(), target.fileno(), 0, 1 << 20)
        zoned = targets.Zoned(file=zones)
    committed.close()
    zoned.close()
    assert len(zoned.zones) == 1024
    start = b"b" * 1536 + b"o" * 1536
    content = start.ljust(1 << 19, b"b") + bytes(512)
    assert Path(base).read_bytes() == copy.read_bytes() == content.ljust(1 << 20, b"b")
    targets.Cow(base, overlay).close()


def test_an_overlay_has_one_server(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    assert "another server uses it" in message(targets.Cow, base, overlay)
    cow.close()
    targets.Cow(base, overlay).close()


def test_of_two_flushes_at_once_each_waits_for_the_marks(targets, tmp_path):
    class Pause:
        failures = 0

        def __call__(self, *_):
            return self

        def __await__(self):
            yield
    cow = targets.Cow(*overlay_of(targets, tmp_path))
    written = cow.blocks(0, 512)
    cow._mark(written)
    cow.top.sync = Pause()
    first, second = cow.flush(), cow.flush()
    first.send(None)                    # makes data durable
    second.send(None)
    second.send(None)                   # is about to make the marks durable, while the first is behind
    assert cow._marks(written) == targets.KEPT
    now(second)
    first.send(None)
    now(first)
    assert not cow.fresh
    cow.close()


def test_the_end_of_an_overlay_makes_its_data_durable_and_then_its_marks(targets, tmp_path, monkeypatch):
    cow, seen = targets.Cow(*overlay_of(targets, tmp_path)), []
    written, top = cow.blocks(0, 512), cow.top.fd
    cow._mark(written)
    monkeypatch.setattr(os, "fdatasync", lambda fd: seen.append((fd, cow._marks(written))))
    cow.close()
    assert seen == [(top, targets.OURS), (top, targets.KEPT)]


def test_an_overlay_whose_end_fails_is_there_for_the_next_server(targets, tmp_path, monkeypatch):
    """Though its program goes on, and has the target still."""
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: os.pread(-1, 1, 0))
        assert error_of(cow.close) == errno.EBADF
    targets.Cow(base, overlay).close()


def kill_overlays(directory, rounds, progress=bool):
    """Kill servers of an overlay at random moments, also while they start; return what was written."""
    base, overlay = directory / "base.img", directory / "overlay.cow"
    base.write_bytes(random.randbytes(4 << 20))
    content, early = base.read_bytes(), 0
    writers = Writers(content)
    for number in range(rounds):
        with Forked("cow", base, overlay).live() as disk:
            writers.work(disk.path)
            before = writers.done
            until(lambda before=before: writers.done > before, "something to be written")
            time.sleep(random.random() / 4)
            disk.kill()
            writers.finish()
        delete_all()
        if random.random() < 0.5:
            disk = Forked("cow", base, overlay)
            time.sleep(random.random() / 4)
            early += not disk.said(disk.output)
            disk.kill()
            delete_all()
        with Forked("cow", base, overlay) as disk:
            writers.check(disk.path)
        progress(number)
    assert base.read_bytes() == content
    with Forked("cow", base, overlay, "--commit") as disk:
        assert digest(disk.path) == hashlib.sha256(writers.expected).hexdigest()
    assert base.read_bytes() == writers.expected
    return {"writes": writers.done, "killed while starting": early}


def delete_all():
    """Delete every device."""
    with ublk.Control() as control:
        for dev_id in devices_left():
            ublk.delete(control, dev_id, control.get_dev_info(dev_id).ublksrv_flags)


@kernel
def test_an_overlay_survives_kills_at_random_moments(workshop):
    (workshop / "kills").mkdir()
    assert kill_overlays(workshop / "kills", 6)["writes"] > 10


def server_dies_in(item, method):
    """Serve an overlay, write a block and flush; the server dies in a method it calls meanwhile."""
    change = lambda: replace(item, **{method: lambda *_: die()})        # noqa: E731
    with Forked("cow", "base.img", "x.cow", "--no-partition-scan", change=change) as disk:
        with opened(disk.path) as fd:
            assert error_of(write_at, fd, 8192, b"x" * 4096) or error_of(os.fsync, fd)
        disk.wait()
    delete_all()


@kernel
@pytest.mark.parametrize("step", ["Loop.write", "Cow._mark"])
def test_an_overlay_has_no_block_before_its_data(targets, workshop, step):
    name, method = step.split(".")
    server_dies_in(getattr(targets, name), method)
    with Forked("cow", "base.img", "x.cow") as disk:
        assert digest(disk.path) == digest("base.img")


@kernel
def test_an_overlay_has_no_block_for_good_before_a_flush(targets, workshop):
    server_dies_in(targets.Loop, "flush")
    shutil.copy("x.cow", "y.cow")
    start_machine_anew(targets, workshop / "y.cow")
    with Forked("cow", "base.img", "y.cow") as disk:
        assert digest(disk.path) == digest("base.img")
    for _ in range(2):                              # nothing is lost without a loss of power, nor later
        with Forked("cow", "base.img", "x.cow") as disk, opened(disk.path) as fd:
            assert read_at(fd, 8192, 4096) == b"x" * 4096
        start_machine_anew(targets, workshop / "x.cow")


@kernel
def test_what_an_overlay_has_flushed_survives_a_loss_of_power(targets, tmp_path):
    base, data = tmp_path / "base.img", os.urandom(4096)
    base.write_bytes(bytes(1 << 20))
    below = Volatile(bytes(16 << 20))
    with ublk.Device(below) as lower:
        sh(*MKFS["ext4"], lower.path)
        with mount_of(lower.path, tmp_path / "mnt") as directory, \
                ublk.Device(targets.Cow(str(base), f"{directory}/x.cow")) as disk, opened(disk.path) as fd:
            write_at(fd, 8192, data)
            os.fsync(fd)
            left = bytes(below.durable)
    with ublk.Device(Volatile(left)) as lower, mount_of(lower.path, tmp_path / "mnt") as directory:
        start_machine_anew(targets, directory / "x.cow")
        with ublk.Device(targets.Cow(str(base), f"{directory}/x.cow")) as disk, opened(disk.path) as fd:
            assert read_at(fd, 8192, 4096) == data


@contextmanager
def overlay_over(below, tmp_path):
    """Give the server of an overlay in a file system over a disk that is to fail."""
    base = tmp_path / "base.img"
    base.write_bytes(bytes(1 << 20))
    with ublk.Device(below) as lower:
        sh(*MKFS["ext4"], lower.path)
        with mount_of(lower.path, tmp_path / "mnt") as directory:
            yield Forked("cow", base, directory / "x.cow", "-r", "requeue").live()


@kernel
def test_a_client_hears_of_what_could_not_be_written_while_an_overlay_had_no_server(targets, tmp_path):
    """The kernel tells each opening of it once: not the start of the next server, or all would go well."""
    class Spoilt(targets.Fault):
        def match(self, name, offset, length, data):
            return data is not None and b"y" * 4096 in bytes(data)
    below = Spoilt(targets.Ram(size=64 << 20), on="write", error="EIO")
    with overlay_over(below, tmp_path) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 8192, b"x" * 4096)
            os.fsync(fd)
            write_at(fd, 8192, b"y" * 4096)
            disk.kill()
            disk = recovered(disk)
            assert [error_of(os.fsync, fd) for _ in range(3)] == [errno.EIO, errno.EIO, 0]
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_block_is_marked_again_where_its_mark_could_not_be_written(targets, tmp_path):
    """Or its next write would be gone with the page cache, and a flush of that go well."""
    class Spoilt(targets.Fault):
        def match(self, name, offset, length, data):
            return failing and data is not None and {0} < set(bytes(data)) <= {0, 1, 2}
    failing = []
    below = Spoilt(targets.Ram(size=64 << 20), on="write", error="EIO")
    with overlay_over(below, tmp_path) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)    # where ext4 fails to write a hole, it writes nothing later
            os.fsync(fd)
            write_at(fd, 8192, b"x" * 4096)
            failing.append(True)
            assert error_of(os.fsync, fd) == errno.EIO
            failing.clear()
            write_at(fd, 8192, b"y" * 4096)
            disk.kill()
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            disk = recovered(disk)
            os.fsync(fd)
            assert read_at(fd, 8192, 4096) == b"y" * 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_commit_leaves_out_no_block_that_it_cannot_read(targets, tmp_path):
    """The kernel gives what comes before such a block, and no error yet."""
    class Spoilt(targets.Fault):
        def match(self, name, offset, length, data):
            return failing and offset <= bad < offset + length
    failing, ram, data = [], targets.Ram(size=64 << 20), os.urandom(64 << 10)
    with overlay_over(Spoilt(ram, on="read", error="EIO"), tmp_path) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, data)
        assert disk.kill(signal.SIGTERM) == 0
        sh("sync")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        bad = ram.memory.find(data[32 << 10:36 << 10])
        paths = str(tmp_path / "base.img"), str(tmp_path / "mnt/x.cow")
        failing.append(True)
        assert error_of(lambda: targets.Cow(*paths, commit=True)) == errno.EIO
        gc.collect()
        failing.clear()
        targets.Cow(*paths, commit=True).close()
    assert (tmp_path / "base.img").read_bytes() == data.ljust(1 << 20, b"\0")


@kernel
def test_the_changes_in_an_overlay_reach_the_base_when_they_are_committed(workshop):
    shutil.copy("base.img", "mine.img")
    data = os.urandom(64 << 10)
    with Forked("cow", "mine.img", "mine.cow") as disk, opened(disk.path) as fd:
        write_at(fd, 1 << 20, data)
    assert digest("mine.img") == digest("base.img")
    with Forked("cow", "mine.img", "mine.cow", "--commit") as disk, opened(disk.path) as fd:
        assert read_at(fd, 1 << 20, len(data)) == data
    base = Path("base.img").read_bytes()
    committed = base[:1 << 20] + data + base[(1 << 20) + len(data):]
    assert Path("mine.img").read_bytes() == committed
    with Forked("cow", "mine.img", "mine.cow") as disk, opened(disk.path) as fd:
        assert content_of(fd) == committed


@kernel
def test_the_changes_in_an_overlay_go_with_it(workshop):
    with Forked("cow", "base.img", "x.cow") as disk, opened(disk.path) as fd:
        write_at(fd, 1 << 20, os.urandom(64 << 10))
    os.unlink("x.cow")
    with Forked("cow", "base.img", "x.cow") as disk:
        assert digest(disk.path) == digest("base.img")


@kernel
def test_a_recovered_server_does_not_commit_again(workshop):
    shutil.copy("base.img", "mine.img")
    words = "fault --delay 1us cow mine.img mine.cow --commit -r reissue".split()
    with Forked(*words) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
        disk.kill()
        disk = recovered(disk)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == b"x" * 4096
        assert disk.kill(signal.SIGTERM) == 0
    assert digest("mine.img") == digest("base.img")


@kernel
def test_an_overlay_without_room_fails_writes_only(workshop, tmp_path):
    with mount_of("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=1M") as directory:
        with Forked("cow", "base.img", directory / "x.cow") as disk, opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
            assert error_of(write_at, fd, 2 << 20, os.urandom(1 << 20)) == errno.ENOSPC
            base = Path("base.img").read_bytes()
            for offset in (1 << 20, 7 << 20):       # their marks lie in pages the file system has no more
                assert read_at(fd, offset, 4096) == base[offset:][:4096]
            assert read_at(fd, 0, 8192) == b"x" * 4096 + base[4096:8192]
            assert disk.ended() is False
