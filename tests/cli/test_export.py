"""`d2ext export`: what it writes, what the other commands do with it, and its mistakes."""

import json

import pytest

from d2ext.cli.compare import main as compare
from d2ext.cli.predict import main as predict

FAST = ["MODEL.RESNETS.NORM=GN", "MODEL.RPN.POST_NMS_TOPK_TEST=5"]
CONFIG = ["--config-file", "configs/mask_rcnn_tiny.yaml"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def exported(script, mask_rcnn_weights, tmp_path, capsys):
    """A file of ONNX of an untrained Mask R-CNN, and what the command printed."""
    path = str(tmp_path / "model.onnx")
    command = [*CONFIG, "--weights", mask_rcnn_weights, "--output", path, "MODEL.DEVICE=cpu"]
    assert script.main([*command, *FAST]) == 0
    return path, capsys.readouterr().out


def test_exported_models_predict_and_are_compared(
    exported, mask_rcnn_weights, few_images, register_few, tmp_path, capsys
):
    path, text = exported
    assert "model.onnx: GeneralizedRCNN, 8 classes, " in text and "128 pixels" in text
    image = str(sorted((few_images / "images").iterdir())[0])
    common = ["--input", image, "--confidence-threshold", "0", "--output"]
    assert predict(["--weights", path, *common, str(tmp_path / "onnx")]) == 0
    weights = [*CONFIG, "--weights", mask_rcnn_weights, "--device", "cpu"]
    assert predict([*weights, *common, str(tmp_path / "torch"), *FAST]) == 0
    found, wanted = (
        json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("onnx", "torch")
    )
    assert len(found) == len(wanted) > 0
    sums = [sum(x["score"] for x in each) for each in (found, wanted)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    output = str(tmp_path / "compared")
    command = [path, f"{CONFIG[1]},{mask_rcnn_weights}", "--register", register_few]
    command += ["--output", output, "--override", "weights:MODEL.RESNETS.NORM=GN"]
    assert compare([*command, "--override", f"weights:{FAST[1]}"]) == 0, capsys.readouterr().err
    numbers = json.loads((tmp_path / "compared/metrics.json").read_text())
    assert list(numbers) == ["model", "weights"]
    assert numbers["model"]["parameters"] == numbers["weights"]["parameters"]
    assert numbers["model"]["bbox/AP"] == pytest.approx(numbers["weights"]["bbox/AP"], abs=0.5)
    assert "GeneralizedRCNN, onnxruntime" in (tmp_path / "compared/report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "m.onnx"], "nothing to export: give --weights, --config-file or both"),
        ([*CONFIG, "--weights", "WEIGHTS", "--output", "m.bin"], "ends neither in .onnx"),
        (
            [*CONFIG, "--weights", "WEIGHTS", "--output", "m.onnx", "--stages"],
            "GeneralizedRCNN has no results per stage; export it without --stages",
        ),
        (
            [*CONFIG, "--weights", "WEIGHTS", "--output", "m.onnx", "MODEL.MASK_ON=False"],
            "a network without masks cannot be exported; set MODEL.MASK_ON to True",
        ),
    ],
)
def test_mistakes_are_one_line(script, mask_rcnn_weights, arguments, message, tmp_path, capsys):
    words = [mask_rcnn_weights if x == "WEIGHTS" else x for x in arguments]
    words = [str(tmp_path / x) if x.startswith("m.") else x for x in words]
    words += ["MODEL.RESNETS.NORM=GN"] if "WEIGHTS" in arguments else []
    assert script.main(words) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]
    assert not list(tmp_path.glob("m.*"))


def test_options_without_effect_on_a_file_are_refused(exported, few_images, tmp_path, capsys):
    path, _ = exported
    command = ["--weights", path, "--input", str(few_images / "images"), "--output", str(tmp_path)]
    assert predict([*command, "TEST.DETECTIONS_PER_IMAGE=3"]) == 1
    assert "has its settings inside, TEST.DETECTIONS_PER_IMAGE=3 has no" in capsys.readouterr().err
    assert predict([*command, "--stages"]) == 1
    assert "has no results per stage" in capsys.readouterr().err
