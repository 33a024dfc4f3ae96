# SPDX-License-Identifier: MIT
"""Words of the command line and how they become a target."""

from __future__ import annotations

import enum
import errno
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest

import ublk
from tests.support import HERE, UBLK, assert_error_line, assert_fails, sh, target_file


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("4096", 4096), ("512K", 512 << 10), ("1m", 1 << 20), ("1G", 1 << 30), ("2T", 2 << 40),
    ("1.5K", 1536),
    ("4KiB", 4096), ("4kb", 4096), ("1.5GiB", 3 << 29),
    ("0.5G", 512 << 20), (str((1 << 53) + 1), (1 << 53) + 1), ("7000000T", 7000000 << 40)])
def test_sizes(text, size):
    assert ublk.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "x", "1P", "1B", "1Ki", "-1", "-1K", "1.0001", "nan", "inf",
                                  "-inf", "infK", "1e400", "0x10", "1 2", "1_000"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError):
        ublk.parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 512, 1000, 1024, 1536, 1 << 20, 3 << 30, 5 << 40, (1 << 40) + 512])
def test_sizes_are_written_as_they_are_read(size):
    assert ublk.parse_size(ublk.format_size(size)) == size


class Sample(ublk.Target):
    """Show every kind of parameter.

    path: where it lies
    delay: seconds
    """

    def __init__(self, path, count: int = 3, *, delay: float = 0.5, big: ublk.Size = ublk.Size(4096),
                 loud: bool = False, name_of: str = "x"):
        self.all = path, count, delay, big, loud, name_of


class Wrapper(ublk.Target):
    """Wrap another target."""

    def __init__(self, inner: ublk.Target, *, rate: int = 1):
        self.inner, self.rate = inner, rate


class Many(ublk.Target):
    """Take several words."""

    def __init__(self, *paths, mirror: bool = False):
        self.paths, self.mirror = paths, mirror


@pytest.fixture
def samples(monkeypatch):
    """Let the command line know the targets above."""
    monkeypatch.setattr(ublk, "known_targets", lambda: {"sample": Sample, "wrapper": Wrapper, "many": Many,
                                                        "null": ublk.Null})


@pytest.mark.parametrize("words, expected", [
    ("a", ("a", 3, 0.5, 4096, False, "x")),
    ("a 2K --delay 2 --big 1M --loud --name-of y", ("a", 2048, 2.0, 1 << 20, True, "y")),
    ("--loud a", ("a", 3, 0.5, 4096, True, "x"))])
def test_words_become_arguments(samples, words, expected):
    assert ublk.make_target(["sample", *words.split()]).all == expected


def test_a_target_wraps_the_words_that_remain(samples):
    target = ublk.make_target("wrapper --rate 5 sample a --delay 9".split())
    assert target.rate == 5 and target.inner.all[:3] == ("a", 3, 9.0)


def test_a_target_takes_many_words(samples):
    assert ublk.make_target("many a b c --mirror".split()).paths == ("a", "b", "c")


def test_help_of_a_target_comes_from_its_docstring(samples, run):
    done = run("sample", "--help")
    assert done.status == 0
    for text in ("Show every kind of parameter.", "where it lies", "--delay", "seconds", "--name-of"):
        assert text in done.out


@pytest.mark.parametrize("words", ["sample", "sample a --delay x", "sample a 1 2", "sample a --big 1P",
                                   "many", "sample a --unknown 1"])
def test_wrong_words_for_a_target_are_wrong_usage(samples, run, words):
    done = run(*words.split())
    assert done.status == 2 and "usage: ublk.py" in done.err and "Traceback" not in done.err
    assert run("wrapper").status == 2


def test_targets_of_the_users_own_file(tmp_path):
    path = target_file(tmp_path, """
        class One(ublk.Target):
            def __init__(self, *, size: ublk.Size = ublk.Size(1 << 20)):
                self.size = size
    """)
    for word in (str(path), f"{path}:One"):
        target = ublk.make_target([word, "--size", "2M"])
        assert isinstance(target, ublk.Target) and target.size == 2 << 20


