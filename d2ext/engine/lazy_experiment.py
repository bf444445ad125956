"""A run described by a lazy config."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import Module

from d2ext.config.overrides import lazy_keys
from d2ext.engine.building import build_lazy, lazy_settings, read_field, select
from d2ext.engine.experiment import Experiment
from d2ext.errors import UserError
from d2ext.evaluation import build_evaluator

from detectron2.config import LazyConfig

# Of lazy configs without `train.test_aug`.
NO_TEST_AUG = {"enabled": False, "min_sizes": [], "max_size": 4000, "flip": True}


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
        self.amp_dtype = read_field(self.cfg, "train.amp.dtype", str, "float16")
        self.accumulation_steps = read_field(self.cfg, "train.accumulation_steps", int, 1)
        self.ema_decay = float(read_field(self.cfg, "train.ema_decay", (float, int), 0.0))
        self.freeze = read_field(self.cfg, "train.freeze", list, [])
        self.log_writers = read_field(self.cfg, "train.log_writers", list, [])
        self.log_period = read_field(self.cfg, "train.log_period", int)
        self.ddp = read_field(self.cfg, "train.ddp", dict, {})
        self.image_format = read_field(self.cfg, "dataloader.test.mapper.image_format", str)
        self.test_aug = read_field(self.cfg, "train.test_aug", dict, NO_TEST_AUG)

    def write_config(self, path: str) -> None:
        LazyConfig.save(self.cfg, path)

    def _settings(self) -> dict[str, Any]:
        return lazy_settings(self.cfg.model, "model")

    def build_model(self) -> Module:
        with self.part_weights():
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
        node = self.cfg.dataloader.get("evaluator", OmegaConf.create())
        options: Any = OmegaConf.to_container(node)
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

    def registered(self) -> list[str]:
        return list(self.cfg.dataloader.get("register", ()))

    def set_paths(self, output_dir: str, weights: str) -> None:
        self.cfg.train.output_dir, self.cfg.train.init_checkpoint = output_dir, weights

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
