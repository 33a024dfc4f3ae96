"""The disks that bench.py compares: how each is made and unmade, and what its server costs.

Everything here runs as root in the virtual machine. A disk is made on an ExitStack, which also ends it; its
server is a process of its own, or part of the kernel (pid 0).
"""
from __future__ import annotations

import itertools
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
UBLK = HERE.parent / "ublk.py"
IN_C = HERE / "disks" / "null.c"
OURS, NBD, FUSE, IDLE = (HERE / "disks" / f"{name}.py" for name in ("ours", "nbd", "fuse", "idle"))
BACKING = Path("/scratch")
BACKING_SIZE = 64 << 20
# As the command that pip installs does it; a script, in contrast, is compiled at each start.
COMPILED = ("-c", f"import sys; sys.path.insert(0, {str(UBLK.parent)!r}); import ublk; sys.exit(ublk.main())")
PATIENCE = 120      # seconds for anything to start or end
TICK = os.sysconf("SC_CLK_TCK")
# A Python without a global lock, by the name that its build gives it
FREE_THREADED = os.environ.get("FREE_THREADED") or shutil.which("python3.14t") or shutil.which("python3.13t")
ALL = "r4k1 r4k32 r4k128 w4k128 one128 r64k32 r1m8"
MAIN = "r4k1 r4k128 w4k128 one128 r1m8"


class Failed(Exception):
    """A disk could not be made or measured."""


class Disk(NamedTuple):
    """path: the block device. pid: its server. path_name: ublk.py's data path."""
    path: str
    pid: int = 0
    path_name: str = ""


def run(command: list[str], timeout: float = PATIENCE) -> str:
    """Run a program to its end and return what it printed."""
    return subprocess.run(command, check=True, timeout=timeout, text=True, stdin=subprocess.DEVNULL,
                          capture_output=True).stdout


def serve(stack: ExitStack, command: list[str]) -> tuple[subprocess.Popen[bytes], Any]:
    """Start a server that ends with the stack; return it and the file with its error messages."""
    errors = stack.enter_context(tempfile.TemporaryFile("w+"))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
    stack.callback(end, server)
    return server, errors


def end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
        raise


def wait_for(condition: Callable[[], object], server: subprocess.Popen[bytes], errors: Any,
             what: str) -> None:
    """Wait until something is there; fail when its server ends or it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if server.poll() is not None or time.monotonic() > deadline:
            errors.seek(0)
            raise Failed(f"{what} did not come: {errors.read().strip()}")
        time.sleep(0.02)


def announced(server: subprocess.Popen[bytes], errors: Any) -> dict[str, Any]:
    """Return what a server prints of its disk, as JSON, once it is there."""
    assert server.stdout
    text = b""
    while not text.endswith(b"}\n"):
        ready = select.select([server.stdout], [], [], PATIENCE)[0]
        piece = os.read(server.stdout.fileno(), 65536) if ready else b""
        if not piece:
            errors.seek(0)
            raise Failed(errors.read().strip() or "it does not start")
        text += piece
    shown: dict[str, Any] = json.loads(text)
    return shown


# ---- kinds of disks --------------------------------------------------------------------------------------

def ours(*words: str, launcher: Sequence[str] = (str(UBLK),),
         python: str = "python3") -> Callable[[ExitStack], Disk]:
    """A disk of ublk.py; launcher: what python is told to run."""
    def start(stack: ExitStack) -> Disk:
        words_here = with_file(stack, words)
        server, errors = serve(stack, [python, *launcher, *words_here, "--json"])
        shown = announced(server, errors)
        return Disk(shown["path"], server.pid, data_path(shown["flags"]))
    return start


def data_path(flags: list[str]) -> str:
    """Return the name of ublk.py's data path for a disk's flags."""
    names = {"AUTO_BUF_REG": "auto-zero-copy", "SUPPORT_ZERO_COPY": "zero-copy", "USER_COPY": "user-copy",
             "NEED_GET_DATA": "get-data"}
    path = next((name for flag, name in names.items() if flag in flags), "copy")
    return path + (" batch" if "BATCH_IO" in flags else "")


def in_c(stack: ExitStack) -> Disk:
    """A null disk of ublk whose server is written in C."""
    program = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "null"
    run(["gcc", "-O2", f"-I{os.environ['UBLK_HEADERS']}", "-o", str(program), str(IN_C), "-luring"])
    server, errors = serve(stack, [str(program)])
    return Disk(announced(server, errors)["path"], server.pid)


def null_blk(stack: ExitStack, **attributes: int) -> Disk:
    """The kernel's own null disk (queue_mode 2: multi-queue; irqmode 0: completed at once)."""
    run(["modprobe", "-a", "configfs", "null_blk"])
    config = Path("/sys/kernel/config")
    if not (config / "nullb").exists():
        run(["mount", "-t", "configfs", "configfs", str(config)])
    home = config / "nullb" / f"bench{next(numbers)}"
    home.mkdir()
    stack.callback(home.rmdir)
    attributes = {"size": 1024, "blocksize": 512, "hw_queue_depth": 128, "queue_mode": 2, "irqmode": 0,
                  **attributes}
    for name, value in attributes.items():
        (home / name).write_text(str(value))
    (home / "power").write_text("1")
    stack.callback((home / "power").write_text, "0")
    index = (home / "index").read_text().strip()
    path = next(path for path in (f"/dev/{home.name}", f"/dev/nullb{index}") if os.path.exists(path))
    return Disk(path)


