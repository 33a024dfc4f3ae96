# SPDX-License-Identifier: MIT
"""Companion: disks of other machines."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import ublk
from tests.support import (
    CONTINUE,
    Fio,
    Forked,
    assert_fails,
    carries,
    completed,
    digest,
    error_of,
    fio_verify,
    kernel,
    needs,
    opened,
    read_at,
    recovered,
    sh,
    since,
    until,
    write_at,
)


def nbd_uri(socket, export=""):
    return f"nbd+unix:///{export}?socket={socket}"


def free_port():
    """Return a TCP port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


ACCEPTING = 0x10000         # __SO_ACCEPTCON of linux/net.h, in the flags of /proc/net/unix

LISTENING = "0A"            # TCP_LISTEN of net/tcp_states.h, in the states of /proc/net/tcp


def sockets_of(family):
    """Return the rows of /proc/net/unix or /proc/net/tcp, without the heading, in words."""
    return [row.split() for row in Path("/proc/net", family).read_text().splitlines()[1:]]


@contextmanager
def nbd_server(*words):
    """Run an NBD server's program; yield it once the last word, its socket or port, can be connected to."""
    needs(words[0])
    where = str(words[-1])
    words = [word if word != "AT" else where for word in words[:-1]]
    process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)

    def listens():
        assert process.poll() is None, process.stderr.read()
        if not where.isdigit():                 # the path is there before one can connect to it
            return any(words[-1] == where and int(words[3], 16) & ACCEPTING for words in sockets_of("unix"))
        return any(words[1] == f"0100007F:{int(where):04X}" and words[3] == LISTENING
                   for words in sockets_of("tcp"))
    try:
        until(listens, "the NBD server")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        if not where.isdigit() and os.path.exists(where):
            os.unlink(where)


def nbdkit(socket, *words):
    """Run nbdkit at a socket."""
    return nbd_server("nbdkit", "-f", "--unix", "AT", *words, socket)


@pytest.mark.parametrize("uri, address, export", [
    ("nbd://host", ("host", 10809), ""), ("nbd://host:99/a%20b", ("host", 99), "a b"),
    ("nbd://[::1]:5/x/y", ("::1", 5), "x/y"), ("nbd+unix:///e?socket=/a/b", "/a/b", "e"),
    ("nbd+unix:///?socket=/a%20b+c", "/a b+c", ""), ("nbds://host/e", ("host", 10809), "e")])
def test_nbd_addresses(targets, uri, address, export):
    assert targets.nbd_address(uri) == (address, export)


@pytest.mark.parametrize("uri, says", [
    ("", "not an NBD address"), ("host", "not an NBD address"), ("nbd://", "not an NBD address"),
    ("http://host/", "not an NBD address"), ("nbd+unix:///x", "not an NBD address"),
    (" nbds://localhost/", "not an NBD address"), ("nb\tds://localhost/", "not an NBD address"),
    ("nbd://host:99999/", "ort"), ("nbd://host:x/", "ort"), ("nbd://[::1/", "IPv6"),
    ("nbd://.x/", "label"),
    ("nbd+unix:///?socket=/no/such", "2 ENOENT"), (nbd_uri("x" * 200), "too long")])
def test_nbd_addresses_that_are_none(run, uri, says):
    assert_fails(run("nbd", uri), 1, says)


def test_nbd_nobody_listens(run):
    assert_fails(run("nbd", f"nbd://127.0.0.1:{free_port()}"), 1, "refused", errno.ECONNREFUSED)
    assert run("nbd").status == 2
    assert_fails(run("nbd", "nbd://x", "--timeout", "soon"), 1, "soon")


def test_nbd_a_server_that_demands_tls(run, here, tmp_path):
    (tmp_path / "psk").write_text("user:0123456789abcdef0123456789abcdef\n")
    with nbdkit(here, "--tls=require", f"--tls-psk={tmp_path / 'psk'}", "memory", "1M"):
        assert_fails(run("nbd", nbd_uri(here)), 1, "the server demands TLS", errno.EINVAL)


def test_nbd_an_export_that_is_not_there(run, here, tmp_path, new_image):
    with nbd_server("qemu-nbd", "-f", "raw", "-x", "mine", "-k", "AT", new_image("1M"), here):
        assert_fails(run("nbd", nbd_uri(here, "other")), 1, "there is no such export", errno.EINVAL)


# ---- hostile servers ------------------------------------------------------------------------------


class Breaking:
    """A connection that its server ends after so many bytes in both directions together."""

    def __init__(self, peer, limit):
        self.peer, self.left = peer, limit

    def sendall(self, data):
        self.peer.sendall(data[:self.left])
        self._spend(len(data))

    def recv(self, count):
        data = self.peer.recv(min(count, self.left))
        self._spend(len(data))
        return data

    def _spend(self, count):
        self.left -= count
        if self.left <= 0:
            raise EOFError


class FakeNbd:
    """An NBD server in a thread, with a disk in memory, that misbehaves as a test wants.

    hello(peer) greets each connection, answer(peer, cookie, data) answers the next request to read
    at SPOT, where udev does not look. Where they are missing it does well. limits are the numbers of bytes
    after which its next connections break.
    """

    SPOT = 340 << 10

    def __init__(self, path, hello=None, answer=None, *, info=(), size=1 << 20, flags=0b1101):
        self.path, self.hello, self.answer = path, hello, answer
        self.info = [struct.pack(">HQH", 0, size, flags), *info]
        self.data, self.connections, self.longest = bytearray(os.urandom(1 << 20)), 0, 0
        self.commands, self.dies_of, self.ignores, self.fails, self.limits = [], None, None, None, iter(())
        self.ranges, self.slow = [], 0          # of zeroes and discards, and how many seconds a byte takes

    def __enter__(self):
        family, address = self.path if isinstance(self.path, tuple) else (socket.AF_UNIX, str(self.path))
        self.listener = socket.socket(family)
        self.listener.bind(address)
        self.listener.listen()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        with suppress(OSError, AttributeError):
            self.peer.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _run(self):
        while True:
            try:
                peer = self.peer = self.listener.accept()[0]
            except OSError:
                return
            with peer:
                self.connections += 1
                limited = Breaking(peer, next(self.limits, sys.maxsize))
                try:
                    (self.hello or self.shake_hands)(limited)
                    self._serve(limited)
                except (OSError, EOFError):
                    pass

    @staticmethod
    def take(peer, count):
        data = b""
        while len(data) < count:
            more = peer.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    @staticmethod
    def reply(option, kind, data=b"", length=0):
        return struct.pack(">QIII", 0x3E889045565A9, option, kind, length or len(data)) + data

    def greet(self, peer):
        peer.sendall(b"NBDMAGICIHAVEOPT\0\1")
        self.take(peer, 4)
        self.option(peer)

    def option(self, peer):
        """Take a request for an option; return its number."""
        _, option, length = struct.unpack(">QII", self.take(peer, 16))
        self.take(peer, length)
        return option

    def shake_hands(self, peer):
        self.greet(peer)
        peer.sendall(b"".join(self.reply(7, 3, info) for info in self.info) + self.reply(7, 1))

    def _serve(self, peer):
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", self.take(peer, 28))
            self.longest = max(self.longest, length if command in (0, 1) else 0)
            self.commands.append(command)
            if command == 1:
                self.data[offset:offset + length] = self.take(peer, length)
            if command in (4, 6):
                self.ranges.append((offset, length))
                time.sleep(length * self.slow)
            if command == self.dies_of:
                self.dies_of = None
                raise EOFError
            if command == self.ignores:
                continue
            if command == self.fails:
                self.fails = None
                peer.sendall(struct.pack(">IIQ", 0x67446698, errno.EIO, cookie))
                continue
            data = self.data[offset:offset + length] if command == 0 else b""
            if self.answer and command == 0 and offset == self.SPOT:
                answer, self.answer = self.answer, None
                answer(peer, cookie, data)
            else:
                peer.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)


