"""Parameter groups and optimisers.

detectron2 v0.6 cannot give single layers their own learning rate (upstream main can, through
another argument), so `get_optimizer_params` adds `lr_multipliers` on top of its groups.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from d2ext.errors import UserError

from detectron2.config import CfgNode, get_cfg
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def get_optimizer_params(
    model: torch.nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
    lr_multipliers: Mapping[str, float] | Sequence[tuple[str, float]] = (),
    layer_decay: float = 1.0,
    decay_matrices_only: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups of `model`; parameters with equal settings share a group.

    Args:
        model: only parameters that require a gradient are taken.
        base_lr: learning rate before multipliers.
        weight_decay: for everything not named by the next two.
        weight_decay_norm: for the affine parameters of normalisation layers; `None`: as others.
        weight_decay_bias: for biases; `None`: as the others.
        bias_lr_factor: learning rate factor of biases.
        lr_multipliers: prefix of parameter names -> learning rate factor; with `*`, `?` or `[` a
            pattern of whole names, as shells read them (`*.box_head.*`). Of several that match a
            name, the longest counts.
        layer_decay: learning rate factor from one layer to the one before, in backbones that number
            their layers (`layer_numbers`): of layer l of L it is `layer_decay ** (L + 1 - l)`, of
            all that is no such layer 1. The multipliers come on top.
        decay_matrices_only: no weight decay for parameters of one dimension (norms, biases, scales
            of layers) and for those that a backbone exempts (`names_without_decay`: embeddings and
            tables of positions), whatever the settings above say.

    Raises:
        UserError: a prefix or pattern that matches no parameter, or something else than pairs; a
            decay out of range, or without a backbone that numbers its layers.
    """
    try:
        prefixes = {str(prefix): float(factor) for prefix, factor in dict(lr_multipliers).items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"learning rate multipliers are [[prefix, factor], ...], not {lr_multipliers}"
        ) from error
    names = {parameter: name for name, parameter in model.named_parameters()}
    unused = set(prefixes) - {p for p in prefixes for n in names.values() if _matches(n, p)}
    if unused:
        first = sorted(unused)[0]
        fault = "fits it" if _is_pattern(first) else "starts with it"
        raise UserError(
            f"learning rate multiplier for '{first}': no parameter name {fault} "
            "(SOLVER.LR_MULTIPLIERS / optimizer.lr_multipliers)"
        )
    factors = _layer_factors(model, layer_decay)
    exempt = _exempt_parameters(model) if decay_matrices_only else set()
    groups: dict[tuple, dict[str, Any]] = {}
    for group in get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        bias_lr_factor=bias_lr_factor,
    ):
        settings = {k: v for k, v in group.items() if k != "params"}
        for parameter in group["params"]:
            matching = [p for p in prefixes if _matches(names[parameter], p)]
            factor = prefixes[max(matching, key=len)] if matching else 1.0
            factor *= factors.get(parameter, 1.0)
            own = {**settings, "lr": settings["lr"] * factor}
            if parameter in exempt:
                own["weight_decay"] = 0.0
            key = tuple(sorted(own.items()))
            groups.setdefault(key, {**own, "params": []})["params"].append(parameter)
    return list(groups.values())


def _layer_factors(model: torch.nn.Module, decay: float) -> dict[torch.nn.Parameter, float]:
    if not 0 < decay <= 1:
        raise UserError(
            f"SOLVER.LAYER_DECAY / optimizer.layer_decay is {decay}; it has to be above 0 and at "
            "most 1"
        )
    if decay == 1:
        return {}
    factors: dict[torch.nn.Parameter, float] = {}
    for module in model.modules():
        layer_numbers: Any = getattr(module, "layer_numbers", None)
        if layer_numbers:
            numbers, last = layer_numbers()
            parameters = dict(module.named_parameters())
            factors |= {parameters[name]: decay ** (last + 1 - n) for name, n in numbers.items()}
    if not factors:
        raise UserError(
            "SOLVER.LAYER_DECAY / optimizer.layer_decay: the backbone of this model does not "
            "number its layers; networks of timm do, others have SOLVER.LR_MULTIPLIERS"
        )
    return factors


def _exempt_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    found = {p for p in model.parameters() if p.dim() <= 1}
    for module in model.modules():
        names_without_decay: Any = getattr(module, "names_without_decay", None)
        if names_without_decay:
            parameters = dict(module.named_parameters())
            found |= {parameters[name] for name in names_without_decay()}
    return found


