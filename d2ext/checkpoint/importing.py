"""The choice among the kinds of foreign checkpoints for a file, and its conversion.

Projects add theirs by a module `importer` in their package, which calls
`d2ext.checkpoint.registry.register_importer`; it is found through the same entry points as
their configs.
"""

import functools
import importlib.metadata
import importlib.util

from torch import nn

import d2ext.checkpoint.importers  # noqa: F401  registers the shared ones
from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.mapping import Conversion, convert_weights, shapes_of, used_names
from d2ext.checkpoint.registry import Importer, Weights, registered_importers
from d2ext.checkpoint.settings import SETTINGS_KEY
from d2ext.config.projects import load_projects
from d2ext.errors import UserError


@functools.cache
def _import_those_of_projects() -> None:
    loaded = load_projects()  # which names those that cannot be imported
    for entry in importlib.metadata.entry_points(group="d2ext.projects"):
        name = f"{entry.module}.importer"
        if entry.name in loaded and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def list_importers(project: str | None = None) -> list[Importer]:
    """All kinds, or those that models of a project can be loaded from."""
    _import_those_of_projects()
    return [x for x in registered_importers() if project is None or x.project in ("", project)]


def find_importer(
    file: CheckpointFile, model: nn.Module, project: str | None = None
) -> tuple[Importer, Weights]:
    """The importer that has a use for most tensors of a file, and the file's weights as its rules
    name them.

    Raises:
        UserError: none knows the file, or the one that does refuses it.
    """
    shapes = shapes_of(model.state_dict())
    best, best_key = None, (0,)
    for importer in list_importers(project):
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
    file: CheckpointFile, model: nn.Module, project: str | None = None
) -> Conversion:
    """Convert the weights of a foreign checkpoint for a model, which is not changed.

    Args:
        file: from `d2ext.checkpoint.formats.read_file`.
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
