# SPDX-License-Identifier: MIT
"""Tests of ublk.py: the front door.

    make test                     everything, natively and in real kernels
    make test K=word KERNEL=7.3   some of it, in one kernel

What a reader of the project should see tested stands here, in the README's order: the command line, a disk
from import, data, handlers, errors and state files. The rest is in tests/, a file a chapter; tests/README.md
says where a new test goes.

Tests marked ``kernel`` never skip because the driver is missing: that is a failure. Each of them
must leave the machine as it was, and `nothing_left` looks: no device, process or mount of a test
outlives it. A test that hangs ends with every thread's stack. No test looks at the clock: on an
emulated machine everything is slow.

UBLK_TEST_KERNEL names the kernel of a run in the lab; with UBLK_TEST_ALL each data path meets every
target and number of queues, which otherwise take turns; UBLK_HEADERS is a directory with a newer
linux/ublk_cmd.h than the system's.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import re
import shutil
import signal
import stat
import threading
from pathlib import Path

import pytest

import ublk
from tests.conftest import (
    backing,
    control,
    new_image,
    no_driver,
    nothing_hangs,
    nothing_left,
    run,
    run_dir,
    targets,
)
from tests.support import (
    HERE,
    IN_LAB,
    UBLK,
    AsyncRam,
    Forked,
    Ram,
    Recorder,
    as_user,
    assert_error_line,
    assert_fails,
    at_least,
    carries,
    children_of,
    devices_left,
    digest,
    error_of,
    example,
    files,
    kernel,
    leftovers,
    message,
    needs,
    opened,
    read_at,
    sh,
    since,
    target_file,
    until,
    verb,
    write_at,
)


def test_no_driver(no_driver, run):
    for words in ("null", "list", "stop 0", "del 0", "del --all", "resize 0 1G", "features"):
        assert_fails(run(*words.split()), 1, "cannot open /dev/ublk-control: ", errno.ENOENT)
        assert "ublk.py check" in run(*words.split()).err


def test_check_says_what_to_do_about_a_missing_driver(run, monkeypatch):
    system_exists = os.path.exists
    monkeypatch.setattr(os.path, "exists",
                        lambda path: "ublk-control" not in str(path) and system_exists(path))
    done = run("check")
    assert done.status == 1 and re.search(r"missing +ublk driver: .*modprobe ublk_drv", done.out)


def test_check_names_the_node_that_a_container_lacks(run, monkeypatch):
    there = {"/sys/class/misc/ublk-control": True, "/dev/ublk-control": False}
    system_exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: there.get(str(path), system_exists(path)))
    done = run("check")
    assert done.status == 1
    assert re.search(r"missing +/dev/ublk-control: .*--device /dev/ublk-control", done.out)


def test_check_says_what_to_do_about_a_missing_io_uring(run, monkeypatch):
    def refuses(*_):
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(ublk, "_syscall", refuses)
    done = run("check")
    assert done.status == 1 and re.search(r"missing +io_uring: .*sysctl kernel.io_uring_disabled=0", done.out)


@pytest.mark.parametrize("words, status, says, number", [
    ("nul", 2, "unknown target or command 'nul'", None),
    ("lisst", 2, "targets are ", None),
    ("null --size 0", 1, "size 0", errno.EINVAL),
    ("null --size 1000", 1, "size 1000", errno.EINVAL),
    ("null --size 4608 --block-size 4K", 1, "not a multiple of the block size 4096", errno.EINVAL),
    ("null --size 9000000T", 1, "size 9895604649984000000", errno.EINVAL),
    ("null --size -1", 2, "--size", None),
    ("null --size much", 2, "--size", None),
    ("null --block-size 1000", 1, "block size 1000", errno.EINVAL),
    ("null --block-size 256", 1, "block size 256", errno.EINVAL),
    ("null --block-size 128K", 1, "block size 131072", errno.EINVAL),
    ("null --depth 0", 1, "depth 0", errno.EINVAL),
    ("null --depth 5000", 1, "depth 5000", errno.EINVAL),
    ("null --depth -1", 1, "depth -1", errno.EINVAL),
    ("null --depth many", 2, "--depth", None),
    ("null --queues 0", 1, "queues 0", errno.EINVAL),
    ("null --queues 5000", 1, "queues 5000", errno.EINVAL),
    ("null --max-io 0", 1, "largest request 0", errno.EINVAL),
    ("null --max-io 1000", 1, "largest request 1000", errno.EINVAL),
    ("null --max-io 1G", 1, "largest request 1073741824", errno.EINVAL),
    ("null --id -7", 1, "id -7", errno.EINVAL),
    ("null --id 99999999", 1, "id 99999999", errno.EINVAL),
    ("null --id x", 2, "--id", None),
    ("null --recovery maybe", 2, "--recovery", None),
    ("null --sise 1G", 2, "--sise", None),
    ("null surplus", 2, "surplus", None),
    ("null surplus --background", 2, "surplus", None),
    ("null --background --trace", 2, "name a file", None),
    ("null --trace=", 1, "a system call failed", errno.ENOENT),
    ("recover 0 --target", 2, "a target is missing", None),
    ("null --size 1X -r requeue", 2, "'1X' is not a whole number of bytes", None),
    ("fault --delay 10ms --background", 2, "a target is missing", None),
    ("add nul", 2, "targets are ", None),
    ("del", 2, "del needs one or more ids, or --all", None),
    ("del 1 --all", 2, "del needs one or more ids, or --all", None),
    ("del x", 2, "x", None),
    ("stop", 2, "id", None),
    ("stop 1 2", 2, "2", None),
    ("list --jason", 2, "--jason", None),
    ("resize 0", 2, "size", None),
    ("resize 0 big", 2, "big", None),
])
def test_bad_words(no_driver, run, words, status, says, number):
    assert_fails(run(*words.split()), status, says, number)


def test_no_words_at_all_is_wrong_usage_and_help_is_not(run):
    assert run().status == 2
    done = run("--help")
    assert done.status == 0 and "null" in done.out and "--background" in done.out
    for word in ublk.VERBS:
        assert word in done.out and run(word, "--help").status == 0
    assert "--size" in run("null", "--help", "--background").out


@pytest.mark.parametrize("body, says", [
    ("class Broken(ublk.Target:\n    pass", "SyntaxError"),
    ("import nowhere_to_be_found", "ModuleNotFoundError"),
    ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(3)", "SystemExit"),
    ("class Disk: pass", "Target"),
    ("class A(ublk.Target): pass\nclass B(ublk.Target): pass", "A, B"),
    ("class A(ublk.Target):\n    def __init__(self): raise ValueError('not today')", "ValueError: not today"),
    ("class A(ublk.Target):\n    def __init__(self): raise OSError(28, 'No space', 'disk')", "28 ENOSPC"),
    ("class A(ublk.Target):\n    def __init__(self): open('/no/such/file')", "/no/such/file"),
    ("class A(ublk.Target):\n    def __init__(self): raise ValueError('two\\nlines')", "two"),
    ("class A(ublk.Target): size = 0", "size 0"),
    ("class A(ublk.Target): size = 'large'", "large"),
    ("class A(ublk.Target): size = 4096.0", "size"),
    ("class A(ublk.Target): size, block_size = 4096, 'x'", "block"),
])
def test_bad_target_files(no_driver, run, tmp_path, body, says):
    assert_fails(run(target_file(tmp_path, body)), 1, says)


@pytest.mark.parametrize("word, says", [
    ("/no/such/file.py", "/no/such/file.py"), ("{}", "irectory"), ("{}/mine.py:Other", "Other"),
    ("{}/mine.py:ublk", "ublk"), ("{}/latin.py", "latin.py"), ("{}/zero.py", "zero.py")])
def test_bad_target_words(no_driver, run, tmp_path, word, says):
    directory = tmp_path / "dir.py"
    directory.mkdir()
    target_file(directory, "class Mine(ublk.Target):\n    size = 4096")
    (directory / "latin.py").write_bytes(b"name = '\xe9'\n")
    (directory / "zero.py").write_bytes(b"a\0b")
    assert_fails(run(word.format(directory)), 1, says)


@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["", "background"])
def test_debug_shows_the_traceback(mode):
    done = verb("null", "--size", "0", "--debug", *mode, script=UBLK)
    assert done.status == 1 and "Traceback" in done.err and "UblkError" in done.err


@pytest.mark.parametrize("place", ["file/run", "run"])
def test_a_state_that_cannot_be_written_is_an_error_line(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir(0o700)
    (tmp_path / "run" / "7.json.new").mkdir()
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path / place))
    device = ublk.Device(Ram())
    device.id = 7
    with pytest.raises(OSError) as found:
        ublk.save_state(device)
    assert_error_line(f"ublk: {ublk.error_line(found.value)}\n", says=str(tmp_path))


# =================================================================================================
# State files
# =================================================================================================


@pytest.fixture
def state(run_dir):
    """Write the state file of device 7 as it is told to, and load it: state(bytes)."""
    def load(content):
        run_dir.mkdir(mode=0o700, exist_ok=True)
        (run_dir / "7.json").write_bytes(content)
        return ublk.load_state(7)
    return load


GOOD_STATE = {"id": 7, "target": "null", "args": ["--size", "1G"], "cwd": "/", "pid": 1}


def test_a_state_file_is_read_as_it_was_written(run_dir):
    device = ublk.Device(Ram(), words=("null", ["--size", "1G"], {}))
    device.id = 7
    ublk.save_state(device)
    loaded = ublk.load_state(7)
    assert (loaded["target"], loaded["args"], loaded["pid"]) == ("null", ["--size", "1G"], os.getpid())
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir / "7.json").stat().st_mode) == 0o600
    assert os.listdir(run_dir) == ["7.json"]
    ublk.forget_state(7)
    ublk.forget_state(7)
    assert os.listdir(run_dir) == [] and ublk.load_state(7) == {}


def test_a_state_file_that_goes_as_it_is_removed_is_gone(state, monkeypatch):
    """As where `del` and the end of the server remove it together."""
    unlink = os.unlink
    state(json.dumps(GOOD_STATE).encode())
    monkeypatch.setattr(os, "unlink", lambda path: (unlink(path), unlink(path)))
    assert not ublk.forget_state(7)
    assert ublk.load_state(7) == {}


def test_a_good_state_file_is_believed(state, capsys):
    assert state(json.dumps(GOOD_STATE).encode()) == GOOD_STATE
    assert capsys.readouterr().err == ""


def test_a_state_file_is_believed_of_its_own_device_only(state, capsys):
    made = {**GOOD_STATE, "identity": f"{5:016x}"}
    assert state(json.dumps(made).encode()) == ublk.load_state(7, 5) == made
    assert capsys.readouterr().err == ""
    assert ublk.load_state(7, 6) == {}
    assert "the state of another device, which had the same number" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    b"", b"{", json.dumps(GOOD_STATE).encode()[:-9], b"\xff\xfe\x00", b"null", b"[]", b'"x"', b"7", b"{}",
    json.dumps({**GOOD_STATE, "id": 8}).encode(), json.dumps({**GOOD_STATE, "id": "7"}).encode(),
    json.dumps({**GOOD_STATE, "target": ["null"]}).encode(), json.dumps({**GOOD_STATE, "args": "x"}).encode(),
    json.dumps({**GOOD_STATE, "args": [1, {}]}).encode(), b"[" * 100000, b"0" * (2 << 20),
    b"9" * 10000, b'{"id": 7, "target": "null", "args": [NaN]}'],
    ids=lambda content: f"{len(content)}-{content[:24]!r}")
def test_a_damaged_state_file_is_reported_and_ignored(state, capsys, content):
    assert state(content) == {}
    warning = capsys.readouterr().err
    assert warning.startswith("ublk: ignoring ") and warning.count("\n") == 1


def make_link(path):
    (path.parent / "elsewhere").write_text(json.dumps(GOOD_STATE))
    path.symlink_to("elsewhere")


def make_foreign(path):
    path.write_text(json.dumps(GOOD_STATE))
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("make", [make_link, make_foreign, os.mkdir, os.mkfifo,
                                  lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.symlink_to(path)])
def test_a_hostile_state_file_is_reported_and_ignored(run_dir, capsys, make):
    if make is make_foreign and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    run_dir.mkdir()
    make(run_dir / "7.json")
    assert ublk.load_state(7) == {}
    assert capsys.readouterr().err.startswith("ublk: ignoring ")


def test_a_planted_link_is_not_written_through(run_dir, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir.mkdir(mode=0o700)
    (run_dir / "7.json.new").symlink_to(victim)
    (run_dir / "7.json").symlink_to(victim)
    device = ublk.Device(Ram())
    device.id = 7
    try:
        ublk.save_state(device)
    except OSError:
        pass
    assert victim.read_text() == "precious"


def test_a_state_directory_of_somebody_else_is_not_used(run_dir):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    run_dir.mkdir(mode=0o777)
    os.chmod(run_dir, 0o777)
    os.chown(run_dir, 12345, 12345)
    device = ublk.Device(Ram())
    device.id = 7
    with pytest.raises(OSError) as found:
        ublk.save_state(device)
    assert_error_line(f"ublk: {ublk.error_line(found.value)}\n", says=str(run_dir))


def test_where_state_files_lie(monkeypatch):
    monkeypatch.delenv("UBLK_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert ublk.run_dir() == "/run/ublk"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ublk.run_dir() == "/run/user/1000/ublk"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert "1000" in ublk.run_dir()


def test_a_state_directory_lies_where_the_command_was_given(run, monkeypatch, tmp_path):
    """A server in the background, or one that recovers a disk, leaves that place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UBLK_RUN_DIR", "mine")
    run("check")
    monkeypatch.chdir("/")
    assert ublk.state_path(7) == f"{tmp_path}/mine/7.json"


