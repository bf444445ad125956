"""PASCAL VOC 2012 with the SDS split of SBD, 600 by at most 1000 pixels, 8 images per iteration:
what MNC and FCIS train on."""

from .coco_instance import dataloader

dataloader.train.dataset = ["voc_sds_train"]
dataloader.train.total_batch_size = 8
dataloader.train.mapper.mask_format = "bitmask"
dataloader.train.mapper.augmentations[0].short_edge_length = [600]
dataloader.train.mapper.augmentations[0].max_size = 1000
dataloader.test.dataset = ["voc_sds_val"]
dataloader.test.mapper.augmentations[0].short_edge_length = 600
dataloader.test.mapper.augmentations[0].max_size = 1000
