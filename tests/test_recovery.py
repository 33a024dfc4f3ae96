# SPDX-License-Identifier: MIT
"""Servers that die or are exchanged, and what the next one finds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

import ublk
from tests.support import (
    BOB,
    CONTINUE,
    HERE,
    ROUNDS,
    Forked,
    Ram,
    assert_error_line,
    assert_fails,
    assert_nothing_stuck,
    await_state,
    before,
    completed,
    devices_left,
    error_of,
    kernel,
    kill_under_load,
    needs,
    opened,
    orphan,
    processes_left,
    read_at,
    recovered,
    replace,
    sh,
    since,
    state_of,
    target_file,
    until,
    verb,
    write_at,
)


@kernel
def test_reissue_loses_nothing(backing):
    disk, failed = kill_under_load(Forked("loop", backing, "-r", "reissue").live())
    assert failed == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@before("6.16")
@pytest.mark.parametrize("command", ["stop", "del"])
def test_nobody_begins_to_recover_a_disk_that_is_being_stopped(monkeypatch, run, command):
    """From 6.7 to 6.15 the kernel crashes where its tags are fetched in that moment."""
    told = []

    def stop_dev(control, dev_id, *timeout):
        told.append((server.closed, error_of(lambda: os.close(os.open(f"/dev/ublkc{dev_id}", os.O_RDWR)))))
        stop(control, dev_id, *timeout)
    stop = ublk.Control.stop_dev
    with ublk.Device(Ram(), recovery="requeue") as disk:
        disk.detach()
        until(lambda: state_of(disk.id) == "QUIESCED")
        server = ublk.open_char(disk.id)        # that is on its way
        monkeypatch.setattr(ublk.Control, "stop_dev", stop_dev)
        threading.Timer(0.5, server.close).start()
        assert run(command, disk.id).status == 0
    ublk.clean_up(disk.identity)
    assert told[0] == (True, errno.EBUSY)


@kernel
def test_requeue_fails_only_what_was_in_flight(backing):
    disk, failed = kill_under_load(Forked("loop", backing, "-r", "requeue").live(), *CONTINUE)
    assert failed <= 16 * ROUNDS                    # fio's depth
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.13")
def test_fail_answers_at_once_and_is_whole_after_recovery(backing):
    disk = Forked("loop", backing, "-r", "fail").live()

    def exchange(disk, fio):
        disk.kill()
        await_state(disk.id, "FAIL_IO")
        with opened(disk.path) as fd:
            assert error_of(write_at, fd, 0, bytes(4096)) in (errno.EIO, errno.EREMOTEIO)
        fio.finish()
        return recovered(disk)

    disk, failed = kill_under_load(disk, *CONTINUE, exchange=exchange)
    assert failed > 0
    assert disk.kill(signal.SIGTERM) == 0


HOLDING = """
    class Mine(ublk.Target):
        size = 1 << 20
        def __init__(self, directory):
            self.directory = directory
        async def read(self, offset, buffer):
            buffer[:] = bytes(len(buffer))
        async def write(self, offset, buffer):
            with open(f"{self.directory}/taken", "a") as file:
                file.write(f"{offset}\\n")
            while os.path.exists(f"{self.directory}/hold"):
                await asyncio.sleep(0.05)
