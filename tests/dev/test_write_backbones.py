"""dev/write_backbones.py: the table of docs/backbones.md is what the networks are, and what papers
and repositories say of them."""

import re
from pathlib import Path

import pytest

pytest.importorskip("timm")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    text = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    table = text.partition("<!-- networks -->")[2].partition("<!-- /networks -->")[0]
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def counts(cell):
    """(counted, published or none) of a cell such as "47.8 (48)"."""
    found = [float(x) for x in re.findall(r"[\d.]+", cell)]
    return found[0], (found[1] if len(found) > 1 else None)


def test_every_config_over_timm_is_in_the_table(script, rows):
    stems = [Path(stem).name for stem in script.NETWORKS]
    assert list(rows) == stems
    shipped = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("projects/*/configs/*.yaml")]
    over_timm = {p.stem for p in shipped if "TIMM:" in p.read_text() and "tiny" not in p.stem}
    assert over_timm - {"Base-RCNN-FPN-timm", "Base-HTC-timm"} <= set(stems)


@pytest.mark.parametrize(
    "stem",
    [
        "configs/mask_rcnn_swin_T",
        "configs/mask_rcnn_vitdet_B",
        "projects/HTC/configs/htc_swin_B_FPN_3x_ms",
        "projects/MNC/configs/mnc_convnext_T",
    ],
)
def test_rows_are_what_is_counted(script, rows, stem):
    name = Path(stem).name
    line = script.row(stem, rows[name][2])
    assert [cell.strip() for cell in line.split("|")[2:-1]] == rows[name]


def test_parameters_and_operations_are_within_2_percent_of_the_published(script, rows):
    compared = 0
    for stem, published in script.NETWORKS.items():
        cells = rows[Path(stem).name]
        for cell, number in ((cells[0], published.parameters), (cells[1], published.gflop)):
            own, theirs = counts(cell)
            assert theirs == (number or None)
            if number:
                assert own == pytest.approx(number, rel=0.02), f"{stem}: {cell}"
                compared += 1
    assert compared >= 9


def test_published_ap_is_that_of_the_comments_in_the_configs(script, rows):
    compared = 0
    for stem in script.NETWORKS:
        text = (ROOT / f"{stem}.yaml").read_text(encoding="utf-8")
        lazy = (ROOT / f"{stem}.py").read_text(encoding="utf-8")
        for box, mask in re.findall(r"box AP (\d\d\.\d), mask AP (\d\d\.\d)", text):
            assert rows[Path(stem).name][3].startswith(f"{box}, {mask} (")
            assert f"box AP {box}, mask AP {mask}" in lazy
            compared += 1
    assert compared >= 6


def test_times_stay_and_the_rest_is_written_anew(script, monkeypatch):
    monkeypatch.setattr(script, "NETWORKS", {"configs/mask_rcnn_mobilenetv4": script.Published()})
    text = f"before\n{script.START}\n| `mask_rcnn_mobilenetv4` | 1 | 2 | 7.5 | |\n{script.END}\nend"
    written = script.page(text, script.known_times(text))
    assert written.startswith("before\n") and written.endswith("\nend")
    (line,) = [x for x in written.splitlines() if "mobilenetv4" in x]
    assert line.split(" | ")[3] == "7.5" and " | 1 | " not in line
