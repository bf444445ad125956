#!/usr/bin/env python
"""Peak memory of one training step of FCIS on the CPU, and of its region head with and without the
fused operator. Every part runs in a process of its own, of which the peak of the resident memory is
reported (Linux)."""

import argparse
import json
import subprocess
import sys
import time

PARTS = {
    "network": "network, forward and backward",
    "fused": "class scores and masks, fused operator",
    "assembled": "class scores and masks, assembled tensor",
}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="projects/FCIS/configs/fcis_R_101_coco.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(600, 1000), help="height and width")
    parser.add_argument("--regions", type=int, default=300, help="proposals per image")
    parser.add_argument("--objects", type=int, default=7, help="objects in the image")
    parser.add_argument("--part", choices=PARTS, help="measure only this, print JSON")
    return parser


def memory(name: str) -> float:
    """A field of this process's memory status, in GiB: VmRSS (now) or VmHWM (its peak)."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) / 2**20


def peak_of(function) -> dict:
    """Peak of the resident memory while `function` runs, and how much it held before."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from what is held now
    before, start = memory("VmRSS"), time.perf_counter()
    found = function() or {}
    seconds = time.perf_counter() - start
    # Linux takes the peak from counters that lag behind by some pages, and what is held now from an
    # exact sum: of a function that only frees memory the peak would lie below the start.
    peak = max(before, memory("VmHWM"))
    return {"before": before, "peak": peak, "seconds": seconds, **found}


def build(args: argparse.Namespace):
    """The network of the config with random weights, giving as many proposals as asked for.

    Without ImageNet weights activations would grow from block to block, and the proposals would all
    become the whole image: residual branches and box deltas of the proposals are switched off,
    which changes no size.
    """
    import torch

    from d2ext.config import load_projects
    from d2ext.engine import build_experiment

    load_projects()
    experiment = build_experiment(args.config_file, ["MODEL.DEVICE=cpu", "MODEL.WEIGHTS="])
    model = experiment.build_model().train()
    with torch.no_grad():
        for name, module in model.backbone.named_modules():
            if name.endswith("conv3"):
                module.norm.weight.zero_()
        model.proposal_generator.rpn_head.anchor_deltas.weight.zero_()
    model.proposal_generator.post_nms_topk = {True: args.regions, False: args.regions}
    return model


def made_up_image(args: argparse.Namespace, num_classes: int) -> dict:
    """Noise with objects that are full rectangles."""
    import torch

    from detectron2.structures import BitMasks, Boxes, Instances

    height, width = args.size
    low = torch.rand(args.objects, 2) * torch.tensor([width / 2, height / 2])
    extent = (0.2 + 0.3 * torch.rand(args.objects, 2)) * torch.tensor([width, height])
    boxes = torch.cat([low, low + extent], dim=1).round()
    masks = torch.zeros(args.objects, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = True
    instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    instances.gt_classes = torch.randint(num_classes, (args.objects,))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": instances}


def measure_network(args: argparse.Namespace) -> dict:
    from detectron2.utils.events import EventStorage

    model = build(args)
    batch = [made_up_image(args, model.roi_heads.num_classes)]
    counts = []
    sampler = model.roi_heads.sampler
    model.roi_heads.sampler = lambda *a: counts.append(regions := sampler(*a)) or regions

    def step():
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        return {"regions": len(counts[0][0]), "losses": {k: v.item() for k, v in losses.items()}}

    return peak_of(step)


def measure_head(args: argparse.Namespace, fused: bool) -> dict:
    """Scores of all classes and the masks of the labels, and the gradient of the score maps."""
    import torch

    from d2ext.ops import fcis_joint_head, ps_roi_assemble

    model = build(args)
    heads = model.roi_heads
    stride = round(1 / heads.scale)
    grid = [-(-n // stride) for n in args.size]
    score = torch.randn(1, heads.cls_seg.out_channels, *grid, requires_grad=True)
    size = torch.tensor([args.size[1], args.size[0]])
    corners = torch.rand(args.regions, 2, 2) * size
    rois = torch.cat(
        [torch.zeros(args.regions, 1), corners.amin(dim=1), corners.amax(dim=1)], dim=1
    )
    pick = torch.randint(heads.num_classes, (args.regions,))
    arguments = (rois, heads.scale, heads.group_size, heads.out_size)
    del model

    def step():
        if fused:
            logits, seg, _ = fcis_joint_head(score, *arguments, pick, inclusive=True)
        else:
            cells = ps_roi_assemble(score, *arguments, inclusive=True)
            cells = cells.unflatten(1, (-1, 2))
            logits = cells.max(dim=2).values.mean(dim=(2, 3))
            seg = cells[torch.arange(len(pick)), pick]
        (logits.square().mean() + seg.square().mean()).backward()

    return peak_of(step)


def main(arguments=None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = argument_parser().parse_args(arguments)
    if args.part:
        import d2ext  # noqa: F401  adapts detectron2; has to come before it

        found = (
            measure_network(args)
            if args.part == "network"
            else measure_head(args, fused=args.part == "fused")
        )
        print(json.dumps(found))
        return
    for part, text in PARTS.items():
        command = [sys.executable, __file__, *arguments, "--part", part]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        extra = found["peak"] - found["before"]
        print(
            f"{text}: peak {found['peak']:.2f} GiB, {extra:.2f} GiB of it for the step"
            f" ({found['seconds']:.1f} s)"
        )
        if "regions" in found:
            losses = ", ".join(f"{name} {value:.3f}" for name, value in found["losses"].items())
            print(f"  {found['regions']} regions with the objects; {losses}")


if __name__ == "__main__":
    main()
