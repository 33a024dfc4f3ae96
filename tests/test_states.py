# SPDX-License-Identifier: MIT
"""The states of a Device, up and down, whatever comes in between: tried without a driver."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import glob
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    Ram,
    Volatile,
    descriptors,
    descriptors_below,
    error_of,
    message,
    until,
)


class Target(Ram):
    """Counts how often it is closed."""

    closed = 0

    def close(self):
        self.closed += 1


class Driver:
    """Stands in for Control and the driver behind it."""

    def __init__(self):
        self.features, self.legacy, self.devices = (1 << 64) - 1, False, {}
        self.enough, self.happens, self.sent, self.lock = bool, {}, [], threading.Lock()
        self.fd = os.open(os.devnull, os.O_RDWR)

    def close(self, *_):
        pass

    __enter__, __exit__ = lambda self: self, close

    def __getattr__(self, name):
        """Make any other command: it has no effect, but for what is to happen in it."""
        return lambda *words: self.command(name)

    def command(self, name, effect=bool):
        assert self.lock.acquire(timeout=10), "a command within a command, which would wait for ever"
        try:
            if self.enough():
                raise ublk.UblkError(errno.ECANCELED, name)
            self.sent.append(name)
            effect()
            self.happens.pop(name, bool)()
        finally:
            self.lock.release()

    def add_dev(self, dev_id, queues, depth, max_io, flags, identity):
        def add():
            self.devices[7] = identity
        self.command("add_dev", add)
        return ublk.ublksrv_ctrl_dev_info(
            dev_id=7, nr_hw_queues=queues, queue_depth=depth, max_io_buf_bytes=max_io, flags=flags,
            ublksrv_flags=identity)

    def get_dev_info(self, dev_id):
        if dev_id not in self.devices:
            raise ublk.UblkError(errno.ENODEV, "no device")
        return ublk.ublksrv_ctrl_dev_info(dev_id=dev_id, ublksrv_flags=self.devices[dev_id])

    def get_params(self, dev_id):
        return ublk.ublk_params(types=(1 << 32) - 1)

    def get_queue_affinity(self, dev_id, queue):
        return set()

    def del_dev(self, dev_id, timeout=0):
        self.command("del_dev", lambda: self.devices.pop(dev_id))

    def waits(self, name):
        """Have a command wait for nothing but that it is enough."""
        waiting = threading.Event()

        def wait():
            waiting.set()
            until(self.enough, "the end of the wait", 10)
            raise ublk.UblkError(errno.ETIMEDOUT, name)
        self.happens[name] = wait
        return waiting


QUEUE, SERVE = ublk.Queue, ublk.Worker.serve        # what is replaced here


class Parked:
    """A queue to which no request comes."""

    path = SimpleNamespace(abandon=bool)
    leaving, failure, threads = False, None, ()

    def __init__(self, device, index):
        self.device = device

    def call(self, method, *words):
        method(*words)

    def run(self):
        select.select([self.device.wake_fd], [], [])

    def idle(self):
        self.leaving = bool(select.select([self.device.wake_fd], [], [], 0.001)[0])

    look_at = fetch = end_handlers = wind_up = close = collect = is_in_use = lambda self, *_: None


@pytest.fixture
def driver(monkeypatch):
    """A driver that is not there."""
    found = Driver()
    monkeypatch.setattr(ublk, "Control", lambda: found)
    monkeypatch.setattr(ublk, "device_ids", lambda: list(found.devices))
    monkeypatch.setattr(ublk, "open_char", lambda dev_id, **_: open(os.devnull, "r+b", buffering=0))
    monkeypatch.setattr(ublk, "map_descriptors", lambda fd, dev_id, size, offset: mmap.mmap(-1, size))
    monkeypatch.setattr(ublk, "is_usable", lambda path, mode: True)
    monkeypatch.setattr(ublk, "Queue", Parked)
    yield found
    os.close(found.fd)
    assert found.devices == {}
    until(lambda: not any(thread.name.startswith("ublk7q") for thread in threading.enumerate()), seconds=10)


def fetched(worker):
    """What a worker does until its queue is served."""
    worker.state = ublk.STARTED
    until(lambda: worker.device.descriptors)
    worker.state = ublk.FETCHED


def new(target=None, **options):
    return ublk.Device(target or Target(), unprivileged=False, **options)


# ---- up ------------------------------------------------------------------------------------------

COMMANDS = ["add_dev", "set_params", "start_dev"]


def fails():
    raise ublk.UblkError(errno.ENOMEM, "no")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_target_is_closed_by_the_one_device_that_went_live_with_it(driver, command):
    target = Target()
    driver.happens[command] = fails
    assert error_of(new(target).start) == errno.ENOMEM
    assert (target.closed, driver.devices) == (0, {})
    with new(target) as disk:
        assert target.closed == 0
    disk.stop()
    disk.detach()
    assert target.closed == 1


def test_a_close_that_nobody_can_await_is_an_error(driver):
    async def later():
        pass
    target, outcome = Target(), later()
    target.close = lambda: outcome
    disk = new(target)
    disk.start()
    assert "for which nobody waits" in message(disk.stop)
    outcome.close()
    assert (disk.state, driver.devices) == (ublk.GONE, {})


def test_what_a_target_starts_can_be_ended_by_a_signal(driver):
    target = Target()

    def start(index):
        target.child = subprocess.Popen(["sleep", "60"])
    target.start = start
    with new(target):
        target.child.terminate()
        assert target.child.wait(10) == -signal.SIGTERM


def test_a_target_of_a_disk_that_was_let_go_is_closed_once(driver):
    disk = new()
    disk.start()
    disk.detach()
    disk.stop()
    assert disk.target.closed == 1
    assert driver.devices.pop(7) == disk.identity


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_start_ends_when_the_start_is_interrupted(driver, command):
    disk, waiting = new(), driver.waits(command)
    threading.Thread(target=lambda: waiting.wait() and disk.interrupt("it rains")).start()
    name = "a new device" if command == "add_dev" else "device 7"
    assert message(disk.start) == f"{name}: it rains before the disk was there (4 EINTR): see `ublk.py list`"


@pytest.mark.parametrize("place", ["a node", "the char device", "a target", "partx", "recovery"])
def test_every_wait_of_a_start_ends_when_it_is_interrupted(driver, monkeypatch, place):
    disk, release = new(), threading.Event()
    if place == "a node":
        monkeypatch.setattr(ublk, "is_usable", lambda path, mode: False)
    elif place == "the char device":
        monkeypatch.undo()
        monkeypatch.setattr(ublk, "Control", lambda: driver)
        monkeypatch.setattr(ublk, "await_node", lambda *_: None)
        monkeypatch.setattr(ublk, "open", busy(open), raising=False)
    elif place == "a target":
        disk.target.start = lambda index: release.wait()
    elif place == "partx":
        driver.features &= ~ublk.UBLK_F_NO_AUTO_PART_SCAN
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: None))
    else:
        driver.devices[7] = 1
        disk.id, disk.start = 7, disk.resume
        monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: ublk.ublksrv_ctrl_dev_info(
            dev_id=7, ublksrv_flags=1, flags=ublk.UBLK_F_USER_RECOVERY, ublksrv_pid=os.getpid(), state=1))
        monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
    monkeypatch.setattr(ublk, "GRACE", 0.1)
    threading.Timer(0.2, disk.interrupt, ["it rains"]).start()
    text = message(disk.start)
    release.set()
    assert "it rains before the disk was there" in text
    assert (disk.state, driver.devices) == (ublk.GONE, {7: 1} if place == "recovery" else {})
    driver.devices.clear()


def test_a_disk_that_this_process_has_let_go_is_recovered_once_the_kernel_has_noticed(driver, monkeypatch):
    """Which takes 5 s on 6.1; the process that was the server lives on."""
    disk, looks = new(), iter(range(3))
    driver.devices[7], disk.id = 1, 7
    monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: ublk.ublksrv_ctrl_dev_info(
        dev_id=7, ublksrv_flags=1, flags=ublk.UBLK_F_USER_RECOVERY, ublksrv_pid=os.getpid(), state=2))
    monkeypatch.setattr(driver, "start_user_recovery", still_serves(looks), raising=False)
    monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
    monkeypatch.setattr(ublk, "LAST_BREATH", -1)
    disk.resume()
    disk.detach()
    assert next(looks, None) is None
    driver.devices.clear()


def still_serves(looks):
    """Return a command that is refused for so many looks."""
    def command(dev_id):
        if next(looks, None) is not None:
            raise ublk.UblkError(errno.EBUSY, "its server still lives")
    return command


def busy(system_open):
    """Return an open() for which the device is another's."""
    def open(path, *words, **more):
        if str(path).startswith("/dev/ublkc"):
            raise OSError(errno.EBUSY, "busy")
        return system_open(path, *words, **more)
    return open


def test_whoever_stops_a_device_that_starts_ends_the_start(driver):
    disk, waiting = new(), driver.waits("start_dev")
    stops = [threading.Thread(target=lambda: waiting.wait() and disk.stop()) for _ in range(3)]
    for thread in stops:
        thread.start()
    assert "stopped before the disk was there" in message(disk.start)
    for thread in stops:
        thread.join()


def test_a_worker_that_ends_while_the_disk_starts_ends_the_start(driver):
    disk = new()
    driver.happens["start_dev"] = lambda: (disk._wake_workers(), disk.wait())
    assert "it was stopped before the disk was there" in message(disk.start)


