"""What the training loop needs to know about a run, read from either kind of config.

`Experiment` is the interface; its two subclasses read a detectron2 `CfgNode` (yaml) and an
omegaconf `DictConfig` (lazy). Nothing else in the engine looks into a config.
"""

import abc
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import Module

from d2ext.config import check_registered_names
from d2ext.config.overrides import lazy_keys, yaml_keys
from d2ext.data import (
    InstanceSegMapper,
    build_test_loader,
    build_train_loader,
    dataset_classes,
    semantic_num_labels,
)
from d2ext.engine.building import build_lazy, building, read_field, select
from d2ext.errors import UserError
from d2ext.evaluation import build_evaluator
from d2ext.solver import build_lr_multiplier, build_optimizer

from detectron2.config import CfgNode, LazyConfig

# Of lazy configs without `train.test_aug`.
NO_TEST_AUG = {"enabled": False, "min_sizes": [], "max_size": 4000, "flip": True}


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
    checkpoint_period: int
    checkpoint_keep: int
    eval_period: int
    best_metric: str
    early_stopping: int
    skip_nonfinite: bool
    log_period: int
    ddp: dict[str, Any]
    image_format: str
    # Test-time augmentation of --eval-only: enabled, and its min_sizes, max_size, flip.
    test_aug: dict[str, Any]
    # Whether the command line named the weights, rather than the config.
    weights_chosen: bool = False

    @abc.abstractmethod
    def write_config(self, path: str) -> None:
        """Write the complete config as a yaml file, which `--config-file` takes again."""

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
        known = {"thing_classes": dataset_classes(names), "train_sets": list(self.train_sets())}
        if self.semantic_mode() != "none" and self.train_sets():
            known["semantic_labels"] = semantic_num_labels(self.train_sets(), self.semantic_mode())
        return known


class YacsExperiment(Experiment):
    """A run described by a yaml config."""

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self._read()

    def _read(self) -> None:
        cfg = self.cfg
        self.output_dir = cfg.OUTPUT_DIR
        self.init_checkpoint = cfg.MODEL.WEIGHTS
        self.device = cfg.MODEL.DEVICE
        self.cudnn_benchmark = cfg.CUDNN_BENCHMARK
        self.seed = cfg.SEED
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.amp = cfg.SOLVER.AMP.ENABLED
        self.checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
        self.checkpoint_keep = cfg.SOLVER.CHECKPOINT_KEEP
        self.eval_period = cfg.TEST.EVAL_PERIOD
        self.best_metric = cfg.TEST.BEST_METRIC
        self.early_stopping = cfg.TEST.EARLY_STOPPING
        self.skip_nonfinite = cfg.SOLVER.SKIP_NONFINITE
        self.log_period = cfg.LOG_PERIOD
        self.ddp = {}
        self.image_format = cfg.INPUT.FORMAT
        self.test_aug = {
            "enabled": cfg.TEST.AUG.ENABLED,
            "min_sizes": list(cfg.TEST.AUG.MIN_SIZES),
            "max_size": cfg.TEST.AUG.MAX_SIZE,
            "flip": cfg.TEST.AUG.FLIP,
        }

    def write_config(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write(self.cfg.dump())

    def build_model(self) -> Module:
        from detectron2.modeling import build_model

        check_registered_names(self.cfg)
        with building("the model", self._settings):
            return build_model(self.cfg)

    def _settings(self) -> dict[str, Any]:
        return {key: self.setting(key, "") for key in yaml_keys(self.cfg)}

    def build_optimizer(self, model: Module) -> torch.optim.Optimizer:
        with building("the optimizer", self._settings):
            return build_optimizer(self.cfg, model)

    def build_lr_multiplier(self):
        with building("the learning rate schedule", self._settings):
            return build_lr_multiplier(self.cfg)

    def build_train_loader(self, start_iter: int = 0):
        cfg = self.cfg
        with building("the input of the training", self._settings):
            mapper = InstanceSegMapper(cfg, is_train=True)
        return build_train_loader(
            self.train_sets(),
            mapper=mapper,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=self.seed,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            start_iter=start_iter,
        )

    def build_test_loader(self, dataset_name: str):
        with building("the input of the test", self._settings):
            mapper = InstanceSegMapper(self.cfg, is_train=False)
        return build_test_loader(
            dataset_name,
            mapper=mapper,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )

    def build_evaluator(self, dataset_name: str):
        test = self.cfg.TEST
        return build_evaluator(
            dataset_name,
            self.output_dir,
            metrics=list(test.METRICS),
            mapr_ious=list(test.MAPR_IOUS),
            mapr_area=test.MAPR_AREA,
            max_detections=test.DETECTIONS_PER_IMAGE,
        )

    def train_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TRAIN)

    def test_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TEST)

    def test_augmentations(self) -> list:
        from detectron2.data.detection_utils import build_augmentation

        return build_augmentation(self.cfg, is_train=False)

    def num_classes(self) -> int:
        return self.cfg.MODEL.ROI_HEADS.NUM_CLASSES

    def set_num_classes(self, things: int, semantic: int | None = None) -> None:
        self.cfg.defrost()
        self.cfg.MODEL.ROI_HEADS.NUM_CLASSES = things
        if semantic is not None:
            self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = semantic

    def set_registered(self, texts: Sequence[str]) -> None:
        self.cfg.defrost()
        self.cfg.DATASETS.REGISTER = tuple(texts)

    def set_device(self, device: str) -> None:
        self.cfg.defrost()
        self.device = self.cfg.MODEL.DEVICE = device

    def semantic_mode(self) -> str:
        return self.cfg.INPUT.SEMANTIC

    def setting(self, yaml: str, lazy: str) -> Any:
        value = self.cfg
        for part in yaml.split("."):
            value = value[part]
        return list(value) if isinstance(value, tuple) else value

    def name_of(self, yaml: str, lazy: str) -> str:
        return yaml


