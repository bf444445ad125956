"""The built-in data set `shapes`, small images and batches of four, for CPUs."""

from .coco_instance import dataloader

dataloader.train.dataset = ["shapes_train"]
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 0
dataloader.train.mapper.mask_format = "bitmask"
dataloader.train.mapper.augmentations[0].short_edge_length = [128]
dataloader.train.mapper.augmentations[0].max_size = 320
dataloader.test.dataset = ["shapes_val"]
dataloader.test.mapper.augmentations[0].short_edge_length = 128
dataloader.test.mapper.augmentations[0].max_size = 320
