# SPDX-License-Identifier: MIT
"""What several chapters use: targets, ways to run ublk.py, to load a disk, to look at the machine."""

from __future__ import annotations

import ast
import asyncio
import ctypes
import errno
import fcntl
import gc
import hashlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk

HERE = Path(__file__).resolve().parent.parent
UBLK = HERE / "ublk.py"
PYTHON = os.path.realpath(sys.executable)       # unlike one of a virtual environment, every user may run it
HANG = 200                          # seconds: longer than any test takes, even under emulation
LIBC = ctypes.CDLL(None, use_errno=True)
IN_LAB = os.environ.get("UBLK_TEST_KERNEL", "host") != "host"

kernel = pytest.mark.kernel
THIS_KERNEL = ublk.kernel_release()


class Ram(ublk.Target):
    """The ten lines of the documentation: a disk in memory."""

    def __init__(self, size=1 << 20):
        self.size = size
        self.data = bytearray(size)

    def read(self, offset, buffer):
        buffer[:] = self.data[offset:offset + len(buffer)]

    def write(self, offset, buffer):
        self.data[offset:offset + len(buffer)] = buffer


class AsyncRam(Ram):
    """The same with coroutines, each of which lets others run before it does its work."""

    async def read(self, offset, buffer):
        await asyncio.sleep(0)
        super().read(offset, buffer)

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        super().write(offset, buffer)


def sh(*words, check=True, **options):
    """Run a program; return what it did with its output as text."""
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, text=True, check=False,
                          capture_output=True, **options)
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode}:\n{output}"
    return done


ERROR_LINE = re.compile(r"ublk: [^:\n]+.*: .+ \((\d+) ([A-Z0-9]+)\)(: .+)?\n\Z")


def assert_error_line(text, number=None, *, says=""):
    """Errors are one line, ``ublk: what failed: reason (ERRNO NAME): what to do``."""
    found = ERROR_LINE.match(text)
    assert found and text.count("\n") == 1, f"not an error line: {text!r}"
    assert getattr(errno, found[2]) == int(found[1])
    assert number is None or int(found[1]) == number, text
    assert says in text


def direct_buffer(size):
    """Return memory that O_DIRECT accepts."""
    return mmap.mmap(-1, size)


@contextmanager
def opened(path, flags=os.O_RDWR):
    """Open a disk past the page cache, so that each transfer is a request of its own."""
    fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd, offset, size):
    """Read with O_DIRECT."""
    buffer = direct_buffer(size)
    count = os.preadv(fd, [buffer], offset)
    return buffer[:count]


def write_at(fd, offset, data):
    """Write with O_DIRECT."""
    buffer = direct_buffer(len(data))
    buffer[:] = data
    return os.pwritev(fd, [buffer], offset)


def error_of(function, *args):
    """Return the errno with which function fails, 0 if it does not."""
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0


def until(condition, what="it", seconds=60):
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def target_file(directory, body):
    """Write a target file; its classes may use ublk, asyncio, os and time."""
    path = directory / "mine.py"
    path.write_text("import asyncio, os, time, ublk\n" + textwrap.dedent(body))
    return path


def needs(*programs):
    """Skip a test where programs are missing; in the lab they are all there, so that is a failure."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        (pytest.fail if IN_LAB else pytest.skip)(f"not installed here: {', '.join(missing)}")


def needs_module(name, least):
    """Skip a test where a Python module that only testing needs is missing, or older than this."""
    try:
        found = int(metadata.version(name).partition(".")[0])
    except metadata.PackageNotFoundError:
        pytest.skip(f"not installed here: {name}")
    if found < least:
        pytest.skip(f"{name} {found} is installed here, {least} is needed")


def at_least(release):
    """Tell whether the running kernel is of this release, such as "6.16", or newer."""
    return tuple(map(int, ublk.kernel_release().split("."))) >= tuple(map(int, release.split(".")))


def since(release):
    """Mark what a kernel before this release does not have: the test is skipped there, and says why."""
    return pytest.mark.skipif(not at_least(release), reason=f"needs Linux {release}, this is {THIS_KERNEL}")


def before(release):
    """Mark what only kernels before this release do: the test is skipped on others, and says why."""
    reason = f"is for kernels before {release}, this is {THIS_KERNEL}"
    return pytest.mark.skipif(at_least(release), reason=reason)



def as_user(uid, function):
    """Call function in a forked process of an ordinary user; return the text it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            text = function()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def message(function, *args):
    """Return the text of the UblkError with which function fails."""
    try:
        function(*args)
    except ublk.UblkError as error:
        return str(error)
    return ""


