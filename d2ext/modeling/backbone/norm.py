"""Normalisation layers of the backbones: batch norm with fixed statistics but trainable scale and
bias, group norm that also fits narrow layers, and the names under which configs ask for them."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d


class EvalStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics, while scale and bias are trained.

    This is what MMDetection calls `norm_eval=True` with `requires_grad=True`, the setting of
    its published ResNet detectors. The state dict holds exactly the four names of
    detectron2's `FrozenBatchNorm2d` (`weight, bias, running_mean, running_var`), so the files
    of either kind of layer load into the other one.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps=eps)
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A torch BatchNorm2d saves one name more; _NormBase would even add it when it is missing.
        state_dict.pop(prefix + "num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def narrow_group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or fewer where that would leave less than 2 channels a group.

    From 64 channels on (powers of two) it equals detectron2's "GN", which needs a multiple of 32.
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


def resolve_norm(norm: str | Callable) -> str | Callable:
    """Translate the norm names that `detectron2.layers.get_norm` lacks; pass others through.

    Args:
        norm: "EvalStatsBN", "GN" (in its narrow form) or "LN" (over the channels of each cell; in
            `get_norm` of detectron2's main only), else anything `get_norm` accepts.
    """
    layer_norm = partial(LayerNorm2d, eps=1e-6)
    own = {"EvalStatsBN": EvalStatsBatchNorm2d, "GN": narrow_group_norm, "LN": layer_norm}
    return own.get(norm, norm) if isinstance(norm, str) else norm
