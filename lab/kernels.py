"""What the lab is made of: Debian packages, kernels with a ublk driver, a Python environment; fetched once.

Everything lies in ~/.cache/ublk-lab or in $UBLK_LAB:

    kernels/NAME/   image, config, lib/modules and, where the kernel needs one, initramfs
    headers/        the newest kernel's headers for C programs
    venv/           Python with pytest
    log/            what each virtual machine's kernel said
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CACHE = Path(os.environ.get("UBLK_LAB") or Path.home() / ".cache" / "ublk-lab").resolve()
VENV = CACHE / "venv"
HEADERS = CACHE / "headers"
# A version manager's python3 is a shell script that looks for the real one, which is slow under emulation.
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable


class Kernel(NamedTuple):
    """Where Debian has a kernel: its suite, and the metapackage that names the newest build there."""
    suite: str
    package: str
    # Debian built no ublk driver before 6.2, and has virtiofs only as a module there.
    old: bool = False


# The cloud flavour is smaller but lacks f2fs, one of the file systems for zoned disks.
KERNELS = {
    "6.1": Kernel("bookworm", "linux-image-cloud-amd64", old=True),
    "6.12": Kernel("trixie", "linux-image-amd64"),
    "7.2": Kernel("sid", "linux-image-amd64"),
    "7.3": Kernel("trixie-backports", "linux-image-amd64"),
}
# The newest driver, the oldest, whose tests take longest, and one that many have.
DEFAULT_KERNELS = ("7.3", "6.1", "6.12")
NEWEST_SUITE = "trixie-backports"

PACKAGES = """
    binutils btrfs-progs busybox-static e2fsprogs f2fs-tools fio gcc git kmod libc6-dev libelf1 make
    mdadm mount nbd-client nbdkit nbdkit-plugin-python passwd procps python3-venv qemu-system-x86 qemu-utils
    udev util-linux xfsprogs xz-utils zstd
