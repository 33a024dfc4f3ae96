# SPDX-License-Identifier: MIT
"""Step 1, a ring: read a file through io_uring.

    python3 learn/step1.py FILE
"""
import ctypes
import mmap
import os
import sys
from ctypes import addressof, c_long, c_uint32, create_string_buffer, sizeof

IO_URING_SETUP = 425            # system calls, with one number on nearly every architecture
IO_URING_ENTER = 426
IORING_OFF_SQES = 0x10000000    # what of a ring to map: its queues are at 0, its SQEs here
IORING_ENTER_GETEVENTS = 1      # wait for completions
IORING_OP_READ = 22


def structure(*lines):
    """Make a structure of C: "uint32 a b, int8 c" gives it a and b, of 32 bits each, and c, of 8."""
    fields = []
    for part in ", ".join(lines).split(", "):
        kind, *names = part.split()
        kind = getattr(ctypes, "c_" + kind)
        for name in names:
            fields.append((name, kind))
    class Structure(ctypes.Structure):
        _fields_ = fields
    return Structure


Setup = structure(              # io_uring_params: what the kernel tells of a new ring
    "uint32 sq_entries cq_entries flags sq_thread_cpu sq_thread_idle features wq_fd resv1 resv2 resv3",
    "uint32 sq_head sq_tail sq_mask sq_size sq_flags dropped sq_array resv4",
    "uint64 sq_address",
    "uint32 cq_head cq_tail cq_mask cq_size overflow cqes cq_flags resv5",
    "uint64 cq_address",
)
SQE = structure(                # io_uring_sqe: what the kernel is to do
    "uint8 opcode flags",
    "uint16 ioprio",
    "int32 fd",
    "uint64 off addr, uint32 len rw_flags",
    "uint64 user_data resv1",
    "uint64 resv2 resv3",
)
CQE = structure(                # io_uring_cqe: whose answer it is, and what a system call would return
    "uint64 user_data",
    "int32 res",
    "uint32 flags",
)
libc = ctypes.CDLL(None, use_errno=True)


def syscall(*arguments):
    """Make a system call, whose arguments all are as wide as C's long."""
    result = libc.syscall(*map(c_long, arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


# A ring is two queues shared with the kernel: submissions (SQ), and completions
# (CQ). Whoever adds to a queue moves its tail, whoever takes moves its head.
setup = Setup()
ring = syscall(IO_URING_SETUP, 4, addressof(setup))
queues = mmap.mmap(ring, setup.sq_array + 4 * setup.sq_entries)     # the array is the last thing in it
sq_tail = c_uint32.from_buffer(queues, setup.sq_tail)
cq_head = c_uint32.from_buffer(queues, setup.cq_head)
sqes = mmap.mmap(ring, 4096, offset=IORING_OFF_SQES)


def submit(sqe):
    """Have the kernel take a submission."""
    # The array at sq_array says which SQE each entry of the queue means. It is
    # all zeroes, and the first SQE is free again after the system call.
    sqes.seek(0)
    sqes.write(bytes(sqe))
    sq_tail.value += 1
    syscall(IO_URING_ENTER, ring, 1, 0, 0, 0, 0)


def wait():
    """Wait for a completion, and take it out of its queue."""
    syscall(IO_URING_ENTER, ring, 0, 1, IORING_ENTER_GETEVENTS, 0, 0)
    slot = cq_head.value % setup.cq_entries
    cqe = CQE.from_buffer_copy(queues, setup.cqes + 16 * slot)
    cq_head.value += 1
    return cqe


def main():
    buffer = create_string_buffer(4096)     # must live until the completion
    sqe = SQE(opcode=IORING_OP_READ, user_data=7)
    sqe.fd = os.open(sys.argv[1], os.O_RDONLY)
    sqe.addr = addressof(buffer)
    sqe.len = sizeof(buffer)
    submit(sqe)
    cqe = wait()
    print("user_data:", cqe.user_data)
    print("res:", cqe.res)
    if cqe.res < 0:
        sys.exit(os.strerror(-cqe.res))
    data = buffer.raw[:cqe.res]
    print(data.decode(), end="")


main()
