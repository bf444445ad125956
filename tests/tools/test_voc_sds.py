"""tools/voc_sds.py: checking, converting, making lists, and the miniature."""

import os
from pathlib import Path

import pytest
import scipy.io

from d2ext.data import get_dataset_records, register_all, register_coco_dataset
from d2ext.data.voc_sds import SPLITS
from d2ext.data.voc_sds.example import make_example
from d2ext.data.voc_sds.files import read_list

from detectron2.data import DatasetCatalog


@pytest.fixture
def tree(tmp_path):
    """A miniature: (data set folder, folder of the files)."""
    make_example(str(tmp_path / "data"), layout="mnc")
    return tmp_path / "data", tmp_path / "data" / "VOCdevkitSDS"


def test_checking_a_folder_names_what_is_missing_and_broken(tree, script, capsys, monkeypatch):
    root, folder = tree
    monkeypatch.setitem(SPLITS, "train", 6)
    monkeypatch.setitem(SPLITS, "val", 4)
    assert script.main(["check", "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "complete"
    (folder / "img" / "2008_000001.jpg").unlink()
    (folder / "inst" / "2008_000002.mat").unlink()
    os.truncate(folder / "img" / "2008_000008.jpg", 900)
    scipy.io.savemat(folder / "cls" / "2008_000009.mat", {"GTcls": {"Other": 1}})
    with open(folder / "val.txt", "a") as f:
        f.write("2008_000003\n")
    assert script.main(["check", "--root", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("1 of 6 images (img/ or JPEGImages/) are missing: 2008_000001" in x for x in lines)
    assert any("1 of 6 inst/*.mat are missing: 2008_000002" in x for x in lines)
    assert any("cannot read image" in x and "2008_000008.jpg" in x for x in lines)
    assert any("2008_000009.mat has no field GTcls.Segmentation" in x for x in lines)
    assert any("val: 5 images" in x and "not the 4 of the released list" in x for x in lines)
    assert "1 images are in both lists: 2008_000003" in lines
    assert lines[-1] == "not complete, see above"
    assert script.main(["check", "--root", str(root), "--fast"]) == 1
    assert "2008_000008" not in capsys.readouterr().out


def test_checking_nothing_is_an_error(script, tmp_path, capsys):
    assert script.main(["check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: VOC SDS is not in ")


def test_conversion_gives_a_file_that_can_be_registered(tree, script, tmp_path, capsys):
    root, output = str(tree[0]), str(tmp_path / "new" / "val.json")
    assert script.main(["convert", "val", "--root", root, "--output", output]) == 0
    assert "4 images" in capsys.readouterr().out
    register_coco_dataset("converted", output, root)
    register_all(root)
    assert DatasetCatalog.get("converted") == get_dataset_records("voc_sds_val")


def test_the_lists_are_those_of_voc_2012(tree, script, tmp_path, capsys, monkeypatch):
    root, folder = tree
    names = [Path(x).stem for x in sorted(os.listdir(folder / "inst"))]
    (tmp_path / "voc_val.txt").write_text("".join(f"{x}\n" for x in [*names[::2], "2007_000001"]))
    arguments = ["lists", "--root", str(root), "--voc-val", str(tmp_path / "voc_val.txt")]
    assert script.main(arguments) == 1
    assert "give {'train': 5, 'val': 5}, not {'train': 5623" in capsys.readouterr().err
    for split in ("train", "val"):
        monkeypatch.setitem(SPLITS, split, 5)
    assert script.main(arguments) == 0
    assert read_list(str(folder), "val") == names[::2]
    assert read_list(str(folder), "train") == names[1::2]
    assert (folder / "val.txt").read_text().split() == names[6:]  # as it was


def test_the_miniature_is_made_by_the_tool(script, tmp_path, capsys):
    assert script.main(["example", str(tmp_path), "--layout", "fcis"]) == 0
    assert f"DETECTRON2_DATASETS={tmp_path}" in capsys.readouterr().out
    register_all(str(tmp_path))
    assert len(get_dataset_records("voc_sds_val")) == 4
