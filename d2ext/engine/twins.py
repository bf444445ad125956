"""Do the yaml and the lazy config of one name describe the same run? For the tests of projects.

::

    @pytest.mark.parametrize("check", twins.CHECKS)
    @pytest.mark.parametrize("stem", twins.config_stems(CONFIGS))
    def test_yaml_and_lazy_config_describe_the_same_run(stem, check, tmp_path):
        with twins.few_images(tmp_path):
            check(stem)

A check raises an `AssertionError` with a line for everything that differs.
"""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from d2ext.data import InstanceSegMapper, register_all, register_shapes
from d2ext.engine.experiment import Experiment
from d2ext.engine.setup import build_experiment
from d2ext.modeling.backbone.timm import without_part_weights
from d2ext.solver.schedule import make_lr_scheduler

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.backbone import FPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage

KINDS = (".yaml", ".py")
_GENERATED = "shapes_"
# Facts about the process, not about the run.
_INCIDENTAL = set(vars(nn.Module())) | {"_rng", "_log_derivation", "training"}


def config_stems(folder: str | Path) -> list[str]:
    """Paths without suffix of all configs in a folder, except bases (`Base-*`).

    Raises:
        AssertionError: there is none, or one exists in one kind only.
    """
    paths = [p for p in Path(folder).iterdir() if p.suffix in KINDS]
    paths = [p for p in paths if not p.name.startswith(("Base-", "__init__"))]
    stems = sorted({str(p.with_suffix("")) for p in paths})
    assert stems, f"{folder} has no configs"
    for stem in stems:
        for kind in KINDS:
            assert Path(stem + kind).is_file(), f"{stem} has no twin ending in {kind}"
    return stems


