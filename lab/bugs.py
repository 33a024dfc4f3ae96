"""Programs that keep data, some as they should and some not, for `make proof` (see proof.py).

Each has three parts: begin() makes what is there before the first crash; work() changes it, and calls
mark(number) where the first so many changes are promised to last; look() uses it after a crash, and tells
what is wrong, or "". That can be that data are not whole, which no crash may leave, or that something
promised is gone.
"""
from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Mark = Callable[[int], None]


# ---- file systems ----------------------------------------------------------------------------------------

class FileSystem(NamedTuple):
    """How to make, mount and check a file system."""
    kind: str
    size: int                       # of its disk
    mkfs: str
    options: str = ""               # of mount
    fsck: str = ""                  # is run where the file system itself is under test


EXT4 = FileSystem("ext4", 32 << 20, "mkfs.ext4 -q -b 4096 -E nodiscard", "", "e2fsck -fn")
XFS = FileSystem("xfs", 300 << 20, "mkfs.xfs -q -K -s size=4096", "", "xfs_repair -n")
BTRFS = FileSystem("btrfs", 128 << 20, "mkfs.btrfs -q -K", "", "btrfs check")


def fsync(path: Path) -> None:
    """fsync(2) of a file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Make a file; have it durable, if asked."""
    path.write_bytes(data)
    if sync:
        fsync(path)


def others_work(place: Path) -> None:
    """Do what any other program may do at any time: make a file durable, and with it the journal."""
    write(place / "other", b"other")


class Program:
    """A program without settings, as most are."""

    def begin(self, place: Path) -> None:
        """Make what is there before the first crash."""

    def work(self, place: Path, mark: Mark) -> None:
        """Change it; mark(number) once the first so many changes are promised to last."""
        raise NotImplementedError

    def look(self, place: Path, promised: int) -> str:
        """Return what is wrong after a crash, before which so many changes were promised."""
        raise NotImplementedError


@dataclass
class Files(Program):
    """Files made, renamed and removed, each made durable: what a file system promises."""

    def begin(self, place: Path) -> None:
        for name in "ab":
            (place / name).mkdir()
            write(place / name / "0", bytes(5000))

    def work(self, place: Path, mark: Mark) -> None:
        for number in (1, 2, 3):
            here = place / "ab"[number % 2]
            write(here / "new", bytes([number]) * 9000)
            (here / "new").rename(here / str(number))
            (here / str(number - 2)).unlink(missing_ok=True)
            (place / f"directory {number}").mkdir()
            fsync(here)
            mark(number)

    def look(self, place: Path, promised: int) -> str:
        for number in (1, 2, 3):
            path = place / "ab"[number % 2] / str(number)
            if path.exists() and path.read_bytes() != bytes([number]) * 9000:
                return f"file {number} is not whole"
            if not path.exists() and number == promised:
                return f"file {number} was durable and is gone"
        return ""


# ---- programs on a file system ---------------------------------------------------------------------------

@dataclass
class Segments(Program):
    """A write-ahead log in files, each made aside at its full size and renamed, then written into."""
    sync_directory: bool

    def work(self, place: Path, mark: Mark) -> None:
        for number in (1, 2, 3):
            name = place / f"log.{number}"
            write(place / "new", bytes(8192))
            (place / "new").rename(name)
            if self.sync_directory:
                fsync(place)
            with open(name, "r+b", buffering=0) as file:
                file.write(b"record")
                os.fdatasync(file.fileno())
            mark(number)

    def look(self, place: Path, promised: int) -> str:
        for number in range(1, promised + 1):
            path = place / f"log.{number}"
            if not path.exists() or path.read_bytes()[:6] != b"record":
                return f"record {number} was durable and is gone"
        return ""


@dataclass
class Replace(Program):
    """A file is replaced: the new one is written aside and renamed over the old."""
    sync: bool

    def begin(self, place: Path) -> None:
        write(place / "config", b"0" * 9000)

    def work(self, place: Path, mark: Mark) -> None:
        for number in (1, 2):
            write(place / "new", str(number).encode() * 9000, sync=self.sync)
            (place / "new").rename(place / "config")
            others_work(place)

    def look(self, place: Path, promised: int) -> str:
        found = (place / "config").read_bytes()
        if found in (b"0" * 9000, b"1" * 9000, b"2" * 9000):
            return ""
        return "the file is neither the old nor the new one" if found else "the file is empty"


