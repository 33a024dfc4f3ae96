# SPDX-License-Identifier: MIT
"""Step 5, a disk that outlives its server: run it again, and it takes the disk over.

    python3 learn/step5.py IMAGE
"""
import ctypes
import errno
import mmap
import os
import sys
import time
from ctypes import addressof, c_long, c_uint32, create_string_buffer, sizeof

IO_URING_SETUP = 425            # system calls, with one number on nearly every architecture
IO_URING_ENTER = 426
IORING_OFF_SQES = 0x10000000    # what of a ring to map: its queues are at 0, its SQEs here
IORING_ENTER_GETEVENTS = 1      # wait for completions
IORING_SETUP_SQE128 = 0x400     # submissions have room for a command
IORING_OP_URING_CMD = 46        # a command for a driver
COMMANDS = {                    # numbers made as for an ioctl: direction, size, type, number
    "ADD_DEV": 0xC0207504,
    "START_DEV": 0xC0207506,
    "SET_PARAMS": 0xC0207508,
    "START_USER_RECOVERY": 0xC0207510,
    "END_USER_RECOVERY": 0xC0207511,
    "GET_FEATURES": 0x80207513,
    "FETCH_REQ": 0xC0107520,
    "COMMIT_AND_FETCH_REQ": 0xC0107521,
}
UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_FLUSH = range(3)
RECOVERY = 0x18                 # UBLK_F_USER_RECOVERY, _REISSUE: keep the disk, send lost requests again
DEV_ID = 42                     # any number that is free


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
    "uint32 cmd_op pad, uint64 addr, uint32 len rw_flags",
    "uint64 user_data resv1",   # the command follows
)
CQE = structure(                # io_uring_cqe: whose answer it is, and what a system call would return
    "uint64 user_data",
    "int32 res",
    "uint32 flags",
)
# ublksrv_ctrl_cmd, whose payload is read at addr, or written there
ControlCommand = structure("uint32 dev_id, uint16 queue_id len, uint64 addr data, uint16 dev_path_len")
DevInfo = structure(            # ublksrv_ctrl_dev_info, the payload of most commands
    "uint16 nr_hw_queues queue_depth state pad, uint32 max_io_buf_bytes dev_id ublksrv_pid pad1",
    "uint64 flags ublksrv_flags, uint32 owner_uid owner_gid, uint64 reserved1 reserved2",
)
Params = structure(             # ublk_params, of which every disk needs these
    "uint32 len types attrs, uint8 logical_bs_shift physical_bs_shift io_opt_shift io_min_shift",
    "uint32 max_sectors chunk_sectors, uint64 dev_sectors virt_boundary_mask",
)
IoDesc = structure("uint32 op_flags nr_sectors, uint64 start_sector addr")      # ublksrv_io_desc
IoCommand = structure("uint16 q_id tag, int32 result, uint64 addr")             # ublksrv_io_cmd
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
setup = Setup(flags=IORING_SETUP_SQE128)
ring = syscall(IO_URING_SETUP, 4, addressof(setup))
queues = mmap.mmap(ring, setup.sq_array + 4 * setup.sq_entries)     # the array is the last thing in it
sq_tail = c_uint32.from_buffer(queues, setup.sq_tail)
cq_head = c_uint32.from_buffer(queues, setup.cq_head)
sqes = mmap.mmap(ring, 4096, offset=IORING_OFF_SQES)
control = os.open("/dev/ublk-control", os.O_RDWR)


def submit(fd, name, command):
    """Have the kernel take a command for one of the driver's files."""
    sqe = SQE(opcode=IORING_OP_URING_CMD, fd=fd, cmd_op=COMMANDS[name], user_data=list(COMMANDS).index(name))
    # The array at sq_array says which SQE each entry of the queue means. It is
    # all zeroes, and the first SQE is free again after the system call.
    sqes.seek(0)
    sqes.write(bytes(sqe) + bytes(command))
    sq_tail.value += 1
    syscall(IO_URING_ENTER, ring, 1, 0, 0, 0, 0)


def wait():
    """Wait for a completion, and take it out of its queue; return which command has ended, and how."""
    syscall(IO_URING_ENTER, ring, 0, 1, IORING_ENTER_GETEVENTS, 0, 0)
    slot = cq_head.value % setup.cq_entries
    cqe = CQE.from_buffer_copy(queues, setup.cqes + 16 * slot)
    cq_head.value += 1
    return list(COMMANDS)[cqe.user_data], cqe.res


def manage(name, payload, *allowed):
    """Have the control node do a command, show how it ends, and return that if the program can go on."""
    submit(control, name, ControlCommand(DEV_ID, 0xFFFF, sizeof(payload), addressof(payload)))
    name, res = wait()
    print(f"{name}: {os.strerror(-res)}")
    if res < 0 and -res not in allowed:
        sys.exit(1)
    return res


def answer(image, desc, buffer):
    """Do what a request asks for; return how many bytes are done, or what went wrong."""
    op = desc.op_flags & 0xFF
    offset = 512 * desc.start_sector
    size = done = 512 * desc.nr_sectors
    data = memoryview(buffer).cast("B")[:size]
    if op == UBLK_IO_OP_READ:
        done = os.preadv(image, [data], offset)
    elif op == UBLK_IO_OP_WRITE:
        done = os.pwrite(image, data, offset)
    elif op == UBLK_IO_OP_FLUSH:
        os.fdatasync(image)
    else:
        return -errno.EOPNOTSUPP
    return done if done == size else -errno.EIO


def serve(start):
    """Start the disk by a command and answer its requests, one at a time, until it is deleted."""
    image = os.open(sys.argv[1], os.O_RDWR)     # not before START_USER_RECOVERY: nobody else writes it now
    file = os.open(f"/dev/ublkc{DEV_ID}", os.O_RDWR)
    descs = mmap.mmap(file, sizeof(IoDesc), prot=mmap.PROT_READ)
    buffer = create_string_buffer(65536)
    io = IoCommand(addr=addressof(buffer))
    submit(file, "FETCH_REQ", io)
    submit(control, start, ControlCommand(DEV_ID, 0xFFFF, data=os.getpid()))
    while True:
        name, res = wait()
        if res < 0:                     # of the disk when it is deleted: ENODEV
            sys.exit(f"{name}: {os.strerror(-res)}")
        if name == start:
            print(f"/dev/ublkb{DEV_ID}")
        else:
            desc = IoDesc.from_buffer_copy(descs)
            try:
                io.result = answer(image, desc, buffer)
            except OSError:
                io.result = -errno.EIO
            submit(file, "COMMIT_AND_FETCH_REQ", io)


def main():
    features = ctypes.c_uint64()
    if manage("GET_FEATURES", features, errno.ENODEV, errno.EOPNOTSUPP) < 0:
        for name in COMMANDS:
            COMMANDS[name] &= 0xFF      # the oldest drivers know the bare numbers only
    info = DevInfo(nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=65536, dev_id=DEV_ID, flags=RECOVERY)
    if manage("ADD_DEV", info, errno.EEXIST) < 0:
        while manage("START_USER_RECOVERY", info, errno.EBUSY) < 0:
            time.sleep(1)               # until the old server is gone; for ever if there was none
        serve("END_USER_RECOVERY")      # does not return: what follows is for a new disk
    params = Params(sizeof(Params), types=1, logical_bs_shift=9, physical_bs_shift=9, max_sectors=128)
    params.dev_sectors = os.path.getsize(sys.argv[1]) // 512
    params.attrs = 4                    # a volatile cache: FLUSH makes it durable
    manage("SET_PARAMS", params)
    serve("START_DEV")


main()
