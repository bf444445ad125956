"""The data check as a whole: what it reports, when it looks again, and how it stops a training."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from d2ext.data import check_before_training, check_dataset
from d2ext.data.check import cache as check_cache
from d2ext.data.check import coco_file, images
from d2ext.data.check.problems import Problem, Report
from d2ext.engine import main
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/d2ext/data_check"


@pytest.fixture
def opened(monkeypatch):
    """Paths of the images whose header was read."""
    paths = []
    read = images.read_header
    monkeypatch.setattr(
        images, "read_header", lambda p, *rest: (paths.append(p), read(p, *rest))[1]
    )
    return paths


def test_generated_data_have_no_problem(shapes_few):
    report = check_dataset(shapes_few, evaluated=True, thorough=True)
    assert report.problems == [] and report.summary() == "0 errors, 0 warnings"


def test_a_set_that_was_not_generated_yet_is_generated(tmp_path):
    from d2ext.data import register_shapes

    register_shapes("fresh", "val", str(tmp_path), 3)
    assert not check_dataset("fresh").of("error")
    assert len(os.listdir(tmp_path / "shapes/val/images")) == 3


def test_table_groups_equal_problems_with_errors_first():
    problems = [Problem("warning", "w", "is odd", "a.jpg", i) for i in range(7)]
    problems += [Problem("error", "e", "is bad", "b.jpg", "x"), Problem("error", "s", "no image")]
    report = Report("mine", "ann.json", problems)
    lines = report.table(rows_per_kind=5).splitlines()
    assert lines[0] == "mine (ann.json): 2 errors, 7 warnings"
    assert lines[3].split() == ["error", "b.jpg", "x", "is", "bad"]
    assert lines[4].split() == ["error", "no", "image"]
    assert lines[-1].strip() == "... and 2 more like these"
    assert len(report.table(rows_per_kind=0).splitlines()) == 3 + 9
    with pytest.raises(UserError) as info:
        report.raise_errors("mend it")
    assert str(info.value) == "ann.json: annotation x is bad (and 1 more); mend it"


@pytest.fixture
def other_process(monkeypatch):
    """Function that forgets what this process knows, and counts the files read from then on."""
    reads = []
    read = coco_file.read_coco_file
    monkeypatch.setattr(coco_file, "read_coco_file", lambda p: (reads.append(p), read(p))[1])

    def start():
        monkeypatch.setattr(coco_file, "_summaries", {})
        reads.clear()
        return reads

    return start


def test_result_is_recalled_until_a_file_changes(
    small_dataset, cache, opened, other_process, monkeypatch
):
    monkeypatch.setattr(check_cache, "SLOW", 0.0)
    small_dataset.use_maps = True
    small_dataset.first["bbox"] = [1, 1, 8, 0]
    small_dataset.write()
    first = small_dataset.check()
    assert len(opened) == 2 and len(first.problems) == 1 and len(os.listdir(cache)) == 2
    reads = other_process()
    assert small_dataset.check().problems == first.problems
    assert len(opened) == 2 and not reads
    (small_dataset.images / "b.png").write_bytes(b"")  # changes the folder
    assert small_dataset.check().problems == first.problems
    assert len(opened) == 4 and not reads  # the annotation file is still known
    small_dataset.first["bbox"] = [1, 1, 8, 6]
    small_dataset.write()
    reads = other_process()
    assert small_dataset.check().problems == [] and len(reads) == 1
    assert small_dataset.check(thorough=True).problems == [] and len(opened) == 8


def test_an_error_is_never_kept(small_dataset, cache, other_process, monkeypatch):
    monkeypatch.setattr(check_cache, "SLOW", 0.0)
    small_dataset.first["category_id"] = 5
    small_dataset.write()
    sound = (small_dataset.images / "a.png").read_bytes()
    (small_dataset.images / "a.png").write_bytes(bytes(len(sound)))
    reads = other_process()
    assert len(small_dataset.check().of("error")) == 2 and not cache.exists()
    assert len(small_dataset.check().of("error")) == 2 and len(reads) == 2
    # Mended in place, so that size and time of change are those of before.
    before = [os.stat(p) for p in (small_dataset.json_file, small_dataset.images / "a.png")]
    small_dataset.first["category_id"] = 7
    small_dataset.write()
    (small_dataset.images / "a.png").write_bytes(sound)
    for path, stat in zip((small_dataset.json_file, small_dataset.images / "a.png"), before):
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    assert small_dataset.check().problems == []


@pytest.mark.parametrize("folder", ["images", "maps"])
def test_a_file_broken_under_its_name_is_found_after_a_good_report(
    small_dataset, cache, folder, monkeypatch
):
    monkeypatch.setattr(check_cache, "SLOW", 0.0)
    small_dataset.use_maps = True
    small_dataset.write()
    assert small_dataset.check().problems == [] and len(os.listdir(cache)) == 2
    path = getattr(small_dataset, folder) / "a.png"
    parent = path.parent.stat().st_mtime_ns
    with open(path, "r+b") as f:  # the folder does not change
        f.write(b"no image")
    os.utime(path, ns=(0, 1))
    assert path.parent.stat().st_mtime_ns == parent
    (problem,) = small_dataset.check().of("error")
    assert "is no image file" in problem.text


def test_results_of_an_older_check_are_not_recalled(cache, monkeypatch):
    check_cache.store("key", 1)
    assert check_cache.load("key") == 1
    monkeypatch.setattr(check_cache, "VERSION", check_cache.VERSION + 1)
    assert check_cache.load("key") is None


def test_quick_checks_leave_no_files(small_dataset, cache):
    small_dataset.write()
    small_dataset.check()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(small_dataset, cache, monkeypatch):
    monkeypatch.setattr(check_cache, "SLOW", 0.0)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file, not a folder")
    small_dataset.write()
    assert small_dataset.check().problems == []


def test_old_results_are_deleted(cache, monkeypatch):
    monkeypatch.setattr(check_cache, "_FILES", 3)
    for i in range(6):
        check_cache.store(["key", i], i)
    assert len(os.listdir(cache)) == 3
    (next(cache.iterdir())).write_text("not JSON")
    assert [check_cache.load(["key", i]) for i in range(6)].count(None) >= 4


def register(dataset, name="small"):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        json_file=str(dataset.json_file),
        image_root=str(dataset.images),
        sem_seg_root=str(dataset.maps),
        sem_seg_hint="unpack them",
        evaluator_type="coco",
        thing_classes=["cat", "dog"],
    )
    return name


def test_errors_stop_in_one_line_and_the_table_is_kept(small_dataset, tmp_path, caplog):
    small_dataset.first["bbox"] = [1, 2, 3]
    small_dataset.second["category_id"] = 5
    small_dataset.write()
    register(small_dataset)
    with pytest.raises(UserError) as info, caplog.at_level(logging.INFO):
        check_before_training(["small"], output_dir=str(tmp_path))
    text = str(info.value)
    assert "annotation 1 has a bbox" in text and "(and 1 more)" in text and "\n" not in text
    assert "data_check.txt" in text and "--no-data-check" in text
    table = (tmp_path / "data_check.txt").read_text()
    assert "unknown category_id 5" in table and "unknown category_id 5" in caplog.text


def test_warnings_are_listed_and_training_goes_on(small_dataset, tmp_path, caplog):
    small_dataset.first["bbox"] = [1, 1, 8, 0]
    small_dataset.write()
    register(small_dataset)
    with caplog.at_level(logging.INFO):
        check_before_training(["small"], ["small"], output_dir=str(tmp_path))
    assert "Data check of small: 0 errors, 1 warning" in caplog.text
    assert "zero area" in (tmp_path / "data_check.txt").read_text()
    small_dataset.first["bbox"] = [1, 1, 8, 6]
    small_dataset.write()
    check_before_training(["small"], output_dir=str(tmp_path))
    assert not (tmp_path / "data_check.txt").exists()


def test_maps_are_looked_at_only_where_they_are_used(small_dataset):
    small_dataset.write()
    register(small_dataset)
    (small_dataset.maps / "a.png").unlink()
    check_before_training([], ["small"])
    check_before_training(["small"], semantic=False)
    with pytest.raises(UserError, match="has the semantic map .*a.png, which does not exist"):
        check_before_training(["small"])
    small_dataset.maps.rmdir()
    with pytest.raises(UserError, match="map folder .*semantic does not exist; unpack them"):
        check_before_training(["small"])


def test_images_that_share_a_map_are_refused(small_dataset):
    small_dataset.use_maps = True
    (small_dataset.images / "b").mkdir()
    shutil.copy(small_dataset.images / "a.png", small_dataset.images / "b/a.png")
    image = {"id": 5, "file_name": "b/a.png", "width": 12, "height": 10}
    small_dataset.data["images"].append(image)
    small_dataset.write()
    (problem,) = small_dataset.check().problems
    assert (problem.severity, problem.image) == ("error", "b/a.png")
    assert "semantic/a.png, which is also that of a.png; rename" in problem.text
    small_dataset.use_maps = False
    assert not small_dataset.check().problems


@pytest.mark.parametrize("shared", [True, False])
def test_test_images_that_are_trained_on_are_told(small_dataset, tmp_path, shared, caplog):
    shutil.copytree(small_dataset.images, tmp_path / "others")
    link = tmp_path / "link"
    link.symlink_to(small_dataset.images if shared else tmp_path / "others")
    small_dataset.write()
    register(small_dataset)
    small_dataset.images = link
    register(small_dataset, "held_out")
    check_before_training(["small"], ["held_out", "small"], semantic=False)
    text = "1 of 1 images are in the training set 'small' too (e.g. a.png)"
    assert (text in caplog.text) == shared
    assert "in the training set 'held_out'" not in caplog.text


def test_missing_data_are_named(small_dataset, tmp_path):
    small_dataset.write()
    name = register(small_dataset)
    for image in small_dataset.images.iterdir():
        image.unlink()
    small_dataset.images.rmdir()
    (problem,) = check_dataset(name).problems
    assert problem.text == f"image folder {small_dataset.images} does not exist"
    with pytest.raises(UserError, match="'coco_2017_val': .*instances_val2017.json does not exist"):
        check_dataset("coco_2017_val")
    with pytest.raises(UserError, match="unknown data set 'smal'; did you mean small"):
        check_dataset("smal")


def test_sets_without_a_coco_file_pass(small_dataset):
    DatasetCatalog.register("other", list)
    assert check_dataset("other").problems == []
    small_dataset.write("{}")
    with pytest.raises(UserError, match="has no list 'categories'"):
        check_dataset(register(small_dataset))
    DatasetCatalog.register("lvis_like", list)
    MetadataCatalog.get("lvis_like").set(
        json_file=str(small_dataset.json_file),
        image_root=str(small_dataset.images),
        evaluator_type="lvis",
    )
    assert check_dataset("lvis_like").problems == []


@pytest.mark.parametrize("command", ["train", "evaluate_checkpoint"])
@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_train_script_checks_the_data_unless_told_not_to(
    small_dataset, kind, command, tmp_path, monkeypatch, capsys
):
    from d2ext.engine import cli

    small_dataset.write()
    (small_dataset.images / "b.png").write_text("no image")
    small_dataset.data["images"].append({"id": 5, "file_name": "b.png", "width": 12, "height": 10})
    small_dataset.write()
    started = []
    monkeypatch.setattr(cli, command, lambda *args, **kwargs: started.append(1))
    argv = ["--config-file", str(ROOT / f"configs/mask_rcnn_tiny.{kind}")]
    argv += ["--register", f"small={small_dataset.json_file},{small_dataset.images}"]
    argv += ["DATASETS.TRAIN=small", "DATASETS.TEST=small", f"OUTPUT_DIR={tmp_path / 'out'}"]
    argv += ["MODEL.DEVICE=cpu"] + ["--eval-only"] * (command != "train")
    with pytest.raises(SystemExit) as info:
        main(argv=argv)
    assert info.value.code == 1 and not started
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "image b.png is no image file" in errors[0]
    with pytest.raises(SystemExit) as info:
        main(argv=[*argv, "--no-data-check"])
    assert info.value.code == 0 and started


def test_a_test_set_without_an_evaluator_is_refused_before_the_training(
    small_dataset, tmp_path, monkeypatch, capsys
):
    from detectron2.engine import TrainerBase

    small_dataset.write()
    started = []
    monkeypatch.setattr(TrainerBase, "train", lambda *args, **kwargs: started.append(1))
    DatasetCatalog.register("unmeasured", list)
    MetadataCatalog.get("unmeasured").set(thing_classes=["cat", "dog"], evaluator_type="lvis")
    argv = ["--config-file", str(ROOT / "configs/mask_rcnn_tiny.yaml")]
    argv += ["--register", f"small={small_dataset.json_file},{small_dataset.images}"]
    argv += ["DATASETS.TRAIN=small", f"OUTPUT_DIR={tmp_path / 'out'}", "MODEL.DEVICE=cpu"]
    argv += ["MODEL.WEIGHTS=", "MODEL.RESNETS.NORM=GN"]
    for test_set, status in (("unmeasured", 1), ("small", 0)):
        with pytest.raises(SystemExit) as info:
            main(argv=[*argv, f"DATASETS.TEST={test_set}"])
        assert info.value.code == status and bool(started) == (not status)
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "'unmeasured' has evaluator_type 'lvis'" in errors[0]