def says(data):
    """Make a server's part that is always the same: to say this and close, or with ... to wait."""
    def act(fake, peer, *_):
        for piece in data:
            peer.sendall(piece)
        if data[-1:] == [b""]:
            fake.take(peer, 1 << 30)            # until the client has gone
        raise EOFError
    return act


def drips(fake, peer):
    while True:
        peer.sendall(b"N")
        time.sleep(0.005)


def floods(fake, peer):
    fake.greet(peer)
    while True:
        peer.sendall(fake.reply(7, 3, bytes(60000)))


def greets_with(*data):
    def act(fake, peer):
        fake.greet(peer)
        says(list(data))(fake, peer)
    return act


HOSTILE_GREETINGS = {
    "closes": (says([]), "closed the connection", errno.ECONNRESET),
    "silent": (says([b""]), "", errno.ETIMEDOUT),
    "stops": (says([b"NBDMAGIC", b""]), "", errno.ETIMEDOUT),
    "cut": (says([b"NBDMAGICIHAV"]), "closed the connection", errno.ECONNRESET),
    "web": (says([b"HTTP/1.1 400 Bad Request\r\n\r\n"]), "no NBD server", errno.EINVAL),
    "old": (says([b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(144)]), "old style", errno.EINVAL),
    "huge": (greets_with(FakeNbd.reply(7, 3, length=0xFFFFFFFF)), "protocol", errno.EINVAL),
    "magic": (greets_with(bytes(20)), "protocol", errno.EINVAL),
    "other": (greets_with(FakeNbd.reply(5, 1)), "protocol", errno.EINVAL),
    "short": (greets_with(FakeNbd.reply(7, 3, b"x" * 100)[:50]), "closed the connection", errno.ECONNRESET),
    "no": (greets_with(FakeNbd.reply(7, 1 << 31 | 2, b"go\xff\naway"), b""),
           "refused: go", errno.EINVAL),
    "drips": (drips, "no NBD server", errno.EINVAL),
    "floods": (floods, "", errno.ETIMEDOUT),
}


@pytest.mark.parametrize("name", HOSTILE_GREETINGS)
def test_nbd_hostile_greetings(run, targets, monkeypatch, here, name):
    greet, text, number = HOSTILE_GREETINGS[name]
    if number == errno.ETIMEDOUT:           # the others are to be heard, however busy the machine is
        monkeypatch.setattr(targets, "NBD_HANDSHAKE", 0.5)
    with FakeNbd(here) as fake:
        fake.hello = lambda peer: greet(fake, peer)
        assert_fails(run("nbd", nbd_uri(here)), 1, text, number)


def test_nbd_a_handshake_that_drips_ends_in_time(run, targets, monkeypatch, here):
    """Each byte comes in time, all of them do not."""
    def hello(peer):
        for byte in b"NBDMAGICIHAVEOPT\0\1":
            peer.sendall(bytes([byte]))
            time.sleep(0.05)
        fake.take(peer, 1 << 30)

    monkeypatch.setattr(targets, "NBD_HANDSHAKE", 0.3)
    with FakeNbd(here, hello) as fake:
        assert_fails(run("nbd", nbd_uri(here)), 1, "", errno.ETIMEDOUT)


def test_nbd_a_host_may_have_an_address_that_is_silent(targets, monkeypatch):
    """It took all the time that the server had, again and again, and the next one was never tried."""
    port = free_port()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (f"127.0.0.{number}", port)) for number in (2, 1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    monkeypatch.setattr(targets, "NBD_HANDSHAKE", 0.5)
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(found[0][4], backlog=0))
        while True:                             # until its queue is full
            client = stack.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect(silent.getsockname())
            except socket.timeout:
                break
        stack.enter_context(FakeNbd((socket.AF_INET, found[1][4])))
        assert targets.Nbd(f"nbd://host:{port}").size == 1 << 20


@pytest.mark.parametrize("options, text", [
    ({"size": 0}, "size 0"), ({"size": 511}, "size 511"),
    ({"size": (1 << 64) - 512}, "size 1844674407370955"),
    ({"info": [struct.pack(">HIII", 3, 4096, 4096, 512)]}, "largest request 512"),
    ({"info": [struct.pack(">HIII", 3, 512, 512, 0)]}, "largest request 0")])
def test_nbd_exports_that_cannot_be_disks(run, here, options, text):
    with FakeNbd(here, **options):
        assert_fails(run("nbd", nbd_uri(here)), 1, text, errno.EINVAL)


def simple(cookie, error=0):
    return struct.pack(">IIQ", 0x67446698, error, cookie)


HOSTILE_ANSWERS = {     # made of cookie and data; what the server's user is told
    "magic": (lambda c, d: struct.pack(">IIQ", 1, 0, c), "something else"),
    "cookie": (lambda c, d: simple(c + 1) + d, "something else"),
    "cut": (lambda c, d: simple(c) + d[:-1], "closed the connection"),
    "shutting down": (lambda c, d: simple(c, errno.ESHUTDOWN), "shutting down"),
}


def answers_once(make):
    """Answer and say no more; what is still asked is taken, or its sender would learn of that alone."""
    def answer(peer, cookie, data):
        peer.sendall(make(cookie, data))
        peer.peer.shutdown(socket.SHUT_WR)
        FakeNbd.take(peer, 1 << 30)
    return answer


@kernel
def test_nbd_what_hostile_answers_lead_to_is_a_new_connection(targets, here, capfd):
    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here), timeout="6s")) as disk, opened(disk.path) as fd:
            for name, (make, text) in HOSTILE_ANSWERS.items():
                fake.answer = answers_once(make)
                before = fake.connections
                capfd.readouterr()
                assert read_at(fd, fake.SPOT, 8192) == fake.data[fake.SPOT:][:8192], name
                told = capfd.readouterr().err
                assert told.count("\n") == 1 and "connection lost: " in told and text in told, (name, told)
                assert fake.connections == before + 1, name


@kernel
def test_nbd_errors_of_the_server_reach_the_client(targets, here):
    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk, opened(disk.path) as fd:
            before = fake.connections
            for make, number in ((lambda c: simple(c, errno.ENOSPC), errno.ENOSPC),
                                 (lambda c: simple(c, 0xFFFFFFFF), errno.EIO)):
                fake.answer = lambda peer, cookie, data, make=make: peer.sendall(make(cookie))
                assert error_of(read_at, fd, fake.SPOT, 4096) == number
            assert read_at(fd, fake.SPOT, 4096) == fake.data[fake.SPOT:][:4096]
            assert fake.connections == before


