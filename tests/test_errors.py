# SPDX-License-Identifier: MIT
"""Every control command in a state it does not fit, and traps of the kernel that must stay out of reach."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    THIS_KERNEL,
    Forked,
    Ram,
    as_user,
    assert_error_line,
    assert_fails,
    before,
    devices_left,
    error_of,
    kernel,
    message,
    opened,
    since,
    until,
    verb,
    with_partition,
    write_at,
)


class Situation:
    """Devices in every state, made when asked for and taken away at the end."""

    def __init__(self, control, stack):
        self.control, self.stack = control, stack

    def added(self, flags=0):
        """A device that was never started; returns its id."""
        flags &= self.control.features or ublk.RECOVERY_MODES["reissue"] | ublk.RECOVERY_MODES["fail"]
        dev_id = self.control.add_dev(-1, 1, 4, 65536, flags).dev_id
        self.stack.callback(self.control.del_dev, dev_id)
        return dev_id

    def live(self, target=None, **options):
        """A disk that is served; returns its id."""
        return self.stack.enter_context(ublk.Device(target or Ram(), depth=4, **options)).id

    def params(self, shift=9):
        """Parameters for it."""
        params = ublk.params_of(Ram(), 65536)
        params.basic.logical_bs_shift = shift
        params.basic.physical_bs_shift = max(shift, 12)
        return params

    def opened(self):
        """A disk somebody has open."""
        dev_id = self.live()
        fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY)
        self.stack.callback(os.close, fd)
        return dev_id

    def stopped(self):
        """A disk that was stopped by somebody else while its server keeps it open."""
        disk = self.stack.enter_context(ublk.Device(Ram(), depth=4))
        fd = os.dup(disk.char_fd)  # which the server closes as soon as its queue has ended
        self.stack.callback(os.close, fd)
        self.control.stop_dev(disk.id)
        return disk.id

    def shared(self):
        """A device with one page of shared memory; returns its id and the page's address."""
        dev_id = self.added(ublk.UBLK_F_SHMEM_ZC)
        fd = os.memfd_create("shared")
        os.ftruncate(fd, ublk.PAGE_SIZE)
        memory = mmap.mmap(fd, ublk.PAGE_SIZE)
        os.close(fd)
        self.control.reg_buf(dev_id, ublk.address_of(memory), ublk.PAGE_SIZE)
        self.keep = memory
        return dev_id, ublk.address_of(memory), ublk.PAGE_SIZE

    def as_nobody(self, call):
        """Raise what call raises in a process of an ordinary user who may open the control node."""
        def attempt():
            with ublk.Control() as control:
                try:
                    return str(call(control))
                except ublk.UblkError as error:
                    return "\0".join(["", str(error.errno), error.what, error.reason, error.remedy])

        mode = stat.S_IMODE(os.stat("/dev/ublk-control").st_mode)
        os.chmod("/dev/ublk-control", 0o666)
        try:
            text = as_user(65534, attempt)
        finally:
            os.chmod("/dev/ublk-control", mode)
        if text.startswith("\0"):
            _, number, *words = text.split("\0")
            raise ublk.UblkError(int(number), *words)
        return text

    def of_nobody(self):
        """An unprivileged device; returns its id."""
        dev_id = int(self.as_nobody(lambda control: control.add_dev(
            -1, 1, 4, 65536, ublk.UBLK_F_UNPRIVILEGED_DEV).dev_id))
        self.control.get_dev_info(dev_id)
        self.stack.callback(self.control.del_dev, dev_id)
        return dev_id

    def stop_as_nobody(self, dev_id, mode=0o666):
        """Have an ordinary user stop a device."""
        os.chmod(f"/dev/ublkc{dev_id}", mode)
        self.as_nobody(lambda control: (control._unprivileged.update({dev_id: 1}) if mode == 0o600 else None,
                                        control.stop_dev(dev_id)))

    def without_node(self, call):
        """Call with the id of an unprivileged device whose node is not there."""
        dev_id = self.of_nobody()
        os.rename(f"/dev/ublkc{dev_id}", "/dev/hidden")
        try:
            call(dev_id)
        finally:
            os.rename("/dev/hidden", f"/dev/ublkc{dev_id}")

    def start_unfetched(self):
        """Start a device of which nobody fetches a tag."""
        dev_id = self.added()
        self.control.set_params(dev_id, self.params())
        self.control._run(ublk.UBLK_CMD_START_DEV, dev_id, data=os.getpid(), timeout=0.2)

    def over_quota(self):
        """Ask for an unprivileged device where none is allowed."""
        limit = Path("/sys/module/ublk_drv/parameters/ublks_max")
        before = limit.read_text()
        limit.write_text("0")
        try:
            self.as_nobody(lambda control: control.add_dev(-1, 1, 4, 65536, ublk.UBLK_F_UNPRIVILEGED_DEV))
        finally:
            limit.write_text(before)


