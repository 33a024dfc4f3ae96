# SPDX-License-Identifier: MIT
"""Data paths: each carries the same data, with and without batches."""

from __future__ import annotations

import array
import asyncio
import errno
import itertools
import json
import mmap
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.checked import Checked
from tests.support import (
    AsyncRam,
    Fio,
    Forked,
    Ram,
    assert_error_line,
    at_least,
    before,
    carries,
    devices_left,
    direct_buffer,
    error_of,
    fio_verify,
    kernel,
    message,
    needs,
    opened,
    read_at,
    recovered,
    sh,
    since,
    until,
    with_partition,
    write_at,
)

# Every data path, alone and with batches. NEED_GET_DATA and batches exclude each other.
PATHS = [(path, batch) for batch in (False, True) for path in ublk.DATA_PATHS
         if (path, batch) != ("get-data", True)]


def first_kernel(data_path, batch):
    """Return the first kernel that has a data path, alone or with batches."""
    flags = ublk.DATA_PATHS[data_path].features | ublk.UBLK_F_BATCH_IO * batch
    releases = ["6.0", *(feature.since for feature in ublk.FEATURES if flags & feature)]
    return max(releases, key=lambda release: [int(part) for part in release.split(".")])


def each_path(*paths, **others):
    """Run a test with every data path; others: names of arguments and their values, given in turn.

    With UBLK_TEST_ALL each path gets each of the values, and all of their combinations.
    """
    rows = [(path, batch, *(values[at % len(values)] for values in others.values()))
            for at, (path, batch) in enumerate(paths or PATHS)]
    if os.environ.get("UBLK_TEST_ALL"):
        rows = [(*pair, *values) for pair in paths or PATHS
                for values in itertools.product(*map(sorted, map(set, others.values())))]
    cases = [pytest.param(*row, marks=since(first_kernel(*row[:2])),
                          id="-".join(map(str, [row[0] + "-batch" * row[1], *row[2:]]))) for row in rows]
    return pytest.mark.parametrize(["data_path", "batch", *others], cases)


@kernel
def test_batches_need_a_depth_of_two():
    assert "depth 1: not a number from 2 to 4096" in message(ublk.Device(Ram(), depth=1, batch=True).start)


@kernel
@since("7.0")
def test_the_kernel_has_no_batches_of_one_either(control):
    assert error_of(control.add_dev, -1, 1, 1, 4096, ublk.UBLK_F_BATCH_IO) == errno.EINVAL


@kernel
def test_get_data_and_batches_exclude_each_other():
    says = message(ublk.Device(Ram(), data_path="get-data", batch=True).start)
    assert_error_line(f"ublk: {says}\n", errno.EINVAL, says="not allow it together with NEED_GET_DATA")


def path_options(path):
    """Return the options of the command line for a data path."""
    return ["--need-get-data" if path == "get-data" else f"--{path}"]


def made(targets, name, image, size=24 << 20):
    """Make a target: one of the companion's, or ten lines of Python."""
    return {"ram": lambda: targets.Ram(size=size), "loop": lambda: targets.Loop(str(image(str(size)))),
            "direct": lambda: targets.Loop(str(image(str(size))), direct=True),
            "plain": lambda: Ram(size), "coroutines": lambda: AsyncRam(size)}[name]()


@kernel
@each_path(queues=[1, 4])
def test_every_data_path_verifies_a_loop(targets, new_image, data_path, batch, queues):
    needs("fio")
    target = made(targets, "loop", new_image)
    with ublk.Device(target, data_path=data_path, batch=batch, queues=queues) as disk:
        assert disk.info.flags & disk.data_path.features == ublk.DATA_PATHS[data_path].features
        assert disk.info.nr_hw_queues == min(queues, os.sysconf("SC_NPROCESSORS_CONF"))
        fio_verify(disk.path)
        os.sync()
        sh("cmp", disk.path, target.path)


@kernel
@each_path(name=["plain", "coroutines", "ram"], queues=[4, 1])
def test_every_data_path_verifies_python(targets, new_image, data_path, batch, name, queues):
    needs("fio")
    target = made(targets, name, new_image)
    with ublk.Device(target, data_path=data_path, batch=batch, queues=queues) as disk:
        fio_verify(disk.path)


