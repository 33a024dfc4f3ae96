# SPDX-License-Identifier: MIT
"""Companion: what every target must do."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ublk
from tests.support import (
    HERE,
    MKFS,
    Fio,
    Forked,
    Ram,
    Recorder,
    assert_fails,
    carries,
    content_of,
    error_of,
    files,
    fio_verify,
    in_flight,
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
    until,
    write_at,
)
from tests.test_async import NopQueue, serve
from tests.test_nbd import FakeNbd, nbd_uri

# Companion: every target
# =================================================================================================

WITHOUT = """
import asyncio, fcntl, os

def has_no_flags(call):
    def without(fd, buffers, offset, flags=0):
        if flags:
            raise NotImplementedError("flags are not to be had on this platform")
        return call(fd, buffers, offset)
    return without

for module, start in (os, "RWF_"), (os, "MFD_"), (os, "memfd_"), (fcntl, "F_OFD_"):
    for name in [name for name in dir(module) if name.startswith(start)]:
        delattr(module, name)
os.preadv, os.pwritev = has_no_flags(os.preadv), has_no_flags(os.pwritev)
import ublk_targets as targets
from tests.support import now

def written(disk):
    now(disk.write(1 << 20, memoryview(b"x" * 4096)))
    return disk
memory = written(targets.Cache(targets.Ram(size=2 << 20)))
overlay = written(targets.Cow("base.img", "x.cow"))
recorded = written(targets.Record("log", targets.Loop("a.img")))
recorded.mark("here")
zones = written(targets.Zoned(file="zones", size=8 << 20, zone_size=1 << 20))
asyncio.run(zones.zone_reset(1 << 20))
assert [entry.kind for entry in targets.Log("log").entries()] == ["write", "mark"]
"""


def test_targets_do_without_what_a_python_for_old_c_libraries_lacks(tmp_path):
    """As those are that uv and conda download: made for glibc 2.17."""
    for name in "base.img", "a.img":
        (tmp_path / name).write_bytes(bytes(2 << 20))
    sh(sys.executable, "-c", WITHOUT, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})


SMALL_JOBS = [("512", "0", "48k"), ("4k", "1m", "256k"), ("256k", "2m", "1m")]

# Each kind of disk, as it is written on the command line in the directory `workshop`. Rows that end with
# their server are in VOLATILE.
COMMAND_LINES = {
    "ram": "ram --size 8M",
    "loop": "loop a.img",
    "stripe": "stripe a.img b.img --chunk 20K",
    "cow": "cow base.img overlay.cow",
    "fault": "fault --jitter 100us --rate 0.1 fault --on flush --delay 1ms loop a.img",
    "cache": "cache --cache-size 1M loop a.img",
}

VOLATILE = {"ram", "cache"}

every_target = pytest.mark.parametrize("name", COMMAND_LINES)
lasting = pytest.mark.parametrize("name", [name for name in COMMAND_LINES if name not in VOLATILE])


def serving(name, *words):
    """Serve one of COMMAND_LINES from the command line, with further options."""
    return Forked(*COMMAND_LINES[name].split(), *words)


@kernel
@every_target
def test_each_target_carries_a_verified_file_system(name, workshop, tmp_path):
    needs("fio")
    with serving(name) as disk:
        fio_verify(disk.path, SMALL_JOBS)
        carries("ext4", disk, tmp_path / "mnt")
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""


@kernel
@every_target
def test_each_target_keeps_exactly_what_it_was_given(name, workshop):
    needs("blkdiscard")
    with serving(name) as disk, opened(disk.path) as fd:
        expected = bytearray(content_of(fd))
        size = len(expected)
        for offset, length in ((512, 512), (60 << 10, 300 << 10), (size - 4096, 4096), (3 << 20, 2 << 20)):
            expected[offset:offset + length] = data = os.urandom(length)
            assert write_at(fd, offset, data) == length
        os.fsync(fd)
        for how, offset, length in (("-z", 1024, 512), ("-z", 100 << 10, 66 << 10), ("-f", 3 << 20, 1 << 20)):
            sh("blkdiscard", how, "-o", offset, "-l", length, disk.path)
            expected[offset:offset + length] = bytes(length)
        with opened(disk.path, os.O_RDWR | os.O_DSYNC) as through:      # FUA; see test_durable.py
            expected[8192:12288] = data = os.urandom(4096)
            write_at(through, 8192, data)
        assert content_of(fd) == expected


def changes_in(directory):
    """Return when the files of a directory were changed."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in directory.iterdir()}