@kernel
def test_nbd_a_server_that_never_answers_fails_the_requests_in_time(targets, here, capfd, monkeypatch):
    monkeypatch.setattr(targets, "NBD_HANDSHAKE", 0.3)
    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here), timeout="1s")) as disk, opened(disk.path) as fd:
            fake.hello = lambda peer: FakeNbd.take(peer, 1 << 30)
            fake.answer = says([b""]).__get__(fake)
            assert error_of(read_at, fd, fake.SPOT, 4096) == errno.ETIMEDOUT
            assert "the server does not answer" in capfd.readouterr().err
            fake.hello = None
            assert read_at(fd, fake.SPOT, 4096) == fake.data[fake.SPOT:][:4096]


@kernel
def test_nbd_an_export_that_became_smaller_is_not_written_to(targets, here):
    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here), timeout="1s")) as disk, opened(disk.path) as fd:
            fake.info = [struct.pack(">HQH", 0, 1 << 19, 0b1101)]
            fake.answer, before = says([b""]).__get__(fake), fake.data[:]
            assert error_of(read_at, fd, fake.SPOT, 4096) == errno.ETIMEDOUT
            assert error_of(write_at, fd, 0, b"x" * 4096) == errno.ETIMEDOUT
            assert fake.data == before


@kernel
def test_nbd_no_request_is_larger_than_the_server_takes(targets, here):
    data = os.urandom(100 << 10)
    with FakeNbd(here, info=[struct.pack(">HIII", 3, 512, 4096, 8192)]) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk, opened(disk.path) as fd:
            write_at(fd, fake.SPOT, data)
            assert read_at(fd, fake.SPOT, len(data)) == data == fake.data[fake.SPOT:][:len(data)]
    assert fake.longest == 8192


def test_nbd_serves_with_one_queue(targets, here):
    with FakeNbd(here):
        target = targets.Nbd(nbd_uri(here))
        with pytest.raises(ublk.UblkError, match="use one queue"):
            asyncio.run(target.start(1))


# ---- connections that are lost ----------------------------------------------------------------------


READ, WRITE, _, FLUSH = range(4)
PAGE = memoryview(b"x" * 4096)


def served(target, work):
    """Start a target in a loop of asyncio; return what work() returns there."""
    async def run():
        await target.start(0)
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            for task in target.tasks:
                task.cancel()
            await asyncio.wait(target.tasks)
    return asyncio.run(run())


async def errno_of(coroutine):
    """Return the errno a coroutine fails with, or 0."""
    try:
        await coroutine
    except OSError as error:
        return error.errno
    return 0


async def flush_under_way(target, fake):
    """Begin a flush that is not answered; return it once the server has heard of it."""
    fake.ignores = FLUSH
    fake.commands.clear()
    flush = asyncio.ensure_future(target.flush())
    while FLUSH not in fake.commands:
        await asyncio.sleep(0.01)
    return flush


def test_nbd_a_forked_child_does_not_keep_the_connection(targets, here):
    """Its server would wait for the end of that child, and some take one client at a time."""
    async def fork():
        number = target.connection.socket.fileno()
        child = os.fork()
        if child == 0:
            target.disown()
            os._exit(os.path.exists(f"/proc/self/fd/{number}"))
        return os.waitpid(child, 0)[1]
    with FakeNbd(here):
        target = targets.Nbd(nbd_uri(here))
        assert served(target, fork) == 0


@pytest.mark.parametrize("dies_of", [READ, FLUSH])
def test_nbd_what_was_not_flushed_when_a_connection_is_lost_fails_one_flush(targets, here, capfd, dies_of):
    """Beside one that was under way."""
    async def work():
        await target.write(0, PAGE)
        assert await errno_of(target.flush()) == 0
        await target.write(0, PAGE)
        fake.dies_of = dies_of
        if dies_of == READ:
            await target.read(0, bytearray(4096))
        else:
            assert await errno_of(target.flush()) == errno.EIO
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "what was not flushed may be gone: the next flush fails" in told


def test_nbd_a_flush_that_was_given_up_tells_nobody_what_was_lost(targets, here):
    async def work():
        await target.write(0, PAGE)
        flush = await flush_under_way(target, fake)
        flush.cancel()
        fake.ignores, fake.dies_of = None, READ
        await target.read(0, bytearray(4096))
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]


