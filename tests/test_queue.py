# SPDX-License-Identifier: MIT
"""One queue in odd moments: nothing is lost, nothing of it is used after its end."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import io
import mmap
import os
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    HANG,
    Fio,
    Forked,
    Ram,
    Recorder,
    assert_error_line,
    before,
    descriptors,
    descriptors_below,
    error_of,
    fields_of,
    fio_verify,
    in_flight,
    kernel,
    message,
    opened,
    read_at,
    recovered,
    replace,
    since,
    target_file,
    until,
    write_at,
)
from tests.test_async import NopQueue, StandIn, async_start, serve, target_of

BLKDISCARD = 0x1277                 # linux/fs.h


class Raised(Exception):
    pass


def raises(number, frame):
    raise Raised


def test_a_standard_error_that_is_closed_ends_no_queue(monkeypatch):
    def read(target, offset, buffer):
        return 1 // 0

    with open(os.devnull, "w", encoding="utf-8") as error:
        monkeypatch.setattr(sys, "stderr", error)
    answers = serve(target_of(read=read), rounds=10, depth=1).answers
    assert answers == [(0, -errno.EIO)] * 10


def test_a_signal_handler_that_raises_leaves_the_rings_counts_right():
    ring = ublk.Ring(8)
    old = signal.signal(signal.SIGALRM, raises)
    try:
        for slot in range(3):
            ring.prepare(slot, ublk.IORING_OP_NOP, user_data=slot)
            ring.push(slot)
        enter = ring._enter

        def enter_and_be_disturbed():
            enter()
            raise Raised                        # where Python runs the handler: behind the system call

        ring._enter = enter_and_be_disturbed
        with pytest.raises(Raised):
            ring.enter(3)
        ring._enter = enter
        assert ring.pending == 0
        assert ring.reap() == ([0, 1, 2], [0, 0, 0])
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Raised):
            ring.enter(1)                       # and it still waits for what is to come
    finally:
        signal.signal(signal.SIGALRM, old)
        ring.close()


def test_a_ring_that_nobody_closed_goes_with_the_last_reference():
    before = descriptors()
    ublk.Ring(8)
    assert descriptors() == before


@kernel
def test_buffers_that_are_never_used_take_no_memory():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 4096 * (1 << 20) > pages             # more than the machine has
    with ublk.Device(Ram(), depth=4096, max_io=1 << 20, data_path="copy") as disk, opened(disk.path) as fd:
        write_at(fd, 4096, b"m" * 4096)
        assert read_at(fd, 4096, 4096) == b"m" * 4096


class Astray(Ram):
    """A target whose map() goes wrong where it is told to."""

    def __init__(self, file):
        super().__init__(1 << 20)
        self.file, self.astray = file, None

    def map(self, offset, length, write):
        if self.astray is SystemExit:
            raise SystemExit(3)
        return self.astray or (self.file.fileno(), offset)


@kernel
@pytest.mark.parametrize("astray", [
    SystemExit, (-1, 0), (1 << 40, 0), (None, 0), (0, -1), (0, 1.5), (0, (1 << 64) - 1), (0, 1 << 80), 7,
    (1, 2, 3)], ids=str)
@pytest.mark.parametrize("data_path", [
    "copy", "get-data", pytest.param("zero-copy", marks=since("6.15")),
    pytest.param("auto-zero-copy", marks=since("6.16"))])
def test_a_bad_map_fails_its_request_and_no_other(tmp_path, data_path, astray):
    with open(tmp_path / "data", "w+b") as file:
        file.truncate(1 << 20)
        target = Astray(file)
        with ublk.Device(target, data_path=data_path, depth=4) as disk, opened(disk.path) as fd:
            write_at(fd, 4096, b"g" * 4096)
            target.astray = astray
            assert error_of(read_at, fd, 4096, 4096) == errno.EIO
            target.astray = None
            assert read_at(fd, 4096, 4096) == b"g" * 4096
            assert disk.state == ublk.LIVE


def failing_with(number):
    """Return a plain target of which nothing succeeds, and one of which the flushes do not."""
    def fails(target, *_):
        raise OSError(number, "not today")

    return (target_of(read=fails, write=fails, zone_append=fails, flush=fails, discard=fails),
            target_of(read=Ram.read, write=lambda *_: None, flush=fails))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_no_error_has_a_client_do_a_request_again_without_end(number):
    broken, volatile = failing_with(number)
    durable = ublk.UBLK_IO_OP_WRITE | ublk.UBLK_IO_F_FUA
    for target, operation in ((broken, ublk.UBLK_IO_OP_READ), (broken, ublk.UBLK_IO_OP_WRITE),
                              (broken, ublk.UBLK_IO_OP_ZONE_APPEND), (broken, durable), (volatile, durable)):
        assert serve(target, depth=1, operation=operation).answers == [(0, -errno.EIO)]
    assert serve(broken, depth=1, operation=ublk.UBLK_IO_OP_DISCARD).answers == [(0, -number)]


@kernel
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_no_error_has_an_io_uring_do_a_request_again_without_end(number):
    target = failing_with(number)[0]
    target.size = 1 << 20
    with ublk.Device(target, partition_scan=False) as disk, \
            opened(disk.path, os.O_RDWR | os.O_DIRECT) as fd:
        memory = mmap.mmap(-1, 4096)
        for operation in ublk.IORING_OP_READ, ublk.IORING_OP_WRITE:
            ring = ublk.Ring(1)
            ring.prepare(0, operation, fd, 65536, ublk.address_of(memory), 4096)
            ring.push(0)
            ring.enter(1, 10)
            assert ring.reap() == ([0], [-errno.EIO])
            ring.close()


def flush_of(path):
    """Flush a disk as fsync() of its node does."""
    with opened(path) as fd:
        os.fsync(fd)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def test_no_flush_that_has_failed_is_told_as_a_success(number):
    for target in failing_with(number):
        assert serve(target, depth=1, operation=ublk.UBLK_IO_OP_FLUSH).answers == [(0, -errno.EIO)]


@kernel
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def test_fsync_tells_of_every_flush_that_has_failed(number):
    target = failing_with(number)[1]
    target.size = 1 << 20
    with ublk.Device(target, partition_scan=False) as disk:
        assert error_of(flush_of, disk.path) == errno.EIO


class Discards(ublk.Target):
    """A disk of zeroes with a method that is told what is discarded."""

    def __init__(self):
        self.size, self.lengths = 8 << 30, []

    def read(self, offset, buffer):
        pass

    def discard(self, offset, length):
        self.lengths.append(length)


@kernel
@pytest.mark.parametrize("make", [Discards, lambda: ublk.Null(size=8 << 30)], ids=["handler", "null"])
def test_a_request_of_more_than_2_gib_ends_well(monkeypatch, make):
    params_of = ublk.params_of

    def generous(*words):
        params = params_of(*words)
        params.discard.max_discard_sectors = (4 << 30) // 512 - 8
        return params

    monkeypatch.setattr(ublk, "params_of", generous)
    target = make()
    with ublk.Device(target) as disk, opened(disk.path) as fd:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", 0, 3 << 30))
        lengths = getattr(target, "lengths", [3 << 30])
        assert max(lengths) >= 2 << 30, "no request was large enough"
        assert sum(lengths) == 3 << 30
        assert read_at(fd, 0, 4096) == bytes(4096)
        assert disk.state == ublk.LIVE


@kernel
@since("6.16")
@pytest.mark.parametrize("option", ["--copy", "--need-get-data", "--user-copy"])
def test_quiesce_loses_no_write_that_is_on_its_way(tmp_path, monkeypatch, option):
    path = target_file(tmp_path, """
        class Slow(ublk.Target):
            size = 4 << 20
            def __init__(self):
                self.fd = os.open(os.environ["SLOW_IMAGE"], os.O_RDWR)
            def read(self, offset, buffer):
                os.preadv(self.fd, [buffer], offset)
            def write(self, offset, buffer):
                time.sleep(0.005)
                os.pwrite(self.fd, buffer, offset)
    """)
    image = tmp_path / "image"
    image.write_bytes(bytes(4 << 20))
    monkeypatch.setenv("SLOW_IMAGE", str(image))
    disk = Forked(f"{path}:Slow", option, "-r", "requeue").live()
    with Fio(disk) as fio:
        for _ in range(4):
            fio.busy()
            assert ublk.main(["quiesce", str(disk.id)]) == 0
            disk.wait()
            disk = recovered(disk)
        fio.busy()
        assert fio.finish() == 0
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
@pytest.mark.parametrize("option", ["--depth=1", "--queues=2"])
def test_quiesce_waits_for_a_busy_queue(tmp_path, option):
    """The driver tells only idle tags: none of a queue that has no other, all of an idle queue at once."""
    path = target_file(tmp_path, """
        class Slow(ublk.Target):
            size = 1 << 20
            def read(self, offset, buffer):
                pass
            async def write(self, offset, buffer):
                await asyncio.sleep(1.5)             # longer than what has begun has when its server leaves
    """)
    disk, errors = Forked(f"{path}:Slow", option, "-r", "requeue").live(), []
    with opened(disk.path) as fd:
        writer = threading.Thread(target=lambda: errors.extend(
            error_of(write_at, fd, 4096 * number, b"w" * 4096) for number in range(4)))
        writer.start()
        until(lambda: in_flight(disk)[1])
        assert ublk.main(["quiesce", str(disk.id)]) == 0
        assert disk.wait() == 0
        disk = recovered(disk)
        writer.join()
    assert errors == [0] * 4
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
def test_a_quiesce_that_is_interrupted_says_that_requests_wait():
    """The kernel does not undo it: the server lives, and is asked for nothing any more."""
    class Held(Ram):
        def write(self, offset, buffer):
            assert free.wait(HANG)

    def change():
        def quiesce_dev(*words, quiesce_dev=ublk.Control.quiesce_dev):
            quiesce_dev(*words)
            raise KeyboardInterrupt
        replace(ublk.Control, quiesce_dev=quiesce_dev)

    free = threading.Event()
    options = {"depth": 1, "recovery": "requeue", "partition_scan": False}
    with ublk.Device(Held(), **options) as disk, opened(disk.path) as fd:
        # Where nobody else reads: the write would wait for that page
        writers = [threading.Thread(target=write_at, args=(fd, 512 << 10, bytes(4096))) for _ in range(2)]
        writers[0].start()
        until(lambda: in_flight(disk)[1])
        quiesce = Forked("quiesce", disk.id, change=change)
        assert quiesce.wait() == 1
        assert_error_line(quiesce.said(), errno.EINTR, says="its I/O waits until you try again")
        free.set()
        writers[0].join()
        writers[1].start()
        disk.detach()
        assert writers[1].is_alive()
    with ublk.Device.recover(disk.id, Ram()):
        writers[1].join()


class Slow(Ram):
    """What it is asked to do takes a while, much longer than the moment that a queue waits for news."""

    async def write(self, offset, buffer):
        await asyncio.sleep(5 * ublk.A_MOMENT)
        super().write(offset, buffer)


@kernel
@since("6.16")
@pytest.mark.parametrize("option", ["--copy", "--need-get-data", "--zero-copy", "--auto-zero-copy"])
def test_quiesce_waits_for_what_the_kernel_moves(tmp_path, monkeypatch, option):
    path = target_file(tmp_path, """
        class Below(ublk.Target):
            size = 4 << 20
            def __init__(self):
                self.fd = os.open(os.environ["LOWER"], os.O_RDWR | os.O_DIRECT)
            def map(self, offset, length, write):
                return self.fd, offset
    """)
    with ublk.Device(Slow(4 << 20), partition_scan=False) as lower:
        monkeypatch.setenv("LOWER", lower.path)
        disk = Forked(f"{path}:Below", option, "-r", "requeue").live()
        with Fio(disk, "--size=2M") as fio:
            for _ in range(3):
                fio.busy()
                assert ublk.main(["quiesce", str(disk.id)]) == 0
                disk.wait()
                disk = recovered(disk)
            fio.busy()
            assert fio.finish() == 0
        assert fio.errors == 0
        assert disk.kill(signal.SIGTERM) == 0


class OneFails(Ram):
    """The first queue cannot start; the second sets itself up only when it has been told to go."""

    told = threading.Event()

    def start(self, index):
        if index == 0:
            raise OSError(errno.ENOMEDIUM, "not this one")
        self.told.wait()


@kernel
@pytest.mark.parametrize("options", [[], pytest.param(["--batch"], marks=since("7.0"))], ids=str)
def test_a_queue_told_to_go_before_it_fetched_goes(options, monkeypatch):
    killed, abandon, wake = [], ublk.MappedCopy.abandon, ublk.Device._wake_workers
    monkeypatch.setattr(ublk.MappedCopy, "abandon", lambda path: killed.append(path) or abandon(path))
    monkeypatch.setattr(ublk.Device, "_wake_workers", lambda device: (wake(device), OneFails.told.set()))
    OneFails.told.clear()
    disk = Forked("ram", "--size", "1M", "--queues=2", "-r", "reissue", *options).live()
    disk.kill()
    with pytest.raises(ublk.UblkError) as info:     # an end of which the driver tells no queue
        ublk.Device.recover(disk.id, OneFails())
    assert info.value.errno == errno.ENOMEDIUM
    assert killed == []
    assert ublk.main(["del", str(disk.id)]) == 0


class Late(Ram):
    """Its reads return when they are let go, and then have data."""

    def __init__(self):
        super().__init__()
        self.begun, self.go, self.gone = threading.Event(), threading.Event(), threading.Event()

    def read(self, offset, buffer):
        self.begun.set()
        self.go.wait()
        buffer[:] = b"!" * len(buffer)
        threading.Timer(0.5, self.gone.set).start()


@kernel
@since("6.5")
def test_a_handler_that_returns_too_late_writes_into_nobodys_file(tmp_path):
    target = Late()
    device = ublk.Device(target, data_path="user-copy", partition_scan=False)
    device.start()

    def client():
        with opened(device.path) as fd:
            error_of(read_at, fd, 0, 4096)

    reader = threading.Thread(target=client)
    reader.start()
    target.begun.wait()
    device.stop(timeout=0.5)
    reader.join()
    files = [open(tmp_path / str(number), "w+b") for number in range(64)]    # whatever number it is
    target.go.set()
    target.gone.wait()
    until(lambda: not any(thread.name.startswith(f"ublk{device.id}q") for thread in threading.enumerate()),
          "the late handler's thread")
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    for file in files:
        file.close()
    assert set(sizes) == {0}


def test_a_queue_that_is_given_up_twice_keeps_its_number_from_other_files():
    """A stop() that was interrupted there begins anew; the handler may return later."""
    device = StandIn(Ram())
    device.data_path = ublk.UserCopy
    queue = ublk.Queue(device, 0)
    path = queue.path
    path.abandon()
    path.abandon()
    queue.close()
    assert os.path.samestat(os.fstat(path.fd), os.stat(os.devnull))
    device.close()


@kernel
@pytest.mark.parametrize("options", [["--copy"], ["--need-get-data"],
                                     pytest.param(["--copy", "--batch"], marks=since("7.0"))], ids=str)
def test_commits_that_the_kernel_did_not_take_are_handed_in_again(options, monkeypatch):
    enter, calls = ublk.Ring.enter, []

    def busy(ring, *words, **more):
        """Every third time take none, as where the kernel says EAGAIN, but look for completions."""
        calls.append(1)
        held_back = 0 if words or len(calls) % 3 else ring.pending
        ring._tail -= held_back
        try:
            return enter(ring, *words, **more)
        finally:
            ring._tail += held_back

    with Forked("ram", "--size", "24M", *options,
                change=lambda: monkeypatch.setattr(ublk.Ring, "enter", busy)) as disk:
        fio_verify(disk.path)


def test_no_command_is_another_one_by_the_time_that_the_kernel_takes_it(monkeypatch):
    """A fetch that is a commit by then would be refused."""
    device = StandIn(Ram())
    queue = NopQueue(device)
    enter, refusals, waiting = queue.ring.enter, [True] * 3, []
    monkeypatch.setattr(queue.ring, "enter", lambda *words: refusals.pop() if refusals else enter(*words))
    monkeypatch.setattr(queue, "command", lambda *_: waiting.append(queue.ring.pending))
    queue.fetch()
    assert (refusals, waiting[-queue.depth:]) == ([], [0] * queue.depth)
    queue.close()
    device.close()


class InFile(ublk.Target):
    """A disk whose bytes lie in a file; Python can only say that there is nothing."""

    size = 64 << 10

    def __init__(self, file):
        self.file, self.asked = file, []

    def map(self, offset, length, write):
        return self.file.fileno(), offset

    def read(self, offset, buffer):
        self.asked.append(offset)
        return 0


def served_while_ending(*news, asked=()):
    """Let a queue of three tags run, with (requests, ends) each time it looks; return what it answers."""
    device = StandIn(Ram(), depth=3)
    queue = NopQueue(device, rounds=2)
    queue.asked.update(asked)
    looks = iter(news)

    def collect(timeout):
        tags, ended = next(looks)
        queue.ring.enter()
        queue.ended |= ended
        queue.asked.difference_update(tags)
        return tags
    queue.collect = collect
    queue.run()
    queue.close()
    device.close()
    return [tag for tag, _ in queue.answers]


def to_the_end(queue, device):
    """Have a queue serve until it ends, and close it and its stand-in of a device."""
    queue.fetch()
    queue.run()
    queue.wind_up()
    queue.close()
    device.close()


@pytest.mark.parametrize("begins", [{}, {"start": async_start}], ids=["plain", "coroutines"])
@pytest.mark.parametrize("name", ["read", "flush"])
def test_a_queue_that_is_to_leave_begins_none_of_the_requests_it_has(name, begins):
    begun = []

    def handler(target, *words):
        begun.append(name)
        queue.leaving = True
    operation = getattr(ublk, f"UBLK_IO_OP_{name.upper()}")
    device = StandIn(target_of(**{name: handler}, **begins), operation=operation)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert begun == [name]


@pytest.mark.parametrize("number", [errno.ECANCELED, errno.EIO], ids=["canceled", "failed"])
def test_a_flush_that_ends_with_another_queue_is_for_the_next_server(number):
    """But one that has failed may have heard of what nobody tells again."""
    async def flush(target):
        os.write(device.wake_write, b"x")       # which this queue has yet to hear
        raise OSError(number, "ended")
    device = StandIn(target_of(flush=flush), depth=1, operation=ublk.UBLK_IO_OP_FLUSH)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert queue.answers == ([] if number == errno.ECANCELED else [(0, -errno.EIO)])


@pytest.mark.parametrize("name", ["write", "flush", "discard"])
def test_what_a_queue_has_begun_is_answered_as_it_leaves(name):
    """Nobody may tell another time what it hears, and nothing need be done twice."""
    async def handler(target, *words):
        queue.leaving = True
        await asyncio.to_thread(time.sleep, 0.05)
        raise OSError(errno.ENOSPC, "full")
    operation = getattr(ublk, f"UBLK_IO_OP_{name.upper()}")
    device = StandIn(target_of(**{name: handler}), operation=operation)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert queue.answers == [(0, -errno.ENOSPC)]


def test_a_queue_that_leaves_hands_in_its_answers_at_the_end():
    """Each would bring it another request, which is the next server's."""
    begun = []

    async def read(target, offset, buffer):
        begun.append(offset)
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        queue.leaving = True
        await asyncio.sleep(0.1 if offset else 0)
    device = StandIn(target_of(read=read), depth=2)
    queue = NopQueue(device, rounds=2)
    queue.fetch()
    queue.run()
    came = set(queue.ended)
    queue.wind_up()
    queue.close()
    device.close()
    assert (came, queue.answers) == (set(), [(0, 4096), (1, 4096)])