@kernel
@lasting
def test_each_target_has_a_disk_for_reading_only(name, workshop):
    data = os.urandom(4096)
    with serving(name) as disk, opened(disk.path) as fd:
        write_at(fd, 300 << 10, data)
        expected = content_of(fd)
    os.sync()
    before = changes_in(workshop)
    with serving(name, "--read-only", "-r", "reissue") as disk:
        disk.live()
        disk.kill()
        disk = recovered(disk)
        with opened(disk.path, os.O_RDONLY) as fd:
            assert content_of(fd) == expected
        assert disk.kill(signal.SIGTERM) == 0
    assert changes_in(workshop) == before
    with serving(name, "--read-only") as disk:
        with pytest.raises(OSError) as refused, opened(disk.path) as writable:
            write_at(writable, 0, bytes(4096))
        assert refused.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)


@kernel
@lasting
def test_each_target_survives_kills_of_its_server(name, workshop):
    with serving(name, "-r", "reissue") as disk, Fio(disk, "--size=1M") as fio:
        for _ in range(2):
            fio.busy()
            disk.kill()
            disk = recovered(disk)
        fio.busy()
        fio.finish()
        assert fio.errors == 0
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
@every_target
def test_each_target_has_a_disk_that_can_become_smaller(name, workshop, run):
    with serving(name) as disk:
        assert run("resize", disk.id, "4M").status == 0
        with opened(disk.path) as fd:
            data = os.urandom(4096)
            write_at(fd, (4 << 20) - 4096, data)
            assert read_at(fd, (4 << 20) - 4096, 4096) == data
            assert error_of(write_at, fd, 4 << 20, data) == errno.ENOSPC


@kernel
@pytest.mark.parametrize("option", [pytest.param("--user-copy", marks=since("6.5")),
                                    pytest.param("--zero-copy", marks=since("6.15"))])
@pytest.mark.parametrize("name", ["stripe", "cow"])      # with map(), and without
def test_targets_through_a_data_path_that_is_not_theirs(name, option, workshop):
    needs("fio")
    with serving(name, option, "--queues", 2) as disk:
        fio_verify(disk.path, SMALL_JOBS)


@pytest.mark.parametrize("words, status, says, number", [
    ("stripe", 2, "paths", None),
    ("stripe a.img a.img", 1, "named twice", errno.EINVAL),
    ("stripe a.img ./a.img", 1, "named twice", errno.EINVAL),
    ("stripe a.img none.img", 1, "none.img", errno.ENOENT),
    ("stripe a.img b.img --chunk 0", 1, "chunk of 0 bytes", errno.EINVAL),
    ("stripe a.img b.img --chunk 1000", 1, "not a multiple of the block size 512", errno.EINVAL),
    ("stripe a.img b.img --chunk 1G", 1, "smaller than a chunk", errno.EINVAL),
    ("stripe a.img b.img --chunk some", 2, "--chunk", None),
    ("cow", 2, "base", None),
    ("cow a.img", 2, "overlay", None),
    ("cow a.img a.img", 1, "named twice", errno.EINVAL),
    ("cow none.img x.cow", 1, "none.img", errno.ENOENT),
    ("cow . x.cow", 1, "neither a file nor a block device", errno.EINVAL),
    ("cow a.img x.cow --commit --read-only", 1, "it cannot be written to", errno.EINVAL),
    ("cow a.img .", 1, "", None),
    ("cow a.img none/x.cow", 1, "none/x.cow", errno.ENOENT),
    ("zoned --block-size 512", 1, "block size 512: less than the target's own, 4096", errno.EINVAL),
    ("cow a.img x.cow --read-only", 1, "x.cow", errno.ENOENT),
    ("zoned --file x.img --read-only", 1, "x.img", errno.ENOENT),
    ("fault", 2, "a target is missing", None),
    ("fault loop", 2, "path", None),
    ("fault loop none.img", 1, "none.img", errno.ENOENT),
    ("fault --on raed ram", 1, "--on 'raed'", errno.EINVAL),
    ("fault --error EWHAT ram", 1, "there is no such errno", errno.EINVAL),
    ("fault --error errorcode ram", 1, "there is no such errno", errno.EINVAL),
    ("fault --range 2M-1M ram", 1, "not a range of bytes", errno.EINVAL),
    ("fault --range here ram", 1, "not a range of bytes", errno.EINVAL),
    ("fault --rate 7 ram", 1, "not a share from 0 to 1", errno.EINVAL),
    ("fault --rate nan ram", 1, "not a share from 0 to 1", errno.EINVAL),
    ("fault --rate often ram", 2, "--rate", None),
    ("fault --delay=-1s ram", 1, "time -1s", errno.EINVAL),
    ("fault --delay nan ram", 1, "time nan", errno.EINVAL),
    ("fault --jitter soon ram", 1, "time soon", errno.EINVAL),
    ("fault --after all ram", 2, "--after", None),
    ("fault --seed x ram", 2, "--seed", None),
    ("fault --skip=-1 ram", 1, "less than 0", errno.EINVAL),
    ("fault --count few ram", 2, "--count", None),
    ("cache", 2, "a target is missing", None),
    ("cache --cache-size much ram", 2, "--cache-size", None),
    ("cache zoned", 1, "zones or metadata", errno.EINVAL),
])
def test_bad_words_for_disks_of_several_files(two_files, no_driver, run, words, status, says, number):
    assert_fails(run(*words.split()), status, says, number)