@pytest.mark.parametrize("step", ["open_char", "map_descriptors", "file_identity"])
def test_whatever_a_start_fails_of_is_an_error_of_ours(driver, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")
    disk = new()
    disk.target.files = [__file__]
    monkeypatch.setattr(ublk, step, fail)
    assert re.search("the server of .*device.*: Too many open files [(]24 EMFILE[)]", message(disk.start))


def without_descriptors(function):
    """Return the errno with which a function fails that may call another, to have nothing opened any more."""
    with contextlib.ExitStack() as limit:
        return error_of(function, lambda: limit.enter_context(descriptors_below(0)))


@contextlib.contextmanager
def all_descriptors_taken():
    """Have this process be at its limit of open files."""
    with contextlib.ExitStack() as files, descriptors_below(500):
        with contextlib.suppress(OSError):
            while True:
                files.enter_context(open(os.devnull))
        yield


def test_privileges_that_cannot_be_read_are_an_error_of_the_system():
    number = without_descriptors(lambda open_nothing: open_nothing() or ublk.privileged())
    assert number == errno.EMFILE


def test_a_start_for_which_a_worker_can_open_nothing_fails(driver, monkeypatch):
    disk = new()

    def start(open_nothing):
        monkeypatch.setattr(ublk, "Queue", lambda *_: (open_nothing(), os.pipe()))
        monkeypatch.delitem(sys.modules, "traceback")           # which a program may have no need of
        threading.Timer(3, disk.interrupt, ["nothing was said"]).start()
        disk.start()
    assert without_descriptors(start) == errno.EMFILE


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError


FAILURES = [OSError(errno.ENOMEM, "no"), OSError("no", "number"), MemoryError(), Unspeakable(), SystemExit(3)]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("step", [(ublk, "Ring"), (ublk, "private_memory"), (ublk, "SharedCopy"),
                                  (ublk.Queue, "fetch")], ids=lambda step: step[1])
def test_a_start_fails_of_a_queue_that_cannot_be_made(driver, monkeypatch, step, failure):
    def fail(*_, **__):
        raise failure
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(*step, fail)
    before = descriptors()
    assert "the server of device 7" in message(new(queues=2).start)
    assert descriptors() == before


def test_a_queue_that_fails_at_once_closes_nothing_that_another_begins_with(driver, monkeypatch):
    closed = []

    def start(worker, original=threading.Thread.start):
        closed.append(worker.device._files[0].closed)
        original(worker)
        worker.join()
    monkeypatch.setattr(ublk.Worker, "start", start)
    monkeypatch.setattr(ublk.Worker, "serve", lambda worker: fails())
    assert "ENOMEM" in message(new(queues=2).start)
    assert closed == [False, False]


# ---- down ----------------------------------------------------------------------------------------

def interrupts():
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["add_dev", "set_params", "start_dev", "stop_dev", "del_dev"])
def test_ctrl_c_in_any_command_leaves_nothing(driver, command):
    disk = new()
    driver.happens[command] = lambda: driver.happens.pop(command, None) or interrupts()
    with pytest.raises(KeyboardInterrupt), disk:
        pass
    disk.stop()                     # as at the end of the program, had it not been done
    assert (disk.state, driver.devices) == (ublk.GONE, {})


def test_ctrl_c_as_the_pipe_that_wakes_is_made_leaves_nothing(driver, monkeypatch):
    def interrupted(file, mode, *words, open=open, **more):
        return interrupts() if mode == "wb" else open(file, mode, *words, **more)
    disk = new()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ublk, "open", interrupted, raising=False)
        disk.start()
    disk.stop()
    assert driver.devices == {}


class Moment:
    """Sends a signal before the given step of ours in this thread, counted from when count() is called.

    The standard library is left out: some of what its callbacks raise is passed over.
    """

    def __init__(self, number, which=signal.SIGTERM):
        self.number, self.which, self.steps = number, which, 0

    def trace(self, frame, event, arg):
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_filename == ublk.__file__:
            self.steps += 1
            if self.steps == self.number:
                sys.settrace(None)
                signal.raise_signal(self.which)
        return self.trace

    def count(self, *_):
        frame = sys._getframe(1)
        frame.f_trace, frame.f_trace_opcodes = self.trace, True
        sys.settrace(self.trace)


def interrupt_start(monkeypatch, name, number):
    """Start a disk, which a Ctrl-C ends at this moment of a step of its start or later, and stop it."""
    moment, disk = Moment(number, signal.SIGINT), new()
    step = getattr(disk, name)
    monkeypatch.setattr(disk, name, lambda: (moment.count(), step()))
    try:
        with contextlib.suppress(KeyboardInterrupt), disk:
            pass
    finally:
        sys.settrace(None)
    disk.stop()


def test_ctrl_c_at_any_moment_loses_no_descriptor_of_the_device(driver, monkeypatch):
    before = len(descriptors())
    for number in range(1, 120):
        interrupt_start(monkeypatch, "_open", number)
        assert (driver.devices, len(descriptors())) == ({}, before)


def test_ctrl_c_at_any_moment_keeps_nothing_mapped_of_a_device_that_is_deleted(driver, monkeypatch):
    """DEL_DEV would wait for that, and before 6.5 not even be sent."""
    class Mapping(mmap.mmap):
        """What is found among all there is."""

    def deleted():
        left.extend(type(thing) for thing in gc.get_objects() if type(thing) is Mapping and not thing.closed)
    left = []
    monkeypatch.setattr(ublk, "map_descriptors", lambda fd, dev_id, size, offset: Mapping(-1, size))
    for number in range(80, 150):  # around the mapping, in each Python
        driver.happens["del_dev"] = deleted
        interrupt_start(monkeypatch, "_map", number)
    assert left == []


def test_a_handler_of_a_signal_may_stop_what_is_being_stopped(driver):
    disk = new()
    old = signal.signal(signal.SIGUSR1, lambda *_: disk.stop())
    try:
        driver.happens["stop_dev"] = lambda: signal.raise_signal(signal.SIGUSR1)
        with disk:
            pass
        assert disk.target.closed == 1
    finally:
        signal.signal(signal.SIGUSR1, old)


@pytest.mark.parametrize("end", [ublk.Device.stop, ublk.Device.detach])
def test_a_handler_of_a_request_cannot_stop_its_disk(driver, monkeypatch, end):
    disk, live, told = new(), threading.Event(), []

    def serve(worker):
        fetched(worker)
        live.wait()
        told.append(error_of(end, disk))

    monkeypatch.setattr(ublk, "GRACE", 0.1)
    monkeypatch.setattr(ublk.Worker, "serve", serve)
    with disk:
        live.set()
        until(lambda: told)
    assert told == [errno.EINVAL]


def test_an_error_of_a_targets_close_does_not_keep_the_device(driver):
    disk = new()
    disk.target.close = lambda: 1 // 0
    with pytest.raises(ublk.UblkError, match="ZeroDivisionError"), disk:
        pass
    assert driver.devices == {}


async def later():
    raise OSError(errno.ENOSPC, "no room")


@pytest.fixture
def rings(driver, monkeypatch):
    """Queues that have a ring and a loop, though no requests."""
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", bool)


def test_a_disk_goes_though_a_handler_is_stuck_and_nothing_can_be_opened_any_more(driver, rings, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(ublk, "GRACE", 0.05)
    monkeypatch.setattr(QUEUE, "run", lambda queue: go.wait(10))
    disk = new(data_path="user-copy")
    disk.start()
    with all_descriptors_taken():
        disk.stop()
    go.set()
    assert driver.devices == {}


@pytest.mark.parametrize("plain", [True, False])
def test_a_queue_that_is_told_to_go_as_it_starts_asks_for_no_requests(driver, monkeypatch, plain):
    def start(index):
        if index == 0:
            raise OSError(errno.ENOMEDIUM, "not this one")
        return told.wait() and None if plain else asyncio.sleep(3600)

    fetched, told, wake = [], threading.Event(), ublk.Device._wake_workers
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", lambda queue: fetched.append(queue))
    monkeypatch.setattr(ublk.Device, "_wake_workers", lambda device: (wake(device), told.set()))
    disk = new(queues=2)
    disk.target.start = start
    assert error_of(disk.start) == errno.ENOMEDIUM
    assert fetched == []


def test_a_queue_that_is_told_to_go_as_all_have_started_asks_for_no_requests(driver, monkeypatch):
    def map_late(step):
        disk._wake_workers()
        step()

    fetched = []
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", lambda queue: fetched.append(queue))
    monkeypatch.setattr(QUEUE, "idle", lambda queue: time.sleep(0.001))        # and hears of nothing
    disk = new()
    monkeypatch.setattr(disk, "_map", partial(map_late, disk._map))
    assert message(disk.start)
    assert fetched == []


def test_a_queue_whose_command_is_refused_tells_it(driver, monkeypatch):
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", lambda queue: queue.fail(-errno.EIO, "lost tag 1"))
    disk = new()
    with contextlib.suppress(ublk.UblkError), disk:     # it may fail as it starts
        disk.wait(10)
    assert "queue 0 lost tag" in str(disk.failure)


@pytest.mark.parametrize("down", ["stop", "detach"])
@pytest.mark.parametrize("close", [later, fails])
def test_what_a_targets_close_fails_of_is_the_error_of_the_end(driver, rings, close, down):
    disk = new()
    disk.target.close = close
    disk.start()
    assert error_of(getattr(disk, down)) in (errno.ENOSPC, errno.ENOMEM)
    assert driver.devices.pop(7, disk.identity) == disk.identity


def test_a_targets_close_has_the_time_it_needs(driver, rings, monkeypatch):
    async def close():
        await asyncio.sleep(0.3)
        disk.target.closed += 1
    monkeypatch.setattr(ublk, "GRACE", 0.1)
    with new() as disk:
        disk.target.close = close
    assert disk.target.closed == 1


class Lingers(ublk.Target):
    """Each queue has a task that, told to end, goes on for a while."""

    size = 1 << 20

    def __init__(self, linger):
        self.linger, self.tasks, self.ends = linger, [], []

    async def start(self, index):
        self.tasks.append(asyncio.ensure_future(self.wait()))
        await asyncio.sleep(0)

    async def wait(self):
        try:
            await asyncio.sleep(3600)
        finally:
            await self.linger()
            self.ends.append("task")

    async def close(self):
        self.ends.append("target")


def test_a_target_is_closed_behind_the_tasks_of_other_queues(driver, rings):
    target = Lingers(lambda: asyncio.sleep(0.2))
    with new(target, queues=2):
        pass
    assert target.ends == ["task", "target", "task"]


@pytest.mark.parametrize("queues, ends", [(1, ["target"]), (2, [])])
def test_a_disk_ends_though_a_task_of_its_target_blocks(driver, rings, monkeypatch, queues, ends):
    """A task of another queue could go on with files that are closed."""
    async def block():
        go.wait(20)
    monkeypatch.setattr(ublk, "GRACE", 0.1)
    go, target = threading.Event(), Lingers(block)
    with new(target, queues=queues):
        pass
    assert target.ends == ends
    go.set()


def test_a_queue_that_takes_its_time_to_end_is_not_closed_meanwhile(driver, rings, monkeypatch, capsys):
    """Its thread would go on with a ring that is closed."""
    async def linger():
        for _ in range(100):
            await asyncio.sleep(0.01)
    monkeypatch.setattr(ublk, "LAST_WORDS", 10)
    monkeypatch.setattr(ublk, "GRACE", 0.5)
    target = Lingers(linger)
    with new(target):
        pass
    assert (target.ends, capsys.readouterr().err) == (["target", "task"], "")


class Threaded(ublk.Target):
    """Each queue has a thread do something for a request, and another beside the requests."""

    size = 1 << 20

    def __init__(self, does, beside):
        self.does, self.beside, self.begun, self.ends = does, beside, threading.Semaphore(0), []

    async def start(self, index):
        self.task = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(None, self.beside))

    async def serve(self):
        await asyncio.get_running_loop().run_in_executor(None, self.work)

    def work(self):
        self.begun.release()
        self.does()
        self.ends.append("thread")

    def close(self):
        self.ends.append("target")


