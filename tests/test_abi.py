# SPDX-License-Identifier: MIT
"""Kernel structures, constants and commands against the C headers; errors against the tables."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import assert_error_line, sh

HEADERS = ["linux/ublk_cmd.h", "linux/io_uring.h", "linux/blkzoned.h", "linux/time_types.h"]

C_NAMES = {"timespec": "__kernel_timespec"}


def include_directory():
    """Return the directory with the newest headers there are."""
    for root in filter(None, [os.environ.get("UBLK_HEADERS"), "/usr/include"]):
        for directory in (Path(root), Path(root, "usr/include")):
            if (directory / HEADERS[0]).exists():
                return directory
    pytest.skip("no linux/ublk_cmd.h here: install linux-libc-dev, or set UBLK_HEADERS")


def header_text():
    return "\n".join((include_directory() / name).read_text() for name in HEADERS)


def evaluate(expressions, tmp_path):
    """Return the value of each C expression, as the compiler and the headers see it."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc here to compile the headers with")
    lines = [f"#include <{name}>" for name in ["errno.h", "stddef.h", "stdio.h", *HEADERS]]
    lines += ["int main(void)", "{"]
    lines += [f'printf("%lld\\n", (long long)({expression}));' for expression in expressions]
    source = tmp_path / "values.c"
    source.write_text("\n".join([*lines, "return 0;", "}"]))
    top = include_directory()
    paths = [f"-I{top}", *(f"-I{path}" for path in sorted(top.glob(f"{os.uname().machine}-linux-gnu")))]
    sh("gcc", "-w", *paths, "-o", tmp_path / "values", source)
    return dict(zip(expressions, map(int, sh(tmp_path / "values").stdout.split())))


def structures():
    """Return the kernel's structures in ublk.py."""
    return [item for item in vars(ublk).values()
            if isinstance(item, type) and issubclass(item, ctypes.Structure)]


def meaningful(structure):
    """Return the names of fields that are more than padding."""
    return [name for name, *_ in structure._fields_ if not re.match(r"pad|resv|reserved", name)]


def body_of(structure, text):
    """Return the text of a structure in the headers, empty where they lack it."""
    found = re.search(rf"^struct {C_NAMES.get(structure.__name__, structure.__name__)} \{{(.*?)^\}}", text,
                      re.M | re.S)
    return found[1] if found else ""