"""


class Writes:
    """One write to each of these offsets of a disk, all at once: errors tells each errno, 0 for success."""

    def __init__(self, path, offsets):
        self.path, self.errors, self.threads = path, {}, []
        for offset in offsets:
            thread = threading.Thread(target=self._write, args=(offset,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _write(self, offset):
        with opened(self.path) as fd:
            self.errors[offset] = error_of(write_at, fd, offset, bytes(4096))

    def wait_in_the_kernel(self):
        """Tell whether all threads wait uninterruptibly, as for a disk."""
        states = [Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(") ")[2][0]
                  for thread in self.threads]
        return states == ["D"] * len(states)

    def ended(self):
        """Wait for the end of all; return the errnos of those that failed."""
        for thread in self.threads:
            thread.join(60)
        assert len(self.errors) == len(self.threads), "a write never ended"
        return [number for number in self.errors.values() if number]


def holding(directory, mode):
    """Serve a disk whose handlers hold eight writes; return it and the writes."""
    (directory / "hold").touch()
    path = target_file(directory, HOLDING)
    disk = Forked(path, directory, "-r", mode).live()
    writes = Writes(disk.path, range(0, 8 << 16, 1 << 16))
    until(lambda: taken(directory) == [1] * 8, "all writes to be taken")
    return disk, writes


def taken(directory):
    """Return how often a handler was called for each offset, as far as any was."""
    path = directory / "taken"
    return list(Counter(path.read_text().splitlines()).values()) if path.exists() else []


@kernel
@pytest.mark.parametrize("mode, failed, calls", [("requeue", 8, 1), ("reissue", 0, 2)])
def test_what_a_dead_server_held(mode, failed, calls, tmp_path):
    """With requeue exactly that fails, with reissue nothing does and the next server is asked again."""
    disk, held = holding(tmp_path, mode)
    disk.kill()
    await_state(disk.id, "QUIESCED")
    later = Writes(disk.path, [1 << 19])
    until(later.wait_in_the_kernel, "the write to a disk without a server")
    (tmp_path / "hold").unlink()
    disk = recovered(disk)
    assert held.ended() == [errno.EIO] * failed
    assert later.ended() == []
    assert sorted(taken(tmp_path)) == sorted([calls] * 8 + [1])
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.13")
def test_what_a_dead_server_held_fails_with_the_mode_fail(tmp_path):
    disk, held = holding(tmp_path, "fail")
    disk.kill()
    await_state(disk.id, "FAIL_IO")
    assert held.ended() == [errno.EIO] * 8
    (tmp_path / "hold").unlink()
    disk = recovered(disk)
    assert Writes(disk.path, [1 << 19]).ended() == []
    assert sorted(taken(tmp_path)) == [1] * 9
    assert disk.kill(signal.SIGTERM) == 0


class Files:
    """A process that writes files and syncs each, and tells which are on the disk for good."""

    CODE = """
import hashlib, os, sys
directory, journal = sys.argv[1:]
journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
number = 0
while not os.path.exists(directory + "/stop"):
    data = os.urandom(4096 + number * 1237 % 60000)
    name = f"{directory}/{number}"
    if number >= 150:
        os.unlink(f"{directory}/{number - 150}")
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.write(journal, f"{name} {hashlib.md5(data).hexdigest()}\\n".encode())
    number += 1
"""

    def __init__(self, directory, journal):
        self.directory, self.journal = directory, journal
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE, directory, journal],
                                        stderr=subprocess.PIPE, text=True)

    def synced(self):
        """Return (name, digest) of the files written for good; only the last 150 are still there."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line.split() for line in lines]

    def busy(self):
        """Wait until another two files are written."""
        before = len(self.synced())
        until(lambda: self.process.poll() is not None or len(self.synced()) > before + 1, "two files")
        assert self.process.poll() is None, self.process.communicate()[1]

    def finish(self):
        """End the process, without a single error."""
        Path(self.directory, "stop").write_text("")
        assert self.process.communicate(timeout=60)[1] == "" and self.process.returncode == 0

    def check(self):
        """Read all files back but one that may have been about to go."""
        for name, digest in self.synced()[-149:]:
            assert hashlib.md5(Path(name).read_bytes()).hexdigest() == digest, name


@contextmanager
def file_system(disk, directory):
    """Make an ext4 on a disk, mount it, and see afterwards that it can be unmounted and is sound."""
    needs("mkfs.ext4", "e2fsck", "mount")
    sh("mkfs.ext4", "-Fq", "-E", "nodiscard,lazy_itable_init=0", disk.path, "32M")
    directory.mkdir()
    sh("mount", disk.path, directory)
    try:
        yield
    except BaseException:
        sh("umount", "-l", directory, check=False)
        raise
    sh("umount", directory)
    sh("e2fsck", "-fn", disk.path)


