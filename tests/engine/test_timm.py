"""Runs with a backbone of timm: its weights and what they need are in what a run leaves behind, and
a run that was interrupted is the same, drop path and rates of layers included."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from d2ext.config import get_cfg
from d2ext.engine import Predictor, build_experiment, train

from detectron2.engine import DefaultPredictor

from tests.engine.helpers import ROOT, losses

timm = pytest.importorskip("timm")
NAME = "vit_tiny_patch16_224"  # whose pixels are scaled to -1 ... 1


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_run_starts_from_weights_of_timm_and_keeps_what_they_need(shapes_few, tmp_path, kind):
    weights = tmp_path / "timm.pth"
    torch.manual_seed(0)
    theirs = timm.create_model(NAME)
    torch.save(theirs.state_dict(), weights)
    of_net = {
        "yaml": [
            f"MODEL.TIMM.NAME={NAME}",
            f"MODEL.TIMM.PRETRAINED={weights}",
            "MODEL.TIMM.OUT_NORM=",
            "INPUT.MIN_SIZE_TRAIN=(64,)",
            "DATASETS.TEST=()",
        ],
        "py": [
            "model.backbone._target_=d2ext.modeling.backbone.SimpleFeaturePyramid",
            f"model.backbone.bottom_up.name={NAME}",
            f"model.backbone.bottom_up.pretrained={weights}",
            "model.backbone.bottom_up.out_norm=''",
            "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
            "dataloader.test.dataset=[]",
        ],
    }
    experiment = build_experiment(
        str(ROOT / f"configs/mask_rcnn_tiny_convnext.{kind}"),
        [
            f"train.output_dir={tmp_path / 'run'}",
            "train.max_iter=1",
            "SOLVER.IMS_PER_BATCH=1",
            "SOLVER.BASE_LR=0",
            f"DATASETS.TRAIN={shapes_few}",
            "train.device=cpu",
            *of_net[kind],
        ],
    )
    train(experiment)
    weights.unlink()  # prediction needs it no longer
    predictor = Predictor(Path(tmp_path / "run/config.yaml"), tmp_path / "run/model_final.pth")
    model = predictor.model
    assert model.pixel_mean.flatten().tolist() == model.pixel_std.flatten().tolist() == [127.5] * 3
    loaded = model.backbone.bottom_up.net.state_dict()["model.blocks.3.mlp.fc1.weight"]
    assert torch.equal(loaded.cpu(), theirs.blocks[3].mlp.fc1.weight)
    if kind == "yaml":  # detectron2's own reads the saved config as well
        cfg = get_cfg()
        cfg.merge_from_file(str(tmp_path / "run/config.yaml"))
        cfg.MODEL.WEIGHTS = str(tmp_path / "run/model_final.pth")
        model = DefaultPredictor(cfg).model
        assert model.pixel_mean.flatten().tolist() == [127.5] * 3 and cfg.INPUT.FORMAT == "RGB"
        DefaultPredictor(cfg)(np.zeros((40, 60, 3), np.uint8))


def test_a_resumed_run_is_the_one_that_was_never_interrupted(shapes_few, tmp_path):
    def run(folder, **options):
        experiment = build_experiment(
            str(ROOT / "configs/mask_rcnn_tiny_convnext.yaml"),
            [
                f"OUTPUT_DIR={tmp_path / folder}",
                "SOLVER.MAX_ITER=4",
                "SOLVER.CHECKPOINT_PERIOD=2",
                "SOLVER.IMS_PER_BATCH=1",
                "SOLVER.LAYER_DECAY=0.9",
                "SOLVER.DECAY_MATRICES_ONLY=True",
                "LOG_PERIOD=1",
                "INPUT.MIN_SIZE_TRAIN=(64,)",
                f"DATASETS.TRAIN={shapes_few}",
                "DATASETS.TEST=()",
                "MODEL.DEVICE=cpu",
            ],
        )
        train(experiment, **options)
        return torch.load(tmp_path / folder / "model_final.pth", weights_only=True)["model"]

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/model_final.pth").unlink()
    (tmp_path / "parts/model_0000003.pth").unlink(missing_ok=True)
    (tmp_path / "parts/last_checkpoint").write_text("model_0000001.pth")
    torch.manual_seed(999)
    resumed = run("parts", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