class ThreadedToTheEnd(Threaded):
    """Is closed in the loop."""

    async def close(self):
        super().close()


def have_requests(monkeypatch, serve):
    """Have each queue serve a request by a coroutine, serve(queue); it is never answered."""
    monkeypatch.setattr(QUEUE, "_serve", lambda queue, tag: serve(queue))
    monkeypatch.setattr(QUEUE, "fetch", lambda queue: queue.waiting.append(0))
    monkeypatch.setattr(QUEUE, "complete", lambda *_: None)


def ends_of(target, monkeypatch, queues=2):
    """Return what has ended with a disk whose queues have a request each."""
    have_requests(monkeypatch, lambda queue: queue.target.serve())
    with new(target, queues=queues):
        assert all(target.begun.acquire(timeout=10) for _ in range(queues))
    return [*target.ends]


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("kind", [Threaded, ThreadedToTheEnd])
def test_a_target_is_closed_behind_what_threads_do_for_requests(driver, rings, monkeypatch, kind, queues):
    """Or its descriptors would be another file's by the time that they use them."""
    async def give_up(target):
        await asyncio.wait_for(serve(target), 0.01)
    serve, go = kind.serve, threading.Event()
    monkeypatch.setattr(kind, "serve", give_up)
    target = kind(lambda: threading.Event().wait(0.1), go.wait)
    ends = ends_of(target, monkeypatch, queues)
    go.set()
    assert ends == ["thread"] * queues + ["target"]


@pytest.mark.parametrize("kind", [Threaded, ThreadedToTheEnd])
def test_a_target_that_a_thread_still_uses_is_not_closed(driver, rings, monkeypatch, capsys, kind):
    monkeypatch.setattr(ublk, "LAST_WORDS", 0.05)
    monkeypatch.setattr(ublk, "GRACE", 0.5)
    go = threading.Event()
    target = kind(go.wait, bool)
    ends = ends_of(target, monkeypatch)
    go.set()
    assert ends == [] and "its target does not return, and stays open" in capsys.readouterr().err
    assert target in ublk._left_behind          # or the end of Python would wait for the thread


@pytest.mark.parametrize("kind", [Threaded, ThreadedToTheEnd])
def test_a_target_that_a_thread_uses_is_not_closed_where_its_queue_fails(driver, rings, monkeypatch, kind):
    """As where the kernel has no memory for the rest of a chain: nothing of its end goes well then."""
    enter, go, broken = ublk.Ring.enter, threading.Event(), []

    def fails(ring, *words):
        if broken:
            raise OSError(errno.ENOMEM, "the kernel had no memory for the rest of a chain")
        enter(ring, *words)
    monkeypatch.setattr(ublk.Ring, "enter", fails)
    have_requests(monkeypatch, lambda queue: queue.target.serve())
    target = kind(go.wait, bool)
    disk = new(target)
    disk.start()
    assert target.begun.acquire(timeout=10)
    broken.append(True)
    number, ends = error_of(disk.stop), [*target.ends]
    go.set()
    assert (number, ends) == (errno.ENOMEM, []) and target in ublk._left_behind


def full():
    raise OSError(errno.ENOSPC, "no room")


@pytest.mark.parametrize("moment", ["before", "stop_dev"])
def test_what_a_targets_close_fails_of_is_told_whenever_it_ends(driver, moment):
    def ends():
        disk._wake_workers()
        until(lambda: not disk.serving)
    disk = new()
    disk.target.close = full
    disk.start()
    driver.happens[moment] = ends
    driver.happens.pop("before", bool)()
    assert error_of(disk.stop) == errno.ENOSPC
    disk.stop()


def test_a_target_is_closed_behind_the_handlers_of_all_queues(driver, rings, monkeypatch):
    order = []

    async def waits(queue):
        begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("a handler")

    async def close():
        order.append("the target")
    have_requests(monkeypatch, waits)
    disk, begun = new(queues=2), threading.Semaphore(0)
    disk.target.close = close
    with disk:
        assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
    assert order == ["a handler", "a handler", "the target"]


@pytest.mark.parametrize("plain", [True, False])
def test_a_target_that_a_handler_still_uses_is_not_closed(driver, rings, monkeypatch, capsys, plain):
    """A close() that is a coroutine would run beside it."""
    async def goes_on(queue):
        begun.release()
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    async def close():
        disk.target.closed += 1
    monkeypatch.setattr(ublk, "LAST_WORDS", 0.05)
    have_requests(monkeypatch, goes_on)
    disk, begun = new(), threading.Semaphore(0)
    disk.target.start = lambda index: asyncio.sleep(0)
    if not plain:
        disk.target.close = close
    with disk:
        assert begun.acquire(timeout=10)
    assert disk.target.closed == 0 and "its target does not return, and stays open" in capsys.readouterr().err


def test_a_target_of_a_disk_that_was_there_for_a_moment_is_closed(driver, monkeypatch):
    monkeypatch.setattr(ublk, "is_usable", lambda path, mode: "ublkb" not in path)
    monkeypatch.setattr(ublk, "NODE_TIMEOUT", 0.05)
    disk = new()
    assert error_of(disk.start) in (errno.EACCES, errno.ENOENT)
    assert disk.target.closed == 1


def waiting_for_a_server(disk, devices):
    """Return a get_dev_info() of a disk that waits for the next server once its own has ended."""
    return lambda dev_id: ublk.ublksrv_ctrl_dev_info(
        ublksrv_flags=devices.get(7, 0), flags=disk.info.flags,
        state=ublk.UBLK_S_DEV_LIVE if disk.serving else ublk.UBLK_S_DEV_QUIESCED)


def test_a_disk_that_was_to_be_recovered_goes_though_its_end_was_interrupted(driver, monkeypatch):
    def ends(worker):
        until(lambda: not disk.serving)
        interrupts()
    disk = new(recovery="requeue")
    disk.start()
    monkeypatch.setattr(driver, "get_dev_info", waiting_for_a_server(disk, driver.devices))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ublk.Worker, "give_up", ends)
        disk.stop()
    disk.stop()
    assert driver.devices == {}


def test_a_start_that_fails_leaves_no_disk_to_the_next_server(driver, monkeypatch, capsys):
    def scan(*_, **__):
        disk.report(disk._workers[0], ublk.UblkError(errno.ENOMEM, "no"))
        return SimpleNamespace(poll=lambda: None)
    driver.features &= ~ublk.UBLK_F_NO_AUTO_PART_SCAN
    disk = new(recovery="requeue")
    monkeypatch.setattr(driver, "get_dev_info", waiting_for_a_server(disk, driver.devices))
    monkeypatch.setattr(subprocess, "Popen", scan)
    assert error_of(disk.start) == errno.ENOMEM
    assert (driver.devices, capsys.readouterr().err) == ({}, "")


class Slow(Parked):
    """A queue that takes its time to be made, and uses the node's number then."""

    def __init__(self, device, index):
        super().__init__(device, index)
        node = device.char_fd
        device.target.waits.wait(0.3)
        os.fstat(node)


def test_a_start_that_is_interrupted_waits_for_a_queue_that_is_being_made(driver, monkeypatch, capsys):
    monkeypatch.setattr(ublk, "Queue", Slow)
    monkeypatch.setattr(ublk, "GRACE", 0.1)
    disk = new()
    disk.target.waits = threading.Event()
    threading.Timer(0.1, disk.interrupt, ["it rains"]).start()
    assert "it rains" in message(disk.start)
    assert capsys.readouterr().err == ""                # as it would be of one that is given up


@pytest.mark.parametrize("coroutines", [False, True], ids=["plain", "async"])
def test_a_start_that_is_interrupted_leaves_nothing_of_queues_that_wait(
        coroutines, driver, monkeypatch, capsys):
    class Waits(ublk.Null):
        def start(self, index):
            if index:
                until(lambda: disk._workers[0].state is not ublk.NEW)
                disk.interrupt("it rains")

    class Awaits(Waits):
        async def start(self, index):
            super().start(index)
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    before = descriptors()
    disk = ublk.Device((Awaits if coroutines else Waits)(size=1 << 20), queues=2)
    assert "it rains" in message(disk.start)
    assert (descriptors(), driver.devices, capsys.readouterr().err) == (before, {}, "")


@pytest.mark.parametrize("end", ["a start", "detach"])
def test_nobody_waits_for_a_disk_that_is_gone(driver, monkeypatch, end):
    disk = hanging(monkeypatch)
    if end == "a start":
        driver.happens["add_dev"] = fails
        assert error_of(disk.start) == errno.ENOMEM
    else:
        disk.start()
        disk.detach()
    driver.devices.clear()
    assert disk.wait(10)
    disk.target.released.set()


def test_no_handler_that_is_late_closes_the_target(driver, monkeypatch):
    disk = hanging(monkeypatch)
    disk.start()
    workers = [*disk._workers]

    def late():
        disk.target.released.set()
        for worker in workers:
            worker.join(10)
    driver.happens["del_dev"] = late
    disk.stop()
    assert disk.target.closed == 0


@pytest.mark.parametrize("end", [ublk.Device.stop, ublk.Device.detach])
def test_who_ends_a_disk_is_told_that_its_target_stays_open(driver, monkeypatch, capsys, end):
    disk = hanging(monkeypatch)
    disk.start()
    end(disk)
    driver.devices.clear()
    assert "its target does not return, and stays open" in capsys.readouterr().err
    disk.target.released.set()


