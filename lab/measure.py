#!/usr/bin/env python3
"""How large and how dense the product's files are, chapter by chapter.

    measure.py [FILE...]

Tokens are Python's own, without comments, docstrings and ends of lines; a code line is one with a token.
Prose is what docstrings and comments take of all lines that are not blank.
"""
from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENCODING, tokenize.ENDMARKER}
# There are these from 3.12 on.
FSTRING_START = getattr(tokenize, "FSTRING_START", -1)
FSTRING_END = getattr(tokenize, "FSTRING_END", -1)
BANNER = re.compile(r"# =+\n# (.+)\n# =+\n")


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of all lines that are docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def tokens_by_line(source: str, without: set[int]) -> Counter[int]:
    """Return how many tokens stand in each line; a string is one, also where Python sees its parts (3.12)."""
    found: Counter[int] = Counter()
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if depth == 0 and token.type not in NOT_CODE and line not in without:
            found[line] += 1
        depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)
    return found


def report(path: Path) -> None:
    """Print the measures of a file, then those of its chapters."""
    source = path.read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    docs = docstring_lines(tree)
    tokens = tokens_by_line(source, docs)
    prose = docs | {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    average = sum(lengths) / max(len(lengths), 1)
    print(f"{path.name}: {len(lines)} lines, {len(functions)} functions, "
          f"{average:.1f} lines on average, the longest {max(lengths, default=0)}")
    print(f"{'tokens':>8} {'code lines':>11} {'a line':>7} {'prose':>6}")
    starts = [(source[:found.start()].count("\n") + 1, found[1]) for found in BANNER.finditer(source)]
    chapters = [(1, "all of it"), *starts] if starts else [(1, "all of it")]
    ends = [len(lines), *(start - 1 for start, _ in starts[1:]), len(lines)]
    for (start, title), end in zip(chapters, ends):
        here = range(start, end + 1)
        code = [tokens[number] for number in here if tokens[number]]
        told = len(prose.intersection(here))
        print(f"{sum(code):8,} {len(code):11,} {sum(code) / max(len(code), 1):7.1f} "
              f"{told / max(told + len(code), 1):6.0%}  {title}")


if __name__ == "__main__":
    for name in sys.argv[1:] or [str(PROJECT / "ublk.py"), str(PROJECT / "ublk_targets.py")]:
        report(Path(name))