@kernel
@each_path(name=["loop", "coroutines", "ram", "plain"], queues=[1, 4, 1])
def test_every_data_path_carries_ext4(targets, new_image, tmp_path, data_path, batch, name, queues):
    target = made(targets, name, new_image)
    with ublk.Device(target, data_path=data_path, batch=batch, queues=queues) as disk:
        carries("ext4", disk, tmp_path / "mnt")


@kernel
@each_path(queues=[4, 1])
def test_every_data_path_reads_zeroes_from_null_and_is_listed(data_path, batch, queues):
    with ublk.Device(ublk.Null(size=ublk.Size(1 << 30)), data_path=data_path, batch=batch, queues=queues,
                     depth=2) as disk, opened(disk.path) as fd:
        for size in (512, 4096, 512 << 10, 2 << 20):
            write_at(fd, 4096, b"x" * size)
            assert read_at(fd, 4096, size) == bytes(size)
        flags = set(ublk.describe(disk.control, disk.id)["flags"])
        expected = ublk.DATA_PATHS[data_path].features | (ublk.UBLK_F_BATCH_IO if batch else 0)
        paths = sum({int(feature) for feature in ublk.FEATURES
                     if any(path.features & feature for path in ublk.DATA_PATHS.values())})
        assert flags & set(ublk.flag_names(paths | ublk.UBLK_F_BATCH_IO)) == set(ublk.flag_names(expected))


class Troubled(Ram):
    """Blocks of 64 KiB that are well, raise, are served piecemeal, or not at all."""

    def outcome(self, offset, buffer):
        trouble = offset >> 16 & 3
        if trouble == 1:
            raise OSError(errno.ENOSPC, "full")
        return {0: None, 2: min(len(buffer), 1536), 3: 0}[trouble]

    def read(self, offset, buffer):
        count = self.outcome(offset, buffer)
        super().read(offset, buffer[:count])
        return count

    def write(self, offset, buffer):
        count = self.outcome(offset, buffer)
        super().write(offset, buffer[:count])
        return count


class AsyncTroubled(Troubled):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        await asyncio.sleep(0)
        return Troubled.read(self, offset, buffer)

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        return Troubled.write(self, offset, buffer)


@kernel
@each_path()
@pytest.mark.parametrize("make", [Troubled, AsyncTroubled])
def test_a_handlers_trouble_on_every_data_path(data_path, batch, make, capfd):
    data = os.urandom(65536)
    with ublk.Device(make(), data_path=data_path, batch=batch, depth=8) as disk, opened(disk.path) as fd:
        for start in (0, 4 << 16):
            for number, expected in enumerate((0, errno.ENOSPC, 0, errno.EIO)):
                offset = start + (number << 16)
                assert error_of(write_at, fd, offset, data) == expected
                assert error_of(read_at, fd, offset, len(data)) == expected
                if not expected:
                    assert read_at(fd, offset, len(data)) == data
        assert disk.target.data[2 << 16:3 << 16] == data
    assert "Traceback" not in capfd.readouterr().err


