#!/usr/bin/env python3
"""The lab: real Linux kernels with a ublk driver, each in a virtual machine on this machine's own root file system.

    lab.py fetch [KERNEL...]            install what is missing and download the kernels, once
    lab.py run KERNEL -- COMMAND...     run COMMAND as root in a virtual machine with that kernel
    lab.py shell KERNEL                 the same with an interactive shell
    lab.py test [-k WORD]               run the test suite natively and in every kernel
    lab.py lint                         ruff and mypy

The virtual machine sees this machine's files through virtiofs, read-only, with a memory file system above: the guest can
write anywhere and nothing of it stays. /scratch is a disk of 8 GiB with ext4. What happens inside is in init.sh.
Everything downloaded lies in ~/.cache/ublk-lab or in $UBLK_LAB.
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
CACHE = Path(os.environ.get("UBLK_LAB") or Path.home() / ".cache" / "ublk-lab").resolve()
VENV = CACHE / "venv"
HEADERS = CACHE / "headers"
# A pyenv or conda interpreter in PATH would start through a shell script, which is slow under emulation.
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable


class Kernel(NamedTuple):
    """Where Debian has a kernel: its suite, and the metapackage that names the newest build there."""
    suite: str
    package: str
    # Debian built no ublk driver before 6.2, and has virtiofs only as a module there.
    old: bool = False


# The cloud flavour is smaller but lacks f2fs, which the zoned tests want.
KERNELS: Dict[str, Kernel] = {
    "6.1": Kernel("bookworm", "linux-image-cloud-amd64", old=True),
    "6.12": Kernel("trixie", "linux-image-amd64"),
    "7.2": Kernel("sid", "linux-image-amd64"),
    "7.3": Kernel("trixie-backports", "linux-image-amd64"),
}
DEFAULT_KERNELS = ("7.3", "6.12", "6.1")
NEWEST_HEADERS = Kernel("trixie-backports", "linux-libc-dev")

PACKAGES = """
    binutils btrfs-progs busybox-static e2fsprogs f2fs-tools fio gcc kmod libc6-dev libelf1 make mount nbd-client nbdkit
    nbdkit-plugin-python passwd procps python3-venv qemu-system-x86 qemu-utils udev util-linux xfsprogs xz-utils zstd
""".split()
OLD_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
NEW_VIRTIOFSD = Path("/usr/libexec/virtiofsd")

# The rest (graphics, network cards, sound) is three quarters of a kernel's modules and of no use here.
KEPT_DRIVERS = {"block", "cdrom", "char", "dax", "md", "nvdimm", "nvme", "scsi", "target", "virtio"}

TROUBLE = re.compile(r"BUG:|kernel BUG at|Oops|general protection|blocked for more than|Kernel panic")
WARNING = re.compile(r"WARNING: ")
CLOSING_LINE = re.compile(r"=+ (.*\b(?:passed|failed|skipped|deselected|error|no tests ran)\b.* in [\d.]+s.*?) =+")
EMULATION = ["-accel", "tcg,thread=multi", "-cpu", "max"]
NO_TESTS_COLLECTED = 5
STATUS_OOPS = 99
STATUS_TIMEOUT = 124


def fail(message: str) -> NoReturn:
    sys.exit(f"lab: {message}")


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


def as_root(command: Sequence[str]) -> List[str]:
    return list(command) if os.geteuid() == 0 else ["sudo", *command]


# ---- fetching --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to fill that becomes `target` only when everything went well: what exists in the cache is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=CACHE))
    try:
        work.chmod(0o755)
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_packages() -> None:
    """Install the Debian packages that are missing on this machine."""
    wanted = list(PACKAGES)
    if not OLD_VIRTIOFSD.exists() and not NEW_VIRTIOFSD.exists():
        wanted += ["qemu-system-common" if debian_release() < 13 else "virtiofsd"]
    query = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Provides}\n", *wanted, "libelf1*"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    present = {name for line in query.stdout.splitlines() if " installed" in line for name in re.findall(r"[\w.+-]+", line)}
    missing = [package for package in wanted if package not in present]
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    apt = as_root(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0"])
    subprocess.run([*apt, "update"], check=True, stdout=sys.stderr)
    subprocess.run([*apt, "install", "--no-install-recommends", *missing], check=True, stdout=sys.stderr)


def debian_release() -> int:
    """The release's number; testing and unstable have none."""
    found = re.search(r'VERSION_ID="?(\d+)', Path("/etc/os-release").read_text())
    return int(found.group(1)) if found else 99


