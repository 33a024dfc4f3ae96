# SPDX-License-Identifier: MIT
"""Data paths: integrity metadata."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

import ublk
from tests.checked import Checked
from tests.support import (
    HERE,
    Ram,
    assert_error_line,
    carries,
    error_of,
    fio_verify,
    kernel,
    message,
    needs,
    opened,
    orphan,
    read_at,
    recovered,
    sh,
    since,
    write_at,
)


def crc_t10dif(data):
    """Return the checksum T10 gives a block."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ (0x18BB7 if crc & 0x8000 else 0)
    return crc


def metadata_of(target, offset, blocks=1):
    """Return the metadata of blocks of a target."""
    buffer = bytearray(blocks * target.metadata_size)
    target.read_metadata(offset, memoryview(buffer))
    return buffer


CHECKED = HERE / "tests/checked.py"        # the target Checked, on a command line

FORMATS = {"crc": "T10-DIF-TYPE1-CRC", "ip": "T10-DIF-TYPE1-IP", "crc64": "EXT-DIF-TYPE1-CRC64"}


@kernel
@since("7.0")
@pytest.mark.parametrize("checksum, size", [("crc", 8), ("crc", 64), ("ip", 8), ("crc64", 16)])
@pytest.mark.parametrize("block", [512, 4096])
def test_the_kernel_finds_what_went_wrong_in_a_block(checksum, size, block):
    target = Checked(size=1 << 20, metadata_size=size, checksum=checksum)
    target.block_size = block
    data = os.urandom(2 * block)
    with ublk.Device(target) as disk, opened(disk.path) as fd:
        assert "INTEGRITY" in ublk.flag_names(disk.info.flags)
        about = Path(f"/sys/block/ublkb{disk.id}/integrity")
        assert (about / "format").read_text().strip() == FORMATS[checksum]
        assert int((about / "protection_interval_bytes").read_text()) == block
        assert read_at(fd, 0, 65536) == bytes(65536)        # blocks never written are not verified
        write_at(fd, 65536, data)
        assert read_at(fd, 65536, len(data)) == data
        good = metadata_of(target, 65536, 2)
        if checksum == "crc":
            assert good[:2] == crc_t10dif(data[:block]).to_bytes(2, "big")
            assert good[4:8] == (65536 // block).to_bytes(4, "big")

        target.data[65536 + 100] ^= 1                       # the data are not what was written
        assert error_of(read_at, fd, 65536, block) == errno.EILSEQ
        assert read_at(fd, 65536 + block, block) == data[block:]
        target.data[65536 + 100] ^= 1
        assert read_at(fd, 65536, block) == data[:block]

        target.write_metadata(65536, bytes([good[0] ^ 1]) + good[1:size])   # the metadata are not
        assert error_of(read_at, fd, 65536, block) == errno.EILSEQ
        target.data[:2 * block] = target.data[65536:65536 + 2 * block]      # the block lies elsewhere
        target.write_metadata(0, good)
        assert error_of(read_at, fd, 0, block) == errno.EILSEQ

        write_at(fd, 0, data)                               # written anew all is well
        write_at(fd, 65536, data)
        assert read_at(fd, 0, len(data)) == read_at(fd, 65536, len(data)) == data
        sh("blkdiscard", "-o", 65536, "-l", 4096, disk.path)
        assert read_at(fd, 65536, 4096) == bytes(4096)


@kernel
@since("7.0")
@pytest.mark.parametrize("options", [
    {"queues": 4}, {"batch": True, "queues": 4}, {"data_path": "auto-zero-copy"},
    {"data_path": "zero-copy", "batch": True}], ids=str)
def test_disks_with_metadata_verify(options):
    needs("fio")
    target = Checked(size=32 << 20, metadata_size=8)
    with ublk.Device(target, **options) as disk:
        fio_verify(disk.path)
        assert metadata_of(target, 0) != b"\xff" * 8


@kernel
@since("7.0")
def test_a_disk_with_metadata_carries_a_file_system(tmp_path):
    with ublk.Device(Checked(size=64 << 20, metadata_size=8)) as disk:
        carries("ext4", disk, tmp_path / "mnt")


@kernel
@since("7.0")
def test_a_disk_with_metadata_is_recovered_by_a_target_with_as_much_of_it():
    disk = orphan(CHECKED, "-r", "requeue")
    says = message(ublk.Device.recover, disk.id, Ram())
    assert "the target has 0 bytes of metadata beside a block, the disk 8" in says
    data = os.urandom(4096)
    disk = recovered(disk)
    with opened(disk.path) as fd:
        write_at(fd, 4096, data)
        assert read_at(fd, 4096, 4096) == data
    assert disk.kill(signal.SIGTERM) == 0


@kernel
@since("7.0")
def test_a_write_that_was_lost_on_its_way_is_found(targets):
    """What a lost write leaves is as good a block as any, but not the one its metadata tell of."""
    inner = Checked(size=1 << 20, metadata_size=8)
    with ublk.Device(targets.Fault(inner, on="write", range="64K-128K", lost=True)) as disk, \
            opened(disk.path) as fd:
        write_at(fd, 0, b"a" * 4096)
        write_at(fd, 65536, b"a" * 4096)
        assert read_at(fd, 0, 4096) == b"a" * 4096
        assert error_of(read_at, fd, 65536, 4096) == errno.EILSEQ


@pytest.mark.parametrize("words, says", [
    (["--metadata-size", "4"], "not a number from 8 to 255, as crc wants it"),
    (["--metadata-size", "8", "--checksum", "crc64"], "not a number from 16 to 255"),
    (["--metadata-size", "256"], "not a number from 8 to 255"),
    (["--checksum", "md5"], "choose one of none, ip, crc, crc64"),
])
def test_bad_metadata(run, words, says):
    done = run(CHECKED, *words)
    assert done.status == 1
    assert_error_line(done.err.splitlines(True)[-1], says=says)


@kernel
@pytest.mark.parametrize("data_path", ["copy", "get-data"])
def test_metadata_need_user_copy(data_path):
    device = ublk.Device(Checked(size=1 << 20, metadata_size=8), data_path=data_path)
    assert_error_line(f"ublk: {message(device.start)}\n", errno.EINVAL, says="not possible without USER_COPY")
