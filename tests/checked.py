# SPDX-License-Identifier: MIT
"""A target file: a disk in memory with metadata beside its blocks, for the checksum of the kernel (7.0)."""

from __future__ import annotations

import ublk
from tests.support import Ram


class Checked(Ram):
    """Keep data and metadata. All ones mean to the kernel a block that was never written.

    size: size of the disk
    metadata_size: bytes kept beside each block
    checksum: which one: crc, ip, crc64 or none
    """

    def __init__(self, *, size: ublk.Size = ublk.Size(1 << 20), metadata_size: int = 8,
                 checksum: str = "crc"):
        super().__init__(size)
        self.metadata_size, self.checksum = metadata_size, checksum
        self.metadata = bytearray(b"\xff") * (size // ublk.SECTOR * metadata_size)

    def beside(self, offset, length):
        """Return where the metadata of a block lie, so many bytes of them."""
        start = offset // self.block_size * self.metadata_size
        return slice(start, start + length)

    def read_metadata(self, offset, buffer):
        buffer[:] = self.metadata[self.beside(offset, len(buffer))]

    def write_metadata(self, offset, buffer):
        self.metadata[self.beside(offset, len(buffer))] = buffer

    def discard(self, offset, length):
        self.data[offset:offset + length] = bytes(length)
        size = length // self.block_size * self.metadata_size
        self.metadata[self.beside(offset, size)] = b"\xff" * size
