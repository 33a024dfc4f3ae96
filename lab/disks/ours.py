"""The ten-line disk as targets of ublk.py."""
import ublk

SIZE = 64 << 20


class Plain(ublk.Target):
    """Memory, served by plain methods."""

    def __init__(self):
        self.size = SIZE
        self.data = bytearray(SIZE)

    def read(self, offset, buffer):
        buffer[:] = self.data[offset:offset + len(buffer)]

    def write(self, offset, buffer):
        self.data[offset:offset + len(buffer)] = buffer


class Async(Plain):
    """The same as coroutines."""

    async def read(self, offset, buffer):
        buffer[:] = self.data[offset:offset + len(buffer)]

    async def write(self, offset, buffer):
        self.data[offset:offset + len(buffer)] = buffer


class Busy(Plain):
    """Costs Python some work per request, as encryption or compression would."""

    def read(self, offset, buffer):
        sum(range(2000))
