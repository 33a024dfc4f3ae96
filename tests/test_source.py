# SPDX-License-Identifier: MIT
"""The file itself: one file, the standard library only, every public name documented."""

from __future__ import annotations

import ast
import ctypes
import inspect
import operator
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ublk
from tests.support import HERE, SOURCE, UBLK, sh


def interpreters():
    """Return every Python from 3.9 on that is installed here, the one that runs this included."""
    found = {sys.version_info[:2]: sys.executable}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for path in sorted(root.glob("versions/3.*/bin/python3")):
        found.setdefault(tuple(map(int, path.parts[-3].split(".")[:2])), str(path))
    for minor in range(9, 30):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            found.setdefault((3, minor), path)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found) if minor >= 9}


def definitions(node=SOURCE, prefix=""):
    """Yield the name of every public class, function and method."""
    for item in node.body:
        if isinstance(item, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = prefix + item.name
            if not item.name.startswith("_"):
                yield name
                if isinstance(item, ast.ClassDef):
                    yield from definitions(item, name + ".")


def is_kernel_structure(name):
    return isinstance(getattr(ublk, name, None), type) and issubclass(getattr(ublk, name), ctypes.Structure)


def test_every_python_compiles_and_runs_it(tmp_path):
    module, companion = shutil.copy(UBLK, tmp_path), shutil.copy(HERE / "ublk_targets.py", tmp_path)
    for python in interpreters().values():
        sh(python, "-W", "error", "-m", "py_compile", module, companion)
        assert "usage: ublk.py" in sh(python, "-W", "error", "-I", module, "loop", "--help").stdout


def test_every_python_knows_which_targets_have_coroutines():
    code = "import ublk, ublk_targets; print(ublk.has_coroutines(ublk_targets.Fault(ublk.Null())))"
    for python in interpreters().values():
        assert sh(python, "-c", code, cwd=HERE).stdout == "True\n", python


def test_queues_without_a_global_lock_share_no_view():
    """Threads that slice one miscount who has it, and soon it is released under all of them."""
    import ublk_targets
    shared = [*vars(ublk).values(), *vars(ublk_targets).values(), *vars(ublk_targets.Ram(size=4096)).values()]
    assert not any(isinstance(each, memoryview) for each in shared)
    code = """if 1:
        import array, mmap, threading, ublk, ublk_targets
        from types import SimpleNamespace
        disk, served, memory = ublk_targets.Ram(size=1 << 20), [], mmap.mmap(-1, 4096)
        device = ublk.Device(disk, share_memory=True)
        device._see_that_it_is_ours, device.shared = bool, [{} for _ in range(4)]
        device.control = SimpleNamespace(reg_buf=lambda *_: 0, unreg_buf=lambda *_: 0)
        device.share(memory)
        def serve(index):
            buffer = memoryview(bytearray(4096))
            shared = ublk.SharedCopy(memoryview(array.array("Q", [0])), device.shared[index])
            for _ in range(20000):
                disk.read(0, buffer)
                disk.write(0, buffer)
                shared.give(0, buffer)
            served.append(True)
        threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        device.unshare(0)
        memory.close()
        print(len(served))"""
    free = filter(None, (shutil.which(f"python3.{minor}t") for minor in range(13, 30)))
    for python in sys.executable, *free:
        assert sh(python, "-c", code, cwd=HERE).stdout == "4\n", python


def test_both_files_need_the_standard_library_only():
    """What a function imports when it is called is seen, too, therefore by their syntax trees."""
    nodes = [*ast.walk(SOURCE), *ast.walk(ast.parse((HERE / "ublk_targets.py").read_text()))]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {"ublk", "ublk_targets", "pytest"}        # the last calls the companion, see test_plugin.py
    names = {name.partition(".")[0] for name in names} - own
    assert {"ctypes", "os"} <= names
    sh(sys.executable, "-I", "-S", "-c", f"import {', '.join(sorted(names))}")


def test_importing_it_starts_nothing():
    code = "import threading, os, ublk; print(threading.active_count(), len(os.listdir('/proc/self/fd')))"
    without = code.replace("ublk", "ctypes")        # whose library may keep a file open
    assert sh(sys.executable, "-c", code, cwd=HERE).stdout == sh(sys.executable, "-c", without).stdout


def test_every_public_name_has_a_docstring_or_inherits_one():
    names = [name for name in definitions() if not is_kernel_structure(name)]
    assert len(names) > 100
    assert [name for name in names if not inspect.getdoc(operator.attrgetter(name)(ublk))] == []
