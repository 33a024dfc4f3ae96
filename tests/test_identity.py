# SPDX-License-Identifier: MIT
"""A device is known by more than its number."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

import ublk
from tests.support import (
    ALICE,
    BOB,
    Forked,
    Ram,
    assert_fails,
    await_state,
    become,
    devices_left,
    kernel,
    message,
    needs,
    orphan,
    recovered,
    sh,
    since,
    state_of,
    until,
    verb,
    with_partition,
)


def identity_of(dev_id):
    """Return the 64 bits the driver keeps of a device."""
    with ublk.Control() as control:
        return control.get_dev_info(dev_id).ublksrv_flags


def exchange(dev_id, *words):
    """Delete a device with nobody's help and make another of its number; its state file is the first's."""
    path = ublk.state_path(dev_id)
    with open(path) as file:
        state = file.read()
    with ublk.Control() as control:
        control.get_dev_info(dev_id)
        control.del_dev(dev_id)
    disk = orphan(*words, "--id", dev_id)
    with open(path, "w") as file:
        file.write(state)
    return disk


@kernel
def test_the_driver_keeps_an_identity_that_no_two_devices_share(run_dir):
    with ublk.Device(Ram()) as one, ublk.Device(Ram()) as other:
        found = [identity_of(disk.id) for disk in (one, other)]
        assert len({*found, 0}) == 3
        states = [json.loads((run_dir / f"{disk.id}.json").read_text()) for disk in (one, other)]
        assert [int(state["identity"], 16) for state in states] == found


@kernel
def test_an_identity_outlives_servers(backing):
    disk = orphan("loop", backing, "-r", "requeue")
    identity = identity_of(disk.id)
    with Forked("recover", disk.id):
        assert identity_of(disk.id) == identity != 0


@kernel
def test_the_state_of_another_device_is_not_believed(run, backing, tmp_path):
    second = tmp_path / "second.img"
    second.write_bytes(bytes(64 << 20))
    first = orphan("loop", backing, "-r", "requeue")
    exchange(first.id, "loop", second, "-r", "requeue")
    done = run("recover", first.id)
    assert done.status == 1 and "the state of another device" in done.err
    done = run("list", "--json")
    assert json.loads(done.out)[0]["target"] is None and "the state of another device" in done.err
    again = Forked("loop", backing, "-r", "requeue", "--id", first.id)
    assert again.wait() == 1 and "EEXIST" in again.said()
    assert state_of(first.id) == "QUIESCED" and run("del", first.id).status == 0


@kernel
@pytest.mark.parametrize("undo", ["stop", "clean_up"])
def test_who_cleans_up_leaves_anothers_device_alone(undo):
    mine = ublk.Device(Ram())
    mine.identity = ublk.new_identity(True)
    with ublk.Device(Ram()) as other:
        if undo == "stop":
            mine.id, mine.state, mine.control = other.id, ublk.ADDED, ublk.Control()
            mine.stop()
        else:
            ublk.clean_up(mine.identity)
        assert state_of(other.id) == "LIVE"


@kernel
def test_who_cleans_up_finds_its_own_device():
    disk = orphan("null")
    ublk.clean_up(identity_of(disk.id))
    assert devices_left() == []


@kernel
def test_a_directory_that_is_gone_fails_the_recovery(run, tmp_path, monkeypatch):
    directory = tmp_path / "there"
    directory.mkdir()
    (directory / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    disk = orphan_in(directory)
    directory.rename(tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    assert_fails(run("recover", disk.id), 1, f"it was created in {directory}, which is gone", errno.ENOENT)
    with Forked("recover", disk.id, "--target", "loop", "disk.img") as again:
        assert again.kill(signal.SIGTERM) == 0


CHANGES = {
    "mv disk.img old.img": "no such file",
    "cp old.img disk.img": "is another file than it was made of",
    "mv old.img disk.img; truncate -s 32M disk.img": "is shorter than it was",
}


@kernel
@pytest.mark.parametrize("words", ["loop disk.img", "fault --delay 1ms loop disk.img",
                                   "stripe other.img disk.img", "cow disk.img top.cow"])
def test_another_file_in_the_old_ones_place_is_not_served(run, backing, monkeypatch, words):
    monkeypatch.chdir(backing.parent)
    sh("truncate", "-s", "64M", "other.img")
    disk = orphan(*words.split(), "-r", "requeue")
    for change, says in CHANGES.items():
        sh("sh", "-c", change)
        done = run("recover", disk.id)
        assert done.status == 1 and says in done.err and "disk.img" in done.err
        assert state_of(disk.id) == "QUIESCED"
    assert run("del", disk.id).status == 0


def test_a_new_file_that_has_the_inode_of_the_old_one_is_another(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    made_of = json.loads(json.dumps([ublk.file_identity(str(path))]))
    ublk.check_files("it", made_of)
    path.unlink()
    path.write_bytes(bytes(4096))           # gets it where the old one's is the first that is free
    with pytest.raises(ublk.UblkError, match="another file than it was made of"):
        ublk.check_files("it", made_of)


@kernel
def test_a_device_that_has_the_number_of_the_old_one_is_another(run, backing, tmp_path):
    needs("losetup")
    second = tmp_path / "second.img"
    second.write_bytes(bytes(64 << 20))
    loop = sh("losetup", "--find", "--show", backing).stdout.strip()
    try:
        disk = orphan("loop", loop, "-r", "requeue")
        recovered(disk).kill()
        sh("losetup", "--detach", loop)
        until(lambda: not os.path.exists(f"/sys/block/{os.path.basename(loop)}/loop"), "the loop to go")
        sh("losetup", loop, second)
        assert_fails(run("recover", disk.id), 1, "another file than it was made of")
        assert run("del", disk.id).status == 0
    finally:
        sh("losetup", "--detach", loop)


@kernel
def test_a_partition_is_known_by_its_disk_and_its_place():
    with ublk.Device(with_partition()) as disk:
        part = f"{disk.path}p1"
        until(lambda: os.path.exists(part), part)
        number = Path(f"/sys/block/ublkb{disk.id}/diskseq").read_text().split()
        assert ublk.file_identity(disk.path)[3] == [number, [], []]
        assert ublk.file_identity(part)[3] == [[], number, ["2048"]]


@pytest.mark.parametrize("size, says", [(4095, "is shorter than it was"), (4096, ""), (8192, "")])
def test_a_file_may_be_longer_than_it_was_but_not_shorter(tmp_path, size, says):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    made_of = [ublk.file_identity(str(path))]
    os.truncate(path, size)
    text = message(ublk.check_files, "it", made_of)
    assert says in text and bool(says) == bool(text)


@kernel
@since("6.16")
def test_a_file_that_has_grown_with_its_disk_is_the_same(run, backing):
    with Forked("loop", backing, "-r", "requeue") as disk:
        assert run("resize", disk.id, "65M").status == 0
        disk.kill()
    with Forked("recover", disk.id) as again:
        assert again.kill(signal.SIGTERM) == 0


@kernel
@since("6.3")
def test_the_owners_group_does_not_own_the_disk(rules):
    def colleague():
        os.setgroups([])
        os.setgid(ALICE)
        os.setuid(BOB)
    with Forked("ram", "--size", "4M", change=become(ALICE)) as disk:
        for path in (disk.path, f"/dev/ublkc{disk.id}"):
            assert os.stat(path).st_mode & 0o777 == 0o600
        for word in ("stop", "del"):
            done = verb(word, disk.id, change=colleague)
            assert_fails(done, 1, "", errno.EACCES)
        assert disk.kill(signal.SIGTERM) == 0


def orphan_in(directory):
    """Make a disk of disk.img in a directory whose server has been killed."""
    disk = Forked("loop", "disk.img", "-r", "requeue", change=lambda: os.chdir(directory)).live()
    disk.kill()
    await_state(disk.id, "QUIESCED")
    return disk


# ---- root runs what the rules name, so only root may change it ------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Have the rules name this file, which only root may change but for the directories above."""
    path = tmp_path / "ublk.py"
    path.touch(0o644)
    monkeypatch.setattr(ublk, "PROGRAM", (str(path), str(path)))
    return path