def test_nbd_a_flush_tells_nothing_of_what_was_acknowledged_after_it_began(targets, here):
    """That is somebody else's, whose flush comes next."""
    async def work():
        flush = await flush_under_way(target, fake)
        await target.write(0, PAGE)
        fake.ignores, fake.dies_of = None, READ
        await target.read(0, bytearray(4096))
        return [await errno_of(call) for call in (flush, target.flush(), target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO, 0]


@pytest.mark.parametrize("name", ["flush", "write_fua"])
def test_nbd_a_flush_that_the_server_failed_fails_the_next_one_too(targets, here, name):
    """Another client waits for that one meanwhile; a server may know but once of what it has lost."""
    async def work():
        await target.write(0, PAGE)
        if name == "flush":
            fake.fails, first = FLUSH, target.flush()
        else:
            fake.fails, first = WRITE, target.write_fua(4096, PAGE)
        return [await errno_of(change) for change in (first, target.flush(), target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO, 0]


def test_nbd_a_flush_fails_where_a_durable_write_has_heard_of_a_loss_meanwhile(targets, here):
    """It may be another client's, and well for the server, who has told what it knew."""
    async def work():
        await target.write(0, PAGE)
        flush = await flush_under_way(target, fake)
        cookie, = target.pending
        fake.ignores, fake.fails = None, WRITE
        failed = await errno_of(target.write_fua(4096, PAGE))
        fake.peer.sendall(simple(cookie))
        return [failed, *[await errno_of(call) for call in (flush, target.flush(), target.flush())]]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO, errno.EIO, 0]


async def flush_answered_first(target, fake):
    """Begin a durable write and a flush of something; return both once only the flush has its reply."""
    await target.write(0, PAGE)
    fake.ignores = WRITE
    durable = asyncio.ensure_future(target.write_fua(4096, PAGE))
    flush = asyncio.ensure_future(target.flush())
    while len(target.pending) != 1:
        await asyncio.sleep(0.01)
    return durable, flush


def test_nbd_a_flush_waits_for_a_durable_write_that_may_have_heard_of_a_loss(targets, here):
    """The server told that one, and answers the flush first."""
    async def work():
        durable, flush = await flush_answered_first(target, fake)
        cookie, = target.pending
        fake.peer.sendall(simple(cookie, errno.EIO))
        return [await errno_of(call) for call in (durable, flush, target.flush(), target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO, errno.EIO, 0]


@pytest.mark.parametrize("name", ["flush", "write_fua"])
def test_nbd_a_write_that_was_lost_before_its_reply_fails_a_flush(targets, here, name):
    """The server told another client, as nothing was acknowledged that was not durable."""
    async def work():
        fake.ignores = WRITE
        write = asyncio.ensure_future(target.write(0, PAGE))
        while WRITE not in fake.commands:
            await asyncio.sleep(0.01)
        cookie, = target.pending
        fake.ignores, fake.fails = None, FLUSH if name == "flush" else WRITE
        change = target.flush() if name == "flush" else target.write_fua(4096, PAGE)
        failed = [await errno_of(call) for call in (change, target.flush())]
        fake.peer.sendall(simple(cookie))
        return failed + [await errno_of(call) for call in (write, target.flush(), target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO, 0, errno.EIO, 0]


async def two_durable_writes(target, fake):
    """Begin two that are not answered; return them, and their cookies."""
    fake.ignores = WRITE
    writes = [asyncio.ensure_future(target.write_fua(at, PAGE)) for at in (0, 4096)]
    while fake.commands.count(WRITE) < 2:
        await asyncio.sleep(0.01)
    return writes, list(target.pending)


@pytest.mark.parametrize("hears", [0, 1])
def test_nbd_a_durable_write_fails_where_one_beside_it_has_heard_of_a_loss(targets, here, hears):
    """It may be the one that was lost, and well for the server, whichever it answers first."""
    async def work():
        writes, cookies = await two_durable_writes(target, fake)
        for number, cookie in enumerate(cookies):
            fake.peer.sendall(simple(cookie, errno.EIO if number == hears else 0))
        return [await errno_of(write) for write in writes]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO]


def test_nbd_a_durable_write_is_done_again_where_one_beside_it_lost_its_reply(targets, here):
    """That could have told of a loss of the other one, too."""
    async def work():
        writes, cookies = await two_durable_writes(target, fake)
        fake.peer.sendall(simple(cookies[0]))
        while len(target.pending) > 1:
            await asyncio.sleep(0.01)
        fake.ignores = None
        fake.peer.shutdown(socket.SHUT_RDWR)
        return [await errno_of(write) for write in writes]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [0, 0] and fake.commands.count(WRITE) == 4


def test_nbd_a_flush_fails_where_a_durable_write_beside_it_lost_its_reply(targets, here):
    """That could have told of what the flush was for."""
    async def work():
        durable, flush = await flush_answered_first(target, fake)
        fake.ignores = None
        fake.peer.shutdown(socket.SHUT_RDWR)
        return [await errno_of(call) for call in (durable, flush, target.flush(), target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [0, errno.EIO, errno.EIO, 0]


@pytest.mark.parametrize("change", ["write_fua", "flush"])
def test_nbd_what_was_durable_when_a_connection_is_lost_fails_nothing(targets, here, capfd, change):
    async def work():
        if change == "flush":
            await target.write(0, PAGE)
            await target.flush()
        else:
            await target.write_fua(0, PAGE)
        fake.dies_of = READ
        await target.read(0, bytearray(4096))
        await target.flush()

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        served(target, work)
    assert "flushed" not in capfd.readouterr().err


@pytest.mark.parametrize("fate", [None, "dies_of", "fails"])
def test_nbd_what_an_earlier_server_of_the_disk_had_not_flushed_is_durable_or_a_flush_fails(
        targets, here, fate):
    """Were it the start that fails, the next one would go well, and no client hear of it."""
    async def work():
        assert FLUSH in fake.commands
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here) as fake:
        if fate:
            setattr(fake, fate, FLUSH)
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO if fate else 0, 0]


def test_nbd_a_flush_makes_durable_what_was_done_when_it_was_asked_for(targets, here):
    """Of a write that ends while a flush is under way nobody knows."""
    async def work():
        flush = await flush_under_way(target, fake)
        await target.write(0, PAGE)
        request, = target.pending.values()
        target._end(request, 0)                 # as if the answer had come now
        await flush
        fake.ignores, fake.dies_of = None, READ
        await target.read(0, bytearray(4096))
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]


def test_nbd_a_write_that_a_silent_server_was_told_is_never_sent_again(targets, here):
    async def work():
        fake.ignores = WRITE
        failed = await errno_of(target.write(0, PAGE))
        fake.ignores = None
        await target.read(0, bytearray(4096))
        return failed

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == errno.ETIMEDOUT
        assert fake.commands.count(WRITE) == 1


def test_nbd_a_server_has_the_whole_time_it_is_given(targets, here):
    def late(peer, cookie, data):
        time.sleep(2.4)
        peer.sendall(simple(cookie) + data)

    async def work():
        buffer = bytearray(4096)
        await target.read(FakeNbd.SPOT, memoryview(buffer))
        return buffer

    with FakeNbd(here, answer=late) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="3s")
        assert served(target, work) == fake.data[fake.SPOT:][:4096]
        assert fake.commands.count(READ) == 1


@pytest.mark.parametrize("name", ["write_zeroes", "discard"])
def test_nbd_a_server_that_zeroes_slowly_has_the_whole_time_for_each_part(targets, here, name):
    """The kernel asks for much at once, as of `blkdiscard --zeroout`, and some have to write all of it."""
    async def work():
        clear = getattr(target, name)
        calls = [clear(number << 27, 128 << 20) for number in range(7)] + [clear(1 << 20, 16 << 20)]
        return {await error for error in [asyncio.ensure_future(errno_of(call)) for call in calls]}

    with FakeNbd(here, size=1 << 30, flags=0b1101101) as fake:
        target, fake.slow = targets.Nbd(nbd_uri(here), timeout="1s"), 2 / (1 << 30)
        assert served(target, work) == {0}
        cut = {(1 << 20, 7 << 20), (16 << 20, 1 << 20)}
        assert {each for each in fake.ranges if each[1] != 8 << 20} == cut


def test_nbd_who_was_stopped_for_long_takes_the_answers_that_came_meanwhile(targets, here):
    async def work():
        calls = [target.read(0, bytearray(256 << 10)) for _ in range(8)] + [target.write(0, PAGE)]
        answers = [asyncio.ensure_future(errno_of(call)) for call in calls]
        await asyncio.sleep(0)
        time.sleep(1.5)
        return {await answer for answer in answers}

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="1s")
        assert served(target, work) == {0} and fake.commands.count(WRITE) == 1


def test_nbd_after_what_a_server_may_still_do_it_is_told_to_change_nothing_more(targets, here):
    """For it could do that last."""
    async def work():
        fake.ignores = WRITE
        first = await errno_of(target.write(0, PAGE))
        fake.ignores = None
        later = [await errno_of(call) for call in (target.write(0, PAGE), target.flush())]
        await target.read(0, bytearray(4096))
        return first, *later

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == (errno.ETIMEDOUT, errno.EIO, errno.EIO)


def test_nbd_a_flush_that_a_silent_server_was_told_leaves_nothing_in_doubt(targets, here):
    """Where nothing was there to be flushed."""
    async def work():
        fake.ignores = FLUSH
        failed = await errno_of(target.flush())
        fake.ignores = None
        await target.write(0, PAGE)
        await target.flush()
        return failed

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == errno.ETIMEDOUT


