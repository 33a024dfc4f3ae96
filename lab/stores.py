#!/usr/bin/env python3
"""One disk on many machines, as README.md has it, all of them this one: in the lab only (`make gluster`).

    stores.py [--rounds N] STORE...

Three members of a store keep an image (gluster: bricks of GlusterFS; ceph: OSDs), qemu-nbd serves it, and
`ublk.py nbd` makes it a disk. Three things are tried:

    members     fio verifies, and files are written to a file system and synced, while each member is killed
                and brought back: no error, no wrong data, fsck content
    durable     fio verifies what it writes durably, while qemu-nbd is killed and started again: the same
    synced      files are written and synced, while qemu-nbd is killed and started again: whatever becomes of
                the file system then, after fsck every file whose fsync() succeeded is whole

Prints a line for each; the exit status is 1 if one failed.
"""
from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tests.support as t
from tests.test_nbd import nbd_server, nbd_uri
from tests.test_recovery import Files, file_system

# Each is an address of this machine, as stores refuse 127.0.0.1
MACHINES = {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3"}
SIZE = "64M"
BEHIND = "--offset=32M"             # the file systems made here
# What a file system is told is there and nobody has flushed
UNSYNCED = ["fio", "--name=x", "--size=4M", "--rw=randwrite", "--direct=1", "--time_based", "--runtime=1h"]
BEGUN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGUN:5.0f} s  {text}", file=sys.stderr, flush=True)


class Gluster:
    """A volume of three copies, one on a brick of each machine."""

    image = "gluster://a/disks/disk.img"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        t.sh("glusterd")
        bricks = [f"{name}:{directory / name}" for name in MACHINES]
        self.volume("create", "replica", 3, *bricks, "force")
        self.volume("start")

    @staticmethod
    def volume(verb: str, *words: object) -> str:
        return str(t.sh("gluster", "--mode=script", "volume", verb, "disks", *words).stdout)

    def kill(self, name: str) -> None:
        """End a brick's server."""
        server = t.sh("pgrep", "-f", f"glusterfsd.*--brick-name {self.directory / name} ").stdout
        os.kill(int(server), signal.SIGKILL)

    def revive(self, name: str) -> None:
        """Start what is missing."""
        self.volume("start", "force")

    def whole(self) -> bool:
        """Tell whether all copies are the same again, and who uses one is connected to all."""
        behind = re.findall("Number of entries: (.*)", self.volume("heal", "info"))
        clients = re.findall("Clients connected : (.*)", self.volume("status", "clients"))
        return behind == ["0"] * 3 and len(clients) == 3 and len(set(clients)) == 1


class Ceph:
    """A pool of three copies, each on an OSD of its own, in a file.

    A new qemu-nbd waits until the cluster takes the old one for dead, here after five seconds.
    """

    image = "rbd:rbd/disk"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        cluster, address = str(uuid.uuid4()), f"[v2:{MACHINES['a']}:3300,v1:{MACHINES['a']}:6789]"
        Path("/etc/ceph").mkdir(exist_ok=True)
        Path("/etc/ceph/ceph.conf").write_text(CEPH.format(**locals()))
        t.sh("monmaptool", "--create", "--addv", "a", address, "--fsid", cluster, directory / "map")
        t.sh("ceph-mon", "-i", "a", "--mkfs", "--monmap", directory / "map")
        t.sh("ceph-mon", "-i", "a")
        (directory / "mgr").mkdir()
        t.sh("ceph-mgr", "-i", "a")
        for number in range(len(MACHINES)):
            name = str(uuid.uuid4())
            (directory / f"osd{number}").mkdir()
            assert t.sh("ceph", "osd", "new", name).stdout.strip() == str(number)
            t.sh("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", name)
            self.start(number)
        t.sh("ceph", "osd", "pool", "create", "rbd", 8)
        t.sh("rbd", "pool", "init", "rbd")

    @staticmethod
    def start(number: int) -> None:
        t.sh("ceph-osd", "-i", number)

    def kill(self, name: str) -> None:
        """End an OSD."""
        server = t.sh("pgrep", "-f", f"^ceph-osd -i {list(MACHINES).index(name)}$").stdout
        os.kill(int(server), signal.SIGKILL)

    def revive(self, name: str) -> None:
        self.start(list(MACHINES).index(name))

    def whole(self) -> bool:
        """Tell whether all copies are the same again."""
        up = "3 up" in t.sh("ceph", "osd", "stat").stdout
        return up and bool(re.match(r"(\d+) pgs: \1 active\+clean;", t.sh("ceph", "pg", "stat").stdout))


CEPH = """[global]
fsid = {cluster}
mon host = {address}
auth cluster required = none
auth service required = none
auth client required = none
osd crush chooseleaf type = 0
osd pool default size = 3
osd client watch timeout = 5
osd objectstore = bluestore
bluestore block size = 1073741824
mgr initial modules =
mon data = {directory}/mon
mgr data = {directory}/mgr
osd data = {directory}/osd$id
log file = {directory}/$name.log
run dir = {directory}
"""

STORES: dict[str, Any] = {"gluster": Gluster, "ceph": Ceph}


