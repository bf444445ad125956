"""Annotations of other programs as COCO instances files, and a split of such files."""