def test_a_queue_that_leaves_says_where_appends_have_landed():
    async def zone_append(target, offset, buffer):
        queue.leaving = True
        return 1 << 20
    device = StandIn(target_of(zone_append=zone_append), depth=1, operation=ublk.UBLK_IO_OP_ZONE_APPEND)
    queue = NopQueue(device)
    queue.fetch()
    queue.run()
    queue.wind_up()
    landed = queue.addresses[0]
    queue.close()
    device.close()
    assert landed == 2048


@pytest.mark.parametrize("name", ["read", "flush"])
def test_a_queue_that_is_to_leave_with_every_tag_in_its_hands_gives_one_back(name):
    """Up to 6.15 the kernel would hear of its end only when a request is late."""
    class Told(NopQueue):
        def collect(self, timeout=None):
            tags = super().collect(timeout)
            self.leaving = True
            return tags
    operation = getattr(ublk, f"UBLK_IO_OP_{name.upper()}")
    begun = []
    device = StandIn(target_of(**{name: lambda *_: begun.append(name)}), operation=operation)
    queue = Told(device)
    to_the_end(queue, device)
    assert begun == [name]


class Unhurried(Ram):
    """Each write takes a while, the first as long as it is to."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = 0, threading.Event()

    def write(self, offset, buffer):
        self.begun += 1
        self.go.wait()
        time.sleep(0.3)
        super().write(offset, buffer)


@kernel
def test_a_disk_is_let_go_though_many_requests_wait_for_each_other(capfd):
    """Given up, it lost up to 6.12 what came meanwhile; its clients hung, and it could not be deleted."""
    errors, target = [], Unhurried()
    how = {"recovery": "reissue", "data_path": "copy", "depth": 32, "partition_scan": False}
    disk = ublk.Device(target, **how)
    disk.start()
    with opened(disk.path) as fd:
        def client(number):
            # Apart, or the kernel could make one request of two
            errors.append(error_of(write_at, fd, 8192 * number, b"w" * 4096))
        clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        clients[0].start()
        until(lambda: target.begun)
        for each in clients[1:]:
            each.start()
        until(lambda: in_flight(disk) == [0, 16])
        target.go.set()
        until(lambda: target.begun > 1)     # all others have come together
        disk.detach()
        disk = ublk.Device.recover(disk.id, Ram())
        for each in clients:
            each.join()
    disk.stop()
    assert errors == [0] * 16
    assert "does not return" not in capfd.readouterr().err


@kernel
@before("6.16")
def test_a_queue_that_leaves_brings_none_to_grief_that_waits_for_a_tag():
    """Such requests failed, and from 6.8 on the kernel noticed after 30 seconds that it had left."""
    class Slow(ublk.Target):
        size, begun = 1 << 20, 0

        async def read(self, offset, buffer):
            self.begun += 1
            if self.begun == 1:
                await asyncio.sleep(3600)
            while not disk._workers[0].queue.leaving:
                await asyncio.sleep(0.01)

    disk = ublk.Device(Slow(), recovery="requeue", depth=3, data_path="copy", partition_scan=False)
    disk.start()
    with opened(disk.path) as fd, ThreadPoolExecutor(6) as pool:
        def client(number):
            asking.append(threading.get_native_id())
            return error_of(read_at, fd, 65536 * number, 4096)
        asking = []
        clients = [pool.submit(client, number) for number in range(6)]
        until(lambda: len(asking) == 6 and all(fields_of(each)[0] == "D" for each in asking))
        until(lambda: disk.target.begun == 3)
        disk.detach()
        disk = ublk.Device.recover(disk.id, Ram())
        failed = [each.result() for each in clients].count(errno.EIO)
    disk.stop()
    assert failed in (1, 2)     # one may come as the last answers go


NOTHING = ([], set())


def test_a_queue_serves_what_comes_while_its_tags_end():
    """STOP_DEV ends tags one by one, and a request may still come for another."""
    assert served_while_ending(([], {0}), ([1], set()), ([2], {1}), ([], {2})) == [1, 2]


def test_a_queue_that_ends_waits_for_data_it_has_asked_for():
    assert served_while_ending(([], {0}), NOTHING, NOTHING, ([1], set()), NOTHING, NOTHING, asked=[1]) == [1]


def test_a_queue_whose_tags_have_all_ended_asks_the_driver_nothing(monkeypatch):
    device = StandIn(InFile(None))
    queue = NopQueue(device)
    queue.chained.update(range(queue.depth))
    queue.ended.update(range(queue.depth))
    with monkeypatch.context() as patch:
        patch.setattr(queue.path, "asking", None)
        assert queue.is_over()
    queue.close()
    device.close()


MAKING = {"ring": (ublk, "Ring"), "memory": (ublk, "address_of"), "chains": (ublk.Ring, "prepare"),
          "file": (ublk.os, "dup"), "table": (ublk.Ring, "register_sparse_buffers"),
          "the last step": (ublk.Queue, "_await_news")}


@pytest.mark.parametrize("name", ublk.DATA_PATHS)
@pytest.mark.parametrize("step", MAKING.values(), ids=MAKING)
def test_a_queue_that_cannot_be_made_keeps_nothing(monkeypatch, name, step):
    def fail(*_, **__):
        raise MemoryError("no more")
    device = StandIn(Ram())
    device.data_path = ublk.DATA_PATHS[name]
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(*step, fail)
        try:
            ublk.Queue(device, 0).close()
        except MemoryError as error:            # whose traceback refers to the queue
            device.descriptors[0].close()       # BufferError where a view of it is left
            assert descriptors() == before, error
    device.close()


def test_a_map_that_comes_with_the_start_is_not_needed():
    def start(target, index):
        target.map = lambda offset, length, write: (-1, 0)

    assert serve(target_of(start=start, read=Ram.read, data=bytes(1 << 20)), depth=1).answers == [(0, 4096)]


@pytest.mark.parametrize("kept", [4, 3, 2.5, 0])
def test_only_a_whole_transfer_to_the_tags_own_buffer_is_committed(tmp_path, kept):
    """READs of 4 KiB, one a tag, on a real ring; NOPs stand in for the driver's commands."""
    data, whole = os.urandom(16 << 10), int(kept)
    (tmp_path / "data").write_bytes(data[:int(kept * 4096)])
    with open(tmp_path / "data", "rb") as file:
        device = StandIn(InFile(file), depth=4)
        queue = NopQueue(device)
        queue.fetch()
        queue.answer = queue._answer()
        queue.answer(queue.collect())
        committed = queue.collect()
        queue.commit()
        assert sorted(committed) == list(range(whole))
        assert sorted(queue.answers) == [(tag, -errno.EIO) for tag in range(whole, 4)]
        assert sorted(device.target.asked) == [4096 * tag for tag in range(whole, 4)]
        assert b"".join(queue.path.buffer(tag, 4096) for tag in range(whole)) == data[:4096 * whole]
        assert bytes(queue.path.buffer(3, 4096)) in (data[3 * 4096:], bytes(4096))
        queue.close()
        device.close()


