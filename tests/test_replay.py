# SPDX-License-Identifier: MIT
"""Companion: recordings and what they tell."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Forked,
    Recorder,
    assert_fails,
    damage,
    digest,
    error_of,
    fio_verify,
    kernel,
    message,
    mount_of,
    needs,
    now,
    opened,
    patched,
    sh,
    until,
    write_at,
)
from tests.test_async import NopQueue, StandIn, serve


class Log:
    """A recorded disk in memory: the log, and what the disk contained after each of its entries."""

    def __init__(self, targets, path, size=1 << 20):
        self.path, self.targets = path, targets
        self.disk = targets.Record(str(path), targets.Ram(size=size))
        self.disk.target.write_fua = self.disk.target.write     # also where it gets a flush later
        self.states = [bytes(size)]

    def do(self, name, *args):
        now(getattr(self.disk, name)(*args))
        self.states.append(bytes(self.disk.target.memory))

    def some(self):
        """Do something of everything."""
        for at in (0, 8192, 4096):
            self.do("write", at, memoryview(os.urandom(8192)))
        for name, *args in (("flush",), ("discard", 4096, 4096), ("write_zeroes", 512, 1024, False)):
            self.do(name, *args)
        self.do("write", 0, memoryview(os.urandom(512)))
        now(self.disk.close())
        return self


@pytest.fixture
def log(targets, tmp_path):
    return Log(targets, tmp_path / "log").some()


def test_replay_rebuilds_the_disk_after_every_entry(run, log, tmp_path):
    for number, state in enumerate(log.states):
        path = tmp_path / f"disk{number}"
        assert run("replay", log.path, path, "--to", number).status == 0
        assert path.read_bytes() == state
    assert run("replay", log.path, tmp_path / "last").status == 0
    assert (tmp_path / "last").read_bytes() == log.states[-1]


def test_replay_lists_the_entries(run, log):
    lines = [line.split() for line in run("replay", log.path).out.splitlines()]
    assert [line[:2] for line in lines] == [[str(number + 1), kind] for number, kind in enumerate(
        ["write", "write", "write", "flush", "discard", "write_zeroes", "write"])]
    assert lines[1][2:] == ["8192", "8192"]


def test_replay_begins_with_a_base(run, targets, tmp_path):
    base = os.urandom(1 << 20)
    (tmp_path / "base").write_bytes(base)
    disk = targets.Record(str(tmp_path / "log"), targets.Ram(size=1 << 20))
    now(disk.write(4096, memoryview(b"x" * 4096)))
    now(disk.close())
    assert run("replay", tmp_path / "log", tmp_path / "disk", "--base", tmp_path / "base").status == 0
    assert (tmp_path / "disk").read_bytes() == base[:4096] + b"x" * 4096 + base[8192:]


def test_a_base_larger_than_the_recorded_disk_is_refused(run, log, tmp_path):
    (tmp_path / "base").write_bytes(bytes((1 << 20) + 512))
    done = run("replay", log.path, tmp_path / "disk", "--base", tmp_path / "base")
    assert_fails(done, 1, "larger than the recorded disk of 1048576 bytes", errno.EINVAL)
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("name, args", [("write_zeroes", (0, 4096, True)), ("discard", (0, 4096))])
def test_a_recording_of_what_its_target_cannot_do_is_no_success(targets, tmp_path, name, args):
    """As where a subclass has a handler for it."""
    class Plain(ublk.Target):
        size = 1 << 20

    disk = targets.Record(str(tmp_path / "log"), Plain())
    assert error_of(now, disk.call(name, *args)) == errno.EOPNOTSUPP
    now(disk.close())


@pytest.mark.parametrize("name, args", [
    ("write", (0, memoryview(b"x" * 512))), ("write_fua", (0, memoryview(b"x" * 512))), ("flush", ()),
    ("discard", (0, 4096)), ("write_zeroes", (0, 4096, True))])
def test_a_change_is_logged_once_it_is_done(targets, tmp_path, name, args):
    class Watching(Recorder):
        """Notes how long the log is whenever it has done something."""

    def watched(self, *args):
        getattr(Recorder, name)(self, *args)
        lengths.append(os.path.getsize(log))
    setattr(Watching, name, watched)
    log, lengths = tmp_path / "log", []
    disk = targets.Record(str(log), Watching())
    before = os.path.getsize(log)
    now(getattr(disk, name)(*args))
    assert lengths == [before] and os.path.getsize(log) > before
    now(disk.close())


def test_a_log_is_continued_and_what_a_kill_cut_off_is_left_out(run, targets, log, tmp_path):
    os.truncate(log.path, os.path.getsize(log.path) - 100)
    assert run("replay", log.path, tmp_path / "cut").status == 0
    assert (tmp_path / "cut").read_bytes() == log.states[-2]
    disk = targets.Record(str(log.path), targets.Ram(size=1 << 20))
    now(disk.write(0, memoryview(b"y" * 512)))
    now(disk.close())
    assert run("replay", log.path, tmp_path / "more").status == 0
    assert (tmp_path / "more").read_bytes() == b"y" * 512 + log.states[-2][512:]


@pytest.mark.parametrize("cut, says", [(0, []), (1, [6]), (511, [6]), (512, [6]), (513, [6])])
def test_replay_says_where_a_log_is_cut_off(run, log, cut, says):
    os.truncate(log.path, os.path.getsize(log.path) - cut)
    done = run("replay", log.path)
    assert done.status == 0
    assert done.err.splitlines() == [
        f"ublk: {log.path} is cut off after entry {last}: the rest is left out" for last in says]


def test_a_log_knows_how_large_its_disk_has_been(run, targets, tmp_path):
    log, image = tmp_path / "log", tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk, page = targets.Record(str(log), targets.Loop(str(image))), memoryview(os.urandom(4096))
    for size in (2 << 20, 1 << 20):
        disk.resized(size)
        assert disk.size == disk.target.size == size
    disk.target.write = lambda offset, buffer: patched(image, offset, buffer)
    now(disk.write((2 << 20) - 4096, page))
    now(disk.close())
    now(targets.Record(str(log), targets.Loop(str(image))).close())     # as a server that recovers it does
    assert run("replay", log, tmp_path / "copy").status == 0
    assert (tmp_path / "copy").read_bytes() == bytes((2 << 20) - 4096) + page == image.read_bytes()


def test_the_log_of_a_disk_that_has_grown_is_continued_by_its_next_server(targets, log):
    """Which makes its target by the words of old, and learns of the disk's size only then."""
    size = targets.Log(log.path).header()[0]
    for _ in range(2):
        disk = targets.Record(log.path, ublk.Null(size=size))
        disk.resized(2 * size)
        now(disk.close())
        assert targets.Log(log.path).header()[0] == 2 * size
    disk = targets.Record(log.path, ublk.Null(size=size))
    now(disk.start(0))
    now(disk.close())
    assert targets.Log(log.path).header()[0] == 2 * size


def test_a_damaged_log_is_an_error_and_good_up_to_there(run, targets, log, tmp_path):
    with closing(targets.Log(log.path)) as file:
        third = list(file.entries())[2]
    for number, at in (("data", third.end - 1), ("head", third.end + 5)):       # of the 3rd, of the 4th
        path = shutil.copy(log.path, tmp_path / number)
        damage(path, at, bytes([Path(path).read_bytes()[at] ^ 0xff]))
        done = run("replay", path, tmp_path / f"{number}.disk")
        last = 2 if number == "data" else 3
        assert_fails(done, 1, f"--to {last}", errno.EINVAL)
        assert run("replay", path, tmp_path / f"{number}.good", "--to", last).status == 0
        assert (tmp_path / f"{number}.good").read_bytes() == log.states[last]