def make_venv(*packages: str) -> None:
    """Provide a virtual environment with these programs in it."""
    if not (VENV / "bin" / "pip").exists():
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([PYTHON, "-m", "venv", str(VENV)], check=True)
    missing = [package for package in packages if not (VENV / "bin" / package).exists()]
    if missing:
        say(f"installing {' '.join(missing)} into {VENV}")
        subprocess.run([str(VENV / "bin" / "pip"), "-q", "--disable-pip-version-check", "install", *missing], check=True)


def debian_source(suite: str) -> Tuple[str, str]:
    """This machine's own package source with another suite in it, as the name and text of an apt source file."""
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            if re.search(r"^Suites:.*\b[a-z]+-updates\b", stanza, re.M):
                return "lab.sources", re.sub(r"^Suites:.*$", f"Suites: {suite}", stanza, flags=re.M) + "\n"
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]
    for path in filter(Path.exists, lists):
        found = re.search(r"^deb\s+((?:\[.*?\]\s+)?\S+)\s+[a-z]+\s+.*\bmain\b", path.read_text(), re.M)
        if found:
            return "lab.list", f"deb {found.group(1)} {suite} main\n"
    fail("no Debian package source found in /etc/apt: the lab needs a Debian machine")


class Apt:
    """A private apt state for one suite, so that this machine's own package sources stay as they are."""

    def __init__(self, suite: str, directory: Path) -> None:
        for name in ("lists/partial", "cache/archives/partial", "sources"):
            (directory / name).mkdir(parents=True)
        name, text = debian_source(suite)
        (directory / "sources" / name).write_text(text)
        self.options = [f"-o{key}={value}" for key, value in {
            "Dir::State::lists": directory / "lists", "Dir::State::status": "/dev/null", "Dir::Cache": directory / "cache",
            "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": directory / "sources",
            "APT::Sandbox::User": "root", "Acquire::Languages": "none"}.items()]
        self.directory = directory
        subprocess.run(["apt-get", *self.options, "-qq", "update"], check=True, stdout=sys.stderr)

    def needs(self, package: str, version: str = "") -> Dict[str, str]:
        """A package and those parts of the kernel that it depends on, with their versions."""
        show = subprocess.run(["apt-cache", *self.options, "show", "--no-all-versions", f"{package}={version}".rstrip("=")],
                              check=True, stdout=subprocess.PIPE, text=True).stdout
        fields = dict(re.findall(r"^(\S+): (.*)$", show, re.M))
        found = {package: fields["Version"]}
        for name, relation, needed in re.findall(r"(linux-[\w.+-]+) \((>?=) (\S+?)\)(?=,|$)", fields.get("Depends", "")):
            if name != "linux-base":
                found.update(self.needs(name, needed if relation == "=" else ""))
        return found

    def unpack(self, packages: Dict[str, str], target: Path) -> None:
        subprocess.run(["apt-get", *self.options, "-q", "download", *(f"{name}={version}" for name, version in packages.items())],
                       check=True, cwd=self.directory, stdout=sys.stderr)
        for archive in self.directory.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
            archive.unlink()


def fetch_headers() -> None:
    if HEADERS.exists():
        return
    say("fetching the newest kernel headers for C programs")
    with appearing(HEADERS) as work:
        apt = Apt(NEWEST_HEADERS.suite, work / "apt")
        apt.unpack(apt.needs(NEWEST_HEADERS.package), work / "root")
        for entry in (work / "root/usr/include").iterdir():
            entry.rename(work / entry.name)
        shutil.rmtree(work / "apt")
        shutil.rmtree(work / "root")


