# SPDX-License-Identifier: MIT
"""The exercises of learn/exercises.md: broken servers, solutions, and what is often wrong with these.

Do not read this before you have solved them.
"""

from __future__ import annotations

from pathlib import Path

LEARN = Path(__file__).resolve().parent.parent / "learn"


def step(number):
    """Return a step's program."""
    return (LEARN / f"step{number}.py").read_text()


def change(program, hunks):
    """Return a program with changes made as in a patch: blank lines part the places, each found once."""
    for hunk in hunks.strip("\n").split("\n\n"):
        lines = hunk.split("\n")
        old = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        new = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        assert program.count(old) == 1, f"{program.count(old)} times there:\n{old}"
        program = program.replace(old, new)
    return program


BROKEN = {
    6: change(step(4), '''
-"""Step 4, a disk that remembers: what is written is in a file, its image.
+"""A disk that remembers, and reports errors: "why does this server hang?"

-    return done if done == size else -errno.EIO
+    if done < size:
+        raise OSError(errno.EIO, "the image is too short")
+    return size

-            try:
-                io.result = answer(image, IoDesc.from_buffer_copy(descs), buffer)
+            desc = IoDesc.from_buffer_copy(descs)
+            try:
+                io.result = answer(image, desc, buffer)
+                submit(file, "COMMIT_AND_FETCH_REQ", io)
             except OSError as error:
-                io.result = -(error.errno or errno.EIO)
-            submit(file, "COMMIT_AND_FETCH_REQ", io)
+                print(f"sector {desc.start_sector}: {error}", file=sys.stderr)
'''),
    7: change(step(4), '''
-"""Step 4, a disk that remembers: what is written is in a file, its image.
+"""A disk that remembers, and tells how it started: "why does this server hang?"

     io = IoCommand(addr=addressof(buffer))
-    submit(file, "FETCH_REQ", io)
     submit(control, "START_DEV", ControlCommand(DEV_ID, 0xFFFF, data=os.getpid()))
+    name, res = wait()
+    print(f"{name}: {os.strerror(-res)}")
+    submit(file, "FETCH_REQ", io)

-        if name == "START_DEV":
-            print(f"/dev/ublkb{DEV_ID}")
-        else:
-            try:
-                io.result = answer(image, IoDesc.from_buffer_copy(descs), buffer)
-            except OSError as error:
-                io.result = -(error.errno or errno.EIO)
-            submit(file, "COMMIT_AND_FETCH_REQ", io)
+        try:
+            io.result = answer(image, IoDesc.from_buffer_copy(descs), buffer)
+        except OSError as error:
+            io.result = -(error.errno or errno.EIO)
+        submit(file, "COMMIT_AND_FETCH_REQ", io)
'''),
    8: change(step(7), '''
-"""Step 7, a fast disk: many requests at a time, and many to a system call.
+"""A fast disk, with pauses for other work: "why does this server hang?"

-    """Hand in what is new, wait for a completion, and take all there are: each tag, and the result."""
+    """Hand in what is new, wait for a completion, and take up to eight: each tag, and the result."""

-    while cq_head.value != cq_tail.value:
-        slot = cq_head.value % setup.cq_entries
+    first = cq_head.value
+    end = cq_tail.value
+    cq_head.value = end
+    for place in range(first, min(first + 8, end)):
+        slot = place % setup.cq_entries
         cqe = CQE.from_buffer_copy(queues, setup.cqes + 16 * slot)
-        cq_head.value += 1      # before the yield: next(wait()) does not come back here
         yield cqe.user_data, cqe.res
'''),
    9: change(step(4), '''
-"""Step 4, a disk that remembers: what is written is in a file, its image.
+"""A disk that remembers, and goes when Ctrl-C is pressed: "why does this server hang?"

     "ADD_DEV": 0xC0207504,
+    "DEL_DEV": 0xC0207505,

     while True:
-        name, res = wait()
+        try:
+            name, res = wait()
+        except KeyboardInterrupt:
+            submit(control, "DEL_DEV", ControlCommand(DEV_ID, 0xFFFF))
+            while wait()[0] != "DEL_DEV":
+                pass
+            sys.exit("deleted")
'''),
    10: change(step(5), '''
-"""Step 5, a disk that outlives its server: run it again, and it takes the disk over.
+"""A disk that outlives its server, with a helper: "why does this server hang?"

+def usage(image):
+    """Write to a file how full the image is, again and again."""
+    while True:
+        with open(sys.argv[1] + ".usage", "w") as file:
+            print(os.fstat(image).st_blocks // 2, "KiB", file=file)
+        time.sleep(1)
+
+
 def serve(start):

     io = IoCommand(addr=addressof(buffer))
+    if os.fork() == 0:
+        usage(image)
'''),
}