@pytest.mark.parametrize("words", ["loop a.img", "stripe a.img b.img", "fault --on read loop a.img"])
def test_a_target_to_be_read_opens_nothing_for_writing(two_files, words):
    target = ublk.target_maker(words.split(), read_only=True)()
    flags = [fcntl.fcntl(int(fd), fcntl.F_GETFL) for fd in os.listdir("/proc/self/fd")
             if os.path.realpath(f"/proc/self/fd/{fd}") in map(os.path.realpath, ("a.img", "b.img"))]
    assert {flag & os.O_ACCMODE for flag in flags} == {os.O_RDONLY}
    assert target.read_only
    target.close()


@pytest.mark.parametrize("name", sorted(ublk.known_targets()))
def test_every_word_and_option_of_a_target_is_explained(name):
    parser = ublk.target_parser(ublk.known_targets()[name], name)
    said = {action.dest: (action.help or "").partition("(default")[0].strip() for action in parser._actions}
    assert "" not in said.values(), said


def test_memory_is_there_for_a_request_that_comes_before_its_disk_knows_of_its_size(targets):
    disk, data = targets.Ram(size=4096), os.urandom(4096)
    for offset in (0, 8192):
        disk.write(offset, data)
    disk.resized(12288)
    assert bytes(disk.memory) == data + bytes(4096) + data


WRAPPERS = {
    "fault": lambda targets, below, _: targets.Fault(below),
    "cache": lambda targets, below, _: targets.Cache(below),
    "record": lambda targets, below, directory: targets.Record(str(directory / "log"), below),
}
every_wrapper = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)


@every_wrapper
def test_a_target_that_is_not_told_of_unmap_may_lie_below_another(targets, tmp_path, make):
    class Plain(Ram):
        def write_zeroes(self, offset, length):
            self.data[offset:offset + length] = bytes(length)

    disk = make(targets, Plain(8192), tmp_path)
    disk.target.data[:] = b"x" * 8192
    now(disk.write_zeroes(4096, 4096, True))
    assert disk.target.data == b"x" * 4096 + bytes(4096)


@every_wrapper
def test_no_write_goes_around_a_subclass_below_another(targets, tmp_path, make):
    class Shouting(Recorder):
        def write(self, offset, buffer):
            super().write(offset, bytes(buffer).upper())

    above, other = make(targets, Shouting(), tmp_path), targets.Fault(Recorder())
    for name in "write_fua", "write_zeroes":
        assert [hasattr(each, name) for each in (above, other)] == [False, True]


@pytest.mark.parametrize("name, words, handler", [
    ("Loop", ["a.img"], "discard"), ("Stripe", ["a.img", "b.img"], "flush"), ("Zoned", [], "close")])
