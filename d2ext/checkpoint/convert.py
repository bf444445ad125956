"""Conversion of checkpoint files: from other programs into ours, and back."""

import pickle
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from d2ext.checkpoint.checkpointer import (
    METADATA_KEY,
    Checkpointer,
    read_metadata,
    save_sealed,
    write_atomically,
)
from d2ext.checkpoint.formats import FormatError, read_file
from d2ext.checkpoint.formats.integrity import append_seal
from d2ext.checkpoint.formats.safetensors_files import dump_safetensors
from d2ext.checkpoint.importers.common import strides_in_1x1
from d2ext.checkpoint.importing import import_weights, list_importers
from d2ext.checkpoint.mapping import Conversion, export_weights
from d2ext.errors import UserError


def import_file(path: str, model: nn.Module, project: str | None = None) -> Conversion:
    """Convert a file for a model, which may be without values (on the device "meta").

    The caller decides by `Conversion.check` what is good enough.

    Args:
        project: consider only importers of this project and those for all.

    Raises:
        UserError: the file cannot be read, is ours already, or of an unknown kind.
    """
    file = read_file(path)
    ours = set(model.state_dict())
    if any(name.removeprefix("module.") in ours for name in file.weights):
        raise UserError(
            f"checkpoint '{path}' has the names of this model already: load it as it is"
        )
    return import_weights(file, model, project)


def save_weights(path: str, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write weights as detectron2's `.pkl` of numpy arrays, as a `.pth` or as a
    `.safetensors` with the metadata as JSON text in its header; floats as single precision.

    Raises:
        UserError: another ending, the file cannot be written, or its library is not installed.
    """
    own = {
        k: (v.float() if v.is_floating_point() else v).clone(memory_format=torch.contiguous_format)
        for k, v in weights.items()
    }
    if path.endswith(".pth"):
        content = {"model": own, METADATA_KEY: metadata}
        write_atomically(path, lambda f: save_sealed(content, f))
    elif path.endswith(".pkl"):
        arrays = {k: v.numpy() for k, v in own.items()}
        content = {"model": arrays, "__author__": "d2ext", METADATA_KEY: metadata}
        write_atomically(path, lambda f: _dump_sealed(content, f))
    elif path.endswith(".safetensors"):
        try:
            data = dump_safetensors(own, metadata)
        except FormatError as error:
            raise UserError(f"cannot write '{path}': {error}") from error
        write_atomically(path, lambda f: f.write(data))
    else:
        raise UserError(f"'{path}' must end in .pkl, .pth or .safetensors")


def _dump_sealed(content: dict[str, Any], file: BinaryIO) -> None:
    pickle.dump(content, file, protocol=4)
    append_seal(file, archive=False)


def export_file(path: str, model: nn.Module, project: str, out: str) -> dict[str, Tensor]:
    """Write one of our checkpoints under the names of the program whose files a project imports.

    Args:
        model: built by the checkpoint's config; gets its weights.

    Returns:
        the weights as written, under `state_dict` beside a `meta` with the classes and
        the pixel statistics as MMDetection spells them.

    Raises:
        UserError: the project has no exporter, or the file is not of this model.
    """
    known = [x for x in list_importers() if x.project == project and x.exports]
    if not known:
        raise UserError(f"project '{project}' has no exporter")
    Checkpointer(model).load_complete(path)
    weights = export_weights(model.state_dict(), known[0].rules(model))
    pixels = (model.pixel_mean, model.pixel_std)
    mean, std = ([round(v, 4) for v in x.flatten().tolist()] for x in pixels)
    style = "caffe" if strides_in_1x1(model) else "pytorch"
    meta = {
        "CLASSES": tuple(read_metadata(path).get("thing_classes", ())),
        "config": (
            f"model = dict(backbone=dict(style='{style}'))\n"
            f"img_norm_cfg = dict(mean={mean}, std={std}, to_rgb={model.input_format == 'RGB'})"
        ),
    }
    write_atomically(out, lambda f: save_sealed({"meta": meta, "state_dict": weights}, f))
    return weights
