#!/usr/bin/env python3
"""Try every crash of programs that keep data well or badly, and see that just the bad ones are found.

    proof.py [-k WORD] [--seeds N] [--jobs N] [--record ARCHIVE | --recorded ARCHIVE]

As root. The programs, and what is to be found of each, are in bugs.py. A program works on a recorded disk,
once, which needs a ublk driver; then each crash of that disk that may happen is looked at, for each seed,
which does not. Prints the table of README.md and, on standard error, each seed that has found something else.
The exit status is 1 if there is one.
"""
from __future__ import annotations

import argparse
import errno
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bugs import TABLE, Row, fsync

import ublk
import ublk_targets

BLOCK = 4096        # of disks with a file system: ext4's superblock of 1024 bytes must not be torn
DAMAGE = {errno.EIO, errno.EBADMSG, errno.EUCLEAN}      # how file systems answer for what is no longer right
HEAD = """\
| Program | Settings | What must hold | Found | At entry |
|---|---|---|---|---|"""


class Found(NamedTuple):
    """What came of one seed: the first crash that was bad, if any, and how many were looked at."""
    wrong: str                      # "" if nothing is
    entry: int                      # the last one before that crash
    kind: str                       # of that entry
    state: str
    points: int
    states: int


# ---- recording -------------------------------------------------------------------------------------------

def record(row: Row, log: Path) -> None:
    """Have a program work on a recorded disk, in the lab or where else the tests can run."""
    from tests.support import mount_of, sh

    system = row.file_system
    ram = ublk_targets.Ram(size=ublk.Size(system.size if system else 1 << 20))
    ram.block_size = BLOCK if system else 512
    disk = ublk_targets.Record(str(log), ram)
    with ublk.Device(disk) as device:
        if system is None:
            return work(row, Path(device.path), disk, device.path)
        sh(*system.mkfs.split(), device.path)
        options = ["-o", system.options] if system.options else []
        with mount_of(device.path, log.with_name("mnt"), *options) as place:
            return work(row, place, disk, device.path)


def work(row: Row, place: Path, disk: Any, path: str) -> None:
    """Have a program work; before the first mark and after the last there is nothing to look at."""
    row.program.begin(place)
    os.sync()
    fsync(Path(path))                                               # also where no file system would flush
    disk.mark("0")
    row.program.work(place, lambda number: disk.mark(str(number)))
    disk.mark("end")


def window(log: Path) -> tuple[int, int]:
    """Return the first and the last entry to look at."""
    with closing(ublk_targets.Log(log)) as opened:
        marks = [entry.number for entry in opened.entries() if entry.kind == "mark"]
    return marks[0], marks[-1] - 1


# ---- looking ---------------------------------------------------------------------------------------------

def look(row: Row, image: str, promised: int, place: Path) -> str:
    """Return what is wrong with an image of the disk after a crash, or ""."""
    if row.file_system is None:
        return row.program.look(Path(image), promised)
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", row.file_system.kind, "-o", "loop", image, str(place)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if re.search("unknown filesystem|loop device", done.stderr):    # that says nothing of what is on the disk
        raise RuntimeError(done.stderr)
    if done.returncode == 32:                                       # of mount(8): the mount failed
        return "it cannot be mounted"
    done.check_returncode()
    try:
        wrong = row.program.look(place, promised)
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        wrong = f"damaged: {errno.errorcode[error.errno]}"
    finally:
        subprocess.run(["umount", place], check=True)
    return wrong or check(row, image)


def check(row: Row, image: str) -> str:
    """Have a file system's own program check it, where the file system is under test."""
    assert row.file_system
    if not row.title.startswith(row.file_system.kind):
        return ""
    words = [*row.file_system.fsck.split(), image]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return f"{' '.join(words[:-1])} finds damage" if done.returncode else ""


def contents(image: str) -> bytes:
    """Return a digest of the data in an image: the parts of a crash do not tell what was durable before."""
    digest = hashlib.blake2b()
    with open(image, "rb") as file:
        fd, size = file.fileno(), os.path.getsize(image)
        at = ublk_targets.next_data(fd, 0)
        while at < size:
            end = os.lseek(fd, at, os.SEEK_HOLE)
            digest.update(b"%d %d " % (at, end))
            digest.update(os.pread(fd, end - at, at))
            at = ublk_targets.next_data(fd, end)
    return digest.digest()


