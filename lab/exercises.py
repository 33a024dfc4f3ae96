#!/usr/bin/env python3
"""Try a solution of an exercise in learn/exercises.md: use its disk, and say what is wrong with it.

    exercises.py NUMBER FILE

Where there is no FILE yet, the program to start from becomes it. Without root and a driver, a virtual machine
is started.
"""
from __future__ import annotations

import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ublk

PROJECT = Path(__file__).resolve().parent.parent
LEARN = PROJECT / "learn"
BROKEN = runpy.run_path(str(PROJECT / "tests/solutions.py"))["BROKEN"]

NUMBER = 42                         # of the device, as in the steps
DISK = f"/dev/ublkb{NUMBER}"
SYS = Path(f"/sys/block/ublkb{NUMBER}")
SIZE = 16 << 20                     # of the image
PATIENCE = 300                      # samples, of 10 ms or more, in which nobody does anything
SECONDS = 60                        # for what goes on and on


class Wrong(Exception):
    """What is wrong with a program, and what helps."""


class Client:
    """A program that uses the disk."""

    def __init__(self, words: tuple[str, ...], data: bytes) -> None:
        self.words = shlex.join(words)
        self.output, self.errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        with tempfile.TemporaryFile() as source:
            source.write(data)
            source.seek(0)
            self.process = subprocess.Popen(words, stdin=source, stdout=self.output, stderr=self.errors)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """End it; the disk must be able to end its requests, or be gone."""
        self.process.kill()
        self.process.wait()
        self.output.close()
        self.errors.close()


class Trial:
    """A learner's program, which is started with an image, and what uses its disk."""

    def __init__(self, program: Path, directory: str, show: bool) -> None:
        self.program = program
        self.image = Path(directory, "disk.img")
        self.image.touch()
        os.truncate(self.image, SIZE)
        self.output = Path(directory, "output")
        self.show = show
        self.pid = 0
        self.sessions: list[int] = []
        self.clients: list[Client] = []

    # ---- the server

    def start(self) -> None:
        """Start the program; a forked process is quicker than a new Python."""
        self.tell(f"python3 {self.program.name} {self.image.name} &")
        self.pid = os.fork()
        if self.pid:
            self.sessions.append(self.pid)
            return
        os.setsid()
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))
            sys.argv = [str(self.program), str(self.image)]
            runpy.run_path(str(self.program), run_name="__main__")
        except SystemExit as end:
            status = 1
            print(end)
        except BaseException:
            status = 1
            traceback.print_exc(limit=-3)       # not what stands around it here
        finally:
            os._exit(status)

    def serve(self, hint: str = "") -> None:
        """Start the program, and wait for its disk."""
        self.start()
        if not self.await_(lambda: (SYS / "bdi").exists() or self.gone()):
            raise Wrong(f"There is no {DISK}, and the program waits. START_DEV ends when every tag of every "
                        f"queue has its FETCH_REQ, and not before. {hint}")
        self.alive(f"before there was a disk. {hint}")

    def gone(self) -> bool:
        """Tell whether the program has ended."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
        return not self.pid

    def said(self) -> str:
        """Return what the program printed."""
        return self.output.read_text(errors="replace").strip()

    def alive(self, when: str) -> None:
        """See that the program goes on."""
        if self.gone():
            raise Wrong(f"The program ended {when}")

    def send(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        self.alive("by itself.")
        self.tell(f"kill -{number.name[3:]} {self.pid}")
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program with kill -9, but no process that it has started."""
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def depth(self) -> int:
        """Return how many tags a queue has."""
        with ublk.Control() as control:
            return control.get_dev_info(NUMBER).queue_depth

    def delete(self) -> None:
        """Delete the device, which has no server any more, if it is there."""
        with ublk.Control() as control:
            with suppress(ublk.UblkError):
                control.stop_dev(NUMBER)        # fails what its clients wait for
            for client in self.clients:
                client.close()
            with suppress(ublk.UblkError):
                control.del_dev(NUMBER)

    def clean_up(self) -> None:
        """End the program, and all that it has started and that uses its disk."""
        for session in self.sessions:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        if self.pid:
            os.waitpid(self.pid, 0)
        self.delete()

    # ---- those who use its disk

    def tell(self, command: str) -> None:
        """Show a command, as one would type it."""
        if self.show:
            print("#", command, flush=True)

    def begin(self, *words: str, data: bytes = b"") -> Client:
        """Start a client."""
        self.tell(shlex.join(words))
        client = Client(words, data)
        self.clients.append(client)
        return client

    def await_(self, condition: Callable[[], bool], client: Client | None = None) -> bool:
        """Wait for something; return False when nobody does anything any more.

        That is: the client is where it was, and the program has slept whenever one looked, some seconds long.
        """
        before, asleep = "", 0
        end = time.monotonic() + SECONDS
        while not condition():
            server = doing(self.pid)
            now = doing(client.process.pid) if client else server
            if now != before:
                before, asleep = now, 0
            elif "R (running)" not in now + server:
                asleep += 1
            if asleep == PATIENCE or time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def end(self, client: Client, hint: str, fails: bool = False) -> bytes:
        """Wait for the end of a client; return what it printed. It hangs, or fails: that is wrong."""
        if not self.await_(client.ended, client):
            raise Wrong(f"`{client.words}` hangs: a request of it is not answered. {hint}")
        client.errors.seek(0)
        errors = client.errors.read().decode(errors="replace").strip()
        if client.process.returncode and not fails:
            for _ in range(100):            # one who is killed by its own fault takes a moment to be gone
                if not self.gone():
                    time.sleep(0.01)
            self.alive(f"while `{client.words}` used its disk. {hint}")
            raise Wrong(f"`{client.words}` failed: {errors}\n{hint}")
        if fails and not client.process.returncode:
            raise Wrong(f"`{client.words}` succeeded. {hint}")
        client.output.seek(0)
        return client.output.read()

    def run(self, *words: str, data: bytes = b"", hint: str = "", fails: bool = False) -> bytes:
        """Run a client to its end."""
        return self.end(self.begin(*words, data=data), hint, fails)

    def settle(self) -> None:
        """Let udev end its look at the new disk."""
        if shutil.which("udevadm"):
            client = self.begin("udevadm", "settle")
            if self.await_(client.ended, client) and client.process.returncode:     # of itself: "Broken pipe"
                client = self.begin("udevadm", "settle")
            self.end(client, "It is udev that looks at the new disk.")

    def write(self, sector: int, data: bytes, hint: str = "", flush: bool = False) -> None:
        """Write to the disk, and past the page cache."""
        words = dd("of", "seek", sector, len(data))
        self.run(*words, *(["conv=fsync"] if flush else []), data=data, hint=hint)

    def read(self, sector: int, size: int, hint: str = "") -> bytes:
        """Read from the disk, and past the page cache."""
        return self.run(*dd("if", "skip", sector, size), hint=hint)

    def in_image(self, sector: int, size: int) -> bytes:
        """Return what the image holds."""
        with open(self.image, "rb") as file:
            file.seek(512 * sector)
            return file.read(size)