@dataclass
class Sqlite(Program):
    """A database in SQLite: each transaction changes all rows, and their index."""
    journal: str
    synchronous: str
    durable: bool = False           # what was committed must be there

    def open(self, place: Path) -> Any:
        return closing(sqlite3.connect(place / "data.db", isolation_level=None))

    def begin(self, place: Path) -> None:
        with self.open(place) as database:
            database.execute(f"PRAGMA journal_mode={self.journal}")
            database.execute("CREATE TABLE rows (version, filler)")
            database.execute("CREATE INDEX versions ON rows (version, filler)")
            database.execute("BEGIN")
            for number in range(40):
                database.execute("INSERT INTO rows VALUES (0, ?)", [f"{number:0500}"])
            database.execute("COMMIT")

    def work(self, place: Path, mark: Mark) -> None:
        with self.open(place) as database:
            database.execute(f"PRAGMA synchronous={self.synchronous}")
            for number in (1, 2):
                database.execute("UPDATE rows SET version = ?", [number])
                mark(number)
                if self.journal == "WAL":
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                os.sync()

    def look(self, place: Path, promised: int) -> str:
        try:
            with self.open(place) as database:
                said = database.execute("PRAGMA integrity_check").fetchone()[0]
                versions = database.execute("SELECT DISTINCT version FROM rows NOT INDEXED").fetchall()
        except sqlite3.DatabaseError as error:
            return f"not whole: {error}"
        if said != "ok":
            return "not whole: SQLite's own check fails"
        if len(versions) != 1:
            return "not whole: half of a transaction"
        if self.durable and versions[0][0] < promised:
            return f"transaction {promised} was committed and is gone"
        return ""


