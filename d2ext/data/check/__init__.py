"""The data check: what is wrong with annotations, images and semantic maps, before a training."""

from d2ext.data.check.dataset import check_before_training, check_dataset, check_files

__all__ = ["check_before_training", "check_dataset", "check_files"]
