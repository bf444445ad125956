"""Optimisers. `model` is filled in by the training loop."""

from d2ext.solver import make_optimizer

from detectron2.config import LazyCall as L

SGD = L(make_optimizer)(
    name="SGD",
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
    weight_decay_norm=0.0,
    lr_multipliers=[],
    clip_gradients=None,
)

AdamW = L(make_optimizer)(
    name="AdamW",
    lr=1e-4,
    weight_decay=1e-4,
    weight_decay_norm=0.0,
    lr_multipliers=[],
    layer_decay=1.0,
    decay_matrices_only=False,
    clip_gradients=None,
)