class LazyExperiment(Experiment):
    """A run described by a lazy config; see `configs/common` for the fields."""

    # Where a model keeps its number of classes.
    CLASSES_KEY = "model.roi_heads.num_classes"
    # Endings of the keys of the number of detections in an image at most.
    LIMITS = ("test_topk_per_image", ".max_per_image")
    # Where a semantic branch may keep its number of labels.
    SEMANTIC_KEYS = ("model.roi_heads.semantic_head.num_classes", "model.sem_seg_head.num_classes")

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self._read()

    def _read(self) -> None:
        if select(self.cfg, self.CLASSES_KEY) is None:
            raise UserError(
                f"the lazy config has no {self.CLASSES_KEY}, which is set to the number of classes "
                "of the data; refer to it where else the model needs that number"
            )
        self.output_dir = read_field(self.cfg, "train.output_dir", str)
        self.init_checkpoint = read_field(self.cfg, "train.init_checkpoint", str, "")
        self.device = read_field(self.cfg, "train.device", str)
        self.cudnn_benchmark = read_field(self.cfg, "train.cudnn_benchmark", bool, False)
        self.seed = read_field(self.cfg, "train.seed", int)
        self.max_iter = read_field(self.cfg, "train.max_iter", int)
        self.amp = read_field(self.cfg, "train.amp.enabled", bool)
        self.checkpoint_period = read_field(self.cfg, "train.checkpointer.period", int)
        self.checkpoint_keep = read_field(self.cfg, "train.checkpointer.max_to_keep", int)
        self.eval_period = read_field(self.cfg, "train.eval_period", int)
        # A lazy config of one's own may do without these.
        self.best_metric = read_field(self.cfg, "train.best_metric", str, "")
        self.early_stopping = read_field(self.cfg, "train.early_stopping", int, 0)
        self.skip_nonfinite = read_field(self.cfg, "train.skip_nonfinite", bool, False)
        self.log_period = read_field(self.cfg, "train.log_period", int)
        self.ddp = read_field(self.cfg, "train.ddp", dict, {})
        self.image_format = read_field(self.cfg, "dataloader.test.mapper.image_format", str)
        self.test_aug = read_field(self.cfg, "train.test_aug", dict, NO_TEST_AUG)

    def write_config(self, path: str) -> None:
        LazyConfig.save(self.cfg, path)

    def build_model(self) -> Module:
        model = build_lazy(self.cfg.model, "model")
        return model.to(torch.device(self.device))

    def build_optimizer(self, model: Module) -> torch.optim.Optimizer:
        node = self.cfg.optimizer
        if not OmegaConf.is_dict(node):
            return build_lazy(node, "optimizer")  # says so
        # detectron2's own: L(SGD)(params=L(get_default_optimizer_params)(...), ...)
        owner = node.params if OmegaConf.is_dict(node.get("params")) else node
        owner.model = model
        try:
            return build_lazy(node, "optimizer")
        finally:
            del owner["model"]  # a saved config must not drag the weights along

    def build_lr_multiplier(self):
        return build_lazy(self.cfg.lr_multiplier, "lr_multiplier")

    def build_train_loader(self, start_iter: int = 0):
        node = self.cfg.dataloader.train.copy()
        node._set_parent(self.cfg.dataloader)
        node.start_iter = start_iter
        return build_lazy(node, "dataloader.train")

    def build_test_loader(self, dataset_name: str):
        node = self.cfg.dataloader.test.copy()
        node._set_parent(self.cfg.dataloader)
        node.dataset = dataset_name
        return build_lazy(node, "dataloader.test")

    def build_evaluator(self, dataset_name: str):
        # A lazy config of one's own may do without the node.
        options = OmegaConf.to_container(self.cfg.dataloader.get("evaluator", OmegaConf.create()))
        keys = [k for k in lazy_keys(self.cfg.model) if k.endswith(self.LIMITS)]
        limits = [OmegaConf.select(self.cfg.model, key) for key in keys]
        if limits:
            options.setdefault("max_detections", -1 if min(limits) < 0 else max(limits))
        return build_evaluator(dataset_name, self.output_dir, **options)

    def train_sets(self) -> list[str]:
        return self._data_sets("dataloader.train.dataset")

    def test_sets(self) -> list[str]:
        return self._data_sets("dataloader.test.dataset")

    def _data_sets(self, key: str) -> list[str]:
        value = read_field(self.cfg, key, (str, list), [])
        return [value] if isinstance(value, str) else value

    def test_augmentations(self) -> list:
        key = "dataloader.test.mapper.augmentations"
        nodes = OmegaConf.select(self.cfg, key) or []
        return [build_lazy(node, f"{key}.{i}") for i, node in enumerate(nodes)]

    def num_classes(self) -> int:
        return OmegaConf.select(self.cfg, self.CLASSES_KEY)

    def set_num_classes(self, things: int, semantic: int | None = None) -> None:
        OmegaConf.update(self.cfg, self.CLASSES_KEY, things)
        if semantic is not None:
            for key in self.SEMANTIC_KEYS:
                if OmegaConf.select(self.cfg, key) is not None:
                    OmegaConf.update(self.cfg, key, semantic)

    def set_registered(self, texts: Sequence[str]) -> None:
        self.cfg.dataloader.register = list(texts)

    def set_device(self, device: str) -> None:
        self.device = self.cfg.train.device = device

    def semantic_mode(self) -> str:
        return self.setting("", "dataloader.train.mapper.semantic") or "none"

    def setting(self, yaml: str, lazy: str) -> Any:
        return select(self.cfg, lazy)

    def name_of(self, yaml: str, lazy: str) -> str:
        return lazy