SOLUTIONS = {
    1: change(step(7), '''
-UBLK_IO_OP_READ = 0
+UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_FLUSH, UBLK_IO_OP_DISCARD = range(4)

     "uint32 max_sectors chunk_sectors, uint64 dev_sectors virt_boundary_mask",
+    "uint32 discard_alignment discard_granularity max_discard_sectors max_write_zeroes_sectors",
+    "uint16 max_discard_segments reserved",

         buffer.raw = image[offset:offset + size]
+    elif desc.op_flags & 0xFF == UBLK_IO_OP_DISCARD:
+        image[offset:offset + size] = bytes(size)

-    params = Params(sizeof(Params), types=1, logical_bs_shift=9, physical_bs_shift=9, max_sectors=128)
+    params = Params(sizeof(Params), types=3, logical_bs_shift=9, physical_bs_shift=9, max_sectors=128)
+    params.discard_granularity = 512
+    params.max_discard_sectors = 2048
+    params.max_discard_segments = 1
'''),
    2: change(step(4), '''
 import errno
+import hashlib

+def crypt(data, sector):
+    """Encrypt or decrypt data, in which each sector has a key of its own."""
+    key = b""
+    for number in range(sector, sector + len(data) // 512):
+        key += hashlib.shake_256(b"secret %d" % number).digest(512)
+    mixed = int.from_bytes(data, "big") ^ int.from_bytes(key, "big")
+    return mixed.to_bytes(len(data), "big")
+
+
 def answer(image, desc, buffer):

         done = os.preadv(image, [data], offset)
+        buffer.raw = crypt(data, desc.start_sector)

-        done = os.pwrite(image, data, offset)
+        done = os.pwrite(image, crypt(data, desc.start_sector), offset)
'''),
    3: change(step(7), '''
-DEPTH = 32                      # tags: places for requests
+QUEUES = 2
+DEPTH = 16                      # tags of a queue: places for requests
+MAX_DEPTH = 4096                # for which there is room between the descriptors of two queues

-def submit(fd, name, command, tag=DEPTH):
+def submit(fd, name, command, tag=QUEUES * DEPTH):

-    descs = mmap.mmap(file, 24 * DEPTH, prot=mmap.PROT_READ)
-    buffers = [create_string_buffer(65536) for tag in range(DEPTH)]
-    for tag, buffer in enumerate(buffers):
-        io = IoCommand(0, tag, 0, addressof(buffer))
-        submit(file, "FETCH_REQ", io, tag)
+    descs = []
+    for queue in range(QUEUES):
+        offset = 24 * MAX_DEPTH * queue
+        descs.append(mmap.mmap(file, 24 * DEPTH, prot=mmap.PROT_READ, offset=offset))
+    buffers = [create_string_buffer(65536) for number in range(QUEUES * DEPTH)]
+    for number, buffer in enumerate(buffers):
+        queue, tag = divmod(number, DEPTH)
+        io = IoCommand(queue, tag, 0, addressof(buffer))
+        submit(file, "FETCH_REQ", io, number)

-        for tag, res in wait():
+        for number, res in wait():
+            queue, tag = divmod(number, DEPTH)

-            if tag == DEPTH:
+            if number == QUEUES * DEPTH:

-                buffer = buffers[tag]
-                desc = IoDesc.from_buffer_copy(descs, 24 * tag)
+                buffer = buffers[number]
+                desc = IoDesc.from_buffer_copy(descs[queue], 24 * tag)

-                io = IoCommand(0, tag, size, addressof(buffer))
-                submit(file, "COMMIT_AND_FETCH_REQ", io, tag)
+                io = IoCommand(queue, tag, size, addressof(buffer))
+                submit(file, "COMMIT_AND_FETCH_REQ", io, number)

-    info = DevInfo(nr_hw_queues=1, queue_depth=DEPTH, max_io_buf_bytes=65536, dev_id=DEV_ID)
+    info = DevInfo(nr_hw_queues=QUEUES, queue_depth=DEPTH, max_io_buf_bytes=65536, dev_id=DEV_ID)
'''),
    4: change(step(7), '''
-DEPTH = 32                      # tags: places for requests
+DEPTH = 32                      # tags: places for requests
+MAILBOX = 1500                  # the sector whose readers wait until it is written

     calls = 0
+    waiting = []                        # tags of requests that are not answered yet

-                buffer = buffers[tag]
-                desc = IoDesc.from_buffer_copy(descs, 24 * tag)
-                size = answer(image, desc, buffer)
-                io = IoCommand(0, tag, size, addressof(buffer))
-                submit(file, "COMMIT_AND_FETCH_REQ", io, tag)
+                waiting.append(tag)
+                desc = IoDesc.from_buffer_copy(descs, 24 * tag)
+                if desc.start_sector != MAILBOX:
+                    ready = [tag]
+                elif desc.op_flags & 0xFF == UBLK_IO_OP_READ:
+                    ready = []
+                else:
+                    ready = [tag, *waiting[:-1]]        # the WRITE first
+                for tag in ready:
+                    waiting.remove(tag)
+                    buffer = buffers[tag]
+                    desc = IoDesc.from_buffer_copy(descs, 24 * tag)
+                    size = answer(image, desc, buffer)
+                    io = IoCommand(0, tag, size, addressof(buffer))
+                    submit(file, "COMMIT_AND_FETCH_REQ", io, tag)
'''),
    5: change(step(5), '''
+cache = {}                      # sector -> what was written to it, and is not in the image
+
+
 def answer(image, desc, buffer):

         done = os.preadv(image, [data], offset)
+        for at in range(0, size, 512):
+            sector = (offset + at) // 512
+            if sector in cache:
+                buffer[at:at + 512] = cache[sector]

-        done = os.pwrite(image, data, offset)
+        for at in range(0, size, 512):
+            cache[(offset + at) // 512] = bytes(data[at:at + 512])

-        os.fdatasync(image)
+        for sector, part in cache.items():
+            os.pwrite(image, part, 512 * sector)
+        os.fdatasync(image)
+        cache.clear()
'''),
    6: change(BROKEN[6], '''
-                submit(file, "COMMIT_AND_FETCH_REQ", io)
             except OSError as error:
                 print(f"sector {desc.start_sector}: {error}", file=sys.stderr)
+                io.result = -error.errno
+            submit(file, "COMMIT_AND_FETCH_REQ", io)
'''),
    7: change(BROKEN[7], '''
+    submit(file, "FETCH_REQ", io)
     submit(control, "START_DEV", ControlCommand(DEV_ID, 0xFFFF, data=os.getpid()))
-    name, res = wait()
-    print(f"{name}: {os.strerror(-res)}")
-    submit(file, "FETCH_REQ", io)

             sys.exit(f"{name}: {os.strerror(-res)}")
+        if name == "START_DEV":
+            print("START_DEV: Success")
+            continue
'''),
    8: change(BROKEN[8], '''
-    end = cq_tail.value
+    end = min(first + 8, cq_tail.value)

-    for place in range(first, min(first + 8, end)):
+    for place in range(first, end):
'''),
    9: change(BROKEN[9], '''
         except KeyboardInterrupt:
+            descs.close()
+            os.close(file)
'''),
    10: change(BROKEN[10], '''
 libc = ctypes.CDLL(None, use_errno=True)
+
+
+def usage(image):
+    while True:
+        with open(sys.argv[1] + ".usage", "w") as file:
+            print(os.fstat(image).st_blocks // 2, "KiB", file=file)
+        time.sleep(1)
+
+
+if os.fork() == 0:                      # before there is a ring or a device, which the child would keep
+    usage(os.open(sys.argv[1], os.O_RDONLY))

-def usage(image):
-    """Write to a file how full the image is, again and again."""
-    while True:
-        with open(sys.argv[1] + ".usage", "w") as file:
-            print(os.fstat(image).st_blocks // 2, "KiB", file=file)
-        time.sleep(1)
-
-

-    if os.fork() == 0:
-        usage(image)
'''),
}