def named(name):
    """Return the command with this name, None for any."""
    return next((command for command in ublk.COMMANDS if command.name == name), None)


QUIESCABLE = ublk.UBLK_F_USER_RECOVERY | ublk.UBLK_F_QUIESCE

# command, errno, first kernel on which it can be provoked, how: from a Situation
PROVOCATIONS = [
    (None, errno.ENODEV, "6.0", lambda at: at.control.get_params(12345)),
    (None, errno.EPERM, "6.3", lambda at: at.stop_as_nobody(at.added())),
    (None, errno.EACCES, "6.3", lambda at: at.stop_as_nobody(at.of_nobody(), mode=0o600)),
    (None, errno.ENOENT, "6.3", lambda at: at.without_node(at.control.get_params)),
    (None, errno.ETIMEDOUT, "6.0", lambda at: at.start_unfetched()),
    ("ADD_DEV", errno.EEXIST, "6.0", lambda at: at.control.add_dev(at.added(), 1, 4, 65536, 0)),
    ("ADD_DEV", errno.EPERM, "6.3",
     lambda at: at.as_nobody(lambda control: control.add_dev(-1, 1, 4, 65536, 0))),
    ("ADD_DEV", errno.EACCES, "6.3", lambda at: at.over_quota()),
    ("ADD_DEV", errno.EINVAL, "6.12", lambda at: at.control.add_dev(-1, 1, 5000, 65536, 0)),
    ("SET_PARAMS", errno.EACCES, "6.0", lambda at: at.control.set_params(at.live(), at.params())),
    ("SET_PARAMS", errno.EINVAL, "6.0", lambda at: at.control.set_params(at.added(), at.params(shift=20))),
    ("START_DEV", errno.EEXIST, "6.0", lambda at: at.control.start_dev(at.live(), os.getpid())),
    ("START_DEV", errno.EBUSY, "7.3", lambda at: at.control.start_dev(at.stopped(), os.getpid())),
    ("START_DEV", errno.EINVAL, "6.0", lambda at: at.control.start_dev(at.added(), 0)),
    ("START_USER_RECOVERY", errno.EBUSY, "6.1",
     lambda at: at.control.start_user_recovery(at.live(recovery="requeue"))),
    ("START_USER_RECOVERY", errno.EINVAL, "6.1", lambda at: at.control.start_user_recovery(at.live())),
    ("END_USER_RECOVERY", errno.EBUSY, "6.1",
     lambda at: at.control.end_user_recovery(at.live(recovery="requeue"), os.getpid())),
    ("END_USER_RECOVERY", errno.EINVAL, "6.1",
     lambda at: at.control.end_user_recovery(at.live(), os.getpid())),
    ("UPDATE_SIZE", errno.ENODEV, "6.16", lambda at: at.control.update_size(at.added(), 1 << 20)),
    ("TRY_STOP_DEV", errno.EBUSY, "7.0", lambda at: at.control.try_stop_dev(at.opened())),
    ("TRY_STOP_DEV", errno.ENODEV, "7.0", lambda at: at.control.try_stop_dev(at.added())),
    ("QUIESCE_DEV", errno.EOPNOTSUPP, "6.16", lambda at: at.control.quiesce_dev(at.live(), 1)),
    ("QUIESCE_DEV", errno.ENODEV, "6.16", lambda at: at.control.quiesce_dev(at.added(QUIESCABLE), 1)),
    ("REG_BUF", errno.EEXIST, "7.1", lambda at: at.control.reg_buf(*at.shared())),
    ("REG_BUF", errno.EOPNOTSUPP, "7.1",
     lambda at: at.control.reg_buf(at.added(), ublk.PAGE_SIZE, ublk.PAGE_SIZE)),
    ("UNREG_BUF", errno.ENOENT, "7.1", lambda at: at.control.unreg_buf(at.shared()[0], 77)),
]

