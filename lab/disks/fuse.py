"""The ten-line disk as the one file of a FUSE file system: fuse.py MOUNTPOINT."""
import errno
import stat
import sys

import mfusepy

SIZE = 64 << 20


class Disk(mfusepy.Operations):
    use_ns = True

    def __init__(self):
        self.data = bytearray(SIZE)

    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path == "/disk":
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": SIZE}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def read(self, path, size, offset, fh):
        return bytes(self.data[offset:offset + size])

    def write(self, path, data, offset, fh):
        self.data[offset:offset + len(data)] = data
        return len(data)


if __name__ == "__main__":
    mfusepy.FUSE(Disk(), sys.argv[1], foreground=True, nothreads=True, direct_io=True)
