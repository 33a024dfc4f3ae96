# SPDX-License-Identifier: MIT
"""The suite itself: what it notices, and what it takes away whatever the product does."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import ublk
from tests import support
from tests.support import (
    HERE,
    Forked,
    Hanging,
    KernelLog,
    Ram,
    clean_up,
    devices_left,
    kernel,
    leftovers,
    opened,
    orphan,
    read_at,
    target_file,
    until,
    verb,
    watchdog,
)

sys.path.append(str(HERE / "lab"))
import lab


@kernel
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_that_is_left_is_taken_away_though_the_product_is_broken(control, monkeypatch):
    control.add_dev(-1, 1, 4, 65536, 0)
    orphan("null", "-r", "requeue")
    Forked("null", "-q", 2).live()
    done = verb("null", "--background")
    assert done.status == 0, done
    here = ublk.Device(Ram())
    here.start()
    assert len(devices_left()) == 5

    def broken(*_, **__):
        raise RuntimeError("broken")
    with monkeypatch.context() as patch:
        for item in (ublk.Control, ublk.Ring):
            for name in vars(item):
                if not name.startswith("__") and callable(getattr(item, name)):
                    patch.setattr(item, name, broken)
        for name in ("device_ids", "delete", "alive", "open_char"):
            patch.setattr(ublk, name, broken)
        clean_up()
        until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("ublk")])
    assert leftovers() == []
    atexit.unregister(here.__exit__)


@kernel
def test_a_server_holds_no_disk_that_the_test_has_open():
    with ublk.Device(Ram()) as disk, opened(disk.path), Forked("null") as other:
        files = [os.readlink(path) for path in Path(f"/proc/{other.pid}/fd").iterdir()]
        assert f"/dev/ublkc{other.id}" in files
        assert not {disk.path, f"/dev/ublkc{disk.id}"} & set(files)


def test_a_test_that_hangs_fails():
    with pytest.raises(Hanging), watchdog(0.1):
        threading.Event().wait()


ENDLESS = """
    class Mine(ublk.Target):
        size = 1 << 20
        def read(self, offset, buffer):
            while offset == 65536:
                time.sleep(0.1)
        def write(self, offset, buffer):
            pass
"""


@kernel
def test_a_test_that_waits_for_a_hanging_server_fails(tmp_path):
    disk = Forked(target_file(tmp_path, ENDLESS)).live()
    with pytest.raises((Hanging, OSError)), watchdog(1), opened(disk.path) as fd:
        read_at(fd, 65536, 4096)
    assert disk.ended()
    clean_up()


@kernel
def test_a_test_that_waits_for_a_hanging_handler_fails():
    class Endless(Ram):
        def read(self, offset, buffer):
            while offset == 65536:
                time.sleep(0.1)

    disk = ublk.Device(Endless())
    disk.start()
    with pytest.raises((Hanging, OSError)), watchdog(1), opened(disk.path) as fd:
        read_at(fd, 65536, 4096)
    disk.stop()


@pytest.mark.parametrize("text", [
    "WARNING: CPU: 0 PID: 12 at drivers/block/ublk_drv.c:1 ublk_stop_dev+0xb6/0x160 [ublk_drv]",
    "BUG: kernel NULL pointer dereference, address: 0000000000000010", "Oops: 0000 [#1] PREEMPT SMP",
    "INFO: task dd:5 blocked for more than 120 seconds."])
def test_a_warning_of_the_kernel_is_trouble(text):
    said, read = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with said, read:
        read.setblocking(False)
        log = KernelLog(read.fileno())
        said.send(b"6,1,2,-;ublk_drv: nothing to worry about\n SUBSYSTEM=block\n")
        assert log.trouble("test_anything") == []
        said.send(f"4,2,3,-;{text}\n".encode())
        assert log.trouble("test_anything") == [text]


def test_what_is_known_of_a_kernel_is_shown_in_its_tests_and_trouble_in_others(monkeypatch):
    monkeypatch.setattr(support, "KNOWN_TROUBLE", [("ublk_ch_uring_cmd", "half-fetched", "so it is")])
    text = "WARNING: CPU: 0 PID: 12 at drivers/block/ublk_drv.c:1616 ublk_ch_uring_cmd+0xb6/0x160 [ublk_drv]"
    log = KernelLog(-1)
    log.lines = lambda: [text]
    with pytest.warns(UserWarning, match="ublk_ch_uring_cmd"):
        assert log.trouble("test_killed_while_it_starts[half-fetched]") == []
    assert log.trouble("test_sizes") == [text]


@kernel
def test_of_the_log_is_read_what_is_new():
    Path("/dev/kmsg").write_text("<6>tests: before\n")
    log = KernelLog()
    Path("/dev/kmsg").write_text("<6>tests: after\n")
    lines = log.lines()
    assert "tests: after" in lines and "tests: before" not in lines
    log.close()


@pytest.mark.parametrize("path", [path for paths in (lab.ONCE, *lab.NOT_THERE.values()) for path in paths])
def test_what_some_kernels_leave_out_is_there(path):
    """pytest says nothing of a file or a test that it is to leave out and that there is not."""
    file, _, test = path.partition("::")
    assert f"def {test.partition('[')[0]}" in (HERE / file).read_text()
