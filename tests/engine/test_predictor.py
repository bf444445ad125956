"""Prediction on single images, for both kinds of config, beside detectron2's DefaultPredictor."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from d2ext.checkpoint import Checkpointer, export_weights, list_importers
from d2ext.config import find_config, load_config
from d2ext.engine import Predictor, build_experiment, train
from d2ext.engine.loop import evaluate_checkpoint
from d2ext.errors import UserError

from detectron2.engine import DefaultPredictor

from tests.engine.helpers import CONFIGS


@pytest.fixture(scope="module")
def photograph():
    """BGR image of unusual size."""
    image = np.random.default_rng(0).integers(0, 255, (90, 131, 3), dtype=np.uint8)
    return cv2.GaussianBlur(image, (9, 9), 3)


@pytest.fixture
def trained(short_run, tmp_path):
    """Function: (config name, kind) -> experiment after two iterations, its checkpoint."""

    def make(name, kind):
        experiment = short_run(name, kind, f"{name}_{kind}", "train.max_iter=2")
        train(experiment)
        return experiment, str(tmp_path / f"{name}_{kind}" / "model_final.pth")

    return make


def test_predictor_takes_paths_pil_images_and_lists(trained, photograph, tmp_path):
    _, weights = trained("mask_rcnn", "py")
    predictor = Predictor(f"{CONFIGS['mask_rcnn']}.py", weights, ["model.backbone.norm=GN"])
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), photograph)
    expected = predictor(photograph)["instances"]
    pil = Image.fromarray(photograph[:, :, ::-1])
    found = predictor([photograph, str(path), path, pil])
    assert len(found) == 4
    for output in found:
        assert_same_instances(output["instances"], expected)
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("broken.png", "gone.png"):
        with pytest.raises(UserError, match=f"image '.*{name}' cannot be read"):
            predictor(tmp_path / name)
    with pytest.raises(UserError, match="BGR image"):
        predictor(7)


def test_config_of_a_run_that_started_from_foreign_weights_is_enough_for_detectron2(
    short_run, photograph, tmp_path
):
    more = ["MODEL.RESNETS.NORM=BN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0", "SOLVER.MAX_ITER=2"]
    model = short_run("htc", "yaml", "source", *more).build_model()
    rules = next(x for x in list_importers() if x.name == "mmdet-htc").rules(model)
    path = str(tmp_path / "mmdet.pth")
    torch.save({"meta": {}, "state_dict": export_weights(model.state_dict(), rules)}, path)
    experiment = short_run("htc", "yaml", "run", *more, f"MODEL.WEIGHTS={path}")
    train(experiment)
    assert experiment.cfg.MODEL.PIXEL_STD == [57.375, 57.12, 58.395]  # BGR; 1 in the shipped config
    cfg = experiment.cfg.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "run" / "model_final.pth")
    theirs = DefaultPredictor(cfg)(photograph)["instances"]
    assert len(theirs) > 0
    assert_same_instances(theirs, Predictor(cfg, cfg.MODEL.WEIGHTS)(photograph)["instances"])


def assert_same_instances(a, b):
    """Equal boxes, scores, classes and masks."""
    assert len(a) == len(b)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(a.get(field), b.get(field))


@pytest.mark.parametrize("name", ["mask_rcnn", "htc"])
def test_predictor_equals_detectron2s_for_yaml_configs(trained, photograph, name):
    _, weights = trained(name, "yaml")
    overrides = [
        "MODEL.RESNETS.NORM=GN",
        "MODEL.DEVICE=cpu",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0",
    ]
    path = f"{CONFIGS[name]}.yaml"
    ours = Predictor(path, weights, overrides)(photograph)["instances"]
    theirs = DefaultPredictor(load_config(path, [*overrides, f"MODEL.WEIGHTS={weights}"]))(
        photograph
    )
    assert len(ours) > 0 and ours.image_size == (90, 131)
    assert_same_instances(ours, theirs["instances"])


def test_lazy_predictor_equals_the_yaml_one_on_the_same_weights(trained, photograph):
    _, weights = trained("htc", "py")
    lazy = Predictor(f"{CONFIGS['htc']}.py", weights, ["model.backbone.norm=GN"])(photograph)
    yaml = Predictor(f"{CONFIGS['htc']}.yaml", weights, ["MODEL.RESNETS.NORM=GN"])(photograph)
    assert_same_instances(lazy["instances"], yaml["instances"])


def test_saved_config_and_checkpoint_of_a_run_are_enough(trained, photograph, tmp_path):
    from detectron2.config import LazyConfig

    experiment, weights = trained("mask_rcnn", "py")
    LazyConfig.save(experiment.cfg, str(tmp_path / "config.yaml"))
    predictor = Predictor(str(tmp_path / "config.yaml"), weights)
    assert predictor.class_names[:2] == ["disk", "rectangle"]
    assert predictor.metadata.thing_classes == predictor.class_names
    assert predictor(photograph)["instances"].image_size == (90, 131)


def test_class_names_and_their_number_come_from_the_checkpoint(short_run, tmp_path):
    experiment = short_run("mask_rcnn", "yaml", "three")
    experiment.set_num_classes(3)
    weights = experiment.build_model().state_dict()
    names = ["cat", "dog", "owl"]
    path = str(tmp_path / "three.pth")
    torch.save({"model": weights, "metadata": {"thing_classes": names}}, path)
    overrides = ["MODEL.RESNETS.NORM=GN", "DATASETS.TRAIN=gone", "DATASETS.TEST=gone"]
    predictor = Predictor(f"{CONFIGS['mask_rcnn']}.yaml", path, overrides)
    assert predictor.class_names == names
    assert predictor.model.roi_heads.num_classes == 3


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_number_of_classes_that_the_user_sets_wins_over_names(short_run, tmp_path, kind):
    experiment = short_run("mask_rcnn", kind, "three")
    experiment.set_num_classes(3)
    weights = experiment.build_model().state_dict()
    key = "model.roi_heads.num_classes=3" if kind == "py" else "MODEL.ROI_HEADS.NUM_CLASSES=3"
    norm = "model.backbone.norm=GN" if kind == "py" else "MODEL.RESNETS.NORM=GN"
    # Names of the built-in shapes, which are eight, and names that a file inherited.
    for metadata in ({}, {"thing_classes": [str(i) for i in range(80)]}):
        path = str(tmp_path / "three.pth")
        torch.save({"model": weights, "metadata": metadata}, path)
        predictor = Predictor(f"{CONFIGS['mask_rcnn']}.{kind}", path, [norm, key])
        assert predictor.class_names == ["0", "1", "2"]
        assert predictor.model.roi_heads.num_classes == 3
    cfg = load_config(f"{CONFIGS['mask_rcnn']}.{kind}", [norm, key])
    torch.save({"model": weights}, path)
    assert Predictor(cfg, path).class_names == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_weights_with_other_semantic_labels_predict_without_maps(short_run, tmp_path, kind):
    """The labels that the maps of the data have, or their lack, matter to training only."""
    experiment = short_run("htc", kind, "stuff")
    experiment.set_num_classes(experiment.num_classes(), 183)
    checkpointer = Checkpointer(
        experiment.build_model(), str(tmp_path), metadata={"semantic_labels": 183}
    )
    checkpointer.save("stuff")
    path = str(tmp_path / "stuff.pth")
    other = short_run("htc", kind, "eval", f"train.init_checkpoint={path}")
    assert evaluate_checkpoint(other) == {}  # there are no test sets
    predictor = Predictor(short_run("htc", kind, "predict"), path)
    assert predictor.model.roi_heads.semantic_head.conv_logits.out_channels == 183


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("name", ["mask_rcnn", "htc"])
def test_a_checkpoint_alone_is_enough(trained, photograph, monkeypatch, tmp_path, name, kind):
    experiment, weights = trained(name, kind)
    expected = Predictor(experiment, weights)(photograph)["instances"]
    monkeypatch.chdir(tmp_path)
    threshold = {
        "yaml": "MODEL.RPN.POST_NMS_TOPK_TEST=1",
        "py": "model.proposal_generator.post_nms_topk=[10,1]",
    }[kind]
    predictor = Predictor.from_weights(weights)
    assert_same_instances(predictor(photograph)["instances"], expected)
    assert predictor.class_names[0] == "disk"
    few = Predictor.from_weights(weights, [threshold], device="cpu")(photograph)["instances"]
    assert len(few) < len(expected)


def test_a_checkpoint_without_a_config_asks_for_one(short_run, tmp_path):
    Checkpointer(short_run("mask_rcnn", "yaml", "x").build_model(), str(tmp_path)).save("bare")
    with pytest.raises(UserError, match="bare.pth' holds no config of a training; .*--config-file"):
        Predictor.from_weights(str(tmp_path / "bare.pth"))
    with pytest.raises(UserError, match="checkpoint 'gone.pth' does not exist"):
        Predictor.from_weights("gone.pth")


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_data_sets_of_a_config_need_not_be_there_to_predict(short_run, tmp_path, kind):
    checkpointer = Checkpointer(short_run("mask_rcnn", kind, "x").build_model(), str(tmp_path))
    checkpointer.metadata["thing_classes"] = [str(i) for i in range(8)]
    checkpointer.save("named")
    checkpointer.metadata.clear()
    checkpointer.save("nameless")
    experiment = short_run("mask_rcnn", kind, "x")
    gone = f"gone_{kind}={tmp_path}/gone.json,{tmp_path}/images"
    for name in ("named", "nameless"):
        experiment.unread = [gone]
        predictor = Predictor(experiment, str(tmp_path / f"{name}.pth"))
        assert len(predictor.class_names) == 8


def test_checkpoint_of_a_part_of_the_model_is_refused():
    with pytest.raises(UserError, match="lacks .* of the model's parameters, e.g. 'roi_heads|rpn"):
        Predictor(f"{CONFIGS['mask_rcnn']}.yaml")  # the shipped backbone alone


def test_missing_weights_and_wrong_images_are_named(trained, photograph):
    with pytest.raises(UserError, match="gone.pth"):
        Predictor(f"{CONFIGS['mask_rcnn']}.py", "gone.pth", ["model.backbone.norm=GN"])
    with pytest.raises(UserError, match="no weights"):
        Predictor(f"{CONFIGS['mask_rcnn']}.py", overrides=["train.init_checkpoint=''"])
    _, weights = trained("mask_rcnn", "py")
    predictor = Predictor(f"{CONFIGS['mask_rcnn']}.py", weights, ["model.backbone.norm=GN"])
    with pytest.raises(UserError, match="BGR image"):
        predictor(None)
    with pytest.raises(UserError, match="BGR image"):
        predictor(photograph[:, :, 0])
    with pytest.raises(UserError, match="takes 8 bits per channel .uint8., not uint16; scale"):
        predictor(photograph.astype(np.uint16) * 256)


NETWORKS = ["mask_rcnn", "cascade_mask_rcnn", "htc", "fcis", "mnc"]


@pytest.fixture
def untrained(tmp_path):
    """Function: name of a network -> its tiny predictor with random weights."""

    def make(name):
        overrides = ["MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu", "INPUT.MIN_SIZE_TEST=64"]
        overrides += ["MODEL.RPN.POST_NMS_TOPK_TEST=30", "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.05"]
        path = find_config(f"{name}_tiny.yaml")
        torch.manual_seed(0)
        experiment = build_experiment(path, overrides, with_data=False)
        experiment.set_num_classes(3)
        names = {"thing_classes": ["a", "b", "c"]}
        Checkpointer(experiment.build_model(), str(tmp_path), metadata=names).save(name)
        return Predictor(path, str(tmp_path / f"{name}.pth"), overrides)

    return make


@pytest.fixture(scope="module")
def photographs():
    """Images of four sizes; some are resized to one size, and more to sizes that are padded to
    one."""
    rng = np.random.default_rng(2)
    sizes = [(90, 131), (64, 64), (131, 90), (90, 131), (88, 131), (64, 64), (90, 129), (90, 131)]
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    return [cv2.GaussianBlur(image, (9, 9), 3) for image in images]


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_give_what_single_images_give(untrained, photographs, name):
    predictor = untrained(name)
    one_by_one = [predictor(image)["instances"] for image in photographs]
    sizes, forward = [], predictor.model.forward
    predictor.model.forward = lambda inputs: (sizes.append(len(inputs)), forward(inputs))[1]
    together = [x["instances"] for x in predictor.stream(photographs, batch_size=4)]
    assert len(together) == len(photographs) and max(sizes) > 1
    assert sum(map(len, one_by_one)) > 0
    for a, b in zip(one_by_one, together):
        assert len(a) == len(b) and a.image_size == b.image_size
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        boxes = a.pred_boxes.tensor, b.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-5 * max(a.image_size))
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-4


def test_a_stream_takes_all_forms_of_images_one_after_the_other(untrained, photographs, tmp_path):
    predictor = untrained("mask_rcnn")
    image, path = photographs[0], tmp_path / "a.png"
    cv2.imwrite(str(path), image)
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    forms = [image, str(path), path, path.read_bytes(), Image.fromarray(rgb)]
    forms.append(torch.from_numpy(rgb).permute(2, 0, 1))
    expected = predictor(image)["instances"]
    taken = []

    def generator():
        for form in forms:
            taken.append(form)
            yield form

    for workers in (0, 2):
        stream = predictor.stream(generator(), batch_size=1, workers=workers)
        outputs = [next(stream)]
        assert len(taken) < len(forms)  # what follows is not read ahead without bounds
        outputs += stream
        assert len(outputs) == len(forms)
        for output in outputs:
            assert_same_instances(output["instances"], expected)
        taken.clear()
    assert_same_instances(predictor(forms[-1])["instances"], expected)


def test_a_stream_ends_at_an_image_that_cannot_be_read(untrained, photographs):
    stream = untrained("mask_rcnn").stream([photographs[0], "gone.png", photographs[0]])
    assert len(next(stream)["instances"]) >= 0
    with pytest.raises(UserError, match="image 'gone.png' cannot be read"):
        next(stream)
