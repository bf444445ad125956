"""The MaskIoU head: how good is the mask that was predicted for a region?"""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

NUM_CONV = 4


class MaskIoUHead(nn.Module):
    """Regresses the IoU of a region's mask with its object, for every class (section 3.2)."""

    @configurable
    def __init__(self, *, input_shape: ShapeSpec, num_classes: int, conv_dim: int, fc_dim: int):
        """
        Args:
            input_shape: channels, height and width of the region features.
            num_classes: number of foreground classes.
            conv_dim: channels of the four convolutions, the last of which has stride 2.
            fc_dim: width of the two hidden fully connected layers.
        """
        super().__init__()
        channels = [input_shape.channels + 1] + [conv_dim] * NUM_CONV
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], conv_dim, 3, stride=2 if i == NUM_CONV - 1 else 1, padding=1)
            for i in range(NUM_CONV)
        )
        size = conv_dim * ((input_shape.height + 1) // 2) * ((input_shape.width + 1) // 2)
        self.fc1 = nn.Linear(size, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)
        self.predictor = nn.Linear(fc_dim, num_classes)
        for conv in self.convs:
            weight_init.c2_msra_fill(conv)
        for fc in (self.fc1, self.fc2):
            weight_init.c2_xavier_fill(fc)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": cfg.MODEL.MASK_SCORING.CONV_DIM,
            "fc_dim": cfg.MODEL.MASK_SCORING.FC_DIM,
        }

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """
        Args:
            features: N x C x S x S, pooled for the mask head.
            masks: N x 1 x 2S x 2S, probabilities of the mask of one class each.

        Returns:
            N x classes, the IoU that the mask would have if the region were of each class.
        """
        x = torch.cat([features, F.max_pool2d(masks, kernel_size=2, stride=2)], dim=1)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.predictor(F.relu(self.fc2(x)))