# Explanations no test can provoke, and why.
UNPROVOKED = {
    (None, errno.EINTR): "only a cancellation by somebody else's means ends a command so",
    (named("QUIESCE_DEV"), errno.EBUSY): "up to Linux 7.3 the driver's wait for an idle tag never waits",
}


@pytest.fixture
def situation(control):
    """Devices in every state."""
    with ExitStack() as stack:
        yield Situation(control, stack)


def test_every_explanation_is_provoked_or_excused():
    keys = [(named(name), number) for name, number, _, _ in PROVOCATIONS]
    assert sorted([*keys, *UNPROVOKED], key=str) == sorted(ublk.EXPLANATIONS, key=str)


@kernel
@pytest.mark.parametrize("name, number, provoke", [
    pytest.param(name, number, provoke, marks=since(release), id=f"{name}-{errno.errorcode[number]}")
    for name, number, release, provoke in PROVOCATIONS])
def test_the_wrong_state_is_explained(situation, name, number, provoke):
    with pytest.raises(ublk.UblkError) as found:
        provoke(situation)
    reason, remedy = ublk.EXPLANATIONS[named(name), number]
    assert (found.value.errno, found.value.reason, found.value.remedy) == (number, reason, remedy)
    assert_error_line(f"ublk: {found.value}\n", number)


@kernel
@since("6.3")
def test_a_device_that_nobody_can_command_is_not_said_to_be_gone(situation, run):
    """For an ordinary user's device the driver takes no command that does not name its node."""
    situation.without_node(
        lambda dev_id: assert_fails(run("del", dev_id), 1, f"device {dev_id}", errno.ENOENT))


COMMANDS_ON_A_DEVICE = {
    "DEL_DEV_ASYNC": lambda control, dev_id: control.del_dev_async(dev_id),
    "UPDATE_SIZE": lambda control, dev_id: control.update_size(dev_id, 1 << 20),
    "QUIESCE_DEV": lambda control, dev_id: control.quiesce_dev(dev_id, 1),
    "TRY_STOP_DEV": lambda control, dev_id: control.try_stop_dev(dev_id),
    "REG_BUF": lambda control, dev_id: control.reg_buf(dev_id, ublk.PAGE_SIZE, ublk.PAGE_SIZE),
    "UNREG_BUF": lambda control, dev_id: control.unreg_buf(dev_id, 0),
}


@kernel
@pytest.mark.parametrize("name", [pytest.param(name, marks=before(named(name).since))
                                  for name in COMMANDS_ON_A_DEVICE])
def test_a_command_this_kernel_lacks_names_the_one_that_has_it(situation, name):
    text = message(COMMANDS_ON_A_DEVICE[name], situation.control, situation.added())
    assert f"Linux {named(name).since}" in text


# Words of the command line beside a device 0, and the first kernel that has what they ask for.
FIRST_KERNELS = {
    "null --user-copy": "6.5",
    "zoned --size 64M --zone-size 4M": "6.6",
    "null --recovery fail": "6.13",
    "null --auto-zero-copy": "6.16",
    "resize 0 2G": "6.16",
    "quiesce 0": "6.16",
    "null --batch": "7.0",
    "stop 0 --if-unused": "7.0",
}


@kernel
@pytest.mark.parametrize("words, release", [pytest.param(*row, marks=before(row[1]), id=row[0])
                                            for row in FIRST_KERNELS.items()])
def test_what_this_kernel_lacks_is_refused_by_name(words, release):
    with Forked("null"):
        done = verb(*words.split())
        assert (done.status, done.out) == (1, "")
        assert_error_line(done.err.splitlines(True)[-1], errno.EOPNOTSUPP,
                          says=f"needs Linux {release}, this is {THIS_KERNEL}")
        assert devices_left() == [0]


@kernel
@before("7.0")
def test_protection_information_is_refused_by_name():
    target = Ram()
    target.metadata_size = 8
    assert f"needs Linux 7.0, this is {THIS_KERNEL}" in message(ublk.Device(target).start)


