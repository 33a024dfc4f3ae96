# SPDX-License-Identifier: MIT
"""Targets for ublk.py: what can stand behind a disk, each a short class that shows one idea.

    ram       memory                                   loop      a file or a block device
    stripe    several files, chunk by chunk            cow       an overlay over a base
    zoned     a disk of zones, in memory or a file     nbd       what an NBD server serves
    fault     another target that fails and lies       cache     another target, with a drive's cache
    record    another target, with a log to replay

Lying beside ublk.py, this file adds these names to its command line: ``ublk.py
loop disk.img``. The parameters of a class are its arguments there: positional
ones are words, keyword-only ones options, described by the lines ``name: text``
of its docstring.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import glob
import hashlib
import itertools
import mmap
import os
import random
import re
import shlex
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import ublk
from ublk import refuse

PAGE_SIZE = mmap.PAGESIZE
PIECE = 256 << 10  # bytes copied or compared at once; memory for more is made anew each time

# linux/falloc.h and linux/fs.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
FICLONE = 0x40049409
BLKDISCARD = 0x1277
BLKSSZGET = 0x1268

HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
# What fallocate(2) fails with, which is no fault
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)


def wrong(what: str, reason: str, remedy: str = "") -> ublk.UblkError:
    """Make the error for arguments or files that make no sense."""
    return ublk.UblkError(errno.EINVAL, what, reason, remedy)


# =================================================================================================
# Disks of memory and of files
# =================================================================================================

# What the os module lacks, and what a Python lacks that was made for C libraries before 2.27, as
# many that are downloaded are
LIBC = ctypes.CDLL(None, use_errno=True)
MFD_CLOEXEC = 1  # linux/memfd.h
F_OFD_SETLKW = 38  # linux/fcntl.h


def checked_result(result: int) -> int:
    """Return what a function of the C library returned; raises OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fallocate(
    fd: int,
    mode: int,
    offset: int,
    length: int,
) -> None:
    """fallocate(2); raises OSError."""
    place = ctypes.c_int64(offset), ctypes.c_int64(length)
    checked_result(LIBC.fallocate(fd, mode, *place))


def write_all(fd: int, data: Any, offset: int) -> None:
    """Write all of data at offset; raises OSError."""
    while data:
        count = os.pwrite(fd, data, offset)
        data = data[count:]
        offset += count


def write_through(fd: int, data: Any, offset: int) -> None:
    """Write data that are durable as soon as anybody sees them, also where we are killed meanwhile.

    Through an opening of its own, as not every Python knows RWF_DSYNC. Raises OSError.
    """
    through = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DSYNC)
    try:
        write_all(through, data, offset)
    finally:
        os.close(through)
    os.fdatasync(fd)  # for FUSE with direct_io ends without


def read_all(fd: int, length: int, offset: int) -> bytes:
    """Read a range, or what there is of it before the file's end; raises OSError.

    One pread() gives what comes before bytes that cannot be read, and no error.
    """
    data = os.pread(fd, length, offset)
    if 0 < len(data) < length:
        data += read_all(fd, length - len(data), offset + len(data))
    return data


def pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces: yield where each begins and its length."""
    end = offset + length
    for at in range(offset, end, PIECE):
        yield at, min(PIECE, end - at)


def aligned(data: Any) -> memoryview:
    """Copy data to memory that suits direct I/O."""
    memory = memoryview(ublk.private_memory(len(data)))
    memory[:] = data
    return memory


def clear(fd: int, offset: int, length: int) -> None:
    """Make a range of a file zeroes: by a hole where there can be one, else by writing them."""
    try:
        fallocate(fd, HOLE, offset, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        for at, count in pieces(offset, length):
            write_all(fd, ublk.zeroes(count), at)


def closes_with(owner: object, fd: int) -> Any:
    """Return what closes a descriptor; it is called at the latest when its owner goes."""
    closing = weakref.finalize(owner, os.close, fd)
    closing.atexit = False  # a disk may still be served then
    return closing


def memory_file(owner: object) -> int:
    """Make an empty file in memory that is there for as long as its owner; return its descriptor."""
    fd = checked_result(LIBC.memfd_create(b"ublk", MFD_CLOEXEC))
    closes_with(owner, fd)
    return fd


# Longer than any mapping of it: whoever touched one behind the end would be killed
END_OF_MEMORY = 1 << 62


class Ram(ublk.Target):
    """Keep the disk in memory; it is gone when the server ends.

    size: size of the disk
    """

    def __init__(self, *, size: ublk.Size = ublk.Size(1 << 30)) -> None:
        self.fd = memory_file(self)
        os.ftruncate(self.fd, END_OF_MEMORY)
        self.resized(size)

    def resized(self, size: int) -> None:
        # 0 would be the whole file; that no disk has no bytes the Device tells
        self.grown(size or 1)
        self.size = size

    def grown(self, size: int) -> mmap.mmap:
        """Map more of the memory: a disk that grows may get a request before resized() is called."""
        memory = self.memory = mmap.mmap(self.fd, size)
        return memory

    def read(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        memory = self.memory  # which another queue may replace
        if end > len(memory):
            memory = self.grown(end)
        # A view of its own: a free-threaded Python miscounts the parts of one that threads share
        buffer[:] = memoryview(memory)[offset:end]

    def write(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        memory = self.memory
        if end > len(memory):
            memory = self.grown(end)
        memoryview(memory)[offset:end] = buffer

    def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        clear(self.fd, offset, length)  # which gives pages back

    discard = write_zeroes


class Offered:
    """A handler that a target of a class has where its ``offers`` name it: its call() serves that.

    It is the class's all the same, where a subclass overrides it like any other.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, target: Any, owner: type) -> Any:
        if target is None:
            return self
        if self.name not in target.offers:
            raise AttributeError(f"{self.name}: not offered")
        return partial(target.call, self.name)


class Mapped:
    """A part of targets with map(): it serves what the kernel could not, or was not asked to."""

    map: Any

    def read(self, offset: int, buffer: memoryview) -> int:
        fd, at = self.map(offset, len(buffer), False)
        return os.preadv(fd, [buffer], at)  # 0 where the file was cut: EIO

    def write(self, offset: int, buffer: memoryview) -> int:
        fd, at = self.map(offset, len(buffer), True)
        return os.pwrite(fd, buffer, at)


class Loop(Mapped, ublk.Target):
    """Serve a file or a block device as a disk. A file that may not be written to makes a read-only one.

    path: the file or block device
    direct: transfer around the page cache (O_DIRECT)
    read_only: open it for reading only
    """

    discard: Any = Offered("discard")

    def __init__(
        self,
        path: str,
        *,
        direct: bool = False,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self.is_block = is_block(path)
        self.files = [path]
        flags = os.O_DIRECT if direct else 0
        self.fd, self.read_only = open_backing(path, flags, read_only)
        self.opened = closes_with(self, self.fd)
        claim(self.fd, path, self.read_only)
        if self.is_block:
            word = fcntl.ioctl(self.fd, BLKSSZGET, bytes(4))
            self.block_size = int.from_bytes(word, sys.byteorder)
        if direct:
            self.dma_alignment, self.block_size = direct_units(self.fd)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        refuse(
            self.size == 0 or self.size % self.block_size,
            path,
            f"its size {self.size} is none, or not a multiple of {self.block_size}",
            f"give it another: truncate -s SIZE {path}",
        )
        self.offers = [] if self.read_only or not self._can_discard() else ["discard"]
        # By no method: whoever leaves a loop unclosed would keep its file until the next collection
        self.sync: Any = ublk.Flushing(partial(ublk.uring_fsync, self.fd, datasync=True))
        self.told = 0  # of how many of its failures flushes have told

    def close(self) -> None:
        self.fd = -1  # the number may become another file's
        self.sync = None
        self.opened()

    disown = close  # a forked child would keep the lock of the file

    def map(
        self,
        offset: int,
        length: int,
        write: bool,
    ) -> tuple[int, int]:
        """Say in which file, and where in it, these bytes of the disk are."""
        return self.fd, offset

    def fetch(self, offset: int, buffer: memoryview) -> Any:
        """Do what read() does, while the queue goes on."""
        fd, at = self.map(offset, len(buffer), False)
        return ublk.uring_read(fd, buffer, at)

    def store(self, offset: int, buffer: memoryview) -> Any:
        """Do what write() does, while the queue goes on."""
        fd, at = self.map(offset, len(buffer), True)
        return ublk.uring_write(fd, buffer, at)

    async def write_fua(self, offset: int, buffer: memoryview) -> None:
        failures = self.sync.failures
        await moved(self.store, offset, buffer)
        await self.sync(failures)

    async def flush(self) -> None:
        # What a durable write or a flush has heard of may be another client's, who has yet to flush,
        # and the kernel tells an opening but once
        failures = self.sync.failures
        if self.told != failures:
            self.told = failures
            raise OSError(errno.EIO, f"{self.path}: what was written before may be lost")
        await self.sync(failures)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Punch a hole if that is allowed, or convert to zeroes, where there is neither write them."""
        mode = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        mode |= FALLOC_FL_KEEP_SIZE
        fd, place = self.map(offset, length, True)
        failures = self.sync.failures
        try:
            await ublk.uring_fallocate(fd, mode, place, length)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        for at, count in pieces(offset, length):
            await moved(self.store, at, ublk.zeroes(count))
        self.sync.check(failures)  # of what was told meanwhile no later flush tells

    async def call(self, name: str, offset: int, length: int) -> None:
        """Discard; nothing else depends on the backing."""
        import asyncio

        if self.is_block:  # in a thread, for a device takes its time
            await asyncio.to_thread(self._discard_blocks, offset, length)
        else:
            await ublk.uring_fallocate(self.fd, HOLE, offset, length)

    def _discard_blocks(self, offset: int, length: int) -> None:
        place = struct.pack("=QQ", offset, length)
        fcntl.ioctl(self.fd, BLKDISCARD, place)

    def _can_discard(self) -> bool:
        """Try it where there is nothing to lose: beyond the end, or (a device) at an odd place."""
        try:
            if self.is_block:
                self._discard_blocks(1, ublk.SECTOR)
            else:
                fallocate(self.fd, HOLE, self.size, PAGE_SIZE)
        except OSError as error:
            is_odd = error.errno == errno.EINVAL
            return is_odd and self.is_block
        return True

    def resized(self, size: int) -> None:
        """Let a file grow with its disk; it is never cut, for that would lose data."""
        there = os.lseek(self.fd, 0, os.SEEK_END)
        refuse(
            self.is_block and size > there,
            self.path,
            f"a device of {there} bytes, not {size}",
            "make that one larger first",
        )
        if size > there:
            os.ftruncate(self.fd, size)
        self.size = size


def is_block(path: str) -> bool:
    """Tell a block device from a file; raise UblkError for what is neither."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    refuse(
        kind not in (stat.S_IFBLK, stat.S_IFREG),
        path,
        "neither a file nor a block device",
    )
    return kind == stat.S_IFBLK


def patiently(call: Callable[[], Any]) -> Any:
    """Call, and again while a server that was killed a moment ago still has what is wanted."""
    deadline = time.monotonic() + ublk.LAST_BREATH
    while True:
        try:
            return call()
        except OSError as error:
            passes = error.errno in (errno.EAGAIN, errno.EBUSY)
            if not passes or time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def open_backing(
    path: str,
    flags: int = 0,
    read_only: bool = False,
) -> tuple[int, bool]:
    """Open a file or block device; return its descriptor and whether it is only for reading.

    A device to be written to is taken exclusively, so that nobody mounts it
    meanwhile.
    """
    to_write = flags | os.O_RDWR
    if is_block(path):
        to_write |= os.O_EXCL
    if not read_only:
        try:
            fd = patiently(lambda: os.open(path, to_write))
            return fd, False
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    return os.open(path, flags | os.O_RDONLY), True


def claim(fd: int, path: str, read_only: bool = False) -> None:
    """Take a file or device for one server, or for any number that only read it, while it is open.

    Raises UblkError (EBUSY) where another server uses it.
    """
    how = fcntl.LOCK_SH if read_only else fcntl.LOCK_EX
    how |= fcntl.LOCK_NB
    try:
        patiently(lambda: fcntl.flock(fd, how))
    except BlockingIOError:
        raise ublk.UblkError(
            errno.EBUSY,
            path,
            "another server uses it",
            "end that first",
        ) from None


# linux/stat.h, linux/fcntl.h
STATX_DIOALIGN = 0x2000
STATX_DIO_READ_ALIGN = 0x20000
AT_EMPTY_PATH = 0x1000
# stx_dio_mem_align, stx_dio_offset_align, stx_dio_read_offset_align of struct statx
STATX = struct.Struct("=152xII20xI72x")


def direct_units(fd: int) -> tuple[int, int]:
    """Return of what memory for direct transfers to a file must be a multiple, and of what their place.

    Where nobody tells, that is 0, and a page. The place is that of reads, where
    they differ: a write between goes through the page cache, for as long as XFS
    has the file share blocks with a copy. The disk has its blocks for good.
    """
    status = ctypes.create_string_buffer(STATX.size)
    if hasattr(LIBC, "statx"):
        LIBC.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN | STATX_DIO_READ_ALIGN, status)
    memory, place, reads = STATX.unpack(status.raw)
    return memory, reads or place or PAGE_SIZE


# =================================================================================================
# Disks of several files
# =================================================================================================


