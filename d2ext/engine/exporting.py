"""From weights to a file that predicts without PyTorch, or without the config."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from d2ext.engine.predictor import Predictor
from d2ext.errors import UserError
from d2ext.export import build_form, export_onnx, export_program, refuse
from d2ext.export.settings import FileSettings
from d2ext.version import __version__

from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.file_io import PathManager

SUFFIXES = (".onnx", ".pt2")
SETTINGS_FILE = "d2ext.json"  # in a .pt2 file


def export_model(
    predictor: Predictor, weights: str | os.PathLike, path: str, all_stages: bool = False
) -> FileSettings:
    """Write a model as a program.

    Args:
        predictor: of the model, on the CPU.
        weights: the file that it was built from.
        path: `.onnx` for a file of ONNX, `.pt2` for a program of `torch.export`.
        all_stages: also the results after each stage of a cascade.

    Raises:
        UserError: a part of the model cannot be exported, a package is missing, or the file cannot
            be written.
    """
    if not path.endswith(SUFFIXES):
        raise UserError(f"--output {path} ends neither in .onnx (ONNX) nor .pt2 (torch.export)")
    model: Any = predictor.model
    form = build_form(model, all_stages)
    short_edge, max_size = resizing(predictor.experiment.test_augmentations())
    settings = FileSettings(
        network=type(model).__name__,
        class_names=list(predictor.class_names),
        channel_order=predictor.experiment.image_format,
        short_edge=short_edge,
        max_size=max_size,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
        drawing=form.drawing,
        mask_threshold=form.mask_threshold,
        stages=form.stages if all_stages else 1,
        parameters=sum(p.numel() for p in model.parameters()),
        checkpoint=os.path.basename(weights),
        sha256=_digest(weights),
        version=__version__,
        torch=torch.__version__,
    )
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        if path.endswith(".onnx"):
            export_onnx(form, path, settings.to_texts())
        else:
            program = export_program(form)
            torch.export.save(
                program, path, extra_files={SETTINGS_FILE: json.dumps(settings._asdict())}
            )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return settings


def resizing(augmentations: Sequence[Any]) -> tuple[int, int]:
    """Short edge and longest side that test images are resized to.

    Raises:
        UserError: they are not resized in this way.
    """
    for each in augmentations:
        kept = type(each) is not ResizeShortestEdge or len(set(each.short_edge_length)) != 1
        if kept or len(augmentations) > 1:
            refuse(
                f"a model whose test images pass through {each}",
                "resize them by one ResizeShortestEdge with one size",
            )
        return int(each.short_edge_length[0]), int(each.max_size)
    refuse("a model whose test images are not resized", "set INPUT.MIN_SIZE_TEST")


def _digest(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(PathManager.get_local_path(os.fspath(path)), "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
