# SPDX-License-Identifier: MIT
"""The steps in learn/ are small and plain, and print what their page shows."""

from __future__ import annotations

import ast
import difflib
import re
import sys

import pytest

from tests.support import HERE, before, kernel, since

sys.path.append(str(HERE / "lab"))
import lessons
from measure import docstring_lines, tokens_by_line

STEPS = sorted((HERE / "learn").glob("step*.py"))


def marked(needs_root):
    """Return the parts of the page that need root or do not, each with the kernels it is for."""
    for part in lessons.parts():
        marks = [since(part.since)] if part.since else []
        marks += [before(part.before)] if part.before else []
        if part.needs_root == needs_root:
            yield pytest.param(part, id=str(part), marks=marks)


@pytest.mark.parametrize("part", list(marked(needs_root=False)))
def test_a_step_for_everybody_prints_what_its_page_shows(part):
    assert len(part.commands) > 0
    assert lessons.run(part) == ""


@kernel
@pytest.mark.parametrize("part", list(marked(needs_root=True)))
def test_a_step_prints_what_its_page_shows(part):
    assert len(part.commands) > 0
    assert lessons.run(part) == ""


def test_every_step_has_its_commands_on_the_page():
    shown = {f"step{part.step}" for part in lessons.parts() if f"step{part.step}.py" in str(part.commands)}
    assert shown == {path.stem for path in STEPS}


def code(path):
    """Return the lines of a program that are code, without comments, and how many tokens they have."""
    source = path.read_text()
    tokens = tokens_by_line(source, docstring_lines(ast.parse(source)))
    lines = source.splitlines()
    return [lines[number - 1].partition("  #")[0].strip() for number in sorted(tokens)], sum(tokens.values())


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_is_short_and_plain(path):
    lines, tokens = code(path)
    assert len(lines) <= 150
    assert round(tokens / len(lines), 1) <= 7


@pytest.mark.parametrize(("path", "previous"), list(zip(STEPS[1:], STEPS)))
def test_a_step_adds_little_to_the_one_before(path, previous):
    changes = difflib.ndiff(code(previous)[0], code(path)[0])
    assert sum(line.startswith("+ ") for line in changes) <= 40


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_stands_alone(path):
    modules = set(re.findall(r"(?m)^(?:import|from) (\w+)", path.read_text()))
    assert not modules - {"ctypes", "errno", "mmap", "os", "sys", "time"}