async def moved(handler: Any, *args: Any) -> None:
    """Have a target's handler, coroutine or not, serve a request to its end, as a queue does."""
    if len(args) == 2 and not isinstance(args[1], int):
        await ublk.transfer(handler, handler(*args), *args)
        return
    if len(args) == 3 and not ublk.takes_unmap(handler):
        args = args[:2]
    outcome = await ublk.end_of(handler(*args))
    ublk.succeeded(handler, outcome)


def extent(args: Sequence[Any]) -> tuple[int, int]:
    """Return offset and length of a request, from what its handler is called with."""
    offset, what = (*args, 0, 0)[:2]
    if isinstance(what, int):
        return offset, what
    return offset, len(what)


# What a target may define: handlers of requests, and all else
CHANGES = ("write", "write_fua", "flush", "discard", "write_zeroes")
WITH_DATA = CHANGES[:2]
TRANSFERS = ("read", *WITH_DATA)  # of which a handler may do but a part at a time
HANDLERS = [name for name in ublk.HANDLERS if name != "report_zones"]
DEFAULTS = [name for name in vars(ublk.Target) if name[0] != "_"]
# Memory of clients need not suit a target below another, which gets that one's own
DEFAULTS.remove("dma_alignment")
# The rest
PROPERTIES = (
    *DEFAULTS,
    "zone_size",
    "max_open_zones",
    "max_active_zones",
    "max_append",
    "resized",
    "start",
    "close",
)


def defines(target: object, name: str, base: type) -> bool:
    """Tell whether a target's class has that of its own, not from base."""
    return getattr(type(target), name, None) is not getattr(base, name, None)


class Over:
    """A part of targets over others: they serve the requests that all of these do.

    A subclass's own handler goes on with super(), or with call(name, ...) for what they may not offer.
    """

    call: Any  # gets a handler's name and its arguments, returns what it would

    def offer(self, *targets: ublk.Target) -> None:
        """Have call() serve the requests that all of the targets serve."""
        self.offers = [
            name for name in HANDLERS if all(ublk.serves(below, name) for below in targets)
        ]


def distinct(paths: Sequence[str]) -> Sequence[str]:
    """Return the files of a disk; raise UblkError where one is named twice."""
    files = {os.path.realpath(path) for path in paths}
    refuse(
        len(files) < len(paths),
        " ".join(paths),
        "one file or device is named twice",
    )
    return paths


