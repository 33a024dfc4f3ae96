# SPDX-License-Identifier: MIT
"""A server is killed, or its device taken away, at every step of its life."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Forked,
    after,
    assert_error_line,
    assert_nothing_stuck,
    await_state,
    before,
    devices_left,
    die,
    error_of,
    kernel,
    opened,
    orphan,
    read_at,
    replace,
    since,
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

    def dying(self, dev_id, pid):
        calls = iter([False])               # the first look is before the command goes to the kernel
        self.enough = lambda: next(calls, True) and die()
        method(self, dev_id, pid)

    def change():
        half_fetched(bool)()
        setattr(ublk.Control, name, dying)
    return change


def one_fetched():
    """Have the server die when all tags of its first queue are fetched, and none of its second."""
    def fetch(queue, original=ublk.Queue.fetch):
        if queue.index:
            signal.pause()
        original(queue)
        die()
    replace(ublk.Queue, fetch=fetch)


def first_request():
    """Have the server die of the first request: that is the partition scan or udev."""
    import ublk_targets
    replace(ublk_targets.Loop, map=lambda *_: die(), read=lambda *_: die())


MAPPED, HALF_FETCHED, FETCHED = after(ublk.Queue, "look_at"), half_fetched(), after(ublk.Queue, "fetch")

DURING_START, DURING_END = during("start_dev"), during("end_user_recovery")


RECOVERY = pytest.mark.parametrize("recovery", [[], ["-r", "reissue"]], ids=["lost", "reissue"])


def fetching(change, name, release="6.7"):
    """A parameter: a server that dies after its first FETCH and before START_DEV or END_USER_RECOVERY.

    Before 6.7 the driver looks for dead servers from START_DEV on: there such a server never ends, nor
    does its device.
    """
    return pytest.param(change, id=name, marks=since(release))


@kernel
@RECOVERY
@pytest.mark.parametrize("change", [
    pytest.param(after(ublk.Control, "add_dev"), id="ADD"),
    pytest.param(after(ublk.Control, "set_params"), id="SET_PARAMS"),
    pytest.param(MAPPED, id="mapped"),
    fetching(HALF_FETCHED, "half-fetched"),
    fetching(FETCHED, "fetched"),
    fetching(DURING_START, "START"),
    pytest.param(first_request, id="scan"),
    pytest.param(after(ublk.Control, "start_dev"), id="started")])
def test_killed_while_it_starts(change, recovery, backing, run):
    disk = Forked("loop", backing, *recovery, change=change)
    assert disk.wait() == -signal.SIGKILL
    row, = json.loads(run("list", "--json").out)
    assert row["id"] == 0 and row["pid"] == -1
    done = run("del", 0)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []
    assert_nothing_stuck()


def killed_twice(backing, change, *options):
    """Make a disk whose server was killed, and then a second one while it recovered the disk."""
    disk = Forked("loop", backing, "-r", "reissue", *options).live()
    with opened(disk.path) as fd:
        write_at(fd, 4096, b"before" * 4096)
    disk.kill()
    dying = Forked("recover", disk.id, change=change)
    assert dying.wait() == -signal.SIGKILL, dying.said()
    return disk


@kernel
@pytest.mark.parametrize("change", [
    pytest.param(after(ublk.Control, "start_user_recovery"), id="START_USER_RECOVERY"),
    pytest.param(MAPPED, id="mapped", marks=since("6.16")),
    fetching(HALF_FETCHED, "half-fetched", "6.16"),
    fetching(FETCHED, "fetched"),
    fetching(DURING_END, "END_USER_RECOVERY", "6.16"),
    pytest.param(after(ublk.Control, "end_user_recovery"), id="recovered")])
def test_killed_while_it_recovers(change, backing):
    disk = killed_twice(backing, change)
    with Forked("recover", disk.id) as again:
        with opened(again.path) as fd:
            assert read_at(fd, 4096, 4096) == (b"before" * 4096)[:4096]
        assert again.kill(signal.SIGTERM) == 0
    assert devices_left() == []
    assert_nothing_stuck()


def impatient():
    """Do not wait long for the driver to let go of a server, as it never will."""
    replace(ublk, open_char=partial(ublk.open_char, timeout=1.0), SERVER_TIMEOUT=1.0)


@kernel
@before("6.16")
@pytest.mark.parametrize("change", [
    pytest.param(MAPPED, id="mapped"),
    fetching(HALF_FETCHED, "half-fetched"),
    fetching(DURING_END, "END_USER_RECOVERY"),
    fetching(one_fetched, "one of two queues")])
def test_half_a_server_is_never_let_go(change, backing, run):
    disk = killed_twice(backing, change, *["-q", 2] * (change is one_fetched))
    again = Forked("recover", disk.id, change=impatient)
    assert again.wait() == 1
    assert_error_line(again.said(), errno.EBUSY, says=f"delete the device: `ublk.py del {disk.id}`")
    done = run("del", disk.id)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []
    assert_nothing_stuck()


def held_back(directory, command):
    """Return a change that has a command wait for the file go, when it has made the file fetched."""
    send = getattr(ublk.Control, command)

    def slow(self, *args, **options):
        (directory / "fetched").touch()
        until((directory / "go").exists, "the word")
        return send(self, *args, **options)
    return lambda: setattr(ublk.Control, command, slow)


@kernel
@RECOVERY
def test_stop_does_not_stop_a_disk_that_starts(tmp_path, run, recovery):
    """START_DEV after STOP_DEV on the same open ends some kernels: nothing may lead there."""
    disk = Forked("null", *recovery, change=held_back(tmp_path, "start_dev"))
    until((tmp_path / "fetched").exists, "all tags to be fetched")
    done = run("stop", 0)                       # there is nothing to stop yet, and so nothing is sent
    assert (done.status, done.err) == (0, "")
    (tmp_path / "go").touch()
    with disk:
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@RECOVERY
def test_a_disk_deleted_while_it_starts(tmp_path, recovery):
    disk = Forked("null", *recovery, change=held_back(tmp_path, "start_dev"))
    until((tmp_path / "fetched").exists, "all tags to be fetched")
    other = Forked("del", 0)                    # which waits until the server has let go
    until(lambda: len(threads_of(disk.pid)) == 1, "the queue to end")
    (tmp_path / "go").touch()
    assert disk.wait() == 1
    assert_error_line(disk.said(), errno.ENODEV, says="stopped before the disk was there")
    assert other.wait() == 0, other.said()
    assert devices_left() == []
    with Forked("null") as disk:                # and the driver is whole
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_disk_stopped_while_it_recovers(run, backing, tmp_path):
    disk = orphan("loop", backing, "-r", "reissue")
    disk = Forked("recover", disk.id, change=held_back(tmp_path, "end_user_recovery"))
    until((tmp_path / "fetched").exists, "all tags to be fetched")
    assert run("stop", 0).status == 0
    until(lambda: len(threads_of(disk.pid)) == 1, "the queue to end")
    (tmp_path / "go").touch()
    assert disk.wait() == 1
    assert_error_line(disk.said(), errno.ENODEV, says="stopped before the disk was there")
    assert run("del", 0).status == 0
    assert_nothing_stuck()


@kernel
def test_a_recovery_that_fails_when_all_is_fetched_leaves_the_disk_to_the_next_server(run, backing):
    """Up to 6.6 it never ended, and up to 6.15 nobody else could serve the disk."""
    def no_room(device):
        raise ublk.UblkError(errno.ENOSPC, "state file")
    disk = orphan("loop", backing, "-r", "reissue")
    failed = Forked("recover", disk.id, change=lambda: replace(ublk, save_state=no_room))
    assert failed.wait() == 1
    assert_error_line(failed.said(), errno.ENOSPC)
    with Forked("recover", disk.id) as disk:
        assert disk.kill(signal.SIGTERM) == 0
    assert_nothing_stuck()


@kernel
def test_a_server_killed_as_it_flushes_lets_go_of_the_disk(backing, tmp_path):
    """Up to 7.3 it never did, where a write with a tag of its own waited for the flush: a durable one."""
    async def flush(target):
        (tmp_path / "flushes").touch()
        await asyncio.sleep(3600)

    def change():
        import ublk_targets
        replace(ublk_targets.Cow, flush=flush)
        del ublk_targets.Cow.write_fua          # as a user's class has none

    def client(work):
        threading.Thread(target=lambda: answers.append(error_of(work)), daemon=True).start()
    words = "cow", backing, tmp_path / "overlay", "-r", "requeue", "--no-partition-scan"
    disk = Forked(*words, change=change).live()
    Path(f"/sys/block/ublkb{disk.id}/queue/scheduler").write_text("none")
    answers, data = [], b"durable!" * 512
    with opened(disk.path) as fd, opened(disk.path, os.O_RDWR | os.O_DSYNC) as durable:
        client(lambda: os.fsync(fd))
        until((tmp_path / "flushes").exists, "the flush")
        client(lambda: write_at(durable, 0, data))
        until(lambda: read_at(fd, 0, 4096) == data, "the write")
        disk.kill()
        await_state(disk.id, "QUIESCED")
        disk = Forked("recover", disk.id).live()
        until(lambda: answers == [errno.EIO] * 2, "the clients")
    assert disk.kill(signal.SIGTERM) == 0
    assert_nothing_stuck()
