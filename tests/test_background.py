# SPDX-License-Identifier: MIT
"""Servers in the background: what they tell, what they keep of their caller, and what starts them again."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import (
    HERE,
    UBLK,
    Forked,
    assert_error_line,
    await_state,
    children_of,
    devices_left,
    error_of,
    kernel,
    kill_under_load,
    opened,
    recovered,
    sh,
    state_of,
    target_file,
    until,
    verb,
    write_at,
)


def shell(line, **options):
    """Run a line of sh in which $UBLK is the command; return what it did."""
    env = {**os.environ, "UBLK": f"{sys.executable} -m ublk", "PYTHONPATH": str(HERE)}
    return sh("sh", "-c", line, check=False, env=env, **options)


def pid_of(dev_id):
    """Return the process that serves a device."""
    with ublk.Control() as control:
        return control.get_dev_info(dev_id).ublksrv_pid


def delete(dev_id=0):
    """Delete a device and wait for the end of its server."""
    pid = pid_of(dev_id)
    assert ublk.main(["del", str(dev_id)]) == 0
    until(lambda: not ublk.alive(pid), "the server's end")


@kernel
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_descriptors_never_become_the_image(backing, closed):
    before = backing.read_bytes()
    assert shell(f"$UBLK loop {backing} --background {closed}").returncode == 0
    links = [os.readlink(f"/proc/{pid_of(0)}/fd/{fd}") for fd in range(3)]
    assert str(backing) not in links
    delete()
    assert backing.read_bytes() == before


@kernel
def test_a_server_in_the_foreground_has_its_standard_descriptors_too(backing):
    done = subprocess.Popen(f"exec {sys.executable} {UBLK} loop {backing} 0<&- 2>&-", shell=True,
                            stdout=subprocess.PIPE)
    assert done.stdout.readline() == b"/dev/ublkb0\n"
    assert [os.readlink(f"/proc/{done.pid}/fd/{fd}") for fd in (0, 2)] == [os.devnull] * 2
    done.terminate()
    assert done.wait(60) == 0 and devices_left() == []


@pytest.mark.parametrize("library", ["", "import os; os.open('/dev/zero', os.O_RDONLY)"], ids=["", "library"])
def test_a_program_that_a_target_starts_has_standard_descriptors_too(tmp_path, library):
    """Or a file that it opens would be what it writes messages to. A library may have one open for itself."""
    (tmp_path / "sitecustomize.py").write_text(library)
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self):
                os.system("readlink /proc/self/fd/0 /proc/self/fd/2 > links")
                raise OSError(5, "seen")
    """)
    assert shell(f"PYTHONPATH=.:$PYTHONPATH $UBLK {path} 0<&- 2>&-", cwd=tmp_path).returncode == 1
    assert (tmp_path / "links").read_text().split() == [os.devnull] * 2


def test_a_program_without_standard_output_hears_how_a_command_ended(tmp_path):
    program = "import ublk; raise SystemExit(ublk.main(['--version']))"
    done = sh("sh", "-c", f'exec {sys.executable} -c "{program}" >&-', check=False, cwd=HERE)
    assert (done.returncode, done.stderr) == (0, "")


@kernel
def test_a_background_server_holds_nothing_of_its_caller(tmp_path):
    lock = tmp_path / "lock"
    done = shell(f"exec 9>{lock}; flock 9; : | $UBLK null --background", cwd=tmp_path)
    assert done.stdout == "/dev/ublkb0\n"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server = f"/proc/{pid_of(0)}"
    assert [os.readlink(f"{server}/{name}") for name in ("cwd", "fd/0", "fd/1")] == ["/", *[os.devnull] * 2]
    delete()


@pytest.mark.parametrize("key", ["/dev/fd/9", "/dev/stdin"])
def test_a_target_may_read_what_its_caller_has_given_it(tmp_path, key):
    """Or it would find nothing there, and take that for a key."""
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self, key):
                raise OSError(5, open(key).read())
    """)
    done = shell(f"echo secret | $UBLK {path} {key} --background 9<&0")
    assert_error_line(done.stderr, errno.EIO, says="secret")


@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["", "background"])
def test_to_interrupt_a_constructor_is_one_line(tmp_path, mode):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self):
                open("begun", "w").close()
                time.sleep(3600)
    """)
    disk = Forked(path, *mode, change=lambda: os.chdir(tmp_path))
    until((tmp_path / "begun").exists, "the constructor")
    assert disk.kill(signal.SIGINT) == 1
    assert disk.said() == "ublk: ended by KeyboardInterrupt\n"