def test_a_buffer_that_the_kernel_may_still_fill_is_kept():
    reader, writer = os.pipe()
    kept = len(ublk._left_behind)
    with open(reader, "rb", buffering=0) as file:
        device = StandIn(InFile(file), depth=4)
        queue = NopQueue(device)
        queue.fetch()
        queue.answer = queue._answer()
        queue.answer(queue.collect())
        queue.collect(0)
        queue.close()
        device.close()
    os.close(writer)
    assert [type(left) for left in ublk._left_behind[kept:]] == [mmap.mmap]


def test_a_queue_that_leaves_waits_for_what_the_kernel_moves():
    kept, looks = len(ublk._left_behind), [False, True, True]
    device = StandIn(InFile(io.BytesIO()), depth=4)
    queue = NopQueue(device)
    queue.fetch()
    queue._has_chains = looks.pop
    queue.wind_up()
    queue.close()
    device.close()
    assert looks == [] and len(ublk._left_behind) == kept


class AfterANop(ublk.MappedCopy):
    """As with zero copy, a transfer is not the first of its chain."""

    stages = 2

    def __init__(self, queue):
        super().__init__(queue)
        for slot in range(2 * self.depth, 3 * self.depth):
            queue.ring.prepare(slot, ublk.IORING_OP_NOP, user_data=slot, flags=queue.link_last)

    def chain(self, tag):
        return 2 * self.depth + tag, self.depth + tag


