"""The SDS split of the SBD annotations on PASCAL VOC 2012, which MNC and FCIS report mAP^r on."""

from .files import CLASSES, SPLITS
from .registration import cache_file, paths, register

__all__ = ["CLASSES", "SPLITS", "cache_file", "paths", "register"]