def test_structures_have_the_layout_of_the_header(tmp_path):
    text, expected = header_text(), {}
    for structure in structures():
        body, name = body_of(structure, text), C_NAMES.get(structure.__name__, structure.__name__)
        fields = meaningful(structure)
        known = [field for field in fields if re.search(rf"\b{field}\b", body)]
        if known == fields:             # an older header has smaller structures
            expected[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field in known:
            expected[f"offsetof(struct {name}, {field})"] = getattr(structure, field).offset
            if known == fields and field != "cmd":      # cmd is an array of no length in C
                expected[f"sizeof(((struct {name} *)0)->{field})"] = getattr(structure, field).size
    assert len(expected) > 100
    if os.environ.get("UBLK_HEADERS"):
        complete = [item for item in structures()
                    if f"sizeof(struct {C_NAMES.get(item.__name__, item.__name__)})" in expected]
        assert complete == structures()
    actual = evaluate(list(expected), tmp_path)
    assert {key: actual[key] for key in expected} == expected


def test_packed_records_have_the_size_of_their_structures():
    assert ublk.IO_CMD.size == ctypes.sizeof(ublk.ublksrv_io_cmd)
    assert ublk.IO_DESC.size == ctypes.sizeof(ublk.ublksrv_io_desc)
    assert ublk.SQE.size == ublk.io_uring_sqe.cmd.offset
    assert 4 * ublk.RESULT_WORD == ublk.io_uring_sqe.cmd.offset + ublk.ublksrv_io_cmd.result.offset


def defined(pattern):
    """Return the constants of the headers whose name matches."""
    found = re.findall(r"^\s*#define\s+(\w+)(?!\()\s+\S|^\s*(\w+)\s*(?:=[^,]*)?,", header_text(), re.M)
    return [name for pair in found for name in pair if name and re.fullmatch(pattern, name)]


def test_constants_have_the_values_of_the_header(tmp_path):
    ours = {name: int(value) for name, value in vars(ublk).items()
            if re.match(r"UBLK|IORING_|IOSQE_", name) and isinstance(value, int)}
    names = sorted(set(defined(r"(UBLK|IORING_|IOSQE_)\w+")) & set(ours))
    assert len(names) > (110 if os.environ.get("UBLK_HEADERS") else 60)
    actual = evaluate(names, tmp_path)
    assert actual == {name: ours[name] for name in names}


def test_encoded_commands_have_the_values_of_the_header(tmp_path):
    names = defined(r"UBLK_U_CMD_\w+")
    actual = evaluate(names, tmp_path)
    ours = {f"UBLK_U_CMD_{command.name}": command.encoded for command in ublk.COMMANDS}
    assert {name: ours.get(name) for name in names} == {name: actual[name] & 0xFFFFFFFF for name in names}


def test_encoded_data_plane_commands_have_the_values_of_the_header(tmp_path):
    names = defined(r"UBLK_U_IO_\w+")
    actual = evaluate(names, tmp_path)
    ours = {name: getattr(ublk, name, None) for name in names}
    assert ours == {name: actual[name] & 0xFFFFFFFF for name in names}


def test_every_feature_of_the_header_has_a_name_and_its_bit(tmp_path):
    names = defined(r"UBLK_F_\w+")
    assert len(names) >= 5
    rows = {f"UBLK_F_{feature.name}": int(feature) for feature in ublk.FEATURES}
    assert {name: rows.get(name) for name in names} == evaluate(names, tmp_path)


@pytest.mark.parametrize("pattern", [
    r"UBLK_IO_OP_[A-Z]\w+", r"UBLK_IO_F_\w+", r"UBLK_S_DEV_\w+", r"UBLK_ATTR_\w+", r"UBLK_PARAM_TYPE_\w+",
    r"UBLK_IO_RES_\w+", r"UBLK_BATCH_F_\w+"])
def test_no_constant_of_the_header_is_missing(pattern):
    names = defined(pattern)
    if not names:
        pytest.skip(f"these headers are too old to define {pattern}: set UBLK_HEADERS")
    assert [name for name in names if not hasattr(ublk, name)] == []


def test_tables_are_consistent():
    assert [feature.bit for feature in ublk.FEATURES] == list(range(len(ublk.FEATURES)))
    assert all(int(feature) == 1 << feature.bit and feature.meaning for feature in ublk.FEATURES)
    assert len({command.name for command in ublk.COMMANDS}) == len(ublk.COMMANDS)
    assert [1 << bit for bit in range(len(ublk.PARAM_TYPES))] == list(ublk.PARAM_TYPES)
    assert ublk.STATES == {0: "DEAD", 1: "LIVE", 2: "QUIESCED", 3: "FAIL_IO"}
    for feature in ublk.FEATURES:
        assert re.fullmatch(r"[67]\.\d+", feature.since)
        assert not feature.needs & feature.excludes


def test_flags_are_named_even_those_of_the_future():
    assert ublk.flag_names(ublk.UBLK_F_USER_COPY | 1 << 50) == ["USER_COPY", "BIT_50"]
    assert ublk.flag_names(0) == []


def test_an_error_is_one_line():
    error = ublk.UblkError(errno.EBUSY, "device 3", "somebody has it open", "close it")
    assert str(error) == "device 3: somebody has it open (16 EBUSY): close it"
    assert isinstance(error, OSError) and error.errno == errno.EBUSY
    assert str(ublk.UblkError(errno.EIO, "it")) == "it: input/output error (5 EIO)"


@pytest.mark.parametrize("key", ublk.EXPLANATIONS, ids=lambda key: f"{key[0] and key[0].name}-{key[1]}")
def test_every_explanation_makes_an_error_line(key):
    command, number = key
    error = ublk.explain(command or ublk.UBLK_CMD_GET_PARAMS, number, "device 5")
    reason, remedy = ublk.EXPLANATIONS[key]
    assert_error_line(f"ublk: {error}\n", number, says=reason)
    assert error.remedy == remedy


@pytest.mark.parametrize("release, says", [
    ("6.9.0-13-amd64", "needs Linux 6.16, this is 6.9"), ("6.13-rc7-amd64", "needs Linux 6.16, this is 6.13"),
    ("7.1+deb14-cloud-amd64", "this Linux 7.1 is built without it")])
def test_an_unknown_command_names_the_kernel_that_has_it(release, says, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    text = str(ublk.explain(ublk.UBLK_CMD_UPDATE_SIZE, errno.EOPNOTSUPP, "UPDATE_SIZE of device 0"))
    assert says in text


def test_an_errno_without_explanation_has_the_systems_text():
    error = ublk.explain(ublk.UBLK_CMD_GET_PARAMS, errno.EFAULT, "GET_PARAMS")
    assert str(error) == "GET_PARAMS: bad address (14 EFAULT)"
