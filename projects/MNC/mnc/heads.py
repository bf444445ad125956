"""The heads of the cascade, shared by both passes: class-agnostic masks (MNC paper, section 3.2),
and categories from the features of a box with and without its mask (section 3.3)."""

from typing import NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.backbone import resolve_norm
from d2ext.ops import mask_gate

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet


def _normal_linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class MNCMaskHead(nn.Module):
    """One M x M mask for each box, from two fully connected layers.

    Parameters: `fc1`, `fc2`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fc_dim: int = 256, mask_size: int = 21):
        """
        Args:
            input_shape: channels, height and width of the features of a box.
            fc_dim: width of the hidden layer.
            mask_size: M.
        """
        super().__init__()
        self.mask_size = mask_size
        inputs = input_shape.channels * input_shape.height * input_shape.width
        self.fc1 = _normal_linear(inputs, fc_dim, std=0.001)
        self.fc2 = _normal_linear(fc_dim, mask_size * mask_size, std=0.001)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        return {
            "input_shape": input_shape,
            "fc_dim": cfg.MODEL.MNC.MASK_FC_DIM,
            "mask_size": cfg.MODEL.MNC.MASK_SIZE,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Features (R x C x S x S) -> mask logits (R x 1 x M x M), rows of the image first."""
        logits = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits.unflatten(1, (1, self.mask_size, self.mask_size))


class CategoryOutputs(NamedTuple):
    """What stage 3 (and 5) predicts for R boxes; background is the last class.

    Attributes:
        cls_logits: R x (K + 1), classes of the boxes; trains the network, not used to predict.
        seg_logits: R x (K + 1), classes of the masks; their softmax scores the instances.
        deltas: R x 4K, box deltas of each class, in units of the head's box transform.
    """

    cls_logits: Tensor
    seg_logits: Tensor
    deltas: Tensor


class _CategoryHead(nn.Module):
    """Two classifiers and a class-wise box regression on the joined features of both paths.

    Subclasses compute the features; they call `_add_outputs` once they know their width.
    Layers of the mask path that a checkpoint lacks get the weights of the box path, because
    pre-trained networks have one path.
    """

    # Layers of the mask path -> those of the box path.
    twins: dict[str, str] = {}

    def _add_outputs(self, features: int, num_classes: int) -> None:
        self.num_classes = num_classes
        self._register_load_state_dict_pre_hook(self._copy_to_mask_path)
        self.cls_score = _normal_linear(features, num_classes + 1, std=0.01)
        self.seg_cls_score = _normal_linear(features, num_classes + 1, std=0.01)
        self.bbox_pred = _normal_linear(features, 4 * num_classes, std=0.001)

    def _copy_to_mask_path(self, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        for mask, box in self.twins.items():
            mask, box = f"{prefix}{mask}.", f"{prefix}{box}."
            if not any(key.startswith(mask) for key in state_dict):
                found = {k: v for k, v in state_dict.items() if k.startswith(box)}
                state_dict.update({mask + k[len(box) :]: v for k, v in found.items()})

    def paths(self, x: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R x F each) of the mask path and of the box path.

        Args:
            x: R x C x S x S features of the boxes.
            gated: the same multiplied by the masks.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, masks: Tensor) -> CategoryOutputs:
        """
        Args:
            x: R x C x S x S features of the boxes.
            masks: R x 1 x M x M probabilities, continuous, never made binary.
        """
        mask_path, box_path = self.paths(x, mask_gate(x, masks.to(x.dtype)))
        joined = torch.cat([mask_path, box_path], dim=1)
        return CategoryOutputs(
            self.cls_score(joined), self.seg_cls_score(joined), self.bbox_pred(joined)
        )


class MNCCategoryHead(_CategoryHead):
    """The head of the VGG-16 networks: per path a 2x2 maximum and two fully connected layers.

    Parameters: `box_fc6`, `box_fc7`, `mask_fc6`, `mask_fc7`, `cls_score`,
    `seg_cls_score`, `bbox_pred`.
    """

    twins = {"mask_fc6": "box_fc6", "mask_fc7": "box_fc7"}

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_classes: int, fc_dim: int = 4096):
        """
        Args:
            input_shape: channels, height and width of the features of a box.
            num_classes: K, the number of foreground classes.
            fc_dim: width of all four hidden layers.
        """
        super().__init__()
        inputs = input_shape.channels * (input_shape.height // 2) * (input_shape.width // 2)
        for path in ("box", "mask"):
            for name, width in (("fc6", inputs), ("fc7", fc_dim)):
                layer = nn.Linear(width, fc_dim)
                weight_init.c2_xavier_fill(layer)
                self.add_module(f"{path}_{name}", layer)
        self._add_outputs(2 * fc_dim, num_classes)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "fc_dim": cfg.MODEL.MNC.FC_DIM,
        }

    def paths(self, x: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
        box = F.max_pool2d(x, kernel_size=2).flatten(1)
        box = F.relu(self.box_fc7(F.relu(self.box_fc6(box))))
        mask = F.max_pool2d(gated, kernel_size=2).flatten(1)
        mask = F.relu(self.mask_fc7(F.relu(self.mask_fc6(mask))))
        return mask, box


class MNCRes5CategoryHead(_CategoryHead):
    """The head of the ResNet networks: per path the fifth stage of the ResNet and an average.

    The authors published no ResNet code; this follows detectron2's C4 head, once for each path.
    Parameters: `res5` (box path) and `mask_res5`, both as detectron2's res5, `cls_score`...
    """

    twins = {"mask_res5": "res5"}

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        bottleneck_channels: int = 512,
        out_channels: int = 2048,
        stride_in_1x1: bool = True,
        norm: str = "FrozenBN",
    ):
        """
        Args:
            input_shape: channels of the features of a box.
            num_classes: K, the number of foreground classes.
            bottleneck_channels, out_channels: channels of the 3x3 convolutions and of the
                output of the three blocks.
            stride_in_1x1: as in the backbone whose weights are used.
            norm: norm of the blocks.
        """
        super().__init__()
        for name in ("res5", "mask_res5"):
            blocks = ResNet.make_stage(
                BottleneckBlock,
                3,
                in_channels=input_shape.channels,
                out_channels=out_channels,
                bottleneck_channels=bottleneck_channels,
                stride_per_block=[2, 1, 1],
                stride_in_1x1=stride_in_1x1,
                norm=resolve_norm(norm),
            )
            self.add_module(name, nn.Sequential(*blocks))
        self._add_outputs(2 * out_channels, num_classes)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        resnet = cfg.MODEL.RESNETS
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            # The widths double three times from res2 to res5.
            "bottleneck_channels": resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP * 8,
            "out_channels": resnet.RES2_OUT_CHANNELS * 8,
            "stride_in_1x1": resnet.STRIDE_IN_1X1,
            "norm": resnet.NORM,
        }

    def paths(self, x: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
        return self.mask_res5(gated).mean(dim=(2, 3)), self.res5(x).mean(dim=(2, 3))
