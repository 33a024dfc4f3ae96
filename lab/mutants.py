#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Break the program in many small ways, one at a time, and see that the named test notices each.

    mutants.py [WORD]           all that mutants.txt lists, or those with this word in their line
    mutants.py --fits           only see whether the list fits the tree, which is part of the lint

Breakages whose test needs no driver are tried here, the others in a virtual machine for each kernel, all side
by side. What the list says is held against the tree first: the text to replace stands there exactly once, the
named test exists and passes on the program as it is.
"""
from __future__ import annotations

import argparse
import ast
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from kernels import HEADERS, KERNELS, VENV, fail, fetch

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
LIST = HERE / "mutants.txt"
NEWEST = "7.3"
NATIVE = "host"
LIMIT = {NATIVE: 60, **dict.fromkeys(KERNELS, 180)}     # seconds for one test; a hang is a failure too
TESTS_FAILED = 1
NOTHING_PASSED = 5
HUNG = 101              # the status of a machine in which a breakage hung the kernel
PR_SET_CHILD_SUBREAPER = 36


class Mutant(NamedTuple):
    """One breakage: in `file`, `what` becomes `becomes`, and `test` must fail in this place."""
    file: str
    what: str
    becomes: str
    test: str           # its file::name, maybe with [parameters]
    where: str          # NATIVE or a kernel

    def __str__(self) -> str:
        return f"{self.file}: {self.what} -> {self.becomes} ({self.test})"


# ---- the list --------------------------------------------------------------------------------------------

def tests_of_the_tree() -> dict[str, tuple[str, bool]]:
    """Return {name: (file, whether it needs the driver)} of every test."""
    found = {}
    for path in [PROJECT / "test_ublk.py", *sorted(PROJECT.glob("tests/test_*.py"))]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                needs_driver = any(isinstance(mark, ast.Name) and mark.id == "kernel"
                                   for mark in node.decorator_list)
                found[node.name] = str(path.relative_to(PROJECT)), needs_driver
    return found


def read_list(word: str) -> list[Mutant]:
    """Read mutants.txt; a line that does not fit the tree ends it all."""
    tests = tests_of_the_tree()
    found, wrong = [], []
    for number, line in enumerate(LIST.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#") or word not in line:
            continue
        fields = [field.strip() for field in line.split("||")]
        if len(fields) not in (4, 5):
            wrong.append(f"line {number}: has {len(fields)} fields: {line}")
            continue
        file, what, becomes, test = fields[:4]
        name, bracket, parameters = test.partition("[")
        count = len(places(what, (PROJECT / file).read_text())) if (PROJECT / file).is_file() else 0
        if count != 1:
            wrong.append(f"line {number}: stands {count} times in {file}: {what}")
        if name not in tests:
            wrong.append(f"line {number}: no test is called {name}")
        elif count == 1:
            path, needs_driver = tests[name]
            kernel = fields[4] if len(fields) == 5 else NEWEST
            where = kernel if needs_driver else NATIVE
            found.append(Mutant(file, what, becomes, f"{path}::{name}{bracket}{parameters}", where))
    if wrong:
        fail("\n     ".join([f"{LIST.name} does not fit the tree:", *wrong]))
    return found


def places(what: str, text: str) -> list[re.Match[str]]:
    """Return where a piece of code stands in a text, however either is broken into lines."""
    pattern = ""
    before = ""
    for token in re.findall(r"\w+|\S", what):
        words = re.match(r"\w", before[-1:]) and re.match(r"\w", token)
        pattern += (r"\s+" if words else r"\s*") if before else ""
        pattern += r"(?:,\s*)?" if token in ")]}" else ""
        pattern += re.escape(token)
        before = token
    return list(re.finditer(pattern, text))


def broken(text: str, mutant: Mutant) -> str:
    """Return a file's text with the breakage in it."""
    for place in reversed(places(mutant.what, text)):
        text = text[:place.start()] + mutant.becomes + text[place.end():]
    return text


# ---- in one place ----------------------------------------------------------------------------------------

class Passes:
    """A plugin of pytest that counts what passed and what did not."""

    def __init__(self) -> None:
        self.passed = self.others = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        self.others += report.failed