def test_an_end_that_was_interrupted_waits_for_no_handler_again(driver, monkeypatch):
    disk, close = hanging(monkeypatch), ublk.Worker.close_queue
    disk.start()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ublk.Worker, "close_queue", lambda worker: close(worker) or interrupts())
        disk.stop()
    disk.stop()
    assert disk.state == ublk.GONE
    disk.target.released.set()


def hanging(monkeypatch):
    """Return a Device of two queues whose handlers are stuck until they are released."""
    monkeypatch.setattr(ublk, "GRACE", 0.05)
    monkeypatch.setattr(ublk, "Queue", Hanging)
    disk = new(queues=2)
    disk.target.released = threading.Event()
    return disk


class Hanging(Parked):
    def run(self):
        self.device.target.released.wait()


def test_a_disk_goes_though_the_look_whether_it_has_a_server_was_interrupted(driver, monkeypatch):
    disk = new()
    disk.start()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "_is_lost", interrupts)
        disk.stop()
    disk.stop()
    assert (disk.state, driver.devices) == (ublk.GONE, {})


def test_a_disk_is_left_behind_though_its_end_was_interrupted(driver, monkeypatch):
    disk = new(recovery="requeue")
    disk.start()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ublk.Worker, "give_up", lambda worker: interrupts())
        disk.detach()
    disk.stop()
    assert (driver.devices.pop(7), disk.state) == (disk.identity, ublk.GONE)


def test_a_thread_that_begins_though_its_start_was_interrupted_is_waited_for(driver, monkeypatch):
    disk, seen = new(), []

    def interrupted(thread, start=threading.Thread.start):
        later = threading.Timer(0.2, start, [thread])
        start(later)
        raise KeyboardInterrupt

    def serve(worker):
        seen.append(worker.device.char_fd)

    monkeypatch.setattr(ublk.Worker, "serve", serve)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        disk.start()
    assert len(seen) == 1 and seen[0] >= 0


def test_an_end_that_was_interrupted_waits_for_the_threads_the_next_time(driver, monkeypatch):
    disk, go, seen = new(), threading.Event(), []

    def serve(worker):
        SERVE(worker)
        go.wait(10)
        seen.append(worker.device.char_fd)

    monkeypatch.setattr(ublk.Worker, "serve", serve)
    disk.start()
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        disk.stop()
    threading.Timer(0.1, go.set).start()
    disk.stop()
    assert len(seen) == 1 and seen[0] >= 0


def test_a_second_interruption_of_a_start_leaves_a_device_that_can_be_stopped(driver):
    disk = new()

    driver.happens["set_params"] = fails
    disk._take_away = interrupts
    with pytest.raises(KeyboardInterrupt):
        disk.start()
    del disk._take_away
    disk.stop()
    assert driver.devices == {}


def test_a_forked_child_takes_no_lock_that_another_thread_held(driver):
    with new() as disk:
        with disk._lock, disk._life, disk._changes:
            child = in_child(lambda: (disk.disown(), disk.stop()))
        assert child == 0 and driver.devices == {7: disk.identity}


def test_a_forked_child_leaves_a_disk_alone_of_whose_ring_a_thread_had_a_view(driver, rings):
    def given_up():
        closed = all(file.closed for file in disk._files)
        os._exit(not closed or disk.state is not ublk.GONE)
    with new(queues=2) as disk, disk._workers[0].queue.ring._cqes[:2]:      # as who takes completions has
        assert in_child(given_up) == 0


def held(start):
    """Return the files that this process has open and whose names begin so."""
    links = map(ublk.link_of, glob.glob("/proc/self/fd/*"))
    return [link for link in links if link.startswith(start)]


rings_held = partial(held, "anon_inode:[io_uring]")


def holds(node):
    """Tell whether this process has a file open, or mapped."""
    return bool(held(str(node))) or str(node) in open("/proc/self/maps", encoding="utf-8").read()


@pytest.fixture
def node(driver, monkeypatch, tmp_path):
    """A file in place of /dev/ublkc7, whose requests are mapped."""
    path = tmp_path / "ublkc7"
    path.write_bytes(bytes(1 << 16))

    def mapped(fd, dev_id, size, offset):
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    monkeypatch.setattr(ublk, "NODE", str(path)[:-1])
    monkeypatch.setattr(ublk, "map_descriptors", mapped)
    return path


def test_a_child_that_is_forked_as_a_queue_is_made_holds_nothing_of_the_device(driver, monkeypatch):
    """Or the kernel would not hear of its parent's end, and its own end would delete its parent's device."""
    def half_made(target):
        ends.append(in_child(lambda: os._exit(disk.state != ublk.GONE or rings_held() != before)))
        return False
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", bool)
    monkeypatch.setattr(ublk, "has_coroutines", half_made)
    disk, ends, before = new(), [], rings_held()
    with disk:
        pass
    assert ends == [0]


def test_a_child_that_is_forked_as_a_ring_is_made_does_not_keep_it(driver, monkeypatch):
    """As by start() of another queue. Or the kernel would not hear that its parent was killed."""
    def made(number, *words, syscall=ublk.syscall):
        found = syscall(number, *words)
        if number == ublk.SYS_io_uring_setup:               # nobody but this thread knows it
            fork.start()
            fork.join(0.5)                                  # it may wait for this thread
        return found
    fork = threading.Thread(target=lambda: ends.append(in_child(lambda: os._exit(rings_held() != before))))
    monkeypatch.setattr(ublk, "Queue", QUEUE)
    monkeypatch.setattr(QUEUE, "fetch", bool)
    monkeypatch.setattr(ublk, "syscall", made)
    ends, before = [], rings_held()
    with new():
        fork.join()
    assert ends == [0]


def test_a_child_that_is_forked_as_a_queue_looks_at_its_requests_does_not_keep_them_mapped(
        rings, node, monkeypatch):
    """Nobody there could release a view that the queue's thread has just got."""
    def lets_fork(queue, view):
        if view.nbytes == 128 * 24 and view.format == "B":
            fork.start()
            fork.join(0.5)                                  # it may wait for this thread
        return kept(queue, view)

    ends, kept = [], QUEUE.kept
    fork = threading.Thread(target=lambda: ends.append(in_child(lambda: os._exit(holds(node)))))
    monkeypatch.setattr(QUEUE, "kept", lets_fork)
    with new():
        fork.join()
    assert ends == [0]


@pytest.mark.parametrize("of", ["descriptors", "control"])
def test_a_forked_child_gives_its_target_up_though_a_thread_had_a_view(driver, rings, monkeypatch, of):
    """It kept the lock of the target's files, which nobody else got once its parent was killed."""
    def given_up():
        closed = all(file.closed for file in disk._files if not isinstance(file, mmap.mmap))
        os._exit(told != [True] or not closed or disk.state is not ublk.GONE)
    told = []
    monkeypatch.setattr(Target, "disown", lambda target: told.append(True), raising=False)
    monkeypatch.setattr(sys, "unraisablehook", bool)
    with new() as disk, monkeypatch.context() as patch:
        disk._files.append(mmap.mmap(-1, 4096))
        if of == "control":                                 # as who has a command under way
            patch.setattr(driver, "close", fails)
        with memoryview(disk._files[-1]) as view:
            if of == "control":
                view.release()
            child = in_child(given_up)
    assert child == 0


@pytest.mark.parametrize("moment", ["open_char", "map_descriptors"])
def test_a_child_that_is_forked_as_a_server_gets_its_disk_holds_nothing(node, monkeypatch, moment):
    """Whatever came between, no lock may be left by that: no Ctrl-C, say."""
    def forks(*words, get=None, **options):
        found = get(*words, **options)
        ends.append(in_child(lambda: os._exit(holds(node))))
        return found

    ends = []
    monkeypatch.setattr(ublk, "open_char", lambda dev_id, **_: open(node, "r+b", buffering=0))
    monkeypatch.setattr(ublk, moment, partial(forks, get=getattr(ublk, moment)))
    with new():
        assert holds(node)
    assert ends == [0] and not holds(node)


@pytest.mark.parametrize("moment", ["ring", "node"])
def test_a_child_that_is_forked_as_a_server_lets_go_holds_nothing(driver, rings, monkeypatch, moment):
    """Or the disk had a server still: its requests, the next server and `del` waited for that child's end."""
    class Node:
        def __init__(self, fd):
            self.fd = fd

        def close(self):
            fd, self.fd = self.fd, -1                           # as Python's own files do
            if fd >= 0:
                forks("node")
                os.close(fd)

    def forks(now):
        if now == moment and not fork.ident:
            fork.start()
            fork.join(0.5)                                      # it may wait for this thread

    def ended(ring, close=ublk.Ring.close):
        if threading.current_thread().name == "ublk7q0":
            forks("ring")
        close(ring)
    ends, before = [], (held("/dev/full"), rings_held())
    fork = threading.Thread(target=lambda: ends.append(
        in_child(lambda: os._exit((held("/dev/full"), rings_held()) != before))))
    monkeypatch.setattr(ublk.Ring, "close", ended)
    monkeypatch.setattr(ublk, "NODE", "/dev/full")
    with new() as disk:
        disk._files.append(Node(os.open("/dev/full", os.O_RDONLY)))
    fork.join()
    assert ends == [0]


def test_a_child_that_is_forked_as_a_start_begins_can_stop_its_copy(driver, monkeypatch):
    """It waited for the thread that starts the disk, which is not there."""
    def begins():
        fork.start()
        fork.join(0.5)
        return driver
    fork = threading.Thread(target=lambda: ends.append(in_child(lambda: (disk.stop(), os._exit(0)))))
    monkeypatch.setattr(ublk, "Control", begins)
    disk, ends = new(), []
    with disk:
        fork.join()
    assert ends == [0]


def test_a_child_that_is_forked_as_descriptors_have_run_out_has_no_disk(driver, monkeypatch):
    """Its end took its parent's away."""
    monkeypatch.setattr(sys, "unraisablehook", bool)
    with new() as disk, all_descriptors_taken():
        assert in_child(lambda: os._exit(disk.state != ublk.GONE)) == 0


