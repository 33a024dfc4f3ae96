# SPDX-License-Identifier: MIT
"""Handlers that are coroutines: asyncio on the ring of a queue."""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import contextlib
import errno
import gc
import inspect
import mmap
import os
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    HERE,
    UBLK,
    Forked,
    Ram,
    error_of,
    files,
    fio_verify,
    kernel,
    message,
    opened,
    read_at,
    sh,
    since,
    target_file,
    until,
    write_at,
)

SIZE = 32 << 20


class StandIn:
    """What a queue needs of a device, without a driver: every tag has a READ of 4 KiB."""

    def __init__(self, target, depth=4, operation=ublk.UBLK_IO_OP_READ, trace=None):
        self.target, self.id, self.zoned, self.share_memory, self.shared = target, 0, False, False, [{}]
        self.flushing = ublk.Flushing(lambda: target.flush())
        self.info = SimpleNamespace(queue_depth=depth, max_io_buf_bytes=65536, flags=0)
        self.control = SimpleNamespace(legacy=False)
        self.trace = trace
        self.desc_size, self.data_path = ublk.IO_DESC.size, ublk.MappedCopy
        self.char_fd = os.open(os.devnull, os.O_RDWR)
        self.wake_fd, self.wake_write = os.pipe()
        memory = mmap.mmap(-1, max(depth * self.desc_size, mmap.PAGESIZE))
        for tag in range(depth):
            ublk.IO_DESC.pack_into(memory, tag * self.desc_size, operation, 8, 8 * tag, 0)
        self.descriptors = [memory]

    def close(self):
        for fd in self.char_fd, self.wake_fd, self.wake_write:
            os.close(fd)


class NopQueue(ublk.Queue):
    """NOPs stand in for the commands of tags: each that was answered has its next request at once."""

    def __init__(self, device, rounds=1):
        super().__init__(device, 0)
        self.look_at(device)
        self.answers, self.left = [], [rounds] * self.depth

    def command(self, slot, tag, *_, **__):
        self.ring.prepare(slot, ublk.IORING_OP_NOP, user_data=tag)

    def commit(self):
        for tag in self._done:
            self.answers.append((tag, self.results[tag]))
            self.left[tag] -= 1
        self._done = [tag for tag in self._done if self.left[tag]]
        if not any(self.left):
            self.ended.update(range(self.depth))
        super().commit()

    def collect(self, timeout=None):
        if not self.leaving:
            self.commit()
        return super().collect(0 if self.ended else timeout)


class TracedNopQueue(ublk.TracedQueue, NopQueue):
    """The same as a queue of a traced disk."""


def serve(target, rounds=1, **options):
    """Serve some requests of each tag by a stand-in; return the queue."""
    device = StandIn(target, **options)
    queue = (TracedNopQueue if device.trace else NopQueue)(device, rounds)
    try:
        if hasattr(target, "start"):
            queue.call(target.start, 0)
        queue.fetch()
        queue.run()
        queue.wind_up()
    finally:
        queue.close()
        device.close()
    return queue


def target_of(**methods):
    """Make a target with these methods."""
    return type("Mine", (ublk.Target,), {"size": SIZE, **methods})()


async def async_start(target, index):
    """Have the queues of a class with plain handlers run a loop."""


def results_of(body):
    """Run the coroutine function body as the handler of one READ; return the results of the request."""
    async def read(target, offset, buffer):
        await body(buffer)

    return [result for _, result in serve(target_of(read=read), depth=1).answers]


class Chain(ublk.Target):
    """Each handler waits for its predecessor's event; the first comes last."""

    size = SIZE

    def __init__(self, length, apart=4096):
        self.length, self.apart = length, apart

    async def start(self, index):
        self.events = [asyncio.Event() for _ in range(self.length)]

    async def read(self, offset, buffer):
        number = offset // self.apart
        if number + 1 < self.length:
            await self.events[number + 1].wait()
        if number < self.length:
            self.events[number].set()


def test_zones_may_be_reported_by_a_coroutine():
    async def report_zones(target, offset, count):
        await asyncio.sleep(0)
        return [ublk.blk_zone()]

    answers = serve(target_of(report_zones=report_zones), operation=ublk.UBLK_IO_OP_REPORT_ZONES).answers
    assert sorted(answers) == [(tag, 4096) for tag in range(4)]


@pytest.mark.parametrize("length", [300, 512])
def test_handlers_that_wait_for_each_other_are_all_answered(length):
    answers = serve(Chain(length), depth=512).answers
    assert sorted(answers) == [(tag, 4096) for tag in range(512)]