@contextlib.contextmanager
def few_images(folder: str | Path, num_images: int = 8):
    """Small data while a `with` block lasts: the generated sets have their first `num_images`
    images, written to `folder`, and every other registered set a wide and a tall one that do not
    exist, which is enough to build its loader."""
    annotation = {"bbox": [1, 1, 9, 9], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    wide = {"file_name": "a.jpg", "image_id": 1, "height": 20, "width": 30}
    tall = {"file_name": "b.jpg", "image_id": 2, "height": 30, "width": 20}
    records = [{**record, "annotations": [annotation]} for record in (wide, tall)]
    catalogs = (DatasetCatalog, MetadataCatalog)
    saved = [dict(catalog.data) for catalog in catalogs]
    with mock.patch.dict(os.environ, DETECTRON2_DATASETS=str(folder)):
        try:
            register_all()
            for name in DatasetCatalog.list():
                DatasetCatalog.remove(name)
                if name.startswith(_GENERATED):
                    MetadataCatalog.remove(name)
                    register_shapes(name, name[len(_GENERATED) :], str(folder), num_images)
                else:
                    DatasetCatalog.register(name, functools.partial(list, records))
            yield
        finally:
            for catalog, data in zip(catalogs, saved):
                catalog.data.clear()
                catalog.data.update(data)


def check_settings(stem: str) -> None:
    """Schedule, seed, data sets, classes, periods, image format: all that is no object."""
    first, second = (
        {
            **{name: value for name, value in vars(e).items() if name != "cfg"},
            "train_sets": e.train_sets(),
            "test_sets": e.test_sets(),
            "num_classes": e.num_classes(),
            "semantic_mode": e.semantic_mode(),
            "test_augmentations": e.test_augmentations(),
        }
        for e in _experiments(stem)
    )
    assert_same(first, second)


def check_loaders(stem: str) -> None:
    """The loaders of training and test sets: mappers, augmentations, samplers, batch size."""
    first, second = (
        [e.build_train_loader(), *(e.build_test_loader(name) for name in e.test_sets())]
        for e in _experiments(stem)
    )
    assert_same(first, second)


def check_network(stem: str) -> list[float]:
    """Modules and their settings, the optimiser's for each parameter, and the learning rates, which
    are returned; weights are zero, so that large networks are built at once."""
    with _all_zero():
        (e, model), (other_e, other) = [(e, e.build_model()) for e in _experiments(stem)]
    shapes_of = [{n: p.shape for n, p in m.named_parameters()} for m in (model, other)]
    assert shapes_of[0] == shapes_of[1], f"{stem}: parameters of other names or shapes"
    assert_same(model, other)
    assert_same(_optimiser_settings(e, model), _optimiser_settings(other_e, other))
    rates = _learning_rates(e)
    np.testing.assert_allclose(_learning_rates(other_e), rates, rtol=1e-9)
    return rates


def check_results(stem: str) -> None:
    """Losses of a batch, the step that follows, and what is found then in a test image, all from
    the same random weights. For small networks on data that exist."""
    results: list[tuple] = []
    weights: dict[str, torch.Tensor] = {}
    for experiment in _experiments(stem, "MODEL.WEIGHTS="):
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
    assert losses.keys() == other_losses.keys(), f"{[*losses]} | {[*other_losses]}"
    assert all(torch.isfinite(loss) for loss in losses.values()), f"{stem}: {losses}"
    torch.testing.assert_close(losses, other_losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, other_state, rtol=0, atol=1e-6)
    assert len(found) == len(other_found) > 0, f"{stem}: nothing found, or not the same number"
    fields, others = found.get_fields(), other_found.get_fields()
    assert fields.keys() == others.keys(), f"{[*fields]} | {[*others]}"
    for name in fields:
        pair = [getattr(x[name], "tensor", x[name]) for x in (fields, others)]
        near = {} if name == "pred_boxes" else {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(*pair, **near)


# What every pair of configs has to pass; :func:`check_results` is for tiny ones.
CHECKS = (check_settings, check_loaders, check_network)


def assert_same(first: Any, second: Any) -> None:
    """Fail with a line "path: first | second" for everything that differs between two objects."""
    first, second = _describe(first), _describe(second)
    lines = [
        f"{path}: {first.get(path, '(none)')} | {second.get(path, '(none)')}"
        for path in sorted({*first, *second})
        if first.get(path, "(none)") != second.get(path, "(none)")
    ]
    assert not lines, "\n".join(lines)


def _experiments(stem: str, *overrides: str) -> list[Experiment]:
    return [build_experiment(stem + kind, ["MODEL.DEVICE=cpu", *overrides]) for kind in KINDS]


def _describe(value: Any, path: str = "", found: dict | None = None) -> dict[str, Any]:
    """A flat picture of any object: `{path: plain value or type}`, parameters left out."""
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
        value = {k: v for k, v in _attributes(value).items() if k not in _INCIDENTAL}
    for name, part in value.items():
        _describe(part, f"{path}.{name}", found)
    return found


def _attributes(value: Any) -> dict[str, Any]:
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


@contextlib.contextmanager
def _all_zero():
    """Fill weights with zeros: random numbers take seconds for a full-size network. Left as they
    are, PyTorch's `trunc_normal_` would draw for ever, until what lies in the memory is small."""
    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_normal_")
    fillers = {
        name: lambda tensor, *args, **kwargs: tensor.detach().zero_()
        for name in (*names, "trunc_normal_")
    }
    # With which timm fills.
    of_tensors = {name: fillers["normal_"] for name in ("uniform_", "erfinv_", "normal_")}
    with mock.patch.multiple(nn.init, **fillers), without_part_weights():
        with mock.patch.multiple(torch.Tensor, **of_tensors):
            yield


def _optimiser_settings(experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """Class and effect of the optimiser, and the settings of every trained parameter by name."""
    optimizer = experiment.build_optimizer(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {}
    for group in optimizer.param_groups:
        own = {k: v for k, v in group.items() if k not in ("params", "foreach")}
        settings.update({names[parameter]: own for parameter in group["params"]})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(settings) == trained, "the optimiser has other parameters than the model"
    return {"class": type(optimizer).__name__, "clipped": _clipped(optimizer), "settings": settings}


def _clipped(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """What a large gradient becomes in a step of an optimiser of the same class."""
    parameter = nn.Parameter(torch.zeros(2))
    probe = type(optimizer)([parameter], lr=1.0)
    parameter.grad = torch.tensor([300.0, -400.0])
    probe.step()
    return parameter.grad


def _learning_rates(experiment: Experiment) -> list[float]:
    """Learning rate at five iterations: while warming up, between the steps, and at the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    n = experiment.max_iter
    schedule = make_lr_scheduler(optimizer, experiment.build_lr_multiplier(), n)
    rates = []
    for iteration in (0, 7, n // 2, int(n * 0.8), n - 1):
        schedule.last_epoch = iteration
        rates.append(schedule.get_lr()[0])
    return rates
