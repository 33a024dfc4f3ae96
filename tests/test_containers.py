# SPDX-License-Identifier: MIT
"""Disks of containers."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    ALICE,
    LIBC,
    Forked,
    Ram,
    assert_fails,
    at_least,
    become,
    devices_left,
    error_of_opening,
    every_command,
    kernel,
    opened,
    read_at,
    refused,
    sh,
    since,
    until,
    verb,
    write_at,
)

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000

MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000


def system(function, *args):
    """Call a function of the C library; raise OSError where it fails."""
    plain = (os.fsencode(arg) if isinstance(arg, (str, Path)) else arg for arg in args)
    done = getattr(LIBC, function)(*plain)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{args}: {os.strerror(number)}")


class Container:
    """A user, mount and pid namespace of an ordinary user, with a /dev of its own.

    do() has a function called inside. give() is what a container manager does: it brings a device
    node in from outside.
    """

    def __init__(self, directory, uid):
        self.dev = directory / "dev"
        self.dev.mkdir(parents=True)
        system("mount", "tmpfs", self.dev, "tmpfs", 0, None)
        system("mount", None, self.dev, None, MS_SHARED, None)
        for node in ("null", "urandom", "ublk-control"):
            self.give(node)
        self.socket, inner = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.socket.close()
                self._enter(uid)
                self._serve(inner.makefile("rw"))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        inner.close()
        self.channel = self.socket.makefile("rw")

    def _enter(self, uid):
        become(uid)()
        system("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
            Path("/proc/self", name).write_text(text)
        child = os.fork()
        if child:
            LIBC.prctl(1, 0, 0, 0, 0)
            os.waitpid(child, 0)
            os._exit(0)
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)          # PR_SET_PDEATHSIG: all ends with the parent
        system("mount", "proc", "/proc", "proc", 0, None)
        system("mount", self.dev, "/dev", None, MS_BIND | MS_REC, None)
        system("mount", "tmpfs", "/run", "tmpfs", 0, None)

    def _serve(self, channel):
        for line in channel:
            name, args = json.loads(line)
            try:
                answer = globals()[name](*args)
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), file=channel, flush=True)

    def do(self, function, *args):
        """Call a function of this file inside; return what it returns, through JSON."""
        print(json.dumps([function.__name__, args]), file=self.channel, flush=True)
        return json.loads(self.channel.readline())

    def give(self, name):
        """Bring a device node in."""
        until(lambda: os.path.exists(f"/dev/{name}"), name)
        (self.dev / name).touch()
        system("mount", f"/dev/{name}", self.dev / name, None, MS_BIND, None)

    def close(self):
        """End all processes inside."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.socket.close()
        until(lambda: not sh("umount", "-R", self.dev, check=False).returncode, "the container's end")


INSIDE: list[Forked] = []                         # the server inside a container


def begin_inside(*words):
    """Start a server."""
    INSIDE.append(Forked(*words))
    return INSIDE[-1].pid


def live_inside():
    """Wait for its disk; return the path."""
    return INSIDE[-1].live().path


def end_inside():
    """End it; return its status and what it said."""
    return [INSIDE[-1].kill(signal.SIGTERM), INSIDE[-1].said()]


def verb_inside(*given):
    """Run a command to its end."""
    return vars(verb(*given))


def rows_inside():
    """Return what `list` shows."""
    return json.loads(verb("list", "--json").out)


def write_inside(path):
    """Write to a disk and read it back."""
    try:
        with opened(path) as fd:
            write_at(fd, 8192, b"inside.." * 512)
            return read_at(fd, 8192, 4096) == b"inside.." * 512
    except PermissionError as error:
        return f"{error}: {os.stat(path)}"


@pytest.fixture
def containers(rules):
    """Two containers of the same ordinary user: only their /dev tells them apart."""
    directory, made = Path(tempfile.mkdtemp()), []
    directory.chmod(0o755)
    try:
        for name in "ab":
            made.append(Container(directory / name, ALICE))
        yield made
    finally:
        for container in made:
            container.close()
        shutil.rmtree(directory)


def test_a_file_that_waits_for_its_node_is_not_taken_for_it(tmp_path, monkeypatch):
    path, tried = tmp_path / "ublkb0", []
    path.touch()                        # as in a container; then the node is mounted upon it

    def mount(*_):
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def access(name, mode):
        tried.append(os.path.isfile(name))
        mount()
        return True
    monkeypatch.setattr(ublk.os, "access", access)
    ublk.await_node(str(path), os.R_OK, mount)
    assert tried == [False]             # what may be used was the node


@kernel
@since("6.3")
def test_a_container_controls_its_own_disks_only(containers, control):
    pids = []
    for dev_id, container in enumerate(containers):
        pids.append(container.do(begin_inside, "ram", "--size", f"{4 + dev_id}M"))
        container.give(f"ublkc{dev_id}")            # the create waits for it
        container.give(f"ublkb{dev_id}")
        assert container.do(live_inside) == f"/dev/ublkb{dev_id}"
    for mine, container in enumerate(containers):
        other = 1 - mine
        row, = container.do(rows_inside)
        assert (row["id"], row["state"], row["size"]) == (mine, "LIVE", (4 + mine) << 20)
        assert row["pid"] == pids[mine] < 20            # a number of the container's own
        assert (row["owner_uid"], row["owner_gid"]) == (ALICE, ALICE)
        assert container.do(write_inside, f"/dev/ublkb{mine}") is True
        refused(container.do(every_command, other, f"/dev/ublkc{other}"), errno.ENOENT)
        refused(container.do(every_command, other, f"/dev/ublkc{mine}"), errno.EPERM)
        assert container.do(error_of_opening, f"/dev/ublkb{other}") == [errno.ENOENT] * 2
        for word in ("list", "stop", "del"):
            done = container.do(verb_inside, word, str(other))
            assert_fails(SimpleNamespace(**done), 1, "not visible here", errno.ENOENT)
    rows = json.loads(verb("list", "--json").out)
    assert [row["id"] for row in rows] == [0, 1]        # root outside sees and commands both
    if at_least("7.0"):             # which tells each caller the number of its own namespace
        for row, inner in zip(rows, pids):
            status = Path(f"/proc/{row['pid']}/status").read_text().splitlines()
            assert f"NSpid:\t{row['pid']}\t{inner}" in status
    status, text = containers[0].do(end_inside)
    assert status == 0 and text.count("\n") == 1 and "30 seconds" in text
    assert devices_left() == [1]
    assert verb("del", 1).status == 0


@kernel
def test_a_disk_is_listed_where_there_is_no_sysfs():
    script = 'mount -t tmpfs none /sys && exec "$@"'
    there = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, ublk.__file__]
    with ublk.Device(Ram()) as disk:
        row, = json.loads(sh(*there, "list", "--json").stdout)
    assert (row["size"], row["block_size"]) == (disk.target.size, disk.target.block_size)