def loop(stack: ExitStack, path: str = "") -> Disk:
    """The kernel's own loop driver with direct I/O."""
    device = run(["losetup", "--find", "--show", "--direct-io=on", path or backing(stack)]).strip()
    stack.callback(run, ["losetup", "--detach", device])
    return Disk(device)


def nbdkit(*words: str) -> Callable[[ExitStack], Disk]:
    """A disk of nbdkit behind the kernel's NBD client, through a Unix socket."""
    def start(stack: ExitStack) -> Disk:
        number = next(numbers)
        socket, device = f"/run/bench{number}.sock", f"/dev/nbd{number % 16}"
        words_here = with_file(stack, words)
        server, errors = serve(stack, ["nbdkit", "--foreground", "--unix", socket, *words_here])
        wait_for(partial(os.path.exists, socket), server, errors, "nbdkit's socket")
        run(["modprobe", "nbd"])
        run(["nbd-client", "-unix", socket, device])
        stack.callback(run, ["nbd-client", "-d", device])
        return Disk(device, server.pid)
    return start


def fuse(stack: ExitStack) -> Disk:
    """A file of a FUSE file system in Python, behind the kernel's loop driver."""
    run(["modprobe", "fuse"])
    mount = stack.enter_context(tempfile.TemporaryDirectory())
    server, errors = serve(stack, ["python3", str(FUSE), mount])
    wait_for(partial(os.path.exists, f"{mount}/disk"), server, errors, "the file system")
    stack.callback(run, ["umount", mount])
    return Disk(loop(stack, f"{mount}/disk").path, server.pid)


