"""Parameters that a training leaves as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from d2ext.errors import UserError

from detectron2.layers import FrozenBatchNorm2d

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let no parameter whose name fits a pattern be trained, beside those that a network freezes
    itself (`MODEL.BACKBONE.FREEZE_AT`). Call it before the optimiser is built.

    Batch norm whose weight and bias are frozen becomes detectron2's `FrozenBatchNorm2d`, as with
    `FREEZE_AT`: its statistics stay as well. Names in checkpoints stay.

    Args:
        model: changed in place.
        patterns: of whole names, as shells read them: `backbone.*`, `*.mask_head.*`.

    Returns:
        the names of the parameters that fit.

    Raises:
        UserError: a pattern fits no parameter; nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in parameters if fnmatchcase(name, str(pattern))]
        if not found:
            raise UserError(
                f"SOLVER.FREEZE / train.freeze has '{pattern}', which fits no parameter; the "
                f"names of this model begin with {', '.join(_first_parts(parameters))}, and "
                "'backbone.*' means all of a part"
            )
        frozen.update(dict.fromkeys(found))
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen and not any(p.requires_grad for p in parameters.values()):
        raise UserError("SOLVER.FREEZE / train.freeze leaves no parameter to train")
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            full = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, _BATCH_NORMS) and {f"{full}.weight", f"{full}.bias"} <= set(
                frozen
            ):
                setattr(module, child_name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
    return list(frozen)


def _first_parts(names) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))