def churn(directory, files, once, rounds=ROUNDS):
    """Do something to a disk again and again while files are written to it."""
    for _ in range(rounds):
        files.busy()
        once()
    files.busy()
    files.finish()
    mount, = (line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {directory} " in line)
    assert mount.split()[3].startswith("rw")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    files.check()


@kernel
def test_a_mounted_file_system_survives(backing, tmp_path):
    disk = Forked("loop", backing, "-r", "reissue").live()

    def once():
        nonlocal disk
        disk.kill()
        disk = recovered(disk)
    with file_system(disk, tmp_path / "mnt"):
        files = Files(tmp_path / "mnt", tmp_path / "journal")
        churn(tmp_path / "mnt", files, once)
    assert len(files.synced()) > 2 * ROUNDS
    assert disk.kill(signal.SIGTERM) == 0


TARGET = """
    VERSION = b"old"

    class Mine(ublk.Target):
        def __init__(self, path):
            self.fd = os.open(path, os.O_RDWR)
            self.size = os.fstat(self.fd).st_size
        def read(self, offset, buffer):
            if offset >= self.size - 4096:
                buffer[:3] = VERSION                # the end of the disk tells what serves it
            else:
                assert os.preadv(self.fd, [buffer], offset) == len(buffer)
        def write(self, offset, buffer):
            assert os.pwrite(self.fd, buffer, offset) == len(buffer)
        def flush(self):
            os.fdatasync(self.fd)
        def close(self):
            os.close(self.fd)
"""


@kernel
@pytest.mark.parametrize("end", ["kill", pytest.param("quiesce", marks=since("6.16"))])
def test_an_edited_target_serves_with_the_file_system_mounted(end, backing, tmp_path, run):
    path = target_file(tmp_path, TARGET)
    disk = Forked(f"{path}:Mine", backing, "-r", "reissue").live()
    versions = iter([b"new", b"3rd"])

    def once():
        nonlocal disk
        version = next(versions)
        target_file(tmp_path, TARGET.replace("old", version.decode()))
        if end == "kill":
            disk.kill()
        else:
            assert run("quiesce", disk.id).status == 0 and disk.wait() == 0
        disk = recovered(disk)
        with opened(disk.path, os.O_RDONLY) as fd:
            assert read_at(fd, (64 << 20) - 4096, 4096)[:3] == version
    with file_system(disk, tmp_path / "mnt"):
        churn(tmp_path / "mnt", Files(tmp_path / "mnt", tmp_path / "journal"), once, rounds=2)
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
@pytest.mark.parametrize("words", [["--copy"], []], ids=["copy", "fastest"])
def test_quiesce_and_recover_without_an_error(backing, run, words):
    disk = Forked("loop", backing, "-r", "reissue", *words).live()
    with ublk.Control() as control:
        assert bool(control.get_dev_info(disk.id).flags & ublk.UBLK_F_AUTO_BUF_REG) == (not words)

    def exchange(disk, fio):
        done = run("quiesce", disk.id)
        assert (done.status, done.err) == (0, "")
        assert disk.wait() == 0 and disk.said() == ""
        assert state_of(disk.id) == "QUIESCED"
        return recovered(disk)

    disk, failed = kill_under_load(disk, exchange=exchange)
    assert failed == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_a_program_leaves_a_disk_that_was_quiesced_to_the_next_server(run):
    with ublk.Device(Ram(), recovery="requeue", queues=2) as disk:
        leaving = threading.Thread(target=lambda: disk.wait() and disk.stop())
        leaving.start()
        assert run("quiesce", disk.id).status == 0
        leaving.join()
    assert state_of(disk.id) == "QUIESCED" and run("del", disk.id).status == 0


@kernel
def test_a_signal_ends_a_server_that_recovers(backing):
    def change():
        def wait(self):
            print("RECOVERING", file=sys.stderr)
            while True:                 # in steps, as the product waits: a signal may come just before one
                self._pause(0.05)
        replace(ublk.Device, _await_end_of_server=wait)
    disk = Forked("recover", orphan("loop", backing, "-r", "requeue").id, change=change)
    until(lambda: "RECOVERING" in disk.said())
    status = disk.kill(signal.SIGTERM)
    assert_error_line(disk.said().splitlines(True)[-1], errno.EINTR, says="ended by SIGTERM before")
    assert status == 1 and state_of(0) == "QUIESCED"        # the disk is not this server's to delete
    assert ublk.main(["del", "0"]) == 0
    assert devices_left() == []


@kernel
def test_a_signal_while_a_device_is_added_leaves_none(tmp_path):
    hits = 0
    for round in range(20):
        def change(round=round, add_dev=ublk.Control.add_dev):
            adding = False

            def add(self, *args):
                nonlocal adding
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (round + 1))
                adding = True
                info = add_dev(self, *args)
                adding = False
                return info

            def alarm(*_):
                print("HIT" if adding else "", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGALRM, alarm)
            replace(ublk.Control, add_dev=add)
        disk = Forked("null", change=change)
        disk.wait()
        hits += "HIT" in disk.said()
        assert devices_left() == []
    assert hits > 0