def test_nbd_why_there_is_no_new_connection_is_told_once(targets, here, capfd):
    async def work():
        fake.info, fake.dies_of = [struct.pack(">HQH", 0, 1 << 19, 0b1101)], READ
        return await errno_of(target.read(0, bytearray(4096)))

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="1s")
        assert served(target, work) == errno.ETIMEDOUT
        assert fake.connections > 3
    assert capfd.readouterr().err.count("the export has become smaller") == 1


def test_nbd_a_request_is_given_up_though_the_network_takes_for_ever(targets, here, monkeypatch):
    """To find the server's name, say."""
    ends = threading.Event()

    async def work():
        monkeypatch.setattr(targets, "dial", lambda address: ends.wait())
        monkeypatch.setattr(targets, "NBD_DIAL", 0.2)
        fake.dies_of = READ
        try:
            return await errno_of(target.read(0, bytearray(4096)))
        finally:
            ends.set()

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == errno.ETIMEDOUT


def test_nbd_a_request_is_given_up_though_others_are_answered(targets, here):
    async def work():
        fake.ignores = WRITE
        write = asyncio.ensure_future(errno_of(target.write(0, PAGE)))
        for _ in range(500):
            await target.read(0, bytearray(4096))
            await asyncio.sleep(0 if write.done() else 0.01)
        return write.done() and await write

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == errno.ETIMEDOUT


@pytest.mark.parametrize("name", ["read", "flush"])
def test_nbd_what_changes_nothing_and_is_not_answered_is_given_up_alone(targets, here, name):
    """Of a bad sector, say: changes failed that were under way by then, and all later ones."""
    async def work():
        fake.ignores = slow = READ if name == "read" else FLUSH
        fake.commands.clear()
        buffer = bytearray(4096)
        given_up = target.read(0, memoryview(buffer)) if name == "read" else target.flush()
        given_up = asyncio.ensure_future(errno_of(given_up))
        while slow not in fake.commands:
            await asyncio.sleep(0.01)
        cookie, = target.pending
        while not given_up.done():
            await target.write(0, PAGE)
            await asyncio.sleep(0.01)
        buffer.clear()                          # BufferError while anybody keeps it
        fake.ignores = None
        while target.silence < 3:               # those that are given up already hurt no look
            await asyncio.sleep(0.01)
        durable = [await errno_of(call) for call in (target.write_fua(0, PAGE), target.flush())]
        await asyncio.to_thread(fake.peer.sendall, simple(cookie) + bytes(4096 * (name == "read")))
        while target.pending:
            await asyncio.sleep(0.01)
        later = [await errno_of(call) for call in (target.write_fua(0, PAGE), target.flush())]
        return await given_up, durable, later

    # Nor may one hear in place of those beside it that they are lost
    durable = [0, 0] if name == "read" else [errno.EIO, errno.EIO]
    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == (errno.ETIMEDOUT, durable, [0, 0])
        assert fake.connections == 2


def test_nbd_a_change_that_is_in_time_does_not_fail_for_a_read_that_is_not(targets, here):
    """The server does one thing after the other, so that it answers nothing meanwhile."""
    def late(peer, cookie, data):
        given_up.wait()
        peer.sendall(simple(cookie) + data)

    async def work():
        read = asyncio.ensure_future(errno_of(target.read(fake.SPOT, bytearray(4096))))
        while sum(request.looks for request in target.pending.values()) < targets.NBD_LOOKS - 2:
            await asyncio.sleep(0.01)
        write = asyncio.ensure_future(errno_of(target.write(0, PAGE)))
        failed = await read
        given_up.set()
        return failed, await write, await errno_of(target.flush())

    given_up = threading.Event()
    with FakeNbd(here, answer=late) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="1s")
        assert served(target, work) == (errno.ETIMEDOUT, 0, 0)


def test_nbd_a_write_to_a_server_that_talks_nonsense_is_never_sent_again(targets, here):
    async def work():
        fake.ignores, fake.answer = WRITE, lambda peer, cookie, data: peer.sendall(bytes(16))
        write = asyncio.ensure_future(errno_of(target.write(0, PAGE)))
        buffer = bytearray(4096)
        await target.read(fake.SPOT, memoryview(buffer))
        assert buffer == fake.data[fake.SPOT:][:4096]       # what changes nothing is
        return await write

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == errno.EIO
        assert fake.commands.count(WRITE) == 1


@pytest.mark.parametrize("way", ["what comes", "what goes"])
def test_nbd_goes_on_where_there_was_no_memory_for(targets, here, monkeypatch, way):
    """What asyncio could not receive it tells the reader; of what it could not send a part may have gone."""
    async def work():
        connection = target.connection
        if way == "what comes":
            fake.ignores = WRITE
            asyncio.get_running_loop().call_later(0.1, connection.reader.set_exception, MemoryError())
        else:
            send = connection.transport.write

            def fails(data):
                send(data[:100])
                raise MemoryError
            monkeypatch.setattr(connection.transport, "write", fails, raising=False)
        failed = [await errno_of(target.write(0, PAGE)) for _ in range(2)]
        buffer = bytearray(4096)
        await target.read(fake.SPOT, memoryview(buffer))
        assert buffer == fake.data[fake.SPOT:][:4096] and fake.commands.count(WRITE) <= 1
        return failed

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, errno.EIO]


def test_nbd_what_a_server_that_shuts_down_still_does_is_waited_for_not_sent_again(targets, here):
    """What it refuses to do the next one gets."""
    async def work():
        fake.ignores, fake.answer = WRITE, answers
        write = asyncio.ensure_future(errno_of(target.write(0, PAGE)))
        await asyncio.sleep(0)
        buffer = bytearray(4096)
        await target.read(fake.SPOT, memoryview(buffer))
        assert buffer == fake.data[fake.SPOT:][:4096]
        return await write

    def answers(peer, cookie, data):
        fake.ignores = None
        peer.sendall(simple(cookie, errno.ESHUTDOWN))
        peer.sendall(simple(cookie - 1))
        fake.take(peer, 1 << 30)

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == 0
        assert fake.commands.count(WRITE) == 1 and fake.commands.count(READ) == 2


def test_nbd_what_has_waited_too_long_is_not_sent_to_a_server_that_comes_late(targets, here):
    def hello(peer):
        fake.hello = None
        time.sleep(0.6)
        fake.shake_hands(peer)

    async def work():
        fake.dies_of, fake.hello = WRITE, hello
        return [await errno_of(target.write(0, PAGE)) for _ in range(2)]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="500ms")
        assert served(target, work) == [errno.ETIMEDOUT, 0]
        assert fake.commands.count(WRITE) == 2


def test_nbd_a_reply_for_which_nobody_waits_goes_nowhere(targets, here):
    """Where it was to go may be another's by then."""
    come = threading.Event()

    def answer(peer, cookie, data):
        come.wait()
        peer.sendall(simple(cookie) + data)

    async def work():
        fake.answer, buffer = answer, bytearray(4096)
        read = asyncio.ensure_future(target.read(fake.SPOT, memoryview(buffer)))
        while READ not in fake.commands:
            await asyncio.sleep(0.01)
        read.cancel()
        await asyncio.sleep(0)
        come.set()
        await target.read(0, bytearray(4096))
        return buffer

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == bytes(4096)