@pytest.mark.parametrize("words, status, text", [
    ("LOG --check {}", 2, "--check needs a disk"), ("LOG DISK --check true", 2, "{} in its command"),
    ("LOG DISK --check=", 2, "{} in its command"), ("", 2, "log"), ("/no/such disk", 1, "/no/such"),
    ("LOG DISK --to -1", 2, "--to"), ("LOG DISK --to x", 2, "--to"), ("LOG DISK --every day", 2, "--every"),
    ("LOG LOG", 1, "LOG"), ("LOG DISK --base /no/such", 1, "/no/such"), ("EMPTY DISK", 1, "not a log"),
    ("LOG DISK --base /dev/zero", 1, "/dev/zero: neither a file"), ("JUNK DISK", 1, "not a log"),
    ("/dev/zero DISK", 1, "not a log")])
def test_replay_of_what_cannot_be(run, log, tmp_path, words, status, text):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "JUNK").write_bytes(os.urandom(100))
    names = {"LOG": log.path, **{name: tmp_path / name for name in ("DISK", "EMPTY", "JUNK")}}
    text = text.replace("LOG", str(log.path))
    assert_fails(run("replay", *[names.get(word, word) for word in words.split()]), status, text)


def test_a_recording_that_cannot_be(run, log, tmp_path):
    assert_fails(run("record", log.path, "ram", "--size", "2M"), 1, "the log of a disk of 1048576 bytes")
    assert_fails(run("record", tmp_path, "ram"), 1, f"{tmp_path}: neither a file", errno.EINVAL)
    os.mkfifo(tmp_path / "PIPE")
    assert_fails(run("record", tmp_path / "PIPE", "ram"), 1, "neither a file", errno.EINVAL)
    assert_fails(run("record", tmp_path / "x", "zoned"), 1, "zones", errno.EINVAL)
    assert run("record", tmp_path / "y").status == 2
    (tmp_path / "JUNK").write_bytes(os.urandom(100))
    assert_fails(run("record", tmp_path / "JUNK", "ram"), 1, "not a log", errno.EINVAL)
    assert len((tmp_path / "JUNK").read_bytes()) == 100


def test_a_log_begins_where_a_link_says(targets, tmp_path):
    (tmp_path / "link").symlink_to("log")
    Log(targets, tmp_path / "link").some()
    with closing(targets.Log(tmp_path / "log")) as log:
        assert len(list(log.entries())) == 7