def test_a_close_that_is_a_coroutine_waits_for_transfers_that_have_not_begun(tmp_path):
    """Or they would find whatever file has the number of theirs by then. A system call begins some twenty."""
    class Closes(Ram):
        def map(self, offset, length, write):
            return self.fd, offset

        async def close(self):
            os.close(self.fd)
            self.fd = os.open(tmp_path / "another", os.O_RDWR | os.O_CREAT)

    device = StandIn(Closes(), depth=128)
    device.data_path = AfterANop
    device.target.fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    queue = NopQueue(device)
    queue.path.view[:] = b"w" * len(queue.path.view)
    for tag in range(128):
        queue.flags[tag], queue.sectors[tag], queue.starts[tag] = ublk.UBLK_IO_OP_WRITE, 8, 8 * tag
    queue.fetch()
    queue._answer()(queue.collect())
    queue.closing = True
    queue.end_handlers()
    queue.call(device.target.close)
    queue.wind_up()
    queue.close()
    device.close()
    os.close(device.target.fd)
    assert (tmp_path / "another").read_bytes() == b""
    assert (tmp_path / "data").read_bytes() == b"w" * (512 << 10)


def test_a_queue_leaves_though_no_descriptor_is_left():
    device = StandIn(InFile(io.BytesIO()), depth=4)
    queue = NopQueue(device)
    queue.chained.add(2)
    with descriptors_below(0):
        assert queue._has_chains()
    queue.close()
    device.close()


