"""Importers of checkpoints that models of any project can use; importing this package registers
them."""

from . import mmdet, resnet, vgg  # noqa: F401