# =================================================================================================
# A disk from the command line
# =================================================================================================

FIELDS = ["id", "path", "char_path", "state", "target", "args", "size", "block_size", "queues", "depth",
          "max_io_bytes", "flags", "pid", "owner_uid", "owner_gid"]


@kernel
def test_the_file_alone_in_an_empty_directory_serves_null(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = shutil.copy(UBLK, tmp_path)
    with Forked("null", "--size", "1G", script=script) as disk:
        with opened(disk.path) as fd:
            assert os.lseek(fd, 0, os.SEEK_END) == 1 << 30
            assert write_at(fd, 4096, b"x" * 8192) == 8192
            assert read_at(fd, 4096, 8192) == bytes(8192)
        assert " null " in verb("list", script=script).out
    assert disk.status == 0 and disk.said() == ""


@kernel
@pytest.mark.parametrize("words", [["ram", "--size", "4M"], ["loop", "disk.img"]])
def test_with_its_companion_it_serves_ram_and_loop(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    script = shutil.copy(UBLK, tmp_path)
    shutil.copy(HERE / "ublk_targets.py", tmp_path)
    with open(tmp_path / "disk.img", "wb") as file:
        file.truncate(4 << 20)
    with Forked(*words, script=script) as disk:
        data = os.urandom(65536)
        with opened(disk.path) as fd:
            assert os.lseek(fd, 0, os.SEEK_END) == 4 << 20
            write_at(fd, 1 << 20, data)
            assert read_at(fd, 1 << 20, 65536) == data
    assert disk.status == 0 and disk.said() == ""


@kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
                         ids=lambda number: number.name)
def test_a_signal_takes_the_disk_away(number):
    with Forked("null", change=lambda: signal.signal(number, signal.SIG_DFL)) as disk:
        assert disk.kill(number) == 0
        assert leftovers() == []


@kernel
def test_list_tells_all_about_a_disk(run):
    with Forked("null", "--size", "8M", "-n", 7, "-q", 1, "-d", 32, "--max-io", "256K",
                "--block-size", "4K") as disk:
        rows = json.loads(run("list", "--json").out)
        row, = rows
        assert list(row) == FIELDS
        assert {**row, "flags": 0} == {
            "id": 7, "path": "/dev/ublkb7", "char_path": "/dev/ublkc7", "state": "LIVE", "target": "null",
            "args": ["--size", "8M"], "size": 8 << 20, "block_size": 4096, "queues": 1, "depth": 32,
            "max_io_bytes": 256 << 10, "flags": 0, "pid": disk.pid, "owner_uid": 0, "owner_gid": 0}
        assert set(row["flags"]) <= {feature.name for feature in ublk.FEATURES}
        assert json.loads(run("list", "7", "--json").out) == rows
        lines = run("list").out.splitlines()
        assert len(lines) == 2 and lines[1].split()[:4] == ["7", "LIVE", "null", "--size"]
    assert json.loads(run("list", "--json").out) == []


@kernel
def test_create_prints_the_disk_as_json():
    disk = Forked("null", "--json")
    until(lambda: disk.said(disk.output).endswith("\n"), "the disk")
    row = json.loads(disk.said(disk.output))
    assert list(row) == FIELDS and row["state"] == "LIVE" and os.path.exists(row["path"])
    assert disk.kill(signal.SIGTERM) == 0
    assert disk.said(disk.output).count("\n") == 1


@kernel
def test_background_returns_when_the_disk_is_usable(run):
    done = verb("null", "--background", "--size", "1M", script=UBLK)
    assert (done.status, done.out, done.err) == (0, "/dev/ublkb0\n", "")
    with opened("/dev/ublkb0") as fd:
        assert read_at(fd, 0, 4096) == bytes(4096)
    row, = json.loads(run("list", "--json").out)
    assert os.getsid(row["pid"]) == row["pid"] and row["pid"] not in children_of(os.getpid())
    done = run("del", "0")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert devices_left() == []


@kernel
def test_stop_ends_the_server_and_del_removes_the_device(run):
    with Forked("null") as disk:
        assert run("stop", disk.id).status == 0
        assert disk.wait() == 0
        assert not os.path.exists(disk.path)
        assert run("del", disk.id).status == 0
        assert leftovers() == []


@kernel
@since("7.0")
def test_stop_if_unused(run):
    with Forked("null") as disk:
        with opened(disk.path):
            assert_fails(run("stop", disk.id, "--if-unused"), 1, "somebody has it open", errno.EBUSY)
        until(lambda: run("stop", disk.id, "--if-unused").status == 0, "udev to close the disk")
        assert disk.wait() == 0
        assert run("del", disk.id).status == 0


@kernel
def test_del_takes_many_or_all(run):
    for _ in range(3):
        assert verb("null", "--background").status == 0
    assert run("del", 0, 2).status == 0 and devices_left() == [1]
    assert run("del", "--all").status == 0 and devices_left() == []
    assert run("del", "--all").status == 0


@kernel
def test_del_goes_on_behind_what_it_cannot_delete(run):
    with Forked("null"):
        assert_fails(run("del", 5, 0), 1, "device 5: there is no such device", errno.ENODEV)
        assert devices_left() == []


@kernel
@pytest.mark.parametrize("words", ["list 5", "stop 5", "stop 5 --if-unused", "del 5", "resize 5 1G"])
def test_a_device_that_does_not_exist(run, words):
    done = run(*words.split())
    assert_fails(done, 1, "device 5: there is no such device", errno.ENODEV)


@kernel
@since("6.16")
def test_resize(run):
    with Forked("null", "--size", "1M", "--block-size", "4K") as disk:
        for size in (2 << 20, 512 << 10):
            assert run("resize", disk.id, size).status == 0
            with opened(disk.path) as fd:
                assert os.lseek(fd, 0, os.SEEK_END) == size
        for size in (0, 512, 4097):
            assert_fails(run("resize", disk.id, size), 1, f"size {size}", errno.EINVAL)
    with ublk.Device(Ram()) as device:
        for size in (0, -512, 1000, 1 << 63):
            assert f"size {size}" in message(device.resize, size)


@kernel
@since("6.16")
@pytest.mark.parametrize("words", ["ram --size 1M", "loop disk.img"])
@pytest.mark.parametrize("queues", [1, 2])
def test_what_a_disk_grows_by_can_be_used(run, tmp_path, monkeypatch, words, queues):
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(1 << 20))
    with Forked(*words.split(), "-q", queues) as disk:
        assert run("resize", disk.id, "2M").status == 0
        until(lambda: "ram" in words or os.path.getsize("disk.img") == 2 << 20, "the server to follow")
        data = os.urandom(4096)
        with opened(disk.path) as fd:
            assert read_at(fd, (2 << 20) - 8192, 4096) == bytes(4096)
            write_at(fd, (2 << 20) - 4096, data)
            assert read_at(fd, (2 << 20) - 4096, 4096) == data