def test_what_the_driver_was_asked_before_answers_no_later_question():
    """The kernel may take nothing for want of memory: then two questions were answered at once."""
    device = StandIn(InFile(io.BytesIO()), depth=4)
    queue = NopQueue(device)
    queue.chained.update([0, 1])
    ring = queue.path.asking
    prepare, enter = ring.prepare, ring.enter
    says = {0: -errno.EBUSY & 0xFFFFFFFF, 1: -errno.EINVAL & 0xFFFFFFFF}    # 1 waits for its commit
    ring.prepare = lambda tag, *_, **__: prepare(tag, ublk.IORING_OP_NOP, length=says[tag], rw_flags=1)
    ring.enter = bool
    assert queue._has_chains()
    ring.enter = enter
    assert queue._has_chains()
    queue.close()
    device.close()


class BatchOfNops(ublk.BatchQueue):
    """A NOP stands in for the command that commits: it takes all."""

    def __init__(self, device):
        super().__init__(device, 0)
        self.look_at(device)

    def _send(self, opcode):
        super()._send(opcode)
        self.ring.prepare(self._commit_slot, ublk.IORING_OP_NOP, user_data=ublk.COMMIT)

    def _committed(self, result):
        self.taken = self._sent
        super()._committed(self.element_size * len(self._sent))


def test_what_comes_behind_a_commit_when_its_queue_leaves_is_committed_with_batches_too():
    device = StandIn(Ram(), depth=4)
    queue = BatchOfNops(device)
    queue.complete(1, 0)
    queue.commit()
    queue.complete(2, 0)
    queue.wind_up()
    queue.collect(0)
    assert queue.taken == [2]
    queue.close()
    device.close()


def test_what_the_kernel_has_moved_when_its_queue_leaves_is_committed_with_batches_too(tmp_path):
    (tmp_path / "data").write_bytes(os.urandom(16 << 10))
    with open(tmp_path / "data", "rb") as file:
        device = StandIn(InFile(file), depth=4)
        queue = BatchOfNops(device)
        queue._answer()([1, 2])
        queue.wind_up()
        assert not queue.ring.pending
        queue.collect(0)
        assert (sorted(queue.taken), queue._sent) == ([1, 2], [])
        queue.close()
        device.close()


def test_a_ring_that_ends_has_no_buffers_of_a_queue_with_batches(monkeypatch):
    # A thread of the kernel's would still fill them, and those of the tags, when they are gone (seen on 7.3)
    status, told, close = ublk.io_uring_buf_status(), [], ublk.Ring.close

    def look(ring):
        told.append(error_of(ring.register, ublk.IORING_REGISTER_PBUF_STATUS, ctypes.addressof(status), 1))
        close(ring)

    monkeypatch.setattr(ublk.Ring, "close", look)
    device = StandIn(Ram())
    queue = ublk.BatchQueue(device, 0)
    assert not queue.ring.register(ublk.IORING_REGISTER_PBUF_STATUS, ctypes.addressof(status), 1)
    queue.close()
    assert told == [errno.ENOENT]
    queue = ublk.BatchQueue(device, 0)
    with ThreadPoolExecutor() as another:               # of a stop(): the queue's own thread is stuck
        another.submit(queue.close).result()
    device.close()


def test_a_queue_with_batches_that_is_told_to_go_as_it_fetches_hears_it():
    """What comes beside the answer that it waits for comes but once."""
    device = StandIn(Ram())
    queue = BatchOfNops(device)
    os.write(device.wake_write, b"!")
    queue.fetch()
    assert queue.leaving
    queue.close()
    device.close()


def test_a_commit_that_another_thread_made_is_made_again_though_its_queue_leaves(monkeypatch):
    """Before Linux 6.7 that is refused where the thread that moved the data makes it."""
    device = StandIn(Ram())
    queue = NopQueue(device)
    queue.fetch()
    queue.collect()
    queue.chained.add(2)
    monkeypatch.setattr(queue, "_has_chains", lambda: bool(queue.chained))
    monkeypatch.setattr(queue.ring, "reap", lambda: ([2], [-errno.EINVAL]))
    queue.wind_up()
    assert [tag for tag, _ in queue.answers] == [2]
    queue.close()
    device.close()


class Begun(Ram):
    """Tells that a write has begun, and takes its time."""

    def __init__(self):
        super().__init__(4 << 20)
        self.begun = threading.Event()

    async def write(self, offset, buffer):
        self.begun.set()
        await asyncio.sleep(0.5)
        super().write(offset, buffer)


@kernel
@pytest.mark.parametrize("batch", [False, pytest.param(True, marks=since("7.0"))])
def test_a_disk_is_let_go_once_the_kernel_has_moved_its_data(batch):
    """Or the write would fail, and later, all the same, be done."""
    errors, below = [], Begun()
    with ublk.Device(below, partition_scan=False) as lower, \
            open(os.open(lower.path, os.O_RDWR | os.O_DIRECT), "r+b", buffering=0) as file:
        how = {"recovery": "requeue", "data_path": "copy", "batch": batch, "partition_scan": False}
        disk = ublk.Device(InFile(file), **how)
        disk.start()
        with opened(disk.path) as fd:
            writer = threading.Thread(target=lambda: errors.append(error_of(write_at, fd, 0, b"w" * 4096)))
            writer.start()
            assert below.begun.wait(10), errors
            disk.detach()
            writer.join()
        assert ublk.main(["del", str(disk.id)]) == 0
    assert errors == [0]


