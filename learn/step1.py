# SPDX-License-Identifier: MIT
"""Step 1, a ring: read a file through io_uring.

    python3 learn/step1.py FILE
"""
import ctypes
import mmap
import os
import sys
from ctypes import c_int32, c_long, c_uint8, c_uint16, c_uint32, c_uint64

IO_URING_SETUP = 425            # system calls, with one number on nearly every architecture
IO_URING_ENTER = 426
IORING_OFF_SQ_RING = 0          # what of a ring to map
IORING_OFF_SQES = 0x10000000
IORING_ENTER_GETEVENTS = 1      # wait for completions
IORING_OP_READ = 22


class Offsets(ctypes.Structure):
    """Where the parts of a queue stand in the mapping: io_sqring_offsets and io_cqring_offsets."""
    _fields_ = [
        ("head", c_uint32),
        ("tail", c_uint32),
        ("ring_mask", c_uint32),
        ("ring_entries", c_uint32),
        ("flags_or_overflow", c_uint32),
        ("dropped_or_cqes", c_uint32),
        ("array", c_uint32),
        ("reserved", c_uint32 * 3),
    ]


class Params(ctypes.Structure):
    """io_uring_params: what the kernel tells of a new ring."""
    _fields_ = [
        ("sq_entries", c_uint32),
        ("cq_entries", c_uint32),
        ("reserved", c_uint32 * 8),
        ("sq_off", Offsets),
        ("cq_off", Offsets),
    ]


class SQE(ctypes.Structure):
    """io_uring_sqe: what the kernel is to do."""
    _fields_ = [
        ("opcode", c_uint8),
        ("flags", c_uint8),
        ("ioprio", c_uint16),
        ("fd", c_int32),
        ("off", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("rw_flags", c_uint32),
        ("user_data", c_uint64),
        ("rest", c_uint64 * 3),
    ]


class CQE(ctypes.Structure):
    """io_uring_cqe: whose answer it is, and a result as of a system call."""
    _fields_ = [
        ("user_data", c_uint64),
        ("res", c_int32),
        ("flags", c_uint32),
    ]


libc = ctypes.CDLL(None, use_errno=True)


def syscall(*arguments):
    """Make a system call, whose arguments all are as wide as C's long."""
    words = map(c_long, arguments)
    result = libc.syscall(*words)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Ring:
    """Two queues shared with the kernel: submissions (SQ), and completions (CQ)."""

    def __init__(self, entries):
        params = Params()
        address = ctypes.addressof(params)
        self.fd = syscall(IO_URING_SETUP, entries, address)
        sq = params.sq_off
        cq = params.cq_off
        sq_end = sq.array + 4 * params.sq_entries
        cq_end = cq.dropped_or_cqes + 16 * params.cq_entries
        size = max(sq_end, cq_end)
        memory = mmap.mmap(self.fd, size, offset=IORING_OFF_SQ_RING)
        self.sq_tail = c_uint32.from_buffer(memory, sq.tail)
        self.cq_head = c_uint32.from_buffer(memory, cq.head)
        array_type = c_uint32 * params.sq_entries
        self.array = array_type.from_buffer(memory, sq.array)
        cqes_type = CQE * params.cq_entries
        self.cqes = cqes_type.from_buffer(memory, cq.dropped_or_cqes)
        sqes_type = SQE * params.sq_entries
        size = ctypes.sizeof(sqes_type)
        memory = mmap.mmap(self.fd, size, offset=IORING_OFF_SQES)
        self.sqes = sqes_type.from_buffer(memory)

    def submit(self, sqe):
        """Put a submission into its queue, have the kernel take it, wait for a completion."""
        tail = self.sq_tail.value
        slot = tail % len(self.sqes)
        self.sqes[slot] = sqe
        self.array[slot] = slot
        self.sq_tail.value = tail + 1
        syscall(
            IO_URING_ENTER, self.fd,
            1,                              # submission to take
            1,                              # completion to wait for
            IORING_ENTER_GETEVENTS, 0, 0)

    def completion(self):
        """Take the oldest completion out of its queue."""
        head = self.cq_head.value
        slot = head % len(self.cqes)
        cqe = CQE.from_buffer_copy(self.cqes[slot])
        self.cq_head.value = head + 1
        return cqe


def main(path):
    ring = Ring(4)
    print("submissions:", len(ring.sqes))
    buffer = ctypes.create_string_buffer(4096)      # must live until the completion
    sqe = SQE()
    sqe.opcode = IORING_OP_READ
    sqe.fd = os.open(path, os.O_RDONLY)
    sqe.addr = ctypes.addressof(buffer)
    sqe.len = len(buffer)
    sqe.user_data = 7
    ring.submit(sqe)
    cqe = ring.completion()
    print("user_data:", cqe.user_data)
    print("res:", cqe.res)
    if cqe.res < 0:
        sys.exit(os.strerror(-cqe.res))
    data = buffer.raw[:cqe.res]
    print(data.decode(), end="")


if __name__ == "__main__":
    main(sys.argv[1])