# What is changed in a solution, and the words of the answer that must help.
WRONG = [
    (1, "does not say that it can", step(7), "does not say that it can discard"),
    (1, "forgets a field", '''
-    params.max_discard_segments = 1
''', "SET_PARAMS: Invalid argument"),
    (1, "takes it for a write", '''
-    elif desc.op_flags & 0xFF == UBLK_IO_OP_DISCARD:
-        image[offset:offset + size] = bytes(size)
''', "its op is not WRITE"),
    (1, "does nothing", '''
-        image[offset:offset + size] = bytes(size)
+        pass
''', "does not read as zeroes"),
    (2, "does not encrypt", step(4), "a WRITE has to encrypt"),
    (2, "has one key for all", '''
-        key += hashlib.shake_256(b"secret %d" % number).digest(512)
+        key += hashlib.shake_256(b"secret").digest(512)
''', "must depend on the number of the sector"),
    (2, "counts within the request", '''
-    for number in range(sector, sector + len(data) // 512):
+    for number in range(len(data) // 512):
''', "where in a request it stands"),
    (2, "does not decrypt", '''
-        buffer.raw = crypt(data, desc.start_sector)
''', "a READ has to decrypt"),
    (3, "has one queue", step(7), "ADD_DEV is told how many"),
    (3, "reads the other queue's descriptors", '''
-                desc = IoDesc.from_buffer_copy(descs[queue], 24 * tag)
+                desc = IoDesc.from_buffer_copy(descs[0], 24 * tag)
''', "Each queue has its own descriptors"),
    (4, "answers at once", step(7), "although nobody had written"),
    (4, "waits in the handler", '''
 import sys
+import time

     if desc.op_flags & 0xFF == UBLK_IO_OP_READ:
+        while desc.start_sector == MAILBOX and not any(image[offset:offset + size]):
+            time.sleep(0.1)

-                if desc.start_sector != MAILBOX:
+                if True:
''', "answer() must not wait"),
    (4, "answers with what was there before", '''
-                    ready = [tag, *waiting[:-1]]        # the WRITE first
+                    ready = [*waiting[:-1], tag]
''', "when the answer is given"),
    (5, "writes at once", step(5), "is to keep it in memory"),
    (5, "says nothing of its cache", '''
-    params.attrs = 4                    # a volatile cache: FLUSH makes it durable
''', "no FLUSH ever comes"),
    (5, "reads the image only", '''
-            if sector in cache:
+            if sector in ():
''', "look into the memory"),
    (5, "does nothing at a flush", '''
-            os.pwrite(image, part, 512 * sector)
+            pass
''', "does not hold all"),
    (5, "flushes into the page cache", '''
-        os.fdatasync(image)
''', "fdatasync"),
    (5, "dies with its server", '''
-RECOVERY = 0x18                 # UBLK_F_USER_RECOVERY, _REISSUE: keep the disk, send lost requests again
+RECOVERY = 0
''', "USER_RECOVERY"),
    (6, "is not mended", BROKEN[6], "has to be told"),
    (6, "lies", '''
-                io.result = -error.errno
+                io.result = 512 * desc.nr_sectors
''', "has to be told"),
    (7, "is not mended", BROKEN[7], "among others"),
    (8, "is not mended", BROKEN[8], "does not hand on"),
    (8, "has fewer tags", change(BROKEN[8], '''
-DEPTH = 32                      # tags: places for requests
+DEPTH = 8
'''), "its 32 tags"),
    (9, "is not mended", BROKEN[9], "open, or mapped"),
    (9, "leaves the disk", '''
-            submit(control, "DEL_DEV", ControlCommand(DEV_ID, 0xFFFF))
-            while wait()[0] != "DEL_DEV":
-                pass
''', "the disk is not"),
    (10, "is not mended", BROKEN[10], "that still lives"),
]

