"""The yaml and the lazy config of one name describe the same run.

Every pair is compared in full: model, optimiser, schedule, data and all other settings. Networks of
full size are built without initialising their weights; the tiny ones are run on one batch as well.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from d2ext.config import load_projects
from d2ext.data import InstanceSegMapper, register_all, shapes
from d2ext.engine import build_experiment
from d2ext.solver.schedule import make_lr_scheduler

from detectron2.data import DatasetCatalog
from detectron2.modeling.backbone import FPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "configs", *sorted(ROOT.glob("projects/*/configs"))]
KINDS = (".yaml", ".py")
STEMS = sorted(
    {
        str(path.with_suffix("").relative_to(ROOT))
        for folder in FOLDERS
        for path in folder.iterdir()
        if path.suffix in KINDS and not path.name.startswith(("Base-", "__init__"))
    }
)
TINY = [stem for stem in STEMS if "_tiny" in stem]
# Facts about the process, not about the run.
INCIDENTAL = set(vars(nn.Module())) | {"_rng", "_log_derivation", "training"}


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory):
    """Few images in the generated sets, and a made-up record instead of COCO's."""
    load_projects()
    root = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        for name, split in list(shapes.SPLITS.items()):
            patch.setitem(shapes.SPLITS, name, shapes.Split(8, split.seed))
        patch.setenv("DETECTRON2_DATASETS", root)
        yield


