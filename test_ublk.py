# SPDX-License-Identifier: MIT
"""Tests of ublk.py.

    pytest test_ublk.py -m "not kernel"     what needs no driver, on any machine
    pytest test_ublk.py -m kernel           the rest: as root, on a kernel with the ublk driver

Tests marked ``kernel`` never skip because the driver is missing: that is a failure. Each of them
must leave the machine as it was, and `nothing_left` looks: no device, process or mount of a test
outlives it. A test that hangs ends the whole run after HANG seconds with every thread's stack.

UBLK_TEST_KERNEL names the kernel of a run in the lab; with UBLK_TEST_ALL each data path meets every
target and number of queues, which otherwise take turns; UBLK_HEADERS is a directory with a newer
linux/ublk_cmd.h than the system's. No test looks at the clock: on an emulated machine everything
is slow.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import functools
import gc
import hashlib
import inspect
import itertools
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk

HERE = Path(__file__).resolve().parent
UBLK = HERE / "ublk.py"
HANG = 200                          # seconds: longer than any test takes, even under emulation
IN_LAB = os.environ.get("UBLK_TEST_KERNEL", "host") != "host"

kernel = pytest.mark.kernel

# =================================================================================================
# Helpers
# =================================================================================================


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
        await ublk.uring_sleep(0)
        super().read(offset, buffer)

    async def write(self, offset, buffer):
        await ublk.uring_sleep(0)
        super().write(offset, buffer)


def sh(*words, check=True, **options):
    """Run a program; return what it did with its output as text."""
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, text=True, check=False,
                          capture_output=True, **options)
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode}:\n{output}"
    return done


def cli(*words, script=UBLK, check=True, **options):
    """Run ublk.py as a program."""
    return sh(sys.executable, script, *words, check=check, **options)


@pytest.fixture
def run(capfd):
    """Run the command line in this process, which is quicker: run("list", "--json")."""
    def run(*words):
        capfd.readouterr()
        try:
            status = ublk.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return SimpleNamespace(status=status, **capfd.readouterr()._asdict())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


@contextmanager
def server(*words, script=UBLK, **options):
    """Serve a disk with ublk.py as a program, until SIGTERM: yields its process, with its .path."""
    process = subprocess.Popen([sys.executable, str(script), *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **options)
    try:
        process.path = process.stdout.readline().rstrip("\n")
        assert process.path.startswith("/dev/ublkb"), process.path + process.communicate()[1]
        process.id = int(process.path[len("/dev/ublkb"):])
        yield process
        process.terminate()
        process.errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()


def target_file(directory, body):
    """Write a target file; its classes may use ublk and os."""
    path = directory / "mine.py"
    path.write_text("import os, time, ublk\n" + textwrap.dedent(body))
    return path


def needs(*programs):
    """Skip a test where programs are missing; in the lab they are all there, so that is a failure."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        (pytest.fail if IN_LAB else pytest.skip)(f"not installed here: {', '.join(missing)}")


def at_least(release):
    """Tell whether the running kernel is of this release, such as "6.16", or newer."""
    return tuple(map(int, ublk.kernel_release().split("."))) >= tuple(map(int, release.split(".")))


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


# ---- what must not be left behind ---------------------------------------------------------------


def devices_left():
    """Return the ids of ublk devices."""
    return ublk.device_ids()


def mounts_left():
    """Return the mount points of ublk disks."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("/dev/ublkb")]


def processes():
    """Return {pid: (parent, command line as a list)} of all processes."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found[int(entry)] = parent, [word.decode(errors="replace") for word in words if word]
    return found


def children_of(pid):
    """Return {pid: command line} of a process's children."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):             # a thread, or a child, that has just ended
            for child in path.read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_text(errors="replace")
                found[int(child)] = words.replace("\0", " ")
    return found


def processes_left():
    """Return {pid: command line} of our children, and of servers that went into the background."""
    orphans = {pid: words for pid, words in children_of(1).items() if re.search(r"(^|[ /])ublk\.py ", words)}
    return {**orphans, **children_of(os.getpid())}


def leftovers():
    """Return a description of everything a test should have taken away; empty if all is well."""
    found = [f"mount {path}" for path in mounts_left()]
    found += [f"process {pid}: {words}" for pid, words in processes_left().items()]
    found += [f"device {dev_id}" for dev_id in devices_left()]
    return found + [f"node {node}" for node in sorted(Path("/dev").glob("ublk[bc]*"))]


def clean_up():
    """Take away what a test left behind, so that the next one starts well."""
    for path in mounts_left():
        sh("umount", "-l", path, check=False)
    for pid in processes_left():
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except OSError:
            pass
    if devices_left():
        with ublk.Control() as control:
            for dev_id in devices_left():
                try:
                    control.get_dev_info(dev_id)        # which tells whether it is an ordinary user's
                    control.del_dev(dev_id, timeout=10)
                except OSError:
                    pass


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    """Give every test a state directory of its own."""
    path = tmp_path / "run"
    monkeypatch.setenv("UBLK_RUN_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def nothing_hangs():
    """End the run when a test takes far too long; pytest shows every thread's stack before that.

    Servers in this process end with it, so that no client waits for them for ever. See
    faulthandler_timeout in pyproject.toml.
    """
    timer = threading.Timer(HANG, os._exit, (70,))
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
    timer.join()


@pytest.fixture(autouse=True)
def nothing_left(request):
    """See that a kernel test has the driver, and leaves no device, process or mount behind."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    assert os.geteuid() == 0, "kernel tests run as root"
    assert os.path.exists("/dev/ublk-control"), "there is no ublk driver: modprobe ublk_drv"
    assert not leftovers(), "left by something else than this test"
    yield
    deadline = time.monotonic() + 10         # udev and dying processes need a moment
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.02)
    left = leftovers()
    if left:
        clean_up()
        pytest.fail(f"the test left behind: {left}")


@pytest.fixture
def control():
    """An open control plane."""
    with ublk.Control() as control:
        yield control


# =================================================================================================
# The file itself
# =================================================================================================


def interpreters():
    """Return every Python from 3.9 on that is installed here, the one that runs this included."""
    found = {sys.version_info[:2]: sys.executable}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for path in sorted(root.glob("versions/3.*/bin/python3")):
        found.setdefault(tuple(map(int, path.parts[-3].split(".")[:2])), str(path))
    for minor in range(9, 30):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            found.setdefault((3, minor), path)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found) if minor >= 9}


SOURCE = ast.parse(UBLK.read_text())