def test_nbd_a_disk_that_starts_anew_sends_nothing_of_its_last_life(targets, here):
    async def unanswered():
        fake.ignores = WRITE
        write = asyncio.ensure_future(target.write(0, PAGE))
        while WRITE not in fake.commands:
            await asyncio.sleep(0.01)
        write.cancel()

    async def work():
        fake.ignores, fake.dies_of = None, READ
        await target.read(0, bytearray(4096))

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        served(target, unanswered)
        served(target, work)
        assert fake.commands.count(WRITE) == 1


def test_nbd_a_disk_that_ends_as_it_connects_again_sends_nothing_more(targets, here, monkeypatch):
    """Its next server, which asks for the same, could be overtaken by that."""
    shake_hands = targets.NbdConnection._shake_hands

    async def work():
        async def last_words(*words):
            await shake_hands(*words)
            for task in target.tasks:
                task.cancel()
        monkeypatch.setattr(targets.NbdConnection, "_shake_hands", last_words)
        fake.dies_of = WRITE
        write = asyncio.ensure_future(target.write(0, PAGE))
        _, go_on = await asyncio.wait(target.tasks, timeout=5)
        write.cancel()
        return len(go_on)

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == 0
        assert fake.connections == 3 and fake.commands.count(WRITE) == 1


def test_nbd_a_write_that_was_given_up_is_never_sent_again(targets, here):
    """It would land on what was written since."""
    async def work():
        fake.ignores = WRITE
        write = asyncio.ensure_future(target.write(0, memoryview(bytes(4096))))
        while WRITE not in fake.commands:
            await asyncio.sleep(0.01)
        write.cancel()
        fake.ignores = None
        await target.write(0, PAGE)
        fake.dies_of = READ
        await target.read(0, bytearray(4096))

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        served(target, work)
        assert fake.data[:4096] == PAGE


def test_nbd_a_write_is_sent_again_when_its_server_has_ended(targets, here):
    async def work():
        await target.write(4096, PAGE)
        fake.dies_of = WRITE
        write = asyncio.ensure_future(target.write(0, PAGE))
        while not target.lost:
            await asyncio.sleep(0.01)
        told = [await errno_of(target.flush())]
        await write
        return [*told, await errno_of(target.flush())]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]
        assert fake.commands.count(WRITE) == 3 and fake.data[:4096] == PAGE


@pytest.mark.parametrize("hears", ["line", "flush"])
def test_nbd_a_write_whose_first_part_was_lost_before_its_last_is_done_fails_a_flush(targets, here, hears):
    """Flushes told of that before the write had ended. Done anew, one of many parts might never end."""
    async def asked(count):
        while fake.commands.count(WRITE) < count:
            await asyncio.sleep(0.01)
        cookie, = target.pending
        return cookie

    async def work():
        fake.ignores, more = WRITE, hears == "line"
        write = asyncio.ensure_future(targets.moved(target.write, 0, memoryview(bytes(PAGE) * 3)))
        fake.peer.sendall(simple(await asked(1)))
        await asked(2)
        if more:
            fake.peer.shutdown(socket.SHUT_RDWR)
        else:
            fake.fails = FLUSH
            assert await errno_of(target.flush()) == errno.EIO
        while not target.lost:
            await asyncio.sleep(0.01)
        assert await errno_of(target.flush()) == errno.EIO
        second = await asked(2 + more)
        fake.peer.sendall(simple(second))
        last = await asked(3 + more)
        await errno_of(target.flush())
        fake.peer.sendall(simple(last))
        await write
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here, info=[struct.pack(">HIII", 3, 512, 4096, 4096)]) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]


def test_nbd_a_write_that_ends_beside_the_flush_that_tells_of_its_loss_fails_the_next_one(targets, here):
    """Its task has yet to hear that it is done: that flush is not for it."""
    async def work():
        fake.ignores = WRITE
        writes = [asyncio.ensure_future(target.write(at, PAGE)) for at in (0, 4096)]
        while fake.commands.count(WRITE) < 2:
            await asyncio.sleep(0.01)
        fake.ignores = None
        lost, again = target.pending
        fake.peer.sendall(simple(lost) + simple(again, errno.ESHUTDOWN))
        while not target.lost:
            await asyncio.sleep(0)
        assert await errno_of(target.flush()) == errno.EIO
        await asyncio.gather(*writes)
        return [await errno_of(target.flush()) for _ in range(2)]

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        assert served(target, work) == [errno.EIO, 0]


def test_nbd_a_connection_may_break_at_any_byte(targets, here, monkeypatch):
    """Of a greeting, of a request, of a reply: each is asked for again, and nothing is mixed up."""
    sleep, limits = asyncio.sleep, [*range(1, 300), *range(300, 1300, 37)]
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(seconds / 100))

    async def work():
        fake.limits, fake.dies_of, buffer = iter(limits), READ, bytearray(512)
        while fake.connections < len(limits) + 2:
            data = os.urandom(512)
            await target.write(fake.SPOT, memoryview(data))
            await target.read(fake.SPOT, memoryview(buffer))
            assert buffer == data

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here), timeout="3600s")
        served(target, work)


def test_nbd_a_lost_connection_is_told_of_once_whoever_meets_it(targets, here, capfd, caplog):
    async def work():
        fake.peer.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(*(target.write(0, PAGE) for _ in range(20)))

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        served(target, work)
    assert capfd.readouterr().err.count("\n") == 1 and not caplog.records


@pytest.mark.parametrize("slow", ["network", "server"])
def test_nbd_connecting_again_keeps_nobody_waiting(targets, here, monkeypatch, slow):
    begun, goes_on, waited = threading.Event(), threading.Event(), []

    def wait(*words, then):
        begun.set()
        waited.append(goes_on.wait(4))
        fake.hello = None
        return then(*words)

    async def work():
        if slow == "network":
            monkeypatch.setattr(targets, "dial", partial(wait, then=targets.dial))
        else:
            fake.hello = partial(wait, then=fake.shake_hands)
        fake.dies_of = READ
        read = asyncio.ensure_future(target.read(0, bytearray(4096)))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        goes_on.set()
        await read

    with FakeNbd(here) as fake:
        target = targets.Nbd(nbd_uri(here))
        served(target, work)
    assert waited == [True]


def test_nbd_a_machine_that_is_silent_is_asked_whether_it_lives(targets):
    async def work():
        own = target.connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and own.gettimeout() == 0
        return own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    port = free_port()
    with FakeNbd((socket.AF_INET, ("127.0.0.1", port))):
        target = targets.Nbd(f"nbd://127.0.0.1:{port}")
        assert served(target, work) == 1


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_nbd_over_ipv6(targets):
    port = free_port()
    with FakeNbd((socket.AF_INET6, ("::1", port))):
        assert targets.Nbd(f"nbd://[::1]:{port}").size == 1 << 20