def backing(stack: ExitStack) -> str:
    """A file for one disk alone, written in full; it goes with the disk."""
    path = BACKING / f"bench{next(numbers)}.img"
    stack.callback(path.unlink)
    with open(path, "wb") as file:
        for _ in range(BACKING_SIZE >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    return str(path)


def with_file(stack: ExitStack, words: Sequence[str]) -> list[str]:
    """Return the words of a server with the path of a file for the word BACKING."""
    return [backing(stack) if word == "BACKING" else word for word in words]


numbers = itertools.count()


class Case(NamedTuple):
    """A disk to compare with the first of its group, and the workloads it is good for."""
    group: str
    name: str
    start: Callable[[ExitStack], Disk]
    workloads: str | list[str]


def cases() -> Iterator[Case]:
    """Every disk; the first of a group is what the others are measured by."""
    yield Case("null", "null_blk (kernel)", null_blk, ALL)
    yield Case("null", "ublk server in C", in_c, ALL)
    yield Case("null", "ublk.py null", ours("null"), ALL)
    yield Case("null", "nbdkit null (C)", nbdkit("null", "size=1G"), ALL)
    yield Case("paths", "null_blk (kernel)", null_blk, "r4k128 w4k128 r1m8")
    offered = run(["python3", str(UBLK), "--help"])
    for option in ("--copy", "--need-get-data", "--user-copy", "--zero-copy", "--auto-zero-copy", "--batch"):
        if option in offered:
            yield Case("paths", f"ublk.py null {option}", ours("null", option), "r4k128 w4k128 r1m8")
    yield Case("python", "nbdkit Python plugin", nbdkit("python", str(NBD)), MAIN)
    yield Case("python", "FUSE in Python, kernel loop", fuse, MAIN)
    yield Case("python", "ublk.py ten-line Python", ours(f"{OURS}:Plain"), MAIN)
    yield Case("python", "ublk.py ten-line async", ours(f"{OURS}:Async"), MAIN)
    yield Case("memory", "null_blk with memory (kernel)", partial(null_blk, memory_backed=1), MAIN)
    yield Case("memory", "ublk.py ram", ours("ram", "--size=1G"), MAIN)
    yield Case("memory", "nbdkit memory (C)", nbdkit("memory", "size=1G"), MAIN)
    yield Case("file", "loop (kernel)", loop, MAIN + " w1m8")
    yield Case("file", "ublk.py loop", ours("loop", "BACKING", "--direct"), MAIN + " w1m8")
    yield Case("file", "ublk.py loop --max-io=1M", ours("loop", "BACKING", "--direct", "--max-io=1M"),
               "r1m8 w1m8")
    yield Case("file", "ublk.py loop --copy", ours("loop", "BACKING", "--direct", "--copy"), MAIN + " w1m8")
    yield Case("file", "nbdkit file (C, page cache)", nbdkit("file", "BACKING"), MAIN + " w1m8")
    busy = partial(ours, f"{OURS}:Busy")
    yield Case("scale", "busy Python, 1 queue", busy(), "jobs2")
    yield Case("scale", "busy Python, 2 queues", busy("--queues=2"), "jobs2")
    if FREE_THREADED:
        free = partial(busy, python=FREE_THREADED)
        yield Case("scale", "the same free-threaded, 1 queue", free(), "jobs2")
        yield Case("scale", "the same free-threaded, 2 queues", free("--queues=2"), "jobs2")
    yield Case("queues", "ublk.py null, 1 queue", ours("null"), "jobs2")
    yield Case("queues", "ublk.py null, 4 queues", ours("null", "--queues=4"), "jobs2")


def python_alone(stack: ExitStack) -> None:
    """The measure for how fast a server in Python can start."""
    run(["python3", "-c", "pass"])


CASES: list[Case] = []
STARTS: dict[str, Callable[[ExitStack], Optional[Disk]]] = {
    "python3 -c pass": python_alone,
    "ublk.py null": ours("null"),
    "ublk.py null, compiled before": ours("null", launcher=COMPILED),
    "ublk.py loop": ours("loop", "BACKING"),
    "nbdkit null, nbd-client": nbdkit("null", "size=1G"),
}


def load_cases() -> None:
    """Fill CASES; asks ublk.py which options it has."""
    CASES.extend(case._replace(workloads=str(case.workloads).split()) for case in cases())


# ---- what a server costs ---------------------------------------------------------------------------------

def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:     # it has just ended
            continue
    found = [pid] if pid in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a server so far, all its threads and processes, in user mode and in the kernel."""
    user = system = 0
    for one in family(pid) if pid else ():
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        user, system = user + int(fields[11]), system + int(fields[12])
    return user / TICK, system / TICK


def resident(pid: int) -> float:
    """MiB in memory that are a server's own: not shared ones, such as I/O buffers and the disk of `ram`."""
    total = 0
    for one in family(pid) if pid else ():
        status = Path(f"/proc/{one}/status").read_text()
        sizes = dict(re.findall(r"^(VmRSS|RssShmem):\s+(\d+) kB", status, re.M))
        total += int(sizes.get("VmRSS", 0)) - int(sizes.get("RssShmem", 0))
    return total / 1024


def idle(devices: int, seconds: float) -> dict[str, float]:
    """Serve many null disks, leave them alone, and see how much CPU time they take."""
    with ExitStack() as stack:
        server, errors = serve(stack, ["python3", str(IDLE), str(devices)])
        assert server.stdout
        for _ in range(devices):
            if not server.stdout.readline():
                errors.seek(0)
                raise Failed(errors.read().strip())
        time.sleep(5)
        before = sum(cpu_seconds(server.pid))
        time.sleep(seconds)
        return {"devices": devices, "seconds": seconds, "cpu_seconds": sum(cpu_seconds(server.pid)) - before}


if __name__ == "__main__":
    load_cases()
    print(*(f"{case.group:8}{case.name}" for case in CASES), sep="\n")