""".split()
# Part of QEMU, in C, in Debian 12; a package of its own, in Rust and with other options, since Debian 13.
OLD_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
NEW_VIRTIOFSD = Path("/usr/libexec/virtiofsd")

# The rest (graphics, network cards, sound) is three quarters of a kernel's modules and of no use here.
KEPT_DRIVERS = {"block", "cdrom", "char", "dax", "md", "nvdimm", "nvme", "scsi", "target", "virtio"}

INITRAMFS_INIT = """#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod $module; done
/bin/busybox mount -t virtiofs -o ro root /root
/bin/busybox mount -t devtmpfs devtmpfs /root/dev
exec /bin/busybox switch_root /root "$ublk_lab/init"
"""


def fail(message: str) -> NoReturn:
    sys.exit(f"lab: {message}")


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


def do(*command: object, **options: Any) -> None:
    """Run a command that must succeed; standard output is kept free for what the lab is asked for."""
    options = {"check": True, "stdout": sys.stderr, **options}
    subprocess.run([str(word) for word in command], **options)


def answer(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def fetch(kernels: Sequence[str], packages: Sequence[str] = ()) -> None:
    """Make the lab complete for these kernels, with further packages; nothing happens when it is."""
    if not shutil.which("dpkg") or answer("dpkg", "--print-architecture").strip() != "amd64":
        fail("the lab needs a Debian machine with an amd64 processor")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in CACHE.glob(".new-*"):
            shutil.rmtree(leftover)
        install_packages([*PACKAGES, *packages])
        make_venv("pytest")
        fetch_headers()
        for name in kernels:
            fetch_kernel(name)


# ---- programs --------------------------------------------------------------------------------------------

def install_packages(wanted: list[str]) -> None:
    """Install those of these Debian packages that are missing on this machine."""
    if not OLD_VIRTIOFSD.exists() and not NEW_VIRTIOFSD.exists():
        bookworm = 'VERSION_ID="12"' in Path("/etc/os-release").read_text()
        wanted.append("qemu-system-common" if bookworm else "virtiofsd")
    # libelf1 is one of the libraries that a later release renamed and only provides under the old name.
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Provides}\n", *wanted, "libelf1*"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    installed = "\n".join(line for line in query.splitlines() if " installed" in line)
    missing = set(wanted) - set(re.findall(r"[\w.+-]+", installed))
    if missing:
        say(f"installing {' '.join(sorted(missing))}")
        root = [] if os.geteuid() == 0 else ["sudo"]
        apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0"]
        do(*apt, "update")
        do(*apt, "install", "--no-install-recommends", *sorted(missing))


def make_venv(*programs: str) -> None:
    """Provide a virtual environment with these programs in it."""
    if not (VENV / "bin/pip").exists():
        shutil.rmtree(VENV, ignore_errors=True)
        do(PYTHON, "-m", "venv", VENV)
    missing = [program for program in programs if not (VENV / "bin" / program).exists()]
    if missing:
        say(f"installing {' '.join(missing)} into {VENV}")
        do(VENV / "bin/pip", "-q", "--disable-pip-version-check", "install", *missing)


# ---- packages of other Debian releases -------------------------------------------------------------------

def debian_source(suite: str) -> tuple[str, str]:
    """This machine's own package source with another suite in it: an apt source file's name and text."""
    directory = Path("/etc/apt/sources.list.d")
    for path in sorted(directory.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            if re.search(r"^Suites:.*\b[a-z]+-updates\b", stanza, re.M):
                return "lab.sources", re.sub(r"^Suites:.*$", f"Suites: {suite}", stanza, flags=re.M) + "\n"
    for path in [Path("/etc/apt/sources.list"), *sorted(directory.glob("*.list"))]:
        text = path.read_text() if path.exists() else ""
        found = re.search(r"^deb\s+((?:\[.*?\]\s+)?\S+)\s+[a-z]+\s+.*\bmain\b", text, re.M)
        if found:
            return "lab.list", f"deb {found.group(1)} {suite} main\n"
    fail("no Debian package source found in /etc/apt")


class Apt:
    """A private apt state for one suite, so that this machine's own package sources stay as they are."""

    def __init__(self, suite: str, directory: Path) -> None:
        for name in ("lists/partial", "cache/archives/partial", "sources"):
            (directory / name).mkdir(parents=True)
        name, text = debian_source(suite)
        (directory / "sources" / name).write_text(text)
        self.directory = directory
        self.options = [f"-o{key}={value}" for key, value in {
            "Dir::State::lists": directory / "lists", "Dir::State::status": "/dev/null",
            "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": directory / "sources",
            "Dir::Cache": directory / "cache", "APT::Sandbox::User": "root", "Acquire::Languages": "none",
        }.items()]
        do("apt-get", *self.options, "-qq", "update")

    def needs(self, package: str, version: str = "") -> dict[str, str]:
        """A package and those parts of the kernel that it depends on, with their versions."""
        wanted = f"{package}={version}" if version else package
        newest = answer("apt-cache", *self.options, "show", "--no-all-versions", wanted)
        fields = dict(re.findall(r"^(\S+): (.*)$", newest, re.M))
        found = {package: fields["Version"]}
        part = re.compile(r"(linux-[\w.+-]+) \((>?=) (\S+?)\)(?=,|$)")
        for name, relation, needed in part.findall(fields.get("Depends", "")):
            if name != "linux-base":
                found.update(self.needs(name, needed if relation == "=" else ""))
        return found

    def unpack(self, packages: dict[str, str], target: Path) -> None:
        """Download packages, whose checksums apt verifies, and unpack them without installing anything."""
        names = [f"{name}={version}" for name, version in packages.items()]
        do("apt-get", *self.options, "-q", "download", *names, cwd=self.directory)
        for archive in self.directory.glob("*.deb"):
            do("dpkg", "-x", archive, target)
            archive.unlink()


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to fill that becomes `target` only at a good end: what is in the cache is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=CACHE))
    try:
        work.chmod(0o755)
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_headers() -> None:
    """Fetch the headers that structures are held against."""
    if HEADERS.exists():
        return
    say("fetching the newest kernel headers for C programs")
    with appearing(HEADERS) as work:
        apt = Apt(NEWEST_SUITE, work / "apt")
        apt.unpack(apt.needs("linux-libc-dev"), work / "root")
        for entry in (work / "root/usr/include").iterdir():
            entry.rename(work / entry.name)
        shutil.rmtree(work / "root")
        shutil.rmtree(work / "apt")


