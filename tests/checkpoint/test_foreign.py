"""Checkpoints of other programs given to the checkpointer directly."""

import logging

import pytest
import torch

from d2ext.checkpoint import Checkpointer, Importer, export_weights, list_importers, read_metadata
from d2ext.checkpoint import registry as registry_module
from d2ext.checkpoint.registry import register_importer
from d2ext.errors import UserError
from d2ext.projects.htc import add_htc_config
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model


def htc(order="RGB", classes=3, seed=0, ensemble="mean"):
    """A tiny HTC with basic blocks, which MMDetection names in the same way."""
    torch.manual_seed(seed)
    cfg = tiny_config(add_htc_config)
    cfg.MODEL.META_ARCHITECTURE = "HybridTaskCascade"
    cfg.MODEL.RESNETS.NORM = "EvalStatsBN"
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "HTCROIHeads", classes
    cfg.MODEL.ROI_MASK_HEAD.NAME = "HTCMaskHead"
    cfg.MODEL.HTC.MASK_ENSEMBLE = ensemble
    cfg.MODEL.HTC.SEMANTIC.CONV_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
    cfg.INPUT.FORMAT = order
    return build_model(cfg).eval()


def rules(model):
    return next(x for x in list_importers() if x.name == "mmdet-htc").rules(model)


@pytest.fixture
def mmdet_file(tmp_path):
    """A file of MMDetection, and the model its weights are of."""
    model = htc()
    state = export_weights(model.state_dict(), rules(model))
    path = tmp_path / "mmdet.pth"
    torch.save({"meta": {"CLASSES": ("a", "b", "c")}, "state_dict": state}, path)
    return str(path), model


def logits(model, image):
    images = model.preprocess_image([{"image": image}])
    return model.roi_heads.semantic_head(model.backbone(images.tensor))[0]


