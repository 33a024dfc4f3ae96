#!/usr/bin/env python3
"""The lab: real Linux kernels with a ublk driver, each in a virtual machine on this machine's own root.

    lab.py fetch [KERNEL...]            install what is missing and download the kernels, once
    lab.py run KERNEL -- COMMAND...     run COMMAND as root in a virtual machine with that kernel
    lab.py shell KERNEL                 the same with an interactive shell
    lab.py test [-k WORD]               run the test suite natively and in every kernel
    lab.py lint                         ruff, mypy, vermin (nothing newer than the oldest Python), mutants.txt

The virtual machine sees this machine's files through virtiofs, read-only, with a memory file system above:
the guest can write anywhere and nothing of it stays. /scratch is a disk of 8 GiB with ext4, UBLK_TEST_KERNEL
the kernel's name here, UBLK_HEADERS a directory with the newest linux/ublk_cmd.h. What the command
leaves as /run/lab-report comes out with --report=FILE. What happens inside is in init.sh, what the lab
consists of in kernels.py.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional
from xml.etree import ElementTree

from kernels import (
    CACHE,
    DEFAULT_KERNELS,
    HEADERS,
    KERNELS,
    NEW_VIRTIOFSD,
    OLD_VIRTIOFSD,
    VENV,
    do,
    fail,
    fetch,
    make_venv,
    say,
)

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
GUEST_PATH = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Without the features that make the kernel copy by `rep movsb`, which is emulated byte by byte.
EMULATION = ["-accel", "tcg,thread=multi", "-cpu", "max,erms=off,fsrm=off"]
HARDWARE = ["-accel", "kvm", "-cpu", "host"]
# Without what a kernel does for security and statistics beside its work: a seventh of the emulator's time.
LEAN = ("mitigations=off init_on_alloc=0 randomize_kstack_offset=off hardened_usercopy=off lsm= audit=0 "
        "kfence.sample_interval=0 psi=0 cgroup_disable=memory transparent_hugepage=never")
TROUBLE = re.compile(r"BUG:|kernel BUG at|Oops|general protection|blocked for more than|Kernel panic")
WARNING = re.compile(r"WARNING: ")
STATUS_KERNEL_TROUBLE = 99
STATUS_NO_ANSWER = 124
NO_TESTS_COLLECTED = 5
GUEST_REPORT = "/run/lab-report"
OLDEST_PYTHON = "3.9"
ACCEPTING = 0x10000                             # __SO_ACCEPTCON of linux/net.h, in /proc/net/unix
# Virtual machines at a time: each leaves its processors idle half of the time, most of all with the oldest
# kernel, which takes five seconds to notice that a server is gone. One needs about 1.5 GiB.
JOBS = (os.cpu_count() or 1) + 1


@dataclass
class Machine:
    """What a virtual machine is made of and for."""
    kernel: str
    command: Sequence[str]
    cpus: int = 2
    memory: str = "3G"
    timeout: float = 3600
    environment: Sequence[str] = ()
    fail_on_oops: bool = True
    interactive: bool = False
    report: Optional[Path] = None           # where the host finds what the guest leaves as GUEST_REPORT
    packages: Sequence[str] = ()            # what the command needs of Debian, beside what all do
    home: Path = field(init=False)
    console: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home = CACHE / "kernels" / self.kernel
        self.console = CACHE / "log" / f"{self.kernel}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


# ---- one virtual machine ---------------------------------------------------------------------------------

def run(machine: Machine) -> int:
    """Boot a kernel, run a command in it, return its exit status.

    Boot it once more where it ends before the command began: one emulated boot of a thousand panics.
    """
    fetch([machine.kernel], machine.packages)
    if os.geteuid() != 0:
        # virtiofsd shows the guest all of this machine's files.
        os.execvp("sudo", ["sudo", "env", f"UBLK_LAB={CACHE}", sys.executable, *sys.argv])
    machine.console.parent.mkdir(parents=True, exist_ok=True)
    with turn():
        status = boot(machine)
        if status is None:
            status = boot(machine)
        return STATUS_NO_ANSWER if status is None else status


def boot(machine: Machine) -> Optional[int]:
    """Run the command once; return its exit status, or None where the machine ended before it began."""
    with run_directory() as directory, contextlib.ExitStack() as processes:
        prepare(machine, directory)
        files = start(virtiofsd_command(directory / "fs"), machine.console.with_suffix(".virtiofsd"))
        processes.callback(stop, files)
        await_socket(directory / "fs", files, machine.console.with_suffix(".virtiofsd"))
        qemu = start(qemu_command(machine, directory), machine.console.with_suffix(".qemu"),
                     machine.interactive)
        processes.callback(stop, qemu)
        in_time = copy_output(qemu, machine.timeout)
        status = verdict(machine, directory / "status")
        if in_time:
            return status
        say(f"{machine.kernel}: time limit of {machine.timeout:.0f} s reached")
        return status or STATUS_NO_ANSWER


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait until fewer machines run than processors can bear: emulated ones that share one get very slow."""
    places = [open(CACHE / f"turn-{number}.lock", "w") for number in range(JOBS)]
    with contextlib.ExitStack() as files:
        for place in places:
            files.enter_context(place)
        told = False
        while True:
            for place in places:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield
                    return
            if not told:
                say(f"{JOBS} virtual machines are running; waiting until one ends")
            told = True
            time.sleep(0.5)


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A directory for one virtual machine; those of killed predecessors are removed on the way."""
    base = CACHE / "run"
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        if not Path("/proc", old.name.split("-")[0]).exists():
            shutil.rmtree(old, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def prepare(machine: Machine, directory: Path) -> None:
    """Fill the run directory with what the guest needs: work tree, command, settings and a disk."""
    shutil.copytree(PROJECT, directory / "tree", symlinks=True, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(HERE / "init.sh", directory / "init")
    (directory / "init").chmod(0o755)
    # A little before the end, the kernel shall say what hangs.
    watchdog = int(machine.timeout) - 20
    settings = {"CACHE": CACHE, "TREE": PROJECT, "KERNEL": machine.kernel,
                "WATCHDOG": watchdog if watchdog > 0 else ""}
    lines = [f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items()]
    (directory / "settings").write_text("".join(lines))
    (directory / "command").write_text(guest_command(machine))
    with open(directory / "scratch", "wb") as scratch:
        scratch.truncate(8 << 30)
    do("/sbin/mkfs.ext4", "-q", "-F", directory / "scratch")


def guest_command(machine: Machine) -> str:
    """The shell script that the guest runs."""
    variables = [f"PATH={GUEST_PATH}", "HOME=/root", "USER=root", "LANG=C.UTF-8", "PYTHONUNBUFFERED=1",
                 f"TERM={os.environ.get('TERM', 'dumb')}",
                 f"UBLK_TEST_KERNEL={machine.kernel}", f"UBLK_HEADERS={HEADERS}", *machine.environment]
    own = f"lab.py: {os.getcwd()} is not in the virtual machine: /tmp, /var/tmp and /run there are its own"
    script = f"cd {shlex.quote(os.getcwd())} || {{ echo {shlex.quote(own)} >&2; exit 1; }}\n"
    if machine.interactive:
        size = shutil.get_terminal_size()
        script += f"exec </dev/hvc0 >/dev/hvc0 2>&1\nstty sane rows {size.lines} cols {size.columns}\n"
    return script + f"exec env -i {shlex.join(variables)} {shlex.join(machine.command)}\n"


def virtiofsd_command(socket: Path) -> list[str]:
    """The server for the guest's root file system; nothing but chroot is needed to confine it."""
    if OLD_VIRTIOFSD.exists():
        options = "source=/,cache=always,sandbox=chroot,no_posix_lock,xattr"
        return [str(OLD_VIRTIOFSD), f"--socket-path={socket}", "-o", options]
    # Announced mount points would be automounts in the guest, which overlayfs refuses.
    return [str(NEW_VIRTIOFSD), f"--socket-path={socket}", "--shared-dir=/", "--cache=always", "--readonly",
            "--sandbox=chroot", "--xattr", "--no-announce-submounts"]


