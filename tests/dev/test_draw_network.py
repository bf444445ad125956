"""dev/draw_network.py: the figures of the networks can be made again."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image


def test_figure_names_every_head_and_branch(script):
    figure = script.draw_htc()
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    heads = {f"${kind}_{stage}$" for kind in "BM" for stage in (1, 2, 3)}
    assert heads | {"RPN", "semantic\nbranch", "classes", "boxes", "masks"} <= words


@pytest.mark.parametrize(
    "name, parts",
    [
        ("cascade", {"RPN", "$B_1$", "$B_3$", "M", "Mask R-CNN ends here", "classes", "masks"}),
        ("fcis", {"RPN", "score maps", "box maps", "assembly", "class", "mask", "refined box"}),
        (
            "mnc",
            {"RPN", "RoI warp", "masks", "categories", "bridge", "stage 4", "stage 5", "voting"},
        ),
    ],
)
def test_figure_names_the_parts_of_the_paper(script, name, parts):
    figure = script.FIGURES[name]()
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert parts <= words


@pytest.mark.parametrize("name", ["cascade", "mnc", "fcis", "htc"])
def test_nothing_is_cut_off_at_the_border(script, tmp_path, name):
    assert script.main(["--output-dir", str(tmp_path)]) == 0
    picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all() and (picture < 128).any()


def test_files_are_well_formed_and_the_same_each_time(script, tmp_path):
    for folder in ("a", "b"):
        assert script.main(["--output-dir", str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / folder / "htc.svg").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")


def test_folder_that_cannot_be_made_is_one_line(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.main(["--output-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write to")