def test_a_child_whose_fork_waited_for_nobody_gives_up_what_it_has(driver, rings, monkeypatch):
    """A signal's handler raised: the lock was another thread's, for which the child waited without end."""
    def closes():
        with ublk._forking:
            has.set()
            free.wait(20)

    def interrupts(*_):
        raise KeyboardInterrupt
    has, free, told = threading.Event(), threading.Event(), []
    monkeypatch.setattr(sys, "unraisablehook", lambda of: told.append(of.exc_type))
    before = signal.signal(signal.SIGPROF, interrupts)
    thread, held_before = threading.Thread(target=closes), rings_held()
    try:
        with new() as disk:
            thread.start()
            has.wait()
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGPROF]).start()
            child = os.fork()
            if child == 0:
                os._exit(disk.state != ublk.GONE or rings_held() != held_before)
            late = threading.Timer(5, os.kill, [child, signal.SIGKILL])
            late.start()
            status = os.waitpid(child, 0)[1]
            late.cancel()
            free.set()
    finally:
        signal.signal(signal.SIGPROF, before)
        free.set()
        thread.join()
    assert status == 0 and KeyboardInterrupt in told


def test_a_ctrl_c_as_it_forks_leaves_a_child_that_can_serve(monkeypatch):
    """It ends what Python calls in the child, where a server of --background waited for itself then."""
    def has_the_lock():
        taken = []
        thread = threading.Thread(target=lambda: taken.append(ublk._forking.acquire(timeout=10)), daemon=True)
        thread.start()
        thread.join()
        os._exit(taken != [True])
    monkeypatch.setattr(ublk, "contextlib", SimpleNamespace(suppress=interrupts))
    assert in_child(has_the_lock) == 0


def test_a_child_that_a_handler_forks_closes_no_target(driver):
    with new() as disk:
        worker, = disk._workers
        assert in_child(lambda: os._exit(disk.last_to_leave(worker))) == 0


def made(targets, kind, path):
    """Return a target of a kind, with all its files in a directory."""
    file, other = str(path / "file"), str(path / "other")
    for name in (file, other):
        with open(name, "wb") as made:
            made.truncate(1 << 20)
    return {
        "loop": lambda: targets.Loop(file),
        "stripe": lambda: targets.Stripe(file, other),
        "cow": lambda: targets.Cow(file, str(path / "overlay")),
        "zoned": lambda: targets.Zoned(file=str(path / "zones"), size=64 << 20),
        "record": lambda: targets.Record(str(path / "log"), targets.Ram(size=1 << 20)),
        "fault over record": lambda: targets.Fault(targets.Record(str(path / "log"), targets.Loop(file))),
    }[kind]()


@pytest.mark.filterwarnings("ignore:coroutine")     # start() and close() of a record
@pytest.mark.parametrize("kind", [
    "loop", "stripe", "cow", "zoned", "record", "fault over record"])
def test_a_forked_child_keeps_no_lock_of_the_targets_files(driver, targets, tmp_path, kind):
    """Else nobody could serve them after a server that is killed, until its child ends, too."""
    of_its_files = partial(held, f"{tmp_path}/")
    target = made(targets, kind, tmp_path)
    driver.happens["add_dev"] = fails
    failed = new(target)
    assert error_of(failed.start) == errno.ENOMEM
    assert in_child(lambda: os._exit(of_its_files() == [])) == 0, "it is for the child to serve"
    with new(target):
        assert in_child(lambda: os._exit(of_its_files() != [])) == 0
        assert of_its_files() != []


@pytest.fixture
def control(monkeypatch):
    """A control plane whose commands all end well, and mean nothing."""
    monkeypatch.setattr(ublk, "IORING_OP_URING_CMD", ublk.IORING_OP_NOP)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags, open=os.open: open(os.devnull, flags))
        made = ublk.Control()
    yield made
    made.close()


def test_a_forked_child_has_a_ring_of_its_own_for_commands(control, monkeypatch):
    """With its parent's, each command of either was done 64 times: one ADD_DEV made 64 devices."""
    def counts(ring, reap=ublk.Ring.reap):
        found = reap(ring)
        ended.extend(found[0])
        return found

    def commands():
        for _ in range(3):
            control.get_features()
    assert in_child(commands) == 0
    ended = []
    monkeypatch.setattr(ublk.Ring, "reap", counts)
    commands()
    assert ended == [1] * 3


def test_an_answer_that_a_signals_handler_keeps_from_being_noted_is_not_waited_for(control):
    ring = control._rings[0]
    reap, found = ring.reap, []

    def disturbed():
        ring.reap = watched
        reap()
        interrupts()

    def watched():
        found.append(reap())
        return found[-1]
    ring.reap = disturbed
    with pytest.raises(KeyboardInterrupt):
        control.stop_dev(7)
    assert found == [([0], [-errno.ENOENT])]


def test_a_signals_handler_that_calls_c_leaves_a_command_its_errno(control, monkeypatch):
    accept, libc, called = 13, ctypes.CDLL(None, use_errno=True), []

    def call(*_):
        called.append(libc.close(-1))
    before = signal.signal(signal.SIGALRM, call)
    try:
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            control.fd = nobody.fileno()
            monkeypatch.setattr(ublk, "IORING_OP_URING_CMD", accept)
            control.enough = lambda: len(called) > 3
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            assert error_of(control.stop_dev, 7, 30) == errno.ETIMEDOUT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(called) > 3


def test_a_command_that_was_cancelled_before_it_began_was_late(control, monkeypatch):
    accept = 13                                         # which waits where nobody connects
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        control.fd = nobody.fileno()
        monkeypatch.setattr(ublk, "IORING_OP_URING_CMD", accept)
        assert error_of(control.stop_dev, 7, 0.01) == errno.ETIMEDOUT


@pytest.mark.parametrize("noticed, number", [([1, 0], 0), ([0], errno.ETIMEDOUT)], ids=["with it", "later"])
def test_a_command_that_ends_as_it_is_cancelled_tells_its_own_end(control, noticed, number):
    """Its cancellation may be told before, as one that found nothing."""
    ring = control._rings[0]
    ring.reap = lambda: (noticed[::-1], [0 if token else -errno.ENOENT for token in noticed[::-1]])
    assert error_of(control.stop_dev, 7, 0) == number


def test_a_disk_is_not_stopped_if_unused_where_no_kernel_can_tell(control):
    control.features = 0
    assert "SAFE_STOP_DEV" in message(control.try_stop_dev, 7)


def test_a_control_plane_may_be_closed_beside_commands(control):
    sent, told = [], []

    def commands():
        with contextlib.suppress(ublk.UblkError):
            while True:
                sent.append(control.stop_dev(7))
        told.append(threading.current_thread())

    threads = [threading.Thread(target=commands) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(sent) > 100)
    control.close()
    for thread in threads:
        thread.join()
    assert len(told) == 3


def test_a_command_that_waits_keeps_no_other_waiting(control, monkeypatch):
    begun, over = threading.Event(), threading.Event()

    def waits(*words, others=control._await):
        if threading.current_thread() is not thread:
            return others(*words)
        begun.set()
        return over.wait(10) - 1
    monkeypatch.setattr(control, "_await", waits)
    thread = threading.Thread(target=control.stop_dev, args=(7,))
    thread.start()
    assert begun.wait(10)
    control.get_params(7)
    assert in_child(control.close) == 0
    over.set()
    thread.join()


def in_child(function):
    """Call a function in a forked child, in a thread of its own; return its exit status, or None."""
    forked, status = [], []

    def fork():
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            function()
            os._exit(0)
        forked.append(child)
        status.append(os.waitpid(child, 0)[1])
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    return status[0]


class Kept(Parked):
    """A queue whose handler goes on until it is released, and then ends by itself."""

    def __init__(self, device, index):
        super().__init__(device, index)
        self.closed, device.queue = 0, self

    def run(self):
        self.released.wait()

    def close(self):
        self.closed += 1


def test_every_queue_is_closed_once_however_late_its_worker_ends(driver, monkeypatch):
    monkeypatch.setattr(ublk, "Queue", Kept)
    monkeypatch.setattr(ublk, "GRACE", 0.05)
    Kept.released = threading.Event()
    with new() as disk:
        workers = [*disk._workers]
    assert disk.queue.closed == 1
    Kept.released.set()
    for worker in workers:
        worker.join()
    assert disk.queue.closed == 1


# ---- servers -------------------------------------------------------------------------------------

@pytest.fixture
def handlers():
    """Have the handlers of signals be as they were."""
    old = {number: signal.getsignal(number) for number in ublk.STOP_SIGNALS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def test_a_signal_at_any_moment_takes_the_disk_away(driver, handlers, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "2000")         # so that waiting is short
    for number in range(1, 400, 2):
        moment, disk = Moment(number), new()
        try:
            ublk.serve(disk, disk.start, SimpleNamespace(live=moment.count))
        finally:
            sys.settrace(None)
        assert (disk.state, disk.target.closed, driver.devices) == (ublk.GONE, 1, {})


def test_an_error_of_a_server_does_not_leave_its_disk_behind(driver, handlers):
    def fails(disk):
        raise OSError(errno.ENOSPC, "no room")
    disk = new()
    assert error_of(ublk.serve, disk, disk.start, SimpleNamespace(live=fails)) == errno.ENOSPC
    assert (disk.state, disk.target.closed, driver.devices) == (ublk.GONE, 1, {})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGWINCH], ids=lambda number: number.name)
@pytest.mark.parametrize("command", [*COMMANDS, "stop_dev", "del_dev"])
def test_a_signal_in_a_command_sends_no_other(driver, handlers, command, number):
    """What that needs may be in use: a handler notes, and who is interrupted acts."""
    def signalled():
        signal.raise_signal(number)
        unharmed.append(command)
    disk, unharmed = new(), []
    driver.happens[command] = signalled
    with contextlib.suppress(ublk.UblkError):
        ublk.serve(disk, disk.start, SimpleNamespace(live=lambda disk: disk.interrupt("enough")))
    assert (unharmed, disk.state, driver.devices) == ([command], ublk.GONE, {})


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ublk.on_signals(signal.default_int_handler)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler


