"""tools/make_shapes_dataset.py: the shapes set is written ahead of time, and verified."""

import os

import pytest

from d2ext.data import shapes


@pytest.fixture(autouse=True)
def few_images_per_split(monkeypatch):
    for name, split in list(shapes.SPLITS.items()):
        monkeypatch.setitem(shapes.SPLITS, name, shapes.Split(3, split.seed))


def test_shapes_are_written_and_verified(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert script.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [os.path.basename(line.split(":")[0]) for line in lines] == ["train", "val"]
    assert all(": 3 images, sha256 " in line for line in lines)
    assert script.main(["val", "--verify"]) == 0
    # same size, other content: only --verify notices
    annotations = tmp_path / "shapes/val/annotations.json"
    annotations.write_text(annotations.read_text().replace('"bar"', '"BAR"'))
    assert script.main(["val"]) == 0
    capsys.readouterr()
    assert script.main(["val", "--verify"]) == 1
    assert "val were changed; delete the folder" in capsys.readouterr().err


def test_unknown_split_ends_in_one_line(script, tmp_path, capsys):
    assert script.main(["test", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: unknown shapes split 'test'")
