# SPDX-License-Identifier: MIT
"""Disks of ordinary users."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.support import (
    ALICE,
    BOB,
    HERE,
    Forked,
    as_user,
    assert_error_line,
    assert_fails,
    at_least,
    become,
    before,
    devices_left,
    error_of_opening,
    every_command,
    kernel,
    needs,
    refused,
    replace,
    sh,
    since,
    state_of,
    verb,
)


def program(uid):
    """Return what runs a program as an ordinary user; see subprocess."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("UBLK_RUN_DIR", "XDG_RUNTIME_DIR")}
    return {"user": uid, "group": uid, "extra_groups": [], "env": environment, "cwd": "/"}


def verb_of(uid, *given):
    """The same as an ordinary user."""
    return verb(*given, change=become(uid))


def in_name_of(uid, function, *args):
    """Call a function as an ordinary user; return what it returns, through JSON."""
    def call():
        become(uid)()
        return json.dumps(function(*args))
    return json.loads(as_user(os.getuid(), call))


@pytest.fixture
def readable():
    """A copy of ublk.py, with its companion, that every user may read."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        for name in ("ublk.py", "ublk_targets.py"):
            os.chmod(shutil.copy(HERE / name, directory), 0o644)
        yield Path(directory, "ublk.py")


@pytest.mark.parametrize("users, outside", [
    ([], True), (["         0          0 4294967295"], True), (["         0       1000          1"], False)],
    ids=["no user namespaces", "outside", "inside"])
def test_whoever_has_the_capability_outside_any_user_namespace_is_privileged(monkeypatch, users, outside):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tCapEff: 0\nCapEff:\t000001ffffffffff\n")
    monkeypatch.setattr(ublk, "lines_of", lambda path: users)
    assert ublk.privileged() == outside


@kernel
@before("6.3")
def test_an_ordinary_user_is_told_which_kernel_lets_him(rules):
    done = verb_of(ALICE, "null")
    assert (done.status, done.out, devices_left()) == (1, "", [])
    assert_error_line(done.err.splitlines(True)[-1], errno.EOPNOTSUPP, says="needs Linux 6.3")


@kernel
@since("6.3")
def test_an_ordinary_user_owns_a_disk(rules, readable):
    needs("mkfs.ext4", "fio")
    alice = program(ALICE)
    with Forked("ram", "--size", "256M", "-p", change=become(ALICE), script=readable) as disk:
        for path in (disk.path, f"/dev/ublkc{disk.id}"):
            assert (os.stat(path).st_uid, os.stat(path).st_gid) == (ALICE, ALICE)
        sh("mkfs.ext4", "-Fq", disk.path, **alice)
        sh("fio", "--name=x", f"--filename={disk.path}", "--direct=1", "--rw=randwrite", "--bs=4k",
           "--iodepth=16", "--ioengine=io_uring", "--size=2M", "--verify=crc32c", "--verify_fatal=1", **alice)
        row, = json.loads(verb_of(ALICE, "list", "--json").out)
        assert (row["state"], row["pid"]) == ("LIVE", disk.pid)
        assert (row["owner_uid"], row["owner_gid"]) == (ALICE, ALICE)
        assert row["target"] == "ram" and "UNPRIVILEGED_DEV" in row["flags"]
        done = verb_of(ALICE, "del", disk.id)
        assert (done.status, done.out, done.err) == (0, "", "")
        assert disk.wait() == 0 and devices_left() == []
    assert disk.said().count("\n") == 1 and "30 seconds" in disk.said() and "no recovery" in disk.said()


@kernel
@since("6.3")
def test_a_start_that_is_interrupted_before_the_node_is_the_users_leaves_no_device(rules):
    def change():
        become(ALICE)()

        def add_dev(control, *words, add_dev=ublk.Control.add_dev):
            info = add_dev(control, *words)
            os.kill(os.getpid(), signal.SIGTERM)
            return info
        replace(ublk.Control, add_dev=add_dev)
    disk = Forked("ram", "--size", "4M", change=change)
    assert disk.wait() == 1
    assert_error_line(disk.said(), errno.EINTR, says="ended by SIGTERM before the disk was there")
    assert devices_left() == []


@kernel
@since("6.16")
def test_an_ordinary_user_and_root_resize_its_disk(rules):
    with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
        sectors = Path(f"/sys/block/ublkb{disk.id}/size")
        for resize, size in ((verb, "8M"), (partial(verb_of, ALICE), "16M")):
            done = resize("resize", disk.id, size)
            assert (done.status, done.err) == (0, "")
            assert int(sectors.read_text()) * 512 == ublk.parse_size(size)
        assert disk.kill(signal.SIGTERM) == 0


def verbs_are_refused(uid, dev_id, number):
    """See that a user can do nothing to a device that is not his own."""
    for line in ("list {0}", "stop {0}", "del {0}", "resize {0} 8M", "recover {0}"):
        assert_fails(verb_of(uid, *line.format(dev_id).split()), 1, "", number)
    quiesced = verb_of(uid, "quiesce", dev_id)
    assert_fails(quiesced, 1, "", number if at_least("6.16") else errno.EOPNOTSUPP)


@kernel
@since("6.3")
def test_nobody_else_commands_an_ordinary_users_disk(rules):
    with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
        node = f"/dev/ublkc{disk.id}"
        refused(in_name_of(BOB, every_command, disk.id, node), errno.EACCES)
        refused(in_name_of(BOB, every_command, disk.id, ""), errno.EACCES, errno.EPERM, errno.EINVAL)
        refused(in_name_of(BOB, every_command, disk.id, "/dev/null"), errno.EPERM)
        verbs_are_refused(BOB, disk.id, errno.EACCES)
        assert json.loads(verb_of(BOB, "list", "--json").out) == []
        assert in_name_of(BOB, error_of_opening, node) == [errno.EACCES] * 2
        assert in_name_of(BOB, error_of_opening, disk.path) == [errno.EACCES] * 2
        os.chmod(disk.path, 0o666)                  # even then the kernel gives it to its owner only
        assert in_name_of(BOB, error_of_opening, disk.path) == [errno.EPERM] * 2
        assert in_name_of(ALICE, error_of_opening, disk.path) == [0, 0]

        row, = json.loads(verb("list", "--json").out)          # and root is still root
        assert (row["state"], row["pid"], row["owner_uid"]) == ("LIVE", disk.pid, ALICE)
        assert verb("del", disk.id).status == 0
        assert disk.wait() == 0


@kernel
def test_an_ordinary_user_does_not_touch_roots_disk(rules):
    with Forked("null", "--size", "4M") as disk:
        if at_least("6.3"):
            refused(in_name_of(ALICE, every_command, disk.id, f"/dev/ublkc{disk.id}"), errno.EPERM)
        refused(in_name_of(ALICE, every_command, disk.id, ""), errno.EPERM, errno.EINVAL)
        verbs_are_refused(ALICE, disk.id, errno.EPERM)
        for node in (disk.path, f"/dev/ublkc{disk.id}"):
            assert in_name_of(ALICE, error_of_opening, node) == [errno.EACCES] * 2
        assert json.loads(verb_of(ALICE, "list", "--json").out) == []
        assert state_of(disk.id) == "LIVE"
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_what_an_ordinary_user_cannot_have_is_said(rules):
    for option, name in (("-r requeue", "USER_RECOVERY"), ("-r reissue", "USER_RECOVERY"),
                         ("-u", "USER_COPY"), ("-z", "ZERO_COPY"), ("--auto-zero-copy", "USER_COPY")):
        done = verb_of(ALICE, "ram", "--size", "4M", "-p", *option.split())
        assert done.status == 1
        line = done.err.splitlines(True)[-1]
        assert_error_line(line, errno.EINVAL, says="the kernel does not allow it together with")
        assert name in line and "UNPRIVILEGED_DEV" in line


@kernel
def test_root_cannot_have_an_unprivileged_disk(run):
    done = run("null", "-p")
    assert done.status == 1
    assert_error_line(done.err.splitlines(True)[-1], errno.EINVAL, says="this process has CAP_SYS_ADMIN")


def flags_granted(flags):
    """Return the flags of a device an ordinary user asks for, -1 if it is refused."""
    with ublk.Control() as control:
        try:
            info = control.add_dev(-1, 1, 1, 4096, flags)
        except OSError as error:
            assert error.errno == errno.EINVAL, error
            return -1
        ublk.await_node(f"/dev/ublkc{info.dev_id}", os.R_OK | os.W_OK)
        control.del_dev(info.dev_id)
        return info.flags


@kernel
@since("6.3")
def test_the_kernel_gives_ordinary_users_what_the_table_says(rules, control):
    unprivileged = ublk.UBLK_F_UNPRIVILEGED_DEV
    assert in_name_of(ALICE, flags_granted, unprivileged) & unprivileged
    excluded = [feature for feature in ublk.FEATURES
                if feature & unprivileged.excludes or feature.excludes & unprivileged]
    assert len(excluded) >= 4
    for feature in excluded:
        if at_least(feature.since):
            granted = in_name_of(ALICE, flags_granted, unprivileged | feature)
            assert granted == -1 or not granted & feature, feature.name


@kernel
@since("6.3")
def test_too_many_disks_of_ordinary_users(rules):
    limit = Path("/sys/module/ublk_drv/parameters/ublks_max")
    before = limit.read_text()
    limit.write_text("1")
    try:
        with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
            done = verb_of(BOB, "ram", "--size", "4M")
            assert done.status == 1
            assert_error_line(done.err.splitlines(True)[-1], errno.EACCES, says="ublks_max")
            assert disk.kill(signal.SIGTERM) == 0
    finally:
        limit.write_text(before)


@kernel
def test_check_tells_an_ordinary_user_what_is_missing(run):
    done = verb_of(ALICE, "check")
    assert done.status == 1 and "udev-rules > /etc/udev/rules.d/" in done.out
    done = verb_of(ALICE, "ram", "--size", "4M")
    assert_error_line(done.err.splitlines(True)[-1], errno.EACCES, says="see `ublk.py check`")


@kernel
def test_check_is_content_once_the_rules_are_there(rules):
    done = verb_of(ALICE, "check")
    assert (done.status, "missing" in done.out) == (0, False), done.out


@kernel
def test_udev_owner_of_any_argument(run):
    with Forked("null", "--size", "1M") as disk:
        for name in ("", "ublk", "ublkb", "ublkb0", "ublkc0", "ublkb0p1", "ublkb0;reboot", "ublkb0 0",
                     "ublkb-1", "ublkb²", "ublkb" + "9" * 5000, "ublkc1048576", "ublkc9", "../ublkb0",
                     "ublkd0", "sda", "%k", "$(id)", "ublkb0\nOWNER=1", "--help", "\udcff"):
            done = run("udev-owner", "--", name)
            assert done.status != 0 and done.out == "" and "Traceback" not in done.err, name
        assert disk.kill(signal.SIGTERM) == 0