# ---- what must not be left behind, looked for and taken away without the product --------------------


IORING_OP_URING_CMD, IORING_SETUP_SQE128, IORING_OFF_SQES = 46, 1 << 10, 0x10000000
IO_URING_SETUP, IO_URING_ENTER = 425, 426
DEL_DEV, STOP_DEV = 0x05, 0x07
ENCODED = 0xC0207500                # Linux 6.4 and later want _IOWR('u', command, 32 bytes)


def device_command(command, dev_id, seconds):
    """Send DEL_DEV or STOP_DEV; return its result, or None if it does not end in time."""
    result = _device_command(ENCODED | command, dev_id, seconds)
    if result is not None and result < 0:
        result = _device_command(command, dev_id, seconds)
    return result


def _device_command(opcode, dev_id, seconds):
    """Make a ring for one command and wait for its end; to close the ring cancels the command."""
    params = (ctypes.c_uint32 * 30)()
    params[2] = IORING_SETUP_SQE128
    control = os.open("/dev/ublk-control", os.O_RDWR | os.O_CLOEXEC)
    ring = LIBC.syscall(IO_URING_SETUP, 2, params)
    assert ring >= 0, os.strerror(ctypes.get_errno())
    sq_tail, sq_array, cq_tail, cqes = params[11], params[16], params[21], params[25]
    path = ctypes.create_string_buffer(f"/dev/ublkc{dev_id}".encode())  # an ordinary user's device wants it
    try:
        with mmap.mmap(ring, sq_array + 4 * params[0]) as queues, \
                mmap.mmap(ring, 128 * params[0], offset=IORING_OFF_SQES) as sqes:
            struct.pack_into("=BBHiQ", sqes, 0, IORING_OP_URING_CMD, 0, 0, control, opcode)
            struct.pack_into("=IHHQQH", sqes, 48, dev_id, 0xFFFF, len(path), ctypes.addressof(path), 0,
                             len(path))
            struct.pack_into("=I", queues, sq_array, 0)
            struct.pack_into("=I", queues, sq_tail, 1)
            LIBC.syscall(IO_URING_ENTER, ring, 1, 0, 0, None, 0)
            deadline = time.monotonic() + seconds
            while not struct.unpack_from("=I", queues, cq_tail)[0]:
                if time.monotonic() > deadline:
                    return None
                LIBC.syscall(IO_URING_ENTER, ring, 0, 0, 1, None, 0)        # GETEVENTS: run what is due
                time.sleep(0.005)
            return struct.unpack_from("=i", queues, cqes + 8)[0]
    finally:
        os.close(ring)
        os.close(control)


def delete_device(dev_id, seconds=10):
    """Stop a device, see its node closed, which Linux 6.3 wants, and delete it."""
    device_command(STOP_DEV, dev_id, seconds)
    for let_go in let_go_of_files, let_go_of_mappings:
        let_go("/dev/ublk", "anon_inode:[io_uring]")
    deadline = time.monotonic() + seconds
    while error_of(lambda: os.close(os.open(f"/dev/ublkc{dev_id}", os.O_RDWR))) == errno.EBUSY:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    device_command(DEL_DEV, dev_id, seconds)


MAP_ALONE = 0x32                    # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS


