"""One call from data to a predictor, with data sets, augmentations and hooks of one's own."""

import json

import numpy as np
import pytest
import torch

from d2ext.config import find_config, get_config, load_config
from d2ext.engine import Predictor, fit
from d2ext.errors import UserError

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.engine import HookBase
from detectron2.structures import BoxMode

from tests.engine.helpers import losses
from tests.engine.test_resume import same_tensors, weights_of

SMALL = {
    "yaml": {"MODEL.DEVICE": "cpu", "SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": [64]},
    "py": {
        "train.device": "cpu",
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.mapper.augmentations.0.short_edge_length": [64],
    },
}


@pytest.fixture
def files(few_images):
    """Annotations and images of a small set."""
    return few_images / "few.json", few_images / "images"


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_files_become_a_predictor_and_results(files, tmp_path, kind):
    predictor, results = fit(
        f"mask_rcnn_tiny.{kind}",
        {"train": files, "test": files},
        tmp_path / "run",
        max_iter=2,
        **SMALL[kind],
    )
    assert isinstance(predictor, Predictor) and {"bbox", "segm"} == set(results)
    assert "AP50" in results["segm"]
    final = weights_of(tmp_path / "run/model_final.pth")
    assert same_tensors(predictor.model.state_dict(), final)
    names = [c["name"] for c in json.loads(files[0].read_text())["categories"]]
    assert predictor.class_names == names
    image = next(files[1].iterdir())
    assert "instances" in predictor(image)
    assert len(losses(tmp_path / "run")) >= 1


def test_the_best_weights_are_those_that_predict(files, tmp_path):
    predictor, _ = fit(
        "mask_rcnn_tiny",
        {"train": files, "test": files},
        tmp_path / "run",
        max_iter=3,
        **{**SMALL["yaml"], "TEST.EVAL_PERIOD": 1, "TEST.BEST_METRIC": "segm/AP"},
    )
    best = weights_of(tmp_path / "run/model_best.pth")
    assert same_tensors(predictor.model.state_dict(), best)


def test_epochs_are_turned_into_steps_of_the_batch(files, tmp_path):
    seen = []
    fit(
        "mask_rcnn_tiny",
        files,
        tmp_path / "run",
        epochs=1.5,
        hooks=[lambda trainer: seen.append(trainer.max_iter)],
        **SMALL["yaml"],
    )
    assert seen == [3, 3, 3]  # 1.5 times 4 images, 2 at a time
    with pytest.raises(UserError, match="epochs is 0; it has to be a number above 0"):
        fit("mask_rcnn_tiny", files, tmp_path / "none", epochs=0)
    with pytest.raises(UserError, match="give max_iter or epochs, not both"):
        fit("mask_rcnn_tiny", files, tmp_path / "none", epochs=1, max_iter=1)


def test_two_calls_in_one_process_have_a_log_each_and_a_loaded_config_stays(files, tmp_path):
    cfg = load_config(find_config("mask_rcnn_tiny.yaml"))
    before = cfg.dump()
    for name in ("one", "two"):
        fit(cfg, files, tmp_path / name, max_iter=1, **SMALL["yaml"])
    assert cfg.dump() == before
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("one", "two")]
    assert all(log.count("Starting training from iteration 0") == 1 for log in logs)
    with pytest.raises(UserError, match="already has a run"):
        fit(cfg, files, tmp_path / "one", max_iter=1, **SMALL["yaml"])
    first = weights_of(tmp_path / "one/model_final.pth")
    assert same_tensors(first, weights_of(tmp_path / "two/model_final.pth"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"val": "x"}, "data has 'val'; its parts are 'train' and, for an evaluation, 'test'"),
        (("only.json",), r"the data set 'train' is \('only.json',\); it has to be"),
        ("no_such_set", "data set 'no_such_set' is not registered"),
        (("no.json", "no"), "no.json"),
    ],
)
def test_other_data_is_one_line(tmp_path, data, text):
    with pytest.raises(UserError, match=text) as caught:
        fit("mask_rcnn_tiny", data, tmp_path / "run", **SMALL["yaml"])
    assert "\n" not in str(caught.value) and not (tmp_path / "run/model_final.pth").exists()


def test_an_unknown_config_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="does not exist, neither .*mask_rcnn_tiny"):
        fit("mask_rcn_tiny", "x", tmp_path)
    assert find_config("htc_tiny").endswith("projects/HTC/configs/htc_tiny.yaml")
    assert find_config("htc_tiny.py").endswith("htc_tiny.py")


class Invert(T.Augmentation):
    """Turns every image into its negative."""

    def get_transform(self, image):
        return T.BlendTransform(np.full_like(image, 255.0, dtype=np.float32), 1.0, -1.0)


def own_records(few_images):
    """Records with the documented fields only, one object each, a box and a polygon."""
    images = sorted((few_images / "images").iterdir())[:4]
    return [
        {
            "file_name": str(path),
            "image_id": number,
            "height": read_image(str(path)).shape[0],
            "width": read_image(str(path)).shape[1],
            "annotations": [
                {
                    "bbox": [10.0, 12.0, 50.0, 60.0],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": number % 2,
                    "segmentation": [[10.0, 12.0, 50.0, 12.0, 50.0, 60.0, 10.0, 60.0]],
                }
            ],
        }
        for number, path in enumerate(images)
    ]


def test_data_augmentation_and_hook_of_ones_own(few_images, tmp_path):
    DatasetCatalog.register("my_boxes", lambda: own_records(few_images))
    MetadataCatalog.get("my_boxes").set(thing_classes=["odd", "even"], evaluator_type="coco")
    cfg = get_config("mask_rcnn_tiny.py")
    cfg.dataloader.train.mapper.augmentations.append(L(Invert)())
    batches, steps = [], []

    class Steps(HookBase):
        def after_step(self):
            steps.append(self.trainer.iter)
            batches.extend(self.trainer.data_loader.batch)

    data = {"train": "my_boxes", "test": "my_boxes"}
    predictor, results = fit(
        cfg, data, tmp_path / "run", max_iter=2, hooks=[Steps()], **SMALL["py"]
    )
    assert steps == [0, 1] and len(batches) == 4
    assert predictor.class_names == ["odd", "even"] and "segm" in results
    assert predictor.experiment.num_classes() == 2
    plain = get_config("mask_rcnn_tiny.py")
    seen = []
    fit(
        plain,
        "my_boxes",
        tmp_path / "plain",
        max_iter=2,
        hooks=[lambda trainer: seen.extend(trainer.data_loader.batch)],
        **SMALL["py"],
    )
    # The same images in the same order, each the negative of the other.
    for inverted, image in zip(batches, seen, strict=True):
        assert inverted["image_id"] == image["image_id"]
        total = inverted["image"].float() + image["image"].float()
        torch.testing.assert_close(total, torch.full_like(total, 255.0), rtol=0, atol=1.0)
        assert len(image["instances"].gt_masks) == 1
