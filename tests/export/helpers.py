"""Networks whose scores, boxes and masks differ from region to region, without a training."""

import torch
from torch import nn

from d2ext.engine import build_experiment

CONFIGS = {
    "mask_rcnn": "configs/mask_rcnn_tiny.yaml",
    "cascade": "configs/cascade_mask_rcnn_tiny.yaml",
    "htc": "projects/HTC/configs/htc_tiny.yaml",
    "htc_without_semantic": "projects/HTC/configs/htc_tiny.yaml",
    "fcis": "projects/FCIS/configs/fcis_tiny.yaml",
    "mnc": "projects/MNC/configs/mnc_tiny.yaml",
}
OVERRIDES = {"htc_without_semantic": ["MODEL.HTC.SEMANTIC.ENABLED=False"]}
# The score of a region, whatever it shows, lies above the configs' own threshold.
FEW = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.05", "TEST.DETECTIONS_PER_IMAGE=30"]


def lively(model: nn.Module) -> nn.Module:
    """Scale the layers of RPN and heads, which start near zero, so that results spread."""
    generator = torch.Generator().manual_seed(7)
    for part in (model.proposal_generator, model.roi_heads):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                fan = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):
                    fan = module.weight.shape[0]
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.data = noise * (2.0 / fan) ** 0.5
                if module.bias is not None:
                    module.bias.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
    return model.eval()


def build(name: str, *overrides: str) -> nn.Module:
    """The tiny network of a name, the same weights every time."""
    torch.manual_seed(3)
    texts = [*FEW, *OVERRIDES.get(name, ()), *overrides]
    return lively(build_experiment(CONFIGS[name], texts, with_data=False).build_model())
