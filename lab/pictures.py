#!/usr/bin/env python3
"""Draw what `ublk.py ... --trace=FILE` wrote: commands, the life of some requests, how long all of them took.

    pictures.py FILE >PICTURE.svg

A request waits from the moment its news was taken to that in which its handler is called, is served until it
is answered, and waits again until its commit is handed in.
"""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from chart import BAR, GAP, HEAD, MARGIN, STYLE, TITLE, text

WIDTH, LABELS, NUMBERS = 920, 210, 90
SHOWN = 10              # requests, and commands, of which the life is drawn
PHASES = (("waits", "arrived", "handler"), ("served", "handler", "result"), ("commit", "result", "committed"))
COLOURS = """
    .waits { fill: #d4a72c } .served { fill: #0969da } .commit { fill: #8c959f }
    @media (prefers-color-scheme: dark) {
        .waits { fill: #d29922 } .served { fill: #4493f8 } .commit { fill: #656c76 }
    }
"""

# A label, bars (of which kind, from where to where), a number behind them
Row = tuple[str, list[tuple[str, float, float]], str]


def microseconds(ns: float) -> str:
    return f"{ns / 1e6:,.1f} ms" if ns >= 1e6 else f"{ns / 1e3:,.0f} us"


def begin_of_last(records: Sequence[dict[str, Any]]) -> int:
    """Return where the last server in a file begins: it asks for the features first."""
    first = ("sent", "GET_FEATURES")
    begins = [n for n, record in enumerate(records) if (record["stage"], record.get("command")) == first]
    return begins[-1] if begins else 0


def commands(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Return a row for each command that was answered."""
    rows: list[Row] = []
    sent: dict[str, int] = {}
    begun = records[0]["ns"]
    for record in records:
        name = record.get("command", "")
        if record["stage"] == "sent":
            sent[name] = record["ns"] - begun
        elif record["stage"] == "answer":
            end = record["ns"] - begun
            label = f"{name} {record.get('error', '')}".strip()
            rows.append((label, [("served", sent[name], end)], microseconds(end - sent[name])))
    return rows


def lives(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return when each request that was told to its end came to each stage, and its operation."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if "request" in record:
            life = found.setdefault(record["request"], {"tag": record["tag"]})
            life[record["stage"]] = record["ns"]            # the last time, where a chain broke
            if record["stage"] == "decoded":
                life.update(op=record["op"], sectors=record["sectors"])
    return [life for life in found.values() if all(stage in life for _, *ends in PHASES for stage in ends)]


def requests(some: Sequence[dict[str, Any]]) -> list[Row]:
    """Return a row for each of these requests."""
    begun = min(life["arrived"] for life in some)
    return [(f"tag {life['tag']}: {life['op']} {life['sectors'] / 2:g} KiB",
             [(name, life[start] - begun, life[end] - begun) for name, start, end in PHASES],
             microseconds(life["committed"] - life["arrived"])) for life in some]


def typical(all_lives: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return those neighbours that took the least time together, or one pause would make all invisible."""
    def span(at: int) -> int:
        some = all_lives[at:at + SHOWN]
        return max(life["committed"] for life in some) - min(life["arrived"] for life in some)

    best = min(range(max(len(all_lives) - SHOWN, 0) + 1), key=span)
    return all_lives[best:best + SHOWN]


def histogram(all_lives: Sequence[dict[str, Any]]) -> list[Row]:
    """Return a row for each doubling of the time from news to commit."""
    times = [life["committed"] - life["arrived"] for life in all_lives]
    steps = [(time // 1000).bit_length() for time in times]
    rows: list[Row] = []
    for step in range(min(steps), max(steps) + 1):
        count = steps.count(step)
        rows.append((f"below {microseconds(1000 << step)}", [("served", 0, count)], f"{count}"))
    return rows


def panel(top: float, title: str, rows: Sequence[Row]) -> list[str]:
    """Draw rows below each other."""
    scale = (WIDTH - LABELS - NUMBERS) / max(bars[-1][2] for _, bars, _ in rows)
    parts = [text(MARGIN, top + 14, title, "title")]
    for number, (label, bars, value) in enumerate(rows):
        y = top + TITLE + number * (BAR + GAP)
        left = MARGIN + LABELS
        parts.append(text(left - 8, y + 12, label, "", ' text-anchor="end"'))
        for kind, start, end in bars:
            width = max((end - start) * scale, 1 if end > start else 0)
            parts.append(f'<rect class="{kind}" x="{left + start * scale:.1f}" y="{y}" '
                         f'width="{width:.1f}" height="{BAR}"/>')
        parts.append(text(left + bars[-1][2] * scale + 6, y + 12, value, "number"))
    return parts


def draw(records: Sequence[dict[str, Any]]) -> str:
    """Return the picture of a trace as SVG."""
    all_lives = lives(records)
    dropped = sum(record["requests"] for record in records if record["stage"] == "dropped")
    panels: list[tuple[str, list[Row]]] = []
    if rows := commands(records):
        panels.append(("Control commands, from the first to the last", rows[:SHOWN]))
    if all_lives:
        middle = statistics.median(life["committed"] - life["arrived"] for life in all_lives)
        panels.append(("Some requests: they wait (yellow), are served (blue), wait for their commit (grey)",
                       requests(typical(all_lives))))
        panels.append((f"From the news of a request to its commit: half of {len(all_lives)} within "
                       f"{microseconds(middle)}", histogram(all_lives)))
    parts: list[str] = []
    top = HEAD + MARGIN
    for title, rows in panels:
        parts += panel(top, title, rows)
        top += TITLE + len(rows) * (BAR + GAP) + MARGIN
    others = f", and {dropped} of which nothing was told" if dropped else ""
    subtitle = f"{len(all_lives)} requests{others}"
    title = "What a disk has told of its life"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN} {top}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}{COLOURS}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        text(MARGIN, 28, title, "head"), text(MARGIN, 48, subtitle, "small"), *parts, "</svg>\n"])


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    lines = [line for line in Path(sys.argv[1]).read_text().splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    print(draw(records[begin_of_last(records):]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
