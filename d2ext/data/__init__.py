"""Data sets, input mapper and loaders. Importing it registers the built-in data sets."""

from d2ext import compat

compat.patch_data()

from d2ext.data.augment import ColorJitter, LargeScaleJitter
from d2ext.data.build import (
    GlobalBatchSampler,
    build_test_loader,
    build_train_loader,
    get_dataset_records,
)
from d2ext.data.builtin import register_all
from d2ext.data.catalog import dataset_classes
from d2ext.data.check import check_before_training, check_dataset, check_files
from d2ext.data.copy_paste import CopyPaste
from d2ext.data.mapper import InstanceSegMapper
from d2ext.data.register import parse_register, register_coco_dataset
from d2ext.data.semantic import semantic_from_instances, semantic_num_labels
from d2ext.data.shapes import register_shapes

__all__ = [
    "ColorJitter",
    "CopyPaste",
    "GlobalBatchSampler",
    "InstanceSegMapper",
    "LargeScaleJitter",
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

register_all()