@kernel
@pytest.mark.parametrize("number, options", [(signal.SIGINT, []), (signal.SIGTERM, ["-r", "reissue"])])
def test_who_waits_for_a_server_takes_it_along(tmp_path, number, options):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def __init__(self, directory):
                self.directory = directory
            def start(self, index):
                open(f"{self.directory}/started", "w").close()
                while not os.path.exists(f"{self.directory}/stopping"):
                    time.sleep(0.01)
    """)

    def change():
        def interrupt(self, reason, interrupt=ublk.Device.interrupt):
            interrupt(self, reason)
            Path(tmp_path, "stopping").touch()
        replace(ublk.Device, interrupt=interrupt)
    waiting = Forked(path, tmp_path, "--background", *options, change=change)
    until(Path(tmp_path, "started").exists)
    assert waiting.kill(number) == 1
    assert_error_line(waiting.said(), errno.EINTR, says=f"ended by {number.name} before the disk was there")
    assert devices_left() == []


@kernel
@pytest.mark.parametrize("where, name, status", [(os, "read", 1), (ublk, "flush_output", 0)],
                         ids=["before it hears", "after"])
def test_a_command_that_is_ended_late_tells_the_truth(tmp_path, where, name, status):
    """The disk, perhaps a recovered one, went when the command had said that it was there."""
    told = tmp_path / "told"

    def change():
        def interrupt(self, reason, interrupt=ublk.Device.interrupt):
            told.touch() if "SIGTERM" in reason else None
            interrupt(self, reason)

        def signalled(*words, command=os.getpid(), call=getattr(where, name)):
            if os.getpid() == command:
                os.kill(command, signal.SIGTERM)
            return call(*words)
        replace(ublk.Device, interrupt=interrupt)
        replace(where, **{name: signalled})
    disk = Forked("null", "--id", 3, "--background", change=change)
    assert disk.wait() == status
    if status == 0:
        verb("del", 3)
    until(lambda: devices_left() == [] and processes_left() == {})
    assert told.exists() == (status == 1)


@kernel
def test_a_signal_to_a_disk_loses_nothing_of_the_page_cache(backing):
    disk = Forked("loop", backing, "-q", 2).live()
    data = os.urandom(4 << 20)
    with open(disk.path, "r+b", buffering=0) as file:
        file.write(data)                # to the page cache, which is written out when the disk is stopped
        os.kill(disk.pid, signal.SIGTERM)
        until(lambda: not os.path.exists(disk.path), "the disk to be stopped")
    assert disk.wait() == 0 and disk.said() == ""
    with open(backing, "rb") as file:
        assert file.read(len(data)) == data


@kernel
def test_what_a_target_prints_is_not_on_standard_output(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self, size):
                print("made")
                self.size = size
            def start(self, index):
                print("started")
            def read(self, offset, buffer):
                print("read")
            def write_zeroes(self, offset, length):
                print("zeroed", offset, length)
    """)
    with Forked(path, "--size", "1M") as disk:
        sh("blkdiscard", "-fz", "-o", 4096, "-l", 8192, disk.path)
        assert disk.said(disk.output) == f"{disk.path}\n"
    for word in ("made", "started", "read", "zeroed 4096 8192"):
        assert f"{word}\n" in disk.said()


