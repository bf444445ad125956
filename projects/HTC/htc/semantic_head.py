"""The semantic segmentation branch (HTC paper, section 3.2): all pyramid levels fused at stride 8,
a labelling loss, and an embedding from which region features are pooled."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.regions.losses import divide_by_count

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec


def _conv(inputs: int, outputs: int, size: int, relu: bool = True) -> Conv2d:
    conv = Conv2d(inputs, outputs, size, padding=size // 2, activation=nn.ReLU() if relu else None)
    weight_init.c2_msra_fill(conv)
    return conv


class FusedSemanticHead(nn.Module):
    """Semantic segmentation at the resolution of one pyramid level.

    Parameters: `lateral_convs.{level}` (1x1), `convs.{n}` (3x3), `conv_embedding` and
    `conv_logits` (1x1), all with bias; a ReLU follows each of them except `conv_logits`.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 256,
        in_features: Sequence[str] = ("p2", "p3", "p4", "p5", "p6"),
        reference_feature: str = "p3",
        stride: int = 8,
        num_classes: int = 183,
        num_conv: int = 4,
        conv_dim: int = 256,
        loss_weight: float = 0.2,
        ignore_label: int = 255,
        mean_over_all_pixels: bool = False,
    ):
        """
        Args:
            in_channels: channels of every pyramid level, and of the embedding, which is added
                to region features of the pyramid.
            in_features: levels to fuse.
            reference_feature: the level among them at whose resolution the branch works.
            stride: pixels of the network input per pixel of that level.
            num_classes: number of semantic labels (stuff and things).
            num_conv, conv_dim: number and channels of the 3x3 convolutions.
            loss_weight: factor of the loss; the paper's text has 1, its models 0.2.
            ignore_label: label of pixels that do not count.
            mean_over_all_pixels: divide the loss by the number of all pixels rather than of
                the labelled ones.
        """
        super().__init__()
        self.in_features = list(in_features)
        if reference_feature not in self.in_features:
            raise UserError(
                f"FusedSemanticHead: reference_feature '{reference_feature}' is none of "
                f"in_features {self.in_features}"
            )
        self.reference_feature = reference_feature
        self.stride = stride
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.ignore_label = ignore_label
        self.mean_over_all_pixels = mean_over_all_pixels

        self.lateral_convs = nn.ModuleList(_conv(in_channels, conv_dim, 1) for _ in in_features)
        self.convs = nn.ModuleList(_conv(conv_dim, conv_dim, 3) for _ in range(num_conv))
        self.conv_embedding = _conv(conv_dim, in_channels, 1)
        self.conv_logits = _conv(conv_dim, num_classes, 1, relu=False)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own, reference = cfg.MODEL.HTC.SEMANTIC, input_shape["p3"]
        return {
            "in_channels": reference.channels,
            "reference_feature": "p3",
            "stride": reference.stride,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_conv": own.NUM_CONV,
            "conv_dim": own.CONV_DIM,
            "loss_weight": own.LOSS_WEIGHT,
            "mean_over_all_pixels": own.MEAN_OVER_ALL_PIXELS,
        }

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: name -> N x C x H x W.

        Returns:
            U, the shared features (N x conv_dim x H x W), for `losses` and
            `logits`; and the embedding (N x C x H x W). H and W are those of the reference
            level.
        """
        size = features[self.reference_feature].shape[-2:]
        levels = []
        for name, lateral in zip(self.in_features, self.lateral_convs):
            x = features[name]
            if name != self.reference_feature:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
            levels.append(lateral(x))
        x = sum(levels)
        for conv in self.convs:
            x = conv(x)
        return x, self.conv_embedding(x)

    def logits(self, shared: Tensor) -> Tensor:
        """Semantic logits (N x num_classes x H x W) from the shared features."""
        return self.conv_logits(shared)

    def losses(self, shared: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """
        Args:
            shared: first output of `forward`.
            labels: N x H' x W' int64 at the resolution of the padded images, which is
                `stride` times that of the features; padded with `ignore_label`.

        Returns:
            `loss_semantic_seg`, weighted softmax cross-entropy over pixels.
        """
        # Every stride-th pixel is what nearest-neighbour resizing by 1/stride picks.
        labels = labels[:, :: self.stride, :: self.stride]
        valid = labels != self.ignore_label
        largest = torch.where(valid, labels, torch.zeros_like(labels)).max().item()
        if largest >= self.num_classes:
            raise UserError(
                f"sem_seg holds label {largest}, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{self.num_classes}: raise it or mark such pixels {self.ignore_label}"
            )
        total = F.cross_entropy(
            self.logits(shared).float(), labels, ignore_index=self.ignore_label, reduction="sum"
        )
        pixels = labels.numel() if self.mean_over_all_pixels else valid.sum()
        return {"loss_semantic_seg": divide_by_count(total, pixels) * self.loss_weight}