@kernel
def test_old_kernels_get_the_opcodes_they_know(control):
    assert control.legacy is not at_least("6.4")


@kernel
def test_features_has_a_row_for_every_bit(run, control):
    rows = json.loads(run("features", "--json").out)
    assert [row["bit"] for row in rows] == list(range(len(ublk.FEATURES)))
    assert all(list(row) == ["bit", "name", "since", "meaning", "supported"] for row in rows)
    assert all((row["supported"] is None) == (control.features is None) for row in rows)


@kernel
@since("6.5")
def test_features_names_every_bit_of_this_kernel(run, control):
    rows = json.loads(run("features", "--json").out)
    assert control.features & ~sum(ublk.FEATURES) == 0, "a bit without a name"
    assert sum(1 << row["bit"] for row in rows if row["supported"]) == control.features
    lines = run("features").out.splitlines()
    assert [line.split()[1] for line in lines] == [feature.name for feature in ublk.FEATURES]
    for feature in ublk.FEATURES:
        if feature & control.features and feature is not ublk.UBLK_F_SUPPORT_ZERO_COPY:
            assert at_least(feature.since), f"{feature.name} is older than the table says"


@kernel
def test_check_finds_nothing_wrong(run):
    done = run("check")
    assert done.status == 0 and "missing" not in done.out and "ok       ublk driver" in done.out


