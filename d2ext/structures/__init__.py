"""Conversions between the box conventions of the papers' releases and of detectron2."""

from .boxes import clip_boxes, to_continuous, to_inclusive

__all__ = ["clip_boxes", "to_continuous", "to_inclusive"]
