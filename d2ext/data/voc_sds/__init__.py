"""The SDS split of the SBD annotations on PASCAL VOC 2012, which MNC and FCIS report mAP^r on."""

from d2ext.data.voc_sds.files import CLASSES, SPLITS
from d2ext.data.voc_sds.registration import cache_file, paths, register

__all__ = ["CLASSES", "SPLITS", "cache_file", "paths", "register"]