@kernel
def test_an_id_of_choice_and_an_id_that_is_taken(run):
    with Forked("null", "--id", 11) as disk:
        assert disk.path == "/dev/ublkb11"
        assert_fails(verb("null", "--id", 11), 1, "device 11: the id is taken", errno.EEXIST)
        assert json.loads(run("list", "--json").out)[0]["pid"] == disk.pid


@kernel
def test_an_ordinary_user_is_told_that_the_driver_is_not_theirs():
    text = as_user(65534, lambda: message(ublk.Control))
    assert_error_line(f"ublk: {text}\n", errno.EACCES, says="/dev/ublk-control")


@kernel
@since("6.6")
def test_io_uring_disabled_by_sysctl(run):
    path = Path("/proc/sys/kernel/io_uring_disabled")
    before = path.read_text()
    try:
        path.write_text("2")
        assert_fails(run("list"), 1, "kernel.io_uring_disabled=0", errno.EPERM)
        assert run("check").status == 1
    finally:
        path.write_text(before)


@kernel
def test_without_the_driver(run):
    if not IN_LAB:
        pytest.skip("takes the driver away: in the lab only")
    sh("modprobe", "-r", "ublk_drv")            # which says, too, that nothing refers to it any more
    try:
        assert_fails(run("null"), 1, "cannot open /dev/ublk-control", errno.ENOENT)
        done = run("check")
        assert done.status == 1 and "modprobe ublk_drv" in done.out
    finally:
        sh("modprobe", "ublk_drv")
        until(lambda: os.path.exists("/dev/ublk-control"))