@kernel
def test_a_target_speaks_to_the_callers_standard_error_until_the_disk_is_there(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                os.write(2, b"no end of line")
    """)
    done = verb(path, "--background")
    assert (done.out, done.err) == ("/dev/ublkb0\n", "no end of line")
    delete()


def target_with_helper(tmp_path, seconds, then="pass"):
    """Return a target whose start() forks a helper that lives so long; its pid is in `helper` there.

    then: what start() does after that.
    """
    return target_file(tmp_path, f"""
        class Mine(ublk.Target):
            size = 1 << 20
            def start(self, index):
                child = os.fork()
                if child == 0:
                    time.sleep({seconds})
                with open({str(tmp_path / "helper")!r}, "w") as file:
                    file.write(str(child))
                {then}
    """)


@kernel
def test_a_helper_that_outlives_a_failed_server_keeps_nobody_waiting(tmp_path):
    path = target_with_helper(tmp_path, 3600, "os.kill(os.getpid(), 9)")
    helper = tmp_path / "helper"
    waiting = Forked(path, "--background")
    assert waiting.wait() == 1
    assert_error_line(waiting.said(), errno.ECHILD, says="killed by signal 9")
    os.kill(int(helper.read_text()), signal.SIGKILL)


@kernel
def test_a_helper_that_a_target_forks_holds_nothing_that_somebody_waits_for(tmp_path):
    """As a process of multiprocessing: it lives as long as the disk."""
    path = target_with_helper(tmp_path, 90)
    lines = f"exec 9>lock; flock 9; $UBLK {path} --background 2>said"
    assert shell(lines, cwd=tmp_path).stdout == "/dev/ublkb0\n"
    helper = int((tmp_path / "helper").read_text())
    assert ublk.alive(helper), "its output was waited for"
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(helper, signal.SIGKILL)
    delete()


@kernel
def test_the_log_of_a_killed_server_is_continued_while_its_helper_lives(tmp_path):
    """Whatever lock the helper had would not end with the server."""
    path = target_with_helper(tmp_path, 3600)
    with Forked("record", tmp_path / "log", path, "-r", "requeue") as disk:
        disk.kill()
        assert ublk.alive(int((tmp_path / "helper").read_text()))
        with recovered(disk) as again:
            assert again.kill(signal.SIGTERM) == 0


@kernel
def test_a_target_that_uses_what_its_caller_has_opened_fails(backing, tmp_path):
    """Or what is written would be gone, and nobody know."""
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def read(self, offset, buffer):
                return os.preadv(9, [buffer], offset)
            def write(self, offset, buffer):
                return os.pwrite(9, buffer, offset)
    """)
    assert shell(f"$UBLK {path} --background 9<>{backing}").stdout == "/dev/ublkb0\n"
    with opened("/dev/ublkb0") as fd:
        assert error_of(write_at, fd, 0, bytes(4096)) == errno.EIO
    delete()


def tell_nobody():
    """Have this process write its standard output where there is no room."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)


@kernel
@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["", "background"])
def test_a_disk_of_which_nobody_can_be_told_is_taken_away(mode):
    done = verb("null", *mode, change=tell_nobody)
    assert done.status == 1 and "ENOSPC" in done.err
    assert devices_left() == [], done.err


@kernel
@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["", "background"])
def test_a_recovered_disk_of_which_nobody_can_be_told_waits_for_another_server(backing, mode):
    disk = Forked("loop", backing, "-r", "reissue").live()
    disk.kill()
    done = verb("recover", disk.id, *mode, change=tell_nobody)
    assert done.status == 1 and "ENOSPC" in done.err
    assert recovered(disk).kill(signal.SIGTERM) == 0


@kernel
def test_a_caller_that_ignores_the_end_of_children_gets_its_disk():
    done = verb("null", "--background", change=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert (done.out, done.err) == ("/dev/ublkb0\n", "")
    delete()


@kernel
def test_a_log_that_cannot_be_opened_is_told_before_the_disk_is():
    log = Path(os.environ["UBLK_RUN_DIR"], "0.log")
    log.mkdir(parents=True)
    log.parent.chmod(0o700)
    done = verb("null", "--background")
    assert (done.status, done.out) == (1, "")
    assert_error_line(done.err, errno.EISDIR)
    assert devices_left() == []


@kernel
def test_a_log_goes_with_its_device(tmp_path, run_dir):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 1 << 20
            def read(self, offset, buffer):
                pass
            def write(self, offset, buffer):
                raise RuntimeError("said once")
    """)
    assert verb(path, "--background").status == 0
    with opened("/dev/ublkb0") as fd:
        assert error_of(write_at, fd, 0, bytes(4096)) == errno.EIO
    assert "said once" in (run_dir / "0.log").read_text()
    delete()
    assert list(run_dir.iterdir()) == []


