#!/usr/bin/env python3
"""Write the table of docs/backbones.md: parameters, operations and time of the networks over timm's
backbones, beside published numbers.

    python dev/write_backbones.py           counts again, keeps the times
    python dev/write_backbones.py --time    measures them as well, one image on one thread
    python dev/write_backbones.py --time mask_rcnn_swin_T     only this one

Operations are multiplications with additions of convolutions, linear layers and matrix products,
for an image of 800 x 1280 pixels with 1000 regions, of which 100 get a mask, as in the papers,
whose programs count no products of attention. All is counted on the device "meta"; nothing is
downloaded.
"""

import argparse
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2ext.config import load_projects
from d2ext.engine import build_experiment
from d2ext.modeling.backbone.timm import without_part_weights
from d2ext.utils.testing import random_batch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/backbones.md"
START, END = "<!-- networks -->", "<!-- /networks -->"
SIZE, REGIONS, MASKS = (800, 1280), 1000, 100
TIMED = (480, 640)
HEAD = "| config | million parameters | GFLOP | s per image | box AP, mask AP (PUBLISHED) |\n"


class Published(NamedTuple):
    """Numbers of others: million parameters, GFLOP, box AP, mask AP (0: none), and where they are
    written."""

    parameters: float = 0
    gflop: float = 0
    box: float = 0
    mask: float = 0
    source: str = ""


SWIN, CONVNEXT = "Swin's repository of detectors", "ConvNeXt's repository"
NETWORKS = {
    "configs/mask_rcnn_R_50_FPN_3x_coco": Published(0, 0, 41.0, 37.2, "detectron2's zoo"),
    "configs/mask_rcnn_swin_T": Published(48, 267, 46.0, 41.6, SWIN),
    "configs/mask_rcnn_convnext_T": Published(48, 262, 46.2, 41.7, CONVNEXT),
    "configs/mask_rcnn_vitdet_B": Published(110.9, 0, 51.6, 45.9, "detectron2's ViTDet"),
    "configs/mask_rcnn_mobilenetv4": Published(),
    "projects/HTC/configs/htc_R_50_FPN_20e_coco": Published(0, 0, 43.3, 38.3, "MMDetection"),
    "projects/HTC/configs/htc_swin_T_FPN_3x_ms": Published(),
    "projects/HTC/configs/htc_swin_S_FPN_3x_ms": Published(),
    "projects/HTC/configs/htc_swin_B_FPN_3x_ms": Published(
        160, 1043, 56.4, 49.1, "HTC++, Swin's repository"
    ),
    "projects/HTC/configs/htc_swin_L_FPN_3x_ms": Published(
        284, 1470, 57.1, 49.5, "HTC++, Swin's repository"
    ),
    "projects/HTC/configs/htc_convnext_T": Published(),
    "projects/HTC/configs/htc_convnext_S": Published(),
    "projects/HTC/configs/htc_convnext_B": Published(),
    "projects/FCIS/configs/fcis_R_50_coco": Published(),
    "projects/FCIS/configs/fcis_convnext_T": Published(),
    "projects/MNC/configs/mnc_R_50_C4_coco": Published(),
    "projects/MNC/configs/mnc_convnext_T": Published(),
}


def build(stem: str, device: str = "meta") -> nn.Module:
    """The network of a config, without values of its weights on "meta"."""
    load_projects()
    experiment = build_experiment(str(ROOT / f"{stem}.yaml"), ["MODEL.DEVICE=cpu"])
    experiment.set_device(device)
    with without_part_weights(), torch.device(device):
        return experiment.build_model().eval()


def parameters(model: nn.Module) -> float:
    """Millions of parameters, with those that stay as they are (norms of ResNets)."""
    buffers = [x for name, x in model.named_buffers() if name.endswith((".weight", ".bias"))]
    return sum(x.numel() for x in [*model.parameters(), *buffers]) / 1e6


def gflop(model: nn.Module) -> float:
    """Billions of multiplications with additions for one image; see the module."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.empty(1, 3, *SIZE, device="meta"))
        rpn, heads = model.proposal_generator, model.roi_heads
        rpn.rpn_head([features[name] for name in rpn.in_features])
        _run_heads(heads, features)
    return counter.get_total_flops() / 2e9


def _run_heads(heads: nn.Module, features: dict[str, Tensor]) -> None:
    if hasattr(heads, "score_maps"):  # FCIS: all on the map, nothing for a region
        heads.score_maps(features)
        return
    if hasattr(heads, "category_head"):  # MNC: 300 regions, in two passes
        channels = features[heads.in_features[0]].shape[1]
        x = torch.empty(300, channels, 14, 14, device="meta")
        for _ in range(2):
            masks = heads.mask_head(x)
            heads.category_head(x, masks)
        return
    if getattr(heads, "semantic_head", None) is not None:
        heads.semantic_head.logits(heads.semantic_head(features)[0])
    channels = features[heads.box_in_features[0]].shape[1]
    stages = heads.box_head if isinstance(heads.box_head, nn.ModuleList) else [heads.box_head]
    predictors = heads.box_predictor
    predictors = predictors if isinstance(predictors, nn.ModuleList) else [predictors]
    for head, predictor in zip(stages, predictors):
        predictor(head(torch.empty(REGIONS, channels, 7, 7, device="meta")))
    x = torch.empty(MASKS, channels, 14, 14, device="meta")
    if hasattr(heads, "mask_probabilities"):
        classes = torch.zeros(MASKS, dtype=torch.int64, device="meta")
        heads.mask_probabilities(x, classes, len(stages))
    else:
        heads.mask_head.layers(x)


def seconds(stem: str) -> float:
    """Processor time of one image of `TIMED` pixels with random weights."""
    model, batch = build(stem, "cpu"), random_batch(1, size=TIMED)
    with torch.no_grad():
        start = time.process_time()
        model(batch)
        return time.process_time() - start


def known_times(text: str) -> dict[str, str]:
    """Config -> the cell of its time in the page."""
    return dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([^|]*) \|", text, re.MULTILINE))


def row(stem: str, time_cell: str) -> str:
    """A line of the table."""
    model, published = build(stem), NETWORKS[stem]
    millions, operations = f"{parameters(model):.1f}", f"{gflop(model):.0f}"
    if published.parameters:
        millions += f" ({published.parameters:g})"
    if published.gflop:
        operations += f" ({published.gflop:g})"
    ap = ""
    if published.box:
        ap = f"{published.box}, {published.mask} ({published.source})"
    return f"| `{Path(stem).name}` | {millions} | {operations} | {time_cell} | {ap} |"


def page(text: str, times: dict[str, str]) -> str:
    """The page with its table written anew."""
    lines = [row(stem, times.get(Path(stem).name, "")) for stem in NETWORKS]
    table = f"{START}\n{HEAD}|---|---|---|---|---|\n" + "\n".join(lines) + f"\n{END}"
    return re.sub(rf"{START}.*{END}", lambda _: table, text, flags=re.DOTALL)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", nargs="*", metavar="CONFIG", help="measure these, or all")
    args = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    times = known_times(text)
    if args.time is not None:
        torch.set_num_threads(1)
        for stem in NETWORKS:
            name = Path(stem).name
            if name in args.time or not args.time:
                times[name] = f"{seconds(stem):.1f}"
                print(f"{name}: {times[name]} s")
    PAGE.write_text(page(text, times), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(NETWORKS)} networks")


if __name__ == "__main__":
    main()
