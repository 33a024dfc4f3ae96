# SPDX-License-Identifier: MIT
"""Crash testing finds the bugs of lab/bugs.py, and no others; `make proof` tries all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import ublk_targets
from tests.support import HERE, kernel, now

sys.path.append(str(HERE / "lab"))
import bugs
import proof

QUICK = [row for row in bugs.TABLE if "bare disk" in row.title or "barrier=0" in row.settings]


@kernel
@pytest.mark.parametrize("row", QUICK, ids=[f"{row.title}, {row.settings}" for row in QUICK])
def test_the_bug_is_found_and_the_right_program_is_good_whatever_the_seed(row, tmp_path):
    assert len(QUICK) == 5
    proof.record(row, tmp_path / "log")
    assert proof.differing(row, proof.search_all(row, tmp_path / "log", seeds=3)) == []


@pytest.mark.parametrize("finds, wrong, good", [
    ("", "", True), ("", "it is gone", False), ("gone", "", False), ("gone", "it is gone", True),
    ("gone", "it cannot be mounted", False)])
def test_a_bug_that_is_not_found_and_a_false_alarm_fail_the_proof(finds, wrong, good):
    row = bugs.TABLE[0]._replace(finds=finds)
    told = proof.differing(row, [proof.Found(wrong, 1, "flush", "all", 1, 1)])
    assert (told == []) == good


class Ordered(bugs.Program):
    """The first sector must not be there with the third, and without the second."""

    def look(self, place, promised):
        return "gone" if place.read_bytes()[:1536:512] == b"x\0x" else ""


def test_the_proof_finds_what_is_in_any_crash(tmp_path):
    """One looked like another: nothing tells them apart but what had been flushed."""
    class Slow(ublk_targets.Ram):
        async def flush(self):
            for at in (512, 1024):
                now(disk.write(at, memoryview(b"x" * 512)))

    disk = ublk_targets.Record(str(tmp_path / "log"), Slow(size=2048))
    disk.mark("0")
    now(disk.write(0, memoryview(b"x" * 512)))
    now(disk.flush())
    disk.mark("end")
    now(disk.close())
    row = bugs.Row("", "", "", Ordered(), file_system=None, states=2)
    for seed in range(40):
        crashes = ublk_targets.crashes(tmp_path / "log", states=2, seed=seed, to=5)
        bad = [crash.entry.number for crash in crashes if row.program.look(Path(crash.path), 0)]
        assert proof.search(row, tmp_path / "log", seed, {}).entry == (bad or [0])[0], seed


def test_the_readme_shows_the_table_of_the_proof():
    table = (HERE / "README.md").read_text().partition(proof.HEAD)[2].partition("\n\n")[0]
    shown = re.findall(r"(?m)^\| (.+?) \| (.+?) \| (.+?) \| (nothing)?", table)
    assert shown == [(row.title, row.settings, row.holds, "" if row.finds else "nothing")
                     for row in bugs.TABLE]


def test_ten_bugs_and_five_right_programs_are_in_it():
    assert len([row for row in bugs.TABLE if row.finds]) >= 10
    assert len([row for row in bugs.TABLE if not row.finds]) >= 5
