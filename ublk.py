#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A Linux block device in one file of pure Python.

    import subprocess, ublk

    class Ram(ublk.Target):
        def __init__(self, size):
            self.size = size
            self.data = bytearray(size)
        def read(self, offset, buffer):            # buffer: a writable memoryview to fill
            buffer[:] = self.data[offset:offset + len(buffer)]
        def write(self, offset, buffer):           # buffer: a read-only memoryview
            self.data[offset:offset + len(buffer)] = buffer

    with ublk.Device(Ram(64 << 20)) as disk:       # /dev/ublkb0 on entry, gone on exit
        subprocess.run(["mkfs.ext4", disk.path], check=True)

or, from the shell: ``python ublk.py null --size 1G``.

What ublk is
------------
The kernel driver ``ublk_drv`` turns a process into a disk. The other ways
that Linux has go through a network protocol (nbd) or a file system (FUSE, with a
loop device on top); ublk was made for io_uring, and for disks: no sockets, no copies
but the necessary one, and half a system call a request. There are three kinds
of device node:

    /dev/ublk-control   the *control plane*: create, start, stop and delete devices
    /dev/ublkcN         the *data plane* of device N: the server (this program) talks to it
    /dev/ublkbN         the disk itself: file systems, ``dd`` and databases talk to it

    client                kernel                           server (this program)
    ------                ------                           ---------------------
    read(2), mount  --->  /dev/ublkbN
                          block layer: a request, a tag
                          ublk_drv: its descriptor  --->   CQE "tag 7 has a request"
                                                           target.read(offset, buffer)
                          ublk_drv: copies          <---   SQE "tag 7: 4096 bytes"
    data            <---

Both planes are spoken over io_uring, with its command ``IORING_OP_URING_CMD``.
A life in brief:

    ADD_DEV  ->  open /dev/ublkcN  ->  SET_PARAMS  ->  mmap, FETCH every tag  ->  START_DEV
    ... requests ...
    STOP_DEV (every tag ends with ENODEV)  ->  close /dev/ublkcN  ->  DEL_DEV

A device has *queues*; a queue has *tags*, one for each request it can carry at
a time. The server parks one command per tag in the kernel. When a client reads
or writes, the parked command of a free tag completes: that is the news "tag 7
has a request". What is wanted stands in a descriptor, in memory the driver
shares through mmap. The server does the work and sends the next command for the
tag, COMMIT_AND_FETCH_REQ: it hands in the result *and* parks the tag again, so
that each request costs half a system call or less.

Words used throughout
---------------------
    tag      the number of a request slot in its queue, 0 to depth - 1
    SQE      submission queue entry: 64 bytes in which io_uring is asked for an operation
    CQE      completion queue entry: 16 bytes in which io_uring answers
    sector   512 bytes, the kernel's unit; everything a target sees is in bytes
    park     to leave a command with the driver until there is news for it
    target   the Python object behind the disk
    server   the process that serves a device; each queue has a thread of its own
    client   whoever uses the disk: a file system, a database, dd

How to read this file
---------------------
From top to bottom, like a book: each chapter opens with an essay, and whoever
reads only the essays knows ublk. Kernel ABI, io_uring, control plane; then one
disk, the plain way, whole; then what adds to it: the other data paths, asyncio,
servers that die, ordinary users and containers; and the command line. Kernel
things have the kernel's names, so that they can be looked up in its source.

It needs Linux 6.1 or later and nothing but the standard library. Sources: the
kernel's Documentation/block/ublk.rst, include/uapi/linux/ublk_cmd.h and
io_uring.h.
"""

from __future__ import annotations

import argparse
import atexit
import collections.abc
import contextlib
import contextvars
import ctypes
import dataclasses
import enum
import errno
import fcntl
import fractions
import glob
import importlib
import inspect
import json
import mmap
import os
import re
import secrets
import select
import selectors
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import types
import typing
import weakref
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

__version__ = "1.0"

SECTOR = 512
PAGE_SIZE = mmap.PAGESIZE


# =================================================================================================
# Errors
# =================================================================================================
#
# Whoever reads an error wants to know three things: what failed, why, and what
# to do about it. UblkError carries all three and prints them in one line,
# whatever the error passes through on its way. It is an OSError, so that
# `error.errno` and `except OSError` mean what they mean everywhere else in
# Python. Nothing in this file prints and goes on where somebody asked for
# something: what cannot be had is raised, to be caught by who knows better.


# errno 95 has two names; block devices know it by this one
ERRNO_NAMES = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}


class UblkError(OSError):
    """An OSError that says what failed, why, and what to do about it, in one line.

    ``str(error)`` reads ``what failed: reason (ERRNO NAME): what to do``.

    number: the errno.
    what: what failed; reason: why, by default what the errno means; remedy:
        what to do, or nothing.
    """

    def __init__(self, number: int, what: str, reason: str = "", remedy: str = "") -> None:
        super().__init__(number, what)
        self.what = what
        self.reason = reason or os.strerror(number).lower()
        self.remedy = remedy

    def __str__(self) -> str:
        name = ERRNO_NAMES.get(self.errno or 0, "ERROR")
        text = f"{self.what}: {self.reason} ({self.errno} {name})"
        if self.remedy:
            text += f": {self.remedy}"
        return " ".join(text.splitlines())


def say(text: str) -> None:
    """Tell whoever watches standard error; that nobody does must hurt neither request nor disk."""
    try:
        sys.stderr.write(f"ublk: {text}\n")
        sys.stderr.flush()
    except Exception:  # a program may have closed it, have none, or put anything there
        pass


# =================================================================================================
# Kernel ABI: include/uapi/linux/ublk_cmd.h of Linux 7.3
# =================================================================================================
#
# What follows is the kernel's header in Python: what a program and the driver
# have agreed upon. There are three kinds of things in it. *Features* are the
# bits of a mask with which a device is asked for; each kernel knows some of
# them. *Commands* are numbers, one set for the control node and one for the
# device's own. *Structures* are the layouts of what is passed along.
#
# The names are the kernel's own, so that they can be looked up in its source
# and found again in what others write. What the header does not say stands
# beside them: since which release a kernel knows a thing, what it means in a
# few words, and which features need or exclude each other. `ublk.py features`
# prints this table, the errors about what a kernel lacks are made from it, and
# a test compares every number with the header.
#
# Compatibility goes both ways. A newer kernel has features that this file has
# no name for: they are shown as BIT_21, and never asked for. An older one drops
# the bits it does not know *without an error*: ADD_DEV answers with the flags
# that were granted, and only who compares them with what was wanted learns that
# recovery, say, is not to be had. The same is true of parameters: each kernel
# takes the kinds it knows and forgets the others, so they are read back.
#
# The numbers of commands come in two forms. Up to Linux 6.3 they were bare
# (0x04); since 6.4 they are encoded the way ioctl numbers are: a direction, the
# size of the argument, the letter 'u' and the number. Newer kernels can be
# built without the old form, the oldest do not know the new one, so a server
# has to find out which of them it talks to.
#
# A request's descriptor has 24 bytes: in its first word the operation (low byte)
# and flags, then the number of sectors, the first sector, and an address. The
# command that answers it has 16: queue, tag, result, address. That is all the
# data plane ever says. Parameters grew over the years by appending, each kind
# with a bit in `types`; a structure that is longer than a kernel knows is taken
# all the same, its end ignored.
#
# All of it is in the machine's own byte order and has the same layout on every
# 64-bit architecture, so the structures are written as lines of C types and made
# into ctypes when the file is loaded.


class Feature(int):
    """A feature flag of a device, or a kind of its parameters: the number is its mask.

    since: the first kernel that has it.
    meaning: in a few words, as `ublk.py features` shows it.
    needs: flags of which at least one must come with it.
    excludes: flags that must not.
    """

    name = ""

    def __new__(cls, bit: int, *_: object, **__: object) -> Feature:
        return super().__new__(cls, 1 << bit)

    def __init__(
        self,
        bit: int,
        since: str,
        meaning: str = "",
        needs: int = 0,
        excludes: int = 0,
    ) -> None:
        self.bit = bit
        self.since = since
        self.meaning = meaning
        self.needs = needs
        self.excludes = excludes


class Command(int):
    """A control command: the number is its legacy opcode.

    since: the first kernel that has it.
    changes: whether it needs write permission, and so which way its argument
        goes.

    encoded is what kernels since 6.4 call it: direction, size 32, type 'u',
    number, put together as for an ioctl.
    """

    name = ""

    def __new__(cls, number: int, *_: object, **__: object) -> Command:
        return super().__new__(cls, number)

    def __init__(self, number: int, since: str, changes: bool) -> None:
        self.since = since
        # as for an ioctl: direction, size 32, type 'u', number
        self.encoded = (0xC0207500 if changes else 0x80207500) | number


def names_of(prefix: str) -> dict[Any, str]:
    """Return each constant whose name starts so, with the rest of its name: ZONED of UBLK_F_ZONED."""
    constants = globals().items()
    return {value: name[len(prefix) :] for name, value in constants if name.startswith(prefix)}


def table_of(prefix: str) -> Any:
    """Return the constants whose names start so, in their order; the rest is the name of each."""
    table = names_of(prefix)
    for row, name in table.items():
        row.name = name
    return tuple(table)


UBLK_F_SUPPORT_ZERO_COPY = Feature(
    0, "6.15", "request pages can be registered as fixed buffers of a ring"
)
UBLK_F_URING_CMD_COMP_IN_TASK = Feature(
    1,
    "6.0",
    "completions run in the server's task; the driver sets it",
)
UBLK_F_NEED_GET_DATA = Feature(
    2,
    "6.0",
    "the server names the buffer of a write after the write arrived",
    excludes=UBLK_F_SUPPORT_ZERO_COPY,
)
UBLK_F_USER_RECOVERY = Feature(3, "6.1", "the disk outlives its server and waits for a new one")
UBLK_F_USER_RECOVERY_REISSUE = Feature(
    4,
    "6.1",
    "requests the dead server held are sent to the new one",
    needs=UBLK_F_USER_RECOVERY,
)
UBLK_F_UNPRIVILEGED_DEV = Feature(
    5,
    "6.3",
    "created, owned and served by an ordinary user",
    excludes=UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_USER_RECOVERY,
)
UBLK_F_CMD_IOCTL_ENCODE = Feature(
    6,
    "6.4",
    "commands are encoded like ioctls; the driver sets it",
    # Not asked for: whether GET_FEATURES is answered tells enough, before there is a device
)
UBLK_F_USER_COPY = Feature(
    7,
    "6.5",
    "the server moves data with pread and pwrite on /dev/ublkcN",
    excludes=UBLK_F_UNPRIVILEGED_DEV | UBLK_F_NEED_GET_DATA,
)
UBLK_F_ZONED = Feature(
    8, "6.6", "a zoned disk", needs=UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY
)
UBLK_F_USER_RECOVERY_FAIL_IO = Feature(
    9,
    "6.13",
    "without a server the disk fails requests, not queues them",
    needs=UBLK_F_USER_RECOVERY,
    excludes=UBLK_F_USER_RECOVERY_REISSUE,
)
UBLK_F_UPDATE_SIZE = Feature(10, "6.16", "the size of a live disk can change")
UBLK_F_AUTO_BUF_REG = Feature(
    11,
    "6.16",
    "the driver registers request pages with the ring by itself",
    excludes=UBLK_F_UNPRIVILEGED_DEV | UBLK_F_NEED_GET_DATA,
)
UBLK_F_QUIESCE = Feature(
    12, "6.16", "a healthy server can be detached without an error", needs=UBLK_F_USER_RECOVERY
)
UBLK_F_PER_IO_DAEMON = Feature(
    13,
    "6.16",
    "each tag may have a task of its own; the driver sets it",
    # Not asked for: a queue has one thread for all its tags
)
UBLK_F_BUF_REG_OFF_DAEMON = Feature(
    14,
    "6.17",
    "any task may register request pages; the driver sets it",
    # Not asked for: the thread that fetches a request also serves it
)
UBLK_F_BATCH_IO = Feature(
    15,
    "7.0",
    "one command fetches or commits many requests",
    excludes=UBLK_F_NEED_GET_DATA | UBLK_F_PER_IO_DAEMON,
)
UBLK_F_INTEGRITY = Feature(
    16, "7.0", "requests carry protection information", needs=UBLK_F_USER_COPY
)
UBLK_F_SAFE_STOP_DEV = Feature(
    17, "7.0", "a disk can be stopped only if unused; the driver sets it"
)
UBLK_F_NO_AUTO_PART_SCAN = Feature(18, "7.0", "no partition scan when the disk starts")
UBLK_F_SHMEM_ZC = Feature(
    19, "7.1", "clients' direct I/O from memory shared with the server is not copied"
)
UBLK_F_IO_DESC_SIZE = Feature(
    20,
    "7.3",
    "request descriptors may be larger than 24 bytes",
    # Not asked for: nothing lies behind these 24 yet; a device that has it is served all the same
)

UBLK_CMD_GET_QUEUE_AFFINITY = Command(0x01, "6.0", changes=False)
UBLK_CMD_GET_DEV_INFO = Command(0x02, "6.0", changes=False)
UBLK_CMD_ADD_DEV = Command(0x04, "6.0", changes=True)
UBLK_CMD_DEL_DEV = Command(0x05, "6.0", changes=True)
UBLK_CMD_START_DEV = Command(0x06, "6.0", changes=True)
UBLK_CMD_STOP_DEV = Command(0x07, "6.0", changes=True)
UBLK_CMD_SET_PARAMS = Command(0x08, "6.0", changes=True)
UBLK_CMD_GET_PARAMS = Command(0x09, "6.0", changes=False)
UBLK_CMD_START_USER_RECOVERY = Command(0x10, "6.1", changes=True)
UBLK_CMD_END_USER_RECOVERY = Command(0x11, "6.1", changes=True)
UBLK_CMD_GET_DEV_INFO2 = Command(0x12, "6.3", changes=False)
UBLK_CMD_GET_FEATURES = Command(0x13, "6.5", changes=False)
UBLK_CMD_DEL_DEV_ASYNC = Command(0x14, "6.9", changes=False)
UBLK_CMD_UPDATE_SIZE = Command(0x15, "6.16", changes=True)
UBLK_CMD_QUIESCE_DEV = Command(0x16, "6.16", changes=True)
UBLK_CMD_TRY_STOP_DEV = Command(0x17, "7.0", changes=True)
UBLK_CMD_REG_BUF = Command(0x18, "7.1", changes=True)
UBLK_CMD_UNREG_BUF = Command(0x19, "7.1", changes=True)

FEATURES: Sequence[Feature] = table_of("UBLK_F_")
COMMANDS: Sequence[Command] = table_of("UBLK_CMD_")


def flag_names(flags: int) -> list[str]:
    """Return the names of the feature bits set in flags; unknown bits as ``BIT_n``."""
    names = {feature.bit: feature.name for feature in FEATURES}
    return [names.get(bit, f"BIT_{bit}") for bit in range(64) if flags >> bit & 1]


def kernel_release() -> str:
    """Return the running kernel's version, such as ``6.12``."""
    return ".".join(re.findall(r"\d+", os.uname().release)[:2])


# Kernels on which a plain create ends badly: their releases, what happens, and
# what mends it.
DANGEROUS_KERNELS = (
    # 529d4d632788 (allocate by NUMA node) without 011af85ccd87 (set tags up
    # first): github.com zabbly/linux issue 52, kvcache-ai/AgentENV issue 20;
    # ublk-org/ublksrv issue 174; Launchpad bug 2154635.
    (
        r"6\.18\.[45](?!\d).*",
        "the driver crashes when a device is added",
        "use Linux 6.18.6 or later",
    ),
    (
        r"6\.17\.0-101[58]-azure.*",
        "the driver crashes when a device is added",
        "use a later one of Ubuntu's",
    ),
)


def danger() -> tuple[str, str]:
    """Return what a new disk does to this kernel, and what mends that.

    Both are empty where nothing bad is known. `check` shows them, and a create
    refuses to go on without --force.
    """
    for pattern, happens, remedy in DANGEROUS_KERNELS:
        if re.fullmatch(pattern, os.uname().release):
            return happens, remedy
    return "", ""


def newer_kernel(what: str, since: str) -> UblkError:
    """Return the error for what this kernel lacks, where since is the first that has it."""
    release = kernel_release()
    here = [int(part) for part in release.split(".")]
    first = [int(part) for part in since.split(".")]
    reason = f"this Linux {release} is built without it"
    if here < first:
        reason = f"needs Linux {since}, this is {release}"
    return UblkError(errno.EOPNOTSUPP, what, reason, "do without it, or use another kernel")


def explanations(table: str) -> dict[tuple[Command | None, int], tuple[str, str]]:
    """Read lines of ``command errno reason -> remedy`` into a table.

    Its keys are (command, errno), with None for any command; its values
    (reason, remedy). A line that ends in a backslash goes on.
    """
    commands = {command.name: command for command in COMMANDS}
    found = {}
    for line in table.strip().splitlines():
        name, number, *words = line.split()
        reason, _, remedy = " ".join(words).partition(" -> ")
        found[commands.get(name), getattr(errno, number)] = reason, remedy
    return found


# Why a command fails, and what to do
EXPLANATIONS = explanations("""
    any ENODEV there is no such device -> see `ublk.py list`
    any EPERM it belongs to the system, and this process lacks CAP_SYS_ADMIN -> run as root
    any EACCES its device node is not yours to use -> ask its owner, or run as root
    any ENOENT its device node is not visible here -> see whether /dev holds the node of this device
    any EINTR the command was cancelled -> try again
    any ETIMEDOUT it did not end in time -> see whether its server, or who has it open, hangs
    ADD_DEV EEXIST the id is taken -> choose another, or `ublk.py del` that device first
    ADD_DEV EPERM this process lacks CAP_SYS_ADMIN -> run as root, or ask for an unprivileged device (-p)
    ADD_DEV EACCES too many unprivileged devices \
        -> delete some, or raise /sys/module/ublk_drv/parameters/ublks_max
    ADD_DEV EINVAL the kernel refuses this number of queues, this depth or this combination of flags \
        -> see `ublk.py features`
    SET_PARAMS EACCES the device has been started -> delete it and add it
    SET_PARAMS EINVAL the kernel refuses these parameters \
        -> see the block size, --max-io and discard limits
    START_DEV EEXIST it is running already -> see `ublk.py list`
    START_DEV EBUSY it was stopped and not yet closed -> delete it and add it again
    START_DEV EINVAL no parameters were set, no disk can have them, or another process opened it \
        -> delete it and add it again
    START_USER_RECOVERY EBUSY its server still lives -> end that server first, or see `ublk.py quiesce`
    START_USER_RECOVERY EINVAL it was not made to be recovered, never started, or another has begun \
        -> create it with -r, or see `ublk.py list`
    END_USER_RECOVERY EBUSY it is not waiting for a server -> see `ublk.py list`
    END_USER_RECOVERY EINVAL it was not made to be recovered, or the server is not the process that \
        opened it -> create it with -r
    UPDATE_SIZE ENODEV there is no such device, or it is not running -> see `ublk.py list`
    TRY_STOP_DEV ENODEV there is no such device, or it is not running -> see `ublk.py list`
    QUIESCE_DEV ENODEV there is no such device, or it is not running -> see `ublk.py list`
    TRY_STOP_DEV EBUSY somebody has it open -> close it first
    QUIESCE_DEV EBUSY every tag of a queue was busy for the whole time \
        -> its I/O waits until you try again with a longer --timeout, or end its server
    QUIESCE_DEV EOPNOTSUPP it was not made with the flag QUIESCE \
        -> create it with -r and without -b on Linux 6.16 or later
    REG_BUF EEXIST a page of this memory is registered already -> unregister it first
    REG_BUF EOPNOTSUPP it was not made with the flag SHMEM_ZC \
        -> create it with shared memory on Linux 7.1 or later
    UNREG_BUF ENOENT no memory is registered under this index
""")


def explain(command: Command, number: int, what: str) -> UblkError:
    """Turn the errno of a control command into an error that says why and what to do.

    command: the one that failed.
    number: its errno, positive.
    what: what failed, in the words of whoever asked.
    """
    found = EXPLANATIONS.get((command, number)) or EXPLANATIONS.get((None, number))
    if found is None and number == errno.EOPNOTSUPP:
        return newer_kernel(what, command.since)
    return UblkError(number, what, *(found or ()))


# Device states (ublksrv_ctrl_dev_info.state)
UBLK_S_DEV_DEAD = 0
UBLK_S_DEV_LIVE = 1
UBLK_S_DEV_QUIESCED = 2
UBLK_S_DEV_FAIL_IO = 3
STATES = names_of("UBLK_S_DEV_")

# Commands of the data plane, encoded; their low byte is the legacy opcode.
UBLK_U_IO_FETCH_REQ = 0xC0107520
UBLK_U_IO_COMMIT_AND_FETCH_REQ = 0xC0107521
UBLK_U_IO_NEED_GET_DATA = 0xC0107522
UBLK_U_IO_REGISTER_IO_BUF = 0xC0107523
UBLK_U_IO_UNREGISTER_IO_BUF = 0xC0107524
UBLK_U_IO_PREP_IO_CMDS = 0xC0107525
UBLK_U_IO_COMMIT_IO_CMDS = 0xC0107526
UBLK_U_IO_FETCH_IO_CMDS = 0xC0107527
NO_COMMAND = 0xFF00  # which is EOPNOTSUPP (6.5)
UBLK_IO_RES_OK = 0
UBLK_IO_RES_NEED_GET_DATA = 1
UBLK_IO_RES_ABORT = -errno.ENODEV

# Operations of a request: the low byte of ublksrv_io_desc.op_flags.
UBLK_IO_OP_READ = 0
UBLK_IO_OP_WRITE = 1
UBLK_IO_OP_FLUSH = 2
UBLK_IO_OP_DISCARD = 3
UBLK_IO_OP_WRITE_SAME = 4
UBLK_IO_OP_WRITE_ZEROES = 5
UBLK_IO_OP_REPORT_ZONES = 18
UBLK_IO_OP_ZONE_OPEN = 10
UBLK_IO_OP_ZONE_CLOSE = 11
UBLK_IO_OP_ZONE_FINISH = 12
UBLK_IO_OP_ZONE_APPEND = 13
UBLK_IO_OP_ZONE_RESET_ALL = 14
UBLK_IO_OP_ZONE_RESET = 15

# Flags of a request: bits of the same word.
UBLK_IO_F_FAILFAST_DEV = 1 << 8
UBLK_IO_F_FAILFAST_TRANSPORT = 1 << 9
UBLK_IO_F_FAILFAST_DRIVER = 1 << 10
UBLK_IO_F_META = 1 << 11
UBLK_IO_F_FUA = 1 << 13
UBLK_IO_F_NOUNMAP = 1 << 15
UBLK_IO_F_SWAP = 1 << 16
UBLK_IO_F_NEED_REG_BUF = 1 << 17
UBLK_IO_F_INTEGRITY = 1 << 18
UBLK_IO_F_SHMEM_ZC = 1 << 19

# Limits and address spaces of /dev/ublkcN.
UBLK_MAX_QUEUE_DEPTH = 4096
UBLK_MAX_NR_QUEUES = 4096
UBLKSRV_IO_BUF_OFFSET = 1 << 31
UBLKSRV_IO_INTEGRITY_FLAG = 1 << 62
UBLK_IO_BUF_BITS = 25
UBLK_TAG_BITS = 16
UBLK_TAG_OFF = UBLK_IO_BUF_BITS
UBLK_QID_OFF = UBLK_IO_BUF_BITS + UBLK_TAG_BITS
UBLK_BATCH_F_HAS_ZONE_LBA = 1
UBLK_BATCH_F_HAS_BUF_ADDR = 2
UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK = 4
UBLK_AUTO_BUF_REG_FALLBACK = 1
UBLK_SHMEM_BUF_READ_ONLY = 1
UBLK_ATTR_READ_ONLY = 1
UBLK_ATTR_ROTATIONAL = 2
UBLK_ATTR_VOLATILE_CACHE = 4
UBLK_ATTR_FUA = 8

C_TYPES: dict[str, Any] = {
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "s32": ctypes.c_int32,
    "s64": ctypes.c_int64,
}