def qemu_command(machine: Machine, directory: Path) -> list[str]:
    """The emulator's command line: only devices that the guest needs, because each costs boot time."""
    append = (f"{LEAN} rootfstype=virtiofs root=root ro console=ttyS0 loglevel=5 panic=-1 "
              "random.trust_cpu=1 tsc=nowatchdog lpj=10000000 no_timer_check "
              "rcupdate.rcu_cpu_stall_timeout=120 "
              f"init={directory}/init ublk_lab={directory}")
    initramfs = machine.home / "initramfs"
    report = ["-chardev", f"file,id=report,path={machine.report}",
              "-device", "virtserialport,chardev=report,nr=3"]
    terminal = ["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal,nr=0"]
    return [
        "qemu-system-x86_64", *accelerator(machine.home), "-smp", str(machine.cpus), "-m", machine.memory,
        "-object", f"memory-backend-memfd,id=memory,size={machine.memory},share=on",
        "-machine", "pc,memory-backend=memory",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
        "-kernel", str(machine.home / "image"), "-append", append,
        *(["-initrd", str(initramfs)] if initramfs.exists() else []),
        "-chardev", f"socket,id=fs,path={directory}/fs", "-device", "vhost-user-fs-pci,chardev=fs,tag=root",
        "-drive", f"file={directory}/scratch,if=none,id=scratch,format=raw,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=scratch",
        "-chardev", f"file,id=console,path={machine.console}", "-serial", "chardev:console",
        "-device", "virtio-serial-pci", *(terminal if machine.interactive else []),
        "-chardev", "file,id=output,path=/dev/fd/1,append=on",
        "-device", "virtserialport,chardev=output,nr=1",
        "-chardev", f"file,id=status,path={directory}/status",
        "-device", "virtserialport,chardev=status,nr=2", *(report if machine.report else []),
    ]


