"""The ten-line disk as a plugin of nbdkit."""
API_VERSION = 2
SIZE = 64 << 20
data = bytearray(SIZE)


def open(readonly):
    return 1


def get_size(handle):
    return SIZE


def pread(handle, buffer, offset, flags):
    buffer[:] = data[offset:offset + len(buffer)]


def pwrite(handle, buffer, offset, flags):
    data[offset:offset + len(buffer)] = buffer