def _is_pattern(prefix: str) -> bool:
    return any(x in prefix for x in "*?[")


def _matches(name: str, prefix: str) -> bool:
    return fnmatchcase(name, prefix) if _is_pattern(prefix) else name.startswith(prefix)


def make_optimizer(
    model: torch.nn.Module,
    name: str = "SGD",
    lr: float = 0.02,
    weight_decay: float = 1e-4,
    weight_decay_norm: float | None = 0.0,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
    lr_multipliers: Mapping[str, float] | Sequence[tuple[str, float]] = (),
    layer_decay: float = 1.0,
    decay_matrices_only: bool = False,
    clip_gradients: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """The optimiser of a lazy config, and behind `build_optimizer` that of a yaml config.

    Args:
        model, lr, weight_decay ... decay_matrices_only: see `get_optimizer_params`.
        name: `"SGD"` or `"AdamW"`.
        clip_gradients: `None`, or `{"type": "norm"|"full_model"|"value", "value": x,
            "norm_type": 2.0}`: gradients are clipped in every step ("norm" per parameter,
            "full_model" over all of them), after AMP's unscaling.
        options: handed to the optimiser: `momentum` and `nesterov`, or `betas` and `eps`.

    Raises:
        UserError: unknown names of optimiser, option or clipping; an impossible learning rate.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"unknown optimizer '{name}'; valid names: {', '.join(OPTIMIZERS)} (SOLVER.OPTIMIZER / "
            "optimizer.name)"
        )
    if not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
        raise UserError(f"the learning rate is {lr}; it must be a number that is not negative")
    optimizer_class = OPTIMIZERS[name]
    if name == "SGD":
        options = {"momentum": 0.9, **options}
    unknown = sorted(set(options) - set(inspect.signature(optimizer_class).parameters))
    if unknown:
        raise UserError(f"optimizer {name} has no option '{unknown[0]}'")
    # A lazy config passes its own kind of list, which must not get into a checkpoint.
    options = {k: tuple(v) if isinstance(v, Sequence) else v for k, v in options.items()}
    params = get_optimizer_params(
        model,
        lr,
        weight_decay,
        weight_decay_norm,
        weight_decay_bias,
        bias_lr_factor,
        lr_multipliers,
        layer_decay,
        decay_matrices_only,
    )
    if clip_gradients:
        if not isinstance(clip_gradients, Mapping):
            raise UserError(
                f"clip_gradients is {clip_gradients!r}; it has to be null or a group with type, "
                "value and norm_type"
            )
        optimizer_class = _with_clipping(optimizer_class, dict(clip_gradients))
    return optimizer_class(params, lr=lr, weight_decay=weight_decay, **options)


def _with_clipping(optimizer_class: type, clip: dict[str, Any]) -> type:
    unknown = sorted(set(clip) - {"type", "value", "norm_type"})
    if unknown:
        raise UserError(
            f"gradient clipping has no option '{unknown[0]}'; valid: type, value, norm_type"
        )
    kind, value = clip.get("type", "norm"), float(clip.get("value", 1.0))
    norm_type = float(clip.get("norm_type", 2.0))
    if kind == "full_model":
        return type(
            optimizer_class.__name__ + "WithFullModelClipping",
            (_FullModelClipping, optimizer_class),
            {"clip_value": value, "clip_norm_type": norm_type},
        )
    if kind not in ("norm", "value"):
        raise UserError(f"gradient clipping type '{kind}'; valid: norm, full_model, value")
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    return maybe_add_gradient_clipping(cfg, optimizer_class)


class _FullModelClipping:
    """Optimiser mix-in: limit the norm over all gradients before the step."""

    clip_value: float
    clip_norm_type: float

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.clip_value, self.clip_norm_type)
        return super().step(closure)


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a yaml config (`SOLVER.*`)."""
    solver = cfg.SOLVER
    clip = solver.CLIP_GRADIENTS
    sgd = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    return make_optimizer(
        model,
        name=solver.OPTIMIZER,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        lr_multipliers=solver.LR_MULTIPLIERS,
        layer_decay=solver.LAYER_DECAY,
        decay_matrices_only=solver.DECAY_MATRICES_ONLY,
        clip_gradients=(
            {"type": clip.CLIP_TYPE, "value": clip.CLIP_VALUE, "norm_type": clip.NORM_TYPE}
            if clip.ENABLED
            else None
        ),
        **(sgd if solver.OPTIMIZER == "SGD" else {}),
    )
