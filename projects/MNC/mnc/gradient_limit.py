"""The limit of the gradient that reaches box deltas through boxes (of the release; MNC paper,
section 4), measured in units of the loss itself.

Mixed precision multiplies the losses by a scale before it asks for gradients. A limit must grow
with it, and only the backward pass tells how large it is: a zero from every limited tensor is added
to the losses, whose gradient is the scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_PROBES: ContextVar[list[Tensor] | None] = ContextVar("loss_scale_probes", default=None)


class _LimitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.view_as(x), torch.zeros((), dtype=torch.float32, device=x.device)

    @staticmethod
    def backward(ctx, gradient, scale):
        # Without a measured scale, the losses count as they are. Half precision cannot hold it.
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scale = scale.to(torch.promote_types(gradient.dtype, torch.float32))
        bound = (scale * ctx.limit).to(gradient.dtype)
        return gradient.clamp(-bound, bound), None


class _LossScale(torch.autograd.Function):
    """Zeros, one for each loss; the gradient of the probe is the largest of theirs."""

    @staticmethod
    def forward(ctx, probe, count):
        return tuple(torch.zeros_like(probe) for _ in range(count))

    @staticmethod
    def backward(ctx, *scales):
        return torch.stack(scales).abs().max(), None


@contextmanager
def loss_scale_probes() -> Iterator[list[Tensor]]:
    """Within this context, `limit_gradient` leaves probes for `with_probes` in the list."""
    probes: list[Tensor] = []
    token = _PROBES.set(probes)
    try:
        yield probes
    finally:
        _PROBES.reset(token)


def with_probes(losses: dict[str, Tensor], probes: list[Tensor]) -> dict[str, Tensor]:
    """The same losses, through which the limits learn by what factor the losses are multiplied.

    Any of the losses that takes part in the backward pass is enough; if their factors differ, the
    largest counts.

    Args:
        losses: scalars.
        probes: of `loss_scale_probes`.
    """
    if not probes or not losses:
        return losses
    zeros = _LossScale.apply(sum(probes), len(losses))
    return {name: loss + zero for (name, loss), zero in zip(losses.items(), zeros)}


def limit_gradient(x: Tensor, limit: float | None) -> Tensor:
    """`x` itself; its gradient along this path is clipped elementwise to +-`limit`, times the
    factor of the losses if `with_probes` measures it.

    Args:
        limit: None or 0 for no limit.
    """
    if not limit:
        return x
    limited, probe = _LimitGradient.apply(x, limit)
    probes = _PROBES.get()
    if probes is not None and probe.requires_grad:
        probes.append(probe)
    return limited