def test_a_subclass_is_asked_itself_whatever_its_files_can_do(targets, two_files, name, words, handler):
    base = getattr(targets, name)
    mine = type("Mine", (base,), {handler: lambda self: "mine"})(*words)
    assert getattr(mine, handler)() == "mine"
    base.close(mine)


# Of what a subclass overrides an operation asks the first of these. Without them the base's serve; but an
# operation that the subclass itself does not have is not offered where it has one of those behind.
ASKED = {
    "read": (["answer", "map", "read"], []),
    "write": (["answer", "map", "write"], []),
    "write_fua": (["answer", "write_fua", "write", "map"], ["answer"]),
    "flush": (["answer", "flush"], []),
    "discard": (["answer", "discard"], ["map"]),
    "write_zeroes": (["answer", "write_zeroes"], ["map", "write"]),
}
BASES = {
    "plain": lambda targets, _: (Recorder,),
    "Null": lambda targets, _: (ublk.Null,),
    "Loop": lambda targets, _: (targets.Loop, "a.img"),
    "Stripe": lambda targets, _: (targets.Stripe, "a.img", "b.img"),
    "Cow": lambda targets, _: (targets.Cow, "a.img", "new.cow"),
    "Nbd": lambda targets, here: (targets.Nbd, nbd_uri(here)),
    "Fault": lambda targets, _: (targets.Fault, targets.Fault(Recorder())),
    "Cache": lambda targets, _: (targets.Cache, Recorder()),
    "Record": lambda targets, _: (targets.Record, "log", Recorder()),
}


def noting(name, how, asked, fd):
    """Make a method that notes that it was asked; what it maps lies in a file."""
    def method(*words):
        asked.append(name)
        if name == "map":
            return fd, 0
        if name == "answer":
            queue, tags = words[-2:]
            for tag in tags:
                queue.complete(tag, 0)

    async def coroutine(*words):
        method(*words)
    return coroutine if how == "coroutine" and name not in ublk.PLAIN_METHODS else method


def is_offered(disk, operation):
    """Tell whether the kernel sends requests of an operation to a disk."""
    params = ublk.params_of(disk, 65536)
    return {
        "write_fua": params.basic.attrs & ublk.UBLK_ATTR_FUA,
        "discard": params.discard.max_discard_sectors,
        "write_zeroes": params.discard.max_write_zeroes_sectors,
    }.get(operation, 1) > 0


@pytest.mark.parametrize("how", ["plain", "coroutine", "attribute"])
@pytest.mark.parametrize("base", BASES)
def test_who_is_asked_is_what_a_subclass_overrides(targets, two_files, here, base, how, monkeypatch):
    monkeypatch.setattr(NopQueue, "link_last", 0)       # its commits cannot end what the kernel moves
    asked = []
    with FakeNbd(here, flags=0b1101101), open("a.img", "rb+") as file:
        kind, *words = BASES[base](targets, here)
        names = [*ASKED, "answer"] + ["map"] * hasattr(kind, "map")
        for overridden in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
            methods = {name: noting(name, how, asked, file.fileno()) for name in overridden}
            disk = type("Mine", (kind,), {} if how == "attribute" else methods)(*words)
            if how == "attribute":
                vars(disk).update(methods)
            for operation, (order, hiding) in ASKED.items():
                first = [name for name in order if name in overridden][:1]
                hidden = operation not in overridden and not set(hiding).isdisjoint(overridden)
                assert is_offered(disk, operation) != hidden, (overridden, operation)
                if not hidden:
                    asked.clear()
                    durable = ublk.UBLK_IO_F_FUA if operation == "write_fua" else 0
                    number = getattr(ublk, "UBLK_IO_OP_" + operation.removesuffix("_fua").upper())
                    (_, result), = serve(disk, depth=1, operation=number | durable).answers
                    assert (asked[:1], result >= 0) == (first, True), (overridden, operation)
            if hasattr(disk, "close"):
                asyncio.run(ublk.end_of(disk.close()))


def test_a_subclass_over_zones_may_answer_by_itself(targets):
    disk = type("Mine", (targets.Fault,), {"answer": noting("answer", "plain", [], -1)})(targets.Zoned())
    assert ublk.serves(disk, "answer") and len(disk.report_zones(0, 2)) == 2