def search(row: Row, log: Path, seed: int, known: dict[Any, str]) -> Found:
    """Look at crashes until one is bad. What was looked at with another seed is known."""
    points, states = set(), 0
    start, end = window(log)
    for crash in ublk_targets.crashes(log, start=start, to=end, states=row.states, seed=seed):
        points.add(crash.entry.number)
        states += 1
        key = crash.mark, contents(crash.path)
        if key not in known:
            known[key] = look(row, crash.path, int(crash.mark), log.with_name("mnt"))
        if known[key]:
            kind = f"mark {crash.mark}" if crash.entry.kind == "mark" else crash.entry.kind
            return Found(known[key], crash.entry.number, kind, crash.state, len(points), states)
    return Found("", 0, "", "", len(points), states)


def search_all(row: Row, log: Path, seeds: int) -> list[Found]:
    """Look at the crashes of a recorded program, with so many seeds."""
    known: dict[Any, str] = {}
    return [search(row, log, seed, known) for seed in range(1, seeds + 1)]


# ---- the table -------------------------------------------------------------------------------------------

def line(row: Row, found: Sequence[Found]) -> str:
    """Return a row of the table: what the first seed found, and where."""
    first = found[0]
    what, where = f"nothing, {first.states} states of {first.points} crashes", ""
    if first.wrong:
        what, where = first.wrong, f"{first.entry}, {first.kind}, state {first.state}"
    return f"| {row.title} | {row.settings} | {row.holds} | {what} | {where} |"


def as_it_should_be(row: Row, found: Found) -> bool:
    """Tell whether what was found is what is to be found."""
    if not row.finds:
        return not found.wrong
    return bool(re.search(row.finds, found.wrong))


def differing(row: Row, found: Sequence[Found]) -> list[str]:
    """Tell of each seed that found something else than it should."""
    return [f"{row}: seed {seed}: {one}" for seed, one in enumerate(found, 1)
            if not as_it_should_be(row, one)]


def rows_with(word: str) -> list[int]:
    """Return the numbers of the rows that contain a word."""
    return [number for number, row in enumerate(TABLE) if word.lower() in str(row).lower()]


def one(number: int, log: Path, seeds: int) -> int:
    """Record one row, where it is not, and look at it; print it, and on standard error what is wrong."""
    row = TABLE[number]
    log.parent.mkdir(exist_ok=True)
    if not log.exists():
        record(row, log)
    if not seeds:
        print(f"recorded: {row}", file=sys.stderr, flush=True)
        return 0
    found = search_all(row, log, seeds)
    wrong = differing(row, found)
    print(line(row, found))
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def every(rows: Sequence[int], directory: Path, seeds: int, jobs: int) -> int:
    """Try these rows, each in a process of its own; print the table, and return 1 if one is not right."""
    def run(number: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, __file__, f"--row={number}", f"--seeds={seeds}", f"--logs={directory}"]
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)

    status = 0
    with ThreadPoolExecutor(jobs) as pool:
        for number, done in zip(rows, pool.map(run, rows)):
            status |= bool(done.returncode)
            verdict = done.stdout or f"| {TABLE[number].title} | {TABLE[number].settings} | no verdict |\n"
            if seeds:
                print(verdict, end="", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description="Find the bugs of bugs.py, and no others.")
    parser.add_argument("-k", dest="word", default="", help="only rows with this word")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time")
    parser.add_argument("--record", type=Path, metavar="ARCHIVE", help="only record: put the logs there")
    parser.add_argument("--recorded", type=Path, metavar="ARCHIVE", help="look at logs that are there")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--logs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        return one(options.row, options.logs / str(options.row) / "log", options.seeds)
    rows = rows_with(options.word)
    if not rows:
        parser.error(f"no row has {options.word!r}")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)                                  # PostgreSQL does not run as root
        if options.record:
            status = every(rows, Path(directory), 0, options.jobs)
            with tarfile.open(options.record, "w") as archive:
                archive.add(directory, ".")
            return status
        if options.recorded:
            with tarfile.open(options.recorded) as archive:
                archive.extractall(directory)
        print(HEAD, flush=True)
        return every(rows, Path(directory), options.seeds, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
