# SPDX-License-Identifier: MIT
"""io_uring: rings on the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import ublk
from tests.support import (
    IN_LAB,
    assert_error_line,
    descriptors,
    descriptors_below,
    error_of,
    kernel,
    message,
)


def descriptors_and_mappings():
    """Return how many descriptors and mappings this process has."""
    count = len(descriptors())
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = sum("io_uring" in line or "ublk" in line for line in lines)
    return count, maps


def nops(ring, count, first=0):
    """Push NOPs with ascending user_data."""
    for number in range(first, first + count):
        ring.prepare(number % ring.entries, ublk.IORING_OP_NOP, user_data=number)
        ring.push(number % ring.entries)


class TestRing:
    """A ring on whatever kernel runs this; needs no ublk driver."""

    @pytest.fixture
    def ring(self):
        try:
            ring = ublk.Ring(8)
        except ublk.UblkError as error:
            pytest.skip(f"{error}") if not IN_LAB else pytest.fail(f"{error}")
        yield ring
        ring.close()

    def test_nop_comes_back(self, ring):
        nops(ring, 3)
        ring.enter(3)
        assert ring.reap() == ([0, 1, 2], [0, 0, 0])
        assert ring.reap() == ([], [])

    def test_reads_and_writes_a_file(self, ring, tmp_path):
        with open(tmp_path / "file", "w+b", buffering=0) as file:
            data, back = bytearray(b"through the ring"), bytearray(7)
            ring.prepare(0, ublk.IORING_OP_WRITE, file.fileno(), 100, ublk.address_of(data), len(data),
                         user_data=7)
            ring.push(0)
            ring.enter(1)
            assert ring.reap() == ([7], [16])
            ring.prepare(1, ublk.IORING_OP_READ, file.fileno(), 108, ublk.address_of(back), len(back),
                         user_data=8)
            ring.push(1)
            ring.enter(1)
            assert ring.reap() == ([8], [7]) and back == b"the rin"

    def test_an_operation_that_fails_brings_its_errno(self, ring):
        ring.prepare(0, ublk.IORING_OP_READ, fd=-1, user_data=1)
        ring.push(0)
        ring.enter(1)
        assert ring.reap() == ([1], [-errno.EBADF])

    def test_waiting_ends_with_the_timeout(self, ring):
        ring.enter(1, timeout=0.02)
        assert ring.reap() == ([], [])
        nops(ring, 1)
        ring.enter(1, timeout=30)
        assert ring.reap() == ([0], [0])

    def test_waiting_ends_with_the_timeout_when_something_was_submitted(self, ring):
        long = ublk.timespec(3600, 0)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(long), length=1)
        ring.push(0)
        ring.enter(1, timeout=0.02)
        assert ring.reap() == ([], [])

    @pytest.mark.parametrize("milliseconds", [0, 100])
    def test_waiting_sees_what_comes_soon_and_what_comes_late(self, ring, milliseconds, monkeypatch):
        entered, enter = [], ring.enter
        monkeypatch.setattr(ring, "enter", lambda *words: entered.append(words) or enter(*words))
        later = ublk.timespec(0, milliseconds * 1000000)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(later), length=1, user_data=5)
        ring.push(0)
        ring.wait()
        assert ring.reap() == ([5], [-errno.ETIME])
        if milliseconds:                            # it slept, after looking so often
            assert entered == [()] * ublk.LOOKS + [(1, None)]

    def test_waiting_for_what_does_not_come_ends_with_the_timeout(self, ring):
        ring.wait(0.02)
        assert ring.reap() == ([], [])

    def test_timeout_of_the_kernel(self, ring):
        short = ublk.timespec(0, 1000)
        ring.prepare(0, ublk.IORING_OP_TIMEOUT, addr=ctypes.addressof(short), length=1, user_data=5)
        ring.push(0)
        ring.enter(1)
        assert ring.reap() == ([5], [-errno.ETIME])

    def test_a_signal_ends_the_wait_and_nothing_else(self, ring):
        seen = []
        old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.2)     # again, if one came before the wait
            ring.enter(1)                           # without a time limit: only a signal ends it
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert seen and ring.reap() == ([], [])
        nops(ring, 2)
        ring.enter(2)
        assert ring.reap() == ([0, 1], [0, 0])

    def test_completions_that_do_not_fit_are_kept(self, ring):
        for turn in range(8):
            nops(ring, 8, first=8 * turn)
            ring.enter()
        found = []
        for _ in range(8):
            found += ring.reap()[0]
            ring.enter()
        assert sorted(found) == list(range(64))

    def test_what_the_kernel_did_not_take_is_submitted_later(self, ring, monkeypatch):
        enter = ring._enter

        def takes_half():
            ring._to_submit.value //= 2
            ring._to_wait_for.value = 0
            return enter()

        nops(ring, 8)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", takes_half)
            ring.enter(8)
        assert ring.reap()[0] == [0, 1, 2, 3]
        ring.enter(4)
        assert ring.reap()[0] == [4, 5, 6, 7]

    def test_between_chains_a_submission_may_end(self, ring, monkeypatch):
        enter = ring._enter

        def takes_two():
            ring._to_submit.value, ring._to_wait_for.value = 2, 0
            return enter()

        for slot in range(4):
            ring.prepare(slot, ublk.IORING_OP_NOP, user_data=slot, flags=ublk.IOSQE_IO_LINK * (slot % 2 == 0))
        ring.push_all(range(4))
        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", takes_two)
            ring.enter()
        assert ring.reap()[0] == [0, 1]
        ring.enter(2)
        assert ring.reap()[0] == [2, 3]

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.EINTR])
    def test_a_refused_submission_is_repeated(self, ring, monkeypatch, number):
        def refuses():
            ctypes.set_errno(number)
            return -1

        nops(ring, 2)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", refuses)
            ring.enter(1)
        ring.enter(2)
        assert ring.reap()[0] == [0, 1]

    def test_one_bad_entry_does_not_hold_back_the_others(self, ring):
        nops(ring, 1)
        ring.prepare(1, 255, user_data=1)           # no such operation
        ring.push(1)
        nops(ring, 1, first=2)
        ring.enter(3)
        assert dict(zip(*ring.reap())) == {0: 0, 1: -errno.EINVAL, 2: 0}

    @pytest.mark.parametrize("batch", [1, 3, 5, 8])
    def test_both_queues_wrap_around(self, ring, batch):
        expected = 0
        for turn in range(40):
            for slot in range(batch):
                ring.prepare(slot, ublk.IORING_OP_NOP, user_data=expected + slot)
            ring.push_all(list(range(batch)))
            ring.enter(batch)
            assert ring.reap()[0] == list(range(expected, expected + batch)), f"turn {turn}"
            expected += batch

    def test_an_entry_is_filled_once_and_submitted_often(self, ring):
        ring.prepare(3, ublk.IORING_OP_NOP, user_data=77)
        for _ in range(20):
            ring.push(3)
            ring.enter(1)
            assert ring.reap() == ([77], [0])

    def test_entries_of_128_bytes(self):
        ring = ublk.Ring(4, for_control=True)
        try:
            assert len(ring.sqes) == 4 * 128
            nops(ring, 4)
            ring.enter(4)
            assert ring.reap() == ([0, 1, 2, 3], [0, 0, 0, 0])
        finally:
            ring.close()

    def test_preparing_an_entry_clears_what_it_held(self, ring):
        ring.prepare(0, ublk.IORING_OP_WRITE, fd=5, cmd=b"x" * 16)
        ring.prepare(1, ublk.IORING_OP_WRITE, fd=6, cmd=b"y" * 16)
        ring.prepare(0, ublk.IORING_OP_NOP)
        assert bytes(ring.sqes[:64]) == ublk.SQE.pack(0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0) + bytes(16)
        assert bytes(ring.sqes[112:128]) == b"y" * 16

    def test_another_thread_gets_an_error(self, ring):
        found = []
        thread = threading.Thread(target=lambda: found.append(error_of(ring.enter)))
        thread.start()
        thread.join()
        assert found == [errno.EEXIST]

    def test_a_ring_for_control_commands_serves_every_thread(self):
        ring = ublk.Ring(8, for_control=True)
        try:
            for number in range(3):
                nops(ring, 1, first=number)
                thread = threading.Thread(target=ring.enter, args=(1,))
                thread.start()
                thread.join()
            assert ring.reap()[0] == [0, 1, 2]
        finally:
            ring.close()

    def test_closing_gives_everything_back(self, ring):
        before = descriptors_and_mappings()
        for _ in range(30):
            other = ublk.Ring(64, for_control=True)
            nops(other, 5)
            other.enter(5)
            other.close()
            other.close()
        assert descriptors_and_mappings() == before

    def test_its_descriptor_is_closed_in_programs_it_starts(self, ring):
        assert not os.get_inheritable(ring.fd)

    def test_a_closed_descriptor_is_an_error(self, ring):
        os.close(ring.fd)
        ring.fd, fd = os.open(os.devnull, os.O_RDWR), ring.fd
        assert ring.fd == fd and error_of(ring.enter) in (errno.EOPNOTSUPP, errno.EBADF)


@kernel
class TestRingOfThisKernel(TestRing):
    """The same in each kernel of the lab."""


def test_a_ring_is_closed_whoever_still_refers_to_what_it_had():
    ring = ublk.Ring(8)
    fd, kept = ring.fd, dict(vars(ring))            # as a free-threaded Python does for a while
    ring.close()
    assert kept and error_of(os.fstat, fd) == errno.EBADF


def test_the_rest_of_a_chain_that_was_cut_is_never_begun(monkeypatch, tmp_path):
    """A transfer that waits, and what is to be done once it has: no system call begins that alone."""
    ring, (reader, writer), data = ublk.Ring(8), os.pipe(), bytearray(b"too early")
    with open(tmp_path / "file", "w+b") as file:
        ring.prepare(0, ublk.IORING_OP_READ, reader, (1 << 64) - 1, ublk.address_of(data), 9,
                     flags=ublk.IOSQE_IO_LINK)
        ring.prepare(1, ublk.IORING_OP_WRITE, file.fileno(), 0, ublk.address_of(data), 9)
        ring.push_all([0, 1])
        enter = ring._enter

        def takes_one():
            ring._to_submit.value, ring._to_wait_for.value = 1, 0
            return enter()

        with monkeypatch.context() as patch:
            patch.setattr(ring, "_enter", takes_one)
            assert error_of(ring.enter) == errno.ENOMEM
        assert error_of(ring.enter) == errno.ENOMEM
        os.write(writer, bytes(9))
        ring.close()
        assert os.fstat(file.fileno()).st_size == 0
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("number, says", [(errno.EPERM, "kernel.io_uring_disabled"),
                                          (errno.ENOSYS, "CONFIG_IO_URING"), (errno.ENOMEM, "ulimit -l")])
def test_no_ring_to_be_had_says_why(monkeypatch, number, says):
    def refuses(*_):
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ublk, "_syscall", refuses)
    with pytest.raises(ublk.UblkError) as found:
        ublk.Ring(8)
    assert_error_line(f"ublk: {found.value}\n", number, says=says)


def test_a_ring_closes_though_somebody_has_a_frame_of_its_making(monkeypatch):
    """A log, or a collection of garbage, may look at the stack at any moment."""
    frames, timespec = [], ublk.timespec
    monkeypatch.setattr(ublk, "timespec", lambda: frames.append(sys._getframe(1)) or timespec())
    before = descriptors()
    ublk.Ring(8).close()
    assert frames and descriptors() == before


@pytest.mark.parametrize("room", range(3))
def test_a_ring_without_enough_descriptors_is_an_error_of_ours(room):
    before = descriptors()      # first, as it collects garbage, which may have some of a lower number
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(room + 1)]
    for fd in files:
        os.close(fd)
    with descriptors_below(files[room]):
        said = message(ublk.Ring, 8)
    assert_error_line(f"ublk: {said}\n", errno.EMFILE, says="cannot create an io_uring")
    assert descriptors() == before


def test_address_of_any_buffer():
    data = bytearray(b"abc")
    assert ublk.address_of(data) == ctypes.addressof(ctypes.c_char.from_buffer(data))
    assert ctypes.string_at(ublk.address_of(memoryview(data)[1:]), 2) == b"bc"
    assert isinstance(ublk.address_of(b""), int)
