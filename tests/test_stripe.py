# SPDX-License-Identifier: MIT
"""Companion: stripes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import ublk
from tests.support import content_of, files, kernel, message, opened, read_at, since, write_at


@pytest.mark.parametrize("count, chunk", [(1, 512), (2, 512), (3, 1536), (4, 4096)])
def test_a_stripes_ranges_are_the_same_by_chunk_and_by_leg(targets, tmp_path, count, chunk):
    stripe = targets.Stripe(*files(tmp_path, count, 16 << 10), chunk=chunk)
    assert stripe.size == (16 << 10) // chunk * chunk * count
    seen = set()
    for start in range(0, stripe.size, 512):
        for end in range(start + 512, stripe.size + 512, 1536):
            one = [stripe.map(at, 512, False) for at in range(start, end, 512)]
            other = [(leg.fd, at + more) for leg, at, length in stripe.spans(start, end - start)
                     for more in range(0, length, 512)]
            assert sorted(one) == sorted(other)
            seen.update(one)
    assert len(seen) == stripe.size // 512          # no two places of the disk are one of a leg
    stripe.close()


def test_a_chunk_that_the_kernel_would_not_know_of_is_refused(targets, tmp_path):
    """It counts sectors in 32 bits: requests would cross into the next chunk, in the wrong file."""
    stripe = targets.Stripe(*files(tmp_path, 2, 2 << 40), chunk=2 << 40)
    assert "boundary 2199023255552: not a number from 0" in message(ublk.Device(stripe).start)
    stripe.close()


@kernel
@pytest.mark.parametrize("chunk", [512, 12 << 10, 64 << 10])
@pytest.mark.parametrize("data_path", ["copy", None])
def test_chunks_of_a_stripe_lie_where_they_should(targets, tmp_path, chunk, data_path):
    paths = files(tmp_path, 3, 256 << 10)
    target = targets.Stripe(*paths, chunk=chunk)
    with ublk.Device(target, data_path=data_path) as disk, opened(disk.path) as fd:
        data = os.urandom(target.size)
        for at in range(0, len(data), 250 << 10):
            write_at(fd, at, data[at:at + (250 << 10)])
        os.fsync(fd)
        assert content_of(fd) == data
    chunks = [data[at:at + chunk] for at in range(0, len(data), chunk)]
    for number, path in enumerate(paths):
        mine = b"".join(chunks[number::3])
        assert Path(path).read_bytes()[:len(mine)] == mine


@kernel
@since("6.16")
def test_a_disk_of_files_that_were_made_longer_can_become_larger(targets, tmp_path):
    for make, count in (targets.Stripe, 2), (targets.Loop, 1):
        with ublk.Device(make(*files(tmp_path, count, (2 << 20) // count))) as disk, opened(disk.path) as fd:
            for path in tmp_path.glob("*.img"):
                os.truncate(path, 4 << 20)
            disk.resize(4 << 20)
            data = os.urandom(3 << 20)
            assert read_at(fd, 2 << 20, 1 << 20) == bytes(1 << 20)
            write_at(fd, 1 << 20, data)
            assert read_at(fd, 1 << 20, 3 << 20) == data


@kernel
@since("6.16")
def test_the_files_of_a_disk_grow_with_it(targets, tmp_path):
    paths = files(tmp_path, 2, 1 << 20)
    with ublk.Device(targets.Stripe(*paths)) as disk, opened(disk.path) as fd:
        disk.resize(4 << 20)
        data = os.urandom(2 << 20)
        write_at(fd, 2 << 20, data)
        assert read_at(fd, 2 << 20, 2 << 20) == data
    assert [os.path.getsize(path) for path in paths] == [2 << 20, 2 << 20]


@pytest.mark.parametrize("more", [512, 64 << 10, 96 << 10])
def test_the_next_server_of_a_disk_that_has_grown_has_no_less(targets, tmp_path, more):
    paths = files(tmp_path, 2, 1 << 20)
    stripe = targets.Stripe(*paths)
    stripe.resized((2 << 20) + more)
    stripe.close()
    again = targets.Stripe(*paths)
    assert again.size == stripe.size >= (2 << 20) + more
    again.close()


def test_the_next_server_of_a_recorded_disk_that_has_grown_goes_on_with_its_log(targets, tmp_path):
    paths = files(tmp_path, 2, 1 << 20)
    for more in 0, 512:
        record = targets.Record(str(tmp_path / "log"), targets.Stripe(*paths))
        record.resized((2 << 20) + more)
        asyncio.run(record.close())
    targets.Record(str(tmp_path / "log"), targets.Stripe(*paths)).target.close()


@kernel
def test_a_disk_does_not_grow_beyond_its_device(targets):
    with ublk.Device(ublk.Null(size=1 << 20)) as lower:
        loop = targets.Loop(lower.path)
        assert "make that one larger first" in message(loop.resized, 2 << 20)
        loop.close()


@kernel
@since("6.16")
def test_an_overlay_does_not_grow_beyond_its_base(targets, tmp_path):
    base, = files(tmp_path, 1, 1 << 20)
    overlay = str(tmp_path / "x.cow")
    with ublk.Device(targets.Cow(base, overlay)) as disk:
        assert "no resized()" in message(disk.resize, 2 << 20)
    targets.Cow(base, overlay).close()              # which checks it