@kernel
@pytest.mark.parametrize("words, says, number", [
    ("loop /no/such/image", "/no/such/image", errno.ENOENT), ("loop {}/empty", "empty", errno.EINVAL),
    ("loop {}/odd", "odd", errno.EINVAL), ("loop {}", "", None), ("ram --size 0", "0", errno.EINVAL),
    ("ram --size 1000", "1000", errno.EINVAL), ("null --max-io 4M --depth 5000", "5000", errno.EINVAL)])
def test_bad_backing(run, tmp_path, words, says, number):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    assert_fails(run(*words.format(tmp_path).split()), 1, says, number)


# =================================================================================================
# A disk from import
# =================================================================================================


@kernel
def test_the_example_of_the_documentation_runs():
    needs("mkfs.ext4")
    exec(compile(example(), "example", "exec"), {"__name__": "example"})


@kernel
def test_two_disks_at_once():
    with ublk.Device(Ram()) as one, ublk.Device(AsyncRam()) as two:
        assert {one.path, two.path} == {"/dev/ublkb0", "/dev/ublkb1"}
        with opened(one.path) as first, opened(two.path) as second:
            write_at(first, 0, b"1" * 4096)
            write_at(second, 0, b"2" * 4096)
            assert read_at(first, 0, 4096) == b"1" * 4096
            assert read_at(second, 0, 4096) == b"2" * 4096


@kernel
def test_a_device_lives_once():
    device = ublk.Device(Ram())
    with device as disk:
        assert "started before" in message(device.start)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
    device.stop()
    for again in (device.start, device.resume, device.__enter__):
        assert_error_line(f"ublk: {message(again)}\n", errno.EALREADY, says="make a new Device")
    assert devices_left() == []


@kernel
def test_more_queues_than_processors_are_as_many_as_these(control):
    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    with ublk.Device(Ram(), queues=cpus + 3) as disk:
        assert disk.info.nr_hw_queues == cpus
        found = [control.get_queue_affinity(disk.id, queue) for queue in range(cpus)]
        assert set.union(*found) >= os.sched_getaffinity(0)
        with opened(disk.path) as fd:
            for cpu in os.sched_getaffinity(0):
                os.sched_setaffinity(0, {cpu})
                write_at(fd, 4096 * cpu, bytes([cpu + 1]) * 4096)
                assert read_at(fd, 4096 * cpu, 4096) == bytes([cpu + 1]) * 4096


@pytest.fixture(autouse=True)
def all_processors():
    """Let every test run on all processors, whatever the one before did."""
    cpus = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cpus)


@kernel
@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"depth": 4096}, {"max_io": 4096},
                                     {"max_io": 4 << 20}])
def test_the_data_come_back_whatever_the_limits(options):
    data = os.urandom(3 << 20)
    with ublk.Device(Ram(8 << 20), **options) as disk, opened(disk.path) as fd:
        assert write_at(fd, 1 << 20, data) == len(data)
        assert read_at(fd, 1 << 20, len(data)) == data
    assert disk.target.data[1 << 20:4 << 20] == data


@kernel
@pytest.mark.parametrize("block", [512, 1024, 2048, 4096])
def test_block_sizes(block):
    class Blocks(Ram):
        block_size = block

        def read(self, offset, buffer):
            assert offset % block == 0 == len(buffer) % block
            super().read(offset, buffer)

    with ublk.Device(Blocks()) as disk, opened(disk.path) as fd:
        assert read_at(fd, block, block) == bytes(block)
        assert block == 512 or error_of(read_at, fd, 512, 512) == errno.EINVAL