@contextmanager
def no_room_in(path):
    """Have files end a little after the present end of this one."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 1000, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_recording_without_room_ends_aloud_and_with_it_the_changes_of_the_disk(
        run, targets, tmp_path, capfd):
    log = Log(targets, tmp_path / "log")
    log.do("write", 0, memoryview(b"1" * 4096))
    whole = log.path.read_bytes()
    with no_room_in(log.path):
        assert error_of(now, log.disk.write(8192, memoryview(b"2" * 4096))) == errno.ENOSPC
    before = bytes(log.disk.target.memory)
    assert error_of(now, log.disk.write(4096, memoryview(b"3" * 512))) == errno.ENOSPC
    assert error_of(now, log.disk.flush()) == errno.ENOSPC
    head = targets.LOG_HEADER.size
    assert bytes(log.disk.target.memory) == before and log.path.read_bytes()[head:] == whole[head:]
    assert capfd.readouterr().err == (
        f"ublk: {log.path} ends: no room for it: from now on all changes of the disk fail\n")
    now(log.disk.close())
    assert run("replay", log.path, tmp_path / "disk").status == 0
    assert (tmp_path / "disk").read_bytes() == log.states[1]
    assert_is_not_continued(targets, log)


def assert_is_not_continued(targets, log):
    before = log.path.read_bytes()
    said = message(targets.Record, str(log.path), targets.Ram(size=1 << 20))
    assert "it may lack changes of the disk (22 EINVAL): record to another one" in said
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("end", ["close", "kill", "fsync"])
def test_a_log_is_continued_after_a_loss_of_power_where_its_server_had_ended_in_order(
        targets, tmp_path, monkeypatch, end):
    """Else the machine may have had changes of the disk durable, and not their entries."""
    log = Log(targets, tmp_path / "log")
    now(log.disk.start(0))
    log.do("write", 0, memoryview(b"1" * 4096))
    if end == "close":
        now(log.disk.close())
    elif end == "fsync":
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: os.close(-1))
            assert error_of(now, log.disk.close()) == errno.EBADF
    del log.disk
    gc.collect()
    monkeypatch.setattr(targets, "boot_id", lambda: b"another".ljust(36))
    if end != "close":
        assert_is_not_continued(targets, log)
        monkeypatch.undo()
    if end == "fsync":                                      # the machine may have dropped it already
        assert_is_not_continued(targets, log)
    else:
        now(targets.Record(str(log.path), targets.Ram(size=1 << 20)).close())


@pytest.mark.parametrize("end", ["close", "failure"])
def test_a_log_is_complete_only_where_its_target_has_ended_well(targets, tmp_path, monkeypatch, end):
    """It may have failed to keep what the log has."""
    log = Log(targets, tmp_path / "log")
    now(log.disk.start(0))
    if end == "failure":
        log.disk.target.close = lambda: os.close(-1)
    assert error_of(now, log.disk.close()) == (errno.EBADF if end == "failure" else 0)
    if end == "failure":
        assert_is_not_continued(targets, log)
    else:
        monkeypatch.setattr(targets, "boot_id", lambda: b"another".ljust(36))
        now(targets.Record(str(log.path), targets.Ram(size=1 << 20)).close())


def test_nothing_is_recorded_over_a_cache(targets, tmp_path):
    """It loses what the log has at a kill or a cut, and the next flush would make that durable."""
    cache = targets.Cache(targets.Ram(size=1 << 20))
    for target in (cache, targets.Fault(cache)):
        told = message(targets.Record, str(tmp_path / "log"), target)
        assert "the cache below it may lose what the log has" in told
    assert not (tmp_path / "log").exists()
    targets.Cache(targets.Record(str(tmp_path / "log"), targets.Ram(size=1 << 20)))


def test_a_change_that_there_is_no_memory_to_log_ends_the_recording(targets, tmp_path, monkeypatch):
    """Its log was called complete, and went on without it."""
    log = Log(targets, tmp_path / "log")
    now(log.disk.start(0))
    with monkeypatch.context() as patch:
        patch.setattr(log.disk.log, "append", lambda *_: [0] * (1 << 60))
        assert error_of(now, log.disk.write(0, memoryview(b"x" * 512))) == errno.ENOSPC
    assert error_of(now, log.disk.flush()) == errno.ENOSPC
    now(log.disk.close())
    assert_is_not_continued(targets, log)


def test_a_recording_that_has_ended_writes_to_no_file_that_has_its_number(targets, tmp_path):
    """As where its disk is served again, or a thread sets a mark too late."""
    log = Log(targets, tmp_path / "log")
    number = log.disk.log.fd
    with open(tmp_path / "other", "w+b", buffering=0) as other:
        other.write(b"somebody's")
        now(log.disk.close())
        os.dup2(other.fileno(), number)
        for late in (lambda: now(log.disk.start(0)),
                     lambda: now(log.disk.write(0, memoryview(b"x" * 512)))):
            with pytest.raises(ValueError, match="closed file"):
                late()
        assert "nobody records to it" in message(log.disk.mark, "late")
        assert (tmp_path / "other").read_bytes() == b"somebody's"
    os.close(number)


def mark_meanwhile(mark):
    """Have a forked child mark a log: go on once it has, or is kept waiting; return it."""
    child = os.fork()
    if child == 0:
        mark("here")
        os._exit(0)
    for _ in range(15):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.02)
    return child


def test_a_mark_that_comes_as_an_entry_finds_no_room_stays(run, targets, tmp_path, monkeypatch):
    log, pwritev, pid, marking = Log(targets, tmp_path / "log"), os.pwritev, os.getpid(), []

    def cut_short(fd, buffers, *how):
        if os.getpid() == pid:
            marking.append(mark_meanwhile(partial(targets.mark, str(log.path))))
            del buffers[1:]
        return pwritev(fd, buffers, *how)
    monkeypatch.setattr(os, "pwritev", cut_short)
    assert error_of(now, log.disk.write(0, memoryview(b"x" * 512))) == errno.ENOSPC
    os.waitpid(marking[0], 0)
    assert run("replay", log.path).out.split() == ["1", "mark", "0", "4", "here"]


def test_a_flush_that_begins_as_an_entry_finds_no_room_is_for_nothing_that_comes_later(
        run, targets, tmp_path, monkeypatch):
    """Of another queue; it may as well hear that the recording has ended."""
    log, pwritev, flushed = Log(targets, tmp_path / "log"), os.pwritev, []

    async def pause(*_):
        await Pause()

    log.disk.target.flush = pause
    flushing, writing = log.disk.flush(), log.disk.write(8192, memoryview(b"y" * 512))
    begin = threading.Thread(target=lambda: flushed.append(error_of(flushing.send, None)))

    def cut_short(fd, buffers, *how):
        monkeypatch.undo()
        count = pwritev(fd, [buffers[0], buffers[1][:2048]], *how)
        begin.start()
        begin.join(0.2)
        return count
    write, log.disk.target.write = log.disk.target.write, pause
    writing.send(None)
    log.disk.target.write = write
    monkeypatch.setattr(os, "pwritev", cut_short)
    assert error_of(now, log.disk.write(0, memoryview(b"x" * 4096))) == errno.ENOSPC
    begin.join()
    begun = [writing, flushing] if flushed == [0] else [writing]
    for request in begun:
        with pytest.raises(StopIteration):
            request.send(None)
    lines = [line.split()[1:3] for line in run("replay", log.path).out.splitlines()]
    assert lines == [["write", "8192"], ["flush", "0"]][:len(begun)]


def test_a_mark_that_a_forked_child_sets_as_an_entry_is_written_comes_behind_it(
        run, targets, tmp_path, monkeypatch):
    """As where another thread writes the entry: what it holds in the child is never let go."""
    log, pwritev, pid, marking = Log(targets, tmp_path / "log"), os.pwritev, os.getpid(), []

    def late(*words):
        if os.getpid() == pid:
            marking.append(mark_meanwhile(log.disk.mark))
        return pwritev(*words)
    monkeypatch.setattr(os, "pwritev", late)
    log.do("write", 0, memoryview(b"x" * 512))
    try:
        until(lambda: os.waitid(os.P_PID, marking[0], os.WEXITED | os.WNOHANG | os.WNOWAIT), "the mark")
    finally:
        os.kill(marking[0], signal.SIGKILL)
        os.waitpid(marking[0], 0)
    assert [line.split()[1] for line in run("replay", log.path).out.splitlines()] == ["write", "mark"]


def test_a_mark_that_waits_for_a_server_that_is_killed_in_an_entry_is_refused(targets, log):
    """Behind half an entry nobody would find it, and no server could continue the log."""
    ready, tell = os.pipe()
    refused, before = [], log.path.read_bytes()
    server = os.fork()
    if server == 0:
        disk = targets.Record(str(log.path), targets.Ram(size=1 << 20))
        with disk.log.growing():
            os.pwrite(disk.log.fd, b"half an entry", os.path.getsize(log.path))
            os.write(tell, b"!")
            signal.pause()
    os.read(ready, 1)
    marking = threading.Thread(target=lambda: refused.append(message(targets.mark, str(log.path), "here")))
    marking.start()
    waiting = re.compile(rf"->.*:{log.path.stat().st_ino} ")
    until(lambda: waiting.search(Path("/proc/locks").read_text()), "its wait for the lock")
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    marking.join()
    assert "nobody records to it" in refused[0]
    assert log.path.read_bytes() == before + b"half an entry"
    os.close(ready)
    os.close(tell)


def test_a_mark_that_comes_as_a_log_is_continued_stays(run, targets, log, monkeypatch):
    def entries(self, call=targets.Log.entries):
        yield from call(self)
        marking.append(mark_meanwhile(partial(targets.mark, str(log.path))))

    marking, before = [], run("replay", log.path).out
    with monkeypatch.context() as patch:
        patch.setattr(targets.Log, "entries", entries)
        disk = targets.Record(str(log.path), targets.Ram(size=1 << 20))
    os.waitpid(marking[0], 0)
    now(disk.close())
    assert run("replay", log.path).out.replace(before, "").split() == ["8", "mark", "0", "4", "here"]


def test_a_write_is_torn_between_the_blocks_of_the_disk_as_it_is_served(targets, tmp_path):
    disk = targets.Record(str(tmp_path / "log"), targets.Ram(size=16384))
    disk.block_size = 4096                          # as --block-size does
    now(disk.start(0))
    now(disk.write(0, memoryview(b"a" * 8192)))
    now(disk.close())
    assert {found_in(crash)[:16] for crash in targets.crashes(tmp_path / "log", states=50)} == {
        b"a" * 16, b"a" * 8 + bytes(8), bytes(8) + b"a" * 8, bytes(16)}


def test_what_a_mark_says_is_listed_in_one_line(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    log.disk.mark("one\ntwo\x1b[2J")
    assert run("replay", log.path).out.split() == ["1", "mark", "0", "11", r"one\ntwo\x1b[2J"]
    now(log.disk.close())


def test_a_log_has_a_limit_and_holds_all_that_was_done_until_then(run, targets, tmp_path):
    disk = targets.Record(str(tmp_path / "log"), targets.Ram(size=1 << 20), limit=20000)
    errors = [error_of(now, disk.write(4096 * number, memoryview(b"x" * 4096))) for number in range(20)]
    assert errors == [0] * 5 + [errno.ENOSPC] * 15
    now(disk.close())
    assert run("replay", tmp_path / "log", tmp_path / "again").status == 0
    assert (tmp_path / "again").read_bytes() == bytes(disk.target.memory)


def test_a_change_that_failed_is_in_the_log_as_such(run, targets, tmp_path):
    class Failing(Recorder):
        def write(self, offset, buffer):
            raise OSError(errno.ENOSPC, "no room")

        def flush(self):
            raise RuntimeError("no errno")

        def discard(self, offset, length):
            raise socket.gaierror(socket.EAI_NONAME, "no errno either")

        def write_zeroes(self, offset, length, unmap):
            raise asyncio.CancelledError

    disk = targets.Record(str(tmp_path / "log"), Failing())
    assert error_of(now, disk.write(4096, memoryview(b"x" * 512))) == errno.ENOSPC
    with pytest.raises(RuntimeError):
        now(disk.flush())
    with pytest.raises(socket.gaierror):
        now(disk.discard(0, 512))
    with pytest.raises(asyncio.CancelledError):
        now(disk.write_zeroes(0, 512, True))
    now(disk.close())
    lines = [line.split() for line in run("replay", tmp_path / "log").out.splitlines()]
    assert lines == [["1", "write", "4096", "512", "ENOSPC"], ["2", "flush", "1", "0", "EIO"],
                     ["3", "discard", "0", "512", "EIO"], ["4", "write_zeroes", "0", "512", "ECANCELED"]]


@pytest.fixture
def failed(targets, tmp_path):
    """A log in which a write of two sectors failed, and after that something was flushed."""
    log = Log(targets, tmp_path / "log")
    write, log.disk.target.write = log.disk.target.write, error
    assert error_of(now, log.disk.write(0, memoryview(b"x" * 1024))) == errno.EIO
    log.disk.target.write = write
    for name, *args in (("write", 4096, memoryview(b"y" * 512)), ("flush",), ("mark", "flushed")):
        getattr(log.disk, name)(*args) if name == "mark" else log.do(name, *args)
    now(log.disk.close())
    return log


def error(*_):
    raise OSError(errno.EIO, "bad sector")


def test_what_a_write_that_failed_left_may_be_anything_and_a_flush_makes_it_last(targets, failed):
    def found(crash):
        with open(crash.path, "rb") as disk:
            return disk.read(1024)[::512]

    before, after = set(), []
    for seed in range(30):
        some = list(map(lambda crash: (crash.mark, found(crash)),
                        targets.crashes(failed.path, states=4, seed=seed)))
        before |= {left for mark, left in some if not mark}
        after += [{left for mark, left in some if mark}]
    assert before == {b"xx", b"\0\0", b"x\0", b"\0x"} == set().union(*after)
    assert all(len(left) == 1 for left in after)


def begin_flush(log, flush, late):
    """Begin a flush that has a pause, and write before it or, late, in that; return what goes on with it."""
    log.disk.target.flush = flush
    if not late:
        now(log.disk.write(0, memoryview(b"x" * 512)))
    flushing = log.disk.flush()
    flushing.send(None)
    if late:
        now(log.disk.write(0, memoryview(b"x" * 512)))
    return flushing


@pytest.mark.parametrize("late", [False, True], ids=["before the flush", "in the flush"])
def test_what_was_written_when_a_flush_failed_may_be_lost_though_the_next_one_went_well(
        targets, tmp_path, late):
    """As who asks for it once more and goes on must learn. What was durable by itself is there."""
    async def flush():
        await Pause()
        error()

    log = Log(targets, tmp_path / "log", size=8192)
    flushing = begin_flush(log, flush, late)
    now(log.disk.call("write_fua", 2048, memoryview(b"z" * 512)))
    assert error_of(flushing.send, None) == errno.EIO
    log.disk.target.flush = lambda: None
    log.do("write", 4096, memoryview(b"y" * 512))
    log.do("flush")
    log.disk.mark("flushed")
    now(log.disk.close())
    found = {found_in(crash)[::4] for seed in range(10)
             for crash in targets.crashes(log.path, states=2, seed=seed) if crash.mark}
    assert found == {b"xzy\0", b"\0zy\0"}


@pytest.mark.parametrize("durable", [False, True], ids=["write", "write_fua"])
def test_what_is_being_written_as_a_flush_fails_may_be_lost_as_well(targets, tmp_path, durable):
    """As what the page cache has of it already. It is told of success all the same."""
    async def pause(*_):
        await Pause()

    log = Log(targets, tmp_path / "log", size=8192)
    log.disk.target.write = log.disk.target.write_fua = pause
    writing = log.disk.call("write_fua" if durable else "write", 0, memoryview(b"x" * 512))
    writing.send(None)
    log.disk.target.flush = error
    assert error_of(now, log.disk.flush()) == errno.EIO
    now(writing)
    log.disk.target.flush = lambda: None
    now(log.disk.flush())
    log.disk.mark("flushed")
    now(log.disk.close())
    found = {found_in(crash)[:1] for seed in range(10)
             for crash in targets.crashes(log.path, seed=seed) if crash.mark}
    assert found == ({b"x"} if durable else {b"x", b"\0"})


def test_a_log_that_ends_before_a_change_that_is_under_way_may_lack_it(targets, tmp_path, monkeypatch):
    """As of a cache that does not wait for ever for a target, which does what it has been told."""
    async def write(offset, buffer):
        Ram.write(below, offset, buffer)
        await asyncio.sleep(60)

    monkeypatch.setattr(ublk, "STOP_TIMEOUT", 0.1)
    path, Ram = str(tmp_path / "log"), targets.Ram
    below = Ram(size=1 << 20)
    disk = targets.Cache(targets.Record(path, below))
    now(disk.write(0, memoryview(b"x" * 512)))
    below.write = write
    assert error_of(lambda: asyncio.run(disk.close())) == errno.ETIMEDOUT
    gc.collect()        # or asyncio tells only as Python ends that nobody heard of the write's end
    with pytest.raises(ublk.UblkError, match="may lack changes"):
        targets.Record(path, below)


def test_replay_rebuilds_a_disk_some_of_whose_changes_failed(run, targets, tmp_path):
    """Of which nothing may be there."""
    log = Log(targets, tmp_path / "log")
    log.disk.target.discard = log.disk.target.write_zeroes = error
    log.do("write", 0, memoryview(b"x" * 4096))
    for at in range(0, 4096, 512):
        for name, *args in (("discard", at, 512), ("write_zeroes", at, 512, True)):
            assert error_of(now, getattr(log.disk, name)(*args)) == errno.EIO
    now(log.disk.close())
    assert run("replay", log.path, tmp_path / "disk").status == 0
    assert set((tmp_path / "disk").read_bytes()[:4096]) == set(b"x\0")


# ---- marks ------------------------------------------------------------------------------------------

def test_a_mark_is_in_the_log_when_the_call_returns(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    log.do("write", 0, memoryview(b"x" * 512))
    log.disk.mark("half \u2192 done")
    line = run("replay", log.path).out.splitlines()[1]
    assert line.split(None, 4) == ["2", "mark", "0", "13", "half → done"]
    log.do("write", 512, memoryview(b"y" * 512))
    now(log.disk.close())
    assert run("replay", log.path, tmp_path / "disk").status == 0
    assert (tmp_path / "disk").read_bytes() == log.states[-1]


def test_marks_come_from_the_shell_too_while_the_disk_changes(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    for number in range(5):
        log.do("write", number * 512, memoryview(b"x" * 512))
        assert run("replay", log.path, "--mark", f"row {number}").status == 0
        log.do("flush")
    now(log.disk.close())
    lines = [line.split(None, 2)[1:] for line in run("replay", log.path).out.splitlines()]
    assert [kind for kind, _ in lines] == ["write", "mark", "flush"] * 5
    assert [rest.split()[0] for kind, rest in lines if kind == "flush"] == ["2", "5", "8", "11", "14"]


@pytest.mark.parametrize("name, says", [
    ("log", "nobody records to it"), ("none", "none"), ("junk", "not a log")])
def test_a_mark_that_nobody_would_notice_is_refused(run, log, tmp_path, name, says):
    (tmp_path / "junk").write_bytes(bytes(100))
    before = log.path.read_bytes()
    assert_fails(run("replay", tmp_path / name, "--mark", "here"), 1, says)
    assert log.path.read_bytes() == before and not (tmp_path / "none").exists()


# ---- crashes ----------------------------------------------------------------------------------------

# A database: block 0 says how many records there are, record n is in block n.
CHECK = """
import sys
with open(sys.argv[1], "rb") as disk:
    for number in range(1, 1 + int.from_bytes(disk.read(8), "little")):
        disk.seek(number * 4096)
        assert disk.read(4096) == bytes([number]) * 4096