def test_handlers_that_never_wait_are_answered_again_and_again():
    async def read(target, offset, buffer):
        buffer[:] = bytes([offset // 4096]) * len(buffer)

    answers = serve(target_of(read=read), rounds=50, depth=16).answers
    assert sorted(answers) == sorted([(tag, 4096) for tag in range(16)] * 50)


@pytest.mark.parametrize("waits, count", [(True, 40), (False, 1)])
def test_each_request_that_waits_has_a_task_of_its_own(waits, count):
    tasks = []

    async def read(target, offset, buffer):
        tasks.append(asyncio.current_task())
        if waits:
            await asyncio.sleep(0)

    serve(target_of(read=read), depth=40)
    assert len(tasks) == 40 and len(set(tasks)) == count


def test_a_request_that_has_waited_shares_its_task_with_none_that_came_meanwhile():
    seen = []

    async def read(target, offset, buffer):
        seen.append((asyncio.current_task(), waits := len(seen) % 3 == 0))
        if waits:
            await asyncio.sleep(0.001)

    assert len(serve(target_of(read=read), rounds=30, depth=8).answers) == 240
    waited = [task for task, waits in seen if waits]
    assert len(set(waited)) == len(waited) == 80


def test_tasks_that_are_cancelled_before_they_begin_keep_nobody_waiting(capfd):
    async def read(target, offset, buffer):
        if offset == 4096:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        await asyncio.sleep(0.001)

    assert len(serve(target_of(read=read), rounds=4, depth=8).answers) == 32


def test_what_a_handler_does_when_it_is_thrown_away_touches_no_ring(monkeypatch, capfd):
    monkeypatch.setattr(ublk, "LAST_WORDS", 0.05)
    seen = []

    async def read(target, offset, buffer):
        with contextlib.suppress(asyncio.CancelledError):
            os.write(target.device.wake_write, b"!")
            await asyncio.sleep(5)
        try:
            await asyncio.Event().wait()                # whatever it is told
        finally:
            seen.append(target.queue.ring.fd)

    target = target_of(read=read)
    target.device = StandIn(target, depth=1)
    queue = target.queue = NopQueue(target.device)
    queue.exits.callback(gc.collect)                    # which may come at any time
    queue.fetch()
    queue.run()
    queue.wind_up()
    queue.close()
    gc.collect()
    assert seen == [-1]
    target.device.close()


def test_what_no_task_has_begun_when_its_queue_ends_is_not_begun_any_more():
    async def read(target, offset, buffer):
        raise AssertionError

    device = StandIn(target_of(read=read))
    queue = NopQueue(device)
    queue.handle(0)
    queue.wind_up()
    assert queue.answers == []
    queue.close()
    device.close()


def test_a_chain_that_has_broken_keeps_no_memory():
    """The kernel has done with it, though the handler that serves in its place has not."""
    kept = len(ublk._left_behind)
    device = StandIn(target_of(start=async_start))
    queue = NopQueue(device)
    queue.chained.add(0)
    queue.chain_done(0, 1, -errno.EIO)
    queue.wind_up()
    queue.close()
    device.close()
    assert len(ublk._left_behind) == kept


def test_what_came_with_the_news_that_ends_a_queue_is_heard(monkeypatch):
    """Or who waits for it, the target's close() maybe, would wait for ever."""
    reader, writer = os.pipe()

    async def start(target, index):
        target.reading = asyncio.ensure_future(ublk.uring_read(reader, bytearray(8), 0))
        await asyncio.sleep(0)

    def reap(original=ublk.Ring.reap):
        data, results = original(queue.ring)
        return [1, *data], [-errno.EIO, *results]

    target = target_of(start=start)
    device = StandIn(target)
    queue = NopQueue(device)
    queue.call(target.start, 0)
    os.write(writer, b"12345678")
    with monkeypatch.context() as patch:
        patch.setattr(queue.ring, "reap", reap)
        queue.run()
    assert "queue 0 lost tag 1" in str(queue.failure) and not queue._operations
    queue.wind_up()
    queue.close()
    device.close()
    os.close(reader)
    os.close(writer)


def test_what_comes_as_the_tasks_of_a_queue_end_is_no_request_of_its_any_more():
    """Or the queue would wait for what the kernel moves, which it has done."""
    device = StandIn(target_of(start=async_start))
    queue = NopQueue(device)
    queue.fetch()
    queue.wind_up()
    assert queue.ended == {0, 1, 2, 3}
    queue.close()
    device.close()


def test_a_part_is_continued_by_coroutines_and_plain_methods():
    def parts(target, offset, buffer):
        target.seen.append((offset, len(buffer)))
        return min(1536, len(buffer))

    async def coroutine(target, offset, buffer):
        await asyncio.sleep(0)
        return parts(target, offset, buffer)

    for read in parts, coroutine:
        target = target_of(read=read, seen=[])
        assert serve(target, depth=1).answers == [(0, 4096)]
        assert target.seen == [(0, 4096), (1536, 2560), (3072, 1024)]


@pytest.mark.parametrize("count", [-1, 4097, 0])
def test_a_count_that_cannot_be_is_an_error(count):
    async def read(target, offset, buffer):
        return count

    assert serve(target_of(read=read), depth=1).answers == [(0, -errno.EIO)]


def test_a_plain_method_may_return_a_coroutine_where_another_is_one():
    def read(target, offset, buffer):
        return asyncio.sleep(0)

    queue = serve(target_of(read=read, start=async_start), rounds=3)
    assert sorted(queue.answers) == sorted([(tag, 4096) for tag in range(4)] * 3)


@pytest.mark.parametrize("operation", [ublk.UBLK_IO_OP_READ, ublk.UBLK_IO_OP_WRITE])
def test_what_may_outlive_its_request_never_has_the_memory_of_a_tag(operation, capfd, monkeypatch):
    monkeypatch.setattr(ublk, "_bugs", {})          # a bug is shown once a line

    class Waits:
        def __await__(self):
            yield

    def move(target, offset, buffer):
        return Waits()

    queue = serve(target_of(read=move, write=move), depth=1, operation=operation, rounds=3)
    assert queue.answers == [(0, -errno.EIO)] * 3 and queue.loop is None
    assert "make the method, or start(), async" in capfd.readouterr().err


def test_asyncio_never_comes_in_where_methods_are_plain():
    program = inspect.cleandoc("""
        import sys, ublk
        from tests import test_async
        for name in [name for name in sys.modules if name.partition(".")[0] == "asyncio"]:
            del sys.modules[name]
        def read(target, offset, buffer):
            return min(1536, len(buffer))
        queue = test_async.serve(test_async.target_of(read=read), rounds=3)
        assert len(queue.answers) == 12 and "asyncio" not in sys.modules
        sys.exit(7)
        """)
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, check=False)
    assert done.returncode == 7


def test_streams_locks_and_threads_work_in_a_handler():
    class Server(ublk.Target):
        size = SIZE

        async def start(self, index):
            self.lock, self.count = asyncio.Lock(), 0
            self.server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
            self.reader, self.writer = await asyncio.open_connection(*self.server.sockets[0].getsockname())

        async def talk(self, reader, writer):
            while True:
                number, = struct.unpack("=Q", await reader.readexactly(8))
                writer.write(bytes([number // 4096 % 256]) * 4096)
                await writer.drain()

        async def read(self, offset, buffer):
            async with self.lock:
                self.writer.write(struct.pack("=Q", offset))
                buffer[:] = await self.reader.readexactly(len(buffer))
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, threading.get_native_id) != threading.get_native_id()
            await asyncio.sleep(0.001)
            self.count += buffer == bytes([offset // 4096 % 256]) * 4096

    target = Server()
    answers = serve(target, rounds=5, depth=32).answers
    assert sorted(answers) == sorted([(tag, 4096) for tag in range(32)] * 5) and target.count == 160


def test_an_operation_on_the_ring_reads_and_writes(tmp_path):
    async def body(buffer):
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        words, back = array.array("Q", range(512)), array.array("Q", bytes(4096))
        assert await ublk.uring_write(fd, words, 4096) == 4096      # bytes, not words
        await ublk.uring_fsync(fd)
        assert await ublk.uring_read(fd, back, 4096) == 4096
        assert back == words
        with pytest.raises(OSError) as info:
            await ublk.uring_read(999, back, 0)
        assert info.value.errno == errno.EBADF
        os.close(fd)

    assert results_of(body) == [4096]


@pytest.mark.parametrize("buffer", [bytes(8), memoryview(bytearray(64))[::2], memoryview(b"x" * 8)],
                         ids=["bytes", "scattered", "view of bytes"])
def test_a_buffer_that_cannot_be_filled_is_refused(buffer):
    async def body(_):
        with pytest.raises(TypeError):
            await ublk.uring_read(0, buffer, 0)

    assert results_of(body) == [4096]


def test_a_length_of_more_than_32_bits_is_refused():
    async def body(_):
        with mmap.mmap(-1, (1 << 32) + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as large:
            with pytest.raises(ValueError, match="too many"):      # MAP_NORESERVE
                await ublk.uring_write(0, large, 0)

    assert results_of(body) == [4096]


def test_an_operation_that_cannot_be_begun_is_not_waited_for():
    async def body(_):
        with pytest.raises(struct.error):
            await ublk.uring_read(0, bytearray(8), -1)
        assert not ublk._here.queue._operations

    assert results_of(body) == [4096]


def test_a_buffer_cannot_be_resized_while_the_kernel_has_it():
    async def body(_):
        reader, writer = os.pipe()
        buffer = bytearray(8)
        reading = asyncio.ensure_future(ublk.uring_read(reader, buffer, 0))
        await asyncio.sleep(0)
        with pytest.raises(BufferError):
            buffer.extend(b"more")
        os.write(writer, b"12345678")
        assert await reading == 8 and buffer == b"12345678"
        buffer.extend(b"more")
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]


def test_more_operations_than_the_ring_has_room_for():
    async def body(_):
        pipes = [os.pipe() for _ in range(300)]
        buffers = [bytearray(1) for _ in pipes]
        reads = [asyncio.ensure_future(ublk.uring_read(pipe[0], buffer, 0))
                 for pipe, buffer in zip(pipes, buffers)]
        await asyncio.sleep(0)
        for _, writer in pipes:
            os.write(writer, b"!")
        assert await asyncio.gather(*reads) == [1] * 300
        for fd in sum(pipes, ()):
            os.close(fd)

    assert results_of(body) == [4096]


def test_outside_a_queue_there_is_no_ring():
    async def alone():
        with pytest.raises(RuntimeError):
            await ublk.uring_fsync(0)

    asyncio.run(alone())


def test_what_was_cancelled_takes_nothing_any_more():
    """Neither the bytes nor the memory, whoever gets the descriptor's number next."""
    async def body(_):
        reader, writer = os.pipe()
        buffer = bytearray(8)
        for delay in 0, 0.01:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ublk.uring_read(reader, buffer, 0), delay)
        os.write(writer, b"12345678")
        await asyncio.sleep(0.01)
        assert buffer == bytes(8) and os.read(reader, 8) == b"12345678"
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]


class InFlight(ublk.Target):
    """A read that waits for a pipe, in which nothing comes, when the queue is told to go."""

    size = SIZE

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self.buffer, self.cancelled = None, 0
        self.device = StandIn(self, depth=1)

    async def start(self, index):
        self.task = asyncio.ensure_future(self.wait(bytearray(8)))      # beside the requests

    async def wait(self, buffer):
        try:
            await ublk.uring_read(self.reader, buffer, 0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)                   # it may take its time to clean up
            self.cancelled += 1
            raise

    async def read(self, offset, buffer):
        self.buffer = buffer
        os.write(self.device.wake_write, b"!")
        await self.wait(buffer)

    def end(self):
        for fd in self.reader, self.writer:
            os.close(fd)
        self.device.close()


def test_a_queue_that_ends_waits_for_what_the_kernel_still_does():
    target = InFlight()
    queue = NopQueue(target.device)
    queue.call(target.start, 0)
    queue.fetch()
    queue.run()
    queue.wind_up()
    assert target.cancelled == 2 and not queue._operations and queue.answers == []
    queue.close()
    os.write(target.writer, b"late")
    assert os.read(target.reader, 8) == b"late"
    target.end()


def test_memory_that_the_kernel_will_not_give_back_is_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(ublk, "_left_behind", kept)
    monkeypatch.setattr(ublk, "LAST_WORDS", 0.05)
    monkeypatch.setattr(ublk.Queue, "cancel", lambda queue, number: None)   # as if it cannot be cancelled
    target = InFlight()
    queue = NopQueue(target.device)
    queue.call(target.start, 0)
    queue.fetch()
    queue.run()
    queue.wind_up()
    queue.close()
    assert sorted(len(operation.memory) for operation in kept) == [8, 4096]
    target.end()


def test_a_descriptor_that_is_forgotten_may_become_another():
    async def body(_):
        loop, heard = asyncio.get_running_loop(), []
        for turn in range(20):
            reader, writer = os.pipe()
            loop.add_reader(reader, heard.append, turn)
            await asyncio.sleep(0.001)
            loop.remove_reader(reader)
            os.write(writer, b"!")
            os.close(reader)
            os.close(writer)
        await asyncio.sleep(0.01)
        assert heard == []

    assert results_of(body) == [4096]


def test_readiness_is_told_though_the_kernel_takes_nothing_for_a_while():
    async def body(_):
        loop, queue, heard = asyncio.get_running_loop(), ublk._here.queue, asyncio.Event()
        enter, refusals = queue.ring.enter, [True, True, True]
        queue.ring.enter = lambda *words: enter(*words) if words or not refusals else refusals.pop()
        reader, writer = os.pipe()
        loop.add_reader(reader, heard.set)
        os.write(writer, b"!")
        await heard.wait()
        assert refusals == []
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]


def test_an_operation_is_cancelled_though_the_kernel_takes_nothing_for_a_while():
    """Or a handler would go on, and its request end, beside a write that lands when it may."""
    async def body(_):
        loop, queue = asyncio.get_running_loop(), ublk._here.queue
        reader, writer = os.pipe()
        buffer = bytearray(8)
        task = loop.create_task(ublk.uring_read(reader, buffer, 0))
        await asyncio.sleep(0.01)
        assert queue._operations
        enter, queue.ring.enter = queue.ring.enter, lambda *words: None
        for _ in range(ublk.SPARE_SLOTS):
            queue.begin(ublk.Operation(None), opcode=ublk.IORING_OP_NOP)
        loop.call_later(0.01, setattr, queue.ring, "enter", enter)
        task.cancel()
        await asyncio.sleep(0.02)
        await asyncio.wait([task])
        assert task.cancelled()
        os.write(writer, b"12345678")
        assert os.read(reader, 8) == b"12345678" and buffer == bytes(8)
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]


def test_readiness_is_told_as_long_as_it_lasts():
    async def body(_):
        loop, heard = asyncio.get_running_loop(), []
        reader, writer = os.pipe()
        loop.add_reader(reader, lambda: heard.append(os.read(reader, 1)))
        os.write(writer, b"abc")
        while len(heard) < 3:
            await asyncio.sleep(0)
        loop.remove_reader(reader)
        assert b"".join(heard) == b"abc"
        loop.add_writer(writer, heard.append, "room")
        while len(heard) < 5:
            await asyncio.sleep(0)
        assert heard[3:5] == ["room", "room"]
        loop.remove_writer(writer)
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]


