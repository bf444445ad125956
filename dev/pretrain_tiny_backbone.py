#!/usr/bin/env python
"""Make `configs/weights/slim_resnet_fpn_shapes.pth`, the backbone that the tiny configs start from.

Trains `configs/mask_rcnn_tiny_pretrain.py` (a Mask R-CNN with batch norm, from random weights, on
`shapes_big_train`) and keeps the backbone in half precision. About 50 minutes on one CPU core.

    python dev/pretrain_tiny_backbone.py
"""

import argparse
import os

import torch

from d2ext.config import get_config_file
from d2ext.engine import build_experiment, train
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

from detectron2.utils.logger import setup_logger

CONFIG = "mask_rcnn_tiny_pretrain.py"


def keep_backbone(checkpoint: str, target: str) -> None:
    """Write the backbone of a checkpoint to `target` as half precision tensors.

    Batch norm's counters are left out: the tiny configs use its statistics frozen.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"checkpoint '{checkpoint}' cannot be read: {error}") from error
    backbone = {
        name: tensor.half()
        for name, tensor in state.items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    if not backbone:
        raise UserError(f"checkpoint '{checkpoint}' has no parameter named backbone.*")
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    torch.save({"model": backbone}, target)
    print(f"{target}: {len(backbone)} tensors, {os.path.getsize(target) / 2**20:.1f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="skip the training and take this checkpoint")
    parser.add_argument("--output", default="configs/weights/slim_resnet_fpn_shapes.pth")
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    args = parser.parse_args()
    checkpoint = args.checkpoint
    if checkpoint is None:
        experiment = build_experiment(get_config_file(CONFIG), args.opts)
        os.makedirs(experiment.output_dir, exist_ok=True)
        setup_logger(experiment.output_dir)
        torch.manual_seed(max(experiment.seed, 0))
        train(experiment)
        checkpoint = os.path.join(experiment.output_dir, "model_final.pth")
    keep_backbone(checkpoint, args.output)


if __name__ == "__main__":
    raise SystemExit(run_guarded(main))
