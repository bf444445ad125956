"""tools/make_stuff_maps.py: its two commands, and what it refuses in one line."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def panoptic(tmp_path):
    """Arguments that convert a picture of one segment, a banner."""
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((2, 3, 3), (7, 0, 0), np.uint8)).save(tmp_path / "pictures/9.png")
    segments = [{"id": 7, "category_id": 92}]
    data = {
        "annotations": [{"image_id": 9, "file_name": "9.png", "segments_info": segments}],
        "categories": [{"id": 92, "name": "banner", "isthing": 0}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(data))
    return ["panoptic", *(str(tmp_path / x) for x in ("panoptic.json", "pictures", "maps"))]


def test_panoptic_pictures_become_maps(script, panoptic, tmp_path):
    assert script.main(panoptic) == 0
    assert (np.asarray(Image.open(tmp_path / "maps/9.png")) == np.ones((2, 3))).all()


def test_pixel_maps_become_maps(script, tmp_path):
    (tmp_path / "pixelmaps").mkdir()
    Image.fromarray(np.full((2, 3), 92, np.uint8)).save(tmp_path / "pixelmaps/9.png")
    assert script.main(["pixelmaps", str(tmp_path / "pixelmaps"), str(tmp_path / "maps")]) == 0
    assert (np.asarray(Image.open(tmp_path / "maps/9.png")) == np.full((2, 3), 91)).all()


def refused(script, arguments, capsys):
    assert script.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_missing_folders_and_damaged_files_are_refused(script, panoptic, tmp_path, capsys):
    (tmp_path / "pictures/9.png").write_text("no image")
    assert "cannot convert" in refused(script, panoptic, capsys)
    wrong = [*panoptic[:2], str(tmp_path / "no"), "out"]
    assert "no does not exist" in refused(script, wrong, capsys)
    (tmp_path / "empty").mkdir()
    wrong = ["pixelmaps", str(tmp_path / "empty"), str(tmp_path / "out")]
    assert "holds no pixel maps" in refused(script, wrong, capsys)
