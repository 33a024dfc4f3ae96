# SPDX-License-Identifier: MIT
"""The exercises in learn/ can be solved, and who goes wrong is told what helps."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.solutions import ALSO_WRONG, BROKEN, SOLUTIONS, WRONG, wrong_program
from tests.support import HERE, kernel

sys.path.append(str(HERE / "lab"))
import exercises

TRIED = WRONG + (ALSO_WRONG if os.environ.get("UBLK_TEST_ALL") else [])


@pytest.fixture
def judged(tmp_path):
    """Have a program tried; return what is wrong with it."""
    def judged(number, text):
        program = tmp_path / "mine.py"
        program.write_text(text)
        return exercises.attempt(number, program)
    return judged


@kernel
@pytest.mark.parametrize("number", SOLUTIONS)
def test_a_right_solution_is_accepted(judged, number):
    assert judged(number, SOLUTIONS[number]) == ""


@kernel
@pytest.mark.parametrize(("number", "changes", "says"),
                         [pytest.param(number, *row, id=f"{number} {name}") for number, name, *row in TRIED])
def test_a_wrong_solution_is_told_what_helps(judged, number, changes, says, monkeypatch):
    monkeypatch.setattr(exercises, "PATIENCE", 150)     # what hangs does so for good
    assert says in judged(number, wrong_program(number, changes))


def test_every_exercise_is_on_the_page():
    page = (HERE / "learn/exercises.md").read_text()
    found = re.findall(r"(?m)^## (\d+)\. (.*)$", page)
    assert found == [(str(number), exercise.title) for number, exercise in exercises.EXERCISES.items()]


def test_a_broken_server_is_a_wrong_solution():
    assert {number for number, name, *_ in WRONG if name == "is not mended"} == set(BROKEN)
    assert set(SOLUTIONS) == set(exercises.EXERCISES)


def test_the_program_to_start_from_is_handed_out(tmp_path, capsys):
    program = tmp_path / "mine.py"
    assert exercises.main(6, program) == 0
    assert program.read_text() == BROKEN[6]
    assert "the program to start from" in capsys.readouterr().out
