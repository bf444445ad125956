"""Importers of checkpoints that models of any project can use; importing this package registers
them."""

from d2ext.checkpoint.importers import mmdet, resnet, vgg  # noqa: F401
