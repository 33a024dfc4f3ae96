#!/usr/bin/env python3
"""The lab: real Linux kernels with a ublk driver, each in a virtual machine on this machine's own root file system.

    lab.py fetch [KERNEL...]            install what is missing and download the kernels, once
    lab.py run KERNEL -- COMMAND...     run COMMAND as root in a virtual machine with that kernel

The virtual machine sees this machine's files through virtiofs, read-only, with a memory file system above: the guest can
write anywhere and nothing of it stays. See init.sh for what happens inside.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
CACHE = Path(os.environ.get("UBLK_LAB") or Path.home() / ".cache" / "ublk-lab").resolve()


class Kernel(NamedTuple):
    """Where Debian has a kernel: its suite, and the metapackage that names the newest build."""
    suite: str
    package: str
    initramfs: bool = False


KERNELS: Dict[str, Kernel] = {
    "6.1": Kernel("bookworm", "linux-image-cloud-amd64", initramfs=True),
    "6.12": Kernel("trixie", "linux-image-amd64"),
    "7.2": Kernel("sid", "linux-image-amd64"),
    "7.3": Kernel("trixie-backports", "linux-image-amd64"),
}
DEFAULT_KERNELS = ("7.3", "6.12", "6.1")
TROUBLE = re.compile(r"BUG:|kernel BUG at|Oops|general protection|blocked for more than|Kernel panic")
WARNING = re.compile(r"WARNING: ")


def fail(message: str) -> NoReturn:
    sys.exit(f"lab: {message}")


# ---- running ---------------------------------------------------------------------------------------------------------

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


def virtiofsd_command(socket: Path) -> List[str]:
    """The virtiofsd of Debian 12 (part of QEMU, in C) and its successor (in Rust) differ in their options."""
    old = Path("/usr/lib/qemu/virtiofsd")
    if old.exists():
        return [str(old), f"--socket-path={socket}", "-o", "source=/,cache=always,sandbox=chroot,no_posix_lock,xattr"]
    return ["/usr/libexec/virtiofsd", f"--socket-path={socket}", "--shared-dir=/", "--cache=always", "--sandbox=chroot", "--xattr"]


def qemu_command(kernel: str, directory: Path, console: Path, cpus: int, memory: str) -> List[str]:
    """The emulator's command line: only devices that the guest needs, because each costs boot time."""
    home = CACHE / "kernels" / kernel
    append = ("rootfstype=virtiofs root=root ro console=ttyS0 loglevel=5 panic=-1 oops=continue mitigations=off "
              "random.trust_cpu=1 tsc=nowatchdog nosoftlockup rcupdate.rcu_cpu_stall_timeout=120 "
              f"init={directory}/init ublk_lab={directory}")
    initrd = ["-initrd", str(home / "initramfs")] if KERNELS[kernel].initramfs else []
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
        "-m", memory, "-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-machine", "pc,memory-backend=memory",
        "-kernel", str(home / "vmlinuz"), *initrd, "-append", append,
        "-chardev", f"socket,id=fs,path={directory}/fs", "-device", "vhost-user-fs-pci,chardev=fs,tag=root",
        "-drive", f"file={directory}/scratch,if=none,id=scratch,format=raw,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=scratch",
        "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
        "-device", "virtio-serial-pci",
        "-chardev", f"pipe,id=output,path={directory}/output", "-device", "virtserialport,chardev=output,nr=1",
        "-chardev", f"file,id=status,path={directory}/status", "-device", "virtserialport,chardev=status,nr=2",
    ]


