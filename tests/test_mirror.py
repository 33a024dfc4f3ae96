# SPDX-License-Identifier: MIT
"""Companion: mirrors."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import ublk
from tests.support import (
    Writers,
    digest,
    error_of,
    files,
    kernel,
    opened,
    patched,
    read_at,
    until,
    write_at,
)

# ---- mirror -------------------------------------------------------------------------------------


@pytest.fixture
def quick_rebuild(targets, monkeypatch):
    """Have mirrors look for their legs more often."""
    monkeypatch.setattr(targets.Mirror, "retry", 0.2)


def dropped(mirror):
    """Return the legs that a mirror does not use."""
    return [leg.path for leg in mirror.legs if leg.why]


@contextmanager
def failing_leg(targets, workshop):
    """Serve b.img as a disk that fails as the file `fail` says."""
    target = targets.Fault(targets.Loop("b.img", direct=True), control="fail")
    with ublk.Device(target) as leg:
        yield leg.path


@kernel
def test_a_failing_leg_is_dropped_and_rebuilt_under_load(targets, workshop, quick_rebuild, capfd):
    with failing_leg(targets, workshop) as leg:
        mirror = targets.Mirror(leg, "a.img", rebuild=True, state="state", direct=True)
        with ublk.Device(mirror) as disk:
            writers = Writers(bytes(8 << 20))
            writers.work(disk.path)
            for words in "--error EIO", "--error EIO --torn --rate 0.2 --on write":
                writers.busy()
                Path("fail").write_text(words)
                until(lambda: leg in dropped(mirror), "the leg to be dropped")
                writers.busy()
                assert Path("state").read_text() == leg + "\n"
                Path("fail").write_text("--delay 20ms")         # so that much is written meanwhile
                until(lambda: not dropped(mirror), "the leg to be rebuilt")
            writers.busy()
            assert writers.finish(), "a request has failed"
            writers.check(disk.path)
    told = capfd.readouterr().err
    assert f"ublk: mirror: dropped {leg}" in told and told.count(f"ublk: mirror: rebuilt {leg}\n") == 2
    assert Path("state").read_text() == ""
    assert digest("a.img") == digest("b.img")


def test_a_rebuild_copies_nothing_that_a_request_changes(targets, tmp_path):
    good, leg = files(tmp_path, 2, 2 << 20)
    mirror = targets.Mirror(good, leg, state=str(tmp_path / "state"))
    request = object()
    assert mirror._enter(request, 4096, 8192) == mirror.legs
    copy = threading.Thread(target=mirror._copy, args=(0, 1 << 20, mirror.legs[1].disk.fd))
    copy.start()
    until(lambda: mirror.copying == (0, 1 << 20), "the copy to begin")
    assert mirror._enter(object(), (1 << 20) - 512, 1 << 20) == []      # this request has to wait ...
    assert mirror._enter(object(), 1 << 20, 2 << 20) == mirror.legs     # ... and this one has not
    patched(good, 4096, b"x" * 4096)
    del mirror.writing[request]
    copy.join()
    assert Path(leg).read_bytes()[4096:8192] == b"x" * 4096
    assert mirror._enter(object(), 0, 512) == mirror.legs
    mirror.close()


@kernel
def test_a_leg_that_was_away_is_not_believed_until_it_is_rebuilt(targets, workshop, quick_rebuild, capfd):
    def value(*paths, **options):
        mirror = targets.Mirror(*paths, state="state", **options)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            until(lambda: not options.get("rebuild") or not dropped(mirror), "the rebuild")
            write_at(fd, 8192, next(numbers))
            return read_at(fd, 4096, 4096), dropped(mirror)

    numbers = iter(bytes([number]) * 4096 for number in range(1, 9))
    os.rename("b.img", "away")
    assert value("b.img", "a.img") == (bytes(4096), ["b.img"])
    assert "ublk: mirror: dropped b.img: " in capfd.readouterr().err
    os.rename("away", "b.img")
    with open("a.img", "r+b") as file:
        file.seek(4096)
        file.write(b"x" * 4096)
    assert value("b.img", "a.img") == (b"x" * 4096, ["b.img"])
    os.rename("a.img", "away")                      # the only good one
    assert error_of(lambda: targets.Mirror("b.img", "a.img", state="state")) == errno.ENOENT
    os.rename("away", "a.img")
    assert value("b.img", "a.img", rebuild=True) == (b"x" * 4096, [])
    assert digest("a.img") == digest("b.img")


@kernel
def test_what_one_leg_cannot_read_another_does(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        mirror = targets.Mirror(leg, "a.img", state="state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            write_at(fd, 0, b"x" * 4096)
            Path("fail").write_text("--error EIO --on read")
            assert read_at(fd, 0, 4096) == b"x" * 4096 and dropped(mirror) == [leg]


@kernel
def test_a_rebuild_reads_from_a_leg_that_can(targets, workshop, quick_rebuild, capfd):
    shutil.copy("a.img", "c.img")
    patched("a.img", 1 << 20, b"x" * 4096)
    patched("b.img", 1 << 20, b"x" * 4096)
    Path("state").write_text(os.path.abspath("c.img\n"))
    with failing_leg(targets, workshop) as leg:
        Path("fail").write_text("--error EIO --on read")
        mirror = targets.Mirror(leg, "a.img", "c.img", state="state", rebuild=True, direct=True)
        with ublk.Device(mirror):
            until(lambda: dropped(mirror) == [leg], "the rebuild")
    assert digest("c.img") == digest("a.img")
    told = capfd.readouterr().err
    assert f"ublk: mirror: dropped {leg}: " in told and "dropped a.img" not in told


def test_a_leg_is_known_by_any_name(targets, two_files):
    os.symlink("b.img", "link")
    Path("state").write_text(os.path.abspath("b.img\n"))
    for name in "b.img", "./b.img", os.path.abspath("b.img"), "link":
        mirror = targets.Mirror("a.img", name, state="state")
        assert dropped(mirror) == [name]
        mirror.close()
    assert targets.Mirror("a.img", "b.img").state == targets.Mirror("./link", "a.img").state


def test_of_two_legs_that_fail_at_once_one_stays(targets, two_files):
    mirror, refused = targets.Mirror("a.img", "b.img", state="state"), []

    def drop(leg):
        try:
            mirror._drop({leg: OSError(errno.EIO, leg.path)})
        except OSError as error:
            refused.append(str(error))
    threads = [threading.Thread(target=drop, args=(leg,)) for leg in mirror.legs]
    with mirror.lock:                   # both find two good legs, unless they look with the lock held
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    good, = mirror.good()
    assert refused == [f"[Errno {errno.EIO}] {good.path}"]
    mirror.close()


@kernel
def test_no_write_ends_well_before_a_dropped_leg_is_noted(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        os.mkdir("notes")
        mirror = targets.Mirror(leg, "a.img", state="notes/state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            os.rename("notes", "away")
            Path("notes").write_text("a file where the directory was")
            Path("fail").write_text("--error EIO --on write")
            for _ in range(3):
                assert error_of(write_at, fd, 0, b"x" * 4096) == errno.EIO
            os.unlink("notes")
            os.rename("away", "notes")
            write_at(fd, 0, b"x" * 4096)
            assert Path("notes/state").read_text() == leg + "\n" and dropped(mirror) == [leg]


@kernel
def test_the_last_leg_is_not_dropped(targets, workshop):
    with failing_leg(targets, workshop) as leg:
        Path("state").write_text(os.path.abspath("a.img\n"))
        mirror = targets.Mirror(leg, "a.img", state="state", direct=True)
        with ublk.Device(mirror) as disk, opened(disk.path) as fd:
            Path("fail").write_text("--error EIO")
            assert error_of(read_at, fd, 0, 4096) == error_of(write_at, fd, 0, bytes(4096)) == errno.EIO
            os.unlink("fail")
            assert read_at(fd, 0, 4096) == bytes(4096) and dropped(mirror) == ["a.img"]