class Gateway:
    """qemu-nbd, in the foreground: the libraries of the stores do not survive its --fork."""

    def __init__(self, image: str, socket: Path) -> None:
        self.words = "qemu-nbd", "--persistent", "--format=raw", "--socket", "AT", image, socket
        self.stack = ExitStack()
        self.start()

    def start(self) -> None:
        self.server = self.stack.enter_context(nbd_server(*self.words))

    def restart(self) -> None:
        """Kill it and start another."""
        self.server.kill()
        self.server.wait()
        os.unlink(self.words[-1])
        self.start()


def members(disk: Any, store: Any, gateway: Gateway, rounds: int, directory: Path) -> str:
    """Kill each member and bring it back."""
    with file_system(disk, directory / "mnt"), t.Fio(disk, BEHIND) as fio:
        files = Files(directory / "mnt", directory / "journal")

        def busy() -> None:
            fio.busy()
            files.busy()
        busy()
        for name in MACHINES:
            store.kill(name)
            say(f"{name} is killed")
            busy()
            store.revive(name)
            say(f"{name} is back")
            busy()
            fio.finish()                # what is written to all the time never counts as the same
            files.process.send_signal(signal.SIGSTOP)
            t.until(store.whole, "the copies to be the same", 300)
            say("the copies are the same")
            files.process.send_signal(signal.SIGCONT)
        busy()
        fio.finish()
        files.finish()
        files.check()
    assert fio.errors == 0
    return f"{len(files.synced())} files synced"


def durable(disk: Any, store: Any, gateway: Gateway, rounds: int, directory: Path) -> str:
    """Kill qemu-nbd, of which nothing is asked but to read and to write durably."""
    before = t.completed(disk)
    with t.Fio(disk, BEHIND, "--sync=1") as fio:
        for number in range(rounds):
            fio.busy()
            gateway.restart()
            say(f"qemu-nbd started anew, {number + 1} of {rounds}")
        fio.busy()
        fio.finish()
    assert fio.errors == 0
    return f"{t.completed(disk) - before} requests"


def goes_on_or_ends(files: Any, before: int) -> bool:
    """Tell whether files are written again, or none can be."""
    return len(files.synced()) > before + 1 or files.process.poll() is not None


def synced(disk: Any, store: Any, gateway: Gateway, rounds: int, directory: Path) -> str:
    """Kill qemu-nbd under a file system, which may lose what was not synced, and must be told so."""
    count, failed = 0, 0
    for number in range(rounds):
        t.sh("mkfs.ext4", "-Fq", "-E", "nodiscard,lazy_itable_init=0", disk.path, "32M")
        with t.mount_of(disk.path, directory / "mnt"):
            files = Files(directory / "mnt", directory / f"journal {number}")
            others = subprocess.Popen([*UNSYNCED, f"--directory={directory / 'mnt'}"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(3):
                files.busy()
            gateway.restart()
            before = len(files.synced())
            t.until(partial(goes_on_or_ends, files, before), "the file system", 300)
            failed += files.process.poll() is not None
            for process in (files.process, others):
                process.kill()
                process.wait()
        assert t.sh("e2fsck", "-p", disk.path, check=False).returncode in (0, 1)
        t.sh("e2fsck", "-fn", disk.path)
        with t.mount_of(disk.path, directory / "mnt"):
            files.check()
        count += len(files.synced())
        say(f"{number + 1} of {rounds}: {len(files.synced())} files synced")
    return f"{count} files synced, {failed} of {rounds} file systems were told of a loss"


def main() -> int:
    parser = argparse.ArgumentParser(description="One disk on many machines.")
    parser.add_argument("--rounds", type=int, default=5, help="how often qemu-nbd is killed")
    parser.add_argument("stores", nargs="+", choices=STORES)
    options = parser.parse_args()
    if not t.IN_LAB:
        sys.exit("stores.py: in the lab only: it makes this machine a part of a store")
    for name, address in MACHINES.items():
        t.sh("ip", "address", "add", address, "dev", "lo")
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"{address} {name}\n")
    return 0 if all([attempt(store, options.rounds) for store in options.stores]) else 1


def attempt(store_name: str, rounds: int) -> bool:
    """Try one store; print what came of it."""
    directory = Path(tempfile.mkdtemp(dir="/scratch"))
    store = STORES[store_name](directory)
    t.sh("qemu-img", "create", "-q", "-f", "raw", store.image, SIZE)
    say(f"{store_name} is there")
    gateway, uri = Gateway(store.image, directory / "socket"), nbd_uri(directory / "socket")
    good = True
    with gateway.stack, t.Forked("nbd", uri, "--timeout", "300s", "-r", "reissue") as disk:
        for trial in (members, durable, synced):
            place = directory / trial.__name__
            place.mkdir()
            try:
                print(f"{store_name} {trial.__name__}: ok: {trial(disk, store, gateway, rounds, place)}",
                      flush=True)
            except Exception:
                traceback.print_exc()
                print(f"{store_name} {trial.__name__}: FAILED")
                good = False
        print(disk.said(), file=sys.stderr)
    return good


if __name__ == "__main__":
    sys.exit(main())
