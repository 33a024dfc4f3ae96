# SPDX-License-Identifier: MIT
"""What learn/kernel.md says of the driver is what the driver does."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager

import pytest

import ublk
from tests.support import (
    HERE,
    THIS_KERNEL,
    Forked,
    await_state,
    delete_device,
    devices_left,
    kernel,
    payload_of,
)

PAGE = (HERE / "learn/kernel.md").read_text()
ELSEWHERE = {"ADD_DEV", "GET_FEATURES", "REG_BUF", "UNREG_BUF"}
COMMANDS = [command for command in ublk.COMMANDS if command.name not in ELSEWHERE]
RECOVERABLE = ublk.UBLK_F_USER_RECOVERY | ublk.UBLK_F_QUIESCE
DISK = ublk.Null(size=1 << 20)


def table(title):
    """Return the rows of the table in a section of the page, each as {column: cell}."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]]
                      for line in re.findall(r"(?m)^\|.*", text))
    return [dict(zip(head, row)) for row in rows]


KERNELS = list(table("No such device")[0])[1:]


@contextmanager
def absent(control):
    yield os.getpid(), range(100, 200)


@contextmanager
def made(control):
    """Add devices that nobody serves."""
    for dev_id in range(len(COMMANDS)):
        control.add_dev(dev_id, 1, 4, 65536, RECOVERABLE)
        control.set_params(dev_id, ublk.params_of(DISK, 65536))
    yield os.getpid(), range(len(COMMANDS))


def serve():
    """Serve disks until this process is killed, and let go of each that is taken away."""
    disks = [ublk.Device(DISK, id=dev_id, depth=4, recovery="requeue", partition_scan=False)
             for dev_id in range(len(COMMANDS))]
    for disk in disks:
        disk.start()
    print(disks[-1].path)
    while True:
        for disk in disks:
            if disk.wait(0.01):
                disk.detach()


@contextmanager
def served(control):
    """Have another process serve disks."""
    with Forked(change=serve) as server:
        yield server.pid, range(len(COMMANDS))


@contextmanager
def waiting(control):
    """Kill the server of disks."""
    with served(control) as (pid, devices):
        os.kill(pid, 9)
        for dev_id in devices:
            await_state(dev_id, "QUIESCED")
        yield pid, devices


STATES = {
    "No such device": absent,
    "Made, but not started (DEAD)": made,
    "Served (LIVE)": served,
    "Waiting for a server (QUIESCED)": waiting,
}


@pytest.fixture
def taken_away():
    """Take the devices away when the test ends."""
    yield
    for dev_id in devices_left():
        delete_device(dev_id)


def answer(control, command, dev_id, pid, timeout):
    """Return what a command answers: "ok", the name of an errno, or "waits"."""
    data = {"UPDATE_SIZE": 4096, "QUIESCE_DEV": 2000, "START_DEV": pid, "END_USER_RECOVERY": pid}
    payload = ublk.params_of(DISK, 65536) if command.name == "SET_PARAMS" else payload_of(command)
    if isinstance(payload, ublk.ublk_params):
        payload.len = ublk.ctypes.sizeof(payload)
    try:
        control._run(command, dev_id, payload, data.get(command.name, 0), timeout=timeout)
    except ublk.UblkError as error:
        name = re.search(r"\(\d+ (\w+)\)", str(error))[1]
        return "waits" if name == "ETIMEDOUT" else name
    return "ok"


@kernel
@pytest.mark.skipif(THIS_KERNEL not in KERNELS, reason=f"the page does not tell of Linux {THIS_KERNEL}")
@pytest.mark.parametrize("state", STATES)
def test_the_driver_answers_as_the_page_says(state, control, taken_away):
    expected = {row["Command"]: row[THIS_KERNEL] for row in table(state)}
    found = {}
    with STATES[state](control) as (pid, devices):
        for command, dev_id in zip(COMMANDS, devices):
            timeout = 1 if expected[command.name] == "waits" else 20
            found[command.name] = answer(control, command, dev_id, pid, timeout)
    assert found == expected


@pytest.mark.parametrize("state", STATES)
def test_every_command_is_in_the_table_of_a_state(state):
    assert [row["Command"] for row in table(state)] == [command.name for command in COMMANDS]
    assert all(set(row) == {"Command", *KERNELS} for row in table(state))


def test_what_the_page_says_of_traps_is_what_a_test_sees():
    tests = "".join(path.read_text() for path in (HERE / "tests").glob("test_*.py"))
    for row in table("Traps"):
        assert f"def {row['Seen by'].strip('`')}(" in tests
