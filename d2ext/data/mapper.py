"""InstanceSegMapper: turns a detectron2 data set record into the input of a model."""

import functools
import logging
import warnings

import numpy as np
import torch

from d2ext.data.augment import LargeScaleJitter, add_augmentations
from d2ext.data.check.images import DECODE_ERRORS, map_finding, read_header, unsupported
from d2ext.data.check.masks import check_masks
from d2ext.data.cropped_masks import CroppedBitMasks
from d2ext.data.loader import UnreadableImageError
from d2ext.data.random_state import seeded_generators
from d2ext.data.semantic import IGNORE_LABEL, check_semantic_mode, semantic_from_crops
from d2ext.data.transformed import MaskTransforms, transform_boxes, transform_polygons
from d2ext.errors import UserError

from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances, PolygonMasks

logger = logging.getLogger(__name__)

_LEAST_SIDE = 1e-5  # in pixels; detectron2 leaves out smaller boxes


class InstanceSegMapper(DatasetMapper):
    """detectron2's mapper plus semantic ground truth, reproducible augmentation and file checks.

    Training output, per image: the record's `file_name, image_id, height, width` (original size),
    `image` (uint8 (3, H, W), augmented), `instances` (`gt_boxes`, `gt_classes`, `gt_masks`; crowd
    regions removed; the three fields exist even when there is no object), `sem_seg` (uint8 (H, W),
    255 = ignore; absent with semantic="none") and `sample_seed` when the loader set one.
    Test output: `file_name, image_id, height, width, image`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        mask_format: str = "bitmask",
        semantic: str = "auto",
        num_classes: int | None = None,
        num_semantic_labels: int | None = None,
        recompute_boxes: bool | None = None,
        min_area: int = 0,
    ):
        """
        Args:
            is_train: whether annotations are produced.
            augmentations: augmentations or fixed transforms.
            image_format: as in `detectron2.data.detection_utils.read_image`.
            mask_format: "bitmask" (any annotation; keeps holes) or "polygon" (polygons only).
            semantic: where `sem_seg` comes from. "dataset": the record's `sem_seg_file_name`, which
                must exist; "instances": derived from the instance masks at the augmented size,
                see `semantic_from_instances`; "auto": the former where a record has a map, else
                the latter; "none": no `sem_seg`.
            num_classes: K, needed to derive `sem_seg`.
            num_semantic_labels: S; when given, labels of S or more (other than 255) are an error.
            recompute_boxes: replace the boxes by the tight boxes of the augmented masks. Default:
                yes for bitmasks, where it is exact, and after `LargeScaleJitter`, which cuts
                objects; no for other polygons.
            min_area: objects with fewer pixels after the augmentation are left out.
        """
        check_semantic_mode(semantic)
        if mask_format not in ("bitmask", "polygon"):
            raise UserError(
                f"unknown mask format {mask_format!r}; use 'bitmask' or 'polygon' "
                "(INPUT.MASK_FORMAT / dataloader.train.mapper.mask_format)"
            )
        if is_train and semantic in ("auto", "instances") and num_classes is None:
            raise UserError(f"semantic mode {semantic!r} needs num_classes of the mapper")
        super().__init__(
            is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=True,
            instance_mask_format=mask_format,
        )
        if min_area < 0:
            raise UserError(
                f"the least area of objects (INPUT.MIN_MASK_AREA) is {min_area}; 0 keeps all"
            )
        # Its polygons reach beyond the image; their bitmaps do not.
        self.cut_polygons = any(isinstance(a, LargeScaleJitter) for a in augmentations)
        if recompute_boxes is None:
            recompute_boxes = mask_format == "bitmask" or self.cut_polygons
        # The parent cannot recompute the boxes of an image without objects.
        self.tight_boxes = recompute_boxes
        self.min_area = min_area
        self.semantic = semantic
        self.num_classes = num_classes
        self.num_semantic_labels = num_semantic_labels

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        base = super().from_config(cfg, is_train)
        # INPUT.SEMANTIC is a key of d2ext.config; a plain detectron2 config lacks it, and its
        # number of labels is then a mere default.
        own_config = "SEMANTIC" in cfg.INPUT
        augmentations = base["augmentations"]
        if is_train and own_config:
            augmentations = add_augmentations(cfg, augmentations)
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": base["image_format"],
            "mask_format": base["instance_mask_format"],
            "semantic": cfg.INPUT.SEMANTIC if own_config else "auto",
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "num_semantic_labels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES if own_config else None,
            # Cropping cuts objects, so the annotated boxes are no longer tight.
            "recompute_boxes": base["recompute_boxes"] or None,
            "min_area": cfg.INPUT.MIN_MASK_AREA if own_config else 0,
        }

    def __call__(self, dataset_dict):
        """Load one image; never returns None.

        Args:
            dataset_dict: a detectron2 record, not modified. With `sample_seed` (int), the
                augmentation depends on this number only.

        Returns:
            see the class.

        Raises:
            UserError: image or map unreadable (`UnreadableImageError`) or of another size than the
                record says, a mask of the wrong size, labels out of range.
        """
        record = dict(dataset_dict)
        _check_image(record)
        if not self.is_train or self.semantic in ("none", "instances"):
            record.pop("sem_seg_file_name", None)
        if self.is_train:
            record.setdefault("annotations", [])
            self._check_record(record)
        with seeded_generators(record.get("sample_seed")), warnings.catch_warnings():
            # Pillow's images are read-only arrays, from which the transforms only copy.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            try:
                return self._load(record)
            except utils.SizeMismatchError as e:
                raise UserError(" ".join(str(e).split())) from e
            except DECODE_ERRORS as e:
                raise UnreadableImageError(_unreadable(record, e)) from e

    def _load(self, record):
        """What detectron2's mapper does, which copies all annotations and transforms them one by
        one."""
        record = dict(record)
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        labels = None
        if "sem_seg_file_name" in record:
            labels = utils.read_image(record.pop("sem_seg_file_name"), "L").squeeze(2)
        augmented = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(augmented)
        image, labels = augmented.image, augmented.sem_seg
        record["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if labels is not None:
            record["sem_seg"] = torch.from_numpy(np.array(labels, np.uint8))
        if self.is_train:
            self._transform_annotations(record, transforms, image.shape[:2])
        else:
            record.pop("annotations", None)
        return record

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        annotations = dataset_dict.pop("annotations")
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        moving = MaskTransforms(
            transforms, (dataset_dict["height"], dataset_dict["width"]), image_shape
        )
        derive = self.semantic != "none" and "sem_seg" not in dataset_dict
        instances, masks = self._instances(objects, moving, derive)
        dataset_dict["instances"] = instances
        if self.semantic == "none":
            return
        if derive:
            if self.semantic == "auto":
                _log_derivation()
            crowd = [a["segmentation"] for a in annotations if a.get("iscrowd", 0)]
            dataset_dict["sem_seg"] = semantic_from_crops(
                masks, instances.gt_classes.numpy(), self.num_classes, moving(crowd)
            )
        # The fill value of the transforms would be taken for a class (v0.6 pads label maps with
        # the image's padding value).
        outside = moving.outside()
        if outside is not None:
            dataset_dict["sem_seg"].numpy()[outside] = IGNORE_LABEL
        self._check_labels(dataset_dict)

    def _instances(self, objects, moving, draw):
        """The objects, transformed, and their masks in pixels: of polygons, if `draw` or if boxes
        or areas are to be made of them."""
        segmentations = [a["segmentation"] for a in objects]
        bitmask = self.instance_mask_format == "bitmask"
        polygons, masks = None, None
        if not bitmask:
            polygons = _transform_polygons(segmentations, moving.transforms)
        if bitmask or draw or self.cut_polygons or self.min_area:
            masks = moving(segmentations, polygons)
        try:
            boxes = transform_boxes(objects, moving.transforms, moving.new_size)
        except NotImplementedError:  # then the masks are bitmaps
            boxes = masks.boxes
        boxes = Boxes(torch.from_numpy(boxes))
        keep = boxes.nonempty(threshold=_LEAST_SIDE).numpy()
        keep &= masks.areas > 0 if bitmask else np.array([len(p) > 0 for p in polygons], bool)
        if self.tight_boxes and polygons is not None and not self.cut_polygons:
            boxes = PolygonMasks(polygons).get_bounding_boxes()
        elif self.tight_boxes:
            boxes = Boxes(torch.from_numpy(masks.boxes))
        if self.cut_polygons or self.min_area:
            keep &= masks.areas >= max(self.min_area, 1)
        rows = np.flatnonzero(keep)
        masks = masks[rows] if masks is not None else None
        instances = Instances(moving.new_size)
        instances.gt_boxes = boxes[torch.from_numpy(rows)]
        classes = [int(objects[i]["category_id"]) for i in rows]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if bitmask:
            instances.gt_masks = CroppedBitMasks(masks)
        else:
            instances.gt_masks = PolygonMasks([polygons[i] for i in rows])
        return instances, masks

    def _check_labels(self, dataset_dict):
        labels, limit = dataset_dict["sem_seg"].numpy(), self.num_semantic_labels
        if limit is None:
            return
        above = (labels >= limit) & (labels != IGNORE_LABEL)
        if above.any():
            largest = int(labels[above].max())
            raise UserError(
                f"semantic labels of {dataset_dict['file_name']} go up to {largest}, but "
                f"the model has {limit} labels (0..{limit - 1}; 255 is ignored)"
            )

    def _check_record(self, record):
        """Check maps and masks against the record before they are transformed."""
        if "sem_seg_file_name" in record:
            _check_semantic_map(record)
        elif self.semantic == "dataset":
            raise UserError(
                f"no semantic map for {record['file_name']}; "
                "use semantic mode 'auto' or 'instances'"
            )
        size = (record["height"], record["width"])
        annotations = record["annotations"]
        masks = [a.get("segmentation") for a in annotations]
        for index, finding in check_masks(masks, [size] * len(masks))[0]:
            if finding.severity == "error":
                raise UserError(f"{_name(record, index)} {finding.text}")
        for index, annotation in enumerate(annotations):
            if not np.isfinite(annotation["bbox"]).all():
                raise UserError(f"{_name(record, index)} has the bbox {annotation['bbox']}")
            encoded = isinstance(masks[index], dict) and not annotation.get("iscrowd", 0)
            if encoded and self.instance_mask_format == "polygon":
                raise UserError(
                    f"{_name(record, index)} is an RLE mask; "
                    "set mask_format (INPUT.MASK_FORMAT) bitmask"
                )


def _transform_polygons(polygons, transforms):
    try:
        return transform_polygons(polygons, transforms)
    except NotImplementedError as e:
        raise UserError(
            "an augmentation cannot move polygons; set mask_format (INPUT.MASK_FORMAT) bitmask"
        ) from e


def _name(record, index):
    own = record["annotations"][index].get("id", f"#{index}")
    return f"annotation {own} of {record['file_name']}"


def _check_image(record):
    """Refuse images whose conversion to 8 bits, by detectron2's reader, would clip their values;
    add the size to a record that has none."""
    path = record["file_name"]
    try:
        header = read_header(path)
    except DECODE_ERRORS as e:
        reason = " ".join(str(e).split())
        raise UnreadableImageError(f"cannot read image {path}: {reason}") from e
    if unsupported(header):
        raise UserError(f"image {path} {unsupported(header)}")
    record.setdefault("width", header.size[0])
    record.setdefault("height", header.size[1])


def _unreadable(record, error):
    """A line about the file of a record that cannot be decoded: its image or its map."""
    path, what = record["file_name"], "image"
    if "sem_seg_file_name" in record:
        try:
            utils.read_image(path)
        except DECODE_ERRORS:
            pass
        else:
            path, what = record["sem_seg_file_name"], "semantic map"
    return f"cannot read {what} {path}: {' '.join(str(error).split())}"


@functools.cache
def _log_derivation():
    """One line per process."""
    logger.info("No semantic maps in the data set: semantic labels are made of its instances")


def _check_semantic_map(record):
    """The map of a record exists, is 8-bit greyscale and as large as the image."""
    path = record["sem_seg_file_name"]
    finding = map_finding(path, record["width"], record["height"])
    if finding:
        mend = "; without maps use semantic mode 'instances'" if "missing" in finding.kind else ""
        kind = UnreadableImageError if finding.kind == "map-unreadable" else UserError
        raise kind(f"semantic map {path} {finding.text}{mend}")
