"""Region heads; importing this package registers them for yaml configs."""

from .multi_stage import MultiStageROIHeads

__all__ = ["MultiStageROIHeads"]