def fetch_kernel(name: str) -> None:
    """Put a kernel's image, modules and configuration into the cache."""
    home = CACHE / "kernels" / name
    if home.exists():
        return
    kernel = KERNELS[name]
    say(f"fetching Linux {name} from {kernel.suite}")
    with appearing(home) as work:
        apt = Apt(kernel.suite, work / "apt")
        packages = apt.needs(kernel.package)
        if not any(package.startswith(f"linux-image-{name}.") for package in packages):
            fail(f"{kernel.suite} has no Linux {name} any more, but {' '.join(packages)}: change KERNELS in lab.py")
        root = work / "root"
        apt.unpack(packages, root)
        modules = next(root.glob("**/lib/modules/*"))
        (work / "lib/modules").mkdir(parents=True)
        modules = modules.rename(work / "lib/modules" / modules.name)
        image = next(path for path in (modules / "vmlinuz", root / "boot" / f"vmlinuz-{modules.name}") if path.exists())
        config = next(path for path in (modules / "config", root / "boot" / f"config-{modules.name}") if path.exists())
        shutil.copy(config, work / "config")
        unpack_image(image, work / "image")
        if kernel.old:
            build_driver(apt, work, modules)
        slim_modules(modules)
        subprocess.run(["depmod", "-b", str(work), modules.name], check=True)
        if kernel.old:
            build_initramfs(work, modules.name)
        shutil.rmtree(root)
        shutil.rmtree(work / "apt")


def unpack_image(image: Path, target: Path) -> None:
    """Take the plain kernel out of its self-extracting image: the emulator would need a second and a half for that."""
    data = image.read_bytes()
    start = (data[0x1f1] + 1) * 512 + struct.unpack_from("<I", data, 0x248)[0]
    payload = data[start:start + struct.unpack_from("<I", data, 0x24c)[0]]
    # The payload ends in four bytes with the unpacked size, which is no part of the compressed stream.
    tool = ["zstd", "-dcq"] if payload.startswith(b"\x28\xb5\x2f\xfd") else ["xz", "-dcq"]
    if tool[0] == "xz" and not payload.startswith(b"\xfd7zXZ"):
        shutil.copy(image, target)
        return
    with open(target, "wb") as output:
        subprocess.run(tool, input=payload[:-4], stdout=output, check=True)


def slim_modules(modules: Path) -> None:
    """Keep what the lab can use, uncompressed: loading a module is then twice as fast."""
    kernel = modules / "kernel"
    shutil.rmtree(kernel / "sound", ignore_errors=True)
    for driver in (kernel / "drivers").iterdir():
        if driver.name not in KEPT_DRIVERS:
            shutil.rmtree(driver) if driver.is_dir() else driver.unlink()
    packed = [str(path) for path in kernel.glob("**/*.ko.xz")]
    if packed:
        subprocess.run(["xargs", "-P4", "-n64", "unxz"], input="\n".join(packed), text=True, check=True)


def build_driver(apt: Apt, work: Path, modules: Path) -> None:
    """Build the ublk driver that Debian left out of this kernel, against its headers."""
    root = work / "driver"
    version = apt.needs(KERNELS["6.1"].package)[KERNELS["6.1"].package]
    apt.unpack({**apt.needs(f"linux-headers-{modules.name}"), "linux-source-6.1": version}, root)
    sources = root / "usr/src"
    subprocess.run(["tar", "-xJf", str(sources / "linux-source-6.1.tar.xz"), "--occurrence=1", "-C", str(root),
                    "--strip-components=3", "linux-source-6.1/drivers/block/ublk_drv.c"], check=True)
    (root / "Makefile").write_text("obj-m := ublk_drv.o\n")
    headers = sources / f"linux-headers-{modules.name}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src", str(sources)))
    subprocess.run(["make", "-s", "-C", str(headers), f"M={root}", "CC=gcc", "modules"], check=True, stdout=sys.stderr)
    shutil.copy(root / "ublk_drv.ko", modules / "kernel/drivers/block")
    shutil.rmtree(root)