def test_nbd_no_server_answers_in_no_time(run, here):
    assert_fails(run("nbd", nbd_uri(here), "--timeout", "0"), 1, "--timeout 0", errno.EINVAL)


def test_nbd_what_is_no_block_at_an_exports_end_is_told_of(targets, here, capfd):
    with FakeNbd(here, size=(1 << 20) + 100):
        assert targets.Nbd(nbd_uri(here)).size == 1 << 20
    assert "its last 100 bytes are left out" in capfd.readouterr().err


# ---- servers with TLS, and old ones ------------------------------------------------------------------


def certificates(directory):
    """Make an authority, and what it says of localhost, as nbdkit names them."""
    needs("openssl")
    key, ca = directory / "server-key.pem", directory / "ca-cert.pem"
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    sh(*new, "-x509", "-days", 2, "-keyout", directory / "ca-key.pem", "-out", ca, "-subj", "/CN=authority",
       "-addext", "keyUsage=keyCertSign")
    sh(*new, "-keyout", key, "-out", directory / "request",
       "-subj", "/CN=localhost")
    (directory / "names").write_text("subjectAltName=DNS:localhost\n")
    sh("openssl", "x509", "-req", "-days", 2, "-in", directory / "request", "-CA", ca, "-CAcreateserial",
       "-CAkey", directory / "ca-key.pem", "-extfile", directory / "names",
       "-out", directory / "server-cert.pem")
    (directory / "mine.pem").write_text((directory / "server-cert.pem").read_text() + key.read_text())
    return {"ca": str(ca), "certificate": str(directory / "mine.pem")}


@pytest.fixture
def tls_server(tmp_path):
    files, port = certificates(tmp_path), free_port()
    with nbd_server("nbdkit", "-f", "-i", "127.0.0.1", "-p", "AT", "--tls=require", "--tls-verify-peer",
                    f"--tls-certificates={tmp_path}", "memory", "1M", port):
        yield port, files


def test_nbd_speaks_tls(targets, tls_server, monkeypatch):
    async def work():
        await target.write(4096, PAGE)
        buffer = bytearray(8192)
        await target.read(0, memoryview(buffer))
        return buffer

    # As from Python 3.12 on
    monkeypatch.setattr(asyncio.StreamWriter, "__del__", asyncio.StreamWriter.close, raising=False)
    port, files = tls_server
    target = targets.Nbd(f"nbds://localhost:{port}", **files)
    assert served(target, work) == bytes(4096) + PAGE


def test_nbd_believes_no_server_that_nobody_vouches_for(run, tls_server):
    port, files = tls_server
    ours = "--ca", files["ca"], "--certificate", files["certificate"]
    assert_fails(run("nbd", f"nbds://localhost:{port}"), 1, "certificate", errno.EPROTO)
    assert_fails(run("nbd", f"nbds://127.0.0.1:{port}", *ours), 1, "certificate", errno.EPROTO)


@pytest.mark.parametrize("option", ["--ca", "--certificate"])
def test_nbd_files_that_are_no_certificates(run, option):
    assert_fails(run("nbd", "nbds://localhost", option, __file__), 1, "target nbd", errno.EIO)


@pytest.mark.parametrize("scheme", ["nbds", "NBDS"])
def test_nbd_a_server_without_tls_gets_nothing_in_the_clear(run, here, scheme):
    with nbdkit(here, "--tls=off", "memory", "1M"):
        done = run("nbd", f"{scheme}+unix:///?socket={here}")
        assert_fails(done, 1, "the server speaks no TLS", errno.EINVAL)


def old_hands(fake, peer):
    """Know of no option but to be told a name."""
    fake.greet(peer)
    peer.sendall(fake.reply(7, 1 << 31 | 1))
    assert fake.option(peer) == 1
    peer.sendall(struct.pack(">QH", 1 << 20, 0b1101) + bytes(124))


def test_nbd_servers_that_know_only_to_be_told_a_name(targets, here):
    with FakeNbd(here) as fake:
        fake.hello = lambda peer: old_hands(fake, peer)
        assert targets.Nbd(nbd_uri(here)).size == 1 << 20


def test_nbd_asks_for_no_structured_replies(targets, here):
    """With them a server tells its holes; where its store is wrong of these, data are read as zeroes."""
    def hello(peer):
        peer.sendall(b"NBDMAGICIHAVEOPT\0\1")
        fake.take(peer, 4)
        while (option := fake.option(peer)) != 7:
            asked.append(option)
            peer.sendall(fake.reply(option, 1))
        peer.sendall(fake.reply(7, 3, fake.info[0]) + fake.reply(7, 1))

    asked = []
    with FakeNbd(here, hello) as fake:
        assert targets.Nbd(nbd_uri(here)).size == 1 << 20
    assert asked == []


def test_nbd_servers_without_options(targets, here):
    with nbdkit(here, "--mask-handshake=0", "memory", "1M"):
        assert targets.Nbd(nbd_uri(here, "any")).size == 1 << 20


# ---- real servers ---------------------------------------------------------------------------------


@kernel
def test_nbd_random_writes_verify(targets, new_image):
    image, port = new_image("32M"), free_port()
    with nbd_server("qemu-nbd", "-t", "-f", "raw", "-b", "127.0.0.1", "-p", "AT", image, port):
        with ublk.Device(targets.Nbd(f"nbd://localhost:{port}")) as disk:
            fio_verify(disk.path)
            os.sync()
            found = digest(disk.path)
        assert digest(image) == found


@kernel
def test_nbd_an_image_with_a_backing_file_carries_a_file_system(targets, here, tmp_path):
    needs("qemu-img")
    base, image = tmp_path / "base.img", tmp_path / "disk.qcow2"
    base.write_bytes(os.urandom(1 << 20) + bytes(63 << 20))
    before = digest(base)
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image)
    with nbd_server("qemu-nbd", "-t", "-f", "qcow2", "--discard=unmap", "-k", "AT", image, here) as server:
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk:
            with opened(disk.path) as fd:
                assert read_at(fd, 0, 1 << 20) == base.read_bytes()[:1 << 20]
            carries("ext4", disk, tmp_path / "mnt")
            os.sync()
        server.terminate()
        assert server.wait() == 0
    sh("qemu-img", "check", image)
    assert digest(base) == before


@kernel
def test_nbd_every_kind_of_request_reaches_the_server(targets, here, tmp_path):
    needs("blkdiscard")
    log = tmp_path / "log"
    with nbdkit(here, "--filter=log", "memory", "16M", f"logfile={log}"):
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk:
            with opened(disk.path, os.O_RDWR | os.O_DSYNC) as fd:
                write_at(fd, 8192, b"y" * 4096)
            with opened(disk.path) as fd:
                write_at(fd, 0, b"x" * 4096)
                os.fsync(fd)
                sh("blkdiscard", "-o", 1 << 20, "-l", 65536, disk.path)
                sh("blkdiscard", "-z", "-o", 0, "-l", 4096, disk.path)
                assert read_at(fd, 0, 4096) == bytes(4096)
                assert read_at(fd, 8192, 4096) == b"y" * 4096
    text = log.read_text()
    for pattern in ("Write .*offset=0x2000 count=0x1000 fua=1", "Write .*offset=0x0 count=0x1000 fua=0",
                    "Flush", "Trim .*offset=0x100000 count=0x10000", "Zero .*offset=0x0 count=0x1000 trim=0"):
        assert re.search(pattern, text), (pattern, text)