@pytest.fixture(autouse=True)
def made_up_records(small_data):
    """COCO and VOC are not here; a wide and a tall record per set are enough for their loaders."""
    register_all()
    annotation = {"bbox": [1, 1, 9, 9], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    wide = {"file_name": "a.jpg", "image_id": 1, "height": 20, "width": 30}
    tall = {"file_name": "b.jpg", "image_id": 2, "height": 30, "width": 20}
    for name in DatasetCatalog.list():
        if name.startswith(("coco_2017", "voc_sds")):
            DatasetCatalog.pop(name)
            records = [{**record, "annotations": [annotation]} for record in (wide, tall)]
            DatasetCatalog.register(name, functools.partial(list, records))


def experiments(stem, *overrides):
    return [
        build_experiment(str(ROOT / f"{stem}{kind}"), ["MODEL.DEVICE=cpu", *overrides])
        for kind in KINDS
    ]


def describe(value, path="", found=None):
    """A flat picture of any object: ``{path: plain value or type}``, parameters left out."""
    found = {} if found is None else found
    assert path.count(".") < 20, f"objects refer to each other: {path}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = [str(value.dtype), *value.flatten().tolist()]
    if isinstance(value, (list, tuple, set, range)) or OmegaConf.is_list(value):
        found[path] = "list"
        value = dict(enumerate(value))
    elif isinstance(value, dict) or OmegaConf.is_dict(value):
        found[path] = "dict"
    elif isinstance(value, (bool, int, float, str, bytes, type(None))):
        found[path] = float(f"{value:.12g}") if isinstance(value, float) else value
        return found
    elif callable(value) and hasattr(value, "__qualname__"):
        found[path] = value.__qualname__
        return found
    else:
        # ResNetFPN and its like only put together the parts of an FPN, which are compared.
        found[path] = "FPN" if isinstance(value, FPN) else type(value).__qualname__
        value = {k: v for k, v in attributes(value).items() if k not in INCIDENTAL}
    for name, part in value.items():
        describe(part, f"{path}.{name}", found)
    return found


def attributes(value):
    """What makes up an object, without what has no effect in its state."""
    found = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        found.update(value.named_children())
        found.update(value.named_buffers(recurse=False))
    if isinstance(value, FastRCNNOutputLayers):  # losses that are not named have weight 1
        found["loss_weight"] = {"loss_cls": 1.0, "loss_box_reg": 1.0, **value.loss_weight}
    if isinstance(value, InstanceSegMapper):
        if not value.is_train:
            names = ("is_train", "augmentations", "image_format")
            found = {name: found[name] for name in names}
        elif value.semantic == "none":
            del found["num_semantic_labels"]
    return found


def assert_same(first, second):
    """Fail with a line "path: first | second" for everything that differs between two objects."""
    first, second = describe(first), describe(second)
    lines = [
        f"{path}: {first.get(path, '(none)')} | {second.get(path, '(none)')}"
        for path in sorted({*first, *second})
        if first.get(path, "(none)") != second.get(path, "(none)")
    ]
    assert not lines, "\n".join(lines)


@pytest.fixture
def uninitialised(monkeypatch):
    """Skip the filling of weights, which takes seconds for a full-size network."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def test_every_config_has_its_twin():
    assert len(STEMS) > 5
    for stem in STEMS:
        for kind in KINDS:
            assert (ROOT / f"{stem}{kind}").is_file(), f"{stem} has no twin ending in {kind}"


@pytest.mark.parametrize("stem", STEMS)
def test_twins_have_the_same_settings(stem):
    first, second = (
        {
            **{name: value for name, value in vars(e).items() if name != "cfg"},
            "train_sets": e.train_sets(),
            "test_sets": e.test_sets(),
            "num_classes": e.num_classes(),
            "semantic_mode": e.semantic_mode(),
            "test_augmentations": e.test_augmentations(),
        }
        for e in experiments(stem)
    )
    assert_same(first, second)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("stem", STEMS)
def test_twins_load_the_same_data(stem):
    first, second = (
        [e.build_train_loader(), *(e.build_test_loader(name) for name in e.test_sets())]
        for e in experiments(stem)
    )
    assert_same(first, second)


@pytest.mark.parametrize("stem", STEMS)
def test_twins_build_the_same_network_optimiser_and_schedule(stem, uninitialised):
    (e, model), (other_e, other) = [(e, e.build_model()) for e in experiments(stem)]
    shapes_of = [{n: p.shape for n, p in m.named_parameters()} for m in (model, other)]
    assert shapes_of[0] == shapes_of[1]
    assert_same(model, other)
    assert_same(optimiser_settings(e, model), optimiser_settings(other_e, other))
    rates = learning_rates(e)
    assert rates == pytest.approx(learning_rates(other_e), rel=1e-9)
    assert len(set(rates)) > 1  # MNC and FCIS on VOC: one step and no warm-up


def optimiser_settings(experiment, model):
    """Class and effect of the optimiser, and the settings of every trained parameter by name."""
    optimizer = experiment.build_optimizer(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {}
    for group in optimizer.param_groups:
        own = {k: v for k, v in group.items() if k not in ("params", "foreach")}
        settings.update({names[parameter]: own for parameter in group["params"]})
    assert set(settings) == {n for n, p in model.named_parameters() if p.requires_grad}
    return {"class": type(optimizer).__name__, "clipped": clipped(optimizer), "settings": settings}


def clipped(optimizer):
    """What a large gradient becomes in a step of an optimiser of the same class."""
    parameter = nn.Parameter(torch.zeros(2))
    probe = type(optimizer)([parameter], lr=1.0)
    parameter.grad = torch.tensor([300.0, -400.0])
    probe.step()
    return parameter.grad


def learning_rates(experiment):
    """Learning rate at five iterations: while warming up, between the steps, and at the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    n = experiment.max_iter
    schedule = make_lr_scheduler(optimizer, experiment.build_lr_multiplier(), n)
    rates = []
    for iteration in (0, 7, n // 2, int(n * 0.8), n - 1):
        schedule.last_epoch = iteration
        rates.append(schedule.get_lr()[0])
    return rates


@pytest.mark.parametrize("stem", TINY)
def test_tiny_twins_compute_the_same_losses_step_and_detections(stem):
    results, weights = [], None
    for experiment in experiments(stem, "MODEL.WEIGHTS="):
        torch.manual_seed(0)
        batch = next(iter(experiment.build_train_loader()))
        model = experiment.build_model().train()
        weights = weights or {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(weights)
        optimizer = experiment.build_optimizer(model)
        torch.manual_seed(1)
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()
        for module in model.modules():  # untrained scores are low
            if hasattr(module, "test_score_thresh"):
                module.test_score_thresh = 0.0
        test_input = next(iter(experiment.build_test_loader(experiment.test_sets()[0])))
        with torch.no_grad():
            found = model.eval()(test_input)[0]["instances"]
        results.append((losses, model.state_dict(), found))
    (losses, state, found), (other_losses, other_state, other_found) = results
    assert losses.keys() == other_losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values())
    torch.testing.assert_close(losses, other_losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, other_state, rtol=0, atol=1e-6)
    assert len(found) == len(other_found) > 0
    torch.testing.assert_close(found.scores, other_found.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes.tensor, other_found.pred_boxes.tensor)
    assert found.pred_classes.equal(other_found.pred_classes)
    assert found.pred_masks.equal(other_found.pred_masks)
