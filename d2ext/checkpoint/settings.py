"""What weights of other programs need from a model besides their own values: pixel statistics,
order of the colour channels, places of strides, scales of box deltas.

Settings are a dict from the path of an attribute of the model ("backbone.stem.conv1.stride") to a
plain value. They are applied when weights are loaded, and travel in the `metadata` of checkpoints,
so that whoever loads these later gets the same network.

Attributes that a module names in `user_choices` are no need of the weights: they stay as the config
has them, and settings only record them.
"""

import collections.abc
import logging
import math
import re
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2ext.config.overrides import lazy_keys
from d2ext.errors import UserError

from detectron2.config import CfgNode

SETTINGS_KEY = "settings"
# The setting that is not an attribute to be changed: data in another order are met by turning the
# weights of the first layer around.
INPUT_FORMAT = "input_format"
_PIXELS = ("pixel_mean", "pixel_std")
# The yaml keys of settings; those of strides have one for all, those of a cascade a list.
_YAML_KEYS = {
    INPUT_FORMAT: "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "roi_heads.box_predictor.box2box_transform.weights": "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "roi_heads.box2box_transform.weights": "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
}
_CASCADE = re.compile(r"roi_heads\.box_predictor\.(\d+)\.box2box_transform\.weights")
_STRIDE = re.compile(r".+\.conv(1|2|2_offset)\.stride")

logger = logging.getLogger(__name__)


def apply_settings(
    model: nn.Module, settings: dict[str, Any], source: str = ""
) -> tuple[list[str], dict[str, Any]]:
    """Give a model the settings that its weights, already loaded, need.

    Args:
        source: name of the checkpoint, for messages.

    Returns:
        a line for every change, and the settings as they hold now: those to
        store beside the weights.

    Raises:
        UserError: the model has no such attribute, or one of another kind.
    """
    settings = dict(settings)
    lines = []
    order = settings.get(INPUT_FORMAT)
    wanted = getattr(model, INPUT_FORMAT, None)
    if order and wanted and order != wanted:
        if {order, wanted} != {"RGB", "BGR"}:
            raise UserError(f"checkpoint '{source}' takes {order} images, the model {wanted}")
        first = _first_convolution(model)
        with torch.no_grad():
            first.weight.copy_(first.weight.flip(1))
        for name in _PIXELS:
            if name in settings:
                settings[name] = list(reversed(settings[name]))
        settings[INPUT_FORMAT] = wanted
        lines.append(f"input channels of the first layer turned from {order} to {wanted}")
    for path, value in settings.items():
        if path == INPUT_FORMAT:
            continue
        owner, name = _owner(model, path)
        current = getattr(owner, name, None)
        if name in getattr(owner, "user_choices", ()) and _same_kind(current, value):
            if not _equal(current, value):
                logger.warning(
                    "%s stays %s, as configured; checkpoint '%s' comes with %s",
                    path,
                    _text(current),
                    source,
                    _text(value),
                )
            settings[path] = current
            continue
        before = _set(model, path, value, source)
        if before is not None:
            lines.append(f"{path} set to {_text(value)} (was {_text(before)})")
    return lines, settings


def settings_of_parts(model: nn.Module) -> dict[str, Any]:
    """What parts that were built with weights need, by their `needed_settings`; {} if there are
    none."""
    found = [getattr(module, "needed_settings", {}) for module in model.modules()]
    return {key: value for settings in found for key, value in settings.items()}


def settings_to_config(cfg: CfgNode | DictConfig, settings: dict[str, Any]) -> list[str]:
    """Put settings that a model has into its config, so that who builds the model from it, such as
    detectron2's `DefaultPredictor`, gets the same network.

    Args:
        cfg: yaml or lazy; changed.
        settings: as `apply_settings` returns them.

    Returns:
        the paths of the settings for which the config has no key.
    """
    set_one = _set_in_lazy if isinstance(cfg, DictConfig) else _set_in_yaml
    if isinstance(cfg, CfgNode):
        cfg.defrost()
    left = [
        p
        for p, value in settings.items()
        if not _STRIDE.fullmatch(p) and not set_one(cfg, p, value)
    ]
    strides = {p: value for p, value in settings.items() if _STRIDE.fullmatch(p)}
    if not strides:
        return left
    in_1x1 = any(max(value) > 1 for p, value in strides.items() if p.endswith(".conv1.stride"))
    if isinstance(cfg, CfgNode):
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = in_1x1
        return left
    keys = [key for key in lazy_keys(cfg.model) if key.split(".")[-1] == "stride_in_1x1"]
    for key in keys:
        OmegaConf.update(cfg.model, key, in_1x1)
    return left if keys else [*left, *strides]


