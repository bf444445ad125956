"""What dev/benchmark_ops.py times: every operator at the sizes of real networks, what one would
use instead, a float64 reference, and which of them have gates (dev/op_gates.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import machine
import op_peers as peers_of
import torch
import torch.nn.functional as F
import torchvision

from d2ext import ops
from d2ext.ops.reference import joint_head as head_reference
from d2ext.ops.reference import mask_ops as mask_reference
from d2ext.ops.reference import pyramid_roi_align as pyramid_reference
from d2ext.ops.reference import roi_warp as warp_reference

SCALE = peers_of.SCALE


@dataclass
class Case:
    """One operator at one size; `runs` maps names of implementations to functions of inputs."""

    op: str
    size: str
    direction: str
    inputs: Callable[[], tuple]
    runs: dict[str, Callable]
    error: Callable[[tuple], float]
    floor_mb: float
    gated: bool = True
    dtype: str = "float32"
    layout: str = "NCHW"


def both(function: Callable, wrt: tuple[int, ...]) -> Callable:
    """Forward and backward of `function` with a gradient of ones-like noise."""

    def run(*inputs):
        *tensors, grad = inputs
        out = function(*tensors)
        torch.autograd.grad(out, [tensors[i] for i in wrt], grad)

    return run


def in_order(run: Callable) -> Callable:
    """`run` with the kernels that add in a fixed order."""

    def ordered(*inputs):
        torch.use_deterministic_algorithms(True)
        try:
            run(*inputs)
        finally:
            torch.use_deterministic_algorithms(False)

    return ordered


def relative(found: torch.Tensor, oracle: torch.Tensor) -> float:
    oracle = oracle.double()
    return float((found.double() - oracle).norm() / oracle.norm().clamp(min=1e-30))


class Cases:
    """Makes the cases for one device; with `quick` at sizes that take seconds. `kind` is "cuda"
    also where something else stands in for the GPU."""

    def __init__(self, device: torch.device, quick: bool, kind: str):
        self.device, self.quick, self.kind = device, quick, kind
        # an emulated GPU is ten thousand times slower
        self.few_channels, self.few = (4, 3) if machine.EMULATED else (32, 20)

    def random_rois(self, count: int, batch: int, height: int, width: int) -> torch.Tensor:
        return peers_of.random_rois(count, batch, height, width).to(self.device)

    def smooth_masks(self, count: int, size: int) -> torch.Tensor:
        return peers_of.smooth_masks(count, size).to(self.device)

    def warp_cases(
        self, channels, size, count=300, batch=1, pool=False, dtype=torch.float32, last=False
    ):
        height, width = (12, 15) if self.quick else (38, 63)
        gated = batch == 1 and count == 300 and dtype == torch.float32
        gated = gated and (not last or self.kind == "cuda")
        if self.quick:
            channels, count = min(channels, self.few_channels), min(count, self.few)
        options = {"aligned": False}

        def inputs(grad):
            feature = torch.randn(batch, channels, height, width, device=self.device).to(dtype)
            if last:
                feature = feature.to(memory_format=torch.channels_last)
            rois = self.random_rois(count, batch, height * 16, width * 16)
            if not grad:
                return feature, rois
            out = torch.randn(count, channels, size, size, device=self.device).to(dtype)
            return feature.requires_grad_(), rois.requires_grad_(), out

        def ours(feature, rois):
            op = ops.roi_warp_max_pool if pool else ops.roi_warp
            return op(feature, rois, size, SCALE, **options)

        fine = 2 * size if pool else size
        finish = (lambda x: F.max_pool2d(x, 2)) if pool else (lambda x: x)
        peers = {"grid_sample folded": lambda f, r: finish(peers_of.grid_sample_folded(f, r, fine))}
        if not pool:
            peers["grid_sample expand"] = lambda f, r: peers_of.grid_sample_expand(f, r, fine)
            peers["roi_align sr=1"] = lambda f, r: torchvision.ops.roi_align(
                f, r, size, SCALE, 1, True
            )
        if batch > 1 or dtype != torch.float32:
            peers = {}

        def error(tensors):
            reference = warp_reference.roi_warp_max_pool if pool else warp_reference.roi_warp
            with torch.no_grad():
                few = tensors[1][:16]
                oracle = reference(tensors[0].double(), few, SCALE, size, size, **options)
                return relative(ours(tensors[0], few), oracle)

        item = torch.finfo(dtype).bits // 8
        feature_mb = batch * channels * height * width * item / 1e6
        out_mb = count * channels * size * size * item / 1e6
        name = "roi_warp_max_pool" if pool else "roi_warp"
        text = f"B{batch} C{channels} {size}x{size} N{count}"
        common = {"dtype": str(dtype)[6:], "layout": "NHWC" if last else "NCHW"}
        yield Case(
            name, text, "fwd", lambda: inputs(False), {"ours": ours, **peers}, error,
            feature_mb + out_mb, gated, **common,
        )  # fmt: skip
        grads = {
            key: both(run, (0,) if key.startswith("roi_align") else (0, 1))
            for key, run in {"ours": ours, **peers}.items()
        }
        yield Case(
            name, text, "f+b", lambda: inputs(True), grads, error,
            2 * (feature_mb + out_mb) + feature_mb, gated, **common,
        )  # fmt: skip
        if self.kind == "cuda" and gated and not pool:
            yield Case(
                name, text, "f+b ordered", lambda: inputs(True), {"ours": in_order(grads["ours"])},
                error, 2 * (feature_mb + out_mb) + feature_mb, gated, **common,
            )  # fmt: skip

    def pyramid_cases(
        self,
        size,
        count,
        ratio=0,
        average=1,
        levels=4,
        channels=256,
        extent=(800, 1333),
        last=False,
    ):
        """Of an image of `extent` pixels; a single level is that of stride 8."""
        if self.quick:
            channels, extent = min(channels, self.few_channels), (200, 300)
            count = min(count, self.few)
        strides = (4, 8, 16, 32) if levels == 4 else (8,)
        scales = [1 / stride for stride in strides]
        layout = torch.channels_last if last else torch.contiguous_format

        def inputs(grad):
            features = [
                torch.randn(1, channels, *(-(-n // stride) for n in extent), device=self.device)
                for stride in strides
            ]
            features = [f.to(memory_format=layout).requires_grad_(grad) for f in features]
            rois = self.random_rois(count, 1, *extent)
            out = torch.randn(count, channels, size, size, device=self.device)
            return (*features, rois, out) if grad else (*features, rois)

        options = {"sampling_ratio": ratio, "average": average}

        def ours(*tensors):
            *features, rois = tensors
            return ops.pyramid_roi_align(features, rois, size, scales, **options)

        def error(tensors):
            with torch.no_grad():
                *features, rois = tensors[: levels + 1]
                doubles = [f.double() for f in features]
                oracle = pyramid_reference.pyramid_roi_align(
                    doubles, rois[:16], scales, size, size, **options
                )
                return relative(ours(*features, rois[:16]), oracle)

        peer = "ROIPooler" if average == 1 else "ROIPooler + average"
        runs = {"ours": ours}
        if peers_of.HAS_DETECTRON2:
            runs[peer] = peers_of.pooler_of_detectron2(size, scales, ratio, average)
        cells = sum(-(-extent[0] // s) * -(-extent[1] // s) for s in strides)
        feature_mb, out_mb = cells * channels * 4 / 1e6, count * channels * size * size * 4 / 1e6
        text = (
            f"L{levels} C{channels} {size}x{size} N{count} {extent[0]}x{extent[1]}"
            f" {f'sr={ratio}' if ratio else 'adaptive'}{f' average {average}' * (average > 1)}"
        )
        common = {"layout": "NHWC" if last else "NCHW"}
        yield Case(
            "pyramid_roi_align", text, "fwd", lambda: inputs(False), runs, error,
            feature_mb + out_mb, **common,
        )  # fmt: skip
        wrt = tuple(range(levels))
        yield Case(
            "pyramid_roi_align", text, "f+b", lambda: inputs(True),
            {key: both(run, wrt) for key, run in runs.items()}, error,
            2 * (feature_mb + out_mb), **common,
        )  # fmt: skip

    def head_cases(self, classes, count=300, batch=1, dtype=torch.float32):
        height, width = (12, 15) if self.quick else (38, 63)
        classes, count = (min(classes, 9), min(count, self.few)) if self.quick else (classes, count)
        group, size = 7, 21
        channels = 2 * classes * group**2

        def inputs(grad):
            score = torch.randn(batch, channels, height, width, device=self.device).to(dtype)
            rois = self.random_rois(count, batch, height * 16, width * 16)
            if not grad:
                return score, rois
            return (
                score.requires_grad_(),
                rois,
                torch.randn(count, classes, device=self.device).to(dtype),
            )

        # The peers compute class scores only; so does "ours", where no class is picked for a mask.
        nothing = torch.full((count,), -1, device=self.device)

        def ours(score, rois):
            pick = nothing[: len(rois)]
            return ops.fcis_joint_head(score, rois, SCALE, group, size, pick, inclusive=True)[0]

        def with_masks(score, rois):
            return ops.fcis_joint_head(score, rois, SCALE, group, size, inclusive=True)[0]

        peers = {
            "integral image": lambda s, r: peers_of.head_of(
                peers_of.assembly_by_integral(s, r, group, size)
            ),
            "copy by index": lambda s, r: peers_of.head_of(
                peers_of.assembly_by_copy(s, r, group, size)
            ),
            "torchvision ps_roi_pool 7x7": lambda s, r: peers_of.head_by_torchvision_7x7(
                s, r, group
            ),
            "assembled": lambda s, r: peers_of.head_of(
                ops.ps_roi_assemble(s, r, SCALE, group, size, inclusive=True)
            ),
        }
        if batch > 1 or dtype != torch.float32:
            peers = {}

        def error(tensors):
            with torch.no_grad():
                few = tensors[1][:16]
                oracle = head_reference.fcis_joint_head(
                    tensors[0].double(), few, SCALE, group, size, inclusive=True
                )[0]
                return relative(ours(tensors[0], few), oracle)

        mb = batch * channels * height * width * (torch.finfo(dtype).bits // 8) / 1e6
        # on a GPU fewer classes are a matter of launches
        gated = bool(peers) and count == 300 and (self.kind == "cpu" or classes > 21)
        text = f"B{batch} K{classes} 21x21 N{count}"
        yield Case(
            "fcis_joint_head", text, "fwd", lambda: inputs(False),
            {"ours": ours, "ours and masks": with_masks, **peers}, error, mb,
            gated, str(dtype)[6:],
        )  # fmt: skip
        yield Case(
            "fcis_joint_head", text, "f+b", lambda: inputs(True),
            {
                key: both(run, (0,))
                for key, run in {"ours": ours, "ours and masks": with_masks, **peers}.items()
            },
            error, 3 * mb,
            gated, str(dtype)[6:],
        )  # fmt: skip

    def assemble_case(self, classes, count=300):
        height, width = (12, 15) if self.quick else (38, 63)
        classes, count = (min(classes, 5), min(count, self.few)) if self.quick else (classes, count)
        channels = 2 * classes * 49

        def inputs():
            score = torch.randn(1, channels, height, width, device=self.device)
            return score, self.random_rois(count, 1, height * 16, width * 16)

        def ours(score, rois):
            return ops.ps_roi_assemble(score, rois, SCALE, 7, 21, inclusive=True)

        def error(tensors):
            oracle = head_reference.Assembly(tensors[0].shape, tensors[1], SCALE, 7, 21, True).mean(
                head_reference.integral(tensors[0], 49)
            )
            return relative(ours(*tensors), oracle.permute(0, 3, 1, 2))

        mb = (channels * height * width + count * 2 * classes * 441) * 4 / 1e6
        peers = {"integral image": lambda s, r: peers_of.assembly_by_integral(s, r, 7, 21)}
        yield Case(
            "ps_roi_assemble", f"K{classes} 21x21 N{count}", "fwd", inputs, {"ours": ours, **peers},
            error, mb, False,
        )  # fmt: skip

    def paste_case(self, height, width, count=100):
        from torchvision.models.detection.roi_heads import paste_masks_in_image as torchvision_paste

        if self.quick:
            height, width, count = 60, 80, 10

        def inputs():
            return self.smooth_masks(count, 28), self.random_rois(count, 1, height, width)[:, 1:]

        runs = {
            "ours": lambda m, b: ops.paste_masks(m, b, (height, width)),
            "torchvision": lambda m, b: torchvision_paste(m[:, None], b, (height, width)) >= 0.5,
        }
        if peers_of.HAS_DETECTRON2:
            runs["detectron2"] = peers_of.paste_of_detectron2(height, width)

        def error(tensors):
            oracle = mask_reference.paste_masks(tensors[0].double(), tensors[1], height, width)
            return float((runs["ours"](*tensors) != oracle).float().mean())

        yield Case(
            "paste_masks", f"{count} x {height}x{width}", "fwd", inputs, runs, error,
            count * height * width / 1e6,
        )  # fmt: skip

    def vote_case(self):
        height, width, count, results = (60, 80, 20, 5) if self.quick else (600, 1000, 300, 100)

        def inputs():
            # neighbours of a few true boxes, so that voters overlap
            seeds = self.random_rois(max(count // 17, 1), 1, height, width)[:, 1:]
            boxes = seeds[torch.randint(len(seeds), (count,))]
            size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = boxes + (torch.rand(count, 4, device=self.device) - 0.5) * 0.15 * size
            limit = torch.tensor([width, height, width, height], device=self.device) - 1
            boxes = torch.minimum(boxes.clamp(min=0), limit)
            scores = torch.rand(count, 1, device=self.device)
            chosen = torch.arange(results, device=self.device)
            lists = ops.vote_candidates(boxes, scores, chosen, torch.zeros_like(chosen))
            return self.smooth_masks(count, 21), boxes, *lists

        def published(masks, boxes, index, offset, weight):
            index, offset, weight = (x.tolist() for x in (index, offset, weight))
            lists = [(index[a:b], weight[a:b]) for a, b in zip(offset, offset[1:], strict=False)]
            return peers_of.published_vote(masks.cpu(), boxes.cpu(), lists, height, width)

        runs = {"ours": lambda *x: ops.mask_vote(*x, (height, width)), "numpy + OpenCV": published}

        def error(tensors):
            masks, boxes = mask_reference.mask_vote(
                tensors[0].double(), *tensors[1:], height, width
            )
            found, found_boxes = runs["ours"](*tensors)
            same = (found_boxes == boxes).all(1)
            return relative(found[same], masks[same]) + float((~same).float().mean())

        yield Case(
            "mask_vote", f"{count} -> {results} at {height}x{width}", "fwd", inputs, runs, error,
            0.7,
        )  # fmt: skip

    def all_cases(self, extra):
        for channels, size in ((256, 14), (512, 14), (256, 28), (512, 28)):
            yield from self.warp_cases(channels, size)
        for channels in (256, 512):
            yield from self.warp_cases(channels, 14, pool=True)
        for ratio in (0, 2):
            yield from self.pyramid_cases(7, 512, ratio)
            yield from self.pyramid_cases(7, 1000, ratio)
            yield from self.pyramid_cases(14, 128, ratio)
        yield from self.pyramid_cases(7, 512, average=2, levels=1)
        # a tiny network: small maps, where the call itself costs as much as the work
        yield from self.pyramid_cases(7, 256, 1, channels=64, extent=(128, 176))
        for classes in (21, 81):
            yield from self.head_cases(classes)
            yield from self.assemble_case(classes)
        yield from self.paste_case(600, 1000)
        yield from self.paste_case(800, 1333)
        yield from self.vote_case()
        if extra or self.kind == "cuda":
            yield from self.warp_cases(256, 14, last=True)
        if extra:
            for count in (1, 64, 1000):
                yield from self.warp_cases(256, 14, count=count)
                yield from self.head_cases(21, count=count)
            yield from self.warp_cases(256, 14, batch=2)
            yield from self.head_cases(21, batch=2)
            yield from self.warp_cases(256, 14, dtype=torch.bfloat16)
            yield from self.head_cases(21, dtype=torch.bfloat16)
            yield from self.pyramid_cases(7, 512, last=True)