def run_test(test: str, limit: float, log: Path) -> int:
    """Run one test in a fork, which has pytest loaded already; return its status, 0 if it passed."""
    child = os.fork()
    if child == 0:
        with open(log, "wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.setsid()
        status = 70
        try:
            import pytest
            passes = Passes()
            status = pytest.main(["-p", "no:cacheprovider", "-x", "-q", test], plugins=[passes])
            status = status or (0 if passes.passed and not passes.others else NOTHING_PASSED)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return wait_for(child, limit)


def wait_for(child: int, limit: float) -> int:
    """Return the child's status, or that of a failed test if it takes too long."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else TESTS_FAILED
        time.sleep(0.02)
    return TESTS_FAILED


def end_children() -> None:
    """Kill what a test has left behind, which all became children of this process, and see it gone."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + 30
    while (left := own.read_text().split()) and time.monotonic() < deadline:
        for pid in map(int, left):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def clean_up(where: str) -> None:
    """Take away processes and devices, with the program as it is."""
    end_children()
    mounted = "/dev/ublkb" in Path("/proc/mounts").read_text()
    if where != NATIVE and (mounted or list(Path("/dev").glob("ublkc*"))):
        code = "from tests.support import clean_up; clean_up()"
        subprocess.run([sys.executable, "-c", code], check=False, timeout=120)


@contextmanager
def applied(mutant: Mutant, number: int) -> Iterator[None]:
    """Break a file for a while; its new time of change keeps Python from taking old bytecode for it."""
    path = PROJECT / mutant.file
    text, times = path.read_text(), path.stat()
    path.write_text(broken(text, mutant))
    os.utime(path, (times.st_atime, times.st_mtime + 1000 + number))
    try:
        yield
    finally:
        path.write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def try_one(mutant: Mutant, number: int, log: Path) -> str:
    """Return what became of a breakage: "caught" is the good end."""
    text = broken((PROJECT / mutant.file).read_text(), mutant)
    try:
        if mutant.file.endswith(".py"):
            compile(text, mutant.file, "exec")
    except SyntaxError as error:
        return f"IS NO PYTHON: {error}"
    with applied(mutant, number):
        status = run_test(mutant.test, LIMIT[mutant.where], log)
        end_children()
    try:
        clean_up(mutant.where)
    except subprocess.TimeoutExpired:
        return "hangs the kernel"
    if status == 0:
        return "SURVIVED"
    return "caught" if status in (TESTS_FAILED, 70) else f"DID NOT RUN (pytest's status {status})"


def try_all(mutants: Sequence[Mutant], where: str) -> int:
    """Try these breakages in this tree, which is a copy; return how many were not caught, or HUNG."""
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", UBLK_HEADERS=str(HEADERS))
    sys.dont_write_bytecode = True
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    __import__("pytest")
    os.chdir(PROJECT)
    bad = 0
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        whole: dict[str, bool] = {}
        for number, mutant in enumerate(mutants):
            begin = time.monotonic()
            if mutant.test not in whole:
                whole[mutant.test] = run_test(mutant.test, LIMIT[where], log) == 0
                clean_up(where)
            if whole[mutant.test]:
                result = try_one(mutant, number, log)
            else:
                result = "TEST DOES NOT PASS on the program as it is"
            print(f"{where:>4} | {result}: {mutant} {time.monotonic() - begin:.0f} s", flush=True)
            if result == "hangs the kernel":    # whoever runs its test notices; this machine is done
                return HUNG
            if result != "caught":
                bad += 1
                print(log.read_text(errors="replace")[-3000:], flush=True)
    return min(bad, HUNG - 1)


# ---- everywhere ------------------------------------------------------------------------------------------

def try_in(place: str, word: str) -> int:
    """Try those whose tests run in a place; return an exit status."""
    return try_natively(word) if place == NATIVE else try_in_kernel(place, word)


def try_natively(word: str) -> int:
    """Try those that need no driver in a copy of the tree; return an exit status."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, "tree")
        shutil.copytree(PROJECT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        command = [str(VENV / "bin/python"), str(tree / "lab/mutants.py"), "--in", NATIVE, word]
        return subprocess.run(command, check=False).returncode


def try_in_kernel(kernel: str, word: str) -> int:
    """Try the others in a virtual machine, whose tree is a copy, the rest in another where one hangs it."""
    done = bad = 0
    status = HUNG
    while status == HUNG:
        command = [sys.executable, HERE / "lab.py", "run", kernel, "--timeout=7200", "--no-fail-on-oops",
                   "--", "python3", HERE / "mutants.py", "--in", kernel, "--skip", done, word]
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout or ():
                print(line, end="", flush=True)
                is_result = line.startswith(f"{kernel:>4} | ")
                done += is_result
                bad += is_result and "| caught:" not in line and "| hangs " not in line
        status = run.returncode
    return status or bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the program and see that the tests notice.")
    parser.add_argument("word", nargs="?", default="", help="only lines of mutants.txt with this in them")
    parser.add_argument("--fits", action="store_true", help="only see whether the list fits the tree")
    parser.add_argument("--in", dest="where", choices=[NATIVE, *KERNELS], help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    mutants = read_list(options.word)
    if options.fits:
        return 0
    if options.where:
        mine = [one for one in mutants if one.where == options.where]
        return try_all(mine[options.skip:], options.where)
    if not mutants:
        fail(f"{LIST.name} has nothing with {options.word!r}")
    places = sorted({one.where for one in mutants})
    fetch([place for place in places if place != NATIVE] or [NEWEST])
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda place: try_in(place, options.word), places))
    print(f"=== {len(mutants)} breakages: {'NOT ALL CAUGHT' if any(results) else 'all caught'}")
    return 1 if any(results) else 0


if __name__ == "__main__":
    sys.exit(main())