def _set_in_yaml(cfg: CfgNode, path: str, value: Any) -> bool:
    stage = _CASCADE.fullmatch(path)
    if stage:
        weights = [list(x) for x in cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS]
        weights[int(stage[1])] = list(value)
        cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS = weights
        return True
    if path not in _YAML_KEYS:
        return False
    *groups, leaf = _YAML_KEYS[path].split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[leaf] = list(value) if _is_list(value) else value
    return True


def _set_in_lazy(cfg: DictConfig, path: str, value: Any) -> bool:
    for key in (path, path.replace(".box_predictor.", ".box_predictors.")):
        if OmegaConf.select(cfg.model, key) is not None:
            OmegaConf.update(cfg.model, key, list(value) if _is_list(value) else value)
            return True
    return False


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module
    raise UserError("the model has no convolution of three input channels")


def _set(model: nn.Module, path: str, value: Any, source: str) -> Any:
    """Set one attribute; its value before, or None if nothing changed."""
    owner, name = _owner(model, path)
    current = getattr(owner, name, None)
    if isinstance(current, torch.Tensor) and not isinstance(current, nn.Parameter):
        new = torch.as_tensor(value, dtype=current.dtype, device=current.device).flatten()
        if new.numel() == current.numel():
            if current.is_meta or torch.equal(new, current.flatten()):
                return None
            before = current.flatten().tolist()
            current.copy_(new.view_as(current))
            return before
    elif _same_kind(current, value):
        if _equal(current, value):
            return None
        new = tuple(value) if _is_list(value) else value
        setattr(owner, name, new)
        return current
    raise UserError(
        f"checkpoint '{source}' needs {path} = {_text(value)}, which this model cannot have; "
        "load it with a config for these weights"
    )


def _owner(model: nn.Module, path: str) -> tuple[Any, str]:
    """The object that has the attribute at the end of a path, None if there is none; its name."""
    *parents, name = str(path).split(".")
    owner: Any = model
    for part in parents:
        owner = _child(owner, part)
    return owner, name


def _child(owner: Any, name: str) -> Any:
    if isinstance(owner, (nn.ModuleList, nn.Sequential)) and name.isdigit():
        return owner[int(name)] if int(name) < len(owner) else None
    return None if name.startswith("_") else getattr(owner, name, None)


def _same_kind(current: Any, value: Any) -> bool:
    """Whether a plain value may replace another one: equal types, equal lengths."""
    if _is_list(current):
        return (
            _is_list(value)
            and len(value) == len(current)
            and all(_same_kind(a, b) for a, b in zip(current, value))
        )
    if isinstance(current, (bool, str)) or isinstance(value, (bool, str)):
        return type(current) is type(value)
    return isinstance(current, (int, float)) and isinstance(value, (int, float))


def _equal(a: Any, b: Any) -> bool:
    if _is_list(a):
        return all(_equal(x, y) for x, y in zip(a, b))
    return a == b or (isinstance(a, float) and math.isclose(a, b))


def _is_list(value: Any) -> bool:
    """Also omegaconf's lists, in models of lazy configs."""
    return isinstance(value, collections.abc.Sequence) and not isinstance(value, str)


def _text(value: Any) -> str:
    """A plain value; what is nested is not printed, however much it may be."""
    if _is_list(value):
        return f"({', '.join('...' if _is_list(v) else _text(v) for v in value)})"
    if isinstance(value, (bool, int, str)):
        return str(value)
    return f"{value:.6g}" if isinstance(value, float) else type(value).__name__
