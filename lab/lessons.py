#!/usr/bin/env python3
"""Run the commands of learn/README.md, one after the other, and see that they print what the page shows.

    lessons.py [STEP...]

Commands behind # need root and a ublk driver. What follows "### Before Linux RELEASE" is for such kernels,
and what stands before it for the others.
"""
from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "learn/README.md"
SECONDS = 120                       # longer than any command takes, even under emulation
DONE = "-- done"
VARIES = [                          # numbers that differ from run to run, and lines that may be missing
    (r"(?m)^.*: Device or resource busy\n", ""),
    (r"GET_FEATURES: .*", "GET_FEATURES: answered, or not known"),
    (r"GET_DEV_INFO2: Operation not supported\nGET_DEV_INFO:", "GET_DEV_INFO2:"),
    (r"0x[0-9a-f]+", "0xN"),
    (r"\d+ system calls", "N system calls"),
    (r"\d+ MiB/s", "N MiB/s"),
    (r"[\d.]+ times", "N times"),
    (r"(?m) +$", ""),
]


class Part(NamedTuple):
    """Commands, each with what it prints, for kernels since and before a release."""
    step: int
    title: str
    since: str
    before: str
    commands: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"step{self.step}" + (f"-before-{self.before}" if self.before else "")

    @property
    def needs_root(self) -> bool:
        return any(command.startswith("# ") for command, _ in self.commands)


def commands(text: str) -> list[tuple[str, str]]:
    """Return the commands of a text, each with what it is shown to print."""
    shown = "".join(f"{line}\n" for line in re.findall(r"(?m)^    (.*)$", text))
    command, output = r"([$#] [^\n]*)\n", r"((?:(?![$#] )[^\n]*\n)*)"
    return re.findall(command + output, shown)


def parts() -> list[Part]:
    """Return what the page has to run: each step, and what of it is different on older kernels."""
    found = []
    page = re.sub(r"(?ms)^```.*?^```$", "", PAGE.read_text())
    for step, title, text in re.findall(r"(?ms)^## Step (\d): ([^\n]*)(.*?)(?=^## |\Z)", page):
        text, _, older = text.partition("\n### Before Linux ")
        limit = older.partition("\n")[0]
        found.append(Part(int(step), title, limit, "", commands(text)))
        if commands(older):
            found.append(Part(int(step), title, "", limit, commands(older)))
    return found


def plain(text: str) -> str:
    """Return a text with what varies from run to run taken out."""
    for pattern, becomes in VARIES:
        text = re.sub(pattern, becomes, text)
    return text


class Shell:
    """A shell that runs commands in a directory of their own, with learn/ in it."""

    def __init__(self, directory: str) -> None:
        os.symlink(PROJECT / "learn", f"{directory}/learn")
        os.chmod(directory, 0o755)
        self.shell = subprocess.Popen(["sh"], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self.rest = b""

    def run(self, command: str, expected: str) -> str:
        """Run a command; return what it prints, and what those in the background print that long."""
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f"{command}\necho '{DONE}'\n".encode())
        self.shell.stdin.flush()
        ended = False
        text = ""
        while not ended or plain(text).count("\n") < plain(expected).count("\n"):
            while b"\n" not in self.rest:
                if not select.select([self.shell.stdout], [], [], SECONDS)[0]:
                    return text + "... and then nothing\n"
                data = os.read(self.shell.stdout.fileno(), 65536)
                if not data:
                    return text + "... and then the shell ended\n"
                self.rest += data
            line, _, self.rest = self.rest.partition(b"\n")
            if line.decode() == DONE:
                ended = True
            else:
                text += line.decode() + "\n"
        return text

    def close(self) -> None:
        """End the shell, not waiting for what it left in the background."""
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.close()
        self.shell.stdout.close()
        self.shell.wait()


def run(part: Part, show: bool = False) -> str:
    """Run all commands of a part; return where the output differs from the page, nothing if it does not."""
    base = "/scratch" if os.path.isdir("/scratch") else None
    directory = tempfile.mkdtemp(dir=base)
    shell = Shell(directory)
    try:
        for command, expected in part.commands:
            if show:
                print(command, flush=True)
            text = shell.run(command[2:], expected)
            if show:
                print(re.sub(r"(?m) +$", "", text), end="", flush=True)
            if plain(text) != plain(expected):
                return f"{command}\nprinted\n{text}and not\n{expected}"
    finally:
        shell.close()
        shutil.rmtree(directory, ignore_errors=True)
    return ""


def release(text: str) -> tuple[int, ...]:
    """Return a kernel's version as numbers, such as (6, 12)."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def main(steps: list[int]) -> int:
    unknown = set(steps) - {part.step for part in parts()}
    if unknown:
        print(f"learn/README.md has no step {min(unknown)}")
        return 2
    driver = os.path.exists("/dev/ublk-control") and os.geteuid() == 0
    for part in parts():
        here = release(os.uname().release)
        fits = release(part.since) <= here and (not part.before or here < release(part.before))
        if not fits or (steps and part.step not in steps):
            continue
        print(f"\n\033[1mStep {part.step}: {part.title}\033[0m")
        if part.needs_root and not driver:
            print("needs root and a ublk driver: `make learn` has both, if need be in a virtual machine")
            return 1
        different = run(part, show=True)
        if different:
            print(f"\nThat is not what learn/README.md shows:\n{different}")
            return 1
    print("\nWhat has happened there, and why, is told in learn/README.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