def definitions(node=SOURCE, prefix=""):
    """Yield (name, node) of every public class, function and method."""
    for item in node.body:
        if isinstance(item, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = prefix + item.name
            if not item.name.startswith("_"):
                yield name, item
                if isinstance(item, ast.ClassDef):
                    yield from definitions(item, name + ".")


def is_kernel_structure(name):
    return isinstance(getattr(ublk, name, None), type) and issubclass(getattr(ublk, name), ctypes.Structure)


@pytest.mark.parametrize("version, python", interpreters().items())
def test_every_python_compiles_and_runs_it(version, python, tmp_path):
    copy = shutil.copy(UBLK, tmp_path)
    sh(python, "-W", "error", "-m", "py_compile", copy)
    assert "usage: ublk.py" in sh(python, "-W", "error", "-I", copy, "--help").stdout


def test_it_needs_the_standard_library_only():
    names = {name.name.partition(".")[0] for node in ast.walk(SOURCE) if isinstance(node, ast.Import)
             for name in node.names}
    names |= {node.module.partition(".")[0] for node in ast.walk(SOURCE) if isinstance(node, ast.ImportFrom)}
    library = Path(os.__file__).parent
    for name in sorted(names):
        spec = __import__("importlib.util").util.find_spec(name)
        inside = spec.origin in ("built-in", "frozen") or library in Path(spec.origin).parents
        assert inside and "site-packages" not in str(spec.origin), f"{name} is not in the standard library"


def test_importing_it_starts_nothing():
    code = "import threading, os, ublk; print(threading.active_count(), len(os.listdir('/proc/self/fd')))"
    without = code.replace("ublk", "ctypes")        # whose library may keep a file open
    assert sh(sys.executable, "-c", code, cwd=HERE).stdout == sh(sys.executable, "-c", without).stdout


@pytest.mark.parametrize("name", [name for name, _ in definitions() if not is_kernel_structure(name)])
def test_every_public_name_has_a_docstring(name):
    item = ublk
    for word in name.split("."):
        item = getattr(item, word)
    assert inspect.getdoc(item), f"{name} has none of its own and inherits none"


def example():
    """Return the Python example of the module's docstring."""
    text = ublk.__doc__.split("\n\n", 1)[1].partition("\nor, from the shell")[0]
    return textwrap.dedent(text)


def test_example_in_the_docstring_is_python():
    names = {node.name for node in ast.walk(ast.parse(example())) if isinstance(node, ast.ClassDef)}
    assert names == {"Ram"}


def test_packaging_names_the_modules_and_the_command():
    text = (HERE / "pyproject.toml").read_text()
    assert 'ublk = "ublk:main"' in text
    assert 'py-modules = ["ublk", "ublk_targets"]' in text
    assert re.search(r"^dependencies = \[\]$", text, re.M)


# =================================================================================================
# Kernel ABI against the C headers
# =================================================================================================

HEADERS = ["linux/ublk_cmd.h", "linux/io_uring.h", "linux/blkzoned.h", "linux/time_types.h"]
C_NAMES = {"timespec": "__kernel_timespec"}


def include_directory():
    """Return the directory with the newest headers there are."""
    for root in filter(None, [os.environ.get("UBLK_HEADERS"), "/usr/include"]):
        for directory in (Path(root), Path(root, "usr/include")):
            if (directory / HEADERS[0]).exists():
                return directory
    pytest.skip("no linux/ublk_cmd.h here: install linux-libc-dev, or set UBLK_HEADERS")


def header_text():
    return "\n".join((include_directory() / name).read_text() for name in HEADERS)


def evaluate(expressions, tmp_path):
    """Return the value of each C expression, as the compiler and the headers see it."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc here to compile the headers with")
    lines = [f"#include <{name}>" for name in ["errno.h", "stddef.h", "stdio.h", *HEADERS]]
    lines += ["int main(void)", "{"]
    lines += [f'printf("%lld\\n", (long long)({expression}));' for expression in expressions]
    source = tmp_path / "values.c"
    source.write_text("\n".join([*lines, "return 0;", "}"]))
    top = include_directory()
    paths = [f"-I{top}", *(f"-I{path}" for path in sorted(top.glob(f"{os.uname().machine}-linux-gnu")))]
    sh("gcc", "-w", *paths, "-o", tmp_path / "values", source)
    return dict(zip(expressions, map(int, sh(tmp_path / "values").stdout.split())))


def structures():
    """Return the kernel's structures in ublk.py."""
    return [item for item in vars(ublk).values()
            if isinstance(item, type) and issubclass(item, ctypes.Structure)]


def meaningful(structure):
    """Return the names of fields that are more than padding."""
    return [name for name, *_ in structure._fields_ if not re.match(r"pad|resv|reserved", name)]


def body_of(structure, text):
    """Return the text of a structure in the headers, empty where they lack it."""
    found = re.search(rf"^struct {C_NAMES.get(structure.__name__, structure.__name__)} \{{(.*?)^\}}", text,
                      re.M | re.S)
    return found[1] if found else ""


def test_structures_have_the_layout_of_the_header(tmp_path):
    text, expected = header_text(), {}
    for structure in structures():
        body, name = body_of(structure, text), C_NAMES.get(structure.__name__, structure.__name__)
        fields = meaningful(structure)
        known = [field for field in fields if re.search(rf"\b{field}\b", body)]
        if known == fields:             # an older header has smaller structures
            expected[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field in known:
            expected[f"offsetof(struct {name}, {field})"] = getattr(structure, field).offset
            if known == fields and field != "cmd":      # cmd is an array of no length in C
                expected[f"sizeof(((struct {name} *)0)->{field})"] = getattr(structure, field).size
    assert len(expected) > 100
    if os.environ.get("UBLK_HEADERS"):
        complete = [item for item in structures()
                    if f"sizeof(struct {C_NAMES.get(item.__name__, item.__name__)})" in expected]
        assert complete == structures()
    actual = evaluate(list(expected), tmp_path)
    assert {key: actual[key] for key in expected} == expected


def test_packed_records_have_the_size_of_their_structures():
    assert ublk.IO_CMD.size == ctypes.sizeof(ublk.ublksrv_io_cmd)
    assert ublk.IO_DESC.size == ctypes.sizeof(ublk.ublksrv_io_desc)
    assert ublk.SQE.size == ublk.io_uring_sqe.cmd.offset
    assert 4 * ublk.RESULT_WORD == ublk.io_uring_sqe.cmd.offset + ublk.ublksrv_io_cmd.result.offset


def defined(pattern):
    """Return the constants of the headers whose name matches."""
    found = re.findall(r"^\s*#define\s+(\w+)(?!\()\s+\S|^\s*(\w+)\s*(?:=[^,]*)?,", header_text(), re.M)
    return [name for pair in found for name in pair if name and re.fullmatch(pattern, name)]


def test_constants_have_the_values_of_the_header(tmp_path):
    ours = {name: int(value) for name, value in vars(ublk).items()
            if re.match(r"UBLK|IORING_|IOSQE_", name) and isinstance(value, int)}
    names = sorted(set(defined(r"(UBLK|IORING_|IOSQE_)\w+")) & set(ours))
    assert len(names) > (110 if os.environ.get("UBLK_HEADERS") else 60)
    actual = evaluate(names, tmp_path)
    assert actual == {name: ours[name] for name in names}


def test_encoded_commands_have_the_values_of_the_header(tmp_path):
    names = defined(r"UBLK_U_CMD_\w+")
    actual = evaluate(names, tmp_path)
    ours = {f"UBLK_U_CMD_{command.name}": command.encoded for command in ublk.COMMANDS}
    assert {name: ours.get(name) for name in names} == {name: actual[name] & 0xFFFFFFFF for name in names}


def test_encoded_data_plane_commands_have_the_values_of_the_header(tmp_path):
    names = defined(r"UBLK_U_IO_\w+")
    actual = evaluate(names, tmp_path)
    ours = {name: getattr(ublk, name, None) for name in names}
    assert ours == {name: actual[name] & 0xFFFFFFFF for name in names}


def test_every_feature_of_the_header_has_a_name_and_its_bit(tmp_path):
    names = defined(r"UBLK_F_\w+")
    assert len(names) >= 5
    rows = {f"UBLK_F_{feature.name}": int(feature) for feature in ublk.FEATURES}
    assert {name: rows.get(name) for name in names} == evaluate(names, tmp_path)


@pytest.mark.parametrize("pattern", [
    r"UBLK_IO_OP_[A-Z]\w+", r"UBLK_IO_F_\w+", r"UBLK_S_DEV_\w+", r"UBLK_ATTR_\w+", r"UBLK_PARAM_TYPE_\w+",
    r"UBLK_IO_RES_\w+", r"UBLK_BATCH_F_\w+"])
def test_no_constant_of_the_header_is_missing(pattern):
    assert [name for name in defined(pattern) if not hasattr(ublk, name)] == []


def test_tables_are_consistent():
    assert [feature.bit for feature in ublk.FEATURES] == list(range(len(ublk.FEATURES)))
    assert all(int(feature) == 1 << feature.bit and feature.meaning for feature in ublk.FEATURES)
    assert len({command.name for command in ublk.COMMANDS}) == len(ublk.COMMANDS)
    assert [1 << bit for bit in range(len(ublk.PARAM_TYPES))] == list(ublk.PARAM_TYPES)
    assert ublk.STATES == ("DEAD", "LIVE", "QUIESCED", "FAIL_IO")
    for feature in ublk.FEATURES:
        assert re.fullmatch(r"[67]\.\d+", feature.since)
        assert not feature.needs & feature.excludes


def uses(name, *without):
    """Tell whether code of ublk.py outside these definitions reads a name."""
    def found(node):
        if getattr(node, "name", "") in without:
            return False
        return (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)) \
            or any(map(found, ast.iter_child_nodes(node)))

    table = [node for node in SOURCE.body if isinstance(node, ast.Assign)
             and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "Feature"]
    assert len(table) == len(ublk.FEATURES)
    return any(found(node) for node in SOURCE.body if node not in table)


@pytest.mark.parametrize("feature", ublk.FEATURES, ids=lambda feature: feature.name)
def test_every_feature_is_used_or_the_table_says_why_not(feature):
    name = f"UBLK_F_{feature.name}"
    assert uses(name) or feature.unused
    # what is never asked for is at most looked for on a device
    assert not (feature.unused and uses(name, "desc_size"))


def test_flags_are_named_even_those_of_the_future():
    assert ublk.flag_names(ublk.UBLK_F_USER_COPY | 1 << 50) == ["USER_COPY", "BIT_50"]
    assert ublk.flag_names(0) == []


# =================================================================================================
# Errors
# =================================================================================================


def test_an_error_is_one_line():
    error = ublk.UblkError(errno.EBUSY, "device 3", "somebody has it open", "close it")
    assert str(error) == "device 3: somebody has it open (16 EBUSY): close it"
    assert isinstance(error, OSError) and error.errno == errno.EBUSY
    assert str(ublk.UblkError(errno.EIO, "it")) == "it: input/output error (5 EIO)"


@pytest.mark.parametrize("key", ublk.EXPLANATIONS, ids=lambda key: f"{key[0] and key[0].name}-{key[1]}")
def test_every_explanation_makes_an_error_line(key):
    command, number = key
    error = ublk.explain(command or ublk.UBLK_CMD_GET_PARAMS, number, "device 5")
    reason, remedy = ublk.EXPLANATIONS[key]
    assert_error_line(f"ublk: {error}\n", number, says=reason)
    assert error.remedy == remedy


@pytest.mark.parametrize("release, says", [
    ("6.9", "needs Linux 6.16, this is 6.9"), ("7.1", "this Linux 7.1 is built without it")])
def test_an_unknown_command_names_the_kernel_that_has_it(release, says, monkeypatch):
    monkeypatch.setattr(ublk, "kernel_release", lambda: release)
    text = str(ublk.explain(ublk.UBLK_CMD_UPDATE_SIZE, errno.EOPNOTSUPP, "UPDATE_SIZE of device 0"))
    assert says in text


def test_an_errno_without_explanation_has_the_systems_text():
    error = ublk.explain(ublk.UBLK_CMD_GET_PARAMS, errno.EFAULT, "GET_PARAMS")
    assert str(error) == "GET_PARAMS: bad address (14 EFAULT)"


# =================================================================================================
# io_uring: rings on the running kernel
# =================================================================================================


def descriptors():
    """Return how many descriptors and mappings this process has."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = sum("io_uring" in line or "ublk" in line for line in lines)
    return len(os.listdir("/proc/self/fd")), maps


def nops(ring, count, first=0):
    """Push NOPs with ascending user_data."""
    for number in range(first, first + count):
        ring.prepare(number % ring.entries, ublk.IORING_OP_NOP, user_data=number)
        ring.push(number % ring.entries)


class TestRing:
    """A ring on whatever kernel runs this; needs no ublk driver."""

    @pytest.fixture
    def ring(self):
        try:
            ring = ublk.Ring(8)
        except ublk.UblkError as error:
            pytest.skip(f"{error}") if not IN_LAB else pytest.fail(f"{error}")
        yield ring
        ring.close()

    def test_nop_comes_back(self, ring):
        nops(ring, 3)
        assert ring.enter(3)
        assert ring.reap() == ([0, 1, 2], [0, 0, 0])
        assert ring.reap() == ([], [])

    def test_reads_and_writes_a_file(self, ring, tmp_path):
        with open(tmp_path / "file", "w+b", buffering=0) as file:
            data, back = bytearray(b"through the ring"), bytearray(7)
            ring.prepare(0, ublk.IORING_OP_WRITE, file.fileno(), 100, ublk.address_of(data), len(data),
                         user_data=7)
            ring.push(0)
            ring.enter(1)
            assert ring.reap() == ([7], [16])
            ring.prepare(1, ublk.IORING_OP_READ, file.fileno(), 108, ublk.address_of(back), len(back),
                         user_data=8)
            ring.push(1)
            ring.enter(1)
            assert ring.reap() == ([8], [7]) and back == b"the rin"

    def test_an_operation_that_fails_brings_its_errno(self, ring):
        ring.prepare(0, ublk.IORING_OP_READ, fd=-1, user_data=1)
        ring.push(0)
        ring.enter(1)
        assert ring.reap() == ([1], [-errno.EBADF])

    def test_waiting_ends_with_the_timeout(self, ring):
        assert ring.enter(1, timeout=0.02) is False
        nops(ring, 1)
        assert ring.enter(1, timeout=30) is True
        assert ring.reap() == ([0], [0])

    def test_waiting_ends_with_the_timeout_when_something_was_submitted(self, ring):
        long = ublk.timespec(3600, 0)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(long), length=1)
        ring.push(0)
        ring.enter(1, timeout=0.02)
        assert ring.reap() == ([], [])

    @pytest.mark.parametrize("milliseconds", [0, 100])
    def test_waiting_sees_what_comes_soon_and_what_comes_late(self, ring, milliseconds, monkeypatch):
        entered, enter = [], ring.enter
        monkeypatch.setattr(ring, "enter", lambda *words: entered.append(words) or enter(*words))
        later = ublk.timespec(0, milliseconds * 1000000)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(later), length=1, user_data=5)
        ring.push(0)
        ring.wait()
        assert ring.reap() == ([5], [-errno.ETIME])
        if milliseconds:                            # it slept, after looking so often
            assert entered == [()] * ublk.LOOKS + [(1, None)]

    def test_waiting_for_what_does_not_come_ends_with_the_timeout(self, ring):
        ring.wait(0.02)
        assert ring.reap() == ([], [])

    def test_timeout_of_the_kernel(self, ring):
        short = ublk.timespec(0, 1000)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(short), length=1, user_data=5)
        ring.push(0)
        assert ring.enter(1)
        assert ring.reap() == ([5], [-errno.ETIME])

    def test_a_signal_ends_the_wait_and_nothing_else(self, ring):
        seen = []
        old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert ring.enter(1) is False           # without a time limit: only the signal ends it
        finally:
            signal.signal(signal.SIGALRM, old)
        assert seen == [1]
        nops(ring, 2)
        ring.enter(2)
        assert ring.reap() == ([0, 1], [0, 0])

    def test_completions_that_do_not_fit_are_kept(self, ring):
        for turn in range(8):
            nops(ring, 8, first=8 * turn)
            ring.enter()
        found = []
        for _ in range(8):
            found += ring.reap()[0]
            ring.enter()
        assert sorted(found) == list(range(64))

    def test_what_the_kernel_did_not_take_is_submitted_later(self, ring, monkeypatch):
        enter = ring._enter

        def takes_half():
            ring._to_submit.value //= 2
            ring._to_wait_for.value = 0
            return enter()

        nops(ring, 8)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", takes_half)
            ring.enter(8)
        assert ring.reap()[0] == [0, 1, 2, 3]
        ring.enter(4)
        assert ring.reap()[0] == [4, 5, 6, 7]

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.EINTR])
    def test_a_refused_submission_is_repeated(self, ring, monkeypatch, number):
        def refuses():
            ctypes.set_errno(number)
            return -1

        nops(ring, 2)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", refuses)
            ring.enter(1)
        ring.enter(2)
        assert ring.reap()[0] == [0, 1]

    def test_one_bad_entry_does_not_hold_back_the_others(self, ring):
        nops(ring, 1)
        ring.prepare(1, 255, user_data=1)           # no such operation
        ring.push(1)
        nops(ring, 1, first=2)
        ring.enter(3)
        assert dict(zip(*ring.reap())) == {0: 0, 1: -errno.EINVAL, 2: 0}

    @pytest.mark.parametrize("batch", [1, 3, 5, 8])
    def test_both_queues_wrap_around(self, ring, batch):
        expected = 0
        for turn in range(40):
            for slot in range(batch):
                ring.prepare(slot, ublk.IORING_OP_NOP, user_data=expected + slot)
            ring.push_all(list(range(batch)))
            ring.enter(batch)
            assert ring.reap()[0] == list(range(expected, expected + batch)), f"turn {turn}"
            expected += batch

    def test_an_entry_is_filled_once_and_submitted_often(self, ring):
        ring.prepare(3, ublk.IORING_OP_NOP, user_data=77)
        for _ in range(20):
            ring.push(3)
            ring.enter(1)
            assert ring.reap() == ([77], [0])

    def test_entries_of_128_bytes(self):
        ring = ublk.Ring(4, sqe128=True)
        try:
            assert len(ring.sqes) == 4 * 128
            nops(ring, 4)
            ring.enter(4)
            assert ring.reap() == ([0, 1, 2, 3], [0, 0, 0, 0])
        finally:
            ring.close()

    def test_preparing_an_entry_clears_what_it_held(self, ring):
        ring.prepare(0, ublk.IORING_OP_WRITE, fd=5, cmd=b"x" * 16)
        ring.prepare(1, ublk.IORING_OP_WRITE, fd=6, cmd=b"y" * 16)
        ring.prepare(0, ublk.IORING_OP_NOP)
        assert bytes(ring.sqes[:64]) == ublk.SQE.pack(0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0) + bytes(16)
        assert bytes(ring.sqes[112:128]) == b"y" * 16

    def test_another_thread_gets_an_error(self, ring):
        found = []
        thread = threading.Thread(target=lambda: found.append(error_of(ring.enter)))
        thread.start()
        thread.join()
        assert found == [errno.EEXIST]

    def test_a_shared_ring_serves_every_thread(self):
        ring = ublk.Ring(8, shared=True)
        try:
            for number in range(3):
                nops(ring, 1, first=number)
                thread = threading.Thread(target=ring.enter, args=(1,))
                thread.start()
                thread.join()
            assert ring.reap()[0] == [0, 1, 2]
        finally:
            ring.close()

    def test_closing_gives_everything_back(self, ring):
        before = descriptors()
        for _ in range(30):
            other = ublk.Ring(64, sqe128=True)
            nops(other, 5)
            other.enter(5)
            other.close()
            other.close()
        assert descriptors() == before

    def test_its_descriptor_is_closed_in_programs_it_starts(self, ring):
        assert not os.get_inheritable(ring.fd)

    def test_a_closed_descriptor_is_an_error(self, ring):
        os.close(ring.fd)
        ring.fd, fd = os.open(os.devnull, os.O_RDWR), ring.fd
        assert ring.fd == fd and error_of(ring.enter) in (errno.EOPNOTSUPP, errno.EBADF)


@kernel
class TestRingOfThisKernel(TestRing):
    """The same in each kernel of the lab."""


@pytest.mark.parametrize("number, says", [(errno.EPERM, "kernel.io_uring_disabled"),
                                          (errno.ENOSYS, "CONFIG_IO_URING"), (errno.ENOMEM, "ulimit -l")])
def test_no_ring_to_be_had_says_why(monkeypatch, number, says):
    def refuses(*_):
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ublk, "_syscall", refuses)
    with pytest.raises(ublk.UblkError) as found:
        ublk.Ring(8)
    assert_error_line(f"ublk: {found.value}\n", number, says=says)


def test_address_of_any_buffer():
    data = bytearray(b"abc")
    assert ublk.address_of(data) == ctypes.addressof(ctypes.c_char.from_buffer(data))
    assert ctypes.string_at(ublk.address_of(memoryview(data)[1:]), 2) == b"bc"
    assert ublk.address_of(b"") is not None


# =================================================================================================
# Words into targets
# =================================================================================================


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("4096", 4096), ("512K", 512 << 10), ("1m", 1 << 20), ("1G", 1 << 30), ("2T", 2 << 40),
    ("1.5K", 1536), ("0.5G", 512 << 20), (str((1 << 53) + 1), (1 << 53) + 1), ("7000000T", 7000000 << 40)])
def test_sizes(text, size):
    assert ublk.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "x", "1P", "1KB", "-1", "-1K", "1.0001", "nan", "inf", "-inf",
                                  "infK", "1e400", "0x10", "1 2", "1_000"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError):
        ublk.parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 512, 1000, 1024, 1536, 1 << 20, 3 << 30, 5 << 40, (1 << 40) + 512])
def test_sizes_are_written_as_they_are_read(size):
    assert ublk.parse_size(ublk.format_size(size)) == size


class Sample(ublk.Target):
    """Show every kind of parameter.

    path: where it lies
    delay: seconds
    """

    def __init__(self, path, count: int = 3, *, delay: float = 0.5, big: ublk.Size = ublk.Size(4096),
                 loud: bool = False, name_of: str = "x"):
        self.all = path, count, delay, big, loud, name_of


class Wrapper(ublk.Target):
    """Wrap another target."""

    def __init__(self, inner: ublk.Target, *, rate: int = 1):
        self.inner, self.rate = inner, rate


class Many(ublk.Target):
    """Take several words."""

    def __init__(self, *paths, mirror: bool = False):
        self.paths, self.mirror = paths, mirror


@pytest.fixture
def samples(monkeypatch):
    """Let the command line know the targets above."""
    monkeypatch.setattr(ublk, "known_targets", lambda: {"sample": Sample, "wrapper": Wrapper, "many": Many,
                                                        "null": ublk.Null})


def test_a_signature_becomes_parameters():
    assert ublk.parameters(Sample) == [
        ("path", "word", "", ublk.REQUIRED), ("count", "word", "int", 3), ("delay", "option", "float", 0.5),
        ("big", "option", "Size", 4096), ("loud", "option", "bool", False), ("name_of", "option", "str", "x")]
    assert [place for _, place, _, _ in ublk.parameters(Many)] == ["words", "option"]
    assert ublk.parameters(type("Plain", (ublk.Target,), {})) == []


def test_parameters_are_those_that_inspect_finds():
    class Wrapped(Sample):
        @functools.wraps(Sample.__init__)
        def __init__(self, *args, **options):
            super().__init__(*args, **options)

    places = {inspect.Parameter.POSITIONAL_OR_KEYWORD: "word", inspect.Parameter.VAR_POSITIONAL: "words",
              inspect.Parameter.KEYWORD_ONLY: "option"}
    for cls in (*ublk.known_targets().values(), Sample, Many, Wrapped):
        expected = [(one.name, places[one.kind], ublk.REQUIRED if one.default is one.empty else one.default)
                    for one in inspect.signature(cls).parameters.values()]
        assert [(name, place, default) for name, place, _, default in ublk.parameters(cls)] == expected


@pytest.mark.parametrize("words, expected", [
    ("a", ("a", 3, 0.5, 4096, False, "x")),
    ("a 2K --delay 2 --big 1M --loud --name-of y", ("a", 2048, 2.0, 1 << 20, True, "y")),
    ("--loud a", ("a", 3, 0.5, 4096, True, "x"))])
def test_words_become_arguments(samples, words, expected):
    assert ublk.make_target(["sample", *words.split()]).all == expected


def test_a_target_wraps_the_words_that_remain(samples):
    target = ublk.make_target("wrapper --rate 5 sample a --delay 9".split())
    assert target.rate == 5 and target.inner.all[:3] == ("a", 3, 9.0)


def test_a_target_takes_many_words(samples):
    assert ublk.make_target("many a b c --mirror".split()).paths == ("a", "b", "c")


def test_help_of_a_target_comes_from_its_docstring(samples, run):
    done = run("sample", "--help")
    assert done.status == 0
    for text in ("Show every kind of parameter.", "where it lies", "--delay", "seconds", "--name-of"):
        assert text in done.out


@pytest.mark.parametrize("words", ["sample", "sample a --delay x", "sample a 1 2", "sample a --big 1P",
                                   "many", "sample a --unknown 1"])
def test_wrong_words_for_a_target_are_wrong_usage(samples, run, words):
    done = run(*words.split())
    assert done.status == 2 and "usage: ublk.py" in done.err and "Traceback" not in done.err
    assert run("wrapper").status == 2


def test_targets_of_the_users_own_file(tmp_path):
    path = target_file(tmp_path, """
        class One(ublk.Target):
            def __init__(self, *, size: ublk.Size = ublk.Size(1 << 20)):
                self.size = size
    """)
    for word in (str(path), f"{path}:One"):
        target = ublk.make_target([word, "--size", "2M"])
        assert isinstance(target, ublk.Target) and target.size == 2 << 20


@pytest.mark.parametrize("signature", ["size", "size=4096", "size: int", "size: ublk.Size"])
@pytest.mark.parametrize("words", ["1M", "--size 1M", "--size=1M"])
def test_a_size_is_a_word_or_an_option(tmp_path, capfd, signature, words):
    path = target_file(tmp_path, f"""
        print("loaded")
        class Mine(ublk.Target):
            def __init__(self, {signature}, depth_of_thought=1.5):
                self.size, self.depth = size, depth_of_thought
    """)
    assert ublk.make_target([str(path), *words.split()]).size == 1 << 20
    target = ublk.make_target([str(path), *words.split(), "--depth-of-thought", "2"])
    assert (target.size, target.depth) == (1 << 20, 2.0)
    assert capfd.readouterr().out == ""         # standard output is for the path of the disk


def test_a_path_may_have_colons(tmp_path):
    (tmp_path / "a:b.py").mkdir()
    path = target_file(tmp_path / "a:b.py", "class Mine(ublk.Target): size = 4096")
    for word in (path, f"{path}:Mine"):
        assert ublk.make_target([str(word)]).size == 4096


def test_the_companion_is_found_by_an_isolated_python():
    done = sh(sys.executable, "-I", UBLK, "loop", "/no/such/file", check=False)
    assert_error_line(done.stderr, errno.ENOENT, says="/no/such/file")


def test_a_bug_of_a_target_needs_nobody_who_reads_of_it():
    code = """if True:
        import errno, os, sys, ublk
        modules = set(sys.modules)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        try:
            1 / 0
        except ZeroDivisionError as error:
            assert ublk.failed(error) == -errno.EIO
        ublk.say("nobody hears this")
        os._exit(0 if sys.version_info >= (3, 13) or modules == set(sys.modules) else 3)
    """
    assert sh(sys.executable, "-c", code, cwd=HERE, check=False).returncode == 0


def test_a_target_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SIZE = 8192\n")
    path = target_file(tmp_path, """
        from neighbour_of_mine import SIZE
        class One(ublk.Target):
            size = SIZE
    """)
    assert ublk.make_target([str(path)]).size == 8192


# =================================================================================================
# Bad input that no driver needs to see
# =================================================================================================


@pytest.fixture
def no_driver(monkeypatch):
    """Make /dev/ublk-control disappear, so that what gets that far fails in one known way."""
    system_open = os.open

    def refuses(path, *args, **options):
        if path == "/dev/ublk-control":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return system_open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuses)


def assert_fails(done, status, says, number=None):
    """Exit status 1 is one error line, 2 is wrong usage; nothing on standard output."""
    assert (done.status, done.out) == (status, ""), done
    assert says in done.err and "Traceback" not in done.err, done.err
    if status == 1:
        assert_error_line(done.err, number)


def test_no_driver(no_driver, run):
    for words in ("null", "list", "stop 0", "del 0", "del --all", "resize 0 1G", "features"):
        assert_fails(run(*words.split()), 1, "cannot open /dev/ublk-control: ", errno.ENOENT)
        assert "ublk.py check" in run(*words.split()).err


def test_check_says_what_to_do_about_a_missing_driver(run, monkeypatch):
    system_exists = os.path.exists
    monkeypatch.setattr(os.path, "exists",
                        lambda path: "ublk-control" not in str(path) and system_exists(path))
    done = run("check")
    assert done.status == 1 and re.search(r"missing +ublk driver: .*modprobe ublk_drv", done.out)


def test_check_says_what_to_do_about_a_missing_io_uring(run, monkeypatch):
    def refuses(*_):
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(ublk, "_syscall", refuses)
    done = run("check")
    assert done.status == 1 and re.search(r"missing +io_uring: .*sysctl kernel.io_uring_disabled=0", done.out)


@pytest.mark.parametrize("words, status, says, number", [
    ("nul", 1, "unknown target or command 'nul'", errno.EINVAL),
    ("lisst", 1, "targets are ", errno.EINVAL),
    ("null --size 0", 1, "size 0", errno.EINVAL),
    ("null --size 1000", 1, "size 1000", errno.EINVAL),
    ("null --size 4608 --block-size 4K", 1, "not a positive multiple of the block size 4096", errno.EINVAL),
    ("null --size 9000000T", 1, "size 9895604649984000000", errno.EINVAL),
    ("null --size -1", 2, "--size", None),
    ("null --size much", 2, "--size", None),
    ("null --block-size 1000", 1, "block size 1000", errno.EINVAL),
    ("null --block-size 256", 1, "block size 256", errno.EINVAL),
    ("null --block-size 128K", 1, "block size 131072", errno.EINVAL),
    ("null --depth 0", 1, "depth 0", errno.EINVAL),
    ("null --depth 5000", 1, "depth 5000", errno.EINVAL),
    ("null --depth -1", 1, "depth -1", errno.EINVAL),
    ("null --depth many", 2, "--depth", None),
    ("null --queues 0", 1, "queues 0", errno.EINVAL),
    ("null --queues 5000", 1, "queues 5000", errno.EINVAL),
    ("null --max-io 0", 1, "largest request 0", errno.EINVAL),
    ("null --max-io 1000", 1, "largest request 1000", errno.EINVAL),
    ("null --max-io 1G", 1, "largest request 1073741824", errno.EINVAL),
    ("null --id -7", 1, "id -7", errno.EINVAL),
    ("null --id 99999999", 1, "id 99999999", errno.EINVAL),
    ("null --id x", 2, "--id", None),
    ("null --recovery maybe", 2, "--recovery", None),
    ("null --sise 1G", 2, "--sise", None),
    ("null surplus", 2, "surplus", None),
    ("null surplus --background", 2, "surplus", None),
    ("null --size 1X --restart", 2, "1X is not a whole number of bytes", None),
    ("fault --delay 10ms --background", 2, "a target is missing", None),
    ("add nul", 1, "targets are ", errno.EINVAL),
    ("del", 2, "del needs one or more ids, or --all", None),
    ("del 1 --all", 2, "del needs one or more ids, or --all", None),
    ("del x", 2, "x", None),
    ("stop", 2, "id", None),
    ("stop 1 2", 2, "2", None),
    ("list --jason", 2, "--jason", None),
    ("resize 0", 2, "size", None),
    ("resize 0 big", 2, "big", None),
])
def test_bad_words(no_driver, run, words, status, says, number):
    assert_fails(run(*words.split()), status, says, number)


def test_no_words_at_all_is_wrong_usage_and_help_is_not(run):
    assert run().status == 2
    done = run("--help")
    assert done.status == 0 and "null" in done.out and "--background" in done.out
    for verb in ublk.VERBS:
        assert verb in done.out and run(verb, "--help").status == 0
    assert "--size" in run("null", "--help", "--background").out


@pytest.mark.parametrize("body, says", [
    ("class Broken(ublk.Target:\n    pass", "SyntaxError"),
    ("import nowhere_to_be_found", "ModuleNotFoundError"),
    ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(3)", "SystemExit"),
    ("class Disk: pass", "Target"),
    ("class A(ublk.Target): pass\nclass B(ublk.Target): pass", "A, B"),
    ("class A(ublk.Target):\n    def __init__(self): raise ValueError('not today')", "ValueError: not today"),
    ("class A(ublk.Target):\n    def __init__(self): raise OSError(28, 'No space', 'disk')", "28 ENOSPC"),
    ("class A(ublk.Target):\n    def __init__(self): open('/no/such/file')", "/no/such/file"),
    ("class A(ublk.Target):\n    def __init__(self): raise ValueError('two\\nlines')", "two"),
    ("class A(ublk.Target): size = 0", "size 0"),
    ("class A(ublk.Target): size = 'large'", "large"),
    ("class A(ublk.Target): size = 4096.0", "size"),
    ("class A(ublk.Target): size, block_size = 4096, 'x'", "block"),
])
def test_bad_target_files(no_driver, run, tmp_path, body, says):
    assert_fails(run(target_file(tmp_path, body)), 1, says)


@pytest.mark.parametrize("word, says", [
    ("/no/such/file.py", "/no/such/file.py"), ("{}", "irectory"), ("{}/mine.py:Other", "Other"),
    ("{}/mine.py:ublk", "ublk"), ("{}/latin.py", "latin.py"), ("{}/zero.py", "zero.py")])
def test_bad_target_words(no_driver, run, tmp_path, word, says):
    directory = tmp_path / "dir.py"
    directory.mkdir()
    target_file(directory, "class Mine(ublk.Target):\n    size = 4096")
    (directory / "latin.py").write_bytes(b"name = '\xe9'\n")
    (directory / "zero.py").write_bytes(b"a\0b")
    assert_fails(run(word.format(directory)), 1, says)


def test_debug_shows_the_traceback():
    done = cli("null", "--size", "0", "--debug", check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "UblkError" in done.stderr


def test_a_state_directory_that_cannot_be_is_an_error_line(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path / "file" / "run"))
    device = ublk.Device(Ram())
    device.id = 7
    with pytest.raises(OSError) as found:
        ublk.save_state(device)
    assert_error_line(f"ublk: {ublk.error_line(found.value)}\n", says=str(tmp_path))


# =================================================================================================
# State files
# =================================================================================================


@pytest.fixture
def state(run_dir):
    """Write the state file of device 7 as it is told to, and load it: state(bytes)."""
    def load(content):
        run_dir.mkdir(mode=0o700, exist_ok=True)
        (run_dir / "7.json").write_bytes(content)
        return ublk.load_state(7)
    return load


GOOD_STATE = {"id": 7, "target": "null", "args": ["--size", "1G"], "cwd": "/", "pid": 1}


def test_a_state_file_is_read_as_it_was_written(run_dir):
    device = ublk.Device(Ram(), words=("null", ["--size", "1G"], {}))
    device.id = 7
    ublk.save_state(device)
    loaded = ublk.load_state(7)
    assert (loaded["target"], loaded["args"], loaded["pid"]) == ("null", ["--size", "1G"], os.getpid())
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir / "7.json").stat().st_mode) == 0o600
    assert os.listdir(run_dir) == ["7.json"]
    ublk.forget_state(7)
    ublk.forget_state(7)
    assert os.listdir(run_dir) == [] and ublk.load_state(7) == {}


def test_a_good_state_file_is_believed(state, capsys):
    assert state(json.dumps(GOOD_STATE).encode()) == GOOD_STATE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [
    b"", b"{", json.dumps(GOOD_STATE).encode()[:-9], b"\xff\xfe\x00", b"null", b"[]", b'"x"', b"7", b"{}",
    json.dumps({**GOOD_STATE, "id": 8}).encode(), json.dumps({**GOOD_STATE, "id": "7"}).encode(),
    json.dumps({**GOOD_STATE, "target": ["null"]}).encode(), json.dumps({**GOOD_STATE, "args": "x"}).encode(),
    json.dumps({**GOOD_STATE, "args": [1, {}]}).encode(), b"[" * 100000, b"0" * (2 << 20),
    b"9" * 10000, b'{"id": 7, "target": "null", "args": [NaN]}'],
    ids=lambda content: f"{len(content)}-{content[:24]!r}")
def test_a_damaged_state_file_is_reported_and_ignored(state, capsys, content):
    assert state(content) == {}
    warning = capsys.readouterr().err
    assert warning.startswith("ublk: ignoring ") and warning.count("\n") == 1


def make_link(path):
    (path.parent / "elsewhere").write_text(json.dumps(GOOD_STATE))
    path.symlink_to("elsewhere")


def make_foreign(path):
    path.write_text(json.dumps(GOOD_STATE))
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("make", [make_link, make_foreign, os.mkdir, os.mkfifo,
                                  lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.symlink_to(path)])
def test_a_hostile_state_file_is_reported_and_ignored(run_dir, capsys, make):
    if make is make_foreign and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    run_dir.mkdir()
    make(run_dir / "7.json")
    assert ublk.load_state(7) == {}
    assert capsys.readouterr().err.startswith("ublk: ignoring ")


def test_a_planted_link_is_not_written_through(run_dir, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir.mkdir(mode=0o700)
    (run_dir / "7.json.new").symlink_to(victim)
    (run_dir / "7.json").symlink_to(victim)
    device = ublk.Device(Ram())
    device.id = 7
    try:
        ublk.save_state(device)
    except OSError:
        pass
    assert victim.read_text() == "precious"


def test_a_state_directory_of_somebody_else_is_not_used(run_dir):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    run_dir.mkdir(mode=0o777)
    os.chmod(run_dir, 0o777)
    os.chown(run_dir, 12345, 12345)
    device = ublk.Device(Ram())
    device.id = 7
    with pytest.raises(OSError) as found:
        ublk.save_state(device)
    assert_error_line(f"ublk: {ublk.error_line(found.value)}\n", says=str(run_dir))


def test_where_state_files_lie(monkeypatch):
    monkeypatch.delenv("UBLK_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert ublk.run_dir() == "/run/ublk"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ublk.run_dir() == "/run/user/1000/ublk"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert "1000" in ublk.run_dir()


# =================================================================================================
# A disk from the command line
# =================================================================================================

FIELDS = ["id", "path", "char_path", "state", "target", "args", "size", "block_size", "queues", "depth",
          "max_io_bytes", "flags", "pid", "owner_uid", "owner_gid"]


@kernel
def test_the_file_alone_in_an_empty_directory_serves_null(tmp_path):
    script = shutil.copy(UBLK, tmp_path)
    with server("null", "--size", "1G", script=script, cwd=tmp_path) as disk:
        with opened(disk.path) as fd:
            assert os.lseek(fd, 0, os.SEEK_END) == 1 << 30
            assert write_at(fd, 4096, b"x" * 8192) == 8192
            assert read_at(fd, 4096, 8192) == bytes(8192)
        assert " null " in cli("list", script=script).stdout
    assert disk.returncode == 0 and disk.errors == ""


@kernel
@pytest.mark.parametrize("words", [["ram", "--size", "4M"], ["loop", "disk.img"]])
def test_with_its_companion_it_serves_ram_and_loop(tmp_path, words):
    script = shutil.copy(UBLK, tmp_path)
    shutil.copy(HERE / "ublk_targets.py", tmp_path)
    with open(tmp_path / "disk.img", "wb") as file:
        file.truncate(4 << 20)
    with server(*words, script=script, cwd=tmp_path) as disk:
        data = os.urandom(65536)
        with opened(disk.path) as fd:
            assert os.lseek(fd, 0, os.SEEK_END) == 4 << 20
            write_at(fd, 1 << 20, data)
            assert read_at(fd, 1 << 20, 65536) == data
    assert disk.returncode == 0 and disk.errors == ""


@kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_disk_away(number):
    with server("null") as disk:
        disk.send_signal(number)
        assert disk.wait(60) == 0
        assert leftovers() == []


@kernel
def test_list_tells_all_about_a_disk(run):
    with server("null", "--size", "8M", "-n", 7, "-q", 1, "-d", 32, "--max-io", "256K",
                "--block-size", "4K") as disk:
        rows = json.loads(run("list", "--json").out)
        row, = rows
        assert list(row) == FIELDS
        assert {**row, "flags": 0} == {
            "id": 7, "path": "/dev/ublkb7", "char_path": "/dev/ublkc7", "state": "LIVE", "target": "null",
            "args": ["--size", "8M"], "size": 8 << 20, "block_size": 4096, "queues": 1, "depth": 32,
            "max_io_bytes": 256 << 10, "flags": 0, "pid": disk.pid, "owner_uid": 0, "owner_gid": 0}
        assert set(row["flags"]) <= {feature.name for feature in ublk.FEATURES}
        assert json.loads(run("list", "7", "--json").out) == rows
        lines = run("list").out.splitlines()
        assert len(lines) == 2 and lines[1].split()[:4] == ["7", "LIVE", "null", "--size"]
    assert json.loads(run("list", "--json").out) == []


@kernel
def test_create_prints_the_disk_as_json():
    process = subprocess.Popen([sys.executable, UBLK, "null", "--json"], stdout=subprocess.PIPE, text=True)
    row = json.loads(process.stdout.readline())
    assert list(row) == FIELDS and row["state"] == "LIVE" and os.path.exists(row["path"])
    process.terminate()
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 0


@kernel
def test_background_returns_when_the_disk_is_usable(run):
    done = cli("null", "--background", "--size", "1M")
    assert done.stdout == "/dev/ublkb0\n" and done.stderr == ""
    with opened("/dev/ublkb0") as fd:
        assert read_at(fd, 0, 4096) == bytes(4096)
    row, = json.loads(run("list", "--json").out)
    assert row["pid"] in processes_left() and os.getsid(row["pid"]) == row["pid"]
    done = run("del", "0")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []


@kernel
def test_stop_ends_the_server_and_del_removes_the_device(run):
    with server("null") as disk:
        assert run("stop", disk.id).status == 0
        assert disk.wait(60) == 0
        assert not os.path.exists(disk.path)
        assert run("del", disk.id).status == 0
        assert leftovers() == []


@kernel
def test_stop_if_unused(run):
    with server("null") as disk:
        if not at_least("7.0"):
            assert_fails(run("stop", disk.id, "--if-unused"), 1, "needs Linux 7.0, this is", errno.EOPNOTSUPP)
            return
        with opened(disk.path):
            assert_fails(run("stop", disk.id, "--if-unused"), 1, "somebody has it open", errno.EBUSY)
        until(lambda: run("stop", disk.id, "--if-unused").status == 0, "udev to close the disk")
        assert disk.wait(60) == 0
        assert run("del", disk.id).status == 0


@kernel
def test_del_takes_many_or_all(run):
    for _ in range(3):
        cli("null", "--background")
    assert run("del", 0, 2).status == 0 and devices_left() == [1]
    assert run("del", "--all").status == 0 and devices_left() == []
    assert run("del", "--all").status == 0


@kernel
def test_del_goes_on_behind_what_it_cannot_delete(run):
    with Forked("null"):
        assert_fails(run("del", 5, 0), 1, "device 5: there is no such device", errno.ENODEV)
        assert devices_left() == []


@kernel
@pytest.mark.parametrize("words", ["list 5", "stop 5", "stop 5 --if-unused", "del 5", "resize 5 1G"])
def test_a_device_that_does_not_exist(run, words):
    done = run(*words.split())
    assert_fails(done, 1, "device 5: there is no such device", errno.ENODEV)


@kernel
def test_resize(run):
    with server("null", "--size", "1M", "--block-size", "4K") as disk:
        if not at_least("6.16"):
            assert_fails(run("resize", disk.id, "2M"), 1, "needs Linux 6.16, this is", errno.EOPNOTSUPP)
            return
        for size in (2 << 20, 512 << 10):
            assert run("resize", disk.id, size).status == 0
            with opened(disk.path) as fd:
                assert os.lseek(fd, 0, os.SEEK_END) == size
        for size in (0, 512, 4097):
            assert_fails(run("resize", disk.id, size), 1, f"size {size}", errno.EINVAL)
    with ublk.Device(Ram()) as device:
        for size in (0, -512, 1000, 1 << 63):
            assert f"size {size}" in message(device.resize, size)


@kernel
@pytest.mark.parametrize("words", ["ram --size 1M", "loop disk.img"])
@pytest.mark.parametrize("queues", [1, 2])
def test_what_a_disk_grows_by_can_be_used(run, tmp_path, monkeypatch, words, queues):
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(1 << 20))
    with Forked(*words.split(), "-q", queues) as disk:
        if not at_least("6.16"):
            assert_fails(run("resize", disk.id, "2M"), 1, "needs Linux 6.16, this is", errno.EOPNOTSUPP)
            return
        assert run("resize", disk.id, "2M").status == 0
        until(lambda: "ram" in words or os.path.getsize("disk.img") == 2 << 20, "the server to follow")
        data = os.urandom(4096)
        with opened(disk.path) as fd:
            assert read_at(fd, (2 << 20) - 8192, 4096) == bytes(4096)
            write_at(fd, (2 << 20) - 4096, data)
            assert read_at(fd, (2 << 20) - 4096, 4096) == data


@kernel
def test_old_kernels_get_the_opcodes_they_know(control):
    assert control.legacy is not at_least("6.4")


@kernel
def test_features_names_every_bit_of_this_kernel(run, control):
    rows = json.loads(run("features", "--json").out)
    assert [row["bit"] for row in rows] == list(range(len(ublk.FEATURES)))
    assert all(list(row) == ["bit", "name", "since", "meaning", "supported"] for row in rows)
    if not at_least("6.5"):
        assert control.features is None and all(row["supported"] is None for row in rows)
        return
    assert control.features & ~sum(ublk.FEATURES) == 0, "a bit without a name"
    assert sum(1 << row["bit"] for row in rows if row["supported"]) == control.features
    lines = run("features").out.splitlines()
    assert [line.split()[1] for line in lines] == [feature.name for feature in ublk.FEATURES]
    for feature in ublk.FEATURES:
        if feature & control.features and feature is not ublk.UBLK_F_SUPPORT_ZERO_COPY:
            assert at_least(feature.since), f"{feature.name} is older than the table says"


@kernel
def test_check_finds_nothing_wrong(run):
    done = run("check")
    assert done.status == 0 and "missing" not in done.out and "ok       ublk driver" in done.out


@kernel
def test_an_id_of_choice_and_an_id_that_is_taken(run):
    with server("null", "--id", 11) as disk:
        assert disk.path == "/dev/ublkb11"
        done = cli("null", "--id", 11, check=False)
        assert done.returncode == 1
        assert_error_line(done.stderr, errno.EEXIST, says="device 11: the id is taken")
        assert json.loads(run("list", "--json").out)[0]["pid"] == disk.pid


@kernel
def test_an_ordinary_user_is_told_that_the_driver_is_not_theirs():
    text = as_user(65534, lambda: message(ublk.Control))
    assert_error_line(f"ublk: {text}\n", errno.EACCES, says="/dev/ublk-control")


@kernel
def test_io_uring_disabled_by_sysctl(run):
    path = Path("/proc/sys/kernel/io_uring_disabled")
    if not path.exists():
        pytest.skip(f"Linux {ublk.kernel_release()} has no kernel.io_uring_disabled (6.6)")
    before = path.read_text()
    try:
        path.write_text("2")
        assert_fails(run("list"), 1, "kernel.io_uring_disabled=0", errno.EPERM)
        assert run("check").status == 1
    finally:
        path.write_text(before)


@kernel
def test_without_the_driver(run):
    if not IN_LAB:
        pytest.skip("takes the driver away: in the lab only")
    sh("modprobe", "-r", "ublk_drv")            # which says, too, that nothing refers to it any more
    try:
        assert_fails(run("null"), 1, "cannot open /dev/ublk-control", errno.ENOENT)
        done = run("check")
        assert done.status == 1 and "modprobe ublk_drv" in done.out
    finally:
        sh("modprobe", "ublk_drv")
        until(lambda: os.path.exists("/dev/ublk-control"))


@kernel
@pytest.mark.parametrize("words, says, number", [
    ("loop /no/such/image", "/no/such/image", errno.ENOENT), ("loop {}/empty", "empty", errno.EINVAL),
    ("loop {}/odd", "odd", errno.EINVAL), ("loop {}", "", None), ("ram --size 0", "0", errno.EINVAL),
    ("ram --size 1000", "1000", errno.EINVAL), ("null --max-io 4M --depth 5000", "5000", errno.EINVAL)])
def test_bad_backing(run, tmp_path, words, says, number):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    assert_fails(run(*words.format(tmp_path).split()), 1, says, number)


# =================================================================================================
# A disk from import
# =================================================================================================


@kernel
def test_the_example_of_the_documentation_runs():
    needs("mkfs.ext4")
    exec(compile(example(), "example", "exec"), {"__name__": "example"})


@kernel
def test_two_disks_at_once():
    with ublk.Device(Ram()) as one, ublk.Device(AsyncRam()) as two:
        assert {one.path, two.path} == {"/dev/ublkb0", "/dev/ublkb1"}
        with opened(one.path) as first, opened(two.path) as second:
            write_at(first, 0, b"1" * 4096)
            write_at(second, 0, b"2" * 4096)
            assert read_at(first, 0, 4096) == b"1" * 4096
            assert read_at(second, 0, 4096) == b"2" * 4096


@kernel
def test_a_device_lives_once():
    device = ublk.Device(Ram())
    with device as disk:
        assert "started before" in message(device.start)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
    device.stop()
    for again in (device.start, device.resume, device.__enter__):
        assert_error_line(f"ublk: {message(again)}\n", errno.EALREADY, says="make a new Device")
    assert devices_left() == []


@kernel
def test_more_queues_than_processors_are_as_many_as_these(control):
    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    with ublk.Device(Ram(), queues=cpus + 3) as disk:
        assert disk.info.nr_hw_queues == cpus
        found = [control.get_queue_affinity(disk.id, queue) for queue in range(cpus)]
        assert set.union(*found) >= os.sched_getaffinity(0)
        with opened(disk.path) as fd:
            for cpu in os.sched_getaffinity(0):
                os.sched_setaffinity(0, {cpu})
                write_at(fd, 4096 * cpu, bytes([cpu + 1]) * 4096)
                assert read_at(fd, 4096 * cpu, 4096) == bytes([cpu + 1]) * 4096


@pytest.fixture(autouse=True)
def all_processors():
    """Let every test run on all processors, whatever the one before did."""
    cpus = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cpus)


@kernel
@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"depth": 4096}, {"max_io": 4096},
                                     {"max_io": 4 << 20}])
def test_the_data_come_back_whatever_the_limits(options):
    data = os.urandom(3 << 20)
    with ublk.Device(Ram(8 << 20), **options) as disk, opened(disk.path) as fd:
        assert write_at(fd, 1 << 20, data) == len(data)
        assert read_at(fd, 1 << 20, len(data)) == data
    assert disk.target.data[1 << 20:4 << 20] == data


@kernel
@pytest.mark.parametrize("block", [512, 1024, 2048, 4096])
def test_block_sizes(block):
    class Blocks(Ram):
        block_size = block

        def read(self, offset, buffer):
            assert offset % block == 0 == len(buffer) % block
            super().read(offset, buffer)

    with ublk.Device(Blocks()) as disk, opened(disk.path) as fd:
        assert read_at(fd, block, block) == bytes(block)
        assert block == 512 or error_of(read_at, fd, 512, 512) == errno.EINVAL


@kernel
def test_a_read_only_disk_refuses_writes():
    target = Ram()
    target.read_only = True
    with ublk.Device(target) as disk:
        assert Path(f"/sys/block/ublkb{disk.id}/ro").read_text() == "1\n"
        with opened(disk.path, os.O_RDONLY) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
        done = dd(disk.path, 0)
        assert done.returncode == 1 and re.search("not permitted|Permission denied|Read-only", done.stderr)


@kernel
def test_what_a_class_does_not_define_is_not_offered():
    with ublk.Device(Ram()) as plain, ublk.Device(ublk.Null()) as full:
        for name in ("discard_max_bytes", "write_zeroes_max_bytes"):
            assert int(Path(f"/sys/block/ublkb{plain.id}/queue/{name}").read_text()) == 0
            assert int(Path(f"/sys/block/ublkb{full.id}/queue/{name}").read_text()) > 0
        assert Path(f"/sys/block/ublkb{plain.id}/queue/write_cache").read_text() == "write through\n"
        assert Path(f"/sys/block/ublkb{full.id}/queue/write_cache").read_text() == "write back\n"


@kernel
def test_signals_do_not_disturb_the_server():
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with ublk.Device(Ram()) as disk, opened(disk.path) as fd:
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
            for block in range(100):
                write_at(fd, 4096 * block, bytes([block]) * 4096)
            for block in range(100):
                assert read_at(fd, 4096 * block, 4096) == bytes([block]) * 4096
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# =================================================================================================
# Data
# =================================================================================================


@pytest.fixture
def targets():
    """The companion's targets."""
    return __import__("ublk_targets")


@pytest.fixture
def new_image(tmp_path):
    """Make a sparse file: new_image("64M")."""
    def make(size):
        path = tmp_path / "disk.img"
        with open(path, "wb") as file:
            file.truncate(ublk.parse_size(size))
        return path
    return make


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


@kernel
@pytest.mark.parametrize("direct", [False, True])
def test_the_backing_file_of_a_loop_is_what_was_written(targets, new_image, direct):
    path = new_image("8M")
    expected = bytearray(8 << 20)
    target = make_loop(targets, path, direct)
    with ublk.Device(target) as disk, opened(disk.path) as fd:
        for offset, size in ((0, 4096), (12 << 10, 1 << 20), (4 << 20, 3 << 20), ((8 << 20) - 4096, 4096)):
            expected[offset:offset + size] = data = os.urandom(size)
            write_at(fd, offset, data)
            assert read_at(fd, offset, size) == data
        os.fsync(fd)
        assert read_at(fd, 0, 8 << 20) == expected
    assert path.read_bytes() == expected


def make_loop(targets, path, direct):
    """Make a loop target; direct I/O where the file system has it."""
    try:
        return targets.Loop(str(path), direct=direct)
    except ublk.UblkError as error:
        pytest.skip(f"{error}")


MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"],
        "btrfs": ["mkfs.btrfs", "-q", "-f"]}
