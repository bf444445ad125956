"""Where the time of a detector goes, what it computes and what it has to move, by forward hooks."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LEAVES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
PARTS = ("backbone", "RPN", "pooling", "heads", "other")


class PartTimer:
    """Exclusive seconds of the parts of a model while it runs.

    "pooling" is every pooler of regions, "heads" the convolutions and linear layers of the region
    heads. What no module does is "other": matching, targets, losses, suppression, pasting, and the
    position-sensitive assembly of FCIS.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        """
        Args:
            model: a detector of detectron2, of this collection or of torchvision.
            device: where it runs. On a GPU every part is waited for.
        """
        self.device = device
        self._stack: list[list] = []
        self.spent: dict[str, float] = defaultdict(float)
        rpn = getattr(model, "proposal_generator", None) or getattr(model, "rpn", None)
        self._watch(model.backbone, "backbone")
        for module in rpn.modules() if rpn is not None else ():
            if module is rpn or isinstance(module, LEAVES):  # its forward may not be called
                self._watch(module, "RPN")
        self._watch_heads(model.roi_heads)

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def _watch(self, module, part):
        module.register_forward_pre_hook(lambda *_: self._stack.append([part, self._now(), 0.0]))
        module.register_forward_hook(self._leave)

    def _leave(self, *_):
        part, start, inner = self._stack.pop()
        whole = self._now() - start
        self.spent[part] += whole - inner
        if self._stack:
            self._stack[-1][2] += whole

    def _watch_heads(self, module):
        for child in module.children():
            if _is_pooler(child):
                self._watch(child, "pooling")
            elif isinstance(child, LEAVES):
                self._watch(child, "heads")
            else:
                self._watch_heads(child)

    def run(self, step: Callable) -> tuple[float, dict[str, float]]:
        """Seconds of one call in all, and by part ("other" is the rest)."""
        self.spent.clear()
        start = self._now()
        step()
        whole = self._now() - start
        spent = dict(self.spent)
        spent["other"] = whole - sum(spent.values())
        return whole, spent


def _is_pooler(module):
    name = type(module).__name__
    return "Pool" in name or name in ("MultiScaleRoIAlign", "ROIAlign", "RoIWarp")


def count_work(model: nn.Module, step: Callable) -> tuple[float, float]:
    """One call: GFLOP (a multiplication and an addition count two), and megabytes that
    convolutions and linear layers read and write if nothing else touched memory."""
    total = 0.0

    def add(module, inputs, output):
        nonlocal total
        tensors = [*inputs, output, module.weight]
        total += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, LEAVES)]
    with FlopCounterMode(display=False) as counter:
        step()
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() / 1e9, total / 1e6
