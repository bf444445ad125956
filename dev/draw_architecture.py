#!/usr/bin/env python
"""Draw docs/layers.json, the table of who may import whom, as docs/images/architecture.svg."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from network_drawing import BOXES, MASKS, PYRAMID, SOFT, Drawing

from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TABLE, PICTURE = ROOT / "docs/layers.json", ROOT / "docs/images/architecture.svg"
WIDTH, MARGIN, GAP = 16.0, 0.5, 0.3
ROW, BLOCK = 1.2, 0.85  # heights


def draw(rows: list) -> Figure:
    """The table from top to bottom, with every package as a block.

    Args:
        rows: dicts that map names to a few words, the users of all others first.
    """
    drawing = Drawing(WIDTH, ROW * len(rows) + 0.9)
    top, bottom = ROW * len(rows) + 0.55, 0.55
    for number, row in enumerate(rows):
        y = top - ROW * number - ROW / 2
        drawing.panel(MARGIN, y - 0.52, WIDTH - 2 * MARGIN - 0.9, 1.04)
        width = (WIDTH - 2 * MARGIN - 0.9 - GAP) / len(row) - GAP
        for place, (name, words) in enumerate(row.items()):
            x = MARGIN + GAP + width / 2 + place * (width + GAP)
            color = PYRAMID if name.startswith("d2ext.") else BOXES
            color = MASKS if name == "projects" else color
            drawing.box(x, y, width, BLOCK, name, color, note=words)
    x, middle = WIDTH - MARGIN - 0.45, (top + bottom) / 2
    drawing.arrow([(x, top - 0.1), (x, bottom + 0.1)], SOFT, 2.5)
    drawing.text(x + 0.33, middle, "may import", size=11, color=SOFT, rotation=270)
    return drawing.figure


def write(table: Path, picture: Path) -> None:
    """Draw a table; the picture's metadata hold it too, so that a test sees which one it is."""
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
        metadata = {"Date": None, "Description": json.dumps(rows)}
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "d2ext"}):
            draw(rows).savefig(picture, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot draw {table} as {picture}: {error.strerror or error}") from error
    print(picture)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=PICTURE, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return run_guarded(lambda: write(args.table, args.output))


if __name__ == "__main__":
    sys.exit(main())
