"""Runs with a backbone of timm: its weights and what they need are in what a run leaves behind."""

from pathlib import Path

import pytest
import torch

from d2ext.engine import Predictor, build_experiment, train

from tests.engine.helpers import ROOT

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
