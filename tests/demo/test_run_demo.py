"""`make demo` from end to end: two networks, one config of each kind, on a handful of images."""

import json

import pytest

from d2ext.errors import UserError


def options(register):
    """Two data sets of a few images, and backbones that train without weights."""
    texts = ["DATASETS.TRAIN=demo_few", "DATASETS.TEST=demo_few"]
    texts += [f"mask_rcnn_tiny:DATASETS.REGISTER=['{register}']"]
    texts += ["mask_rcnn_tiny:MODEL.RESNETS.NORM=GN", "mask_rcnn_tiny:MODEL.WEIGHTS=none"]
    texts += [f"htc_tiny:dataloader.register=['{register}']"]
    texts += ["htc_tiny:model.backbone.norm=GN", "htc_tiny:train.init_checkpoint=none"]
    return [word for text in texts for word in ("--override", text)]


@pytest.mark.slow
def test_demo_trains_evaluates_predicts_and_reports(
    script, register_few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = script.main(
        ["--output", str(tmp_path), "--max-iter", "2", "--models", "mask_rcnn_tiny", "htc_tiny"]
        + options(register_few)
    )
    out = capsys.readouterr().out
    assert status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["mask_rcnn_tiny", "htc_tiny"]
    for name, values in metrics.items():
        assert {"segm/AP", "segm/AP50", "segm/AP75", "bbox/AP"} <= set(values)
        assert values["train_seconds"] > 0 and values["parameters"] > 1e6
        assert (tmp_path / name / "log.txt").is_file()
        assert (tmp_path / name / "model_final.pth").is_file()
        assert f"{name} " in out
    assert "stage3/segm/AP" in metrics["htc_tiny"]
    assert "stage1/segm/AP" not in metrics["mask_rcnn_tiny"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 4
    for words in ("Two networks, trained", "Hybrid Task Cascade, stage by stage"):
        assert words in page
    assert (tmp_path / "predictions.jpg").is_file()
    assert "total time" in out and "report.html" in out


@pytest.mark.slow
def test_failed_training_ends_the_demo_with_one_line_that_names_the_log(
    script, register_few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "report.html").write_text("of an earlier demo")
    # Frozen batch norm on random weights is refused by the training, not before.
    status = script.main(
        ["--output", str(tmp_path), "--max-iter", "2", "--models", "htc_tiny"]
        + options(register_few)
        + ["--override", "htc_tiny:model.backbone.norm=FrozenBN"]
    )
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(errors) == 1
    assert "frozen batch norm" in errors[0] and str(tmp_path / "htc_tiny/log.txt") in errors[0]
    assert "frozen batch norm" in (tmp_path / "htc_tiny/log.txt").read_text()
    assert not (tmp_path / "report.html").exists()


def test_mistakes_are_found_before_anything_is_trained(script, tmp_path, capsys):
    command = ["--output", str(tmp_path), "--models", "htc_tiny", "--override"]
    assert script.main([*command, "model.no_such_key=1"]) == 1
    assert "no such key" in capsys.readouterr().err


def test_models_that_learn_from_different_data_are_not_compared(script, register_few):
    args = script.argument_parser().parse_args(
        ["--override", f"htc_tiny:dataloader.register=['{register_few}']"]
        + ["--override", "htc_tiny:DATASETS.TEST=demo_few"]
    )
    with pytest.raises(UserError, match="all the same"):
        script.data_sets(script.models.MODELS, args)


def test_command_in_the_report_can_be_typed_in_the_repository(script):
    model = script.models.MODELS[-1]
    command = script.typed(script.training_command(model, ["train.max_iter=5"]))
    assert command == (
        "python projects/HTC/train_net.py --config-file projects/HTC/configs/htc_tiny.py "
        "train.max_iter=5"
    )