"""


class Database:
    """Writes its records through a disk's write(offset, data) and flush()."""

    def __init__(self, write, flush):
        self.write, self.flush = write, flush

    def record(self, number):
        self.write(number * 4096, bytes([number]) * 4096)

    def header(self, number):
        self.write(0, number.to_bytes(8, "little") + bytes(4088))

    def good(self, number):
        self.record(number)
        self.flush()
        self.header(number)
        self.flush()

    def hasty(self, number):                # right in order, but nothing keeps the disk to it
        self.record(number)
        self.header(number)
        self.flush()

    def bad(self, number):
        self.header(number)
        self.record(number)
        self.flush()


def crash_test(run, log, *words):
    """Look for a crash after which a database is wrong."""
    script = log.with_suffix(".py")
    script.write_text(CHECK)
    check = f"{sys.executable} {script} {{}} 2>&-"
    return run("replay", log, log.with_suffix(".a disk"), "--check", check, *words)


@pytest.mark.parametrize("words, good, hasty, bad", [
    ("", "good at 6 ", "good at 3 ", "good at 3 "),
    ("--every entry", "good at 12 ", "good at 9 ", "bad at entry 1: write 0 4096: "),
    ("--every entry --from 3", "good at 10 ", "good at 7 ", "bad at entry 4: write 0 4096: "),
    ("--states 8", "good at 6 ", "bad at entry 3: flush ", "bad at entry 3: flush "),
    ("--states 8 --jobs 3", "good at 6 ", "bad at entry 3: flush ", "bad at entry 3: flush ")])
