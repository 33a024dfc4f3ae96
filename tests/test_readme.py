# SPDX-License-Identifier: MIT
"""The README does not lie: its programs run, and its commands print what it shows.

A block of code is called after its heading and its place below it. `...` in what a command prints stands
for any lines; what differs from one machine to the next is masked, see MASKS.
"""

from __future__ import annotations

import operator
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    HERE,
    IN_LAB,
    UBLK,
    await_state,
    copy_product,
    devices_left,
    installed,
    kernel,
    mounts_left,
    needs,
    sh,
    since,
    state_of,
    until,
)

# Why a block is not run.
NOT_RUN = {
    "learn-it-1": "runs in the project's directory",
    "first-steps-1": "starts a virtual machine",
    "on-a-machine-without-the-driver-1": "starts a virtual machine",
    "how-ublk-works-1": "names of nodes",
    "how-ublk-works-2": "a drawing",
    "states-1": "a drawing",
    "one-disk-on-many-machines-1": "`make gluster` does this",
    "one-disk-on-many-machines-2": "so does lab/stores.py",
    "command-line-1": "forms, not commands: see below",
    "systemd-1": "a unit, and there is no systemd in the lab",
    "systemd-2": "a line of /etc/fstab",
    "tests-and-benchmark-1": "starts virtual machines",
    "tests-and-benchmark-2": "starts virtual machines",
}

# Blocks that go on where the one before them ended.
CONTINUED = {
    "a-disk-of-your-own-from-the-shell-2",
    "test-your-storage-software-2",
    "a-failing-disk-in-a-test-of-your-own-database-1",
    "disks-of-ordinary-users-2",
    "crash-testing-2",
}

# What a block takes for granted.
GIVEN = {
    "ublk-py-1": "truncate -s 64M disk.img",
    "test-with-it-1": "truncate -s 64M disk.img",
    "targets-1": "truncate -s 64M disk.img",
    "targets-3": "mkfs.ext4 -q disk.img 64M",
    "targets-4": "qemu-img create -q -f qcow2 disk.qcow2 64M",
    "output-1": "truncate -s 256M disk.img && ublk.py loop disk.img --background",
    "errors-1": "truncate -s 64M disk.img",
    "when-the-server-dies-1":
        "mkdir content && echo hello >content/file && mkfs.ext4 -q -d content disk.img 256M",
    "live-upgrade-1": "ublk.py null -r reissue --background",
    "disks-of-ordinary-users-1": "id postgres || useradd --system postgres",
    "crash-testing-3": """echo 'pytest_plugins = ["ublk_targets"]' >conftest.py""",
}

# A use of a program that only defines something.
USE = {
    "an-asynchronous-disk-1": """
        truncate -s 1M secret.img
        ublk.py ./flipped.py secret.img --background
        printf hello | dd of=/dev/ublkb0 conv=fsync status=none
        ublk.py del 0
        test "$(head -c 5 secret.img | od -An -tx1)" = " 97 9a 93 93 90"
        """,
}

# Who runs a block, if not root.
USER = {"disks-of-ordinary-users-2": "postgres"}

# The oldest kernel that prints or can do what a block shows.
SINCE = {
    "output-1": "7.3",
    "features-1": "7.3",
    "live-upgrade-1": "6.16",
    "disks-of-ordinary-users-1": "6.3",
}

MASKS = {
    r"[A-Z][a-z]{2} +\d+ (\d\d:\d\d| \d{4})": "DATE",         # ls: with the year where the clock is behind
    r"\d+, +\d+": "MAJOR, MINOR",
    r"\b\d{3}:\d+": "MAJOR:MINOR",
    r"(?<![-\d])\d+(?= +\d+:\d+\b)": "PID",                     # in front of an owner, in `list`
    r'(?<="pid": )\d+': "PID",
    r'(?<="ns": )\d+': "TIME",
    r'(?<="tag": )\d+': "TAG",
    r"(?m)^e2fsck .*": "VERSION",
    r"\d+(?=/\d+ (files|blocks))": "COUNT",                     # of what mkfs made
    r"(?m)^ *\d+  (\w+) +\d+ +\d+$": r"N \1 OFFSET LENGTH",    # of what ext4 writes, in `replay`
    r"[1-9]\d*(?= (crash points|states))": "COUNT",             # of its flushes
}

