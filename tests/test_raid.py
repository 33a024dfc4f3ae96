# SPDX-License-Identifier: MIT
"""Disks that mirror each other, by the kernel's md, as the README says."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from tests.support import Forked, Writers, kernel, needs, sh, until

ARRAY = "/dev/md0"


@contextmanager
def mirror_of(*legs):
    """Have md mirror disks."""
    needs("mdadm")
    sh("mdadm", "--create", ARRAY, "--run", "--level=1", "--bitmap=internal",
       f"--raid-devices={len(legs)}", *legs)
    try:
        yield
    finally:
        sh("mdadm", "--stop", ARRAY)


def in_sync(leg):
    """Tell whether a leg has all that the array has."""
    return Path("/sys/block/md0/md/dev-" + Path(leg.path).name, "state").read_text().strip() == "in_sync"


def synchronised():
    """Tell whether no leg is behind."""
    return Path("/sys/block/md0/md/degraded").read_text() == "0\n" and \
        Path("/sys/block/md0/md/sync_action").read_text() == "idle\n"


@kernel
def test_md_drops_a_disk_that_fails_and_takes_it_back_with_what_it_missed(workshop):
    with Forked("loop", "a.img") as good, Forked(*"fault --control ctl loop b.img".split()) as bad, \
            mirror_of(good.path, bad.path):
        until(synchronised, "the first copy")
        sh("blkdiscard", "-z", ARRAY)
        writers = Writers(bytes(int(sh("blockdev", "--getsize64", ARRAY).stdout)))
        writers.work(ARRAY)
        writers.busy()
        Path("ctl").write_text("--error EIO")
        until(lambda: not in_sync(bad), "the disk to be dropped")
        writers.busy()
        Path("ctl").unlink()
        sh("mdadm", ARRAY, "--remove", bad.path, "--re-add", bad.path)
        until(synchronised, "the disk to be up to date")
        writers.busy()
        assert writers.finish(), "a request has failed"
        writers.check(ARRAY)
        sh("mdadm", ARRAY, "--fail", good.path)             # so that what is read comes from the other
        writers.check(ARRAY)
