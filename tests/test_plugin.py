# SPDX-License-Identifier: MIT
"""The fixtures that other people's tests are given: a whole suite of theirs runs, and is looked at."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import metadata

import pytest

import ublk
from tests.support import HERE, copy_product, kernel, needs_module, sh

CONFTEST = """
import pytest, ublk, ublk_targets
pytest_plugins = ["ublk_targets"]
ublk_targets.PATIENCE = 1                       # a disk that hangs or is held is given up soon
ublk.Device.stop.__defaults__ = (1,)
ublk.delete.__defaults__ = (1,)
"""

SUITE = """
import os, subprocess, time
from pathlib import Path
import pytest, ublk
from ublk_targets import Fault, Ram

def disks():
    return sorted(map(str, Path("/dev").glob("ublkb*")))

LATER = []                          # what is to be done when the fixtures are through

@pytest.fixture(autouse=True)
def looking_from_outside():         # set up first, so it is the last to look
    yield
    while LATER:
        LATER.pop()()
    end = time.monotonic() + 20     # the kernel and udev need a moment
    while disks() and time.monotonic() < end:
        time.sleep(0.01)
    assert not disks() and "/dev/ublkb" not in Path("/proc/mounts").read_text()

def size_of(device):
    with open(device.path, "rb") as file:
        return file.seek(0, os.SEEK_END)

def test_disks(disk):
    assert size_of(disk()) == 64 << 20
    assert size_of(disk(Ram(size=1 << 20), queues=2)) == 1 << 20
    assert size_of(disk("null", "--size", "8M")) == 8 << 20

def test_folders(folder):
    path = folder("ram", "--size", "8M", mkfs="mkfs.ext2 -q")
    (path / "file").write_text("text")
    assert path.is_mount() and folder().is_mount()

def test_faults(disk, folder, tmp_path):
    control = tmp_path / "control"
    device = disk(Fault(Ram(size=64 << 20), control=str(control)))
    path = folder(device)
    (path / "old").write_text("text")
    os.sync()
    control.write_text("--on write,flush --error EIO")
    with pytest.raises(OSError), open(path / "new", "wb", 0) as file:
        file.write(b"text")
        os.fsync(file)
    subprocess.run(["umount", path], check=True)
    control.unlink()
    assert (folder(device, mkfs="") / "old").read_text() == "text"

def test_failing_with_an_open_disk(disk):
    file = open(disk().path, "rb")
    assert not file

def test_failing_with_an_open_file(folder):
    file = open(folder() / "file", "w")
    assert not file

def test_failing_to_make_a_file_system(folder):
    folder(mkfs="false")

def test_leaving_somebody_at_work(folder):
    worker = subprocess.Popen(["sleep", "1000"], cwd=folder())
    LATER.extend([worker.wait, worker.kill])

def test_leaving_somebody_at_work_on_a_dead_disk(folder, tmp_path):
    control = tmp_path / "control"
    path = folder(Fault(Ram(size=320 << 20), control=str(control)), mkfs="mkfs.xfs -q")
    test_leaving_somebody_at_work(lambda: path)
    control.write_text("--on write,flush --error EIO")
    (path / "file").write_text("text")
    os.sync()
    with pytest.raises(OSError):    # XFS tells nothing any more
        path.lstat()

def test_leaving_a_hanging_disk(folder, tmp_path):
    control = tmp_path / "control"
    path = folder(Fault(Ram(size=64 << 20), control=str(control)))
    (path / "file").write_text("text")
    control.write_text("--hang")

@pytest.mark.usefixtures("nothing_left")
def test_leaving_a_disk_of_ones_own():
    device = ublk.Device(Ram(size=1 << 20))
    device.start()
    LATER.append(device.stop)
"""

# What the command that pip writes does.
COMMAND = """
import importlib.metadata, sys
points = importlib.metadata.distribution("ublk").entry_points
command, = (point for point in points if (point.group, point.name) == ("console_scripts", "ublk"))
sys.exit(command.load()())
"""

OUTCOMES = {
    "disks": "PASSED",
    "folders": "PASSED",
    "faults": "PASSED",
    "failing_with_an_open_disk": "FAILED",
    "failing_with_an_open_file": "FAILED",
    "failing_to_make_a_file_system": "FAILED",
    "leaving_somebody_at_work": "PASSED ERROR",
    "leaving_somebody_at_work_on_a_dead_disk": "PASSED ERROR",
    "leaving_a_hanging_disk": "PASSED",
    "leaving_a_disk_of_ones_own": "PASSED ERROR",
}


def pytest_in(directory, *words, check=False, path=""):
    """Run pytest where only the project's product, or what path has, can be imported."""
    return sh(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, cwd=directory, check=check,
              env={**os.environ, "PYTHONPATH": str(path)}).stdout


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the suite above says, run beside copies of the product's files."""
    directory = tmp_path_factory.mktemp("theirs")
    copy_product(directory)
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_theirs.py").write_text(SUITE)
    return pytest_in(directory, "-v")


@kernel
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_disk_lives_as_long_as_its_test(said, name):
    assert " ".join(re.findall(rf"::test_{name} (\w+)", said)) == OUTCOMES[name], said


@kernel
def test_what_keeps_a_disk_is_named(said):
    assert re.search(r"unmount /\S+: in use by sleep \(pid \d+\)", said), said
    assert re.search(r"left behind: /dev/ublkb\d+", said), said


@pytest.fixture
def installed(tmp_path):
    """A directory with what `pip install .` puts among the packages."""
    needs_module("setuptools", 61)         # the first that reads pyproject.toml
    path = tmp_path / "installed"
    path.mkdir()
    for name in "ublk.py", "ublk_targets.py", "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(HERE / name, path)
    build = "import setuptools; setuptools.setup()"
    sh(sys.executable, "-W", "ignore", "-c", build, "-q", "egg_info", cwd=path)
    return path


def test_what_is_installed_is_two_modules_and_a_command_and_nothing_else(installed):
    about, = metadata.distributions(name="ublk", path=[str(installed)])
    assert about.read_text("top_level.txt").split() == ["ublk", "ublk_targets"]
    assert (about.version, about.requires) == (ublk.__version__, None)
    said = sh(sys.executable, "-c", COMMAND, "--version", cwd=installed).stdout
    assert said == f"ublk.py {ublk.__version__}\n"


# A handler that does not return, in a thread that Python would wait for.
STUCK = """
import threading, ublk
threading.Thread(target=threading.Event().wait).start()
ublk._left_behind.append("its target")
"""


@pytest.mark.parametrize("words, status, says", [
    (["unknown"], 2, "unknown target"), (["/no/such.py", "--debug"], 1, "Traceback")])
def test_the_installed_command_ends_whatever_a_handler_does(installed, words, status, says):
    done = sh(sys.executable, "-c", STUCK + COMMAND, *words, cwd=installed, check=False, timeout=60)
    assert done.returncode == status and says in done.stderr


@pytest.mark.parametrize("conftest", ["", CONFTEST], ids=["alone", "with-conftest"])
def test_an_installed_project_offers_its_fixtures(installed, tmp_path, conftest):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "conftest.py").write_text(conftest)
    fixtures = pytest_in(theirs, "--fixtures", "-q", path=installed)
    assert re.search(r"^disk -- ", fixtures, re.M) and re.search(r"^folder -- ", fixtures, re.M), fixtures


def test_the_product_does_not_load_pytest():
    sh(sys.executable, "-c", "import sys, ublk, ublk_targets; assert 'pytest' not in sys.modules", cwd=HERE)
