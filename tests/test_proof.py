# SPDX-License-Identifier: MIT
"""Crash testing finds the bugs of lab/bugs.py, and no others; `make proof` tries all of them."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support import HERE, kernel

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


def test_the_readme_shows_the_table_of_the_proof():
    table = (HERE / "README.md").read_text().partition(proof.HEAD)[2].partition("\n\n")[0]
    shown = re.findall(r"(?m)^\| (.+?) \| (.+?) \| (.+?) \| (nothing)?", table)
    assert shown == [(row.title, row.settings, row.holds, "" if row.finds else "nothing")
                     for row in bugs.TABLE]


def test_ten_bugs_and_five_right_programs_are_in_it():
    assert len([row for row in bugs.TABLE if row.finds]) >= 10
    assert len([row for row in bugs.TABLE if not row.finds]) >= 5
