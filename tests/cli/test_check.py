"""`d2ext check`: what it prints of sound and broken data, and its exit status."""

import json
import shutil

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_prints_the_table_of_files_that_cannot_be_registered(
    few_images, script, tmp_path, capsys
):
    data = json.loads((few_images / "few.json").read_text())
    data["annotations"][0]["bbox"] = [1, 2, 3]
    data["annotations"][1]["image_id"] = 99
    (tmp_path / "broken.json").write_text(json.dumps(data))
    spec = f"mine={tmp_path / 'broken.json'},{few_images / 'images'}"
    assert script.main(["--register", spec]) == 1
    printed = capsys.readouterr().out
    assert "mine" in printed and "2 errors" in printed
    assert "has a bbox" in printed and "unknown image_id 99" in printed


@pytest.mark.parametrize("damage", ["cut off", "spoilt within"])
def test_it_finds_truncated_images_and_spoilt_ones_when_thorough(
    few_images, script, damage, tmp_path, capsys
):
    shutil.copytree(few_images / "images", tmp_path / "images")
    name = json.loads((few_images / "few.json").read_text())["images"][0]["file_name"]
    path = tmp_path / "images" / name
    content = path.read_bytes()
    path.write_bytes(
        content[:-60] if damage == "cut off" else content[:200] + b"\xff" * 60 + content[260:]
    )
    spec = f"mine={few_images / 'few.json'},{tmp_path / 'images'}"
    assert script.main(["--register", spec]) == int(damage == "cut off")
    assert (name in capsys.readouterr().out) == (damage == "cut off")
    assert script.main(["--register", spec, "--thorough"]) == 1
    printed = capsys.readouterr().out
    assert name in printed and "cannot be read" in printed


def test_it_checks_registered_sets(script, shapes_few, capsys):
    assert script.main(["--dataset", shapes_few, "--evaluated", "--rows", "0"]) == 0
    assert capsys.readouterr().out == f"{shapes_few}: no problem found\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to check"),
        (["--dataset", "shapes_vall"], "did you mean shapes_val"),
        (["--register", "mine"], "write NAME=annotations.json"),
        (["--register", "mine=no.json,images"], "annotation file no.json does not exist"),
        (["--dataset", "shapes_val", "--rows", "-1"], "--rows must not be negative"),
    ],
)
def test_mistakes_in_the_arguments_end_in_one_line(script, arguments, words, capsys):
    assert script.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
