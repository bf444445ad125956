"""Mixed precision: bfloat16 on a CPU, and what float16 needs."""

import pytest
import torch

from d2ext.config import load_projects
from d2ext.engine import build_experiment, train
from d2ext.engine.trainer import CheckedTrainer
from d2ext.errors import UserError

from tests.engine.helpers import ROOT
from tests.engine.test_resume import PowerFailure, failing_after, same_tensors, weights_of

KEYS = {
    "yaml": ["SOLVER.AMP.ENABLED=true", "SOLVER.AMP.DTYPE=bfloat16"],
    "py": ["train.amp.enabled=true", "train.amp.dtype=bfloat16"],
}
CONFIGS = {
    "mask_rcnn": "configs/mask_rcnn_tiny.yaml",
    "cascade": "configs/cascade_mask_rcnn_tiny.yaml",
    "htc": "projects/HTC/configs/htc_tiny.yaml",
    "fcis": "projects/FCIS/configs/fcis_tiny.yaml",
    "mnc": "projects/MNC/configs/mnc_tiny.yaml",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tiny_network_trains_in_bfloat16_on_a_cpu(shapes_few, tmp_path, name):
    load_projects()
    options = ["MODEL.DEVICE=cpu", "SOLVER.IMS_PER_BATCH=2", f"DATASETS.TRAIN={shapes_few}"]
    options += ["DATASETS.TEST=()", f"OUTPUT_DIR={tmp_path}", "SOLVER.MAX_ITER=2"]
    experiment = build_experiment(str(ROOT / CONFIGS[name]), [*options, *KEYS["yaml"]])
    dtypes = set()

    def note(trainer):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        assert gradients and all(x.isfinite().all() for x in gradients)
        dtypes.update(p.dtype for p in trainer.model.parameters())

    train(experiment, hooks=[note])  # a NaN in a loss would end it
    assert dtypes == {torch.float32}  # the weights stay precise
    assert "grad_scaler" not in torch.load(tmp_path / "model_final.pth")["trainer"]


@pytest.mark.parametrize("kind", ["py"])  # tests of twins compare the kinds; this takes long
def test_a_run_in_bfloat16_differs_and_resumes_exactly(short_run, tmp_path, kind):
    train(short_run("mask_rcnn", kind, "plain", "train.max_iter=2"))
    train(short_run("mask_rcnn", kind, "straight", *KEYS[kind]))
    with pytest.raises(PowerFailure):
        train(failing_after(short_run("mask_rcnn", kind, "broken", *KEYS[kind]), batches=5))
    train(short_run("mask_rcnn", kind, "broken", *KEYS[kind]), resume=True)
    files = [tmp_path / f"{x}/model_final.pth" for x in ("straight", "broken")]
    assert same_tensors(*map(weights_of, files))
    two = [weights_of(tmp_path / x / "model_0000001.pth") for x in ("plain", "straight")]
    assert not same_tensors(*two)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_float16_on_a_cpu_and_unknown_dtypes_are_one_line(short_run, kind):
    with pytest.raises(UserError, match="float16 mixed precision needs a GPU.*DTYPE=bfloat16"):
        train(short_run("mask_rcnn", kind, "run", KEYS[kind][0]))
    with pytest.raises(UserError, match="has to be one of float16, bfloat16"):
        short_run("mask_rcnn", kind, "run", KEYS[kind][1].replace("bfloat16", "float8"))


class Scaled(torch.nn.Module):
    """One weight, whose gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": self.weight.sum() * sum(x["number"] for x in batch) / len(batch)}


def test_only_float16_scales_its_losses_and_keeps_the_scale(tmp_path):
    optimizers = {}
    for precision in (None, torch.bfloat16, torch.float16):
        model = Scaled()
        optimizers[precision] = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = CheckedTrainer(
            model, [], optimizers[precision], output_dir=str(tmp_path), precision=precision
        )
        assert ("grad_scaler" in trainer.state_dict()) == (precision is torch.float16)
    state = trainer.state_dict()
    state["grad_scaler"]["scale"] = 1234.0
    trainer.load_state_dict(state)
    assert trainer.grad_scaler.get_scale() == 1234.0
