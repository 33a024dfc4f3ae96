# SPDX-License-Identifier: MIT
"""Companion: faults to order."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Ram,
    Recorder,
    error_of,
    files,
    in_flight,
    kernel,
    opened,
    read_at,
    until,
    write_at,
)

# ---- fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, name, args, written, expected", [
    ({}, "read", (0, bytes(512)), 0, True), ({}, "flush", (), 0, True),
    ({"on": "read"}, "write", (0, bytes(512)), 0, False),
    ({"on": "flush,write"}, "write_fua", (0, bytes(512)), 0, True),
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
    rule = targets.Fault(targets.Ram(size=4 << 20), **options).rule
    assert rule.matches(name, args, written) is expected


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
            assert hasattr(above, name) == hasattr(below, name), name
        for name in set(targets.PROPERTIES) - {"processes"}:
            assert getattr(above, name, None) == getattr(below, name, None), name
        assert not hasattr(above, "map"), "requests would go around it"


@kernel
def test_faults_are_where_and_what_they_are_told(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="read", range="64K-96K", error="EIO")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert write_at(fd, 64 << 10, b"x" * 4096) == 4096
        found = [error_of(read_at, fd, at << 10, 4096) for at in (60, 64, 92, 96)]
        assert found == [0, errno.EIO, errno.EIO, 0]
        assert error_of(read_at, fd, 0, 128 << 10) == errno.EIO


@kernel
def test_the_same_seed_makes_the_same_faults(targets):
    def faults(seed):
        fault = targets.Fault(targets.Ram(size=4 << 20), on="write", rate=0.3, error="EIO", seed=seed)
        with ublk.Device(fault) as disk, opened(disk.path) as fd:
            return [number for number in range(64) if error_of(write_at, fd, 0, bytes(512)) == errno.EIO]
    first = faults(1)
    assert 5 < len(first) < 40
    assert faults(1) == first != faults(2)


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