# A kernel that still looks for partitions when the server is killed would keep close() waiting.
RESTARTED = ["loop", "--id", 3, "-r", "reissue", "--no-partition-scan"]


def lost(backing):
    """Make a disk whose server is killed; return a client's file, open since before."""
    disk = Forked(*RESTARTED, backing).live()
    client = open(disk.path, "rb", buffering=0)
    # Pages that are read ahead would keep close() waiting for the next server.
    os.posix_fadvise(client.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    client.read(4096)
    disk.kill()
    return client


@kernel
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
def test_a_create_by_the_same_words_recovers(backing, waits):
    with lost(backing) as client:
        if waits:
            await_state(3, "QUIESCED")
        again = Forked(*RESTARTED, backing).live()
        assert again.path == client.name and len(client.read(4096)) == 4096
    assert again.kill(signal.SIGTERM) == 0
    assert devices_left() == []


@kernel
def test_a_create_in_the_background_recovers_too(backing):
    lost(backing).close()
    assert verb(*RESTARTED, backing, "--background").out == "/dev/ublkb3\n"
    assert state_of(3) == "LIVE"
    delete(3)


@kernel
def test_a_create_by_other_words_does_not_recover(backing):
    lost(backing).close()
    await_state(3, "QUIESCED")
    for words in ["-d", 64], ["--direct"], ["--read-only"]:
        other = Forked(*RESTARTED, backing, *words)
        assert other.wait() == 1, words
        assert_error_line(other.said(), errno.EEXIST)
        assert state_of(3) == "QUIESCED"
    assert ublk.main(["del", "3"]) == 0


@kernel
def test_a_create_leaves_a_disk_alone_that_is_served(backing):
    with Forked(*RESTARTED, backing):
        other = Forked(*RESTARTED, backing)
        assert other.wait() == 1
        assert_error_line(other.said(), errno.EEXIST)
        assert state_of(3) == "LIVE"


@kernel
def test_a_create_that_fails_to_recover_leaves_the_disk_waiting(backing):
    lost(backing).close()
    await_state(3, "QUIESCED")
    backing.rename(f"{backing}.away")
    done = verb(*RESTARTED, backing, "--background")
    assert done.status == 1
    assert_error_line(done.err, errno.ENOENT)
    assert state_of(3) == "QUIESCED" and ublk.main(["del", "3"]) == 0


@kernel
def test_a_disk_whose_server_is_started_again_each_time_loses_nothing(backing):
    def again(disk, fio):
        disk.kill()
        return Forked(*RESTARTED, backing).live()

    disk, errors = kill_under_load(Forked(*RESTARTED, backing).live(), exchange=again)
    assert errors == 0
    assert disk.kill(signal.SIGTERM) == 0 and devices_left() == []


@kernel
def test_systemd_hears_that_a_disk_is_recovered(backing, tmp_path):
    lost(backing).close()
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address)
        channel.settimeout(60)
        with Forked(*RESTARTED, backing, change=lambda: os.environ.update(NOTIFY_SOCKET=address)):
            assert channel.recv(4096).startswith(b"READY=1\n")


def test_a_server_whose_command_was_killed_has_nobody_to_tell():
    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))
    reader, started.news = os.pipe()
    os.close(reader)
    assert error_of(started.tell, b"live") == errno.EPIPE
    started.hang_up()