@pytest.mark.parametrize("signature", ["size", "size=4096", "size: int", "size: ublk.Size"])
@pytest.mark.parametrize("words", ["1M", "--size 1M", "--size=1M"])
def test_a_size_is_a_word_or_an_option(tmp_path, capfd, signature, words):
    path = target_file(tmp_path, f"""
        print("loaded")
        class Mine(ublk.Target):
            def __init__(self, {signature}, depth_of_thought=1.5):
                self.size, self.depth = size, depth_of_thought
    """)
    assert ublk.make_target([str(path), *words.split()]).size == 1 << 20
    target = ublk.make_target([str(path), *words.split(), "--depth-of-thought", "2"])
    assert (target.size, target.depth) == (1 << 20, 2.0)
    assert capfd.readouterr().out == ""         # standard output is for the path of the disk


def test_a_path_may_have_colons(tmp_path):
    (tmp_path / "a:b.py").mkdir()
    path = target_file(tmp_path / "a:b.py", "class Mine(ublk.Target): size = 4096")
    for word in (path, f"{path}:Mine"):
        assert ublk.make_target([str(word)]).size == 4096


def test_a_file_may_have_colons_in_its_name(tmp_path):
    path = target_file(tmp_path, "class Mine(ublk.Target): size = 4096").rename(tmp_path / "a:b.py")
    for word in (path, f"{path}:Mine"):
        assert ublk.make_target([str(word)]).size == 4096


@pytest.mark.parametrize("linked", [False, True], ids=["", "through a link"])
def test_the_companion_is_found_by_an_isolated_python(tmp_path, linked):
    (tmp_path / "link.py").symlink_to(UBLK)
    program = tmp_path / "link.py" if linked else UBLK
    done = sh(sys.executable, "-I", program, "loop", "/no/such/file", check=False)
    assert_error_line(done.stderr, errno.ENOENT, says="/no/such/file")


def test_a_bug_of_a_target_needs_nobody_who_reads_of_it():
    code = """if True:
        import errno, os, sys, ublk
        modules = set(sys.modules)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        try:
            1 / 0
        except ZeroDivisionError as error:
            assert ublk.failed(error) == -errno.EIO
        ublk.say("nobody hears this")
        os._exit(0 if sys.version_info >= (3, 13) or modules == set(sys.modules) else 3)
    """
    assert sh(sys.executable, "-c", code, cwd=HERE, check=False).returncode == 0


def test_a_target_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SIZE = 8192\n")
    path = target_file(tmp_path, """
        from neighbour_of_mine import SIZE
        class One(ublk.Target):
            size = SIZE
    """)
    assert ublk.make_target([str(path)]).size == 8192


class Colour(enum.Enum):
    RED = 1
    DARK_BLUE = 2


NUMBERS = [1]


class Kinds(ublk.Target):
    """Show every type a parameter may have, 100 % of them.

    verify: whether to look twice
    """

    size = 4096

    def __init__(self, *, count: int = 3, verify: bool = True, quick: bool = False, ratio: float = 0.5,
                 where: Path = Path("/"), colour: Colour = Colour.RED, mode: typing.Literal["a", "b"] = "a",
                 limit: typing.Optional[int] = None, numbers: list[int] = NUMBERS,
                 names: list = (), plain=7, nothing=None, no_cache=False, log=sys.stderr):
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


@pytest.mark.parametrize("words, name, value", [
    ("--count -5", "count", -5), ("--count 0x10", "count", 16), ("--count 2K", "count", 2048),
    ("--no-verify", "verify", False), ("--verify", "verify", True), ("", "verify", True),
    ("--quick", "quick", True), ("--no-cache", "no_cache", True), ("", "no_cache", False),
    ("--ratio=-1.5", "ratio", -1.5), ("--where /a/b", "where", Path("/a/b")),
    ("--colour dark_blue", "colour", Colour.DARK_BLUE), ("--mode b", "mode", "b"),
    ("--limit 7", "limit", 7), ("", "limit", None), ("--numbers 4 5", "numbers", [4, 5]),
    ("", "numbers", [1]),
    ("--names x y", "names", ["x", "y"]), ("--plain 9", "plain", 9), ("--nothing x", "nothing", "x")])
