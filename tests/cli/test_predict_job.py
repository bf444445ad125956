"""`d2ext predict-job`: the same results as `d2ext predict`, by any number of processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed (make install brings it)")
MODEL = ["--config-file", "mask_rcnn_tiny", "MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu"]
MODEL += ["MODEL.RPN.POST_NMS_TOPK_TEST=5", "INPUT.MIN_SIZE_TEST=64"]


@pytest.fixture
def images(few_images, tmp_path):
    """A folder of eight images, of which one is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        for path in sorted((few_images / "images").iterdir())[:4]:
            shutil.copy(path, folder / f"{number}_{path.name}")
    broken = sorted(folder.iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


@pytest.fixture
def command(mask_rcnn_weights, images, tmp_path):
    """Function: words for an output folder."""

    def words(output, *more):
        own = ["--weights", mask_rcnn_weights, "--input", str(images), "--output"]
        return [*MODEL, *own, str(tmp_path / output), "--confidence-threshold", "0.05", *more]

    return words


def annotations(folder):
    data = json.loads((folder / "coco.json").read_text())
    return [{k: v for k, v in a.items() if k != "id"} for a in data["annotations"]]


def test_a_job_finds_what_predict_finds(script, command, tmp_path, capsys):
    from d2ext.cli.predict import main as predict

    assert script.main(command("job", "--shard-size", "3")) == 0
    out, err = capsys.readouterr()
    assert "8 images: 7 predicted, 1 failed, " in out and err.count("error: image") == 1
    assert "3 of 3 shards, 8 of 8 images" in out
    (failed,) = json.loads((tmp_path / "job/failed.json").read_text())
    assert "cannot be read" in failed["error"]
    assert predict(command("plain", "--write", "coco", "--quiet")) == 1
    assert annotations(tmp_path / "job") == annotations(tmp_path / "plain") != []


def test_a_finished_job_is_not_computed_again_and_polygons_are_written(
    script, command, tmp_path, capsys
):
    assert script.main(command("job", "--shard-size", "3")) == 0
    parts = sorted((tmp_path / "job/parts").iterdir())
    times = [p.stat().st_mtime_ns for p in parts]
    capsys.readouterr()
    assert script.main(command("job", "--polygons")) == 0
    assert "3 of 3 shards are there" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in parts] == times
    assert isinstance(annotations(tmp_path / "job")[0]["segmentation"], list)
    parts[0].unlink()
    assert script.main(command("job", "--retry-failed")) == 0
    assert parts[0].stat().st_mtime_ns != times[0]


def test_each_process_has_its_shards_and_the_last_one_merges(
    script, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "job/coco.json").exists()
        monkeypatch.setenv("RANK", rank)
        assert script.main(command("job", "--shard-size", "3")) == 0
        if rank == "1":
            assert [p.name for p in (tmp_path / "job/parts").iterdir()] == ["part-00001.parquet"]
            assert "process 1 is done; 2 of 3 shards are not" in capsys.readouterr().out
    assert "7 predicted" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "2")
    assert script.main(command("job")) == 1
    assert "RANK is 2 and WORLD_SIZE 2" in capsys.readouterr().err


def test_a_job_is_continued_with_its_own_settings_only(script, command, tmp_path, capsys):
    assert script.main(command("job")) == 0
    for more, words in (
        (["MODEL.ROI_HEADS.NMS_THRESH_TEST=0.3"], "other config or overrides"),
        (["--confidence-threshold", "0.3"], "other confidence threshold"),
        (["--shard-size", "2"], "other shard size (500 then, 2 now)"),
    ):
        capsys.readouterr()
        assert script.main(command("job", *more)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line


def test_a_job_without_any_good_image_is_an_error(script, command, images, capsys):
    for path in list(images.iterdir()):
        path.write_text("no image")
    assert script.main(command("job")) == 1
    assert "error: none of 8 images could be predicted" in capsys.readouterr().err


def test_torchrun_shares_a_job_among_processes(command, tmp_path, request):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = request.config.rootpath
    process = subprocess.run(
        [*torchrun, str(root / "tools/predict.py"), *command("job", "--shard-size", "2")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "8 images: 7 predicted, 1 failed" in process.stdout
    assert {"process 0", "process 1"} <= {x.partition(":")[0] for x in process.stdout.splitlines()}
    assert len(list((tmp_path / "job/parts").iterdir())) == 4


@pytest.mark.slow
def test_a_cluster_on_this_machine_finds_what_one_process_finds(script, command, tmp_path, capsys):
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    assert script.main(command("alone", "--shard-size", "3")) == 0
    try:
        assert script.main(command("job", "--shard-size", "3", "--engine", "ray")) == 0
    finally:
        ray.shutdown()
    assert "8 images: 7 predicted, 1 failed, " in capsys.readouterr().out
    for name in ("coco.json", "failed.json"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