FSCK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}
SIZES = {"ext4": "64M", "xfs": "320M", "btrfs": "128M"}


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


@kernel
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_loop_carries_a_file_system(targets, new_image, tmp_path, kind):
    with ublk.Device(targets.Loop(str(new_image(SIZES[kind])))) as disk:
        carries(kind, disk, tmp_path / "mnt")


@kernel
@pytest.mark.parametrize("make", [Ram, AsyncRam])
def test_a_target_of_ten_lines_carries_a_file_system(tmp_path, make):
    with ublk.Device(make(64 << 20)) as disk:
        carries("ext4", disk, tmp_path / "mnt")


@kernel
def test_discard_frees_blocks_of_the_backing_file(targets, new_image):
    needs("blkdiscard")
    path = new_image("16M")
    with ublk.Device(targets.Loop(str(path))) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, os.urandom(8 << 20))
        os.sync()
        full = os.stat(path).st_blocks
        assert full * 512 >= 8 << 20
        sh("blkdiscard", "-o", 1 << 20, "-l", 4 << 20, disk.path)
        assert os.stat(path).st_blocks * 512 <= full * 512 - (4 << 20)
        with opened(disk.path) as fd:
            assert read_at(fd, 1 << 20, 4 << 20) == bytes(4 << 20)
            assert read_at(fd, 0, 4096) == path.read_bytes()[:4096] != bytes(4096)


@kernel
@pytest.mark.parametrize("name", ["ram", "loop"])
def test_zeroes_are_written_exactly_where_they_should(targets, new_image, name):
    needs("blkdiscard")
    target = targets.Ram(size=1 << 20) if name == "ram" else targets.Loop(str(new_image("1M")))
    expected = bytearray(os.urandom(1 << 20))
    with ublk.Device(target) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, expected)
        for offset, length in ((512, 512), (4096, 8192), (20480 + 512, 65536), ((1 << 20) - 1024, 1024)):
            sh("blkdiscard", "-z", "-o", offset, "-l", length, disk.path)
            expected[offset:offset + length] = bytes(length)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 1 << 20) == expected


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


@kernel
def test_requests_reach_the_methods_they_are_for():
    needs("blkdiscard")
    target = Recorder()
    with ublk.Device(target, partition_scan=False) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 8192, b"x" * 4096)
            assert target.calls == [("write", 8192, 4096)]
            os.fsync(fd)
            assert target.calls[1:] == [("flush",)]
        del target.calls[:]
        with opened(disk.path, os.O_RDWR | os.O_DSYNC) as fd:
            write_at(fd, 4096, b"y" * 4096)
        assert ("write_fua", 4096, 4096) in target.calls
        sh("blkdiscard", "-o", 65536, "-l", 131072, disk.path)
        assert target.calls[-1] == ("discard", 65536, 131072)
        sh("blkdiscard", "-z", "-o", 65536, "-l", 131072, disk.path)
        assert target.calls[-1][:3] == ("write_zeroes", 65536, 131072)


@kernel
def test_a_flush_reaches_the_disk_below(targets):
    below = Recorder()
    with ublk.Device(below) as disk, ublk.Device(targets.Loop(disk.path)) as loop:
        below.calls.clear()
        sh("dd", "if=/dev/urandom", f"of={loop.path}", "bs=4k", "count=4", "conv=fsync", "status=none")
        names = [call[0] for call in below.calls]
        assert "flush" in names and "write" in names[:names.index("flush")], names
        assert loop.target.fd >= 0 and digest(loop.path) == digest(disk.path)


# =================================================================================================
# Handlers
# =================================================================================================


def dd(path, block):
    """Write one block of 4 KiB with dd, past the page cache."""
    return sh("dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1", f"seek={block}", "oflag=direct",
              "status=none", check=False, env={**os.environ, "LC_ALL": "C"})


class Fails(Ram):
    """Fail writes at 4096 with a bug."""

    def write(self, offset, buffer):
        if offset == 4096:
            raise ZeroDivisionError("a bug of the target")
        super().write(offset, buffer)


class AsyncFails(AsyncRam):
    """The same with coroutines."""

    async def write(self, offset, buffer):
        await ublk.uring_sleep(0)
        if offset == 4096:
            raise ZeroDivisionError("a bug of the target")


@kernel
@pytest.mark.parametrize("make", [Fails, AsyncFails])
def test_an_exception_fails_its_request_and_no_other(make, capfd):
    with ublk.Device(make()) as disk:
        assert dd(disk.path, 0).returncode == 0
        capfd.readouterr()
        done = dd(disk.path, 1)
        assert done.returncode == 1 and "Input/output error" in done.stderr
        assert dd(disk.path, 2).returncode == 0
        text = capfd.readouterr().err
        assert text.count("Traceback") == 1 and "ZeroDivisionError: a bug of the target" in text


# What the block layer keeps of an errno; everything else becomes EIO.
KEPT = [errno.ENOSPC, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.ENOLINK, errno.EREMOTEIO, errno.EILSEQ,
        errno.ENOMEM, errno.ENODATA]