def test_a_signal_for_a_server_that_has_ended_is_for_nobody(handlers, monkeypatch):
    """Also with a Python that has no pidfd_open(), as its headers were of an older Linux."""
    def signalled(*words, call):
        outcome = call(*words)
        signal.raise_signal(signal.SIGTERM)
        return outcome

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    for name in "read", "waitpid":
        monkeypatch.setattr(os, name, partial(signalled, call=getattr(os, name)))
    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))
    assert error_of(ublk.in_background, lambda: os._exit(3), started, 0) == errno.ECHILD


@pytest.mark.parametrize("number, more", [
    (signal.SIGTERM, ""), (signal.SIGKILL, ": see the kernel's log")])
def test_the_kernels_log_has_nothing_of_a_server_that_was_told_to_end(handlers, number, more):
    def server():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)       # as where it has not come to set its own
        os.kill(os.getpid(), number)
        signal.pause()

    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))
    text = message(ublk.in_background, server, started, 0)
    assert text.endswith(f": killed by signal {number:d} (10 ECHILD){more}")


def test_a_state_file_that_cannot_be_written_does_not_end_a_server(driver, monkeypatch, capsys):
    def full(device):
        raise OSError(errno.ENOSPC, "no room")
    with new() as disk:
        disk.target.resized = bool
        monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
        monkeypatch.setattr(ublk, "save_state", full)
        disk.follow_size()
    assert "ENOSPC" in capsys.readouterr().err


def test_what_ended_a_server_is_told_though_its_disk_cannot_go(driver, handlers, monkeypatch, capsys):
    def held(*_, **__):
        raise ublk.UblkError(errno.ETIMEDOUT, "DEL_DEV")
    monkeypatch.setattr(driver, "del_dev", held, raising=False)
    monkeypatch.setattr(ublk.delete, "__defaults__", (0.1,))
    disk, cause = new(), ublk.UblkError(errno.ENOMEM, "the cause")
    live = SimpleNamespace(live=lambda disk: disk.report(disk._workers[0], cause))
    assert error_of(ublk.serve, disk, disk.start, live) == errno.ENOMEM
    assert "is stopped but not deleted" in capsys.readouterr().err
    driver.devices.clear()


# ---- a number that is another's by now --------------------------------------------------------------

@pytest.fixture
def waiting(driver, monkeypatch):
    """A device, number 7, that waits for a new server."""
    driver.devices[7] = 1
    monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: ublk.ublksrv_ctrl_dev_info(
        dev_id=7, ublksrv_flags=driver.devices[7], nr_hw_queues=1, queue_depth=4, ublksrv_pid=-1,
        flags=ublk.UBLK_F_USER_RECOVERY, state=ublk.UBLK_S_DEV_QUIESCED))
    monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(Target(), 4096))
    yield driver
    driver.devices.clear()


def test_a_target_that_cannot_be_changed_recovers_its_disk(waiting):
    class Fixed(Target):
        block_size = property(lambda self: 512)

    disk = new(Fixed(), id=7)
    disk.resume()
    disk.detach()


@pytest.mark.parametrize("moment", ["is_usable", "open_char"])
def test_a_start_serves_no_other_device_of_its_number(driver, monkeypatch, moment):
    def exchanged(*words, original=getattr(ublk, moment), **more):
        driver.devices[7] = 99
        ublk.save_state(new(id=7, words=("another", [], {})))
        return original(*words, **more)
    monkeypatch.setattr(ublk, moment, exchanged)
    text = message(new().start)
    assert driver.devices.pop(7) == 99
    assert "it is gone, or not there yet" in text
    assert (driver.sent, ublk.load_state(7)["target"]) == (["add_dev"], "another")


UNMADE = ["mine"], {}, lambda: pytest.fail("the target was made")


def test_a_recovery_serves_no_other_device_of_its_number(waiting, handlers):
    waiting.happens["start_user_recovery"] = lambda: waiting.devices.update({7: 99})
    nobody = SimpleNamespace(trace=None)
    assert "it is gone, or not there yet" in message(ublk.recover_from_state, 7, nobody, UNMADE)


def test_no_other_device_is_recovered_that_got_the_number_while_a_server_was_waited_for(waiting, monkeypatch):
    """As a disk of several queues may have that up to 6.15."""
    def open_char(dev_id, **_):
        waiting.devices[7] = 99
        return open(os.devnull, "r+b", buffering=0)
    waiting.features, get_dev_info = 0, waiting.get_dev_info

    def with_queues(dev_id):
        info = get_dev_info(dev_id)
        info.nr_hw_queues = 2
        return info
    monkeypatch.setattr(waiting, "get_dev_info", with_queues)
    monkeypatch.setattr(ublk, "open_char", open_char)
    assert "it is gone, or not there yet" in message(ublk.Device.recover, 7, Target())
    assert "start_user_recovery" not in waiting.sent


def test_a_recovery_makes_no_target_while_another_server_may_be_there(waiting, handlers, monkeypatch):
    monkeypatch.setattr(ublk, "open_char", lambda *_, **__: fails())
    nobody = SimpleNamespace(trace=None)
    assert error_of(ublk.recover_from_state, 7, nobody, UNMADE) == errno.ENOMEM


def test_a_recovery_begins_also_where_its_directory_is_gone(waiting, handlers, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    recipe = ["mine"], {}, fails
    assert error_of(ublk.recover_from_state, 7, SimpleNamespace(trace=None), recipe) == errno.ENOMEM


def test_a_recovery_tells_which_file_its_target_lacks(waiting, handlers):
    recipe = ["mine"], {}, lambda: open("disk.img")
    assert message(ublk.recover_from_state, 7, SimpleNamespace(trace=None), recipe).startswith("disk.img: ")


@pytest.mark.parametrize("moment", ["is made", "starts"])
def test_a_disk_that_is_stopped_while_its_target_is_not_ready_is_not_served(
        moment, waiting, handlers, monkeypatch):
    def stop(*_):
        stopped = ublk.ublksrv_ctrl_dev_info(ublksrv_flags=1, flags=ublk.UBLK_F_USER_RECOVERY)
        monkeypatch.setattr(waiting, "get_dev_info", lambda dev_id: stopped)

    def make():
        target = Target()
        if moment == "starts":
            target.start = stop
        else:
            stop()
        return target
    recipe, mapped = (["mine"], {}, make), []
    monkeypatch.setattr(ublk, "map_descriptors", lambda *words: mapped.append(words) or mmap.mmap(-1, 4096))
    assert "it is stopped" in message(ublk.recover_from_state, 7, SimpleNamespace(trace=None), recipe)
    assert (mapped, waiting.sent, ublk.load_state(7)) == ([], ["start_user_recovery"], {})


@pytest.fixture
def halfway(waiting, monkeypatch):
    """A disk whose recovery is interrupted when its queues are mapped."""
    def interrupted(*_):
        disk.interrupt("it rains")
        return mmap.mmap(-1, 4096)
    monkeypatch.setattr(ublk, "map_descriptors", interrupted)
    disk = new(id=7)
    yield disk


@pytest.mark.parametrize("since", ["6.1", "6.16"])
@pytest.mark.parametrize("happens", [bool, lambda: os.close(-1)], ids=["well", "not"])
def test_a_recovery_that_is_interrupted_halfway_is_ended_before_the_disk_is_left(
        happens, since, waiting, halfway):
    """Up to 6.15 nobody could recover the disk any more."""
    if since == "6.1":
        waiting.features &= ~ublk.UBLK_F_QUIESCE
    waiting.happens["end_user_recovery"] = happens
    assert "it rains" in message(halfway.resume)
    assert waiting.sent[1:] == ["end_user_recovery"] * (since == "6.1")
    assert halfway.state is ublk.GONE


def test_a_recovery_whose_end_is_interrupted_is_not_ended_again(waiting, halfway, monkeypatch):
    """On 6.12 the disk would be there without a server, and nobody's to recover."""
    def serve(worker):
        fetched(worker)
        over.wait()
    over = threading.Event()
    waiting.features &= ~ublk.UBLK_F_QUIESCE
    monkeypatch.setattr(ublk.Worker, "serve", serve)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ublk.Worker, "give_up", lambda worker: interrupts())
        halfway.resume()
    monkeypatch.setattr(ublk.Worker, "give_up", lambda worker: over.set())
    halfway.stop()
    assert waiting.sent[1:] == ["end_user_recovery"]


def test_a_signal_ends_a_recovery_whose_target_is_never_made(waiting, handlers):
    recipe = ["mine"], {}, lambda: signal.raise_signal(signal.SIGTERM) or signal.pause()
    with pytest.raises(KeyboardInterrupt):
        ublk.recover_from_state(7, SimpleNamespace(trace=None), recipe)
    assert waiting.sent == ["start_user_recovery"]


def test_a_signal_ends_a_recovery_before_its_target_is_made(waiting, handlers, monkeypatch):
    def told(*_, original=ublk.open_char, **__):
        signal.raise_signal(signal.SIGTERM)
        return original(7)
    monkeypatch.setattr(ublk, "open_char", told)
    assert "ended by SIGTERM" in message(ublk.recover_from_state, 7, SimpleNamespace(trace=None), UNMADE)


def test_a_recovery_fits_no_target_to_another_device_of_its_number(waiting, monkeypatch):
    def exchanged(*_, original=ublk.open_char, **__):
        waiting.devices[7] = 99
        return original(7)
    monkeypatch.setattr(ublk, "open_char", exchanged)
    disk, sizes = new(Target(2 << 20), id=7), []
    disk.target.resized = sizes.append
    assert "it is gone, or not there yet" in message(disk.resume)
    assert sizes == []


def test_a_recovery_that_waits_prepares_no_other_device_of_its_number(waiting, monkeypatch):
    def info(dev_id):
        state = ublk.UBLK_S_DEV_LIVE if waiting.devices[7] == 1 else ublk.UBLK_S_DEV_QUIESCED
        answer = ublk.ublksrv_ctrl_dev_info(
            ublksrv_flags=waiting.devices[7], flags=ublk.UBLK_F_USER_RECOVERY, ublksrv_pid=-1, state=state)
        waiting.devices[7] = 99
        return answer
    monkeypatch.setattr(waiting, "get_dev_info", info)
    assert "it is gone, or not there yet" in message(new(id=7).resume)
    assert waiting.sent == []


