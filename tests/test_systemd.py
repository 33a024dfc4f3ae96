# SPDX-License-Identifier: MIT
"""A server under systemd."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import suppress
from types import SimpleNamespace

import pytest

import ublk
from tests.support import Forked, kernel, replace, until


@kernel
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_hears_of_readiness_status_and_watchdog(tmp_path, abstract):
    address = f"@ublk-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address.replace("@", "\0"))
        channel.settimeout(60)

        def change():
            os.environ.update(NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        disk = Forked("null", change=change).live()
        assert channel.recv(4096).decode().splitlines() == ["READY=1", f"STATUS=serving {disk.path}"]
        assert [channel.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert disk.kill(signal.SIGTERM) == 0
        said = b"WATCHDOG=1"
        while said == b"WATCHDOG=1":
            said = channel.recv(4096)
        assert said == b"STOPPING=1"


@kernel
def test_a_notify_socket_that_is_not_there_does_no_harm(tmp_path):
    told = tmp_path / "told"

    def change():
        def serve_started(disk, started, notify, serve_started=ublk.serve_started):
            def noted(message):
                with open(told, "a", encoding="utf-8") as file:
                    file.write(f"{message}\n")
                return notify(message)
            serve_started(disk, started, noted)
        os.environ.update(NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="20000")
        replace(ublk, serve_started=serve_started)
    with Forked("null", change=change) as disk:
        until(lambda: told.exists() and told.read_text().count("READY") > 1, "another attempt")
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""
    assert told.read_text().endswith("STOPPING=1\n")


def test_systemd_hears_of_readiness_when_it_has_room_for_more(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ublk.notifier() as notify:
        systemd.bind(str(tmp_path / "notify"))
        while notify("another's"):
            pass

        def wait(pause, looks=iter([False, True])):
            ended = next(looks)
            with suppress(BlockingIOError):
                while not ended:
                    assert systemd.recv(4096, socket.MSG_DONTWAIT) == b"another's"
            return ended

        disk = SimpleNamespace(path="/dev/ublkb0", interrupted="signal", wait=wait, follow_size=bool)
        ublk.serve_started(disk, SimpleNamespace(live=bool), notify)
        assert systemd.recv(4096) == b"READY=1\nSTATUS=serving /dev/ublkb0"
        assert systemd.recv(4096) == b"STOPPING=1"


@kernel
def test_systemd_hears_of_a_server_that_has_no_descriptors_left(tmp_path):
    """It was taken for one that hangs, and was ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(60)

        def change():
            os.environ.update(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        with Forked("null", change=change) as disk:
            resource.prlimit(disk.pid, resource.RLIMIT_NOFILE, (3, 3))
            for _ in range(50):             # more than could be waiting to be read
                assert channel.recv(4096)
            assert disk.kill(signal.SIGTERM) == 0       # or systemd would start it again


def test_a_notify_socket_that_nobody_reads_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ublk.notifier() as notify:
        systemd.bind(str(tmp_path / "notify"))
        for _ in range(1000):               # more than the queue of any socket holds
            notify("WATCHDOG=1")
        assert systemd.recv(100) == b"WATCHDOG=1"