# /mnt, /etc/udev and /usr/local are used as the README says.
in_lab_only = pytest.mark.skipif(not IN_LAB, reason="changes the machine: for the lab only")

BLOCK = re.compile(r"""
      ^ (?: \#+ \ (?P<heading>.+) | \*\*(?P<lead>[^*\n]+?)\.?\*\* )
    | ^ ``` (?P<language>\w+) \n (?P<fenced>(?:.*\n)*?) ```
    | (?P<indented> (?: ^ [ ]{4} .* \n (?: [ ]*\n (?=[ ]{4}) )? )+ )
    """, re.M | re.X)


def blocks(page):
    """Return every block of code, in order: its name, language ("" of an indented one) and text."""
    found, place, count = [], "", Counter()
    for match in BLOCK.finditer(page):
        title = match["heading"] or match["lead"]
        if title:
            place = re.sub(r"\W+", "-", title.lower()).strip("-")
            continue
        count[place] += 1
        name, language = f"{place}-{count[place]}", match["language"] or ""
        text = match["fenced"] or re.sub("(?m)^ {4}", "", match["indented"] or "")
        found.append(SimpleNamespace(name=name, language=language, text=text))
    return found


BLOCKS = blocks((HERE / "README.md").read_text())


def stories():
    """Return the blocks that are run, each with those that continue it, as the parameters of a test."""
    found = []
    for block in BLOCKS:
        if block.name in CONTINUED:
            found[-1].append(block)
        elif block.name not in NOT_RUN:
            found.append([block])
    return [pytest.param(story, id=story[0].name, marks=[since(SINCE.get(story[0].name, "6.0"))])
            for story in found]


def steps(text):
    """Return the commands of a block, each with what it is shown to print; None if that is not shown."""
    if not re.search(r"(?m)^\$ ", text):
        return [(line, None) for line in text.splitlines() if line]
    return [part.partition("\n")[::2] for part in re.split(r"(?m)^\$ ", text)[1:]]


def masked(text):
    """Return text without what differs between machines, and without its columns' widths."""
    for pattern, name in MASKS.items():
        text = re.sub(pattern, name, text)
    return "".join(" ".join(line.split()) + "\n" for line in text.splitlines() if line.strip())


def agrees(shown, printed, cut=False):
    """Tell whether a command printed what is shown, or with cut, only the beginnings of its lines."""
    pattern = ""
    for line in masked(shown).splitlines():
        pattern += r"(.*\n)*" if line == "..." else re.escape(line) + (r".*\n" if cut else r"\n")
    return re.fullmatch(pattern, masked(printed)) is not None