class LeavesBehind(ublk.Target):
    """Its first request is plain; the third fails, and what it has begun goes on when the fourth has come."""

    size, turn, start = SIZE, 0, async_start

    def __init__(self, begin):
        self.begin, (self.reader, self.writer) = begin, os.pipe()

    def read(self, offset, buffer):
        self.turn += 1
        return self.later(buffer) if self.turn > 1 else None

    async def later(self, buffer):
        if self.turn == 3:
            self.where = ublk.address_of(buffer)
            self.left = asyncio.ensure_future(self.begin(self.reader, buffer))
            await asyncio.sleep(0)
            raise OSError(errno.EIO, "part of it")
        if self.turn == 4:
            os.write(self.writer, b"late")
            assert await self.left == 4
            self.seen = bytes(buffer)


@pytest.mark.parametrize("begin", [lambda fd, buffer: ublk.uring_read(fd, buffer, 0),
                                   lambda fd, buffer: asyncio.get_running_loop().run_in_executor(
                                       None, os.readv, fd, [buffer])], ids=["ring", "thread"])
def test_what_a_request_leaves_behind_does_nothing_to_the_next(begin):
    target = LeavesBehind(begin)
    queue = serve(target, depth=1, rounds=4)
    assert queue.answers == [(0, 4096), (0, 4096), (0, -errno.EIO), (0, 4096)]
    assert target.seen == bytes(4096) and target.where != queue.path.base
    os.close(target.reader)
    os.close(target.writer)


