"""Bar charts as plain text SVG, readable on light and dark pages."""
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

# title, group, workload, unit
PANELS = (
    ("No work at all: 4 KiB read, depth 128, 16 at a time", "null", "r4k128", "IOPS"),
    ("No work at all: 4 KiB read, depth 1", "null", "r4k1", "IOPS"),
    ("A disk in ten lines of Python: 4 KiB read, depth 128, 16 at a time", "python", "r4k128", "IOPS"),
    ("A disk in ten lines of Python: 4 KiB read, depth 1", "python", "r4k1", "IOPS"),
    ("A file as a disk: 4 KiB read, depth 128, 16 at a time", "file", "r4k128", "IOPS"),
    ("A file as a disk: 1 MiB sequential read", "file", "r1m8", "MiB/s"),
    ("Ways of the data: 4 KiB read, depth 128, 16 at a time", "paths", "r4k128", "IOPS"),
    ("Ways of the data: 1 MiB sequential read", "paths", "r1m8", "MiB/s"),
)
WIDTH, LABELS, NUMBERS, BAR, GAP = 460, 190, 80, 16, 6
MARGIN, HEAD, TITLE = 16, 56, 30

STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #1f2328 }
    .head { font-size: 18px; font-weight: 600 } .title { font-weight: 600 }
    .small, .number { fill: #59636e }
    .paper { fill: #ffffff } .bar { fill: #8c959f } .ours { fill: #0969da } .spread { stroke: #1f2328 }
    @media (prefers-color-scheme: dark) {
        text { fill: #f0f6fc } .small, .number { fill: #9198a1 }
        .paper { fill: #0d1117 } .bar { fill: #656c76 } .ours { fill: #4493f8 } .spread { stroke: #f0f6fc }
    }"""


def draw(summary: Sequence[dict[str, Any]], title: str, subtitle: str) -> str:
    """Draw the panels in two columns: a bar for each median, a thin line from lowest to highest."""
    panels = [(name, rows, unit) for name, group, workload, unit in PANELS
              if (rows := [row for row in summary if (row["group"], row["workload"]) == (group, workload)])]
    parts, top = [], HEAD + MARGIN
    for pair in (panels[at:at + 2] for at in range(0, len(panels), 2)):
        for column, panel in enumerate(pair):
            parts.append(draw_panel(MARGIN + column * (WIDTH + MARGIN), top, *panel))
        top += TITLE + max(len(rows) for _, rows, _ in pair) * (BAR + GAP) + MARGIN
    size = f"{2 * WIDTH + 3 * MARGIN} {top}"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}\n</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        text(MARGIN, 28, title, "head"), text(MARGIN, 48, subtitle, "small"), *parts, "</svg>\n"])


def draw_panel(left: float, top: float, title: str, rows: Sequence[dict[str, Any]], unit: str) -> str:
    scale = (WIDTH - LABELS - NUMBERS) / max(row["highest"] for row in rows)
    parts = [text(left, top + 14, title, "title")]
    for number, row in enumerate(rows):
        y = top + TITLE + number * (BAR + GAP)
        start, length = left + LABELS, max(row["value"] * scale, 1)
        kind = "ours" if row["case"].startswith("ublk.py") else "bar"
        ends = f'x1="{start + row["lowest"] * scale:.1f}" x2="{start + row["highest"] * scale:.1f}"'
        middle = f'y1="{y + BAR / 2:.1f}" y2="{y + BAR / 2:.1f}"'
        parts += [
            text(start - 8, y + 12, row["case"], "", ' text-anchor="end"'),
            f'<rect class="{kind}" x="{start}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
            f'<line class="spread" {ends} {middle}/>',
            text(start + max(row["highest"] * scale, length) + 6, y + 12, f"{row['value']:,.0f} {unit}",
                 "number")]
    return "\n".join(parts)


def text(x: float, y: float, words: str, kind: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(words)}</text>'
