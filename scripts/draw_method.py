"""Draw the pictures of the concept pages: what a unit is (docs/units.svg) and the search loop (docs/loop.svg).

    python scripts/draw_method.py [--check]

With --check, write nothing and fail if a picture is out of date.
"""

from pathlib import Path

from reference import write_or_check

DOCS = Path(__file__).parents[1] / "docs"
INK, FAINT, PAPER = "#1f2933", "#c9d1d9", "#ffffff"
KEPT, REMOVED = "#4c78a8", "#f2d0c9"
CELL = 11
HEAD_ROWS = 2
"""Rows of a drawn matrix that represent one head."""


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x}" y="{y}" {style}>{words}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, line: str = PAPER, radius: int = 0) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{line}" rx="{radius}"/>'


def arrow(points: str) -> str:
    return f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    tip = f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/>'
    marker = (
        f'<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">{tip}'
    )
    return "\n".join(
        [
            f'{head} font-family="sans-serif" role="img">',
            f"<title>{title}</title>",
            f"<defs>{marker}{tip}</marker></defs>",
            rectangle(0, 0, width, height, PAPER, FAINT, 6),
            *parts,
            "</svg>\n",
        ]
    )


def matrix(x: float, y: float, name: str, rows: int, columns: int, gone_rows=(), gone_columns=()) -> list[str]:
    """A weight matrix as cells; those of the removed units are pale."""
    cells = [
        rectangle(
            x + CELL * column,
            y + CELL * row,
            CELL,
            CELL,
            REMOVED if row in gone_rows or column in gone_columns else KEPT,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return [*cells, text(x + CELL * columns / 2, y - 8, name, weight="bold")]


def units() -> str:
    """One removed KV head of two query heads, and two removed FFN channels."""
    group = set(range(2 * HEAD_ROWS, 4 * HEAD_ROWS))  # the second of two groups: both its query heads
    key = set(range(HEAD_ROWS, 2 * HEAD_ROWS))
    channels = {2, 7}
    parts = [text(30, 34, "Attention: a KV head", 15, "start", "bold")]
    parts += matrix(30, 74, "q", 8, 8, gone_rows=group)
    parts += matrix(158, 74, "k", 4, 8, gone_rows=key)
    parts += matrix(158, 146, "v", 4, 8, gone_rows=key)
    parts += matrix(286, 74, "o", 8, 8, gone_columns=group)
    parts += [text(30, 222, "a KV head and its query heads: rows of q, k, v, columns of o", 12, "start")]
    parts += [text(440, 34, "FFN: a channel", 15, "start", "bold")]
    parts += matrix(440, 74, "gate", 10, 8, gone_rows=channels)
    parts += matrix(568, 74, "up", 10, 8, gone_rows=channels)
    parts += matrix(696, 74, "down", 8, 10, gone_columns=channels)
    parts += [text(440, 222, "a row of gate and of up, a column of down", 12, "start")]
    parts += [rectangle(30, 240, 14, 14, KEPT), text(52, 252, "kept: copied into a smaller matrix", 12, "start")]
    parts += [rectangle(250, 240, 14, 14, REMOVED), text(272, 252, "removed: not written at all", 12, "start")]
    return picture(836, 272, "What a unit is: the rows and columns that go together", parts)


def box(x: int, y: int, title: str, *lines: str) -> list[str]:
    words = [text(x + 95, y + 26, title, 14, weight="bold")]
    words += [text(x + 95, y + 46 + 17 * place, line, 12) for place, line in enumerate(lines)]
    return [rectangle(x, y, 190, 82, "#eef3f8", KEPT, 6), *words]


def loop() -> str:
    """From scores to a smaller model; the four boxes in the middle are one step."""
    parts = box(30, 20, "Scores", "how much each unit", "seems to matter")
    parts += box(30, 190, "Policy", "how wide each block should be,", "and how sure it is")
    parts += box(270, 190, "Sample", "16 sets of widths, each", "within the budget")
    parts += box(510, 190, "Forward passes", "the same text through each", "shrunk, repaired model")
    parts += box(510, 20, "Losses", "nats per token: no gradient,", "no backward pass")
    parts += box(270, 20, "Update", "what an error of each block", "costs: a regression")
    parts += box(30, 330, "Repair", "chooses the units, refits", "the kept weights")
    parts += box(270, 330, "Decision", "which units are kept:", "small, replayable")
    parts += box(510, 330, "Export", "a smaller, ordinary model")
    parts += [arrow("125,102 125,190"), arrow("220,231 270,231"), arrow("460,231 510,231"), arrow("605,190 605,102")]
    parts += [arrow("510,61 460,61"), arrow("365,102 365,146 190,146 190,190")]
    parts += [arrow("125,272 125,330"), arrow("220,371 270,371"), arrow("460,371 510,371")]
    parts += [
        text(365, 166, "repeat until the forward passes are used up", 12),
        text(134, 306, "at the end", 12, "start"),
    ]
    return picture(730, 432, "The loop of the search", parts)


def main() -> None:
    """Write both pictures, or with --check only compare them."""
    write_or_check({DOCS / "units.svg": units(), DOCS / "loop.svg": loop()}, "scripts/draw_method.py")


if __name__ == "__main__":
    main()