@every_wrapper
@pytest.mark.parametrize("outcome", [False, -5, "done"])
def test_what_a_target_returns_that_is_no_success_is_none_above_it(
        targets, tmp_path, make, outcome):
    class Odd(Ram):
        flush = discard = lambda self, *_: outcome

    disk = make(targets, Odd(), tmp_path)
    for call in disk.flush(), disk.discard(0, 4096):
        with pytest.raises(TypeError, match="from which nobody learns its end"):
            now(call)


@every_wrapper
def test_a_disk_over_another_is_as_large_as_that_and_has_its_blocks(targets, tmp_path, make):
    disk = targets.Fault(make(targets, targets.Ram(size=1 << 20), tmp_path))
    disk.resized(2 << 20)
    disk.block_size = 4096
    assert disk.size == disk.target.size == disk.target.target.size == 2 << 20
    assert disk.target.block_size == disk.target.target.block_size == 4096


def test_discards_of_a_device_keep_no_other_request_waiting(targets, tmp_path):
    path, = files(tmp_path, 1, 1 << 20)
    disk, served, waited = targets.Loop(path), threading.Event(), []
    disk.is_block = True
    disk._discard_blocks = lambda *_: waited.append(served.wait(5))

    async def work():
        discard = asyncio.ensure_future(disk.discard(0, 4096))
        await asyncio.sleep(0)
        served.set()
        await discard
    asyncio.run(work())
    assert waited == [True]
    disk.close()


@kernel
def test_zeroes_that_have_to_be_written_keep_no_other_request_waiting(targets, tmp_path):
    path, = files(tmp_path, 1, 256 << 20)       # in a tmpfs, which cannot turn a range into zeroes
    with ublk.Device(targets.Loop(path)) as disk, opened(disk.path) as fd, \
            subprocess.Popen(["blkdiscard", "-z", disk.path]) as zeroing:
        until(lambda: in_flight(disk)[1], "the zeroes")
        assert read_at(fd, 0, 4096) == bytes(4096)
        assert in_flight(disk)[1], "the read has waited for them"
        assert zeroing.wait() == 0


def test_a_device_that_a_killed_server_still_holds_is_waited_for(targets, tmp_path, monkeypatch):
    path, = files(tmp_path, 1, 1 << 20)
    tries, os_open = [], os.open

    def busy(*words):
        tries.append(words)
        if len(tries) < 3:
            raise OSError(errno.EBUSY, "busy")
        return os_open(path, os.O_RDWR)
    monkeypatch.setattr(targets, "is_block", lambda path: True)
    monkeypatch.setattr(os, "open", busy)
    fd, read_only = targets.open_backing(path)
    assert not read_only and len(tries) == 3
    os.close(fd)


def test_a_device_that_is_mounted_is_written_to_by_nobody_else(targets, two_files, monkeypatch):
    """Nor one below another disk: a commit would change what others read."""
    os_open = os.open

    def mounted(path, flags, *more):
        if path == "a.img" and flags & os.O_EXCL:
            raise OSError(errno.EBUSY, "busy")
        return os_open(path, flags, *more)
    monkeypatch.setattr(ublk, "LAST_BREATH", 0.0)
    monkeypatch.setattr(targets, "is_block", lambda path: path == "a.img")
    monkeypatch.setattr(os, "open", mounted)
    for make in (lambda: targets.Loop("a.img"), lambda: targets.Cow("a.img", "x.cow", commit=True)):
        assert error_of(make) == errno.EBUSY
    fd, read_only = targets.open_backing("a.img", read_only=True)
    assert read_only
    os.close(fd)


@pytest.mark.parametrize("words, names", [
    ("loop a.img", "a.img"), ("stripe a.img b.img", "a.img b.img"), ("cow a.img x.cow", "a.img x.cow"),
    ("zoned --file z --size 64M", "z"), ("zoned", ""), ("cache record log fault loop a.img", "a.img log")])
def test_a_target_names_all_files_that_a_recovered_disk_must_find(two_files, words, names):
    target = ublk.make_target(words.split())
    assert list(target.files) == names.split()


# ---- one server for one file -----------------------------------------------------------------------

def record(targets, log, image):
    return targets.Record(log, targets.Loop(image))


