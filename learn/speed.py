# SPDX-License-Identifier: MIT
"""How fast are the disks of some steps? Read the first MiB of each over and over, 16 requests at a time.

    python3 learn/speed.py STEP...

A step that has an image is given disk.img.
"""
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

STEP = str(Path(__file__).parent / "step")
SECONDS = 1.0


def measure():
    """Read the disk for a while; return how many MiB a second the fastest read had."""
    disk = os.open("/dev/ublkb42", os.O_RDONLY | os.O_DIRECT)   # not from the page cache
    memory = mmap.mmap(-1, 1 << 20)     # of whole pages, as O_DIRECT wants
    fastest = SECONDS
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:       # the fastest: others may use the machine, too
        start = time.monotonic()
        os.preadv(disk, [memory], 0)
        fastest = min(fastest, time.monotonic() - start)
    os.close(disk)
    return 1 / fastest


def run(step):
    """Start a step's disk, and return how fast it is."""
    program = [sys.executable, "-u", f"{STEP}{step}.py", "disk.img"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        assert "/dev/ublkb42\n" in server.stdout, f"step {step} has no disk"
        speed = measure()
        subprocess.run([sys.executable, f"{STEP}2.py"], stdout=subprocess.DEVNULL, check=True)
    return speed


def main(first, *others):
    slow = run(first)
    print(f"step {first}: {slow:.0f} MiB/s")
    for step in others:
        fast = run(step)
        print(f"step {step}: {fast:.0f} MiB/s, {fast / slow:.1f} times that")


main(*sys.argv[1:])
