"""tools/draw_network.py: the figures of the networks can be made again."""

import importlib.util
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def tool(request):
    path = request.config.rootpath / "tools/draw_network.py"
    spec = importlib.util.spec_from_file_location("draw_network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figure_names_every_head_and_branch(tool):
    figure = tool.draw_htc()
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    heads = {f"${kind}_{stage}$" for kind in "BM" for stage in (1, 2, 3)}
    assert heads | {"RPN", "semantic\nbranch", "classes", "boxes", "masks"} <= words


@pytest.mark.parametrize(
    "name, parts",
    [
        ("fcis", {"RPN", "score maps", "box maps", "assembly", "class", "mask", "refined box"}),
        (
            "mnc",
            {"RPN", "RoI warp", "masks", "categories", "bridge", "stage 4", "stage 5", "voting"},
        ),
    ],
)
def test_figure_names_the_parts_of_the_paper(tool, name, parts):
    figure = tool.FIGURES[name]()
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert parts <= words


@pytest.mark.parametrize("name", ["mnc", "fcis", "htc"])
def test_nothing_is_cut_off_at_the_border(tool, tmp_path, name):
    assert tool.main(["--output-dir", str(tmp_path)]) == 0
    picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all() and (picture < 128).any()


def test_files_are_well_formed_and_the_same_each_time(tool, tmp_path):
    for folder in ("a", "b"):
        assert tool.main(["--output-dir", str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / folder / "htc.svg").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")


def test_folder_that_cannot_be_made_is_one_line(tool, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert tool.main(["--output-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write to")
