"""What the training loop needs to know about a run, read from either kind of config.

`Experiment` is the interface; `YacsExperiment` reads a detectron2 `CfgNode` (yaml) and
`LazyExperiment` an omegaconf `DictConfig`. Nothing else in the engine looks into a config.
"""

import abc
import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn import Module

from d2ext.config.overrides import (
    LAZY_TO_YAML,
    YAML_TO_LAZY,
    apply_to_lazy,
    apply_to_yaml,
    parse_overrides,
)
from d2ext.data import dataset_classes, semantic_num_labels
from d2ext.engine.building import building
from d2ext.modeling.backbone.timm import without_part_weights

from detectron2.config import CfgNode


class Experiment(abc.ABC):
    """One run: its settings, and builders for its parts."""

    cfg: CfgNode | DictConfig
    output_dir: str
    init_checkpoint: str
    device: str
    cudnn_benchmark: bool
    seed: int
    max_iter: int
    amp: bool
    amp_dtype: str
    accumulation_steps: int
    ema_decay: float
    freeze: list[str]
    checkpoint_period: int
    checkpoint_keep: int
    eval_period: int
    best_metric: str
    early_stopping: int
    skip_nonfinite: bool
    log_period: int
    log_writers: list[str]
    ddp: dict[str, Any]
    image_format: str
    # Test-time augmentation of --eval-only: enabled, and its min_sizes, max_size, flip.
    test_aug: dict[str, Any]
    # Whether the command line named the weights, rather than the config.
    weights_chosen: bool = False
    # Whether weights of the whole model follow that the config does not name.
    weights_follow: bool = False
    # Keys that the command line sets.
    chosen: frozenset[str] = frozenset()
    # Whether classes of other names than those of the weights are the same ones.
    rename_classes: bool = False
    # `--register` arguments that are looked at only if a checkpoint has no class names.
    unread: Sequence[str] = ()
    # What the command line asks of a recipe, see `d2ext.engine.recipe`.
    recipe_options: Mapping[str, Any] = MappingProxyType({})

    def note_chosen(self, overrides: Sequence[str]) -> None:
        """Remember which keys the command line sets: what the user says wins over a file."""
        keys = {override.key for override in parse_overrides(overrides)}
        both = [{key, YAML_TO_LAZY.get(key, key), LAZY_TO_YAML.get(key, key)} for key in keys]
        self.chosen = frozenset().union(*both)
        self.weights_chosen = "MODEL.WEIGHTS" in self.chosen

    def change(self, overrides: Sequence[str]) -> None:
        """Set keys of the config, each under its name in this kind of config or the other."""
        apply = apply_to_lazy if isinstance(self.cfg, DictConfig) else apply_to_yaml
        apply(self.cfg, parse_overrides(overrides))
        self._read()

    @abc.abstractmethod
    def _read(self) -> None:
        """Take the attributes from the config."""

    @abc.abstractmethod
    def write_config(self, path: str) -> None:
        """Write the complete config as a yaml file, which `--config-file` takes again."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Keys and values of what a model is made of, for messages."""

    def part_weights(self) -> contextlib.AbstractContextManager:
        """In which parts of the model are built with weights of their own, unless those of the
        whole model follow."""
        follow = self.weights_follow or self.init_checkpoint
        return without_part_weights() if follow else contextlib.nullcontext()

    def first_step(self) -> contextlib.AbstractContextManager:
        """In which mistakes of the settings that show when a model runs become one line."""
        return building("the first iteration", self._settings, "computed")

    @abc.abstractmethod
    def build_model(self) -> Module:
        """The model in training mode, on `device`, without loaded weights."""

    @abc.abstractmethod
    def build_optimizer(self, model: Module) -> torch.optim.Optimizer:
        """The optimiser of `model`'s trainable parameters."""

    @abc.abstractmethod
    def build_lr_multiplier(self):
        """fvcore `ParamScheduler` giving the factor of the learning rate."""

    @abc.abstractmethod
    def build_train_loader(self, start_iter: int = 0):
        """Infinite loader of batches, continuing at `start_iter`."""

    @abc.abstractmethod
    def build_test_loader(self, dataset_name: str):
        """Loader over one test set."""

    @abc.abstractmethod
    def build_evaluator(self, dataset_name: str):
        """Evaluator of one test set."""

    @abc.abstractmethod
    def train_sets(self) -> list[str]:
        """Names of the training sets."""

    @abc.abstractmethod
    def test_sets(self) -> list[str]:
        """Names of the test sets."""

    @abc.abstractmethod
    def test_augmentations(self) -> list:
        """detectron2 augmentations applied to a test image."""

    @abc.abstractmethod
    def num_classes(self) -> int:
        """Number of thing classes the model is configured for."""

    @abc.abstractmethod
    def set_num_classes(self, things: int, semantic: int | None = None) -> None:
        """Configure the model for so many classes (and labels of its semantic branch, if any)."""

    @abc.abstractmethod
    def registered(self) -> list[str]:
        """The `--register` arguments in the config."""

    @abc.abstractmethod
    def set_paths(self, output_dir: str, weights: str) -> None:
        """Set the output folder and the file of the weights in the config."""

    @abc.abstractmethod
    def set_registered(self, texts: Sequence[str]) -> None:
        """Remember `--register` arguments in the config, so that a saved one is complete."""

    @abc.abstractmethod
    def set_device(self, device: str) -> None:
        """Use another device than the config names."""

    @abc.abstractmethod
    def semantic_mode(self) -> str:
        """The mapper's `semantic` option."""

    @abc.abstractmethod
    def setting(self, yaml: str, lazy: str) -> Any:
        """The value of a key that both kinds may have, lists as such; `None` without it."""

    @abc.abstractmethod
    def name_of(self, yaml: str, lazy: str) -> str:
        """What a key is called in this kind of config."""

    def metadata(self) -> dict[str, Any]:
        """Plain values that travel with the weights."""
        names = self.train_sets() or self.test_sets()
        if not names:
            return {}
        known: dict[str, Any] = {"thing_classes": dataset_classes(names)}
        known["train_sets"] = list(self.train_sets())
        if self.semantic_mode() != "none" and self.train_sets():
            known["semantic_labels"] = semantic_num_labels(self.train_sets(), self.semantic_mode())
        return known
