"""Predictions of exported files are those of the checkpoint; files that are none are refused."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from d2ext.engine import Predictor
from d2ext.engine.exporting import export_model, resizing
from d2ext.engine.onnx_predictor import OnnxPredictor, choose_engine
from d2ext.errors import UserError
from d2ext.export.programs import import_optional
from d2ext.export.settings import FileSettings

from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge

from tests.export.helpers import NAMES, save
from tests.soak.conftest import FULL


@pytest.fixture(scope="module")
def weights(tmp_path_factory, request):
    """A checkpoint of HTC with class names and config, with three results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return save("htc", tmp_path_factory.mktemp("run"), "INPUT.FORMAT=RGB")


@pytest.fixture(scope="module")
def predictor(weights):
    return Predictor.from_weights(weights, device="cpu")


@pytest.fixture(scope="module")
def exported(predictor, weights, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("exported") / "new/model.onnx")
    export_model(predictor, weights, path, all_stages=True)
    return path


@pytest.fixture(scope="module")
def photo(few_images):
    return str(sorted((few_images / "images").iterdir())[0])


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 2 and found.image_size == wanted.image_size
    assert found.pred_classes.tolist() == wanted.pred_classes.tolist()
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)
    boxes, others = found.pred_boxes.tensor, wanted.pred_boxes.tensor
    torch.testing.assert_close(boxes, others, atol=1e-3, rtol=0)
    union = (found.pred_masks | wanted.pred_masks).sum()
    assert (found.pred_masks & wanted.pred_masks).sum() >= 0.999 * union


def test_the_call_of_the_predictor_gives_its_instances(predictor, exported, photo):
    own = OnnxPredictor(exported)
    assert own.class_names == predictor.class_names == NAMES
    assert_same(own(photo)["instances"], predictor(photo)["instances"])
    image = read_image(photo, "BGR")[:, :90]
    first, second = own([image, photo])
    assert_same(first["instances"], predictor(image)["instances"])
    assert second["instances"].image_size == predictor(photo)["instances"].image_size
    assert own.draw(image, first["instances"]).ndim == 3


def test_results_after_each_stage_are_in_the_file(predictor, exported, photo):
    own = OnnxPredictor(exported)
    inputs = predictor.prepare(read_image(photo, "BGR"))
    found = own.model.inference_stages([inputs, inputs])
    wanted = predictor.model.inference_stages([inputs, inputs])
    assert len(found) == len(wanted) == 3
    for stage, other in zip(found, wanted):
        for image, its in zip(stage, other):
            assert_same(image["instances"], its["instances"])


def test_the_file_says_how_to_use_it(predictor, exported, weights):
    settings = OnnxPredictor(exported).model.settings
    assert settings.network == "HybridTaskCascade" and settings.class_names == NAMES
    assert (settings.channel_order, settings.short_edge, settings.max_size) == ("RGB", 128, 320)
    assert settings.checkpoint == "model_final.pth" and len(settings.sha256) == 64
    assert settings.parameters == sum(p.numel() for p in predictor.model.parameters())


def test_the_example_needs_neither_torch_nor_detectron2(exported, photo, tmp_path, request):
    example = request.config.rootpath / "examples/predict_onnx.py"
    assert len(example.read_text().splitlines()) <= 40
    code = "import sys, runpy\n"
    code += "for name in ('torch', 'detectron2', 'd2ext', 'cv2'): sys.modules[name] = None\n"
    code += f"sys.argv[1:] = {[exported, photo, str(tmp_path / 'picture.png')]!r}\n"
    code += f"runpy.run_path({str(example)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = OnnxPredictor(exported)(photo)["instances"]
    lines = done.stdout.splitlines()
    assert len(lines) == (wanted.scores >= 0.5).sum() > 0
    for line, score, label in zip(lines, wanted.scores.tolist(), wanted.pred_classes.tolist()):
        name, number = line.split(":")[0].split()
        assert name == NAMES[label] and float(number) == pytest.approx(score, abs=0.02)
    changed = np.asarray(Image.open(tmp_path / "picture.png")) != read_image(photo, "RGB")
    inside = wanted.pred_masks[wanted.scores >= 0.5].any(0).numpy()
    # The masks of random weights are noise, which Pillow averages where it makes them smaller.
    assert changed.any(2)[inside].mean() > 0.8


