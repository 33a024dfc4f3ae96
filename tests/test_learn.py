# SPDX-License-Identifier: MIT
"""The steps in learn/ are small and plain, and print what their page shows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from tests.support import HERE

sys.path.append(str(HERE / "lab"))
from measure import docstring_lines, tokens_by_line

LEARN = HERE / "learn"
STEPS = sorted(LEARN.glob("step*.py"))
PAGE = (LEARN / "README.md").read_text()


def shown(step):
    """Return the commands of a step, each with what its page shows it to print."""
    section = re.search(rf"(?ms)^## Step {step}:.*?(?=^## |\Z)", PAGE)[0]
    text = "".join(f"{line}\n" for line in re.findall(r"(?m)^    (\S.*)$", section.partition("```")[0]))
    return [part.partition("\n")[::2] for part in re.split(r"(?m)^\$ ", text)[1:]]


@pytest.mark.parametrize("step", [1])
def test_a_step_without_a_driver_prints_what_its_page_shows(step, tmp_path):
    (tmp_path / "learn").symlink_to(LEARN)
    commands = shown(step)
    assert len(commands) > 1
    for command, text in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        assert done.stdout == text, command


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_is_short_and_plain(path):
    source = path.read_text()
    tokens = tokens_by_line(source, docstring_lines(ast.parse(source)))
    assert len(source.splitlines()) <= 150
    assert sum(tokens.values()) / len(tokens) <= 7


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_stands_alone(path):
    modules = set(re.findall(r"(?m)^(?:import|from) (\w+)", path.read_text()))
    assert not modules - {"ctypes", "mmap", "os", "sys"}