def dd(side: str, position: str, sector: int, size: int) -> list[str]:
    """Return the words of a dd that makes requests of one stretch."""
    flag = {"if": "iflag", "of": "oflag"}[side]
    words = ["dd", f"{side}={DISK}", f"bs={size}", "count=1", f"{position}={512 * sector}",
             f"{flag}=direct,{position}_bytes", "status=none"]
    return words if side == "if" else [*words, "conv=nocreat"]


def doing(pid: int) -> str:
    """Return the states of all threads of a process, and how often each has been at work."""
    found = ""
    if pid:
        for path in Path(f"/proc/{pid}/task").glob("*/status"):
            with suppress(OSError):
                found += path.read_text()
    return found


def pattern(size: int, seed: int = 1) -> bytes:
    """Return bytes of which no two sectors are the same."""
    return b"".join(b"%-511d\n" % (seed << 20 | number) for number in range(size // 512))


def reads() -> int:
    """Return how many READs of the disk are under way."""
    return int((SYS / "inflight").read_text().split()[0])


def must(good: object, message: str) -> None:
    """Something must be so; the message says what helps if it is not."""
    if not good:
        raise Wrong(message)


# ---- what a solution must do -----------------------------------------------------------------------------

def discard(trial: Trial) -> None:
    trial.serve("SET_PARAMS is refused where max_discard_sectors, max_discard_segments (1) and "
                "discard_granularity do not go together: see step 4.")
    must((SYS / "queue/discard_max_bytes").read_text() != "0\n",
         "The disk does not say that it can discard: in step 4, SET_PARAMS says so (a bit of types, and "
         "three fields).")
    old = pattern(256 << 10)
    trial.write(0, old)
    trial.run("blkdiscard", "-o", "64K", "-l", "128K", DISK,
              hint="A DISCARD has no data, it can be larger than the buffer, and its op is not WRITE.")
    new = trial.read(0, len(old))
    what_range = "Its range is start_sector and nr_sectors, both in sectors of 512 bytes."
    must(new[64 << 10:192 << 10] == bytes(128 << 10),
         f"What was discarded does not read as zeroes. {what_range}")
    must(new[:64 << 10] == old[:64 << 10] and new[192 << 10:] == old[192 << 10:],
         f"The DISCARD has changed what stands beside its range. {what_range}")


def encrypt(trial: Trial) -> None:
    trial.serve()
    text = b"%-511d\n" % 42 * 128
    trial.write(2048, text)
    image = trial.in_image(2048, len(text))
    sectors = {image[at:at + 512] for at in range(0, len(image), 512)}
    must(text[:512] not in sectors, "The image holds what was written as it is: a WRITE has to encrypt.")
    must(len(sectors) == 128,
         "Sectors that are alike are alike in the image, too: what they are encrypted with must depend on "
         "the number of the sector.")
    must(trial.read(2048, len(text)) == text, "What is read is not what was written: a READ has to decrypt.")
    must(trial.read(2058, 512) == text[:512],
         "A sector that was written with others cannot be read alone: what it is encrypted with must depend "
         "on its own number, and not on where in a request it stands.")
    trial.run("mkfs.ext4", "-q", DISK)
    trial.kill()
    trial.delete()
    trial.serve()
    trial.run("e2fsck", "-fn", DISK, hint="That was after a new start: the key must be the same.")


def queues(trial: Trial) -> None:
    trial.serve("There are two queues, with 16 tags each.")
    found = (SYS / "mq/0", SYS / "mq/1")
    must(trial.await_(found[1].exists),
         "The disk has one queue: ADD_DEV is told how many, and makes no more than there are processors.")
    for queue in found:
        cpu = (queue / "cpu_list").read_text().partition(",")[0].strip()
        data = pattern(256 << 10, seed=int(queue.name) + 2)
        hint = (f"It ran on a processor of queue {queue.name}. Each queue has its own descriptors in what "
                "/dev/ublkc42 maps, the next 4096 x 24 bytes further on, and each command says of which "
                "queue it is.")
        trial.run("taskset", "-c", cpu, *dd("of", "seek", 0, len(data)), data=data, hint=hint)
        read = trial.run("taskset", "-c", cpu, *dd("if", "skip", 0, len(data)), hint=hint)
        must(read == data, f"What was read is not what was written. {hint}")


def mailbox(trial: Trial) -> None:
    trial.serve()
    trial.settle()
    reader = trial.begin(*dd("if", "skip", 1500, 512))
    trial.await_(lambda: reader.ended() or reads() > 0, reader)
    trial.read(0, 65536,
               "Another request waits, and this one should not: answer() must not wait, but serve() can put "
               "off an answer and take the next completion.")
    must(not reader.ended(),
         "Sector 1500 was read although nobody had written to it: a READ that has to wait is not committed "
         "before the WRITE is here.")
    letter = pattern(512, seed=7)
    trial.write(1500, letter)
    read = trial.end(reader,
                     "It waited for sector 1500, which has been written: the WRITE is what has all requests "
                     "that wait answered, each with its own tag.")
    must(read == letter,
         "The one who waited got what had been there before: the buffer has to be filled when the answer is "
         "given.")


def survive(trial: Trial) -> None:
    trial.serve()
    must((SYS / "queue/write_cache").read_text() == "write back\n",
         "The disk does not say that it has a volatile cache (attrs), and so no FLUSH ever comes.")
    old, new = pattern(65536, seed=3), pattern(65536, seed=4)
    trial.write(2048, old)
    must(trial.in_image(2048, 65536) == bytes(65536),
         "The image holds a write that was not flushed: this disk is to keep it in memory.")
    must(trial.read(2048, 65536) == old,
         "What is read is not what was written: a READ has to look into the memory, too.")
    trial.write(4096, new, flush=True)
    must(trial.in_image(2048, 65536) == old and trial.in_image(4096, 65536) == new,
         "The FLUSH was answered, and the image does not hold all that had been written before it.")
    extents = trial.run("filefrag", "-v", str(trial.image)).decode()
    must("delalloc" not in extents,
         "The FLUSH was answered, and the image's data was in the page cache only: a power cut would take it "
         "(fdatasync).")
    trial.kill()
    reader = trial.begin(*dd("if", "skip", 4096, 65536))
    trial.start()
    read = trial.end(reader,
                     "It came while there was no server. With USER_RECOVERY it waits for the next (step 5).")
    must(read == new and trial.read(2048, 65536) == old, "What was flushed is gone after a kill.")


def silent(trial: Trial) -> None:
    trial.serve()
    os.truncate(trial.image, 0)
    trial.run(*dd("if", "skip", 4096, 65536), fails=True,
              hint="The image has lost its end, so this READ cannot be done: its reader has to be told.")
    os.truncate(trial.image, SIZE)
    trial.read(4096, 65536, "The image is whole again.")


def begun(trial: Trial) -> None:
    trial.serve("And up to Linux 6.12 it waits for the answers to the first READs, too: its own answer comes "
                "when it comes, among others.")
    must(trial.await_(lambda: "START_DEV: Success" in trial.said()), "It is to print how START_DEV ended.")
    trial.read(0, 65536)


def lost(trial: Trial) -> None:
    trial.serve()
    must(trial.depth() == 32, "The disk is to have its 32 tags: it is wait() that goes wrong.")
    trial.send(signal.SIGSTOP)          # or it takes some before all are there
    reader = trial.begin(*dd("if", "skip", 0, 1 << 20))
    trial.await_(lambda: reads() >= 16, reader)
    trial.send(signal.SIGCONT)
    trial.end(reader, "16 requests came at once. What becomes of a completion that wait() does not hand on?")


def own_end(trial: Trial) -> None:
    trial.serve()
    trial.settle()
    trial.send(signal.SIGINT)
    must(trial.await_(trial.gone),
         "The program waits for the end of DEL_DEV, and DEL_DEV for that of the last use of /dev/ublkc42. "
         "Who still has it open, or mapped?")
    must(not os.path.exists(f"/dev/ublkc{NUMBER}"),
         "The program is gone, the disk is not: it has to be deleted.")


def helper(trial: Trial) -> None:
    trial.serve()
    must(trial.await_(Path(f"{trial.image}.usage").exists), "Nobody writes disk.img.usage any more.")
    trial.kill()
    trial.start()
    trial.read(0, 65536,
               "The server was killed and started again, and START_USER_RECOVERY says that the device is "
               "busy: who, that still lives, has /dev/ublkc42, or the ring whose commands wait there, open "
               "or mapped?")


class Exercise(NamedTuple):
    """What there is to do, the program to start from, and what tries the result."""
    title: str
    start: str
    check: Callable[[Trial], None]


EXERCISES = {
    1: Exercise("a disk that forgets", (LEARN / "step7.py").read_text(), discard),
    2: Exercise("a disk that encrypts", (LEARN / "step4.py").read_text(), encrypt),
    3: Exercise("two queues", (LEARN / "step7.py").read_text(), queues),
    4: Exercise("a mailbox", (LEARN / "step7.py").read_text(), mailbox),
    5: Exercise("survive a kill without losing a flushed block", (LEARN / "step5.py").read_text(), survive),
    6: Exercise("why does this server hang? An error", BROKEN[6], silent),
    7: Exercise("why does this server hang? The start", BROKEN[7], begun),
    8: Exercise("why does this server hang? A fair share", BROKEN[8], lost),
    9: Exercise("why does this server hang? Ctrl-C", BROKEN[9], own_end),
    10: Exercise("why does this server hang? A helper", BROKEN[10], helper),
}


def attempt(number: int, program: Path, show: bool = False) -> str:
    """Try a program in a directory of its own; return what is wrong with it, nothing if it is right."""
    base = "/scratch" if os.path.isdir("/scratch") else "/var/tmp"      # in memory, all is durable
    with tempfile.TemporaryDirectory(dir=base) as directory:
        trial = Trial(program, directory, show)
        try:
            EXERCISES[number].check(trial)
        except Wrong as wrong:
            said = "\n".join(trial.said().splitlines()[-10:])
            return f"{wrong}\nThe last that the program printed:\n{said}"
        finally:
            trial.clean_up()
    return ""


def in_a_machine(number: int, program: Path) -> int:
    """Do the same in a virtual machine, which does not see all files."""
    print("Starting a virtual machine ...", flush=True)
    kernel = os.environ.get("KERNEL", "7.3")
    script = 'printf %s "$3" >"/tmp/$2" && exec python3 lab/exercises.py "$1" "/tmp/$2"'
    return subprocess.call([sys.executable, "lab/lab.py", "run", kernel, "--", "sh", "-c", script, "sh",
                            str(number), program.name, program.read_text()], cwd=PROJECT)


def main(number: int, program: Path) -> int:
    exercise = EXERCISES[number]
    if not program.exists():
        program.write_text(exercise.start)
        print(f"{program} is the program to start from. Change it as learn/exercises.md says, and run this "
              "again.")
        return 0
    if not os.path.exists("/dev/ublk-control") or os.geteuid() != 0:
        return in_a_machine(number, program)
    if os.path.exists(f"/dev/ublkc{NUMBER}"):
        print(f"There is a device {NUMBER} already, which all exercises use.")
        return 1
    wrong = attempt(number, program, show=True)
    print(f"\nExercise {number}, {exercise.title}: {'not yet' if wrong else 'solved'}", wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in map(str, EXERCISES):
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