AUTHOR = {f"GIT_{who}_{what}": "somebody"
          for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@dataclass
class Git(Program):
    """A repository; each commit is a promise."""
    settings: Sequence[str] = ()
    durable: bool = False

    def git(self, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(place), "-c", "safe.directory=*", "-c", "gc.auto=0"]
        for setting in self.settings:
            command += ["-c", setting]
        return subprocess.run([*command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              check=False, env={**os.environ, **AUTHOR})

    def commit(self, place: Path, number: int) -> None:
        (place / "file").write_text(f"{number}\n" * 500)
        for words in (["add", "file"], ["commit", "-q", "-m", str(number)]):
            self.git(place, *words).check_returncode()

    def begin(self, place: Path) -> None:
        self.git(place, "init", "-q").check_returncode()
        self.commit(place, 0)

    def work(self, place: Path, mark: Mark) -> None:
        for number in (1, 2):
            self.commit(place, number)
            mark(number)
            others_work(place)

    def look(self, place: Path, promised: int) -> str:
        if self.git(place, "fsck", "--strict").returncode:
            return "not whole: git fsck fails"
        last = self.git(place, "log", "-1", "--format=%s").stdout.strip() or "-1"
        if self.durable and int(last) < promised:
            return f"commit {promised} was made and is gone"
        return ""


def postgres_programs() -> Path:
    """Return where Debian keeps PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        raise FileNotFoundError("PostgreSQL is not installed here: apt-get install postgresql")
    return found[-1]


@dataclass
class Postgres(Program):
    """A database in PostgreSQL, with checksums, served by a real server and recovered by another."""
    settings: Sequence[str] = ()
    durable: bool = False

    def run(self, place: Path, program: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(postgres_programs() / program), *words], user="postgres", group="postgres",
                              extra_groups=[], cwd=place, text=True, check=False, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, **options)

    def serve(self, place: Path, *settings: str) -> None:
        words = ["listen_addresses=", f"unix_socket_directories={place}", "autovacuum=off",
                 "checkpoint_timeout=1h", *settings]
        options = " ".join(f"-c {word}" for word in words)
        self.run(place, "pg_ctl", "-D", f"{place}/data", "-l", f"{place}/said", "-o", options, "-w",
                 "start").check_returncode()

    def stop(self, place: Path, mode: str) -> None:
        self.run(place, "pg_ctl", "-D", f"{place}/data", "-m", mode, "-w", "stop").check_returncode()

    def query(self, place: Path, text: str) -> None:
        self.run(place, "psql", "-qX", "-h", str(place), "-v", "ON_ERROR_STOP=1", "-c", text,
                 "postgres").check_returncode()

    def begin(self, place: Path) -> None:
        shutil.chown(place, "postgres", "postgres")
        self.run(place, "initdb", "-D", f"{place}/data", "-k", "--no-sync", "--wal-segsize=1", "-A", "trust",
                 "--locale=C", "-E", "UTF8").check_returncode()
        self.serve(place, "fsync=off")
        self.query(place, "CREATE TABLE rows (version int, filler text) WITH (fillfactor = 45)")
        self.query(place, "INSERT INTO rows SELECT 0, repeat('x', 300) FROM generate_series(1, 200)")
        self.stop(place, "fast")

    def work(self, place: Path, mark: Mark) -> None:
        self.serve(place, *self.settings)
        for number in (1, 2):
            self.query(place, f"UPDATE rows SET version = {number}")
            mark(number)
            self.query(place, "CHECKPOINT")
        self.stop(place, "immediate")

    def look(self, place: Path, promised: int) -> str:
        (place / "data/postmaster.pid").unlink(missing_ok=True)
        question = ("SELECT 'found ' || count(*) || ' ' || min(version) || ' ' || max(version) AS answer "
                    "FROM rows\n")
        done = self.run(place, "postgres", "--single", "-D", f"{place}/data", "-c", "fsync=off", "postgres",
                        input=question)
        for text in ("invalid page", "page verification failed"):
            if text in done.stdout:
                return f"not whole: {text}"
        answer = done.stdout.partition('answer = "found ')[2].partition('"')[0].split()
        if not answer:
            return "not whole: the server does not start"
        count, lowest, highest = map(int, answer)
        if count != 200 or lowest != highest:
            return "not whole: half of a transaction"
        if self.durable and lowest < promised:
            return f"transaction {promised} was committed and is gone"
        return ""


# ---- programs on a bare disk -----------------------------------------------------------------------------

@dataclass
class Log(Program):
    """Records of 4096 bytes on a bare disk, one after the other, each made durable."""
    checksum: bool

    def work(self, place: Path, mark: Mark) -> None:
        with open(place, "r+b", buffering=0) as disk:
            for number in (1, 2, 3):
                data = bytes([number]) * 4088
                check = zlib.crc32(data) if self.checksum else 0
                disk.write(struct.pack("<II", number, check) + data)
                os.fsync(disk.fileno())
                mark(number)

    def look(self, place: Path, promised: int) -> str:
        found = 0
        with open(place, "rb") as disk:
            while True:
                number, check = struct.unpack("<II", disk.read(8))
                data = disk.read(4088)
                if number != found + 1 or (self.checksum and check != zlib.crc32(data)):
                    break
                if data != bytes([number]) * 4088:
                    return f"record {number} is believed and is not whole"
                found = number
        return "" if found >= promised else f"record {promised} was durable and is gone"


@dataclass
class Header(Program):
    """A database that never overwrites: rows go elsewhere, then the header that counts them changes."""
    flush_between: bool

    def work(self, place: Path, mark: Mark) -> None:
        with open(place, "r+b", buffering=0) as disk:
            for number in (1, 2, 3):
                os.pwrite(disk.fileno(), bytes([number]) * 4096, 4096 * number)
                if self.flush_between:
                    os.fsync(disk.fileno())
                os.pwrite(disk.fileno(), bytes([number]), 0)
                os.fsync(disk.fileno())
                mark(number)

    def look(self, place: Path, promised: int) -> str:
        with open(place, "rb") as disk:
            count = disk.read(4096)[0]
            rows = [disk.read(4096) for _ in range(count)]
        if rows != [bytes([number]) * 4096 for number in range(1, count + 1)]:
            return f"row {count} is counted and not there"
        return "" if count >= promised else f"row {promised} was durable and is gone"


# ---- the table -------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A program with its settings, what must hold after each crash, and what is to be found."""
    title: str
    settings: str
    holds: str
    program: Program
    finds: str = ""                 # a regular expression for what is found wrong; "" of a right program
    file_system: FileSystem | None = EXT4
    states: int = 2                 # of each crash, besides all and nothing

    def __str__(self) -> str:
        return f"{self.title}, {self.settings}: {self.holds}"


LAZY_EXT4 = EXT4._replace(options="noauto_da_alloc")
LARGE_EXT4 = EXT4._replace(size=160 << 20)
WHOLE, COMMITTED = "whole", "whole, and what was committed is there"
GONE, HALF = "committed and is gone", "not whole: .+"
DAMAGED = "cannot be mounted|finds damage|damaged|not whole|is gone"


def sqlite_rows() -> Iterator[Row]:
    """Yield the rows of SQLite."""
    for journal, synchronous, holds, finds in (
            ("rollback journal", "OFF", WHOLE, HALF),
            ("rollback journal", "NORMAL", WHOLE, ""),
            ("rollback journal", "NORMAL", COMMITTED, GONE),
            ("rollback journal", "FULL", WHOLE, ""),
            ("rollback journal", "FULL", COMMITTED, GONE),
            ("rollback journal", "EXTRA", COMMITTED, ""),
            ("write-ahead log", "OFF", WHOLE, HALF),
            ("write-ahead log", "NORMAL", WHOLE, ""),
            ("write-ahead log", "NORMAL", COMMITTED, GONE),
            ("write-ahead log", "FULL", COMMITTED, ""),
            ("write-ahead log", "EXTRA", COMMITTED, "")):
        mode = "WAL" if journal == "write-ahead log" else "DELETE"
        program = Sqlite(mode, synchronous, holds == COMMITTED)
        yield Row(f"SQLite, {journal}", f"`synchronous={synchronous}`", holds, program, finds,
                  states=6 if finds == HALF else 2)


TABLE = [
    *sqlite_rows(),
    Row("PostgreSQL", "as it is", COMMITTED, Postgres(durable=True), "", LARGE_EXT4, 1),
    Row("PostgreSQL", "`fsync=off`", COMMITTED, Postgres(["fsync=off"], durable=True), GONE,
        LARGE_EXT4, 1),
    Row("PostgreSQL", "`full_page_writes=off`", WHOLE, Postgres(["full_page_writes=off"]),
        "invalid page|verification failed", LARGE_EXT4, 6),
    Row("git", "`core.fsync=all`", WHOLE, Git(["core.fsync=all"])),
    Row("git", "`core.fsync=all`", COMMITTED, Git(["core.fsync=all"], durable=True), "made and is gone"),
    Row("git", "as it is", WHOLE, Git(), "git fsck fails"),
    Row("git", "`core.fsync=none`", WHOLE, Git(["core.fsync=none"]), "git fsck fails"),
    Row("A log in files", "fsync of file and directory", "no durable record is gone", Segments(True)),
    Row("A log in files", "fsync of the file alone", "no durable record is gone", Segments(False),
        "record . was durable and is gone"),
    Row("A file replaced by rename", "fsync before it", "old or new", Replace(True), "", LAZY_EXT4),
    Row("A file replaced by rename", "no fsync, ext4 as it is", "old or new", Replace(False)),
    Row("A file replaced by rename", "no fsync, ext4 with `noauto_da_alloc`", "old or new", Replace(False),
        "the file is empty", LAZY_EXT4),
    Row("A file replaced by rename", "no fsync, xfs", "old or new", Replace(False), "the file is empty", XFS),
    Row("A log on a bare disk", "with checksums", "records are whole", Log(True), "", None, 8),
    Row("A log on a bare disk", "without", "records are whole", Log(False), "believed and is not whole",
        None, 8),
    Row("A database on a bare disk", "flush between row and header", "rows counted are there", Header(True),
        "", None, 8),
    Row("A database on a bare disk", "no flush between", "rows counted are there", Header(False),
        "counted and not there", None, 8),
    Row("ext4", "as it is", "sound, and durable files are there", Files()),
    Row("ext4", "`barrier=0`", "sound, and durable files are there", Files(), DAMAGED,
        EXT4._replace(options="barrier=0")),
    Row("xfs", "as it is", "sound, and durable files are there", Files(), "", XFS),
    Row("btrfs", "as it is", "sound, and durable files are there", Files(), "", BTRFS),
    Row("btrfs", "`nobarrier`", "sound, and durable files are there", Files(), DAMAGED,
        BTRFS._replace(options="nobarrier")),
]