class Errors(Ram):
    """Fail each request with the errno that is its block number."""

    def read(self, offset, buffer):
        if offset and offset % 4096 == 0 and 1 < offset // 4096 < 134 and len(buffer) == 4096:
            raise OSError(offset // 4096, "as asked")

    write = read


class AsyncErrors(Errors):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        Errors.read(self, offset, buffer)

    write = read


@kernel
@pytest.mark.parametrize("make", [Errors, AsyncErrors])
def test_an_oserror_reaches_the_client_as_its_errno(make, capfd):
    with ublk.Device(make()) as disk, opened(disk.path) as fd:
        for number in KEPT:
            assert error_of(read_at, fd, 4096 * number, 4096) == number
            assert error_of(write_at, fd, 4096 * number, bytes(4096)) == number
        for number in (errno.EIO, errno.ENXIO, errno.ENOENT, errno.EPIPE):
            assert error_of(read_at, fd, 4096 * number, 4096) == errno.EIO
    assert "Traceback" not in capfd.readouterr().err


@kernel
@pytest.mark.parametrize("data_path", [None, *ublk.DATA_PATHS])
def test_what_a_handler_did_not_fill_shows_no_other_request(data_path):
    class Half(Ram):
        def read(self, offset, buffer):
            if offset >= 65536:
                buffer[:len(buffer) // 2] = b"h" * (len(buffer) // 2)

    device = ublk.Device(Half(), depth=1, data_path=data_path)      # one tag: its buffer is used again
    flags = ublk.DATA_PATHS[data_path or "copy"].features
    with ublk.Control() as control:
        if flags & ~(control.features or ublk.UBLK_F_NEED_GET_DATA):
            pytest.skip(f"{data_path} needs a newer kernel")
    if flags & (ublk.UBLK_F_SUPPORT_ZERO_COPY | ublk.UBLK_F_AUTO_BUF_REG):
        pytest.skip(f"with {data_path} a target fills no buffers")
    with device as disk, opened(disk.path) as fd:
        for size in (4096, 65536):
            write_at(fd, 0, b"secret! " * (65536 // 8))
            assert read_at(fd, 65536, size) == b"h" * (size // 2) + bytes(size // 2)


class Short(Ram):
    """Move at most 1000 bytes at a time."""

    def read(self, offset, buffer):
        count = min(len(buffer), 1000)
        buffer[:count] = self.data[offset:offset + count]
        return count

    def write(self, offset, buffer):
        count = min(len(buffer), 1000)
        self.data[offset:offset + count] = buffer[:count]
        return count


class AsyncShort(Short):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        return Short.read(self, offset, buffer)

    async def write(self, offset, buffer):
        await ublk.uring_sleep(0)
        return Short.write(self, offset, buffer)


@kernel
@pytest.mark.parametrize("make", [Short, AsyncShort])
def test_short_transfers_are_continued(make):
    data = os.urandom(256 << 10)
    with ublk.Device(make()) as disk, opened(disk.path) as fd:
        assert write_at(fd, 4096, data) == len(data)
        assert disk.target.data[4096:4096 + len(data)] == data
        assert read_at(fd, 4096, len(data)) == data


@kernel
@pytest.mark.parametrize("outcome", [0, -1, -5, 4097, 1 << 40, "text", b"", 1.5, [], True],
                         ids=lambda outcome: repr(outcome))
def test_a_nonsensical_result_is_an_io_error(outcome):
    class Nonsense(Ram):
        def read(self, offset, buffer):
            return outcome if offset == 8192 else None

        def write(self, offset, buffer):
            return outcome if offset == 8192 else None

    with ublk.Device(Nonsense()) as disk, opened(disk.path) as fd:
        assert error_of(read_at, fd, 8192, 4096) == (0 if outcome is True else errno.EIO)
        assert error_of(write_at, fd, 8192, bytes(4096)) == (0 if outcome is True else errno.EIO)
        assert read_at(fd, 0, 4096) == bytes(4096)


@kernel
def test_buffers_are_what_the_documentation_says():
    seen = {}

    class Looks(Ram):
        def read(self, offset, buffer):
            seen["read", offset] = type(buffer), buffer.readonly, buffer.nbytes, not any(buffer)

        def write(self, offset, buffer):
            seen["write", offset] = type(buffer), buffer.readonly, buffer.nbytes, set(buffer) == set(b"w")

    with ublk.Device(Looks(), depth=1) as disk, opened(disk.path) as fd:
        write_at(fd, 12288, b"w" * 8192)
        read_at(fd, 12288, 8192)            # where nobody looks who looks for partitions or file systems
    assert seen["read", 12288] == (memoryview, False, 8192, True)
    assert seen["write", 12288] == (memoryview, True, 8192, True)


@kernel
def test_a_handler_that_keeps_its_buffers_does_not_hold_the_device():
    kept = []

    class Keeps(Ram):
        def read(self, offset, buffer):
            kept.append(buffer)

        def write(self, offset, buffer):
            kept.append(buffer[:10])

    with ublk.Device(Keeps()) as disk, opened(disk.path) as fd:
        read_at(fd, 0, 4096)
        write_at(fd, 0, bytes(4096))
    assert devices_left() == [] and bytes(kept[-1]) is not None


@kernel
def test_coroutines_of_one_queue_run_side_by_side():
    class Meets(AsyncRam):
        """Answer no write before four have come."""

        def __init__(self):
            super().__init__()
            self.event, self.count = ublk.Event(), 0

        async def write(self, offset, buffer):
            self.count += 1
            if self.count == 4:
                self.event.set()
            await self.event

    with ublk.Device(Meets(), depth=8) as disk, opened(disk.path) as fd:
        clients = [threading.Thread(target=write_at, args=(fd, 65536 * number, bytes(4096)))
                   for number in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        assert disk.target.count == 4


@kernel
def test_every_queue_starts_its_target_before_it_serves():
    order = []

    class Starts(Ram):
        def start(self, index):
            order.append(("start", index, threading.current_thread().name))

        def read(self, offset, buffer):
            order.append(("read",))

        def close(self):
            order.append(("close",))

    with ublk.Device(Starts(), queues=2) as disk, opened(disk.path) as fd:
        read_at(fd, 0, 4096)
    count = disk.info.nr_hw_queues
    starts = [step[1:] for step in order[:count]]
    assert sorted(starts) == [(index, f"ublk{disk.id}q{index}") for index in range(count)]
    assert order[count] == ("read",) and order[-1] == ("close",) and order.count(("close",)) == 1


@kernel
@pytest.mark.parametrize("trouble", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError,
                                     RecursionError])
def test_whatever_a_handler_raises_no_client_waits_for_ever(trouble):
    class Raises(Ram):
        def read(self, offset, buffer):
            if offset == 8192:
                raise trouble()

    with ublk.Device(Raises()) as disk, opened(disk.path) as fd:
        assert error_of(read_at, fd, 8192, 4096) == errno.EIO


@kernel
@pytest.mark.parametrize("batch", [False, pytest.param(True, id="batch")])
def test_requests_alike_may_end_in_every_way(batch):
    """A tag's requests alike are served by what was made ready once: none may see how the last one ended."""
    class Moody(Ram):
        mood, kept = "all", []

        def move(self, offset, buffer):
            if self.mood == "error":
                raise OSError(errno.ENOSPC, "full")
            if self.mood == "half" and len(buffer) == 4096:
                return 1024
            if self.mood == "coroutine":
                return self.later(buffer)
            if self.mood == "released":
                buffer.release()
            if self.mood == "kept":
                self.kept.append(buffer)
            return None

        async def later(self, buffer):
            await ublk.Operation(ublk.IORING_OP_NOP)

        def read(self, offset, buffer):
            if self.mood != "nothing":
                buffer[:] = b"r" * len(buffer)
            return self.move(offset, buffer)

        def write(self, offset, buffer):
            assert buffer.readonly and bytes(buffer) == b"w" * len(buffer)
            return self.move(offset, buffer)

    if batch and not at_least("7.0"):
        pytest.skip("batches need Linux 7.0")
    with ublk.Device(Moody(), depth=2, batch=batch) as disk, opened(disk.path) as fd:
        for mood in ("all", "all", "nothing", "error", "all", "all", "half", "all", "coroutine", "all", "all",
                     "released", "all", "kept", "all", "nothing", "all", "error", "error", "nothing"):
            disk.target.mood = mood
            for move in (lambda: read_at(fd, 8192, 4096), lambda: write_at(fd, 8192, b"w" * 4096)):
                for _ in range(3):
                    if mood == "error":
                        assert error_of(move) == errno.ENOSPC
                    else:
                        assert move() in (4096, bytes(4096) if mood == "nothing" else b"r" * 4096)


@kernel
def test_a_queue_that_dies_ends_the_device(capfd):
    class Dies(Ram):
        def answer(self, queue, tags):
            raise RuntimeError("not again")

    device = ublk.Device(Dies())
    try:
        device.start()                              # up to 6.12 this needs requests answered
    except (OSError, RuntimeError):
        return
    done = sh("dd", f"if={device.path}", "of=/dev/null", "bs=4k", "count=1", check=False)
    # an I/O error, or the disk has gone already
    assert done.returncode == 1 or (done.stderr.startswith("0+0 records in") and not at_least("6.4"))
    assert device.wait(60) and isinstance(device.failure.__cause__, RuntimeError)
    device.stop()
    assert "RuntimeError: not again" in capfd.readouterr().err


# =================================================================================================
# Ends, good and bad
# =================================================================================================


def tasks():
    """Return the names of this process's tasks, without io_uring's workers: these come and go."""
    found = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):
            found.append(path.read_text())
    return [name for name in found if not name.startswith("iou-")]


def belongings():
    """Return what this process holds: descriptors, threads, children, mappings, rings and memory."""
    gc.collect()            # what refers to itself in a circle is not lost, only not yet found
    status = Path("/proc/self/status").read_text()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
            "tasks": len(tasks()), "children": len(children_of(os.getpid())),
            "rings": sum("io_uring" in line or "ublk" in line for line in maps), "mappings": len(maps),
            "kilobytes": int(re.search(r"VmRSS:\s+(\d+)", status)[1])}


def live_and_die(make, **options):
    """Create a disk, use it, delete it."""
    with ublk.Device(make(), **options) as disk, opened(disk.path) as fd:
        write_at(fd, 4096, b"u" * 4096)
        read_at(fd, 4096, 4096)


@kernel
@pytest.mark.parametrize("make, lives, options", [(Ram, 40, {"depth": 16}), (AsyncRam, 10, {"queues": 2}),
                                                  (ublk.Null, 10, {"queues": 2})])
def test_many_lives_leave_nothing_behind(make, lives, options):
    rounds, grown = 5, []
    for number in range(rounds + 1):
        before = belongings()
        for _ in range(lives if number else 10):        # the first use of a thing may keep something
            live_and_die(make, **options)
        after = belongings()
        if number:
            mappings = after.pop("mappings") - before.pop("mappings")
            grown.append((after.pop("kilobytes") - before.pop("kilobytes"), mappings))
            assert after == before
    # The allocator takes memory from the kernel in large steps, now and then; a leak would show each time.
    assert any(kilobytes <= lives and mappings <= 0 for kilobytes, mappings in grown), \
        f"KiB and mappings more after {lives} lives, and so on: {grown}"
    assert not any(Path(os.environ["UBLK_RUN_DIR"]).iterdir())


@kernel
def test_a_server_killed_under_load(run):
    needs("fio")
    with server("ram", "--size", "16M") as disk:
        load = subprocess.Popen(["fio", "--name=load", f"--filename={disk.path}", "--direct=1", "--rw=randrw",
                                 "--bs=4k", "--ioengine=libaio", "--iodepth=64", "--time_based",
                                 "--runtime=3600", "--thread"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/tmp", text=True)
        counters = Path(f"/sys/block/ublkb{disk.id}/stat")
        until(lambda: int(counters.read_text().split()[4]) > 50, "the load to run")
        disk.kill()
        disk.wait()
        text = load.communicate(timeout=120)[1]
        assert load.returncode != 0, text
        done = run("del", disk.id)
        assert (done.status, done.err) == (0, "")
        assert leftovers() == []


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
    done = cli(path, "--background", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and "ublk: " in done.stderr, done.stderr
    assert devices_left() == []


@kernel
def test_a_server_killed_on_its_way_into_the_background(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                open(os.environ["UBLK_RUN_DIR"] + "/started", "w").close()
                time.sleep(3600)
    """)
    process = subprocess.Popen([sys.executable, UBLK, path, "--background"], stderr=subprocess.PIPE,
                               text=True)
    until((Path(os.environ["UBLK_RUN_DIR"]) / "started").exists, "the server to start")
    child, = children_of(process.pid)
    os.kill(child, signal.SIGKILL)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert_error_line(text, errno.ECHILD, says="killed by signal 9")
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
    done = cli(path, check=False)
    assert (done.returncode, done.stdout) == (1, "") and says in done.stderr
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
            await ublk.Event()


@kernel
@pytest.mark.parametrize("make", [Stuck, AsyncStuck])
def test_a_handler_that_never_returns_does_not_keep_the_device(make, capfd):
    if make is Stuck and not at_least("6.7"):
        pytest.skip("before Linux 6.7 requests end only with the thread that has them")
    disk = ublk.Device(make())
    disk.start()
    client = subprocess.Popen(["dd", f"if={disk.path}", "of=/dev/null", "bs=4k", "count=1", "skip=16",
                               "iflag=direct"], stderr=subprocess.DEVNULL)
    assert disk.target.reached.wait(60)
    disk.stop(timeout=0.5)
    assert client.wait(60) == 1
    assert devices_left() == []
    disk.target.release.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("ublk")])
    text = capfd.readouterr().err
    assert "a handler does not return" in text and "Traceback" not in text


@kernel
def test_a_disk_whose_handler_does_not_return_is_listed(run):
    disk = ublk.Device(Stuck())
    disk.start()
    client = subprocess.Popen(["dd", f"if={disk.path}", "of=/dev/null", "bs=4k", "count=1", "skip=16",
                               "iflag=direct"], stderr=subprocess.DEVNULL)
    assert disk.target.reached.wait(60)
    stopping = threading.Thread(target=disk.stop)
    stopping.start()
    time.sleep(1)                       # STOP_DEV waits for the request now, and GET_PARAMS for STOP_DEV
    done = run("list", "--json")
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
            def read(self, offset, buffer):
                while offset == 65536:
                    time.sleep(1)
            def write(self, offset, buffer):
                pass
    """)
    with server(path) as disk:
        client = subprocess.Popen(["dd", f"if={disk.path}", "of=/dev/null", "bs=4k", "count=1", "skip=16",
                                   "iflag=direct", "status=none"], stderr=subprocess.DEVNULL)
        counters = Path(f"/sys/block/ublkb{disk.id}/inflight")
        until(lambda: counters.read_text().split()[0] != "0", "the read to arrive")
        disk.send_signal(signal.SIGINT)
        # before 6.7 the request ends with the server's process, and only then can the device go
        assert disk.wait(90) == (0 if at_least("6.7") else 1)
        assert client.wait(60) == 1
        if not at_least("6.7"):
            assert ublk.main(["del", str(disk.id)]) == 0
        assert devices_left() == []
    assert at_least("6.7") or f"`ublk.py del {disk.id}`" in disk.errors


@kernel
def test_who_holds_the_disk_is_named():
    device = ublk.Device(Ram())
    device.start()
    with open(device.path, "rb") as disk:
        holder = subprocess.Popen(["sleep", "3600"], stdin=disk)
    try:
        text = message(device.stop)
        assert_error_line(f"ublk: {text}\n", errno.EBUSY, says=f"held open by sleep (pid {holder.pid})")
    finally:
        holder.kill()
        holder.wait()
    until(lambda: devices_left() == [], "the device to go once nobody holds it")


@kernel
def test_where_the_disk_is_mounted_is_named(tmp_path):
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


# =================================================================================================
# Every command in a state it does not fit, on the real kernel
# =================================================================================================


class Situation:
    """Devices in every state, made when asked for and taken away at the end."""

    def __init__(self, control, stack):
        self.control, self.stack = control, stack

    def added(self, flags=0):
        """A device that was never started; returns its id."""
        flags &= self.control.features or ublk.RECOVERY_MODES["reissue"] | ublk.RECOVERY_MODES["fail"]
        dev_id = self.control.add_dev(-1, 1, 4, 65536, flags).dev_id
        self.stack.callback(self.control.del_dev, dev_id)
        return dev_id

    def live(self, target=None, **options):
        """A disk that is served; returns its id."""
        return self.stack.enter_context(ublk.Device(target or Ram(), depth=4, **options)).id

    def params(self, shift=9):
        """Parameters for it."""
        params = ublk.params_of(Ram(), 65536)
        params.basic.logical_bs_shift = shift
        params.basic.physical_bs_shift = max(shift, 12)
        return params

    def opened(self):
        """A disk somebody has open."""
        dev_id = self.live()
        fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY)
        self.stack.callback(os.close, fd)
        return dev_id

    def stopped(self):
        """A disk that was stopped by somebody else while its server keeps it open."""
        dev_id = self.live()
        self.control.stop_dev(dev_id)
        return dev_id

    def shared(self):
        """A device with one page of shared memory; returns its id and the page's address."""
        dev_id = self.added(ublk.UBLK_F_SHMEM_ZC)
        fd = os.memfd_create("shared")
        os.ftruncate(fd, ublk.PAGE_SIZE)
        memory = mmap.mmap(fd, ublk.PAGE_SIZE)
        os.close(fd)
        self.control.reg_buf(dev_id, ublk.address_of(memory), ublk.PAGE_SIZE)
        self.keep = memory
        return dev_id, ublk.address_of(memory), ublk.PAGE_SIZE

    def as_nobody(self, call):
        """Raise what call raises in a process of an ordinary user who may open the control node."""
        def attempt():
            with ublk.Control() as control:
                try:
                    return str(call(control))
                except ublk.UblkError as error:
                    return "\0".join(["", str(error.errno), error.what, error.reason, error.remedy])

        mode = stat.S_IMODE(os.stat("/dev/ublk-control").st_mode)
        os.chmod("/dev/ublk-control", 0o666)
        try:
            text = as_user(65534, attempt)
        finally:
            os.chmod("/dev/ublk-control", mode)
        if text.startswith("\0"):
            _, number, *words = text.split("\0")
            raise ublk.UblkError(int(number), *words)
        return text

    def of_nobody(self):
        """An unprivileged device; returns its id."""
        dev_id = int(self.as_nobody(lambda control: control.add_dev(
            -1, 1, 4, 65536, ublk.UBLK_F_UNPRIVILEGED_DEV).dev_id))
        self.control.get_dev_info(dev_id)
        self.stack.callback(self.control.del_dev, dev_id)
        return dev_id

    def stop_as_nobody(self, dev_id, mode=0o666):
        """Have an ordinary user stop a device."""
        os.chmod(f"/dev/ublkc{dev_id}", mode)
        self.as_nobody(lambda control: (control._unprivileged.add(dev_id) if mode == 0o600 else None,
                                        control.stop_dev(dev_id)))

    def without_node(self, call):
        """Call with the id of an unprivileged device whose node is not there."""
        dev_id = self.of_nobody()
        os.rename(f"/dev/ublkc{dev_id}", "/dev/hidden")
        try:
            call(dev_id)
        finally:
            os.rename("/dev/hidden", f"/dev/ublkc{dev_id}")

    def over_quota(self):
        """Ask for an unprivileged device where none is allowed."""
        limit = Path("/sys/module/ublk_drv/parameters/ublks_max")
        before = limit.read_text()
        limit.write_text("0")
        try:
            self.as_nobody(lambda control: control.add_dev(-1, 1, 4, 65536, ublk.UBLK_F_UNPRIVILEGED_DEV))
        finally:
            limit.write_text(before)


def named(name):
    """Return the command with this name, None for any."""
    return next((command for command in ublk.COMMANDS if command.name == name), None)


QUIESCABLE = ublk.UBLK_F_USER_RECOVERY | ublk.UBLK_F_QUIESCE

# command, errno, first kernel on which it can be provoked, how: from a Situation
PROVOCATIONS = [
    (None, errno.ENODEV, "6.0", lambda at: at.control.get_params(12345)),
    (None, errno.EPERM, "6.3", lambda at: at.stop_as_nobody(at.added())),
    (None, errno.EACCES, "6.3", lambda at: at.stop_as_nobody(at.of_nobody(), mode=0o600)),
    (None, errno.ENOENT, "6.3", lambda at: at.without_node(at.control.get_params)),
    ("ADD_DEV", errno.EEXIST, "6.0", lambda at: at.control.add_dev(at.added(), 1, 4, 65536, 0)),
    ("ADD_DEV", errno.EPERM, "6.3",
     lambda at: at.as_nobody(lambda control: control.add_dev(-1, 1, 4, 65536, 0))),
    ("ADD_DEV", errno.EACCES, "6.3", lambda at: at.over_quota()),
    ("ADD_DEV", errno.EINVAL, "6.12", lambda at: at.control.add_dev(-1, 1, 5000, 65536, 0)),
    ("SET_PARAMS", errno.EACCES, "6.0", lambda at: at.control.set_params(at.live(), at.params())),
    ("SET_PARAMS", errno.EINVAL, "6.0", lambda at: at.control.set_params(at.added(), at.params(shift=20))),
    ("START_DEV", errno.EEXIST, "6.0", lambda at: at.control.start_dev(at.live(), os.getpid())),
    ("START_DEV", errno.EBUSY, "7.3", lambda at: at.control.start_dev(at.stopped(), os.getpid())),
    ("START_DEV", errno.EINVAL, "6.0", lambda at: at.control.start_dev(at.added(), 0)),
    ("START_USER_RECOVERY", errno.EBUSY, "6.1",
     lambda at: at.control.start_user_recovery(at.live(recovery="requeue"))),
    ("START_USER_RECOVERY", errno.EINVAL, "6.1", lambda at: at.control.start_user_recovery(at.live())),
    ("END_USER_RECOVERY", errno.EBUSY, "6.1",
     lambda at: at.control.end_user_recovery(at.live(recovery="requeue"), os.getpid())),
    ("END_USER_RECOVERY", errno.EINVAL, "6.1",
     lambda at: at.control.end_user_recovery(at.live(), os.getpid())),
    ("UPDATE_SIZE", errno.ENODEV, "6.16", lambda at: at.control.update_size(at.added(), 1 << 20)),
    ("TRY_STOP_DEV", errno.EBUSY, "7.0", lambda at: at.control.try_stop_dev(at.opened())),
    ("TRY_STOP_DEV", errno.ENODEV, "7.0", lambda at: at.control.try_stop_dev(at.added())),
    ("QUIESCE_DEV", errno.EOPNOTSUPP, "6.16", lambda at: at.control.quiesce_dev(at.live(), 1)),
    ("QUIESCE_DEV", errno.ENODEV, "6.16", lambda at: at.control.quiesce_dev(at.added(QUIESCABLE), 1)),
    ("REG_BUF", errno.EEXIST, "7.1", lambda at: at.control.reg_buf(*at.shared())),
    ("REG_BUF", errno.EOPNOTSUPP, "7.1",
     lambda at: at.control.reg_buf(at.added(), ublk.PAGE_SIZE, ublk.PAGE_SIZE)),
    ("UNREG_BUF", errno.ENOENT, "7.1", lambda at: at.control.unreg_buf(at.shared()[0], 77)),
]
# Explanations no test can provoke, and why.
UNPROVOKED = {
    (None, errno.EINTR): "only a cancellation by somebody else's means ends a command so",
    (named("QUIESCE_DEV"), errno.EBUSY): "up to Linux 7.3 the driver's wait for an idle tag never waits",
}


@pytest.fixture
def situation(control):
    """Devices in every state."""
    with ExitStack() as stack:
        yield Situation(control, stack)


def test_every_explanation_is_provoked_or_excused():
    keys = [(named(name), number) for name, number, _, _ in PROVOCATIONS]
    assert sorted([*keys, *UNPROVOKED], key=str) == sorted(ublk.EXPLANATIONS, key=str)


@kernel
@pytest.mark.parametrize("name, number, since, provoke", PROVOCATIONS,
                         ids=[f"{row[0]}-{errno.errorcode[row[1]]}" for row in PROVOCATIONS])
def test_the_wrong_state_is_explained(situation, name, number, since, provoke):
    if not at_least(since):
        pytest.skip(f"cannot be provoked before Linux {since}")
    with pytest.raises(ublk.UblkError) as found:
        provoke(situation)
    reason, remedy = ublk.EXPLANATIONS[named(name), number]
    assert (found.value.errno, found.value.reason, found.value.remedy) == (number, reason, remedy)
    assert_error_line(f"ublk: {found.value}\n", number)


COMMANDS_ON_A_DEVICE = {
    "DEL_DEV_ASYNC": lambda control, dev_id: control.del_dev_async(dev_id),
    "UPDATE_SIZE": lambda control, dev_id: control.update_size(dev_id, 1 << 20),
    "QUIESCE_DEV": lambda control, dev_id: control.quiesce_dev(dev_id, 1),
    "TRY_STOP_DEV": lambda control, dev_id: control.try_stop_dev(dev_id),
    "REG_BUF": lambda control, dev_id: control.reg_buf(dev_id, ublk.PAGE_SIZE, ublk.PAGE_SIZE),
    "UNREG_BUF": lambda control, dev_id: control.unreg_buf(dev_id, 0),
}


@kernel
@pytest.mark.parametrize("name", COMMANDS_ON_A_DEVICE)
def test_a_command_this_kernel_lacks_names_the_one_that_has_it(situation, name):
    if at_least(named(name).since):
        pytest.skip(f"this kernel has {name}")
    text = message(COMMANDS_ON_A_DEVICE[name], situation.control, situation.added())
    assert f"Linux {named(name).since}" in text


@kernel
def test_a_flag_this_kernel_lacks_is_an_error(control):
    lacking = [feature for feature in ublk.FEATURES if not at_least(feature.since)]
    if ublk.UBLK_F_USER_RECOVERY_FAIL_IO in lacking:
        assert "needs Linux 6.13" in message(ublk.Device(Ram(), recovery="fail").start)
    if ublk.UBLK_F_BATCH_IO in lacking:
        assert "needs Linux 7.0" in message(ublk.Device(Ram(), batch=True).start)
    if not lacking:
        with ublk.Device(Ram(), partition_scan=False, recovery="fail") as disk:
            assert {"NO_AUTO_PART_SCAN", "USER_RECOVERY_FAIL_IO"} <= set(ublk.flag_names(disk.info.flags))


@kernel
def test_what_the_kernel_clamps_is_reported(control):
    info = control.add_dev(-1, 1, 4, 65536 + 100, 0)
    try:
        assert info.max_io_buf_bytes == 65536 and info.queue_depth == 4
        assert control.get_dev_info(info.dev_id).dev_id == info.dev_id
        assert control.get_queue_affinity(info.dev_id, 0)
        with pytest.raises(ublk.UblkError):
            control.get_queue_affinity(info.dev_id, 7)
    finally:
        control.del_dev(info.dev_id)


@kernel
def test_a_command_that_does_not_end_is_cancelled(situation):
    dev_id = situation.added()
    situation.control.set_params(dev_id, situation.params())
    with pytest.raises(ublk.UblkError) as found:
        situation.control.start_dev(dev_id, os.getpid(), timeout=0.2)       # nobody fetches its tags
    assert found.value.errno == errno.ETIMEDOUT
    assert situation.control.get_dev_info(dev_id).state == ublk.UBLK_S_DEV_DEAD


# =================================================================================================
# Traps of the kernel that must stay out of reach
# =================================================================================================


@kernel
def test_a_device_that_was_stopped_before_its_start_is_not_started(capfd):
    class Hasty(ublk.Device):
        """Somebody stops the device between FETCH and START_DEV."""

        def _serve(self):
            super()._serve()
            with ublk.Control() as control:
                control.stop_dev(self.id)
            assert self.wait(60)

    text = message(Hasty(Ram()).start)
    assert text and devices_left() == []


def with_partition(size=8 << 20):
    """Make a disk in memory with one partition, at sector 2048."""
    target = Ram(size)
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    target.data[446:462], target.data[510:512] = entry, b"\x55\xaa"
    return target


@kernel
@pytest.mark.parametrize("recovery", [None, "reissue"])
def test_the_partition_table_is_read_while_the_disk_starts(recovery):
    target = with_partition()
    with ublk.Device(target, depth=1, recovery=recovery) as disk:
        until(lambda: os.path.exists(f"{disk.path}p1"), "the partition")
        with opened(f"{disk.path}p1") as fd:
            write_at(fd, 0, b"p" * 4096)
    assert target.data[2048 * 512:2048 * 512 + 4096] == b"p" * 4096


# =================================================================================================
# Servers that die: helpers
# =================================================================================================

ROUNDS = 5                          # so often a server is killed in one test


class Forked:
    """ublk.py's command line in a forked process: it starts ten times faster than a new Python.

    change is called in the process first. pid, path and id are those of the server and its disk.
    """

    def __init__(self, *words, change=None):
        self.output, self.errors = tempfile.TemporaryFile("a+b"), tempfile.TemporaryFile("a+b")
        self.path, self.id, self.status = "", -1, None
        ublk.companion()            # which the user that change() may make of it might not be able to read
        self.pid = os.fork()
        if self.pid == 0:
            self._child([str(word) for word in words], change)

    def _child(self, words, change):
        status = 70
        try:
            os.setsid()
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.errors.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
            if change:
                change()
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
            pid, status = os.waitpid(self.pid, os.WNOHANG)
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
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        if not self.ended():
            self.kill(signal.SIGTERM)
        for pid in session(self.pid):                       # what a killed parent left behind
            os.kill(pid, signal.SIGKILL)


def started_by(parent):
    """Return the processes a process has started."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
        except OSError:
            continue
        found += [int(pid)] if fields[1] == str(parent) else []
    return sorted(found)


def session(leader):
    """Return the processes of a session that are more than zombies."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            found += [pid] if os.getsid(pid) == leader and ublk.alive(pid) else []
        except OSError:
            pass
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
        try:
            text = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        if text.rpartition(") ")[2][0] == "D":
            found.append(text.partition(")")[0])
    return found


def completed(disk):
    """Return how many requests the disk has completed."""
    words = Path(f"/sys/block/{os.path.basename(disk.path)}/stat").read_text().split()
    return int(words[0]) + int(words[4])


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


@pytest.fixture
def backing():
    """A file of 64 MiB for the target loop, on the lab's ext4 where there is one."""
    directory = tempfile.mkdtemp(dir="/scratch" if IN_LAB else None)
    path = Path(directory, "disk.img")
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    yield path
    shutil.rmtree(directory)


# =================================================================================================
# A server is killed, again and again
# =================================================================================================


def needs_fail_io(*words):
    """Where the mode `fail` is missing, see that the error names the kernel that has it."""
    if at_least("6.13"):
        return False
    disk = Forked(*words)
    assert disk.wait() == 1
    assert_error_line(disk.said(), errno.EOPNOTSUPP, says="needs Linux 6.13, this is")
    return True


@kernel
def test_reissue_loses_nothing(backing):
    disk = Forked("loop", backing, "-r", "reissue").live()
    with Fio(disk) as fio:
        for _ in range(ROUNDS):
            fio.busy()
            disk.kill()
            disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_requeue_fails_only_what_was_in_flight(backing):
    disk = Forked("loop", backing, "-r", "requeue").live()
    with Fio(disk, *CONTINUE) as fio:
        for _ in range(ROUNDS):
            fio.busy()
            disk.kill()
            disk = recovered(disk)
        fio.busy()
        fio.finish()
        assert fio.errors <= 16 * ROUNDS            # its depth
        fio.busy()
        assert fio.finish() == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_fail_answers_at_once_and_is_whole_after_recovery(backing):
    if needs_fail_io("loop", backing, "-r", "fail"):
        return
    disk = Forked("loop", backing, "-r", "fail").live()
    with Fio(disk, *CONTINUE) as fio:
        for _ in range(ROUNDS):
            fio.busy()
            disk.kill()
            await_state(disk.id, "FAIL_IO")
            with opened(disk.path) as fd:
                assert error_of(write_at, fd, 0, bytes(4096)) in (errno.EIO, errno.EREMOTEIO)
            fio.finish()
            disk = recovered(disk)
        assert fio.errors > 0
        fio.busy()
        assert fio.finish() == 0
    assert disk.kill(signal.SIGTERM) == 0


class Files:
    """A process that writes files and syncs each, and tells which are on the disk for good."""

    CODE = """
import hashlib, os, sys
directory, journal = sys.argv[1:]
journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
number = 0
while not os.path.exists(directory + "/stop"):
    data = os.urandom(4096 + number * 1237 % 60000)
    name = f"{directory}/{number}"
    if number >= 150:
        os.unlink(f"{directory}/{number - 150}")
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.write(journal, f"{name} {hashlib.md5(data).hexdigest()}\\n".encode())
    number += 1
"""

    def __init__(self, directory, journal):
        self.directory, self.journal = directory, journal
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE, directory, journal],
                                        stderr=subprocess.PIPE, text=True)

    def synced(self):
        """Return (name, digest) of the files written for good; only the last 150 are still there."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line.split() for line in lines]

    def busy(self):
        """Wait until another two files are written."""
        before = len(self.synced())
        until(lambda: self.process.poll() is not None or len(self.synced()) > before + 1, "two files")
        assert self.process.poll() is None, self.process.communicate()[1]

    def finish(self):
        """End the process, without a single error."""
        Path(self.directory, "stop").write_text("")
        assert self.process.communicate(timeout=60)[1] == "" and self.process.returncode == 0

    def check(self):
        """Read all files back."""
        for name, digest in self.synced()[-150:]:
            assert hashlib.md5(Path(name).read_bytes()).hexdigest() == digest, name


@contextmanager
def file_system(disk, directory):
    """Make an ext4 on a disk, mount it, and see afterwards that it can be unmounted and is sound."""
    needs("mkfs.ext4", "e2fsck", "mount")
    sh("mkfs.ext4", "-Fq", "-E", "nodiscard,lazy_itable_init=0", disk.path, "32M")
    directory.mkdir()
    sh("mount", disk.path, directory)
    try:
        yield
    except BaseException:
        sh("umount", "-l", directory, check=False)
        raise
    sh("umount", directory)
    sh("e2fsck", "-fn", disk.path)


def churn(directory, files, once, rounds=ROUNDS):
    """Do something to a disk again and again while files are written to it."""
    for _ in range(rounds):
        files.busy()
        once()
    files.busy()
    files.finish()
    mount, = (line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {directory} " in line)
    assert mount.split()[3].startswith("rw")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    files.check()


@kernel
def test_a_mounted_file_system_survives(backing, tmp_path):
    disk = Forked("loop", backing, "-r", "reissue").live()

    def once():
        nonlocal disk
        disk.kill()
        disk = recovered(disk)
    with file_system(disk, tmp_path / "mnt"):
        files = Files(tmp_path / "mnt", tmp_path / "journal")
        churn(tmp_path / "mnt", files, once)
    assert len(files.synced()) > 2 * ROUNDS
    assert disk.kill(signal.SIGTERM) == 0


TARGET = """
    VERSION = b"old"

    class Mine(ublk.Target):
        def __init__(self, path):
            self.fd = os.open(path, os.O_RDWR)
            self.size = os.fstat(self.fd).st_size
        def read(self, offset, buffer):
            if offset >= self.size - 4096:
                buffer[:3] = VERSION                # the end of the disk tells what serves it
            else:
                assert os.preadv(self.fd, [buffer], offset) == len(buffer)
        def write(self, offset, buffer):
            assert os.pwrite(self.fd, buffer, offset) == len(buffer)
        def flush(self):
            os.fdatasync(self.fd)
        def close(self):
            os.close(self.fd)
"""


@kernel
def test_an_edited_target_serves_with_the_file_system_mounted(backing, tmp_path, run):
    path = target_file(tmp_path, TARGET)
    disk = Forked(f"{path}:Mine", backing, "-r", "reissue").live()
    versions = iter([b"new", b"3rd"])

    def once():
        nonlocal disk
        version = next(versions)
        target_file(tmp_path, TARGET.replace("old", version.decode()))
        if at_least("6.16"):
            assert run("quiesce", disk.id).status == 0 and disk.wait() == 0
        else:
            disk.kill()
        disk = recovered(disk)
        with opened(disk.path, os.O_RDONLY) as fd:
            assert read_at(fd, (64 << 20) - 4096, 4096)[:3] == version
    with file_system(disk, tmp_path / "mnt"):
        churn(tmp_path / "mnt", Files(tmp_path / "mnt", tmp_path / "journal"), once, rounds=2)
    assert disk.kill(signal.SIGTERM) == 0


# =================================================================================================
# A server is exchanged, or started again by itself
# =================================================================================================


@kernel
@pytest.mark.parametrize("words", [["--copy"], []], ids=["copy", "fastest"])
def test_quiesce_and_recover_without_an_error(backing, run, words):
    disk = Forked("loop", backing, "-r", "reissue", *words).live()
    if not at_least("6.16"):
        assert_fails(run("quiesce", disk.id), 1, "needs Linux 6.16, this is", errno.EOPNOTSUPP)
        assert disk.kill(signal.SIGTERM) == 0
        return
    with ublk.Control() as control:
        assert bool(control.get_dev_info(disk.id).flags & ublk.UBLK_F_AUTO_BUF_REG) == (not words)
    with Fio(disk) as fio:
        for _ in range(ROUNDS):
            fio.busy()
            done = run("quiesce", disk.id)
            assert (done.status, done.err) == (0, "")
            assert disk.wait() == 0 and disk.said() == ""
            assert state_of(disk.id) == "QUIESCED"
            disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_restart_keeps_the_server_alive(backing, run):
    with Forked("loop", backing, "--restart") as disk, Fio(disk) as fio:
        pids = set()
        for _ in range(ROUNDS):
            fio.busy()
            row, = json.loads(run("list", "--json").out)
            assert row["pid"] not in pids and row["pid"] in started_by(disk.pid)
            pids.add(row["pid"])
            os.kill(row["pid"], signal.SIGKILL)
        fio.busy()
        fio.finish()
        assert fio.errors == 0
        assert disk.said().count("died (wait status 9), starting another") == ROUNDS
        assert disk.kill(signal.SIGTERM) == 0
        assert devices_left() == []


@kernel
def test_restart_gives_up_in_the_end(backing, run):
    def change():
        ublk.RESTARTS = 2
        replace(ublk.Device, resume=lambda self: die())
    disk = Forked("loop", backing, "--restart", change=change).live()
    os.kill(server_of(disk), signal.SIGKILL)
    assert disk.wait() == 1
    assert_error_line(disk.said().splitlines(True)[-1], errno.ECHILD, says="died: too often")
    with Forked("recover", disk.id):
        pass


@kernel
def test_restart_ends_by_a_signal_while_it_waits(backing):
    def change():
        replace(ublk.Device, resume=lambda self: die())
    disk = Forked("loop", backing, "--restart", change=change).live()
    os.kill(server_of(disk), signal.SIGKILL)
    until(lambda: disk.said().count("starting another") >= 4, "the long pauses")
    assert disk.kill(signal.SIGTERM) == 0
    assert devices_left() == []


@kernel
@pytest.mark.parametrize("verb", ["recover", "--restart"])
def test_a_signal_ends_a_server_that_recovers(backing, verb):
    def change():
        def wait(self, what):
            print("RECOVERING", file=sys.stderr)
            time.sleep(60)
        replace(ublk.Device, _await_end_of_server=wait)
    if verb == "recover":
        disk = Forked("recover", orphan("loop", backing, "-r", "requeue").id, change=change)
    else:
        disk = Forked("loop", backing, "--restart", change=change).live()
        os.kill(server_of(disk), signal.SIGKILL)
    until(lambda: "RECOVERING" in disk.said())
    status = disk.kill(signal.SIGTERM)
    assert_error_line(disk.said().splitlines(True)[-1], errno.EINTR, says="ended by SIGTERM before")
    if verb == "recover":               # the disk is not this server's to delete
        assert status == 1 and state_of(0) == "QUIESCED"
        assert ublk.main(["del", "0"]) == 0
    assert devices_left() == []


@kernel
def test_a_signal_while_a_device_is_added_leaves_none(tmp_path):
    for round in range(20):
        def change(round=round):
            def submit(self, opcode, *args, submit=ublk.Control._submit, **options):
                if options.get("off") in (ublk.UBLK_CMD_ADD_DEV, ublk.UBLK_CMD_ADD_DEV.encoded):
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 * (round + 1))
                return submit(self, opcode, *args, **options)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            replace(ublk.Control, _submit=submit)
        Forked("null", change=change).wait()
        assert devices_left() == []


@kernel
@pytest.mark.parametrize("number, options", [(signal.SIGINT, []), (signal.SIGTERM, ["-r", "reissue"])])
def test_who_waits_for_a_server_takes_it_along(tmp_path, number, options):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                open(os.environ["UBLK_RUN_DIR"] + "/started", "w").close()
                time.sleep(1)
    """)
    waiting = Forked(path, "--background", *options)
    until(Path(os.environ["UBLK_RUN_DIR"], "started").exists)
    assert waiting.kill(number) == 1
    assert_error_line(waiting.said(), errno.EINTR, says=f"ended by {number.name} before the disk was there")
    assert devices_left() == []


@kernel
def test_a_signal_to_all_processes_of_a_disk_loses_nothing(backing):
    disk = Forked("loop", backing, "-q", 2).live()
    data = os.urandom(4 << 20)
    with open(disk.path, "r+b", buffering=0) as file:
        file.write(data)                # to the page cache, which is written out when the disk is stopped
    os.killpg(disk.pid, signal.SIGTERM)
    assert disk.wait() == 0 and disk.said() == ""
    with open(backing, "rb") as file:
        assert file.read(len(data)) == data


@kernel
def test_what_a_target_prints_is_not_on_standard_output(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self, size):
                print("made")
                self.size = size
            def start(self, index):
                print("started")
            def read(self, offset, buffer):
                print("read")
            def write_zeroes(self, offset, length):
                print("zeroed", offset, length)
    """)
    with Forked(path, "--size", "1M") as disk:
        sh("blkdiscard", "-fz", "-o", 4096, "-l", 8192, disk.path)
        assert disk.said(disk.output) == f"{disk.path}\n"
    for word in ("made", "started", "read", "zeroed 4096 8192"):
        assert f"{word}\n" in disk.said()


@kernel
def test_restart_does_not_try_again_what_never_worked(backing):
    disk = Forked("loop", backing, "--restart", change=after(ublk.Control, "set_params"))
    assert disk.wait() == 1
    assert_error_line(disk.said(), errno.ECHILD, says="died before the disk was there")
    assert devices_left() == []


def server_of(disk):
    """Return the process that serves a disk."""
    with ublk.Control() as control:
        return control.get_dev_info(disk.id).ublksrv_pid


# =================================================================================================
# A server is killed at every step of its life
# =================================================================================================


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


def half_fetched(then=die):
    """Return a change that has queues fetch one half of their tags."""
    def fetch(queue):
        half, path = range(queue.depth // 2), queue.path
        for tag in half:
            queue.command(tag, tag, ublk.UBLK_U_IO_FETCH_REQ, path.address(tag), path.sqe_address(tag))
        queue.ring.push_all(half)
        queue.ring.enter()
        then()
    return lambda: replace(ublk.Queue, fetch=fetch)


def during(name):
    """Return a change that has the process die while a command waits for the tags not fetched."""
    method = getattr(ublk.Control, name)

    def dying(self, dev_id, pid, abort):
        calls = iter([False])               # the first look is before the command goes to the kernel
        method(self, dev_id, pid, abort=lambda: next(calls, True) and die())

    def change():
        half_fetched(bool)()
        setattr(ublk.Control, name, dying)
    return change


def first_request():
    """Have the server die of the first request: that is the partition scan or udev."""
    import ublk_targets
    replace(ublk_targets.Loop, map=lambda *_: die(), read=lambda *_: die())


def assert_nothing_stuck():
    """See that nothing stays in uninterruptible sleep."""
    until(lambda: not stuck(), "D state to end")


MAPPED, HALF_FETCHED, FETCHED = after(ublk.Queue, "__init__"), half_fetched(), after(ublk.Queue, "fetch")
DURING_START, DURING_END = during("start_dev"), during("end_user_recovery")


def half_a_server(change):
    """Tell whether a server dies with half of its tags fetched, which takes a change like these."""
    if change in (HALF_FETCHED, FETCHED, DURING_START, DURING_END) and not at_least("6.7"):
        pytest.skip("before 6.7 the driver looks for dead servers from START_DEV on: one that dies between "
                    "FETCH and START_DEV never ends, nor does its device")
    return change in (MAPPED, HALF_FETCHED, DURING_START, DURING_END)


@kernel
@pytest.mark.parametrize("recovery", [[], ["-r", "reissue"]], ids=["lost", "reissue"])
@pytest.mark.parametrize("change", [
    after(ublk.Control, "add_dev"), after(ublk.Control, "set_params"), MAPPED, HALF_FETCHED,
    FETCHED, DURING_START, first_request, after(ublk.Control, "start_dev")],
    ids=["ADD", "SET_PARAMS", "mapped", "half-fetched", "fetched", "START", "scan", "started"])
def test_killed_while_it_starts(change, recovery, backing, run):
    half_a_server(change)
    disk = Forked("loop", backing, *recovery, change=change)
    assert disk.wait() == -signal.SIGKILL
    row, = json.loads(run("list", "--json").out)
    assert row["id"] == 0 and row["pid"] == -1
    done = run("del", 0)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []
    assert_nothing_stuck()


@kernel
@pytest.mark.parametrize("change", [
    after(ublk.Control, "start_user_recovery"), MAPPED, HALF_FETCHED, FETCHED, DURING_END,
    after(ublk.Control, "end_user_recovery")],
    ids=["START_USER_RECOVERY", "mapped", "half-fetched", "fetched", "END_USER_RECOVERY", "recovered"])
def test_killed_while_it_recovers(change, backing, run):
    half = half_a_server(change)
    disk = Forked("loop", backing, "-r", "reissue").live()
    with opened(disk.path) as fd:
        write_at(fd, 4096, b"before" * 4096)
    disk.kill()
    dying = Forked("recover", disk.id, change=change)
    assert dying.wait() == -signal.SIGKILL, dying.said()
    again = Forked("recover", disk.id)
    if half and not at_least("6.16"):       # these kernels hold on to half a server
        assert again.wait() == 1
        assert_error_line(again.said(), errno.EBUSY, says=f"delete the device: `ublk.py del {disk.id}`")
        done = run("del", disk.id)
        assert (done.status, done.out, done.err) == (0, "", "")
    else:
        again.live()
        with opened(again.path) as fd:
            assert read_at(fd, 4096, 4096) == (b"before" * 4096)[:4096]
        assert again.kill(signal.SIGTERM) == 0
    assert devices_left() == []
    assert_nothing_stuck()


# =================================================================================================
# Disks of ordinary users
# =================================================================================================

LIBC = ctypes.CDLL(None, use_errno=True)
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


def program(uid):
    """Return what runs a program as an ordinary user; see subprocess."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("UBLK_RUN_DIR", "XDG_RUNTIME_DIR")}
    return {"user": uid, "group": uid, "extra_groups": [], "env": environment, "cwd": "/"}


def verb(*words, change=None):
    """Run a command to its end; return its status and what it said."""
    done = Forked(*words, change=change)
    return SimpleNamespace(status=done.wait(), out=done.said(done.output), err=done.said())


def verb_of(uid, *given):
    """The same as an ordinary user."""
    return verb(*given, change=become(uid))


def in_name_of(uid, function, *args):
    """Call a function as an ordinary user; return what it returns, through JSON."""
    def call():
        become(uid)()
        return json.dumps(function(*args))
    return json.loads(as_user(os.getuid(), call))


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


@pytest.fixture
def rules(run):
    """Install the udev rules for ordinary users, as `check` says."""
    path = Path("/run/udev/rules.d/60-ublk.rules")

    def apply():
        sh("udevadm", "control", "--reload")
        sh("udevadm", "trigger", "--settle", "--name-match=/dev/ublk-control")
    path.parent.mkdir(exist_ok=True)
    path.write_text(run("udev-rules").out)
    apply()
    assert os.stat("/dev/ublk-control").st_mode & 0o777 == 0o666
    yield
    path.unlink()
    apply()
    os.chmod("/dev/ublk-control", 0o600)
    for uid in (ALICE, BOB):
        shutil.rmtree(f"/tmp/ublk-{uid}", ignore_errors=True)


def no_unprivileged(uid=ALICE):
    """Before Linux 6.3 see that the error says so."""
    if at_least("6.3"):
        return False
    done = verb_of(uid, "ram", "--size", "4M")
    assert done.status == 1
    assert_error_line(done.err.splitlines(True)[-1], errno.EOPNOTSUPP, says="needs Linux 6.3, this is")
    return True


@pytest.fixture
def readable():
    """A copy of ublk.py, with its companion, that every user may read."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        for name in ("ublk.py", "ublk_targets.py"):
            os.chmod(shutil.copy(HERE / name, directory), 0o644)
        yield Path(directory, "ublk.py")


@kernel
def test_an_ordinary_user_owns_a_disk(rules, readable):
    needs("mkfs.ext4", "fio")
    if no_unprivileged():
        return
    alice = program(ALICE)
    python = os.path.realpath(sys.executable)
    with server("ram", "--size", "256M", "-p", script=readable, executable=python, **alice) as disk:
        for path in (disk.path, f"/dev/ublkc{disk.id}"):
            assert (os.stat(path).st_uid, os.stat(path).st_gid) == (ALICE, ALICE)
        sh("mkfs.ext4", "-Fq", disk.path, **alice)
        sh("fio", "--name=x", f"--filename={disk.path}", "--direct=1", "--rw=randwrite", "--bs=4k",
           "--iodepth=16", "--ioengine=io_uring", "--size=2M", "--verify=crc32c", "--verify_fatal=1", **alice)
        row, = json.loads(verb_of(ALICE, "list", "--json").out)
        assert (row["state"], row["pid"]) == ("LIVE", disk.pid)
        assert (row["owner_uid"], row["owner_gid"]) == (ALICE, ALICE)
        assert row["target"] == "ram" and "UNPRIVILEGED_DEV" in row["flags"]
        done = verb_of(ALICE, "resize", disk.id, "512M")
        if at_least("6.16"):
            assert (done.status, done.err) == (0, "")
            assert int(Path(f"/sys/block/ublkb{disk.id}/size").read_text()) == 1 << 20
        else:
            assert_error_line(done.err, errno.EOPNOTSUPP, says="needs Linux 6.16, this is")
        done = verb_of(ALICE, "del", disk.id)
        assert (done.status, done.out, done.err) == (0, "", "")
        assert disk.wait(60) == 0 and devices_left() == []
    assert disk.errors.count("\n") == 1 and "30 seconds" in disk.errors and "no recovery" in disk.errors


@kernel
def test_nobody_else_commands_an_ordinary_users_disk(rules, control):
    if no_unprivileged():
        return
    with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
        node = f"/dev/ublkc{disk.id}"
        refused(in_name_of(BOB, every_command, disk.id, node), errno.EACCES)
        refused(in_name_of(BOB, every_command, disk.id, ""), errno.EACCES, errno.EPERM, errno.EINVAL)
        refused(in_name_of(BOB, every_command, disk.id, "/dev/null"), errno.EPERM)
        for line in ("list {0}", "stop {0}", "del {0}", "resize {0} 8M", "quiesce {0}", "recover {0}"):
            done = verb_of(BOB, *line.format(disk.id).split())
            assert_fails(done, 1, "", errno.EOPNOTSUPP if "needs Linux" in done.err else errno.EACCES)
        assert json.loads(verb_of(BOB, "list", "--json").out) == []
        assert in_name_of(BOB, error_of_opening, node) == [errno.EACCES] * 2
        assert in_name_of(BOB, error_of_opening, disk.path) == [errno.EACCES] * 2
        os.chmod(disk.path, 0o666)                  # even then the kernel gives it to its owner only
        assert in_name_of(BOB, error_of_opening, disk.path) == [errno.EPERM] * 2
        assert in_name_of(ALICE, error_of_opening, disk.path) == [0, 0]

        row, = json.loads(verb("list", "--json").out)          # and root is still root
        assert (row["state"], row["pid"], row["owner_uid"]) == ("LIVE", disk.pid, ALICE)
        if at_least("6.16"):
            control.get_dev_info(disk.id)
            control.update_size(disk.id, 8 << 20)
        assert verb("del", disk.id).status == 0
        assert disk.wait() == 0


@kernel
def test_an_ordinary_user_does_not_touch_roots_disk(rules):
    with Forked("null", "--size", "4M") as disk:
        if at_least("6.3"):
            refused(in_name_of(ALICE, every_command, disk.id, f"/dev/ublkc{disk.id}"), errno.EPERM)
        refused(in_name_of(ALICE, every_command, disk.id, ""), errno.EPERM, errno.EINVAL)
        for line in ("list {0}", "stop {0}", "del {0}", "resize {0} 8M", "quiesce {0}", "recover {0}"):
            done = verb_of(ALICE, *line.format(disk.id).split())
            assert_fails(done, 1, "", errno.EOPNOTSUPP if "needs Linux" in done.err else errno.EPERM)
        for node in (disk.path, f"/dev/ublkc{disk.id}"):
            assert in_name_of(ALICE, error_of_opening, node) == [errno.EACCES] * 2
        assert json.loads(verb_of(ALICE, "list", "--json").out) == []
        assert state_of(disk.id) == "LIVE"
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_what_an_ordinary_user_cannot_have_is_said(rules):
    for option, name in (("-r requeue", "USER_RECOVERY"), ("-r reissue", "USER_RECOVERY"),
                         ("-u", "USER_COPY"), ("-z", "ZERO_COPY"), ("--auto-zero-copy", "USER_COPY")):
        done = verb_of(ALICE, "ram", "--size", "4M", "-p", *option.split())
        assert done.status == 1
        line = done.err.splitlines(True)[-1]
        assert_error_line(line, errno.EINVAL, says="the kernel does not allow it together with")
        assert name in line and "UNPRIVILEGED_DEV" in line


@kernel
def test_root_cannot_have_an_unprivileged_disk(run):
    done = run("null", "-p")
    assert done.status == 1
    assert_error_line(done.err.splitlines(True)[-1], errno.EINVAL, says="this process has CAP_SYS_ADMIN")


def flags_granted(flags):
    """Return the flags of a device an ordinary user asks for, -1 if it is refused."""
    with ublk.Control() as control:
        try:
            info = control.add_dev(-1, 1, 1, 4096, flags)
        except OSError as error:
            assert error.errno == errno.EINVAL, error
            return -1
        ublk.await_node(f"/dev/ublkc{info.dev_id}", os.R_OK | os.W_OK)
        control.del_dev(info.dev_id)
        return info.flags


@kernel
def test_the_kernel_gives_ordinary_users_what_the_table_says(rules, control):
    if no_unprivileged():
        return
    unprivileged = ublk.UBLK_F_UNPRIVILEGED_DEV
    assert in_name_of(ALICE, flags_granted, unprivileged) & unprivileged
    excluded = [feature for feature in ublk.FEATURES
                if feature & unprivileged.excludes or feature.excludes & unprivileged]
    assert len(excluded) >= 4
    for feature in excluded:
        if at_least(feature.since):
            granted = in_name_of(ALICE, flags_granted, unprivileged | feature)
            assert granted == -1 or not granted & feature, feature.name


@kernel
def test_too_many_disks_of_ordinary_users(rules):
    if no_unprivileged():
        return
    limit = Path("/sys/module/ublk_drv/parameters/ublks_max")
    before = limit.read_text()
    limit.write_text("1")
    try:
        with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
            done = verb_of(BOB, "ram", "--size", "4M")
            assert done.status == 1
            assert_error_line(done.err.splitlines(True)[-1], errno.EACCES, says="ublks_max")
            assert disk.kill(signal.SIGTERM) == 0
    finally:
        limit.write_text(before)


@kernel
def test_check_tells_an_ordinary_user_what_is_missing(run):
    done = verb_of(ALICE, "check")
    assert done.status == 1 and "udev-rules > /etc/udev/rules.d/" in done.out
    done = verb_of(ALICE, "ram", "--size", "4M")
    assert_error_line(done.err.splitlines(True)[-1], errno.EACCES, says="see `ublk.py check`")


@kernel
def test_check_is_content_once_the_rules_are_there(rules):
    done = verb_of(ALICE, "check")
    assert (done.status, "missing" in done.out) == (0, False), done.out


@kernel
def test_udev_owner_of_any_argument(run):
    with Forked("null", "--size", "1M") as disk:
        for name in ("", "ublk", "ublkb", "ublkb0", "ublkc0", "ublkb0p1", "ublkb0;reboot", "ublkb0 0",
                     "ublkb-1", "ublkb²", "ublkb" + "9" * 5000, "ublkc1048576", "ublkc9", "../ublkb0",
                     "ublkd0", "sda", "%k", "$(id)", "ublkb0\nOWNER=1", "--help", "\udcff"):
            done = run("udev-owner", "--", name)
            assert done.status != 0 and done.out == "" and "Traceback" not in done.err, name
        assert disk.kill(signal.SIGTERM) == 0


# =================================================================================================
# Disks of containers
# =================================================================================================

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000


def system(function, *args):
    """Call a function of the C library; raise OSError where it fails."""
    plain = (os.fsencode(arg) if isinstance(arg, (str, Path)) else arg for arg in args)
    done = getattr(LIBC, function)(*plain)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{args}: {os.strerror(number)}")


class Container:
    """A user, mount and pid namespace of an ordinary user, with a /dev of its own.

    do() has a function called inside. give() is what a container manager does: it brings a device
    node in from outside.
    """

    def __init__(self, directory, uid):
        self.dev = directory / "dev"
        self.dev.mkdir(parents=True)
        system("mount", "tmpfs", self.dev, "tmpfs", 0, None)
        system("mount", None, self.dev, None, MS_SHARED, None)
        for node in ("null", "urandom", "ublk-control"):
            self.give(node)
        self.socket, inner = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.socket.close()
                self._enter(uid)
                self._serve(inner.makefile("rw"))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        inner.close()
        self.channel = self.socket.makefile("rw")

    def _enter(self, uid):
        become(uid)()
        system("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
            Path("/proc/self", name).write_text(text)
        child = os.fork()
        if child:
            LIBC.prctl(1, 0, 0, 0, 0)
            os.waitpid(child, 0)
            os._exit(0)
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)          # PR_SET_PDEATHSIG: all ends with the parent
        system("mount", "proc", "/proc", "proc", 0, None)
        system("mount", self.dev, "/dev", None, MS_BIND | MS_REC, None)
        system("mount", "tmpfs", "/run", "tmpfs", 0, None)

    def _serve(self, channel):
        for line in channel:
            name, args = json.loads(line)
            try:
                answer = globals()[name](*args)
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), file=channel, flush=True)

    def do(self, function, *args):
        """Call a function of this file inside; return what it returns, through JSON."""
        print(json.dumps([function.__name__, args]), file=self.channel, flush=True)
        return json.loads(self.channel.readline())

    def give(self, name):
        """Bring a device node in."""
        until(lambda: os.path.exists(f"/dev/{name}"), name)
        (self.dev / name).touch()
        system("mount", f"/dev/{name}", self.dev / name, None, MS_BIND, None)

    def close(self):
        """End all processes inside."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.socket.close()
        until(lambda: not sh("umount", "-R", self.dev, check=False).returncode, "the container's end")


INSIDE: list[Forked] = []                         # the server inside a container


def begin_inside(*words):
    """Start a server."""
    INSIDE.append(Forked(*words))
    return INSIDE[-1].pid


def live_inside():
    """Wait for its disk; return the path."""
    return INSIDE[-1].live().path


def end_inside():
    """End it; return its status and what it said."""
    return [INSIDE[-1].kill(signal.SIGTERM), INSIDE[-1].said()]


def verb_inside(*given):
    """Run a command to its end."""
    return vars(verb(*given))


def rows_inside():
    """Return what `list` shows."""
    return json.loads(verb("list", "--json").out)


def write_inside(path):
    """Write to a disk and read it back."""
    try:
        with opened(path) as fd:
            write_at(fd, 8192, b"inside.." * 512)
            return read_at(fd, 8192, 4096) == b"inside.." * 512
    except PermissionError as error:
        return f"{error}: {os.stat(path)}"


@pytest.fixture
def containers(rules):
    """Two containers of the same ordinary user: only their /dev tells them apart."""
    directory, made = Path(tempfile.mkdtemp()), []
    directory.chmod(0o755)
    try:
        for name in "ab":
            made.append(Container(directory / name, ALICE))
        yield made
    finally:
        for container in made:
            container.close()
        shutil.rmtree(directory)


def test_a_file_that_waits_for_its_node_is_not_taken_for_it(tmp_path, monkeypatch):
    path, tried = tmp_path / "ublkb0", []
    path.touch()                        # as in a container; then the node is mounted upon it

    def mount(_=0):
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def access(name, mode):
        tried.append(os.path.isfile(name))
        mount()
        return True
    monkeypatch.setattr(ublk.os, "access", access)
    monkeypatch.setattr(ublk.time, "sleep", mount)
    ublk.await_node(str(path), os.R_OK)
    assert tried == [False]             # what may be used was the node


@kernel
def test_a_container_controls_its_own_disks_only(containers, control):
    if not at_least("6.3"):
        done = containers[0].do(verb_inside, "ram", "--size", "4M")
        assert_error_line(done["err"].splitlines(True)[-1], errno.EOPNOTSUPP, says="needs Linux 6.3, this is")
        return
    pids = []
    for dev_id, container in enumerate(containers):
        pids.append(container.do(begin_inside, "ram", "--size", f"{4 + dev_id}M"))
        container.give(f"ublkc{dev_id}")            # the create waits for it
        container.give(f"ublkb{dev_id}")
        assert container.do(live_inside) == f"/dev/ublkb{dev_id}"
    for mine, container in enumerate(containers):
        other = 1 - mine
        row, = container.do(rows_inside)
        assert (row["id"], row["state"], row["size"]) == (mine, "LIVE", (4 + mine) << 20)
        assert row["pid"] == pids[mine] < 20            # a number of the container's own
        assert (row["owner_uid"], row["owner_gid"]) == (ALICE, ALICE)
        assert container.do(write_inside, f"/dev/ublkb{mine}") is True
        refused(container.do(every_command, other, f"/dev/ublkc{other}"), errno.ENOENT)
        refused(container.do(every_command, other, f"/dev/ublkc{mine}"), errno.EPERM)
        assert container.do(error_of_opening, f"/dev/ublkb{other}") == [errno.ENOENT] * 2
        for word in ("list", "stop", "del"):
            done = container.do(verb_inside, word, str(other))
            assert_fails(SimpleNamespace(**done), 1, "not visible here", errno.ENOENT)
    rows = json.loads(verb("list", "--json").out)
    assert [row["id"] for row in rows] == [0, 1]        # root outside sees and commands both
    if at_least("7.0"):             # which tells each caller the number of its own namespace
        for row, inner in zip(rows, pids):
            status = Path(f"/proc/{row['pid']}/status").read_text().splitlines()
            assert f"NSpid:\t{row['pid']}\t{inner}" in status
    status, text = containers[0].do(end_inside)
    assert status == 0 and text.count("\n") == 1 and "30 seconds" in text
    assert devices_left() == [1]
    assert verb("del", 1).status == 0


# =================================================================================================
# Queues in processes, and workers that are lost
# =================================================================================================


IO_FLUSHER = 0x180000           # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of linux/sched.h


def is_flusher(task):
    """Tell from /proc whether a task has said PR_SET_IO_FLUSHER."""
    fields = Path(f"/proc/{task}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[6]) & IO_FLUSHER == IO_FLUSHER


@kernel
def test_who_serves_requests_is_an_io_flusher():
    serving = []

    class Tells(Ram):
        def start(self, index):
            serving.append(threading.get_native_id())

    for queues in 1, 2:
        with ublk.Device(Tells(), queues=queues):
            assert len(serving) == queues and all(is_flusher(f"self/task/{task}") for task in serving)
        serving.clear()
    with Forked("ram", "--size", "16M", "-q", 2) as disk:
        workers = started_by(disk.pid)
        assert len(workers) == 2 and all(map(is_flusher, workers))
    assert not is_flusher("self")


@kernel
def test_a_lost_process_takes_the_disk_with_it():
    with Forked("ram", "--size", "16M", "-q", 2) as disk:
        workers = started_by(disk.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert disk.wait() == 1
        assert_error_line(disk.said(), errno.ECHILD, says="the process of queue 1 died")
        until(lambda: not session(disk.pid), "the other process to leave")
        assert devices_left() == [] and not os.path.exists(disk.path)


@kernel
@pytest.mark.parametrize("which", ["worker", "parent"])
def test_a_lost_process_of_a_recoverable_disk(backing, which):
    several = at_least("6.16")          # older kernels get one process with two threads
    disk = Forked("loop", backing, "-q", 2, "-r", "reissue").live()
    with Fio(disk) as fio:
        for _ in range(2):
            fio.busy()
            workers = started_by(disk.pid)
            assert len(workers) == (2 if several else 0)
            lost = workers[0] if which == "worker" and several else disk.pid
            os.kill(lost, signal.SIGKILL)
            assert disk.wait() == (-signal.SIGKILL if lost == disk.pid else 1)
            until(lambda disk=disk: not session(disk.pid), "the other processes to leave")
            disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@pytest.mark.parametrize("recovery", [[], ["-r", "fail"]], ids=["lost", "fail"])
def test_a_lost_thread_does_not_leave_a_deaf_disk(tmp_path, recovery):
    flag, collect = tmp_path / "flag", ublk.Queue.collect

    def change():
        def fail(queue, timeout=None):
            tags = collect(queue, timeout)
            if tags and flag.exists():
                raise RuntimeError("a fault of the loop itself")
            return tags
        replace(ublk.Queue, collect=fail)
    if recovery and needs_fail_io("ram", "--size", "4M", *recovery):
        return
    disk = Forked("ram", "--size", "4M", *recovery, change=change).live()
    with opened(disk.path) as fd:
        flag.touch()
        assert error_of(read_at, fd, 1 << 20, 4096) in (errno.EIO, errno.ENODEV)
    assert disk.wait() == 1, disk.said()
    assert disk.said().count("Traceback") == 1 and "a fault of the loop itself" in disk.said()
    if recovery:
        await_state(disk.id, "FAIL_IO")
        disk = recovered(disk)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
        assert disk.kill(signal.SIGTERM) == 0
    assert devices_left() == []


# =================================================================================================
# What cannot be recovered, and what is left behind
# =================================================================================================


def orphan(*words):
    """Make a disk whose server has been killed."""
    disk = Forked(*words).live()
    disk.kill()
    await_state(disk.id, "QUIESCED" if "-r" in words else "DEAD")
    return disk


@kernel
def test_recover_refuses_a_disk_that_is_served(run):
    with Forked("null", "-r", "requeue") as disk:
        assert_fails(run("recover", disk.id), 1, "its server still lives", errno.EBUSY)
        assert state_of(disk.id) == "LIVE"
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_recover_refuses_a_disk_not_made_for_it(run):
    disk = orphan("null")
    assert_fails(run("recover", disk.id), 1, "not made to be recovered", errno.EINVAL)
    assert run("del", disk.id).status == 0


@kernel
def test_recover_refuses_a_disk_that_is_stopped(run):
    disk = orphan("null", "-r", "requeue")
    assert run("stop", disk.id).status == 0
    assert_fails(run("recover", disk.id), 1, f"it is stopped (22 EINVAL): delete it: `ublk.py del {disk.id}`")
    assert run("del", disk.id).status == 0


@kernel
def test_recover_refuses_a_disk_that_does_not_exist(run):
    assert_fails(run("recover", 9), 1, "there is no such device", errno.ENODEV)


@kernel
def test_recover_without_a_state_file(run, run_dir, backing, tmp_path):
    disk = orphan("loop", backing, "-r", "reissue")
    assert run("recover", disk.id, "--target", "loop", backing).status == 2
    (run_dir / f"{disk.id}.json").unlink()
    assert_fails(run("recover", disk.id), 1, "--target TARGET", errno.ENOENT)
    small = tmp_path / "small"
    small.write_bytes(bytes(4096))
    small.chmod(0o400)
    assert_fails(run("recover", disk.id, "--target", "null", "--size", "4K"), 1, "as large as", errno.EINVAL)
    assert_fails(run("recover", disk.id, "--target", "loop", "/no/such"), 1, "/no/such", errno.ENOENT)
    assert state_of(disk.id) == "QUIESCED"
    disk = Forked("recover", disk.id, "--target", "loop", backing).live()
    disk.kill()
    disk = recovered(disk)                  # which finds a state file again
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_recover_from_python(backing):
    import ublk_targets
    disk = orphan("loop", backing, "-r", "reissue")
    with ublk.Device.recover(disk.id, ublk_targets.Loop(str(backing))) as served:
        assert served.path == disk.path and state_of(disk.id) == "LIVE"
        with opened(disk.path) as fd:
            write_at(fd, 4096, b"python" * 2048)
            assert read_at(fd, 4096, 4096) == (b"python" * 2048)[:4096]
    assert devices_left() == []
    assert backing.read_bytes()[4096:4102] == b"python"


@kernel
def test_orphans_are_listed_and_deleted(run, run_dir):
    lost, kept = orphan("null"), orphan("null", "-r", "requeue")
    (run_dir / "77.json").write_text('{"id": 77}')
    done = run("list", "--json")
    rows = {row["id"]: (row["state"], row["pid"], row["target"]) for row in json.loads(done.out)}
    assert rows == {lost.id: ("DEAD", -1, "null"), kept.id: ("QUIESCED", -1, "null")}
    assert "77.json is left of a device that is gone: `ublk.py del 77` removes it" in done.err
    assert done.err.count("\n") == 1
    done = run("del", lost.id, kept.id, 77)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == [] and list(run_dir.iterdir()) == []
    assert_nothing_stuck()


EVIL = 'open({!r}, "w").close()\nimport ublk\nclass Evil(ublk.Target):\n    size = 1 << 30\n'


def damages(run_dir, tmp_path, good):
    """Yield names of damage, each done to the state file of device 0 before."""
    path, marker = run_dir / "0.json", tmp_path / "executed"
    evil = tmp_path / "evil.py"
    evil.write_text(EVIL.format(str(marker)))
    hostile = json.dumps({**json.loads(good), "target": f"{evil}:Evil", "args": []})

    def write(text):
        path.unlink(missing_ok=True)
        path.write_text(text)

    for name, text in (("empty", ""), ("truncated", good[:-10]), ("not an object", "[1]"),
                       ("deep", "[" * 100000), ("another's", good.replace('"id": 0', '"id": 1')),
                       ("huge", hostile[:-1] + " " * (2 << 20) + "}"),
                       ("a number", json.dumps({**json.loads(hostile), "target": 5})),
                       ("args", json.dumps({**json.loads(hostile), "args": {"a": 1}})),
                       ("null", json.dumps({**json.loads(hostile), "cwd": None}))):
        write(text)
        yield name
    write(hostile)
    os.chown(path, BOB, BOB)
    yield "of somebody else"
    path.unlink()
    (tmp_path / "elsewhere.json").write_text(hostile)
    path.symlink_to(tmp_path / "elsewhere.json")
    yield "a link"
    path.unlink()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()


@kernel
def test_a_damaged_state_file_is_reported_and_never_executed(run, run_dir, tmp_path, backing):
    disk = orphan("loop", backing, "-r", "reissue")
    good = (run_dir / "0.json").read_text()
    for name in damages(run_dir, tmp_path, good):
        done = run("recover", disk.id)
        assert done.status == 1 and f"ublk: ignoring {run_dir}/0.json: " in done.err, (name, done)
        assert_error_line(done.err.splitlines(True)[-1], errno.ENOENT, says="--target")
        done = run("list", "--json")
        assert json.loads(done.out)[0]["target"] is None and "ignoring" in done.err, name
    assert not (tmp_path / "executed").exists()
    assert state_of(disk.id) == "QUIESCED"
    (tmp_path / "elsewhere.json").write_text("untouched")
    (run_dir / "0.json").symlink_to(tmp_path / "elsewhere.json")
    disk = Forked("recover", disk.id, "--target", "loop", backing).live()     # replaces the link
    assert (tmp_path / "elsewhere.json").read_text() == "untouched"
    assert not (run_dir / "0.json").is_symlink()
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_strange_names_among_the_state_files(run, run_dir, tmp_path):
    run_dir.mkdir(mode=0o700)
    names = ["²", "٣", "00", "-1", "0x1", "1e3", "..", " 5", "5\n", "9" * 200, "x", ""]
    for name in names:
        (run_dir / f"{name}.json").write_text("{}")
    with Forked("null") as disk:
        done = run("list")
        assert done.status == 0 and "Traceback" not in done.err
        assert done.err == ""
        assert run("del", 4294967296 + disk.id).status == 1         # not device 0 by another name
        assert run("del", -4294967296 + disk.id).status != 0
        assert state_of(disk.id) == "LIVE"
        for word in ("../0", "0/../../x", "²", "0 ", ""):
            assert run("recover", word).status in (1, 2)
        assert run("del", "--all").status == 0
        assert disk.wait() == 0
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(f"{name}.json" for name in names)


# =================================================================================================
# Under systemd
# =================================================================================================


@kernel
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_hears_of_readiness_status_and_watchdog(tmp_path, abstract):
    address = f"@ublk-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address.replace("@", "\0"))
        channel.settimeout(60)

        def change():
            os.environ.update(NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        disk = Forked("null", change=change).live()
        assert channel.recv(4096).decode().splitlines() == ["READY=1", f"STATUS=serving {disk.path}"]
        assert [channel.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert disk.kill(signal.SIGTERM) == 0
        said = b"WATCHDOG=1"
        while said == b"WATCHDOG=1":
            said = channel.recv(4096)
        assert said == b"STOPPING=1"


@kernel
def test_a_notify_socket_that_nobody_reads_does_no_harm(tmp_path):
    def change():
        os.environ.update(NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="20000")
    with Forked("null", change=change) as disk:
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""


# =================================================================================================
# Traps of the kernel
# =================================================================================================


def threads_of(pid):
    """Return the ids of a process's threads, without those in which the kernel works for io_uring."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):                 # it has just ended
            if not Path(f"/proc/{pid}/task/{task}/comm").read_text().startswith("iou-"):
                found.append(task)
    return found


@kernel
@pytest.mark.parametrize("word", ["stop", "del"])
@pytest.mark.parametrize("recovery", [[], ["-r", "reissue"]], ids=["lost", "reissue"])
def test_a_disk_taken_away_while_it_starts(tmp_path, word, recovery):
    """START_DEV after STOP_DEV on the same open ends some kernels: nothing may lead there."""
    fetched, go = tmp_path / "fetched", tmp_path / "go"
    start = ublk.Control.start_dev

    def slow_start(self, *args, **options):
        fetched.touch()
        until(go.exists, "the word")
        return start(self, *args, **options)

    disk = Forked("null", *recovery, change=lambda: replace(ublk.Control, start_dev=slow_start))
    until(fetched.exists, "all tags to be fetched")
    other = Forked(word, 0)                     # del waits until the server has let go
    if word == "stop":                          # there is nothing to stop yet, and so nothing is sent
        assert other.wait() == 0, other.said()
        go.touch()
        assert disk.live().kill(signal.SIGTERM) == 0
        return
    until(lambda: len(threads_of(disk.pid)) == 1, "the queue to end")
    go.touch()
    until(disk.ended, "the server")
    assert other.wait() == 0, other.said()
    assert disk.status == 1 and devices_left() == []
    assert_error_line(disk.said())
    with Forked("null") as disk:                # and the driver is whole
        with opened(disk.path) as fd:
            assert len(read_at(fd, 0, 4096)) == 4096
        assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_disk_stopped_while_it_recovers(run, backing, tmp_path):
    fetched, go = tmp_path / "fetched", tmp_path / "go"
    end = ublk.Control.end_user_recovery

    def slow_end(self, *args, **options):
        fetched.touch()
        until(go.exists, "the word")
        return end(self, *args, **options)

    disk = orphan("loop", backing, "-r", "reissue")
    disk = Forked("recover", disk.id, change=lambda: replace(ublk.Control, end_user_recovery=slow_end))
    until(fetched.exists, "all tags to be fetched")
    assert run("stop", 0).status == 0
    go.touch()
    assert disk.wait() == 1
    assert_error_line(disk.said())
    assert run("del", 0).status == 0
    assert_nothing_stuck()


# =================================================================================================
# Data paths: integrity
# =================================================================================================


def crc_t10dif(data):
    """Return the checksum T10 gives a block."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ (0x18BB7 if crc & 0x8000 else 0)
    return crc


def lacks_integrity(target):
    """Where there is no INTEGRITY, see that the error names the kernel that has it."""
    if at_least("7.0"):
        return False
    assert "needs Linux 7.0, this is" in message(ublk.Device(target).start)
    return True


def metadata_of(target, offset, blocks=1):
    """Return the metadata of blocks of a target."""
    buffer = bytearray(blocks * target.metadata_size)
    target.read_metadata(offset, memoryview(buffer))
    return buffer


FORMATS = {"crc": "T10-DIF-TYPE1-CRC", "ip": "T10-DIF-TYPE1-IP", "crc64": "EXT-DIF-TYPE1-CRC64"}


@kernel
@pytest.mark.parametrize("checksum, size", [("crc", 8), ("crc", 64), ("ip", 8), ("crc64", 16)])
@pytest.mark.parametrize("block", [512, 4096])
def test_the_kernel_finds_what_went_wrong_in_a_block(targets, checksum, size, block):
    target = targets.Ram(size=1 << 20, metadata_size=size, checksum=checksum)
    target.block_size = block
    if lacks_integrity(target):
        return
    data = os.urandom(2 * block)
    with ublk.Device(target) as disk, opened(disk.path) as fd:
        assert "INTEGRITY" in ublk.flag_names(disk.info.flags)
        about = Path(f"/sys/block/ublkb{disk.id}/integrity")
        assert (about / "format").read_text().strip() == FORMATS[checksum]
        assert int((about / "protection_interval_bytes").read_text()) == block
        assert read_at(fd, 0, 65536) == bytes(65536)        # blocks never written are not verified
        write_at(fd, 65536, data)
        assert read_at(fd, 65536, len(data)) == data
        good = metadata_of(target, 65536, 2)
        if checksum == "crc":
            assert good[:2] == crc_t10dif(data[:block]).to_bytes(2, "big")
            assert good[4:8] == (65536 // block).to_bytes(4, "big")

        target.view[65536 + 100] ^= 1                       # the data are not what was written
        assert error_of(read_at, fd, 65536, block) == errno.EILSEQ
        assert read_at(fd, 65536 + block, block) == data[block:]
        target.view[65536 + 100] ^= 1
        assert read_at(fd, 65536, block) == data[:block]

        target.write_metadata(65536, bytes([good[0] ^ 1]) + good[1:size])   # the metadata are not
        assert error_of(read_at, fd, 65536, block) == errno.EILSEQ
        target.view[:2 * block] = target.view[65536:65536 + 2 * block]      # the block lies elsewhere
        target.write_metadata(0, good)
        assert error_of(read_at, fd, 0, block) == errno.EILSEQ

        write_at(fd, 0, data)                               # written anew all is well
        write_at(fd, 65536, data)
        assert read_at(fd, 0, len(data)) == read_at(fd, 65536, len(data)) == data
        sh("blkdiscard", "-o", 65536, "-l", 4096, disk.path)
        assert read_at(fd, 65536, 4096) == bytes(4096)


@kernel
@pytest.mark.parametrize("name, options", [
    ("ram", {"queues": 4}), ("loop", {}), ("loop", {"batch": True, "queues": 4}),
    ("ram", {"data_path": "auto-zero-copy"}), ("loop", {"data_path": "zero-copy", "batch": True})], ids=str)
def test_disks_with_metadata_verify(targets, new_image, tmp_path, name, options):
    needs("fio")
    if name == "ram":
        target = targets.Ram(size=32 << 20, metadata_size=8)
    else:
        target = targets.Loop(str(new_image("32M")), metadata=str(tmp_path / "metadata"))
    if lacks_integrity(target):
        return
    with ublk.Device(target, **options) as disk:
        fio_verify(disk.path)
        assert metadata_of(target, 0) != b"\xff" * 8


@kernel
def test_metadata_lie_in_a_file_beside(targets, new_image, tmp_path, run):
    image, metadata = new_image("64M"), tmp_path / "metadata"
    words = ["loop", image, "--metadata", metadata, "-r", "reissue"]
    if lacks_integrity(targets.Loop(str(image), metadata=str(metadata))):
        return
    with Forked(*words) as disk:
        carries("ext4", disk, tmp_path / "mnt")
        assert disk.kill(signal.SIGTERM) == 0
    assert metadata.stat().st_size <= (64 << 20) // 512 * 8
    disk = Forked(*words).live()                            # another life, and one after a sudden death
    with Fio(disk) as fio:
        fio.busy()
        disk.kill()
        disk = recovered(disk)
        fio.busy()
        assert fio.finish() == 0
    disk.kill()
    await_state(disk.id, "QUIESCED")
    says = message(ublk.Device.recover, disk.id, targets.Loop(str(image)))
    assert "the target has 0 bytes of metadata beside a block, the disk 8" in says
    with open(image, "r+b") as file:
        file.seek(4096)
        file.write(b"another program wrote this")
    disk = recovered(disk)
    with opened(disk.path) as fd:
        assert error_of(read_at, fd, 4096, 4096) == errno.EILSEQ
        assert len(read_at(fd, 8192, 4096)) == 4096
    assert disk.kill(signal.SIGTERM) == 0


@kernel
def test_a_write_that_was_lost_on_its_way_is_found(targets):
    """What a lost write leaves is as good a block as any, but not the one its metadata tell of."""
    inner = targets.Ram(size=1 << 20, metadata_size=8)
    if lacks_integrity(inner):
        return
    with ublk.Device(targets.Fault(inner, on="write", range="64K-128K", lost=True)) as disk, \
            opened(disk.path) as fd:
        write_at(fd, 0, b"a" * 4096)
        write_at(fd, 65536, b"a" * 4096)
        assert read_at(fd, 0, 4096) == b"a" * 4096
        assert error_of(read_at, fd, 65536, 4096) == errno.EILSEQ


@pytest.mark.parametrize("words, says", [
    (["ram", "--metadata-size", "4"], "not a number from 8 to 255, as crc wants it"),
    (["ram", "--metadata-size", "8", "--checksum", "crc64"], "not a number from 16 to 255"),
    (["ram", "--metadata-size", "256"], "not a number from 8 to 255"),
    (["ram", "--metadata-size", "8", "--checksum", "md5"], "choose one of none, ip, crc, crc64"),
    (["loop", "disk.img", "--metadata", "disk.img"], "not a file for metadata alone"),
    (["loop", "disk.img", "--metadata", "/dev/null"], "not a file for metadata alone"),
    (["loop", "disk.img", "--metadata", "no/such/place"], "no such file or directory")])
def test_bad_metadata(run, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    done = run(*words)
    assert done.status == 1
    assert_error_line(done.err.splitlines(True)[-1], says=says)


@kernel
@pytest.mark.parametrize("data_path", ["copy", "get-data"])
def test_metadata_need_user_copy(targets, data_path):
    device = ublk.Device(targets.Ram(size=1 << 20, metadata_size=8), data_path=data_path)
    assert_error_line(f"ublk: {message(device.start)}\n", errno.EINVAL, says="not possible without USER_COPY")


# =================================================================================================
# Data paths
# =================================================================================================


def missing(data_path, batch=False):
    """Return the newest feature of a data path that this kernel lacks, or None."""
    flags = ublk.DATA_PATHS[data_path].features | (ublk.UBLK_F_BATCH_IO if batch else 0)
    return next((feature for feature in reversed(ublk.FEATURES)
                 if flags & feature and not at_least(feature.since)), None)


# Every data path, alone and with batches: what this kernel has, and what it lacks or no kernel has.
ALL_PATHS = [(path, batch) for batch in (False, True) for path in ublk.DATA_PATHS]
PATHS = [pair for pair in ALL_PATHS if not missing(*pair) and pair != ("get-data", True)]


def each_path(*paths, **others):
    """Run a test with every data path; others: names of arguments and their values, given in turn.

    With UBLK_TEST_ALL each path gets each of the values, and all of their combinations.
    """
    rows = [(path, batch, *(values[at % len(values)] for values in others.values()))
            for at, (path, batch) in enumerate(paths or PATHS)]
    if os.environ.get("UBLK_TEST_ALL"):
        rows = [(*pair, *values) for pair in paths or PATHS
                for values in itertools.product(*map(sorted, map(set, others.values())))]
    names = ["-".join(map(str, [row[0] + "-batch" * row[1], *row[2:]])) for row in rows]
    return pytest.mark.parametrize(["data_path", "batch", *others], rows, ids=names)


@kernel
def test_batches_need_a_depth_of_two(control):
    assert "depth 1: not a number from 2 to 4096" in message(ublk.Device(Ram(), depth=1, batch=True).start)
    if at_least("7.0"):
        assert error_of(control.add_dev, -1, 1, 1, 4096, ublk.UBLK_F_BATCH_IO) == errno.EINVAL


@kernel
@each_path(*(pair for pair in ALL_PATHS if pair not in PATHS))
def test_a_data_path_that_cannot_be_is_refused(data_path, batch):
    says = message(ublk.Device(Ram(), data_path=data_path, batch=batch).start)
    if data_path == "get-data" and batch:
        assert_error_line(f"ublk: {says}\n", errno.EINVAL, says="not allow it together with NEED_GET_DATA")
    else:
        since = missing(data_path, batch).since
        assert_error_line(f"ublk: {says}\n", errno.EOPNOTSUPP, says=f"needs Linux {since}, this is")


def path_options(path):
    """Return the options of the command line for a data path."""
    return ["--need-get-data" if path == "get-data" else f"--{path}"]


def made(targets, name, image, size=24 << 20):
    """Make a target: one of the companion's, or ten lines of Python."""
    return {"ram": lambda: targets.Ram(size=size), "loop": lambda: targets.Loop(str(image(str(size)))),
            "direct": lambda: make_loop(targets, image(str(size)), True),
            "plain": lambda: Ram(size), "coroutines": lambda: AsyncRam(size)}[name]()


@kernel
@each_path(queues=[1, 4])
def test_every_data_path_verifies_a_loop(targets, new_image, data_path, batch, queues):
    needs("fio")
    target = made(targets, "loop", new_image)
    with ublk.Device(target, data_path=data_path, batch=batch, queues=queues) as disk:
        assert disk.info.flags & disk.data_path.features == ublk.DATA_PATHS[data_path].features
        count = disk.info.nr_hw_queues
        assert count == min(queues, os.sysconf("SC_NPROCESSORS_CONF"))
        assert len(started_by(os.getpid())) == (count if count > 1 else 0)     # a process for each queue
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
        await ublk.uring_sleep(0)
        return Troubled.read(self, offset, buffer)

    async def write(self, offset, buffer):
        await ublk.uring_sleep(0)
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


@kernel
@each_path(direct=[False, True])
def test_a_backing_file_cut_short_on_every_data_path(targets, new_image, data_path, batch, direct):
    path, data = new_image("8M"), os.urandom(1 << 20)
    target = make_loop(targets, path, direct)
    with ublk.Device(target, data_path=data_path, batch=batch, depth=4) as disk, opened(disk.path) as fd:
        write_at(fd, 0, data)
        os.truncate(path, 512 << 10)
        assert read_at(fd, 0, 512 << 10) == data[:512 << 10]
        for _ in range(3):                              # no tag is lost by it
            for offset, size in ((512 << 10, 4096), (510 << 10, 4096), (1 << 20, 65536), (0, 1 << 20)):
                assert error_of(read_at, fd, offset, size) == errno.EIO
        write_at(fd, 512 << 10, data[512 << 10:])       # the file grows again
        assert read_at(fd, 0, 1 << 20) == data


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
def test_killed_and_quiesced_under_load_on_every_data_path(backing, run, data_path, batch, queues):
    """With batches the kernel does not quiesce without errors: there a server is only killed."""
    disk = Forked("loop", backing, "-r", "reissue", "-q", queues, *path_options(data_path),
                  *["--batch"] * batch).live()
    with Fio(disk, "--size=2M") as fio:
        fio.busy()
        os.kill(next(iter(started_by(disk.pid)), disk.pid), signal.SIGKILL)     # one of its processes
        assert disk.wait() != 0
        until(lambda: not session(disk.pid), "its processes to end")
        disk = recovered(disk)
        fio.busy()
        if at_least("6.16"):
            done = run("quiesce", disk.id)
            if batch:
                assert_error_line(done.err, errno.EOPNOTSUPP, says="not made with the flag QUIESCE")
            else:
                assert (done.status, done.err) == (0, "")
                assert disk.wait() == 0
                disk = recovered(disk)
                fio.busy()
        fio.finish()
    assert fio.errors == 0
    assert disk.kill(signal.SIGTERM) == 0


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


def lacks_shared_memory():
    """Where there is no SHMEM_ZC, see that the error names the kernel that has it."""
    if at_least("7.1"):
        return False
    assert "needs Linux 7.1, this is" in message(ublk.Device(Ram(), share_memory=True).start)
    return True


@kernel
def test_memory_shared_with_a_client_is_not_copied(memory):
    if lacks_shared_memory():
        return
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

    with ublk.Device(Looks(), share_memory=True) as disk, opened(disk.path) as fd:
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
@each_path(name=["null", "loop", "ram", "plain"])
def test_shared_memory_with_every_data_path(targets, new_image, memory, data_path, batch, name):
    if lacks_shared_memory():
        return
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


@kernel
def test_shared_memory_of_a_disk_with_metadata(targets, memory):
    if not lacks_shared_memory():
        moves_shared_memory(memory, targets.Ram(size=1 << 20, metadata_size=8))


@kernel
def test_shared_memory_does_not_outlive_its_server():
    device = ublk.Device(Ram(), share_memory=True, recovery="reissue")
    assert "not possible with shared memory (22 EINVAL)" in message(device.start)


@kernel
def test_no_partition_scan():
    with ublk.Device(with_partition(), partition_scan=False) as disk, ublk.Device(with_partition()) as other:
        until(lambda: os.path.exists(f"{other.path}p1"), "the partition of a disk that is scanned")
        assert not os.path.exists(f"{disk.path}p1")
        sh(*("blockdev", "--rereadpt") if at_least("7.0") else ("partx", "--add"), disk.path)
        until(lambda: os.path.exists(f"{disk.path}p1"), "the partition")


@kernel
def test_fifty_disks_at_a_time(run):
    with ExitStack() as stack:
        disks = [stack.enter_context(ublk.Device(Ram(), depth=4)) for _ in range(50)]
        for number, disk in enumerate(disks):
            with opened(disk.path) as fd:
                write_at(fd, 4096, bytes([number]) * 4096)
        for number, disk in enumerate(disks):
            with opened(disk.path) as fd:
                assert read_at(fd, 4096, 4096) == bytes([number]) * 4096
        rows = json.loads(run("list", "--json").out)
        assert [row["state"] for row in rows] == ["LIVE"] * 50
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
            disk.__exit__()


# =================================================================================================
# Companion: disks of other machines
# =================================================================================================


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


@pytest.fixture
def here(tmp_path):
    """A path short enough for a socket."""
    directory = tempfile.mkdtemp(prefix="nbd")
    yield Path(directory, "s")
    shutil.rmtree(directory)


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
        self.data, self.connections = bytearray(os.urandom(1 << 20)), 0

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
        with ublk.Device(targets.Nbd(nbd_uri(here), timeout="2s")) as disk, opened(disk.path) as fd:
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
            with opened(disk.path, os.O_RDONLY) as fd:
                assert error_of(os.write, fd, bytes(4096)) == errno.EBADF


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


# =================================================================================================
# Companion: servers of other targets killed
# =================================================================================================


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


# =================================================================================================
# Companion: zones
# =================================================================================================

EMPTY, IMP_OPEN, EXP_OPEN, CLOSED, FULL = 1, 2, 3, 4, 14


def zoned(targets, **options):
    """Make a disk of 16 zones of 1 MiB."""
    return targets.Zoned(**{"size": 16 << 20, "zone_size": 1 << 20, **options})


def now(coroutine):
    """Run a coroutine that has nothing to wait for."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


def conditions(target):
    return [zone.cond for zone in target.zones]


def test_zones_are_written_at_their_pointer_only(targets):
    disk, page = zoned(targets), memoryview(bytes(4096))

    def write(offset, size=4096):
        return error_of(now, disk.write(offset, memoryview(b"x" * size)))
    now(disk.write(1 << 20, page))
    assert disk.zone_append(1 << 20, page) == (1 << 20) + 4096
    now(disk.write((1 << 20) + 8192, page))
    assert error_of(now, disk.write((1 << 20) + 8192, page)) == errno.EIO
    for wrong_place in (1 << 20, (1 << 20) + 16384, (2 << 20) + 4096):
        assert write(wrong_place) == errno.EIO
    disk.zone_finish(1 << 20)
    assert error_of(disk.zone_append, 1 << 20, page) == errno.EIO
    assert error_of(disk.zone_open, 1 << 20) == errno.EIO
    assert conditions(disk) == [EMPTY, FULL] + [EMPTY] * 14
    assert write(3 << 20, 2 << 20) == errno.EIO
    disk.close()


def test_zones_open_within_their_limits(targets):
    disk, page = zoned(targets, max_open=2, max_active=3), memoryview(bytes(4096))
    for zone in (0, 1, 2):                      # the third closes one that nobody opened
        now(disk.write(zone << 20, page))
    assert conditions(disk)[:4] == [CLOSED, IMP_OPEN, IMP_OPEN, EMPTY]
    assert error_of(disk.zone_append, 3 << 20, page) == errno.EOVERFLOW
    disk.zone_open(1 << 20)
    disk.zone_open(2 << 20)
    assert error_of(disk.zone_open, 0) == errno.ETOOMANYREFS
    assert error_of(disk.zone_append, 0, page) == errno.ETOOMANYREFS
    disk.zone_finish(0)                         # leaves room for another active one
    disk.zone_close(1 << 20)
    assert disk.zone_append(3 << 20, page) == 3 << 20
    assert conditions(disk)[:4] == [FULL, CLOSED, EXP_OPEN, IMP_OPEN]
    disk.close()


def test_zones_of_a_file_are_as_they_were_left(targets, tmp_path):
    path, page = str(tmp_path / "zones"), memoryview(os.urandom(4096))
    disk = zoned(targets, file=path, conventional=2)
    disk.zone_append(2 << 20, page)
    disk.zone_open(3 << 20)
    disk.zone_finish(4 << 20)
    disk.close()
    disk = targets.Zoned(file=path)
    assert (disk.size, disk.zone_size) == (16 << 20, 1 << 20)
    assert conditions(disk) == [0, 0, CLOSED, EMPTY, FULL] + [EMPTY] * 11
    assert disk.zones[2].wp == (2 << 20) + 4096
    assert error_of(now, disk.write(2 << 20, memoryview(bytes(4096)))) == errno.EIO
    now(disk.write(2 << 20, page))              # what a killed server had done comes again
    now(disk.write((2 << 20) + 4096, page))
    assert error_of(now, disk.write((2 << 20) + 4096, page)) == errno.EIO
    for operation in (disk.zone_open, disk.zone_close, disk.zone_finish):
        assert error_of(operation, 0) == errno.EIO
    disk.close()


def test_a_file_of_zones_has_one_server(targets, tmp_path):
    path = str(tmp_path / "zones")
    disk = zoned(targets, file=path)
    assert "another server uses it" in message(lambda: targets.Zoned(file=path))
    disk.close()
    targets.Zoned(file=path).close()


def damage(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("spoil, text", [
    (lambda path: damage(path, 0, b"x"), "not a zoned disk, or a damaged one"),
    (lambda path: damage(path, 9, b"x"), "not a zoned disk, or a damaged one"),
    (lambda path: damage(path, 4096 + 8, b"\1"), "the write pointer of zone 1"),
    (lambda path: damage(path, 4096 + 8 * 15, b"\xff" * 8), "the write pointer of zone 15"),
    (lambda path: os.truncate(path, 10 << 20), "damaged: not"),
    (lambda path: os.truncate(path, 512), "damaged: not"),
    (lambda path: os.truncate(path, 10), "not a multiple of 512"),
    (lambda path: path.write_bytes(os.urandom(1 << 20)), "not a zoned disk, or a damaged one")])
def test_zones_of_a_damaged_file_are_refused(run, targets, tmp_path, spoil, text):
    path = tmp_path / "zones"
    zoned(targets, file=str(path)).close()
    spoil(path)
    assert_fails(run("zoned", "--file", path), 1, text, errno.EINVAL)


@pytest.mark.parametrize("words, status, text", [
    ("--zone-size 3M", 1, "3145728"), ("--zone-size 512", 1, "512"), ("--zone-size 0", 1, "--zone-size 0"),
    ("--size 100M --zone-size 16M", 1, "--size"), ("--size 0", 1, "--size 0"),
    ("--size 64M --conventional 4", 1, "--size"), ("--conventional -1", 2, "--conventional"),
    ("--max-open x", 2, "--max-open"), ("surplus", 2, "surplus"),
    ("--file /no/such/dir/x", 1, "/no/such/dir")])
def test_zones_that_cannot_be(run, words, status, text):
    assert_fails(run("zoned", *words.split()), status, text)


def lacks_zones(targets):
    """Where there are no zoned disks, see that the error names the kernel that has them."""
    if at_least("6.6"):
        return False
    assert "needs Linux 6.6, this is" in message(ublk.Device(zoned(targets)).start)
    return True


def report(disk):
    """Return (first sector, written sectors, condition, type) of each zone, as blkzone tells it."""
    pattern = r" *start: (\w+), len \w+, cap \w+, wptr (\w+) .* zcond: *\d+\((..)\) \[type: (\d)"
    found = [re.match(pattern, line) for line in sh("blkzone", "report", disk.path).stdout.splitlines()]
    return [(int(line[1], 16), int(line[2], 16), line[3], int(line[4])) for line in found]


@kernel
def test_blkzone_sees_and_changes_the_zones(targets):
    if lacks_zones(targets):
        return
    needs("blkzone")
    with ublk.Device(zoned(targets, conventional=2, max_open=4, max_active=6)) as disk:
        name = os.path.basename(disk.path)
        queue = Path(f"/sys/block/{name}/queue")
        assert (queue / "zoned").read_text() == "host-managed\n"
        assert [(queue / f"max_{word}_zones").read_text() for word in ("open", "active")] == ["4\n", "6\n"]
        assert report(disk) == [(zone * 2048, 0, "nw" if zone < 2 else "em", 1 if zone < 2 else 2)
                                for zone in range(16)]
        with opened(disk.path) as fd:
            data = os.urandom(8192)
            write_at(fd, 4096, data)                            # conventional
            write_at(fd, 3 << 20, data)
            assert error_of(write_at, fd, (3 << 20) + 16384, data) == errno.EIO
            sh("blkzone", "finish", "-o", 4 * 2048, "-c", 1, disk.path)
            sh("blkzone", "open", "-o", 5 * 2048, "-c", 1, disk.path)
            found = report(disk)
            assert found[3][1:3] == (16, "oi") and found[4][2] == "fu" and found[5][2] == "oe"
            sh("blkzone", "close", "-o", 3 * 2048, "-c", 1, disk.path)
            assert report(disk)[3][1:3] == (16, "cl")
            assert read_at(fd, 4096, 8192) == read_at(fd, 3 << 20, 8192) == data
            sh("blkzone", "reset", "-o", 3 * 2048, "-c", 1, disk.path)
            assert read_at(fd, 3 << 20, 8192) == bytes(8192)
            sh("blkzone", "reset", "-o", 2 * 2048, disk.path)
            assert {line[1:3] for line in report(disk)[2:]} == {(0, "em")}
            assert read_at(fd, 4096, 8192) == data


ZBD = ["--zonemode=zbd", "--direct=1", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--bs=16k",
       "--iodepth=8", "--ioengine=libaio", "--max_open_zones=4", "--thread", "--minimal"]


@kernel
def test_fio_verifies_zones(targets):
    if lacks_zones(targets):
        return
    needs("fio")
    with ublk.Device(zoned(targets, max_open=4, max_active=4)) as disk:
        done = sh("fio", "--name=x", f"--filename={disk.path}", "--size=16M", "--io_size=12M", *ZBD,
                  cwd="/tmp")
        assert "verify" not in done.stderr, done.stderr


@kernel
@pytest.mark.parametrize("kind", ["btrfs", "f2fs"])
def test_zones_carry_a_file_system(targets, tmp_path, kind):
    make, check, options = {
        "btrfs": (["mkfs.btrfs", "-qf", "-O", "zoned", "-d", "single", "-m", "single"], ["btrfs", "check"],
                  {"size": 256 << 20, "zone_size": 8 << 20}),
        "f2fs": (["mkfs.f2fs", "-qfm"], ["fsck.f2fs"],
                 {"size": 192 << 20, "zone_size": 4 << 20, "conventional": 8})}[kind]
    needs(make[0], check[0])
    if lacks_zones(targets):
        return
    files = {str(number): os.urandom(number * 50_000) for number in range(12)}
    with ublk.Device(targets.Zoned(**options)) as disk:
        sh(*make, disk.path)
        with mount_of(disk.path, tmp_path / "mnt", "-t", kind) as directory:
            for name, data in files.items():
                (directory / name).write_bytes(data)
            (directory / "0").unlink()
        with mount_of(disk.path, tmp_path / "mnt", "-t", kind) as directory:
            assert {path.name: path.read_bytes() for path in directory.iterdir()} == \
                {name: data for name, data in files.items() if name != "0"}
        sh(*check, disk.path)


@kernel
def test_zones_survive_servers_that_are_killed(targets, tmp_path, backing):
    if lacks_zones(targets):
        return
    backing.unlink()
    words = ["zoned", "--file", backing, "--size", "32M", "--zone-size", "4M", "-r", "reissue"]
    disk = Forked(*words).live()
    with Fio(disk, "--zonemode=zbd", "--max_open_zones=2", "--bs=16k", "--size=32M", "--io_size=8M") as fio:
        for _ in range(2):
            fio.busy()
            disk.kill()
            disk = recovered(disk)
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    before = report(disk), digest(disk.path)
    assert disk.kill(signal.SIGTERM) == 0
    with Forked(*words) as disk:                # and the end of the server
        assert [line[:2] for line in report(disk)] == [line[:2] for line in before[0]]
        assert digest(disk.path) == before[1]


# =================================================================================================
# Companion: recordings
# =================================================================================================


class Log:
    """A recorded disk in memory: the log, and what the disk contained after each of its entries."""

    def __init__(self, targets, path, size=1 << 20):
        self.path, self.targets = path, targets
        self.disk = targets.Record(str(path), targets.Ram(size=size))
        self.states = [bytes(size)]

    def do(self, name, *args):
        now(getattr(self.disk, name)(*args))
        self.states.append(bytes(self.disk.target.view))

    def some(self):
        """Do something of everything."""
        for at in (0, 8192, 4096):
            self.do("write", at, memoryview(os.urandom(8192)))
        for name, *args in (("flush",), ("discard", 4096, 4096), ("write_zeroes", 512, 1024, False)):
            self.do(name, *args)
        self.do("write", 0, memoryview(os.urandom(512)))
        self.disk.close()
        return self


@pytest.fixture
def log(targets, tmp_path):
    return Log(targets, tmp_path / "log").some()


def test_replay_rebuilds_the_disk_after_every_entry(run, log, tmp_path):
    for number, state in enumerate(log.states):
        path = tmp_path / f"disk{number}"
        assert run("replay", log.path, path, "--to", number).status == 0
        assert path.read_bytes() == state
    assert run("replay", log.path, tmp_path / "last").status == 0
    assert (tmp_path / "last").read_bytes() == log.states[-1]


def test_replay_lists_the_entries(run, log):
    lines = [line.split() for line in run("replay", log.path).out.splitlines()]
    assert [line[:2] for line in lines] == [[str(number + 1), kind] for number, kind in enumerate(
        ["write", "write", "write", "flush", "discard", "write_zeroes", "write"])]
    assert lines[1][2:] == ["8192", "8192"]


def test_replay_begins_with_a_base(run, targets, tmp_path):
    base = os.urandom(1 << 20)
    (tmp_path / "base").write_bytes(base)
    disk = targets.Record(str(tmp_path / "log"), targets.Ram(size=1 << 20))
    now(disk.write(4096, memoryview(b"x" * 4096)))
    disk.close()
    assert run("replay", tmp_path / "log", tmp_path / "disk", "--base", tmp_path / "base").status == 0
    assert (tmp_path / "disk").read_bytes() == base[:4096] + b"x" * 4096 + base[8192:]


def test_a_log_is_continued_and_what_a_kill_cut_off_is_left_out(run, targets, log, tmp_path):
    os.truncate(log.path, os.path.getsize(log.path) - 100)
    assert run("replay", log.path, tmp_path / "cut").status == 0
    assert (tmp_path / "cut").read_bytes() == log.states[-2]
    disk = targets.Record(str(log.path), targets.Ram(size=1 << 20))
    now(disk.write(0, memoryview(b"y" * 512)))
    disk.close()
    assert run("replay", log.path, tmp_path / "more").status == 0
    assert (tmp_path / "more").read_bytes() == b"y" * 512 + log.states[-2][512:]


def test_a_log_knows_how_large_its_disk_has_been(run, targets, tmp_path):
    log, image = tmp_path / "log", tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk, page = targets.Record(str(log), targets.Loop(str(image))), memoryview(os.urandom(4096))
    for size in (2 << 20, 1 << 20):
        disk.resized(size)
        assert disk.size == disk.target.size == size
    disk.target.write = lambda offset, buffer: patched(image, offset, buffer)
    now(disk.write((2 << 20) - 4096, page))
    disk.close()
    targets.Record(str(log), targets.Loop(str(image))).close()      # as a server that recovers it does
    assert run("replay", log, tmp_path / "copy").status == 0
    assert (tmp_path / "copy").read_bytes() == bytes((2 << 20) - 4096) + page == image.read_bytes()


def test_a_damaged_log_is_an_error_and_good_up_to_there(run, targets, log, tmp_path):
    with open(log.path, "rb") as file:
        third = list(targets.entries(file))[2]
    for number, at in (("data", third.end - 1), ("head", third.end + 5)):       # of the 3rd, of the 4th
        path = shutil.copy(log.path, tmp_path / number)
        damage(path, at, bytes([Path(path).read_bytes()[at] ^ 0xff]))
        done = run("replay", path, tmp_path / f"{number}.disk")
        last = 2 if number == "data" else 3
        assert_fails(done, 1, f"--to {last}", errno.EINVAL)
        assert run("replay", path, tmp_path / f"{number}.good", "--to", last).status == 0
        assert (tmp_path / f"{number}.good").read_bytes() == log.states[last]


@pytest.mark.parametrize("words, status, text", [
    ("LOG --check true", 2, "--check needs a disk"), ("", 2, "log"), ("/no/such disk", 1, "/no/such"),
    ("LOG DISK --to -1", 2, "--to"), ("LOG DISK --to x", 2, "--to"), ("LOG DISK --every day", 2, "--every"),
    ("LOG LOG", 1, "LOG"), ("LOG DISK --base /no/such", 1, "/no/such"), ("EMPTY DISK", 1, "not a log"),
    ("JUNK DISK", 1, "not a log"), ("/dev/zero DISK", 1, "not a log")])
def test_replay_of_what_cannot_be(run, log, tmp_path, words, status, text):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "JUNK").write_bytes(os.urandom(100))
    names = {"LOG": log.path, **{name: tmp_path / name for name in ("DISK", "EMPTY", "JUNK")}}
    text = text.replace("LOG", str(log.path))
    assert_fails(run("replay", *[names.get(word, word) for word in words.split()]), status, text)


def test_a_recording_that_cannot_be(run, log, tmp_path):
    assert_fails(run("record", log.path, "ram", "--size", "2M"), 1, "the log of a disk of 1048576 bytes")
    assert_fails(run("record", tmp_path, "ram"), 1, str(tmp_path), errno.EISDIR)
    assert_fails(run("record", tmp_path / "x", "zoned"), 1, "zoned", errno.EINVAL)
    assert run("record", tmp_path / "y").status == 2
    (tmp_path / "JUNK").write_bytes(os.urandom(100))
    assert_fails(run("record", tmp_path / "JUNK", "ram"), 1, "not a log", errno.EINVAL)
    assert len((tmp_path / "JUNK").read_bytes()) == 100


def test_a_log_that_is_full_fails_the_write_and_stays_whole(run, targets, tmp_path):
    log = Log(targets, tmp_path / "log")
    log.do("write", 0, memoryview(b"1" * 4096))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(log.path) + 1000, usual[1]))
    try:
        assert error_of(now, log.disk.write(8192, memoryview(b"2" * 4096))) == errno.ENOSPC
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    log.do("write", 4096, memoryview(b"3" * 4096))
    log.disk.close()
    assert run("replay", log.path, tmp_path / "disk").status == 0
    assert (tmp_path / "disk").read_bytes()[:12288] == b"1" * 4096 + b"3" * 4096 + bytes(4096)


# ---- crashes ----------------------------------------------------------------------------------------

# A database: block 0 says how many records there are, record n is in block n.
CHECK = """
import sys
with open(sys.argv[1], "rb") as disk:
    for number in range(1, 1 + int.from_bytes(disk.read(8), "little")):
        disk.seek(number * 4096)
        assert disk.read(4096) == bytes([number]) * 4096
"""


class Database:
    """Writes its records through a disk's write(offset, data) and flush()."""

    def __init__(self, write, flush):
        self.write, self.flush = write, flush

    def record(self, number):
        self.write(number * 4096, bytes([number]) * 4096)

    def header(self, number):
        self.write(0, number.to_bytes(8, "little") + bytes(4088))

    def good(self, number):
        self.record(number)
        self.flush()
        self.header(number)
        self.flush()

    def hasty(self, number):                # right in order, but nothing keeps the disk to it
        self.record(number)
        self.header(number)
        self.flush()

    def bad(self, number):
        self.header(number)
        self.record(number)
        self.flush()


def crash_test(run, log, *words):
    """Look for a crash after which a database is wrong."""
    script = log.with_suffix(".py")
    script.write_text(CHECK)
    check = f"{sys.executable} {script} {{}} 2>&-"
    return run("replay", log, log.with_suffix(".a disk"), "--check", check, *words)


@pytest.mark.parametrize("words, good, hasty, bad", [
    ("--every entry", "good at 12 ", "good at 9 ", "bad at entry 1: write 0 4096: "),
    ("--every flush", "good at 6 ", "good at 3 ", "good at 3 "),
    ("--every entry --from 3", "good at 10 ", "good at 7 ", "bad at entry 4: write 0 4096: "),
    ("--every entry --lose 1", "good at 12 ", "bad at entry ", "bad at entry "),
    ("--every flush --lose 2", "good at 6 ", "bad at entry ", "bad at entry ")])
def test_crashes_find_the_database_that_forgets_to_flush(run, targets, tmp_path, words, good, hasty, bad):
    for name, verdict in (("good", good), ("hasty", hasty), ("bad", bad)):
        path = tmp_path / name
        log = Log(targets, path)
        database = Database(lambda at, data, log=log: log.do("write", at, memoryview(data)),
                            lambda log=log: log.do("flush"))
        for number in (1, 2, 3):
            getattr(database, name)(number)
        log.disk.close()
        done = crash_test(run, path, *words.split())
        assert done.out.startswith(verdict) and done.status == verdict.startswith("bad"), (name, done)


@kernel
def test_crashes_of_a_real_disk(run, targets, tmp_path):
    """The same through the kernel, with direct I/O and fsync."""
    for name, verdict in {"good": "good at ", "bad": "bad at entry "}.items():
        with ublk.Device(targets.Record(str(tmp_path / name), targets.Ram(size=1 << 20))) as disk:
            with opened(disk.path) as fd:
                database = Database(partial(write_at, fd), partial(os.fsync, fd))
                for number in (1, 2):
                    getattr(database, name)(number)
        done = crash_test(run, tmp_path / name, "--every", "flush" if name == "good" else "entry")
        assert done.out.startswith(verdict), done
    with open(tmp_path / "bad", "rb") as log:
        header = next(entry for entry in targets.entries(log) if entry.kind == "write" and entry.offset == 0)
    assert done.out.startswith(f"bad at entry {header.number}: write 0 4096")


@kernel
def test_replaying_all_equals_the_disk(run, targets, tmp_path):
    with ublk.Device(targets.Record(str(tmp_path / "log"), targets.Ram(size=32 << 20)), queues=2) as disk:
        fio_verify(disk.path)
        os.sync()
        found = digest(disk.path)
    assert run("replay", tmp_path / "log", tmp_path / "again").status == 0
    assert digest(tmp_path / "again") == found


# What is in a file that was replaced is all old or all new, whenever the crash came.
INTACT = ("e2fsck -fy {} >/dev/null 2>&1; "
          "debugfs -R 'cat /config' {} 2>/dev/null | grep -qx 'old\\|new\\|newer'")
JBD2_COMMIT = bytes.fromhex("c03b3998 00000002")


@kernel
def test_a_rename_without_fsync_is_caught_and_one_with_it_is_not(run, targets, tmp_path):
    needs("mkfs.ext4", "e2fsck", "debugfs")
    log, image, mnt = tmp_path / "log", tmp_path / "disk", tmp_path / "mnt"

    def count():
        return len(run("replay", log).out.splitlines())

    with ublk.Device(targets.Record(str(log), targets.Ram(size=16 << 20))) as disk:
        sh("mkfs.ext4", "-qF", disk.path)
        with mount_of(disk.path, mnt, "-o", "data=writeback,noauto_da_alloc"):
            write_file(mnt / "config", "old\n", sync=True)
            os.sync()
            start = count() + 1
            write_file(mnt / "config.new", "new\n", sync=True)
            (mnt / "config.new").rename(mnt / "config")
            os.sync()
            careful = count()
            write_file(mnt / "config.new", "newer\n", sync=False)
            (mnt / "config.new").rename(mnt / "config")
            write_file(mnt / "other", "it commits the journal\n", sync=True)
    done = run("replay", log, tmp_path / "good", "--check", INTACT, "--from", start, "--to", careful)
    assert done.status == 0 and re.match(r"good at [1-9]\d* crash points", done.out), done
    done = run("replay", log, image, "--check", INTACT, "--from", careful + 1, "--every", "entry")
    # It is caught where the journal commits: that a file was renamed is durable, what is in it not yet.
    number, offset = map(int, re.match(r"bad at entry (\d+): write (\d+) 1024: ", done.out).groups())
    assert done.status == 1 and number > careful + 1
    with open(f"{image}.crash", "rb") as crashed:
        crashed.seek(offset)
        assert crashed.read(8) == JBD2_COMMIT, done


def write_file(path, text, *, sync):
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


# Companion: every target
# =================================================================================================

SMALL_JOBS = [("512", "0", "48k"), ("4k", "1m", "256k"), ("256k", "2m", "1m")]

# Each kind of disk, as it is written on the command line in the directory `workshop`. Rows that end with
# their server are in VOLATILE; what else has to run meanwhile is a context manager in PARTNERS.
COMMAND_LINES = {
    "ram": "ram --size 8M",
    "loop": "loop a.img",
    "stripe": "stripe a.img b.img --chunk 20K",
    "mirror": "mirror a.img b.img --state state",
    "cow": "cow base.img overlay.cow",
    "fault": "fault --jitter 100us --rate 0.1 fault --on flush --delay 1ms loop a.img",
}
VOLATILE = {"ram"}
PARTNERS = {}

every_target = pytest.mark.parametrize("name", COMMAND_LINES)


@pytest.fixture
def workshop(monkeypatch):
    """A directory to work in, with empty files of 8 MiB and a base that has some data."""
    path = Path(tempfile.mkdtemp(dir="/scratch" if IN_LAB else None))
    monkeypatch.chdir(path)
    for name in "a.img", "b.img":
        with open(name, "wb") as file:
            file.truncate(8 << 20)
    base = os.urandom(4 << 20) + bytes(4 << 20)
    Path("base.img").write_bytes(base)
    yield path
    assert Path("base.img").read_bytes() == base
    shutil.rmtree(path)


@contextmanager
def serving(name, *words):
    """Serve one of COMMAND_LINES from the command line, with further options."""
    with PARTNERS.get(name, nullcontext)(), Forked(*COMMAND_LINES[name].split(), *words) as disk:
        yield disk


@kernel
@every_target
def test_each_target_carries_a_verified_file_system(name, workshop, tmp_path):
    needs("fio")
    with serving(name) as disk:
        fio_verify(disk.path, SMALL_JOBS)
        carries("ext4", disk, tmp_path / "mnt")
        assert disk.kill(signal.SIGTERM) == 0 and disk.said() == ""


@kernel
@every_target
def test_each_target_keeps_exactly_what_it_was_given(name, workshop):
    needs("blkdiscard")
    with serving(name) as disk, opened(disk.path) as fd:
        expected = bytearray(content_of(fd))
        size = len(expected)
        for offset, length in ((512, 512), (60 << 10, 300 << 10), (size - 4096, 4096), (3 << 20, 2 << 20)):
            expected[offset:offset + length] = data = os.urandom(length)
            assert write_at(fd, offset, data) == length
        os.fsync(fd)
        for how, offset, length in (("-z", 1024, 512), ("-z", 100 << 10, 66 << 10), ("-f", 3 << 20, 1 << 20)):
            sh("blkdiscard", how, "-o", offset, "-l", length, disk.path)
            expected[offset:offset + length] = bytes(length)
        with opened(disk.path, os.O_RDWR | os.O_DSYNC) as durable:
            expected[8192:12288] = data = os.urandom(4096)
            write_at(durable, 8192, data)
        assert content_of(fd) == expected
    if name in VOLATILE:
        return
    with serving(name, "--read-only") as disk, opened(disk.path, os.O_RDONLY) as fd:
        assert content_of(fd) == expected
        with pytest.raises(OSError) as refused, opened(disk.path) as writable:
            write_at(writable, 0, bytes(4096))
        assert refused.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)


def content_of(fd):
    """Return everything on a disk."""
    size = os.lseek(fd, 0, os.SEEK_END)
    return b"".join(read_at(fd, at, min(1 << 20, size - at)) for at in range(0, size, 1 << 20))


@kernel
@pytest.mark.parametrize("name", [name for name in COMMAND_LINES if name not in VOLATILE])
def test_each_target_survives_kills_of_its_server(name, workshop):
    with serving(name, "-r", "reissue") as disk, Fio(disk, "--size=1M") as fio:
        for _ in range(2):
            fio.busy()
            disk.kill()
            disk = recovered(disk)
        fio.busy()
        fio.finish()
        assert fio.errors == 0
        assert disk.kill(signal.SIGTERM) == 0
    if name == "mirror":
        assert digest("a.img") == digest("b.img")


@kernel
@every_target
def test_each_target_has_a_disk_that_can_become_smaller(name, workshop, run):
    with serving(name) as disk:
        if not at_least("6.16"):
            assert_fails(run("resize", disk.id, "4M"), 1, "needs Linux 6.16, this is", errno.EOPNOTSUPP)
            return
        assert run("resize", disk.id, "4M").status == 0
        with opened(disk.path) as fd:
            data = os.urandom(4096)
            write_at(fd, (4 << 20) - 4096, data)
            assert read_at(fd, (4 << 20) - 4096, 4096) == data
            assert error_of(write_at, fd, 4 << 20, data) == errno.ENOSPC


@kernel
@pytest.mark.parametrize("option", ["--user-copy", "--zero-copy"])
@pytest.mark.parametrize("name", ["stripe", "cow"])      # with map(), and without
def test_targets_through_a_data_path_that_is_not_theirs(name, option, workshop):
    needs("fio")
    lacking = missing(option[2:])
    if lacking:
        disk = Forked(*COMMAND_LINES[name].split(), option)
        assert disk.wait() == 1
        assert_error_line(disk.said(), errno.EOPNOTSUPP, says=f"needs Linux {lacking.since}, this is")
        return
    with serving(name, option, "--queues", 2) as disk:
        fio_verify(disk.path, SMALL_JOBS)


# =================================================================================================
# Companion: disks of several files, overlays and faults
# =================================================================================================


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """A directory to work in with files of 1 MiB."""
    monkeypatch.chdir(tmp_path)
    for name in "a.img", "b.img":
        Path(name).write_bytes(bytes(1 << 20))
    Path("both").write_text(f"{tmp_path}/a.img\n{tmp_path}/b.img\n")


@pytest.mark.parametrize("words, status, says, number", [
    ("stripe", 2, "paths", None),
    ("stripe a.img a.img", 1, "named twice", errno.EINVAL),
    ("stripe a.img ./a.img", 1, "named twice", errno.EINVAL),
    ("stripe a.img none.img", 1, "none.img", errno.ENOENT),
    ("stripe a.img b.img --chunk 0", 1, "chunk of 0 bytes", errno.EINVAL),
    ("stripe a.img b.img --chunk 1000", 1, "not a multiple of the block size 512", errno.EINVAL),
    ("stripe a.img b.img --chunk 1G", 1, "smaller than a chunk", errno.EINVAL),
    ("stripe a.img b.img --chunk some", 2, "--chunk", None),
    ("mirror", 2, "paths", None),
    ("mirror none.img", 1, "none.img", errno.ENOENT),
    ("mirror a.img a.img", 1, "named twice", errno.EINVAL),
    ("mirror a.img b.img --state both", 1, "all legs hold old data", errno.EINVAL),
    ("cow", 2, "base", None),
    ("cow a.img", 2, "overlay", None),
    ("cow a.img a.img", 1, "named twice", errno.EINVAL),
    ("cow none.img x.cow", 1, "none.img", errno.ENOENT),
    ("cow . x.cow", 1, "neither a file nor a block device", errno.EINVAL),
    ("cow a.img .", 1, "", None),
    ("cow a.img none/x.cow", 1, "none/x.cow", errno.ENOENT),
    ("fault", 2, "a target is missing", None),
    ("fault loop", 2, "path", None),
    ("fault loop none.img", 1, "none.img", errno.ENOENT),
    ("fault --on raed ram", 1, "no such operation", errno.EINVAL),
    ("fault --error EWHAT ram", 1, "there is no such errno", errno.EINVAL),
    ("fault --error errorcode ram", 1, "there is no such errno", errno.EINVAL),
    ("fault --range 2M-1M ram", 1, "not a range of bytes", errno.EINVAL),
    ("fault --range here ram", 1, "not a range of bytes", errno.EINVAL),
    ("fault --rate 7 ram", 1, "not a share from 0 to 1", errno.EINVAL),
    ("fault --rate nan ram", 1, "not a share from 0 to 1", errno.EINVAL),
    ("fault --rate often ram", 2, "--rate", None),
    ("fault --delay=-1s ram", 1, "time -1s", errno.EINVAL),
    ("fault --delay nan ram", 1, "time nan", errno.EINVAL),
    ("fault --jitter soon ram", 1, "time soon", errno.EINVAL),
    ("fault --after all ram", 2, "--after", None),
    ("fault --seed x ram", 2, "--seed", None),
])
def test_bad_words_for_disks_of_several_files(two_files, no_driver, run, words, status, says, number):
    assert_fails(run(*words.split()), status, says, number)


class Writers:
    """Four threads that change a disk at random, each its own part, and know what must be on it."""

    def __init__(self, content):
        self.expected = bytearray(content)
        self.part = len(content) // 4
        self.under_way = {}                 # thread -> offset and data of the request that may be lost
        self.done = 0

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
        try:
            with opened(path) as fd:
                while not self.stopping:
                    size = self.unit * random.randint(1, (32 << 10) // self.unit)
                    room = (self.part - size) // self.unit
                    self._change(fd, number, number * self.part + self.unit * random.randrange(room), size)
        except OSError:
            pass

    def _change(self, fd, number, offset, size):
        kind = random.choice(["write"] * 4 + ["zero", "discard"])
        data = random.randbytes(size) if kind == "write" else bytes(size)
        self.under_way[number] = offset, data
        if kind == "write":
            if write_at(fd, offset, data) < size:
                raise OSError(errno.EIO, "short")
        else:
            fcntl.ioctl(fd, {"zero": 0x127F, "discard": 0x1277}[kind], struct.pack("=QQ", offset, size))
        self.expected[offset:offset + size] = data
        del self.under_way[number]
        self.done += 1
        if random.random() < 0.2:
            os.fsync(fd)

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


@pytest.mark.parametrize("count, chunk", [(1, 512), (2, 512), (3, 1536), (4, 4096)])
def test_a_stripes_ranges_are_the_same_by_chunk_and_by_leg(targets, tmp_path, count, chunk):
    stripe = targets.Stripe(*files(tmp_path, count, 16 << 10), chunk=chunk)
    assert stripe.size == (16 << 10) // chunk * chunk * count
    seen = set()
    for start in range(0, stripe.size, 512):
        for end in range(start + 512, stripe.size + 512, 1536):
            one = [stripe.place(at) for at in range(start, end, 512)]
            other = [(leg, at + more) for leg, at, length in stripe.spans(start, end - start)
                     for more in range(0, length, 512)]
            assert sorted((leg.path, at) for leg, at, _ in one) == sorted((leg.path, at) for leg, at in other)
            assert all(512 <= room <= chunk for _, _, room in one)
            seen |= {(leg.path, at) for leg, at, _ in one}
    assert len(seen) == stripe.size // 512          # no two places of the disk are one of a leg
    stripe.close()


@kernel
@pytest.mark.parametrize("chunk", [512, 12 << 10, 64 << 10])
@pytest.mark.parametrize("data_path", ["copy", None])
def test_chunks_of_a_stripe_lie_where_they_should(targets, tmp_path, chunk, data_path):
    paths = files(tmp_path, 3, 256 << 10)
    target = targets.Stripe(*paths, chunk=chunk)
    with ublk.Device(target, data_path=data_path) as disk, opened(disk.path) as fd:
        data = os.urandom(target.size)
        for at in range(0, len(data), 250 << 10):
            write_at(fd, at, data[at:at + (250 << 10)])
        os.fsync(fd)
        assert content_of(fd) == data
    chunks = [data[at:at + chunk] for at in range(0, len(data), chunk)]
    for number, path in enumerate(paths):
        mine = b"".join(chunks[number::3])
        assert Path(path).read_bytes()[:len(mine)] == mine


@kernel
def test_a_disk_of_files_that_were_made_longer_can_become_larger(targets, tmp_path):
    if not at_least("6.16"):
        return
    for make, count in (targets.Stripe, 2), (targets.Loop, 1):
        with ublk.Device(make(*files(tmp_path, count, (2 << 20) // count))) as disk, opened(disk.path) as fd:
            for path in tmp_path.glob("*.img"):
                os.truncate(path, 4 << 20)
            disk.resize(4 << 20)
            data = os.urandom(3 << 20)
            assert read_at(fd, 2 << 20, 1 << 20) == bytes(1 << 20)
            write_at(fd, 1 << 20, data)
            assert read_at(fd, 1 << 20, 3 << 20) == data


@kernel
def test_behind_the_end_of_its_base_an_overlay_has_nothing(targets, tmp_path):
    if not at_least("6.16"):
        return
    base, = files(tmp_path, 1, 1 << 20)
    overlay = str(tmp_path / "x.cow")
    with ublk.Device(targets.Cow(base, overlay)) as disk, opened(disk.path) as fd:
        disk.resize(2 << 20)
        for function, what in ((read_at, 4096), (write_at, bytes(4096))):
            assert error_of(function, fd, 1 << 20, what) == errno.EIO
    targets.Cow(base, overlay).close()              # which checks it


# ---- mirror -------------------------------------------------------------------------------------


@pytest.fixture
def quick_rebuild(targets, monkeypatch):
    """Have mirrors look for their legs more often."""
    monkeypatch.setattr(targets.Mirror, "retry", 0.2)


def dropped(mirror):
    """Return the legs that a mirror does not use."""
    return [leg.path for leg in mirror.legs if leg.why]


@contextmanager
def failing_leg(targets, workshop):
    """Serve b.img as a disk that fails as the file `fail` says."""
    target = targets.Fault(targets.Loop("b.img", direct=True), control="fail")
    with ublk.Device(target) as leg:
        yield leg.path


@kernel
def test_a_failing_leg_is_dropped_and_rebuilt_under_load(targets, workshop, quick_rebuild, capfd):
    with failing_leg(targets, workshop) as leg:
        mirror = targets.Mirror(leg, "a.img", rebuild=True, state="state", direct=True)
        with ublk.Device(mirror) as disk:
            writers = Writers(bytes(8 << 20))
            writers.work(disk.path)
            for words in "--error EIO", "--error EIO --torn --rate 0.2 --on write":
                writers.busy()
                Path("fail").write_text(words)
                until(lambda: leg in dropped(mirror), "the leg to be dropped")
                writers.busy()
                assert Path("state").read_text() == leg + "\n"
                Path("fail").write_text("--delay 20ms")         # so that much is written meanwhile
                until(lambda: not dropped(mirror), "the leg to be rebuilt")
            writers.busy()
            assert writers.finish(), "a request has failed"
            writers.check(disk.path)
    told = capfd.readouterr().err
    assert f"ublk: mirror: dropped {leg}" in told and told.count(f"ublk: mirror: rebuilt {leg}\n") == 2
    assert Path("state").read_text() == ""
    assert digest("a.img") == digest("b.img")


def test_a_rebuild_copies_nothing_that_a_request_changes(targets, tmp_path):
    good, leg = files(tmp_path, 2, 2 << 20)
    mirror = targets.Mirror(good, leg, state=str(tmp_path / "state"))
    request = object()
    assert mirror._enter(request, 4096, 8192) == mirror.legs
    copy = threading.Thread(target=mirror._copy, args=(0, 1 << 20, mirror.legs[1].disk.fd))
    copy.start()
    until(lambda: mirror.copying == (0, 1 << 20), "the copy to begin")
    assert mirror._enter(object(), (1 << 20) - 512, 1 << 20) == []      # this request has to wait ...
    assert mirror._enter(object(), 1 << 20, 2 << 20) == mirror.legs     # ... and this one has not
    patched(good, 4096, b"x" * 4096)
    del mirror.writing[request]
    copy.join()
    assert Path(leg).read_bytes()[4096:8192] == b"x" * 4096
    assert mirror._enter(object(), 0, 512) == mirror.legs
    mirror.close()


@kernel
def test_a_leg_that_was_away_is_not_believed_until_it_is_rebuilt(targets, workshop, quick_rebuild, capfd):
    def value(*paths, **options):
        mirror = targets.Mirror(*paths, state="state", **options)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            until(lambda: not options.get("rebuild") or not dropped(mirror), "the rebuild")
            write_at(fd, 8192, next(numbers))
            return read_at(fd, 4096, 4096), dropped(mirror)

    numbers = iter(bytes([number]) * 4096 for number in range(1, 9))
    os.rename("b.img", "away")
    assert value("b.img", "a.img") == (bytes(4096), ["b.img"])
    assert "ublk: mirror: dropped b.img: " in capfd.readouterr().err
    os.rename("away", "b.img")
    with open("a.img", "r+b") as file:
        file.seek(4096)
        file.write(b"x" * 4096)
    assert value("b.img", "a.img") == (b"x" * 4096, ["b.img"])
    os.rename("a.img", "away")                      # the only good one
    assert error_of(lambda: targets.Mirror("b.img", "a.img", state="state")) == errno.ENOENT
    os.rename("away", "a.img")
    assert value("b.img", "a.img", rebuild=True) == (b"x" * 4096, [])
    assert digest("a.img") == digest("b.img")


@kernel
def test_what_one_leg_cannot_read_another_does(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        mirror = targets.Mirror(leg, "a.img", state="state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
            Path("fail").write_text("--error EIO --on read")
            assert read_at(fd, 0, 4096) == b"x" * 4096 and dropped(mirror) == [leg]


@kernel
def test_a_rebuild_reads_from_a_leg_that_can(targets, workshop, quick_rebuild, capfd):
    shutil.copy("a.img", "c.img")
    patched("a.img", 1 << 20, b"x" * 4096)
    patched("b.img", 1 << 20, b"x" * 4096)
    Path("state").write_text(os.path.abspath("c.img\n"))
    with failing_leg(targets, workshop) as leg:
        Path("fail").write_text("--error EIO --on read")
        mirror = targets.Mirror(leg, "a.img", "c.img", state="state", rebuild=True, direct=True)
        with ublk.Device(mirror):
            until(lambda: dropped(mirror) == [leg], "the rebuild")
    assert digest("c.img") == digest("a.img")
    told = capfd.readouterr().err
    assert f"ublk: mirror: dropped {leg}: " in told and "dropped a.img" not in told


def test_a_leg_is_known_by_any_name(targets, two_files):
    os.symlink("b.img", "link")
    Path("state").write_text(os.path.abspath("b.img\n"))
    for name in "b.img", "./b.img", os.path.abspath("b.img"), "link":
        mirror = targets.Mirror("a.img", name, state="state")
        assert dropped(mirror) == [name]
        mirror.close()
    assert targets.Mirror("a.img", "b.img").state == targets.Mirror("./link", "a.img").state


def test_of_two_legs_that_fail_at_once_one_stays(targets, two_files):
    mirror, refused = targets.Mirror("a.img", "b.img", state="state"), []

    def drop(leg):
        try:
            mirror._drop({leg: OSError(errno.EIO, leg.path)})
        except OSError as error:
            refused.append(str(error))
    threads = [threading.Thread(target=drop, args=(leg,)) for leg in mirror.legs]
    with mirror.lock:                   # both find two good legs, unless they look with the lock held
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    good, = mirror.good()
    assert refused == [f"[Errno {errno.EIO}] {good.path}"]
    mirror.close()


@kernel
def test_no_write_ends_well_before_a_dropped_leg_is_noted(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        os.mkdir("notes")
        mirror = targets.Mirror(leg, "a.img", state="notes/state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            os.rename("notes", "away")
            Path("notes").write_text("a file where the directory was")
            Path("fail").write_text("--error EIO --on write")
            for _ in range(3):
                assert error_of(write_at, fd, 0, b"x" * 4096) == errno.EIO
            os.unlink("notes")
            os.rename("away", "notes")
            write_at(fd, 0, b"x" * 4096)
            assert Path("notes/state").read_text() == leg + "\n" and dropped(mirror) == [leg]


@kernel
def test_the_last_leg_is_not_dropped(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        Path("state").write_text(os.path.abspath("a.img\n"))
        mirror = targets.Mirror(leg, "a.img", state="state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            Path("fail").write_text("--error EIO")
            assert error_of(read_at, fd, 0, 4096) == error_of(write_at, fd, 0, bytes(4096)) == errno.EIO
            os.unlink("fail")
            assert read_at(fd, 0, 4096) == bytes(4096) and dropped(mirror) == ["a.img"]


# ---- cow ----------------------------------------------------------------------------------------


def patched(path, offset, data):
    """Change bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def overlay_of(targets, directory):
    """Make an overlay that has the sectors 3 to 5 of a base of 1 MiB; return both paths."""
    base, overlay = directory / "base.img", directory / "x.cow"
    base.write_bytes(b"b" * (1 << 20))
    cow = targets.Cow(str(base), str(overlay))
    os.pwrite(cow.top.fd, b"o" * 1536, cow.data_at + 1536)
    cow._mark(cow.blocks(1536, 1536))
    cow.close()
    return str(base), str(overlay)


def test_an_overlay_remembers_its_blocks(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    assert list(cow.runs(0, 8192)) == [(False, 0, 1536), (True, 1536, 1536), (False, 3072, 5120)]
    assert list(cow.runs(2048, 512)) == [(True, 2048, 512)]
    assert list(cow.runs(0, 1 << 20))[-1] == (False, 3072, (1 << 20) - 3072)
    cow._mark(cow.blocks(0, 1 << 20))
    assert list(cow.runs(512, 1 << 19)) == [(True, 512, 1 << 19)]
    cow.close()


def start_machine_anew(targets, overlay):
    """Have an overlay believe that the machine was started since it was last open."""
    header = targets.COW_HEADER
    *sizes, _ = header.unpack(overlay.read_bytes()[:header.size])
    patched(overlay, 0, header.pack(*sizes, b"an earlier boot".ljust(36)))


def test_after_a_loss_of_power_only_durable_blocks_count(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    cow._mark(cow.blocks(0, 2048))                  # of it 512 bytes are there for good
    shutil.copy(overlay, tmp_path / "y.cow")
    cow.close()
    start_machine_anew(targets, tmp_path / "y.cow")
    cow = targets.Cow(base, str(tmp_path / "y.cow"))
    assert list(cow.runs(0, 4096)) == [(False, 0, 1536), (True, 1536, 1536), (False, 3072, 1024)]
    cow.close()


def test_committing_writes_the_overlay_into_the_base(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    for _ in range(2):                              # harmless when it is done again
        cow = targets.Cow(base, overlay, commit=True)
        assert list(cow.runs(0, 1 << 20)) == [(False, 0, 1 << 20)]
        assert os.stat(overlay).st_blocks * 512 < 512 << 10
        cow.close()
        assert Path(base).read_bytes() == b"b" * 1536 + b"o" * 1536 + b"b" * ((1 << 20) - 3072)


@pytest.mark.parametrize("damage, says", [
    (lambda path: patched(path, 0, b"x"), "not an overlay, or a damaged one"),
    (lambda path: patched(path, 20, b"x"), "not an overlay, or a damaged one"),
    (lambda path: patched(path, 8, bytes(100)), "not an overlay, or a damaged one"),
    (lambda path: Path(path).write_bytes(b"text\n" * 1024), "not an overlay, or a damaged one"),
    (lambda path: Path(path).write_bytes(bytes(512)), "its end is missing"),
    (lambda path: os.truncate(path, 512), "its end is missing"),
    (lambda path: os.truncate(path, 1 << 20), "its end is missing"),
    (lambda path: os.truncate(path, 1000), "not a multiple of 512"),
    (lambda path: os.truncate(Path(path).with_name("base.img"), 1 << 19), "made for a base of 1048576 bytes"),
], ids=range(9))
def test_a_damaged_overlay_is_refused(targets, tmp_path, damage, says):
    base, overlay = overlay_of(targets, tmp_path)
    damage(overlay)
    assert says in message(targets.Cow, base, overlay)
    if "base" not in says:
        assert Path(base).read_bytes() == b"b" * (1 << 20)


def test_an_overlay_has_one_server(targets, tmp_path):
    base, overlay = overlay_of(targets, tmp_path)
    cow = targets.Cow(base, overlay)
    assert "another server uses it" in message(targets.Cow, base, overlay)
    cow.close()
    targets.Cow(base, overlay).close()


def test_of_two_flushes_at_once_each_waits_for_the_marks(targets, tmp_path):
    class Pause:
        def __await__(self):
            yield

    async def flush():
        await Pause()
    cow = targets.Cow(*overlay_of(targets, tmp_path))
    written = cow.blocks(0, 512)
    cow._mark(written)
    cow.top.flush = flush
    first, second = cow.flush(), cow.flush()
    first.send(None)                    # makes data durable
    second.send(None)
    second.send(None)                   # is about to make the marks durable, while the first is behind
    assert cow._marks(written) == targets.KEPT
    now(second)
    first.send(None)
    now(first)
    assert not cow.fresh
    cow.close()


def kill_overlays(directory, rounds, progress=bool):
    """Kill servers of an overlay at random moments, also while they start; return what was written."""
    base, overlay = directory / "base.img", directory / "overlay.cow"
    base.write_bytes(random.randbytes(4 << 20))
    content, early = base.read_bytes(), 0
    writers = Writers(content)
    for number in range(rounds):
        with Forked("cow", base, overlay).live() as disk:
            writers.work(disk.path)
            before = writers.done
            until(lambda before=before: writers.done > before, "something to be written")
            time.sleep(random.random() / 4)
            disk.kill()
            writers.finish()
        delete_all()
        if random.random() < 0.5:
            disk = Forked("cow", base, overlay)
            time.sleep(random.random() / 4)
            early += not disk.said(disk.output)
            disk.kill()
            delete_all()
        with Forked("cow", base, overlay) as disk:
            writers.check(disk.path)
        progress(number)
    assert base.read_bytes() == content
    with Forked("cow", base, overlay, "--commit") as disk:
        assert digest(disk.path) == hashlib.sha256(writers.expected).hexdigest()
    assert base.read_bytes() == writers.expected
    return {"writes": writers.done, "killed while starting": early}


def delete_all():
    """Delete every device."""
    with ublk.Control() as control:
        for dev_id in devices_left():
            ublk.delete(control, dev_id)


@kernel
def test_an_overlay_survives_kills_at_random_moments(workshop):
    (workshop / "kills").mkdir()
    assert kill_overlays(workshop / "kills", 10)["writes"] > 10


def server_dies_in(item, method):
    """Serve an overlay, write a block and flush; the server dies in a method it calls meanwhile."""
    change = lambda: replace(item, **{method: lambda *_: die()})        # noqa: E731
    with Forked("cow", "base.img", "x.cow", "--no-partition-scan", change=change) as disk:
        with opened(disk.path) as fd:
            assert error_of(write_at, fd, 8192, b"x" * 4096) or error_of(os.fsync, fd)
        disk.wait()
    delete_all()


@kernel
@pytest.mark.parametrize("step", ["Loop.write", "Cow._mark"])
def test_an_overlay_has_no_block_before_its_data(targets, workshop, step):
    name, method = step.split(".")
    server_dies_in(getattr(targets, name), method)
    with Forked("cow", "base.img", "x.cow") as disk:
        assert digest(disk.path) == digest("base.img")


@kernel
def test_an_overlay_has_no_block_for_good_before_a_flush(targets, workshop):
    server_dies_in(targets.Loop, "flush")
    shutil.copy("x.cow", "y.cow")
    start_machine_anew(targets, workshop / "y.cow")
    with Forked("cow", "base.img", "y.cow") as disk:
        assert digest(disk.path) == digest("base.img")
    for _ in range(2):                              # nothing is lost without a loss of power, nor later
        with Forked("cow", "base.img", "x.cow") as disk, opened(disk.path) as fd:
            assert read_at(fd, 8192, 4096) == b"x" * 4096
        start_machine_anew(targets, workshop / "x.cow")


@kernel
def test_an_overlay_is_committed_or_deleted(workshop):
    shutil.copy("base.img", "mine.img")
    data = os.urandom(64 << 10)
    for words, expected in (([], data), (["--commit"], data), ([], data)):
        with Forked("cow", "mine.img", "mine.cow", *words) as disk, opened(disk.path) as fd:
            if not words and expected != read_at(fd, 1 << 20, len(data)):
                write_at(fd, 1 << 20, data)
            assert read_at(fd, 1 << 20, len(data)) == expected
        assert (digest("mine.img") == digest("base.img")) == (not words and not Path("done").exists())
        if words:
            Path("done").touch()
    with Forked("cow", "base.img", "other.cow") as disk, opened(disk.path) as fd:
        write_at(fd, 1 << 20, data)
    os.unlink("other.cow")
    with Forked("cow", "base.img", "other.cow") as disk:
        assert digest(disk.path) == digest("base.img")


@kernel
def test_a_recovered_server_does_not_commit_again(workshop):
    shutil.copy("base.img", "mine.img")
    words = "fault --delay 1us cow mine.img mine.cow --commit -r reissue".split()
    with Forked(*words) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
        disk.kill()
        disk = recovered(disk)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == b"x" * 4096
        assert disk.kill(signal.SIGTERM) == 0
    assert digest("mine.img") == digest("base.img")


@kernel
def test_an_overlay_without_room_fails_writes_only(workshop, tmp_path):
    with mount_of("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=1M") as directory:
        with Forked("cow", "base.img", directory / "x.cow") as disk, opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
            assert error_of(write_at, fd, 2 << 20, os.urandom(1 << 20)) == errno.ENOSPC
            base = Path("base.img").read_bytes()
            for offset in (1 << 20, 7 << 20):       # their marks lie in pages the file system has no more
                assert read_at(fd, offset, 4096) == base[offset:][:4096]
            assert read_at(fd, 0, 8192) == b"x" * 4096 + base[4096:8192]
            assert disk.ended() is False


# ---- fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, name, args, written, expected", [
    ({}, "read", (0, bytes(512)), 0, True), ({}, "flush", (), 0, True),
    ({"on": "read"}, "write", (0, bytes(512)), 0, False),
    ({"on": "flush,write"}, "write_fua", (0, bytes(512)), 0, True),
    ({"on": "discard"}, "discard", (0, 512), 0, True),
    ({"range": "1M"}, "read", ((1 << 20) - 512, bytes(512)), 0, False),
    ({"range": "1M"}, "read", ((1 << 20) - 512, bytes(1024)), 0, True),
    ({"range": "1M"}, "read", ((1 << 20) + 512, bytes(512)), 0, False),
    ({"range": "1M-2M"}, "write_zeroes", ((1 << 20) + 512, 512, True), 0, True),
    ({"range": "1M-2M"}, "write_zeroes", (2 << 20, 512, True), 0, False),
    ({"range": "1M-2M"}, "flush", (), 0, False),
    ({"range": "0"}, "zone_reset", (0,), 0, True),
    ({"after": 4096}, "write", (0, bytes(512)), 4095, False),
    ({"after": 4096}, "write", (0, bytes(512)), 4096, True),
])
def test_which_requests_a_fault_is_for(targets, options, name, args, written, expected):
    rule = targets.Fault(targets.Ram(size=4 << 20), **options).rule
    assert rule.matches(name, args, written) is expected


@pytest.mark.parametrize("text, number", [("0", 0), ("2", 2), ("1.5s", 1.5), ("10ms", 0.01), ("200us", 2e-4)])
def test_times(targets, text, number):
    assert targets.seconds(text) == pytest.approx(number)


def test_a_wrapper_offers_what_its_target_does(targets, tmp_path):
    path, = files(tmp_path, 1, 1 << 20)
    for below in (Ram(), Recorder(), targets.Ram(size=1 << 20), targets.Loop(path), targets.Stripe(path)):
        above = targets.Fault(targets.Fault(below))
        for name in targets.HANDLERS + targets.PROPERTIES:
            assert hasattr(above, name) == hasattr(below, name), name
        assert not hasattr(above, "map"), "requests would go around it"
        assert above.size == below.size


def in_flight(disk):
    """Return how many reads and writes a disk has been asked for and has not answered."""
    return sum(map(int, Path(f"/sys/block/{os.path.basename(disk.path)}/inflight").read_text().split()))


@kernel
def test_faults_are_where_and_what_they_are_told(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="read", range="64K-96K", error="EIO")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert write_at(fd, 64 << 10, b"x" * 4096) == 4096
        found = [error_of(read_at, fd, at << 10, 4096) for at in (60, 64, 92, 96)]
        assert found == [0, errno.EIO, errno.EIO, 0]
        assert error_of(read_at, fd, 0, 128 << 10) == errno.EIO


@kernel
def test_the_same_seed_makes_the_same_faults(targets):
    def faults(seed):
        fault = targets.Fault(targets.Ram(size=4 << 20), on="write", rate=0.3, error="EIO", seed=seed)
        with ublk.Device(fault) as disk, opened(disk.path) as fd:
            return [number for number in range(64) if error_of(write_at, fd, 0, bytes(512)) == errno.EIO]
    first = faults(1)
    assert 5 < len(first) < 40
    assert faults(1) == first != faults(2)


@kernel
def test_a_disk_that_is_full(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="write", after=1 << 20, error="ENOSPC")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        found = [error_of(write_at, fd, at << 20, b"x" * (512 << 10)) for at in range(4)]
        assert found == [0, 0, errno.ENOSPC, errno.ENOSPC]
        assert read_at(fd, 1 << 20, 512 << 10) == b"x" * (512 << 10)


@kernel
@pytest.mark.parametrize("error", ["EIO", ""])
def test_torn_writes_stop_somewhere(targets, error):
    fault = targets.Fault(targets.Ram(size=4 << 20), on="write", torn=True, error=error)
    kept = set()
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        for at in range(0, 1 << 20, 64 << 10):
            assert error_of(write_at, fd, at, b"n" * 8192) == (errno.EIO if error else 0)
            found = read_at(fd, at, 8192)
            kept.add(found.count(b"n"))
            assert found == b"n" * found.count(b"n") + bytes(8192 - found.count(b"n"))
    assert len(kept) > 3 and max(kept) < 8192 and not any(count % 512 for count in kept)


@kernel
def test_what_is_lost_never_happens(targets):
    below = Recorder()
    fault = targets.Fault(targets.Fault(below, on="flush", lost=True), on="write", range="0-8K", lost=True)
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert write_at(fd, 0, b"x" * 4096) == write_at(fd, 8192, b"x" * 4096) == 4096
        os.fsync(fd)
        assert read_at(fd, 0, 16384) == bytes(8192) + b"x" * 4096 + bytes(4096)
    assert below.calls == [("write", 8192, 4096)]


@kernel
def test_a_slow_sector_delays_only_its_requests(targets):
    fault = targets.Fault(targets.Ram(size=4 << 20), range="1M", delay="300ms", jitter="10ms")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        order = []

        def slow():
            begun = time.monotonic()
            assert len(read_at(fd, 1 << 20, 512)) == 512
            order.append("slow")
            assert time.monotonic() - begun >= 0.3  # never less: machines are only slower than they should be
        thread = threading.Thread(target=slow)
        thread.start()
        until(lambda: in_flight(disk), "the request")
        read_at(fd, 0, 512)
        order.append("quick")
        thread.join()
        assert order == ["quick", "slow"]


@kernel
def test_a_fault_changes_while_it_runs(targets, workshop, capfd):
    fault = targets.Fault(targets.Ram(size=4 << 20), control="ctl", error="EIO", on="write")
    with ublk.Device(fault) as disk, opened(disk.path) as fd:
        assert error_of(write_at, fd, 0, bytes(512)) == errno.EIO
        for words, error in (("", 0), ("--error ENOSPC", errno.ENOSPC), ("--on read --error EIO", 0),
                             ("--nonsense", 0), ("--error NONSENSE", 0), ("'", 0)):
            Path("ctl").write_text(words)
            assert error_of(write_at, fd, 0, bytes(512)) == error, words
        assert capfd.readouterr().err.count("ctl is ignored: ") == 3
        os.unlink("ctl")
        assert error_of(write_at, fd, 0, bytes(512)) == errno.EIO


@kernel
def test_a_request_hangs_until_told(targets, workshop):
    below = Recorder()
    fault = targets.Fault(below, control="ctl")
    with ublk.Device(fault, partition_scan=False) as disk, opened(disk.path) as fd:
        Path("ctl").write_text("--hang --on write")
        thread = threading.Thread(target=write_at, args=(fd, 0, b"x" * 4096))
        thread.start()
        until(lambda: in_flight(disk), "the request")
        assert read_at(fd, 0, 4096) == bytes(4096) and below.calls == []
        Path("ctl").write_text("--hang --on discard")
        thread.join()
        assert read_at(fd, 0, 4096) == b"x" * 4096


@kernel
def test_a_disk_that_hangs_can_be_taken_away(targets, capfd):
    disk = ublk.Device(targets.Fault(Ram(), hang=True, on="write"))
    disk.start()
    found = []
    with opened(disk.path) as fd:
        thread = threading.Thread(target=lambda: found.append(error_of(write_at, fd, 0, bytes(512))))
        thread.start()
        until(lambda: in_flight(disk), "the request")
        stopper = threading.Thread(target=lambda: disk.stop(timeout=1))
        stopper.start()
        thread.join()
    stopper.join()
    assert found == [errno.EIO] and "its requests fail now" in capfd.readouterr().err
