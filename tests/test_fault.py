# SPDX-License-Identifier: MIT
"""Companion: faults to order."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.support import (
    AsyncRam,
    Ram,
    Recorder,
    descriptors_below,
    error_of,
    files,
    in_flight,
    kernel,
    now,
    opened,
    read,
    read_at,
    until,
    write_at,
)

# ---- fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, name, args, written, expected", [
    ({}, "read", (0, bytes(512)), 0, True), ({}, "flush", (), 0, True),
    ({"on": "read"}, "write", (0, bytes(512)), 0, False),
    ({"on": "flush,write"}, "write_fua", (0, bytes(512)), 0, True),
    ({"on": "write_fua"}, "write_fua", (0, bytes(512)), 0, True),
    ({"on": "write_fua"}, "write", (0, bytes(512)), 0, False),
    ({"on": "discard"}, "discard", (0, 512), 0, True),
    ({"range": "1M"}, "read", ((1 << 20) - 512, bytes(512)), 0, False),
    ({"range": "1M"}, "read", ((1 << 20) - 512, bytes(1024)), 0, True),
    ({"range": "1M"}, "read", ((1 << 20) + 512, bytes(512)), 0, False),
    ({"range": "1M-2M"}, "write_zeroes", ((1 << 20) + 512, 512, True), 0, True),
    ({"range": "1M-2M"}, "write_zeroes", (2 << 20, 512, True), 0, False),
    ({"range": "1M-2M"}, "flush", (), 0, False),
    ({"range": "0"}, "zone_reset", (0,), 0, True),
    ({"after": 4096}, "write", (0, bytes(512)), 4095, False),
    ({"after": 4096}, "write", (0, bytes(512)), 4096, True),
])
def test_which_requests_a_fault_is_for(targets, options, name, args, written, expected):
    fault = targets.Fault(targets.Ram(size=4 << 20), **options)
    fault.written = written
    assert fault.concerns(name, args) is expected


@pytest.mark.parametrize("text, number", [("0", 0), ("2", 2), ("1.5s", 1.5), ("10ms", 0.01), ("200us", 2e-4)])
def test_times(targets, text, number):
    assert targets.seconds(text) == pytest.approx(number)


class Odd(Recorder):
    """A disk that is in nothing like most others."""
    block_size, physical_block_size, boundary, discard_granularity = 1024, 4096, 8192, 2048
    read_only = rotational = True


def test_a_wrapper_offers_what_its_target_does(targets, tmp_path):
    path, leg = files(tmp_path, 2, 1 << 20)
    for below in (Odd(), Ram(), targets.Ram(size=1 << 20), targets.Loop(path), targets.Stripe(leg)):
        above = targets.Fault(targets.Fault(below))
        for name in targets.HANDLERS:
            assert hasattr(above, name) == ublk.serves(above, name) == ublk.serves(below, name), name
        for name in set(targets.PROPERTIES) - set(targets.HANDLERS):
            assert getattr(above, name, None) == getattr(below, name, None), name
        assert not hasattr(above, "map"), "requests would go around it"


def fails(call, *args):
    """Tell whether a handler fails."""
    return bool(error_of(lambda: asyncio.run(call(*args))))


DATA = memoryview(b"n" * 4096)


@pytest.mark.parametrize("changes", [False, True])
def test_the_same_seed_makes_the_same_faults(targets, changes):
    def faults(seed):
        fault = targets.Fault(targets.Ram(size=4 << 20), on="write", rate=0.3, error="EIO", seed=seed)
        if changes:
            fault.change("--on write --rate 0.3 --error EIO")
        return [number for number in range(64) if fails(fault.write, 0, DATA)]
    first = faults(1)
    assert 5 < len(first) < 40
    assert faults(1) == first != faults(2)


@pytest.mark.parametrize("what", [{"error": "EIO"}, {"torn": True, "flip": 3}, {"astray": True}])
def test_choices_are_the_same_in_whatever_order_requests_come(targets, what):
    class Noting(AsyncRam):
        async def write(self, offset, buffer):
            written.append((offset, bytes(buffer)))
            await super().write(offset, buffer)

    async def run(order, seed):
        disk = targets.Fault(Noting(), on="write", rate=0.6, seed=seed, **what)
        places = list(range(0, 1 << 20, 32 << 10))
        order(places)
        for _ in range(2):
            await asyncio.gather(*[disk.write(at, DATA) for at in places], return_exceptions=True)

    def faults(order=lambda places: None, seed=1):
        written.clear()
        asyncio.run(run(order, seed))
        return sorted(written)
    written = []
    forwards = faults()
    assert faults(list.reverse) == faults(random.Random(1).shuffle) == forwards != faults(seed=2)


class Short(Ram):
    """A disk that transfers a block at a time."""

    def read(self, offset, buffer):
        super().read(offset, buffer[:512])
        return 512

    def write(self, offset, buffer):
        super().write(offset, buffer[:512])
        return 512


@pytest.mark.parametrize("options", [{"after": 8192}, {"skip": 2}, {"rate": 0.5, "seed": 3}])
def test_a_request_that_is_done_in_parts_is_one_request(targets, options):
    def faults(below):
        fault = targets.Fault(below, on="write", error="EIO", **options)
        served = partial(targets.moved, fault.write)        # as a queue does: what is left is asked for again
        return [fails(served, number % 2 * 4096, DATA) for number in range(16)]
    assert faults(Short()) == faults(Ram()) and 0 < sum(faults(Ram())) < 16


def test_some_pass_some_are_struck_and_then_all_is_well(targets):
    fault = targets.Fault(Ram(), on="write", skip=2, count=3, error="EIO")
    assert [fails(fault.write, at * 4096, DATA) for at in range(8)] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert not fails(fault.read, 0, memoryview(bytearray(512)))


def test_bad_sectors_stay_bad_until_they_are_written(targets):
    fault = targets.Fault(targets.Ram(size=1 << 20), bad_sectors=True, rate=0.1, error="EIO", range="64K-1M")

    def bad():
        return [at for at in range(0, 1 << 20, 512) if fails(fault.read, at, memoryview(bytearray(512)))]
    before = bad()
    assert 100 < len(before) < 300 and before[0] >= 64 << 10 and bad() == before
    first, second, *others = before
    assert not fails(fault.write, first, DATA[:512]) and not fails(fault.write_zeroes, second, 512, True)
    assert bad() == others and read(fault, first, 512) == DATA[:512]
    assert fails(fault.read, others[0] & -4096, memoryview(bytearray(4096)))
    now(fault.write(0, memoryview(bytes(1 << 20))))
    assert bad() == []


def bits(data, other):
    """Return how many bits of these differ."""
    return sum(bin(one ^ two).count("1") for one, two in zip(data, other))


@pytest.mark.parametrize("on, of_disk, of_read", [("write", 1, 1), ("read", 0, 1)])
def test_bits_are_flipped_on_the_way_to_the_disk_or_from_it(targets, on, of_disk, of_read):
    below = Ram()
    fault = targets.Fault(below, on=on, flip=1)
    now(fault.write(8192, DATA))
    assert bits(below.data[8192:12288], DATA) == of_disk
    assert bits(read(fault, 8192), DATA) == of_read and bytes(DATA) == b"n" * 4096


@pytest.mark.parametrize("boundary", [0, 64 << 10])
def test_a_transfer_that_goes_astray_lands_within_the_disk_but_elsewhere(targets, boundary):
    for at in range(0, 1 << 20, 60 << 10):
        below = Recorder()
        below.boundary = boundary
        below.data[at:at + 4096] = DATA
        fault = targets.Fault(below, astray=True)
        assert read(fault, at) != DATA
        now(fault.write(at, DATA))
        (_, there, length), = below.calls
        assert there != at and 0 <= there <= (1 << 20) - 4096 and length == 4096 and not there % 512
        assert not boundary or there // boundary == (there + length - 1) // boundary


def test_where_a_disk_has_no_other_place_a_transfer_stays(targets):
    fault = targets.Fault(targets.Ram(size=4096), astray=True)
    now(fault.write(0, DATA))
    assert bytes(fault.target.memory) == DATA


def test_a_lost_append_to_a_zone_happens_for_nobody_knows_where_it_would_be(targets):
    disk = targets.Fault(targets.Zoned(size=64 << 20, zone_size=8 << 20), lost=True)
    assert asyncio.run(disk.zone_append(0, DATA)) == 0
    assert asyncio.run(disk.zone_append(0, DATA)) == 4096


def test_a_subclass_decides_by_content(targets):
    class Headers(targets.Fault):
        def match(self, name, offset, length, data):
            asked.append((name, offset, length))
            return data is not None and bytes(data[:6]) == b"SQLite"

    asked = []
    fault = Headers(Ram(), error="EIO")
    header = memoryview(b"SQLite".ljust(512, b"\0"))
    assert [fails(fault.write, 0, header), fails(fault.write, 0, DATA)] == [True, False]
    fault.target.data[1024:1536] = header
    assert [fails(fault.read, at, memoryview(bytearray(512))) for at in (1024, 512)] == [True, False]
    fault.on = ["read"]
    assert not fails(fault.write, 0, header)
    assert asked == [("write", 0, 512), ("write", 0, 4096), ("read", 1024, 512), ("read", 512, 512)]


def test_a_subclass_keeps_what_it_defines(targets):
    class Closing(targets.Fault):
        def close(self):
            closed.append(True)

    class Further(Closing):
        pass

    closed, below = [], Ram()
    below.close = lambda: closed.append(False)
    Further(below).close()
    assert closed == [True]


@pytest.mark.parametrize("name", ["Fault", "Cache"])
@pytest.mark.parametrize("handler", ["write_fua", "write_zeroes"])
def test_a_subclass_is_asked_itself_for_one_kind_of_write(targets, name, handler):
    async def mine(self, *words):
        """Done, as it seems."""
    subclass = type("Mine", (getattr(targets, name),), {handler: mine})
    assert ublk.serves(subclass(Recorder()), handler)
    later = type("Later", (subclass,), {"write": mine})
    assert not ublk.serves(later(Recorder()), handler)


def test_a_subclass_gets_nothing_of_a_target_that_this_does_not_offer(targets):
    """As zeroes that would go around the write() of one that encrypts."""
    class Zeroing(targets.Fault):
        async def write_zeroes(self, offset, length, unmap):
            await self.call("write_zeroes", offset, length, unmap)

    below = type("Below", (Recorder,), {"write": Recorder.write})()
    zeroes = Zeroing(below).write_zeroes
    assert ublk.serves(Zeroing(below), "write_zeroes")
    assert (error_of(now, zeroes(0, 4096, True)), below.calls) == (errno.EOPNOTSUPP, [])
    assert error_of(now, Zeroing(Ram()).write_zeroes(0, 4096, True)) == errno.EOPNOTSUPP


@pytest.mark.parametrize("name, expected", [("Ram", ["write"]), ("Recorder", ["write", "flush"])])
def test_a_subclass_may_have_any_target_write_durably(targets, name, expected):
    """By a flush, where there is one: a file system cannot do without."""
    class Durable(targets.Fault):
        async def write_fua(self, offset, buffer):
            await self.call("write_fua", offset, buffer)

    calls = []

    class Below(globals()[name]):
        def write(self, offset, buffer):
            calls.append("write")
            Ram.write(self, offset, buffer)

    below = Below()
    now(Durable(below).write_fua(4096, memoryview(b"x" * 4096)))
    calls += [call[0] for call in getattr(below, "calls", [])]
    assert (calls, below.data[4096:8192]) == (expected, b"x" * 4096)


@pytest.mark.parametrize("name", ["EIO", "EOPNOTSUPP", "ENOTSUP"])
def test_an_error_has_any_of_its_names(targets, name):
    fault = targets.Fault(Ram(), error=name)
    assert error_of(now, fault.write(0, memoryview(bytes(512)))) == getattr(errno, name)


def test_the_next_request_obeys_a_change(targets):
    fault = targets.Fault(Ram(), error="EIO")
    assert fails(fault.write, 0, DATA)
    fault.change("--on read --count 1 --error EIO")
    calls = fault.write, fault.read, fault.read
    assert [fails(call, 0, memoryview(bytearray(512))) for call in calls] == [False, True, False]
    for words in "--nonsense", "'", "--error ENONSENSE", "--skip -1", "error EIO", "fault --error EIO":
        with pytest.raises(ublk.UblkError):
            fault.change(words)
    assert not fails(fault.write, 0, DATA)


def test_the_next_request_obeys_the_control_file_however_quickly_it_changes(targets, tmp_path):
    path = tmp_path / "ctl"
    fault = targets.Fault(Ram(), control=str(path))
    for words, failing in [("--on write --error EIO", True), ("--on flush --error EIO", False)] * 2:
        path.write_text(words)
        os.utime(path, (1, 1))              # as if there were no time between
        assert fails(fault.write, 0, DATA) is failing


def test_words_that_are_written_again_count_anew(targets, tmp_path):
    path = tmp_path / "ctl"
    fault = targets.Fault(Ram(), control=str(path))
    for second in 1, 2:
        path.write_text("--count 1 --error EIO")
        os.utime(path, (second, second))
        assert [fails(fault.write, 0, DATA) for _ in range(2)] == [True, False]


def test_no_request_passes_while_nobody_can_read_the_control_file(targets, tmp_path):
    path = tmp_path / "ctl"
    fault = targets.Fault(Ram(), control=str(path))
    path.write_text("--error EIO")
    with descriptors_below(0):
        assert error_of(now, fault.write(0, DATA)) == errno.EMFILE
    assert fails(fault.write, 0, DATA) and not any(fault.target.data)


def test_a_request_hangs_on_while_new_words_say_so_too(targets):
    async def run():
        fault = targets.Fault(Ram(), hang=True, on="write")
        request = asyncio.ensure_future(fault.write(0, DATA))
        for words in "--hang --on write", "--hang", "--hang --range 0-4K":
            fault.change(words)
            await asyncio.wait([request], timeout=0.2)
            assert not request.done(), words
        fault.change("--hang --range 4K-8K")
        await asyncio.wait_for(request, 20)
        return fault
    assert asyncio.run(run()).target.data[:4096] == DATA


def test_what_is_appended_to_zones_is_written_too(targets):
    zoned = targets.Zoned(size=64 << 20, zone_size=8 << 20)
    fault = targets.Fault(zoned, on="zone_append", after=8192, error="ENOSPC")
    assert [fails(fault.zone_append, 0, DATA) for _ in range(4)] == [False, False, True, True]


@kernel
def test_faults_are_where_and_what_they_are_told(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="read", range="64K-96K", error="EIO")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert write_at(fd, 64 << 10, b"x" * 4096) == 4096
        found = [error_of(read_at, fd, at << 10, 4096) for at in (60, 64, 92, 96)]
        assert found == [0, errno.EIO, errno.EIO, 0]
        assert error_of(read_at, fd, 0, 128 << 10) == errno.EIO


@kernel
def test_a_disk_that_is_full(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="write", after=1 << 20, error="ENOSPC")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        found = [error_of(write_at, fd, at << 20, b"x" * (512 << 10)) for at in range(4)]
        assert found == [0, 0, errno.ENOSPC, errno.ENOSPC]
        assert read_at(fd, 1 << 20, 512 << 10) == b"x" * (512 << 10)


@kernel
@pytest.mark.parametrize("error", ["EIO", ""])
def test_torn_writes_stop_somewhere(targets, error):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="write", torn=True, error=error)
    kept = set()
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        for at in range(0, 1 << 20, 64 << 10):
            assert error_of(write_at, fd, at, b"n" * 8192) == (errno.EIO if error else 0)
            found = read_at(fd, at, 8192)
            kept.add(found.count(b"n"))
            assert found == b"n" * found.count(b"n") + bytes(8192 - found.count(b"n"))
    assert len(kept) > 3 and max(kept) < 8192 and not any(count % 512 for count in kept)


@kernel
def test_what_is_lost_never_happens(targets):
    below = Recorder()
    fault = targets.Fault(targets.Fault(below, on="flush", lost=True), on="write", range="0-8K", lost=True)
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert write_at(fd, 0, b"x" * 4096) == write_at(fd, 8192, b"x" * 4096) == 4096
        os.fsync(fd)
        assert read_at(fd, 0, 16384) == bytes(8192) + b"x" * 4096 + bytes(4096)
    assert below.calls == [("write", 8192, 4096)]


@kernel
def test_a_slow_sector_delays_only_its_requests(targets, monkeypatch):
    slept, enough, really_sleep = [], threading.Event(), asyncio.sleep

    async def sleep(time):
        slept.append(time)
        while not enough.is_set():
            await really_sleep(0.01)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    fault = targets.Fault(targets.Ram(size=4 << 20), range="1M", delay="300ms", jitter="10ms")
    with ublk.Device(fault, partition_scan=False) as disk, opened(disk.path) as fd:
        thread = threading.Thread(target=read_at, args=(fd, 1 << 20, 512))
        thread.start()
        until(lambda: slept, "the slow request")
        assert len(read_at(fd, 0, 512)) == 512
        assert thread.is_alive(), "the slow request has ended, too"
        enough.set()
        thread.join()
    assert all(0.3 <= time <= 0.31 for time in slept)


@kernel
def test_a_delay_is_never_shorter_than_told(targets):
    with ublk.Device(targets.Fault(targets.Ram(size=4 << 20), range="1M", delay="300ms")) as disk, \
            opened(disk.path) as fd:
        begun = time.monotonic()
        assert len(read_at(fd, 1 << 20, 512)) == 512
        assert time.monotonic() - begun >= 0.3      # and machines are only slower than they should be


@kernel
def test_a_fault_changes_while_it_runs(targets, workshop, capfd):
    fault = targets.Fault(targets.Ram(size=4 << 20), control="ctl", error="EIO", on="write")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert error_of(write_at, fd, 0, bytes(512)) == errno.EIO
        for words, error in (("", 0), ("--error ENOSPC", errno.ENOSPC), ("--on read --error EIO", 0),
                             ("--nonsense", 0), ("--error NONSENSE", 0), ("'", 0)):
            Path("ctl").write_text(words)
            assert error_of(write_at, fd, 0, bytes(512)) == error, words
        assert capfd.readouterr().err.count("ctl is ignored: ") == 3
        os.unlink("ctl")
        assert error_of(write_at, fd, 0, bytes(512)) == errno.EIO


@kernel
def test_a_request_hangs_until_told(targets, workshop):
    below = Recorder()
    fault = targets.Fault(below, control="ctl")
    with ublk.Device(fault, partition_scan=False) as disk, opened(disk.path) as fd:
        Path("ctl").write_text("--hang --on write")
        thread = threading.Thread(target=write_at, args=(fd, 0, b"x" * 4096))
        thread.start()
        until(lambda: in_flight(disk)[1], "the request")
        assert read_at(fd, 0, 4096) == bytes(4096) and below.calls == []
        Path("ctl").write_text("--hang --on discard")
        thread.join()
        assert read_at(fd, 0, 4096) == b"x" * 4096


@kernel
def test_a_disk_that_hangs_can_be_taken_away(targets, capfd):
    disk = ublk.Device(targets.Fault(Ram(), hang=True, on="write"))
    disk.start()
    found = []
    with opened(disk.path) as fd:
        thread = threading.Thread(target=lambda: found.append(error_of(write_at, fd, 0, bytes(512))))
        thread.start()
        until(lambda: in_flight(disk)[1], "the request")
        stopper = threading.Thread(target=lambda: disk.stop(timeout=1))
        stopper.start()
        thread.join()
    stopper.join()
    assert found == [errno.EIO] and "its requests fail now" in capfd.readouterr().err


@kernel
def test_corruption_reaches_a_disk_with_direct_transfers(targets, workshop):
    below = targets.Loop("a.img", direct=True)
    flipping = targets.Fault(below, on="write", range="0-4K", flip=1)
    fault = targets.Fault(flipping, on="write", range="1M", astray=True)
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        write_at(fd, 0, bytes(DATA))
        write_at(fd, 1 << 20, bytes(DATA))
        assert bits(read_at(fd, 0, 4096), DATA) == 1
        assert read_at(fd, 1 << 20, 4096) == bytes(4096)
    assert Path("a.img").read_bytes()[4096:].count(bytes(DATA)) == 1
