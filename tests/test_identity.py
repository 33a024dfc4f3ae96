# SPDX-License-Identifier: MIT
"""A device is known by more than its number."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest

import ublk
from tests.support import (
    Forked,
    Ram,
    assert_fails,
    await_state,
    devices_left,
    kernel,
    orphan,
    state_of,
)


def identity_of(dev_id):
    """Return the 64 bits the driver keeps of a device."""
    with ublk.Control() as control:
        return control.get_dev_info(dev_id).ublksrv_flags


def exchange(dev_id, *words):
    """Delete a device with nobody's help and make another of its number; its state file is the first's."""
    path = ublk.state_path(dev_id)
    with open(path) as file:
        state = file.read()
    with ublk.Control() as control:
        control.get_dev_info(dev_id)
        control.del_dev(dev_id)
    disk = orphan(*words, "--id", dev_id)
    with open(path, "w") as file:
        file.write(state)
    return disk


@kernel
def test_the_driver_keeps_an_identity_that_no_two_devices_share(run_dir):
    with ublk.Device(Ram()) as one, ublk.Device(Ram()) as other:
        found = [identity_of(disk.id) for disk in (one, other)]
        assert len({*found, 0}) == 3
        states = [json.loads((run_dir / f"{disk.id}.json").read_text()) for disk in (one, other)]
        assert [int(state["identity"], 16) for state in states] == found


@kernel
def test_an_identity_outlives_servers(backing):
    disk = orphan("loop", backing, "-r", "requeue")
    identity = identity_of(disk.id)
    with Forked("recover", disk.id):
        assert identity_of(disk.id) == identity != 0


@kernel
def test_the_state_of_another_device_is_not_believed(run, backing, tmp_path):
    second = tmp_path / "second.img"
    second.write_bytes(bytes(64 << 20))
    first = orphan("loop", backing, "-r", "requeue")
    exchange(first.id, "loop", second, "-r", "requeue")
    done = run("recover", first.id)
    assert done.status == 1 and "the state of another device" in done.err
    done = run("list", "--json")
    assert json.loads(done.out)[0]["target"] is None and "the state of another device" in done.err
    again = Forked("loop", backing, "-r", "requeue", "--id", first.id)
    assert again.wait() == 1 and "EEXIST" in again.said()
    assert state_of(first.id) == "QUIESCED" and run("del", first.id).status == 0


@kernel
@pytest.mark.parametrize("undo", ["stop", "clean_up"])
def test_who_cleans_up_leaves_anothers_device_alone(undo):
    mine = ublk.Device(Ram())
    with ublk.Device(Ram()) as other:
        if undo == "stop":
            mine.id, mine._added = other.id, True
            mine.stop()
        else:
            ublk.clean_up(mine.identity)
        assert state_of(other.id) == "LIVE"


@kernel
def test_who_cleans_up_finds_its_own_device():
    disk = orphan("null")
    ublk.clean_up(identity_of(disk.id))
    assert devices_left() == []


@kernel
def test_a_directory_that_is_gone_fails_the_recovery(run, tmp_path):
    directory = tmp_path / "there"
    directory.mkdir()
    (directory / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    disk = orphan_in(directory)
    directory.rename(tmp_path / "away")
    os.chdir(tmp_path)
    assert_fails(run("recover", disk.id), 1, f"it was created in {directory}, which is gone", errno.ENOENT)
    with Forked("recover", disk.id, "--target", "loop", "disk.img") as again:
        assert again.kill(signal.SIGTERM) == 0


def orphan_in(directory):
    """Make a disk of disk.img in a directory whose server has been killed."""
    disk = Forked("loop", "disk.img", "-r", "requeue", change=lambda: os.chdir(directory)).live()
    disk.kill()
    await_state(disk.id, "QUIESCED")
    return disk
