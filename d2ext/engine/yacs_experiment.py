"""A run described by a yaml config."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Module

from d2ext.config import check_registered_names
from d2ext.config.overrides import yaml_keys
from d2ext.data import CopyPaste, InstanceSegMapper, build_test_loader, build_train_loader
from d2ext.engine.building import building
from d2ext.engine.experiment import Experiment
from d2ext.evaluation import build_evaluator
from d2ext.solver import build_lr_multiplier, build_optimizer

from detectron2.config import CfgNode


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
        self.amp_dtype = cfg.SOLVER.AMP.DTYPE
        self.accumulation_steps = cfg.SOLVER.ACCUMULATION_STEPS
        self.ema_decay = float(cfg.SOLVER.EMA_DECAY)
        self.freeze = list(cfg.SOLVER.FREEZE)
        self.checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
        self.checkpoint_keep = cfg.SOLVER.CHECKPOINT_KEEP
        self.eval_period = cfg.TEST.EVAL_PERIOD
        self.best_metric = cfg.TEST.BEST_METRIC
        self.early_stopping = cfg.TEST.EARLY_STOPPING
        self.skip_nonfinite = cfg.SOLVER.SKIP_NONFINITE
        self.log_period = cfg.LOG_PERIOD
        self.log_writers = list(cfg.LOG_WRITERS)
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

    def _settings(self) -> dict[str, Any]:
        return {key: self.setting(key, "") for key in yaml_keys(self.cfg)}

    def build_model(self) -> Module:
        from detectron2.modeling import build_model

        check_registered_names(self.cfg)
        with self.part_weights(), building("the model", self._settings):
            return build_model(self.cfg)

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
            copy_paste = CopyPaste(cfg)
        return build_train_loader(
            self.train_sets(),
            mapper=mapper,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=self.seed,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            start_iter=start_iter,
            copy_paste=copy_paste,
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

    def registered(self) -> list[str]:
        return list(self.cfg.DATASETS.REGISTER)

    def set_paths(self, output_dir: str, weights: str) -> None:
        self.cfg.defrost()
        self.cfg.OUTPUT_DIR, self.cfg.MODEL.WEIGHTS = output_dir, weights

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