def prepare(directory: Path, kernel: str, command: Sequence[str], environment: Sequence[str], timeout: float) -> None:
    """Put into the run directory what the guest reads: the work tree, the command, its settings; and the scratch disk."""
    shutil.copytree(PROJECT, directory / "tree", symlinks=True, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(HERE / "init.sh", directory / "init")
    (directory / "init").chmod(0o755)
    settings = {"CACHE": str(CACHE), "TREE": str(PROJECT), "KERNEL": kernel, "WATCHDOG": str(max(0, int(timeout) - 20) or "")}
    (directory / "settings").write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()))
    path = f"{CACHE}/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = [f"PATH={path}", "HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=dumb", f"UBLK_LAB_KERNEL={kernel}", *environment]
    (directory / "command").write_text(f"cd {shlex.quote(os.getcwd())} || exit\nexec env -i {shlex.join(variables)} {shlex.join(command)}\n")
    with open(directory / "scratch", "wb") as scratch:
        scratch.truncate(8 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(directory / "scratch")], check=True)
    os.mkfifo(directory / "output.in")
    os.mkfifo(directory / "output.out")


def start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a helper process that dies with this one, in its own group so that Ctrl-C reaches only us."""
    with open(log, "ab") as errors:
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL,
                                stdout=errors, stderr=errors, start_new_session=True)


def pump(fifo: Path) -> None:
    """Copy what the guest prints to our standard output until the emulator ends."""
    with open(fifo, "rb", buffering=0) as source:
        while True:
            chunk = source.read(65536)
            if not chunk:
                return
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        if process.poll() is not None:
            fail("virtiofsd did not start")
        time.sleep(0.02)


def run(kernel: str, command: Sequence[str], cpus: int = 2, memory: str = "3G", timeout: float = 3600,
        environment: Sequence[str] = (), fail_on_oops: bool = True) -> int:
    """Boot a kernel, run a command in it, return its exit status."""
    logs = CACHE / "log"
    logs.mkdir(parents=True, exist_ok=True)
    console = logs / f"{kernel}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with run_directory() as directory:
        prepare(directory, kernel, command, environment, timeout)
        processes = []
        try:
            files = start(virtiofsd_command(directory / "fs"), console.with_suffix(".virtiofsd"))
            processes.append(files)
            wait_for(directory / "fs", files)
            reader = threading.Thread(target=pump, args=[directory / "output.out"], daemon=True)
            reader.start()
            qemu = start(qemu_command(kernel, directory, console, cpus, memory), console.with_suffix(".qemu"))
            processes.append(qemu)
            try:
                qemu.wait(timeout)
                reader.join(10)
            except subprocess.TimeoutExpired:
                print(f"lab: {kernel}: time limit of {timeout:.0f} s reached", file=sys.stderr)
        finally:
            for process in reversed(processes):
                process.kill()
                process.wait()
        return verdict(kernel, directory / "status", console, fail_on_oops)


def verdict(kernel: str, status_file: Path, console: Path, fail_on_oops: bool) -> int:
    """The command's exit status, unless the kernel's own log says that something went wrong."""
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    text = status_file.read_text().strip() if status_file.exists() else ""
    if not text:
        print(f"lab: {kernel}: the machine ended before the command did; {console} ends:", *lines[-40:], sep="\n", file=sys.stderr)
        return 124
    trouble = [line for line in lines if TROUBLE.search(line)]
    for line in trouble + [line for line in lines if WARNING.search(line)]:
        print(f"lab: {kernel}: kernel log: {line.strip()}", file=sys.stderr)
    if trouble:
        print(f"lab: {kernel}: see {console}", file=sys.stderr)
    return int(text) or (99 if trouble and fail_on_oops else 0)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="lab.py")
    commands = parser.add_subparsers(dest="verb", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("kernel", choices=KERNELS)
    runner.add_argument("--cpus", type=int, default=2)
    runner.add_argument("--memory", default="3G")
    runner.add_argument("--timeout", type=float, default=3600)
    runner.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    runner.add_argument("--fail-on-oops", action=argparse.BooleanOptionalAction, default=True)
    runner.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(options.kernel, options.command, options.cpus, options.memory, options.timeout, options.env, options.fail_on_oops)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
