# SPDX-License-Identifier: MIT
"""Ends of a disk, good and bad: what a life leaves behind, who holds a disk, handlers that never return."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import ublk
from tests.support import (
    HERE,
    AsyncRam,
    Fio,
    Forked,
    Ram,
    assert_error_line,
    at_least,
    children_of,
    descriptors,
    devices_left,
    error_of,
    in_flight,
    kernel,
    message,
    mount_of,
    needs,
    opened,
    read_at,
    sh,
    since,
    target_file,
    threads_of,
    until,
    verb,
    with_partition,
    write_at,
)


def belongings():
    """Return what this process holds: descriptors, threads, children, mappings, rings and memory."""
    files = descriptors()   # first: what refers to itself in a circle is not lost, only not yet found
    status = Path("/proc/self/status").read_text()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {"descriptors": len(files), "threads": threading.active_count(),
            "tasks": len(threads_of("self")), "children": len(children_of(os.getpid())),
            "rings": sum("io_uring" in line or "ublk" in line for line in maps), "mappings": len(maps),
            "kilobytes": int(re.search(r"VmRSS:\s+(\d+)", status)[1])}


def live_and_die(make, **options):
    """Create a disk, use it, delete it."""
    with ublk.Device(make(), **options) as disk, opened(disk.path) as fd:
        write_at(fd, 4096, b"u" * 4096)
        read_at(fd, 4096, 4096)


@kernel
@pytest.mark.parametrize("make, lives, options", [(Ram, 20, {"depth": 16}), (AsyncRam, 10, {"queues": 2}),
                                                  (ublk.Null, 10, {"queues": 2})])
def test_many_lives_leave_nothing_behind(make, lives, options):
    # The allocator takes memory from the kernel in large steps, now and then; a leak would show each time.
    for _ in range(10):                     # the first use of a thing may keep something
        live_and_die(make, **options)
    grown = []
    while len(grown) < 5:
        before = belongings()
        for _ in range(lives):
            live_and_die(make, **options)
        after = belongings()
        more = {name: after.pop(name) - before.pop(name) for name in ("kilobytes", "mappings")}
        assert after == before
        grown.append(more)
        if more["kilobytes"] <= lives and more["mappings"] <= 0:
            break
    else:
        pytest.fail(f"each time {lives} lives leave more: {grown}")
    assert not any(Path(os.environ["UBLK_RUN_DIR"]).iterdir())


@kernel
def test_a_server_killed_under_load_takes_its_disk_along(run):
    with Forked("ram", "--size", "16M") as disk, Fio(disk) as load:
        load.busy()
        disk.kill()
        assert load.process.wait(120) != 0
        done = run("del", disk.id)
        assert (done.status, done.err) == (0, "")
        assert devices_left() == []


@kernel
@pytest.mark.parametrize("body, says", [
    ("def start(self, index): raise ValueError('not today')", "ValueError: not today"),
    ("def start(self, index): raise OSError(28, 'the tape is full')", "28 ENOSPC"),
    ("def start(self, index): os._exit(3)", "died"),
    ("def start(self, index): os.kill(os.getpid(), 9)", "killed by signal 9"),
    ("def __init__(self): os._exit(0)", "died"),
    ("def __init__(self): os.kill(os.getpid(), 11)", "killed by signal 11"),
])
def test_a_server_that_dies_on_its_way_into_the_background(tmp_path, body, says):
    path = target_file(tmp_path, f"""
        class Mine(ublk.Target):
            size = 1 << 20
            {body}
    """)
    done = verb(path, "--background")
    assert (done.status, done.out) == (1, "")
    assert says in done.err and "ublk: " in done.err, done.err
    assert devices_left() == []


@kernel
def test_a_server_killed_on_its_way_into_the_background(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                ublk.make_run_dir()
                open(os.environ["UBLK_RUN_DIR"] + "/started", "w").close()
                time.sleep(3600)
    """)
    waiting = Forked(path, "--background")
    until((Path(os.environ["UBLK_RUN_DIR"]) / "started").exists, "the server to start")
    child, = children_of(waiting.pid)
    os.kill(child, signal.SIGKILL)
    assert waiting.wait() == 1
    assert_error_line(waiting.said(), errno.ECHILD, says="killed by signal 9")
    assert devices_left() == []


