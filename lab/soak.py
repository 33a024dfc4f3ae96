#!/usr/bin/env python3
"""Kill servers, again and again, and see that nothing is lost. As root, with a ublk driver.

    soak.py [--rounds N] [--seed N] [MODE...]

Modes, each N rounds (100):
    reissue     kill -9 under fio with checksums: no error, no wrong data
    requeue     the same: only requests in flight fail
    fail        the same: errors until the disk is recovered, none after (Linux 6.13)
    quiesce     exchange the server under fio: no error (Linux 6.16)
    ext4        kill at random moments, also while a new server starts (Linux 6.16: older ones never
                forget a server that dies then), under a mounted file system:
                no error, every synced file whole, and fsck content in the end
    cow         kill servers of an overlay at random moments, also while they start: every write that was
                done is there, no block is torn, the base is as it was
    nbd         kill NBD servers of several kinds at random moments, also while their client comes back,
                under fio with checksums: no wrong data, and no error but those that a server makes

Prints one line for each mode; the exit status is 1 if one of them failed.
"""
from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tests.support as t
import ublk
from tests.test_cow import kill_overlays
from tests.test_nbd import SERVERS, kill_nbd_servers
from tests.test_recovery import Files, churn, file_system

Result = dict[str, Any]


def under_fio(image: Path, rounds: int, recovery: str, exchange: Callable[[Any, Any], Any],
              *words: str) -> Result:
    """Exchange the server of a disk under fio; return what is to be told of it."""
    disk = t.Forked("loop", image, "-r", recovery).live()
    disk, failed = t.kill_under_load(disk, *words, rounds=rounds, exchange=exchange,
                                     told=lambda number: progress(recovery, number, rounds))
    requests = t.completed(disk)
    assert disk.kill(signal.SIGTERM) == 0, disk.said()
    return {"requests": requests, "failed": failed}


def reissue(image: Path, rounds: int) -> Result:
    """kill -9: no error, no wrong data."""
    result = under_fio(image, rounds, "reissue", t.kill_and_recover)
    assert result["failed"] == 0
    return result


def requeue(image: Path, rounds: int) -> Result:
    """kill -9: only what was in flight fails."""
    result = under_fio(image, rounds, "requeue", t.kill_and_recover, *t.CONTINUE)
    assert result["failed"] <= 16 * rounds
    return result


def fail(image: Path, rounds: int) -> Result:
    """kill -9: errors until the disk is recovered."""
    ublk.require(ublk.UBLK_F_USER_RECOVERY_FAIL_IO & ~features())

    def exchange(disk: Any, fio: Any) -> Any:
        disk.kill()
        t.await_state(disk.id, "FAIL_IO")
        fio.finish()
        return t.recovered(disk)
    return under_fio(image, rounds, "fail", exchange, *t.CONTINUE)


def quiesce(image: Path, rounds: int) -> Result:
    """Another server, without an error."""
    ublk.require(ublk.UBLK_F_QUIESCE & ~features())

    def leave(disk: Any, fio: Any) -> Any:
        done = t.verb("quiesce", disk.id)
        assert done.status == 0, done.err
        assert disk.wait() == 0, disk.said()
        return t.recovered(disk)
    result = under_fio(image, rounds, "reissue", leave)
    assert result["failed"] == 0
    return result


def ext4(image: Path, rounds: int) -> Result:
    """kill -9 at random moments under a mounted file system."""
    directory = Path(tempfile.mkdtemp())
    disk = t.Forked("loop", image, "-r", "reissue").live()
    dev_id, path, early = disk.id, disk.path, 0
    number = 0

    def once() -> None:
        nonlocal disk, early, number
        time.sleep(random.random() / 4)
        disk.kill()
        while True:
            disk = t.Forked("recover", dev_id)
            if random.random() < 0.5 or not t.at_least("6.16"):
                break
            time.sleep(random.random())
            early += not disk.said(disk.output)
            disk.kill()
        disk.live()
        number += 1
        progress("ext4", number, rounds)
    with file_system(disk, directory / "mnt"):
        files = Files(directory / "mnt", directory / "journal")
        churn(directory / "mnt", files, once, rounds)
    synced = len((directory / "journal").read_text().splitlines())
    shutil.rmtree(directory)
    assert disk.path == path and disk.kill(signal.SIGTERM) == 0, disk.said()
    return {"synced files": synced, "killed while recovering": early}


def cow(image: Path, rounds: int) -> Result:
    """kill -9 at random moments over an overlay, opened again each time."""
    return kill_overlays(image.parent, rounds, lambda number: progress("cow", number, rounds))


def nbd(image: Path, rounds: int) -> Result:
    """kill -9 of the server behind the server."""
    result = {}
    for name in SERVERS:
        left = iter(range(rounds))

        def pause(fio: Any, left: Any = left) -> None:
            number = next(left)
            if number % 3 == 0:
                fio.busy()
            time.sleep(random.random() / 2)
            progress("nbd", number, rounds)
        requests, failed = kill_nbd_servers(ublk.companion(), name, image, image.parent / "socket",
                                            [signal.SIGKILL] * rounds, pause)
        assert bool(failed) == (name == "error")
        result[f"requests of {name}"] = requests
    return result


MODES = {function.__name__: function for function in (reissue, requeue, fail, quiesce, ext4, cow, nbd)}


def features() -> int:
    with ublk.Control() as control:
        return control.features or 0


def progress(mode: str, number: int, rounds: int) -> None:
    if sys.stderr.isatty() or number % 10 == 9:
        print(f"{mode}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)


def soak(mode: str, rounds: int) -> bool:
    """Run one mode and print what came of it."""
    directory = Path(tempfile.mkdtemp(dir="/scratch" if t.IN_LAB else None))
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, 64 << 20)
    os.environ["UBLK_RUN_DIR"] = str(directory / "run")
    begun = time.monotonic()
    try:
        result = MODES[mode](image, rounds)
    except ublk.UblkError as error:
        print(f"{mode:<8} not possible: {error}")
        return error.errno == ublk.errno.EOPNOTSUPP
    except Exception:
        traceback.print_exc()
        print(f"{mode:<8} FAILED")
        t.clean_up()
        return False
    told = ", ".join(f"{count} {name}" for name, count in result.items())
    t.until(lambda: not t.leftovers() and not t.stuck(), "everything to be gone")
    print(f"{mode:<8} ok: {rounds} rounds in {time.monotonic() - begun:.0f} s, {told}", flush=True)
    shutil.rmtree(directory)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill servers, again and again; see that nothing is lost.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    options = parser.parse_args()
    if set(options.modes) - set(MODES):
        parser.error(f"there is no mode {' '.join(set(options.modes) - set(MODES))}")
    random.seed(options.seed)
    print(f"Linux {os.uname().release}", flush=True)
    return 0 if all([soak(mode, options.rounds) for mode in options.modes or MODES]) else 1


if __name__ == "__main__":
    sys.exit(main())
