"""Several pictures in one, with titles; how large pictures are, and what their files are called."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from d2ext.visualization.overlay import display_scale
from d2ext.visualization.text import font

_LARGEST = 1200  # pixels along the longer side of a panel

_PAPER = (255, 255, 255)
_INK = (32, 36, 42)


def panel_scale(height: int, width: int) -> float:
    """Small images are enlarged so that text can be read on them, large ones made smaller."""
    return min(display_scale(height, width), _LARGEST / max(height, width))


def picture_stems(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A name without an ending for the picture of each image: its stem, numbered where several have
    the same."""
    stems = PictureStems()
    return [stems.following(path) for path in paths]


class PictureStems:
    """The names of `picture_stems`, one after the other."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}  # name -> the last number that was tried for it

    def following(self, path: str | os.PathLike) -> str:
        """The name for the picture of the next image."""
        stem = name = os.path.splitext(os.path.basename(path))[0]
        number = self._taken.get(stem.lower(), 1)
        while name.lower() in self._taken:  # for file systems that ignore case
            number += 1
            name = f"{stem}_{number}"
        self._taken[stem.lower()] = number
        self._taken.setdefault(name.lower(), 1)
        return name


def side_by_side(
    panels: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
) -> np.ndarray:
    """Arrange pictures in rows on white paper, each under its title.

    Args:
        panels: uint8 RGB arrays, of different sizes if need be.
        titles: one line per panel, shortened where it is wider than the panel.
        columns: panels per row; default: all in one row.

    Returns:
        uint8 RGB array.
    """
    if not panels:
        raise ValueError("no panels to arrange")
    if titles is not None and len(titles) != len(panels):
        raise ValueError(f"{len(panels)} panels, but {len(titles)} titles")
    columns = min(columns or len(panels), len(panels))
    starts = range(0, len(panels), columns)
    heights = [max(p.shape[0] for p in panels[i : i + columns]) for i in starts]
    width = max(p.shape[1] for p in panels)
    letter = min(max(13, round(min(max(heights), width) / 22)), 60)
    gap = max(4, letter // 2)
    header = round(1.9 * letter) if titles else gap
    tops = [sum(heights[:row]) + (row + 1) * header for row in range(len(heights))]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, tops[-1] + heights[-1] + gap), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x = gap + column * (width + gap)
        y = tops[row]
        sheet.paste(Image.fromarray(panel), (x, y))
        if titles:
            line = _shorten(titles[index], letter, width)
            pen.text((x, y - 0.45 * letter), line, fill=_INK, font=font(letter), anchor="ls")
    return np.asarray(sheet)


def _shorten(title: str, letter: int, width: int) -> str:
    measure = font(letter).getlength
    if measure(title) <= width:
        return title
    while title and measure(title + "…") > width:
        title = title[:-1]
    return title + "…"