class Terminal:
    """Runs commands as a reader of the README would, in a directory with the project's two files."""

    def __init__(self, directory):
        self.directory, self.user, self.server, self.quick = directory, None, None, True
        copy_product(directory)
        programs = {"sudo": 'exec "$@"', "ublk.py": f'exec python3 -c "{installed(directory)}" "$@"'}
        for name, text in programs.items():
            path = directory / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    def run(self, command):
        """Run a command to its end, or until it serves a disk; return its status and what it printed."""
        if self.quick:
            command = command.replace("python3 ublk.py", "ublk.py")
        command = re.sub(r"(?<=kill -9 )\d+", self._pid, command)
        environment = {"PATH": f"{self.directory}/bin:{os.environ['PATH']}", "LANG": "C.UTF-8",
                       "HOME": str(self.directory)}
        options = {"cwd": self.directory, "env": {**environment, "UBLK_RUN_DIR": f"{self.directory}/run"}}
        if self.user:
            options = {"cwd": "/", "env": environment, "user": self.user, "group": self.user,
                       "extra_groups": []}
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, **options)

            def printed():
                return os.pread(output.fileno(), 1 << 20, 0).decode()

            def serves():
                return "--background" not in command and re.fullmatch(r"/dev/ublkb\d+\n", printed())
            until(lambda: process.poll() is not None or serves(), command)
            if process.returncode is None:
                self.interrupt()
                self.server = process
            elif "kill -9" in command:
                await_state(0, "DEAD", "QUIESCED")
            return process.returncode or 0, printed()

    def _pid(self, _):
        with ublk.Control() as control:
            return str(control.get_dev_info(0).ublksrv_pid)

    def interrupt(self):
        """Press Ctrl-C in the terminal where a server runs, which takes its disk away."""
        if self.server:
            self.server.send_signal(signal.SIGINT)
            assert self.server.wait(60) == 0
            self.server = None

    def program(self, text):
        """Run a Python program: with pytest where it has tests. It may name its file in its first line."""
        named = re.match(r"# (\w+\.py)\n", text)
        name = named[1] if named else "test_example.py"
        (self.directory / name).write_text(text)
        return self.run(f"python3 {'-m pytest -q -p no:cacheprovider ' if 'def test_' in text else ''}{name}")

    def close(self):
        """Take away what the commands have made."""
        self.interrupt()
        self.user = None
        for number in devices_left():
            if state_of(number) != "LIVE":          # unmounting would wait for a server
                self.run(f"ublk.py stop {number}")
        for path in mounts_left():
            sh("umount", path)
        if devices_left():
            self.run("ublk.py del --all")
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if b"--socket=/run/disk.sock" in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGTERM)


@pytest.fixture
def terminal():
    """A terminal; what is done there to the machine is undone."""
    directory = Path(tempfile.mkdtemp(dir="/scratch"))
    terminal = Terminal(directory)
    yield terminal
    terminal.close()
    shutil.rmtree(directory)
    shutil.rmtree("/usr/local/lib/ublk", ignore_errors=True)
    rules = Path("/etc/udev/rules.d/60-ublk.rules")
    if rules.exists():
        rules.unlink()
        sh("udevadm", "control", "--reload")
        os.chmod("/dev/ublk-control", 0o600)


@kernel
@in_lab_only
@pytest.mark.parametrize("story", stories())
def test_what_the_readme_shows_happens(story, terminal):
    terminal.quick = not story[0].name.startswith("first-steps")
    for command, _ in steps(GIVEN.get(story[0].name, "")):
        assert terminal.run(command)[0] == 0
    for block in story:
        terminal.user = USER.get(block.name)
        if block.language == "python":
            status, printed = terminal.program(block.text)
            assert status == 0, printed
            continue
        for command, shown in steps(block.text):
            command, cut = re.subn(r" \| cut -c -\d+$", "", command)
            status, printed = terminal.run(command)
            assert shown is None or agrees(shown, printed, cut), f"{command}\n{printed}"
            assert (status != 0) == printed.startswith("ublk: ") or shown, f"{command}\n{printed}"
    for command, _ in steps(USE.get(story[0].name, "")):
        assert terminal.run(command)[0] == 0, command


@pytest.mark.parametrize("damage, good", [("", True), ("clri file", False), ("freeb 1000", False)],
                         ids=["none", "file", "blocks"])
def test_a_check_that_is_shown_takes_no_damage_for_what_a_crash_may_leave(tmp_path, damage, good):
    """Which mending the file system first would do."""
    needs("mkfs.ext4", "e2fsck", "debugfs")
    check, = {word for block in BLOCKS for word in re.findall(r"--check '(.*e2fsck.*)'", block.text)}
    image, content = tmp_path / "disk.img", tmp_path / "content"
    content.mkdir()
    (content / "file").write_bytes(bytes(range(256)) * 4096)
    sh("mkfs.ext4", "-q", "-b", 1024, "-d", content, image, "8M")
    sh("debugfs", "-w", "-R", damage, image)
    done = sh("sh", "-c", check.replace("{}", str(image)), check=False)
    assert (done.returncode == 0) == good


