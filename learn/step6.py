# SPDX-License-Identifier: MIT
"""Step 6, a disk of one's own: made, owned and served by an ordinary user.

    python3 learn/step6.py [owner | del]
"""
import ctypes
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
    "DEL_DEV": 0xC0207505,
    "START_DEV": 0xC0207506,
    "SET_PARAMS": 0xC0207508,
    "GET_DEV_INFO2": 0x80207512,
    "FETCH_REQ": 0xC0107520,
    "COMMIT_AND_FETCH_REQ": 0xC0107521,
}
UBLK_IO_OP_READ = 0
UBLK_F_UNPRIVILEGED_DEV = 0x20
DEV_ID = 42                     # any number that is free
PATH = b"/dev/ublkc42"


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


def manage(name, payload, path=PATH):
    """Have the control node do a command, show how it ends, and return its payload."""
    memory = create_string_buffer(path + bytes(payload))
    command = ControlCommand(DEV_ID, 0xFFFF, len(memory), addressof(memory), 0, len(path))
    submit(control, name, command)
    name, res = wait()
    print(f"{name}: {os.strerror(-res)}", file=sys.stderr)
    if res < 0:
        sys.exit(1)
    return type(payload).from_buffer_copy(memory, len(path))


def answer(image, desc, buffer):
    """Do what a request asks for; return how many bytes are done."""
    offset = 512 * desc.start_sector
    size = 512 * desc.nr_sectors
    if desc.op_flags & 0xFF == UBLK_IO_OP_READ:
        buffer.raw = image[offset:offset + size]
    else:                               # nothing but WRITE is left, as there is no cache to flush
        image[offset:offset + size] = buffer[:size]
    return size


def serve(image):
    """Start the disk and answer its requests, one at a time, until it is deleted."""
    file = os.open(PATH, os.O_RDWR)
    descs = mmap.mmap(file, sizeof(IoDesc), prot=mmap.PROT_READ)
    buffer = create_string_buffer(65536)
    io = IoCommand(addr=addressof(buffer))
    submit(file, "FETCH_REQ", io)
    path = create_string_buffer(PATH)       # 12 bytes, and a NUL that is not counted
    command = ControlCommand(DEV_ID, 0xFFFF, len(PATH), addressof(path), os.getpid(), len(PATH))
    submit(control, "START_DEV", command)
    while True:
        name, res = wait()
        if res < 0:                     # of the disk when it is deleted: ENODEV
            sys.exit(f"{name}: {os.strerror(-res)}")
        if name == "START_DEV":
            print(f"/dev/ublkb{DEV_ID}")
        else:
            desc = IoDesc.from_buffer_copy(descs)
            io.result = answer(image, desc, buffer)
            submit(file, "COMMIT_AND_FETCH_REQ", io)


def main(what):
    info = DevInfo(nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=65536, dev_id=DEV_ID)
    info.flags = UBLK_F_UNPRIVILEGED_DEV
    if what == "owner":                 # asks udev, as root, when the nodes appear
        info = manage("GET_DEV_INFO2", info)
        print(info.owner_uid, info.owner_gid)
    elif what == "del":
        manage("DEL_DEV", info)
    else:
        manage("ADD_DEV", info, b"")
        while not os.access(PATH, os.W_OK):
            time.sleep(0.1)             # until udev has given us the node
        params = Params(sizeof(Params), types=1, logical_bs_shift=9, physical_bs_shift=9, max_sectors=128)
        params.dev_sectors = 2048       # 1 MiB
        manage("SET_PARAMS", params)
        image = mmap.mmap(-1, 1048576)  # memory of that size
        serve(image)


main(sys.argv[-1])