class Reconnects(ublk.Target):
    """Each request has another pipe take the place of a ready one; the last waits to hear of its own."""

    size = SIZE
    turns = 3

    async def start(self, index):
        self.connect()

    def connect(self):
        self.pipe, self.heard = os.pipe(), asyncio.Event()
        asyncio.get_running_loop().add_reader(self.pipe[0], self.heard.set)
        os.write(self.pipe[1], b"!")

    def disconnect(self):
        asyncio.get_running_loop().remove_reader(self.pipe[0])
        for fd in self.pipe:
            os.close(fd)

    def read(self, offset, buffer):
        self.disconnect()
        self.connect()
        self.turns -= 1
        return None if self.turns else asyncio.wait_for(self.heard.wait(), 10)


def test_a_descriptor_that_takes_the_place_of_a_ready_one_is_heard():
    target = Reconnects()
    assert serve(target, depth=1, rounds=3).answers == [(0, 4096)] * 3
    for fd in target.pipe:
        os.close(fd)


def test_what_is_registered_as_an_object_is_known_by_it():
    async def body(_):
        loop, heard, (near, far) = asyncio.get_running_loop(), [], socket.socketpair()
        loop.add_reader(near, heard.append, "first")
        loop.add_reader(near, heard.append, "second")
        far.send(b"!")
        while not heard:
            await asyncio.sleep(0)
        assert loop.remove_reader(near) and not loop.remove_reader(near)
        assert set(heard) == {"second"}
        near.close()
        far.close()

    assert results_of(body) == [4096]