IO_FLUSHER = 0x180000           # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of linux/sched.h


def is_flusher(task):
    """Tell from /proc whether a task has said PR_SET_IO_FLUSHER."""
    fields = Path(f"/proc/{task}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[6]) & IO_FLUSHER == IO_FLUSHER


@kernel
def test_who_serves_requests_is_an_io_flusher():
    serving = []

    class Tells(Ram):
        def start(self, index):
            serving.append(threading.get_native_id())

    for queues in 1, 2:
        with ublk.Device(Tells(), queues=queues):
            assert len(serving) == queues and all(is_flusher(f"self/task/{task}") for task in serving)
        serving.clear()
    assert not is_flusher("self")


@kernel
@pytest.mark.parametrize("recovery", [
    pytest.param([], id="lost"), pytest.param(["-r", "fail"], id="fail", marks=since("6.13"))])
def test_a_lost_thread_does_not_leave_a_deaf_disk(tmp_path, recovery):
    flag, collect = tmp_path / "flag", ublk.Queue.collect

    def change():
        def fail(queue, timeout=None):
            tags = collect(queue, timeout)
            if tags and flag.exists():
                raise RuntimeError("a fault of the loop itself")
            return tags
        replace(ublk.Queue, collect=fail)
    disk = Forked("ram", "--size", "4M", *recovery, change=change).live()
    with opened(disk.path) as fd:
        flag.touch()
        assert error_of(read_at, fd, 1 << 20, 4096) in (errno.EIO, errno.ENODEV)
    assert disk.wait() == 1, disk.said()
    assert disk.said().count("Traceback") == 1 and "a fault of the loop itself" in disk.said()
    if recovery:
        await_state(disk.id, "FAIL_IO")
        disk = recovered(disk)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
        assert disk.kill(signal.SIGTERM) == 0
    assert devices_left() == []


@kernel
def test_recover_refuses_a_disk_that_is_served(run):
    with Forked("null", "-r", "requeue") as disk:
        assert_fails(run("recover", disk.id), 1, "its server still lives", errno.EBUSY)
        assert state_of(disk.id) == "LIVE"
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_recover_leaves_the_files_of_a_server_alone_whose_process_is_not_seen(tmp_path, monkeypatch):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def __init__(self):
                with open(os.environ["MADE"], "a") as made:
                    made.write("once")
    """)
    monkeypatch.setenv("MADE", str(tmp_path / "made"))
    with Forked(path, "-r", "requeue") as disk:
        there = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, ublk.__file__]
        done = subprocess.run([*there, "recover", str(disk.id)], capture_output=True, text=True)
        assert done.returncode == 1 and "its server still lives" in done.stderr
        assert (tmp_path / "made").read_text() == "once" and state_of(disk.id) == "LIVE"
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_recovery_makes_its_target_when_no_other_server_can_have_the_disk(tmp_path, monkeypatch):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def __init__(self):
                with open(os.environ["MADE"], "a") as made:
                    try:
                        open("/dev/ublkc0").close()
                    except OSError as error:
                        made.write(f"{error.strerror}, ")
    """)
    made = tmp_path / "made"
    monkeypatch.setenv("MADE", str(made))
    disk = Forked(path, "-r", "requeue").live()
    disk.kill()
    with recovered(disk) as disk:
        assert made.read_text() == "No such file or directory, Device or resource busy, "
        assert disk.kill(signal.SIGTERM) == 0


@kernel
@pytest.mark.parametrize("ends", ["raise OSError(111, 'not yet')",
                                  "os.kill(os.getpid(), 9)"], ids=["fails", "is killed"])