def build_initramfs(work: Path, release: str) -> None:
    """Make a start file system that does no more than load virtiofs and go on with the real root."""
    root = work / "initramfs.root"
    for name in ("bin", "dev", "modules", "proc", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    listing = subprocess.run(["modprobe", "-d", str(work), "-S", release, "--show-depends", "-a", "virtio_pci", "virtiofs"],
                             check=True, stdout=subprocess.PIPE, text=True).stdout
    for number, module in enumerate(dict.fromkeys(re.findall(r"^insmod (\S+)", listing, re.M))):
        shutil.copy(module, root / "modules" / f"{number:02d}.ko")
    (root / "init").write_text(INITRAMFS_INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(work / "initramfs", "wb") as output:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=output,
                       stderr=subprocess.DEVNULL, check=True)
    shutil.rmtree(root)


INITRAMFS_INIT = """#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod $module; done
/bin/busybox mount -t virtiofs -o ro root /root
/bin/busybox mount -t devtmpfs devtmpfs /root/dev
exec /bin/busybox switch_root /root "$ublk_lab/init"
"""


def fetch(kernels: Sequence[str]) -> None:
    """Make the lab complete for these kernels; nothing happens when it is."""
    if subprocess.run(["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True, check=False).stdout.strip() != "amd64":
        fail("the lab needs a Debian machine with an amd64 processor")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in CACHE.glob(".new-*"):
            shutil.rmtree(leftover)
        install_packages()
        make_venv("pytest")
        fetch_headers()
        for name in kernels:
            fetch_kernel(name)


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
    if OLD_VIRTIOFSD.exists():
        return [str(OLD_VIRTIOFSD), f"--socket-path={socket}", "-o", "source=/,cache=always,sandbox=chroot,no_posix_lock,xattr"]
    return [str(NEW_VIRTIOFSD), f"--socket-path={socket}", "--shared-dir=/", "--cache=always", "--sandbox=chroot", "--xattr"]


def accelerator(kernel: str) -> List[str]:
    """The hardware's virtualisation where it works, which a short boot tells once: /dev/kvm may exist and be of no use."""
    answer = CACHE / "accelerator"
    kvm = ["-accel", "kvm", "-cpu", "host"]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return EMULATION
    if not answer.exists():
        probe = ["timeout", "15", "qemu-system-x86_64", *kvm, "-m", "512M", "-nodefaults", "-display", "none", "-no-reboot",
                 "-serial", "stdio", "-kernel", str(CACHE / "kernels" / kernel / "image"), "-append", "console=ttyS0 panic=-1"]
        result = subprocess.run(probe, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        # Without a root file system a kernel that runs gets as far as this panic, and the machine ends.
        works = result.returncode == 0 and b"Unable to mount root fs" in result.stdout
        answer.write_text("kvm" if works else "tcg")
    return kvm if answer.read_text() == "kvm" else EMULATION


def qemu_command(kernel: str, directory: Path, console: Path, cpus: int, memory: str) -> List[str]:
    """The emulator's command line: only devices that the guest needs, because each costs boot time."""
    home = CACHE / "kernels" / kernel
    append = ("rootfstype=virtiofs root=root ro console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=1 "
              "tsc=nowatchdog lpj=10000000 no_timer_check rcupdate.rcu_cpu_stall_timeout=120 "
              f"init={directory}/init ublk_lab={directory}")
    initrd = ["-initrd", str(home / "initramfs")] if KERNELS[kernel].old else []
    return [
        "qemu-system-x86_64", *accelerator(kernel), "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
        "-m", memory, "-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-machine", "pc,memory-backend=memory",
        "-kernel", str(home / "image"), *initrd, "-append", append,
        "-chardev", f"socket,id=fs,path={directory}/fs", "-device", "vhost-user-fs-pci,chardev=fs,tag=root",
        "-drive", f"file={directory}/scratch,if=none,id=scratch,format=raw,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=scratch",
        "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
        "-device", "virtio-serial-pci",
        "-chardev", "file,id=output,path=/dev/fd/1,append=on", "-device", "virtserialport,chardev=output,nr=1",
        "-chardev", f"file,id=status,path={directory}/status", "-device", "virtserialport,chardev=status,nr=2",
    ]


def prepare(directory: Path, kernel: str, command: Sequence[str], environment: Sequence[str], timeout: float) -> None:
    """Put into the run directory what the guest reads: the work tree, the command, its settings; and the scratch disk."""
    shutil.copytree(PROJECT, directory / "tree", symlinks=True, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(HERE / "init.sh", directory / "init")
    (directory / "init").chmod(0o755)
    # A little before the end, have the kernel say what hangs.
    settings = {"CACHE": str(CACHE), "TREE": str(PROJECT), "KERNEL": kernel, "WATCHDOG": str(max(0, int(timeout) - 20) or "")}
    (directory / "settings").write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()))
    path = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = [f"PATH={path}", "HOME=/root", "USER=root", "LANG=C.UTF-8", f"TERM={os.environ.get('TERM', 'dumb')}",
                 f"UBLK_TEST_KERNEL={kernel}", f"UBLK_HEADERS={HEADERS}", *environment]
    (directory / "command").write_text(f"cd {shlex.quote(os.getcwd())} || exit\nexec env -i {shlex.join(variables)} {shlex.join(command)}\n")
    with open(directory / "scratch", "wb") as scratch:
        scratch.truncate(8 << 30)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", str(directory / "scratch")], check=True)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a helper process that dies with this one, in its own session so that Ctrl-C reaches only us."""
    with open(log, "ab") as errors:
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=errors, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def await_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    while not path.exists():
        if process.poll() is not None:
            fail(f"virtiofsd did not start: {log.read_text().strip()}")
        time.sleep(0.02)


def copy_output(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Hand on what the guest prints until the emulator ends; False when it takes too long."""
    assert process.stdout
    deadline = time.monotonic() + timeout
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return True
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return False


def run(kernel: str, command: Sequence[str], cpus: int = 2, memory: str = "3G", timeout: float = 3600,
        environment: Sequence[str] = (), fail_on_oops: bool = True) -> int:
    """Boot a kernel, run a command in it, return its exit status."""
    fetch([kernel])
    if os.geteuid() != 0:
        os.execvp("sudo", ["sudo", "env", f"UBLK_LAB={CACHE}", sys.executable, *sys.argv])
    logs = CACHE / "log"
    logs.mkdir(parents=True, exist_ok=True)
    console = logs / f"{kernel}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with run_directory() as directory, contextlib.ExitStack() as processes:
        prepare(directory, kernel, command, environment, timeout)
        files = start(virtiofsd_command(directory / "fs"), console.with_suffix(".virtiofsd"))
        processes.callback(stop, files)
        await_socket(directory / "fs", files, console.with_suffix(".virtiofsd"))
        machine = start(qemu_command(kernel, directory, console, cpus, memory), console.with_suffix(".qemu"))
        processes.callback(stop, machine)
        in_time = copy_output(machine, timeout)
        if not in_time:
            say(f"{kernel}: time limit of {timeout:.0f} s reached")
        return verdict(kernel, directory / "status", console, fail_on_oops)


def verdict(kernel: str, status_file: Path, console: Path, fail_on_oops: bool) -> int:
    """The command's exit status, unless the kernel's own log says that something went wrong."""
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    status = status_file.read_text().strip() if status_file.exists() else ""
    if not status:
        errors = console.with_suffix(".qemu")
        say(f"{kernel}: the machine ended before the command did; {console} ends:")
        print(*lines[-40:], errors.read_text() if errors.exists() else "", sep="\n", file=sys.stderr)
        return STATUS_TIMEOUT
    trouble = [line for line in lines if TROUBLE.search(line)]
    for line in trouble + [line for line in lines if WARNING.search(line)]:
        say(f"{kernel}: kernel log: {line.strip()}")
    if trouble:
        say(f"{kernel}: see {console}")
    return int(status) or (STATUS_OOPS if trouble and fail_on_oops else 0)


# ---- testing ---------------------------------------------------------------------------------------------------------

class Outcome(NamedTuple):
    """How one run of the test suite ended."""
    where: str
    status: int
    closing_line: str

    @property
    def ran(self) -> bool:
        return " passed" in self.closing_line or self.status not in (0, NO_TESTS_COLLECTED)


def pytest_command(python: str, marks: str, word: str) -> List[str]:
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-v", "test_ublk.py"]
    return command + (["-m", marks] if marks else []) + (["-k", word] if word else [])


def follow(where: str, command: Sequence[str], lock: threading.Lock, environment: Optional[Dict[str, str]] = None) -> Outcome:
    """Run a test command, printing each of its lines with its name in front."""
    closing = "no closing line"
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout
        try:
            for line in process.stdout:
                found = CLOSING_LINE.search(line)
                closing = found.group(1) if found else closing
                with lock:
                    print(f"{where:>6} | {line}", end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    return Outcome(where, process.returncode, closing)


def test(kernels: Sequence[str], word: str, host: bool, jobs: int, timeout: float) -> int:
    """Run the suite: what needs no driver natively, the rest in each kernel (or all of it natively)."""
    if not (PROJECT / "test_ublk.py").exists():
        fail("there is no test_ublk.py")
    lock = threading.Lock()
    native = {**os.environ, "UBLK_HEADERS": str(HEADERS), "PYTHONUNBUFFERED": "1"}
    if host:
        if os.geteuid() != 0 or not Path("/dev/ublk-control").exists():
            fail("HOST=1 needs root and a loaded ublk driver: sudo modprobe ublk_drv")
        outcomes = [follow("host", pytest_command(sys.executable, "", word), lock, {**native, "UBLK_TEST_KERNEL": "host"})]
        return summary(outcomes, word)
    fetch(kernels)
    outcomes = [follow("host", pytest_command(str(VENV / "bin/python"), "not kernel", word), lock, native)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes += pool.map(lambda kernel: follow(kernel, [
            sys.executable, str(HERE / "lab.py"), "run", kernel, "--timeout", str(timeout), "--env", "PYTHONUNBUFFERED=1", "--",
            *pytest_command("python3", "kernel", word)], lock), kernels)
    return summary(outcomes, word)


def summary(outcomes: Sequence[Outcome], word: str) -> int:
    """Print how each run ended; the overall exit status."""
    good = any(outcome.ran for outcome in outcomes)
    for outcome in outcomes:
        fine = outcome.status == 0 or (word and outcome.status == NO_TESTS_COLLECTED)
        fine = fine and (outcome.ran or bool(word))
        good = good and bool(fine)
        print(f"=== {outcome.where}: {'ok' if fine else 'FAILED'} (exit status {outcome.status}): {outcome.closing_line}")
    return 0 if good else 1


def lint() -> int:
    make_venv("ruff", "mypy")
    files = [str(path) for path in [*sorted(PROJECT.glob("*.py")), *sorted(HERE.glob("*.py"))]]
    checks = [["ruff", "check", "--no-cache", *files], ["mypy", "--no-error-summary", f"--cache-dir={CACHE}/mypy", *files]]
    return max(subprocess.run([str(VENV / "bin" / check[0]), *check[1:]], cwd=PROJECT, check=False).returncode for check in checks)


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab.py", description="real kernels with a ublk driver in virtual machines")
    commands = parser.add_subparsers(dest="verb", required=True)
    fetcher = commands.add_parser("fetch", help="install what is missing and download the kernels")
    fetcher.add_argument("kernels", nargs="*", choices=[[], *KERNELS], metavar="KERNEL")
    runner = commands.add_parser("run", help="run a command in a virtual machine")
    runner.add_argument("kernel", choices=KERNELS)
    runner.add_argument("--cpus", type=int, default=2)
    runner.add_argument("--memory", default="3G")
    runner.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
    runner.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    runner.add_argument("--fail-on-oops", action=argparse.BooleanOptionalAction, default=True)
    runner.add_argument("command", nargs="+")
    tester = commands.add_parser("test", help="run the test suite natively and in every kernel")
    tester.add_argument("--kernel", action="append", choices=KERNELS)
    tester.add_argument("-k", dest="word", default="", help="only tests that match, as in pytest")
    tester.add_argument("--host", action="store_true", help="everything natively, with this machine's own driver")
    tester.add_argument("--jobs", type=int, default=2, help="virtual machines at once")
    tester.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
    commands.add_parser("lint", help="ruff and mypy")
    return parser.parse_args(arguments)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.verb == "fetch":
        fetch(options.kernels or DEFAULT_KERNELS)
        return 0
    if options.verb == "run":
        return run(options.kernel, options.command, options.cpus, options.memory, options.timeout, options.env, options.fail_on_oops)
    if options.verb == "test":
        return test(options.kernel or DEFAULT_KERNELS, options.word, options.host, options.jobs, options.timeout)
    return lint()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        fail(str(error))