@pytest.mark.skipif(not FULL, reason="a minute and more; part of make soak")
def test_a_program_of_torch_export_is_loaded_without_d2ext(predictor, weights, tmp_path, photo):
    path = str(tmp_path / "model.pt2")
    export_model(predictor, weights, path)
    inputs = predictor.prepare(read_image(photo, "BGR"))
    output = torch.tensor([inputs["height"], inputs["width"]])
    height, width = inputs["image"].shape[1:]
    padded = torch.nn.functional.pad(inputs["image"], (0, -width % 32, 0, -height % 32))
    torch.save((padded, torch.tensor([height, width]), output), tmp_path / "inputs.pt")
    code = f"""
import torch, torchvision
extra = {{"d2ext.json": ""}}
program = torch.export.load({path!r}, extra_files=extra)
assert "thing3" in extra["d2ext.json"]
result = program.module()(*torch.load({str(tmp_path / "inputs.pt")!r}))
torch.save(result[:3], {str(tmp_path / "result.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    boxes, scores, classes = torch.load(tmp_path / "result.pt")
    wanted = predictor(photo)["instances"]
    assert classes.tolist() == wanted.pred_classes.tolist()
    torch.testing.assert_close(scores, wanted.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, wanted.pred_boxes.tensor, atol=1e-3, rtol=0)


def test_what_is_no_exported_file_is_one_line(tmp_path, weights):
    with pytest.raises(UserError, match="does not exist; d2ext export"):
        OnnxPredictor(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match="text.onnx cannot be read by onnxruntime: "):
        OnnxPredictor(tmp_path / "text.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", [value], [out])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "o.onnx")
    with pytest.raises(UserError, match="holds no settings of d2ext .*export it with d2ext export"):
        OnnxPredictor(tmp_path / "o.onnx")


def test_engine_and_file_have_to_go_together(exported, weights):
    assert choose_engine(weights) is None and choose_engine(None) is None
    assert choose_engine(weights, "torch") is None
    assert isinstance(choose_engine(exported), OnnxPredictor)
    assert isinstance(choose_engine(exported, "onnxruntime"), OnnxPredictor)
    with pytest.raises(UserError, match="--engine onnxruntime needs a file of ONNX, not"):
        choose_engine(weights, "onnxruntime")
    with pytest.raises(UserError, match="--engine torch cannot use"):
        choose_engine(exported, "torch")
    with pytest.raises(UserError, match="INPUT.FORMAT=BGR has no effect"):
        choose_engine(exported, unused=["INPUT.FORMAT=BGR"])


def test_a_missing_package_is_named_with_its_mend():
    with pytest.raises(UserError, match="the package no_such_runtime: pip install onnx"):
        import_optional("no_such_runtime")


def test_only_one_size_of_test_images_can_be_told():
    assert resizing([ResizeShortestEdge([128, 128], 320)]) == (128, 320)
    for others in ([], [RandomFlip()], [ResizeShortestEdge([64, 128], 320)]):
        with pytest.raises(UserError, match="cannot be exported"):
            resizing(others)


def test_settings_survive_the_way_through_text():
    settings = FileSettings(
        "FCIS", ["a", "ä"], "BGR", 600, 1000, [1.0] * 3, [2.0] * 3, "fcis", 0.4, 2, 7, "m.pth",
        "00", "0.1", "2.12",
    )  # fmt: skip
    assert FileSettings.from_texts(settings.to_texts(), "x") == settings