def test_words_become_what_the_annotation_says(monkeypatch, words, name, value):
    monkeypatch.setattr(ublk, "known_targets", lambda: {"kinds": Kinds})
    found = ublk.make_target(["kinds", *words.split()]).given[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("words", ["--count x", "--colour green", "--mode c", "--log x", "--numbers a",
                                   "--limit 1.5", "--no-quick x"])
def test_words_that_are_none_of_it_are_wrong_usage(monkeypatch, run, words):
    monkeypatch.setattr(ublk, "known_targets", lambda: {"kinds": Kinds})
    assert run("kinds", *words.split()).status == 2


def test_help_tells_defaults_and_may_have_percent_signs(monkeypatch, run):
    monkeypatch.setattr(ublk, "known_targets", lambda: {"kinds": Kinds})
    done = run("kinds", "--help")
    assert done.status == 0, done.err
    for text in ("100 % of them", "--no-verify", "whether to look twice", "(default: 3)", "(default: red)"):
        assert text in done.out


@pytest.mark.parametrize("annotation", [
    "dict", "typing.Dict[str, None]", "typing.Callable[[int], None]",
    "[int]", "'Nowhere'", "list[bytes]", "typing.Union[int, str]", "complex"])
def test_a_type_that_is_not_understood_is_refused(tmp_path, annotation):
    path = target_file(tmp_path, f"""
        import typing
        class Mine(ublk.Target):
            size = 4096
            def __init__(self, *, one: {annotation} = None): pass
    """)
    with pytest.raises(ublk.UblkError) as info:
        ublk.make_target([str(path)])
    assert info.value.errno == errno.EINVAL


@pytest.mark.parametrize("first", ["", "from __future__ import annotations\n"], ids=["", "texts"])
def test_a_dataclass_is_a_target(tmp_path, first):
    """Also where its annotations are texts, which it looks up in its module."""
    path = target_file(tmp_path, """
        import dataclasses
        @dataclasses.dataclass
        class Mine(ublk.Target):
            size: ublk.Size
            retries: int = 3
            verify: bool = True
    """)
    path.write_text(first + path.read_text())
    target = ublk.make_target([str(path), "1M", "--no-verify"])
    assert (target.size, target.retries, target.verify) == (1 << 20, 3, False)
    assert ublk.make_target([str(path), "1M", "5"]).retries == 5


@pytest.mark.parametrize("body", [
    "@dataclasses.dataclass(frozen=True)\nclass Mine(ublk.Target):\n    size: ublk.Size = 4096",
    "class Mine(ublk.Target):\n    size, read_only = 4096, property(lambda self: True)"])
def test_a_target_that_cannot_be_changed_need_not_be(no_driver, run, tmp_path, body):
    path = target_file(tmp_path, f"import dataclasses\n{body}")
    assert_fails(run(path), 1, "cannot open /dev/ublk-control", errno.ENOENT)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs Python 3.10")
def test_a_union_with_none_is_the_other_type(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 4096
            def __init__(self, *, limit: int | None = None): self.limit = limit
    """)
    assert ublk.make_target([str(path), "--limit", "2K"]).limit == 2048
    assert ublk.make_target([str(path)]).limit is None


def test_a_file_has_its_own_future(tmp_path):
    path = target_file(tmp_path, """
        class Mine(ublk.Target):
            size = 4096
            note: "not evaluated" = 1
            kind: int = 2
    """)
    assert type(ublk.make_target([str(path)])).__annotations__["kind"] is int


def test_an_oserror_inside_a_file_is_not_its_absence(tmp_path):
    path = target_file(tmp_path, "open('/no/such/thing')\n")
    with pytest.raises(ublk.UblkError) as info:
        ublk.make_target([str(path)])
    assert info.value.errno == errno.EINVAL and "/no/such/thing" in str(info.value)
    assert "mend the file" in str(info.value)


def test_an_edited_file_is_the_edited_file(tmp_path):
    path = target_file(tmp_path, "class Mine(ublk.Target): size = 4096")
    assert ublk.make_target([str(path)]).size == 4096
    path.write_text(path.read_text().replace("4096", "8192"))
    assert ublk.make_target([str(path)]).size == 8192
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def taking(directory, parameters):
    """Return a file of a target that shows what its constructor was given."""
    return target_file(directory, f"""
        import typing
        class Mine(ublk.Target):
            size = 4096
            def __init__(self, {parameters}):
                self.given = [value for name, value in locals().items() if name != "self"]
    """)


@pytest.mark.parametrize("parameters, words, given", [
    ("first=True, *rest", "x y", [True, ("x", "y")]),
    ("first=1, /, second=2, *rest", "--second 5 x", [1, 5, ("x",)]),
    ("*rest: int", "1 2", [(1, 2)]),
    ("*rest: typing.Literal['a', 'b']", "b a", [("b", "a")]),
    ("*, some: list[typing.Literal['a', 'b']]", "--some b a", [["b", "a"]]),
    ("below: typing.Optional[ublk.Target] = None", "", [None]),
    ("*, below: ublk.Target = None", "", [None])])
def test_words_reach_the_parameters_they_are_meant_for(tmp_path, parameters, words, given):
    assert ublk.make_target([str(taking(tmp_path, parameters)), *words.split()]).given == given


def test_a_target_that_may_be_left_out_has_options_of_its_own(tmp_path):
    path = str(taking(tmp_path, "below: ublk.Target = None"))
    below, = ublk.make_target([path, "null", "--size", "1M"]).given
    assert below.size == 1 << 20


@pytest.mark.parametrize("parameters", [
    "*, depth: int = 3", "depth=3", "*, copy=False", "*, debug=False", "*, help=''", "*, no_a=False, a=False",
    "*, partition_scan=True"])
def test_a_parameter_named_like_another_option_is_refused(run, tmp_path, parameters):
    assert_fails(run(taking(tmp_path, parameters)), 1, "cannot be the option --", errno.EINVAL)


@pytest.mark.parametrize("parameters", [
    "*rest: bool", "*rest: ublk.Target", "*rest: list[int]", "*rest: dict"])
def test_words_that_cannot_become_each_of_many_are_refused(run, tmp_path, parameters):
    assert_fails(run(taking(tmp_path, parameters), "null"), 1, "words cannot become", errno.EINVAL)


def test_a_constructor_that_takes_nothing_is_one_error_line(run, tmp_path):
    path = target_file(tmp_path, "class Mine(ublk.Target):\n    def __init__(): pass\n")
    assert_fails(run(path), 1, "invalid method signature", errno.EINVAL)


# ---- what is told, and where --------------------------------------------------------------------


def printing_to(out, *words):
    """Run the command with its standard output buffered, as that of a shell is; return what it did."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, UBLK, *words], stdout=out, stderr=subprocess.PIPE, text=True,
                          check=False, env=environment)


def test_help_does_without_docstrings():
    text = sh(sys.executable, "-OO", UBLK, "--help").stdout
    assert "null" in text and "--queues" in text


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["check"], ["null", "--help"]])
def test_what_cannot_be_printed_is_an_error(words):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = printing_to(full, *words)
    assert done.returncode == 1
    assert_error_line(done.stderr, errno.ENOSPC)


