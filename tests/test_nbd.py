# SPDX-License-Identifier: MIT
"""Companion: disks of other machines."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Fio,
    Forked,
    assert_fails,
    carries,
    digest,
    error_of,
    fio_verify,
    kernel,
    needs,
    opened,
    read_at,
    recovered,
    sh,
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
    ("nbd+unix:///?socket=/a%20b", "/a b", "")])
def test_nbd_addresses(targets, uri, address, export):
    assert targets.nbd_address(uri) == (address, export)


@pytest.mark.parametrize("uri, says", [
    ("", "not an NBD address"), ("host", "not an NBD address"), ("nbd://", "not an NBD address"),
    ("http://host/", "not an NBD address"), ("nbd+unix:///x", "not an NBD address"),
    ("nbd://host:99999/", "ort"), ("nbd://host:x/", "ort"), ("nbd://[::1/", "IPv6"),
    ("nbd://.x/", "label"),
    ("nbds://host/", "TLS"), ("nbds+unix:///?socket=/x", "TLS"),
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


class FakeNbd:
    """An NBD server in a thread, with a disk in memory, that misbehaves as a test wants.

    hello(peer) greets each connection, answer(peer, cookie, data) answers the next request to read
    at SPOT, where udev does not look. Where they are missing it does well.
    """

    SPOT = 340 << 10

    def __init__(self, path, hello=None, answer=None, *, info=(), size=1 << 20, flags=0b1101):
        self.path, self.hello, self.answer = path, hello, answer
        self.info = [struct.pack(">HQH", 0, size, flags), *info]
        self.data, self.connections, self.longest = bytearray(os.urandom(1 << 20)), 0, 0

    def __enter__(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
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
                try:
                    (self.hello or self.shake_hands)(peer)
                    self._serve(peer)
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
        peer.sendall(self.reply(8, 1))
        assert self.option(peer) == 7
        peer.sendall(b"".join(self.reply(7, 3, info) for info in self.info) + self.reply(7, 1))

    def _serve(self, peer):
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", self.take(peer, 28))
            self.longest = max(self.longest, length if command in (0, 1) else 0)
            if command == 1:
                self.data[offset:offset + length] = self.take(peer, length)
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
        time.sleep(0.02)


def floods(fake, peer):
    fake.greet(peer)
    while True:
        peer.sendall(fake.reply(8, 3, bytes(60000)))


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
    "huge": (greets_with(FakeNbd.reply(8, 3, length=0xFFFFFFFF)), "protocol", errno.EINVAL),
    "magic": (greets_with(bytes(20)), "protocol", errno.EINVAL),
    "other": (greets_with(FakeNbd.reply(5, 1)), "protocol", errno.EINVAL),
    "short": (greets_with(FakeNbd.reply(8, 3, b"x" * 100)[:50]), "closed the connection", errno.ECONNRESET),
    "no": (greets_with(FakeNbd.reply(8, 1) + FakeNbd.reply(7, 1 << 31 | 2, b"go\xff\naway"), b""),
           "refused: go", errno.EINVAL),
    "drips": (drips, "no NBD server", errno.EINVAL),
    "floods": (floods, "", errno.ETIMEDOUT),
}


@pytest.mark.parametrize("name", HOSTILE_GREETINGS)
def test_nbd_hostile_greetings(run, targets, monkeypatch, here, name):
    greet, text, number = HOSTILE_GREETINGS[name]
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


@pytest.mark.parametrize("options, text", [
    ({"size": 0}, "size 0"), ({"size": 511}, "size 511"), ({"size": (1 << 64) - 1}, "size 1844674407370955"),
    ({"info": [struct.pack(">HIII", 3, 3, 4096, 1 << 20)]}, "block size 3"),
    ({"info": [struct.pack(">HIII", 3, 1 << 20, 1 << 20, 1 << 20)]}, "block size 1048576"),
    ({"info": [struct.pack(">HIII", 3, 4096, 4096, 512)]}, "largest request 512"),
    ({"info": [struct.pack(">HIII", 3, 512, 512, 0)]}, "largest request 0")])
def test_nbd_exports_that_cannot_be_disks(run, here, options, text):
    with FakeNbd(here, **options):
        assert_fails(run("nbd", nbd_uri(here)), 1, text, errno.EINVAL)


def chunk(cookie, kind, data=b"", *, done=1, length=0):
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, length or len(data)) + data


def behind(offset):
    """Begin a chunk that belongs so far behind what was asked for."""
    return struct.pack(">Q", FakeNbd.SPOT + offset)


def simple(cookie, error=0):
    return struct.pack(">IIQ", 0x67446698, error, cookie)


HOSTILE_ANSWERS = {     # made of cookie and data; what the server's user is told
    "magic": (lambda c, d: struct.pack(">IIQ", 1, 0, c), "something else"),
    "cookie": (lambda c, d: simple(c + 1) + d, "something else"),
    "cut": (lambda c, d: simple(c) + d[:-1], "closed the connection"),
    "half a chunk": (lambda c, d: chunk(c, 1, behind(0) + d)[:1000], "closed the connection"),
    "huge": (lambda c, d: chunk(c, 1, length=0xFFFFFFFF), "4294967295 bytes"),
    "huge error": (lambda c, d: chunk(c, 1 << 15, length=0xFFFFFFF0), "4294967280 bytes"),
    "elsewhere": (lambda c, d: chunk(c, 1, behind(512) + d), "nobody asked for"),
    "before": (lambda c, d: chunk(c, 1, behind(-512) + d), "nobody asked for"),
    "a hole too large": (lambda c, d: chunk(c, 2, behind(0) + b"\xff" * 4), "nobody asked for"),
    "a type unknown": (lambda c, d: chunk(c, 77, b"?"), "type 77"),
    "shutting down": (lambda c, d: simple(c, errno.ESHUTDOWN), "shutting down"),
    "silence": (lambda c, d: None, "closed the connection"),
}


def answers_once(make):
    """Answer, then close; or wait until the client does."""
    def answer(peer, cookie, data):
        answer = make(cookie, data)
        if answer is None:
            FakeNbd.take(peer, 1 << 30)
        peer.sendall(answer)
        raise EOFError
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
            no_space = struct.pack(">IH", errno.ENOSPC, 2) + b"no"
            for make, number in ((lambda c: simple(c, errno.ENOSPC), errno.ENOSPC),
                                 (lambda c: simple(c, 0xFFFFFFFF), errno.EIO),
                                 (lambda c: chunk(c, 1 << 15 | 1, no_space), errno.ENOSPC),
                                 (lambda c: chunk(c, 0), errno.EIO)):       # done, but without data
                fake.answer = lambda peer, cookie, data, make=make: peer.sendall(make(cookie))
                assert error_of(read_at, fd, fake.SPOT, 4096) == number
            assert read_at(fd, fake.SPOT, 4096) == fake.data[fake.SPOT:][:4096]
        assert fake.connections == 1


@kernel
def test_nbd_chunks_of_data_and_holes_in_any_order(targets, here):
    def answer(peer, cookie, data):
        pieces = [(2, 4096, struct.pack(">I", 2048)), (1, 6144, data[6144:]), (1, 0, data[:4096])]
        for kind, offset, piece in pieces:
            peer.sendall(chunk(cookie, kind, behind(offset) + piece, done=0))
        peer.sendall(chunk(cookie, 0))

    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here))) as disk, opened(disk.path) as fd:
            fake.answer = answer
            data = fake.data[fake.SPOT:][:8192]
            assert read_at(fd, fake.SPOT, 8192) == data[:4096] + bytes(2048) + data[6144:]


@kernel
def test_nbd_a_gap_between_chunks_shows_nothing_of_other_requests(targets, here):
    def answer(peer, cookie, data):
        peer.sendall(chunk(cookie, 1, behind(0) + b"a" * 4096, done=0)
                     + chunk(cookie, 1, behind(0) + b"b" * 4096))

    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here)), depth=1) as disk, opened(disk.path) as fd:
            assert any(read_at(fd, 0, 8192)[4096:])
            fake.answer = answer
            assert read_at(fd, fake.SPOT, 8192) == b"b" * 4096 + bytes(4096)


@kernel
def test_nbd_a_server_that_never_answers_fails_the_requests_in_time(targets, here, capfd, monkeypatch):
    monkeypatch.setattr(targets, "NBD_HANDSHAKE", 0.3)
    with FakeNbd(here) as fake:
        with ublk.Device(targets.Nbd(nbd_uri(here), timeout="1s")) as disk, opened(disk.path) as fd:
            fake.hello = lambda peer: FakeNbd.take(peer, 1 << 30)
            fake.answer = says([b""]).__get__(fake)
            assert error_of(read_at, fd, fake.SPOT, 4096) == errno.ETIMEDOUT
            assert "giving requests up" in capfd.readouterr().err
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
        target.start(0)
        with pytest.raises(ublk.UblkError, match="use one queue"):
            target.start(1)
        target.close()


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
                    "Flush", "Trim .*offset=0x100000 count=0x10000", "Zero .*offset=0x0 count=0x1000"):
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


@kernel
def test_nbd_a_server_restarted_under_load_loses_nothing(targets, here, new_image):
    words = "nbdkit", "-f", "--unix", "AT", "file", new_image("16M"), here
    with ExitStack() as stack:
        server = stack.enter_context(nbd_server(*words))
        disk = stack.enter_context(ublk.Device(targets.Nbd(nbd_uri(here))))
        with Fio(disk, "--size=1M") as fio:
            for number in (signal.SIGTERM, signal.SIGKILL):
                fio.busy()
                server.send_signal(number)
                server.wait()
                here.unlink(missing_ok=True)
                server = stack.enter_context(nbd_server(*words))
            fio.busy()
            fio.finish()
        assert fio.errors == 0


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