# Who uses a file first, and who is refused it then: each gets the files a and b.
RIVALS = {
    "loop": (lambda t, a, b: t.Loop(a), lambda t, a, b: t.Loop(a)),
    "reader": (lambda t, a, b: t.Loop(a, read_only=True), lambda t, a, b: t.Loop(a)),
    "writer": (lambda t, a, b: t.Loop(a), lambda t, a, b: t.Loop(a, read_only=True)),
    "leg": (lambda t, a, b: t.Loop(b), lambda t, a, b: t.Stripe(a, b)),
    "base": (lambda t, a, b: t.Loop(a), lambda t, a, b: t.Cow(a, a + ".cow")),
    "overlay": (lambda t, a, b: t.Cow(a, a + ".cow"), lambda t, a, b: t.Cow(a, a + ".cow")),
    "commit": (lambda t, a, b: t.Cow(a, a + ".1"), lambda t, a, b: t.Cow(a, a + ".2", commit=True)),
    "log": (lambda t, a, b: record(t, a + ".log", a), lambda t, a, b: record(t, a + ".log", b)),
}


@pytest.mark.parametrize("first, second", RIVALS.values(), ids=RIVALS)
def test_a_file_has_one_server_that_writes_to_it(targets, tmp_path, monkeypatch, first, second):
    monkeypatch.setattr(ublk, "LAST_BREATH", 0.0)
    paths = files(tmp_path, 2, 1 << 20)
    served = first(targets, *paths)
    assert "another server uses it (16 EBUSY): end that first" in message(lambda: second(targets, *paths))
    now(ublk.end_of(served.close()))
    gc.collect()                    # what the refused one had opened goes with its error
    now(ublk.end_of(second(targets, *paths).close()))


def test_a_loop_that_nobody_has_any_more_lets_go_of_its_file(targets, tmp_path, monkeypatch):
    """At once, not when the garbage collector runs."""
    monkeypatch.setattr(ublk, "LAST_BREATH", 0.0)
    path, = files(tmp_path, 1, 1 << 20)
    gc.disable()
    try:
        for read_only in True, False:
            targets.Loop(path, read_only=read_only)
        now(ublk.end_of(targets.Loop(path).close()))
    finally:
        gc.enable()


def test_readers_share_a_file(targets, tmp_path):
    path, = files(tmp_path, 1, 1 << 20)
    disks = [targets.Loop(path, read_only=True), targets.Loop(path, read_only=True),
             targets.Cow(path, path + ".1"), targets.Cow(path, path + ".2")]
    for disk in disks:
        disk.close()


def test_a_file_opened_late_is_open_until_its_disk_has_gone(tmp_path):
    """As by a target's start(), when the disk is already to go with its program."""
    path, = files(tmp_path, 1, 1 << 20)
    program = "import sys, atexit, os, ublk_targets as targets; " \
        "atexit.register(lambda: [os.fstat(fd) for fd in (disk.fd, memory.fd)]); " \
        "disk, memory = targets.Loop(sys.argv[1]), targets.Ram()"
    assert not sh(sys.executable, "-c", program, path, cwd=HERE).stderr


def test_a_server_that_dies_is_given_time_to_let_go(targets, tmp_path):
    path, = files(tmp_path, 1, 1 << 20)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        disk = targets.Loop(path)
        os.write(writer, b"served")
        time.sleep(0.3)
        os._exit(0 if disk else 1)
    assert os.read(reader, 6) == b"served"
    targets.Loop(path).close()
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)
    os.close(writer)


@kernel
def test_a_disk_keeps_its_blocks_though_its_file_is_copied(targets, tmp_path):
    """Of a file that shares blocks with a copy, XFS wants direct writes in whole ones, but takes any."""
    needs("mkfs.xfs")
    with ublk.Device(targets.Ram(size=320 << 20)) as below:
        sh(*MKFS["xfs"], below.path)
        with mount_of(below.path, tmp_path / "mnt") as directory:
            image = directory / "disk.img"
            image.write_bytes(bytes(1 << 20))
            with Forked("loop", image, "--direct", "-r", "requeue") as disk:
                disk.kill()
                sh("cp", "--reflink=always", image, directory / "copy.img")
                with recovered(disk) as disk, opened(disk.path) as fd:
                    assert write_at(fd, 512, b"x" * 512) == 512
                    assert read_at(fd, 0, 2048) == bytes(512) + b"x" * 512 + bytes(1024)