class Passing(Ram):
    """All that may stand for read() and write() gives nothing."""

    def map(self, offset, length, write):
        raise OSError(errno.ENOMEDIUM, "passed by")

    def write_fua(self, offset, buffer):
        """Done, as it seems."""

    def flush(self):
        """The cache it never had is empty."""


@pytest.mark.parametrize("base, name", [
    (Passing, "read"), (Passing, "write"), (Passing, "write_fua"), (ublk.Null, "read"), (ublk.Null, "write"),
    (ublk.Null, "flush"), (ublk.Null, "discard"), (ublk.Null, "zone_reset"), (ublk.Null, "report_zones")])
def test_what_a_subclass_overrides_is_what_is_called(base, name):
    def fail(target, *words):
        raise OSError(errno.ENODATA, "mine")
    durable = ublk.UBLK_IO_F_FUA if name == "write_fua" else 0
    operation = getattr(ublk, f"UBLK_IO_OP_{name.upper().removesuffix('_FUA')}") | durable
    target = type("Mine", (base,), {name: fail})()
    target.size = 1 << 20
    assert sorted(serve(target, operation=operation).answers) == [(tag, -errno.ENODATA) for tag in range(4)]


def test_an_inherited_answer_is_not_given_for_data_that_a_subclass_maps():
    target = type("Mine", (ublk.Null,), {"map": Passing.map})()
    assert serve(target, depth=1).answers == [(0, -errno.ENOMEDIUM)]


class Flushed(Recorder):
    """Has a durable write only of its base, whose write() it overrides."""

    def write(self, offset, buffer):
        self.calls.append(("mine",))