def test_what_prints_nothing_needs_no_room():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-u", UBLK, "no-target"], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False)
    assert done.returncode == 2 and "ENOSPC" not in done.stderr


def test_a_reader_that_has_enough_is_no_news():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        done = printing_to(out, "--version")
    assert (done.returncode, done.stderr) == (1, "")


def test_a_server_that_found_no_driver_has_left_nothing_to_clean_up(no_driver, capfd):
    ublk.clean_up(ublk.new_identity(False))
    assert capfd.readouterr().err == ""         # the server has told why, in its one line


def test_a_state_directory_that_is_named_from_nowhere_is_one_error_line(tmp_path):
    code = "import os, sys, ublk; os.rmdir(os.getcwd()); sys.exit(ublk.main(['check']))"
    environment = {**os.environ, "UBLK_RUN_DIR": "run", "PYTHONPATH": str(HERE)}
    done = sh(sys.executable, "-c", code, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert_error_line(done.stderr, errno.ENOENT)


def plain_file(path):
    path.touch()


def for_all(path):
    path.mkdir()
    path.chmod(0o777)


def behind_a_file(path):
    plain_file(path.parent.joinpath("file"))
    path.symlink_to("file")


@pytest.mark.parametrize("spoil", [plain_file, for_all, behind_a_file])
def test_check_takes_no_state_directory_that_a_server_would_refuse(run, run_dir, spoil):
    spoil(run_dir)
    found = [line for line in run("check").out.splitlines() if "state directory" in line]
    assert len(found) == 1 and found[0].startswith("missing  ") and "UBLK_RUN_DIR" in found[0]


def test_check_prints_one_line_for_each_thing_whatever_its_name(run, run_dir, monkeypatch):
    lines = len(run("check").out.splitlines())
    monkeypatch.setenv("UBLK_RUN_DIR", f"{run_dir}\n\udcff\x1b")
    done = run("check")
    assert len(done.out.splitlines()) == lines and r"\n\udcff\x1b" in done.out


def test_a_terminal_without_the_letters_gets_their_numbers(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "UBLK_RUN_DIR": str(tmp_path / "\xe9")}
    done = sh(sys.executable, UBLK, "check", env=environment, check=False)
    assert r"\xe9" in done.stdout and not done.stderr


def test_a_help_that_cannot_be_written_is_one_error_line(tmp_path):
    path = target_file(tmp_path, "class Mine(ublk.Target):\n    'Caf\\xe9.'\n")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = sh(sys.executable, UBLK, path, "--help", env=environment, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_check_wants_no_udev_rules_where_there_is_no_udev(run, monkeypatch):
    monkeypatch.setattr(ublk, "privileged", lambda: False)
    monkeypatch.setattr(ublk, "udev_rules", lambda: iter(()))
    for paths in ("/run/udev", "/dev/ublk-control"), ("/dev/ublk-control",):
        monkeypatch.setattr(os.path, "exists", paths.__contains__)
        assert ("missing  udev rules" in run("check").out) == ("/run/udev" in paths)


@pytest.mark.parametrize("words, works", [
    ("{python} -I {ublk}", True), ("'{python}' -I '{ublk}'", True), ("/no/python3 -I {ublk}", False),
    ("{python} -I /no/ublk.py", False), ("mine", False)])
def test_check_tells_of_rules_whose_program_has_gone(words, works):
    asks = f'PROGRAM="{words} udev-owner %k", OWNER="%c{{{{1}}}}"'.format(python=sys.executable, ublk=UBLK)
    assert ublk.asks_for_owner(f'KERNEL=="ublk[bc][0-9]*", {asks}') == works
    assert not ublk.asks_for_owner(f"# {asks}")


@pytest.fixture
def recover(run, run_dir, monkeypatch):
    """Recover a device that waits, whose state file has something else than it should."""
    def recovered(damage):
        monkeypatch.setattr(ublk, "Control", lambda: SimpleNamespace(close=bool))
        monkeypatch.setattr(ublk, "on_signals", bool)         # or the next test would have them
        monkeypatch.setattr(ublk.Device, "_await_end_of_server", lambda disk: setattr(disk, "identity", 7))
        monkeypatch.setattr(ublk.Device, "_open", bool)
        state = {"id": 0, "identity": f"{7:016x}", "target": "null", "args": [], "options": {}, "cwd": "/"}
        run_dir.mkdir()
        (run_dir / "0.json").write_text(json.dumps({**state, **damage}))
        return run("recover", "0")
    return recovered


@pytest.mark.parametrize("damage", [
    {"options": None}, {"options": [1]}, {"files": 5}, {"files": [5]}, {"files": [[]]}, {"files": [["/", 1]]},
    {"files": [["\0", 1, 1, 1]]}, {"files": None}])
def test_a_damaged_state_is_one_error_line(recover, damage):
    assert_fails(recover(damage), 1, "cannot recover device 0", errno.EINVAL)


@pytest.mark.parametrize("words", [["--help"], ["--sise", "1G"]])
def test_a_state_whose_words_make_no_target_is_no_success(recover, words):
    done = recover({"args": words})
    assert (done.status, done.out) == (1, "")
    assert_error_line(done.err.splitlines(True)[-1], errno.EINVAL, says="cannot recover device 0")
