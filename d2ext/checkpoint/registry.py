"""Which kinds of foreign checkpoints can be loaded, and the choice among them for a file.

Projects add theirs by a module ``importer`` in their package, which calls
:func:`register_importer`; it is found through the same entry points as their configs.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.mapping import Conversion, Rule, convert_weights, shapes_of, used_names
from d2ext.checkpoint.settings import SETTINGS_KEY
from d2ext.config.projects import load_projects
from d2ext.errors import UserError

__all__ = ["Importer", "find_importer", "import_weights", "importers", "register_importer"]

Weights = Dict[str, torch.Tensor]


def _no_settings(file: CheckpointFile, model: nn.Module) -> Dict[str, Any]:
    return {}


def _no_lines(file: CheckpointFile, model: nn.Module) -> List[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Importer:
    """One kind of checkpoints.

    Attributes:
        name: short and unique.
        title: for people.
        rules: for a model; see :class:`d2ext.checkpoint.mapping.Rule`.
        project: whose models it is for; "" for all.
        unused: (regular expression, reason) of tensors that are left over.
        partial: it fills a part of a model, such as the backbone.
        prepare: brings the names of a file into the form of the rules; None to leave it alone.
        refuse: the reason why a file cannot be imported, or "".
        settings: what the model has to be set to, see :mod:`d2ext.checkpoint.settings`.
        notes: lines about what cannot be set.
        metadata: more to store in a converted checkpoint, e.g. ``thing_classes``.
        config: (config file of the project, overrides) that fits a file.
        exports: its rules can be used the other way round.
    """

    name: str
    title: str
    rules: Callable[[nn.Module], Sequence[Rule]]
    project: str = ""
    unused: Sequence[Tuple[str, str]] = ()
    partial: bool = False
    prepare: Callable[[Weights], Weights] = dict
    refuse: Callable[[Weights], str] = lambda weights: ""
    settings: Callable[[CheckpointFile, nn.Module], Dict[str, Any]] = _no_settings
    notes: Callable[[CheckpointFile, nn.Module], List[str]] = _no_lines
    metadata: Callable[[CheckpointFile], Dict[str, Any]] = lambda file: {}
    config: Optional[Callable[[CheckpointFile], Tuple[str, List[str]]]] = None
    exports: bool = False


_IMPORTERS: Dict[str, Importer] = {}


def register_importer(importer: Importer) -> Importer:
    """Add a kind of checkpoints; a later one of the same name replaces it."""
    _IMPORTERS[importer.name] = importer
    return importer


@functools.cache
def _load_importers() -> None:
    """Import the shared importers and those of every installed project."""
    importlib.import_module("d2ext.checkpoint.importers")
    load_projects()
    for entry in importlib.metadata.entry_points(group="d2ext.projects"):
        name = f"{entry.module}.importer"
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            continue  # load_projects() has said so
        if found is not None:
            importlib.import_module(name)


def importers(project: Optional[str] = None) -> List[Importer]:
    """All kinds, or those that models of a project can be loaded from."""
    _load_importers()
    return [x for x in _IMPORTERS.values() if project is None or x.project in ("", project)]


def find_importer(
    file: CheckpointFile, model: nn.Module, project: Optional[str] = None
) -> Tuple[Importer, Weights]:
    """The importer that has a use for most tensors of a file, and the file's weights as its rules
    name them.

    Raises:
        UserError: none knows the file, or the one that does refuses it.
    """
    shapes = shapes_of(model.state_dict())
    best, best_key = None, (0,)
    for importer in importers(project):
        weights = importer.prepare(file.weights)
        reason = importer.refuse(weights)
        if reason:
            raise UserError(f"checkpoint '{file.path}' ({importer.title}): {reason}")
        used, filled = used_names(weights, shapes, importer.rules(model))
        # Among equals, a backbone importer misses nothing, and a project knows its models best.
        key = (used, filled, importer.partial, bool(importer.project))
        if used and key > best_key:
            best, best_key = (importer, weights), key
    if best is None:
        raise UserError(
            f"checkpoint '{file.path}' has no weight of this model: it has "
            f"'{next(iter(file.weights), 'nothing')}' ..., the model has '{min(shapes)}' ..."
        )
    return best


def import_weights(
    file: CheckpointFile, model: nn.Module, project: Optional[str] = None
) -> Conversion:
    """Convert the weights of a foreign checkpoint for a model, which is not changed.

    Args:
        file: from :func:`d2ext.checkpoint.formats.read_file`.
        model: tells names, shapes and those settings that depend on it.
        project: consider only its importers and the shared ones.

    Raises:
        UserError: the kind of file is not known.
    """
    importer, weights = find_importer(file, model, project)
    conversion = convert_weights(
        shapes_of(model.state_dict()),
        weights,
        importer.rules(model),
        importer.unused,
        importer.partial,
    )
    conversion.title = importer.title
    conversion.settings = importer.settings(file, model)
    conversion.notes = importer.notes(file, model)
    conversion.metadata = {
        **importer.metadata(file),
        "imported_from": importer.title,
        SETTINGS_KEY: conversion.settings,
    }
    return conversion
