"""Argument rules of the operators, used by the PyTorch implementations and the shape functions.

The compiled kernels check the same rules with the same words (`csrc/checks.h`).
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BORDERS = ("clamp_half", "zeros")
BIN_REDUCTIONS = ("point", "edge_max")
VOTE_MODES = ("fcis", "mnc", "crop")


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError with `message` unless `condition` holds (tracing friendly)."""
    torch._check(condition, lambda: message)


def check_floating(op: str, name: str, tensor: Tensor, dim: int) -> None:
    require(tensor.dim() == dim, f"{op}: {name} must have {dim} dimensions, got {tensor.dim()}")
    require(
        tensor.dtype in FLOATS,
        f"{op}: {name} must be float32, float64, float16 or bfloat16",
    )


def check_coordinates(op: str, name: str, boxes: Tensor, columns: int, like: Tensor) -> None:
    """(N, columns), float32 (float64 beside float64 data), on the device of `like`."""
    require(
        boxes.dim() == 2 and boxes.shape[1] == columns,
        f"{op}: {name} must have shape (N, {columns})",
    )
    require(boxes.device == like.device, f"{op}: {name} must be on the device of the data")
    require(
        boxes.dtype == torch.float32
        or (boxes.dtype == torch.float64 and like.dtype == torch.float64),
        f"{op}: {name} must be float32 (float64 only beside float64 data):"
        " half precision cannot hold pixel coordinates",
    )


def check_scale(op: str, scale: float) -> None:
    require(0 < scale < float("inf"), f"{op}: spatial_scale must be positive and finite")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{op}: {name} must be one of {', '.join(choices)}")


def channels_last(tensor: Tensor) -> bool:
    """Whether results take the channels_last layout: only when `tensor` has it and no other."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def layout_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(tensor) else torch.contiguous_format


def accumulate_type(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def empty_gradient(like: Tensor) -> Tensor:
    """Stands for a gradient nobody asked for."""
    return like.new_empty((0,))