def accelerator(home: Path) -> list[str]:
    """Hardware virtualisation where a short boot showed that it works: /dev/kvm may exist and be useless."""
    remembered = CACHE / "accelerator"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return EMULATION
    if not remembered.exists():
        probe = ["timeout", "15", "qemu-system-x86_64", *HARDWARE, "-m", "512M", "-nodefaults",
                 "-display", "none", "-no-reboot", "-serial", "stdio",
                 "-kernel", str(home / "image"), "-append", "console=ttyS0 panic=-1"]
        result = subprocess.run(probe, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, check=False)
        # Without a root file system a kernel that works gets as far as this panic, which ends the machine.
        works = result.returncode == 0 and b"Unable to mount root fs" in result.stdout
        remembered.write_text("hardware" if works else "emulation")
    return HARDWARE if remembered.read_text() == "hardware" else EMULATION


def start(command: Sequence[str], log: Path, interactive: bool = False) -> subprocess.Popen[bytes]:
    """Start a helper that dies with this process, in its own session so that Ctrl-C reaches only us."""
    with open(log, "ab") as errors:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command], stderr=errors, start_new_session=True,
            stdin=None if interactive else subprocess.DEVNULL,
            stdout=None if interactive else subprocess.PIPE)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def listening(path: Path) -> bool:
    """Whether the socket there accepts connections: between bind(2) and listen(2) it refuses them."""
    sockets = map(str.split, Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(words[-1] == str(path) and int(words[3], 16) & ACCEPTING for words in sockets)


def await_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    while not listening(path):
        if process.poll() is not None:
            fail(f"virtiofsd did not start: {log.read_text().strip()}")
        time.sleep(0.02)


def copy_output(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Hand on what the guest prints until the emulator ends; False when that takes too long."""
    if process.stdout is None:
        return process.wait() >= 0
    deadline = time.monotonic() + timeout
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return True
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return False


def verdict(machine: Machine, status_file: Path) -> Optional[int]:
    """The command's exit status, unless the kernel's own log says that something went wrong.

    None where the machine ended before the command began.
    """
    log = machine.console
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    text = status_file.read_text() if status_file.exists() else ""
    begun, *status = text.split() or [""]
    if not status:
        when = "the command did" if begun else "it could begin the command"
        say(f"{machine.kernel}: the machine ended before {when}; {log} ends:")
        print(*lines[-40:], log.with_suffix(".qemu").read_text(), sep="\n", file=sys.stderr)
        return STATUS_NO_ANSWER if begun else None
    trouble = [line for line in lines if TROUBLE.search(line)]
    for line in trouble + [line for line in lines if WARNING.search(line)]:
        say(f"{machine.kernel}: kernel log: {line.strip()}")
    if trouble:
        say(f"{machine.kernel}: see {log}")
    return int(status[0]) or (STATUS_KERNEL_TROUBLE if trouble and machine.fail_on_oops else 0)


# ---- the test suite --------------------------------------------------------------------------------------

# Why a test may be skipped; a skip for any other reason fails the run.
EXPECTED_SKIPS = {
    r"needs Linux ": "the marker since() of tests/support.py",
    r"is for kernels before ": "the marker before() there",
    r"only root can give a ": "the native part may be run by anybody",
    r"takes the driver away: in the lab only": "HOST=1 is kind to the machine",
    r"not installed here: ": "HOST=1 runs with the programs there are; in the lab this fails the test itself",
    r"changes the machine: ": "what the README does to a machine, where HOST=1",
}


@dataclass
class Suite:
    """One run of the test suite somewhere; its lines are printed as they come, with the place in front."""
    where: str
    command: Sequence[str]
    report: Path
    environment: Optional[dict[str, str]] = None
    status: int = -1
    closing_line: str = ""
    last_test: str = "no test"
    executed: int = 0
    problems: list[str] = field(default_factory=list)

    def run(self, printing: threading.Lock, running: list[subprocess.Popen[str]]) -> Suite:
        with subprocess.Popen(self.command, cwd=PROJECT, env=self.environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace") as process:
            running.append(process)
            assert process.stdout
            try:
                for line in process.stdout:
                    found = re.fullmatch(r"=+ (.* in [\d.]+s.*?) =+\s*", line)
                    self.closing_line = found.group(1) if found else self.closing_line
                    begun = re.match(r"(\S+\.py::\S+)", line)
                    self.last_test = begun.group(1) if begun else self.last_test
                    with printing:
                        print(f"{self.where:>6} | {line.rstrip()}", flush=True)
            except BaseException:
                process.terminate()
                raise
        self.status = process.returncode
        self.read_report()
        return self

    def read_report(self) -> None:
        """Learn how many tests were run, and of which something is to be said."""
        try:
            cases = list(ElementTree.parse(self.report).iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            self.problems.append(f"no report ({error}); the last test begun was {self.last_test}")
            return
        for case in cases:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            skip = case.find("skipped")
            reason = "" if skip is None else skip.get("message", "")
            self.executed += skip is None
            if skip is not None and not any(re.match(known, reason) for known in EXPECTED_SKIPS):
                self.problems.append(f"SKIPPED {name}: {reason}")
            for kind in ("failure", "error"):
                for found in case.findall(kind):
                    text = found.get("message", "").partition("\n")[0]
                    self.problems.append(f"{'FAILED' if kind == 'failure' else 'ERROR'} {name}: {text}")

    def good(self, selected: bool) -> bool:
        """True when tests were run and all is well; of those selected a place may have none."""
        if self.problems or self.status not in (0, NO_TESTS_COLLECTED):
            return False
        return selected or self.executed > 0


def pytest_command(python: str, marks: str, word: str, report: object,
                   options: Sequence[str] = ()) -> list[str]:
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs", "-v", "--durations=25",
               f"--junitxml={report}"]
    return command + (["-m", marks] if marks else []) + (["-k", word] if word else []) + list(options)


def paths_of(names: str) -> list[str]:
    """Return the files, or files::tests, that these names stand for."""
    parts = [name.partition("::") for name in names.split()]
    return [f"tests/test_{name}.py{separator}{test}" for name, separator, test in parts]


# What is about the project's own programs, and the same with every driver: the first kernel has it.
ONCE = paths_of("durable exercises plugin proof raid readme suite systemd")
# Elsewhere there is, if not ALL=1, what that driver may do otherwise. The oldest has of the targets what all
# of them promise while their server lives, in test_targets.py; one in between has each target, and of a
# server's life what depends on the driver.
NOT_THERE = {
    "6.1": paths_of("""
        cache cow fault nbd replay stripe zoned
        targets::test_each_target_has_a_disk_for_reading_only
        targets::test_each_target_survives_kills_of_its_server
        lives::test_many_lives_leave_nothing_behind[AsyncRam-10-options1]
        lives::test_many_lives_leave_nothing_behind[Null-10-options2]
        """),
    "6.12": paths_of("async background holders identity lives targets trace"),
}
# Many short runs fill the processors better.
PARTS = 2               # of the native tests, and of an older kernel's
FIRST_PARTS = 3         # of the first kernel's


def left_out(kernel: str) -> list[str]:
    """Return the options by which pytest leaves out what others run."""
    return [f"--deselect={path}" if "::" in path else f"--ignore={path}"
            for path in [*NOT_THERE.get(kernel, []), *ONCE]]


def parts_of(number: int, word: str) -> list[str]:
    """Return the parts that a run is divided into, as UBLK_TEST_PART; few tests are not divided."""
    return ["0/1"] if word else [f"{part}/{number}" for part in range(number)]


def suites(kernels: Sequence[str], word: str, host: bool, pairs: bool, timeout: float,
           reports: Path) -> list[list[Suite]]:
    """What needs no driver natively, then the rest in each kernel; or all of it natively."""
    limited = ["timeout", "--kill-after=10", str(timeout)]
    # Bytecode that is written here saves each virtual machine ten seconds.
    native = {**os.environ, "UBLK_HEADERS": str(HEADERS), "PYTHONUNBUFFERED": "1",
              "PYTHONDONTWRITEBYTECODE": ""}
    if host:
        report = reports / "host.xml"
        everything = pytest_command(sys.executable, "", word, report)
        return [[Suite("host", limited + everything, report, {**native, "UBLK_TEST_KERNEL": "host"})]]
    natives = []
    machines = []
    for number, part in enumerate(parts_of(PARTS, word), 1):
        report = reports / f"host-{number}.xml"
        command = pytest_command(str(VENV / "bin/python"), "not kernel", word, report)
        natives.append(Suite(f"host/{number}", limited + command, report, {**native, "UBLK_TEST_PART": part}))
    more = ["--cpus=4", "--env=UBLK_TEST_ALL=1"] if pairs else []
    for kernel in kernels:
        first = kernel == kernels[0]
        options = [] if first or pairs else left_out(kernel)
        for number, part in enumerate(parts_of(FIRST_PARTS if first else PARTS, word), 1):
            report = reports / f"{kernel}-{number}.xml"
            boot = [sys.executable, str(HERE / "lab.py"), "run", kernel, f"--timeout={timeout}",
                    f"--report={report}", *more, f"--env=UBLK_TEST_PART={part}", "--"]
            command = pytest_command("python3", "kernel", word, GUEST_REPORT, options)
            machines.append(Suite(f"{kernel}/{number}", boot + command, report))
    return [natives, machines]


def test(kernels: Sequence[str], word: str, host: bool, pairs: bool, jobs: int, timeout: float) -> int:
    """Run the suite everywhere, print how each run ended, and return 0 when all is well."""
    if not (PROJECT / "test_ublk.py").exists():
        fail("there is no test_ublk.py")
    if host and (os.geteuid() != 0 or not Path("/dev/ublk-control").exists()):
        fail("HOST=1 needs root and a loaded ublk driver: sudo modprobe ublk_drv")
    if not host:
        fetch(kernels)
    with tempfile.TemporaryDirectory() as reports:
        done = run_all(suites(kernels, word, host, pairs, timeout, Path(reports)), jobs)
    for suite in done:
        state = "nothing selected" if suite.status == NO_TESTS_COLLECTED and word else "ok"
        state = state if suite.good(bool(word)) else "FAILED"
        print(f"=== {suite.where}: {state} (exit status {suite.status}): {suite.closing_line}",
              *suite.problems, sep="\n    ")
    executed = any(suite.executed for suite in done)
    return 0 if executed and all(suite.good(bool(word)) for suite in done) else 1


def run_all(rounds: Sequence[Sequence[Suite]], jobs: int) -> list[Suite]:
    """Run round after round, so many suites at once: the native ones leave bytecode for the others."""
    running: list[subprocess.Popen[str]] = []
    printing = threading.Lock()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [done for suites in rounds
                    for done in pool.map(lambda suite: suite.run(printing, running), suites)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def lint() -> int:
    """Check every Python file of the project."""
    make_venv("pytest", "ruff", "mypy", "vermin")
    files = sorted([*PROJECT.glob("*.py"), *HERE.glob("*.py"), *PROJECT.glob("tests/*.py"),
                    *PROJECT.glob("learn/*.py")])
    tools = [["ruff", "check", "--no-cache"], ["mypy", "--no-error-summary", f"--cache-dir={CACHE}/mypy"]]
    commands: list[list[object]] = [[VENV / "bin" / tool, *options, *files] for tool, *options in tools]
    commands.append([VENV / "bin/ruff", "format", "--no-cache", "--check", "ublk.py", "ublk_targets.py"])
    # Of the library, mypy knows no Python this old any more, and ruff only the syntax.
    commands.append([VENV / "bin/vermin", "--quiet", "--no-tips", "--violations", f"-t={OLDEST_PYTHON}-",
                     "ublk.py", "ublk_targets.py", "learn"])
    commands.append([sys.executable, HERE / "mutants.py", "--fits"])
    return max(subprocess.run(list(map(str, command)), cwd=PROJECT, check=False).returncode
               for command in commands)


# ---- command line ----------------------------------------------------------------------------------------

def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab.py", description="Real kernels with a ublk driver.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("fetch", help="install what is missing and download the kernels")
    verb.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    for name, what in (("run", "run a command"), ("shell", "an interactive shell")):
        verb = verbs.add_parser(name, help=f"{what} in a virtual machine")
        verb.add_argument("kernel", choices=KERNELS)
        verb.add_argument("--cpus", type=int, default=2)
        verb.add_argument("--memory", default="3G")
        verb.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
        verb.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
        verb.add_argument("--install", action="append", default=[], metavar="PACKAGE",
                          help="a Debian package that the command needs, too")
        verb.add_argument("--fail-on-oops", action=argparse.BooleanOptionalAction, default=True)
        if name == "run":
            verb.add_argument("--report", type=Path, metavar="FILE",
                              help=f"where to put what the command leaves as {GUEST_REPORT}")
            verb.add_argument("command", nargs="+")
    verb = verbs.add_parser("test", help="run the test suite natively and in every kernel")
    verb.add_argument("--kernel", action="append", choices=KERNELS)
    verb.add_argument("-k", dest="word", default="", help="only tests that match, as in pytest")
    verb.add_argument("--all", action="store_true", help="each data path with every target, on 4 processors")
    verb.add_argument("--host", action="store_true", help="everything natively, on this machine's driver")
    verb.add_argument("--jobs", type=int, default=JOBS, help="virtual machines at once")
    verb.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for each kernel")
    verbs.add_parser("lint", help="ruff, mypy and vermin")
    return parser.parse_args(arguments)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.verb == "fetch":
        unknown = set(options.kernels) - set(KERNELS)
        if unknown:
            fail(f"no such kernel: {', '.join(unknown)}; there are {', '.join(KERNELS)}")
        fetch(options.kernels or DEFAULT_KERNELS)
        return 0
    if options.verb == "lint":
        return lint()
    if options.verb == "test":
        kernels = options.kernel or DEFAULT_KERNELS
        return test(kernels, options.word, options.host, options.all, options.jobs, options.timeout)
    interactive = options.verb == "shell"
    command = ["bash"] if interactive else options.command
    return run(Machine(options.kernel, command, options.cpus, options.memory, options.timeout, options.env,
                       options.fail_on_oops, interactive, None if interactive else options.report,
                       options.install))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except subprocess.CalledProcessError as error:
        fail(str(error))