def test_a_disk_whose_target_does_not_start_is_left_to_the_next_server(ends, tmp_path):
    early, waiting = tmp_path / "early", tmp_path / "waiting"
    path = target_file(tmp_path, f"""
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                if not os.path.exists({str(early)!r}):
                    return
                if not index:
                    open({str(waiting)!r}, "w").close()
                    return
                while not os.path.exists({str(waiting)!r}):
                    time.sleep(0.1)
                {ends}
            def read(self, offset, buffer):
                pass
    """)
    disk = Forked(path, "-q", 2, "-r", "requeue").live()
    disk.kill()
    early.touch()
    assert Forked("recover", disk.id).wait() in (1, -signal.SIGKILL)
    early.unlink()
    with recovered(disk) as disk:
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_server_that_is_killed_with_every_tag_in_its_hands_is_recovered(tmp_path):
    """From 6.8 to 6.15 the kernel notices its end when a request has taken 30 seconds."""
    stuck = tmp_path / "stuck"
    stuck.touch()
    path = target_file(tmp_path, f"""
        class Mine(ublk.Target):
            size = 1 << 20
            async def read(self, offset, buffer):
                while os.path.exists({str(stuck)!r}):
                    open({str(tmp_path / "asked")!r}, "w").close()
                    await asyncio.sleep(0.1)
    """)
    disk = Forked(path, "-d", 1, "-r", "requeue", "--no-partition-scan").live()
    client = subprocess.Popen(["cat", disk.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until((tmp_path / "asked").exists)
    disk.kill()
    stuck.unlink()
    with recovered(disk) as disk:
        client.wait()
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_recover_refuses_a_disk_not_made_for_it(run):
    disk = orphan("null")
    assert_fails(run("recover", disk.id), 1, "not made to be recovered", errno.EINVAL)
    assert run("del", disk.id).status == 0


@kernel
def test_recover_refuses_a_disk_that_is_stopped(run):
    disk = orphan("null", "-r", "requeue")
    assert run("stop", disk.id).status == 0
    assert_fails(run("recover", disk.id), 1, f"it is stopped (22 EINVAL): delete it: `ublk.py del {disk.id}`")
    assert run("del", disk.id).status == 0


@kernel
def test_recover_waits_until_its_file_can_be_written_to_again(backing):
    """All that clients write would fail, and be lost, by a server that can only read."""
    needs("chattr")
    disk = Forked("loop", backing, "-r", "reissue").live()
    with opened(disk.path) as fd:
        disk.kill()
        sh("chattr", "+i", backing)
        try:
            refused = Forked("recover", disk.id)
            assert refused.wait() == 1 and "the target can only be read" in refused.said()
        finally:
            sh("chattr", "-i", backing)
        last = recovered(disk)
        assert write_at(fd, 0, b"x" * 512) == 512
    assert last.kill(signal.SIGTERM) == 0                   # up to 6.4 it waits for who has the disk open


@kernel
def test_recover_refuses_a_disk_that_does_not_exist(run):
    assert_fails(run("recover", 9), 1, "there is no such device", errno.ENODEV)


@kernel
def test_recover_without_a_state_file(run, run_dir, backing, tmp_path):
    path = target_file(tmp_path, """
        class Small(ublk.Target):
            size = 4096
            write = write_fua = print
    """)
    disk = orphan("loop", backing, "-r", "reissue")
    (run_dir / f"{disk.id}.json").unlink()
    assert_fails(run("recover", disk.id), 1, "--target TARGET", errno.ENOENT)
    assert_fails(run("recover", disk.id, "--target", path), 1, "as large as", errno.EINVAL)
    assert_fails(run("recover", disk.id, "--target", "loop", "/no/such"), 1, "/no/such", errno.ENOENT)
    assert state_of(disk.id) == "QUIESCED"
    disk = Forked("recover", disk.id, "--target", "loop", backing).live()
    disk.kill()
    disk = recovered(disk)                  # which finds a state file again
    assert disk.kill(signal.SIGTERM) == 0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory with a disk.img where the disk is not made; we are in the one where it is, with another."""
    for name in ("made", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disk.img").write_bytes(name.encode()[:4] * (1 << 18))
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "other"


@kernel
def test_words_mean_what_they_meant_where_the_disk_was_made(elsewhere, monkeypatch):
    disk = orphan("loop", "disk.img", "-r", "reissue")
    monkeypatch.chdir(elsewhere)
    disk = recovered(disk)
    disk.kill()
    disk = recovered(disk)                  # whose state was written by the one before
    with opened(disk.path) as fd:
        assert read_at(fd, 0, 4096) == b"made" * 1024
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_recover_from_python(backing):
    import ublk_targets
    disk = orphan("loop", backing, "-r", "reissue")
    with ublk.Device.recover(disk.id, ublk_targets.Loop(str(backing))) as served:
        assert served.path == disk.path and state_of(disk.id) == "LIVE"
        with opened(disk.path) as fd:
            write_at(fd, 4096, b"python" * 2048)
            assert read_at(fd, 4096, 4096) == (b"python" * 2048)[:4096]
    assert devices_left() == []
    assert backing.read_bytes()[4096:4102] == b"python"


@kernel
def test_a_disk_of_a_program_is_recovered_by_that_program_or_by_words(run, run_dir):
    disk = orphan("null", "-r", "requeue")
    file = run_dir / f"{disk.id}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target": "Mine"}))
    assert_fails(run("recover", disk.id), 1, "have the program that made it recover it, or name its target: "
                 f"`ublk.py recover {disk.id} --target TARGET ...`", errno.EINVAL)
    assert state_of(disk.id) == "QUIESCED"
    assert verb("del", disk.id).status == 0


@kernel
def test_a_device_without_its_node_is_listed_and_deleted(run):
    disk = orphan("null", "-r", "requeue")
    os.unlink(f"/dev/ublkc{disk.id}")
    assert [row["state"] for row in json.loads(run("list", "--json").out)] == ["QUIESCED"]
    assert verb("del", disk.id).status == 0
    assert devices_left() == []


@kernel
def test_orphans_are_listed_and_deleted(run, run_dir):
    lost, kept = Forked("null").live(), Forked("null", "-r", "requeue").live()
    for disk in lost, kept:
        disk.kill()
    await_state(lost.id, "DEAD")
    await_state(kept.id, "QUIESCED")
    (run_dir / "77.json").write_text('{"id": 77}')
    done = run("list", "--json")
    rows = {row["id"]: (row["state"], row["pid"], row["target"]) for row in json.loads(done.out)}
    assert rows == {lost.id: ("DEAD", -1, "null"), kept.id: ("QUIESCED", -1, "null")}
    assert "77.json is left of a device that is gone: `ublk.py del 77` removes it" in done.err
    assert done.err.count("\n") == 1
    done = run("del", lost.id, kept.id, 77)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == [] and list(run_dir.iterdir()) == []
    assert_nothing_stuck()


EVIL = 'open({!r}, "w").close()\nimport ublk\nclass Evil(ublk.Target):\n    size = 1 << 30\n'


def damages(run_dir, tmp_path, good):
    """Yield names of damage, each done to the state file of device 0 before."""
    path, marker = run_dir / "0.json", tmp_path / "executed"
    evil = tmp_path / "evil.py"
    evil.write_text(EVIL.format(str(marker)))
    hostile = json.dumps({**json.loads(good), "target": f"{evil}:Evil", "args": []})

    def write(text):
        path.unlink(missing_ok=True)
        path.write_text(text)

    for name, text in (("empty", ""), ("truncated", good[:-10]), ("not an object", "[1]"),
                       ("deep", "[" * 100000), ("another's", good.replace('"id": 0', '"id": 1')),
                       ("huge", hostile[:-1] + " " * (2 << 20) + "}"),
                       ("a number", json.dumps({**json.loads(hostile), "target": 5})),
                       ("args", json.dumps({**json.loads(hostile), "args": {"a": 1}})),
                       ("null", json.dumps({**json.loads(hostile), "cwd": None}))):
        write(text)
        yield name
    write(hostile)
    os.chown(path, BOB, BOB)
    yield "of somebody else"
    path.unlink()
    (tmp_path / "elsewhere.json").write_text(hostile)
    path.symlink_to(tmp_path / "elsewhere.json")
    yield "a link"
    path.unlink()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()


# Asks a disk for blocks whether or not it answers, as long as less than 900 answers are missing.
ASKING = """\
import mmap, os, sys, ublk
ring = ublk.Ring(1024)
disk = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
missing = slot = 0
while True:
    if missing < 900:
        ring.prepare(slot, ublk.IORING_OP_READ, disk, 0, ublk.address_of(buffer), 4096)
        ring.push(slot)
        slot, missing = (slot + 1) % 1024, missing + 1
    ring.enter(missing == 900)
    results = ring.reap()[1]
    missing -= len(results)
    assert min(results, default=0) >= 0, results
"""


@kernel
@pytest.mark.parametrize("path", ["copy", pytest.param("user-copy", marks=since("6.5"))])
def test_requests_that_come_while_a_queue_goes_are_the_next_servers(path):
    """Up to 6.12 the queue's thread would take them, if it still could, and nobody ever answer them."""
    disk = ublk.Device(Ram(), depth=1024, max_io=4096, recovery="reissue", data_path=path)
    disk.start()
    client = subprocess.Popen([sys.executable, "-c", ASKING, disk.path], cwd=HERE)
    try:
        for _ in range(4):
            enough = completed(disk) + 500
            until(lambda disk=disk, enough=enough: completed(disk) > enough, "the disk to be under load")
            disk.detach()
            disk = ublk.Device.recover(disk.id, Ram())
        assert client.poll() is None
    finally:
        client.kill()
    client.wait()
    disk.stop()


@kernel
def test_a_damaged_state_file_is_reported_and_never_executed(run, run_dir, tmp_path, backing):
    disk = orphan("loop", backing, "-r", "reissue")
    good = (run_dir / "0.json").read_text()
    for name in damages(run_dir, tmp_path, good):
        done = run("recover", disk.id)
        assert done.status == 1 and f"ublk: ignoring {run_dir}/0.json: " in done.err, (name, done)
        assert_error_line(done.err.splitlines(True)[-1], errno.ENOENT, says="--target")
        done = run("list", "--json")
        assert json.loads(done.out)[0]["target"] is None and "ignoring" in done.err, name
    assert not (tmp_path / "executed").exists()
    assert state_of(disk.id) == "QUIESCED"
    (tmp_path / "elsewhere.json").write_text("untouched")
    (run_dir / "0.json").symlink_to(tmp_path / "elsewhere.json")
    disk = Forked("recover", disk.id, "--target", "loop", backing).live()     # replaces the link
    assert (tmp_path / "elsewhere.json").read_text() == "untouched"
    assert not (run_dir / "0.json").is_symlink()
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_strange_names_among_the_state_files(run, run_dir, tmp_path):
    run_dir.mkdir(mode=0o700)
    names = ["²", "٣", "00", "-1", "0x1", "1e3", "..", " 5", "5\n", "9" * 200, "x", ""]
    for name in names:
        (run_dir / f"{name}.json").write_text("{}")
    with Forked("null") as disk:
        done = run("list")
        assert done.status == 0 and "Traceback" not in done.err
        assert done.err == ""
        assert run("del", 4294967296 + disk.id).status == 1         # not device 0 by another name
        assert run("del", -4294967296 + disk.id).status != 0
        assert state_of(disk.id) == "LIVE"
        for word in ("../0", "0/../../x", "²", "0 ", ""):
            assert run("recover", word).status in (1, 2)
        assert run("del", "--all").status == 0
        assert disk.wait() == 0
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(f"{name}.json" for name in names)