def test_a_callback_that_fails_without_end_says_so_once(capfd):
    async def body(_):
        loop, (reader, writer), calls = asyncio.get_running_loop(), os.pipe(), []
        os.write(writer, b"!")
        loop.add_reader(reader, lambda: calls.append(1) or 1 / 0)
        while len(calls) < 50:
            await asyncio.sleep(0)
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)

    assert results_of(body) == [4096]
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_task_beside_the_requests_that_fails_says_so(capfd):
    async def fail():
        raise OSError(errno.ENOMEDIUM, "the reason why")

    async def read(target, offset, buffer):
        target.task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        target.task = None

    assert serve(target_of(read=read), depth=1).answers == [(0, 4096)]
    gc.collect()                        # for asyncio tells of it when the task is gone
    assert "the reason why" in capfd.readouterr().err


def test_a_task_beside_the_requests_ends_no_server(capfd):
    async def leave():
        sys.exit(3)

    async def start(target, index):
        target.task = asyncio.ensure_future(leave())
        await asyncio.sleep(0.001)

    async def read(target, offset, buffer):
        await asyncio.ensure_future(leave())

    answers = serve(target_of(start=start, read=read), depth=2).answers
    assert sorted(answers) == [(0, -errno.EIO), (1, -errno.EIO)]
    assert "SystemExit: 3" in capfd.readouterr().err


def test_a_loop_that_a_target_stops_goes_on():
    async def read(target, offset, buffer):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)

    assert sorted(serve(target_of(read=read), rounds=3).answers) == sorted([(t, 4096) for t in range(4)] * 3)


def test_a_child_that_is_forked_before_the_loop_runs_takes_nothing_out_of_its_epoll():
    """Or nothing would wake the loop for what a thread has done, and a request would wait for ever."""
    def start(target, index):
        epoll = Path("/proc/self/fdinfo", str(ublk._here.queue.loop._selector.fileno()))
        before = epoll.read_text()
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        assert "tfd" in before and epoll.read_text() == before

    async def read(target, offset, buffer):
        await asyncio.to_thread(bool)
    serve(target_of(start=start, read=read))


def test_what_there_was_no_thread_for_is_not_done_later():
    """A discard that had failed was done by the first thread there was, to what had been written since."""
    done = []

    async def write(target, offset, buffer):
        threading.stack_size(0 if done else 1 << 60)
        if len(done) == 1:
            done.append("written since")
            return
        done.append("asked for")
        try:
            await asyncio.to_thread(done.append, f"request {len(done)}")
        finally:
            threading.stack_size(0)

    queue = serve(target_of(write=write), rounds=3, depth=1, operation=ublk.UBLK_IO_OP_WRITE)
    assert queue.answers == [(0, -errno.EIO), (0, 4096), (0, 4096)]
    assert done == ["asked for", "written since", "asked for", "request 3"]


