"""From a form to a program of `torch.export`, and to a file of ONNX."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2ext.errors import UserError
from d2ext.export.forms import ExportForm
from d2ext.ops._transforms import stand_ins
from d2ext.ops.decompositions import decompositions, scalar

OPSET = 20
# Any size does: both sides are variables of the program.
_EXAMPLE = (203, 331)


def import_optional(*names: str) -> list[Any]:
    """Optional packages, imported.

    Raises:
        UserError: one is missing.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(
            f"ONNX needs the package {error.name}: pip install onnx onnxruntime, or "
            "pip install '.[onnx]' in a clone"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell about their own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class _AnySize(nn.Module):
    """A form that pads the picture itself."""

    def __init__(self, form: ExportForm):
        super().__init__()
        self.form = form

    def forward(self, image: Tensor, output_size: Tensor) -> tuple[Tensor, ...]:
        """See `ExportForm.forward`."""
        height, width = image.shape[1:]
        size = torch.stack([scalar(n, torch.int64) for n in (height, width)])
        divisor = self.form.divisor
        down, right = ((size + (divisor - 1)) // divisor * divisor - size).unbind()
        image = torch.cat([image, image.new_zeros(3, height, right)], dim=2)
        image = torch.cat([image, image.new_zeros(3, down, image.shape[2])], dim=1)
        return self.form(image, size, output_size)


@torch.no_grad()
def export_program(form: ExportForm) -> torch.export.ExportedProgram:
    """The program of a form, in standard operators and those of torchvision.

    Its inputs are those of `ExportForm.forward`; height and width of the image are free.
    """
    divisor = form.divisor
    sides = [divisor * round(side / divisor) for side in _EXAMPLE]
    image, size = torch.zeros(3, *sides), torch.tensor(sides) - 1
    # The coarsest map of a pyramid is to have more than one cell: programs are made for many.
    height, width = (
        divisor * torch.export.Dim(name, min=max(3, 96 // divisor), max=1 << 12)
        for name in ("rows", "columns")
    )
    with _quiet(), stand_ins(decompositions()):
        return torch.export.export(
            form.eval(),
            (image, size, size * 2),
            dynamic_shapes=({1: height, 2: width}, None, None),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@torch.no_grad()
def export_onnx(form: ExportForm, path: str, texts: Mapping[str, str]) -> None:
    """Write a form as one file of ONNX, whose operators are all standard ones.

    Args:
        path: of the file.
        texts: its `metadata_props`.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    (onnx,) = import_optional("onnx")
    example, size = torch.zeros(3, *_EXAMPLE), torch.tensor(_EXAMPLE) * 2
    sides = {1: "height", 2: "width"}
    found = {name: {0: "detections"} for name in form.output_names()}
    buffer = io.BytesIO()
    with _quiet(), stand_ins(decompositions()):
        # By torch.jit, which takes seconds where torch.export takes minutes.
        torch.onnx.export(
            _AnySize(form.eval()),
            (example, size),
            buffer,
            input_names=["image", "output_size"],
            output_names=form.output_names(),
            dynamic_axes={"image": sides, **found},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    model.producer_name = "d2ext"
    onnx.helper.set_model_props(model, dict(texts))
    try:
        onnx.save(model, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