@kernel
@pytest.mark.parametrize("body, says", [
    ("def start(self, index): raise OSError(28, 'the tape is full')", "28 ENOSPC"),
    ("def start(self, index): raise ValueError('not today')", "ValueError: not today"),
])
def test_a_server_that_dies_in_the_foreground(tmp_path, body, says):
    path = target_file(tmp_path, f"""
        class Mine(ublk.Target):
            size = 1 << 20
            {body}
    """)
    done = verb(path)
    assert (done.status, done.out) == (1, "") and says in done.err
    assert devices_left() == []


class Stuck(Ram):
    """Never answer a read at 65536."""

    def __init__(self):
        super().__init__()
        self.reached, self.release = threading.Event(), threading.Event()

    def read(self, offset, buffer):
        if offset == 65536:
            self.reached.set()
            self.release.wait()
        super().read(offset, buffer)


class AsyncStuck(Stuck):
    """The same with a coroutine."""

    async def read(self, offset, buffer):
        if offset == 65536:
            self.reached.set()
            await asyncio.Event().wait()


def stuck_client(disk):
    """Start a process that reads where no answer comes."""
    return subprocess.Popen(["dd", f"if={disk.path}", "of=/dev/null", "bs=4k", "count=1", "skip=16",
                             "iflag=direct"], stderr=subprocess.DEVNULL)


# Before Linux 6.7 requests end only with the thread that has them.
@kernel
@pytest.mark.parametrize("make", [pytest.param(Stuck, marks=since("6.7")), AsyncStuck])
def test_a_handler_that_never_returns_does_not_keep_the_device(make, capfd):
    disk = ublk.Device(make())
    disk.start()
    client = stuck_client(disk)
    assert disk.target.reached.wait(60)
    disk.stop(timeout=0.5)
    assert client.wait(60) == 1
    assert devices_left() == []
    disk.target.release.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("ublk")])
    text = capfd.readouterr().err
    assert "a handler does not return" in text and "Traceback" not in text


@kernel
def test_a_disk_whose_handler_does_not_return_is_listed():
    disk = ublk.Device(Stuck())
    disk.start()
    client = stuck_client(disk)
    assert disk.target.reached.wait(60)
    stopping = threading.Thread(target=disk.stop)
    stopping.start()
    until(lambda: ublk.disk_size(disk.id) == 0, "STOP_DEV to wait")
    done = verb("list", "--json")           # a process that waited in the kernel, too, would not end
    disk.target.release.set()
    stopping.join()
    client.wait()
    row, = json.loads(done.out)
    assert (row["id"], row["size"], row["block_size"], row["pid"]) == (disk.id, 0, 0, os.getpid())
    assert devices_left() == []


@kernel
def test_ctrl_c_with_a_handler_that_never_returns(tmp_path):
    path = target_file(tmp_path, """
        ublk.STOP_TIMEOUT = 0.5
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                ublk.Device.stop.__defaults__ = (0.5,)
                ublk.delete.__defaults__ = (3.0,)
            def read(self, offset, buffer):
                while offset == 65536:
                    time.sleep(1)
            def write(self, offset, buffer):
                pass
    """)
    with Forked(path) as disk:
        client = stuck_client(disk)
        until(lambda: in_flight(disk)[0], "the read to arrive")
        # before 6.7 the request ends with the server's process, and only then can the device go
        assert disk.kill(signal.SIGINT) == (0 if at_least("6.7") else 1)
        assert client.wait(60) == 1
        if not at_least("6.7"):
            assert ublk.main(["del", str(disk.id)]) == 0
        assert devices_left() == []
    assert at_least("6.7") or f"`ublk.py del {disk.id}`" in disk.said()