def test_a_thread_that_gets_free_does_not_begin_what_is_given_up():
    threads, done = [], []

    def submit(do):
        threads.append(threading.Thread(target=do))
        threads[0].start()
        threads[0].join(0.1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ublk.noted(set(), submit, done.append, "given up")
    threads[0].join()
    assert done == []


def test_a_start_that_is_interrupted_is_seen_to_its_end():
    target, ended = target_of(), []

    async def start(index):
        os.write(target.device.wake_write, b"!")
        try:
            await asyncio.sleep(3600)
        finally:
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
            ended.append(index)

    target.device = StandIn(target, depth=1)
    queue = NopQueue(target.device)
    queue.call(start, 0)
    assert ended == [] and queue.leaving
    queue.wind_up()
    queue.close()
    target.device.close()
    assert ended == [0]


def test_a_generator_that_does_not_end_keeps_no_queue(monkeypatch):
    monkeypatch.setattr(ublk, "LAST_WORDS", 0.05)
    ended = []

    async def numbers():
        try:
            yield 1
        finally:
            await asyncio.sleep(5)
            ended.append(True)

    async def read(target, offset, buffer):
        target.numbers = numbers()
        await target.numbers.__anext__()

    assert serve(target_of(read=read), depth=1).answers == [(0, 4096)] and ended == []


def test_a_handler_that_fails_fails_its_request_alone(capfd):
    async def read(target, offset, buffer):
        await asyncio.sleep(0)
        if offset == 0:
            raise OSError(errno.ENOSPC, "full")
        if offset == 4096:
            raise SystemExit(3)

    answers = serve(target_of(read=read)).answers
    assert sorted(answers) == [(0, -errno.ENOSPC), (1, -errno.EIO), (2, 4096), (3, 4096)]


def test_a_report_of_zones_may_be_a_coroutine():
    async def report(target, offset, count):
        await asyncio.sleep(0)
        return [ublk.blk_zone(start=number) for number in range(count)]

    target = target_of(report_zones=report)
    queue = serve(target, depth=1, operation=ublk.UBLK_IO_OP_REPORT_ZONES)
    assert queue.answers == [(0, 4096)]


# ---- with a driver -------------------------------------------------------------------------------

class OverTLS(ublk.Target):
    """What a server keeps, over one encrypted stream."""

    size = SIZE

    def __init__(self, port, context):
        self.port, self.context = port, context

    async def start(self, index):
        self.turn = asyncio.Lock()
        self.reader, self.writer = await asyncio.open_connection("localhost", self.port, ssl=self.context)

    async def ask(self, offset, length, data=b""):
        async with self.turn:
            self.writer.write(struct.pack("=QI?", offset, length, bool(data)) + data)
            return await self.reader.readexactly(0 if data else length)

    async def read(self, offset, buffer):
        buffer[:] = await self.ask(offset, len(buffer))

    async def write(self, offset, buffer):
        await self.ask(offset, len(buffer), bytes(buffer))

    async def close(self):
        self.writer.close()


class Keeper(socketserver.StreamRequestHandler):
    """The server at the other end."""

    data = bytearray(SIZE)

    def handle(self):
        while head := self.rfile.read(13):
            offset, length, write = struct.unpack("=QI?", head)
            if write:
                self.data[offset:offset + length] = self.rfile.read(length)
            else:
                self.wfile.write(self.data[offset:offset + length])


@pytest.fixture
def keeper(tmp_path):
    """The port of a server that speaks TLS, and what trusts it."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    sh("openssl", "req", "-x509", *kind, *name, "-keyout", key, "-out", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socketserver.TCPServer(("localhost", 0), Keeper) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], ssl.create_default_context(cafile=certificate)
        server.shutdown()
        thread.join()


@kernel
def test_a_disk_behind_an_encrypted_stream_carries_fio_verify(keeper):
    with ublk.Device(OverTLS(*keeper), partition_scan=False) as disk:
        fio_verify(disk.path)


class InThreads(ublk.Target):
    """A file, by calls that block, in threads beside the loop."""

    size = SIZE

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR)

    async def read(self, offset, buffer):
        return await asyncio.to_thread(os.preadv, self.fd, [buffer], offset)

    async def write(self, offset, buffer):
        return await asyncio.to_thread(os.pwrite, self.fd, buffer, offset)

    def close(self):
        os.close(self.fd)


@kernel
def test_a_server_ends_though_a_thread_of_its_target_does_not(tmp_path):
    path = target_file(tmp_path, """
        import threading
        ublk.Device.stop.__defaults__ = (0.5,)              # in place of STOP_TIMEOUT
        class Stuck(ublk.Target):
            size = 1 << 20
            async def read(self, offset, buffer):
                print("stuck", flush=True)
                await asyncio.to_thread(threading.Event().wait)
        """)

    def read(path):
        with opened(path) as fd:
            error_of(read_at, fd, 0, 4096)

    with Forked(path, "--no-partition-scan", script=UBLK) as disk:
        client = threading.Thread(target=read, args=(disk.path,))
        client.start()
        until(lambda: "stuck" in disk.said(), "a request")
        assert disk.kill(signal.SIGTERM) == 0
        client.join()


@kernel
def test_a_disk_behind_threads_carries_fio_verify(backing):
    with ublk.Device(InThreads(backing), partition_scan=False) as disk:
        fio_verify(disk.path)


class InTurn(Ram):
    """Memory that one request at a time may use, in the order of their coming."""

    waiting = most = 0

    async def start(self, index):
        self.turn = asyncio.Lock()

    async def use(self, method, offset, buffer):
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        async with self.turn:
            await asyncio.sleep(0)
            method(offset, buffer)
        self.waiting -= 1

    async def read(self, offset, buffer):
        await self.use(super().read, offset, buffer)

    async def write(self, offset, buffer):
        await self.use(super().write, offset, buffer)


@kernel
def test_a_fair_lock_over_hundreds_of_requests_carries_fio_verify():
    target = InTurn(SIZE)
    with ublk.Device(target, depth=512, partition_scan=False) as disk:
        # Any other scheduler keeps what is more than 256 to itself.
        Path(f"/sys/block/{Path(disk.path).name}/queue/scheduler").write_text("none")
        fio_verify(disk.path, jobs=[("4k", f"{4 * number}m", "2m") for number in range(4)])
    assert target.most >= 400


@kernel
def test_handlers_that_wait_for_each_other_leave_no_client_waiting():
    # The scheduler holds back what is more than 256, and makes neighbours one request.
    target = Chain(200, apart=8192)
    with ublk.Device(target, depth=512, partition_scan=False) as disk, opened(disk.path) as fd:
        found = []

        def client(number):
            found.append(len(read_at(fd, 8192 * number, 4096)))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(200)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
        assert found == [4096] * 200


@kernel
@since("7.0")
def test_a_queue_with_batches_hears_of_all_requests_though_there_is_no_room_for_their_news(monkeypatch):
    """A buffer that the kernel took for news that it could not tell was never given back."""
    monkeypatch.setattr(ublk.BatchQueue, "BUFFERS", 2)
    zero = os.open("/dev/zero", os.O_RDWR)

    async def read(target, offset, buffer):     # as many operations as fill the ring's completions
        await asyncio.gather(*(ublk.uring_read(zero, bytearray(1), 0) for _ in range(400)))

    def client(fd, number):
        found.append(sum(len(read_at(fd, 4096 * number, 4096)) for _ in range(20)))
    found = []
    disk = ublk.Device(target_of(read=read), depth=4, batch=True, partition_scan=False)
    with disk, opened(disk.path, os.O_RDONLY) as fd:
        clients = [threading.Thread(target=client, args=(fd, number)) for number in range(4)]
        for thread in clients:
            thread.start()
        until(lambda: found == [20 * 4096] * 4)
        for thread in clients:
            thread.join()
    os.close(zero)


@kernel
def test_each_queue_has_a_loop_of_its_own():
    class Counts(ublk.Target):
        size = SIZE
        loops = {}
        closed = []

        async def start(self, index):
            self.loops[index] = asyncio.get_running_loop()

        async def read(self, offset, buffer):
            assert asyncio.get_running_loop() in self.loops.values()

        async def write(self, offset, buffer):
            await asyncio.sleep(0.001)

        async def close(self):
            self.closed.append(asyncio.get_running_loop())

    target = Counts()
    with ublk.Device(target, queues=2, partition_scan=False) as disk, opened(disk.path) as fd:
        count = disk.info.nr_hw_queues
        assert len(set(target.loops.values())) == count
        write_at(fd, 0, bytes(65536))
        assert len(read_at(fd, 0, 65536)) == 65536
    assert len(target.closed) == 1 and target.closed[0] in target.loops.values()


# ---- what a handler returns ------------------------------------------------------------------------

def answers_of(operation=ublk.UBLK_IO_OP_READ, **methods):
    """Return the result of one request that a target with these methods serves."""
    return serve(target_of(start=async_start, **methods), depth=1, operation=operation).answers[0][1]


class Later:
    """An awaitable that is no coroutine."""

    ended = False

    def __await__(self):
        yield from asyncio.sleep(0.02).__await__()
        self.ended = True


FLUSH, WRITE = ublk.UBLK_IO_OP_FLUSH, ublk.UBLK_IO_OP_WRITE


@pytest.mark.parametrize("operation, name, length", [
    (FLUSH, "flush", 0), (ublk.UBLK_IO_OP_DISCARD, "discard", 0), (WRITE, "write", 4096)])
def test_a_request_ends_after_the_awaitable_that_its_handler_returned(operation, name, length):
    waits = Later()
    assert answers_of(operation, **{name: lambda *_: waits}) == length and waits.ended


@pytest.mark.parametrize("outcome", [-errno.ENOSPC, False])
def test_a_negative_number_is_no_success(outcome, capfd, monkeypatch):
    monkeypatch.setattr(ublk, "_bugs", {})          # a bug is shown once a line
    assert answers_of(FLUSH, flush=lambda _: outcome) == -errno.EIO
    assert "TypeError" in capfd.readouterr().err


def test_a_future_of_a_pool_is_awaited():
    def flush(target):
        future = target.future = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.05)
        return future

    target = target_of(flush=flush, start=async_start)
    assert serve(target, depth=1, operation=FLUSH).answers == [(0, 0)] and target.future.done()


def test_a_flush_that_cannot_make_a_file_durable_fails_twice(targets, tmp_path):
    """What it hears of, and but once, may be another client's, who flushes next."""
    path, = files(tmp_path, 1, SIZE)
    disk = targets.Loop(path)
    nowhere = os.open(path, os.O_PATH)
    os.dup2(nowhere, disk.fd, inheritable=False)
    for result in -errno.EBADF, -errno.EIO, -errno.EBADF:
        assert serve(disk, depth=1, operation=FLUSH).answers == [(0, result)]
    os.close(nowhere)
    disk.close()


@pytest.mark.parametrize("kind", ["Loop", "Stripe", "Cow"])
def test_durable_writes_to_a_file_hear_of_one_loss_together(targets, tmp_path, kind):
    """The kernel tells whoever asks first, and once. And so does the next flush, of what others have lost."""
    async def tells_once():
        calls.append(1)
        await asyncio.sleep(0.05)
        if len(calls) == 1:
            raise OSError(errno.EIO, "lost")
    calls = []
    paths = files(tmp_path, 1, SIZE)
    if kind == "Cow":
        paths.append(str(tmp_path / "overlay"))
    disk = getattr(targets, kind)(*paths)
    loop = {"Loop": disk, "Stripe": getattr(disk, "legs", [0])[0], "Cow": getattr(disk, "top", 0)}[kind]
    loop.sync.flush = tells_once
    durable = WRITE | ublk.UBLK_IO_F_FUA
    answers = serve(disk, depth=4, operation=durable).answers
    assert [result for _, result in answers] == 4 * [-errno.EIO]
    later = [serve(disk, depth=1, operation=operation).answers for operation in (durable, FLUSH, FLUSH)]
    assert later == [[(0, 4096)], [(0, -errno.EIO)], [(0, 0)]]
    disk.close()


def test_what_a_subclass_of_an_overlay_writes_durably_is_not_its_other_writes_too(targets, tmp_path):
    """As where each of them encrypts."""
    class Twice(targets.Cow):
        async def write(self, offset, buffer):
            await super().write(offset + 4096, buffer)

        async def write_fua(self, offset, buffer):
            await super().write_fua(offset + 4096, buffer)

    disk = Twice(*files(tmp_path, 1, SIZE), str(tmp_path / "overlay"))
    for operation in WRITE, WRITE | ublk.UBLK_IO_F_FUA:
        assert serve(disk, depth=1, operation=operation).answers == [(0, 4096)]
        assert [run for run in disk.runs(0, SIZE) if run[0]] == [(True, 4096, 4096)]
    disk.close()


def behind(kind, directory):
    """Make a disk of a kind whose bytes lie 4 KiB further on in a file full of x; return it and that."""
    class Behind(kind):
        def map(self, offset, length, write):
            fd, position = super().map(offset, length, write)
            return fd, position + 4096

    path, = files(directory, 1, SIZE)
    Path(path).write_bytes(b"x" * SIZE)
    return Behind(path), path


@pytest.mark.parametrize("kind", ["Loop", "Stripe"])
def test_a_durable_write_goes_where_a_subclass_maps_it(targets, tmp_path, kind):
    disk, path = behind(getattr(targets, kind), tmp_path)
    assert not ublk.serves(disk, "write_fua")           # which syncs the disk's own file, and no other
    assert serve(disk, depth=1, operation=WRITE | ublk.UBLK_IO_F_FUA).answers == [(0, 4096)]
    disk.close()
    assert Path(path).read_bytes()[:12288] == b"x" * 4096 + bytes(4096) + b"x" * 4096


ZEROES, DISCARD = ublk.UBLK_IO_OP_WRITE_ZEROES, ublk.UBLK_IO_OP_DISCARD


@pytest.mark.parametrize("kind", ["Loop", "Stripe"])
def test_no_zeroes_or_discards_of_a_base_go_around_what_a_subclass_maps(targets, tmp_path, kind):
    """Nor where it maps the first of their blocks: the kernel may ask for more than is there."""
    disk, path = behind(getattr(targets, kind), tmp_path)
    answers = [serve(disk, depth=1, operation=operation).answers for operation in (ZEROES, DISCARD)]
    assert answers == 2 * [[(0, -errno.EOPNOTSUPP)]]
    disk.close()
    assert Path(path).read_bytes()[:12288] == b"x" * 12288


def test_zeroes_that_a_subclass_has_its_base_write_are_where_it_maps_them(targets, tmp_path):
    disk, path = behind(targets.Loop, tmp_path)
    disk.write_zeroes = disk.write_zeroes           # as one of its own would
    assert serve(disk, depth=1, operation=ZEROES).answers == [(0, 0)]
    disk.close()
    assert Path(path).read_bytes()[:12288] == b"x" * 4096 + bytes(4096) + b"x" * 4096


@kernel
def test_zeroes_stay_in_the_chunks_that_a_subclass_maps(targets, tmp_path):
    """Up to Linux 6.10 those cross a boundary that reads and writes do not."""
    class Swapped(targets.Loop):
        boundary = 65536

        def map(self, offset, length, write):
            return self.fd, offset ^ 65536

    path, = files(tmp_path, 1, SIZE)
    Path(path).write_bytes(b"x" * SIZE)
    with ublk.Device(Swapped(path), partition_scan=False) as disk:
        sh("blkdiscard", "-z", "-l", 3 * 65536, disk.path)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4 * 65536) == bytes(3 * 65536) + b"x" * 65536




@pytest.mark.parametrize("promise", ["a text", object(), concurrent.futures.Future(), (_ for _ in "")],
                         ids=lambda promise: type(promise).__name__)
@pytest.mark.parametrize("operation, name", [(FLUSH, "flush"), (WRITE, "write")])
def test_what_no_loop_can_await_is_no_success(promise, operation, name, capfd, monkeypatch):
    monkeypatch.setattr(ublk, "_bugs", {})          # a bug is shown once a line
    assert answers_of(operation, **{name: lambda *_: promise}) == -errno.EIO
    assert "TypeError" in capfd.readouterr().err


@pytest.mark.parametrize("number", ["two", 0, -5, 4096, 1 << 70, None, 2.5], ids=repr)
def test_an_error_without_a_number_of_the_kernels_is_eio(number, capfd):
    def read(target, offset, buffer):
        raise OSError(number, "something")
    assert answers_of(read=read) == -errno.EIO


@pytest.mark.parametrize("name", ublk.PLAIN_METHODS)
def test_a_method_that_must_be_plain_is_refused_as_a_coroutine(name):
    async def method(*_):
        pass
    target = target_of(**{name: method})
    assert f"{name}() of a target: it is an async def" in message(lambda: ublk.Device(target))