@kernel
def test_a_read_only_disk_refuses_writes():
    target = Ram()
    target.read_only = True
    with ublk.Device(target) as disk:
        assert Path(f"/sys/block/ublkb{disk.id}/ro").read_text() == "1\n"
        with opened(disk.path, os.O_RDONLY) as fd:
            assert read_at(fd, 0, 4096) == bytes(4096)
        done = dd(disk.path, 0)
        assert done.returncode == 1 and re.search("not permitted|Permission denied|Read-only", done.stderr)


@kernel
def test_what_a_class_does_not_define_is_not_offered():
    with ublk.Device(Ram()) as plain, ublk.Device(ublk.Null()) as full:
        for name in ("discard_max_bytes", "write_zeroes_max_bytes"):
            assert int(Path(f"/sys/block/ublkb{plain.id}/queue/{name}").read_text()) == 0
            assert int(Path(f"/sys/block/ublkb{full.id}/queue/{name}").read_text()) > 0
        assert Path(f"/sys/block/ublkb{plain.id}/queue/write_cache").read_text() == "write through\n"
        assert Path(f"/sys/block/ublkb{full.id}/queue/write_cache").read_text() == "write back\n"


@kernel
def test_signals_do_not_disturb_the_server():
    alarms = []
    old = signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    try:
        with ublk.Device(Ram()) as disk, opened(disk.path) as fd:
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
            for block in range(100):
                write_at(fd, 4096 * block, bytes([block]) * 4096)
            for block in range(100):
                assert read_at(fd, 4096 * block, 4096) == bytes([block]) * 4096
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(alarms) > 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@kernel
@pytest.mark.parametrize("direct", [False, True])
def test_the_backing_file_of_a_loop_is_what_was_written(targets, backing, direct):
    os.truncate(backing, 8 << 20)
    expected = bytearray(8 << 20)
    with ublk.Device(targets.Loop(str(backing), direct=direct)) as disk, opened(disk.path) as fd:
        for offset, size in ((0, 4096), (12 << 10, 1 << 20), (4 << 20, 3 << 20), ((8 << 20) - 4096, 4096)):
            expected[offset:offset + size] = data = os.urandom(size)
            write_at(fd, offset, data)
            assert read_at(fd, offset, size) == data
        os.fsync(fd)
        assert read_at(fd, 0, 8 << 20) == expected
    assert backing.read_bytes() == expected


SIZES = {"ext4": "64M", "xfs": "320M", "btrfs": "128M"}


@kernel
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_loop_carries_a_file_system(targets, new_image, tmp_path, kind):
    with ublk.Device(targets.Loop(str(new_image(SIZES[kind])))) as disk:
        carries(kind, disk, tmp_path / "mnt")


@kernel
@pytest.mark.parametrize("make", [Ram, AsyncRam])
def test_a_target_of_ten_lines_carries_a_file_system(tmp_path, make):
    with ublk.Device(make(64 << 20)) as disk:
        carries("ext4", disk, tmp_path / "mnt")


@kernel
def test_discard_frees_blocks_of_the_backing_file(targets, new_image):
    needs("blkdiscard")
    path = new_image("16M")
    with ublk.Device(targets.Loop(str(path))) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, os.urandom(8 << 20))
        os.sync()
        full = os.stat(path).st_blocks
        assert full * 512 >= 8 << 20
        sh("blkdiscard", "-o", 1 << 20, "-l", 4 << 20, disk.path)
        assert os.stat(path).st_blocks * 512 <= full * 512 - (4 << 20)
        with opened(disk.path) as fd:
            assert read_at(fd, 1 << 20, 4 << 20) == bytes(4 << 20)
            assert read_at(fd, 0, 4096) == path.read_bytes()[:4096] != bytes(4096)


@kernel
@pytest.mark.parametrize("make", [
    lambda targets, *_: targets.Ram(size=1 << 20),
    lambda targets, new_image, _: targets.Loop(str(new_image("1M"))),
    lambda targets, _, tmp_path: targets.Loop(files(tmp_path, 1, 1 << 20)[0]),
], ids=["ram", "loop", "tmpfs"])        # of which the last cannot turn a range into zeroes
def test_zeroes_are_written_exactly_where_they_should(targets, new_image, tmp_path, make):
    needs("blkdiscard")
    target = make(targets, new_image, tmp_path)
    expected = bytearray(os.urandom(1 << 20))
    with ublk.Device(target) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 0, expected)
        for offset, length in ((512, 512), (4096, 8192), (20480 + 512, 65536), ((1 << 20) - 1024, 1024)):
            sh("blkdiscard", "-z", "-o", offset, "-l", length, disk.path)
            expected[offset:offset + length] = bytes(length)
        with opened(disk.path) as fd:
            assert read_at(fd, 0, 1 << 20) == expected


@kernel
def test_requests_reach_the_methods_they_are_for():
    needs("blkdiscard")
    target = Recorder()
    with ublk.Device(target, partition_scan=False) as disk:
        with opened(disk.path) as fd:
            write_at(fd, 8192, b"x" * 4096)
            assert target.calls == [("write", 8192, 4096)]
            os.fsync(fd)
            assert target.calls[1:] == [("flush",)]
        del target.calls[:]
        with opened(disk.path, os.O_RDWR | os.O_DSYNC) as fd:
            write_at(fd, 4096, b"y" * 4096)
        assert ("write_fua", 4096, 4096) in target.calls
        sh("blkdiscard", "-o", 65536, "-l", 131072, disk.path)
        assert target.calls[-1] == ("discard", 65536, 131072)
        sh("blkdiscard", "-z", "-o", 65536, "-l", 131072, disk.path)
        assert target.calls[-1][:3] == ("write_zeroes", 65536, 131072)