@kernel
def test_nbd_an_export_for_reading_makes_a_disk_for_reading(targets, here, new_image):
    image = new_image("1M")
    image.write_bytes(os.urandom(1 << 20))
    with nbdkit(here, "-r", "file", image):
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk:
            assert sh("blockdev", "--getro", disk.path).stdout == "1\n"
            assert digest(disk.path) == digest(image)
            with pytest.raises(OSError) as refused, opened(disk.path) as fd:
                write_at(fd, 0, bytes(4096))
            assert refused.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)


NBDKIT = "nbdkit", "-f", "--unix", "AT"
SERVERS = {     # of the file IMAGE; in DIRECTORY are certificates
    "qemu-nbd": ("qemu-nbd", "-t", "-f", "raw", "-k", "AT", "IMAGE"),
    "nbdkit": (*NBDKIT, "file", "IMAGE"),
    "tls": (*NBDKIT, "--tls=require", "--tls-certificates=DIRECTORY", "file", "IMAGE"),
    "delay": (*NBDKIT, "--filter=delay", "file", "IMAGE", "rdelay=10ms", "wdelay=10ms"),
    "error": (*NBDKIT, "--filter=error", "file", "IMAGE", "error=EIO", "error-rate=10%"),
    "cache": (*NBDKIT, "--filter=cache", "file", "IMAGE", "cache=writeback"),
}
# What a cache loses is no fault, unless it was to be durable
FIO_WORDS = {"error": CONTINUE, "cache": ["--sync=1"]}


class Server:
    """One of SERVERS at a socket, of an image, and how it is reached."""

    def __init__(self, name, image, where):
        files = certificates(where.parent) if name == "tls" else {}
        ours = {"IMAGE": str(image), "DIRECTORY": str(where.parent)}
        self.words = [re.sub("IMAGE|DIRECTORY", lambda found: ours[found[0]], word) for word in SERVERS[name]]
        self.uri = nbd_uri(where).replace("nbd", "nbds", 1) if name == "tls" else nbd_uri(where)
        self.where, self.ca, self.stack = where, files.get("ca", ""), ExitStack()
        self.start()

    def start(self):
        self.process = self.stack.enter_context(nbd_server(*self.words, self.where))

    def restart(self, number=signal.SIGKILL):
        """End it by a signal and start another."""
        self.process.send_signal(number)
        self.process.wait()
        self.where.unlink(missing_ok=True)
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()


@pytest.mark.parametrize("name", ["qemu-nbd", "tls", "cache"])
def test_nbd_a_flush_vouches_for_what_was_written_whenever_its_server_dies(targets, here, new_image, name):
    chance, found = random.Random(name), memoryview(bytearray(4096))
    blocks = {4096 * number: memoryview(bytearray(4096)) for number in range(16)}

    async def kill():
        await asyncio.sleep(chance.random() / 50)
        server.restart()

    async def write():
        await asyncio.gather(*(target.write(at, block) for at, block in blocks.items()))

    async def work():
        for killed_before_the_flush in (True, False) * 2:
            killer = asyncio.ensure_future(kill())
            for block in blocks.values():
                block[:] = chance.randbytes(4096)
            await write()
            if killed_before_the_flush:
                await killer
                await target.read(0, found)
            while await errno_of(target.flush()):
                await write()
            await killer
            for at, block in blocks.items():
                await target.read(at, found)
                assert found == block

    with Server(name, new_image("1M"), here) as server:
        target = targets.Nbd(server.uri, ca=server.ca)
        served(target, work)


def kill_nbd_servers(targets, name, image, where, ends, pause=None):
    """Have fio verify what a server of SERVERS serves, while this is ended and started, once for each signal.

    pause(fio) is what happens before each end. Returns how many requests were served, and how many failed.
    """
    with Server(name, image, where) as server:
        target = targets.Nbd(server.uri, ca=server.ca)
        with ublk.Device(target) as disk, Fio(disk, "--size=1M", *FIO_WORDS.get(name, ())) as fio:
            for number in ends:
                (pause or Fio.busy)(fio)
                server.restart(number)
            fio.busy()
            fio.finish()
            return completed(disk), fio.errors


# The others are in lab/soak.py
@kernel
@pytest.mark.parametrize("name, ends", [
    ("nbdkit", [signal.SIGTERM, signal.SIGKILL]),
    *(pytest.param(name, [signal.SIGKILL], marks=since("7.0")) for name in ("tls", "error", "cache"))])
def test_nbd_a_server_restarted_under_load_loses_nothing(targets, here, new_image, name, ends):
    errors = kill_nbd_servers(targets, name, new_image("16M"), here, ends)[1]
    assert bool(errors) == (name == "error")


@kernel
@pytest.mark.parametrize("recovers", [False, True], ids=["", "recovered"])
def test_nbd_what_a_killed_server_had_not_written_yet_fails_the_next_fsync(here, tmp_path, recovers):
    needs("qemu-img")
    image = tmp_path / "disk.qcow2"
    sh("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
    words = "qemu-nbd", "-t", "-f", "qcow2", "-k", "AT", image, here
    with ExitStack() as stack:
        server = stack.enter_context(nbd_server(*words))
        disk = Forked("nbd", nbd_uri(here), "-r", "reissue").live()
        fd = stack.enter_context(opened(disk.path))
        write_at(fd, 0, b"x" * 4096)
        if recovers:
            disk.kill()
            disk = recovered(disk)
        server.kill()
        server.wait()
        here.unlink(missing_ok=True)
        stack.enter_context(nbd_server(*words))
        read_at(fd, 1 << 20, 4096)
        assert error_of(os.fsync, fd) == (0 if recovers else errno.EIO)
        if recovers:                            # which has flushed it
            assert read_at(fd, 0, 4096) == b"x" * 4096
        write_at(fd, 0, b"x" * 4096)
        os.fsync(fd)
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@pytest.mark.parametrize("kind", ["nbd", "record"])
def test_a_killed_server_loses_nothing_of(here, backing, tmp_path, run, kind):
    with ExitStack() as stack:
        if kind == "nbd":
            stack.enter_context(nbdkit(here, "file", backing))
        words = ["nbd", nbd_uri(here)] if kind == "nbd" else ["record", tmp_path / "log", "loop", backing]
        disk = Forked(*words, "-r", "reissue").live()
        with Fio(disk, "--size=1M") as fio:
            for _ in range(2):
                fio.busy()
                disk.kill()
                disk = recovered(disk)
            fio.busy()
            fio.finish()
        assert fio.errors == 0
        os.sync()
        found = digest(disk.path)
        assert disk.kill(signal.SIGTERM) == 0
    assert digest(backing) == found
    if kind == "record":
        assert run("replay", tmp_path / "log", tmp_path / "again").status == 0
        assert digest(tmp_path / "again") == found
