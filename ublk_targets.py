# SPDX-License-Identifier: MIT
"""Targets for ublk.py: what can stand behind a disk, each a short class that shows one idea.

    ram       memory                                   loop      a file or a block device

Lying beside ublk.py, this file adds these names to its command line: ``ublk.py loop disk.img``.
The parameters of a class are its arguments there: positional ones are words, keyword-only ones
options, described by the lines ``name: text`` of its docstring.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from typing import Any

import ublk

PAGE_SIZE = mmap.PAGESIZE
ZEROES = mmap.mmap(-1, 1 << 20)             # page-aligned, as O_DIRECT wants its buffers

# linux/falloc.h and linux/fs.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
BLKDISCARD, BLKSSZGET, BLKPBSZGET = 0x1277, 0x1268, 0x127B


# =================================================================================================
# Disks of memory and of files
# =================================================================================================


class Ram(ublk.Target):
    """Keep the disk in memory; it is gone when the server ends.

    size: size of the disk
    """

    processes = True

    def __init__(self, *, size: ublk.Size = ublk.Size(1 << 30)) -> None:
        if size <= 0 or size % self.block_size:
            raise ublk.UblkError(errno.EINVAL, f"ram of {size} bytes", "not a multiple of 512",
                                 "choose another size")
        self.size = size
        # Shared, so that processes forked later see the same disk; pages exist once written.
        noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | noreserve)
        self.view = memoryview(self.memory)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.view[offset:offset + len(buffer)]

    def write(self, offset: int, buffer: memoryview) -> None:
        self.view[offset:offset + len(buffer)] = buffer

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Give whole pages back, which makes them read as zeroes, and clear the edges by hand."""
        end = offset + length
        first, last = min(-(-offset // PAGE_SIZE) * PAGE_SIZE, end), end // PAGE_SIZE * PAGE_SIZE
        self.view[offset:first] = bytes(first - offset)
        if first < last:
            self.memory.madvise(mmap.MADV_REMOVE, first, last - first)
        last = max(first, last)
        self.view[last:end] = bytes(end - last)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, True)


class Loop(ublk.Target):
    """Serve a file or a block device as a disk.

    A file that may not be written to makes a read-only disk.

    path: the file or block device
    direct: transfer around the page cache (O_DIRECT)
    """

    processes = True

    def __init__(self, path: str, *, direct: bool = False) -> None:
        self.path = path
        self.fd, self.read_only = open_backing(path, os.O_DIRECT if direct else 0)
        try:
            self.is_block = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.block_size, self.physical_block_size = block_sizes(self.fd, path, direct)
            self.size = size_of(self.fd, path, self.block_size)
            if not self.read_only and self._can_discard():
                self.discard = self._discard        # an attribute: not every backing has it
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def map(self, offset: int, length: int, write: bool) -> tuple[int, int]:
        """Say in which file, and where in it, these bytes of the disk are."""
        return self.fd, offset

    async def read(self, offset: int, buffer: memoryview) -> int:
        return await ublk.uring_read(self.fd, buffer, offset)       # 0 where the file was cut: EIO

    async def write(self, offset: int, buffer: memoryview) -> int:
        return await ublk.uring_write(self.fd, buffer, offset)

    async def write_fua(self, offset: int, buffer: memoryview) -> int:
        return await ublk.uring_write(self.fd, buffer, offset, os.RWF_DSYNC)

    async def flush(self) -> None:
        await ublk.uring_fsync(self.fd, datasync=True)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Punch a hole if that is allowed, else convert to zeroes, else write them."""
        for mode in (FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE)[0 if unmap else 1:]:
            try:
                await ublk.uring_fallocate(self.fd, mode | FALLOC_FL_KEEP_SIZE, offset, length)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        for at in range(offset, offset + length, len(ZEROES)):
            piece = memoryview(ZEROES)[:min(len(ZEROES), offset + length - at)]
            await ublk.whole(self.write, self.write(at, piece), at, piece)

    async def _discard(self, offset: int, length: int) -> None:
        if self.is_block:
            fcntl.ioctl(self.fd, BLKDISCARD, two_words(offset, length))
        else:
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            await ublk.uring_fallocate(self.fd, mode, offset, length)

    def _can_discard(self) -> bool:
        """Try it where there is nothing to lose: beyond the end, or (a device) at an odd place."""
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, BLKDISCARD, two_words(1, ublk.SECTOR))
            else:
                fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, self.size, PAGE_SIZE)
        except OSError as error:
            return error.errno == errno.EINVAL and self.is_block
        return True

    def resized(self, size: int) -> None:
        """Let a file grow with its disk; it is never cut, for that would lose data."""
        if not self.is_block and size > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, size)
        self.size = size


def open_backing(path: str, flags: int = 0) -> tuple[int, bool]:
    """Open a file or block device; return its descriptor and whether it is only for reading.

    A device is taken exclusively, so that nobody mounts it meanwhile.
    """
    flags |= os.O_CLOEXEC | (os.O_EXCL if os.path.exists(path) and is_block(path) else 0)
    try:
        try:
            return os.open(path, flags | os.O_RDWR), False
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return os.open(path, flags & ~os.O_EXCL | os.O_RDONLY), True
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise ublk.UblkError(errno.EINVAL, path, "its file system has no direct I/O",
                                 "leave --direct out") from None
        raise


def is_block(path: str) -> bool:
    """Tell a block device from a file; raise UblkError for what is neither."""
    mode = os.stat(path).st_mode
    if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
        raise ublk.UblkError(errno.EINVAL, path, "neither a file nor a block device",
                             "name one that is")
    return stat.S_ISBLK(mode)


def block_sizes(fd: int, path: str, direct: bool) -> tuple[int, int]:
    """Return the smallest unit of transfer to this file or device, and the one it likes."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        sizes = [bytearray(4), bytearray(4)]
        fcntl.ioctl(fd, BLKSSZGET, sizes[0])
        fcntl.ioctl(fd, BLKPBSZGET, sizes[1])
        logical, physical = (int.from_bytes(size, "little") for size in sizes)
        return logical, min(physical, PAGE_SIZE)
    size = ublk.SECTOR
    with mmap.mmap(-1, PAGE_SIZE) as page, memoryview(page) as view:
        while direct and size <= PAGE_SIZE:
            with view[:size] as part:
                try:
                    os.preadv(fd, [part], 0)
                    break
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            size *= 2
    if size > PAGE_SIZE:
        raise ublk.UblkError(errno.EINVAL, path, "its file system takes no direct I/O of a page",
                             "leave --direct out")
    return size, max(size, 4096)


def size_of(fd: int, path: str, block_size: int) -> int:
    """Return the size of a file or device; raise UblkError for one that cannot be a disk's."""
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise ublk.UblkError(errno.EINVAL, path, "it is empty",
                             f"give it a size: truncate -s 1G {path}")
    if size % block_size:
        more = -(-size // block_size) * block_size
        raise ublk.UblkError(errno.EINVAL, path, f"its size {size} is not a multiple of {block_size}",
                             f"make it one: truncate -s {more} {path}")
    return size


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the os module lacks; raises OSError."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def two_words(first: int, second: int) -> bytes:
    """Pack the argument of an ioctl on a range of a block device."""
    return first.to_bytes(8, "little") + second.to_bytes(8, "little")