def let_go_of_files(*paths, beyond=-1):
    """Put /dev/null in the place of this process's descriptors of these paths.

    Their numbers stay taken: who has them may still use and close them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):                             # the listing's own
            if fd > beyond and fd != null and os.readlink(f"/proc/self/fd/{fd}").startswith(paths):
                os.dup2(null, fd, inheritable=False)
    os.close(null)


def let_go_of_mappings(*paths):
    """Put zeroes in the place of this process's mappings of these paths; their addresses stay taken."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(None, 5)
        if len(words) == 6 and words[5].startswith(paths):
            first, last = (int(word, 16) for word in words[0].split("-"))
            length = ctypes.c_size_t(last - first)
            LIBC.mmap(ctypes.c_void_p(first), length, 3, MAP_ALONE, -1, ctypes.c_long(0))


def devices_left():
    """Return the ids of ublk devices, as /sys and /dev show them."""
    names = [*Path("/sys/class").glob("ublk-char/ublkc*"), *Path("/sys/block").glob("ublkb*"),
             *Path("/dev").glob("ublk[bc]*")]
    return sorted({int(re.match(r"ublk[bc](\d+)", path.name)[1]) for path in names})


def mounts_left():
    """Return the mount points of ublk disks."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("/dev/ublkb")]


def command_line(pid):
    """Return the words of a process in one line."""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")


@contextmanager
def descriptors_below(limit):
    """Have nothing opened that would get this number or a higher one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def descriptors():
    """Return this process's open files, without what only waits to be collected."""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def copy_product(directory):
    """Copy the product's two files, with what Python has compiled of them."""
    for name in "ublk.py", "ublk_targets.py":
        shutil.copy2(HERE / name, directory)
    for path in HERE.glob("__pycache__/ublk*.pyc"):
        (directory / "__pycache__").mkdir(exist_ok=True)
        shutil.copy2(path, directory / "__pycache__")


def installed(directory):
    """Return a program that is ublk.py of that directory, as a module: Python compiles it once.

    A script it compiles anew each time, which takes seconds in the lab.
    """
    return f"import sys; sys.path.insert(0, {str(directory)!r}); import ublk; ublk.command()"


def children_of(pid):
    """Return {pid: command line} of a process's children."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):             # a thread, or a child, that has just ended
            for child in path.read_text().split():
                found[int(child)] = command_line(child)
    return dict(sorted(found.items()))


def threads_of(pid):
    """Return the ids of a process's threads, without io_uring's workers: these come and go."""
    found = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):             # it has just ended
            found += [] if (path / "comm").read_text().startswith("iou-") else [int(path.name)]
    return found


def fields_of(pid):
    """Return what /proc/PID/stat says behind the name: state, parent, and so on."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()


def ancestors():
    """Yield the ids of this process, its parent, and so on."""
    pid = os.getpid()
    while pid:
        yield pid
        pid = int(fields_of(pid)[1])


def processes_left():
    """Return {pid: command line} of our children, and of servers whose parent has ended."""
    own = re.escape(command_line("self"))
    orphans = {pid: words for pid, words in children_of(1).items()
               if pid not in ancestors() and re.search(rf"(^|[ /])ublk\.py |^{own}$", words)}
    return {**orphans, **children_of(os.getpid())}


def leftovers():
    """Return a description of everything a test should have taken away; empty if all is well."""
    found = [f"mount {path}" for path in mounts_left()]
    found += [f"process {pid}: {words}" for pid, words in processes_left().items()]
    return found + [f"device {dev_id}" for dev_id in devices_left()]