class Half(Ram):
    """A disk that fills, of what is read from beyond 64 KiB, only the first half."""

    def read(self, offset, buffer):
        if offset >= 65536:
            buffer[:len(buffer) // 2] = b"h" * (len(buffer) // 2)


class AsyncHalf(Half):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        await asyncio.sleep(0)
        Half.read(self, offset, buffer)


@kernel
@each_path()
@pytest.mark.parametrize("make", [Half, AsyncHalf])
def test_what_a_handler_did_not_fill_shows_no_other_request(data_path, batch, make):
    depth = 2 if batch else 1                           # so few that each buffer is used again
    with ublk.Device(make(), data_path=data_path, batch=batch, depth=depth) as disk, opened(disk.path) as fd:
        for size in (4096, 65536, 4096):
            for _ in range(2 * depth):
                write_at(fd, 0, b"secret! " * (65536 // 8))
            for _ in range(2 * depth):
                assert read_at(fd, 65536, size) == b"h" * (size // 2) + bytes(size // 2)


class Together(Ram):
    """A disk whose reads end when as many of them as expected are there, or when that takes too long."""

    expected, seen, deadline = 0, 0, float("inf")

    async def read(self, offset, buffer):
        self.seen += 1
        while self.seen < self.expected and time.monotonic() < self.deadline:
            await asyncio.sleep(0.01)
        super().read(offset, buffer)


@kernel
@each_path(depth=[4, 16, 64])
def test_as_many_requests_as_a_queue_is_deep_are_served_at_a_time(data_path, batch, depth):
    target = Together()
    with ublk.Device(target, data_path=data_path, batch=batch, depth=depth) as disk, opened(disk.path) as fd:
        for _ in range(2):                              # when tags have been committed, too
            target.seen, target.expected, target.deadline = 0, depth, time.monotonic() + 60
            readers = [threading.Thread(target=read_at, args=(fd, 8192 * number, 4096))
                       for number in range(depth)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            assert time.monotonic() < target.deadline
            target.expected = 0


@kernel
def test_all_tags_of_a_queue_are_fetched_in_one_system_call(monkeypatch):
    submitted = []

    class Counts(ublk.Ring):
        def enter(self, *words, **options):
            submitted.append(self.pending)
            return super().enter(*words, **options)

    monkeypatch.setattr(ublk, "Ring", Counts)
    with ublk.Device(Ram(), depth=128):
        pass
    assert max(submitted) == 128


def cached(path):
    """Return how many pages of a file are in the page cache."""
    return int(sh("fincore", "--noheadings", "--output=PAGES", path).stdout or 0)


@kernel
@each_path()
def test_direct_transfers_leave_the_page_cache_alone_on_every_data_path(targets, backing, data_path, batch):
    needs("fincore")
    data = os.urandom(1 << 20)
    for direct in (True, False):                        # the other way shows that it would be seen
        target = targets.Loop(str(backing), direct=direct)
        with ublk.Device(target, data_path=data_path, batch=batch) as disk, opened(disk.path) as fd:
            write_at(fd, 0, data)
            assert read_at(fd, 0, len(data)) == data
            assert read_at(fd, 32 << 20, 1 << 20) == bytes(1 << 20)
            assert (cached(backing) == 0) is direct


def allocated(path):
    """Return how many bytes of a file are on its disk."""
    os.sync()
    return os.stat(path).st_blocks * 512


@kernel
@each_path()
def test_zeroes_keep_their_blocks_unless_they_may_be_given_back(targets, backing, data_path, batch):
    """`blkdiscard --zeroout` forbids it, hole punching in a block device allows it."""
    needs("blkdiscard", "fallocate")
    with ublk.Device(targets.Loop(str(backing)), data_path=data_path, batch=batch) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, os.urandom(4 << 20))
        full = allocated(backing)
        sh("blkdiscard", "--zeroout", "--offset", 1 << 20, "--length", 1 << 20, disk.path)
        assert allocated(backing) >= full >= 4 << 20
        sh("fallocate", "--punch-hole", "--offset", 2 << 20, "--length", 1 << 20, disk.path)
        assert allocated(backing) < full - (1 << 19)
        with opened(disk.path) as fd:
            assert read_at(fd, 1 << 20, 2 << 20) == bytes(2 << 20)
            assert read_at(fd, 0, 1 << 20) == backing.read_bytes()[:1 << 20] != bytes(1 << 20)


@kernel
@each_path(direct=[False, True])
def test_a_backing_file_cut_short_on_every_data_path(targets, backing, data_path, batch, direct):
    path, data = backing, os.urandom(1 << 20)
    target = targets.Loop(str(path), direct=direct)
    with ublk.Device(target, data_path=data_path, batch=batch, depth=4) as disk, opened(disk.path) as fd:
        write_at(fd, 0, data)
        os.truncate(path, 512 << 10)
        assert read_at(fd, 0, 512 << 10) == data[:512 << 10]
        for _ in range(3):                              # no tag is lost by it
            for offset, size in ((512 << 10, 4096), (508 << 10, 8192), (1 << 20, 65536), (0, 1 << 20)):
                assert error_of(read_at, fd, offset, size) == errno.EIO
        write_at(fd, 512 << 10, data[512 << 10:])       # the file grows again
        assert read_at(fd, 0, 1 << 20) == data


class Elsewhere(ublk.Target):
    """A disk whose bytes lie in a file, and that notes which of them Python has to move."""

    size = 1 << 20

    def __init__(self, file):
        self.fd, self.moved = file.fileno(), []

    def map(self, offset, length, write):
        return self.fd, offset

    def flush(self):
        os.fsync(self.fd)

    def read(self, offset, buffer):
        self.moved.append(("read", offset))
        return os.preadv(self.fd, [buffer], offset)

    def write(self, offset, buffer):
        self.moved.append(("write", offset))
        return os.pwrite(self.fd, buffer, offset)

    write_fua = write


@kernel
@each_path(*[path for path in PATHS if path[0] != "user-copy"])
def test_the_kernel_moves_what_map_names(tmp_path, data_path, batch):
    data = os.urandom(256 << 10)
    with open(tmp_path / "data", "w+b", buffering=0) as file:
        file.truncate(1 << 20)
        target = Elsewhere(file)
        with ublk.Device(target, data_path=data_path, batch=batch, depth=4, partition_scan=False) as disk:
            with opened(disk.path) as fd, opened(disk.path, os.O_RDWR | os.O_DSYNC) as durable:
                for offset in range(0, len(data), 64 << 10):
                    write_at(fd, offset, data[offset:offset + (64 << 10)])
                    assert read_at(fd, offset, 64 << 10) == data[offset:offset + (64 << 10)]
                assert target.moved == []
                write_at(durable, 512 << 10, data)
                assert read_at(fd, 0, 1 << 20) == data + bytes(len(data)) + data + bytes(len(data))
                assert os.pread(file.fileno(), 1 << 20, 0) == read_at(fd, 0, 1 << 20)
                assert target.moved == [("write", 512 << 10)]
                target.moved.clear()
                file.truncate(6 << 10)                  # what is short is continued, or fails
                assert error_of(read_at, fd, 4096, 4096) == errno.EIO
                assert read_at(fd, 0, 4096) == data[:4096]
                assert target.moved[0] == ("read", 4096)


class Aligned(Ram):
    """A disk that wants clients' memory to lie well."""

    dma_alignment, max_segments, max_segment_size = 512, 3, 8192


@kernel
@since("6.15")
@pytest.mark.parametrize("data_path", ["copy", "zero-copy"])
def test_the_kernel_is_told_what_memory_a_target_can_take(data_path):
    with ublk.Device(Aligned(), data_path=data_path) as disk:
        limits = [int(Path(f"/sys/block/ublkb{disk.id}/queue/{name}").read_text())
                  for name in ("dma_alignment", "max_segments", "max_segment_size")]
        assert limits == [511, 3, 8192]


@kernel
@before("6.15")
def test_where_nothing_is_moved_without_a_copy_any_memory_will_do():
    class Direct(Ram):
        dma_alignment = 512

    with ublk.Device(Direct()) as disk, opened(disk.path) as fd:
        assert read_at(fd, 0, 4096) == bytes(4096)
    assert "needs Linux 6.15" in message(ublk.Device(Aligned()).start)


@kernel
@pytest.mark.parametrize("data_path", [pytest.param("zero-copy", marks=since("6.15")),
                                       pytest.param("auto-zero-copy", marks=since("6.16"))])
def test_no_memory_of_a_client_breaks_a_direct_transfer(targets, monkeypatch, data_path):
    broken, chain_done = [], ublk.Queue.chain_done
    monkeypatch.setattr(ublk.Queue, "chain_done", lambda *words: broken.append(words) or chain_done(*words))
    with ublk.Device(Aligned()) as lower:
        target = targets.Loop(lower.path, direct=True)
        with ublk.Device(target, data_path=data_path) as disk, opened(disk.path) as fd:
            memory = memoryview(direct_buffer(8192))
            assert error_of(os.preadv, fd, [memory[4:4100]], 0) == errno.EINVAL
            assert os.preadv(fd, [memory[512:4608]], 0) == 4096
            assert os.pwritev(fd, [memory[512:4608]], 8192) == 4096
        assert broken == []


@kernel
@each_path()
def test_a_backing_that_is_full_or_gone_on_every_data_path(targets, new_image, data_path, batch):
    class Full(targets.Loop):
        """Beyond 64 KiB a device that has no room; beyond 128 KiB a descriptor of nothing."""

        def backing(self, offset):
            return (self.fd, self.full, 999)[min(offset >> 16, 2)]

        def map(self, offset, length, write):
            if offset >> 16 == 3:
                raise OSError(errno.ENODATA, "no such place")
            return self.backing(offset), offset

        async def read(self, offset, buffer):
            self.map(offset, 0, False)
            return await ublk.uring_read(self.backing(offset), buffer, offset)

        async def write(self, offset, buffer):
            self.map(offset, 0, True)
            return await ublk.uring_write(self.backing(offset), buffer, offset)

    target = Full(str(new_image("1M")))
    with open("/dev/full", "r+b", 0) as full, \
            ublk.Device(target, data_path=data_path, batch=batch, depth=4) as disk, opened(disk.path) as fd:
        target.full = full.fileno()
        for _ in range(3):
            write_at(fd, 0, b"w" * 4096)
            assert read_at(fd, 0, 4096) == b"w" * 4096
            assert error_of(write_at, fd, 1 << 16, b"w" * 4096) == errno.ENOSPC
            assert error_of(write_at, fd, 2 << 16, b"w" * 4096) == errno.EIO
            assert error_of(read_at, fd, 2 << 16, 4096) == errno.EIO
            assert error_of(write_at, fd, 3 << 16, b"w" * 4096) == errno.ENODATA
            assert error_of(read_at, fd, 3 << 16, 4096) == errno.ENODATA


@kernel
@each_path(queues=[1, 2])
def test_a_kill_under_load_loses_nothing_on_any_data_path(backing, data_path, batch, queues):
    disk = Forked("loop", backing, "-r", "reissue", "-q", queues, *path_options(data_path),
                  *["--batch"] * batch).live()
    with Fio(disk, "--size=2M") as fio:
        fio.busy()
        disk.kill()
        disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("6.16")
@each_path(*((path, batch) for path, batch in PATHS if not batch))
def test_quiesce_under_load_loses_nothing_on_any_data_path(backing, run, data_path, batch):
    disk = Forked("loop", backing, "-r", "reissue", "-q", 2, *path_options(data_path)).live()
    with Fio(disk, "--size=2M") as fio:
        fio.busy()
        done = run("quiesce", disk.id)
        assert (done.status, done.err) == (0, "")
        assert disk.wait() == 0
        disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("7.0")
def test_quiesce_with_batches_is_refused(backing, run):
    """For there the kernel fails what arrives meanwhile."""
    with Forked("loop", backing, "-r", "reissue", "--batch") as disk:
        done = run("quiesce", disk.id)
        assert_error_line(done.err, errno.EOPNOTSUPP, says="not made with the flag QUIESCE")


def closure(flags):
    """Return flags with what they need."""
    for feature in ublk.FEATURES:
        if flags & feature and feature.needs and not flags & feature.needs:
            return closure(flags | 1 << (feature.needs.bit_length() - 1))
    return flags


@kernel
def test_every_combination_the_kernel_refuses_is_refused_first(control):
    """And no other: each pair of features, with and without what they need, is asked of both.

    Only what recovery needs is checked by no kernel before 6.13.
    """
    known = [feature for feature in ublk.FEATURES if feature & (control.features or 0)
             and feature not in (ublk.UBLK_F_UNPRIVILEGED_DEV, ublk.UBLK_F_IO_DESC_SIZE)]
    pairs = {one | other for one in known for other in known}
    wrong = []
    for flags in sorted(pairs | {closure(flags) for flags in pairs}):
        says = message(ublk.check_flags, flags, control.features)
        try:
            info = control.add_dev(-1, 1, 2, 4096, flags)
            control.del_dev(info.dev_id)
            fine = not flags & ~info.flags
        except ublk.UblkError as error:
            assert error.errno == errno.EINVAL, error
            fine = False
        if bool(says) == fine and (not fine or at_least("6.13") or "USER_RECOVERY" not in says):
            wrong.append((ublk.flag_names(flags), fine, says))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.fixture
def memory():
    """Memory of 64 KiB that this process, as a server, shares with itself, as a client."""
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 65536)
    ours = mmap.mmap(fd, 65536)
    yield SimpleNamespace(ours=ours, client=memoryview(mmap.mmap(fd, 65536)), start=ublk.address_of(ours))
    os.close(fd)
    ours.close()                                        # nobody else holds it


@kernel
@since("7.1")
def test_memory_shared_with_a_client_is_not_copied(memory):
    seen = []

    class Looks(Ram):
        def read(self, offset, buffer):
            seen.append(ublk.address_of(buffer) - memory.start)
            super().read(offset, buffer)

        def write(self, offset, buffer):
            seen.append(ublk.address_of(buffer) - memory.start)
            super().write(offset, buffer)

    def transfer():
        """Write from the middle of the memory, read to its beginning; return where the buffers were."""
        memory.client[:] = data = os.urandom(65536)
        del seen[:]
        assert os.pwritev(fd, [memory.client[4096:12288]], 32768) == 8192
        assert os.preadv(fd, [memory.client[:8192]], 32768) == 8192
        assert memory.client[:8192] == data[4096:12288] == disk.target.data[32768:40960]
        return seen

    # A search for partitions would read, too
    quiet = ublk.Device(Looks(), share_memory=True, partition_scan=False)
    with quiet as disk, opened(disk.path) as fd:
        assert not {4096, 0} & set(transfer())
        index = disk.share(memory.ours)
        assert transfer() == [4096, 0]
        write_at(fd, 0, b"o" * 65536)                   # from other memory
        assert read_at(fd, 0, 65536) == b"o" * 65536
        disk.unshare(index)
        assert not {4096, 0} & set(transfer())
        index = disk.share(memory.ours, read_only=True)
        assert transfer()[0] == 4096 and seen[1] != 0
        disk.unshare(index)


@kernel
@since("7.1")
@each_path(name=["null", "loop", "ram", "plain"])
def test_shared_memory_with_every_data_path(targets, new_image, memory, data_path, batch, name):
    target = ublk.Null(size=ublk.Size(1 << 20)) if name == "null" else made(targets, name, new_image)
    moves_shared_memory(memory, target, data_path=data_path, batch=batch, queues=2)


def moves_shared_memory(memory, target, **options):
    """Write from and read into memory that a disk's server has, too."""
    with ublk.Device(target, share_memory=True, **options) as disk, opened(disk.path) as fd:
        disk.share(memory.ours)
        for _ in range(3):
            memory.client[:] = data = os.urandom(65536)
            assert os.pwritev(fd, [memory.client[4096:12288]], 32768) == 8192
            assert os.preadv(fd, [memory.client[:8192]], 32768) == 8192
            expected = bytes(8192) if isinstance(target, ublk.Null) else data[4096:12288]
            assert memory.client[:8192] == expected
            assert read_at(fd, 32768, 8192) == memory.client[:8192]
            assert memory.client[8192:] == data[8192:]


def test_memory_is_found_though_its_server_hears_of_it_after_its_client():
    late = {}
    shared = ublk.SharedCopy(memoryview(array.array("Q", [3 << 32 | 512])), late)
    threading.Timer(0.05, lambda: late.update({3: memoryview(b"." * 512 + b"m" * 512)})).start()
    assert shared.data(0, 512) == b"m" * 512


@kernel
@since("7.1")
def test_a_client_may_use_memory_while_it_is_being_shared(memory):
    failed, ended = [], threading.Event()

    def client(fd):
        while not ended.is_set():
            failed.append(error_of(os.pwritev, fd, [memory.client[:4096]], 4096))

    with ublk.Device(Ram(), share_memory=True) as disk, opened(disk.path) as fd:
        thread = threading.Thread(target=client, args=(fd,))
        thread.start()
        for _ in range(50):
            disk.unshare(disk.share(memory.ours))
        ended.set()
        thread.join()
    assert failed and not any(failed)


def test_an_index_is_not_given_away_before_its_memory_is_forgotten(memory, monkeypatch):
    """The driver gives the index to the next as soon as it is free, in whatever thread."""
    device, threads = ublk.Device(Ram(), share_memory=True), []

    def unregister(dev_id, index):
        threads.append(threading.Thread(target=device.share, args=(memory.ours,)))
        threads[0].start()
        threads[0].join(0.05)

    device.control, device.shared = SimpleNamespace(reg_buf=lambda *_: 0, unreg_buf=unregister), [{}, {}]
    monkeypatch.setattr(device, "_see_that_it_is_ours", bool)
    device.share(memory.ours)
    device.unshare(0)
    threads[0].join()
    of_one_queue, of_the_other = (memories.pop(0) for memories in device.shared)
    assert of_one_queue == of_the_other == memory.ours and of_one_queue is not of_the_other


@kernel
@since("7.1")
def test_memory_is_forgotten_also_where_a_ctrl_c_ends_unshare(memory, monkeypatch):
    """The driver gives its index to the next, which a client may use before share() has heard of it."""
    new = direct_buffer(65536)
    new[:] = b"n" * 65536
    with ublk.Device(Ram(), share_memory=True) as disk, opened(disk.path) as fd:
        index = disk.share(memory.ours)
        client = threading.Thread(target=os.pwritev, args=(fd, [new], 0))
        register, unregister = disk.control.reg_buf, disk.control.unreg_buf

        def interrupted(*words):
            unregister(*words)
            raise KeyboardInterrupt

        def noticed_late(*words):
            number = register(*words)
            client.start()
            client.join(0.3)
            return number

        monkeypatch.setattr(disk.control, "unreg_buf", interrupted)
        monkeypatch.setattr(disk.control, "reg_buf", noticed_late)
        with pytest.raises(KeyboardInterrupt):
            disk.unshare(index)
        disk.share(new)
        client.join()
        assert disk.target.data[:65536] == new[:]


@kernel
@since("7.1")
def test_shared_memory_of_a_disk_with_metadata(memory):
    moves_shared_memory(memory, Checked())


@kernel
def test_shared_memory_does_not_outlive_its_server():
    device = ublk.Device(Ram(), share_memory=True, recovery="reissue")
    assert "not possible with shared memory (22 EINVAL)" in message(device.start)


@kernel
def test_no_partition_scan():
    with ublk.Device(with_partition(), partition_scan=False) as disk, ublk.Device(with_partition()) as other:
        until(lambda: os.path.exists(f"{other.path}p1"), "the partition of a disk that is scanned")
        assert not os.path.exists(f"{disk.path}p1")
        sh(*("blockdev", "--rereadpt") if at_least("7.0") else ("partx", "-u"), disk.path)
        until(lambda: os.path.exists(f"{disk.path}p1"), "the partition")


def write_table(disk):
    """Write a partition table to a disk that is there already."""
    with opened(disk.path) as fd:
        write_at(fd, 0, bytes(with_partition().data[:4096]))


@kernel
def test_a_partition_table_that_is_written_later_is_seen_once_partx_is_told():
    with ublk.Device(Ram(8 << 20)) as disk:
        write_table(disk)
        sh("partx", "-u", disk.path)
        assert os.path.exists(f"{disk.path}p1")


@kernel
@before("7.0")
def test_the_kernel_cannot_be_told_of_a_partition_table_itself():
    with ublk.Device(Ram(8 << 20)) as disk:
        write_table(disk)
        done = sh("blockdev", "--rereadpt", disk.path, check=False)
        assert done.returncode == 1 and "Invalid argument" in done.stderr


@kernel
def test_twenty_disks_at_a_time(run):
    with ExitStack() as stack:
        disks = [stack.enter_context(ublk.Device(Ram(), depth=4)) for _ in range(20)]
        for number, disk in enumerate(disks):
            with opened(disk.path) as fd:
                write_at(fd, 4096, bytes([number]) * 4096)
        for number, disk in enumerate(disks):
            with opened(disk.path) as fd:
                assert read_at(fd, 4096, 4096) == bytes([number]) * 4096
        rows = json.loads(run("list", "--json").out)
        assert [row["state"] for row in rows] == ["LIVE"] * 20
        assert sorted(row["id"] for row in rows) == sorted(disk.id for disk in disks)


@kernel
def test_disks_of_many_servers_at_a_time(run):
    disks = [Forked("ram", "--size", "1M", "-d", 4) for _ in range(12)]
    try:
        for disk in disks:
            with opened(disk.live().path) as fd:
                write_at(fd, 4096, b"s" * 4096)
        assert len(devices_left()) == len(disks)
        assert run("del", "--all").status == 0
        assert [disk.wait() for disk in disks] == [0] * len(disks)
    finally:
        for disk in disks:
            disk.__exit__(None)