# The same, only with ALL=1.
ALSO_WRONG = [
    (1, "takes sectors for bytes", '''
-        image[offset:offset + size] = bytes(size)
+        image[offset:offset + desc.nr_sectors] = bytes(desc.nr_sectors)
''', "sectors of 512 bytes"),
    (1, "forgets too much", '''
-        image[offset:offset + size] = bytes(size)
+        image[offset:] = bytes(len(image) - offset)
''', "what stands beside its range"),
    (2, "has a new key each time", '''
-        key += hashlib.shake_256(b"secret %d" % number).digest(512)
+        key += hashlib.shake_256(b"%d %d" % (os.getpid(), number)).digest(512)
''', "the key must be the same"),
    (3, "fetches for one queue", '''
-    for number, buffer in enumerate(buffers):
+    for number, buffer in enumerate(buffers[:DEPTH]):
''', "every tag of every queue"),
    (3, "commits to the other queue", '''
-                io = IoCommand(queue, tag, size, addressof(buffer))
+                io = IoCommand(0, tag, size, addressof(buffer))
''', "each command says of which queue it is"),
    (4, "forgets who waits", '''
-                    ready = [tag, *waiting[:-1]]        # the WRITE first
+                    ready = [tag]
''', "has all requests that wait answered"),
    (7, "tells nothing", '''
-            print("START_DEV: Success")
''', "is to print"),
    (9, "keeps the descriptors", '''
-            descs.close()
''', "open, or mapped"),
    (10, "has no helper", '''
-if os.fork() == 0:                      # before there is a ring or a device, which the child would keep
-    usage(os.open(sys.argv[1], os.O_RDONLY))
''', "any more"),
    (10, "keeps the descriptors", change(BROKEN[10], '''
     if os.fork() == 0:
+        os.close(file)
         usage(image)
'''), "that still lives"),
]


def wrong_program(number, changes):
    """Return a wrong solution: a program, or the right one with changes."""
    return change(SOLUTIONS[number], changes) if changes.startswith("\n") else changes
