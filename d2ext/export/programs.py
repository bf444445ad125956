"""From a form to a program of `torch.export`, and to a file of ONNX."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from d2ext.errors import UserError
from d2ext.export.forms import ExportForm
from d2ext.ops.decompositions import decompositions

INPUTS = ("image", "output_size")
OPSET = 20
# Any size that is no multiple of the strides does: both sides are variables of the program.
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
            f"ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime, or "
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


@torch.no_grad()
def export_program(form: ExportForm) -> torch.export.ExportedProgram:
    """The program of a form, in standard operators and those of torchvision.

    Its inputs are those of `ExportForm.forward`; height and width of the image are free.
    """
    image, size = torch.zeros(3, *_EXAMPLE), torch.tensor(_EXAMPLE)
    side = torch.export.Dim.AUTO
    with _quiet():
        program = torch.export.export(
            form.eval(),
            (image, size),
            dynamic_shapes=({1: side, 2: side}, None),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return program.run_decompositions(decompositions())


def export_onnx(form: ExportForm, path: str, texts: Mapping[str, str]) -> None:
    """Write a form as one file of ONNX, whose operators are all standard ones.

    Args:
        path: of the file.
        texts: its `metadata_props`.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    import_optional("onnx", "onnxscript")
    program = export_program(form)
    with _quiet():
        made = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=form.output_names(),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    made.model.metadata_props.update(texts)
    made.model.producer_name = "d2ext"
    try:
        made.save(path, external_data=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