def test_crashes_find_the_database_that_forgets_to_flush(run, targets, tmp_path, words, good, hasty, bad):
    for name, verdict in (("good", good), ("hasty", hasty), ("bad", bad)):
        path = tmp_path / name
        log = Log(targets, path)
        database = Database(lambda at, data, log=log: log.do("write", at, memoryview(data)),
                            lambda log=log: log.do("flush"))
        for number in (1, 2, 3):
            getattr(database, name)(number)
        now(log.disk.close())
        done = crash_test(run, path, *words.split())
        assert done.out.startswith(verdict) and done.status == verdict.startswith("bad"), (name, done)


@pytest.mark.parametrize("words, says", [
    (["--from", "100"], "there is no crash point"), (["--to", "0"], "there is no crash point"),
    (["--check", "/no/such/command {}"], "it cannot be run"),
    (["--check", "/dev/null {}"], "it cannot be run"),
    (["--check", "kill -9 $$ {}"], "it was killed at entry 4"),
    (["--check", "sh -c 'kill -9 $$' {}; exit $?"], "it was killed at entry 4")])
def test_what_was_not_looked_at_is_neither_good_nor_bad(run, log, tmp_path, words, says):
    done = run("replay", log.path, tmp_path / "disk", "--check", "true {}", *words)
    assert (done.status, done.out) == (1, "")
    assert says in done.err.splitlines()[-1]


@pytest.mark.parametrize("check, status", [
    *[(f"true {{}}; exit {number}", number) for number in (1, 125, 128, 255)], ("rm {}; exit 1", 1)])
def test_a_check_says_with_any_status_of_its_own_that_a_crash_is_bad(run, log, tmp_path, check, status):
    done = run("replay", log.path, tmp_path / "disk", "--check", check)
    assert done.out.startswith("bad at entry 4") and f"status {status}: " in done.out


def test_a_check_knows_which_crash_it_looks_at(run, targets, log, tmp_path):
    disk = targets.Record(str(log.path), targets.Ram(size=1 << 20))
    for text in ("row 1", "row 2"):
        now(disk.write(0, memoryview(os.urandom(512))))
        disk.mark(text)
    now(disk.close())
    check = f"test -s {{}} && echo $UBLK_ENTRY, $UBLK_STATE, $UBLK_MARK >> {tmp_path}/seen"
    assert run("replay", log.path, tmp_path / "disk", "--check", check).status == 0
    assert (tmp_path / "seen").read_text().splitlines() == [
        "4, all,", "4, nothing,", "9, all, row 1", "9, nothing, row 1",
        "11, all, row 2", "11, nothing, row 2"]