def message(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_and_settings_of_mmdetection_load_directly(mmdet_file, caplog):
    path, source = mmdet_file
    model = htc(seed=1)
    model.pixel_std.fill_(9.0)
    checkpointer = Checkpointer(model)
    checkpointer.load_complete(path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert model.roi_heads.mask_ensemble == "mean"
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert checkpointer.metadata["imported_from"] == "MMDetection HTC"
    assert read_metadata(path) == {"thing_classes": ["a", "b", "c"], "semantic_labels": 7}


def test_a_model_for_the_other_channel_order_computes_the_same(mmdet_file):
    path, _ = mmdet_file
    rgb, bgr = htc("RGB"), htc("BGR")
    for model in (rgb, bgr):
        Checkpointer(model).load_complete(path)
    image = torch.randint(256, (3, 64, 64)).float()
    with torch.no_grad():
        torch.testing.assert_close(
            logits(bgr, image.flip(0)), logits(rgb, image), rtol=1e-4, atol=1e-4
        )


def test_settings_travel_with_checkpoints_that_are_saved_later(mmdet_file, tmp_path):
    path, _ = mmdet_file
    bgr = htc("BGR")
    checkpointer = Checkpointer(bgr, str(tmp_path / "out"), metadata={"thing_classes": ["a"]})
    checkpointer.load(path)
    checkpointer.save("model")
    assert read_metadata(str(tmp_path / "out/model.pth"))["thing_classes"] == ["a"]
    image = torch.randint(256, (3, 64, 64)).float()
    for order in ("BGR", "RGB"):
        again = htc(order, seed=3)
        Checkpointer(again).load_complete(str(tmp_path / "out/model.pth"))
        with torch.no_grad():
            expected = logits(bgr, image)
            found = logits(again, image if order == "BGR" else image.flip(0))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_choices_of_the_config_win_over_those_of_the_weights(mmdet_file, tmp_path, caplog):
    path, _ = mmdet_file
    start = htc()
    checkpointer = Checkpointer(start, str(tmp_path / "out"))
    checkpointer.load(path)
    checkpointer.save("fine_tuned")
    for file in (path, str(tmp_path / "out/fine_tuned.pth")):
        caplog.clear()
        model = htc(ensemble="last")
        model.roi_heads.score_average = "probs"
        checkpointer = Checkpointer(model)
        checkpointer.load_complete(file)
        assert model.roi_heads.mask_ensemble == "last"
        assert model.roi_heads.score_average == "probs"
        assert f"mask_ensemble stays last, as configured; checkpoint '{file}' comes with mean" in (
            caplog.text
        )
        # What is saved later tells what the model does.
        assert checkpointer.metadata["settings"]["roi_heads.mask_ensemble"] == "last"


def test_training_may_start_from_other_classes_but_prediction_may_not(mmdet_file, caplog):
    path, source = mmdet_file
    model = htc(classes=5, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(path)
    name = "roi_heads.box_predictor.2.cls_score.weight"
    assert model.state_dict()[name].equal(before[name])
    assert f"{name} stays as it is: (4, 16) in the file, (6, 16) in the model" in caplog.text
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum("12 arrays have another shape in the file" in text for text in warned) == 1
    assert not any("stays as it is" in text for text in warned)
    same = "roi_heads.box_predictor.2.bbox_pred.weight"
    assert model.state_dict()[same].equal(source.state_dict()[same])
    text = message(Checkpointer(htc(classes=5)).load_complete, path)
    assert "12 tensors have another shape than the model's" in text


def test_backbones_load_for_training_and_are_not_enough_for_prediction(tmp_path):
    model = htc()
    state = export_weights(model.state_dict(), rules(model))
    prefix = "backbone."
    state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    torch.save({**state, "fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    other = htc(seed=1)
    Checkpointer(other).load(str(tmp_path / "resnet.pth"))
    for name, value in model.state_dict().items():
        if name.startswith("backbone.bottom_up."):
            assert other.state_dict()[name].equal(value), name
    text = message(Checkpointer(other).load_complete, str(tmp_path / "resnet.pth"))
    assert "of the model's parameters, e.g. 'backbone.fpn_lateral" in text


def test_incomplete_and_overfull_files_are_refused_and_leave_the_model_alone(mmdet_file, tmp_path):
    path, _ = mmdet_file
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    removed = "roi_head.mask_head.1.conv_res.conv.bias"
    for changes, text in (
        ({removed: None}, f"1 tensors of the model are not in it, e.g. '{removed}'"),
        ({"extra.weight": torch.zeros(1)}, "1 tensors in it have no place in the model"),
        ({"rpn_head.rpn_cls.bias": torch.zeros(9)}, "1 tensors have another shape"),
    ):
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        torch.save({"state_dict": changed}, tmp_path / "x.pth")
        model = htc(seed=1)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert text in message(Checkpointer(model).load, str(tmp_path / "x.pth"))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_unknown_files_are_refused(tmp_path):
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    text = message(Checkpointer(htc()).load, str(tmp_path / "x.pth"))
    assert "has no weight of this model: it has 'encoder.weight' ..." in text


def test_importers_of_installed_projects_are_found_by_their_module():
    """Nothing but the entry point and a module "importer" is needed."""
    names = {x.name: x.project for x in list_importers()}
    assert names["mmdet-htc"] == "htc" and names["mxnet-fcis"] == "fcis"
    assert names["caffe-mnc"] == "mnc" and names["torchvision-resnet"] == ""
    assert {x.project for x in list_importers("htc")} == {"", "htc"}


def test_a_registered_importer_of_ones_own_is_used(tmp_path, monkeypatch):
    list_importers()
    monkeypatch.setattr(registry_module, "_IMPORTERS", dict(registry_module._IMPORTERS))
    from d2ext.checkpoint import Rule

    register_importer(
        Importer("mine", "My program", lambda model: [Rule("{x:*}", "mine/{x}", lambda v: v * 2)])
    )
    model = torch.nn.Linear(2, 1)
    state = {f"mine/{k}": v.clone() for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    other = torch.nn.Linear(2, 1)
    Checkpointer(other).load_complete(str(tmp_path / "x.pth"))
    assert other.weight.equal(model.weight * 2) and other.bias.equal(model.bias * 2)