def test_zeroes_of_a_base_do_not_go_around_a_subclass():
    """As of one that encrypts: the kernel writes them, as it does where there is no method."""
    offered = [ublk.params_of(kind(), 65536).discard.max_write_zeroes_sectors for kind in (Flushed, Recorder)]
    answers = serve(Flushed(), depth=1, operation=ublk.UBLK_IO_OP_WRITE_ZEROES).answers
    assert (offered, answers) == ([0, ublk.MAX_DISCARD // 512], [(0, -errno.EOPNOTSUPP)])


def test_discards_of_a_base_do_not_go_around_what_a_subclass_maps():
    """Else other data would be given back."""
    class Elsewhere(Recorder):
        def map(self, offset, length, write):
            raise AssertionError("no data are asked for")

    disk = Elsewhere()
    offered = [ublk.params_of(each, 65536).discard.max_discard_sectors for each in (disk, Recorder())]
    answers = serve(disk, depth=1, operation=ublk.UBLK_IO_OP_DISCARD).answers
    assert (offered, answers) == ([0, ublk.MAX_DISCARD // 512], [(0, -errno.EOPNOTSUPP)])
    assert not disk.calls


class Coroutines(Flushed):
    async def flush(self):
        super().flush()


class Mapped(Flushed):
    def map(self, offset, length, write):
        raise OSError(errno.ENOMEDIUM, "passed by")


class Beside(Recorder):
    """Has metadata, which its durable write knows nothing of."""

    metadata_size = 8
    write = Flushed.write

    def write_fua(self, offset, buffer):
        raise AssertionError("metadata are not durable behind it")


class Appending(Recorder):
    def zone_append(self, offset, buffer):
        self.calls.append(("mine",))
        return offset


@pytest.mark.parametrize("kind, operation", [
    (Flushed, ublk.UBLK_IO_OP_WRITE), (Coroutines, ublk.UBLK_IO_OP_WRITE), (Mapped, ublk.UBLK_IO_OP_WRITE),
    (Beside, ublk.UBLK_IO_OP_WRITE), (Appending, ublk.UBLK_IO_OP_ZONE_APPEND)],
    ids=["plain", "coroutines", "mapped", "metadata", "append"])
def test_a_durable_write_that_a_target_has_no_method_for_is_flushed(kind, operation):
    target = kind()
    assert ublk.params_of(target, 65536).basic.attrs & ublk.UBLK_ATTR_FUA
    answers = serve(target, operation=operation | ublk.UBLK_IO_F_FUA, depth=1).answers
    assert (answers, target.calls) == ([(0, 4096)], [("mine",), ("flush",)])


@pytest.mark.parametrize("kind", [Flushed, Coroutines, Mapped, Appending])
def test_a_durable_write_whose_flush_fails_fails(kind):
    def flush():
        raise OSError(errno.ENOSPC, "mine")
    target = kind()
    target.flush = flush
    operation = ublk.UBLK_IO_OP_ZONE_APPEND if kind is Appending else ublk.UBLK_IO_OP_WRITE
    assert serve(target, operation=operation | ublk.UBLK_IO_F_FUA, depth=1).answers == [(0, -errno.ENOSPC)]


def test_a_durable_write_to_who_has_lost_its_flush_fails_alone():
    """An attribute may go, or be a property that fails; the disk stays."""
    operation = ublk.UBLK_IO_OP_WRITE | ublk.UBLK_IO_F_FUA
    assert serve(target_of(write=lambda *_: None), operation=operation, depth=1).answers == [(0, -errno.EIO)]


@pytest.mark.parametrize("number", [0, errno.ENOSPC], ids=["good", "failed"])
@pytest.mark.parametrize("kind", [Flushed, Mapped, Appending])
def test_a_round_of_durable_writes_and_flushes_of_a_plain_target_has_one_flush(kind, number):
    """Which may be told but once that something is lost, and which takes its time."""
    def flush():
        target.calls.append(("flush",))
        if number:
            raise OSError(number, "mine")
    target = kind()
    target.flush = flush
    operation = ublk.UBLK_IO_OP_ZONE_APPEND if kind is Appending else ublk.UBLK_IO_OP_WRITE
    device = StandIn(target, depth=3, operation=operation | ublk.UBLK_IO_F_FUA)
    ublk.IO_DESC.pack_into(device.descriptors[0], device.desc_size, ublk.UBLK_IO_OP_FLUSH, 0, 0, 0)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert sorted(queue.answers) == [(tag, -number or (tag != 1) * 4096) for tag in range(3)]
    assert target.calls == 2 * [("mine",)] + [("flush",)]


def telling_once(kind, number):
    """Make a target of a kind whose flush takes a while; that of this number fails."""
    class TellingOnce(kind):
        async def flush(self):
            self.calls.append(("flush",))
            fails = self.calls.count(("flush",)) == number
            await asyncio.sleep(0.05)
            if fails:
                raise OSError(errno.ENOSPC, "lost")
    return TellingOnce()


def test_all_whose_durable_writes_wait_for_a_flush_hear_that_it_fails():
    """Such as a kernel's error of a file, which the next one would hear nothing of."""
    target = telling_once(Flushed, 2)
    answers = serve(target, operation=ublk.UBLK_IO_OP_WRITE | ublk.UBLK_IO_F_FUA, depth=4).answers
    assert [result for _, result in sorted(answers)] == [4096] + 3 * [-errno.ENOSPC]
    assert target.calls.count(("flush",)) == 2


def test_all_who_come_during_a_flush_share_the_next():
    target = telling_once(Flushed, 0)
    answers = serve(target, operation=ublk.UBLK_IO_OP_WRITE | ublk.UBLK_IO_F_FUA, depth=4).answers
    assert [result for _, result in answers] == 4 * [4096]
    assert target.calls.count(("flush",)) == 2


def test_who_waits_for_a_flush_hears_that_the_one_before_has_failed():
    """It may have been told of what they lost meanwhile, and nobody is told again."""
    target = telling_once(Flushed, 1)
    answers = serve(target, operation=ublk.UBLK_IO_OP_WRITE | ublk.UBLK_IO_F_FUA, depth=4).answers
    assert [result for _, result in answers] == 4 * [-errno.ENOSPC]


@pytest.mark.parametrize("kind, operation", [
    (Flushed, ublk.UBLK_IO_OP_WRITE), (Appending, ublk.UBLK_IO_OP_ZONE_APPEND)], ids=["write", "append"])
def test_who_writes_while_a_flush_fails_hears_of_it(kind, operation):
    """It may have been told of what they were about to wait for."""
    class Slow(kind):
        async def late(self, offset, buffer):
            self.calls.append(("mine",))
            while target.calls.count(("flush",)) == 0:
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)
            return offset if kind is Appending else None

        write = zone_append = late

    target = telling_once(Slow, 1)
    device = StandIn(target, depth=2, operation=operation | ublk.UBLK_IO_F_FUA)
    ublk.IO_DESC.pack_into(device.descriptors[0], device.desc_size, ublk.UBLK_IO_OP_FLUSH, 0, 0, 0)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert sorted(queue.answers) == [(0, -errno.ENOSPC), (1, -errno.ENOSPC)]
    assert target.calls.count(("flush",)) == 1


def test_queues_share_a_flush():
    """They have loops of their own, and a target may be told but once that data are lost."""
    began, ends = threading.Event(), threading.Event()
    calls = []

    async def flush():
        calls.append(threading.get_ident())
        began.set()
        await asyncio.to_thread(ends.wait)
        raise OSError(errno.ENOSPC, "lost")

    device = StandIn(target_of(flush=lambda target: flush()))
    queues = [NopQueue(device) for _ in range(3)]

    def error(queue, failures):
        return error_of(asyncio.run, queue.flushing(failures))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(error, queues[0], None)
        assert began.wait(60)
        others = [pool.submit(error, queues[1], None), pool.submit(error, queues[2], 0)]
        until(lambda: len(device.flushing._waiting) == 3)
        ends.set()
        assert [each.result() for each in (first, *others)] == 3 * [errno.ENOSPC]
        assert error(queues[0], 0) == errno.ENOSPC
    assert len(calls) == 1
    for each in (*queues, device):
        each.close()


def test_who_flushes_as_another_queues_flush_fails_hears_of_it():
    """What it was to make durable may be what that one was told of."""
    async def flush():
        raise OSError(errno.EIO, "lost")

    class Beside(ublk.Flushing):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name in ("begun", "failures") and others:
                pool.submit(error_of, asyncio.run, others.pop()).result()
            return value

    with ThreadPoolExecutor() as pool:
        others = []
        flushing = Beside(flush)
        others.append(flushing())
        assert error_of(asyncio.run, flushing()) == errno.EIO
        assert (flushing.begun, flushing.failures) == (1, 1)


def test_who_shares_a_flush_that_ends_with_its_queue_is_told_so():
    async def run():
        flushing = ublk.Flushing(lambda: asyncio.sleep(60))
        tasks = [asyncio.create_task(flushing()) for _ in range(2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)
    first, other = asyncio.run(run())
    assert isinstance(first, asyncio.CancelledError) and other.errno == errno.ECANCELED


def test_who_gives_up_waiting_for_a_turn_keeps_nobody_out():
    async def run():
        turns, entered = ublk.Turns(), []

        async def enter(name):
            async with turns.take():
                entered.append(name)
                await asyncio.sleep(0)
        async with turns.take():
            tasks = [asyncio.create_task(enter(name)) for name in "abc"]
            await asyncio.sleep(0)
            tasks[1].cancel()
            await asyncio.sleep(0.01)
            assert entered == []
        await asyncio.wait(tasks)
        return "".join(entered)
    assert asyncio.run(run()) == "ac"


def test_a_durable_write_is_not_offered_to_whom_answer_serves_alone():
    class Mine(ublk.Null):
        def answer(self, queue, tags):
            super().answer(queue, tags)

    class Writing(Mine):
        def write(self, offset, buffer):
            pass

        answer = ublk.Null.answer

    kinds = ublk.Null, Mine, Writing
    offered = [ublk.params_of(kind(), 65536).basic.attrs & ublk.UBLK_ATTR_FUA for kind in kinds]
    assert offered == [ublk.UBLK_ATTR_FUA, 0, 0]


@pytest.mark.parametrize("recovery", ["requeue", "reissue", "fail"])
def test_a_server_that_leaves_keeps_no_durable_write_waiting_for_the_kernels_flush(recovery):
    """The driver waits for that write, and it for a flush that nobody has any more (6.12 and 7.3)."""
    class Mine(ublk.Null):
        def answer(self, queue, tags):
            super().answer(queue, tags)

    class Durable(Mine):
        answer, write_fua = Mine.answer, ublk.Null.write_fua

    def flags_of(target, recovery=recovery):
        device = ublk.Device(target, recovery=recovery, unprivileged=False)
        device.control = SimpleNamespace(features=-1)
        return device._flags()

    assert "define write_fua() beside it" in message(flags_of, Mine())
    assert flags_of(Durable()) & ublk.UBLK_F_USER_RECOVERY
    assert not flags_of(Mine(), None) & ublk.UBLK_F_USER_RECOVERY


def test_requests_come_through_the_ring_alone_also_where_the_driver_is_no_module():
    """That of 6.1 would hand them to the thread, whose buffers may be gone, as a signal is."""
    device = ublk.Device(ublk.Null(), unprivileged=False)
    device.control = SimpleNamespace(features=None)
    assert device._flags() & ublk.UBLK_F_URING_CMD_COMP_IN_TASK


def test_an_append_and_a_flush_hear_of_the_same_loss():
    target = telling_once(Appending, 1)
    device = StandIn(target, depth=2, operation=ublk.UBLK_IO_OP_ZONE_APPEND | ublk.UBLK_IO_F_FUA)
    ublk.IO_DESC.pack_into(device.descriptors[0], device.desc_size, ublk.UBLK_IO_OP_FLUSH, 0, 0, 0)
    queue = NopQueue(device)
    to_the_end(queue, device)
    assert [result for _, result in queue.answers] == 2 * [-errno.ENOSPC]


@pytest.mark.parametrize("position", [-512, 1 << 80, 4096.0], ids=str)
def test_an_append_that_landed_nowhere_fails_alone_with_batches_too(position):
    device = StandIn(Ram(), operation=ublk.UBLK_IO_OP_ZONE_APPEND)
    device.zoned, device.target.zone_append = True, lambda *_: position
    queue = ublk.BatchQueue(device, 0)
    queue.look_at(device)
    queue.handle(2)
    device.target.zone_append = lambda *_: 4096
    queue.handle(3)
    queue._send(ublk.UBLK_U_IO_COMMIT_IO_CMDS)
    elements = queue.memory[queue._elements_at:queue._elements_at + 32]
    assert list(struct.iter_unpack("=HxxiQ", elements)) == [(2, -errno.EIO, 0), (3, 4096, 8)]
    queue.close()
    device.close()


def test_an_answer_is_asked_for_when_there_are_requests_only():
    asked = []

    def answer(target, queue, tags):
        asked.append(tags)
        for tag in tags:
            queue.complete(tag, 4096)

    serve(type("Mine", (Ram,), {"answer": answer, "read": Ram.read, "write": Ram.write})())
    assert asked and all(asked)


@pytest.mark.parametrize("kind", [ublk.Queue, ublk.BatchQueue])
def test_what_a_failing_answer_leaves_gets_an_error(kind):
    def answer(queue, tags):
        queue.complete(tags[1], 4096)
        raise SystemExit(3)

    device = StandIn(ublk.Null())
    device.target.answer = answer
    queue = kind(device, 0)
    queue._answer()([1, 2, 3])
    results = {tag: queue.results[tag] for tag in queue._done}
    assert results == {1: -errno.EIO, 2: 4096, 3: -errno.EIO} and len(queue._done) == 3
    queue.close()
    device.close()


async def later():
    """What a plain method must not return."""


@pytest.mark.parametrize("name, operation", [
    ("answer", 0), ("read_metadata", ublk.UBLK_IO_OP_READ), ("write_metadata", ublk.UBLK_IO_OP_WRITE)])
def test_what_nobody_can_wait_for_is_no_success(name, operation):
    outcome = later()
    device = StandIn(ublk.Null(), operation=operation | ublk.UBLK_IO_F_INTEGRITY)
    device.target.metadata_size = 8 if "metadata" in name else 0
    setattr(device.target, name, lambda *_: outcome)
    queue = ublk.Queue(device, 0)
    queue.look_at(device)
    queue.path.metadata, queue.path.give_metadata = lambda *_: bytes(8), lambda *_: 8
    queue.path.lasting = False                  # as with user copy
    queue._answer()([2])
    assert queue._done == [2] and queue.results[2] == -errno.EIO
    outcome.close()
    queue.close()
    device.close()


def test_a_size_that_nobody_can_wait_for_is_no_size():
    outcome, target = later(), Ram()
    target.resized = lambda size: outcome
    with pytest.raises(TypeError, match="at once"):
        ublk.fit(target, 4096)
    outcome.close()


@pytest.mark.parametrize("name, value", [("zone_size", 1 << 41), ("discard_granularity", 1 << 32)])
def test_a_number_that_has_no_room_where_the_kernel_looks_for_it_is_refused(name, value):
    target = Ram()
    setattr(target, name, value)
    assert f"{value}: not a number from 0 to" in message(ublk.Device(target).start)


class int64:
    """A number that is no int, as those of numpy."""

    def __str__(self):
        return "4096"


@pytest.mark.parametrize("name", ["size", "block_size"])
def test_a_number_that_is_no_int_is_not_said_to_be_no_number(name):
    target = Ram()
    setattr(target, name, int64())
    text = f"{name.replace('_', ' ')} 4096: a int64 (22 EINVAL): make it an int"
    assert message(ublk.Device(target).start) == text


@pytest.mark.parametrize("boundary", [100, 512, 6144])
def test_a_boundary_within_a_block_is_refused(boundary):
    target = Ram()
    target.block_size, target.boundary = 4096, boundary
    with pytest.raises(ublk.UblkError, match="not a multiple of the block size 4096"):
        ublk.params_of(target, 65536)


# Operation and sectors of the requests of a batch: each is like one before it, but not like all of them.
MIXED = [(ublk.UBLK_IO_OP_READ, 8), (ublk.UBLK_IO_OP_READ, 8), (ublk.UBLK_IO_OP_READ, 16),
         (ublk.UBLK_IO_OP_WRITE, 16), (ublk.UBLK_IO_OP_WRITE, 8), (ublk.UBLK_IO_OP_READ, 8)]


@pytest.fixture
def batch():
    """Return a function that has a queue answer MIXED, from its first tag on or from its last.

    batch(target, order) returns the queue, and of each tag operation and sectors.
    """
    def batch(target, order):
        if not made:
            device = StandIn(target, depth=len(MIXED))
            made.extend([ublk.Queue(device, 0), device])
            made[0].look_at(device)
        queue, device = made
        given = dict(zip(range(len(MIXED))[::order], MIXED))
        for tag, (operation, sectors) in given.items():
            place = tag * device.desc_size
            ublk.IO_DESC.pack_into(device.descriptors[0], place, operation, sectors, 100 * tag, 0)
        queue._done.clear()
        queue._answer()(list(given))
        return queue, given
    made = []
    yield batch
    for item in made:
        item.close()


@pytest.mark.parametrize("order", [1, -1])
def test_each_request_of_a_batch_is_served_as_what_it_is(batch, order):
    seen = {}
    target = target_of(read=lambda _, offset, buffer: seen.update({offset: (0, len(buffer))}),
                       write=lambda _, offset, buffer: seen.update({offset: (1, len(buffer))}))
    queue, given = batch(target, order)
    for tag, (operation, sectors) in given.items():
        length = sectors * ublk.SECTOR
        assert (seen[100 * tag * ublk.SECTOR], queue.results[tag]) == ((operation, length), length)


def test_what_was_kept_of_a_tags_last_transfer_is_not_taken_for_the_next(batch):
    file = [3]
    target = target_of(map=lambda _, offset, length, write: (file[0], offset + 512))
    for order, fd in ((1, 3), (-1, 3), (-1, 4), (-1, 4)):
        file[0] = fd
        queue, given = batch(target, order)
        for tag, (operation, sectors) in given.items():
            sqe = ublk.TRANSFER.unpack_from(queue.ring.sqes, (queue.depth + tag) * 64)
            moves = ublk.IORING_OP_WRITE if operation else ublk.IORING_OP_READ
            length = sectors * ublk.SECTOR
            assert (sqe[0], sqe[3], sqe[4], sqe[6]) == (moves, fd, 100 * tag * ublk.SECTOR + 512, length)
            assert queue.results[tag] == length
