# SPDX-License-Identifier: MIT
"""A server is killed, or its device taken away, at every step of its life."""

from __future__ import annotations

import errno
import json
import signal

import pytest

import ublk
from tests.support import (
    Forked,
    after,
    assert_error_line,
    assert_nothing_stuck,
    at_least,
    devices_left,
    die,
    kernel,
    opened,
    orphan,
    read_at,
    replace,
    threads_of,
    until,
    write_at,
)


def half_fetched(then=die):
    """Return a change that has queues fetch one half of their tags."""
    def fetch(queue):
        half, path = range(queue.depth // 2), queue.path
        for tag in half:
            queue.command(tag, tag, ublk.UBLK_U_IO_FETCH_REQ, path.address(tag), path.sqe_address(tag))
        queue.ring.push_all(half)
        queue.ring.enter()
        then()
    return lambda: replace(ublk.Queue, fetch=fetch)


def during(name):
    """Return a change that has the process die while a command waits for the tags not fetched."""
    method = getattr(ublk.Control, name)

    def dying(self, dev_id, pid, abort):
        calls = iter([False])               # the first look is before the command goes to the kernel
        method(self, dev_id, pid, abort=lambda: next(calls, True) and die())

    def change():
        half_fetched(bool)()
        setattr(ublk.Control, name, dying)
    return change


def first_request():
    """Have the server die of the first request: that is the partition scan or udev."""
    import ublk_targets
    replace(ublk_targets.Loop, map=lambda *_: die(), read=lambda *_: die())


MAPPED, HALF_FETCHED, FETCHED = after(ublk.Queue, "__init__"), half_fetched(), after(ublk.Queue, "fetch")

DURING_START, DURING_END = during("start_dev"), during("end_user_recovery")


def half_a_server(change):
    """Tell whether a server dies with half of its tags fetched, which takes a change like these."""
    if change in (HALF_FETCHED, FETCHED, DURING_START, DURING_END) and not at_least("6.7"):
        pytest.skip("before 6.7 the driver looks for dead servers from START_DEV on: one that dies between "
                    "FETCH and START_DEV never ends, nor does its device")
    return change in (MAPPED, HALF_FETCHED, DURING_START, DURING_END)


@kernel
@pytest.mark.parametrize("recovery", [[], ["-r", "reissue"]], ids=["lost", "reissue"])
@pytest.mark.parametrize("change", [
    after(ublk.Control, "add_dev"), after(ublk.Control, "set_params"), MAPPED, HALF_FETCHED,
    FETCHED, DURING_START, first_request, after(ublk.Control, "start_dev")],
    ids=["ADD", "SET_PARAMS", "mapped", "half-fetched", "fetched", "START", "scan", "started"])
def test_killed_while_it_starts(change, recovery, backing, run):
    half_a_server(change)
    disk = Forked("loop", backing, *recovery, change=change)
    assert disk.wait() == -signal.SIGKILL
    row, = json.loads(run("list", "--json").out)
    assert row["id"] == 0 and row["pid"] == -1
    done = run("del", 0)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []
    assert_nothing_stuck()


@kernel
@pytest.mark.parametrize("change", [
    after(ublk.Control, "start_user_recovery"), MAPPED, HALF_FETCHED, FETCHED, DURING_END,
    after(ublk.Control, "end_user_recovery")],
    ids=["START_USER_RECOVERY", "mapped", "half-fetched", "fetched", "END_USER_RECOVERY", "recovered"])
def test_killed_while_it_recovers(change, backing, run):
    half = half_a_server(change)
    disk = Forked("loop", backing, "-r", "reissue").live()
    with opened(disk.path) as fd:
        write_at(fd, 4096, b"before" * 4096)
    disk.kill()
    dying = Forked("recover", disk.id, change=change)
    assert dying.wait() == -signal.SIGKILL, dying.said()
    again = Forked("recover", disk.id)
    if half and not at_least("6.16"):       # these kernels hold on to half a server
        assert again.wait() == 1
        assert_error_line(again.said(), errno.EBUSY, says=f"delete the device: `ublk.py del {disk.id}`")
        done = run("del", disk.id)
        assert (done.status, done.out, done.err) == (0, "", "")
    else:
        again.live()
        with opened(again.path) as fd:
            assert read_at(fd, 4096, 4096) == (b"before" * 4096)[:4096]
        assert again.kill(signal.SIGTERM) == 0
    assert devices_left() == []
    assert_nothing_stuck()


@kernel
@pytest.mark.parametrize("word", ["stop", "del"])
@pytest.mark.parametrize("recovery", [[], ["-r", "reissue"]], ids=["lost", "reissue"])
def test_a_disk_taken_away_while_it_starts(tmp_path, word, recovery):
    """START_DEV after STOP_DEV on the same open ends some kernels: nothing may lead there."""
    fetched, go = tmp_path / "fetched", tmp_path / "go"
    start = ublk.Control.start_dev

    def slow_start(self, *args, **options):
        fetched.touch()
        until(go.exists, "the word")
        return start(self, *args, **options)

    disk = Forked("null", *recovery, change=lambda: replace(ublk.Control, start_dev=slow_start))
    until(fetched.exists, "all tags to be fetched")
    other = Forked(word, 0)                     # del waits until the server has let go
    if word == "stop":                          # there is nothing to stop yet, and so nothing is sent
        assert other.wait() == 0, other.said()
        go.touch()
        assert disk.live().kill(signal.SIGTERM) == 0
        return
    until(lambda: len(threads_of(disk.pid)) == 1, "the queue to end")
    go.touch()
    until(disk.ended, "the server")
    assert other.wait() == 0, other.said()
    assert disk.status == 1 and devices_left() == []
    assert_error_line(disk.said())
    with Forked("null") as disk:                # and the driver is whole
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_disk_stopped_while_it_recovers(run, backing, tmp_path):
    fetched, go = tmp_path / "fetched", tmp_path / "go"
    end = ublk.Control.end_user_recovery

    def slow_end(self, *args, **options):
        fetched.touch()
        until(go.exists, "the word")
        return end(self, *args, **options)

    disk = orphan("loop", backing, "-r", "reissue")
    disk = Forked("recover", disk.id, change=lambda: replace(ublk.Control, end_user_recovery=slow_end))
    until(fetched.exists, "all tags to be fetched")
    assert run("stop", 0).status == 0
    go.touch()
    assert disk.wait() == 1
    assert_error_line(disk.said())
    assert run("del", 0).status == 0
    assert_nothing_stuck()
