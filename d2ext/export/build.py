"""The form of a detector."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import d2ext.export.rcnn  # noqa: F401  registers the forms of detectron2's networks
from d2ext.errors import UserError
from d2ext.export.forms import FORMS, ExportForm
from d2ext.export.structures import refuse

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


class _PlainConv2d(Conv2d):
    """detectron2's convolution, which asks first whether its input is empty: a program cannot
    tell, and only trainings need to know."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class _PlainLastLevel(LastLevelMaxPool):
    """The coarsest level of a pyramid, every second cell, which detectron2 takes by a maximum over
    one cell: torch.export derives its size in a way that only fits even or odd sizes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


_PLAIN: dict[type, type] = {Conv2d: _PlainConv2d, LastLevelMaxPool: _PlainLastLevel}


def build_form(model: nn.Module, all_stages: bool = False) -> ExportForm:
    """The form of a detector.

    Args:
        model: in evaluation mode, on the CPU; it is copied.
        all_stages: see `ExportForm`.

    Raises:
        UserError: there is none, or something in the model has no form.
    """
    heads: Any = getattr(model, "roi_heads", None)
    for kind in type(heads).__mro__:
        if kind in FORMS:
            if kind is not type(heads) and type(heads).__module__.split(".")[0] not in (
                "detectron2",
                "d2ext",
            ):
                break  # somebody's subclass may do anything
            model = copy.deepcopy(model)
            for module in model.modules():
                if type(module) in _PLAIN:
                    module.__class__ = _PLAIN[type(module)]
            form = FORMS[kind](model, all_stages)
            if all_stages and form.stages < 2:
                raise UserError(
                    f"{type(model).__name__} has no results per stage; export it without --stages"
                )
            return form
    refuse(
        f"{type(model).__name__} with {type(heads).__name__}",
        "d2ext.export.register_form teaches a network of your own",
    )