@pytest.mark.parametrize("command, closed", [("start_user_recovery", 0), ("end_user_recovery", 1)])
def test_a_failed_recovery_closes_a_target_that_requests_may_have_come_to(waiting, command, closed):
    disk, waiting.happens[command] = new(id=7), fails
    assert error_of(disk.resume) == errno.ENOMEM
    assert disk.target.closed == closed


def test_a_recovery_that_fails_leaves_the_state_file(waiting, tmp_path, monkeypatch):
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path))
    ublk.save_state(new(id=7, words=("mine", [], {})))
    disk = new(id=7, words=("another", [], {}))
    disk.target.start = lambda index: fails()
    assert error_of(disk.resume) == errno.ENOMEM
    assert ublk.load_state(7)["target"] == "mine"


@pytest.mark.parametrize("name, value", [
    ("flush", bool), ("block_size", 4096), ("boundary", 4096), ("read_only", True)])
def test_a_recovery_takes_no_target_that_needs_more_than_its_disk_does(waiting, name, value):
    disk = new(id=7)
    setattr(disk.target, name, value)
    assert "give it the target it had" in message(disk.resume)
    assert "end_user_recovery" not in waiting.sent


def test_a_recovery_takes_a_file_that_has_grown_by_less_than_a_block(waiting):
    disk = new(id=7)
    disk.target.size += 100
    disk.resume()
    assert disk.state is ublk.LIVE and disk.size == disk.target.size - 100
    disk.detach()


class Unfetched(Parked):
    """Queues of which one is served at once, and none of the others ever."""

    def __init__(self, device, index):
        super().__init__(device, index)
        self.index = index

    def call(self, function, *_):
        self.device.target.called.append(function)

    def fetch(self):
        if self.index:
            until(lambda: self.device._workers[0].state is not ublk.STARTED)
            fails()


@pytest.fixture
def three_queues(waiting, monkeypatch):
    """A device without a server that has three queues."""
    info = waiting.get_dev_info(7)
    info.nr_hw_queues = 3
    monkeypatch.setattr(waiting, "get_dev_info", lambda dev_id: info)
    return waiting


def test_a_recovery_that_fetches_not_all_queues_closes_its_target(three_queues, monkeypatch):
    monkeypatch.setattr(ublk, "Queue", Unfetched)
    disk = new(id=7)
    assert error_of(disk.resume) == errno.ENOMEM
    assert disk.target.closed == 1


def test_a_recovery_that_fetches_not_all_queues_closes_a_target_in_its_loop(three_queues, monkeypatch):
    async def close():
        pass
    monkeypatch.setattr(ublk, "Queue", Unfetched)
    disk = new(id=7)
    disk.target.close, disk.target.called = close, []
    assert error_of(disk.resume) == errno.ENOMEM
    assert disk.target.called == [close]


@pytest.mark.parametrize("lacks", ["a thread", "memory", "what start() needs"])
def test_nothing_is_mapped_before_every_target_has_started(lacks, three_queues, monkeypatch, capsys):
    """Up to 6.15 nobody could recover the disk any more."""
    class Lacking(Parked):
        def __init__(self, device, index):
            super().__init__(device, index)
            if index and lacks == "memory":
                settled()

    def settled():
        until(lambda: disk._workers[0].state is not ublk.NEW)
        fails()

    def begin(worker, begin=ublk.Worker.start):
        if worker.index == 2 and lacks == "a thread":
            raise RuntimeError("can't start new thread")
        begin(worker)

    def start(index):
        if index and lacks == "what start() needs":
            settled()
    mapped = []
    monkeypatch.setattr(ublk, "map_descriptors", lambda *words: mapped.append(words))
    monkeypatch.setattr(ublk, "Queue", Lacking)
    monkeypatch.setattr(ublk.Worker, "start", begin)
    disk = new(id=7)
    disk.target.start = start
    assert error_of(disk.resume) == (errno.EAGAIN if lacks == "a thread" else errno.ENOMEM)
    assert (mapped, disk.target.closed, capsys.readouterr().err) == ([], 0, "")


def test_ctrl_c_between_two_queues_of_a_recovery_leaves_one_that_can_be_recovered(three_queues, monkeypatch):
    def mapped(fd, dev_id, size, offset):
        if offset and next(first, False):
            interrupts()
        return mmap.mmap(-1, size)
    first = iter([True])
    three_queues.features &= ~ublk.UBLK_F_QUIESCE
    monkeypatch.setattr(ublk, "map_descriptors", mapped)
    with pytest.raises(KeyboardInterrupt):
        new(id=7).resume()
    assert three_queues.sent[1:] == ["end_user_recovery"]


def test_nothing_is_mapped_where_descriptors_lack_for_a_part(three_queues, monkeypatch):
    def start(index):
        until(lambda: all(worker.state is ublk.STARTED for worker in disk._workers[:index]))
        if index == 2:
            spare = os.dup(0)
            os.close(spare)
            ends.enter_context(descriptors_below(spare + 2))

    def map_descriptors(fd, dev_id, size, offset):
        mapped.append(offset)
        return mmap.mmap(fd, size)
    mapped = []
    monkeypatch.setattr(ublk, "map_descriptors", map_descriptors)
    disk = new(id=7)
    disk.target.start = start
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as ends:
        file.truncate(1 << 20)
        path = f"/proc/self/fd/{file.fileno()}"
        monkeypatch.setattr(ublk, "open_char", lambda dev_id, **_: open(path, "r+b", buffering=0))
        assert error_of(disk.resume) == errno.EMFILE
    assert mapped == []


def test_a_recovery_takes_no_target_that_cannot_make_a_write_durable(waiting, monkeypatch):
    monkeypatch.setattr(waiting, "get_params", lambda dev_id: ublk.params_of(Volatile(bytes(1 << 20)), 4096))
    disk = new(Volatile(bytes(1 << 20)), id=7)
    disk.resume()
    disk.detach()
    assert "durable writes, which the target has no way to do" in message(new(Ram(1 << 20), id=7).resume)


@pytest.mark.parametrize("command, words", [
    ("resize", [2 << 20]), ("follow_size", []), ("share", [mmap.mmap(-1, 4096)]), ("unshare", [0])])
def test_a_device_that_is_gone_commands_no_other_of_its_number(driver, monkeypatch, command, words):
    disk, sent = new(), []
    with disk:
        pass
    disk.shared[0][0] = memoryview(b"")
    driver.devices[7] = 99
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    disk.target.resized = sent.append
    monkeypatch.setattr(driver, "command", lambda name: sent.append(name) or 0)
    monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
    with contextlib.suppress(ublk.UblkError, TypeError):
        getattr(disk, command)(*words)
    assert driver.devices.pop(7) == 99
    assert sent == []


@pytest.mark.parametrize("moment, able", [("resize", True), ("follow_size", True), ("follow_size", False)])
def test_no_other_device_is_resized_or_noted_while_a_target_takes_its_time(driver, monkeypatch, moment, able):
    def resized(size):
        driver.devices[7] = 99
        ublk.save_state(new(id=7, words=("another", [], {})))
        raise_if(not able)
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    with new() as disk:
        monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
        disk.target.resized = resized
        with contextlib.suppress(ublk.UblkError):
            getattr(disk, moment)(*[2 << 20][:moment == "resize"])
    assert driver.devices.pop(7) == 99
    assert "update_size" not in driver.sent and ublk.load_state(7)["target"] == "another"


def test_a_target_does_not_follow_to_the_size_of_another_disk(driver, monkeypatch):
    sizes = []

    def exchanged(dev_id):
        driver.devices[7] = 99
        return 512
    with new() as disk:
        disk.target.resized = sizes.append
        monkeypatch.setattr(ublk, "disk_size", exchanged)
        disk.follow_size()
    assert driver.devices.pop(7) == 99
    assert sizes == []


def raise_if(wanted):
    if wanted:
        fails()


@pytest.mark.parametrize("moment", ["resize", "follow_size"])
def test_the_state_file_has_the_size_of_the_disk_whoever_changed_it(driver, monkeypatch, moment):
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    driver.update_size = lambda dev_id, size: None
    with new() as disk:
        monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
        disk.target.resized = lambda size: None
        getattr(disk, moment)(*[2 << 20][:moment == "resize"])
        assert ublk.load_state(7)["size"] == disk.size == 2 << 20


def test_two_threads_change_a_size_one_after_the_other(driver, monkeypatch):
    disk, done, second = new(), [], threading.Event()

    def resized(size):
        done.append(("target", size))
        if size == 4 << 20:
            threading.Thread(target=lambda: (disk.resize(3 << 20), second.set())).start()
            second.wait(0.2)
    disk.target.resized = resized
    driver.update_size = lambda dev_id, size: done.append(("disk", size))
    with disk:
        monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
        disk.resize(4 << 20)
        assert second.wait(10)
    assert done == [("target", 4 << 20), ("disk", 4 << 20), ("disk", 3 << 20), ("target", 3 << 20)]


@pytest.mark.parametrize("end, state", [("failed", "LIVE"), ("failed", "QUIESCED"), ("quiesced", "LIVE")])
def test_a_program_deletes_no_disk_that_another_has_recovered_or_will(driver, monkeypatch, end, state):
    disk = new(recovery="requeue", queues=2)
    disk.start()
    if end != "quiesced":
        for worker in disk._workers:
            disk.report(worker, ublk.UblkError(errno.ENOMEM, "no"))
    else:
        disk.report(disk._workers[1], None)
    monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: ublk.ublksrv_ctrl_dev_info(
        ublksrv_flags=disk.identity, state=getattr(ublk, f"UBLK_S_DEV_{state}"), flags=disk.info.flags))
    assert error_of(disk.stop, 0) == (errno.ENOMEM if end == "failed" else 0)
    assert "stop_dev" not in driver.sent
    assert driver.devices.pop(7, None) == disk.identity


def test_the_busy_queue_of_a_quiesced_disk_ends_by_itself(driver, monkeypatch):
    quiesced, told = threading.Event(), []

    def serve(worker):
        fetched(worker)
        quiesced.wait()
        if worker.index:
            told.extend(select.select([worker.device.wake_fd], [], [], 0.2)[0])
    monkeypatch.setattr(ublk.Worker, "serve", serve)
    monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: ublk.ublksrv_ctrl_dev_info(
        ublksrv_flags=disk.identity, state=ublk.UBLK_S_DEV_LIVE, flags=ublk.UBLK_F_QUIESCE))
    disk = new(recovery="requeue", queues=2)
    disk.start()
    quiesced.set()
    until(lambda: len(disk.serving) == 1)
    disk.stop()
    assert told == [] and driver.devices.pop(7) == disk.identity