@kernel
def test_a_disk_that_does_not_stop_keeps_no_other_waiting(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def read(self, offset, buffer):
                while offset == 65536:
                    time.sleep(1)
    """)
    stuck = Forked(path).live()
    client = stuck_client(stuck)
    until(lambda: in_flight(stuck)[0], "the read to arrive")
    soon = (1.0,)
    deleting = Forked("del", stuck.id, "--force", change=lambda: setattr(ublk.delete, "__defaults__", soon))
    until(lambda: "EBUSY" in deleting.said(), "the end of its wait")
    with ublk.Device(Ram(), partition_scan=False):
        pass
    stuck.kill()
    assert (client.wait(60), deleting.wait()) == (1, 1)
    assert "does not stop" in deleting.said() and ublk.main(["del", "--all"]) == 0


@kernel
@since("6.4")
def test_a_del_that_is_suspended_as_it_waits_names_who_has_the_disk_open():
    """To be suspended ends its command."""
    with Forked("null") as disk:
        with open(disk.path, "rb") as file:
            holder = subprocess.Popen(["sleep", "3600"], stdin=file)
        try:
            deleting = Forked("del", disk.id, "--force")
            until(lambda: not os.path.exists(f"/dev/ublkc{disk.id}"), "DEL_DEV")
            os.kill(deleting.pid, signal.SIGSTOP)
            threads = Path(f"/proc/{deleting.pid}/task")
            until(lambda: all(") T " in (thread / "stat").read_text() for thread in threads.iterdir()))
            os.kill(deleting.pid, signal.SIGCONT)
            assert deleting.wait() == 1
        finally:
            holder.kill()
            holder.wait()
    assert f"held open by sleep (pid {holder.pid})" in deleting.said()


@pytest.fixture
def impatient(monkeypatch):
    """Have a delete that waits for somebody to close a disk give up soon."""
    delete = ublk.delete
    monkeypatch.setattr(ublk, "delete", lambda *words: delete(*words, timeout=1))


@kernel
@pytest.mark.parametrize("part", ["", "p1"], ids=["disk", "partition"])
def test_who_holds_the_disk_is_named(impatient, part):
    device = ublk.Device(with_partition())
    device.start()
    until(lambda: os.path.exists(device.path + part), "the partition")
    with open(device.path + part, "rb") as disk:
        holder = subprocess.Popen(["sleep", "3600"], stdin=disk)
    try:
        text = message(device.stop)
        assert_error_line(f"ublk: {text}\n", errno.EBUSY, says=f"held open by sleep (pid {holder.pid})")
    finally:
        holder.kill()
        holder.wait()
    until(lambda: devices_left() == [], "the device to go once nobody holds it")


@kernel
def test_where_the_disk_is_mounted_is_named(impatient, tmp_path):
    needs("mkfs.ext4")
    device = ublk.Device(Ram(16 << 20))
    device.start()
    sh("mkfs.ext4", "-q", "-F", device.path)
    with mount_of(device.path, tmp_path / "mnt", "-o", "ro"):
        text = message(device.stop)
        assert_error_line(f"ublk: {text}\n", errno.EBUSY, says=f"the mount at {tmp_path / 'mnt'}")
    until(lambda: devices_left() == [], "the device to go once nobody holds it")


@kernel
def test_a_forked_child_does_not_hold_the_device():
    with ublk.Device(Ram()) as disk:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)              # lives, with copies of everything, until the parent is done
            os._exit(0)
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
    try:
        assert devices_left() == []
        with ublk.Device(Ram()) as disk, opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


@kernel
def test_a_program_started_meanwhile_does_not_hold_the_device():
    with ublk.Device(Ram()) as disk:
        program = subprocess.Popen(["sleep", "3600"], close_fds=False)
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
    try:
        assert devices_left() == []
    finally:
        program.kill()
        program.wait()


@kernel
def test_the_end_of_a_process_takes_its_disks_along(tmp_path):
    program = """
        import ublk, sys
        class Small(ublk.Target):
            size = 1 << 20
            def read(self, offset, buffer): pass
            def write(self, offset, buffer): pass
        device = ublk.Device(Small())
        device.start()
        print(device.path)
        if len(sys.argv) > 1:
            raise RuntimeError("a bug")
    """
    for words in ((), ("bug",)):
        done = sh(sys.executable, "-c", textwrap.dedent(program), *words, check=False, cwd=HERE)
        assert done.stdout == "/dev/ublkb0\n" and done.returncode == len(words)
        assert devices_left() == []


@kernel
@pytest.mark.parametrize("status", [0, 3])
def test_a_program_that_ends_with_its_disk_open_ends_as_it_would(status):
    program = f"""
        import sys, tests.support, ublk
        ublk.delete.__defaults__ = (1.0,)
        device = ublk.Device(tests.support.Ram())
        device.start()
        kept = open(device.path, "rb")
        sys.exit({status})
    """
    done = sh(sys.executable, "-c", textwrap.dedent(program), check=False, cwd=HERE)
    assert_error_line(done.stderr, errno.EBUSY, says="held open by")
    assert done.returncode == status
    until(lambda: devices_left() == [], "the device to go with who held it")


@kernel
@pytest.mark.parametrize("command", ["add_dev", "set_params", "start_dev", "stop_dev", "del_dev"])
def test_ctrl_c_around_any_command_leaves_nothing(command, monkeypatch):
    send, disk = getattr(ublk.Control, command), ublk.Device(Ram())

    def disturbed(self, *words, **more):
        monkeypatch.setattr(ublk.Control, command, send)
        send(self, *words, **more)
        raise KeyboardInterrupt
    monkeypatch.setattr(ublk.Control, command, disturbed)
    with pytest.raises(KeyboardInterrupt), disk:
        pass
    disk.stop()                     # what the end of the program would do
    assert devices_left() == []


@kernel
def test_a_command_that_is_left_before_it_is_sent_is_not_sent_later(control, monkeypatch):
    push = ublk.Ring.push

    def disturbed(ring, slot):
        monkeypatch.setattr(ublk.Ring, "push", push)
        push(ring, slot)
        raise KeyboardInterrupt
    monkeypatch.setattr(ublk.Ring, "push", disturbed)
    with pytest.raises(KeyboardInterrupt):
        control.add_dev(-1, 1, 4, 65536, 0)
    before = devices_left()
    assert error_of(control.get_params, 12345) == errno.ENODEV
    after = devices_left()
    for dev_id in after:
        control.del_dev(dev_id)
    assert before == after


@kernel
@pytest.mark.parametrize("threads", [1, 3])
def test_a_disk_is_stopped_from_other_threads_while_it_starts(threads):
    class Slow(Ram):
        """Never begins to serve, until it is let go."""

        begun, go = threading.Event(), threading.Event()

        def start(self, index):
            self.begun.set()
            self.go.wait(1)

    disk = ublk.Device(Slow())

    def stop():
        disk.target.begun.wait()
        disk.stop()
    stops = [threading.Thread(target=stop) for _ in range(threads)]
    for thread in stops:
        thread.start()
    text = message(disk.start)
    for thread in stops:
        thread.join()
    assert "stopped before the disk was there" in text
    assert devices_left() == []


@kernel
def test_each_queue_stays_on_the_processors_whose_requests_it_gets(control):
    tasks = {}

    class Tells(Ram):
        def start(self, index):
            tasks[index] = threading.get_native_id()

    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    with ublk.Device(Tells(), queues=cpus) as disk:
        allowed = os.sched_getaffinity(0)
        for index, task in tasks.items():
            assert os.sched_getaffinity(task) == control.get_queue_affinity(disk.id, index) & allowed
    assert len(tasks) == cpus > 1


@kernel
def test_who_asks_for_more_queues_than_processors_is_told():
    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    with Forked("null", "-q", cpus + 3) as disk:
        assert disk.said() == f"ublk: note: {cpus} queues, one for each processor, not {cpus + 3}\n"