@pytest.mark.parametrize("table", [NOT_RUN, CONTINUED, GIVEN, USE, USER, SINCE],
                         ids=["not-run", "continued", "given", "use", "user", "since"])
def test_what_is_said_of_the_readme_fits_it(table):
    assert not set(table) - {block.name for block in BLOCKS}


def test_what_is_not_run_is_not_run_by_chance_either():
    run = {block.name for story in stories() for block in story.values[0]}
    assert run.isdisjoint(NOT_RUN) and run | set(NOT_RUN) == {block.name for block in BLOCKS}


@pytest.mark.parametrize("printed, same", [
    ("0   LIVE  loop a  128    777  0:0    -\nb\n", True),
    ("0 LIVE loop a 128 777 0:0 - and more\nb\n", False),
    ("0   DEAD  loop a  128    777  0:0    -\nb\n", False),
    ("0   LIVE  loop a  128    -1  0:0    -\nb\n", False),
    ("0   LIVE  loop a  128    777  0:0    -\n", False),
    ("0   LIVE  loop a  128    777  0:0    -\nb\nc\n", False),
], ids=["pid", "more", "state", "no-server", "line-missing", "line-more"])
def test_another_output_is_noticed(printed, same):
    assert agrees("0   LIVE  loop a  128    203  0:0    -\nb", printed) == same


def test_a_shown_ellipsis_and_a_cut_stand_for_anything():
    assert agrees("a\n...\nb", "a\n1\n2\nb\n") and agrees("a\n...\nb", "a\nb\n")
    assert not agrees("a\n...\nb", "a\n1\n2\n")
    assert agrees("STATE  TAR", "STATE  TARGET  FLAGS\n", cut=True)


def forms():
    """Return the verbs of the block of forms, each with its words."""
    text = next(block.text for block in BLOCKS if block.name == "command-line-1")
    found = re.findall(r"^ublk\.py ([a-z-]+)\b((?:.*\n)(?: +\[.*\n| {3}.*\n)*)", text, re.M)
    return {verb: set(re.findall(r"--[a-z-]+", rest)) for verb, rest in found}


def test_the_forms_are_all_there(run):
    assert set(forms()) == set(ublk.VERBS)


@pytest.mark.parametrize("verb, options", forms().items())
def test_a_form_names_options_that_are_there(run, verb, options):
    assert options <= set(re.findall(r"--[a-z-]+", run(verb, "--help").out))


ROUTE = re.findall(r"^\| (.*\?) \| (.*) \| (`.*`) \|$", (HERE / "README.md").read_text(), re.M)
CHAPTERS = re.findall(r"^# =+\n# ([^:\n]+).*\n# =+$", UBLK.read_text(), re.M)


@pytest.mark.parametrize("question, chapter, names", ROUTE, ids=[question for question, _, _ in ROUTE])
def test_a_question_leads_to_a_chapter_and_names_that_are_there(question, chapter, names):
    assert chapter in CHAPTERS
    for name in names.replace("`", "").split(", "):
        operator.attrgetter(name)(ublk)


def test_there_is_a_question_on_every_chapter_but_the_first():
    assert {chapter for _, chapter, _ in ROUTE} == set(CHAPTERS[1:])


TARGETS = re.findall(r"^\| `(\w+)` \|.*\| `ublk\.py (.*)` \|$", (HERE / "README.md").read_text(), re.M)


def test_every_target_is_in_the_table():
    assert {name for name, _ in TARGETS} == set(ublk.known_targets())


@pytest.mark.parametrize("name, words", TARGETS)
def test_the_example_of_a_target_is_understood(name, words):
    assert words.split()[0] == name and ublk.target_maker(words.split())