def structure(name: str, members: str) -> Any:
    """Make a ctypes.Structure of a line such as ``u32 len flags, u8 pad[4]``.

    Each group is a C type and its members; the types are those of C_TYPES, in
    which the new one is put, too, for others to contain.
    """
    fields = []
    for group in members.split(","):
        kind, *declared = group.split()
        for member in declared:
            field, _, count = member.rstrip("]").partition("[")
            of = C_TYPES[kind]
            fields.append((field, of * int(count) if count else of))
    C_TYPES[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return C_TYPES[name]


ublksrv_ctrl_cmd = structure(
    "ublksrv_ctrl_cmd",
    "u32 dev_id, u16 queue_id len, u64 addr data[1], u16 dev_path_len pad, u32 reserved",
)
ublksrv_ctrl_dev_info = structure(
    "ublksrv_ctrl_dev_info",
    "u16 nr_hw_queues queue_depth state io_desc_size, u32 max_io_buf_bytes "
    "dev_id, s32 ublksrv_pid, u32 pad1, u64 flags ublksrv_flags, u32 owner_uid owner_gid, "
    "u64 reserved1 reserved2",
)
ublksrv_io_desc = structure("ublksrv_io_desc", "u32 op_flags nr_sectors, u64 start_sector addr")
ublksrv_io_cmd = structure("ublksrv_io_cmd", "u16 q_id tag, s32 result, u64 addr")
ublk_elem_header = structure("ublk_elem_header", "u16 tag buf_index, s32 result")
ublk_batch_io = structure(
    "ublk_batch_io", "u16 q_id flags nr_elem, u8 elem_bytes reserved, u64 reserved2"
)
ublk_auto_buf_reg = structure(
    "ublk_auto_buf_reg", "u16 index, u8 flags reserved0, u32 reserved1"
)
ublk_shmem_buf_reg = structure("ublk_shmem_buf_reg", "u64 addr len, u32 flags reserved")
blk_zone = structure(
    "blk_zone",
    "u64 start len wp, u8 type cond non_seq reset resv[4], u64 capacity, u8 reserved[24]",
)
ublk_param_basic = structure(
    "ublk_param_basic",
    "u32 attrs, u8 logical_bs_shift physical_bs_shift io_opt_shift io_min_shift, "
    "u32 max_sectors chunk_sectors, u64 dev_sectors virt_boundary_mask",
)
ublk_param_discard = structure(
    "ublk_param_discard",
    "u32 discard_alignment discard_granularity max_discard_sectors "
    "max_write_zeroes_sectors, u16 max_discard_segments reserved0",
)
ublk_param_devt = structure(
    "ublk_param_devt", "u32 char_major char_minor disk_major disk_minor"
)
ublk_param_zoned = structure(
    "ublk_param_zoned",
    "u32 max_open_zones max_active_zones max_zone_append_sectors, u8 reserved[20]",
)
ublk_param_dma_align = structure("ublk_param_dma_align", "u32 alignment, u8 pad[4]")
ublk_param_segment = structure(
    "ublk_param_segment",
    "u64 seg_boundary_mask, u32 max_segment_size, u16 max_segments, u8 pad[2]",
)
ublk_param_integrity = structure(
    "ublk_param_integrity",
    "u32 flags, u16 max_integrity_segments, "
    "u8 interval_exp metadata_size pi_offset csum_type tag_size pad[5]",
)
ublk_params = structure(
    "ublk_params",
    "u32 len types, ublk_param_basic basic, ublk_param_discard discard, "
    "ublk_param_devt devt, ublk_param_zoned zoned, ublk_param_dma_align dma, ublk_param_segment seg, "
    "ublk_param_integrity integrity",
)
# Kinds of parameters (ublk_params.types); what a kernel does not know it drops silently.
UBLK_PARAM_TYPE_BASIC = Feature(0, "6.0")
UBLK_PARAM_TYPE_DISCARD = Feature(1, "6.0")
UBLK_PARAM_TYPE_DEVT = Feature(2, "6.3")
UBLK_PARAM_TYPE_ZONED = Feature(3, "6.6")
UBLK_PARAM_TYPE_DMA_ALIGN = Feature(4, "6.15")
UBLK_PARAM_TYPE_SEGMENT = Feature(5, "6.15")
UBLK_PARAM_TYPE_INTEGRITY = Feature(6, "7.0")
PARAM_TYPES: Sequence[Feature] = table_of("UBLK_PARAM_TYPE_")
# linux/fs.h: what the metadata of blocks is good for, and which checksum is in
# it
LBMD_PI_CAP_INTEGRITY = 1
LBMD_PI_CAP_REFTAG = 2
LBMD_PI_CSUM_NONE = 0
LBMD_PI_CSUM_IP = 1
LBMD_PI_CSUM_CRC16_T10DIF = 2
LBMD_PI_CSUM_CRC64_NVME = 4


# =================================================================================================
# io_uring: include/uapi/linux/io_uring.h, and rings by raw system call
# =================================================================================================
#
# io_uring is a way of asking the kernel for things without a system call for
# each of them. Program and kernel share two rings in memory. Into the
# *submission queue* the program writes what it wants, entries of 64 bytes
# (SQEs): an operation, a descriptor, an offset, an address, a length, and 64
# bits of its own, `user_data`. In the *completion queue* it finds what became
# of it, entries of 16 bytes (CQEs): the `user_data` again, and a result, which
# is what the system call would have returned, or a negative errno. Completions
# come in any order.
#
# Each ring has a head and a tail. Who puts something in moves the tail, who
# takes it out moves the head; neither ever writes the other's word. So the
# numbers in shared memory are the truth about what has been taken, and this
# file keeps no count of its own beside them: a signal's handler may raise an
# exception between any two lines of Python, and a count that is written down
# after the system call would then be wrong for good.
#
# There is one system call, io_uring_enter(). It hands in what stands in the
# submission queue and, if asked to, waits until so many completions are there.
# That both happen at once is what makes ublk fast: a server hands in the
# results of the last requests and gets the next ones in one call. Traps that
# this class is made for:
#
#   - The call may take fewer entries than were offered. Those left stay in the
#     queue for the next call.
#   - If it took any, an error of the wait is hidden; whoever waited looks
#     whether something has come.
#   - The kernel has done with an SQE once the call has returned it as taken.
#     What an SQE *points to* is another matter: that memory is the kernel's
#     until the CQE has come, whatever happens to the program's interest in it.
#   - SQEs can be linked (IOSQE_IO_LINK): each begins when the one before has
#     ended well, and "well" means with its whole length, so a short read breaks
#     the chain. A chain is cut where a submission ends.
#   - With DEFER_TASKRUN, completions are only written while the ring's own
#     thread is in io_uring_enter(). That is quick, and it means that no barrier
#     between processors is needed, which Python would not have. It also means
#     that the one thread that made a ring must use it: the kernel refuses
#     others.
#
# There is no wrapper in the standard library, so this is done by hand: three
# system calls through ctypes, the two rings through mmap, and memoryviews cast
# to words in place of C's pointers to volatile. An SQE is stored as one record,
# by struct; what repeats has a slot of its own, in which only the words that
# change are written anew.

# These three have the same numbers on every architecture that Python runs on
# but alpha and MIPS.
SYS_io_uring_setup = 425
SYS_io_uring_enter = 426
SYS_io_uring_register = 427

IORING_SETUP_CLAMP = 1 << 4
IORING_SETUP_SUBMIT_ALL = 1 << 7
IORING_SETUP_COOP_TASKRUN = 1 << 8
IORING_SETUP_SQE128 = 1 << 10
IORING_SETUP_SINGLE_ISSUER = 1 << 12
IORING_SETUP_DEFER_TASKRUN = 1 << 13
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000
IORING_ENTER_GETEVENTS = 1
IORING_ENTER_EXT_ARG = 8
IORING_REGISTER_BUFFERS2 = 15
IORING_REGISTER_RING_FDS = 20
IORING_REGISTER_PBUF_RING = 22
IORING_UNREGISTER_PBUF_RING = 23
IORING_REGISTER_PBUF_STATUS = 26
IORING_CQE_F_BUFFER = 1
IORING_CQE_F_MORE = 2
IORING_CQE_BUFFER_SHIFT = 16

IORING_OP_NOP = 0
IORING_OP_FSYNC = 3
IORING_OP_READ_FIXED = 4
IORING_OP_POLL_ADD = 6
IORING_OP_TIMEOUT = 11
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_FALLOCATE = 17
IORING_OP_READ = 22
IORING_OP_WRITE = 23
IORING_OP_SEND = 26
IORING_OP_RECV = 27
IORING_OP_URING_CMD = 46
IORING_FSYNC_DATASYNC = 1
IORING_URING_CMD_MULTISHOT = 2
IORING_RSRC_REGISTER_SPARSE = 1
IOSQE_IO_LINK = 1 << 2
IOSQE_BUFFER_SELECT = 1 << 5
IOSQE_CQE_SKIP_SUCCESS = 1 << 6

io_sqring_offsets = structure(
    "io_sqring_offsets",
    "u32 head tail ring_mask ring_entries flags dropped array resv1, u64 user_addr",
)
io_cqring_offsets = structure(
    "io_cqring_offsets",
    "u32 head tail ring_mask ring_entries overflow cqes flags resv1, u64 user_addr",
)
io_uring_params = structure(
    "io_uring_params",
    "u32 sq_entries cq_entries flags sq_thread_cpu sq_thread_idle features wq_fd "
    "resv[3], io_sqring_offsets sq_off, io_cqring_offsets cq_off",
)
# Unions are named by the member used here: off may be cmd_op, rw_flags any
# other flags.
io_uring_sqe = structure(
    "io_uring_sqe",
    "u8 opcode flags, u16 ioprio, s32 fd, u64 off addr, u32 len rw_flags, u64 user_data, "
    "u16 buf_index personality, s32 file_index, u8 cmd[16]",
)
io_uring_cqe = structure("io_uring_cqe", "u64 user_data, s32 res, u32 flags")
io_uring_getevents_arg = structure(
    "io_uring_getevents_arg", "u64 sigmask, u32 sigmask_sz min_wait_usec, u64 ts"
)
io_uring_rsrc_register = structure(
    "io_uring_rsrc_register", "u32 nr flags, u64 resv2 data tags"
)
io_uring_rsrc_update = structure("io_uring_rsrc_update", "u32 offset resv, u64 data")
io_uring_buf_reg = structure(
    "io_uring_buf_reg", "u64 ring_addr, u32 ring_entries, u16 bgid flags, u64 resv[3]"
)
io_uring_buf_status = structure("io_uring_buf_status", "u32 buf_group head resv[8]")
timespec = structure("timespec", "s64 tv_sec tv_nsec")

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: it drops the GIL while waiting
_syscall = _libc.syscall  # without argtypes: ready-made c_long are passed on in half the time
_syscall.restype = ctypes.c_long


def syscall(number: int, *args: int) -> int:
    """Make a system call with six arguments at most; raise OSError where it fails.

    For what is called now and then. The one call that runs for every batch of
    requests has its arguments made ready, see Ring.
    """
    result: int = _syscall(*map(ctypes.c_long, (number, *args)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer.argtypes = [ctypes.c_void_p]
# CPython's Py_buffer begins with the address and is no larger
_Py_buffer = ctypes.c_void_p * 11


def address_of(buffer: Any) -> int:
    """Return the memory address of a bytes-like object, which the caller must keep alive.

    ctypes itself would do so for writable buffers only.
    """
    view = _Py_buffer()
    _get_buffer(buffer, view, 0)
    address = view[0] or 0
    _release_buffer(view)
    return address


class Descriptor(int):
    """A descriptor that is closed once nobody refers to it any more.

    So its number is not another file's while somebody still may use it.
    """

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self)


LOOKS = 20  # some ten microseconds

# io_uring_sqe up to file_index, as one record
SQE = struct.Struct("=BBHiQQIIQHHi")


class Ring:
    """An io_uring: a queue of requests to the kernel and a queue of its answers.

    entries: the number of SQEs, rounded up by the kernel to a power of two
        (32768 at most).
    for_control: for control commands. It has SQEs of 128 bytes, which they
        need, and several threads may use it, one at a time. Of any other only
        the thread that created it may, and completions wait until that thread
        enters the kernel, which is the quickest way there is (DEFER_TASKRUN,
        which Linux has since 6.1).

    Unlike most users of io_uring this one fills an SQE slot once and submits it
    again and again: push(slot) only writes its number into the index array
    through which the kernel finds SQEs.

    Raises UblkError: ENOSYS where the kernel has no io_uring, EPERM where it is
    switched off or a container forbids it, ENOMEM where too little memory may
    be locked.
    """

    def __init__(self, entries: int, for_control: bool = False) -> None:
        self.sqe_size = 128 if for_control else 64
        params = self._setup(entries, for_control)
        self.entries = params.sq_entries
        sq = params.sq_off
        cq = params.cq_off
        self.sqes = memoryview(self._sqe_map)
        # Kept, for close() to release it: the frame of a call may outlive that
        ring = self._bytes = memoryview(self._rings)
        self._words = ring[: len(ring) & ~3].cast("I")
        self._sq_head_at = sq.head // 4
        self._sq_tail_at = sq.tail // 4
        self._cq_head_at = cq.head // 4
        self._cq_tail_at = cq.tail // 4
        self._array = self._words[sq.array // 4 : sq.array // 4 + params.sq_entries]
        # Of each io_uring_cqe: user_data, then res and flags in one number
        self._cqes = ring[cq.cqes : cq.cqes + 16 * params.cq_entries].cast("Q")
        self._sq_mask = params.sq_entries - 1
        self._cq_mask = params.cq_entries - 1
        self._tail = 0  # SQEs pushed
        self._was_cut = False
        self._timeout = timespec()
        self._wait_arg = io_uring_getevents_arg()
        self._to_submit = ctypes.c_long()
        self._to_wait_for = ctypes.c_long()
        self._enter = partial(
            _syscall,
            ctypes.c_long(SYS_io_uring_enter),
            ctypes.c_long(self.fd),
            self._to_submit,
            self._to_wait_for,
            ctypes.c_long(IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG),
            ctypes.c_long(ctypes.addressof(self._wait_arg)),
            ctypes.c_long(ctypes.sizeof(self._wait_arg)),
        )

    def _setup(self, entries: int, for_control: bool) -> Any:
        """Create the ring and map it.

        Returns the io_uring_params with the offsets of everything in the rings.
        """
        flags = IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL
        if for_control:
            flags |= IORING_SETUP_SQE128
        else:
            flags |= IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SINGLE_ISSUER
            flags |= IORING_SETUP_DEFER_TASKRUN
        params = io_uring_params(flags=flags)
        try:
            self.fd = syscall(SYS_io_uring_setup, entries, ctypes.addressof(params))
            self._file = open(self.fd, "rb", buffering=0)
            end_of_array = params.sq_off.array + 4 * params.sq_entries
            end_of_cqes = params.cq_off.cqes + 16 * params.cq_entries
            # FEAT_SINGLE_MMAP (5.4): both rings lie in one mapping
            self._rings = mmap.mmap(
                self.fd, max(end_of_array, end_of_cqes), offset=IORING_OFF_SQ_RING
            )
            self._sqe_map = mmap.mmap(
                self.fd, params.sq_entries * self.sqe_size, offset=IORING_OFF_SQES
            )
        except OSError as error:
            remedy = {
                errno.EINVAL: "use Linux 6.1 or later",
                errno.EPERM: "allow it: sysctl kernel.io_uring_disabled=0 (or the container's "
                "seccomp profile)",
                errno.ENOSYS: "use a kernel built with CONFIG_IO_URING",
                errno.ENOMEM: "raise the limit of locked memory (ulimit -l)",
            }
            number = error.errno or errno.EIO
            what = "cannot create an io_uring"
            raise UblkError(number, what, remedy=remedy.get(number, "")) from None
        return params

    def prepare(
        self,
        slot: int,
        opcode: int,
        fd: int = -1,
        off: int = 0,
        addr: int = 0,
        length: int = 0,
        rw_flags: int = 0,
        user_data: int = 0,
        flags: int = 0,
        buf_index: int = 0,
        cmd: bytes = b"",
    ) -> None:
        """Fill SQE slot; the names are the fields of io_uring_sqe.

        off and addr mean what the opcode says; for a driver's command
        (URING_CMD) off is the number of the command and cmd what goes along, 16
        bytes, or 80 in a ring with large SQEs. user_data comes back in the CQE.
        Nothing is submitted yet, and a slot that was pushed must not be filled
        anew before the kernel has taken it.
        """
        at = slot * self.sqe_size
        SQE.pack_into(
            self.sqes,
            at,
            opcode,
            flags,
            0,
            fd,
            off,
            addr,
            length,
            rw_flags,
            user_data,
            buf_index,
            0,
            0,
        )
        self.sqes[at + 48 : at + self.sqe_size] = cmd.ljust(self.sqe_size - 48, b"\0")

    def push(self, slot: int) -> None:
        """Queue SQE slot for the next enter()."""
        self._array[self._tail & self._sq_mask] = slot
        self._tail += 1

    def push_all(self, slots: Sequence[int]) -> None:
        """Queue several SQE slots, in their order, at most `entries` of them."""
        start = self._tail & self._sq_mask
        end = start + len(slots)
        words = array("I", slots)
        if end > self.entries:  # what no longer fits goes to the beginning
            rest = self.entries - start
            self._array[: end - self.entries] = words[rest:]
            del words[rest:]
        self._array[start:end] = words
        self._tail += len(slots)

    def enter(self, min_complete: int = 0, timeout: float | None = None) -> None:
        """Submit what was pushed and wait for CQEs, for timeout seconds at most.

        min_complete: how many CQEs to wait for; 0: none.
        timeout: seconds; None: without end.

        Whether something has come, or the time ran out or a signal came first,
        reap() tells. What the kernel did not take stays pending for the next
        call. Raises OSError for anything the kernel holds against the ring itself,
        and ENOMEM, from then on, where it took only a part of a chain.
        """
        if timeout is None:
            self._wait_arg.ts = 0
        else:
            self._timeout.tv_sec, self._timeout.tv_nsec = divmod(
                int(max(timeout, 0) * 1e9), 10**9
            )
            self._wait_arg.ts = ctypes.addressof(self._timeout)
        self._words[self._sq_tail_at] = self._tail & 0xFFFFFFFF
        # What is pending, without a call: this runs up to LOOKS times for a request
        offered = (self._tail - self._words[self._sq_head_at]) & 0xFFFFFFFF
        self._to_submit.value = offered
        self._to_wait_for.value = min_complete
        if self._was_cut:
            raise OSError(errno.ENOMEM, "the kernel had no memory for the rest of a chain")
        taken = self._enter()
        if taken == offered:
            return
        if taken >= 0:
            self._look_for_cut()
        else:
            number = ctypes.get_errno()
            # Before EBUSY and EAGAIN end, completions must be taken
            if number not in (errno.EINTR, errno.ETIME, errno.EBUSY, errno.EAGAIN):
                raise OSError(number, os.strerror(number))

    def _look_for_cut(self) -> None:
        """End the ring's use where the kernel took only the first part of a chain.

        That happens where it has no memory for more. It begins the part as if
        it were all; the rest would be begun by the next system call, no matter
        how the part ended.
        """
        last = self._array[(self._words[self._sq_head_at] - 1) & self._sq_mask]
        flags = self.sqes[last * self.sqe_size + 1]
        if flags & IOSQE_IO_LINK:
            self._was_cut = True
            self.enter()

    def wait(self, timeout: float | None = None) -> None:
        """Submit what was pushed and wait for a CQE, for timeout seconds at most.

        Looks LOOKS times before it goes to sleep: waking costs far more than
        the next request of a busy client takes to come.
        """
        for _ in range(1 if timeout == 0 else LOOKS):
            self.enter()
            if self._words[self._cq_head_at] != self._words[self._cq_tail_at]:
                return
        if timeout != 0:
            self.enter(1, timeout)

    def reap(self) -> tuple[list[int], list[int]]:
        """Take every CQE there is; return their user_data and their results, in order.

        Two lists, made by slices: nothing in Python is quicker, and this runs
        once for each batch of requests, of which most have the result 0.
        """
        found = self._take()
        results = found[1::2]
        if any(results):
            results = [ctypes.c_int32(result).value for result in results]
        return found[::2], results

    def reap_all(self) -> list[tuple[int, int, int]]:
        """The same as a list of (user_data, result, flags).

        For whom the flags of a CQE matter: what came of a provided buffer, and
        whether a multishot command goes on.
        """
        found = self._take()
        return [
            (data, ctypes.c_int32(result).value, result >> 32)
            for data, result in zip(found[::2], found[1::2])
        ]

    def _take(self) -> list[int]:
        """Take every CQE there is; return two numbers of each."""
        head = self._words[self._cq_head_at]
        tail = self._words[self._cq_tail_at]
        if head == tail:
            return []
        first = 2 * (head & self._cq_mask)
        last = 2 * (tail & self._cq_mask)
        if first < last:
            found = self._cqes[first:last].tolist()
        else:
            found = self._cqes[first:].tolist() + self._cqes[:last].tolist()
        self._words[self._cq_head_at] = tail
        return found

    def register(self, opcode: int, arg: int, count: int) -> None:
        """io_uring_register(2): opcode, the address of its argument, a count. Raises OSError."""
        syscall(SYS_io_uring_register, self.fd, opcode, arg, count)

    def register_sparse_buffers(self, count: int) -> None:
        """Make a table of count empty fixed buffers (5.19), for request pages to be put in.

        Each is filled by the driver, by itself or when told to, and then
        READ_FIXED and WRITE_FIXED may name it by its number. Raises OSError:
        ENOMEM.
        """
        table = io_uring_rsrc_register(nr=count, flags=IORING_RSRC_REGISTER_SPARSE)
        self.register(IORING_REGISTER_BUFFERS2, ctypes.addressof(table), ctypes.sizeof(table))

    def keep_to_the_end(self) -> None:
        """Have the kernel keep the ring after close(), until the thread that made it has ended.

        To be called by that thread (5.18). Raises OSError: ENOMEM.
        """
        update = io_uring_rsrc_update(offset=0xFFFFFFFF, data=self.fd)
        self.register(IORING_REGISTER_RING_FDS, ctypes.addressof(update), 1)

    @property
    def pending(self) -> int:
        """How many SQEs were pushed that the kernel has not taken yet.

        The kernel's own count is asked: one of ours would be wrong once a
        signal handler raises between its system call and our counting.
        """
        return (self._tail - self._words[self._sq_head_at]) & 0xFFFFFFFF

    def close(self) -> None:
        """Give back every view, mapping and descriptor; the kernel cancels what is pending.

        A parked command of ublk's is cancelled by that, too, which is how a
        queue that cannot go on tells the driver so. May be called twice.
        """
        for view in vars(self).values():
            if isinstance(view, memoryview):
                view.release()
        self._rings.close()
        self._sqe_map.close()
        self._file.close()
        self.fd = -1


# =================================================================================================
# Control plane: commands to /dev/ublk-control
# =================================================================================================
#
# A device's life is a handful of commands, sent through the ring as
# IORING_OP_URING_CMD: an operation whose meaning is the driver's own. The
# payload, ublksrv_ctrl_cmd, lies in the SQE itself, which must therefore be of
# the large kind (128 bytes, IORING_SETUP_SQE128); it names the device, and
# where a structure lies that goes along or comes back.
#
#     ADD_DEV     asks for a device, its queues, depth, largest request and features; the answer
#                 says what was granted. Now there is /dev/ublkcN.
#     SET_PARAMS  tells the geometry: size, block size, what can be discarded. Possible until the
#                 disk is there.
#     START_DEV   waits until every tag of every queue is parked (next chapter), then makes the
#                 disk, /dev/ublkbN.
#     STOP_DEV    takes the disk away: waits for the requests that the server still has, ends every
#                 parked command.
#     DEL_DEV     takes /dev/ublkcN away, too, and waits until nobody has either of the nodes open.
#
# Other commands look (GET_DEV_INFO, GET_PARAMS, GET_FEATURES), change a living
# disk (UPDATE_SIZE) or hand it from one server to the next
# (START_USER_RECOVERY, END_USER_RECOVERY, QUIESCE_DEV; see "When servers die").
#
# What to beware of. Commands *wait*: START_DEV for the server, STOP_DEV for its
# handlers, DEL_DEV for anybody who has a node open, itself included, and while
# one waits others wait for it, as the driver has one lock for each device and,
# for adding and deleting, one for all. So each has a limit of time here, after
# which it is cancelled, and nobody sends STOP_DEV from the thread that has to
# answer the last requests. Nor does a command keep other threads' waiting here:
# each has a ring to itself. A signal does not interrupt a command: it is carried
# out by a thread of the kernel's; io_uring's own ASYNC_CANCEL does. What may
# not end even then keeps its memory for ever (`_left_behind`), because the
# kernel may still write there.
#
# Who may do what: any of this needs CAP_SYS_ADMIN, unless the device is an
# ordinary user's own. Then the command carries the path of /dev/ublkcN in front
# of its payload, and the driver looks whether the caller may open that.

MAX_DEVICES = 1 << 20
NODE = "/dev/ublkc"  # and the number of a device: what its server opens
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What would not end: a command's buffer, where the kernel may still write, the
# target of a handler
_left_behind: list[Any] = []
COMMAND_TIMEOUT = 60.0  # seconds; the kernel answers in milliseconds unless a server hangs
# What becomes of a command that is cancelled as it waits, before it has begun, after its end
CANCELLED = (-errno.EINTR, -errno.ECANCELED, -errno.ENOENT)


class Control:
    """The control plane: one method for each control command.

    features: the mask GET_FEATURES reports, or None before Linux 6.5.
    legacy: it gets the bare opcodes, since it has no GET_FEATURES.
    enough: a function that tells whether nobody waits for an answer any more.

    Every method raises UblkError with the kernel's errno. ENODEV is a device
    that is not there, ENOENT one whose node is not visible here, EPERM and
    EACCES are somebody else's. ETIMEDOUT and ECANCELED are ours: the command
    did not end in time, or it is enough. It is then cancelled and, where the
    kernel cannot cancel it, left behind with its buffer kept alive. A signal
    whose handler raises cancels it, too. One Control may be used by several
    threads; close it, or use it in a ``with``.
    """

    def __init__(self) -> None:
        try:
            self.fd: int = Descriptor(os.open("/dev/ublk-control", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise UblkError(
                error.errno or errno.EIO,
                "cannot open /dev/ublk-control",
                remedy="see `ublk.py check`",
            ) from None
        # One at least is there when no other could be made any more. A command needs
        # two entries; but the first ring of a thread also tells the kernel how many of
        # its commands may wait at a time.
        self._rings = [Ring(64, for_control=True)]
        _controls.add(self)
        self.enough: Callable[[], bool] = bool
        self._unprivileged: dict[int, int] = {}  # the flag of the devices seen so far
        self.legacy = False
        self.features = None
        try:
            self.features = self.get_features()
        except UblkError:
            self.legacy = True

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the control node and its rings; commands under way still have theirs."""
        self.fd = -1
        self.close_rings()

    def close_rings(self) -> None:
        """Have the next command make a ring, as in a forked child: its parent still uses these."""
        with contextlib.suppress(IndexError):  # a command that takes one first has it
            while True:
                self._rings.pop().close()

    # ---- how a command is sent -----------------------------------------------------------------

    def _run(
        self,
        command: Command,
        dev_id: int,
        payload: Any = None,
        data: int = 0,
        what: str = "",
        timeout: float = COMMAND_TIMEOUT,
    ) -> int:
        """Send one command; payload (a ctypes object) is sent and then filled with the answer.

        dev_id: the N of /dev/ublkcN; -1: none yet, or none in particular.
        data: the number that some commands have in place of a payload.
        what: what an error says has failed.
        timeout: seconds.

        Returns the result, which is 0 but where a command's description says
        otherwise.
        """
        what = what or command.name + (f" of device {dev_id}" if dev_id != -1 else "")
        if not -1 <= dev_id < MAX_DEVICES:  # cut to 32 bits it would mean another device
            raise explain(command, errno.ENODEV, what)
        path = self._path(command, dev_id)
        content = path + (b"" if payload is None else bytes(payload))
        buffer = ctypes.create_string_buffer(content)
        header = ublksrv_ctrl_cmd(
            dev_id=dev_id & 0xFFFFFFFF,
            queue_id=0xFFFF,
            len=len(content),
            dev_path_len=len(path),
            addr=ctypes.addressof(buffer) if content else 0,
            data=(data,),
        )
        result = self._send(command, header, buffer, timeout)
        if result < 0:
            raise explain(command, -result, what)
        if payload is not None:
            ctypes.memmove(
                ctypes.addressof(payload), buffer.raw[len(path) :], ctypes.sizeof(payload)
            )
        if isinstance(payload, ublksrv_ctrl_dev_info):
            self._unprivileged[payload.dev_id] = payload.flags & UBLK_F_UNPRIVILEGED_DEV
        return result

    def _path(self, command: Command, dev_id: int) -> bytes:
        """Return the device path the kernel wants in front of the payload (6.3).

        It looks this node up and checks the permission of whoever commands an
        ordinary user's device by it, root's as well. GET_DEV_INFO2 always
        brings it, since who asks cannot know yet whose device it is; from its
        answer we do.
        """
        without = UBLK_CMD_ADD_DEV, UBLK_CMD_GET_DEV_INFO
        ours = self._unprivileged.get(dev_id) and command not in without
        if ours or command == UBLK_CMD_GET_DEV_INFO2:
            return f"{NODE}{dev_id}\0".encode()
        return b""

    def _send(self, command: Command, header: Any, buffer: Any, timeout: float) -> int:
        """Put a command on a ring, and wait for its end.

        Returns the result: ETIMEDOUT, negative, where it was cancelled for
        being late.
        """
        fd = self.fd  # which is open until the command has ended, whoever closes us
        if fd < 0 or self.enough():
            return -errno.ECANCELED
        try:
            ring = self._rings.pop()
        except IndexError:  # other threads have commands under way
            ring = Ring(64, for_control=True)
        number = int(command) if self.legacy else command.encoded
        ring.prepare(0, IORING_OP_URING_CMD, fd, number, user_data=1, cmd=bytes(header))
        ring.prepare(1, IORING_OP_ASYNC_CANCEL, addr=1)
        # From now on, as a signal's handler may raise at any moment
        _left_behind.append(buffer)
        result = None
        try:
            ring.push(0)
            result = self._await(ring, timeout, self.enough)
        finally:
            late = result is None
            if late:
                ring.push(1)
                result = self._await(ring, 2.0)
                ring.close()
            else:
                self._rings.append(ring)
            if result is not None:
                _left_behind.remove(buffer)
        if result is None or (late and result in CANCELLED):
            return -errno.ETIMEDOUT
        return result

    def _await(
        self, ring: Ring, timeout: float, enough: Callable[[], bool] = bool
    ) -> int | None:
        """Wait for the result of a ring's command; None when time is up or it is enough.

        In small steps, as nothing wakes the kernel's wait when it becomes
        enough.
        """
        deadline = time.monotonic() + timeout
        news = select.poll()
        news.register(ring.fd, select.POLLIN)
        while time.monotonic() < deadline and not enough():
            ring.enter()
            # Not by enter(): a signal's handler, which comes before we look at its
            # errno, may leave another
            news.poll(100)  # milliseconds
            for token, result in sorted(zip(*ring.reap()), reverse=True):  # its own first
                # -ENOENT is what becomes of its cancellation where it has ended, and
                # a signal's handler kept that from being noted
                if token or result == -errno.ENOENT:
                    return result
        return None

    # ---- the commands --------------------------------------------------------------------------

    def get_features(self) -> int:
        """GET_FEATURES (6.5): return the mask of all features the driver knows."""
        mask = ctypes.c_uint64()
        self._run(UBLK_CMD_GET_FEATURES, -1, mask)
        return mask.value

    def add_dev(
        self,
        dev_id: int,
        queues: int,
        depth: int,
        max_io: int,
        flags: int,
        ublksrv_flags: int = 0,
    ) -> Any:
        """ADD_DEV: create /dev/ublkcN; dev_id -1 takes the first free number.

        queues, depth: how many hardware queues, and tags in each (4096 at
            most).
        max_io: the largest request in bytes.
        flags: UBLK_F_* bits. ublksrv_flags: 64 bits of the server's own, handed
            back unchanged by get_dev_info().

        Returns what the kernel made of it, a ublksrv_ctrl_dev_info: queues are
        limited to the number of processors, max_io is rounded down to pages,
        and unknown or impossible flags are cleared without a word. Raises
        UblkError: EEXIST where the number is taken, EPERM without CAP_SYS_ADMIN
        and UNPRIVILEGED_DEV, EACCES where a user has as many devices as
        allowed, EINVAL for numbers and flags that cannot be.
        """
        info = ublksrv_ctrl_dev_info(
            nr_hw_queues=queues,
            queue_depth=depth,
            max_io_buf_bytes=max_io,
            flags=flags,
            dev_id=dev_id & 0xFFFFFFFF,
            ublksrv_flags=ublksrv_flags,
        )
        what = "cannot create a device" if dev_id < 0 else f"cannot create device {dev_id}"
        try:
            self._run(UBLK_CMD_ADD_DEV, dev_id, info, what=what)
        except UblkError as error:
            # Which kernels that know the flag do not answer to it
            if error.errno == errno.EPERM:
                require(flags & UBLK_F_UNPRIVILEGED_DEV)
            raise
        return info

    def del_dev(self, dev_id: int, timeout: float = COMMAND_TIMEOUT) -> None:
        """DEL_DEV: stop and remove a device.

        Waits until nobody holds /dev/ublkcN or /dev/ublkbN open, the caller
        included: whoever serves it has to let go first. Raises ETIMEDOUT where
        somebody does not; the device then goes by itself with the last who
        holds it.
        """
        self._run(UBLK_CMD_DEL_DEV, dev_id, timeout=timeout)

    def del_dev_async(self, dev_id: int) -> None:
        """DEL_DEV_ASYNC (6.9): the same without the wait; not for unprivileged devices."""
        self._run(UBLK_CMD_DEL_DEV_ASYNC, dev_id)

    def start_dev(self, dev_id: int, pid: int) -> None:
        """START_DEV: show the disk.

        Waits until every tag is fetched; up to Linux 6.12 also until the
        partition table is read, so the queues must serve already. pid is of the
        process that opened /dev/ublkcN. Raises EINVAL where that is another, or
        there are no parameters; EEXIST where the disk is there; EBUSY after a
        STOP_DEV (7.3; older kernels crash).
        """
        self._run(UBLK_CMD_START_DEV, dev_id, data=pid)

    def stop_dev(self, dev_id: int, timeout: float = COMMAND_TIMEOUT) -> None:
        """STOP_DEV: take the disk away; the device remains.

        Waits for the requests the server holds, so that it must go on serving,
        then ends every parked command with ENODEV.
        """
        self._run(UBLK_CMD_STOP_DEV, dev_id, timeout=timeout)

    def try_stop_dev(self, dev_id: int, timeout: float = COMMAND_TIMEOUT) -> None:
        """TRY_STOP_DEV (7.0): the same, but EBUSY where somebody has the disk open."""
        require(UBLK_F_SAFE_STOP_DEV & ~(self.features or 0))
        self._run(UBLK_CMD_TRY_STOP_DEV, dev_id, timeout=timeout)

    def set_params(self, dev_id: int, params: Any) -> None:
        """SET_PARAMS: the geometry of a device that was not started yet.

        params is a ublk_params. Kinds that this kernel does not know are
        dropped without a word: see with get_params() what it kept. Raises
        EINVAL for what no disk can have, EACCES for a disk that is there.
        """
        params.len = ctypes.sizeof(params)
        self._run(UBLK_CMD_SET_PARAMS, dev_id, params)

    def get_params(self, dev_id: int) -> Any:
        """GET_PARAMS: what the kernel kept of SET_PARAMS, as a ublk_params.

        Members it does not know stay zero.
        """
        params = ublk_params(len=ctypes.sizeof(ublk_params))
        self._run(UBLK_CMD_GET_PARAMS, dev_id, params)
        return params

    def get_dev_info(self, dev_id: int) -> Any:
        """GET_DEV_INFO: return the ublksrv_ctrl_dev_info of a device.

        Or GET_DEV_INFO2 (6.3), which an ordinary user's device wants. Neither
        waits for anything, whatever hangs elsewhere. The pid in it is -1 where
        no server lives that this process could see.
        """
        info = ublksrv_ctrl_dev_info()
        what = f"device {dev_id}"
        try:
            self._run(UBLK_CMD_GET_DEV_INFO, dev_id, info, what=what)
        except UblkError as error:
            if error.errno != errno.EINVAL:
                raise
            self._run(UBLK_CMD_GET_DEV_INFO2, dev_id, info, what=what)
        return info

    def get_queue_affinity(self, dev_id: int, queue: int) -> set[int]:
        """GET_QUEUE_AFFINITY: return the CPUs whose requests go to this queue."""
        mask = (ctypes.c_uint8 * 1024)()
        self._run(UBLK_CMD_GET_QUEUE_AFFINITY, dev_id, mask, data=queue)
        bits = int.from_bytes(mask, sys.byteorder)
        return {cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1}

    def start_user_recovery(self, dev_id: int) -> None:
        """START_USER_RECOVERY (6.1): make a device whose server is gone ready for a new one.

        Up to 6.15 that is done once: the second time is EINVAL. Later it only
        tells whether a server may come. EBUSY: the old one is not gone yet.
        """
        self._run(UBLK_CMD_START_USER_RECOVERY, dev_id)

    def end_user_recovery(self, dev_id: int, pid: int) -> None:
        """END_USER_RECOVERY (6.1): go on with a new server, all of whose tags are fetched.

        pid is of the process that opened /dev/ublkcN. Requests that waited come
        now.
        """
        self._run(UBLK_CMD_END_USER_RECOVERY, dev_id, data=pid)

    def update_size(self, dev_id: int, size: int) -> None:
        """UPDATE_SIZE (6.16): change the size of a live disk, in bytes.

        The kernel takes any number: check_new_size() looks whether the disk can
        have it. ENODEV where there is no disk.
        """
        self._run(UBLK_CMD_UPDATE_SIZE, dev_id, data=size // SECTOR)

    def quiesce_dev(self, dev_id: int, timeout: float = 0.0) -> None:
        """QUIESCE_DEV (6.16): detach the server, keep the disk; timeout 0 waits without end.

        Waits until each queue has an idle tag, for timeout seconds, then takes
        the idle tags away. Raises EOPNOTSUPP for a device without the flag
        QUIESCE, ENODEV where there is no disk, EBUSY where time was up.
        """
        wait = timeout + 10 if timeout else float("inf")
        self._run(UBLK_CMD_QUIESCE_DEV, dev_id, data=int(timeout * 1000 + 0.999), timeout=wait)

    def reg_buf(self, dev_id: int, address: int, length: int, read_only: bool = False) -> int:
        """REG_BUF (7.1): share memory of this process with clients; returns its index.

        address, length: whole pages, in bytes.
        read_only: only for clients' writes.

        The disk waits for its requests meanwhile, so the queues must serve.
        Raises EEXIST where a page of it is shared already, ENOSPC above 65536
        pieces.
        """
        flags = UBLK_SHMEM_BUF_READ_ONLY if read_only else 0
        return self._run(
            UBLK_CMD_REG_BUF, dev_id, ublk_shmem_buf_reg(addr=address, len=length, flags=flags)
        )

    def unreg_buf(self, dev_id: int, index: int) -> None:
        """UNREG_BUF (7.1): take the shared memory with this index back."""
        self._run(UBLK_CMD_UNREG_BUF, dev_id, data=index)


def device_ids() -> list[int]:
    """Return the ids of all ublk devices this system shows, in /sys or else in /dev.

    A container may have either of them and not the other.
    """
    try:
        names = os.listdir("/sys/class/ublk-char")
    except OSError:
        names = os.listdir("/dev")
    found = [re.fullmatch("ublkc([0-9]+)", name) for name in names]
    return sorted(int(one[1]) for one in found if one)


# =================================================================================================
# One disk, the plain way
# =================================================================================================
#
# Now a disk. This chapter has all that the simplest one needs, from the object
# that holds the bytes to the last clean-up: Target, MappedCopy, Queue, Worker,
# Device. What comes after it adds to this and can be left out at first.
#
# **A request's way.** A client reads 4 KiB from /dev/ublkb0. The block layer
# gives the request a free *tag* of one of the device's queues and hands it to
# the driver. The driver writes into the tag's descriptor what is wanted
# (operation, first sector, number of sectors) and completes the command that
# the server had parked for that tag. The server's io_uring_enter() returns. It
# finds the tag in the CQE, reads the descriptor, calls `target.read(offset,
# buffer)`, and writes into the tag's SQE how many bytes there are. With the
# next io_uring_enter() that SQE, COMMIT_AND_FETCH_REQ, ends the request, copies
# the buffer to the client's pages and parks the tag again: all in one entry.
#
#     FETCH -> parked -> a request: ours -> COMMIT_AND_FETCH -> parked -> ... ->
#     ENODEV: the end
#
# A tag is either the kernel's or ours, never both: while it is parked we leave
# its descriptor and its buffer alone, and while it is ours the driver waits.
# That is all the synchronisation there is, and why a queue needs no locks.
#
# **Queues and threads.** Each queue has a ring, and a thread of its own that
# makes the ring, uses it and closes it. The thread sleeps in io_uring_enter(),
# in which Python's global lock is released. A target with several queues is
# called by several threads at once; without free-threaded Python they take
# turns.
#
# **The rules of the data path.** They are the kernel's, and each has cost
# somebody data:
#
#   - A result that is not negative counts as success for the whole request,
#     whatever its value, wherever the driver does not copy itself. A handler
#     that moved only a part is called again for the rest; what moved nothing is
#     EIO.
#   - What a handler did not fill must not be sent, or a client would read what
#     another client's request had left in the buffer. So a buffer is cleared
#     before a READ.
#   - FLUSH means that all writes that have ended are durable. A disk whose
#     target cannot do that says so by not offering FLUSH at all, nor FUA, a
#     write that is durable when it ends.
#   - Whatever goes wrong in a handler, the request ends: an OSError with its
#     own errno, anything else with EIO.
#
# **From nothing to a disk, and back.** ADD_DEV, open /dev/ublkcN, SET_PARAMS,
# a thread for each queue, in which the target starts; when it has in all, map
# the descriptors, FETCH for every tag, START_DEV. On the way back STOP_DEV comes
# first, while the threads still serve: it waits for the requests they have,
# then ends every parked command with ENODEV, by which the threads know that
# they are to leave. When they have, the target is closed; only when every
# descriptor and mapping of /dev/ublkcN is gone, DEL_DEV can end. A start that
# fails in the middle goes the same way back. The order matters more than it
# seems: START_DEV after STOP_DEV on one open node crashes kernels before 7.3, so
# a Device lives once; a thread that dies with a tag in its hands leaves a queue
# that is deaf, so the others are told to leave, too, and the kernel fails what
# the dead one had; and once the node is closed the next server may come, so the
# target has stored by then what it has to.


class Target:
    """The object behind a disk. Subclass it, set size, define read and write.

    All offsets and lengths are in bytes and multiples of block_size. buffer is
    a memoryview that is valid until the method returns: what is to be kept of
    it has to be copied. A queue calls one method at a time; with several queues
    each has a thread of its own, and they call side by side.

    To define:
        size                    attribute: bytes, a multiple of block_size
        read(offset, buffer)    fill the writable memoryview
        write(offset, buffer)   take the read-only memoryview; it is reused after the return

    A disk offers the following only where the class defines it:
        flush()                         make all completed writes durable
        write_fua(offset, buffer)       a write that is durable when it returns; wants flush too,
                                        which follows each durable write where there is none
        discard(offset, length)         the content is no longer needed
        write_zeroes(offset, length, unmap)   the blocks read as zeroes from now on; with unmap
                                        they may be given back; unmap may be left out
        resized(size)                   the disk gets a new size: resize() calls it before the disk
                                        grows, `ublk.py resize` a moment after; without it the
                                        disk cannot grow beyond size
        start(index)                    called in each thread that serves a queue, before its
                                        first request
        close()                         the disk is gone
        disown()                        called in a child that a server forks: give back what is
                                        its parent's, as a file with a lock that the child would keep
        map(offset, length, write)      return (fd, position) where these bytes lie in a file, which
                                        stays open as long as the disk: the kernel moves them, and
                                        tells nobody when. read and write are called where it
                                        fails, with user copy and for memory shared with clients
        answer(queue, tags)             serve a batch of requests at once, see Queue
    Of these, write_fua, write_zeroes, discard, map and answer are not used where a subclass overrides
    what they stand for: write, map or answer; write or map; map; read, write or write_fua; map or any
    handler.

    and, for a zoned disk, with attributes zone_size, max_append (bytes),
    max_open_zones and max_active_zones:
        report_zones(offset, count)     return a list of blk_zone
        zone_append(offset, buffer)     write where the zone's data ends; return where that was
        zone_open, zone_close, zone_finish, zone_reset (each of offset), zone_reset_all()

    and, for a disk that keeps metadata_size bytes beside each block, its
    checksum (a name in CHECKSUMS) made and verified by the kernel (7.0):
        read_metadata(offset, buffer)   fill it with the metadata of the blocks at offset of the
                                        data; all ones (0xFF) for blocks never written: check nothing
        write_metadata(offset, buffer)  keep it; both are called before read and write; flush()
                                        makes it durable, also for durable writes, which are
                                        a write() and a flush() here

    **Coroutines.** All but the PLAIN_METHODS may be an ``async def``, or, in a
    class that has one (start() will do), and but for close(), return something
    else that can be awaited. Its queues run an asyncio loop, whose ring also
    does uring_read and the like, and serve other requests meanwhile. A close()
    that is an ``async def`` runs on the loop of the queue that ends last.

    **What is returned.** None, or for read and write the number of bytes moved:
    what is short is asked for again.

    **Errors.** An OSError reaches the client as its errno, as far as the block
    layer knows it (ENOSPC, EOPNOTSUPP, ETIMEDOUT, ENODATA, EILSEQ and some
    more; not where clients would mistake it, see MISTAKEN), else as EIO. Any
    other exception is a bug: it is printed with its traceback, once, and the
    client gets EIO. The server goes on in either case.
    """

    size: int = 0
    block_size: int = SECTOR
    physical_block_size: int = 4096
    read_only: bool = False
    rotational: bool = False
    discard_granularity: int = 0  # bytes; 0: one block
    boundary: int = 0  # bytes; no read or write crosses a multiple of it; 0: none
    dma_alignment: int = 0  # bytes; of clients' memory in direct I/O; 0: the driver's 4
    max_segments: int = 0  # pieces of memory in one request; 0: any number
    max_segment_size: int = 0  # bytes; 0: any
    metadata_size: int = 0  # bytes beside each block
    checksum: str = "crc"  # in these: "crc", "ip", "crc64" or "none"
    # Paths of files it is made of: a recovered disk must find the same
    files: Sequence[str] = ()
    once: Sequence[str] = ()  # options that are not for a server that recovers the disk

    def read(self, offset: int, buffer: memoryview) -> Any:
        """Fill buffer with the bytes at offset.

        Returns None or the number of bytes filled. Raises OSError for the
        client.
        """
        raise OSError(errno.EOPNOTSUPP, "this target cannot read")

    def write(self, offset: int, buffer: memoryview) -> Any:
        """Keep the bytes of buffer at offset.

        They need be durable only when the next flush() has returned. Returns
        None or the number of bytes kept. Raises OSError for the client.
        """
        raise OSError(errno.EOPNOTSUPP, "this target cannot write")

    def read_metadata(self, offset: int, buffer: memoryview) -> None:
        """Fill buffer with the metadata of the blocks at offset.

        It has metadata_size bytes for each block of block_size.
        """
        raise OSError(errno.EOPNOTSUPP, "this target has no metadata")

    def write_metadata(self, offset: int, buffer: memoryview) -> None:
        """Keep the metadata of the blocks at offset, metadata_size bytes for each."""
        raise OSError(errno.EOPNOTSUPP, "this target has no metadata")


class Size(int):
    """A number of bytes; on the command line it may end in K, M, G or T (powers of 1024)."""


NULL_SIZE = Size(250 << 30)


class Null(Target):
    """Read zeroes, forget writes: what remains is the cost of ublk itself.

    size: size of the disk
    """

    def __init__(self, *, size: Size = NULL_SIZE) -> None:
        self.size = size

    def resized(self, size: int) -> None:
        """Have any size."""
        self.size = size

    def answer(self, queue: Queue, tags: list[int]) -> None:
        """End every request at once: what answered a tag's last request answers one alike, too."""
        requests = queue.requests
        served = queue.served
        for tag in tags:
            if requests[tag] != served[tag]:
                self._prepare(queue, tag)
        queue.repeat(tags)

    def _prepare(self, queue: Queue, tag: int) -> None:
        """Make an answer; a read must not see what was written under its tag before."""
        operation = queue.flags[tag] & 0xFF
        if operation > UBLK_IO_OP_WRITE:
            queue.prepare(tag, 0)
            return
        length = queue.sectors[tag] * SECTOR
        queue.prepare(tag, length)
        if operation == UBLK_IO_OP_READ:
            queue.path.give(tag, zeroes(length))
            if not queue.path.lasting:
                queue.served[tag] = -1

    def read(self, offset: int, buffer: memoryview) -> None:
        """The buffer is clear already."""

    def write(self, offset: int, buffer: memoryview) -> None:
        """There is nothing to keep."""

    write_fua = write

    def flush(self) -> None:
        """There is nothing to make durable."""

    def discard(self, offset: int, length: int) -> None:
        """There is nothing to forget."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Everything is zero already."""


IO_CMD = struct.Struct("=HHiQ")  # ublksrv_io_cmd
IO_DESC = struct.Struct("=IIQQ")  # ublksrv_io_desc
BATCH_IO = struct.Struct("=HHHBBQ")  # ublk_batch_io
ELEMENT = struct.Struct("=HHiQ")  # ublk_elem_header, and what may follow
TRANSFER = struct.Struct("=BBHIQQI")  # io_uring_sqe up to len
RESULT_WORD = (48 + 4) // 4  # where ublksrv_io_cmd.result lies in an SQE, in 32-bit words
ADDRESS_WORD = (48 + 8) // 8  # and ublksrv_io_cmd.addr, in 64-bit words
# user_data of what is not the command of a tag. These four have an SQE slot each,
# in this order behind the tags'; operations take turns in the SPARE_SLOTS.
OPERATION = 1 << 32
WAKE = OPERATION
EPOLL = OPERATION + 1
FETCH = OPERATION + 2
COMMIT = OPERATION + 3
FIXED_SLOTS = 4
SPARE_SLOTS = 60

A_MOMENT = 0.01  # seconds between looks at a queue that ends

# linux/mman.h. Memory that is never used need not exist; mmap names it from Python 3.11 on
MAP_NORESERVE = 0x4000
MAP_FIXED = 0x10


def private_memory(size: int) -> mmap.mmap:
    """Return memory of this process, in whole pages that do not exist before they are used."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


# As many as the largest request has; pages that are only read take no memory
ZEROES = private_memory(1 << UBLK_IO_BUF_BITS)


def zeroes(count: int) -> memoryview:
    """Return so many, in a view of its own.

    For a free-threaded Python miscounts the parts of one that threads share,
    and releases it under them.
    """
    return memoryview(ZEROES)[:count]


class MappedCopy:
    """The data path of every kernel: the driver copies to and from a buffer of ours per tag.

    What a client wrote lies in the buffer when the request arrives; what it is
    to read is taken from there when the request is committed. Pages of the
    buffers exist only once they are used: 128 tags of 512 KiB would otherwise
    be 64 MiB a queue.

    A target whose map() says where the data lives never touches it: the
    transfer between buffer and file and the commit go to the kernel as one
    chain, and the next thing heard of the tag is its next request. A transfer
    that fails or is short breaks the chain, and the target's methods serve.

    This class is also what a queue expects of a data path: address() and
    sqe_address() for the tag's command, buffer(), data() and give() for a request
    that Python serves, chain() and broken() for one that the kernel does. The
    others below replace of it what is different with them.
    """

    summary = "the kernel copies to and from our buffers"
    features: int = 0  # the flags of a device with this data path
    stages = 1  # SQEs a request needs besides the command of its tag
    # What moves a READ's data; a WRITE's is the next; 0: only Python does
    moves: int = IORING_OP_READ
    lasting = True  # a tag's requests all have the same memory, as it was left by the last
    chains: Any = None  # of each tag, where its target had a map() as the queue was made

    def __init__(self, queue: Queue) -> None:
        self.queue: Any = queue
        self.depth = queue.depth
        self.max_io = queue.max_io
        queue.exits.callback(self.close)
        self.memory = private_memory(queue.depth * queue.max_io)
        self.view = queue.kept(memoryview(self.memory))
        self.written = queue.kept(self.view.toreadonly())
        self.base = address_of(self.view)
        if self.moves and serves(queue.target, "map"):
            self.make_chains()

    def address(self, tag: int) -> int:
        """Return what a command for this tag carries in its addr field."""
        return self.base + tag * self.max_io

    def make_chains(self) -> None:
        """Fill for each tag the SQE that moves its data, as far as map() is not needed."""
        ring = self.queue.ring
        tags = range(self.depth)
        for tag in tags:
            slot = self.depth + tag
            ring.prepare(slot, self.moves, user_data=slot, buf_index=tag)
        # To ask the driver with when the queue ends, as there may be none to be had then
        self.asking = Ring(self.depth)
        self.queue.exits.callback(self.asking.close)
        commits = bool(self.queue.link_last)
        self.chains = [self.chain(tag) + (tag,) * commits for tag in tags]
        self.sqes = ring.sqes
        # Of the SQEs that move data: the descriptors, and where in their files, in bytes
        self.fds = [-1] * self.depth
        self.positions = self.queue.kept(ring.sqes.cast("Q")[self.depth * 8 + 1 :: 8])
        self.links = self.queue.link_last if self.stages == 1 else Queue.link_last

    def chain(self, tag: int) -> tuple[int, ...]:
        """Return the SQE slots that serve a request of this tag, each linked to the next."""
        return (self.depth + tag,)

    def transfer(self, tag: int, flags: int, fd: int, length: int) -> None:
        """Prepare the chain that moves a request's data, length bytes, from or to a file.

        All but its position, which is another each time, while the rest of a
        request is often like the tag's last. Raises struct.error where fd is no
        descriptor.
        """
        TRANSFER.pack_into(
            self.sqes,
            (self.depth + tag) * 64,
            self.moves + (flags & 0xFF),
            self.links,
            0,
            fd,
            0,
            self.address(tag),
            length,
        )
        self.fds[tag] = fd

    def broken(self, tag: int, stage: int) -> None:
        """Clean up after the stage of a chain that failed; what came behind it was cancelled."""

    def sqe_address(self, tag: int) -> int:
        """Return what it carries in the addr field of the SQE itself."""
        return 0

    def buffer(self, tag: int, length: int) -> memoryview:
        """Return the tag's own memory, as it is."""
        start = tag * self.max_io
        return self.view[start : start + length]

    def data(self, tag: int, length: int) -> memoryview:
        """Return what a WRITE wrote."""
        return self.buffer(tag, length).toreadonly()

    def give(self, tag: int, data: memoryview) -> None:
        """Give a READ its data, which may lie in its buffer already."""
        self.buffer(tag, len(data))[:] = data

    def abandon(self) -> None:
        """Let a handler that never returned do no harm should it go on after close()."""

    def close(self) -> None:
        """Let go of the queue; a handler that still has a buffer keeps that alive."""
        self.queue = None


def failed(error: BaseException) -> int:
    """Return the negative errno a client gets for an exception in a handler.

    An OSError brings its own; anything else is a bug of the target: EIO, and a
    traceback.
    """
    number = error.errno if isinstance(error, OSError) else None
    # Whoever raises it may have put anything there
    if isinstance(number, int) and 0 < number < 4096:
        return -number
    show(error)
    return -errno.EIO


def show(error: BaseException) -> None:
    """Print a traceback, once for each line that fails, or a log would be full of it.

    It is printed by the interpreter itself, which minds no broken standard
    error and need import nothing.
    """
    where = "?"
    trace = error.__traceback__
    while trace is not None:
        where = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    count = _bugs[where] = _bugs.get(where, 0) + 1
    if count == 1:
        sys.__excepthook__(type(error), error, error.__traceback__)
    elif count == 10 ** (len(str(count)) - 1):
        say(f"{type(error).__name__} in {where}: {count} times by now")


_bugs: dict[str, int] = {}  # how often an exception came from a line


def is_short(count: int | None, buffer: memoryview) -> bool:
    """Tell whether a handler moved only a part of a buffer.

    count: what it returned. Raises OSError (EIO) where it moved nothing, or
    says that it moved more than there was.
    """
    if count is None or count == len(buffer):
        return False
    if not 0 < count < len(buffer):
        raise OSError(errno.EIO, "the target moved no data")
    return True


def is_awaitable(outcome: object) -> bool:
    """Tell whether a handler has not ended: it returned a coroutine, a Future or the like."""
    return hasattr(outcome, "__await__")


def at_once(outcome: object) -> None:
    """Raise TypeError where one of the PLAIN_METHODS has not ended: it would never run."""
    if is_awaitable(outcome):
        raise TypeError(f"{outcome!r}, for which nobody waits: return what is there at once")


# What can be awaited for a number: a request's result, an operation's
Promise = Coroutine[Any, Any, int]


async def end_of(outcome: Any) -> Any:
    """Return what a method returns in the end."""
    return await outcome if is_awaitable(outcome) else outcome


def succeeded(function: Callable[..., Any], outcome: object) -> int:
    """Return 0 for what the function of a request without data returned. Raises TypeError.

    For a False, a negative number or a thing that nobody can await tells of no
    success.
    """
    good = outcome is None or (isinstance(outcome, int) and outcome >= 0)
    if not good or outcome is False:
        raise TypeError(f"{function!r} returned {outcome!r}, from which nobody learns its end")
    return 0


async def transfer(
    function: Callable[..., Any], outcome: Any, offset: int, buffer: memoryview
) -> None:
    """See a transfer through that began with this outcome of function(offset, buffer).

    outcome: what it returned, maybe an awaitable.
    offset, buffer: in bytes, of what it was to move.

    An awaitable is awaited; what was short is asked for again.
    """
    while True:
        if is_awaitable(outcome):
            outcome = await outcome
        if not is_short(outcome, buffer):
            return
        offset += outcome
        buffer = buffer[outcome:]
        outcome = function(offset, buffer[:])


def run(serving: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that has nothing to wait for. Raises TypeError where it has."""
    try:
        serving.send(None)
    except StopIteration as end:
        return end.value
    raise TypeError("a plain class has nobody who waits: make the method, or start(), async")


class Queue:
    """One hardware queue of a device: its ring, its request descriptors, its loop.

    It must be made, used and closed by one thread. Slot t of the ring is the
    command of tag t, all filled once: to answer a request is to store its
    result in the SQE and push the slot.

    Each round of the loop has three steps. *Collect*: hand in what was
    answered, wait, take the completions, and sort out those that are no new
    requests (an operation of a coroutine, a chain that broke, the end of a
    tag). *Answer*: have the target serve the list of tags that have a request.
    *Commit*: which is the first thing of the next round, so that results and
    news share a system call.

    There are three ways of answering. answer() of the target takes the whole
    list. map() says for each where its data lies. Otherwise its methods are
    called, one request after the other.

    For a target's answer() method, which gets a list of tags with new requests and keeps none of this:
        flags, sectors, starts      of each tag's request: operation and flags, sectors, first sector
        requests                    flags and sectors in one number, to tell requests that are alike
        path                        what moves the data
        complete(tag, result)       end a request
        prepare(tag, result)        store a result that may serve several requests of the tag, and
        repeat(tags)                end requests with the results prepared for their tags
        served                      for each tag the one of requests it was prepared for, or -1
    """

    link_last = IOSQE_IO_LINK | IOSQE_CQE_SKIP_SUCCESS  # flags of a chain's last own SQE

    def __init__(self, device: Device, index: int) -> None:
        self.target: Any = device.target  # what it has beyond Target is found by hasattr()
        self.index = index
        self.device_fd = device.char_fd
        self.depth = device.info.queue_depth
        self.max_io = device.info.max_io_buf_bytes
        self.opcodes = 0xFF if device.control.legacy else 0xFFFFFFFF
        # answer() knows neither of memory shared with clients nor of metadata
        self.needs_handlers = device.share_memory or bool(self.target.metadata_size)
        # Beside which nobody would make metadata durable
        self.writes_durably = serves(self.target, "write_fua") and not self.target.metadata_size
        self.flushing: Any = device.flushing
        self.answer: Any = None  # what serves a list of tags
        self.served = [-1] * self.depth
        self._done: list[int] = []  # tags whose commit is to be submitted
        self._appended: list[int] = []
        self.unflushed: set[int] = set()  # tags that a plain target has served but for a flush
        self._handlers = self._table()
        # The end of the queue.
        self.ended: set[int] = set()  # tags the kernel has taken back
        self._ended_before = 0  # how many they were when the loop looked last
        # Tags whose data were asked for (get-data) and have not come
        self.asked: set[int] = set()
        self.leaving = False  # its server is to go
        self.failure: UblkError | None = None  # why, where the kernel refused something
        self.closing = False  # requests are no longer answered
        self.chained: set[int] = set()  # tags whose commit is, or was, the end of a chain
        # Coroutines.
        self.loop: Any = None  # of asyncio, where there are coroutines
        self._memories: list[Any] = [None] * self.depth  # what they get of their requests
        # Tags whose requests no task serves yet
        self.waiting: collections.deque[int] = collections.deque()
        self._tasks: set[Any] = set()  # asyncio itself may forget those that wait
        # Futures of what threads do for requests, to_thread() say
        self.threads: set[Any] = set()
        self._enough_tasks = 1  # how many to have for requests that come together
        self.rounds = 0  # how often the loop has waited
        self.watching = False  # whether the ring waits for the loop's epoll, too
        self._operations: dict[int, Operation] = {}
        self._last_operation = OPERATION + FIXED_SLOTS
        self.exits = contextlib.ExitStack()  # gives back what the queue has, the last first
        _queues.add(self)
        try:
            with _forking:
                self._open(device)
            if has_coroutines(self.target):
                self._begin_loop()
        except BaseException:
            self.close()  # or who keeps the exception would keep the device's mapping, too
            raise

    def _open(self, device: Device) -> None:
        """Get what a queue may fail to get."""
        self.own = (1 + device.data_path.stages) * self.depth  # SQE slots of tags
        self.ring = Ring(self.own + FIXED_SLOTS + SPARE_SLOTS)
        self.exits.callback(self.ring.close)
        # Of each tag's command
        self.results = self.kept(self.ring.sqes.cast("i")[RESULT_WORD::16])
        self.addresses = self.kept(self.ring.sqes.cast("Q")[ADDRESS_WORD::8])
        self.path: Any = device.data_path(self)
        self._await_news(WAKE, device.wake_fd)

    def look_at(self, device: Device) -> None:
        """Have a view of each member of the request descriptors, which the device has mapped."""
        size = self.depth * device.desc_size
        apart = device.desc_size // 8
        descriptors = self.kept(memoryview(device.descriptors[self.index])[:size])
        words = self.kept(descriptors.cast("I"))
        longs = self.kept(descriptors.cast("Q"))
        self.flags = self.kept(words[:: 2 * apart])
        self.sectors = self.kept(words[1 :: 2 * apart])
        self.requests = self.kept(longs[::apart])
        self.starts = self.kept(longs[1::apart])
        self.shared_addresses = self.kept(longs[2::apart])
        self.shared = SharedCopy(self.shared_addresses, device.shared[self.index])

    def kept(self, view: memoryview) -> memoryview:
        """Have the end of the queue release a view of memory that is not its own."""
        self.exits.callback(view.release)
        return view

    # ---- the loop ------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Park a command for every tag: from now on requests arrive.

        All go to the kernel in one system call, because it cannot take back
        half of them.
        """
        self._fill_commands(UBLK_U_IO_FETCH_REQ)
        self.ring.push_all(range(self.depth))
        while self.ring.pending:
            self.ring.enter()
        self._fill_commands(UBLK_U_IO_COMMIT_AND_FETCH_REQ)

    def _fill_commands(self, opcode: int) -> None:
        """Fill the SQE of every tag."""
        path = self.path
        for tag in range(self.depth):
            self.command(tag, tag, opcode, path.address(tag), path.sqe_address(tag))

    def command(
        self, slot: int, tag: int, opcode: int, addr: int, sqe_addr: int = 0, flags: int = 0
    ) -> None:
        """Fill SQE slot with a command for a tag.

        addr, sqe_addr: what it carries in its own addr field, and in the SQE's.

        Its CQE will carry the number of the slot, or of the tag where the CQE
        means a request.
        """
        request = opcode not in (UBLK_U_IO_REGISTER_IO_BUF, UBLK_U_IO_UNREGISTER_IO_BUF)
        self.ring.prepare(
            slot,
            IORING_OP_URING_CMD,
            self.device_fd,
            opcode & self.opcodes,
            sqe_addr,
            user_data=tag if request else slot,
            flags=flags,
            cmd=IO_CMD.pack(self.index, tag, 0, addr),
        )

    def run(self) -> None:
        """Serve until the device is stopped (every tag ends) or its server is to go.

        What coroutines have begun has LAST_WORDS to end then: an error may be
        told but once, so it is told to who asked. What is not answered is the
        kernel's to deal with when the ring is closed.
        """
        self.answer = self._answer()
        while not self.is_over():
            if self.loop is not None:
                self._run_loop()
            elif tags := self.collect(A_MOMENT if self.ended else None):
                self.answer(tags)
                self._flush_at_once()
        becomes(lambda: not self._tasks, LAST_WORDS, lambda _: self.idle())

    def is_over(self) -> bool:
        """Tell whether the loop is to end.

        STOP_DEV ends every tag. QUIESCE_DEV ends only those that were idle:
        requests that were ours by then must still be served, and no CQE will
        tell that the last commit was taken. So a queue of which tags have ended
        waits until a moment brings no news, and nothing is left to do.
        """
        if self.leaving or not self.ended:
            return self.leaving
        self.commit()
        before = self._ended_before
        self._ended_before = len(self.ended)
        news = self.ring.pending or self._ended_before != before
        if news and self._ended_before != self.depth:
            return False
        return not (self.waiting or self._tasks or self.asked or self._has_chains())

    def _answer(self) -> Callable[[list[int]], object]:
        """Return the quickest way to serve a batch of tags that target and data path allow."""
        if serves(self.target, "answer") and not self.needs_handlers:
            return self._answer_by_target
        if serves(self.target, "map") and self.path.chains:
            return self._answer_by_map
        if self.loop is not None:
            return self._answer_by_task
        return self._answer_by_handler

    def _answer_by_target(self, tags: list[int]) -> None:
        """Have the target's answer() serve; what it leaves where it fails gets an error."""
        try:
            at_once(self.target.answer(self, tags))
        except BaseException as error:  # even SystemExit: clients wait for an answer
            result = failed(error)
            for tag in set(tags).difference(self._done):
                self.complete(tag, result)

    def _answer_by_task(self, tags: list[int]) -> None:
        """Leave the requests to the tasks that come next."""
        self.waiting.extend(tags)

    def _answer_by_handler(self, tags: list[int]) -> None:
        """Have the target's methods serve; a READ or WRITE of a plain target at once.

        This is the hot path of every plain target. Locals in place of
        attributes, one try for a request, one call of the target; and because a
        busy disk's requests are much alike, what follows from operation and
        length is found out once for those in a row.
        """
        requests = self.requests
        starts = self.starts
        results = self.results
        path = self.path
        max_io = self.max_io
        read = self.target.read
        write = self.target.write
        ended: list[int] = []
        last = -1  # no request is like this one
        for tag in tags:
            # What is not begun is the kernel's to deal with. But up to 6.15 it hears of a
            # queue's end at once only by a parked command, else when a request is late
            if self.leaving and (ended or self._done or self.unflushed):
                break
            if requests[tag] != last:
                last = requests[tag]
                flags = self.flags[tag]
                simple = path.lasting and not flags & NOT_BY_BUFFER
                length = self.sectors[tag] * SECTOR
                blank = zeroes(length)
                reads = flags & 0xFF == UBLK_IO_OP_READ
                move = read if reads else write
                memory = path.view if reads else path.written
            if not simple:
                self.handle(tag)
                continue
            begin = tag * max_io
            buffer = memory[begin : begin + length]
            try:
                if reads:
                    buffer[:] = blank
                outcome = move(starts[tag] * SECTOR, buffer)
                if outcome is not None and outcome != length:
                    run(transfer(move, outcome, starts[tag] * SECTOR, buffer))
            except BaseException as error:  # even SystemExit: a client waits for an answer
                self.complete(tag, failed(error))
            else:  # where a queue that was given up has closed its ring
                results[tag] = length
                ended.append(tag)
        self.repeat(ended)

    def _answer_by_map(self, tags: list[int]) -> int:
        """Have the kernel move the data of reads and writes; the rest goes to the handlers.

        The chains go to the ring all at once, and none is heard of again if it
        went well. Returns the number of SQEs in the chains for it.
        """
        where = self.target.map
        path = self.path
        requests = self.requests
        served = self.served
        chained = self.chained
        chains: list[int] = []
        last = -1  # no request is like this one
        for tag in tags:
            if requests[tag] != last:
                last = requests[tag]
                flags = self.flags[tag]
                length = self.sectors[tag] * SECTOR
                writes = flags & 0xFF == UBLK_IO_OP_WRITE
            if flags & NOT_BY_MAP:
                self.handle(tag)
                continue
            try:
                fd, position = where(self.starts[tag] * SECTOR, length, writes)
                if position >> 63:  # all bits set mean the file's own position, which is none
                    raise OverflowError(f"{position} is no position in a file")
                if served[tag] != last or path.fds[tag] != fd:
                    path.transfer(tag, flags, fd, length)
                    self.prepare(tag, length)
                path.positions[tag] = position
            except BaseException as error:  # even SystemExit: a client waits for an answer
                self.complete(tag, failed(error))
                continue
            chained.add(tag)
            chains += path.chains[tag]
        self.ring.push_all(chains)
        return len(chains)

    def collect(self, timeout: float | None = None) -> list[int]:
        """Submit what is pending, wait, and return the tags that have a new request.

        timeout: seconds, None: without end. The list is empty where something
        else has come, or nothing.
        """
        self.turn(timeout)
        if self._appended and not (self._done or self.ring.pending):
            for tag in self._appended:
                self.addresses[tag] = 0
            self._appended.clear()
        data, results = self.ring.reap()
        if self.asked:
            self.asked.difference_update(data)
        if not data or (max(data) < self.depth and not any(results)):
            return data
        return [tag for tag, result in zip(data, results) if self._is_request(tag, result)]

    def turn(self, timeout: float | None) -> None:
        """Begin a round of the loop: submit what is pending, and wait."""
        self.rounds += 1
        if not self.leaving:  # each answer would bring a request that is the next server's
            self.commit()
        self.ring.wait(timeout)

    def commit(self) -> None:
        """Have the next enter() hand in every request that was completed."""
        if self._done:
            self.ring.push_all(self._done)
            self._done.clear()

    def _is_request(self, user_data: int, result: int) -> bool:
        """Deal with a completion that may be something else than a new request.

        user_data: of the CQE: a tag, or the number of what else it belongs to.
        result: of the CQE.
        """
        if user_data >= OPERATION:
            self._operation_done(user_data, result)
        elif user_data >= self.depth:
            stage, tag = divmod(user_data, self.depth)
            self.chain_done(tag, stage, result)
        elif result == UBLK_IO_RES_OK:
            return True
        elif result == UBLK_IO_RES_NEED_GET_DATA:
            self.asked.add(user_data)
            self.path.ask(user_data)
        elif result == UBLK_IO_RES_ABORT:
            self.ended.add(user_data)
        elif result == -errno.EINVAL and user_data in self.chained:
            # The thread that made the transfer made the commit, too, not this one:
            # before 6.7 an error.
            self.chained.remove(user_data)
            self._done.append(user_data)
        else:
            self.fail(result, f"lost tag {user_data}")
        return False

    def fail(self, result: int, what: str) -> None:
        """Have the queue leave, which cannot go on, once all that came with the bad news is heard."""
        self.failure = self.failure or UblkError(-result, f"queue {self.index} {what}")
        self.leaving = True

    def chain_done(self, tag: int, stage: int, result: int) -> None:
        """Hear of a stage of a chain: only those that fail are heard of. Serve the request anew."""
        self.path.broken(tag, stage)
        self.handle(tag)

    def _has_chains(self) -> bool:
        """Ask the driver whether it waits for a commit that is the end of some chain.

        A registration of pages, on a ring that has no table for them, fails for
        an idle tag with EBUSY, for one with a request in another way.
        """
        tags = list(self.chained - self.ended)
        if tags:
            ring = self.path.asking
            for tag in tags:
                ring.prepare(
                    tag,
                    IORING_OP_URING_CMD,
                    self.device_fd,
                    UBLK_U_IO_REGISTER_IO_BUF & self.opcodes,
                    cmd=IO_CMD.pack(self.index, tag, 0, 0),
                )
            ring.push_all(tags)
            ring.enter()  # which does it at once
            _, results = ring.reap()
            if results == [-errno.EBUSY] * len(tags):
                self.chained.clear()
        return not self.chained <= self.ended

    def handle(self, tag: int) -> None:
        """Serve one request by the target's method for its operation."""
        self.chained.discard(tag)
        if self.loop is not None:
            self.waiting.append(tag)
            return
        if self.leaving and (self._done or self.unflushed):
            return
        try:
            result = run(self._serve(tag))
        except BaseException as error:  # even SystemExit: a client waits for an answer
            result = failed(error)
        self.complete(tag, result)

    def complete(self, tag: int, result: int) -> None:
        """End a request: result is its length in bytes, or a negative errno.

        It goes to the kernel with the next round of the loop.
        """
        if result in MISTAKEN and self.flags[tag] & 0xFF in MISTAKEN[result]:
            result = -errno.EIO
        self.results[tag] = result
        self.served[tag] = -1
        if tag not in self.unflushed:  # else it ends with the flush
            self.repeat([tag])

    def prepare(self, tag: int, result: int) -> None:
        """Store the result of a tag's request, and of those alike that follow."""
        self.results[tag] = result
        self.served[tag] = self.requests[tag]

    def repeat(self, tags: list[int]) -> None:
        """End these requests with the results prepared for them."""
        self._done += tags

    # ---- the handlers: each is a coroutine that returns the result -------------------------------

    def _table(self) -> list[Callable[..., Promise]]:
        """Return the handler of each operation: handler(tag, flags, offset, length) in bytes."""
        table: list[Callable[..., Promise]] = [self._unsupported] * 256
        table[UBLK_IO_OP_READ] = self._read
        table[UBLK_IO_OP_WRITE] = self._write
        table[UBLK_IO_OP_REPORT_ZONES] = self._report
        table[UBLK_IO_OP_ZONE_APPEND] = self._append
        for operation, (name, count) in SIMPLE_OPERATIONS.items():
            if serves(self.target, name):
                function = getattr(self.target, name)
                if name == "write_zeroes" and not takes_unmap(function):
                    count = 2
                table[operation] = partial(self._simple, function, count)
        if hasattr(self.target, "flush"):
            table[UBLK_IO_OP_FLUSH] = self._flush
        if self.target.metadata_size:
            table[UBLK_IO_OP_READ] = table[UBLK_IO_OP_WRITE] = self._with_metadata
        return table

    def _serve(self, tag: int) -> Promise:
        """Return what serves a request, and returns its result."""
        flags = self.flags[tag]
        handler = self._handlers[flags & 0xFF]
        return handler(tag, flags, self.starts[tag] * SECTOR, self.sectors[tag] * SECTOR)

    async def _unsupported(self, tag: int, flags: int, offset: int, length: int) -> int:
        return -errno.EOPNOTSUPP

    async def _simple(
        self,
        function: Callable[..., Any],
        count: int,
        tag: int,
        flags: int,
        offset: int,
        length: int,
    ) -> int:
        """Serve a request without data: its result is only good or bad.

        Good is 0, since a length of 2 GiB and more does not fit where the
        driver looks for the result.
        """
        arguments = (offset, length, not flags & UBLK_IO_F_NOUNMAP)
        return succeeded(function, await end_of(function(*arguments[:count])))

    async def _read(self, tag: int, flags: int, offset: int, length: int) -> int:
        path = self.shared if flags & UBLK_IO_F_SHMEM_ZC else self.path
        if self.loop is None:
            buffer = path.buffer(tag, length)
        else:
            buffer = self._own(tag, length)
        buffer[:] = zeroes(length)
        read = self.target.read
        await transfer(read, read(offset, buffer[:]), offset, buffer)
        path.give(tag, buffer)
        return length

    async def _write(self, tag: int, flags: int, offset: int, length: int) -> int:
        path = self.shared if flags & UBLK_IO_F_SHMEM_ZC else self.path
        failures = self.flushing.failures
        durable = flags & UBLK_IO_F_FUA
        write = self.target.write
        if durable and self.writes_durably:
            write = self.target.write_fua
        data = self._data(path, tag, length)
        await transfer(write, write(offset, data[:]), offset, data)
        if durable and not self.writes_durably:
            await self._await_flush(tag, failures)
        return length

    async def _flush(self, tag: int, flags: int, offset: int, length: int) -> int:
        await self._await_flush(tag)
        return 0

    async def _await_flush(self, tag: int, failures: int | None = None) -> None:
        """Have what was written be durable, also behind a durable write that has no method.

        The kernel would have that flushed by a request of its own. A server that
        is killed while it has that one is never let go of (up to 7.3): the
        write that waits for it has begun, and keeps its tag.
        """
        if self.loop is None:
            self.unflushed.add(tag)
        else:
            await self.flushing(failures)

    def _flush_at_once(self) -> None:
        """Flush once for all requests of a round that a plain target has served but for that."""
        tags = sorted(self.unflushed)
        if not tags:
            return
        self.unflushed.clear()
        try:
            succeeded(self.target.flush, self.target.flush())
        except BaseException as error:  # even SystemExit: clients wait for an answer
            result = failed(error)
            for tag in tags:
                self.complete(tag, result)
        else:
            self.repeat(tags)

    async def _with_metadata(self, tag: int, flags: int, offset: int, length: int) -> int:
        """Serve a READ or WRITE of blocks with metadata: these first, then the data as ever."""
        size = length // self.target.block_size * self.target.metadata_size
        if flags & 0xFF == UBLK_IO_OP_WRITE:
            if flags & UBLK_IO_F_INTEGRITY:
                at_once(self.target.write_metadata(offset, self.path.metadata(tag, size)))
            return await self._write(tag, flags, offset, length)
        if flags & UBLK_IO_F_INTEGRITY:
            buffer = memoryview(bytearray(size))
            at_once(self.target.read_metadata(offset, buffer))
            self.path.give_metadata(tag, buffer)
        return await self._read(tag, flags, offset, length)

    async def _report(self, tag: int, flags: int, offset: int, length: int) -> int:
        """REPORT_ZONES: where others say sectors, this says zones."""
        count = length // SECTOR
        zones = await end_of(self.target.report_zones(offset, count))
        self.path.give(tag, memoryview(b"".join(map(bytes, zones[:count]))))
        return length

    async def _append(self, tag: int, flags: int, offset: int, length: int) -> int:
        failures = self.flushing.failures
        data = self._data(self.path, tag, length)
        position = await end_of(self.target.zone_append(offset, data))
        if flags & UBLK_IO_F_FUA:
            await self._await_flush(tag, failures)
        self.appended(tag, position // SECTOR)
        return length

    def appended(self, tag: int, sector: int) -> None:
        """Note where the data of a ZONE_APPEND landed, in sectors: its COMMIT says so.

        No other commit may: with other operations the field is the buffer's
        address.
        """
        self.addresses[tag] = sector
        self._appended.append(tag)

    # ---- coroutines ------------------------------------------------------------------------------

    def _data(self, path: Any, tag: int, length: int) -> memoryview:
        """Return what a WRITE wrote; for a coroutine, in memory of the tag's own."""
        data: memoryview = path.data(tag, length)
        if self.loop is None:
            return data
        own = self._own(tag, length)
        own[:] = data
        return own.toreadonly()

    def _own(self, tag: int, length: int) -> memoryview:
        """Return memory of the tag's own for a handler that is a coroutine.

        One that fails, or gives up waiting, may leave threads and tasks behind
        that go on with it. So it is another request's only when nobody has a
        view of it any more: a mapping of which somebody has one cannot be
        resized, not even to the size it has.
        """
        memory = self._memories[tag]
        try:
            memory.resize(self.max_io)
        except (BufferError, AttributeError):
            memory = self._memories[tag] = private_memory(self.max_io)
        return memoryview(memory)[:length]

    def add_tasks(self, more: bool) -> None:
        """Add tasks for what waits, twice as many if those of the last round all had to wait."""
        if more:
            self._enough_tasks *= 2
        for _ in range(min(self._enough_tasks, len(self.waiting))):
            task = self.loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        """Serve requests, one after the other until one has to wait; answer none when the queue ends."""
        _serving.set(True)
        rounds = self.rounds
        while self.waiting and self.rounds == rounds and not self.leaving:
            tag = self.waiting.popleft()
            try:
                result = await self._serve(tag)
            except BaseException as error:  # even SystemExit: a client waits for an answer
                if await self.leaves_to_next(error):
                    return
                result = failed(error)
            if not self.closing:
                self.complete(tag, result)
            if self.rounds == rounds:  # it need not wait: this task can do the others, too
                self._enough_tasks = 1

    async def leaves_to_next(self, error: BaseException) -> bool:
        """Tell whether nobody is told of a request's error: the next server does that request again."""
        # It may share a flush with a task that has ended with another queue
        canceled = getattr(error, "errno", 0) == errno.ECANCELED
        if canceled:
            import asyncio

            await asyncio.sleep(0)  # a round, to hear if this one leaves, too
        return self.closing or (self.leaving and canceled)

    def _begin_loop(self) -> None:
        """Have an asyncio loop wait with the ring."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        self.loop = asyncio.SelectorEventLoop(RingSelector(self))
        self.loop.set_exception_handler(self._told)
        _here.queue = self
        pool: Any = ThreadPoolExecutor(thread_name_prefix="asyncio")
        pool.submit = partial(noted, self.threads, pool.submit)
        self.loop.set_default_executor(pool)

    def _run_loop(self) -> None:
        """Run the loop, which waits by RingSelector.select(), until it is stopped."""
        try:
            self.loop.run_forever()
        except SystemExit as error:  # which asyncio lets out of a task beside the requests
            show(error)

    def _told(self, loop: Any, context: dict[str, Any]) -> None:
        """Show what failed where nobody awaits it: a callback, a task beside the requests."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
        else:
            show(error)

    def call(self, method: Callable[..., Any], *arguments: Any) -> None:
        """Call a method that may be a coroutine, and wait for its end, or until the queue is to leave."""
        outcome = method(*arguments)
        if is_awaitable(outcome):
            if self.loop is None:
                self._begin_loop()
            task = self.loop.create_task(end_of(outcome))
            task.add_done_callback(lambda _: self.loop.stop())
            while not task.done() and (self.closing or not self.leaving):
                self._run_loop()
            if task.done():
                task.result()

    def idle(self) -> None:
        """Wait a moment for the device's other queues; hear meanwhile that the server is to go."""
        if self.loop is None:
            self.collect(A_MOMENT)
        else:
            self.loop.call_later(A_MOMENT, self.loop.stop)
            self._run_loop()

    def begin(self, operation: Operation, **fields: Any) -> int:
        """Put an operation on the ring; return its number.

        fields: those of Ring.prepare(). Raises OSError (EAGAIN) where the
        kernel takes no more of them.
        """
        # The kernel takes the oldest SQE first: if few are left, the next slot is free
        if self.ring.pending >= SPARE_SLOTS:
            self.ring.enter()
        if self.ring.pending >= SPARE_SLOTS:
            raise OSError(errno.EAGAIN, "the kernel takes no more operations")
        number = self._last_operation + 1
        slot = self.own + FIXED_SLOTS + number % SPARE_SLOTS
        self.ring.prepare(slot, user_data=number, **fields)
        self._last_operation = number
        self._operations[number] = operation
        self.ring.push(slot)
        return number

    def cancel(self, number: int) -> None:
        """Have the kernel end an operation, which it may do already, soon or never."""
        try:
            self.begin(Operation(None), opcode=IORING_OP_ASYNC_CANCEL, addr=number)
        except OSError:  # EAGAIN: nobody may go on before the operation has ended
            self.loop.call_later(A_MOMENT, self.cancel, number)
        self.ring.enter()  # or its descriptor could become another file's before it is begun

    def _operation_done(self, user_data: int, result: int) -> None:
        if user_data == WAKE:  # the server is to end at once
            self.leaving = True
        elif user_data == EPOLL:
            self.watching = False
        else:
            self._operations.pop(user_data).end(result)

    def _await_news(self, user_data: int, fd: int) -> None:
        """Have a completion tell when fd becomes readable."""
        slot = self.own + user_data - OPERATION
        self.ring.prepare(
            slot, IORING_OP_POLL_ADD, fd, rw_flags=select.POLLIN, user_data=user_data
        )
        self.ring.push(slot)

    def watch(self, epoll: int) -> None:
        """Have the ring wait for what an epoll waits for."""
        self._await_news(EPOLL, epoll)
        self.watching = True

    def end_handlers(self) -> None:
        """Cancel the tasks that serve requests; wait for them and for chains, each LAST_WORDS at most."""
        import asyncio

        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            self.call(partial(asyncio.wait, tasks, timeout=LAST_WORDS))
        # Or what such a chain has yet to begin could find another file under its number
        becomes(lambda: not self._has_chains(), LAST_WORDS, self._rest)

    def _rest(self, seconds: float) -> None:
        """Hear of what ends; requests that come are for the next server."""
        self.ended.update(self.collect(seconds))

    def is_in_use(self) -> bool:
        """Tell whether a handler, or a thread that it has do something, has not ended."""
        return bool(self._tasks or self.threads)

    def wind_up(self) -> None:
        """End the tasks that still run, wait for what the kernel still does, hand in the last commits.

        It waits for LAST_WORDS at most: a write that is done later could land
        on one of the next server. To be called by the queue's own thread,
        before close().
        """
        self.leaving = self.closing = True
        deadline = time.monotonic() + LAST_WORDS
        if self.loop is not None:
            self._end_loop()
        while time.monotonic() < deadline and (
            self._operations or self.threads or self._has_chains()
        ):
            self._rest(A_MOMENT)
        self.commit()
        while self.ring.pending:
            self.ring.enter()

    def _end_loop(self) -> None:
        """End the tasks that still run."""
        import asyncio

        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()

        async def end() -> None:
            if tasks:
                await asyncio.wait(tasks)
            await self.loop.shutdown_asyncgens()

        ends = {self.loop.create_task(end())}
        self.call(partial(asyncio.wait, ends, timeout=LAST_WORDS))
        for operation in self._operations.values():
            operation.future = None  # which could call the loop
        self.loop.close()
        del _here.queue

    def close(self) -> None:
        """Close the ring, which makes the kernel take back every parked command.

        Memory that the kernel may still write to, of operations that did not
        end and of chains under way, is never given back. May be called twice,
        and by another thread where the queue's own is stuck in a handler.
        """
        self.closing = True
        if self.loop is not None:
            # One still open is a forked child's: its end would take out of the epoll,
            # which they share, what its parent waits for
            self.loop.is_closed = lambda: True
        _left_behind.extend(self._operations.values())
        if not self.chained <= self.ended:
            _left_behind.append(self.path.memory)
        with _forking:
            self.exits.close()  # before tasks can go, whose last words may touch the ring
        # What refers to the queue here would keep it, its buffers and its
        # target until the next run of the garbage collector.
        for table in (self._operations, self._tasks, self._handlers):
            table.clear()
        self.loop = self.answer = self.flushing = None


# Errors that clients do not take for one, and of which operations. By the first two io_uring
# (7.3) moves data again, without end; with the second of a FLUSH fsync() of the disk tells
# success; the third says that a file has no fsync() at all, and dd goes on.
MOVES = UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_ZONE_APPEND
MISTAKEN = {
    -errno.EAGAIN: (*MOVES, UBLK_IO_OP_FLUSH),
    -errno.EOPNOTSUPP: (*MOVES, UBLK_IO_OP_FLUSH),
    -errno.EINVAL: (UBLK_IO_OP_FLUSH,),
}

# What is not served right from a tag's buffer: requests without data, durable
# ones, shared memory.
NOT_BY_BUFFER = 0xFE | UBLK_IO_F_FUA | UBLK_IO_F_SHMEM_ZC
# What map() is not asked for: those, and requests with pages of no slot.
NOT_BY_MAP = NOT_BY_BUFFER | UBLK_IO_F_NEED_REG_BUF | UBLK_IO_F_INTEGRITY

# Requests without data: the target's method, and how many it takes of offset,
# length and unmap.
SIMPLE_OPERATIONS = {
    UBLK_IO_OP_DISCARD: ("discard", 2),
    UBLK_IO_OP_WRITE_ZEROES: ("write_zeroes", 3),
    UBLK_IO_OP_ZONE_OPEN: ("zone_open", 1),
    UBLK_IO_OP_ZONE_CLOSE: ("zone_close", 1),
    UBLK_IO_OP_ZONE_FINISH: ("zone_finish", 1),
    UBLK_IO_OP_ZONE_RESET: ("zone_reset", 1),
    UBLK_IO_OP_ZONE_RESET_ALL: ("zone_reset_all", 0),
}


# What is called where nobody can wait: a coroutine would never run.
PLAIN_METHODS = ("answer", "disown", "map", "read_metadata", "resized", "write_metadata")


# A target's handlers, and which of them others stand for.
HANDLERS = ["read", "write", "write_fua", "flush", "zone_append", "report_zones"]
HANDLERS += [name for name, _ in SIMPLE_OPERATIONS.values()]
STANDS_FOR = {
    "write_fua": ["write", "map", "answer"],
    "write_zeroes": ["write", "map"],
    "discard": ["map"],
    "map": HANDLERS[:3],
    "answer": [*HANDLERS, "map"],
}


def serves(target: Any, name: str) -> bool:
    """Tell whether a target has this method, and is to be asked by it.

    Not where a subclass has overridden since what it stands for: that would
    never be called.
    """
    others = STANDS_FOR.get(name, [])
    for layer in (target, *type(target).__mro__):
        defined = vars(layer).keys()
        if name in defined:
            break
        if not defined.isdisjoint(others):
            return False
    return hasattr(target, name)


def can_write_durably(target: Any) -> bool:
    """Tell whether a write can be durable: by write_fua(), or by a flush() behind it."""
    by_handlers = not serves(target, "answer")
    return serves(target, "write_fua") or (by_handlers and hasattr(target, "flush"))


def takes_unmap(function: Any) -> bool:
    """Tell whether a target's write_zeroes wants to know if the blocks may be given back."""
    try:
        inspect.signature(function).bind(0, 0, True)
    except TypeError:
        return False
    return True


PR_SET_PDEATHSIG = 1
PR_SET_IO_FLUSHER = 57
CAP_SYS_ADMIN = 1 << 21
MAX_DISCARD = 1 << 30  # bytes a single discard or write-zeroes may cover
NODE_TIMEOUT = 30.0  # seconds udev, whose rule runs a Python, has to make a device node usable
STOP_TIMEOUT = 30.0  # seconds the handlers have to end what they are doing
# Seconds the kernel may take to notice that a server is gone; from 6.8 to 6.15 a
# request's time must be up where that had every tag
SERVER_TIMEOUT = 40.0
PASSING = 3.0  # seconds somebody may look at a disk without being taken for its user
# At every disk, for what is on it
LOOKERS = ("(udev-worker) ", "systemd-udevd ", "udevd ", "partx ")
LAST_BREATH = 3.0  # seconds that a server which was told to go, or killed, may live
GRACE = 2.0  # seconds a handler has to return when its worker is told to leave

# What a Device has come to. It goes up from NEW to LIVE, by ADDING and ADDED where
# it makes a disk, by MAPPED where it recovers one, and down to GONE from wherever
# it is; by LEFT where the disk is to stay.
NEW = "new"
STARTING = "starting"  # it has asked the kernel for nothing that lasts
ADDING = "adding"  # the kernel was asked for a device: its identity tells whether it is there
ADDED = "added"  # the device is there, and ours to delete
MAPPED = "mapped"  # the disk is not served yet, but up to 6.15 nobody else's any more
LIVE = "live"  # so is the disk
LEFT = "left"  # the disk is the next server's
GONE = "gone"  # the device is gone, or is not ours any more

# What a Worker has come to between NEW and LEFT, when its queue is served no more.
STARTED = "started"  # the target's start() has returned
FETCHED = "fetched"  # its tags are parked

RECOVERY_MODES = {
    None: 0,
    "requeue": UBLK_F_USER_RECOVERY,
    "reissue": UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
    "fail": UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
}

# Name of a checksum -> its number, and how many bytes of metadata a block must
# have for it.
CHECKSUMS = {
    "none": (LBMD_PI_CSUM_NONE, 1),
    "ip": (LBMD_PI_CSUM_IP, 8),
    "crc": (LBMD_PI_CSUM_CRC16_T10DIF, 8),
    "crc64": (LBMD_PI_CSUM_CRC64_NVME, 16),
}


def refuse(wrong: object, what: str, reason: str, remedy: str = "choose another") -> None:
    """Raise UblkError (EINVAL) for what cannot be had, if something is wrong with it."""
    if wrong:
        raise UblkError(errno.EINVAL, what, reason, remedy)


def pick(table: dict[Any, Any], what: str, name: object) -> Any:
    """Return the row called name; UblkError (EINVAL) that tells all names where there is none."""
    refuse(
        name not in table,
        f"{what} {name!r}",
        "there is none so called",
        f"choose one of {', '.join(filter(None, table))}",
    )
    return table[name]


def check_limits(device: Device) -> None:
    """Raise UblkError (EINVAL) for a number no disk can have.

    The kernel checks most of them, but the oldest do not check all, and none
    says which one it was.
    """
    for name, value, least, most in (
        ("id", device.id, -1, MAX_DEVICES - 1),
        ("queues", device.queues, 1, UBLK_MAX_NR_QUEUES),
        ("depth", device.depth, 1 + device.batch, UBLK_MAX_QUEUE_DEPTH),
        ("largest request", device.max_io, PAGE_SIZE, 1 << UBLK_IO_BUF_BITS),
        ("block size", device.target.block_size, SECTOR, PAGE_SIZE),
        ("size", device.target.size, SECTOR, (1 << 63) - 1),
        ("boundary", device.target.boundary, 0, ((1 << 32) - 1) * SECTOR),
        ("zone size", getattr(device.target, "zone_size", 0), 0, ((1 << 32) - 1) * SECTOR),
        ("discard granularity", device.target.discard_granularity, 0, (1 << 32) - 1),
        ("dma alignment", device.target.dma_alignment, 0, PAGE_SIZE),
        ("max_segments", device.target.max_segments, 0, (1 << 16) - 1),
        ("max_segment_size", device.target.max_segment_size or 4096, 4096, (1 << 32) - 1),
    ):
        what = f"{name} {value}"
        refuse(not isinstance(value, int), what, f"a {type(value).__name__}", "make it an int")
        refuse(not least <= value <= most, what, f"not a number from {least} to {most}")


def params_of(target: Any, max_io: int) -> Any:
    """Return the parameters of a disk, a ublk_params made from a target's attributes.

    max_io is the largest request in bytes. Raises UblkError (EINVAL) for a size
    or a block size that none can have.
    """
    block = target.block_size
    physical = max(target.physical_block_size, target.block_size)
    refuse(block & (block - 1), f"block size {block}", "not a power of two")
    for what, value in ("size", target.size), ("boundary", target.boundary):
        refuse(value % block, f"{what} {value}", f"not a multiple of the block size {block}")
    flushes = hasattr(target, "flush")
    zoned = hasattr(target, "zone_size")
    durable = flushes and can_write_durably(target)
    discards = serves(target, "discard")
    zeroes = serves(target, "write_zeroes")
    attrs = (
        UBLK_ATTR_READ_ONLY * bool(target.read_only)
        | UBLK_ATTR_ROTATIONAL * bool(target.rotational)
        | UBLK_ATTR_VOLATILE_CACHE * flushes
        | UBLK_ATTR_FUA * durable
    )
    params = ublk_params(
        types=UBLK_PARAM_TYPE_BASIC,
        basic=ublk_param_basic(
            attrs=attrs,
            logical_bs_shift=block.bit_length() - 1,
            physical_bs_shift=physical.bit_length() - 1,
            io_min_shift=physical.bit_length() - 1,
            max_sectors=max_io // SECTOR,
            dev_sectors=target.size // SECTOR,
            chunk_sectors=(target.zone_size if zoned else target.boundary) // SECTOR,
        ),
    )
    if zoned:
        params.types |= UBLK_PARAM_TYPE_ZONED
        params.zoned = ublk_param_zoned(
            max_open_zones=target.max_open_zones,
            max_active_zones=target.max_active_zones,
            max_zone_append_sectors=min(target.max_append, max_io) // SECTOR,
        )
    if target.dma_alignment:
        params.types |= UBLK_PARAM_TYPE_DMA_ALIGN
        params.dma.alignment = target.dma_alignment - 1
    if target.max_segments or target.max_segment_size:
        params.types |= UBLK_PARAM_TYPE_SEGMENT
        params.seg.seg_boundary_mask = (1 << 63) - 1
        params.seg.max_segment_size = target.max_segment_size or (1 << 32) - 1
        params.seg.max_segments = target.max_segments or (1 << 16) - 1
    if target.metadata_size:
        params.types |= UBLK_PARAM_TYPE_INTEGRITY
        params.integrity = integrity_of(target)
    if discards or zeroes:
        params.types |= UBLK_PARAM_TYPE_DISCARD
        params.discard = ublk_param_discard(
            discard_granularity=target.discard_granularity or block,
            max_discard_segments=1,
            max_discard_sectors=MAX_DISCARD // SECTOR * discards,
            max_write_zeroes_sectors=MAX_DISCARD // SECTOR * zeroes,
        )
    return params


def integrity_of(target: Any) -> Any:
    """Return the parameters of a disk's metadata, as ublk_param_integrity.

    The kernel's tuple (checksum and reference tag) lies first, then what
    clients like. Raises UblkError (EINVAL) for a size that the checksum does
    not fit in.
    """
    number, least = pick(CHECKSUMS, "checksum", target.checksum)
    refuse(
        not least <= target.metadata_size <= 255,
        f"metadata of {target.metadata_size} bytes",
        f"not a number from {least} to 255, as {target.checksum} wants it",
    )
    refuse(
        hasattr(target, "zone_size"), "metadata on a zoned disk", "not supported", "do without"
    )
    return ublk_param_integrity(
        flags=LBMD_PI_CAP_INTEGRITY | (LBMD_PI_CAP_REFTAG if number else 0),
        csum_type=number,
        interval_exp=target.block_size.bit_length() - 1,
        metadata_size=target.metadata_size,
    )


class Worker(threading.Thread):
    """The thread that serves one queue, and never leaves a deaf one behind.

    state tells what it has come to (NEW, STARTED, FETCHED, LEFT), closes whether
    it is closing the target, given_up whether nobody waits for it any longer.
    """

    def __init__(self, device: Device, index: int, cpus: set[int]) -> None:
        super().__init__(name=f"ublk{device.id}q{index}", daemon=True)
        self.device = device
        self.index = index
        self.cpus = cpus
        self.queue: Queue | None = None  # until it is closed
        self.state = NEW
        self.closes = self.given_up = False
        self._closing = threading.Lock()  # held by who closes the queue

    def run(self) -> None:
        """Serve, leave, and report what went wrong first."""
        failure = None
        for step in self.serve, self.close_queue, self.leave:
            try:
                step()
            except BaseException as error:
                failure = failure or error
        self.device.report(self, None if self.given_up else failure)

    def serve(self) -> None:
        """Serve the queue until the device ends."""
        io_flusher()
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        kind = BatchQueue if self.device.info.flags & UBLK_F_BATCH_IO else Queue
        if self.device.trace:
            kind = TracedBatchQueue if kind is BatchQueue else TracedQueue
        queue = self.queue = kind(self.device, self.index)
        try:
            if hasattr(self.device.target, "start"):
                queue.call(self.device.target.start, self.index)
            self.state = STARTED
            while not (self.device.descriptors or queue.leaving):
                queue.idle()
            queue.collect(0)
            if queue.leaving:  # before a request could come, to be lost
                return
            queue.look_at(self.device)
            if self.device.partx_scans:
                set_admin(False)
            queue.fetch()
            if self.device.partx_scans:
                set_admin(True)
            # To a disk that is recovered requests may come at once
            self.device.used |= self.device.recovers
            self.state = FETCHED
            queue.run()
        finally:
            if not self.given_up:
                self.end(queue)

    def end(self, queue: Queue) -> None:
        """End the queue's loop; with the last one, a target whose close() needs it."""
        queue.leaving = queue.closing = True
        alone = True
        try:
            # Up to 6.12 this thread would be given what comes as its ring goes, if it
            # still could: requests that then are nobody's, and never end
            if not (self.device.control.features or 0) & UBLK_F_USER_RECOVERY_FAIL_IO:
                queue.ring.keep_to_the_end()
            close = getattr(self.device.target, "close", None)
            if inspect.iscoroutinefunction(close):
                queue.end_handlers()  # which could use files that are closed
                if self.device.last_to_leave(self):
                    self.closes = True
                    # So may threads, and tasks of the other queues, until they have ended
                    alone = becomes(
                        lambda: self.device.serving == {self} and not queue.threads, GRACE
                    )
                    if alone and self.device.used and not queue.is_in_use():
                        queue.call(close)
        finally:
            self.closes = False
            try:
                queue.wind_up()
            finally:
                if queue.is_in_use() or not alone:
                    # But by them, who knows how long: it is not closed
                    self.device.used = False
                    self.stays_open()
            if queue.failure is not None:
                raise queue.failure

    def leave(self) -> None:
        """Close the target behind the last queue: none uses its files any more."""
        close = getattr(self.device.target, "close", bool)
        if self.device.last_to_leave(self) and not inspect.iscoroutinefunction(close):
            at_once(close())

    def give_up(self) -> None:
        """Wait for its end, but not for a handler that does not return: its requests fail.

        A queue that is being made, for it has the node's number, and the
        target's close() have the time they need.
        """
        queue = self.queue
        if queue is not None:  # it may be busy with many requests, and hear of nothing else
            queue.leaving = True
        heard = -1
        while self in self.device.serving and not self.given_up:
            rounds = getattr(self.queue, "rounds", 0)  # in a handler it makes none
            if self.closes or (self.queue is None and self.is_alive()) or rounds != heard:
                heard = rounds
                patience = GRACE  # counted down, as the whole process may be stopped meanwhile
            elif patience < 0:
                self.stays_open()
                break
            time.sleep(A_MOMENT)
            patience -= A_MOMENT
        with self._closing:
            if self.queue is not None:
                self.given_up = True
                self.queue.path.abandon()
        self.close_queue()

    def stays_open(self) -> None:
        """Tell that somebody still uses the target, also at the end of the process."""
        say(f"{self.device.name}: its target does not return, and stays open")
        _left_behind.append(self.device.target)

    def close_queue(self) -> None:
        """Close the queue, unless that is done."""
        with self._closing:
            if self.queue is not None:
                self.queue.close()
                self.queue = None


@dataclasses.dataclass(eq=False, repr=False)
class Device:
    """A disk and its server. ``with Device(target) as disk:`` is LIVE inside and gone after.

    target: the Target behind it.
    id: the N of /dev/ublkbN; -1: the first that is free.
    queues: hardware queues, each with a thread of its own.
    depth: requests that each carries at a time.
    max_io: the largest request in bytes.
    recovery: None, "requeue", "reissue" or "fail": what becomes of the disk and
        its requests when the server dies.
    unprivileged: an ordinary user's device; by itself for whoever lacks
        CAP_SYS_ADMIN.
    partition_scan: whether partitions are looked for.
    data_path: a name in DATA_PATHS; by itself the fastest possible. Of a disk
        that is served: what it stands for there.
    batch: commands for many requests at a time (7.0).
    share_memory: allow share(); not with recovery.
    force: even where this kernel is known to crash.
    trace: called with each thing the disk does: trace(ns, stage, more), see Trace.
    words: what to note in the state file as target, arguments and options.

    Give all but the target by name. state tells what has become of it (NEW to
    GONE), path and id where the disk is, info what the kernel granted (a
    ublksrv_ctrl_dev_info), failure the error that ended its server. Raises
    UblkError when the kernel refuses; nothing is left behind then. A Device
    lives once.
    """

    target: Target
    id: int = -1
    queues: int = 1
    depth: int = 128
    max_io: int = 512 << 10
    recovery: str | None = None
    unprivileged: bool | None = None
    partition_scan: bool = True
    data_path: Any = None
    batch: bool = False
    share_memory: bool = False
    force: bool = False
    trace: Any = None
    words: Any = None

    def __post_init__(self) -> None:
        if self.unprivileged is None:
            self.unprivileged = not privileged()
        if self.trace is not None:
            self.trace = Trace(self.trace)
        self.take(self.target, self.words)
        self.follows = False  # whether somebody calls follow_size() again and again
        self.size = 0  # the disk's
        self.identity = 0  # what tells it from any other of its number, once there is one
        self.info = ublksrv_ctrl_dev_info()
        self.char_fd = self.wake_fd = self.wake_write = -1
        self.descriptors: list[mmap.mmap] = []  # of every queue's requests, or none
        # /dev/ublkcN, what is mapped of it, and the ends of the pipe that wakes
        self._files: list[Any] = []
        # Of each queue: views of its own, see zeroes(), of memory shared with clients, by its index
        self.shared: list[dict[int, memoryview]] = []
        self.failure: UblkError | None = None
        self.interrupted = ""  # why it is to end, where somebody has said so
        self.state = NEW
        self.recovers = False  # whether the disk was there before
        self.used = False  # whether a request may have come, so that the target is to be closed
        self.control: Any = None  # the control plane, from the start to the end
        self._workers: list[Worker] = []
        # Those that were told to begin and have not ended. A Thread itself may
        # not know, where a signal's handler raised in start() or join().
        self.serving: set[Worker] = set()
        self._changing = False  # whether a thread changes the state
        self._make_locks()
        # Free once the end has come. A lock may be released by a signal's
        # handler; an Event or a Condition may not be touched by one, nor be
        # left by an exception that it raises.
        self._over = threading.Lock()
        self._over.acquire()
        _devices.add(self)  # before any thread can have its locks, or a target's start() fork

    def take(self, target: Any, words: Any) -> None:
        """Have a target be the one behind the disk; words: those that made it."""
        for name in PLAIN_METHODS:
            refuse(
                inspect.iscoroutinefunction(getattr(target, name, None)),
                f"{name}() of a target",
                "it is an async def, for which nobody waits",
                "make it a plain def",
            )
        self.target = target
        self.flushing = Flushing(lambda: target.flush())
        self.words = words or (type(target).__name__, [], {})
        self.zoned = hasattr(target, "zone_size")
        self.directory = ""  # where the words may name files
        self.files: list[list[Any]] = []  # what tells those it is made of from others
        # Now, as others may get their names while they are served
        with contextlib.suppress(OSError):  # of one that start() makes
            self.directory = os.getcwd()
            self.files = identities(self)

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # held for a moment, while workers end
        self._life = threading.RLock()  # held by the one thread that changes the state
        self._changes = threading.RLock()  # held while memory is shared, or the size changes

    def __enter__(self) -> Device:
        if self.state is not LIVE:
            self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.stop()
        except UblkError as error:
            if kind is None:
                raise
            say(str(error))  # what went wrong first matters more

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"device {self.id}" if self.id >= 0 else "a new device"

    @property
    def path(self) -> str:
        """The block device, /dev/ublkbN."""
        return f"/dev/ublkb{self.id}"

    @property
    def partx_scans(self) -> bool:
        """Whether partx looks for partitions instead of the kernel, which does so quietly since 7.0."""
        # Up to 6.x it reads them inside START_DEV. If the server is killed in
        # that moment, START_DEV never ends, nor does anything else about the
        # device. No disk is scanned that a thread without CAP_SYS_ADMIN serves,
        # an ordinary user's never; so the threads fetch without it.
        return (
            not self.unprivileged
            and not (self.control.features or 0) & UBLK_F_NO_AUTO_PART_SCAN
        )

    @property
    def desc_size(self) -> int:
        """Bytes from one request descriptor to the next; only the flag says the field is valid."""
        return self.info.io_desc_size if self.info.flags & UBLK_F_IO_DESC_SIZE else IO_DESC.size

    # ---- from nothing to a disk ------------------------------------------------------------------

    def start(self) -> None:
        """Create the device, serve it and wait until the disk is there.

        Raises UblkError, or what the target's start() raised; whatever the
        kernel has of the device by then is deleted again. EINTR: interrupt()
        was called meanwhile. EALREADY: it was started before.
        """
        check_limits(self)
        what, remedy = danger()
        refuse(
            what and not self.force,
            f"Linux {os.uname().release}",
            what,
            f"{remedy}, or --force it",
        )
        shape = partial(self._shape, params_of(self.target, self.max_io))
        begin = self._add, self._open, shape
        self._alone(self._go_up, *begin, self._serve, self._map, self._go_live, self._scan)

    def _alone(self, change: Callable[..., None], *words: Any) -> None:
        """Change the state; every other thread that would has to wait.

        Nothing is done where a signal's handler comes in between: what it has
        interrupted goes on.
        """
        with self._life:
            if self._changing:
                return
            try:
                self._changing = True
                change(*words)
            finally:
                self._changing = False

    def _go_up(self, *steps: Callable[[], object]) -> None:
        """Take the steps to a disk. If one fails, go down again, and raise what it failed of."""
        # START_DEV after STOP_DEV on one open node crashes older kernels
        if self.state is not NEW:
            raise UblkError(
                errno.EALREADY, self.name, "this Device was started before", "make a new Device"
            )
        self.control = TracedControl(self.trace) if self.trace else Control()
        self.control.enough = partial(self._pause, 0)
        self.state = STARTING
        atexit.register(self.__exit__, SystemExit)
        try:
            for step in steps:
                step()
            self._pause(0)
            self.state = LIVE
            self.control.enough = bool
        except BaseException as error:
            self.control.enough = bool  # first of all, or no command could undo anything
            cause = error
            if isinstance(error, OSError):
                cause = self.failure or self._named(error)
            go_down = self._leave if self.recovers else self._take_away
            try:
                go_down()
            except UblkError as another:
                if another is not cause:
                    say(str(another))
            raise cause from cause.__cause__

    def _pause(self, seconds: float) -> None:
        """Sleep, unless the end comes: then raise why."""
        if self.wait(seconds):
            number = errno.EINTR if self.interrupted else errno.ENODEV
            reason = f"{self.interrupted or 'it was stopped'} before the disk was there"
            raise self.failure or UblkError(number, self.name, reason, "see `ublk.py list`")

    def _add(self) -> None:
        """ADD_DEV; what the kernel drops without a word becomes an error."""
        flags = self._flags()
        check_flags(flags, self.control.features)
        self.identity = self.identity or new_identity(self.follows)
        self.state = ADDING
        self.info = self.control.add_dev(
            self.id, self.queues, self.depth, self.max_io, flags, self.identity
        )
        self.id = self.info.dev_id
        self.state = ADDED
        require(flags & ~self.info.flags)

    def _open(self) -> None:
        """Open /dev/ublkcN. Only from here on can the number no longer become another's."""
        await_node(f"{NODE}{self.id}", os.R_OK | os.W_OK, self._pause)
        # A file, not a number, which a signal's exception could lose
        self._files.append(open_char(self.id, pause=self._pause))
        self.char_fd = self._files[0].fileno()
        self._see_that_it_is_ours()

    def _shape(self, params: Any) -> None:
        """SET_PARAMS; what the kernel drops without a word becomes an error."""
        forget_state(self.id)  # of an earlier device of that number, and its log
        self.size = self.target.size
        params.basic.max_sectors = self.info.max_io_buf_bytes // SECTOR
        self.control.set_params(self.id, params)
        lost = params.types & ~self.control.get_params(self.id).types
        # Unknown where there is no zero copy: nobody needs it
        lost &= ~UBLK_PARAM_TYPE_DMA_ALIGN
        for kind in PARAM_TYPES:
            if lost & kind:
                raise newer_kernel(f"parameters {kind.name}", kind.since)

    def _see_that_it_is_ours(self) -> None:
        """Refuse to go on where there is no such device, or another that has its number by now."""
        gone = self.state in (NEW, GONE) or not is_same(self.control, self.id, self.identity)
        refuse(gone, self.name, "it is gone, or not there yet", "see `ublk.py list`")

    def _flags(self) -> int:
        """Return the feature flags to ask for."""
        known = self.control.features or 0
        refuse(
            self.unprivileged and privileged(),
            "an unprivileged device",
            "this process has CAP_SYS_ADMIN",
            "run as an ordinary user, or without -p",
        )
        path = pick(DATA_PATHS, "data path", self.data_path or self._best_path(known))
        flags = path.features | pick(RECOVERY_MODES, "recovery", self.recovery)
        # Or a driver that is no module, as 6.1's may be, copies requests for a thread whose ring
        # and buffers are gone.
        flags |= UBLK_F_URING_CMD_COMP_IN_TASK
        # The kernel would tell of memory that the next server does not have.
        refuse(
            self.share_memory and self.recovery,
            "a disk that outlives its server",
            "not possible with shared memory",
            "choose one of them",
        )
        # The kernel would flush behind a durable write; where the server goes meanwhile,
        # that waits for its tag, and the driver for that write (seen on 6.12 and 7.3).
        refuse(
            self.recovery
            and hasattr(self.target, "flush")
            and not can_write_durably(self.target),
            "a disk that outlives its server",
            "its target has an answer() and a flush(), and no write_fua()",
            "define write_fua() beside it, and have answer() make durable what has UBLK_IO_F_FUA",
        )
        # It ends an append before it takes down where that landed (seen on 7.3).
        refuse(
            self.zoned and self.batch and path is AutoZeroCopy,
            "a zoned disk with batches and auto-zero-copy",
            "the driver loses where appends land",
            "choose another data path",
        )
        refuse(
            self.recovery == "reissue" and hasattr(self.target, "zone_append"),
            "a zoned disk with reissue",
            "what is sent again would be appended twice",
            "take requeue",
        )
        for feature, wanted in (
            (UBLK_F_ZONED, self.zoned),
            (UBLK_F_BATCH_IO, self.batch),
            (UBLK_F_SHMEM_ZC, self.share_memory),
            (UBLK_F_INTEGRITY, self.target.metadata_size),
            (UBLK_F_UNPRIVILEGED_DEV, self.unprivileged),
            # With batches it fails what arrives meanwhile (seen on 7.3), which it
            # is there to avoid.
            (UBLK_F_QUIESCE & known, self.recovery and not self.batch),
            (UBLK_F_NO_AUTO_PART_SCAN & known, not self.partition_scan),
        ):
            flags |= feature if wanted else 0
        return flags

    def _best_path(self, known: int) -> str:
        """Return the fastest data path that target, kernel and privileges allow."""
        if self.zoned or self.target.metadata_size:
            return "user-copy"
        maps = serves(self.target, "map") and not self.unprivileged
        names = ("auto-zero-copy", "zero-copy") if maps else ()
        return next((name for name in names if not DATA_PATHS[name].features & ~known), "copy")

    def _serve(self) -> None:
        """Start a worker for each queue. Ends when the target has started in all."""
        self.data_path = next(
            path for path in DATA_PATHS.values() if path.features & ~self.info.flags == 0
        )
        ends = os.pipe()
        self._files += open(ends[0], "rb", 0), open(ends[1], "wb", 0)
        self.wake_fd, self.wake_write = ends  # which a Ctrl-C before would have closed
        for index in range(self.info.nr_hw_queues):
            cpus = self.control.get_queue_affinity(self.id, index)
            self._workers.append(Worker(self, index, cpus & os.sched_getaffinity(0)))
            self.shared.append({})
        for worker in self._workers:
            try:
                self.serving.add(worker)
                worker.start()
            except RuntimeError as error:
                del self._workers[worker.index :]  # who never end
                raise UblkError(
                    errno.EAGAIN,
                    f"the server of {self.name}",
                    str(error),
                    "allow more threads (ulimit -u, pids.max)",
                ) from None
        while not self._all(STARTED):
            self._pause(0.005)

    def _map(self) -> None:
        """Map the request descriptors of every queue.

        What can fail, fails before: up to 6.15 nobody can recover a disk whose
        server has mapped some and ended then.
        """
        size = whole_pages(self.info.queue_depth * self.desc_size)
        apart = whole_pages(UBLK_MAX_QUEUE_DEPTH * self.desc_size)
        with contextlib.ExitStack() as reserved:
            # Python's mmap takes a descriptor each: if one is lacking, none is to be mapped
            files = [reserved.enter_context(open(os.devnull)) for _ in self._workers]
            if self.recovers:
                self.state = MAPPED
            for index, file in enumerate(files):
                file.close()
                # No name for it: a Ctrl-C's traceback would keep it from being closed
                self._files.append(map_descriptors(self.char_fd, self.id, size, index * apart))
        self.descriptors = self._files[-len(files) :]  # for which the workers wait

    def _all(self, state: str) -> bool:
        """Tell whether every worker has come to that state."""
        return all(worker.state is state for worker in self._workers)

    def report(self, worker: Worker, failure: BaseException | None) -> None:
        """Hear that a worker has ended, of what failure if any.

        One that failed leaves a device that is deaf: the others are told to
        end, too. When all have, the node is closed: then the kernel fails the
        requests that died with a worker, and another server may come.
        """
        if failure is not None:
            self.failure = self.failure or self._named(failure)
            self._wake_workers()
        self.serving.discard(worker)
        # An idle queue leaves a quiesced disk before one that is busy
        if not self.serving or self.failure or self.state is not LIVE:
            self._end_waits()
        # None may be about to begin, either, while the disk starts
        if not self.serving and self._all(LEFT):
            self._close_files()

    def _named(self, failure: BaseException) -> UblkError:
        """Return what to tell of a worker's failure."""
        if isinstance(failure, UblkError):
            return failure
        told = traceback.format_exception_only(type(failure), failure)[-1].strip()
        reason = getattr(failure, "strerror", "") or told
        what = getattr(failure, "filename", "") or f"the server of {self.name}"
        error = UblkError(-failed(failure), what, reason)
        error.__cause__ = failure
        return error

    def last_to_leave(self, worker: Worker) -> bool:
        """Hear from a worker that its queue is served no more.

        Returns whether it is the last to leave a target that is to be closed.
        None that was given up is: the next server may have its files by now.
        """
        with self._lock:
            worker.state = LEFT
            return self.used and not worker.given_up and self._all(LEFT)

    def _wake_workers(self) -> None:
        """Tell every queue to leave its loop; a worker's report may close the pipe meanwhile."""
        with self._lock:
            if self.wake_write >= 0:
                os.write(self.wake_write, b"!")

    def _go_live(self) -> None:
        """START_DEV or END_USER_RECOVERY, and the state file.

        That is written when all tags are fetched, or another server's words
        would be lost.
        """
        while not self._all(FETCHED):
            self._pause(0.005)
        save_state(self)
        command = self.control.end_user_recovery if self.recovers else self.control.start_dev
        command(self.id, os.getpid())
        self.used = True
        await_node(self.path, os.R_OK, self._pause)

    def _scan(self) -> None:
        """Have partx(8), which every Linux has, look for partitions where the kernel does not."""
        if not self.partx_scans or self.zoned or not self.partition_scan:
            return
        import subprocess

        try:
            scanner = subprocess.Popen(
                ["partx", "--add", self.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            say(
                "note: partitions are not looked for: there is no partx(8), which is in util-linux"
            )
            return
        # A handler may never return
        becomes(lambda: scanner.poll() is not None, 10.0, self._pause)

    # ---- from a disk without a server back to one with -------------------------------------------

    @classmethod
    def recover(cls, id: int, target: Target, **options: Any) -> Device:
        """Serve a device whose server is gone, and return it LIVE.

        options are those of Device(). Waits until the kernel has noticed the
        old server's end. Nothing about the disk changes: the target must be at
        least as large. Raises UblkError: ENODEV, EBUSY where its server lives,
        EINVAL where it was not made to be recovered or the target does not fit;
        the disk stays as it is then. From Linux 6.1 on.
        """
        device = cls(target, id=id, **options)
        device.resume()
        return device

    def resume(self, prepare: Callable[[], object] = bool) -> None:
        """What recover() does, for a Device that was not started.

        prepare: called when no other server can have the disk any more.
        """
        self.recovers = True
        begin = self._await_end_of_server, self._open, prepare, self._adopt, self._serve
        # Once more, as the target may have taken its time
        self._alone(self._go_up, *begin, self._look, self._map, self._go_live)

    def _adopt(self) -> None:
        """Have the target be as the disk is."""
        params = self.control.get_params(self.id)
        basic = params.basic
        kept = params.integrity.metadata_size
        given = self.target.metadata_size
        block = 1 << basic.logical_bs_shift
        attrs = basic.attrs
        flushes = hasattr(self.target, "flush")
        durable = can_write_durably(self.target)
        boundary = getattr(self.target, "zone_size", self.target.boundary)
        chunk = basic.chunk_sectors * SECTOR
        for another, reason in (
            (
                boundary != chunk,
                f"the target has a boundary every {boundary} bytes, the disk every {chunk}",
            ),
            (
                given != kept,
                f"the target has {given} bytes of metadata beside a block, the disk {kept}",
            ),
            (
                self.target.block_size > block,
                f"the target has blocks of {self.target.block_size} bytes, the disk of {block}",
            ),
            (
                self.target.read_only and not attrs & UBLK_ATTR_READ_ONLY,
                "the target can only be read, and the disk be written to",
            ),
            (
                flushes and not attrs & (UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_READ_ONLY),
                "the target has a flush(), which the kernel would not call",
            ),
            (
                attrs & UBLK_ATTR_FUA and not durable,
                "the kernel would send durable writes, which the target has no way to do",
            ),
        ):
            refuse(another, f"cannot recover {self.name}", reason, "give it the target it had")
        size = basic.dev_sectors * SECTOR
        if self.target.block_size != block:
            self.target.block_size = block
        if self.target.size != size:
            fit(self.target, size)
        self.size = size

    def _look(self) -> None:
        """See what the device is, and refuse one that waits for no server."""
        what = f"cannot recover {self.name}"
        info = self.info = self.control.get_dev_info(self.id)
        self.identity = self.identity or info.ublksrv_flags
        self._see_that_it_is_ours()
        refuse(
            not info.flags & UBLK_F_USER_RECOVERY,
            what,
            "it was not made to be recovered",
            f"delete it (`ublk.py del {self.id}`) and create it with -r",
        )
        refuse(
            info.state == UBLK_S_DEV_DEAD,
            what,
            "it is stopped",
            f"delete it: `ublk.py del {self.id}`",
        )

    def _await_end_of_server(self) -> None:
        """START_USER_RECOVERY, as soon as the kernel allows it."""
        begun = time.monotonic()
        while True:
            self._look()
            info = self.info
            # This process lives on, also where it was the server
            lives = alive(info.ublksrv_pid) and info.ublksrv_pid != os.getpid()
            patience = LAST_BREATH if lives else SERVER_TIMEOUT
            late = time.monotonic() > begun + patience
            if info.state != UBLK_S_DEV_LIVE:
                self._see_that_queues_are_alike()
            try:
                if info.state != UBLK_S_DEV_LIVE or late:
                    return self.control.start_user_recovery(self.id)
            except UblkError as error:
                if error.errno == errno.EINVAL:  # up to 6.15: prepared by an earlier attempt
                    return None
                if error.errno != errno.EBUSY or late:
                    raise
            self._pause(0.02)

    def _see_that_queues_are_alike(self) -> None:
        """Refuse (EBUSY) to recover a disk of which some queues had a server, and some had none.

        START_USER_RECOVERY crashes Linux 6.7 to 6.15 then.
        """
        queues = range(self.info.nr_hw_queues)
        if len(queues) == 1 or (self.control.features or 0) & UBLK_F_QUIESCE:
            return
        with (
            open_char(self.id, pause=self._pause) as node,
            contextlib.closing(Ring(len(queues))) as ring,
        ):
            self._see_that_it_is_ours()  # that may have taken its time
            for index in queues:
                # EINVAL is told of a queue that is another's before that this is no command
                ring.prepare(
                    index,
                    IORING_OP_URING_CMD,
                    node.fileno(),
                    NO_COMMAND,
                    cmd=IO_CMD.pack(index, 0, 0, 0),
                )
            ring.push_all(queues)
            ring.enter(len(queues))
            left = ring.reap()[1].count(-errno.EINVAL)
        if left not in (0, len(queues)):
            raise served_already(self.id)

    # ---- the end ---------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has ended, or is to end; tell whether that is so.

        timeout: seconds, None: without end. It ends because somebody stopped
        the disk, a queue failed, or interrupt() was called.
        """
        over = self._over.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        if over:
            self._end_waits()
        return over

    def _end_waits(self) -> None:
        with contextlib.suppress(RuntimeError):  # they have ended before
            self._over.release()

    def interrupt(self, reason: str) -> None:
        """Have wait() return, and a start() that is under way fail for this reason.

        All that a signal's handler may do with a Device; whoever waits then has
        to stop() it.
        """
        self.interrupted = self.interrupted or reason
        self._end_waits()

    def share(self, memory: mmap.mmap, read_only: bool = False) -> int:
        """Share memory with clients (7.1): direct I/O from and to these pages is not copied.

        memory: a mapping of a memfd that clients map too, whole pages.
        read_only: only for their writes. Returns its index for unshare().
        Raises UblkError; needs share_memory=True.
        """
        self._see_that_it_is_ours()
        with self._changes:
            index = self.control.reg_buf(self.id, address_of(memory), len(memory), read_only)
            for memories in self.shared:
                memories[index] = memoryview(memory)
        return index

    def unshare(self, index: int) -> None:
        """End what share() began. Raises UblkError."""
        self._see_that_it_is_ours()
        with self._changes:  # the driver may give its index to another
            try:
                self.control.unreg_buf(self.id, index)
            finally:  # also where a Ctrl-C comes behind what the driver has done
                for memories in self.shared:
                    memories.pop(index, memoryview(b"")).release()

    def resize(self, size: int) -> None:
        """Change the size of the disk while it is in use, in bytes (6.16).

        Raises UblkError: EOPNOTSUPP before that, EINVAL for a size the disk
        cannot have.
        """
        with self._changes:
            self._see_that_it_is_ours()
            check_new_size(self.control, self.id, size)
            grows = size > self.size
            if grows:
                fit(self.target, size)  # before the first request for what is new
            self._update_size(size)
            if not grows:
                fit(self.target, size)
            self._note_size(size)

    def _update_size(self, size: int) -> None:
        self._see_that_it_is_ours()  # the target may have taken its time
        self.control.update_size(self.id, size)

    def follow_size(self) -> None:
        """Where somebody else changed the disk's size, have the target follow.

        Or change the size back, where the target cannot. To be called now and
        then.
        """
        size = disk_size(self.id)
        if size in (0, self.size) or self.state is not LIVE:
            return
        if not is_same(self.control, self.id, self.identity):  # it is another disk's
            return
        try:
            fit(self.target, size)
        except Exception as error:
            say(f"{self.name}: the target cannot have {size} bytes: {error_line(error)}")
            try:
                self._update_size(self.size)
            except UblkError as left:
                say(f"{self.name} keeps a size its target does not have: {left}")
                self.size = size  # not to try again for ever
            return
        self._note_size(size)

    def _note_size(self, size: int) -> None:
        """Note the size that disk and target have, also in the state file: `resize` looks there."""
        self.size = size
        try:
            self._see_that_it_is_ours()
            save_state(self)
        except OSError as error:
            say(f"{self.name}: {error_line(error)}")

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Take the disk away and delete the device; harmless when it is gone already.

        A disk made to outlive its server, which has failed or was quiesced, is
        left to the next one. Handlers get timeout seconds to end what they are
        doing, then their requests fail; the target's close() gets the time it
        needs. Any thread may call it, but those of the handlers. Raises
        UblkError: what ended the server before, or that close() failed of; or
        EBUSY that names who still holds the disk open: the device goes when
        they close it.
        """
        self._refuse_handlers()
        self.interrupt("stopped")
        self._alone(self._take_away, timeout)

    def detach(self) -> None:
        """End the server but not the device.

        It waits for a new server if it was made to be recovered, and is DEAD
        otherwise. Any thread may call it, but those of the handlers. Raises
        UblkError: what ended the server before, or the target's close() failed
        of.
        """
        self._refuse_handlers()
        self._alone(self._leave)

    def _leave(self) -> None:
        """Go down to GONE, and leave the disk as it is."""
        if self.state is LIVE:
            self.state = LEFT
        self._let_go()

    def _refuse_handlers(self) -> None:
        refuse(
            threading.current_thread() in self._workers,
            self.name,
            "a handler cannot wait for its own end",
            "call interrupt() there, and stop() elsewhere",
        )

    def _take_away(self, timeout: float = STOP_TIMEOUT) -> None:
        """Go down to GONE. What a KeyboardInterrupt keeps from it is done the next time."""
        lost = self._is_lost()
        if self.state is LIVE:
            self.state = LEFT if lost else ADDED  # whoever interrupts what comes now
        try:
            if lost:
                becomes(lambda: not self.serving, timeout)  # its busy queues leave last
            elif self.state is ADDED and self.serving:
                self._stop_disk(timeout)
        finally:
            self._let_go()

    def _is_lost(self) -> bool:
        """Tell whether the disk has lost its server, or somebody quiesced it, and waits for the next."""
        if self.state is not LIVE or len(self.serving) == len(self._workers):
            return False
        try:
            info = self.control.get_dev_info(self.id)
        except UblkError:
            return False
        waits = UBLK_F_USER_RECOVERY if self.failure else UBLK_F_QUIESCE
        return bool(info.flags & waits) and info.state != UBLK_S_DEV_DEAD

    def _let_go(self) -> None:
        """Go down to GONE: end the server, and delete the device if it is ours to delete.

        Raises what first went wrong, on the way or before.
        """
        if self.state is GONE:
            return
        if self.state is MAPPED:
            with contextlib.suppress(OSError):
                self._end_halfway()
            self.state = LEFT
        self._wake_workers()
        for worker in self._workers:
            worker.give_up()
        self._workers.clear()
        self.serving.clear()  # of whom nobody waits for any longer
        self._close_files()
        failure = self.failure
        try:
            if self.state is ADDING:
                clean_up(self.identity)
            if self.state is ADDED:
                delete(self.control, self.id, self.identity)
        except UblkError as error:
            if failure:
                say(str(error))
            failure = failure or error
        self._forget()
        if failure:
            raise failure

    def _end_halfway(self) -> None:
        """End a recovery that does not go live; where the kernel needs that, up to 6.15.

        Nobody else could recover the disk then, and up to 6.6 this process would
        not end.
        """
        if (self.control.features or 0) & UBLK_F_QUIESCE:
            return
        if not self.descriptors:  # interrupted between two
            self._map()
        if becomes(partial(self._all, FETCHED), GRACE):
            self.control.end_user_recovery(self.id, os.getpid())

    def _stop_disk(self, timeout: float) -> None:
        """STOP_DEV of a disk whose node we have open, so that it is ours."""
        try:
            self.control.stop_dev(self.id, timeout)
        except UblkError as error:
            if error.errno == errno.ETIMEDOUT:
                say(f"{self.name}: a handler does not return, its requests fail now")
            elif error.errno not in (errno.ENODEV, errno.ENOENT):  # it is gone, or its node is
                raise

    def _forget(self) -> None:
        self.state = GONE
        self.used = False  # a child that a handler forks closes no target
        self._end_waits()
        atexit.unregister(self.__exit__)
        if self.control is not None:
            self.control.close()

    def disown(self) -> None:
        """Give up what a forked child inherited of the device: it is its parent's to serve."""
        # Another thread may have had these locks
        self._make_locks()
        self._changing = False
        if self.state is NEW:  # the child may start it
            return
        with contextlib.ExitStack() as ends:  # each, whatever another fails of
            if self.state is not GONE:  # else its target may be for another disk
                ends.callback(getattr(self.target, "disown", bool))
            ends.callback(self._close_files)
            self._workers.clear()
            self._forget()  # first: whatever cannot be given up, the disk is not ours

    def _close_files(self) -> None:
        """Give back the memory that is shared, and everything that refers to /dev/ublkcN."""
        with self._lock:
            for memories in self.shared:
                for view in memories.values():
                    view.release()
            self.char_fd = self.wake_write = -1
            for file in self._files:
                file.close()


_controls: weakref.WeakSet[Control] = weakref.WeakSet()
_devices: weakref.WeakSet[Device] = weakref.WeakSet()
_queues: weakref.WeakSet[Queue] = weakref.WeakSet()
# Held by who forks, and by a thread that makes or closes a queue: a ring that it alone knows of,
# yet or still, nobody in the child, where that thread is not, could close
_forking = threading.RLock()


def _disown_all() -> None:
    # A thread, which is not here, may have had a view of their memory
    with contextlib.suppress(BufferError), contextlib.ExitStack() as ends:
        if _devices:
            ends.callback(let_go_of_nodes)  # last, as it needs descriptors
        for device in _devices:
            ends.callback(device.disown)
        for queue in _queues:
            ends.callback(queue.close)
        for control in _controls:
            ends.callback(control.close_rings)


def let_go_of_nodes() -> None:
    """Have a process keep no /dev/ublkcN, open or mapped, whoever in it knows of that.

    A thread may just have opened it, or be about to close it. So /dev/null and
    memory take its place, for those who will close them.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        open(os.devnull, "r+b", buffering=0) as nothing,
    ):
        for fd, file in open_descriptors().items():
            if file.startswith(NODE):
                os.dup2(nothing.fileno(), fd, inheritable=False)
    for line in lines_of("/proc/self/maps"):
        place, *_, file = line.split(maxsplit=5)
        if file.startswith(NODE):
            begin, end = (int(number, 16) for number in place.split("-"))
            _libc.mmap(
                ctypes.c_void_p(begin),
                ctypes.c_size_t(end - begin),
                mmap.PROT_READ,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED,
                -1,
                ctypes.c_long(0),
            )


# No functions in Python, which a Ctrl-C may end: a child with a disk of its own, --background's,
# would wait for itself without end. First of all, as a signal's handler that raised may have kept
# who forks from waiting for the lock: then it is another thread's, which the child has not.
os.register_at_fork(
    before=_forking.acquire,
    after_in_parent=_forking.release,
    after_in_child=_forking._at_fork_reinit,  # type: ignore[attr-defined]
)
# A child that a program forks for purposes of its own would keep DEL_DEV
# waiting for its copies.
os.register_at_fork(after_in_child=_disown_all)


def alive(pid: int) -> bool:
    """Tell whether a process exists that is more than a zombie."""
    status = " ".join(lines_of(f"/proc/{pid}/stat"))
    return status.rpartition(") ")[2][:1] not in ("", "Z", "X")


def check_flags(flags: int, known: int | None) -> None:
    """Refuse what the kernel would refuse or silently drop, saying why. Raises UblkError."""
    for feature in FEATURES:
        if flags & feature:
            what = f"{feature.name} ({feature.meaning})"
            other = flags & feature.excludes
            refuse(
                feature.needs and not flags & feature.needs,
                what,
                "not possible without " + " or ".join(flag_names(feature.needs)),
                "",
            )
            refuse(
                other,
                what,
                "the kernel does not allow it together with " + " and ".join(flag_names(other)),
                "choose one of them",
            )
    if known is not None:
        require(flags & ~known)


def require(missing: int) -> None:
    """Raise UblkError for the newest feature in the mask missing, naming the kernel that has it."""
    for feature in reversed(FEATURES):
        if missing & feature:
            raise newer_kernel(f"{feature.name} ({feature.meaning})", feature.since)


def check_new_size(control: Control, dev_id: int, size: int) -> None:
    """Refuse a size that the disk cannot change to; the kernel would take any. Raises UblkError."""
    require(UBLK_F_UPDATE_SIZE & ~(control.features or 0))
    params = control.get_params(dev_id)
    block = 1 << params.basic.logical_bs_shift
    refuse(
        params.types & UBLK_PARAM_TYPE_ZONED,
        f"device {dev_id}",
        "a zoned disk keeps its size",
        "",
    )
    refuse(
        not 0 < size < 1 << 63 or size % block,
        f"size {size}",
        f"not a positive multiple of the block size {block}",
    )


def fit(target: Target, size: int) -> None:
    """Have a target take a size, in bytes; without resized() it cannot have more than it has.

    Raises UblkError (EINVAL), or what its resized() raises.
    """
    if hasattr(target, "resized"):
        at_once(target.resized(size))
        return
    refuse(
        target.size < size,
        f"{type(target).__name__} of {target.size} bytes",
        f"it has no resized(), so it cannot have {size}",
        "give it a target as large as the disk",
    )


def disk_size(dev_id: int) -> int:
    """Return the size of a disk in bytes, 0 where sysfs does not tell, or nothing can be told."""
    try:
        sectors = "".join(lines_of(f"/sys/block/ublkb{dev_id}/size"))
        return int(sectors or 0) * SECTOR
    except MemoryError:
        return 0


def becomes(
    condition: Callable[[], bool], seconds: float, pause: Callable[[float], object] = time.sleep
) -> bool:
    """Wait for a condition, so many seconds at most; tell whether it is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause(0.005)
    return True


def whole_pages(size: int) -> int:
    """Return a size in bytes, rounded up to pages of memory."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def open_char(
    dev_id: int, timeout: float = SERVER_TIMEOUT, pause: Callable[[float], object] = time.sleep
) -> Any:
    """Open /dev/ublkcN as its server, once a server killed a moment ago has let go of it.

    timeout: seconds. Raises UblkError (EBUSY) where another server keeps it.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return open(f"{NODE}{dev_id}", "r+b", buffering=0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        if time.monotonic() > deadline:
            raise served_already(dev_id) from None
        pause(0.02)


def map_descriptors(char_fd: int, dev_id: int, size: int, offset: int) -> mmap.mmap:
    """Map a queue's request descriptors, sizes in bytes.

    The first process to do so is a device's server. Raises UblkError (EBUSY)
    where that was another.
    """
    try:
        return mmap.mmap(char_fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
    except OSError as error:
        raise served_already(dev_id) if error.errno == errno.EINVAL else error from None


def served_already(dev_id: int) -> UblkError:
    """Make the error for a device that the driver does not let us serve."""
    return UblkError(
        errno.EBUSY,
        f"cannot serve device {dev_id}",
        "it has a server, or lost one halfway, which no Linux before 6.16 forgets",
        f"end that server, or delete the device: `ublk.py del {dev_id}`",
    )


def io_flusher() -> None:
    """Keep this thread's memory allocations from waiting for disks, ours among them (5.6).

    Short of memory, the kernel writes dirty pages out, to this very disk
    perhaps, whose server would wait for itself. Needs CAP_SYS_RESOURCE;
    without, one can only hope.
    """
    _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)


@contextlib.contextmanager
def nobody_recovers(control: Control, dev_id: int) -> Iterator[None]:
    """Have nobody be about to fetch the tags of a disk that waits for a server, for STOP_DEV.

    From 6.7 to 6.15 that crashes the kernel: STOP_DEV ends the command of a tag
    that is not yet known as one that can be ended. So whoever recovers the disk
    has it LIVE first, if it is so within 10 seconds, or cannot open /dev/ublkcN.
    """
    with contextlib.ExitStack() as ours:

        def nobody_fetches() -> bool:
            try:
                state = control.get_dev_info(dev_id).state
                if state in (UBLK_S_DEV_QUIESCED, UBLK_S_DEV_FAIL_IO):
                    ours.enter_context(open_char(dev_id, 0))
            except OSError as error:
                return error.errno != errno.EBUSY
            return True

        if not (control.features or 0) & UBLK_F_QUIESCE:
            becomes(nobody_fetches, 10)
        yield


def delete(control: Control, dev_id: int, identity: int, timeout: float = 10.0) -> None:
    """DEL_DEV, or an error that says who holds the disk. Forgets the state file.

    identity: a device that is another's by now is left alone.
    timeout: seconds.

    Raises UblkError (EBUSY): stopped, but it goes only when they close it; or it
    does not stop, as a handler does not return.
    """
    what = f"device {dev_id} does not stop"
    remedy = f"end its server, then `ublk.py del {dev_id}`"
    try:
        # Two DEL_DEV at a time would wait for each other.
        if control.legacy:
            fcntl.flock(control.fd, fcntl.LOCK_EX)
        # An ordinary user's node may not be his yet, where a start was interrupted
        node = f"{NODE}{dev_id}"
        becomes(lambda: is_usable(node, os.R_OK | os.W_OK) or not os.path.exists(node), timeout)
        with nobody_recovers(control, dev_id):
            if not is_same(control, dev_id, identity):
                if dev_id not in device_ids():
                    forget_state(dev_id)
                return
            # First, as DEL_DEV, if it waited for a handler, would have all ADD_DEV
            # and DEL_DEV of others wait along
            control.stop_dev(dev_id, timeout)
        # Up to Linux 6.3 the kernel's thread that stops a disk may be left with
        # the last reference to /dev/ublkcN, and drop it only when it has
        # nothing else to do: given DEL_DEV, which waits for just that, it would
        # wait for ever. So this sees the node closed.
        if control.legacy:
            with contextlib.suppress(FileNotFoundError):
                open_char(dev_id, timeout).close()
        if not is_same(control, dev_id, identity):  # that may have taken its time
            return
        forget_state(dev_id)
        what = f"device {dev_id} is stopped but not deleted"
        remedy = "it goes when they close it"
        control.del_dev(dev_id, timeout / 2)
    except OSError as error:
        # It may be about to go, by somebody else's command, or gone: DEL_DEV
        # waits for a free number, which somebody may have taken at once
        if becomes(lambda: not is_same(control, dev_id, identity), timeout / 2):
            return
        # EINTR: this process was suspended as DEL_DEV waited
        if error.errno in (errno.ETIMEDOUT, errno.EBUSY, errno.EINTR):
            who = ", ".join(holders(dev_id)) or "somebody"
            raise UblkError(errno.EBUSY, what, f"held open by {who}", remedy) from None
        raise
    finally:
        fcntl.flock(control.fd, fcntl.LOCK_UN)


# =================================================================================================
# The other data paths
# =================================================================================================
#
# In the plain way a byte is copied once by the driver, between the client's
# pages and the server's buffer, and often a second time, between that buffer
# and wherever the target keeps it. Here are the ways around. Each is a class
# with the methods of MappedCopy, and each is asked for by a feature of the
# device.
#
#     get-data        a WRITE is announced first, and its data come once the server has said where
#                     to put them
#     user copy       the server copies when it likes, by pread and pwrite on /dev/ublkcN (6.5)
#     zero copy       the server puts the request's pages into its ring's table of buffers, from
#                     where READ_FIXED and WRITE_FIXED move the data between them and any
#                     file: nobody copies (6.15)
#     auto zero copy  the driver puts them there and takes them out by itself (6.16)
#
# Which one is quickest depends on the target. If the bytes are made in Python,
# they have to be copied, and the plain way is best. If they lie in a file,
# `map(offset, length, write)` says where, and the kernel moves them, on all
# paths but user copy, while Python only passes numbers on: a request is then a
# *chain* of linked SQEs, ending with the tag's COMMIT. Only what goes wrong is
# heard of (IOSQE_CQE_SKIP_SUCCESS): a stage that fails cancels what is behind
# it, the commit first of all, and the request is served anew by the target's
# own methods. The result in the COMMIT says "all of it" before anything has
# moved; that is safe only because a short transfer breaks the link.
#
# With the last three the driver does not look at the result but for its sign:
# the first rule of the plain way counts double. And whoever may still touch a
# request's pages must be gone before its tag is parked again, for then they
# belong to somebody else: a handler that returns too late finds /dev/null in
# place of /dev/ublkcN.
#
# *Batches* (7.0) change how commands travel, not what they mean. In place of
# one SQE for each tag there is one for many: COMMIT_IO_CMDS with a list of
# results, and FETCH_IO_CMDS, which stays in the kernel and fills buffers with
# the tags that have news, again and again. Which is why BatchQueue replaces how
# tags are fetched and committed and nothing else.
#
# *Shared memory* (7.1): a client's direct I/O from pages that it shares with
# the server is not copied at all, the descriptor says where they are.
# *Metadata* (INTEGRITY, 7.0): some bytes beside each block, which travel by
# user copy.
#
# How many SQEs a request takes tells much about a path's cost: one where Python
# serves it, two where map() says where its data lies (the transfer and the
# commit), four of these with zero copy by hand. With batches it is a few for many
# requests. A system call takes any number of them.


class NeedGetData(MappedCopy):
    """As before, but a write arrives twice: first the news, then, once asked for, its data.

    A server could choose the buffer in between; this one always has the tag's
    own.
    """

    summary = "as --copy, but a write's data is asked for after its news"
    features = UBLK_F_NEED_GET_DATA
    stages = 2

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        for tag in range(self.depth):
            slot = 2 * self.depth + tag
            queue.command(slot, tag, UBLK_U_IO_NEED_GET_DATA, self.address(tag))

    def ask(self, tag: int) -> None:
        """Ask for the data of a WRITE.

        The tag is neither ours nor parked until they come: asked notes that, so
        that the queue does not end meanwhile.
        """
        queue = self.queue
        slot = 2 * self.depth + tag
        # The driver puts the address asked for into the descriptor, also where
        # that says which of the memory shared with clients has the data: it is
        # to say so again.
        queue.addresses[slot] = (
            queue.shared_addresses[tag]
            if queue.flags[tag] & UBLK_IO_F_SHMEM_ZC
            else self.address(tag)
        )
        queue.ring.push(slot)


class UserCopy(MappedCopy):
    """The server copies: pread and pwrite on /dev/ublkcN reach the pages of a request.

    Where in the file a request lies is told by its queue and tag, see
    position(). A READ is filled in a buffer of the tag's and then written there
    as a whole, so that nothing of the client's pages stays as it was.
    """

    summary = "the server copies, with pread and pwrite on /dev/ublkcN (6.5)"
    features = int(UBLK_F_USER_COPY)
    stages = moves = 0
    lasting = False

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        # A descriptor of the path's own: its number stays its own as long as
        # somebody might use it.
        self.file: Any = open(os.dup(queue.device_fd), "r+b", buffering=0)
        self.fd: int = self.file.fileno()
        queue.exits.callback(lambda: self.file.close())
        # What abandon() needs: there may be no descriptors left by then
        self.null: Any = queue.exits.enter_context(open(os.devnull, "r+b", buffering=0))
        self.origin = UBLKSRV_IO_BUF_OFFSET + (queue.index << UBLK_QID_OFF)

    def address(self, tag: int) -> int:
        return 0

    def position(self, tag: int) -> int:
        """Return where in /dev/ublkcN the data of the tag's request starts."""
        return self.origin + (tag << UBLK_TAG_OFF)

    def data(self, tag: int, length: int) -> memoryview:
        self._copy(os.preadv, self.position(tag), self.buffer(tag, length))
        return super().data(tag, length)

    def give(self, tag: int, data: memoryview) -> None:
        self._copy(os.pwritev, self.position(tag), data)

    def metadata(self, tag: int, length: int) -> memoryview:
        """Return the metadata of the blocks a WRITE wrote (INTEGRITY, 7.0)."""
        buffer = memoryview(bytearray(length))
        self._copy(os.preadv, self.position(tag) | UBLKSRV_IO_INTEGRITY_FLAG, buffer)
        return buffer.toreadonly()

    def give_metadata(self, tag: int, buffer: memoryview) -> None:
        """Hand the metadata of its blocks to a READ."""
        self._copy(os.pwritev, self.position(tag) | UBLKSRV_IO_INTEGRITY_FLAG, buffer)

    def abandon(self) -> None:
        # The device lets go of its file only when all descriptors are closed,
        # and a late handler would write into whatever file had the number then.
        # /dev/null has it until the path is forgotten, also where this is called
        # again, by a stop() after one that was interrupted.
        if self.file is not self.null:
            os.dup2(self.null.fileno(), self.fd, inheritable=False)
            self.late = self.file
            self.file = self.null

    def _copy(self, copy: Callable[..., int], position: int, buffer: memoryview) -> None:
        """Copy between a buffer and this position of /dev/ublkcN, by preadv() or pwritev().

        Raises OSError: EIO where the request has fewer bytes.
        """
        while buffer:
            count = copy(self.fd, [buffer], position)
            if count == 0:
                raise OSError(errno.EIO, "the request ended before its data")
            position += count
            buffer = buffer[count:]


class AutoZeroCopy(UserCopy):
    """No copy: the driver puts the pages of a request into slot `tag` of the ring's buffer table.

    READ_FIXED and WRITE_FIXED move data between them and any file; COMMIT takes
    them out again. What needs the bytes in Python, or breaks a chain, is served
    by user copy.
    """

    summary = "nobody copies: the kernel registers a request's pages with the ring (6.16)"
    features = UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY
    stages = 1
    moves = IORING_OP_READ_FIXED

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        queue.ring.register_sparse_buffers(queue.depth)

    def sqe_address(self, tag: int) -> int:
        return tag | UBLK_AUTO_BUF_REG_FALLBACK << 16  # struct ublk_auto_buf_reg


class ZeroCopy(AutoZeroCopy):
    """The same by hand (6.15): register the pages, transfer, unregister, commit.

    All in one chain of four SQEs. Where the transfer fails the pages are still
    registered: broken() takes them out before the request is served otherwise.
    """

    summary = "nobody copies: the server registers the pages (6.15)"
    features = UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_USER_COPY
    stages = 3

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        for stage, opcode in ((2, UBLK_U_IO_REGISTER_IO_BUF), (3, UBLK_U_IO_UNREGISTER_IO_BUF)):
            flags = queue.link_last if stage == 3 else Queue.link_last
            for tag in range(self.depth):
                queue.command(stage * self.depth + tag, tag, opcode, addr=tag, flags=flags)

    def sqe_address(self, tag: int) -> int:
        return 0

    def chain(self, tag: int) -> tuple[int, ...]:
        return 2 * self.depth + tag, self.depth + tag, 3 * self.depth + tag

    def broken(self, tag: int, stage: int) -> None:
        if stage == 1:
            self.queue.ring.push(3 * self.depth + tag)


class SharedCopy(MappedCopy):
    """Not a path of its own (SHMEM_ZC, 7.1): pages we share with a request's client.

    The descriptor's address says which memory, and where in it. Any data path
    may have such requests among the others.
    """

    def __init__(self, addresses: memoryview, memories: dict[int, memoryview]) -> None:
        self.places = addresses
        self.memories = memories

    def buffer(self, tag: int, length: int) -> memoryview:
        """Return the request's memory, which is its client's, too."""
        index, start = divmod(self.places[tag], 1 << 32)
        # Clients may use it before share() has heard of its index
        becomes(lambda: index in self.memories, GRACE)
        return self.memories[index][start : start + length]


# What the command line and Device call the data paths, best first.
DATA_PATHS: dict[str, type[MappedCopy]] = {
    "auto-zero-copy": AutoZeroCopy,
    "zero-copy": ZeroCopy,
    "user-copy": UserCopy,
    "get-data": NeedGetData,
    "copy": MappedCopy,
}


class BatchQueue(Queue):
    """A queue with BATCH_IO (7.0): one command fetches for all, one commits many requests.

    PREP_IO_CMDS parks all tags. FETCH_IO_CMDS is multishot: whenever requests
    arrive, the kernel writes their tags as 16-bit numbers into the next of our
    provided buffers and posts a CQE that names it. COMMIT_IO_CMDS takes an
    array of elements: tag, buffer index and result in one 64-bit word, then, in
    another, the buffer's address in mapped copy, or on a zoned disk the sector of
    an append.

    One commit at a time is under way, that of the tags in _sent, because slot
    and memory are its own; how many bytes of it were taken the CQE says, and
    the rest goes first in the next. What is not here is as in Queue.
    """

    BUFFERS = 64
    BUFFER_SIZE = 256  # bytes, for 128 tags
    link_last = 0  # a chain has no COMMIT at its end: its last CQE is needed

    def _open(self, device: Device) -> None:
        super()._open(device)
        self._sent: list[int] = []  # tags whose commit is on its way
        self._flags = 0
        self.element_size = 16
        if device.zoned:
            self._flags = UBLK_BATCH_F_HAS_ZONE_LBA
        elif not self.path.features:
            self._flags = UBLK_BATCH_F_HAS_BUF_ADDR
        else:
            self.element_size = 8
            if self.path.features & UBLK_F_AUTO_BUF_REG:
                self._flags = UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK
        self._commit_slot = self.own + COMMIT - OPERATION
        self._fetch_slot = self.own + FETCH - OPERATION
        self.ring.prepare(
            self._fetch_slot,
            IORING_OP_URING_CMD,
            self.device_fd,
            UBLK_U_IO_FETCH_IO_CMDS,
            rw_flags=IORING_URING_CMD_MULTISHOT,
            user_data=FETCH,
            flags=IOSQE_BUFFER_SELECT,
            cmd=BATCH_IO.pack(self.index, 0, 0, 2, 0, 0),
        )
        self._tags_at = self.BUFFERS * 16  # behind the ring of that many entries
        self._elements_at = self._tags_at + self.BUFFERS * self.BUFFER_SIZE
        self.memory = mmap.mmap(-1, self._elements_at + self.depth * self.element_size)
        self._base = address_of(self.memory)
        self._group = io_uring_buf_reg(ring_addr=self._base, ring_entries=self.BUFFERS, bgid=0)
        self.ring.register(IORING_REGISTER_PBUF_RING, ctypes.addressof(self._group), 1)
        self.exits.callback(self._take_buffers)
        for number in range(self.BUFFERS):
            address = self._base + self._tags_at + number * self.BUFFER_SIZE
            struct.pack_into(
                "=QIH", self.memory, 16 * number, address, self.BUFFER_SIZE, number
            )
        self._offer_buffers(0)

    def _offer_buffers(self, head: int) -> None:
        """Give all buffers to the kernel, which has used them up.

        head: how many it has taken.

        It takes them in turn, so their ring always has the same 16 bytes for
        each, but for the tail, a 16-bit number at the end of the first.
        """
        struct.pack_into("=H", self.memory, 14, head + self.BUFFERS & 0xFFFF)

    def _take_buffers(self) -> None:
        """Take the buffers back from the kernel before the ring ends.

        Or a thread of the kernel's, which ends that later, would write there,
        and what clients write where the tags' buffers were (seen on 7.3).
        """
        with contextlib.suppress(OSError):  # the queue's thread is stuck
            group = ctypes.addressof(self._group)
            self.ring.register(IORING_UNREGISTER_PBUF_RING, group, 1)

    def fetch(self) -> None:
        """Park all tags with one command, and ask for their requests with another."""
        for tag in range(self.depth):
            self.addresses[tag] = self.path.address(tag)
            self.complete(tag, 0)
        self._send(UBLK_U_IO_PREP_IO_CMDS)
        while self._sent:
            self.collect()
        self._done.clear()  # it takes all or none, and counts none
        self.ring.push(self._fetch_slot)
        self.ring.enter()

    def appended(self, tag: int, sector: int) -> None:
        self.addresses[tag] = sector  # the driver looks at those of appends only

    def _send(self, opcode: int) -> None:
        """Have all that is done committed (or prepared) by the next enter()."""
        self._sent = self._done
        self._done = []
        elements = b"".join(map(self._element, self._sent))
        self.memory[self._elements_at : self._elements_at + len(elements)] = elements
        self.ring.prepare(
            self._commit_slot,
            IORING_OP_URING_CMD,
            self.device_fd,
            opcode,
            self._base + self._elements_at,
            len(elements),
            user_data=COMMIT,
            cmd=BATCH_IO.pack(
                self.index, self._flags, len(self._sent), self.element_size, 0, 0
            ),
        )
        self.ring.push(self._commit_slot)

    def _element(self, tag: int) -> bytes:
        element = ELEMENT.pack(tag, tag, self.results[tag], self.addresses[tag])
        return element[: self.element_size]

    def commit(self) -> None:
        if self._done and not self._sent:  # one at a time: they share slot and memory
            self._send(UBLK_U_IO_COMMIT_IO_CMDS)

    def collect(self, timeout: float | None = None) -> list[int]:
        self.turn(timeout)
        tags: list[int] = []
        for user_data, result, flags in self.ring.reap_all():
            if user_data == FETCH:
                tags += self._fetched(result, flags)
            elif user_data == COMMIT:
                self._committed(result)
            elif self._is_request(user_data, result):
                tags.append(user_data)
        return tags

    def _fetched(self, result: int, flags: int) -> list[int]:
        """Return the tags in the buffer a CQE names; start the command again where it ended."""
        tags: list[int] = []
        if flags & IORING_CQE_F_BUFFER:
            number = flags >> IORING_CQE_BUFFER_SHIFT
            start = self._tags_at + number * self.BUFFER_SIZE
            tags = array("H", self.memory[start : start + result]).tolist()
        if result == UBLK_IO_RES_ABORT:
            self.ended.add(-1)
        elif not flags & IORING_CQE_F_MORE:
            if result < 0 and result != -errno.ENOBUFS:
                self.fail(result, "lost its requests")
            else:
                # Not all have a CQE that names them: there may have been no room for it
                status = io_uring_buf_status()
                self.ring.register(IORING_REGISTER_PBUF_STATUS, ctypes.addressof(status), 1)
                self._offer_buffers(status.head)
                self.ring.push(self._fetch_slot)
        return tags

    def _committed(self, result: int) -> None:
        """See to it that every element was taken: those behind a failed one were not."""
        sent = self._sent
        self._sent = []
        if result < 0:
            self.fail(result, "cannot commit")
        else:
            self._done = sent[result // self.element_size :] + self._done

    def _has_chains(self) -> bool:
        return bool(self.chained or self._sent)  # whose commits come behind them

    def chain_done(self, tag: int, stage: int, result: int) -> None:
        if tag not in self.chained:  # of a broken one, the cleaning up
            return
        self.chained.remove(tag)
        length = self.sectors[tag] * SECTOR
        if stage == self.path.stages and result == (length if stage == 1 else 0):
            self.repeat([tag])
        else:
            super().chain_done(tag, stage, result)


# =================================================================================================
# asyncio on the ring
# =================================================================================================
#
# A handler that waits, for a file, a server, a lock, must not keep the other
# requests of its queue waiting. Python's answer is asyncio: handlers are
# coroutines, and a loop goes on with each when that for which it waits has
# come. The loop sleeps in its *selector*, which knows the descriptors that
# somebody waits for. Usually that is an epoll; here it is the queue's ring.
# Requests, descriptors, timers and operations of the ring itself thus all end
# the same system call, in one thread, and whatever works in asyncio works here:
# streams, TLS, locks, TaskGroups, to_thread.
#
# Two rules. Memory that an operation uses belongs to the kernel until its CQE
# has come: a task that is cancelled has the operation cancelled and goes on
# only when that has ended. Of threads, and of other tasks of a handler that
# failed, nobody knows when they end: so what a coroutine gets is memory of its
# request's own, not the tag's, which is another request's by then. And a
# descriptor's number is used only while it is open: what was asked for under it
# is begun, by an enter(), before anybody is told that it ended.
#
# A queue of a target without coroutines never comes here, and never imports
# asyncio. It has no memory to give to one either, so which of them a queue is
# must be known from the start: a plain class that returns a coroutine gets an
# error.
#
# How the loop and the ring fit together. asyncio's loop asks its selector for
# what is ready, with the time until its next timer. RingSelector has an epoll for
# the descriptors that somebody waits for, and the ring waits for the epoll, by a
# POLL_ADD. So it waits in io_uring_enter(), and deals with what came: requests
# start handlers, operations resolve the future that a handler awaits, and when
# the POLL_ADD ends the epoll tells what is ready. Handlers run in tasks. A task
# costs more than many a handler does, so those that need not wait share one (a
# context variable that one of them leaves set, or a cancellation of the task
# that it leaves unheard, is the next one's). One that waits keeps its task to
# its end; in the next round there are two for the others, then four. When the
# queue ends, requests that have begun have LAST_WORDS to be answered; then tasks
# are cancelled, and given as long to go, and so are threads that asyncio has do
# something for a request. A target that one then still uses is not
# closed.

LAST_WORDS = 1.0  # seconds that tasks have to end when their queue does, and when cancelled
_here = threading.local()  # .queue: the one whose loop runs in this thread
# Whether it is for a request, what a task, or one that it has begun, does
_serving = contextvars.ContextVar("serving", default=False)


def has_coroutines(target: Any) -> bool:
    """Tell whether a target has methods that are coroutines."""
    methods = [getattr(target, name, None) for name in (*HANDLERS, "start", "close")]
    # Up to Python 3.9 it does not look into a partial of a method
    return any(inspect.iscoroutinefunction(getattr(each, "func", each)) for each in methods)


class Turns:
    """A lock for tasks on the loops of several queues; an asyncio.Lock is for those of one."""

    def __init__(self) -> None:
        # Held for a moment, in which the garbage collector may end a task that is inside
        self._lock = threading.RLock()
        self._waiting: Any = collections.deque()  # a Future each, of whom the first is inside

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait until nobody else is inside."""
        import asyncio
        from concurrent.futures import Future

        turn: Any = Future()
        turn.set_running_or_notify_cancel()  # who is cancelled leaves it alone
        with self._lock:
            self._waiting.append(turn)
            self._let_in()
        try:
            if not turn.done():
                await asyncio.wrap_future(turn)
            yield
        finally:
            with self._lock:
                self._waiting.remove(turn)
                self._let_in()

    def _let_in(self) -> None:
        if self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)


class Flushing(Turns):
    """One flush at a time, which all share who came before it began, as the kernel has it.

    What is flushed may be told but once that data are lost. So nobody is told
    of success beside whom a flush has failed.

    flush: what does it, a method, maybe a coroutine's.
    """

    def __init__(self, flush: Any) -> None:
        super().__init__()
        self.flush = flush
        self.begun = 0
        self.failures = 0
        self.error = 0  # of the last that failed

    async def __call__(self, failures: int | None = None) -> None:
        """Have a flush begin, and wait for its end.

        failures: how many there had been when what is to be durable began to be
        written; None: it has ended before.

        Raises OSError where there are more of them by then.
        """
        if failures is None:
            failures = self.failures
        begun = self.begun  # no sooner: one that fails between the two is to be heard of
        async with self.take():
            if self.begun == begun and self.failures == failures:
                self.begun += 1
                await self._do()
            self.check(failures)

    def check(self, failures: int) -> None:
        """Raise OSError where more have failed."""
        if self.failures != failures:
            raise OSError(self.error, os.strerror(self.error))

    async def _do(self) -> None:
        try:
            succeeded(self.flush, await end_of(self.flush()))
        except Exception as error:
            self.note_failure(-failed(error))
        except BaseException:  # the queue ends
            self.note_failure(errno.ECANCELED)
            raise

    def note_failure(self, number: int) -> None:
        """Have those hear who flush beside it; also of what another call, in any thread, was told."""
        with self._lock:
            self.error = number
            self.failures += 1


async def is_left_to_next(error: BaseException) -> bool:
    """Tell, within what serves a request, whether that is left to the next server where this error ends it.

    Else, its client is told: it may be an error of the target itself, even one
    that says "cancelled".
    """
    queue = getattr(_here, "queue", None)
    return queue is None or await queue.leaves_to_next(error)


class Operation:
    """Something that the kernel does on a queue's ring, and the memory it uses meanwhile.

    memory: what the kernel reads or fills, kept until the CQE has come.
    """

    def __init__(self, memory: memoryview | None) -> None:
        self.memory = memory
        self.future: Any = None
        self.result: int | None = None

    def end(self, result: int) -> None:
        """Hear of the end."""
        self.result = result
        if self.future is not None and not self.future.done():
            self.future.set_result(result)


async def operate(
    opcode: int, fd: int, buffer: Any = None, fills: bool = False, **fields: int
) -> int:
    """Have the kernel do something on the ring of the queue that we run on.

    fields are those of Ring.prepare(); a buffer gives addr and length. fills
    says that the kernel writes to it. Returns the result, which is not
    negative. Raises OSError with the kernel's errno, and RuntimeError outside
    of a queue's loop. Who is cancelled meanwhile has the operation cancelled
    and goes on when it has ended.
    """
    import asyncio

    memory = None
    if buffer is not None:
        memory = memory_of(buffer, fills)
        fields["addr"] = address_of(memory)
        fields["length"] = len(memory)
    queue = getattr(_here, "queue", None)
    if queue is None:
        raise RuntimeError("only the loop of a queue has a ring")
    operation = Operation(memory)
    unwanted = None
    number = queue.begin(operation, opcode=opcode, fd=fd, **fields)
    while operation.result is None:
        operation.future = queue.loop.create_future()
        try:
            await operation.future
        except asyncio.CancelledError as error:
            unwanted = error
            if operation.result is None:
                queue.cancel(number)
    if unwanted is not None:
        raise unwanted
    if operation.result < 0:
        raise OSError(-operation.result, os.strerror(-operation.result))
    return operation.result


def memory_of(buffer: Any, fills: bool) -> memoryview:
    """Return a buffer's bytes. While that view exists it can neither go nor be resized."""
    view = memoryview(buffer).cast("B")  # TypeError where they do not lie in one piece
    if fills and view.readonly:
        raise TypeError("a buffer to be filled must be writable")
    if len(view) >= 1 << 32:
        raise ValueError(f"{len(view)} bytes are too many for one operation")
    return view


def uring_read(fd: int, buffer: Any, offset: int) -> Promise:
    """Read from a file at offset into a writable buffer; await it for the number of bytes.

    offset is in bytes. It may be fewer than the buffer has, and is 0 at the
    file's end. Raises OSError, TypeError for a buffer that cannot be filled.
    """
    return operate(IORING_OP_READ, fd, buffer, fills=True, off=offset)


def uring_write(fd: int, buffer: Any, offset: int, flags: int = 0) -> Promise:
    """Write a buffer to a file at offset, with RWF_* flags; await it for the number of bytes.

    offset is in bytes. It may be fewer than the buffer has. Raises OSError.
    """
    return operate(IORING_OP_WRITE, fd, buffer, off=offset, rw_flags=flags)


def uring_fsync(fd: int, datasync: bool = False) -> Promise:
    """Make what was written to a file durable; with datasync not its times. Raises OSError."""
    return operate(IORING_OP_FSYNC, fd, rw_flags=IORING_FSYNC_DATASYNC if datasync else 0)


def uring_fallocate(fd: int, mode: int, offset: int, length: int) -> Promise:
    """fallocate(2): mode is a sum of FALLOC_FL_* flags, offset and length in bytes.

    Raises OSError: EOPNOTSUPP where the file system cannot do that.
    """
    return operate(IORING_OP_FALLOCATE, fd, off=offset, addr=length, length=mode)


def uring_recv(fd: int, buffer: Any, flags: int = 0) -> Promise:
    """Receive from a socket; await it for the number of bytes, 0 at its end.

    It has MSG_* flags, as recv(2). Raises OSError.
    """
    return operate(IORING_OP_RECV, fd, buffer, fills=True, rw_flags=flags)


def uring_send(fd: int, buffer: Any, flags: int = 0) -> Promise:
    """Send to a socket; await it for the number of bytes taken.

    It has MSG_* flags, as send(2). Raises OSError.
    """
    return operate(IORING_OP_SEND, fd, buffer, rw_flags=flags)


def noted(work: set[Any], submit: Callable[..., Any], function: Any, *words: Any) -> Any:
    """Give a thread something to do; if that is for a request, have it be in a set until it is done.

    Nobody can cancel it then, and its task may end before it. Where no thread
    can be had (RuntimeError), it is never done: the executor keeps it, and would
    do it over what comes later.
    """
    known = threading.Lock()

    def do() -> Any:
        with known:  # whether it is to be done
            pass
        return function(*words)

    with known:
        try:
            future = submit(do)
        except BaseException:
            function, words = bool, ()
            raise
    if _serving.get():
        work.add(future)
        future.add_done_callback(work.discard)
    return future


class RingSelector(selectors.EpollSelector):
    """What an asyncio loop waits with: the ring of a queue.

    An epoll knows the descriptors that somebody waits for, as in any loop. It
    is a descriptor itself, so the ring can wait until it has something to tell.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue = queue

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Answer the requests there are; return the descriptors that are ready."""
        queue = self.queue
        if queue.ended and not queue.closing:
            timeout = A_MOMENT if timeout is None else min(timeout, A_MOMENT)
        left = bool(queue.waiting) and not queue.leaving
        if not queue.watching:
            queue.watch(self.fileno())
        tags = queue.collect(0 if left else timeout)
        if queue.leaving:
            queue.ended.update(tags)  # requests for the next server
        else:
            if tags:
                queue.answer(tags)
            if queue.waiting:
                queue.add_tasks(left)
        if queue.is_over():
            queue.loop.stop()
        if queue.watching:
            return []
        return super().select(0)


# =================================================================================================
# When servers die
# =================================================================================================
#
# A disk is more fragile than a file: its server is a process, and processes
# die, of a bug, of a signal, of an upgrade. By default the disk dies with it:
# the driver notices that /dev/ublkcN was closed, fails the requests that were
# under way, and the device is DEAD, to be deleted. With recovery (6.1) it waits
# for a new server instead:
#
#     requeue   requests that a server had when it died fail with EIO; those that come later wait
#     reissue   they are given to the next server again, and nobody notices but by the time it
#               took; so a target must bear to be asked the same twice, which is true
#               of reads and writes and of appends to zones is not
#     fail      what comes while there is no server fails at once (6.13)
#
#     LIVE -- server gone -> QUIESCED or FAIL_IO
#       -- START_USER_RECOVERY, FETCH of every tag, END_USER_RECOVERY -> LIVE
#
# QUIESCE_DEV (6.16) does the same with a living server: it takes the idle tags
# away, the server ends what it has, leaves, and the next one, of a newer
# version say, takes over. A restart, then, is a recovery, and who starts the
# same words for the same number again gets it: systemd's Restart=on-failure is
# all the supervision a disk needs.
#
# **Identity.** All of this is dangerous in one way: a number is not a device.
# Number 3 may have been deleted and given to another image while nobody looked,
# and whoever "recovers" it with the first image destroys the second's file
# system under its clients' hands. So each device gets 64 bits of its own, random
# but for one, which the driver keeps in `ublksrv_flags` and hands back. They are
# compared before a state file is believed and before anything is deleted that
# somebody else might have made. And a number is sure only while one has its
# /dev/ublkcN open: so a server opens that first, and tells the driver
# everything else then. One that recovers a disk makes its target then, too, as
# no other server can have the files any more.
#
# **State.** One small JSON file for each served device tells what the kernel
# does not know: the target's words, the directory they were given in, and of
# the files they name what tells them from others. It is written in one piece,
# private to its owner, never executed, and never believed over what the kernel
# says.
#
# **What the kernel was told.** A disk's blocks, whether it has a cache to flush
# and whether a write can be durable by itself were told before it was there, by
# the first server, for good. A target that would be asked for less than it
# needs, or for what it cannot do, would lose data without a word: it is refused.
#
# **Who holds a disk.** A disk in use can be stopped but not deleted, and its
# users get errors; so whoever is about to delete one asks first, and names
# them: processes, mounts, swap, disks on top. From 7.0 on the driver says
# itself whether there are any.
#
# What kernels do that one has to know. Up to 6.15 a server killed after it has
# mapped a queue and before its disk is there cannot be recovered, only deleted;
# where some of its queues were fetched and some not, asking crashes the kernel.
# Up to 6.x START_DEV itself reads the partition table; a server killed in that
# very moment leaves a device, and itself, that nothing ends: so the kernel does
# not look for partitions there, partx does. Up to 6.3 STOP_DEV and DEL_DEV can
# wait for each other: the node is seen closed before DEL_DEV is sent.


# ---- who holds a disk -----------------------------------------------------------------------------


def holders(dev_id: int) -> list[str]:
    """Return who uses /dev/ublkbN or one of its partitions, as far as we may see.

    That is programs that have it open (this one included), mounts in any
    namespace, swap, and what is built upon it (LVM, md, dm, loop, btrfs).
    """
    disk = f"ublkb{dev_id}"
    return [*openers(disk), *mounts(disk), *swaps(disk), *disks_above(disk)]


def is_node_of(path: str, disk: str, file: str = "") -> bool:
    """Tell whether a path is the node of a disk or of a partition, by whatever name.

    That of a deleted one ends in " (deleted)". file: where to look instead.
    """
    name = path.partition(" ")[0]
    if re.fullmatch(rf"/dev/{disk}(p[0-9]+)?", name):
        return True
    try:
        # Elsewhere may be a file system that hangs
        number = os.stat(file or name).st_rdev if name.startswith("/dev/") else 0
    except OSError:
        return False
    return is_number_of(f"{os.major(number)}:{os.minor(number)}", disk)


def is_number_of(number: str, disk: str) -> bool:
    """Tell whether a block device's number, MAJOR:MINOR, is that of a disk or a partition."""
    return disk in link_of(f"/sys/dev/block/{number}").split("/")


def link_of(path: str) -> str:
    """Return where a symbolic link leads; nothing if it is gone, or not ours to read."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def lines_of(path: str) -> list[str]:
    """Return the lines of a file of the kernel's; none if it is gone, or not ours to read."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            return [line.rstrip("\n") for line in file]  # of which names may have others' ends
    except OSError:
        return []


def openers(disk: str) -> Iterator[str]:
    """Yield the processes that have a disk open."""
    links = glob.iglob("/proc/[0-9]*/fd/*")
    pids = [link.split("/")[2] for link in links if is_node_of(link_of(link), disk, link)]
    for pid in dict.fromkeys(pids):
        yield f"{''.join(lines_of(f'/proc/{pid}/comm'))} (pid {pid})"


def mounts(disk: str) -> Iterator[str]:
    """Yield where a disk is mounted, in each mount namespace once."""
    seen = {""}
    for process in ["/proc/self", *glob.glob("/proc/[0-9]*")]:
        namespace = link_of(f"{process}/ns/mnt")
        if namespace in seen:
            continue
        for line in lines_of(f"{process}/mountinfo"):
            seen.add(namespace)  # unless the process has ended meanwhile
            _, _, number, _, place, *more = line.split(" ")
            # It may have any name, and some file systems have no number
            source = more[more.index("-") + 2]
            if is_number_of(number, disk) or is_node_of(source, disk):
                where = "" if process == "/proc/self" else f" of pid {process[6:]}"
                yield f"the mount at {place}{where}"


def swaps(disk: str) -> Iterator[str]:
    """Yield what of a disk is swap."""
    for line in lines_of("/proc/swaps"):
        if is_node_of(line, disk):
            yield f"swap on {line.split()[0]}"


def disks_above(disk: str) -> Iterator[str]:
    """Yield what is built upon a disk or its partitions: LVM, dm, md, loop, a btrfs.

    That has several disks, and is mounted by the name of one.
    """
    for part in (disk, f"{disk}p*"):
        for holder in glob.glob(f"/sys/class/block/{part}/holders/*"):
            name = os.path.basename(holder)
            title = "".join(lines_of(f"{holder}/dm/name"))
            yield f"{name} ({title})" if title else name
        for member in glob.glob(f"/sys/fs/btrfs/*/devices/{part}"):
            yield f"btrfs {member.split('/')[4]}"
    for file in glob.glob("/sys/block/*/loop/backing_file"):
        if any(is_node_of(line, disk) for line in lines_of(file)):
            yield file.split("/")[3]


def stop_if_unused(control: Control, dev_id: int, identity: int) -> None:
    """Stop a disk that nobody uses, or raise UblkError (EBUSY) that names who does.

    Who has it open for a moment only is given that moment; udev and partx,
    which look at every disk, are nobody's use.
    """
    deadline = time.monotonic() + PASSING
    while True:
        found = holders(dev_id)
        users = [name for name in found if not name.startswith(LOOKERS)]
        late = time.monotonic() > deadline
        # We may not see all of them; from 7.0 on the driver does, before it those of the kernel
        if not users and try_stop(control, dev_id, identity, bool(found) and late):
            return
        if late:
            raise UblkError(
                errno.EBUSY,
                f"device {dev_id} is in use",
                f"by {', '.join(users) or 'somebody'}",
                f"end that first, or `ublk.py del {dev_id} --force`",
            )
        time.sleep(0.05)


def try_stop(control: Control, dev_id: int, identity: int, looked_at: bool) -> bool:
    """TRY_STOP_DEV, where there is that and a disk; tell whether nobody uses it.

    looked_at: whether one who has it open is nobody's use.
    """
    if is_same(control, dev_id, identity):
        try:
            control.try_stop_dev(dev_id, GRACE)
        except UblkError as error:
            if error.errno == errno.EOPNOTSUPP:
                return not is_claimed(f"/dev/ublkb{dev_id}")
            return looked_at or error.errno != errno.EBUSY
    return True


def is_claimed(path: str) -> bool:
    """Tell whether the kernel has a disk, or a part of it, for one use alone.

    That is what a mount, swap and a disk above do; and the log of a file system
    on another disk, of which nothing else tells.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def new_identity(follows: bool) -> int:
    """Return 64 bits by which a device is known; its number may be another's tomorrow.

    They are random but for the lowest: whether the server looks at the size by
    itself.
    """
    return secrets.randbits(63) << 1 | follows


def is_same(control: Control, dev_id: int, identity: int) -> bool:
    """Tell whether a device is the one with this identity.

    One that is there and tells nothing of itself, as its node is gone or not
    yet ours, is taken for it.
    """
    try:
        return bool(control.get_dev_info(dev_id).ublksrv_flags == identity)
    except UblkError as error:
        return error.errno != errno.ENODEV


def is_served(info: Any) -> bool:
    """Tell whether a device has a disk and a server that lives, by its ublksrv_ctrl_dev_info."""
    return info.state == UBLK_S_DEV_LIVE and alive(info.ublksrv_pid)


# ---- the state file: what `list` and `recover` need to know of a served device -------------------


def run_dir() -> str:
    """Return the directory of the state files."""
    user = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    own = os.path.join(runtime, "ublk") if runtime else f"/tmp/ublk-{user}"
    return os.path.abspath(os.environ.get("UBLK_RUN_DIR") or (own if user else "/run/ublk"))


def state_path(dev_id: int) -> str:
    """Return the path of a device's state file."""
    return os.path.join(run_dir(), f"{dev_id}.json")


def log_path(dev_id: int) -> str:
    """Return the path of the log of a device's server, where that is in the background."""
    return os.path.join(run_dir(), f"{dev_id}.log")


OWN_RUN_DIR = "set UBLK_RUN_DIR to a directory of yours with mode 0700"


def make_run_dir() -> None:
    """Make the directory of the state files where it is not there yet.

    Raises UblkError: EPERM where not we alone may write there, or the errno of
    what failed.
    """
    path = run_dir()
    what = f"state directory {path}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise UblkError(error.errno or errno.EIO, what, remedy=OWN_RUN_DIR) from None
    if not is_own(path):
        raise UblkError(
            errno.EPERM, what, "not you, and you alone, may write there", OWN_RUN_DIR
        )


def is_own(path: str) -> bool:
    """Tell whether we, and we alone, may write in a directory. A link that others made is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o022
        and os.access(path, os.W_OK)
    )


def save_state(device: Device) -> None:
    """Write the state file of a device atomically, where nobody else can write.

    What is in it: id and identity (16 hex digits); target, args and options,
    the words that made the disk, and cwd, where they were given; pid of the
    server; files, what tells those it is made of from others; size in bytes;
    follows, whether the server looks at the size by itself.

    Raises UblkError: EPERM where others may write in the directory, or the
    errno of what failed.
    """
    target, args, options = device.words
    args = [word for word in args if word not in device.target.once]
    device.files = device.files or identities(device)
    for known in device.files:
        with contextlib.suppress(OSError):  # it has another name by now
            now = file_identity(known[0])
            if now[:-1] == known[:-1]:  # or another has its name
                known[-1] = now[-1]
    state = {
        "id": device.id,
        "identity": f"{device.identity:016x}",
        "target": target,
        "args": args,
        "options": options,
        "cwd": device.directory,
        "pid": os.getpid(),
        "follows": device.follows,
        "files": device.files,
        "size": device.size,
    }
    path = state_path(device.id)
    make_run_dir()
    try:
        with open(f"{path}.new", "w", encoding="utf-8", opener=private) as file:
            json.dump(state, file)
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise UblkError(
            error.errno or errno.EIO, f"state file {path}", remedy=OWN_RUN_DIR
        ) from None


def identities(device: Device) -> list[list[Any]]:
    """Return what tells the files that a device is made of from others."""
    return [file_identity(os.path.join(device.directory, path)) for path in device.target.files]


# linux/fcntl.h, linux/stat.h
AT_FDCWD = -100
STATX_BTIME = 0x800


def file_identity(path: str) -> list[Any]:
    """Return what tells a file or block device from others that may get its name.

    That is path, device, inode, time of birth (a new file often gets the inode
    of one that was just removed) and size in bytes; of a block device its
    number, which of all disks since the start of the machine it is (5.15), and
    where a partition begins.
    """
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        place = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        # Of a disk, or of the disk that a partition is of, and where in that
        told = [lines_of(f"{place}/{name}") for name in ("diskseq", "../diskseq", "start")]
        return [path, "device", status.st_rdev, told, 0]
    more = ctypes.create_string_buffer(256)  # struct statx; zeroes where nobody tells
    if hasattr(_libc, "statx"):
        _libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_BTIME, more)
    born = list(struct.unpack_from("=qI", more, 80))
    return [path, status.st_dev, status.st_ino, born, status.st_size]


def check_files(what: str, files: Any) -> None:
    """Refuse (EINVAL) to serve a disk of other files than it was made of.

    files: as file_identity() told them; longer ones are fine, shorter ones are
    what is left of them.
    """
    for path, *number, size in files:
        try:
            _, *number_now, size_now = file_identity(path)
        except OSError as error:
            raise UblkError(error.errno or errno.ENOENT, f"{what}: {path}") from None
        another = "another file than it was made of" if number != number_now else ""
        refuse(
            another or size_now < size,
            what,
            f"{path} is {another or 'shorter than it was'}",
            "put that one back, or name its target with --target",
        )


def private(path: str, flags: int) -> int:
    """Open a file only its owner may read, never through a symbolic link nor waiting for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def load_state(dev_id: int, identity: int | None = None) -> dict[str, Any]:
    """Return the state of a device; empty if there is none, or none to be believed.

    identity: of the device now. The state of one with another identity is of
    one that had the same number before. What is not believed is told on
    standard error: a file of somebody else's, a damaged one, one that names no
    target.
    """
    path = state_path(dev_id)
    try:
        with open(path, encoding="utf-8", opener=private) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
                raise ValueError("not a regular file of its owner")
            state = json.loads(file.read(1 << 20))
        if state["id"] != dev_id:
            raise ValueError("not the state of this device")
        if identity is not None and state["identity"] != f"{identity:016x}":
            raise ValueError("the state of another device, which had the same number")
        words = [state["target"], state["cwd"]] + state["args"]
        "".join(words)  # a TypeError where they are none
        return state
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            say(f"ignoring {path}: {error}")
        return {}


def forget_state(dev_id: int) -> bool:
    """Remove the state file of a device and its log; tell whether there was a state file."""
    if not is_own(run_dir()):  # what has these names there may be anything
        return False
    with contextlib.suppress(OSError):
        os.unlink(log_path(dev_id))
    try:
        os.unlink(state_path(dev_id))
    except OSError:
        return False
    return True


def stale_states(ids: Sequence[int]) -> list[int]:
    """Return the devices that have a state file and are not among ids."""
    files = Path(run_dir()).glob("*.json") if is_own(run_dir()) else ()
    names = [path.stem for path in files]
    found = {int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,6}", name)}
    return sorted(found - set(ids))


def geometry(control: Control, info: Any) -> tuple[int, int]:
    """Return the size of a disk and of its blocks in bytes; 0, 0 while it is being removed.

    A handler may hold that up, or that a disk is detached, and GET_PARAMS, and
    the end of whoever has sent it, would wait along; so of a disk that is there
    sysfs is asked, where there is that.
    """
    if info.state != UBLK_S_DEV_DEAD and os.path.isdir("/sys/block"):
        block = "".join(lines_of(f"/sys/block/ublkb{info.dev_id}/queue/logical_block_size"))
        return disk_size(info.dev_id), int(block or 0)
    basic = control.get_params(info.dev_id).basic
    return basic.dev_sectors * SECTOR, 1 << basic.logical_bs_shift


def describe(control: Control, dev_id: int) -> dict[str, Any]:
    """Return what `list --json` prints of a device.

    The kernel's word goes before the state file's. Raises UblkError.
    """
    info = control.get_dev_info(dev_id)
    size, block = geometry(control, info)
    state = load_state(dev_id, info.ublksrv_flags)
    return {
        "id": dev_id,
        "path": f"/dev/ublkb{dev_id}",
        "char_path": f"{NODE}{dev_id}",
        "state": STATES.get(info.state, str(info.state)),
        "target": state.get("target"),
        "args": state.get("args"),
        "size": size,
        "block_size": block,
        "queues": info.nr_hw_queues,
        "depth": info.queue_depth,
        "max_io_bytes": info.max_io_buf_bytes,
        "flags": flag_names(info.flags),
        "pid": info.ublksrv_pid if is_served(info) else -1,
        "owner_uid": info.owner_uid,
        "owner_gid": info.owner_gid,
    }


# =================================================================================================
# Ordinary users and containers
# =================================================================================================
#
# ublk needs CAP_SYS_ADMIN, with one way around it (6.3): a device with the flag
# UNPRIVILEGED_DEV. Anybody who may open /dev/ublk-control may add one; the
# driver remembers the owner, and who may open /dev/ublkcN may command it. The
# nodes are made for root, though. It is udev that hands them over, by rules
# that ask for the owner (`udev-rules` prints them), and until it has done so
# they cannot be opened, so every step waits for its node. The mode is 0600: the
# driver lets whoever may open the node stop and delete the disk, and a group is
# more people than the owner thinks.
#
# Such a disk is a less trusted one: the kernel reads no partition table from
# it, takes no zero copy, gives no recovery, and ends a server that keeps a
# request for 30 seconds.
#
# In a container the nodes do not appear by themselves, and /proc tells of other
# processes than the kernel means; `check` says what is missing, and what to do
# about it.


def privileged() -> bool:
    """Tell whether this process has CAP_SYS_ADMIN, and that outside any user namespace."""
    status = Path("/proc/self/status").read_text(errors="replace")
    effective = re.findall(r"CapEff:\s+(\w+)", status)[-1]  # the name of a program comes before
    users = " ".join(lines_of("/proc/self/uid_map")).split()
    outside = users in ([], ["0", "0", "4294967295"])  # none without user namespaces
    return outside and bool(int(effective, 16) & CAP_SYS_ADMIN)


def await_node(path: str, mode: int, pause: Callable[[float], object] = time.sleep) -> None:
    """Wait until udev has made a device node and, for ordinary users, handed it over.

    mode: os.R_OK and os.W_OK, as for access(2). Raises UblkError: ENOENT,
    EACCES.
    """
    if not becomes(lambda: is_usable(path, mode), NODE_TIMEOUT, pause):
        number = errno.EACCES if os.path.exists(path) else errno.ENOENT
        raise UblkError(number, f"cannot use {path}", remedy="see `ublk.py check`")


def is_usable(path: str, mode: int) -> bool:
    """Tell whether a device node is there and may be used."""
    # In a container a plain file may stand in its place first, for the node to
    # be mounted upon: look for that before, or it could be the file that may be
    # used, and the node that is there.
    try:
        return not stat.S_ISREG(os.stat(path).st_mode) and os.access(path, mode)
    except OSError:
        return False


def set_admin(use: bool) -> None:
    """Have this thread use its CAP_SYS_ADMIN, if it has it, or not.

    capset(2) is about threads. A disk that is fetched without it is not scanned
    for partitions inside START_DEV.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    _libc.capget(header, sets)
    sets[0] = sets[0] & ~CAP_SYS_ADMIN | sets[1] & CAP_SYS_ADMIN * use
    _libc.capset(header, sets)


def not_roots_alone(path: str) -> str:
    """Return what of a path others than root may change; nothing if that is none of it.

    That is the file itself or a directory above it. path is a real path,
    absolute and without links.
    """
    for place in (path, *map(str, Path(path).parents)):
        status = os.stat(place)
        if status.st_uid or status.st_mode & 0o022:
            return place
    return ""


def udev_word(path: str) -> str:
    """Write a path as a word of PROGRAM in a udev rule."""
    refuse(
        set(path) & set("'\"\\\n"),
        f"the path {path!r}",
        "udev cannot be told of it",
        "use another",
    )
    word = path.replace("%", "%%").replace("$", "$$")
    return f"'{word}'" if " " in word else word


def asks_for_owner(rule: str) -> bool:
    """Tell whether a udev rule asks for a device's owner, of a Python and a program still there."""
    found = re.match(r"""[^#]*PROGRAM="('?)(.+?)\1 -I ('?)(.+)\3 udev-owner %k\"""", rule)
    if not found:
        return False
    try:
        for word in found.group(2, 4):
            os.stat(word.replace("%%", "%").replace("$$", "$"))
    except FileNotFoundError:
        return False
    except PermissionError:  # root may look
        pass
    return True


def udev_rules() -> Iterator[str]:
    """Yield the lines of all udev rules on this machine."""
    for directory in ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d"):
        for path in glob.glob(f"{directory}/*.rules"):
            yield from lines_of(path)


# =================================================================================================
# What a disk tells of its life
# =================================================================================================
#
# With --trace a disk narrates what it does, to be read beside this file, or sent
# along with a bug report. Each control command is told when it is sent and when
# it is answered, as it may wait for long, or for ever. A request has stages:
#
#     arrived     the loop has found the CQE of its tag
#     decoded     its descriptor is read: operation, flags, sectors
#     handler     this method of the target is called
#     result      it is answered: bytes, or a negative errno; by a coroutine that is later
#     committed   its COMMIT lies in the ring, and goes with the next system call
#
# Where map() has the kernel move the data, its result is a promise, for the
# commit is the end of the same chain; if a part of that fails, `chain` tells so,
# and the request is handled anew. With batches, `chain` tells of each part.
#
# To cost nothing where nobody listens there must be no question in the loop,
# not even a cheap one. A traced disk has other classes instead, chosen when its
# Control and its queues are made: they tell what happens and do what they did.
#
# A busy disk does more than anybody reads, and telling it takes longer than
# doing it. So each second a hundred requests are told of, from the first stage
# to the last, and of the others how many there were.

TOLD_EACH_SECOND = 100  # requests that a disk tells of
Hearer = Callable[[int, str, dict[str, Any]], object]  # of time, stage, and the rest


PLAIN = dict.fromkeys(map(ord, '{}[]"'))  # what JSON has and text has not
OPERATIONS = names_of("UBLK_IO_OP_")
REQUEST_FLAGS = names_of("UBLK_IO_F_")
# What numbers in what goes along with a command mean
MEANINGS: dict[tuple[Any, str], Callable[[int], Any]] = {
    (ublksrv_ctrl_dev_info, "flags"): flag_names,
    (ublksrv_ctrl_dev_info, "state"): STATES.get,
    (ctypes.c_uint64, "value"): flag_names,
}


def fields_of(payload: Any) -> dict[str, Any]:
    """Return what is not zero in what goes along with a command, or comes back."""
    fields = {}
    for name, *_ in getattr(payload, "_fields_", [("value",)]):
        value = getattr(payload, name, None)
        if isinstance(value, ctypes.Structure):
            fields[name] = fields_of(value)
        elif isinstance(value, int) and value:
            fields[name] = MEANINGS.get((type(payload), name), int)(value)
    return fields


class Trace:
    """What a disk tells its life to.

    hear: hear(ns, stage, more) is called for each thing that happens, by one
        thread at a time: when, what, and in a dict all about it.
    """

    def __init__(self, hear: Hearer) -> None:
        self.hear = hear
        self.requests = 0  # that have come
        self._last = 0  # the number of the last one that is told of before the second ends
        self._until = 0.0
        self._lock = threading.RLock()

    def tell(self, stage: str, **more: Any) -> None:
        """Tell what has happened; that nobody can hear it must hurt neither request nor disk."""
        if more.get("result", 0) < 0:
            more["error"] = ERRNO_NAMES.get(-more["result"])
        with self._lock:
            try:
                self.hear(time.monotonic_ns(), stage, more)
            except (Exception, SystemExit) as error:
                show(error)

    def number(self) -> int:
        """Return the number of a request that has come, or 0 where it is not told of."""
        with self._lock:
            if time.monotonic() > self._until:
                self.tell_dropped()
            self.requests += 1
            return self.requests if self.requests <= self._last else 0

    def tell_dropped(self) -> None:
        """Tell how many requests were not told of, if any, and begin another second."""
        with self._lock:
            if self.requests > self._last:
                self.tell("dropped", requests=self.requests - self._last)
            self._last = self.requests + TOLD_EACH_SECOND
            self._until = time.monotonic() + 1.0


class TracedControl(Control):
    """A control plane that tells of its commands."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        super().__init__()

    def _run(
        self, command: Command, dev_id: int, payload: Any = None, *rest: Any, **more: Any
    ) -> int:
        tell = partial(self.trace.tell, command=command.name, device=dev_id)
        tell("sent", data=more.get("data", 0), **fields_of(payload))
        try:
            result = super()._run(command, dev_id, payload, *rest, **more)
        except UblkError as error:
            tell("answer", result=-(error.errno or 0), reason=error.reason)
            raise
        tell("answer", result=result, **fields_of(payload))
        return result


class TracedQueue(Queue):
    """A queue that tells of its requests, and has each served by itself."""

    def __init__(self, device: Device, index: int) -> None:
        self.trace: Any = device.trace
        self.numbers = [0] * device.info.queue_depth  # of each tag's request
        super().__init__(device, index)

    def tell(self, tag: int, stage: str, **more: Any) -> None:
        """Tell a stage of a tag's request, if that is told of."""
        number = self.numbers[tag]
        if number:
            self.trace.tell(stage, queue=self.index, tag=tag, request=number, **more)

    def collect(self, timeout: float | None = None) -> list[int]:
        tags = super().collect(timeout)
        for tag in tags:
            self.numbers[tag] = self.trace.number()
            self.tell(tag, "arrived")
        return tags

    def _answer(self) -> Callable[[list[int]], object]:
        answer = super()._answer()
        way = answer.__name__

        def answer_each(tags: list[int]) -> None:
            for tag in tags:
                flags = self.flags[tag]
                self.tell(
                    tag,
                    "decoded",
                    op=OPERATIONS.get(flags & 0xFF, "?"),
                    flags=[name for bit, name in REQUEST_FLAGS.items() if flags & bit],
                    sector=self.starts[tag],
                    sectors=self.sectors[tag],
                )
                self.tell(tag, "handler", by=way)
                # With their commit, and answered, are chains that _answer_by_map() sent
                if answer([tag]) and self.link_last and way == "_answer_by_map":
                    self.tell(tag, "result", result=self.results[tag])
                    self.tell(tag, "committed")

        return answer_each

    def repeat(self, tags: list[int]) -> None:
        for tag in tags:
            self.tell(tag, "result", result=self.results[tag])
        super().repeat(tags)

    def chain_done(self, tag: int, stage: int, result: int) -> None:
        self.tell(tag, "chain", part=stage, result=result)
        super().chain_done(tag, stage, result)

    def commit(self) -> None:
        for tag in self._done:
            self.tell(tag, "committed")
        super().commit()

    def wind_up(self) -> None:
        super().wind_up()
        self.trace.tell_dropped()


class TracedBatchQueue(TracedQueue, BatchQueue):
    """The same with batches."""

    def commit(self) -> None:
        if not self._sent:
            super().commit()


def narrator(path: str) -> Hearer:
    """Return what a Trace is heard by: standard error (as which "-" counts) gets text, a file JSON.

    What the file has stays: it may be of the server before, which died.
    """

    def narrate(ns: int, stage: str, more: dict[str, Any]) -> None:
        text = json.dumps(more).translate(PLAIN)
        say(f"{ns / 1e9:.6f} {stage:<9} {text}")

    def note(ns: int, stage: str, more: dict[str, Any]) -> None:
        line = json.dumps({"ns": ns, "stage": stage, **more})
        file.write(f"{line}\n".encode())

    if path == "-":
        return narrate
    file = open(path, "ab", buffering=0)
    return note


# =================================================================================================
# Command line
# =================================================================================================
#
# The contract of the command line is in three sentences. What a program wants
# to read goes to standard output, the rest to standard error: the first line of
# a create is the path of the disk, and nothing else. The exit status is 0, 1
# (it did not work) or 2 (the words make no sense). An error is one line.
#
# A target's own options come from its class. `inspect` and `typing` tell the
# names, types and defaults of what __init__ takes, argparse does the rest; a
# type that is not understood is refused, rather than taken for a string. A file
# of the user's own is a module like any other, loaded under its own name.
#
# A server in the background is a child process. It tells its parent through a
# pipe of its own. What the caller gave it, as a key to read, it has until the
# disk is there, and then nothing: its output goes to a log beside the state file
# from then on. That the disk is there is told last of all, when nothing else can
# fail any more; if the command was killed meanwhile, its disk goes, too.
#
# Signals only leave a note, and the one loop that waits looks at it. So there
# is no moment in which a signal could find a device half made and leave it
# behind.
#
# The way of a create through this chapter: main() sees that the first word is no
# command; create() lets argparse take the device's options, and target_maker()
# the target's, so that wrong words are told before anything is done; launch()
# goes into the background if asked to; serve() starts the device, tells whoever
# waits, and then does nothing but look, once a second, whether it is to end.
#
# To create is to recover where the words are those of a device that waits for a
# server (`waits_for`). So whatever starts a program again when it fails, systemd
# for one, supervises a disk, and there is nothing here that does.


class Usage(Exception):
    """The words on the command line make no sense: exit status 2."""


class NotASize(argparse.ArgumentTypeError, ValueError):
    """What parse_size raises; argparse tells only its own errors as they are."""


SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:([KMGT])(?:i?B)?)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a number of bytes such as 4096, 512K, 1.5MiB or 1GB (powers of 1024).

    Exactly, as floats are not: 0.1G is refused, for it is no whole number of
    bytes. Raises NotASize, a ValueError.
    """
    found = SIZE.fullmatch(text)
    if found:
        number, unit = found.groups(" ")
        size = fractions.Fraction(number) * 1024 ** " KMGT".index(unit.upper())
        if size.denominator == 1:
            return int(size)
    raise NotASize(f"{text!r} is not a whole number of bytes, such as 4096, 512K or 1GiB")


def format_size(size: int) -> str:
    """Write a number of bytes the way parse_size reads it."""
    for shift, letter in zip((40, 30, 20, 10), "TGMK"):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{letter}"
    return str(size)


# ---- words into targets ---------------------------------------------------------------------------
#
# A target's constructor is its command line. What it takes is asked of
# inspect.signature(), what type each parameter has of typing.get_type_hints(),
# and argparse does the rest:
#
#     def __init__(self, path, *, size: Size, retries: int = 3, verbose: bool = True)
#
#     ublk.py ./mine.py disk.img --size 1G --retries 5 --no-verbose
#
# Parameters that may be given by position are words, those after the star are
# options. A parameter that is a Target takes all the words that remain. A type
# that is not understood is refused: a string in place of what was asked for
# would be found out by the disk's data.


def companion() -> Any:
    """Return the module ublk_targets when it lies beside this file, else None.

    An error in it is raised, not taken for its absence.
    """
    folder = os.path.dirname(os.path.realpath(__file__))
    if folder not in sys.path:  # as in `python -I`
        sys.path.append(folder)
    try:
        return importlib.import_module("ublk_targets")
    except ModuleNotFoundError as error:
        if error.name != "ublk_targets":
            raise
        return None


def is_target(item: Any) -> bool:
    """Tell whether something is a class of targets."""
    return isinstance(item, type) and issubclass(item, Target)


def known_targets() -> dict[str, type[Target]]:
    """Return the targets that may be named on the command line, by name.

    They are all Target classes of this file and the companion, in small
    letters.
    """
    names = {"Null": Null, **vars(companion() or object)}
    return {
        name.lower(): item
        for name, item in names.items()
        if is_target(item) and item is not Target
    }


def find_target(word: str) -> type[Target]:
    """Return the class that a name or FILE.py:CLASS stands for.

    Raises UblkError for a file that cannot be loaded, Usage for a name that is
    none.
    """
    if ".py" in word:
        path, _, name = word.rpartition(":")
        return load_target(path, name) if name.isidentifier() else load_target(word, "")
    targets = known_targets()
    if word not in targets:
        raise Usage(
            f"unknown target or command {word!r} (options come behind it): targets are "
            f"{', '.join(sorted(targets))}, or FILE.py:CLASS"
        )
    return targets[word]


def load_target(path: str, name: str) -> type[Target]:
    """Run a file of the user's and return the Target class called name, or its only one.

    Raises UblkError (EINVAL) for what it has not, OSError where it cannot be
    read.
    """
    module = run_file(path)
    classes = {
        key: item
        for key, item in vars(module).items()
        if is_target(item) and item.__module__ == module.__name__
    }
    if not name and len(classes) == 1:
        return classes.popitem()[1]
    if name in classes:
        return classes[name]
    raise UblkError(
        errno.EINVAL,
        f"cannot load {path}:{name}",
        f"its Target classes are {', '.join(classes) or 'none'}",
        "name one of them, or derive one from ublk.Target",
    )


def run_file(path: str) -> Any:
    """Run a file of the user's as a module, and return that.

    Its name has a dot, so that it takes the place of no module that can be
    imported. It is compiled here, because a compiled copy that is kept may be
    that of the file before it was edited. What it prints is no answer of ours,
    so it goes to standard error. Raises UblkError (EINVAL) for whatever it
    raises.
    """
    source = Path(path).read_bytes()
    name = os.path.basename(path)
    module = types.ModuleType(name)
    module.__file__ = os.path.abspath(path)
    sys.modules[name] = module  # where dataclasses look for the names in annotations
    sys.path.insert(0, os.path.dirname(module.__file__))
    with contextlib.redirect_stdout(sys.stderr), one_line(f"cannot load {path}"):
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Have whatever the user's code raises be an error line: UblkError (EINVAL).

    what: what has failed then.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UblkError(errno.EINVAL, what, reason, "mend the file") from error


def whole_number(text: str) -> int:
    """Read an int: decimal, with a sign, as 0x…, or with the letters of a size."""
    try:
        return int(text, 0)
    except ValueError:
        return parse_size(text)


def make_parser(program: str, **options: Any) -> argparse.ArgumentParser:
    """Make a command line parser that takes no abbreviations."""
    return argparse.ArgumentParser(program, allow_abbrev=False, **options)


# type of a parameter -> what reads its word
READERS: dict[Any, Callable[[str], Any]] = {
    int: whole_number,
    Size: parse_size,
    float: float,
    str: str,
    Path: Path,
}
# What Optional[T] is, and from Python 3.10 on T | None
UNIONS = (typing.Union, getattr(types, "UnionType", typing.Union))


def parameters(cls: type[Target]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return name -> (parameter, its type) of a target's constructor.

    What has no annotation is of the type of its default; a size is a Size. What
    no words can give, such as ``**options``, is left out. Raises UblkError
    (EINVAL) for annotations that name what does not exist.
    """
    with one_line(f"annotations of {cls.__name__}"):
        hints = typing.get_type_hints(cls.__init__)
        signature = inspect.signature(cls)
    found = {}
    for name, parameter in signature.parameters.items():
        kind = without_none(hints.get(name) or implied_type(name, parameter.default))
        if parameter.kind is parameter.VAR_POSITIONAL:
            kind = types.GenericAlias(list, kind)
        if kind is not None and parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = parameter, kind
    return found


def implied_type(name: str, default: Any) -> Any:
    """Return the type of a parameter without annotation, as its default tells.

    None if no words are meant to give it.
    """
    if name == "size":
        return Size
    if default is None or default is inspect.Parameter.empty:
        return str
    kind = type(default)
    return kind if kind in READERS or kind is bool or isinstance(default, enum.Enum) else None


def without_none(kind: Any) -> Any:
    """Return T for Optional[T] and T | None, and any other type as it is."""
    others = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) in UNIONS and len(others) == 1:
        return others[0]
    return kind


def reading(kind: Any, name: str) -> dict[str, Any]:
    """Return what tells argparse how to read words into a type.

    Raises UblkError (EINVAL) for a type that they cannot become, which is
    better found out now than by the disk's data.
    """
    if kind in list(READERS):  # what is no type, such as [int], may have no hash
        return {"type": READERS[kind]}
    if kind is bool and name.startswith("no_"):  # argparse would take --no-x for its False
        return {"action": "store_const", "const": True}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if is_target(kind):
        return {"nargs": "..."}
    parts = typing.get_args(kind)
    shape = typing.get_origin(kind) or kind
    if shape is typing.Literal:
        return {"type": choice({str(value).lower(): value for value in parts})}
    if shape is list:
        each = reading(parts[0] if parts else str, name)
        if list(each) == ["type"]:
            return {**each, "nargs": "+"}
    if isinstance(shape, type) and issubclass(shape, enum.Enum):
        return {"type": choice({member.name.lower(): member for member in shape})}
    raise UblkError(
        errno.EINVAL,
        f"parameter {name}",
        f"words cannot become {kind!r}",
        "use bool, int, float, str, Path, Size, Enum, Literal, a list of these, or Target",
    )


def choice(values: dict[str, Any]) -> Callable[[str], Any]:
    """Return a reader of the words, in small letters, that name these values."""

    def read(text: str) -> Any:
        if text.lower() in values:
            return values[text.lower()]
        raise argparse.ArgumentTypeError(f"{text!r}: choose one of {', '.join(values)}")

    return read


def target_parser(
    cls: type[Target], word: str, words: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Make a command line parser of a target's constructor.

    A parameter that could be a word is an option where these words name it as
    one. What is not given is None, or an empty list: the constructor knows its
    defaults. Lines ``name: text`` of the class's docstring are the help.
    """
    named = {given.partition("=")[0] for given in words}
    text = inspect.getdoc(cls) or ""
    helps = dict(line.strip().partition(": ")[::2] for line in text.splitlines())
    parser = make_parser(
        f"ublk.py {word}",
        description=text.split("\n\n")[0],
        epilog="Device options: see `ublk.py --help`.",
    )
    taken = device_parser()
    for name, (parameter, kind) in parameters(cls).items():
        extra = reading(kind, name)
        extra["help"] = help_of(helps.get(name, ""), parameter.default)
        option = "--" + name.replace("_", "-")
        optional = parameter.default is not parameter.empty
        try:
            if name != "read_only":  # which both are to hear of
                taken.add_argument(option, **extra)
            if parameter.kind is parameter.KEYWORD_ONLY or kind is bool or option in named:
                parser.add_argument(option, dest=name, required=not optional, **extra)
                continue
        except argparse.ArgumentError as error:
            refuse(error, f"parameter {name}", f"it cannot be the option {option} ({error})")
        if optional and not is_target(kind):  # whose words may have options among them
            extra["nargs"] = "*" if "nargs" in extra else "?"
        parser.add_argument(name, **extra)
    return parser


def help_of(text: str, default: Any) -> str:
    """Return the help of a parameter, with its default."""
    if default is not inspect.Parameter.empty and default not in (None, ""):
        shown = default.name.lower() if isinstance(default, enum.Enum) else default
        text += f" (default: {format_size(shown) if isinstance(shown, Size) else shown})"
    return text.strip().replace("%", "%%")


def target_maker(words: Sequence[str], read_only: bool = False) -> Callable[[], Target]:
    """Read the words that name a target and its arguments; return what makes it.

    read_only: what the target is told before it opens anything, if it takes a
    parameter of that name. A target over another one is made after that. Raises
    UblkError and Usage for the words; what the constructor raises comes when
    the function is called.
    """
    if not words:
        raise Usage("a target is missing")
    word, *rest = words
    cls = find_target(word)
    read = vars(target_parser(cls, word, rest).parse_args(rest))
    if "read_only" in read:
        read["read_only"] = read_only or read["read_only"]
    given = {name: value for name, value in read.items() if value not in (None, [])}
    for name, (parameter, kind) in parameters(cls).items():
        if is_target(kind) and (name in given or parameter.default is parameter.empty):
            given[name] = target_maker(read[name], read_only)
    return partial(build_target, cls, word, given)


def make_target(words: Sequence[str]) -> Target:
    """Make the target that words name, with its arguments. Raises UblkError."""
    return target_maker(words)()


def build_target(cls: type[Target], word: str, given: dict[str, Any]) -> Target:
    """Make a target of its arguments by name.

    Raises UblkError: an OSError of the constructor with its own errno and the
    file it names, anything else with EINVAL.
    """
    values = inspect.signature(cls).bind_partial()
    for name, value in given.items():
        below = isinstance(value, partial)  # a target, which is made first
        values.arguments[name] = value() if below else value
    values.apply_defaults()  # what stands before a word must be there, too
    try:
        return cls(*values.args, **values.kwargs)
    except UblkError:
        raise
    except OSError as error:
        what = f"target {word} {error.filename or ''}".rstrip()
        reason = (error.strerror or str(error)).lower()
        number = error.errno or errno.EIO
        if number not in errno.errorcode:  # but one of ssl's own
            number = errno.EIO
        raise UblkError(number, what, reason) from error
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UblkError(errno.EINVAL, f"target {word}", reason) from error


# ---- create -------------------------------------------------------------------------------------


def device_parser() -> Any:
    """Make the parser of the options every target takes."""
    parser = make_parser(
        "ublk.py", usage="ublk.py TARGET [TARGET ARGS] [DEVICE OPTIONS]", add_help=False
    )
    add = parser.add_argument
    add(
        "-n", "--id", type=int, default=-1, help="the N of /dev/ublkbN; default: the first free"
    )
    add("-q", "--queues", type=int, default=1, help="hardware queues (1)")
    add("-d", "--depth", type=int, default=128, help="requests in flight per queue (128)")
    add("--max-io", type=parse_size, default=512 << 10, help="largest request (512K)")
    add("--block-size", type=parse_size, help="logical block size (the target's)")
    add("--read-only", action="store_true", help="refuse writes")
    add(
        "-r",
        "--recovery",
        choices=("requeue", "reissue", "fail"),
        help="what becomes of requests when the server dies; the disk then outlives it",
    )
    paths = parser.add_mutually_exclusive_group()
    for path, *names in (
        ("user-copy", "-u", "--user-copy"),
        ("zero-copy", "-z", "--zero-copy"),
        ("get-data", "-g", "--need-get-data"),
        ("auto-zero-copy", "--auto-zero-copy"),
        ("copy", "--copy"),
    ):
        paths.add_argument(
            *names,
            dest="data_path",
            action="store_const",
            const=path,
            help=DATA_PATHS[path].summary,
        )
    add(
        "-p",
        "--unprivileged",
        action="store_const",
        const=True,
        help="a disk of an ordinary user's (chosen by itself without CAP_SYS_ADMIN)",
    )
    add("-b", "--batch", action="store_true", help="commands for many requests at a time (7.0)")
    add(
        "--no-partition-scan",
        dest="partition_scan",
        action="store_false",
        help="do not look for partitions",
    )
    add(
        "--force",
        action="store_true",
        help="create it even where this kernel is known to crash",
    )
    for name in ("--background", "--json", "--debug", "--trace"):
        add(name, **ARGUMENTS[name])
    return parser


# Options about the command, not about the disk
TOLD = ("background", "force", "json", "debug", "trace")


def create(words: Sequence[str]) -> int:
    """Create a device and serve it, here or in the background.

    Or recover it, where the same words made it and it waits for a server.
    """
    options, args = device_parser().parse_known_args(spelled_out(words[1:]))
    started = Started(options)
    # What is wrong with the words is told here, and at once.
    words = [words[0], *args]
    make = target_maker(words, options.read_only)
    asked = {name: value for name, value in vars(options).items() if name not in TOLD}
    made_by = {**asked, "words": words}
    block_size = asked.pop("block_size")
    read_only = asked.pop("read_only")
    identity = new_identity(True)

    def first() -> None:
        if options.id in device_ids():
            if options.recovery and waits_for(options.id, made_by):
                return recover_from_state(options.id, started)
            # Before the target touches a file that may be another server's.
            what = f"cannot create device {options.id}"
            raise explain(UBLK_CMD_ADD_DEV, errno.EEXIST, what)
        target = make()
        if block_size is not None:
            refuse(
                SECTOR <= block_size < target.block_size,
                f"block size {block_size}",
                f"less than the target's own, {target.block_size}",
            )
            target.block_size = block_size
        if read_only:
            target.read_only = True
        device = Device(
            target,
            **asked,
            force=options.force,
            trace=started.trace,
            words=(words[0], args, made_by),
        )
        device.identity = identity
        serve(device, device.start, started)

    return launch(first, started, identity)


def spelled_out(words: Sequence[str]) -> list[str]:
    """Return the words of a command, with --trace written so that it takes no word behind it."""
    return ["--trace=-" if word == "--trace" else word for word in words]


def waits_for(dev_id: int, made_by: dict[str, Any]) -> bool:
    """Tell whether a device has lost its server and was made by the same words.

    In the same directory, since they may name files. Then to create it is to
    recover it: so whatever starts a server again (systemd does, with
    Restart=on-failure) needs no other words for it.
    """
    with Control() as control:
        info = control.get_dev_info(dev_id)
    state = load_state(dev_id, info.ublksrv_flags)
    # One that has died the kernel may notice later.
    waits = info.state != UBLK_S_DEV_DEAD and not is_served(info)
    return waits and state.get("options") == made_by and state["cwd"] == os.getcwd()


def launch(run: Callable[[], None], started: Started, identity: int = 0) -> int:
    """Run a server, with --background in another process. Returns the exit status.

    run: serves, and tells started when the disk is there.
    identity: of a device it may create, which is deleted should it die.
    """
    if started.options.background:
        return in_background(run, started, identity)
    with contextlib.redirect_stdout(sys.stderr):  # where a target may print what it likes
        run()
    return 0


class Started:
    """Tells whoever waits for a disk that it is there, and then a parent process.

    The one hears of it on standard output; the other reads a pipe: ``live``, or
    ``failed`` once standard error has been told why.

    options: of the command; made before anything is opened, for what is open now
    is of whoever called us.
    """

    def __init__(self, options: Any) -> None:
        # But for the three standard ones
        self.inherited = {fd: file for fd, file in open_descriptors().items() if fd > 2}
        self.options = options
        self.out = sys.stdout
        self.news = -1
        if options.background and options.trace == "-":  # for which the log has no room
            raise Usage("--background leaves standard error: name a file, --trace=FILE")
        self.trace = None if options.trace is None else narrator(options.trace)

    def tell(self, news: bytes) -> None:
        """Write to the parent, if we have one. Raises OSError (EPIPE) where it has gone."""
        if self.news >= 0:
            os.write(self.news, news)
        self.hang_up()

    def see_that_somebody_waits(self) -> None:
        """Raise OSError (EPIPE) where the parent has gone."""
        gone = select.poll()
        gone.register(self.news, 0)
        if gone.poll(0):
            raise OSError(errno.EPIPE, "the command was killed")

    def hang_up(self) -> None:
        """Close the pipe to the parent, if there is one."""
        if self.news >= 0:
            os.close(self.news)
        self.news = -1

    def in_helper(self) -> None:
        """Keep nothing open that somebody waits for, in a process that a target forks.

        It may live as long as the disk.
        """
        self.hang_up()
        self.out.close()
        self.let_go(handed_down=True)

    def let_go(self, handed_down: bool) -> None:
        """Let go of what whoever called us has open.

        handed_down: of what a shell, say, has opened for us, or of the rest.
        """
        # Who has a number may close it yet, so it stays taken; and by who uses it,
        # data would be lost without an error in /dev/null.
        nothing = os.open("/", os.O_PATH)
        # Whoever of our caller's had a number may have closed it, and it be ours.
        # What we open is not handed down.
        for fd, _ in self.inherited.items() & open_descriptors().items():
            if os.get_inheritable(fd) == handed_down:
                os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    def live(self, device: Device) -> None:
        """Tell the path of the disk, or with --json all about it.

        And on standard error what the kernel made of the wish. In the
        background this is where the caller's output is left; its last sentence
        is "live", when nothing else can fail any more. A command that was killed
        meanwhile has no disk, so that raises an error, too.
        """
        if device.unprivileged:
            say(
                "note: a disk of an ordinary user has no partitions and no recovery, and a request that "
                "takes 30 seconds ends its server"
            )
        if device.info.nr_hw_queues < device.queues:
            say(
                f"note: {device.info.nr_hw_queues} queues, one for each processor, not {device.queues}"
            )
        text = device.path
        if self.options.json:
            text = json.dumps(describe(device.control, device.id))
        if self.news < 0:
            print(text, file=self.out, flush=True)
            return
        log = private(log_path(device.id), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # Hold nothing any more of where the command was given
        self.let_go(handed_down=True)
        print(text, file=self.out, flush=True)
        self.out.close()
        os.dup2(1, 0)
        os.dup2(log, 2)
        os.close(log)
        os.chdir("/")
        _libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)  # of its command, which ends now
        self.tell(b"live")


def on_signals(action: Any) -> None:
    """Have the signals that end a server call action.

    But what nohup(1) ignores stays ignored.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


def serve(device: Device, start: Callable[[], object], started: Started) -> None:
    """Serve a device until a signal takes it away or somebody else stops or detaches it.

    start: start() of the device, or resume().
    started: who is to be told that the disk is there.

    A signal deletes the device. Where somebody else ended the server the device
    is left as that made it. Raises UblkError where a queue failed.
    """

    on_signals(lambda number, _: device.interrupt(f"ended by {signal.Signals(number).name}"))
    device.follows = True
    with notifier() as notify:
        start()
        try:
            with device:  # whatever happens now, the disk does not stay behind without a server
                serve_started(device, started, notify)
        finally:
            # Not by a listing: descriptors may have run out
            if not os.path.exists(f"{NODE}{device.id}"):
                forget_state(device.id)


def serve_started(device: Device, started: Started, notify: Callable[[str], bool]) -> None:
    """Tell that the disk is there, and serve it.

    notify: tells systemd.

    One that was there before waits for another server where nobody can be told.
    """
    try:
        started.live(device)
    except BaseException:
        if device.recovers:
            device.detach()
        raise
    news = f"READY=1\nSTATUS=serving {device.path}"
    # Not without end: a signal that comes just before a wait for ever would
    # not end it.
    pause = min(watchdog() / 2 or 1.0, 1.0)
    while True:
        if notify(news):
            news = "WATCHDOG=1"
        if device.wait(pause):
            break
        device.follow_size()
    notify("STOPPING=1")
    if not device.interrupted and device.failure is None:
        device.detach()


def watchdog() -> float:
    """Return within how many seconds systemd wants to hear from us, 0 if it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() else 0.0


@contextlib.contextmanager
def notifier() -> Iterator[Callable[[str], bool]]:
    """Give what tells systemd a message (sd_notify(3)), where it started us and asked to be told.

    Nobody there, or nobody reading, is no reason to take a disk away: it returns
    False where systemd could not be told now.
    """
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
    if not address:
        yield bool
        return
    # As long as descriptors can be had: systemd ends who does not tell it in time
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:

        def notify(message: str) -> bool:
            try:
                channel.sendto(message.encode(), socket.MSG_DONTWAIT, address)
            except OSError:
                return False
            return True

        yield notify


def open_descriptors() -> dict[int, str]:
    """Return the descriptors this process has open, and of what."""
    found = {
        int(name): link_of(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
    }
    # The listing's own is closed by now, and leads nowhere
    return {fd: file for fd, file in found.items() if file}


def in_background(run: Callable[[], None], started: Started, identity: int) -> int:
    """Serve in a child process; return when the disk is usable, or the child's own error.

    The child keeps what whoever called us has given us until the disk is there.
    It tells its news through a pipe of its own. No program that it starts
    inherits that, or our output. Returns the exit status. Raises
    UblkError (ECHILD) where it died without a word; what it may have created is
    deleted, by its identity.
    """
    # Ignored, it would leave us nothing to wait for
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader, started.news = os.pipe()
    passed: list[int] = []

    def pass_on(number: int, frame: Any = None) -> None:
        passed.append(number)
        os.kill(child, number)  # which is nobody else before it is waited for

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # One that comes as we fork waits: it would be lost in what Python does then
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        child = os.fork()
        if child == 0:
            to_the_end(reader, run, started, before)
        on_signals(pass_on)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started.hang_up()
    heard = select.poll()  # for select() there may be too many descriptors
    heard.register(reader, select.POLLIN)
    # Not without end: a signal that comes just before would not be passed on
    while not heard.poll(1000):
        pass
    news = os.read(reader, 100)
    os.close(reader)
    on_signals(lambda number, frame: None)  # or a disk would go that was told to be there
    if news == b"live":
        if not passed:
            return 0
        pass_on(passed[0])  # it may have been ignored, or lost, while the target was made
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    clean_up(identity)
    if news == b"failed":
        return code
    if news:
        reason = f"ended by {signal.Signals(passed[0]).name}"
        raise UblkError(errno.EINTR, "the disk was there, and is no longer served", reason)
    what = "the server died before the disk was there"
    if code >= 0:
        raise UblkError(errno.ECHILD, what, f"exit status {code}")
    remedy = "" if -code in STOP_SIGNALS else "see the kernel's log"
    raise UblkError(errno.ECHILD, what, f"killed by signal {-code}", remedy)


def clean_up(identity: int) -> None:
    """Delete the device of a server that is gone, by its identity.

    Its number may be another's by now.
    """
    # Without a way to the driver nothing was created
    with contextlib.suppress(UblkError), Control() as control:
        for dev_id in device_ids() if identity else ():
            try:
                if control.get_dev_info(dev_id).ublksrv_flags == identity:
                    delete(control, dev_id, identity)
            except UblkError as error:
                if error.errno not in NOT_OURS:
                    say(f"device {dev_id} is left behind: {error}")


def to_the_end(
    reader: int, run: Callable[[], None], started: Started, signals: set[Any]
) -> NoReturn:
    """Run a forked child, and end it without what its parent has registered for its own end.

    reader: the parent's end of the pipe.
    signals: those that are to be blocked.
    """
    status = 1
    sys.stdout = sys.stderr
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        os.setsid()
        os.close(reader)
        # Who is killed has no disk, nor files that are locked until a target is made
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        started.see_that_somebody_waits()
        started.out = open(os.dup(1), "w", encoding="utf-8")
        os.register_at_fork(after_in_child=started.in_helper)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.close(null)
        started.let_go(handed_down=False)
        run()
        status = 0
    except BaseException as error:
        tell_failure(error, started.options.debug)
    finally:
        try:
            started.tell(b"failed")  # unless that is done
            sys.stdout.flush()
        finally:  # its reader may be gone
            os._exit(status)


# The words of a target, the options of its disk, and what makes it
Recipe = tuple[Sequence[str], dict[str, Any], Callable[[], Target]]


def recover_from_state(dev_id: int, started: Started, recipe: Recipe | None = None) -> None:
    """Serve a device anew, with the target its state file names or a recipe does.

    Raises UblkError: ENODEV, ENOENT where there is no state to be believed or
    the directory is gone, EINVAL for another file than it was made of.
    """
    device = Device(Target(), id=dev_id, trace=started.trace)

    def prepare() -> None:
        # No sooner: until the node is open, another server may have the target's
        # files, and change what a target remembers of them.
        noted = signal.getsignal(signal.SIGTERM)
        on_signals(signal.default_int_handler)  # for what may never return
        device._pause(0)  # one may have come before
        words, options, make = recipe or recipe_of(dev_id, device.identity)
        device.take(make(), (words[0], words[1:], options))
        on_signals(noted)

    serve(device, partial(device.resume, prepare), started)


def recipe_of(dev_id: int, identity: int) -> Recipe:
    """Return what a device's state file tells, from where its words may name files."""
    what = f"cannot recover device {dev_id}"
    remedy = f"name its target: `ublk.py recover {dev_id} --target TARGET ...`"
    state = load_state(dev_id, identity)
    if not state:
        reason = f"there is no state file {state_path(dev_id)} of it"
        raise UblkError(errno.ENOENT, what, reason, remedy)
    words = [state["target"], *state["args"]]
    try:
        os.chdir(state["cwd"])
    except (OSError, ValueError):
        reason = f"it was created in {state['cwd']}, which is gone"
        raise UblkError(errno.ENOENT, what, reason, remedy) from None
    try:
        check_files(what, state.get("files", []))
        options = dict(state.get("options", {}))
        return words, options, target_maker(words, bool(options.get("read_only")))
    except (TypeError, ValueError, Usage, SystemExit) as error:
        reason = f"its state file is of no use to a command: {error}"
        remedy = f"have the program that made it recover it, or {remedy}"
        raise UblkError(errno.EINVAL, what, reason, remedy) from None


# ---- the other commands -----------------------------------------------------------------------


# What a device of other users or other containers answers, or one that was just
# deleted.
NOT_OURS = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENODEV)


def list_devices(options: Any) -> None:
    """Print all devices, or one: a table, or with --json an array.

    What is somebody else's is left out, unless it was asked for by its number.
    """
    with Control() as control:
        rows = []
        for dev_id in device_ids() if options.id is None else [options.id]:
            try:
                rows.append(describe(control, dev_id))
            except UblkError as error:
                if options.id is not None:
                    raise
                if error.errno not in NOT_OURS:
                    say(str(error))
    for dev_id in stale_states(device_ids()):
        say(
            f"{state_path(dev_id)} is left of a device that is gone: `ublk.py del {dev_id}` removes it"
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table: list[Sequence[object]] = [
        "ID STATE TARGET SIZE BLOCK QUEUES DEPTH PID OWNER FLAGS".split()
    ]
    usual = [feature.name for feature in FEATURES if feature.meaning.endswith("sets it")]
    for row in rows:
        flags = [name for name in row["flags"] if name not in usual]
        table.append(
            (
                row["id"],
                row["state"],
                " ".join([row["target"] or "?", *(row["args"] or [])]),
                format_size(row["size"]),
                row["block_size"],
                row["queues"],
                row["depth"],
                row["pid"],
                f"{row['owner_uid']}:{row['owner_gid']}",
                ",".join(flags) or "-",
            )
        )
    print_table(table)


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns as wide as what is in them."""
    lines = [[printable(str(item)) for item in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(item.ljust(width) for item, width in zip(line, widths)).rstrip())


def printable(text: str) -> str:
    """Escape what would not be seen as it is: newlines, escape sequences, unknown letters."""
    known = sys.stdout.encoding or "utf-8"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text.encode(known, "backslashreplace").decode(known)
    )


def stop_device(options: Any) -> None:
    """Stop a disk; its device stays until `del`.

    A device without a disk is left alone: a server may be about to start it,
    and START_DEV after STOP_DEV on one open node crashes kernels before 7.3.
    """
    with Control() as control:
        info = control.get_dev_info(options.id)
        if info.state == UBLK_S_DEV_DEAD:
            return
        if options.if_unused:
            control.try_stop_dev(options.id)
            return
        with nobody_recovers(control, options.id):
            if is_same(control, options.id, info.ublksrv_flags):
                control.stop_dev(options.id)


def delete_devices(options: Any) -> int:
    """Stop and delete devices; a state file that has no device any more is removed.

    A disk that somebody uses is refused before anything is done to it, unless
    forced.
    """
    if options.all == bool(options.id):
        raise Usage("del needs one or more ids, or --all")
    with Control() as control:
        ids = device_ids()
        status = 0
        for dev_id in [*ids, *stale_states(ids)] if options.all else options.id:
            try:
                info = control.get_dev_info(dev_id)
                if not options.force:
                    stop_if_unused(control, dev_id, info.ublksrv_flags)
                delete(control, dev_id, info.ublksrv_flags)
            except UblkError as error:
                gone = error.errno == errno.ENODEV and forget_state(dev_id)
                if not gone and not (options.all and error.errno in NOT_OURS):
                    say(str(error))
                    status = 1
    return status


def recover(options: Any) -> int:
    """Start a new server for a device."""
    started = Started(options)
    words = options.target
    recipe: Recipe | None = None if words is None else (words, {}, target_maker(words))
    return launch(partial(recover_from_state, options.id, started, recipe), started)


def quiesce(options: Any) -> None:
    """Detach the server of a device; the disk keeps its clients waiting for `recover`.

    Returns when the server has left. Raises UblkError: ETIMEDOUT where it does
    not.
    """
    refuse(
        not 0 <= options.timeout < 1e6, f"timeout {options.timeout}", "not a number of seconds"
    )
    with Control() as control:
        require(UBLK_F_QUIESCE & ~(control.features or 0))
        server = control.get_dev_info(options.id).ublksrv_pid
        what = f"device {options.id}"

        def has_left() -> bool:
            info = control.get_dev_info(options.id)
            served = info.state == UBLK_S_DEV_LIVE and info.ublksrv_pid == server
            if not served and info.state != UBLK_S_DEV_DEAD:
                return True
            # Again and again: a queue without a free tag is not told (up to 7.3);
            # and a disk that was stopped is an error
            control.quiesce_dev(options.id, options.timeout)
            return False

        try:
            left = becomes(has_left, SERVER_TIMEOUT + options.timeout)
        except KeyboardInterrupt:
            remedy = "its I/O waits until you try again, or end its server"
            raise UblkError(errno.EINTR, what, remedy=remedy) from None
        if not left:
            raise UblkError(
                errno.ETIMEDOUT,
                what,
                "its server does not leave",
                "end it, then `ublk.py recover` the device",
            )


def resize(options: Any) -> None:
    """Change the size of a live disk, and see that its server follows.

    Raises UblkError: EINVAL where its target cannot, and the disk keeps its
    size.
    """
    what = f"device {options.id}"
    with Control() as control:
        info = control.get_dev_info(options.id)
        state = load_state(options.id, info.ublksrv_flags)
        # A server whose process is not seen may be another container's
        served = is_served(info) or not becomes(
            lambda: control.get_dev_info(options.id).state != UBLK_S_DEV_LIVE, LAST_BREATH
        )
        check_new_size(control, options.id, options.size)
        refuse(
            served and not state.get("follows", info.ublksrv_flags & 1),
            what,
            "a program serves it, and is not asked",
            "have that program call Device.resize()",
        )
        before = disk_size(options.id)
        control.update_size(options.id, options.size)
    if served and options.size != before:
        await_server(options.id, options.size, info.ublksrv_flags, bool(state))


def await_server(dev_id: int, size: int, identity: int, seen: bool) -> None:
    """Wait until a server has followed to the disk's new size; UblkError if its target cannot.

    It says so in its state file. Where we have not seen that, as it is another
    user's, the server has followed if the disk keeps its size: it looks at it
    every second, and changes it back if it cannot.
    """
    what = f"cannot resize device {dev_id}"

    def follows() -> bool:
        refuse(
            disk_size(dev_id) not in (0, size),
            what,
            f"its target cannot have {size} bytes",
            "see what its server says",
        )
        return seen and load_state(dev_id, identity).get("size") == size

    if not becomes(follows, SERVER_TIMEOUT if seen else 3.0) and seen:
        reason = "its server does not tell whether it follows"
        raise UblkError(errno.ETIMEDOUT, what, reason, "see what it says")


def show_features(options: Any) -> None:
    """Print what this kernel's driver offers."""
    with Control() as control:
        mask = control.features
    features = [*FEATURES]
    for name in flag_names((mask or 0) & ~sum(FEATURES)):
        unknown = Feature(int(name[4:]), "", "newer than this program")
        unknown.name = name
        features.append(unknown)
    rows: list[dict[str, Any]] = [
        {
            "bit": feature.bit,
            "name": feature.name,
            "since": feature.since,
            "meaning": feature.meaning,
            "supported": None if mask is None else bool(mask & feature),
        }
        for feature in features
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    if mask is None:
        say("this kernel cannot tell (GET_FEATURES needs Linux 6.5)")
    answers = {True: "yes", False: "no", None: "?"}
    for row in rows:
        print(
            f"{row['bit']:>3}  {row['name']:<23} {answers[row['supported']]:<4} "
            f"{row['since']:<5} {row['meaning']}"
        )


def check(options: Any) -> int:
    """Say what is missing on this machine, and the command that mends it."""
    status = 0
    for name, problem, remedy in checks():
        answer = f"missing  {name}: {problem}: {remedy}" if problem else f"ok       {name}"
        print(printable(answer))
        status |= bool(problem)
    return status


def checks() -> Iterator[tuple[str, str, str]]:
    """Yield (what was looked at, the problem or nothing, the command that mends it).

    In the order in which one stands in the way of the next.
    """
    yield (f"Linux {os.uname().release}", *danger())
    yield attempt("io_uring", lambda: Ring(2).close())
    loaded = os.path.exists("/sys/class/misc/ublk-control") or os.path.exists(
        "/dev/ublk-control"
    )
    yield (
        "ublk driver",
        "" if loaded else "not loaded",
        "modprobe ublk_drv (where there is none: install a kernel with CONFIG_BLK_DEV_UBLK)",
    )
    command = f"{shlex.quote(PROGRAM[0])} -I {shlex.quote(PROGRAM[1])}"
    install = (
        f"once, as root: {command} udev-rules > /etc/udev/rules.d/60-ublk.rules && udevadm "
        "control --reload && udevadm trigger"
    )
    if loaded and not os.path.exists("/dev/ublk-control"):
        yield (
            "/dev/ublk-control",
            "not here, though the driver is loaded",
            "in a container: give it the node of its host, as by `podman run --device /dev/ublk-control`",
        )
    elif loaded:
        usable = os.access("/dev/ublk-control", os.R_OK | os.W_OK)
        yield (
            "/dev/ublk-control",
            "" if usable else "not yours to open",
            f"run as root, or {install}",
        )
    if not privileged() and os.path.exists("/run/udev"):  # not so in a container
        rules = any(map(asks_for_owner, udev_rules()))
        yield "udev rules", "" if rules else "ordinary users get no device nodes", install
    yield attempt(f"state directory {run_dir()}", make_run_dir)


def attempt(name: str, action: Callable[[], object]) -> tuple[str, str, str]:
    """Return what checks() yields of something that works, or raises UblkError."""
    try:
        action()
    except UblkError as error:
        return name, error.reason, error.remedy
    return name, "", ""


PROGRAM = (os.path.realpath(sys.executable), os.path.realpath(__file__))  # what root is to run


def print_udev_rules(options: Any) -> None:
    """Print the udev rules that let ordinary users create disks of their own."""
    for path in PROGRAM:
        others = not_roots_alone(path)
        if others:
            raise UblkError(
                errno.EPERM,
                f"root is to run {path}",
                f"not root alone may change {others}",
                "copy it to where only root can write, and use the system's Python",
            )
    python, program = map(udev_word, PROGRAM)
    print(
        f"""\
# Ordinary users may create ublk devices, and get the nodes of those they
# created, for them alone. root runs the command below at every new device: keep
# that file where only root can write.
KERNEL=="ublk-control", MODE="0666", OPTIONS+="static_node=ublk-control"
KERNEL=="ublk[bc][0-9]*", ACTION=="add|change", PROGRAM="{python} -I {program} udev-owner %k", \\
  OWNER="%c{{1}}", GROUP="%c{{2}}", MODE="0600"\n""",
        end="",
    )


def udev_owner(options: Any) -> int:
    """Print owner and group the kernel has noted for an ordinary user's device node.

    For udev, as root. The exit status is 1 for a device of root's.
    """
    found = re.fullmatch("ublk[bc]([0-9]{1,7})(p[0-9]+)?", options.node)
    if not found:
        raise Usage(f"{options.node!r} is not the name of a ublk device node")
    with Control() as control:
        info = control.get_dev_info(int(found.group(1)))
    if not info.flags & UBLK_F_UNPRIVILEGED_DEV:
        return 1
    print(info.owner_uid, info.owner_gid)
    return 0


def replay(words: Sequence[str]) -> int:
    """Rebuild a recorded disk; the companion, which records, knows how."""
    module = companion()
    if module is None:
        raise UblkError(
            errno.ENOENT,
            "cannot replay",
            "ublk_targets.py is not here",
            "put it beside ublk.py",
        )
    return module.replay(words)


FLAG = {"action": "store_true"}
# What commands take, each in one meaning
ARGUMENTS: dict[str, dict[str, Any]] = {
    "id": {"type": int},
    "size": {"type": parse_size},
    "node": {},
    "--all": FLAG,
    "--background": {**FLAG, "help": "return when the block device is usable"},
    "--json": {**FLAG, "help": "print JSON"},
    "--if-unused": {**FLAG, "help": "only where nobody has it open"},
    "--force": {**FLAG, "help": "also a disk that somebody uses"},
    "--timeout": {"type": float, "default": 30.0, "metavar": "SECONDS"},
    "--trace": {
        "metavar": "[=FILE]",
        "help": "tell what the disk does, on standard error, or in a file as JSON",
    },
    "--target": {
        "nargs": "...",
        "metavar": "TARGET [TARGET ARGS]",
        "help": "instead of what the state file names",
    },
    "--debug": {**FLAG, "help": "show a traceback with an error"},
}
# name -> function, help, ARGUMENTS: with ? there may be one, with * many
VERBS: dict[str, tuple[Callable[[Any], int | None], str, str]] = {
    "list": (list_devices, "show devices", "id? --json"),
    "stop": (stop_device, "take a disk away", "id --if-unused"),
    "del": (delete_devices, "stop and delete devices", "id* --all --force"),
    "recover": (
        recover,
        "start a new server for a disk whose server is gone",
        "id --background --json --trace --target",
    ),
    "quiesce": (
        quiesce,
        "detach a disk's server for another to `recover` it, without an error",
        "id --timeout",
    ),
    "resize": (resize, "change the size of a live disk", "id size"),
    "features": (show_features, "show what this kernel offers", "--json"),
    "check": (check, "say what is missing on this machine", ""),
    "udev-rules": (print_udev_rules, "print the rules that ordinary users' devices need", ""),
    "udev-owner": (udev_owner, "used by these rules: print the owner of a device node", "node"),
    "replay": (
        replay,
        "rebuild a recorded disk as it was at a given moment (target record)",
        "",
    ),
}


def run_verb(words: Sequence[str]) -> int:
    """Run one of the VERBS."""
    function, text, arguments = VERBS[words[0]]
    if function is replay:  # it reads its words itself
        return replay(words[1:])
    parser = make_parser(f"ublk.py {words[0]}", description=text)
    for argument in (*arguments.split(), "--debug"):
        name = argument.rstrip("?*")
        extra = dict(ARGUMENTS[name])
        if name != argument:
            extra["nargs"] = argument[-1]
        parser.add_argument(name, **extra)
    return function(parser.parse_args(spelled_out(words[1:]))) or 0


def print_help() -> None:
    """Print the overview of the command line."""
    print(
        "usage: ublk.py TARGET [TARGET ARGS] [DEVICE OPTIONS]\n       ublk.py COMMAND ...\n\ntargets "
        "(`ublk.py TARGET --help` tells more):"
    )
    for name, cls in sorted(known_targets().items()):
        idea, _, _ = (cls.__doc__ or "").partition("\n")
        print(f"  {name:<12} {idea}")
    print("  FILE.py:CLASS  a Target of your own\n\ncommands:")
    for verb, (_, text, _) in VERBS.items():
        print(f"  {verb:<12} {text}")
    print("\n" + device_parser().format_help().partition("\n\n")[2])


def open_standard_descriptors() -> None:
    """Have 0 to 2 open, as the void, also in what a target starts; begin anew if one was not.

    Or the next file that is opened would be what everybody writes messages to.
    A library may have done so as we imported it, as libffi does, and keep that.
    """
    fd = -1
    while fd < 3:
        fd = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    # What is handed down was ours from the start
    closed = [number for number in range(3) if not os.get_inheritable(number)]
    for number in closed:
        os.dup2(fd, number)
    if closed:
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        os.execv("/proc/self/exe", words[:-1])
    os.close(fd)


def run_words(words: Sequence[str]) -> int:
    """Do what the words of a command line say; return the exit status."""
    if words[:1] == ["--version"]:
        print(f"ublk.py {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print_help()
        return 0 if words else 2
    return run_verb(words) if words[0] in VERBS else create(words)


def flush_output() -> None:
    """Write the rest of standard output: what cannot be written is an error like others.

    Left to the interpreter, it would end with a status of its own (120).
    """
    try:
        if sys.stdout is not None:  # as in a program that calls us
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it would try again
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1 (it failed) or 2 (wrong usage).

    argv: the words, by default those of the process.

    Whatever fails is told on standard error. Raises SystemExit where argparse has
    told of it, or the help.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["add"]:  # what other ublk tools say
        words = words[1:]
    sys.modules.setdefault("ublk", sys.modules[__name__])  # what a target's file imports is us
    try:
        if os.environ.get("UBLK_RUN_DIR"):  # also for a server that leaves its directory
            os.environ["UBLK_RUN_DIR"] = run_dir()
        try:
            return run_words(words)
        finally:
            flush_output()
    except Usage as error:
        say(str(error))
        return 2
    except BrokenPipeError:  # whoever reads has enough
        return 1
    except (Exception, KeyboardInterrupt) as error:
        tell_failure(error, "--debug" in words)
        return 1


def tell_failure(error: BaseException, debug: bool) -> None:
    """Tell on standard error of what has failed: in one line, or a bug with its traceback.

    debug: whether anything is shown with its traceback.
    """
    if debug or not isinstance(error, (OSError, UnicodeError, KeyboardInterrupt)):
        sys.__excepthook__(type(error), error, error.__traceback__)
    else:
        say(error_line(error))


def error_line(error: BaseException) -> str:
    """Return the one line that standard error gets of a failure."""
    if isinstance(error, OSError) and not isinstance(error, UblkError):
        error = UblkError(
            error.errno or errno.EIO, str(error.filename or "a system call failed")
        )
    return str(error) or f"ended by {type(error).__name__}"


def command() -> NoReturn:
    """Be the command `ublk`, to the end of the process."""
    open_standard_descriptors()
    status = main()
    if _left_behind:  # Python would wait for its threads, if need be for ever
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    command()
