"""What a kind of foreign checkpoints is, and the kinds that are registered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.mapping import Rule

Weights = dict[str, torch.Tensor]


def _no_settings(file: CheckpointFile, model: nn.Module) -> dict[str, Any]:
    return {}


def _no_lines(file: CheckpointFile, model: nn.Module) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Importer:
    """One kind of checkpoints.

    Attributes:
        name: short and unique.
        title: for people.
        rules: for a model; see `d2ext.checkpoint.mapping.Rule`.
        project: whose models it is for; "" for all.
        unused: (regular expression, reason) of tensors that are left over.
        partial: it fills a part of a model, such as the backbone.
        prepare: brings the names of a file into the form of the rules; None to leave it alone.
        refuse: the reason why a file cannot be imported, or "".
        settings: what the model has to be set to, see `d2ext.checkpoint.settings`.
        notes: lines about what cannot be set.
        metadata: more to store in a converted checkpoint, e.g. `thing_classes`.
        config: (config file of the project, overrides) that fits a file.
        exports: its rules can be used the other way round.
    """

    name: str
    title: str
    rules: Callable[[nn.Module], Sequence[Rule]]
    project: str = ""
    unused: Sequence[tuple[str, str]] = ()
    partial: bool = False
    prepare: Callable[[Weights], Weights] = dict
    refuse: Callable[[Weights], str] = lambda weights: ""
    settings: Callable[[CheckpointFile, nn.Module], dict[str, Any]] = _no_settings
    notes: Callable[[CheckpointFile, nn.Module], list[str]] = _no_lines
    metadata: Callable[[CheckpointFile], dict[str, Any]] = lambda file: {}
    config: Callable[[CheckpointFile], tuple[str, list[str]]] | None = None
    exports: bool = False


_IMPORTERS: dict[str, Importer] = {}


def register_importer(importer: Importer) -> Importer:
    """Add a kind of checkpoints; a later one of the same name replaces it."""
    _IMPORTERS[importer.name] = importer
    return importer


def registered_importers() -> list[Importer]:
    """Those registered so far; `d2ext.checkpoint.importing.list_importers` knows all."""
    return list(_IMPORTERS.values())
