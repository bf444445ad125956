"""Full-size models without values, and tensors whose values tell where they come from."""

from pathlib import Path

import torch

from d2ext.config import load_config
from d2ext.engine.lazy_experiment import LazyExperiment
from d2ext.engine.yacs_experiment import YacsExperiment

ROOT = Path(__file__).resolve().parents[2]
_MODELS = {}


def meta_model(path, *overrides):
    """The model of a config, given below the repository, on the device "meta": names and shapes,
    but no memory. Kept."""
    key = (path, *overrides)
    if key not in _MODELS:
        cfg = load_config(str(ROOT / path), list(overrides))
        kind = LazyExperiment if path.endswith(".py") else YacsExperiment
        experiment = kind(cfg)
        experiment.set_device("meta")
        with torch.device("meta"):
            _MODELS[key] = experiment.build_model()
    return _MODELS[key]


class Coded(dict):
    """Tensors of any size in hardly any memory: all values of row r of the n-th one added are
    1e6 n + r, in double precision."""

    def add(self, name, *shape):
        assert name not in self, name
        rows = torch.arange(shape[0] if shape else 1, dtype=torch.float64) + 1e6 * len(self)
        if shape:
            self[name] = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        else:
            self[name] = rows[0]


def first_column(x):
    """The value of each row of a tensor from `Coded`, rows being constant."""
    flat = x.reshape(x.shape[0], -1) if x.numel() < 1 << 22 else x[(...,) + (0,) * (x.dim() - 1)]
    if flat.dim() == 1:
        return flat
    assert (flat == flat[:, :1]).all()
    return flat[:, 0]
