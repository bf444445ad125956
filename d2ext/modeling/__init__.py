"""Building blocks of the models; importing this package registers them for yaml configs."""
from . import backbone as _backbone  # noqa: F401  registers the backbone builders
from .config import add_modeling_config

__all__ = ["add_modeling_config"]
