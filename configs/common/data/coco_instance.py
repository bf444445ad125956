"""COCO 2017 instance segmentation, 16 images per iteration."""

from d2ext.data import CopyPaste, InstanceSegMapper, build_test_loader, build_train_loader

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

dataloader = dict(
    # People's own COCO-format data: "NAME=annotations.json,image_dir[,semantic_dir]" each.
    register=[],
    train=L(build_train_loader)(
        dataset=["coco_2017_train"],
        mapper=L(InstanceSegMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=[640, 672, 704, 736, 768, 800],
                    sample_style="choice",
                    max_size=1333,
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="BGR",
            mask_format="polygon",
            semantic="none",
            num_classes="${model.roi_heads.num_classes}",
            # Objects with fewer pixels after the augmentation are left out.
            min_area=0,
        ),
        # Objects of one image pasted into a share `prob` of the others.
        copy_paste=L(CopyPaste)(
            prob=0.0,
            max_objects=100,
            min_visible=0.05,
            min_area="${dataloader.train.mapper.min_area}",
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
        aspect_ratio_grouping=True,
        filter_empty=True,
    ),
    test=L(build_test_loader)(
        dataset=["coco_2017_val"],
        mapper=L(InstanceSegMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="${dataloader.train.mapper.image_format}",
            semantic="none",
        ),
        num_workers="${dataloader.train.num_workers}",
    ),
    # Arguments of d2ext.evaluation.build_evaluator.
    evaluator=dict(
        # Measured in addition to what a data set asks for: "coco", "boundary", "voc_sds" (mAP^r).
        metrics=[],
        mapr_ious=[0.5, 0.7],
        mapr_area=False,
    ),
)
