#!/usr/bin/env python3
"""Where the server's time goes, per I/O, for some targets at depth 128 and 1, in a virtual machine.

    profiling.py [TARGET...]        null, loop, plain, async or words for ublk.py, quoted: "null --batch"

Each target is served twice. First undisturbed: IOPS, CPU time in user mode and in the kernel, and from the
kernel's tracer the system calls. Then below cProfile with the thread's CPU time as its clock. That makes
calls dear: of this run only the share of each function is taken, of the time measured before. A function
that calls the kernel bears the kernel's time too.
"""
from __future__ import annotations

import pstats
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import KERNEL, WORKLOADS, fio, requests
from contenders import OURS, UBLK, Failed, family, ours, run

HERE = Path(__file__).resolve()
TARGETS = {"null": "null", "loop": "loop BACKING --direct",
           "plain": f"{OURS}:Plain", "async": f"{OURS}:Async"}
TRACING = Path("/sys/kernel/tracing")
SYSCALLS = TRACING / "events/raw_syscalls/sys_enter"
SECONDS = 3.0
LINES = 12          # functions to show


# ---- in the virtual machine ------------------------------------------------------------------------------

def profile(name: str, words: list[str], workload: str) -> None:
    """Print where the time of one target goes under one workload."""
    with ExitStack() as stack:
        disk = ours(*words)(stack)
        with counted_calls(disk.pid) as calls:
            before = requests(disk.path)
            numbers = fio(disk, WORKLOADS[workload], SECONDS)
            done = requests(disk.path) - before
        iops, user, system = numbers["value"], numbers["user_us"], numbers["system_us"]
        print(f"\n{name}, {WORKLOADS[workload].title}, data path {disk.path_name}: {iops:,.0f} IOPS\n"
              f"  {1e6 / iops:8.1f} us from one request to the next, of which the server used\n"
              f"  {user:8.1f} us in Python and the C library (user)\n"
              f"  {system:8.1f} us in the kernel (system)")
        for call, count in calls.items():
            print(f"  {count / done:8.3f}     {call}, one for {done / count:.1f} requests")
    python_functions(words, workload, user + system)


@contextmanager
def counted_calls(pid: int) -> Iterator[dict[str, int]]:
    """Count the system calls of a process and its threads by the tracer, which costs little."""
    calls: dict[str, int] = {}
    if not TRACING.joinpath("trace").exists():
        run(["mount", "-t", "tracefs", "tracefs", str(TRACING)])
    tasks = [int(task.name) for one in family(pid) for task in Path(f"/proc/{one}/task").iterdir()]
    those = " || ".join(f"common_pid == {task}" for task in tasks)
    trigger = f"hist:keys=id.syscall:size=512 if {those}"
    (SYSCALLS / "trigger").write_text(trigger)
    try:
        yield calls
        found = re.findall(r"id: (\w+)\s*\[ *\d+\] } hitcount: +(\d+)", (SYSCALLS / "hist").read_text())
        calls.update((name, int(count)) for name, count in sorted(found, key=lambda one: -int(one[1]))[:4])
    finally:
        (SYSCALLS / "trigger").write_text("!" + trigger)


def python_functions(words: list[str], workload: str, total: float) -> None:
    """Serve the target again below cProfile and share out the CPU time."""
    with tempfile.TemporaryDirectory() as directory:
        output = f"{directory}/profile"
        with ExitStack() as serving:
            disk = ours(*words, launcher=(str(HERE), "serve", output))(serving)
            before = requests(disk.path)
            fio(disk, WORKLOADS[workload], SECONDS)
            done = requests(disk.path) - before
        statistics: Any = pstats.Stats(output)
        rows = sorted(((own, calls, where) for where, (_, calls, own, _, _) in statistics.stats.items()),
                      reverse=True)
    profiled = sum(own for own, _, _ in rows)
    print("  by cProfile, of all this CPU time:")
    for own, calls, (file, line, name) in rows[:LINES]:
        place = f" ({Path(file).name}:{line})" if line else ""
        print(f"  {own / profiled * total:8.1f} us  {calls / done:7.2f} calls  {name}{place}")


def serve(output: str, words: list[str]) -> int:
    """Be ublk.py with the queue's loop below cProfile."""
    import cProfile
    sys.path.insert(0, str(UBLK.parent))
    import ublk
    original = ublk.Worker.serve

    def profiled(self: Any, *arguments: Any) -> None:
        profiler = cProfile.Profile(time.thread_time)
        try:
            profiler.runcall(original, self, *arguments)
        finally:
            profiler.dump_stats(output)
    ublk.Worker.serve = profiled    # type: ignore[method-assign]
    return ublk.main(words)


def main(words: list[str]) -> int:
    if words[:1] == ["serve"]:
        return serve(words[1], words[2:])
    if words[:1] != ["inside"]:
        command = [sys.executable, str(HERE.parent / "lab.py"), "run", KERNEL, "--", "python3", str(HERE)]
        return subprocess.run([*command, "inside", *words], check=False).returncode
    for name in words[1:] or TARGETS:
        for workload in ("r4k128", "r4k1"):
            try:
                profile(name, TARGETS.get(name, name).split(), workload)
            except (Failed, subprocess.SubprocessError) as error:
                print(f"{name}: left out: {error}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
