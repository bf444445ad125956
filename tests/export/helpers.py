"""Networks whose scores, boxes and masks differ from region to region, without a training."""

import functools

import torch
from torch import nn

from d2ext.checkpoint import Checkpointer
from d2ext.engine import build_experiment
from d2ext.engine.provenance import config_to_store

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
NAMES = [f"thing{i}" for i in range(8)]  # of the classes in checkpoints


# Deviation of what a layer gives, by the end of its name; of the others 1.
SPREAD = {
    "anchor_deltas": 0.3,
    "bbox_pred": 0.3,
    "bbox": 0.3,
    "cls_score": 1.5,
    "seg_cls_score": 1.5,
    "cls_seg": 6.0,
    "predictor": 3.0,  # of masks; with 10, halves of ones lie at the threshold, up to rounding
    "fc2": 10.0,
}


def image(size, seed=0):
    """Blobs of colour, float32 3 x height x width."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 9, generator=generator) * 255
    return nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 255).round()


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Scale the layers of RPN and heads, which start near zero, by what they give for an image, so
    that scores, boxes and masks spread."""
    handles, generator = [], torch.Generator().manual_seed(7)

    def scale(module, inputs, output, wanted):
        if id(module) not in seen and output.numel():
            seen.add(id(module))
            factor = wanted / output.std().clamp(min=1e-9)
            module.weight *= factor
            return output * factor
        return None

    seen: set[int] = set()
    for part in (model.proposal_generator, model.roi_heads):
        for name, module in part.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                if module.bias is not None:
                    module.bias.zero_()
                wanted = SPREAD.get(name.rpartition(".")[2], 1.0)
                hook = functools.partial(scale, wanted=wanted)
                handles.append(module.register_forward_hook(hook))
    model.eval()([{"image": image((128, 160))}])
    for handle in handles:
        handle.remove()
    return model


def build(name: str, *overrides: str) -> nn.Module:
    """The tiny network of a name, the same weights every time."""
    torch.manual_seed(3)
    texts = [*FEW, *OVERRIDES.get(name, ()), *overrides]
    return lively(build_experiment(CONFIGS[name], texts, with_data=False).build_model())


def save(name: str, folder, *overrides: str) -> str:
    """A checkpoint of such a network with its config and `NAMES` of classes; its path."""
    torch.manual_seed(3)
    texts = [*FEW, *OVERRIDES.get(name, ()), "MODEL.DEVICE=cpu", *overrides]
    experiment = build_experiment(CONFIGS[name], texts, with_data=False)
    model = lively(experiment.build_model())
    metadata = {"config": config_to_store(experiment), "thing_classes": NAMES}
    Checkpointer(model, str(folder), metadata=metadata).save("model_final")
    return f"{folder}/model_final.pth"