def test_the_end_of_a_log_is_a_crash_point_too(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    for name, *args in (("flush",), ("write", 0, memoryview(b"x" * 512))):
        log.do(name, *args)
    now(log.disk.close())
    check = "test \"$(head -c 1 {})\" != x"
    done = run("replay", log.path, tmp_path / "disk", "--check", check)
    assert (done.status, done.out.partition(":")[0]) == (1, "bad at entry 2")


def test_data_that_precede_what_says_that_they_are_there_are_found_without_it(run, targets, tmp_path):
    """As where a page is written that the write-ahead log, written durably, does not know yet."""
    log = Log(targets, tmp_path / "log")
    log.do("write", 0, memoryview(b"x" * 512))
    now(log.disk.call("write_fua", 4096, memoryview(b"y" * 512)))
    log.do("flush")
    now(log.disk.close())
    check = "! head -c 1 {} | grep -q x || head -c 4097 {} | grep -q y"
    done = run("replay", log.path, tmp_path / "disk", "--check", check)
    assert done.out.startswith("bad at entry 1: write 0 512: state all")


@pytest.mark.parametrize("seed", range(5))
def test_no_crash_loses_a_write_that_is_durable_by_itself(run, targets, tmp_path, seed):
    log = Log(targets, tmp_path / "log")
    database = Database(lambda at, data: log.do("write_fua", at, memoryview(data)), None)
    for number in (1, 2, 3, 4):
        database.record(number)
        database.header(number)
    now(log.disk.close())
    assert crash_test(run, log.path, "--states", 4, "--seed", seed).out.startswith("good at 8 crash points, ")


def test_a_crash_loses_writes_before_one_that_is_durable_by_itself(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    database = Database(lambda at, data: log.do("write" if at else "write_fua", at, memoryview(data)), None)
    for number in (1, 2, 3, 4):
        database.record(number)
        database.header(number)
    now(log.disk.close())
    done = crash_test(run, log.path)
    assert re.match(r"bad at entry [2468]: write_fua 0 4096: ", done.out), done


class Pause:
    def __await__(self):
        yield


@pytest.mark.parametrize("late", [False, True], ids=["before the flush", "in the flush"])
def test_a_flush_is_for_what_was_done_when_it_was_asked_for(run, targets, tmp_path, late):
    async def flush():
        await Pause()

    log = Log(targets, tmp_path / "log")
    flushing = begin_flush(log, flush, late)
    with pytest.raises(StopIteration):
        flushing.send(None)
    log.disk.target.flush = lambda: None
    log.do("flush")
    now(log.disk.close())
    check = "test \"$(head -c 1 {})\" = x"
    done = run("replay", log.path, tmp_path / "disk", "--check", check, "--from", 3)
    assert done.status == late


@pytest.mark.parametrize("late", [False, True], ids=["before the flush", "in the flush"])
@pytest.mark.parametrize("commits", [False, True], ids=["at the end", "before a commit"])
def test_what_a_flush_is_not_for_may_be_lost_when_it_has_ended(run, targets, tmp_path, late, commits):
    async def flush():
        await Pause()

    log = Log(targets, tmp_path / "log")
    log.disk.target.flush = flush
    now(log.disk.write(0, memoryview(b"x" * 512)))
    flushing = log.disk.flush()
    if late:
        flushing.send(None)
    now(log.disk.write(4096, memoryview(b"y" * 512)))
    with pytest.raises(StopIteration):
        for _ in range(2):
            flushing.send(None)
    if commits:
        now(log.disk.call("write_fua", 8192, memoryview(b"z" * 512)))
    now(log.disk.close())
    check = "head -c 8193 {} | grep -q z || ! head -c 1 {} | grep -q x || head -c 4097 {} | grep -q y"
    done = run("replay", log.path, tmp_path / "disk", "--check", check)
    assert done.out.startswith("bad at entry 3: flush 1 0: state nothing" if late else "good at ")


def test_what_a_flush_is_not_for_may_be_there_without_what_failed_before(targets, tmp_path):
    """Of which nothing may have become durable."""
    async def flush():
        await Pause()

    log = Log(targets, tmp_path / "log", size=8192)
    log.disk.target.flush = flush
    write, log.disk.target.write = log.disk.target.write, error
    assert error_of(now, log.disk.write(0, memoryview(b"x" * 512))) == errno.EIO
    log.disk.target.write = write
    flushing = log.disk.flush()
    flushing.send(None)
    now(log.disk.write(4096, memoryview(b"y" * 512)))
    with pytest.raises(StopIteration):
        flushing.send(None)
    now(log.disk.close())
    found = {found_in(crash)[::8] for seed in range(10) for crash in targets.crashes(log.path, seed=seed)}
    assert found == {b"xy", b"\0y", b"x\0", b"\0\0"}


@pytest.mark.parametrize("end", [
    asyncio.CancelledError, GeneratorExit, partial(OSError, errno.ECANCELED, "ended with another queue")])
def test_a_flush_that_ends_with_its_server_is_done_by_the_next_and_lets_nobody_doubt(targets, tmp_path, end):
    """As of a disk that a program detaches from: nobody was told that it had failed."""
    async def flush():
        await Pause()

    log = Log(targets, tmp_path / "log", size=512)
    log.do("write", 0, memoryview(b"x" * 512))
    log.disk.target.flush = flush
    flushing = log.disk.flush()
    flushing.send(None)
    with pytest.raises(type(end())):
        flushing.throw(end())
    log.disk.target.flush = lambda: None
    now(log.disk.flush())
    log.disk.mark("x is durable")
    now(log.disk.close())
    for seed in range(10):
        assert {found_in(crash) for crash in targets.crashes(log.path, seed=seed) if crash.mark} == {b"x"}


def test_a_flush_that_is_under_way_as_its_queue_ends_is_not_in_the_log(run, targets, tmp_path):
    class Remote(targets.Ram):
        async def flush(self):
            os.write(device.wake_write, b"x")       # the server is to go
            await asyncio.sleep(60)

    disk = targets.Record(str(tmp_path / "log"), Remote(size=1 << 20))
    device = StandIn(disk, depth=1, operation=ublk.UBLK_IO_OP_FLUSH)
    queue = NopQueue(device)
    queue.fetch()
    queue.run()
    queue.wind_up()
    queue.close()
    device.close()
    now(disk.close())
    assert (queue.answers, run("replay", tmp_path / "log").out) == ([], "")


@pytest.mark.parametrize("name", ["reconnects", "fails"])
def test_a_flush_that_its_target_cancels_is_in_the_log_as_one_that_failed(run, targets, tmp_path, name):
    """Its client is told: the server stays."""
    class Remote(targets.Ram):
        async def flush(self):
            if name == "fails":
                raise OSError(errno.ECANCELED, "as told to")
            answer = asyncio.get_running_loop().create_future()
            answer.cancel()
            await answer

    disk = targets.Record(str(tmp_path / "log"), Remote(size=1 << 20))
    answers = serve(disk, depth=1, operation=ublk.UBLK_IO_OP_FLUSH).answers
    now(disk.close())
    assert answers == [(0, -errno.EIO if name == "reconnects" else -errno.ECANCELED)]
    assert run("replay", tmp_path / "log").out.split() == ["1", "flush", "0", "0", "ECANCELED"]


# ---- states of a crash ------------------------------------------------------------------------------

def found_in(crash):
    """Return the first byte of each sector of a crash's disk."""
    return Path(crash.path).read_bytes()[::512]


@pytest.fixture
def torn(targets, tmp_path):
    """A log: two writes of four sectors each, a flush, the same again with other data."""
    log = Log(targets, tmp_path / "log", size=8192)
    for name, *args in (("write", 0, b"a" * 2048), ("write", 4096, b"b" * 2048), ("flush",),
                        ("write", 0, b"A" * 2048), ("write", 4096, b"B" * 2048)):
        log.do(name, *[memoryview(arg) if isinstance(arg, bytes) else arg for arg in args])
    now(log.disk.close())
    return log


def test_a_crash_leaves_all_nothing_or_of_each_write_some_sectors(targets, torn):
    found = {(crash.entry.number, crash.state): found_in(crash)
             for crash in targets.crashes(torn.path, states=999)}
    assert found[3, "all"] == b"aaaa\0\0\0\0bbbb\0\0\0\0"
    assert found[3, "nothing"] == bytes(16)
    assert found[5, "all"] == b"AAAA\0\0\0\0BBBB\0\0\0\0"
    last = [left for (number, state), left in found.items() if number == 5 and state != "all"]
    new = {left[at:at + 4].decode().translate({97 + at // 8: "-"}) for left in last for at in (0, 8)}
    assert new == {some.replace("x", letter) for letter in "AB" for some in (
        "----", "xxxx", "x---", "xx--", "xxx-", "-xxx", "--xx", "---x", "-x--", "--x-", "-xx-",
        "x--x", "xx-x", "x-xx")}
    assert {left[4:8] + left[12:] for left in last} == {bytes(8)}


def test_a_crash_finds_who_takes_a_write_for_whole_by_both_its_ends(targets, tmp_path):
    """A disk may have taken its blocks in any order."""
    log = Log(targets, tmp_path / "log", size=2048)
    for name, *args in (("write", 0, memoryview(b"a" * 2048)), ("flush",),
                        ("write", 0, memoryview(b"b" * 2048))):
        log.do(name, *args)
    now(log.disk.close())
    found = {found_in(crash) for crash in targets.crashes(log.path, states=500, start=3)}
    assert {left for left in found if left[0] == left[3]} == {
        b"aaaa", b"bbbb", b"abba", b"abaa", b"aaba", b"baab", b"bbab", b"babb"}


def written(entries, data):
    """Return the disk that these entries make, the slow way."""
    disk = bytearray(16384)
    for entry in entries:
        if entry.kind != "flush":
            disk[entry.offset:entry.offset + entry.length] = data[entry.number]
    return disk


@pytest.mark.parametrize("seed", range(8))
def test_all_and_nothing_are_what_the_log_makes_of_them(targets, tmp_path, seed):
    chance, data = random.Random(seed), {}
    log = Log(targets, tmp_path / "log", size=16384)
    for number in range(1, 41):
        name = chance.choice(("write", "write", "write_fua", "discard", "flush"))
        begin, end = sorted(512 * at for at in chance.sample(range(33), 2))
        data[number] = bytes(end - begin) if name == "discard" else chance.randbytes(end - begin)
        args = {"flush": (), "discard": (begin, end - begin)}
        log.do(name, *args.get(name, (begin, memoryview(data[number]))))
    now(log.disk.close())
    with closing(targets.Log(log.path)) as file:
        entries = list(file.entries())
    looked = 0
    for crash in targets.crashes(log.path, states=3, every=chance.choice(("flush", "entry"))):
        before = entries[:crash.entry.number]
        flushed = max([entry.offset for entry in before[:-1] if entry.kind == "flush"], default=0)
        durable = [entry for entry in before if entry.number <= flushed or entry.kind == "write_fua"]
        wanted = {"all": before, "nothing": durable}.get(crash.state)
        looked += wanted is not None
        assert wanted is None or Path(crash.path).read_bytes() == written(wanted, data)
    assert looked > 10


def test_a_write_is_torn_between_blocks_only(targets, tmp_path):
    ram = targets.Ram(size=16384)
    ram.block_size = 1024
    disk = targets.Record(str(tmp_path / "log"), ram)
    now(disk.write(0, memoryview(b"a" * 2048)))
    now(disk.close())
    assert {found_in(crash)[:4] for crash in targets.crashes(tmp_path / "log", states=50)} == {
        b"aaaa", b"aa\0\0", b"\0\0aa", bytes(4)}


def test_the_same_seed_gives_the_same_states(targets, torn):
    def all_of(**options):
        return [(crash.entry.number, crash.state, found_in(crash))
                for crash in targets.crashes(torn.path, states=6, **options)]

    usual = all_of()
    assert usual == all_of(seed=1) != all_of(seed=2)
    assert set(all_of(start=5)) == {crash for crash in usual if crash[0] == 5} | {(5, "nothing", usual[0][2])}


def test_no_state_is_looked_at_twice(targets, torn):
    found = [(crash.mark, found_in(crash)) for crash in targets.crashes(torn.path, states=30)]
    assert len(found) == len(set(found)) > 20


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"!" * 9999), lambda path: os.truncate(path, 100), Path.unlink,
    lambda path: damage(path, 4096, b"x"), lambda path: path.rename(path.with_name("other"))],
    ids=["write", "truncate", "delete", "damage", "rename"])
def test_what_a_check_does_to_an_image_is_not_in_the_next(targets, torn, spoil):
    def contents(after):
        for crash in targets.crashes(torn.path, states=8):
            yield Path(crash.path).read_bytes()
            after(Path(crash.path))

    assert list(contents(spoil)) == list(contents(lambda path: None))


def test_a_link_that_a_check_leaves_in_place_of_the_image_leads_nowhere(run, torn, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    done = run("replay", torn.path, tmp_path / "then", "--check", f"ln -sf {other} {{}}", "--states", "8")
    assert_fails(done, 1, "then.crash0: too many levels of symbolic links", errno.ELOOP)
    assert other.read_bytes() == b"precious"


def test_a_file_that_a_check_gives_another_name_is_left_as_it_was(run, torn, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    check = f"ln {{}} {tmp_path}/kept-$UBLK_ENTRY-$UBLK_STATE && ln -f {other} {{}}"
    assert run("replay", torn.path, tmp_path / "then", "--check", check).status == 0
    assert other.read_bytes() == b"precious"
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("kept-*")}
    assert kept["kept-3-all"] == torn.states[2] and len(kept) > 2


@pytest.fixture
def moved(monkeypatch):
    """How many bytes this process reads and writes at places in files, call by call."""
    sizes = []
    for name in ("pread", "pwritev"):
        def counted(fd, what, *place, call=getattr(os, name)):
            sizes.append(what if isinstance(what, int) else sum(map(len, what)))
            return call(fd, what, *place)
        monkeypatch.setattr(os, name, counted)
    return sizes


def large(targets, directory):
    """Make a base of 32 MiB, and a log of 50 writes, each flushed; return them."""
    (directory / "base").write_bytes(b"x" * (32 << 20))
    disk = targets.Record(str(directory / "log"), ublk.Null(size=32 << 20))
    for number in range(50):
        now(disk.write(number * 65536, memoryview(bytes([number]) * 4096)))
        now(disk.flush())
    now(disk.close())
    return directory / "base", directory / "log"


def test_a_crash_costs_what_differs_however_large_the_disk_is(targets, tmp_path, moved):
    base, log = large(targets, tmp_path)
    found = targets.crashes(log, base=base, states=4)
    next(found)
    del moved[:]
    assert len(list(found)) > 50
    assert sum(moved) < 32 << 20


@kernel
def test_where_files_share_blocks_a_check_may_write_at_no_greater_cost(targets, tmp_path, moved):
    needs("mkfs.xfs")
    with ublk.Device(targets.Ram(size=512 << 20)) as disk:
        sh("mkfs.xfs", "-q", disk.path)
        with mount_of(disk.path, tmp_path / "mnt") as place:
            base, log = large(targets, place)
            found = targets.crashes(log, base=base)
            while next(found).entry.number < 4:
                del moved[:]
            for crash in found:
                number = crash.entry.number // 2 - 1            # of the last write
                with open(crash.path, "r+b") as image:
                    image.seek(number * 65536)
                    assert image.read(1)[0] == number
                    image.seek(0)
                    assert image.read(6) == bytes(6)
                    image.seek(0)
                    image.write(b"spoilt")
            assert sum(moved) < 32 << 20


def test_python_gets_each_crash_and_nothing_is_left(targets, torn, tmp_path):
    before = set(tmp_path.iterdir())
    found = targets.crashes(torn.path, states=2)
    assert Path(next(found).path).is_file() and set(tmp_path.iterdir()) > before
    found.close()
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(ublk.UblkError, match="no crash point"):
        list(targets.crashes(torn.path, start=6))
    assert set(tmp_path.iterdir()) == before


def test_what_a_killed_replay_has_left_is_not_taken_for_a_crash(run, torn, tmp_path):
    left = tmp_path / "disk.crash0"
    left.write_bytes(b"x" * 8192)
    os.utime(left, ns=(10**9, 10**9))
    with open(left, "rb") as of_its_check:
        check = "test $UBLK_STATE != nothing || ! grep -q x {}"
        assert run("replay", torn.path, tmp_path / "disk", "--check", check).status == 0
        assert of_its_check.read() == b"x" * 8192


def test_checks_run_side_by_side(run, torn, tmp_path):
    (tmp_path / "here").mkdir()
    check = (f": {{}}; touch {tmp_path}/here/$$; for i in $(seq 200); do "
             f"test $(ls {tmp_path}/here | wc -l) -ge 3 && exit 0; sleep 0.1; done; exit 1")
    done = run("replay", torn.path, tmp_path / "disk", "--check", check, "--states", 3, "--jobs", 3)
    assert done.out.startswith("good at 2 crash points"), done
    assert sorted(os.listdir(tmp_path)) == ["disk", "here", "log"]


def test_the_first_bad_crash_is_told_and_kept_though_a_later_one_ends_sooner(run, torn, tmp_path):
    check = "test $UBLK_ENTRY = 3 && sleep 1; head -c 4608 {} | tail -c 512 | grep -qv '[bB]'"
    done = run("replay", torn.path, tmp_path / "disk", "--check", check, "--jobs", 4)
    assert done.out == f"bad at entry 3: flush 2 0: state all: status 1: see {tmp_path}/disk.crash\n"
    assert (tmp_path / "disk.crash").read_bytes() == torn.states[2]
    assert sorted(os.listdir(tmp_path)) == ["disk", "disk.crash", "log"]


def test_a_terminal_shows_how_far_a_check_is(run, torn, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    done = run("replay", torn.path, tmp_path / "disk", "--check", "true {}")
    assert [re.sub(r", \d+ s left\x1b\[K$", "!", line) for line in done.err.split("\r")] == [
        "entry 3 of 5!", "entry 3 of 5!", "entry 5 of 5!", ""]


@kernel
def test_crashes_of_a_real_disk(run, targets, tmp_path):
    """The same through the kernel, with direct I/O and fsync."""
    for name, verdict in {"good": "good at ", "bad": "bad at entry "}.items():
        with ublk.Device(targets.Record(str(tmp_path / name), targets.Ram(size=1 << 20))) as disk:
            with opened(disk.path) as fd:
                database = Database(partial(write_at, fd), partial(os.fsync, fd))
                for number in (1, 2):
                    getattr(database, name)(number)
        done = crash_test(run, tmp_path / name, *([] if name == "good" else ["--every", "entry"]))
        assert done.out.startswith(verdict), done
    with closing(targets.Log(tmp_path / "bad")) as log:
        header = next(entry for entry in log.entries() if entry.kind == "write" and entry.offset == 0)
    assert done.out.startswith(f"bad at entry {header.number}: write 0 4096")


@kernel
@pytest.mark.parametrize("name, flush, verdict", [
    ("good", os.fsync, r"good at \d+ crash points"),
    ("forgetful", lambda fd: None, r"bad at entry \d: mark 0 1: ")], ids=["good", "forgetful"])
def test_a_real_disk_is_held_to_what_its_marks_promise(run, targets, tmp_path, name, flush, verdict):
    log = tmp_path / "log"
    with ublk.Device(targets.Record(str(log), targets.Ram(size=1 << 20))) as disk, opened(disk.path) as fd:
        database = Database(partial(write_at, fd), partial(flush, fd))
        for number in (1, 2, 3):
            database.good(number)
            assert run("replay", log, "--mark", number).status == 0
    check = "test $(head -c 1 {} | od -An -tu1) -ge ${UBLK_MARK:-0}"
    assert re.match(verdict, run("replay", log, tmp_path / "disk", "--check", check, "--states", 4).out)


@kernel
def test_replaying_all_equals_the_disk(run, targets, tmp_path):
    with ublk.Device(targets.Record(str(tmp_path / "log"), targets.Ram(size=32 << 20)), queues=2) as disk:
        fio_verify(disk.path)
        os.sync()
        found = digest(disk.path)
    assert run("replay", tmp_path / "log", tmp_path / "again").status == 0
    assert digest(tmp_path / "again") == found


# What is in a file that was replaced is all old or all new, whenever the crash came.
INTACT = ("e2fsck -E journal_only -y {} >/dev/null 2>&1; e2fsck -fn {} >/dev/null 2>&1 && "
          "debugfs -R 'cat /config' {} 2>/dev/null | grep -qx 'old\\|new\\|newer'")

JBD2_COMMIT = bytes.fromhex("c03b3998 00000002")


@kernel
def test_a_rename_without_fsync_is_caught_and_one_with_it_is_not(run, targets, tmp_path):
    needs("mkfs.ext4", "e2fsck", "debugfs")
    log, image, mnt = tmp_path / "log", tmp_path / "disk", tmp_path / "mnt"

    def count():
        return len(run("replay", log).out.splitlines())

    with ublk.Device(targets.Record(str(log), targets.Ram(size=16 << 20))) as disk:
        sh("mkfs.ext4", "-qF", disk.path)
        with mount_of(disk.path, mnt, "-o", "data=writeback,noauto_da_alloc"):
            write_file(mnt / "config", "old\n", sync=True)
            os.sync()
            start = count() + 1
            write_file(mnt / "config.new", "new\n", sync=True)
            (mnt / "config.new").rename(mnt / "config")
            os.sync()
            careful = count()
            write_file(mnt / "config.new", "newer\n", sync=False)
            (mnt / "config.new").rename(mnt / "config")
            write_file(mnt / "other", "it commits the journal\n", sync=True)
    done = run("replay", log, tmp_path / "good", "--check", INTACT, "--from", start, "--to", careful)
    assert done.status == 0 and re.match(r"good at [1-9]\d* crash points", done.out), done
    done = run("replay", log, image, "--check", INTACT, "--from", careful + 1, "--every", "entry")
    # It is caught where the journal commits: that a file was renamed is durable, what is in it not yet.
    number, offset = map(int, re.match(r"bad at entry (\d+): write_fua (\d+) 1024: ", done.out).groups())
    assert done.status == 1 and number > careful + 1
    with open(f"{image}.crash", "rb") as crashed:
        crashed.seek(offset)
        assert crashed.read(8) == JBD2_COMMIT, done


def write_file(path, text, *, sync):
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


@kernel
def test_no_device_becomes_a_log(run, targets):
    """Its first bytes did: it has no size, as an empty file."""
    with ublk.Device(targets.Ram(size=1 << 20)) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
        assert_fails(run("record", disk.path, "null"), 1, f"{disk.path}: not a file", errno.EINVAL)
        assert Path(disk.path).read_bytes()[:4096] == b"x" * 4096


@kernel
def test_root_continues_a_users_log_also_in_a_folder_for_all(targets, log, tmp_path):
    """Where systemd has the kernel refuse O_CREAT of what is another's."""
    protected = Path("/proc/sys/fs/protected_regular")
    usual = protected.read_text()
    tmp_path.chmod(0o1777)
    os.chown(log.path, 65534, -1)
    protected.write_text("1")
    try:
        now(targets.Record(str(log.path), targets.Ram(size=1 << 20)).close())
    finally:
        protected.write_text(usual)


@kernel
def test_a_real_disk_fails_what_its_log_has_no_room_for(run, tmp_path):
    disk = Forked("record", "--limit", "64K", tmp_path / "log", "ram", "--size", "1M").live()
    with opened(disk.path) as fd:
        errors = [error_of(write_at, fd, at, b"c" * 16384) for at in range(0, 1 << 20, 16384)]
        assert set(errors) == {0, errno.ENOSPC} and errors == sorted(errors)
        assert error_of(os.fsync, fd) != 0
        found = digest(disk.path)
    assert disk.kill(signal.SIGTERM) == 0
    assert run("replay", tmp_path / "log", tmp_path / "again").status == 0
    assert digest(tmp_path / "again") == found


@kernel
def test_recovering_a_disk_that_is_served_leaves_its_log_alone(run, tmp_path):
    disk = Forked("record", tmp_path / "log", "ram", "--size", "1M", "-r", "reissue").live()
    with opened(disk.path) as fd:
        write_at(fd, 0, b"a" * 4096)
    with open(tmp_path / "log", "ab") as log:
        log.write(b"an entry that is being written")
    before = os.path.getsize(tmp_path / "log")
    assert_fails(run("recover", disk.id), 1, "its server still lives", errno.EBUSY)
    assert os.path.getsize(tmp_path / "log") == before
    assert disk.kill(signal.SIGTERM) == 0