@kernel
def test_a_flush_reaches_the_disk_below(targets):
    below = Recorder()
    with ublk.Device(below) as disk, ublk.Device(targets.Loop(disk.path)) as loop:
        below.calls.clear()
        sh("dd", "if=/dev/urandom", f"of={loop.path}", "bs=4k", "count=4", "conv=fsync", "status=none")
        names = [call[0] for call in below.calls]
        assert "flush" in names and "write" in names[:names.index("flush")], names
        assert loop.target.fd >= 0 and digest(loop.path) == digest(disk.path)


# =================================================================================================
# Handlers
# =================================================================================================


def dd(path, block):
    """Write one block of 4 KiB with dd, past the page cache."""
    return sh("dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1", f"seek={block}", "oflag=direct",
              "status=none", check=False, env={**os.environ, "LC_ALL": "C"})


class Fails(Ram):
    """Fail writes at 4096 with a bug."""

    def write(self, offset, buffer):
        if offset == 4096:
            raise ZeroDivisionError("a bug of the target")
        super().write(offset, buffer)


class AsyncFails(AsyncRam):
    """The same with coroutines."""

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        if offset == 4096:
            raise ZeroDivisionError("a bug of the target")


@kernel
@pytest.mark.parametrize("make", [Fails, AsyncFails])
def test_an_exception_fails_its_request_and_no_other(make, capfd):
    with ublk.Device(make()) as disk:
        assert dd(disk.path, 0).returncode == 0
        capfd.readouterr()
        done = dd(disk.path, 1)
        assert done.returncode == 1 and "Input/output error" in done.stderr
        assert dd(disk.path, 2).returncode == 0
        text = capfd.readouterr().err
        assert text.count("Traceback") == 1 and "ZeroDivisionError: a bug of the target" in text


# What the block layer keeps of an errno; everything else becomes EIO.
KEPT = [errno.ENOSPC, errno.ETIMEDOUT, errno.ENOLINK, errno.EREMOTEIO, errno.EILSEQ,
        errno.ENOMEM, errno.ENODATA]