def end_processes():
    """Kill all that tests have started, and the sessions of these."""
    for pid in processes_left():
        for member in {pid, *session(pid)}:
            with suppress(OSError):
                os.kill(member, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(pid, 0)


def clean_up():
    """Take away what a test left behind, so that the next one starts well."""
    for path in mounts_left():
        sh("umount", "-l", path, check=False)
    end_processes()
    for dev_id in devices_left():
        delete_device(dev_id)


class Hanging(BaseException):
    """A test takes far too long."""


HANGING = signal.SIGRTMAX           # which nothing else uses


@contextmanager
def watchdog(seconds, again=10):
    """Raise Hanging in what takes longer, freed of what it may be waiting for; end the run if it goes on.

    What keeps it is killed first: its processes, whose disks then fail every request. Handlers in
    this process are raised in as well. After six times nothing will help.
    """
    def bite():
        for _ in range(6):
            if done.wait(again if bitten else seconds):
                return
            bitten.append(True)
            end_processes()
            for dev_id in devices_left():
                device_command(STOP_DEV, dev_id, 1)
            for thread in threading.enumerate():
                if thread.name.startswith("ublk"):
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident),
                                                               ctypes.py_object(Hanging))
            signal.pthread_kill(threading.main_thread().ident, HANGING)
        if not done.wait(again):
            os._exit(70)

    def hanging(*_):
        raise Hanging(f"this has taken more than {seconds} s")

    bitten, done = [], threading.Event()
    before = signal.signal(HANGING, hanging)
    thread = threading.Thread(target=bite, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(HANGING, before)


# ---- the kernel's log ---------------------------------------------------------------------------


TROUBLE = re.compile(r"WARNING: |\bBUG\b|Oops|general protection fault|blocked for more than|Kernel panic|"
                     r"stall|lockup|refcount_t")

# What the kernel may say: a pattern, the tests in which it may, and why it is no fault of ours. On 6.12 this
# one comes of half-fetched servers and kills in START_DEV; on 7.3, seldom, of any queue that ends.
KNOWN_TROUBLE = [
    (r"WARNING: .* ublk_ch_uring_cmd\+",
     "" if at_least("7.0") else "half-fetched|killed_while_it_starts.START-|half_a_server",
     "The driver knows whose a command is only once all tags of the queue (up to 6.15) or the tag (later) "
     "are fetched, and forgets it when the queue ends. Where a ring is closed with commands parked before or "
     "after, io_ring_exit_work() has ublk_uring_cmd_cancel_fn() find one whose task is another, which says "
     "so, and leaves it: the device goes with STOP_DEV or DEL_DEV all the same. Seen on 6.12 and 7.3."),
]


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self, fd=None):
        self.fd = fd
        if fd is None:
            self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self.fd, 0, os.SEEK_END)
            with suppress(OSError):                         # what is said but once, is said once a test
                Path("/sys/kernel/debug/clear_warn_once").write_text("1")

    def lines(self):
        """Return the messages since the last time."""
        found = []
        while True:
            try:
                record = os.read(self.fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:
                found.append("WARNING: the kernel said more than its log can hold")
            else:
                found.append(record.partition(";")[2].partition("\n")[0])

    def trouble(self, test):
        """Return the messages since the last time that are warnings or worse, and not known of this test.

        What is known becomes a warning of pytest's, which its summary shows beside the test's name.
        """
        known = [pattern for pattern, tests, _ in KNOWN_TROUBLE if re.search(tests, test)]
        unknown = []
        for line in filter(TROUBLE.search, self.lines()):
            if any(re.search(pattern, line) for pattern in known):
                warnings.warn(f"known in the kernel's log: {line}", stacklevel=1)
            else:
                unknown.append(line)
        return unknown

    def close(self):
        """Forget about it."""
        os.close(self.fd)


SOURCE = ast.parse(UBLK.read_text())


def example():
    """Return the Python example of the module's docstring."""
    text = ublk.__doc__.split("\n\n", 1)[1].partition("\nor, from the shell")[0]
    return textwrap.dedent(text)


def assert_fails(done, status, says, number=None):
    """Exit status 1 is one error line, 2 is wrong usage; nothing on standard output."""
    assert (done.status, done.out) == (status, ""), done
    assert says in done.err and "Traceback" not in done.err, done.err
    if status == 1:
        assert_error_line(done.err, number)


def digest(path):
    """Return a checksum of a file or disk."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            result.update(chunk)
    return result.hexdigest()


FIO_JOBS = [("512", "0", "64k"), ("4k", "1m", "1m"), ("64k", "8m", "2m"), ("1m", "16m", "4m")]


def fio_verify(path, jobs=tuple(FIO_JOBS)):
    """Write at random with several block sizes at once, 128 requests deep, and verify checksums."""
    common = [f"--filename={path}", "--direct=1", "--ioengine=libaio", "--iodepth=128", "--rw=randwrite",
              "--thread", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=0",
              "--minimal"]
    words = []
    for block, offset, size in jobs:
        words += [f"--name=bs{block}", f"--bs={block}", f"--offset={offset}", f"--size={size}", *common]
    done = sh("fio", *words, cwd="/tmp")
    assert "verify" not in done.stderr, done.stderr


MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"],
        "btrfs": ["mkfs.btrfs", "-q", "-f"]}

FSCK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}


@contextmanager
def mount_of(path, directory, *options):
    """Mount a disk."""
    directory.mkdir(exist_ok=True)
    sh("mount", *options, path, directory)
    try:
        yield directory
    finally:
        sh("umount", directory)


def carries(kind, disk, directory):
    """See that a disk carries a file system: make, mount, fill, unmount, check, mount, compare."""
    needs(MKFS[kind][0], FSCK[kind][0])
    sh(*MKFS[kind], disk.path)
    files = {f"{number % 3}/{number}": os.urandom(number * number * 1000 % 300_000) for number in range(15)}
    with mount_of(disk.path, directory):
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
    with mount_of(disk.path, directory):
        for name, data in files.items():
            assert (directory / name).read_bytes() == data, name
        (directory / "0").rename(directory / "9")
    sh(*FSCK[kind], disk.path)


class Recorder(Ram):
    """A disk that notes what it is asked for."""

    def __init__(self, size=1 << 20):
        super().__init__(size)
        self.calls = []

    def write(self, offset, buffer):
        self.calls.append(("write", offset, len(buffer)))
        super().write(offset, buffer)

    def write_fua(self, offset, buffer):
        self.calls.append(("write_fua", offset, len(buffer)))
        super().write(offset, buffer)

    def flush(self):
        self.calls.append(("flush",))

    def discard(self, offset, length):
        self.calls.append(("discard", offset, length))

    def write_zeroes(self, offset, length, unmap):
        self.calls.append(("write_zeroes", offset, length, unmap))


class Volatile(Ram):
    """A disk with a cache: of what is written, `durable` has what a loss of power leaves."""

    def __init__(self, content):
        super().__init__(len(content))
        self.data[:] = content
        self.durable = bytearray(content)
        self.cached = []

    def write(self, offset, buffer):
        super().write(offset, buffer)
        self.cached.append((offset, offset + len(buffer)))

    def write_fua(self, offset, buffer):
        super().write(offset, buffer)
        self.durable[offset:offset + len(buffer)] = buffer

    def flush(self):
        for start, end in self.cached:
            self.durable[start:end] = self.data[start:end]
        self.cached.clear()


def with_partition(size=8 << 20):
    """Make a disk in memory with one partition, at sector 2048."""
    target = Ram(size)
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    target.data[446:462], target.data[510:512] = entry, b"\x55\xaa"
    return target


class Forked:
    """ublk.py's command line in a forked process: it starts ten times faster than a new Python.

    With a script the process becomes a new Python that runs it. change is called in the process first.
    pid, path and id are those of the server and its disk.
    """

    def __init__(self, *words, change=None, script=None):
        self.output, self.errors = tempfile.TemporaryFile("a+b"), tempfile.TemporaryFile("a+b")
        self.path, self.id, self.status = "", -1, None
        ublk.companion()            # which the user that change() may make of it might not be able to read
        self.pid = os.fork()
        if self.pid == 0:
            self._child([str(word) for word in words], change, script)

    def _child(self, words, change, script):
        status = 70
        try:
            os.setsid()
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.errors.fileno(), 2)
            let_go_of_files("", beyond=2)       # an open disk, above all, could not be deleted
            sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
            if change:
                change()
            if script:
                os.execv(PYTHON, [PYTHON, str(script), *words])
            status = ublk.main(words)
        except SystemExit as end:
            status = 0 if end.code is None else int(end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def said(self, file=None):
        """Return what is on standard error, or on standard output."""
        return os.pread((file or self.errors).fileno(), 1 << 20, 0).decode()

    def ended(self):
        """Tell whether the process has ended; its status then is that of subprocess."""
        if self.status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:                       # it has been cleaned up
                pid, status = self.pid, signal.SIGKILL
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def live(self):
        """Wait for the disk."""
        until(lambda: self.ended() or self.said(self.output).endswith("\n"), "the disk")
        self.path = self.said(self.output).strip()
        assert self.path.startswith("/dev/ublkb"), self.said()
        self.id = int(self.path[len("/dev/ublkb"):])
        return self

    def wait(self):
        """Wait for the end; return its status."""
        until(self.ended, "the end of the server")
        return self.status

    def kill(self, number=signal.SIGKILL):
        """End the process by a signal; return its status."""
        os.kill(self.pid, number)
        return self.wait()

    def __enter__(self):
        try:
            return self.live()
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind, *_):
        try:
            if kind is None and not self.ended():
                self.kill(signal.SIGTERM)
        finally:
            for pid in session(self.pid):                   # what a killed parent left behind
                os.kill(pid, signal.SIGKILL)
            self.wait()


def session(leader):
    """Return the processes of a session that are more than zombies."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            found += [pid] if os.getsid(pid) == leader and fields_of(pid)[0] not in "ZX" else []
    return found


def recovered(disk, **options):
    """Serve a disk anew, without other words."""
    return Forked("recover", disk.id, **options).live()


def state_of(dev_id):
    """Return the state of a device as `list` names it."""
    with ublk.Control() as control:
        return ublk.STATES[control.get_dev_info(dev_id).state]


def await_state(dev_id, *states):
    """Wait until the kernel says a device is in one of these states."""
    until(lambda: state_of(dev_id) in states, f"device {dev_id} to be {' or '.join(states)}")


def stuck():
    """Return the processes in uninterruptible sleep."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if fields_of(entry)[0] == "D":
                found.append(f"{entry} {command_line(entry)}")
    return found


def completed(disk):
    """Return how many requests the disk has completed."""
    words = Path(f"/sys/block/{os.path.basename(disk.path)}/stat").read_text().split()
    return int(words[0]) + int(words[4])


def in_flight(disk):
    """Return how many reads, and how many writes, a disk has been asked for and has not answered."""
    return list(map(int, Path(f"/sys/block/{os.path.basename(disk.path)}/inflight").read_text().split()))


# Has fio count failed requests and go on.
FAILING = f"{errno.EIO}:{errno.EREMOTEIO}"
CONTINUE = ["--continue_on_error=io", f"--ignore_error={FAILING},{FAILING}"]


class Fio:
    """fio: writes with checksums, reads all back, and begins again, until finish()."""

    def __init__(self, disk, *words):
        needs("fio")
        self.disk, self.words, self.process, self.errors = disk, words, None, 0

    def _start(self):
        self.output = tempfile.NamedTemporaryFile("r")
        self.process = subprocess.Popen(
            ["fio", "--name=x", f"--filename={self.disk.path}", "--direct=1", "--rw=randwrite", "--bs=4k",
             "--iodepth=16", "--ioengine=io_uring", "--size=4M", "--verify=crc32c", "--verify_fatal=1",
             "--output-format=json", f"--output={self.output.name}", *self.words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def busy(self):
        """Wait until requests are flowing."""
        before = completed(self.disk)

        def flowing():
            if self.process is None:
                self._start()
            elif self.process.poll() is not None:
                self.finish()
            return completed(self.disk) > before + 20
        until(flowing, "fio")

    def finish(self):
        """Let this pass end; return how many requests failed. All others brought the right data."""
        assert self.process is not None
        text = self.process.communicate()[0]
        job, = json.loads("{" + self.output.read().partition("{")[2])["jobs"]
        assert "verify" not in text and job["error"] in (0, errno.EIO, errno.EREMOTEIO), text
        assert self.process.returncode == 0, text
        self.process = None
        failed = job.get("total_err", 0)
        self.errors += failed
        return failed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


# So often a server is killed in one test. Kernels before 6.7 take up to 5 s to notice each death.
ROUNDS = 5 if at_least("6.7") else 2


def kill_and_recover(disk, fio=None):
    """Kill a disk's server; return the disk with its next one."""
    disk.kill()
    return recovered(disk)


def kill_under_load(disk, *words, rounds=ROUNDS, exchange=kill_and_recover, told=bool):
    """Have fio write and verify while exchange(disk, fio) gives a disk another server, again and again.

    Returns the disk and how many requests failed; all after the last exchange are right, and so is what is
    on the disk. words are further options for fio; told(number) is called after each exchange.
    """
    with Fio(disk, *words) as fio:
        for number in range(rounds):
            fio.busy()
            disk = exchange(disk, fio)
            told(number)
        fio.busy()
        fio.finish()
        failed = fio.errors
        if failed:
            fio.busy()
            assert fio.finish() == 0, "requests failed after the last exchange"
    return disk, failed


def replace(item, **methods):
    """Put other methods into a class or an object."""
    for name, method in methods.items():
        setattr(item, name, method)


def die():
    """End this process like kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(cls, name):
    """Return a change that has the process die as soon as a method has done its work."""
    method = getattr(cls, name)

    def dying(self, *args, **options):
        method(self, *args, **options)
        die()
    return lambda: setattr(cls, name, dying)


def assert_nothing_stuck():
    """See that nothing stays in uninterruptible sleep."""
    until(lambda: not stuck(), "D state to end")


ALICE, BOB = 61001, 61002           # ordinary users: without any capability


def become(uid):
    """Return a change into an ordinary user."""
    def change():
        for name in ("UBLK_RUN_DIR", "XDG_RUNTIME_DIR"):
            os.environ.pop(name, None)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        LIBC.prctl(4, 1, 0, 0, 0)       # PR_SET_DUMPABLE: /proc/self is ours again, as after an exec
    return change


def verb(*words, **options):
    """Run a command of ublk.py to its end, like Forked; return its status and what it said."""
    done = Forked(*words, **options)
    return SimpleNamespace(status=done.wait(), out=done.said(done.output), err=done.said())


def payload_of(command):
    """Return what a control command carries."""
    if command in (ublk.UBLK_CMD_GET_DEV_INFO, ublk.UBLK_CMD_GET_DEV_INFO2):
        return ublk.ublksrv_ctrl_dev_info()
    if command in (ublk.UBLK_CMD_GET_PARAMS, ublk.UBLK_CMD_SET_PARAMS):
        return ublk.ublk_params(len=ctypes.sizeof(ublk.ublk_params), types=1)
    if command == ublk.UBLK_CMD_GET_QUEUE_AFFINITY:
        return (ctypes.c_uint8 * 1024)()
    return ublk.ublk_shmem_buf_reg(len=4096) if command == ublk.UBLK_CMD_REG_BUF else None


def every_command(dev_id, path):
    """Try each control command on a device, with this path of its node; return {name: errno}."""
    found = {}
    with ublk.Control() as control:
        replace(control, _path=lambda command, dev_id: path.encode() + b"\0" if path else b"")
        for command in ublk.COMMANDS:
            if command not in (ublk.UBLK_CMD_ADD_DEV, ublk.UBLK_CMD_GET_FEATURES):
                found[command.name] = error_of(control._run, command, dev_id, payload_of(command), 1)
    return found


# The driver refuses this to everybody, by an oversight, like the commands it does not know.
NOT_FOR_UNPRIVILEGED = {"DEL_DEV_ASYNC"}


def refused(found, *numbers):
    """See that each command failed with one of these errnos."""
    for name, number in found.items():
        command = next(command for command in ublk.COMMANDS if command.name == name)
        strange = name in NOT_FOR_UNPRIVILEGED or not at_least(command.since)
        strangely = (errno.EINVAL, errno.EOPNOTSUPP) if strange else ()
        assert number in (*numbers, *strangely), name
    assert len(found) == len(ublk.COMMANDS) - 2


def error_of_opening(path):
    """Return the errno of opening a node for reading and writing, and for reading."""
    return [error_of(os.open, path, flags) for flags in (os.O_RDWR, os.O_RDONLY)]


def orphan(*words):
    """Make a disk whose server has been killed."""
    disk = Forked(*words).live()
    disk.kill()
    await_state(disk.id, "QUIESCED" if "-r" in words else "DEAD")
    return disk


def now(coroutine):
    """Run a coroutine that has nothing to wait for."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


def read(disk, offset=0, length=4096):
    """Read without a driver."""
    buffer = memoryview(bytearray(length))
    now(disk.read(offset, buffer))
    return bytes(buffer)


def damage(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def content_of(fd):
    """Return everything on a disk."""
    size = os.lseek(fd, 0, os.SEEK_END)
    return b"".join(read_at(fd, at, min(1 << 20, size - at)) for at in range(0, size, 1 << 20))


class Writers:
    """Four threads that change a disk at random, each its own part, and know what must be on it."""

    def __init__(self, content):
        self.expected = bytearray(content)
        self.part = len(content) // 4
        self.under_way = {}                 # thread -> offset and data of the request that may be lost
        self.done = 0
        self.chances = [random.Random(random.random()) for _ in range(4)]

    def work(self, path):
        """Write until the disk is gone, or finish() is called."""
        self.unit = int(Path(f"/sys/block/{os.path.basename(path)}/queue/logical_block_size").read_text())
        self.stopping = False
        self.threads = [threading.Thread(target=self._work, args=(number, path)) for number in range(4)]
        for thread in self.threads:
            thread.start()

    def busy(self):
        """Wait until some requests have been served."""
        before = self.done
        until(lambda: self.done > before + 20, "requests")

    def finish(self):
        """Let all requests end; return whether none has failed."""
        self.stopping = True
        for thread in self.threads:
            thread.join()
        return not self.under_way

    def _work(self, number, path):
        chance = self.chances[number]
        try:
            with opened(path) as fd:
                while not self.stopping:
                    size = self.unit * chance.randint(1, (32 << 10) // self.unit)
                    at = self.unit * chance.randrange((self.part - size) // self.unit)
                    self._change(fd, number, number * self.part + at, size)
                    if chance.random() < 0.2:
                        os.fsync(fd)
        except OSError:
            pass

    def _change(self, fd, number, offset, size):
        chance = self.chances[number]
        kind = chance.choice(["write"] * 4 + ["zero", "discard"])
        data = chance.randbytes(size) if kind == "write" else bytes(size)
        self.under_way[number] = offset, data
        if kind == "write":
            if write_at(fd, offset, data) < size:
                raise OSError(errno.EIO, "short")
        else:
            fcntl.ioctl(fd, {"zero": 0x127F, "discard": 0x1277}[kind], struct.pack("=QQ", offset, size))
        self.expected[offset:offset + size] = data
        del self.under_way[number]
        self.done += 1

    def check(self, path):
        """See that all is there; of what was under way each sector is old or new."""
        self.finish()
        with opened(path, os.O_RDONLY) as fd:
            found = content_of(fd)
        for offset, data in self.under_way.values():
            for at in range(0, len(data), 512):
                if found[offset + at:offset + at + 512] == data[at:at + 512]:
                    self.expected[offset + at:offset + at + 512] = data[at:at + 512]
        self.under_way.clear()
        bad = [at for at in range(0, len(found), 512) if found[at:at + 512] != self.expected[at:at + 512]]
        assert not bad, f"{len(bad)} sectors are wrong: {bad[:10]}"


# ---- stripe -------------------------------------------------------------------------------------


def files(directory, count, size):
    """Make empty files."""
    paths = [str(directory / f"{number}.img") for number in range(count)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(size)
    return paths


# ---- cow ----------------------------------------------------------------------------------------


def patched(path, offset, data):
    """Change bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