class Stripe(Over, Mapped, ublk.Target):
    """Spread a disk over several files or block devices, chunk by chunk (RAID 0).

    The kernel lets no read or write cross from one chunk into the next, so each goes to one file.

    paths: the files or block devices
    chunk: how much lies on one before it goes on on the next
    direct: transfer around the page cache (O_DIRECT)
    read_only: open them for reading only
    """

    flush: Any = Offered("flush")
    discard: Any = Offered("discard")
    write_zeroes: Any = Offered("write_zeroes")

    def __init__(
        self,
        *paths: str,
        chunk: ublk.Size = ublk.Size(64 << 10),
        direct: bool = False,
        read_only: bool = False,
    ) -> None:
        legs = self.legs = [
            Loop(path, direct=direct, read_only=read_only) for path in distinct(paths)
        ]
        self.files = paths
        self.boundary = chunk
        self.block_size = max(leg.block_size for leg in legs)
        self.dma_alignment = max(leg.dma_alignment for leg in legs)
        refuse(
            chunk <= 0 or chunk % self.block_size,
            f"chunk of {chunk} bytes",
            f"not a multiple of the block size {self.block_size}",
        )
        least = min(legs, key=lambda leg: leg.size)
        refuse(
            least.size < chunk,
            least.path,
            f"smaller than a chunk of {chunk} bytes",
        )
        self.size = least.size // chunk * chunk * len(legs)
        self.read_only = any(leg.read_only for leg in legs)
        self.offer(*legs)

    def before(self, leg: int, offset: int) -> int:
        """Return how much of what lies before a byte of the disk is on one leg."""
        chunk = self.boundary
        row, within = divmod(offset, chunk * len(self.legs))
        more = within - leg * chunk
        more = min(max(more, 0), chunk)
        return row * chunk + more

    def spans(self, offset: int, length: int) -> Iterator[tuple[Loop, int, int]]:
        """Yield (leg, offset there, length) for a longer range, of which each leg has one piece."""
        for number, leg in enumerate(self.legs):
            start = self.before(number, offset)
            end = self.before(number, offset + length)
            if start < end:
                yield leg, start, end - start

    def place(self, offset: int) -> tuple[Loop, int]:
        """Return the leg that has a byte of the disk, and where in it that lies."""
        number = offset // self.boundary % len(self.legs)
        return self.legs[number], self.before(number, offset)

    def map(
        self,
        offset: int,
        length: int,
        write: bool,
    ) -> tuple[int, int]:
        leg, at = self.place(offset)
        return leg.fd, at

    async def write_fua(self, offset: int, buffer: memoryview) -> None:
        leg, at = self.place(offset)
        await leg.write_fua(at, buffer)

    async def call(self, name: str, *args: Any) -> None:
        """Have all legs flush, and those that it touches serve another request, until all have ended."""
        import asyncio

        if name == "flush":
            work = [leg.flush() for leg in self.legs]
        else:
            offset, length, *how = args
            spans = self.spans(offset, length)
            work = [getattr(leg, name)(at, count, *how) for leg, at, count in spans]
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def resized(self, size: int) -> None:
        row = self.boundary * len(self.legs)
        rows = -(-size // row)
        for leg in self.legs:  # whole rows, or the next server would find fewer
            leg.resized(rows * self.boundary)
        self.size = rows * row

    def close(self) -> None:
        for leg in self.legs:
            leg.close()

    disown = close


def make_file(path: str, header: bytes, size: int) -> None:
    """Make a file of this size that begins with a header, where there is none or an empty one."""
    is_there = os.path.exists(path)
    refuse(is_there and is_block(path), path, "not a file")
    with open(path, "r+b" if is_there else "ab") as file:
        claim(file.fileno(), path)
        if not os.path.getsize(path):
            file.write(header)
            file.truncate(size)
            os.fsync(file.fileno())  # or a loss of power could leave one that is nothing


class Sealed:
    """A structure in a file: a magic, values, and a CRC-32 of all this."""

    def __init__(self, magic: bytes, values: str, what: str) -> None:
        self.magic = magic
        self.what = what
        self.struct = struct.Struct(f"<{len(magic)}s{values}")
        self.size = self.struct.size + 4

    def pack(self, *values: Any) -> bytes:
        data = self.struct.pack(self.magic, *values)
        checksum = zlib.crc32(data)
        return data + checksum.to_bytes(4, "little")

    def unpack(self, data: bytes) -> tuple[Any, ...]:
        """Return the values; none where data is damaged, or something else."""
        if len(data) < self.size:
            return ()
        values = self.struct.unpack(data[:-4])[1:]
        if data != self.pack(*values):
            return ()
        return values

    def read(self, fd: int, path: str) -> tuple[Any, ...]:
        """Return the values at the beginning of a file; raise UblkError where there are none."""
        data = os.pread(fd, self.size, 0)
        values = self.unpack(data)
        refuse(not values, path, f"not {self.what}, or a damaged one")
        return values


# Size, block size and fingerprint of the base, boot id
COW_HEADER = Sealed(b"ublkcow2", "QQI36s", "an overlay")
COW_UNIT = 64 << 10  # header and marks fill whole pages of any machine
MARKS_AT = COW_UNIT
# marks of blocks: see Cow
BASE = b"\0"
OURS = b"\1"
KEPT = b"\2"


def boot_id() -> bytes:
    """Return what the machine has another of each time that it is started."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(36)


def fingerprint(fd: int, size: int) -> int:
    """Return a checksum, never 0, of what file systems keep at known places, and of some blocks."""
    end = max(size - COW_UNIT, 0)
    known = [(0, 132 << 10), (end, COW_UNIT)]
    others = [(size // 64 * number, 4096) for number in range(64)]
    checksum = 0
    for offset, length in known + others:
        data = read_all(fd, length, offset)
        checksum = zlib.crc32(data, checksum)
    return checksum or 1


class Cow(ublk.Target):
    """A writable overlay over a base that stays as it is (copy on write).

    What is written goes to the same place of the overlay, a sparse file, and then the block's mark,
    a byte, becomes OURS. Data first, mark second: no kill can make a block of garbage visible. As a
    loss of power may reorder the two, OURS counts only until the machine is started anew. A flush
    makes the data durable and then the marks KEPT, which count for ever. No mark ever goes back:
    zeroes and discarded blocks become holes of the overlay.

    base: the file or block device that is read
    overlay: the file that takes the changes; made if it is not there; delete it to discard them
    commit: first write the changes of earlier times into the base, and start with none
    any_base: take the base though it is not as it was when the overlay was made
    read_only: open both for reading only
    """

    once = ("--commit", "--any-base")  # what a server that recovers the disk does not do again

    def __init__(
        self,
        base: str,
        overlay: str,
        *,
        commit: bool = False,
        any_base: bool = False,
        read_only: bool = False,
    ) -> None:
        self.files = distinct([base, overlay])
        self.below = Loop(base, read_only=read_only or not commit)
        refuse(
            commit and self.below.read_only,
            base,
            "it cannot be written to",
            "leave --commit out",
        )
        self.size = self.below.size
        self.block_size = self.below.block_size
        self.grain = self.block_size
        blocks = self.size // self.grain
        units = -(-blocks // COW_UNIT)
        self.data_at = MARKS_AT + units * COW_UNIT
        if not read_only:
            make_file(overlay, b"", self.data_at + self.size)
        self.top = Loop(overlay, read_only=read_only)
        self.path = overlay
        self.read_only = read_only
        self.lost = False  # what is marked OURS counts for nothing
        self.lock = threading.Lock()
        self.fresh: set[tuple[int, int]] = set()  # blocks, from and to, that are to be KEPT
        # How many syncs had failed when all marks were written last
        self.renewed = -1
        self._open(any_base)
        if commit:
            self._commit()

    def _open(self, any_base: bool) -> None:
        """Check the overlay's header, or write a new one, and settle what became of blocks OURS."""
        boot = boot_id()
        last_boot = b""
        size = self.size
        grain = self.grain
        seen = found = fingerprint(self.below.fd, size)
        # For what the disk has: a start that failed may have left another in the page cache
        os.posix_fadvise(self.top.fd, 0, MARKS_AT, os.POSIX_FADV_DONTNEED)
        # Else it is new, or was killed as it was made; what begins with zeroes may be a disk of the user's
        head = os.pread(self.top.fd, COW_HEADER.size, 0)
        if any(head) or self.top.size != self.data_at + size:
            size, grain, seen, last_boot = COW_HEADER.read(self.top.fd, self.path)
        refuse(
            (size, grain) != (self.size, self.grain),
            self.path,
            f"made for a base of {size} bytes in "
            f"blocks of {grain}, this one has {self.size} in {self.grain}",
            "name its own base",
        )
        refuse(
            self.top.size != self.data_at + size,
            self.path,
            "its end is missing",
            "restore or delete it",
        )
        refuse(
            seen not in (0, found) and not any_base,
            self.path,
            "its base has changed since",
            "restore that, or take --any-base",
        )
        self.lost = last_boot != boot
        if self.read_only:
            return
        if self.lost or not seen:  # or other marks, as a commit may, too
            os.posix_fadvise(self.top.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self.lost:
            self._renew()
            self.lost = False
        if not seen:  # a commit was killed: the seal is to be of what lasts
            os.fsync(self.below.fd)
            os.posix_fadvise(self.below.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            found = fingerprint(self.below.fd, size)
        if (seen, last_boot) != (found, boot):
            self._seal(found)

    def _seal(self, seen: int) -> None:
        """Write the header, durably, with the fingerprint of the base; 0 means any."""
        header = COW_HEADER.pack(self.size, self.grain, seen, boot_id())
        os.fsync(self.top.fd)  # first what it tells of
        write_through(self.top.fd, header, 0)

    # ---- which blocks the overlay has --------------------------------------------------------------

    def blocks(self, offset: int, length: int) -> slice:
        """Return which blocks these are; a disk that was made larger has none behind the base's end."""
        if offset + length > self.size:
            raise OSError(errno.EIO, "behind the end of the base")
        start = offset // self.grain
        return slice(start, start + length // self.grain)

    def runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        """Cut a range into (whether the overlay has it, offset, length)."""
        marks = self._marks(self.blocks(offset, length))
        for run in re.finditer(b"\0+|[^\0]+", marks):
            ours = run[0][:1] != BASE
            at = offset + run.start() * self.grain
            yield ours, at, len(run[0]) * self.grain

    def _marks(self, blocks: slice) -> bytes:
        """Return the marks of blocks. A mapping would be quicker, and kill us: a full tmpfs has no page
        to show for a hole, not even for reading."""
        count = blocks.stop - blocks.start
        marks = read_all(self.top.fd, count, MARKS_AT + blocks.start)
        if len(marks) < count:
            raise OSError(errno.EIO, "the overlay's end is missing")
        if self.lost:
            marks = marks.replace(OURS, BASE)
        return marks

    def _mark(self, blocks: slice) -> None:
        """Note that the overlay has these blocks."""
        with self.lock:
            self._renew()
            marks = self._marks(blocks)
            if BASE not in marks:
                return
            marks = marks.replace(BASE, OURS)
            start = blocks.start
            while marks:  # where there is no room for all, flush() is to know of the others
                count = os.pwrite(self.top.fd, marks, MARKS_AT + start)
                self.fresh.add((start, start + count))
                start += count
                marks = marks[count:]

    def _renew(self) -> None:
        """Write the marks again that are found, and once more behind each sync that failed.

        Else the page cache alone might have them, and drop them: no write or
        flush relies on a mark that it could not hear of being lost.
        """
        failures = self.top.sync.failures
        if self.read_only or self.renewed == failures:
            return
        self.fresh.clear()
        unmarked = bytes(4096)
        for at in range(MARKS_AT, self.data_at, len(unmarked)):
            marks = read_all(self.top.fd, len(unmarked), at)
            if marks == unmarked:  # maybe a hole, and there may be no room to fill it
                continue
            if self.lost:
                marks = marks.replace(OURS, BASE)
            first = at - MARKS_AT
            for run in re.finditer(OURS + b"+", marks):
                self.fresh.add((first + run.start(), first + run.end()))
            write_all(self.top.fd, marks, at)
        self.renewed = failures

    def _unkept(self) -> set[tuple[int, int]]:
        """Return the blocks that are to be KEPT."""
        with self.lock:
            self._renew()
            return self.fresh.copy()

    def _keep(self, fresh: set[tuple[int, int]]) -> None:
        """Note that blocks of the overlay are durable."""
        with self.lock:
            for start, stop in fresh:
                marks = KEPT * (stop - start)
                write_all(self.top.fd, marks, MARKS_AT + start)

    # ---- requests --------------------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> None:
        for ours, at, length in self.runs(offset, len(buffer)):
            piece = buffer[at - offset :][:length]
            if ours:
                await moved(self.top.fetch, self.data_at + at, piece)
            else:
                await moved(self.below.fetch, at, piece)

    async def write(self, offset: int, buffer: memoryview) -> None:
        await self._change(
            lambda place: moved(self.top.write, place, buffer), offset, len(buffer)
        )

    async def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        await self._change(
            lambda place: self.top.write_zeroes(place, length, unmap), offset, length
        )

    discard = write_zeroes

    async def write_fua(self, offset: int, buffer: memoryview) -> None:
        failures = self.top.sync.failures
        # A subclass's own may do again what its write_fua() has done
        await Cow.write(self, offset, buffer)
        await self._settle(failures, partial(self.top.sync, failures))

    async def flush(self) -> None:
        await self._settle(self.top.sync.failures, self.top.flush)

    async def _change(self, change: Callable[[int], Any], offset: int, length: int) -> None:
        """Have blocks of the overlay change, and note that it has them."""
        blocks = self.blocks(offset, length)
        failures = self.top.sync.failures
        await change(self.data_at + offset)
        self._mark(blocks)
        self.top.sync.check(failures)

    async def _settle(self, failures: int, sync: Callable[[], Any]) -> None:
        """Have the blocks there are be durable, then that they are the overlay's."""
        fresh = self._unkept()
        await sync()
        self._keep(fresh)
        # Another queue's may have failed, and a flush told of it, since
        await self.top.sync(failures)
        with self.lock:  # no sooner: a flush beside this one must do them, too
            self.fresh -= fresh

    def _commit(self) -> None:
        """Copy the overlay into the base. Killed at any moment, it can be done again."""
        self._seal(0)
        for at, count in pieces(0, self.size):
            for ours, start, length in self.runs(at, count):
                if ours:
                    data = read_all(self.top.fd, length, self.data_at + start)
                    write_all(self.below.fd, data, start)
        os.fsync(self.below.fd)
        # The marks first: a block without one is the base's
        clear(self.top.fd, MARKS_AT, self.data_at - MARKS_AT)
        os.fsync(self.top.fd)
        clear(self.top.fd, self.data_at, self.size)
        seen = fingerprint(self.below.fd, self.size)
        self._seal(seen)

    def close(self) -> None:
        try:
            fresh = self._unkept()
            os.fdatasync(self.top.fd)
            self._keep(fresh)
            os.fdatasync(self.top.fd)
        finally:
            self.disown()

    def disown(self) -> None:
        self.top.close()
        self.below.close()


# =================================================================================================
# Targets over another target
# =================================================================================================


class Wrapper(Over):
    """A part of targets over one other: they offer what it offers, but for what their class defines."""

    size: Any = property(lambda self: self.target.size)
    block_size: Any = property(
        lambda self: self.target.block_size,
        lambda self, size: setattr(self.target, "block_size", size),
    )
    report_zones: Any = property(lambda self: self.target.report_zones)

    def __init__(self, target: ublk.Target) -> None:
        self.target = target
        for name in PROPERTIES:
            if hasattr(target, name) and not defines(self, name, ublk.Target):
                setattr(self, name, getattr(target, name))
        self.offer(target)

    async def call(self, name: str, *args: Any) -> Any:
        """Have the target serve a request, to its end."""
        if not ublk.serves(self.target, name):  # as a subclass's own handler may ask for
            if name == "write_fua":  # a write is durable by a flush, too
                await Wrapper.call(self, "write", *args)
                if ublk.serves(self.target, "flush"):  # or its writes are durable as they end
                    await Wrapper.call(self, "flush")
                return None
            raise OSError(errno.EOPNOTSUPP, f"{name}: the target below does not offer it")
        handler = getattr(self.target, name)
        if name == "zone_append":
            return await ublk.end_of(handler(*args))
        return await moved(handler, *args)

    def disown(self) -> None:
        getattr(self.target, "disown", bool)()


for name in HANDLERS:
    setattr(Wrapper, name, Offered(name))


def refuse_more_than_data(what: str, target: ublk.Target) -> None:
    """Raise UblkError for a disk that has zones or metadata."""
    more = hasattr(target, "zone_size") or target.metadata_size
    refuse(more, what, "not for a disk with zones or metadata")


def chance(*what: Any) -> float:
    """Draw a number from 0 to below 1, at random, but always the same for the same things."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / (1 << 48)


EVERYWHERE = (0, sys.maxsize)


class Fault(Wrapper, ublk.Target):
    """Make another target fail, stall, lie or corrupt.

    What happens: --error, --delay, --jitter, --torn, --lost, --flip, --astray, --hang. When: --on,
    --range, --after, --rate or --bad-sectors, --skip, --count; a request must pass them all. Several
    faults are wrapped in each other: ``fault --on read --error EIO --rate 0.01 fault --delay 5ms
    loop disk.img``. A disk that is full after 100M: ``fault --on write --after 100M --error
    ENOSPC``; bad sectors: ``fault --bad-sectors --rate 0.001 --error EIO``.

    on: operations, with commas between: read, write, flush, discard, write_zeroes (all of them)
    range: only requests that touch this sector or these bytes, such as 1M or 1M-2M
    after: only once so many bytes were written
    rate: only this share of the requests, at random
    bad_sectors: that share of the sectors is bad, each until it is written: what reads one is struck
    skip: let so many pass first
    count: strike only so many, then all is well (0: no end)
    error: fail with this errno, such as EIO
    delay: take so much longer, such as 10ms
    jitter: and up to so much more, at random
    torn: of a write, do only a part from its beginning, at random
    lost: report success and do nothing: a flush that lies, a write that never happened
    flip: of what is read or written, flip so many bits, at random
    astray: read or write at another place of the disk, at random
    hang: wait until --control says otherwise
    control: a file that may appear and change meanwhile: its words replace all options above
    seed: makes the same random choices again, in whatever order requests come
    target: the target that is to fail, with its own arguments
    """

    def __init__(
        self,
        target: ublk.Target,
        *,
        on: str = "",
        range: str = "",
        after: ublk.Size = ublk.Size(0),
        rate: float = 1.0,
        bad_sectors: bool = False,
        skip: int = 0,
        count: int = 0,
        error: str = "",
        delay: str = "0",
        jitter: str = "0",
        torn: bool = False,
        lost: bool = False,
        flip: int = 0,
        astray: bool = False,
        hang: bool = False,
        control: str = "",
        seed: int = 1,
    ) -> None:
        super().__init__(target)
        if bad_sectors:
            on = on or "read"
        self.on = on.split(",") if on else HANDLERS
        for name in self.on:
            ublk.pick(dict.fromkeys(HANDLERS), "--on", name)
        refuse(
            error and not isinstance(getattr(errno, error, None), int),
            f"--error {error}",
            "there is no such errno",
        )
        refuse(
            not 0 <= rate <= 1,
            f"--rate {rate}",
            "not a share from 0 to 1",
            "write 0.01 for one in 100",
        )
        refuse(min(skip, count, flip) < 0, "--skip, --count, --flip", "less than 0")
        self.range = span(range) if range else EVERYWHERE
        self.after = after
        self.rate = rate
        self.bad_sectors = bad_sectors
        self.turns = itertools.count(-skip)
        self.count = count or sys.maxsize
        self.error = getattr(errno, error, 0)
        self.delay = seconds(delay)
        self.jitter = seconds(jitter)
        self.torn = torn
        self.lost = lost
        self.flip = flip
        self.astray = astray
        self.hang = hang
        self.control = os.path.abspath(control) if control else ""
        self.seed = seed
        self.seen: Any = None  # what the control file was when it was last read
        self.rule = self  # whose options hold; another's once there are other words
        self.lock = threading.Lock()
        # What has happened since these options hold
        self.written = 0
        self.healed: set[int] = set()  # offsets of sectors
        self.chancy = rate < 1 or self.jitter or torn or flip or astray
        self.asked: Counter[Any] = Counter()  # how often for what, if that matters

    def match(
        self,
        name: str,
        offset: int,
        length: int,
        data: memoryview | None,
    ) -> bool:
        """Tell whether this request is to be struck, if the options say so; to be overridden.

        data: what is written, or what a read would find.
        """
        return True

    def change(self, words: str) -> None:
        """Have these words replace the options, from the next request on. Raises UblkError."""
        parser = ublk.target_parser(Fault, "fault")
        try:
            read = vars(parser.parse_args(shlex.split(words)))
        except (ValueError, SystemExit):
            raise wrong(f"fault {words}", "nobody understands this") from None
        refuse(read.pop("target"), f"fault {words}", "not all are options", "name only these")
        given = {name: value for name, value in read.items() if value is not None}
        self.rule = Fault(self.target, **{"seed": self.seed, **given})

    async def call(self, name: str, *args: Any) -> Any:
        self.look()
        rule = self.rule
        if rule.concerns(name, args) and await self.matches(name, args):
            draw = rule.draw(name, *extent(args))
            if draw:
                return await self.strike(rule, draw, name, args)
        return await self.serve(rule, name, args)

    def concerns(self, name: str, args: Any) -> bool:
        """Tell whether the options are for such a request."""
        names = {name, name.replace("_fua", "")}
        if self.written < self.after or names.isdisjoint(self.on):
            return False
        if not args:  # a flush is of no range
            return self.range is EVERYWHERE
        offset, length = extent(args)
        start, end = self.range
        return offset < end and offset + max(length, ublk.SECTOR) > start

    async def matches(self, name: str, args: Any) -> bool:
        """Ask match(), which is to see what a read finds."""
        if name == "read" and defines(self, "match", Fault):
            await super().call(name, *args)
        data = args[1] if name in TRANSFERS else None
        return self.match(name, *extent(args), data)

    def draw(self, name: str, offset: int, length: int) -> Any:
        """Return what draws a request's numbers; nothing where chance spares it."""
        what = name.replace("_fua", ""), offset
        with self.lock:
            if self.chancy:
                self.asked[what] += 1
            draw = partial(chance, self.seed, *what, self.asked[what])
        if self.bad_sectors:
            hit: Any = self.bad(offset, length)
        else:
            hit = draw("rate") < self.rate
        if hit and 0 <= next(self.turns) < self.count:
            return draw
        return None

    def bad(self, offset: int, length: int) -> list[int]:
        """Return where the bad sectors of a range are."""
        start, end = self.range
        first = max(offset, start - start % self.block_size)
        sectors = range(first, min(offset + length, end), self.block_size)
        there = [at for at in sectors if at not in self.healed]
        return [at for at in there if chance(self.seed, at) < self.rate]

    async def serve(
        self,
        rule: Fault,
        name: str,
        args: Any,
    ) -> Any:
        """Have the target serve a request; note what was written."""
        result = await super().call(name, *args)
        offset, length = extent(args)
        if name in (*WITH_DATA, "zone_append"):
            with rule.lock:
                rule.written += length
        if rule.bad_sectors and name in (*WITH_DATA, "write_zeroes"):
            rule.healed.update(rule.bad(offset, length))
        return result

    async def strike(
        self,
        rule: Fault,
        draw: Any,
        name: str,
        args: Any,
    ) -> Any:
        """Serve a request late, in part, elsewhere, corrupted, not at all or with an error."""
        import asyncio

        pause = rule.delay + rule.jitter * draw("jitter")
        if pause:
            await asyncio.sleep(pause)
        hangs = rule.hang
        while hangs:
            await asyncio.sleep(0.05)
            self.look()
            hangs = self.rule.hang and self.rule.concerns(name, args)
        lost = rule.lost and name not in ("read", "zone_append")  # which have a result
        idle = lost or rule.error
        if rule.torn and name in WITH_DATA:
            offset, buffer = args
            blocks = len(buffer) // self.block_size
            blocks = int(blocks * draw("torn"))
            args = offset, buffer[: blocks * self.block_size]
            idle = not blocks
        result = None
        if not idle:
            if name in TRANSFERS:
                args = rule.spoil(draw, name, *args)
            result = await self.serve(rule, name, args)
            if name == "read":
                rule.flip_bits(draw, args[1])
        if rule.error:
            raise OSError(rule.error, os.strerror(rule.error))
        return result

    def spoil(
        self,
        draw: Any,
        name: str,
        offset: int,
        buffer: memoryview,
    ) -> Any:
        """Return where a transfer goes instead, and with what."""
        if self.astray:
            unit = self.boundary or self.block_size
            own, inside = divmod(offset, unit)
            last = (self.size - inside - len(buffer)) // unit
            step = 1 + int(draw("astray") * last)
            own = (own + step) % (last + 1)
            offset = own * unit + inside
        if self.flip and name != "read":
            buffer = aligned(buffer)
            self.flip_bits(draw, buffer)
        return offset, buffer

    def flip_bits(self, draw: Any, buffer: memoryview) -> None:
        """Make some bits of a buffer wrong, if that is wished for."""
        for number in range(self.flip):
            bit = int(draw("flip", number) * len(buffer) * 8)
            buffer[bit // 8] ^= 1 << bit % 8

    def look(self) -> None:
        """Take the options from the control file when that has changed."""
        if not self.control:
            return
        with self.lock:
            seen: Any = None
            with suppress(FileNotFoundError), open(self.control, "rb") as file:
                # The same words may be written again
                seen = os.fstat(file.fileno()).st_mtime_ns, file.read(4096)
            if seen == self.seen:
                return
            self.seen = seen
            if seen is None:
                self.rule = self
                return
            try:
                self.change(os.fsdecode(seen[1]))
            except ublk.UblkError as error:
                ublk.say(f"{self.control} is ignored: {error}")


class Cache(Wrapper, ublk.Target):
    """Keep what is written to another target in memory until a flush, as a drive with a cache does.

    A server that is killed has lost it; and a power cut is the file --cut: where it appears, what
    was not flushed is lost, but the disk goes on. Its clients should not: with ``fault`` above it,
    their requests fail meanwhile. A server that ends well flushes.

    cache_size: how much to keep; before there is more, all is written to the target
    cut: a file that may appear; it is removed once the next request has found it
    target: the target that has what is durable, with its own arguments
    """

    # For what its write() does
    write_fua: Any = Offered("write_fua")
    write_zeroes: Any = Offered("write_zeroes")

    def __init__(
        self,
        target: ublk.Target,
        *,
        cache_size: ublk.Size = ublk.Size(64 << 20),
        cut: str = "",
    ) -> None:
        super().__init__(target)
        refuse_more_than_data("cache", target)
        self.cache_size = cache_size
        self.cut_file = os.path.abspath(cut) if cut else ""
        self.blocks: dict[int, bytes] = {}  # by their offsets
        self.changing = ublk.Turns()  # of who changes the target
        self.lock = threading.RLock()

    def cut(self) -> None:
        """Lose what is not durable. Any thread may call it, also a handler."""
        with self.lock:
            self.blocks = {}

    def look(self) -> None:
        """Cut the power where there is the file that says so."""
        if self.cut_file:
            with self.lock:
                if os.path.exists(self.cut_file):
                    self.cut()
                    os.unlink(self.cut_file)

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.look()
        newer = self.kept(offset, len(buffer))  # before a flush beside us forgets it
        if len(newer) * self.block_size < len(buffer):
            await super().call("read", offset, buffer)
        for at, data in newer.items():
            buffer[at - offset :][: self.block_size] = data

    async def write(self, offset: int, buffer: memoryview) -> None:
        self.look()
        kept = len(self.blocks) * self.block_size
        if kept + len(buffer) > self.cache_size:
            await self.write_back()
        with self.lock:  # or forget() could take it for what was there
            for at in range(0, len(buffer), self.block_size):
                block = buffer[at : at + self.block_size]
                self.blocks[offset + at] = bytes(block)

    async def flush(self) -> None:
        self.look()
        await self.write_back()

    def resized(self, size: int) -> None:
        behind = self.kept(size, self.size)
        ublk.fit(self.target, size)
        self.forget(behind)  # for the target has no place there

    async def call(self, name: str, *args: Any) -> Any:
        """Have the target do at once what is no plain write: in place of what is older."""
        if name in ("read", "write", "flush"):  # as a subclass's own handler may ask for
            return await getattr(Cache, name)(self, *args)
        self.look()
        async with self.changing.take():
            older = self.kept(*extent(args))
            await super().call(name, *args)
            if name == "write_zeroes":  # else a write that finds no room could hear of a loss
                await self.settle()
            self.forget(older)

    async def write_back(self) -> None:
        """Write all blocks to the target, durably."""
        before_a_cut = self.blocks
        async with self.changing.take():
            blocks = before_a_cut.copy()
            for offsets in self.runs(blocks):
                if self.blocks is not before_a_cut:
                    raise OSError(errno.EIO, "the power was cut")
                data = b"".join(blocks[at] for at in offsets)
                await super().call("write", offsets[0], aligned(data))
            await self.settle()
            self.forget(blocks)  # no sooner: what fails is done again

    async def settle(self) -> None:
        """Make durable what the target was told."""
        if hasattr(self.target, "flush"):
            await super().call("flush")

    def runs(self, blocks: dict[int, bytes]) -> Iterator[list[int]]:
        """Yield the offsets of blocks that make one write: they lie side by side."""
        run: list[int] = []
        boundary = self.boundary or PIECE
        for at in sorted(blocks):
            ends = at % PIECE == 0 or at % boundary == 0
            if run and (ends or at > run[-1] + self.block_size):
                yield run
                run = []
            run.append(at)
        if run:
            yield run

    def kept(self, offset: int, length: int) -> dict[int, bytes]:
        """Return the blocks of a range that are here."""
        places = range(offset, offset + length, self.block_size)
        with self.lock:
            blocks = self.blocks
            # A discard may be of more places than there are blocks
            fewer: Any = min(places, blocks, key=len)
            there = [at for at in fewer if at in places and at in blocks]
            return {at: blocks[at] for at in there}

    def forget(self, blocks: dict[int, bytes]) -> None:
        """Keep these no longer, but what has been written since."""
        with self.lock:
            for at, data in blocks.items():
                if self.blocks.get(at) is data:
                    self.blocks.pop(at, None)  # or cut() has

    async def close(self) -> None:
        import asyncio

        flush = asyncio.create_task(moved(self.flush))
        try:
            ended, _ = await asyncio.wait([flush], timeout=ublk.STOP_TIMEOUT)
            if not ended:  # nor is its end awaited: the kernel may do nothing for ever
                flush.cancel()
                lost = "the target does not take what is kept"
                raise OSError(errno.ETIMEDOUT, lost)
            flush.result()
        finally:
            close = getattr(self.target, "close", bool)
            await ublk.end_of(close())


def span(text: str) -> tuple[int, int]:
    """Read a range of bytes such as 1M-2M, or the place of one sector. Raises UblkError."""
    first, _, last = text.partition("-")
    start = end = 0
    with suppress(ValueError):
        start = ublk.parse_size(first)
        end = ublk.parse_size(last) if last else start + ublk.SECTOR
    refuse(
        start >= end,
        f"--range {text}",
        "not a range of bytes",
        "write 1M-2M, or 1M for a sector",
    )
    return start, end


UNITS = {"ms": 1e-3, "us": 1e-6}


def seconds(text: str) -> float:
    """Read a time such as 10ms, 200us, 1.5s or 2 (seconds). Raises UblkError."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)(ms|us|s|)", text)
    if not found:
        raise wrong(f"time {text}", "not a number with ms, us or s", "write 10ms or 1.5s")
    return float(found[1]) * UNITS.get(found[2], 1.0)


# =================================================================================================
# Disks of other machines
# =================================================================================================

# The NBD protocol: github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
NBD_OPTION_MAGIC = 0x49484156454F5054
NBD_OPTION_REPLY_MAGIC = 0x3E889045565A9
NBD_OPT_EXPORT_NAME = 1
NBD_OPT_STARTTLS = 5
NBD_OPT_GO = 7
NBD_REP_ACK = 1
NBD_REP_ERROR = 1 << 31
NBD_REP_ERR_UNSUP = NBD_REP_ERROR | 1
NBD_REFUSALS = {
    NBD_REP_ERROR | 5: "the server demands TLS, so write nbds: for nbd:",
    NBD_REP_ERROR | 6: "there is no such export",
}
NBD_INFO_EXPORT = 0
NBD_INFO_BLOCK_SIZE = 3
NBD_FLAG_READ_ONLY = 1 << 1
NBD_FLAG_SEND_FLUSH = 1 << 2
NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_TRIM = range(5)
NBD_CMD_WRITE_ZEROES = 6
NBD_CMD_FLAG_FUA = 1
NBD_CMD_FLAG_NO_HOLE = 2
# What a server may offer: the handler, the bit of its flags that says so,
# command and flag to ask for it
NBD_OFFERS = {
    "flush": (NBD_FLAG_SEND_FLUSH, NBD_CMD_FLUSH, 0),
    "write_fua": (1 << 3, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA),
    "discard": (1 << 5, NBD_CMD_TRIM, 0),
    # Discards are there to give blocks back
    "write_zeroes": (1 << 6, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE),
}
NBD_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
NBD_REQUEST_MAGIC = 0x25609513
NBD_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
NBD_REPLY_MAGIC = 0x67446698
NBD_DIAL = 30.0  # seconds to find a server's addresses, and one that answers
NBD_HANDSHAKE = 5.0  # seconds each of them has to answer, and the server for all the rest
# The largest request without data, for its server may have to write all of it within the timeout, and
# of all beside it, too
NBD_REACH = 8 << 20
NBD_LOOKS = 10  # how often a request is looked at before it is given up
# A machine that is silent is asked whether it lives, and is dead 30 s later
NBD_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def nbd_address(uri: str) -> tuple[Any, str]:
    """Take an NBD URI apart: (a path or (host, port), name of the export). Raises ValueError, UblkError."""
    from urllib.parse import unquote, urlsplit

    scheme = uri.partition(":")[0].lower()  # urlsplit() overlooks blanks
    parts = urlsplit(uri)
    key, _, path = parts.query.partition("=")
    export = unquote(parts.path[1:])
    if scheme in ("nbd", "nbds") and parts.hostname:
        return (parts.hostname, parts.port or 10809), export
    if scheme in ("nbd+unix", "nbds+unix") and key == "socket" and path:
        return unquote(path), export
    raise wrong(
        repr(uri),
        "not an NBD address",
        "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    )


def dial(address: Any) -> socket.socket:
    """Connect to a path or (host, port). It blocks, so it is for a thread."""
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(NBD_HANDSHAKE)
        connection.connect(address)
    else:
        connection = socket.create_connection(address, NBD_HANDSHAKE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in NBD_KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


async def in_time(work: Any, seconds: float) -> Any:
    """Return what a coroutine returns that has so long. Raises asyncio.TimeoutError.

    Who is cancelled as it ends is: up to Python 3.11 asyncio.wait_for() forgets that.
    """
    import asyncio

    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


@dataclass
class NbdConnection:
    """A connection to an NBD server, usable once open() has returned.

    It knows of the export its size, flags (NBD_FLAG_*), smallest and largest
    request.
    """

    uri: str
    tls: Any  # the ssl.SSLContext to speak it with
    size: int = 0
    flags: int = 0
    minimum: int = 1
    maximum: int = 32 << 20
    refused: int = 0  # how many requests, by a server that shuts down
    socket: Any = None
    reader: Any = None
    transport: Any = None

    async def open(self) -> None:
        """Connect and shake hands. Raises UblkError."""
        import asyncio

        try:
            address, export = nbd_address(self.uri)
            dialing = asyncio.to_thread(dial, address)
            self.socket = await in_time(dialing, NBD_DIAL)
            talk = self._shake_hands(address, export)
            await in_time(talk, NBD_HANDSHAKE)
        except BaseException as error:
            self.hang_up()
            raise self._explained(error) from None

    def _explained(self, error: Any) -> BaseException:
        """Return what open() raises for what went wrong."""
        if isinstance(error, ublk.UblkError) or not isinstance(error, Exception):
            return error
        number = getattr(error, "errno", 0) or 0
        reason = getattr(error, "strerror", "") or str(error)
        if "timeout" in type(error).__name__.lower():
            number = errno.ETIMEDOUT
            reason = "the server takes too long to shake hands"
        elif type(error).__module__ == "ssl":  # its numbers are no errno
            number = errno.EPROTO
        elif number <= 0:  # of a name that is not found, or that nothing can have
            number = errno.EINVAL
        return ublk.UblkError(
            number, repr(self.uri), reason, "see whether the server runs there"
        )

    async def _shake_hands(self, address: Any, export: str) -> None:
        """Agree on TLS, if it is wished for, and on the export; learn what it is like."""
        import asyncio

        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_connection(self._protocol, sock=self.socket)
        magic, options, flags = struct.unpack(">8sQH", await self.take(18))
        refuse(
            magic != b"NBDMAGIC" or options != NBD_OPTION_MAGIC,
            self.uri,
            "no NBD server answers there, or one of the old style",
        )
        self.transport.write(struct.pack(">I", flags & 3))
        if self.tls:
            await self._start_tls("localhost" if isinstance(address, str) else address[0])
        # Servers that know only how to be told a name say so, or have no options at all
        if not flags & 1 or not await self._go(export.encode()):
            await self._name(export.encode(), flags)

    def _protocol(self) -> Any:
        """Return what takes the bytes that come, for a new reader."""
        import asyncio

        self.reader = asyncio.StreamReader()
        return asyncio.StreamReaderProtocol(self.reader)

    async def _start_tls(self, host: str) -> None:
        """Go on over TLS. What came before is of no worth: anybody may have sent it."""
        import asyncio

        self._send(NBD_OPT_STARTTLS, b"")
        kind, _ = await self._answer(NBD_OPT_STARTTLS)
        refuse(
            kind != NBD_REP_ACK, self.uri, "the server speaks no TLS", "write nbd: for nbds:"
        )
        loop = asyncio.get_running_loop()
        protocol = self._protocol()
        self.transport = await loop.start_tls(
            self.transport, protocol, self.tls, server_hostname=host
        )
        protocol.connection_made(self.transport)

    async def _go(self, export: bytes) -> bool:
        """Ask for the export; tell whether the server understood."""
        wish = struct.pack(">I", len(export)) + export
        wish += struct.pack(">HH", 1, NBD_INFO_BLOCK_SIZE)
        self._send(NBD_OPT_GO, wish)
        while True:
            kind, data = await self._answer(NBD_OPT_GO)
            if kind in (NBD_REP_ACK, NBD_REP_ERR_UNSUP):
                return kind == NBD_REP_ACK
            if kind & NBD_REP_ERROR:
                text = data.decode(errors="replace") or f"error {kind & 0xFFFF}"
                raise wrong(self.uri, f"{NBD_REFUSALS.get(kind, 'refused')}: {text}")
            info = int.from_bytes(data[:2], "big")
            if info == NBD_INFO_EXPORT and len(data) == 12:
                self.size, self.flags = struct.unpack(">QH", data[2:])
            elif info == NBD_INFO_BLOCK_SIZE and len(data) == 14:
                self.minimum, _, self.maximum = struct.unpack(">III", data[2:])

    async def _name(self, export: bytes, flags: int) -> None:
        """Tell the server the export's name; it closes the connection where it has none of it."""
        self._send(NBD_OPT_EXPORT_NAME, export)
        self.size, self.flags = struct.unpack(">QH", await self.take(10))
        if not flags & 2:
            await self.take(124)  # zeroes

    def _send(self, option: int, data: bytes) -> None:
        """Ask for an option."""
        head = struct.pack(">QII", NBD_OPTION_MAGIC, option, len(data))
        self.transport.write(head + data)

    async def _answer(self, option: int) -> tuple[int, bytes]:
        """Receive one of the server's replies to that; of some options there are several."""
        magic, of, kind, length = struct.unpack(">QIII", await self.take(20))
        refuse(
            magic != NBD_OPTION_REPLY_MAGIC or of != option or length > 1 << 16,
            self.uri,
            "the server does not keep to the protocol",
        )
        return kind, await self.take(length)

    async def take(self, count: int) -> bytes:
        """Receive so many bytes."""
        import asyncio

        try:
            return await self.reader.readexactly(count)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError(
                errno.ECONNRESET, "the server closed the connection"
            ) from None

    def say_goodbye(self) -> None:
        """End it as a client should."""
        self.transport.write(NBD_REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0))
        self.transport.close()

    def hang_up(self) -> None:
        """End it at once, without sending anything more; who receives hears of that."""
        if self.transport:
            self.transport.abort()


class NbdRequest:
    """A request that waits for its reply."""

    def __init__(self, cookie: int, command: int, flags: int, offset: int, what: Any) -> None:
        import asyncio

        self.cookie = cookie
        self.command = command
        self.done = asyncio.get_running_loop().create_future()
        self.looks = 0
        self.length = extent((offset, what))[1]
        head = NBD_REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, self.length)
        # A copy: the connection may keep it longer than the request lasts
        self.message = head + what if command == NBD_CMD_WRITE else head
        self.data = b""  # what was read
        # Whenever it is done
        self.is_harmless = command in (NBD_CMD_READ, NBD_CMD_FLUSH)
        self.is_volatile = not self.is_harmless and not flags & NBD_CMD_FLAG_FUA
        self.may_hear = command != NBD_CMD_READ and not self.is_volatile  # of what is lost
        self.connection: Any = None  # by which it was sent
        self.covers = 0  # how many changes a flush makes durable


class Nbd(ublk.Target):
    """Be the client of an NBD server: qemu-nbd, nbdkit and others serve what lies elsewhere.

    It gets all requests at once. When the server ends the connection (not a tunnel or proxy before
    it), a new one is made and gets the requests that had no reply yet. When we do, as a request is
    never answered, the server may still do what it was told, even after later changes: from then on
    all changes fail. What was acknowledged and not flushed before may be gone, as servers have
    caches: the next flush fails.

    uri: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds: for TLS
    timeout: a request fails when it has no answer for so long
    ca: a file of the authorities that may vouch for the server (those of the system)
    certificate: a file with our certificate and its key, for servers that ask for it
    """

    def __init__(
        self, uri: str, *, timeout: str = "60s", ca: str = "", certificate: str = ""
    ) -> None:
        import asyncio

        self.uri = uri
        self.timeout = seconds(timeout)
        refuse(not self.timeout, "--timeout 0", "no server answers in no time")
        self.tls: Any = None
        if uri.lower().startswith("nbds"):
            import ssl

            self.tls = ssl.create_default_context(cafile=ca or None)
            if certificate:
                self.tls.load_cert_chain(certificate)
        asyncio.run(self._meet())
        self.connection: Any = None
        self.cookie = 0
        # Changes that were (to an earlier server of the disk, too), and how many of them are durable
        self.acknowledged = 1
        self.durable = 0
        # Some of them with a connection, or as a flush failed, and no flush since has failed yet
        self.lost = False
        self.losses = 0  # how often that was so
        self.told = 0  # the latest request when the server last told of a loss
        self.silence = 0  # how many looks ago it last answered
        self.unsure = False  # whether a server still does what it was told long ago

    async def _meet(self) -> None:
        """Learn what the export is like."""
        server = await self._connect()
        server.say_goodbye()
        self.block_size = max(ublk.SECTOR, server.minimum)
        self.size = server.size // self.block_size * self.block_size
        self.maximum = server.maximum // self.block_size * self.block_size
        refuse(
            not self.size or not self.maximum,
            self.uri,
            f"its size {server.size} or largest request {server.maximum} is no block",
        )
        if self.size < server.size:
            ublk.say(f"{self.uri}: its last {server.size - self.size} bytes are left out")
        self.read_only = bool(server.flags & NBD_FLAG_READ_ONLY)
        self.offers = [name for name, (bit, *_) in NBD_OFFERS.items() if server.flags & bit]

    async def start(self, index: int) -> None:
        """Have what it was told before be durable. One queue: its loop carries the connection."""
        import asyncio

        refuse(index, self.uri, "there is one connection", "use one queue")
        self.pending: dict[int, NbdRequest] = {}  # by cookie
        self.connection = await self._connect()
        # asyncio itself may forget one that nobody else knows
        self.tasks = [asyncio.create_task(work) for work in (self._receive(), self._watch())]
        if self.connection.flags & NBD_FLAG_SEND_FLUSH:
            try:
                await self.ask(NBD_CMD_FLUSH, 0)
            except OSError:
                self.lost = True  # a client is to hear of it

    def disown(self) -> None:
        if self.connection:  # of which the server would not see the end
            self.connection.socket.close()

    async def read(self, offset: int, buffer: memoryview) -> int:
        return await self.ask(NBD_CMD_READ, 0, offset, buffer)

    async def write(self, offset: int, buffer: memoryview) -> None:
        await self._change(NBD_CMD_WRITE, 0, offset, buffer, self.maximum)

    async def call(self, name: str, offset: int = 0, what: Any = 0) -> int:
        """Serve what not every server offers."""
        _, command, flags = NBD_OFFERS[name]
        if command in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
            return await self._change(command, flags, offset, what, NBD_REACH)
        return await self.ask(command, flags, offset, what)

    async def _change(self, command: int, flags: int, offset: int, what: Any, most: int) -> int:
        """Have the server change a range, so much at once; return how much. Raises OSError.

        A flush fails after the last of several parts where the first may have been lost before.
        """
        length = extent((offset, what))[1]
        end = offset + length
        cuts = [offset, *range((offset // most + 1) * most, end, most), end]
        losses = self.losses
        has_data = command == NBD_CMD_WRITE
        for at, till in zip(cuts, cuts[1:]):
            part = what[at - offset : till - offset] if has_data else till - at
            await self.ask(command, flags, at, part)
        self.lost |= len(cuts) > 2 and losses != self.losses
        return length

    # ---- requests ------------------------------------------------------------------------------

    # Two tasks run beside them: _receive takes the replies and makes a new
    # connection when it has to, _watch ends one on which it waits for too long.

    async def ask(self, command: int, flags: int, offset: int = 0, what: Any = 0) -> int:
        """Have the server do something with a buffer or a length; return how much. Raises OSError."""
        if command != NBD_CMD_READ and self.unsure:
            raise OSError(errno.EIO, "the server may do earlier changes after this one")
        if command == NBD_CMD_FLUSH and self.lost:
            self.lost = False
            raise OSError(errno.EIO, "a connection or a flush before this one has failed")
        if not isinstance(what, int):
            what = what[: self.maximum]
        self.cookie += 1
        request = NbdRequest(self.cookie, command, flags, offset, what)
        if command == NBD_CMD_FLUSH:
            request.covers = self.acknowledged
        self.pending[self.cookie] = request
        if self.connection and not self.connection.transport.is_closing():
            self._send(request)
        error = await request.done
        if command == NBD_CMD_READ and not error:
            # Not as it comes: the buffer of a request that is given up is another's by then
            what[:] = request.data
        if request.is_volatile and not error:
            # It may be lost already, and the flush that told of that have begun before it ends
            told = self.told >= request.cookie
            self.lost |= told or request.connection is not self.connection
        if request.may_hear and not error:
            import asyncio

            # Others may hear in place of this one, and have their replies later
            others = [other.done for other in self.pending.values() if other.may_hear]
            if others:
                await asyncio.wait(others)
            # Of those that are given up nobody knows yet
            unheard = any(
                other.may_hear and other.done.done() for other in self.pending.values()
            )
            if unheard or self.told >= request.cookie or (request.covers and self.lost):
                error = errno.EIO
            elif request.connection is not self.connection:  # another may have heard by that
                return await self.ask(command, flags, offset, what)
        if error:
            raise OSError(error, os.strerror(error))
        self.durable = max(self.durable, request.covers)
        return request.length

    def _send(self, request: NbdRequest) -> None:
        """Send a request, or have its connection lost."""
        connection = self.connection
        request.connection = connection
        try:
            connection.transport.write(request.message)
        except MemoryError as error:  # who knows how much of it was sent
            connection.reader.set_exception(error)
            connection.hang_up()

    def _end(self, request: NbdRequest, error: int) -> None:
        """Wake whoever waits for a request, if nobody has made it give up."""
        del self.pending[request.cookie]
        if not error:
            self.acknowledged += request.is_volatile
        if not request.done.done():
            request.done.set_result(error)

    def _expired(self) -> list[NbdRequest]:
        """Return the requests that have waited for too long."""
        return [
            request
            for request in self.pending.values()
            if request.looks > NBD_LOOKS and not (request.is_harmless and request.done.done())
        ]

    async def _watch(self) -> None:
        """Give up a request that is not answered, with the connection where it is a change.

        Also with it where nothing is answered, but for changes that still have time.

        Time is counted by looks: an answer may be there for us who were stopped
        for longer.
        """
        import asyncio

        while True:
            await asyncio.sleep(self.timeout / NBD_LOOKS)
            self.silence += 1
            for request in self.pending.values():
                request.looks += 1
            late = self._expired()
            changes = any(not each.is_harmless for each in self.pending.values())
            lives = changes or self.silence <= NBD_LOOKS
            if lives and all(each.is_harmless for each in late):
                for request in late:
                    request.done.set_result(errno.ETIMEDOUT)
            elif late and self.connection:
                silence = TimeoutError(errno.ETIMEDOUT, "the server does not answer")
                self.connection.reader.set_exception(silence)

    async def _receive(self) -> None:
        """Take replies until the queue ends, which cancels this."""
        try:
            while True:
                try:
                    await self._reply()
                except Exception as error:  # without this task requests wait for ever
                    self._lose(error)
                    await self._reconnect()
        finally:
            if self.connection:
                self.connection.say_goodbye()

    async def _reply(self) -> None:
        """Receive the reply to a request."""
        magic, error, cookie = NBD_REPLY.unpack(await self.connection.take(NBD_REPLY.size))
        self.silence = 0
        request = self.pending.get(cookie)
        if not request or magic != NBD_REPLY_MAGIC:
            raise OSError(
                errno.EIO, "the server sent no reply to any request but something else"
            )
        if error == errno.ESHUTDOWN:  # not done: the next connection gets it
            self.connection.refused += 1
        else:
            if request.command == NBD_CMD_READ and not error:
                request.data = await self.connection.take(request.length)
            elif request.may_hear and error:
                # Maybe another client's, who waits for the next flush, or for the end of a write
                self.lost = True
                self.losses += 1
                self.told = self.cookie
            self._end(request, error if error in errno.errorcode or not error else errno.EIO)
        if 0 < self.connection.refused == len(self.pending):
            raise ConnectionAbortedError(errno.ESHUTDOWN, "the server is shutting down")

    def _lose(self, error: Any) -> None:
        """Settle what becomes of the requests of a connection, and of what was done by it."""
        if not isinstance(error, OSError):
            error = OSError(errno.EIO, type(error).__name__)
        self.connection.hang_up()
        self.connection = None
        lost = hasattr(self, "flush") and self.acknowledged > self.durable
        told = "; what was not flushed may be gone: the next flush fails" if lost else ""
        ublk.say(f"{self.uri}: connection lost: {error.strerror}{told}")
        self.lost |= lost
        self.losses += lost
        self.durable = self.acknowledged
        # The server ended it, and does nothing more of what it was told
        over = isinstance(error, ConnectionError)
        for request in list(self.pending.values()):
            if request.command == NBD_CMD_FLUSH and lost:
                self._end(request, errno.EIO)
            elif request.command != NBD_CMD_READ and not over:
                self._end(request, error.errno or errno.EIO)
                self.unsure |= not request.is_harmless

    async def _connect(self) -> NbdConnection:
        """Make a connection to the same export. Raises UblkError."""
        connection = NbdConnection(self.uri, self.tls)
        await connection.open()
        if connection.size < self.size:
            connection.hang_up()
            raise wrong(self.uri, "the export has become smaller")
        return connection

    async def _reconnect(self) -> None:
        """Once there are requests make a new connection, and send them there while they may wait."""
        import asyncio

        told = ""
        while self.connection is None:
            await asyncio.sleep(0.2)
            if self.pending:
                try:
                    self.connection = await self._connect()
                except OSError as error:
                    reason = str(error)
                    if reason != told:
                        ublk.say(reason)
                    told = reason
            for request in self._expired():
                self._end(request, errno.ETIMEDOUT)
        for request in list(self.pending.values()):
            if request.done.done():  # given up: it could land on what was written since
                del self.pending[request.cookie]
            else:
                self._send(request)


for name in NBD_OFFERS:
    setattr(Nbd, name, Offered(name))


# =================================================================================================
# A zoned disk
# =================================================================================================

# linux/blkzoned.h
BLK_ZONE_TYPE_CONVENTIONAL = 1
BLK_ZONE_TYPE_SEQWRITE_REQ = 2
BLK_ZONE_COND_NOT_WP = 0
BLK_ZONE_COND_EMPTY = 1
BLK_ZONE_COND_IMP_OPEN = 2
BLK_ZONE_COND_EXP_OPEN = 3
BLK_ZONE_COND_CLOSED = 4
BLK_ZONE_COND_FULL = 14
# Size, zone size, conventional zones, boot id
ZONED_HEADER = Sealed(b"ublkzon3", "QQQ36s", "a zoned disk")
ZONE_TABLE_AT = 4096
ZONE_ENTRY = struct.Struct("<QQ")  # how much of a zone is written, and how much of that durable


def zone_data_at(zones: int) -> int:
    """Return where the data begins behind the table of so many zones."""
    return ZONE_TABLE_AT + -(-ZONE_ENTRY.size * zones // 4096) * 4096


class Zone:
    """What changes of a zone: where the next write goes, in bytes of the disk, and its condition."""

    def __init__(self, number: int, size: int, written: int, durable: int) -> None:
        self.number = number
        self.start = number * size
        self.end = (number + 1) * size
        self.wp = self.start + written
        self.durable = self.start + durable  # up to where the data are
        self.kept = -1  # and the file durably says so, not only the page cache
        self.resets = 0
        self.settle()

    def settle(self) -> None:
        """Take the condition that the write pointer implies when nobody has the zone open."""
        ends = {self.start: BLK_ZONE_COND_EMPTY, self.end: BLK_ZONE_COND_FULL}
        self.cond = ends.get(self.wp, BLK_ZONE_COND_CLOSED)


class Zoned(ublk.Target):
    """A host-managed zoned disk: a zone is written from its start to its end and reset as a whole.

    It lies in a file: a header, how much of each zone is written, then the data. A file that is
    there knows its sizes. A pointer that is noted in the file may be durable before the data are, so
    it counts only until the machine is started anew. A flush makes the data durable, and then notes
    the pointer that counts for ever.

    file: keep it in this file; made if it is not there (in memory)
    size: size of a new disk
    zone_size: size of its zones, a power of two
    conventional: so many zones at its start may be written anywhere
    read_only: open the file for reading only
    """

    block_size = 4096
    max_append = 1 << 20
    max_open_zones = 0  # any number
    max_active_zones = 0

    def __init__(
        self,
        *,
        file: str = "",
        size: ublk.Size = ublk.Size(1 << 30),
        zone_size: ublk.Size = ublk.Size(16 << 20),
        conventional: int = 0,
        read_only: bool = False,
    ) -> None:
        self.lock = threading.Lock()
        self.path = file or f"/proc/self/fd/{memory_file(self)}"
        self.files = [file] if file else []
        if not file or not read_only:
            self._make(size, zone_size, conventional)
        self.disk = Loop(self.path, read_only=read_only)
        self.read_only = self.disk.read_only
        header = ZONED_HEADER.read(self.disk.fd, self.path)
        self.size, self.zone_size, self.conventional, last_boot = header
        self.data_at = zone_data_at(self.size // self.zone_size)
        refuse(
            self.disk.size != self.data_at + self.size,
            self.path,
            f"damaged: not {self.data_at + self.size} bytes long",
            "restore it",
        )
        same_boot = last_boot == boot_id()
        self.zones = self._load_zones(same_boot)
        if not (same_boot or self.read_only):
            for zone in self.zones:
                self._note(zone, zone.wp, zone.wp)
            os.fsync(self.disk.fd)
            now = ZONED_HEADER.pack(*header[:3], boot_id())
            write_all(self.disk.fd, now, 0)
            os.fsync(self.disk.fd)

    # ---- the file ----------------------------------------------------------------------------------

    def _make(self, size: int, zone_size: int, conventional: int) -> None:
        """Make the file of a new disk, where there is none."""
        refuse(
            zone_size < self.block_size or zone_size & zone_size - 1,
            f"--zone-size {zone_size}",
            "not a power of two from 4096 up",
        )
        refuse(
            size % zone_size or not 0 <= conventional * zone_size < size,
            f"--size {size}",
            f"not {conventional} zones of {zone_size} bytes and more",
        )
        header = ZONED_HEADER.pack(size, zone_size, conventional, boot_id())
        data_at = zone_data_at(size // zone_size)
        make_file(self.path, header.ljust(data_at, b"\0"), data_at + size)

    def _load_zones(self, same_boot: bool) -> list[Zone]:
        """Return the zones as they were left; who had some open is gone."""
        count = self.size // self.zone_size
        table = read_all(self.disk.fd, ZONE_ENTRY.size * count, ZONE_TABLE_AT)
        zones = [
            Zone(number, self.zone_size, written if same_boot else durable, durable)
            for number, (written, durable) in enumerate(ZONE_ENTRY.iter_unpack(table))
        ]
        for zone in zones:
            refuse(
                zone.wp > zone.end or zone.wp % self.block_size,
                self.path,
                f"damaged: the write pointer of zone {zone.number}",
                "restore it",
            )
        for zone in zones[: self.conventional]:
            zone.cond = BLK_ZONE_COND_NOT_WP
        return zones

    def close(self) -> None:
        self.disk.close()

    disown = close

    # ---- zones -----------------------------------------------------------------------------------

    def _zone(self, offset: int) -> Zone:
        """Return the zone at offset, which must be one that has a write pointer."""
        zone = self.zones[offset // self.zone_size]
        if zone.cond == BLK_ZONE_COND_NOT_WP:
            raise OSError(errno.EIO, "a conventional zone")
        return zone

    def report_zones(self, offset: int, count: int) -> list[ublk.blk_zone]:
        """Describe zones from offset on, in sectors."""
        first = offset // self.zone_size
        length = self.zone_size // ublk.SECTOR
        return [
            ublk.blk_zone(
                start=zone.start // ublk.SECTOR,
                len=length,
                capacity=length,
                wp=zone.wp // ublk.SECTOR,
                cond=zone.cond,
                type=BLK_ZONE_TYPE_CONVENTIONAL
                if zone.cond == BLK_ZONE_COND_NOT_WP
                else BLK_ZONE_TYPE_SEQWRITE_REQ,
            )
            for zone in self.zones[first : first + count]
        ]

    def zone_open(self, offset: int) -> None:
        with self.lock:
            zone = self._zone(offset)
            if zone.cond == BLK_ZONE_COND_FULL:
                raise OSError(errno.EIO, "the zone is full")
            zone.cond = BLK_ZONE_COND_EXP_OPEN

    def zone_close(self, offset: int) -> None:
        with self.lock:
            self._zone(offset).settle()

    def zone_finish(self, offset: int) -> None:
        with self.lock:
            zone = self._zone(offset)
            self._note(zone, zone.end, zone.durable)
            zone.wp = zone.end
            zone.settle()

    async def zone_reset(self, offset: int) -> None:
        import asyncio

        await asyncio.to_thread(self._reset, [self._zone(offset)])

    async def zone_reset_all(self) -> None:
        import asyncio

        await asyncio.to_thread(self._reset, self.zones[self.conventional :])

    def _reset(self, zones: list[Zone]) -> None:
        """Empty zones, durably before their data go and others take their place."""
        with self.lock:
            written = [zone for zone in zones if zone.wp != zone.start]
            for zone in written:
                zone.kept = zone.start  # so that where this fails the next flush notes all, too
            # At once, or who is killed meanwhile leaves some that only seem empty
            entries = bytes(ZONE_ENTRY.size * len(zones))
            try:
                if written:
                    write_through(self.disk.fd, entries, self._place(zones[0]))
            except OSError:
                # Maybe data of other zones: the kernel tells of them but once
                self.disk.sync.note_failure(errno.EIO)
                for zone in written:
                    self._note(zone, zone.wp, zone.durable)
                raise
            for zone in zones:
                zone.wp = zone.durable = zone.start
                zone.resets += 1
                zone.settle()
            for zone in written:
                clear(self.disk.fd, self.data_at + zone.start, self.zone_size)

    # ---- data ------------------------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> int:
        return self.disk.read(self.data_at + offset, buffer)

    async def flush(self) -> None:
        failures = self.disk.sync.failures
        with self.lock:
            ends = [
                (zone, zone.resets, zone.wp)
                for zone in self.zones
                if zone.wp != zone.kept and not self.read_only
            ]
        await self.disk.flush()
        for zone, resets, wp in ends:
            with self.lock:
                # Another flush may have come further meanwhile
                if zone.resets == resets:
                    zone.durable = max(zone.durable, wp)
                    self._note(zone, zone.wp, zone.durable)
        if ends:
            await self.disk.sync(failures)
        with self.lock:
            # A reset, or another queue's flush, may have heard of what was lost meanwhile
            self.disk.sync.check(failures)
            for zone, resets, wp in ends:
                if zone.resets == resets:
                    zone.kept = max(zone.kept, wp)

    async def write(self, offset: int, buffer: memoryview) -> int | None:
        if offset < self.conventional * self.zone_size:
            return self.disk.write(self.data_at + offset, buffer)
        with self.lock:
            zone = self._zone(offset)
            if offset != zone.wp:
                raise OSError(errno.EIO, "not at the write pointer")
            self._write(zone, buffer)
        return None

    def zone_append(self, offset: int, buffer: memoryview) -> int:
        with self.lock:
            zone = self._zone(offset)
            self._write(zone, buffer)
            return zone.wp - len(buffer)

    def _write(self, zone: Zone, buffer: memoryview) -> None:
        """Write at the zone's pointer, and only then move that; a zone that cannot stays as it was."""
        position = zone.wp + len(buffer)
        if position > zone.end:
            raise OSError(errno.EIO, "the zone is full")
        write_all(self.disk.fd, buffer, self.data_at + zone.wp)
        self._note(zone, position, zone.durable)
        zone.wp = position
        if zone.cond != BLK_ZONE_COND_EXP_OPEN:
            zone.cond = BLK_ZONE_COND_IMP_OPEN
        if zone.wp == zone.end:
            zone.settle()

    def _note(self, zone: Zone, position: int, durable: int) -> None:
        """Note in the file how far a zone is written."""
        entry = ZONE_ENTRY.pack(position - zone.start, durable - zone.start)
        write_all(self.disk.fd, entry, self._place(zone))

    def _place(self, zone: Zone) -> int:
        """Return where in the file that is noted."""
        return ZONE_TABLE_AT + ZONE_ENTRY.size * zone.number


# =================================================================================================
# Recording a disk, and crashing it afterwards
# =================================================================================================

# Sizes of disk and block; the boot id of the machine while it may be continued only until the next
LOG_HEADER = Sealed(b"ublklog5", "QI36s", "a log of the target record")
COMPLETE = bytes(36)
LACKS_A_CHANGE = b"never".ljust(36)
# Kind, errno of a change that failed, offset, length, CRC-32 of the data, which follow. A flush has
# in place of an offset how long the log was when it was asked for: it is for what stands up to there.
ENTRY = Sealed(b"entr", "IIQQI", "an entry")
KINDS = (*CHANGES, "mark")


class Entry(NamedTuple):
    """A change of a recorded disk, or a mark; its data, if any, ends at end in the log."""

    number: int
    kind: str
    error: int  # errno, if it failed
    offset: int  # of a flush: the number of the last entry that it is for
    length: int
    crc: int
    end: int


class Log:
    """A recording, open: a file of a header and entries."""

    def __init__(self, path: Any, mode: str = "rb") -> None:
        self.path = path
        self.file = open(path, mode, buffering=0)
        self.close = self.file.close

    @property
    def fd(self) -> int:
        """Its descriptor, of which none is left when it is closed: then this raises ValueError."""
        return self.file.fileno()

    def header(self) -> Any:
        """Return the sizes of the disk and of its blocks, and its boot id. Raises UblkError."""
        return LOG_HEADER.read(self.fd, self.path)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Have nobody else add to it meanwhile: marks come from anywhere."""
        try:
            self._lock(fcntl.F_WRLCK)
            yield
        finally:
            self._lock(fcntl.F_UNLCK)

    def _lock(self, how: int) -> None:
        """Wait for a lock that a server that is killed loses together with its claim()."""
        flock = struct.pack("hhqqi", how, 0, 0, 0, 0)  # type, whence, start, length, pid
        fcntl.fcntl(self.fd, F_OFD_SETLKW, flock)

    def append(
        self, kind: str, data: Any = b"", offset: int = 0, length: int = 0, error: int = 0
    ) -> None:
        """Write an entry at its end, or nothing. Raises OSError."""
        length = length or len(data)
        head = ENTRY.pack(KINDS.index(kind), error, offset, length, zlib.crc32(data))
        with self.growing():
            end = os.lseek(self.fd, 0, os.SEEK_END)
            count = os.pwritev(self.fd, [head, data], end)
            if count < len(head) + len(data):
                os.ftruncate(self.fd, end)
                raise OSError(errno.ENOSPC, "no room for it")

    def entries(self) -> Iterator[Entry]:
        """Yield its whole entries; say where a kill cut off the last one."""
        limit = os.fstat(self.fd).st_size
        end = LOG_HEADER.size
        ends: list[int] = []
        for number in itertools.count(1):
            if end == limit:
                return
            if end + ENTRY.size > limit:
                break
            fields = ENTRY.unpack(os.pread(self.fd, ENTRY.size, end))
            if not fields:
                raise self.damaged(number)
            index, error, offset, length, crc = fields
            kind = KINDS[index]
            end += ENTRY.size
            if kind in (*WITH_DATA, "mark"):
                end += length
            if end > limit:
                break
            if kind == "flush":
                offset = bisect.bisect(ends, offset)
            ends.append(end)
            yield Entry(number, kind, error, offset, length, crc, end)
        ublk.say(f"{self.path} is cut off after entry {number - 1}: the rest is left out")

    def data_of(self, entry: Entry) -> bytes:
        """Return the data of an entry. Raises UblkError where they are damaged."""
        data = os.pread(self.fd, entry.length, entry.end - entry.length)
        if zlib.crc32(data) != entry.crc:
            raise self.damaged(entry.number)
        return data

    def damaged(self, number: int) -> ublk.UblkError:
        """Return the error for an entry that is not what was written."""
        good = number - 1
        return wrong(self.path, f"damaged after entry {good}", f"replay it --to {good}")


def has_cache(target: Any) -> bool:
    """Tell whether a target loses what it has acknowledged, as at a kill or a cut."""
    while target is not None and not isinstance(target, Cache):
        target = getattr(target, "target", None)
    return target is not None


class Record(Wrapper, ublk.Target):
    """Log every change of another target, in the order the changes were done, with all data.

    `ublk.py replay LOG` makes from it the disk as it was after any of them. An entry is written
    once the target has done its work and before the client hears of it. A log that is there is
    continued: delete it before you record a disk that starts afresh. Where it has no room for an
    entry, or is as large as --limit, the recording ends: from then on each change of the disk fails.

    log: the file for the log
    target: the target to be recorded, with its own arguments
    limit: of the log, about: what is under way then is still written (none)
    """

    def __init__(
        self, log: str, target: ublk.Target, *, limit: ublk.Size = ublk.Size(0)
    ) -> None:
        super().__init__(target)
        refuse_more_than_data("record", target)
        reason = "the cache below it may lose what the log has"
        refuse(has_cache(target), "record", reason, "put the cache above it, or leave it out")
        if not hasattr(target, "flush"):  # of interest even where the target needs none
            self.offers += ["flush", "write_fua"]
        self.lock = threading.Lock()
        # Changes that are not in the log yet, each with the errno of a flush that failed meanwhile
        self.under_way: dict[object, int] = {}
        self.files = [*target.files, log]
        self.limit = limit or sys.maxsize
        self.boot = boot_id()
        header = LOG_HEADER.pack(self.size, self.block_size, COMPLETE)
        make_file(log, header, LOG_HEADER.size)
        self.log = Log(os.path.abspath(log), "r+b")
        claim(self.log.fd, log)
        # A recovered disk takes the size it had only later
        self.largest, _, boot = self.log.header()
        refuse(
            boot not in (self.boot, COMPLETE),
            log,
            "it may lack changes of the disk",
            "record to another one, and replay that with a copy of the disk as --base",
        )
        refuse(
            self.largest < self.size,
            log,
            f"the log of a disk of {self.largest} bytes, this one has {self.size}",
        )
        with self.log.growing():
            end = LOG_HEADER.size
            for entry in self.log.entries():
                end = entry.end
            os.ftruncate(self.log.fd, end)  # without an entry the server was killed in

    def _head(self) -> None:
        """Note how large the disk has ever been, of which blocks its writes are, who may continue."""
        header = LOG_HEADER.pack(self.largest, self.block_size, self.boot)
        write_through(self.log.fd, header, 0)

    async def start(self, index: int) -> None:
        self._head()  # its block size is settled now
        await ublk.end_of(getattr(self.target, "start", bool)(index))

    def resized(self, size: int) -> None:
        ublk.fit(self.target, size)
        self.largest = max(size, self.size, self.largest)
        self._head()

    async def call(self, name: str, *args: Any) -> Any:
        """Have the target do it, then append an entry of a change, whether it has failed or not."""
        if name not in CHANGES:
            return await super().call(name, *args)
        offset, length = extent(args)
        change = object()
        with self.lock:  # or half an entry of another queue, that finds no room, would count
            end = os.fstat(self.log.fd).st_size
            if end < self.limit and name != "flush":
                self.under_way[change] = 0
        if end >= self.limit:
            raise self._end("it has its limit")
        if name == "flush":
            offset = end
        data = args[1] if name in WITH_DATA else b""
        try:
            if name != "flush" or hasattr(self.target, name):
                await super().call(name, *args)
        except BaseException as failure:
            import asyncio

            error = getattr(failure, "errno", 0)
            if isinstance(failure, (asyncio.CancelledError, GeneratorExit)):
                error = errno.ECANCELED
            elif error not in errno.errorcode:  # as of a name that is not found
                error = errno.EIO
            # A flush that ends with its queue is done again by the next server: nothing is in doubt
            left = (name, error) == ("flush", errno.ECANCELED)
            if not (left and await ublk.is_left_to_next(failure)):
                self._append(change, name, data, offset, length, error)
            raise
        self._append(change, name, data, offset, length)

    def mark(self, text: str) -> None:
        """Note something between two changes, such as what was promised to be durable.

        It is in the log when this returns. Any thread may call it, and a forked child. Raises
        UblkError, OSError.
        """
        # Not by our locks: in a child, one that another thread had is never let go
        mark(self.log.path, text)

    def _append(
        self,
        change: object,
        name: str,
        data: Any,
        offset: int,
        length: int,
        error: int = 0,
    ) -> None:
        try:
            with self.lock:
                failed = self.under_way.pop(change, 0)
                if name == "flush" and error:  # a disk may have lost what it had of them, too
                    self.under_way = dict.fromkeys(self.under_way, error)
                elif name != "write_fua":
                    error = error or failed
                self.log.append(name, data, offset, length, error)
        except (OSError, MemoryError) as failure:
            end = self._end(str(getattr(failure, "strerror", "no memory for an entry")))
            self.boot = LACKS_A_CHANGE
            self._head()
            raise end from None

    def _end(self, reason: str) -> OSError:
        """Say, once, that the recording ends; return the error of all changes from now on."""
        if self.limit:
            ublk.say(
                f"{self.log.path} ends: {reason}: from now on all changes of the disk fail"
            )
        self.limit = 0
        return OSError(errno.ENOSPC, "no room in the log")

    async def close(self) -> None:
        with closing(self.log):
            try:
                # First, as it may fail to keep what the log has
                await ublk.end_of(getattr(self.target, "close", bool)())
                os.fsync(self.log.fd)
                # As of a target above that does not wait for what it has begun
                if self.boot != LACKS_A_CHANGE:
                    self.boot = COMPLETE if not self.under_way else LACKS_A_CHANGE
            except Exception:
                self.boot = LACKS_A_CHANGE
                raise
            finally:
                self._head()

    def disown(self) -> None:
        self.log.close()
        super().disown()


class Part(NamedTuple):
    """The part of a change that is on a disk."""

    entry: Entry
    offset: int  # on the disk
    length: int

    def apply(self, log: Log, disk: int) -> None:
        """Do it to a disk image, a descriptor."""
        entry, offset, length = self
        if entry.kind in WITH_DATA:
            begin = offset - entry.offset
            data = log.data_of(entry)[begin : begin + length]
            write_all(disk, data, offset)
        else:
            clear(disk, offset, length)


def whole(entry: Entry) -> Part:
    """Return all of a change."""
    return Part(entry, entry.offset, entry.length)


def lasts(entry: Entry) -> bool:
    """Tell whether a change is durable by itself."""
    return entry.kind == "write_fua" and not entry.error


class Crash(NamedTuple):
    """What a crash may leave of a disk.

    path: an image of the disk, to be used at will until the next crash
    entry: the last one of the log before the crash; a flush or FUA write may have been under way
    mark: the last mark before it
    state: "all" of what was written, "nothing" that was not flushed, or the number of a state in
        which each write that was not flushed is there, absent or torn, at random
    """

    path: str
    entry: Entry
    mark: str
    state: str
    parts: tuple[Part, ...]  # what is there of what was not flushed


@dataclass
class Crashes:
    """All crashes of a recorded disk that are worth a look, in order.

    log: the log.
    disk: an image of the disk at the beginning, a descriptor. It follows with
        what no crash takes back.
    to: stop after this entry. The other arguments are options of replay.
    """

    log: Log
    disk: int
    to: int | None = None
    start: int = 0
    every: str = "flush"
    states: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        self.size, self.block, _ = self.log.header()
        self.entries = list(itertools.islice(self.log.entries(), self.to))
        self.points = 0  # crash points so far
        self.doubtful = 0  # the last flush that has failed
        self.seen: set[tuple[Part, ...]] = set()  # states of the last one
        self.settled: list[tuple[int, int]] = []  # where disk has changed: offset and length

    def __iter__(self) -> Iterator[Crash]:
        mark = ""
        pending: list[Entry] = []  # what some crash may take back, or what comes after that
        for entry in self.entries:
            if entry.kind == "mark":
                mark = os.fsdecode(self.log.data_of(entry))
                self.seen = set()
            elif entry.kind != "flush":
                pending.append(entry)
            is_point = self.is_point(entry)
            self.points += is_point
            if is_point:
                yield from self.look(pending, entry, mark)
            settled = self.settle(pending, entry)
            if settled:
                count = len(settled)
                self.seen = {parts[count:] for parts in self.seen if parts[:count] == settled}
            if is_point:  # a flush may not be for all that is pending
                yield from self.look(pending, entry, mark)
        refuse(
            not self.points,
            self.log.path,
            "there is no crash point to look at",
            "take --every entry or another --from",
        )

    def look(self, pending: Sequence[Entry], last: Entry, mark: str) -> Iterator[Crash]:
        """Yield the states of a crash that have not just been looked at."""
        before, self.seen = self.seen, set()
        for state, parts in self.states_of(pending, last):
            if parts not in before and parts not in self.seen:
                yield Crash("", last, mark, state, parts)
            self.seen.add(parts)

    def is_point(self, entry: Entry) -> bool:
        """Tell whether to look at crashes after an entry: also where one comes that is durable by itself."""
        kinds = [each.kind for each in self.entries[entry.number - 1 : entry.number + 1]]
        return entry.number >= self.start and (
            self.every == "entry"
            or kinds[0] in ("flush", "mark")
            or "write_fua" in kinds
            or len(kinds) == 1
        )

    def states_of(
        self, pending: Sequence[Entry], last: Entry
    ) -> Iterator[tuple[str, tuple[Part, ...]]]:
        """Yield the names of the states of a crash, and what is there of what is pending."""
        yield "all", tuple(map(whole, pending))
        yield "nothing", tuple(map(whole, filter(lasts, pending)))
        for number in range(1, self.states + 1):
            chance = random.Random(f"{self.seed} {last.number} {number}")
            parts = []
            for entry in pending:
                if lasts(entry) and entry is not last:
                    parts.append(whole(entry))
                else:
                    parts += self.torn(entry, chance)
            yield str(number), tuple(parts)

    def torn(self, entry: Entry, chance: random.Random) -> list[Part]:
        """Draw what is there of a change: nothing, all, one side of a cut, or a middle or all but that.

        A disk need not begin at an end: who takes a write for whole by both its ends errs.
        """
        length = entry.length
        borders = range(1 + max(1, -(-length // self.block)))
        drawn = [chance.choice(borders), *sorted(chance.sample(borders, 2))]
        cut, begin, end = (min(self.block * border, length) for border in drawn)
        tears = [[(0, cut)], [(cut, length)], [(begin, end)], [(0, begin), (end, length)]]
        outcomes = [*tears, *2 * [[], [(0, length)]]]
        return [
            Part(entry, entry.offset + first, last - first)
            for first, last in chance.choice(outcomes)
            if first < last
        ]

    def outcome(self, entry: Entry) -> list[Part]:
        """Return what there is of a change in the end; drawn where it, or a flush since, has failed."""
        if entry.error or (entry.number <= self.doubtful and not lasts(entry)):
            return self.torn(entry, random.Random(f"{self.seed} {entry.number}"))
        return [whole(entry)]

    def settle(self, pending: list[Entry], last: Entry) -> tuple[Part, ...]:
        """Do to the disk what no crash takes back after this entry; return it."""
        covered = 0
        if last.kind == "flush":
            if last.error:  # maybe of what was written meanwhile
                self.doubtful = last.number
            else:
                covered = last.offset
        parts = []
        while pending and (pending[0].number <= covered or lasts(pending[0])):
            parts += self.outcome(pending.pop(0))
        for part in parts:
            part.apply(self.log, self.disk)
            self.settled.append(part[1:])
        return tuple(parts)


UNTOUCHED = 10**9  # ns since 1970: an image's time of change while nobody else has changed it


@dataclass
class CrashImage:
    """A file that becomes the disk of one crash after another, at the cost of what differs."""

    path: str
    crashes: Crashes
    known: int = 0  # how many of crashes.settled are in it
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        self.remove()  # or who was at work there as a replay was killed would change it

    def remove(self) -> None:
        """Take the image away."""
        with suppress(FileNotFoundError):  # the check may have
            os.unlink(self.path)

    def show(self, crash: Crash) -> Crash:
        """Make the image that of a crash, the one that crashes has just come to."""
        disk = self.crashes.disk
        stale = {*self.crashes.settled[self.known :], *(part[1:] for part in self.parts)}
        self.known = len(self.crashes.settled)
        self.parts = crash.parts
        with suppress(FileNotFoundError):
            if os.lstat(self.path).st_nlink > 1:  # who has the other name keeps the file
                self.remove()
        # No link of the check's: that would have another file be overwritten
        image = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(image, "r+b"):  # which closes it
            if os.fstat(image).st_mtime_ns != UNTOUCHED:
                os.ftruncate(image, self.crashes.size)
                stale = set() if cloned(disk, image) else {(0, self.crashes.size)}
            for offset, length in stale:
                make_same(disk, image, offset, length)
            for part in crash.parts:
                part.apply(self.crashes.log, image)
            os.utime(image, ns=(UNTOUCHED, UNTOUCHED))
        return crash._replace(path=self.path)


def cloned(source: int, target: int) -> bool:
    """Have a file share the blocks of another, and tell whether their file system can do that."""
    try:
        return fcntl.ioctl(target, FICLONE, source) == 0
    except OSError:
        return False


def next_data(fd: int, offset: int) -> int:
    """Return where the next data of a file are, behind its holes; far away if there are none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    return sys.maxsize


def make_same(source: int, target: int, offset: int, length: int) -> None:
    """Make a range of one file what it is in another, of which only data are read."""
    end = offset + length
    while True:
        start, fd = min((next_data(fd, offset), fd) for fd in (source, target))
        if start >= end:
            return
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        for at, count in pieces(start, min(offset, end) - start):
            data = read_all(source, count, at)
            if data != os.pread(target, count, at):
                write_all(target, data, at)


@contextmanager
def new_disk(log: Log, path: str, base: Any) -> Iterator[int]:
    """Make the image of a recorded disk as it was when the recording began; yield its descriptor."""
    size, *_ = log.header()
    refuse(base and is_block(base), base, "not a file")
    refuse(
        base and os.path.getsize(base) > size,
        base,
        f"larger than the recorded disk of {size} bytes",
        "name what the disk contained when the recording began",
    )
    with open(path, "x+b") as file:
        file.truncate(size)
        if base:
            with open(base, "rb") as source:
                make_same(source.fileno(), file.fileno(), 0, size)
        yield file.fileno()


def crashes(log: Any, base: Any = "", **options: Any) -> Iterator[Crash]:
    """Yield all crashes of a recorded disk that are worth a look, each with an image of the disk.

    base: an image of what the disk contained when the recording began; by
        default zeroes.
    options: to, start, every, states and seed, as --to, --from, --every,
        --states and --seed of replay.
    """
    folder = os.path.dirname(os.path.abspath(log))
    with closing(Log(log)) as opened, tempfile.TemporaryDirectory(dir=folder) as place:
        with new_disk(opened, f"{place}/disk", base) as disk:
            found = Crashes(opened, disk, **options)
            image = CrashImage(f"{place}/crash", found)
            yield from map(image.show, found)


def replay(argv: Sequence[str]) -> int:
    """Rebuild a recorded disk, or look for the first moment at which a crash would be fatal."""
    options = read_replay_words(argv)
    if options.mark is not None:
        mark(options.log, options.mark)
        return 0
    with closing(Log(options.log)) as log:
        if not options.disk:
            log.header()
            for entry in itertools.islice(log.entries(), options.to):
                print(ublk.printable(described(log, entry)))
            return 0
        with new_disk(log, options.disk, options.base) as disk:
            found = Crashes(
                log,
                disk,
                options.to,
                options.start,
                options.every,
                options.states,
                options.seed,
            )
            if options.check:
                return find_bad_crash(found, options)
            for entry in found.entries:
                if entry.kind not in ("flush", "mark"):
                    for part in found.outcome(entry):
                        part.apply(log, disk)
    return 0


def read_replay_words(argv: Sequence[str]) -> Any:
    """Return the words of a replay, as attributes."""
    parser = ublk.make_parser("ublk.py replay", description=replay.__doc__)
    add = parser.add_argument
    number: Any = {"type": ublk.parse_size, "metavar": "N"}
    add("log", help="what the target record has written")
    add("disk", nargs="?", help="the disk image to make; without it the entries are shown")
    add("--mark", metavar="TEXT", help="note this in a log that is being written")
    add("--base", help="what the disk contained when the recording began (nothing)")
    add("--to", **number, help="stop after this entry (the last)")
    add(
        "--check",
        metavar="COMMAND",
        help="for each crash run a shell command on an image of the disk, {} in it being the "
        "image's path; stop where it fails",
    )
    add(
        "--from",
        **number,
        default=0,
        dest="start",
        help="check no crash before this entry, such as the last of mkfs",
    )
    add(
        "--every",
        choices=("flush", "entry"),
        default="flush",
        help="crash points; also before and after FUA writes, at marks and at the end (flush)",
    )
    add(
        "--states",
        **number,
        default=0,
        help="at each, besides all and nothing of what was not flushed, look at N states in which "
        "each such write is there, absent or torn, at random (0)",
    )
    add("--seed", type=int, default=1, help="makes the same random choices again (1)")
    add("--jobs", **number, default=1, help="so many checks at a time (1)")
    options = parser.parse_args(argv)
    check = options.check
    if check is not None and not ("{}" in check and options.disk and options.jobs):
        parser.error("--check needs a disk image to make, {} in its command, and a job")
    return options


def described(log: Log, entry: Entry) -> str:
    """Return the line that shows an entry."""
    line = f"{entry.number:>8}  {entry.kind:<12} {entry.offset:>14} {entry.length:>10}"
    if entry.kind == "mark":
        line += f"  {os.fsdecode(log.data_of(entry))}"
    if entry.error:
        line += f"  {ublk.ERRNO_NAMES.get(entry.error, entry.error)}"
    return line


def mark(path: str, text: str) -> None:
    """Append a mark to a log that a server is writing. Raises UblkError, OSError."""
    with closing(Log(path, "r+b")) as log, log.growing():  # else it could end within an entry
        log.header()
        with suppress(BlockingIOError):
            fcntl.flock(log.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            raise wrong(path, "nobody records to it", "mark it while its disk is served")
        log.append("mark", os.fsencode(text))


def find_bad_crash(crashes: Crashes, options: Any) -> int:
    """Check the disk after each crash; tell the first bad one and keep its disk."""
    check = options.check
    kept = f"{options.disk}.crash"
    images = [CrashImage(f"{kept}{job}", crashes) for job in range(options.jobs)]
    states = 0
    began = time.monotonic()
    with closing(checked(crashes, check, images)) as verdicts:
        for crash, status in verdicts:
            entry = crash.entry
            if status:
                with suppress(FileNotFoundError):  # the check may have removed it
                    os.replace(crash.path, kept)
                break
            states += 1
            if sys.stderr.isatty():
                show_progress(crashes, entry.number, time.monotonic() - began)
        else:
            print(f"good at {crashes.points} crash points, {states} states")
            return 0
    # Of itself the shell tells a signal as a negative number, of its command as 128 and more
    refuse(status in (126, 127), check, "it cannot be run", "name a command that is there")
    refuse(
        status < 0 or 128 < status < 255,  # which scripts end with that die
        check,
        f"it was killed at entry {entry.number}: status {status}",
        f"the disk it looked at is {kept}",
    )
    print(
        f"bad at entry {entry.number}: {entry.kind} {entry.offset} {entry.length}: "
        f"state {crash.state}: status {status}: see {kept}"
    )
    return 1


def show_progress(crashes: Crashes, number: int, seconds: float) -> None:
    """Say on a terminal how far a check is after so many seconds."""
    count = len(crashes.entries)
    left = seconds * (count - number) / (number + 1 - crashes.start)
    line = f"entry {number} of {count}, {left:.0f} s left"
    print(line, end="\033[K\r", file=sys.stderr, flush=True)


def checked(
    crashes: Crashes, check: str, images: Sequence[CrashImage]
) -> Generator[tuple[Crash, int], None, None]:
    """Run a shell command on each crash, one at a time for each image; yield its statuses, in order."""
    to_come = iter(crashes)
    try:
        while True:
            shown = [image.show(crash) for image, crash in zip(images, to_come)]
            if not shown:
                return
            running = [start_check(check, crash) for crash in shown]
            statuses = [process.wait() for process in running]
            yield from zip(shown, statuses)
    finally:
        for image in images:
            image.remove()


def start_check(check: str, crash: Crash) -> Any:
    """Start the check's command on the disk of a crash."""
    environment = {
        **os.environ,
        "UBLK_ENTRY": str(crash.entry.number),
        "UBLK_MARK": crash.mark,
        "UBLK_STATE": crash.state,
    }
    command = check.replace("{}", shlex.quote(crash.path))
    return subprocess.Popen(command, shell=True, env=environment)


# =================================================================================================
# For pytest
# =================================================================================================

PATIENCE = 60.0  # seconds that a disk has for what unmounting writes


def pytest_configure(config: Any) -> None:
    """Give the tests of other software the fixtures below. Only pytest calls this."""
    import pytest

    class Fixtures:
        """Disks and file systems that live as long as a test."""

        @pytest.fixture
        def disk(self) -> Iterator[Callable[..., ublk.Device]]:
            """Serve disks: disk(target, **options of Device), or disk("ram", "--size", "64M")."""
            with ExitStack() as stack:

                def make(*target: Any, **options: Any) -> ublk.Device:
                    words = target or ("ram", "--size", "64M")
                    made = words[0]
                    if isinstance(made, str):
                        made = ublk.make_target(words)
                    device = ublk.Device(made, **options)
                    stack.callback(device.stop)
                    device.start()
                    return device

                yield make
                let_go()

        @pytest.fixture
        def folder(self, disk: Any, tmp_path_factory: Any) -> Iterator[Callable[..., Any]]:
            """Mount file systems: folder() takes what disk() takes, or what disk() made, and mkfs."""
            with ExitStack() as stack:

                def make(*what: Any, mkfs: str = "mkfs.ext4 -q", **options: Any) -> Any:
                    served = bool(what) and isinstance(what[0], ublk.Device)
                    device = what[0] if served else disk(*what, **options)
                    path = tmp_path_factory.mktemp("folder")
                    if mkfs:
                        subprocess.run([*shlex.split(mkfs), device.path], check=True)
                    subprocess.run(["mount", device.path, path], check=True)
                    stack.callback(unmount, path, device)
                    return path

                yield make
                let_go()

        @pytest.fixture
        def nothing_left(self) -> Iterator[None]:
            """Fail a test that leaves a disk behind, however it made it."""
            before = ublk.device_ids()
            yield
            left = [f"/dev/ublkb{each}" for each in ublk.device_ids() if each not in before]
            assert not left, f"left behind: {', '.join(left)}"

    config.pluginmanager.register(Fixtures())


def let_go() -> None:
    """Close what a failed test has left open: its variables belong to the traceback, which pytest keeps."""
    import gc
    import traceback

    failed = getattr(sys, "last_traceback", None)
    traceback.clear_frames(failed)
    for frame, _ in traceback.walk_tb(failed):
        dict(frame.f_locals)  # up to Python 3.12 a copy, which is brought up to date when read
    gc.collect()


def unmount(path: Any, device: ublk.Device) -> None:
    """Unmount a test's file system, also from under its users; they are then named in an error.

    A disk that does not answer is stopped, which fails what it holds.
    """
    command = subprocess.Popen(["umount", path], stderr=subprocess.DEVNULL)
    try:
        command.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ublk.UblkError):  # held open by the mount
            device.stop()
    if command.wait():
        users = ", ".join(users_of(path)) or "somebody"
        lazy = ["umount", "--lazy", path]
        if subprocess.run(lazy, stderr=subprocess.DEVNULL).returncode:
            return  # the test has unmounted it
        raise ublk.UblkError(
            errno.EBUSY, f"unmount {path}", f"in use by {users}", "end that in the test"
        )


def users_of(path: Any) -> Iterator[str]:
    """Name the processes that have something below a path open, or work there.

    By their names, for nothing can be asked of files on a disk that is gone.
    """
    for process in glob.glob("/proc/[0-9]*"):
        links = f"{process}/cwd", *glob.glob(f"{process}/fd/*")
        if any(f"{ublk.link_of(link)}/".startswith(f"{path}/") for link in links):
            name = "".join(ublk.lines_of(f"{process}/comm"))
            yield f"{name} (pid {process[6:]})"
