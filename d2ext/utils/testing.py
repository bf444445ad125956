"""Tiny configs and inputs with which tests build and run real detectors in milliseconds, what these
ask of the device, and damaged files."""

import contextlib
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2ext.config import add_modeling_config

from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage


def tiny_config(*add_config: Callable[[CfgNode], None]) -> CfgNode:
    """A yaml config of a Mask R-CNN for 3 classes with 8 to 16 channels everywhere, on the CPU.

    Args:
        add_config: functions that add the keys of a project.
    """
    cfg = get_cfg()
    add_modeling_config(cfg)
    for add in add_config:
        add(cfg)
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.WEIGHTS = ""
    model.MASK_ON = True
    model.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    model.BACKBONE.FREEZE_AT = 0
    model.SLIM_RESNET.STEM_CHANNELS = 8
    model.SLIM_RESNET.STAGE_CHANNELS = [8, 16, 8, 16]
    model.SLIM_RESNET.STAGE_BLOCKS = [1, 1, 1, 1]
    model.RESNETS.NORM = "GN"
    model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = 8
    model.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 60
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 30
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ROI_HEADS.NUM_CLASSES = 3
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 1
    model.ROI_BOX_HEAD.FC_DIM = 16
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model.ROI_MASK_HEAD.NUM_CONV = 2
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    return cfg


def random_batch(
    num_images: int = 2,
    size: tuple[int, int] = (64, 96),
    num_objects: int = 3,
    num_classes: int = 3,
    num_labels: int = 7,
    seed: int = 0,
) -> list[dict]:
    """Model inputs with noise images, elliptic objects and noise label maps.

    Args:
        size: (height, width) in pixels, at least 48 each.
        num_objects: objects of each image; 0 leaves `gt_masks` out, as detectron2 does.
        num_classes: object classes are random in [0, num_classes).
        num_labels: labels of `sem_seg` are random in [0, num_labels).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    batch = []
    for index in range(num_images):
        corners = torch.rand(num_objects, 2, generator=generator) * (
            torch.tensor([width, height]) - 40
        )
        extents = 16 + 24 * torch.rand(num_objects, 2, generator=generator)
        boxes = torch.cat([corners, corners + extents], dim=1)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (num_objects,), generator=generator)
        if num_objects:
            centers, radii = corners + extents / 2, extents / 2
            u = (xs - centers[:, 0, None, None]) / radii[:, 0, None, None]
            v = (ys - centers[:, 1, None, None]) / radii[:, 1, None, None]
            instances.gt_masks = BitMasks(u**2 + v**2 <= 1)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append(
            {
                "image": image,
                "height": height,
                "width": width,
                "image_id": index,
                "file_name": f"image{index}.png",
                "instances": instances,
                "sem_seg": torch.randint(num_labels, size, generator=generator),
                "sample_seed": 1000 + index,
            }
        )
    return batch


def near_objects(batch: list[dict], per_object: int = 4, seed: int = 0) -> list[Instances]:
    """Proposals scattered around the objects of a batch, as a region proposal network gives them.

    Returns:
        Per image `Instances` with `proposal_boxes`, `per_object` times as many as objects.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for x in batch:
        boxes = x["instances"].gt_boxes.tensor.repeat(per_object, 1)
        boxes = Boxes(boxes + 4 * torch.randn(boxes.shape, generator=generator))
        boxes.clip(x["instances"].image_size)
        result.append(Instances(x["instances"].image_size, proposal_boxes=boxes))
    return result


def training_losses(model: torch.nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """The losses of a detector in training mode, with the event storage it writes to."""
    with EventStorage():
        return model.train()(batch)


# The host waits for their results, or for their number; and the methods that copy to the host.
_WAITING = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero",
    "masked_select", "nms", "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip
_COPYING = {"cpu", "tolist"}


class OperatorCounts(TorchDispatchMode):
    """See `count_operators`.

    Attributes:
        operators: number of operators, views included.
        syncs: operator -> how often the host waited for one.
        places: "file:line function < caller" -> how often the host waited there.
    """

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.syncs: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        self.operators += 1
        if name in _WAITING or _has_unknown_size(name, args, kwargs or {}):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """Count one wait of the host."""
        self.syncs[name] += 1
        frame, found = sys._getframe(2), []
        while frame is not None and len(found) < 2:
            file, code = frame.f_code.co_filename, frame.f_code
            if file != __file__ and f"{os.sep}torch{os.sep}" not in file:
                found.append(f"{os.path.basename(file)}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        self.places[" < ".join(found)] += 1


class _CopiesToHost(TorchFunctionMode):
    def __init__(self, counts: OperatorCounts):
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _COPYING:
            self._counts.note(name)
        return func(*args, **(kwargs or {}))


def _has_unknown_size(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name.strip("_").startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return False


@contextlib.contextmanager
def count_operators() -> Iterator[OperatorCounts]:
    """Count the operators that are launched within a `with` block, and how often the host would
    wait for the device, in forward and backward passes; wherever the tensors are.

    What waits: reading a number (`item`, `bool`, `int`), `tolist`, `cpu`, and operators whose
    results have a size that depends on values: `nonzero`, indexing by masks, `unique`, `nms`,
    `repeat_interleave` without `output_size`... On the CPU some things look different than on a
    device: `to("cpu")` cannot be told from a copy within the device and is not counted, nor is a
    tensor in an `if` of compiled code; and what works on tensors that are on the host anyway is
    counted as if they were not.
    """
    counts = OperatorCounts()
    with _CopiesToHost(counts), counts:
        yield counts


def as_double(value) -> torch.Tensor:
    """Nested lists of numbers as a float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


def assert_numbers(value: torch.Tensor, expected, atol: float = 1e-5) -> None:
    """Fail unless a tensor, in the shape of nested lists of numbers, equals these to `atol`."""
    expected = as_double(expected)
    found = value.detach().to(expected.dtype).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def damaged_copies(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """What a bad disk makes of a file: bits flipped, the end cut off, or a block of zeros.

    Args:
        data: the content of the file.
        count: of the copies.

    Yields:
        (what was done, the content), each different from `data`.
    """
    rng, made = random.Random(seed), 0
    while made < count:
        copy, place = bytearray(data), rng.randrange(len(data))
        kind = rng.choice(("flip", "flips", "cut", "zeros"))
        if kind == "cut":
            del copy[place:]
        elif kind == "zeros":
            length = min(rng.choice((1, 16, 512, 4096)), len(data) - place)
            copy[place : place + length] = bytes(length)
        else:
            for _ in range(1 if kind == "flip" else rng.randrange(2, 9)):
                copy[place] ^= 1 << rng.randrange(8)
                place = rng.randrange(len(data))
        if copy != data:
            made += 1
            yield f"{kind} at {place}", bytes(copy)