def of_root(monkeypatch, *others):
    """Have every file be root's alone, but for others with such modes and owners."""
    def status(path):
        uid, mode = dict(others).get(str(path), (0, 0o755))
        return os.stat_result((mode, 0, 0, 0, uid, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "stat", status)


@pytest.mark.parametrize("uid, mode", [(1000, 0o755), (0, 0o775), (0, 0o777), (0, 0o1777)])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_rules_never_name_what_others_may_change(run, program, monkeypatch, above, uid, mode):
    path = str([program, *program.parents][above])
    of_root(monkeypatch, (path, (uid, mode)))
    assert_fails(run("udev-rules"), 1, f"not root alone may change {path}", errno.EPERM)


def test_rules_quote_what_they_name(run, monkeypatch):
    of_root(monkeypatch)
    monkeypatch.setattr(ublk, "PROGRAM", ("/opt/my python/python3", "/opt/100%/$x/ublk.py"))
    done = run("udev-rules")
    assert "PROGRAM=\"'/opt/my python/python3' -I /opt/100%%/$$x/ublk.py udev-owner %k\"" in done.out
    assert 'MODE="0600"' in done.out


@pytest.mark.parametrize("letter", list("\"'\\\n"))
def test_rules_refuse_a_path_that_udev_cannot_be_told(run, monkeypatch, letter):
    of_root(monkeypatch)
    monkeypatch.setattr(ublk, "PROGRAM", ("/usr/bin/python3", f"/opt/{letter}/ublk.py"))
    assert_fails(run("udev-rules"), 1, "udev cannot be told of it", errno.EINVAL)


# ---- the life of a device, in odd circumstances ---------------------------------------------------


@kernel
def test_a_thread_that_cannot_start_leaves_no_device(monkeypatch):
    def start(self, start=ublk.Worker.start):
        if self.index == 1:
            raise RuntimeError("can't start new thread")
        start(self)
    monkeypatch.setattr(ublk.Worker, "start", start)
    with pytest.raises(ublk.UblkError, match=r"can't start new thread.*EAGAIN"):
        ublk.Device(Ram(), queues=2).start()
    assert devices_left() == []


@kernel
def test_two_threads_may_stop_a_device():
    for _ in range(4):
        disk, errors = ublk.Device(Ram()), []
        disk.start()

        def stop(disk=disk, errors=errors):
            try:
                disk.stop()
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=stop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (errors, devices_left()) == ([], [])


@kernel
def test_list_shows_any_name_as_one_line(run, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/a\xff\n\x1b[31m.img")
    with open(name, "wb") as file:
        file.truncate(1 << 20)
    with Forked("loop", name) as disk:
        done = run("list")
        assert done.status == 0 and done.out.count("\n") == 2 and "\x1b" not in done.out
        assert r"/a\udcff\n\x1b[31m.img" in done.out
        assert disk.kill(signal.SIGTERM) == 0


def test_the_version_is_told(run):
    assert run("--version").out == f"ublk.py {ublk.__version__}\n"


@pytest.mark.parametrize("text, seconds", [("", 0), ("soon", 0), ("3000000", 3)])
def test_a_watchdog_that_makes_no_sense_is_none(monkeypatch, text, seconds):
    monkeypatch.setenv("WATCHDOG_USEC", text)
    assert ublk.watchdog() == seconds


@pytest.mark.parametrize("address", ["@abstract", "a@b", "@a@b"])
def test_only_the_first_letter_makes_an_abstract_address(monkeypatch, tmp_path, address):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + address[1:] if address.startswith("@") else address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with ublk.notifier() as notify:
            notify("READY=1")
        assert channel.recv(64, socket.MSG_DONTWAIT) == b"READY=1"


def test_a_line_that_always_fails_does_not_fill_the_log(capfd):
    for count in range(1000):
        try:
            raise ZeroDivisionError(count)
        except ZeroDivisionError as error:
            assert ublk.failed(error) == -errno.EIO
    text = capfd.readouterr().err
    assert text.count("Traceback") == 1
    assert [line.split()[-4] for line in text.splitlines() if "by now" in line] == ["10", "100", "1000"]


@kernel
def test_a_state_directory_that_cannot_be_is_told(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UBLK_RUN_DIR", str(tmp_path / "file" / "run"))
    with pytest.raises(ublk.UblkError, match=r"state directory.*set UBLK_RUN_DIR"):
        ublk.Device(Ram()).start()
    assert devices_left() == []


def test_files_behind_a_link_to_another_directory_are_not_taken_for_a_state(tmp_path, run_dir):
    """In /tmp anybody can make it, in place of an ordinary user's directory that is not there yet."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("7.json", "7.log"):
        (other / name).write_text("precious")
    if run_dir.exists():
        run_dir.rmdir()
    run_dir.symlink_to(other)
    assert not ublk.forget_state(7) and ublk.stale_states([]) == []
    assert sorted(path.name for path in other.iterdir()) == ["7.json", "7.log"]
    run_dir.unlink()