# ---- kernels ---------------------------------------------------------------------------------------------

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
            found = ", ".join(packages)
            fail(f"{kernel.suite} has no Linux {name} any more but {found}: edit KERNELS in {__file__}")
        root = work / "root"
        apt.unpack(packages, root)
        modules = next(root.glob("**/lib/modules/*"))
        modules = shutil.copytree(modules, work / "lib/modules" / modules.name, symlinks=True)
        # Where image and configuration lie has changed with 7.x.
        config = modules / "config"
        shutil.copy(config if config.exists() else next(root.glob("boot/config-*")), work / "config")
        unpack_image(next(root.glob("**/vmlinuz*")), work / "image")
        if kernel.old:
            build_driver(apt, packages[kernel.package], work / "driver", modules)
        slim_modules(modules / "kernel")
        do("depmod", "-b", work, modules.name)
        if kernel.old:
            build_initramfs(work, modules.name)
        shutil.rmtree(root)
        shutil.rmtree(apt.directory)


def unpack_image(image: Path, target: Path) -> None:
    """Take the plain kernel out of its self-extracting image, which would need a second to do so itself."""
    data = image.read_bytes()
    # See the kernel's Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    start = (data[0x1f1] + 1) * 512 + struct.unpack_from("<I", data, 0x248)[0]
    payload = data[start:start + struct.unpack_from("<I", data, 0x24c)[0]]
    if not payload.startswith(b"\x28\xb5\x2f\xfd"):
        shutil.copy(image, target)
        return
    with open(target, "wb") as output:
        # The last four bytes are the unpacked size and no part of the compressed stream.
        do("zstd", "-dcq", input=payload[:-4], stdout=output)


def slim_modules(kernel: Path) -> None:
    """Keep what the lab can use, uncompressed: loading a module is then twice as fast."""
    shutil.rmtree(kernel / "sound", ignore_errors=True)
    for driver in (kernel / "drivers").iterdir():
        if driver.is_dir() and driver.name not in KEPT_DRIVERS:
            shutil.rmtree(driver)
    packed = "\n".join(str(path) for path in kernel.glob("**/*.ko.xz"))
    do("xargs", "--no-run-if-empty", "--max-procs=4", "--max-args=64", "unxz", input=packed, text=True)


def build_driver(apt: Apt, version: str, work: Path, modules: Path) -> None:
    """Build the ublk driver that Debian left out of this kernel, against its headers."""
    apt.unpack({**apt.needs(f"linux-headers-{modules.name}"), "linux-source-6.1": version}, work)
    sources = work / "usr/src"
    do("tar", "-xJf", sources / "linux-source-6.1.tar.xz", "--occurrence=1", "-C", work,
       "--strip-components=3", "linux-source-6.1/drivers/block/ublk_drv.c")
    (work / "Makefile").write_text("obj-m := ublk_drv.o\n")
    headers = sources / f"linux-headers-{modules.name}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src", str(sources)))
    do("make", "-s", "-C", headers, f"M={work}", "CC=gcc", "modules")
    shutil.copy(work / "ublk_drv.ko", modules / "kernel/drivers/block")
    shutil.rmtree(work)


def build_initramfs(home: Path, release: str) -> None:
    """Make a start file system that does no more than load virtiofs and go on with the real root."""
    root = home / "initramfs.root"
    for name in ("bin", "dev", "modules", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    listing = answer("modprobe", "-d", home, "-S", release, "--show-depends", "-a", "virtio_pci", "virtiofs")
    for number, module in enumerate(dict.fromkeys(re.findall(r"^insmod (\S+)", listing, re.M))):
        shutil.copy(module, root / "modules" / f"{number:02d}.ko")
    (root / "init").write_text(INITRAMFS_INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(home / "initramfs", "wb") as output:
        do("busybox", "cpio", "-o", "-H", "newc", cwd=root, input=names.encode(), stdout=output,
           stderr=subprocess.DEVNULL)
    shutil.rmtree(root)