@kernel
@since("7.0")
def test_what_is_asked_for_is_granted():
    with ublk.Device(Ram(), partition_scan=False, recovery="fail") as disk:
        assert {"NO_AUTO_PART_SCAN", "USER_RECOVERY_FAIL_IO"} <= set(ublk.flag_names(disk.info.flags))


@kernel
def test_what_the_kernel_clamps_is_reported(control):
    info = control.add_dev(-1, 1, 4, 65536 + 100, 0)
    try:
        assert info.max_io_buf_bytes == 65536 and info.queue_depth == 4
        assert control.get_dev_info(info.dev_id).dev_id == info.dev_id
        assert control.get_queue_affinity(info.dev_id, 0)
        with pytest.raises(ublk.UblkError):
            control.get_queue_affinity(info.dev_id, 7)
    finally:
        control.del_dev(info.dev_id)


@kernel
def test_a_command_that_does_not_end_is_cancelled(situation):
    assert error_of(situation.start_unfetched) == errno.ETIMEDOUT
    info, = map(situation.control.get_dev_info, ublk.device_ids())
    assert info.state == ublk.UBLK_S_DEV_DEAD


@kernel
def test_a_device_that_was_stopped_before_its_start_is_not_started(capfd):
    class Hasty(ublk.Device):
        """Somebody stops the device between FETCH and START_DEV."""

        def _map(self):
            super()._map()
            until(lambda: self._all(ublk.FETCHED))
            with ublk.Control() as control:
                control.stop_dev(self.id)
            assert self.wait(60)

    text = message(Hasty(Ram()).start)
    assert_error_line(f"ublk: {text}\n", errno.ENODEV, says="it was stopped before the disk was there")
    assert devices_left() == []


@kernel
@pytest.mark.parametrize("recovery", [None, "reissue"])
def test_the_partition_table_is_read_while_the_disk_starts(recovery):
    target = with_partition()
    with ublk.Device(target, depth=1, recovery=recovery) as disk:
        until(lambda: os.path.exists(f"{disk.path}p1"), "the partition")
        with opened(f"{disk.path}p1") as fd:
            write_at(fd, 0, b"p" * 4096)
    assert target.data[2048 * 512:2048 * 512 + 4096] == b"p" * 4096


CRASHING = ["6.18.4", "6.18.5-200.fc43.x86_64", "6.18.4-arch1-1", "6.17.0-1015-azure",
            "6.17.0-1018-azure-fde"]


@pytest.mark.parametrize("release", CRASHING)
def test_a_kernel_known_to_crash_is_named_and_gets_a_disk_by_force_only(run, monkeypatch, no_driver, release):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert_fails(run("null"), 1, "the driver crashes when a device is added", errno.EINVAL)
    assert_fails(run("null", "--force"), 1, "cannot open /dev/ublk-control", errno.ENOENT)
    assert re.search(rf"{release}: the driver crashes .*: use ", run("check").out)


@pytest.mark.parametrize("release", [
    "6.1.0-41-amd64", "6.12.48", "6.18.3", "6.18.6", "6.18.40", "6.18.45-1", "6.17.0-1018-generic",
    "6.17.0-10180-azure", "7.3.4"])
def test_other_kernels_are_not_refused(run, monkeypatch, no_driver, release):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert_fails(run("null"), 1, "cannot open /dev/ublk-control", errno.ENOENT)
    assert f"ok       Linux {release}\n" in run("check").out


def test_a_disk_without_partx_says_that_partitions_are_not_looked_for(monkeypatch, capfd):
    def missing(*_, **__):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "partx")

    monkeypatch.setattr(subprocess, "Popen", missing)
    monkeypatch.setattr(ublk.Device, "partx_scans", True)
    device = ublk.Device(Ram())
    device._scan()
    assert "there is no partx(8)" in capfd.readouterr().err


def test_what_is_said_without_a_standard_error_is_said_to_nobody(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    ublk.say("a message")
    assert capsys.readouterr().out == ""


def test_an_option_before_the_target_is_told_where_it_belongs(run):
    done = run("--background", "null")
    assert done.status == 2 and "--background' (options come behind it)" in done.err
