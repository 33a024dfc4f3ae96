# SPDX-License-Identifier: MIT
"""The steps in learn/ are small and plain, and print what their page shows."""

from __future__ import annotations

import ast
import difflib
import errno
import os
import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from tests.support import HERE, before, kernel, since

sys.path.append(str(HERE / "lab"))
import lessons
from measure import docstring_lines, tokens_by_line

NEEDS_OF_SERVE = ["mmap", "submit", "control", "sizeof", "addressof", "create_string_buffer", "DEV_ID",
                  "IoDesc", "IoCommand", "ControlCommand"]
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
    assert round(tokens / len(lines), 1) <= (7.3 if path.stem == "step8" else 7)


@pytest.mark.parametrize(("path", "previous"), list(zip(STEPS[1:], STEPS)))
def test_a_step_adds_little_to_the_one_before(path, previous):
    changes = difflib.ndiff(code(previous)[0], code(path)[0])
    assert sum(line.startswith("+ ") for line in changes) <= 40


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_stands_alone(path):
    modules = set(re.findall(r"(?m)^(?:import|from) (\w+)", path.read_text()))
    assert not modules - {"ctypes", "errno", "mmap", "os", "sys", "time"}


def function(number, name, **around):
    """Return one function of a step, with what it needs around it."""
    tree = ast.parse((HERE / f"learn/step{number}.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    constants = [node for node in assigned if "UBLK_IO_OP" in ast.dump(node)]
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module(constants + found, []), f"step{number}.py", "exec"), around)
    return around[name]


@pytest.mark.parametrize(("number", "image"), [(3, []), (4, [-1]), (5, [-1])])
def test_a_step_fails_what_it_does_not_know(number, image):
    write_zeroes = SimpleNamespace(op_flags=5, start_sector=0, nr_sectors=1)
    answer = function(number, "answer", os=os, errno=errno)
    assert answer(*image, write_zeroes, bytearray(512)) == -errno.EOPNOTSUPP


@pytest.mark.parametrize(("number", "name", "arguments"), [(7, "submit", 3), (8, "push", 2)])
def test_a_full_queue_takes_no_more(number, name, arguments):
    add = function(number, name, DEPTH=32, ENTRIES=64, sq_head=SimpleNamespace(value=1),
                   sq_tail=SimpleNamespace(value=65))
    with pytest.raises(AssertionError):
        add(*[None] * arguments)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_step_goes_no_further_than_a_command_that_fails(number):
    manage = function(number, "manage", sys=sys, os=os, wait=lambda: ("ADD_DEV", -errno.EEXIST),
                      **dict.fromkeys(NEEDS_OF_SERVE, MagicMock()))
    with pytest.raises(SystemExit, match="1"):
        manage("ADD_DEV", bytearray(64))


@pytest.mark.parametrize(("number", "arguments"), [(3, []), (4, [-1]), (5, ["START_DEV"])])
def test_a_disk_that_does_not_start_tells_which_command_failed(number, arguments):
    serve = function(number, "serve", sys=MagicMock(exit=sys.exit), wait=lambda: ("START_DEV", -errno.EINVAL),
                     os=MagicMock(strerror=os.strerror), **dict.fromkeys(NEEDS_OF_SERVE, MagicMock()))
    with pytest.raises(SystemExit, match="START_DEV: Invalid argument"):
        serve(*arguments)