def test_a_server_ends_with_its_command_while_its_target_is_made(tmp_path):
    """Or it kept the files, of a disk that nobody sees, and had one for a moment when all were deleted."""
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self):
                import fcntl
                fcntl.flock(os.open("lock", os.O_CREAT), fcntl.LOCK_EX)
                open("begun", "w").close()
                time.sleep(3600)
    """)
    command = Forked(path, "--background", change=lambda: os.chdir(tmp_path))
    until((tmp_path / "begun").exists, "the constructor")
    server, = children_of(command.pid)
    command.kill()
    with open(tmp_path / "lock") as lock:
        until(lambda: not error_of(fcntl.flock, lock, fcntl.LOCK_EX | fcntl.LOCK_NB), "its end")
    assert not ublk.alive(server)


def test_a_server_whose_command_was_killed_at_once_makes_no_target():
    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))
    reader, started.news = os.pipe()
    started.see_that_somebody_waits()
    os.close(reader)
    assert error_of(started.see_that_somebody_waits) == errno.EPIPE
    started.hang_up()


@pytest.mark.parametrize("where", ["after_in_parent", "after_in_child"])
def test_a_ctrl_c_as_it_forks_ends_the_command(tmp_path, where):
    """Python loses it there. Sent again once a disk was there, it took one away that waited for a server."""
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            def __init__(self):
                open("begun", "w").close()
    """)

    def change():
        os.chdir(tmp_path)
        os.register_at_fork(**{where: lambda: os.kill(os.getpid(), signal.SIGINT)})
    command = Forked(path, "--background", change=change)
    assert command.wait() == 1
    assert command.said() == "ublk: ended by KeyboardInterrupt\n" and not (tmp_path / "begun").exists()


@kernel
def test_a_signal_that_comes_as_the_disk_is_told_of_is_what_ended_it():
    def change():
        def live(started, device, live=ublk.Started.live):
            os.kill(os.getppid(), signal.SIGTERM)
            until(lambda: device.interrupted, "the signal")
            live(started, device)
        ublk.Started.live = live
    command = Forked("null", "--background", change=change)
    assert command.wait() == 1 and devices_left() == []
    assert_error_line(command.said(), errno.EINTR, says="ended by SIGTERM")


def test_what_the_caller_has_open_is_found_whatever_it_is():
    child = subprocess.Popen(["sleep", "60"])
    gone = os.open(f"/proc/{child.pid}/fd", os.O_RDONLY)        # of which stat() tells ENOENT then
    child.kill()
    child.wait()
    assert gone in ublk.open_descriptors()
    os.close(gone)


def test_a_number_of_the_callers_never_becomes_another_file(tmp_path, monkeypatch):
    """Where a program calls main(), its objects live on in the server, and may yet let go of theirs."""
    monkeypatch.setattr(ublk, "on_signals", lambda action: None)
    callers = open(tmp_path / "theirs", "wb")
    told = tmp_path / "trace"

    def serve():
        assert error_of(os.write, callers.fileno(), b"lost") == errno.EBADF
        callers.close()
        print("begun", file=started.out, flush=True)
        started.trace(0, "begun", {})
        started.tell(b"live")
        os._exit(0)

    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=str(told)))
    assert ublk.in_background(serve, started, 0) == 0
    os.wait()
    assert "begun" in told.read_text()


def test_a_number_that_the_caller_has_let_go_of_stays_ours(tmp_path, monkeypatch):
    """Or the image, opened in between, would be /dev/null."""
    monkeypatch.setattr(ublk, "on_signals", lambda action: None)
    callers = [open(os.devnull, "rb") for _ in range(8)]
    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))
    for file in callers:
        file.close()
    image = open(tmp_path / "image", "wb", buffering=0)

    def serve():
        image.write(b"written")
        started.tell(b"live")
        os._exit(0)

    assert ublk.in_background(serve, started, 0) == 0
    os.wait()
    image.close()
    assert (tmp_path / "image").read_bytes() == b"written"


def test_a_number_that_was_handed_down_and_let_go_of_stays_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(ublk, "on_signals", lambda action: None)
    path = tmp_path / "image"
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.set_inheritable(number, True)
    started = ublk.Started(SimpleNamespace(json=False, background=True, trace=None))

    def serve():
        os.close(number)
        assert os.open(path, os.O_WRONLY) == number
        started.let_go(handed_down=True)
        os.write(number, b"written")
        started.tell(b"live")
        os._exit(0)

    assert ublk.in_background(serve, started, 0) == 0
    os.wait()
    os.close(number)
    assert path.read_bytes() == b"written"
