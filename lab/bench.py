#!/usr/bin/env python3
"""The benchmark: ublk.py against the kernel's own drivers, nbdkit and FUSE, all in one virtual machine.

    bench.py [--quick] [--cases WORD,...] [--rounds N]    measure, print a table
    bench.py report                                       print the table of lab/bench.json, draw the chart

A whole run also writes lab/bench.json and the chart lab/bench.svg. Other work on the machine, and under
emulation the machine itself, make single numbers worthless: therefore all disks of a group exist at the same
time, each workload visits them in turn, several rounds long, and what counts is a disk's ratio, within each
round, to the first one of its group. How the disks are made is in contenders.py, the chart in chart.py;
measure() is what runs in the virtual machine.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from chart import draw
from contenders import (
    CASES,
    FREE_THREADED,
    STARTS,
    Case,
    Disk,
    Failed,
    cpu_seconds,
    idle,
    load_cases,
    resident,
    run,
)

HERE = Path(__file__).resolve().parent
KERNEL = "7.3"
RESULTS, CHART = HERE / "bench.json", HERE / "bench.svg"
TIME_LIMIT = 7200


class Workload(NamedTuple):
    """What fio does. unit: what is reported of it."""
    title: str
    options: str
    unit: str = "IOPS"


# Clients with many requests in flight hand in and take back several at a time; one128 is one that does not.
DEEP = "--iodepth=128 --iodepth_batch_submit=16 --iodepth_batch_complete_max=64"
WORKLOADS = {
    "r4k1": Workload("4 KiB random read, depth 1", "--rw=randread --bs=4k --iodepth=1"),
    "r4k32": Workload("4 KiB random read, depth 32", "--rw=randread --bs=4k --iodepth=32"),
    "r4k128": Workload("4 KiB random read, depth 128, 16 at a time", f"--rw=randread --bs=4k {DEEP}"),
    "w4k128": Workload("4 KiB random write, depth 128, 16 at a time", f"--rw=randwrite --bs=4k {DEEP}"),
    "one128": Workload("4 KiB random read, depth 128, one at a time", "--rw=randread --bs=4k --iodepth=128"),
    "r64k32": Workload("64 KiB random read, depth 32", "--rw=randread --bs=64k --iodepth=32"),
    "r1m8": Workload("1 MiB sequential read, depth 8", "--rw=read --bs=1m --iodepth=8", "MiB/s"),
    "w1m8": Workload("1 MiB sequential write, depth 8", "--rw=write --bs=1m --iodepth=8", "MiB/s"),
    "jobs2": Workload("4 KiB random read, 2 jobs of depth 64",
                      "--rw=randread --bs=4k --iodepth=64 --numjobs=2 --group_reporting "
                      "--cpus_allowed=0,1 --cpus_allowed_policy=split"),
}
START = Workload("from start to usable", "", "s")
QUICK_WORKLOADS, QUICK_GROUPS = ("r4k1", "r4k128", "jobs2"), ("null", "python", "file")


# ---- in the virtual machine ------------------------------------------------------------------------------

def measure(rounds: int, seconds: float, words: Sequence[str], quick: bool) -> None:
    """Measure all that is wanted and print each number as a line of JSON."""
    load_cases()
    tell(facts={"kernel": os.uname().release, "cpus": os.cpu_count(), "memory_mib": memory_mib(),
                "emulated": "TCG" in Path("/proc/cpuinfo").read_text()})
    for group in dict.fromkeys(case.group for case in CASES):
        cases = [case for case in CASES if case.group == group]
        if quick and not words and group not in QUICK_GROUPS:
            continue
        want = {(case.name, name) for case in cases for name in case.workloads
                if (name in QUICK_WORKLOADS or not quick) and asked_for(f"{group} {case.name} {name}", words)}
        want |= {(cases[0].name, name) for _, name in want}
        with reported(group), contextlib.ExitStack() as stack:
            measure_group(stack, cases, want, rounds, seconds)
    if asked_for("start", words):
        for number in range(rounds):
            for name, start in STARTS.items():
                with reported(name), contextlib.ExitStack() as stack:
                    began = time.monotonic()
                    disk = start(stack)
                    tell(group="start", case=name, workload="start", round=number,
                         value=time.monotonic() - began)
                    if disk and number == rounds - 1:       # the first one may have compiled the module
                        tell(memory=name, group="start", mib=resident(disk.pid), path=disk.path_name)
    if asked_for("idle", words or ["none"] if quick else words):
        with reported("idle"):
            tell(idle=idle(50, 10))


def asked_for(names: str, words: Sequence[str]) -> bool:
    """Tell whether a command line that gave these words means what has these names; no words mean all."""
    return not words or any(word in names for word in words)


def measure_group(stack: contextlib.ExitStack, cases: Sequence[Case], want: set[tuple[str, str]],
                  rounds: int, seconds: float) -> None:
    """Start the disks of a group and visit them in turn with each workload; want: (disk, workload)."""
    disks: dict[str, Disk] = {}
    for case in cases:
        if any(case.name == name for name, _ in want):
            with reported(case.name):
                disks[case.name] = case.start(stack)
    for name, workload in WORKLOADS.items():
        for number in range(rounds):
            for case in cases:
                if case.name in disks and (case.name, name) in want:
                    disk = disks.pop(case.name)
                    with reported(f"{case.name}, {workload.title}"):
                        tell(group=case.group, case=case.name, workload=name, round=number,
                             **fio(disk, workload, seconds))
                        disks[case.name] = disk     # one that failed is not asked again
    for name, disk in disks.items():
        tell(memory=name, group=cases[0].group, mib=resident(disk.pid), path=disk.path_name)


def fio(disk: Disk, workload: Workload, seconds: float) -> dict[str, float]:
    """Load a disk; return what it achieved and what each I/O cost its server in microseconds of CPU."""
    command = ["fio", "--name=bench", f"--filename={disk.path}", "--ioengine=io_uring", "--direct=1",
               "--time_based", f"--runtime={seconds * 1000:.0f}ms", f"--ramp_time={seconds * 167:.0f}ms",
               "--norandommap", "--randrepeat=0", "--size=64m", "--output-format=json",
               *workload.options.split()]
    before, used = requests(disk.path), cpu_seconds(disk.pid)
    job = json.loads(run(command, timeout=60 + 20 * seconds))["jobs"][0]
    done, spent = requests(disk.path) - before, cpu_seconds(disk.pid)
    side = job["write" if "write" in workload.options else "read"]
    if job["error"] or not side["total_ios"]:
        raise Failed(f"fio reports error {job['error']} after {side['total_ios']} requests")
    value = side["iops"] if workload.unit == "IOPS" else side["bw_bytes"] / 2**20
    user, system = ((now - then) * 1e6 / max(done, 1) for now, then in zip(spent, used))
    return {"value": value, "user_us": user, "system_us": system}


def requests(path: str) -> int:
    """Count the reads and writes a block device has completed."""
    fields = Path(f"/sys/class/block/{Path(path).name}/stat").read_text().split()
    return int(fields[0]) + int(fields[4])


def memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def tell(**record: Any) -> None:
    print(json.dumps(record), flush=True)


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Go on without what failed, but say so."""
    try:
        yield
    except (Failed, OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        tell(failed=what, why=" ".join(f"{error} {said}".split())[-400:])


# ---- outside ---------------------------------------------------------------------------------------------

def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Run measure() in a virtual machine and gather what it says."""
    from kernels import PACKAGES, VENV, do, fetch, make_venv
    PACKAGES.extend(["fuse3", "liburing-dev"])
    fetch([KERNEL])
    make_venv("pytest")
    if not list(VENV.glob("lib/python*/site-packages/mfusepy*")):
        do(VENV / "bin/pip", "-q", "--disable-pip-version-check", "install", "mfusepy")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "host_cpu": host_cpu(), "rounds": options.rounds,
        "seconds": options.seconds, "load_average_before": os.getloadavg()[0], "records": [], "failures": [],
        "memory": []}
    arguments = [f"--rounds={options.rounds}", f"--seconds={options.seconds}", f"--cases={options.cases}"]
    arguments += ["--quick"] if options.quick else []
    passed_on = [f"--env=FREE_THREADED={FREE_THREADED}"] if FREE_THREADED else []
    command = [sys.executable, str(HERE / "lab.py"), "run", KERNEL, "--memory=4G", f"--timeout={TIME_LIMIT}",
               *passed_on, "--", "python3", str(HERE / "bench.py"), "inside", *arguments]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as machine:
        assert machine.stdout
        for line in machine.stdout:
            try:
                note(result, json.loads(line), time.monotonic() - began)
            except ValueError:
                print(line, end="", file=sys.stderr)
    if machine.returncode:
        sys.exit(f"bench: the virtual machine ended with status {machine.returncode}")
    result.update(load_average_after=os.getloadavg()[0], wall_seconds=round(time.monotonic() - began))
    return result


def note(result: dict[str, Any], record: dict[str, Any], elapsed: float) -> None:
    """File one line of measure()."""
    if "facts" in record:
        result.update(record["facts"])
    elif "failed" in record:
        result["failures"].append(record)
        print(f"bench: left out: {record['failed']}: {record['why']}", file=sys.stderr)
    elif "memory" in record:
        result["memory"].append(record)
    elif "idle" in record:
        result["idle"] = record["idle"]
    else:
        result["records"].append(record)
        print(f"{elapsed:6.0f} s  {record['group']:<6} {record['workload']:<7} round {record['round'] + 1}  "
              f"{record['case']:<32} {record['value']:>10.{3 if record['value'] < 100 else 0}f}",
              file=sys.stderr)


def host_cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found.group(1) if found else os.uname().machine


def summarise(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn single measurements into medians, and ratios to the first disk of the group, with their spread."""
    taken: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for record in result["records"]:
        taken.setdefault((record["group"], record["workload"], record["case"]), {})[record["round"]] = record
    rows = []
    for (group, workload, case), rounds in taken.items():
        first = next(rounds for key, rounds in taken.items() if key[:2] == (group, workload))
        ratios = sorted(one["value"] / first[number]["value"]
                        for number, one in rounds.items() if number in first)
        values = sorted(one["value"] for one in rounds.values())
        row = {"group": group, "workload": workload, "case": case, "value": statistics.median(values),
               "lowest": values[0], "highest": values[-1], "ratio": statistics.median(ratios),
               "ratio_lowest": ratios[0], "ratio_highest": ratios[-1]}
        for key in ("user_us", "system_us"):
            row[key] = statistics.median(one.get(key, 0.0) for one in rounds.values())
        rows.append(row)
    return rows


def heading(result: dict[str, Any]) -> str:
    """Say when and where the numbers were taken."""
    place = "under emulation (QEMU without hardware help)" if result["emulated"] else "in a virtual machine"
    return (f"{result['date']}, Linux {result['kernel']} {place}, {result['cpus']} CPUs, medians of "
            f"{result['rounds']} rounds")


def table(result: dict[str, Any]) -> str:
    """Lay out all medians: value, ratio to the first of the group (lowest to highest), CPU time per I/O."""
    load = f"{result['load_average_before']:.1f} before, {result['load_average_after']:.1f} after"
    lines = [heading(result), f"on {result['host_cpu']}; load of the machine {load}; user and system: CPU "
             "time of the server's own processes per I/O"]
    last = None
    for row in result["summary"]:
        if (row["group"], row["workload"]) != last:
            last = row["group"], row["workload"]
            title, _, unit = WORKLOADS.get(row["workload"], START)
            lines.append(f"\n{row['group']}: {title}")
        value = f"{row['value']:>10,.{2 if unit == 's' else 0}f} {unit:<6}"
        spread = f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})"
        line = f"  {row['case']:<32}{value}{row['ratio']:>6.2f}  {spread}"
        if row["user_us"] or row["system_us"]:
            line = f"{line:<72}  user {row['user_us']:6.1f}  system {row['system_us']:6.1f} us"
        lines.append(line)
    lines.append("\nresident memory of the server beyond its I/O buffers, and the data path")
    for record in result["memory"]:
        if record["mib"]:
            lines.append(f"  {record['memory']:<32}{record['mib']:>10.1f} MiB    {record['path']}")
    if "idle" in result:
        line = "\n{devices} idle devices: {cpu_seconds:.3f} s of CPU time in {seconds} s"
        lines.append(line.format(**result["idle"]))
    for failure in result["failures"]:
        lines.append(f"\nleft out: {failure['failed']}: {failure['why']}")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> None:
    result["summary"] = summarise(result)
    print(table(result))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description="Compare ublk.py with its rivals.")
    parser.add_argument("verb", nargs="?", default="run", choices=("run", "inside", "report"))
    parser.add_argument("--quick", action="store_true", help="few workloads, one short round")
    parser.add_argument("--cases", default="", metavar="WORD,...",
                        help="only groups, disks and workloads with one of these in their names")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1, help="of one measurement")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    if options.verb == "inside":
        words = options.cases.split(",") if options.cases else ()
        measure(options.rounds, options.seconds, words, options.quick)
        return 0
    result = json.loads(RESULTS.read_text()) if options.verb == "report" else collect(options)
    report(result)
    if options.verb == "report" or not (options.quick or options.cases):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        CHART.write_text(draw(result["summary"], "ublk.py against its rivals", heading(result)))
        print(f"\nwritten: {RESULTS.name}, {CHART.name}")
    return 0 if result["records"] else 1


if __name__ == "__main__":
    sys.exit(main())
