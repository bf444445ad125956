"""Data sets, input mapper and loaders. Call `register_all()` before using a data set by name."""

from d2ext import compat

compat.patch_data()

from .build import (  # noqa: E402
    GlobalBatchSampler,
    build_test_loader,
    build_train_loader,
    get_dataset_records,
)
from .builtin import register_all  # noqa: E402
from .catalog import dataset_classes  # noqa: E402
from .check import check_before_training, check_dataset, check_files  # noqa: E402
from .mapper import InstanceSegMapper  # noqa: E402
from .register import parse_register, register_coco_dataset  # noqa: E402
from .semantic import semantic_from_instances, semantic_num_labels  # noqa: E402
from .shapes import register_shapes  # noqa: E402

__all__ = [
    "GlobalBatchSampler",
    "InstanceSegMapper",
    "build_test_loader",
    "build_train_loader",
    "check_before_training",
    "check_dataset",
    "check_files",
    "dataset_classes",
    "get_dataset_records",
    "parse_register",
    "register_all",
    "register_coco_dataset",
    "register_shapes",
    "semantic_from_instances",
    "semantic_num_labels",
]