class Errors(Ram):
    """Fail each request with the errno that is its block number."""

    def read(self, offset, buffer):
        if offset and offset % 4096 == 0 and 1 < offset // 4096 < 134 and len(buffer) == 4096:
            raise OSError(offset // 4096, "as asked")

    write = read


class AsyncErrors(Errors):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        Errors.read(self, offset, buffer)

    write = read


@kernel
@pytest.mark.parametrize("make", [Errors, AsyncErrors])
def test_an_oserror_reaches_the_client_as_its_errno(make, capfd):
    with ublk.Device(make()) as disk, opened(disk.path) as fd:
        for number in KEPT:
            assert error_of(read_at, fd, 4096 * number, 4096) == number
            assert error_of(write_at, fd, 4096 * number, bytes(4096)) == number
        for number in (errno.EIO, errno.ENXIO, errno.ENOENT, errno.EPIPE, errno.EOPNOTSUPP, errno.EAGAIN):
            assert error_of(read_at, fd, 4096 * number, 4096) == errno.EIO
    assert "Traceback" not in capfd.readouterr().err


class Short(Ram):
    """Move at most 1000 bytes at a time."""

    def read(self, offset, buffer):
        count = min(len(buffer), 1000)
        buffer[:count] = self.data[offset:offset + count]
        return count

    def write(self, offset, buffer):
        count = min(len(buffer), 1000)
        self.data[offset:offset + count] = buffer[:count]
        return count


class AsyncShort(Short):
    """The same with coroutines."""

    async def read(self, offset, buffer):
        return Short.read(self, offset, buffer)

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        return Short.write(self, offset, buffer)


@kernel
@pytest.mark.parametrize("make", [Short, AsyncShort])
def test_short_transfers_are_continued(make):
    data = os.urandom(256 << 10)
    with ublk.Device(make()) as disk, opened(disk.path) as fd:
        assert write_at(fd, 4096, data) == len(data)
        assert disk.target.data[4096:4096 + len(data)] == data
        assert read_at(fd, 4096, len(data)) == data


@kernel
@pytest.mark.parametrize("outcome", [0, -1, -5, 4097, 1 << 40, "text", b"", 1.5, [], True],
                         ids=lambda outcome: repr(outcome))
def test_a_nonsensical_result_is_an_io_error(outcome):
    class Nonsense(Ram):
        def read(self, offset, buffer):
            return outcome if offset == 8192 else None

        def write(self, offset, buffer):
            return outcome if offset == 8192 else None

    with ublk.Device(Nonsense()) as disk, opened(disk.path) as fd:
        assert error_of(read_at, fd, 8192, 4096) == (0 if outcome is True else errno.EIO)
        assert error_of(write_at, fd, 8192, bytes(4096)) == (0 if outcome is True else errno.EIO)
        assert read_at(fd, 0, 4096) == bytes(4096)


@kernel
def test_buffers_are_what_the_documentation_says():
    seen = {}

    class Looks(Ram):
        def read(self, offset, buffer):
            seen["read", offset, len(buffer)] = type(buffer), buffer.readonly, buffer.nbytes, not any(buffer)

        def write(self, offset, buffer):
            seen["write", offset] = type(buffer), buffer.readonly, buffer.nbytes, set(buffer) == set(b"w")

    with ublk.Device(Looks(), depth=1) as disk, opened(disk.path) as fd:
        write_at(fd, 12288, b"w" * 8192)
        read_at(fd, 12288, 8192)
    assert seen["read", 12288, 8192] == (memoryview, False, 8192, True)
    assert seen["write", 12288] == (memoryview, True, 8192, True)


@kernel
def test_a_handler_that_keeps_its_buffers_does_not_hold_the_device():
    kept = []

    class Keeps(Ram):
        def read(self, offset, buffer):
            kept.append(buffer)

        def write(self, offset, buffer):
            kept.append(buffer[:10])

    with ublk.Device(Keeps()) as disk, opened(disk.path) as fd:
        read_at(fd, 0, 4096)
        write_at(fd, 0, bytes(4096))
    assert devices_left() == [] and bytes(kept[-1]) is not None


@kernel
def test_coroutines_of_one_queue_run_side_by_side():
    class Meets(AsyncRam):
        """Answer no write before four have come."""

        def __init__(self):
            super().__init__()
            self.count = 0

        async def start(self, index):
            self.event = asyncio.Event()

        async def write(self, offset, buffer):
            self.count += 1
            if self.count == 4:
                self.event.set()
            await self.event.wait()

    with ublk.Device(Meets(), depth=8) as disk, opened(disk.path) as fd:
        clients = [threading.Thread(target=write_at, args=(fd, 65536 * number, bytes(4096)))
                   for number in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        assert disk.target.count == 4


@kernel
def test_every_queue_starts_its_target_before_it_serves():
    order = []

    class Starts(Ram):
        def start(self, index):
            order.append(("start", index, threading.current_thread().name))

        def read(self, offset, buffer):
            order.append(("read",))

        def close(self):
            order.append(("close",))

    with ublk.Device(Starts(), queues=2) as disk, opened(disk.path) as fd:
        read_at(fd, 0, 4096)
    count = disk.info.nr_hw_queues
    starts = [step[1:] for step in order[:count]]
    assert sorted(starts) == [(index, f"ublk{disk.id}q{index}") for index in range(count)]
    assert order[count] == ("read",) and order[-1] == ("close",) and order.count(("close",)) == 1


@kernel
@pytest.mark.parametrize("trouble", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError,
                                     RecursionError])
def test_whatever_a_handler_raises_no_client_waits_for_ever(trouble):
    class Raises(Ram):
        def read(self, offset, buffer):
            if offset == 8192:
                raise trouble()

    with ublk.Device(Raises()) as disk, opened(disk.path) as fd:
        assert error_of(read_at, fd, 8192, 4096) == errno.EIO


@kernel
@pytest.mark.parametrize("batch", [False, pytest.param(True, id="batch", marks=since("7.0"))])
def test_requests_alike_may_end_in_every_way(batch):
    """A tag's requests alike are served by what was made ready once: none may see how the last one ended."""
    class Moody(Ram):
        mood, kept = "all", []

        def move(self, offset, buffer):
            if self.mood == "error":
                raise OSError(errno.ENOSPC, "full")
            if self.mood == "half" and len(buffer) == 4096:
                return 1024
            if self.mood == "coroutine":
                return self.later(buffer)
            if self.mood == "released":
                buffer.release()
            if self.mood == "kept":
                self.kept.append(buffer)
            return None

        async def later(self, buffer):
            await ublk.operate(ublk.IORING_OP_NOP, -1)

        def read(self, offset, buffer):
            if self.mood != "nothing":
                buffer[:] = b"r" * len(buffer)
            return self.move(offset, buffer)

        def write(self, offset, buffer):
            assert buffer.readonly and bytes(buffer) == b"w" * len(buffer)
            return self.move(offset, buffer)

    errors = {"error": errno.ENOSPC, "coroutine": errno.EIO}        # which nobody awaits in a plain class
    with ublk.Device(Moody(), depth=2, batch=batch) as disk, opened(disk.path) as fd:
        for mood in ("all", "all", "nothing", "error", "all", "all", "half", "all", "coroutine", "all", "all",
                     "released", "all", "kept", "all", "nothing", "all", "error", "error", "nothing"):
            disk.target.mood = mood
            for move in (lambda: read_at(fd, 8192, 4096), lambda: write_at(fd, 8192, b"w" * 4096)):
                for _ in range(3):
                    if mood in errors:
                        assert error_of(move) == errors[mood]
                    else:
                        assert move() in (4096, bytes(4096) if mood == "nothing" else b"r" * 4096)


@kernel
def test_a_queue_that_dies_ends_the_device(capfd):
    class Dies(ublk.Null):
        tired = False

        def answer(self, queue, tags):
            if self.tired:
                queue.commit = self.fail
            super().answer(queue, tags)

        def fail(self):
            raise RuntimeError("not again")

    with pytest.raises(ublk.UblkError, match="not again"), ublk.Device(Dies(size=1 << 20)) as device:
        device.target.tired = True
        done = sh("dd", f"if={device.path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct",
                  check=False)
        # an I/O error, or the end of a disk that has gone already
        assert done.returncode == 1 or done.stderr.startswith("0+0 records in")
        assert device.wait(60) and isinstance(device.failure.__cause__, RuntimeError)
    assert "RuntimeError: not again" in capfd.readouterr().err