def test_del_takes_no_other_device_of_its_number_while_it_waits_for_another_del(driver, monkeypatch):
    def flock(fd, how):
        driver.devices[7] = 99
    monkeypatch.setattr(fcntl, "flock", flock)
    driver.devices[7], driver.legacy = 1, True
    ublk.delete(driver, 7, identity=1)
    assert (driver.devices.pop(7, None), driver.sent) == (99, [])


@pytest.mark.parametrize("command", [
    lambda control: ublk.delete(control, 7, identity=1),
    lambda control: ublk.stop_device(SimpleNamespace(id=7, if_unused=False))], ids=["del", "stop"])
def test_no_other_device_is_taken_that_got_the_number_while_a_recovery_was_waited_for(
        driver, monkeypatch, command):
    """The command may be suspended meanwhile, by Ctrl-Z say."""
    def open_char(dev_id, timeout):
        driver.devices[7] = 99
        raise ublk.served_already(dev_id)
    driver.devices[7], driver.features, get_dev_info = 1, 0, driver.get_dev_info

    def quiesced_first(dev_id):
        info = get_dev_info(dev_id)
        info.state = ublk.UBLK_S_DEV_QUIESCED if info.ublksrv_flags == 1 else ublk.UBLK_S_DEV_LIVE
        return info
    monkeypatch.setattr(driver, "get_dev_info", quiesced_first)
    monkeypatch.setattr(ublk, "open_char", open_char)
    command(driver)
    assert (driver.devices.pop(7, None), driver.sent) == (99, [])


def test_del_takes_no_other_device_of_its_number_that_got_it_while_the_disk_was_stopped(driver, run_dir):
    """By another del, while this one was suspended, say."""
    run_dir.mkdir()
    (run_dir / "7.json").touch()
    driver.devices[7], driver.happens["stop_dev"] = 1, lambda: driver.devices.update({7: 99})
    ublk.delete(driver, 7, identity=1)
    assert (driver.devices.pop(7, None), driver.sent) == (99, ["stop_dev"])
    assert (run_dir / "7.json").exists()


def test_del_takes_no_other_device_of_its_number_while_it_waits_for_a_node_to_be_closed(driver, monkeypatch):
    """As it does up to 6.3."""
    def open_char(dev_id, timeout):
        driver.devices[7] = 99
        return open(os.devnull)
    driver.devices[7], driver.legacy = 1, True
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(ublk, "open_char", open_char)
    ublk.delete(driver, 7, identity=1)
    assert (driver.devices.pop(7, None), driver.sent) == (99, ["stop_dev"])


def test_del_takes_no_other_device_of_its_number_while_it_waits_for_users(driver, monkeypatch):
    driver.devices[7] = 1
    monkeypatch.setattr(ublk, "holders", lambda dev_id: driver.devices.update({7: 99}) or [])
    ublk.delete_devices(SimpleNamespace(id=[7], all=False, force=False))
    assert (driver.devices.pop(7, None), driver.sent) == (99, [])


def test_del_waits_for_no_other_device_that_got_its_number_at_once(driver):
    def taken():
        driver.devices[7] = 99
        raise ublk.UblkError(errno.ETIMEDOUT, "DEL_DEV")
    driver.devices[7], driver.happens["del_dev"] = 1, taken
    ublk.delete(driver, 7, identity=1)
    assert driver.devices.pop(7) == 99


# ---- a size that a target cannot have ---------------------------------------------------------------

@pytest.mark.parametrize("able", [False, True], ids=["without resized()", "resized() fails"])
def test_a_size_that_a_target_cannot_have_is_taken_back(driver, monkeypatch, able):
    sizes = []
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    monkeypatch.setattr(driver, "update_size", lambda dev_id, size: sizes.append(size), raising=False)
    with new() as disk:
        if able:
            disk.target.resized = lambda size: fails()
        disk.follow_size()
    assert sizes == [1 << 20]


def test_a_size_that_is_not_taken_back_is_not_told_as_followed(driver, monkeypatch, tmp_path):
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    driver.happens["update_size"] = fails
    with new() as disk:
        disk.follow_size()
        assert ublk.load_state(7)["size"] == 1 << 20


@pytest.mark.parametrize("moment", ["live", "resized"])
def test_no_file_that_gets_the_name_of_one_that_is_served_is_noted(driver, monkeypatch, tmp_path, moment):
    def exchanged(*_):
        path.rename(tmp_path / "old.img")
        path.write_bytes(bytes(1 << 16))
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    made_of = [ublk.file_identity(str(path))]
    target = Target()
    target.files, target.resized = [str(path)], exchanged
    disk = new(target)
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    if moment == "live":
        driver.happens["add_dev"] = exchanged
    with disk:
        if moment == "resized":
            disk.follow_size()
        assert ublk.load_state(7)["files"] == made_of


def test_a_disk_whose_file_was_renamed_may_grow(driver, monkeypatch, tmp_path, capsys):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    target = Target()
    target.files, target.resized = [str(path)], lambda size: path.rename(tmp_path / "new.img")
    made_of = [ublk.file_identity(str(path))]
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    with new(target) as disk:
        disk.follow_size()
        assert capsys.readouterr().err == ""
        assert ublk.load_state(7)["size"] == 2 << 20 and ublk.load_state(7)["files"] == made_of


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_a_target_makes_or_names_as_it_starts_is_noted(driver, tmp_path, named):
    def start(index):
        path.write_bytes(bytes(4096))
        target.files = [str(path)]
    path, target = tmp_path / "disk.img", Target()
    target.start, target.files = start, [str(path)] * named
    with new(target):
        assert ublk.load_state(7)["files"] == [ublk.file_identity(str(path))]


def test_how_far_a_file_has_grown_with_its_disk_is_noted(driver, monkeypatch, tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    disk = new()
    disk.target.files, disk.target.resized = [str(path)], lambda size: os.truncate(path, 8192)
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 2 << 20)
    with disk:
        disk.follow_size()
        assert ublk.load_state(7)["files"][0][-1] == 8192


def commanded(driver, monkeypatch, *infos):
    """Have a device be as these tell, one after the other, and have no state file."""
    left = [ublk.ublksrv_ctrl_dev_info(ublksrv_flags=1, state=state, ublksrv_pid=pid) for state, pid in infos]
    monkeypatch.setattr(driver, "get_dev_info", lambda dev_id: left.pop(0) if left[1:] else left[0])
    monkeypatch.setattr(driver, "get_params", lambda *_, **__: ublk.params_of(Target(), 4096))
    monkeypatch.setattr(ublk, "load_state", lambda *_: {})


def test_resize_waits_for_a_server_in_another_container(driver, monkeypatch):
    commanded(driver, monkeypatch, (ublk.UBLK_S_DEV_LIVE, -1))
    monkeypatch.setattr(ublk, "LAST_BREATH", 0.1)
    monkeypatch.setattr(ublk, "disk_size", lambda dev_id: 1 << 20)
    assert "its target cannot have" in message(ublk.resize, SimpleNamespace(id=7, size=2 << 20))
    assert driver.sent == ["update_size"]


def test_a_process_that_has_a_dead_servers_number_is_not_its_server(driver, monkeypatch):
    commanded(driver, monkeypatch, (ublk.UBLK_S_DEV_QUIESCED, os.getpid()))
    assert ublk.describe(driver, 7)["pid"] == -1
    ublk.resize(SimpleNamespace(id=7, size=2 << 20))
    assert driver.sent == ["update_size"]


def test_a_damaged_state_file_is_told_once_however_long_a_server_is_waited_for(
        driver, monkeypatch, tmp_path, capsys):
    load_state = ublk.load_state
    commanded(driver, monkeypatch, (ublk.UBLK_S_DEV_LIVE, os.getpid()))
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(ublk, "load_state", load_state)
    monkeypatch.setattr(ublk, "becomes", lambda condition, seconds: any([condition() for _ in range(9)]))
    (tmp_path / "7.json").write_text("{")
    ublk.resize(SimpleNamespace(id=7, size=2 << 20))
    assert capsys.readouterr().err.count("ignoring") == 1


def test_a_disk_that_is_stopped_was_not_quiesced(driver, monkeypatch):
    commanded(driver, monkeypatch, (ublk.UBLK_S_DEV_LIVE, 9), (ublk.UBLK_S_DEV_DEAD, -1))
    driver.happens["quiesce_dev"] = lambda: driver.happens.update(quiesce_dev=fails)
    assert error_of(ublk.quiesce, SimpleNamespace(id=7, timeout=1)) == errno.ENOMEM


def test_a_program_cannot_grow_a_disk_beyond_its_target(driver, monkeypatch):
    sizes = []
    with new() as disk:
        monkeypatch.setattr(driver, "get_params", lambda dev_id: ublk.params_of(disk.target, 4096))
        monkeypatch.setattr(driver, "update_size", lambda dev_id, size: sizes.append(size), raising=False)
        with contextlib.suppress(ublk.UblkError):
            disk.resize(2 << 20)
    assert sizes == []


def test_a_target_is_closed_behind_the_rings_that_may_still_use_its_files(driver, monkeypatch):
    disk, order = new(queues=2), []
    monkeypatch.setattr(Parked, "close", lambda queue: order.append("a ring"))
    disk.target.close = lambda: order.append("the target")
    with disk:
        pass
    assert order == ["a ring", "a ring", "the target"]


@pytest.mark.parametrize("failed", [False, True])
def test_a_target_is_closed_before_another_server_can_come(driver, monkeypatch, failed):
    disk, nodes, run = new(), [], Parked.run
    disk.target.close = lambda: nodes.append(disk.char_fd)
    if failed:
        monkeypatch.setattr(Parked, "run", lambda queue: run(queue) or fails())
    disk.start()
    if failed:
        disk._wake_workers()
        disk.wait()
    with contextlib.suppress(ublk.UblkError):
        disk.detach()
    assert driver.devices.pop(7) == disk.identity
    assert len(nodes) == 1 and nodes[0] >= 0
