# SPDX-License-Identifier: MIT
"""Fixtures: what every test is given, and what it must leave as it was."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    ALICE,
    BOB,
    HANG,
    IN_LAB,
    KernelLog,
    clean_up,
    copy_product,
    installed,
    leftovers,
    sh,
    until,
    watchdog,
)

# A shell has what it runs in the background ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Leave out what others run: UBLK_TEST_PART=1/2 is every second test, from the second on.

    Tests that share a fixture made for all of them stay together, in the first part.
    """
    part, parts = map(int, os.environ.get("UBLK_TEST_PART", "0/1").split("/"))
    together = [item for item in items if "said" in item.fixturenames]
    alone = [item for item in items if item not in together]
    items[:] = alone[part::parts] + ([] if part else together)


@pytest.fixture
def run(capfd):
    """Run the command line in this process, which is quicker: run("list", "--json")."""
    def run(*words):
        capfd.readouterr()
        try:
            status = ublk.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return SimpleNamespace(status=status, **capfd.readouterr()._asdict())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    """Give every test a state directory of its own."""
    path = tmp_path / "run"
    monkeypatch.setenv("UBLK_RUN_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def seeded(request):
    """Have random choices be the same in every run of a test."""
    random.seed(request.node.name)


@pytest.fixture(autouse=True)
def nothing_hangs():
    """Fail a test that takes far too long; pytest shows every thread's stack before that.

    See faulthandler_timeout in pyproject.toml. Only where nothing helps the run ends.
    """
    with watchdog(HANG):
        yield


@pytest.fixture(autouse=True)
def nothing_left(request):
    """See that a kernel test has the driver, and leaves no device, process, mount or warning behind."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    assert os.geteuid() == 0, "kernel tests run as root"
    assert os.path.exists("/dev/ublk-control"), "there is no ublk driver: modprobe ublk_drv"
    assert not leftovers(), "left by something else than this test"
    log = KernelLog()
    yield
    deadline = time.monotonic() + 3         # dying processes need a moment
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.02)
    left = leftovers()
    if left:
        clean_up()
    trouble = log.trouble(request.node.name)
    log.close()
    assert not left, "the test left this behind"
    assert not trouble, "the kernel's log has this of the test"


@pytest.fixture
def control():
    """An open control plane."""
    with ublk.Control() as control:
        yield control


@pytest.fixture
def no_driver(monkeypatch):
    """Make /dev/ublk-control disappear, so that what gets that far fails in one known way."""
    system_open = os.open

    def refuses(path, *args, **options):
        if path == "/dev/ublk-control":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return system_open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuses)


@pytest.fixture
def targets():
    """The companion's targets."""
    return __import__("ublk_targets")


@pytest.fixture
def new_image():
    """Make a sparse file: new_image("64M"); on the lab's ext4 where there is one, as `backing` is."""
    directory = tempfile.mkdtemp(dir="/scratch" if IN_LAB else None)

    def make(size):
        path = Path(directory, "disk.img")
        with open(path, "wb") as file:
            file.truncate(ublk.parse_size(size))
        return path
    yield make
    shutil.rmtree(directory)


@pytest.fixture
def backing():
    """A file of 64 MiB for the target loop, on the lab's ext4 where there is one."""
    directory = tempfile.mkdtemp(dir="/scratch" if IN_LAB else None)
    path = Path(directory, "disk.img")
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    yield path
    shutil.rmtree(directory)


@pytest.fixture
def rules():
    """Install the udev rules for ordinary users, as `check` says."""
    path = Path("/run/udev/rules.d/60-ublk.rules")

    def apply():
        sh("udevadm", "control", "--reload")
        sh("udevadm", "trigger", "--settle", "--name-match=/dev/ublk-control")
    path.parent.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir="/run"))          # where only root may write
    copy_product(directory)
    (directory / "quick.py").write_text(installed(directory))
    text = sh("/usr/bin/python3", directory / "quick.py", "udev-rules").stdout
    assert f"{directory}/ublk.py udev-owner" in text
    path.write_text(text.replace("ublk.py udev-owner", "quick.py udev-owner"))
    # Again and again, as udev may be told of the node between its old rules and its new
    until(lambda: apply() or os.stat("/dev/ublk-control").st_mode & 0o777 == 0o666)
    yield
    path.unlink()
    shutil.rmtree(directory)
    apply()
    os.chmod("/dev/ublk-control", 0o600)
    for uid in (ALICE, BOB):
        shutil.rmtree(f"/tmp/ublk-{uid}", ignore_errors=True)


@pytest.fixture
def workshop(monkeypatch):
    """A directory to work in, with empty files of 8 MiB and a base that has some data."""
    path = Path(tempfile.mkdtemp(dir="/scratch" if IN_LAB else None))
    monkeypatch.chdir(path)
    for name in "a.img", "b.img":
        with open(name, "wb") as file:
            file.truncate(8 << 20)
    base = os.urandom(4 << 20) + bytes(4 << 20)
    Path("base.img").write_bytes(base)
    yield path
    assert Path("base.img").read_bytes() == base
    shutil.rmtree(path)


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """A directory to work in with files of 1 MiB."""
    monkeypatch.chdir(tmp_path)
    for name in "a.img", "b.img":
        Path(name).write_bytes(bytes(1 << 20))


@pytest.fixture
def here():
    """A path short enough for a socket."""
    directory = tempfile.mkdtemp(prefix="nbd")
    yield Path(directory, "s")
    shutil.rmtree(directory)
